"""Stage `encode`: what stays of a part, as ids, in the order of a keyed hash of the text.

The held-out documents are those whose key lies below the border, so each split and each slice of it is one stretch.
"""

import ctypes
from collections.abc import Iterable
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llamita.data import duplicates, language, lines, substrings
from llamita.data.collect import REMOVED, Table, curator
from llamita.data.curate import STAYS, Block, Removed, replaced
from llamita.data.engine import Facts, Stage, Tick
from llamita.data.job import Job, a_part
from llamita.data.resolve import WAYS, buckets, is_prose
from llamita.data.sampler import mix, round_keys
from llamita.data.shards import COLUMNS, TOKEN
from llamita.data.strings import Strings
from llamita.tokenizer import Tokenizer
from llamita.tokenizer.carried import AnyTokenizer
from llamita.tokenizer.vocabulary import JSON_NAME

if TYPE_CHECKING:
    import pyarrow

    from llamita.tokenizer.bulk import Bulk

KEY = np.dtype([("key", "<u8"), ("row", "<i8"), ("start", "<i8"), ("tokens", "<i8")])


def order_keys(ids: np.ndarray, seed: int) -> np.ndarray:
    """A key for each document id (a hash of its text), uint64 [D]: its place in the order, and its split."""
    return mix(ids ^ np.uint64(round_keys(seed, "order")[0]))


@lru_cache(maxsize=1)
def fast_twin(tokenizer: Tokenizer, folder: Path) -> "Bulk":
    """Once a process, in the place of the models of stage `read`. `folder` = where the tokenizer was saved."""
    curator.cache_clear()
    language.forget()
    from llamita.tokenizer.bulk import Bulk

    bulk = Bulk(tokenizer, (folder / JSON_NAME).read_bytes(), all_cores=False)
    give_back()
    return bulk


def give_back() -> None:
    """Freed memory to the system: glibc keeps the 50 MB that a start of the fast twin leaves; others keep none."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def forget() -> None:
    """Let go of the fast twin."""
    fast_twin.cache_clear()
    give_back()


def encoded(texts: list[str], tokenizer: AnyTokenizer, bulk: "Bulk | None") -> tuple[np.ndarray, np.ndarray]:
    """The ids of all texts, one after another, and how many each has; the same from either encoder."""
    if bulk is not None:
        return bulk.encode(texts)
    rows = tokenizer.encode_batch(texts)
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    return np.fromiter(chain.from_iterable(rows), TOKEN, lengths.sum()), lengths


def framed(texts: list[str], tokenizer: AnyTokenizer, bulk: "Bulk | None") -> tuple[np.ndarray, np.ndarray]:
    """The same with BOS (EOS where texts have no BOS) before each text, and EOS behind it."""
    ids, lengths = encoded(texts, tokenizer, bulk)
    lengths = lengths + 2
    ends = np.cumsum(lengths)
    found, is_id = np.empty(len(ids) + 2 * len(texts), TOKEN), np.ones(len(ids) + 2 * len(texts), bool)
    is_id[ends - 1] = is_id[ends - lengths] = False
    found[is_id] = ids
    first, last = np.array([tokenizer.bos_id if tokenizer.adds_bos else tokenizer.eos_id, tokenizer.eos_id], TOKEN)
    found[ends - lengths], found[ends - 1] = first, last
    return found, lengths


class Remains:
    """The tables of a part without what stands elsewhere; what goes is written beside the part's other losses."""

    def __init__(self, job: Job, number: int):
        self.job, self.number = job, number
        self.drop, self.copies = (job.load("resolve", number, what) for what in ("drop", "copies"))
        self.removed, self.file = Removed(), Table(job.path("encode", number, "removed.parquet"))
        self.cut_bytes = 0
        dedup = job.recipe.dedup
        self.frequent: np.ndarray | None = None
        if dedup.lines_more_than:
            bucket = next(index for index, parts in enumerate(buckets(job)) if number in parts)
            self.frequent = job.load("frequent", bucket, "hashes")

    def tables(self) -> "Iterable[pyarrow.Table]":
        first = 0
        for table in self.job.tables(self.number):
            rows = slice(first, first + len(table))
            first += len(table)
            table = table.append_column("cluster_size", [self.copies[rows]])
            table = self._without(
                table, np.array([STAYS, *(f"duplicate:{way}" for way in WAYS)], object)[self.drop[rows]]
            )
            yield self._without_repeated(table)
        self.file.close()

    def _without(self, table: "pyarrow.Table", reasons: np.ndarray) -> "pyarrow.Table":
        gone = reasons != STAYS
        if gone.any():
            lost = table.filter(gone).select([*REMOVED, "text", "num_bytes"])
            self.file.write(lost.append_column("reason", [reasons[gone].tolist()]))
            texts = Strings.of_arrow(lost["text"].combine_chunks())
            self.removed.add(Block(texts, {"name": lost["name"].to_pylist()}), reasons[gone])
            table = table.filter(~gone)
        return table

    def _without_repeated(self, table: "pyarrow.Table") -> "pyarrow.Table":
        """Frequent lines and repeated spans of prose are cut out."""
        places = np.flatnonzero(is_prose(table))
        dedup = self.job.recipe.dedup
        if not len(places) or (self.frequent is None and not dedup.substring_bytes):
            return table
        texts = Strings.of_arrow(table["text"].combine_chunks())
        prose, before = texts.chosen(places), int(texts.sizes.sum())
        if self.frequent is not None:
            prose = lines.without(prose, self.frequent)
        if dedup.substring_bytes:
            prose = substrings.without_repeated(prose, dedup.substring_bytes)
        texts = replaced(texts, places, prose)
        self.cut_bytes += before - int(texts.sizes.sum())
        for name, column in (("text", texts.to_arrow()), ("num_bytes", texts.sizes)):
            table = table.set_column(table.schema.get_field_index(name), name, [column])
        return self._without(table, np.where(texts.sizes == 0, "lines:nothing-left", STAYS).astype(object))


