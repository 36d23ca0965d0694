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


@njit(cache=True, nogil=True, _nrt=False)
def _line(data, start, end, stops, row):
    """Adds one line, its line break not included, to the sums of its document."""
    chars, blank = 0, True
    for i in range(start, end):
        chars += data[i] & 0xC0 != 0x80
        blank = blank and (data[i] == 32 or 9 <= data[i] <= 13)
    row[1] += 1
    row[3] = max(row[3], chars)
    row[4] += chars
    if blank:
        return
    row[2] += 1
    row[12] += chars <= SHORT_LINE
    first, last = start, end
    while data[first] == 32 or 9 <= data[first] <= 13:
        first += 1
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


@njit(cache=True, nogil=True)
def _counts(data, offsets, stops, rows):
    for document in range(len(offsets) - 1):
        start, end, row = offsets[document], offsets[document + 1], rows[document]
        alnum, digits, i, begun = 0, 0, start, start
        while i < end:
            byte = data[i]
            row[0] += byte & 0xC0 != 0x80
            if 48 <= byte <= 57:
                digits += 1
            elif 97 <= byte | 32 <= 122 or byte >= 0xC3:
                alnum += 1
            elif byte == 35:
                row[7] += 1
            elif byte == 123:
                row[14] += 1
            elif byte == 46 and i + 2 < end and data[i + 1] == 46 and data[i + 2] == 46:
                row[8] += 1
                row[0] += 2
                i += 2
            elif byte == 10:
                row[13] += 1
                _line(data, begun, i, stops, row)
                begun = i + 1
            if byte == 0xE2 and i + 2 < end and data[i + 1] == 0x80 and data[i + 2] == 0xA6:
                row[8] += 1
            i += 1
        if begun < end:
            _line(data, begun, end, stops, row)
        row[5], row[6] = alnum + digits, digits


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
