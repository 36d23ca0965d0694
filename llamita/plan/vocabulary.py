"""Which vocabulary a shape should have: parameters, FLOPs, memory and predicted loss for each size.

The prediction is Chinchilla's law read in bytes of text. At equal compute a vocabulary decides how many bytes are
seen: bytes per token, measured, over FLOPs per token. That is the second of three approaches of "Scaling Laws with
Vocabulary" (Tao et al. 2024, arXiv 2407.13623, section 4.2), which all find nearly the same optimum; the third, their
parametric law, is given beside it as another opinion.
"""

import dataclasses
import math
from dataclasses import dataclass

import numpy as np

from llamita.model.shape import Shape

# L = E + A / N^alpha + B / D^beta in nats a token: Besiroglu et al. 2024 (arXiv 2404.10102), a refit of Hoffmann et
# al. 2022, whose models have a vocabulary of 32,000. Bytes a token of their text: assumed, between the 3.8 of its web
# and book shares and the 4.5 of the whole (Rae et al. 2021, arXiv 2112.11446, table A.3: 10.5 TB in 2,350B tokens).
CHINCHILLA_E, CHINCHILLA_A, CHINCHILLA_ALPHA, CHINCHILLA_B, CHINCHILLA_BETA = 1.8172, 482.01, 0.3478, 2085.43, 0.3658
CHINCHILLA_VOCAB, CHINCHILLA_BYTES_PER_TOKEN = 32_000, 4.0

# L_u = -E + A1 / N^beta + A2 / Nv^alpha2 + B / D^beta, N and Nv in millions, D in billions of tokens: Tao et al. 2024,
# section 4.3, with the digits of their published script.
TAO_A2, TAO_ALPHA2, TAO_B, TAO_BETA = 0.19584, 0.67074, 2.12411, 0.44661

FITTED_FLOPS = 1e18  # about the smallest of the runs behind the law

TOKENS_PER_PARAM = 20  # Hoffmann et al. 2022: about compute-optimal
TRAIN_BYTES_PER_PARAM = 16  # weight, gradient and AdamW's two moments in float32
KIB = 1024


@dataclass(frozen=True)
class Measured:
    """What encoding held-out text with a vocabulary gave. `counts` (ranks,) int64: how often each was used."""

    vocab_size: int
    num_bytes: int
    counts: np.ndarray

    @property
    def bytes_per_token(self) -> float:
        return self.num_bytes / int(self.counts.sum())


@dataclass(frozen=True)
class Size:
    """A vocabulary size for a shape at a budget of training compute."""

    vocab_size: int
    num_params: int
    embedding_share: float
    bytes_per_token: float
    train_flops_per_byte: float
    decode_flops_per_byte: float
    train_memory_bytes: int
    file_bytes: int
    """Weights in bfloat16."""
    kv_bytes_per_kib: float
    """KV cache for 1,024 bytes of text, in bfloat16."""
    budget_tokens: float
    budget_bytes: float
    unused: float
    """Share of the entries that the held-out text does not use."""
    bits_per_byte: float


def default_flops(shape: Shape) -> float:
    """Training FLOPs of TOKENS_PER_PARAM tokens for each parameter of the shape as it is."""
    return TOKENS_PER_PARAM * shape.num_params * shape.train_flops_per_token(shape.max_seq_len)


def predicted_bits_per_byte(shape: Shape, num_bytes: float) -> float:
    """Bits per byte of a shape trained on `num_bytes` of text, by Chinchilla's law; its vocabulary plays no part."""
    params = dataclasses.replace(shape, vocab_size=CHINCHILLA_VOCAB, tied=True).num_params
    tokens = num_bytes / CHINCHILLA_BYTES_PER_TOKEN
    nats = CHINCHILLA_E + CHINCHILLA_A / params**CHINCHILLA_ALPHA + CHINCHILLA_B / tokens**CHINCHILLA_BETA
    return nats / CHINCHILLA_BYTES_PER_TOKEN / math.log(2)


