"""Sharded equals unsharded: loss, every gradient and the clipped norm, in float64 over gloo, in worlds of 2 and 4.

Each case builds a model on the meta device, lays it over its mesh, draws its weights, and gives every data rank its
rows, packed documents with padding, in two micro-batches; the twin is the plain model on the whole batch. One world
per size makes all checks and brings home a number for each; a negative control breaks one thing and must be seen.
"""

import dataclasses
import math
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from llamita.data.pack import Batch
from llamita.kernels import loss as plain_loss
from llamita.kernels.attention import Causal, Documents
from llamita.model.llama import build
from llamita.parallel import apply, context, loss, memory, mesh, reduce, rules
from llamita.parallel.layout import Layout
from tests import training, worlds

SHAPE = dataclasses.replace(training.SHAPE, num_kv_heads=4, num_heads=8, tied=False)  # 2 query heads a KV head
TIED = dataclasses.replace(SHAPE, tied=True)
MAX_NORM = 0.1
WRONG = 1e-4  # what a broken layout must differ by; sound ones stay below 1e-10
LAYOUTS = {
    2: {"dp": Layout(dp=2, fsdp=1), "fsdp": Layout(), "tp": Layout(tp=2), "recompute": Layout(tp=2, recompute=True)},
    4: {"hsdp": Layout(dp=2), "dp x tp": Layout(dp=2, tp=2), "fsdp x tp": Layout(tp=2), "cp x tp": Layout(cp=2, tp=2)},
}


def plain(shape, dtype=torch.float64):
    return build(shape).init_weights(5).to(dtype)


def sharded(shape, layout, world_mesh, dtype=torch.float64, compute_dtype=torch.float64):
    model = build(shape, device="meta", dtype=dtype)
    apply.parallelize(model, layout, world_mesh, compute_dtype=compute_dtype, reduce_dtype=dtype)
    apply.initialize(model, lambda name, size, rows: model.first_rows(name, size, rows, 5), torch.device("cpu"))
    return model


def loss_sum(model, batch, world_mesh=None):
    inputs_BT, targets_BT, attend = batch.inputs_BT, batch.targets_BT, Documents(batch.starts)
    if world_mesh is not None and world_mesh["cp"].size() > 1:
        inputs_BT, targets_BT = (context.cut(x_BT, world_mesh) for x_BT in (inputs_BT, targets_BT))
        attend = context.Context(batch.starts, world_mesh)
    hidden_MD, head = model.hidden(inputs_BT, attend).flatten(0, 1), model.output.weight
    cross_entropy = loss.linear_cross_entropy if isinstance(head, DTensor) else plain_loss.linear_cross_entropy
    return cross_entropy(hidden_MD, head, targets_BT.flatten())


def part_of(batch, index, parts):
    size = len(batch.starts) // parts
    here = slice(index * size, (index + 1) * size)
    return Batch(batch.inputs_BT[here], batch.targets_BT[here], batch.starts[here], batch.first)


def backward(model, batch, tokens, world_mesh=None):
    """Gradients of two micro-batches; returns these rows' share of the batch's mean loss."""
    share = 0.0
    for index in range(2):
        if hasattr(model, "set_requires_all_reduce"):
            reduce.sum_gradients(model, last=index == 1)
        share_here = loss_sum(model, part_of(batch, index, 2), world_mesh) / tokens
        share_here.backward()
        share += share_here.item()
    return share


def full(x):
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach()


def farthest(model, twin, read):
    theirs = dict(twin.named_parameters())
    return max(
        (full(read(weight)) - read(theirs[name])).abs().max().item() for name, weight in model.named_parameters()
    )


def difference(rank, shape, layout, break_it=lambda model: None, data_rank=None):
    """The largest difference from the twin in first weights, loss, gradients, norm and clipped gradients."""
    layout = layout.resolved(dist.get_world_size())
    world_mesh = mesh.start(layout, "cpu")
    model, twin = sharded(shape, layout, world_mesh), plain(shape)
    break_it(model)
    worst = [farthest(model, twin, lambda weight: weight)]
    batch = training.batch_of(8)
    tokens = int((batch.targets_BT != loss.NO_LOSS).sum())
    data_rank = layout.data_rank(rank) if data_rank is None else data_rank
    share = backward(model, part_of(batch, data_rank, layout.num_data_ranks), tokens, world_mesh)
    whole = reduce.total(torch.tensor(share, dtype=torch.float64), world_mesh, ("dp", "fsdp", "cp"))
    worst.append(abs(whole.item() - backward(twin, batch, tokens)))
    worst.append(farthest(model, twin, lambda weight: weight.grad))
    norm = reduce.clip(model.parameters(), MAX_NORM, world_mesh)
    worst.append(abs(norm - reduce.clip(twin.parameters(), MAX_NORM, None)))
    assert norm > 2 * MAX_NORM, "nothing was clipped"
    return max(*worst, farthest(model, twin, lambda weight: weight.grad))


def averaged(model):
    for module in (*model.layers, model):
        module.set_gradient_divide_factor(float(dist.get_world_size()))


