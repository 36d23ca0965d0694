"""PyTorch's .pth files, tensor by tensor: a zip archive with a pickle of names and sizes beside raw storages.

Only that pickle passes through torch.load (weights_only, on the meta device, so that no storage is read) and
torch.save (which leaves room for storages); their place in the file is `_checkpoint_offset` (torch's note
"Serialization semantics"). So neither side needs more memory than one tensor, and no file can run code.
"""

import math
import pickletools
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

# All that a pickle of plain tensors names. torch allows more, such as a bytearray of any size.
KNOWN = re.compile(r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)|torch \w+Storage")


class Stored(NamedTuple):
    """Where a tensor lies: `size` values of `dtype` from byte `start` of the file, without gaps."""

    dtype: torch.dtype
    size: tuple[int, ...]
    start: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.size) * self.dtype.itemsize


def layout(path: Path) -> dict[str, Stored]:
    """Name -> place of every tensor of a state dict.

    Raises ValueError in one line for a damaged file, one of before PyTorch 1.6, and one that holds anything but
    plain tensors, of which nothing is executed. No tensor is larger than the file, all together less than twice.
    """
    with path.open("rb") as file:
        if file.read(4) != b"PK\3\4":
            raise ValueError(f"{path} is no .pth file as PyTorch writes them since version 1.6")
    try:
        storages, names = _contents(path)
    except Exception as error:  # what zipfile and pickletools raise of a damaged file has no common class
        raise ValueError(f"{path} is damaged: {_line(error)}") from None
    if strange := sorted(name for name in names if not KNOWN.fullmatch(name)):
        raise ValueError(f"{path} holds {strange[0]!r}, which could run code: only plain tensors are read")
    try:
        state = torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:  # nor has what torch.load raises
        raise ValueError(f"{path} is damaged: {_line(error)}") from None
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise ValueError(f"{path} holds no state dict: it must map names to tensors")
    places = {name: _stored(path, name, tensor, storages) for name, tensor in state.items()}
    sizes = sorted(stored.num_bytes for stored in places.values())
    if sum(sizes[:-1]) > path.stat().st_size:  # one tensor may lie there twice: a tied head
        raise ValueError(f"{path} is smaller than its tensors: some share their values")
    return places


def _line(error: Exception) -> str:
    return f"{type(error).__name__} {error}".strip().partition("\n")[0][:200]


def _contents(path: Path) -> tuple[dict[int, int], set[str]]:
    """First byte -> number of bytes of each storage, and all that the pickle names outside itself."""
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("it is compressed")
        for entry in entries:
            if entry.filename.lower().endswith("/byteorder") and archive.read(entry) != b"little":
                raise ValueError("its bytes are not in little-endian order")  # on which torch.load would crash
        storages = {_start(file, entry): entry.file_size for entry in entries}
        [pickled] = (entry for entry in entries if entry.filename.lower().endswith("/data.pkl"))
        operations = pickletools.genops(archive.read(pickled))
    return storages, {str(arg) for operation, arg, _ in operations if "GLOBAL" in operation.name}


def _start(file: IO[bytes], entry: zipfile.ZipInfo) -> int:
    """Where an entry's bytes begin: behind its local header, a name and extra fields."""
    file.seek(entry.header_offset + 26)
    return entry.header_offset + 30 + sum(struct.unpack("<2H", file.read(4)))


def _stored(path: Path, name: str, tensor: object, storages: Mapping[int, int]) -> Stored:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{path}: {name} is no tensor but a {type(tensor).__name__}")
    if not tensor.is_contiguous():
        raise ValueError(f"{path}: the values of {name} do not lie one behind the other: save a contiguous tensor")
    storage, first = tensor.untyped_storage(), int(tensor.storage_offset()) * tensor.itemsize
    start = getattr(storage, "_checkpoint_offset", -1)
    stored = Stored(tensor.dtype, tuple(tensor.shape), start + first)
    if storages.get(start) != storage.nbytes() or first + stored.num_bytes > storage.nbytes():
        raise ValueError(
            f"{path} is damaged or was packed anew: the values of {name} are not where torch.save puts them"
        )
    return stored


def tensor(path: Path, stored: Stored) -> Tensor:
    """The tensor mapped from its file; what is written to it stays in memory."""
    data = np.memmap(path, np.uint8, "c", stored.start, (stored.num_bytes,))
    return torch.from_numpy(data).view(stored.dtype).view(stored.size)


def write(path: Path, sizes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, load: Callable[[str], Tensor]) -> None:
    """A state dict in `dtype` of what `load(name)` gives, as torch.save writes it, checksums included."""
    with FakeTensorMode():
        state = {name: torch.empty(size, dtype=dtype) for name, size in sizes.items()}
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(state, path)
    sums = {}
    with path.open("r+b") as file, ThreadPoolExecutor(1) as beside:
        for name, stored in layout(path).items():
            data = load(name).to(dtype).contiguous().view(torch.uint8).numpy().data
            checksum = beside.submit(zlib.crc32, data)  # as slow as the disk
            file.seek(stored.start)
            file.write(data)
            sums[stored.start] = checksum.result()
    _seal(path, sums)


def _seal(path: Path, sums: Mapping[int, int]) -> None:
    """Put the CRC-32 of each storage where zip has it: in the directory, and behind the storage."""
    with zipfile.ZipFile(path) as archive, path.open("r+b") as file:
        record = archive.start_dir
        for entry in archive.infolist():
            start = _start(file, entry)
            if start in sums:
                for place in (record + 16, start + entry.file_size + 4):
                    file.seek(place)
                    file.write(sums[start].to_bytes(4, "little"))
            file.seek(record + 28)
            record += 46 + sum(struct.unpack("<3H", file.read(6)))
