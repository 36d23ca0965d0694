"""Words of a text, as spaCy's English tokenizer sets them apart but for some two in a thousand: datatrove's filters
count with it (`benchmarks/rules_parity.py`).

A word is what blanks set apart, without the punctuation around it, cut at hyphens, slashes, commas and colons between
letters and before n't, 's, 'll; a mark is a word of its own, and so is each character of a script that writes no blanks
(ideographs, kana, Thai, Lao, Burmese, Khmer).
"""

import functools
import unicodedata
from typing import NamedTuple

import numpy as np
from numba import njit

from llamita.data.strings import Strings

# Classes of characters; those of a word are the classes of its characters together.
BLANK, LETTER, CAPITAL, OTHER, OPENS, CLOSES, ALONE, MARK, STOP = (1 << bit for bit in range(9))
IN_WORD = LETTER | OTHER  # OTHER: digits and the like
QUOTES = "'\"`´‘’“”‚„«»"
OPENING = QUOTES + ",:;!?()[]{}<>_#*&%=$§…¿¡—–£€¥+"  # stand before a word without being of it
CLOSING = QUOTES + ",:;!?()[]{}<>_#*&%…¿¡—–"
STOPS = ".!?。！？．｡։؟۔।॥።፧។៕၊။‼⁇⁈⁉‽"  # end a sentence
NO_BLANKS = ((0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x2E80, 0x9FFF), (0xF900, 0xFAFF))

# Words that few texts of some length do without. English: Gopher's eight (arXiv 2112.11446, table A1).
STOP_WORDS = {
    "ar": "في من على إلى أن التي الذي عن", "cs": "a je se na že v s to", "de": "der die und in das nicht zu ist",
    "en": "the be to of and that have with", "es": "de la que el en y los se", "fa": "و در به از که این را با",
    "fr": "de la le et les des en que", "hi": "के में है की से का को और", "id": "yang dan di dengan itu untuk dari ini",
    "it": "di e che il la in un per", "ja": "の に は を が と で た", "nl": "de van het een en in dat is",
    "pl": "w i na się z nie do to", "pt": "de a o que e do da em", "ru": "и в не на что с по как",
    "sv": "och i att det som en på är", "tr": "ve bir bu da de için ile ne", "uk": "і в на не що з та до",
    "vi": "và của là có cho không được các", "zh": "的 是 在 不 一 有 了 人",
}  # fmt: skip


class Words(NamedTuple):
    """Of some texts, one after another; those of text i are `ends[i] : ends[i + 1]`."""

    hashes: np.ndarray
    """FNV-1a of their bytes, uint64 [W]."""
    starts: np.ndarray
    """Where among all bytes, int64 [W]."""
    chars: np.ndarray
    """Characters, int32 [W]."""
    kinds: np.ndarray
    """Of their characters together, uint16 [W]."""
    ends: np.ndarray
    """int64 [texts + 1]"""


def split(strings: Strings) -> Words:
    size = len(strings.data)
    hashes, starts, chars, kinds = (np.empty(size, kind) for kind in (np.uint64, np.int64, np.int32, np.uint16))
    ends = np.zeros(len(strings) + 1, np.int64)
    _split_all(strings.data, strings.offsets, classes(), hashes, starts, chars, kinds, ends)
    count = int(ends[-1])
    return Words(hashes[:count], starts[:count], chars[:count], kinds[:count], ends)


def _class_of(char: str) -> int:
    code, category = ord(char), unicodedata.category(char)
    if char.isspace():
        return BLANK
    kind = (OPENS if char in OPENING else 0) | (CLOSES if char in CLOSING else 0) | (STOP if char in STOPS else 0)
    if any(first <= code <= last for first, last in NO_BLANKS):
        kind |= ALONE
    if category[0] == "L" or (category[0] == "M" and kind & ALONE):
        return kind | LETTER | (CAPITAL if char.isupper() else 0)
    if category[0] in "NM":
        return kind | OTHER
    if category == "So" and char != "°":
        kind |= ALONE
    return kind | MARK


@functools.cache
def classes() -> np.ndarray:
    """Classes of the characters below U+10000, uint16 [65536]."""
    return np.array([_class_of(chr(code)) for code in range(0x10000)], np.uint16)


# Without `_nrt` numba counts references to every array at every call: three times as slow (measured).
# No kernel of this room calls one of another file: numba keeps what it compiled until the caller's own file changes.
@njit(cache=True, nogil=True, _nrt=False)
def char_at(data, i, end, classes):
    """Class and width of the character that begins at `data[i]`. Above U+FFFF: ideographs, pictures, letters."""
    byte = data[i]
    if byte < 0x80:
        return np.int64(classes[byte]), 1
    width = min(2 if byte < 0xE0 else 3 if byte < 0xF0 else 4, end - i)
    char = np.int64(byte) & (0x3F >> (width - 1))
    for k in range(1, width):
        char = char << 6 | (data[i + k] & 0x3F)
    if char < 0x10000:
        return np.int64(classes[char]), width
    return (ALONE | LETTER if char >= 0x20000 else ALONE | MARK if char >= 0x1F000 else LETTER), width


