"""How a state lies on disk: a safetensors file of every rank that wrote, and state.json, which says where each part is.

torch.distributed.checkpoint (DCP) plans which rank writes and reads which part; the bytes are ours. DCP's own files are
pickles, and opening a pickle runs what it says: here nothing is ever unpickled, and no .metadata is read.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    create_default_local_load_plan,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem, SavePlan, TensorWriteData, WriteItem
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter
from torch.futures import Future

INDEX = "state.json"
MAX_INDEX = 2**30  # bytes; by arithmetic, 405B weights with Adam on 16,384 ranks: 3.5 million parts, 200 MB
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
KINDS = {dtype: kind for kind, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Part:
    """A box of a tensor, and the file that holds it."""

    file: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Saved:
    """A tensor on disk: the boxes lie side by side and make up the whole."""

    dtype: torch.dtype
    size: tuple[int, ...]
    parts: tuple[Part, ...]

    def key(self, name: str, part: Part) -> str:
        """Name of a part in its file: the tensor's own where the part is all of it."""
        return name if part.sizes == self.size else f"{name}[{','.join(map(str, part.offsets))}]"


Index = tuple[dict[str, Saved], dict[str, Any]]
"""Tensors and plain values of a state, by name."""
Piece = tuple[str, Saved]
"""The name of a tensor, and one part of it."""


def describe(path: Path) -> dict[str, int | str]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def write(path: Path, pieces: Sequence[Piece], load: Callable[[int], Tensor]) -> dict[str, int | str]:
    """Write `pieces` as a safetensors file, one in memory at a time, and wait until the disk has it; describes it.

    `load(number)` gives the tensor of a piece, on any device.
    """
    header, end = {}, 0
    for name, saved in pieces:
        sizes = saved.parts[0].sizes
        begin, end = end, end + prod(sizes) * saved.dtype.itemsize
        header[saved.key(name, saved.parts[0])] = {
            "dtype": KINDS[saved.dtype], "shape": sizes, "data_offsets": [begin, end]
        }  # fmt: skip
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:

        def put(block: bytes | memoryview) -> None:
            file.write(block)
            digest.update(block)

        put(len(raw).to_bytes(8, "little") + raw)
        for number in range(len(pieces)):
            flat = load(number).detach().cpu().contiguous().reshape(-1)
            put(flat.view(torch.uint8).numpy().data)
        assert file.tell() == 8 + len(raw) + end
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": 8 + len(raw) + end, "sha256": digest.hexdigest()}


def write_index(folder: Path, index: Index) -> None:
    tensors, values = index
    listed = {
        name: {
            "dtype": KINDS[saved.dtype],
            "size": saved.size,
            "parts": [(part.file, part.offsets, part.sizes) for part in saved.parts],
        }
        for name, saved in tensors.items()
    }
    (folder / INDEX).write_text(json.dumps({"tensors": listed, "values": values}))


