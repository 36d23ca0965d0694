"""Rows of JSON lines, JSON lists and Parquet as documents, from any place in a file on."""

import io
import json
from collections.abc import Iterator
from itertools import chain
from math import inf
from typing import Any, BinaryIO

from llamita.data.document import COLUMNS, MAX_BYTES, NESTED, Document, Mode, columns_of, of_row
from llamita.data.files import BUFFER_BYTES, Damaged, Piece, Skipped, extra

MAX_WHOLE_BYTES = 256 * 2**20  # of a file that is no stream of rows
BATCH_BYTES = 16 * 2**20
BATCH_ROWS = 1024
REPEATED_BYTES = 128 * 2**20
UNREAD = object()


def json_rows(stream: BinaryIO, piece: Piece, skipped: Skipped, mode: Mode) -> Iterator[Document]:
    """The lines that begin within the piece, each named by the byte at which it begins (in the unpacked file)."""
    return _documents(json_lines(stream, piece, skipped), piece, skipped, mode)


def _documents(lines: Iterator[tuple[int, bytes]], piece: Piece, skipped: Skipped, mode: Mode) -> Iterator[Document]:
    for place, line in lines:
        name = f"{piece.name}:{place}"
        row = parsed(line, name, skipped)
        if row is not UNREAD:
            document = of_row(row, name, piece.source, skipped, mode)
            if document is not None:
                yield document


def parsed(data: bytes, name: str, skipped: Skipped) -> Any:
    """UNREAD where it has been counted."""
    try:
        return json.loads(data)
    except UnicodeDecodeError:
        skipped.add("not UTF-8", name)
    except (ValueError, RecursionError) as error:
        skipped.add("not JSON", f"{name}: {error}")
    return UNREAD


def json_lines(stream: BinaryIO, piece: Piece, skipped: Skipped) -> Iterator[tuple[int, bytes]]:
    """(place, line) of each line that is not blank; one that is too long is passed over in bounded memory."""
    place, end = piece.start, inf if piece.packing else piece.end
    if place:  # the line under way here belongs to the piece before, unless it ended just there
        place = stream.seek(place - 1)
        while line := stream.readline(min(BUFFER_BYTES, piece.end - place)):
            place += len(line)
            if line.endswith(b"\n"):
                break
    while place < end and (line := stream.readline(MAX_BYTES + 1)):
        began = place
        place += len(line)
        if len(line) > MAX_BYTES:
            skipped.add(f"longer than {MAX_BYTES:,} bytes", f"{piece.name}:{began}")
            if b"\0" in line:  # zeros without end, packed: no line of JSON will come
                return
            while line and not line.endswith(b"\n"):
                line = stream.readline(BUFFER_BYTES)
                place += len(line)
        elif line.isspace():
            skipped.add("empty", f"{piece.name}:{began}")
        else:
            yield began, line


def json_file(stream: Any, piece: Piece, skipped: Skipped, mode: Mode) -> Iterator[Document]:
    """A `.json` file: a list of rows, or, as C4 and Dolma name theirs, lines."""
    if stream.peek(1)[:BUFFER_BYTES].lstrip(b"\xef\xbb\xbf \t\r\n")[:1] != b"[":
        yield from _json_objects(stream, piece, skipped, mode)
        return
    rows = parsed(whole(stream), piece.name, skipped)
    for number, row in enumerate([] if rows is UNREAD else rows, start=1):
        document = of_row(row, f"{piece.name}:{number}", piece.source, skipped, mode)
        if document is not None:
            yield document


def _json_objects(stream: BinaryIO, piece: Piece, skipped: Skipped, mode: Mode) -> Iterator[Document]:
    lines = json_lines(stream, piece, skipped)
    first = next(lines, None)
    if first is None:
        return
    if not isinstance(parsed(first[1], piece.name, Skipped()), dict):
        skipped.add("JSON but no rows with `text`", piece.name)
        return
    yield from _documents(chain([first], lines), piece, skipped, mode)


