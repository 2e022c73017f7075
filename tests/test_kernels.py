"""The fast paths compute what torch.nn computes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from utils import kernels

SHAPES = [(3, 5, 3, 1, 2), (3, 5, 3, 2, 4), (4, 6, 1, 2, 7), (4, 6, 1, 2, 8), (2, 3, 3, 2, 5), (2, 2, 5, 3, 9)]


@pytest.mark.parametrize(("fan_in", "fan_out", "kernel", "stride", "size"), SHAPES)
def test_patch_product_is_the_convolution(fan_in, fan_out, kernel, stride, size):
    """Outputs and both gradients against torch's, in float64; then first and second derivatives numerically."""
    torch.manual_seed(0)
    x = torch.randn(2, fan_in, size, size + 1, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(fan_out, fan_in, kernel, kernel, dtype=torch.float64, requires_grad=True)
    ours = kernels.PatchProduct.apply(x, weight, stride, kernel // 2)
    theirs = F.conv2d(x, weight, stride=stride, padding=kernel // 2)
    torch.testing.assert_close(ours, theirs)
    direction = torch.randn_like(theirs)
    for a, b in zip(*(torch.autograd.grad(out, (x, weight), direction) for out in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b)
    apply = lambda x, weight: kernels.PatchProduct.apply(x, weight, stride, kernel // 2)  # noqa: E731
    small = (x[:1].detach().requires_grad_(), weight)
    assert torch.autograd.gradcheck(apply, small)
    assert torch.autograd.gradgradcheck(apply, small)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("kernel", "stride", "size"), [(3, 1, 2), (3, 2, 4), (1, 2, 14), (3, 1, 14)])
def test_layer_is_torchs_layer_in_bf16(bias, kernel, stride, size):
    """To the rounding of bf16 (8 bits), with the same names of weights, in the same memory format."""
    torch.manual_seed(0)
    ours = kernels.Conv2d(16, 32, kernel, stride, padding=kernel // 2, bias=bias)
    theirs = nn.Conv2d(16, 32, kernel, stride, padding=kernel // 2, bias=bias)
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(8, 16, size, size).to(memory_format=torch.channels_last)
    results = []
    for layer in (ours, theirs):
        x = images.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(x)
        out.float().square().mean().backward()
        assert out.dtype == torch.bfloat16
        assert out.is_contiguous(memory_format=torch.channels_last)
        results.append([out.float(), x.grad, layer.weight.grad, *([layer.bias.grad] if bias else [])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=2**-6, atol=2**-6 * b.abs().max().item())


def test_other_precisions_take_torchs_own_path(monkeypatch):
    monkeypatch.setattr(kernels, "PatchProduct", None)
    layer = kernels.Conv2d(2, 2, 3, padding=1)
    assert layer(torch.randn(1, 2, 2, 2)).shape == (1, 2, 2, 2)
    assert layer.double()(torch.randn(1, 2, 2, 2).double()).dtype == torch.float64
