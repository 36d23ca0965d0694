"""Checkpoints of about 100 million weights with AdamW's moments: seconds that training waits, seconds until committed.

python benchmarks/checkpoint.py FOLDER [--ranks 2]

FOLDER is on the disk to be measured. Against torch.save to one file and DCP's own save and async_save (neither hashes
what it writes; torch.save does not wait for the disk either). All write beside their last save and drop it afterwards:
to overwrite it would be faster, for it finds its pages in memory, and would leave nothing whole when killed. Medians of
nine after one to warm up, with the range; the order is drawn anew in every round, since each way finds the memory that
the one before it freed. Reading is from the page cache. Results go to benchmarks/results/checkpoint.json.
"""

import argparse
import json
import random
import shutil
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from llamita.checkpoint import store
from llamita.checkpoint.store import Keep
from llamita.checkpoint.writer import Writer
from llamita.runtime import machine

RESULT = Path(__file__).parent / "results" / "checkpoint.json"
TIMES = 9
MATRICES, SIZE = 24, (2048, 2048)  # 101 million weights


def state_of(ranks: int) -> dict[str, Any]:
    """Weights and two moments, fp32, cut over the ranks by rows."""
    mesh = init_device_mesh("cpu", (ranks,)) if ranks > 1 else None

    def made() -> torch.Tensor:
        whole = torch.randn(SIZE)
        return distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None) if mesh else whole

    names = [f"layers.{number}.weight" for number in range(MATRICES)]
    moments = {name: {"exp_avg": made(), "exp_avg_sq": made()} for name in names}
    return {"model": {name: made() for name in names}, "optimizer": moments}


Way = Callable[[Path, int], Callable[[], Any]]
"""(folder, number of the save) -> what waits for the commit; the call itself is what training waits for."""


def ways(state: dict[str, Any], ranks: int) -> dict[str, Way]:
    """Each writes beside its last save and drops that one only when the new one is there."""
    writer, keep = Writer(), Keep(newest=1)

    def dropped(folder: Path, number: int) -> None:
        together(ranks)
        if number and (ranks == 1 or dist.get_rank() == 0):
            shutil.rmtree(folder / str(number - 1))

    def ours(folder: Path, number: int) -> Callable[[], Any]:
        store.save(folder, number, state, {}, keep=keep)
        return lambda: None

    def ours_async(folder: Path, number: int) -> Callable[[], Any]:
        writer.save(folder, number, state, {}, keep=keep)
        return writer.wait

    def dcp_sync(folder: Path, number: int) -> Callable[[], Any]:
        dcp.save(state, checkpoint_id=folder / str(number))
        dropped(folder, number)
        return lambda: None

    def dcp_async(folder: Path, number: int) -> Callable[[], Any]:
        under_way = dcp.async_save(state, checkpoint_id=folder / str(number))

        def finish() -> None:
            under_way.result()
            dropped(folder, number)

        return finish

    def one_file(folder: Path, number: int) -> Callable[[], Any]:
        (folder / str(number)).mkdir()
        torch.save(state, folder / str(number) / "state.pt")
        dropped(folder, number)
        return lambda: None

    found: dict[str, Way] = {"sync": ours, "async": ours_async, "DCP save": dcp_sync, "DCP async_save": dcp_async}
    return found if ranks > 1 else found | {"torch.save": one_file}


def measure(rank: int, ranks: int, root: Path) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{root}/ranks", rank=rank, world_size=ranks)
    state = state_of(ranks)
    ours_and_others = ways(state, ranks)
    spent: dict[str, list[tuple[float, float]]] = {}
    for number in range(TIMES + 1):
        order = list(ours_and_others.items())
        random.Random(number).shuffle(order)  # the same on every rank
        for name, way in order:
            folder = root / name.replace(" ", "_")
            folder.mkdir(exist_ok=True)
            together(ranks)
            began = time.perf_counter()
            finish = way(folder, number)
            waited = time.perf_counter() - began
            finish()
            spent.setdefault(name, []).append((waited, time.perf_counter() - began))
    rows = {
        name: {
            "training_waits_seconds": summary([waited for waited, _ in times[1:]]),
            "committed_after_seconds": summary([done for _, done in times[1:]]),
        }
        for name, times in spent.items()
    }
    newest, read = root / f"sync/step_{TIMES:08d}", state_of(ranks)
    reads = {"verify": lambda: store.newest(root / "sync", print), "load": lambda: store.load(newest, read)}
    for name, work in reads.items():
        together(ranks)
        began = time.perf_counter()
        work()
        rows[name] = {"seconds": round(time.perf_counter() - began, 3)}
    assert all(torch.equal(local(read["model"][name]), local(weight)) for name, weight in state["model"].items())
    if rank == 0:
        (root / "rows.json").write_text(json.dumps(rows))
    if ranks > 1:
        dist.destroy_process_group()


def summary(seconds: list[float]) -> dict[str, float]:
    found = {"median": statistics.median(seconds), "least": min(seconds), "most": max(seconds)}
    return {name: round(value, 3) for name, value in found.items()}


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def together(ranks: int) -> None:
    if ranks > 1:
        dist.barrier()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ranks", type=int, default=2)
    arguments = parser.parse_args()
    found: dict[str, Any] = {"machine": machine(), "weights": MATRICES * SIZE[0] * SIZE[1]}
    found["bytes"] = 3 * 4 * found["weights"]
    for ranks in sorted({1, arguments.ranks}):
        root = arguments.folder / "checkpoint-benchmark"
        root.mkdir(parents=True)
        mp.spawn(measure, (ranks, root), nprocs=ranks)
        found[f"{ranks} ranks" if ranks > 1 else "1 rank"] = json.loads((root / "rows.json").read_text())
        shutil.rmtree(root)
    RESULT.write_text(json.dumps(found, indent=1) + "\n")
    print(RESULT.read_text())


if __name__ == "__main__":
    main()
