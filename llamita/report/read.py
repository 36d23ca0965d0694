"""Read a run folder: metrics.jsonl, and what lies beside it."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llamita.report.units import number

PARTS = ("data", "forward", "backward", "communication", "optimizer", "checkpoint")  # of the time of a step, as shares
COLUMNS = {
    "train": (
        "step",
        "tokens",
        "loss",
        "lr",
        "grad_norm",
        "tokens_per_second",
        "mfu",
        "memory_gib",
        "elapsed",
        *PARTS,
    ),
    "eval": ("step", "tokens", "loss", "bits_per_byte"),
}


@dataclass
class Stage:
    """What one stage of a run logged, in the order of steps. `samples`: prompt -> (step, text)."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, list[tuple[float, ...]]] = field(default_factory=lambda: {kind: [] for kind in COLUMNS})
    samples: dict[str, list[tuple[float, str]]] = field(default_factory=dict)

    def table(self, kind: str) -> dict[str, np.ndarray]:
        """The columns of "train" or "eval" lines, float64 [num_lines]; NaN where a line did not say."""
        names = COLUMNS[kind]
        return dict(zip(names, np.array(self.rows[kind]).reshape(-1, len(names)).T, strict=True))


@dataclass
class Run:
    """A run folder in memory; what is absent is empty. `events` are (stage, step, message)."""

    name: str
    stages: dict[str, Stage] = field(default_factory=dict)
    events: list[tuple[str, str, str]] = field(default_factory=list)
    num_unreadable: int = 0
    results: dict[str, Any] = field(default_factory=dict)
    proof: dict[str, Any] = field(default_factory=dict)
    toml: str = ""


def _append(rows: list, row: tuple) -> None:
    """Add a row whose first field is its step. A resume logs steps again: what it overtakes goes."""
    while rows and rows[-1][0] >= row[0]:
        rows.pop()
    rows.append(row)


def _settings(entry: dict[str, Any]) -> dict[str, Any]:
    values = [(name, item["value"], str(item["source"])) for name, item in dict(entry["values"]).items()]
    shape = {name.removeprefix("shape."): value for name, value, _ in values if name.startswith("shape.")}
    machine = dict(entry.get("machine") or {})
    return {"values": values, "shape": shape | dict(entry.get("shape") or {}), "machine": machine}


def _take(run: Run, entry: dict[str, Any]) -> None:
    """File one line. Raises KeyError, TypeError or ValueError for a line that lacks what its kind needs."""
    kind, name = entry["kind"], str(entry["stage"])
    stage = run.stages.get(name) or Stage(name)
    if kind == "settings":
        stage.settings = _settings(entry)
    elif not math.isfinite(number(entry["step"])):
        raise ValueError("a line needs a step")
    elif kind in COLUMNS:
        known = entry | dict(entry.get("time") or {})
        row = tuple(number(known.get(column)) for column in COLUMNS[kind])
        if not math.isfinite(row[1]):
            raise ValueError("a curve needs tokens")
        _append(stage.rows[kind], row)
    elif kind == "sample":
        _append(stage.samples.setdefault(str(entry["prompt"]), []), (entry["step"], str(entry["text"])))
    elif kind == "event":
        run.events.append((name, f"{entry['step']:,}", str(entry["message"])))
    run.stages[name] = stage


def _metrics(path: Path, run: Run) -> None:
    """Fill `run` from a metrics.jsonl. A kill leaves a broken last line; others that are broken are counted."""
    broken = False
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            run.num_unreadable += broken
            try:
                _take(run, json.loads(line))
                broken = False
            except (ValueError, KeyError, TypeError):
                broken = bool(line.strip())


def _object(path: Path) -> dict[str, Any]:
    """A JSON file that must hold an object; {} when there is none."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): delete it or write it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value


def read(folder: Path) -> Run:
    """Read a run folder. Raises ValueError, one line, when it is none or a file in it cannot be used."""
    metrics = folder / "metrics.jsonl"
    if not metrics.is_file():
        raise ValueError(f"{folder} holds no metrics.jsonl: give the folder of a run, as llamita train writes it")
    run = Run(folder.resolve().name)
    _metrics(metrics, run)
    if not run.stages:
        raise ValueError(f"{metrics} holds no readable line: start the run again with llamita train")
    if (folder / "sft" / "metrics.jsonl").is_file():  # where llamita demo fine-tunes
        _metrics(folder / "sft" / "metrics.jsonl", run)
    run.results = _object(folder / "results.json")
    for key in ("stages", "chat_examples"):
        items = run.results.get(key, [])
        if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
            raise ValueError(f"{folder / 'results.json'}: {key} must be a list of objects")
    run.proof = _object(folder / "model" / "proof.json") or run.results.get("proof") or {}
    if not isinstance(run.proof, dict):
        raise ValueError(f"{folder / 'results.json'}: proof must be an object")
    toml = folder / "run.toml"
    run.toml = toml.read_text(encoding="utf-8", errors="replace") if toml.is_file() else ""
    return run
