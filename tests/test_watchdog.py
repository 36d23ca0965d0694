"""Ranks that watch each other, in real processes: hangs, stragglers, flipped bits, NaN in one rank, SIGTERM."""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from llamita.parallel.replicas import Difference, Pace, compare, differences, fingerprint, slowness
from llamita.parallel.watchdog import HUNG, STOPPED, Stop, Watchdog, diagnose
from llamita.train import incidents
from llamita.train.health import Guard, Health
from llamita.train.incidents import Incident
from tests import worlds

RECORDER = {"TORCH_FR_BUFFER_SIZE": "64"}
CPU = torch.device("cpu")


# A healthy world of three and its small faults: none of them ends a process.


def all_checks(rank: int, folder: str) -> dict:
    barked: list = []
    with Watchdog(Path(folder), lambda *message: barked.append(message), seconds=30) as watchdog:
        found = {}
        for check in (replicas, stragglers, nan_in_one_rank, sigterm):
            watchdog.beat(check.__name__)
            found[check.__name__] = check(rank)
    return found | {"barked": barked}


def replicas(rank: int) -> dict:
    mesh = init_device_mesh("cpu", (3, 1), mesh_dim_names=("dp", "tp"))
    torch.manual_seed(0)
    weights = {
        "layers.0.wq.weight": distribute_tensor(torch.randn(40, 33), mesh, [Replicate(), Shard(0)]),
        "norm.weight": torch.randn(7).to(torch.bfloat16),
        "output.weight": torch.randn(2000, 5),
    }
    found = {"healthy": compare(weights.items(), mesh), "no replicas": compare(weights.items(), mesh, "tp")}
    if rank == 1:  # the lowest bit of one weight: 1 + 2^-23
        weights["layers.0.wq.weight"].to_local().view(torch.int32)[39, 32] ^= 1
    found["flipped"] = compare(weights.items(), mesh)
    return found


def stragglers(rank: int) -> dict:
    def paced(slow_rank: int) -> list[list[tuple[int, bool]]]:
        pace = Pace(CPU, every=2, factor=3, windows=2)
        named = []
        for _ in range(8):
            with pace.own():
                time.sleep(0.3 if rank == slow_rank else 0.03)
            pace.probe()
            named.append([(one.rank, bool(one.host)) for one in pace.step()])
        return named

    return {"slow": paced(2), "healthy": paced(-1)}


def nan_in_one_rank(rank: int) -> list[str]:
    guard = Guard(Health())
    decisions = []
    for step in range(1, 61):
        loss = float("nan") if (rank, step) == (1, 50) else 2.0 + 0.01 * (step % 3)
        total = torch.tensor([loss, 1.0])
        dist.all_reduce(total)
        decisions.append(guard.judge(step, total[0].item(), total[1].item()).decision)
    return decisions


def sigterm(rank: int) -> list[int]:
    seen = []
    before = signal.getsignal(signal.SIGTERM)
    with Stop() as stop:
        for step in range(4):
            if (rank, step) == (2, 2):
                os.kill(os.getpid(), signal.SIGTERM)
            asked = torch.tensor(int(stop.asked))
            dist.all_reduce(asked)
            seen.append(int(asked))
    assert signal.getsignal(signal.SIGTERM) == before
    return seen


def test_three_ranks_find_each_others_faults_and_nothing_else(tmp_path):
    found = worlds.run(all_checks, 3, str(tmp_path))
    assert found[0] == found[1] == found[2], "every rank must come to the same answer"
    ours = found[0]
    assert ours["replicas"] == {
        "healthy": [],
        "no replicas": None,
        "flipped": [Difference("layers.0.wq.weight", (1,), has_majority=True)],
    }
    assert ours["stragglers"]["slow"] == [[], [], [], [(2, True)], [], [], [], []], "named once"
    assert ours["stragglers"]["healthy"] == [[]] * 8
    assert ours["nan_in_one_rank"] == ["ok"] * 49 + ["skip"] + ["ok"] * 10
    assert ours["sigterm"] == [0, 0, 1, 1]
    assert ours["barked"] == [] and list(tmp_path.iterdir()) == [], "the watchdog barked at a healthy run"


# Hangs: every process of the world ends.


