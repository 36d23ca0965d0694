"""The verbs that look at corpora: ledger, inspection, data card, exports, the plan of a large build."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from tyro.conf import Positional

from llamita.cli.verbs import Folder
from llamita.data.export import Format

if TYPE_CHECKING:
    from rich.console import Console

AsJson = Annotated[bool, tyro.conf.arg(name="json")]
NODE_CORES = 192


def console() -> "Console":
    """Prints what documents say as it is: no markup, and wide where no person looks."""
    from rich.console import Console

    return Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 200)


def where(
    run_folder: Positional[Path], step: Positional[int] = 0, document: str = "",
    corpus: Path | None = None, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Which documents a training step read, or which steps read a document.

    Args:
        run_folder: Run folder.
        step: The step, counted from 1 as progress and metrics.jsonl do.
        document: Name or id of a document; then the steps that have read it.
        corpus: Where the corpus lies now, if it has moved.
        as_json: Print one JSON object.
    """
    from llamita.recipes import where as ledger

    if bool(step) == bool(document):
        raise ValueError("give either a step or --document NAME: llamita data where RUN 100")
    run = ledger.Trained.open(run_folder, corpus)
    found = run.at(step) if step else run.document(document)
    if as_json:
        print(json.dumps(found))
    else:
        (ledger.show_step if step else ledger.show_document)(found, console())


def inspect(
    paths: Positional[tuple[str, ...]], rule: str = "", recipe: str = "web", count: int = 20, verify: bool = False,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Look at documents of a corpus and at what its build removed, or at what a recipe would do with raw text.

    Args:
        paths: A corpus folder; or files and folders of raw text, of which the first 10,000 documents are tried.
        rule: Show what went for this reason, such as gopher-quality@1 or duplicate:near.
        recipe: For raw text: a data recipe, or a .toml file.
        count: Documents to show, evenly spread.
        verify: Read the whole corpus and hold every file against its hash first.
        as_json: Print one JSON object.
    """
    from llamita.data.recipe import recipe as named
    from llamita.data.shards import Corpus
    from llamita.recipes import where as ledger

    if not paths:
        raise ValueError("name a corpus folder, or files and folders of text")
    if count < 1:
        raise ValueError(f"--count must be at least 1, not {count}")
    if len(paths) == 1 and (Path(paths[0]) / "manifest.json").is_file():
        if verify:
            Corpus.open(paths[0], verify=True)
        found = ledger.inspect_corpus(Path(paths[0]), rule, count)
    else:
        found = ledger.inspect_paths(paths, named(recipe), rule, count)
    if as_json:
        print(json.dumps({"documents": found}))
    else:
        ledger.show_documents(found, console())


def card(corpus: Positional[Path]) -> None:
    """Write a corpus's card.md and card.html: what it holds, what was removed and why, how to build it again.

    Args:
        corpus: Corpus folder.
    """
    from llamita.data import ledger
    from llamita.data.shards import Corpus
    from llamita.report import card as page

    for path in page.write(ledger.papers(Corpus.open(corpus, verify=False)), corpus):
        print(path)


def export(corpus: Positional[Path], out: Folder, format: Format) -> None:
    """Write a corpus for another trainer: Megatron's .bin and .idx, or flat .npy arrays of token ids.

    Args:
        corpus: Corpus folder.
        out: Folder to write; it must not be there.
        format: megatron or npy.
    """
    from llamita.data import export as room
    from llamita.data.shards import Corpus

    for path in room.export(Corpus.open(corpus, verify=True), out, format):
        print(path)


def plan(
    tokens: float, recipe: str = "web", cores: int = NODE_CORES, measured: Path | None = None, as_json: AsJson = False
) -> None:
    """What a corpus of so many tokens takes: core-hours by stage, disk, memory, wall time.

    Args:
        tokens: Tokens to be left at the end: 15e12.
        recipe: A data recipe, or a .toml file; web recipes are taken to read dumps of Common Crawl.
        cores: Cores that work at once.
        measured: Corpus folder whose build gives the recipe, the speeds and how much is left; else the table in
            plan/data.py.
        as_json: Print one JSON object.
    """
    from llamita.config import load, to_dict
    from llamita.data.files import PART_BYTES
    from llamita.data.recipe import Recipe
    from llamita.data.recipe import recipe as named
    from llamita.data.shards import SHARD_TOKENS, Corpus
    from llamita.plan import data as room

    chosen = to_dict(named(recipe))
    entering, speeds, yields = room.stages(chosen), room.SPEEDS, room.Yields()
    if measured:
        folder = Corpus.open(measured, verify=False).folder
        chosen = to_dict(load(Recipe, folder / "recipe.toml"))
        times, facts = (json.loads((folder / name).read_bytes()) for name in ("build-times.json", "build.json"))
        entering, (speeds, yields) = room.BUILD, room.measured(times, facts)
    found = room.plan(
        tokens, cores, entering, speeds, yields, part_bytes=PART_BYTES, shard_tokens=SHARD_TOKENS,
        dumps=room.is_web(chosen),
    )  # fmt: skip
    if as_json:
        totals = {"core_hours": found.core_hours, "wall_hours": found.wall_hours}
        print(json.dumps(dataclasses.asdict(found) | totals))
    else:
        print("\n".join(room.text(found)))
