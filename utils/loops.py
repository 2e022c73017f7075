"""The training loops that `bench` compares, and what it compares them with; each returns images per second."""

import contextlib
import gzip
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import pandas as pd
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from utils import data, device, files, kernels, parallel, probes, record, train
from utils.model import CNN, CNNConfig, Stem
from utils.muon import Muon, fast_dtype

WIDE_IMAGE = (3, 32, 32)
AIRBENCH94_EPOCHS, AIRBENCH94_BATCH, AIRBENCH94_LR = 8, 2000, 0.24  # as published
PEAK_SIDE = 4096  # side of the square matrices whose product measures the peak
MESSAGES = tuple(2**power for power in range(8, 25, 2))  # bytes: 256 B to 16 MiB


@dataclass(frozen=True)
class Tricks:
    """What makes the usual loop the course's, one field a trick. The defaults are the usual loop: none of them."""

    in_memory: bool = False  # images are one tensor and augmented together; else a DataLoader, image by image
    no_item: bool = False  # loss and accuracy are summed as tensors; else `.item()` asks for both at every step
    channels_last: bool = False
    bf16: bool = False
    memory_kept: bool = False
    kernels: bool = False  # the layers of utils.kernels; else those of torch.nn
    pool_first: bool = False  # the stem pools before norm and activation; else behind them, as textbooks have it
    batch_size: int = 128


# The waterfall: each step adds one trick to all before it. The last two change the network, and the recipe.
WATERFALL = {
    "usual loop": {},
    "images in one tensor": {"in_memory": True},
    "no .item() a step": {"no_item": True},
    "channels last": {"channels_last": True},
    "bf16": {"bf16": True},
    "memory kept": {"memory_kept": True},
    "own kernels": {"kernels": True},
    "pool before norm": {"pool_first": True},
    "batches of 512": {"batch_size": 512},
}


def tricks_up_to(name: str) -> Tricks:
    """Return the tricks of the waterfall's step `name` and of all before it."""
    names = list(WATERFALL)
    changed = [WATERFALL[step] for step in names[: names.index(name) + 1]]
    return Tricks(**{field: value for step in changed for field, value in step.items()})


def without(tricks: Tricks, name: str) -> Tricks:
    """Return `tricks` but the one called `name`; with bf16 the own kernels go, too, most of which act in it only."""
    names = (name, "own kernels") if name == "bf16" and tricks.bf16 else (name,)
    return replace(tricks, **{field: getattr(Tricks, field) for name in names for field in WATERFALL[name]})


def with_tricks(tricks: Tricks, images: int, folder: str) -> float:
    """Return the images per second of a loop with these `tricks` over `images` images, getting them counted in.

    A first batch, for which memory is taken, is not counted, nor is giving it back. `folder` is where
    `lay_out_for_torchvision` has put the images.
    """
    _, batches, step = prepare(tricks, images, folder)
    with memory_of(tricks):
        step(*next(iter(batches)))
        device.synchronize(device.pick())
        begin, count = time.perf_counter(), 0
        for pixels, labels in batches:
            step(pixels, labels)
            count += len(labels)
        device.synchronize(device.pick())
        seconds = time.perf_counter() - begin
    return count / seconds


def seconds_to(accuracy: float, tricks: Tricks, folder: str, seed: int, most: int = 400_000) -> tuple[float, int]:
    """Return how many seconds, and on how many images, a loop with these `tricks` trains to a validation `accuracy`.

    The learning rate is constant, 0.4 for batches of 512, and for others in proportion (Goyal et al. 2017). Looking at
    1,000 validation images after every 1,024 is not counted. Raises RuntimeError when `most` images are not enough.
    """
    model, batches, step = prepare(tricks, 12_288, folder, seed)
    everything = data.load()
    stats, look = data.channel_stats(everything.train.images), everything.validation[:1000]
    seconds, count, begin = 0.0, 0, time.perf_counter()
    with memory_of(tricks):
        for pixels, labels in itertools.chain.from_iterable(itertools.repeat(batches)):
            step(pixels, labels)
            count += len(labels)
            if count % 1024 == 0:
                device.synchronize(device.pick())
                seconds += time.perf_counter() - begin
                if train.evaluate(model, look, stats)["accuracy"] >= accuracy:
                    return seconds, count
                if count >= most:
                    raise RuntimeError(f"below {accuracy:.0%} after {count} images: expected fewer to be enough")
                begin = time.perf_counter()
    raise RuntimeError("no images")


