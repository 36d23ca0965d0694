"""The verbs about a run that stands: going on from it elsewhere, and proving that it may be stopped."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional

Folder = Annotated[Path, tyro.conf.arg(metavar="FOLDER")]


def extend(
    run: Positional[Path], at: int, steps: int, decay_steps: int, dir: Folder, mix: str = "",
    prompt: tuple[str, ...] = ("The ",),
) -> None:  # fmt: skip
    """Go on from a checkpoint of a run in another folder: let the rate fall there, train longer, anneal on a mixture.

    Args:
        run: Run folder of the stem; it stays as it is.
        at: Step of the checkpoint to go on from.
        steps: Steps in all, those of the stem included.
        decay_steps: Steps, at the end, over which the learning rate falls.
        dir: Folder of the new run; the same command goes on from its newest checkpoint.
        mix: Mixture of the fall (docs/data.md), such as "source=books:30% rest".
        prompt: Beginnings that are continued during training, to be read by people.
    """
    from llamita.parallel import mesh
    from llamita.recipes import extend

    extend.extend(run, dir, at=at, steps=steps, decay_steps=decay_steps, mix_line=mix, prompts=list(prompt))
    mesh.leave()


def verify_resume(words: list[str]) -> Callable[..., None]:
    """The verb `verify-resume` for the command `words`, which stands behind -- on the command line."""

    def verb(steps: int = 8, processes: int = 1, then: int = 0) -> None:
        """Certify that a run may be killed: `llamita verify-resume -- train RECIPE --dir FOLDER ...`.

        Args:
            steps: Steps to train, half of them before the kill.
            processes: Processes that train.
            then: Start again on so many processes, too; 0 leaves that out.
        """
        from llamita.recipes import resume

        found = resume.verify(words, steps=steps, processes=processes, then=then)
        for what, value in found.items():
            if not isinstance(value, dict):
                print(f"{what}: {({True: 'yes', False: 'NO'})[value] if isinstance(value, bool) else value}")
        if not found["holds"]:
            raise SystemExit(1)

    return verb
