"""A checkpoint's weights without the ranks that wrote them: whole tensors for export, and the mean of checkpoints."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from llamita.checkpoint import shards
from llamita.checkpoint.shards import Files, Part, Saved
from llamita.checkpoint.store import MANIFEST, publish

MODEL = "model."  # state["model"] holds the weights under their names
FILE = "rank_00000.safetensors"


class Weights(Mapping[str, Tensor]):
    """Name -> whole tensor on the CPU, put together from the ranks' files when it is asked for, and not kept.

    `dict(weights)` is a plain state dict. Raises ValueError for a folder or file that is damaged.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        tensors, _ = shards.read_index(folder)
        self.saved = {name.removeprefix(MODEL): it for name, it in tensors.items() if name.startswith(MODEL)}

    def __getitem__(self, name: str) -> Tensor:
        saved = self.saved[name]
        with Files(self.folder) as files:
            found = [files.read(saved, MODEL + name, part, tuple(map(slice, part.sizes))) for part in saved.parts]
        whole = torch.zeros(saved.size, dtype=saved.dtype)  # the parts' sizes are proven by now
        for part, tensor in zip(saved.parts, found, strict=True):
            whole[tuple(slice(at, at + of) for at, of in zip(part.offsets, part.sizes, strict=True))] = tensor
        return whole

    def __iter__(self) -> Iterator[str]:
        return iter(self.saved)

    def __len__(self) -> int:
        return len(self.saved)


def weights(folder: Path) -> Weights:
    """The weights of a checkpoint that any number of ranks wrote, in the memory of one tensor (twice)."""
    return Weights(folder)


def average(folders: Sequence[Path], out: Path) -> Path:
    """Write the mean of the weights of several checkpoints as the checkpoint folder `out`, with the last one's files.

    Averages along one run (SWA, arXiv 1803.05407; LAWA, arXiv 2306.03241) score better than their members while the
    rate is high. Sums are in fp32, or fp64 where the weights are, one tensor at a time. `out` holds no optimizer: it
    can be read and exported, not trained on. Raises ValueError where the checkpoints are not of one model, or `out`
    exists.
    """
    if out.exists():
        raise ValueError(f"{out} exists already: name another place for the average")
    members = [Weights(folder) for folder in folders]
    if not members:
        raise ValueError("an average needs at least one checkpoint")
    alike = [{name: (it.size, it.dtype) for name, it in member.saved.items()} for member in members]
    for folder, listed in zip(folders, alike, strict=True):
        if listed != alike[0] or not listed:
            raise ValueError(
                f"{folder} does not hold the weights that {folders[0]} holds: average one run's checkpoints"
            )
    aside = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        pieces = [
            (MODEL + name, replace(it, parts=(Part(FILE, (0,) * len(it.size), it.size),)))
            for name, it in sorted(members[0].saved.items(), key=lambda item: -item[1].dtype.itemsize)
        ]
        names = [name.removeprefix(MODEL) for name, _ in pieces]
        described = shards.write(aside / FILE, pieces, lambda number: _mean(members, names[number]))
        shards.write_index(aside, (dict(pieces), {}))
        for path in folders[-1].iterdir():
            if path.suffix != ".safetensors" and path.name not in (shards.INDEX, MANIFEST):
                shutil.copyfile(path, aside / path.name)
        publish(aside, out, {FILE: described})
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return out


def _mean(members: Sequence[Weights], name: str) -> Tensor:
    saved: Saved = members[0].saved[name]
    total = torch.zeros(saved.size, dtype=torch.promote_types(saved.dtype, torch.float32))
    for member in members:
        total += member[name]
    return (total / len(members)).to(saved.dtype)
