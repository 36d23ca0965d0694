"""Tasks over files. Each task leaves a marker when its work is whole, so that what was killed goes on with the rest.

A stage is some tasks that do not depend on one another. A task reads and writes files of the work folder and gives
facts, which become its marker; who runs it, where and in what order changes nothing.
"""

import atexit
import gc
import importlib.util
import json
import multiprocessing
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from llamita.log import Eta

Facts = dict[str, Any]
Tick = Callable[[Facts], None]
POLL_SECONDS = 0.5
ANSWER_SECONDS = 10.0  # in which a Ray cluster must answer


class Stopped(ValueError):
    """Not the input's fault: what is done stays, and the same command goes on from it."""


class Job(Protocol):
    """What every task is told; it must survive pickling."""

    @property
    def folder(self) -> Path:
        """The work folder."""


@dataclass(frozen=True)
class Stage:
    """`count(job)` tasks, `run(job, number, tick)` each; `tick` may be told the facts so far at any time. Both are
    functions of a module, so that a stage can be sent to any worker."""

    name: str
    count: Callable[[Any], int]
    run: Callable[[Any, int, Tick], Facts]

    def marker(self, folder: Path, number: int) -> Path:
        return folder / self.name / f"{number:06d}.json"

    def open_tasks(self, job: Job) -> list[int]:
        return [number for number in range(self.count(job)) if not self.marker(job.folder, number).exists()]

    def facts(self, job: Job) -> Iterator[Facts]:
        """What each task of a finished stage found, in order."""
        for number in range(self.count(job)):
            yield json.loads(self.marker(job.folder, number).read_bytes())


class Executor(Protocol):
    def run(self, stage: Stage, job: Job, numbers: Sequence[int]) -> None: ...


def one(job: Job) -> int:
    """Of a stage that decides for all."""
    return 1


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(json.dumps(value))
    os.replace(aside, path)


def perform(stage: Stage, job: Job, number: int) -> None:
    """One task, in this process."""
    marker = stage.marker(job.folder, number)
    marker.parent.mkdir(parents=True, exist_ok=True)
    began, said = time.process_time(), time.monotonic()

    def tick(facts: Facts) -> None:
        nonlocal said
        if time.monotonic() - said > POLL_SECONDS:
            write_json(marker.with_suffix(".tick"), facts)
            said = time.monotonic()

    facts = stage.run(job, number, tick)
    write_json(marker, facts | {"cpu_seconds": time.process_time() - began})
    marker.with_suffix(".tick").unlink(missing_ok=True)


class Here:
    """One task after another in this process."""

    def run(self, stage: Stage, job: Job, numbers: Sequence[int]) -> None:
        for number in numbers:
            perform(stage, job, number)


class Processes:
    """Tasks in worker processes that live as long as this object."""

    def __init__(self, num_workers: int):
        context = multiprocessing.get_context("spawn")  # a fork would carry over the threads of pyarrow, half of them
        self.pool = ProcessPoolExecutor(num_workers, mp_context=context, initializer=_begin)

    def run(self, stage: Stage, job: Job, numbers: Sequence[int]) -> None:
        futures = [self.pool.submit(perform, stage, job, number) for number in numbers]
        done, waiting = wait(futures, return_when=FIRST_EXCEPTION)
        for future in waiting:
            future.cancel()
        try:
            for future in done:
                future.result()
        except BrokenProcessPool:
            raise Stopped(
                f"a worker died in stage {stage.name!r}, of too little memory it may be; "
                "the same command goes on from what is done, with --workers 1 in less memory"
            ) from None

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)


def settle() -> None:
    """For a process that does nothing but tasks: 0.6 s less a process, and 50 MB.

    Numba loads with its first kernel what other packages extend it by; awkward, which comes with gigatoken, is large,
    and no kernel here reads its arrays. Tasks make lists of strings, among which there are no cycles to be sought, and
    a process that ends need not take all its modules apart.
    """
    entrypoints: Any = importlib.import_module("numba.core.entrypoints")
    entrypoints._already_initialized = True
    gc.set_threshold(100_000)
    atexit.register(gc.freeze)


def _begin() -> None:
    settle()
    _end_with_parent()


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for tasks for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()


class OnRay:
    """The same tasks on a Ray cluster, whose nodes see the work folder at the same path. Wants the extra `ray`."""

    def __init__(self, address: str = ""):
        self.ray = importlib.import_module("ray")
        try:
            self.ray.init(address=address or None, ignore_reinit_error=True, include_dashboard=False)
        except (ConnectionError, RuntimeError) as error:
            raise Stopped(f"Ray does not start at {address or 'this machine'}: {_told(error)}") from None

    def run(self, stage: Stage, job: Job, numbers: Sequence[int]) -> None:
        remote, errors = self.ray.remote(perform), importlib.import_module("ray.exceptions")
        try:
            self.ray.get([remote.remote(stage, job, number) for number in numbers])
        except errors.RayTaskError as error:
            raise error.cause from None  # what the task itself raised, without Ray's account of it
        except errors.RayError as error:
            raise Stopped(
                f"Ray lost a worker in stage {stage.name!r} ({type(error).__name__}: {_told(error)}); "
                "the same command goes on from what is done"
            ) from None

    def close(self) -> None:
        self.ray.shutdown()


def check_ray(address: str) -> None:
    """Raises ValueError where Ray is not installed, or nobody answers at HOST:PORT within ANSWER_SECONDS.

    Ray itself would try for minutes.
    """
    if importlib.util.find_spec("ray") is None:
        raise ValueError("tasks on Ray want it to be installed: pip install 'llamita[ray]'")
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ValueError(f"no Ray cluster answers at {address}: {_told(error)}; start one, or name another") from None


def _told(error: Exception) -> str:
    """The first line that an error says."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextmanager
def executor(num_workers: int, ray_address: str | None = None) -> Iterator[Executor]:
    """Processes of this machine, or a Ray cluster ("" starts one here)."""
    if ray_address is None and num_workers == 1:
        yield Here()
        return
    chosen = Processes(num_workers) if ray_address is None else OnRay(ray_address)
    try:
        yield chosen
    finally:
        chosen.close()


def run(stages: Sequence[Stage], job: Job, on: Executor, describe: Callable[[Stage, list[Facts]], str]) -> None:
    """All stages in order, each as far as it is not yet done; `describe` turns the facts so far into a line."""
    for stage in stages:
        numbers = stage.open_tasks(job)
        if not numbers:
            continue
        with _watched(stage, job, describe):
            on.run(stage, job, numbers)


@contextmanager
def _watched(stage: Stage, job: Job, describe: Callable[[Stage, list[Facts]], str]) -> Iterator[None]:
    """Progress on the console while tasks run somewhere: read from their markers and ticks."""
    total, eta, ended = stage.count(job), Eta(), threading.Event()
    known: dict[str, Facts] = {}

    def look() -> None:
        while not ended.wait(POLL_SECONDS):
            ticks = []
            for path in sorted((job.folder / stage.name).glob("*")):
                if path.suffix == ".json" and path.name not in known:
                    known[path.name] = _read(path)
                elif path.suffix == ".tick" and path.with_suffix(".json").name not in known:
                    ticks.append(_read(path))
            share = len(known) / total + sum(facts.get("share", 0.0) for facts in ticks) / total
            eta.update(
                min(share, 1.0), f"{stage.name}: {len(known)}/{total}  {describe(stage, [*known.values(), *ticks])}"
            )

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        eta.end()


def _read(path: Path) -> Facts:
    """A tick may vanish between being seen and being read, as its task ends."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
