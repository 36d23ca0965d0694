"""Context parallelism: every row cut over the ranks of cp, K and V gathered (Llama 3, arXiv 2407.21783, section 3.3.2).

A row of S tokens is 2 cp chunks of C; rank i holds chunk i and chunk 2 cp - 1 - i, its T = 2 C tokens, so that all
ranks have as many pairs of query and key. Shapes: B rows, N query heads, K KV heads, H head_dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.attention.bias import causal_lower_right

from llamita.kernels.attention import Documents, sdpa

AXIS = "cp"


def cut(x_BS: Tensor, mesh: DeviceMesh) -> Tensor:
    """This rank's chunks of every row, [B, T]: the head, then the tail. Raises ValueError for an S not cut evenly."""
    size, rank = mesh[AXIS].size(), mesh.get_local_rank(AXIS)
    if x_BS.shape[1] % (2 * size):
        raise ValueError(
            f"rows of {x_BS.shape[1]} tokens do not make {2 * size} equal chunks, two for each of {size} cp ranks: "
            f"set data.seq_len to a multiple of {2 * size}"
        )
    chunks = x_BS.chunk(2 * size, dim=1)
    return torch.cat([chunks[rank], chunks[-1 - rank]], dim=1)


@dataclass
class _Chunk:
    """Who sees whom in one chunk of every row: tokens [first, first + C)."""

    first: int
    carried: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    """Rows whose tokens from `first` to an end go on with a document begun in an earlier chunk, by (begin, end)."""
    fresh: dict[int, int] = field(default_factory=dict)
    """Rows in which a document begins in the chunk, and their token, counted from `first`, where the first one does."""
    documents: Documents = field(default_factory=lambda: Documents([]))
    """Causal within the chunk, for the rows of `fresh`."""


class Context:
    """Packed rows cut over cp: a token sees the earlier tokens of its own document, whichever rank holds them.

    `starts[b]` lists where documents begin in the whole row b, ascending, the first being 0; tokens, queries, keys and
    values are this rank's, as `cut` gives them. A document begun in the chunk needs no other rank's keys; one that
    goes on from an earlier chunk sees its keys from its begin to the chunk's end, and nothing else is computed, but
    for a causal triangle of such tokens in rows where a document follows.
    """

    def __init__(self, starts: Sequence[Sequence[int]], mesh: DeviceMesh):
        self.starts = starts
        self.group, self.size, self.rank = mesh.get_group(AXIS), mesh[AXIS].size(), mesh.get_local_rank(AXIS)
        self.plan: list[_Chunk] | None = None

    def positions(self, tokens_BT: Tensor) -> Tensor:
        """Of each token within its document, [B, T]."""
        length = tokens_BT.shape[1] // 2
        at_T = torch.cat([torch.arange(first, first + length) for first in self._firsts(length)])
        begins = [torch.tensor(row) for row in self.starts]
        begins_BT = torch.stack([row[torch.searchsorted(row, at_T, right=True) - 1] for row in begins])
        return (at_T - begins_BT).to(tokens_BT.device)

    def __call__(self, layer: int, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor) -> Tensor:
        length = q_BTNH.shape[1] // 2
        if self.plan is None:
            self.plan = [self._lay_out(first, length) for first in self._firsts(length)]
        k_BSKH, v_BSKH = self._gathered(k_BTKH, v_BTKH)
        own = zip(q_BTNH.chunk(2, dim=1), k_BTKH.chunk(2, dim=1), v_BTKH.chunk(2, dim=1), strict=True)
        mixed = [_mix(chunk, layer, q, k, v, k_BSKH, v_BSKH) for chunk, (q, k, v) in zip(self.plan, own, strict=True)]
        return torch.cat(mixed, dim=1)

    def _firsts(self, length: int) -> tuple[int, int]:
        """Where the rank's two chunks begin in the whole row."""
        return self.rank * length, (2 * self.size - 1 - self.rank) * length

    def _gathered(self, k_BTKH: Tensor, v_BTKH: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of whole rows, [B, S, K, H] each."""
        ranks = _Gather.apply(torch.stack([k_BTKH, v_BTKH]), self.group).unbind(0)
        halves = [x.chunk(2, dim=2) for x in ranks]
        heads, tails = [head for head, _ in halves], [tail for _, tail in reversed(halves)]
        k_BSKH, v_BSKH = torch.cat(heads + tails, dim=2).unbind(0)
        return k_BSKH, v_BSKH

    def _lay_out(self, first: int, length: int) -> _Chunk:
        chunk, inside = _Chunk(first), []
        for row, starts in enumerate(self.starts):
            begun = [start - first for start in starts if first <= start < first + length]
            until = begun[0] if begun else length
            if until:
                begin = max(start for start in starts if start < first)
                chunk.carried.setdefault((begin, first + until), []).append(row)
            if begun:
                chunk.fresh[row] = until
                inside.append(begun if until == 0 else [0, *begun])
        chunk.documents = Documents(inside)
        return chunk


def _mix(
    chunk: _Chunk, layer: int, q_BCNH: Tensor, k_BCKH: Tensor, v_BCKH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor
) -> Tensor:
    """The mixed values of one chunk, [B, C, N, H]."""
    parts: list[list[Tensor]] = [[] for _ in q_BCNH]
    for (begin, end), rows in chunk.carried.items():
        length = end - chunk.first
        seen = [_rows(x, rows)[:, begin:end] for x in (k_BSKH, v_BSKH)]
        out = sdpa(_rows(q_BCNH, rows)[:, :length], *seen, mask=causal_lower_right(length, end - begin))
        for row, out_TNH in zip(rows, out, strict=True):
            parts[row].append(out_TNH)
    if chunk.fresh:
        rows = list(chunk.fresh)
        out = chunk.documents(layer, *(_rows(x, rows) for x in (q_BCNH, k_BCKH, v_BCKH)))
        for row, out_CNH in zip(rows, out, strict=True):
            parts[row].append(out_CNH[chunk.fresh[row] :])
    return torch.stack([torch.cat(part) for part in parts])


def _rows(x: Tensor, rows: list[int]) -> Tensor:
    """Some rows of a batch; all of them without a copy."""
    return x if len(rows) == len(x) else torch.stack([x[row] for row in rows])


class _Gather(torch.autograd.Function):
    """x of every rank, [cp, ...]; the gradient of a rank's own x is the sum of what all ranks found for it."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        gathered = x.new_empty(group.size(), *x.shape)
        dist.all_gather_single(gathered.flatten(0, 1), x, group=group)
        return gathered

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        own = grad.new_empty(grad.shape[1:])
        dist.reduce_scatter_single(own, grad.contiguous().flatten(0, 1), group=ctx.group)
        return own, None
