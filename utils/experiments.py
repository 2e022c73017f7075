"""The course's experiments, one short entry each: lessons, `python cnn.py ablate` and `make evidence` share them.

Metric, direction and margin of every claim were written down before the first run. Shipped rows are results/NAME.csv;
results/NAME.json beside them has their plan, machine and checksum, and a fingerprint of what the code did.
"""

import itertools
import json
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import joblib
import pandas as pd

from utils import ablation, evidence, files, tables
from utils.device import cpu_multiplies_bf16
from utils.model import PLACES, CNNConfig
from utils.train import Recipe

POINT = 0.01  # of accuracy
RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
SMALL = CNNConfig(width=16)
SHORT = Recipe(
    epochs=4, batch_size=128, crop_padding=0, flip=False
)  # unaugmented: the field alone makes the difference
FINGERPRINT_IMAGES = 1024
TOLERANCE = {"fp32": 1e-3, "bf16": 2e-2}  # relative, of the losses of a fingerprint taken on other hardware
BEGIN, END = "<!-- claims: begin -->", "<!-- claims: end -->"  # around the table in README.md


@dataclass(frozen=True)
class Claim:
    """Practitioners say that `variant` beats `baseline` by `metric`, and by more than `margin` if it matters."""

    text: str
    variant: str
    baseline: str
    margin: float = 0.5 * POINT
    metric: str = "validation accuracy"


@dataclass(frozen=True)
class Experiment:
    """One field that varies, or a grid of two. Every variant runs `seeds` at its own best of `lrs`.

    That is chosen by validation accuracy, with `tuning_seeds`. `lrs` may be given for each variant by name. `along`
    declares other fields that change along with a variant, as `ablation.run` has it.
    """

    question: str
    lesson: str
    vary: Mapping[str, Any]
    claims: tuple[Claim, ...]
    base: CNNConfig = SMALL
    recipe: Recipe = SHORT
    source: ablation.Source = field(default_factory=lambda: ablation.Source(images=12_800))
    along: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    lrs: tuple[float, ...] | Mapping[str, tuple[float, ...]] = RATES
    tuning_seeds: tuple[int, ...] = (100, 101)
    seeds: tuple[int, ...] = tuple(range(10))

    def options(self) -> dict[str, Any]:
        """Return the arguments of `ablation.plan` and `ablation.run` that do not depend on the stage."""
        varied = {"base": self.base, "vary": self.vary, "recipe": self.recipe}
        return varied | {"source": self.source, "grid": len(self.vary) == 2, "along": self.along}

    def plan(self, device: str = "auto", precision: str = "auto") -> list[ablation.Trial]:
        """Return all runs; until the sweep is kept whole, each variant's first learning rate stands for its best."""
        where = {"device": device, "precision": precision}
        sweep = ablation.plan(seeds=self.tuning_seeds, lr=self.lrs, **self.options(), **where)
        kept = {trial: ablation.kept(trial) for trial in sweep.values()}
        if None in kept.values():
            best = {variant: lr for variant, lr, _ in reversed(sweep)}
        else:
            best = evidence.best_lr(ablation.tidy("sweep", sweep, kept))
        return [*sweep.values(), *ablation.plan(seeds=self.seeds, lr=best, **self.options(), **where).values()]


@dataclass(frozen=True, eq=False)
class Results:
    """The rows of an experiment as `ablation.run` has them: of the learning-rate `sweep`, and at the best rates."""

    sweep: pd.DataFrame
    runs: pd.DataFrame
    about: dict[str, Any]


NORMS = {"batch norm": "batch", "no norm": "none"}
INPUTS = ("data set", "per-image", "0.5-0.5", "0-255", "0-1")
WIDE_RATES, TINY_RATES = (0.03, 0.1, 0.3, 1.0, 3.0), (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)

LOW_RATES = (0.01, 0.03, 0.1, 0.3, 1.0)
DEPTHS = {"10 layers": 4, "22 layers": 10, "58 layers": 28, "102 layers": 50}
GAINS = {"he": "he", "xavier": "xavier", "default": "default", "too small": 0.3, "too large": 5.0}  # He's is 1.41

