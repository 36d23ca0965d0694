"""Layer: the command line. What a user types to curate text, and what is said of mistakes."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from llamita import cli
from llamita.config import load
from llamita.data.recipe import Contamination, Quality, Recipe, placed
from llamita.data.shards import Corpus
from tests.fakes import byte_tokenizer


@pytest.fixture
def place(tmp_path):
    byte_tokenizer().save(tmp_path / "tok")
    rows = [{"text": f"Page {i} says the same thing to all of the people that have read it. " * 3, "id": str(i)}
            for i in range(40)]  # fmt: skip
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))
    return tmp_path


def words(place, recipe="plain", *more, paths=("text.jsonl",)):
    given = [str(place / path) for path in paths]
    return ["data", "build", recipe, *given, "--tokenizer", str(place / "tok"), "--out", str(place / "c"), *more]


def test_a_corpus_from_the_command_line(place, capsys):
    assert cli.main(words(place, "plain", "--workers", "1", "--heldout-share", "0.2")) == 0
    said = capsys.readouterr()
    assert "read 41 documents" in said.err and "kept 40" in said.err and "duplicate:exact" in said.err
    assert said.out.startswith("train: ") and "heldout: " in said.out
    assert Corpus.open(place / "c").manifest.heldout_share == 0.2


def test_a_recipe_from_a_file_and_one_field_of_it_changed(place):
    assert cli.main(words(place, "plain", "--workers", "1")) == 0
    recipe = place / "c" / "recipe.toml"
    mine = place / "mine.toml"
    mine.write_text(recipe.read_text())
    assert cli.main(words(place, str(mine), "--workers", "1", "--dedup.no-exact")) == 0
    manifest = Corpus.open(place / "c").manifest
    assert manifest.recipe_name == "plain" and sum(s.docs for of in manifest.splits.values() for s in of) == 41


def test_files_that_a_recipe_names_lie_beside_it_and_those_that_are_typed_where_one_is(place, monkeypatch):
    """From another folder, in which a file of that name lies too; and the corpus's own recipe, given back."""
    for folder in ("mine", "here"):
        (place / folder).mkdir()
        (place / folder / "items.txt").write_text(
            "What is the capital of the country that lies between those two rivers?"
        )
    (place / "mine" / "r.toml").write_text('name = "r"\n[contamination]\nevals = ["items.txt"]\n')
    monkeypatch.chdir(place / "here")

    def evals(recipe, *more):
        assert cli.main(words(place, recipe, "--workers", "1", *more)) == 0
        return load(Recipe, place / "c" / "recipe.toml").contamination.evals

    mine, here = ((str(place / folder / "items.txt"),) for folder in ("mine", "here"))
    assert evals("../mine/r.toml") == evals(str(place / "mine" / "r.toml")) == mine
    assert evals(str(place / "c" / "recipe.toml")) == mine
    assert evals("../mine/r.toml", "--contamination.evals", "items.txt") == here
    assert evals("plain", "--contamination.evals", "items.txt") == here


