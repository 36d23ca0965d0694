"""The command line as a user meets it: bad input is one line and exit code 2, with nothing half-written."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llamita import cli
from llamita.checkpoint import store
from llamita.cli import verbs
from llamita.formats import hf

STORY = "Once upon a time a little llama lived on a hill. It liked to hum {n} songs and to count {m} stars.\n"


def run(capsys, *words) -> tuple[int, str, str]:
    code = cli.main([str(word) for word in words])
    out = capsys.readouterr()
    return code, out.out, out.err


def refused(capsys, *words) -> str:
    code, _, err = run(capsys, *words)
    last = err.strip().splitlines()[-1]
    assert code == 2 and last.startswith("llamita: "), err
    assert sum(line.startswith("llamita: ") for line in err.splitlines()) == 1 and "Traceback" not in err
    return last


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Text, tokenizer and corpus made by the verbs themselves, and a run of 20 steps."""
    home = tmp_path_factory.mktemp("world")
    (home / "text").mkdir()
    for number in range(40):
        story = "".join(STORY.format(n=number * line, m=line * line) for line in range(40))
        (home / "text" / f"story{number}.txt").write_text(story)
    assert cli.main(["tokenizer", "train", str(home / "text"), "--out", str(home / "tok"), "--vocab-size", "768"]) == 0
    build = [
        "data",
        "build",
        "plain",
        str(home / "text"),
        "--tokenizer",
        str(home / "tok"),
        "--out",
        str(home / "corpus"),
    ]
    assert cli.main(build) == 0
    assert cli.main([*train_words(home, home / "run"), "--checkpoint.every", "10"]) == 0
    return home


def train_words(home: Path, folder: Path) -> list[str]:
    words = ["train", "tiny", "--dir", folder, "--data.corpus", home / "corpus", "--steps", "20"]
    shape = [
        "--shape.dim",
        "64",
        "--shape.ffn-dim",
        "128",
        "--shape.vocab-size",
        "768",
        "--data.seq-len",
        "64",
        "--device",
        "cpu",
    ]
    return [str(word) for word in words] + shape


def test_the_verbs_in_order_make_a_model_that_speaks(world, capsys):
    code, out, _ = run(capsys, "export", world / "run", "--out", world / "model")
    assert code == 0 and "llamita: equal_tensors 20, " in out and "max_logit_diff 0," in out
    code, out, _ = run(capsys, "generate", world / "model", "Once upon", "--max-tokens", "8", "--temperature", "0")
    assert code == 0 and len(out) > 3
    code, out, _ = run(capsys, "eval", world / "run", "--corpus", world / "corpus", "--json")
    assert code == 0 and '"bits_per_byte"' in out and '"xz"' in out
    code, out, _ = run(capsys, "report", world / "run")
    assert code == 0 and (world / "run" / "report.html").stat().st_size > 10_000


