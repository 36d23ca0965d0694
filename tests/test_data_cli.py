"""Layer: the command line. What a user types to curate text, and what is said of mistakes."""

import json

import pytest

from llamita import cli
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


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (lambda p: words(p, "wep"), "no data recipe is called 'wep'; did you mean 'web'? (or give a .toml file)"),
        (lambda p: ["data", "build"], "name a recipe: llamita data build RECIPE PATHS; there are: plain, web, books"),
        (lambda p: words(p, paths=("nothing",)), "no such file or folder"),
        (lambda p: words(p, "plain", "--dedup.min-hash"), "--dedup.minhash"),
        (lambda p: words(p, "plain", "--heldout-share", "1"), "heldout_share must lie between 0 and 1"),
        (lambda p: words(p, "plain", "--dedup.similarity", "0"), "dedup.similarity must be more than 0"),
        (lambda p: words(p, "plain", "--contamination.evals", str(p / "absent")), "absent"),
        (lambda p: words(p, "plain", "--quality.classifier", str(p / "absent.safetensors")), "no classifier at"),
        (lambda p: words(p, "plain", "--quality.model", str(p / "absent")), "absent"),
        (lambda p: words(p, "plain", "--rules.prose", "gofer@1"), "gofer@1"),
        (lambda p: words(p, "plain", "--rules.prose", "wurds>=3"), "wurds"),
        (lambda p: words(p, paths=("empty.txt",)), "no text"),
        (lambda p: words(p, paths=("tok/none",)), "no such file or folder"),
        (lambda p: words(p, "plain", "--language.keep", "english"), "no code of ISO 639"),
        (lambda p: words(p, "plain", "--quality.max-bits-per-byte", "2"), "asks for quality.model"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(place, capsys, typed, message):
    (place / "empty.txt").write_text("")
    before = sorted(place.iterdir())
    assert cli.main([*typed(place), *(["--workers", "1"] if "--out" in typed(place) else [])]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("llamita: ") and message in said[-1], said
    assert sorted(place.iterdir()) == before


def test_a_slurm_script_is_written_beside_the_corpus(place, capsys):
    assert cli.main(words(place, "plain", "--slurm", "4")) == 0
    script = place / "c-submit.sh"
    assert capsys.readouterr().out.strip() == f"sh {script}" and "--array=0-3" in script.read_text()
    assert cli.main(["data", "task", str(place / ".c.partial"), "read", "--number", "0", "--of", "4"]) == 0
    assert len(list((place / ".c.partial" / "read").glob("*.json"))) == 1


def test_a_corpus_is_held_against_its_hashes_when_that_is_asked(place, capsys):
    assert cli.main(words(place, "plain", "--workers", "1")) == 0
    tokens = place / "c" / "shard-00000.tok"
    assert cli.main(["data", "inspect", str(place / "c"), "--count", "1", "--verify"]) == 0
    tokens.write_bytes(tokens.read_bytes()[:-4] + b"\0\0\0\0")
    assert cli.main(["data", "inspect", str(place / "c"), "--count", "1"]) == 0
    capsys.readouterr()
    assert cli.main(["data", "inspect", str(place / "c"), "--verify"]) == 2
    assert "is damaged" in capsys.readouterr().err
