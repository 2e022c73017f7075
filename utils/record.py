"""A network and an optimizer for a record: CIFAR-10 in minutes on two cores, with the ideas of airbench94.

    network = record.network(images, RecordConfig(), recipe)
    train.fit(network, images, recipe, optimizer=record.optimizer)

Of Jordan 2024 (https://github.com/KellerJordan/cifar10-airbench) are: a frozen first layer that whitens, whose biases
learn for a share of the run, wide convolutions of stride 1 with pooling in between, Muon, flips that alternate,
test-time views. Smaller images for a share of the run are progressive resizing (Howard 2018, in fast.ai's entry to
DAWNBench).
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils import data, device, kernels
from utils.data import ImageData
from utils.muon import Muon
from utils.train import Recipe

WHITENED = 5_000  # images whose patches are whitened
SGD_LR = 0.0015  # of the convolutions, without Muon, times the images of a batch
LARGE_MAP = 16  # pixels a side above which padding apart takes as long as the last row and column
RECIPE = Recipe(
    epochs=10,
    batch_size=1000,
    lr=0.2,
    warmup=0.02,
    momentum=0.6,
    weight_decay=2e-6 * 1000,
    label_smoothing=0.2,
    ema=0.95,
    crop_padding=2,
    alternate=True,
)


@dataclass(frozen=True)
class RecordConfig:
    """What makes the network and its training fast; each field is one idea, and can be left out."""

    widths: tuple[int, ...] = (64, 256, 320)
    whiten: bool = True  # else the first layer is learned, like all others
    bias_share: float = 0.1  # of the run, in which a first layer that whitens learns its biases; 1: to the end
    muon: bool = True  # else SGD
    small: int = 24  # side of the images at the beginning; 0: none is made smaller
    small_share: float = 0.65  # of the run, on images of that size


class RecordNet(nn.Module):
    """N×C×H×W images to N×num_classes logits, by wide convolutions of stride 1.

    2×2 whitening → GELU, then for each width conv → pool → norm → GELU → conv → norm → GELU, and a linear head. While
    training it makes the images of the first `small_steps` batches smaller: their shorter side `config.small` pixels,
    where that is longer. The first layer learns, what of it is not frozen, from the first `bias_steps` batches.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        config: RecordConfig,
        small_steps: int = 0,
        bias_steps: float = math.inf,
    ) -> None:
        super().__init__()
        self.config, self.bias_steps = config, bias_steps
        self.unused_parameters = bias_steps < math.inf  # at some steps: for `parallel.wrap`
        self.small_steps = small_steps if config.small else 0
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))  # so that a resumed run goes on with it
        self.taken: int | None = None  # `step` as a Python number, for which no GPU has to wait; None: not yet known
        self.register_load_state_dict_post_hook(forget)
        patch = 4 * in_channels
        self.whiten = kernels.Conv2d(in_channels, 2 * patch, 2)
        blocks, fan_in = [], 2 * patch
        for fan_out in config.widths:
            blocks += [conv(fan_in, fan_out, EvenConv2d), kernels.MaxPool2d(2), norm(fan_out), nn.GELU()]
            blocks += [conv(fan_out, fan_out), norm(fan_out), nn.GELU()]
            fan_in = fan_out
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(fan_in, num_classes, bias=False)
        nn.init.normal_(self.head.weight)  # for logits divided by their number of inputs

    def forward(self, images: Tensor) -> Tensor:
        scale = self.config.small / min(images.shape[2:])
        small, learns = self.counted() if self.training else (False, True)
        if small and scale < 1:
            size = [round(scale * side) for side in images.shape[2:]]
            smaller = F.interpolate(images.float(), size, mode="bilinear", antialias=True)
            images = smaller.to(images.dtype, memory_format=device.memory_format(images.device))
        first = F.gelu(self.whiten(images))
        maps = self.blocks(first if learns else first.detach())  # N×W×h×w; detached, the way back is shorter
        return self.head(maps.amax((2, 3))) / self.head.in_features

    @torch.compiler.disable  # a number that is another one at each step: code compiled with it would be compiled anew
    def counted(self) -> tuple[bool, bool]:
        """Count a step; return whether its images are to be made smaller, and whether its first layer learns."""
        self.taken = int(self.step) if self.taken is None else self.taken
        self.taken += 1
        self.step += 1
        return self.taken <= self.small_steps, self.taken <= self.bias_steps


def forget(network: RecordNet, _: Any) -> None:
    """What `network` knows of its steps may be of another one, whose state it has just taken over."""
    network.taken = None


