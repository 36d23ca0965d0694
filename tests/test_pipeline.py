"""Layer: numerics against a plain twin. Layers cut over pp: the loss and every gradient beside the whole model."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from llamita.data.pack import Batch
from llamita.kernels.attention import Causal, Documents
from llamita.kernels.loss import linear_cross_entropy
from llamita.parallel import loss, reduce
from llamita.parallel.apply import parallelize
from llamita.parallel.context import Context, cut
from llamita.parallel.layout import Layout
from llamita.parallel.mesh import start
from llamita.parallel.pipeline import Pipeline, layer_counts, stage_numbers, stages
from llamita.train.objective import next_token, num_targets
from tests import worlds
from tests.test_context import farthest
from tests.training import SHAPE, batch_of, model

WIDE = torch.float64
FOUR = dataclasses.replace(SHAPE, num_layers=4, tied=False)


def documents(batch):
    return Documents(batch.starts)


def head(part, hidden_BTD, batch):
    cut_over_tp = isinstance(part.output.weight, DTensor)
    cross_entropy = loss.linear_cross_entropy if cut_over_tp else linear_cross_entropy
    return cross_entropy(hidden_BTD.flatten(0, 1), part.output.weight, batch.targets_BT.flatten())


def local_parts(batch, layout, mesh):
    """The micro-batches of one row that this rank reads."""
    rows = range(len(batch.starts))
    parts = [Batch(batch.inputs_BT[[row]], batch.targets_BT[[row]], [batch.starts[row]], row) for row in rows]
    rank = mesh.get_local_rank("dp") * layout.fsdp + mesh.get_local_rank("fsdp")
    mine = parts[rank :: layout.num_data_ranks]
    if layout.cp == 1:
        return mine
    return [
        dataclasses.replace(part, inputs_BT=cut(part.inputs_BT, mesh), targets_BT=cut(part.targets_BT, mesh))
        for part in mine
    ]


def gap(layout, attend=documents, num_rows=8, break_it=lambda pipeline: None):
    """The loss, a second evaluation of it, and every gradient, beside the whole model on one rank."""
    mesh = start(layout, "cpu")
    batch, twin = batch_of(num_rows), model(0, WIDE, FOUR)
    tokens = num_targets(batch)
    expected = next_token(twin, batch, WIDE) / tokens
    expected.backward()
    held = stages(model(0, WIDE, FOUR), layout, mesh.get_local_rank("pp"))
    if layout.world > layout.pp:
        for part in held:
            parallelize(part, layout, mesh, compute_dtype=WIDE, reduce_dtype=WIDE)
    if layout.cp > 1:
        attend = lambda part: Context(part.starts, mesh)  # noqa: E731
    pipeline = Pipeline(held, layout, mesh, attend, head, WIDE)
    break_it(pipeline)
    micro = local_parts(batch, layout, mesh)
    pipeline.evaluate(micro[: layout.pp], tokens)  # other numbers of micro-batches come and go
    losses = torch.tensor([pipeline.evaluate(micro, tokens), pipeline.step(micro, tokens)], dtype=WIDE)
    reduce.total(losses, mesh, ["pp", "dp", "fsdp", "cp"])
    named = {name: weight for part in held for name, weight in part.named_parameters()}
    found = [w.grad.full_tensor() if isinstance(w, DTensor) else w.grad for w in named.values()]
    wanted = dict(twin.named_parameters())
    names = [None] * dist.get_world_size()
    dist.all_gather_object(names, list(named))
    assert set().union(*names) == set(wanted), "the ranks together hold every weight, by its own name"
    return farthest([*losses, *found], [expected, expected, *(wanted[name].grad for name in named)])


def of_another(batch):
    """A deliberate break: every micro-batch is told the documents of the one before it."""
    whole = batch_of(8)
    return Documents([whole.starts[batch.first - 1]])


def scaled(pipeline):
    """A deliberate break: the mean over micro-batches instead of their sum."""
    make = pipeline._schedule_for

    def mean(batches):
        schedule = make(batches)
        schedule.scale_grads = True
        return schedule

    pipeline._schedule_for = mean


def uneven(layout):
    """Micro-batches of one row and of two."""
    mesh = start(layout, "cpu")
    held = stages(model(0, WIDE, FOUR), layout, mesh.get_local_rank("pp"))
    Pipeline(held, layout, mesh, documents, head, WIDE).step([batch_of(1), batch_of(2)], 100)


def two(rank):
    gaps, broken = {}, {}
    with pytest.raises(ValueError, match="of 2 sizes cannot go down one pipeline"):
        uneven(Layout(pp=2, fsdp=1))
    for schedule in ("1f1b", "interleaved", "zero-bubble"):
        layout = Layout(pp=2, fsdp=1, schedule=schedule)
        gaps[schedule] = gap(layout)
        broken[f"{schedule}, documents of another"] = gap(layout, of_another)
        broken[f"{schedule}, no documents"] = gap(layout, lambda batch: Causal())
        broken[f"{schedule}, a mean"] = gap(layout, break_it=scaled)
    return gaps, broken


def four(rank):
    layouts = [Layout(pp=4, fsdp=1)]
    for schedule in ("1f1b", "zero-bubble"):
        layouts += [Layout(pp=2, schedule=schedule, **{axis: 2}) for axis in ("dp", "fsdp", "cp", "tp")]
    return {str(layout): gap(dataclasses.replace(layout, fsdp=layout.fsdp or 1)) for layout in layouts}, {}


@pytest.mark.parametrize(
    "num_layers, num_stages, counts",
    [
        (126, 16, [7, *[8] * 14, 7]),  # Llama 3 405B: one layer fewer on the first and the last stage
        (32, 4, [7, 9, 9, 7]),
        (5, 2, [3, 2]),
        (4, 4, [1, 1, 1, 1]),
        (7, 1, [7]),
    ],
)
def test_layers_are_shared_out_evenly(num_layers, num_stages, counts):
    assert layer_counts(num_layers, num_stages) == counts


def test_more_stages_than_layers_are_refused():
    with pytest.raises(ValueError, match="3 layers cannot fill 4 pipeline stages"):
        layer_counts(3, 4)


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zero-bubble"])
def test_stages_share_the_models_weights_and_names(schedule):
    layout = Layout(pp=2, fsdp=1, schedule=schedule)
    whole, found = dict(model(0, shape=FOUR).named_parameters()), {}
    for rank in range(2):
        given = model(0, shape=FOUR)
        own = dict(given.named_parameters())
        parts = stages(given, layout, rank)
        assert parts[0] is given and len(parts) == len(stage_numbers(layout, rank))
        for part in parts:
            for name, weight in part.named_parameters():
                assert weight is own[name] and name not in found
                found[name] = weight
    assert found.keys() == whole.keys()


@pytest.mark.parametrize("world", [two, four])
def test_pipelines_equal_the_whole_model(world):
    for gaps, broken in worlds.run(world, {two: 2, four: 4}[world]):
        assert max(gaps.values()) < 1e-10, gaps
        assert all(value > 1e-6 for value in broken.values()), broken
