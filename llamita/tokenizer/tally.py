"""The words of a stream of texts, counted by several workers into a folder that a killed count goes on from.

The folder holds runs (`count.Run`) and `journal.json`, which says how many texts they cover. A run that the journal
does not name was written by a count that was killed before it could say so, and is removed.
"""

import fcntl
import hashlib
import json
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

import numpy as np

from llamita.tokenizer.count import MAX_GROUPS, Run, Table, padded
from llamita.tokenizer.vocabulary import well_formed

VERSION = 1
BATCH_BYTES = 4 * 2**20
FIRST_TABLE_BYTES = 16 * 2**20  # twice as large after each run: a small text never pays for pages it does not need
COMMIT_SECONDS = 60.0  # between two commits, and at least a twentieth of the time spent so far
MAX_SHARES = 10_000  # sources and languages whose bytes are told apart; the rest are one

# Between a newline and what is no blank: here a word of Llama 3's split always ends. (0xC2 and 0xE1 to 0xE3 lead the
# blanks beyond ASCII.)
_SEAM = re.compile(rb"\n(?=[^\s\x1c-\x1f\xc2\xe1-\xe3])")


class Text(NamedTuple):
    """A text, and the source and language that its weight goes by."""

    text: str
    source: str = ""
    lang: str = ""


class Batch(NamedTuple):
    """Texts, or pieces of them, as `Table.count` takes them: padded bytes twice, ends and groups."""

    data: np.ndarray
    eights: np.ndarray
    ends: np.ndarray
    groups: np.ndarray