def learned(tricks: Tricks, seed: int, images: int, epochs: int = 4) -> float:
    """Return the validation accuracy that `train.fit` comes to with what these `tricks` change of the learning.

    That is the network, the precision, and batch size with a learning rate in proportion; the others do not matter.
    """
    torch.manual_seed(seed)
    recipe = train.Recipe(epochs=epochs, batch_size=tricks.batch_size, lr=0.4 * tricks.batch_size / 512, seed=seed)
    precision = "bf16" if tricks.bf16 else "fp32"
    history = train.fit(network_with(tricks), data.load().take(images), recipe, precision=precision, progress=False)
    return history.last("validation", "accuracy")


def prepare(
    tricks: Tricks, images: int, folder: str, seed: int = 0
) -> tuple[nn.Module, Iterable, Callable[[Tensor, Tensor], None]]:
    """Return the network, its batches, and the function that takes one training step on a batch."""
    where = device.pick()
    recipe = train.Recipe(batch_size=tricks.batch_size, lr=0.4 * tricks.batch_size / 512, seed=seed)
    torch.manual_seed(seed)
    memory_format = torch.channels_last if tricks.channels_last else torch.contiguous_format
    model = network_with(tricks).to(where, memory_format=memory_format)
    return model, batches_with(tricks, images, folder, recipe), make_step(model, tricks, recipe)


def network_with(tricks: Tricks) -> CNN:
    """Return the course's network, with the stem and the layers that `tricks` name."""
    model = CNN(CNNConfig())
    if not tricks.pool_first:
        late = TextbookStem(model.config)
        late.load_state_dict(model.stem.state_dict())
        model.stem = late
    return model if tricks.kernels else kernels.undone(model)


class TextbookStem(Stem):
    """Convolution → norm → activation → pooling: norm and activation touch four times the values."""

    def forward(self, images: Tensor) -> Tensor:
        return self.pool(self.activation(self.norm(self.conv(images))))


def batches_with(tricks: Tricks, images: int, folder: str, recipe: train.Recipe) -> Iterable:
    """Return the batches of an epoch, augmented: a DataLoader, or what lies in memory."""
    if not tricks.in_memory:
        return usual_loader(folder, images, recipe, workers=0)
    few, where = data.load().take(images), device.pick()
    precision = "bf16" if tricks.bf16 else "fp32"
    batches = train.training_batches(few, data.channel_stats(few.train.images), recipe, where, precision)
    batches.channels_last = tricks.channels_last
    return batches


def make_step(model: nn.Module, tricks: Tricks, recipe: train.Recipe) -> Callable[[Tensor, Tensor], None]:
    """Return the function that takes one training step, and keeps count of loss and accuracy as `tricks` say."""
    where, optimizer = device.pick(), train.make_optimizer(model, recipe)
    total, correct = (0.0, 0) if not tricks.no_item else torch.zeros(2, device=where)

    def step(pixels: Tensor, labels: Tensor) -> None:
        nonlocal total, correct
        pixels, labels = pixels.to(where), labels.to(where)
        optimizer.zero_grad()
        with device.autocast(where, "bf16" if tricks.bf16 else "fp32"):
            logits = model(pixels)
        loss = F.cross_entropy(logits.float(), labels)
        loss.backward()
        optimizer.step()
        hits = (logits.detach().argmax(1) == labels).sum()
        total = total + (loss.detach() if tricks.no_item else loss.item())
        correct = correct + (hits if tricks.no_item else hits.item())

    return step


def memory_of(tricks: Tricks) -> contextlib.AbstractContextManager:
    """Return the context in which freed memory is kept, if that is among the `tricks`."""
    return device.freed_memory_kept() if tricks.memory_kept else contextlib.nullcontext()


