"""Layer: a real training run. What the ledger says that a step read is in the batch that the step trained on."""

import dataclasses
import io
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from llamita.cli import data as verbs
from llamita.config import save
from llamita.data import ledger
from llamita.data.recipe import Recipe, Rules
from llamita.data.shards import RECORD, SPLITS, TOKEN, VERSION, Corpus, Manifest, write_shard
from llamita.recipes import stages, where
from llamita.train import loop
from llamita.train.run import Data
from tests.fakes import byte_tokenizer
from tests.training import RUN, SHAPE

LICENSES = ("CC-BY-4.0", "", "MIT")


def some_rows(count: int = 40) -> list[dict]:
    """Documents of very unequal lengths, some longer than a row of training, from three sources."""
    return [
        {
            "id": 2**63 + i, "name": f"doc {i}", "source": ("web", "books", "code")[i % 3], "url": f"https://x.example/{i}",
            "license": LICENSES[i % 3], "date": "", "lang": ("en", "de", "")[i % 3],
            "kind": ("prose", "prose", "code")[i % 3], "code_lang": "",
            "text": f"<{i}> " + f"word{i} " * (1 + i * 7 % 31), "words": 1 + i * 7 % 31,
            "cluster_size": 1 + i % 5, "quality": float("nan") if i % 3 == 2 else i / 100,
        }
        for i in range(count)
    ]  # fmt: skip


def hand_made(folder: Path, rows: list[dict], docs_per_shard: int = 15, vocab_size: int | None = None) -> Corpus:
    """A corpus folder as `data build` leaves it, every tenth document held out."""
    tokenizer = byte_tokenizer()
    names = {column: sorted({row[column] for row in rows}) for column in ("source", "lang", "kind")}
    splits: dict[str, list] = {split: [] for split in SPLITS}
    folder.mkdir()
    number = 0
    for split in SPLITS:
        mine = [row for i, row in enumerate(rows) if (i % 10 == 0) == (split == "heldout")]
        for start in range(0, len(mine), docs_per_shard):
            part = mine[start : start + docs_per_shard]
            ids = [
                np.array([tokenizer.bos_id, *tokenizer.encode(row["text"]), tokenizer.eos_id], TOKEN) for row in part
            ]
            records = np.zeros(len(part), RECORD)
            records["end"], records["id"] = np.cumsum([len(one) for one in ids]), [row["id"] for row in part]
            records["bytes"] = [len(row["text"].encode()) for row in part]
            for column, known in names.items():
                records[column] = [known.index(row[column]) for row in part]
            columns = {key: [row[key] for row in part] for key in part[0] if key != "text"}
            table = pyarrow.table(columns | {"id": records["id"]})
            table = table.append_column("num_bytes", [records["bytes"].astype(np.int64)])
            table = table.append_column("num_tokens", [np.array([len(one) for one in ids])])
            splits[split].append(write_shard(folder, number, ids, records, table))
            number += 1
    tokenizer.save(folder / "tokenizer")
    manifest = Manifest(
        VERSION, tokenizer.fingerprint, vocab_size or tokenizer.vocab_size, TOKEN.str, 0, 0.1, "plain", "0" * 64,
        names["source"], names["lang"], names["kind"], splits,
    )  # fmt: skip
    (folder / "manifest.json").write_text(manifest.to_json())
    return Corpus.open(folder)


def with_removed(folder: Path) -> None:
    """Adds what a build removed: 40 near duplicates and 10 documents that a rule refused, in two files."""
    (folder / "removed").mkdir()
    rows = [
        {"name": f"gone {i}", "source": "web", "url": "", "lang": "en", "kind": "prose", "text": f"refuse {i}",
         "num_bytes": 9, "reason": "gopher-quality@1:words" if i % 5 == 0 else "duplicate:near"}
        for i in range(50)
    ]  # fmt: skip
    for number, part in enumerate((rows[:30], rows[30:])):
        path = folder / "removed" / f"part-{number:06d}-read.parquet"
        pq.write_table(pyarrow.Table.from_pylist(part), path, row_group_size=7)


MIXES = [(), ("kind=code:50% rest", "60%: lang=de:20% source=web")]


@pytest.fixture(scope="module", params=MIXES, ids=["one pool", "pools and phases"])
def trained(tmp_path_factory, request):
    """A run of 20 steps (more than two epochs), and each batch as the loop was given it."""
    home = tmp_path_factory.mktemp("run")
    corpus = hand_made(home / "corpus", some_rows())
    with_removed(home / "corpus")
    shape = dataclasses.replace(SHAPE, vocab_size=byte_tokenizer().vocab_size)
    run = dataclasses.replace(
        RUN, shape=shape, batch_size=8, data=Data(corpus=str(corpus.folder), seq_len=64, mix=request.param)
    )
    seen = []
    real = loop.Trainer._step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Trainer, "_step", lambda self, batch, size: seen.append(batch) or real(self, batch, size))
        stages.pretrain(run, home / "run", prompts=[])
    return home / "run", seen


