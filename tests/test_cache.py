"""Layer: numerics against a plain twin. The KV cache gives what one uncached causal pass gives."""

import pytest
import torch

from llamita.kernels.attention import reference
from llamita.model.cache import KVCache
from llamita.model.llama import build
from llamita.model.shape import RopeScaling, Shape

TOLERANCE = dict(rtol=0, atol=1e-10)


def make(num_kv_heads: int):
    shape = Shape(
        dim=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=num_kv_heads,
        ffn_dim=48,
        vocab_size=50,
        max_seq_len=64,
        rope_scaling=RopeScaling(original_max_seq_len=8),
    )
    model = build(shape, dtype=torch.float64).init_weights(1)
    with torch.no_grad():  # 0.02 would leave attention nearly uniform, and a wrong mask hard to see
        for layer in model.layers:
            layer.attention.wq.weight.mul_(20)
            layer.attention.wk.weight.mul_(20)
    return model


def tokens(*size: int) -> torch.Tensor:
    return torch.randint(50, size, generator=torch.Generator().manual_seed(2))


def empty(model, batch_size: int, max_len: int = 64, kind=KVCache) -> KVCache:
    return kind(model.shape, batch_size, max_len, torch.float64, "cpu")


def in_chunks(model, cache, tokens_BT, sizes) -> torch.Tensor:
    parts = []
    for chunk_BT in tokens_BT.split(list(sizes), dim=1):
        parts.append(model(chunk_BT, cache))
        cache.advance([chunk_BT.shape[1]] * chunk_BT.shape[0])
    return torch.cat(parts, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4], ids=["multi-query", "grouped", "multi-head"])
@pytest.mark.parametrize(
    "sizes",
    [[12], [1] * 12, [5, 7], [7, 1, 1, 3], [1, 11], [11, 1]],
    ids=str,
)
def test_any_split_equals_the_whole(num_kv_heads, sizes):
    model, tokens_BT = make(num_kv_heads), tokens(3, 12)
    whole_BTV = model(tokens_BT)
    torch.testing.assert_close(in_chunks(model, empty(model, 3), tokens_BT, sizes), whole_BTV, **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("num_kv_heads", [2, 4])
def test_mixed_lengths_equal_each_alone(num_kv_heads):
    """Padded prompts in one pass, single tokens, another padded chunk: every real token as if it were alone."""
    model, counts = make(num_kv_heads), [[9, 2, 5], [1, 1, 1], [1, 1, 1], [2, 6, 1], [1, 1, 1]]
    cache = empty(model, 3)
    seen: list[list[int]] = [[], [], []]
    for step, new in enumerate(counts):
        chunk_BT = (tokens(3, max(new)) + step) % 50
        logits_BTV = model(chunk_BT, cache)
        cache.advance(new)
        for row, count in enumerate(new):
            seen[row] += chunk_BT[row, :count].tolist()
            alone_TV = model(torch.tensor([seen[row]]))[0, -count:]
            torch.testing.assert_close(logits_BTV[row, :count], alone_TV, **TOLERANCE)
    assert cache.lengths == [14, 11, 9]


class SeesTheNext(KVCache):
    """Mutant: the mask is shifted by one slot."""

    def positions(self, tokens_BT):
        positions_BT = super().positions(tokens_BT)
        if self.mask is not None:
            self.mask = self.mask.roll(1, dims=-1) | self.mask
        return positions_BT


class CountsPads(KVCache):
    """Mutant: every row is as long as the longest."""

    def advance(self, counts):
        super().advance([max(counts)] * len(counts))


class ForgetsTheOffset(KVCache):
    """Mutant: positions start at 0 in every pass."""

    def positions(self, tokens_BT):
        return super().positions(tokens_BT) - max(self.lengths)


@torch.no_grad()
@pytest.mark.parametrize("mutant", [SeesTheNext, CountsPads, ForgetsTheOffset])
def test_negative_control_a_broken_cache_is_seen(mutant):
    model, prompt_BT, next_BT = make(2), tokens(2, 6), tokens(2, 3)

    def second_pass(kind):
        cache = empty(model, 2, kind=kind)
        model(prompt_BT, cache)
        cache.advance([6, 4])
        return model(next_BT, cache)[1]

    alone_TV = model(torch.cat((prompt_BT[1:, :4], next_BT[1:]), dim=1))[0, 4:]
    torch.testing.assert_close(second_pass(KVCache), alone_TV, **TOLERANCE)
    assert (second_pass(mutant) - alone_TV).abs().max() > 1e-4


def test_one_token_equals_the_written_out_reference():
    """The grouped single-token path against attention with a full mask, rows of different lengths."""
    model = make(2)
    cache = empty(model, 2)
    generator = torch.Generator().manual_seed(3)

    def draw(*size):
        return torch.randn(size, dtype=torch.float64, generator=generator)

    k_BSKH, v_BSKH, q_B1NH = draw(2, 6, 2, 8), draw(2, 6, 2, 8), draw(2, 1, 4, 8)
    cache.positions(torch.zeros(2, 5, dtype=torch.long))
    cache(0, draw(2, 5, 4, 8), k_BSKH[:, :5], v_BSKH[:, :5])
    cache.advance([5, 3])
    cache.positions(torch.zeros(2, 1, dtype=torch.long))
    got_B1NH = cache(0, q_B1NH, k_BSKH[:, 5:], v_BSKH[:, 5:])
    for row, length in ((0, 5), (1, 3)):
        slots = [*range(length), 5]
        k_1SKH, v_1SKH = k_BSKH[row : row + 1, slots], v_BSKH[row : row + 1, slots]
        mask_1TS = torch.ones(1, 1, len(slots), dtype=torch.bool)
        wanted_1TNH = reference(q_B1NH[row : row + 1], k_1SKH, v_1SKH, mask_1TS)
        torch.testing.assert_close(got_B1NH[row], wanted_1TNH[0], **TOLERANCE)


def test_one_row_of_single_tokens_needs_no_mask():
    model = make(2)
    cache = empty(model, 1)
    for _ in range(3):
        cache.positions(torch.zeros(1, 1, dtype=torch.long))
        assert cache.mask is None
        cache.advance([1])
    cache.positions(torch.zeros(1, 2, dtype=torch.long))
    assert cache.mask is not None


@torch.no_grad()
def test_keep_selects_repeats_and_reorders():
    model, prompt_BT = make(2), tokens(3, 7)
    cache = empty(model, 3)
    model(prompt_BT, cache)
    cache.advance([7, 3, 5])
    cache.keep([2, 0, 2])
    next_BT = tokens(3, 1)
    logits_BTV = model(next_BT, cache)
    for row, (source, length) in enumerate([(2, 5), (0, 7), (2, 5)]):
        text_1T = torch.cat((prompt_BT[source : source + 1, :length], next_BT[row : row + 1]), dim=1)
        torch.testing.assert_close(logits_BTV[row, 0], model(text_1T)[0, -1], **TOLERANCE)


@torch.no_grad()
def test_full_to_the_last_slot_and_not_beyond():
    model = make(2)
    cache = empty(model, 1, max_len=8)
    in_chunks(model, cache, tokens(1, 8), [6, 1, 1])
    with pytest.raises(ValueError, match="max_seq_len"):
        model(tokens(1, 1), cache)


def test_num_bytes_is_what_the_shape_says():
    model = make(2)
    assert empty(model, 3, max_len=10).num_bytes == 3 * 10 * model.shape.kv_bytes_per_token(8)
