"""Checkpoints that are written while training goes on."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from llamita.checkpoint.store import Commit, Files, Keep


class Writer:
    """Saves as `store.save` does, with only the copy of the state to the host waited for.

    All ranks build it together: its thread needs a process group of its own (gloo), or its messages would mix with
    training's. The host memory of one copy of this rank's state is kept from save to save.
    """

    def __init__(self) -> None:
        self.group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._host: dict[Any, Tensor] = {}
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._under_way: Future[Path] | None = None

    def save(self, root: Path, step: int, state: dict[str, Any], files: Files, *, keep: Keep) -> None:
        """Copy the state and small files and return; the write and the commit follow. Two are never under way: first
        `wait`s for the one before, and raises, on all ranks and without saving, what went wrong with it."""
        self.wait()
        commit = Commit(root, step, state, files, self.group, self._host)
        self._under_way = self._thread.submit(commit.write, keep)

    def wait(self) -> Path | None:
        """Wait for the checkpoint under way, if any; returns its folder, or raises what `store.save` would have."""
        under_way, self._under_way = self._under_way, None
        return under_way.result() if under_way else None
