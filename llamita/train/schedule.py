"""Learning rate, batch size and first sample as pure functions of the step, and what they leave free when a run is
extended or branched: nothing of its past may change."""

import math
import re
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from llamita.data import mix

if TYPE_CHECKING:
    from llamita.train.run import Run, Schedule

SPAN = re.compile(r"(\d[\d_]*)(t?)")
# Settings that a longer run may have otherwise than its stem; `check_extension` holds them to the same past.
EXTENDABLE = ("steps", "data.mix", "schedule.ramp", "schedule.decay", "schedule.final_ratio")


class Span(NamedTuple):
    """A length of training: so many steps, or tokens (rows times seq_len, padding counted)."""

    length: int
    is_tokens: bool


class Stage(NamedTuple):
    """From `step` on, whose first sample is `first_sample`, a step has so many rows."""

    step: int
    first_sample: int
    rows: int


def parse_span(text: str, where: str) -> Span:
    """ "1000" is steps, "252_000_000t" tokens. Raises ValueError, naming the setting `where`, for anything else."""
    match = SPAN.fullmatch(text)
    if match is None:
        raise ValueError(f"{where}: {text!r} is no length: write steps such as 1000, or tokens such as 252_000_000t")
    return Span(int(match[1]), bool(match[2]))


def parse_ramp(lines: tuple[str, ...]) -> list[tuple[Span, int]]:
    """Where each later stage of the batch size begins, and its rows. Raises ValueError for what cannot be read."""
    found = []
    for line in lines:
        start, colon, rows = line.partition(":")
        if not (colon and rows.isdecimal() and int(rows)):
            raise ValueError(f"schedule.ramp: {line!r} is no stage: write START:ROWS such as 252_000_000t:512")
        found.append((parse_span(start, "schedule.ramp"), int(rows)))
    return found


def lr_ratio(schedule: "Schedule", step: int, steps: int) -> float:
    """Share of the peak rate at `step` (0-based) of `steps`.

    Linear warm-up; then a cosine to final_ratio (SGDR, arXiv 1608.03983, equation 5), or warm-up-stable-decay (MiniCPM,
    arXiv 2404.06395, section 4): the peak up to `decay_start`, then linear or 1 - sqrt to final_ratio (arXiv
    2405.18392, section 3). Behind the last step it stays there.
    """
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    start = decay_start(schedule, steps)
    done = min(1.0, max(0, step - start) / max(1, steps - start))
    if schedule.kind == "cosine":
        fall = 0.5 * (1 + math.cos(math.pi * done))
    else:
        fall = 1 - (math.sqrt(done) if schedule.decay == "1-sqrt" else done)
    return schedule.final_ratio + (1 - schedule.final_ratio) * fall


def decay_start(schedule: "Schedule", steps: int) -> int:
    """The first step behind the plateau; up to here the rate does not depend on `steps`."""
    if schedule.kind == "cosine":
        return schedule.warmup_steps
    return steps - (schedule.decay_steps or round(schedule.decay_share * steps))


def stages(run: "Run") -> tuple[Stage, ...]:
    """The batch size over the run: `batch_size` rows at first, then each stage of `schedule.ramp` (Llama 3 went from 4M
    tokens a step to 8M after 252M tokens and to 16M after 2.87T: arXiv 2407.21783, section 3.4.1).

    A stage that begins at a number of tokens takes the first step before which so many have been seen. Raises
    ValueError for stages that do not begin later and later, or are not made of whole micro-batches.
    """
    found = [Stage(0, 0, run.batch_size)]
    for line, (start, rows) in zip(run.schedule.ramp, parse_ramp(run.schedule.ramp), strict=True):
        last = found[-1]
        step = start.length
        if start.is_tokens:
            samples = math.ceil(start.length / run.data.seq_len)
            step = last.step + math.ceil((samples - last.first_sample) / last.rows)
        if step <= last.step:
            raise ValueError(f"schedule.ramp: {line!r} begins at step {step}, not after {last.step}: order the stages")
        if rows % run.micro_batch_size:
            raise ValueError(f"schedule.ramp: {line!r} is no multiple of micro_batch_size {run.micro_batch_size}")
        found.append(Stage(step, last.first_sample + (step - last.step) * last.rows, rows))
    return tuple(found)