def size(shape: Shape, measured: Measured, flops: float) -> Size:
    """The row of one vocabulary; `flops` is the training budget."""
    shape = dataclasses.replace(shape, vocab_size=measured.vocab_size)
    per_token, seq_len = measured.bytes_per_token, shape.max_seq_len
    train_flops = shape.train_flops_per_token(seq_len)
    budget_tokens = flops / train_flops
    return Size(
        vocab_size=shape.vocab_size,
        num_params=shape.num_params,
        embedding_share=shape.vocab_size * shape.dim * (1 if shape.tied else 2) / shape.num_params,
        bytes_per_token=per_token,
        train_flops_per_byte=train_flops / per_token,
        decode_flops_per_byte=shape.forward_flops_per_token(seq_len) / per_token,
        train_memory_bytes=TRAIN_BYTES_PER_PARAM * shape.num_params,
        file_bytes=2 * shape.num_params,
        kv_bytes_per_kib=shape.kv_bytes_per_token() * KIB / per_token,
        budget_tokens=budget_tokens,
        budget_bytes=budget_tokens * per_token,
        unused=float((measured.counts == 0).mean()),
        bits_per_byte=predicted_bits_per_byte(shape, budget_tokens * per_token),
    )


def tao_optimum(shape: Shape, flops: float) -> int:
    """The vocabulary that minimizes Tao et al.'s parametric law for the shape's trunk at `flops` of training."""
    trunk = shape.num_layers * shape.params_per_layer + shape.dim
    sizes = np.exp(np.linspace(math.log(512), math.log(2**20), 4000))
    vocab = sizes * shape.dim
    tokens = flops / (6 * (trunk + vocab))
    loss = TAO_A2 / (vocab / 1e6) ** TAO_ALPHA2 + TAO_B / (tokens / 1e9) ** TAO_BETA
    return round(float(sizes[loss.argmin()]))


@dataclass(frozen=True)
class Advice:
    """The rows, the size that is recommended, and why, in sentences."""

    sizes: list[Size]
    flops: float
    recommended: int
    reasons: list[str]


def advise(shape: Shape, measured: list[Measured], flops: float) -> Advice:
    """Compare vocabularies at equal training compute. ValueError when there is none to compare."""
    if not measured:
        raise ValueError("no vocabulary to compare: give smaller sizes, or more text")
    rows = sorted((size(shape, each, flops) for each in measured), key=lambda row: row.vocab_size)
    best = min(rows, key=lambda row: row.bits_per_byte)
    reasons = [
        f"{best.vocab_size:,} entries give the lowest predicted loss at equal compute, {best.bits_per_byte:.4f} bits "
        f"per byte: {best.train_flops_per_byte:.3g} FLOPs to train on a byte, {best.embedding_share:.0%} of "
        f"{best.num_params / 1e6:,.1f}M parameters in embeddings"
    ]
    for row, words in ((_before(rows, best), "smaller"), (_after(rows, best), "larger")):
        if row:
            reasons.append(
                f"{row.vocab_size:,}, the next {words}: "
                f"{_change(row.bits_per_byte, best.bits_per_byte)} bits per byte, "
                f"{_change(row.num_params, best.num_params)} parameters, "
                f"{_change(1 / row.bytes_per_token, 1 / best.bytes_per_token)} tokens for the same text"
            )
    if flops < FITTED_FLOPS:
        reasons.append(
            f"{flops:.2g} FLOPs are below the {FITTED_FLOPS:.0e} that the law was fitted from: take the order of the "
            "sizes with care and the losses not at all (at 8e12 FLOPs, twice the predicted size was best: LOG.md)"
        )
    reasons.append(f"Tao et al.'s law of vocabularies puts the optimum at {tao_optimum(shape, flops):,} for this trunk")
    return Advice(rows, flops, best.vocab_size, reasons)


def _before(rows: list[Size], best: Size) -> Size | None:
    return rows[rows.index(best) - 1] if best != rows[0] else None


def _after(rows: list[Size], best: Size) -> Size | None:
    return rows[rows.index(best) + 1] if best != rows[-1] else None


def _change(value: float, base: float) -> str:
    return f"{value / base - 1:+.1%}"
