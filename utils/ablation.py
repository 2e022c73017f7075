"""Many runs that differ in one field: variants × learning rates × seeds, in parallel, each finished run kept.

    runs = ablation.run("batchnorm", CNNConfig(), {"norm": ["batch", "none"]}, Recipe(epochs=4), seeds=range(10))

Runs of one seed are pairs: they start from the same weights where shapes agree, and see the same images in the same
order with the same crops and flips. To share a sweep among machines, run it under `joblib.parallel_config("dask")`.
"""

import ast
import contextlib
import difflib
import hashlib
import itertools
import json
import math
import os
import re
import threading
import time
import warnings
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import joblib
import pandas as pd
import psutil
import torch
from joblib.externals.loky.process_executor import TerminatedWorkerError
from joblib.parallel import get_active_backend
from tqdm.auto import tqdm

from utils import checkpoint, data, files, parallel, train
from utils import device as devices
from utils.model import CNN, CNNConfig

Rates = float | Sequence[float] | Mapping[str, float | Sequence[float]] | None
Along = Mapping[str, Mapping[str, Any]] | None
ROWS = ["epoch", "step", "split", "metric", "value", "seconds"]  # columns of one run
COLUMNS = ["experiment", "variant", "lr", "seed", *ROWS]
NAMES = {("residual", True): "residual", ("residual", False): "plain"}  # of variants that a value does not name
NEEDS = {("dropout_where", "none"): {"dropout": 0.0}}  # a value that leaves another field without a meaning
LONGEST_NAME = 200  # bytes, of a sweep: files are called by it, and most systems allow 255
BYTES_A_ROW = 150  # of a kept run
TIMED_IMAGES = 64  # at least, for an estimate: starting takes as long as a few images
ALONE = threading.Lock()  # PyTorch's random numbers are those of the process: runs in threads of one would mix them


@dataclass(frozen=True)
class Source:
    """Which images the runs see: as `data.load` takes them, and how many of them to train on (None: all)."""

    name: str = "fashion-mnist"
    images: int | None = None
    size: int | None = None
    channels: int | None = None


@cache
def load(source: Source) -> data.ImageData:
    """Return the images of `source`, which a process reads once. Raises what `data.load` and `take` raise."""
    images = data.load(source.name, size=source.size, channels=source.channels, progress=False)
    return images if source.images is None else images.take(source.images)


@dataclass(frozen=True)
class Trial:
    """One run: all that decides its numbers, but for the code and the kind of hardware."""

    config: CNNConfig
    recipe: train.Recipe
    source: Source
    device: str
    precision: str

    def key(self) -> str:
        """Return the name that the run is kept under: SHA-256 of its settings, images, code and PyTorch's version."""
        settings = asdict(self) | {"checksum": load(self.source).checksum, "code": code_version()}
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:40]

    def train(self) -> list[list[Any]]:
        """Train, and return rows as in ROWS. On a CPU in one thread: any such machine gives the same bits, busy or not.

        A run that diverges gives the rows of the epochs before, and says so in its last row.
        """
        return self.train_on(load(self.source))

    def train_on(self, images: data.ImageData) -> list[list[Any]]:
        """Do what `train` does on `images`, which may be a few of those of the source."""
        threads = torch.get_num_threads()
        if self.device == "cpu":
            torch.set_num_threads(1)
        try:
            return self.rows(images)
        finally:
            torch.set_num_threads(threads)

    def rows(self, images: data.ImageData) -> list[list[Any]]:
        """Train on `images` with as many threads as there are, and return rows as in ROWS."""
        kept = train.History(columns=train.History.COLUMNS)
        torch.manual_seed(self.recipe.seed)
        model = CNN(replace(self.config, in_channels=images.in_channels, num_classes=images.num_classes))
        options = {"device": self.device, "precision": self.precision, "progress": False}

        def keep(history: train.History) -> None:
            nonlocal kept
            kept = history

        try:
            train.fit(model, images, self.recipe, **options, on_epoch=keep)
            diverged = 0.0
        except train.Diverged:
            diverged = 1.0
        rows = kept.loc[kept["metric"] != "images_per_second", ROWS].to_numpy().tolist()  # seconds say the same
        last = rows[-1] if rows else [0, 0, "", "", 0.0, 0.0]
        return [*rows, [last[0], last[1], "train", train.DIVERGED, diverged, last[5]]]


