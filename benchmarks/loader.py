"""Packing, mixing and loading: tokens a second and core, fill of the rows, seconds until a resumed stream flows.

python benchmarks/loader.py SHARED_DATA TOKENIZER

SHARED_DATA holds pretrain/. Corpora are synthetic (lengths log-normal, ids random or, where only numbers of documents
count, zeros in files with holes). Speeds are of CPU time of one process, medians of five, files in the page cache.
Results go to benchmarks/results/loader.json.
"""

import argparse
import json
import lzma
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from llamita.data.loader import batches
from llamita.data.mix import parse, schedule
from llamita.data.pack import PackedRows, best_fit, packed
from llamita.data.sampler import BLOCK, Phase, Sampler, apportioned, spread
from llamita.data.shards import RECORD, SHARD_TOKENS, Documents, Shard
from llamita.runtime import machine
from llamita.tokenizer.opened import open_tokenizer

RESULT = Path(__file__).parent / "results" / "loader.json"
NAMES = {"source": ["web", "books", "github"], "lang": ["en"], "kind": ["prose"]}
MIX = ("source=github:17% source=books:25% rest", "90%: source=books:60% rest")
MANY_SHARDS = 100  # 6.7 billion tokens, about 6 million documents


def lognormal(median: float, count: int, seed: int) -> np.ndarray:
    return np.random.RandomState(seed).lognormal(np.log(median), 1, count).astype(np.int64) + 2


def corpus(folder: Path, num_shards: int, tokens: int, median: float, *, holes: bool = False) -> Documents:
    """Shards of about `tokens` tokens, in three sources."""
    folder.mkdir(exist_ok=True)
    shards = []
    for number in range(num_shards):
        lengths = lognormal(median, int(tokens / median / 1.65), number)
        records = np.zeros(len(lengths), RECORD)
        records["end"], records["source"] = np.cumsum(lengths), np.arange(len(lengths)) % 10 // 4
        shard = Shard(number, int(lengths.sum()), len(lengths), 0, "", "", "")
        shard.path(folder, "doc").write_bytes(records.tobytes())
        with shard.path(folder, "tok").open("wb") as file:
            if not holes:
                file.write(np.random.RandomState(number).randint(0, 128_000, shard.tokens).astype("<u4").tobytes())
            file.truncate(4 * shard.tokens)
        shards.append(shard)
    return Documents(folder, shards, NAMES)


def mixed(documents: Documents, seq_len: int, folder: Path | None) -> tuple[list[PackedRows], Sampler]:
    pools, packings = packed(documents, MIX, seq_len, "benchmark", folder)
    rows = [PackedRows(documents, seq_len, packing=packing) for packing in packings]
    (_, start), *later = schedule(pools, parse(MIX), 10**7, 512)
    return rows, Sampler([len(each) for each in rows], start, 0, [Phase(*each) for each in later])


def median_of(times: int, work: Callable[[], Any]) -> float:
    """CPU seconds."""
    spent = []
    for _ in range(times):
        began = time.process_time()
        work()
        spent.append(time.process_time() - began)
    return statistics.median(spent)


def loading(documents: Documents) -> dict[str, Any]:
    """Million tokens a second with targets and the places where documents begin, by length of a row."""
    found = {}
    for seq_len, batch_size in ((512, 128), (2048, 32), (8192, 8)):
        rows, sampler = mixed(documents, seq_len, None)
        stream = batches(rows, sampler, first=0, batch_size=batch_size)

        def fifty(stream: Any = stream) -> None:
            for _ in range(50):
                next(stream)

        fifty()
        found[str(seq_len)] = 50 * batch_size * seq_len / median_of(5, fifty) / 1e6
    return found


