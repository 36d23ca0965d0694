"""The verbs of surgery. Each is a thin call of a public function; heavy imports wait until it is called."""

from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional

from llamita.cli.models import Folder, told


def vocab(model: Positional[Path], size: int, out: Folder) -> None:
    """Extend or trim the vocabulary: new rows are the mean of the old, trimmed ones the last ranks and padding.

    Args:
        model: Run folder, or a model in any format.
        size: Rows of the embeddings; a Llama 3 tokenizer keeps its 256 specials.
        out: Model folder to write.
    """
    from llamita.formats import surgery
    from llamita.recipes.operate import operate

    told(operate(
        model, out, lambda weights, tokenizer: surgery.resize_vocab(weights, tokenizer, size),
        f"vocabulary of {size} rows",
        kept=lambda weights, tokenizer, _: {"ids": surgery.kept_ids(weights.shape, tokenizer, size)},
    ))  # fmt: skip


def tie(model: Positional[Path], out: Folder, keep: Literal["embeddings", "head", "mean"] | None = None) -> None:
    """Make embeddings and head one tensor.

    Args:
        model: Run folder, or a model in any format.
        out: Model folder to write.
        keep: Which of two that differ; logits move then.
    """
    from llamita.formats import surgery
    from llamita.recipes.operate import operate

    told(operate(
        model, out, lambda weights, tokenizer: (surgery.tie(weights, keep), tokenizer), "head tied",
        kept=None if keep else lambda *_: {},
    ))  # fmt: skip


def untie(model: Positional[Path], out: Folder) -> None:
    """Give the head a tensor of its own, a copy of the embeddings.

    Args:
        model: Run folder, or a model in any format.
        out: Model folder to write.
    """
    from llamita.formats import surgery
    from llamita.recipes.operate import operate

    told(operate(
        model, out, lambda weights, tokenizer: (surgery.untie(weights), tokenizer), "head untied", kept=lambda *_: {}
    ))  # fmt: skip


def average(models: Positional[tuple[Path, ...]], out: Folder, shares: tuple[float, ...] = ()) -> None:
    """Average models of one shape, as Llama 3's checkpoints and fine-tuned models are.

    Args:
        models: Run folders or models in any format; the first gives the tokenizer.
        out: Model folder to write.
        shares: The weight of each model; equal unless given.
    """
    from llamita.recipes import operate

    if len(models) < 2:
        raise ValueError(f"an average is of two models or more, not of {len(models)}")
    told(operate.average(models, out, shares))


def lora(model: Positional[Path], adapter: Positional[Path], out: Folder) -> None:
    """Merge a LoRA adapter, as peft saves it, into the weights.

    Args:
        model: Run folder, or a model in any format.
        adapter: Folder with adapter_config.json and adapter_model.safetensors.
        out: Model folder to write.
    """
    from llamita.formats import surgery
    from llamita.recipes.operate import operate

    told(operate(
        model, out, lambda weights, tokenizer: (surgery.merge_lora(weights, adapter), tokenizer),
        f"adapter {adapter.name} merged", kept=None,
    ))  # fmt: skip


def layers(model: Positional[Path], keep: tuple[str, ...], out: Folder) -> None:
    """Keep some layers and drop the others.

    Args:
        model: Run folder, or a model in any format.
        keep: Layers to keep, counted from 0, single or as spans: 0-7 10 11.
        out: Model folder to write.
    """
    from llamita.formats import surgery
    from llamita.recipes import operate

    told(operate.operate(
        model, out,
        lambda weights, tokenizer: (surgery.slice_layers(weights, operate.layers(keep)), tokenizer),
        f"layers {' '.join(keep)}", kept=None,
    ))  # fmt: skip


def rope(
    model: Positional[Path], out: Folder, theta: float | None = None, factor: float | None = None,
    low_freq_factor: float | None = None, high_freq_factor: float | None = None,
    original_max_seq_len: int | None = None, max_seq_len: int | None = None,
    plain: Annotated[bool, tyro.conf.arg(help="Take the scaling away.")] = False,
) -> None:  # fmt: skip
    """Change rotary base, Llama 3.1's scaling, or the context length. Weights stay.

    Args:
        model: Run folder, or a model in any format.
        out: Model folder to write.
        theta: Rotary base.
        factor: By how much long wavelengths are slowed (Llama 3.1: 8, Llama 3.2: 32); the next three go with it.
        low_freq_factor: Below so many turns within the original context a wavelength is long; 1 unless given.
        high_freq_factor: Above so many it stays; 4 unless given.
        original_max_seq_len: The context that the model was trained with; 8192 unless given.
        max_seq_len: The context that it may be used with.
        plain: Take the scaling away.
    """
    from llamita.formats import surgery
    from llamita.model.shape import RopeScaling
    from llamita.recipes.operate import operate

    numbers = dict(factor=factor, low_freq_factor=low_freq_factor, high_freq_factor=high_freq_factor,
                   original_max_seq_len=original_max_seq_len)  # fmt: skip
    given: dict[str, Any] = {name: value for name, value in numbers.items() if value is not None}
    if plain and given:
        raise ValueError("--plain takes the scaling away and --factor sets one: give one of them")
    if given and factor is None:
        raise ValueError("a scaling wants its --factor: 8 as in Llama 3.1, 32 as in Llama 3.2")
    scaling = RopeScaling(**given) if given else ...
    told(operate(
        model, out,
        lambda weights, tokenizer: (surgery.change_rope(
            weights, theta=theta, scaling=None if plain else scaling, max_seq_len=max_seq_len), tokenizer),
        "rotary settings changed", kept=lambda *_: {"length": 1},
    ))  # fmt: skip
