"""Meta's own format: params.json beside consolidated.NN.pth, one file or several model-parallel shards.

Names are ours; the rotary rows of wq and wk are interleaved (github.com/meta-llama/llama-models: models/llama3).
params.json knows neither the context nor the numbers of the rotary scaling, so `write` keeps our whole shape beside
it, in llamita.json.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamita.formats import pth
from llamita.formats.files import number, read_json, whole, write_json
from llamita.formats.names import EMBEDDINGS, HEAD, rotary_heads, to_half_split, to_interleaved
from llamita.formats.weights import DTYPES, KINDS, Weights, sizes
from llamita.model.shape import MAX_SIZE, PRESETS, RopeScaling, Shape
from llamita.tokenizer.llama3 import FILE_NAME

PARAMS, SIDECAR = "params.json", "llamita.json"
W1 = "layers.0.feed_forward.w1.weight"
# All that a plain Llama's params.json may hold: adapters, quantization, experts and vision come with other keys.
KEYS = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier", "norm_eps",
        "rope_theta", "use_scaled_rope")  # fmt: skip
# Along which axis model parallelism cuts a matrix; norms are not cut, and Llama 2 cut tok_embeddings along 1.
AXES = {"wq": 0, "wk": 0, "wv": 0, "wo": 1, "w1": 0, "w2": 1, "w3": 0, "output": 0, "tok_embeddings": 0}
FEW_ROWS = 8  # tell almost every head of its own from a tied one

Shard = tuple[Path, Mapping[str, pth.Stored]]


def read(folder: Path | str) -> Weights:
    """The weights of a folder, shards joined, a head equal to the embeddings tied to them.

    Raises ValueError with the reason for anything but a plain Llama: a shard, tensor or key that is missing, unknown
    or at odds with the rest. Nothing in the files is executed (`pth.layout`).
    """
    folder = Path(folder)
    paths = sorted(folder.glob("consolidated.*.pth"))
    wanted = {f"consolidated.{shard:02}.pth" for shard in range(max(1, len(paths)))}
    if missing := sorted(wanted - {path.name for path in paths}):
        raise ValueError(f"{folder} holds no {missing[0]} ({len(paths)} shards in all): get the whole folder")
    shards = [(path, pth.layout(path)) for path in paths]
    shape = _shape(folder / PARAMS, shards)
    stored = dataclasses.replace(shape, tied=HEAD not in shards[0][1])
    joined = {name: _Joined(name, size, stored, shards) for name, size in sizes(stored).items()}
    for path, shard in shards:
        if extra := sorted(shard.keys() - joined.keys() - {"rope.freqs"}):
            raise ValueError(f"{path}: a plain Llama has no tensor {extra[0]} ({len(extra)} such in all)")
    shape = _completed(shape, folder / SIDECAR, joined)

    def load(name: str) -> Tensor:
        weight, heads = joined[name].load(), rotary_heads(name, shape)
        return to_half_split(weight, heads) if heads else weight

    return Weights(shape, {name: joined[name].kind for name in sizes(shape)}, load)


class _Joined:
    """A tensor in shards: cut along `axis`, each piece in `copies` shards that follow one another."""

    def __init__(self, name: str, size: tuple[int, ...], shape: Shape, shards: Sequence[Shard]):
        for path, shard in shards:
            if name not in shard:
                raise ValueError(f"{path}: tensor {name} is missing")
        self.name, self.places = name, [(path, shard[name]) for path, shard in shards]
        path, first = self.places[0]
        which = name.split(".")[-2]
        self.axis = 1 if which == "tok_embeddings" and first.size[1:] != size[1:] else AXES.get(which, 0)
        self.copies = 1 if which in AXES else len(shards)
        if which in ("wk", "wv"):
            self.copies = max(1, len(shards) // shape.num_kv_heads)
        parts = len(shards) // self.copies
        piece = tuple(length // parts if axis == self.axis else length for axis, length in enumerate(size))
        for path, stored in self.places:
            if stored.size != piece or piece[self.axis] * parts != size[self.axis]:
                raise ValueError(
                    f"{path}: tensor {name} has shape {list(stored.size)}, but {parts} parts of {list(size)} have "
                    f"{list(piece)}"
                )
            if stored.dtype != first.dtype or stored.dtype not in KINDS:
                raise ValueError(f"{path}: tensor {name} is stored as {stored.dtype}, not all as one of {list(DTYPES)}")
        self.kind = KINDS[first.dtype]

    def load(self) -> Tensor:
        """The whole tensor with the file's order of rows. Raises ValueError where its copies differ."""
        pieces = [pth.tensor(*place) for place in self.places]
        for shard, piece in enumerate(pieces):
            if shard % self.copies and not torch.equal(piece, pieces[shard - 1]):
                raise ValueError(f"{self.places[shard][0]}: tensor {self.name} is not the copy that it should be")
        return torch.cat(pieces[:: self.copies], self.axis) if len(pieces) > self.copies else pieces[0]


