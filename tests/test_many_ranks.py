"""The whole loop over ranks: one run in every layout, its resume on other numbers of ranks, and a drill of faults.

Worlds of 2, 3 and 4 processes over gloo train the run that one process trains, in float64, and come to its losses and
weights; a checkpoint of two ranks goes on in one and in three with the same samples.
"""

import dataclasses
import json
import shutil
from unittest import mock

import pytest
import torch

from llamita.checkpoint import weights as checkpoint_weights
from llamita.checkpoint.weights import weights
from llamita.model.llama import build
from llamita.parallel import mesh
from llamita.parallel.layout import Layout
from llamita.train import loop, state
from llamita.train.compute import Compute
from llamita.train.objective import next_token, num_targets
from llamita.train.run import Average, Checkpoint, Log, Optim, Schedule
from llamita.train.watch import Watch
from tests import training, worlds

SHAPE = dataclasses.replace(training.SHAPE, num_heads=8, num_kv_heads=4, num_layers=4, tied=False)
RUN = dataclasses.replace(
    training.RUN,
    shape=SHAPE,
    steps=6,
    batch_size=12,
    micro_batch_size=2,
    average=Average(half_life="3"),
    optim=Optim(lr=1e-2, clip=0.1),
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


HELDOUT = training.batch_of(12, seed=5)


def name_of(layout):
    sizes = "-".join(f"{axis}{size}" for axis, size in layout.sizes.items() if size > 1)
    return (sizes or "rest") + f"-{layout.schedule}"


def mean_loss(model):
    with torch.no_grad():
        return float(next_token(model, HELDOUT, torch.float64) / num_targets(HELDOUT))


def trained(folder, run, **kwargs):
    """The steps' losses of a run in float64; drawn are the first samples of each batch that this process computed."""
    model = build(run.shape, device="meta", dtype=torch.float64)
    drawn, real = [], Compute.gradients

    def recorded(compute, batch, *sizes):
        drawn.append((batch.first, len(batch.starts)))
        return real(compute, batch, *sizes)

    Compute.gradients = recorded
    try:
        watch = Watch(lambda model: {"loss": mean_loss(model)}, heldout=HELDOUT)
        trainer = loop.Trainer(
            run, folder, model, [training.rows(run.data.seq_len)], watch=watch,
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


def logged(folder, name, kind="train"):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row[name] for row in rows if row["kind"] == kind}


def farthest(folder, other, of="model."):
    mine, theirs = (saved(each, of) for each in (folder, other))
    assert mine.keys() == theirs.keys()
    return max((mine[name] - theirs[name]).abs().max().item() for name in mine)


def saved(folder, of):
    """The weights of a checkpoint, or their "average.mean."."""
    with mock.patch.object(checkpoint_weights, "MODEL", of):
        return dict(weights(folder))


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
    assert len(logged(one, "loss")) == RUN.steps and min(logged(one, "grad_norm").values()) > 2 * RUN.optim.clip
    assert farthest(one / "checkpoints/step_00000003", one / "checkpoints/step_00000006") > 1e-3, "nothing was learnt"
    for world in (2, 4):
        for layout in LAYOUTS[world]:
            folder = runs / str(world) / name_of(layout)
            for name in ("loss", "grad_norm", "tokens"):
                assert logged(folder, name) == pytest.approx(logged(one, name), abs=1e-10), (folder, name)
            for of in ("model.", "average.mean."):
                ends = (each / "checkpoints/step_00000006" for each in (folder, one))
                assert farthest(*ends, of) < 1e-9, (folder, of)
            if not layout.is_whole:
                assert logged(folder, "loss", "eval") == pytest.approx(logged(one, "loss", "eval"), abs=1e-10), folder


def test_a_run_of_two_ranks_goes_on_in_one_and_in_three_with_the_same_samples(runs, tmp_path):
    one, two = (runs / str(world) / name_of(Layout()) for world in (1, 2))
    for world in (1, 3):
        folder = tmp_path / str(world)
        shutil.copytree(two, folder)
        shutil.rmtree(folder / "checkpoints/step_00000006")
        drawn = [resumed(0, folder)] if world == 1 else worlds.run(resumed, 3, folder)
        assert [first for first, _ in drawn[0]] == [36, 48, 72]
        assert [sum(rank[step][1] for rank in drawn) for step in range(3)] == [12, 24, 24]
        assert logged(folder, "loss") == pytest.approx(logged(one, "loss"), abs=1e-6)
        for of in ("model.", "average.mean."):
            assert farthest(folder / "checkpoints/step_00000006", one / "checkpoints/step_00000006", of) < 1e-6


def test_weights_are_read_as_their_average_where_the_run_keeps_one(runs):
    folder = runs / "2" / name_of(Layout()) / "checkpoints/step_00000006"
    model = build(SHAPE, dtype=torch.float64)
    state.load_weights(folder, model)
    mean, last = saved(folder, "average.mean."), saved(folder, "model.")
    assert all(torch.equal(weight, mean[name]) for name, weight in model.named_parameters())
    assert all((mean[name] - last[name]).abs().max() > 0 for name in mean)


def test_a_world_that_the_layout_does_not_make_up_is_refused(tmp_path):
    with pytest.raises(ValueError, match="tp 2 makes 2 ranks, and 1 are running"):
        trained(tmp_path, dataclasses.replace(RUN, parallel=Layout(tp=2)))
    assert mesh.join("cpu") == (0, 1)
