"""What is measured of the lines and characters of a text, whatever its language."""

from functools import cache

import numpy as np
from numba import njit

from llamita.data.strings import Strings
from llamita.data.words import STOP, classes

NAMES = (
    *("chars", "lines", "full_lines", "max_line_length", "mean_line_length", "alnum_share", "digit_share"),
    *("hashes", "ellipses", "bullet_lines", "ellipsis_lines", "punctuated_lines", "short_lines", "newlines", "braces"),
)
SHORT_LINE = 30

# What a byte adds to characters, digits, other letters (and signs beyond U+00BF), hashes, braces: BITS each.
BITS = 12
_TALLY = np.zeros(256, np.uint64)
_TALLY[[byte for byte in range(256) if byte & 0xC0 != 0x80]] += np.uint64(1)
_TALLY[list(b"0123456789")] += np.uint64(1 << BITS)
_TALLY[[byte for byte in range(256) if 97 <= byte | 32 <= 122 or byte >= 0xC3]] += np.uint64(1 << 2 * BITS)
_TALLY[ord("#")] += np.uint64(1 << 3 * BITS)
_TALLY[ord("{")] += np.uint64(1 << 4 * BITS)


@njit(cache=True, nogil=True, _nrt=False)
def _line(data, start, end, chars, stops, row):
    """Adds one line, its line break not included, to the sums of its document."""
    first, last = start, end
    while first < end and (data[first] == 32 or 9 <= data[first] <= 13):
        first += 1
    row[1] += 1
    row[3] = max(row[3], chars)
    row[4] += chars
    if first == end:
        return
    row[2] += 1
    row[12] += chars <= SHORT_LINE
    while data[last - 1] == 32 or 9 <= data[last - 1] <= 13:
        last -= 1
    row[9] += data[first] == 45 or (last - first > 2 and data[first] == 0xE2 and data[first + 1] == 0x80
                                    and data[first + 2] == 0xA2)  # fmt: skip
    dots = last - first > 2 and data[last - 1] == 46 and data[last - 2] == 46 and data[last - 3] == 46
    wide = last - first > 2 and data[last - 3] == 0xE2 and data[last - 2] == 0x80
    row[10] += dots or (wide and data[last - 1] == 0xA6)
    size = 1
    while end - size > start and data[end - size] & 0xC0 == 0x80:
        size += 1
    code = np.int64(data[end - size])
    if size > 1:
        code &= 0x3F >> (size - 1)
        for k in range(end - size + 1, end):
            code = code << 6 | (np.int64(data[k]) & 0x3F)
    row[11] += code < len(stops) and stops[code]


@njit(cache=True, nogil=True, _nrt=False)
def _share(tally, number):
    return np.int64(tally >> np.uint64(number * BITS) & np.uint64((1 << BITS) - 1))


@njit(cache=True, nogil=True)
def _counts(data, offsets, stops, rows):
    for document in range(len(offsets) - 1):
        i, end, row = offsets[document], offsets[document + 1], rows[document]
        begun, chars, dots_end = i, 0, i
        while i < end:
            tally, stop = np.uint64(0), min(i + (1 << BITS) - 1, end)
            while i < stop and data[i] != 10:
                tally += _TALLY[data[i]]
                if data[i] == 46:
                    if i >= dots_end and i + 2 < end and data[i + 1] == 46 and data[i + 2] == 46:
                        row[8] += 1
                        dots_end = i + 3
                elif data[i] == 0xE2 and i + 2 < end and data[i + 1] == 0x80 and data[i + 2] == 0xA6:
                    row[8] += 1
                i += 1
            chars += _share(tally, 0)
            row[6] += _share(tally, 1)
            row[5] += _share(tally, 1) + _share(tally, 2)
            row[7] += _share(tally, 3)
            row[14] += _share(tally, 4)
            if i < stop:
                row[13] += 1
                row[0] += chars + 1
                _line(data, begun, i, chars, stops, row)
                i, begun, chars = i + 1, i + 1, 0
        if begun < end:
            row[0] += chars
            _line(data, begun, end, chars, stops, row)


@cache
def _stops() -> np.ndarray:
    """Which characters below U+10000 end a sentence, bool [65536]."""
    return classes() & STOP != 0


def measure(strings: Strings) -> dict[str, np.ndarray]:
    """A column for each of NAMES, [len]: lengths in characters; shares of characters; the others are counts."""
    rows = np.zeros((len(strings), len(NAMES)), np.float64)
    _counts(strings.data, strings.offsets, _stops(), rows)
    found: dict[str, np.ndarray] = dict(zip(NAMES, rows.T.astype(np.float32), strict=True))
    chars, lines = np.maximum(found["chars"], 1), np.maximum(found["lines"], 1)
    found["mean_line_length"] = found["mean_line_length"] / lines
    for name in ("alnum_share", "digit_share"):
        found[name] = found[name] / chars
    return found
