"""The lessons of the course: what each is about, where it opens, and how long it takes; the table in the README."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from utils import bench, files, links

BEGIN, END = "<!-- lessons: begin -->", "<!-- lessons: end -->"
ABOUT = {  # three sentences each: what it asks, what you do, what you will see
    "00_start_here": (
        "What is inside the network, and does it learn? It is built in 60 lines, each piece checked against the "
        "course's own; what a block computes and a training step are yours to write. Then your machine is measured."
    ),
    "01_data_statistics": (
        "Which numbers normalize the input, and what for? You compute them over millions of pixels without losing "
        "digits. Then you see what the scale of the input does to the loss surface, and what it does to training."
    ),
    "02_size_and_pooling": (
        "Why double the channels and halve the image? You follow one image through the network and count what "
        "each part costs. Then other shapes compete, at equal cost, and you see what pooling loses."
    ),
    "03_batch_normalization": (
        "What does normalizing each batch bring, and when? You write it from scratch, backward pass included. "
        "Then you look for where it fails: tiny batches, the wrong mode, statistics that lag behind."
    ),
    "04_residual_gradient_flow": (
        "Does a gradient get lost in 100 layers, and is that why they do not train? You measure it in every "
        "layer of eight kinds of networks. Then you look at the loss surfaces of plain and of residual networks."
    ),
    "05_dropout_and_initialization": (
        "Where does noise help, and how large should weights begin? You derive both variances and check them. "
        "Then dropout is tried in three ways against none, with many images and with few."
    ),
    "06_full_training": (
        "How good is the network, and how do you know? You keep a ledger of improvements, "
        "and read one final number, once. Then you look into the trained network, and show it an image of yours."
    ),
    "07_training_fast": (
        "Where do the milliseconds of a step go, and what makes them fewer? You take the usual loop apart and add "
        "one trick at a time. A roofline tells which layers calculate, and which hardly do."
    ),
    "08_compare_ablations": (
        "Which decision earned its place, and how many runs does it take to know? All experiments of the course "
        "stand side by side. You pick, sort and compare, and do the same with runs of your own."
    ),
}


def prose(name: str, root: Path = files.ROOT) -> str:
    """Return the text cells of a lesson ("01_data_statistics"), of its notebook: a handout has no text twin."""
    cells = json.loads((root / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def title(name: str, root: Path = files.ROOT) -> str:
    """Return the title of a lesson: what stands in its first heading, before the colon."""
    for line in prose(name, root).splitlines():
        if line.startswith("# "):
            return line.removeprefix("# ").partition(":")[0]
    raise ValueError(f"notebooks/{name}.ipynb has no heading: expected a line of text that begins with '# '")


def seconds(rows: pd.DataFrame) -> dict[str, float]:
    """Return how long each lesson ran from a fresh kernel, by `rows` of results/speed.csv."""
    return measured(rows, "lessons", "s", "")


def memory(rows: pd.DataFrame) -> dict[str, float]:
    """Return how many GB each lesson took."""
    return measured(rows, "lessons", "GB", ", memory")


def on_one_core(rows: pd.DataFrame) -> dict[str, float]:
    """Return how many seconds each lesson ran on one core without bf16 instructions."""
    return measured(rows, "one_core", "s", ", one core, AVX2 only")


def measured(rows: pd.DataFrame, measurement: str, unit: str, suffix: str) -> dict[str, float]:
    """Return a value a lesson of what `bench` has measured."""
    rows = rows[(rows["measurement"] == measurement) & (rows["unit"] == unit)]
    names = rows["what"].str.removeprefix("lesson ").str.removesuffix(suffix)
    return dict(zip(names, rows["median"], strict=True))


def reading(name: str, root: Path = files.ROOT) -> int:
    """Return how many minutes of reading the head of a lesson promises."""
    found = re.search(r"Reading takes about (\d+) minutes", " ".join(prose(name, root).split()))
    if found is None:
        raise ValueError(f"notebooks/{name}.ipynb lacks the sentence 'Reading takes about N minutes'")
    return int(found[1])


def expected(images_per_second: float) -> dict[str, float]:
    """Return about how many `seconds` each lesson takes where a CPU trains the network at so many images per second.

    All of it is taken to slow down as training does, though the rest does so less; a faster machine is promised
    nothing, for the rest may be no faster there.
    """
    rows = bench.shipped()  # of the machine that the lessons were timed on, which is not the reader's
    loop = rows[(rows["measurement"] == "loop") & (rows["unit"] == "images/s")]
    there = loop[loop["what"].str.startswith("the course's loop, ")]["median"].item()
    slower = max(1.0, there / images_per_second)
    return {name: slower * time for name, time in seconds(rows).items()}


def table(took: Mapping[str, float], memory: Mapping[str, float], alone: Mapping[str, float]) -> str:
    """Return as Markdown a row for each lesson; `took` and `memory` are the seconds and GB that it takes to run.

    `alone` are the seconds on one core without bf16 instructions, as Binder lends it.
    """
    lines = [
        "| no. | lesson | what you do | reading | running | memory | open it on |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, about in ABOUT.items():
        number = str(int(name[:2]))
        time, space = f"{took[name]:.0f} s", f"{memory[name]:.1f} GB"
        cells = (number, f"[{title(name)}](notebooks/{name}.ipynb)", about, f"{reading(name)} min", time, space)
        lines.append(f"| {' | '.join(cells)} | {links.in_words(name)} |")
    slow = f"{min(alone.values()):.0f} to {max(alone.values()):.0f} s"
    hours = sum(map(reading, ABOUT)) / 60
    lines += ["", f"To read all of them takes some {hours:.0f} hours; the exercises come on top."]
    lines += [f"On one core without bf16 instructions, which is about what Binder lends, they run for {slow}."]
    return "\n".join(lines)


def write_readme() -> None:
    """Write the table into README.md, by the newest rows."""
    rows = bench.measured_on()
    files.replace_block(files.ROOT / "README.md", BEGIN, END, table(seconds(rows), memory(rows), on_one_core(rows)))
