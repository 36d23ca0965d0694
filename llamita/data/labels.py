"""Labels for a quality classifier, one document at a time: shown, judged, written down at once."""

import json
import os
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from llamita.data.classifier import Classifier
from llamita.data.document import Document
from llamita.data.files import printable
from llamita.data.strings import Strings

POOL = 2000  # documents among which the most uncertain are looked for
SHOWN_CHARS = 1200
MAX_CHARS = 2**18  # of a text that a label keeps: more than a classifier looks at
MAX_LINE = 2**24
ANSWERS = {"g": 1, "b": 0}
HELP = "g good   b bad   s skip   u undo the last   q quit"


@dataclass(frozen=True)
class Label:
    text: str
    label: float | None
    """0 = bad, 1 = good; None takes back what was said before."""


def read(path: Path) -> list[Label]:
    """Rows `{"text": str, "label": 0..1}`; the last of a text counts, and one without a label takes it back.

    Raises ValueError naming the line that is no such row, unless it is the last and torn by a kill.
    """
    found: dict[str, Label] = {}
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE), b""), start=1):
            try:
                row = _parsed(line)
            except (ValueError, KeyError, TypeError) as error:
                if len(line) < MAX_LINE and not line.endswith(b"\n"):
                    break
                raise ValueError(f"{path}:{number}: {error!r}; a row is {{'text': ..., 'label': 0 to 1}}") from error
            found.pop(row.text, None)
            if row.label is not None:
                found[row.text] = row
    return list(found.values())


def _parsed(line: bytes) -> Label:
    if len(line) == MAX_LINE:
        raise ValueError(f"longer than {MAX_LINE:,} bytes")
    row = json.loads(line)
    text, label = row["text"], row["label"]
    if not isinstance(text, str) or not (label is None or 0 <= float(label) <= 1):
        raise ValueError("`text` must be a string and `label` a number from 0 to 1")
    return Label(text, None if label is None else float(label))


def reservoir(docs: Iterable[Document], size: int, seed: int) -> list[Document]:
    """A sample of `size` documents, each as likely as any other (Vitter 1985, algorithm R)."""
    chosen: list[Document] = []
    rng = random.Random(seed)
    for number, document in enumerate(docs):
        if number < size:
            chosen.append(document)
        elif (place := rng.randrange(number + 1)) < size:
            chosen[place] = document
    return chosen


def candidates(
    docs: Iterable[Document], labelled: Iterable[str], model: Classifier | None, seed: int
) -> list[Document]:
    """Documents to be asked about, none twice, cut to MAX_CHARS: in the order drawn, or what a model is least sure of
    first. `labelled` = texts that have been asked about."""
    seen, pool = {text[:MAX_CHARS] for text in labelled}, []
    for document in reservoir(docs, POOL, seed):
        text = document.text[:MAX_CHARS]
        if text not in seen:
            seen.add(text)
            pool.append(replace(document, text=text))
    random.Random(seed).shuffle(pool)
    if model is not None and pool:
        scores = model.score(Strings.of([document.text for document in pool]))
        pool = [pool[i] for i in np.argsort(np.abs(scores - 0.5), kind="stable").tolist()]
    return pool


def ask(
    docs: list[Document], out: Path, count: int, model: Classifier | None,
    answers: Iterator[str], show: Callable[[str], None],
) -> int:  # fmt: skip
    """Shows documents until `count` are labelled or `answers` end; appends each answer to `out`. Returns how many."""
    given: list[int] = []
    place = 0
    with out.open("a+b") as file:
        _mend(file)
        while place < len(docs) and len(given) < count:
            show(_page(docs[place], place, model))
            answer = next(answers, "q").strip().lower()[:1]
            if answer == "q":
                break
            if answer == "u" and given:
                place = given.pop()
                _write(file, Label(docs[place].text, None))
            elif answer in ANSWERS:
                _write(file, Label(docs[place].text, ANSWERS[answer]))
                given.append(place)
                place += 1
            elif answer == "s":
                place += 1
            else:
                show(HELP)
    return len(given)


def _page(document: Document, place: int, model: Classifier | None) -> str:
    score = f"  score {model.score(Strings.of([document.text]))[0]:.2f}" if model else ""
    shown = "\n".join(map(printable, document.text[:SHOWN_CHARS].split("\n")))
    more = f"\n... {len(document.text) - SHOWN_CHARS:,} characters more" * (len(document.text) > SHOWN_CHARS)
    head = f"{place + 1}: {printable(document.name)} ({printable(document.source)})"
    return f"\n=== {head}{score}\n{shown}{more}\n{HELP}"


def _mend(file: BinaryIO) -> None:
    """Ends the last row, or takes it away where a kill tore it, so that the next begins on a line of its own."""
    start = max(0, file.seek(0, os.SEEK_END) - MAX_LINE)
    file.seek(start)
    tail = file.read()
    last = tail.rfind(b"\n") + 1
    if last < len(tail):
        try:
            _parsed(tail[last:])
            file.write(b"\n")
        except (ValueError, KeyError, TypeError):
            file.truncate(start + last)


def _write(file: BinaryIO, row: Label) -> None:
    file.write(json.dumps(asdict(row)).encode() + b"\n")
    file.flush()
