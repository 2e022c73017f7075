"""What the reader sees: one style, one colour a variant, and the figures that more than one lesson draws."""

import base64
import html
import io
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, Rectangle
from PIL import Image
from scipy import stats
from torch import Tensor

from utils import ablation, evidence, files, train, widgets
from utils.data import Split
from utils.model import CNN, evaluating, parts

BLUE, ORANGE, GREEN, VERMILION, SKY = "#0173b2", "#de8f05", "#029e73", "#d55e00", "#56b4e9"  # seaborn's "colorblind"
NAVY, BROWN = "#332288", "#7b3f00"  # where five colours and grey are not enough
INK, DARK, GREY = "#333333", "#555555", "#949494"

# Blue is what the course's network does, dark grey is going without, other colours are other ways to do it.
FAMILIES: dict[str, dict[str, str]] = {
    "split": {"train": BLUE, "validation": ORANGE, "test": GREEN},
    "norm": {"batch": BLUE, "layer": ORANGE, "group": GREEN, "none": DARK},
    "residual": {"residual": BLUE, "plain": DARK},
    "init": {"he": BLUE, "xavier": ORANGE, "default": GREEN},
    "gain": {"he": BLUE, "xavier": ORANGE, "default": GREEN, "too small": SKY, "too large": DARK},
    "growth": {"double": BLUE, "quadruple": ORANGE, "constant": GREEN, "flat": DARK},
    "pool": {"max": BLUE, "average": ORANGE, "stride": GREEN},
    "pooling": {"max": BLUE, "max everywhere": SKY, "average": ORANGE, "stride": GREEN},
    "dropout_where": {"none": DARK, "head": ORANGE, "everywhere": GREEN, "channels": SKY},
    "input_norm": {"data set": BLUE, "per-image": ORANGE, "0.5-0.5": GREEN, "0-255": SKY, "0-1": DARK},
    "ledger": {
        "start": DARK,
        "one-cycle": ORANGE,
        "weight decay": GREEN,
        "flips": SKY,
        "crops": NAVY,
        "label smoothing": BROWN,
        "averaged weights": BLUE,
    },
    "training": {"no augmentation": DARK, "flips and crops": BLUE, "label smoothing": BROWN},
}
COLORS = {variant: colour for family in FAMILIES.values() for variant, colour in family.items()}

VERDICTS = {"supported": (BLUE, "o"), "inconclusive": (GREY, "s"), "refuted": (VERMILION, "D")}  # colour and marker

PLAIN = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # behind text that would cross a line

DPI = 150  # of a saved figure; a notebook shows it at 100 pixels an inch, so that it stays sharp on a fine screen
SHOWN_DPI = 100


def color(variant: str) -> str:
    """The colour of `variant` in every figure, as "#rrggbb". Raises ValueError that lists the variants there are."""
    if variant not in COLORS:
        raise ValueError(
            f"no colour for variant {variant!r}: choose one of {', '.join(COLORS)}, or add it to plots.FAMILIES"
        )
    return COLORS[variant]


def plain(name: str) -> str:
    """Return a name that comes from data as matplotlib draws it: "$" starts no formula, what is no text is a "?"."""
    return re.sub(r"(?<!\\)\$", r"\\$", name).encode(errors="replace").decode()


def use_style() -> None:
    """Sets the course's figure style: seaborn's, with text that can be read when the figure is 600 pixels wide."""
    sns.set_theme(
        context="notebook",
        style="ticks",
        palette="colorblind",
        rc={
            "figure.figsize": (7.2, 3.2),
            "figure.dpi": SHOWN_DPI,
            "figure.constrained_layout.use": True,
            "font.family": "DejaVu Sans",  # it comes with matplotlib, so that every machine draws the same letters
            "font.size": 11,
            "axes.titlesize": 11,
            "axes.labelsize": 11,
            "xtick.labelsize": 10,
            "ytick.labelsize": 10,
            "legend.fontsize": 10,
            "legend.frameon": False,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": INK,
            "text.color": INK,
            "axes.labelcolor": INK,
            "xtick.color": INK,
            "ytick.color": INK,
            "image.cmap": "gray",
        },
    )


def save(fig: Figure, name: str, alt: str = "", show: bool = True) -> None:
    """Writes `fig` to `name`.png in figures/ (or $CNN_FIGURES_DIR), shows that very file in the notebook, closes `fig`.

    `alt` says what is drawn, for readers who cannot see it; what is shown needs one (tested). The file has no date and
    256 colours: drawn again, it is the same to the last byte, and it stays below 150 kB. `show=False` is for a figure
    that a live display shows already. Where nothing can be written, a figure to show is shown with a warning; else
    raises OSError.
    """
    content = png(fig)
    plt.close(fig)
    try:
        files.write_bytes(files.figures_dir() / f"{name}.png", content)
    except OSError as error:
        if not show:
            raise
        warnings.warn(f"the figure is shown, but not kept: {error.strerror or error}", stacklevel=2)
    if show:
        show_png(content, alt)