def too_early(model, last):
    model.set_requires_all_reduce(not last)


def broken(rank):
    """Name of a negative control -> its difference; inf where torch refuses it."""
    fsdp, dp, tp = Layout(), Layout(dp=2, fsdp=1), Layout(tp=2)
    last_norm = apply.PASSAGES["last_norm"]._replace(local_grad=Replicate())
    swapped = {"vocab": None, "heads": None, "kv_heads": None, "ffn": None, "embed": "tp"}
    cases = {
        "gradients averaged": (fsdp, {"break_it": averaged}, nullcontext()),
        "copies summed before the last": (dp, {}, mock.patch.object(reduce, "sum_gradients", too_early)),
        "rows of another rank": (fsdp, {"data_rank": 0}, nullcontext()),
        "parts of a gradient not summed": (tp, {}, mock.patch.dict(apply.PASSAGES, last_norm=last_norm)),
        "a head that counts words from 0": (tp, {}, mock.patch.object(loss.dist, "get_rank", lambda group=None: 0)),
        "a norm that counts copies": (dp, {}, mock.patch.object(reduce, "_is_first_copy", lambda gradient: True)),
        "rows and columns swapped": (tp, {}, mock.patch.dict(rules.TABLE, swapped)),
    }
    found = {}
    for name, (layout, how, patch) in cases.items():
        with patch:
            try:
                found["control", name] = difference(rank, SHAPE, layout, **how)
            except RuntimeError:
                found["control", name] = math.inf
    return found


