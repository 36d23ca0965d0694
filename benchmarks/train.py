"""Training throughput on real packed documents: llamita beside transformers, litgpt and a plain compiled loop.

Every contestant is a process of its own and holds one model of the same shape; they take one step in turn, on the same
rows, and each round ends with the matmuls of such a step alone, bfloat16, as the ceiling. Ratios are taken within a
round. All get the same allocator settings, fused AdamW and gradient clipping. What differs:

- llamita: the loop's own step: float32 weights, matmuls in bfloat16, documents apart.
- transformers: LlamaForCausalLM with bfloat16 weights, SDPA, a mask that keeps documents apart.
- litgpt: its GPT with bfloat16 weights, compiled as its pretraining does; it knows no documents and attends to all.
- compiled: llamita's model with bfloat16 weights compiled whole, SDPA with a mask, all logits at once.

Results go to benchmarks/results/train.json, one row for each size and length.

    python benchmarks/train.py FILE.jsonl[.xz] [FILE ...] --sizes 1m,10m --seq 512 [--litgpt PYTHON_THAT_HAS_IT]
"""

import argparse
import json
import os
import pickle
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

RESULT = Path(__file__).parent / "results" / "train.json"
SIZES = {
    "1m": dict(dim=128, num_layers=4, num_heads=4, num_kv_heads=2, ffn_dim=384, vocab_size=4096),
    "10m": dict(dim=320, num_layers=6, num_heads=5, num_kv_heads=5, ffn_dim=896, vocab_size=4096),
    "100m": dict(dim=768, num_layers=12, num_heads=12, num_kv_heads=4, ffn_dim=2048, vocab_size=32_000),
}
TOKENS = {"1m": 4096, "10m": 4096, "100m": 2048}  # a step
BATCHES = 16
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}
LIKE = dict(lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1)
Step = Callable[[np.ndarray, np.ndarray, list[list[int]]], float]


def own(shape: dict) -> Step:
    """What `train.loop.Trainer` does in a step, by the functions that it calls."""
    from llamita.data.pack import Batch
    from llamita.model.llama import build
    from llamita.model.shape import Shape
    from llamita.parallel import reduce
    from llamita.parallel.layout import Layout
    from llamita.train.compute import Compute
    from llamita.train.optim import Optimizer
    from llamita.train.run import Optim

    model = build(Shape(**shape)).init_weights(0)
    compute = Compute(model, Layout().resolved(1), None, torch.bfloat16, torch.device("cpu"))
    optimizer = Optimizer(compute, Optim(lr=LIKE["lr"]))

    def step(inputs: np.ndarray, targets: np.ndarray, starts: list[list[int]]) -> float:
        batch = Batch(torch.from_numpy(inputs), torch.from_numpy(targets), starts, 0)
        loss, _ = compute.gradients(batch, len(starts), len(starts))
        reduce.clip([weight for _, weight in compute.named_parameters()], 1.0, None)
        optimizer.step(1.0)
        return loss

    return step


def plain(model: torch.nn.Module, logits_of: Callable[[Tensor, list[list[int]]], Tensor]) -> Step:
    """The usual loop around a bfloat16 model."""
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **LIKE)

    def step(inputs: np.ndarray, targets: np.ndarray, starts: list[list[int]]) -> float:
        logits_BTV = logits_of(torch.from_numpy(inputs), starts)
        loss = F.cross_entropy(logits_BTV.float().flatten(0, 1), torch.from_numpy(targets).flatten(), ignore_index=-1)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def offsets(starts: list[list[int]], seq_len: int) -> Tensor:
    """Where the document of each token begins, [B, T]."""
    found_BT = torch.zeros(len(starts), seq_len, dtype=torch.int64)
    for row, begins in enumerate(starts):
        for begin in begins:
            found_BT[row, begin:] = begin
    return found_BT


def seen(offsets_BT: Tensor) -> Tensor:
    """[B, 1, T, T]: the earlier tokens of one's own document."""
    return (offsets_BT.unsqueeze(1) == offsets_BT.unsqueeze(2)).tril().unsqueeze(1)


def transformers(shape: dict) -> Step:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(
        hidden_size=shape["dim"], num_hidden_layers=shape["num_layers"], num_attention_heads=shape["num_heads"],
        num_key_value_heads=shape["num_kv_heads"], intermediate_size=shape["ffn_dim"], vocab_size=shape["vocab_size"],
        tie_word_embeddings=True, attn_implementation="sdpa", use_cache=False,
    )).bfloat16()  # fmt: skip

    def logits_of(inputs_BT: Tensor, starts: list[list[int]]) -> Tensor:
        offsets_BT = offsets(starts, inputs_BT.shape[1])
        positions_BT = torch.arange(inputs_BT.shape[1]) - offsets_BT
        return model(inputs_BT, position_ids=positions_BT, attention_mask=seen(offsets_BT)).logits

    return plain(model, logits_of)