def png(fig: Figure) -> bytes:
    """The figure as a PNG file at `DPI`, cut to what is drawn, in 256 colours, the same bytes at every call."""
    small = io.BytesIO()
    image = Image.open(io.BytesIO(quick_png(fig, bbox_inches="tight", pad_inches=0.08))).convert("RGB")
    image.quantize(256, dither=Image.Dither.NONE).save(small, format="PNG", optimize=True)
    return small.getvalue()


def quick_png(fig: Figure, **options) -> bytes:
    """The figure as a PNG file at `DPI`, for a display that must answer at once; `options` go to `savefig`."""
    content = io.BytesIO()
    fig.savefig(content, format="png", dpi=DPI, metadata={"Software": None}, **options)
    return content.getvalue()


def show_png(content: bytes, text: str, handle: Any = None) -> Any:
    """Shows a PNG file as a cell's output; `text` is its alternative text. Does nothing outside Jupyter.

    Returns a handle; given back with other content, it replaces the picture where it stands.
    """
    from IPython import get_ipython
    from IPython.display import display

    if get_ipython() is None:
        return None
    width = round(Image.open(io.BytesIO(content)).width * SHOWN_DPI / DPI)
    picture = {"image/png": base64.b64encode(content).decode(), "text/plain": text}
    metadata = {"image/png": {"width": width, "alt": text}}
    if handle is not None:
        handle.update(picture, raw=True, metadata=metadata)
        return handle
    return display(picture, raw=True, metadata=metadata, display_id=True)


def described(fig: Figure, what: str) -> str:
    """Return an alternative text for `fig`: `what` it is of, then title and axis labels of each panel."""
    panels = []
    for ax in fig.axes:
        title = " ".join(filter(None, (ax.get_title(side) for side in ("left", "center", "right"))))
        axes = " against ".join(filter(None, (ax.get_ylabel(), ax.get_xlabel())))
        panels.append(": ".join(filter(None, (title, axes))))
    return " ".join("; ".join([what, *filter(None, dict.fromkeys(panels))]).replace(r"\$", "$").split())


def explore(draw: Callable[[Any], Figure], label: str, values: Mapping[str, Any], start: str) -> None:
    """Shows a slider over `values` (text → value) and, below it, the figure that `draw` makes of the chosen value.

    The figure of `start` is an ordinary picture in the notebook, which also reads without a kernel. A figure is drawn
    once and then kept. Raises ValueError when `start` is not one of `values`.
    """
    explore_several(draw, {label: values}, {label: start})


def explore_several(
    draw: Callable[..., Figure], choices: Mapping[str, Mapping[str, Any]], start: Mapping[str, str]
) -> None:
    """Shows a slider for each of `choices` (label → text → value), and the figure that `draw` makes of their values.

    `draw` gets the values in the order of `choices`. What `explore` says of its one slider holds for these.
    """
    import ipywidgets

    for label, values in choices.items():
        if start.get(label) not in values:
            raise ValueError(f"{label}: start={start.get(label)!r}: choose one of {', '.join(values)}")

    @lru_cache(maxsize=200)
    def picture(*texts: str) -> tuple[bytes, str]:
        fig = draw(*(values[text] for values, text in zip(choices.values(), texts, strict=True)))
        plt.close(fig)
        chosen = ", ".join(f"{label} {text}" for label, text in zip(choices, texts, strict=True))
        return quick_png(fig), described(fig, chosen)

    def show_chosen(handle: Any = None) -> Any:
        return show_png(*picture(*(slider.value for slider in sliders)), handle)

    width = "initial" if len(choices) == 1 else f"{0.62 * max(map(len, choices)):.1f}em"  # the same for all: aligned
    sliders = [
        ipywidgets.SelectionSlider(
            options=list(values),
            value=start[label],
            description=label,
            layout={"width": "95%"},
            style={"description_width": width},
        )
        for label, values in choices.items()
    ]
    slider_or_sliders = "slider" if len(choices) == 1 else "sliders"
    widgets.show(ipywidgets.VBox(sliders), f"(Run this cell to move the {slider_or_sliders}: {', '.join(choices)}.)")
    handle = show_chosen()
    for slider in sliders:
        slider.observe(lambda _: show_chosen(handle), "value")


def show_image(ax: Axes, image: Tensor, title: str = "", **options) -> None:
    """Draws one image, C×H×W or H×W with 1 or 3 channels, uint8 or 0-1 floats, into `ax` without ticks.

    Grey pixels go from black at 0 to white at the largest value of their type, unless `options` (vmin, vmax, cmap, …
    of matplotlib's imshow) say otherwise.
    """
    top = 255 if image.dtype == torch.uint8 else 1.0
    pixels = image.permute(1, 2, 0).squeeze(2) if image.ndim == 3 else image  # H×W×3 or H×W
    ax.imshow(pixels.numpy(), **{"vmin": 0, "vmax": top, "interpolation": "nearest"} | options)
    ax.set(xticks=[], yticks=[], title=title)
    sns.despine(ax=ax, left=True, bottom=True)


