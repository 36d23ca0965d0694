"""Muon's orthogonalization, of matrices that are whole and of matrices that are cut over ranks.

A cut matrix is brought to one rank, orthogonalized there and sent back as shards, a matrix for every rank in each round
(largest first, so that the matrices of a round are of one size). Of N weights on W ranks each rank orthogonalizes and
sends 2 N / W values a step, and as many come in, bf16. Gathering everything everywhere would bring in N values, send
none back, and do the whole work W times. Copies of the model (dp) repeat the work.

Shapes: R rows, C columns of a whole matrix.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # steepest at 0: singular values come between 0.7 and 1.2, not exactly to 1
STEPS = 5
TINY = 1e-7


def orthogonalized(x_RC: Tensor) -> Tensor:
    """The matrix with its singular values brought near 1: five Newton-Schulz steps of an odd polynomial of degree 5
    (Keller Jordan's Muon, github.com/KellerJordan/Muon), in the matrix's own dtype."""
    a, b, c = COEFFICIENTS
    is_tall = x_RC.shape[0] > x_RC.shape[1]
    x = x_RC.mT if is_tall else x_RC
    x = x / x.norm().clamp(min=TINY)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


class Box(NamedTuple):
    """Which part of a whole matrix a rank holds."""

    first_row: int
    first_column: int
    rows: int
    columns: int

    @property
    def size(self) -> int:
        return self.rows * self.columns

    def of(self, whole_RC: Tensor) -> Tensor:
        rows = slice(self.first_row, self.first_row + self.rows)
        return whole_RC[rows, self.first_column : self.first_column + self.columns]


class Cut:
    """Matrices that are cut over the same ranks of a process group."""

    def __init__(self, group: dist.ProcessGroup, weights: dict[str, DTensor]):
        self.group = group
        self.sizes = {name: weight.shape for name, weight in weights.items()}
        self.names = sorted(weights, key=lambda name: (-weights[name].numel(), name))
        mine = {}
        for name, weight in weights.items():
            (chunk,) = weight.__create_chunk_list__()
            mine[name] = Box(*chunk.offsets, *chunk.sizes)
        boxes: list = [None] * group.size()
        dist.all_gather_object(boxes, mine, group)
        self.boxes: list[dict[str, Box]] = boxes

    def __call__(self, updates: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """The rank's shards of the updates [rows, columns] -> its shards of what they become, one by one."""
        names = [name for name in self.names if name in updates]
        for first in range(0, len(names), self.group.size()):
            yield from self._round(names[first : first + self.group.size()], updates)

    def _round(self, names: list[str], updates: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        rank, world = self.group.rank(), self.group.size()
        shards = [self.boxes[rank][name] for name in names]
        held = [box.size for box in shards] + [0] * (world - len(names))
        sent = torch.cat([updates[name].flatten() for name in names])
        own = names[rank] if rank < len(names) else ""
        parts = [boxes[own] for boxes in self.boxes] if own else [Box(0, 0, 0, 0)] * world
        sizes = [box.size for box in parts]
        received = sent.new_empty(sum(sizes))
        dist.all_to_all_single(received, sent, sizes, held, self.group)
        if own:
            whole_RC = received.new_empty(self.sizes[own])
            for box, part in zip(parts, received.split(sizes), strict=True):
                box.of(whole_RC).copy_(part.view(box.rows, box.columns))
            whole_RC = orthogonalized(whole_RC)
            received = torch.cat([box.of(whole_RC).flatten() for box in parts])
        dist.all_to_all_single(sent, received, held, sizes, self.group)
        for name, box, part in zip(names, shards, sent.split(held), strict=False):
            yield name, part.view(box.rows, box.columns)


class Orthogonalizer:
    """Orthogonalizes updates of these weights, whole or cut; made by all ranks that share them, at the same time.

    The work is done in bf16, for float64 weights in float64.
    """

    def __init__(self, weights: dict[str, Tensor]):
        self.dtype = {
            name: torch.float64 if weight.dtype == torch.float64 else torch.bfloat16 for name, weight in weights.items()
        }
        together: dict[tuple, dict[str, DTensor]] = {}
        for name, weight in weights.items():
            axes = _axes(weight)
            if isinstance(weight, DTensor) and axes:
                together.setdefault(axes, {})[name] = weight
        self.cuts = [Cut(_group(cut, axes), cut) for axes, cut in together.items()]

    def __call__(self, updates: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Pairs of name and update, shaped as given, in no order."""
        ready = {name: update.to(self.dtype[name]) for name, update in updates.items()}
        for cut in self.cuts:
            yield from cut({name: ready.pop(name) for name in cut.names if name in ready})
        for name, update in ready.items():
            yield name, orthogonalized(update)


def _axes(weight: Tensor) -> tuple[str, ...]:
    """The axes of the mesh over which a weight is cut."""
    if not isinstance(weight, DTensor):
        return ()
    mesh = weight.device_mesh
    names = mesh.mesh_dim_names
    assert names is not None
    cut = zip(names, mesh.shape, weight.placements, strict=True)
    return tuple(name for name, size, placement in cut if size > 1 and not placement.is_replicate())


def _group(weights: dict[str, DTensor], axes: tuple[str, ...]) -> dist.ProcessGroup:
    mesh = next(iter(weights.values())).device_mesh
    return mesh.get_group(axes[0]) if len(axes) == 1 else mesh[axes]._flatten().get_group()
