"""The course's network in the training loops of PyTorch Lightning and fastai, to compare their speed with ours.

Each loop twice: as the framework's tutorials set it up, and at its best settings, on images that lie in memory. All
train one epoch with the course's batch size and optimizer, clocked from the end of the first step, in which memory is
taken, to that of the last. Set-up, checkpoints and validation are not counted; nor is a first epoch of the course's own
loop (`loops.speed_of`).
"""

import contextlib
import importlib.util
import io
import logging
import tempfile
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from utils import data, device, kernels, train
from utils.model import CNN, CNNConfig

REMEDY = "pip install -r requirements-bench.txt -c constraints.txt"
LIGHTNING_PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


def check_installed() -> None:
    """Raise ModuleNotFoundError, with the remedy, unless both frameworks are installed."""
    for name in ("lightning", "fastai"):
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f"{name} is not installed: {REMEDY}", name=name)


class Clock:
    """How many images a framework trained on, and how fast: `expected` of them, on the device `where`."""

    def __init__(self, expected: int, where: torch.device) -> None:
        self.expected, self.where = expected, where
        self.images, self.first, self.begin, self.end = 0, 0, 0.0, 0.0

    def count(self, images: int) -> None:
        """A step on so many images is done; the first one starts the clock, and the last one stops it."""
        first, self.images = self.images == 0, self.images + images
        if (first or self.images == self.expected) and self.where.type != "cpu":
            device.synchronize(self.where)  # a GPU may still be at work
        self.end = time.perf_counter()
        if first:
            self.first, self.begin = images, self.end

    def speed(self) -> float:
        """Return the images per second. Raises RuntimeError if the framework trained on too many, or too few."""
        if self.images != self.expected:
            raise RuntimeError(f"trained on {self.images} images: expected {self.expected}")
        return (self.images - self.first) / (self.end - self.begin)


def lightning_speed(loader: DataLoader) -> float:
    """Return the images per second of Lightning's Trainer with its defaults, on the batches of `loader`, in fp32.

    Progress bar, model summary, logger and checkpoint are on, as they are by default. What they print is caught, and
    their files are written into a temporary folder.
    """
    return fit_with_lightning(loader)


def lightning_best_speed(images: int, all_ours: bool = False) -> float:
    """Return the images per second of a bare Trainer (`barebones=True`) on `images` images in memory.

    Channels last, in the precision of our own loop, on the layers of `torch.nn`; with `all_ours` on the course's, which
    `utils.kernels` makes faster, and with freed memory kept: then only the loop itself is Lightning's.
    """
    where = device.pick()
    precision = device.pick_precision(where)
    settings = {"barebones": True, "precision": LIGHTNING_PRECISIONS[precision], "all_ours": all_ours}
    return fit_with_lightning(in_memory(images, precision), device.memory_format(where), **settings)


def fastai_speed(loader: DataLoader) -> float:
    """Return the images per second of fastai's Learner with its defaults, on the batches of `loader`, in fp32.

    As in fastai's tutorial "Migrating from pure PyTorch": PyTorch's DataLoader as it is, and `fit_one_cycle`. Progress
    bar and recorder are on, as they are by default; what they print is caught. SGD is PyTorch's, since fastai's own has
    no Nesterov momentum; the learning rate follows fastai's curve, with our peak and warm-up.
    """
    with importing():
        from fastai.vision.all import accuracy
    return fit_with_fastai(loader, metrics=accuracy)


def fastai_best_speed(images: int, all_ours: bool = False) -> float:
    """Return the images per second of fastai's Learner without its extras, on `images` images in memory.

    Channels last; without progress bar, recorder and metrics. In fp32 on a CPU, as fastai's MixedPrecision knows CUDA
    only; with `all_ours` the network runs under our autocast instead, has our layers, and freed memory is kept.
    """
    with importing():
        from fastai.vision.all import MixedPrecision, TrainEvalCallback
    where = device.pick()
    precision = device.pick_precision(where)
    by_fastai = where.type == "cuda" and not all_ours
    callbacks = [TrainEvalCallback(), *([MixedPrecision()] if by_fastai else [])]
    batches = in_memory(images, precision if all_ours else "fp32")
    settings = {"cbs": callbacks, "default_cbs": False, "all_ours": all_ours}
    return fit_with_fastai(batches, device.memory_format(where), **settings)


