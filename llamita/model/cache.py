"""The KV cache: an `attend` that remembers the keys and values of every token a row has seen.

Shapes: B rows, T new tokens, S slots in use, K KV heads, G query heads of one KV head, N = K * G query heads,
H head_dim.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from llamita.kernels.attention import row_positions, sdpa
from llamita.model.shape import Shape


class KVCache:
    """Room for `max_len` tokens in each of `batch_size` rows; each row has a length of its own.

    Prompts of mixed lengths are padded on the right and read in one pass, then `advance` counts each row's
    real tokens. A pad's slot lies beyond its row's length, so no query sees it, and the row's next token
    overwrites it: a row's result does not depend on its neighbours.
    """

    def __init__(self, shape: Shape, batch_size: int, max_len: int, dtype: torch.dtype, device: torch.device | str):
        size = (batch_size, max_len, shape.num_kv_heads, shape.head_dim)
        self.max_len = max_len
        self.lengths = [0] * batch_size
        # Zeros: a hidden slot is weighted with 0, but 0 times the NaN that fresh memory may hold is NaN.
        self.keys = [torch.zeros(size, dtype=dtype, device=device) for _ in range(shape.num_layers)]
        self.values = [torch.zeros(size, dtype=dtype, device=device) for _ in range(shape.num_layers)]

    @property
    def num_bytes(self) -> int:
        return sum(x_BSKH.nbytes for x_BSKH in self.keys + self.values)

    def positions(self, tokens_BT: Tensor) -> Tensor:
        """Where the new tokens lie, [B or 1, T]; also decides, once for all layers, what they see.

        Raises ValueError when the longest row has no room for T more tokens.
        """
        batch_size, seq_len = tokens_BT.shape
        assert batch_size == len(self.lengths), "the cache has another number of rows than the tokens"
        start, self.end = max(self.lengths), max(self.lengths) + seq_len
        if self.end > self.max_len:
            raise ValueError(
                f"{self.end} tokens do not fit into a KV cache of {self.max_len}:"
                " shorten the text or use a model with a larger max_seq_len"
            )
        self.causal = start == 0
        if min(self.lengths) == start:
            positions_BT = start + row_positions(tokens_BT)
            self.where: tuple = (slice(None), slice(start, self.end))
        else:
            lengths_B = torch.tensor(self.lengths, device=tokens_BT.device)
            positions_BT = lengths_B.unsqueeze(1) + row_positions(tokens_BT)
            self.where = (torch.arange(batch_size, device=tokens_BT.device).unsqueeze(1), positions_BT)
        self.mask = None
        if positions_BT.shape != (1, 1) and not self.causal:
            slots_S = torch.arange(self.end, device=tokens_BT.device)
            self.mask = (slots_S <= positions_BT.unsqueeze(-1)).unsqueeze(1)
        return positions_BT

    def __call__(self, layer: int, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor) -> Tensor:
        batch_size, seq_len, num_heads, _ = q_BTNH.shape
        if self.keys[layer].dtype != k_BTKH.dtype:  # sharded weights are gathered, and so computed with, in bfloat16
            self.keys[layer], self.values[layer] = (x[layer].to(k_BTKH.dtype) for x in (self.keys, self.values))
        self.keys[layer][self.where] = k_BTKH
        self.values[layer][self.where] = v_BTKH
        k_BSKH, v_BSKH = self.keys[layer][:, : self.end], self.values[layer][:, : self.end]
        if seq_len > 1:
            return sdpa(q_BTNH, k_BSKH, v_BSKH, causal=self.causal, mask=self.mask)
        # The heads that share a KV head read it as if they were tokens: 6 times as fast as enable_gqa in
        # bfloat16, 5% in float32 (measured: CPU, 1 thread, S 1024, K 4, G 3, H 64).
        q_BGKH = q_BTNH.unflatten(2, (k_BSKH.shape[2], -1)).squeeze(1).transpose(1, 2)
        out_BGKH = sdpa(q_BGKH, k_BSKH, v_BSKH, mask=self.mask)
        return out_BGKH.transpose(1, 2).reshape(batch_size, 1, num_heads, -1)

    def advance(self, counts: Sequence[int]) -> None:
        """Count the real tokens (no pads) that each row gained in the last pass."""
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]

    def keep(self, rows: Sequence[int]) -> None:
        """Make the cache consist of these rows, in this order; a row may be named more than once."""
        self.lengths = [self.lengths[row] for row in rows]
        for tensors in (self.keys, self.values):
            for layer, x_BSKH in enumerate(tensors):
                tensors[layer] = x_BSKH[list(rows)]