def hangs(rank: int, folder: str, how: str) -> None:
    """Rank 1 never enters the third all-reduce; `how`: it is busy, or stopped as a lost machine would be."""
    mine = os.getpid()
    pids = [torch.zeros(1, dtype=torch.int64) for _ in range(2)]
    dist.all_gather(pids, torch.tensor([mine]))

    def report(message: str, ranks: list[int]) -> None:
        for culprit in ranks:
            row = Incident(step=3, kind="hang", rank=culprit, message=message, action="the world starts again")
            incidents.append(Path(folder), row)
        if how == "stopped":
            os.kill(int(pids[1]), signal.SIGKILL)

    with Watchdog(Path(folder), report, seconds=3) as watchdog:
        for step in range(1, 4):
            watchdog.beat(f"step {step}: data", seconds=50)  # not overdue itself: the others' alarm must reach it
            if (rank, step) == (1, 3):
                if how == "stopped":
                    time.sleep(0.8)  # time for a heartbeat
                    os.kill(mine, signal.SIGSTOP)
                time.sleep(60)
            watchdog.beat(f"step {step}: reduce")
            dist.all_reduce(torch.ones(7))


def test_a_busy_rank_that_others_wait_for_is_named_with_the_collective(tmp_path):
    ended = worlds.outcomes(hangs, 2, str(tmp_path), "busy", env=RECORDER, seconds=60)
    assert [one.exit_code for one in ended] == [HUNG, HUNG]
    (row,) = incidents.read(tmp_path)
    assert row.rank == 1
    # the gathering of the process numbers was the first collective of the world
    assert "all_reduce number 4 of group 0 default_pg waits for rank 1 on " in row.message
    assert "'step 3: data'" in row.message
    stuck = json.loads((tmp_path / "incidents/rank_1.json").read_text())
    assert any("time.sleep(60)" in stack[-1] for stack in stuck["stacks"].values())
    waiting = json.loads((tmp_path / "incidents/rank_0.json").read_text())
    assert [entry["retired"] for entry in waiting["collectives"]] == [True, True, True, False]


def test_a_rank_that_has_stopped_is_named_by_the_others(tmp_path):
    ended = worlds.outcomes(hangs, 2, str(tmp_path), "stopped", env=RECORDER, seconds=60)
    assert [one.exit_code for one in ended] == [HUNG, -signal.SIGKILL]
    (row,) = incidents.read(tmp_path)
    assert row.rank == 1 and "does not answer, last seen in 'step 3: data'" in row.message
    assert not (tmp_path / "incidents/rank_1.json").exists()


def stuck_interpreter(rank: int, folder: str) -> None:
    with Watchdog(Path(folder), lambda *message: None, seconds=1) as watchdog:
        watchdog.beat("warm")
        time.sleep(0.5)
        ctypes.PyDLL(None).sleep(60)  # a call into C that keeps the interpreter's lock


def test_a_stuck_interpreter_is_ended_by_the_timer_below_it(tmp_path):
    (ended,) = worlds.outcomes(stuck_interpreter, 1, str(tmp_path), group=False, seconds=30)
    assert (ended.exit_code, ended.timed_out) == (1, False)


def hangs_once(folder: str) -> None:
    """What each process of torchrun runs: rank 1 hangs in the first world, and the second one comes to its end."""
    dist.init_process_group("gloo")
    rank, attempt = dist.get_rank(), os.environ["TORCHELASTIC_RESTART_COUNT"]
    with Watchdog(Path(folder), lambda message, ranks: print("hang", ranks), seconds=3) as watchdog:
        for step in range(3):
            watchdog.beat(f"step {step}")
            if (rank, step, attempt) == (1, 1, "0"):
                time.sleep(60)
            dist.all_reduce(torch.ones(3))
    dist.destroy_process_group()
    (Path(folder) / f"rank_{rank}_of_world_{attempt}").touch()


