"""What a training step costs, and why: where its time goes, how far each layer is from the roof, what talking takes."""

import contextlib
import math
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode

from utils import data, device, probes
from utils.model import CNN, CNNConfig

# Where the time of an event belongs: to the outermost of the events around it whose name begins like one of these.
GROUPS = {
    "data": ("data", "enumerate(DataLoader)"),
    "optimizer": ("Optimizer.",),
    "convolution, backward": (
        "autograd::engine::evaluate_function: ConvolutionBackward",
        "autograd::engine::evaluate_function: MapProductBackward",
        "autograd::engine::evaluate_function: PatchProductBackward",
    ),
    "convolution, forward": ("aten::conv2d", "aten::convolution", "MapProduct", "PatchProduct"),
    "batch norm": ("aten::batch_norm", "autograd::engine::evaluate_function: NativeBatchNormBackward"),
    "activation": ("aten::relu", "autograd::engine::evaluate_function: ReluBackward"),
    "pooling": (
        "aten::max_pool2d",
        "LargerOfNeighbours",
        "autograd::engine::evaluate_function: MaxPool",
        "autograd::engine::evaluate_function: LargerOfNeighbours",
    ),
}
REST = "everything else"


def where_time_goes(batches: Iterable[tuple[Tensor, Tensor]], step: Callable[[Tensor, Tensor], None]) -> pd.Series:
    """Return the milliseconds a step of each of `GROUPS`, and of "everything else", by torch.profiler.

    `step` trains on each of `batches` but the first, which warms up. Getting a batch counts as "data". Whatever the
    profiler does not see (Python between two operations), and its own overhead, count as "everything else".
    """
    batches = iter(batches)
    step(*next(batches))
    steps = 0
    with silent_stderr(), profile(activities=[ProfilerActivity.CPU]) as profiler:
        begin = time.perf_counter()
        while True:
            with record_function("data"):
                batch = next(batches, None)
            if batch is None:
                break
            step(*batch)
            steps += 1
        wall = time.perf_counter() - begin
    times = by_group(profiler.events())
    times[REST] = max(0.0, 1e6 * wall - sum(time for group, time in times.items() if group != REST))
    return pd.Series({group: times[group] / 1e3 / max(1, steps) for group in [*GROUPS, REST]})


def by_group(events: Iterable[Any]) -> Counter[str]:
    """Return the microseconds that the main thread itself spent in events of each group."""
    times: Counter[str] = Counter()
    for event in events:
        times[group_of(event)] += event.self_cpu_time_total
    return times


def group_of(event: Any) -> str:
    """Return the group of the outermost event around `event`, itself included, that has one."""
    found = REST
    while event is not None:
        for group, names in GROUPS.items():
            if event.name.startswith(names):
                found = group
        event = event.cpu_parent
    return found


