"""What a run's state is, and its way to disk and back: weights, optimizer, average, random numbers, counters, guard."""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llamita import config
from llamita.checkpoint import store
from llamita.checkpoint.writer import Writer
from llamita.model.llama import Llama
from llamita.train.average import EMA
from llamita.train.compute import Compute
from llamita.train.health import Guard
from llamita.train.optim import Optimizer
from llamita.train.run import Run
from llamita.train.schedule import EXTENDABLE, check_extension

# Settings that may change between a stop and the next start: they move no weight, or by the order of sums alone.
FREE = (
    "log.", "checkpoint.", "health.", "parallel.", "micro_batch_size", "data.num_workers", "device", "name",
    "data.corpus", "tokenizer",
)  # fmt: skip


@dataclass
class Counters:
    """Steps done, target tokens seen, seconds spent training."""

    step: int = 0
    tokens: int = 0
    elapsed: float = 0.0


class Since:
    """Where a stretch between two lines of progress began, and the FLOPs that this rank's rows have asked for in it."""

    def __init__(self, done: Counters):
        self.step, self.tokens, self.elapsed, self.began = done.step, done.tokens, done.elapsed, time.perf_counter()
        self.flops = self.computed = 0.0  # those of the model; with padding and recomputed layers


class Saver:
    """The state of a run in its checkpoints. Every rank has one, and they save and load together."""

    def __init__(
        self, root: Path, run: Run, ranks: tuple[int, int], compute: Compute, optimizer: Optimizer, average: EMA | None,
        guard: Guard, counters: Counters,
    ):  # fmt: skip
        self.root, self.run, (self.rank, self.world) = root, run, ranks
        self.compute, self.optimizer, self.average = compute, optimizer, average
        self.guard, self.counters = guard, counters
        self.writer = Writer()

    def _state(self) -> dict[str, Any]:
        """By name, sharing memory with the run."""
        rng = {f"rng {self.rank}": {"cpu": torch.get_rng_state()}}
        if self.compute.device.type == "cuda":
            rng[f"cuda rng {self.rank}"] = {"cuda": torch.cuda.get_rng_state()}
        return {
            "model": {name: weight.detach() for name, weight in self.compute.named_parameters()},
            "optimizer": self.optimizer.state_dict(),
            **({"average": self.average.state_dict()} if self.average else {}),
            "counters": dataclasses.asdict(self.counters),
            "guard": self.guard.state(),
            "world": self.world,
            "device": self.compute.device.type,
            **rng,
        }

    def save(self) -> None:
        """Begin a checkpoint; it is written while training goes on. Raises OSError, on all ranks, where the one before
        could not be written; this one is then not begun."""
        keep = store.Keep(self.run.checkpoint.keep, self.run.checkpoint.keep_every)
        files = {"run.toml": lambda path: config.save(self.run, path)}
        self.writer.save(self.root, self.counters.step, self._state(), files, keep=keep)

    def wait(self) -> None:
        """Until the checkpoint under way is whole. Raises OSError where it could not be written."""
        self.writer.wait()

    def newest(self, report: Callable[[str], None]) -> Path | None:
        return store.newest(self.root, report)

    def load(self, folder: Path, *, with_guard: bool) -> None:
        """Restore everything in place, whatever layout wrote it. Random numbers come back to as many ranks, and on the
        kind of device, that wrote them. Without the guard's state what it has learnt since stays."""
        written: dict[str, Any] = {"world": 0, "device": ""}
        store.load(folder, written)
        state = self._state()
        rng, cuda = f"rng {self.rank}", f"cuda rng {self.rank}"
        if written["world"] != self.world:
            del state[rng]
        if (written["world"], written["device"]) != (self.world, "cuda"):
            state.pop(cuda, None)
        if not with_guard:
            del state["guard"]
        store.load(folder, state)
        vars(self.counters).update(state["counters"])
        if with_guard:
            self.guard.load(state["guard"])
        if rng in state:
            torch.set_rng_state(state[rng]["cpu"])
        if cuda in state:
            torch.cuda.set_rng_state(state[cuda]["cuda"])


def step_of(folder: Path) -> int:
    """The step of a checkpoint folder."""
    return int(folder.name.rpartition("_")[2].removesuffix(".before"))


def check_same(saved: Run, run: Run, where: Path, step: int) -> None:
    """Raise ValueError when going on with `run` from step `step` would not be going on with what was saved there."""
    changed = {key: values for key, values in config.diff(saved, run).items() if not key.startswith(FREE)}
    refused = {key: values for key, values in changed.items() if not key.startswith(EXTENDABLE)}
    if "data.fingerprint" in refused:
        raise ValueError(f"{where} was trained on other data than these: give that corpus back, or another folder")
    if refused:
        listed = ", ".join(f"{key} was {old!r} and is {new!r}" for key, (old, new) in refused.items())
        raise ValueError(
            f"{where} holds a run with other settings: {listed}; give those settings back, or another folder"
        )
    if changed:
        try:
            check_extension(saved, run, step)
        except ValueError as error:
            raise ValueError(
                f"{where} cannot go on with other settings ({', '.join(changed)}): {error}; `llamita extend` branches "
                "off an earlier checkpoint"
            ) from error


def counters(folder: Path) -> Counters:
    """The counters of a whole checkpoint."""
    state = {"counters": dataclasses.asdict(Counters())}
    store.load(folder, state)
    return Counters(**state["counters"])


def load_weights(folder: Path, model: Llama) -> None:
    """Fill a built model with a checkpoint's weights, in place: their average, where the run keeps one."""
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    if config.load(Run, folder / "run.toml").average.half_life:
        mass = torch.zeros((), dtype=torch.float64)
        store.load(folder, {"average": {"mean": weights, "mass": mass}})
    else:
        store.load(folder, {"model": weights})