def samples(split: Split, class_names: Sequence[str], per_class: int = 10) -> Figure:
    """A row a class, with its name: its first `per_class` images."""
    channels, height, width = split.images.shape[1:]
    grid = torch.full((len(class_names), per_class, channels, height + 2, width + 2), 255, dtype=torch.uint8)
    for label in range(len(class_names)):
        for column, image in enumerate(split.images[split.labels == label][:per_class]):
            grid[label, column, :, 1:-1, 1:-1] = image
    picture = grid.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)  # C×(rows·H)×(columns·W)
    fig, ax = plt.subplots(figsize=(7.2, 6.2 * picture.shape[1] / picture.shape[2]))
    show_image(ax, picture)
    ax.set_yticks([(row + 0.5) * (height + 2) - 0.5 for row in range(len(class_names))], map(plain, class_names))
    ax.tick_params(left=False)
    ax.set_title(f"n = {len(split):,} images, the first {per_class} of each class", loc="left")
    return fig


def history(history: pd.DataFrame, fig: Figure | None = None) -> Figure:
    """The loss and the accuracy of each split over the epochs of a `train.History`, labelled at the ends of the lines.

    With `fig`, that figure is cleared and drawn anew, for a display that follows the training. Several runs are several
    lines of the same colour.
    """
    fig = fig or plt.figure(figsize=(7.2, 3.0))
    fig.clear()
    axes = fig.subplots(1, 2)
    epochs = int(history["epoch"].max())
    for ax, metric, unit in zip(axes, ("loss", "accuracy"), ("cross-entropy, nats", "% correct"), strict=True):
        last = {}
        for (split, run), rows in history[history["metric"] == metric].groupby(["split", "run"], sort=False):
            values = rows["value"].to_numpy() * (100 if metric == "accuracy" else 1)
            ax.plot(rows["epoch"], values, "o-", ms=4, lw=1.8, color=color(split), label=f"{run} {split}")
            last[split] = values[-1]
        for split, height in spread(last, ax).items():
            ax.text(epochs * 1.03, height, split, color=color(split), va="center", fontsize=10, fontweight="bold")
        ax.set(xlabel="epoch", ylabel=f"{metric} ({unit})", xlim=(0, epochs * 1.01))
        ax.xaxis.get_major_locator().set_params(integer=True)
    return fig


def progress(history: pd.DataFrame, fig: Figure | None = None) -> Figure:
    """What `history` shows, and below it the learning rate and the speed, over the epochs of a `train.History`.

    With `fig`, that figure is cleared and drawn anew, as `history` does it. Several runs are several lines.
    """
    fig = fig or plt.figure(figsize=(7.2, 4.6))
    fig.clear()
    panels = {"loss": "loss (nats)", "accuracy": "accuracy (%)", "lr": "learning rate", "images_per_second": "images/s"}
    epochs = int(history["epoch"].max())
    for ax, (metric, label) in zip(fig.subplots(2, 2).flat, panels.items(), strict=True):
        of_split = metric in ("loss", "accuracy")
        last = {}
        for (split, _), rows in history[history["metric"] == metric].groupby(["split", "run"], sort=False):
            values = rows["value"].to_numpy() * (100 if metric == "accuracy" else 1)
            ax.plot(rows["epoch"], values, "o-", ms=3, lw=1.5, color=color(split) if of_split else INK)
            last[split] = values[-1]
        for split, height in spread(last, ax).items() if of_split else ():
            ax.text(epochs * 1.04, height, split, color=color(split), va="center", fontsize=10, fontweight="bold")
        ax.set(xlabel="epoch", ylabel=label, xlim=(0, epochs * 1.01))
        ax.xaxis.get_major_locator().set_params(integer=True)
        if not of_split:
            ax.set_ylim(0, 1.08 * ax.dataLim.ymax or None)  # None: of a run of one epoch, whose last rate is 0
    return fig


def colors_of(variants: Sequence[str]) -> dict[str, str]:
    """A colour for each variant: its own everywhere, or, where it has none, one that no other here has."""
    free = [shade for shade in (BLUE, ORANGE, GREEN, VERMILION, SKY, DARK) if shade not in map(COLORS.get, variants)]
    if len(free) < len([variant for variant in variants if variant not in COLORS]):
        raise ValueError(f"{len(variants)} variants in one figure: expected at most 6, so that they can be told apart")
    return {variant: COLORS.get(variant) or free.pop(0) for variant in variants}


def compare(
    runs: pd.DataFrame, metric: str = "validation accuracy", baseline: str | None = None, *, margin: float = 0.0
) -> Figure:
    """Learning curves of `ablation.run`'s variants with 95 % bands over the seeds, and their paired differences.

    The differences are those of `evidence.compare`, from `baseline` (None: the last variant); a dashed line is the
    `margin`. Accuracies are shown in percent. A run that diverged is told beside its variant's name.
    """
    variants = list(dict.fromkeys(runs["variant"]))
    shades, baseline = colors_of(variants), baseline or variants[-1]
    rows = evidence.compare(runs, baseline, metric, margin=margin)
    fig, (left, right) = plt.subplots(1, 2, figsize=(7.2, 3.2), width_ratios=[3, 2])
    draw_curves(left, runs, metric, shades)
    draw_forest(right, rows, shades, margin * scale_of(metric))
    return fig


def experiment(runs: pd.DataFrame, metric: str = "validation accuracy") -> Figure:
    """What `compare` draws, for the runs of a whole experiment: of a grid, a row for each value of its second field.

    Differences are from the last variant. Verdicts are left to `experiments.claims`, which knows the course's others.
    """
    values = list(dict.fromkeys(name.partition(", ")[2] for name in runs["variant"]))
    height = max(3.4, 0.9 * runs["variant"].nunique() / len(values))  # inches: room for the words on each difference
    fig, axes = plt.subplots(len(values), 2, figsize=(7.2, height * len(values)), width_ratios=[3, 2], squeeze=False)
    for value, (left, right) in zip(values, axes, strict=True):
        part = ablation.facet(runs, value) if value else runs
        variants = list(dict.fromkeys(part["variant"]))
        rows = evidence.compare(part, variants[-1], metric).drop(columns="verdict")
        draw_curves(left, part, metric, colors_of(variants), gap=0.09 * 3.4 / height)
        draw_forest(right, rows, colors_of(variants), 0.0)
        left.set_title(f"{value}: {left.get_title('left')}".removeprefix(": "), loc="left")
    return fig


def scale_of(metric: str) -> float:
    """100 for an accuracy, which is shown in percent, else 1."""
    return 100.0 if metric.endswith("accuracy") else 1.0


def draw_curves(ax: Axes, runs: pd.DataFrame, metric: str, shades: Mapping[str, str], gap: float = 0.09) -> None:
    """Draws the mean of `metric` over the seeds against the epoch, with its 95 % t interval, a line a variant.

    `gap`: what the variants' names are apart at least, as a share of the axis.
    """
    split, _, name = metric.partition(" ")
    unit = "% correct" if name == "accuracy" else "cross-entropy, nats"
    last, epochs = {}, int(runs["epoch"].max())
    for variant, shade in shades.items():
        of_variant = runs[(runs["variant"] == variant) & (runs["split"] == split) & (runs["metric"] == name)]
        values = scale_of(metric) * of_variant.pivot(index="epoch", columns="seed", values="value")
        mean, half = values.mean(axis=1), half_intervals(values)
        ax.plot(mean.index, mean, "o-", color=shade, lw=1.8, ms=4)
        ax.fill_between(mean.index, mean - half, mean + half, color=shade, alpha=0.25, lw=0)
        if len(mean):
            last[variant] = mean.iloc[-1]
    broken = runs[(runs["metric"] == train.DIVERGED) & (runs["value"] > 0)].groupby("variant").size()
    for variant, height in spread(last, ax, gap).items():
        label = f"{variant} ({broken[variant]} diverged)" if variant in broken else variant
        ax.text(epochs * 1.04, height, plain(label), color=shades[variant], va="center", fontsize=10, fontweight="bold")
    ax.set(xlabel="epoch", ylabel=f"{metric} ({unit})", xlim=(0.8, epochs * 1.02))
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set_title(f"mean of {runs['seed'].nunique()} seeds, 95 % band", loc="left")


def half_intervals(values: pd.DataFrame) -> pd.Series:
    """Half of the 95 % t interval of each row's mean; 0 for a single value."""
    n = values.count(axis=1)
    return (stats.t.ppf(0.975, (n - 1).clip(lower=1)) * values.std(axis=1) / n**0.5).fillna(0)


def draw_forest(ax: Axes, rows: pd.DataFrame, shades: Mapping[str, str], margin: float) -> None:
    """Draws each difference of `evidence.compare` with interval and n, and says its verdict, or else the interval."""
    factor = scale_of(rows["metric"].iloc[0])
    for place, row in enumerate(rows.itertuples()):
        shade = shades[row.variant]
        ax.plot([factor * row.low, factor * row.high], [place, place], color=shade, lw=3, solid_capstyle="butt")
        ax.plot(factor * row.difference, place, "o", color=shade, ms=7)
        label = f"{row.variant} − {row.baseline}, n = {row.n}"
        interval = f" ({factor * row.low:+.2f} to {factor * row.high:+.2f})"
        verdict = f": {row.verdict}" if "verdict" in rows else interval
        ax.annotate(
            plain(label),
            (0, place),
            (0, 12),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            fontsize=10,
            bbox=PLAIN,
        )
        ax.annotate(
            f"{factor * row.difference:+.2f}{verdict}",
            (0, place),
            (0, -20),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            fontsize=10,
            bbox=PLAIN,
            color=shade,
            fontweight="bold",
        )
    ax.axvline(0, color=GREY, lw=1)
    if margin:
        ax.axvline(margin, color=GREY, lw=1, ls="--")
    ax.set(ylim=(len(rows) - 0.4, -0.6), yticks=[], xlabel="difference, points" if factor == 100 else "difference")
    ax.spines["left"].set_visible(False)
    ax.set_title("paired by seed, 95 % interval", loc="left")


def claims(table: pd.DataFrame) -> Figure:
    """All rows of `experiments.claims` on one scale, by lesson: difference, 95 % interval, margin, n and verdict.

    The axis, in accuracy points, is linear between −1 and 1 and logarithmic beyond.
    """
    fig, ax = plt.subplots(figsize=(2.9, 0.4 * len(table) + 0.5 * table["lesson"].nunique()), layout="none")
    height, across = 0.0, {"transform": ax.get_yaxis_transform()}
    for lesson, rows in table.groupby("lesson", sort=False):
        ax.text(-1.3, height, f"lesson {int(lesson[:2])}", va="center", fontweight="bold", **across)
        ax.plot([-1.3, 1.4], [height - 0.7] * 2, color="0.85", lw=1, clip_on=False, **across)
        for place, row in enumerate(rows.itertuples(), start=1):
            draw_claim(ax, height + place, row)
        height += len(rows) + 1.4
    ax.axvline(0, color=GREY, lw=1)
    ax.set_xscale("symlog", linthresh=1, linscale=0.7)
    ax.set(ylim=(height, -1), yticks=[], xlabel="difference, points")
    ax.set_xticks([-10, -1, 0, 1, 10, 50], ["−10", "−1", "0", "1", "10", "50"])
    ax.minorticks_off()
    ax.spines["left"].set_visible(False)
    for verdict, (shade, marker) in VERDICTS.items():
        ax.plot([], [], marker + "-", color=shade, label=f"{verdict}: {(table['verdict'] == verdict).sum()}")
    ax.legend(loc="lower center", bbox_to_anchor=(0.2, 1), ncols=3)
    return fig


def draw_claim(ax: Axes, height: float, row: Any) -> None:
    """Draws one row of `experiments.claims` at this height: its words, difference, interval, margin, and numbers."""
    words = draw_difference(ax, height, row, 0.3)
    beside = {"transform": ax.get_yaxis_transform(), "va": "center", "fontsize": 10}
    width = 43 if len(row.claim) <= 43 else len(row.claim) // 2 + 7  # two lines of about equal length
    ax.text(-0.02, height, fill(row.claim, width), ha="right", linespacing=1.0, **beside)
    ax.text(1.02, height, f"{100 * row.difference:+.1f}, n = {row.n}", color=words, **beside)


def draw_difference(ax: Axes, height: float, row: Any, tick: float) -> str:
    """Draws difference, interval and margin (of half-height `tick`) of a row of `experiments.claims`, in points.

    Returns the colour for words about it.
    """
    shade, marker = VERDICTS[row.verdict]
    ax.plot([100 * row.low, 100 * row.high], [height, height], color=shade, lw=2.5, solid_capstyle="butt")
    ax.plot(100 * row.difference, height, marker, color=shade, ms=6)
    ax.plot([100 * row.margin] * 2, [height - tick, height + tick], color=INK, lw=1.5)
    return DARK if row.verdict == "inconclusive" else shade


def lr_sweep(runs: pd.DataFrame, metric: str = "validation accuracy") -> Figure:
    """The last value of `metric` against the learning rate, a line a variant: mean over the seeds, and their range.

    A run that diverged counts as guessing, as in `evidence.finals`.
    """
    shades = colors_of(list(dict.fromkeys(runs["variant"])))
    fig, ax = plt.subplots(figsize=(7.2, 3.2))
    lines = []
    for place, (variant, shade) in enumerate(shades.items()):
        of_variant, finals = runs[runs["variant"] == variant], {}
        for lr, group in of_variant.groupby("lr"):
            group.attrs = runs.attrs
            finals[lr] = scale_of(metric) * evidence.finals(group, metric)[variant]
        table = pd.DataFrame(finals).T  # a row a learning rate, a column a seed
        wider = len(shades) - place - 1  # what is drawn over shows at the sides
        looks = {"color": shade, "lw": 1.6 + 0.9 * wider, "ms": 4.5 + 1.2 * wider}
        lines += ax.plot(table.index, table.mean(axis=1), "o-", label=plain(variant), **looks)
        ax.fill_between(table.index, table.min(axis=1), table.max(axis=1), color=shade, alpha=0.25, lw=0)
    ax.legend(handles=lines, loc="center left", bbox_to_anchor=(1, 0.5))  # by itself it leaves out a name like "_x"
    ax.set(
        xscale="log",
        xlabel="learning rate (logarithmic)",
        ylabel=metric + (" (% correct)" if scale_of(metric) == 100 else ""),
    )
    tried = sorted(runs["lr"].unique())
    ax.set_xticks(tried, [f"{lr:g}" for lr in tried])
    ax.minorticks_off()
    ax.set_title(f"mean of {runs['seed'].nunique()} seeds, band: lowest to highest", loc="left")
    return fig


def spread(heights: dict[str, float], ax: Axes, gap: float = 0.09) -> dict[str, float]:
    """The same heights, moved apart so that labels at them are at least `gap` of the axis apart and can be read."""
    low, high = ax.get_ylim()
    step, moved, floor, ceiling = gap * (high - low), {}, low, high
    for name in sorted(heights, key=heights.get):  # from the lowest up, each above the one before it
        moved[name] = max(heights[name], floor)
        floor = moved[name] + step
    for name in reversed(moved):  # and down again, where that went too high
        moved[name] = min(moved[name], ceiling)
        ceiling = moved[name] - step
    return moved


def architecture(model: CNN, size: int = 28, image: Tensor | None = None) -> Figure:
    """A picture of `model` for images of size × size: the maps after stem, layers and head, with their real shapes.

    The side of a sheet grows with the square root of its map's side, the number of sheets with that of the channels.
    With `image` (in_channels×size×size, as the network takes it) the picture shows what `model` makes of that image.
    """
    found = {name: shape for name, shape, *_ in parts(model, size)}
    logits = found.pop("head")
    shapes = {"image": (model.config.in_channels, size, size), **found, "average": found["layer 4"][:1], "head": logits}
    values = {} if image is None else activations(model, image)
    fig = plt.figure(figsize=(8.6, 2.75), layout="none")  # inches, and so is every length below
    ax = fig.add_axes((0, 0, 1, 1), xlim=(0, 8.6), ylim=(-1.65, 1.1))
    center, last = 0.5, None
    for name, shape in shapes.items():
        wide = (draw_sheets if len(shape) == 3 else draw_cells)(ax, center, shape, values.get(name))
        if last is not None:
            residual = name.startswith("layer") and model.config.residual
            draw_arrow(ax, last + 0.05, center - wide / 2 - 0.05, residual)
        ax.text(center, -0.95, name, ha="center", fontsize=10.5, fontweight="bold")
        ax.text(center, -1.15, "×".join(map(str, shape)), ha="center", fontsize=10.5, color=BLUE, gid=name)
        ax.text(center, -1.22, operation(model, name), ha="center", va="top", fontsize=9.5, linespacing=1.25)
        last = center + wide / 2
        center += max(0.98, wide + 0.48)
    if model.config.residual:
        note = "residual connections: a block adds its input to its output"
        ax.text(3.9, 0.85, note, ha="center", fontsize=10, color=VERMILION)
    ax.axis("off")
    return fig


def operation(model: CNN, name: str) -> str:
    """What the part called `name` does to what comes in, in two short lines."""
    config = model.config
    pool = {"max": "max pool", "average": "mean pool", "stride": "stride 2"}[config.pool]
    if name.startswith("layer "):
        layer = int(name.removeprefix("layer ")) - 1
        blocks = f"{config.blocks[layer]} block" + "s" * (config.blocks[layer] > 1)
        halved = layer > 0 and config.halving
        return f"{blocks},\n{pool if config.pool_everywhere else 'stride 2'}" if halved else blocks
    return {"image": "", "stem": f"convolution,\n{pool}", "average": "of each map", "head": "linear,\nlogits"}[name]


def activations(model: CNN, image: Tensor) -> dict[str, Tensor]:
    """What `model` in evaluation mode makes of one image: each map of stem and layers, and each vector, from 0 to 1."""
    layers = {f"layer {number}": layer for number, layer in enumerate(model.layers, 1)}
    with evaluating(model) as where, torch.no_grad():
        x = image[None].to(where)
        found = {"image": x}
        for name, part in {"stem": model.stem, **layers}.items():
            x = found[name] = part(x)
        found["average"] = x.mean((2, 3))
        found["head"] = model.head(found["average"]).softmax(1)
    for name, x in found.items():
        axes = tuple(range(2, x.ndim)) or (1,)  # a map has a scale of its own, and so has a vector
        low, high = x.amin(axes, keepdim=True), x.amax(axes, keepdim=True)
        found[name] = ((x - low) / (high - low).clamp(min=1e-12))[0].cpu()
    return found


def draw_sheets(ax: Axes, center: float, shape: Sequence[int], maps: Tensor | None) -> float:
    """Draws C×H×W maps as sheets, one behind the other, around `center`, and returns how wide that is."""
    channels, height, width = shape
    sheets, step = max(1, round(0.5 * channels**0.5)), 0.035
    high, wide, behind = 0.17 * height**0.5, 0.17 * width**0.5, (sheets - 1) * step
    faces = sns.light_palette(BLUE, sheets + 4)[1:-1]
    if maps is not None:  # colours as they are; of many maps those that vary most, in front
        faces = [maps.permute(1, 2, 0)] if channels == 3 else maps[maps.var((1, 2)).argsort(descending=True)]
    for sheet, face in enumerate(faces[:sheets]):
        x, y = center - (wide + behind) / 2 + sheet * step, -(high + behind) / 2 + sheet * step
        edge = {"ec": "white", "lw": 0.8, "zorder": 100 - 2 * sheet}
        if maps is None:
            ax.add_patch(Rectangle((x, y), wide, high, fc=face, **edge))
        else:
            box = (x, x + wide, y, y + high)
            ax.imshow(
                face.numpy(), extent=box, cmap="gray" if channels == 1 else "mako", zorder=99 - 2 * sheet, aspect="auto"
            )
            ax.add_patch(Rectangle((x, y), wide, high, fc="none", **edge))
    return wide + behind


