"""The corpus folder: `manifest.json`, `tokenizer/`, `shard-N.tok` (ids), `shard-N.doc` (a record a document).

All numbers are little-endian. A folder is written aside and renamed, so it is whole or absent.
"""

import hashlib
import json
import re
import shutil
import struct
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

VERSION = 1
SHARD_TOKENS = 64 * 2**20
MAX_MANIFEST_BYTES = 2**28
TOKEN = np.dtype("<u4")
RECORD = np.dtype([("end", "<u8"), ("bytes", "<u8"), ("id", "<u8"), ("lang", "<u2"), ("source", "<u2")])
PACK_RECORD = struct.Struct("<QQQHH").pack
SPLITS = ("train", "heldout")
OUR_FILES = re.compile(r"manifest\.json|tokenizer|shard-\d{5,}\.(tok|doc)")
REMEDY = "build the corpus again with `llamita data build`"


@dataclass(frozen=True)
class Shard:
    """One pair of files: how much is in it, and the SHA-256 of each file."""

    number: int
    tokens: int
    docs: int
    bytes: int
    tok_sha256: str
    doc_sha256: str

    def path(self, folder: Path, suffix: str) -> Path:
        return folder / f"shard-{self.number:05d}.{suffix}"


@dataclass(frozen=True)
class Manifest:
    """What a corpus is: records hold indices into `sources` and `langs`; `tokenizer` is a fingerprint."""

    version: int
    tokenizer: str
    vocab_size: int
    dtype: str
    seed: int
    heldout_share: float
    num_duplicates: int
    sources: list[str]
    langs: list[str]
    splits: dict[str, list[Shard]]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Raises ValueError: no manifest, or one that is damaged or of another version."""
        path = folder / "manifest.json"
        if not path.is_file():
            raise ValueError(f"{folder} is no corpus folder, it has no manifest.json; {REMEDY}")
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise ValueError(f"{path} is larger than {MAX_MANIFEST_BYTES:,} bytes; {REMEDY}")
        try:
            fields = json.loads(path.read_bytes())
            if fields["version"] != VERSION:
                raise ValueError(f"version {fields['version']}, not {VERSION}")
            fields["splits"] = {split: [Shard(**shard) for shard in fields["splits"][split]] for split in SPLITS}
            return cls(**fields)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{path} is damaged or of another version ({error}); {REMEDY}") from error


class Documents:
    """The documents of one split, through memory maps; cheap to pickle, so loader workers may hold it."""

    def __init__(self, folder: Path, shards: Sequence[Shard], names: list[str], chosen: np.ndarray | None = None):
        self._made_of = (folder, shards, names, chosen)
        self.names = names
        self._tokens = [np.memmap(shard.path(folder, "tok"), TOKEN, "r") for shard in shards]
        self._records = [np.memmap(shard.path(folder, "doc"), RECORD, "r") for shard in shards]
        self._first = np.cumsum([0, *(shard.docs for shard in shards)]).tolist()
        self._chosen = np.arange(self._first[-1]) if chosen is None else chosen

    def __reduce__(self) -> tuple:
        return Documents, self._made_of

    def __len__(self) -> int:
        return len(self._chosen)

    def tokens(self, i: int) -> np.ndarray:
        """Document i's ids, BOS and EOS included, uint32 [L]; a read-only view of the file."""
        number = int(self._chosen[i])
        shard = bisect_right(self._first, number) - 1
        i = number - self._first[shard]
        ends = self._records[shard]["end"]
        return np.asarray(self._tokens[shard][int(ends[i - 1]) if i else 0 : int(ends[i])])

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, int64 [len]."""
        each = [np.diff(records["end"].astype(np.int64), prepend=0) for records in self._records]
        return np.concatenate([np.empty(0, np.int64), *each])[self._chosen]

    @property
    def sources(self) -> np.ndarray:
        """Each document's index into `names`, the names of all sources, uint16 [len]."""
        return self._column("source")

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of all texts."""
        return int(self._column("bytes").sum())

    def by_source(self) -> dict[str, "Documents"]:
        """These documents by source, in the order of `names`; sources that have none here are left out."""
        folder, shards, names, _ = self._made_of
        sources = self.sources
        return {
            names[source]: Documents(folder, shards, names, self._chosen[sources == source])
            for source in np.unique(sources)
        }

    def _column(self, name: str) -> np.ndarray:
        empty = np.empty(0, RECORD[name])
        return np.concatenate([empty, *(records[name] for records in self._records)])[self._chosen]


@dataclass(frozen=True)
class Corpus:
    folder: Path
    manifest: Manifest

    @classmethod
    def open(cls, folder: str | Path, *, verify: bool = True) -> "Corpus":
        """A corpus whose files all have their sizes and, with `verify`, their hashes (reads all of them
        once).

        Raises ValueError naming the shard that is missing or damaged.
        """
        folder = Path(folder)
        manifest = Manifest.read(folder)
        for split in SPLITS:
            for shard in manifest.splits[split]:
                check_file(shard.path(folder, "tok"), shard.tokens * TOKEN.itemsize, verify and shard.tok_sha256)
                check_file(shard.path(folder, "doc"), shard.docs * RECORD.itemsize, verify and shard.doc_sha256)
        return cls(folder, manifest)

    def split(self, name: str) -> Documents:
        """The documents of "train" or "heldout"."""
        return Documents(self.folder, self.manifest.splits[name], self.manifest.sources)

    def check_tokenizer(self, fingerprint: str) -> None:
        """Raises ValueError when the corpus was made with another tokenizer."""
        if fingerprint != self.manifest.tokenizer:
            raise ValueError(
                f"{self.folder} was made with another tokenizer ({self.manifest.tokenizer[:12]}, "
                f"not {fingerprint[:12]}); {REMEDY}"
            )


def check_file(path: Path, size: int, sha256: str | bool) -> None:
    if not path.is_file():
        raise ValueError(f"{path} is missing; {REMEDY}")
    if path.stat().st_size != size:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes, not {size:,}; {REMEDY}")
    if sha256:
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                raise ValueError(f"{path} is damaged: its SHA-256 is not the manifest's; {REMEDY}")


class HashedFile:
    def __init__(self, path: Path, stack: ExitStack):
        self.file = stack.enter_context(path.open("wb"))
        self.hash = hashlib.sha256()

    def write(self, data: bytes) -> None:
        self.file.write(data)
        self.hash.update(data)

    def close(self) -> str:
        self.file.close()
        return self.hash.hexdigest()


class ShardWriter:
    def __init__(self, folder: Path, number: int, stack: ExitStack):
        self.number = number
        self.tokens = self.docs = self.bytes = 0
        stem = folder / f"shard-{number:05d}"
        self.tok, self.doc = (HashedFile(stem.with_suffix(suffix), stack) for suffix in (".tok", ".doc"))

    def add(self, ids: np.ndarray, num_bytes: int, doc_id: int, lang: int, source: int) -> None:
        self.tokens += len(ids)
        self.docs += 1
        self.bytes += num_bytes
        self.tok.write(ids.astype(TOKEN).tobytes())
        self.doc.write(PACK_RECORD(self.tokens, num_bytes, doc_id, lang, source))

    def close(self) -> Shard:
        return Shard(self.number, self.tokens, self.docs, self.bytes, self.tok.close(), self.doc.close())


class Writer:
    """Writes documents to the shards of a new folder, each split to its own; no document spans two shards.

    A shard holds at most SHARD_TOKENS, or one longer document.
    """

    def __init__(self, folder: Path, stack: ExitStack):
        self.folder, self.stack = folder, stack
        self.open: dict[str, ShardWriter] = {}
        self.shards: dict[str, list[Shard]] = {split: [] for split in SPLITS}
        self.num_opened = 0

    def add(self, split: str, ids: np.ndarray, *record: int) -> None:
        """Appends one document; `record` = UTF-8 bytes of the text, document id, language, source."""
        if split in self.open and self.open[split].tokens + len(ids) > SHARD_TOKENS:
            self.shards[split].append(self.open.pop(split).close())
        if split not in self.open:
            self.open[split] = ShardWriter(self.folder, self.num_opened, self.stack)
            self.num_opened += 1
        self.open[split].add(ids, *record)

    def close(self) -> dict[str, list[Shard]]:
        for split, shard in self.open.items():
            self.shards[split].append(shard.close())
        return self.shards


def is_corpus_or_empty(folder: Path) -> bool:
    names = {entry.name for entry in folder.iterdir()} if folder.is_dir() else {"not a folder"}
    return not names or ("manifest.json" in names and all(map(OUR_FILES.fullmatch, names)))


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A new empty folder to fill, which takes the place of the corpus at `folder` on success and vanishes
    otherwise.

    Raises ValueError when something other than a corpus stands there: it would be deleted.
    """
    folder = folder.resolve()
    if folder.exists() and not is_corpus_or_empty(folder):
        raise ValueError(f"{folder} exists and is no corpus folder; choose another place for the corpus")
    aside, old = (folder.with_name(f".{folder.name}.{what}") for what in ("partial", "old"))
    for stale in (aside, old):
        shutil.rmtree(stale, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        if folder.exists():
            folder.rename(old)
        aside.rename(folder)
    except BaseException:
        shutil.rmtree(aside)
        raise
    shutil.rmtree(old, ignore_errors=True)
