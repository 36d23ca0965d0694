"""Layer: numerics against plain twins (complex numbers, transformers' frequency functions)."""

import math

import pytest
import torch

from llamita.formats.names import to_half_split, to_interleaved
from llamita.model import rope
from llamita.model.shape import RopeScaling, preset


def turned_as_complex(x_TNH, freqs_P):
    """Meta's convention: channels 2p and 2p + 1 are one complex number; position t turns it by t * freq."""
    angles_T1P = torch.arange(x_TNH.shape[0]).double()[:, None, None] * freqs_P
    pairs_TNP = torch.view_as_complex(x_TNH.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs_TNP * torch.polar(torch.ones_like(angles_T1P), angles_T1P)).flatten(-2)


def half_split(x_TNH):
    return torch.cat((x_TNH[..., 0::2], x_TNH[..., 1::2]), dim=-1)


def test_rotation_is_the_complex_product_of_permuted_pairs():
    freqs_P = rope.frequencies(preset("tiny"))
    x_TNH = torch.randn(9, 4, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tables = rope.tables(freqs_P, torch.arange(9).unsqueeze(0), torch.float64)
    ours_TNH = rope.rotate(half_split(x_TNH).unsqueeze(0), *tables)[0]
    torch.testing.assert_close(ours_TNH, half_split(turned_as_complex(x_TNH, freqs_P)), rtol=0, atol=1e-12)
    assert (ours_TNH - turned_as_complex(x_TNH, freqs_P)).abs().max() > 0.1, "the order of pairs must matter"


@pytest.mark.parametrize("num_heads", [1, 3])
def test_permutation_of_weights_is_that_of_outputs(num_heads):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(num_heads * 8, 5, generator=generator)
    x_TD = torch.randn(7, 5, generator=generator)
    interleaved_TNH = (x_TD @ weight.T).unflatten(-1, (num_heads, 8))
    ours_TNH = (x_TD @ to_half_split(weight, num_heads).T).unflatten(-1, (num_heads, 8))
    torch.testing.assert_close(ours_TNH, half_split(interleaved_TNH))
    assert torch.equal(to_interleaved(to_half_split(weight, num_heads), num_heads), weight)
    assert not torch.equal(to_half_split(weight, num_heads), weight)
    if num_heads > 1:
        assert not torch.equal(to_half_split(weight, 1), to_half_split(weight, num_heads))


@pytest.mark.parametrize(
    ("scaling", "head_dim", "theta"),
    [
        (RopeScaling(), 128, 500_000.0),
        (RopeScaling(factor=32.0), 64, 500_000.0),
        (RopeScaling(4.0, 2.0, 16.0, 1024), 32, 10_000.0),
    ],
)
def test_scaling_equals_transformers(scaling, head_dim, theta):
    modeling_rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
    from transformers import LlamaConfig

    shape = preset("tiny", dim=4 * head_dim, rope_theta=theta, rope_scaling=scaling)
    config = LlamaConfig(
        hidden_size=shape.dim,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=131_072,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": theta,
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_seq_len,
        },
    )
    theirs_P, attention_factor = modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config)
    assert attention_factor == 1.0
    ours_P, plain_P = (
        rope.frequencies(shape),
        rope.frequencies(preset("tiny", dim=4 * head_dim, rope_theta=theta)),
    )
    torch.testing.assert_close(ours_P, theirs_P.double(), rtol=2e-6, atol=0)
    ratio_P = plain_P / ours_P
    assert ratio_P[0] == 1 and math.isclose(ratio_P[-1], scaling.factor), "the ends are kept and divided"
    assert ((ratio_P > 1.01) & (ratio_P < 0.99 * scaling.factor)).any(), "a band between is blended"


def test_only_distance_counts():
    freqs_P = rope.frequencies(preset("tiny", rope_scaling=RopeScaling(original_max_seq_len=64)))
    generator = torch.Generator().manual_seed(0)
    q_H, k_H = torch.randn(2, 64, dtype=torch.float64, generator=generator)

    def score(q_position, k_position):
        tables = rope.tables(freqs_P, torch.tensor([[q_position, k_position]]), torch.float64)
        turned_TH = rope.rotate(torch.stack((q_H, k_H))[None, :, None, :], *tables)[0, :, 0]
        return float(turned_TH[0] @ turned_TH[1])

    assert math.isclose(score(7, 3), score(1007, 1003), abs_tol=1e-9)
    assert abs(score(7, 3) - score(8, 3)) > 1e-3


def test_angles_stay_exact_far_out():
    freqs_P = rope.frequencies(preset("llama3.1-8b"))
    cos, _ = rope.tables(freqs_P, torch.tensor([[131_071]]), torch.float32)
    exact = [math.cos(131_071 * float(freq)) for freq in freqs_P]
    assert (cos.flatten() - torch.tensor(exact)).abs().max() < 1e-7
    rough = (131_071 * freqs_P.float()).cos()
    assert (rough - torch.tensor(exact)).abs().max() > 1e-4, "float32 angles must fail this test"


def test_half_precision_is_turned_in_float32():
    tables = rope.tables(rope.frequencies(preset("tiny")), torch.tensor([[300, 301]]), torch.float32)
    x_BTNH = torch.randn(1, 2, 4, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    turned = rope.rotate(x_BTNH, *tables)
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, rope.rotate(x_BTNH.float(), *tables).bfloat16())
