"""What a run's state is, and its way to disk and back: weights, optimizer, random numbers, counters, settings."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch

from llamita import config
from llamita.checkpoint import store
from llamita.model.llama import Llama
from llamita.train.optim import Optimizer
from llamita.train.run import Run

# Settings that may change between a stop and the next start: they move no weight.
FREE = ("log.", "checkpoint.", "data.num_workers", "device", "name", "data.corpus", "tokenizer")


@dataclass
class Counters:
    """Steps done, target tokens seen, seconds spent training."""

    step: int = 0
    tokens: int = 0
    elapsed: float = 0.0


def save(root: Path, run: Run, model: Llama, optimizer: Optimizer, counters: Counters) -> Path:
    """Commit the whole state as one checkpoint."""
    rng = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        rng["cuda"] = torch.cuda.get_rng_state()
    return store.save(
        root,
        counters.step,
        {
            "model.safetensors": lambda path: safetensors.torch.save_model(model, str(path)),
            "optimizer.pt": lambda path: torch.save(optimizer.state_dict(), path),
            "rng.pt": lambda path: torch.save(rng, path),
            "counters.json": lambda path: _write_json(path, dataclasses.asdict(counters)),
            "run.toml": lambda path: config.save(run, path),
        },
        keep=run.checkpoint.keep,
    )


def _write_json(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values))


def check_same(saved: Run, run: Run, where: Path) -> None:
    """Raise ValueError when going on with `run` would not be going on with what was saved."""
    changed = {k: v for k, v in config.diff(saved, run).items() if not k.startswith(FREE)}
    if changed:
        listed = ", ".join(f"{key} was {old!r} and is {new!r}" for key, (old, new) in changed.items())
        raise ValueError(
            f"{where} holds a run with other settings: {listed}; give those settings back, or another folder"
        )


def load(folder: Path, model: Llama, optimizer: Optimizer) -> Counters:
    """Restore weights, optimizer and random numbers in place from a whole checkpoint."""
    load_weights(folder, model)
    optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
    rng = torch.load(folder / "rng.pt", weights_only=True)
    torch.set_rng_state(rng["cpu"])
    if "cuda" in rng and torch.cuda.is_available():
        torch.cuda.set_rng_state(rng["cuda"])
    return Counters(**json.loads((folder / "counters.json").read_text()))


def load_weights(folder: Path, model: Llama) -> None:
    """Fill a built model with a checkpoint's weights, in place."""
    safetensors.torch.load_model(model, str(folder / "model.safetensors"))
