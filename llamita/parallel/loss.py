"""Cross-entropy of a head whose rows, the vocabulary, lie on the tp ranks: no rank ever holds a whole row of logits.

Shapes: M tokens, D dim, V vocab_size, v the part of the vocabulary on this rank, m the tokens of one chunk, R tp ranks.
A target of -1 bears no loss. Twin: `kernels.loss.linear_cross_entropy`, whose signature and chunks these are.
"""

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from llamita.kernels.loss import NO_LOSS, in_chunks


def linear_cross_entropy(hidden_MD: Tensor, weight_VD: Tensor, targets_M: Tensor) -> Tensor:
    """Sum over the target tokens of -log softmax(h W^T)[target], the same number on every tp rank.

    `weight_VD` is a DTensor, cut evenly over its rows. The gradient of `hidden_MD` is this rank's part of a sum over
    tp, which the hook of the model's last norm takes (apply.py). One collective a chunk: each rank's log-sum-exp, and
    the target's logit from the rank that has it (Megatron's vocabulary-parallel loss, arXiv 1909.08053, section 3).
    """
    assert isinstance(weight_VD, DTensor)
    group = weight_VD.device_mesh.get_group()
    return in_chunks(hidden_MD, weight_VD.to_local(), targets_M, partial(_softmax_gradient, group))


def _softmax_gradient(group: dist.ProcessGroup, logits_mv: Tensor, targets_m: Tensor) -> tuple[Tensor, Tensor]:
    """Summed loss, and d loss / d logits = softmax - onehot of this rank's words, zero where no loss is borne."""
    bears_m = targets_m != NO_LOSS
    local_m = targets_m - dist.get_rank(group) * logits_mv.shape[1]  # below 0 or beyond the last: another rank's word
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
