"""How much of a text says the same again: Gopher's repetition rules (arXiv 2112.11446, table A1).

Lines, paragraphs and n-grams are told apart by 64-bit hashes.
"""

import numpy as np
from numba import njit

from llamita.data.strings import Strings
from llamita.data.words import Words

TOP = (2, 3, 4)
REPEATED = (5, 6, 7, 8, 9, 10)
NAMES = (
    *("num_lines", "dup_lines", "dup_line_chars", "num_paragraphs", "dup_paragraphs", "dup_paragraph_chars"),
    *(f"top_{n}_gram" for n in TOP), *(f"dup_{n}_gram" for n in REPEATED), "dup_full_line_chars", "line_chars",
)  # fmt: skip


def _slots(longest: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A hash table for texts of at most `longest` bytes: keys, the round in which each was written, and counts."""
    size = 1 << (2 * longest).bit_length()
    return np.zeros(size, np.uint64), np.zeros(size + 1, np.int64), np.zeros(size, np.int32)


@njit(cache=True, nogil=True, _nrt=False)
def _mask(table, count):
    size = 16
    while size < 2 * count:
        size *= 2
    table[1][-1] += 1
    return np.uint64(min(size, len(table[0])) - 1)


@njit(cache=True, nogil=True, _nrt=False)
def _stretches(data, start, end, least, table, out):
    """Counts stretches between `least` or more line breaks: out = how many, how many again, characters of those, those
    of them that are not of blanks alone, and characters in all."""
    mask = _mask(table, (end - start) // least + 2)
    keys, stamps, now = table[0], table[1], table[1][-1]
    i = start
    while i <= end:
        state, chars, blank, begun = np.uint64(0xCBF29CE484222325), 0, True, i
        while i < end:
            if data[i] == 10:
                stop = i
                while stop < end and data[stop] == 10:
                    stop += 1
                if stop - i >= least:
                    break
            state = (state ^ np.uint64(data[i])) * np.uint64(0x100000001B3)
            chars += data[i] & 0xC0 != 0x80
            blank = blank and (data[i] == 32 or 9 <= data[i] <= 13)
            i += 1
        key = state + np.uint64(i - begun)
        slot = np.int64((key ^ (key >> np.uint64(32))) & mask)
        while stamps[slot] == now and keys[slot] != key:
            slot = (slot + 1) & np.int64(mask)
        out[0] += 1
        out[4] += chars
        if stamps[slot] == now:
            out[1] += 1
            out[2] += chars
            out[3] += 0 if blank else chars
        keys[slot], stamps[slot] = key, now
        if i >= end:
            return
        while i < end and data[i] == 10:
            i += 1


@njit(cache=True, nogil=True)
def _lines(data, start, end, table, out):
    found = np.zeros((2, 5))
    _stretches(data, start, end, 1, table, found[0])
    first, last = start, end
    while first < last and (data[first] == 32 or 9 <= data[first] <= 13):
        first += 1
    while last > first and (data[last - 1] == 32 or 9 <= data[last - 1] <= 13):
        last -= 1
    found[1, 0] = 1
    for i in range(first, last - 1):
        if data[i] == 10 and data[i + 1] == 10:
            found[1, 0] = 0
            _stretches(data, first, last, 2, table, found[1])
            break
    out[0:3], out[3:6], out[15:17] = found[0, :3], found[1, :3], found[0, 3:]


@njit(cache=True, nogil=True)
def _grams(hashes, chars, table, out):
    """Hashes of n-grams grow by a word at a time, and only where both (n-1)-grams in it are there twice: no other can
    be. `live` are those places."""
    num_words = len(hashes)
    grams, ends = hashes.copy(), np.zeros(num_words + 1, np.int64)
    for i in range(num_words):
        ends[i + 1] = ends[i] + chars[i]
    mask, live, slots = _mask(table, num_words), np.arange(num_words), np.empty(num_words, np.int64)
    for n in range(2, min(10, num_words) + 1):
        live = live[: np.searchsorted(live, num_words - n + 1)]
        for i in live:
            grams[i] = (grams[i] ^ (grams[i] >> np.uint64(29))) * np.uint64(0x9E3779B97F4A7C15) + hashes[i + n - 1]
        table[1][-1] += 1
        if n <= 4:
            most, where = _top(grams, live, slots, table, mask)
            out[4 + n] = most * (ends[where + n] - ends[where] + n - 1)
            live = live[: _both_twice(live, slots, table[2])]
        else:
            out[4 + n] = _repeated(grams, live, ends, n, table, mask)
            if out[4 + n] == 0:
                return  # what holds no n-gram twice holds no longer one twice
            live = live[: _both_live(live)]


@njit(cache=True, nogil=True)
def _count(data, offsets, hashes, chars, ends, table, sums):
    for text in range(len(offsets) - 1):
        _lines(data, offsets[text], offsets[text + 1], table, sums[text])
        part = slice(ends[text], ends[text + 1])
        _grams(hashes[part], chars[part], table, sums[text])


@njit(cache=True, nogil=True, _nrt=False)
def _top(grams, live, slots, table, mask):
    """How often the most frequent n-gram is there, and where; of those as frequent, the first to become so. `slots` =
    where in the table that of each live place is."""
    keys, stamps, counts, wrap = table[0], table[1], table[2], np.int64(mask)
    now, most, where = stamps[-1], 1, 0
    for k in range(len(live)):
        key = grams[live[k]]
        slot = np.int64((key ^ (key >> np.uint64(32))) & mask)
        while stamps[slot] == now and keys[slot] != key:
            slot = (slot + 1) & wrap
        if stamps[slot] != now:
            keys[slot], stamps[slot], counts[slot] = key, now, 0
        counts[slot] += 1
        slots[k] = slot
        if counts[slot] > most:
            most, where = counts[slot], live[k]
    return most, where


@njit(cache=True, nogil=True, _nrt=False)
def _both_twice(live, slots, counts):
    """Moves to the front of `live` the places whose n-gram, and the one a word on, are there twice. Returns how many
    these are."""
    found = 0
    for k in range(len(live) - 1):
        if live[k + 1] == live[k] + 1 and counts[slots[k]] > 1 and counts[slots[k + 1]] > 1:
            live[found] = live[k]
            found += 1
    return found


@njit(cache=True, nogil=True, _nrt=False)
def _both_live(live):
    """Moves to the front the places behind which the next one is live, too. Returns how many these are."""
    found = 0
    for k in range(len(live) - 1):
        if live[k + 1] == live[k] + 1:
            live[found] = live[k]
            found += 1
    return found


@njit(cache=True, nogil=True, _nrt=False)
def _repeated(grams, live, ends, n, table, mask):
    """Characters of n-grams that have been before, none counted twice."""
    keys, stamps, wrap = table[0], table[1], np.int64(mask)
    now, chars, free = stamps[-1], 0, 0
    for i in live:
        if i < free:
            continue
        key = grams[i]
        slot = np.int64((key ^ (key >> np.uint64(32))) & mask)
        while stamps[slot] == now and keys[slot] != key:
            slot = (slot + 1) & wrap
        if stamps[slot] == now:
            chars += ends[i + n] - ends[i]
            free = i + n
        else:
            keys[slot], stamps[slot] = key, now
    return chars


def measure(strings: Strings, words: Words, chars: np.ndarray) -> dict[str, np.ndarray]:
    """Shares of lines, paragraphs and characters (`chars` [D] of the texts), float32 [D] each."""
    sums = np.zeros((len(strings), len(NAMES)), np.float64)
    table = _slots(int(strings.sizes.max(initial=0)) + 1)
    _count(strings.data, strings.offsets, words.hashes, words.chars, words.ends, table, sums)
    found = dict(zip(NAMES, sums.astype(np.float32).T, strict=True))
    lines, paragraphs = (np.maximum(found.pop(name), 1) for name in ("num_lines", "num_paragraphs"))
    line_chars = np.maximum(found.pop("line_chars"), 1)
    divided = {"dup_lines": lines, "dup_paragraphs": paragraphs, "dup_full_line_chars": line_chars}
    return {name: column / divided.get(name, chars) for name, column in found.items()}
