"""Kill -9 and faults: a run that was killed in the middle of a save ends bit for bit like one that was not."""

import signal
import subprocess
import sys
from pathlib import Path

from llamita.checkpoint import store

SCRIPT = Path(__file__).with_name("kill_run.py")


def launch(folder: Path, mode: str) -> int:
    command = [sys.executable, "-m", "tests.kill_run", str(folder), mode]
    return subprocess.run(command, cwd=SCRIPT.parents[1], capture_output=True, timeout=300).returncode


def test_killed_in_the_middle_of_a_save_it_goes_on_bit_for_bit(tmp_path):
    assert launch(tmp_path / "whole", "live") == 0
    assert launch(tmp_path / "killed", "die") == -signal.SIGKILL
    checkpoints = tmp_path / "killed" / "checkpoints"
    assert (checkpoints / ".step_00000015.tmp").is_dir(), "the kill must have come in the middle of a save"
    assert [step for step, _ in store.steps(checkpoints)] == [10, 5]
    assert not (tmp_path / "killed" / "end.txt").exists()

    assert launch(tmp_path / "killed", "live") == 0
    assert (tmp_path / "killed" / "end.txt").read_text() == (tmp_path / "whole" / "end.txt").read_text()
    whole = (tmp_path / "whole" / "drawn.txt").read_text().splitlines()
    killed = (tmp_path / "killed" / "drawn.txt").read_text().splitlines()
    assert killed[:15] == whole[:15] and killed[15:] == whole[10:], "steps 11 to 15 are done again, from the same rows"
    assert len(set(whole)) == 20
