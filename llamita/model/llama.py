"""The Llama 3 model, whole, in Meta's names. It knows no mesh, no optimizer, no file and no environment.

Shapes: B rows, T tokens, D dim, N query heads, K KV heads, H head_dim, F ffn_dim, V vocab_size.
`AXES` names the logical axes of each weight as stored (out, in): sharding, optimizer groups and formats read them.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llamita.kernels.attention import Attend, Causal
from llamita.kernels.norm import rms_norm
from llamita.model import rope
from llamita.model.shape import Shape

INIT_ROWS = 256  # drawn from one key: a rank draws only the rows it holds, to within so many


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the mean taken in at least float32 (arXiv 1910.07467, equation 4)."""

    AXES = {"weight": ("embed",)}

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x_BTD: Tensor) -> Tensor:
        return rms_norm(x_BTD, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245) with rotary positions; who sees whom is `attend`'s business."""

    AXES = {
        "wq": ("heads", "embed"),
        "wk": ("kv_heads", "embed"),
        "wv": ("kv_heads", "embed"),
        "wo": ("embed", "heads"),
    }

    def __init__(self, shape: Shape):
        super().__init__()
        self.head_dim = shape.head_dim
        kv_dim = shape.num_kv_heads * shape.head_dim
        self.wq = nn.Linear(shape.dim, shape.dim, bias=False)
        self.wk = nn.Linear(shape.dim, kv_dim, bias=False)
        self.wv = nn.Linear(shape.dim, kv_dim, bias=False)
        self.wo = nn.Linear(shape.dim, shape.dim, bias=False)

    def forward(self, layer: int, x_BTD: Tensor, tables: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        q_BTNH = rope.rotate(self.wq(x_BTD).unflatten(-1, (-1, self.head_dim)), *tables)
        k_BTKH = rope.rotate(self.wk(x_BTD).unflatten(-1, (-1, self.head_dim)), *tables)
        v_BTKH = self.wv(x_BTD).unflatten(-1, (-1, self.head_dim))
        return self.wo(attend(layer, q_BTNH, k_BTKH, v_BTKH).flatten(-2))


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x) (arXiv 2002.05202, equation 6)."""

    AXES = {"w1": ("ffn", "embed"), "w3": ("ffn", "embed"), "w2": ("embed", "ffn")}

    def __init__(self, dim: int, ffn_dim: int):
        super().__init__()
        self.w1 = nn.Linear(dim, ffn_dim, bias=False)
        self.w2 = nn.Linear(ffn_dim, dim, bias=False)
        self.w3 = nn.Linear(dim, ffn_dim, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x_BTD)) * self.w3(x_BTD))


class TransformerBlock(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.attention = Attention(shape)
        self.feed_forward = FeedForward(shape.dim, shape.ffn_dim)
        self.attention_norm = RMSNorm(shape.dim, shape.norm_eps)
        self.ffn_norm = RMSNorm(shape.dim, shape.norm_eps)

    def forward(self, layer: int, x_BTD: Tensor, tables: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        x_BTD = x_BTD + self.attention(layer, self.attention_norm(x_BTD), tables, attend)
        return x_BTD + self.feed_forward(self.ffn_norm(x_BTD))


class Llama(nn.Module):
    """A Llama 3: tokens [B, T] int64 -> logits [B, T, V] (arXiv 2407.21783, section 3.2).

    `attend` decides positions and which keys each query sees: causal, packed documents, padding, or a KV cache.
    """

    AXES = {"tok_embeddings": ("vocab", "embed"), "output": ("vocab", "embed")}

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        self.tok_embeddings = nn.Embedding(shape.vocab_size, shape.dim)
        self.layers = nn.ModuleList(TransformerBlock(shape) for _ in range(shape.num_layers))
        self.norm = RMSNorm(shape.dim, shape.norm_eps)
        self.output = nn.Linear(shape.dim, shape.vocab_size, bias=False)
        if shape.tied:
            self.output.weight = self.tok_embeddings.weight
        self.freqs_P = rope.frequencies(shape)

    def hidden(self, tokens_BT: Tensor, attend: Attend) -> Tensor:
        """The normed residual stream [B, T, D] that the head reads."""
        return self.norm(self.through(self.tok_embeddings(tokens_BT), attend.positions(tokens_BT), attend))

    def through(self, x_BTD: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """The residual stream behind the layers that are here: all, or those of a pipeline's stage, others being None.

        `positions` [B or 1, T] is what `attend.positions` gave.
        """
        table_dtype = torch.float64 if x_BTD.dtype == torch.float64 else torch.float32
        tables = rope.tables(self.freqs_P, positions, table_dtype)
        for layer, block in enumerate(self.layers):
            if block is not None:
                x_BTD = block(layer, x_BTD, tables, attend)
        return x_BTD

    def forward(self, tokens_BT: Tensor, attend: Attend | None = None) -> Tensor:
        return self.output(self.hidden(tokens_BT, attend or Causal()))

    @torch.no_grad()
    def init_weights(self, seed: int) -> "Llama":
        """Draw every weight from `first_rows`."""
        for name, weight in self.named_parameters():
            weight.copy_(self.first_rows(name, weight.shape, range(len(weight)), seed))
        return self

    def first_rows(self, name: str, size: Sequence[int], rows: range, seed: int) -> Tensor:
        """Some rows of a weight before training, float32 on the CPU: the same whatever else is drawn, and wherever.

        Normal with std 0.02, cut at 3 std; what is added to the residual stream is drawn smaller by
        sqrt(2 * num_layers) (GPT-2 paper, section 2.3), so that depth does not change its scale. Norms start at 1.
        The Llama 3 paper names no initialization; 0.02 keeps the first loss of every preset at ln(vocab_size).
        """
        if len(size) == 1:
            return torch.ones(len(rows))
        std = 0.02 / (2 * self.shape.num_layers) ** 0.5 if name.endswith(("wo.weight", "w2.weight")) else 0.02
        blocks = range(rows.start // INIT_ROWS, -(-rows.stop // INIT_ROWS))
        drawn = torch.empty(len(blocks) * INIT_ROWS, size[1])
        for block, part in zip(blocks, drawn.split(INIT_ROWS), strict=True):
            digest = hashlib.blake2b(f"{seed} {name} {block}".encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))
            nn.init.trunc_normal_(part, std=std, a=-3 * std, b=3 * std, generator=generator)
        return drawn[rows.start - blocks.start * INIT_ROWS :][: len(rows)]


def build(shape: Shape, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Llama:
    """A Llama with uninitialized weights on `device` ("meta" costs no memory)."""
    with torch.device("meta"):
        model = Llama(shape).to(dtype)
    if str(device) == "meta":
        return model
    model = model.to_empty(device=device)
    if shape.tied:
        model.output.weight = model.tok_embeddings.weight
    return model
