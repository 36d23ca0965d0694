"""A moving average of the weights, kept beside them and evaluated in their place."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule

from llamita.train.optim import Weighted, local, named_weights
from llamita.train.run import Average
from llamita.train.schedule import parse_span


def kept(average: Average, tokens: int) -> float:
    """What is left of a step's share after one more step, of `tokens` tokens: 0.5 after a half-life."""
    half_life = parse_span(average.half_life, "average.half_life")
    return 0.5 ** ((tokens if half_life.is_tokens else 1) / half_life.length)


class EMA:
    """The mean of the weights after every step, a step counting half after each half-life; before the first, the
    weights that there are. The first weights have no part in it, so it needs no warm-up.

    Kept in float32 (float64 for such weights), cut as the weights are. Weights must be of that dtype too.
    """

    def __init__(self, model: Weighted):
        self.model = model
        self.weights = named_weights(model)
        self.mean = {name: weight.detach().clone() for name, weight in self.weights.items()}
        self.mass = torch.zeros((), dtype=torch.float64)  # the shares of all steps together
        narrow = [name for name, mean in self.mean.items() if mean.dtype.itemsize < 4]
        if narrow:
            raise ValueError(f"weights in {self.mean[narrow[0]].dtype} cannot be averaged: keep them in float32")

    @torch.no_grad()
    def update(self, kept: float) -> None:
        """Take in the weights as they are now; what came before counts `kept` times as much as until now."""
        self.mass.mul_(kept).add_(1)
        means, weights = ([local(x) for x in each.values()] for each in (self.mean, self.weights))
        torch._foreach_lerp_(means, weights, 1 / self.mass.item())

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the mean for its weights inside, and its own again, bit for bit, behind. Nothing may be saved
        or trained inside."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, weight in self.weights.items():
            mean, own = local(self.mean[name]), local(weight)
            aside = own.clone()
            own.copy_(mean)
            mean.copy_(aside)
        for module in self.model.modules():
            if isinstance(module, FSDPModule):  # it may still hold the whole weights of its last forward pass
                module.reshard()

    def state_dict(self) -> dict[str, Any]:
        """The average's own tensors: "mean" by the weights' names, and "mass"."""
        return {"mean": self.mean, "mass": self.mass}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copy a state in. Raises ValueError for that of another model."""
        if state["mean"].keys() != self.mean.keys():
            name = min(state["mean"].keys() ^ self.mean.keys())
            raise ValueError(f"the average in the checkpoint is of another model: {name} is only in one of them")
        self.mass.copy_(state["mass"])
        for name, mean in self.mean.items():
            mean.copy_(state["mean"][name])
