"""fastText's way from a text to the score of a label: words, n-grams of their characters and of words, hashed to rows
of a matrix, their mean, and what the loss makes of it (arXiv 1607.04606, 1607.01759, 1612.03651).
"""

from typing import NamedTuple

import numpy as np
from numba import njit

HIERARCHICAL, NEGATIVE, SOFTMAX, ONE_VS_ALL = 1, 2, 3, 4
LABEL = "__label__"
PREFIX = np.frombuffer(LABEL.encode(), np.uint8)
FLOAT = np.dtype([("weight", "<f4")])  # a packed record: numba then reads it at any address
EPSILON = 1e-5  # fastText adds it to what it takes logarithms of
BASIS, EOS, EOS_CODE = 2166136261, np.frombuffer(b"</s>", np.uint8), 3617362777
CHAIN = np.uint64(116049371)
MAX_PROBES = 4096
MAX_CHARS, MAX_NGRAM = 100, 16  # of subwords and of word n-grams: bounds the time a word takes
WAITING = 4096  # features found before their rows are added


class Matrix(NamedTuple):
    """R rows of `dim` weights, plain or product-quantised."""

    rows: np.ndarray
    """FLOAT [R, dim], or [0, dim]."""
    codes: np.ndarray
    """Centroid of each part of a row, uint8 [R, parts]; parts = 0 for plain rows."""
    centroids: np.ndarray
    """float32 [parts, 256, width]; the last part may use less of its width."""
    norm_codes: np.ndarray
    """uint8 [R]: by which of `norms` a row is multiplied."""
    norms: np.ndarray
    """float32 [256]"""


class Words(NamedTuple):
    """The dictionary, and how features are made of what is and is not in it."""

    data: np.ndarray
    """uint8 [N], in which entry i, a word or behind them a label, is `data[starts[i] : ends[i]]`."""
    starts: np.ndarray
    ends: np.ndarray
    slots: np.ndarray
    """int32 [a power of two]: entries by hash, -1 for none."""
    dim: int
    """Columns of the matrices."""
    num_words: int
    """Words among the entries."""
    eos: int
    """Entry of the end of a line, or -1."""
    num_buckets: int
    min_chars: int
    max_chars: int
    ngram: int
    pruned: bool
    kept: np.ndarray
    """int64 [a power of two]: buckets that pruning left, by hash, -1 for none."""
    places: np.ndarray
    """int64 [same]: their rows behind those of words."""


@njit(cache=True, nogil=True)
def _step(code, byte):
    """FNV-1a over signed bytes, as fastText has it."""
    signed = byte | 0xFFFFFF00 if byte >= 128 else byte
    return ((code ^ signed) * 16777619) & 0xFFFFFFFF


@njit(cache=True, nogil=True)
def _is_space(byte):
    return byte == 32 or 9 <= byte <= 13 or byte == 0


@njit(cache=True, nogil=True)
def find_ends(data, place, starts, ends):
    """Entries are bytes up to a NUL, a count of 8 bytes and a kind of one. Where they end, or -1: not in `data`."""
    for i in range(len(starts)):
        starts[i] = place
        while place < len(data) and data[place] != 0:
            place += 1
        ends[i] = place
        place += 10
        if place > len(data):
            return -1
    return place


@njit(cache=True, nogil=True)
def fill(data, starts, ends, slots):
    """False where so many entries collide that the file must be meant to."""
    mask = len(slots) - 1
    for i in range(len(starts)):
        code = BASIS
        for place in range(starts[i], ends[i]):
            code = _step(code, np.int64(data[place]))
        slot, probes = code & mask, 0
        while slots[slot] >= 0:
            slot, probes = (slot + 1) & mask, probes + 1
            if probes > MAX_PROBES:
                return False
        slots[slot] = i
    return True


@njit(cache=True, nogil=True)
def fill_kept(pairs, kept, places):
    """`pairs` int64 [K, 2]: buckets and places. False as in `fill`."""
    mask = len(kept) - 1
    for bucket, place in pairs:
        slot, probes = bucket & mask, 0
        while kept[slot] >= 0:
            slot, probes = (slot + 1) & mask, probes + 1
            if probes > MAX_PROBES:
                return False
        kept[slot], places[slot] = bucket, place
    return True


@njit(cache=True, nogil=True)
def find(data, start, end, code, known, starts, ends, slots):
    """The entry that is `data[start:end]`, or -1."""
    mask = len(slots) - 1
    slot = code & mask
    while slots[slot] >= 0:
        entry = np.int64(slots[slot])
        first = starts[entry]
        if ends[entry] - first == end - start:
            same = 0
            while same < end - start and known[first + same] == data[start + same]:
                same += 1
            if same == end - start:
                return entry
        slot = (slot + 1) & mask
    return np.int64(-1)


@njit(cache=True, nogil=True)
def _find_subwords(data, start, end, first, min_chars, max_chars, num_buckets, found, count):
    """Writes the buckets of the n-grams of characters of `<word>` from place `first` on into `found[count:]`, while
    there is room; returns where it stopped and the new count."""
    size = end - start + 2
    while first < size and count + max_chars <= len(found):
        code, last, chars = BASIS, first, 0
        while last < size and chars < max_chars:
            byte = 60 if last == 0 else 62 if last == size - 1 else np.int64(data[start + last - 1])
            code, last, chars = _step(code, byte), last + 1, chars + 1
            while last < size - 1 and data[start + last - 1] & 0xC0 == 0x80:
                code, last = _step(code, np.int64(data[start + last - 1])), last + 1
            if chars >= min_chars and not (chars == 1 and (first == 0 or last == size)):
                found[count] = code % num_buckets
                count += 1
        first += 1
        while first < size - 1 and data[start + first - 1] & 0xC0 == 0x80:
            first += 1
    return first, count


