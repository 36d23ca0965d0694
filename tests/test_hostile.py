"""Layer: arithmetic. Input made to break a reader is counted and passed over, in bounded memory."""

import bz2
import gzip
import json
import lzma
import os
import random
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from llamita.data import document, files, read, rows
from llamita.data.read import Skipped, documents, plan_parts, read_part

ROOT = Path(__file__).resolve().parents[1]
PACK = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


def outcome(folder):
    """Texts of all parts of a folder and what has been left out."""
    left_out = Skipped()
    texts = [found.text for part in plan_parts([folder]) for found in read_part(part, left_out)]
    return texts, left_out


def test_files_that_are_no_text_are_counted(tmp_path):
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "late.bin").write_bytes(b"a" * read.SNIFFED_BYTES + b"\0")
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "package.json").write_text('{\n"name": "x"\n}')
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / os.fsdecode(b"bad\xffname.txt")).write_text(" ")
    texts, left_out = outcome(tmp_path)
    assert texts == ["good"]
    assert left_out.counts == {
        "not UTF-8": 1,
        "with NUL bytes": 2,
        "empty": 3,
        "JSON but no rows with `text`": 1,
        "not a file": 3,
    }
    json.dumps(left_out.facts()).encode()
    assert left_out.examples["empty"][0] == f"{tmp_path.name}/bad?name.txt"


ROWS = {
    "not JSON": [
        b'{"text": ', b"[" * 100_000, b'{"a":' * 100_000, b'{"text": "x"} {}', b'{"n": ' + b"9" * 9999 + b"}",
    ],
    "rows that are no object": [b"[1]", b"null", b'"x"', b"NaN"],
    "rows without `text`": [b'{"content": "x"}', b"{}"],
    "rows whose `text` is no string": [b'{"text": 5}', b'{"text": ["a"]}', b'{"text": NaN}'],
    "not UTF-8": [b'{"text": "\xff"}', b'{"text": "\\ud800"}', b'{"text": "\xed\xa0\x80"}', b"\0" * 50],
    "with NUL bytes": [b'{"text": "a\\u0000"}'],
    "empty": [b'{"text": null}', b'{"text": ""}', b'{"text": " \\n"}', b"  "],
}  # fmt: skip


@pytest.mark.parametrize("packing", ["", ".gz"])
def test_bad_rows_cost_no_other_row(tmp_path, packing):
    good = b'{"text": "ok"}\n'
    bad = [row for reason in ROWS.values() for row in reason]
    content = good + b"".join(row + b"\n" + good for row in bad)
    (tmp_path / f"a.jsonl{packing}").write_bytes(PACK[packing](content) if packing else content)
    texts, left_out = outcome(tmp_path)
    assert texts == ["ok"] * (len(bad) + 1)
    assert left_out.counts == {reason: len(listed) for reason, listed in ROWS.items()}
    assert all(len(shown) <= files.MAX_EXAMPLES for shown in left_out.examples.values())
    assert max(map(len, left_out.examples["not JSON"])) < 300


@pytest.mark.parametrize("row", ["x", 1, None, [], {"text": 1}, {"text": {}}, {"html": 3}])
def test_rows_of_other_types_in_lists_are_counted(tmp_path, row):
    (tmp_path / "a.json").write_text(json.dumps([{"text": "ok"}, row, {"text": "ok"}]))
    texts, left_out = outcome(tmp_path)
    assert texts == ["ok"] * 2 and left_out.counts.total() == 1


