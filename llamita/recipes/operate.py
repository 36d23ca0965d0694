"""Surgery as a stage: open a model, change it, say by how much the logits moved that must not, write it with proof."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llamita import log
from llamita.formats import surgery
from llamita.formats.proof import memory_needed
from llamita.formats.weights import Weights
from llamita.recipes import card, convert
from llamita.runtime import free_memory

Operation = Callable[[Weights, Any], tuple[Weights, Any]]


def operate(
    path: Path, out: Path, operation: Operation, done: str, *, kept: Callable[[Weights, Any, Weights], dict] | None
) -> dict[str, Any]:
    """Write `operation` of the model at `path` as a model folder; `done` says in the card what it was.

    `kept(before, tokenizer, after)` gives the arguments of `logits_kept` under which no logit may move; None where
    all may. Returns the proof. Raises ValueError as the operation, or when a logit moved.
    """
    weights, tokenizer = convert.open_any(path)
    changed, new_tokenizer = operation(weights, tokenizer)
    facts = card.known(path)
    facts.training.append(done)
    if kept and max(memory_needed(weights.shape), memory_needed(changed.shape)) < free_memory():
        named = kept(weights, tokenizer, changed)
        moved = surgery.logits_kept(weights, changed, **named)
        where = "at position 0" if named.get("length") == 1 else "of the tokens that stay"
        if moved != 0:
            raise ValueError(f"{done}: the logits {where} moved by up to {moved:.3g}, which must not be")
        log.say(f"{done}: the logits {where} are equal bit by bit")
    elif kept:
        log.say(f"{done}: logits not compared, the model does not fit into memory")
    else:
        log.say(f"{done}: logits may move, so only the export is proved")
    return convert.write(changed, new_tokenizer, out, form="hf", kind=None, facts=facts)


def average(paths: Sequence[Path], out: Path, shares: Sequence[float]) -> dict[str, Any]:
    """The mean of models of one shape and one tokenizer, the first one's. Raises ValueError as `surgery.average`."""
    others = [convert.open_any(path) for path in paths[1:]]

    def mean(weights: Weights, tokenizer: Any) -> tuple[Weights, Any]:
        for path, (_, other) in zip(paths[1:], others, strict=True):
            if other.fingerprint != tokenizer.fingerprint:
                raise ValueError(f"{path} has another tokenizer than {paths[0]}: their mean would speak neither")
        return surgery.average([weights, *(model for model, _ in others)], shares or None), tokenizer

    return operate(paths[0], out, mean, f"average of {len(paths)} models", kept=None)


def layers(spans: Sequence[str]) -> list[int]:
    """["0-3", "6"] -> [0, 1, 2, 3, 6]. Raises ValueError for anything else."""
    found: list[int] = []
    for span in spans:
        first, _, last = span.partition("-")
        if not (first.isdecimal() and (last or first).isdecimal()) or int(last or first) > 10_000:
            raise ValueError(f"{span!r} is no layer and no span of layers: write 5, or 0-3")
        found += range(int(first), int(last or first) + 1)
    return found
