"""The same results from faster PyTorch calls, for the few operations in which PyTorch's own are slow on a CPU."""

import itertools
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

FEW = 8  # channels: one AVX register of fp32 numbers
SMALL_MAP = 4  # pixels of an output map up to which a matrix product beats oneDNN's convolution
MANY, LARGE_BATCH = 64, 32  # channels and images from which it does so in fp32, too


class Conv2d(nn.Conv2d):
    """`nn.Conv2d`; on a CPU, in bf16 or in training, a matrix product, where that beats oneDNN's convolution.

    Everywhere else it is `nn.Conv2d` itself, whose parameters and names it has. A 1×1 kernel with a stride, which only
    subsamples, does so before the convolution if channels are few: there oneDNN writes beyond its memory on CPUs with
    AVX2 only (torch 2.14, fewer than 8 channels in channels-last format), and the process dies.
    """

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        on_cpu = x.device.type == "cpu" and x.ndim == 4
        product = self.faster_product(x, dtype) if on_cpu else None
        pixelwise = self.kernel_size == (1, 1) and self.padding == (0, 0)
        if product is None and on_cpu and pixelwise and self.in_channels < FEW:
            x = x[:, :, :: self.stride[0], :: self.stride[1]]
            return F.conv2d(x, self.weight, self.bias, groups=self.groups)
        if product is None:
            return super().forward(x)
        out = product.apply(x.to(dtype), self.weight.to(dtype), self.stride[0], self.padding[0])
        return out if self.bias is None else out + self.bias.to(dtype).view(-1, 1, 1)

    def faster_product(self, x: Tensor, dtype: torch.dtype) -> type[torch.autograd.Function] | None:
        """Return what beats the convolution of N×C×H×W `x` in `dtype`; None: nothing does.

        MapProduct at stride 1 to a map of up to 2×2 pixels; PatchProduct with a stride to such a map, and in bf16 for a
        1×1 kernel, which only subsamples. In fp32 only in training: what is exported is the convolution itself.
        """
        square = self.kernel_size[0] == self.kernel_size[1] and self.stride[0] == self.stride[1]
        square = square and self.padding in [(n, n) for n in range(self.kernel_size[0])]
        if not square or self.groups > 1 or self.dilation != (1, 1) or self.padding_mode != "zeros":
            return None
        (kernel, _), (stride, _), (padding, _) = self.kernel_size, self.stride, self.padding
        sides = [out_side(side, kernel, stride, padding) for side in x.shape[2:]]
        if min(sides) < 1 or x.dtype == torch.float64:  # an error of PyTorch's, and what autocast leaves alone
            return None
        small = math.prod(sides) <= SMALL_MAP
        if dtype == torch.float32:
            worth_it = small and kernel > 1 and self.training and self.in_channels >= MANY
            worth_it = worth_it and len(x) >= LARGE_BATCH  # last: asked in an export, it would fix the number of images
        else:
            worth_it = dtype == torch.bfloat16 and (small or (kernel == 1 and stride > 1))
        if not worth_it:
            return None
        return MapProduct if small and stride == 1 else PatchProduct


def out_side(side: int, kernel: int, stride: int, padding: int) -> int:
    """Return the side of a convolution's output."""
    return (side + 2 * padding - kernel) // stride + 1