@pytest.mark.parametrize("content", ["[", "[" * 100_000, '[{"text": "x"}', "\x00", '{"a": [', ""])
def test_broken_lists_are_counted(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    (tmp_path / "b.txt").write_text("ok")
    texts, left_out = outcome(tmp_path)
    assert texts == ["ok"] and left_out.counts.total() == 1


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".json", ".parquet"])
def test_packed_files_cut_short_or_changed_are_counted(tmp_path, kind, packing):
    rng = random.Random(3)
    content = "".join(json.dumps({"text": rng.randbytes(500).hex()}) + "\n" for _ in range(300)).encode()
    whole = PACK[packing](content)
    changed = bytearray(whole)
    for _ in range(5):
        changed[rng.randrange(len(whole))] ^= 1 + rng.randrange(255)
    for number, bad in enumerate(
        [whole[:-20], whole[: len(whole) // 2], bytes(changed), b"", b"no " + packing.encode()]
    ):
        (tmp_path / f"{number}{kind}{packing}").write_bytes(bad)
    (tmp_path / "z.txt").write_text("ok")
    texts, left_out = outcome(tmp_path)
    assert texts[-1] == "ok" and left_out.counts.total() >= 3, left_out  # zstd needs no checksum
    if kind == ".jsonl" and packing == ".gz":
        assert len(texts) > 300, "lines before the damage were lost"


EMPTY = [*(f"a{kind}" for kind in (".jsonl", ".json", ".warc", ".html", ".txt", ".parquet")), "a.zst", "a.jsonl.zst"]


@pytest.mark.parametrize("name", [*EMPTY, "rows.json", "rows.parquet", "packed.jsonl.gz"])
def test_a_file_that_gives_no_document_is_counted_once(tmp_path, name):
    pytest.importorskip("fastwarc")
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], "string")}), tmp_path / "rows.parquet")
    (tmp_path / "rows.json").write_text("[]")
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(b""))
    for empty in EMPTY:
        (tmp_path / empty).write_bytes(b"")
    left_out = Skipped()
    found = [found for part in plan_parts([tmp_path / name]) for found in read_part(part, left_out)]
    assert not found and left_out.counts.total() == 1 and left_out.examples.popitem()[1][0].startswith(name)


