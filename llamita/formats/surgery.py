"""Surgery: new weights from old ones, tensor by tensor as they are asked for, and a measure of what it moved.

No input changes. A tensor keeps its kind, but for computed ones of a block format, which become F32. Memory: the
tensor made and those it is made of. Only `tie` without `keep` reads weights at once, to compare them.

Shapes: V vocab_size, R rank of an adapter, O and I outputs and inputs of a matrix, B rows, T tokens.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor, nn

from llamita.formats.files import number, read_json, whole
from llamita.formats.hf import opened
from llamita.formats.names import EMBEDDINGS, HEAD, hf_names
from llamita.formats.weights import DTYPES, Weights, check_rows, sizes
from llamita.model.shape import RopeScaling, Shape
from llamita.tokenizer.llama3 import NUM_SPECIALS, Tokenizer

KEEP = ("embeddings", "head", "mean")
ROWS = 1024  # made wider at a time
SEED, NUM_ROWS = 0, 2
# What peft's LoraConfig (tuners/lora/config.py) says of an adapter that is W + scale * B A and no more. The other
# initializations (PiSSA, OLoRA, CorDA, LoftQ) change W as well, before training.
NOTHING: tuple[Any, ...] = (None, False, [], {})
PLAIN_LORA: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": (None, "none"),
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal"),
    **dict.fromkeys(("use_dora", "lora_bias", "modules_to_save", "fan_in_fan_out", "layer_replication", "use_qalora",
                     "trainable_token_indices", "target_parameters", "alora_invocation_tokens", "use_bdlora"), NOTHING),
}  # fmt: skip
PREFIX = "base_model.model."

New = Mapping[str, tuple[str, Callable[[], Tensor]]]  # our name -> kind and maker


def _with(weights: Weights, new: New, **changes: Any) -> Weights:
    shape = dataclasses.replace(weights.shape, **changes)
    kinds = {name: new[name][0] if name in new else weights.kinds[name] for name in sizes(shape)}
    return Weights(shape, kinds, lambda name: new[name][1]() if name in new else weights.load(name))


def _of(weights: Weights, name: str) -> tuple[str, Callable[[], Tensor]]:
    return weights.kinds[name], partial(weights.load, name)


def _computed(kind: str) -> str:
    return kind if kind in DTYPES else "F32"


def _by_rows(kind: str, make: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    made = torch.empty(tensors[0].shape, dtype=DTYPES[kind])
    for start in range(0, len(made), ROWS):
        part = slice(start, start + ROWS)
        made[part] = make(*(tensor[part] for tensor in tensors))
    return made


def _with_rows(weights: Weights, size: int, kind: Callable[[str], str], make: Callable[[Tensor], Tensor]) -> Weights:
    names = [EMBEDDINGS] if weights.shape.tied else [EMBEDDINGS, HEAD]
    new = {name: (kind(weights.kinds[name]), lambda name=name: make(weights.load(name))) for name in names}
    return _with(weights, new, vocab_size=size)


def resize_vocab(weights: Weights, tokenizer: Any, size: int) -> tuple[Weights, Any]:
    """The model with `size` rows and its tokenizer: padded, or trimmed. Raises ValueError as these do."""
    if size <= weights.shape.vocab_size:
        return trim_vocab(weights, tokenizer, size)
    padded = pad_vocab(weights, size)
    check_rows(padded, tokenizer.vocab_size)
    return padded, tokenizer


def pad_vocab(weights: Weights, size: int) -> Weights:
    """`size` rows in embeddings and head, each new one the mean of the old ones. Logits of old ids stay.

    So a new token starts as an average one: n of them together get at most n / (V + n) of the probability, as the
    mean of exponentials is no less than the exponential of the mean (J. Hewitt 2021, "Initializing new word
    embeddings"). Raises ValueError unless `size` is larger than what there is.
    """
    num_new = size - weights.shape.vocab_size
    if num_new < 1:
        raise ValueError(f"the model has {weights.shape.vocab_size} rows already: give a larger size than {size}")

    def padded(rows: Tensor) -> Tensor:
        mean = torch.stack([part.double().sum(0) for part in rows.split(ROWS)]).sum(0) / len(rows)
        return torch.cat((rows, mean.to(rows.dtype).expand(num_new, -1)))

    return _with_rows(weights, size, _computed, padded)


def trim_vocab(weights: Weights, tokenizer: Any, size: int) -> tuple[Weights, Any]:
    """The model with `size` rows and its tokenizer: rows beyond the tokenizer go first, then the last ranks.

    A Llama 3 tokenizer keeps its 256 specials behind the ranks that stay; logits of ids that stay are the same on
    texts of such ids. Raises ValueError as `kept_ids`.
    """
    check_rows(weights, tokenizer.vocab_size)
    if size >= weights.shape.vocab_size:
        raise ValueError(f"the model has {weights.shape.vocab_size} rows: give another size than {size}")
    ids = torch.tensor(kept_ids(weights.shape, tokenizer, size))
    if size < tokenizer.vocab_size:
        tokenizer = Tokenizer(tokenizer.tokens[: size - NUM_SPECIALS], tokenizer.chat_format)
    return _with_rows(weights, size, str, lambda rows: rows[ids]), tokenizer


def kept_ids(shape: Shape, tokenizer: Any, size: int) -> list[int]:
    """The old id of every new one that stays when a model of `shape` is resized to `size` rows.

    Raises ValueError for sizes that would cut tokens off a tokenizer other than Llama 3's, or bytes off that.
    """
    if size >= tokenizer.vocab_size:
        return list(range(min(size, shape.vocab_size)))
    if not isinstance(tokenizer, Tokenizer):
        raise ValueError(f"only a Llama 3 tokenizer can lose tokens: give at least {tokenizer.vocab_size}, not {size}")
    if size < 256 + NUM_SPECIALS:
        raise ValueError(
            f"a Llama 3 tokenizer has at least {256 + NUM_SPECIALS} tokens, bytes and specials: not {size}"
        )
    return [*range(size - NUM_SPECIALS), *range(len(tokenizer.tokens), tokenizer.vocab_size)]


def tie(weights: Weights, keep: str | None = None) -> Weights:
    """One tensor for embeddings and head. Raises ValueError where the two differ and `keep` does not say which.

    `keep`, "embeddings", "head" or their "mean", ties unequal ones; then logits move.
    """
    if weights.shape.tied:
        raise ValueError("the head is tied already")
    if keep not in (None, *KEEP):
        raise ValueError(f"nothing is called {keep!r} to keep; there are: {', '.join(KEEP)}")
    if keep is None:
        pairs = zip(weights.load(EMBEDDINGS).split(ROWS), weights.load(HEAD).split(ROWS), strict=True)
        apart = torch.stack([(one.double() - other.double()).abs().max() for one, other in pairs]).max()
        if apart != 0:
            raise ValueError(f"head and embeddings differ by up to {apart:.3g}, and logits would move: "
                             f"say what to keep, {', '.join(KEEP)}")  # fmt: skip

    if keep == "mean":
        both = average([tie(weights, "embeddings"), tie(weights, "head")])
        return _with(weights, {EMBEDDINGS: _of(both, EMBEDDINGS)}, tied=True)
    return _with(weights, {EMBEDDINGS: _of(weights, HEAD if keep == "head" else EMBEDDINGS)}, tied=True)


def untie(weights: Weights) -> Weights:
    """A head of its own, which is a copy of the embeddings. Logits stay. Raises ValueError where it has one."""
    if not weights.shape.tied:
        raise ValueError("the head is not tied: it is a tensor of its own already")
    return _with(weights, {HEAD: _of(weights, EMBEDDINGS)}, tied=False)


def average(models: Sequence[Weights], shares: Sequence[float] | None = None) -> Weights:
    """The mean of models of one shape, in float64, stored in the first one's kinds; `shares` weighs them.

    Llama 3 paper (arXiv 2407.21783), section 4.1.5, and "model soups" (arXiv 2203.05482). It is a model where they
    descend from one. Copies give the same bits, up to float32. Raises ValueError for fewer than two models, other
    numbers of shares, or shapes that differ.
    """
    if len(models) < 2:
        raise ValueError(f"an average is of two models or more, not of {len(models)}")
    shares = [1.0] * len(models) if shares is None else shares
    if len(shares) != len(models) or not all(0 < share < math.inf for share in shares):
        raise ValueError(f"give each of the {len(models)} models a share above 0, not {', '.join(map(str, shares))}")
    first = models[0]
    for place, other in enumerate(models[1:], start=2):
        for field in dataclasses.fields(Shape):
            one, two = getattr(first.shape, field.name), getattr(other.shape, field.name)
            if one != two:
                raise ValueError(f"models of unequal shape: {field.name} is {one} in the first, {two} in model {place}")

    def weighed(*rows: Tensor) -> Tensor:
        parts = [share * row.double() for share, row in zip(shares, rows, strict=True)]
        return sum(parts[1:], parts[0]) / sum(shares)

    def mean(name: str) -> Tensor:
        return _by_rows(_computed(first.kinds[name]), weighed, *(model.load(name) for model in models))

    return _with(first, {name: (_computed(kind), partial(mean, name)) for name, kind in first.kinds.items()})


def slice_layers(weights: Weights, keep: Sequence[int]) -> Weights:
    """Only the layers `keep`, numbered from 0, in rising order. Logits move unless the others added nothing.

    Raises ValueError for none, or numbers out of range or order.
    """
    last = weights.shape.num_layers - 1
    if not keep or list(keep) != sorted(set(keep)) or not 0 <= keep[0] <= keep[-1] <= last:
        raise ValueError(f"give numbers of layers to keep in rising order, from 0 to {last}, not {list(keep)}")
    new = {}
    for layer, old_layer in enumerate(keep):
        for old in weights.kinds:
            if old.startswith(f"layers.{old_layer}."):
                new[old.replace(str(old_layer), str(layer), 1)] = _of(weights, old)
    return _with(weights, new, num_layers=len(keep))


def change_rope(
    weights: Weights, *, theta: float | None = None, scaling: RopeScaling | EllipsisType | None = ...,
    max_seq_len: int | None = None,
) -> Weights:  # fmt: skip
    """Other rotary settings or another context; what is left out stays, and `scaling=None` takes it away.

    No tensor changes: logits stay at position 0 and move after it. Raises ValueError as Shape, or without a change.
    """
    asked = {"rope_theta": theta, "max_seq_len": max_seq_len}
    changes: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    if scaling is not ...:
        changes["rope_scaling"] = scaling
    if all(getattr(weights.shape, name) == value for name, value in changes.items()):
        raise ValueError("the rotary settings are these already: give another theta, scaling or max_seq_len")
    return _with(weights, {}, **changes)


def merge_lora(weights: Weights, folder: Path | str) -> Weights:
    """W + scale * B A for every matrix with an adapter in peft's folder (arXiv 2106.09685), in float32 at least.

    scale is lora_alpha / R, or lora_alpha / sqrt(R) with use_rslora (arXiv 2312.03732). Raises ValueError with the
    reason for an adapter that is not plain LoRA for a model of this very shape.
    """
    file = Path(folder) / "adapter_model.safetensors"
    if not file.is_file():
        pickled = file.with_suffix(".bin").exists()
        reason = "adapter_model.bin is a pickle, which can run code when read: save it as safetensors"
        raise ValueError(f"{folder} holds no {file.name}: {reason if pickled else 'give the folder of a peft adapter'}")
    adapted = _adapted(weights.shape, file)

    def merged(ours: str) -> Tensor:
        scale, *halves = adapted[ours]
        matrix_OI = weights.load(ours)
        wide = torch.promote_types(matrix_OI.dtype, torch.float32)
        with opened(file) as adapter:
            a_RI, b_OR = (adapter.get_tensor(half).to(wide) for half in halves)
        kind = _computed(weights.kinds[ours])
        return _by_rows(kind, lambda rows, b: rows + scale * (b @ a_RI), matrix_OI, b_OR)

    return _with(weights, {ours: (_computed(weights.kinds[ours]), partial(merged, ours)) for ours in adapted})


def _adapted(shape: Shape, file: Path) -> dict[str, tuple[float, str, str]]:
    """Our name of each adapted matrix -> scale, names of its A [R, I] and B [O, R]; reads no weight."""
    path = file.with_name("adapter_config.json")
    config = read_json(path)
    for key, plain in PLAIN_LORA.items():
        if config.get(key) not in plain:
            raise ValueError(f"{path}: {key} is {config.get(key)!r:.80}, so it is no plain LoRA: merge it with peft")
    for key in ("rank_pattern", "alpha_pattern"):
        config[key] = config.get(key) or {}
        if not isinstance(config[key], dict):
            raise ValueError(f"{path}: {key} must be an object")
    ranks = {whole(config, "r", path), *(whole(config["rank_pattern"], key, path) for key in config["rank_pattern"])}
    with opened(file) as adapter:
        parts = {name: adapter.get_slice(name) for name in set(adapter.keys())}
        stored = {name: (part.get_dtype() in DTYPES, part.get_shape()) for name, part in parts.items()}
    names = hf_names(shape.num_layers, tied=shape.tied)
    matrices = {ours: size for ours, size in sizes(shape).items() if len(size) == 2 and ours != EMBEDDINGS}
    modules = {ours: names[ours].removesuffix(".weight") for ours in matrices}
    halves = {ours: [f"{PREFIX}{module}.lora_{half}.weight" for half in "AB"] for ours, module in modules.items()}
    if strange := sorted(stored.keys() - {name for pair in halves.values() for name in pair}):
        tied = ", whose head is tied: untie it first" if shape.tied and "lm_head" in strange[0] else ""
        raise ValueError(f"{file}: {strange[0]} is no lora_A or lora_B for a matrix of this model{tied}")
    targets = _targets(config, list(modules.values()), path)
    adapted = {}
    for ours, (a, b) in halves.items():
        if modules[ours] in targets or {a, b} & stored.keys():
            if lost := sorted({a, b} - stored.keys()):
                raise ValueError(f"{file}: {lost[0]} is missing")
            rank = stored[a][1][:1]
            for name, wanted in ((a, [*rank, matrices[ours][1]]), (b, [matrices[ours][0], *rank])):
                if stored[name] != (True, wanted) or not ranks.issuperset(rank):
                    said = f"must be floats of {wanted} and of a rank in {path.name}"
                    raise ValueError(f"{file}: {name} is of {stored[name][1]}, but {said}")
            divisor = math.sqrt(rank[0]) if config.get("use_rslora") else rank[0]
            adapted[ours] = (_alpha(config, modules[ours], path) / divisor, a, b)
    if not adapted:
        raise ValueError(f"{file} holds no adapter")
    return adapted


def _targets(config: dict[str, Any], modules: list[str], path: Path) -> set[str]:
    """The modules that must have an adapter, as far as lists say so (a target may also be a pattern)."""
    listed = config.get("target_modules")
    found = {}
    for target in set(map(str, listed if isinstance(listed, list) else ())):
        found[target] = {module for module in modules if f".{module}".endswith(f".{target}")}
        if not found[target]:
            raise ValueError(f"{path}: target_modules names {target!r:.80}, which is no matrix of this model to adapt")
    if config.get("layers_to_transform") is not None or config.get("exclude_modules"):
        return set()
    return set().union(*found.values())


def _alpha(config: dict[str, Any], module: str, path: Path) -> float:
    for pattern in config["alpha_pattern"]:
        # peft takes any regular expression; a stranger's may run for ever
        if not re.fullmatch(r"\^?(\\?\.|\w)+", pattern):
            raise ValueError(f"{path}: alpha_pattern {pattern!r:.80} is no plain name of a module: merge it with peft")
        if re.match(rf"(.*\.)?({pattern})$", module):
            return number(config["alpha_pattern"], pattern, path)
    return number(config, "lora_alpha", path)


@torch.no_grad()
def logits_kept(before: Weights, after: Weights, ids: Sequence[int] | None = None, length: int = 64) -> float:
    """By how much the logits of tokens that both models have differ at most, on fixed random rows [B, T] of them.

    `ids[i]` is what token i of `after` was in `before` (`kept_ids`; None: the same); `length` is T, which ends with
    the shorter context. 0.0 means equal bit by bit. Memory: one model in float32 at a time.
    """
    rows = torch.arange(min(before.shape.vocab_size, after.shape.vocab_size)) if ids is None else torch.tensor(ids)
    size = (NUM_ROWS, min(length, before.shape.max_seq_len, after.shape.max_seq_len))
    tokens_BT = torch.randint(len(rows), size, generator=torch.Generator().manual_seed(SEED))
    old_BTV = _logits(before, rows[tokens_BT], rows)
    return float((_logits(after, tokens_BT, torch.arange(len(rows))).double() - old_BTV.double()).abs().max())


def _logits(weights: Weights, tokens_BT: Tensor, rows: Tensor) -> Tensor:
    model = weights.model()
    # Cut before it is used: a head of another height may be multiplied in another order, and round otherwise.
    model.output.weight = nn.Parameter(model.output.weight[rows])
    logits_BTV: Tensor = model(tokens_BT)
    return logits_BTV
