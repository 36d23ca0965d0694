"""From raw text to a corpus folder, in stages of independent tasks: `data/engine.py` runs them, wherever that is.

read -> match -> resolve -> lines -> frequent -> encode -> shards -> finish
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from llamita.config import load, nearest, save
from llamita.data import engine, files, presets
from llamita.data.assemble import FINISH, SHARDS
from llamita.data.collect import READ, curator
from llamita.data.contamination import Index, read_items
from llamita.data.curate import Judge, scorer
from llamita.data.encode import ENCODE
from llamita.data.engine import Facts, Stage, perform, write_json
from llamita.data.job import Job, begin
from llamita.data.read import Document, Part, plan_parts
from llamita.data.recipe import Recipe, placed, plain
from llamita.data.resolve import FREQUENT, LINES, MATCH, RESOLVE
from llamita.data.shards import Manifest
from llamita.data.workspace import corpus_of, is_placed, place, workspace
from llamita.log import say
from llamita.tokenizer.carried import AnyTokenizer

VERSION = 2  # of what tasks write: a folder of another one is begun anew
JudgeOf = Callable[[Recipe], Callable[[], Judge] | None]
STAGES = (READ, MATCH, RESOLVE, LINES, FREQUENT, ENCODE, SHARDS, FINISH)


@dataclass(frozen=True)
class Workers:
    """Who does the tasks."""

    num_workers: int = 1
    """Processes of this machine."""
    ray: str | None = None
    """Address of a Ray cluster; "" starts one here."""

    def __post_init__(self) -> None:
        if self.num_workers < 1:
            raise ValueError(f"there must be at least 1 worker, not {self.num_workers}")


def build(
    recipe: Recipe,
    paths: Sequence[str | Path],
    tokenizer: AnyTokenizer,
    out: str | Path,
    *,
    workers: Workers = Workers(),
    judge: Callable[[], Judge] | None = None,
) -> Manifest:
    """Makes the corpus folder `out` of the text at `paths`, in place of a corpus that may be there.

    The same text, recipe and tokenizer give the same shards, whoever does the tasks. Killed at any moment, the same
    call goes on. `judge` makes in each worker what gives bits per byte, where the recipe names a model. Raises
    ValueError: no text, what a recipe names is missing, another process builds there.
    """
    recipe = placed(recipe, Path())
    check(recipe)
    if workers.ray is not None:
        engine.check_ray(workers.ray)
    parts = planned(paths)
    with workspace(Path(out), key(recipe, tokenizer, parts)) as folder:
        job = prepare(folder, recipe, tokenizer, parts, judge)
        with engine.executor(workers.num_workers, workers.ray) as on:
            engine.run(STAGES, job, on, describe)
    return Manifest.read(Path(out))


def prepared(recipe: Recipe, paths: Sequence[str | Path], tokenizer: AnyTokenizer, out: str | Path) -> Path:
    """The work folder of a build whose tasks others do; `task` does them."""
    recipe = placed(recipe, Path())
    check(recipe)
    parts = planned(paths)
    with workspace(Path(out), key(recipe, tokenizer, parts)) as folder:
        prepare(folder, recipe, tokenizer, parts, None)
    return folder


def task(folder: Path, name: str, number: int, of: int, judge_of: JudgeOf) -> None:
    """Every `of`-th task of a stage that is not yet done, from `number` on; after the last stage the corpus is put in
    its place. Does nothing where it stands there already.

    Raises ValueError: no such stage or task, `folder` is no work folder, the stages before this one are not done.
    """
    stages = {stage.name: stage for stage in STAGES}
    if name not in stages:
        raise ValueError(f"no stage is called {name!r}{nearest(name, stages)}")
    if not 0 <= number < of:
        raise ValueError(f"the tasks of an array are numbered from 0 to below --of, so there is no {number} of {of}")
    folder = folder.resolve()
    if is_placed(folder):
        say(f"{corpus_of(folder)} is whole: nothing is left to do")
        return
    if not (folder / "prepared").exists():
        raise ValueError(f"{folder} is no work folder: `llamita data build ... --slurm TASKS` prepares one")
    recipe = load(Recipe, folder / "recipe.toml")
    num_parts = json.loads((folder / "prepared").read_bytes())["num_parts"]
    job = Job(folder, recipe, num_parts, judge_of(recipe))
    for before in STAGES[: STAGES.index(stages[name])]:
        if left := before.open_tasks(job):
            raise ValueError(f"stage {name!r} is not due: tasks of {before.name!r} come first ({len(left):,} open)")
    for open_task in stages[name].open_tasks(job):
        if open_task % of == number:
            perform(stages[name], job, open_task)
    if stages[name] is FINISH and not FINISH.open_tasks(job):
        place(folder)


def planned(paths: Sequence[str | Path]) -> list[Part]:
    """The parts of the input, by absolute paths: tasks may run elsewhere. Raises ValueError where there is no file."""
    local = [path if "://" in str(path) else Path(path).absolute() for path in paths]
    if parts := plan_parts(local, files.PART_BYTES):
        return parts
    raise ValueError("there is no file at the paths given: name files of text, or folders that hold some")


def check(recipe: Recipe) -> None:
    """Raises ValueError for what a recipe names and there is not, before any work is done."""
    for asked in (recipe.rules.prose, recipe.rules.code, recipe.rules.table):
        presets.names(asked)
    if recipe.quality.classifier:
        scorer(recipe)


def key(recipe: Recipe, tokenizer: AnyTokenizer, parts: Sequence[Part]) -> str:
    """What decides whether a killed build may go on: everything that tasks read."""
    whole = [VERSION, recipe.fingerprint, tokenizer.fingerprint, [part.to_json() for part in parts]]
    read = [piece.path for part in parts for piece in part.pieces]
    read += [piece.path for piece in files.listed(recipe.contamination.evals)]
    for named in (recipe.quality.classifier, recipe.quality.model):
        read += [str(path) for path in sorted(Path(named).rglob("*")) if path.is_file()] or [named] if named else []
    states = [files.state_of(path) for path in read if "://" not in path]
    return hashlib.sha256(json.dumps([whole, states]).encode()).hexdigest()


def prepare(
    folder: Path, recipe: Recipe, tokenizer: AnyTokenizer, parts: Sequence[Part], judge: Callable[[], Judge] | None
) -> Job:
    """What all tasks need, in the work folder; written once."""
    job = Job(folder, recipe, len(parts), judge)
    begin(job, tokenizer)
    curator.cache_clear()
    whole = folder / "prepared"
    if not whole.exists():
        job.corpus.mkdir(exist_ok=True)
        tokenizer.save(job.corpus / "tokenizer")
        (folder / "parts").mkdir(exist_ok=True)
        for number, part in enumerate(parts):
            write_json(job.path("parts", number, "json"), part.to_json())
        save(recipe, folder / "recipe.toml")
        if recipe.contamination.evals:
            Index.of(read_items(recipe.contamination.evals)).save(job.index)
        write_json(whole, {"num_parts": len(parts)})
    return job


def describe(stage: Stage, facts: list[Facts]) -> str:
    """What a stage has found so far, for the line of progress."""
    if stage is not READ:
        return ""
    sums: Counter[str] = Counter()
    removed: Counter[str] = Counter()
    for found in facts:
        sums.update({name: found[name] for name in ("docs_in", "bytes_in", "docs") if name in found})
        removed.update(found.get("removed", {}).get("docs", {}))
    named = ", ".join(f"{reason} {count:,}" for reason, count in removed.most_common(3))
    return (f"{sums['docs_in']:,} documents, {sums['bytes_in'] / 1e6:.1f} MB, kept {sums['docs']:,}, "
            f"removed {removed.total():,}" + f" ({named})" * bool(named))  # fmt: skip


def build_documents(
    docs: Iterable[Document], tokenizer: AnyTokenizer, out: str | Path, *, heldout_share: float = 0.05, seed: int = 0
) -> Manifest:
    """A corpus of documents that a program makes: written to a file first, then built by the recipe `plain`."""
    out = Path(out)
    recipe = replace(plain(), heldout_share=heldout_share, seed=seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as spool:
        path = Path(spool) / "documents.jsonl"
        with path.open("wb") as file:
            for document in docs:
                row = asdict(document)
                file.write(json.dumps({**row, "id": row.pop("name")}).encode() + b"\n")
        return build(recipe, [path], tokenizer, out)
