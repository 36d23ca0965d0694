"""Classifiers that others trained with fastText (arXiv 1607.01759): its .bin and its quantised .ftz, scored here.

A model is a stranger's file: what it says of sizes is held against the bytes that there are before anything is made of
it. Its matrices stay in the mapped file, so that all workers of a machine share them.
"""

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llamita.data import subwords
from llamita.data.strings import Strings
from llamita.data.subwords import FLOAT, HIERARCHICAL, LABEL, NEGATIVE, ONE_VS_ALL, SOFTMAX, Matrix, Words

MAGIC, VERSION, SUPERVISED = 793712314, 12, 3
MAX_WEIGHT = 1e6  # nothing trained comes near it, and no sum of such overflows
ROOT_COUNT = 10**15  # what fastText gives a node that is not built yet


@dataclass(frozen=True)
class FastText:
    """A supervised model; `labels` without `__label__`."""

    labels: tuple[str, ...]
    words: Words
    inputs: Matrix
    outputs: Matrix
    loss: int
    tree: tuple[np.ndarray, np.ndarray] | None
    """Parents and who is on the right of them, of hierarchical softmax."""

    @classmethod
    def load(cls, path: Path) -> "FastText":
        """Maps the file, and makes little more than an index of its words. Raises ValueError: no whole classifier."""
        if not path.is_file():
            raise ValueError(f"no fastText model at {path}")
        try:
            return _parsed(np.asarray(np.memmap(path, np.uint8, "r")))
        except ValueError as error:
            told = f"{path} is no fastText classifier: {error}; give a whole .bin or .ftz of `fasttext supervised`"
            raise ValueError(told) from None

    def score(self, strings: Strings, label: str) -> np.ndarray:
        """What fastText's `predict` gives `label`, float32 [len]: its probability + 1e-5 (hs: each factor's), by ova
        and ns from its table of sigmoids; 0 for a text of no known feature. Line ends count as spaces.

        Raises ValueError: no such label.
        """
        name = label.removeprefix(LABEL)
        if name not in self.labels:
            raise ValueError(f"the model has no label {name!r}: give one of {', '.join(self.labels[:20])}")
        path, right = self._path(self.labels.index(name))
        out = np.empty(len(strings), np.float32)
        subwords.scores(
            strings.data, strings.offsets, self.words, self.inputs, self.outputs, self.loss, path, right, out
        )  # fmt: skip
        return out

    def _path(self, node: int) -> tuple[np.ndarray, np.ndarray]:
        if self.loss == SOFTMAX:
            every = np.arange(len(self.labels))
            return every, every == node
        if self.tree is None:
            return np.array([node]), np.ones(1, bool)
        parents, is_right = self.tree
        path, right = [], []
        while parents[node] >= 0:
            right.append(is_right[node])
            node = int(parents[node])
            path.append(node - len(self.labels))
        return np.array(path, np.int64), np.array(right, bool)


class _File:
    """Reads a mapped file from its beginning and never past its end."""

    def __init__(self, data: np.ndarray):
        self.data, self.place = data, 0

    def take(self, dtype: np.dtype | type, count: int) -> np.ndarray:
        size = np.dtype(dtype).itemsize * count
        if not 0 <= size <= len(self.data) - self.place:
            raise ValueError("it ends too early, or the sizes in it are wrong")
        self.place += size
        return self.data[self.place - size : self.place].view(dtype)

    def numbers(self, layout: str) -> tuple:
        return struct.unpack(f"<{layout}", self.take(np.uint8, struct.calcsize(f"<{layout}")).tobytes())

    def weights(self, count: int) -> np.ndarray:
        found = self.take(FLOAT, count)
        values = found["weight"]
        if count and not -MAX_WEIGHT <= values.min() <= values.max() <= MAX_WEIGHT:
            raise ValueError("some of its weights are not finite or far too large")
        return found

    def matrix(self, dim: int, quantised: bool) -> Matrix:
        if not quantised:
            num_rows, columns = self.numbers("2q")
            _must(columns == dim and num_rows > 0)
            rows, empty = self.weights(num_rows * dim).reshape(num_rows, dim), self.data[:0]
            nothing = np.zeros((0, 256, 1), np.float32)
            return Matrix(rows, empty.reshape(0, 1), nothing, empty, np.ones(256, np.float32))
        has_norms, num_rows, columns, size = self.numbers("?2qi")
        codes = self.take(np.uint8, size)
        _, parts, width, last = self.numbers("4i")
        _must(columns == dim and num_rows > 0 and 0 < last <= width <= dim and (parts - 1) * width + last == dim)
        _must(size == num_rows * parts)
        flat = self.weights(256 * dim)["weight"]
        centroids, whole = np.zeros((parts, 256, width), np.float32), 256 * width * (parts - 1)
        centroids[:-1] = flat[:whole].reshape(parts - 1, 256, width)
        centroids[-1, :, :last] = flat[whole:].reshape(256, last)
        norm_codes, norms = np.zeros(num_rows, np.uint8), np.ones(256, np.float32)
        norm_codes.flags.writeable = False  # as the file is: the kernels are compiled once
        if has_norms:
            norm_codes = self.take(np.uint8, num_rows)
            _must(self.numbers("4i") == (1, 1, 1, 1))
            norms = self.weights(256)["weight"].copy()
        return Matrix(self.take(FLOAT, 0).reshape(0, dim), codes.reshape(num_rows, parts), centroids, norm_codes, norms)


