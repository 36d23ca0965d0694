"""Learning rate as a pure function of the step."""

import math

from llamita.train.run import Schedule


def lr_ratio(schedule: Schedule, step: int, steps: int) -> float:
    """Share of the peak rate at `step` (0-based) of `steps`.

    Linear warm-up; then a cosine to final_ratio (SGDR, arXiv 1608.03983, equation 5), or warm-up-stable-decay: the peak
    until the last `decay_share` of the steps, then linear to final_ratio (MiniCPM, arXiv 2404.06395, section 4).
    """
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    if schedule.kind == "cosine":
        done = min(1.0, (step - schedule.warmup_steps) / max(1, steps - schedule.warmup_steps))
        fall = 0.5 * (1 + math.cos(math.pi * done))
    else:
        decay_steps = max(1, round(schedule.decay_share * steps))
        fall = min(1.0, max(0, steps - step) / decay_steps)
    return schedule.final_ratio + (1 - schedule.final_ratio) * fall
