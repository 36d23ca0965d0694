"""The verbs of a model's life. Each is a thin call of a public function; heavy imports wait until it is called."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import OmitArgPrefixes, Positional

from llamita.train.run import Run

Folder = Annotated[Path, tyro.conf.arg(metavar="FOLDER")]


@dataclass
class Sampled:
    """How tokens are chosen."""

    max_tokens: int = 256
    """Most tokens to write."""
    temperature: float = 0.6
    """0 takes the likeliest token."""
    top_p: float = 0.9
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    """Strings that end the text."""


def demo(
    dir: Folder = Path("runs/demo"), text: str = "", hub: str = "", conversations: str = "",
    minutes: float = 5.0, vocab_size: int = 4096,
) -> None:  # fmt: skip
    """A whole life in minutes: tokenizer, data, pretraining, fine-tuning, export with proof, evaluation, report.

    Args:
        dir: Where everything goes; the same command goes on from there.
        text: Folder or file of your own text; else this machine's Python standard library.
        hub: Name of a Hugging Face data set to use as text (wants the network and the hub extra).
        conversations: File of conversations to fine-tune on; else made from the text.
        minutes: Training time, fine-tuning included.
        vocab_size: Entries of the tokenizer, 256 specials included.
    """
    from llamita.recipes import life

    life.demo(dir, life.Life(text, hub, conversations, minutes, vocab_size))


@dataclass
class Started:
    """A run and the folder it lives in."""

    run: Annotated[Run, tyro.conf.arg(name="")]
    dir: Folder
    """Run folder; the same command goes on from its newest checkpoint."""
    prompt: tuple[str, ...] = ("The ",)
    """Beginnings that are continued during training, to be read by people."""


def train(started: Started, origin: dict[str, str]) -> None:
    """Pretrain: `llamita train RECIPE --dir FOLDER --data.corpus FOLDER [--dotted.field value]`."""
    from llamita.parallel import mesh
    from llamita.recipes import stages
    from llamita.runtime import keep_freed_memory

    keep_freed_memory()
    stages.pretrain(started.run, started.dir, prompts=list(started.prompt), sources=origin)
    mesh.leave()


@dataclass
class Tuned:
    """A fine-tuning run, its base and its conversations."""

    run: Annotated[Run, tyro.conf.arg(name="")]
    dir: Folder
    """Run folder; the same command goes on from its newest checkpoint."""
    base: Folder
    """Run folder or Hugging Face folder of the model to start from."""
    conversations: Path
    """.jsonl or .json: messages, ShareGPT or instruction rows."""


def sft(tuned: Tuned, origin: dict[str, str]) -> None:
    """Fine-tune: `llamita sft --base FOLDER --conversations FILE --dir FOLDER [--dotted.field value]`."""
    from llamita.align.sft import read
    from llamita.parallel import mesh
    from llamita.recipes import stages
    from llamita.runtime import keep_freed_memory

    keep_freed_memory()
    stages.finetune(tuned.run, tuned.dir, tuned.base, list(read(tuned.conversations)), sources=origin)
    mesh.leave()


def generate(
    model: Positional[Path],
    prompt: Positional[str],
    sampled: OmitArgPrefixes[Sampled] = Sampled(),  # noqa: B008
) -> None:
    """Continue a prompt, streamed.

    Args:
        model: Hugging Face folder or exported run folder.
        prompt: The beginning.
        sampled: How tokens are chosen.
    """
    import llamita

    for piece in llamita.load(model).generate(prompt, stream=True, **vars(sampled)):
        print(piece, end="", flush=True)
    print()


def chat(
    model: Positional[Path], prompt: Annotated[str, tyro.conf.arg(aliases=["-p"])] = "", system: str = "",
    sampled: OmitArgPrefixes[Sampled] = Sampled(),  # noqa: B008
) -> None:  # fmt: skip
    """Talk with a fine-tuned model in the terminal.

    Args:
        model: Hugging Face folder or exported run folder.
        prompt: Ask this once and end.
        system: The system message.
        sampled: How tokens are chosen.
    """
    import llamita
    from llamita.serve.chat import chat as talk

    llm = llamita.load(model)
    if not prompt:
        return talk(llm, system=system or None, **vars(sampled))
    messages = [{"role": "system", "content": system}] if system else []
    for piece in llm.chat([*messages, {"role": "user", "content": prompt}], stream=True, **vars(sampled)):
        print(piece, end="", flush=True)
    print()


def evaluate(model: Positional[Path], corpus: Folder, window: int = 0, as_json: Annotated[
    bool, tyro.conf.arg(name="json")] = False) -> None:  # fmt: skip
    """Bits per byte of the corpus's held-out text, beside what gzip, bzip2 and xz need for the same bytes.

    Args:
        model: Run folder or Hugging Face folder.
        corpus: Corpus folder.
        window: Tokens in view; the model's max_seq_len unless given.
        as_json: Print one JSON object.
    """
    from llamita.data.shards import Corpus
    from llamita.eval.bits import compressors
    from llamita.recipes import stages

    llama, tokenizer = stages.open_model(model)
    held = Corpus.open(corpus)
    held.check_tokenizer(tokenizer.fingerprint)
    found = stages.heldout_bits(llama, held, window=window or llama.shape.max_seq_len)
    found |= compressors(stages.heldout_text(held, tokenizer))
    print(json.dumps(found) if as_json else "\n".join(f"{name:14} {value:.4f}" for name, value in found.items()))


def report(dir: Positional[Path]) -> None:
    """Write a run's report.html.

    Args:
        dir: Run folder.
    """
    from llamita.report import page

    print(page.write(dir))
