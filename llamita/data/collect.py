"""Stage `read`: one part of the input, through its own decisions, to Parquet and hashes."""

import re
from collections.abc import Callable
from contextlib import closing
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from llamita.data import duplicates, minhash
from llamita.data.curate import Block, Curator, Judge, Removed, blocks
from llamita.data.engine import Facts, Stage, Tick
from llamita.data.job import ROWS, Job, a_part
from llamita.data.read import Skipped, read_part
from llamita.data.recipe import Recipe

if TYPE_CHECKING:
    import pyarrow

# Year, and as much as there is of month, day, hour, minute and second; with or without what stands between.
ISO_DATE = re.compile(
    r"((?:19|20)\d\d)(?:-?(\d\d))?(?:-?(\d\d))?(?:[T ]?(\d\d))?(?::?(\d\d))?(?::?(\d\d))?(?!\d)", re.ASCII
)
REMOVED = ("name", "source", "url", "lang", "kind")


class Table:
    """A Parquet file of blocks, opened with the first."""

    def __init__(self, path: Path):
        self.path = path
        self.writer: Any = None

    def write(self, table: "pyarrow.Table") -> None:
        import pyarrow.parquet as pq

        if self.writer is None:
            # Signals and texts hardly repeat: a dictionary costs time and saves nothing (measured).
            self.writer = pq.ParquetWriter(self.path, table.schema, compression="lz4", use_dictionary=False)
        self.writer.write_table(table)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


class RowFiles:
    """The rows of hashes of a part, appended to a raw file each: memory does not grow with the part."""

    def __init__(self, job: Job, number: int):
        self.job, self.number = job, number
        self.files: dict[str, BinaryIO] = {}

    def write(self, found: dict[str, np.ndarray]) -> None:
        for name, rows in found.items():
            if name not in self.files:
                self.files[name] = self.job.path("read", self.number, name).open("wb")
            self.files[name].write(rows.astype(ROWS[name].base).tobytes())

    def close(self) -> None:
        for file in self.files.values():
            file.close()


def removed_table(block: Block, reasons: np.ndarray) -> "pyarrow.Table":
    import pyarrow

    columns = {name: block.columns[name] for name in REMOVED}
    return pyarrow.table(
        columns | {"reason": reasons.tolist(), "text": block.strings.to_arrow(), "num_bytes": block.strings.sizes}
    )


def hashes(block: Block, recipe: Recipe) -> dict[str, np.ndarray]:
    """What documents are compared by: a row each. `sketch` is what candidates are verified with."""
    dedup = recipe.dedup
    scope = [""] * len(block) if dedup.scope == "global" else block.columns[dedup.scope.replace("language", "lang")]
    found = {
        "exact": duplicates.exact_hashes(block.strings),
        "scope": duplicates.name_hashes(scope),
        "size": block.strings.sizes,
        "date": np.array([date_number(date) for date in block.columns["date"]], np.int64),
    }
    if dedup.url:
        found["url"] = duplicates.url_hashes(block.columns["url"])
    if dedup.minhash:
        signatures, sketches = minhash.signed(block.strings)
        found |= {"bands": minhash.bands(signatures), "sketch": sketches}
    return found


def date_number(date: str) -> int:
    """2013-05-18T20:31:00Z as 20130518203100, so that later is larger; 0 for none and for dates written otherwise."""
    parts = ISO_DATE.match(date)
    return int("".join(part or "00" for part in parts.groups())) if parts else 0


@lru_cache(maxsize=1)
def curator(recipe: Recipe, index: Path, judge: Callable[[], Judge] | None) -> Curator:
    """Models and tables are loaded once a process."""
    return Curator(recipe, index, judge() if judge else None)


def read(job: Job, number: int, tick: Tick) -> Facts:
    part, skipped, removed = job.part(number), Skipped(), Removed()
    decide = curator(job.recipe, job.index, job.judge)
    kept_file, removed_file = (Table(job.path("read", number, suffix)) for suffix in ("parquet", "removed.parquet"))
    rows = RowFiles(job, number)
    facts: Facts = {"docs_in": 0, "bytes_in": 0, "docs": 0, "bytes": 0, "disk_bytes": part.num_bytes}

    def remove(block: Block, reasons: np.ndarray) -> None:
        removed.add(block, reasons)
        removed_file.write(removed_table(block, reasons))

    decide.hits.clear()
    with closing(kept_file), closing(removed_file), closing(rows):
        for block in blocks(read_part(part, skipped, extract=job.recipe.extract)):
            facts["docs_in"] += len(block)
            facts["bytes_in"] += int(block.strings.sizes.sum())
            kept = decide(block, remove)
            if len(kept):
                kept_file.write(kept.table())
                rows.write(hashes(kept, job.recipe))
                facts["docs"] += len(kept)
                facts["bytes"] += int(kept.strings.sizes.sum())
            tick(facts | {"removed": {"docs": removed.docs}, "share": part.share(facts["bytes_in"])})
    return facts | {"removed": removed.facts(), "skipped": skipped.facts(), "hits": decide.hits}


READ = Stage("read", a_part, read)
