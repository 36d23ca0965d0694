"""What a run is watched by: evaluations and samples arrive as callables, so that the loop knows nothing of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llamita import config, runtime
from llamita.data.pack import Batch
from llamita.model.llama import Llama
from llamita.parallel.layout import Layout
from llamita.train.run import Run


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


def settings(run: Run, layout: Layout, sources: dict[str, str]) -> dict[str, Any]:
    """What `metrics.jsonl` says first: every setting and where it comes from, what follows from the shape, the machine,
    the ranks."""
    shape = {name: getattr(run.shape, name) for name in ("num_params", "num_matmul_params", "head_dim")}
    shape["train_flops_per_token"] = run.shape.train_flops_per_token(run.data.seq_len)
    shape["kv_bytes_per_token"] = run.shape.kv_bytes_per_token()
    flat = config.flatten(run).items()
    return {
        "values": {key: {"value": value, "source": sources.get(key, "default")} for key, value in flat},
        "shape": shape,
        "machine": runtime.machine(),
        "ranks": {"world": layout.world} | layout.sizes,
    }
