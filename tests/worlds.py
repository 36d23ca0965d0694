"""Worlds of real processes over gloo, as torchrun would start them, each running one function of a test's module.

Every process costs about 3 s of imports: start one world a file and world size, and let its function make many checks.
"""

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from llamita.parallel import mesh

GRACE = 20  # seconds that ranks have to notice by themselves that another has failed


@dataclass
class Outcome:
    """How one rank ended: with a value, with an error's traceback, or with neither (killed, exited, or out of time)."""

    value: Any = field(default=None, repr=False)
    error: str = field(default="", repr=False)
    exit_code: int | None = None
    timed_out: bool = False


def outcomes(
    function: Callable,
    size: int,
    *args: Any,
    seconds: float = 120,
    group: bool = True,
    env: dict[str, str] | None = None,
) -> list[Outcome]:
    """Run `function(rank, *args)` in `size` spawned processes and tell how each ended; what hangs is killed, and so, as
    torchrun does, is what outlives a rank that failed.

    `function` stands at the top of a module; arguments and values are pickled. With `group` the process group (gloo)
    runs already; else only torchrun's variables are set. `env` is set before the group starts.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        ranks = []
        for rank in range(size):
            variables = _torchrun(rank, size, store.port) | (env or {})
            ranks.append(spawn.Process(target=_rank, args=(function, rank, args, variables, group, Path(folder))))
        for process in ranks:
            process.start()
        deadline, bereft = time.monotonic() + seconds, False
        while any(process.is_alive() for process in ranks) and time.monotonic() < deadline:
            if not bereft and any(process.exitcode for process in ranks):
                deadline, bereft = min(deadline, time.monotonic() + GRACE), True
            time.sleep(0.02)
        found = []
        for rank, process in enumerate(ranks):
            timed_out = process.is_alive() and not bereft
            if process.is_alive():
                process.kill()
            process.join()
            kept = Path(folder) / str(rank)
            value, error = pickle.loads(kept.read_bytes()) if kept.exists() else (None, "")
            found.append(Outcome(value, error, process.exitcode, timed_out))
        return found


def run(function: Callable, size: int, *args: Any, seconds: float = 120, group: bool = True) -> list[Any]:
    """The value of `function(rank, *args)` on every rank. Raises AssertionError, with the traceback, if one failed."""
    ended = outcomes(function, size, *args, seconds=seconds, group=group)
    failed = [f"rank {rank}: {outcome}\n{outcome.error}" for rank, outcome in enumerate(ended) if not _well(outcome)]
    assert not failed, "\n".join(failed)
    return [outcome.value for outcome in ended]


def _well(outcome: Outcome) -> bool:
    return not outcome.error and outcome.exit_code == 0


def _torchrun(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun tells each of its processes; the store lives with the parent, so that any rank may die."""
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True",
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip


def _rank(function: Callable, rank: int, args: tuple, env: dict[str, str], group: bool, folder: Path) -> None:
    os.environ.update(env)
    torch.set_num_threads(1)
    value, error = None, ""
    try:
        if group:
            dist.init_process_group("gloo")
        value = function(rank, *args)
    except BaseException:
        error = traceback.format_exc()
    aside = folder / f"{rank}.part"
    aside.write_bytes(pickle.dumps((value, error)))
    aside.rename(folder / str(rank))
    if error:
        os._exit(1)  # at once, so that ranks which wait for this one fail instead of hanging
    mesh.leave()
