"""Exact counts of a text's words in bounded memory: hash tables in memory, runs on disk where they fill up.

A word is keyed by its bytes and by its group (a number that stands for a source and a language), so that weights
can be chosen after counting. A full table goes to disk as a run, sorted into BUCKETS by hash; in the end one bucket
of all runs at a time is added up. Counts are exact, so they depend neither on order nor on workers nor on memory.
"""

import os
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numba import njit

from llamita.tokenizer.split import classes, word_end

MAX_WORD_BYTES = 1024  # longer words count as slices of that length, so that no word can fill a table
BUCKETS = 1024  # one of them, of all runs, is in memory at a time
MAX_GROUPS = 2**16
_INLINE = 16  # words of up to so many bytes stand in their row, the others in the arena
_ROW_BYTES, _ARENA_BYTES = 32, 4  # arena a row may take on average
_MOST, _LEAST = 3, 4  # at most three rows in four are taken
_P0, _P1 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F)  # odd constants of splitmix64 and xxHash
_HALF, _ONE, _ALL = np.uint64(32), np.uint64(1), np.uint64(2**64 - 1)


class Words(NamedTuple):
    """N words: `data` (bytes,) uint8 has them one after another; lengths, groups uint16 and counts int64 are (N,)."""

    data: np.ndarray
    lengths: np.ndarray
    groups: np.ndarray
    counts: np.ndarray


@njit(inline="always")
def _load(eights, i, num):
    """`num` bytes, at most 8, from byte `i` on as one number; `eights` are the padded bytes, seen as uint64."""
    if num <= 0:
        return np.uint64(0)
    shift = np.uint64(8 * (i & 7))
    low, high = eights[i >> 3] >> shift, eights[(i >> 3) + 1] << _ONE << (np.uint64(63) - shift)
    return (low | high) & (_ALL >> np.uint64(64 - 8 * min(num, 8)))


@njit(inline="always")
def _mixed(low, high, label):
    h = (low ^ (high << np.uint64(29) | high >> np.uint64(35)) ^ label * _P1) * _P0
    h = (h ^ (h >> _HALF)) * _P1 ^ high * _P0
    return (h ^ (h >> _HALF)) * _P0


@njit(inline="always")
def _home(h, num):
    return np.int64((h >> _HALF) * np.uint64(num) >> _HALF)


@njit
def _add_long(data, eights, start, length, label, amount, rows, arena, used):
    """Add to the count of a word that stands in the arena; False where there is no room for a new one."""
    high = label
    for i in range(0, length, 8):
        high = _mixed(high, _load(eights, start + i, length - i), _P0)
    row = _home(_mixed(np.uint64(0), high, label), len(rows))
    while rows[row, 2] != 0:
        if rows[row, 2] == label and rows[row, 1] == high:
            at, i = np.int64(rows[row, 0]), 0
            while i < length and arena[at + i] == data[start + i]:
                i += 1
            if i == length:
                rows[row, 3] += amount
                return True
        row = row + 1 if row + 1 < len(rows) else 0
    at = used[1]
    if used[0] * _LEAST >= len(rows) * _MOST or at + length > len(arena):
        return False
    rows[row, 0], rows[row, 1], rows[row, 2], rows[row, 3] = np.uint64(at), high, label, amount
    for i in range(length):
        arena[at + i] = data[start + i]
    used[0], used[1] = used[0] + 1, at + length
    return True


@njit
def _add(eights, start, length, label, amount, rows, used):
    """Add to the count of a word of at most 16 bytes; False where there is no room for a new one.

    Few arrays and no call in it: what numba makes of anything larger takes 70 ns a word instead of 15 (measured).
    """
    low, high = _load(eights, start, length), _load(eights, start + 8, length - 8)
    row = _home(_mixed(low, high, label), len(rows))
    while rows[row, 2] != 0 and not (rows[row, 2] == label and rows[row, 0] == low and rows[row, 1] == high):
        row = row + 1 if row + 1 < len(rows) else 0
    if rows[row, 2] == 0:
        if used[0] * _LEAST >= len(rows) * _MOST:
            return False
        rows[row, 0], rows[row, 1], rows[row, 2], rows[row, 3] = low, high, label, np.uint64(0)
        used[0] += 1
    rows[row, 3] += amount
    return True


@njit(nogil=True, cache=True)
def _count(data, eights, ends, groups, kinds, rows, arena, used, document, i):
    """Count words from byte `i` of `document` on; returns where it stopped for want of room, or the end."""
    one = np.uint64(1)
    while document < len(ends):
        end, group = ends[document], groups[document] << 16
        while i < end:
            stop = word_end(data, i, end, kinds)
            while i < stop:
                length = min(stop - i, MAX_WORD_BYTES)
                label = np.uint64(group | length)
                if length <= _INLINE:
                    room = _add(eights, i, length, label, one, rows, used)
                else:
                    room = _add_long(data, eights, i, length, label, one, rows, arena, used)
                if not room:
                    return document, i
                i += length
        document += 1
    return document, i


@njit(nogil=True, cache=True)
def _merge(data, eights, lengths, groups, counts, rows, arena, used):
    """Add counted words to a table; False for want of room."""
    i = 0
    for word in range(len(lengths)):
        length, amount = np.int64(lengths[word]), np.uint64(counts[word])
        label = np.uint64(np.int64(groups[word]) << 16 | length)
        if length <= _INLINE:
            room = _add(eights, i, length, label, amount, rows, used)
        else:
            room = _add_long(data, eights, i, length, label, amount, rows, arena, used)
        if not room:
            return False
        i += length
    return True


