"""Lay a built model over a mesh, in place: one walk over its modules' `AXES`, no second model.

Shapes: B rows, T tokens, D dim, N query heads, K KV heads, H head_dim.
Order: tensor and sequence parallel, compilation, recomputation, FSDP2 or HSDP.
Afterwards every parameter is a DTensor under its old name, and `model.hidden`, `model(...)` are called as before.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils.checkpoint import checkpoint

from llamita.parallel import rules
from llamita.parallel.layout import Layout
from llamita.parallel.mesh import weights_mesh

TOKENS, CHANNELS = Shard(1), Shard(2)  # of activations [B, T, D]


class Passage(NamedTuple):
    """How a module's input lies on tp, how its output shall, and how the gradient of the output's local part comes back
    (None: the output stays a DTensor, so that one sum serves all who read it)."""

    enter: Placement
    leave: Placement
    local_grad: Placement | None


# Megatron's f and g (arXiv 2205.05198, section 4.2.2): tokens are gathered behind a norm, and summed and scattered
# behind a layer's last matrix. Behind the last norm each rank computes with its own words: gradients are parts.
PASSAGES = {
    "embedding": Passage(Replicate(), TOKENS, TOKENS),
    "norm": Passage(TOKENS, Replicate(), None),
    "column": Passage(Replicate(), CHANNELS, CHANNELS),
    "row": Passage(CHANNELS, TOKENS, TOKENS),
    "last_norm": Passage(TOKENS, Replicate(), Partial()),
    "head": Passage(Replicate(), Replicate(), Replicate()),
}


def parallelize(
    model: Any, layout: Layout, mesh: DeviceMesh | None, *, compute_dtype: torch.dtype, reduce_dtype: torch.dtype
) -> None:
    """Cut `model` (on the meta device, or with the same weights on every rank) as `layout` says.

    Weights are gathered and multiplied in `compute_dtype`; gradients are summed, never averaged, in `reduce_dtype`.
    Without a mesh layers are recomputed and compiled, no more. Embedding, head and last norm stay gathered behind a
    forward pass until its backward pass: where there is none, `model.reshard()` gives the parameters back as shards.
    Raises ValueError for an axis that the rules do not know.
    """
    ranks = None if mesh is None else weights_mesh(mesh)
    if ranks is not None and layout.tp > 1:
        tied = _is_tied(model)
        _cut_tensors(model, ranks["tp"])
        if tied:
            model.output.weight = model.tok_embeddings.weight
    for block in _layers(model):
        if layout.compile:
            block.forward = partial(_run_compiled, torch.compile(block.forward))
        if layout.recompute:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    if ranks is not None:
        copies = ("dp", "shard") if layout.dp > 1 else ("shard",)  # HSDP (arXiv 2304.11277, section 3.2.2), or FSDP
        _shard(model, ranks[copies], MixedPrecisionPolicy(compute_dtype, reduce_dtype, cast_forward_inputs=False))


@torch.no_grad()
def initialize(model: Any, first_rows: Callable[[str, Sequence[int], range], Tensor], device: torch.device) -> None:
    """Give a model on the meta device memory on `device`, and every weight its first values.

    `first_rows(name, size of the whole weight, rows)` gives those rows; a rank asks only for those it holds, so the
    weights are the same in every layout.
    """
    tied = _is_tied(model)
    model.to_empty(device=device)
    if tied:
        model.output.weight = model.tok_embeddings.weight
    for name, weight in model.named_parameters():
        local, offset = weight, (0,) * weight.ndim
        if isinstance(weight, DTensor):
            local = weight.to_local()
            _, offset = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
        if local.numel():
            held = [range(start, start + length) for start, length in zip(offset, local.shape, strict=True)]
            values = first_rows(name, weight.shape, held[0])
            local.copy_(values if weight.ndim == 1 else values[:, held[1].start : held[1].stop])


def _shard(model: Any, ranks: DeviceMesh, policy: MixedPrecisionPolicy) -> None:
    """FSDP2 of every layer and of what is left; a forced sum, since gloo knows no other way to divide by one."""
    for module in (*_layers(model), model):
        fully_shard(module, mesh=ranks, mp_policy=policy)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(model, "hidden")


class _Apart:
    """A layer's attention as a call that the compiler leaves alone: who sees whom differs in every batch, and code
    compiled for one batch's documents fits no other."""

    def __init__(self, attend: Callable[..., Tensor], layer: int):
        self.attend, self.layer = attend, layer

    @torch.compiler.disable
    def __call__(self, _: int, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor) -> Tensor:
        return self.attend(self.layer, q_BTNH, k_BTKH, v_BTKH)


def _run_compiled(
    forward: Callable, layer: int, x_BTD: Tensor, tables: tuple[Tensor, Tensor], attend: Callable[..., Tensor]
) -> Tensor:
    """All layers go by number 0 and so share what is compiled."""
    return forward(0, x_BTD, tables, _Apart(attend, layer))


def _layers(model: Any) -> list[nn.Module]:
    return [block for block in model.layers if block is not None]


def _is_tied(model: Any) -> bool:
    return (
        model.output is not None
        and model.tok_embeddings is not None
        and (model.output.weight is model.tok_embeddings.weight)
    )


def _cut_tensors(model: Any, tp: DeviceMesh) -> None:
    """Distribute every weight over tp, and let its module convert what comes in and what goes out."""
    for _, module, leaf, axes in list(rules.walk(model)):
        dim = rules.cut_dim(axes)
        whole = getattr(module, leaf)
        cut = distribute_tensor(whole.detach(), tp, [Replicate() if dim is None else Shard(dim)], src_data_rank=None)
        setattr(module, leaf, nn.Parameter(cut, requires_grad=whole.requires_grad))
        passage = PASSAGES[_role(model, module, dim)]
        module.register_forward_pre_hook(partial(_enter, tp, passage))
        module.register_forward_hook(partial(_leave, tp, passage))


def _role(model: Any, module: nn.Module, dim: int | None) -> str:
    if dim is None:
        return "last_norm" if module is model.norm else "norm"
    if isinstance(module, nn.Embedding):
        return "embedding"
    return "head" if module is model.output else "column" if dim == 0 else "row"


def _enter(tp: DeviceMesh, passage: Passage, module: nn.Module, args: tuple) -> tuple:
    x = args[0]
    if not x.is_floating_point() and x.shape[1] % tp.size():
        raise ValueError(f"a row of {x.shape[1]} tokens cannot be cut over tp {tp.size()}: pad it to a multiple")
    if not isinstance(x, DTensor):
        grad = Partial() if passage.enter.is_replicate() else passage.enter
        x = DTensor.from_local(x, tp, (passage.enter,), run_check=False, grad_placements=(grad,))
    return (x, *args[1:])


def _leave(tp: DeviceMesh, passage: Passage, module: nn.Module, args: tuple, out: DTensor) -> Tensor:
    out = out.redistribute(placements=(passage.leave,))
    if passage.local_grad is None:
        return out
    local = out.to_local(grad_placements=(passage.local_grad,))
    return local.clone() if passage is PASSAGES["last_norm"] else local  # FSDP hooks what `hidden` returns, no view
