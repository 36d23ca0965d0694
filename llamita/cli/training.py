"""The verbs around training: is a run right before it starts."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Annotated

import tyro

from llamita.cli.data import AsJson, console
from llamita.train.run import Run


@dataclass
class Examined:
    """A run before its first step."""

    run: Annotated[Run, tyro.conf.arg(name="")]
    as_json: AsJson = False
    """Print one JSON object."""


def doctor(examined: Examined, origin: dict[str, str]) -> None:
    """Examine a run on its own data before step 1: `llamita doctor RECIPE --data.corpus FOLDER [--dotted.field value]`.

    Ends with exit code 1 when something is wrong.
    """
    from llamita.recipes import doctor as room

    if examined.as_json:
        found = list(room.doctor(examined.run))
        print(json.dumps({"findings": [dataclasses.asdict(finding) for finding in found]}))
    else:
        found = room.show(room.doctor(examined.run), console())
    if any(finding.status == "fail" for finding in found):
        raise SystemExit(1)
