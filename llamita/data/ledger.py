"""The ledger: what a training step read, which steps read a document, what a build kept and removed.

Steps are computed, not logged: they follow from the rows and the sampler that training itself draws from.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llamita.config import nearest
from llamita.data.sampler import Sampler
from llamita.data.shards import SPLITS, Corpus, Shard

if TYPE_CHECKING:
    import pyarrow

    from llamita.data.pack import PackedRows

PLACES = ("id", "name", "url", "source", "license", "date", "lang", "kind", "code_lang")


@dataclass(frozen=True)
class Use:
    """A stretch of document `doc` of the train split in a step: `length` pairs of token and target from `doc_start` on,
    from `row_start` on in the batch's row `row`."""

    row: int
    row_start: int
    epoch: int
    doc: int
    doc_start: int
    length: int


def uses(rows: "Sequence[PackedRows]", sampler: Sampler, samples: range) -> list[Use]:
    """What the samples of a batch are made of, in the order of its rows; rows[i] is pool i of the sampler."""
    found = []
    for number, k in enumerate(samples):
        pool, epoch, row = sampler.at(k)
        at = 0
        for doc, start, length in rows[pool].packing[row]:
            found.append(Use(number, at, epoch, doc, start, length))
            at += length
    return found


def step(corpus: Corpus, rows: "Sequence[PackedRows]", sampler: Sampler, samples: range) -> dict[str, Any]:
    """Each stretch of a document that a step reads, and shares of the step's tokens by source and licence.

    A stretch tells where it stands, half-open (`row_tokens` in row `row` of the batch, `doc_tokens` in the document),
    its share of the step's tokens, and the document's ledger row.
    """
    used = uses(rows, sampler, samples)
    total = sum(use.length for use in used)
    train = corpus.split("train")
    facts = ledger_rows(corpus, [train.place(use.doc) for use in used])
    documents = [
        {
            "row": use.row,
            "row_tokens": [use.row_start, use.row_start + use.length],
            "doc_tokens": [use.doc_start, use.doc_start + use.length],
            "tokens": use.length,
            "share": use.length / total,
            "epoch": use.epoch,
        }
        | of_document(row)
        for use, row in zip(used, facts, strict=True)
    ]
    shares = {column: shares_by(documents, column) for column in ("source", "license")}
    return {"tokens": total, "documents": documents, "shares": shares}


def shares_by(documents: Iterable[dict[str, Any]], column: str) -> dict[str, float]:
    """Share of the tokens of each value of a column, the largest first."""
    found: dict[str, float] = {}
    for document in documents:
        found[document[column]] = found.get(document[column], 0.0) + document["share"]
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def of_document(row: dict[str, Any]) -> dict[str, Any]:
    """A ledger row as plain JSON values: where the document is from, and under `signals` all that was measured."""
    signals = {
        name: None if isinstance(value, float) and math.isnan(value) else value
        for name, value in row.items()
        if name not in PLACES
    }
    return {name: row[name] for name in PLACES if name in row} | {"signals": signals}


def ledger_rows(corpus: Corpus, places: Sequence[tuple[Shard, int]]) -> list[dict[str, Any]]:
    """The ledger row of each place; every shard is read once."""
    import pyarrow.parquet as pq

    found: list[dict[str, Any]] = [{} for _ in places]
    by_shard: dict[Shard, list[int]] = {}
    for number, (shard, _) in enumerate(places):
        by_shard.setdefault(shard, []).append(number)
    for shard, numbers in by_shard.items():
        table = pq.read_table(shard.path(corpus.folder, "parquet"))
        taken = table.take([places[number][1] for number in numbers]).to_pylist()
        for number, row in zip(numbers, taken, strict=True):
            found[number] = row
    return found


def find(corpus: Corpus, key: str) -> list[tuple[str, int]]:
    """(split, number in it) of the documents that are called `key` or, if none is, whose id it is.

    Raises ValueError: there is none; it says so if the build removed it.
    """
    found = list(_matching(corpus, "name", key))
    if not found and key.isascii() and key.isdigit() and int(key) < 2**64:
        found = list(_matching(corpus, "id", int(key)))
    if not found:
        reasons = sorted({row["reason"] for row in _removed_called(corpus.folder, key)})
        if reasons:
            raise ValueError(f"{corpus.folder} has no document {key!r}: the build removed it ({', '.join(reasons)})")
        raise ValueError(f"{corpus.folder} has no document {key!r}; `llamita data inspect` shows names")
    return found


def _matching(corpus: Corpus, column: str, value: str | int) -> Iterator[tuple[str, int]]:
    import pyarrow
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    for split in SPLITS:
        first = 0
        for shard in corpus.manifest.splits[split]:
            table = pq.read_table(shard.path(corpus.folder, "parquet"), columns=[column])
            wanted = pyarrow.scalar(value, table.schema.field(column).type)
            yield from ((split, first + row) for row in np.flatnonzero(pc.equal(table[column], wanted)).tolist())
            first += shard.docs


def _removed_called(folder: Path, name: str) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet as pq

    for path in sorted((folder / "removed").glob("*.parquet")):
        yield from pq.read_table(path, columns=["name", "reason"], filters=[("name", "==", name)]).to_pylist()


