"""The network under study: four layers of residual blocks, every decision in it one field of its configuration."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from utils.kernels import Conv2d, Dropout, MaxPool2d

ACTIVATIONS = {"relu": nn.ReLU, "leaky_relu": nn.LeakyReLU, "silu": nn.SiLU, "gelu": nn.GELU, "tanh": nn.Tanh}
NORMS = ("batch", "layer", "group", "none")
PLACES = ("none", "head", "everywhere", "channels")
POOLS = ("max", "average", "stride")
GROWTHS = {"double": 2, "quadruple": 4, "constant": 1, "flat": 1}  # channels of a layer for one of the layer before
INITS = ("he", "xavier", "default")
NUM_LAYERS = 4
MIN_SIZE = 8
MAX_DEPTH, MAX_WEIGHTS = 1000, 10**9  # far more than the course needs: 2002 layers, 4 GB
MAX_GAIN = 1000  # products of far larger weights are not finite in fp32


def option(default, text: str):
    """Return a dataclass field with its `default` and the one line that `python cnn.py --help` shows for it."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class CNNConfig:
    """Every decision inside `CNN`. An ablation is one changed field. Raises ValueError that names the field."""

    in_channels: int = option(1, "channels of the input: 1 grey, 3 colour")
    num_classes: int = option(10, "classes to tell apart")
    width: int = option(32, "channels of the first layer; growth says how they go on")
    growth: str = option(
        "double",
        "from layer to layer the channels double, quadruple or stay constant while the image halves; flat: both stay",
    )
    depth: int = option(4, "residual blocks of two 3×3 convolutions, spread over the four layers")
    residual: bool = option(True, "add each block's input to its output (He et al. 2015)")
    norm: str = option("batch", "normalization: batch, layer, group or none")
    dropout: float = option(0.0, "share of values that dropout sets to zero")
    dropout_where: str = option(
        "none",
        "where dropout acts: none, head, everywhere (in each block, and the head), or channels (of whole maps)",
    )
    init: str | float = option("he", "initial weights: he, xavier, default (PyTorch's), or the gain as a number")
    scale_residual: bool = option(True, "start a layer's n residual branches at 1/n, so that any depth trains")
    pool: str = option("max", "how the stem halves the image: max, average or stride (a strided convolution)")
    pool_everywhere: bool = option(False, "halve by pooling in every layer, not only in the stem")
    activation: str = option("relu", "non-linearity: " + ", ".join(ACTIVATIONS))

    def __post_init__(self) -> None:
        for name, least in {"in_channels": 1, "num_classes": 2, "width": 1, "depth": NUM_LAYERS}.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}={value!r}: expected a whole number (int) of at least {least}")
        if self.depth > MAX_DEPTH:
            raise ValueError(f"depth={self.depth}: expected at most {MAX_DEPTH} blocks")
        for name in ("residual", "scale_residual", "pool_everywhere"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r}: expected True or False")
        choices = {"growth": tuple(GROWTHS), "norm": NORMS, "dropout_where": PLACES, "pool": POOLS}
        choices |= {"activation": tuple(ACTIVATIONS)}
        for name, allowed in choices.items():
            if not is_word(getattr(self, name), allowed):
                raise ValueError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(allowed)}")
        if not is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout!r}: expected a rate from 0 up to, but not including, 1")
        if (self.dropout > 0) != (self.dropout_where != "none"):
            raise ValueError(
                f"dropout={self.dropout!r} with dropout_where={self.dropout_where!r}: give both a rate above 0 "
                "and a place (head, everywhere, channels), or neither"
            )
        if not is_word(self.init, INITS) and not (is_number(self.init) and 0 < self.init <= MAX_GAIN):
            words = ", ".join(INITS)
            raise ValueError(f"init={self.init!r}: choose one of {words}, or a gain above 0 and up to {MAX_GAIN}")
        if self.pool_everywhere and self.pool == "stride":
            raise ValueError("pool_everywhere=True with pool='stride': choose pool='max' or 'average' to pool with")
        if self.pool_everywhere and not self.halving:
            raise ValueError(f"pool_everywhere=True with growth={self.growth!r}: no layer halves the image to pool in")
        if self.weights > MAX_WEIGHTS:
            sizes = ", ".join(
                f"{name}={getattr(self, name)!r}" for name in ("in_channels", "num_classes", "width", "depth")
            )
            raise ValueError(
                f"{sizes}, growth={self.growth!r}: a network of more than {MAX_WEIGHTS:,} weights; expected fewer"
            )

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each of the four layers."""
        return tuple(self.width * GROWTHS[self.growth] ** layer for layer in range(NUM_LAYERS))

    @property
    def halving(self) -> bool:
        """True if each layer from the second on halves the image."""
        return self.growth != "flat"

    @property
    def blocks(self) -> tuple[int, ...]:
        """Blocks in each of the four layers: `depth`, spread evenly, the first layers taking the rest."""
        return tuple(self.depth // NUM_LAYERS + (layer < self.depth % NUM_LAYERS) for layer in range(NUM_LAYERS))

    @property
    def weights(self) -> int:
        """Weights of the 3×3 convolutions and of the head: nearly all that there are."""
        layers = zip((self.width, *self.channels), self.channels, self.blocks, strict=False)
        inner = sum(9 * fan_out * (fan_in + (2 * blocks - 1) * fan_out) for fan_in, fan_out, blocks in layers)
        return 9 * self.in_channels * self.width + inner + self.channels[-1] * self.num_classes

    @property
    def weighted_layers(self) -> int:
        """Convolutions on the main path plus the linear head, as the literature counts a network's layers."""
        return 2 * self.depth + 2