def talk(images: int, rounds: int, sizes: Sequence[int] = MESSAGES) -> dict[str, list]:
    """Return, measured in turn by the processes of a run (see `bench.run_together`), a list of `rounds` each:

    "messages": the seconds of an all-reduce of each of `sizes` bytes; "joined": the images per second of `train.fit` on
    `images` images, every batch shared; "muted": the same when each process takes what it has for what all have, so
    that they compute as before but say nothing.
    """
    torch.set_num_threads(parallel.threads())
    measured: dict[str, list] = {"messages": [], "joined": [], "muted": []}
    with parallel.join(torch.device("cpu")):
        for turn in range(rounds + 1):
            round_of = {"messages": [all_reduce_seconds(size) for size in sizes], "joined": course(images)}
            dist.barrier()
            with muted():
                round_of["muted"] = course(images)
            dist.barrier()
            for name, value in round_of.items() if turn else ():  # the first round warms up
                measured[name].append(value)
    return measured


def all_reduce_seconds(size: int, repeats: int = 30) -> float:
    """Return the mean time of an all-reduce of `size` bytes of float32 over the processes that have joined.

    The mean, not the median: now and then a process sleeps until it is woken, and a training step pays for that, too.
    """
    message, seconds = torch.zeros(size // 4), []
    for _ in range(repeats + 2):
        dist.barrier()
        begin = time.perf_counter()
        dist.all_reduce(message)
        seconds.append(time.perf_counter() - begin)
    return statistics.fmean(seconds[2:])


def muted() -> contextlib.AbstractContextManager:
    """Return the context in which processes share batches, but each takes its own numbers for those of all."""
    silent = {"gather": lambda tensor: [tensor] * dist.get_world_size(), "all_sum": torch.clone, "wrap": lambda m: m}
    return mock.patch.multiple(parallel, **silent)


def course(images: int, epochs: int = 1, **config: object) -> float:
    """Return the images per second of `train.fit` on `images` images, over all of `epochs`."""
    return speed_of(CNN(CNNConfig(**config)), training_images(images), train.Recipe(epochs=epochs))


def probed(images: int) -> float:
    """Return the images per second of `train.fit` when `Probes` record every tenth step."""
    model = CNN(CNNConfig())
    with probes.Probes(model, every=10):
        return speed_of(model, training_images(images), train.Recipe(epochs=1))


def wide(images: int) -> float:
    """Return the images per second of `train.fit` with `wide_network`, on noise."""
    return on_noise(wide_network(), WIDE_IMAGE, images)


def of_side(side: int, images: int) -> float:
    """Return the images per second of `train.fit` on noise of side × side pixels."""
    return on_noise(CNN(CNNConfig()), (1, side, side), images)


def on_noise(model: nn.Module, image: tuple[int, int, int], images: int) -> float:
    """Return the images per second of `train.fit` with `model`, on so many images C×H×W of noise."""
    return speed_of(model, noise(image, images), train.Recipe(epochs=1))


def noise(image: tuple[int, int, int], images: int) -> data.ImageData:
    """Return so many training images C×H×W of noise, and 500 of them for validation."""
    few = data.load()
    pixels = torch.randint(0, 256, (images, *image), dtype=torch.uint8)
    split = data.Split(pixels, torch.arange(images) % few.num_classes)
    return replace(few, train=split, validation=split[:500])


def record_run(side: int, steps: int = 4) -> float:
    """Return the images per second of `train.fit` with the record's network and recipe, on images made `side` wide.

    The first layer's biases do not learn here: in a run they do for a share of it. Nor do they in `airbench94_run`.
    """
    recipe = replace(record.RECIPE, epochs=1)
    images = noise(WIDE_IMAGE, steps * recipe.batch_size)
    always = 2.0  # the share of a run: also after the epoch that `speed_of` puts before
    config = record.RecordConfig(bias_share=0.0, small=side, small_share=always)
    return speed_of(record.network(images, config, recipe), images, recipe, record.optimizer)


def airbench94_run(steps: int = 2) -> float:
    """Return the images per second of airbench94's steps as they are published, for a CPU: `wide_network` in plain
    PyTorch, weights and images in bf16 (half precision there; fp32 on a CPU without instructions for bf16), batch norm
    in fp32, batches of AIRBENCH94_BATCH images, Muon; on noise. Without what the first layer's biases cost, which learn
    for three of its eight epochs."""
    dtype = fast_dtype(torch.device("cpu"))
    model = wide_network().to(dtype, memory_format=torch.channels_last)
    model[0].requires_grad_(False)  # it whitens
    for layer in model:
        if isinstance(layer, nn.BatchNorm2d):
            layer.float()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    groups = [{"params": [w for w in trained if w.ndim == 4], "orthogonal": True, "normalized": True, "steps": 3}]
    optimizer = Muon([*groups, {"params": [w for w in trained if w.ndim != 4]}], AIRBENCH94_LR)
    images = torch.randn(AIRBENCH94_BATCH, *WIDE_IMAGE).to(dtype, memory_format=torch.channels_last)
    labels = torch.arange(len(images)) % 10
    for turn in range(steps + 1):
        if turn == 1:  # the first one takes memory
            begin = time.perf_counter()
        F.cross_entropy(model(images), labels, label_smoothing=0.2).backward()
        optimizer.step()
        optimizer.zero_grad()
    return steps * len(images) / (time.perf_counter() - begin)


def on_threads(threads: int, images: int) -> float:
    """Return the images per second of `train.fit` on so many threads of this process."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return course(images)
    finally:
        torch.set_num_threads(before)


def speed_of(
    model: nn.Module, images: data.ImageData, recipe: train.Recipe, optimizer: Callable | None = None
) -> float:
    """Return the images per second of `train.fit` over the recipe's epochs, validation between them not counted.

    An epoch before them, in whose first step memory is taken, is not counted either: few steps are compared with many.
    """
    torch.manual_seed(recipe.seed)
    recipe = replace(recipe, epochs=recipe.epochs + 1)
    history = train.fit(model, images, recipe, progress=False, optimizer=optimizer)
    speeds = history.loc[history["metric"] == "images_per_second", "value"].iloc[1:]
    return len(speeds) / (1 / speeds).sum()  # all epochs have as many images


def training_images(count: int) -> data.ImageData:
    """Return Fashion-MNIST with `count` training images, the first ones again where there are no more."""
    images = data.load()
    validation = images.validation[:500]  # a look at them between epochs is not measured
    return replace(images, train=images.train[torch.arange(count) % len(images.train)], validation=validation)


def wide_network() -> nn.Module:
    """Return a network of wide 3×3 convolutions of stride 1 and max pooling, after airbench94 (Jordan 2024)."""
    layers: list[nn.Module] = [nn.Conv2d(3, 24, 2), nn.GELU()]
    for fan_in, fan_out in ((24, 64), (64, 256), (256, 256)):
        layers += [nn.Conv2d(fan_in, fan_out, 3, padding=1, bias=False), nn.MaxPool2d(2), nn.BatchNorm2d(fan_out)]
        layers += [nn.GELU(), nn.Conv2d(fan_out, fan_out, 3, padding=1, bias=False), nn.BatchNorm2d(fan_out), nn.GELU()]
    return nn.Sequential(*layers, nn.MaxPool2d(3), nn.Flatten(), nn.Linear(256, 10))


def usual_loader(
    folder: str, images: int, recipe: train.Recipe, workers: int, stats: data.ChannelStats | None = None
) -> DataLoader:
    """Return what tutorials build: torchvision's data set (in `folder`), transforms image by image, a DataLoader.

    `stats`: of the training images; they are computed where they are not known, as tutorials type them.
    """
    from torchvision import datasets, transforms

    stats = stats or data.channel_stats(data.load().train.images)
    steps = [
        transforms.RandomCrop(28, padding=recipe.crop_padding, padding_mode="reflect"),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(stats.mean, stats.std),
    ]
    whole = datasets.FashionMNIST(folder, train=True, transform=transforms.Compose(steps))
    own = (~data.for_validation(whole.targets)).nonzero()[:, 0].tolist()  # torchvision has our validation images, too
    part = torch.utils.data.Subset(whole, [own[place % len(own)] for place in range(images)])
    return DataLoader(part, recipe.batch_size, shuffle=True, num_workers=workers, drop_last=True)


def lay_out_for_torchvision(folder: Path) -> None:
    """Unpack the embedded files below `folder` to where torchvision's FashionMNIST looks for them."""
    raw = folder / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for packed in data.FASHION_MNIST.glob("*.gz"):
        (raw / packed.stem).write_bytes(gzip.decompress(packed.read_bytes()))


def usual(folder: str, images: int, workers: int, stats: data.ChannelStats | None = None) -> float:
    """Return the images per second of the loop that tutorials show: fp32, N×C×H×W in memory, `.item()` every step.

    The clock starts after the first step: the start of the DataLoader's workers and taking memory are not counted.
    """
    recipe, where = train.Recipe(epochs=1), device.pick()
    loader = usual_loader(folder, images, recipe, workers, stats)
    torch.manual_seed(recipe.seed)
    model = CNN(CNNConfig()).to(where)
    optimizer = train.make_optimizer(model, recipe)
    schedule = train.make_schedule(optimizer, recipe, len(loader))
    running_loss, correct, counted, begin = 0.0, 0, 0, None
    for pixels, labels in loader:
        pixels, labels = pixels.to(where), labels.to(where)
        optimizer.zero_grad()
        logits = model(pixels)
        loss = F.cross_entropy(logits, labels)
        loss.backward()
        optimizer.step()
        schedule.step()
        running_loss += loss.item()
        correct += (logits.argmax(1) == labels).sum().item()
        counted += len(labels) if begin else 0
        begin = begin or time.perf_counter()
    return counted / (time.perf_counter() - begin)


def command(runner: list[str], images: int) -> float:
    """Return the images per second of the second epoch of a run of `cnn.py` under `runner`: Python or `torchrun`."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--images", str(images), "--epochs", "2", "--no-test", "--out", folder]
        environment = os.environ | {"CNN_DEVICE": "cpu"}
        subprocess.run([*runner, "cnn.py", *options], cwd=files.ROOT, env=environment, check=True, capture_output=True)
        history = train.History(pd.read_csv(Path(folder) / "history.csv"))
        return history.last("train", "images_per_second")


def seconds_to_first_step() -> float:
    """Return the seconds from the command `python cnn.py` until its first step, weights updated, is done."""
    stop = "import os; from utils import train; train.tqdm.update = lambda *_: os._exit(0); import cnn; cnn.main()"
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        command = [sys.executable, "-c", stop, "train", "--out", folder]
        subprocess.run(command, cwd=files.ROOT, check=True, capture_output=True)
        return time.perf_counter() - begin


def matmul_peak(where: torch.device, precision: str, repeats: int = 5, side: int | None = None) -> float:
    """Return the FLOP/s of the best of `repeats` products of two side × side (4096) matrices in `precision`."""
    side = side or PEAK_SIDE
    a, b = (torch.randn(side, side, device=where, dtype=device.PRECISIONS[precision]) for _ in range(2))
    seconds = []
    for _ in range(repeats + 1):
        device.synchronize(where)
        begin = time.perf_counter()
        a @ b
        device.synchronize(where)
        seconds.append(time.perf_counter() - begin)
    return 2 * side**3 / min(seconds[1:])


def step_flops(network: nn.Module, image: tuple[int, int, int]) -> float:
    """Return the FLOPs (2 × multiply-adds) of training on one C×H×W image: forward and backward, as PyTorch counts.

    Counted on shapes alone (the meta device): nothing is calculated, and no memory is taken.
    """
    named = itertools.chain(network.named_parameters(), network.named_buffers())
    shapes = {name: value.detach().to("meta").requires_grad_(value.requires_grad) for name, value in named}
    with FlopCounterMode(display=False) as counter:
        torch.func.functional_call(network, shapes, torch.zeros(2, *image, device="meta")).sum().backward()
    return counter.get_total_flops() / 2