def reads(
    rows: "Sequence[PackedRows]",
    sampler: Sampler,
    number: int,
    place: Callable[[int], tuple[int, int]],
    num_samples: int,
) -> list[dict[str, Any]]:
    """The steps, counted from 1, in which the first `num_samples` samples met document `number` of the train split.

    `place` gives the step, from 0, and the row of a sample. Each with its epoch, the row of the batch and the
    document's tokens that stood there, in the order of steps.
    """
    found = []
    for pool, packed in enumerate(rows):
        packing = packed.packing
        for piece in np.flatnonzero(packing.pieces[:, 0] == number).tolist():
            row = int(np.searchsorted(packing.ends, piece, side="right"))
            _, start, length = packing.pieces[piece].tolist()
            for k in takewhile(lambda k: k < num_samples, sampler.steps_of(pool, row)):
                step, at = place(k)
                read = {"step": step + 1, "epoch": sampler.at(k)[1], "row": at}
                found.append(read | {"doc_tokens": [start, start + length]})
    return sorted(found, key=lambda read: (read["step"], read["row"], read["doc_tokens"]))


def papers(corpus: Corpus) -> dict[str, Any]:
    """All that a data card tells, as plain values: the manifest, what the build did, and two histograms.

    `lengths` (tokens of a document) and `clusters` (documents alike, itself included) count documents by powers of
    two: b -> those from 2^b to below 2^(b + 1). Raises ValueError: the build's papers are missing.
    """
    for name in ("build.json", "recipe.toml"):
        if not (corpus.folder / name).is_file():
            raise ValueError(f"{corpus.folder} has no {name}; build the corpus again with `llamita data build`")
    manifest = asdict(corpus.manifest)
    splits = {
        split: {what: sum(shard[what] for shard in shards) for what in ("docs", "tokens", "bytes")}
        for split, shards in manifest["splits"].items()
    }
    shards = [shard for split in SPLITS for shard in corpus.manifest.splits[split]]
    return {
        "name": corpus.folder.resolve().name,
        "fingerprint": corpus.manifest.fingerprint,
        "manifest": manifest | {"splits": splits},
        "build": json.loads((corpus.folder / "build.json").read_bytes()),
        "recipe": (corpus.folder / "recipe.toml").read_text(),
        "lengths": _by_powers(corpus, shards, "num_tokens"),
        "clusters": _by_powers(corpus, shards, "cluster_size"),
    }


def _by_powers(corpus: Corpus, shards: Iterable[Shard], column: str) -> dict[int, int]:
    import pyarrow.parquet as pq

    counts = np.zeros(64, np.int64)
    for shard in shards:
        values = pq.read_table(shard.path(corpus.folder, "parquet"), columns=[column])[column].to_numpy()
        counts += np.bincount(np.frexp(values.astype(np.float64))[1] - 1, minlength=64)
    return {power: int(count) for power, count in enumerate(counts) if count}


def spread(total: int, count: int) -> np.ndarray:
    """At most `count` places from 0 to below `total`, evenly spread."""
    return np.unique(np.linspace(0, total - 1, min(total, count)).astype(np.int64))


def kept(corpus: Corpus, count: int) -> list[tuple[dict[str, Any], np.ndarray]]:
    """Ledger rows and ids of documents of the train split, evenly spread: their order is random."""
    train = corpus.split("train")
    places = spread(len(train), count).tolist()
    rows = ledger_rows(corpus, [train.place(place) for place in places])
    return [(row, train.tokens(place)) for row, place in zip(rows, places, strict=True)]


def removed(folder: Path, rule: str, count: int) -> list[dict[str, Any]]:
    """Documents that a build removed for a reason, evenly spread; `rule` may leave off what follows a colon.

    Raises ValueError that names the nearest reason if nothing was removed for this one.
    """
    import pyarrow.parquet as pq

    groups, reasons = [], set()
    for path in sorted((folder / "removed").glob("*.parquet")):
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                column = file.read_row_group(group, columns=["reason"])["reason"]
                reasons |= set(column.unique().to_pylist())
                rows = _with_reason(column, rule)
                if len(rows):
                    groups.append((path, group, rows))
    ends = np.cumsum([len(rows) for *_, rows in groups])
    if not groups:
        raise ValueError(f"nothing was removed for {rule!r}{nearest(rule, sorted(reasons))}")
    chosen = spread(int(ends[-1]), count)
    found: list[dict[str, Any]] = []
    for (path, group, rows), end in zip(groups, ends.tolist(), strict=True):
        mine = chosen[(chosen >= end - len(rows)) & (chosen < end)] - (end - len(rows))
        if len(mine):
            with pq.ParquetFile(path) as file:
                found += file.read_row_group(group).take(rows[mine]).to_pylist()
    return found


def _with_reason(column: "pyarrow.ChunkedArray", rule: str) -> np.ndarray:
    import pyarrow.compute as pc

    return np.flatnonzero(pc.or_(pc.equal(column, rule), pc.starts_with(column, f"{rule}:")).to_numpy())
