"""Optimizers over a built model: which weights go to which, and their rates."""

import torch
from torch import nn

from llamita.train.run import Optim


class Optimizer:
    """AdamW (arXiv 1711.05101) for all, or Muon (github.com/KellerJordan/Muon) for the layers' matrices and AdamW for
    embeddings, head and norms. Norms are never decayed."""

    def __init__(self, model: nn.Module, optim: Optim):
        named = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
        norms = [weight for _, weight in named if weight.ndim == 1]
        muon = [weight for name, weight in named if optim.kind == "muon" and _is_layer_matrix(name, weight)]
        rest = [weight for _, weight in named if weight.ndim > 1 and all(weight is not other for other in muon)]
        groups: list[dict] = [{"params": rest}, {"params": norms, "weight_decay": 0.0}]
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(
                groups,
                lr=optim.lr,
                betas=(optim.beta1, optim.beta2),
                eps=optim.eps,
                weight_decay=optim.weight_decay,
                fused=True,
            )
        ]
        if muon:
            self.parts.append(torch.optim.Muon(muon, lr=optim.muon_lr, weight_decay=optim.weight_decay))
        self.peaks = [part.defaults["lr"] for part in self.parts]

    def step(self, ratio: float) -> None:
        """One update at `ratio` of the peak rates; gradients are freed."""
        for part, peak in zip(self.parts, self.peaks, strict=True):
            for group in part.param_groups:
                group["lr"] = peak * ratio
            part.step()
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict]:
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict]) -> None:
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)


def _is_layer_matrix(name: str, weight: torch.Tensor) -> bool:
    return weight.ndim == 2 and name.startswith("layers.")