class EvenConv2d(kernels.Conv2d):
    """A 3×3 convolution (stride 1, padding 1) in front of a 2×2 pooling: of an odd map it leaves out the last line.

    The pooling would drop it. So the map is not padded on that side, where the line left out takes the place of the
    zeros: 13 % less to compute on a map of 15×15 pixels, 27 % less on one of 7×7, and what is pooled is the same. On a
    CPU, and for maps of up to LARGE_MAP pixels a side; beyond, or elsewhere, it is `kernels.Conv2d` itself.
    """

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        odd = height % 2 or width % 2
        if x.device.type != "cpu" or max(height, width) > LARGE_MAP or not odd:
            return super().forward(x)
        return F.conv2d(F.pad(x, (1, 1 - width % 2, 1, 1 - height % 2)), self.weight, self.bias)


def conv(fan_in: int, fan_out: int, kind: type[nn.Conv2d] = kernels.Conv2d) -> nn.Conv2d:
    """Return a 3×3 convolution that begins by handing on what comes in, beside what it draws."""
    layer = kind(fan_in, fan_out, 3, padding=1, bias=False)
    nn.init.dirac_(layer.weight.data[: min(fan_in, fan_out)])
    return layer


def norm(channels: int) -> nn.BatchNorm2d:
    """Return a batch norm that shifts but does not scale, and whose running statistics are of the last few batches."""
    layer = nn.BatchNorm2d(channels, eps=1e-12, momentum=0.4)
    layer.weight.requires_grad = False
    return layer


def network(images: ImageData, config: RecordConfig, recipe: Recipe) -> RecordNet:
    """Return the network for `images`, its first layer whitening their 2×2 patches; draws from torch's generator.

    Raises ValueError for images that are too small to be halved once a width, also when they are made smaller.
    """
    least, (height, width) = 2 ** len(config.widths) + 1, images.image_size
    if min(height, width) < least:
        what = f"images of {height}×{width} pixels: the record's network takes {least}×{least} or more"
        raise ValueError(f"{what}; enlarge them (--size {least})")
    if config.small and config.small < least:
        raise ValueError(f"small={config.small}: expected at least {least} pixels, or 0: no image is made smaller")
    steps = recipe.epochs * (len(images.train) // recipe.batch_size)
    small, learned = (round(share * steps) * recipe.accumulate for share in (config.small_share, config.bias_share))
    learned = learned if config.whiten and config.bias_share < 1 else math.inf
    net = RecordNet(images.in_channels, images.num_classes, config, small, learned)
    if config.whiten:
        stats = data.input_stats(images.train.images, recipe.input_norm)
        some = images.train.images[:: max(1, len(images.train) // WHITENED)]  # a folder comes sorted by class
        filters = whitening(data.normalize(some, stats))
        net.whiten.weight.data.copy_(filters)
        net.whiten.weight.requires_grad = False
    return net


def whitening(images: Tensor, size: int = 2, eps: float = 5e-4) -> Tensor:
    """Return the 2K×C×size×size filters whose first K outputs on N×C×H×W `images`, of mean 0 as the data set
    normalized has it, are uncorrelated, of variance 1.

    K = C·size². They are the principal directions of the patches, each divided by the root of its variance (plus
    `eps`), and the same with the sign turned, since an activation follows that cuts off negative values.
    """
    total, count = 0.0, 0
    for part in images.split(500):  # all patches at once would be 100 times the bytes of the pixels
        patches = part.unfold(2, size, 1).unfold(3, size, 1)  # n×C×h×w×size×size
        rows = patches.permute(0, 2, 3, 1, 4, 5).reshape(-1, images.shape[1] * size**2).double()  # patches × K
        total, count = total + rows.t() @ rows, count + len(rows)
    variances, directions = torch.linalg.eigh(total / count)
    filters = (directions / (variances + eps).sqrt()).t().reshape(-1, images.shape[1], size, size)
    return torch.cat([filters, -filters]).float()


def optimizer(model: RecordNet, recipe: Recipe) -> torch.optim.Optimizer:
    """Return Muon for the convolutions and SGD for biases and head, or SGD for all; for `train.fit`.

    The rates are airbench94's, for a mean instead of a sum over the batch; Muon has the recipe's.
    """
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    convolutions = [weight for weight in trained.values() if weight.ndim == 4]
    biases = [weight for weight in trained.values() if weight.ndim == 1]
    sgd_lr, biases_lr, head_lr = (rate * recipe.batch_size for rate in (SGD_LR, 0.053, 0.67))
    decay = recipe.weight_decay
    if model.config.muon:
        moved = {"orthogonal": True, "weight_decay": 0.0, "normalized": True, "steps": 3}
    else:
        moved = {"lr": sgd_lr, "weight_decay": decay / sgd_lr, "momentum": 0.85}
    groups = [
        {"params": convolutions, **moved},
        {"params": biases, "lr": biases_lr, "weight_decay": decay / biases_lr, "momentum": 0.85},
        {"params": [model.head.weight], "lr": head_lr, "weight_decay": decay / head_lr, "momentum": 0.85},
    ]
    return Muon(groups, recipe.lr, recipe.momentum)
