"""The verbs of vocabularies. Each is a thin call of a public function; heavy imports wait until it is called."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

SIZES = (4096, 8192, 16_384, 32_768, 49_152, 65_536, 128_256)
Folder = Annotated[Path, tyro.conf.arg(metavar="FOLDER")]


def named(paths: tuple[Path, ...], what: str) -> tuple[Path, ...]:
    """The paths. ValueError when none is given."""
    if not paths:
        raise ValueError(f"name files or folders of {what}")
    return paths


def train(
    paths: Positional[tuple[Path, ...]], out: Folder, vocab_size: int = 32_768, max_memory: int = 2048,
    workers: int | None = None, source_weights: dict[str, float] = {}, lang_weights: dict[str, float] = {},  # noqa: B006
    chat_format: Literal["llama3", "llama3.1"] = "llama3",
) -> None:  # fmt: skip
    """Train a byte-level BPE in Llama 3's format on text of any length, in bounded memory.

    Args:
        paths: Files and folders of text, code, jsonl, parquet; compressed too.
        out: Tokenizer folder to write; a stopped training goes on when the same command is given.
        vocab_size: Entries, 256 specials included; Meta's is 128256.
        max_memory: MiB that training may take; the rarest words are left out where that does not suffice.
        workers: Threads that count; all cores unless given.
        source_weights: How often the texts of a source count: wiki 2 code 4.
        lang_weights: How often the texts of a language count: de 2 fr 0.5.
        chat_format: Dialog format of the folder's template: llama3, or llama3.1 with tools.
    """
    from llamita.data.read import documents
    from llamita.recipes import vocabularies
    from llamita.tokenizer.train import Weights

    found = vocabularies.train(
        documents(named(paths, "text")), vocab_size, out, max_memory=max_memory * 2**20, workers=workers,
        weights=Weights(source_weights, lang_weights), chat_format=chat_format,
    )  # fmt: skip
    for (source, lang), share in sorted(found.shares.items(), key=lambda item: -item[1])[:20]:
        print(f"{share:7.2%}  {source or '-'} {lang}")
    print(f"{found.num_texts:,} texts, {found.num_bytes:,} bytes, {found.num_words:,} different words")
    print(f"{out}: {found.tokenizer.vocab_size} entries, fingerprint {found.tokenizer.fingerprint[:16]}")


def compare(
    vocabularies: Positional[tuple[Path, ...]], text: tuple[Path, ...], plot: Path | None = None,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:  # fmt: skip
    """Measure vocabularies on the same text: compression by language and source, fallback, unused entries, speed.

    Args:
        vocabularies: Folders or files: tiktoken ranks, SentencePiece models, tokenizer.json; the first is the measure.
        text: Files and folders of text; rows of jsonl and parquet may have lang and source.
        plot: Write bytes per token by language as .png, .svg or .pdf.
        as_json: Print one JSON object.
    """
    from rich.console import Console

    from llamita.data.read import documents
    from llamita.recipes import vocabularies as stage
    from llamita.tokenizer.plot import check
    from llamita.tokenizer.plot import plot as draw

    if plot:
        check(plot)
    found = stage.compare(named(vocabularies, "vocabularies"), documents(text))
    if as_json:
        print(json.dumps(found.to_dict()))
    else:
        console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)
        for table in found.tables():
            console.print(table)
    if plot:
        draw(found, plot)


def advise(
    text: tuple[Path, ...], shape: str = "100m", flops: float | None = None,
    sizes: tuple[int, ...] = SIZES, max_memory: int = 2048,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:  # fmt: skip
    """Which vocabulary size a model should have: parameters, cost, memory and predicted loss at equal compute.

    Args:
        text: Files and folders of the text that the model will be trained on, or a sample of it.
        shape: Shape preset; its vocabulary is replaced by each size.
        flops: Training FLOPs; 20 tokens a parameter unless given.
        sizes: Entries to compare, 256 specials included.
        max_memory: MiB that training the vocabularies may take.
        as_json: Print one JSON object.
    """
    from llamita.data.read import documents
    from llamita.model.shape import preset
    from llamita.recipes import vocabularies

    advice = vocabularies.advise(
        documents(text), preset(shape), flops=flops, sizes=sizes, max_memory=max_memory * 2**20
    )
    if as_json:
        print(json.dumps(dataclasses.asdict(advice)))
    else:
        vocabularies.show_advice(advice)


def view(
    vocabularies: Positional[tuple[Path, ...]], text: str = "", html: Path | None = None, ids: bool = False,
    specials: bool = False,
) -> None:  # fmt: skip
    """Show how vocabularies cut a text: coloured tokens in the terminal, or a page that explains them.

    Args:
        vocabularies: Folders or files: tiktoken ranks, SentencePiece models, tokenizer.json.
        text: What to cut; standard input unless given.
        html: Write one page about all of them there.
        ids: Show the ids too.
        specials: Read names such as <|eot_id|> in the text as special tokens.
    """
    from rich.console import Console

    from llamita.recipes import vocabularies as stage
    from llamita.tokenizer import view as room

    if html and (html.is_dir() or not html.parent.is_dir()):
        raise ValueError(f"{html}: no place for a file; give one in a folder that is there")
    if not text and sys.stdin.isatty():
        raise ValueError("no text: give --text, or pipe it in")
    opened = dict(stage.named(named(vocabularies, "vocabularies")))
    text = text or sys.stdin.read()
    chosen: Literal["text", "allow"] = "allow" if specials else "text"
    if html:
        html.write_text(room.page(opened, text, specials=chosen), encoding="utf-8")
        print(html)
        return
    console = Console(highlight=False)
    for name, vocabulary in opened.items():
        if len(opened) > 1:
            console.print(name, style="bold", markup=False)
        room.show(vocabulary, text, console, ids=ids, specials=chosen)