def _stage_of(run: "Run", step: int) -> Stage:
    return next(stage for stage in reversed(stages(run)) if stage.step <= step)


def batch_size(run: "Run", step: int) -> int:
    """Rows of `step` (0-based), of all ranks together."""
    return _stage_of(run, step).rows


def first_sample(run: "Run", step: int) -> int:
    """The number of the first sample of `step`: as many were drawn before it."""
    stage = _stage_of(run, step)
    return stage.first_sample + (step - stage.step) * stage.rows


def place(run: "Run", sample: int) -> tuple[int, int]:
    """The step (0-based) that reads a sample, and its row there: the inverse of `first_sample`."""
    stage = next(stage for stage in reversed(stages(run)) if stage.first_sample <= sample)
    steps, row = divmod(sample - stage.first_sample, stage.rows)
    return stage.step + steps, row


def next_change(run: "Run", step: int) -> int:
    """The first step after `step` at which the batch size or the mixture changes; `steps` where neither does."""
    starts = [each[0] for pieces in (stages, _phases) for each in pieces(run)]
    return min([start for start in starts if step < start < run.steps], default=run.steps)


def extended(stem: "Run", step: int, *, steps: int, decay_steps: int, mix_line: str = "") -> "Run":
    """The run that goes on from a stem's checkpoint of `step` to `steps`, the last `decay_steps` of them falling.

    A branch has steps = step + decay_steps; a longer run has more. `mix_line` is the mixture of the fall (Llama 3
    annealed on chosen data: arXiv 2407.21783, section 3.4.3); without one the stem's phases stay at their steps. Raises
    ValueError where that would change what the stem has done already.
    """
    if not 0 < decay_steps <= steps - step:
        raise ValueError(f"a fall of {decay_steps} steps does not fit between steps {step} and {steps}")
    end = steps - decay_steps if mix_line else steps
    lines = [line if start == 0 else f"{start}: {line}" for start, line in _phases(stem) if start < end]
    if mix_line:
        lines.append(f"{end}: {mix_line}")
    data = replace(stem.data, mix=tuple(lines) if len(lines) > 1 else stem.data.mix[:1])
    run = replace(stem, steps=steps, data=data, schedule=replace(stem.schedule, kind="wsd", decay_steps=decay_steps))
    check_extension(stem, run, step)
    return run


def check_extension(stem: "Run", run: "Run", step: int) -> None:
    """Raise ValueError unless `run` would have come to its step `step` as `stem` did: the same rates, rows and mixture
    at every step before it. What else may differ is `EXTENDABLE`."""
    if (stem.schedule, stem.steps) != (run.schedule, run.steps):
        if (stem.schedule.kind, stem.schedule.warmup_steps) != (run.schedule.kind, run.schedule.warmup_steps):
            raise ValueError(
                "only a plateau can be gone on from: train the stem with schedule.kind wsd, and leave "
                "schedule.warmup_steps as it is"
            )
        for whose, each in (("the stem's", stem), ("the extended", run)):
            start = decay_start(each.schedule, each.steps)
            if start < step:
                raise ValueError(
                    f"{whose} learning rate falls from step {start} on, before step {step} where it is to go on: go on "
                    f"from a checkpoint at or before {start}" + ("" if each is stem else ", or fall over fewer steps")
                )
    for setting, pieces in (("schedule.ramp", stages), ("data.mix", _phases)):
        if [each for each in pieces(stem) if each[0] < step] != [each for each in pieces(run) if each[0] < step]:
            raise ValueError(f"{setting} differs before step {step}, which is done already: change only what follows")


def _phases(run: "Run") -> list[tuple[int, str]]:
    """The phases of the mixture: first step, and the line without it."""
    found = []
    for line, blend in zip(run.data.mix or ("natural",), mix.parse(run.data.mix), strict=True):
        start = round(blend.start * run.steps) if blend.is_share else int(blend.start)
        match = mix.LINE.fullmatch(line)
        assert match is not None, "parse has read it"
        found.append((start, match[3]))
    return found
