"""Evaluation items that stand in the training text: found word by word, also lightly edited, and reported item by item.

GPT-3 looked for 13 words in a row (arXiv 2005.14165, appendix C), Llama 3 for 8, and for the share of an example that
they cover (arXiv 2407.21783, section 5.1.4). Here the share decides, measured with runs of SEED words or more: one word
changed in ten breaks most runs of 8, few of 5.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llamita.data.evals import Item, read_items
from llamita.data.overlap import COUNTS, MAX_WORDS, MULTIPLIER, SEED, SEEDS, Table, found, found_runs, words_of
from llamita.data.strings import Strings

__all__ = ["Hits", "Index", "Item", "cut", "read_items"]

MIN_WORDS = 8
MIN_COVERED = 10  # or the whole passage
MIN_TELLING = 3
MAX_SHARED = 10
COVERAGE = 0.6
PIECE_BYTES = 2**20
OVERLAP = 2**16
EXCERPT_BYTES = 200
MAX_DOCUMENTS = 5  # named in a report, an item


@dataclass(frozen=True)
class Hits:
    """Items found in a batch, by document and place; all arrays [H]."""

    document: np.ndarray
    item: np.ndarray
    coverage: np.ndarray
    """Share of the words of the passage that count, float32."""
    start: np.ndarray
    """First byte in the document."""
    end: np.ndarray


@dataclass(frozen=True)
class Index:
    """Evaluation items made ready to be looked for. Every worker loads the same one."""

    items: tuple[tuple[str, str], ...]
    """Set and id of each."""
    untestable: dict[int, str]
    """Items that cannot be looked for, with the reason: `too short` or `too common`."""
    counted: np.ndarray
    """Words that count of each passage, int64 [P]."""
    owners: np.ndarray
    """Item of each passage, int32 [P]."""
    table: Table

    @classmethod
    def of(cls, items: Sequence[Item], coverage: float = COVERAGE) -> "Index":
        """An item is found where `coverage` of the words of one of its passages is, and at least MIN_COVERED or all.

        A passage is a part, or several where they are shorter than MIN_WORDS. Some seeds are no evidence, and the words
        that stand in no other do not count: those of more than MAX_SHARED passages (templates, boilerplate), and those
        with fewer than MIN_TELLING different words but numbers and single letters (`1, 2, 3, 4`, `True, True`).
        """
        words, places, plain, ends, owners = _passages(items)
        marks, seeds, hashes = _seeds(words, plain, ends)
        sums = np.concatenate(([0], np.cumsum(marks & COUNTS, dtype=np.int64)))
        counted = sums[ends[1:]] - sums[ends[:-1]]
        testable = np.diff(ends) >= MIN_WORDS
        reasons = dict.fromkeys(range(len(items)), "too short")
        reasons |= dict.fromkeys(owners[testable].tolist(), "too common")
        for owner in owners[counted >= MIN_WORDS].tolist():
            reasons.pop(owner, None)
        needed = np.maximum(np.ceil(coverage * counted), np.minimum(counted, MIN_COVERED)).astype(np.int64)
        needed[counted < MIN_WORDS] = MAX_WORDS + 1
        spans = 2 * (places[ends[1:] - 1, 1] - places[ends[:-1], 0])
        table = Table(words, marks, ends, spans, needed, *_buckets(seeds, hashes))
        return cls(tuple((item.set, item.id) for item in items), reasons, counted, owners, table)

    def find(self, strings: Strings) -> Hits:
        """Documents are searched in pieces, so that memory does not grow with them."""
        runs = found_runs(strings.data, _pieces(strings.offsets), self.table)
        runs = runs[np.lexsort((runs[:, 4], runs[:, 3], runs[:, 2], runs[:, 1], runs[:, 0]))]
        hits = found(runs, self.table)
        document, passage, covered, start, end = hits[np.lexsort((hits[:, 1], hits[:, 3], hits[:, 0]))].T
        begin = strings.offsets[document]
        share = (covered / self.counted[passage]).astype(np.float32)
        return Hits(document, self.owners[passage], share, start - begin, end - begin)

    def rows(self, strings: Strings, hits: Hits, names: Sequence[str]) -> list[dict[str, Any]]:
        """One for a document and item, for `report`; `names` of the documents."""
        rows: dict[tuple[int, int], dict[str, Any]] = {}
        for i in np.argsort(-hits.coverage, kind="stable").tolist():
            document, item = int(hits.document[i]), int(hits.item[i])
            first = int(strings.offsets[document] + hits.start[i])
            text = strings.data[first : first + min(EXCERPT_BYTES, int(hits.end[i] - hits.start[i]))].tobytes()
            row = {"item": item, "coverage": round(float(hits.coverage[i]), 3), "document": names[document]}
            rows.setdefault((document, item), row | {"excerpt": text.decode(errors="ignore")})
        return [rows[key] for key in sorted(rows)]

    def report(self, rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
        """Set by set and item by item what was found, and what could not be looked for; ready for JSON."""
        by_item: dict[int, list[dict[str, Any]]] = {}
        for row in sorted(rows, key=lambda row: (row["item"], -row["coverage"], row["document"], row["excerpt"])):
            by_item.setdefault(row["item"], []).append(row)
        sets: dict[str, dict[str, Any]] = {}
        for number, (name, id) in enumerate(self.items):
            facts = sets.setdefault(name, {"items": 0, "found": 0, "too short": [], "too common": []})
            facts["items"] += 1
            facts["found"] += number in by_item
            if number in self.untestable:
                facts[self.untestable[number]].append(id)
        listed = [
            {
                "set": self.items[item][0],
                "id": self.items[item][1],
                "documents": len(rows),
                "coverage": rows[0]["coverage"],
                "names": [row["document"] for row in rows[:MAX_DOCUMENTS]],
                "excerpt": rows[0]["excerpt"],
            }
            for item, rows in by_item.items()
        ]
        return {"sets": sets, "items": listed}

    def save(self, path: Path) -> None:
        names = json.dumps([self.items, sorted(self.untestable.items())]).encode()
        arrays = self.table._asdict() | {"counted": self.counted, "owners": self.owners}
        with path.open("wb") as file:
            np.savez(file, names=np.frombuffer(names, np.uint8), **arrays)

    @classmethod
    def load(cls, path: Path) -> "Index":
        with np.load(path, allow_pickle=False) as file:
            items, reasons = json.loads(file["names"].tobytes())
            table = Table(**{name: file[name] for name in Table._fields})
            return cls(tuple(map(tuple, items)), dict(reasons), file["counted"], file["owners"], table)


def cut(strings: Strings, hits: Hits) -> Strings:
    """The documents without the whole lines in which items were found."""
    texts = [strings[i] for i in range(len(strings))]
    for document in np.unique(hits.document).tolist():
        chosen = hits.document == document
        text, kept, at = texts[document], [], 0
        for first, end in sorted(zip(hits.start[chosen].tolist(), hits.end[chosen].tolist(), strict=True)):
            kept.append(text[at : text.rfind(b"\n", 0, first) + 1])
            at = max(at, text.find(b"\n", end) + 1 or len(text))
        texts[document] = b"".join([*kept, text[at:]])
    return Strings.of(texts)


def _pieces(offsets: np.ndarray) -> np.ndarray:
    """Whole documents, or overlapping pieces of long ones: int64 [., 3] (document, first byte, end)."""
    counts = np.maximum(-((OVERLAP - np.diff(offsets)) // PIECE_BYTES), 1)
    document = np.repeat(np.arange(len(counts)), counts)
    nth = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    first = offsets[document] + nth * PIECE_BYTES
    return np.stack((document, first, np.minimum(first + PIECE_BYTES + OVERLAP, offsets[document + 1])), axis=1)


def _passages(items: Sequence[Item]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Words uint32 [W], their bytes int64 [W, 2], which are numbers or a single letter, bool [W]; ends of passages
    among them int64 [P + 1], items of passages int32 [P].
    """
    texts = Strings.of([part.encode(errors="replace") for item in items for part in item.parts])
    words, places, counts = words_of(texts.data, texts.offsets)
    left, ends, owners, at = iter(counts.tolist()), [0], [], 0
    for number, item in enumerate(items):
        before = len(ends)
        for _ in item.parts:
            at += next(left)
            while at - ends[-1] >= MIN_WORDS:
                ends.append(min(at, ends[-1] + MAX_WORDS))
        if at > ends[-1] and len(ends) > before and at - ends[-2] <= MAX_WORDS:
            ends[-1] = at
        elif at > ends[-1]:
            ends.append(at)
        owners += [number] * (len(ends) - before)
    plain = (places[:, 1] - places[:, 0] < 2) | (texts.data[places[:, 0]] <= ord("9"))
    return words, places, plain, np.array(ends), np.array(owners, np.int32)


