"""Layer: a person at a terminal, and a killed process. An answer is on the disk once given, and is asked for once."""

import io
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from llamita import cli
from llamita.cli import quality
from llamita.data import labels
from llamita.data.classifier import Classifier
from llamita.data.document import Document
from llamita.data.strings import Strings
from llamita.recipes.quality import interval


def some_documents(count=8):
    return [Document(f"text {i}", f"doc {i}", "web") for i in range(count)]


def answered(docs, out, answers, count=50, model=None):
    shown = []
    return labels.ask(docs, out, count, model, iter(answers), shown.append), shown


def pairs(path):
    return [(row.text, row.label) for row in labels.read(path)]


def folder_of_texts(folder, texts):
    folder.mkdir()
    (folder / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


def test_answers_are_written_in_order(tmp_path):
    given, shown = answered(some_documents(), tmp_path / "l", ["g\n", "b\n", "s\n", "G\n", "x\n", "q\n", "g\n"])
    assert given == 3 and pairs(tmp_path / "l") == [("text 0", 1), ("text 1", 0), ("text 3", 1)]
    assert [page.split(":")[0].strip() for page in shown if "===" in page] == [
        "=== 1", "=== 2", "=== 3", "=== 4", "=== 5", "=== 5",
    ]  # fmt: skip
    assert shown[-2] == labels.HELP
    assert answered(some_documents(), tmp_path / "m", ["g\n"] * 9, count=2)[0] == 2 == len(pairs(tmp_path / "m"))
    assert answered(some_documents(2), tmp_path / "n", ["g\n"] * 9)[0] == 2


def test_undo_takes_back_the_last_and_asks_again(tmp_path):
    given, shown = answered(some_documents(), tmp_path / "l", ["u", "g", "b", "s", "u", "u", "b", "g"])
    assert given == 2 and pairs(tmp_path / "l") == [("text 0", 0), ("text 1", 1)]
    assert shown[1] == labels.HELP  # nothing to undo yet
    names = [page.split(": ")[1].split()[1] for page in shown if "===" in page]
    assert names == ["0", "0", "1", "2", "3", "1", "0", "1", "2"]
    answered(some_documents(1), tmp_path / "m", ["g", "u", "q"])
    answered(some_documents(1), tmp_path / "m", ["g", "u"])
    assert pairs(tmp_path / "m") == [("text 0", 1)]


def test_a_terminal_is_not_written_to_by_a_document(tmp_path):
    document = Document("bad \x1b[2J\x07 text\nnext " + "x" * 2000, "na\x1bme", "so\rurce")
    model = Classifier(np.ones(8, np.float32), 0.0)
    _, shown = answered([document], tmp_path / "l", [], model=model)
    assert all(char.isprintable() or char == "\n" for char in shown[0])
    assert "bad ?[2J? text\nnext x" in shown[0] and "score 0.9" in shown[0] and "characters more" in shown[0]


@pytest.mark.parametrize("torn", ['{"text": "text 9", "la', '{"text": "text 9", "label": 1}', '{"text": "te\\u00'])
def test_what_a_kill_tore_is_mended(tmp_path, torn):
    out = tmp_path / "l"
    answered(some_documents(), out, ["g", "q"])
    with out.open("a") as file:
        file.write(torn)
    whole = [("text 0", 1)] + [("text 9", 1)] * torn.endswith("}")
    assert pairs(out) == whole
    answered(some_documents()[1:], out, ["b", "q"])
    assert pairs(out) == [*whole, ("text 1", 0)]


def test_rows_that_are_no_labels_are_named(tmp_path):
    path = tmp_path / "l"
    for bad in ('{"text": 1, "label": 1}', '{"text": "a", "label": 2}', '{"text": "a", "label": NaN}', "[]", "x",
                '{"text": "a"}', '{"text": "a", "label": "good"}'):  # fmt: skip
        path.write_text(f'{{"text": "ok", "label": 0.5}}\n{bad}\n{{"text": "ok", "label": 1}}\n')
        with pytest.raises(ValueError, match=r"l:2: .*a row is") as caught:
            labels.read(path)
        assert "\n" not in str(caught.value)


def test_a_row_that_is_too_long_is_named_and_not_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(labels, "MAX_LINE", 100)
    (tmp_path / "l").write_text(json.dumps({"text": "x" * 200, "label": 1}) + '\n{"text": "ok", "label": 1}\n')
    with pytest.raises(ValueError, match="longer than 100 bytes"):
        labels.read(tmp_path / "l")


def test_no_text_is_asked_about_twice_and_long_ones_are_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(labels, "MAX_CHARS", 6)
    docs = [*some_documents(), Document("text 1 and more", "long", "web"), Document("text 2", "again", "web")]
    found = labels.candidates(docs, ["text 0", "text 5 as it was"], None, seed=0)
    assert sorted(document.text for document in found) == ["text 1", *(f"text {i}" for i in (2, 3, 4, 6, 7))]
    assert found == labels.candidates(docs, ["text 0", "text 5 as it was"], None, seed=0)
    other = labels.candidates(docs, [], None, seed=1)
    assert sorted(d.text for d in other) == sorted(d.text for d in labels.candidates(docs, [], None, seed=0)) != other


def test_what_a_model_is_least_sure_of_comes_first():
    docs = [Document(word * size, f"{word}{size}", "web") for word in ("good ", "bad ") for size in range(1, 12)]
    texts = Strings.of([document.text for document in docs])
    model = Classifier.train(texts, np.repeat([1.0, 0.0], 11), num_buckets=2**10)
    doubts = np.abs(model.score(Strings.of([d.text for d in labels.candidates(docs, [], model, 0)])) - 0.5)
    assert (np.diff(doubts) >= 0).all() and np.ptp(doubts) > 0.01


def test_a_reservoir_is_a_fair_sample():
    docs = some_documents(20)
    times = np.zeros(20)
    for seed in range(2000):
        for document in labels.reservoir(docs, 5, seed):
            times[int(document.text.split()[1])] += 1
    assert times.sum() == 5 * 2000 and (np.abs(times - 500) < 5 * np.sqrt(500 * 0.75)).all()
    assert labels.reservoir(docs, 30, 0) == docs


def test_the_verb_reads_answers_and_goes_on(tmp_path, monkeypatch, capsys):
    texts, out = folder_of_texts(tmp_path / "texts", [f"text {i}" for i in range(5)]), tmp_path / "labels.jsonl"
    monkeypatch.setattr(sys, "stdin", io.StringIO("g\nb\nq\n"))
    quality.label((str(texts),), out)
    first = labels.read(out)
    assert "2 labelled now, 2 in" in capsys.readouterr().out and [row.label for row in first] == [1, 0]
    monkeypatch.setattr(sys, "stdin", io.StringIO("g\n" * 9))
    quality.label((str(texts),), out)
    said = capsys.readouterr().out
    assert "3 labelled now, 5 in" in said and not any(f"\n{row.text}\n" in said for row in first)
    assert sorted(row.text for row in labels.read(out)) == [f"text {i}" for i in range(5)]
    assert cli.main(["data", "label", str(texts), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert "give more text" in error and error.count("\n") == 1


def test_a_killed_session_leaves_what_was_answered(tmp_path):
    texts, out = folder_of_texts(tmp_path / "texts", [f"text {i}" for i in range(50)]), tmp_path / "labels.jsonl"
    command = [sys.executable, "-c", f"from llamita.cli.quality import label; from pathlib import Path; "
               f"label(({str(texts)!r},), Path({str(out)!r}))"]  # fmt: skip
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
    process.stdin.write(b"g\nb\ng\n")
    seen = b""
    while b"=== 4" not in seen:
        chunk = os.read(process.stdout.fileno(), 65536)
        assert chunk, seen
        seen += chunk
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdin.close(), process.stdout.close()
    assert [row.label for row in labels.read(out)] == [1, 0, 1]


def corpus_of_two(tmp_path, count=120):
    good = folder_of_texts(tmp_path / "good", [f"w{i} the river of the town w{i % 7} stands old" for i in range(count)])
    bad = folder_of_texts(tmp_path / "bad", [f"w{i} buy cheap now click w{i % 7} here free" for i in range(count)])
    return good, bad


def test_judge_trains_and_prints_its_table(tmp_path, capsys):
    good, bad = corpus_of_two(tmp_path)
    out = tmp_path / "q.safetensors"
    assert cli.main(["data", "judge", "--good", str(good), "--bad", str(bad), "--out", str(out)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"{out}: learnt from") and "auc 1.000" in said[1]
    assert [line.split()[0] for line in said[4:9]] == ["90%", "75%", "50%", "25%", "10%"]
    assert said[7].split()[-1] == said[8].split()[-1] == "100.0%" != said[4].split()[-1]
    assert said[2].startswith("the accuracy lies between 0.9") and said[2].endswith("and 1.000 (95%)")
    assert all("river" in line for line in said if line.startswith("best"))
    assert all("cheap" in line for line in said if line.startswith("worst"))
    scores = Classifier.load(out).score(Strings.of(["the river of the town stands old", "buy cheap now click here"]))
    assert scores[0] > 0.8 and scores[1] < 0.2
    again = tmp_path / "again.safetensors"
    quality.judge(good=(str(good),), bad=(str(bad),), out=again)
    assert again.read_bytes() == out.read_bytes()


def test_a_judge_that_was_tried_on_few_says_how_little_that_shows(tmp_path, capsys):
    good, bad = corpus_of_two(tmp_path, 20)
    words = ["data", "judge", "--good", str(good), "--bad", str(bad), "--out", str(tmp_path / "q")]
    assert cli.main(words) == 0
    said = capsys.readouterr().out.splitlines()
    assert "accuracy 1.000" in said[1] and said[2].endswith("and 1.000 (95%): too few to tell, label more")
    low = float(said[2].split("between ")[1].split()[0])
    assert 0.5 < low < 0.9, "all right, and yet not sure"


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [(8, 8, 0.6756, 1.0), (0, 8, 0.0, 0.3244), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662)],
)
def test_the_interval_is_wilsons(right, total, low, high):
    """The last row is the example of Newcombe 1998 (Statistics in Medicine 17), table I."""
    assert interval(right, total) == pytest.approx((low, high), abs=1e-4)


def test_labels_and_folders_go_together_and_what_is_missing_is_told_in_a_line(tmp_path, capsys):
    good, _ = corpus_of_two(tmp_path)
    out, rows = tmp_path / "q", tmp_path / "l.jsonl"
    rows.write_text("".join(json.dumps({"text": f"buy w{i} cheap", "label": 0.1}) + "\n" for i in range(100)))
    assert cli.main(["data", "judge", "--labels", str(rows), "--good", str(good), "--out", str(out)]) == 0
    capsys.readouterr()
    for words, told in (
        ([], "nothing to learn from"),
        (["--labels", str(rows)], "too few to hold some of both sides out"),
        (["--labels", str(tmp_path / "none")], "No such file"),
        (["--good", str(tmp_path / "none")], "none"),
    ):
        assert cli.main(["data", "judge", *words, "--out", str(out)]) == 2
        error = capsys.readouterr().err
        assert told in error and error.count("\n") == 1, words
