"""Evaluation sets read as items: the rows and lines that must not be trained on."""

import csv
import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from llamita.data.files import DAMAGE, Piece, listed, opened, printable

FILE_BYTES = 2**28
ITEM_CHARS = 2**20


@dataclass(frozen=True)
class Item:
    """One task of an evaluation set: its strings (question, choices, answer, ...) in the order of the file."""

    set: str
    id: str
    parts: tuple[str, ...]


def read_items(paths: Iterable[str | Path]) -> list[Item]:
    """The rows of `.jsonl .json .csv .tsv` and the lines of `.txt`, plain or compressed, in folders and `.tar`.

    A `.txt` with empty lines is taken by paragraphs. Hidden files and those named README are left out. Files are
    untrusted: at most FILE_BYTES each, ITEM_CHARS an item. Raises ValueError for a file that cannot be read so, since
    an evaluation set passed over would never be missed.
    """
    items: list[Item] = []
    for piece in listed(paths):
        if not piece.name.rpartition("/")[2].upper().startswith("README"):
            items += _items_of(piece)
    if not items:
        raise ValueError("no evaluation items there: name files or folders of .jsonl, .json, .csv, .tsv or .txt")
    return items


def _items_of(piece: Piece) -> Iterator[Item]:
    try:
        with opened(piece, lambda _: None) as stream:
            if piece.kind != ".tar":
                yield from _rows(piece.name.removesuffix(piece.packing), _bounded(stream, piece.name))
                return
            with tarfile.open(fileobj=stream, mode="r|") as archive:
                for member in archive:
                    name = f"{piece.name}/{printable(member.name)}"
                    base = name.rpartition("/")[2]
                    if member.isfile() and not base.startswith(".") and not base.upper().startswith("README"):
                        yield from _rows(name, _bounded(archive.extractfile(member), name))
    except (*DAMAGE, tarfile.TarError) as error:
        raise ValueError(f"{piece.name} cannot be read: {error}") from error


def _bounded(stream: Any, name: str) -> bytes:
    data = stream.read(FILE_BYTES + 1)
    if len(data) > FILE_BYTES:
        raise ValueError(f"{name} is larger than {FILE_BYTES >> 20} MiB: no evaluation set, or one to be cut in files")
    return data


def _rows(name: str, data: bytes) -> Iterator[Item]:
    kind = PurePosixPath(name).suffix.lower()
    try:
        text = data.decode("utf-8-sig")
        match kind:
            case ".jsonl":
                rows: Iterable[Any] = (json.loads(line) for line in text.split("\n") if line.strip())
            case ".json":
                whole = json.loads(text)
                rows = whole if isinstance(whole, list) else whole.values() if isinstance(whole, dict) else [whole]
            case ".csv" | ".tsv":
                rows = csv.reader(io.StringIO(text, newline=""), delimiter="," if kind == ".csv" else "\t")
            case ".txt":
                rows = text.split("\n\n" if "\n\n" in text.strip() else "\n")
            case _:
                raise ValueError("wants .jsonl, .json, .csv, .tsv or .txt")
        for number, row in enumerate(rows, 1):
            yield Item(name, str(number), tuple(_strings(row)))
    except (ValueError, csv.Error, RecursionError) as error:
        raise ValueError(f"{name} is no evaluation set that can be read: {error}") from error


def _strings(row: Any) -> Iterator[str]:
    """Its strings, depth first; links say nothing of an item."""
    left, waiting = ITEM_CHARS, [row]
    while waiting and left > 0:
        value = waiting.pop()
        if isinstance(value, str):
            if "://" not in value or " " in value:
                yield value[:left]
                left -= len(value)
        elif isinstance(value, dict | list):
            waiting += reversed(list(value.values()) if isinstance(value, dict) else value)
