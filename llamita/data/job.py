"""What every task of a build is told, and where in the work folder things lie."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
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
ROWS = {
    "exact": np.dtype("<u8"), "scope": np.dtype("<u8"), "url": np.dtype("<u8"), "size": np.dtype("<i8"),
    "date": np.dtype("<i8"), "bands": np.dtype(("<u8", (NUM_BANDS,))), "sketch": np.dtype(("<u4", (SKETCH,))),
}  # fmt: skip


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
        return _tokenizer(self.corpus / "tokenizer")

    @property
    def index(self) -> Path:
        """The evaluation items to be found."""
        return self.folder / "evals.npz"

    def docs(self, number: int) -> int:
        """Documents of a part that its own decisions left."""
        return _docs_and_bytes(self.path("read", number, "json"))[0]

    @property
    def is_large(self) -> bool:
        """Whether the fast encoder is worth the 2 s that it takes to make one."""
        markers = (self.path("read", number, "json") for number in range(self.num_parts))
        return sum(_docs_and_bytes(marker)[1] for marker in markers) > BULK_BYTES

    @property
    def firsts(self) -> list[int]:
        """The number of each part's first document among those of all parts, and how many there are in all."""
        return [0, *accumulate(self.docs(number) for number in range(self.num_parts))]

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

    def load(self, stage: str, number: int, what: str) -> np.ndarray:
        return np.load(self.path(stage, number, f"{what}.npy"), mmap_mode="r", allow_pickle=False)


@lru_cache(maxsize=2**20)
def _docs_and_bytes(marker: Path) -> tuple[int, int]:
    """Of a finished part: every task asks for those of all parts, and they are read once a process."""
    facts = json.loads(marker.read_bytes())
    return facts["docs"], facts["bytes"]


def forget() -> None:
    """What was read of an earlier build in this process, whose folder may have had the same name."""
    _docs_and_bytes.cache_clear()
    _tokenizer.cache_clear()


@lru_cache(maxsize=1)
def _tokenizer(folder: Path) -> AnyTokenizer:
    """Once a process."""
    return open_tokenizer(folder)


def a_part(job: Job) -> int:
    """Of a stage that has a task for each part."""
    return job.num_parts
