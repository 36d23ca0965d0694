"""A run, its corpus and the ledger between them; and a look at what a corpus holds or a recipe would do."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table

from llamita import config, log
from llamita.data import ledger
from llamita.data.recipe import Contamination, Recipe
from llamita.data.sampler import Sampler
from llamita.data.shards import Corpus
from llamita.recipes import stages
from llamita.tokenizer.opened import open_tokenizer
from llamita.train import schedule
from llamita.train.run import Run

if TYPE_CHECKING:
    from llamita.data.pack import PackedRows

TRIED_DOCS = 10_000
EXCERPT_CHARS = 1000


@dataclasses.dataclass(frozen=True)
class Trained:
    """A run folder opened with its corpus: rows and sampler are those of training."""

    run: Run
    corpus: Corpus
    rows: "Sequence[PackedRows]"
    sampler: Sampler
    step: int
    """The last step that was logged."""

    @classmethod
    def open(cls, folder: Path, corpus: Path | None = None) -> "Trained":
        """`corpus` is where the corpus lies now, unless it is where the run found it.

        Raises ValueError: no run folder, or the corpus is another one.
        """
        if not (folder / "run.toml").is_file():
            raise ValueError(f"{folder} has no run.toml: give the folder of a run, as `llamita train` writes it")
        run = config.load(Run, folder / "run.toml")
        if not run.data.corpus:
            raise ValueError(f"{folder} was not trained on a corpus folder: the ledger tells of pretraining alone")
        found = Corpus.open(corpus or Path(run.data.corpus), verify=False)
        if found.manifest.fingerprint != run.data.fingerprint:
            raise ValueError(f"{found.folder} is not the corpus that {folder} was trained on; give --corpus FOLDER")
        kept = folder / "packing"
        rows, sampler, _ = stages.mixed_rows(run, found, kept if kept.is_dir() else None)
        lines = log.read(folder / "metrics.jsonl")
        return cls(
            run, found, rows, sampler, max((line["step"] for line in lines if line["kind"] == "train"), default=0)
        )

    def at(self, step: int) -> dict[str, Any]:
        """What step `step`, counted from 1 as the metrics do, reads: see `ledger.step`."""
        if not 1 <= step <= self.run.steps:
            raise ValueError(f"step {step} is none of this run's: they go from 1 to {self.run.steps:,}")
        first, behind = (schedule.first_sample(self.run, each) for each in (step - 1, step))
        found = ledger.step(self.corpus, self.rows, self.sampler, range(first, behind))
        return {"step": step, "run_steps": self.run.steps, "logged_steps": self.step} | found

    def document(self, key: str) -> dict[str, Any]:
        """The documents of that name or id, and for each the steps that have read it so far."""
        documents = []
        drawn = schedule.first_sample(self.run, self.step)
        for split, number in ledger.find(self.corpus, key):
            seen = split == "train"
            place = partial(schedule.place, self.run)
            reads = ledger.reads(self.rows, self.sampler, number, place, drawn) if seen else []
            (facts,) = ledger.ledger_rows(self.corpus, [self.corpus.split(split).place(number)])
            documents.append({"split": split} | ledger.of_document(facts) | {"reads": reads})
        return {"logged_steps": self.step, "documents": documents}


def show_step(found: dict[str, Any], console: Console) -> None:
    title = f"step {found['step']:,} of {found['run_steps']:,}: {found['tokens']:,} tokens"
    console.print(title + ", not yet trained" * (found["step"] > found["logged_steps"]), style="bold")
    table = Table("row", "tokens", "of the document", "share", "epoch", "document", "source", "licence", "language",
                  "kind", "address", box=None)  # fmt: skip
    for each in found["documents"]:
        stretch, part = (f"{start:,}-{end:,}" for start, end in (each["row_tokens"], each["doc_tokens"]))
        table.add_row(
            str(each["row"]), stretch, part, f"{each['share']:.2%}", str(each["epoch"]),
            *(_plain(each[name]) for name in ("name", "source", "license", "lang", "kind", "url")),
        )  # fmt: skip
    console.print(table)
    for column, shares in found["shares"].items():
        console.print(f"\nby {column}", style="bold")
        for value, share in shares.items():
            console.print(f"{share:8.2%}  {_plain(value) or 'not known'}")


def show_document(found: dict[str, Any], console: Console) -> None:
    for each in found["documents"]:
        facts = ", ".join(f"{name} {each[name]}" for name in ("source", "license", "lang", "kind", "url") if each[name])
        console.print(f"{each['name']} (id {each['id']}, {each['split']}; {facts})")
        console.print(f"  {_facts(each['signals'])}")
        for read in each["reads"]:
            start, end = read["doc_tokens"]
            console.print(
                f"  step {read['step']:,}  epoch {read['epoch']}  row {read['row']}  tokens {start:,}-{end:,}"
            )
        if not each["reads"]:
            held_out = each["split"] == "heldout"
            why = "it is held out" if held_out else f"none of the {found['logged_steps']:,} steps so far has read it"
            console.print(f"  {why}")


def inspect_corpus(folder: Path, rule: str, count: int) -> list[dict[str, Any]]:
    """Documents of a corpus with what was measured, or with `rule` such as its build removed; each with its `text`."""
    corpus = Corpus.open(folder, verify=False)
    if rule:
        return [_seen(row) for row in ledger.removed(folder, rule, count)]
    tokenizer = open_tokenizer(folder / "tokenizer")
    return [_seen(row | {"text": tokenizer.decode(ids[1:-1].tolist())}) for row, ids in ledger.kept(corpus, count)]


def _seen(row: dict[str, Any]) -> dict[str, Any]:
    """A row with the beginning of its text and, where it was removed, the reason, apart from what was measured."""
    apart = {"text": row["text"][:EXCERPT_CHARS]} | ({"reason": row["reason"]} if "reason" in row else {})
    return ledger.of_document({name: value for name, value in row.items() if name not in apart}) | apart


def inspect_paths(paths: Sequence[str], recipe: Recipe, rule: str, count: int) -> list[dict[str, Any]]:
    """What a recipe would do with the first TRIED_DOCS documents at `paths`, one by one: duplicates, which take a whole
    build, evaluation items and models' judgments are left out. Documents that stay, or that `rule` would remove.

    Raises ValueError that names the nearest rule if `rule` removes nothing.
    """
    from llamita.data.curate import Block, Curator, blocks
    from llamita.data.read import documents

    decide = Curator(dataclasses.replace(recipe, contamination=Contamination()), Path())
    stay: list[dict[str, Any]] = []
    gone: dict[str, list[dict[str, Any]]] = {}

    def remove(block: Block, reasons: np.ndarray) -> None:
        for row, reason in zip(block.table().to_pylist(), reasons.tolist(), strict=True):
            gone.setdefault(reason, []).append(_seen(row | {"reason": reason}))

    for block in blocks(islice(documents(paths), TRIED_DOCS)):
        stay += map(_seen, decide(block, remove).table().to_pylist())
    log.say(f"of {len(stay) + sum(map(len, gone.values())):,} documents {len(stay):,} would stay")
    for reason, rows in sorted(gone.items(), key=lambda item: (-len(item[1]), item[0])):
        log.say(f"  {len(rows):>9,}  {reason}")
    chosen = [row for reason in sorted(gone) if reason == rule or reason.startswith(f"{rule}:") for row in gone[reason]]
    if rule and not chosen:
        raise ValueError(f"no document goes by {rule!r}{config.nearest(rule, sorted(gone))}")
    rows = chosen if rule else stay
    return [rows[place] for place in ledger.spread(len(rows), count).tolist()]


def show_documents(rows: Sequence[dict[str, Any]], console: Console) -> None:
    for row in rows:
        labels = ", ".join(row[name] for name in ("reason", "source", "lang", "kind", "url") if row.get(name))
        console.print(f"{_plain(row['name'])} ({labels})", style="bold")
        console.print(_facts(row["signals"]), style="dim")
        console.print(_plain(row["text"], keep="\n") + "\n")


def _plain(text: str, keep: str = "") -> str:
    """Without characters that would steer a terminal."""
    return "".join(char if char.isprintable() or char in keep else " " for char in text)


def _facts(signals: dict[str, Any]) -> str:
    return ", ".join(f"{name} {f'{n:.4g}' if isinstance(n, float) else n}" for name, n in signals.items())
