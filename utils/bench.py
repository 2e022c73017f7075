"""How fast the training loop is: against the loop that people paste, and against what the machine can multiply."""

import gzip
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import pandas as pd
import psutil
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from utils import data, device, files, train
from utils.model import CNN, CNNConfig

SPEED_FILE = "speed.csv"
ACCURACY_FILE = "accuracy.csv"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"  # of the README's section
PEAK_SIDE = 4096  # side of the square matrices whose product measures the peak


def speed(rounds: int = 5, images: int = 12_288) -> pd.DataFrame:
    """Measure both loops `rounds` times in turn, print the table, append it to results/speed.csv and return its rows.

    Same network, batch size, augmentation and optimizer in both, on `images` training images. Each loop has a process
    of its own, so that neither gets the other's settings; a first round warms up and is not counted. Raises ValueError
    for fewer than one round or than one batch of images.
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds}: expected at least 1")
    if images < train.Recipe.batch_size:
        raise ValueError(f"images={images}: expected at least one batch, {train.Recipe.batch_size}")
    where, precision = device.pick(), device.pick_precision(device.pick())
    with tempfile.TemporaryDirectory() as folder, own_process() as usual, own_process() as course:
        lay_out_for_torchvision(Path(folder))
        tries = {n: partial(lambda n: usual.submit(usual_speed, folder, images, n).result(), n) for n in (0, 2)}
        workers = max((speeds, n) for n, speeds in interleave(tries, rounds=1).items())[1]
        loops = {
            "usual": lambda: usual.submit(usual_speed, folder, images, workers).result(),
            "course": lambda: course.submit(course_speed, images).result(),
        }
        measured = interleave(loops, rounds)
        memory = {"usual": usual.submit(peak_memory).result(), "course": course.submit(peak_memory).result()}
    peak = matmul_peak(where, precision)
    starts = [seconds_to_first_step() for _ in range(rounds)]
    flops = step_flops(CNNConfig(), data.load().image_size)
    ratios = [ours / theirs for ours, theirs in zip(measured["course"], measured["usual"], strict=True)]
    rows = [
        row(f"usual loop, {workers} workers, fp32", "images/s", measured["usual"]),
        row(f"the course's loop, {precision}", "images/s", measured["course"]),
        row("ratio of the two", "×", ratios),
        row(f"peak of the {precision} matrix product", "GFLOP/s", [peak / 1e9]),
        row("the course's loop, share of that peak", "%", [100 * speed * flops / peak for speed in measured["course"]]),
        row("from `python cnn.py` to the first step", "s", starts),
        row("usual loop, memory", "GB", [memory["usual"] / 1e9]),
        row("the course's loop, memory", "GB", [memory["course"] / 1e9]),
    ]
    table = pd.DataFrame(rows)
    print(table.to_string(index=False, float_format=lambda value: f"{value:,.2f}"))
    machine = device.describe()
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    append(files.results_dir() / SPEED_FILE, table, machine)
    return table


def seconds_to_first_step() -> float:
    """Return the seconds from the command `python cnn.py` until its first step, weights updated, is done."""
    stop = "import os; from utils import train; train.tqdm.update = lambda *_: os._exit(0); import cnn; cnn.main()"
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        command = [sys.executable, "-c", stop, "train", "--out", folder]
        subprocess.run(command, cwd=files.ROOT, check=True, capture_output=True)
        return time.perf_counter() - begin


def own_process() -> ProcessPoolExecutor:
    """Return an executor of one fresh process."""
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


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


def course_speed(images: int) -> float:
    """Return the images per second of `train.fit` over one epoch of `images` images."""
    recipe = train.Recipe(epochs=1)
    torch.manual_seed(recipe.seed)
    history = train.fit(CNN(CNNConfig()), data.load().take(images), recipe, progress=False)
    return history.last("train", "images_per_second")


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


def usual_speed(folder: str, images: int, workers: int) -> float:
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


def step_flops(config: CNNConfig, image_size: tuple[int, int]) -> float:
    """Return the FLOPs (2 × multiply-adds) of training on one image: forward and backward, as PyTorch counts them."""
    with FlopCounterMode(display=False) as counter:
        CNN(config)(torch.zeros(2, config.in_channels, *image_size)).sum().backward()
    return counter.get_total_flops() / 2


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


def peak_memory() -> int:
    """Return the largest resident memory of this process so far, in bytes."""
    try:
        import resource  # not on Windows, where psutil knows the peak
    except ImportError:
        return psutil.Process().memory_info().peak_wset
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measured_block(accuracy_date: str | None = None, speed_date: str | None = None) -> str:
    """Return the README's section of measured figures from the rows in results/ of these dates, or else the newest."""
    runs = measured_on(ACCURACY_FILE, accuracy_date)
    loops = measured_on(SPEED_FILE, speed_date)
    lines = [
        f"<!-- {ACCURACY_FILE} of {runs.date.iloc[0]}, {SPEED_FILE} of {loops.date.iloc[0]} -->",
        "## Measured",
        "",
        "| | median | from – to | n |",
        "|---|---|---|---|",
        line("Fashion-MNIST test accuracy, defaults", runs.test_accuracy * 100, "{:.2f} %"),
        line("training time, validation each epoch included", runs.seconds, "{:.0f} s"),
    ]
    for loop in loops.itertuples():
        digits = 0 if loop.median >= 100 else 2
        spread = f"{loop.min:,.{digits}f} – {loop.max:,.{digits}f}" if loop.n > 1 else ""
        lines.append(f"| {loop.what} | {loop.median:,.{digits}f} {loop.unit} | {spread} | {loop.n} |")
    hardware = {machine_in_words(rows.iloc[0]) for rows in (runs, loops)}
    lines += ["", f"Measured on {'; '.join(sorted(hardware))}. `python cnn.py bench --accuracy` measures it on yours."]
    return "\n".join(lines)


def machine_in_words(row: pd.Series) -> str:
    """Return the hardware and software of a row of `append`."""
    gpu = "no GPU was used" if row.device == "cpu" else f"on its GPU, {row.device}"
    return f"{row.cores} cores of an {row.cpu} ({row.instructions}, {row.precision}), torch {row.torch}; {gpu}"


def measured_on(name: str, date: str | None) -> pd.DataFrame:
    """Return the rows of results/`name` of one measurement: that of `date`, or the newest."""
    rows = pd.read_csv(files.ROOT / "results" / name)
    return rows[rows["date"] == (date or rows["date"].iloc[-1])]


def line(what: str, values: pd.Series, form: str) -> str:
    """Return a row of the README's table: median, smallest and largest of `values`."""
    low, middle, high = (form.format(value) for value in (values.min(), values.median(), values.max()))
    return f"| {what} | {middle} | {low} – {high} | {len(values)} |"


def write_readme() -> None:
    """Put `measured_block()` between its marks in README.md."""
    path = files.ROOT / "README.md"
    before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    files.write_text(path, f"{before}{BEGIN}\n{measured_block()}\n{END}{after}")


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
