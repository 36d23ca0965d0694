"""The guard of the loss, and the log of faults."""

import json
import math
import multiprocessing
import os
import signal

import numpy as np
import pytest

from llamita.train import incidents
from llamita.train.health import FEWEST, Guard, Health
from llamita.train.incidents import Incident


def falling(steps: int, seed: int = 0) -> list[tuple[float, float]]:
    """Losses and gradient norms of a healthy run: a fall with normal noise, norms that vary by factors."""
    noise = np.random.default_rng(seed)
    return [
        (2 + 4 * math.exp(-step / 60) + 0.05 * noise.normal(), math.exp(0.2 * noise.normal() - step / 500))
        for step in range(steps)
    ]


def fed(curve, guard: Guard | None = None, first: int = 1) -> tuple[Guard, list[str]]:
    guard = guard or Guard(Health())
    return guard, [guard.judge(first + at, loss, norm).decision for at, (loss, norm) in enumerate(curve)]


def test_a_healthy_run_is_never_disturbed():
    for seed in range(5):
        guard, decisions = fed(falling(1000, seed))
        assert set(decisions) == {"ok"} and guard.skipped == []


@pytest.mark.parametrize(
    ("loss", "norm", "kind"),
    [(math.nan, 1, "nan"), (2, math.inf, "nan"), (3.5, 1, "spike"), (2, 30, "spike")],
)
def test_one_faulty_step_loses_its_update_only(loss, norm, kind):
    curve = falling(600)
    guard, decisions = fed(curve[:500])
    verdict = guard.judge(501, loss, norm)
    assert (verdict.decision, verdict.kind) == ("skip", kind) and verdict.reason
    _, after = fed(curve[501:], guard=guard, first=502)
    assert set(decisions + after) == {"ok"} and guard.skipped == [501]


def test_nan_is_found_at_the_first_step_and_a_fall_is_no_spike():
    assert Guard(Health()).judge(1, math.nan, 1).decision == "skip"
    guard, _ = fed(falling(100))
    assert guard.judge(101, 0.01, 1e-9).decision == "ok"


def test_without_the_spread_of_the_window_the_spike_would_pass():
    """Negative control: the same spike in a run that is as noisy as the spike is high is none."""
    noise = np.random.default_rng(0)
    guard, decisions = fed([(2 + 0.5 * noise.normal(), 1.0) for _ in range(200)])
    assert set(decisions) == {"ok"} and guard.judge(201, 3.5, 1).decision == "ok"


def test_faults_in_a_row_send_the_run_back_and_the_batches_since_are_left_out():
    guard, _ = fed(falling(120))
    _, decisions = fed([(math.nan, 1)] * 3, guard=guard, first=121)
    assert decisions == ["skip", "skip", "roll back"]
    guard.roll_back(123, checkpoint=100)
    assert guard.skipped == list(range(101, 124))
    guard.roll_back(300, checkpoint=200, leave_out=False)  # a machine's fault: its batches are seen again
    assert guard.skipped == list(range(101, 124))
    assert not guard.skips(100) and guard.skips(101) and guard.skips(123) and not guard.skips(124)


def test_faults_that_are_not_in_a_row_do_not_send_it_back():
    bad, good = (math.nan, 1.0), (2.0, 1.0)
    assert fed([bad, bad, good] * 5)[1] == ["skip", "skip", "ok"] * 5


def test_a_place_that_is_never_passed_ends_in_one_clear_line():
    guard = Guard(Health(rollbacks=2))
    guard.roll_back(10, 5)
    guard.roll_back(20, 5)
    guard.roll_back(30, 25)  # another place counts anew
    guard.roll_back(40, 25)
    with pytest.raises(ValueError, match=r"3 times from the checkpoint of step 25, last at step 50: lower --optim\.lr"):
        guard.roll_back(50, 25)


def test_a_resumed_guard_decides_as_the_one_that_was_never_stopped():
    curve = falling(600)
    curve[50] = (math.nan, 1)
    curve[460] = (3.5, 1)
    whole, decisions = fed(curve)
    half, first = fed(curve[:450])
    resumed = Guard(Health())
    resumed.load(json.loads(json.dumps(half.state())))
    _, second = fed(curve[450:], guard=resumed, first=451)
    assert first + second == decisions and resumed.state() == whole.state() and whole.skipped == [51, 461]
    # negative control: a guard that resumes without its state misses a spike that comes before it has seen enough
    blank, _ = fed(curve[450:], first=451)
    assert blank.skipped == []


def test_a_rightful_jump_is_announced():
    jump = [(3.5, 1.0)] * 40
    guard, _ = fed(falling(500))
    guard.forget()
    assert set(fed(jump, guard=guard)[1]) == {"ok"}
    guard, _ = fed(falling(500))
    assert fed(jump, guard=guard)[1][:3] == ["skip", "skip", "roll back"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("window", FEWEST - 1),
        ("spike", 0.0),
        ("spike", math.nan),
        ("patience", 0),
        ("rollbacks", 0),
        ("hang_seconds", 0),
    ],
)
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"health.{name} must be "):
        Health(**{name: value})


# The incident log.

ROW = Incident(step=7, kind="nan", rank=1, message="the loss is nan", action="the update of step 8 was not applied")


def test_an_incident_reads_back_as_it_was_written(tmp_path):
    assert incidents.read(tmp_path) == []
    full = Incident(
        step=9, kind="spike", message="é\n", action="-", first_sample=64, num_samples=8, documents=("a#1", "b#2")
    )
    incidents.append(tmp_path, ROW)
    incidents.append(tmp_path, full)
    assert incidents.read(tmp_path) == [ROW, full]


def test_a_line_torn_at_any_byte_is_left_out_and_the_next_one_is_whole(tmp_path):
    incidents.append(tmp_path, ROW)
    path = tmp_path / incidents.FILE
    line = path.read_bytes()
    for kept in range(1, len(line) - 1):
        path.write_bytes(line + line[:kept])
        assert incidents.read(tmp_path) == [ROW]
        incidents.append(tmp_path, ROW)
        assert incidents.read(tmp_path) == [ROW, ROW]
    path.write_bytes(line + line[:-40])
    with path.open("ab") as careless:  # negative control: a writer that does not close the torn line loses its own
        careless.write(line)
    assert incidents.read(tmp_path) == [ROW]


def write_for_ever(folder):
    while True:
        incidents.append(folder, ROW)


def test_writers_at_the_same_time_and_their_deaths_tear_no_other_line(tmp_path):
    spawn = multiprocessing.get_context("fork")
    writers = [spawn.Process(target=write_for_ever, args=(tmp_path,)) for _ in range(3)]
    for writer in writers:
        writer.start()
    while len(incidents.read(tmp_path)) < 50:
        assert all(writer.is_alive() for writer in writers)
    for writer in writers:
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
    lines = (tmp_path / incidents.FILE).read_bytes().splitlines()
    assert len(incidents.read(tmp_path)) >= len(lines) - 3
    incidents.append(tmp_path, ROW)
    assert set(incidents.read(tmp_path)) == {ROW}
