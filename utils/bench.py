"""How fast the training loop is: against the loops that people use, and against what the machine can multiply."""

import contextlib
import itertools
import math
import multiprocessing
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from unittest import mock

import joblib
import pandas as pd
import psutil
import torch
from torch.utils.data import DataLoader

from utils import ablation, costs, data, device, files, frameworks, loops, record, tables, train
from utils.model import CNN, CNNConfig

SPEED_FILE = "speed.csv"
COLUMNS = ["measurement", "what", "unit", "n", "median", "min", "max", "date", "commit"]
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"  # of the README's section
CPU = {"CNN_DEVICE": "cpu"}
AVX2 = CPU | {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}  # what PyTorch and oneDNN may use of it
WHERE = dict.fromkeys(("processes", "sweep", "roofline", "talk", "record", "lessons"), CPU)  # what is measured there
WHERE |= dict.fromkeys(("avx2", "avx2_bf16", "one_core"), AVX2)
TARGET = 0.85  # of the validation images right
Row = dict[str, object]


def speed(names: Sequence[str] = ("loop",), rounds: int = 7, images: int = 12_288) -> pd.DataFrame:
    """Make the measurements called `names` (of `MEASUREMENTS`, or "all"), print them, append them to results/speed.csv.

    Whatever is compared runs in turn, `rounds` times after a first round that warms up and is not counted, on `images`
    training images. Returns the rows. Raises ValueError for an unknown name, for no round or fewer than two batches of
    images, and ModuleNotFoundError for "frameworks" without the packages of requirements-bench.txt.
    """
    pinned = hasattr(os, "sched_setaffinity")  # Linux alone keeps a process to some cores
    names = [name for name in MEASUREMENTS if pinned or name != "one_core"] if "all" in names else names
    unknown = [name for name in names if name not in MEASUREMENTS]
    if unknown:
        raise ValueError(f"unknown measurement {unknown[0]!r}: choose from all, {', '.join(MEASUREMENTS)}")
    if "one_core" in names and not pinned:
        raise ValueError("measurement 'one_core' needs Linux, where a process can be kept to one core: leave it out")
    if rounds < 1:
        raise ValueError(f"rounds={rounds}: expected at least 1")
    if images < 2 * train.Recipe.batch_size:
        raise ValueError(f"images={images}: expected at least two batches, {2 * train.Recipe.batch_size}")
    if "frameworks" in names:
        frameworks.check_installed()
    path, machines, measured = files.results_dir() / SPEED_FILE, [], []
    if path.exists():
        read(path)  # rows that are damaged are told before the measurements, not after them
    for name in names:
        table = pd.DataFrame(MEASUREMENTS[name](rounds, images)).assign(measurement=name)
        print(table.drop(columns="measurement").to_string(index=False, float_format=lambda value: f"{value:,.2f}"))
        machines.append(machine_of(name))
        append(path, table, machines[-1])  # at once: a later one that fails loses nothing
        measured.append(table)
    for machine in dict.fromkeys(", ".join(f"{name} {value}" for name, value in each.items()) for each in machines):
        print(machine)
    return pd.concat(measured, ignore_index=True)


def machine_of(name: str) -> dict[str, str]:
    """Return what the measurement called `name` runs on, as `device.describe` says it in a process like its own."""
    with own_process(WHERE.get(name)) as process:
        if name == "one_core":
            call(process, keep_to, 1)()
        alone = {"cores": "1", "threads": "1"} if name == "one_core" else {}  # `describe` counts all that there are
        return call(process, device.describe)() | alone


def keep_to(cores: int) -> None:
    """Keep this process, and what it starts, to so many of its cores. Linux only."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])


def measure_loop(rounds: int, images: int) -> list[Row]:
    """The course's loop against the usual one: same network, batch size, augmentation and optimizer."""
    where, precision = device.pick(), device.pick_precision(device.pick())
    with laid_out() as folder, own_process() as usual, own_process() as course:
        workers = best_workers(folder, usual, images)
        turns = {
            "usual": call(usual, loops.usual, folder, images, workers),
            "course": call(course, loops.course, images),
            "peak": call(course, loops.matmul_peak, where, precision),
        }
        measured = interleave(turns, rounds)
    memory = [memory_of_the_usual_loop(images, workers) for _ in range(rounds)]
    flops = loops.step_flops(CNN(CNNConfig()), data.load().train.images.shape[1:])
    return [
        row(f"usual loop, {workers} workers, fp32", "images/s", measured["usual"]),
        row(f"the course's loop, {precision}", "images/s", measured["course"]),
        row("ratio of the two", "×", ratios(measured["course"], measured["usual"])),
        row(f"peak of the {precision} matrix product", "GFLOP/s", [peak / 1e9 for peak in measured["peak"]]),
        row("the course's loop, FLOPs of the network against that peak", "%", shares(measured, "course", flops)),
        row("from `python cnn.py` to the first step", "s", [loops.seconds_to_first_step() for _ in range(rounds)]),
        row("usual loop, memory", "GB", [used / 1e9 for used in memory]),
        row("`python cnn.py`, memory", "GB", [memory_of_a_run() / 1e9 for _ in range(rounds)]),
    ]


