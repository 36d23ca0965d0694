"""Metrics as JSON lines, and one line of progress for people."""

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console

console = Console(stderr=True, highlight=False, soft_wrap=True)


class Metrics:
    """Appends one JSON object a line to `metrics.jsonl`; each line is flushed, so that a kill loses at most one.

    Without a path lines are dropped: of the ranks of a run, one writes."""

    def __init__(self, path: Path | None, stage: str):
        self.stage = stage
        self.file = (path or Path(os.devnull)).open("a+b")
        if path is None:
            return
        if self.file.tell() and (self.file.seek(-1, os.SEEK_END), self.file.read(1))[1] != b"\n":
            self.file.write(b"\n")  # a kill tore the last line: close it, so that readers drop it alone

    def write(self, kind: str, **values: Any) -> None:
        row = {"kind": kind, "stage": self.stage} | values
        try:
            self.file.write(json.dumps({key: _finite(value) for key, value in row.items()}).encode() + b"\n")
            self.file.flush()
        except OSError as error:  # a full disk: no reason to end a run
            say(f"a line of metrics could not be written: {error.strerror}")

    def close(self) -> None:
        self.file.close()


def _finite(value: Any) -> Any:
    """JSON has no NaN: a float that is none is written as null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read(path: Path) -> list[dict[str, Any]]:
    """Every whole line of a metrics file; a line torn by a kill is left out."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def duration(seconds: float) -> str:
    """12s, 3m05s, 2h10m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    return f"{whole // 60}m{whole % 60:02d}s" if whole < 3600 else f"{whole // 3600}h{whole % 3600 // 60:02d}m"


class Progress:
    """One line that is rewritten in place on a terminal; elsewhere one plain line every `interval` updates."""

    def __init__(self, interval: int):
        self.interval = interval
        self.live = sys.stderr.isatty()

    def update(self, count: int, line: str, *, last: bool = False) -> None:
        if self.live:
            console.print(line, end="\n" if last else "\r", crop=True, overflow="crop", no_wrap=True, markup=False)
        elif last or count % self.interval == 0:
            console.print(line, markup=False)


class Eta:
    """One line of progress with the time that is left: five a second on a terminal, elsewhere one in five seconds."""

    def __init__(self) -> None:
        self.line = Progress(interval=1)
        self.begun = self.said = time.monotonic()
        self.is_open = False

    def update(self, share: float, line: str) -> None:
        """`share` of the work is done, 0 to 1; 0 where it cannot be told."""
        now = time.monotonic()
        if now - self.said > (0.2 if self.line.live else 5.0):
            left = f"  {duration((now - self.begun) * (1 - share) / share)} left" if share else ""
            self.line.update(0, line + left)
            self.said, self.is_open = now, self.line.live

    def end(self) -> None:
        """Leave the line, if one stands on the terminal."""
        if self.is_open:
            console.print()
            self.is_open = False


def say(line: str) -> None:
    """Tell the person at the console something, without markup."""
    console.print(line, markup=False)