def test_every_document_of_a_step_stands_in_the_batch_it_trained_on(trained):
    folder, batches = trained
    run = where.Trained.open(folder)
    texts = {row["name"]: row["text"] for row in some_rows()}
    tokenizer = byte_tokenizer()
    assert run.step == len(batches) == 20
    for step, batch in enumerate(batches, start=1):
        found = run.at(step)
        covered = np.zeros(batch.inputs_BT.shape, int)
        for document in found["documents"]:
            (start, end), (first, last) = document["row_tokens"], document["doc_tokens"]
            whole = [tokenizer.bos_id, *tokenizer.encode(texts[document["name"]]), tokenizer.eos_id]
            assert batch.inputs_BT[document["row"], start:end].tolist() == whole[first:last]
            assert batch.targets_BT[document["row"], start:end].tolist() == whole[first + 1 : last + 1]
            covered[document["row"], start:end] += 1
            assert texts[document["name"]].startswith(f"<{document['name'].removeprefix('doc ')}>")
        assert ((batch.targets_BT.numpy() >= 0) == (covered == 1)).all() and covered.max() == 1, "all that bears loss"
        assert found["tokens"] == covered.sum()
        assert sum(document["share"] for document in found["documents"]) == pytest.approx(1)
        assert all(sum(shares.values()) == pytest.approx(1) for shares in found["shares"].values())


def test_another_step_is_another_batch(trained):
    """Negative control of the test above: what it compares differs from step to step."""
    folder, batches = trained
    run = where.Trained.open(folder)
    assert run.at(1)["documents"] != run.at(2)["documents"]
    assert not (batches[0].inputs_BT == batches[1].inputs_BT).all()


def test_the_steps_of_a_document_are_those_whose_ledger_names_it(trained):
    folder, _ = trained
    run = where.Trained.open(folder)
    reads = defaultdict(list)
    for step in range(1, 21):
        for use in run.at(step)["documents"]:
            reads[use["name"]].append((step, use["epoch"], use["row"], use["doc_tokens"]))
    epochs = {read[1] for each in reads.values() for read in each}
    assert epochs >= {0, 1, 2}, "the run is longer than an epoch"
    for row in some_rows():
        (document,) = run.document(row["name"])["documents"]
        told = [(read["step"], read["epoch"], read["row"], read["doc_tokens"]) for read in document["reads"]]
        assert sorted(told) == sorted(reads[row["name"]])
        assert document["split"] == ("train" if int(row["name"][4:]) % 10 else "heldout")
        assert run.document(str(row["id"]))["documents"] == [document]


def test_ledger_rows_say_where_a_document_is_from(trained):
    folder, _ = trained
    rows = {row["name"]: row for row in some_rows()}
    for document in where.Trained.open(folder).at(3)["documents"]:
        row = rows[document["name"]]
        assert {name: document[name] for name in ("id", "url", "source", "license", "lang", "kind")} == {
            name: row[name] for name in ("id", "url", "source", "license", "lang", "kind")
        }
        quality = document["signals"]["quality"]
        assert document["signals"]["words"] == row["words"]
        assert quality is None if np.isnan(row["quality"]) else quality == pytest.approx(row["quality"])


def test_the_verb_prints_json_and_tables(trained, capsys):
    folder, _ = trained
    verbs.where(folder, 5, as_json=True)
    found = json.loads(capsys.readouterr().out)
    verbs.where(folder, 5)
    told = capsys.readouterr().out
    assert all(document["name"] in told and document["url"] in told for document in found["documents"])
    assert "by license" in told and "CC-BY-4.0" in told and "not known" in told
    verbs.where(folder, document="doc 10")
    assert "it is held out" in capsys.readouterr().out
    verbs.where(folder, document="doc 11")
    assert "step" in capsys.readouterr().out


def test_what_a_document_says_does_not_steer_the_terminal():
    stream = io.StringIO()
    row = {"name": "a\x1b[31m", "source": "[red]b[/red]", "text": "c\x1b]0;d\x07\n[/bold]", "signals": {}}
    where.show_documents([row], Console(file=stream, markup=False, highlight=False))
    assert "\x1b" not in stream.getvalue() and "[red]b[/red]" in stream.getvalue() and "[/bold]" in stream.getvalue()


