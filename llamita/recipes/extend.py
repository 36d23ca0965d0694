"""A run that goes on from a checkpoint of another: a fall branched off a plateau, a longer run, another mixture."""

import shutil
from pathlib import Path

from llamita import config
from llamita.checkpoint import store
from llamita.config import flatten
from llamita.model.llama import Llama
from llamita.parallel import mesh
from llamita.recipes import stages
from llamita.runtime import pick_device
from llamita.train import schedule
from llamita.train.run import Run


def extend(
    stem: Path, folder: Path, *, at: int, steps: int, decay_steps: int, mix_line: str = "", prompts: list[str]
) -> Llama:
    """Train `folder` from the checkpoint of step `at` of the run in `stem` to `steps`, as `schedule.extended` says.

    The stem stays as it is. Called again, it goes on. Raises ValueError: no such checkpoint, a past that would change.
    """
    if not (stem / "run.toml").is_file():
        raise ValueError(f"{stem} has no run.toml: give the folder of a run, as `llamita train` writes it")
    there = {step: path for step, path in store.steps(stem / "checkpoints") if store.damage(path) is None}
    if at not in there:
        held = ", ".join(map(str, sorted(there))) or "none"
        raise ValueError(
            f"{stem} has no whole checkpoint of step {at}, only of: {held}; --checkpoint.keep-every lets some stay"
        )
    before = config.load(Run, there[at] / "run.toml")
    run = schedule.extended(before, at, steps=steps, decay_steps=decay_steps, mix_line=mix_line)
    mesh.join(pick_device(run.device).type)
    mesh.first_rank_first(lambda: _seed(there[at], folder / "checkpoints"))
    was = flatten(before)
    sources = {key: f"{stem.name}" if value == was[key] else "extension" for key, value in flatten(run).items()}
    return stages.pretrain(run, folder, prompts=prompts, sources=sources)


def _seed(checkpoint: Path, checkpoints: Path) -> None:
    """The first checkpoint of the new run, whole or not there."""
    if store.steps(checkpoints):
        return
    aside = checkpoints / f".{checkpoint.name}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(checkpoint, aside)
    aside.rename(checkpoints / checkpoint.name)
