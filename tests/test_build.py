"""Layer: real processes, killed. The same text and recipe give the same corpus, whoever does the tasks and however
often they are stopped."""

import json
import os
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest

from llamita.data import files as input_files
from llamita.data.build import STAGES, Workers, build, key, prepared, task
from llamita.data.engine import Stage, Stopped, executor, one
from llamita.data.read import plan_parts
from llamita.data.recipe import Contamination, Dedup, Quality, Recipe, Rules, web
from llamita.data.shards import Corpus
from llamita.data.workspace import workspace
from llamita.recipes.corpora import judge_of, slurm_script
from tests.fakes import byte_tokenizer

ROOT = Path(__file__).resolve().parents[1]
WORDS = (ROOT / "docs" / "house.md").read_text().split()


def sentence(rng, length=12):
    return " ".join(rng.choice(WORDS) for _ in range(length)) + "."


def some_text(folder: Path, count=120) -> Path:
    """Files of several kinds: documents, copies, near copies and refuse."""
    rng = random.Random(0)
    folder.mkdir(parents=True)
    docs = [" ".join(sentence(rng) for _ in range(20)) for _ in range(count)]
    near = [doc.replace("the", "a", 1) for doc in docs[:10]]
    for number, part in enumerate((docs[: count // 2], docs[count // 2 :], docs[:7] + near)):
        rows = [{"text": text, "id": f"{number}-{i}", "source": f"s{number % 2}"} for i, text in enumerate(part)]
        (folder / f"part{number}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (folder / "code.py").write_text("def f(x):\n    return x + 1\n\n\nclass A:\n    pass\n" * 3)
    (folder / "empty.txt").write_text("")
    (folder / "broken.txt").write_bytes(b"\xff\xfe\xfa\xfb")
    return folder


def hashes(folder: Path) -> dict[str, list[str]]:
    manifest = Corpus.open(folder).manifest
    return {name: [s.tok_sha256 + s.doc_sha256 + s.parquet_sha256 for s in of] for name, of in manifest.splits.items()}


def names(folder: Path) -> list[str]:
    """Of all documents that are in the corpus or among the removed."""
    found = [name for path in sorted(folder.rglob("*.parquet")) for name in pq.read_table(path)["name"].to_pylist()]
    return sorted(found)


def in_small_parts(monkeypatch):
    monkeypatch.setattr(input_files, "PART_BYTES", 20_000)


NEAR = Recipe("near", dedup=Dedup(minhash=True, lines_more_than=6), seed=3)


def test_duplicates_near_and_exact_go_and_are_kept_aside_with_their_reason(tmp_path):
    text = some_text(tmp_path / "text")
    build(NEAR, [text], byte_tokenizer(), tmp_path / "c")
    facts = json.loads((tmp_path / "c" / "build.json").read_bytes())
    assert facts["duplicates"] == {"exact": 7, "url": 0, "near": 10}
    assert {reason: found["docs"] for reason, found in facts["removed"].items()} == {
        "duplicate:exact": 7, "duplicate:near": 10
    }  # fmt: skip
    removed = [pq.read_table(path) for path in sorted((tmp_path / "c" / "removed").iterdir())]
    assert sorted(row["reason"] for table in removed for row in table.to_pylist()) == (
        ["duplicate:exact"] * 7 + ["duplicate:near"] * 10
    )
    assert all(row["text"] for table in removed for row in table.to_pylist())
    assert facts["kept"]["docs"] == 121 and set(facts["skipped"]) == {"empty", "not UTF-8"}
    assert len(names(tmp_path / "c")) == 120 + 17 + 1
    assert len(facts["pairs"]) >= 10 and all(pair["similarity"] >= 0.8 for pair in facts["pairs"])


def test_a_ledger_row_stands_beside_each_document(tmp_path):
    build(web_without_rules(), [some_text(tmp_path / "text")], byte_tokenizer(), tmp_path / "c")
    corpus = Corpus.open(tmp_path / "c")
    for name in ("train", "heldout"):
        view = corpus.split(name)
        for i in range(len(view)):
            shard, row = view.place(i)
            ledger = pq.read_table(shard.path(corpus.folder, "parquet")).slice(row, 1).to_pylist()[0]
            tokens = view.tokens(i)
            assert (len(tokens), len(tokens) - 2) == (ledger["num_tokens"], ledger["num_bytes"])
            assert ledger["source"] == view.names["source"][view.column("source")[i]]
            text = bytes(tokens[1:-1].astype(np.uint8)).decode()
            assert ledger["chars"] == len(text) and 0.5 < ledger["words"] / len(text.split()) < 1.5


def web_without_rules() -> Recipe:
    return replace(web(), rules=Rules(), pii=False)


@pytest.mark.parametrize("workers", [Workers(2), Workers(4)])
def test_workers_change_nothing(tmp_path, monkeypatch, workers):
    in_small_parts(monkeypatch)
    text = some_text(tmp_path / "text")
    build(NEAR, [text], byte_tokenizer(), tmp_path / "one")
    build(NEAR, [text], byte_tokenizer(), tmp_path / "many", workers=workers)
    assert hashes(tmp_path / "many") == hashes(tmp_path / "one")
    assert len(list((tmp_path / "one" / "removed").iterdir())) > 1
    other = replace(NEAR, seed=4)
    build(other, [text], byte_tokenizer(), tmp_path / "other")
    assert hashes(tmp_path / "other") != hashes(tmp_path / "one")


BUILD = """
import os, signal, sys
from llamita.data import engine, files
from llamita.data.build import STAGES, Workers, build, key, prepared, task
from llamita.data.engine import Stage, Stopped, executor, one
from tests.fakes import byte_tokenizer
from tests.test_build import NEAR

text, out, num_workers, stage, number = sys.argv[1:]
write = engine.write_json

def deadly(path, value):  # this file is run in the workers too
    if (path.parent.name, path.name) == (stage, f"{number}.json"):
        os.killpg(0, signal.SIGKILL)
    write(path, value)

engine.write_json = deadly
files.PART_BYTES = 20_000
if __name__ == "__main__":
    build(NEAR, [text], byte_tokenizer(), out, workers=Workers(int(num_workers)))
"""


@pytest.mark.parametrize("num_workers", [1, 2])
def test_killed_twice_it_goes_on_and_nothing_is_lost_or_doubled(tmp_path, monkeypatch, num_workers):
    in_small_parts(monkeypatch)
    text = some_text(tmp_path / "text", 400)
    build(NEAR, [text], byte_tokenizer(), tmp_path / "whole")
    program = tmp_path / "program.py"
    program.write_text(BUILD)
    command = [sys.executable, str(program), str(text), str(tmp_path / "c"), str(num_workers)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    done: dict[Path, int] = {}
    for place in (["read", "000003"], ["encode", "000002"], ["never", ""]):
        run = subprocess.run([*command, *place], cwd=ROOT, env=environment, start_new_session=True)
        if place[0] != "never":
            assert run.returncode == -signal.SIGKILL and not (tmp_path / "c").exists()
            now = {path: path.stat().st_mtime_ns for path in (tmp_path / ".c.partial").glob("*/*.json")}
            assert done.items() <= now.items() and len(now) > len(done)  # what was done is not done again
            done = now
    assert run.returncode == 0 and hashes(tmp_path / "c") == hashes(tmp_path / "whole")
    assert names(tmp_path / "c") == names(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "program.py", "text", "whole"]


def test_slurm_tasks_do_the_same(tmp_path, monkeypatch):
    """The script's own commands, run by a stand-in for sbatch: one process a task of each array, in any order."""
    in_small_parts(monkeypatch)
    text = some_text(tmp_path / "text")
    build(NEAR, [text], byte_tokenizer(), tmp_path / "one")
    script = slurm_script(NEAR, [text], byte_tokenizer(), tmp_path / "c", 3)
    assert subprocess.run(["sh", "-n"], input=script.encode()).returncode == 0
    lines = [line for line in script.splitlines() if "sbatch" in line]
    assert [line.split("--job-name=llamita-")[1].split()[0] for line in lines] == [stage.name for stage in STAGES]
    assert all("--dependency=afterok:$last" in line for line in lines)
    for stage in STAGES[:-1]:
        for number in (2, 0, 1):
            task(tmp_path / ".c.partial", stage.name, number, 3, judge_of)
    task(tmp_path / ".c.partial", "finish", 0, 1, judge_of)
    assert hashes(tmp_path / "c") == hashes(tmp_path / "one") and not (tmp_path / ".c.partial").exists()


def test_a_task_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no work folder"):
        task(tmp_path, "read", 0, 1, judge_of)
    with pytest.raises(ValueError, match="no stage is called 'reed'; did you mean 'read'"):
        task(tmp_path, "reed", 0, 1, judge_of)


@pytest.mark.peer
def test_ray_does_the_same(tmp_path, monkeypatch):
    in_small_parts(monkeypatch)
    text = some_text(tmp_path / "text")
    build(NEAR, [text], byte_tokenizer(), tmp_path / "one")
    build(NEAR, [text], byte_tokenizer(), tmp_path / "ray", workers=Workers(ray=""))
    assert hashes(tmp_path / "ray") == hashes(tmp_path / "one")


def test_another_recipe_or_text_begins_anew(tmp_path, monkeypatch):
    """What a stopped build left is used for the same work alone."""
    in_small_parts(monkeypatch)
    text = some_text(tmp_path / "text")
    prepared(NEAR, [text], byte_tokenizer(), tmp_path / "c")
    task(tmp_path / ".c.partial", "read", 0, 1, judge_of)
    kept = list((tmp_path / ".c.partial" / "read").iterdir())
    prepared(NEAR, [text], byte_tokenizer(), tmp_path / "c")
    assert kept and all(path.exists() for path in kept)
    prepared(replace(NEAR, seed=9), [text], byte_tokenizer(), tmp_path / "c")
    assert not (tmp_path / ".c.partial" / "read").exists()
    task(tmp_path / ".c.partial", "read", 0, 1, judge_of)
    (text / "code.py").write_text("def g(x):\n    return x + 2\n\n\nclass A:\n    pass\n" * 3)
    prepared(replace(NEAR, seed=9), [text], byte_tokenizer(), tmp_path / "c")
    assert not (tmp_path / ".c.partial" / "read").exists()


@pytest.mark.parametrize("named", ["evals", "classifier", "model"])
def test_another_evaluation_set_or_judge_begins_anew(tmp_path, named):
    """A build that was stopped before its evaluation set changed does not go on with the old one."""
    file = tmp_path / "named" / "items.txt"
    file.parent.mkdir()
    file.write_text("What is the capital of France?")
    recipe = {
        "evals": replace(NEAR, contamination=Contamination(evals=(str(file.parent),))),
        "classifier": replace(NEAR, quality=Quality(classifier=str(file))),
        "model": replace(NEAR, quality=Quality(model=str(file.parent))),
    }[named]
    parts = plan_parts([some_text(tmp_path / "text")], 2**20)
    before = key(recipe, byte_tokenizer(), parts)
    assert key(recipe, byte_tokenizer(), parts) == before
    file.write_text("What is the capital of Spain?")
    assert key(recipe, byte_tokenizer(), parts) != before


def test_two_builds_of_one_folder_at_once_are_refused(tmp_path):
    text = some_text(tmp_path / "text")
    with workspace(tmp_path / "c", "any"), pytest.raises(ValueError, match="another process is building"):
        build(NEAR, [text], byte_tokenizer(), tmp_path / "c")


def test_a_dead_worker_loses_nothing(tmp_path, monkeypatch):
    text = some_text(tmp_path / "text")
    folder = prepared(NEAR, [text], byte_tokenizer(), tmp_path / "c")
    with executor(2) as on, pytest.raises(Stopped, match="a worker died in stage 'suicide'"):
        on.run(Stage("suicide", one, suicide), SimpleNamespace(folder=folder), [0])
    assert (folder / "prepared").exists()


def suicide(job, number, tick):
    os.kill(os.getpid(), signal.SIGKILL)


def test_scope_keeps_sources_apart(tmp_path):
    """The copies of some_text come from the other source."""
    text = some_text(tmp_path / "text")
    recipe = replace(NEAR, dedup=replace(NEAR.dedup, scope="source"))
    build(recipe, [text], byte_tokenizer(), tmp_path / "c")
    assert json.loads((tmp_path / "c" / "build.json").read_bytes())["duplicates"]["near"] == 10
    rows = [{"text": "the same text everywhere, word for word", "source": source} for source in "aabb"]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for scope, kept in (("global", 1), ("source", 2)):
        recipe = replace(NEAR, dedup=Dedup(scope=scope))
        build(recipe, [tmp_path / "rows.jsonl"], byte_tokenizer(), tmp_path / scope)
        assert json.loads((tmp_path / scope / "build.json").read_bytes())["kept"]["docs"] == kept


def test_two_builds_of_one_name_in_one_process_share_nothing(tmp_path):
    """The work folder has the same name each time; what was cached by it is another tokenizer's and another text's."""
    text = some_text(tmp_path / "text")
    build(NEAR, [text], byte_tokenizer(), tmp_path / "c")
    first = Corpus.open(tmp_path / "c").manifest
    from llamita.tokenizer import Tokenizer

    wider = Tokenizer([*(bytes([byte]) for byte in range(256)), b"th", b"the"])
    (text / "more.txt").write_text(" ".join(sentence(random.Random(9)) for _ in range(30)))
    build(NEAR, [text], wider, tmp_path / "c")
    second = Corpus.open(tmp_path / "c").manifest
    assert (first.tokenizer, second.tokenizer) == (byte_tokenizer().fingerprint, wider.fingerprint)
    assert second.vocab_size == first.vocab_size + 2
    ids = Corpus.open(tmp_path / "c").split("train").tokens(0)
    assert {256, 257} & set(ids.tolist()), "the ids are the second tokenizer's"


def test_a_file_that_is_gone_stops_the_build_and_loses_nothing(tmp_path, monkeypatch):
    in_small_parts(monkeypatch)
    text = some_text(tmp_path / "text")
    prepared(NEAR, [text], byte_tokenizer(), tmp_path / "c")
    (text / "code.py").rename(tmp_path / "aside.py")
    with pytest.raises(Stopped, match="was there when the build was planned"):
        task(tmp_path / ".c.partial", "read", 0, 1, judge_of)
    (tmp_path / "aside.py").rename(text / "code.py")
    task(tmp_path / ".c.partial", "read", 0, 1, judge_of)


def test_a_full_disk_keeps_the_finished_tasks(tmp_path):
    with pytest.raises(OSError), workspace(tmp_path / "c", "any") as work:
        (work / "done").write_text("1")
        raise OSError(28, "No space left on device")
    assert (tmp_path / ".c.partial" / "done").exists()
    with pytest.raises(ValueError), workspace(tmp_path / "c", "any") as work:
        raise ValueError("bad input")
    assert not (tmp_path / ".c.partial").exists()


def test_the_newest_of_exact_copies_stays():
    from llamita.data.collect import date_number

    assert date_number("2013-05-18T20:31:00Z") == 20130518203100 and date_number("20130518") == 20130518000000
    assert date_number("2013-05") < date_number("2013-06-01") < date_number("2020")
    assert [date_number(date) for date in ("", "18 May 2013", "5/18/2013", "1368909060", "tomorrow")] == [0] * 5


@pytest.mark.parametrize(
    "wrong",
    [{"lines_more_than": -1}, {"substring_bytes": -5}, {"bucket_docs": 0}],
)
def test_limits_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        replace(NEAR, dedup=Dedup(**wrong))


@pytest.mark.parametrize("settled", [True, False])
def test_a_process_of_tasks_loads_nothing_that_extends_numba(settled):
    """Without `settle`, the first kernel of a process loads awkward where gigatoken has brought it along."""
    pytest.importorskip("awkward")
    call = "from llamita.data.engine import settle; settle();" * settled
    code = f"import sys; {call} from llamita.data.words import split; from llamita.data.strings import Strings; "
    told = "split(Strings.of(['a b'])); print('awkward' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code + told], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(not settled)


def test_a_build_does_not_open_its_tokenizer_again(tmp_path, monkeypatch):
    monkeypatch.setattr("llamita.data.job.open_tokenizer", lambda folder: pytest.fail("opened again"))
    build(NEAR, [some_text(tmp_path / "text")], byte_tokenizer(), tmp_path / "c")
