"""Optimizers over a built model, whole or cut over ranks: which weights go to which, their state by name, their rates.

Everything that is elementwise works on a rank's own shards; only Muon's orthogonalization needs whole matrices.
"""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from llamita.train.muon import Orthogonalizer
from llamita.train.run import Optim

MOMENTUM = 0.95  # of Muon (github.com/KellerJordan/Muon)


class Weighted(Protocol):
    """A model, or what a rank holds of one."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def modules(self) -> Iterator[nn.Module]: ...


def named_weights(model: Weighted) -> dict[str, nn.Parameter]:
    """Every weight that is trained, each once."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def local(x: Tensor) -> Tensor:
    """What this rank holds of a tensor, sharing its memory."""
    return x.to_local() if isinstance(x, DTensor) else x


def local_gradient(weight: Tensor) -> Tensor:
    """A weight's gradient, cut as the weight is."""
    gradient = weight.grad
    if isinstance(weight, DTensor) and isinstance(gradient, DTensor) and gradient.placements != weight.placements:
        gradient = gradient.redistribute(placements=weight.placements)
    assert gradient is not None
    return local(gradient)


class Optimizer:
    """AdamW (arXiv 1711.05101) for all, or Muon (arXiv 2502.16982) for the layers' matrices and AdamW for embeddings,
    head and norms. Norms are never decayed.

    Weights may be DTensors of any layout; the model is on its device and filled. State is there from the start, so
    that a checkpoint can be read into it.
    """

    def __init__(self, model: Weighted, optim: Optim):
        self.optim = optim
        self.weights = named_weights(model)
        self.matrices = [name for name in self.weights if optim.kind == "muon" and self._is_layer_matrix(name)]
        self.decayed = [name for name in self.weights if name not in self.matrices and self.weights[name].ndim > 1]
        self.norms = [name for name in self.weights if self.weights[name].ndim == 1]
        self.orthogonalize = Orthogonalizer({name: self.weights[name] for name in self.matrices})
        self.state: dict[str, dict[str, Tensor]] = {}
        for name, weight in self.weights.items():
            kinds = ("momentum",) if name in self.matrices else ("exp_avg", "exp_avg_sq")
            self.state[name] = {kind: torch.zeros_like(weight, requires_grad=False) for kind in kinds}
            if name not in self.matrices:
                self.state[name]["step"] = torch.zeros((), device=weight.device)

    def _is_layer_matrix(self, name: str) -> bool:
        return name.startswith("layers.") and self.weights[name].ndim == 2

    @torch.no_grad()
    def step(self, ratio: float) -> None:
        """One update at `ratio` of the peak rates; gradients are freed. A weight without a gradient stays."""
        for names, weight_decay in ((self.decayed, self.optim.weight_decay), (self.norms, 0.0)):
            self._adamw(self._moved(names), self.optim.lr * ratio, weight_decay)
        self._muon(self._moved(self.matrices), self.optim.muon_lr * ratio)
        self.forget_gradients()

    def forget_gradients(self) -> None:
        for weight in self.weights.values():
            weight.grad = None

    def _moved(self, names: list[str]) -> list[str]:
        return [name for name in names if self.weights[name].grad is not None]

    def _adamw(self, names: list[str], lr: float, weight_decay: float) -> None:
        states = {kind: [local(self.state[name][kind]) for name in names] for kind in ("exp_avg", "exp_avg_sq", "step")}
        adamw(
            [local(self.weights[name]) for name in names],
            [local_gradient(self.weights[name]) for name in names],
            states["exp_avg"],
            states["exp_avg_sq"],
            [],
            states["step"],
            fused=True,
            amsgrad=False,
            beta1=self.optim.beta1,
            beta2=self.optim.beta2,
            lr=lr,
            weight_decay=weight_decay,
            eps=self.optim.eps,
            maximize=False,
        )

    def _muon(self, names: list[str], lr: float) -> None:
        """Nesterov momentum, orthogonalized; 0.2 sqrt(larger side) makes its rms that of AdamW's updates (arXiv
        2502.16982, equation 4)."""
        updates = {}
        for name in names:
            momentum, gradient = local(self.state[name]["momentum"]), local_gradient(self.weights[name])
            momentum.lerp_(gradient, 1 - MOMENTUM)
            updates[name] = gradient.lerp(momentum, MOMENTUM)
        for name, update in self.orthogonalize(updates):
            weight = self.weights[name]
            local(weight).mul_(1 - lr * self.optim.weight_decay)
            local(weight).add_(update, alpha=-lr * 0.2 * max(weight.shape) ** 0.5)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """By weight, the optimizer's own tensors, cut as the weight is: exp_avg, exp_avg_sq and step, or momentum."""
        return self.state

    def load_state_dict(self, states: dict[str, dict[str, Tensor]]) -> None:
        """Copy a state in. Raises ValueError for the state of other weights or another kind of optimizer."""
        theirs, ours = ({(name, kind) for name in each for kind in each[name]} for each in (states, self.state))
        if theirs != ours:
            name, kind = min(theirs ^ ours)
            holder = "the checkpoint" if (name, kind) in theirs else "the model"
            raise ValueError(
                f"the optimizer's state is of another model or optim.kind: {kind} of {name} is only in {holder}"
            )
        with torch.no_grad():
            for name, kind in ours:
                self.state[name][kind].copy_(states[name][kind])
