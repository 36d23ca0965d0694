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
from llamita.data.job import BANDS, HASH, ROWS, Job, a_part
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
    """What the documents of a part are compared by, appended to a raw file each: a part is not held in memory.

    At the end each file of hashes, 12 bytes a document, is sorted, so that a range of them is read in one piece.
    """

    def __init__(self, job: Job, number: int):
        self.job, self.number = job, number
        self.docs = 0
        self.files: dict[str, BinaryIO] = {}

    def write(self, rows: dict[str, np.ndarray], hashes: dict[str, np.ndarray]) -> None:
        """A block: values by document of each of ROWS; hashes, uint64 [docs], of which 0 is none."""
        for name, values in rows.items():
            self._append(name, values.astype(ROWS[name].base))
        for name, values in hashes.items():
            some = np.flatnonzero(values)
            table = np.empty(len(some), HASH)
            table["hash"], table["row"] = values[some], self.docs + some
            self._append(name, table)
        self.docs += len(rows["size"])

    def _append(self, name: str, values: np.ndarray) -> None:
        if name not in self.files:
            self.files[name] = self.job.path("read", self.number, name).open("wb")
        self.files[name].write(values.tobytes())

    def close(self) -> None:
        for name, file in self.files.items():
            file.close()
            if name not in ROWS:
                path = self.job.path("read", self.number, name)
                table = np.fromfile(path, HASH)
                table[np.argsort(table["hash"], kind="stable")].tofile(path)


def removed_table(block: Block, reasons: np.ndarray) -> "pyarrow.Table":
    import pyarrow

    columns = {name: block.columns[name] for name in REMOVED}
    return pyarrow.table(
        columns | {"reason": reasons.tolist(), "text": block.strings.to_arrow(), "num_bytes": block.strings.sizes}
    )


def compared(block: Block, recipe: Recipe) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """What decides which of some documents stays or verifies that they are alike, and hashes that are equal where they
    may be, within their scope."""
    dedup = recipe.dedup
    rows = {
        "size": block.strings.sizes,
        "date": np.array([date_number(date) for date in block.columns["date"]], np.int64),
    }
    hashes = {"exact": duplicates.exact_hashes(block.strings)}
    if dedup.url:
        hashes["url"] = duplicates.url_hashes(block.columns["url"])
    if dedup.minhash:
        signatures, rows["sketch"] = minhash.signed(block.strings)
        hashes |= zip(BANDS, minhash.bands(signatures).T, strict=True)
    if dedup.scope != "global":
        scopes = duplicates.name_hashes(block.columns[dedup.scope.replace("language", "lang")])
        hashes = {name: np.where(found, duplicates.scoped(found, scopes), 0) for name, found in hashes.items()}
    return rows, hashes


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
                rows.write(*compared(kept, job.recipe))
                facts["docs"] += len(kept)
                facts["bytes"] += int(kept.strings.sizes.sum())
            tick(facts | {"removed": {"docs": removed.docs}, "share": part.share(facts["bytes_in"])})
    return facts | {"removed": removed.facts(), "skipped": skipped.facts(), "hits": decide.hits}


READ = Stage("read", a_part, read)


def losses(job: Job) -> str:
    """What became of the documents and files that are not kept: how many by reason, and the names of some."""
    found = Skipped()
    for facts in READ.facts(job):
        found.add_facts(facts["skipped"])
        for reason, docs in facts["removed"]["docs"].items():
            examples = [sample["name"] for sample in facts["removed"]["samples"][reason]]
            found.add_facts({reason: {"count": docs, "examples": examples}})
    return str(found) or "no file was found"