def test_every_file_that_a_recipe_names_is_placed(tmp_path):
    given = Recipe(
        "r", quality=Quality("a.bin", model="m/x"), contamination=Contamination(("s3://b/e", "../e", "/abs"))
    )
    found = placed(given, tmp_path / "f")
    assert (found.quality.classifier, found.quality.model) == (f"{tmp_path}/f/a.bin", f"{tmp_path}/f/m/x")
    assert found.contamination.evals == ("s3://b/e", f"{tmp_path}/e", "/abs")
    assert placed(found, tmp_path) == found and placed(Recipe("r"), tmp_path) == Recipe("r")


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (lambda p: words(p, "wep"), "no data recipe is called 'wep'; did you mean 'web'? (or give a .toml file)"),
        (lambda p: ["data", "build"], "name a recipe: llamita data build RECIPE PATHS; there are: plain, web, books"),
        (lambda p: words(p, paths=("nothing",)), "no such file or folder"),
        (lambda p: words(p, "plain", "--dedup.min-hash"), "did you mean --dedup.minhash?"),
        (lambda p: words(p, "plain", "--heldout-share", "1"), "heldout_share must lie between 0 and 1"),
        (lambda p: words(p, "plain", "--dedup.similarity", "0"), "dedup.similarity must be more than 0"),
        (lambda p: words(p, "plain", "--contamination.evals", str(p / "absent")), "absent"),
        (lambda p: words(p, "plain", "--quality.classifier", str(p / "absent.safetensors")), "no classifier at"),
        (lambda p: words(p, "plain", "--quality.model", str(p / "absent")), "absent"),
        (lambda p: words(p, "plain", "--rules.prose", "gofer@1"), "gofer@1"),
        (lambda p: words(p, "plain", "--rules.prose", "wurds>=3"), "wurds"),
        (lambda p: words(p, paths=("empty.txt",)), "no text to build a corpus from: 1 empty (empty.txt)"),
        (lambda p: words(p, paths=("torn.gz",)), "1 damaged or unreadable (torn.gz: Not a gzipped file (b'no'))"),
        (
            lambda p: words(p, "plain", "--rules.prose", "words>=900", "--rules.code", "words>=900"),
            "41 words>=900 (14; 37; 7)",
        ),
        (lambda p: words(p, "plain", "--slurm", "-3"), "--slurm wants how many tasks an array has, at least 1, not -3"),
        (lambda p: [*words(p)[:-2], "--out", str(p / "c"), "--workers", "-3"], "at least 1 worker, not -3"),
        (lambda p: ["data", "inspect", str(p / "text.jsonl"), "--count", "-2"], "--count must be at least 1, not -2"),
        (lambda p: ["data", "task", str(p), "read", "--number", "0", "--of", "0"], "there is no 0 of 0"),
        (lambda p: ["data", "task", str(p), "read", "--number", "0", "--of", "-1"], "there is no 0 of -1"),
        (lambda p: ["data", "task", str(p), "read", "--number", "3", "--of", "3"], "there is no 3 of 3"),
        (lambda p: ["data", "task", str(p), "read", "--number", "0", "--of", "1"], "is no work folder"),
        (lambda p: words(p, paths=("tok/none",)), "no such file or folder"),
        (lambda p: words(p, "plain", "--language.keep", "english"), "no code of ISO 639"),
        (lambda p: words(p, "plain", "--quality.max-bits-per-byte", "2"), "asks for quality.model"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(place, capsys, typed, message):
    (place / "empty.txt").write_text("")
    (place / "torn.gz").write_bytes(b"no gzip")
    before, given = sorted(place.iterdir()), typed(place)
    assert cli.main([*given, *(["--workers", "1"] if "--out" in given and "--workers" not in given else [])]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("llamita: ") and message in said[-1], said
    assert sorted(place.iterdir()) == before


def test_a_slurm_script_is_written_beside_the_corpus(place, capsys):
    assert cli.main(words(place, "plain", "--slurm", "4")) == 0
    script = place / "c-submit.sh"
    assert capsys.readouterr().out.strip() == f"sh {script}" and "--array=0-3" in script.read_text()
    assert cli.main(["data", "task", str(place / ".c.partial"), "read", "--number", "0", "--of", "4"]) == 0
    assert len(list((place / ".c.partial" / "read").glob("*.json"))) == 1


SBATCH = """#!/bin/sh
for word in "$@"; do
  case "$word" in
    --array=*) last=${word#--array=0-} ;;
    --wrap=*) command=${word#--wrap=} ;;
  esac
done
for number in $(seq 0 "$last"); do SLURM_ARRAY_TASK_ID=$number sh -c "$command" || exit 1; done
echo 7
"""


def test_a_script_that_is_run_again_after_success_says_so(place, capsys):
    """All jobs through a stand-in for sbatch, each a process of its own."""
    assert cli.main(words(place, "plain", "--slurm", "1")) == 0
    (place / "sbatch").write_text(SBATCH)
    (place / "sbatch").chmod(0o755)
    command, env = ["sh", str(place / "c-submit.sh")], os.environ | {"PATH": f"{place}:{os.environ['PATH']}"}
    first = subprocess.run(command, env=env, capture_output=True, text=True, cwd=Path(__file__).resolve().parents[1])
    assert (first.returncode, first.stdout) == (0, "the last job is 7\n"), first.stderr
    assert Corpus.open(place / "c") and not (place / ".c.partial").exists()
    again = subprocess.run(command, env=env, capture_output=True, text=True)
    assert (again.returncode, again.stdout, again.stderr) == (0, "nothing is left to do\n", "")
    capsys.readouterr()
    assert cli.main(["data", "task", str(place / ".c.partial"), "encode", "--number", "0", "--of", "1"]) == 0
    assert capsys.readouterr().err == f"{place / 'c'} is whole: nothing is left to do\n"
    assert cli.main(["data", "task", str(place / "c"), "encode", "--number", "0", "--of", "1"]) == 2


def test_a_task_before_its_stage_is_due_is_told_what_comes_first(place, capsys):
    assert cli.main(words(place, "plain", "--slurm", "1")) == 0
    capsys.readouterr()
    for stage in ("match", "shards", "finish"):
        assert cli.main(["data", "task", str(place / ".c.partial"), stage, "--number", "0", "--of", "1"]) == 2
        told = f"llamita: stage {stage!r} is not due: tasks of 'read' come first (1 open)\n"
        assert capsys.readouterr().err == told
    assert not (place / "c").exists()


def test_a_corpus_is_held_against_its_hashes_when_that_is_asked(place, capsys):
    assert cli.main(words(place, "plain", "--workers", "1")) == 0
    tokens = place / "c" / "shard-00000.tok"
    assert cli.main(["data", "inspect", str(place / "c"), "--count", "1", "--verify"]) == 0
    tokens.write_bytes(tokens.read_bytes()[:-4] + b"\0\0\0\0")
    assert cli.main(["data", "inspect", str(place / "c"), "--count", "1"]) == 0
    capsys.readouterr()
    assert cli.main(["data", "inspect", str(place / "c"), "--verify"]) == 2
    assert "is damaged" in capsys.readouterr().err
