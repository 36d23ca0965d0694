"""Random weights for tests that must see every mistake."""

import torch


def filled(model, seed=0):
    """The model with norms 1 +- 0.2 and matrices that keep attention scores and logits at a std near 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.copy_(0.8 + 0.4 * torch.rand(weight.shape, generator=generator))
            else:
                weight.copy_(torch.randn(weight.shape, generator=generator) * weight.shape[1] ** -0.5)
    return model