def in_memory(images: int, precision: str) -> data.Batches:
    """Return the batches of our own loop, of `images` images in memory; both frameworks take them as they are."""
    everything, where = data.load(), device.pick()
    stats = data.channel_stats(everything.train.images)
    recipe = train.Recipe(epochs=1)
    return train.training_batches(everything.take(images), stats, recipe, where, precision)


def network(all_ours: bool = False) -> CNN:
    """Return the course's network, of the layers of `torch.nn` unless `all_ours`."""
    model = CNN(CNNConfig())
    return model if all_ours else kernels.undone(model)


def memory(all_ours: bool) -> contextlib.AbstractContextManager:
    """Return the context in which freed memory is kept, if `all_ours`."""
    return device.freed_memory_kept() if all_ours else contextlib.nullcontext()


def fit_with_lightning(
    batches: DataLoader | data.Batches,
    memory_format: torch.memory_format = torch.contiguous_format,
    all_ours: bool = False,
    **settings: Any,
) -> float:
    """Train on `batches` with a Trainer of these `settings` and return its images per second."""
    with importing():
        import lightning.pytorch as pl
    recipe, where = train.Recipe(epochs=1), device.pick()
    clock = Clock(len(batches) * recipe.batch_size, where)

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = network(all_ours)

        def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
            images, labels = batch
            loss = F.cross_entropy(self.network(images), labels)
            if not settings.get("barebones"):
                self.log("train_loss", loss)
            return loss

        def configure_optimizers(self) -> dict[str, Any]:
            optimizer = train.make_optimizer(self, recipe)
            schedule = train.make_schedule(optimizer, recipe, len(batches))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    class Stopwatch(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            clock.count(len(batch[1]))

    torch.manual_seed(recipe.seed)
    module = Module().to(memory_format=memory_format)
    with quiet(), memory(all_ours), tempfile.TemporaryDirectory() as folder:
        own = [where.index or 0] if where.type == "cuda" else 1
        place = {"accelerator": where.type, "devices": own, "default_root_dir": folder}
        pl.Trainer(max_epochs=recipe.epochs, callbacks=[Stopwatch()], **place, **settings).fit(module, batches)
    return clock.speed()


def fit_with_fastai(
    batches: DataLoader | data.Batches,
    memory_format: torch.memory_format = torch.contiguous_format,
    all_ours: bool = False,
    **settings: Any,
) -> float:
    """Train on `batches` with a Learner of these `settings` and return its images per second."""
    with importing():
        from fastai.vision.all import Callback, DataLoaders, Learner, OptimWrapper
    recipe, where = train.Recipe(epochs=1), device.pick()
    clock = Clock(len(batches) * recipe.batch_size, where)

    class Stopwatch(Callback):
        order = 100  # after all others: what they do at the end of a step is part of it

        def after_batch(self) -> None:
            clock.count(len(self.yb[0]))

    torch.manual_seed(recipe.seed)
    model = network(all_ours).to(where, memory_format=memory_format)
    if all_ours:
        precision, forward = device.pick_precision(where), model.forward

        def autocast_forward(images: Tensor) -> Tensor:
            with device.autocast(where, precision):
                return forward(images)

        model.forward = autocast_forward
    optimizer = OptimWrapper(opt=train.make_optimizer(model, recipe))
    moms = (recipe.momentum,) * 3  # ours is constant
    with quiet(), memory(all_ours), tempfile.TemporaryDirectory() as folder:
        loaders = DataLoaders(batches, [], path=folder)  # nothing to validate on: that would not be counted
        loaders._device = where  # else fastai's own choice; its setter would ask the batches to move
        learner = Learner(loaders, model, F.cross_entropy, opt_func=lambda *_, **__: optimizer, **settings)
        learner.fit_one_cycle(recipe.epochs, recipe.lr, pct_start=recipe.warmup, moms=moms, cbs=Stopwatch())
    return clock.speed()


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Import frameworks in silence: they use what PyTorch deprecates. Raises ModuleNotFoundError with the remedy."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error.name} is not installed: {REMEDY}", name=error.name) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep bars, tables, warnings and messages of a framework from the terminal. Errors are raised as ever."""
    log = logging.getLogger("lightning.pytorch")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
