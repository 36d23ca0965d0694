"""Cross-entropy of a linear head, in chunks, so that the whole table of logits never exists at once.

Shapes: M tokens, D dim, V vocab_size. A target of -1 bears no loss.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

NO_LOSS = -1
SoftmaxGradient = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def reference_cross_entropy(hidden_MD: Tensor, weight_VD: Tensor, targets_M: Tensor) -> Tensor:
    """Sum of -log softmax(h W^T)[target] over the tokens that bear loss, written out: the slow twin."""
    logits_MV = hidden_MD @ weight_VD.to(hidden_MD.dtype).t()
    return F.cross_entropy(_widen(logits_MV), targets_M, ignore_index=NO_LOSS, reduction="sum")


def linear_cross_entropy(hidden_MD: Tensor, weight_VD: Tensor, targets_M: Tensor) -> Tensor:
    """The same sum; gradients are formed chunk by chunk in the forward pass. Matmuls run in hidden's dtype."""
    return in_chunks(hidden_MD, weight_VD, targets_M, _softmax_gradient)


def in_chunks(hidden_MD: Tensor, weight_VD: Tensor, targets_M: Tensor, softmax_gradient: SoftmaxGradient) -> Tensor:
    """The sum over chunks of tokens of what `softmax_gradient` makes of a chunk's logits [m, V] and targets [m]: the
    loss, and its gradient by the logits, whose memory it may use."""
    return _LinearCrossEntropy.apply(hidden_MD, weight_VD, targets_M, softmax_gradient)


def _widen(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _chunk_rows(vocab_size: int) -> int:
    """Rows whose float32 logits fill 8 MiB, a share of the last-level cache, but at least 512: the V x D weight
    gradient is added to once a chunk, which costs 20 to 30% of a step at 128K vocabulary with 256 rows."""
    return max(512, 2**21 // vocab_size)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden_MD: Tensor, weight_VD: Tensor, targets_M: Tensor, softmax_gradient: SoftmaxGradient
    ) -> Tensor:
        wide = torch.promote_types(weight_VD.dtype, torch.float32)
        grad_hidden_MD = torch.empty_like(hidden_MD)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=wide)
        rows = _chunk_rows(weight_VD.shape[0])
        total = torch.zeros((), dtype=wide, device=hidden_MD.device)
        with torch.autocast(hidden_MD.device.type, enabled=False):
            narrow_VD = weight_VD.to(hidden_MD.dtype)
            for start in range(0, hidden_MD.shape[0], rows):
                chunk = slice(start, start + rows)
                loss, grad_logits_mV = softmax_gradient(_widen(hidden_MD[chunk] @ narrow_VD.t()), targets_M[chunk])
                total += loss
                grad_logits_mV = grad_logits_mV.to(hidden_MD.dtype)
                torch.mm(grad_logits_mV, narrow_VD, out=grad_hidden_MD[chunk])
                grad_weight_VD += grad_logits_mV.t() @ hidden_MD[chunk]
        ctx.save_for_backward(grad_hidden_MD, grad_weight_VD)
        ctx.weight_dtype = weight_VD.dtype
        return total

    @staticmethod
    def backward(ctx, grad_total: Tensor):  # type: ignore[override]
        grad_hidden_MD, grad_weight_VD = ctx.saved_tensors
        return (
            grad_hidden_MD * grad_total.to(grad_hidden_MD.dtype),
            (grad_weight_VD * grad_total).to(ctx.weight_dtype),
            None,
            None,
        )


def _softmax_gradient(logits_mV: Tensor, targets_m: Tensor) -> tuple[Tensor, Tensor]:
    """Summed loss and d loss / d logits = softmax - onehot, zero where no loss is borne."""
    bears_m1 = (targets_m != NO_LOSS).unsqueeze(1)
    picks_m1 = targets_m.clamp_min(0).unsqueeze(1)
    log_probs_mV = F.log_softmax(logits_mV, dim=1)
    loss = -(log_probs_mV.gather(1, picks_m1) * bears_m1).sum()
    grad_mV = log_probs_mV.exp_()
    grad_mV.scatter_add_(1, picks_m1, torch.full_like(picks_m1, -1, dtype=grad_mV.dtype))
    return loss, grad_mV if bears_m1.all() else grad_mV.mul_(bears_m1)