def run(
    experiment: str,
    base: CNNConfig,
    vary: Mapping[str, Sequence[Any] | Mapping[str, Any]],
    recipe: train.Recipe,
    seeds: Sequence[int],
    *,
    lr: Rates = None,
    source: Source = Source(),
    grid: bool = False,
    along: Along = None,
    device: str = "auto",
    precision: str = "auto",
    jobs: int | None = None,
    refresh: bool = False,
    progress: bool = True,
) -> pd.DataFrame:
    """Train every variant with every seed, and return all rows: COLUMNS, sorted, as `History` has them for one run.

    `vary` names one field of CNNConfig or Recipe and its values, or a dict of names and values; with `grid`, two
    fields, of which all pairs are variants. `along` declares, for a variant by name, other fields that change along
    with it: because something else is to stay equal (the FLOPs, by the width), or because two fields are one decision.
    `lr` is one learning rate, several (a sweep), or either for each variant by name; without it the recipe's. On CPUs
    `jobs` processes (None: one a core) of one thread share the work, on a GPU one. Finished runs are kept in
    cache_dir()/runs and not trained again, unless `refresh`. The frame's `attrs` say what the numbers were measured on;
    of the machine, which does not decide them, only this one is known, not those that trained what was kept, or helped.
    The rows stay in cache_dir()/sweeps, too, until a sweep of the same name: `compare` shows them beside the course's.
    Raises ValueError for a field, value, seed or learning rate that is refused, parallel.WorkerLost when a process is
    killed.
    """
    named = isinstance(experiment, str) and experiment.isprintable()
    if not named or not 0 < len(experiment.encode()) <= LONGEST_NAME:
        expected = f"a name of 1 to {LONGEST_NAME} bytes: as many letters of English, a third as many of Chinese"
        raise ValueError(f"experiment={experiment!r}: expected {expected}")
    if jobs is not None and (not isinstance(jobs, int) or isinstance(jobs, bool) or jobs < 1):
        raise ValueError(f"jobs={jobs!r}: expected how many processes, 1 or more, or None: one a core")
    options = {"source": source, "grid": grid, "along": along, "device": device, "precision": precision}
    trials = plan(base, vary, recipe, seeds, lr=lr, **options)
    frame = tidy(experiment, trials, execute(list(trials.values()), jobs, refresh, progress and f"{experiment}: runs"))
    leave(experiment, frame, trials)
    return frame


def tidy(
    experiment: str, trials: Mapping[tuple[str, float, int], Trial], results: Mapping[Trial, list[list[Any]]]
) -> pd.DataFrame:
    """Return the rows of a `plan`'s runs as `run` does: COLUMNS, sorted, and in `attrs` what they were measured on."""
    rows = [[experiment, *labels, *row] for labels, trial in trials.items() for row in results[trial]]
    frame = pd.DataFrame(rows, columns=COLUMNS)
    order = {name: place for place, name in enumerate(dict.fromkeys(variant for variant, _, _ in trials))}
    places = frame["variant"].map(order)
    frame = frame.assign(place=places).sort_values(["place", "lr", "seed", "step"], kind="stable")
    frame = frame.drop(columns="place").reset_index(drop=True)
    frame.attrs = environment(next(iter(trials.values())))
    return frame


def sweeps() -> Path:
    """Return the folder of the rows of sweeps, a CSV file and a JSON file for the last one of each name."""
    return files.cache_dir() / "sweeps"


