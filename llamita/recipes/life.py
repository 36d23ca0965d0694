"""`llamita demo`: a whole life on real text, from a folder of text to a chatting, exported Llama 3 of one's own.

Every stage leaves its result in the folder and is passed over when that result is there, so the same command goes on.
"""

import dataclasses
import json
import random
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from llamita import config, log, runtime
from llamita.align import sft
from llamita.data.loader import batches
from llamita.data.pack import PackedRows
from llamita.data.read import Document, documents
from llamita.data.sampler import Sampler
from llamita.data.shards import Corpus
from llamita.eval import bits
from llamita.recipes import convert, corpora, stages, stdlib, vocabularies
from llamita.recipes.runs import demo as demo_run
from llamita.recipes.runs import sft as sft_run
from llamita.recipes.runs import sources
from llamita.report import page
from llamita.serve.llm import LLM
from llamita.tokenizer import Tokenizer
from llamita.train import state
from llamita.train.compute import accumulate
from llamita.train.optim import Optimizer
from llamita.train.run import Run

# Share of the time budget that goes to fine-tuning; the rest is pretraining.
SFT_SHARE = 0.2
STDLIB_PROMPTS = ["def main(", "class Queue:\n", "The "]


@dataclass(frozen=True)
class Life:
    """What a demo is made of. It is kept in the folder, and another is refused there."""

    text: str = ""
    """Folder or file of your own text; the Python standard library of this machine unless one is named."""
    hub: str = ""
    """Name of a Hugging Face data set to use as text (wants the network and the `hub` extra)."""
    conversations: str = ""
    """File of conversations to fine-tune on; made from the text unless one is named."""
    minutes: float = 5.0
    """Training time on this machine, fine-tuning included; steps are planned from its measured speed."""
    vocab_size: int = 4096
    """Entries of the tokenizer, 256 specials included."""

    def __post_init__(self) -> None:
        if self.text and self.hub:
            raise ValueError("name a folder with --text or a data set with --hub, not both")
        if self.minutes <= 0:
            raise ValueError(f"--minutes must be more than 0, got {self.minutes}")


def hub_documents(name: str) -> Iterator[Document]:
    """Text of a Hugging Face data set's jsonl, parquet and text files, downloaded once by huggingface_hub."""
    from huggingface_hub import snapshot_download

    patterns = ["*.jsonl*", "*.parquet", "*.txt"]
    try:
        folder = snapshot_download(name, repo_type="dataset", allow_patterns=patterns)
    except (OSError, ValueError) as error:
        raise ValueError(f"the data set {name!r} cannot be had from the hub: {str(error).splitlines()[0]}") from error
    return documents([Path(folder)])


def life_documents(life: Life) -> Iterator[Document]:
    if life.hub:
        return hub_documents(life.hub)
    return documents([Path(life.text)]) if life.text else stdlib.texts()


def own_conversations(docs: list[Document]) -> list[list[sft.Message]]:
    """Exchanges made from any text: a passage is given and the words that follow it are the answer."""
    pairs = []
    for doc in docs:
        words = doc.text[:20_000].split(" ")
        for start in range(0, len(words) - 60, 120):
            passage, answer = " ".join(words[start : start + 20]), " ".join(words[start + 20 : start + 60])
            pairs.append([{"role": "user", "content": f"Go on: {passage}"}, {"role": "assistant", "content": answer}])
    if not pairs:
        raise ValueError("the text is too short to make conversations of; give some with --conversations FILE")
    return pairs[:6000]


