"""8-bit matmuls against their twin, which rounds alike and multiplies in float32; and a model that learns with them."""

import dataclasses

import pytest
import torch

from llamita.kernels import fp8
from llamita.train.run import Optim
from tests import training

RUN = dataclasses.replace(training.RUN, optim=Optim(lr=2e-2, weight_decay=0.0))


def pair(seed=0):
    draw = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(2, 16, 32, generator=draw), torch.randn(48, 32, generator=draw)
    return x.bfloat16().requires_grad_(), weight.requires_grad_(), torch.randn(2, 16, 48, generator=draw).bfloat16()


def relative(a, b):
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def test_the_product_is_the_twins_to_the_rounding_of_bf16():
    x, weight, _ = pair()
    ours, twin = fp8.linear(x, weight), fp8.reference_linear(x.flatten(0, 1), weight).unflatten(0, (2, 16))
    assert ours.dtype == torch.bfloat16 and relative(ours, twin) < 4e-3
    assert 0.01 < relative(ours, x.float() @ weight.t()) < 0.06, "8 bits must be seen, and be no more than 8 bits"


def test_gradients_are_the_products_of_the_rounded_factors():
    x, weight, grad = pair()
    fp8.linear(x, weight).backward(grad)
    rounded = [q.float() * scale for q, scale in (
        fp8.quantize(grad.flatten(0, 1), fp8.BACKWARD), fp8.quantize(x.flatten(0, 1), fp8.FORWARD),
        fp8.quantize(weight, fp8.FORWARD),
    )]  # fmt: skip
    assert relative(x.grad.flatten(0, 1), rounded[0] @ rounded[2]) < 4e-3
    assert relative(weight.grad, rounded[0].t() @ rounded[1]) < 4e-3
    assert x.grad.dtype == torch.bfloat16 and weight.grad.dtype == torch.float32


def test_a_scale_for_another_tensor_would_be_seen():
    """Negative control."""
    x, weight, _ = pair()
    quantized, scale = fp8.quantize(x.flatten(0, 1), fp8.FORWARD)
    wrong = fp8._multiply(quantized, scale * 1.05, *fp8.quantize(weight, fp8.FORWARD))
    assert relative(wrong, fp8.reference_linear(x.flatten(0, 1), weight)) > 0.04


def test_a_batch_is_overfitted_in_fp8_about_as_in_bf16(tmp_path):
    ends = {}
    for precision in ("bf16", "fp8"):
        trained = training.trainer(tmp_path / precision, dataclasses.replace(RUN, precision=precision))
        for _ in range(100):
            ends[precision] = trained.compute.gradients(training.batch_of(4), 4, 4)[0]
            trained.optimizer.step(1.0)
    assert ends["bf16"] < 0.5 and ends["fp8"] < 0.5 and ends["fp8"] != ends["bf16"]


def test_sizes_that_tensor_cores_do_not_take_are_refused():
    with pytest.raises(ValueError, match=r"layers.0.feed_forward.w1 has 72 x 32: use bf16"):
        fp8.convert(training.model(shape=dataclasses.replace(training.SHAPE, ffn_dim=72)))
