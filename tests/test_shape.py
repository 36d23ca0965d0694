"""Layer: pure arithmetic. Parameters, FLOPs and bytes against published numbers and built models."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llamita.kernels.attention import Causal, reference
from llamita.model.llama import build
from llamita.model.shape import PRESETS, RopeScaling, Shape, preset

PARAMS = {
    "llama3-8b": 8_030_261_248,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.1-405b": 405_853_388_800,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "100m": 100_682_496,
}


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_by_formula_and_by_counting(name):
    shape = preset(name)
    counted = sum(weight.numel() for weight in build(shape, device="meta").parameters())
    assert shape.num_params == counted == PARAMS.get(name, counted)


def test_a_head_of_its_own_is_counted():
    tied, untied = preset("tiny"), preset("tiny", tied=False)
    assert untied.num_params - tied.num_params == tied.vocab_size * tied.dim
    assert untied.num_params == sum(weight.numel() for weight in build(untied, device="meta").parameters())
    assert untied.num_matmul_params == tied.num_matmul_params


class FullMatrix(Causal):
    """Causal attention that multiplies out every query with every key, as FLOP counters assume."""

    def __call__(self, layer, q_BTNH, k_BTKH, v_BTKH):
        seq_len = q_BTNH.shape[1]
        mask_TT = torch.ones(seq_len, seq_len, dtype=torch.bool).tril()
        return reference(q_BTNH, k_BTKH, v_BTKH, mask_TT.expand(q_BTNH.shape[0], -1, -1))


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_flops_against_torchs_counter(num_kv_heads):
    shape = preset("tiny", num_kv_heads=num_kv_heads)
    model = build(shape).init_weights(0)
    seq_len = 12
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, seq_len, dtype=torch.int64), FullMatrix())
    # The counter sees all T * T pairs of query and key, we count the T * (T + 1) / 2 that a causal row needs.
    hidden_pairs = seq_len * seq_len - seq_len * (seq_len + 1) / 2
    hidden = 4 * shape.num_layers * shape.dim * hidden_pairs
    assert counter.get_total_flops() == shape.forward_flops_per_token(seq_len) * seq_len + hidden
    assert shape.train_flops_per_token(seq_len) == 3 * shape.forward_flops_per_token(seq_len)


def test_train_flops_against_torchs_counter():
    shape = preset("tiny")
    model = build(shape).init_weights(0)
    seq_len = 12
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, seq_len, dtype=torch.int64), FullMatrix()).sum().backward()
    hidden = 3 * 4 * shape.num_layers * shape.dim * (seq_len * seq_len - seq_len * (seq_len + 1) / 2)
    assert counter.get_total_flops() == shape.train_flops_per_token(seq_len) * seq_len + hidden


def test_kv_bytes():
    grouped = preset("llama3-8b")
    assert grouped.kv_bytes_per_token() == 131_072
    assert preset("llama3-8b", num_kv_heads=32).kv_bytes_per_token() == 4 * 131_072
    assert grouped.kv_bytes_per_token(4) == 2 * 131_072


def test_own_presets_fit_k_quants():
    own = [shape for name, shape in PRESETS.items() if not name.startswith("llama")]
    assert len(own) >= 4
    assert all(shape.dim % 256 == shape.ffn_dim % 256 == 0 for shape in own)


def test_meta_presets_keep_meta_settings():
    assert preset("llama3-8b").rope_scaling is None
    assert preset("llama3.1-8b").rope_scaling == RopeScaling(8.0, 1.0, 4.0, 8192)
    assert preset("llama3.2-1b").rope_scaling == RopeScaling(32.0, 1.0, 4.0, 8192)
    meta = {name: shape for name, shape in PRESETS.items() if name.startswith("llama")}
    assert all((s.rope_theta, s.norm_eps, s.vocab_size) == (500_000.0, 1e-5, 128_256) for s in meta.values())
    assert {name for name, shape in meta.items() if shape.tied} == {"llama3.2-1b", "llama3.2-3b"}


GOOD = dict(dim=64, num_layers=1, num_heads=4, num_kv_heads=2, ffn_dim=64, vocab_size=32)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (dict(dim=0), "dim"),
        (dict(num_layers=0), "num_layers"),
        (dict(vocab_size=-1), "vocab_size"),
        (dict(dim=66), "num_heads 4"),
        (dict(num_kv_heads=3), "num_kv_heads 3"),
        (dict(num_kv_heads=8), "num_kv_heads 8"),
        (dict(dim=12), "head_dim 3"),
        (dict(dim=1 << 25), "dim must be from 1 to 16777216"),
        (dict(num_layers=4097), "num_layers must be from 1 to 4096"),
        (dict(vocab_size=10**12), "vocab_size"),
        (dict(max_seq_len=20_000_000), "max_seq_len"),
        (dict(rope_theta=0.0), "rope_theta"),
        (dict(rope_theta=float("inf")), "rope_theta"),
        (dict(rope_theta=10**400), "rope_theta"),
        (dict(rope_theta=1e39), "within float32"),
        (dict(norm_eps=1e-50), "within float32"),
        (dict(norm_eps=float("nan")), "norm_eps"),
    ],
)
def test_impossible_shapes_are_refused(wrong, named):
    Shape(**GOOD)
    with pytest.raises(ValueError, match=named) as error:
        Shape(**(GOOD | wrong))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("wrong", [
    dict(factor=0), dict(factor=float("inf")), dict(factor=float("nan")), dict(low_freq_factor=4.0),
    dict(high_freq_factor=float("inf")), dict(original_max_seq_len=0), dict(original_max_seq_len=1 << 25),
])  # fmt: skip
def test_impossible_scaling_is_refused(wrong):
    with pytest.raises(ValueError, match="rope_scaling"):
        RopeScaling(**wrong)


def test_unknown_preset_lists_the_names():
    with pytest.raises(ValueError, match="llama3-8b"):
        preset("llama4-8b")
