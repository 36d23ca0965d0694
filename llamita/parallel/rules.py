"""Which logical axis of a weight lies on which mesh axis, what a rank then holds, and which layouts are possible.

Without torch and without a process group: the same arithmetic answers for 4 ranks and for 16,384.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import Any, Protocol

from llamita.parallel.layout import Layout

# Megatron's cut (arXiv 1909.08053, section 3): heads and ffn channels stay whole on a rank, so that a layer's first
# matrices are cut by rows, its last by columns, and one sum joins them. Between the two the residual stream is cut by
# tokens (arXiv 2205.05198, section 4.2.2). fsdp and cp then cut the rows of whatever a rank holds (FSDP2).
TABLE: dict[str, str | None] = {"vocab": "tp", "heads": "tp", "kv_heads": "tp", "ffn": "tp", "embed": None}


class Sizes(Protocol):
    """What is asked of a model's shape."""

    @property
    def dim(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def ffn_dim(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def tied(self) -> bool: ...


def cut_dim(axes: Sequence[str], table: Mapping[str, str | None] = TABLE) -> int | None:
    """The dimension of a weight that tp cuts; None where every rank holds all of it.

    Raises ValueError for an axis that is not in the table, and where two of a weight's axes would be cut.
    """
    unknown = [axis for axis in axes if axis not in table]
    if unknown:
        raise ValueError(f"axis {unknown[0]!r} is not in parallel.rules.TABLE, which has {', '.join(table)}")
    cut = [dim for dim, axis in enumerate(axes) if table[axis] == "tp"]
    if len(cut) > 1:
        raise ValueError(f"tp would cut both axes of a weight {tuple(axes)}: only one may lie on it")
    return cut[0] if cut else None


def walk(model: Any) -> Iterator[tuple[str, Any, str, tuple[str, ...]]]:
    """Every weight that is here, by the modules' own `AXES`: (name, its module, the weight's name there, axes).

    Layers that live on another pipeline stage are None and are passed over; a tied weight comes once for each use.
    """
    for prefix, module in model.named_modules():
        for part, axes in getattr(module, "AXES", {}).items():
            owner, leaf = (module, part) if part in module._parameters else (getattr(module, part), "weight")
            if owner is not None:
                path = [prefix, *([part] if owner is not module else []), leaf]
                yield ".".join(filter(None, path)), owner, leaf, axes


def local_slices(size: Sequence[int], axes: Sequence[str], layout: Layout, rank: int) -> tuple[range, ...]:
    """What a rank holds of a weight, a range for each dimension: tp cuts its own dimension evenly, then fsdp x cp cut
    the rows that are left into pieces of equal length, of which the last may be shorter or empty (as torch.chunk does).
    """
    at = layout.coordinates(rank)
    held = [range(length) for length in size]
    dim = cut_dim(axes)
    if dim is not None:
        held[dim] = _piece(held[dim], at["tp"], layout.tp)
    held[0] = _piece(held[0], at["fsdp"] * layout.cp + at["cp"], layout.fsdp * layout.cp)
    return tuple(held)


def weights(model: Any) -> list[tuple[str, tuple[int, ...], tuple[str, ...]]]:
    """Name, size and axes of every weight of a whole model (on the meta device it costs no memory), tied ones once."""
    found: dict[int, tuple[str, tuple[int, ...], tuple[str, ...]]] = {}
    for name, module, leaf, axes in walk(model):
        weight = getattr(module, leaf)
        found.setdefault(id(weight), (name, tuple(weight.shape), axes))
    return list(found.values())


def _piece(whole: range, index: int, pieces: int) -> range:
    length = -(-len(whole) // pieces)
    return whole[index * length : (index + 1) * length]


def check(layout: Layout, shape: Sizes, *, seq_len: int, batch_size: int, micro_batch_size: int) -> None:
    """Refuse a layout (resolved, fsdp not 0) that cannot hold or feed the model, in one line with what is possible.

    `batch_size` and `micro_batch_size` are rows of the whole step and of one forward pass on one rank. ValueError.
    """
    _check_tp(layout, shape)
    _check_pp(layout, shape)
    pieces = 2 * layout.cp * layout.tp if layout.cp > 1 else layout.tp
    if seq_len % pieces:
        cut = "2 x cp x tp" if layout.cp > 1 else "tp"
        raise ValueError(
            f"data.seq_len {seq_len} is cut into {cut} = {pieces} equal pieces: use {_around(seq_len, pieces)}"
        )
    if layout.compile and (layout.cp > 1 or (layout.pp > 1 and layout.schedule == "zero-bubble")):
        raise ValueError("parallel.compile is not proven with cp or with a zero-bubble pipeline: leave it false")
    if layout.pp > 1:
        _check_pipeline_rows(layout, batch_size, micro_batch_size)
    elif batch_size < layout.num_data_ranks:
        raise ValueError(
            f"batch_size {batch_size} has no row for each of dp x fsdp = {layout.num_data_ranks} ranks: use "
            f"{layout.num_data_ranks} or more"
        )


def _check_pipeline_rows(layout: Layout, batch_size: int, micro_batch_size: int) -> None:
    """A pipeline takes micro-batches of one size, as many as its schedule can run."""
    each = layout.num_data_ranks * micro_batch_size
    if batch_size % each:
        raise ValueError(
            f"batch_size {batch_size} is not a multiple of dp x fsdp x micro_batch_size = {each}: "
            f"use {_around(batch_size, each)}"
        )
    micro_batches = batch_size // each
    if not _fills(layout, micro_batches):
        enough = next(more for more in count(micro_batches) if _fills(layout, more))
        raise ValueError(
            f"parallel.schedule {layout.schedule} cannot run {micro_batches} micro-batches a step through pp "
            f"{layout.pp}: use batch_size {enough * each}, which makes {enough}"
        )


def _fills(layout: Layout, micro_batches: int) -> bool:
    """Whether torch.distributed.pipelining's schedule takes so many micro-batches."""
    if layout.schedule == "1f1b":
        return micro_batches >= layout.pp
    return micro_batches % max(1, micro_batches // layout.pp) == 0  # in rounds of equal size, each of pp or a few more


def _check_tp(layout: Layout, shape: Sizes) -> None:
    sizes = {name: getattr(shape, name) for name in ("num_kv_heads", "num_heads", "ffn_dim", "vocab_size")}
    uneven = [f"shape.{name} {size}" for name, size in sizes.items() if size % layout.tp]
    if uneven:
        fitting = [tp for tp in range(1, shape.num_kv_heads + 1) if not any(size % tp for size in sizes.values())]
        nearest = min(fitting, key=lambda tp: (abs(tp - layout.tp), tp))
        raise ValueError(
            f"parallel.tp {layout.tp} does not divide {' and '.join(uneven)}: use tp {nearest}; possible are "
            f"{', '.join(map(str, fitting))}, since every rank needs whole KV heads"
        )


def _check_pp(layout: Layout, shape: Sizes) -> None:
    if layout.pp == 1:
        return
    if shape.tied:
        raise ValueError(
            f"parallel.pp {layout.pp} puts the embedding on the first stage and the head on the last, but shape.tied "
            "makes them one weight: use pp 1, or shape.tied false"
        )
    stages = layout.pp * layout.stages_per_rank
    if stages > shape.num_layers:
        most = max(1, shape.num_layers // layout.stages_per_rank)
        raise ValueError(
            f"parallel.pp {layout.pp} with schedule {layout.schedule} makes {stages} stages of "
            f"{shape.num_layers} layers: use pp {most} or less"
        )


def _around(value: int, step: int) -> str:
    """The multiples of `step` on both sides of `value`, in words."""
    below = value // step * step
    return f"{below} or {below + step}" if below else f"{below + step}"
