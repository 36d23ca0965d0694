"""Who sees whom: the objects that the model's one seam, `attend`, accepts.

Shapes: B rows, T query tokens, S key tokens, N query heads, K KV heads, H head_dim; N is a multiple of K.
Each gives `positions(tokens_BT)` and is called with (layer, q_BTNH, k_BTKH, v_BTKH) for the mixed values [B, T, N, H].
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from llamita.kernels import blocks


class Attend(Protocol):
    def positions(self, tokens_BT: Tensor) -> Tensor: ...

    def __call__(self, layer: int, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor) -> Tensor: ...


def sdpa(q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, *, causal: bool = False, mask: Tensor | None = None) -> Tensor:
    """torch's scaled dot-product attention in this file's layout; `mask` [B or 1, 1, T, S] is True where seen."""
    grouped = q_BTNH.shape[2] != k_BSKH.shape[2]
    q_BNTH, k_BKSH, v_BKSH = (x.transpose(1, 2) for x in (q_BTNH, k_BSKH, v_BSKH))
    out_BNTH = F.scaled_dot_product_attention(
        q_BNTH, k_BKSH, v_BKSH, attn_mask=mask, is_causal=causal, enable_gqa=grouped
    )
    return out_BNTH.transpose(1, 2)


def causal(q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor) -> Tensor:
    """Every token sees itself and all before it, by what is fastest where the tensors are."""
    if q_BTNH.device.type == "cpu" and q_BTNH.dtype == torch.bfloat16:
        return blocks.causal(q_BTNH, k_BTKH, v_BTKH)
    return sdpa(q_BTNH, k_BTKH, v_BTKH, causal=True)


def reference(q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, mask_BTS: Tensor) -> Tensor:
    """Attention written out with a full mask: the slow twin of everything in this file.

    softmax(q k^T / sqrt(H)) v, query head n reading KV head n // (N / K) (arXiv 1706.03762, equation 1).
    """
    group = q_BTNH.shape[2] // k_BSKH.shape[2]
    k_BSNH, v_BSNH = (x.repeat_interleave(group, dim=2) for x in (k_BSKH, v_BSKH))
    scores_BNTS = torch.einsum("btnh,bsnh->bnts", q_BTNH, k_BSNH) * q_BTNH.shape[-1] ** -0.5
    scores_BNTS = scores_BNTS.masked_fill(~mask_BTS.unsqueeze(1), float("-inf"))
    return torch.einsum("bnts,bsnh->btnh", scores_BNTS.softmax(dim=-1), v_BSNH)


def row_positions(tokens_BT: Tensor) -> Tensor:
    """0, 1, 2, ... in every row, [1, T]."""
    return torch.arange(tokens_BT.shape[1], device=tokens_BT.device).unsqueeze(0)


class Causal:
    """Every token sees itself and all before it in its row."""

    def positions(self, tokens_BT: Tensor) -> Tensor:
        return row_positions(tokens_BT)

    def __call__(self, layer: int, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor) -> Tensor:
        return causal(q_BTNH, k_BTKH, v_BTKH)


class Documents:
    """Packed rows: a token sees the earlier tokens of its own document, and positions restart with each.

    `starts[b]` lists where row b's documents begin, ascending, the first being 0. Documents of like length are laid
    side by side and share one causal call, so a row of fifty short documents costs few calls and no quadratic mask;
    what pads them stands behind the last real token, which causality hides.
    """

    def __init__(self, starts: Sequence[Sequence[int]]):
        self.starts = starts
        self.plan: tuple[list[Tensor], Tensor, Tensor] | None = None

    def positions(self, tokens_BT: Tensor) -> Tensor:
        offsets_BT = torch.zeros_like(tokens_BT)
        for row, starts in enumerate(self.starts):
            for start in starts:
                offsets_BT[row, start:] = start
        return row_positions(tokens_BT) - offsets_BT

    def __call__(self, layer: int, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor) -> Tensor:
        if all(len(starts) == 1 for starts in self.starts):
            return causal(q_BTNH, k_BTKH, v_BTKH)
        if self.plan is None:
            self.plan = self._lay_out(q_BTNH.shape[1], q_BTNH.device)
        slots, home, real = self.plan
        flat = [x.flatten(0, 1) for x in (q_BTNH, k_BTKH, v_BTKH)]
        moved = [_Move.apply(x, torch.cat([group.flatten() for group in slots]), home, None) for x in flat]
        mixed, at = [], 0
        for group in slots:
            piece = [x[at : at + group.numel()].unflatten(0, group.shape) for x in moved]
            mixed.append(causal(*piece).flatten(0, 1))
            at += group.numel()
        out = _Move.apply(torch.cat(mixed), home, torch.cat([group.flatten() for group in slots]), real)
        return out.unflatten(0, q_BTNH.shape[:2])

    def _lay_out(self, seq_len: int, device: torch.device) -> tuple[list[Tensor], Tensor, Tensor]:
        """Per class of length the token in each slot [documents, length]; each token's slot; which slots are real."""
        grain = max(16, seq_len // 16)
        classes: dict[int, list[tuple[int, int]]] = {}
        for row, starts in enumerate(self.starts):
            for start, end in zip(starts, [*starts[1:], seq_len], strict=True):
                length = min(seq_len, -(-(end - start) // grain) * grain)
                classes.setdefault(length, []).append((row * seq_len + start, row * seq_len + end))
        slots, real = [], []
        for length, spans in classes.items():
            first, end = torch.tensor(spans, device=device).t().unsqueeze(-1)
            wanted = first + torch.arange(length, device=device)
            slots.append(wanted.minimum(end - 1))
            real.append((wanted < end).flatten())
        is_real = torch.cat(real)
        token = torch.cat([group.flatten() for group in slots])[is_real]
        home = torch.empty_like(token)
        home[token] = is_real.nonzero().squeeze(-1)
        return slots, home, is_real


class _Move(torch.autograd.Function):
    """Rows of x by index; the gradient comes home by the inverse index, and padding (not `real`) sends none."""

    @staticmethod
    def forward(ctx, x: Tensor, there: Tensor, back: Tensor, real: Tensor | None) -> Tensor:
        ctx.save_for_backward(back, real)
        return x.index_select(0, there)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        back, real = ctx.saved_tensors
        grad = grad.index_select(0, back)
        return grad if real is None else grad * real[:, None, None], None, None, None


class Padded:
    """Rows padded at either end: a token sees its row's earlier real tokens; positions count those from 0.

    `valid_BT` is True at real tokens. Padding sees itself, so that its outputs are finite; they mean nothing.
    """

    def __init__(self, valid_BT: Tensor):
        seq_len = valid_BT.shape[1]
        causal_TS = torch.ones(seq_len, seq_len, dtype=torch.bool, device=valid_BT.device).tril()
        self_TS = torch.eye(seq_len, dtype=torch.bool, device=valid_BT.device)
        self.mask_B1TS = (causal_TS & valid_BT[:, None, None, :]) | self_TS
        self.positions_BT = (valid_BT.long().cumsum(dim=1) - 1).clamp(min=0)

    def positions(self, tokens_BT: Tensor) -> Tensor:
        return self.positions_BT

    def __call__(self, layer: int, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor) -> Tensor:
        return sdpa(q_BTNH, k_BTKH, v_BTKH, mask=self.mask_B1TS)
