"""All signals of a batch: a column each, from its words, its lines and characters, and what it repeats."""

from functools import cache

import numpy as np
from numba import njit

from llamita.data import line_signals, repeats
from llamita.data.strings import Strings
from llamita.data.words import ALONE, IN_WORD, LETTER, STOP, STOP_WORDS, Words, split

NAMES = ("tokens", "words", "word_chars", "longest_word", "alpha_words", "sentences", "alone")
MIN_WORDS = 3  # of a line whose sentences count, as C4 has it


def measure(strings: Strings) -> dict[str, np.ndarray]:
    """A float32 column [D] for each of `rules.COLUMNS`, and `stop_words_LANG`: different stop words of a language."""
    words = split(strings)
    found = line_signals.measure(strings)
    chars = np.maximum(found["chars"], 1)
    repeated = repeats.measure(strings, words, chars)
    found = _of_words(strings, words, found)
    unspaced = 2 * found.pop("alone") > found["words"]
    for name in ("mean_word_length", *(name for name in repeated if name.endswith("_gram"))):
        found[name] = np.where(unspaced, np.float32(np.nan), (found | repeated)[name])
    return repeated | found


def _of_words(strings: Strings, words: Words, found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`found` of the lines, with what takes words to be told."""
    table, stops, langs = _stop_words()
    rows = np.zeros((len(strings), len(NAMES)), np.float64)
    stop_counts = np.zeros((len(strings), len(STOP_WORDS)), np.int64)
    _count(strings.data, strings.offsets, *words, table, stops, langs, rows, stop_counts)
    own: dict[str, np.ndarray] = dict(zip(NAMES, rows.astype(np.float32).T, strict=True))
    tokens, plain = np.maximum(own.pop("tokens"), 1), np.maximum(own["words"], 1)
    lines, full = np.maximum(found["lines"], 1), np.maximum(found["full_lines"], 1)
    own["mean_word_length"] = own.pop("word_chars") / plain
    own["alpha_words"] = own["alpha_words"] / tokens
    own |= {name: found.pop(count) / tokens for name, count in (
        ("hash_ratio", "hashes"), ("ellipsis_ratio", "ellipses"), ("newlines_per_word", "newlines"))}  # fmt: skip
    found |= {name: found[name] / lines for name in ("bullet_lines", "ellipsis_lines")}
    found |= {name: found[name] / full for name in ("punctuated_lines", "short_lines")}
    by_lang = zip(STOP_WORDS, stop_counts.T.astype(np.float32), strict=True)
    return found | own | {f"stop_words_{lang}": column for lang, column in by_lang}


@njit(cache=True, nogil=True)
def _count(data, offsets, hashes, starts, sizes, kinds, ends, table, stops, langs, rows, stop_counts):
    seen, wrap = np.zeros(len(stops), np.bool_), np.uint64(len(table) - 1)
    for text in range(len(offsets) - 1):
        words, chars, longest, letters, alone = 0, 0, 0, 0, 0
        seen[:] = False
        for i in range(ends[text], ends[text + 1]):
            if kinds[i] & IN_WORD:
                words += 1
                chars += sizes[i]
                alone += kinds[i] & ALONE != 0
                longest = max(longest, sizes[i])
            letters += kinds[i] & LETTER != 0
            slot = np.int64(hashes[i] & wrap)
            while table[slot] >= 0 and stops[table[slot]] != hashes[i]:
                slot = (slot + 1) & np.int64(wrap)
            if table[slot] >= 0:
                seen[table[slot]] = True
        for stop in range(len(stops)):
            if seen[stop]:
                stop_counts[text] += langs[stop]
        rows[text, :5] = ends[text + 1] - ends[text], words, chars, longest, letters
        rows[text, 5] = _sentences(data, offsets[text + 1], starts, kinds, ends[text], ends[text + 1])
        rows[text, 6] = alone


@njit(cache=True, nogil=True, _nrt=False)
def _sentences(data, end, starts, kinds, first, last):
    """Of lines of MIN_WORDS words and more: one, and one more for each stop that a word follows."""
    total, i = 0, first
    while i < last:
        stop = starts[i]
        spaced, inside = 0, False
        while stop < end and data[stop] != 10:
            if spaced < MIN_WORDS:
                blank = data[stop] == 32 or data[stop] == 9
                spaced += inside and blank
                inside = not blank
            stop += 1
        spaced += inside
        after_stop, found, alone = False, 0, 0
        while i < last and starts[i] < stop:
            if kinds[i] & STOP and not kinds[i] & IN_WORD:
                after_stop = True
            elif kinds[i] & IN_WORD:
                found += after_stop or found == 0
                after_stop = False
                alone += kinds[i] & ALONE != 0
            i += 1
        if spaced >= MIN_WORDS or alone >= MIN_WORDS:
            total += max(found, 1)
    return total


@cache
def _stop_words() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A hash table of places, int32 [4096]; hashes of the words, uint64 [S]; the languages of each, int64 [S, L]."""
    by_word: dict[str, list[int]] = {}
    for lang, listed in enumerate(STOP_WORDS.values()):
        for word in listed.split():
            by_word.setdefault(word, []).append(lang)
    hashes = split(Strings.of(list(by_word))).hashes
    table, langs = np.full(4096, -1, np.int32), np.zeros((len(by_word), len(STOP_WORDS)), np.int64)
    for place, of in enumerate(by_word.values()):
        langs[place, of] = 1
        slot = int(hashes[place]) % len(table)
        while table[slot] >= 0:
            slot = (slot + 1) % len(table)
        table[slot] = place
    return table, hashes, langs