class MapProduct(torch.autograd.Function):
    """A convolution as the product of whole maps (rows) and one large matrix: no patches are cut.

    The matrix has a C×O block for each pair of a pixel of the input and one of the output. On a 2×2 map each such pair
    has its tap of a 3×3 kernel, while five of the nine taps of a patch lie in the padding.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        out_size = [out_side(length, weight.shape[2], stride, padding) for length in x.shape[2:]]
        out = as_rows(x) @ map_matrix(weight, x.shape[2:], stride, padding)  # N×(H'·W'·O)
        return out.unflatten(1, (*out_size, -1)).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        x, weight = ctx.saved_tensors
        (_, c, h, w), (o, _, side, _) = x.shape, weight.shape
        rows = as_rows(gradient)
        by_matrix = (as_rows(x).t() @ rows).view(h, w, c, *gradient.shape[2:], o)
        by_taps = by_matrix.new_zeros(side, side, c, o)
        for (y, to_y, i), (x_, to_x, j) in taps(x.shape[2:], side, ctx.stride, ctx.padding):
            by_taps[i, j] += by_matrix[y, x_, :, to_y, to_x]
        by_x = None
        if ctx.needs_input_grad[0]:
            by_x = rows @ map_matrix(weight, x.shape[2:], ctx.stride, ctx.padding).t()
            by_x = by_x.unflatten(1, (h, w, c)).permute(0, 3, 1, 2)
        return by_x, by_taps.permute(3, 2, 0, 1), None, None


def as_rows(x: Tensor) -> Tensor:
    """Return N×C×H×W as N×(H·W·C)."""
    return x.permute(0, 2, 3, 1).flatten(1)


def map_matrix(weight: Tensor, size: tuple[int, int], stride: int, padding: int) -> Tensor:
    """Return O×C×k×k kernels as the (H·W·C)×(H'·W'·O) matrix that convolves maps of `size` H×W."""
    out_channels, channels, side, _ = weight.shape
    out_size = [out_side(length, side, stride, padding) for length in size]
    matrix = weight.new_zeros(*size, channels, *out_size, out_channels)
    for (y, to_y, i), (x, to_x, j) in taps(size, side, stride, padding):
        matrix[y, x, :, to_y, to_x] = weight[:, :, i, j].t()
    return matrix.flatten(3).flatten(0, 2)


def taps(size: tuple[int, int], side: int, stride: int, padding: int) -> Iterator[tuple[tuple[int, int, int], ...]]:
    """Yield all that meet of (place in the input, place in the output, place in the kernel), a pair for both axes."""
    along = []
    for length in size:
        places = itertools.product(range(length), range(out_side(length, side, stride, padding)))
        met = ((place, out, place + padding - stride * out) for place, out in places)
        along.append([(place, out, tap) for place, out, tap in met if 0 <= tap < side])
    return itertools.product(*along)


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


class MaxPool2d(nn.MaxPool2d):
    """`nn.MaxPool2d`; in bf16 on a CPU the larger of neighbours, in runs of all channels, where it halves the sides.

    PyTorch writes an int64 index a maximum, and clears and scatters the gradient. Gradients are the same bits; second
    derivatives are not to be had there: take fp32 for them.
    """

    def forward(self, x: Tensor) -> Tensor:
        shape = (self.kernel_size, self.stride, self.padding, self.dilation, self.return_indices)
        halves = shape == (2, 2, 0, 1, False) and x.ndim == 4 and min(x.shape[2:]) > 1
        odd = x.shape[-2] % 2 or x.shape[-1] % 2
        if x.device.type != "cpu" or x.dtype != torch.bfloat16 or not halves or (odd and self.ceil_mode):
            return super().forward(x)
        return LargerOfNeighbours.apply(x)


class LargerOfNeighbours(torch.autograd.Function):
    """2×2 max pooling of N×C×H×W in channels-last format: of left and right, then of upper and lower.

    Of equal values the first takes the gradient, as in PyTorch; for that only the differences are kept. The last row or
    column of an odd number is in no window.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.sides = x.shape[2:]
        left, right = in_pairs(x.permute(0, 2, 3, 1)).unbind(3)  # N×H×W/2×C each
        upper, lower = torch.maximum(left, right).unflatten(1, (-1, 2)).unbind(2)  # N×H/2×W/2×C each
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(right - left, lower - upper)
        return torch.maximum(upper, lower).permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> Tensor:
        right_wins, lower_wins = ctx.saved_tensors  # where above zero
        n, c, h, w = gradient.shape
        by_rows, by_x = gradient.new_empty(n, h, 2, w, c), gradient.new_empty(n, *ctx.sides, c)
        split_gradient(gradient.permute(0, 2, 3, 1), lower_wins, by_rows, 2)
        split_gradient(by_rows.flatten(1, 2), right_wins, in_pairs(by_x), 3)
        by_x[:, 2 * h :] = 0
        by_x[:, :, 2 * w :] = 0
        return by_x.permute(0, 3, 1, 2)


def in_pairs(x: Tensor) -> Tensor:
    """Return the N×H×W/2×2×C pairs of neighbours along the rows of N×H×W×C, without an odd last row and column."""
    _, height, width, _ = x.shape
    return x[:, : height // 2 * 2, : width // 2 * 2].unflatten(2, (-1, 2))


def split_gradient(gradient: Tensor, second_wins: Tensor, out: Tensor, axis: int) -> None:
    """Write `gradient` along `axis` of `out`: to the second place where `second_wins` is above zero, else the first."""
    first, second = out.unbind(axis)
    torch.ops.aten.threshold_backward.grad_input(gradient, second_wins, 0, grad_input=second)
    torch.sub(gradient, second, out=first)


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


def undone(model: nn.Module) -> nn.Module:
    """Return `model` after its layers of this module became those of `torch.nn` that they are made of, in place."""
    for module in model.modules():
        if type(module).__module__ == __name__:
            module.__class__ = type(module).__base__  # Conv2d → nn.Conv2d, with all it holds
    return model


def random_bits(x: Tensor) -> Tensor:
    """Return uniform int16 numbers of the shape, and where that is dense the memory order, of `x`."""
    count = x.numel()
    bits = torch.empty(math.ceil(count / 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)[:count]
    return bits.as_strided(x.shape, x.stride()) if is_dense(x) else bits.view(x.shape)


def is_dense(x: Tensor) -> bool:
    """True if the values of N×C×H×W or N×C `x` fill one piece of memory, in the usual order or channels last."""
    return x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))
