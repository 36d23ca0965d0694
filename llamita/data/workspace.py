"""The hidden folder beside a corpus in which it is made: kept while a killed build may go on, gone afterwards."""

import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llamita.data.engine import Stopped

OUR_FILES = re.compile(
    r"manifest\.json|build\.json|build-times\.json|recipe\.toml|tokenizer|removed|card\.(md|html)"
    r"|shard-\d{5,}\.(tok|doc|parquet)"
)


def is_corpus_or_empty(folder: Path) -> bool:
    names = {entry.name for entry in folder.iterdir()} if folder.is_dir() else {"not a folder"}
    return not names or ("manifest.json" in names and all(map(OUR_FILES.fullmatch, names)))


@contextmanager
def workspace(out: Path, key: str) -> Iterator[Path]:
    """A folder to work in, as a killed build of the same `key` left it; afterwards, if a whole corpus lies in it, that
    takes the place of `out`. After bad input all is gone and `out` is as it was; what is no fault of the
    input (a full disk, too little memory, a signal) leaves the finished tasks for the same command.

    Raises ValueError: another process builds there, or what stands at `out` is no corpus and would be deleted.
    """
    out = out.resolve()
    if out.exists() and not is_corpus_or_empty(out):
        raise ValueError(f"{out} exists and is no corpus folder; choose another place for the corpus")
    work = out.with_name(f".{out.name}.partial")
    old = out.with_name(f".{out.name}.old")
    if old.exists() and not out.exists():  # killed between two renames
        old.rename(out)
    work.mkdir(parents=True, exist_ok=True)
    with _locked(work, out):
        _begin(work, key)
        try:
            yield work
            if (work / "corpus" / "manifest.json").exists():
                place(work)
        except ValueError as error:
            if not isinstance(error, Stopped):
                shutil.rmtree(work)
            raise


def place(work: Path) -> None:
    """Puts the finished corpus of a work folder where it belongs, and clears up."""
    name = work.name.removeprefix(".").removesuffix(".partial")
    out, old = work.with_name(name), work.with_name(f".{name}.old")
    if out.exists():
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
    (work / "corpus").rename(out)
    shutil.rmtree(work)
    shutil.rmtree(old, ignore_errors=True)


def _begin(work: Path, key: str) -> None:
    """Empty unless what lies there was made for the same key."""
    kept = work / "key"
    if kept.is_file() and kept.read_text() == key:
        return
    for left in work.iterdir():
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    kept.write_text(key)


@contextmanager
def _locked(work: Path, out: Path) -> Iterator[None]:
    place = os.open(work, os.O_RDONLY)
    try:
        fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise ValueError(f"another process is building {out}: wait for it, or choose another folder") from None
    finally:
        os.close(place)
