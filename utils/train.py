"""The training loop: one for the whole course, for any network that maps N×C×H×W images to logits."""

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from tqdm.auto import tqdm

from utils import checkpoint, parallel
from utils import device as devices
from utils.data import INPUT_NORMS, MAX_SEED, Batches, ChannelStats, ImageData, Split, input_stats
from utils.model import CNN, evaluating, is_number, is_word, option

SCHEDULES = ("one-cycle", "cosine", "constant")
EVAL_BATCH = 500
LARGEST = 10**6  # of a number in a recipe: a larger one is a slip, and its products are not finite in fp32
DIVERGED = "diverged"  # metric of a run among many: 1 if its loss became NaN or infinite, else 0
DIVERGED_REMEDY = (
    "training stopped, the last checkpoint (if any) is kept. Expected a finite loss; lower the peak learning rate "
    "(--lr) or clip gradients (--clip 1)"
)


class Diverged(RuntimeError):
    """The loss became NaN or infinite; the message says at which step, and what to do."""


@dataclass(frozen=True)
class Recipe:
    """How to train: everything that is not the network or the data. Raises ValueError that names the field."""

    epochs: int = option(15, "passes over the training images")
    batch_size: int = option(512, "images a step")
    accumulate: int = option(1, "parts of a batch, one after the other, whose gradients are summed: less memory")
    lr: float = option(0.4, "peak learning rate")
    schedule: str = option("one-cycle", "learning rate over the run: " + ", ".join(SCHEDULES))
    warmup: float = option(0.2, "share of the run in which one-cycle rises to the peak")
    momentum: float = option(0.9, "Nesterov momentum of SGD")
    weight_decay: float = option(5e-4, "weight decay, on weights but not on norms and biases")
    label_smoothing: float = option(0.0, "share of the target spread over all classes (Szegedy et al. 2016)")
    clip: float = option(0.0, "largest gradient norm; 0: no clipping")
    ema: float = option(0.0, "decay a step of the averaged weights that are evaluated; 0: no averaging")
    input_norm: str = option("data set", "input normalization: data set, " + ", ".join(INPUT_NORMS))
    crop_padding: int = option(1, "pixels of padding that a random crop may shift into; 0: no crops")
    flip: bool = option(True, "mirror half of the images, on data where a mirrored image is still one")
    alternate: bool = option(False, "mirror each image in every second epoch, not by chance (Jordan 2024)")
    cutout: int = option(0, "side of a square that is blanked in each image (DeVries & Taylor 2017); 0: none")
    seed: int = option(0, "seed of data order, augmentation and dropout (and, in cnn.py, of the initial weights)")

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate", "crop_padding", "cutout", "seed"):
            least = 1 if name in ("epochs", "batch_size", "accumulate") else 0
            value, most = getattr(self, name), {"epochs": LARGEST, "seed": MAX_SEED}.get(name, math.inf)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}={value!r}: expected a whole number (int) of at least {least}")
            if value > most:
                raise ValueError(f"{name}={value}: expected at most {most}")
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate={self.accumulate}: expected a divisor of batch_size={self.batch_size}")
        if not is_number(self.lr) or not 0 < self.lr <= LARGEST:
            allowed = f"a learning rate above 0 and up to {LARGEST}"
            raise ValueError(f"lr={self.lr!r}: expected {allowed}; try {type(self).lr}")
        for name, top in {
            "weight_decay": LARGEST,
            "clip": LARGEST,
            "momentum": 1,
            "label_smoothing": 1,
            "ema": 1,
        }.items():
            value = getattr(self, name)
            if not is_number(value) or not 0 <= value < top:
                raise ValueError(f"{name}={value!r}: expected a number from 0 up to, but not including, {top}")
        if not is_number(self.warmup) or not 0 < self.warmup < 1:
            raise ValueError(f"warmup={self.warmup!r}: expected a share of the run between 0 and 1")
        if not is_word(self.schedule, SCHEDULES):
            raise ValueError(f"schedule={self.schedule!r}: choose one of {', '.join(SCHEDULES)}")
        if not is_word(self.input_norm, ("data set", *INPUT_NORMS)):
            raise ValueError(f"input_norm={self.input_norm!r}: choose one of data set, {', '.join(INPUT_NORMS)}")
        for name in ("flip", "alternate"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r}: expected True or False")


