"""What every task of a build is told, and where in the work folder things lie."""

import json
import os
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING

import numpy as np

from llamita.data.curate import Judge
from llamita.data.minhash import NUM_BANDS, SKETCH
from llamita.data.read import Part
from llamita.data.recipe import Recipe
from llamita.tokenizer.carried import AnyTokenizer
from llamita.tokenizer.opened import open_tokenizer

if TYPE_CHECKING:
    import pyarrow


BULK_BYTES = 32 * 2**20

# Of each document that a part keeps.
ROWS = {"size": np.dtype("<i8"), "date": np.dtype("<i8"), "sketch": np.dtype(("<u4", (SKETCH,)))}
BANDS = tuple(f"band-{band:02d}" for band in range(NUM_BANDS))
# A hash by which documents are the same, and whose it is among those that the part keeps.
HASH = np.dtype([("hash", "<u8"), ("row", "<u4")])


@dataclass(frozen=True)
class Job:
    """A build: `judge` makes, in a worker, what gives bits per byte of texts, where the recipe names a model."""

    folder: Path
    recipe: Recipe
    num_parts: int
    judge: Callable[[], Judge] | None = None

    def path(self, stage: str, number: int, suffix: str) -> Path:
        """A file of one task: `read/000012.parquet`."""
        return self.folder / stage / f"{number:06d}.{suffix}"

    def part(self, number: int) -> Part:
        return Part.from_json(json.loads(self.path("parts", number, "json").read_bytes()))

    @property
    def corpus(self) -> Path:
        """What becomes the corpus folder at the end."""
        return self.folder / "corpus"

    @property
    def tokenizer(self) -> AnyTokenizer:
        folder = self.corpus / "tokenizer"
        if folder not in _opened:
            _opened[folder] = open_tokenizer(folder)
        return _opened[folder]

    @property
    def index(self) -> Path:
        """The evaluation items to be found."""
        return self.folder / "evals.npz"

    @property
    def counts(self) -> np.ndarray:
        """The documents and bytes of each part that its own decisions left, int64 [parts, 2]; all must be read."""
        return _counts(self)

    def docs(self, number: int) -> int:
        """Documents of a part that its own decisions left."""
        return int(self.counts[number, 0])

    @property
    def is_large(self) -> bool:
        """Whether the fast encoder is worth the 2 s that it takes to make one."""
        return int(self.counts[:, 1].sum()) > BULK_BYTES

    @property
    def firsts(self) -> list[int]:
        """The number of each part's first document among those of all parts, and how many there are in all."""
        return [0, *accumulate(self.counts[:, 0].tolist())]

    def tables(self, number: int) -> "Iterator[pyarrow.Table]":
        """The documents of a part that its own decisions left, a block at a time."""
        import pyarrow.parquet as pq

        if self.docs(number):
            with pq.ParquetFile(self.path("read", number, "parquet")) as file:
                for group in range(file.num_row_groups):
                    yield file.read_row_group(group)

    def rows(self, number: int, what: str) -> np.ndarray:
        """What the documents of a part are compared by: a row of ROWS[what] each, mapped from its file."""
        if not self.docs(number):
            return np.empty(0, ROWS[what])
        kind = ROWS[what]
        return np.memmap(self.path("read", number, what), kind.base, "r").reshape(-1, *kind.shape)

    def hashes(self, number: int, name: str, low: int, high: int) -> np.ndarray:
        """HASH of a part from `low` to below `high`, sorted by hash and row. Nothing else of the file is read but what
        it takes to find them."""
        path = self.path("read", number, name)
        if not self.docs(number):
            return np.empty(0, HASH)
        with path.open("rb", buffering=0) as file:

            def at(place: int) -> int:
                file.seek(place * HASH.itemsize)
                return int.from_bytes(file.read(8), "little")

            places = range(path.stat().st_size // HASH.itemsize)
            start, end = (bisect_left(places, edge, key=at) for edge in (low, high))
            file.seek(start * HASH.itemsize)
            return np.frombuffer(file.read((end - start) * HASH.itemsize), HASH)

    def load(self, stage: str, number: int, what: str) -> np.ndarray:
        return np.load(self.path(stage, number, f"{what}.npy"), mmap_mode="r", allow_pickle=False)


@lru_cache(maxsize=1)
def _counts(job: Job) -> np.ndarray:
    """The first task that asks reads all markers, which hold much more, and leaves a small file for the others."""
    kept = job.folder / "counts.npy"
    if not kept.exists():
        markers = (json.loads(job.path("read", number, "json").read_bytes()) for number in range(job.num_parts))
        found = np.array([(facts["docs"], facts["bytes"]) for facts in markers], np.int64)
        with NamedTemporaryFile(dir=job.folder, delete=False) as aside:
            np.save(aside, found)
        os.replace(aside.name, kept)
    return np.load(kept, allow_pickle=False)


_opened: dict[Path, AnyTokenizer] = {}


def begin(job: Job, tokenizer: AnyTokenizer) -> None:
    """Forgets an earlier build of this process, whose folder may have had the same name, and keeps what it takes 0.2 s
    to open again."""
    _counts.cache_clear()
    _opened.clear()
    _opened[job.corpus / "tokenizer"] = tokenizer


def a_part(job: Job) -> int:
    """Of a stage that has a task for each part."""
    return job.num_parts
