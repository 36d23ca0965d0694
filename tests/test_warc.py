"""Layer: arithmetic. Web archives, good and damaged, give the pages that can be read of them."""

import gzip
import io
import random
import tarfile
import zlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from llamita.data import document, warc
from llamita.data.read import Skipped, documents, plan_parts, read_part

pytest.importorskip("fastwarc")
pytest.importorskip("resiliparse")
SAMPLES = Path(__file__).resolve().parents[2] / "shared/data/html/warc_samples.tar.xz"


def page(words):
    text = f"{words} stand in a sentence of the article. " * 10
    return f"<html><body><article><p>{text}</p></article></body></html>".encode()


def answer(body, status=200, kind="text/html; charset=utf-8", **headers):
    lines = [f"HTTP/1.1 {status} Told", f"Content-Type: {kind}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def record(url, http, type="response", kind="application/http; msgtype=response"):
    head = f"WARC/1.0\r\nWARC-Type: {type}\r\nWARC-Target-URI: {url}\r\nWARC-Date: 2020-01-02T03:04:05Z\r\n"
    return f"{head}Content-Type: {kind}\r\nContent-Length: {len(http)}\r\n\r\n".encode() + http + b"\r\n\r\n"


def read(folder, content, name="a.warc.gz"):
    (folder / name).write_bytes(content)
    left_out = Skipped()
    (part,) = plan_parts([folder / name])
    return list(read_part(part, left_out)), left_out


def packed(*records):
    return b"".join(map(gzip.compress, records))


def test_pages_of_an_archive_know_where_and_when_they_were_found(tmp_path):
    good, plain = (
        record("http://a.org/1", answer(page("Words"))),
        record("u", b"Plain w\xc3\xb6rds", "conversion", "text/plain"),
    )
    found, left_out = read(
        tmp_path, packed(good, record("http://a.org/1", b"GET / HTTP/1.1\r\n\r\n", "request"), plain)
    )
    first, second = found
    assert (first.name, first.source, first.url, first.date) == (
        "a.warc.gz:1", "a.warc.gz", "http://a.org/1", "2020-01-02T03:04:05Z",
    )  # fmt: skip
    assert first.text.startswith("Words stand") and "<" not in first.text
    assert (second.text, second.name) == ("Plain wörds", "a.warc.gz:2")
    assert not left_out.counts


@pytest.mark.parametrize("name", ["a.warc", "a.warc.gz", "a.warc.zst", "a.wet.gz"])
def test_archives_are_read_however_they_are_packed(tmp_path, name):
    import zstandard

    records = [record(f"u{i}", answer(page(f"Words{i}"))) for i in range(3)]
    pack = {".gz": gzip.compress, "zst": zstandard.ZstdCompressor().compress}.get(name[-3:], bytes)
    found, _ = read(tmp_path, b"".join(map(pack, records)), name)
    assert [document.url for document in found] == ["u0", "u1", "u2"]


def test_what_is_no_page_is_counted(tmp_path):
    records = [
        record("u", answer(b"gone", 404)),
        record("u", answer(b"{}", kind="application/json")),
        record("u", b"\x89PNG", "resource", "image/png"),
        record("u", b"\xff\xfe", "conversion", "text/plain"),
        record("u", answer(b"<html></html>")),
        record("u", answer(b"x", Content_Encoding="br")),
        record("metadata://wget", b"a log", "resource", "text/plain"),
        record("good", answer(page("Words"))),
    ]
    found, left_out = read(tmp_path, packed(*records))
    assert [document.url for document in found] == ["good"]
    assert left_out.counts == {
        "archived answers that are no page found": 1,
        "archived files that are no text": 3,
        "archived pages that are damaged": 1,
        "not UTF-8": 1,
        "web pages: no text": 1,
    }


@pytest.mark.parametrize("transfer", ["", "chunked"])
@pytest.mark.parametrize("encoding", ["", "gzip", "deflate"])
def test_answers_are_unpacked(tmp_path, encoding, transfer):
    body = {"": bytes, "gzip": gzip.compress, "deflate": zlib.compress}[encoding](page("Words"))
    headers = {"Content_Encoding": encoding} if encoding else {}
    if transfer:
        headers["Transfer_Encoding"] = "chunked"
        body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    found, _ = read(tmp_path, packed(record("u", answer(body, **headers))))
    assert found[0].text.startswith("Words stand")


@pytest.mark.parametrize("transfer", ["", "chunked"])
@pytest.mark.parametrize("pack", [gzip.compress, zlib.compress])
def test_a_packed_page_that_ends_too_soon_is_damaged(tmp_path, pack, transfer):
    """The record is as long as it says; of the page in it the end was never sent."""
    headers = {"Content_Encoding": "gzip"} | ({"Transfer_Encoding": "chunked"} if transfer else {})
    records = []
    for body in (pack(page("Cut"))[:-20], pack(page("Whole"))):
        body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if transfer else body
        records.append(record("u", answer(body, **headers)))
    found, left_out = read(tmp_path, packed(*records))
    assert [document.text.split()[0] for document in found] == ["Whole"]
    assert left_out.counts == {"archived pages that are damaged": 1}


def test_a_bomb_in_an_answer_costs_neither_memory_nor_the_records_after_it(tmp_path, monkeypatch):
    monkeypatch.setattr(warc, "MAX_BYTES", 10_000)
    records = [record("bomb", answer(gzip.compress(b"<p>" + b" " * 10**7), Content_Encoding="gzip"))]
    records += [record("large", answer(b"x" * 10**6)), record("good", answer(page("Words")))]
    found, left_out = read(tmp_path, packed(*records))
    assert [document.url for document in found] == ["good"]
    assert left_out.counts == {"longer than 10,000 bytes": 2}


def test_an_answer_is_unpacked_no_further_than_allowed(monkeypatch):
    monkeypatch.setattr(warc, "MAX_BYTES", 10_000)
    bomb = gzip.compress(b" " * 10**6)
    record = SimpleNamespace(reader=io.BytesIO(bomb), content_length=len(bomb))
    assert len(warc.content(record, {"Content-Encoding": "gzip"})) == 10_001


def test_an_archive_cut_short_gives_what_comes_before(tmp_path):
    rng = random.Random(1)
    records = [record(f"u{i}", answer(page(rng.randbytes(3000).hex()))) for i in range(5)]
    whole = packed(*records)
    found, left_out = read(tmp_path, whole[: len(whole) - len(packed(records[4])) // 2])
    assert [document.url for document in found] == ["u0", "u1", "u2", "u3"]
    assert left_out.counts == {"archived pages that are damaged": 1}


def arc(url, body):
    return f"{url} 1.2.3.4 20140216050221 text/html {len(body)}\n".encode() + body + b"\n"


def test_the_old_format_is_read_too(tmp_path):
    records = [
        arc("filedesc://a.arc", b"1 0 Somebody\nURL IP-address Archive-date Content-type Archive-length\n"),
        arc("http://a.org/with space", answer(page("Words"), kind='text/html; charset="iso-8859-1"')),
        arc("http://a.org/gone", answer(b"", 404)),
        arc("http://a.org/2", answer(page("Others"))),
    ]
    found, left_out = read(
        tmp_path, b"".join(records) + b"http://cut 1.2.3.4 20140216050221 text/html 999\nHTTP", "a.arc"
    )
    assert [(d.url, d.date, d.name) for d in found] == [
        ("http://a.org/with space", "2014-02-16T05:02:21Z", "a.arc:2"),
        ("http://a.org/2", "2014-02-16T05:02:21Z", "a.arc:4"),
    ]
    assert left_out.counts == {"archived answers that are no page found": 1, "damaged or unreadable": 1}


@pytest.fixture(scope="module")
def samples():
    if not SAMPLES.exists():
        pytest.skip("shared/data/html is not here")
    with tarfile.open(SAMPLES) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}


def test_real_archives_give_their_pages(tmp_path, samples):
    texts, reasons = {}, Counter()
    for name, content in samples.items():
        found, left_out = read(tmp_path, content, name)
        texts[name] = [document.text for document in found]
        reasons += left_out.counts
    example = [name for name, found in texts.items() if found and "illustrative examples" in found[0]]
    assert sorted(example) == [
        "example-bad-non-chunked.warc.gz", "example-resource.warc.gz", "example-wget-bad-target-uri.warc.gz",
        "example-wrong-chunks.warc.gz", "example.arc", "example.arc.gz", "example.warc", "example.warc.gz",
    ]  # fmt: skip
    assert len({tuple(texts[name]) for name in example}) == 1
    assert "Root Zone trust anchor" in texts["example-iana.org-chunked.warc"][0]
    assert reasons["damaged or unreadable"] == 3 and reasons["archived files that are no text"] == 6
    assert reasons["archived pages that are damaged"] == 1, "example-trunc.warc"


def test_damage_anywhere_is_counted_and_never_raised(tmp_path, samples):
    rng = random.Random(2)
    outcomes = Counter()
    for name, content in samples.items():
        for trial in range(12):
            damaged = bytearray(content if trial % 2 else gzip.decompress(content) if name.endswith("gz") else content)
            for _ in range(rng.choice([1, 5, 40])):
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
            found, left_out = read(
                tmp_path, bytes(damaged[: rng.randrange(len(damaged))] if trial > 8 else damaged), name
            )
            outcomes["read"] += len(found)
            outcomes["left out"] += left_out.counts.total()
    assert outcomes["read"] > 20 and outcomes["left out"] > 50


def test_the_library_still_loses_records_after_a_page_it_unpacked_in_part():
    """Why `content` unpacks by itself. When this fails, it need not any more."""
    from fastwarc.warc import ArchiveIterator

    squeezed = zlib.compressobj(9, zlib.DEFLATED, 31)
    bomb = b"".join(squeezed.compress(b" " * 2**20) for _ in range(256)) + squeezed.flush()
    stream = io.BytesIO(record("bomb", answer(bomb, Content_Encoding="gzip")) + record("good", answer(page("Words"))))
    with pytest.raises(OSError, match="Invalid WARC header"):
        for found in ArchiveIterator(stream, auto_decode="all"):
            found.reader.read(2**20)


def test_extraction_that_is_not_installed_is_no_fault_of_the_page(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "trafilatura", None)
    (tmp_path / "a.html").write_bytes(page("Words"))
    (part,) = plan_parts([tmp_path / "a.html"])
    with pytest.raises(ValueError, match="trafilatura"):
        list(read_part(part, Skipped(), extract="precise"))
    assert list(documents([tmp_path / "a.html"]))
    assert document.of_html(page("Words"), "", "a", Skipped(), "fast")