def leave(experiment: str, frame: pd.DataFrame, trials: Mapping[tuple[str, float, int], Trial]) -> None:
    """Write the rows of a sweep, and what they are rows of, into `sweeps`."""
    name = re.sub(r"^\.|[^\w ,.=+-]", "_", experiment)  # no hidden file either
    if name != experiment:  # "a/b" is another sweep than "a_b"
        name = f"{name}-{hashlib.sha256(experiment.encode()).hexdigest()[:8]}"
    about = {"variants": settings(trials), "measured_on": frame.attrs}
    files.write_rows(sweeps() / f"{name}.csv", frame.to_csv(index=False), about)


def settings(trials: Mapping[tuple[str, float, int], Trial]) -> dict[str, dict[str, Any]]:
    """Return of each variant in a `plan` all that is the same at whatever learning rate, seed and device."""
    found = {variant: asdict(trial) for (variant, _, _), trial in trials.items()}
    for setting in found.values():
        del setting["device"], setting["precision"], setting["recipe"]["seed"], setting["recipe"]["lr"]
    return found


def plan(
    base: CNNConfig,
    vary: Mapping[str, Sequence[Any] | Mapping[str, Any]],
    recipe: train.Recipe,
    seeds: Sequence[int],
    *,
    lr: Rates = None,
    source: Source = Source(),
    grid: bool = False,
    along: Along = None,
    device: str = "auto",
    precision: str = "auto",
) -> dict[tuple[str, float, int], Trial]:
    """Return the runs that `run` would make with these arguments, by (variant, lr, seed)."""
    check_kinds(base=base, vary=vary, recipe=recipe, seeds=seeds, source=source, grid=grid)
    check_kinds(along={} if along is None else along, device=device, precision=precision)
    seeds = list(seeds)
    if not seeds or len(set(map(repr, seeds))) < len(seeds):
        raise ValueError(f"seeds={seeds!r}: expected one or more, each of them once")
    where = devices.pick(device)
    options = {"source": source, "device": str(where), "precision": devices.pick_precision(where, precision)}
    trials, made = {}, variants(base, recipe, vary, grid, along)
    if isinstance(lr, Mapping) and set(lr) != set(made):
        raise ValueError(f"lr={dict(lr)!r}: expected a learning rate, or several, for each of {', '.join(made)}")
    for name, (config, its_recipe) in made.items():
        for rate in rates(lr, name, its_recipe):
            for seed in seeds:
                trials[name, rate, seed] = Trial(config, replace(its_recipe, lr=rate, seed=seed), **options)
    return trials


KINDS = {
    "base": (CNNConfig, "a CNNConfig"),
    "vary": (Mapping, "a dict of a field and its values, {'norm': ['batch', 'none']}"),
    "recipe": (train.Recipe, "a Recipe"),
    "seeds": (Sequence, "a list of whole numbers, or a range"),
    "source": (Source, "a Source"),
    "grid": (bool, "True or False"),
    "along": (Mapping, "a dict of variants and the fields that change with them"),
    "device": (str, "a name such as 'cpu'"),
    "precision": (str, "a name such as 'fp32'"),
}


def check_kinds(**arguments: Any) -> None:
    """Raise ValueError that names the first of the arguments of `plan` that is of another kind than expected."""
    for name, value in arguments.items():
        kind, expected = KINDS[name]
        if not isinstance(value, kind) or (kind is Sequence and isinstance(value, str | bytes)):
            raise ValueError(f"{name}={value!r}: expected {expected}")


def rates(lr: Rates, variant: str, recipe: train.Recipe) -> list[float]:
    """Return the learning rates of `variant`."""
    own = lr[variant] if isinstance(lr, Mapping) else lr
    if own is None:
        return [recipe.lr]
    if isinstance(own, Sequence) and (isinstance(own, str | bytes) or not own):
        raise ValueError(f"lr={own!r}: expected a learning rate, or a list of several")
    return list(own) if isinstance(own, Sequence) else [own]


