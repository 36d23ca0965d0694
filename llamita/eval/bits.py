"""Bits per byte of held-out text: a loss that does not depend on the tokenizer, comparable with any compressor."""

import bz2
import gzip
import lzma
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

# Given tokens [B, T] int64 it returns -log p(token t | tokens before it) in nats for t = 1 .. T-1, [B, T - 1].
Nll = Callable[[np.ndarray], np.ndarray]


def windows(length: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, end, first) such that targets first..end-1 of tokens[start:end] score each token but the first, once.

    All windows but a document's first see at least window - stride tokens before what they score.
    """
    first = 1
    while first < length:
        start = max(0, first - 1 - (window - stride)) if first > 1 else 0
        end = min(length, start + window + 1)
        yield start, end, first
        first = end


def total_nll(nll: Nll, documents: Sequence[np.ndarray], *, window: int, stride: int, batch_size: int = 16) -> float:
    """Nats of all documents' tokens given what comes before them in their own document, batched by like length."""
    pieces = [
        (tokens[start:end], first - start)
        for tokens in documents
        for start, end, first in windows(len(tokens), window, stride)
    ]
    pieces.sort(key=lambda piece: len(piece[0]))
    total = 0.0
    for at in range(0, len(pieces), batch_size):
        group = pieces[at : at + batch_size]
        longest = max(len(tokens) for tokens, _ in group)
        padded_BT = np.zeros((len(group), longest), dtype=np.int64)
        for row, (tokens, _) in enumerate(group):
            padded_BT[row, : len(tokens)] = tokens
        nats_BT = nll(padded_BT)
        total += sum(
            float(nats_BT[row, first - 1 : len(tokens) - 1].sum()) for row, (tokens, first) in enumerate(group)
        )
    return total


def bits_per_byte(nats: float, num_bytes: int) -> float:
    return nats / math.log(2) / num_bytes


def compressors(text: bytes) -> dict[str, float]:
    """Bits per byte that general-purpose compressors need for the same bytes, at their hardest settings."""
    packed = {
        "gzip": gzip.compress(text, 9),
        "bzip2": bz2.compress(text, 9),
        "xz": lzma.compress(text, preset=9 | lzma.PRESET_EXTREME),
    }
    return {name: 8 * len(data) / len(text) for name, data in packed.items()}