def _shape(path: Path, shards: Sequence[Shard]) -> Shape:
    """What params.json and the sizes of the first shard's matrices say."""
    params = {key: value for key, value in read_json(path).items() if value is not None}
    if strange := sorted(params.keys() - set(KEYS)):
        raise ValueError(
            f"{path}: a plain Llama has no {strange[0]!r}; quantization, adapters, experts and vision are not read"
        )
    file, first = shards[0]
    if strange := [name for name in (EMBEDDINGS, W1) if name not in first or len(first[name].size) != 2]:
        raise ValueError(f"{file}: the matrix {strange[0]} is missing")
    dim, num_heads = whole(params, "dim", path), whole(params, "n_heads", path)
    rows, width = first[EMBEDDINGS].size
    scaled = params.get("use_scaled_rope", False)
    shape = Shape(
        dim=dim,
        num_layers=whole(params, "n_layers", path, limit=len(first)),  # before a model of that depth is imagined
        num_heads=num_heads,
        num_kv_heads=whole(params, "n_kv_heads", path, num_heads),
        ffn_dim=first[W1].size[0] * len(shards),
        vocab_size=rows * len(shards) if width == dim else rows,
        norm_eps=number(params, "norm_eps", path, 1e-5),
        rope_theta=number(params, "rope_theta", path, 10_000.0),
        rope_scaling=RopeScaling() if scaled else None,
    )
    multiple_of = whole(params, "multiple_of", path, 256)
    ffn_dim = _ffn_dim(dim, multiple_of, number(params, "ffn_dim_multiplier", path, 1.0))
    if ffn_dim != shape.ffn_dim:
        raise ValueError(
            f"{path}: multiple_of and ffn_dim_multiplier make {ffn_dim} rows of w1, {len(shards)} shards hold "
            f"{shape.ffn_dim}: is one missing?"
        )
    if params.get("vocab_size", -1) not in (-1, shape.vocab_size):
        raise ValueError(f"{path}: vocab_size is {params['vocab_size']!r}, the embeddings have {shape.vocab_size} rows")
    if type(scaled) is not bool:
        raise ValueError(f"{path}: use_scaled_rope must be true or false, not {scaled!r}")
    return shape


