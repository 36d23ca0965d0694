"""Pure arithmetic: bits per byte, its windows, and the compressors beside it."""

import gzip
import math

import numpy as np
import pytest

from llamita.eval import bits


@pytest.mark.parametrize(
    ("length", "window", "stride"), [(1, 8, 4), (2, 8, 4), (9, 8, 4), (10, 8, 4), (100, 8, 4), (57, 8, 8)]
)
def test_windows_score_every_token_once_with_context(length, window, stride):
    scored = []
    for start, end, first in bits.windows(length, window, stride):
        assert end - start <= window + 1 and start < first < end
        if start > 0:
            assert first - start >= window - stride + 1
        scored += range(first, end)
    assert scored == list(range(1, length))


def test_total_is_the_sum_over_documents_whatever_the_batching():
    generator = np.random.default_rng(0)
    documents = [generator.integers(0, 9, size) for size in (2, 30, 7, 90, 16)]

    def position_free(tokens_BT):  # a stand-in model whose loss for a token depends on that token alone
        return np.log(2.0) * tokens_BT[:, 1:]

    expected = np.log(2.0) * sum(int(document[1:].sum()) for document in documents)
    for batch_size in (1, 3, 16):
        total = bits.total_nll(position_free, documents, window=8, stride=4, batch_size=batch_size)
        assert total == pytest.approx(expected)
    assert bits.bits_per_byte(expected, 100) == pytest.approx(sum(int(d[1:].sum()) for d in documents) / 100)


def test_a_uniform_model_needs_log2_of_its_vocabulary_a_token():
    nats = bits.total_nll(
        lambda t: np.full((len(t), t.shape[1] - 1), math.log(256)), [np.zeros(11, int)], window=4, stride=4
    )
    assert bits.bits_per_byte(nats, 10) == pytest.approx(8.0)


def test_compressors_are_the_real_ones():
    text = b"the quick brown fox " * 500
    found = bits.compressors(text)
    assert found["gzip"] == 8 * len(gzip.compress(text, 9)) / len(text)
    assert set(found) == {"gzip", "bzip2", "xz"} and all(0 < value < 1 for value in found.values())
