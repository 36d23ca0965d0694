"""Spans of text that stand in some documents more than once, by a suffix array (Lee et al. 2022, arXiv 2107.06499).

Of each span all but the first occurrence goes. A bucket of at most MAX_BYTES is held in memory, 17 bytes a byte.
"""

import numpy as np
from numba import njit

from llamita.data.strings import Strings

MAX_BYTES = 64 * 2**20


@njit(cache=True, nogil=True)
def _common(data, suffixes, ranks, out):
    """How many bytes each suffix shares with the one before it in order, at most to a NUL (Kasai et al. 2001)."""
    size = 0
    for place in range(len(data)):
        rank = ranks[place]
        if rank == 0:
            size = 0
            continue
        other = suffixes[rank - 1]
        while data[place + size] == data[other + size] and data[place + size] != 0:
            size += 1
        out[rank] = size
        size = max(size - 1, 0)


@njit(cache=True, nogil=True)
def _marked(suffixes, common, least, gone):
    """Marks all but the first occurrence of each span of `least` bytes: groups of neighbours that share as much."""
    start = 0
    while start < len(suffixes):
        end = start + 1
        first = suffixes[start]
        while end < len(suffixes) and common[end] >= least:
            first = min(first, suffixes[end])
            end += 1
        for i in range(start, end):
            if end - start > 1 and suffixes[i] != first:
                gone[suffixes[i]] = True
        start = end


@njit(cache=True, nogil=True)
def _covered(begins, least, gone):
    """Marks all bytes of the spans of `least` bytes that begin at the marks."""
    reach = 0
    for place in range(len(begins)):
        if begins[place]:
            reach = place + least
        gone[place] = place < reach


def repeated(strings: Strings, least: int) -> np.ndarray:
    """Which bytes belong to a span of at least `least` bytes that stands further ahead as well, bool [N].

    Spans do not reach over ends of documents and are cut to whole characters. Texts hold no NUL.
    """
    from pydivsufsort import divsufsort

    assert len(strings.data) <= MAX_BYTES, "a bucket is cut before it comes here"
    if not len(strings.data):
        return np.zeros(0, bool)
    # A NUL behind each document ends what suffixes share.
    data = np.zeros(len(strings.data) + len(strings), np.uint8)
    text = np.ones(len(data), bool)
    text[strings.offsets[1:] + np.arange(len(strings))] = False
    data[text] = strings.data
    suffixes = divsufsort(data).astype(np.int32, copy=False)
    ranks, common, begins = np.empty_like(suffixes), np.zeros_like(suffixes), np.zeros(len(data), bool)
    ranks[suffixes] = np.arange(len(data), dtype=np.int32)
    _common(data, suffixes, ranks, common)
    _marked(suffixes, common, least, begins)
    gone = np.empty(len(data), bool)
    _covered(begins, least, gone)
    return _whole_characters(strings.data, gone[text])


@njit(cache=True, nogil=True)
def _whole_characters(data, gone):
    """A character goes only if all of its bytes do."""
    place = 0
    while place < len(data):
        end = place + 1
        while end < len(data) and data[end] & 0xC0 == 0x80:
            end += 1
        whole = True
        for i in range(place, end):
            whole = whole and gone[i]
        for i in range(place, end):
            gone[i] = whole
        place = end
    return gone


def without_repeated(strings: Strings, least: int) -> Strings:
    """The texts without what `repeated` finds, bucket by bucket of MAX_BYTES."""
    if len(strings.data) <= MAX_BYTES or len(strings) == 1:
        kept = ~repeated(strings, least) if len(strings.data) <= MAX_BYTES else np.ones(len(strings.data), bool)
        ends = np.concatenate([[0], np.cumsum(kept)])[strings.offsets]
        return Strings(strings.data[kept], ends.astype(np.int64))
    middle = len(strings) // 2
    halves = [strings.chosen(np.arange(*edges)) for edges in ((0, middle), (middle, len(strings)))]
    return Strings.of([text for half in halves for text in without_repeated(half, least).texts()])
