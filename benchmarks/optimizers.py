"""AdamW against Muon at equal compute: one small model, the same text, held-out loss at equal tokens and at equal time.

Each has one rate, tuned by the mean over all seeds on a grid that grows while its best point is at an edge (Muon's
matrices and its AdamW share it). Then Muon once more with as many steps as AdamW's time pays for. One thread; time is
the process's CPU time of the training steps alone, so that a busy machine is equally kind to both.

At the default 120 steps AdamW is barely off the plateau of single words and its seeds lie far apart: the difference is
that of the first steps, and shrinks with --steps.
Results go to benchmarks/results/optimizers.json.

    nice python benchmarks/optimizers.py FILE.jsonl[.xz] [FILE ...]
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from llamita import runtime
from llamita.data.loader import batches
from llamita.data.pack import Batch, PackedRows
from llamita.data.read import documents
from llamita.data.sampler import Sampler
from llamita.model.llama import build
from llamita.model.shape import Shape
from llamita.recipes import corpora, vocabularies
from llamita.train.objective import next_token, num_targets
from llamita.train.optim import Optimizer
from llamita.train.run import Optim, Schedule
from llamita.train.schedule import lr_ratio

RESULT = Path(__file__).parent / "results" / "optimizers.json"
SHAPE = Shape(dim=128, num_layers=4, num_heads=4, num_kv_heads=2, ffn_dim=384, vocab_size=2048, max_seq_len=128)
SCHEDULE = Schedule(kind="wsd", warmup_steps=30, decay_share=0.3)
ROWS, HELD_OUT_ROWS = 16, 128
RATES, MOST_RATES = {"adamw": (1.5e-3, 3e-3, 6e-3), "muon": (6e-3, 1.2e-2, 2.4e-2)}, 5


@dataclass
class Trained:
    loss: float
    """Held-out nats a token at the end."""
    curve: dict[int, float]
    """The same by tokens seen."""
    step_seconds: float
    """Median CPU seconds of a step."""
    optimizer_seconds: float
    """Of these, the optimizer's."""
    wall_seconds: float


class Bench:
    def __init__(self, train: PackedRows, held: PackedRows, steps: int):
        self.train, self.steps = [train], steps
        order = Sampler([len(held)], None, 0)
        self.held = next(batches([held], order, first=0, batch_size=min(HELD_OUT_ROWS, len(held))))

    def loss(self, model, batch: Batch):
        with torch.autocast("cpu", torch.bfloat16):
            return next_token(model, batch, torch.bfloat16) / num_targets(batch)

    @torch.no_grad()
    def held_out(self, model) -> float:
        return self.loss(model, self.held).item()

    def run(self, kind: str, rate: float, seed: int, steps: int) -> Trained:
        model = build(SHAPE).init_weights(seed)
        optimizer = Optimizer(model, Optim(kind=kind, lr=rate, muon_lr=rate))  # type: ignore[arg-type]
        stream = batches(self.train, Sampler([len(self.train[0])], None, seed), first=0, batch_size=ROWS)
        curve, whole, last = {}, [], []
        began = time.perf_counter()
        for step in range(steps):
            batch = next(stream)
            start = time.process_time()
            self.loss(model, batch).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            passed = time.process_time()
            optimizer.step(lr_ratio(SCHEDULE, step, steps))
            whole.append(time.process_time() - start)
            last.append(time.process_time() - passed)
            if (step + 1) % (steps // 4) == 0 or step + 1 == steps:
                curve[(step + 1) * ROWS * SHAPE.max_seq_len] = self.held_out(model)
        found = Trained(curve[steps * ROWS * SHAPE.max_seq_len], curve, statistics.median(whole),
                        statistics.median(last), time.perf_counter() - began)  # fmt: skip
        print(
            f"{kind} rate {rate:g} seed {seed} steps {steps}: {found.loss:.4f}, {found.wall_seconds:.0f} s", flush=True
        )
        return found

    def seeds_of(self, kind: str, rate: float, seeds: int) -> list[Trained]:
        return [self.run(kind, rate, seed, self.steps) for seed in range(seeds)]

    def tuned(self, kind: str, seeds: int) -> dict[float, list[Trained]]:
        """All seeds at every rate of the grid, in order of rate."""
        found = {rate: self.seeds_of(kind, rate, seeds) for rate in RATES[kind]}
        while len(found) < MOST_RATES:
            best = best_of(found)
            if min(found) < best < max(found):
                break
            rate = 2 * best if best == max(found) else best / 2
            found[rate] = self.seeds_of(kind, rate, seeds)
        return dict(sorted(found.items()))


def best_of(grid: dict[float, list[Trained]]) -> float:
    """The rate of the lowest mean loss: one seed's luck would choose a rate that fails on the others."""
    return min(grid, key=lambda rate: statistics.mean(run.loss for run in grid[rate]))


def summary(runs: list[Trained]) -> dict:
    losses = [run.loss for run in runs]
    return {
        "losses": losses, "mean": statistics.mean(losses), "deviation": statistics.stdev(losses),
        "curves": [run.curve for run in runs],
        "cpu_seconds_a_step": statistics.median(run.step_seconds for run in runs),
        "cpu_seconds_of_the_optimizer": statistics.median(run.optimizer_seconds for run in runs),
        "wall_seconds": [round(run.wall_seconds, 1) for run in runs],
    }  # fmt: skip


def compared(bench: Bench, seeds: int) -> dict:
    grids = {kind: bench.tuned(kind, seeds) for kind in RATES}
    rates = {kind: best_of(grid) for kind, grid in grids.items()}
    step = {
        kind: statistics.median(run.step_seconds for runs in grid.values() for run in runs)
        for kind, grid in grids.items()
    }
    in_time = round(bench.steps * step["adamw"] / step["muon"])
    return {
        "grids": {
            kind: {f"{rate:g}": [run.loss for run in runs] for rate, runs in grid.items()}
            for kind, grid in grids.items()
        },
        "rates": rates,
        "adamw": summary(grids["adamw"][rates["adamw"]]),
        "muon at equal tokens": summary(grids["muon"][rates["muon"]]),
        "a step of muon takes times": step["muon"] / step["adamw"],
        "muon steps in adamw's time": in_time,
        "muon at equal time": summary([bench.run("muon", rates["muon"], seed, in_time) for seed in range(seeds)]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    names = " ".join(path.name for path in args.files)
    began = time.perf_counter()
    torch.set_num_threads(1)
    runtime.keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        tokenizer = vocabularies.train(documents(args.files), SHAPE.vocab_size, home / "tokenizer").tokenizer
        corpus = corpora.documents_corpus(documents(args.files), tokenizer, home / "corpus", heldout_share=0.05)
        rows = [PackedRows(corpus.split(split), SHAPE.max_seq_len) for split in ("train", "heldout")]
        bench = Bench(rows[0], rows[1], args.steps)
        row = {
            "command": f"python {sys.argv[0]} {names} --steps {args.steps} --seeds {args.seeds}",
            "machine": runtime.machine(),
            "parameters": SHAPE.num_params,
            "steps": args.steps,
            "tokens": args.steps * ROWS * SHAPE.max_seq_len,
            "tokens_in_the_text": len(rows[0]) * SHAPE.max_seq_len,
            "tokens_a_step": ROWS * SHAPE.max_seq_len,
            **compared(bench, args.seeds),
        }  # fmt: skip
    row["minutes"] = (time.perf_counter() - began) / 60
    RESULT.write_text(json.dumps(row, indent=1) + "\n")
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
