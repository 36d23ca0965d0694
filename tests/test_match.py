"""Layer: files. The search of pairs against a slow twin, and how much of the files its tasks read."""

import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from llamita.data import resolve
from llamita.data.build import build
from llamita.data.collect import RowFiles
from llamita.data.engine import perform
from llamita.data.job import BANDS, HASH, Job, _counts
from llamita.data.recipe import Dedup, Recipe
from llamita.data.resolve import MATCH, match, num_ranges, ways
from tests.fakes import byte_tokenizer

IO = Path("/proc/self/io")
EXACT = Recipe("r", dedup=Dedup(url=True))


def some_job(folder: Path, parts: int, docs: int, names=("exact", "url"), values=2**64, recipe=EXACT) -> Job:
    """A work folder as the stage `read` leaves it, of random hashes, written in blocks of uneven size."""
    rng = np.random.default_rng(0)
    _counts.cache_clear()
    job = Job(folder, recipe, parts)
    (folder / "read").mkdir(parents=True)
    (folder / "match").mkdir()
    for part in range(parts):
        files, left = RowFiles(job, part), docs
        while left:
            size = min(left, int(rng.integers(1, docs)))
            hashes = {name: rng.integers(0, values, size, dtype=np.uint64) for name in names}
            files.write({"size": np.ones(size, np.int64)}, hashes)
            left -= size
        files.close()
        job.path("read", part, "json").write_text(json.dumps({"docs": docs, "bytes": docs, "samples": "x" * 10**5}))
    return job


