"""Layer: arithmetic. The plan of a large build against numbers worked out by hand, and what it refuses."""

import json
from dataclasses import replace

import pytest

from llamita.cli import data as verbs
from llamita.config import to_dict
from llamita.data.build import build
from llamita.data.recipe import RECIPES, Rules, recipe
from llamita.plan.data import BUILD, PARTS, SPEEDS, Speed, Yields, measured, plan, stages, text
from tests.fakes import byte_tokenizer

SIZES = {"part_bytes": 2**25, "shard_tokens": 2**26}
TIMES = {
    "read": {"cpu_seconds": 8.0, "bytes": 100_000_000},
    "match": {"cpu_seconds": 0, "bytes": 50_000_000},
    "encode": {"cpu_seconds": 2.0, "bytes": 50_000_000},
}
FACTS = {
    "read": {"docs_in": 1000, "bytes_in": 100_000_000, "docs": 700, "bytes": 50_000_000},
    "kept": {"docs": 500, "tokens": 10_000_000},
    "shares": {"source": {"a": {"docs": 1, "bytes": 30_000_000, "tokens": 1}, "b": {"docs": 2, "bytes": 10_000_000}}},
}  # fmt: skip


def rows(found):
    return {row.stage: row for row in found.rows}


def test_fifteen_trillion_tokens_are_what_fineweb_says():
    found = plan(15e12, 192, PARTS, SPEEDS, Yields(), **SIZES, dumps=True)
    by_stage = rows(found)
    assert list(by_stage) == list(PARTS)
    assert by_stage["shards"].input_bytes == pytest.approx(63e12)
    assert by_stage["language"].input_bytes == pytest.approx(36 / 15 * 63e12)
    assert by_stage["hashes"].input_bytes == pytest.approx(27 / 15 * 63e12, rel=0.01)
    assert by_stage["extract"].input_bytes == pytest.approx(96 * 400e12)
    assert (found.builds, found.documents, found.shards) == (96, 15e9, 223_518)
    assert found.disk_bytes["corpus"] == pytest.approx(60e12, rel=0.05)


def test_hours_memory_and_tasks_by_hand():
    speeds = {"read": Speed(10, "a"), "resolve": Speed(100, "b"), "shards": Speed(200, "c")}
    found = plan(1e12, 10, BUILD, speeds, Yields(0.5, 0.5, 4.0), **SIZES, dumps=False)
    by_stage = rows(found)
    assert list(by_stage) == ["read", "resolve", "shards"]
    read, resolve, shards = by_stage.values()
    assert read.core_hours == pytest.approx(16e12 / 10e6 / 3600) and read.wall_hours == pytest.approx(
        read.core_hours / 10
    )
    assert resolve.input_bytes == shards.input_bytes == 8e12
    assert resolve.wall_hours == resolve.core_hours, "one task decides: more cores do not help it"
    assert resolve.worker_bytes == 2e9 * 64 and read.worker_bytes == 0.5e9
    assert found.core_hours == pytest.approx(sum(row.core_hours for row in found.rows))
    assert (found.builds, found.parts, found.shards) == (1, -(-16 * 10**12 // 2**25), -(-(10**12) // 2**26))
    assert found.disk_bytes["removed, lz4"] == pytest.approx(0.7 * 12e12)


def test_a_build_gives_its_speeds_and_yields():
    speeds, yields = measured(TIMES, FACTS)
    assert {stage: speed.mb_per_s for stage, speed in speeds.items()} == {"read": 12.5, "encode": 25.0}
    assert (yields.rules, yields.dedup, yields.bytes_per_token) == (0.5, 0.8, 4.0)
    assert "100.0 MB" in yields.source
    with pytest.raises(ValueError, match="kept nothing"):
        measured(TIMES, FACTS | {"shares": {}})


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_asks_for_its_own_stages(name):
    wanted = stages(to_dict(recipe(name)))
    assert {"encode", "shards"} <= set(wanted) and ("extract" in wanted) == (name in ("web", "llama3"))
    assert ("lines" in wanted) == (name == "llama3") and ("pii" in wanted) == (name in ("web", "llama3", "code"))
    assert "contamination" not in wanted and ("hashes" in wanted) == (name != "plain")


@pytest.mark.parametrize(("tokens", "cores"), [(0, 1), (-1, 1), (float("nan"), 1), (float("inf"), 1), (1e9, 0)])
def test_what_cannot_be_planned_is_refused(tokens, cores):
    with pytest.raises(ValueError, match="tokens must be more than 0 and cores at least 1"):
        plan(tokens, cores, PARTS, SPEEDS, Yields(), **SIZES, dumps=False)


def test_every_number_has_a_source_and_the_verb_prints_both_forms(capsys):
    verbs.plan(15e12, recipe="llama3", cores=1000)
    told = capsys.readouterr().out
    assert all(speed.source in told for stage, speed in SPEEDS.items() if stage != "contamination")
    assert "arXiv 2406.17557" in told and "96 builds" in told
    verbs.plan(1e9, recipe="plain", cores=2, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["builds"] == 1 and found["wall_hours"] <= found["core_hours"]
    assert [row["stage"] for row in found["rows"]] == ["read", "dedup", "encode", "shards"]
    assert not any(word in speed.source for speed in SPEEDS.values() for word in ("provisional", "prototype"))


def test_a_plan_of_a_single_build_says_so():
    told = text(plan(1e11, 2, PARTS, SPEEDS, Yields(), **SIZES, dumps=True))
    assert any(line.startswith("one build, of one dump or less of it: FineWeb") for line in told)
    assert not any("1 builds" in line for line in told) and any("documents in 1 build:" in line for line in told)


def test_a_measured_build_is_planned_by_its_own_recipe(tmp_path, capsys):
    """Not by the default one, of web pages: books do not come in dumps."""
    lines = "".join(
        json.dumps({"text": f"Line {i} of a book that is read by many people. " * 9}) + "\n" for i in range(60)
    )
    (tmp_path / "a.jsonl").write_text(lines)
    for name, is_web in (("books", False), ("web", True)):
        chosen = replace(recipe(name), rules=Rules())
        build(chosen, [tmp_path / "a.jsonl"], byte_tokenizer(), tmp_path / name)
        verbs.plan(15e12, cores=2, measured=tmp_path / name)
        told = capsys.readouterr().out
        assert ("96 builds, a dump each" in told) == is_web and ("in 1 build:" in told) != is_web


def test_the_text_lines_up():
    lines = text(plan(1e9, 2, BUILD, {"read": Speed(10, "x")}, Yields(), **SIZES, dumps=False))
    assert lines[1].index("read") == 0 and len(lines[0].split("source")[0]) == len(lines[1].split("x")[0])
