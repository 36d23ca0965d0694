"""The verb that hands a run to a scheduler."""

import os
from collections.abc import Callable
from typing import Any, Literal

from tyro.conf import OmitArgPrefixes, Positional

from llamita.recipes.launch import Cluster


def launch(words: list[str]) -> Callable[..., None]:
    """The verb `launch` for the command `words`, which stands behind -- on the command line."""

    def verb(
        on: Positional[Literal["slurm", "kubernetes", "ray"]], cluster: OmitArgPrefixes[Cluster] = Cluster(),  # noqa: B008
        time: str = "1-00:00:00", image: str = "llamita", volume: str = "llamita",
    ) -> None:  # fmt: skip
        """Hand a run to a scheduler: `llamita launch slurm -- train 100m --dir FOLDER ...`.

        The run goes on from its newest checkpoint whenever it is started again, on as many processes as there are.

        Args:
            on: slurm (a script for sbatch), kubernetes (for kubectl apply -f -), or ray (runs it).
            cluster: What it is given.
            time: Slurm's time limit; at its end the run stops itself and is queued again.
            image: Kubernetes: an image with llamita in it.
            volume: Kubernetes: the claim that every pod mounts at /work.
        """
        from llamita.recipes import launch

        if on == "slurm":
            print(launch.slurm(words, cluster, time), end="")
        elif on == "kubernetes":
            print(launch.kubernetes(words, cluster, image, volume), end="")
        else:
            launch.ray(_in_a_worker, words, cluster)

    return verb


def _in_a_worker(config: dict[str, Any]) -> None:
    from llamita.cli import main

    os.chdir(config["here"])  # Ray runs workers in folders of their own
    if code := main(config["words"]):
        raise SystemExit(code)
