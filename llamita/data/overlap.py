"""Runs of words that documents share with passages: the kernels of `contamination`.

A word is a run of letters and digits, ASCII lower-cased; any other letter counts as it is written, and each character
of a script that writes no spaces is a word of its own. A word is told by 32 bits of its hash, so one in 2**32 pairs is
taken for alike; ten are asked for, five and more in a row.
"""

from typing import NamedTuple

import numba
import numpy as np

SEED = 5
MAX_WORDS = 512  # of a passage

MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
FIRST_POWER = np.uint64(pow(int(MULTIPLIER), SEED - 1, 2**64))
COUNTS, SEEDS = np.uint8(1), np.uint8(2)  # marks of a word: it counts for coverage; a seed in the table begins with it


def _word_classes() -> np.ndarray:
    """What an ASCII byte adds to a word, lower-cased; 0 = it ends one."""
    return np.array([ord(chr(b).lower()) if chr(b).isalnum() else 0 for b in range(128)], np.uint8)


ASCII = _word_classes()
PUNCTUATION, LETTER, ALONE = 0, 1, 2


@numba.njit(cache=True, nogil=True)
def _class_of(char):
    """Of a character from U+0080 on: ALONE where words are not spaced (Thai to Khmer, kana, ideographs)."""
    if char <= 0xBF:
        return LETTER if char in (0xAA, 0xB5, 0xBA) else PUNCTUATION
    if 0x2000 <= char <= 0x206F or 0x3000 <= char <= 0x303F or 0xFF00 <= char <= 0xFF0F or 0xFF1A <= char <= 0xFF20:
        return PUNCTUATION
    if 0x0E00 <= char <= 0x0EFF or 0x1000 <= char <= 0x109F or 0x1780 <= char <= 0x17FF:
        return ALONE
    if 0x2E80 <= char <= 0x9FFF or 0xF900 <= char <= 0xFAFF or 0x20000 <= char <= 0x3FFFF:
        return ALONE
    return LETTER


@numba.njit(cache=True, nogil=True)
def _words(data, start, end, words, places):
    """Fingerprints of the words of `data[start:end]` to `words`, uint32, first byte and end to `places`, int64 [., 2].

    Returns their number, at most (end - start + 1) // 2.
    """
    count, begun, state, i = 0, -1, np.uint64(0), start
    while i < end:
        byte = data[i]
        width, kind, folded = 1, LETTER, np.uint64(byte)
        if byte < 0x80:
            folded = np.uint64(ASCII[byte])
            kind = LETTER if folded else PUNCTUATION
        elif byte >= 0xC0 and i + 1 < end:  # else it was cut at the border of a piece
            width = min(2 if byte < 0xE0 else 3 if byte < 0xF0 else 4, end - i)
            char = np.int64(byte) & (0x3F >> (width - 1))
            for k in range(1, width):
                char = char << 6 | (data[i + k] & 0x3F)
            kind, folded = _class_of(char), np.uint64(char)
        if kind == LETTER:
            if begun < 0:
                begun, state = i, np.uint64(0xCBF29CE484222325)
            state = (state ^ folded) * np.uint64(0x100000001B3)
        elif begun >= 0:
            words[count], places[count, 0], places[count, 1] = _mixed(state), begun, i
            count, begun = count + 1, -1
        if kind == ALONE:
            words[count], places[count, 0], places[count, 1] = _mixed(folded), i, i + width
            count += 1
        i += width
    if begun >= 0:
        words[count], places[count, 0], places[count, 1] = _mixed(state), begun, end
        count += 1
    return count


@numba.njit(cache=True, nogil=True)
def _mixed(state):
    return np.uint32((state * MULTIPLIER) >> np.uint64(32))


class Table(NamedTuple):
    """All words of all passages end to end, and where each seed stands among them; what the kernels read."""

    words: np.ndarray
    """uint32 [W]"""
    marks: np.ndarray
    """uint8 [W]: COUNTS and SEEDS."""
    ends: np.ndarray
    """Where passages end among the words, int64 [P + 1], from 0."""
    spans: np.ndarray
    """Within how many bytes of a document all of a passage is looked for, int64 [P]."""
    needed: np.ndarray
    """How many words that count must be covered, int64 [P]."""
    filter: np.ndarray
    """A bit for each hash of a seed, by its first bits, uint8 [2 ** k]."""
    buckets: np.ndarray
    """Seeds whose hash begins with b are `places[buckets[b] : buckets[b + 1]]`, uint32 [2 ** m + 1]."""
    places: np.ndarray
    """First words of seeds, uint32 [S]."""


@numba.njit(cache=True, nogil=True)
def _likely(words, sieve, lasts, seeds):
    """Where the filter lets a seed through: last word of each to `lasts`, hash to `seeds`. Returns how many."""
    shift = np.uint64(64 - (np.int64(np.log2(len(sieve))) + 3))
    count, seed = 0, np.uint64(0)
    for j in range(min(SEED - 1, len(words))):
        seed = seed * MULTIPLIER + np.uint64(words[j])
    for j in range(SEED - 1, len(words)):
        seed = seed * MULTIPLIER + np.uint64(words[j])
        bit = seed >> shift
        lasts[count], seeds[count] = j, seed
        # No branch: it could not be foretold, and each look waits for memory.
        count += np.int64(sieve[bit >> np.uint64(3)] >> np.uint8(bit & np.uint64(7)) & np.uint8(1))
        seed -= np.uint64(words[j - SEED + 1]) * FIRST_POWER
    return count


