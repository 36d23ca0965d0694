"""What all formats share: a folder that appears whole or not at all, and JSON files of strangers, bounded."""

import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Bounds on what a stranger's file may ask for, far above any Llama.
MAX_JSON_BYTES, MAX_LAYERS, MAX_SIZE = 64 << 20, 4096, 1 << 24
# What an older folder of ours may hold beside the files that the new one has.
OURS = re.compile(r"README\.md|proof\.json|model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


@contextmanager
def replacing(folder: Path | str) -> Iterator[Path]:
    """A new empty folder to fill; once the block ends without an error it takes the place of `folder`.

    `folder` stays as it was where the block or the disk fails (OSError), and where it holds files that are not of
    the kind of the new one's (ValueError). At no moment are both gone.
    """
    folder = Path(folder).resolve()
    if folder.is_file():
        raise ValueError(f"{folder} is a file: give the name of a folder")
    new = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        _swap(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _swap(new: Path, folder: Path) -> None:
    for path in new.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    if not folder.exists():
        os.replace(new, folder)
        return
    there = {path.name for path in folder.iterdir()} - {path.name for path in new.iterdir()}
    if strange := sorted(name for name in there if not OURS.fullmatch(name)):
        raise ValueError(
            f"{folder} holds {strange[0]!r}, which would be deleted: move it away or choose another folder"
        )
    old = folder.with_name(f".{folder.name}.old")
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
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ValueError(f"{path}: {key} must be a number above 0, not {value!r:.80}")
    return float(value)