class History(pd.DataFrame):
    """The tidy record of runs: run, epoch, step, split, metric, value, seconds (wall time since the run began).

    Its "lr" at a step is what the schedule gives the next one: 0 at the end of a one-cycle run.
    """

    COLUMNS = ("run", "epoch", "step", "split", "metric", "value", "seconds")

    @property
    def _constructor(self):
        return History

    def last(self, split: str, metric: str) -> float:
        """Return the newest value of `metric` on `split`. Raises KeyError that lists what there is."""
        rows = self[(self["split"] == split) & (self["metric"] == metric)]
        if rows.empty:
            there = sorted({f"{row.split} {row.metric}" for row in self.itertuples()})
            raise KeyError(f"no {split} {metric} in this history; there are: {', '.join(there)}")
        return float(rows["value"].iloc[-1])


def fit(
    model: nn.Module,
    data: ImageData,
    recipe: Recipe = Recipe(),
    *,
    device: str = "auto",
    precision: str = "auto",
    out: Path | None = None,
    resume: bool = False,
    compiled: bool = False,
    cuda_graphs: bool = False,
    progress: bool = True,
    run: str = "run",
    on_start: Callable[[], None] | None = None,
    on_epoch: Callable[[History], None] | None = None,
    optimizer: Callable[[nn.Module, Recipe], torch.optim.Optimizer] | None = None,
) -> History:
    """Train `model` (N×C×H×W images → N×num_classes logits) in place and return its history.

    Images are normalized as `recipe.input_norm` says, with statistics of the training split. Without validation images
    (`ImageData.join_validation`) the history has no rows of them. With `out`, a
    checkpoint is written there after every epoch, and `resume` goes on from it: on one CPU thread in fp32 the final
    weights are bit-identical to those of an undisturbed run. `compiled` runs the network through `torch.compile`;
    `cuda_graphs`, on a CUDA GPU, captures it as graphs besides, which saves small networks the launching of each
    kernel. `on_start` is called before the first step, when the settings and what `out` holds fit; `on_epoch` with the
    history so far after each epoch. `optimizer` makes another one than SGD of the network and the recipe (None:
    `make_optimizer`); the schedule multiplies the learning rate of each of its groups.
    Inside `parallel.join` the processes of a run share each batch, and the first of them writes the files. Raises
    Diverged when the loss is no longer finite, CheckpointError when what `out` holds does not fit, ValueError for a bad
    device, precision or batch size.
    """
    where = devices.pick(device)
    precision = devices.pick_precision(where, precision)
    torch.manual_seed(recipe.seed + parallel.rank())  # each process drops other units of its images
    stats = input_stats(data.train.images, recipe.input_norm)
    batches = training_batches(data, stats, recipe, where, precision)
    if recipe.batch_size % (alike := parallel.size() * recipe.accumulate):
        raise ValueError(
            f"batch_size={recipe.batch_size}: expected a multiple of {alike}, the processes ({parallel.size()}) × "
            f"accumulate ({recipe.accumulate}), so that all parts of a batch are alike"
        )
    dtype = devices.weight_dtype(precision)
    model.to(where, dtype, memory_format=devices.memory_format(where))
    parallel.synchronize_batch_norm(model)
    optimizer = (optimizer or make_optimizer)(model, recipe)
    schedule = make_schedule(optimizer, recipe, recipe.epochs * len(batches))
    scaler = torch.amp.GradScaler(where.type, enabled=precision == "fp16")
    ema = AveragedModel(model) if recipe.ema else None
    best = ema.module if ema else model  # the weights that are evaluated and kept
    if cuda_graphs and recipe.accumulate > 1:
        what = f"cuda_graphs=True with accumulate={recipe.accumulate}"
        raise ValueError(f"{what}: a graph writes over the gradients that are being added up; leave one of them out")
    forward = compile_network(parallel.wrap(model), where, compiled, cuda_graphs)

    stateful = {"model": model, "optimizer": optimizer, "schedule": schedule, "scaler": scaler} | (
        {"ema": ema} if ema else {}
    )
    settings = asdict(model.config) if is_dataclass(getattr(model, "config", None)) else {}
    settings = json.loads(json.dumps(settings, default=str))  # as they are read again: lists, not tuples
    network = settings if isinstance(model, CNN) else {"type": type(model).__name__} | settings
    identity = {
        "recipe": asdict(recipe),
        "network": network,
        "data": data.name,
        "checksum": data.checksum,
        "precision": precision,
        "optimizer": type(optimizer).__name__,
    }
    done = restore(out, stateful, batches.generator, identity) if resume else {"epoch": 0, "seconds": 0.0, "rows": []}
    if on_start is not None:
        on_start()
    first = parallel.rank() == 0  # of the processes, or the only one
    batches.epoch = done["epoch"]
    rows, begin = done["rows"], time.perf_counter() - done["seconds"]

    progress = progress and first
    steps, parts = len(batches), recipe.accumulate
    bar = tqdm(total=recipe.epochs * steps, initial=done["epoch"] * steps, disable=not progress, unit="step")
    with bar, devices.freed_memory_kept():
        for epoch in range(done["epoch"] + 1, recipe.epochs + 1):
            model.train()
            meter = Meter(where, steps, (epoch - 1) * steps, parts)
            for batch in batches:
                optimizer.zero_grad()
                for images, labels in zip(*(part.chunk(recipe.accumulate) for part in batch), strict=True):
                    with devices.autocast(where, precision):
                        logits = forward(images)
                    loss = F.cross_entropy(logits.to(dtype), labels, label_smoothing=recipe.label_smoothing)
                    meter.update(loss, logits, labels)
                    scaler.scale(loss * (len(labels) / len(batch[1]))).backward()
                if recipe.clip:
                    scaler.unscale_(optimizer)
                    nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
                scaler.step(optimizer)
                scaler.update()
                schedule.step()
                if ema:
                    average(ema, model, recipe.ema)
                if progress and where.type == "cpu":  # a GPU would have to stop for the numbers
                    bar.set_postfix_str(f"epoch {epoch}: {in_words(meter.result())}", refresh=False)
                bar.update()
            trained = meter.total() | {"lr": schedule.get_last_lr()[0]}
            validated = {}  # without validation images
            if len(data.validation):
                validated = evaluate(best, data.validation, stats, device=device, precision=precision, shared=True)
            check_finite(best, validated, epoch * steps)
            shown = f", validation {validated['accuracy']:.2%}" if validated else ""
            bar.set_postfix_str(f"epoch {epoch}: {in_words(trained)}{shown}")

            seconds = time.perf_counter() - begin
            for split, metrics in {"train": trained, "validation": validated}.items():
                rows += [[run, epoch, epoch * steps, split, name, value, seconds] for name, value in metrics.items()]
            states = parallel.gather(random_state(where))
            draws = {"data": batches.generator.get_state(), "dropout": {"device": where.type, "states": states}}
            if out is not None and first:
                progress_so_far = {"epoch": epoch, "seconds": seconds, "rows": rows}
                checkpoint.save_model(out, best, card(data, stats, epoch, validated.get("accuracy")))
                save(out, stateful, draws, identity, progress_so_far)  # last: what resumes finds all the rest
            if on_epoch is not None:
                on_epoch(History(rows, columns=History.COLUMNS))
    if ema:
        model.load_state_dict(ema.module.state_dict())
    return History(rows, columns=History.COLUMNS)


