"""Which rank does what: plain arithmetic over five axes, without torch, so that it holds for 16,384 ranks on a laptop.

Axes from the outermost to the innermost, whose ranks are neighbours and talk most: pipeline (pp), copies that are
reduced only once a step (dp), shards of one copy (fsdp), pieces of a sequence (cp), pieces of a matrix (tp).
"""

from dataclasses import dataclass, replace
from math import prod
from typing import Literal

AXES = ("pp", "dp", "fsdp", "cp", "tp")


@dataclass(frozen=True)
class Layout:
    """How many ranks each axis has; their product is the world."""

    pp: int = 1
    """Pipeline: stages of layers, one after another."""
    dp: int = 1
    """Copies of the sharded model, gradients summed over them (with fsdp: HSDP)."""
    fsdp: int = 0
    """Ranks that share one copy of weights, gradients and optimizer; 0 is all ranks that the other axes leave."""
    cp: int = 1
    """Context: pieces of each sequence."""
    tp: int = 1
    """Tensor: pieces of each matrix, with the sequence cut between."""
    schedule: Literal["1f1b", "interleaved", "zero-bubble"] = "1f1b"
    """Order of forward and backward passes in the pipeline."""
    recompute: bool = False
    """Keep only each layer's input, and compute the rest again in the backward pass: less memory, a third more work."""
    compile: bool = False
    """torch.compile of every layer."""

    def __post_init__(self) -> None:
        for axis in AXES:
            if getattr(self, axis) < (axis != "fsdp"):
                raise ValueError(f"parallel.{axis} must be at least 1, not {getattr(self, axis)}")

    def resolved(self, world: int) -> "Layout":
        """With fsdp filled in. Raises ValueError, with what fits, where the axes do not make up the world."""
        others = self.pp * self.dp * self.cp * self.tp
        layout = replace(self, fsdp=world // others) if self.fsdp == 0 and world >= others else self
        if layout.world != world:
            asked = " x ".join(f"{axis} {size}" for axis, size in self.sizes.items() if size > 1) or "one rank"
            raise ValueError(
                f"{asked} makes {others * max(self.fsdp, 1)} ranks, and {world} are running: start as many with "
                "torchrun --nproc-per-node, or let the other axes divide them"
                + " and parallel.fsdp be 0"
                * bool(self.fsdp)
            )
        return layout

    @property
    def sizes(self) -> dict[str, int]:
        return {axis: getattr(self, axis) for axis in AXES}

    @property
    def world(self) -> int:
        return prod(self.sizes.values())

    def coordinates(self, rank: int) -> dict[str, int]:
        """Where a rank stands on each axis."""
        found = {}
        for axis in reversed(AXES):
            rank, found[axis] = divmod(rank, getattr(self, axis))
        return {axis: found[axis] for axis in AXES}

    def rank_of(self, coordinates: dict[str, int]) -> int:
        rank = 0
        for axis in AXES:
            rank = rank * getattr(self, axis) + coordinates[axis]
        return rank

    @property
    def is_whole(self) -> bool:
        """Whether each rank has a whole forward pass: weights may be sharded, layers, rows and matrices are not cut."""
        return self.pp == self.cp == self.tp == 1

    @property
    def stages_per_rank(self) -> int:
        """Stages of the pipeline that each rank of pp holds."""
        return 1 if self.schedule == "1f1b" else 2

    @property
    def num_data_ranks(self) -> int:
        """Groups of ranks that read rows of their own."""
        return self.dp * self.fsdp

    def data_rank(self, rank: int) -> int:
        """Which part of every batch a rank reads; its neighbours along pp, cp and tp read the same."""
        at = self.coordinates(rank)
        return at["dp"] * self.fsdp + at["fsdp"]
