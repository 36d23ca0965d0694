"""The shape of a Llama 3 as data: presets, and exact counts of parameters, FLOPs and bytes."""

import dataclasses
from dataclasses import dataclass
from typing import Any

# Bounds far above any Llama, so that nothing is computed of a shape that no machine holds.
MAX_LAYERS, MAX_SIZE = 4096, 1 << 24


def _in_float32(*numbers: float) -> bool:
    """Whether all are above 0 and still finite and above 0 in float32, in which others store them and compute."""
    return all(1e-37 <= number <= 1e38 for number in numbers)


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's frequency scaling (llama-models, `apply_scaling`; config key `rope_type: llama3`)."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192

    def __post_init__(self) -> None:
        whole = 1 <= self.original_max_seq_len <= MAX_SIZE
        numbers = _in_float32(self.factor, self.low_freq_factor, self.high_freq_factor)
        if not (whole and numbers and self.low_freq_factor < self.high_freq_factor):
            raise ValueError(
                "rope_scaling needs factors above 0 within float32, low_freq_factor < high_freq_factor and "
                f"original_max_seq_len from 1 to {MAX_SIZE}: {self}"
            )


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Everything that decides the tensors of a Llama 3, and nothing else.

    Raises ValueError for a shape that cannot be built. Llama 3 paper (arXiv 2407.21783), Table 3.
    """

    dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    ffn_dim: int
    vocab_size: int
    tied: bool = True
    max_seq_len: int = 8192
    rope_theta: float = 500_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for name in (
            "dim",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "ffn_dim",
            "vocab_size",
            "max_seq_len",
        ):
            value, most = getattr(self, name), MAX_LAYERS if name == "num_layers" else MAX_SIZE
            if not 1 <= value <= most:
                raise ValueError(f"shape.{name} must be from 1 to {most}, got {value}")
        if not _in_float32(self.rope_theta, self.norm_eps):
            raise ValueError(
                f"shape.rope_theta {self.rope_theta} and shape.norm_eps {self.norm_eps} must be above 0 within float32"
            )
        if self.dim % self.num_heads:
            raise ValueError(f"shape.dim {self.dim} is not divisible by shape.num_heads {self.num_heads}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"shape.num_heads {self.num_heads} is not divisible by shape.num_kv_heads {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd, but RoPE turns pairs: change shape.dim or num_heads")

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def params_per_layer(self) -> int:
        attention = 2 * self.dim * self.dim + 2 * self.dim * self.num_kv_heads * self.head_dim
        return attention + 3 * self.dim * self.ffn_dim + 2 * self.dim

    @property
    def num_params(self) -> int:
        """Exact number of weights; a tied head is counted once."""
        embeddings = self.vocab_size * self.dim * (1 if self.tied else 2)
        return embeddings + self.num_layers * self.params_per_layer + self.dim

    @property
    def num_matmul_params(self) -> int:
        """Weights that each token is multiplied with: all but the norms and the embedding look-up."""
        norms = self.num_layers * 2 * self.dim
        return self.num_layers * self.params_per_layer - norms + self.vocab_size * self.dim

    def forward_flops(self, tokens: int, pairs: float) -> float:
        """FLOPs of a forward pass over `tokens` tokens that see `pairs` keys in all: L (L + 1) / 2 in a document of L
        tokens, each of which sees itself and those before it.

        2 per weight and token, and 2 (QK^T) + 2 (AV) per layer, channel and pair. The head is counted; the embedding
        look-up, norms, rotations and softmax are not.
        """
        return 2 * self.num_matmul_params * tokens + 4 * self.num_layers * self.dim * pairs

    def forward_flops_per_token(self, seq_len: int) -> float:
        """FLOPs of one token's forward pass, averaged over a causal row of `seq_len` tokens."""
        return self.forward_flops(1, (seq_len + 1) / 2)

    def train_flops_per_token(self, seq_len: int) -> float:
        """Forward and backward: three times the forward pass, the causal half counted once."""
        return 3 * self.forward_flops_per_token(seq_len)

    def kv_bytes_per_token(self, bytes_per_value: int = 2) -> int:
        """Bytes of KV cache that one token of context costs (bf16 by default)."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * bytes_per_value


def _llama31(**fields: Any) -> Shape:
    defaults: dict[str, Any] = dict(vocab_size=128_256, tied=False, max_seq_len=131_072, rope_scaling=RopeScaling())
    return Shape(**(defaults | fields))


# Meta's from Table 3 of the paper and the 3.2 model cards; ours have every width divisible by 256, the super-block of
# llama.cpp's k-quants, which SmolLM's 576 and 960 miss.
PRESETS: dict[str, Shape] = {
    "tiny": Shape(dim=256, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=512, vocab_size=1024, max_seq_len=512),
    "demo": Shape(dim=256, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=768, vocab_size=4096, max_seq_len=256),
    "100m": Shape(dim=768, num_layers=12, num_heads=12, num_kv_heads=4, ffn_dim=2048, vocab_size=32_768),
    "1b": Shape(dim=2048, num_layers=16, num_heads=32, num_kv_heads=8, ffn_dim=7168, vocab_size=65_536),
    "llama3-8b": _llama31(
        dim=4096, num_layers=32, num_heads=32, num_kv_heads=8, ffn_dim=14_336, max_seq_len=8192, rope_scaling=None
    ),
    "llama3.1-8b": _llama31(dim=4096, num_layers=32, num_heads=32, num_kv_heads=8, ffn_dim=14_336),
    "llama3.1-70b": _llama31(dim=8192, num_layers=80, num_heads=64, num_kv_heads=8, ffn_dim=28_672),
    "llama3.1-405b": _llama31(dim=16_384, num_layers=126, num_heads=128, num_kv_heads=8, ffn_dim=53_248),
    "llama3.2-1b": _llama31(
        dim=2048, num_layers=16, num_heads=32, num_kv_heads=8, ffn_dim=8192, tied=True,
        rope_scaling=RopeScaling(factor=32.0),
    ),
    "llama3.2-3b": _llama31(
        dim=3072, num_layers=28, num_heads=24, num_kv_heads=8, ffn_dim=8192, tied=True,
        rope_scaling=RopeScaling(factor=32.0),
    ),
}  # fmt: skip


def preset(name: str, **changes) -> Shape:
    """The named shape with `changes` applied. Raises ValueError that lists the names for an unknown one."""
    if name not in PRESETS:
        raise ValueError(f"no shape is called {name!r}; there are: {', '.join(PRESETS)}")
    return dataclasses.replace(PRESETS[name], **changes)
