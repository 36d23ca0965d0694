"""Ranks that must come to one answer: what fails on one fails on all, in one line that names it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

Answer = TypeVar("Answer")


def rank(group: dist.ProcessGroup | None) -> int:
    return dist.get_rank(group) if dist.is_initialized() else 0


@dataclass(frozen=True)
class _Fault:
    error: Exception


def everywhere(what: str, work: Callable[[], Answer], group: dist.ProcessGroup | None) -> list[Answer]:
    """What `work` gives on every rank of `group` (None: all), by rank. Without a process group, on this one alone."""
    if not dist.is_initialized():
        return [work()]
    found: list = [None] * dist.get_world_size(group)
    mine: Answer | _Fault
    try:
        mine = work()
    except Exception as error:
        mine = _Fault(error)
    dist.all_gather_object(found, mine, group=group)
    for number, answer in enumerate(found):
        if isinstance(answer, _Fault):
            raise one_fault(what, answer.error, number) from answer.error
    return found


def one_fault(what: str, error: BaseException, number: int | None = None) -> BaseException:
    """`error` as one line that says what failed and on which rank: an OSError stays one, and so does a ValueError.

    Of an error that DCP gathered from several ranks it is the first rank's. An interrupt is given back as it is.
    """
    if isinstance(error, CheckpointException):
        number, (error, _) = min(error.failures.items())
    if not isinstance(error, Exception):
        return error
    where = f"{what} failed" + (f" on rank {number}" if number is not None and dist.is_initialized() else "")
    if isinstance(error, OSError) and error.strerror:
        return OSError(error.errno, f"{where}: {error.strerror}", error.filename)
    said = " ".join(str(error).split()) or type(error).__name__
    return (ValueError if isinstance(error, ValueError) else RuntimeError)(f"{where}: {said}")
