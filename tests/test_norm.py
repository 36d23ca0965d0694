"""Numerics against a plain twin: RMSNorm, both directions."""

import pytest
import torch

from llamita.kernels import norm


def parts(dtype, weight_dtype=None):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 7, 24, generator=generator, dtype=dtype) * 5
    weight = torch.rand(24, generator=generator, dtype=weight_dtype or dtype)
    return x.requires_grad_(), weight.requires_grad_()


def value_and_gradients(function, x, weight, eps=1e-2):
    value = function(x, weight, eps)
    along = torch.randn(value.shape, generator=torch.Generator().manual_seed(1)).to(value.dtype)
    return [value.detach(), *torch.autograd.grad((value * along).sum(), (x, weight))]


def gap(first, second):
    return max(float((a - b).abs().max()) for a, b in zip(first, second, strict=True))


def test_equals_its_twin():
    x, weight = parts(torch.float64)
    ours = value_and_gradients(norm.rms_norm, x, weight)
    assert gap(ours, value_and_gradients(norm.composed_rms_norm, x, weight)) < 1e-12
    other = value_and_gradients(lambda x, w, eps: norm.composed_rms_norm(x, w, 2 * eps), x, weight)
    assert gap(ours, other) > 1e-4, "another eps must fail this test"
    assert torch.autograd.gradcheck(lambda x, w: norm.rms_norm(x, w, 1e-2), (x, weight))


def test_a_row_of_zeros_stays_zero():
    x, weight = parts(torch.float32)
    found = value_and_gradients(norm.rms_norm, x.detach().zero_().requires_grad_(), weight)
    assert found[0].count_nonzero() == 0 and all(each.isfinite().all() for each in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_computed_in_float32_and_comes_in_autocasts_dtype(dtype):
    x, weight = parts(dtype, torch.float32)
    exact = norm.composed_rms_norm(x.double(), weight.double(), 1e-2)
    assert norm.rms_norm(x, weight, 1e-2).dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        found, gradient, _ = value_and_gradients(norm.rms_norm, x, weight)
    assert found.dtype == torch.bfloat16 and gradient.dtype == dtype
    assert torch.equal(found, exact.float().bfloat16())