def is_number(value: object) -> bool:
    """True for a finite or infinite int or float; False for bool, NaN and everything else."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value  # NaN equals nothing


def is_word(value: object, allowed: Iterable[str]) -> bool:
    """True for one of the words that are `allowed`; False for another, and for what is no word."""
    return isinstance(value, str) and value in allowed


def norm_layer(kind: str, channels: int) -> nn.Module:
    """Return the normalization of N×C×H×W activations called `kind`.

    batch: Ioffe & Szegedy 2015. layer: over C×H×W of each image (Ba et al. 2016). group: Wu & He 2018, 8 groups where
    they divide.
    """
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    if kind == "none":
        return nn.Identity()
    return nn.GroupNorm(norm_groups(kind, channels), channels)


def norm_groups(kind: str, channels: int) -> int:
    """Return into how many groups "layer" or "group" norm divides the channels."""
    return 1 if kind == "layer" else math.gcd(8, channels)


def pool_layer(kind: str) -> nn.Module:
    """Return 2×2 pooling with stride 2; a side of odd length n gives (n + 1) / 2, as a strided convolution does."""
    return (MaxPool2d if kind == "max" else nn.AvgPool2d)(2, ceil_mode=True)


def block_dropout(config: CNNConfig) -> nn.Module:
    """Return the dropout between a block's convolutions (Zagoruyko & Komodakis 2016, "Wide residual networks").

    everywhere: of single values (Srivastava et al. 2014). channels: of whole maps (Tompson et al. 2015).
    """
    if config.dropout_where == "everywhere":
        return Dropout(config.dropout)
    return nn.Dropout2d(config.dropout) if config.dropout_where == "channels" else nn.Identity()


def conv(config: CNNConfig, fan_in: int, fan_out: int, kernel: int = 3, stride: int = 1) -> nn.Conv2d:
    """Return a convolution that keeps the size at stride 1.

    A norm behind it subtracts any bias, so only "none" has one.
    """
    return Conv2d(fan_in, fan_out, kernel, stride, padding=kernel // 2, bias=config.norm == "none")


class Stem(nn.Module):
    """3×3 convolution → 2×2 pooling → norm → activation: N×in_channels×H×W to N×width×H/2×W/2.

    Pooling stands *before* norm and activation, so that these touch a quarter of the values. Max pooling may be swapped
    with an activation that never decreases, and with a norm of fixed statistics and γ > 0; in training, the statistics
    are those of the pooled values.
    """

    def __init__(self, config: CNNConfig) -> None:
        super().__init__()
        strided = config.pool == "stride"
        self.conv = conv(config, config.in_channels, config.width, stride=2 if strided else 1)
        self.pool = nn.Identity() if strided else pool_layer(config.pool)
        self.norm = norm_layer(config.norm, config.width)
        self.activation = ACTIVATIONS[config.activation]()

    def forward(self, images: Tensor) -> Tensor:
        return self.activation(self.norm(self.pool(self.conv(images))))


class Block(nn.Module):
    """Two 3×3 convolutions, each with its norm, and around them the residual connection (He et al. 2015, figure 2).

    A layer's first block changes the channels from `fan_in` to `fan_out` and may `halve` the image: by stride 2, or by
    pooling under `pool_everywhere`. The shortcut is the identity where shapes agree, else a 1×1 convolution with its
    norm; without `residual` there is none.
    """

    def __init__(self, config: CNNConfig, fan_in: int, fan_out: int, halve: bool) -> None:
        super().__init__()
        pooled = halve and config.pool_everywhere
        stride = 2 if halve and not pooled else 1
        self.pool = pool_layer(config.pool) if pooled else nn.Identity()
        self.conv1 = conv(config, fan_in, fan_out, stride=stride)
        self.norm1 = norm_layer(config.norm, fan_out)
        self.activation1 = ACTIVATIONS[config.activation]()
        self.dropout = block_dropout(config)
        self.conv2 = conv(config, fan_out, fan_out)
        self.norm2 = norm_layer(config.norm, fan_out)
        self.activation2 = ACTIVATIONS[config.activation]()
        self.shortcut = None
        if config.residual and fan_in == fan_out and stride == 1:
            self.shortcut = nn.Identity()
        elif config.residual:
            projection = conv(config, fan_in, fan_out, kernel=1, stride=stride)
            self.shortcut = nn.Sequential(projection, norm_layer(config.norm, fan_out))

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(x)
        out = self.activation1(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(self.dropout(out)))
        if self.shortcut is not None:
            out = out + self.shortcut(x)
        return self.activation2(out)


class CNN(nn.Module):
    """The course network: stem, four layers, global average pooling, linear head.

    N×in_channels×H×W images, H and W at least 8, to N×num_classes logits. From the second on, each layer doubles the
    channels and halves the image (rounded up), unless `growth` says otherwise. `print(model)` gives its table.
    """

    def __init__(self, config: CNNConfig = CNNConfig()) -> None:
        super().__init__()
        seed = int(torch.randint(2**62, ()))  # before any layer takes as many random numbers as its shape needs
        self.config = config
        self.stem = Stem(config)
        self.layers = nn.ModuleList()
        fan_in = config.width
        for layer, fan_out in enumerate(config.channels):
            first = Block(config, fan_in, fan_out, halve=layer > 0 and config.halving)
            rest = [Block(config, fan_out, fan_out, halve=False) for _ in range(config.blocks[layer] - 1)]
            self.layers.append(nn.Sequential(first, *rest))
            fan_in = fan_out
        self.dropout = Dropout(config.dropout) if config.dropout > 0 else nn.Identity()
        self.head = nn.Linear(fan_in, config.num_classes)
        initialize(self, config.init, config.activation, seed)
        if config.residual and config.scale_residual:
            scale_residual_branches(self)

    def forward(self, images: Tensor) -> Tensor:
        check_images(images, self.config.in_channels)
        check_norm(images, self.config, self.training)
        x = self.stem(images)  # N×width×H/2×W/2
        for layer in self.layers:
            x = layer(x)
        x = x.mean(dim=(2, 3))  # N×channels of the last layer
        return self.head(self.dropout(x))  # N×num_classes

    def table(self, size: int = 28) -> str:
        """Return one line a part for an image of size × size: output shape, parameters, FLOPs, receptive field."""
        return table(self, size)

    def __repr__(self) -> str:
        return self.table()


def check_images(images: Tensor, in_channels: int) -> None:
    """Raise ValueError unless `images` is N×in_channels×H×W with sides of at least 8 pixels."""
    if images.ndim != 4 or images.shape[1] != in_channels:
        raise ValueError(
            f"images of shape {tuple(images.shape)}: expected N×{in_channels}×H×W (in_channels={in_channels})"
        )
    if min(images.shape[2:]) < MIN_SIZE:
        raise ValueError(
            f"images of {images.shape[2]}×{images.shape[3]} pixels: the network halves them up to four times and takes "
            f"{MIN_SIZE}×{MIN_SIZE} or more; enlarge them (--size {MIN_SIZE})"
        )


def check_norm(images: Tensor, config: CNNConfig, training: bool) -> None:
    """Raise ValueError where a norm would see a single number at a time: less its mean, it is 0, whatever comes in."""
    n, _, *sides = images.shape
    if config.norm == "none" or (config.norm == "batch" and not training):
        return
    for layer, channels in enumerate(config.channels, start=1):
        pixels = math.prod(math.ceil(side / 2 ** (layer if config.halving else 1)) for side in sides)
        if config.norm == "batch":
            numbers, what = n * pixels, "one image at a time is"
            remedy = "a batch_size of at least 2 × accumulate × processes"
        else:
            numbers = channels * pixels // norm_groups(config.norm, channels)
            what, remedy = f"{channels} channels are", "more --width"
        if numbers == 1:
            raise ValueError(
                f"images of {sides[0]}×{sides[1]} leave one value a channel in layer {layer}, and {what} too little "
                f"for {config.norm} norm: expected larger images (--size 32), another norm, or {remedy}"
            )


def initialize(model: nn.Module, init: str | float, activation: str = "relu", seed: int = 0) -> None:
    """Draw the weights of `model`, each layer's from its own generator, of `seed` and the layer's name.

    So two networks of one seed differ only where their configurations do: a layer that both have, of the same shape,
    starts from the same draw. A gain g means a standard deviation of g / √fan_in.
    he: g = √2, right for ReLU (He et al. 2015, "Delving deep"), or the activation's own (`nn.init.calculate_gain`).
    xavier: variance 2 / (fan_in + fan_out) (Glorot & Bengio 2010). default: PyTorch's `kaiming_uniform_(a=√5)`, g =
    1/√3. Biases start at zero but for "default"; the head stays as PyTorch draws it, so that it is the same in every
    variant.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed ^ zlib.crc32(name.encode()))
                module.reset_parameters()  # PyTorch's default
                if isinstance(module, nn.Conv2d) and init != "default":
                    draw(module, init, activation)


