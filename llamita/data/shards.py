"""The corpus folder: `manifest.json`, `tokenizer/`, and for each shard `.tok` (ids), `.doc` (a record a document) and
`.parquet` (the ledger: where each document is from and what was measured of it).

All numbers are little-endian. A folder is written aside and renamed, so it is whole or absent.
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pyarrow

VERSION = 2
SHARD_TOKENS = 64 * 2**20
VERIFY_TOKENS = 2**30  # are hashed in some seconds each time a corpus is opened; of more, only the sizes are looked at
MAX_MANIFEST_BYTES = 2**28
TOKEN = np.dtype("<u4")
RECORD = np.dtype(
    [("end", "<u8"), ("bytes", "<u8"), ("id", "<u8"), ("lang", "<u2"), ("source", "<u2"), ("kind", "<u2")]
)
COLUMNS = ("source", "lang", "kind")
SPLITS = ("train", "heldout")
REMEDY = "build the corpus again with `llamita data build`"


@dataclass(frozen=True)
class Shard:
    """Three files of one name: how much is in them, and the SHA-256 of each."""

    number: int
    tokens: int
    docs: int
    bytes: int
    tok_sha256: str
    doc_sha256: str
    parquet_sha256: str

    def path(self, folder: Path, suffix: str) -> Path:
        return folder / f"shard-{self.number:05d}.{suffix}"


@dataclass(frozen=True)
class Manifest:
    """What a corpus is: records hold indices into `sources`, `langs` and `kinds`; `tokenizer` and `recipe` are
    fingerprints."""

    version: int
    tokenizer: str
    vocab_size: int
    dtype: str
    seed: int
    heldout_share: float
    recipe_name: str
    recipe: str
    sources: list[str]
    langs: list[str]
    kinds: list[str]
    splits: dict[str, list[Shard]]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @property
    def names(self) -> dict[str, list[str]]:
        """What the indices of each of the columns `source`, `lang` and `kind` stand for."""
        return {"source": self.sources, "lang": self.langs, "kind": self.kinds}

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
    """The documents of one split, through memory maps; cheap to pickle, so loader workers may hold it.

    `names[column]` is what the indices of a column (`source`, `lang`, `kind`) stand for.
    """

    def __init__(
        self, folder: Path, shards: Sequence[Shard], names: dict[str, list[str]], chosen: np.ndarray | None = None
    ):
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

    def column(self, name: str) -> np.ndarray:
        """Each document's index into `names[name]`, uint16 [len]."""
        assert name in COLUMNS, name
        return self._column(name)

    def where(self, mask: np.ndarray) -> "Documents":
        """The documents for which `mask`, bool [len], holds."""
        folder, shards, names, _ = self._made_of
        return Documents(folder, shards, names, self._chosen[mask])

    def place(self, i: int) -> tuple[Shard, int]:
        """The shard that document i lies in, and its number there: the row of the shard's ledger."""
        number = int(self._chosen[i])
        shard = bisect_right(self._first, number) - 1
        return self._made_of[1][shard], number - self._first[shard]

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of all texts."""
        return int(self._column("bytes").sum())

    def _column(self, name: str) -> np.ndarray:
        empty = np.empty(0, RECORD[name])
        return np.concatenate([empty, *(records[name] for records in self._records)])[self._chosen]


@dataclass(frozen=True)
class Corpus:
    folder: Path
    manifest: Manifest

    @classmethod
    def open(cls, folder: str | Path, *, verify: bool | None = None) -> "Corpus":
        """A corpus whose files all have their sizes and, with `verify`, their hashes, which reads all of them; where
        nothing is said, of VERIFY_TOKENS at most.

        Raises ValueError naming the shard that is missing or damaged.
        """
        folder = Path(folder)
        manifest = Manifest.read(folder)
        if verify is None:
            verify = sum(shard.tokens for split in SPLITS for shard in manifest.splits[split]) <= VERIFY_TOKENS
        for split in SPLITS:
            for shard in manifest.splits[split]:
                check_file(shard.path(folder, "tok"), shard.tokens * TOKEN.itemsize, verify and shard.tok_sha256)
                check_file(shard.path(folder, "doc"), shard.docs * RECORD.itemsize, verify and shard.doc_sha256)
                check_file(shard.path(folder, "parquet"), None, verify and shard.parquet_sha256)
        return cls(folder, manifest)

    def split(self, name: str) -> Documents:
        """The documents of "train" or "heldout"."""
        return Documents(self.folder, self.manifest.splits[name], self.manifest.names)

    def check_tokenizer(self, fingerprint: str) -> None:
        """Raises ValueError when the corpus was made with another tokenizer."""
        if fingerprint != self.manifest.tokenizer:
            raise ValueError(
                f"{self.folder} was made with another tokenizer ({self.manifest.tokenizer[:12]}, "
                f"not {fingerprint[:12]}); {REMEDY}"
            )


def check_file(path: Path, size: int | None, sha256: str | bool) -> None:
    if not path.is_file():
        raise ValueError(f"{path} is missing; {REMEDY}")
    if size is not None and path.stat().st_size != size:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes, not {size:,}; {REMEDY}")
    if sha256 and sha256_of(path) != sha256:
        raise ValueError(f"{path} is damaged: its SHA-256 is not the manifest's; {REMEDY}")


def write_shard(
    folder: Path, number: int, tokens: Iterable[np.ndarray], records: np.ndarray, ledger: "pyarrow.Table"
) -> Shard:
    """Writes the three files of one shard: pieces of its ids uint32, one RECORD and one ledger row a document."""
    import pyarrow.parquet as pq

    stem = folder / f"shard-{number:05d}"
    digest, num_tokens = hashlib.sha256(), 0
    with stem.with_suffix(".tok").open("wb") as file:
        for piece in tokens:
            data = piece.astype(TOKEN, copy=False).tobytes()
            file.write(data)
            digest.update(data)
            num_tokens += len(piece)
    assert num_tokens == (records["end"][-1] if len(records) else 0) and len(records) == len(ledger)
    stem.with_suffix(".doc").write_bytes(records.tobytes())
    pq.write_table(ledger, stem.with_suffix(".parquet"), compression="zstd")
    return Shard(
        number, num_tokens, len(records), int(records["bytes"].sum()), digest.hexdigest(),
        sha256_of(stem.with_suffix(".doc")), sha256_of(stem.with_suffix(".parquet")),
    )  # fmt: skip


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
