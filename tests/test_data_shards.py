"""Layer: arithmetic, and a killed process. A corpus holds what was put in, or is refused, or is not there at all."""

import json
import pickle
import resource
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

from llamita.data import assemble, curate, encode, job, shards
from llamita.data.build import build_documents as build
from llamita.data.read import Document
from llamita.data.shards import Corpus
from llamita.tokenizer.bulk import Bulk
from llamita.tokenizer.train import train
from tests.fakes import byte_tokenizer


def some_documents(count=40):
    return [
        Document(f"text {i} \u00e4" + "x" * (i % 7), f"doc {i}", ("web", "books")[i % 2], "de" * (i % 3 == 0))
        for i in range(count)
    ]


def files(folder: Path) -> dict[str, bytes]:
    """All but the clock's."""
    found = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "build-times.json"]
    return {path.name: path.read_bytes() for path in found}


def texts(view) -> list[str]:
    return [bytes(view.tokens(i)[1:-1].astype(np.uint8)).decode() for i in range(len(view))]


def test_a_corpus_gives_back_every_document(tmp_path, monkeypatch):
    monkeypatch.setattr(assemble, "SHARD_TOKENS", 64)
    manifest = build(some_documents(), byte_tokenizer(), tmp_path / "c", heldout_share=0.3)
    corpus = Corpus.open(tmp_path / "c")
    assert corpus.manifest == manifest and len(manifest.splits["train"]) > 5
    by_text = {document.text: document for document in some_documents()}
    assert sorted(texts(corpus.split("train")) + texts(corpus.split("heldout"))) == sorted(by_text)
    for name in ("train", "heldout"):
        view = corpus.split(name)
        for column, wanted in (("source", "source"), ("lang", "lang")):
            found = [view.names[column][i] for i in view.column(column)]
            assert found == [getattr(by_text[text], wanted) for text in texts(view)]
        assert view.num_bytes == sum(len(text.encode()) for text in texts(view))
        assert [len(view.tokens(i)) for i in range(len(view))] == view.lengths.tolist()
        assert {view.tokens(i)[0] for i in range(len(view))} == {256}
        assert {view.tokens(i)[-1] for i in range(len(view))} == {257}


def test_records_are_as_documented(tmp_path):
    build([Document("abc", "n", "web", "de")], byte_tokenizer(), tmp_path / "c")
    records = np.fromfile(tmp_path / "c" / "shard-00000.doc", shards.RECORD)
    manifest = Corpus.open(tmp_path / "c").manifest
    (end, num_bytes, _, lang, source, kind) = records[0]
    assert (end, num_bytes, manifest.langs[lang], manifest.sources[source]) == (5, 3, "de", "web")
    assert manifest.kinds[kind] in ("prose", "code", "table", "markup") and shards.RECORD.itemsize == 30
    assert (tmp_path / "c" / "shard-00000.tok").read_bytes()[4:8] == b"a\0\0\0"


def test_a_view_of_some_documents_and_its_pickle(tmp_path):
    build(some_documents(), byte_tokenizer(), tmp_path / "c")
    train = Corpus.open(tmp_path / "c").split("train")
    web = train.where(train.column("source") == train.names["source"].index("web"))
    assert set(texts(web)) == {d.text for d in some_documents() if d.source == "web"} & set(texts(train))
    pickled = pickle.dumps(web)
    assert texts(pickle.loads(pickled)) == texts(web) and len(pickled) < 3000
    shard, row = web.place(2)
    ledger = pyarrow.parquet.read_table(shard.path(tmp_path / "c", "parquet"))
    named = {document.name: document.text for document in some_documents()}
    assert named[ledger["name"][row].as_py()] == texts(web)[2]


