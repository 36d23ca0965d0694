"""Model folders as Hugging Face keeps them: `LlamaForCausalLM`, plain enough for every reader of the format."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llamita.formats.config_json import config, generation_config, read_shape
from llamita.formats.files import read_json, write_json
from llamita.formats.names import EMBEDDINGS, HEAD, TO_HF, hf_names
from llamita.formats.weights import DTYPES, KINDS, Weights, sizes
from llamita.tokenizer.carried import AnyTokenizer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 10**9  # as transformers cuts
ROWS = 1024  # compared at a time

Stored = tuple[Path, list[int], str]  # a tensor's file, shape and kind


def write(weights: Weights, tokenizer: AnyTokenizer, folder: Path, kind: str) -> list[str]:
    """Fill an empty folder with config, weights stored as `kind` (F32, BF16, F16, F64), and tokenizer.

    Weights above 5 GB go into several shards and an index. Memory: the largest tensor. Returns notes for the user, as
    every format's writer does: there are none.
    """
    dtype = DTYPES[kind]
    tokenizer.save(folder)
    write_json(folder / "config.json", config(weights.shape, tokenizer, dtype))
    write_json(folder / "generation_config.json", generation_config(tokenizer))
    names = hf_names(weights.shape.num_layers, tied=weights.shape.tied)
    shards = _shards(weights, dtype.itemsize)
    placed: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = WEIGHTS if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {names[ours]: (size, ours) for ours, size in shard.items()}
        write_safetensors(folder / file, {theirs: size for theirs, (size, _) in tensors.items()}, dtype,
                          lambda theirs, tensors=tensors: weights.load(tensors[theirs][1]))  # fmt: skip
        placed |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        total = sum(map(math.prod, sizes(weights.shape).values())) * dtype.itemsize
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": placed})
    return []


def _shards(weights: Weights, itemsize: int) -> list[dict[str, tuple[int, ...]]]:
    """Our names and sizes, in order, cut before a shard would pass its limit."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    room = MAX_SHARD_BYTES
    for name, size in sizes(weights.shape).items():
        num_bytes = math.prod(size) * itemsize
        if num_bytes > room and shards[-1]:
            shards.append({})
            room = MAX_SHARD_BYTES
        shards[-1][name] = size
        room -= num_bytes
    return shards


def write_safetensors(path: Path, sizes: dict[str, tuple[int, ...]], dtype: torch.dtype, load: Any) -> None:
    """A safetensors file tensor by tensor (github.com/huggingface/safetensors, README "Format"); the library's own
    writer wants them all in memory.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, size in sizes.items():
        start, end = end, end + math.prod(size) * dtype.itemsize
        header[name] = {"dtype": KINDS[dtype], "shape": list(size), "data_offsets": [start, end]}
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for name in sizes:
            file.write(load(name).to(dtype).contiguous().view(torch.uint8).numpy())


def read(folder: Path | str) -> Weights:
    """The weights of a folder, in one safetensors file or several.

    A head that config.json ties may lie there too, equal to the embeddings, as some tools write it.
    Raises ValueError naming the first tensor that is missing, extra or of a wrong shape, or the damaged file.
    Pickled weights (.bin, .pth) can run code and are refused.
    """
    folder = Path(folder)
    shape = read_shape(folder)
    stored = _headers(_weight_files(folder))
    names = hf_names(shape.num_layers, tied=shape.tied)
    head = stored.pop(TO_HF[HEAD], None) if shape.tied else None
    if missing := sorted(set(names.values()) - stored.keys()):
        raise ValueError(f"{folder}: tensor {missing[0]} is missing ({len(missing)} in all)")
    if extra := sorted(stored.keys() - set(names.values())):
        raise ValueError(f"{folder}: config.json knows no tensor {extra[0]} ({len(extra)} in all)")
    for ours, size in sizes(shape).items():
        found = stored[names[ours]][1]
        if found != list(size):
            raise ValueError(f"{folder}: tensor {names[ours]} has shape {found}, expected {list(size)}")
    if head and not _equal(TO_HF[HEAD], head, TO_HF[EMBEDDINGS], stored[TO_HF[EMBEDDINGS]]):
        raise ValueError(
            f"{folder}: config.json ties the head, but {TO_HF[HEAD]} differs from the embeddings: "
            "delete it or set tie_word_embeddings to false"
        )

    def load(ours: str) -> Tensor:
        path, _, _ = stored[names[ours]]
        with opened(path) as file:  # opened anew for each tensor, so that no more than one stays mapped
            tensor: Tensor = file.get_tensor(names[ours])
        return tensor

    return Weights(shape, {ours: stored[theirs][2] for ours, theirs in names.items()}, load)


def _equal(name: str, stored: Stored, other_name: str, other: Stored) -> bool:
    """Whether two matrices are stored with the same bits."""
    if stored[1:] != other[1:]:
        return False
    with opened(stored[0]) as file, opened(other[0]) as other_file:
        rows, other_rows = file.get_slice(name), other_file.get_slice(other_name)
        parts = [slice(start, start + ROWS) for start in range(0, stored[1][0], ROWS)]
        return all(torch.equal(rows[part].view(torch.uint8), other_rows[part].view(torch.uint8)) for part in parts)


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pth"))
        reason = "; pickled weights can run code when read: convert them to safetensors" if pickled else ""
        raise ValueError(f"{folder} holds neither {WEIGHTS} nor {INDEX}{reason}")
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{folder / INDEX} holds no weight_map")
    shards = sorted({str(shard) for shard in weight_map.values()})
    for shard in shards:
        if Path(shard).name != shard or "\\" in shard or not shard.endswith(".safetensors"):
            raise ValueError(f"{folder / INDEX}: {shard!r} is not the name of a safetensors file in the same folder")
        if not (folder / shard).is_file():
            raise ValueError(f"{folder}: the shard {shard} is missing")
    return [folder / shard for shard in shards]


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file. Raises ValueError naming it where it cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        reason = "if it is cut short or damaged, fetch or write it again"
        raise ValueError(f"{path} cannot be read ({error}): {reason}") from None


def _headers(paths: list[Path]) -> dict[str, Stored]:
    """All tensors by name, without reading a weight."""
    stored: dict[str, Stored] = {}
    for path in paths:
        with opened(path) as file:
            for name in set(file.keys()):
                if name.endswith("rotary_emb.inv_freq"):  # older folders store what config.json implies
                    continue
                part = file.get_slice(name)
                if name in stored:
                    raise ValueError(f"{path}: tensor {name} is in two shards")
                if part.get_dtype() not in DTYPES:
                    raise ValueError(f"{path}: tensor {name} has dtype {part.get_dtype()}, not one of {list(DTYPES)}")
                stored[name] = (path, part.get_shape(), part.get_dtype())
    return stored