def test_bad_questions_are_answered_in_one_line(trained, tmp_path):
    folder, _ = trained
    run = where.Trained.open(folder)
    for wrong in (
        lambda: run.at(0), lambda: run.at(21), lambda: run.document("doc 1000"), lambda: run.document("gone 0"),
        lambda: run.document("9" * 30), lambda: where.Trained.open(tmp_path), lambda: verbs.where(folder),
        lambda: verbs.where(folder, 1, "doc 1"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"^[^\n]+$"):
            wrong()
    with pytest.raises(ValueError, match=r"the build removed it \(gopher-quality@1:words\)"):
        run.document("gone 0")
    other = hand_made(tmp_path / "other", some_rows(30))
    with pytest.raises(ValueError, match=r"is not the corpus that .* was trained on; give --corpus"):
        where.Trained.open(folder, other.folder)


def test_a_step_beyond_the_present_one_is_foretold_but_no_document_was_read_in_it(trained, tmp_path):
    folder, _ = trained
    (tmp_path / "run.toml").write_bytes((folder / "run.toml").read_bytes())
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    kept = [line for line in lines if json.loads(line).get("step", 0) <= 10]
    (tmp_path / "metrics.jsonl").write_text("\n".join(kept) + "\n")
    early, late = where.Trained.open(tmp_path), where.Trained.open(folder)
    assert early.step == 10 and early.at(15)["documents"] == late.at(15)["documents"]
    for name in ("doc 1", "doc 2", "doc 3"):
        (document,), (whole,) = (run.document(name)["documents"] for run in (early, late))
        assert document["reads"] == [read for read in whole["reads"] if read["step"] <= 10] != whole["reads"]


def test_removed_documents_by_reason(tmp_path):
    with_removed(tmp_path)
    near = ledger.removed(tmp_path, "duplicate", 8)
    assert [row["name"] for row in near][0::7] == ["gone 1", "gone 49"], "evenly spread from the first to the last"
    assert {row["reason"] for row in near} == {"duplicate:near"} and len(near) == 8
    assert len(ledger.removed(tmp_path, "gopher-quality@1:words", 100)) == 10
    assert len(ledger.removed(tmp_path, "duplicate:near", 100)) == 40
    with pytest.raises(ValueError, match="nothing was removed for 'duplicate:nea'; did you mean 'duplicate:near'"):
        ledger.removed(tmp_path, "duplicate:nea", 8)


def test_inspecting_a_corpus(tmp_path, capsys):
    hand_made(tmp_path / "c", some_rows())
    with_removed(tmp_path / "c")
    verbs.inspect((str(tmp_path / "c"),), count=5, as_json=True)
    found = json.loads(capsys.readouterr().out)["documents"]
    texts = {row["name"]: row["text"] for row in some_rows()}
    assert len(found) == 5 and all(texts[row["name"]] == row["text"] for row in found)
    assert all("words" in row["signals"] for row in found)
    verbs.inspect((str(tmp_path / "c"),), rule="gopher-quality@1", count=3)
    told = capsys.readouterr().out
    assert told.count("gopher-quality@1:words") == 3 and "refuse 0" in told and "refuse 45" in told


def test_inspecting_raw_text_tries_a_recipe(tmp_path, capsys):
    told = "the one of the man who was with the sea. " * 3
    good = [{"text": f"Here is story {i} and {told}", "id": f"good {i}"} for i in range(30)]
    bad = [{"text": "no", "id": f"bad {i}"} for i in range(10)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in good + bad))
    save(Recipe("mine", rules=Rules(prose=("words>=5",))), tmp_path / "mine.toml")
    verbs.inspect((str(path),), recipe=str(tmp_path / "mine.toml"), count=4, as_json=True)
    out = capsys.readouterr()
    found = json.loads(out.out)["documents"]
    assert [row["name"] for row in found][::3] == ["good 0", "good 29"] and len(found) == 4
    assert all(row["text"].startswith("Here is story") and row["signals"]["words"] > 5 for row in found)
    assert "of 40 documents 30 would stay" in out.err and "words>=5" in out.err
    verbs.inspect((str(path),), rule="words>=5", recipe=str(tmp_path / "mine.toml"), as_json=True)
    gone = json.loads(capsys.readouterr().out)["documents"]
    assert [(row["name"], row["reason"]) for row in gone] == [(f"bad {i}", "words>=5") for i in range(10)]
    with pytest.raises(ValueError, match="no document goes by 'word>=5'; did you mean 'words>=5'"):
        verbs.inspect((str(path),), rule="word>=5", recipe=str(tmp_path / "mine.toml"))


@pytest.mark.parametrize("total", [0, 1, 7, 1000])
@pytest.mark.parametrize("count", [0, 1, 7, 20])
def test_spread_takes_as_many_as_there_are(total, count):
    places = ledger.spread(total, count)
    assert len(set(places.tolist())) == min(total, count) and all(0 <= place < total for place in places)
