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
    work.mkdir(parents=True, exist_ok=True)
    with _locked(work, out):
        _recover(work, out)
        _begin(work, key)
        try:
            yield work
            if (work / "corpus" / "manifest.json").exists():
                place(work)
        except ValueError as error:
            if not isinstance(error, Stopped):
                shutil.rmtree(work)
            raise


def corpus_of(work: Path) -> Path:
    """Where the corpus of a work folder belongs."""
    return work.with_name(work.name.removeprefix(".").removesuffix(".partial"))


def is_placed(work: Path) -> bool:
    """Whether its corpus stands in its place, and at most refuse is left of a work folder."""
    is_work = work.name.startswith(".") and work.name.endswith(".partial")
    return is_work and not (work / "corpus").exists() and (corpus_of(work) / "manifest.json").is_file()


def _old(out: Path) -> Path:
    return out.with_name(f".{out.name}.old")


def place(work: Path) -> None:
    """Puts the finished corpus of a work folder where it belongs, and clears up; what a kill on the way leaves, the
    next build ends or sweeps."""
    out = corpus_of(work)
    if out.exists():
        shutil.rmtree(_old(out), ignore_errors=True)
        out.rename(_old(out))
    (work / "corpus").rename(out)
    (work / "key").unlink()  # what is left of the folder is good for nothing
    shutil.rmtree(work)
    shutil.rmtree(_old(out), ignore_errors=True)


def _recover(work: Path, out: Path) -> None:
    """Undoes or ends what a kill within `place` left half done."""
    if _old(out).exists():
        if out.exists():
            shutil.rmtree(_old(out))
        else:
            _old(out).rename(out)
    if is_placed(work):
        (work / "key").unlink(missing_ok=True)


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