LONG, FEW = replace(SHORT, epochs=16), ablation.Source(images=3_000)  # many times over few images: they overfit

# One improvement at a time: what each variant changes against the one before it.
LEDGER = {
    "start": {"schedule": "constant", "weight_decay": 0.0, "flip": False, "crop_padding": 0},
    "one-cycle": {"schedule": "one-cycle"},
    "weight decay": {"weight_decay": 5e-4},
    "flips": {"flip": True},
    "crops": {"crop_padding": 1},
    "label smoothing": {"label_smoothing": 0.1},
    "averaged weights": {"ema": 0.99},
}
LEDGER_CLAIMS = {
    "one-cycle": "a learning rate that rises and falls beats a constant one",
    "weight decay": "weight decay helps",
    "flips": "training on mirrored images, too, helps",
    "crops": "training on randomly shifted images, too, helps",
    "label smoothing": "label smoothing helps",
    "averaged weights": "averaging the weights over the last steps helps",
}
BALANCE = dict(zip(LEDGER, itertools.accumulate(LEDGER.values(), operator.or_), strict=True))  # all that a variant has
FULL = Recipe(**BALANCE["averaged weights"], epochs=18)  # everything put together, for all images
PHOTOS = replace(FULL, epochs=36, crop_padding=2, cutout=8)  # the same for photographs, of which it sees harder views

BATCHES = {"2 images": 2, "8 images": 8, "32 images": 32, "256 images": 256}
BATCH_RATES = {
    "2 images": (0.003, 0.01, 0.03),
    "8 images": (0.01, 0.03, 0.1),
    "32 images": (0.03, 0.1, 0.3),
    "256 images": (0.03, 0.1, 0.3),
}

