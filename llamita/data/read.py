"""Documents out of files: text and code, rows of JSON and Parquet, web pages and archives, plain or compressed.

Files are untrusted: they are streamed, what cannot be read is counted by reason and passed over, and no document is
larger than MAX_BYTES, however small it was packed.
"""

import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import count
from pathlib import Path
from typing import BinaryIO

from llamita.data.document import MAX_BYTES, Document, Mode, decoded, of_html
from llamita.data.engine import Stopped
from llamita.data.files import ARCHIVES, DAMAGE, PART_BYTES, Part, Piece, Skipped, Told, first_line, opened, plan_parts
from llamita.data.rows import json_file, json_rows, parquet_rows
from llamita.data.warc import arc_pages, warc_pages

__all__ = ["PART_BYTES", "Document", "Part", "Reader", "Skipped", "documents", "plan_parts", "read_part"]

TEXT_BYTES = 16 * 2**20
SNIFFED_BYTES = 2**16


def documents(paths: Iterable[str | Path]) -> "Reader":
    """The documents of files, folders and remote stores, in the same order whenever the files are the same.

    Folders are walked by name without hidden entries. `.jsonl`, `.json` and `.parquet` give one document a row,
    `.warc` one a page, `.html` its main text. Any other file of UTF-8 is one document, or several where it is larger
    than TEXT_BYTES. The source is the name of the path given here unless a row has its own. What is left out is
    counted in `.skipped`, with `.examples`. Raises ValueError: a missing path, or no text in all of them.
    """
    return Reader(paths)


def read_part(part: Part, skipped: Skipped, *, extract: Mode = "fast") -> Iterator[Document]:
    """The documents of one part; what is left out is added to `skipped`. `extract` = how web pages are (main_text)."""
    for piece in part.pieces:
        yield from read_piece(piece, skipped, extract)


class Reader(Iterator[Document]):
    """Yields the documents of all parts once; `skipped` counts by reason what has been left out so far."""

    def __init__(self, paths: Iterable[str | Path]):
        self._paths = list(paths)
        self._pieces = [piece for part in plan_parts(self._paths) for piece in part.pieces]
        self._num_bytes = sum(piece.end - piece.start for piece in self._pieces)
        self._left_out = Skipped()
        self._bytes_read, self._began = 0, 0
        self._raw: BinaryIO | None = None
        self._documents = self._all()

    @property
    def skipped(self) -> Counter[str]:
        return self._left_out.counts

    @property
    def examples(self) -> dict[str, list[str]]:
        """Up to five of what was left out, by reason."""
        return self._left_out.examples

    def __next__(self) -> Document:
        return next(self._documents)

    @property
    def share_read(self) -> float:
        """How much of the files' bytes, as they lie on disk, has been read: 0 to 1."""
        now = self._raw.tell() - self._began if self._raw and not self._raw.closed else 0
        return min((self._bytes_read + now) / (self._num_bytes or 1), 1.0)

    def _opened(self, raw: BinaryIO) -> None:
        self._raw = raw

    def _all(self) -> Iterator[Document]:
        found = False
        for piece in self._pieces:
            self._began = piece.start
            for document in read_piece(piece, self._left_out, "fast", self._opened):
                found = True
                yield document
            self._bytes_read += piece.end - piece.start
        if not found:
            paths, reasons = ", ".join(map(str, self._paths)), str(self._left_out) or "no file"
            raise ValueError(f"{paths} holds no text: {reasons}; give UTF-8, .jsonl, .json, .parquet or .warc")


def read_piece(piece: Piece, skipped: Skipped, extract: Mode, told: Told = lambda raw: None) -> Iterator[Document]:
    """The documents of a piece; a whole file that gives none is counted once, whatever it holds."""
    if "://" not in piece.path and not is_there(piece, skipped):
        return
    before, found = skipped.counts.total(), False
    try:
        with opened(piece, told) as stream:
            for document in READERS.get(piece.kind, text_documents)(stream, piece, skipped, extract):
                found = True
                yield document
    except DAMAGE as error:
        skipped.add("damaged or unreadable", f"{piece.name}: {first_line(error)}")
    if not found and skipped.counts.total() == before and piece.end - piece.start == piece.size:
        skipped.add("empty", piece.name)


def is_there(piece: Piece, skipped: Skipped) -> bool:
    """Whether a piece is of a file; what is none has been counted. Raises Stopped where there is nothing any more."""
    try:
        mode = os.stat(piece.path).st_mode
    except PermissionError:
        skipped.add("without permission to read", piece.name)
        return False
    except OSError as error:
        if not os.path.islink(piece.path):
            raise Stopped(f"{piece.path} was there when the build was planned: bring it back, and go on") from error
        mode = 0
    if stat.S_ISDIR(mode):  # only one that could not be listed stands in a plan
        skipped.add("without permission to read", piece.name)
    elif not stat.S_ISREG(mode):
        skipped.add("not a file", piece.name)
    return stat.S_ISREG(mode)


def text_documents(stream: BinaryIO, piece: Piece, skipped: Skipped, extract: Mode) -> Iterator[Document]:
    """A file of text as one document, or cut at ends of lines into `NAME:0`, `NAME:1` of at most TEXT_BYTES."""
    data = stream.read(SNIFFED_BYTES)
    is_cut = False
    for number in count():
        if b"\0" not in data:  # zeros that were packed small are not unpacked to the end
            data += stream.read(TEXT_BYTES + 1 - len(data))
        is_cut |= len(data) > TEXT_BYTES
        size = end_of_line(data) if len(data) > TEXT_BYTES else len(data)
        name = f"{piece.name}:{number}" if is_cut else piece.name
        text, reason = decoded(data[:size])
        if reason:
            skipped.add(reason, name)
        else:
            yield Document(text, name, piece.source)
        data = data[size:]
        if not data or reason not in ("", "empty"):
            return


def end_of_line(data: bytes) -> int:
    """Where a text of more than TEXT_BYTES is cut: after its last line, or at least between two characters."""
    size = data.rfind(b"\n", 0, TEXT_BYTES) + 1 or TEXT_BYTES
    while size > 1 and data[size] & 0xC0 == 0x80:
        size -= 1
    return size


def html_page(stream: BinaryIO, piece: Piece, skipped: Skipped, extract: Mode) -> Iterator[Document]:
    data = stream.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        skipped.add(f"longer than {MAX_BYTES:,} bytes", piece.name)
        return
    text = of_html(data, "", piece.name, skipped, extract)
    if text is not None:
        yield Document(text, piece.name, piece.source)


READERS = {
    **dict.fromkeys((".jsonl", ".ndjson"), json_rows),
    ".json": json_file,
    ".parquet": parquet_rows,
    **dict.fromkeys((".html", ".htm", ".xhtml"), html_page),
    **dict.fromkeys(ARCHIVES, warc_pages),
    ".arc": arc_pages,
}
