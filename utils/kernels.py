"""The same results from faster PyTorch calls, for the few operations in which PyTorch's own are slow on a CPU."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALL_MAP = 4  # pixels of an output map up to which a product of patches beats oneDNN's convolution


class Conv2d(nn.Conv2d):
    """`nn.Conv2d` with square kernels; in bf16 on a CPU a matrix product, where that beats oneDNN's convolution.

    Everywhere else it is `nn.Conv2d` itself, whose parameters and names it has.
    """

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        if x.device.type != "cpu" or dtype != torch.bfloat16 or not self.is_faster_as_product(x):
            return super().forward(x)
        out = PatchProduct.apply(x.to(dtype), self.weight.to(dtype), self.stride[0], self.padding[0])
        return out if self.bias is None else out + self.bias.to(dtype).view(-1, 1, 1)

    def is_faster_as_product(self, x: Tensor) -> bool:
        """True for 1×1 kernels with a stride, which only subsample, and for output maps of up to 2×2 pixels."""
        (kernel, _), (stride, _), (padding, _) = self.kernel_size, self.stride, self.padding
        height, width = ((side + 2 * padding - kernel) // stride + 1 for side in x.shape[2:])
        return height * width <= SMALL_MAP or (kernel == 1 and stride > 1)


class PatchProduct(torch.autograd.Function):
    """A convolution as the product of all patches (rows) and all kernels (columns), in channels-last format."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        patches = cut_patches(x, weight.shape[2], stride, padding)  # N×H'×W'×(k·k·C)
        return rows_times(patches, as_matrix(weight)).permute(0, 3, 1, 2)  # N×O×H'×W'

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        side = weight.shape[2]
        gradient = gradient.permute(0, 2, 3, 1)  # N×H'×W'×O
        patches = cut_patches(x, side, ctx.stride, ctx.padding)
        by_weight = patches.flatten(0, 2).t() @ gradient.flatten(0, 2)  # (k·k·C)×O
        by_weight = by_weight.unflatten(0, (side, side, -1)).permute(3, 2, 0, 1)
        by_x = None
        if ctx.needs_input_grad[0]:
            by_x = add_patches(rows_times(gradient, as_matrix(weight).t()), x.shape, side, ctx.stride, ctx.padding)
        return by_x, by_weight, None, None


def rows_times(values: Tensor, matrix: Tensor) -> Tensor:
    """Return N×H×W×K `values` @ K×O `matrix` as one product; `@` itself may make N of them, each with its own copy."""
    return (values.flatten(0, 2) @ matrix).unflatten(0, values.shape[:3])


def as_matrix(weight: Tensor) -> Tensor:
    """Return O×C×k×k kernels as a (k·k·C)×O matrix."""
    return weight.permute(2, 3, 1, 0).flatten(0, 2)


def cut_patches(x: Tensor, side: int, stride: int, padding: int) -> Tensor:
    """Return the side × side patches of N×C×H×W activations, every `stride` pixels, as N×H'×W'×(side·side·C)."""
    x = F.pad(x.permute(0, 2, 3, 1), (0, 0, padding, padding, padding, padding))
    return x.unfold(1, side, stride).unfold(2, side, stride).permute(0, 1, 2, 4, 5, 3).flatten(3)


def add_patches(patches: Tensor, shape: torch.Size, side: int, stride: int, padding: int) -> Tensor:
    """Return N×C×H×W activations of `shape` in which every patch of `cut_patches` is added where it was cut."""
    n, channels, height, width = shape
    rows, columns = patches.shape[1:3]
    patches = patches.unflatten(3, (side, side, channels))
    total = patches.new_zeros(n, height + 2 * padding, width + 2 * padding, channels)
    for i in range(side):
        for j in range(side):
            total[:, i : i + stride * rows : stride, j : j + stride * columns : stride] += patches[:, :, :, i, j]
    return total[:, padding : padding + height, padding : padding + width].permute(0, 3, 1, 2)


class Dropout(nn.Dropout):
    """`nn.Dropout` (Srivastava et al. 2014); in training on a CPU its random numbers are drawn four at a time.

    PyTorch draws 64 random bits a value, on one core. 16 do: the rate is `p` to within 1/131072, and what is kept is
    divided by the share that is really kept. Raises ValueError for a rate outside 0 to 1, as `nn.Dropout` does.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or not self.training or not 0 < self.p < 1:
            return super().forward(x)
        dropped = min(round(self.p * 2**16), 2**16 - 1)
        return x * random_bits(x).ge_(dropped - 2**15).to(x.dtype).mul_(2**16 / (2**16 - dropped))


def random_bits(x: Tensor) -> Tensor:
    """Return uniform int16 numbers of the shape, and where that is dense the memory order, of `x`."""
    count = x.numel()
    bits = torch.empty(math.ceil(count / 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)[:count]
    return bits.as_strided(x.shape, x.stride()) if is_dense(x) else bits.view(x.shape)


def is_dense(x: Tensor) -> bool:
    """True if the values of N×C×H×W or N×C `x` fill one piece of memory, in the usual order or channels last."""
    return x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))