EXPERIMENTS: dict[str, Experiment] = {
    "input": Experiment(
        question="Does it matter how the input is normalized?",
        lesson="01_data_statistics",
        vary={"input_norm": INPUTS, "norm": NORMS},
        lrs={f"{kind}, batch norm": WIDE_RATES for kind in INPUTS}
        | {f"{kind}, no norm": TINY_RATES if kind == "0-255" else RATES for kind in INPUTS},
        tuning_seeds=(100, 101, 102, 103, 104),
        claims=(
            Claim("normalized inputs beat pixels from 0 to 1, without batch norm", "data set, no norm", "0-1, no norm"),
            Claim(
                "normalized inputs beat pixels from 0 to 255, without batch norm",
                "data set, no norm",
                "0-255, no norm",
            ),
            Claim(
                "normalized inputs beat pixels from 0 to 1, with batch norm", "data set, batch norm", "0-1, batch norm"
            ),
        ),
    ),
    "schedule": Experiment(
        question="Should the channels double as the image halves? Four schedules at equal FLOPs.",
        lesson="02_size_and_pooling",
        source=ablation.Source(images=6_400),
        vary={"growth": ("flat", "constant", "quadruple", "double")},
        along={
            "flat": {"width": 16},
            "constant": {"width": 27},
            "quadruple": {"width": 4},
        },  # no fewer FLOPs than double
        lrs=WIDE_RATES,
        claims=(
            Claim("doubling and halving beats constant width, at equal FLOPs", "double", "constant"),
            Claim("doubling and halving beats keeping width and image, at equal FLOPs", "double", "flat"),
            Claim("doubling the channels beats quadrupling them, at equal FLOPs", "double", "quadruple"),
        ),
    ),
    "schedule_32": Experiment(
        question="Should the channels double as the image halves? Doubling, and a constant width of 32 channels.",
        lesson="02_size_and_pooling",
        source=ablation.Source(images=6_400),  # as "schedule"
        vary={"growth": ("constant", "double")},
        along={"constant": {"width": 32}},  # full blocks on any processor, at more FLOPs than in "schedule"
        lrs=WIDE_RATES,
        claims=(Claim("doubling and halving beats constant width of 32 channels", "double", "constant"),),
    ),
    "pooling": Experiment(
        question="How should the image be halved: by max pooling, once or in every layer, by averages, or by strides?",
        lesson="02_size_and_pooling",
        source=ablation.Source(images=6_400),
        vary={"pool": {"stride": "stride", "average": "average", "max everywhere": "max", "max": "max"}},
        along={"max everywhere": {"pool_everywhere": True}},  # which pooling, and where: one decision
        lrs=WIDE_RATES,
        claims=(
            Claim("max pooling once is better than in every layer", "max", "max everywhere"),
            Claim("max pooling is better than average pooling", "max", "average"),
            Claim("a strided convolution is as good as max pooling", "stride", "max", -0.5 * POINT),
        ),
    ),
    "batchnorm": Experiment(
        question="What does batch normalization bring?",
        lesson="03_batch_normalization",
        vary={"norm": ("batch", "none")},
        tuning_seeds=(100, 101, 102, 103, 104),
        claims=(
            Claim("batch norm raises training accuracy hugely", "batch", "none", 5 * POINT, "train accuracy"),
            Claim("batch norm raises validation accuracy", "batch", "none"),
        ),
    ),
    "batch_size": Experiment(
        question="From which batch size on does batch norm work, and do its rivals need one?",
        lesson="03_batch_normalization",
        recipe=replace(SHORT, epochs=2),
        source=ablation.Source(images=3_200),
        vary={"norm": ("batch", "layer", "group"), "batch_size": BATCHES},
        lrs={f"{norm}, {size}": lrs for norm in ("batch", "layer", "group") for size, lrs in BATCH_RATES.items()},
        seeds=tuple(range(5)),
        claims=(
            Claim(
                "batch norm fails in batches of 2, group norm does not", "group, 2 images", "batch, 2 images", 5 * POINT
            ),
            Claim("batch norm beats group norm in batches of 32", "batch, 32 images", "group, 32 images"),
        ),
    ),
    "residual": Experiment(
        question="From which depth on does a network need residual connections?",
        lesson="04_residual_gradient_flow",
        base=CNNConfig(width=8),
        source=ablation.Source(images=6_400),
        vary={"residual": (True, False), "depth": DEPTHS},
        lrs={f"{kind}, {layers}": LOW_RATES for kind in ("residual", "plain") for layers in DEPTHS}
        | {"plain, 102 layers": (0.001, 0.003, *LOW_RATES)},
        claims=(
            Claim(
                "58 layers do not train without residual connections",
                "residual, 58 layers",
                "plain, 58 layers",
                5 * POINT,
                "train accuracy",
            ),
            Claim(
                "102 layers do not train without residual connections",
                "residual, 102 layers",
                "plain, 102 layers",
                5 * POINT,
                "train accuracy",
            ),
            Claim("residual connections help 10 layers too", "residual, 10 layers", "plain, 10 layers"),
            Claim(
                "without residual connections, 22 layers fit the training images worse than 10",
                "plain, 10 layers",
                "plain, 22 layers",
                metric="train accuracy",
            ),
            Claim(
                "with residual connections, 102 layers are as good as 10",
                "residual, 102 layers",
                "residual, 10 layers",
                -0.5 * POINT,
            ),
        ),
    ),
    "residual_no_norm": Experiment(
        question="And without batch norm: from which depth on does a network need residual connections?",
        lesson="04_residual_gradient_flow",
        base=CNNConfig(width=8, norm="none"),
        source=ablation.Source(images=6_400),
        vary={"residual": (True, False), "depth": DEPTHS},
        lrs=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3),
        seeds=tuple(range(5)),
        claims=(
            Claim(
                "58 layers do not train without residual connections, without batch norm either",
                "residual, 58 layers",
                "plain, 58 layers",
                5 * POINT,
                "train accuracy",
            ),
        ),
    ),
    "dropout": Experiment(
        question="Where does dropout help, when images are few? With batch norm, and without.",
        lesson="05_dropout_and_initialization",
        base=replace(SMALL, dropout=0.2, dropout_where="head"),
        recipe=LONG,
        source=FEW,
        vary={"dropout_where": ("everywhere", "channels", "head", "none"), "norm": NORMS},
        lrs={f"{where}, batch norm": WIDE_RATES[1:] for where in PLACES}
        | {f"{where}, no norm": (0.01, 0.03, 0.1, 0.3) for where in PLACES},
        claims=(
            Claim("dropout before the linear head helps", "head, batch norm", "none, batch norm"),
            Claim("dropout everywhere helps", "everywhere, batch norm", "none, batch norm"),
            Claim("dropout everywhere helps more than in the head alone", "everywhere, batch norm", "head, batch norm"),
            Claim("dropout everywhere helps, without batch norm", "everywhere, no norm", "none, no norm"),
        ),
    ),
    "dropout_rate": Experiment(
        question='How much dropout, when images are few? ("dropout" has 0.2.)',
        lesson="05_dropout_and_initialization",
        base=replace(SMALL, dropout=0.2, dropout_where="head"),
        recipe=LONG,
        source=FEW,
        vary={
            "dropout_where": ("everywhere", "channels", "head"),
            "dropout": {"rate 0.1": 0.1, "rate 0.5": 0.5},
        },
        lrs=WIDE_RATES[1:],
        tuning_seeds=(100,),
        seeds=tuple(range(5)),
        claims=(Claim("before the head, dropping half beats dropping a tenth", "head, rate 0.5", "head, rate 0.1"),),
    ),
    "dropout_rate_no_norm": Experiment(
        question='And without batch norm: how much dropout, when images are few? ("dropout" has 0.2.)',
        lesson="05_dropout_and_initialization",
        base=replace(SMALL, norm="none", dropout=0.2, dropout_where="head"),
        recipe=LONG,
        source=FEW,
        vary={
            "dropout_where": ("everywhere", "channels", "head"),
            "dropout": {"rate 0.1": 0.1, "rate 0.5": 0.5},
        },
        lrs=LOW_RATES[:-1],
        tuning_seeds=(100,),
        seeds=tuple(range(5)),
        claims=(
            Claim(
                "without batch norm, dropping half before the head beats dropping a tenth",
                "head, rate 0.5",
                "head, rate 0.1",
            ),
        ),
    ),
    "dropout_full": Experiment(
        question="Where does dropout help, when images are many, and each is seen once? With batch norm, and without.",
        lesson="05_dropout_and_initialization",
        base=replace(SMALL, dropout=0.2, dropout_where="head"),
        recipe=replace(SHORT, epochs=1),
        source=ablation.Source(),
        vary={"dropout_where": ("everywhere", "channels", "head", "none"), "norm": NORMS},
        lrs={f"{where}, batch norm": WIDE_RATES[1:] for where in PLACES}
        | {f"{where}, no norm": LOW_RATES[:-1] for where in PLACES},
        tuning_seeds=(100,),
        claims=(
            Claim("dropout everywhere helps, with all training images", "everywhere, batch norm", "none, batch norm"),
            Claim(
                "dropout everywhere helps, with all training images and without batch norm",
                "everywhere, no norm",
                "none, no norm",
            ),
        ),
    ),
    "init": Experiment(
        question="He, Xavier, or PyTorch's default? And weights that are too small or too large?",
        lesson="05_dropout_and_initialization",
        vary={"init": GAINS, "norm": NORMS},
        lrs={f"{init}, {norm}": RATES for init in ("he", "xavier", "default") for norm in NORMS}
        | {
            "too small, batch norm": (0.003, 0.01, 0.03, 0.1, 0.3),
            "too small, no norm": (0.03, 0.1, 0.3, 1.0, 3.0),
            "too large, batch norm": (0.1, 0.3, 1.0, 3.0, 10.0),
            "too large, no norm": TINY_RATES,
        },
        claims=(
            Claim("He initialization beats PyTorch's default, without batch norm", "he, no norm", "default, no norm"),
            Claim("He initialization beats Xavier's, without batch norm", "he, no norm", "xavier, no norm"),
            Claim(
                "He initialization beats PyTorch's default, with batch norm", "he, batch norm", "default, batch norm"
            ),
            Claim(
                "batch norm raises training accuracy hugely, from PyTorch's default initialization",
                "default, batch norm",
                "default, no norm",
                5 * POINT,
                "train accuracy",
            ),
            Claim(
                "with batch norm, weights that start 3.5 times too large do no harm",
                "too large, batch norm",
                "he, batch norm",
                -0.5 * POINT,
            ),
        ),
    ),
    "ledger": Experiment(
        question="What does each part of the training recipe bring, one after the other?",
        lesson="06_full_training",
        base=CNNConfig(),
        recipe=Recipe(epochs=15, batch_size=128),
        source=ablation.Source(images=6_400),
        vary={"schedule": {name: settings["schedule"] for name, settings in BALANCE.items()}},
        along={
            name: {field: value for field, value in settings.items() if field != "schedule"}
            for name, settings in BALANCE.items()
        },
        lrs=dict.fromkeys(LEDGER, WIDE_RATES[:-1]) | {"start": LOW_RATES, "one-cycle": WIDE_RATES, "flips": WIDE_RATES},
        tuning_seeds=(100,),
        claims=(
            *(Claim(LEDGER_CLAIMS[name], name, before) for before, name in itertools.pairwise(LEDGER)),
            Claim("all parts of the recipe together help", "averaged weights", "start"),
        ),
    ),
}


def find(name: str) -> Experiment:
    """Return the experiment called `name`. Raises ValueError that lists those there are."""
    if name not in EXPERIMENTS:
        raise ValueError(f"no experiment {name!r}: choose one of {', '.join(EXPERIMENTS)}")
    return EXPERIMENTS[name]


def measure(
    name: str,
    *,
    device: str = "auto",
    precision: str = "auto",
    jobs: int | None = None,
    refresh: bool = False,
    progress: bool = True,
) -> Results:
    """Run the experiment called `name`, as `ablation.run` runs things: what is kept already is not trained again.

    First the learning rates with the tuning seeds, then the seeds that count at the best of them.
    """
    experiment, options = find(name), {"jobs": jobs, "refresh": refresh, "progress": progress}
    options |= {"device": device, "precision": precision} | experiment.options()
    sweep = ablation.run(name, seeds=experiment.tuning_seeds, lr=experiment.lrs, **options)
    best = evidence.best_lr(sweep)
    runs = ablation.run(name, seeds=experiment.seeds, lr=best, **options)
    about = {"best_lr": best} | declared(experiment) | {"measured_on": runs.attrs}
    return Results(sweep, runs, about | {"fingerprints": fingerprints(experiment)})


def declared(experiment: Experiment) -> dict[str, Any]:
    """Return what decides an experiment's rows and verdicts but for the code, as JSON has it."""
    settings = ablation.settings(ablation.plan(seeds=[0], **experiment.options()))
    stages = {"tuning_seeds": experiment.tuning_seeds, "seeds": experiment.seeds, "lrs": experiment.lrs}
    claims = [[claim.variant, claim.baseline, claim.metric, claim.margin] for claim in experiment.claims]
    return json.loads(json.dumps({"variants": settings, **stages, "claims": claims}))