def draw_cells(ax: Axes, center: float, shape: Sequence[int], vector: Tensor | None) -> float:
    """Draws C numbers as a column of at most 16 cells around `center`, and returns how wide that is."""
    cells, side = min(16, *shape), 0.095
    shades = sns.light_palette(BLUE, as_cmap=True)
    for cell in range(cells):
        value = 0.35 + 0.3 * (cell % 2) if vector is None else float(vector[cell])
        corner = (center - side / 2, (cells / 2 - 1 - cell) * side)
        ax.add_patch(Rectangle(corner, side, side, fc=shades(value), ec="white", lw=0.8))
    return side


def draw_arrow(ax: Axes, left: float, right: float, residual: bool) -> None:
    """Draws the way from one part to the next; a residual connection is a second way around it, added at its end."""
    style = {"arrowstyle": "-|>", "mutation_scale": 9, "color": INK, "lw": 1.2, "shrinkA": 0, "shrinkB": 0}
    style |= {"zorder": 200}
    ax.add_patch(FancyArrowPatch((left, 0), (right - 0.15 * residual, 0), **style))
    if residual:
        around = style | {"color": VERMILION, "connectionstyle": "arc3,rad=-1.3"}
        ax.add_patch(FancyArrowPatch((left + 0.02, 0.03), (right - 0.075, 0.08), **around))
        ax.add_patch(Circle((right - 0.075, 0), 0.075, fc="white", ec=INK, lw=1.1, zorder=200))
        ax.text(right - 0.075, -0.005, "+", ha="center", va="center", fontsize=9, zorder=201)


# ------------------------------------------------------------------------------------------------------ lesson 6


def ledger(runs: pd.DataFrame, steps: pd.DataFrame) -> Figure:
    """A row a variant, each with one change more than that above: validation accuracy, and what the change brought.

    `runs` are an experiment's, in the order of the ledger. `steps` are the rows of `experiments.claims` that compare
    each variant with the one above. On the left means as a waterfall, with 95 % intervals; on the right the
    differences, paired by seed, with theirs, a dot for each seed, and the margin as a short black line.
    """
    ends = 100 * evidence.finals(runs, "validation accuracy")  # a row a seed, a column a variant
    names, means = list(ends.columns), ends.mean()
    fig, (left, right) = plt.subplots(1, 2, figsize=(7.8, 0.55 * len(names) + 1.0), sharey=True, width_ratios=[1, 1])
    for place, name in enumerate(names):
        if place:
            low, high = sorted((means.iloc[place - 1], means[name]))
            left.barh(place, high - low, left=low, height=0.5, color=color(name), alpha=0.45)
            left.plot([means.iloc[place - 1]] * 2, [place - 1, place + 0.25], color=GREY, lw=1, zorder=0)
        half = half_intervals(ends[[name]].T).iloc[0]
        left.errorbar(means[name], place, xerr=half, fmt="o", color=color(name), capsize=3, ms=5)
    for row in steps.itertuples():
        place = names.index(row.variant)
        pairs = ends[row.variant] - ends[row.baseline]
        right.plot(pairs, [place + 0.27] * len(pairs), "o", color=color(row.variant), ms=4, alpha=0.5, mew=0)
        draw_step(right, place, row)
    right.axvline(0, color=GREY, lw=1)
    left.set(yticks=range(len(names)), ylim=(len(names) - 0.5, -0.5), xlabel="validation accuracy (%)")
    left.set_yticklabels([names[0], *(f"+ {name}" for name in names[1:])])
    right.tick_params(axis="y", length=0)
    right.set_xlabel("difference from the row above, points")
    left.set_title(f"mean of {len(ends)} seeds, 95 % interval", loc="left")
    right.set_title("paired by seed, 95 % interval", loc="left")
    for verdict, (shade, marker) in VERDICTS.items():
        right.plot([], [], marker + "-", color=shade, label=verdict)
    right.legend(loc="upper right", fontsize=9, borderpad=0)
    return fig


def draw_step(ax: Axes, place: int, row: Any) -> None:
    """Draws the difference of one row of `experiments.claims`, with interval, margin and verdict, at this height."""
    words, middle = draw_difference(ax, place, row, 0.2), 100 * row.difference
    above = {"xytext": (0, 7), "textcoords": "offset points", "ha": "center", "bbox": PLAIN, "color": words}
    ax.annotate(f"{round(middle, 2) + 0.0:+.2f}", (middle, place), **above)  # + 0.0: never "-0.00"