def measure_frameworks(rounds: int, images: int) -> list[Row]:
    """The same network and recipe in PyTorch Lightning and fastai: as in their tutorials, and at their best."""
    with laid_out() as folder, contextlib.ExitStack() as stack:
        theirs = {
            "Lightning, as its tutorial has it": (on_loader, frameworks.lightning_speed, folder, images),
            "fastai, as its tutorial has it": (on_loader, frameworks.fastai_speed, folder, images),
            "Lightning, at its best": (frameworks.lightning_best_speed, images),
            "Lightning, with the course's layers and memory": (frameworks.lightning_best_speed, images, True),
            "fastai, at its best in fp32": (frameworks.fastai_best_speed, images),
            "fastai, with autocast and the course's layers and memory": (frameworks.fastai_best_speed, images, True),
        }
        turns = {"course": call(stack.enter_context(own_process()), loops.course, images)}
        turns |= {name: call(stack.enter_context(own_process()), *what) for name, what in theirs.items()}
        measured = interleave(turns, rounds)
    rows = [row("the course's loop beside the frameworks", "images/s", measured["course"])]
    for name in theirs:
        rows.append(row(name, "images/s", measured[name]))
        rows.append(row(f"the course's loop against {name}", "×", ratios(measured["course"], measured[name])))
    return rows


def on_loader(loop: Callable[[DataLoader], float], folder: str, images: int) -> float:
    """Return the speed of a framework's `loop` on the usual DataLoader, without workers, as in the tutorials."""
    return loop(loops.usual_loader(folder, images, train.Recipe(), workers=0))


def measure_wide(rounds: int, images: int) -> list[Row]:
    """A network of wide stride-1 convolutions and pooling on 3×32×32 images: how near the loop comes to the peak."""
    where, precision = device.pick(), device.pick_precision(device.pick())
    with own_process() as process:
        turns = {
            "wide": call(process, loops.wide, min(images, 2048)),
            "peak": call(process, loops.matmul_peak, where, precision),
        }
        measured = interleave(turns, rounds)
    return [
        row("wide network, 3×32×32 images", "images/s", measured["wide"]),
        row(
            "wide network, FLOPs against the peak",
            "%",
            shares(measured, "wide", loops.step_flops(loops.wide_network(), loops.WIDE_IMAGE)),
        ),
    ]


def measure_record(rounds: int, images: int) -> list[Row]:
    """Seconds of training for the record, and for airbench94's epochs in plain PyTorch; by a few steps of each.

    Both have all 50,000 images of CIFAR-10. What comes before the first step, and test-time views, are not counted.
    """
    config, recipe = record.RecordConfig(), record.RECIPE
    with own_process(CPU) as process, own_process(CPU) as plain:  # airbench94_run is for a CPU
        turns = {
            "small": call(process, loops.record_run, config.small),
            "whole": call(process, loops.record_run, loops.WIDE_IMAGE[1]),
            "airbench94": call(plain, loops.airbench94_run),
        }
        speeds = interleave(turns, rounds)
    share = config.small_share
    by_image = [share / a + (1 - share) / b for a, b in zip(speeds["small"], speeds["whole"], strict=True)]
    ours = [recipe.epochs * 50_000 * seconds for seconds in by_image]
    theirs = [loops.AIRBENCH94_EPOCHS * 50_000 / speed for speed in speeds["airbench94"]]
    side = loops.WIDE_IMAGE[1]
    return [
        row(f"the record's network, images of {config.small}×{config.small}", "images/s", speeds["small"]),
        row(f"the record's network, images of {side}×{side}", "images/s", speeds["whole"]),
        row("airbench94 in plain PyTorch", "images/s", speeds["airbench94"]),
        row(f"the record, {recipe.epochs} epochs", "s", ours),
        row(f"airbench94 in plain PyTorch, {loops.AIRBENCH94_EPOCHS} epochs", "s", theirs),
        row("airbench94 in plain PyTorch against the record", "×", ratios(theirs, ours)),
    ]


