"""What a run is watched by: evaluations and samples arrive as callables, so that the loop knows nothing of them."""

from collections.abc import Callable
from dataclasses import dataclass

from llamita.data.pack import Batch
from llamita.model.llama import Llama


def no_evaluation(model: Llama) -> dict[str, float]:
    return {}


def no_samples(model: Llama) -> list[tuple[str, str]]:
    return []


def no_documents(first: int, count: int) -> tuple[str, ...]:
    return ()


@dataclass(frozen=True)
class Watch:
    """What a run is watched by; called between steps, never changes the model.

    `evaluate` returns metrics ("loss" in nats a token, "bits_per_byte"), `sample` pairs of prompt and text, `documents`
    the names of the documents in some samples (the first one's number, and how many), for the incident log. `heldout`
    are `batch_size` rows that are scored instead where tp, cp or pp leave no rank a whole forward pass.
    """

    evaluate: Callable[[Llama], dict[str, float]] = no_evaluation
    sample: Callable[[Llama], list[tuple[str, str]]] = no_samples
    documents: Callable[[int, int], tuple[str, ...]] = no_documents
    heldout: Batch | None = None
