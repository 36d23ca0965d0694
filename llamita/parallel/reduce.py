"""What all ranks must agree on: sums over axes, the norm of the whole gradient, and when gradients are summed."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from llamita.parallel.layout import AXES

ALL = AXES


def total(x: Tensor, mesh: DeviceMesh | None, axes: Sequence[str]) -> Tensor:
    """The sum of `x` over the ranks of `axes`, in place; `x` itself where there is no mesh."""
    if mesh is not None and tuple(axes) == ALL:
        dist.all_reduce(x)
    elif mesh is not None:
        for axis in axes:
            if mesh[axis].size() > 1:
                dist.all_reduce(x, group=mesh.get_group(axis))
    return x


def sum_gradients(model: Any, last: bool) -> None:
    """Say before a micro-batch's backward pass whether it is its step's `last`: copies (dp) sum their gradients then
    only, once a step, while the shards (fsdp, cp) sum in each, so that no rank ever holds a whole gradient."""
    model.set_requires_all_reduce(last)


def clip(parameters: Iterable[Tensor], max_norm: float, mesh: DeviceMesh | None) -> float:
    """Scale all gradients so that their norm is at most `max_norm`; return the norm before.

    The norm is that of the whole gradient over every axis, each weight counted once: a piece that several ranks hold
    alike counts on the first of them.
    """
    gradients = [weight.grad for weight in parameters if weight.grad is not None]
    local = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
    norms = torch.stack(torch._foreach_norm(local))
    if mesh is not None:
        counts = torch.tensor([_is_first_copy(gradient) for gradient in gradients], device=norms.device)
        square = (norms.square() * counts).sum()
        dist.all_reduce(square)
        norm = square.sqrt()
    else:
        norm = norms.norm()
    torch._foreach_mul_(local, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm.item()


def _is_first_copy(gradient: Any) -> bool:
    at = gradient.device_mesh.get_coordinate()
    return not any(placement.is_replicate() and index for placement, index in zip(gradient.placements, at, strict=True))
