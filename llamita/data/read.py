"""Documents out of files: text and code, JSON lines, JSON lists and Parquet, each plain or compressed.

Files are untrusted: they are streamed, and one document is at most 1 GiB, however small it was compressed.
"""

import bz2
import gzip
import importlib
import io
import json
import lzma
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_BYTES = 2**30
SNIFFED_BYTES = 2**16
PARQUET_ROWS = 256
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")


@dataclass(frozen=True)
class Document:
    """One text: where it was found, what mixing weights call its origin, and its language ("" = unknown)."""

    text: str
    name: str
    source: str
    lang: str = ""


def documents(paths: Iterable[str | Path]) -> "Reader":
    """The documents of files and folders, in the same order whenever the files are the same.

    Folders are walked by name without hidden entries. `.jsonl`, `.json` (a list) and `.parquet` give one
    document a row: `text`, and if there `lang`, `source`, `id`. Any other file of UTF-8 is one document. The
    source is the name of the path given here unless a row has its own. What is left out is counted in
    `.skipped`. Raises ValueError: a missing path, a path without any text, a malformed row, a damaged file.
    """
    return Reader(paths)


class Reader(Iterator[Document]):
    """Yields the documents once; `skipped` counts by reason what has been left out so far."""

    def __init__(self, paths: Iterable[str | Path]):
        self.skipped: Counter[str] = Counter()
        roots = [Path(path) for path in paths]
        for root in roots:
            if not root.exists():
                raise ValueError(f"no such file or folder: {root}")
        self._sizes = sum(path.stat().st_size for root in roots for path in walk(root, set()) if path.is_file())
        self._sizes_read = 0
        self._raw: io.BufferedReader | None = None
        self._documents = (document for root in roots for document in self._root(root))

    def __next__(self) -> Document:
        return next(self._documents)

    @property
    def share_read(self) -> float:
        """How much of the files' bytes, as they lie on disk, has been read: 0 to 1."""
        now = self._raw.tell() if self._raw and not self._raw.closed else 0
        return (self._sizes_read + now) / (self._sizes or 1)

    def _root(self, root: Path) -> Iterator[Document]:
        before, found = self.skipped.copy(), False
        for path in walk(root, set()):
            name = path.relative_to(root.parent).as_posix()
            for document in self._file(path, name, root.resolve().name):
                reason = fault(document.text)
                if reason:
                    self.skipped[reason] += 1
                else:
                    found = True
                    yield document
        if not found:
            reasons = ", ".join(f"{count} {reason}" for reason, count in (self.skipped - before).items())
            raise ValueError(f"{root} holds no text: {reasons or 'no file'}; give UTF-8, .jsonl, .json or .parquet")

    def _file(self, path: Path, name: str, source: str) -> Iterator[Document]:
        if not path.is_file():
            self.skipped["not a file"] += 1
            return
        packed = path.suffix.lower() in COMPRESSED
        kind = (path.with_suffix("") if packed else path).suffix.lower()
        with opened(path) as (stream, self._raw):
            if kind in (".jsonl", ".ndjson"):
                yield from from_rows(json_lines(stream, path), name, source)
            elif kind == ".json":
                yield from from_rows(self._json_list(stream, path), name, source)
            elif kind == ".parquet":
                seekable = io.BytesIO(bounded(stream, path)) if packed else stream
                yield from from_rows(parquet(seekable, path), name, source)
            else:
                text = self._text(stream, path)
                if text is not None:
                    yield Document(text, name, source)
        self._sizes_read += path.stat().st_size

    def _text(self, stream: io.BufferedIOBase, path: Path) -> str | None:
        head = stream.read(SNIFFED_BYTES)
        if b"\0" in head:
            self.skipped["with NUL bytes"] += 1
            return None
        try:
            return (head + bounded(stream, path)).decode().removeprefix("\ufeff")
        except UnicodeDecodeError:
            self.skipped["not UTF-8"] += 1
            return None

    def _json_list(self, stream: io.BufferedIOBase, path: Path) -> Iterator[dict]:
        rows = parse(bounded(stream, path), str(path))
        if not (isinstance(rows, list) and rows and isinstance(rows[0], dict) and "text" in rows[0]):
            self.skipped["JSON but no list of rows with `text`"] += 1
            return
        for number, row in enumerate(rows, start=1):
            yield checked(row, f"{path}, row {number}")