class Tally:
    """Counts in `folder`. ValueError when it holds anything else, or when another process counts there.

    Texts are told apart by those of `sources` and `langs` that they are of, and by no others: `groups` maps (source
    or "", language or "") to a number. `num_texts` and `num_bytes` are what has been counted, `shares` the bytes of
    each source and language.
    """

    def __init__(self, folder: Path, sources: Collection[str] = (), langs: Collection[str] = ()):
        self.folder, self._sources, self._langs = folder, sources, langs
        self.runs: list[Run] = []
        self.groups: dict[tuple[str, str], int] = {}
        self.shares: dict[tuple[str, str], int] = {}
        self.num_texts, self.num_bytes = 0, 0
        self._digest, self._journal = hashlib.blake2b(digest_size=16), self._fresh()
        self._lock, self._submitted, self._finished, self._failed = threading.Lock(), 0, 0, False
        self._after: dict | None = None  # what the journal may say when all that was submitted is counted
        self._claim()
        if (folder / "journal.json").is_file():
            self._open()
        for stray in set(folder.glob("run-*")) - {run.path for run in self.runs}:
            stray.unlink()

    def _fresh(self) -> dict:
        names = [sorted(self._sources), sorted(self._langs)]
        return {"version": VERSION, "names": names, "texts": 0, "digest": "", "runs": []}

    def _claim(self) -> None:
        """Make the folder, or take one that an earlier life has left, for this process alone."""
        mine = self.folder / "lock"
        if self.folder.exists() and not (mine.is_file() or (self.folder.is_dir() and not any(self.folder.iterdir()))):
            raise ValueError(f"{self.folder} is there and holds no counts of llamita's: move it away")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._claimed = mine.open("a")
        try:
            fcntl.flock(self._claimed, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another training is counting into {self.folder}: wait for it or stop it") from None

    def _open(self) -> None:
        try:
            journal = json.loads((self.folder / "journal.json").read_bytes())
            self.runs = [Run(self.folder / Path(name).name, index) for name, index in journal["runs"]]
            same = journal["version"] == VERSION and journal["names"] == self._journal["names"]
            self._journal = {key: journal[key] for key in self._journal}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.folder} is damaged: remove it to count anew ({error})") from None
        if not same:
            raise ValueError(
                f"{self.folder} was counted for weights of other names, or by another llamita: remove it to count anew"
            )

    def __enter__(self) -> "Tally":
        return self

    def __exit__(self, *_: object) -> None:
        self._claimed.close()  # another process may go on from here

    def remove(self) -> None:
        """Remove the counts and their folder, which can hold nothing else."""
        for path in [*self.folder.glob("run-*"), *self.folder.glob("journal.*"), self.folder / "lock"]:
            path.unlink(missing_ok=True)
        self.folder.rmdir()

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
        self._most = int(max_bytes / (workers + 0.25))  # a quarter of a table: a run in the making
        self._tables = [Table.within(min(FIRST_TABLE_BYTES, self._most)) for _ in range(workers)]
        try:
            self._read_past(stream, on_progress)
            with ThreadPoolExecutor(workers) as pool:
                self._count_all(stream, pool, workers, on_progress)
        finally:
            self._commit()
            if not self.num_texts:
                self.remove()

    def _read_past(self, stream: Iterator[Text], on_progress: Callable[[int], None]) -> None:
        """Read what an earlier life has counted, and check that it is the same."""
        for text in islice(stream, self._journal["texts"]):
            self._note(text, well_formed(text.text).encode())
            on_progress(self.num_bytes)
        self._after = self._state()
        if self._after != {key: self._journal[key] for key in self._after}:
            self._failed = True
            raise ValueError(f"{self.folder} holds counts of other text: remove it to count anew")

    def _count_all(
        self, stream: Iterator[Text], pool: ThreadPoolExecutor, workers: int, on_progress: Callable[[int], None]
    ) -> None:
        free: SimpleQueue[int] = SimpleQueue()
        for number in range(workers):
            free.put(number)
        pending: deque[Future] = deque()
        begun = last = time.monotonic()
        for batch, is_whole in self._batches(stream):
            # In this order, so that an interrupt in between leaves a batch that was not counted, and no journal.
            self._submitted, self._after = self._submitted + 1, self._state() if is_whole else None
            pending.append(pool.submit(self._count, batch, free))
            if len(pending) > workers + 1:
                pending.popleft().result()
            on_progress(self.num_bytes)
            if is_whole and time.monotonic() - last > max(COMMIT_SECONDS, (last - begun) / 20):
                while pending:
                    pending.popleft().result()
                self._commit()
                last = time.monotonic()
        while pending:
            pending.popleft().result()

    def _batches(self, stream: Iterator[Text]) -> Iterator[tuple[Batch, bool]]:
        """Batches of about BATCH_BYTES, and whether one ends where a text ends."""
        parts: list[bytes] = []
        groups: list[int] = []
        size = 0
        for text in stream:
            data = well_formed(text.text).encode()
            group = self._note(text, data)
            num_left = len(data)
            for piece in pieces(data):
                parts.append(piece)
                groups.append(group)
                size, num_left = size + len(piece), num_left - len(piece)
                if size >= BATCH_BYTES:
                    yield self._batch(parts, groups), num_left == 0
                    parts, groups, size = [], [], 0
        if parts:
            yield self._batch(parts, groups), True

    def _batch(self, parts: list[bytes], groups: list[int]) -> Batch:
        data, eights = padded(np.frombuffer(b"".join(parts), np.uint8))
        return Batch(data, eights, np.cumsum([len(part) for part in parts]), np.array(groups))

    def _note(self, text: Text, data: bytes) -> int:
        """Take a text into account; its group's number."""
        self._digest.update(len(data).to_bytes(8, "little"))
        self._digest.update(data)
        self.num_texts += 1
        self.num_bytes += len(data)
        names = text.source, text.lang
        if names not in self.shares and len(self.shares) >= MAX_SHARES:
            names = "(others)", ""
        self.shares[names] = self.shares.get(names, 0) + len(data)
        key = (text.source if text.source in self._sources else "", text.lang if text.lang in self._langs else "")
        assert len(self.groups) < MAX_GROUPS
        return self.groups.setdefault(key, len(self.groups))

    def _state(self) -> dict:
        return {"texts": self.num_texts, "digest": self._digest.hexdigest() if self.num_texts else ""}

    def _count(self, batch: Batch, free: "SimpleQueue[int]") -> None:
        number, at = free.get(), (0, 0)
        try:
            while (at := self._tables[number].count(*batch, at))[0] < len(batch.ends):
                table = self._tables[number]
                self._write(table)
                self._tables[number] = Table.within(min(2 * table.num_bytes, self._most))
        except BaseException:
            self._failed = True
            raise
        finally:
            free.put(number)
        with self._lock:
            self._finished += 1

    def _write(self, table: Table) -> None:
        with self._lock:
            self.runs.append(Run.write(self.folder / f"run-{len(self.runs):06d}", table))

    def _commit(self) -> None:
        """Bring what was counted to disk, then say so: only if all of it was counted, and up to the end of a text."""
        if self._failed or self._finished < self._submitted or not self._after:
            return
        self._failed = True  # until the journal stands: a table that was written is empty
        for table in self._tables:
            if len(table):
                self._write(table)
        journal = self._journal | self._after | {"runs": [[run.path.name, run.index] for run in self.runs]}
        aside = self.folder / "journal.half"
        with aside.open("w") as file:
            json.dump(journal, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, self.folder / "journal.json")
        self._failed = False


def pieces(data: bytes) -> Iterator[bytes]:
    """A text in pieces of about BATCH_BYTES, cut only where a word ends: whole if there is no such place."""
    start = 0
    while len(data) - start > 2 * BATCH_BYTES:
        seam = _SEAM.search(data, start + BATCH_BYTES)
        if not seam:
            break
        yield data[start : seam.end()]
        start = seam.end()
    yield data[start:]
