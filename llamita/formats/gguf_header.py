"""The header of a stranger's GGUF file: its metadata, and where each tensor lies (ggml's docs/gguf.md).

Little-endian: "GGUF", version, number of tensors, number of fields; the fields (name, type, value); the tensors
(name, dims, kind, offset); then, padded to `general.alignment`, the data.
"""

import mmap
import struct
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from gguf.constants import GGML_QUANT_SIZES

# Bounds far above any Llama's: 128,256 tokens, their types and 280,147 merges take 8 MB, 126 layers 1,138 tensors.
# MAX_ITEMS of all arrays together, as an item of two bytes in the file takes 36 and more in Python.
MAX_HEADER_BYTES, MAX_ITEMS, MAX_COUNT, MAX_DIMS = 64 << 20, 1 << 21, 1 << 16, 4
# Number of a type -> its code in `struct`.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
# Number of a kind -> its name, values in a block, bytes of a block.
KINDS = {int(kind): (kind.name, *size) for kind, size in GGML_QUANT_SIZES.items()}
LENGTH = struct.Struct("<Q")


@dataclass(frozen=True)
class TensorInfo:
    """`kind` is ggml's name (F32, Q4_K, ...), `size` in torch's order; `num_bytes` lie at `start` in the file."""

    kind: str
    size: tuple[int, ...]
    start: int
    num_bytes: int


def read_header(path: Path | str) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """The metadata as plain Python values, and every tensor; their data are not touched.

    A float32 reads as the shortest decimal that gives it: 1e-5, not 9.999999747378752e-06.
    Raises ValueError naming the file and what is wrong, before anything larger than the file's header is allocated.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is no file: give a .gguf file")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{path} is no GGUF file: it does not begin with GGUF")
        num_bytes = path.stat().st_size
        with mmap.mmap(file.fileno(), min(num_bytes, MAX_HEADER_BYTES), access=mmap.ACCESS_READ) as data:
            return _Header(path, data, num_bytes).read()


class _Header:
    def __init__(self, path: Path, data: mmap.mmap, num_bytes: int):
        self.path, self.data, self.num_bytes = path, data, num_bytes
        self.pos, self.num_items = 4, 0

    def refuse(self, reason: str) -> NoReturn:
        raise ValueError(f"{self.path}: {reason}")

    def need(self, num_bytes: int, what: str) -> None:
        if num_bytes > len(self.data) - self.pos:
            limit = f"; a header has at most {MAX_HEADER_BYTES} bytes" if len(self.data) < self.num_bytes else ""
            self.refuse(f"cut short or damaged in {what}, which wants {num_bytes} bytes at byte {self.pos}{limit}")

    def unpack(self, codes: str, what: str) -> tuple[Any, ...]:
        self.need(struct.calcsize(f"<{codes}"), what)
        values = struct.unpack_from(f"<{codes}", self.data, self.pos)
        self.pos += struct.calcsize(f"<{codes}")
        return values

    def texts(self, count: int, what: str) -> list[str]:
        self.need(LENGTH.size * count, what)
        texts = []
        data, end = self.data, len(self.data)
        for _ in range(count):  # nothing is called per text that need not be: there are 400,000
            start = self.pos + LENGTH.size
            length = LENGTH.unpack_from(data, self.pos)[0] if start <= end else end
            if length > end - start:
                self.need(LENGTH.size + length, what)
            try:
                texts.append(data[start : start + length].decode())
            except UnicodeDecodeError:
                self.refuse(f"{what} holds text that is not UTF-8, at byte {start}")
            self.pos = start + length
        return texts

    def read(self) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
        (version,) = self.unpack("I", "its version")
        if version not in (2, 3):
            self.refuse(f"GGUF version {version}, read as little-endian, is not 2 or 3: convert the model anew")
        num_tensors, num_fields = self.unpack("QQ", "its counts")
        if max(num_tensors, num_fields) > MAX_COUNT:
            self.refuse(f"{num_tensors} tensors and {num_fields} fields are promised, at most {MAX_COUNT} are read")
        fields: dict[str, Any] = {}
        for _ in range(num_fields):
            (key,) = self.texts(1, "the name of a field")
            if key in fields:
                self.refuse(f"there are two fields {key!r:.80}")
            fields[key] = self.value(f"field {key!r:.80}")
        return fields, self.tensors(num_tensors, fields.get("general.alignment", 32))

    def value(self, what: str) -> Any:
        (kind,) = self.unpack("I", what)
        if kind == STRING:
            return self.texts(1, what)[0]
        if kind == ARRAY:
            kind, count = self.unpack("IQ", what)
            if kind in SCALARS or kind == STRING:
                self.need(count * (LENGTH.size if kind == STRING else struct.calcsize(SCALARS[kind])), what)
                self.num_items += count
                if self.num_items > MAX_ITEMS:
                    self.refuse(f"{what} brings its arrays to more than {MAX_ITEMS} items, which no Llama needs")
                return self.texts(count, what) if kind == STRING else list(self.unpack(f"{count}{SCALARS[kind]}", what))
        if kind not in SCALARS:
            self.refuse(f"{what} holds values of the type {kind}, which is none to read")
        (value,) = self.unpack(SCALARS[kind], what)
        return in_float32(value) if SCALARS[kind] == "f" else value

    def tensors(self, count: int, alignment: Any) -> dict[str, TensorInfo]:
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            self.refuse(f"general.alignment must be a power of two, not {alignment!r:.80}")
        infos: dict[str, TensorInfo] = {}
        end = 0
        for _ in range(count):
            (name,) = self.texts(1, "the name of a tensor")
            what = f"tensor {name!r:.80}"
            if name in infos:
                self.refuse(f"{what} is there twice")
            (num_dims,) = self.unpack("I", what)
            if not 1 <= num_dims <= MAX_DIMS:
                self.refuse(f"{what} has {num_dims} dims, not 1 to {MAX_DIMS}")
            *dims, kind, offset = self.unpack(f"{num_dims}QIQ", what)
            if kind not in KINDS:
                self.refuse(f"{what} is of the kind {kind}, which ggml does not have")
            kind, block, block_bytes = KINDS[kind]
            if 0 in dims or dims[0] % block:
                self.refuse(f"{what} has the dims {dims}: in {kind} the first is a multiple of {block}, and none is 0")
            # As in llama.cpp: without a gap, so nothing is out of line and no two overlap.
            if offset != end:
                self.refuse(f"{what} has its data at {offset}, they belong at {end}")
            infos[name] = TensorInfo(kind, tuple(reversed(dims)), offset, prod(dims) // block * block_bytes)
            end = _aligned(offset + infos[name].num_bytes, alignment)
        start = _aligned(self.pos, alignment)
        for name, info in infos.items():
            infos[name] = info = replace(info, start=start + info.start)
            if info.start + info.num_bytes > self.num_bytes:
                self.refuse(f"cut short: the file has {self.num_bytes} bytes, not all of tensor {name!r:.80}")
        return infos


def in_float32(value: float) -> float:
    """The shortest decimal that gives the same float32 as `value`."""
    return float(str(np.float32(value)))


def _aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment
