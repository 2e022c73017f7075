"""The full runs: everything put together, on all images, with several seeds; the test images are read once a run.

    full_training.measure(data.load("fashion-mnist"), "full", seeds=range(5))

Their rows are results/full_training.csv: run (the data, and the plan if it is another than "full"), seed, and the
columns of `train.History`. results/full_training.json beside it says what they were measured with, and has their
checksum; the network of the first seed on Fashion-MNIST, which the lessons examine, is in results/full_training/.
"""

import html
import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from scipy import stats
from torch import nn

from utils import checkpoint, data, device, examine, files, record, train
from utils.experiments import FULL, PHOTOS, read_rows, write_rows
from utils.model import CNN, CNNConfig

NAME = "full_training"
SHIPPED = "fashion-mnist"  # whose network is kept
FLIPS = "accuracy with flips"  # mean probabilities of an image and its mirror image (and of `Plan.shift`ed ones)
COLUMNS = ["run", "seed", "epoch", "step", "split", "metric", "value", "seconds"]


@dataclass(frozen=True)
class Plan:
    """What is trained, and how; chosen on the validation images.

    Before a plan's rows were measured, test images had been read by other recipes: by two shorter ones of "photos",
    a shorter one of "long", and of "record" a larger one and one with larger batches. results/test_reads.csv lists all
    readings.
    """

    recipe: train.Recipe
    network: CNNConfig | record.RecordConfig
    shift: int = 0  # pixels of the test-time views, besides mirrored ones
    join: bool = False  # train on the validation images, too: no choice is left that they are needed for

    def config(self, images: data.ImageData) -> CNNConfig | record.RecordConfig:
        """Return the settings of the network for `images`."""
        if isinstance(self.network, record.RecordConfig):
            return self.network
        return replace(self.network, in_channels=images.in_channels, num_classes=images.num_classes)

    def build(self, images: data.ImageData) -> tuple[nn.Module, Callable | None]:
        """Return the network for `images`, and what makes its optimizer (None: `train.make_optimizer`)."""
        if isinstance(self.network, record.RecordConfig):
            return record.network(images, self.network, self.recipe), record.optimizer
        return CNN(self.config(images)), None


RECORD = Plan(record.RECIPE, record.RecordConfig(), shift=1, join=True)
NARROW = replace(RECORD, network=replace(RECORD.network, widths=(32, 128, 160)))
PLANS = {
    "full": Plan(FULL, CNNConfig()),
    "photos": Plan(PHOTOS, CNNConfig()),
    "long": Plan(
        replace(record.RECIPE, epochs=44, batch_size=2000, lr=0.24, weight_decay=2e-6 * 2000, ema=0.95, cutout=8),
        record.RecordConfig(widths=(64, 256, 256), bias_share=1.0, small=20, small_share=0.5),
        shift=1,
        join=True,
    ),
    "record": RECORD,
    "record, first layer learned": replace(RECORD, network=replace(RECORD.network, whiten=False)),
    "record, SGD": replace(RECORD, network=replace(RECORD.network, muon=False)),
    "record, random flips": replace(RECORD, recipe=replace(RECORD.recipe, alternate=False)),
    "record, half as wide": NARROW,
    "record, half as wide, as long": replace(NARROW, recipe=replace(NARROW.recipe, epochs=28)),  # as many seconds
    "record, one size": replace(RECORD, network=replace(RECORD.network, small=0)),
}
BEGIN, END = "<!-- full training: begin -->", "<!-- full training: end -->"  # around the table in README.md


def find(plan: str) -> Plan:
    """Return the plan of this name. Raises ValueError that lists those there are."""
    if plan not in PLANS:
        raise ValueError(f"unknown plan {plan!r}: choose one of {', '.join(PLANS)}")
    return PLANS[plan]


def measure(
    images: data.ImageData, plan: str = "full", seeds: Iterable[int] = range(5), *, progress: bool = True
) -> pd.DataFrame:
    """Train the network of one of `PLANS` on `images` with each of `seeds`; return the rows of these runs: COLUMNS.

    Each run is written to results/ as it ends, in the place of those that the same images had with another recipe or on
    another machine; other images of the same name (another --size) get the beginning of their checksum into the name of
    their runs. Raises what `train.fit` and `ImageData.read_test` raise, ValueError for an unknown plan.
    """
    chosen = find(plan)
    name = images.name if plan == "full" else f"{images.name}, {plan}"
    images = images.join_validation() if chosen.join else images
    known = read()[1]["runs"] if exists() else {}  # rows that are damaged are told before the training, not after it
    if name in known and known[name]["data"]["checksum"] != images.checksum:
        name = f"{name}, images {images.checksum[:6]}"
    for seed in seeds:
        seeded = replace(chosen, recipe=replace(chosen.recipe, seed=seed))
        model, history = train_once(images, seeded, f"python cnn.py full, plan {plan}, seed {seed}", progress)
        save(history.assign(run=name, seed=seed)[COLUMNS], name, described(images, seeded))
        if name == SHIPPED and seed == 0:
            norm = data.input_stats(images.train.images, seeded.recipe.input_norm)
            card = train.card(images, norm, seeded.recipe.epochs, history.last("validation", "accuracy"))
            checkpoint.save_model(folder(), model, card)
    rows, _ = read()
    return rows[rows["run"] == name]


def train_once(images: data.ImageData, plan: Plan, purpose: str, progress: bool) -> tuple[nn.Module, train.History]:
    """Train one network, and return it with its history, to which the accuracy on the test images is added."""
    recipe = plan.recipe
    torch.manual_seed(recipe.seed)
    model, optimizer = plan.build(images)
    history = train.fit(model, images, recipe, progress=progress, optimizer=optimizer)
    test = images.read_test(purpose)
    norm = data.input_stats(images.train.images, recipe.input_norm)
    run, epoch, step, *_, seconds = history.iloc[-1]
    tested = []
    for metric, views in {"accuracy": {}, FLIPS: {"flips": True, "shift": plan.shift}}.items():
        if images.can_flip or not views:
            answers = examine.probabilities(model, test.images, norm, **views).argmax(1)
            accuracy = (answers == test.labels).sum().item() / len(test)
            tested.append([run, epoch, step, "test", metric, accuracy, seconds])
    return model, train.History([*history.to_numpy().tolist(), *tested], columns=train.History.COLUMNS)


def described(images: data.ImageData, plan: Plan) -> dict[str, Any]:
    """Return what decides the rows of a run but for its seed and the code."""
    settings = {name: value for name, value in asdict(plan.recipe).items() if name != "seed"}
    about = {"checksum": images.checksum, "train": len(images.train), "validation": len(images.validation)}
    network = asdict(plan.config(images))
    described = {"recipe": settings, "network": network, "shift": plan.shift, "data": about}
    described["measured_on"] = device.describe()
    return json.loads(json.dumps(described))  # as it is read again: lists, not tuples


def folder() -> Path:
    """Return the folder of the network that the lessons examine, as `checkpoint.load_model` takes it."""
    return files.results_dir() / NAME


def save(rows: pd.DataFrame, run: str, about: dict[str, Any]) -> None:
    """Add the rows of one seed of `run`; those of the same seed go, and those that were measured otherwise."""
    with files.alone(folder()):  # a lock of its own: `write_rows` takes that of its file
        before, known = read() if exists() else (rows.iloc[:0], {"runs": {}})
        same = known["runs"].get(run) == about
        old = (before["run"] == run) & (before["seed"].isin(rows["seed"]) | (not same))
        kept = [part for part in (before[~old], rows) if len(part)]
        table = pd.concat(kept).sort_values(["run", "seed"], kind="stable")
        write_rows(NAME, table, {"runs": known["runs"] | {run: about}})


def exists() -> bool:
    """Return whether there are rows, whole or not."""
    return (files.results_dir() / f"{NAME}.csv").exists()


def read() -> tuple[pd.DataFrame, dict[str, Any]]:
    """Return the shipped rows, COLUMNS, and {"runs": what each run is}. Raises ResultsError."""
    return read_rows(NAME, COLUMNS, "full, after both files are deleted")


def finals(rows: pd.DataFrame) -> pd.DataFrame:
    """Return a row a run: n, mean test accuracy, its 95 % t interval (low, high), that with flips, median seconds."""
    found = []
    for run, group in rows.groupby("run", sort=False):
        test = group[group["split"] == "test"].pivot(index="seed", columns="metric", values="value")
        n, mean = len(test), test["accuracy"].mean()
        half = stats.t.ppf(0.975, n - 1) * test["accuracy"].std() / n**0.5 if n > 1 else math.nan
        flips = test[FLIPS].mean() if FLIPS in test else math.nan
        seconds = group.groupby("seed")["seconds"].max().median()
        found.append([run, n, mean, mean - half, mean + half, flips, seconds])
    return pd.DataFrame(found, columns=["run", "n", "accuracy", "low", "high", FLIPS, "seconds"])


def whole(rows: pd.DataFrame) -> pd.DataFrame:
    """Return `rows` without those of the record with an idea left out, which lesson 7 compares."""
    left_out = "|".join(re.escape(plan) for plan in PLANS if plan.startswith("record, "))
    return rows[~rows["run"].str.contains(rf", (?:{left_out})(?:, images \w+)?$")]


def table(rows: pd.DataFrame) -> str:
    """Return the runs in `rows` as the README shows them."""
    lines = [
        "| all parts together, on | test accuracy (95 % interval) | with test-time augmentation | n | time, median |",
        "|---|---|---|---|---|",
    ]
    for row in finals(rows).itertuples(index=False):
        run, n, mean, low, high, flips, seconds = row
        interval = f"{100 * mean:.2f} %" + (f" ({100 * low:.2f} to {100 * high:.2f})" if n > 1 else "")
        flipped = "" if math.isnan(flips) else f"{100 * flips:.2f} %"
        name = html.escape(run, quote=False).replace("|", r"\|")
        lines.append(f"| {name} | {interval} | {flipped} | {n} | {seconds:.0f} s |")
    return "\n".join(lines)