def fault(text: str) -> str:
    """Why a text cannot be trained on, or ""."""
    if not text or text.isspace():
        return "empty"
    if "\0" in text:
        return "with NUL bytes"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "not UTF-8"
    return ""


def walk(path: Path, seen: set[Path]) -> Iterator[Path]:
    """The files at or below `path` by name; no hidden entries, no folder twice however links lead there."""
    if not path.is_dir():
        yield path
        return
    real = path.resolve()
    if real in seen:
        return
    seen.add(real)
    for entry in sorted(path.iterdir(), key=lambda entry: entry.name):
        if not entry.name.startswith("."):
            yield from walk(entry, seen)


@contextmanager
def opened(path: Path) -> Iterator[tuple[io.BufferedIOBase, io.BufferedReader]]:
    """The file's content, decompressed as it is read, and the file; ValueError where it cannot be read."""
    try:
        with path.open("rb") as raw, decompressed(raw, path) as stream:
            yield stream, raw
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"{path} is damaged or unreadable: {error}") from error


def decompressed(raw: io.BufferedReader, path: Path) -> io.BufferedIOBase:
    match path.suffix.lower():
        case ".gz":
            return gzip.open(raw)
        case ".bz2":
            return bz2.open(raw)
        case ".xz":
            return lzma.open(raw)
        case ".zst":
            # Not zstandard 0.25: it takes a file cut short for a whole one (seen).
            pyarrow = extra("pyarrow", path)
            return io.BufferedReader(pyarrow.input_stream(raw, compression="zstd"))
        case _:
            return raw


def bounded(stream: io.BufferedIOBase, path: Path) -> bytes:
    data = stream.read(MAX_BYTES + 1)
    check_size(len(data), str(path))
    return data


def check_size(num_bytes: int, where: str) -> None:
    if num_bytes > MAX_BYTES:
        raise ValueError(f"{where}: one document of more than {MAX_BYTES:,} bytes; cut it into smaller ones")


def parse(data: bytes, where: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON: {error}") from error


def json_lines(stream: io.BufferedIOBase, path: Path) -> Iterator[dict]:
    number = 0
    while line := stream.readline(MAX_BYTES + 1):
        number += 1
        where = f"{path}:{number}"
        check_size(len(line), where)
        yield checked({"text": ""} if line.isspace() else parse(line, where), where)


def extra(name: str, path: Path) -> Any:
    """A module of the `data` extra. Raises ValueError that says how to get it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"{path} wants pyarrow to be read: pip install 'llamita[data]'") from error


def parquet(stream: io.BufferedIOBase, path: Path) -> Iterator[dict]:
    """The rows of a Parquet file, a few hundred at a time."""
    pyarrow = extra("pyarrow", path)
    pq = extra("pyarrow.parquet", path)
    try:
        file = pq.ParquetFile(stream)
        names = file.schema_arrow.names
        checked(dict.fromkeys(names), str(path))
        columns = [name for name in ("text", "lang", "source", "id") if name in names]
        for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=columns):
            for row in batch.to_pylist():
                yield checked(row, str(path))
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} is damaged or unreadable: {str(error).splitlines()[0]}") from error


def checked(row: Any, where: str) -> dict:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a row must be an object with a column `text`")
    if "text" not in row:
        raise ValueError(f"{where}: no column `text`; the columns are {', '.join(map(repr, list(row)[:20]))}")
    if not isinstance(row["text"], str | None):
        raise ValueError(f"{where}: `text` must be a string")
    check_size(len(row["text"] or ""), where)
    return row


def from_rows(rows: Iterable[dict], name: str, source: str) -> Iterator[Document]:
    for number, row in enumerate(rows, start=1):
        text, named, origin, lang = (row.get(column) for column in ("text", "id", "source", "lang"))
        yield Document(
            (text or "").removeprefix("\ufeff"),
            str(named) if isinstance(named, str | int) else f"{name}:{number}",
            printable(origin) if isinstance(origin, str) else source,
            printable(lang) if isinstance(lang, str) else "",
        )


def printable(name: str) -> str:
    """A name as it may go to a terminal or a file: what does not print (surrogates too) becomes a question mark."""
    return "".join(char if char.isprintable() else "?" for char in name)