@pytest.mark.slow
def test_torchrun_starts_the_world_again_after_a_hang(tmp_path):
    script = tmp_path / "hangs_once.py"
    script.write_text("import sys\nfrom tests.test_watchdog import hangs_once\nhangs_once(sys.argv[1])\n")
    command = f"-m torch.distributed.run --standalone --nproc-per-node 2 --max-restarts 1 {script} {tmp_path}"
    # Without the variable the new world finds the dead one's addresses in the store (pytorch issue 135712).
    variables = RECORDER | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "PYTHONPATH": os.getcwd()}
    ended = subprocess.run(
        [sys.executable, *command.split()], env=os.environ | variables, timeout=120, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("hang [1]") == 1
    assert sorted(path.name for path in tmp_path.glob("rank_*")) == ["rank_0_of_world_1", "rank_1_of_world_1"]


# The parts without processes.


def report(phase="forward", *, number=0, pending=None, waits=False):
    return {"host": "a", "phase": phase, "waits": waits, "entered": {"g": number}, "pending": pending}


def test_diagnosis_separates_the_cause_from_those_that_wait_elsewhere():
    inner = ["mesh_tp", 9, "all_gather", [2, 3]]
    outer = ["g", 5, "all_reduce", [0, 1, 2, 3]]
    reports = {
        0: report(number=5, pending=outer, waits=True),
        1: report(number=5, pending=outer, waits=True),
        2: report(number=4, pending=inner, waits=True),
        3: report("data", number=4),
    }
    reports[2]["entered"]["mesh_tp"] = 9
    message, ranks = diagnose(reports, {}, 4)
    assert ranks == [3] and "all_reduce number 5 of group g waits for rank 3 on a, which is in 'data'" in message
    del reports[3]
    assert diagnose(reports, {3: {"host": "b", "phase": "data"}}, 4)[1] == [3]
    assert "rank 3, which never answered" in diagnose(reports, {}, 4)[0]


def test_diagnosis_does_not_blame_a_busy_rank_that_nobody_waits_for():
    pair = ["mesh_tp", 9, "all_gather", [0, 1]]
    reports = {0: report(pending=pair, waits=True), 1: report("data"), 2: report("forward")}
    assert diagnose(reports, {}, 3)[1] == [1]


def test_diagnosis_blames_nobody_when_all_have_entered():
    outer = ["g", 5, "all_reduce", [0, 1]]
    message, ranks = diagnose({rank: report(number=5, pending=outer, waits=True) for rank in (0, 1)}, {}, 2)
    assert ranks == [] and "a device or the network hangs" in message


def test_every_flipped_bit_changes_the_fingerprint_and_equal_bits_do_not():
    torch.manual_seed(0)
    for dtype, size in ((torch.float32, 1500), (torch.bfloat16, 4099), (torch.float64, 3), (torch.float32, 0)):
        weight = torch.randn(size).to(dtype)
        first = fingerprint(weight)
        assert fingerprint(weight.clone()) == first
        bits = weight.view(torch.uint8)
        for place in range(0, len(bits), 37):
            for bit in (1, 128):
                bits[place] ^= bit
                assert fingerprint(weight) != first, (dtype, place, bit)
                bits[place] ^= bit
    # pairs of flipped signs, which a plain sum of words cannot see
    weight = torch.randn(5000)
    first = fingerprint(weight)
    for a, b in ((1, 3), (0, 1024), (1, 1025), (17, 4999)):
        flipped = weight.clone()
        flipped[[a, b]] *= -1
        assert fingerprint(flipped) != first
        assert flipped.view(torch.int32).sum(dtype=torch.int32) == weight.view(torch.int32).sum(dtype=torch.int32)
    assert fingerprint(weight[1:]) == fingerprint(weight[1:].clone()), "an unaligned view has the bits it shows"


def test_slowness_is_told_by_the_probe_or_by_own_time_that_weighs():
    even = (1.0, 0.005, 10.0)
    assert slowness([even, even, even], 1.5) == [1, 1, 1]
    assert slowness([even, (1.0, 0.010, 10.0), even], 1.5) == [1, 2, 1]
    assert slowness([even, (3.0, 0.005, 10.0), even], 1.5) == [1, 3, 1]
    tiny = (0.001, 0.005, 10.0)
    assert slowness([tiny, (0.1, 0.005, 10.0), tiny], 1.5) == [1, 1, 1], "a tenth of a second in ten"
    none = (0.0, float("inf"), 10.0)
    assert slowness([none, none], 1.5) == [1, 1], "nothing was measured"
    assert slowness([even, (1.0, 0.010, 10.0)], 1.5) == [1, 2], "of two the slower one"


def test_two_replicas_that_differ_are_both_named():
    (found,) = differences(["a", "b"], [[1, 2], [1, 3]], [4, 9])
    assert found == Difference("b", (4, 9), has_majority=False)
    assert str(found) == "b differs between ranks 4, 9, and no majority tells which is right"
    assert differences(["a"], [[1], [1]], [4, 9]) == []


def test_the_exit_codes_are_no_success():
    assert 0 not in (HUNG, STOPPED) and STOPPED == 128 + signal.SIGTERM