def litgpt(shape: dict) -> Step:
    from litgpt.config import Config
    from litgpt.model import GPT

    model = GPT(Config(
        block_size=2048, n_layer=shape["num_layers"], n_head=shape["num_heads"], n_embd=shape["dim"],
        n_query_groups=shape["num_kv_heads"], intermediate_size=shape["ffn_dim"], padded_vocab_size=shape["vocab_size"],
        vocab_size=shape["vocab_size"], rotary_percentage=1.0, parallel_residual=False, bias=False,
        norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP", rope_base=500_000,
    )).bfloat16()  # fmt: skip
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.02)
    model.lm_head.weight = model.transformer.wte.weight
    run = torch.compile(model)
    return plain(model, lambda inputs_BT, starts: run(inputs_BT))


def compiled(shape: dict) -> Step:
    from llamita.kernels.attention import sdpa
    from llamita.model.llama import build
    from llamita.model.shape import Shape

    model = build(Shape(**shape)).init_weights(0).bfloat16()

    class Masked:
        def __init__(self, offsets_BT: Tensor):
            self.offsets_BT, self.mask_B1TT = offsets_BT, seen(offsets_BT)

        def positions(self, tokens_BT: Tensor) -> Tensor:
            return torch.arange(tokens_BT.shape[1]) - self.offsets_BT

        def __call__(self, layer: int, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor) -> Tensor:
            return sdpa(q_BTNH, k_BTKH, v_BTKH, mask=self.mask_B1TT)

    run = torch.compile(model)
    return plain(model, lambda inputs_BT, starts: run(inputs_BT, Masked(offsets(starts, inputs_BT.shape[1]))))


CONTESTANTS: dict[str, Callable[[dict], Step]] = {
    "llamita": own, "transformers": transformers, "litgpt": litgpt, "compiled": compiled
}  # fmt: skip


