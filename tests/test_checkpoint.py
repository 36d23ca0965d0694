"""Faults: checkpoints that are torn, cut, full-disked or of another run."""

import dataclasses
import errno
import os

import pytest
import torch

from llamita import log
from llamita.checkpoint import store
from tests.training import RUN, trainer


def write_ones(path):
    path.write_bytes(b"1" * 1000)


def test_saving_keeps_the_newest_and_leaves_nothing_aside(tmp_path):
    for step in (1, 2, 3):
        store.save(tmp_path, step, {"a": write_ones}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000002", "step_00000003"]
    assert store.damage(tmp_path / "step_00000003") is None


@pytest.mark.parametrize("fault", ["cut", "flipped", "gone", "no manifest", "manifest torn", "manifest escapes"])
def test_every_damage_is_seen_and_the_one_before_is_taken(fault, tmp_path):
    for step in (1, 2):
        store.save(tmp_path, step, {"a": write_ones}, keep=2)
    newest = tmp_path / "step_00000002"
    if fault == "cut":
        os.truncate(newest / "a", 500)
    elif fault == "flipped":
        (newest / "a").write_bytes(b"1" * 999 + b"2")
    elif fault == "gone":
        (newest / "a").unlink()
    elif fault == "no manifest":
        (newest / store.MANIFEST).unlink()
    elif fault == "manifest torn":
        os.truncate(newest / store.MANIFEST, 10)
    else:
        (newest / store.MANIFEST).write_text('{"../step_00000001/a": {}}')
    said: list[str] = []
    assert store.newest(tmp_path, said.append) == tmp_path / "step_00000001"
    assert len(said) == 1 and "step 2 is damaged" in said[0]


def test_a_full_disk_leaves_only_the_older_checkpoint(tmp_path):
    store.save(tmp_path, 1, {"a": write_ones}, keep=2)

    def full(path):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with pytest.raises(OSError, match="No space left"):
        store.save(tmp_path, 2, {"b": write_ones, "a": full}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    assert store.damage(tmp_path / "step_00000001") is None


def test_a_truncated_checkpoint_falls_back_says_so_and_still_ends_the_same(tmp_path):
    whole = trainer(tmp_path / "whole").fit()
    stopped = trainer(tmp_path / "cut")
    stopped.fit()
    newest = tmp_path / "cut" / "checkpoints" / "step_00000020"
    os.truncate(newest / "model.safetensors", 1000)
    again = trainer(tmp_path / "cut")
    assert again.counters.step == 15
    messages = [row["message"] for row in log.read(tmp_path / "cut" / "metrics.jsonl") if row["kind"] == "event"]
    assert "step 20 is damaged" in messages[0] and "step 15" in messages[1]
    resumed = again.fit()
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_going_on_with_other_settings_is_refused_by_name(tmp_path):
    trainer(tmp_path, dataclasses.replace(RUN, steps=5)).fit()
    other = dataclasses.replace(RUN, steps=5, optim=dataclasses.replace(RUN.optim, lr=0.5))
    with pytest.raises(ValueError, match=r"optim.lr was 0.01 and is 0.5"):
        trainer(tmp_path, other)
    quieter = dataclasses.replace(RUN, steps=5, log=dataclasses.replace(RUN.log, every=1))
    assert trainer(tmp_path, quieter).counters.step == 5
