"""Causal attention as plain matmuls over blocks of queries: for bfloat16 on CPUs, where torch's own kernel reaches a
tenth of what a matmul does (benchmarks/train.py).

Shapes: B rows, T tokens, N query heads, K KV heads, G = N / K, H head_dim; t queries of one block, S = the keys up to
its last query. The query heads that read one KV head lie below each other as rows of one matmul: [B K, G t, H].
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 128  # queries: few enough to skip most of what causality hides, enough for matmuls at full speed


def causal(q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(H)) v over each query's own and earlier tokens, [B, T, N, H]. Scores are rounded to the
    inputs' dtype, the softmax is taken in at least float32. Slow twin: `attention.reference`."""
    return _Causal.apply(q_BTNH, k_BTKH, v_BTKH)


def _by_kv_head(x_BTNH: Tensor, num_kv_heads: int) -> Tensor:
    x_BTKGH = x_BTNH.unflatten(2, (num_kv_heads, -1))
    return x_BTKGH.permute(0, 2, 3, 1, 4).flatten(2, 3).flatten(0, 1)


def _by_token(x: Tensor, like_BTNH: Tensor, num_kv_heads: int) -> Tensor:
    batch, tokens = like_BTNH.shape[:2]
    return x.view(batch, num_kv_heads, -1, tokens, x.shape[-1]).permute(0, 3, 1, 2, 4).flatten(2, 3)


def _columns(x: Tensor) -> Tensor:
    """Keys or values as columns: laid out anew once, or else every block's matmul would do it for its part."""
    return x.transpose(1, 2).contiguous()


def _probabilities(q: Tensor, k_columns: Tensor, tokens: int) -> Tensor:
    """[B K, G t, S] of a block's `tokens` scaled queries over the keys up to the last of them."""
    scores = torch.bmm(q, k_columns)
    ahead_tt = torch.full((tokens, tokens), float("-inf"), dtype=q.dtype, device=q.device).triu(1)
    scores.unflatten(1, (-1, tokens))[..., -tokens:] += ahead_tt
    return scores.softmax(dim=-1)


class _Causal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor) -> Tensor:
        num_kv_heads = k_BTKH.shape[2]
        outs, queries = [], []
        with torch.autocast(q_BTNH.device.type, enabled=False):
            k, v = _by_kv_head(k_BTKH, num_kv_heads), _by_kv_head(v_BTKH, num_kv_heads)
            k_columns, end = _columns(k), 0
            for q_BtNH in q_BTNH.split(BLOCK, dim=1):
                end += q_BtNH.shape[1]
                queries.append(_by_kv_head(q_BtNH, num_kv_heads) * q_BTNH.shape[-1] ** -0.5)
                p = _probabilities(queries[-1], k_columns[:, :, :end], q_BtNH.shape[1])
                outs.append(_by_token(torch.bmm(p, v[:, :end]), q_BtNH, num_kv_heads))
        ctx.save_for_backward(k, v, *queries)
        return torch.cat(outs, dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BTNH: Tensor):  # type: ignore[override]
        """With p the probabilities: dv = p^T do, ds = p (do v^T - sum of p (do v^T) over keys), dq = ds k, dk = ds^T q
        (arXiv 2205.14135, appendix B.2). p is computed anew: kept, it would outweigh all else in long rows."""
        k, v, *queries = ctx.saved_tensors
        num_kv_heads = len(k) // len(grad_BTNH)
        wide = torch.promote_types(k.dtype, torch.float32)
        grad_k, grad_v = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        k_columns, v_columns, grads_q, end = _columns(k), _columns(v), [], 0
        for grad_BtNH, q in zip(grad_BTNH.split(BLOCK, dim=1), queries, strict=True):
            end += grad_BtNH.shape[1]
            p = _probabilities(q, k_columns[:, :, :end], grad_BtNH.shape[1])
            grad = _by_kv_head(grad_BtNH, num_kv_heads)
            grad_v[:, :end] += torch.bmm(p.transpose(1, 2), grad)
            grad_p = torch.bmm(grad, v_columns[:, :, :end])
            grad_s = torch._softmax_backward_data(grad_p, p, -1, p.dtype)
            grad_k[:, :end] += torch.bmm(grad_s.transpose(1, 2), q)
            grads_q.append(_by_token(torch.bmm(grad_s, k[:, :end]) * k.shape[-1] ** -0.5, grad_BtNH, num_kv_heads))
        like = grad_BTNH[..., :num_kv_heads, :]
        grad_k_BTKH, grad_v_BTKH = (_by_token(x.to(k.dtype), like, num_kv_heads) for x in (grad_k, grad_v))
        return torch.cat(grads_q, dim=1), grad_k_BTKH, grad_v_BTKH
