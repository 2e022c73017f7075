"""The training loops that `bench` compares, and what it compares them with; each returns images per second."""

import gzip
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from utils import data, device, files, probes, train
from utils.model import CNN, CNNConfig

WIDE_IMAGE = (3, 32, 32)
PEAK_SIDE = 4096  # side of the square matrices whose product measures the peak


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
    noise = torch.randint(0, 256, (images, *WIDE_IMAGE), dtype=torch.uint8)
    few = data.load()
    split = data.Split(noise, torch.arange(images) % few.num_classes)
    return speed_of(wide_network(), replace(few, train=split, validation=split[:500]), train.Recipe(epochs=1))


def speed_of(model: nn.Module, images: data.ImageData, recipe: train.Recipe) -> float:
    """Return the images per second of `train.fit`, validation between epochs not counted."""
    torch.manual_seed(recipe.seed)
    history = train.fit(model, images, recipe, progress=False)
    speeds = history.loc[history["metric"] == "images_per_second", "value"]
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


def usual_loader(folder: str, images: int, recipe: train.Recipe, workers: int) -> DataLoader:
    """Return what tutorials build: torchvision's data set (in `folder`), transforms image by image, a DataLoader."""
    from torchvision import datasets, transforms

    stats = data.channel_stats(data.load().train.images)
    steps = [
        transforms.RandomCrop(28, padding=recipe.crop_padding, padding_mode="reflect"),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(stats.mean, stats.std),
    ]
    whole = datasets.FashionMNIST(folder, train=True, transform=transforms.Compose(steps))
    part = torch.utils.data.Subset(whole, range(images))
    return DataLoader(part, recipe.batch_size, shuffle=True, num_workers=workers, drop_last=True)


def lay_out_for_torchvision(folder: Path) -> None:
    """Unpack the embedded files below `folder` to where torchvision's FashionMNIST looks for them."""
    raw = folder / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for packed in data.FASHION_MNIST.glob("*.gz"):
        (raw / packed.stem).write_bytes(gzip.decompress(packed.read_bytes()))


def usual(folder: str, images: int, workers: int) -> float:
    """Return the images per second of the loop that tutorials show: fp32, N×C×H×W in memory, `.item()` every step.

    The clock starts with the first batch at hand: starting the DataLoader's workers is not counted.
    """
    recipe, where = train.Recipe(epochs=1), device.pick()
    loader = usual_loader(folder, images, recipe, workers)
    torch.manual_seed(recipe.seed)
    model = CNN(CNNConfig()).to(where)
    optimizer = train.make_optimizer(model, recipe)
    schedule = train.make_schedule(optimizer, recipe, len(loader))
    running_loss, correct, total, begin = 0.0, 0, 0, None
    for pixels, labels in loader:
        begin = begin or time.perf_counter()
        pixels, labels = pixels.to(where), labels.to(where)
        optimizer.zero_grad()
        logits = model(pixels)
        loss = F.cross_entropy(logits, labels)
        loss.backward()
        optimizer.step()
        schedule.step()
        running_loss += loss.item()
        correct += (logits.argmax(1) == labels).sum().item()
        total += len(labels)
    return total / (time.perf_counter() - begin)


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


def matmul_peak(where: torch.device, precision: str, repeats: int = 5) -> float:
    """Return the FLOP/s of the best of `repeats` products of two 4096 × 4096 matrices in `precision`."""
    a, b = (torch.randn(PEAK_SIDE, PEAK_SIDE, device=where, dtype=device.PRECISIONS[precision]) for _ in range(2))
    seconds = []
    for _ in range(repeats + 1):
        synchronize(where)
        begin = time.perf_counter()
        a @ b
        synchronize(where)
        seconds.append(time.perf_counter() - begin)
    return 2 * PEAK_SIDE**3 / min(seconds[1:])


def synchronize(where: torch.device) -> None:
    """Wait until a GPU has done what it was given; a CPU always has."""
    if where.type in ("cuda", "mps"):
        getattr(torch, where.type).synchronize()


def step_flops(network: nn.Module, image: tuple[int, int, int]) -> float:
    """Return the FLOPs (2 × multiply-adds) of training on one C×H×W image: forward and backward, as PyTorch counts."""
    with FlopCounterMode(display=False) as counter:
        network(torch.zeros(2, *image)).sum().backward()
    return counter.get_total_flops() / 2