def test_help_lists_every_verb_and_each_verb_has_its_own(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0 and all(verb in out for verb in cli.VERBS)
    for verb in cli.VERBS:
        words = [*verb.split(), *(["tiny"] if verb == "train" else []), "--help"]
        with pytest.raises(SystemExit) as stop:
            cli.main(words)
        assert stop.value.code in (0, None) and "usage" in capsys.readouterr().out


def test_misspelt_verbs_recipes_options_and_keys_name_the_nearest(world, capsys):
    assert "did you mean 'train'" in refused(capsys, "trian", "tiny")
    assert "did you mean 'tiny'" in refused(capsys, "train", "tinny", "--dir", "x")
    assert "did you mean --optim.lr" in refused(capsys, "train", "tiny", "--dir", "x", "--optim.lrr", "1")
    assert "could not convert" in refused(capsys, "demo", "--minutes", "soon")
    assert "did you mean '100m'" in refused(capsys, "show", "10m")
    assert not Path("x").exists()


def test_impossible_shapes_are_refused(world, capsys, tmp_path):
    words = train_words(world, tmp_path / "run")
    assert "not divisible by shape.num_heads" in refused(capsys, *words, "--shape.num-heads", "5")
    assert "the tokenizer has 768 entries and the shape 600" in refused(capsys, *words, "--shape.vocab-size", "600")
    assert not (tmp_path / "run").exists()


def test_empty_binary_and_missing_text_are_refused(capsys, tmp_path):
    empty, binary = tmp_path / "empty", tmp_path / "binary"
    empty.mkdir()
    binary.mkdir()
    (binary / "photo.txt").write_bytes(bytes(range(256)) * 10)
    for folder, words in ((empty, "holds no text"), (binary, "holds no text"), (tmp_path / "none", "none")):
        for verb in (["demo", "--text", folder, "--dir", tmp_path / "out"],
                     ["tokenizer", "train", folder, "--out", tmp_path / "out"]):  # fmt: skip
            assert words in refused(capsys, *verb)
            assert not (tmp_path / "out").exists()


def test_text_shorter_than_one_sequence_is_refused(world, capsys, tmp_path):
    (tmp_path / "short.txt").write_text("Too short.")
    build = [
        "data",
        "build",
        "plain",
        tmp_path / "short.txt",
        "--tokenizer",
        world / "tok",
        "--out",
        tmp_path / "corpus",
    ]
    assert run(capsys, *build)[0] == 0
    words = train_words(world, tmp_path / "run")
    said = refused(capsys, *words, "--data.corpus", tmp_path / "corpus")
    assert "fewer than one sequence of 64" in said and not (tmp_path / "run").exists()


def test_a_tokenizer_that_does_not_belong_to_the_corpus_is_refused(world, capsys, tmp_path):
    (tmp_path / "other.txt").write_text("".join(f"quite another text, number {n * n}\n" for n in range(3000)))
    assert cli.main(["tokenizer", "train", str(tmp_path / "other.txt"), "--out", str(tmp_path / "tok"),
                     "--vocab-size", "768"]) == 0  # fmt: skip
    said = refused(capsys, *train_words(world, tmp_path / "run"), "--tokenizer", tmp_path / "tok")
    assert "another tokenizer" in said and not (tmp_path / "run").exists()


def test_what_is_left_out_of_a_corpus_is_said(world, capsys, tmp_path):
    (tmp_path / "good.txt").write_text(STORY * 20)
    (tmp_path / "photo.txt").write_bytes(b"\x00\xff" * 50)
    code, _, err = run(
        capsys, "data", "build", "plain", tmp_path, "--tokenizer", world / "tok", "--out", world / "some"
    )
    assert code == 0 and "skipped         1  with NUL bytes: " in err


def test_a_corrupt_shard_is_refused_by_name(world, capsys, tmp_path):
    subprocess.run(["cp", "-r", str(world / "corpus"), str(tmp_path / "corpus")], check=True)
    shard = next((tmp_path / "corpus").glob("*.tok"))
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(data)
    said = refused(capsys, *train_words(world, tmp_path / "run"), "--data.corpus", tmp_path / "corpus")
    assert shard.name in said and not (tmp_path / "run").exists()


def test_a_truncated_checkpoint_falls_back_and_says_so(world, capsys, tmp_path):
    subprocess.run(["cp", "-r", str(world / "run"), str(tmp_path / "run")], check=True)
    os.truncate(tmp_path / "run/checkpoints/step_00000020/rank_00000.safetensors", 999)
    code, _, err = run(capsys, *train_words(world, tmp_path / "run"), "--checkpoint.every", "10")
    assert code == 0 and "checkpoint of step 20 is damaged" in err and "resumed from the checkpoint of step 10" in err


def test_other_settings_in_the_same_folder_are_refused(world, capsys):
    assert "optim.lr was 0.003 and is 0.5" in refused(capsys, *train_words(world, world / "run"), "--optim.lr", "0.5")


def test_a_full_disk_is_one_line_and_leaves_only_whole_checkpoints(world, capsys, tmp_path, monkeypatch):
    real, saved = store.os.replace, []

    def full(source, target):
        if Path(target).name.startswith("step_"):
            saved.append(target)
            if len(saved) > 1:
                raise OSError(errno.ENOSPC, "No space left on device", str(target))
        real(source, target)

    monkeypatch.setattr(store.os, "replace", full)
    said = refused(capsys, *train_words(world, tmp_path / "run"), "--checkpoint.every", "5")
    assert "No space left on device" in said
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step_00000005"]


def test_an_export_that_differs_fails_and_leaves_nothing(world, capsys, tmp_path, monkeypatch):
    """A mutant of the writer: another rotary base in config.json must be caught by the proof and named."""
    real = hf.config

    def wrong_theta(*args):
        config = real(*args)
        return config | {"rope_theta": 9999.0, "rope_parameters": config["rope_parameters"] | {"rope_theta": 9999.0}}

    monkeypatch.setattr(hf, "config", wrong_theta)
    assert "rope_theta" in refused(capsys, "export", world / "run", "--out", tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_folders_that_hold_no_model_are_refused(capsys, tmp_path):
    for words in (["chat", tmp_path], ["export", tmp_path, "--out", tmp_path / "m"], ["report", tmp_path]):
        assert str(tmp_path) in refused(capsys, *words)
    assert list(tmp_path.iterdir()) == []


def test_defaults_of_sampling_are_those_of_the_library():
    from llamita.serve.sample import Sampling

    assert vars(verbs.Sampled()) == vars(Sampling())


def test_as_a_process_it_exits_with_2_and_prints_one_line():
    done = subprocess.run([sys.executable, "-m", "llamita", "shwo"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == "llamita: no verb is called 'shwo'; did you mean 'show'?\n"


# ---- vocabularies ----


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """Documents with sources and languages, as JSON lines."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = []
    for number in range(60):
        text = "".join(STORY.format(n=number * line, m=line * line) for line in range(20))
        lines.append(
            json.dumps({"text": text, "source": ("wiki", "code")[number % 2], "lang": "en" if number % 3 else "de"})
        )
    path.write_text("\n".join(lines))
    return path


def test_a_vocabulary_is_trained_with_weights_compared_viewed_and_advised_on(rows, capsys, tmp_path):
    words = ["tokenizer", "train", rows, "--vocab-size", "600", "--chat-format", "llama3.1"]
    code, out, _ = run(capsys, *words, "--out", tmp_path / "a", "--source-weights", "code", "3")
    assert code == 0 and "600 entries" in out and "code" in out and "60 texts" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]
    assert {path.name for path in (tmp_path / "a").iterdir()} == {
        "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "tokenizer.gguf"
    }  # fmt: skip
    assert "Cutting Knowledge Date" in (tmp_path / "a" / "tokenizer_config.json").read_text()
    assert run(capsys, "tokenizer", "train", rows, "--vocab-size", "700", "--out", tmp_path / "b")[0] == 0

    code, out, _ = run(capsys, "tokenizer", "compare", tmp_path / "a", tmp_path / "b", "--text", rows, "--json",
                       "--plot", tmp_path / "plot.svg")  # fmt: skip
    found = json.loads(out)
    assert code == 0 and list(found["vocabularies"]) == ["a", "b"] and set(found["languages"]) == {"en", "de"}
    assert "<svg" in (tmp_path / "plot.svg").read_text()
    code, out, _ = run(capsys, "tokenizer", "compare", tmp_path / "a", tmp_path / "b", "--text", rows)
    assert code == 0 and "bytes" in out and "wiki" in out

    code, out, _ = run(capsys, "tokenizer", "view", tmp_path / "a", tmp_path / "b", "--text", "a little llama", "--ids")
    assert code == 0 and out.count("bytes per token") == 2
    assert run(capsys, "tokenizer", "view", tmp_path / "a", "--text", "x", "--html", tmp_path / "v.html")[0] == 0
    assert (tmp_path / "v.html").read_text().lstrip().lower().startswith("<!doctype html>")

    code, out, _ = run(
        capsys, "tokenizer", "advise", "--text", rows, "--shape", "tiny", "--sizes", "600", "512", "--json"
    )
    assert code == 0 and [row["vocab_size"] for row in json.loads(out)["sizes"]] == [512, 600]


BAD_VOCABULARIES = {
    "train": [
        ([], "name files or folders of text"),
        (["ROWS", "--vocab-size", "100"], "vocab_size 100 is too small"),
        (["ROWS", "--vocab-size", "100000000000"], "16,777,216 is the most"),
        (["ROWS", "--max-memory", "100"], "max_memory 100 MiB is too little"),
        (["ROWS", "--workers", "0"], "workers is 0"),
        (["ROWS", "--source-weights", "wiki", "-1"], "give 0, or one from 0.01"),
        (["ROWS", "--source-weights", "wiki", "many"], "key-value pairs"),
        (["ROWS", "--source-weights", "wikki", "2"], "no text has the source 'wikki'"),
        (["ROWS", "--chat-format", "llama9"], "llama9"),
        (["ROWS", "NONE"], "no such file or folder"),
        (["BAD"], "holds no text: 1 not JSON"),
        (["EMPTY"], "holds no text"),
    ],
    "compare": [
        (["--text", "ROWS"], "name files or folders of vocabularies"),
        (["NONE", "--text", "ROWS"], "no vocabulary"),
        (["TOK", "TOK", "--text", "ROWS"], "two vocabularies have the name"),
        (["TOK", "--text", "EMPTY"], "holds no text"),
        (["TOK", "--text", "ROWS", "--plot", "x.gif"], "no kind of plot"),
        (["TOK", "--text", "ROWS", "--plot", "NONE/x.png"], "no place for a file"),
    ],
    "view": [
        (["--text", "hi"], "name files or folders of vocabularies"),
        (["TOK", "--text", "hi", "--html", "NONE/x.html"], "no place for a file"),
        (["TOK", "--text", "x" * 200_000, "--html", "OUT.html"], "100,000"),
    ],
    "advise": [
        (["--text", "ROWS", "--shape", "100mm"], "no shape is called"),
        (["--text", "ROWS", "--sizes", "300", "1024"], "give sizes from 512"),
        (["--text", "ROWS", "--sizes"], "give sizes from 512"),
        (["--text", "ROWS", "--flops", "-1"], "flops is -1.0"),
        (["--text", "ROWS", "--flops", "nan"], "flops is nan"),
        (["--text", "ONE", "--sizes", "512"], "give at least 20"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("verb", "words", "says"),
    [(verb, *case) for verb, cases in BAD_VOCABULARIES.items() for case in cases],
)
def test_bad_words_for_vocabularies_are_one_line_and_leave_nothing(world, rows, capsys, tmp_path, verb, words, says):
    (tmp_path / "bad.jsonl").write_text("not json\n")
    (tmp_path / "one.txt").write_text("one text of a few words " * 20)
    (tmp_path / "empty").mkdir()
    names = {"ROWS": rows, "NONE": tmp_path / "none", "BAD": tmp_path / "bad.jsonl", "ONE": tmp_path / "one.txt",
             "EMPTY": tmp_path / "empty", "TOK": world / "tok", "NONE/x.png": tmp_path / "none/x.png",
             "NONE/x.html": tmp_path / "none/x.html", "OUT.html": tmp_path / "out.html"}  # fmt: skip
    before = {path.name for path in tmp_path.iterdir()}
    out = ["--out", tmp_path / "out"] if verb == "train" else []
    assert says in refused(capsys, "tokenizer", verb, *(names.get(word, word) for word in words), *out)
    assert {path.name for path in tmp_path.iterdir()} - before <= {".out.words"}


@pytest.mark.parametrize("out", ["file", "file/below", "full", "/", "x" * 300])
def test_a_place_that_cannot_be_a_tokenizer_is_refused_before_the_work(rows, capsys, tmp_path, monkeypatch, out):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    place = out if out == "/" else tmp_path / out
    refused(capsys, "tokenizer", "train", rows, "--out", place, "--vocab-size", "600")
    assert (tmp_path / "file").read_text() == (tmp_path / "full" / "thesis.tex").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"]


def test_a_save_that_fails_keeps_the_counts(rows, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "llamita.tokenizer.emit.write_gguf", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left"))
    )
    words = ["tokenizer", "train", rows, "--out", tmp_path / "tok", "--vocab-size", "600"]
    assert "No space left" in refused(capsys, *words)
    assert (tmp_path / ".tok.words" / "journal.json").is_file()
    monkeypatch.undo()
    assert run(capsys, *words)[0] == 0 and not (tmp_path / ".tok.words").exists()


def test_a_group_of_verbs_lists_its_own(capsys):
    for words in (["tokenizer"], ["tokenizer", "--help"]):
        code, out, _ = run(capsys, *words)
        assert code == 0 and "tokenizer view" in out and "demo" not in out


def test_names_in_rows_cannot_reach_the_terminal_as_orders(capsys, tmp_path):
    row = {"text": "a little text about llamas " * 30, "source": "\x1b[31mred\ud800", "lang": "\u202ede"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    code, out, _ = run(
        capsys, "tokenizer", "train", tmp_path / "rows.jsonl", "--out", tmp_path / "t", "--vocab-size", "520"
    )
    assert code == 0 and "\x1b" not in out and "?[31mred? ?de" in out
