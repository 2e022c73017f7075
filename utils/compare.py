"""All runs that there are, shipped ones and the reader's own, side by side: as frames, and as one HTML page.

python cnn.py compare --out compare.html
"""

import csv
import html
import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from utils import ablation, evidence, experiments, files, plots, train, widgets
from utils.model import CNNConfig
from utils.tables import ResultsError, read_record, read_table
from utils.train import Recipe

METRICS = ("validation accuracy", "train accuracy", "validation loss", "train loss")
SETTINGS, HISTORY = "settings.json", "history.csv"  # of a run of `python cnn.py train`
USUAL_DATA = "fashion-mnist"  # of a run whose settings name none
TEMPLATE = Path(__file__).with_name("compare.html")
PALETTE = (plots.BLUE, plots.ORANGE, plots.GREEN, plots.VERMILION, plots.SKY, plots.DARK)
DASHES = ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (6, 2, 1, 2)))
SORTS = {"mean": False, "difference": False, "variant": True, "seconds": True, "n": False}  # column → ascending
TABLE_STYLE = "<style>.cnn-table :is(th, td) {padding: 0 0.5em; text-align: right; line-height: 1.5}</style>"
MOST_SEEDS = 50  # of one variant; t quantiles for these are in the page


@dataclass(frozen=True, eq=False)
class Study:
    """Runs that belong together: `rows` with the columns of `ablation.COLUMNS`, the settings of each variant."""

    name: str
    question: str
    rows: pd.DataFrame
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    own: bool = False

    @property
    def variants(self) -> list[str]:
        """The variants in the order of their rows; the last is the baseline."""
        return list(dict.fromkeys(self.rows["variant"]))


def studies(paths: Iterable[str | Path] | None = None) -> list[Study]:
    """Return what the files and folders of `paths` hold: rows of experiments (CSV), folders of trained runs.

    None: everything, the shipped experiments, the reader's sweeps (`ablation.run`) and runs (`python cnn.py train`).
    Runs of the same settings but for the seed are one variant. Other CSV files and folders are left out. Raises
    ValueError for a path that does not exist, tables.ResultsError for rows that are not as they were measured.
    """
    if paths is None:
        shipped = [files.results_dir() / f"{name}.csv" for name in experiments.EXPERIMENTS]
        paths = [path for path in shipped if path.exists()] + [ablation.sweeps(), files.ROOT / "runs"]
    found, runs = [], []
    for path in expanded(paths):
        if (path / HISTORY).exists():
            runs.append(path)
        elif path.suffix == ".csv" and is_rows(path) and not is_copy(path):
            found.append(of_file(path))
    order = list(experiments.EXPERIMENTS)
    found.sort(key=lambda study: (study.own, order.index(study.name) if not study.own else 0))
    return [*found, of_runs(runs)] if runs else found


def expanded(paths: Iterable[str | Path]) -> list[Path]:
    """Return the files and the folders of runs in `paths`; of any other folder, its own.

    A pattern (runs/*) that the shell has left as it is, since nothing matches or since it knows none, is matched here.
    """
    found = []
    for path in map(Path, paths):
        if "*" in path.name:
            found += sorted(path.parent.glob(path.name))
            continue
        if not path.exists() and path not in (ablation.sweeps(), files.ROOT / "runs"):
            raise ValueError(f"there is no {path}: name CSV files of experiments (results/*.csv) or folders in runs/")
        inside = path.is_dir() and path.suffix != ".csv" and not (path / HISTORY).exists()
        found += [each for each in sorted(path.iterdir()) if each.name[0] != "."] if inside else [path]
    return found


def is_rows(path: Path) -> bool:
    """True for a CSV file with the columns that `ablation.run` gives, or that should have them."""
    if is_sweep(path) or is_shipped(path):
        return True
    if not path.is_file():
        return False
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as lines:  # a spreadsheet may add the mark
        return set(ablation.COLUMNS) <= set(next(csv.reader(lines), []))


def is_shipped(path: Path) -> bool:
    """True for the rows of one of the course's experiments."""
    return path.stem in experiments.EXPERIMENTS and path.parent.resolve() == files.results_dir().resolve()


