"""Numerics against a plain twin: the chunked cross-entropy of a linear head."""

import pytest
import torch

from llamita.kernels import loss as kernel


def parts(dtype, tokens=1300, dim=16, vocab=700):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, dim, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab, dim, generator=generator, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, vocab, (tokens,), generator=generator)
    targets[::7] = kernel.NO_LOSS
    return hidden, weight, targets


def value_and_gradients(function, hidden, weight, targets, scale=1.0):
    value = function(hidden, weight, targets)
    return value, torch.autograd.grad(value * scale, (hidden, weight))


def test_equals_its_twin_over_several_chunks(monkeypatch):
    monkeypatch.setattr(kernel, "_chunk_rows", lambda vocab_size: 256)
    hidden, weight, targets = parts(torch.float64)
    ours, ours_grads = value_and_gradients(kernel.linear_cross_entropy, hidden, weight, targets, scale=0.3)
    twin, twin_grads = value_and_gradients(kernel.reference_cross_entropy, hidden, weight, targets, scale=0.3)
    assert abs(ours - twin) < 1e-9
    for a, b in zip(ours_grads, twin_grads, strict=True):
        assert (a - b).abs().max() < 1e-12


def test_tokens_without_loss_bear_none():
    """Moving a masked token's hidden state changes nothing; a real one's does (negative control)."""
    hidden, weight, targets = parts(torch.float64)
    base = kernel.linear_cross_entropy(hidden, weight, targets)
    moved = hidden.detach().clone()
    moved[::7] += 1
    assert kernel.linear_cross_entropy(moved, weight, targets) == base
    moved[1] += 1
    assert kernel.linear_cross_entropy(moved, weight, targets) != base


def test_no_target_at_all_is_zero_not_nan():
    hidden, weight, targets = parts(torch.float32)
    value, grads = value_and_gradients(kernel.linear_cross_entropy, hidden, weight, torch.full_like(targets, -1))
    assert value == 0 and all((grad == 0).all() for grad in grads)


def test_bf16_hidden_states_stay_close_to_fp32():
    hidden, weight, targets = parts(torch.float32)
    exact, exact_grads = value_and_gradients(kernel.reference_cross_entropy, hidden, weight, targets)
    near, near_grads = value_and_gradients(
        lambda h, w, t: kernel.linear_cross_entropy(h.bfloat16(), w, t), hidden, weight, targets
    )
    assert near.item() == pytest.approx(exact.item(), rel=1e-2)
    assert (near_grads[1] - exact_grads[1]).norm() < 0.02 * exact_grads[1].norm()
