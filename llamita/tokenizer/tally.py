"""The words of a stream of texts, counted by several workers into a folder that a killed count goes on from.

The folder holds runs (`count.Run`) and `journal.json`, which says how many texts they cover. A run that the journal
does not name was written by a count that was killed before it could say so, and is removed.
"""

import hashlib
import json
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llamita.tokenizer.count import MAX_GROUPS, Run, Table

VERSION = 1
BATCH_BYTES = 4 * 2**20
FIRST_TABLE_BYTES = 16 * 2**20  # twice as large after each run: a small text never pays for pages it does not need
COMMIT_SECONDS = 60.0  # between two commits, and at least a twentieth of the time spent so far


class Text(NamedTuple):
    """A text, and the source and language that its weight goes by."""

    text: str
    source: str = ""
    lang: str = ""


class Batch(NamedTuple):
    """Texts as bytes: `data` (N,) uint8, and (texts,) int64 where each ends and which group it is of."""

    data: np.ndarray
    ends: np.ndarray
    groups: np.ndarray


def utf8(text: str) -> bytes:
    """UTF-8 with what `Tokenizer.encode` makes of surrogates: a pair is its character, a lone one U+FFFD."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


class Tally:
    """Counts in `folder`. ValueError when it was written by another version of llamita.

    `groups` maps (source, language) to [number, bytes]; `num_texts` and `num_bytes` are what has been counted.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.runs: list[Run] = []
        self.groups: dict[tuple[str, str], list[int]] = {}
        self.num_texts, self.num_bytes = 0, 0
        self._digest = hashlib.blake2b(digest_size=16)
        self._journal: dict = {"texts": 0, "digest": ""}
        self._lock, self._finished, self._failed = threading.Lock(), 0, False
        self._covered: dict[int, dict] = {}  # what the journal may say after so many batches
        if (folder / "journal.json").is_file():
            self._journal = json.loads((folder / "journal.json").read_text())
            if self._journal["version"] != VERSION:
                raise ValueError(f"{folder} was counted by another version of llamita: remove it to count anew")
            self.runs = [Run(folder / name, index) for name, index in self._journal["runs"]]
        for stray in set(folder.glob("run-*")) - {run.path for run in self.runs}:
            stray.unlink()

    def add(
        self,
        texts: Iterable[Text],
        *,
        max_bytes: int,
        workers: int,
        on_progress: Callable[[int], None] = lambda num_bytes: None,
    ) -> None:
        """Count `texts`, all of them from the first on: those that the folder has counted are only read.

        Takes about `max_bytes`. What was counted when it is interrupted, or when a text cannot be read, stays in the
        folder. ValueError when the folder has counted other texts.
        """
        stream = iter(texts)
        self._read_past(stream)
        tables: queue.Queue[Table] = queue.Queue()
        for _ in range(workers):
            tables.put(Table.within(FIRST_TABLE_BYTES))
        self._most = int(max_bytes / (workers + 0.25))  # a quarter of a table: a run in the making
        try:
            with ThreadPoolExecutor(workers) as pool:
                self._count_all(stream, pool, tables, workers, on_progress)
        finally:
            self._commit(tables)  # also what was counted before a Ctrl-C or a damaged file: the pool has ended it all

    def _read_past(self, stream: Iterator[Text]) -> None:
        """Read what an earlier life has counted, and check that it is the same."""
        for text, source, lang in islice(stream, self._journal["texts"]):
            self._note(utf8(text), source, lang)
        digest = self._digest.hexdigest() if self.num_texts else ""
        if (self.num_texts, digest) != (self._journal["texts"], self._journal["digest"]):
            raise ValueError(f"{self.folder} holds counts of other text: remove it to count anew")
        self._covered[0] = self._state()

    def _count_all(
        self,
        stream: Iterator[Text],
        pool: ThreadPoolExecutor,
        tables: "queue.Queue[Table]",
        workers: int,
        on_progress: Callable[[int], None],
    ) -> None:
        pending: deque[Future] = deque()
        begun = last = time.monotonic()
        for number, batch in enumerate(self._batches(stream), start=1):
            self._covered[number] = self._state()
            pending.append(pool.submit(self._count, batch, tables))
            if len(pending) > workers + 1:
                pending.popleft().result()
            on_progress(self.num_bytes)
            if time.monotonic() - last > max(COMMIT_SECONDS, (last - begun) / 20):
                while pending:
                    pending.popleft().result()
                self._commit(tables)
                last = time.monotonic()
        while pending:
            pending.popleft().result()

    def _batches(self, stream: Iterator[Text]) -> Iterator[Batch]:
        while True:
            parts, groups, size = [], [], 0
            for text, source, lang in stream:
                data = utf8(text)
                parts.append(data)
                groups.append(self._note(data, source, lang))
                size += len(data)
                if size >= BATCH_BYTES:
                    break
            if not parts:
                return
            ends = np.cumsum([len(data) for data in parts])
            yield Batch(np.frombuffer(b"".join(parts), np.uint8), ends, np.array(groups))

    def _note(self, data: bytes, source: str, lang: str) -> int:
        """Take a text into account; its group's number."""
        self._digest.update(len(data).to_bytes(8, "little") + data)
        self.num_texts += 1
        self.num_bytes += len(data)
        group = self.groups.setdefault((source, lang), [len(self.groups), 0])
        if group[0] == MAX_GROUPS:
            raise ValueError(f"more than {MAX_GROUPS:,} pairs of source and language; give the texts fewer names")
        group[1] += len(data)
        return group[0]

    def _state(self) -> dict:
        return {"texts": self.num_texts, "digest": self._digest.hexdigest() if self.num_texts else ""}

    def _count(self, batch: Batch, tables: "queue.Queue[Table]") -> None:
        table, at = tables.get(), (0, 0)
        try:
            while (at := table.count(*batch, at))[0] < len(batch.ends):
                self._write(table)
                table = Table.within(min(2 * table.num_bytes, self._most))
        except BaseException:
            self._failed = True
            raise
        finally:
            tables.put(table)
        with self._lock:
            self._finished += 1

    def _write(self, table: Table) -> None:
        with self._lock:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"run-{len(self.runs):06d}"
            self.runs.append(Run.write(path, table))

    def _commit(self, tables: "queue.Queue[Table]") -> None:
        """Bring what was counted to disk, then say so; no worker is at work. Says nothing if one has failed."""
        if self._failed or not self.num_texts:
            return
        for table in [tables.get() for _ in range(tables.qsize())]:
            if len(table):
                self._write(table)
            tables.put(table)
        self._covered = {self._finished: self._covered[self._finished]}
        runs = [[run.path.name, run.index] for run in self.runs]
        aside = self.folder / "journal.half"
        aside.write_text(json.dumps({"version": VERSION, **self._covered[self._finished], "runs": runs}))
        os.replace(aside, self.folder / "journal.json")