def fingerprints(experiment: Experiment, kinds: Sequence[str] = tuple(TOLERANCE)) -> dict[str, dict[str, list[float]]]:
    """Return the `fingerprint` of each variant in each of these precisions, at the lowest learning rate of all."""
    lrs = experiment.lrs.values() if isinstance(experiment.lrs, Mapping) else [experiment.lrs]
    plan = ablation.plan(seeds=[0], lr=min(map(min, lrs)), device="cpu", precision="fp32", **experiment.options())
    tasks = {(variant, kind): replace(trial, precision=kind) for (variant, *_), trial in plan.items() for kind in kinds}
    losses = joblib.Parallel(n_jobs=joblib.cpu_count())(joblib.delayed(fingerprint)(trial) for trial in tasks.values())
    found: dict[str, dict[str, list[float]]] = {}
    for (variant, kind), pair in zip(tasks, losses, strict=True):
        found.setdefault(variant, {})[kind] = pair
    return found


def fingerprint(trial: ablation.Trial) -> list[float]:
    """Return the training and the validation loss of an epoch of 1,024 images: what the code does, in two numbers.

    They are infinite for a run that diverges.
    """
    images = ablation.load(replace(trial.source, images=FINGERPRINT_IMAGES))
    images = replace(images, validation=images.validation[:512])
    rows = replace(trial, recipe=replace(trial.recipe, epochs=1)).train_on(images)
    losses = {split: value for _, _, split, metric, value, _ in rows if metric == "loss"}
    return [losses.get("train", math.inf), losses.get("validation", math.inf)]


