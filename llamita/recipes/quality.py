"""A quality classifier from labels and folders of text, and how good it is on what it has not seen."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from llamita.data import labels
from llamita.data.classifier import Classifier, evaluate
from llamita.data.duplicates import exact_hashes
from llamita.data.read import documents
from llamita.data.strings import Strings

TESTED = 5  # one document in so many is not learnt from; which, its hash decides
KEPT = (0.9, 0.75, 0.5, 0.25, 0.1)
SHOWN = 80
Z = 1.96  # standard deviations on either side that hold 95% of a normal distribution
WIDE = 0.1  # an interval of accuracy by which no two classifiers can be told apart


def interval(right: int, total: int) -> tuple[float, float]:
    """Where a share lies, with 95% confidence, of which `right` of `total` were seen (Wilson 1927)."""
    share, spread = right / total, Z * Z / total
    middle = (share + spread / 2) / (1 + spread)
    half = Z * math.sqrt(share * (1 - share) / total + spread / total / 4) / (1 + spread)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def train(
    labelled: Sequence[Path], good: Sequence[str], bad: Sequence[str], out: Path, *, epochs: int, seed: int
) -> Iterator[str]:
    """Trains, writes `out`, and tells line by line how it does on held-out documents.

    Raises ValueError: nothing to learn from, or all of it on one side.
    """
    rows = [row for path in labelled for row in labels.read(path)]
    rows += [labels.Label(document.text, value) for paths, value in ((good, 1.0), (bad, 0.0)) if paths
             for document in documents(paths)]  # fmt: skip
    if not rows:
        raise ValueError("nothing to learn from: give --labels FILE, or --good and --bad with folders of text")
    strings, values = Strings.of([row.text for row in rows]), np.array([row.label for row in rows], np.float32)
    tested = exact_hashes(strings) % np.uint64(TESTED) == 0
    if not 0 < (values[tested] > 0.5).sum() < tested.sum():
        raise ValueError(f"{len(rows)} documents are too few to hold some of both sides out; label more")
    model = Classifier.train(strings.chosen(~tested), values[~tested], epochs=epochs, seed=seed)
    model.save(out)
    scores = model.score(strings.chosen(tested))
    found = evaluate(scores, values[tested])
    yield f"{out}: learnt from {int((~tested).sum()):,} documents; on {int(tested.sum()):,} others:"
    yield "  ".join(f"{name} {value:.3f}" for name, value in found.items())
    num_tested = int(tested.sum())
    low, high = interval(round(found["accuracy"] * num_tested), num_tested)
    weak = ": too few to tell, label more" if high - low > WIDE else ""
    yield f"the accuracy lies between {low:.3f} and {high:.3f} (95%){weak}"
    yield "of the documents   kept above   of them good"
    for share in KEPT:
        threshold = float(np.quantile(scores, 1 - share))
        kept = values[tested][scores >= threshold] > 0.5
        yield f"{share:16.0%}   {threshold:10.3f}   {kept.mean():12.1%}"
    order = np.argsort(scores, kind="stable")
    places = np.flatnonzero(tested)
    for name, chosen in (("best", order[::-1][:5]), ("worst", order[:5])):
        for i in chosen.tolist():
            text = " ".join(strings[int(places[i])].decode().split())[:SHOWN]
            yield f"{name:6} {scores[i]:.3f}  {text}"
