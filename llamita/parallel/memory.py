"""Bytes that one rank needs to train, part by part, before anything is started.

Counted from what this package does: float32 weights, gradients and two AdamW moments in shards (ZeRO, arXiv 1910.02054,
section 5), layers gathered one after another in the compute dtype (FSDP2), activations as autograd keeps them. The
formula for activations follows arXiv 2205.05198, section 4, for a layer with SwiGLU, grouped queries and attention
without a table of scores. Left out: packed documents' second copy of attention's output, tables of rotary angles,
collectives' buffers and the allocator's gaps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod

from llamita.parallel.layout import Layout
from llamita.parallel.pipeline import layer_counts, stage_numbers
from llamita.parallel.rules import Sizes, local_slices

WIDE = 4  # bytes of float32: kept weights, gradients, moments, what a norm reads, logits
Weights = Sequence[tuple[str, tuple[int, ...], tuple[str, ...]]]


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank."""

    weights: int
    gradients: int
    optimizer: int
    gathered: int
    """Whole layers, and embedding, head and last norm, in the compute dtype, with the gradient of one layer."""
    activations: int
    head: int
    """Hidden states, their gradient, the head's gradient and a chunk of logits; on the last stage."""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.gathered + self.activations + self.head


def memory(
    weights: Weights,
    shape: Sizes,
    layout: Layout,
    rank: int,
    *,
    seq_len: int,
    micro_batch_size: int,
    micro_batches: int = 1,
    compute_bytes: int = 2,
) -> Memory:
    """What `rank` needs. `weights` is `rules.weights(model)`; `micro_batches` are a step's, of `micro_batch_size` rows.

    `compute_bytes` are those of an activation: 2 for bfloat16.
    """
    held = _held(weights, shape.num_layers, layout, rank)
    shards = sum(prod(map(len, local_slices(size, axes, layout, rank))) for _, size, axes in held)
    tokens = micro_batch_size * seq_len // layout.cp
    layer = activations(shape, layout, tokens, compute_bytes)
    layers = _layers_in_flight(shape.num_layers, layout, rank, micro_batches)
    layer_input = tokens * compute_bytes * shape.dim // layout.tp
    stages = stage_numbers(layout, layout.coordinates(rank)["pp"])
    last = layout.pp * layout.stages_per_rank - 1 in stages
    return Memory(
        weights=WIDE * shards,
        gradients=WIDE * shards,
        optimizer=2 * WIDE * shards,
        gathered=_gathered(held, layout, compute_bytes),
        activations=layers * layer_input + layer if layout.recompute else layers * layer,
        head=_head(shape, layout, tokens, compute_bytes) if last else 0,
    )


def activations(shape: Sizes, layout: Layout, tokens: int, compute_bytes: int = 2) -> int:
    """Bytes that one layer keeps of so many tokens for its backward pass, nothing recomputed.

    In compute dtype the two normed inputs (whole on every tp rank), queries, keys, values, attention's output, and four
    tensors of ffn_dim; wide the two norms' inputs and attention's log-sum-exp.
    """
    kv_dim = shape.num_kv_heads * (shape.dim // shape.num_heads)
    cut = compute_bytes * (2 * shape.dim + 2 * kv_dim + 4 * shape.ffn_dim) + WIDE * (2 * shape.dim + shape.num_heads)
    return tokens * (cut // layout.tp + compute_bytes * 2 * shape.dim)


def _held(weights: Weights, num_layers: int, layout: Layout, rank: int) -> Weights:
    """The weights of a rank's stages."""
    if layout.pp == 1:
        return weights
    num_stages = layout.pp * layout.stages_per_rank
    borders = [0, *accumulate(layer_counts(num_layers, num_stages))]
    stages = stage_numbers(layout, layout.coordinates(rank)["pp"])
    layers = {layer for stage in stages for layer in range(borders[stage], borders[stage + 1])}

    def is_here(name: str) -> bool:
        if name.startswith("layers."):
            return int(name.split(".")[1]) in layers
        return (0 if name.startswith("tok_embeddings") else num_stages - 1) in stages

    return [weight for weight in weights if is_here(weight[0])]


def _layers_in_flight(num_layers: int, layout: Layout, rank: int, micro_batches: int) -> int:
    """Layers whose activations are kept at once, each micro-batch's counted.

    Passes forward before the first backward pass: pp - i for stage i of 1F1B (arXiv 2104.04473, section 2.2.1), as
    Megatron counts them when interleaved (section 2.2.2), and 2 pp half stages with zero bubble (counted in torch's).
    """
    at, pp, stages = layout.coordinates(rank)["pp"], layout.pp, layout.stages_per_rank
    ahead = {"1f1b": pp - at, "interleaved": 2 * (pp - at - 1) + (stages - 1) * pp + 1, "zero-bubble": 2 * pp}
    passes = min(ahead[layout.schedule], micro_batches * stages)
    largest = max(layer_counts(num_layers, pp * stages)[stage] for stage in stage_numbers(layout, at))
    return passes * largest


def _gathered(held: Weights, layout: Layout, compute_bytes: int) -> int:
    """What is outside of layers stays gathered; of the layers one computes and the next is on its way, and one has a
    whole gradient, which is summed in float32."""
    sizes: dict[str, int] = {}
    for name, size, _axes in held:
        group = ".".join(name.split(".")[:2]) if name.startswith("layers.") else ""
        sizes[group] = sizes.get(group, 0) + prod(size) // layout.tp
    layer = max((count for group, count in sizes.items() if group), default=0)
    return compute_bytes * (sizes.get("", 0) + 2 * layer) + (compute_bytes + WIDE) * max(layer, sizes.get("", 0))


def _head(shape: Sizes, layout: Layout, tokens: int, compute_bytes: int) -> int:
    vocabulary = shape.vocab_size // layout.tp
    chunk = min(tokens, max(512, 2**21 // vocabulary)) * vocabulary * (WIDE + WIDE + compute_bytes)
    return chunk + WIDE * vocabulary * shape.dim + tokens * shape.dim * (WIDE // layout.tp + 2 * compute_bytes)