@njit(nogil=True, cache=True)
def _order(rows, num):
    """The taken rows in order of their bucket, (num,), and where each bucket begins among them, (BUCKETS + 1,)."""
    begins, buckets, taken = np.zeros(BUCKETS + 1, np.int64), np.empty(num, np.uint16), np.empty(num, np.uint32)
    found = 0
    for row in range(len(rows)):
        label = rows[row, 2]
        if label != 0:
            inline = label & np.uint64(0xFFFF) <= np.uint64(_INLINE)
            bucket = _mixed(rows[row, 0] if inline else np.uint64(0), rows[row, 1], label) & np.uint64(BUCKETS - 1)
            buckets[found], taken[found] = bucket, row
            begins[np.int64(bucket) + 1] += 1
            found += 1
    begins = np.cumsum(begins)
    at, order = begins.copy(), np.empty(num, np.uint32)
    for k in range(num):
        order[at[buckets[k]]] = taken[k]
        at[buckets[k]] += 1
    return order, begins


@njit(nogil=True, cache=True)
def _spell(rows, arena, lengths):
    """The bytes of the words in `rows`, one after another."""
    data, i = np.empty(lengths.sum(), np.uint8), 0
    for row in range(len(rows)):
        length = np.int64(lengths[row])
        for k in range(length):
            if length > _INLINE:
                data[i + k] = arena[np.int64(rows[row, 0]) + k]
            else:
                data[i + k] = (rows[row, k >> 3] >> np.uint64(8 * (k & 7))) & np.uint64(0xFF)
        i += length
    return data


def padded(data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N,) uint8 with 16 zeros or more behind it, and the same memory as uint64."""
    room = np.zeros((len(data) + 23) // 8 * 8, np.uint8)
    room[: len(data)] = data
    return room, room.view(np.uint64)


class Table:
    """A hash table with room for `num_rows` rows, three quarters of them words, and `num_bytes` of long words."""

    def __init__(self, num_rows: int, num_bytes: int):
        self._rows = np.zeros((num_rows, 4), np.uint64)
        self._arena = np.empty(max(num_bytes, MAX_WORD_BYTES), np.uint8)
        self._used = np.zeros(2, np.int64)
        self.num_bytes = self._rows.nbytes + self._arena.nbytes

    @classmethod
    def within(cls, max_bytes: int) -> "Table":
        """As large as `max_bytes` allow, and at least 64 KiB."""
        num = max(max_bytes, 2**16) // (_ROW_BYTES + _ARENA_BYTES)
        return cls(num, num * _ARENA_BYTES)

    @classmethod
    def holding(cls, parts: Sequence[Words]) -> "Table":
        """The sum of counted words."""
        num, num_bytes = sum(len(words.lengths) for words in parts), sum(len(words.data) for words in parts)
        table = cls(num * _LEAST // _MOST + 2, num_bytes)
        for words in parts:
            has_room = table.merge(words)
            assert has_room
        return table

    def __len__(self) -> int:
        return int(self._used[0])

    def count(
        self, data: np.ndarray, eights: np.ndarray, ends: np.ndarray, groups: np.ndarray, at: tuple[int, int]
    ) -> tuple[int, int]:
        """Count the words of documents from (document, byte) `at` on; where it stopped for want of room, or the end.

        `data` and `eights` are what `padded` makes of the documents' UTF-8, one after another; `ends` and `groups` are
        (documents,) int64.
        """
        return _count(data, eights, ends, groups, classes(), self._rows, self._arena, self._used, *at)

    def merge(self, words: Words) -> bool:
        """Add counted words; False, with some of them added, for want of room."""
        return _merge(*padded(words.data), *words[1:], self._rows, self._arena, self._used)

    def buckets(self) -> Iterator[Words]:
        """The words of each bucket in turn; the table is empty afterwards."""
        order, begins = _order(self._rows, len(self))
        for begin, end in pairwise(begins):
            yield self._words(order[begin:end])
        self._rows.fill(0)
        self._used[:] = 0

    def words(self) -> Words:
        """All words."""
        return self._words(np.flatnonzero(self._rows[:, 2]))

    def _words(self, taken: np.ndarray) -> Words:
        rows = self._rows[taken]
        lengths, groups = (rows[:, 2] & 0xFFFF).astype(np.uint16), (rows[:, 2] >> 16).astype(np.uint16)
        return Words(_spell(rows, self._arena, lengths), lengths, groups, rows[:, 3].astype(np.int64))


class Run:
    """A table on disk: for each bucket its lengths, groups, counts and bytes. `index` is [[words, bytes], ...]."""

    def __init__(self, path: Path, index: Sequence[Sequence[int]]):
        self.path, self.index = path, index
        self._begins = np.cumsum([0, *(12 * words + num_bytes for words, num_bytes in index)]).tolist()

    @classmethod
    def write(cls, path: Path, table: Table) -> "Run":
        """Empty a table into a file. OSError when there is no room for it."""
        index = []
        with path.open("wb") as file:
            for words in table.buckets():
                for part in (words.lengths, words.groups, words.counts, words.data):
                    file.write(part.data)  # not tofile, which passes over a full disk
                index.append([len(words.lengths), len(words.data)])
            file.flush()
            os.fsync(file.fileno())
        return cls(path, index)

    def read(self, bucket: int) -> Words:
        """One bucket's words. ValueError when the file is not as long as the index says."""
        num, num_bytes = self.index[bucket]
        if not self.path.is_file() or self.path.stat().st_size != self._begins[-1]:
            raise ValueError(f"{self.path} is damaged: remove its folder to count anew")
        with self.path.open("rb") as file:
            file.seek(self._begins[bucket])
            lengths, groups = np.fromfile(file, np.uint16, num), np.fromfile(file, np.uint16, num)
            counts = np.fromfile(file, np.int64, num)
            return Words(np.fromfile(file, np.uint8, num_bytes), lengths, groups, counts)
