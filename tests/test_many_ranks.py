"""The whole loop over ranks: one run in every layout, its resume on other numbers of ranks, and a drill of faults.

Worlds of 2, 3 and 4 processes over gloo train the run that one process trains, in float64, and come to its losses and
weights; a checkpoint of two ranks goes on in one and in three with the same samples.
"""

import dataclasses
import json
import shutil

import pytest
import torch

from llamita.checkpoint.weights import weights
from llamita.model.llama import build
from llamita.parallel import mesh
from llamita.parallel.layout import Layout
from llamita.train import loop, state
from llamita.train.compute import Compute
from llamita.train.run import Average, Checkpoint, Log, Schedule
from tests import training, worlds

SHAPE = dataclasses.replace(training.SHAPE, num_heads=8, num_kv_heads=4, num_layers=4, tied=False)
RUN = dataclasses.replace(
    training.RUN,
    shape=SHAPE,
    steps=6,
    batch_size=12,
    micro_batch_size=2,
    average=Average(half_life="3"),
    schedule=Schedule(warmup_steps=2, ramp=("4:24",)),
    checkpoint=Checkpoint(every=3, keep=9),
    log=Log(every=1, eval_every=100, sample_every=100),
)
LAYOUTS = {
    1: [Layout()],
    2: [Layout(), Layout(dp=2, fsdp=1), Layout(tp=2, recompute=True), Layout(cp=2), Layout(pp=2)],
    3: [Layout()],
    4: [Layout(dp=2, tp=2), Layout(pp=2, schedule="interleaved")],
}


def name_of(layout):
    sizes = "-".join(f"{axis}{size}" for axis, size in layout.sizes.items() if size > 1)
    return (sizes or "rest") + f"-{layout.schedule}"


def trained(folder, run, **kwargs):
    """The steps' losses of a run in float64; drawn are the first samples of each batch that this process computed."""
    model = build(run.shape, device="meta", dtype=torch.float64)
    drawn, real = [], Compute.gradients

    def recorded(compute, batch, *sizes):
        drawn.append((batch.first, len(batch.starts)))
        return real(compute, batch, *sizes)

    Compute.gradients = recorded
    try:
        trainer = loop.Trainer(
            run, folder, model, [training.rows(run.data.seq_len)],
            first_rows=lambda name, size, rows: model.first_rows(name, size, rows, run.seed), **kwargs,
        )  # fmt: skip
        trainer.fit()
    finally:
        Compute.gradients = real
    return drawn


def every_layout(rank, folder, world):
    for layout in LAYOUTS[world]:
        trained(folder / name_of(layout), dataclasses.replace(RUN, parallel=layout))
    return True


def resumed(rank, folder):
    return trained(folder, RUN)


def losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if row["kind"] == "train"}


def farthest(folder, other):
    mine, theirs = weights(folder), weights(other)
    assert mine.keys() == theirs.keys()
    return max((mine[name] - theirs[name]).abs().max().item() for name in mine)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of finished runs by number of ranks and layout."""
    root = tmp_path_factory.mktemp("ranks")
    trained(root / "1" / name_of(Layout()), RUN)
    for world in (2, 4):
        worlds.run(every_layout, world, root / str(world), world)
    return root


def test_every_layout_comes_to_the_losses_and_weights_of_one_process(runs):
    one = runs / "1" / name_of(Layout())
    assert len(losses(one)) == RUN.steps
    assert farthest(one / "checkpoints/step_00000003", one / "checkpoints/step_00000006") > 1e-3, "nothing was learnt"
    for world in (2, 4):
        for layout in LAYOUTS[world]:
            folder = runs / str(world) / name_of(layout)
            assert losses(folder) == pytest.approx(losses(one), abs=1e-10), folder
            assert farthest(folder / "checkpoints/step_00000006", one / "checkpoints/step_00000006") < 1e-9, folder


def test_a_run_of_two_ranks_goes_on_in_one_and_in_three_with_the_same_samples(runs, tmp_path):
    one, two = (runs / str(world) / name_of(Layout()) for world in (1, 2))
    for world in (1, 3):
        folder = tmp_path / str(world)
        shutil.copytree(two, folder)
        shutil.rmtree(folder / "checkpoints/step_00000006")
        drawn = [resumed(0, folder)] if world == 1 else worlds.run(resumed, 3, folder)
        assert [first for first, _ in drawn[0]] == [36, 48, 72]
        assert [sum(rank[step][1] for rank in drawn) for step in range(3)] == [12, 24, 24]
        assert losses(folder) == pytest.approx(losses(one), abs=1e-6)
        assert farthest(folder / "checkpoints/step_00000006", one / "checkpoints/step_00000006") < 1e-6


def test_weights_are_read_as_their_average_where_the_run_keeps_one(runs):
    folder = runs / "2" / name_of(Layout()) / "checkpoints/step_00000006"
    model = build(SHAPE, dtype=torch.float64)
    state.load_weights(folder, model)
    last = weights(folder)
    assert all((weight - last[name]).abs().max() > 0 for name, weight in model.named_parameters())


def test_a_world_that_the_layout_does_not_make_up_is_refused(tmp_path):
    with pytest.raises(ValueError, match="tp 2 makes 2 ranks, and 1 are running"):
        trained(tmp_path, dataclasses.replace(RUN, parallel=Layout(tp=2)))
    assert mesh.join("cpu") == (0, 1)
