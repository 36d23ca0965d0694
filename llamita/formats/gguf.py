"""GGUF files: the plain Llamas among anyone's are read, ours are written, as llama.cpp has them (arch "llama").

A block kind (Q8_0, Q4_K, ...) packs some values of a row with a scale of their own; the gguf library knows the bits.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import product
from pathlib import Path
from typing import Any

import gguf as gguf_py
import numpy as np
import torch
from torch import Tensor

from llamita.formats.files import number, whole
from llamita.formats.gguf_header import TensorInfo, in_float32, read_header
from llamita.formats.names import hf_names, rotary_heads, to_half_split, to_interleaved
from llamita.formats.weights import DTYPES, Weights, sizes
from llamita.model import rope
from llamita.model.shape import MAX_SIZE, RopeScaling, Shape
from llamita.tokenizer import emit

TYPES = gguf_py.GGMLQuantizationType.__members__
WRITTEN = ("F32", "F16", "BF16", "Q8_0", "Q4_0")
READ = (*WRITTEN, "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
TOKEN_EMBD, DIVISORS = "token_embd.weight", "rope_freqs.weight"
ROWS = 1024  # converted at a time, so that no second copy of a tensor is needed
# GGUF has no fields for Llama 3.1's rotary scaling, and float32 for what may need more: we add our own, in float64,
# which llama.cpp passes over.
OURS, OUR_SCALING = "llamita.", "llamita.rope_scaling."
EPS, THETA = "llama.attention.layer_norm_rms_epsilon", "llama.rope.freq_base"
OUR_NUMBERS = {EPS: "llamita.norm_eps", THETA: "llamita.rope_theta"}
METADATA = Path("metadata")
UNUSED = 5  # llama.cpp's type of a token that stands for nothing
# What llama.cpp's "llama" may be beside a Llama 3, and the value at which it is not.
PLAIN = {"expert_count": 0, "attention.causal": True, "attention.sliding_window": 0, "attention.scale": 0,
         "rope.scaling.type": "none", "rope.scaling.factor": 1, "rope.scaling.attn_factor": 1,
         "rope.scale_linear": 1}  # fmt: skip


def read_fields(path: Path | str) -> dict[str, Any]:
    """All metadata of a file, the tokenizer's among them, as plain Python values. ValueError for a damaged file."""
    return read_header(path)[0]


def read(path: Path | str) -> Weights:
    """The weights of a file, dequantized one tensor at a time exactly as llama.cpp does.

    Raises ValueError naming the field or tensor for a damaged file and for all that is not a plain Llama.
    """
    path = Path(path)
    fields, tensors = read_header(path)
    try:
        shape = _shape(path, fields, tensors)
        names = _names(shape)
        _check(tensors, names, shape)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None

    def load(ours: str) -> Tensor:
        info = tensors[names[ours]]
        data = np.fromfile(path, np.uint8, info.num_bytes, offset=info.start)
        return _turned(to_half_split, shape, ours, _unpacked(data, info.kind, info.size))

    return Weights(shape, {ours: tensors[theirs].kind for ours, theirs in names.items()}, load)


