"""A network and an optimizer for a record: CIFAR-10 in minutes on two cores, with the ideas of airbench94.

    network = record.network(images, RecordConfig(), recipe)
    train.fit(network, images, recipe, optimizer=record.optimizer)

Of Jordan 2024 (https://github.com/KellerJordan/cifar10-airbench) are: a frozen first layer that whitens, wide
convolutions of stride 1 with pooling in between, Muon, flips that alternate, test-time views. Smaller images for a
share of the run are progressive resizing (Howard 2018, in fast.ai's entry to DAWNBench).
"""

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
SGD_LR = 3.0  # of the convolutions, without Muon
RECIPE = Recipe(
    epochs=9,
    batch_size=2000,
    lr=0.24,
    warmup=0.02,
    momentum=0.6,
    weight_decay=2e-6 * 2000,
    label_smoothing=0.2,
    ema=0.9,
    crop_padding=2,
    alternate=True,
)


@dataclass(frozen=True)
class RecordConfig:
    """What makes the network and its training fast; each field is one idea, and can be left out."""

    widths: tuple[int, ...] = (64, 256, 320)
    whiten: bool = True  # else the first layer is learned, like all others
    muon: bool = True  # else SGD
    small: int = 24  # side of the images at the beginning; 0: none is made smaller
    small_share: float = 0.7  # of the run, on images of that size


class RecordNet(nn.Module):
    """N×C×H×W images to N×num_classes logits, by wide convolutions of stride 1.

    2×2 whitening → GELU, then for each width conv → pool → norm → GELU → conv → norm → GELU, and a linear head. While
    training it makes the images of the first `small_steps` batches smaller: their shorter side `config.small` pixels,
    where that is longer.
    """

    def __init__(self, in_channels: int, num_classes: int, config: RecordConfig, small_steps: int = 0) -> None:
        super().__init__()
        self.config, self.small_steps = config, small_steps if config.small else 0
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))  # so that a resumed run goes on with it
        self.taken: int | None = None  # `step` as a Python number, for which no GPU has to wait; None: not yet known
        self.register_load_state_dict_post_hook(forget)
        patch = 4 * in_channels
        self.whiten = kernels.Conv2d(in_channels, 2 * patch, 2)
        blocks, fan_in = [], 2 * patch
        for fan_out in config.widths:
            blocks += [conv(fan_in, fan_out), kernels.MaxPool2d(2), norm(fan_out), nn.GELU()]
            blocks += [conv(fan_out, fan_out), norm(fan_out), nn.GELU()]
            fan_in = fan_out
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(fan_in, num_classes, bias=False)
        nn.init.normal_(self.head.weight)  # for logits divided by their number of inputs

    def forward(self, images: Tensor) -> Tensor:
        scale = self.config.small / min(images.shape[2:])
        if self.training and self.counted() and scale < 1:
            size = [round(scale * side) for side in images.shape[2:]]
            smaller = F.interpolate(images.float(), size, mode="bilinear", antialias=True)
            images = smaller.to(images.dtype, memory_format=device.memory_format(images.device))
        maps = self.blocks(F.gelu(self.whiten(images)))  # N×W×h×w
        return self.head(maps.amax((2, 3))) / self.head.in_features

    @torch.compiler.disable  # a number that is another one at each step: code compiled with it would be compiled anew
    def counted(self) -> bool:
        """Count a step, and return whether its images are to be made smaller."""
        self.taken = int(self.step) if self.taken is None else self.taken
        self.taken += 1
        self.step += 1
        return self.taken <= self.small_steps


def forget(network: RecordNet, _: Any) -> None:
    """What `network` knows of its steps may be of another one, whose state it has just taken over."""
    network.taken = None


def conv(fan_in: int, fan_out: int) -> nn.Conv2d:
    """Return a 3×3 convolution that begins by handing on what comes in, beside what it draws."""
    layer = kernels.Conv2d(fan_in, fan_out, 3, padding=1, bias=False)
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
    steps = round(config.small_share * recipe.epochs * (len(images.train) // recipe.batch_size))
    net = RecordNet(images.in_channels, images.num_classes, config, steps * recipe.accumulate)
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

    The rates are airbench94's, for a mean instead of a sum over the batch.
    """
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    convolutions = [weight for weight in trained.values() if weight.ndim == 4]
    biases = [weight for weight in trained.values() if weight.ndim == 1]
    biases_lr, head_lr, decay = 0.053 * recipe.batch_size, 0.67 * recipe.batch_size, recipe.weight_decay
    if model.config.muon:
        moved = {"orthogonal": True, "weight_decay": 0.0, "normalized": True, "steps": 3}
    else:
        moved = {"lr": SGD_LR, "weight_decay": decay / SGD_LR, "momentum": 0.85}
    groups = [
        {"params": convolutions, **moved},
        {"params": biases, "lr": biases_lr, "weight_decay": decay / biases_lr, "momentum": 0.85},
        {"params": [model.head.weight], "lr": head_lr, "weight_decay": decay / head_lr, "momentum": 0.85},
    ]
    return Muon(groups, recipe.lr, recipe.momentum)