def test_a_range_in_which_no_line_begins_is_no_empty_file(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x" * 500}) + "\n")
    left_out = Skipped()
    assert len([found for part in plan_parts([tmp_path], 100) for found in read_part(part, left_out)]) == 1
    assert not left_out.counts


def test_folders_without_permission_are_counted(tmp_path, monkeypatch):
    """Root may read all, so the refusal is made here: of a folder to be listed, of a file to be looked at."""
    for name in ("a/hidden.txt", "b/veiled.txt", "c/good.txt"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("words")
    listed, asked = Path.iterdir, os.stat

    def iterdir(self):
        if self.name == "a":
            raise PermissionError(13, "Permission denied", str(self))
        return listed(self)

    def stat(path, **more):
        if str(path).endswith("veiled.txt"):
            raise PermissionError(13, "Permission denied", str(path))
        return asked(path, **more)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    monkeypatch.setattr(os, "stat", stat)
    texts, left_out = outcome(tmp_path)
    assert texts == ["words"] and left_out.counts == {"without permission to read": 2}
    assert left_out.examples["without permission to read"] == [
        f"{tmp_path.name}/{name}" for name in ("a", "b/veiled.txt")
    ]


def test_damaged_tables_are_counted(tmp_path):
    rng = random.Random(4)
    table = pyarrow.table({"text": [rng.randbytes(30).hex() for _ in range(500)], "url": [str(i) for i in range(500)]})
    pyarrow.parquet.write_table(table, tmp_path / "z.parquet", row_group_size=50)
    whole = (tmp_path / "z.parquet").read_bytes()
    for number in range(60):
        bad = bytearray(whole)
        for _ in range(rng.choice([1, 10])):
            bad[-1 - rng.randrange(3000 if number % 2 else len(bad))] = rng.randrange(256)
        (tmp_path / f"{number}.parquet").write_bytes(bad[: rng.randrange(len(bad))] if number % 7 == 0 else bad)
    texts, left_out = outcome(tmp_path)
    assert texts[-500:] == table["text"].to_pylist()
    assert left_out.counts["damaged or unreadable"] > 20


def test_dates_that_python_does_not_know_stop_nothing(tmp_path):
    far = pyarrow.array([2**62, 1, None], pyarrow.timestamp("ns"))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b", "c"], "date": far}), tmp_path / "a.parquet")
    nested = pyarrow.StructArray.from_arrays([far], ["date"])
    pyarrow.parquet.write_table(pyarrow.table({"text": ["d", "e", "f"], "meta": nested}), tmp_path / "b.parquet")
    left_out = Skipped()
    found = [found for part in plan_parts([tmp_path]) for found in read_part(part, left_out)]
    assert [(document.text, document.date[:10]) for document in found] == [
        ("a", "2116-02-20"), ("b", "1970-01-01"), ("c", ""),
    ]  # fmt: skip
    assert left_out.counts == {"damaged or unreadable": 1}


def test_tables_of_wrong_types_are_counted(tmp_path):
    bad = pyarrow.array([b"good", b"\xff\xfe", None], pyarrow.binary())
    not_utf8 = pyarrow.StringArray.from_buffers(3, *bad.buffers()[1:], bad.buffers()[0])
    columns = {
        "a": {"text": pyarrow.array([1, 2])},
        "b": {"text": pyarrow.array([b"x"])},
        "c": {"text": not_utf8},
        "d": {"text": pyarrow.array([None], pyarrow.null())},
        "e": {"text": pyarrow.array(["dict", "dict"]).dictionary_encode(), "id": pyarrow.array([[1], [2]])},
        "g": {"text": [["list"]], "meta": [{"url": ["list"], "date": "d"}]},
        "f": {"text": ["meta"], "meta": ["no struct"], "date": pyarrow.array([None], "int8")},
    }
    for name, table in columns.items():
        pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / f"{name}.parquet")
    texts, left_out = outcome(tmp_path)
    assert texts == ["good", "dict", "dict", "meta"]
    assert left_out.counts == {"rows whose `text` is no string": 4, "not UTF-8": 1, "empty": 2}


@pytest.mark.parametrize("split", [10**9, 777])
def test_a_line_that_is_too_long_is_passed_over(tmp_path, monkeypatch, split):
    monkeypatch.setattr(rows, "MAX_BYTES", 1000)
    monkeypatch.setattr(rows, "BUFFER_BYTES", 64)
    lines = [b'{"text": "a"}', b'{"text": "' + b"x" * 5000 + b'"}', b'{"text": "b"}', b"y" * 3000]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    left_out = Skipped()
    texts = [found.text for part in plan_parts([tmp_path], split) for found in read_part(part, left_out)]
    assert texts == ["a", "b"]
    assert left_out.counts == {"longer than 1,000 bytes": 2}
    assert left_out.examples["longer than 1,000 bytes"][0].endswith("a.jsonl:14")


def test_a_row_of_a_table_that_is_too_long_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(document, "MAX_BYTES", 1000)
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "x" * 1001, "b"]}), tmp_path / "a.parquet")
    assert outcome(tmp_path)[0] == ["a", "b"]


@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".json"])
def test_what_unpacks_to_far_more_than_any_text_ends(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(files, "FREE_BYTES", 10**6)
    monkeypatch.setattr(rows, "MAX_BYTES", 10**5)
    (tmp_path / f"a{kind}.gz").write_bytes(gzip.compress(b" " * 4 * 10**7))
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"ok"))
    texts, left_out = outcome(tmp_path)
    assert texts == ["ok"]
    assert "unpacks to more than 500 times its size" in str(left_out.examples["damaged or unreadable"])


