"""Read llama2.c's .bin models (github.com/karpathy/llama2.c: export.py, run.c, runq.c).

Version 0: seven int32 (dim, ffn_dim, num_layers, num_heads, num_kv_heads, vocab_size, negative where the head is not
tied, max_seq_len), then float32 tensors. Versions 1 and 2: uint32 magic, int32 version, the same seven, one byte 1
where the head is tied, in version 2 int32 group_size, zeros up to byte 256, then the tensors: float32, in version 2
matrices as int8 and behind each matrix one float32 scale for every group_size values. A kind of tensor lies there for
all layers together. All little-endian; rotary pairs are interleaved, theta is 10000.
"""

import struct
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llamita.formats.names import EMBEDDINGS, HEAD, rotary_heads, to_half_split
from llamita.formats.weights import Weights, sizes
from llamita.model.shape import Shape

SIZES = struct.Struct("<7i")
MAGIC = struct.pack("<I", 0x616B3432)
FLAGS = struct.Struct("<Bi")  # tied, group_size
HEADER_BYTES = 256  # of versions 1 and 2

MATRICES = [*(f"layers.{{}}.attention.w{which}.weight" for which in "qkvo"),
            *(f"layers.{{}}.feed_forward.w{which}.weight" for which in "123")]  # fmt: skip
NORMS = ["layers.{}.attention_norm.weight", "layers.{}.ffn_norm.weight"]
NORM, ROTARY = "norm.weight", "rotary"
ORDER = {
    0: [EMBEDDINGS, NORMS[0], *MATRICES[:4], NORMS[1], *MATRICES[4:], NORM, ROTARY, HEAD],
    1: [*NORMS, NORM, EMBEDDINGS, *MATRICES, HEAD],
    2: [*NORMS, NORM, EMBEDDINGS, *MATRICES, HEAD],
}


def read(path: str | Path) -> Weights:
    """The weights of a file of version 0, 1 or 2, kind F32, or I8 for version 2's matrices.

    Raises ValueError when header and file size do not agree.
    """
    path = Path(path)
    with path.open("rb") as file:
        head = file.read(HEADER_BYTES)
    try:
        shape, version, group_size = _header(head)
        places = _places(shape, version, group_size, path.stat().st_size)
    except ValueError as error:
        raise ValueError(f"{path} is no whole llama2.c model: {error}") from None
    expected = sizes(shape)

    def load(name: str) -> Tensor:
        start, num_values = places[name], prod(expected[name])
        if version < 2 or "norm" in name:
            tensor = torch.from_numpy(np.fromfile(path, "<f4", num_values, offset=start))
        else:
            values = torch.from_numpy(np.fromfile(path, np.int8, num_values, offset=start))
            scales = np.fromfile(path, "<f4", num_values // group_size, offset=start + num_values)
            tensor = values.view(-1, group_size) * torch.from_numpy(scales).unsqueeze(1)
        tensor = tensor.view(expected[name])
        heads = rotary_heads(name, shape)
        return to_half_split(tensor, heads) if heads else tensor

    kinds = {name: "I8" if version == 2 and "norm" not in name else "F32" for name in expected}
    return Weights(shape, kinds, load)


def _header(head: bytes) -> tuple[Shape, int, int]:
    """Shape, version, and version 2's group_size (1 in the others)."""
    version, group_size, start = 0, 1, 0
    if head[:4] == MAGIC:
        version, start = int.from_bytes(head[4:8], "little"), 8
        if version not in (1, 2):
            raise ValueError(f"its version is {version}; llamita reads 0, 1 and 2")
    if len(head) < (HEADER_BYTES if version else SIZES.size):
        raise ValueError(f"{len(head)} bytes are less than its header")
    dim, ffn_dim, num_layers, num_heads, num_kv_heads, vocab_size, max_seq_len = SIZES.unpack_from(head, start)
    tied = vocab_size > 0
    if version:
        tied, group_size = FLAGS.unpack_from(head, start + SIZES.size)
        if tied not in (0, 1) or (version == 2 and group_size < 1):
            raise ValueError(f"its header says shared_classifier {tied} and group_size {group_size}")
    shape = Shape(
        dim=dim,
        ffn_dim=ffn_dim,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        vocab_size=vocab_size if version else abs(vocab_size),
        tied=bool(tied),
        max_seq_len=max_seq_len,
        rope_theta=10_000.0,
        norm_eps=1e-5,
    )
    return shape, version, group_size


def _places(shape: Shape, version: int, group_size: int, num_bytes: int) -> dict[str, int]:
    """Our name -> where in the file the tensor begins. Raises ValueError where the file has not `num_bytes`."""
    dim, kv_dim, matrix = shape.dim, shape.num_kv_heads * shape.head_dim, shape.vocab_size * shape.dim
    num_values = dict.fromkeys([*NORMS, NORM], dim)
    num_values |= zip(MATRICES, (dim * size for size in (dim, kv_dim, kv_dim, dim, *3 * [shape.ffn_dim])), strict=True)
    num_values |= {EMBEDDINGS: matrix, HEAD: matrix, ROTARY: shape.max_seq_len * shape.head_dim}
    runs, end = [], HEADER_BYTES if version else SIZES.size
    for name in ORDER[version]:
        if name == HEAD and shape.tied:
            continue
        size, count = 4 * num_values[name], shape.num_layers if "{}" in name else 1
        if version == 2 and "norm" not in name:
            if num_values[name] % group_size:
                raise ValueError(f"its group_size {group_size} does not divide the {num_values[name]} values of {name}")
            size = num_values[name] + size // group_size
        runs.append((name, end, size, count))
        end += size * count
    if end != num_bytes:
        raise ValueError(f"it has {num_bytes} bytes, its header promises {end}")
    return {name.format(layer): start + layer * size for name, start, size, count in runs for layer in range(count)}