def is_sweep(path: Path) -> bool:
    """True for what `ablation.run` left behind on this machine."""
    return path.parent.resolve() == ablation.sweeps().resolve()


def is_copy(path: Path) -> bool:
    """True for what a shipped experiment left behind when it was measured here: its rows are in results/."""
    if path.stem not in experiments.EXPERIMENTS or not is_sweep(path):
        return False
    try:
        text, about = files.read_rows(path)
        seeds = set(pd.read_csv(io.BytesIO(text), usecols=["seed"])["seed"])
    except (OSError, ValueError):
        return False
    experiment = experiments.find(path.stem)
    then, now = (about or {}).get("variants", {}), experiments.declared(experiment)["variants"]
    theirs = {*experiment.seeds, *experiment.tuning_seeds}
    return then.keys() == now.keys() and not experiments.changes(then, now) and seeds <= theirs


def of_file(path: Path) -> Study:
    """Return the study in a CSV file: a shipped experiment's, or of the reader's."""
    if is_shipped(path):
        results, experiment = experiments.load(path.stem), experiments.find(path.stem)
        settings = {variant: flat(parts) for variant, parts in results.about["variants"].items()}
        for variant, lr in results.about["best_lr"].items():
            settings[variant]["lr"] = lr
        return Study(path.stem, experiment.question, results.runs, settings)
    remedy = f"run that sweep again, or delete {path.stem}.csv and {path.stem}.json"
    rows, known = read_table(path, remedy, ablation.COLUMNS, by_hand=True)
    try:
        settings = {variant: flat(parts) for variant, parts in known.get("variants", {}).items()}
        rows.attrs = dict(known.get("measured_on", {}))
    except (AttributeError, TypeError, ValueError) as error:
        raise ResultsError(f"{path.stem}.json does not say which variants there are: {remedy}") from error
    twice = rows[rows.duplicated(["variant", "lr", "seed", "epoch", "split", "metric"])]
    if len(twice):
        variant, seed = twice[["variant", "seed"]].iloc[0]
        what = f"{path.name} has two runs of the variant {variant!r} with seed {seed}"
        raise ResultsError(f"{what}: expected one; give each a seed of its own, or a file")
    if (rows.groupby("variant")["lr"].nunique() > 1).any():  # a sweep: each rate of each variant by itself
        pairs = rows[["variant", "lr"]].drop_duplicates().itertuples(index=False)
        settings = {f"{variant}, lr {lr:g}": {**settings.get(variant, {}), "lr": lr} for variant, lr in pairs}
        rows["variant"] += rows["lr"].map(", lr {:g}".format)
    else:
        for variant, lr in rows.groupby("variant")["lr"].first().items():
            if variant in settings:
                settings[variant]["lr"] = lr
    name = f"{path.stem} (own)" if path.stem in experiments.EXPERIMENTS else path.stem
    return Study(name, f"Your own sweep {path.stem}", rows, settings, own=True)