def _shape(path: Path, fields: dict[str, Any], tensors: dict[str, TensorInfo]) -> Shape:
    if fields.get("general.architecture") != "llama":
        raise ValueError(f"the architecture is {fields.get('general.architecture')!r:.80}, not 'llama'")
    if fields.get("split.count", 1) not in (0, 1):
        raise ValueError("it is one part of several: join them first (llama-gguf-split --merge)")
    if TOKEN_EMBD not in tensors:
        raise ValueError(f"there is no {TOKEN_EMBD}: it is a vocabulary or an adapter, not a model")
    # Some converters repeat a value for each layer.
    fields = fields | {k: value[0] for k, value in fields.items() if isinstance(value, list) and len(set(value)) == 1}
    for key, plain in PLAIN.items():
        if (value := fields.get(f"llama.{key}", plain)) != plain:
            raise ValueError(f"llama.{key} is {value!r:.80}, but a Llama 3 has {plain!r}")

    def size(key: str, default: int | None = None, limit: int = MAX_SIZE) -> int:
        return whole(fields, f"llama.{key}", METADATA, default, limit)

    embeddings = tensors[TOKEN_EMBD].size
    num_heads = size("attention.head_count")
    shape = Shape(
        # A size that the file's tensors cannot bear out is refused before a model of that size is imagined.
        dim=size("embedding_length", limit=embeddings[-1]),
        num_layers=size("block_count", limit=len(tensors)),
        num_heads=num_heads,
        num_kv_heads=size("attention.head_count_kv", num_heads),
        ffn_dim=size("feed_forward_length"),
        vocab_size=size("vocab_size", embeddings[0]),
        tied="output.weight" not in tensors,
        max_seq_len=size("context_length"),
        rope_theta=_number(fields, THETA, 10_000.0),
        norm_eps=_number(fields, EPS),
    )
    for key in ("rope.dimension_count", "attention.key_length", "attention.value_length"):
        if size(key, shape.head_dim) != shape.head_dim:
            raise ValueError(f"llama.{key} is {size(key)}, but a Llama 3 has {shape.head_dim}, the size of a head")
    return dataclasses.replace(shape, rope_scaling=_scaling(path, fields, tensors.get(DIVISORS), shape))


def _number(fields: dict[str, Any], key: str, default: float | None = None) -> float:
    """What the file states in float32, or what we add to it, unless somebody has changed the first since."""
    stated = number(fields, key, METADATA, default)
    ours = number(fields, OUR_NUMBERS[key], METADATA, stated)
    return ours if math.isclose(ours, stated, rel_tol=2**-23) else stated


