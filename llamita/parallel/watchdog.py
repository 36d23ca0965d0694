"""Hangs that end in a report instead of a silence: a thread in each rank, and what the ranks know of each other.

The loop calls `beat` at each phase. When no beat comes for `seconds`, the rank raises the alarm in the process group's
store; every rank then writes down the Python stacks of its threads and the collectives it has entered (PyTorch's flight
recorder, on where TORCH_FR_BUFFER_SIZE is set before the group starts, as `llamita launch` does). The first one
compares them: who waits for which collective, and who has not entered it. All then leave with `HUNG`, so that torchrun
starts the world again from the newest checkpoint.

Under all this lies a timer in C (faulthandler): it also ends a process whose interpreter is itself stuck.
"""

import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store, _resolve_process_group

HUNG = 75
"""Exit status of a hang: EX_TEMPFAIL of sysexits.h, "try again". torchrun restarts the world on any but 0."""

STOPPED = 143
"""Exit status after SIGTERM and a checkpoint: 128 + 15, what a shell reports of a process that the signal ended.

Not 0: a Kubernetes Job or a Slurm dependency (afterok) would take the unfinished run for a finished one.
"""

SHOWN = 8  # ranks named in a message; the files have all


class Stop:
    """Set by SIGTERM, the warning of a scheduler (Slurm, Kubernetes, torchrun) that the process is to end soon.

    The loop adds `int(stop.asked)` up over all ranks with the loss of each step; when any is set all save a checkpoint
    and leave with `STOPPED`. torchrun gives its workers 30 s, Kubernetes 30 s and Slurm 30 s (KillWait) unless told
    otherwise, as `llamita launch` does. Listens within its `with` block; only a main thread hears signals (Ray runs
    training in another).
    """

    def __init__(self) -> None:
        self.asked = False
        self.hears = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> "Stop":
        if self.hears:
            self.before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *failure: object) -> None:
        if self.hears:
            signal.signal(signal.SIGTERM, self.before)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True


