"""Stages `match`, `resolve`, `lines` and `frequent`: which documents and lines stand in the input more than once.

Documents are numbered through all parts. `match` finds pairs of equal hashes, a task for each kind of hash and part of
its range, and reads no others; `resolve` decides once for all; lines are counted in buckets of consecutive parts.
"""

from typing import Any

import numpy as np

from llamita.data import collect, duplicates, lines
from llamita.data.engine import Facts, Stage, Tick, one
from llamita.data.job import BANDS, Job
from llamita.data.minhash import SKETCH
from llamita.data.strings import Strings

WAYS = ("exact", "url", "near")  # what makes two documents the same, in the order in which it is looked at
MATCH_BYTES = 512 * 2**20  # of hashes and numbers in memory at once
MAX_PAIRS = 1000  # that the corpus's papers list


def ways(job: Job) -> list[tuple[str, str]]:
    """Hashes to be compared: which of WAYS they are for, and the file in which they stand."""
    dedup = job.recipe.dedup
    bands = [("near", band) for band in BANDS] if dedup.minhash else []
    return [("exact", "exact")] * dedup.exact + [("url", "url")] * dedup.url + bands


def num_ranges(job: Job) -> int:
    """Into how many tasks each kind of hash is cut, so that 16 bytes a document fit into MATCH_BYTES."""
    return 1 + job.firsts[-1] * 16 // MATCH_BYTES


