"""The incident log of a run folder: one JSON object a line for each fault, what was done about it, and which samples.

A fault is written by one rank, the one that found it, or rank 0 where all decide alike. A line is appended in one piece
and synced; one that a kill tore is closed by the next writer and left out by readers.
"""

import json
import os
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

FILE = "incidents.jsonl"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


@dataclass(frozen=True, kw_only=True)
class Incident:
    """One fault of a run."""

    step: int
    """Optimizer steps done when it was found."""
    kind: str
    """"nan", "spike", "hang", "straggler", "corruption", "checkpoint", "disk", "stop" ..."""
    rank: int | None = None
    """The rank at fault; None where it is no single one's."""
    message: str
    """What was seen, in one line."""
    action: str
    """What was done about it, in one line."""
    first_sample: int | None = None
    """Index in the order of samples of the first one concerned."""
    num_samples: int = 0
    documents: tuple[str, ...] = ()
    """Names of the documents of those samples, where the caller knows them."""
    time: str = field(default_factory=_now)
    """UTC, ISO 8601."""


def append(folder: Path, incident: Incident) -> None:
    """Add a line to the log in `folder` and wait until the disk has it."""
    line = json.dumps(asdict(incident)).encode() + b"\n"
    with (folder / FILE).open("a+b", buffering=0) as file:
        if file.seek(0, os.SEEK_END) and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
            line = b"\n" + line
        file.write(line)
        os.fsync(file.fileno())


def read(folder: Path) -> list[Incident]:
    """Every whole line of the log, oldest first; none where no fault was ever found."""
    path = folder / FILE
    found = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:  # torn by a kill
            continue
        found.append(Incident(**row | {"documents": tuple(row["documents"])}))
    return found