def loss_against_twin(rank):
    """The largest difference of value or gradient, in chunks of 100 tokens, some without loss, and scaled."""
    tp = mesh.start(Layout(tp=2), "cpu")["tp"]
    generator = torch.Generator().manual_seed(0)
    hidden_MD = torch.randn(250, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    weight_VD = torch.randn(64, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    targets_M = torch.randint(-1, 64, (250,), generator=generator)
    whole = plain_loss.reference_cross_entropy(hidden_MD, weight_VD, targets_M)
    whole_grads = torch.autograd.grad(whole * 0.3, (hidden_MD, weight_VD))
    cut_VD = DTensor.from_local(weight_VD.detach().chunk(2)[rank], tp, [Shard(0)]).requires_grad_()
    with mock.patch.object(plain_loss, "_chunk_rows", lambda vocab_size: 100):
        ours = loss.linear_cross_entropy(hidden_MD, cut_VD, targets_M)
    grad_MD, grad_VD = torch.autograd.grad(ours * 0.3, (hidden_MD, cut_VD))
    dist.all_reduce(grad_MD)
    pairs = [(ours, whole), (grad_MD, whole_grads[0]), (grad_VD.full_tensor(), whole_grads[1])]
    return max((a - b).abs().max().item() for a, b in pairs)


def in_bf16(rank):
    """Loss against float32's, and the dtypes that weights and gradients are kept in."""
    layout, batch = Layout(fsdp=1, tp=2), training.batch_of(4)
    model = sharded(TIED, layout, mesh.start(layout, "cpu"), torch.float32, torch.bfloat16)
    value = loss_sum(model, batch)
    value.backward()
    kept = {dtype for weight in model.parameters() for dtype in (weight.dtype, weight.grad.dtype)}
    return abs(value.item() / loss_sum(plain(TIED, torch.float32), batch).item() - 1), [str(dtype) for dtype in kept]


def slices_agree(rank, layout):
    """Whether DTensor cut every weight as the rules' arithmetic says."""
    model = build(SHAPE, device="meta")
    axes_of = {name: axes for name, _, axes in rules.weights(model)}
    apply.parallelize(model, layout, mesh.start(layout, "cpu"), compute_dtype=torch.float32, reduce_dtype=torch.float32)
    for name, weight in model.named_parameters():
        lengths, starts = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
        told = rules.local_slices(weight.shape, axes_of[name], layout, rank)
        if tuple(map(len, told)) != lengths or tuple(held.start for held in told) != starts:
            return f"{name}: {told}, and DTensor has {starts} + {lengths}"
    return "agree"


def logits_and_training_after(rank):
    """The logits of an evaluation against the twin's, before a backward pass and after it, of weights that were there
    before they were cut."""
    layout, model, twin = Layout(fsdp=2, tp=2), plain(SHAPE), plain(SHAPE)
    apply.parallelize(model, layout, mesh.start(layout, "cpu"), compute_dtype=torch.float64, reduce_dtype=torch.float64)
    batch = training.batch_of(2)
    found = []
    for _ in range(2):
        with torch.no_grad():
            logits, theirs = (each(batch.inputs_BT, Documents(batch.starts)) for each in (model, twin))
        found.append((logits - theirs).abs().max().item())
        backward(model, batch, 1)
    try:
        model(batch.inputs_BT[:, :63], Causal())
    except ValueError as error:
        return found, str(error)


def memory_of(rank):
    """(bytes by the formula, bytes found) of weights, and of what a layer's forward pass keeps beside them.

    CPU has no fused norm: it keeps the normed values in float32 too, which the formula, made for GPUs, does not count.
    """
    layout, tokens = Layout(fsdp=2, tp=2), 2 * 64
    shape = dataclasses.replace(SHAPE, dim=64, ffn_dim=384, num_layers=4)
    model = sharded(shape, layout, mesh.start(layout, "cpu"), torch.float32, torch.bfloat16)
    held = sum(weight.to_local().numel() for weight in model.parameters())
    told = memory.memory(
        rules.weights(build(shape, device="meta")), shape, layout, rank, seq_len=64, micro_batch_size=2
    )
    kept = {}

    def keep(x):
        local = x.to_local() if isinstance(x, DTensor) else x
        if local.ndim > 2 or len(local) == tokens:  # else a weight
            kept[local.untyped_storage().data_ptr()] = local.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model.hidden(training.batch_of(2).inputs_BT, Causal())
    unfused = shape.num_layers * tokens * 2 * memory.WIDE * shape.dim // layout.tp
    return (told.weights, memory.WIDE * held), (told.activations + unfused, sum(kept.values()))


def world_of_2(rank):
    found = every_layout(rank) | broken(rank)
    found["twin of the loss"] = loss_against_twin(rank)
    found["bf16"] = in_bf16(rank)
    return found


def world_of_4(rank):
    found = every_layout(rank)
    found["slices"] = [slices_agree(rank, layout.resolved(4)) for layout in LAYOUTS[4].values()]
    found["logits"] = logits_and_training_after(rank)
    found["memory"] = memory_of(rank)
    return found


def every_layout(rank):
    cases = {
        (name, shape): layout for name, layout in LAYOUTS[dist.get_world_size()].items() for shape in (SHAPE, TIED)
    }
    return {(name, shape.tied): difference(rank, shape, layout) for (name, shape), layout in cases.items()}


def four_axes(rank):
    return difference(rank, TIED, Layout(dp=2, fsdp=2, cp=2, tp=2))


def compiled(rank):
    """The largest difference in loss and gradients over batches of other documents, and pieces of code for each."""
    layout = Layout(fsdp=1, tp=2, recompute=True, compile=True)
    model, twin = sharded(SHAPE, layout, mesh.start(layout, "cpu")), plain(SHAPE)
    worst, pieces = 0.0, []
    for seed in range(3):
        batch = training.batch_of(4, seed=seed)
        share, whole = backward(model, batch, 100), backward(twin, batch, 100)
        worst = max(worst, abs(share - whole), farthest(model, twin, lambda weight: weight.grad))
        pieces.append(counters["frames"]["ok"])
    return worst, pieces


@pytest.fixture(scope="module")
def found_by_2():
    return worlds.run(world_of_2, 2)[0]


@pytest.fixture(scope="module")
def found_by_4():
    return worlds.run(world_of_4, 4)[0]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", LAYOUTS[2])
def test_two_ranks_equal_the_unsharded_model(found_by_2, name, tied):
    assert found_by_2[name, tied] < 1e-10


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", LAYOUTS[4])
def test_four_ranks_equal_the_unsharded_model(found_by_4, name, tied):
    assert found_by_4[name, tied] < 1e-10


@pytest.mark.parametrize(
    "name",
    [
        "gradients averaged",
        "copies summed before the last",
        "rows of another rank",
        "parts of a gradient not summed",
        "a head that counts words from 0",
        "a norm that counts copies",
        "rows and columns swapped",
    ],
)
def test_a_broken_layout_is_seen(found_by_2, name):
    assert found_by_2["control", name] > WRONG


def test_the_loss_over_a_cut_vocabulary_equals_its_twin(found_by_2):
    assert found_by_2["twin of the loss"] < 1e-12


def test_bf16_computes_near_float32_and_keeps_weights_and_gradients_in_it(found_by_2):
    difference, kept = found_by_2["bf16"]
    assert difference < 1e-3 and kept == ["torch.float32"]


def test_every_rank_holds_the_slices_that_the_rules_tell(found_by_4):
    assert found_by_4["slices"] == ["agree"] * len(LAYOUTS[4])


def test_an_evaluation_gives_whole_logits_and_training_goes_on(found_by_4):
    differences, refusal = found_by_4["logits"]
    assert max(differences) < 1e-10
    assert refusal == "a row of 63 tokens cannot be cut over tp 2: pad it to a multiple"


def test_memory_is_what_a_rank_holds_and_keeps(found_by_4):
    (weights_told, weights), (kept_told, kept) = found_by_4["memory"]
    assert weights_told == weights
    assert abs(kept_told / kept - 1) < 0.05


@pytest.mark.slow
def test_compiled_layers_equal_the_unsharded_model_and_are_compiled_once():
    worst, pieces = worlds.run(compiled, 2, seconds=400)[0]
    assert worst < 1e-10
    assert pieces[0] == pieces[-1] > 0, "other documents must not be compiled again"


@pytest.mark.slow
def test_sixteen_ranks_on_four_axes_equal_the_unsharded_model():
    assert max(worlds.run(four_axes, 16, seconds=400)) < 1e-10