@pytest.mark.parametrize("kind", [".txt", ".jsonl"])
def test_packed_zeros_are_not_unpacked_to_their_end(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(rows, "MAX_BYTES", 10**5)
    taken = []
    monkeypatch.setattr(files._Unpacked, "readinto", counted(files._Unpacked.readinto, taken))
    (tmp_path / f"a{kind}.gz").write_bytes(gzip.compress(b"\0" * 10**8, 1))
    assert outcome(tmp_path)[0] == []
    assert 0 < sum(taken) < 10**6


def counted(function, sizes):
    def call(self, into):
        sizes.append(function(self, into))
        return sizes[-1]

    return call


def test_pages_nested_deeply_are_counted(tmp_path):
    pytest.importorskip("resiliparse")
    (tmp_path / "a.html").write_text("<div>" * 100_000 + "x")
    (tmp_path / "b.jsonl").write_text(json.dumps({"html": "<b>" * 100_000}) + '\n{"html": ""}\n{"text": "ok"}')
    texts, left_out = outcome(tmp_path)
    assert texts == ["ok"] and left_out.counts.total() == 3
    assert all(reason.startswith("web pages: ") for reason in left_out.counts)


MEMORY = """
import sys
from llamita.data.read import Skipped, plan_parts, read_part
left_out, texts = Skipped(), []
peak = lambda: int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
before = peak()
for part in plan_parts(sys.argv[1:]):
    texts += [len(found.text) for found in read_part(part, left_out)]
print(len(texts), left_out.counts.total(), (peak() - before) // 1024)
"""


def in_another_process(path):
    """(texts, left out, MiB that memory grew by) of reading a file."""
    done = subprocess.run([sys.executable, "-c", MEMORY, path], cwd=ROOT, capture_output=True, text=True, check=True)
    return tuple(map(int, done.stdout.split()))


def test_a_line_of_a_gigabyte_is_read_in_little_memory(tmp_path):
    with (tmp_path / "a.jsonl").open("wb") as file:
        file.write(b'{"text": "first"}\n{"text": "')
        file.seek(2**30, os.SEEK_CUR)  # sparse: zeros that take no place
        file.write(b'"}\n{"text": "last"}\n')
    texts, left_out, grown = in_another_process(tmp_path / "a.jsonl")
    assert (texts, left_out) == (2, 1)
    assert grown < 300, f"{grown} MiB"


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.txt.gz", "a.json.gz"])
def test_a_packed_gigabyte_is_read_in_little_memory(tmp_path, name):
    with gzip.open(tmp_path / name, "wb", 1) as file:
        file.write(b'{"text": "' if "json" in name else b"first ")
        for number in range(1024):
            file.write((str(number) * 2**20)[: 2**20].encode())
    texts, left_out, grown = in_another_process(tmp_path / name)
    assert (texts, left_out) == {"a.txt.gz": (65, 0)}.get(name, (0, 1))
    assert grown < 300, f"{grown} MiB"


def test_a_table_that_repeats_one_long_text_is_read_in_little_memory(tmp_path):
    """3 GB of text out of a kilobyte: of its size, a table says only that of the dictionary."""
    texts = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 1500, "int32"), ["ab " * 700_000])
    pyarrow.parquet.write_table(
        pyarrow.table({"text": texts}), tmp_path / "a.parquet", compression="zstd", dictionary_pagesize_limit=2**30
    )
    assert (tmp_path / "a.parquet").stat().st_size < 3000
    texts, left_out, grown = in_another_process(tmp_path / "a.parquet")
    assert (texts, left_out) == (1500, 0)
    assert grown < 500, f"{grown} MiB"


def test_the_memory_of_another_process_is_measured(tmp_path):
    """Negative control of those above: a text that is kept shows."""
    (tmp_path / "a.txt").write_bytes(b"x" * 15 * 2**20)
    texts, left_out, grown = in_another_process(tmp_path / "a.txt")
    assert (texts, left_out) == (1, 0) and grown >= 15


def test_a_reader_of_nothing_but_damage_says_so_in_one_line(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": \n' * 9)
    (tmp_path / "b.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(
        ValueError,
        match=r"^[^\n]* holds no text: 9 not JSON \([^\n;]+a.jsonl:0: [^\n;]+; [^\n;]+; [^\n;]+\), 1 damaged [^\n]+$",
    ):
        list(documents([tmp_path]))