class Lifetime:
    """One demo folder and the stages that fill it."""

    def __init__(self, folder: Path, life: Life):
        self.folder, self.life = folder, life
        kept = folder / "life.toml"
        self.is_new = not kept.is_file()
        if not self.is_new:
            changed = config.diff(config.load(Life, kept), life)
            if changed:
                listed = ", ".join(f"{key} {old!r}, now {new!r}" for key, (old, new) in changed.items())
                raise ValueError(f"{folder} holds another life ({listed}); give another folder with --dir")
            return
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(f"{folder} is not empty and holds no demo; give another folder with --dir")
        next(life_documents(life))  # text that cannot be read is refused before anything is written
        folder.mkdir(parents=True, exist_ok=True)
        config.save(life, kept)

    @contextmanager
    def stage(self, name: str, note: str) -> Iterator[None]:
        log.say(f"== {name}: {note}")
        began = time.perf_counter()
        yield
        spent = time.perf_counter() - began
        kept = self.folder / "stages.json"
        before = self.stages()
        spent_before = next((row["seconds"] for row in before if row["name"] == name), 0.0)
        row = {"name": name, "seconds": spent + spent_before, "note": note}
        write_json(kept, [*(other for other in before if other["name"] != name), row])
        log.say(f"== {name} took {log.duration(spent)}")

    def stages(self) -> list[dict[str, Any]]:
        """Name, seconds over all sessions, and note of each stage so far."""
        kept = self.folder / "stages.json"
        return json.loads(kept.read_text()) if kept.is_file() else []

    def prepare(self) -> tuple[Tokenizer, Corpus, list[list[sft.Message]]]:
        """Everything that training needs. Text that does not suffice (ValueError) leaves no new folder behind."""
        try:
            with self.stage("tokenizer", f"byte-level BPE of {self.life.vocab_size} entries, Llama 3's split"):
                tokenizer = self.tokenizer()
            with self.stage("data", "tokenized into shards, 5% of the documents held out"):
                corpus = self.corpus(tokenizer)
                PackedRows(corpus.split("train"), demo_run().data.seq_len)
                return tokenizer, corpus, self.conversations()
        except ValueError:
            if self.is_new:
                shutil.rmtree(self.folder)
            raise

    def tokenizer(self) -> Tokenizer:
        home = self.folder / "tokenizer"
        if (home / "tokenizer.model").is_file():
            return Tokenizer.load(home)
        return vocabularies.train(life_documents(self.life), self.life.vocab_size, home).tokenizer

    def corpus(self, tokenizer: Tokenizer) -> Corpus:
        home = self.folder / "corpus"
        if (home / "manifest.json").is_file():
            corpus = Corpus.open(home)
            corpus.check_tokenizer(tokenizer.fingerprint)
            return corpus
        return corpora.documents_corpus(life_documents(self.life), tokenizer, home, heldout_share=0.05)

    def conversations(self) -> list[list[sft.Message]]:
        home = self.folder / "conversations.jsonl"
        if not home.is_file():
            if self.life.conversations:
                found = list(sft.read(Path(self.life.conversations)))
            elif self.life.text or self.life.hub:
                found = own_conversations(list(life_documents(self.life)))
            else:
                found = stdlib.conversations()
            random.Random(0).shuffle(found)
            sft.write(home, found)
        return list(sft.read(home))

    def pretrain(self, corpus: Corpus) -> None:
        prompts = ["Once"] if self.life.text or self.life.hub else STDLIB_PROMPTS
        base = demo_run()
        if (self.folder / "run.toml").is_file():
            run = config.load(Run, self.folder / "run.toml")
        else:
            base = config.override(base, {"shape.vocab_size": self.life.vocab_size})
            base = dataclasses.replace(base, data=dataclasses.replace(base.data, corpus=str(self.folder / "corpus")))
            rows = PackedRows(corpus.split("train"), base.data.seq_len)
            run = planned(base, rows, self.life.minutes * (1 - SFT_SHARE))
        stages.pretrain(
            run, self.folder, prompts=prompts, sources=sources(run, demo_run(), "recipe demo", "demo's plan")
        )

    def finetune(self, conversations: list[list[sft.Message]]) -> None:
        home = self.folder / "sft"
        if (home / "run.toml").is_file():
            run = config.load(Run, home / "run.toml")
        else:
            model, tokenizer = stages.open_model(self.folder)
            examples = sft.Examples(tokenizer, conversations)
            base = config.override(sft_run(), {"shape.vocab_size": model.shape.vocab_size})
            rows = PackedRows(examples, base.data.seq_len, masks=examples.masks, keep_whole=True)
            run = planned(base, rows, self.life.minutes * SFT_SHARE)
        stages.finetune(
            run,
            home,
            self.folder,
            conversations,
            sources=sources(run, sft_run(), "recipe sft", "demo's plan"),
        )

    def results(self, corpus: Corpus, tokenizer: Tokenizer, conversations: list[list[sft.Message]]) -> dict[str, Any]:
        model, _ = stages.open_model(self.folder)
        found = stages.heldout_bits(model, corpus, window=model.shape.max_seq_len, precision="bf16")
        counters = state.counters(stages.newest(self.folder))
        llm = LLM.load(self.folder)
        asked = [messages[0]["content"] for messages in conversations[::50][:3]]
        if not (self.life.text or self.life.hub):
            asked = ["What does shutil.copytree do?", *asked]
        examples = [
            {
                "prompt": question,
                "reply": llm.chat([{"role": "user", "content": question}], temperature=0.0, max_tokens=80),
            }
            for question in asked
        ]
        return {
            "parameters": model.shape.num_params,
            "tokens": counters.tokens,
            **found,
            **bits.compressors(stages.heldout_text(corpus, tokenizer)),
            "heldout_bytes": corpus.split("heldout").num_bytes,
            "tokens_per_second": counters.tokens / counters.elapsed,
            "train_flops": counters.tokens * model.shape.train_flops_per_token(demo_run().data.seq_len),
            "peak_memory_gib": runtime.peak_memory_gib(torch.device("cpu")),
            "chat_examples": examples,
        }