def read_index(folder: Path) -> Index:
    """Raises ValueError, in one line, for an index that is missing, damaged or not to be trusted."""
    path = folder / INDEX
    try:
        if path.stat().st_size > MAX_INDEX:
            raise ValueError(f"more than {MAX_INDEX} bytes")
        listed = json.loads(path.read_bytes())
        return {name: _checked(name, **entry) for name, entry in listed["tensors"].items()}, dict(listed["values"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is no index of a checkpoint ({error}): take another checkpoint") from error


def _checked(name: str, dtype: str, size: list[int], parts: list[tuple[str, list[int], list[int]]]) -> Saved:
    saved = Saved(DTYPES[dtype], tuple(size), tuple(Part(file, tuple(at), tuple(of)) for file, at, of in parts))
    if not all(type(length) is int and length >= 0 for length in saved.size):
        raise ValueError(f"{name} has the size {size}")
    for part in saved.parts:
        if Path(part.file).name != part.file or Path(part.file).suffix != ".safetensors":
            raise ValueError(f"{name} is said to lie in {part.file!r}, which is no file of this folder")
        boxes = zip(part.offsets, part.sizes, saved.size, strict=True)
        if not all(type(at) is type(of) is int and 0 <= at <= at + of <= end for at, of, end in boxes):
            raise ValueError(f"a part of {name} lies outside of it")
    if sum(prod(part.sizes) for part in saved.parts) != prod(saved.size):
        raise ValueError(f"the parts of {name} do not make up the whole")
    return saved


class Files(ExitStack):
    """The safetensors files of one folder, each opened (mapped) once."""

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder
        self.opened: dict[str, Any] = {}

    def read(self, saved: Saved, name: str, part: Part, box: tuple[slice, ...]) -> Tensor:
        """A box of a part. Raises ValueError for a file that is not what the index says."""
        key = saved.key(name, part)
        try:
            if part.file not in self.opened:
                self.opened[part.file] = self.enter_context(safe_open(self.folder / part.file, "pt"))
            view = self.opened[part.file].get_slice(key)
            if view.get_shape() != list(part.sizes) or view.get_dtype() != KINDS[saved.dtype]:
                raise ValueError(f"{self.folder / part.file}: {key} is not of the size or dtype that {INDEX} says")
            return view[box] if box else self.opened[part.file].get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.folder / part.file} cannot be read: {error}") from error


class Planner(DefaultSavePlanner):
    """The parts of this rank's state, looked at when it is built: in place, or copied to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.fault: Exception | None = None  # of what came before the ranks met; told to all where they do
        self.data: dict[dcp.MetadataIndex, Any] = {}

    def stage(self, state: dict[str, Any], host: dict[dcp.MetadataIndex, Tensor] | None) -> None:
        """Plan `state`; with `host`, copy it there, into the same memory as the last time where it fits."""
        super().set_up_planner(state)
        self.plan = super().create_local_plan()
        for item in self.plan.items:
            found = self.lookup_object(item.index)
            if item.tensor_data is None:
                try:
                    self.data[item.index] = json.loads(json.dumps(found))
                except TypeError as error:
                    raise ValueError(f"{item.index.fqn} is neither tensor nor plain value ({error})") from error
            else:
                self.data[item.index] = found.detach() if host is None else _copied(found, item.index, host)
        if host is not None and torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        self.state_dict = {}  # the live tensors may change from here on

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        if self.fault is not None:
            raise self.fault

    def create_local_plan(self) -> SavePlan:
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Any:
        return self.data[write_item.index]


def _copied(tensor: Tensor, at: dcp.MetadataIndex, host: dict[dcp.MetadataIndex, Tensor]) -> Tensor:
    kept = host.get(at)
    if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
        kept = host[at] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return kept.copy_(tensor.detach(), non_blocking=True)


class Disk(StorageWriter):
    """Writes each rank's parts to a file in `folder`; rank 0 then writes the index and calls `commit`."""

    def __init__(self, folder: Path, commit: Callable[[dict[str, dict]], None]):
        self.folder, self.commit = folder, commit

    def reset(self, checkpoint_id: Any = None) -> None: ...

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None: ...

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [replace(plan, storage_data=f"rank_{rank:05d}.safetensors") for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: Any) -> Future:
        """Gives (file, its description), the pieces in it and plain values, for `finish` on rank 0."""
        file = plan.storage_data
        values = {item.index.fqn: planner.resolve_data(item) for item in plan.items if item.tensor_data is None}
        items = [item for item in plan.items if item.tensor_data is not None and not _is_nothing(item.tensor_data)]
        items.sort(key=lambda item: -_piece(item, file)[1].dtype.itemsize)  # so that every tensor lies aligned
        pieces = [_piece(item, file) for item in items]
        described = write(self.folder / file, pieces, lambda number: planner.resolve_data(items[number]))
        done: Future = Future()
        done.set_result((file, described, pieces, values))
        return done

    def finish(self, metadata: dcp.Metadata, results: list[Any]) -> None:
        kinds: dict[str, Saved] = {}
        parts: dict[str, list[Part]] = {}
        values: dict[str, Any] = {}
        for _, _, pieces, plain in results:
            values |= plain
            for name, saved in pieces:
                kinds[name] = saved
                parts.setdefault(name, []).extend(saved.parts)
        tensors = {name: replace(saved, parts=tuple(parts[name])) for name, saved in kinds.items()}
        write_index(self.folder, (tensors, values))
        self.commit({file: described for file, described, _, _ in results})

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


def _is_nothing(data: TensorWriteData) -> bool:
    """A rank's part of a tensor that has fewer rows than there are ranks."""
    return prod(data.chunk.sizes) == 0 and prod(data.size) > 0


def _piece(item: WriteItem, file: str) -> Piece:
    data = item.tensor_data
    assert data is not None
    part = Part(file, tuple(data.chunk.offsets), tuple(data.chunk.sizes))
    return item.index.fqn, Saved(data.properties.dtype, tuple(data.size), (part,))


class Source(StorageReader):
    """Reads parts of a state from a folder, only the rows that are asked for."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.tensors, self.values = read_index(folder)

    def reset(self, checkpoint_id: Any = None) -> None: ...

    def read_metadata(self, *args: Any, **kwargs: Any) -> dcp.Metadata:
        listed: dict[str, Any] = {name: dcp.BytesStorageMetadata() for name in self.values}
        for name, saved in self.tensors.items():
            chunks = [dcp.ChunkStorageMetadata(torch.Size(p.offsets), torch.Size(p.sizes)) for p in saved.parts]
            properties = dcp.TensorProperties(dtype=saved.dtype)
            listed[name] = dcp.TensorStorageMetadata(properties, torch.Size(saved.size), chunks)
        return dcp.Metadata(listed)

    def set_up_storage_reader(
        self, metadata: dcp.Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None: ...

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: Any) -> Future:
        with Files(self.folder) as files:
            for item in plan.items:
                name = item.storage_index.fqn
                if item.type == LoadItemType.BYTE_IO:
                    planner.load_value(item, self.values[name])
                    continue
                saved = self.tensors[name]
                part = saved.parts[item.storage_index.index or 0]
                box = tuple(slice(at, at + of) for at, of in zip(item.storage_offsets, item.lengths, strict=True))
                planner.resolve_tensor(item).detach().copy_(files.read(saved, name, part, box))
        done: Future = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


class Target(DefaultLoadPlanner):
    """Where a state goes; plain values take the place of those that are there."""

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        if missing := sorted(self.state_dict.keys() - self.metadata.state_dict_metadata.keys()):
            raise ValueError(f"the checkpoint holds no {missing[0]}: it is of another model, optimizer or stage")
        groups = {path[0] for path in self.mappings.values() if len(path) > 1}
        return replace(create_default_local_load_plan(self.state_dict, self.metadata), planner_data=groups)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """Refuses to leave a part of "optimizer" behind: one without its moments yet would go on as if it had none."""
        assert self.metadata is not None
        asked = {item.dest_index.fqn for plan in global_plan for item in plan.items}
        groups = tuple(f"{group}." for plan in global_plan for group in plan.planner_data)
        for name, saved in sorted(self.metadata.state_dict_metadata.items()):
            if name.startswith(groups) and name not in asked and prod(getattr(saved, "size", ())) > 0:
                raise ValueError(f"the checkpoint holds {name}, which no rank has a place for: it would be lost")
        return global_plan

    def load_value(self, item: ReadItem, value: Any) -> None:
        name = item.dest_index.fqn
        there = self.state_dict[name]
        if isinstance(there, Tensor):
            raise ValueError(f"{name} is a tensor here and a plain value in the checkpoint")
        set_element(self.original_state_dict, self.mappings[name], tuple(value) if isinstance(there, tuple) else value)
