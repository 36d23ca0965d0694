"""The verbs that make a corpus of raw text."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional

from llamita.cli.verbs import Folder
from llamita.data.recipe import Recipe


@dataclass
class Built:
    """A data recipe, raw text and the corpus to make of it."""

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    paths: Positional[tuple[str, ...]]
    """Files and folders: text, code, HTML, WARC, jsonl, parquet; compressed too; s3://, https:// and the like."""
    tokenizer: Folder
    """Tokenizer folder."""
    out: Folder
    """Corpus folder to write."""
    workers: int = 0
    """Processes; 0 takes one for each core."""
    ray: str | None = None
    """Address of a Ray cluster that does the tasks; "" starts one here."""
    slurm: int = 0
    """Do nothing but write CORPUS-submit.sh beside the corpus: Slurm arrays of so many tasks."""


def build(built: Built) -> None:
    """Curate and tokenize raw text: `llamita data build RECIPE PATHS --tokenizer FOLDER --out FOLDER`."""
    import os

    from llamita.data.build import Workers
    from llamita.data.engine import settle
    from llamita.recipes import corpora
    from llamita.tokenizer.opened import open_tokenizer

    settle()
    tokenizer = open_tokenizer(built.tokenizer)
    if built.slurm:
        script = built.out.with_name(f"{built.out.name}-submit.sh")
        script.write_text(corpora.slurm_script(built.recipe, built.paths, tokenizer, built.out, built.slurm))
        print(f"sh {script}")
        return
    workers = Workers(built.workers or len(os.sched_getaffinity(0)), built.ray)
    corpus = corpora.build_corpus(built.recipe, built.paths, tokenizer, built.out, workers)
    for name in ("train", "heldout"):
        split = corpus.split(name)
        print(f"{name}: {len(split):,} documents, {int(split.lengths.sum()):,} tokens, {split.num_bytes:,} bytes")


def task(folder: Positional[Path], stage: Positional[str], number: int, of: int) -> None:
    """Do a Slurm task's share of a stage; `data build --slurm` writes the script that calls this.

    Args:
        folder: Work folder that `data build --slurm` prepared.
        stage: Name of the stage.
        number: The task's number, from 0.
        of: Tasks of the array.
    """
    from llamita.data import build
    from llamita.data.engine import settle
    from llamita.recipes.corpora import judge_of

    settle()
    build.task(folder, stage, number, of, judge_of)
