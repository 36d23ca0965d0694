"""Layer: files of other trainers' formats, read back by readers written from the formats' descriptions."""

import resource
import struct
from pathlib import Path

import numpy as np
import pytest

from llamita.cli import data as verbs
from llamita.data import export as room
from llamita.data.export import export
from llamita.data.shards import SPLITS
from tests.test_ledger import hand_made, some_rows

WIDE = 128_256  # a vocabulary that uint16 does not hold
DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}


def documents(corpus, split: str) -> list[list[int]]:
    view = corpus.split(split)
    return [view.tokens(i).tolist() for i in range(len(view))]


def read_megatron(stem: Path) -> tuple[str, list[list[int]], list[int]]:
    """(dtype, sequences, document index) of an index and its data: little-endian, each field behind the other."""
    index = stem.with_suffix(".idx").read_bytes()
    assert index[:9] == b"MMIDIDX\x00\x00"
    version, code = struct.unpack_from("<QB", index, 9)
    num_sequences, num_documents = struct.unpack_from("<QQ", index, 18)
    assert version == 1
    place = 34
    sizes = struct.unpack_from(f"<{num_sequences}i", index, place)
    place += 4 * num_sequences
    pointers = struct.unpack_from(f"<{num_sequences}q", index, place)
    place += 8 * num_sequences
    starts = struct.unpack_from(f"<{num_documents}q", index, place)
    assert place + 8 * num_documents == len(index)
    data = stem.with_suffix(".bin").read_bytes()
    sequences = [np.frombuffer(data, DTYPES[code], size, at).tolist() for size, at in zip(sizes, pointers, strict=True)]
    assert sum(sizes) * np.dtype(DTYPES[code]).itemsize == len(data)
    return DTYPES[code], sequences, list(starts)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(room, "CHUNK_TOKENS", 37)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(512, "<u2"), (2**16, "<u2"), (2**16 + 1, "<i4"), (WIDE, "<i4")])
def test_megatron_gives_back_every_document(tmp_path, small_chunks, vocab_size, dtype):
    corpus = hand_made(tmp_path / "c", some_rows(), vocab_size=vocab_size)
    export(corpus, tmp_path / "out", "megatron")
    for split in SPLITS:
        found, sequences, starts = read_megatron(tmp_path / "out" / split)
        assert (found, sequences) == (dtype, documents(corpus, split))
        assert starts == list(range(len(sequences) + 1)) and len(corpus.manifest.splits["train"]) > 2


@pytest.mark.parametrize(("vocab_size", "dtype"), [(512, np.uint16), (WIDE, np.uint32)])
def test_npy_gives_back_every_token(tmp_path, small_chunks, vocab_size, dtype):
    corpus = hand_made(tmp_path / "c", some_rows(), vocab_size=vocab_size)
    written = export(corpus, tmp_path / "out", "npy")
    for split in SPLITS:
        files = sorted((tmp_path / "out").glob(f"{split}-*.npy"))
        assert [path.name for path in files] == [f"{split}-{i:05d}.npy" for i in range(len(files))]
        arrays = [np.load(path, mmap_mode="r", allow_pickle=False) for path in files]
        assert all(array.dtype == dtype and array.ndim == 1 for array in arrays)
        assert np.concatenate(arrays).tolist() == [id for document in documents(corpus, split) for id in document]
    assert {path.suffix for path in written} >= {".npy"} and (tmp_path / "out" / "tokenizer").is_dir()


def test_an_id_that_uint16_does_not_hold_is_not_wrapped(tmp_path):
    """What nanoGPT's loader would do in silence."""
    corpus = hand_made(tmp_path / "c", some_rows(4), vocab_size=WIDE)
    shard = corpus.manifest.splits["train"][0]
    path = shard.path(corpus.folder, "tok")
    tokens = np.fromfile(path, "<u4")
    tokens[1] = 100_000
    tokens.tofile(path)
    export(corpus, tmp_path / "npy", "npy")
    export(corpus, tmp_path / "megatron", "megatron")
    assert np.load(tmp_path / "npy" / "train-00000.npy")[1] == 100_000
    assert read_megatron(tmp_path / "megatron" / "train")[1][0][1] == 100_000


def test_an_empty_split_has_no_files(tmp_path):
    corpus = hand_made(tmp_path / "c", some_rows(1))
    for form in ("megatron", "npy"):
        names = {path.name for path in export(corpus, tmp_path / form, form)}
        assert not any(name.startswith("train") for name in names) and any(name.startswith("heldout") for name in names)


@pytest.mark.parametrize("form", ["megatron", "npy"])
def test_nothing_is_overwritten_and_a_full_disk_leaves_nothing(tmp_path, form):
    corpus = hand_made(tmp_path / "c", some_rows())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="exists; give a folder that does not"):
        export(corpus, tmp_path / "mine", form)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            export(corpus, tmp_path / "out", form)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "mine"]
    (tmp_path / ".out.partial").mkdir()  # of an export that was killed
    export(corpus, tmp_path / "out", form)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "mine", "out"]


def test_the_verb_refuses_a_damaged_corpus(tmp_path, capsys):
    corpus = hand_made(tmp_path / "c", some_rows())
    verbs.export(corpus.folder, tmp_path / "out", "npy")
    assert str(tmp_path / "out" / "train-00000.npy") in capsys.readouterr().out
    path = corpus.folder / "shard-00000.tok"
    path.write_bytes(b"\1" + path.read_bytes()[1:])
    with pytest.raises(ValueError, match=r"shard-00000\.tok is damaged"):
        verbs.export(corpus.folder, tmp_path / "other", "npy")


@pytest.mark.peer
@pytest.mark.parametrize("vocab_size", [512, WIDE])
def test_megatron_core_reads_it(tmp_path, vocab_size):
    reader = pytest.importorskip("megatron.core.datasets.indexed_dataset", reason="megatron-core is not installed")
    corpus = hand_made(tmp_path / "c", some_rows(), vocab_size=vocab_size)
    export(corpus, tmp_path / "out", "megatron")
    for split in SPLITS:
        found = reader.IndexedDataset(str(tmp_path / "out" / split))
        assert [found[i].tolist() for i in range(len(found))] == documents(corpus, split)
        assert found.document_indices.tolist() == list(range(len(found) + 1))