def _seeds(words: np.ndarray, plain: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Marks uint8 [W]; first words of the seeds to be indexed uint32 [S], and their hashes uint64 [S], ascending."""
    passage = np.repeat(np.arange(len(ends) - 1, dtype=np.int32), np.diff(ends))
    starts = np.flatnonzero(np.arange(SEED, len(words) + SEED) <= ends[passage + 1]).astype(np.uint32)
    shown = np.sort(np.where(plain, np.uint32(0), words)[starts[:, None] + np.arange(SEED)], axis=1)
    starts = starts[(np.diff(shown, axis=1, prepend=np.uint32(0)) != 0).sum(axis=1) >= MIN_TELLING]
    hashes = np.zeros(len(starts), np.uint64)
    for k in range(SEED):
        hashes = hashes * MULTIPLIER + words[starts + k]
    order = np.argsort(hashes, kind="stable")
    starts, hashes = starts[order], hashes[order]
    fresh = np.concatenate(([True], hashes[1:] != hashes[:-1]))[: len(starts)]
    first_there = fresh | np.concatenate(([True], np.diff(passage[starts]) != 0))[: len(starts)]
    group = np.cumsum(fresh) - 1
    rare = (np.bincount(group, first_there) <= MAX_SHARED)[group]
    marks = np.zeros(len(words), np.uint8)
    for k in range(SEED):
        marks[starts[rare] + k] |= COUNTS
    chosen = rare & first_there
    marks[starts[chosen]] |= SEEDS
    return marks, starts[chosen], hashes[chosen]


def _buckets(seeds: np.ndarray, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`filter`, `buckets` and `places` of a Table: about a bucket and 32 to 64 bits of the filter a seed."""
    bits = max(len(seeds), 2).bit_length() - 1
    members = (hashes >> np.uint64(64 - bits)).astype(np.int64)
    buckets = np.searchsorted(members, np.arange(2**bits + 1)).astype(np.uint32)
    sieve = np.zeros(2 ** (bits + 5), bool)
    sieve[(hashes >> np.uint64(64 - bits - 5)).astype(np.int64)] = True
    return np.packbits(sieve, bitorder="little"), buckets, seeds