def _must(holds: bool) -> None:
    if not holds:
        raise ValueError("what it says of itself cannot be true")


def _parsed(data: np.ndarray) -> FastText:
    file = _File(data)
    if file.numbers("2i") != (MAGIC, VERSION):
        raise ValueError(f"it does not begin as version {VERSION} does")
    dim, _, _, _, _, ngram, loss, model, num_buckets, min_chars, max_chars, _, _ = file.numbers("12id")
    if model != SUPERVISED or loss not in (HIERARCHICAL, NEGATIVE, SOFTMAX, ONE_VS_ALL):
        raise ValueError("it holds word vectors" if model in (1, 2) else "its kind is unknown")
    has_buckets = max_chars > 0 or ngram > 1
    _must(dim > 0 and num_buckets >= int(has_buckets))
    _must(0 < ngram <= subwords.MAX_NGRAM and max_chars <= subwords.MAX_CHARS)
    size, num_words, num_labels, _, num_kept = file.numbers("3i2q")
    _must(num_words >= 0 and num_labels > 0 and size == num_words + num_labels and num_kept >= -1)
    starts, ends = _entries(file, size, num_words)
    slots = np.full(_capacity(size), -1, np.int32)
    _must(subwords.fill(data, starts, ends, slots))
    pairs = file.take(np.int32, 2 * max(num_kept, 0)).reshape(-1, 2).astype(np.int64)
    _must(bool((pairs >= 0).all() and (pairs[:, 1] < num_kept).all()))
    kept, places = np.full(_capacity(len(pairs)), -1), np.zeros(_capacity(len(pairs)), np.int64)
    _must(subwords.fill_kept(pairs, kept, places))
    eos = int(subwords.find(subwords.EOS, 0, len(subwords.EOS), subwords.EOS_CODE, data, starts, ends, slots))
    words = Words(
        data, starts, ends, slots, dim, num_words, eos, num_buckets, min_chars, max_chars, ngram, num_kept >= 0,
        kept, places,
    )  # fmt: skip
    (quantised,) = file.numbers("?")
    inputs = file.matrix(dim, quantised)
    (output_too,) = file.numbers("?")
    outputs = file.matrix(dim, quantised and output_too)
    num_rows = num_words + (num_kept if num_kept >= 0 else num_buckets * has_buckets)
    _must(_height(inputs) >= num_rows and _height(outputs) >= num_labels)
    labels = [data[start:end].tobytes() for start, end in zip(starts[num_words:], ends[num_words:], strict=True)]
    counts = [int.from_bytes(data[end + 1 : end + 9].tobytes(), "little") for end in ends[num_words:]]
    tree = _tree(counts) if loss == HIERARCHICAL else None
    names = tuple(label.decode(errors="replace").removeprefix(LABEL) for label in labels)
    return FastText(names, words, inputs, outputs, loss, tree)


def _capacity(count: int) -> int:
    """Of a hash table: a power of two, more than half of it empty."""
    return 1 << (2 * count).bit_length()


def _entries(file: _File, size: int, num_words: int) -> tuple[np.ndarray, np.ndarray]:
    _must(10 * size <= len(file.data) - file.place)
    starts, ends = np.empty(size, np.int64), np.empty(size, np.int64)
    place = subwords.find_ends(file.data, file.place, starts, ends)
    _must(place >= 0)
    file.place = int(place)
    is_label = file.data[ends + 9]
    _must(not is_label[:num_words].any() and bool((is_label[num_words:] == 1).all()))
    return starts, ends


def _height(matrix: Matrix) -> int:
    return max(len(matrix.rows), len(matrix.codes))


def _tree(counts: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Parents, int64 [2 labels - 1] with -1 for the root, and who is on the right, of Huffman's tree as fastText builds
    it: of the rarest label that is left and the oldest node, the rarer one first, twice."""
    _must(max(counts) < ROOT_COUNT)
    num_labels = len(counts)
    weights = [*counts, *[ROOT_COUNT] * num_labels]
    parents, right = np.full(2 * num_labels - 1, -1, np.int64), np.zeros(2 * num_labels - 1, bool)
    leaf, node = num_labels - 1, num_labels
    for new in range(num_labels, 2 * num_labels - 1):
        children = []
        for _ in range(2):
            if leaf >= 0 and weights[leaf] < weights[node]:
                children.append(leaf)
                leaf -= 1
            else:
                children.append(node)
                node += 1
        weights[new] = weights[children[0]] + weights[children[1]]
        parents[children], right[children[1]] = new, True
    return parents, right
