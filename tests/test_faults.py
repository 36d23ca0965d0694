"""The drill: every fault of a run of two ranks is detected, named, and survived as it should be."""

import dataclasses
import json
import random
import re

import pytest

from llamita.checkpoint import store
from llamita.checkpoint.weights import weights
from llamita.parallel.layout import Layout
from llamita.parallel.watchdog import HUNG, STOPPED
from llamita.train import incidents
from llamita.train.health import Health
from llamita.train.run import Checkpoint, Log
from tests import drill, training
from tests.drill import Fault

COPIES = Layout(dp=2, fsdp=1)  # so that one replica's weights can be told from the other's
RUN = dataclasses.replace(
    training.RUN, shape=drill.SHAPE, steps=12, parallel=COPIES, checkpoint=Checkpoint(every=4, keep=3),
    log=Log(every=1, eval_every=1000, sample_every=1000),
)  # fmt: skip


def losses(folder):
    """The last word on every step."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if row["kind"] == "train"}


def same_end(folder, other):
    mine, theirs = (weights(store.newest(each / "checkpoints", print)) for each in (folder, other))
    return mine.keys() == theirs.keys() and all((mine[name] == theirs[name]).all() for name in mine)


def found(folder):
    return {each.kind: each for each in incidents.read(folder)}


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clean") / "run"
    assert drill.world(folder, RUN)[0] == [0, 0]
    assert len(losses(folder)) == RUN.steps and not incidents.read(folder)
    return folder


def test_a_rank_that_is_killed_ends_the_world_and_the_next_start_ends_like_no_kill(clean, tmp_path):
    folder = tmp_path / "run"
    codes, ended = drill.world(folder, RUN, [Fault("kill", 1, 7)])
    assert codes == [1, -9] and re.search("closed by peer|remote worker", ended[0].error)
    assert drill.world(folder, RUN)[0] == [0, 0]
    assert losses(folder) == losses(clean) and same_end(folder, clean)


def test_nan_on_one_rank_is_seen_by_all_and_the_batch_left_out_with_its_documents_named(clean, tmp_path):
    folder, other = tmp_path / "run", tmp_path / "other"
    assert drill.world(folder, RUN, [Fault("nan", 1, 6)])[0] == [0, 0]
    (incident,) = incidents.read(folder)
    assert (incident.kind, incident.step, incident.first_sample, incident.num_samples) == ("nan", 6, 20, 4)
    assert incident.documents == tuple(f"doc of sample {number}" for number in range(20, 24))
    assert "its update is left out" in incident.action
    assert drill.world(other, RUN, skipped=(6,))[0] == [0, 0]
    assert same_end(folder, other) and not same_end(folder, clean)


def test_faults_in_a_row_send_the_run_back_and_leave_the_batches_out(clean, tmp_path):
    folder, other = tmp_path / "run", tmp_path / "other"
    assert drill.world(folder, RUN, [Fault("nan", 1, step) for step in (6, 7, 8)])[0] == [0, 0]
    assert [(each.kind, each.step) for each in incidents.read(folder)] == [("nan", 6), ("nan", 7), ("nan", 8)]
    last = incidents.read(folder)[-1]
    assert last.action == "back to the checkpoint of step 4, leaving out the batches since"
    assert drill.world(other, RUN, skipped=(5, 6, 7, 8))[0] == [0, 0]
    assert same_end(folder, other) and not same_end(folder, clean)


def test_a_flipped_bit_in_a_replica_is_found_before_it_is_saved_and_undone(clean, tmp_path):
    folder = tmp_path / "run"
    assert drill.world(folder, RUN, [Fault("bit", 1, 6)])[0] == [0, 0]
    first, second = incidents.read(folder)
    assert first.kind == second.kind == "corruption" and first.step == 8
    assert "tok_embeddings.weight differs between ranks 0, 1, and no majority" in first.message
    assert "back to the checkpoint of step 4, and the batches since are seen again" in second.action
    assert losses(folder) == losses(clean) and same_end(folder, clean)


def test_a_full_disk_costs_a_checkpoint_and_no_more(clean, tmp_path):
    folder = tmp_path / "run"
    assert drill.world(folder, RUN, [Fault("disk", 0, 4)])[0] == [0, 0]
    (incident,) = incidents.read(folder)
    assert incident.kind == "disk" and "No space left on device" in incident.message
    assert [step for step, _ in store.steps(folder / "checkpoints")] == [12, 8]
    assert same_end(folder, clean)


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_taken(clean, tmp_path):
    folder = tmp_path / "run"
    drill.world(folder, RUN, [Fault("damage", 1, 11)])
    assert drill.world(folder, RUN)[0] == [0, 0]
    said = [json.loads(line).get("message", "") for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert any("checkpoint of step 8 is damaged (rank_00000.safetensors has" in line for line in said)
    assert "resumed from the checkpoint of step 4" in said
    assert losses(folder) == losses(clean) and same_end(folder, clean)


def test_sigterm_on_one_rank_makes_all_write_a_checkpoint_and_stop(clean, tmp_path):
    folder = tmp_path / "run"
    _, ended = drill.world(folder, RUN, [Fault("term", 1, 6)])
    assert all(f"SystemExit: {STOPPED}" in outcome.error for outcome in ended), ended
    assert [step for step, _ in store.steps(folder / "checkpoints")] == [6, 4]
    assert found(folder)["stop"].step == 6
    assert drill.world(folder, RUN)[0] == [0, 0]
    assert losses(folder) == losses(clean) and same_end(folder, clean)


def test_a_hang_ends_in_a_report_that_names_the_rank(clean, tmp_path):
    folder, run = tmp_path / "run", dataclasses.replace(RUN, health=Health(hang_seconds=8))
    codes, _ = drill.world(folder, run, [Fault("hang", 1, 6)])
    assert codes == [HUNG, HUNG]
    incident = found(folder)["hang"]
    assert incident.rank == 1 and "waits for rank 1 on" in incident.message and "'step 6'" in incident.message
    assert {path.name for path in (folder / "incidents").iterdir()} == {"rank_0.json", "rank_1.json"}
    assert drill.world(folder, run)[0] == [0, 0]
    assert losses(folder) == losses(clean) and same_end(folder, clean)


def test_a_straggler_is_named_and_nobody_else(clean, tmp_path):
    folder = tmp_path / "run"
    assert drill.world(folder, RUN, slow=1)[0] == [0, 0]
    assert {(each.kind, each.rank) for each in incidents.read(folder)} == {("straggler", 1)}
    assert same_end(folder, clean)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_two_hundred_steps_with_ten_random_faults_end_like_a_run_without(tmp_path, seed):
    draw = random.Random(seed)
    run = dataclasses.replace(RUN, steps=200, checkpoint=Checkpoint(every=10, keep=3), health=Health(hang_seconds=10))
    steps = sorted(draw.sample(range(12, 200), 10))
    kinds = ["kill", "term", "hang", "nan", "nan", "bit", "bit", "disk", "damage", draw.choice(["kill", "term", "nan"])]
    draw.shuffle(kinds)
    faults = [
        Fault(kind, 0 if kind == "disk" else draw.randrange(2), step) for kind, step in zip(kinds, steps, strict=True)
    ]
    folder, clean = tmp_path / "run", tmp_path / "clean"
    drill.to_the_end(folder, run, faults)
    assert all((folder / f"struck_{number}").exists() for number in range(10)), faults
    skipped = tuple(sorted({each.step for each in incidents.read(folder) if each.kind == "nan"}))
    assert skipped == tuple(fault.step for fault in faults if fault.kind == "nan")
    assert drill.world(clean, run, skipped=skipped)[0] == [0, 0]
    mine, theirs = losses(folder), losses(clean)
    assert {step: mine[step] for step in mine if step not in skipped} == {
        step: theirs[step] for step in theirs if step not in skipped
    }
    assert same_end(folder, clean)