@njit(cache=True, nogil=True)
def _find_ngrams(code, chain, filled, num_buckets, found, count):
    """Writes the buckets of the n-grams that end with the word of hash `code`; returns the new count.

    `chain[k]` is the hash of the k + 1 words before it.
    """
    signed = np.uint64(code)
    if code >= 2**31:
        signed |= np.uint64(0xFFFFFFFF00000000)
    for k in range(filled - 1, -1, -1):
        ngram = chain[k] * CHAIN + signed
        found[count] = np.int64(ngram % np.uint64(num_buckets))
        count += 1
        if k + 1 < len(chain):
            chain[k + 1] = ngram
    if len(chain):
        chain[0] = signed
    return count


@njit(cache=True, nogil=True)
def _to_rows(found, num_words, pruned, kept, places):
    """Turns features in place, words as -1 - entry and others as buckets, into rows; how many pruning has left."""
    count, mask = 0, len(kept) - 1
    for feature in found:
        row = -1 - feature
        if feature >= 0 and pruned:
            slot = feature & mask
            while kept[slot] >= 0 and kept[slot] != feature:
                slot = (slot + 1) & mask
            if kept[slot] < 0:
                continue
            row = num_words + places[slot]
        elif feature >= 0:
            row = num_words + feature
        found[count] = row
        count += 1
    return count


@njit(cache=True, nogil=True)
def _add(total, chosen, matrix):
    """Adds the rows `chosen`, int64 [n]."""
    rows, codes, centroids, norm_codes, norms = matrix
    width = centroids.shape[2]
    for row in chosen:
        if len(rows):
            for k in range(len(total)):
                total[k] += rows[row, k].weight
            continue
        norm = norms[norm_codes[row]]
        for part in range(codes.shape[1]):
            code = codes[row, part]
            for k in range(part * width, min((part + 1) * width, len(total))):
                total[k] += norm * centroids[part, code, k - part * width]


@njit(cache=True, nogil=True)
def _add_features(total, found, words, matrix):
    count = _to_rows(found, words.num_words, words.pruned, words.kept, words.places)
    _add(total, found[:count], matrix)
    return count


@njit(cache=True, nogil=True)
def _sum(total, data, place, end, words, matrix, chain, found):
    """Adds all features of a text, which a word `</s>` ends as its end does; returns how many. `found` is room."""
    known, starts, ends, slots, num_words = words.data, words.starts, words.ends, words.slots, words.num_words
    eos, num_buckets, min_chars, max_chars = words.eos, words.num_buckets, words.min_chars, words.max_chars
    added = filled = count = 0
    while True:
        while place < end and _is_space(data[place]):
            place += 1
        start, code = place, BASIS
        while place < end and not _is_space(data[place]):
            code = _step(code, np.int64(data[place]))
            place += 1
        is_end = start == place or (place - start == len(EOS) and code == EOS_CODE)
        if is_end:
            entry, code = eos, EOS_CODE
        else:
            entry = find(data, start, place, code, known, starts, ends, slots)
        prefix = 0
        while entry < 0 and prefix < min(len(PREFIX), place - start) and data[start + prefix] == PREFIX[prefix]:
            prefix += 1
        if entry < num_words and prefix < len(PREFIX):  # no label
            if entry >= 0:
                found[count] = -1 - entry
                count += 1
            count = _find_ngrams(code, chain, filled, num_buckets, found, count)
            filled = min(filled + 1, len(chain))
            first = place - start + 2 if is_end or max_chars <= 0 else 0
            while first < place - start + 2:
                first, count = _find_subwords(
                    data, start, place, first, min_chars, max_chars, num_buckets, found, count
                )
                if first < place - start + 2:
                    added += _add_features(total, found[:count], words, matrix)
                    count = 0
        if is_end or count + MAX_NGRAM > len(found):
            added += _add_features(total, found[:count], words, matrix)
            count = 0
        if is_end:
            return added


@njit(cache=True, nogil=True)
def _find_logits(vector, chosen, logits, buffer, matrix):
    for i in range(len(chosen)):
        buffer[:] = 0
        _add(buffer, chosen[i : i + 1], matrix)
        total = np.float32(0)
        for k in range(len(vector)):
            total += vector[k] * buffer[k]
        logits[i] = total


@njit(cache=True, nogil=True)
def scores(data, offsets, words, inputs, outputs, loss, path, right, out):
    """`path`: rows of `outputs`, all labels of a softmax with `right` for the one that is asked for, or the nodes on
    the way to it and whether it lies on their right."""
    chain, found = np.empty(words.ngram - 1, np.uint64), np.empty(WAITING, np.int64)
    total, buffer = np.empty(words.dim, np.float32), np.empty(words.dim, np.float32)
    logits = np.empty(len(path), np.float64)
    for document in range(len(out)):
        total[:] = 0
        count = _sum(total, data, offsets[document], offsets[document + 1], words, inputs, chain, found)
        total /= np.float32(max(count, 1))
        _find_logits(total, path, logits, buffer, outputs)
        chance = 1.0
        if loss == SOFTMAX:
            shares = np.exp(logits - logits.max())
            chance = shares[right].sum() / shares.sum() + EPSILON
        else:
            for step in range(len(path)):
                logit = logits[step]
                if loss != HIERARCHICAL:  # fastText looks these up in a table with 32 steps to the unit
                    logit = np.floor(logit * 32) / 32 if abs(logit) <= 8 else np.inf * logit
                share = 1 / (1 + np.exp(-logit))
                chance *= (share if right[step] else 1 - share) + EPSILON
        out[document] = chance if count else 0
