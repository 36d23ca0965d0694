"""Layer: arithmetic. Files of every kind become the same documents, and what is left out is counted."""

import bz2
import gzip
import json
import lzma
import os
import pickle
import random
import sys
from dataclasses import astuple

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from llamita.data import read
from llamita.data.engine import Stopped
from llamita.data.read import Document, Part, Skipped, documents, plan_parts, read_part

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
    content = rows_as(kind, tmp_path)
    path.write_bytes(PACK[packed](content))
    lines = content.splitlines(keepends=True)
    places = [0, len(lines[0]), len(lines[0] + lines[1])] if kind == ".jsonl" else [1, 2, 3]
    expected = [Document(text, f"{path.name}:{at}", path.name, "xx") for at, text in zip(places, TEXTS, strict=True)]
    assert list(documents([path])) == expected


@pytest.mark.parametrize("packed", PACK)
def test_a_text_file_is_one_document(tmp_path, packed):
    path = tmp_path / f"poem.txt{packed}"
    path.write_bytes(PACK[packed]("\ufeffline\r\nli\u00f1e\n".encode()))
    assert list(documents([str(path)])) == [Document("line\r\nli\u00f1e\n", path.name, path.name)]


def test_two_frames_of_zstandard_are_one_file(tmp_path):
    (tmp_path / "a.zst").write_bytes(PACK[".zst"](b"one") + PACK[".zst"](b"two"))
    assert [document.text for document in documents([tmp_path / "a.zst"])] == ["onetwo"]


def test_json_files_that_hold_lines_are_read_as_lines(tmp_path):
    """C4 and Dolma name theirs `.json.gz`."""
    (tmp_path / "c4.json.gz").write_bytes(gzip.compress(b'{"text": "a"}\n{"text": "b"}\n'))
    assert [(d.text, d.name) for d in documents([tmp_path / "c4.json.gz"])] == [
        ("a", "c4.json.gz:0"),
        ("b", "c4.json.gz:14"),
    ]


C4 = {"text": "t", "timestamp": "2019-04-25T12:57:54Z", "url": "https://a.org/x"}
FINEWEB = {"text": "t", "id": "<urn:uuid:1>", "url": "u", "date": "2013-05-18T20:31:00Z", "language": "en", "dump": "d"}
DOLMA = {"text": "t", "id": 7, "source": "wiki", "created": "2020", "metadata": {"url": "u", "license": "CC0"}}
REDPAJAMA = {"text": "t", "meta": {"url": "u", "timestamp": "2023", "source": "cc", "language": "de"}}


@pytest.mark.parametrize("kind", [".jsonl", ".parquet"])
@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (C4, Document("t", "NAME", "rows", url="https://a.org/x", date="2019-04-25T12:57:54Z")),
        (FINEWEB, Document("t", "<urn:uuid:1>", "rows", "en", "u", date="2013-05-18T20:31:00Z")),
        (DOLMA, Document("t", "7", "wiki", url="u", license="CC0", date="2020")),
        (REDPAJAMA, Document("t", "NAME", "cc", "de", "u", date="2023")),
    ],
)
def test_rows_of_published_sets_say_where_they_are_from(tmp_path, kind, row, expected):
    root = tmp_path / "rows"
    root.mkdir()
    if kind == ".jsonl":
        (root / "a.jsonl").write_text(json.dumps(row))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), root / "a.parquet")
    name = "rows/a.jsonl:0" if kind == ".jsonl" else "rows/a.parquet:1"
    wanted = [name if value == "NAME" else value for value in astuple(expected)]
    assert [list(astuple(document)) for document in documents([root])] == [wanted]


