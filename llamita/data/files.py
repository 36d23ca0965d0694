"""Input files: found in folders and stores, planned as parts, opened and decompressed as they are read."""

import bz2
import gzip
import importlib
import io
import lzma
import os
import stat
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from llamita.data.engine import Stopped

PART_BYTES = 32 * 2**20
BUFFER_BYTES = 2**18
MAX_EXAMPLES = 5
MAX_NAMED = 3  # of them, in a message
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
CUTTABLE = (".jsonl", ".ndjson", ".parquet")  # these can be read from the middle on
ARCHIVES = (".warc", ".wet")  # their library unpacks them itself, and wants to seek
FREE_BYTES = 2**30
MAX_RATIO = 500  # text of a program's log packs to a hundredth, zeros to a thousandth and less
Told = Callable[[BinaryIO], None]


class Damaged(Exception):
    """A file that ends here, for whatever reason; what was read of it before counts."""


DAMAGE = (Damaged, OSError, EOFError, zlib.error, lzma.LZMAError)


@dataclass
class Skipped:
    """What has been left out: how often by reason, and a few examples of each, `name: detail`."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, where: str) -> None:
        self.counts[reason] += 1
        shown = self.examples.setdefault(reason, [])
        if len(shown) < MAX_EXAMPLES:
            shown.append(printable(where))

    def facts(self) -> dict[str, Any]:
        """As it goes into a file: `{reason: {"count": int, "examples": [str]}}`."""
        return {reason: {"count": count, "examples": self.examples[reason]} for reason, count in self.counts.items()}

    def add_facts(self, facts: dict[str, Any]) -> None:
        """Adds what another process has counted."""
        for reason, found in facts.items():
            self.counts[reason] += found["count"]
            shown = self.examples.setdefault(reason, [])
            shown += found["examples"][: MAX_EXAMPLES - len(shown)]

    def __str__(self) -> str:
        return ", ".join(
            f"{count:,} {reason} ({'; '.join(self.examples[reason][:MAX_NAMED])})"
            for reason, count in self.counts.items()
        )


@dataclass(frozen=True)
class Piece:
    """The bytes [start, end) of a file that is `size` bytes long; `name` and `source` are those of its documents."""

    path: str
    name: str
    source: str
    size: int
    start: int
    end: int

    @property
    def kind(self) -> str:
        """The suffix that says what the file holds: `.jsonl` of `a.jsonl.gz`."""
        return _suffixes(self.path)[0]

    @property
    def packing(self) -> str:
        """One of COMPRESSED, or ""."""
        return _suffixes(self.path)[1]


@dataclass(frozen=True)
class Part:
    """Some input, read by one task: it depends on names and sizes of files alone."""

    pieces: tuple[Piece, ...]

    @property
    def num_bytes(self) -> int:
        """As they lie on disk."""
        return sum(piece.end - piece.start for piece in self.pieces)

    def share(self, text_bytes: int) -> float:
        """About how much of it has been read when so many bytes of text came out of it: 0 to 1."""
        return min(text_bytes / (self.num_bytes or 1), 1.0)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Part":
        return cls(tuple(Piece(**piece) for piece in value["pieces"]))


def plan_parts(paths: Iterable[str | Path], part_bytes: int = PART_BYTES) -> list[Part]:
    """Everything below `paths` in parts of about `part_bytes` on disk; the same listing gives the same parts.

    Small files share a part. A large `.jsonl` or `.parquet` that is not compressed is cut into ranges of bytes: a row
    belongs to the range in which its line begins, row group i of n to that which holds byte size * i // n. Any other
    file is one piece. Raises ValueError for a path that does not exist, before anything is read.
    """
    parts: list[Part] = []
    waiting: list[Piece] = []
    size = 0
    for piece in (cut for whole in listed(paths) for cut in _cut(whole, part_bytes)):
        num_bytes = piece.end - piece.start
        if waiting and size + num_bytes > part_bytes:
            parts.append(Part(tuple(waiting)))
            waiting, size = [], 0
        waiting.append(piece)
        size += num_bytes
    return [*parts, Part(tuple(waiting))] if waiting else parts


def _cut(whole: Piece, part_bytes: int) -> Iterator[Piece]:
    step = part_bytes if whole.kind in CUTTABLE and not whole.packing else whole.size
    for start in range(0, whole.size, step) if whole.size else (0,):
        yield Piece(whole.path, whole.name, whole.source, whole.size, start, min(start + step, whole.size))


def listed(paths: Iterable[str | Path]) -> list[Piece]:
    """The files at and below `paths`, whole, folders by name. A path with `://` is asked of fsspec."""
    return [
        piece
        for path in map(str, paths)
        for piece in (_remote_files(path) if "://" in path else _local_files(Path(path)))
    ]


def _local_files(root: Path) -> Iterator[Piece]:
    if not root.exists():
        raise ValueError(f"no such file or folder: {root}")
    for path in walk(root, set()):
        name = printable(path.relative_to(root.parent).as_posix())
        _, size = state_of(path)
        yield Piece(str(path), name, printable(root.resolve().name), size, 0, size)


def state_of(path: str | Path) -> tuple[int, int]:
    """When a file was changed, in ns, and its size; zeros of what is no file or may not be looked at."""
    try:
        found = os.stat(path)
    except OSError:
        return 0, 0
    return (found.st_mtime_ns, found.st_size) if stat.S_ISREG(found.st_mode) else (0, 0)


def walk(path: Path, seen: set[Path]) -> Iterator[Path]:
    """The files at or below `path` by name; no hidden entries, no folder twice however links lead there. A folder that
    must not be listed stands for what is in it."""
    try:
        entries = sorted(path.iterdir(), key=lambda entry: entry.name) if path.is_dir() else None
    except PermissionError:
        entries = None
    if entries is None:
        yield path
        return
    real = path.resolve()
    if real in seen:
        return
    seen.add(real)
    for entry in entries:
        if not entry.name.startswith("."):
            yield from walk(entry, seen)


def _remote_files(url: str) -> Iterator[Piece]:
    fsspec = extra("fsspec", url)
    try:
        store, root = fsspec.core.url_to_fs(url.rstrip("/"))
        found = {root: store.info(root)} if store.isfile(root) else store.find(root, detail=True)
    except Exception as error:  # whatever the library of that store raises
        raise ValueError(f"{url} cannot be listed: {first_line(error)}") from error
    if not found:
        raise ValueError(f"no such file or folder: {url}")
    above = PurePosixPath(root).parent
    names = {path: PurePosixPath(path).relative_to(above).parts for path in found}
    for path in sorted(found, key=names.__getitem__):
        if not any(name.startswith(".") for name in names[path][1:]):
            name, size = printable("/".join(names[path])), found[path]["size"] or 0
            yield Piece(store.unstrip_protocol(path), name, printable(names[path][0]), size, 0, size)


class _Remote(io.RawIOBase):
    """A file of a store. What goes wrong there is no fault of the file: the build stops and can be taken up again."""

    def __init__(self, url: str):
        self.url, fsspec = url, extra("fsspec", url)
        self.file: Any = self._tried(lambda: fsspec.open(url, "rb").open())

    def _tried(self, do: Callable[[], Any]) -> Any:
        try:
            return do()
        except Exception as error:  # whatever the library of that store raises
            raise Stopped(f"{self.url} cannot be read now: {first_line(error)}") from error

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, into: Any) -> int:
        data = self._tried(lambda: self.file.read(len(into)))
        into[: len(data)] = data
        return len(data)

    def seek(self, place: int, whence: int = io.SEEK_SET) -> int:
        return self._tried(lambda: self.file.seek(place, whence))

    def tell(self) -> int:
        return self.file.tell()

    def close(self) -> None:
        self.file.close()
        super().close()


class _Unpacked(io.RawIOBase):
    """What a decompressor gives, until it is so much more than was packed that it can be no text."""

    def __init__(self, stream: Any, raw: BinaryIO):
        self.stream, self.raw, self.num_bytes = stream, raw, 0

    def readable(self) -> bool:
        return True

    def readinto(self, into: Any) -> int:
        data = self.stream.read1(len(into))  # what stands before the damage is given before the error
        into[: len(data)] = data
        self.num_bytes += len(data)
        if self.num_bytes > max(FREE_BYTES, MAX_RATIO * self.raw.tell()):
            raise Damaged(f"unpacks to more than {MAX_RATIO} times its size")
        return len(data)


@contextmanager
def opened(piece: Piece, told: Told) -> Iterator[BinaryIO]:
    """The file's content, decompressed as it is read; `told` gets the file itself, whose place shows how far one is."""
    with open_raw(piece) as raw:
        told(raw)
        if not piece.packing or piece.kind in ARCHIVES:
            yield raw
            return
        with io.BufferedReader(_Unpacked(_decompressor(raw, piece), raw), BUFFER_BYTES) as stream:
            yield stream


