"""What the loop costs over a bare one: guard, watchdog, metrics, checkpoints written aside, against forward, backward,
clip and optimizer step alone, on the same batches in the same process, in turns.

    python benchmarks/overhead.py [--steps 60] [--rounds 5] [--out benchmarks/results/overhead.json]
"""

import argparse
import json
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch

from llamita import log, runtime
from llamita.data.loader import batches
from llamita.data.pack import PackedRows
from llamita.data.sampler import Sampler
from llamita.model.llama import build
from llamita.model.shape import preset
from llamita.parallel import reduce
from llamita.train.compute import Compute, accumulate
from llamita.train.loop import Trainer
from llamita.train.optim import Optimizer
from llamita.train.run import Checkpoint, Data, Log, Run

SIZES = {
    "1m": {"dim": 128, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "ffn_dim": 384, "vocab_size": 2048},
    "10m": {"dim": 320, "num_layers": 8, "num_heads": 5, "num_kv_heads": 5, "ffn_dim": 896, "vocab_size": 4096},
}


class Texts:
    """Random documents with the face of a corpus split."""

    def __init__(self, vocab_size: int):
        draw = np.random.default_rng(0)
        self.documents = [draw.integers(0, vocab_size, size).astype(np.uint32) for size in draw.integers(50, 900, 400)]
        self.lengths = np.array([len(each) for each in self.documents], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.documents)

    def tokens(self, index: int) -> np.ndarray:
        return self.documents[index]


def bare(run: Run, rows: PackedRows) -> list[float]:
    """Instants at which each step began."""
    model = build(run.shape).init_weights(0)
    optimizer = Optimizer(model, run.optim)
    stream = batches([rows], Sampler([len(rows)], None, 0), first=0, batch_size=run.batch_size)
    instants = []
    for _ in range(run.steps):
        batch = next(stream)
        instants.append(time.perf_counter())
        accumulate(model, batch, run.micro_batch_size, torch.bfloat16)
        reduce.clip(list(model.parameters()), run.optim.clip, None)
        optimizer.step(1.0)
    return instants


def whole(run: Run, rows: PackedRows) -> list[float]:
    """The same of the loop."""
    instants, real = [], Compute.gradients

    def noted(*args):
        instants.append(time.perf_counter())
        return real(*args)

    Compute.gradients = noted
    model = build(run.shape, device="meta")
    with tempfile.TemporaryDirectory() as folder:
        Trainer(run, Path(folder), model, [rows], first_rows=partial(model.first_rows, seed=0)).fit()
    Compute.gradients = real
    return instants


def measure(name: str, steps: int, rounds: int) -> dict:
    shape = replace(preset("demo"), **SIZES[name], max_seq_len=512)
    run = Run(
        name=name, shape=shape, steps=steps, batch_size=8, micro_batch_size=8, device="cpu", data=Data(seq_len=512),
        checkpoint=Checkpoint(every=steps // 2), log=Log(every=10, eval_every=10**9, sample_every=10**9),
    )  # fmt: skip
    rows = PackedRows(Texts(shape.vocab_size), run.data.seq_len)
    taken: dict[str, list[float]] = {"bare": [], "loop": []}
    ratios = []
    for _ in range(rounds):
        for what, work in (("bare", bare), ("loop", whole)):
            instants = np.array(work(run, rows))
            taken[what].append((instants[-1] - instants[5]) / (len(instants) - 6))  # a checkpoint among them
        ratios.append(taken["loop"][-1] / taken["bare"][-1])
    return {
        "parameters": shape.num_params,
        "bare_ms": 1000 * median(taken["bare"]),
        "loop_ms": 1000 * median(taken["loop"]),
        "overhead": median(ratios) - 1,
        "of_rounds": [ratio - 1 for ratio in ratios],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", default="1m,10m")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/overhead.json"))
    chosen = parser.parse_args()
    log.console.quiet = True
    runtime.keep_freed_memory()
    found = {name: measure(name, chosen.steps, chosen.rounds) for name in chosen.sizes.split(",")}
    for name, row in found.items():
        print(f"{name}: bare {row['bare_ms']:.1f} ms, loop {row['loop_ms']:.1f} ms, overhead {row['overhead']:+.2%}")
    chosen.out.write_text(json.dumps({"machine": runtime.machine(), "steps": chosen.steps, "sizes": found}, indent=1))


main()