def variants(
    base: CNNConfig,
    recipe: train.Recipe,
    vary: Mapping[str, Sequence[Any] | Mapping[str, Any]],
    grid: bool,
    along: Along = None,
) -> dict[str, tuple[CNNConfig, train.Recipe]]:
    """Return network and recipe of each variant, by its name.

    Raises ValueError for more than one field that varies, and for fields in `along` that cannot go along.
    """
    if len(vary) != (2 if grid else 1):
        expected = "two fields for grid=True" if grid else "one field, or two and grid=True"
        raise ValueError(f"vary names {len(vary)} fields ({', '.join(map(str, vary)) or 'none'}): expected {expected}")
    found: dict[str, dict[str, Any]] = {}  # the changes of each variant
    for combination in itertools.product(*(choices(field, values) for field, values in vary.items())):
        name = ", ".join(name for _, name, _ in combination)
        if name in found:
            raise ValueError(f"vary={dict(vary)!r}: two variants are called {name!r}; expected different ones")
        found[name] = {}
        for field, _, value in combination:
            found[name] |= {field: value} | NEEDS.get((field, value), {})
    for name, changes in (along or {}).items():
        check_along(name, changes, vary, found)
        found[name] |= changes
    return {name: (changed(base, changes), changed(recipe, changes)) for name, changes in found.items()}


def changed(config: CNNConfig | train.Recipe, changes: Mapping[str, Any]) -> CNNConfig | train.Recipe:
    """Return `config` with those of `changes` that are fields of it."""
    return replace(config, **{field: value for field, value in changes.items() if field in names(type(config))})