def pairs_of(job: Job) -> dict[str, set[tuple[int, int]]]:
    found = defaultdict(set)
    for number in range(MATCH.count(job)):
        match(job, number, lambda facts: None)
        found[ways(job)[number // num_ranges(job)][0]] |= set(map(tuple, job.load("match", number, "edges").tolist()))
    return found


@pytest.mark.parametrize("ranges", [1, 3, 7])
def test_pairs_are_those_of_a_slow_twin_in_any_number_of_ranges(tmp_path, monkeypatch, ranges):
    """Hashes of all the width, of which each stands three times on average; 0 is none."""
    job = some_job(tmp_path, 5, 90, values=150)
    for part in range(5):
        for name in ("exact", "url"):
            table = np.fromfile(job.path("read", part, name), HASH)
            assert len(table) <= 90 and 0 not in table["hash"].tolist()
            table["hash"] *= np.uint64(2**64 // 150)
            table.tofile(job.path("read", part, name))
    monkeypatch.setattr(resolve, "MATCH_BYTES", 16 * 450 // ranges + 1)
    assert num_ranges(job) == ranges
    for name, found in pairs_of(job).items():
        first: dict[int, int] = {}
        slow = set()
        for part in range(5):
            table = np.fromfile(job.path("read", part, name), HASH)
            for value, row in sorted(table.tolist(), key=lambda pair: pair[1]):
                place = 90 * part + row
                if first.setdefault(value, place) != place:
                    slow.add((first[value], place))
        assert found == slow and len(slow) > 250


def read_by_tasks(job: Job) -> int:
    """Bytes that all tasks of `match` take out of files, each a process of its own as Slurm's are."""
    before = taken()
    for number in range(MATCH.count(job)):
        _counts.cache_clear()
        match(job, number, lambda facts: None)
    return taken() - before


def taken() -> int:
    return int(IO.read_text().split()[1])


@pytest.mark.skipif(not IO.exists(), reason="how much was read is told by Linux alone")
def test_what_is_read_grows_with_the_documents_and_no_faster(tmp_path, monkeypatch):
    """Four times the text is four times the ranges: were each to read all, it would be sixteen times as much."""
    monkeypatch.setattr(resolve, "MATCH_BYTES", 16 * 32_000)
    found = []
    for parts in (4, 16):
        job = some_job(tmp_path / f"{parts}", parts, 16_000)
        assert num_ranges(job) == 1 + parts // 2
        read_by_tasks(job)  # the first task of all leaves `counts.npy`
        found.append(read_by_tasks(job))
        files = 2 * parts * 16_000 * HASH.itemsize
        assert files <= found[-1] < 1.2 * files, found
    assert found[1] < 4.5 * found[0]


@pytest.mark.skipif(not IO.exists(), reason="how much was read is told by Linux alone")
def test_markers_are_read_by_one_task(tmp_path):
    """They hold samples too; 100 kB each here."""
    job = some_job(tmp_path, 8, 10)
    first, other = (read_by_tasks(job) for _ in range(2))
    assert first > 8 * 10**5 > 10**5 > other


def test_more_documents_than_32_bits_count_are_told_apart(tmp_path, monkeypatch):
    job = some_job(tmp_path, 3, 10, values=7)
    np.save(tmp_path / "counts.npy", np.array([(3 * 10**9, 1)] * 3))
    _counts.cache_clear()
    monkeypatch.setattr(resolve, "MATCH_BYTES", 2**40)
    found = pairs_of(job)["exact"]
    assert {place // (3 * 10**9) for pair in found for place in pair} == {0, 1, 2}
    assert max(place for pair in found for place in pair) >= 6 * 10**9


def test_a_band_is_a_file_and_near_tasks_read_theirs(tmp_path, monkeypatch):
    recipe = replace(EXACT, dedup=Dedup(exact=False, minhash=True))
    job = some_job(tmp_path, 2, 50, names=BANDS, recipe=recipe)
    assert [name for _, name in ways(job)] == list(BANDS) and MATCH.count(job) == len(BANDS)
    for band in BANDS[1:]:
        for part in range(2):
            job.path("read", part, band).unlink()
    perform(MATCH, job, 0)
    with pytest.raises(FileNotFoundError, match=BANDS[1]):
        perform(MATCH, job, 1)


def built(folder: Path, rows: list[dict], recipe: Recipe) -> tuple[dict, list[str]]:
    """What a build did, and the names of what is in the corpus."""
    folder.mkdir()
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    build(recipe, [folder / "a.jsonl"], byte_tokenizer(), folder / "c")
    kept = [name for path in (folder / "c").glob("*.parquet") for name in pq.read_table(path)["name"].to_pylist()]
    return json.loads((folder / "c" / "build.json").read_bytes()), sorted(kept)


@pytest.mark.parametrize(("keep", "kept"), [("first", "a0 b0"), ("longest", "a1 b2"), ("newest", "a2 b1")])
def test_which_of_near_copies_stays_in_a_whole_build(tmp_path, keep, kept):
    """Sizes and dates are in no order in which they could be taken for one another, or for their opposites."""
    text = " ".join(f"word{i}" for i in range(300))
    dates = {"a": ("2019-05-01", "2018-01-01", "2021-03-04"), "b": ("2001", "2022-12-31T23:59:00Z", "2022-12-30")}
    tails = {"a": ("x", "x longest by far", ""), "b": ("y tail", "", "y tail and more")}
    rows = [
        {"text": f"{group} {text} {group}z {tails[group][i]}".replace("word", f"word{group}"), "id": f"{group}{i}",
         "date": dates[group][i]} for i in range(3) for group in "ab"
    ]  # fmt: skip
    found, names = built(tmp_path / keep, rows, Recipe("r", dedup=Dedup(minhash=True, keep=keep)))
    assert names == kept.split() and found["duplicates"] == {"exact": 0, "url": 0, "near": 4}


def test_what_was_cut_out_of_documents_is_counted_in_bytes(tmp_path):
    menu, own = "Home Contact Imprint", [f"Text number {chr(97 + i) * 9} is by itself." for i in range(9)]
    rows = [{"text": f"{menu}\n{line}\n", "id": str(i)} for i, line in enumerate(own)]
    found, names = built(tmp_path / "t", rows, Recipe("r", dedup=Dedup(lines_more_than=6)))
    assert len(names) == 9 and found["cut_bytes"] == 9 * len(f"{menu}\n")
    assert built(tmp_path / "u", rows, Recipe("r"))[0]["cut_bytes"] == 0


@pytest.mark.parametrize("scope", ["global", "source", "language"])
def test_documents_without_an_address_or_words_are_not_alike_for_that(tmp_path, scope):
    """No hash stays none within a scope."""
    rows = [{"text": "?" * (i + 1), "id": str(i), "source": "s", "lang": "en"} for i in range(5)]
    found, names = built(tmp_path / scope, rows, Recipe("r", dedup=Dedup(url=True, minhash=True, scope=scope)))
    assert len(names) == 5 and found["duplicates"] == {"exact": 0, "url": 0, "near": 0}