@contextlib.contextmanager
def silent_stderr() -> Iterator[None]:
    """Catch what C++ code writes to the standard error: the profiler tells that it starts, and which GPU is missing."""
    kept = os.dup(2)
    with tempfile.TemporaryFile() as sink:
        os.dup2(sink.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


# ------------------------------------------------------------------------------------------------------- the roofline


@dataclass(frozen=True)
class Roof:
    """What a machine can do at most (Williams, Waterman, Patterson 2009): FLOP/s, and bytes/s from and to memory."""

    peak: float
    bandwidth: float

    @property
    def ridge(self) -> float:
        """FLOPs a byte from which on the peak can be reached."""
        return self.peak / self.bandwidth

    def limit(self, intensity: float) -> float:
        """Return the FLOP/s that `intensity` FLOPs a byte allow."""
        return min(self.peak, intensity * self.bandwidth)


def bandwidth(size: int = 2**27, repeats: int = 5) -> float:
    """Return the bytes/s of the best of `repeats` triads a = b + s·c (McCalpin 1995), `size` bytes each."""
    a, b, c = (torch.ones(size // 4) for _ in range(3))
    seconds = [clocked(lambda: torch.add(b, c, alpha=2.0, out=a)) for _ in range(repeats + 1)]
    return 3 * size / min(seconds[1:])


def clocked(function: Callable[[], Any]) -> float:
    """Return the seconds that `function` takes."""
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


# FLOPs of a value that comes in, forward and backward, of what torch.utils.flop_counter counts as none: by hand.
BY_HAND = {
    nn.BatchNorm2d: (7, 11),  # mean, variance, scale and shift; two sums, and what they are for
    nn.ReLU: (1, 1),
    nn.MaxPool2d: (0.75, 0.75),  # three comparisons a window of four values
}
KINDS = {nn.Conv2d: "convolution", nn.BatchNorm2d: "batch norm", nn.ReLU: "activation", nn.MaxPool2d: "pooling"}
KINDS |= {nn.Linear: "head"}
COLUMNS = ("layer", "kind", "direction", "flops", "bytes")


def inputs_of(model: nn.Module, images: Tensor, precision: str) -> dict[str, Tensor]:
    """Return what comes into each layer (see `probes.layers`) of `model` for these images N×C×H×W."""
    found: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs, name=name: found.__setitem__(name, inputs[0].detach()))
        for name, layer in probes.layers(model).items()
    ]
    try:
        with torch.no_grad(), device.autocast(images.device, precision):
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def layer_costs(model: nn.Module, images: Tensor, precision: str) -> pd.DataFrame:
    """Return FLOPs and bytes of each layer of `model`, forward and backward, for these images N×C×H×W.

    Bytes are those that have to pass at least: of all that comes in and goes out, once each, weights included. FLOPs
    are 2 × multiply-adds as torch.utils.flop_counter has them, those of norms, activations and pooling `BY_HAND`; of
    any other kind of layer ("other") none are counted. It runs `model` to see what comes in: running statistics move,
    and gradients are cleared.
    """
    inputs, rows = inputs_of(model, images, precision), []
    for name, layer in probes.layers(model).items():
        x, needs_gradient = inputs[name], not name.startswith("stem.conv")
        with device.autocast(x.device, precision), torch.no_grad():
            out = layer(x)
        weights = sum(weight.numel() * x.element_size() for weight in layer.parameters())
        sizes = {"forward": x.nbytes + weights + out.nbytes}
        sizes["backward"] = sizes["forward"] + weights + x.nbytes * needs_gradient
        kind = next((word for base, word in KINDS.items() if isinstance(layer, base)), "other")
        for direction, flops in zip(sizes, layer_flops(layer, x, needs_gradient), strict=True):
            rows.append((name, kind, direction, flops, sizes[direction]))
    return pd.DataFrame(rows, columns=COLUMNS)


def layer_flops(layer: nn.Module, x: Tensor, needs_gradient: bool = True) -> tuple[float, float]:
    """Return the FLOPs of `layer` on the input N×…, forward and backward."""
    for base, (forward, backward) in BY_HAND.items():
        if isinstance(layer, base):
            return forward * x.numel(), backward * x.numel()
    one = torch.zeros(1, *x.shape[1:], device=x.device, requires_grad=needs_gradient)  # fp32: torch.nn's own operations
    with FlopCounterMode(display=False) as forward:
        out = layer(one)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    layer.zero_grad()
    return len(x) * forward.get_total_flops(), len(x) * backward.get_total_flops()


def course_step(images: int = 512, model: nn.Module | None = None) -> tuple[nn.Module, Tensor, str]:
    """Return the course's network (or `model`), so many training images as it gets them, and the precision."""
    where = device.pick()
    precision, memory_format = device.pick_precision(where), device.memory_format(where)
    split = data.load().train
    batch = data.normalize(split.images[:images], data.channel_stats(split.images), device.PRECISIONS[precision])
    model = CNN(CNNConfig()) if model is None else model
    return model.to(where, memory_format=memory_format), batch.to(where, memory_format=memory_format), precision


def course_layer_seconds(images: int = 512, repeats: int = 3) -> pd.DataFrame:
    """Return what `layer_seconds` measures of `course_step`, with freed memory kept as in training."""
    torch.manual_seed(0)
    with device.freed_memory_kept():
        return layer_seconds(*course_step(images), repeats)


def layer_seconds(model: nn.Module, images: Tensor, precision: str, repeats: int = 3) -> pd.DataFrame:
    """Return the seconds of each layer of `model`, alone, the best of `repeats`: layer, direction, seconds."""
    rows = []
    for name, x in inputs_of(model, images, precision).items():
        layer = model.get_submodule(name)
        x = x.requires_grad_(not name.startswith("stem.conv"))
        taken: dict[str, list[float]] = {"forward": [], "backward": []}
        for _ in range(repeats + 1):
            with device.autocast(x.device, precision):
                begin = time.perf_counter()
                out = layer(x)
                taken["forward"].append(time.perf_counter() - begin)
            gradient = torch.ones_like(out)
            taken["backward"].append(clocked(lambda out=out, gradient=gradient: out.backward(gradient)))
            x.grad = None
        layer.zero_grad()
        rows += [(name, direction, min(seconds[1:])) for direction, seconds in taken.items()]
    return pd.DataFrame(rows, columns=["layer", "direction", "seconds"])


# ------------------------------------------------------------------------------------------------- what talking costs


@dataclass(frozen=True)
class Talk:
    """What an all-reduce costs: between two processes `latency` + `per_byte` × bytes seconds.

    Among p of them, in a ring, 2(p − 1) messages follow each other, and each process sends 2(p − 1)/p of its bytes
    (Thakur et al. 2005; Patarasuk & Yuan 2009): that is p − 1 times the latency, and 2(p − 1)/p times the rest.
    """

    latency: float
    per_byte: float

    def seconds(self, size: float, processes: int = 2) -> float:
        """Return the time of an all-reduce of `size` bytes."""
        others = processes - 1
        return others * self.latency + 2 * others / processes * self.per_byte * size

    @classmethod
    def fitted(cls, sizes: Sequence[float], seconds: Sequence[float]) -> "Talk":
        """Return the line through times measured between two processes that has the least relative squared error.

        Raises ValueError for fewer than three sizes.
        """
        if len(sizes) < 3:
            raise ValueError(f"{len(sizes)} message sizes: expected three or more")
        times = np.asarray(seconds, dtype=float)
        design = np.column_stack([np.ones(len(sizes)), sizes]) / times[:, None]
        (latency, per_byte), *_ = np.linalg.lstsq(design, np.ones(len(sizes)), rcond=None)
        return cls(float(latency), float(per_byte))


def messages(model: nn.Module) -> list[int]:
    """Return the bytes of all that the processes of a run tell each other in one step, message by message.

    Each batch norm gathers count, mean and variance on the way there and sums two gradients on the way back; then the
    gradients of all weights are summed, and the first process hands its statistics on (DistributedDataParallel).
    The gradients count as one message: it sends a first bucket of about 1 MB, then some of up to 25 MB, each of which
    costs a latency more. To gather between two processes is half of the messages of an all-reduce, and no more bytes.
    """
    channels = [layer.num_features for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    gradients = 4 * sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    statistics = sum(value.nbytes for value in model.buffers())
    return [4 * 3 * c for c in channels] + [4 * 2 * c for c in channels] + [gradients, statistics]


def step_seconds(alone: float, model: nn.Module, talk: Talk) -> float:
    """Return the predicted time of a step that takes `alone` seconds of computing, when two processes share it.

    All messages are taken for all-reduces.
    """
    return alone + math.fsum(map(talk.seconds, messages(model)))
