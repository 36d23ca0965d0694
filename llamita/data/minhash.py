"""MinHash signatures of word 5-grams, and bands of them (Broder 1997; 14 bands of 8 as FineWeb, arXiv 2406.17557).

Words are runs of letters, digits and combining marks of any script, ASCII letters in lower case; punctuation only parts
them, so editions differ by their words alone. Characters of scripts without blanks (`words.NO_BLANKS`) are words of
their own.
"""

import unicodedata

import numpy as np
from numba import njit

from llamita.data.strings import Strings
from llamita.data.words import ALONE, IN_WORD, LETTER, NO_BLANKS, classes

NUM_BANDS = 14
NUM_HASHES = 112
SKETCH = 256  # numbers of 4 bytes a document that candidates are verified with
SHINGLE = 5
FNV = np.uint64(0xCBF29CE484222325)
EMPTY = np.uint32(2**32 - 1)


def _keys(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """An odd factor and an offset of each hash, uint32 [NUM_HASHES]."""
    draw = np.random.default_rng(seed).integers(0, 2**32, (2, NUM_HASHES), dtype=np.uint32)
    return draw[0] | np.uint32(1), draw[1]


@njit(cache=True, nogil=True)
def _mixed(x):
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@njit(cache=True, nogil=True, _nrt=False)
def _class_at(data, place, classes):
    """Class and width of the character that begins here; above U+FFFF ideographs, pictures, letters."""
    byte = data[place]
    if byte < 0x80:
        return np.int64(classes[byte]), 1
    width = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
    char = np.int64(byte) & (0x3F >> (width - 1))
    for i in range(place + 1, place + width):
        char = char << 6 | (data[i] & 0x3F)
    if char < 0x10000:
        return np.int64(classes[char]), width
    return ALONE | LETTER if char >= 0x20000 else 0 if char >= 0x1F000 else LETTER, width


@njit(cache=True, nogil=True, _nrt=False)
def _word_hashes(data, start, end, classes, found):
    """Writes a hash of each word into `found`; returns how many there are, at most (end - start + 1) // 2."""
    count, word, goes_on, place = 0, FNV, False, start
    while place < end:
        kind, width = _class_at(data, place, classes)
        joins = kind & IN_WORD != 0 and kind & ALONE == 0
        if word != FNV and not (joins and goes_on):
            found[count] = _mixed(word)
            count, word = count + 1, FNV
        if kind & IN_WORD:
            for i in range(place, place + width):
                byte = data[i]
                if 65 <= byte <= 90:
                    byte += 32
                word = (word ^ np.uint64(byte)) * np.uint64(0x100000001B3)
        goes_on = joins
        place += width
    if word != FNV:
        found[count] = _mixed(word)
        count += 1
    return count


@njit(cache=True, nogil=True)
def _signed(data, offsets, classes, factors, terms, words, grams, least, sketches):
    for document in range(len(offsets) - 1):
        count = _word_hashes(data, offsets[document], offsets[document + 1], classes, words)
        num_grams = max(count - SHINGLE + 1, min(count, 1))
        for first in range(num_grams):
            gram = np.uint64(0)
            for place in range(first, min(first + SHINGLE, count)):
                gram = gram * np.uint64(0x9E3779B97F4A7C15) + words[place]
            grams[first] = np.uint32(_mixed(gram) & np.uint64(0xFFFFFFFF))
        for k in range(NUM_HASHES):
            term, factor, smallest = terms[k], factors[k], EMPTY
            for first in range(num_grams):
                smallest = min(smallest, np.uint32((grams[first] ^ term) * factor))
            least[document, k] = smallest
        _sketch(grams[:num_grams], sketches[document])


@njit(cache=True, nogil=True)
def _sketch(grams, out):
    """The smallest different numbers of `grams`, ascending; only those below a bound that leaves enough are sorted."""
    bound = (SKETCH + 4 * np.sqrt(SKETCH)) / max(len(grams), 1) * 2.0**32
    while True:
        chosen, num = np.empty((2, len(grams)), np.uint32), 0
        for gram in grams:
            chosen[0, num] = gram
            num += gram < bound
        ordered = _sorted(chosen[:, :num])
        count = 0
        for i in range(num):
            if count < SKETCH and (i == 0 or ordered[i] != ordered[i - 1]):
                out[count] = ordered[i]
                count += 1
        if count == SKETCH or bound >= 2.0**32:
            return
        bound *= 2


@njit(cache=True, nogil=True)
def _sorted(buffers):
    """The numbers in the first of two rows, by their bytes from the lowest on: faster than `np.sort` on a few hundred
    that lie in no order."""
    ends = np.empty(257, np.int64)
    for shift in range(0, 32, 8):
        source, target = buffers[shift // 8 % 2], buffers[1 - shift // 8 % 2]
        ends[:] = 0
        for number in source:
            ends[(number >> np.uint32(shift) & np.uint32(255)) + 1] += 1
        for byte in range(256):
            ends[byte + 1] += ends[byte]
        for number in source:
            byte = number >> np.uint32(shift) & np.uint32(255)
            target[ends[byte]] = number
            ends[byte] += 1
    return buffers[0]


def signed(strings: Strings, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Signatures, uint32 [len, NUM_HASHES], and sketches, uint32 [len, SKETCH]: the smallest hashes of the 5-grams,
    ascending, all of them where they are fewer. EMPTY fills up; a text without words has nothing else.
    """
    factors, terms = _keys(seed)
    longest = int(strings.sizes.max(initial=0)) // 2 + 1
    words, grams = np.empty(longest, np.uint64), np.empty(longest, np.uint32)
    least = np.full((len(strings), NUM_HASHES), EMPTY)
    sketches = np.full((len(strings), SKETCH), EMPTY)
    _signed(strings.data, strings.offsets, classes(), factors, terms, words, grams, least, sketches)
    return least, sketches


@njit(cache=True, nogil=True)
def _similarity(a, b, out):
    for row in range(len(a)):
        i, j, union, both = 0, 0, 0, 0
        while union < SKETCH and (i < SKETCH or j < SKETCH):
            x = a[row, i] if i < SKETCH else EMPTY
            y = b[row, j] if j < SKETCH else EMPTY
            if x == EMPTY and y == EMPTY:
                break
            union += 1
            both += x == y
            i += x <= y
            j += y <= x
        out[row] = both / max(union, 1)


def similarity(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Jaccard similarity of documents row by row, float32, from their sketches: exact for documents of at most SKETCH
    5-grams together, else with a standard error of at most 0.031 (bottom-k: Cohen and Kaplan 2007)."""
    out = np.empty(len(a), np.float32)
    _similarity(a, b, out)
    return out


def bands(signatures: np.ndarray) -> np.ndarray:
    """A hash of each band of rows, uint64 [len, NUM_BANDS]; 0 for a text without words."""
    rows = NUM_HASHES // NUM_BANDS
    found = np.zeros((len(signatures), NUM_BANDS), np.uint64)
    for row in range(rows):
        found = found * np.uint64(0x9E3779B97F4A7C15) + signatures[:, row::rows].astype(np.uint64) + np.uint64(1)
        found = _mixed.py_func(found)
    found = np.maximum(found, np.uint64(1))
    found[(signatures == EMPTY).all(axis=1)] = 0
    return found


def recall(similarity: np.ndarray, num_bands: int = NUM_BANDS, rows: int = NUM_HASHES // NUM_BANDS) -> np.ndarray:
    """The chance that two documents of a Jaccard similarity share a band, 1 - (1 - s^rows)^num_bands."""
    return 1 - (1 - similarity**rows) ** num_bands


class _Apart(dict[int, str]):
    """How `str.translate` writes each character so that blanks set words apart."""

    def __missing__(self, code: int) -> str:
        char, is_word = chr(code), unicodedata.category(chr(code))[0] in "LNM"
        if code >= 0x10000:
            is_word = not 0x1F000 <= code < 0x20000
        is_alone = code >= 0x20000 or any(first <= code <= last for first, last in NO_BLANKS)
        self[code] = " " if not is_word else f" {char} " if is_alone else char.lower() if char.isascii() else char
        return self[code]


def shingles(text: str) -> set[tuple[str, ...]]:
    """The slow twin: the word 5-grams themselves, whose Jaccard similarity signatures and sketches estimate."""
    found = text.translate(_Apart()).split()
    return {tuple(found[i : i + SHINGLE]) for i in range(max(len(found) - SHINGLE + 1, min(len(found), 1)))}