def check_along(name: str, changes: Mapping[str, Any], vary: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Raise ValueError unless `changes` can go along with the variant `name`, one of `found`."""
    if name not in found:
        raise ValueError(f"along has a variant {name!r} that there is not: choose one of {', '.join(found)}")
    if not isinstance(changes, Mapping):
        raise ValueError(f"along[{name!r}]={changes!r}: expected a dict of fields and their values")
    for field in changes:
        check_field(f"along[{name!r}]", field)
        if field in vary:
            raise ValueError(f"along[{name!r}] changes {field}, which vary changes: expected other fields")


def check_field(where: str, field: str) -> None:
    """Raise ValueError unless `field` is one that may differ between variants; `where` is the argument that has it."""
    known = [name for name in (*names(CNNConfig), *names(train.Recipe)) if name not in ("seed", "lr")]
    if field not in known:
        near = difflib.get_close_matches(str(field), known, 3) or known
        remedy = f"; give {field}s by {'seeds=' if field == 'seed' else 'lr='}" if field in ("seed", "lr") else ""
        raise ValueError(f"{where} has no field {field!r} to change: choose one of {', '.join(near)}{remedy}")


def choices(field: str, values: Sequence[Any] | Mapping[str, Any]) -> list[tuple[str, str, Any]]:
    """Return (field, name of the variant, value) of each value that `field` takes."""
    check_field("vary", field)
    if not isinstance(values, Sequence | Mapping) or isinstance(values, str) or len(values) < 2:
        raise ValueError(f"vary[{field!r}]={values!r}: expected two or more values to compare, in a list")
    for value in values.values() if isinstance(values, Mapping) else values:
        if not isinstance(value, Hashable):
            raise ValueError(f"vary[{field!r}] has the value {value!r}: expected numbers, words, True or False")
    if isinstance(values, Mapping):
        return [(field, name, value) for name, value in values.items()]
    return [(field, NAMES.get((field, value), name_of(field, value)), value) for value in values]


def name_of(field: str, value: Any) -> str:
    """Return what a variant is called: words name themselves, numbers and switches need their field."""
    return value if isinstance(value, str) else f"{field} {value}"


def names(config: type) -> list[str]:
    """Return the names of the fields of a configuration."""
    return [field.name for field in fields(config)]


def execute(trials: list[Trial], jobs: int | None, refresh: bool, bar: str | bool) -> dict[Trial, list[list[Any]]]:
    """Return the rows of each trial: kept ones at once, the others trained, and kept as each of them ends."""
    results = {}
    for trial in () if refresh else set(trials):
        rows = kept(trial)
        if rows is not None:
            results[trial] = rows
    missing = [trial for trial in dict.fromkeys(trials) if trial not in results]
    with tqdm(total=len(set(trials)), initial=len(results), desc=bar or None, unit="run", disable=not bar) as shown:
        for trial, rows in in_parallel(missing, jobs):
            keep(trial, rows)
            results[trial] = rows
            shown.update()
    return results


def in_parallel(trials: list[Trial], jobs: int | None) -> Iterator[tuple[Trial, list[list[Any]]]]:
    """Yield each trial with its rows as it ends, from as many processes as `run` says, or from joblib's own backend."""
    if not trials:
        return
    if jobs is None:
        jobs = 1 if trials[0].device != "cpu" else joblib.cpu_count()
    jobs = min(jobs, len(trials))  # joblib would start all of them at once
    elsewhere = type(get_active_backend()[0]).__name__ == "DaskDistributedBackend"
    workers = joblib.Parallel(n_jobs=-1 if elsewhere else jobs, return_as="generator_unordered")
    try:
        code, own = code_version(), os.getpid()
        yield from workers(joblib.delayed(work)(t, code, load(t.source).checksum, own) for t in trials)
    except TerminatedWorkerError as error:
        raise parallel.WorkerLost(
            "a process of the sweep was lost (killed, or out of memory); the finished runs are kept: run it again to "
            "go on, with fewer jobs if memory was short"
        ) from error
    except (MemoryError, RuntimeError) as error:
        reason = devices.out_of_memory(error)
        if not reason:
            raise
        raise MemoryError(
            f"a run of the sweep ran out of memory ({reason}); the finished runs are kept: run it again to "
            "go on, with fewer jobs, or change it to smaller batches or networks"
        ) from error


def work(trial: Trial, code: str, checksum: str, sweep: int = 0) -> tuple[Trial, list[list[Any]]]:
    """Train `trial` in a process that must run the same code on the same images. Raises RuntimeError if it does not.

    A worker that the process `sweep` has started on this machine ends with it.
    """
    if os.getppid() == sweep:
        end_with(sweep)
    if code_version() != code:
        raise RuntimeError("a worker runs other code or another PyTorch than the sweep: update it, and start it again")
    if (found := load(trial.source).checksum) != checksum:
        what = f"{trial.source.name}: a worker has other images than the sweep ({found[:12]}, not {checksum[:12]})"
        raise RuntimeError(f"{what}: give it the same, and start both again, since they read them once")
    with ALONE:
        return trial, trial.train()


@cache
def end_with(parent: int) -> None:
    """Let this process end as soon as its `parent` does, however that ends: nobody would take its results."""

    def follow() -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(parent).wait()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def folder() -> Path:
    """Return the folder of the kept runs."""
    return files.cache_dir() / "runs"


def keep(trial: Trial, rows: list[list[Any]]) -> None:
    """Keep the rows of a finished trial."""
    checkpoint.write(folder() / f"{trial.key()}.safetensors", {"rows": rows})


def kept(trial: Trial) -> list[list[Any]] | None:
    """Return the kept rows of `trial`; None where there are none, or, with a warning, where the file is damaged."""
    path = folder() / f"{trial.key()}.safetensors"
    if not path.exists():
        return None
    try:
        return checkpoint.read(path, "rows")["rows"]
    except checkpoint.CheckpointError as error:
        warnings.warn(f"a kept run is damaged and will be trained again: {error}", stacklevel=4)
        return None


def estimate(trials: Sequence[Trial]) -> dict[str, float]:
    """Return "runs", "kept" ones, and of the rest "core_hours" and "bytes", from a timed part of an epoch of each kind.

    Runs that differ in nothing but learning rate, seed and number of epochs are of one kind.
    """
    missing = [trial for trial in trials if kept(trial) is None]
    kinds = {trial: replace(trial, recipe=replace(trial.recipe, epochs=1, lr=1e-6, seed=0)) for trial in missing}
    seconds = {kind: seconds_an_epoch(kind) for kind in dict.fromkeys(kinds.values())}
    hours = sum(trial.recipe.epochs * seconds[kind] for trial, kind in kinds.items()) / 3600
    rows = sum(5 * trial.recipe.epochs + 1 for trial in missing)
    return {"runs": len(trials), "kept": len(trials) - len(missing), "core_hours": hours, "bytes": rows * BYTES_A_ROW}


def seconds_an_epoch(trial: Trial) -> float:
    """Return about how long a core has to do with the one epoch of `trial`: part of it is run twice, the second timed.

    The part is two batches or more, and the same share of the validation images.
    """
    images, size = load(trial.source), trial.recipe.batch_size
    some = max(2, TIMED_IMAGES // size) * size
    share = min(1.0, some / len(images.train))
    validation = images.validation[: math.ceil(share * len(images.validation))]
    few = replace(images, train=images.train[:some], validation=validation)
    clock = time.process_time if trial.device == "cpu" else time.perf_counter  # what else the cores do is not counted
    trial.train_on(few)
    begin = clock()
    trial.train_on(few)
    return (clock() - begin) / share


def facet(runs: pd.DataFrame, value: str) -> pd.DataFrame:
    """Return of a grid's rows those of the variants with this `value` of one field, called by their other one.

    facet(runs, "no norm") has of "he, no norm" and "he, batch norm" the first, as "he". Raises ValueError that lists
    the values there are, or for one that both fields have.
    """
    parts = runs["variant"].str.split(", ", expand=True)
    if value not in parts.to_numpy():
        there = ", ".join(dict.fromkeys(parts.T.to_numpy().ravel()))
        raise ValueError(f"no variant has the value {value!r}: choose one of {there}")
    if (parts == value).any().sum() > 1:
        remedy = "give one of them a name of its own, vary={'field': {'name': value}}"
        raise ValueError(f"{value!r} is a value of both fields: {remedy}")
    chosen = parts[(parts == value).any(axis=1)]
    names = chosen[0].where(chosen[0] != value, chosen[len(parts.columns) - 1])
    return runs.loc[chosen.index].assign(variant=names)


def environment(trial: Trial) -> dict[str, Any]:
    """Return what numbers are measured on: machine (this one), code, data, and the size of the validation split."""
    images = load(trial.source)
    machine = devices.describe(trial.device, trial.precision) | {"threads": "1 a run"}
    about = {"data": images.name, "checksum": images.checksum, "images": len(images.train)}
    about |= {"validation_images": len(images.validation), "num_classes": images.num_classes}
    return machine | about | {"code": code_version()}


@cache
def code_version() -> str:
    """Return the SHA-256 of what a run's code does: of this module and all of `utils` that it imports, and of PyTorch.

    Comments, docstrings and layout do not count. (Python's own version may: `ast.dump` is not the same in all of them.)
    """
    here, parsed, waiting = Path(__file__).parent, {}, [Path(__file__).stem]
    while waiting:
        module = waiting.pop()
        if module not in parsed:
            tree = ast.parse((here / f"{module}.py").read_text(encoding="utf-8"))
            parsed[module] = ast.dump(without_docstrings(tree))
            waiting += [name for name in imported(tree) if (here / f"{name}.py").exists()]
    text = json.dumps([torch.__version__, parsed], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def imported(tree: ast.AST) -> set[str]:
    """Return the names that a module imports from `utils`."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "utils":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("utils."):
            found.add(node.module.removeprefix("utils."))
    return found


def without_docstrings(tree: ast.Module) -> ast.Module:
    """Return `tree` after its docstrings were taken out."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        first = body[0] if isinstance(body, list) and body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            del body[0]
    return tree


code_version()  # of the code that this process has just imported, whatever is edited before its first run
