"""The verbs by which a quality classifier is made: labels from a person, and training on them."""

from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional


def label(
    paths: Positional[tuple[str, ...]], out: Path = Path("labels.jsonl"), model: Path | None = None, count: int = 50,
    seed: int = 0,
) -> None:  # fmt: skip
    """Judge documents one by one, good or bad, for a quality classifier to learn from.

    Args:
        paths: Files and folders of text, as `data build` reads them.
        out: Where answers go, one row each; the same command goes on and asks nothing that it was answered.
        model: A classifier; what it is least sure of is asked first.
        count: Documents to label now.
        seed: Key of the sample.
    """
    import sys

    from llamita.data import labels
    from llamita.data.classifier import Classifier
    from llamita.data.read import documents

    known = [row.text for row in labels.read(out)] if out.exists() else []
    judge = Classifier.load(model) if model else None
    docs = labels.candidates(documents(paths), known, judge, seed)
    if not docs:
        raise ValueError(f"all of {', '.join(paths)} that is asked about is labelled in {out}: give more text")
    given = labels.ask(docs, out, count, judge, iter(sys.stdin.readline, ""), print)
    print(f"{given} labelled now, {len(known) + given} in {out}; llamita data judge --labels {out} trains on them")


def judge(
    labelled: Annotated[tuple[Path, ...], tyro.conf.arg(name="labels")] = (), out: Path = Path("quality.safetensors"),
    good: tuple[str, ...] = (), bad: tuple[str, ...] = (), epochs: int = 10, seed: int = 0,
) -> None:  # fmt: skip
    """Train a quality classifier from labels, or from text that is good and text that is not.

    Args:
        labelled: Files of labels, as `data label` writes them.
        out: Classifier to write; `--quality.classifier` of a data recipe takes it.
        good: Files and folders of text that is all good, such as articles that others cite.
        bad: Files and folders of text that is not, such as any web pages.
        epochs: Passes over the text.
        seed: Key of the order and of the share held out.
    """
    from llamita.recipes.quality import train

    for line in train(labelled, good, bad, out, epochs=epochs, seed=seed):
        print(line)