def stale(name: str) -> list[str]:
    """Return in what today's code and plan differ from those that the shipped rows of `name` were measured with.

    Nothing: the rows stand. A comment, another name or a new field that changes nothing leave them so. What is done in
    bf16 alone is compared only on a CPU with instructions for it: elsewhere it takes ten times as long.
    """
    reasons = replanned(name)
    if reasons:
        return reasons
    experiment, about = find(name), load(name).about
    today = fingerprints(experiment, list(TOLERANCE) if cpu_multiplies_bf16() else ["fp32"])
    for variant, then in about["fingerprints"].items():
        if not agree(then, today[variant]):
            reasons.append(f"{variant!r} trains otherwise: losses were {then}, are {today[variant]}")
    return reasons


def replanned(name: str) -> list[str]:
    """Return in what today's plan and images differ from those of the shipped rows of `name`: `stale` without a run."""
    experiment, about = find(name), load(name).about
    now = declared(experiment)
    reasons = changes({key: about[key] for key in now}, now)
    checksum = ablation.load(experiment.source).checksum
    reasons += [f"variants: {variant!r} is new" for variant in now["variants"].keys() - about["variants"].keys()]
    if about["measured_on"]["checksum"] != checksum:
        reasons.append(f"the images were others ({about['measured_on']['checksum'][:12]}, now {checksum[:12]})")
    return reasons


def agree(then: Mapping[str, list[float]], now: Mapping[str, list[float]]) -> bool:
    """True if two fingerprints of a variant are those of one behaviour, on any hardware: in each precision of `now`.

    How far a network amplifies rounding is what fp32 and bf16 differ by: three times that is no other behaviour. What
    training amplifies, validation may not show by chance (58 plain layers), so it is allowed the larger of the two; and
    where it shows much, it tells nothing.
    """
    steady = math.isclose(then["fp32"][1], then["bf16"][1], rel_tol=TOLERANCE["bf16"])
    spreads = [abs(a - b) if math.isfinite(a - b) else 0.0 for a, b in zip(then["fp32"], then["bf16"], strict=True)]
    spreads[1] = max(spreads)
    return all(
        math.isclose(a, b, rel_tol=TOLERANCE[kind], abs_tol=3 * spread)
        for kind in now
        for a, b, spread in list(zip(then[kind], now[kind], spreads, strict=True))[: 2 if steady else 1]
    )


def changes(then: Any, now: Any, path: str = "") -> list[str]:
    """Return a line for each recorded value that is another today; what was not recorded then is not compared."""
    if isinstance(then, dict) and isinstance(now, dict):
        gone = [f"{path}{key} is no more" for key in then.keys() - now.keys()]
        return gone + [line for key in then if key in now for line in changes(then[key], now[key], f"{path}{key}: ")]
    return [] if then == now else [f"{path}was {then!r}, is {now!r}"]


def save(name: str, results: Results) -> None:
    """Write results/`name`.csv, and then `name`.json, which holds the checksum of the rows."""
    write_rows(name, pd.concat([results.sweep, results.runs]), results.about)


def write_rows(name: str, rows: pd.DataFrame, about: Mapping[str, Any]) -> None:
    """Write rows to results/`name`.csv, and what they are rows of to `name`.json, with their checksum."""
    text = rows.assign(seconds=rows["seconds"].astype(float).round(2)).to_csv(index=False)
    files.write_rows(files.results_dir() / f"{name}.csv", text, about)


