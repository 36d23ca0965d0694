"""Cross-entropy of a head whose rows, the vocabulary, lie on the tp ranks: no rank ever holds a whole row of logits.

Shapes: M tokens, D dim, V vocab_size, v the part of the vocabulary on this rank, m the tokens of one chunk, R tp ranks.
A target of -1 bears no loss. Twin: `kernels.loss.linear_cross_entropy`, whose signature this follows.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

NO_LOSS = -1


def linear_cross_entropy(hidden_MD: Tensor, weight_VD: DTensor, targets_M: Tensor) -> Tensor:
    """Sum over the target tokens of -log softmax(h W^T)[target], the same number on every tp rank.

    `weight_VD` is cut evenly over its rows. The gradient of `hidden_MD` is this rank's part of a sum over tp, which the
    hook of the model's last norm takes (apply.py). One collective a chunk: each rank's log-sum-exp, and the target's
    logit from the rank that has it (Megatron's vocabulary-parallel loss, arXiv 1909.08053, section 3).
    """
    group = weight_VD.device_mesh.get_group()
    return _VocabCrossEntropy.apply(hidden_MD, weight_VD.to_local(), targets_M, group)


def _chunk_rows(vocab_size: int) -> int:
    """As many rows as fill 8 MiB with float32 logits, at least 512 (kernels/loss.py tells why)."""
    return max(512, 2**21 // vocab_size)


class _VocabCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_MD: Tensor, weight_vD: Tensor, targets_M: Tensor, group: dist.ProcessGroup) -> Tensor:
        wide = torch.promote_types(weight_vD.dtype, torch.float32)
        grad_hidden_MD = torch.empty_like(hidden_MD)
        grad_weight_vD = torch.zeros_like(weight_vD, dtype=wide)
        total = torch.zeros((), dtype=wide, device=hidden_MD.device)
        local_M = targets_M - dist.get_rank(group) * len(weight_vD)
        rows = _chunk_rows(len(weight_vD))
        with torch.autocast(hidden_MD.device.type, enabled=False):
            narrow_vD = weight_vD.to(hidden_MD.dtype)
            for start in range(0, len(hidden_MD), rows):
                chunk = slice(start, start + rows)
                logits_mv = (hidden_MD[chunk] @ narrow_vD.t()).to(wide)
                loss, grad_mv = _softmax_gradient(logits_mv, local_M[chunk], targets_M[chunk] != NO_LOSS, group)
                total += loss
                grad_mv = grad_mv.to(hidden_MD.dtype)
                torch.mm(grad_mv, narrow_vD, out=grad_hidden_MD[chunk])
                grad_weight_vD += grad_mv.t() @ hidden_MD[chunk]
        ctx.save_for_backward(grad_hidden_MD, grad_weight_vD)
        ctx.weight_dtype = weight_vD.dtype
        return total

    @staticmethod
    def backward(ctx, grad_total: Tensor):  # type: ignore[override]
        grad_hidden_MD, grad_weight_vD = ctx.saved_tensors
        return (
            grad_hidden_MD * grad_total.to(grad_hidden_MD.dtype),
            (grad_weight_vD * grad_total).to(ctx.weight_dtype),
            None,
            None,
        )


def _softmax_gradient(
    logits_mv: Tensor, local_m: Tensor, bears_m: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Summed loss, and d loss / d logits = softmax - onehot of this rank's words, zero where no loss is borne.

    `local_m` counts target words from this rank's first: those below 0 or beyond its last lie elsewhere.
    """
    here_m = bears_m & (local_m >= 0) & (local_m < logits_mv.shape[1])
    picks_m1 = (local_m * here_m).unsqueeze(1)
    picked_m = logits_mv.gather(1, picks_m1).squeeze(1) * here_m
    mine_m2 = torch.stack((logits_mv.logsumexp(dim=1), picked_m), dim=1)
    ranks = dist.get_world_size(group)
    all_Rm2 = mine_m2.new_empty((ranks * len(mine_m2), 2))
    dist.all_gather_single(all_Rm2, mine_m2, group=group)
    all_Rm2 = all_Rm2.unflatten(0, (ranks, -1))
    log_sum_m = all_Rm2[..., 0].logsumexp(dim=0)
    loss = ((log_sum_m - all_Rm2[..., 1].sum(dim=0)) * bears_m).sum()
    grad_mv = (logits_mv - log_sum_m.unsqueeze(1)).exp_()
    grad_mv.scatter_add_(1, picks_m1, -here_m.unsqueeze(1).to(grad_mv.dtype))
    return loss, grad_mv.mul_(bears_m.unsqueeze(1))
