"""A trainable judge of quality: logistic regression on hashed words and pairs of words.

With labels from people or from a large model it does what fastText does for DCLM and Llama 3 (arXiv 2407.21783, 3.1.1),
several times as fast. Words are runs of letters and digits, ASCII letters in lower case; a character that is written
without spaces (U+3000 to U+9FFF: kana, Chinese) is a word. The features are words and pairs of neighbours.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numba import njit

from llamita.data.strings import Strings

VERSION = 1
NUM_BUCKETS = 2**22
MAX_WORDS = 20_000  # of a document that are looked at: its beginning tells what it is
FIRST_RATE = 4.0
HELDOUT = 10


BASIS, PRIME = np.uint64(14695981039346656037), np.uint64(1099511628211)  # FNV-1a
PAIR = np.uint64(0x9E3779B97F4A7C15)


@njit(cache=True, nogil=True)
def _features(data, start, end, mask, found):
    """Writes the buckets of a text's words and pairs of words into `found`; returns how many."""
    count, length, before, word = 0, 0, np.uint64(0), BASIS
    is_letter = alone = False
    for place in range(start, end + 1):
        byte = data[place] if place < end else 32
        if byte & 0xC0 != 0x80:  # a character begins
            ends = alone
            if byte < 0x80:
                is_letter, alone = 48 <= byte <= 57 or 65 <= byte <= 90 or 97 <= byte <= 122, False
                byte += 32 * (65 <= byte <= 90)
            else:  # U+0080 to U+00BF and U+2000 to U+2BFF are punctuation and symbols
                is_letter = byte != 0xC2 and (byte != 0xE2 or (place + 1 < end and data[place + 1] >= 0xB0))
                alone = 0xE3 <= byte <= 0xE9
            if length and (ends or alone or not is_letter):
                word ^= word >> np.uint64(29)
                found[count] = word & mask
                count += 1
                if before:
                    pair = (before * PAIR) ^ word
                    found[count] = (pair ^ (pair >> np.uint64(31))) & mask
                    count += 1
                if count + 2 > len(found):
                    break
                before, word, length = word, BASIS, 0
        if is_letter:
            word = (word ^ np.uint64(byte)) * PRIME
            length += 1
    return count


@njit(cache=True, nogil=True)
def _scores(data, offsets, weights, bias, found, out):
    mask = np.uint64(len(weights) - 1)
    for document in range(len(offsets) - 1):
        count = _features(data, offsets[document], offsets[document + 1], mask, found)
        total = np.float32(0)
        for i in range(count):
            total += weights[found[i]]
        out[document] = bias + total / np.sqrt(max(count, 1))


@njit(cache=True, nogil=True)
def _learn(data, offsets, labels, order, weights, bias, rate, last_rate, found):
    """One pass of stochastic gradient descent on the cross entropy; the rate falls linearly. Returns the bias."""
    mask = np.uint64(len(weights) - 1)
    step = (rate - last_rate) / max(len(order), 1)
    for document in order:
        count = _features(data, offsets[document], offsets[document + 1], mask, found)
        total = np.float32(0)
        for i in range(count):
            total += weights[found[i]]
        scale = np.float32(1 / np.sqrt(max(count, 1)))
        error = 1 / (1 + np.exp(-(bias + total * scale))) - labels[document]
        for i in range(count):
            weights[found[i]] -= np.float32(rate * error) * scale
        bias -= 0.1 * rate * error
        rate -= step
    return bias


def _has_both(labels: np.ndarray) -> bool:
    return bool((labels > 0.5).any() and (labels <= 0.5).any())


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(logits, -30, 30)))