def test_the_same_documents_give_the_same_bytes_whatever_the_block(tmp_path, monkeypatch):
    build(some_documents(), byte_tokenizer(), tmp_path / "a")
    monkeypatch.setattr(curate, "BLOCK_BYTES", 1)
    build(iter(some_documents()), byte_tokenizer(), tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")
    build(some_documents(), byte_tokenizer(), tmp_path / "b", seed=1)
    assert files(tmp_path / "a") != files(tmp_path / "b")


def test_the_fast_encoder_gives_the_same_bytes(tmp_path, monkeypatch):
    """By tiktoken and by gigatoken, where it is installed."""
    tokenizer = train([document.text for document in some_documents()], 530)
    build(some_documents(), tokenizer, tmp_path / "plain")
    made = []
    monkeypatch.setattr(Bulk, "encode", lambda self, texts, real=Bulk.encode: made.append(self) or real(self, texts))
    monkeypatch.setattr(curate, "BLOCK_BYTES", 100)
    monkeypatch.setattr(job, "BULK_BYTES", 1)
    build(some_documents(), tokenizer, tmp_path / "bulk")
    assert files(tmp_path / "bulk") == files(tmp_path / "plain") and len(set(map(id, made))) == 1 < len(made)


def test_duplicates_are_dropped_and_counted(tmp_path):
    docs = some_documents()
    manifest = build([*docs, *docs[:5]], byte_tokenizer(), tmp_path / "a")
    assert json.loads((tmp_path / "a" / "build.json").read_bytes())["duplicates"]["exact"] == 5
    other = build(docs, byte_tokenizer(), tmp_path / "b")
    hashes = [[(s.tok_sha256, s.doc_sha256) for s in made.splits["train"]] for made in (manifest, other)]
    assert hashes[0] == hashes[1]


def test_the_split_of_a_document_does_not_depend_on_the_others(tmp_path):
    build(some_documents(200), byte_tokenizer(), tmp_path / "all", heldout_share=0.2)
    build(some_documents(200)[::3], byte_tokenizer(), tmp_path / "some", heldout_share=0.2)
    heldout = {name: set(texts(Corpus.open(tmp_path / name).split("heldout"))) for name in ("all", "some")}
    assert 20 <= len(heldout["all"]) <= 60
    assert heldout["some"] == heldout["all"] & {document.text for document in some_documents(200)[::3]}


@pytest.mark.parametrize("share", [1e-9, 0.5, 1 - 1e-9])
@pytest.mark.parametrize("count", [2, 3, 20])
def test_neither_split_is_empty(tmp_path, share, count):
    build(some_documents(count), byte_tokenizer(), tmp_path / "c", heldout_share=share)
    corpus = Corpus.open(tmp_path / "c")
    train, heldout = texts(corpus.split("train")), texts(corpus.split("heldout"))
    assert train and heldout
    assert sorted(train + heldout) == sorted(document.text for document in some_documents(count))


def test_the_document_that_goes_over_does_not_depend_on_the_order(tmp_path):
    docs = some_documents()
    found = set()
    for i, order in enumerate((docs, docs[::-1], docs[20:] + docs[:20])):
        build(order, byte_tokenizer(), tmp_path / str(i), heldout_share=1e-9)
        found.add(tuple(texts(Corpus.open(tmp_path / str(i)).split("heldout"))))
    build(docs, byte_tokenizer(), tmp_path / "more", heldout_share=0.2)
    (alone,) = found.pop()
    assert not found and alone in texts(Corpus.open(tmp_path / "more").split("heldout"))


@pytest.mark.parametrize("share", [0.001, 0.999])
def test_one_document_is_trained_on(tmp_path, share):
    build(some_documents(1), byte_tokenizer(), tmp_path / "c", heldout_share=share)
    corpus = Corpus.open(tmp_path / "c")
    heldout = corpus.split("heldout")
    assert len(corpus.split("train")) == 1
    assert (len(heldout), heldout.lengths.tolist(), heldout.num_bytes, heldout.column("kind").tolist()) == (
        0, [], 0, []
    )  # fmt: skip


@pytest.mark.parametrize("docs", [[], [Document("", "n", "s")]])
def test_no_text_is_an_error(tmp_path, docs):
    with pytest.raises(ValueError, match="no text to build"):
        build(docs, byte_tokenizer(), tmp_path / "c")
    assert not list(tmp_path.iterdir())


def test_a_share_must_lie_between_0_and_1(tmp_path):
    with pytest.raises(ValueError, match="heldout_share must lie between 0 and 1"):
        build(some_documents(), byte_tokenizer(), tmp_path / "c", heldout_share=1)


def test_an_id_beyond_the_vocabulary_is_our_bug(tmp_path, monkeypatch):
    tokenizer = byte_tokenizer()
    beyond = lambda texts, *encoder: (np.full(len(texts), 512, np.uint32), np.ones(len(texts), np.int64))  # noqa: E731
    monkeypatch.setattr(encode, "framed", beyond)
    with pytest.raises(AssertionError, match="beyond the vocabulary"):
        build(some_documents(), tokenizer, tmp_path / "c")
    assert [path.name for path in tmp_path.iterdir()] == [".c.partial"], "finished tasks stay, and no corpus appears"


@pytest.mark.parametrize("suffix", ["tok", "doc", "parquet"])
def test_damage_is_named_and_refused(tmp_path, suffix):
    build(some_documents(), byte_tokenizer(), tmp_path / "c")
    path = tmp_path / "c" / f"shard-00001.{suffix}"
    whole = path.read_bytes()
    for damage, message in [
        (whole[:9] + bytes([whole[9] ^ 1]) + whole[10:], "is damaged: its SHA-256 is not the manifest's"),
        (whole[:-1], rf"(has {len(whole) - 1:,} bytes, not {len(whole):,}|is damaged: its SHA-256 is not .*)"),
        (None, "is missing"),
    ]:
        path.unlink()
        if damage is not None:
            path.write_bytes(damage)
        with pytest.raises(ValueError, match=rf"shard-00001\.{suffix} {message}; build the corpus again"):
            Corpus.open(tmp_path / "c")
        path.write_bytes(whole)
    assert Corpus.open(tmp_path / "c")


def test_a_flipped_byte_passes_only_without_verification(tmp_path, monkeypatch):
    build(some_documents(), byte_tokenizer(), tmp_path / "c")
    path = tmp_path / "c" / "shard-00000.tok"
    path.write_bytes(b"\x01" + path.read_bytes()[1:])
    assert Corpus.open(tmp_path / "c", verify=False)
    monkeypatch.setattr(shards, "VERIFY_TOKENS", 0)  # a corpus too large to be read at each start
    assert Corpus.open(tmp_path / "c")
    with pytest.raises(ValueError, match="is damaged"):
        Corpus.open(tmp_path / "c", verify=True)


@pytest.mark.parametrize("content", ["{", "[]", '{"version": 2}', '{"version": 1, "splits": {}}', "[" * 100_000])
def test_a_bad_manifest_is_refused(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=r"manifest\.json is damaged or of another version .*; build the corpus again"):
        Corpus.open(tmp_path)


def test_a_folder_without_a_manifest_is_no_corpus(tmp_path):
    with pytest.raises(ValueError, match=r"is no corpus folder, it has no manifest\.json"):
        Corpus.open(tmp_path)


def test_a_corpus_belongs_to_its_tokenizer(tmp_path):
    build(some_documents(), byte_tokenizer(), tmp_path / "c")
    corpus = Corpus.open(tmp_path / "c")
    corpus.check_tokenizer(byte_tokenizer().fingerprint)
    with pytest.raises(ValueError, match="made with another tokenizer"):
        corpus.check_tokenizer("0" * 64)


def test_the_manifest_has_a_fingerprint(tmp_path):
    manifest = build(some_documents(), byte_tokenizer(), tmp_path / "c")
    assert manifest.fingerprint == Corpus.open(tmp_path / "c").manifest.fingerprint
    assert manifest.fingerprint != replace(manifest, seed=1).fingerprint


@pytest.mark.parametrize("before", [False, True])
def test_a_full_disk_leaves_nothing(tmp_path, before):
    """The file size limit makes the kernel refuse a write in earnest, as a full disk would."""
    out = tmp_path / "c"
    if before:
        build(some_documents(3), byte_tokenizer(), out)
    whole = files(out) if before else None
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            build(some_documents(), byte_tokenizer(), out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == (["c"] if before else [])
    assert not before or files(out) == whole


def test_a_build_replaces_a_corpus_whole(tmp_path):
    build(some_documents(), byte_tokenizer(), tmp_path / "c")
    build(some_documents(3), byte_tokenizer(), tmp_path / "c")
    build(some_documents(3), byte_tokenizer(), tmp_path / "new")
    assert files(tmp_path / "c") == files(tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "new"]


def test_a_build_never_deletes_what_is_not_a_corpus(tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / "thesis.tex").write_text("years of work")
    (tmp_path / "home" / "tokenizer").mkdir(parents=True)
    for out in (tmp_path, tmp_path / "thesis.tex", tmp_path / "home"):
        with pytest.raises(ValueError, match="exists and is no corpus folder"):
            build(some_documents(), byte_tokenizer(), out)
    assert (tmp_path / "thesis.tex").read_text() == "years of work" and (tmp_path / "home" / "tokenizer").is_dir()