def _ffn_dim(dim: int, multiple_of: int, multiplier: float) -> int:
    """Meta's rule (models/llama3/model.py, FeedForward)."""
    ffn_dim = int(min(multiplier * int(8 * dim / 3), MAX_SIZE))
    return -(-ffn_dim // multiple_of) * multiple_of


def _completed(shape: Shape, sidecar: Path, joined: Mapping[str, _Joined]) -> Shape:
    """`shape` with what params.json does not say: as in llamita.json, or else as usual."""
    if not sidecar.exists():
        return dataclasses.replace(_usual(shape), tied=_is_tied(joined))
    data = read_json(sidecar)
    scaling = data.get("rope_scaling")
    if scaling is not None:
        if not isinstance(scaling, dict):
            raise ValueError(f"{sidecar}: rope_scaling must be an object or null, not {scaling!r}")
        numbers = {key: number(scaling, key, sidecar) for key in ("factor", "low_freq_factor", "high_freq_factor")}
        scaling = RopeScaling(**numbers, original_max_seq_len=whole(scaling, "original_max_seq_len", sidecar))
    tied, max_seq_len = data.get("tied") is True, whole(data, "max_seq_len", sidecar)
    stated = dataclasses.replace(shape, tied=tied, max_seq_len=max_seq_len, rope_scaling=scaling)
    said = dataclasses.asdict(stated)
    wrong = sorted(key for key in said.keys() | data.keys() if said.get(key) != data.get(key))
    if (scaling is None) != (shape.rope_scaling is None):
        wrong.append("rope_scaling")
    if tied and not _is_tied(joined):
        wrong.append("tied")
    if wrong:
        raise ValueError(
            f"{sidecar}: {wrong[0]} is at odds with {PARAMS} or the weights: delete the file if they are right"
        )
    return stated


def _usual(shape: Shape) -> Shape:
    """`shape` with rotary scaling and context of the preset of its sizes, or else as Meta's models have them.

    So Llama 3.2's factor of 32 is found, which Meta's own code does not know.
    """
    for preset in PRESETS.values():
        free: dict[str, Any] = dict(tied=preset.tied, max_seq_len=preset.max_seq_len, rope_scaling=preset.rope_scaling)
        if dataclasses.replace(shape, **free) == preset and bool(preset.rope_scaling) == bool(shape.rope_scaling):
            return dataclasses.replace(preset, tied=shape.tied)
    if shape.rope_scaling:
        return dataclasses.replace(shape, rope_scaling=RopeScaling(), max_seq_len=131_072)
    llama2 = 4096 if shape.norm_eps == 1e-5 else 2048  # Llama 1 had 1e-6
    return dataclasses.replace(shape, max_seq_len=8192 if shape.rope_theta > 10_000 else llama2)


def _is_tied(joined: Mapping[str, _Joined]) -> bool:
    if HEAD not in joined:
        return True
    head, embeddings = joined[HEAD], joined[EMBEDDINGS]
    if head.kind != embeddings.kind:
        return False
    corners = [pth.tensor(*weight.places[0])[:FEW_ROWS] for weight in (head, embeddings)]
    rows, columns = (min(lengths) for lengths in zip(*(corner.shape for corner in corners), strict=True))
    corners = [corner[:rows, :columns] for corner in corners]
    return torch.equal(*corners) and torch.equal(head.load(), embeddings.load())


def write(weights: Weights, tokenizer: Any, folder: Path, kind: str) -> list[str]:
    """Fill an empty folder: params.json, llamita.json, one shard stored as `kind` (F32, BF16, F16), the tokenizer.

    A tied head is written too, which Meta's loader wants. Returns what Meta's code cannot know or read, a line each.
    """
    shape = weights.shape

    def load(name: str) -> Tensor:
        weight = weights.load(EMBEDDINGS if name == HEAD and shape.tied else name)
        heads = rotary_heads(name, shape)
        return to_interleaved(weight, heads) if heads else weight

    write_json(folder / PARAMS, _params(shape))
    write_json(folder / SIDECAR, dataclasses.asdict(shape))
    names = sizes(dataclasses.replace(shape, tied=False))
    pth.write(folder / "consolidated.00.pth", names, DTYPES[kind], load)
    tokenizer.save(folder)
    return _warnings(shape, tokenizer, folder)


def _params(shape: Shape) -> dict[str, Any]:
    usual = [(multiple, multiplier) for multiple in (256, 1024, 4096) for multiplier in (1.0, 1.2, 1.3, 1.5)]
    # The last always does: what is above 0 and not above ffn_dim is rounded up to it.
    usual.append((shape.ffn_dim, min(1.0, (shape.ffn_dim + 0.5) / int(8 * shape.dim / 3))))
    multiple_of, multiplier = next(pair for pair in usual if _ffn_dim(shape.dim, *pair) == shape.ffn_dim)
    return {
        "dim": shape.dim,
        "n_layers": shape.num_layers,
        "n_heads": shape.num_heads,
        "n_kv_heads": shape.num_kv_heads,
        "vocab_size": shape.vocab_size,
        "multiple_of": multiple_of,
        "ffn_dim_multiplier": multiplier,
        "norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta,
        "use_scaled_rope": shape.rope_scaling is not None,
    }


def _warnings(shape: Shape, tokenizer: Any, folder: Path) -> list[str]:
    warnings = []
    if not (folder / FILE_NAME).is_file():
        warnings.append("Meta's code cannot read this tokenizer: it reads Llama 3's tokenizer.model alone")
    if tokenizer.vocab_size != shape.vocab_size:
        warnings.append(
            f"Meta's code stops where tokenizer and model differ in size, here {tokenizer.vocab_size} tokens and "
            f"{shape.vocab_size} rows of embeddings"
        )
    if shape.rope_scaling not in (None, RopeScaling()):
        warnings.append(
            f"Meta's code scales rotary frequencies in one way alone, {RopeScaling()}; it will compute other logits "
            f"than the model's {shape.rope_scaling}, which {SIDECAR} keeps"
        )
    if shape.max_seq_len != _usual(shape).max_seq_len:
        warnings.append(f"{PARAMS} cannot say that the context is {shape.max_seq_len} tokens; {SIDECAR} keeps it")
    return warnings
