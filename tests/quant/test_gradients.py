"""Gradients in float16, against those in float32, and in other dtypes, against plain backward passes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from quantcli.quant.gradients import scaled_gradients


def passed(dtype: torch.dtype, gain: float = 1.0) -> tuple[Tensor, list[Tensor]]:
    """Two linears of 4096 channels over 64 tokens, of float32 weights that are cast, and their leaves."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 4096, generator=generator)
    leaves = [torch.randn(32, 4096, generator=generator) / 64, torch.randn(8, 32, generator=generator)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    hidden = linear(x.to(dtype), leaves[0].to(dtype))
    return linear(hidden * gain, leaves[1].to(dtype)), leaves


@pytest.mark.parametrize("size", [1e-30, 1e-9, 1e-4, 1.0, 1e6])
@pytest.mark.parametrize("gain", [1e-3, 1.0, 1e3])
def test_float16_keeps_gradients_of_every_size(size: float, gain: float) -> None:
    gradient = torch.randn(64, 8, generator=torch.Generator().manual_seed(1)) * size
    output, leaves = passed(torch.float16, gain)
    found, scale = scaled_gradients(output, gradient, leaves, torch.float16)
    exact, own = passed(torch.float32, gain)
    expected = torch.autograd.grad(exact, own, gradient)
    for got, wanted in zip(found, expected, strict=True):
        assert got is not None
        assert float((got == 0).float().mean()) < 0.01
        assert float((got.double() / scale - wanted).norm() / wanted.double().norm()) < 0.01


def test_a_gradient_that_overflows_is_taken_with_a_smaller_scale() -> None:
    output, leaves = passed(torch.float16, 1e3)
    gradient = torch.ones(64, 8)
    upstream = torch.autograd.grad(output, leaves, gradient.half() / 2, retain_graph=True)
    assert not all(bool(each.isfinite().all()) for each in upstream)
    found, scale = scaled_gradients(output, gradient, leaves, torch.float16)
    assert scale < 0.5
    assert all(each is not None and bool(each.isfinite().all()) for each in found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_other_dtypes_have_the_gradients_of_a_plain_pass(dtype: torch.dtype) -> None:
    gradient = torch.randn(64, 8, generator=torch.Generator().manual_seed(1)) * 1e-6
    output, leaves = passed(dtype)
    unread = torch.zeros(3, requires_grad=True)
    found, scale = scaled_gradients(output, gradient, [*leaves, unread], dtype)
    again, own = passed(dtype)
    again.backward(gradient.to(dtype))
    assert scale == 1
    assert found[-1] is None
    for got, leaf in zip(found, own, strict=False):
        assert leaf.grad is not None
        assert torch.equal(got, leaf.grad)  # type: ignore[arg-type]
