"""Layer: the scripts that schedulers are given, run with a scheduler that is not there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llamita import cli

WORDS = ["--", "train", "tiny", "--dir", "runs/it is mine", "--steps", "5"]
SCONTROL = """#!/bin/sh
case "$1" in
  show) printf 'first\\nsecond\\n' ;;
  requeue) echo "$2" > requeued ;;
esac
"""
SRUN = """#!/bin/sh
for word in "$@"; do echo "$word"; done > words
[ -n "$MAKES" ] && mkdir -p "$MAKES"
exit $CODE
"""


def printed(capsys, *words) -> str:
    assert cli.main(["launch", *words]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(("code", "makes", "again"), [(0, "step_2", False), (143, "step_2", True), (1, "", False)])
def test_a_slurm_job_goes_on_where_it_made_a_checkpoint(tmp_path, capsys, code, makes, again):
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    checkpoints = tmp_path / "runs/it is mine/checkpoints"
    (checkpoints / "step_1").mkdir(parents=True)
    script = printed(capsys, "slurm", "--nodes", "2", "--processes", "4", "--name", "mine", *WORDS)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "x"}
    env |= {"CODE": str(code), "MAKES": str(checkpoints / makes) if makes else ""}
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=env)
    assert done.returncode == code
    assert (tmp_path / "requeued").exists() == again
    words = (tmp_path / "words").read_text().splitlines()
    assert "--rdzv-endpoint=first:29400" in words and "--nnodes=2" in words and "--nproc-per-node=4" in words
    assert words[-8:] == ["-m", "llamita", *WORDS[1:]]
    assert "export TORCH_FR_BUFFER_SIZE=2000 TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in script
    assert "#SBATCH --gpus-per-node=4" in script and "#SBATCH --signal=TERM@300" in script


def test_a_kubernetes_job_and_its_service_agree(capsys):
    service, job = json.loads(printed(capsys, "kubernetes", "--nodes", "3", "--volume", "data", *WORDS))["items"]
    template = job["spec"]["template"]
    container = template["spec"]["containers"][0]
    assert service["metadata"]["name"] == template["spec"]["subdomain"]
    assert service["spec"]["selector"] == template["metadata"]["labels"]
    assert container["env"][0] == {"name": "HEAD", "value": "llamita-0.llamita"}
    assert container["env"][-1] == {"name": "TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "value": "1"}
    assert "--rdzv-endpoint=$(HEAD):29400" in container["command"] and container["command"][-6:] == WORDS[1:]
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == 3
    assert container["resources"] == {"limits": {"nvidia.com/gpu": 8}}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["slurm"], "name the run behind --"),
        (["slurm", "--", "chat", "x"], "name the run behind --"),
        (["slurm", "--nodes", "0", *WORDS], "nodes must be at least 1"),
        (["slurm", "--name", "a b", *WORDS], "letters, digits and dashes"),
        (["sge", *WORDS], "slurm"),
    ],
)
def test_mistakes_are_one_line(capsys, words, said):
    assert cli.main(["launch", *words]) == 2
    assert said in capsys.readouterr().err


def test_ray_train_that_is_not_installed_says_how_to_get_it(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray.train", None)
    assert cli.main(["launch", "ray", *WORDS]) == 2
    assert capsys.readouterr().err == (
        "llamita: Ray Train wants to be installed: pip install 'llamita[ray]' 'ray[train]'\n"
    )
    assert cli.main(["launch", "ray", "--", "chat", "x"]) == 2
    assert "name the run behind --" in capsys.readouterr().err


def test_no_file_is_written(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    printed(capsys, "slurm", *WORDS)
    assert not list(Path(tmp_path).iterdir())
