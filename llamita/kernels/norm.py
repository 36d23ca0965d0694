"""RMSNorm in few passes over memory, where torch composes it of many: on CPUs, with no compiler.

Shapes: B rows, T tokens, D dim, M = B T.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def rms_norm(x_BTD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, computed in at least float32 (arXiv 1910.07467, equation 4).

    Returned in autocast's dtype where that is on, in x's where not: cast once here, not by each matmul that reads it.
    """
    device = x_BTD.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_BTD.dtype
    is_plain = type(x_BTD) is Tensor and not torch.compiler.is_compiling()  # neither DTensor nor a compiler's
    if device == "cpu" and is_plain:
        return _RMSNorm.apply(x_BTD, weight_D, eps, dtype)
    return composed_rms_norm(x_BTD, weight_D, eps).to(dtype)


def composed_rms_norm(x_BTD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """The same as torch composes it, in at least float32: the slow twin, and for GPUs and compilers the fast one."""
    wide_BTD = _widen(x_BTD)
    return F.rms_norm(wide_BTD, weight_D.shape, weight_D.to(wide_BTD.dtype), eps)


def _widen(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BTD: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        wide_BTD = _widen(x_BTD)
        norm_BT1 = torch.linalg.vector_norm(wide_BTD, dim=-1, keepdim=True)
        scale_BT1 = (norm_BT1.square() / x_BTD.shape[-1] + eps).rsqrt()
        ctx.save_for_backward(x_BTD, weight_D, scale_BT1)
        return (wide_BTD * scale_BT1).mul_(weight_D).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BTD: Tensor):  # type: ignore[override]
        """With n = x scale and g the gradient: dw = sum of g n; dx = scale (g w - n mean(g w n))."""
        x_BTD, weight_D, scale_BT1 = ctx.saved_tensors
        grad_BTD, weight_D, dtype = _widen(grad_BTD), _widen(weight_D), weight_D.dtype
        normed_BTD = _widen(x_BTD) * scale_BT1
        along_BTD = grad_BTD * normed_BTD
        mean_BT1 = (along_BTD @ weight_D).unsqueeze(-1) / x_BTD.shape[-1]
        grad_x_BTD = (grad_BTD * weight_D).addcmul_(normed_BTD, mean_BT1, value=-1).mul_(scale_BT1)
        return grad_x_BTD.to(x_BTD.dtype), along_BTD.flatten(0, -2).sum(dim=0).to(dtype), None, None
