"""Does `tokenizer advise` advise well? One shape, several vocabularies, the same FLOPs: predicted against measured.

Each vocabulary is the beginning of the largest one, each run is the demo's recipe on the Python standard library with
as many steps as the budget pays for, and each is scored in bits per byte on the same held-out files. Writes one row.

    python benchmarks/vocabulary_size.py --flops 1.6e13 --sizes 1024 2048 4096 8192 16384
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

from llamita import config, runtime
from llamita.data.shards import Corpus
from llamita.plan import vocabulary
from llamita.recipes import corpora, stages, stdlib
from llamita.recipes.runs import demo
from llamita.tokenizer import Tokenizer
from llamita.tokenizer.llama3 import NUM_SPECIALS
from llamita.tokenizer.train import train


def measured(tokenizer: Tokenizer, corpus: Corpus) -> vocabulary.Measured:
    split = corpus.split("heldout")
    counts = np.zeros(len(tokenizer.tokens), np.int64)
    for index in range(len(split)):
        counts += np.bincount(split.tokens(index)[1:-1], minlength=len(counts))
    return vocabulary.Measured(tokenizer.vocab_size, int(split.num_bytes), counts)


def trained(tokens: list[bytes], docs: list, flops: float, home: Path) -> dict:
    tokenizer = Tokenizer(tokens)
    corpus = corpora.documents_corpus(docs, tokenizer, home / "corpus", heldout_share=0.05)
    run = config.override(demo(), {"shape.vocab_size": tokenizer.vocab_size})
    per_step = run.batch_size * run.data.seq_len * run.shape.train_flops_per_token(run.data.seq_len)
    run = dataclasses.replace(
        run, steps=round(flops / per_step), data=dataclasses.replace(run.data, corpus=str(home / "corpus"))
    )
    model = stages.pretrain(run, home / "run", prompts=["def "])
    held = stages.heldout_bits(model, corpus, window=run.data.seq_len)
    row = vocabulary.size(run.shape, measured(tokenizer, corpus), flops)
    return {
        "vocab_size": tokenizer.vocab_size, "parameters": run.shape.num_params, "steps": run.steps,
        "bytes_per_token": round(row.bytes_per_token, 4), "bytes_seen": round(row.budget_bytes),
        "predicted": round(row.bits_per_byte, 4), "measured": round(held["bits_per_byte"], 4),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--flops", type=float, default=1.6e13)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16_384])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/vocabulary_size.json"))
    args = parser.parse_args()
    docs = list(stdlib.texts())
    tokens = train((doc.text for doc in docs), max(args.sizes)).tokens
    row = {"command": " ".join(["python", *sys.argv]), "machine": runtime.machine(), "flops": args.flops, "runs": []}
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as folder:
            found = trained(tokens[: size - NUM_SPECIALS], docs, args.flops, Path(folder))
        row["runs"].append(found)
        print(json.dumps(found), flush=True)
        args.out.write_text(json.dumps(row, indent=1) + "\n")


if __name__ == "__main__":
    main()
