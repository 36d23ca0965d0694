"""Byte-pair encoding learned from counted words (arXiv 1508.07909), compiled, in memory that is planned beforehand.

At each step the pair of neighbours with the greatest total becomes a token; among equals the pair of the smaller
ids, so that the result depends on nothing but the counts. Every pair has a list of the words it stands in, and a
heap orders pairs by a claim that may be too great, never too small: a pair without the newest token only shrinks.
Lists only grow; when an array is full, all are built anew from the words, which are shorter by then.

Letters: W words, S symbols (bytes at first), P room for pairs, L room in lists.
"""

from collections.abc import Callable

import numpy as np
from numba import njit

from llamita.tokenizer.count import Words

WORD = np.dtype([("start", np.int64), ("count", np.int64), ("length", np.int32)], align=True)
PAIR = np.dtype([("key", np.uint64), ("total", np.int64), ("claim", np.int64), ("head", np.int32)], align=True)
ENTRY = np.dtype([("word", np.int32), ("next", np.int32)])

DONE, EXHAUSTED, FULL = range(3)
_PAIRS, _LISTED, _HEAPED = range(3)
_FREE, _PRIME, _HALF = np.uint64(2**64 - 1), np.uint64(0x9E3779B97F4A7C15), np.uint64(32)
_OLD, _NO_ROOM = -1, -2


@njit
def _key(first, second):
    return np.uint64(first) << _HALF | np.uint64(second)


@njit
def _slot(pairs_P, key):
    """Where `key` stands in the hash table, or the free place where it belongs."""
    mask = len(pairs_P) - 1
    slot = np.int64(key * _PRIME >> _HALF) & mask
    while pairs_P[slot].key != key and pairs_P[slot].key != _FREE:
        slot = (slot + 1) & mask
    return slot


@njit
def _join(key, amount, word, pairs_P, lists_L, used):
    """Add to a pair's total and list `word` for it. The slot of a new pair, else _OLD or _NO_ROOM."""
    slot = _slot(pairs_P, key)
    new = pairs_P[slot].key == _FREE
    if used[_LISTED] == len(lists_L) or (new and used[_PAIRS] * 10 >= len(pairs_P) * 7):
        return _NO_ROOM
    if new:
        pairs_P[slot].key, pairs_P[slot].total, pairs_P[slot].head = key, 0, -1
        used[_PAIRS] += 1
    pairs_P[slot].total += amount
    head = pairs_P[slot].head
    if head < 0 or lists_L[head].word != word:
        lists_L[used[_LISTED]].word, lists_L[used[_LISTED]].next = word, head
        pairs_P[slot].head = used[_LISTED]
        used[_LISTED] += 1
    return slot if new else _OLD


@njit(nogil=True, cache=True)
def _build(symbols_S, words_W, pairs_P, lists_L, used):
    """Totals and lists of all pairs, from the words; False for want of room."""
    for slot in range(len(pairs_P)):
        pairs_P[slot].key = _FREE
    used[:] = 0
    for word in range(len(words_W)):
        start, count = words_W[word].start, words_W[word].count
        for i in range(start, start + words_W[word].length - 1):
            if _join(_key(symbols_S[i], symbols_S[i + 1]), count, word, pairs_P, lists_L, used) == _NO_ROOM:
                return False
    return True


@njit
def _outranks(pairs_P, a, b):
    claim, other = pairs_P[a].claim, pairs_P[b].claim
    return claim > other or (claim == other and pairs_P[a].key < pairs_P[b].key)


@njit
def _rise(heap_P, pairs_P, i):
    slot = heap_P[i]
    while i > 0 and _outranks(pairs_P, slot, heap_P[(i - 1) >> 1]):
        heap_P[i] = heap_P[(i - 1) >> 1]
        i = (i - 1) >> 1
    heap_P[i] = slot


