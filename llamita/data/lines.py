"""Lines that a bucket of documents has more than a few times: menus, notices, forms (Llama 3, arXiv 2407.21783, 3.1.1).

A line is compared without blanks at its ends, in ASCII lower case, with every digit a 0 (CCNet, arXiv 1911.00359).
"""

from collections.abc import Sequence

import numpy as np
from numba import njit

from llamita.data.strings import Strings

RANGES = 16  # of hashes, one after another, so that a sixteenth of a bucket's are in memory


@njit(cache=True, nogil=True)
def _line_hash(data, start, end):
    """0 for a line of blanks alone."""
    while start < end and data[start] <= 32:
        start += 1
    while end > start and data[end - 1] <= 32:
        end -= 1
    if start == end:
        return np.uint64(0)
    state = np.uint64(14695981039346656037)
    for place in range(start, end):
        byte = data[place]
        if 65 <= byte <= 90:
            byte += 32
        elif 48 <= byte <= 57:
            byte = 48
        state = (state ^ np.uint64(byte)) * np.uint64(1099511628211)
    state ^= state >> np.uint64(32)
    state *= np.uint64(0x9E3779B97F4A7C15)
    return max(state ^ (state >> np.uint64(29)), np.uint64(1))


@njit(cache=True, nogil=True)
def _hashes(data, offsets, out):
    count = 0
    for document in range(len(offsets) - 1):
        start, end = offsets[document], offsets[document + 1]
        while start < end:
            stop = start
            while stop < end and data[stop] != 10:
                stop += 1
            found = _line_hash(data, start, stop)
            if found:
                out[count] = found
                count += 1
            start = stop + 1
    return count


@njit(cache=True, nogil=True)
def _without(data, offsets, frequent, out, ends):
    size = 0
    for document in range(len(offsets) - 1):
        start, end = offsets[document], offsets[document + 1]
        while start < end:
            stop = start
            while stop < end and data[stop] != 10:
                stop += 1
            stop = min(stop + 1, end)
            found = _line_hash(data, start, stop)
            place = np.searchsorted(frequent, found)
            if not (found and place < len(frequent) and frequent[place] == found):
                out[size : size + stop - start] = data[start:stop]
                size += stop - start
            start = stop
        ends[document + 1] = size
    return size


def hashes(strings: Strings) -> np.ndarray:
    """Of each line that is not blank, in order, uint64 [L]."""
    out = np.empty(int((strings.data == 10).sum()) + len(strings), np.uint64)
    return out[: _hashes(strings.data, strings.offsets, out)]


def frequent(parts: Sequence[np.ndarray], more_than: int) -> np.ndarray:
    """The hashes that occur more than `more_than` times in all parts together, ascending, uint64."""
    found = [np.empty(0, np.uint64)]
    for share in range(RANGES):
        mine = np.concatenate([part[part % np.uint64(RANGES) == share] for part in parts])
        values, counts = np.unique(mine, return_counts=True)
        found.append(values[counts > more_than])
    return np.sort(np.concatenate(found))


def without(strings: Strings, frequent: np.ndarray) -> Strings:
    """The texts without the lines whose hashes are in `frequent` (ascending)."""
    out, ends = np.empty(len(strings.data), np.uint8), np.zeros(len(strings) + 1, np.int64)
    size = _without(strings.data, strings.offsets, frequent, out, ends)
    return Strings(out[:size].copy(), ends)
