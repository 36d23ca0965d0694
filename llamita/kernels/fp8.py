"""Linear layers whose three matmuls run in 8-bit floats: e4m3 for inputs and weights, e5m2 for gradients (arXiv
2209.05433, section 3), each tensor scaled by its own largest value. On Hopper these matmuls are twice as fast as bf16.

Shapes: M tokens, D inputs, O outputs.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2
SIZE = 16  # tensor cores take dimensions that are multiples of it


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`x` in an 8-bit float `dtype`, and the float32 scalar that gives it back when multiplied."""
    scale = x.abs().amax().float().clamp(min=1e-12) / torch.finfo(dtype).max
    return (x.float() / scale).to(dtype), scale


def reference_linear(x_MD: Tensor, weight_OD: Tensor) -> Tensor:
    """The slow twin: the same rounding to 8 bits, multiplied in float32."""
    (x, x_scale), (weight, weight_scale) = quantize(x_MD, FORWARD), quantize(weight_OD, FORWARD)
    return ((x.float() * x_scale) @ (weight.float() * weight_scale).t()).to(x_MD.dtype)


def linear(x: Tensor, weight_OD: Tensor) -> Tensor:
    """x W^T of `x` [..., D], in bfloat16; gradients come in the dtypes of `x` and the weight."""
    return _Linear.apply(x.flatten(0, -2), weight_OD).unflatten(0, x.shape[:-1])


def check(tokens: int, tp: int) -> None:
    """Raise ValueError for rows of so many tokens, or a layout, that these matmuls do not take."""
    if tp > 1:
        raise ValueError("precision fp8 does not go with parallel.tp: use bf16, or fsdp in its place")
    if tokens % SIZE:
        raise ValueError(f"precision fp8 wants rows of a multiple of {SIZE} tokens on each rank, not {tokens}")


def convert(model: Any) -> None:
    """Make every linear layer of `model.layers` multiply so, in place; embedding, head and norms stay as they are, and
    so do all names and weights. Raises ValueError for sizes that tensor cores do not take."""
    for name, module in model.layers.named_modules():
        if isinstance(module, nn.Linear):
            if module.in_features % SIZE or module.out_features % SIZE:
                raise ValueError(
                    f"precision fp8 wants sizes that are multiples of {SIZE}; layers.{name} has "
                    f"{module.out_features} x {module.in_features}: use bf16"
                )
            module.forward = partial(_forward, module)  # type: ignore[method-assign]


def _forward(module: nn.Linear, x: Tensor) -> Tensor:
    return linear(x, module.weight)


def _multiply(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor) -> Tensor:
    """a b^T in bfloat16, of two row-major matrices."""
    return torch._scaled_mm(a, b.t(), scale_a=a_scale, scale_b=b_scale, out_dtype=torch.bfloat16)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, weight_OD: Tensor) -> Tensor:
        x, weight = quantize(x_MD, FORWARD), quantize(weight_OD, FORWARD)
        ctx.save_for_backward(*x, *weight)
        ctx.dtypes = x_MD.dtype, weight_OD.dtype
        return _multiply(*x, *weight)

    @staticmethod
    def backward(ctx: Any, grad_MO: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x_MD, x_scale, weight_OD, weight_scale = ctx.saved_tensors
        grad, scale = quantize(grad_MO, BACKWARD)
        grad_x = _multiply(grad, scale, weight_OD.t().contiguous(), weight_scale)
        grad_weight = _multiply(grad.t().contiguous(), scale, x_MD.t().contiguous(), x_scale)
        return grad_x.to(ctx.dtypes[0]), grad_weight.to(ctx.dtypes[1])
