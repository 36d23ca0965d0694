"""Checkpoints as commits: written aside, hashed, synced, renamed last. What is not whole is never loaded.

checkpoints/step_00000120/ holds any files and MANIFEST.json, {file name: {bytes, sha256}}; a folder is whole when every
file is as the manifest says.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

MANIFEST = "MANIFEST.json"


def save(root: Path, step: int, files: Mapping[str, Callable[[Path], None]], keep: int) -> Path:
    """Write `files` (name -> function that writes it at a path) as step `step`, then drop all but the newest `keep`.

    Raises OSError (a full disk among them) with nothing but older checkpoints left behind.
    """
    final, aside = root / f"step_{step:08d}", root / f".step_{step:08d}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        for name, write in files.items():
            write(aside / name)
        manifest = {name: describe(aside / name) for name in files}
        (aside / MANIFEST).write_text(json.dumps(manifest, indent=1))
        for name in (*files, MANIFEST):
            _sync(aside / name)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(aside, final)
        _sync(root)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    for _, old in steps(root)[keep:]:
        shutil.rmtree(old)
    return final


def steps(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint, newest first, whole or not."""
    found = [(int(path.name.removeprefix("step_")), path) for path in root.glob("step_[0-9]*") if path.is_dir()]
    return sorted(found, reverse=True)


def newest(root: Path, report: Callable[[str], None]) -> Path | None:
    """The newest whole checkpoint, or None; each newer one that is damaged is reported in one line."""
    for step, folder in steps(root):
        fault = damage(folder)
        if fault is None:
            return folder
        report(f"checkpoint of step {step} is damaged ({fault}); falling back to the one before it")
    return None


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None when it is whole."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return f"{MANIFEST} is missing or unreadable"
    for name, wanted in manifest.items():
        if Path(name).name != name or not (folder / name).is_file():
            return f"{name} is missing"
        if describe(folder / name) != wanted:
            return f"{name} is not as it was written"
    return None


def describe(path: Path) -> dict[str, int | str]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _sync(path: Path) -> None:
    """Wait until the disk has it, so that a rename never outruns its content."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
