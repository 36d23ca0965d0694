"""Ten minutes of simple stories: llamita against transformers' LlamaForCausalLM in a plain PyTorch loop.

Same shape, first weights, tokens, optimizer, rates and budget of seconds; the two train in turn, half a minute each, so
that a machine whose speed drifts is equally kind to both. Writes one JSON row; prints it and three samples.

    python benchmarks/stories.py FILE.jsonl[.xz] [FILE ...] --minutes 10
"""

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from llamita import config, runtime
from llamita.data.loader import batches
from llamita.data.pack import PackedRows
from llamita.data.read import documents
from llamita.eval import bits
from llamita.formats import hf
from llamita.formats.files import replacing
from llamita.formats.weights import Weights
from llamita.model.shape import preset
from llamita.recipes import corpora, stages, vocabularies
from llamita.recipes.runs import tiny
from llamita.serve.engine import Engine, Sampling
from llamita.train.loop import Trainer
from llamita.train.run import Data, Optim, Run, Schedule
from llamita.train.schedule import lr_ratio

SEQ_LEN, TURN = 512, 30.0
PROMPTS = ["Once upon a time", "The king", "Lily and her mother"]


class Ours:
    """llamita's own trainer, a step at a time."""

    name = "llamita"

    def __init__(self, run: Run, folder: Path, corpus):
        rows = [PackedRows(corpus.split("train"), SEQ_LEN)]
        self.trainer = Trainer(run, folder, stages.fresh_model(run), rows)
        self.stream = batches(rows, self.trainer.sampler, first=0, batch_size=run.batch_size)
        self.model = self.trainer.model

    def plan(self, steps: int) -> None:
        self.trainer.run = dataclasses.replace(self.trainer.run, steps=steps)

    def step(self) -> None:
        self.trainer._step(next(self.stream))

    def nll(self, tokens_BT: np.ndarray) -> np.ndarray:
        return stages.scorer(self.model, "bf16")(tokens_BT)


class Plain:
    """The loop that everybody writes: documents end to end, cut into rows, transformers' model and loss."""

    name = "transformers"

    def __init__(self, run: Run, folder: Path, corpus):
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.run, self.done = run, 0
        split = corpus.split("train")
        stream = np.concatenate([split.tokens(index) for index in range(len(split))]).astype(np.int64)
        self.rows = torch.from_numpy(stream[: len(stream) // SEQ_LEN * SEQ_LEN]).view(-1, SEQ_LEN)
        self.order = torch.Generator().manual_seed(run.data.seed)
        matrices = [weight for weight in self.model.parameters() if weight.ndim > 1]
        norms = [weight for weight in self.model.parameters() if weight.ndim == 1]
        optim = run.optim
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices}, {"params": norms, "weight_decay": 0.0}],
            lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, weight_decay=optim.weight_decay, fused=True,
        )  # fmt: skip

    def plan(self, steps: int) -> None:
        self.run = dataclasses.replace(self.run, steps=steps)

    def step(self) -> None:
        batch = self.rows[torch.randint(len(self.rows), (self.run.batch_size,), generator=self.order)]
        with torch.autocast("cpu", torch.bfloat16):
            loss = self.model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.run.optim.clip)
        ratio = lr_ratio(self.run.schedule, self.done, self.run.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.run.optim.lr * ratio
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.done += 1

    @torch.inference_mode()
    def nll(self, tokens_BT: np.ndarray) -> np.ndarray:
        tokens = torch.from_numpy(tokens_BT)
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.model(input_ids=tokens[:, :-1]).logits
        return F.cross_entropy(logits.float().transpose(1, 2), tokens[:, 1:], reduction="none").numpy()


def seconds_a_step(racer) -> float:
    """Median of 12 steps after 3; they count as training at the rate of warm-up."""
    spent = []
    for _ in range(15):
        began = time.perf_counter()
        racer.step()
        spent.append(time.perf_counter() - began)
    return statistics.median(spent[3:])


def race(racers: list, seconds: float) -> dict[str, dict[str, float]]:
    """Train all for `seconds` each, in turns."""
    result = {}
    for racer in racers:
        racer.plan(1_000_000)
        spent = seconds_a_step(racer)
        racer.plan(15 + round(seconds / spent))
        result[racer.name] = {"steps": 15, "seconds": 15 * spent}
    while any(row["seconds"] < seconds for row in result.values()):
        for racer in racers:
            row, began = result[racer.name], time.perf_counter()
            racer.plan(row["steps"] + round((seconds - row["seconds"]) * row["steps"] / row["seconds"]))
            while (spent := time.perf_counter() - began) < TURN and row["seconds"] + spent < seconds:
                racer.step()
                row["steps"] += 1
            row["seconds"] += time.perf_counter() - began
        print({name: row["steps"] for name, row in result.items()}, file=sys.stderr, flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/stories.json"))
    args = parser.parse_args()
    runtime.keep_freed_memory()
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        tokenizer = vocabularies.train(documents(args.files), 2048, home / "tokenizer").tokenizer
        corpus = corpora.documents_corpus(documents(args.files), tokenizer, home / "corpus", heldout_share=0.05)
        run = dataclasses.replace(
            tiny(), name="stories", shape=preset("tiny", vocab_size=2048), batch_size=8, micro_batch_size=8,
            data=Data(seq_len=SEQ_LEN), optim=Optim(lr=3e-3), schedule=Schedule(warmup_steps=50, decay_share=0.3),
        )  # fmt: skip
        with replacing(home / "start") as new:
            hf.write(Weights.of(stages.fresh_model(run)), tokenizer, new, "F32")
        racers = [Ours(run, home / "run", corpus), Plain(run, home / "start", corpus)]
        result = race(racers, args.minutes * 60)
        split = corpus.split("heldout")
        held = [split.tokens(index) for index in range(len(split))]
        for racer in racers:
            racer.model.eval()
            row = result[racer.name]
            nats = bits.total_nll(racer.nll, held, window=SEQ_LEN, stride=SEQ_LEN // 2)
            row["bits_per_byte"] = bits.bits_per_byte(nats, split.num_bytes)
            row["tokens_per_second"] = row["steps"] * run.batch_size * SEQ_LEN / row["seconds"]
        report = {
            "command": f"python {sys.argv[0]} {' '.join(path.name for path in args.files)} --minutes {args.minutes}",
            "machine": runtime.machine(), "parameters": run.shape.num_params, "run": config.to_dict(run), **result,
            "compressors": bits.compressors(stages.heldout_text(corpus, tokenizer)),
        }  # fmt: skip
        args.out.write_text(json.dumps(report, indent=1) + "\n")
        print(json.dumps(report, indent=1))
        ids = [tokenizer.encode(prompt, bos=True) for prompt in PROMPTS]
        for prompt, done in zip(
            PROMPTS, Engine(racers[0].model, tokenizer).complete(ids, Sampling(max_tokens=90, seed=0)), strict=True
        ):
            print(f"--- {prompt}{done.text}")


if __name__ == "__main__":
    main()
