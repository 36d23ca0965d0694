"""kill -9 at random instants, thirty times: of one process, of FSDP over two, of TP over two. Every run ends bit for
bit like the one that was left alone."""

import dataclasses
import random
import shutil
import time

import pytest

from llamita.checkpoint import store
from llamita.parallel.layout import Layout
from llamita.train.run import Average, Checkpoint, Log
from tests import drill, training

RUN = dataclasses.replace(
    training.RUN, shape=drill.SHAPE, steps=24, average=Average("4"), checkpoint=Checkpoint(every=3, keep=9),
    log=Log(every=1, eval_every=1000, sample_every=1000),
)  # fmt: skip
LAYOUTS = {"single": (1, Layout()), "fsdp": (2, Layout()), "tp": (2, Layout(tp=2))}


def end(folder):
    """Hashes of every rank's tensors at the last step: weights, optimizer, average and random numbers."""
    newest = store.newest(folder / "checkpoints", print)
    assert newest.name == f"step_{RUN.steps:08d}"
    return {path.name: store.shards.describe(path)["sha256"] for path in sorted(newest.glob("*.safetensors"))}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_ten_kills_at_random_instants_change_nothing(name, tmp_path):
    size, layout = LAYOUTS[name]
    run, draw, clean = dataclasses.replace(RUN, parallel=layout), random.Random(name), tmp_path / "clean"
    began = time.monotonic()
    assert not any(drill.world(clean, run, size=size)[0])
    step_seconds = (time.monotonic() - began) / RUN.steps  # too many, by what its start costs
    for number, when in enumerate(("time", "save", "load") * 3 + ("time",)):
        folder, reached, codes = tmp_path / str(number), draw.randrange(3, RUN.steps - 3, 3), [0]
        while not any(codes):  # else the kill came too late
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(clean, folder)
            for step, path in store.steps(folder / "checkpoints"):
                if step > reached:
                    shutil.rmtree(path)
            after = draw.uniform(0, step_seconds * (RUN.steps - reached) / 3) if when == "time" else draw.randrange(20)
            kill = drill.Kill(draw.randrange(size), when, after)
            codes, _ = drill.world(folder, run, size=size, kill=kill)
        assert codes[kill.rank] == -9, kill  # a "save" or "load" dies between two of its tensors
        assert not any(drill.world(folder, run, size=size)[0])
        assert end(folder) == end(clean), kill
