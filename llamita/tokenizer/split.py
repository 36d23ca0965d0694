"""Llama 3's split as a walk over UTF-8 bytes: what PATTERN says, compiled, and its slow twin beside it.

Characters fall into five classes; PATTERN needs nothing else, but for the letters of its contractions.
"""

from collections.abc import Iterator
from functools import cache

import numpy as np
import regex
from numba import njit

from llamita.tokenizer.llama3 import PATTERN

OTHER, LETTER, NUMBER, BLANK, NEWLINE = range(5)
_APOSTROPHE, _SPACE, _LOWER = 39, 32, 32
_LONG_S = (0xC5, 0xBF)  # U+017F, which (?i:s) matches


@cache
def classes() -> np.ndarray:
    """(0x110000,) uint8: the class of each code point, by the Unicode version of the `regex` library.

    A newer Unicode than tiktoken's calls letter what was not assigned before: counts of words may then differ
    from the encoder's split in such characters, ids never do.
    """
    found = np.zeros(0x110000, np.uint8)
    everything = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))
    for kind, pattern in ((LETTER, r"\p{L}+"), (NUMBER, r"\p{N}+"), (BLANK, r"\s+"), (NEWLINE, r"[\r\n]+")):
        for run in regex.finditer(pattern, everything):
            found[ord(run[0][0]) : ord(run[0][-1]) + 1] = kind
    return found


@njit(inline="always")
def _look(data, i, table):
    """Class and width in bytes of the character that begins at `i`."""
    lead = np.int64(data[i])
    if lead < 0x80:
        return table[lead], 1
    if lead < 0xE0:
        return table[(lead & 0x1F) << 6 | data[i + 1] & 0x3F], 2
    if lead < 0xF0:
        return table[(lead & 0x0F) << 12 | (data[i + 1] & 0x3F) << 6 | data[i + 2] & 0x3F], 3
    high = (lead & 0x07) << 18 | (data[i + 1] & 0x3F) << 12
    return table[high | (data[i + 2] & 0x3F) << 6 | data[i + 3] & 0x3F], 4


@njit(inline="always")
def _past(data, i, end, table, wanted):
    """Where the run of characters of class `wanted` that begins at `i` ends."""
    while i < end:
        kind, width = _look(data, i, table)
        if kind != wanted:
            break
        i += width
    return i


@njit(inline="always")
def _contraction(data, i, end):
    """Where 's 't 're 've 'm 'll 'd ends if the apostrophe at `i` begins one, else `i`."""
    if i + 1 < end:
        first = data[i + 1] | _LOWER
        if first == 115 or first == 116 or first == 109 or first == 100:  # s t m d
            return i + 2
        if i + 2 < end:
            second = data[i + 2] | _LOWER
            if ((first == 114 or first == 118) and second == 101) or (first == 108 and second == 108):  # re ve ll
                return i + 3
            if data[i + 1] == _LONG_S[0] and data[i + 2] == _LONG_S[1]:
                return i + 3
    return i


@njit(inline="always")
def _blanks(data, i, end, table):
    r"""\s*[\r\n]+ | \s+(?!\S) | \s+ from the blank at `i`."""
    last, after_newline, j = i, i, i
    while j < end:
        kind, width = _look(data, j, table)
        if kind < BLANK:
            break
        last, j = j, j + width
        if kind == NEWLINE:
            after_newline = j
    if after_newline > i:
        return after_newline
    return j if j == end or last == i else last


@njit(inline="always")
def word_end(data, i, end, table):
    """Where the word that begins at `i` < `end` ends; data is (N,) uint8 of valid UTF-8, table is `classes()`."""
    if data[i] == _APOSTROPHE:
        j = _contraction(data, i, end)
        if j > i:
            return j
    kind, width = _look(data, i, table)
    j = i + width
    if kind == LETTER:
        return _past(data, j, end, table, LETTER)
    following = _look(data, j, table)[0] if j < end else NEWLINE
    if following == LETTER and kind in (OTHER, BLANK):
        return _past(data, j, end, table, LETTER)
    if kind == NUMBER:
        for _ in range(2):
            if j < end:
                kind, width = _look(data, j, table)
                if kind == NUMBER:
                    j += width
                else:
                    break
        return j
    if kind == OTHER or (data[i] == _SPACE and following == OTHER):
        return _past(data, _past(data, j, end, table, OTHER), end, table, NEWLINE)
    return _blanks(data, i, end, table)


@njit(nogil=True, cache=True)
def _ends(data, table):
    ends = np.empty(len(data), np.int64)
    count, i = 0, 0
    while i < len(data):
        i = word_end(data, i, len(data), table)
        ends[count] = i
        count += 1
    return ends[:count].copy()


def split(text: str) -> Iterator[str]:
    """The words of `text` that BPE never merges across. ValueError for a lone surrogate."""
    data = np.frombuffer(text.encode(), np.uint8)
    start = 0
    for end in _ends(data, classes()).tolist():
        yield data[start:end].tobytes().decode()
        start = end


def split_by_pattern(text: str) -> list[str]:
    """The slow twin of `split`: PATTERN itself."""
    return regex.findall(PATTERN, text)