def match(job: Job, number: int, tick: Tick) -> Facts:
    ranges = num_ranges(job)
    (way, name), share = ways(job)[number // ranges], number % ranges
    low, high = (2**64 * edge // ranges for edge in (share, share + 1))
    parts = [job.hashes(part, name, low, high) for part in range(job.num_parts)]
    places = np.concatenate(
        [first + rows["row"].astype(np.int64) for first, rows in zip(job.firsts[:-1], parts, strict=True)]
    )
    edges = places[duplicates.same(np.concatenate([rows["hash"] for rows in parts]))]
    similarity = np.ones(len(edges), np.float32)
    if way == "near":
        edges, similarity = duplicates.verified(edges, Sketches(job), job.recipe.dedup.similarity)
    np.save(job.path("match", number, "edges.npy"), edges)
    np.save(job.path("match", number, "similarity.npy"), similarity)
    return {"documents": len(places), "edges": len(edges)}


class Sketches:
    """Rows of what candidates are verified with, by document number, from the files of the parts that have some."""

    def __init__(self, job: Job):
        self.job, self.firsts = job, np.array(job.firsts)
        self.parts: dict[int, np.ndarray] = {}

    def __getitem__(self, numbers: np.ndarray) -> np.ndarray:
        """uint32 [len, SKETCH]"""
        found = np.empty((len(numbers), SKETCH), np.uint32)
        parts = np.searchsorted(self.firsts, numbers, side="right") - 1
        for part in np.unique(parts).tolist():
            mine = parts == part
            if part not in self.parts:
                self.parts[part] = self.job.rows(part, "sketch")
            found[mine] = self.parts[part][numbers[mine] - self.firsts[part]]
        return found


def resolve(job: Job, number: int, tick: Tick) -> Facts:
    """For each part `drop.npy`: 0 stays, else 1 + the index into WAYS; `copies.npy`: documents of the cluster."""
    total = job.firsts[-1]
    if not total:
        raise ValueError(f"there is no text to build a corpus from: {collect.losses(job)}")
    drop, copies = np.zeros(total, np.uint8), np.ones(total, np.uint32)
    sizes, dates = (_joined(job, what) for what in ("size", "date"))
    pairs: list[tuple[int, int, float]] = []
    for code, way in enumerate(WAYS, start=1):
        edges, similarity = _edges(job, way)
        if not len(edges):
            continue
        if way == "near":
            fresh = np.flatnonzero((drop[edges] == 0).all(axis=1))[:MAX_PAIRS]
            pairs = [(*edges[i].tolist(), float(similarity[i])) for i in fresh]
        root = duplicates.clusters(total, edges)
        alive = drop == 0
        stays = duplicates.keep(root, job.recipe.dedup.keep, sizes, dates, alive)
        drop[alive & ~stays] = code
        copies = np.maximum(copies, np.bincount(root, minlength=total)[root].astype(np.uint32))
    for part, first in enumerate(job.firsts[:-1]):
        rows = slice(first, first + job.docs(part))
        np.save(job.path("resolve", part, "drop.npy"), drop[rows])
        np.save(job.path("resolve", part, "copies.npy"), copies[rows])
    return {"duplicates": {way: int((drop == code).sum()) for code, way in enumerate(WAYS, start=1)},
            "pairs": _named(job, pairs)}  # fmt: skip


def _joined(job: Job, what: str) -> np.ndarray:
    return np.concatenate([job.rows(part, what) for part in range(job.num_parts)])


def _edges(job: Job, way: str) -> tuple[np.ndarray, np.ndarray]:
    """The pairs that a way found, each once, and how alike they are."""
    ranges, of = num_ranges(job), ways(job)
    tasks = [number for number in range(MATCH.count(job)) if of[number // ranges][0] == way]
    edges = np.concatenate([np.empty((0, 2), np.int64), *(job.load("match", task, "edges") for task in tasks)])
    alike = np.concatenate([np.empty(0, np.float32), *(job.load("match", task, "similarity") for task in tasks)])
    edges, first = np.unique(edges, axis=0, return_index=True)
    return edges, alike[first]


def _named(job: Job, pairs: list[tuple[int, int, float]]) -> list[dict[str, Any]]:
    """The pairs with the documents' names."""
    firsts = np.array(job.firsts)
    names: dict[int, str] = {}
    wanted = np.unique(np.array([number for pair in pairs for number in pair[:2]], np.int64))
    parts = np.searchsorted(firsts, wanted, side="right") - 1
    for part in np.unique(parts).tolist():
        column = [name for table in job.tables(part) for name in table["name"].to_pylist()]
        names |= {number: column[number - firsts[part]] for number in wanted[parts == part].tolist()}
    return [{"first": names[a], "other": names[b], "similarity": round(alike, 3)} for a, b, alike in pairs]


def buckets(job: Job) -> list[list[int]]:
    """Consecutive parts that together hold at most `bucket_docs` documents, or one larger part."""
    found: list[list[int]] = []
    docs = job.recipe.dedup.bucket_docs
    held = 0
    for part in range(job.num_parts):
        if not found or held + job.docs(part) > docs:
            found.append([])
            held = 0
        found[-1].append(part)
        held += job.docs(part)
    return found


def hash_lines(job: Job, number: int, tick: Tick) -> Facts:
    """The hashes of the lines of the prose that stays."""
    found, first = [np.empty(0, np.uint64)], 0
    drop = job.load("resolve", number, "drop")
    for table in job.tables(number):
        stays = (drop[first : first + len(table)] == 0) & is_prose(table)
        found.append(lines.hashes(Strings.of_arrow(table["text"].combine_chunks()).chosen(stays)))
        first += len(table)
    hashes = np.concatenate(found)
    np.save(job.path("lines", number, "hashes.npy"), hashes)
    return {"lines": len(hashes)}


def is_prose(table: Any) -> np.ndarray:
    return np.array(table["kind"].to_pylist(), dtype=object) == "prose"


def count_lines(job: Job, number: int, tick: Tick) -> Facts:
    parts = buckets(job)[number]
    found = lines.frequent([job.load("lines", part, "hashes") for part in parts], job.recipe.dedup.lines_more_than)
    np.save(job.path("frequent", number, "hashes.npy"), found)
    return {"frequent": len(found), "parts": parts}


def num_matches(job: Job) -> int:
    return len(ways(job)) * num_ranges(job)


def counted_parts(job: Job) -> int:
    return job.num_parts if job.recipe.dedup.lines_more_than else 0


def counted_buckets(job: Job) -> int:
    return len(buckets(job)) if job.recipe.dedup.lines_more_than else 0


MATCH = Stage("match", num_matches, match)
RESOLVE = Stage("resolve", one, resolve)
LINES = Stage("lines", counted_parts, hash_lines)
FREQUENT = Stage("frequent", counted_buckets, count_lines)
