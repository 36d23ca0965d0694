"""A world of 16,384 ranks on torch's fake backend, seen from a few of them: what each holds, reads and writes."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.planner import SavePlan
from torch.testing._internal.distributed.fake_pg import FakeStore

from llamita.checkpoint.shards import Disk
from llamita.data.sampler import shard_of
from llamita.model.llama import build
from llamita.parallel import apply, mesh, pipeline, rules
from llamita.parallel.layout import Layout
from tests import training

LAYOUT = Layout(pp=16, dp=4, fsdp=32, tp=8)  # 405B of Llama 3 (arXiv 2407.21783, table 4), its DP 128 as HSDP
SHAPE = dataclasses.replace(
    training.SHAPE, dim=128, num_layers=32, num_heads=16, num_kv_heads=8, ffn_dim=256, vocab_size=1024, tied=False
)


@pytest.fixture(params=[0, 5003, 16_383])
def rank(request):
    dist.init_process_group("fake", store=FakeStore(), rank=request.param, world_size=LAYOUT.world)
    yield request.param
    dist.destroy_process_group()


def test_a_rank_holds_reads_and_writes_what_the_arithmetic_says(rank, tmp_path):
    at = LAYOUT.coordinates(rank)
    found = mesh.start(LAYOUT, "cpu")
    assert tuple(found.get_coordinate()) == tuple(at.values())
    model = build(SHAPE, device="meta")
    whole = {name: (size, axes) for name, size, axes in rules.weights(model)}
    (part,) = pipeline.stages(model, LAYOUT, at["pp"])
    apply.parallelize(part, LAYOUT, found, compute_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    held = dict(part.named_parameters())
    assert ("output.weight" in held) == (at["pp"] == 15) and ("tok_embeddings.weight" in held) == (at["pp"] == 0)
    for name, weight in held.items():
        size, axes = whole[name]
        told = tuple(len(each) for each in rules.local_slices(size, axes, LAYOUT, rank))
        assert tuple(weight.shape) == size and tuple(weight.to_local().shape) == told, name
    data_rank = LAYOUT.data_rank(rank)
    assert data_rank == at["dp"] * 32 + at["fsdp"]
    assert shard_of(range(4096, 6144), data_rank, LAYOUT.num_data_ranks) == range(
        4096 + 16 * data_rank, 4112 + 16 * data_rank
    )
    plans = Disk(tmp_path, lambda written: None).prepare_global_plan([SavePlan([])] * LAYOUT.world)
    assert plans[rank].storage_data == f"rank_{rank:05d}.safetensors"
    assert len({plan.storage_data for plan in plans}) == LAYOUT.world