def planned(run: Run, rows: PackedRows, minutes: float) -> Run:
    """The run with as many steps as fit into `minutes` at the speed measured here on its own first batches.

    Steps = 60 * minutes / (median seconds a step); a throwaway model is trained, the run starts afresh.
    """
    device = runtime.pick_device(run.device)
    model = stages.fresh_model(run).to(device)
    optimizer = Optimizer(model, run.optim)
    dtype = torch.bfloat16 if run.precision == "bf16" else torch.float32
    stream = batches([rows], Sampler([len(rows)], None, run.data.seed), first=0, batch_size=run.batch_size)
    spent = []
    for _ in range(7):
        batch = next(stream)
        began = time.perf_counter()
        accumulate(model, batch, run.micro_batch_size, dtype)
        torch.nn.utils.clip_grad_norm_(model.parameters(), run.optim.clip)
        optimizer.step(0.01)
        spent.append(time.perf_counter() - began)
    step_seconds = sorted(spent[2:])[2]
    steps = max(20, round(60 * minutes / step_seconds))
    log.say(f"plan: {step_seconds:.2f} s a step here, so {steps} steps fill {minutes:.1f} minutes")
    return dataclasses.replace(run, steps=steps)


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(json.dumps(value, indent=1))
    aside.replace(path)


def demo(folder: Path, life: Life) -> dict[str, Any]:
    """Live it: tokenizer, corpus, pretraining, fine-tuning, export with proof, evaluation, report. Returns results."""
    runtime.keep_freed_memory()
    lived = Lifetime(folder, life)
    if (folder / "results.json").is_file():
        results = json.loads((folder / "results.json").read_text())
        log.say(f"{folder} is complete; its results again:")
        show(results, folder)
        return results
    tokenizer, corpus, conversations = lived.prepare()
    with lived.stage("pretraining", "next token on packed documents"):
        lived.pretrain(corpus)
    with lived.stage("fine-tuning", f"{len(conversations):,} conversations, loss on the assistant's tokens only"):
        lived.finetune(conversations)
    with lived.stage("export", "a Hugging Face folder, read back and compared"):
        proof = convert.convert(folder / "sft", folder / "model")
    with lived.stage("evaluation", "the whole held-out text, and a few questions"):
        results = lived.results(corpus, tokenizer, conversations)
    results |= {"stages": lived.stages(), "proof": proof}
    write_json(folder / "results.json", results)
    page.write(folder)
    show(results, folder)
    return results


def show(results: dict[str, Any], folder: Path) -> None:
    """The closing table, the report's path and the line to type."""
    table = Table(title="your Llama 3", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in (
        ("parameters", f"{results['parameters']:,}"),
        ("tokens trained on", f"{results['tokens']:,}"),
        ("bits per byte, held-out text", f"{results['bits_per_byte']:.3f}"),
        ("  gzip -9 needs", f"{results['gzip']:.3f}"),
        ("  xz -9e needs", f"{results['xz']:.3f}"),
        ("tokens per second, training", f"{results['tokens_per_second']:,.0f}"),
        ("peak memory", f"{results['peak_memory_gib']:.1f} GiB"),
        ("time", log.duration(sum(stage["seconds"] for stage in results["stages"]))),
    ):
        table.add_row(name, value)
    log.console.print(table)
    for example in results["chat_examples"]:
        log.say(f"  you: {example['prompt']}\n  it:  {example['reply'].strip()}")
    log.say(f"report: {folder / 'report.html'}")
    log.say(f"model:  {folder / 'model'} (AutoModelForCausalLM.from_pretrained loads it)")
    log.say(f"chat:   {sys.argv[0]} chat {folder}")
