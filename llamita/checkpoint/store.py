"""Checkpoints as commits: written aside, hashed, synced, renamed last. What is not whole is never loaded.

checkpoints/step_00000120/ holds the state (shards.py: a safetensors file of every rank, and state.json), small files,
and MANIFEST.json, written last: {file name: {bytes, sha256}}. A folder is whole when each file is as the manifest says.
"""

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from llamita.checkpoint import shards
from llamita.checkpoint.ranks import everywhere, one_fault, rank

MANIFEST = "MANIFEST.json"
Files = Mapping[str, Callable[[Path], None]]
"""Name of a small file -> function that writes it at a path, on rank 0."""

# One process is the plain case here, not a surprise.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay after a commit; the one just written always does."""

    newest: int = 2
    every: int = 0
    """Steps that are a multiple of it stay for ever; 0 is none."""

    def dropped(self, steps: list[int], written: int) -> set[int]:
        """Steps later than `written` go too: the run went back to before them, and they are of another past."""
        past = sorted((step for step in steps if step <= written), reverse=True)
        for_ever = {step for step in past if self.every and step % self.every == 0}
        return set(steps) - set(past[: max(1, self.newest)]) - for_ever


def save(
    root: Path, step: int, state: dict[str, Any], files: Files, *, keep: Keep, group: dist.ProcessGroup | None = None
) -> Path:
    """Commit `state` and `files` as step `step`, from all ranks of `group` together; then drop what `keep` says.

    `state` is a dict, nested or flat, of tensors, DTensors and plain values (what JSON holds). A plain tensor or value
    is taken to be the same on all ranks that have its name, and written once. Where one rank fails, all raise the same
    line (OSError for a full disk, ValueError for a state that cannot be kept), with nothing but older checkpoints left.
    """
    return Commit(root, step, state, files, group).write(keep)


class Commit:
    """One checkpoint on its way: small files and the plan of the state are done here, the rest in `write`.

    With `host` the tensors are copied there as well, and `write` may run while the state moves on.
    """

    def __init__(
        self, root: Path, step: int, state: dict[str, Any], files: Files, group: dist.ProcessGroup | None,
        host: dict[Any, Tensor] | None = None,
    ):  # fmt: skip
        self.root, self.step, self.group = root, step, group
        self.final, self.aside = root / f"step_{step:08d}", root / f".step_{step:08d}.tmp"
        self.planner = shards.Planner()
        try:
            if rank(group) == 0:
                self._begin(files)
            self.planner.stage(state, host)
        except Exception as error:  # raised in `write`, where the others hear of it
            self.planner.fault = error

    def _begin(self, files: Files) -> None:
        for stale in self.root.glob(".step_*.tmp"):
            shutil.rmtree(stale)
        self.aside.mkdir(parents=True)
        for name, write in files.items():
            write(self.aside / name)

    def write(self, keep: Keep) -> Path:
        """Write and commit; returns the folder."""

        def commit(written: dict[str, dict]) -> None:
            publish(self.aside, self.final, written)
            self._drop(keep)

        try:
            dcp.save({}, storage_writer=shards.Disk(self.aside, commit), planner=self.planner, process_group=self.group)
        except BaseException as error:
            if rank(self.group) == 0:
                shutil.rmtree(self.aside, ignore_errors=True)
            raise one_fault(f"the checkpoint of step {self.step}", error) from error
        return self.final

    def _drop(self, keep: Keep) -> None:
        there = steps(self.root)
        dropped = keep.dropped([step for step, _ in there], self.step)
        for step, folder in there:
            if step in dropped or (step == self.step and folder != self.final):
                shutil.rmtree(folder)


def publish(aside: Path, final: Path, written: Mapping[str, dict]) -> None:
    """Make the folder `aside` the checkpoint `final`: mark it whole, wait for the disk, rename.

    `written` describes the files that are synced already. A checkpoint that lay at `final` counts until the instant
    that the new one does.
    """
    rest = sorted(path.name for path in aside.iterdir() if path.name not in written)
    manifest = {**written, **{name: shards.describe(aside / name) for name in rest}}
    (aside / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for name in (*rest, MANIFEST, ""):
        _sync(aside / name)
    if final.exists():
        before = final.with_name(f".{final.name}.before")
        shutil.rmtree(before, ignore_errors=True)
        os.replace(final, before)
    os.replace(aside, final)
    _sync(final.parent)


def steps(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint, newest first, whole or not."""
    names = [(re.fullmatch(r"step_(\d+)|\.step_(\d+)\.before", path.name), path) for path in root.glob("*")]
    found = [(int(name[1] or name[2]), name[1] is not None, path) for name, path in names if name and path.is_dir()]
    return [(step, path) for step, _, path in sorted(found, reverse=True)]


def newest(root: Path, report: Callable[[str], None], group: dist.ProcessGroup | None = None) -> Path | None:
    """The newest whole checkpoint, or None; each newer one that is damaged is reported in one line, by rank 0.

    All ranks of `group` call it and come to the same answer: rank 0 lists them, and each hashes its part of the files.
    """
    what, world = f"looking for a checkpoint in {root}", dist.get_world_size(group) if dist.is_initialized() else 1
    for step, folder in everywhere(what, lambda: steps(root), group)[0]:
        found = everywhere(what, lambda folder=folder: damage(folder, rank(group), world), group)  # type: ignore[misc]
        fault = next((fault for fault in found if fault is not None), None)
        if fault is None:
            return folder
        if rank(group) == 0:
            report(f"checkpoint of step {step} is damaged ({fault}); falling back to the one before it")
    return None


def damage(folder: Path, part: int = 0, parts: int = 1) -> str | None:
    """What is wrong with a checkpoint folder, or None when it is whole; of `parts` equal parts only one is hashed."""
    try:
        listed = json.loads((folder / MANIFEST).read_bytes())
        manifest = {name: (wanted["bytes"], wanted["sha256"]) for name, wanted in listed.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return f"{MANIFEST} is missing or unreadable"
    if shards.INDEX not in manifest:
        return f"{shards.INDEX} is not in {MANIFEST}"
    for name in sorted(manifest)[part::parts]:
        size, digest = manifest[name]
        path = folder / name
        if Path(name).name != name or not os.path.isfile(path):
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        try:
            if shards.describe(path)["sha256"] != digest:
                return f"{name} is not as it was written"
        except OSError as error:  # a bad block
            return f"{name} cannot be read: {error.strerror}"
    return None


def load(folder: Path, state: dict[str, Any], group: dist.ProcessGroup | None = None) -> None:
    """Fill `state` in place from a whole checkpoint, whatever layout wrote it; each rank of `group` gives its own.

    `state` says what is wanted and how it lies: tensors are filled, in their dtype and sharding, and plain values
    replaced. Of a nested dict ("model", "optimizer") all ranks together must ask for everything that was saved in it;
    other dicts are left there. So what is each rank's own (random numbers) goes under a key of its own ("rng 3"), or
    fewer ranks could not read it. Raises ValueError, on all ranks, for what is missing on either side.
    """
    sources: list[shards.Source] = []
    everywhere(f"reading {folder}", lambda: sources.append(shards.Source(folder)), group)
    try:
        dcp.load(state, storage_reader=sources[0], planner=shards.Target(), process_group=group)
    except CheckpointException as error:
        raise one_fault(f"loading {folder}", error) from error


def _sync(path: Path) -> None:
    """Wait until the disk has it, so that a rename never outruns its content."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