def draw(layer: nn.Conv2d, init: str | float, activation: str) -> None:
    """Draw the weights of `layer` as `initialize` says for any `init` but "default"."""
    torch.default_generator.manual_seed(torch.initial_seed())  # the same normal draw, only scaled, for each of them
    if init == "xavier":
        nn.init.xavier_normal_(layer.weight)
    else:
        gain = he_gain(activation) if init == "he" else float(init)
        nn.init.normal_(layer.weight, std=gain / math.sqrt(layer.weight[0].numel()))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def scale_residual_branches(model: CNN) -> None:
    """Start each residual branch of a layer of n blocks at 1/n: in γ of its last norm, or in its last convolution.

    Unscaled, the branches add up along the layer, and a deep network diverges at learning rates that suit a shallow one
    (Hanin & Rolnick 2018; De & Smith 2020); scaled, all of them together weigh at most as much as one. A layer of one
    block is as it was.
    """
    for layer in model.layers:
        for block in layer:
            last = block.conv2 if isinstance(block.norm2, nn.Identity) else block.norm2
            with torch.no_grad():
                last.weight.div_(len(layer))
                if last is block.conv2 and last.bias is not None:  # PyTorch's initialization does not begin it at 0
                    last.bias.div_(len(layer))


def he_gain(activation: str) -> float:
    """Return the gain that keeps the second moment through `activation`; SiLU and GELU, near ReLU, take its √2."""
    return nn.init.calculate_gain(activation if activation in ("leaky_relu", "tanh") else "relu")