def measure_images(rounds: int, images: int) -> list[Row]:
    """Time an image as the training set grows, the smallest one in ten epochs, of one step each."""
    sizes = (1_000, 10_000, 60_000)
    with own_process() as process:
        measured = interleave({n: call(process, loops.course, n, max(1, 10_000 // n)) for n in sizes}, rounds)
    times = {n: [1e6 / speed for speed in speeds] for n, speeds in measured.items()}
    rows = [row(f"time an image, training set of {n:,}", "µs", times[n]) for n in sizes]
    return [*rows, row("time an image, 60,000 against 1,000", "×", ratios(times[60_000], times[1_000]))]


def measure_width(rounds: int, images: int) -> list[Row]:
    """Time an image as the network grows wider, against its FLOPs."""
    widths = (16, 32, 64, 128)
    image = data.load().train.images.shape[1:]
    flops = {n: loops.step_flops(CNN(CNNConfig(width=n)), image) for n in widths}
    with own_process() as process:
        steps = {16: 12, 32: 12, 64: 6, 128: 4}
        batch = train.Recipe.batch_size
        turns = {n: call(process, loops.course, steps[n] * batch, width=n) for n in widths}
        measured = interleave(turns, rounds)
    times = {n: [1e6 / speed for speed in speeds] for n, speeds in measured.items()}
    growth = [time / (flops[128] / flops[16]) for time in ratios(times[128], times[16])]
    rows = [row(f"time an image, width {n}", "µs", times[n]) for n in widths]
    return [*rows, row("width 16 to 128: growth of time against growth of FLOPs", "×", growth)]


def measure_avx2(rounds: int, images: int) -> list[Row]:
    """Both loops on a CPU without bf16 instructions, or on this one when it is told to do without."""
    with laid_out() as folder, own_process(AVX2) as usual, own_process(AVX2) as course:
        workers = best_workers(folder, usual, images)
        precision = call(course, cpu_precision)()
        turns = {
            "usual": call(usual, loops.usual, folder, images, workers),
            "course": call(course, loops.course, images),
        }
        measured = interleave(turns, rounds)
    return [
        row("AVX2 only: usual loop, fp32", "images/s", measured["usual"]),
        row(f"AVX2 only: the course's loop, {precision}", "images/s", measured["course"]),
        row("AVX2 only: ratio of the two", "×", ratios(measured["course"], measured["usual"])),
    ]


def measure_dropout(rounds: int, images: int) -> list[Row]:
    """A step with dropout in every block against one without."""
    dropout = {"dropout": 0.1, "dropout_where": "everywhere"}
    with own_process() as process:
        turns = {"none": call(process, loops.course, images), "all": call(process, loops.course, images, **dropout)}
        measured = interleave(turns, rounds)
    return [row("dropout everywhere: a step against one without", "×", ratios(measured["none"], measured["all"]))]


def measure_probes(rounds: int, images: int) -> list[Row]:
    """A run with all probes at every 10th step against one without, in tens of steps: each ten have one probed step."""
    ten = 10 * train.Recipe.batch_size
    images = max(images // ten, 1) * ten
    with own_process() as process:
        turns = {"without": call(process, loops.course, images), "with": call(process, loops.probed, images)}
        measured = interleave(turns, rounds)
    return [
        row("probes every 10th step: a run against one without", "×", ratios(measured["without"], measured["with"]))
    ]


def measure_processes(rounds: int, images: int) -> list[Row]:
    """Two processes of half the threads, which share every batch, against one process, on the CPU."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    commands = {"one": [sys.executable], "two": torchrun}
    measured = interleave({name: partial(loops.command, command, images) for name, command in commands.items()}, rounds)
    return [
        row("one process", "images/s", measured["one"]),
        row("two processes that share each batch", "images/s", measured["two"]),
        row("two processes against one", "×", ratios(measured["two"], measured["one"])),
    ]


def measure_waterfall(rounds: int, images: int) -> list[Row]:
    """From the usual loop to the course's, one trick at a time; and all tricks but one. See `in_bf16`."""
    images = max(images // 4 // 512, 1) * 512
    steps, first, last = loops.WATERFALL, *list(loops.WATERFALL)[:: len(loops.WATERFALL) - 1]
    with laid_out() as folder, own_process() as kept, own_process() as given_back:
        turns = {("up to", name): in_bf16(kept, loops.tricks_up_to(name)) for name in steps}
        turns |= {("all but", name): loops.without(turns["up to", last], name) for name in list(steps)[1:-1]}
        where = {key: kept if tricks.memory_kept else given_back for key, tricks in turns.items()}
        timed = {key: call(where[key], loops.with_tricks, tricks, images, folder) for key, tricks in turns.items()}
        measured = interleave(timed | {"course": call(kept, loops.course, images)}, rounds)
    up_to, all_but = (
        {name: measured[kind, name] for key, name in turns if key == kind} for kind in ("up to", "all but")
    )
    pairs = list(itertools.pairwise(steps))
    return [
        *(row(f"up to: {name}", "images/s", speeds) for name, speeds in up_to.items()),
        *(row(f"gain: {name}", "×", ratios(up_to[name], up_to[before])) for before, name in pairs),
        *(row(f"saved: {name}", "µs", savings(up_to[name], up_to[before])) for before, name in pairs),
        *(row(f"all but: {name}", "images/s", speeds) for name, speeds in all_but.items()),
        *(row(f"gain at the end: {name}", "×", ratios(up_to[last], speeds)) for name, speeds in all_but.items()),
        *(row(f"saved at the end: {name}", "µs", savings(up_to[last], speeds)) for name, speeds in all_but.items()),
        row("all tricks against none", "×", ratios(up_to[last], up_to[first])),
        row("train.fit against all tricks", "×", ratios(measured["course"], up_to[last])),
    ]


def measure_avx2_bf16(rounds: int, images: int) -> list[Row]:
    """bf16 on a CPU without instructions for it, or on this one when it is told to do without."""
    images, tricks = 512, loops.tricks_up_to(list(loops.WATERFALL)[-1])
    with own_process(AVX2) as process:
        turns = {
            precision: call(process, loops.with_tricks, replace(tricks, bf16=precision == "bf16"), images, "")
            for precision in ("fp32", "bf16")
        }
        measured = interleave(turns, rounds)
    return [row("AVX2 only: bf16 against fp32", "×", ratios(measured["bf16"], measured["fp32"]))]


def measure_target(rounds: int, images: int) -> list[Row]:
    """Seconds, and images, to 85 % of the validation images right: the usual loop and the course's, a seed a round.

    The round that warms up goes on to the first look at them. See `in_bf16`.
    """
    names = ("usual loop", "pool before norm", "batches of 512")
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in names}
    with laid_out() as folder, own_process() as given_back, own_process() as kept:
        tricks = {name: in_bf16(kept, loops.tricks_up_to(name)) for name in names}
        where = {name: kept if tricks[name].memory_kept else given_back for name in names}
        for name in names:
            call(where[name], loops.seconds_to, 0.0, tricks[name], folder, 0)()
        for seed in range(rounds):
            for name in names if seed % 2 else reversed(names):
                found[name].append(call(where[name], loops.seconds_to, TARGET, tricks[name], folder, seed)())
    seconds = {name: [pair[0] for pair in pairs] for name, pairs in found.items()}
    usual = seconds.pop(names[0])
    return [
        *(row(f"to {TARGET:.0%}: {name}", "s", [pair[0] for pair in pairs]) for name, pairs in found.items()),
        *(row(f"to {TARGET:.0%}: {name}", "images", [pair[1] for pair in pairs]) for name, pairs in found.items()),
        *(row(f"to {TARGET:.0%}: usual loop against {name}", "×", ratios(usual, s)) for name, s in seconds.items()),
    ]


def measure_learning(rounds: int, images: int) -> list[Row]:
    """Does a trick change what is learned? Accuracy with all of them but the last, without one, and with the last.

    See `in_bf16`.
    """
    images, (*_, most, last) = max(images // 2 // 512, 1) * 512, loops.WATERFALL
    with own_process() as process:
        arms = {"all": in_bf16(process, loops.tricks_up_to(most)), last: in_bf16(process, loops.tricks_up_to(last))}
        arms |= {name: loops.without(arms["all"], name) for name in ("bf16", "own kernels", most)}
        found = pd.DataFrame(
            {name: 100 * call(process, loops.learned, tricks, seed, images)() for name, tricks in arms.items()}
            for seed in range(rounds)
        )
    by = {name: found["all"] - found[name] for name in arms if name not in ("all", last)}
    by[last] = found[last] - found["all"]
    return [
        row(f"accuracy with all tricks but {last}", "%", found["all"].to_list()),
        *(row(f"accuracy by: {name}", "points", difference.to_list()) for name, difference in by.items()),
    ]


def measure_roofline(rounds: int, images: int) -> list[Row]:
    """What the CPU can do, and the time of each layer of the network on a batch, forward and backward."""
    with own_process(CPU) as process:
        native = call(process, multiplies_bf16)()
        sides = {"fp32": None, "bf16": None if native else 512}  # a large product in emulated bf16 takes minutes
        turns = {
            "layers": call(process, costs.course_layer_seconds),
            **{p: call(process, loops.matmul_peak, torch.device("cpu"), p, side=side) for p, side in sides.items()},
            "memory": call(process, costs.bandwidth),
            "cache": call(process, costs.bandwidth, 2**20, 50),
        }
        measured = interleave(turns, rounds)
    rows = pd.concat(measured["layers"])
    layers = rows.groupby(["layer", "direction"], sort=False)["seconds"]
    return [
        *(row(f"peak of the {p} matrix product", "GFLOP/s", [x / 1e9 for x in measured[p]]) for p in sides),
        *(row(f"{what} bandwidth", "GB/s", [x / 1e9 for x in measured[what]]) for what in ("memory", "cache")),
        *(row(f"{layer}, {direction}", "ms", list(1e3 * x)) for (layer, direction), x in layers),
        *(row("largest cache", "MiB", [size / 2**20]) for size in [device.largest_cache()] if size),
    ]


def measure_growth(rounds: int, images: int) -> list[Row]:
    """Time an image as the network grows deeper, the image larger, and the cores fewer."""
    depths, sides, few = (4, 10, 28), (14, 28, 56), max(images // 12 // 512, 1) * 512
    with own_process() as process:
        turns = {f"{2 * depth + 2} layers": call(process, loops.course, few, depth=depth) for depth in depths}
        turns |= {f"{side}×{side} pixels": call(process, loops.of_side, side, few) for side in sides}
        threads = sorted({1, call(process, torch.get_num_threads)()})
        turns |= {f"{n} threads": call(process, loops.on_threads, n, 2 * few) for n in threads}
        measured = interleave(turns, rounds)
    return [row(f"time an image, {name}", "µs", [1e6 / x for x in speeds]) for name, speeds in measured.items()]


def measure_talk(rounds: int, images: int) -> list[Row]:
    """All-reduces of several sizes between two processes, and a step that these share, with and without the talking."""
    batch = train.Recipe.batch_size
    images = max(images // 4 // batch, 1) * batch
    measured = run_together(loops.talk, images, rounds)
    steps = {name: [1e3 * batch / speed for speed in measured[name]] for name in ("joined", "muted")}
    times = {size: [1e6 * turn[place] for turn in measured["messages"]] for place, size in enumerate(loops.MESSAGES)}
    return [
        *(row(f"all-reduce of {size} bytes", "µs", seconds) for size, seconds in times.items()),
        row("a step shared by two processes", "ms", steps["joined"]),
        row("a step shared by two processes that say nothing", "ms", steps["muted"]),
    ]


def measure_lessons(rounds: int, images: int) -> list[Row]:
    """Seconds and memory of each lesson, executed from a fresh kernel; without a round that warms up."""
    rows = []
    for lesson in sorted((files.ROOT / "notebooks").glob("*.ipynb")):
        measured = [execution_of(lesson) for _ in range(rounds)]
        rows.append(row(f"lesson {lesson.stem}", "s", [seconds for seconds, _ in measured]))
        rows.append(row(f"lesson {lesson.stem}, memory", "GB", [memory / 1e9 for _, memory in measured]))
    return rows


def measure_one_core(rounds: int, images: int) -> list[Row]:
    """Seconds of each lesson on one core without bf16 instructions, as Binder lends it. Linux only; no warm-up."""
    rows = []
    for lesson in sorted((files.ROOT / "notebooks").glob("*.ipynb")):
        seconds = [execution_of(lesson, AVX2, cores=1)[0] for _ in range(rounds)]
        rows.append(row(f"lesson {lesson.stem}, one core, AVX2 only", "s", seconds))
    return rows


def measure_sweep(rounds: int, images: int) -> list[Row]:
    """An ablation of four runs a core on the CPU: one process a core against one process."""
    cores, source = joblib.cpu_count(), ablation.Source(images=images)
    recipe, variants = train.Recipe(epochs=1, batch_size=128, lr=0.1), {"norm": ["batch", "none"]}
    options = {"source": source, "device": "cpu", "refresh": True, "progress": False}

    def seconds(jobs: int) -> float:
        begin = time.perf_counter()
        ablation.run("bench", CNNConfig(width=16), variants, recipe, range(2 * cores), jobs=jobs, **options)
        return time.perf_counter() - begin

    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, CNN_CACHE_DIR=folder):
        measured = interleave({"one": partial(seconds, 1), "all": partial(seconds, cores)}, rounds)
    return [row("a sweep, one process a core against one process", "×", ratios(measured["one"], measured["all"]))]


MEASUREMENTS = {
    "loop": measure_loop,
    "frameworks": measure_frameworks,
    "wide": measure_wide,
    "images": measure_images,
    "width": measure_width,
    "avx2": measure_avx2,
    "dropout": measure_dropout,
    "probes": measure_probes,
    "processes": measure_processes,
    "sweep": measure_sweep,
    "waterfall": measure_waterfall,
    "avx2_bf16": measure_avx2_bf16,
    "target": measure_target,
    "learning": measure_learning,
    "roofline": measure_roofline,
    "growth": measure_growth,
    "talk": measure_talk,
    "record": measure_record,
    "lessons": measure_lessons,
    "one_core": measure_one_core,
}
# Of lesson 7, or elsewhere in the README:
NOT_IN_ITS_TABLE = (
    *("waterfall", "avx2_bf16", "target", "learning", "roofline", "growth", "talk", "record"),
    *("lessons", "one_core"),
)


def ratios(ours: list[float], theirs: list[float]) -> list[float]:
    """Return the quotient of each pair that was measured in the same round."""
    return [a / b for a, b in zip(ours, theirs, strict=True)]


def savings(fast: list[float], slow: list[float]) -> list[float]:
    """Return the microseconds an image that images/s `fast` save against those of `slow` in the same round."""
    return [1e6 / b - 1e6 / a for a, b in zip(fast, slow, strict=True)]


def shares(measured: dict[str, list[float]], name: str, flops: float) -> list[float]:
    """Return the percentage of each round's peak that images of `flops` FLOPs each made use of."""
    return [100 * flops * share for share in ratios(measured[name], measured["peak"])]


@contextlib.contextmanager
def laid_out() -> Iterator[str]:
    """Yield a temporary folder with the images where torchvision looks for them."""
    with tempfile.TemporaryDirectory() as folder:
        loops.lay_out_for_torchvision(Path(folder))
        yield folder


def best_workers(folder: str, process: ProcessPoolExecutor, images: int) -> int:
    """Return the number of workers, 0 or 2, with which the usual loop is faster here."""
    tries = {n: call(process, loops.usual, folder, images, n) for n in (0, 2)}
    return max((speeds, n) for n, speeds in interleave(tries, rounds=1).items())[1]


@contextlib.contextmanager
def own_process(environment: Mapping[str, str] | None = None) -> Iterator[ProcessPoolExecutor]:
    """Yield an executor of one fresh process, in which `environment` is set too; no other's settings act there."""
    before = dict(os.environ)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        os.environ.update(environment or {})
        try:
            process.submit(os.getpid).result()  # now it starts
        finally:
            os.environ.clear()
            os.environ.update(before)
        yield process


def call(process: ProcessPoolExecutor, function: Callable, *arguments: object, **options: object) -> Callable:
    """Return a function that calls `function` in `process` and waits for its result."""
    return lambda: process.submit(function, *arguments, **options).result()


def run_together(function: Callable, *arguments: object, processes: int = 2) -> object:
    """Return what the first of several processes, set up as by `torchrun`, returns for `function` of `arguments`."""
    with contextlib.ExitStack() as stack, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = CPU | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        shared |= {"TORCHELASTIC_RUN_ID": "bench", "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        own = [shared | {"RANK": str(n), "LOCAL_RANK": str(n)} for n in range(processes)]
        workers = [stack.enter_context(own_process(environment)) for environment in own]
        free.close()  # now the port is theirs
        results = [worker.submit(function, *arguments) for worker in workers]
        ended = wait(results, return_when=FIRST_EXCEPTION).done  # the first to fail; the others only lose it
        for result in (*ended, *results):
            result.result()  # which raises its error
        return results[0].result()


def memory_of_the_usual_loop(images: int, workers: int) -> float:
    """Return the largest resident memory of a fresh process that runs the usual loop, in bytes, its workers' not."""
    stats = data.channel_stats(data.load().train.images)
    with laid_out() as folder, own_process() as process:
        call(process, loops.usual, folder, images, workers, stats)()
        return call(process, peak_memory)()


def memory_of_a_run() -> int:
    """Return the largest resident memory of `python cnn.py` over one epoch and all that follows, in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "cnn.py", "--epochs", "1", "--no-test", "--out", folder]
        with own_process() as process:
            call(process, subprocess.run, command, cwd=files.ROOT, check=True, capture_output=True)()
            return call(process, peak_memory, of_children=True)()


def execution_of(lesson: Path, environment: Mapping[str, str] = CPU, cores: int | None = None) -> tuple[float, int]:
    """Return the seconds that a notebook takes, Jupyter's start included, and its memory in bytes.

    Its folders are its own, the cache too, so that nothing is taken from earlier runs. `cores`: on so many of them.
    """
    with tempfile.TemporaryDirectory() as folder:
        own = {f"CNN_{name.upper()}_DIR": f"{folder}/{name}" for name in ("results", "figures", "cache")}
        shutil.copytree(files.ROOT / "results", own["CNN_RESULTS_DIR"])
        command = [sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute", "--output-dir", folder]
        with own_process(environment | own) as process:
            if cores:
                call(process, keep_to, cores)()
            begin = time.perf_counter()
            done = call(process, subprocess.run, [*command, str(lesson)], capture_output=True, text=True)()
            if done.returncode:
                raise RuntimeError(f"{lesson.name} ends in an error on this machine:\n{done.stderr.strip()[-2000:]}")
            return time.perf_counter() - begin, call(process, peak_memory, of_children=True)()


def in_bf16(process: ProcessPoolExecutor, tricks: loops.Tricks) -> loops.Tricks:
    """Return `tricks`, in fp32 where the machine has no instructions for bf16.

    There the course's loop takes fp32, too, and a loop in emulated bf16 would take hours; "avx2_bf16" measures one.
    """
    return replace(tricks, bf16=tricks.bf16 and call(process, multiplies_bf16)())


def multiplies_bf16() -> bool:
    """Return whether the device of this process has instructions for bf16."""
    return device.pick_precision(device.pick()) == "bf16"


def cpu_precision() -> str:
    """Return the precision that this process trains in on the CPU."""
    return device.pick_precision(torch.device("cpu"))


def interleave(loops: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Return `rounds` results of each of `loops`, measured in turn after one round that warms up.

    Every other round goes backward, so that none of them always follows the same other one.
    """
    measured: dict[str, list[float]] = {name: [] for name in loops}
    for turn in range(rounds + 1):
        for name in list(loops) if turn % 2 == 0 else reversed(loops):
            result = loops[name]()
            if turn > 0:
                measured[name].append(result)
    return measured


def row(what: str, unit: str, values: list[float]) -> dict[str, object]:
    """Return a line of the table: median, smallest and largest of `values`."""
    return {
        "what": what,
        "unit": unit,
        "n": len(values),
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
    }


def peak_memory(of_children: bool = False) -> float:
    """Return the largest resident memory of this process so far, or of one that it started and waited for, in bytes.

    NaN for the latter on Windows, which tells nothing of a process that has ended.
    """
    try:
        import resource  # not on Windows, where psutil knows the peak
    except ImportError:
        return math.nan if of_children else psutil.Process().memory_info().peak_wset
    who = resource.RUSAGE_CHILDREN if of_children else resource.RUSAGE_SELF
    return resource.getrusage(who).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measured_block(dates: Sequence[str] | None = None) -> str:
    """Return the README's section of measured figures from the rows in results/ of these dates, or else the newest."""
    speeds = measured_on(dates)
    comparison = ~speeds["unit"].isin(["images/s", "µs"])  # what they are quotients of is in results/
    comparison &= ~speeds["measurement"].isin(["loop", *NOT_IN_ITS_TABLE])
    own = speeds[[WHERE.get(name) != AVX2 for name in speeds["measurement"]]]  # what the machine has by itself
    hardware = {machine_in_words(row) for _, row in own.iterrows()}
    return "\n".join(
        [
            f"<!-- measured on {', '.join(dict.fromkeys(speeds.date))} -->",
            *measured_rows(speeds[speeds["measurement"] == "loop"]),
            "",
            f"Measured on {'; '.join(sorted(hardware))}. (AVX2 only: the same, told to do without newer instructions.) "
            "The rows are of several days, and machines of one name differ in speed: compare within a row, not between "
            "rows. `python cnn.py bench` measures this table on yours, in some minutes; `make bench` all, in hours.",
            "",
            "<details>",
            "<summary>Against other frameworks, on other hardware, and what grows with what</summary>",
            "",
            *measured_rows(speeds[comparison]),
            "",
            "</details>",
        ]
    )


def measured_rows(speeds: pd.DataFrame) -> list[str]:
    """Return the lines of a Markdown table of rows of results/speed.csv."""
    lines = ["| | median | from – to | n |", "|---|---|---|---|"]
    for measured in speeds.itertuples():
        digits = 0 if measured.median >= 100 else 2
        spread = f"{measured.min:,.{digits}f} – {measured.max:,.{digits}f}" if measured.n > 1 else ""
        lines.append(f"| {measured.what} | {measured.median:,.{digits}f} {measured.unit} | {spread} | {measured.n} |")
    return lines


def machine_in_words(row: pd.Series) -> str:
    """Return the hardware and software of a row of `append`."""
    gpu = "no GPU was used" if row.device == "cpu" else f"on its GPU, {row.device}"
    return f"{row.cores} cores of an {row.cpu} ({row.instructions}, {row.precision}), torch {row.torch}; {gpu}"


def measured_on(dates: Sequence[str] | None = None, folder: Path | None = None) -> pd.DataFrame:
    """Return the rows of speed.csv of these `dates`, or else the newest of each measurement; `folder`: not results/."""
    rows = read((folder or files.ROOT / "results") / SPEED_FILE)
    if dates is not None:
        return rows[rows["date"].isin(dates)]
    return rows[rows["date"] == rows.groupby("measurement")["date"].transform("max")]


def shipped() -> pd.DataFrame:
    """Return the rows of results/speed.csv that the README states: a reader's own, which are newer, are left out.

    Raises tables.ResultsError where the README does not say which these are.
    """
    said = re.search(r"<!-- measured on (.+) -->", (files.ROOT / "README.md").read_text(encoding="utf-8"))
    if said is None:
        raise tables.ResultsError("README.md does not say of which days its figures are: git checkout README.md")
    return measured_on(said[1].split(", "))


def write_readme() -> None:
    """Put `measured_block()` between its marks in README.md."""
    files.replace_block(files.ROOT / "README.md", BEGIN, END, measured_block())


def append(path: Path, table: pd.DataFrame, machine: dict[str, str]) -> None:
    """Append `table` to the CSV at `path`, each row with the date, the commit and the machine it was measured on."""
    table = table.assign(date=datetime.now(UTC).isoformat(timespec="seconds"), commit=commit(), **machine)
    with files.alone(path.with_suffix("")):  # a lock of its own: `write_rows` takes that of its file
        before = [read(path)] if path.exists() else []
        files.write_rows(path, pd.concat([*before, table]).to_csv(index=False), {})


def read(path: Path) -> pd.DataFrame:
    """Return the rows that `append` wrote; a commit stays text, also one that looks like a number (7573491, 12e4).

    Raises tables.ResultsError where they are missing, damaged or edited.
    """
    remedy = f"take them from git (git checkout results/{path.stem}.*), or delete both files and measure (make bench)"
    return tables.read_table(path, remedy, COLUMNS, by_hand=True, dtype={"commit": str})[0]


def commit() -> str:
    """Return the short name of the commit at hand, with a "+" if files differ from it; "unknown" outside of git.

    What is measured, and drawn, does not count: this module writes such files itself.
    """
    try:
        git = ["git", "-C", str(files.ROOT)]
        name = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno", "--", ":/", ":(top,exclude)results", ":(top,exclude)figures"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        return name + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