def whole(stream: BinaryIO) -> bytes:
    data = stream.read(MAX_WHOLE_BYTES + 1)
    if len(data) > MAX_WHOLE_BYTES:
        raise Damaged(f"larger than {MAX_WHOLE_BYTES:,} bytes: give .jsonl, or .parquet that is not packed again")
    return data


def parquet_rows(stream: BinaryIO, piece: Piece, skipped: Skipped, mode: Mode) -> Iterator[Document]:
    """The row groups of the piece, some rows at a time, each named by its number in the file."""
    pyarrow, pq = extra("pyarrow", piece.name), extra("pyarrow.parquet", piece.name)
    try:
        stream = io.BytesIO(whole(stream)) if piece.packing else stream
        file = pq.ParquetFile(stream, buffer_size=BUFFER_BYTES)
        columns = wanted_columns(file.schema_arrow)
        if not columns:
            skipped.add("rows without `text`", f"{piece.name}: {columns_of(file.schema_arrow.names)}")
            return
        number, paths = 0, [file.schema.column(i).path for i in range(len(file.schema))]
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group)
            if piece.packing or piece.start <= piece.size * group // file.num_row_groups < piece.end:
                chosen = {"row_groups": [group], "columns": columns, "use_threads": False}
                coded = pq.ParquetFile(stream, metadata=file.metadata, buffer_size=BUFFER_BYTES, read_dictionary=paths)
                first = next(coded.iter_batches(batch_size=1, **chosen), None)
                batches = file.iter_batches(batch_size=batch_rows(rows, first), **chosen)
                yield from _batches(batches, number, piece, skipped, mode)
            number += rows.num_rows
    except pyarrow.ArrowException as error:
        raise Damaged(str(error).splitlines()[0]) from error


def batch_rows(group: Any, first: Any) -> int:
    """How many rows of a group to hold at once.

    `first` is one of them, with the group's dictionaries whole: each row may repeat the longest entry, of which the
    size that the group gives itself tells nothing.
    """
    mean_bytes = group.total_byte_size // (group.num_rows or 1) + 1
    dictionary_bytes = 1 if first is None else first.get_total_buffer_size() + 1
    return max(1, min(BATCH_ROWS, BATCH_BYTES // mean_bytes, REPEATED_BYTES // dictionary_bytes))


def _batches(batches: Any, number: int, piece: Piece, skipped: Skipped, mode: Mode) -> Iterator[Document]:
    for batch in batches:
        names = batch.schema.names
        for values in zip(*map(as_list, batch.columns), strict=True):
            number += 1
            row = dict(zip(names, values, strict=True))
            document = of_row(row, f"{piece.name}:{number}", piece.source, skipped, mode)
            if document is not None:
                yield document


def wanted_columns(schema: Any) -> list[str]:
    """Those that are read of a table, fields of structs as `metadata.url`; none without `text` or `html`."""
    text = [name for name in ("text", "html") if name in schema.names][:1]
    flat = [name for name in COLUMNS if name in schema.names]
    structs = [schema.field(name) for name in NESTED if name in schema.names]
    inner = [
        f"{struct.name}.{field.name}"
        for struct in structs
        if hasattr(struct.type, "fields")
        for field in struct.type.fields
        if field.name in COLUMNS
    ]
    return text and text + flat + inner


def as_list(column: Any) -> list[Any]:
    if str(column.type).startswith(("timestamp", "date")):
        column = column.cast("string")  # Python's own dates know no nanoseconds and no year 10,000
    try:
        return column.to_pylist()
    except UnicodeDecodeError:  # one bad row must not cost the others: it becomes surrogates, which are counted
        values = column.cast("large_binary").to_pylist()
        return [value and value.decode(errors="surrogateescape") for value in values]
    except (ValueError, OverflowError) as error:
        raise Damaged(str(error)) from error
