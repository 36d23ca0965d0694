"""Web archives as documents: WARC (ISO 28500:2017) and its forerunner ARC, version 1 (Internet Archive, 1996)."""

import re
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

from llamita.data.document import MAX_BYTES, Document, Mode, decoded, of_html
from llamita.data.files import BUFFER_BYTES, Damaged, Piece, Skipped, extra, first_line, printable

HTML = ("text/html", "application/xhtml+xml")
ARC_FIELDS = re.compile(rb"(\S.*) \S+ (\d{14}) (\S+) (\d{1,15})\s*")
HTTP_STATUS = re.compile(rb"HTTP/\S+ (\d+)")
HTTP_TYPE = re.compile(rb"^content-type:\s*([^;\s]+)(?:.*charset=\"?([\w-]+))?", re.IGNORECASE | re.MULTILINE)


def warc_pages(stream: BinaryIO, piece: Piece, skipped: Skipped, mode: Mode) -> Iterator[Document]:
    """The HTML and plain text of responses, resources and conversions (Common Crawl's WET), named by their number."""
    warc = extra("fastwarc.warc", piece.name)
    kinds = warc.WarcRecordType
    wanted = kinds.response | kinds.resource | kinds.conversion
    for number, record in enumerate(warc.ArchiveIterator(stream, record_types=wanted, auto_decode="transfer"), start=1):
        name, http = f"{piece.name}:{number}", record.http_headers if record.is_http else None
        url, date = (printable(record.headers.get(key) or "").strip("<>") for key in ("WARC-Target-URI", "WARC-Date"))
        kind = (record.http_content_type if http else record.headers.get("Content-Type")) or ""
        kind = "notes of a crawler" if url.startswith("metadata:") else kind.partition(";")[0].strip().lower()
        if not wants(http.status_code if http else 200, kind, name, skipped):
            continue
        try:
            data = content(record, http or {})
        except (OSError, zlib.error) as error:  # the next record may be whole
            skipped.add("archived pages that are damaged", f"{name}: {first_line(error)}")
            continue
        text = page_text(data, kind, (http and record.http_charset) or "", name, skipped, mode)
        if text is not None:
            yield Document(text, name, piece.source, url=url, date=date)


def content(record: Any, http: Mapping[str, str]) -> bytes:
    """A record's page, at most a byte more than MAX_BYTES. Raises OSError or zlib.error for one that is damaged.

    The library's own unpacking loses the rest of an archive after a page that is not read to its end (fastwarc 2.0.1),
    and takes one cut short for whole.
    """
    data = record.reader.read(MAX_BYTES + 1)
    if len(data) < min(record.content_length, MAX_BYTES) and not http.get("Transfer-Encoding"):
        raise OSError(f"{len(data):,} of {record.content_length:,} bytes")
    packing = (http.get("Content-Encoding") or "identity").strip().lower()
    if packing in ("gzip", "x-gzip", "deflate") and data[:1] in (b"\x1f", b"\x78"):
        unpacking = zlib.decompressobj(47)
        page = unpacking.decompress(data, MAX_BYTES + 1)
        if not unpacking.eof and len(page) <= MAX_BYTES:
            raise OSError(f"the packed page ends after {len(page):,} bytes")
        return page
    if packing == "br":
        raise OSError("packed with Brotli")
    return data  # or a header that was kept of a page that was not


def arc_pages(stream: BinaryIO, piece: Piece, skipped: Skipped, mode: Mode) -> Iterator[Document]:
    """The same of an archive of version 1: lines of address, host, time, type and size, each followed by an answer."""
    number = 0
    while line := stream.readline(BUFFER_BYTES):
        if line.isspace():
            continue
        fields = ARC_FIELDS.fullmatch(line)
        if not fields:
            raise Damaged(f"{line[:80]!r} is no header of ARC version 1")
        number += 1
        url, time, _, size = (field.decode(errors="replace") for field in fields.groups())
        data = stream.read(min(int(size), MAX_BYTES + 1))
        for left in range(int(size) - len(data), 0, -BUFFER_BYTES):
            if not stream.read(min(left, BUFFER_BYTES)):
                raise Damaged(f"ends within {url!r}")
        if not data.startswith(b"HTTP/"):  # the archive's own first record
            continue
        head, _, body = data.partition(b"\r\n\r\n")
        status, kind = HTTP_STATUS.match(head), HTTP_TYPE.search(head)
        name, given = f"{piece.name}:{number}", kind[1].decode().lower() if kind else ""
        if not wants(int(status[1]) if status else 0, given, name, skipped):
            continue
        charset = ((kind and kind[2]) or b"").decode()
        text = page_text(body, given, charset, name, skipped, mode)
        if text is not None:
            date = f"{time[:4]}-{time[4:6]}-{time[6:8]}T{time[8:10]}:{time[10:12]}:{time[12:]}Z"
            yield Document(text, name, piece.source, url=printable(url), date=date)


def wants(status: int, kind: str, name: str, skipped: Skipped) -> bool:
    """Whether a record is a page of text; what is not has been counted."""
    if status != 200:
        skipped.add("archived answers that are no page found", f"{name}: status {status}")
    elif kind not in (*HTML, "text/plain"):
        skipped.add("archived files that are no text", f"{name}: {kind or 'no content type'}")
    else:
        return True
    return False


def page_text(data: bytes, kind: str, charset: str, name: str, skipped: Skipped, mode: Mode) -> str | None:
    """None where the record has been counted."""
    if kind in HTML and len(data) <= MAX_BYTES:
        return of_html(data, charset, name, skipped, mode)
    text, reason = decoded(data) if len(data) <= MAX_BYTES else ("", f"longer than {MAX_BYTES:,} bytes")
    if reason:
        skipped.add(reason, name)
        return None
    return text