@torch.no_grad()
def average(ema: AveragedModel, model: nn.Module, decay: float) -> None:
    """Move the averaged weights and statistics by the share 1 − `decay` towards those of `model`; copy what is counted.

    `ema.update_parameters` averages counts too, which truncates them, and makes a GPU wait at every step.
    """
    pairs = [*zip(ema.module.parameters(), model.parameters(), strict=True)]
    pairs += zip(ema.module.buffers(), model.buffers(), strict=True)
    begun = ema.n_averaged > 0  # on the CPU, wherever the network is
    averaged = [pair for pair in pairs if begun and pair[0].is_floating_point()]
    if averaged:
        torch._foreach_lerp_([ours for ours, _ in averaged], [theirs for _, theirs in averaged], 1 - decay)
    for ours, theirs in pairs:
        if not (begun and ours.is_floating_point()):
            ours.copy_(theirs)
    ema.n_averaged += 1


def check_finite(model: nn.Module, validated: Mapping[str, float], step: int) -> None:
    """Raise Diverged where the newest step has ruined `model`: no training loss has shown that yet.

    That is when its loss on the validation images is not finite, or, without those, a weight.
    """
    loss = validated.get("loss", 0.0)
    if not math.isfinite(loss):
        raise Diverged(f"the validation loss is {loss} after step {step}: {DIVERGED_REMEDY}")
    if not validated and not all(weight.isfinite().all() for weight in model.parameters()):
        raise Diverged(f"a weight is not finite after step {step}: {DIVERGED_REMEDY}")


