"""The ranks that run as a mesh of five axes, from what torchrun told each process."""

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from llamita.parallel.layout import AXES, Layout

Made = TypeVar("Made")


def join(device_type: str) -> tuple[int, int]:
    """Join the world that torchrun started; this process's rank and the size of the world, (0, 1) where it is alone."""
    local_rank = dist.get_node_local_rank(fallback_rank=-1)
    if local_rank >= 0 and not dist.is_initialized():
        if device_type == "cuda":
            torch.cuda.set_device(local_rank)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo")
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def leave() -> None:
    """End this process's part in the world, if it is in one, once all have come so far: gloo ends a process whose peers
    left while it still talked to them."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def from_first_rank(value: Made) -> Made:
    """Rank 0's value on every rank; this one's own where it is alone."""
    if not dist.is_initialized():
        return value
    held = [value]
    dist.broadcast_object_list(held, src=0)
    return held[0]


def first_rank_first(make: Callable[[], Made]) -> Made:
    """What `make` gives, on every rank; the others wait until rank 0 has made it, and then find it on disk."""
    if not dist.is_initialized():
        return make()
    made = [make()] if dist.get_rank() == 0 else []
    dist.barrier()
    return made[0] if made else make()


def start(layout: Layout, device_type: str) -> DeviceMesh | None:
    """Join the world and lay `layout` over it; None where one process runs alone, which needs no mesh.

    The mesh has the axes of `layout.AXES`, those of size 1 too. Processes are told where they stand by torchrun's
    variables; without them the process is alone. Raises ValueError where the axes do not make up the world.
    """
    _, world = join(device_type)
    layout = layout.resolved(world)
    if layout.world == 1:
        return None
    return init_device_mesh(device_type, tuple(layout.sizes.values()), mesh_dim_names=AXES)


def weights_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The same ranks with fsdp and cp as one axis, "shard": both hold parts of the same weights and sum the same
    gradients. Every rank must call this at once: it makes process groups."""
    sizes = {axis: mesh[axis].size() for axis in AXES}
    pp, dp, shard, tp = sizes["pp"], sizes["dp"], sizes["fsdp"] * sizes["cp"], sizes["tp"]
    return init_device_mesh(mesh.device_type, (pp, dp, shard, tp), mesh_dim_names=("pp", "dp", "shard", "tp"))