def test_what_a_row_says_goes_to_terminals_and_files(tmp_path):
    row = {"text": "t", "id": "a\n\x1b[2J", "lang": 3, "source": None, "url": "\ud800" + "x" * 5000, "license": ["MIT"]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n\n" + '{"text": "u"}')
    assert list(documents([tmp_path / "a.jsonl"])) == [
        Document("t", "a??[2J", "a.jsonl", url="?" + "x" * 2047),
        Document("u", f"a.jsonl:{len(json.dumps(row)) + 2}", "a.jsonl"),
    ]


def test_pages_are_extracted_wherever_they_stand(tmp_path):
    pytest.importorskip("resiliparse")
    body = "<p>" + "A sentence that is about something. " * 20 + "</p>"
    page = f"<html><body><nav><a href='/'>Home</a></nav><article>{body}</article></body></html>"
    (tmp_path / "a.html").write_text(page)
    (tmp_path / "b.jsonl").write_text(json.dumps({"html": page, "url": "u"}))
    found = list(documents([tmp_path]))
    assert [(d.name.rpartition("/")[2], d.url) for d in found] == [("a.html", ""), ("b.jsonl:0", "u")]
    assert found[0].text == found[1].text and found[0].text.startswith("A sentence") and "<" not in found[0].text


def test_a_folder_is_walked_by_name(tmp_path):
    root = tmp_path / "code"
    for name in ("b.py", "a/z.md", "a/y/x", "a-b/c", "c", ".git/config", "a/.hidden"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    (root / "a" / "loop").symlink_to(root)
    (root / "self").symlink_to(root / "self")
    os.mkfifo(root / "pipe")
    reader = documents([root])
    assert [(d.text, d.name, d.source) for d in reader] == [
        (name, f"code/{name}", "code") for name in ("a/y/x", "a/z.md", "a-b/c", "b.py", "c")
    ]
    assert reader.skipped == {"not a file": 2}
    assert reader.examples == {"not a file": ["code/pipe", "code/self"]}


def test_stores_are_read_like_folders(tmp_path):
    import fsspec

    for name, text in {
        "b.txt": "b",
        "a/z.txt": "z",
        "a-b/c.txt": "c",
        ".git/x": "no",
        "d.jsonl": '{"text": "d"}',
    }.items():
        (tmp_path / "box" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "box" / name).write_text(text)
        fsspec.filesystem("memory").pipe(f"/box/{name}", text.encode())
    local = list(documents([tmp_path / "box"]))
    assert [document.text for document in local] == ["z", "c", "b", "d"]
    assert list(documents([f"file://{tmp_path}/box"])) == local
    assert list(documents(["memory://box"])) == local
    assert [document.name for document in documents(["memory://box/b.txt"])] == ["b.txt"]
    with pytest.raises(ValueError, match=r"^no such file or folder: memory://nothing$"):
        documents(["memory://nothing"])
    parts = plan_parts(["memory://box"], 1)
    fsspec.filesystem("memory").rm("/box/b.txt")
    with pytest.raises(Stopped, match=r"^memory://.*box/b\.txt cannot be read now: "):
        [document for part in parts for document in read_part(part, Skipped())]


def rough_lines(seed):
    """JSON lines with everything that may stand between them, and how the file may end."""
    rng = random.Random(seed)
    lines = [json.dumps({"text": chr(rng.randrange(97, 0x3000)) * rng.randrange(1, 90), "id": i}) for i in range(40)]
    lines[rng.randrange(40)] = json.dumps({"text": "long " * 200, "id": "long"})
    ends = ["\n", "\r\n", "\n\n", " \n", "\n \n"]
    content = "".join(line + rng.choice(ends) for line in lines)
    return (content if rng.random() < 0.5 else content.rstrip()).encode()


@pytest.mark.parametrize("part_bytes", [1, 7, 64, 333, 1000, 10**9])
def test_parts_joined_are_the_whole_whatever_their_size(tmp_path, part_bytes):
    root = tmp_path / "in"
    root.mkdir()
    (root / "a.jsonl").write_bytes(rough_lines(part_bytes))
    (root / "b.txt").write_text("text of a file\n")
    (root / "c.jsonl.gz").write_bytes(gzip.compress(rough_lines(1)))
    (root / "empty.ndjson").write_bytes(b"")
    table = pyarrow.Table.from_pylist([{"text": f"row {i} " * 20} for i in range(30)])
    pyarrow.parquet.write_table(table, root / "d.parquet", row_group_size=4)
    whole, left_out = documents([root]), Skipped()
    parts = plan_parts([root], part_bytes)
    assert all(part.num_bytes <= part_bytes or len(part.pieces) == 1 for part in parts)
    parts = [Part.from_json(json.loads(json.dumps(pickle.loads(pickle.dumps(part)).to_json()))) for part in parts]
    assert parts == plan_parts([root], part_bytes)
    assert list(whole) == [document for part in parts for document in read_part(part, left_out)]
    assert whole.skipped == left_out.counts
    assert len({document.name for document in documents([root])}) >= 70
    assert len(parts) > 3 or part_bytes > 500


def test_a_line_that_begins_just_where_a_part_does_is_read_once(tmp_path):
    """Negative control: with the byte before it not looked at, the line would be taken for the rest of another."""
    line = b'{"text": "0123456789"}\n'
    (tmp_path / "a.jsonl").write_bytes(line * 6)
    parts = plan_parts([tmp_path / "a.jsonl"], len(line))
    assert [len(list(read_part(part, Skipped()))) for part in parts] == [1] * 6


def test_a_plan_depends_on_names_and_sizes_alone(tmp_path):
    (tmp_path / "a.jsonl").write_text("x" * 1000)
    (tmp_path / "b.parquet").write_text("y" * 1000)
    before = plan_parts([tmp_path], 300)
    (tmp_path / "a.jsonl").write_text("z" * 1000)
    assert plan_parts([tmp_path], 300) == before
    ranges = [(piece.name.rpartition("/")[2], piece.start, piece.end) for part in before for piece in part.pieces]
    steps = [(0, 300), (300, 600), (600, 900), (900, 1000)]
    assert ranges == [(name, *step) for name in ("a.jsonl", "b.parquet") for step in steps]


def test_small_files_share_parts(tmp_path):
    for number in range(10):
        (tmp_path / f"{number}.txt").write_text("x" * 100)
    assert [len(part.pieces) for part in plan_parts([tmp_path], 350)] == [3, 3, 3, 1]


def test_the_share_read_grows_to_one(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": "x" * 5000}) + "\n" for _ in range(2000)))
    (tmp_path / "b.txt").write_text("y" * 10**6)
    reader, shares = documents([tmp_path]), []
    for _ in reader:
        shares.append(reader.share_read)
    assert shares == sorted(shares) and len(set(shares)) > 5 and shares[0] < 0.1 and reader.share_read == 1


def test_a_large_text_is_cut_at_ends_of_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(read, "TEXT_BYTES", 100)
    monkeypatch.setattr(read, "SNIFFED_BYTES", 10)
    text = "".join(f"line {i} \u4e09\n" for i in range(50)) + "\u4e09" * 200
    (tmp_path / "book.txt").write_text(text)
    found = list(documents([tmp_path / "book.txt"]))
    assert "".join(document.text for document in found) == text
    assert [document.name for document in found] == [f"book.txt:{i}" for i in range(len(found))]
    assert all(len(document.text.encode()) <= 100 for document in found)
    assert all(document.text.endswith("\n") for document in found[:6])
    (tmp_path / "small.txt").write_text("x" * 100)
    assert [document.name for document in documents([tmp_path / "small.txt"])] == ["small.txt"]


def test_missing_paths_are_named_before_anything_is_read(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match=r"no such file or folder: .*absent$"):
        documents([tmp_path / "a.txt", tmp_path / "absent"])


def test_input_without_text_says_what_it_is(tmp_path):
    with pytest.raises(ValueError, match="holds no text: no file; give UTF-8"):
        list(documents([tmp_path]))
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"], "url": ["y"]}), tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text('{"content": "x"}\n' * 3)
    with pytest.raises(ValueError, match=r"4 rows without `text` \(.*a\.parquet: its columns are 'body', 'url'; .*b\."):
        list(documents([tmp_path]))


def test_without_the_extra_a_file_says_how_to_get_it(tmp_path, monkeypatch):
    (tmp_path / "plain.txt").write_text("core alone")
    (tmp_path / "rows.jsonl").write_text('{"text": "core alone"}')
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "resiliparse", None)
    assert [document.text for document in documents([tmp_path])] == ["core alone"] * 2
    for name, wanted in {"a.parquet": "pyarrow", "a.html": "resiliparse", "a.zst": "pyarrow"}.items():
        (tmp_path / name).write_bytes(b"PAR1")
        with pytest.raises(ValueError, match=rf"{name} wants {wanted} to be read: pip install 'llamita\[data\]'"):
            list(documents([tmp_path / name]))


def test_what_was_left_out_can_be_added_up():
    one, two = Skipped(), Skipped()
    for number in range(7):
        one.add("empty", f"a:{number}")
    two.add("empty", "b")
    two.add("not UTF-8", "c\n")
    one.add_facts(json.loads(json.dumps(two.facts())))
    assert one.facts() == {
        "empty": {"count": 8, "examples": [f"a:{number}" for number in range(5)]},
        "not UTF-8": {"count": 1, "examples": ["c?"]},
    }
    assert pickle.loads(pickle.dumps(one)) == one