def packing(lengths: np.ndarray) -> dict[str, Any]:
    found: dict[str, Any] = {"documents": len(lengths), "median_tokens": float(np.median(lengths))}
    for seq_len in (512, 2048, 8192, 131_072):
        rows = best_fit(lengths, seq_len)
        fits = lengths - 1 <= seq_len
        found[str(seq_len)] = {
            "fill": float((lengths - 1).sum() / seq_len / len(rows)),
            "cut_though_they_fit": int((np.bincount(rows.pieces[:, 0], minlength=len(lengths))[fits] > 1).sum()),
            "million_docs_per_second": len(lengths) / median_of(5, lambda n=seq_len: best_fit(lengths, n)) / 1e6,
        }
    return found


def shared_lengths(shared: Path, tokenizer: Path) -> np.ndarray:
    encode = open_tokenizer(tokenizer).encode_batch
    texts = []
    for name in ("c4_demo", "techdocs_en", "fairytales_en", "tinystories_en_sample", "tinystories_ru"):
        with lzma.open(shared / "pretrain" / f"{name}.jsonl.xz", "rt") as lines:
            texts += [json.loads(line)["text"] for line in lines]
    return np.array([len(ids) + 2 for ids in encode(texts)], np.int64)


def deviation() -> dict[str, float]:
    """The farthest that any pool was from its part at any sample of a block, in samples, over random weights."""
    found = {}
    for num_pools in (2, 3, 5, 10, 50):
        worst = 0.0
        for seed in range(20):
            weights = np.random.RandomState(seed).dirichlet(np.full(num_pools, 0.5))
            counts = np.array(apportioned(weights.tolist()))
            order = spread(counts[counts > 0])
            taken = np.cumsum(order[:, None] == np.arange((counts > 0).sum()), axis=0)
            part = np.arange(1, BLOCK + 1)[:, None] * counts[counts > 0] / BLOCK
            worst = max(worst, float(np.abs(taken - part).max()))
        found[str(num_pools)] = worst
    return found


def resumed(folder: Path, first: int) -> dict[str, float]:
    """In a fresh process, its imports done: seconds until the batch of sample `first` is there."""
    command = [sys.executable, __file__, "--resume", str(first), "--in", str(folder), "-", "-"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def resume(folder: Path, first: int) -> None:
    """The measured process."""
    began = time.perf_counter()
    shards = [Shard(*fields) for fields in json.loads((folder / "shards.json").read_bytes())]
    documents = Documents(folder, shards, NAMES)
    rows, sampler = mixed(documents, 8192, folder / "packing")
    opened = time.perf_counter()
    next(batches(rows, sampler, first=first, batch_size=8))
    print(json.dumps({"open": opened - began, "first_batch": time.perf_counter() - opened}))


def resuming(folder: Path) -> dict[str, Any]:
    documents = corpus(folder, MANY_SHARDS, SHARD_TOKENS, 650, holes=True)
    shards = documents._made_of[1]
    (folder / "shards.json").write_text(json.dumps([list(vars(shard).values()) for shard in shards]))
    began = time.perf_counter()
    mixed(documents, 8192, folder / "packing")
    found: dict[str, Any] = {"documents": len(documents), "tokens": sum(shard.tokens for shard in shards)}
    found |= {"packed_once_seconds": time.perf_counter() - began}
    for first in (0, 10**9, 10**12):
        runs = [resumed(folder, first) for _ in range(5)]
        found[f"at_{first:.0e}"] = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("shared", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--resume", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--in", dest="folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.resume is not None:
        return resume(args.folder, args.resume)
    best_fit([3], 2)  # compiles
    with tempfile.TemporaryDirectory() as work:
        row = {
            "command": "loader.py SHARED_DATA TOKENIZER",
            "machine": machine(),
            "million_tokens_per_second": {
                "documents of 650 tokens": loading(corpus(Path(work) / "long", 4, 16 * 2**20, 650)),
                "documents of 200 tokens": loading(corpus(Path(work) / "short", 4, 16 * 2**20, 200)),
            },
            "packing": {
                "log-normal": packing(lognormal(650, 4_000_000, 0)),
                "shared text": packing(shared_lengths(args.shared, args.tokenizer)),
            },
            "farthest_from_the_weights": deviation(),
            "resume": resuming(Path(work) / "many"),
        }
    RESULT.write_text(json.dumps(row, indent=1) + "\n")
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
