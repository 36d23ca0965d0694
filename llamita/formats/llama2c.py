"""Read llama2.c's first .bin format (version 0) and its tokenizer.bin (github.com/karpathy/llama2.c, run.c).

Seven int32: dim, ffn_dim, num_layers, num_heads, num_kv_heads, vocab_size (negative: the head is not tied),
max_seq_len. Then float32 tensors, each kind for all layers together. All little-endian; rotary pairs are
interleaved, theta is 10000.
"""

import re
import struct
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llamita.formats.names import to_half_split
from llamita.model.llama import Llama, build
from llamita.model.shape import Shape

HEADER = struct.Struct("<7i")
BYTE = re.compile(rb"<0x[0-9A-F]{2}>")


def read(path: str | Path) -> Llama:
    """The model in the file, float32. Raises ValueError when header and file size do not agree."""
    path = Path(path)
    num_bytes = path.stat().st_size
    if num_bytes < HEADER.size:
        raise ValueError(f"{path} is no llama2.c version 0 model: {num_bytes} bytes are less than its header")
    with path.open("rb") as file:
        shape = _shape(path, HEADER.unpack(file.read(HEADER.size)))
    sizes = _sizes(shape)
    expected = HEADER.size + 4 * sum(map(prod, sizes.values()))
    if num_bytes != expected:
        raise ValueError(
            f"{path} is no whole llama2.c version 0 model: it has {num_bytes} bytes, its header promises {expected}"
        )
    values = np.fromfile(path, dtype="<f4", offset=HEADER.size)
    ends = np.cumsum([prod(size) for size in sizes.values()])
    blocks = np.split(values, ends[:-1])
    tensors = {
        name: torch.from_numpy(block).view(size) for (name, size), block in zip(sizes.items(), blocks, strict=True)
    }
    model = build(shape)
    model.load_state_dict(_state(shape, tensors))
    return model


def _shape(path: Path, header: tuple[int, ...]) -> Shape:
    dim, ffn_dim, num_layers, num_heads, num_kv_heads, vocab_size, max_seq_len = header
    try:
        return Shape(
            dim=dim,
            ffn_dim=ffn_dim,
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            vocab_size=abs(vocab_size),
            tied=vocab_size > 0,
            max_seq_len=max_seq_len,
            rope_theta=10_000.0,
            norm_eps=1e-5,
        )
    except ValueError as error:
        raise ValueError(f"{path} is no llama2.c version 0 model: {error}") from error


def _sizes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Our name ({} for each layer) -> size, in the file's order. Its rotary tables go unused."""
    layers, dim, ffn_dim = shape.num_layers, shape.dim, shape.ffn_dim
    kv_dim = shape.num_kv_heads * shape.head_dim
    sizes: dict[str, tuple[int, ...]] = {
        "tok_embeddings.weight": (shape.vocab_size, dim),
        "layers.{}.attention_norm.weight": (layers, dim),
        "layers.{}.attention.wq.weight": (layers, dim, dim),
        "layers.{}.attention.wk.weight": (layers, kv_dim, dim),
        "layers.{}.attention.wv.weight": (layers, kv_dim, dim),
        "layers.{}.attention.wo.weight": (layers, dim, dim),
        "layers.{}.ffn_norm.weight": (layers, dim),
        "layers.{}.feed_forward.w1.weight": (layers, ffn_dim, dim),
        "layers.{}.feed_forward.w2.weight": (layers, dim, ffn_dim),
        "layers.{}.feed_forward.w3.weight": (layers, ffn_dim, dim),
        "norm.weight": (dim,),
        "rotary": (2, shape.max_seq_len, shape.head_dim // 2),
    }
    return sizes if shape.tied else sizes | {"output.weight": (shape.vocab_size, dim)}


def _state(shape: Shape, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The file's tensors under our names, rotary rows in our order."""
    state = {"output.weight": tensors["tok_embeddings.weight"]}
    for name, tensor in tensors.items():
        if "{}" not in name:
            state[name] = tensor
            continue
        num_heads = shape.num_heads if ".wq." in name else shape.num_kv_heads
        for layer, weight in enumerate(tensor):
            rotary = ".wq." in name or ".wk." in name
            state[name.format(layer)] = to_half_split(weight, num_heads) if rotary else weight
    del state["rotary"]
    return state


def read_vocab(path: str | Path, size: int) -> list[bytes]:
    """What each of the `size` tokens of a tokenizer.bin prints (a piece `<0x0A>` is that byte).

    The file: int32 longest piece, then for each token float32 score, int32 number of bytes, the bytes.
    Raises ValueError for a file that ends too early or too late.
    """
    data = Path(path).read_bytes()
    pieces = []
    offset = 4
    for token in range(size):
        head = data[offset : offset + 8]
        length = struct.unpack("<fi", head)[1] if len(head) == 8 else -1
        piece = data[offset + 8 : offset + 8 + length] if length >= 0 else b""
        if length < 0 or len(piece) < length:
            raise ValueError(f"{path} is no whole llama2.c tokenizer of {size} tokens: it breaks at token {token}")
        pieces.append(bytes.fromhex(piece[3:5].decode()) if BYTE.fullmatch(piece) else piece)
        offset += 8 + length
    if offset != len(data):
        raise ValueError(f"{path} has {len(data) - offset} bytes after {size} tokens: is the vocabulary larger?")
    return pieces