def contend(name: str, batches: Path) -> None:
    """A contestant's process: a step for every line that comes in, and a line out with what it took."""
    shape, rows = pickle.loads(batches.read_bytes())
    out, sys.stdout = sys.stdout, sys.stderr
    step = CONTESTANTS[name](shape)
    for line in sys.stdin:
        began, cpu = time.perf_counter(), time.process_time()
        loss = step(*rows[int(line) % len(rows)])
        took = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu, "loss": loss}
        took["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps(took), file=out, flush=True)


class Contestant:
    def __init__(self, name: str, python: str, batches: Path):
        command = [python, __file__, "--contend", name, str(batches)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | ALLOCATOR
        )
        self.took: list[dict[str, float]] = []
        self.first_seconds = self.step(0)["seconds"]
        self.step(1)
        self.took.clear()

    def step(self, number: int) -> dict[str, float]:
        assert self.process.stdin and self.process.stdout
        print(number, file=self.process.stdin, flush=True)
        self.took.append(json.loads(self.process.stdout.readline()))
        return self.took[-1]

    def end(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


class Matmuls:
    """Those of one step, forward and backward, each once and alone: nothing faster is possible with torch's matmul."""

    def __init__(self, shape: dict, tokens: int):
        dim, kv_dim, layers = (
            shape["dim"],
            shape["dim"] // shape["num_heads"] * shape["num_kv_heads"],
            shape["num_layers"],
        )
        self.sides = {(dim, dim): 2 * layers, (dim, kv_dim): 2 * layers, (dim, shape["ffn_dim"]): 2 * layers,
                      (shape["ffn_dim"], dim): layers, (dim, shape["vocab_size"]): 1}  # fmt: skip
        self.tokens = tokens
        self.flops = sum(6 * tokens * k * n * times for (k, n), times in self.sides.items())

    def seconds(self) -> float:
        """Of all, from the best of three for each."""
        total = 0.0
        for (k, n), times in self.sides.items():
            x_MK, w_NK, g_MN = (torch.randn(size).bfloat16() for size in ((self.tokens, k), (n, k), (self.tokens, n)))
            best = float("inf")
            for _ in range(3):
                began = time.perf_counter()
                _ = x_MK @ w_NK.t(), g_MN @ w_NK, g_MN.t() @ x_MK
                best = min(best, time.perf_counter() - began)
            total += times * best
        return total


def prepare(files: list[Path], size: str, seq_len: int, home: Path) -> tuple[Path, dict]:
    """The rows that all train on, for the contestants' processes, and what they are."""
    from llamita.data.pack import PackedRows
    from llamita.data.read import documents
    from llamita.data.shards import Corpus
    from llamita.recipes import corpora, vocabularies

    vocab_size = SIZES[size]["vocab_size"]
    corpus = home / str(vocab_size)
    if not corpus.exists():
        tokenizer = vocabularies.train(documents(files), vocab_size, home / f"tokenizer-{vocab_size}").tokenizer
        corpora.documents_corpus(documents(files), tokenizer, corpus, heldout_share=0.05)
    packed = PackedRows(Corpus.open(corpus).split("train"), seq_len)
    chosen = torch.randint(len(packed), (BATCHES, TOKENS[size] // seq_len), generator=torch.Generator().manual_seed(0))
    batches = []
    for numbers in chosen.tolist():
        rows = [packed[number] for number in numbers]
        batches.append(
            (np.stack([r.inputs for r in rows]), np.stack([r.targets for r in rows]), [r.starts for r in rows])
        )
    path = home / f"{size}-{seq_len}.pickle"
    path.write_bytes(pickle.dumps((SIZES[size] | {"max_seq_len": 2048}, batches)))
    lengths = [np.diff([*starts, seq_len]) for _, _, each in batches for starts in each]
    pairs = sum(int((row * (row + 1) // 2).sum()) for row in lengths) / BATCHES  # of a token and one that it sees
    return path, {"documents_a_row": statistics.mean(map(len, lengths)), "pairs_a_step": pairs}


def compare(files: list[Path], size: str, seq_len: int, rounds: int, pythons: dict[str, str], home: Path) -> dict:
    path, facts = prepare(files, size, seq_len, home)
    shape, tokens = SIZES[size], TOKENS[size]
    matmuls = Matmuls(shape, tokens)
    flops = matmuls.flops + 12 * shape["num_layers"] * shape["dim"] * facts["pairs_a_step"]
    contestants, peaks = {name: Contestant(name, python, path) for name, python in pythons.items()}, []
    for number in range(rounds):
        for contestant in contestants.values():
            contestant.step(number)
        peaks.append(matmuls.flops / matmuls.seconds())
    rows = {}
    for name, contestant in contestants.items():
        contestant.end()
        seconds = [took["seconds"] for took in contestant.took]
        rows[name] = {
            "tokens_per_second": tokens / statistics.median(seconds),
            "share_of_matmul_peak": statistics.median(flops / s / peak for s, peak in zip(seconds, peaks, strict=True)),
            "cpu_seconds_a_step": statistics.median(took["cpu_seconds"] for took in contestant.took),
            "peak_gib": contestant.took[-1]["peak_gib"],
            "first_step_seconds": contestant.first_seconds,
            "losses": [round(took["loss"], 3) for took in contestant.took],
        }
    ours = contestants["llamita"].took
    for measure in ("seconds", "cpu_seconds"):
        for name, contestant in contestants.items():
            pairs = zip(contestant.took, ours, strict=True)
            rows[name][f"llamita_is_times_as_fast_by_{measure}"] = statistics.median(
                theirs[measure] / mine[measure] for theirs, mine in pairs
            )
    return facts | {
        "tokens_a_step": tokens, "rounds": rounds, "matmul_peak_gflops": statistics.median(peaks) / 1e9, **rows,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--sizes", default="1m,10m,100m")
    parser.add_argument("--seq", default="512,2048")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--litgpt", help="a python that has litgpt; without it litgpt is left out")
    args = parser.parse_args()
    from llamita import runtime

    pythons = {name: sys.executable for name in CONTESTANTS} | {"litgpt": args.litgpt}
    pythons = {name: python for name, python in pythons.items() if python}
    with tempfile.TemporaryDirectory() as folder:
        for size in args.sizes.split(","):
            for seq_len in map(int, args.seq.split(",")):
                row = compare(args.files, size, seq_len, args.rounds, pythons, Path(folder))
                command = f"python {sys.argv[0]} {' '.join(path.name for path in args.files)}"
                row = {"command": f"{command} --sizes {size} --seq {seq_len}", "machine": runtime.machine()} | row
                print(json.dumps(row, indent=1), flush=True)
                known = json.loads(RESULT.read_text()) if RESULT.exists() else {}
                RESULT.write_text(json.dumps(known | {f"{size} {seq_len}": row}, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--contend"]:
        contend(sys.argv[2], Path(sys.argv[3]))
    else:
        main()