def _calibration(logits: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Scale and shift of logits by Newton's method on the cross entropy, with a normal prior around (1, 0)."""
    design = np.stack([logits.astype(np.float64), np.ones(len(logits))], axis=1)
    x, prior = np.zeros(2), np.array([1.0, 0.0])
    for _ in range(30):
        p = _sigmoid(design @ x)
        hessian = design.T @ (design * (p * (1 - p))[:, None]) + np.eye(2)
        x -= np.linalg.solve(hessian, design.T @ (p - labels) + x - prior)
    return float(max(x[0], 1e-3)), float(x[1])


@dataclass(frozen=True)
class Classifier:
    """`weights` float32 [num_buckets, a power of two]; `scale` and `shift` turn logits into calibrated ones."""

    weights: np.ndarray
    bias: float
    scale: float = 1.0
    shift: float = 0.0

    @classmethod
    def train(
        cls, strings: Strings, labels: np.ndarray, *, epochs: int = 10, seed: int = 0, num_buckets: int = NUM_BUCKETS
    ) -> "Classifier":
        """`labels` [len] in [0, 1], 1 = good; `num_buckets` is a power of two.

        One document in HELDOUT, where there are ten times as many, calibrates a model of the others (Platt 1999); what
        that finds goes with the model of all. Raises ValueError when one of the two sides is missing.
        """
        labels = np.asarray(labels, np.float32)
        if not _has_both(labels):
            raise ValueError("a classifier wants documents that are good and documents that are not: label both")

        def learnt(chosen: np.ndarray) -> Classifier:
            weights, bias, found = np.zeros(num_buckets, np.float32), 0.0, np.empty(2 * MAX_WORDS, np.uint64)
            for epoch in range(epochs):
                rates = (FIRST_RATE * (1 - part / epochs) for part in (epoch, epoch + 1))
                shuffled = np.random.default_rng((seed, epoch)).permutation(chosen)
                bias = _learn(strings.data, strings.offsets, labels, shuffled, weights, bias, *rates, found)
            return cls(weights, bias)

        order = np.random.default_rng(seed).permutation(len(strings))
        cut = len(order) // HELDOUT if len(order) >= 10 * HELDOUT else 0
        heldout, model = order[:cut], learnt(order)
        if not _has_both(labels[heldout]):
            return model
        scale, shift = _calibration(learnt(order[cut:]).logits(strings.chosen(heldout)), labels[heldout])
        return replace(model, scale=scale, shift=shift)

    def logits(self, strings: Strings) -> np.ndarray:
        """Uncalibrated log odds, float32 [len]."""
        found, out = np.empty(2 * MAX_WORDS, np.uint64), np.empty(len(strings), np.float32)
        _scores(strings.data, strings.offsets, self.weights, self.bias, found, out)
        return out

    def score(self, strings: Strings) -> np.ndarray:
        """The probability that a document is good, float32 [len]."""
        return _sigmoid(np.float32(self.scale) * self.logits(strings) + np.float32(self.shift))

    def save(self, path: Path) -> None:
        from safetensors.numpy import save_file

        facts = {"version": VERSION, "bias": self.bias, "scale": self.scale, "shift": self.shift}
        save_file({"weights": self.weights}, path, {"llamita_classifier": json.dumps(facts)})

    @classmethod
    def load(cls, path: Path) -> "Classifier":
        """Raises ValueError: no file that `save` wrote."""
        from safetensors import SafetensorError, safe_open

        if not path.is_file():
            raise ValueError(f"no classifier at {path}; `llamita data judge` trains one")
        try:
            with safe_open(path, "numpy") as file:
                facts = json.loads((file.metadata() or {})["llamita_classifier"])
                if facts["version"] != VERSION:
                    raise ValueError(f"it is of version {facts['version']}, not {VERSION}")
                weights = file.get_tensor("weights")
            numbers = [float(facts[name]) for name in ("bias", "scale", "shift")]
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no classifier of ours ({error}); `llamita data judge` trains one") from error
        if weights.ndim != 1 or weights.dtype != np.float32 or len(weights).bit_count() != 1:
            raise ValueError(f"{path}: its weights are {weights.dtype} {weights.shape}; train it again")
        if not np.isfinite(numbers).all() or not np.isfinite(weights).all():
            raise ValueError(f"{path}: its weights are damaged; train it again by `llamita data judge`")
        return cls(weights, *numbers)


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """The probability that a good document scores above one that is not (ties count half)."""
    _, value, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[value]
    good = np.asarray(labels) > 0.5
    num_good, num_bad = int(good.sum()), int((~good).sum())
    return float((ranks[good].sum() - num_good * (num_good + 1) / 2) / (num_good * num_bad))


def evaluate(scores: np.ndarray, labels: np.ndarray, threshold: float = 0.5) -> dict[str, float]:
    """AUC, accuracy, precision and recall at a threshold, and the expected calibration error over ten bins."""
    good, kept = np.asarray(labels) > 0.5, scores >= threshold
    right = float((good & kept).sum())
    bins = np.minimum((scores * 10).astype(int), 9)
    gaps = [abs(scores[bins == b].mean() - good[bins == b].mean()) * (bins == b).mean() for b in np.unique(bins)]
    return {
        "auc": auc(scores, labels), "accuracy": float((good == kept).mean()), "kept": float(kept.mean()),
        "precision": right / max(1, int(kept.sum())), "recall": right / max(1, int(good.sum())),
        "calibration_error": float(sum(gaps)),
    }  # fmt: skip
