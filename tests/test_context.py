"""Layer: numerics against a plain twin. Rows cut over cp: attention, the loss and every gradient beside whole rows."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from llamita.kernels.attention import reference
from llamita.kernels.loss import linear_cross_entropy
from llamita.parallel import context, reduce
from llamita.parallel.apply import parallelize
from llamita.parallel.context import Context, cut
from llamita.parallel.layout import Layout
from llamita.parallel.mesh import start
from llamita.train.objective import next_token, num_targets
from tests import worlds
from tests.test_attention import document_mask
from tests.training import SHAPE, batch_of, model

WIDE = torch.float64
SEQ_LEN = 64
STARTS = {
    "one document a row": [[0]] * 3,
    "borders on and beside the chunks'": [[0, 8, 16, 31, 32, 33], [0, 40], [0, 7, 9, 56]],
    "a row of one, of many, of single tokens": [[0], [0, 3, 4, 20, 50], list(range(SEQ_LEN))],
}


class Natural(Context):
    """A deliberate break: positions as if rank i held the i-th part of the row."""

    def positions(self, tokens_BT):
        positions_BS = torch.arange(tokens_BT.shape[1] * self.size).expand(len(tokens_BT), -1)
        return positions_BS.chunk(self.size, dim=1)[self.rank]


class Unreduced(context._Gather):
    """A deliberate break: each rank keeps the gradient that it found itself."""

    @staticmethod
    def backward(ctx, grad):
        return grad[ctx.group.rank()], None


def farthest(first, second):
    return max(float((a - b).abs().max()) for a, b in zip(first, second, strict=True))


def attention_gap(mesh, starts, told=None):
    """Outputs and the gradients of q, k and v, beside attention with the full mask."""
    generator = torch.Generator().manual_seed(1)
    q, k, v, weight = (
        torch.randn(3, SEQ_LEN, heads, 8, dtype=WIDE, generator=generator, requires_grad=True) for heads in (4, 2, 2, 4)
    )
    whole = reference(q, k, v, document_mask(starts, SEQ_LEN))
    expected = torch.autograd.grad((whole * weight).sum(), (q, k, v))
    attend = Context(told or starts, mesh)
    for layer in range(2):  # the second call finds the plan of the first
        out = attend(layer, *(cut(x, mesh) for x in (q, k, v)))
    found = torch.autograd.grad((out * cut(weight, mesh)).sum(), (q, k, v))
    for gradient in found:
        dist.all_reduce(gradient, group=mesh.get_group("cp"))
    return farthest((out, *found), (cut(whole, mesh), *expected))


def model_gap(layout, mesh, attend=Context):
    """The loss and every gradient, beside the model that sees whole rows on one rank."""
    shape = dataclasses.replace(SHAPE, num_kv_heads=2)
    batch, twin, ours = batch_of(4), model(0, WIDE, shape), model(0, WIDE, shape)
    tokens = num_targets(batch)
    expected = next_token(twin, batch, WIDE) / tokens
    expected.backward()
    if layout.fsdp > 1:
        parallelize(ours, layout, mesh, compute_dtype=WIDE, reduce_dtype=WIDE)
    rows = slice(mesh.get_local_rank("fsdp"), None, layout.fsdp)
    inputs_BT, targets_BT = (cut(x[rows], mesh) for x in (batch.inputs_BT, batch.targets_BT))
    hidden_BTD = ours.hidden(inputs_BT, attend(batch.starts[rows], mesh))
    loss = linear_cross_entropy(hidden_BTD.flatten(0, 1), ours.output.weight, targets_BT.flatten()) / tokens
    loss.backward()
    for weight in ours.parameters():
        if not isinstance(weight, DTensor):
            reduce.total(weight.grad, mesh, ["fsdp", "cp"])
    found = [weight.grad.full_tensor() if isinstance(weight, DTensor) else weight.grad for weight in ours.parameters()]
    total = reduce.total(loss.detach(), mesh, ["fsdp", "cp"])
    return farthest([total, *found], [expected, *(weight.grad for weight in twin.parameters())])


def world(rank, size):
    layout = Layout(cp=size, fsdp=1)
    mesh = start(layout, "cpu")
    row_BS = torch.arange(16).unsqueeze(0)
    with pytest.raises(ValueError, match=f"a multiple of {2 * size}"):
        cut(row_BS[:, :-1], mesh)
    gaps = {name: attention_gap(mesh, starts) for name, starts in STARTS.items()}
    gaps["model"] = model_gap(layout, mesh)
    late = [[0, 9, 16, 31, 32, 33], [0, 41], [0, 8, 9, 56]]
    broken = {
        "borders off by one": attention_gap(mesh, STARTS["borders on and beside the chunks'"], late),
        "natural order": model_gap(layout, mesh, Natural),
    }
    right, context._Gather = context._Gather, Unreduced
    broken["no reduction"] = attention_gap(mesh, STARTS["one document a row"])
    broken["no reduction in the model"] = model_gap(layout, mesh)
    context._Gather = right
    if size == 4:
        layout = Layout(cp=2, fsdp=2)
        gaps["cp 2, fsdp 2"] = model_gap(layout, start(layout, "cpu"))
    return cut(row_BS, mesh).tolist(), gaps, broken


@pytest.mark.parametrize("size", [2, 4])
def test_rows_cut_over_cp_equal_whole_rows(size):
    found = worlds.run(world, size, size)
    for _, gaps, _ in found:
        assert max(gaps.values()) < 1e-10, gaps
    for name in found[0][2]:
        assert max(broken[name] for _, _, broken in found) > 1e-5, f"{name} must fail this test"
    held = [tokens for [tokens], _, _ in found]
    chunk = 16 // (2 * size)
    assert held[0] == [*range(chunk), *range(16 - chunk, 16)], "the first rank holds head and tail"
    assert set().union(*held) == set(range(16))
