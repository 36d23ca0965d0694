"""The verbs. Each is a thin call of a public function; heavy imports wait until a verb is chosen."""

import contextlib
import errno
import functools
import io
import itertools
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import OmitArgPrefixes, Positional

from llamita.config import nearest
from llamita.recipes.runs import RECIPES, recipe, sources
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


def tokenizer_train(paths: Positional[tuple[Path, ...]], out: Folder, vocab_size: int = 32_768) -> None:
    """Train a byte-level BPE in Llama 3's format on text files, jsonl or parquet.

    Args:
        paths: Files and folders of text.
        out: Tokenizer folder to write.
        vocab_size: Entries, 256 specials included.
    """
    from llamita.data.read import documents
    from llamita.recipes import stages

    tokenizer = stages.train_tokenizer((doc.text for doc in documents(paths)), vocab_size, out)
    print(f"{out}: {tokenizer.vocab_size} entries, fingerprint {tokenizer.fingerprint[:16]}")


def data_build(
    paths: Positional[tuple[Path, ...]], tokenizer: Folder, out: Folder, heldout_share: float = 0.05
) -> None:
    """Tokenize text into a corpus folder of shards, some documents held out.

    Args:
        paths: Files and folders of text, code, jsonl, parquet; compressed too.
        tokenizer: Tokenizer folder.
        out: Corpus folder to write.
        heldout_share: Share of the documents that is kept from training.
    """
    from llamita.data.read import documents
    from llamita.recipes import stages
    from llamita.tokenizer import Tokenizer

    corpus = stages.build_corpus(documents(paths), Tokenizer.load(tokenizer), out, heldout_share)
    for name in ("train", "heldout"):
        split = corpus.split(name)
        print(f"{name}: {len(split):,} documents, {int(split.lengths.sum()):,} tokens, {split.num_bytes:,} bytes")


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
    from llamita.recipes import stages
    from llamita.runtime import keep_freed_memory

    keep_freed_memory()
    stages.pretrain(started.run, started.dir, prompts=list(started.prompt), sources=origin)


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
    from llamita.recipes import stages
    from llamita.runtime import keep_freed_memory

    keep_freed_memory()
    stages.finetune(tuned.run, tuned.dir, tuned.base, list(read(tuned.conversations)), sources=origin)


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


def export(model: Positional[Path], out: Folder) -> None:
    """Write a Hugging Face folder, read it back and prove that nothing changed.

    Args:
        model: Run folder.
        out: Model folder to write.
    """
    from llamita.recipes import stages

    print(json.dumps(stages.export(model, out), indent=1))


def report(dir: Positional[Path]) -> None:
    """Write a run's report.html.

    Args:
        dir: Run folder.
    """
    from llamita.report import page

    print(page.write(dir))


def show(recipe_name: Positional[str], context: int = 8192) -> None:
    """A recipe's or preset's shape: parameters, FLOPs per token, KV cache.

    Args:
        recipe_name: Recipe or shape preset.
        context: Tokens of context for FLOPs and cache.
    """
    from llamita.model.shape import PRESETS

    shapes = {name: make().shape for name, make in RECIPES.items()} | PRESETS
    if recipe_name not in shapes:
        raise ValueError(f"no recipe or shape is called {recipe_name!r}{nearest(recipe_name, shapes)}")
    shape = shapes[recipe_name]
    print(shape)
    print(f"parameters       {shape.num_params:,}")
    print(f"FLOPs per token  {shape.forward_flops_per_token(context):.4g} forward at {context:,} tokens of context")
    print(f"KV cache         {shape.kv_bytes_per_token():,} bytes per token in bf16, "
          f"{shape.kv_bytes_per_token() * context / 2**30:.3f} GiB at {context:,} tokens")  # fmt: skip


VERBS: dict[str, Callable[..., Any]] = {
    "demo": demo, "tokenizer train": tokenizer_train, "data build": data_build, "train": train, "sft": sft,
    "generate": generate, "chat": chat, "eval": evaluate, "export": export, "report": report, "show": show,
}  # fmt: skip


RULE = set("─-╭╮╰╯+")


def find_verb(words: list[str]) -> tuple[str, list[str]]:
    """The verb, of one word or two, and the words behind it. Raises ValueError that names the nearest."""
    for count in (2, 1):
        if " ".join(words[:count]) in VERBS:
            return " ".join(words[:count]), words[count:]
    raise ValueError(f"no verb is called {' '.join(words[:1])!r}{nearest(' '.join(words[:2]), VERBS)}")


def parse(wanted: Any, words: list[str], prog: str, default: Any = tyro.MISSING_NONPROP) -> Any:
    """tyro's parser for a function or a dataclass, its boxed complaint turned into a one-line ValueError."""
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(wanted, args=words, prog=prog, default=default, config=(tyro.conf.AvoidSubcommands,))
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ValueError(f"{one_line(complaint.getvalue())} ({prog} --help tells more)") from None


def later(verb: Callable[..., None]) -> Callable[..., Callable[[], None]]:
    """The verb as a function that takes the same arguments and does nothing yet."""

    @functools.wraps(verb)
    def bound(*args: Any, **kwargs: Any) -> Callable[[], None]:
        return functools.partial(verb, *args, **kwargs)

    return bound


def one_line(boxed: str) -> str:
    """What tyro's box (drawn in Unicode or in ASCII) says first, and the option that it thinks was meant."""
    lines = [line.strip("│| ") for line in boxed.splitlines()[1:]]
    parts = [list(part) for ruled, part in itertools.groupby(lines, lambda line: set(line) <= RULE) if not ruled]
    said = " ".join(parts[0])
    meant = [line.split()[0] for part in parts[1:] for line in part if line.startswith("--")]
    return f"{said}; did you mean {meant[0]}?" if meant and said.startswith("Unrecognized") else said


def run_verb(verb: str, words: list[str]) -> None:
    """Call a verb whose settings are a whole Run, started from a recipe."""
    if verb == "train" and (not words or words[0].startswith("-")) and "--help" not in words:
        raise ValueError(f"name a recipe: llamita train RECIPE; there are: {', '.join(RECIPES)}")
    named = words.pop(0) if words and not words[0].startswith("-") else "sft"
    start = recipe(named)
    kind = Started if verb == "train" else Tuned
    missing = tyro.MISSING
    blanks = {"dir": missing} if verb == "train" else {"dir": missing, "base": missing, "conversations": missing}
    chosen = parse(kind, words, f"llamita {verb}" + (f" {named}" if verb == "train" else ""), kind(run=start, **blanks))
    VERBS[verb](chosen, sources(chosen.run, start, f"recipe {named}", "command line"))


def main(argv: list[str] | None = None) -> int:
    """Run a verb; 0 on success, 2 on bad input with one line that says what to do, 130 when interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if not words or words[0] in ("-h", "--help"):
            lines = [f"  {verb:16}{(function.__doc__ or '').splitlines()[0]}" for verb, function in VERBS.items()]
            print("usage: llamita VERB ... (llamita VERB --help tells more)\n\n" + "\n".join(lines))
            return 0
        verb, rest = find_verb(words)
        if verb in ("train", "sft"):
            run_verb(verb, rest)
        else:
            parse(later(VERBS[verb]), rest, f"llamita {verb}")()
    except ValueError as error:
        print(f"llamita: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output has left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT):
            raise
        print(
            f"llamita: {error.strerror}: {error.filename or 'the disk'}; nothing half-written is left",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("llamita: stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0
