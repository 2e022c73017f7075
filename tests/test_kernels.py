"""The fast paths compute what torch.nn computes."""

import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from utils import files, kernels

SHAPES = [(3, 5, 3, 1, 2), (3, 5, 3, 2, 4), (4, 6, 1, 2, 7), (4, 6, 1, 2, 8), (2, 3, 3, 2, 5), (2, 2, 5, 3, 9)]


@pytest.mark.parametrize("product", [kernels.PatchProduct, kernels.MapProduct])
@pytest.mark.parametrize(("fan_in", "fan_out", "kernel", "stride", "size"), SHAPES)
def test_products_are_the_convolution(fan_in, fan_out, kernel, stride, size, product):
    """Outputs and both gradients against torch's, in float64; then first and second derivatives numerically."""
    torch.manual_seed(0)
    x = torch.randn(2, fan_in, size, size + 1, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(fan_out, fan_in, kernel, kernel, dtype=torch.float64, requires_grad=True)
    ours = product.apply(x, weight, stride, kernel // 2)
    theirs = F.conv2d(x, weight, stride=stride, padding=kernel // 2)
    torch.testing.assert_close(ours, theirs)
    direction = torch.randn_like(theirs)
    for a, b in zip(*(torch.autograd.grad(out, (x, weight), direction) for out in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b)
    apply = lambda x, weight: product.apply(x, weight, stride, kernel // 2)  # noqa: E731
    small = (x[:1].detach().requires_grad_(), weight)
    assert torch.autograd.gradcheck(apply, small)
    assert torch.autograd.gradgradcheck(apply, small, fast_mode=True)  # along random directions


PRECISIONS = {torch.bfloat16: 2**-6, torch.float32: 1e-5}  # and what their rounding may make of a result


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("kernel", "stride", "size"), [(3, 1, 2), (3, 2, 4), (3, 1, 1), (1, 2, 14), (3, 1, 14)])
def test_layer_is_torchs_layer(bias, kernel, stride, size, dtype):
    """To rounding, with the same names of weights, in the same memory format."""
    torch.manual_seed(0)
    ours = kernels.Conv2d(64, 32, kernel, stride, padding=kernel // 2, bias=bias)
    theirs = nn.Conv2d(64, 32, kernel, stride, padding=kernel // 2, bias=bias)
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(32, 64, size, size).to(memory_format=torch.channels_last)
    results = []
    for layer in (ours, theirs):
        x = images.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = layer(x)
        out.float().square().mean().backward()
        assert out.dtype == dtype
        assert out.is_contiguous(memory_format=torch.channels_last)
        results.append([out.float(), x.grad, layer.weight.grad, *([layer.bias.grad] if bias else [])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=PRECISIONS[dtype], atol=PRECISIONS[dtype] * b.abs().max().item())


@pytest.mark.parametrize(
    ("change", "product"),
    [
        ({}, "MapProduct"),
        ({"stride": 2}, "PatchProduct"),
        ({"kernel": 1, "stride": 2}, None),  # in fp32 oneDNN's is as fast
        ({"size": 3}, None),
        ({"channels": 32}, None),
        ({"images": 16}, None),
        ({"training": False}, None),
        ({"dtype": torch.float64}, None),
    ],
)
def test_products_in_fp32_where_they_are_faster(change, product):
    case = {"kernel": 3, "stride": 1, "size": 2, "channels": 64, "images": 32, "training": True, "dtype": torch.float32}
    case |= change
    layer = kernels.Conv2d(case["channels"], 64, case["kernel"], case["stride"], padding=case["kernel"] // 2)
    x = torch.zeros(case["images"], case["channels"], case["size"] * case["stride"], 2 * case["stride"])
    found = layer.train(case["training"]).faster_product(x, case["dtype"])
    assert found is (product and getattr(kernels, product))


def test_a_map_smaller_than_the_kernel_is_pytorchs_error():
    with pytest.raises(RuntimeError, match="Kernel size can't be greater than actual input size"):
        kernels.Conv2d(4, 4, 3).bfloat16()(torch.randn(2, 4, 2, 4).bfloat16())


def test_autocast_leaves_doubles_alone():
    layer, x = kernels.Conv2d(16, 16, 3, padding=1).double(), torch.randn(2, 16, 2, 2).double()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), nn.Conv2d.forward(layer, x))


@pytest.mark.parametrize(
    "options", [{"dilation": 2}, {"groups": 2}, {"padding_mode": "reflect"}, {"padding": "same"}, {"stride": (1, 2)}]
)
def test_other_convolutions_take_torchs_own_path(options):
    layer = kernels.Conv2d(4, 4, 3, **({"padding": 1} | options)).bfloat16()
    x = torch.randn(2, 4, 2 if options.get("dilation") != 2 else 3, 3).bfloat16()
    assert layer.faster_product(x, x.dtype) is None
    assert torch.equal(layer(x), nn.Conv2d.forward(layer, x))


@pytest.mark.parametrize(("fan_in", "groups"), [(1, 1), (4, 1), (6, 2), (8, 1)])
def test_subsampling_of_few_channels_is_torchs_to_the_bit(fan_in, groups):
    x = torch.randn(16, fan_in, 14, 13).to(memory_format=torch.channels_last)
    layer = kernels.Conv2d(fan_in, 16, 1, 2, groups=groups)
    images, same = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, expected = layer(images), F.conv2d(same, layer.weight, layer.bias, 2, groups=groups)
    assert torch.equal(out, expected)
    gradients = [
        torch.autograd.grad(y.square().sum(), (of, layer.weight)) for y, of in ((out, images), (expected, same))
    ]
    assert torch.allclose(gradients[0][0], gradients[1][0])
    assert torch.allclose(gradients[0][1], gradients[1][1], atol=1e-4)


def test_narrow_networks_train_where_only_avx2_is_there():
    """There oneDNN's 1×1 convolution with a stride of fewer than 8 channels writes beyond its memory."""
    code = (
        "import torch; from utils.model import CNN, CNNConfig; torch.set_num_threads(1)\n"
        "net = CNN(CNNConfig(width=4)).to(memory_format=torch.channels_last)\n"
        "for _ in range(40): net(torch.randn(128, 1, 28, 28)).square().sum().backward()\n"
        "print('done')"
    )
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    run = subprocess.run([sys.executable, "-c", code], cwd=files.ROOT, env=environment, capture_output=True, text=True)
    assert run.stdout == "done\n", run.stderr


def test_other_precisions_take_torchs_own_path(monkeypatch):
    monkeypatch.setattr(kernels, "PatchProduct", None)
    monkeypatch.setattr(kernels, "MapProduct", None)
    layer = kernels.Conv2d(2, 2, 3, padding=1)
    assert layer(torch.randn(1, 2, 2, 2)).shape == (1, 2, 2, 2)
    assert layer.double()(torch.randn(1, 2, 2, 2).double()).dtype == torch.float64


# -------------------------------------------------------------------------------------------------------- max pooling


@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("sides", [(6, 10), (7, 10), (7, 11)])
def test_max_pooling_is_torchs_to_the_bit(memory_format, ceil_mode, sides):
    """Few different values, so that most windows have equal ones: the gradient goes to the same one of them."""
    torch.manual_seed(0)
    values = torch.randint(-2, 3, (8, 5, *sides)).bfloat16().to(memory_format=memory_format)
    results = []
    for pool in (kernels.MaxPool2d(2, ceil_mode=ceil_mode), nn.MaxPool2d(2, ceil_mode=ceil_mode)):
        x = values.clone().requires_grad_()
        out = pool(x)
        (gradient,) = torch.autograd.grad(
            out, x, torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
        )
        results.append((out, gradient))
        assert torch.equal(pool(values), out)
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_max_pooling_passes_nan_on():
    x = torch.ones(1, 1, 2, 2, dtype=torch.bfloat16)
    x[0, 0, 1, 0] = torch.nan
    assert kernels.MaxPool2d(2)(x).isnan().all()


@pytest.mark.parametrize("options", [{"kernel_size": 3, "stride": 2}, {"kernel_size": 2, "padding": 1}])
def test_other_max_pooling_takes_torchs_own_path(monkeypatch, options):
    monkeypatch.setattr(kernels, "LargerOfNeighbours", None)
    x = torch.randn(2, 3, 6, 6).bfloat16()
    assert torch.equal(kernels.MaxPool2d(**options)(x), nn.MaxPool2d(**options)(x))
    assert kernels.MaxPool2d(2, ceil_mode=True)(x[..., :5]).shape == (2, 3, 3, 3)
    assert kernels.MaxPool2d(2)(x.float()).dtype == torch.float32


# ------------------------------------------------------------------------------------------------------------ dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_drops_its_share_and_scales_the_rest(p, dtype):
    """The number of zeros is binomial: within five standard deviations; what is kept is 1 / (1 − p), as torch's is."""
    torch.manual_seed(0)
    layer, n = kernels.Dropout(p), 64 * 8 * 14 * 14
    x = torch.ones(64, 8, 14, 14, dtype=dtype).to(memory_format=torch.channels_last).requires_grad_()
    out = layer(x)
    kept = out != 0
    assert abs(kept.sum().item() - n * (1 - p)) < 5 * math.sqrt(n * p * (1 - p))
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=torch.channels_last)
    tolerance = {"rtol": 2**-7 if dtype == torch.bfloat16 else 1e-4, "atol": 0}
    torch.testing.assert_close(out[kept], torch.full_like(out[kept], 1 / (1 - p)), **tolerance)
    out.sum().backward()
    assert torch.equal(x.grad, out)  # the same mask on the way back


def test_dropout_is_independent_in_place_and_time():
    """Neighbours along each axis, and two draws, agree as often as coins do: (1 − p)² + p²."""
    torch.manual_seed(0)
    layer = kernels.Dropout(0.3)
    x = torch.ones(64, 8, 14, 14)
    first, second = layer(x) != 0, layer(x) != 0
    pairs = {axis: (first.narrow(axis, 0, 7), first.narrow(axis, 1, 7)) for axis in range(4)} | {
        "time": (first, second)
    }
    for what, (a, b) in pairs.items():
        n, expected = a.numel(), 0.3**2 + 0.7**2
        assert abs((a == b).float().mean().item() - expected) < 5 / (2 * math.sqrt(n)), what


def test_dropout_repeats_with_the_seed_and_not_without():
    layer, x = kernels.Dropout(0.5), torch.ones(1000)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(layer(x))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_dropout_elsewhere_is_torchs_own():
    """In evaluation nothing changes; rates of 0 and 1 too; a bad rate is refused as nn.Dropout refuses it."""
    x = torch.randn(4, 6)
    assert torch.equal(kernels.Dropout(0.5).eval()(x), x)
    assert torch.equal(kernels.Dropout(0.0)(x), x)
    assert torch.equal(kernels.Dropout(1.0)(x), torch.zeros_like(x))
    assert kernels.Dropout(0.99999)(x).isfinite().all()
    with pytest.raises(ValueError, match="between 0 and 1"):
        kernels.Dropout(1.5)
    assert kernels.Dropout(0.5)(torch.ones(0, 3)).shape == (0, 3)
    strided = torch.ones(64, 64)[:, ::2]
    assert kernels.Dropout(0.5)(strided).mean().item() == pytest.approx(1, abs=0.15)