@numba.njit(cache=True, nogil=True)
def found_runs(data, pieces, table):
    """Longest common runs of at least SEED words: int64 [R, 6].

    (document, passage, first byte, end, first word in the table, words). `pieces` int64 [., 3]: document, first byte,
    end.
    """
    size = 1
    for piece in range(len(pieces)):
        size = max(size, (pieces[piece, 2] - pieces[piece, 1]) // 2 + 1)
    words, places = np.empty(size, np.uint32), np.empty((size, 2), np.int64)
    lasts, seeds = np.empty(size, np.int64), np.empty(size, np.uint64)
    runs, count = np.empty((1024, 6), np.int64), 0
    shift = np.uint64(64 - np.int64(np.log2(len(table.buckets) - 1)))
    for piece in range(len(pieces)):
        num_words = _words(data, pieces[piece, 1], pieces[piece, 2], words, places)
        for n in range(_likely(words[:num_words], table.filter, lasts, seeds)):
            bucket = seeds[n] >> shift
            for place in table.places[table.buckets[bucket] : table.buckets[bucket + np.uint64(1)]]:
                first, here = lasts[n] - SEED + 1, np.int64(place)
                if _alike(table.words, here, words, first, SEED, 1) < SEED:
                    continue
                passage = np.searchsorted(table.ends, here, side="right") - 1
                most = min(here - table.ends[passage], first)
                if _alike(table.words, here - 1, words, first - 1, min(most, 1), -1) and table.marks[here - 1] & SEEDS:
                    continue  # this run has been seen from the seed before
                back = _alike(table.words, here - 1, words, first - 1, most, -1)
                first, here = first - back, here - back
                most = min(table.ends[passage + 1] - here, num_words - first)
                length = _alike(table.words, here, words, first, most, 1)
                if count == len(runs):
                    runs = np.concatenate((runs, np.empty_like(runs)))
                runs[count, 0], runs[count, 1], runs[count, 2] = pieces[piece, 0], passage, places[first, 0]
                runs[count, 3], runs[count, 4], runs[count, 5] = places[first + length - 1, 1], here, length
                count += 1
    return runs[:count]


@numba.njit(cache=True, nogil=True)
def _alike(ours, here, theirs, there, most, step):
    """How many words agree from two places on, or back from there."""
    length = 0
    while length < most and ours[here + step * length] == theirs[there + step * length]:
        length += 1
    return length


@numba.njit(cache=True, nogil=True)
def _covered(runs, first, table, seen, stamp):
    """Words that count which the runs from `first` on cover, near enough for one passage; end of the last that adds."""
    passage, covered, end, r = runs[first, 1], 0, runs[first, 3], first
    limit = runs[first, 2] + table.spans[passage]
    while r < len(runs) and runs[r, 0] == runs[first, 0] and runs[r, 1] == passage and runs[r, 2] < limit:
        before = covered
        for word in range(runs[r, 4], runs[r, 4] + runs[r, 5]):
            if table.marks[word] & COUNTS and seen[word - table.ends[passage]] != stamp:
                seen[word - table.ends[passage]] = stamp
                covered += 1
        if covered > before:
            end = max(end, runs[r, 3])
        r += 1
    return covered, end


@numba.njit(cache=True, nogil=True)
def found(runs, table):
    """Of runs sorted by document, passage and first byte, what is covered enough: int64 [H, 5].

    (document, passage, words covered, first byte, end). A run that adds nothing at the front is left off.
    """
    hits, count = np.empty((len(runs), 5), np.int64), 0
    seen, stamp, r = np.zeros(MAX_WORDS, np.int64), 0, 0
    while r < len(runs):
        stamp += 1
        covered, end = _covered(runs, r, table, seen, stamp)
        if covered < table.needed[runs[r, 1]]:
            r += 1
            continue
        best = r
        while best + 1 < len(runs) and (runs[best + 1, :2] == runs[r, :2]).all():
            if runs[best + 1, 2] >= end:
                break
            stamp += 1
            others, other_end = _covered(runs, best + 1, table, seen, stamp)
            if others < covered:
                break
            best, covered, end = best + 1, others, other_end
        hits[count] = runs[best, 0], runs[best, 1], covered, runs[best, 2], end
        count += 1
        document, passage = runs[r, 0], runs[r, 1]
        while r < len(runs) and runs[r, 0] == document and runs[r, 1] == passage and runs[r, 2] < end:
            r += 1
    return hits[:count]


@numba.njit(cache=True, nogil=True)
def words_of(data, offsets):
    room = (len(data) + len(offsets)) // 2 + 1
    words, places = np.empty(room, np.uint32), np.empty((room, 2), np.int64)
    counts, at = np.empty(len(offsets) - 1, np.int64), 0
    for text in range(len(counts)):
        counts[text] = _words(data, offsets[text], offsets[text + 1], words[at:], places[at:])
        at += counts[text]
    return words[:at].copy(), places[:at], counts