class Watchdog:
    """Watches the rank it runs in, from entering the `with` block to leaving it. The process group must run already."""

    def __init__(self, folder: Path, report: Callable[[str, list[int]], None], *, seconds: float):
        """`folder` takes incidents/rank_R.json when there is a hang, and nothing else.

        `report` is called in one rank, from the watchdog's thread, with what happened in one line and the ranks at
        fault. `seconds` without a beat are a hang: several times the longest step.
        """
        self.folder, self.report, self.seconds = folder / "incidents", report, seconds
        self.tick = seconds / 8
        self.rank, self.world, self.store = 0, 1, None
        if dist.is_initialized():
            self.rank, self.world = dist.get_rank(), dist.get_world_size()
            shared: Any = _get_default_store()
            # A connection of its own: the main thread may block the other one.
            self.store = dist.PrefixStore("watchdog", shared.clone())
        self.phase, self.limit, self.last = "start", seconds, time.monotonic()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self.thread.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self.done.set()
        self.thread.join()
        faulthandler.cancel_dump_traceback_later()

    def beat(self, phase: str, seconds: float | None = None) -> None:
        """A sign of life at the start of `phase` ("step 12: forward"), which may take `seconds` (else the usual)."""
        self.phase, self.limit, self.last = phase, seconds or self.seconds, time.monotonic()

    def _watch(self) -> None:
        while not self.done.wait(self.tick):
            silent = time.monotonic() - self.last
            faulthandler.dump_traceback_later(2 * self.limit, exit=True, file=2)
            if silent > self.limit or self._tell():
                self._bark(silent)

    def _tell(self) -> bool:
        """Leave a heartbeat for the others; whether one of them has raised the alarm."""
        if self.store is None:
            return False
        try:
            self.store.set(f"beat/{self.rank}", json.dumps({"host": socket.gethostname(), "phase": self.phase}))
            return self.store.check(["alarm"])
        except dist.DistError:  # the machine of the store is gone or slow: the own clock goes on
            return False

    def _bark(self, silent: float) -> None:
        """Write down what this rank knows, let one rank say what it means, and end the process."""
        try:
            self._explain(silent)
        except Exception:  # a full disk among them: the process must end whatever fails here
            traceback.print_exc()
        finally:
            os._exit(HUNG)

    def _explain(self, silent: float) -> None:
        mine = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "rank": self.rank,
            "host": socket.gethostname(),
            "phase": self.phase,
            "silent_seconds": round(silent, 1),
            "stacks": _stacks(),
            "collectives": _collectives(),
        }
        known = {key: mine[key] for key in ("host", "phase")} | _progress(mine)
        is_first, lost = True, ""
        try:
            if self.store and self.store.add("alarm", 1) > 1:
                is_first = False
                self.store.set(f"report/{self.rank}", json.dumps(known))
        except dist.DistError as error:
            lost = f"no sign of life for {silent:.0f} s in {self.phase!r}, and the store of the ranks is gone: {error}"
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"rank_{self.rank}.json").write_text(json.dumps(mine, indent=1))
        if lost:
            self.report(lost, [])
        elif self.store is None:
            self.report(*diagnose({self.rank: known}, {}, self.world))
        elif is_first:
            self._compare(self.store, known)
        else:
            self._until(self.store, ["told"], 4 * self.tick)

    def _compare(self, store: dist.Store, mine: dict[str, Any]) -> None:
        others = [rank for rank in range(self.world) if rank != self.rank]
        self._until(store, [f"report/{rank}" for rank in others], 3 * self.tick)
        reports, beats = {self.rank: mine}, {}
        for rank in others:
            if store.check([f"report/{rank}"]):
                reports[rank] = json.loads(store.get(f"report/{rank}"))
            elif store.check([f"beat/{rank}"]):
                beats[rank] = json.loads(store.get(f"beat/{rank}"))
        self.report(*diagnose(reports, beats, self.world))
        store.set("told", "")
        time.sleep(0.5)  # this process may hold the store, and the others are to see that word

    @staticmethod
    def _until(store: dist.Store, keys: list[str], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not store.check(keys) and time.monotonic() < deadline:
            time.sleep(0.05)


def diagnose(reports: dict[int, dict[str, Any]], beats: dict[int, dict[str, str]], world: int) -> tuple[str, list[int]]:
    """What the ranks' reports mean: one line, and the ranks at fault (none when all wait in the same collective).

    A report holds "host", "phase", "waits" (stands inside torch.distributed), "entered" (group -> number of the last
    collective entered) and "pending" ([group, number, operation, ranks of the group], or None). `beats` holds the last
    heartbeats of ranks that do not answer.
    """
    mute = [rank for rank in range(world) if rank not in reports]
    idle = [rank for rank, report in reports.items() if not report["waits"] and report["pending"] is None]
    pending = [report["pending"] for report in reports.values() if report["pending"]]
    late: list[int] = []
    waited_for = ""
    for group, number, operation, ranks in sorted(pending):
        late = [rank for rank in ranks if rank not in reports or reports[rank]["entered"].get(group, 0) < number]
        waited_for = f"{operation} number {number} of group {group}"
        if late:
            break
    # A rank that waits elsewhere is late as well, but no cause: the cause answers to nobody or is busy by itself.
    causes = sorted({*mute, *idle} & {*late} or {*mute, *idle}) or late
    named = "; ".join(_describe(rank, reports, beats) for rank in causes[:SHOWN])
    more = f" and {len(causes) - SHOWN} more" if len(causes) > SHOWN else ""
    if not waited_for:
        return f"no progress: {named or 'every rank waits inside torch.distributed'}{more}", causes
    if not causes:
        return f"all ranks have entered {waited_for} and it does not end: a device or the network hangs", []
    return f"{waited_for} waits for {named}{more}", causes


def _describe(rank: int, reports: dict[int, dict[str, Any]], beats: dict[int, dict[str, str]]) -> str:
    if rank in reports:
        return f"rank {rank} on {reports[rank]['host']}, which is in {reports[rank]['phase']!r}"
    if rank in beats:
        return f"rank {rank} on {beats[rank]['host']}, which does not answer, last seen in {beats[rank]['phase']!r}"
    return f"rank {rank}, which never answered"


def _progress(mine: dict[str, Any]) -> dict[str, Any]:
    """What the others need of a rank's record: a few hundred bytes."""
    entered: dict[str, int] = {}
    pending = None
    for entry in mine["collectives"]:
        if entry["is_p2p"]:
            continue
        group, number = " ".join(entry["process_group"]), entry["collective_seq_id"]
        entered[group] = max(number, entered.get(group, 0))
        if pending is None and not entry["retired"]:
            ranks = dist.get_process_group_ranks(_resolve_process_group(entry["process_group"][0]))
            pending = [group, number, entry["profiling_name"].partition(":")[2], ranks]
    # Sends and receives over gloo are not recorded: a thread that stands inside torch.distributed waits as well.
    waits = any(f"torch{os.sep}distributed{os.sep}" in stack[-1] for stack in mine["stacks"].values())
    return {"entered": entered, "pending": pending, "waits": waits}


def _collectives() -> list[dict[str, Any]]:
    """The flight recorder's newest entries, oldest first; none without a process group."""
    if not dist.is_initialized():
        return []
    c10d: Any = torch._C._distributed_c10d
    dump = c10d._dump_nccl_trace_json if "nccl" in dist.get_backend() else c10d._dump_fr_trace_json
    return json.loads(dump()).get("entries", [])


def _stacks() -> dict[str, list[str]]:
    """The Python stack of every thread but this one, outermost call first."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return {
        f"{names.get(ident, 'thread')} {ident}": [line.rstrip() for line in traceback.format_stack(frame)]
        for ident, frame in sys._current_frames().items()
        if ident != threading.get_ident()
    }
