"""How fast the training loop is: against the loops that people use, and against what the machine can multiply."""

import contextlib
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import joblib
import pandas as pd
import psutil
import torch
from torch.utils.data import DataLoader

from utils import ablation, data, device, files, frameworks, loops, train
from utils.model import CNN, CNNConfig

SPEED_FILE = "speed.csv"
ACCURACY_FILE = "accuracy.csv"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"  # of the README's section
CPU = {"CNN_DEVICE": "cpu"}
AVX2 = CPU | {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}  # what PyTorch and oneDNN may use of it
Row = dict[str, object]


def speed(names: Sequence[str] = ("loop",), rounds: int = 5, images: int = 12_288) -> pd.DataFrame:
    """Make the measurements called `names` (of `MEASUREMENTS`, or "all"), print them, append them to results/speed.csv.

    Whatever is compared runs in turn, `rounds` times after a first round that warms up and is not counted, on `images`
    training images. Returns the rows. Raises ValueError for an unknown name, for fewer than one round or than one batch
    of images, and ModuleNotFoundError for "frameworks" without the packages of requirements-bench.txt.
    """
    names = list(MEASUREMENTS) if "all" in names else names
    unknown = [name for name in names if name not in MEASUREMENTS]
    if unknown:
        raise ValueError(f"unknown measurement {unknown[0]!r}: choose from all, {', '.join(MEASUREMENTS)}")
    if rounds < 1:
        raise ValueError(f"rounds={rounds}: expected at least 1")
    if images < train.Recipe.batch_size:
        raise ValueError(f"images={images}: expected at least one batch, {train.Recipe.batch_size}")
    if "frameworks" in names:
        frameworks.check_installed()
    machine, tables = device.describe(), []
    for name in names:
        table = pd.DataFrame(MEASUREMENTS[name](rounds, images)).assign(measurement=name)
        print(table.drop(columns="measurement").to_string(index=False, float_format=lambda value: f"{value:,.2f}"))
        append(files.results_dir() / SPEED_FILE, table, machine)  # at once: a later one that fails loses nothing
        tables.append(table)
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    return pd.concat(tables, ignore_index=True)


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
        memory = call(usual, peak_memory)()
    flops = loops.step_flops(CNN(CNNConfig()), data.load().train.images.shape[1:])
    return [
        row(f"usual loop, {workers} workers, fp32", "images/s", measured["usual"]),
        row(f"the course's loop, {precision}", "images/s", measured["course"]),
        row("ratio of the two", "×", ratios(measured["course"], measured["usual"])),
        row(f"peak of the {precision} matrix product", "GFLOP/s", [peak / 1e9 for peak in measured["peak"]]),
        row("the course's loop, FLOPs of the network against that peak", "%", shares(measured, "course", flops)),
        row("from `python cnn.py` to the first step", "s", [loops.seconds_to_first_step() for _ in range(rounds)]),
        row("usual loop, memory", "GB", [memory / 1e9]),
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


def measure_sweep(rounds: int, images: int) -> list[Row]:
    """An ablation of four runs a core on the CPU: one process a core against one process."""
    cores, source = joblib.cpu_count(), ablation.Source(images=images)
    recipe, variants = train.Recipe(epochs=1, batch_size=128, lr=0.1), {"norm": ["batch", "none"]}
    options = {"source": source, "device": "cpu", "refresh": True, "progress": False}

    def seconds(jobs: int) -> float:
        begin = time.perf_counter()
        ablation.run("bench", CNNConfig(width=16), variants, recipe, range(2 * cores), jobs=jobs, **options)
        return time.perf_counter() - begin

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
}


def ratios(ours: list[float], theirs: list[float]) -> list[float]:
    """Return the quotient of each pair that was measured in the same round."""
    return [a / b for a, b in zip(ours, theirs, strict=True)]


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


def memory_of_a_run() -> int:
    """Return the largest resident memory of `python cnn.py` over one epoch and all that follows, in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "cnn.py", "--epochs", "1", "--no-test", "--out", folder]
        with own_process() as process:
            call(process, subprocess.run, command, cwd=files.ROOT, check=True, capture_output=True)()
            return call(process, peak_memory, of_children=True)()


def cpu_precision() -> str:
    """Return the precision that this process trains in on the CPU."""
    return device.pick_precision(torch.device("cpu"))


def accuracy(seeds: range = range(5)) -> pd.DataFrame:
    """Train the defaults with each of `seeds`, read the test images once each, append to results/accuracy.csv."""
    images = data.load()
    rows = []
    for seed in seeds:
        torch.manual_seed(seed)
        model, recipe = CNN(CNNConfig()), train.Recipe(seed=seed)
        history = train.fit(model, images, recipe)
        split = images.read_test(f"python cnn.py bench --accuracy, seed {seed}")
        test = train.evaluate(model, split, data.channel_stats(images.train.images))
        rows.append({"seed": seed, "test_accuracy": test["accuracy"], "seconds": history["seconds"].max()})
        print(f"seed {seed}: test accuracy {test['accuracy']:.2%}, {rows[-1]['seconds']:.0f} s")
    table = pd.DataFrame(rows)
    print(f"median of {len(table)} seeds: {table.test_accuracy.median():.2%} in {table.seconds.median():.0f} s")
    append(files.results_dir() / ACCURACY_FILE, table, device.describe())
    return table


def interleave(loops: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Return `rounds` results of each of `loops`, measured in turn after one round that warms up."""
    measured: dict[str, list[float]] = {name: [] for name in loops}
    for turn in range(rounds + 1):
        for name, loop in loops.items():
            result = loop()
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


