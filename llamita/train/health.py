"""Is the loss still sound? One decision a step, from numbers that are the same on every rank.

A loss or a gradient norm that is no number, or that stands far above those of the steps before it, is a fault: of the
batch, of a machine, or of weights that an earlier step has spoiled. The update of such a step is not applied. When the
next steps are no better it is the weights: training goes back to its newest checkpoint and leaves out every batch
since (PaLM, arXiv 2204.02311, section 5.1, went back about 100 steps and left out 200 to 500 batches).
"""

import math
from collections import deque
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

FEWEST = 32  # sound steps to compare with, before a spike can be told

# The least scale of a deviation, so that a run that has gone quiet does not take its own small steps for spikes:
# 1% of the loss, a quarter of the gradient norm (which clipping makes harmless up to far higher factors).
LOSS_FLOOR, NORM_FLOOR = 0.01, 0.25


@dataclass(frozen=True)
class Health:
    """When a step counts as a fault, and what patience a run has with faults."""

    window: int = 128
    """Sound steps that the loss and the gradient norm are compared with."""
    spike: float = 12.0
    """Robust standard deviations above the median of the window that make a spike; `inf` looks for NaN only."""
    patience: int = 3
    """Faulty steps in a row that send a run back to its newest checkpoint; fewer only lose their own updates."""
    rollbacks: int = 3
    """Times that a run goes back to one and the same checkpoint before it stops."""
    hang_seconds: float = 600.0
    """Seconds without a sign of life that are a hang: several times the longest step, with its compilation."""

    def __post_init__(self) -> None:
        if self.window < FEWEST:
            raise ValueError(f"health.window must be at least {FEWEST} steps, not {self.window}")
        if not self.spike > 0:
            raise ValueError(f"health.spike must be above 0 standard deviations, not {self.spike}")
        for name in ("patience", "rollbacks"):
            if getattr(self, name) < 1:
                raise ValueError(f"health.{name} must be at least 1, not {getattr(self, name)}")
        if not self.hang_seconds > 0:
            raise ValueError(f"health.hang_seconds must be above 0, not {self.hang_seconds}")


@dataclass(frozen=True)
class Verdict:
    decision: Literal["ok", "skip", "roll back"]
    kind: Literal["", "nan", "spike"] = ""
    reason: str = ""
    """What is wrong, in one line; empty when nothing is."""


class Guard:
    """Judges each step, and remembers which steps must not be applied.

    `loss` and `grad_norm` must be reduced over all ranks before they come here: then all ranks decide alike without
    asking each other. The state is small and plain, and belongs into every checkpoint.
    """

    def __init__(self, settings: Health):
        self.settings = settings
        self.skipped: list[int] = []
        """Steps whose batch is left out, ascending; a step's number is that of the updates before it plus 1."""
        self.losses: deque[float] = deque(maxlen=settings.window)
        self.log_norms: deque[float] = deque(maxlen=settings.window)
        self.faults = 0  # in a row
        self.place, self.times = -1, 0  # the checkpoint last gone back to, and how often

    def skips(self, step: int) -> bool:
        """Whether the batch of this step was found faulty before: it is passed over without being computed."""
        return step in self.skipped

    def judge(self, step: int, loss: float, grad_norm: float) -> Verdict:
        """What to do with the update of `step`: "ok" apply it, "skip" do not, "roll back" see `roll_back`.

        `loss` in any unit, the mean of the whole batch; `grad_norm` of the whole gradient before clipping.
        """
        kind, reason = self._fault(loss, grad_norm)
        if not kind:
            self.faults = 0
            self.losses.append(loss)
            self.log_norms.append(_log(grad_norm))
            return Verdict("ok")
        self.faults += 1
        if self.faults >= self.settings.patience:
            return Verdict("roll back", kind, f"{reason}, and so were the {self.faults - 1} steps before it")
        self._leave_out(step, step)
        return Verdict("skip", kind, reason)

    def roll_back(self, step: int, checkpoint: int, *, leave_out: bool = True) -> None:
        """Note that training goes back from the faulty `step` to the checkpoint of step `checkpoint`.

        The batches of all steps between are left out from now on, unless it was a machine's fault and they are to be
        seen again. This state outlives the checkpoint's own: load weights and optimizer from there, not the guard.
        Raises ValueError when the run was here too often.
        """
        self.times = self.times + 1 if checkpoint == self.place else 1
        self.place, self.faults = checkpoint, 0
        if self.times > self.settings.rollbacks:
            raise ValueError(
                f"training came to nothing {self.times} times from the checkpoint of step {checkpoint}, last at step "
                f"{step}: {advice(leave_out)}, or go on from an older checkpoint"
            )
        if leave_out:
            self._leave_out(checkpoint + 1, step)

    def forget(self) -> None:
        """Start the comparison anew, where the loss may rightly jump: at a new mixture of data or batch size."""
        self.losses.clear()
        self.log_norms.clear()

    def state(self) -> dict[str, Any]:
        """Plain numbers and lists, for JSON."""
        return {
            "skipped": list(self.skipped),
            "losses": list(self.losses),
            "log_norms": list(self.log_norms),
            "faults": self.faults,
            "place": self.place,
            "times": self.times,
        }

    def load(self, state: dict[str, Any]) -> None:
        self.skipped = sorted(state["skipped"])
        self.losses.clear()
        self.losses.extend(state["losses"])
        self.log_norms.clear()
        self.log_norms.extend(state["log_norms"])
        self.faults, self.place, self.times = state["faults"], state["place"], state["times"]

    def _leave_out(self, first: int, last: int) -> None:
        self.skipped = sorted({*self.skipped, *range(first, last + 1)})

    def _fault(self, loss: float, grad_norm: float) -> tuple[Literal["", "nan", "spike"], str]:
        for name, value in (("loss", loss), ("gradient norm", grad_norm)):
            if not math.isfinite(value):
                return "nan", f"the {name} is {value}"
        if len(self.losses) >= FEWEST:
            for name, value, shown, history, floor in (
                ("loss", loss, loss, self.losses, LOSS_FLOOR * abs(median(self.losses))),
                ("gradient norm", _log(grad_norm), grad_norm, self.log_norms, NORM_FLOOR),
            ):
                score = deviation(value, history, floor)
                if score > self.settings.spike:
                    return "spike", f"the {name} {shown:.4g} is {score:.0f} deviations above the steps before"
        return "", ""


def advice(is_batch: bool) -> str:
    """What to do where going back does not help: about batches and weights, or about a machine."""
    if is_batch:
        return "lower --optim.lr, or lengthen --schedule.warmup-steps"
    return "a rank computes wrongly: start without the machine that the incident log names"


def deviation(value: float, history: deque[float], floor: float) -> float:
    """How many standard deviations `value` stands above the median of `history`.

    The deviation is 1.4826 times the median absolute one, which equals the standard one on normal noise and is not
    widened by the outliers it should find; never less than `floor`.
    """
    middle = median(history)
    spread = 1.4826 * median(abs(other - middle) for other in history)
    return (value - middle) / max(spread, floor, 1e-12)


def _log(grad_norm: float) -> float:
    """Norms spread by factors, so they are compared as logarithms; a batch with no targets has norm 0."""
    return math.log(max(grad_norm, 1e-12))
