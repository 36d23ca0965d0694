"""The same command on many machines: scripts for schedulers, which start torchrun, which starts a process a GPU.

A run needs nothing more: it goes on from its newest whole checkpoint, with as many ranks as there are, so whatever
stopped it, the same script is handed in again.
"""

import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

PORT = 29_400
MARGIN = 10  # seconds of the grace that are left to torchrun itself
RESTARTS = 3  # of all processes together, when one dies; they go on from the newest checkpoint

FAILURES = 100  # of a job whose scheduler does not look for new checkpoints
# The flight recorder, so that a hang can be explained; and a store of its own for each start, without which gloo finds
# the addresses of the dead (6 of 6 restarts failed so, LOG.md).
SETTINGS = {"TORCH_FR_BUFFER_SIZE": "2000", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


@dataclass(frozen=True)
class Cluster:
    """What a run is given."""

    name: str = "llamita"
    """Of the job."""
    nodes: int = 1
    """Machines."""
    processes: int = 8
    """Processes a machine: as many as it has GPUs."""
    cpu: bool = False
    """Without GPUs."""
    grace: int = 300
    """Seconds between the scheduler's SIGTERM and its SIGKILL: a checkpoint has to fit in."""

    def __post_init__(self) -> None:
        for field in ("nodes", "processes", "grace"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, not {getattr(self, field)}")
        if not all(char.isascii() and (char.isalnum() or char == "-") for char in self.name) or not self.name:
            raise ValueError(f"a job's name is made of letters, digits and dashes, not {self.name!r}")


def run_folder(words: Sequence[str]) -> str:
    """What follows --dir in a command, behind a blank or an equals sign; "" without one."""
    joined = next((word.partition("=")[2] for word in words if word.startswith("--dir=")), "")
    return joined or next((words[at + 1] for at, word in enumerate(words[:-1]) if word == "--dir"), "")


def torchrun(words: Sequence[str], cluster: Cluster, head: str, python: str) -> list[str]:
    """The command of each machine; `head` is the name of the one that the others meet at."""
    if not words or words[0] not in ("train", "sft", "extend") or not run_folder(words):
        raise ValueError("name the run behind --: llamita launch slurm -- train 100m --dir runs/mine ...")
    return [
        python, "-m", "torch.distributed.run", f"--nnodes={cluster.nodes}", f"--nproc-per-node={cluster.processes}",
        "--rdzv-backend=c10d", f"--rdzv-endpoint={head}:{PORT}", f"--max-restarts={RESTARTS}",
        f"--shutdown-timeout={max(1, cluster.grace - MARGIN)}", "-m", "llamita", *words,
    ]  # fmt: skip


def slurm(words: Sequence[str], cluster: Cluster, time: str) -> str:
    """A script for sbatch: stopped at its time limit, or on a machine that failed, it puts itself in the queue again.

    `time` is Slurm's own format, such as 1-12:00:00.
    """
    command = shlex.join(torchrun(words, cluster, "HEAD", sys.executable)).replace("HEAD", '"$head"', 1)
    checkpoints = shlex.quote(run_folder(words) + "/checkpoints")
    gpus = "" if cluster.cpu else f"#SBATCH --gpus-per-node={cluster.processes}\n"
    return (
        f"#!/bin/bash\n#SBATCH --job-name={cluster.name}\n#SBATCH --nodes={cluster.nodes}\n"
        f"#SBATCH --ntasks-per-node=1\n{gpus}#SBATCH --exclusive\n#SBATCH --time={time}\n#SBATCH --requeue\n"
        f"#SBATCH --open-mode=append\n#SBATCH --output={cluster.name}-%j.log\n"
        f"# The run is told {cluster.grace} s before the end, writes a checkpoint, and stops.\n"
        f"#SBATCH --signal=TERM@{cluster.grace}\n\n"
        f"export {' '.join(f'{name}={value}' for name, value in SETTINGS.items())}\n"
        f"newest() {{ ls {checkpoints} 2>/dev/null | tail -n 1; }}\n"
        'head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)\n'
        "before=$(newest)\n"
        f"srun --kill-on-bad-exit=1 {command}\n"
        "code=$?\n"
        "# Stopped before its last step, it goes on from its newest checkpoint; without a new one it would fail again\n"
        'if [ $code -ne 0 ] && [ "$(newest)" != "$before" ]; then scontrol requeue "$SLURM_JOB_ID"; fi\n'
        "exit $code\n"
    )


def kubernetes(words: Sequence[str], cluster: Cluster, image: str, volume: str) -> str:
    """An indexed Job and the service by which its pods find the first one, for `kubectl apply -f`.

    `image` has llamita in it; `volume` names a claim that all pods mount at /work, where data and runs lie.
    """
    command = torchrun(words, cluster, "$(HEAD)", "python")
    resources = {} if cluster.cpu else {"limits": {"nvidia.com/gpu": cluster.processes}}
    head = f"{cluster.name}-0.{cluster.name}"
    container: dict[str, Any] = {
        "name": "llamita", "image": image, "command": command, "workingDir": "/work", "resources": resources,
        "env": [{"name": name, "value": value} for name, value in {"HEAD": head, **SETTINGS}.items()],
        "volumeMounts": [{"name": "work", "mountPath": "/work"}, {"name": "shm", "mountPath": "/dev/shm"}],
    }  # fmt: skip
    pod = {
        "subdomain": cluster.name, "restartPolicy": "OnFailure", "terminationGracePeriodSeconds": cluster.grace,
        "containers": [container],
        "volumes": [{"name": "work", "persistentVolumeClaim": {"claimName": volume}},
                    {"name": "shm", "emptyDir": {"medium": "Memory"}}],
    }  # fmt: skip
    labels = {"job-name": cluster.name}
    job = {
        "apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": cluster.name},
        "spec": {"completionMode": "Indexed", "completions": cluster.nodes, "parallelism": cluster.nodes,
                 "backoffLimit": FAILURES, "template": {"metadata": {"labels": labels}, "spec": pod}},
    }  # fmt: skip
    service = {
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": cluster.name},
        "spec": {"clusterIP": "None", "selector": labels, "publishNotReadyAddresses": True},
    }  # fmt: skip
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": [service, job]}, indent=1) + "\n"


def ray(verb: Callable[[dict[str, Any]], None], words: Sequence[str], cluster: Cluster) -> None:
    """Run it on a Ray cluster: Ray Train starts the processes, in each of which `verb` is given the words and this
    folder, {"words": words, "here": folder}."""
    torchrun(words, cluster, "ray", "python")  # says what is wrong with the words
    try:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer
    except ImportError as error:
        raise ValueError("Ray Train wants to be installed: pip install 'llamita[ray]' 'ray[train]'") from error
    TorchTrainer(
        verb, train_loop_config={"words": list(words), "here": os.getcwd()},
        torch_config=TorchConfig(backend="gloo" if cluster.cpu else "cpu:gloo,cuda:nccl"),  # as parallel.mesh joins
        scaling_config=ScalingConfig(num_workers=cluster.nodes * cluster.processes, use_gpu=not cluster.cpu),
        run_config=RunConfig(name=cluster.name, failure_config=FailureConfig(max_failures=FAILURES)),
    ).fit()  # fmt: skip
