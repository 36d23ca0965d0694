"""Layer: a folder and kills. At any moment in which a corpus is put in its place, one of the two is whole."""

import os
import shutil
from contextlib import suppress
from pathlib import Path

import pytest

from llamita.data import workspace as room
from llamita.data.build import build, prepared, task
from llamita.data.engine import Stopped
from llamita.data.workspace import is_placed, place, workspace
from llamita.recipes.corpora import judge_of
from tests.fakes import byte_tokenizer
from tests.test_build import NEAR, hashes, in_small_parts, some_text


class Killed(BaseException): ...


def finish(out: Path, text: str, key: str = "k") -> None:
    """A build of one stage, which leaves out what is done."""
    with workspace(out, key) as work:
        if not (work / "corpus").exists():
            (work / "corpus").mkdir()
            (work / "corpus" / "manifest.json").write_text(text)
        (work / "prepared").write_text("")


def deadly(monkeypatch, at: int) -> list[str]:
    """Everything that changes a folder within `place` counts as a step; before step `at` the process is killed."""
    steps: list[str] = []

    def counted(name, function):
        def call(*arguments, **named):
            steps.append(name)
            if len(steps) == at:
                raise Killed
            return function(*arguments, **named)

        return call

    for owner, name in ((Path, "rename"), (Path, "unlink"), (os, "unlink"), (os, "rmdir")):
        monkeypatch.setattr(owner, name, counted(name, getattr(owner, name)))
    return steps


@pytest.mark.parametrize("had_one", [False, True])
def test_killed_at_any_step_of_placing_nothing_is_lost_and_the_next_build_sweeps(tmp_path, had_one):
    outcomes = []
    for at in range(1, 30):
        folder = tmp_path / f"{at}"
        out = folder / "c"
        folder.mkdir()
        if had_one:
            finish(out, "old")
        with workspace(out, "k") as work:
            (work / "corpus").mkdir()
            (work / "corpus" / "manifest.json").write_text("new")
            for name in ("prepared", "read"):
                (work / name).write_text("")
            with pytest.MonkeyPatch.context() as patch:
                steps = deadly(patch, at)
                with suppress(Killed):
                    place(work)
        if len(steps) < at:
            break
        names = {path.name for path in folder.iterdir()}
        assert ".c.partial" in names or "c" in names
        texts = {path.read_text() for path in folder.glob("*/manifest.json")}
        assert (texts <= {"old", "new"}) and (texts or (folder / ".c.partial/corpus/manifest.json").exists())
        outcomes.append((sorted(names), steps[-1]))
        finish(out, "again")
        assert sorted(path.name for path in folder.iterdir()) == ["c"], outcomes[-1]
        assert (out / "manifest.json").read_text() in ("new", "again")
    assert len(outcomes) >= 6, "some steps were not killed"


def test_between_two_renames_the_old_corpus_comes_back(tmp_path):
    """Whatever is built next: bad input then leaves the corpus that stood there."""
    finish(tmp_path / "c", "old")
    (tmp_path / "c").rename(tmp_path / ".c.old")
    with pytest.raises(ValueError, match="bad"), workspace(tmp_path / "c", "other"):
        assert (tmp_path / "c" / "manifest.json").read_text() == "old"
        raise ValueError("bad input")
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    shutil.copytree(tmp_path / "c", tmp_path / ".c.old")
    with pytest.raises(ValueError, match="bad"), workspace(tmp_path / "c", "other"):
        raise ValueError("bad input")
    assert [path.name for path in tmp_path.iterdir()] == ["c"], "a copy that is not needed any more goes"


def test_refuse_of_a_placed_corpus_is_not_taken_for_finished_tasks(tmp_path):
    """Half of the old files are deleted: markers of tasks whose files are gone must not count."""
    text = some_text(tmp_path / "text")
    build(NEAR, [text], byte_tokenizer(), tmp_path / "c")
    wanted = hashes(tmp_path / "c")
    work = prepared(NEAR, [text], byte_tokenizer(), tmp_path / "c")
    task(work, "read", 0, 1, judge_of)
    shutil.rmtree(work / "corpus")
    for path in (work / "read").glob("*.parquet"):
        path.unlink()
    assert is_placed(work)
    build(NEAR, [text], byte_tokenizer(), tmp_path / "c")
    assert hashes(tmp_path / "c") == wanted and not work.exists()


def test_only_a_work_folder_is_taken_for_one(tmp_path):
    finish(tmp_path / "c", "whole")
    assert (
        is_placed(tmp_path / ".c.partial") and not is_placed(tmp_path / "c") and not is_placed(tmp_path / ".d.partial")
    )


def test_a_stranger_to_the_last_stage_places_nothing(tmp_path):
    """Of three tasks that are to finish, the second finds nothing to do."""
    work = prepared(NEAR, [some_text(tmp_path / "text")], byte_tokenizer(), tmp_path / "c")
    for name in ("read", "match", "resolve", "lines", "frequent", "encode", "shards"):
        task(work, name, 0, 1, judge_of)
    task(work, "finish", 1, 3, judge_of)
    assert not (tmp_path / "c").exists()
    task(work, "finish", 0, 3, judge_of)
    assert hashes(tmp_path / "c") and not work.exists()


def test_a_work_folder_that_was_moved_goes_on(tmp_path, monkeypatch):
    """It holds no path of its own: its tasks are done where it stands, and the corpus appears beside it."""
    in_small_parts(monkeypatch)
    text = some_text(tmp_path / "text")
    build(NEAR, [text], byte_tokenizer(), tmp_path / "one")
    work = prepared(NEAR, [text], byte_tokenizer(), tmp_path / "c")
    task(work, "read", 0, 2, judge_of)
    (tmp_path / "elsewhere").mkdir()
    moved = work.rename(tmp_path / "elsewhere" / work.name)
    done = {path: path.stat().st_mtime_ns for path in (moved / "read").glob("*.json")}
    task(moved, "read", 1, 2, judge_of)
    kept = {}

    def seen(work):
        kept.update({path: path.stat().st_mtime_ns for path in (work / "read").glob("*.json")})
        place(work)

    monkeypatch.setattr(room, "place", seen)
    build(NEAR, [text], byte_tokenizer(), tmp_path / "elsewhere" / "c")
    assert done and done.items() <= kept.items(), "what was done is not done again"
    assert hashes(tmp_path / "elsewhere" / "c") == hashes(tmp_path / "one")
    assert not (tmp_path / "c").exists() and not moved.exists()


def test_a_work_folder_whose_input_was_moved_is_refused(tmp_path):
    text = some_text(tmp_path / "text")
    work = prepared(NEAR, [text], byte_tokenizer(), tmp_path / "c")
    text.rename(tmp_path / "away")
    with pytest.raises(Stopped, match="was there when the build was planned: bring it back, and go on"):
        task(work, "read", 0, 1, judge_of)
    with pytest.raises(ValueError, match="no such file or folder"):
        build(NEAR, [text], byte_tokenizer(), tmp_path / "c")
    build(NEAR, [tmp_path / "away"], byte_tokenizer(), tmp_path / "c")
    assert hashes(tmp_path / "c") and not work.exists(), "what was done of other paths is begun anew"
