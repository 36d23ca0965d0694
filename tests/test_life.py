"""The whole life: a demo on a folder of text, and the README's own commands, small."""

import dataclasses
import json
import re
import shlex
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import llamita
from llamita import cli, log
from llamita.config import override
from llamita.model.shape import preset
from llamita.recipes import life, runs, stdlib

README = Path(__file__).resolve().parents[1] / "README.md"


@pytest.fixture
def small(monkeypatch):
    """The demo's own recipes with a smaller model and the fewest steps that its plan allows."""
    for name in ("demo", "sft"):
        recipe = runs.RECIPES[name]
        shape = preset("demo", dim=64, num_layers=1, num_heads=4, num_kv_heads=2, ffn_dim=128)
        changed = dataclasses.replace(override(recipe(), {"checkpoint.every": 10}), shape=shape)
        monkeypatch.setitem(runs.RECIPES, name, lambda changed=changed: changed)
        monkeypatch.setattr(life, f"{name}_run", runs.RECIPES[name])


@pytest.fixture(scope="module")
def library_text(tmp_path_factory) -> Path:
    """Sixty files of the standard library."""
    folder = tmp_path_factory.mktemp("text")
    for number, doc in zip(range(60), stdlib.texts(), strict=False):
        (folder / f"{number}.py").write_text(doc.text)
    return folder


def test_a_demo_on_own_text_leaves_a_model_that_others_load(small, library_text, tmp_path, capsys):
    folder = tmp_path / "runs" / "mine"
    words = ["demo", "--dir", str(folder), "--text", str(library_text), "--minutes", "0.01", "--vocab-size", "1024"]
    assert cli.main(words) == 0
    results = json.loads((folder / "results.json").read_text())
    assert results["parameters"] == sum(
        p.numel() for p in AutoModelForCausalLM.from_pretrained(folder / "model").parameters()
    )
    assert 0 < results["xz"] < results["gzip"] < 8 and 0 < results["bits_per_byte"] < 8
    assert {stage["name"] for stage in results["stages"]} >= {
        "tokenizer",
        "data",
        "pretraining",
        "fine-tuning",
        "export",
    }
    report = (folder / "report.html").read_text()
    assert "gzip" in report and "</svg>" in report and report.rstrip().endswith("</html>")
    kinds = {(row["stage"], row["kind"]) for name in (".", "sft") for row in log.read(folder / name / "metrics.jsonl")}
    assert {("train", "sample"), ("train", "eval"), ("sft", "train"), ("sft", "sample")} <= kinds
    said = capsys.readouterr().err
    assert "xz -9e needs" in said and f"chat {folder}" in said

    ids = AutoTokenizer.from_pretrained(folder / "model")("def main():")["input_ids"]
    assert ids == llamita.Tokenizer.load(folder / "model").encode("def main():", bos=True)
    assert isinstance(llamita.load(folder).generate("def ", max_tokens=5, seed=0), str)

    before = (folder / "results.json").stat().st_mtime_ns
    assert cli.main(words) == 0, "a second demo shows the results again"
    assert (folder / "results.json").stat().st_mtime_ns == before
    assert cli.main([*words, "--minutes", "3"]) == 2
    assert "holds another life (minutes 0.01, now 3.0)" in capsys.readouterr().err


def test_a_demo_goes_on_where_it_stopped(small, library_text, tmp_path, monkeypatch):
    folder, real = tmp_path / "mine", life.stages.finetune
    words = ["demo", "--dir", str(folder), "--text", str(library_text), "--minutes", "0.01", "--vocab-size", "1024"]

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(life.stages, "finetune", interrupted)
    assert cli.main(words) == 130
    trained = {path: path.stat().st_mtime_ns for path in folder.rglob("shard-*")}
    monkeypatch.setattr(life.stages, "finetune", real)
    assert cli.main(words) == 0
    assert trained and {path: path.stat().st_mtime_ns for path in folder.rglob("shard-*")} == trained
    events = [row["message"] for row in log.read(folder / "metrics.jsonl") if row["kind"] == "event"]
    assert any("resumed from the checkpoint" in message for message in events)


@pytest.mark.parametrize("text", ["Too short.", "word " * 90_000])
def test_text_that_does_not_suffice_leaves_nothing(text, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(text)
    assert cli.main(["demo", "--text", str(tmp_path / "text.txt"), "--dir", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("llamita: ") and not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_left_alone(library_text, tmp_path, capsys):
    (tmp_path / "precious.txt").write_text("mine")
    assert cli.main(["demo", "--dir", str(tmp_path), "--text", str(library_text)]) == 2
    assert "is not empty and holds no demo" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path, capsys):
    assert cli.main(["demo", "--dir", str(tmp_path / "out"), "--hub", "nobody/nothing"]) == 2
    said = capsys.readouterr().err.strip()
    assert "the data set 'nobody/nothing' cannot be had" in said and not (tmp_path / "out").exists()


def test_the_standard_library_gives_text_and_answers():
    talk = {messages[0]["content"]: messages[1]["content"] for messages in stdlib.conversations()}
    assert talk["What does shutil.copytree do?"].startswith("Recursively copy a directory tree")
    assert len(talk) > 1000
    texts = list(stdlib.texts())
    assert sum(len(doc.text) for doc in texts) > 5e6
    assert {doc.source for doc in texts} == {"code", "topics"}
    assert not any("/test/" in doc.name for doc in texts)


def test_the_readmes_commands_run_as_they_stand(small, library_text, tmp_path, monkeypatch):
    block = next(part for part in re.findall(r"```\n(.*?)```", README.read_text(), re.S) if "llamita tokenizer" in part)
    lines = [shlex.split(line) for line in block.splitlines()]
    assert {words[1] for words in lines} >= {
        "tokenizer",
        "data",
        "train",
        "sft",
        "eval",
        "export",
        "report",
        "generate",
    }
    monkeypatch.chdir(tmp_path)
    Path("TEXT").symlink_to(library_text)
    Path("talk.jsonl").write_text(
        "\n".join(json.dumps({"messages": messages}) for messages in stdlib.conversations()[:200])
    )
    for words in lines:
        if words[1] == "chat":
            words = [*words, "-p", "What is a queue?"]
        if "--steps" in words:
            words[words.index("--steps") + 1] = "5"
        assert cli.main(words[1:]) == 0, words