@njit(cache=True, nogil=True, _nrt=False)
def class_before(data, start, i, classes):
    """Of the character that ends at `data[i]`, and its width; nothing before `start`: 0, 0."""
    if i <= start:
        return 0, 0
    k = i - 1
    while k > start and data[k] & 0xC0 == 0x80:
        k -= 1
    return char_at(data, k, i, classes)[0], i - k


@njit(cache=True, nogil=True, _nrt=False)
def _put(data, start, end, classes, hashes, starts, sizes, kinds, count):
    """Bytes `start` to `end` as the next word, if there are any. Returns how many words there are."""
    if start >= end:
        return count
    state, sort, chars, i = np.uint64(0xCBF29CE484222325), 0, 0, start
    while i < end:
        kind, width = np.int64(classes[data[i]]), 1
        if data[i] >= 0x80:
            kind, width = char_at(data, i, end, classes)
        for k in range(i, i + width):
            state = (state ^ np.uint64(data[k])) * np.uint64(0x100000001B3)
        sort |= kind
        chars += 1
        i += width
    hashes[count], starts[count], sizes[count], kinds[count] = state, start, chars, sort
    return count + 1


@njit(cache=True, nogil=True, _nrt=False)
def _run_end(data, i, end):
    """Where the run of bytes like `data[i]` ends."""
    k = i + 1
    while k < end and data[k] == data[i]:
        k += 1
    return k


@njit(cache=True, nogil=True, _nrt=False)
def _is_quote(data, i, end):
    """Width of an apostrophe at i, ' or ’, else 0."""
    if data[i] == 39:
        return 1
    return 3 if i + 2 < end and data[i] == 0xE2 and data[i + 1] == 0x80 and data[i + 2] == 0x99 else 0


@njit(cache=True, nogil=True, _nrt=False)
def _clitic(data, start, end):
    """Where the n't, 'm, 'd, 'll, 're, 've at the end of a word begins; else `end`."""
    for back in range(2, 6):
        i = end - back
        width = _is_quote(data, i, end) if i > start else 0
        if width:
            last, size = data[end - 1] | 32, back - width
            if size == 1 and last == 116 and data[i - 1] | 32 == 110:
                return i - 1 if i - 1 > start else end
            pair = data[end - 2] | 32
            one, two = size == 1 and (last == 109 or last == 100), size == 2
            if one or (two and ((last == 108 and pair == 108) or (last == 101 and (pair == 114 or pair == 118)))):
                return i
    return end


@njit(cache=True, nogil=True, _nrt=False)
def _cuts(data, start, i, stop, end, classes):
    """Whether the marks `data[i:stop]` within a word, `data[start:end]`, part it."""
    before, after = class_before(data, start, i, classes)[0], 0
    if stop < end:
        after = char_at(data, stop, end, classes)[0]
    byte = data[i]
    if byte == 46:  # .
        lower = before & LETTER and not before & CAPITAL
        return stop - i > 1 or ((lower or before & CLOSES) and (after & CAPITAL or after & CLOSES) != 0)
    if byte == 44:  # ,
        return before & LETTER and after & LETTER
    if byte == 45 or byte == 126 or byte > 127:  # - ~ – —
        return before & IN_WORD and (after & LETTER or (byte == 45 and before & OTHER and after & OTHER))
    return before & IN_WORD and after & LETTER


@njit(cache=True, nogil=True, _nrt=False)
def _middle(data, start, end, classes, hashes, starts, sizes, kinds, count):
    """A word without the marks around it: an address stays whole, others are cut where `_cuts` says."""
    for i in range(start, end - 2):
        if data[i] == 58 and data[i + 1] == 47 and data[i + 2] == 47:  # ://
            return _put(data, start, end, classes, hashes, starts, sizes, kinds, count)
    clitic = _clitic(data, start, end)
    begun, i = start, start
    while i < clitic:
        byte, stop = data[i], i + 1
        if byte == 45 or byte == 46 or byte == 126:  # - . ~
            stop = _run_end(data, i, clitic)
        elif byte == 0xE2 and i + 2 < clitic and data[i + 1] == 0x80 and 0x93 <= data[i + 2] <= 0x94:
            stop = i + 3
        elif not (byte == 44 or byte == 47 or byte == 58 or 60 <= byte <= 62):  # , / : < = >
            i += 1
            continue
        if i > start and _cuts(data, start, i, stop, clitic, classes):
            count = _put(data, begun, i, classes, hashes, starts, sizes, kinds, count)
            count = _put(data, i, stop, classes, hashes, starts, sizes, kinds, count)
            begun = stop
        i = stop
    count = _put(data, begun, clitic, classes, hashes, starts, sizes, kinds, count)
    return _put(data, clitic, end, classes, hashes, starts, sizes, kinds, count)


@njit(cache=True, nogil=True, _nrt=False)
def _marks(data, start, end, classes, hashes, starts, sizes, kinds, count):
    """Marks one by one, dots that follow one another and 's as one."""
    i = start
    while i < end:
        stop = i + char_at(data, i, end, classes)[1]
        if data[i] == 46:
            stop = _run_end(data, i, end)
        elif stop < end and _is_quote(data, i, end) and data[stop] | 32 == 115:
            stop += 1
        count = _put(data, i, stop, classes, hashes, starts, sizes, kinds, count)
        i = stop
    return count