def compile_network(network: nn.Module, where: torch.device, compiled: bool, cuda_graphs: bool) -> nn.Module:
    """Return `network` as `torch.compile` makes it, if asked for. Raises ValueError for CUDA graphs elsewhere."""
    if cuda_graphs and where.type != "cuda":
        raise ValueError(f"cuda_graphs=True needs a CUDA device, and this one is {where.type!r}: leave it out")
    if not (compiled or cuda_graphs):
        return network
    return torch.compile(network, mode="reduce-overhead" if cuda_graphs else "default")


class Meter:
    """Loss, accuracy (correct / total) and speed of one epoch, summed on the device so that no step waits for it."""

    def __init__(self, where: torch.device, steps: int, first_step: int, parts: int = 1) -> None:
        self.losses, self.parts = torch.zeros(steps * parts, device=where), parts
        self.correct = torch.zeros((), dtype=torch.int64, device=where)
        self.weighted = torch.zeros((), dtype=torch.float64 if where.type != "mps" else torch.float32, device=where)
        self.count, self.updates, self.first_step, self.begin = 0, 0, first_step, time.perf_counter()
        self.processes = parallel.size()  # each sees as many images as this one

    def update(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add one of the `parts` of a batch: `loss` a scalar, `logits` N×num_classes, `labels` N.

        Alone on a CPU raises Diverged at once; processes that share a run find it out together, in `total`.
        """
        loss = loss.detach()
        self.losses[self.updates] = loss
        self.weighted += loss * len(labels)
        self.correct += (logits.detach().argmax(1) == labels).sum()
        self.count += len(labels)
        self.updates += 1
        if loss.device.type == "cpu" and self.processes == 1 and not math.isfinite(loss):
            self.raise_diverged()

    def result(self) -> dict[str, float]:
        """Return mean loss, accuracy and images per second so far."""
        return {
            "loss": float(self.weighted) / self.count,
            "accuracy": int(self.correct) / self.count,
            "images_per_second": self.processes * self.count / (time.perf_counter() - self.begin),
        }

    def total(self) -> dict[str, float]:
        """Return `result` over the images of all processes, which all must call this once, at the epoch's end.

        Raises Diverged, in all of them, for a loss that is not finite.
        """
        self.losses = parallel.all_sum(self.losses) / self.processes
        if not torch.isfinite(self.losses).all():  # the first time that the CPU waits for a GPU
            self.raise_diverged()
        self.weighted, self.correct = parallel.all_sum(self.weighted), parallel.all_sum(self.correct)
        self.count, self.processes = self.count * self.processes, 1
        return self.result()

    def raise_diverged(self) -> None:
        losses = self.losses[: self.updates].tolist()
        bad = next(update for update, loss in enumerate(losses) if not math.isfinite(loss))
        step = self.first_step + bad // self.parts + 1
        raise Diverged(f"the loss became {losses[bad]} at step {step}: {DIVERGED_REMEDY}")


def evaluate(
    model: nn.Module,
    split: Split,
    stats: ChannelStats,
    *,
    device: str = "auto",
    precision: str = "auto",
    shared: bool = False,
) -> dict[str, float]:
    """Return "loss" (mean cross-entropy) and "accuracy" (correct / total) of `model` on `split`, in eval mode.

    `model` is brought to `device` and `precision`; "auto" leaves float64 weights what they are. When `shared`, the
    processes of a run look at a part each; all of them must call it then.
    """
    where = devices.pick(device)
    if precision == "auto" and next(model.parameters()).dtype == torch.float64:
        precision = "fp64"
    precision = devices.pick_precision(where, precision)
    model.to(where, devices.weight_dtype(precision))
    loss, correct = 0.0, 0
    shared = shared and len(split) >= parallel.size()
    part = split[parallel.rank() :: parallel.size()] if shared else split  # this process' images
    over_all = parallel.all_sum if shared else (lambda total: total)
    dtype = devices.PRECISIONS[precision]
    with evaluating(model), torch.inference_mode(), devices.autocast(where, precision):
        for images, labels in Batches(part, stats, min(EVAL_BATCH, len(part)), device=where, dtype=dtype):
            logits = model(images).to(devices.weight_dtype(precision))
            loss = loss + F.cross_entropy(logits, labels, reduction="sum")
            correct = correct + (logits.argmax(1) == labels).sum()
    return {"loss": float(over_all(loss)) / len(split), "accuracy": int(over_all(correct)) / len(split)}


def training_batches(
    data: ImageData, stats: ChannelStats, recipe: Recipe, where: torch.device, precision: str
) -> Batches:
    """Return the shuffled, augmented batches of an epoch; a last, smaller one is dropped: all steps are alike."""
    return Batches(
        data.train,
        stats,
        recipe.batch_size,
        device=where,
        shuffle=True,
        drop_last=True,
        crop_padding=recipe.crop_padding,
        flip=recipe.flip and data.can_flip,
        alternate=recipe.alternate,
        cutout=recipe.cutout,
        dtype=devices.PRECISIONS[precision],
        seed=recipe.seed,
        share=(parallel.rank(), parallel.size()),
    )


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Return SGD with Nesterov momentum; weight decay acts on weights (two or more axes), not on norms and biases."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    groups = [
        {"params": [weight for weight in trained if weight.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [weight for weight in trained if weight.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    fused = on_cuda(model) or None
    return torch.optim.SGD(groups, recipe.lr, recipe.momentum, nesterov=recipe.momentum > 0, fused=fused)


def on_cuda(model: nn.Module) -> bool:
    """True if the weights of `model` are on a CUDA device."""
    return next(model.parameters()).is_cuda


def make_schedule(optimizer: torch.optim.Optimizer, recipe: Recipe, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """Return the schedule: one-cycle (Smith & Topin 2017), cosine (Loshchilov & Hutter 2016) or constant."""
    if recipe.schedule == "one-cycle":
        return torch.optim.lr_scheduler.LambdaLR(optimizer, partial(one_cycle, steps=steps, warmup=recipe.warmup))
    if recipe.schedule == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)


def one_cycle(step: int, steps: int, warmup: float) -> float:
    """Return the share of the peak lr at `step` of `steps`: straight up over the share `warmup`, straight down to 0.

    After Smith & Topin 2017 (https://arxiv.org/abs/1708.07120), whose cycle rises as long as it falls.
    `torch.optim.lr_scheduler.OneCycleLR` does the same when told to be linear and to leave the momentum alone, but
    divides by zero for some small numbers of steps.
    """
    top = warmup * steps
    return (step + 1) / (top + 1) if step < top else (steps - step) / (steps - top)


def random_state(where: torch.device) -> Tensor:
    """Return the state of the generator that dropout on `where` draws from."""
    return torch.cuda.get_rng_state(where) if where.type == "cuda" else generators(where).get_rng_state()


def set_random_state(saved: dict[str, Any], where: torch.device) -> None:
    """Go on with the random numbers of `saved` (the device it ran on, a state a process); on another device, anew."""
    state = saved["states"][parallel.rank() % len(saved["states"])]  # of fewer processes, some draw alike
    if saved["device"] == where.type == "cuda":
        torch.cuda.set_rng_state(state, where)
    elif saved["device"] == where.type and len(state) == len(generators(where).get_rng_state()):
        generators(where).set_rng_state(state)  # on MPS, older checkpoints have the state of another generator


def generators(where: torch.device) -> Any:
    """Return the module of PyTorch with the generator that dropout on `where`, which is no CUDA device, draws from."""
    return torch.mps if where.type == "mps" else torch


def save(out: Path, stateful: dict[str, Any], draws: dict[str, Any], identity: dict, progress: dict) -> None:
    """Write everything that the run in folder `out` needs to go on as if it had never stopped."""
    states = {name: part.state_dict() for name, part in stateful.items()}
    record = {"identity": identity, "states": states, "draws": draws, "progress": progress}
    checkpoint.write(Path(out) / checkpoint.STATE_FILE, record)


def restore(out: Path | None, stateful: dict[str, Any], generator: torch.Generator, identity: dict) -> dict[str, Any]:
    """Load the state that `save` wrote to folder `out` and return its progress.

    Raises CheckpointError if it does not fit.
    """
    if out is None:
        raise ValueError("resume=True without out: name the folder of the run to go on with")
    path = Path(out) / checkpoint.STATE_FILE
    saved = checkpoint.read(path, "identity", "states", "draws", "progress")
    before = {"optimizer": identity["optimizer"]} | saved["identity"]  # an older run does not say which it had
    differ = differences(before, identity)
    if differ:
        raise checkpoint.CheckpointError(
            f"{path} is of another run ({'; '.join(differ)}): give the same settings to resume it"
        )
    checkpoint.load_weights(stateful["model"], saved["states"]["model"], path)
    for name, part in stateful.items():
        try:
            part.load_state_dict(saved["states"][name])
        except (KeyError, RuntimeError, ValueError) as error:
            what = f"the state of {name} in {path} does not fit ({error})"
            raise checkpoint.CheckpointError(f"{what}: give the same settings to resume it") from error
    for weight, state in stateful["optimizer"].state.items():
        for name, value in state.items():  # fused optimizers want them in the weights' memory order
            if isinstance(value, Tensor) and value.shape == weight.shape:
                state[name] = torch.empty_like(weight, dtype=value.dtype).copy_(value)
    generator.set_state(saved["draws"]["data"])
    set_random_state(saved["draws"]["dropout"], next(stateful["model"].parameters()).device)
    return saved["progress"]


def differences(saved: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """Return one line for each setting that is not the same in both, "lr was 0.1 and is 0.2"."""
    lines = []
    for key in saved.keys() | now.keys():
        before, after = saved.get(key), now.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            lines += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            lines.append(f"{prefix}{key} was {before!r} and is {after!r}")
    return sorted(lines)


def card(data: ImageData, stats: ChannelStats, epoch: int, accuracy: float | None) -> dict[str, Any]:
    """Return what a stranger needs to use the trained network: data, classes, size, statistics, and how good it was."""
    return {
        "data": data.name,
        "class_names": list(data.class_names),
        "image_size": list(data.image_size),
        "mean": list(stats.mean),
        "std": list(stats.std),
        "per_image": stats.per_image,
        "epoch": epoch,
        "validation_accuracy": accuracy,
    }


def stats_of(card: Mapping[str, Any]) -> ChannelStats:
    """Return the statistics that a checkpoint's `card` holds, as `data.normalize` takes them."""
    return ChannelStats(tuple(card["mean"]), tuple(card["std"]), 0, card.get("per_image", False))


def in_words(result: dict[str, float]) -> str:
    """Return a meter's result for the progress bar."""
    return f"loss {result['loss']:.3f}, accuracy {result['accuracy']:.2%}, {result['images_per_second']:,.0f} images/s"
