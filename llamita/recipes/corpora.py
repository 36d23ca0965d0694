"""Corpora from raw text: a recipe, workers of this machine, of Ray or of Slurm, and what came of it."""

import json
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from llamita import log
from llamita.data.build import STAGES, Workers, build, build_documents, prepared
from llamita.data.curate import Judge
from llamita.data.read import Document
from llamita.data.recipe import Recipe, placed
from llamita.data.shards import Corpus
from llamita.data.workspace import corpus_of
from llamita.tokenizer.carried import AnyTokenizer


def judge_of(recipe: Recipe) -> Callable[[], Judge] | None:
    """What measures bits per byte, where the recipe names a model."""
    if not recipe.quality.model:
        return None
    from llamita.recipes.judges import perplexity

    return perplexity(Path(recipe.quality.model))


def build_corpus(
    recipe: Recipe, paths: Sequence[str | Path], tokenizer: AnyTokenizer, out: Path, workers: Workers
) -> Corpus:
    """Raw text at `paths` -> the corpus folder `out`; the same call goes on where it was stopped."""
    recipe = placed(recipe, Path())
    build(recipe, paths, tokenizer, out, workers=workers, judge=judge_of(recipe))
    facts = json.loads((out / "build.json").read_bytes())
    for line in summary(facts):
        log.say(line)
    return Corpus.open(out, verify=False)


def summary(facts: dict[str, Any]) -> list[str]:
    """What a build did, a line a matter."""
    read, kept = facts["read"], facts["kept"]
    lines = [
        f"data: read {read['docs_in']:,} documents, {read['bytes_in'] / 1e6:.1f} MB; "
        f"kept {kept['docs']:,}, {kept['tokens']:,} tokens"
    ]
    removed = sorted(facts["removed"].items(), key=lambda item: (-item[1]["docs"], item[0]))
    lines += [f"  removed {found['docs']:>9,}  {found['bytes'] / 1e6:>9.1f} MB  {reason}" for reason, found in removed]
    lines += [
        f"  skipped {found['count']:>9,}  {reason}: {found['examples'][0]}"
        for reason, found in facts["skipped"].items()
    ]
    return lines


def documents_corpus(docs: Iterable[Document], tokenizer: AnyTokenizer, out: Path, heldout_share: float) -> Corpus:
    """A corpus of documents that a program makes."""
    build_documents(docs, tokenizer, out, heldout_share=heldout_share)
    return Corpus.open(out)


def slurm_script(
    recipe: Recipe, paths: Sequence[str | Path], tokenizer: AnyTokenizer, out: Path, num_tasks: int
) -> str:
    """A shell script that hands every stage to Slurm as an array of `num_tasks`, each behind the one before it.

    A task does every `num_tasks`-th piece of its stage, on any node that sees the folders at the same paths. What
    failed is done by running the script again: it leaves out what is done. Raises ValueError: fewer than one task.
    """
    if num_tasks < 1:
        raise ValueError(f"--slurm wants how many tasks an array has, at least 1, not {num_tasks}")
    work = prepared(recipe, paths, tokenizer, out)
    whole = shlex.quote(str(corpus_of(work) / "manifest.json"))
    lines = [
        "#!/bin/sh", "# Partition, time and memory of the jobs go into SBATCH_OPTIONS.", "set -e",
        f"if [ ! -d {shlex.quote(str(work))} ] && [ -f {whole} ]; then echo 'nothing is left to do'; exit 0; fi",
        "last=",
    ]  # fmt: skip
    for stage in STAGES:
        size = 1 if stage is STAGES[-1] else num_tasks
        command = shlex.join([sys.executable, "-m", "llamita", "data", "task", str(work), stage.name])
        wrapped = f"{command} --number $SLURM_ARRAY_TASK_ID --of {size}"
        lines.append(
            f"last=$(sbatch --parsable $SBATCH_OPTIONS ${{last:+--dependency=afterok:$last}} "
            f"--job-name=llamita-{stage.name} --array=0-{size - 1} --wrap={shlex.quote(wrapped)})"
        )
    return "\n".join([*lines, 'echo "the last job is $last"', ""])
