"""The certificate of exact resume: the user's own command, run straight, and killed in the middle and started again."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from llamita import log
from llamita.checkpoint import store
from llamita.recipes.launch import run_folder

# What another number of ranks may change, in nats a token: the order of sums, in the dtype of the matmuls.
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2, "fp8": 1e-1}
NEVER = 10**9


def verify(words: Sequence[str], *, steps: int, processes: int, then: int) -> dict[str, Any]:
    """Run `words`, a `train` command, three ways for `steps` steps in a folder of their own, and compare them.

    Straight; killed with -9 in the middle and started again; and, if `then`, started again on so many processes. What
    came out is a certificate, also written to DIR/verify-resume.json; its "holds" tells whether all of it held. Raises
    ValueError for words that are no training command, or with which training fails.
    """
    if not words or words[0] != "train" or not run_folder(words):
        raise ValueError(
            "name the run behind --: llamita verify-resume -- train RECIPE --dir FOLDER --data.corpus FOLDER"
        )
    if steps < 2 or steps % 2 or processes < 1 or then < 0:
        raise ValueError("--steps is an even number from 2 up, --processes at least 1, --then at least 0")
    home = Path(run_folder(words))
    work = home / ".verify-resume"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    command = [*_without_folder(words), "--steps", str(steps), "--checkpoint.every", str(steps // 2)]
    command += ["--log.every", "1", "--log.eval-every", str(NEVER), "--log.sample-every", str(NEVER)]
    command += ["--checkpoint.keep", "2"]
    straight, cut, other = (work / name for name in ("straight", "cut", "other"))
    log.say(f"verify-resume: {steps} steps straight")
    _train(command, straight, processes)
    log.say(f"verify-resume: killed behind the checkpoint of step {steps // 2}")
    _train(command, cut, processes, kill_after=steps // 2)
    if then:
        shutil.copytree(cut, other)
    log.say("verify-resume: started again")
    _train(command, cut, processes)
    found = _compared(straight, cut, steps) | {"processes": processes, "torch": torch.__version__}
    found["refuses other settings"] = _refused(command, cut, processes)
    if then:
        log.say(f"verify-resume: started again on {then} processes")
        _train(command, other, then)
        found |= _compared_across(straight, other, steps) | {"then processes": then}
    found["holds"] = all(value for value in found.values() if isinstance(value, bool))
    (home / "verify-resume.json").write_text(json.dumps({"command": list(words)} | found, indent=1))
    if found["holds"]:
        shutil.rmtree(work)
    return found


def _without_folder(words: Sequence[str]) -> list[str]:
    kept = [word for word in words if not word.startswith("--dir=")]
    if "--dir" in kept:
        place = kept.index("--dir")
        del kept[place : place + 2]
    return kept


def _train(command: Sequence[str], folder: Path, processes: int, kill_after: int = 0) -> None:
    """One start of the command, in processes of their own. Raises ValueError with its last words when it fails."""
    wanted = folder / "checkpoints" / f"step_{kill_after:08d}"
    code, said = _run(command, folder, processes, until=wanted.exists if kill_after else lambda: False)
    if not wanted.exists() if kill_after else code:
        raise ValueError(f"the run fails: {_last_words(said)}")
    for step, path in store.steps(folder / "checkpoints") if kill_after else []:
        if step > kill_after:  # it was faster than the kill
            shutil.rmtree(path)


def _run(command: Sequence[str], folder: Path, processes: int, until: Callable[[], bool]) -> tuple[int, str]:
    """Start the command and wait for its end, or kill all its processes at once when `until` is true; its exit code
    and what it said."""
    python = [sys.executable, "-m"]
    if processes > 1:
        python += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    said = folder.with_suffix(".log")
    with said.open("wb") as file:
        process = subprocess.Popen([*python, "llamita", *command, "--dir", str(folder)], stdout=file, stderr=file)
        try:
            while process.poll() is None and not until():
                time.sleep(0.002)
        finally:
            _kill(process.pid)
            process.wait()
    return process.returncode, said.read_text(errors="replace")


def _kill(pid: int) -> None:
    """kill -9 of a process and all below it: torchrun gives each worker a session of its own."""
    try:
        below = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        os.kill(pid, signal.SIGKILL)
    except (FileNotFoundError, ProcessLookupError):
        return
    for child in below:
        _kill(int(child))


def _last_words(said: str) -> str:
    lines = [line for line in said.splitlines() if line.strip()]
    own = [line for line in lines if re.match(r"llamita: |(\[rank\d+\]: )?\w+(Error|Exit): ", line)]
    return (own or lines or ["silently"])[-1]


def _refused(command: Sequence[str], folder: Path, processes: int) -> bool:
    """Whether going on with another learning rate is refused in words."""
    code, said = _run([*command, "--optim.lr", "0.1234"], folder, processes, until=lambda: False)
    return code != 0 and "optim.lr was" in said


def _losses(folder: Path) -> dict[int, float]:
    """The last word on each step."""
    return {row["step"]: row["loss"] for row in log.read(folder / "metrics.jsonl") if row["kind"] == "train"}


def _end(folder: Path, steps: int) -> dict[str, str]:
    """Hash of every rank's tensors (weights, optimizer, random numbers) at the last step."""
    manifest = json.loads((folder / "checkpoints" / f"step_{steps:08d}" / store.MANIFEST).read_text())
    return {name: entry["sha256"] for name, entry in manifest.items() if name.endswith(".safetensors")}


def _compared(straight: Path, cut: Path, steps: int) -> dict[str, Any]:
    one, two = _losses(straight), _losses(cut)
    return {
        "steps": steps,
        "losses bit for bit": one.keys() == two.keys() and all(one[step].hex() == two[step].hex() for step in one),
        "weights, optimizer and random numbers bit for bit": _end(straight, steps) == _end(cut, steps),
        "state": _end(straight, steps),
    }


def _compared_across(straight: Path, other: Path, steps: int) -> dict[str, Any]:
    one, two = _losses(straight), _losses(other)
    precision = next(
        row["values"]["precision"]["value"] for row in log.read(straight / "metrics.jsonl") if row["kind"] == "settings"
    )
    farthest = max(abs(one[step] - two.get(step, float("inf"))) for step in one)
    return {
        "largest difference across (nats)": farthest,
        "across within reduction order": farthest < TOLERANCE[precision],
    }