def peak_memory(of_children: bool = False) -> int:
    """Return the largest resident memory of this process so far, or of one that it started and waited for, in bytes."""
    try:
        import resource  # not on Windows, where psutil knows the peak
    except ImportError:
        return psutil.Process().memory_info().peak_wset
    who = resource.RUSAGE_CHILDREN if of_children else resource.RUSAGE_SELF
    return resource.getrusage(who).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measured_block(dates: Sequence[str] | None = None) -> str:
    """Return the README's section of measured figures from the rows in results/ of these dates, or else the newest."""
    runs, speeds = measured_on(ACCURACY_FILE, dates), measured_on(SPEED_FILE, dates)
    lines = [
        f"<!-- measured on {', '.join(dict.fromkeys([*runs.date, *speeds.date]))} -->",
        "## Measured",
        "",
        "| | median | from – to | n |",
        "|---|---|---|---|",
        line("Fashion-MNIST test accuracy, defaults", runs.test_accuracy * 100, "{:.2f} %"),
        line("training time, validation each epoch included", runs.seconds, "{:.0f} s"),
    ]
    comparison = (speeds["measurement"] == "loop") | ~speeds["unit"].isin(["images/s", "µs"])
    for measured in speeds[comparison].itertuples():  # the rest, of which these are quotients, is in results/
        digits = 0 if measured.median >= 100 else 2
        spread = f"{measured.min:,.{digits}f} – {measured.max:,.{digits}f}" if measured.n > 1 else ""
        lines.append(f"| {measured.what} | {measured.median:,.{digits}f} {measured.unit} | {spread} | {measured.n} |")
    hardware = {machine_in_words(row) for rows in (runs, speeds) for _, row in rows.iterrows()}
    lines += [
        "",
        f"Measured on {'; '.join(sorted(hardware))}. `python cnn.py bench all --accuracy` measures it on yours.",
    ]
    return "\n".join(lines)


def machine_in_words(row: pd.Series) -> str:
    """Return the hardware and software of a row of `append`."""
    gpu = "no GPU was used" if row.device == "cpu" else f"on its GPU, {row.device}"
    return f"{row.cores} cores of an {row.cpu} ({row.instructions}, {row.precision}), torch {row.torch}; {gpu}"


def measured_on(name: str, dates: Sequence[str] | None = None) -> pd.DataFrame:
    """Return the rows of results/`name` of these `dates`, or else the newest of each measurement."""
    rows = pd.read_csv(files.ROOT / "results" / name)
    if dates is not None:
        return rows[rows["date"].isin(dates)]
    kind = rows["measurement"] if "measurement" in rows else pd.Series("accuracy", rows.index)
    return rows[rows["date"] == rows.groupby(kind)["date"].transform("max")]


def line(what: str, values: pd.Series, form: str) -> str:
    """Return a row of the README's table: median, smallest and largest of `values`."""
    low, middle, high = (form.format(value) for value in (values.min(), values.median(), values.max()))
    return f"| {what} | {middle} | {low} – {high} | {len(values)} |"


def write_readme() -> None:
    """Put `measured_block()` between its marks in README.md."""
    files.replace_block(files.ROOT / "README.md", BEGIN, END, measured_block())


def append(path: Path, table: pd.DataFrame, machine: dict[str, str]) -> None:
    """Append `table` to the CSV at `path`, each row with the date, the commit and the machine it was measured on."""
    table = table.assign(date=datetime.now(UTC).isoformat(timespec="seconds"), commit=commit(), **machine)
    before = [pd.read_csv(path)] if path.exists() else []
    files.write_text(path, pd.concat([*before, table]).to_csv(index=False))


def commit() -> str:
    """Return the short name of the commit at hand, with a "+" if files differ from it; "unknown" outside of git."""
    try:
        git = ["git", "-C", str(files.ROOT)]
        name = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True
        ).stdout
        return name + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