def confusion(matrix: Tensor, class_names: Sequence[str]) -> Figure:
    """How many images of each true class (row) were taken for each class (column), from `examine.confusion`.

    The colour is the share of the row, on a scale in which rare mistakes show; counts of zero are left out.
    """
    shades = (matrix / matrix.sum(1, keepdim=True).clamp_min(1)).numpy() ** 0.4
    side = 1.8 + 0.5 * len(class_names)
    fig, ax = plt.subplots(figsize=(min(side, 7.4), min(side, 7.4) * 0.86))
    ax.imshow(shades, cmap="Blues", vmin=0, vmax=1.25)
    for row, column in (matrix > 0).nonzero().tolist() if len(class_names) <= 20 else ():
        weight, dark = "bold" if row == column else "normal", shades[row, column] > 0.8  # lighter blue bears ink better
        style = {"color": "white" if dark else INK, "fontweight": weight, "fontsize": 9.5}
        ax.text(column, row, f"{matrix[row, column]:,}", ha="center", va="center", **style)
    names = [plain(name) for name in class_names]
    ax.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(len(names)), names)
    ax.set(xlabel="the network's answer", ylabel="true class")
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_title(f"n = {int(matrix.sum()):,} images", loc="left")
    return fig


def draw_reliability(ax: Axes, rows: pd.DataFrame, shade: str) -> None:
    """Draws accuracy against confidence from `examine.reliability`, the area of a dot growing with the bin's images.

    Bins of fewer than ten images are left out: a few say nothing about a share.
    """
    there = rows[rows["n"] >= 10]
    ax.plot([0, 100], [0, 100], "--", color=GREY, lw=1)
    ax.plot(100 * there["confidence"], 100 * there["accuracy"], "-", color=shade, lw=1.2)
    sizes = 12 + 500 * there["n"] / rows["n"].sum()
    ax.scatter(100 * there["confidence"], 100 * there["accuracy"], sizes, color=shade, alpha=0.7, lw=0, clip_on=False)
    ax.set(xlim=(0, 104), ylim=(0, 104), xlabel="confidence (%)", ylabel="right (%)")
    ax.set_aspect("equal")


def show_heat(ax: Axes, image: Tensor, heat: Tensor, title: str = "", **options) -> None:
    """Draws a uint8 C×H×W image in grey, and over it `heat`, H×W from 0 to 1: the warmer, the more."""
    grey = image.float().mean(0) / 255  # H×W
    warm = torch.from_numpy(plt.get_cmap("inferno")(heat.clamp(0, 1).numpy())[..., :3])  # H×W×3
    share = 0.75 * heat.clamp(0, 1)[..., None]
    mixed = (1 - share) * (0.15 + 0.7 * grey[..., None]) + share * warm
    show_image(ax, mixed.permute(2, 0, 1).float(), title, **options)


def explanation(image: Tensor, heat: Tensor, p: Tensor, class_names: Sequence[str]) -> Figure:
    """One uint8 C×H×W image, where in it the answer comes from (`examine.grad_cam`, H×W), and the likeliest classes.

    `p` are the K probabilities of the classes.
    """
    top = p.topk(min(5, len(p)))
    fig, axes = plt.subplots(1, 3, figsize=(7.2, 2.4), width_ratios=[1, 1, 1.1])
    show_image(axes[0], image, "what the network gets")
    names = [plain(class_names[i]) for i in top.indices]
    show_heat(axes[1], image, heat, f"what speaks for\n{names[0]}")
    shades = [BLUE, *[GREY] * (len(top.values) - 1)]
    axes[2].barh(range(len(shades)), 100 * top.values.numpy(), color=shades)
    axes[2].set_yticks(range(len(shades)), names)
    axes[2].set(ylim=(len(shades) - 0.4, -0.6), xlim=(0, 100), xlabel="probability (%)")
    return fig


def ask(answer: Callable[[Path, bool], Figure], example: Path, colour: bool = False) -> None:
    """Shows ways to upload and to draw an image, a switch to invert it, and the figure that `answer` makes of its file.

    The figure of `example`, a file, is an ordinary picture in the notebook, which also reads without a kernel. What
    `answer` objects to in an image (ValueError) is said below the buttons. `colour`: draw in colours.
    """
    import ipywidgets

    folder = tempfile.TemporaryDirectory(prefix="own-image-")
    invert = ipywidgets.Checkbox(description="invert: swap dark and light", indent=False)
    said = ipywidgets.HTML()
    now = {"path": Path(example), "folder": folder}  # the folder stays as long as the widgets do

    def show(handle: Any = None) -> Any:
        try:
            fig = answer(now["path"], invert.value)
        except ValueError as error:
            message = str(error).replace(str(now["path"]), now["path"].name)
            said.value = f"✘ {html.escape(message, quote=False)}"
            return handle
        said.value = ""
        plt.close(fig)
        return show_png(png(fig), described(fig, f"the answer to {now['path'].name}"), handle)

    def receive(name: str, content: bytes) -> None:
        now["path"] = Path(folder.name) / (Path(name).name or "image")
        now["path"].write_bytes(content)
        show(handle)

    views = [widgets.uploader(receive), *widgets.sketcher(receive, colour), invert, said]
    widgets.show(ipywidgets.VBox(views), "(Run this cell to upload or to draw an image of your own.)")
    handle = show()
    invert.observe(lambda _: show(handle), "value")
