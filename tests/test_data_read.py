"""Layer: arithmetic. Files of every kind become the same documents, and what is left out is counted."""

import bz2
import gzip
import json
import lzma
import os
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from llamita.data import read
from llamita.data.read import Document, documents

PACK = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}
TEXTS = ["one ", "zwei \u00e4\n", "\u4e09"]


def rows_as(kind, folder):
    """The same three rows as the bytes of a file of that kind."""
    rows = [{"text": text, "lang": "xx", "other": 1} for text in TEXTS]
    if kind == ".jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    if kind == ".json":
        return json.dumps(rows).encode()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "made", row_group_size=2)
    return (folder / "made").read_bytes()


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".parquet"])
def test_rows_of_every_kind_are_the_same(tmp_path, kind, packed):
    path = tmp_path / f"rows{kind}{packed}"
    path.write_bytes(PACK[packed](rows_as(kind, tmp_path)))
    expected = [Document(text, f"{path.name}:{i}", path.name, "xx") for i, text in enumerate(TEXTS, start=1)]
    assert list(documents([path])) == expected


@pytest.mark.parametrize("packed", PACK)
def test_a_text_file_is_one_document(tmp_path, packed):
    path = tmp_path / f"poem.txt{packed}"
    path.write_bytes(PACK[packed]("\ufeffline\r\nli\u00f1e\n".encode()))
    assert list(documents([str(path)])) == [Document("line\r\nli\u00f1e\n", path.name, path.name)]


def test_two_frames_of_zstandard_are_one_file(tmp_path):
    (tmp_path / "a.zst").write_bytes(PACK[".zst"](b"one") + PACK[".zst"](b"two"))
    assert [document.text for document in documents([tmp_path / "a.zst"])] == ["onetwo"]


@pytest.mark.parametrize("packed", list(PACK)[1:])
def test_a_file_cut_short_is_an_error(tmp_path, packed):
    path = tmp_path / f"a.txt{packed}"
    path.write_bytes(PACK[packed](os.urandom(300_000).hex().encode())[:-20])
    with pytest.raises(ValueError, match=r"a\.txt.* is damaged or unreadable: [^\n]+$"):
        list(documents([path]))


def test_a_row_may_name_itself(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "t", "id": 7, "source": "web", "lang": "de"}\n\n{"text": "u", "id": null, "lang": 3}')
    assert list(documents([path])) == [Document("t", "7", "web", "de"), Document("u", "a.jsonl:3", "a.jsonl")]


def test_a_folder_is_walked_by_name(tmp_path):
    root = tmp_path / "code"
    for name in ("b.py", "a/z.md", "a/y/x", "c", ".git/config", "a/.hidden"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    (root / "a" / "loop").symlink_to(root)
    (root / "self").symlink_to(root / "self")
    os.mkfifo(root / "pipe")
    reader = documents([root])
    assert [(d.text, d.name, d.source) for d in reader] == [
        (name, f"code/{name}", "code") for name in ("a/y/x", "a/z.md", "b.py", "c")
    ]
    assert reader.skipped == {"not a file": 2}


def test_what_is_left_out_is_counted(tmp_path):
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "late.bin").write_bytes(b"a" * read.SNIFFED_BYTES + b"\0")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "package.json").write_text('{"name": "x"}')
    (tmp_path / "rows.jsonl").write_text('{"text": "a\\u0000"}\n{"text": "\\ud800"}\n{"text": null}\n{"text": "ok"}')
    reader = documents([tmp_path])
    assert [document.text for document in reader] == ["good", "ok"]
    assert reader.skipped == {
        "not UTF-8": 2,
        "with NUL bytes": 3,
        "empty": 2,
        "JSON but no list of rows with `text`": 1,
    }


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": ', r"a\.jsonl:2: not JSON: .*"),
        ("a.jsonl", "[" * 100_000, r"a\.jsonl:1: not JSON: .*"),
        ("a.jsonl", '{"text": "x"}\n[1]', r"a\.jsonl:2: a row must be an object with a column `text`"),
        ("a.jsonl", '{"content": "x", "url": 1}', r"a\.jsonl:1: no column `text`; the columns are 'content', 'url'"),
        ("a.jsonl", '{"text": 5}', r"a\.jsonl:1: `text` must be a string"),
        ("a.json", '[{"text": "x"}, {}]', r"a\.json, row 2: no column `text`; the columns are "),
        ("a.json", "[", r"a\.json: not JSON: .*"),
        ("a.json", "{}", r"a\.json holds no text: 1 JSON but no list of rows with `text`; give UTF-8.*"),
        ("a.parquet", "PAR1 but not really", r"a\.parquet is damaged or unreadable: .*"),
        ("a.txt", "", r"a\.txt holds no text: 1 empty; give UTF-8, \.jsonl, \.json or \.parquet"),
    ],
)
def test_bad_files_give_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"^[^\n]*{message}$"):
        list(documents([tmp_path / name]))


def test_a_parquet_file_without_text_lists_its_columns(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"], "url": ["y"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: no column `text`; the columns are 'body', 'url'$"):
        list(documents([tmp_path / "a.parquet"]))


def test_missing_paths_are_named_before_anything_is_read(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match=r"no such file or folder: .*absent$"):
        documents([tmp_path / "a.txt", tmp_path / "absent"])


def test_an_empty_folder_holds_no_text(tmp_path):
    with pytest.raises(ValueError, match="holds no text: no file"):
        list(documents([tmp_path]))


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz", "a.json.gz"])
def test_a_bomb_stops_at_the_bound(tmp_path, monkeypatch, name):
    text = "x" * 5000
    content = {"a.txt.gz": text, "a.jsonl.gz": json.dumps({"text": text}), "a.json.gz": json.dumps([{"text": text}])}
    (tmp_path / name).write_bytes(gzip.compress(content[name].encode()))
    assert [document.text for document in documents([tmp_path / name])] == [text]
    monkeypatch.setattr(read, "MAX_BYTES", 4000)
    monkeypatch.setattr(read, "SNIFFED_BYTES", 10)
    with pytest.raises(ValueError, match=r"one document of more than 4,000 bytes; cut it into smaller ones$"):
        list(documents([tmp_path / name]))


def test_a_line_without_end_is_not_read_to_its_end(monkeypatch):
    class Endless:
        def readline(self, size=-1):
            assert size >= 0, "asked for all of it"
            return b"x" * size

    monkeypatch.setattr(read, "MAX_BYTES", 4000)
    with pytest.raises(ValueError, match="more than 4,000 bytes"):
        next(read.json_lines(Endless(), Path("a.jsonl")))


def test_without_the_extra_parquet_says_how_to_get_it(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"wants pyarrow to be read: pip install 'llamita\[data\]'"):
        list(documents([tmp_path]))
