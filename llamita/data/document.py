"""A document, and what is made of a row or a web page to become one."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date
from itertools import islice
from typing import Any, Literal

from llamita.data.files import Skipped, extra, printable

MAX_BYTES = 64 * 2**20
MAX_LABEL = 2048  # characters of an address or a name that a row brings
Mode = Literal["fast", "precise", "union"]
# What a row may say of its text, at its top or under `metadata` or `meta`: C4, Dolma, FineWeb, RedPajama, datatrove.
COLUMNS = {
    "id": "name", "source": "source", "url": "url", "license": "license", "lang": "lang", "language": "lang",
    "date": "date", "timestamp": "date", "created": "date", "kind": "kind",
}  # fmt: skip
NESTED = ("metadata", "meta")


@dataclass(frozen=True)
class Document:
    """One text and where it comes from; "" is what is not known."""

    text: str
    name: str
    """Unique and stable: the file below the folder that was named, and the place in it, or the row's own `id`."""
    source: str
    """What mixing weights call its origin: the folder or file that was named, or what the row says."""
    lang: str = ""
    url: str = ""
    license: str = ""
    date: str = ""
    kind: str = ""
    """One of `kind.KINDS`, if the input says it; anything else counts for nothing."""


def fault(text: str) -> str:
    """Why a text cannot be trained on, or ""."""
    if not text or text.isspace():
        return "empty"
    if "\0" in text:
        return "with NUL bytes"
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            return "not UTF-8"
    return ""


def decoded(data: bytes) -> tuple[str, str]:
    """(text, "") or ("", why it cannot be trained on)."""
    if b"\0" in data:
        return "", "with NUL bytes"
    try:
        text = data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError:
        return "", "not UTF-8"
    return text, fault(text)


def of_row(row: Any, name: str, source: str, skipped: Skipped, mode: Mode) -> Document | None:
    """A row of JSON or Parquet: `text`, or `html` that is extracted, and COLUMNS. None where it has been counted."""
    if not isinstance(row, dict):
        skipped.add("rows that are no object", name)
        return None
    text = row.get("text")
    if text is None and isinstance(row.get("html"), str):
        text = of_html(row["html"].encode(errors="replace"), "utf-8", name, skipped, mode)
        if text is None:
            return None
    elif text is None and "text" not in row:
        skipped.add("rows without `text`", f"{name}: {columns_of(row)}")
        return None
    elif not isinstance(text, str | None):
        skipped.add("rows whose `text` is no string", name)
        return None
    text = (text or "").removeprefix("\ufeff")
    reason = fault(text) if len(text) <= MAX_BYTES else f"longer than {MAX_BYTES:,} bytes"
    if reason:
        skipped.add(reason, name)
        return None
    return Document(text, **({"name": name, "source": source} | labels(row)))


def columns_of(names: Iterable[str]) -> str:
    return f"its columns are {', '.join(repr(name[:40]) for name in islice(names, 20))}"


def labels(row: Mapping[str, Any]) -> dict[str, str]:
    """What a row says of its text, by field of Document."""
    found: dict[str, str] = {}
    for level in (row, *map(row.get, NESTED)):
        if isinstance(level, dict):
            for column, value in level.items():
                field = COLUMNS.get(column)
                if field and field not in found and (label := _label(value, field)):
                    found[field] = label
    return found


def _label(value: Any, field: str) -> str:
    if isinstance(value, str):
        return printable(value[:MAX_LABEL])
    return str(value) if isinstance(value, int | date) and field in ("name", "date") else ""


def of_html(html: bytes, charset: str, name: str, skipped: Skipped, mode: Mode) -> str | None:
    """The main text of a page; None where that has been counted."""
    extra("resiliparse", name)
    from llamita.data.extract import main_text

    try:
        text = main_text(html, charset=charset, mode=mode)
    except ValueError as error:
        if isinstance(error.__cause__, ImportError):
            raise
        skipped.add(f"web pages: {error}", name)
        return None
    reason = fault(text)
    if reason:
        skipped.add(f"web pages: {reason}", name)
        return None
    return text
