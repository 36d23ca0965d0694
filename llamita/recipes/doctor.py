"""The examination of a pretraining run on its own corpus, tokenizer and first weights, and how it is shown."""

from collections.abc import Iterable, Iterator

from rich.console import Console
from rich.text import Text

from llamita import runtime
from llamita.recipes import stages
from llamita.train.doctor import examine
from llamita.train.doctor_checks import Case, Finding
from llamita.train.run import Run

STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red", "loss": "green", "no loss": "dim", "border": "bold cyan"}


def doctor(run: Run) -> Iterator[Finding]:
    """Findings as they come; nothing is written. Raises ValueError as `stages.open_corpus`."""
    corpus, tokenizer = stages.open_corpus(run)
    rows, sampler = stages.rows_and_sampler(run, corpus)
    device = runtime.pick_device(run.device)
    case = Case(run, rows, sampler, corpus.split("train"), tokenizer, device)
    return examine(case, lambda: stages.fresh_model(run).to(device))


def show(findings: Iterable[Finding], console: Console) -> list[Finding]:
    """Print each finding when it comes, the label view in colour; where there is none, brackets hold what bears no
    loss. Returns the findings."""
    found = []
    for finding in findings:
        found.append(finding)
        line = Text.assemble((f"{finding.status:5}", STYLES[finding.status]), f"{finding.name:14}{finding.measured}")
        console.print(line, soft_wrap=True)
        if finding.advice:
            console.print(f"     -> {finding.advice}", soft_wrap=True)
        if finding.view:
            plain = console.color_system is None
            pieces = [
                (f"[{text}]" if plain and style == "no loss" else text, STYLES[style])
                for text, style in ((piece.text.replace("\n", "\\n"), piece.style) for piece in finding.view)
            ]
            console.print(Text.assemble("     ", *pieces), soft_wrap=True)
    return found