def table(model: CNN, size: int = 28) -> str:
    """Return the table that `print(model)` shows.

    FLOPs (2 × multiply-adds) are counted by `torch.utils.flop_counter`.
    """
    rows = list(parts(model, size))
    lines = [
        f"CNN: {model.config.weighted_layers} weighted layers, for an image of {model.config.in_channels}×{size}×{size}"
    ]
    lines.append(f"{'layer':<10}{'output shape':>16}{'parameters':>14}{'FLOPs':>16}{'receptive field':>18}")
    for name, shape, parameters, flops, field_size in rows:
        seen = f"{field_size}×{field_size}" if field_size else "whole image"
        lines.append(f"{name:<10}{'×'.join(map(str, shape)):>16}{parameters:>14,}{flops:>16,}{seen:>18}")
    lines.append(f"{'total':<10}{'':>16}{sum(row[2] for row in rows):>14,}{sum(row[3] for row in rows):>16,}")
    return "\n".join(lines)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Put `model` into evaluation mode while the block runs, and give the device that it is on.

    Afterwards each part is in the mode that it was in, whatever happened: a single one may be in another than the rest.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield next(model.eval().parameters()).device
    finally:
        for module, training in modes:
            module.training = training


def parts(model: CNN, size: int = 28) -> Iterator[tuple[str, tuple[int, ...], int, int, int]]:
    """Yield (name, output shape, parameters, FLOPs, receptive field in pixels; 0: all) of stem, layers, head."""
    from torch.utils.flop_counter import FlopCounterMode

    weight = next(model.parameters())
    shapes: dict[str, tuple[int, ...]] = {}
    named = {"stem": model.stem} | {f"layers.{i}": layer for i, layer in enumerate(model.layers)} | {"head": model.head}

    def remember(name: str):
        return lambda module, inputs, output: shapes.__setitem__(name, tuple(output.shape[1:]))

    hooks = [module.register_forward_hook(remember(name)) for name, module in named.items()]
    counter = FlopCounterMode(display=False)
    try:
        with evaluating(model), torch.no_grad(), counter:
            model(weight.new_zeros(1, model.config.in_channels, size, size))
    finally:
        for hook in hooks:
            hook.remove()
    fields = receptive_fields(model)
    for name, module in named.items():
        flops = sum(counter.get_flop_counts()[f"{type(model).__name__}.{name}"].values())
        parameters = sum(weight.numel() for weight in module.parameters())
        label = f"layer {int(name[-1]) + 1}" if name.startswith("layers") else name
        yield label, shapes[name], parameters, flops, fields.get(name, 0)


def receptive_fields(model: CNN) -> dict[str, int]:
    """Return the side, in pixels, of what one value after the stem and after each layer sees of the image.

    Along the main path each kernel of side k adds (k − 1) × the product of the strides before it (Araujo et al. 2019).
    """
    field_size, jump, fields = 1, 1, {}
    main_path = [("stem", [model.stem.conv, model.stem.pool])]
    for index, layer in enumerate(model.layers):
        main_path.append((f"layers.{index}", [m for block in layer for m in (block.pool, block.conv1, block.conv2)]))
    for name, modules in main_path:
        for module in modules:
            if not isinstance(module, nn.Identity):
                kernel, stride = side(module.kernel_size), side(module.stride)
                field_size, jump = field_size + (kernel - 1) * jump, jump * stride
        fields[name] = field_size
    return fields


def side(size: int | tuple[int, int]) -> int:
    """Return the side of a square kernel or stride, which torch keeps as an int or as a pair."""
    return size if isinstance(size, int) else size[0]