def open_raw(piece: Piece) -> BinaryIO:
    if "://" in piece.path:
        return io.BufferedReader(_Remote(piece.path), BUFFER_BYTES)
    return open(piece.path, "rb", BUFFER_BYTES)


def _decompressor(raw: BinaryIO, piece: Piece) -> Any:
    match piece.packing:
        case ".gz":
            return gzip.open(raw)
        case ".bz2":
            return bz2.open(raw)
        case ".xz":
            return lzma.open(raw)
        case _:
            # Not zstandard 0.25: it takes a file cut short for a whole one (seen).
            return extra("pyarrow", piece.path).input_stream(raw, compression="zstd")


def _suffixes(path: str) -> tuple[str, str]:
    pure = PurePosixPath(path)
    if pure.suffix.lower() in COMPRESSED:
        return PurePosixPath(pure.stem).suffix.lower(), pure.suffix.lower()
    return pure.suffix.lower(), ""


def first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def extra(name: str, path: str) -> Any:
    """A module of the `data` extra. Raises ValueError that says how to get it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ValueError(f"{path} wants {package} to be read: pip install 'llamita[data]'") from error


def printable(name: str) -> str:
    """A name as it may go to a terminal or a file: what does not print (surrogates too) becomes a question mark."""
    return name if name.isprintable() else "".join(char if char.isprintable() else "?" for char in name)
