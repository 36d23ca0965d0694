"""Faults: checkpoints that are torn, cut, full-disked, hostile or of another run."""

import dataclasses
import errno
import json
import os
import pickle
import shutil
import threading

import pytest
import torch

from llamita import log
from llamita.checkpoint import shards, store
from llamita.checkpoint.store import Keep
from llamita.checkpoint.weights import weights
from llamita.checkpoint.writer import Writer
from tests.training import RUN, trainer

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
RANK = "rank_00000.safetensors"


def state(value: float = 1.0) -> dict:
    return {"model": {"w": torch.full((4, 8), value)}, "counters": {"step": 3}}


def write_ones(path):
    path.write_bytes(b"1" * 1000)


def save(root, step, keep=Keep(newest=2)):  # noqa: B008 - frozen
    return store.save(root, step, state(step), {"a": write_ones}, keep=keep)


def test_saving_keeps_the_newest_and_leaves_nothing_aside(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000002", "step_00000003"]
    assert store.damage(tmp_path / "step_00000003") is None


@pytest.mark.parametrize(
    ("keep", "steps", "written", "stay"),
    [
        (Keep(newest=2), [1, 2, 3, 4], 4, {3, 4}),
        (Keep(newest=2, every=2), [2, 4, 5, 6, 7, 8, 9], 9, {2, 4, 6, 8, 9}),
        (Keep(newest=0), [1, 2], 2, {2}),
        (Keep(newest=2), [10, 15, 18, 20], 18, {15, 18}),  # went back from 20 to 15: 20 is of another past
        (Keep(newest=1, every=10), [10, 20, 30], 12, {10}),
    ],
)
def test_what_stays_is_the_newest_and_every_mth_never_less_than_what_was_just_written(keep, steps, written, stay):
    steps = sorted({*steps, written})
    assert set(steps) - keep.dropped(steps, written) == stay | {written}


FAULTS = {
    "cut": (RANK, "bytes instead of"),
    "flipped": (RANK, "is not as it was written"),
    "gone": (RANK, "is missing"),
    "small file flipped": ("a", "is not as it was written"),
    "index flipped": (shards.INDEX, "is not as it was written"),
    "no manifest": (store.MANIFEST, "is missing or unreadable"),
    "manifest torn": (store.MANIFEST, "is missing or unreadable"),
    "manifest is a list": (store.MANIFEST, "is missing or unreadable"),
    "manifest escapes": ("../step_00000001/a", "is missing"),
    "manifest empty": (shards.INDEX, "is not in MANIFEST.json"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_damage_is_seen_and_the_one_before_is_taken(fault, tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    newest = tmp_path / "step_00000002"
    name, said_of_it = FAULTS[fault]
    manifest = json.loads((newest / store.MANIFEST).read_text())
    if fault == "cut":
        os.truncate(newest / RANK, 150)
    elif "flipped" in fault:
        content = bytearray((newest / name).read_bytes())
        content[-5] ^= 1
        (newest / name).write_bytes(content)
    elif fault in ("gone", "no manifest"):
        (newest / name).unlink()
    elif fault == "manifest torn":
        os.truncate(newest / name, 10)
    elif fault == "manifest is a list":
        (newest / name).write_text("[1]")
    elif fault == "manifest escapes":
        (newest / store.MANIFEST).write_text(json.dumps(manifest | {name: manifest["a"]}))
    else:
        (newest / store.MANIFEST).write_text("{}")
    said: list[str] = []
    assert store.newest(tmp_path, said.append) == tmp_path / "step_00000001"
    assert len(said) == 1 and f"step 2 is damaged ({name} " in said[0] and said_of_it in said[0]


@pytest.mark.parametrize("way", ["sync", "async"])
def test_a_full_disk_leaves_only_the_older_checkpoint(way, tmp_path):
    save(tmp_path, 1)

    def full(path):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with pytest.raises(OSError, match="checkpoint of step 2 failed: No space left"):
        files = {"b": write_ones, "a": full}
        if way == "sync":
            store.save(tmp_path, 2, state(), files, keep=Keep(newest=1))
        else:
            writer = Writer()
            writer.save(tmp_path, 2, state(), files, keep=Keep(newest=1))
            writer.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    assert store.damage(tmp_path / "step_00000001") is None


def test_a_file_is_what_safetensors_reads_with_no_help_of_ours(tmp_path):
    import safetensors.torch

    found = safetensors.torch.load_file(save(tmp_path, 1) / RANK)
    assert torch.equal(found["model.w"], state(1.0)["model"]["w"])


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_no_pickle_is_ever_opened_whatever_lies_in_the_folder(tmp_path):
    folder, mark = save(tmp_path / "c", 1), tmp_path / "ran"
    bomb = pickle.dumps(Bomb(mark))
    manifest = json.loads((folder / store.MANIFEST).read_text())
    for name in (".metadata", "__0.metadata", "__0_0.distcp", RANK):
        (folder / name).write_bytes(bomb)
        manifest[name] = shards.describe(folder / name)
    (folder / store.MANIFEST).write_text(json.dumps(manifest))
    assert store.newest(tmp_path / "c", print) == folder, "the hashes are the attacker's own"
    with pytest.raises(ValueError, match="cannot be read"):
        store.load(folder, state())
    with pytest.raises(ValueError, match="cannot be read"):
        dict(weights(folder))
    assert not mark.exists()
    pickle.loads(bomb).close()
    assert mark.exists(), "control: the bomb works where a pickle is opened"


def entry(**changes) -> dict:
    whole = {"dtype": "F32", "size": [4, 8], "parts": [[RANK, [0, 0], [4, 8]]]}
    return {"tensors": {"model.w": whole | changes}, "values": {}}


HOSTILE = {
    "leaves the folder": entry(parts=[["../../other.safetensors", [0, 0], [4, 8]]]),
    "absolute": entry(parts=[["/etc/passwd", [0, 0], [4, 8]]]),
    "no safetensors": entry(parts=[["a", [0, 0], [4, 8]]]),
    "no string": entry(parts=[[7, [0, 0], [4, 8]]]),
    "does not fill": entry(parts=[[RANK, [0, 0], [2, 8]]]),
    "no parts": entry(parts=[]),
    "outside": entry(parts=[[RANK, [1, 0], [4, 8]]]),
    "negative": entry(size=[-4, -8], parts=[[RANK, [0, 0], [-4, -8]]]),
    "floats": entry(size=[4.0, 8.0]),
    "other rank": entry(parts=[[RANK, [0], [32]]]),
    "unknown dtype": entry(dtype="OBJECT"),
    "more keys": entry(code="import os"),
    "values are a list": entry() | {"values": [1]},
    "no dict": [1, 2],
    "nothing": {},
}


@pytest.mark.parametrize("fault", [*HOSTILE, "deep", "torn", "too large", "missing"])
def test_a_hostile_index_is_refused_in_one_line(fault, tmp_path, monkeypatch):
    folder = save(tmp_path, 1)
    index = folder / shards.INDEX
    if fault == "missing":
        index.unlink()
    elif fault == "too large":
        monkeypatch.setattr(shards, "MAX_INDEX", 10)
    else:
        texts = {"deep": "[" * 100_000, "torn": index.read_text()[:-9]}
        index.write_text(texts.get(fault) or json.dumps(HOSTILE[fault]))
    for work in (lambda: store.load(folder, state()), lambda: weights(folder)):
        with pytest.raises(ValueError, match=r"is no index of a checkpoint") as caught:
            work()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [[10**6, 10**6], [2, 8], [8, 4]])
def test_a_size_that_the_file_does_not_have_takes_no_memory(size, tmp_path):
    folder = save(tmp_path, 1)
    (folder / shards.INDEX).write_text(json.dumps(entry(size=size, parts=[[RANK, [0, 0], size]])))
    with pytest.raises(ValueError, match="is not of the size or dtype"):
        dict(weights(folder))
    with pytest.raises(ValueError, match="Size mismatch"):
        store.load(folder, {"model": state()["model"]})


def test_a_dict_is_read_whole_or_not_at_all(tmp_path):
    """An optimizer that has no moments before its first step would otherwise go on without those that were saved."""
    moments = {"w": {"exp_avg": torch.ones(3), "step": torch.tensor(7.0)}, "groups": [{"lr": 0.1}]}
    folder = store.save(tmp_path, 1, state() | {"optimizer": moments, "rng 1": {"cpu": torch.ones(2)}}, {}, keep=Keep())
    with pytest.raises(ValueError, match=r"holds optimizer\.w\.exp_avg, which no rank has a place for"):
        store.load(folder, state() | {"optimizer": {"groups": [{"lr": 0.0}]}})
    store.load(folder, state())  # whole dicts may stay


def test_what_was_a_value_is_no_tensor_and_a_name_must_be_there(tmp_path):
    folder = save(tmp_path, 1)
    with pytest.raises(ValueError, match="step is a tensor here and a plain value in the checkpoint"):
        store.load(folder, {"counters": {"step": torch.zeros(())}})
    with pytest.raises(ValueError, match=r"holds no model\.v"):
        store.load(folder, {"model": {"v": torch.zeros(4, 8)}})
    wider = {"model": {"w": torch.zeros(4, 8, dtype=torch.float64)}}
    store.load(folder, wider)
    assert wider["model"]["w"].dtype == torch.float64 and (wider["model"]["w"] == 1).all()


def test_what_changes_after_an_asynchronous_save_began_is_not_in_it(tmp_path, monkeypatch):
    """Weights, plain values and small files alike; the write is held until all have changed."""
    go, real = threading.Event(), shards.write
    monkeypatch.setattr(shards, "write", lambda *args: go.wait(30) and real(*args))
    writer, lived = Writer(), state(1.0)
    lived["counters"]["seen"] = []
    for step in (1, 2):  # the second goes into the memory of the first
        go.clear()
        files = {"counters": lambda path: path.write_text(str(lived["counters"]["step"]))}
        writer.save(tmp_path, step, lived, files, keep=Keep(newest=9))
        lived["model"]["w"].mul_(10)
        lived["counters"]["step"] += 1
        lived["counters"]["seen"].append(step)
        go.set()
        folder, found = writer.wait(), {"model": state(0.0)["model"], "counters": {"step": 0, "seen": None}}
        store.load(folder, found)
        assert found["counters"]["seen"] == [1][: step - 1]
        assert (found["model"]["w"] == 10 ** (step - 1)).all() and found["counters"]["step"] == step + 2
        assert (folder / "counters").read_text() == str(step + 2)


def test_a_writer_never_has_two_under_way_and_tells_what_went_wrong_at_the_next_save(tmp_path, monkeypatch):
    writer = Writer()
    assert writer.wait() is None
    for step in (1, 2, 3):
        writer.save(tmp_path, step, state(step), {}, keep=Keep(newest=9))
        assert [found for found, _ in store.steps(tmp_path)] in ([*range(step - 1, 0, -1)], [*range(step, 0, -1)])
    assert writer.wait() == tmp_path / "step_00000003" and writer.wait() is None
    shutil.rmtree(tmp_path / "step_00000003")
    with monkeypatch.context() as patched:
        patched.setattr(store.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
        writer.save(tmp_path, 3, state(3), {}, keep=Keep(newest=9))
        with pytest.raises(OSError, match="checkpoint of step 3 failed: Input/output error"):
            writer.save(tmp_path, 4, state(4), {}, keep=Keep(newest=9))
    assert [step for step, _ in store.steps(tmp_path)] == [2, 1]
    writer.save(tmp_path, 5, state(5), {}, keep=Keep(newest=9))
    assert store.newest(tmp_path, print) in (writer.wait(), tmp_path / "step_00000002")


def test_a_truncated_checkpoint_falls_back_says_so_and_still_ends_the_same(tmp_path):
    whole = trainer(tmp_path / "whole").fit()
    stopped = trainer(tmp_path / "cut")
    stopped.fit()
    newest = tmp_path / "cut" / "checkpoints" / "step_00000020"
    os.truncate(newest / RANK, 1000)
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