@njit(cache=True, nogil=True, _nrt=False)
def _split(data, start, end, classes, hashes, starts, sizes, kinds, count):
    """What stands between two blanks: the marks before, the word, the marks behind."""
    first = start
    while first < end:
        kind, width = char_at(data, first, end, classes)
        if data[first] == 46 and first + 1 < end and data[first + 1] == 46:
            width = _run_end(data, first, end) - first
        elif not kind & OPENS:
            break
        first += width
    last = end
    while last > first:
        kind, width = class_before(data, first, last, classes)
        if data[last - 1] == 46:
            while last - width > first and data[last - width - 1] == 46:
                width += 1
            before, step = class_before(data, first, last - width, classes)
            earlier = class_before(data, first, last - width - step, classes)[0]
            if width == 1 and (not before or (before & CAPITAL and not earlier & CAPITAL)):
                break  # J. or U.S.
        elif last - 2 > first and data[last - 1] | 32 == 115 and data[last - 2] == 39:
            width = 2
        elif last - 4 > first and data[last - 1] | 32 == 115 and _is_quote(data, last - 4, last) == 3:
            width = 4
        elif not kind & CLOSES:
            break
        last -= width
    count = _marks(data, start, first, classes, hashes, starts, sizes, kinds, count)
    if first < last:
        count = _middle(data, first, last, classes, hashes, starts, sizes, kinds, count)
    return _marks(data, last, end, classes, hashes, starts, sizes, kinds, count)


@njit(cache=True, nogil=True, _nrt=False)
def _split_wide(data, start, end, classes, hashes, starts, sizes, kinds, count):
    """The same where characters beyond ASCII may be blanks, or words by themselves."""
    begun, i = start, start
    while i < end:
        kind, width = char_at(data, i, end, classes)
        if kind & (BLANK | ALONE):
            if begun < i:
                count = _split(data, begun, i, classes, hashes, starts, sizes, kinds, count)
            if kind & ALONE:
                count = _put(data, i, i + width, classes, hashes, starts, sizes, kinds, count)
            begun = i + width
        i += width
    return _split(data, begun, end, classes, hashes, starts, sizes, kinds, count) if begun < end else count


@njit(cache=True, nogil=True, _nrt=False)
def _ends_plainly(data, begun, i, end, classes):
    """Whether all that stands behind the letters `data[begun:i]` is one mark that a word is always parted from."""
    byte = data[i]
    if i == begun or byte >= 0x80 or (i + 1 < end and (data[i + 1] >= 0x80 or not classes[data[i + 1]] & BLANK)):
        return False
    return classes[byte] & CLOSES != 0 or (byte == 46 and 97 <= data[i - 1] <= 122)


@njit(cache=True, nogil=True, _nrt=False)
def _words_of(data, start, end, classes, hashes, starts, sizes, kinds, count):
    """The words of `data[start:end]` behind `count` others. Returns how many there are then."""
    i = start
    while i < end:
        if data[i] < 0x80 and classes[data[i]] & BLANK:
            i += 1
            continue
        begun, chars, seen, state = i, 0, 0, np.uint64(0xCBF29CE484222325)
        while i < end:
            byte = data[i]
            if byte < 0x80:
                kind = np.int64(classes[byte])
                if kind & ~(IN_WORD | CAPITAL):
                    break
                state = (state ^ np.uint64(byte)) * np.uint64(0x100000001B3)
                i += 1
            else:
                kind, width = char_at(data, i, end, classes)
                if kind & ~(IN_WORD | CAPITAL):
                    break
                for k in range(i, i + width):
                    state = (state ^ np.uint64(data[k])) * np.uint64(0x100000001B3)
                i += width
            seen, chars = seen | kind, chars + 1
        ends = i == end or (data[i] < 0x80 and classes[data[i]] & BLANK)
        if ends or _ends_plainly(data, begun, i, end, classes):
            hashes[count], starts[count], sizes[count], kinds[count] = state, begun, chars, seen
            count += 1
            if not ends:
                count = _put(data, i, i + 1, classes, hashes, starts, sizes, kinds, count)
                i += 1
            continue
        i, wide = begun, False
        while i < end and (data[i] >= 0x80 or not classes[data[i]] & BLANK):
            wide = wide or data[i] >= 0x80
            i += 1
        if wide:
            count = _split_wide(data, begun, i, classes, hashes, starts, sizes, kinds, count)
        else:
            count = _split(data, begun, i, classes, hashes, starts, sizes, kinds, count)
    return count


@njit(cache=True, nogil=True, _nrt=False)
def _split_all(data, offsets, classes, hashes, starts, sizes, kinds, ends):
    count = 0
    for text in range(len(offsets) - 1):
        count = _words_of(data, offsets[text], offsets[text + 1], classes, hashes, starts, sizes, kinds, count)
        ends[text + 1] = count
