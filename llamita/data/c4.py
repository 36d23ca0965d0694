"""The lines that C4 drops (arXiv 1910.10683, 2.2, and its code in tensorflow_datasets)."""

import re
from collections.abc import Iterator

import numpy as np
from numba import njit

from llamita.data.strings import Strings

POLICY = (
    b"javascript", b"terms of use", b"privacy policy", b"cookie policy", b"uses cookies", b"use of cookies",
    b"use cookies",
)  # fmt: skip
SIGNS = (b"javascript", b"cookie", b"terms of use", b"privacy policy", b"\r")  # of texts that the kernel is not told of
CITATION = re.compile(rb"\[\d*\]|\[edit\]|\[citation needed\]")
MIN_WORDS, MAX_WORD = 3, 1000
WITHOUT_BLANKS = 30  # Chinese and the like have no blanks to count words by: bytes of a line that stays all the same


def c4_lines(strings: Strings) -> Strings:
    """The texts without the lines of fewer than three words, with a word of more than 1,000 characters, or of scripts,
    cookies and policies; without citations, and blanks at the ends of lines."""
    out, ends = np.empty_like(strings.data), np.zeros_like(strings.offsets)
    _long_lines(strings.data, strings.offsets, out, ends)
    kept = Strings(out[: ends[-1]], ends)
    cited = _with(kept, kept.data.tobytes(), (b"[",))
    marked = _with(strings, strings.data.tobytes().lower(), SIGNS)
    texts = {i: CITATION.sub(b"", kept[i]) for i in cited} | {i: plain_c4_lines(strings[i]) for i in marked}
    places = sorted(texts)
    return kept.with_texts(places, [texts[i] for i in places]) if texts else kept


def plain_c4_lines(text: bytes) -> bytes:
    """The same of one text, whatever stands in it: the slow twin of the kernel, which knows the lengths alone."""
    folded = text.lower()
    found = [phrase for phrase in POLICY if phrase in folded]
    lines = [line for line in map(bytes.strip, text.splitlines()) if _stays(line, found)]
    return b"\n".join(CITATION.sub(b"", line) if b"[" in line else line for line in lines)


def _stays(line: bytes, phrases: list[bytes]) -> bool:
    words = line.split()
    if len(words) < MIN_WORDS and not (len(line) > WITHOUT_BLANKS and line[0] >= 0xE0):
        return False
    if len(line) > MAX_WORD and max(map(len, words)) > MAX_WORD and line[0] < 0xE0:
        return False
    return not phrases or not any(phrase in line.lower() for phrase in phrases)


def _with(strings: Strings, whole: bytes, signs: tuple[bytes, ...]) -> list[int]:
    """The texts that hold one of the signs, and those in which two texts together do; `whole` = their bytes."""
    places = [place for sign in signs for place in _found(sign, whole)]
    return np.unique(np.searchsorted(strings.offsets, places, side="right") - 1).tolist()


def _found(sign: bytes, text: bytes) -> Iterator[int]:
    """Where it begins, each time."""
    place = text.find(sign)
    while place >= 0:
        yield place
        place = text.find(sign, place + len(sign))


@njit(cache=True, nogil=True, _nrt=False)
def _is_blank(byte):
    return byte == 32 or 9 <= byte <= 13


@njit(cache=True, nogil=True, _nrt=False)
def _is_long(data, first, last):
    """Whether the words of a line, not of blanks alone, are as many and none as long as C4 asks."""
    words, begun, longest = 0, first, 0
    for i in range(first, last + 1):
        if i == last or _is_blank(data[i]):
            words += i > begun
            longest = max(longest, i - begun)
            begun = i + 1
        if words >= MIN_WORDS and last - first <= MAX_WORD:
            return True
    if words < MIN_WORDS and not (last - first > WITHOUT_BLANKS and data[first] >= 0xE0):
        return False
    return longest <= MAX_WORD or data[first] >= 0xE0


@njit(cache=True, nogil=True, _nrt=False)
def _long_lines(data, offsets, out, ends):
    size = 0
    for text in range(len(offsets) - 1):
        i, begun = offsets[text], size
        while i < offsets[text + 1]:
            stop = i
            while stop < offsets[text + 1] and data[stop] != 10:
                stop += 1
            first, last = i, stop
            while first < last and _is_blank(data[first]):
                first += 1
            while last > first and _is_blank(data[last - 1]):
                last -= 1
            i = stop + 1
            if first < last and _is_long(data, first, last):
                if size > begun:
                    out[size], size = 10, size + 1
                for k in range(last - first):
                    out[size + k] = data[first + k]
                size += last - first
        ends[text + 1] = size