def flat(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of network, recipe and source in one dict; what they share is named once."""
    source = {"data" if name == "name" else name: value for name, value in parts.get("source", {}).items()}
    return {**parts.get("config", {}), **parts.get("recipe", {}), **source}


def of_runs(folders: Sequence[Path]) -> Study:
    """Return the runs of `python cnn.py train` in `folders` as one study, a variant for each choice of settings."""
    frames, settings = [], {}
    for folder in sorted(folders, key=lambda folder: (folder / HISTORY).stat().st_mtime):  # of two alike, the newer
        remedy = f"train again, or delete the folder {folder}"
        given = read_record(folder / SETTINGS, remedy) if (folder / SETTINGS).exists() else {}
        seed = given.pop("seed", 0)
        given.setdefault("data", USUAL_DATA)
        variant = named(given) or "defaults"
        if settings.get(variant, given)["data"] != given["data"]:  # two folders of one name
            variant = variant.replace(f"data {Path(given['data']).name}", f"data {given['data']}")
        settings[variant] = {**defaults(), **given}
        history, _ = read_table(folder / HISTORY, remedy, ablation.ROWS, by_hand=True)
        frames.append(history.assign(experiment="runs", variant=variant, lr=settings[variant]["lr"], seed=seed))
    rows = pd.concat(frames, ignore_index=True)
    rows = rows.drop_duplicates(["variant", "seed", "epoch", "split", "metric"], keep="last")  # trained twice: the last
    return Study("runs", "Your own runs", rows[ablation.COLUMNS], settings, own=True)


def defaults() -> dict[str, Any]:
    """Return every setting of a run as it is when nothing is chosen."""
    return {**asdict(CNNConfig()), **asdict(Recipe())}


def named(given: Mapping[str, Any]) -> str:
    """Return a name made of the settings that decide what is learned, "norm none, lr 0.1"."""
    usual = {**defaults(), "data": USUAL_DATA, "images": None, "size": None, "channels": None, "precision": "auto"}
    decide = {name: value for name, value in given.items() if name in usual and value != usual[name]}
    return ", ".join(f"{name} {Path(str(value)).name if name == 'data' else value}" for name, value in decide.items())


# ------------------------------------------------------------------------------------------------- what is drawn


def curves(study: Study, metric: str, axis: str = "epoch", smoothing: int = 1) -> pd.DataFrame:
    """Return a row for each (variant, epoch): x, mean, half of the 95 % interval, n, of `metric` ("split name").

    x is the epoch or, for axis="seconds", the median of the seeds' seconds. `smoothing` is over how many epochs, the
    last ones, each run is averaged first. Of a single run there is no interval: half is NaN. Raises ValueError for
    other axes.
    """
    if axis not in ("epoch", "seconds"):
        raise ValueError(f"axis={axis!r}: choose epoch or seconds")
    frames = []
    for variant in study.variants:
        values, seconds = runs_by_epoch(study, variant, metric)
        values = values.rolling(smoothing, min_periods=1).mean().where(values.notna())  # no run is drawn beyond its end
        x, n = seconds if axis == "seconds" else values.index.to_series(), values.count(axis=1)
        frame = pd.DataFrame({"x": x, "mean": values.mean(axis=1), "half": plots.half_intervals(values).where(n > 1)})
        frames.append(frame.assign(variant=variant, n=n).reset_index())
    return pd.concat(frames, ignore_index=True)


def runs_by_epoch(study: Study, variant: str, metric: str) -> tuple[pd.DataFrame, pd.Series]:
    """Return `metric` of each run of a variant, a row an epoch and a column a seed, and the seeds' median seconds.

    What is not finite is NaN.
    """
    split, _, name = metric.partition(" ")
    rows = study.rows
    mine = rows[(rows["variant"] == variant) & (rows["split"] == split) & (rows["metric"] == name)]
    values = mine.pivot(index="epoch", columns="seed", values="value").replace([math.inf, -math.inf], math.nan)
    return values, mine.groupby("epoch")["seconds"].median()


def diverged(study: Study) -> dict[str, int]:
    """Return how many runs of each variant diverged."""
    broken = study.rows[(study.rows["metric"] == train.DIVERGED) & (study.rows["value"] > 0)]
    return broken.groupby("variant").size().reindex(study.variants, fill_value=0).to_dict()


def length(rows: pd.DataFrame) -> str:
    """Return at which epoch the runs in `rows` end: "10", or "3–10" if not all at the same."""
    last = rows.groupby("seed")["epoch"].max()
    return "–".join(str(epoch) for epoch in dict.fromkeys((last.min(), last.max())))


def finals(study: Study, metric: str) -> pd.DataFrame:
    """Return the last value of `metric` of each run, a row a seed, a column a variant, as `evidence.finals` does.

    Where runs that diverged, or all runs of a variant, have no such value, those are left out; what is not finite is
    NaN.
    """
    return all_finals(study, metric).replace([math.inf, -math.inf], math.nan)


def all_finals(study: Study, metric: str) -> pd.DataFrame:
    """Return the last value of `metric` of each run that has one, finite or not."""
    split, _, name = metric.partition(" ")
    having = study.rows[(study.rows["split"] == split) & (study.rows["metric"] == name)]
    broken = study.rows[(study.rows["metric"] == train.DIVERGED) & (study.rows["value"] > 0)]
    rows = study.rows[study.rows["variant"].isin({*having["variant"], *broken["variant"]})]
    try:
        return evidence.finals(rows, metric)
    except ValueError:
        pairs = pd.MultiIndex.from_frame(broken[["variant", "seed"]])
        whole = rows["variant"].isin(having["variant"])
        whole &= ~pd.MultiIndex.from_frame(rows[["variant", "seed"]]).isin(pairs)
        return evidence.finals(rows[whole], metric) if whole.any() else pd.DataFrame()


def summary(study: Study, metric: str, variants: Sequence[str], baseline: str) -> pd.DataFrame:
    """Return a row for each of `variants`: n, how many runs diverged, at which epoch they end, mean, seconds, lr.

    And the paired difference from `baseline`, if any.

    Accuracies are in percent, their differences in points, as `plots` shows them. Two seeds in common are needed for a
    difference, which is NaN without them.
    """
    table, factor, broken, rows = finals(study, metric), plots.scale_of(metric), diverged(study), []
    for variant in variants:
        values = table[variant].dropna() if variant in table else pd.Series(dtype=float)
        pair = table[[variant, baseline]].dropna() if {variant, baseline} <= set(table) else pd.DataFrame()
        mine = study.rows[study.rows["variant"] == variant]
        seconds = mine.groupby("seed")["seconds"].max().median()
        row = {"variant": variant, "n": len(values), "diverged": broken[variant], "epochs": length(mine)}
        row |= {"mean": factor * values.mean(), "seconds": seconds}
        row |= {"lr": mine["lr"].iloc[0], "difference": math.nan, "low": math.nan, "high": math.nan}
        if variant != baseline and len(pair) > 1:
            found = evidence.paired(factor * pair[variant].to_numpy(), factor * pair[baseline].to_numpy())
            row |= {name: found[name] for name in ("difference", "low", "high")}
        rows.append(row)
    return pd.DataFrame(rows)


def differences(settings: Mapping[str, Mapping[str, Any]], a: str, b: str) -> pd.DataFrame:
    """Return the settings in which the variants `a` and `b` differ, a row each. Raises ValueError for unknown ones."""
    for variant in (a, b):
        if variant not in settings:
            raise ValueError(f"no settings of {variant!r}: choose one of {', '.join(settings)}")
    names = [name for name in {**settings[a], **settings[b]} if settings[a].get(name) != settings[b].get(name)]
    return pd.DataFrame({a: [settings[a].get(n) for n in names], b: [settings[b].get(n) for n in names]}, index=names)


def looks(variants: Sequence[str]) -> dict[str, tuple[str, int]]:
    """Return colour and number of the dash pattern of each variant: of a grid, the first field has the colour."""
    firsts = [variant.partition(", ")[0] for variant in variants]
    grid = len(set(firsts)) < len(variants) and max(map(firsts.count, firsts)) <= len(DASHES)  # else dashes are alike
    own = list(dict.fromkeys(firsts if grid else variants))
    free = [shade for shade in PALETTE if shade not in map(plots.COLORS.get, own)] or list(PALETTE)
    missing = [name for name in own if name not in plots.COLORS]
    shades = {name: plots.COLORS[name] for name in own if name in plots.COLORS}
    shades |= {name: free[place % len(free)] for place, name in enumerate(missing)}
    found, seen = {}, {}
    for variant in variants:
        name = variant.partition(", ")[0] if grid else variant
        found[variant] = shades[name], seen.get(shades[name], 0)
        seen[shades[name]] = seen.get(shades[name], 0) + 1
    return found


def figure(
    study: Study, metric: str, variants: Sequence[str], baseline: str, axis: str = "epoch", smoothing: int = 1
) -> Figure:
    """Return the curves of some `variants` with 95 % bands, and below them their paired differences from `baseline`."""
    rows = summary(study, metric, variants, baseline).dropna(subset=["difference"])
    fig, (top, bottom) = plt.subplots(
        2, 1, figsize=(7.4, 3.6 + 0.42 * len(rows)), height_ratios=[3.2, 0.5 + 0.42 * len(rows)]
    )
    names = {name: name + (f" ({broken} diverged)" if broken else "") for name, broken in diverged(study).items()}
    draw_curves(
        top,
        curves(study, metric, axis, smoothing),
        looks(study.variants),
        {name: names[name] for name in variants},
        metric,
    )
    top.set(xlabel="seconds of training, as the clock ran" if axis == "seconds" else "epoch")
    top.xaxis.get_major_locator().set_params(integer=axis == "epoch")
    for place, row in enumerate(rows.itertuples()):
        shade = looks(study.variants)[row.variant][0]
        bottom.plot([row.low, row.high], [place, place], color=shade, lw=3, solid_capstyle="butt")
        bottom.plot(row.difference, place, "o", color=shade, ms=7)
    words = [plots.plain(f"{row.variant}: {row.difference:+.2f}, n = {row.n}") for row in rows.itertuples()]
    bottom.set(yticks=range(len(rows)), yticklabels=words, ylim=(max(len(rows), 1) - 0.5, -0.5))
    bottom.yaxis.tick_right()  # below the legend
    bottom.tick_params(axis="y", length=0)
    bottom.spines["left"].set_visible(False)
    bottom.axvline(0, color=plots.GREY, lw=1)
    bottom.set_xlabel("points" if plots.scale_of(metric) == 100 else "nats")
    if not len(rows):
        bottom.text(0.5, 0.5, "no two seeds in common", transform=bottom.transAxes, ha="center", va="center")
    bottom.set_title(plots.plain(f"difference from {baseline}: paired by seed, 95 % interval"), loc="left")
    return fig


def draw_curves(
    ax: Axes, frame: pd.DataFrame, shown: Mapping[str, tuple], names: Mapping[str, str], metric: str
) -> None:
    """Draw those variants of a frame of `curves` that `names` has, in a legend beside them by what it calls them."""
    factor, frame, lines = plots.scale_of(metric), frame[frame["variant"].isin(names)], []
    for variant, name in names.items():
        mine, (shade, dash) = frame[frame["variant"] == variant], shown[variant]
        x, y, half = mine["x"], factor * mine["mean"], factor * mine["half"]
        lines += ax.plot(x, y, color=shade, ls=DASHES[dash % len(DASHES)], lw=1.8, label=plots.plain(name))
        ax.fill_between(x, y - half, y + half, color=shade, alpha=0.2, lw=0)
    if factor == 100:  # the t interval of two or three seeds may reach beyond what an accuracy can be
        low, high = ax.get_ylim()
        ax.set_ylim(max(low, -1), min(high, 101))
    n = f"{frame['n'].min()} to {frame['n'].max()}".removeprefix(f"{frame['n'].max()} to ")
    how = f"mean of {n} seeds, 95 % band" if frame["n"].max() > 1 else "one seed: no interval"
    ax.set_title(f"{metric} ({'% correct' if factor == 100 else 'nats'}): {how}", loc="left")
    # Given as handles, since a legend by itself leaves out names that begin with "_".
    ax.legend(handles=lines, loc="upper left", bbox_to_anchor=(1.0, 1.0), handlelength=2.6)


def explore(found: Sequence[Study], start: str) -> None:
    """Show `found` in a notebook, to pick from: experiment, variants, metric, axis, smoothing, baseline.

    The figure of the study called `start` is an ordinary picture, which also reads without a kernel.
    """
    import ipywidgets

    by_name = {study.name: study for study in found}
    style, narrow = {"description_width": "6.5em"}, {"width": "auto", "margin": "2px 1.5em 2px 0"}
    study = ipywidgets.Dropdown(options=list(by_name), value=start, description="experiment", style=style)
    metric = ipywidgets.Dropdown(options=METRICS, description="metric", style=style)
    axis = ipywidgets.Dropdown(options={"epochs": "epoch", "seconds": "seconds"}, description="against", style=style)
    smoothing = ipywidgets.IntSlider(1, 1, 5, description="mean over", style=style)
    baseline = ipywidgets.Dropdown(description="baseline", style=style)
    variants = ipywidgets.HBox(layout={"flex_flow": "row wrap"})  # JupyterLab takes the arrow keys of a list for itself
    order = ipywidgets.Dropdown(options=[*SORTS], description="sort by", style=style)
    table, about = ipywidgets.HTML(), ipywidgets.HTML()
    buttons = [ipywidgets.Button(description=f"save {kind}") for kind in ("PNG", "SVG", "CSV")]
    handle: list[Any] = [None]

    def choose(_: Any = None) -> None:
        names = by_name[study.value].variants
        variants.children = ()  # so that nothing is drawn before all is chosen
        baseline.options, baseline.value = names, names[-1]
        labels = [widgets.description(name) for name in names]
        boxes = [ipywidgets.Checkbox(True, description=label, indent=False, layout=narrow) for label in labels]
        for box in boxes:
            box.observe(draw, "value")
        variants.children = boxes

    def settings() -> tuple[Study, str, Sequence[str], str]:
        names = by_name[study.value].variants[: len(variants.children)]
        ticked = [name for name, box in zip(names, variants.children, strict=True) if box.value]
        return by_name[study.value], metric.value, ticked, baseline.value

    def draw(_: Any = None) -> None:
        ticked = bool(settings()[2])
        for button in buttons:
            button.disabled = not ticked
        if not ticked:  # or between two choices
            about.value = "<p>No variant is ticked: tick one to see it.</p>"
            return
        fig = closed(figure(*settings(), axis.value, smoothing.value))
        words = f"{plots.described(fig, study.value)}: {in_words(*settings())}"
        handle[0] = plots.show_png(plots.quick_png(fig), words, handle[0]) or handle[0]
        about.value = f"<p>{html.escape(by_name[study.value].question)}</p>"
        table.value = tables(*settings(), order.value)

    def export(button: Any) -> None:
        try:
            path = save(*settings(), axis.value, smoothing.value, kind=button.description[-3:].lower())
            about.value = f"<p>wrote {html.escape(str(path.relative_to(files.ROOT)))}</p>"
        except OSError as error:  # which JupyterLab would only log
            about.value = f"<p>not saved: {html.escape(str(error))}</p>"

    choose()
    which = ipywidgets.HBox([ipywidgets.HTML(description="variants", style=style), variants])
    view = [study, metric, axis, smoothing, baseline, which, order, ipywidgets.HBox(buttons), about, table]
    widgets.show(ipywidgets.VBox(view), "(Run this cell to choose experiment, variants, metric, axis and smoothing.)")
    draw()
    study.observe(choose, "value")
    for control in (study, metric, axis, smoothing, baseline, order):
        control.observe(draw, "value")
    for button in buttons:
        button.on_click(export)


def in_words(study: Study, metric: str, variants: Sequence[str], baseline: str) -> str:
    """Return the differences that the figure shows, for those who cannot see it."""
    rows = summary(study, metric, variants, baseline).dropna(subset=["difference"])
    found = [f"{row.variant} {row.difference:+.2f} ({row.low:+.2f} to {row.high:+.2f})" for row in rows.itertuples()]
    return ", ".join(found) or "no two seeds in common"


def closed(fig: Figure) -> Figure:
    """Return `fig`, which pyplot no longer keeps."""
    plt.close(fig)
    return fig


def tables(study: Study, metric: str, variants: Sequence[str], baseline: str, by: str) -> str:
    """Return the `summary` sorted `by` a column, and below it in which settings the first variant differs, as HTML."""
    rows = summary(study, metric, variants, baseline).sort_values(by, ascending=SORTS[by])
    first = next((name for name in variants if name != baseline and {name, baseline} <= study.settings.keys()), None)
    parts = [
        TABLE_STYLE,
        rows.to_html(
            index=False,
            float_format="{:.2f}".format,
            formatters={"lr": lambda lr: "" if pd.isna(lr) else f"{lr:g}"},
            na_rep="",
            border=0,
            classes="cnn-table",
        ),
    ]
    if first is not None:
        diff = differences(study.settings, first, baseline)
        parts.append(f"<p>settings that differ</p>{diff.to_html(border=0, classes='cnn-table')}")
    return "".join(parts)


def save(
    study: Study, metric: str, variants: Sequence[str], baseline: str, axis: str, smoothing: int, kind: str
) -> Path:
    """Write what is shown into exports/, as "png", "svg" or "csv" (the `summary`), and return the file's path."""
    name = re.sub(r"\W+", "_", f"{study.name} {metric}")
    path = files.ROOT / "exports" / f"{name}.{kind}"
    if kind == "csv":
        rows = summary(study, metric, variants, baseline)
        files.write_text(path, rows.assign(variant=rows["variant"].map(no_formula)).to_csv(index=False))
    else:
        with files.atomic_path(path) as beside:
            fig = closed(figure(study, metric, variants, baseline, axis, smoothing))
            with plt.rc_context({"svg.hashsalt": name}):  # without it, and with a date, each SVG file would be another
                fig.savefig(beside, dpi=plots.DPI, metadata={"svg": {"Date": None}}.get(kind))
    return path


def no_formula(name: str) -> str:
    """Return a name as a spreadsheet shows it: one that begins like a formula is marked as text by an apostrophe.

    For tables that people open, not for rows that are read again.
    """
    name = name.replace("\r", " ")  # the csv module leaves it bare, where it ends a line
    return f"'{name}" if name.startswith(("=", "+", "-", "@", "\t")) else name


# ------------------------------------------------------------------------------------------------------ the page


def page(found: Sequence[Study]) -> str:
    """Return one HTML page that shows `found`, all in one file that needs no network.

    Names come from data: they reach the page as JSON and are written as text. Raises ValueError when there is nothing.
    """
    if not found:
        raise ValueError(
            "there is nothing to compare: name CSV files of experiments (results/*.csv) or folders of trained runs"
        )
    content = {"studies": [as_json(study) for study in found], "claims": claims_of(found), "metrics": METRICS}
    content["t"] = [0.0, *(float(stats.t.ppf(0.975, n)) for n in range(1, MOST_SEEDS))]
    text = json.dumps(clean(content), allow_nan=False, separators=(",", ":"))  # in ASCII
    title = html.escape(f"Runs compared: {', '.join(study.name for study in found)}")
    filled = {"title": title.encode(errors="replace").decode(), "content": text.replace("<", "\\u003c")}
    return re.sub(r"\{\{(\w+)\}\}", lambda place: filled[place[1]], TEMPLATE.read_text(encoding="utf-8"))


def as_json(study: Study) -> dict[str, Any]:
    """Return a study as the page has it: of each variant the curves, the last value of each seed, the settings."""
    there = {f"{split} {name}" for split, name in study.rows[["split", "metric"]].drop_duplicates().to_numpy()}
    metrics = [metric for metric in METRICS if metric in there]
    last, broken, variants = {metric: finals(study, metric) for metric in metrics}, diverged(study), []
    for variant, (shade, dash) in looks(study.variants).items():
        lines = {}
        for metric in metrics:
            values, seconds = runs_by_epoch(study, variant, metric)
            runs = [rounded(values[seed]) for seed in values]
            lines[metric] = {"x": values.index.tolist(), "seconds": rounded(seconds, 2), "runs": runs}
        ends = {
            m: {str(s): round(v, 5) for s, v in f[variant].dropna().items()} for m, f in last.items() if variant in f
        }
        rows = study.rows[study.rows["variant"] == variant]
        time = float(rows.groupby("seed")["seconds"].max().median())
        variants.append(
            {"name": variant, "color": shade, "dash": dash, "curves": lines, "finals": ends}
            | {"diverged": broken[variant], "epochs": length(rows), "time": time}
            | {"lr": float(rows["lr"].iloc[0]), "settings": dict(study.settings.get(variant, {}))}
        )
    return {"name": study.name, "question": study.question, "own": study.own, "variants": variants}


def rounded(values: pd.Series, digits: int = 5) -> list[float]:
    """Return numbers short enough for a page."""
    return [round(float(value), digits) for value in values]


def clean(value: Any) -> Any:
    """Return `value` with None in place of the numbers that JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): clean(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [clean(each) for each in value]
    return value


def claims_of(found: Sequence[Study]) -> list[dict[str, Any]]:
    """Return the course's claims about the shipped experiments in `found`, if all rows that they need are there."""
    shipped = {study.name for study in found if not study.own}
    try:
        table = experiments.claims()
    except ResultsError:
        return []
    wanted = table[table["experiment"].isin(shipped)]
    columns = ["claim", "experiment", "metric", "margin", "n", "difference", "low", "high", "verdict"]
    return wanted[columns].to_dict("records")
