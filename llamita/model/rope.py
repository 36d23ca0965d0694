"""Rotary position embedding (RoFormer, arXiv 2104.09864 section 3.4) with Llama 3.1's frequency scaling.

Shapes: B rows, T tokens, N heads, H head_dim, P = H / 2 pairs.
Pair p is channels p and p + P ("half-split", Hugging Face's order of wq's and wk's rows); Meta's files keep a pair
side by side, and `formats/names.py` holds the one permutation between the two. Half-split trains 20% faster on CPU
(LOG.md).
"""

import math

import torch
from torch import Tensor

from llamita.model.shape import RopeScaling, Shape


def frequencies(shape: Shape) -> Tensor:
    """Radians per position of each pair, [P], float64."""
    exponents_P = torch.arange(0, shape.head_dim, 2, dtype=torch.float64, device="cpu") / shape.head_dim
    freqs_P = shape.rope_theta**-exponents_P
    return scale(freqs_P, shape.rope_scaling) if shape.rope_scaling else freqs_P


def scale(freqs_P: Tensor, scaling: RopeScaling) -> Tensor:
    """Slow the long wavelengths by `factor`, keep the short ones, blend between (llama-models, `apply_scaling`)."""
    turns_P = scaling.original_max_seq_len * freqs_P / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep_P = ((turns_P - low) / (high - low)).clamp(0, 1)
    return freqs_P * (keep_P + (1 - keep_P) / scaling.factor)


def tables(freqs_P: Tensor, positions_BT: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of every angle, each [B, T, 1, P].

    Angles are taken in float64: at position 131,071 float32 would be off by up to 0.008 radians.
    """
    angles_BTP = positions_BT.unsqueeze(-1).double() * freqs_P.to(positions_BT.device)
    angles_BT1P = angles_BTP.unsqueeze(-2)
    return angles_BT1P.cos().to(dtype), angles_BT1P.sin().to(dtype)


def rotate(x_BTNH: Tensor, cos_BT1P: Tensor, sin_BT1P: Tensor) -> Tensor:
    """Turn each pair of channels by its angle; computed in the tables' dtype, returned in the input's."""
    first_BTNP, second_BTNP = x_BTNH.to(cos_BT1P.dtype).chunk(2, dim=-1)
    turned_BTNH = torch.cat(
        (first_BTNP * cos_BT1P - second_BTNP * sin_BT1P, second_BTNP * cos_BT1P + first_BTNP * sin_BT1P),
        dim=-1,
    )
    return turned_BTNH.to(x_BTNH.dtype)