def _scaling(path: Path, fields: dict[str, Any], info: TensorInfo | None, shape: Shape) -> RopeScaling | None:
    """The setting that gives the file's divisors. Without our fields, those in use are tried."""
    found_P = torch.ones(shape.head_dim // 2)
    if info:
        if info.kind != "F32" or info.size != (len(found_P),):
            raise ValueError(f"tensor {DIVISORS} is {info.kind} {list(info.size)}, expected F32 [{len(found_P)}]")
        found_P = torch.from_numpy(np.fromfile(path, np.float32, len(found_P), offset=info.start))
    if not ((found_P > 0) & (found_P < math.inf)).all():
        raise ValueError(f"tensor {DIVISORS} holds values that are not above 0")
    if any(key.startswith(OUR_SCALING) for key in fields):
        names = (OUR_SCALING + field.name for field in dataclasses.fields(RopeScaling))
        factor, low, high, context = (number(fields, name, METADATA) for name in names)
        candidates = [RopeScaling(factor, low, high, int(context))]
    elif (found_P == 1).all():
        return None
    else:
        factors = (float(f"{found_P.max():.7g}"), 8.0, 32.0)
        contexts = (8192, *(2**n for n in range(5, 21)))
        candidates = [RopeScaling(factor, original_max_seq_len=n) for n, factor in product(contexts, factors)]
    for scaling in candidates:
        if torch.allclose(_divisors(shape, scaling), found_P, rtol=1e-5, atol=0):
            return scaling
    raise ValueError(f"tensor {DIVISORS} is not Llama 3.1's rotary scaling as its fields state it, or as it is in use")


def _divisors(shape: Shape, scaling: RopeScaling) -> Tensor:
    """By what each rotary frequency is divided, [head_dim / 2] float32."""
    freqs_P = rope.frequencies(dataclasses.replace(shape, rope_scaling=None))
    return (freqs_P / rope.scale(freqs_P, scaling)).float()


def _names(shape: Shape) -> dict[str, str]:
    """Our name -> GGUF's, by the library's own table."""
    table = gguf_py.get_tensor_name_map(gguf_py.MODEL_ARCH.LLAMA, shape.num_layers)
    return {ours: str(table.get_name(ours, (".weight",))) for ours in hf_names(shape.num_layers, tied=shape.tied)}


def _check(tensors: dict[str, TensorInfo], names: dict[str, str], shape: Shape) -> None:
    if missing := [theirs for theirs in names.values() if theirs not in tensors]:
        raise ValueError(f"tensor {missing[0]} is missing ({len(missing)} in all)")
    if extra := sorted(tensors.keys() - {*names.values(), DIVISORS}):
        raise ValueError(f"a Llama 3 has no tensor {extra[0]!r:.80} ({len(extra)} in all)")
    for ours, size in sizes(shape).items():
        info = tensors[names[ours]]
        if info.size != size:
            raise ValueError(f"tensor {names[ours]} has size {list(info.size)}, expected {list(size)}")
        kinds = READ if len(size) > 1 else READ[:3]
        if info.kind not in kinds:
            raise ValueError(f"tensor {names[ours]} is {info.kind}; it is read as {', '.join(kinds)}")


def _turned(turn: Callable[[Tensor, int], Tensor], shape: Shape, ours: str, weight: Tensor) -> Tensor:
    """The weight, its rows put in another order if they are rotary: GGUF keeps them interleaved."""
    heads = rotary_heads(ours, shape)
    return turn(weight, heads) if heads else weight


def write(weights: Weights, tokenizer: Any, folder: Path, kind: str, *, name: str = "model") -> list[str]:
    """Write `{name}-{kind}.gguf` into `folder`: weights as F32, F16, BF16, Q8_0 or Q4_0, and the tokenizer.

    Returns what the user should know, a line each. Raises ValueError naming a tensor with values that its kind
    cannot hold. Memory: the largest tensor.
    """
    kinds, names = stored_kinds(weights, kind), _names(weights.shape)
    fields = _fields(weights.shape, kind) | {"general.name": name} | _padded(tokenizer, weights.shape.vocab_size)
    with closing(gguf_py.GGUFWriter(folder / f"{name}-{kind.lower()}.gguf", "llama")) as writer:
        for key, value in fields.items():
            real = "float64" if key.startswith(OURS) else "float32"
            add = {list: "array", bool: "bool", int: "uint32", float: real, str: "string"}[type(value)]
            getattr(writer, f"add_{add}")(key, value)
        parts = {names[ours]: (size, kinds[ours]) for ours, size in sizes(weights.shape).items()}
        if scaling := weights.shape.rope_scaling:
            parts = {DIVISORS: ((weights.shape.head_dim // 2,), "F32")} | parts
        for theirs, (size, stored_kind) in parts.items():
            in_bytes = gguf_py.quant_shape_to_byte_shape(size, TYPES[stored_kind])
            writer.add_tensor_info(theirs, in_bytes, np.dtype(np.uint8), math.prod(in_bytes), TYPES[stored_kind])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if scaling:
            _append(writer, DIVISORS, _divisors(weights.shape, scaling), "F32")
        for ours, stored_kind in kinds.items():
            _append(writer, ours, _turned(to_interleaved, weights.shape, ours, weights.load(ours)), stored_kind)
    kept = sum(len(size) > 1 and stored_kind != kind for size, stored_kind in parts.values())
    return [f"{kept} matrices are stored as F16: their rows are no multiple of {kind}'s block"] if kept else []


def stored_kinds(weights: Weights, kind: str) -> dict[str, str]:
    """Our name -> how `write` stores it: norms as F32, and as F16 the matrices whose rows no block of `kind` fits."""
    if kind not in WRITTEN:
        raise ValueError(f"a GGUF file is not written as {kind}; there are: {', '.join(WRITTEN)}")
    block, _ = gguf_py.GGML_QUANT_SIZES[TYPES[kind]]
    return {
        name: "F32" if len(size) == 1 else "F16" if size[-1] % block else kind
        for name, size in sizes(weights.shape).items()
    }


def stored(tensor: Tensor, kind: str) -> Tensor:
    """What a tensor reads back as once stored: in the dtype of `kind`, float32 for a block kind."""
    if kind in DTYPES:
        return tensor.to(DTYPES[kind])
    back = torch.empty(tensor.shape)
    for part, (data, size) in zip(back.split(ROWS), _packed(tensor, kind), strict=True):
        part.copy_(_unpacked(data, kind, size))
    return back


def _fields(shape: Shape, kind: str) -> dict[str, Any]:
    """Metadata of the model, in Python's types."""
    fields: dict[str, Any] = {
        "general.type": "model",
        "general.file_type": int(gguf_py.LlamaFileType["ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"]),
        "general.quantization_version": gguf_py.GGML_QUANT_VERSION,
        "llama.vocab_size": shape.vocab_size,
        "llama.context_length": shape.max_seq_len,
        "llama.embedding_length": shape.dim,
        "llama.block_count": shape.num_layers,
        "llama.feed_forward_length": shape.ffn_dim,
        "llama.attention.head_count": shape.num_heads,
        "llama.attention.head_count_kv": shape.num_kv_heads,
        EPS: float(shape.norm_eps),
        THETA: float(shape.rope_theta),
        "llama.rope.dimension_count": shape.head_dim,
    }
    fields |= {ours: fields[key] for key, ours in OUR_NUMBERS.items() if in_float32(fields[key]) != fields[key]}
    if shape.rope_scaling:
        fields |= {OUR_SCALING + key: value for key, value in dataclasses.asdict(shape.rope_scaling).items()}
    return fields


def _padded(tokenizer: Any, num_rows: int) -> dict[str, Any]:
    """The tokenizer's metadata with as many tokens as the model has rows: llama.cpp loads no other file."""
    fields = emit.gguf_fields(tokenizer)
    missing = range(len(fields["tokenizer.ggml.tokens"]), num_rows)
    fillers: dict[str, list[Any]] = {
        "tokenizer.ggml.tokens": [f"[PAD{n}]" for n in missing],
        "tokenizer.ggml.token_type": [UNUSED] * len(missing),
        "tokenizer.ggml.scores": [0.0] * len(missing),
    }
    return fields | {key: fields[key] + filler for key, filler in fillers.items() if key in fields}


def _append(writer: gguf_py.GGUFWriter, name: str, tensor: Tensor, kind: str) -> None:
    """The next tensor's data, converted as they are written; the writer's own method wants them at once."""
    assert writer.fout
    file = writer.fout[0]
    writer.write_padding(file, file.tell())
    for data, size in _packed(tensor, kind):
        if not _unpacked(data, kind, size).isfinite().all():
            raise ValueError(f"tensor {name} holds values that are not finite in {kind}: store it as F32 or mend it")
        file.write(data.data)
    writer.write_padding(file, file.tell())


def _packed(tensor: Tensor, kind: str) -> Iterator[tuple[np.ndarray, tuple[int, ...]]]:
    """A tensor's bytes as the file has them, some rows at a time, each part with its size."""
    for rows in tensor.split(ROWS):
        if kind in DTYPES:
            data = rows.to(DTYPES[kind]).contiguous().view(torch.uint8).numpy()
        else:
            data = gguf_py.quantize(rows.float().numpy(), TYPES[kind])
        yield data, tuple(rows.shape)


def _unpacked(data: np.ndarray, kind: str, size: tuple[int, ...]) -> Tensor:
    """The tensor that a file's bytes stand for."""
    if kind in DTYPES:
        return torch.from_numpy(data).flatten().view(DTYPES[kind]).view(size)
    tensor = torch.empty(size)
    blocks = data.reshape(size[0], -1)
    for start in range(0, size[0], ROWS):
        rows = gguf_py.dequantize(blocks[start : start + ROWS], TYPES[kind])
        tensor[start : start + ROWS] = torch.from_numpy(rows)
    return tensor
