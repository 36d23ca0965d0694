"""Faults that strike a running world: where `tests.worlds` starts a process of a run, what is due happens to it.

A fault strikes once, on one rank, at one step, also where the run comes by that step again; a file says it has struck.
"""

import dataclasses
import errno
import os
import signal
import threading
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from llamita.checkpoint import shards, store
from llamita.model.llama import build
from llamita.parallel import replicas
from llamita.train import loop
from llamita.train.compute import Compute
from llamita.train.watch import Watch
from tests import training, worlds

SHAPE = dataclasses.replace(training.SHAPE, num_heads=8, num_kv_heads=4, tied=False)


class Fault(NamedTuple):
    kind: str
    rank: int
    step: int


def local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def strike(fault, folder, compute):
    """What happens before the gradients of the step are computed."""
    if fault.kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault.kind == "term":
        os.kill(os.getpid(), signal.SIGTERM)
    elif fault.kind == "hang":
        time.sleep(1000)
    elif fault.kind == "bit":
        _, weight = next(iter(compute.named_parameters()))
        local(weight.detach()).view(torch.int32).flatten()[3] ^= 1 << 20
    elif fault.kind == "damage":
        newest = store.steps(folder / "checkpoints")[0][1] / "rank_00000.safetensors"
        os.truncate(newest, newest.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault.kind == "disk":
        real = os.replace

        def full(source, target):
            store.os.replace = real
            raise OSError(errno.ENOSPC, "No space left on device", str(target))

        store.os.replace = full


def arm(rank, folder, faults, batch_size):
    """Make the faults of this rank happen."""
    real = Compute.gradients

    def gradients(compute, batch, *sizes):
        due = []
        for number, fault in enumerate(faults):
            struck = folder / f"struck_{number}"
            if fault.rank == rank and fault.step == batch.first // batch_size + 1 and not struck.exists():
                struck.touch()
                strike(fault, folder, compute)
                due.append(fault.kind)
        found = real(compute, batch, *sizes)
        if "nan" in due:
            _, weight = next(iter(compute.named_parameters()))
            local(weight.grad)[0] = float("nan")
        return found

    Compute.gradients = gradients


class Kill(NamedTuple):
    """A kill -9 of a rank at the `after`-th piece of a "save" or "load", or so many seconds ("time") on."""

    rank: int
    when: str
    after: float


def doom(kill):
    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    if kill.when == "time":
        threading.Timer(kill.after, die).start()
        return
    left = [kill.after]

    def counted(work):
        def counts(*args):
            left[0] -= 1
            return die() if left[0] < 0 else work(*args)

        return counts

    if kill.when == "load":
        shards.Files.read = counted(shards.Files.read)
    else:
        write = shards.write
        shards.write = lambda path, pieces, load: write(path, pieces, counted(load))


def live(rank, folder, run, faults=(), *, skipped=(), slow=-1, kill=None):
    """Train `run` in `folder`, or go on with it, while `faults` strike; steps of `skipped` are left out from the start.
    A rank `slow` reads its data slowly, and all look for such ones more often than they otherwise would."""
    folder.mkdir(parents=True, exist_ok=True)
    arm(rank, folder, faults, run.batch_size)
    if kill is not None and kill.rank == rank:
        doom(kill)
    if slow >= 0:
        loop.replicas.Pace = partial(replicas.Pace, every=4, windows=2)
        real = loop.batches
        loop.batches = lambda *args, **kwargs: (slowed(batch, rank == slow) for batch in real(*args, **kwargs))
    model = build(run.shape, device="meta")
    documents = Watch(documents=lambda first, count: tuple(f"doc of sample {first + i}" for i in range(count)))
    trainer = loop.Trainer(
        run, folder, model, [training.rows(run.data.seq_len)], watch=documents,
        first_rows=lambda name, size, rows: model.first_rows(name, size, rows, run.seed),
    )  # fmt: skip
    trainer.guard.skipped = sorted({*trainer.guard.skipped, *skipped})
    trainer.fit()
    return trainer.counters.step == run.steps


def slowed(batch, is_slow):
    time.sleep(0.02 if is_slow else 0.001)
    return batch


def world(folder, run, faults=(), *, size=2, **kwargs):
    """Exit codes of the ranks of one start of the run; 0 for those that came to its last step."""
    ended = worlds.outcomes(partial(live, **kwargs), size, folder, run, faults)
    for outcome in ended:
        assert not outcome.timed_out, outcome
    return [0 if outcome.value else outcome.exit_code for outcome in ended], ended


def to_the_end(folder: Path, run, faults=(), *, size=2, starts=12):
    """Start the run again, as torchrun or a scheduler does, until it has come to its end; the number of starts."""
    for number in range(1, starts + 1):
        codes, ended = world(folder, run, faults, size=size)
        if not any(codes):
            return number
    raise AssertionError(f"not at its end after {starts} starts: {ended}")
