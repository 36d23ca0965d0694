"""What all formats share: a folder that appears whole or not at all, and JSON files of strangers, bounded."""

import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llamita.model.shape import MAX_SIZE

# Bounds on what a stranger's file may ask for, far above any Llama.
MAX_JSON_BYTES = 64 << 20


@contextmanager
def replacing(folder: Path | str) -> Iterator[Path]:
    """A new empty folder to fill; once the block ends without an error it takes the place of `folder`.

    `folder` stays as it was where the block or the disk fails (OSError), where it is no older export of ours, whole
    and unchanged, and where another process is writing it (ValueError). At no moment are both gone.
    """
    folder = Path(folder).resolve()
    new, old = (folder.with_name(f".{folder.name}.{kind}") for kind in ("tmp", "old"))
    if old.exists() and not folder.exists():  # killed between two renames
        os.replace(old, folder)
    _may_be_replaced(folder)
    new.mkdir(parents=True, exist_ok=True)
    with _locked(new, folder):
        for left in new.iterdir():  # by a run that was killed
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        try:
            yield new
            _swap(new, folder, old)
        finally:
            shutil.rmtree(new, ignore_errors=True)


@contextmanager
def _locked(new: Path, folder: Path) -> Iterator[None]:
    place = os.open(new, os.O_RDONLY)
    try:
        fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not new.exists() or os.fstat(place).st_ino != new.stat().st_ino:
            raise BlockingIOError
        yield
    except BlockingIOError:
        raise ValueError(f"another process is writing {folder}: wait for it, or choose another folder") from None
    finally:
        os.close(place)


def _may_be_replaced(folder: Path) -> None:
    """An older export lists all its files, with their hashes, in its proof.json; an empty folder may go too."""
    if folder.is_file():
        raise ValueError(f"{folder} is a file: give the name of a folder")
    if not folder.exists():
        return
    there = {path.name for path in folder.iterdir()} - {"proof.json"}
    listed = read_json(folder / "proof.json").get("sha256") if (folder / "proof.json").is_file() else {}
    card = folder / "README.md"
    if isinstance(listed, dict) and card.is_file() and sha256(card) != listed.get(card.name):
        listed.pop(card.name, None)  # somebody wrote on it
    if strange := sorted(there - set(listed if isinstance(listed, dict) else ())):
        raise ValueError(
            f"{folder} holds {strange[0]!r}, which no export of ours put there and which would be deleted: "
            "move it away or choose another folder"
        )


def sha256(path: Path) -> str:
    """Of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _swap(new: Path, folder: Path, old: Path) -> None:
    for path in new.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    if not folder.exists():
        os.replace(new, folder)
        return
    _may_be_replaced(folder)
    shutil.rmtree(old, ignore_errors=True)
    os.replace(folder, old)
    try:
        os.replace(new, folder)
    except OSError:
        os.replace(old, folder)
        raise
    shutil.rmtree(old)


def write_json(path: Path, data: dict[str, Any]) -> None:
    """`data` as a JSON file that people can read."""
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of bounded size. Raises ValueError when it is absent or anything else."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give the folder of a model")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"{path} is larger than {MAX_JSON_BYTES} bytes: it is no such file")
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds no JSON object")
    return data


def whole(data: dict[str, Any], key: str, path: Path, default: int | None = None, limit: int = MAX_SIZE) -> int:
    """A whole number from 1 to `limit` under `key`, `default` where it is absent or null. Raises ValueError."""
    value = default if data.get(key) is None else data[key]
    if type(value) is not int or not 1 <= value <= limit:
        raise ValueError(f"{path}: {key} must be a whole number from 1 to {limit}, not {value!r:.80}")
    return value


def number(data: dict[str, Any], key: str, path: Path, default: float | None = None) -> float:
    """A finite number above 0 under `key`, `default` where it is absent or null. Raises ValueError."""
    value: Any = default if data.get(key) is None else data[key]
    if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
        raise ValueError(f"{path}: {key} must be a number above 0, not {value!r:.80}")
    return float(value)
