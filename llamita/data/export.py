"""A corpus in the formats of other trainers: Megatron's indexed data set, and flat NumPy arrays.

Both are written aside and renamed, a stretch of tokens or a shard's records at a time: memory does not grow with the
corpus. Documents keep their BOS and EOS, and the order of the shards.
"""

import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np

from llamita.data.shards import RECORD, SPLITS, TOKEN, Corpus, Shard

Format = Literal["megatron", "npy"]
CHUNK_TOKENS = 2**22

# The head of an index, as Megatron-core's `IndexedDataset` reads it (core/datasets/indexed_dataset.py): magic, version,
# code of the dtype, sequences, entries of the document index. Arrays follow: int32 lengths, int64 offsets in bytes,
# int64 document index.
MAGIC = b"MMIDIDX\0\0"
HEAD = struct.Struct("<9sQBQQ")
CODES = {"<i4": 4, "<u2": 8}


def export(corpus: Corpus, out: Path, form: Format) -> list[Path]:
    """Writes the folder `out` and returns its files: the splits that are not empty, and the tokenizer.

    `megatron`: `train.bin` and `train.idx`, a sequence a document, int32. `npy`: `train-00000.npy` and on, a shard
    each, uint32. Either is uint16 where the vocabulary fits. Raises ValueError: `out` exists.
    """
    if out.exists():
        raise ValueError(f"{out} exists; give a folder that does not, or delete it")
    aside = out.with_name(f".{out.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    write = WRITERS[form]
    try:
        for split in SPLITS:
            if corpus.manifest.splits[split]:
                write(corpus, split, aside)
        shutil.copytree(corpus.folder / "tokenizer", aside / "tokenizer")
        aside.rename(out)
    except BaseException:
        shutil.rmtree(aside)
        raise
    return sorted(path for path in out.rglob("*") if path.is_file())


def megatron(corpus: Corpus, split: str, folder: Path) -> None:
    shards, kind = corpus.manifest.splits[split], token_dtype(corpus, "<i4")
    num_docs = sum(shard.docs for shard in shards)
    with (folder / f"{split}.bin").open("wb") as file:
        for shard in shards:
            copy(corpus, shard, kind, file)
    with (folder / f"{split}.idx").open("wb") as file:
        file.write(HEAD.pack(MAGIC, 1, CODES[kind.str], num_docs, num_docs + 1))
        for lengths in each_lengths(corpus, shards):
            file.write(lengths.astype("<i4").tobytes())
        before = 0
        for lengths in each_lengths(corpus, shards):
            ends = before + np.cumsum(lengths) * kind.itemsize
            file.write((ends - lengths * kind.itemsize).astype("<i8").tobytes())
            before = int(ends[-1])
        first = 0
        for shard in shards:
            file.write(np.arange(first, first + shard.docs, dtype="<i8").tobytes())
            first += shard.docs
        file.write(np.array([num_docs], "<i8").tobytes())


def npy(corpus: Corpus, split: str, folder: Path) -> None:
    kind = token_dtype(corpus, TOKEN.str)
    for number, shard in enumerate(corpus.manifest.splits[split]):
        with (folder / f"{split}-{number:05d}.npy").open("wb") as file:
            head = {"descr": kind.str, "fortran_order": False, "shape": (shard.tokens,)}
            np.lib.format.write_array_header_1_0(file, head)
            copy(corpus, shard, kind, file)


def token_dtype(corpus: Corpus, wide: str) -> np.dtype:
    return np.dtype("<u2" if corpus.manifest.vocab_size <= 2**16 else wide)


def copy(corpus: Corpus, shard: Shard, kind: np.dtype, file: BinaryIO) -> None:
    """The shard's ids as another dtype that holds them all."""
    tokens = np.memmap(shard.path(corpus.folder, "tok"), TOKEN, "r")
    for start in range(0, len(tokens), CHUNK_TOKENS):
        file.write(tokens[start : start + CHUNK_TOKENS].astype(kind).tobytes())


def each_lengths(corpus: Corpus, shards: list[Shard]) -> Iterator[np.ndarray]:
    """Tokens of the documents of each shard, int64 [docs]."""
    for shard in shards:
        ends = np.memmap(shard.path(corpus.folder, "doc"), RECORD, "r")["end"]
        yield np.diff(ends.astype(np.int64), prepend=0)


WRITERS: dict[Format, Callable[[Corpus, str, Path], None]] = {"megatron": megatron, "npy": npy}