def load(name: str) -> Results:
    """Return the shipped results of the experiment called `name`. Raises ResultsError."""
    experiment = find(name)
    rows, about = read_rows(name, ablation.COLUMNS, f"ablate {name}")
    rows.attrs = about["measured_on"]
    tuned = rows["seed"].isin(experiment.tuning_seeds)
    return Results(rows[tuned].reset_index(drop=True), rows[~tuned].reset_index(drop=True), about)


def read_rows(name: str, columns: Sequence[str], command: str) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Return what `write_rows` wrote: the rows, and what they are rows of.

    Raises ResultsError where they are missing, damaged or edited; its remedy is the `command` of cnn.py.
    """
    remedy = f"measure them (python cnn.py {command}), or take them from git (git checkout results/{name}.*)"
    return tables.read_table(files.results_dir() / f"{name}.csv", remedy, columns)


def claims(read: Callable[[str], Results] = load) -> pd.DataFrame:
    """Return a row for each claim of the course: `evidence.compare`'s, with claim, experiment and lesson.

    The verdicts are Holm-corrected over all of them. Raises ResultsError.
    """
    rows = []
    for name, experiment in EXPERIMENTS.items():
        runs = read(name).runs
        for claim in experiment.claims:
            pair = runs[runs["variant"].isin([claim.variant, claim.baseline])]
            row = evidence.compare(pair, claim.baseline, claim.metric, margin=claim.margin)
            rows.append(row.assign(claim=claim.text, experiment=name, lesson=experiment.lesson))
    table = pd.concat(rows, ignore_index=True)
    return table.assign(verdict=evidence.verdicts(table))


def in_words(table: pd.DataFrame, *names: str) -> str:
    """Return verdict, difference and interval of each claim of the experiments called `names`, of rows of `claims`."""
    lines = []
    for row in table[table["experiment"].isin(names)].itertuples():
        low, high, margin = 100 * row.low, 100 * row.high, 100 * row.margin
        lines += [
            f"{row.claim}: {row.verdict}",
            f"    {row.variant} − {row.baseline}: {100 * row.difference:+.2f} points of {row.metric}",
            f"    95 % interval {low:+.2f} to {high:+.2f}, n = {row.n}; the claim: more than {margin:+g}",
        ]
    return "\n".join(lines)


def claims_table(table: pd.DataFrame) -> str:
    """Return the rows of `claims` as the README shows them: those that are decided, and the others folded away."""
    counts = table["verdict"].value_counts()
    of_all = ", ".join(f"{counts.get(verdict, 0)} {verdict}" for verdict in ("supported", "refuted", "inconclusive"))
    undecided = table["verdict"] == "inconclusive"
    lines = [f"Of {len(table)} claims: {of_all}.", "", *claim_rows(table[~undecided]), ""]
    summary = f"<summary>{undecided.sum()} claims that ten seeds, or five, could not decide</summary>"
    return "\n".join([*lines, "<details>", summary, "", *claim_rows(table[undecided]), "", "</details>"])


def claim_rows(table: pd.DataFrame) -> list[str]:
    """Return the lines of a Markdown table of `claims`."""
    lines = [
        "| people say | the claim: that | difference, points (95 % interval) | n | verdict | lesson |",
        "|---|---|---|---|---|---|",
    ]
    for row in table.itertuples():
        interval = f"{100 * row.difference:+.2f} ({100 * row.low:+.2f} to {100 * row.high:+.2f})"
        rises = f"rises by more than {100 * row.margin:g}"
        matters = f"{row.metric} {rises if row.margin >= 0 else f'falls by less than {-100 * row.margin:g}'}"
        n = f"{row.n}, {row.diverged} diverged" if row.diverged else f"{row.n}"
        verdict = f"[{row.verdict}](figures/evidence_{row.experiment}.png)"
        cells = (row.claim, matters, interval, n, verdict, lesson_link(row.lesson))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def lesson_link(lesson: str) -> str:
    """Return the number of `lesson`, as a link to it."""
    return f"[{int(lesson[:2])}](notebooks/{lesson}.ipynb)"
