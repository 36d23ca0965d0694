"""The ranks that run as a mesh of five axes, from what torchrun told each process."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from llamita.parallel.layout import AXES, Layout


def start(layout: Layout, device_type: str) -> DeviceMesh | None:
    """Join the world and lay `layout` over it; None where one process runs alone, which needs no mesh.

    The mesh has the axes of `layout.AXES`, those of size 1 too. Processes are told where they stand by torchrun's
    variables; without them the process is alone. Raises ValueError where the axes do not make up the world.
    """
    local_rank = dist.get_node_local_rank(fallback_rank=-1)
    if local_rank >= 0 and not dist.is_initialized():
        if device_type == "cuda":
            torch.cuda.set_device(local_rank)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo")
    layout = layout.resolved(dist.get_world_size() if dist.is_initialized() else 1)
    if layout.world == 1:
        return None
    return init_device_mesh(device_type, tuple(layout.sizes.values()), mesh_dim_names=AXES)


def weights_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The same ranks with fsdp and cp as one axis, "shard": both hold parts of the same weights and sum the same
    gradients. Every rank must call this at once: it makes process groups."""
    sizes = {axis: mesh[axis].size() for axis in AXES}
    pp, dp, shard, tp = sizes["pp"], sizes["dp"], sizes["fsdp"] * sizes["cp"], sizes["tp"]
    return init_device_mesh(mesh.device_type, (pp, dp, shard, tp), mesh_dim_names=("pp", "dp", "shard", "tp"))
