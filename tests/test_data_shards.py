"""Layer: arithmetic, and a killed process. A corpus holds what was put in, or is refused, or is not there at all."""

import pickle
import resource
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llamita.data import build as build_room
from llamita.data import shards
from llamita.data.build import build
from llamita.data.read import Document
from llamita.data.shards import Corpus
from llamita.tokenizer.bulk import Bulk
from llamita.tokenizer.train import train
from tests.fakes import FakeTokenizer


def some_documents(count=40):
    return [
        Document(f"text {i} \u00e4" + "x" * (i % 7), f"doc {i}", ("web", "books")[i % 2], "de" * (i % 3 == 0))
        for i in range(count)
    ]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def texts(view) -> list[str]:
    return [bytes(view.tokens(i)[1:-1].astype(np.uint8)).decode() for i in range(len(view))]


def test_a_corpus_gives_back_every_document(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_TOKENS", 64)
    docs = some_documents()
    seen = []
    manifest = build(docs, FakeTokenizer(), tmp_path / "c", heldout_share=0.3, on_progress=lambda *n: seen.append(n))
    corpus = Corpus.open(tmp_path / "c")
    assert corpus.manifest == manifest and len(manifest.splits["train"]) > 3
    by_text = {document.text: document for document in docs}
    found = []
    for name in ("train", "heldout"):
        view = corpus.split(name)
        found += texts(view)
        assert view.lengths.tolist() == [len(view.tokens(i)) for i in range(len(view))]
        assert view.num_bytes == sum(len(text.encode()) for text in texts(view)) == view.lengths.sum() - 2 * len(view)
        assert [view.names[s] for s in view.sources] == [by_text[text].source for text in texts(view)]
        ids = view.tokens(0)
        assert ids.dtype == np.uint32 and (ids[0], ids[-1]) == (FakeTokenizer.bos_id, FakeTokenizer.eos_id)
        assert all(shard.tokens <= 64 for shard in manifest.splits[name])
    assert sorted(found) == sorted(by_text)
    assert seen == [(len(docs), sum(len(d.text.encode()) for d in docs), sum(len(d.text.encode()) + 2 for d in docs))]


def test_records_are_as_documented(tmp_path):
    build([Document("abc", "n", "web", "de")], FakeTokenizer(), tmp_path / "c")
    records = np.fromfile(tmp_path / "c" / "shard-00000.doc", shards.RECORD)
    manifest = Corpus.open(tmp_path / "c").manifest
    (end, num_bytes, _, lang, source) = records[0]
    assert (end, num_bytes, manifest.langs[lang], manifest.sources[source]) == (5, 3, "de", "web")
    assert (tmp_path / "c" / "shard-00000.tok").read_bytes()[4:8] == b"a\0\0\0"


def test_a_view_by_source_and_its_pickle(tmp_path):
    build(some_documents(), FakeTokenizer(), tmp_path / "c")
    train = Corpus.open(tmp_path / "c").split("train")
    parts = train.by_source()
    assert (
        list(parts) == train.names and sorted(parts) == ["books", "web"] and sum(map(len, parts.values())) == len(train)
    )
    assert set(texts(parts["web"])) == {d.text for d in some_documents() if d.source == "web"} & set(texts(train))
    pickled = pickle.dumps(parts["web"])
    assert texts(pickle.loads(pickled)) == texts(parts["web"]) and len(pickled) < 2000


def test_the_same_documents_give_the_same_bytes_whatever_the_batch(tmp_path, monkeypatch):
    build(some_documents(), FakeTokenizer(), tmp_path / "a")
    monkeypatch.setattr(build_room, "BATCH_BYTES", 1)
    build(iter(some_documents()), FakeTokenizer(), tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")
    build(some_documents(), FakeTokenizer(), tmp_path / "b", seed=1)
    assert files(tmp_path / "a") != files(tmp_path / "b")


def test_the_fast_encoder_gives_the_same_bytes(tmp_path, monkeypatch):
    """With the first batch by tiktoken and the rest by gigatoken, where it is installed."""
    tokenizer = train([document.text for document in some_documents()], 530)
    build(some_documents(), tokenizer, tmp_path / "plain")
    made = []
    monkeypatch.setattr(Bulk, "encode", lambda self, texts, real=Bulk.encode: made.append(self) or real(self, texts))
    monkeypatch.setattr(build_room, "BATCH_BYTES", 100)
    monkeypatch.setattr(build_room, "BULK_BYTES", 1)
    build(some_documents(), tokenizer, tmp_path / "bulk")
    assert files(tmp_path / "bulk") == files(tmp_path / "plain") and len(set(map(id, made))) == 1 < len(made)


def test_duplicates_are_dropped_and_counted(tmp_path):
    docs = some_documents()
    manifest = build([*docs, *docs[:5]], FakeTokenizer(), tmp_path / "a")
    assert manifest.num_duplicates == 5
    assert manifest.splits == build(docs, FakeTokenizer(), tmp_path / "b").splits


def test_the_split_of_a_document_does_not_depend_on_the_others(tmp_path):
    build(some_documents(200), FakeTokenizer(), tmp_path / "all", heldout_share=0.2)
    build(some_documents(200)[::3], FakeTokenizer(), tmp_path / "some", heldout_share=0.2)
    heldout = {name: set(texts(Corpus.open(tmp_path / name).split("heldout"))) for name in ("all", "some")}
    assert 20 <= len(heldout["all"]) <= 60
    assert heldout["some"] == heldout["all"] & {document.text for document in some_documents(200)[::3]}


@pytest.mark.parametrize("share", [1e-9, 0.5, 1 - 1e-9])
@pytest.mark.parametrize("count", [2, 3, 20])
def test_neither_split_is_empty(tmp_path, share, count):
    build(some_documents(count), FakeTokenizer(), tmp_path / "c", heldout_share=share)
    corpus = Corpus.open(tmp_path / "c")
    train, heldout = texts(corpus.split("train")), texts(corpus.split("heldout"))
    assert train and heldout
    assert sorted(train + heldout) == sorted(document.text for document in some_documents(count))


def test_the_document_that_goes_over_does_not_depend_on_the_order(tmp_path):
    docs = some_documents()
    found = set()
    for i, order in enumerate((docs, docs[::-1], docs[20:] + docs[:20])):
        build(order, FakeTokenizer(), tmp_path / str(i), heldout_share=1e-9)
        found.add(tuple(texts(Corpus.open(tmp_path / str(i)).split("heldout"))))
    build(docs, FakeTokenizer(), tmp_path / "more", heldout_share=0.2)
    (alone,) = found.pop()
    assert not found and alone in texts(Corpus.open(tmp_path / "more").split("heldout"))


@pytest.mark.parametrize("share", [0.001, 0.999])
def test_one_document_is_trained_on(tmp_path, share):
    build(some_documents(1), FakeTokenizer(), tmp_path / "c", heldout_share=share)
    corpus = Corpus.open(tmp_path / "c")
    heldout = corpus.split("heldout")
    assert len(corpus.split("train")) == 1
    assert (len(heldout), heldout.lengths.tolist(), heldout.num_bytes, heldout.by_source()) == (0, [], 0, {})


@pytest.mark.parametrize("docs", [[], [Document("", "n", "s")]])
def test_no_text_is_an_error(tmp_path, docs):
    with pytest.raises(ValueError, match="no text to build"):
        build(docs, FakeTokenizer(), tmp_path / "c")
    assert not list(tmp_path.iterdir())


def test_a_share_must_lie_between_0_and_1(tmp_path):
    with pytest.raises(ValueError, match="held-out share must lie between 0 and 1"):
        build(some_documents(), FakeTokenizer(), tmp_path / "c", heldout_share=1)


def test_an_id_beyond_the_vocabulary_is_our_bug(tmp_path):
    tokenizer = FakeTokenizer()
    tokenizer.vocab_size = 200
    with pytest.raises(AssertionError, match="beyond the vocabulary"):
        build(some_documents(), tokenizer, tmp_path / "c")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", ["tok", "doc"])
def test_damage_is_named_and_refused(tmp_path, suffix):
    build(some_documents(), FakeTokenizer(), tmp_path / "c")
    path = tmp_path / "c" / f"shard-00001.{suffix}"
    whole = path.read_bytes()
    for damage, message in [
        (whole[:9] + bytes([whole[9] ^ 1]) + whole[10:], "is damaged: its SHA-256 is not the manifest's"),
        (whole[:-1], rf"has {len(whole) - 1:,} bytes, not {len(whole):,}"),
        (None, "is missing"),
    ]:
        path.unlink()
        if damage is not None:
            path.write_bytes(damage)
        with pytest.raises(ValueError, match=rf"shard-00001\.{suffix} {message}; build the corpus again"):
            Corpus.open(tmp_path / "c")
        path.write_bytes(whole)
    assert Corpus.open(tmp_path / "c")


def test_a_flipped_byte_passes_only_without_verification(tmp_path):
    build(some_documents(), FakeTokenizer(), tmp_path / "c")
    path = tmp_path / "c" / "shard-00000.tok"
    path.write_bytes(b"\x01" + path.read_bytes()[1:])
    assert Corpus.open(tmp_path / "c", verify=False)


@pytest.mark.parametrize("content", ["{", "[]", '{"version": 2}', '{"version": 1, "splits": {}}', "[" * 100_000])
def test_a_bad_manifest_is_refused(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=r"manifest\.json is damaged or of another version .*; build the corpus again"):
        Corpus.open(tmp_path)


def test_a_folder_without_a_manifest_is_no_corpus(tmp_path):
    with pytest.raises(ValueError, match=r"is no corpus folder, it has no manifest\.json"):
        Corpus.open(tmp_path)


def test_a_corpus_belongs_to_its_tokenizer(tmp_path):
    build(some_documents(), FakeTokenizer(), tmp_path / "c")
    corpus = Corpus.open(tmp_path / "c")
    corpus.check_tokenizer(FakeTokenizer.fingerprint)
    with pytest.raises(ValueError, match="made with another tokenizer"):
        corpus.check_tokenizer("0" * 64)


def test_the_manifest_has_a_fingerprint(tmp_path):
    manifest = build(some_documents(), FakeTokenizer(), tmp_path / "c")
    assert manifest.fingerprint == Corpus.open(tmp_path / "c").manifest.fingerprint
    assert manifest.fingerprint != replace(manifest, seed=1).fingerprint


@pytest.mark.parametrize("before", [False, True])
def test_a_full_disk_leaves_nothing(tmp_path, before):
    """The file size limit makes the kernel refuse a write in earnest, as a full disk would."""
    out = tmp_path / "c"
    if before:
        build(some_documents(3), FakeTokenizer(), out)
    whole = files(out) if before else None
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            build(some_documents(), FakeTokenizer(), out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == (["c"] if before else [])
    assert not before or files(out) == whole


def test_a_build_replaces_a_corpus_whole(tmp_path):
    build(some_documents(), FakeTokenizer(), tmp_path / "c")
    build(some_documents(3), FakeTokenizer(), tmp_path / "c")
    build(some_documents(3), FakeTokenizer(), tmp_path / "new")
    assert files(tmp_path / "c") == files(tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "new"]


def test_a_build_never_deletes_what_is_not_a_corpus(tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / "thesis.tex").write_text("years of work")
    (tmp_path / "home" / "tokenizer").mkdir(parents=True)
    for out in (tmp_path, tmp_path / "thesis.tex", tmp_path / "home"):
        with pytest.raises(ValueError, match="exists and is no corpus folder"):
            build(some_documents(), FakeTokenizer(), out)
    assert (tmp_path / "thesis.tex").read_text() == "years of work" and (tmp_path / "home" / "tokenizer").is_dir()


KILLED = """
import os, signal, sys
sys.path.insert(0, "tests")
from llamita.tokenizer.bulk import Bulk
from llamita.tokenizer.train import train
from tests.fakes import FakeTokenizer
from llamita.data import build
from llamita.data.read import Document
build.BATCH_BYTES = 1
def docs():
    for i in range(50):
        yield Document(f"text {i}", "", "")
    os.kill(os.getpid(), signal.SIGKILL)
build.build(docs(), FakeTokenizer(), sys.argv[1])
"""


def test_a_killed_build_leaves_no_corpus_and_the_next_one_clears_up(tmp_path):
    root = Path(__file__).resolve().parents[1]
    run = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "c")], cwd=root, env={"PYTHONPATH": str(root)})
    assert run.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == [".c.partial"]
    build(some_documents(), FakeTokenizer(), tmp_path / "c")
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    assert Corpus.open(tmp_path / "c")