@njit
def _sink(heap_P, pairs_P, size, i):
    slot = heap_P[i]
    while 2 * i + 1 < size:
        child = 2 * i + 1
        if child + 1 < size and _outranks(pairs_P, heap_P[child + 1], heap_P[child]):
            child += 1
        if not _outranks(pairs_P, heap_P[child], slot):
            break
        heap_P[i] = heap_P[child]
        i = child
    heap_P[i] = slot


@njit(nogil=True, cache=True)
def _heapify(heap_P, pairs_P, used):
    size = 0
    for slot in range(len(pairs_P)):
        if pairs_P[slot].key != _FREE and pairs_P[slot].total > 0:
            heap_P[size], pairs_P[slot].claim = slot, pairs_P[slot].total
            size += 1
    used[_HEAPED] = size
    for i in range(size // 2 - 1, -1, -1):
        _sink(heap_P, pairs_P, size, i)


@njit
def _rewrite(first, second, token, word, symbols_S, words_W, pairs_P, lists_L, heap_P, used, fresh):
    """Put `token` for each pair in one word; slots of new pairs wait behind the heap's end. How many wait there now."""
    start, count = words_W[word].start, words_W[word].count
    end, out, i = start + words_W[word].length, start, start
    while i < end:
        symbol = symbols_S[i]
        if symbol == first and i + 1 < end and symbols_S[i + 1] == second:
            if out > start:
                left = symbols_S[out - 1]
                pairs_P[_slot(pairs_P, _key(left, first))].total -= count
                slot = _join(_key(left, token), count, word, pairs_P, lists_L, used)
                if slot >= 0:
                    heap_P[used[_HEAPED] + fresh] = slot
                    fresh += 1
            if i + 2 < end:
                right = symbols_S[i + 2]
                pairs_P[_slot(pairs_P, _key(second, right))].total -= count
                slot = _join(_key(token, right), count, word, pairs_P, lists_L, used)
                if slot >= 0:
                    heap_P[used[_HEAPED] + fresh] = slot
                    fresh += 1
            symbol = token
            i += 1
        symbols_S[out] = symbol
        out += 1
        i += 1
    words_W[word].length = out - start
    return fresh


@njit(nogil=True, cache=True)
def _round(key, token, symbols_S, words_W, pairs_P, lists_L, heap_P, used):
    """Merge one pair in all its words. False for want of room: some words are done then, the rest as before."""
    first, second = np.int32(key >> _HALF), np.int32(key & np.uint64(2**32 - 1))
    slot, fresh = _slot(pairs_P, key), 0
    entry = pairs_P[slot].head if pairs_P[slot].key == key else -1
    while entry >= 0:
        word = lists_L[entry].word
        most = 2 * words_W[word].length
        if used[_LISTED] + most > len(lists_L) or (used[_PAIRS] + most) * 10 > len(pairs_P) * 7:
            return False
        fresh = _rewrite(first, second, token, word, symbols_S, words_W, pairs_P, lists_L, heap_P, used, fresh)
        entry = lists_L[entry].next
    if pairs_P[slot].key == key:
        pairs_P[slot].total = 0
    for _ in range(fresh):
        made = heap_P[used[_HEAPED]]
        pairs_P[made].claim = pairs_P[made].total
        _rise(heap_P, pairs_P, used[_HEAPED])
        used[_HEAPED] += 1
    return True


@njit(nogil=True, cache=True)
def _merge(merges, made, limit, symbols_S, words_W, pairs_P, lists_L, heap_P, used):
    """Merge until `limit` merges are made. How many are, and DONE, EXHAUSTED (of pairs) or FULL (one more is begun)."""
    while made < limit:
        while used[_HEAPED] > 0 and pairs_P[heap_P[0]].claim != pairs_P[heap_P[0]].total:
            pairs_P[heap_P[0]].claim = pairs_P[heap_P[0]].total
            _sink(heap_P, pairs_P, used[_HEAPED], 0)
        if used[_HEAPED] == 0 or pairs_P[heap_P[0]].total <= 0:
            return made, EXHAUSTED
        key = pairs_P[heap_P[0]].key
        merges[made, 0], merges[made, 1] = np.int64(key >> _HALF), np.int64(key & np.uint64(2**32 - 1))
        if not _round(key, 256 + made, symbols_S, words_W, pairs_P, lists_L, heap_P, used):
            return made, FULL
        made += 1
    return made, DONE


@njit(nogil=True, cache=True)
def _compact(symbols_S, words_W):
    """Drop words of one symbol and the gaps that merging has left. How many words and symbols there are now."""
    num, at = 0, 0
    for word in range(len(words_W)):
        start, length = words_W[word].start, words_W[word].length
        if length > 1:
            words_W[num].start, words_W[num].count, words_W[num].length = at, words_W[word].count, length
            for i in range(length):
                symbols_S[at + i] = symbols_S[start + i]
            num, at = num + 1, at + length
    return num, at


STEP = 500  # merges between two looks at the clock


# Symbols, so that places in lists, half as many again, stay within int32.
MAX_SYMBOLS = 2**30


def memory(num_words: np.ndarray, num_bytes: np.ndarray) -> np.ndarray:
    """Bytes that learning takes for words of so many bytes in all; twice as much for words of random bytes.

    A symbol, room for one and a half entries of lists, and a share of the pairs: 30 bytes a byte; 2.66 million words of
    text with 26 million bytes took 20 (measured).
    """
    size = WORD.itemsize * num_words + (4 + ENTRY.itemsize * 3 // 2 + 14) * num_bytes
    return np.where(num_bytes > MAX_SYMBOLS, np.inf, size)


class Learner:
    """Learns merges from words, whose groups play no part, in about `memory` bytes."""

    def __init__(self, words: Words):
        lengths = words.lengths.astype(np.int32)
        self._symbols_S = words.data.astype(np.int32)
        self._words_W = np.empty(len(lengths), WORD)
        self._words_W["start"] = np.cumsum(lengths, dtype=np.int64) - lengths
        self._words_W["length"], self._words_W["count"] = lengths, words.counts
        self._used = np.zeros(3, np.int64)
        self._least = 2**16  # room in lists: more than any word can add
        self._room = 1 << max(16, (len(self._symbols_S) // 8).bit_length())

    def learn(self, num: int, on_progress: Callable[[int], None] = lambda made: None) -> np.ndarray:
        """(at most num, 2) int64: the ids that each merge joins; fewer than `num` when no pair is left."""
        num = min(num, len(self._symbols_S))
        merges, made, state = np.zeros((num, 2), np.int64), 0, DONE
        arrays = self._built()
        while state != EXHAUSTED and made < num:
            made, state = _merge(merges, made, min(num, made + STEP), *arrays, self._used)
            if state == FULL:
                del arrays
                arrays = self._built(_key(*merges[made]), 256 + made)
                made += 1
            on_progress(made)
        return merges[:made]

    def _built(self, begun: np.uint64 = _FREE, token: int = 0) -> tuple[np.ndarray, ...]:
        """Symbols, words, pairs, lists and heap, made from the words; the merge that was `begun` is ended."""
        num_words, num_symbols = _compact(self._symbols_S, self._words_W)
        self._words_W, self._symbols_S = self._words_W[:num_words], self._symbols_S[:num_symbols]
        lists_L = np.empty(max(self._least, (num_symbols - num_words) * 3 // 2), ENTRY)
        while True:
            pairs_P, heap_P = np.empty(self._room, PAIR), np.empty(self._room, np.int32)
            work = (self._symbols_S, self._words_W, pairs_P, lists_L)
            done = _build(*work, self._used) and self._used[_PAIRS] * 3 < self._room
            if done and (begun == _FREE or _round(begun, token, *work, heap_P, self._used)):
                _heapify(heap_P, pairs_P, self._used)
                return *work, heap_P
            del pairs_P, heap_P, work
            if not done:
                self._room *= 2