def encode(job: Job, number: int, tick: Tick) -> Facts:
    """Writes `tok` (ids), `ledger.parquet` (a row a document), and `keys.npy` (KEY) in the order of the keys."""
    import pyarrow
    import pyarrow.parquet as pq

    tokenizer, bulk = job.tokenizer, None
    if job.is_large and isinstance(tokenizer, Tokenizer):
        bulk = fast_twin(tokenizer, job.corpus / "tokenizer")
    remains, ledgers, done = Remains(job, number), [], 0
    lengths = [np.empty(0, np.int64)]
    with job.path("encode", number, "tok").open("wb") as file:
        for table in remains.tables():
            if not len(table):
                continue
            texts = Strings.of_arrow(table["text"].combine_chunks())
            ids, each = framed(texts.texts(), tokenizer, bulk)
            assert int(ids.max()) < tokenizer.vocab_size, "an id beyond the vocabulary"
            file.write(ids.data)
            lengths.append(each)
            ledgers.append(table.drop_columns("text").add_column(0, "id", [duplicates.exact_hashes(texts)]))
            done += len(table)
            tick({"docs": done, "share": done / job.docs(number)})
    tokens = np.concatenate(lengths)
    facts: Facts = {"docs": done, "tokens": int(tokens.sum()), "cut_bytes": remains.cut_bytes,
                    "removed": remains.removed.facts(), "shares": {}, "keys": []}  # fmt: skip
    table = np.zeros(done, KEY)
    if done:
        ledger = pyarrow.concat_tables(ledgers).append_column("num_tokens", [tokens])
        pq.write_table(ledger, job.path("encode", number, "ledger.parquet"), compression="lz4")
        keys = order_keys(ledger["id"].to_numpy(), job.recipe.seed)
        order = np.argsort(keys, kind="stable")
        table["key"], table["row"], table["tokens"] = keys[order], order, tokens[order]
        table["start"] = (np.cumsum(tokens) - tokens)[order]
        facts |= {"keys": [int(keys.min()), int(keys.max())], "shares": shares(ledger)}
    np.save(job.path("encode", number, "keys.npy"), table)
    return facts


def shares(ledger: "pyarrow.Table") -> dict[str, dict[str, Any]]:
    """Documents, bytes and tokens by each value of some columns."""
    found: dict[str, dict[str, Any]] = {}
    for name in (*COLUMNS, "license"):
        sums = ledger.group_by(name).aggregate([([], "count_all"), ("num_bytes", "sum"), ("num_tokens", "sum")])
        rows = zip(*(sums[c].to_pylist() for c in (name, "count_all", "num_bytes_sum", "num_tokens_sum")), strict=True)
        found[name] = {key: {"docs": docs, "bytes": size, "tokens": tokens} for key, docs, size, tokens in rows}
    return found


ENCODE = Stage("encode", a_part, encode)
