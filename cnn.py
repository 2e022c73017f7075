"""The command line of the course: `python cnn.py` trains the network, `python cnn.py --help` lists the rest."""

import inspect
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import Field, asdict, fields
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any

try:
    import torch
    import typer
except ModuleNotFoundError as error:
    activate = f"source .venv/{'Scripts' if os.name == 'nt' else 'bin'}/activate"
    remedy = f"`make setup` installs it into .venv, `{activate}` takes a shell there"
    sys.exit(f"{sys.executable} lacks {error.name}: {remedy}; or pip install -r requirements.txt -c constraints.txt")

from utils import checkpoint, data, device, files, folders, parallel, tables, train
from utils.model import CNN, CNNConfig, check_images, check_norm

app = typer.Typer(
    context_settings={"help_option_names": ["-h", "--help"]},
    add_completion=False,
    pretty_exceptions_enable=False,
    help=__doc__,
    rich_markup_mode=None,
)
RUNS = files.ROOT / "runs"
SETTINGS_FILE = "settings.json"
ABOUT_FILE = "about.json"  # what decides the numbers of a run: every setting, the data, the machine of each start
HISTORY_FILE = "history.csv"  # written when a run has finished
CURVES_FILE = "curves.png"
RUN_FILES = (SETTINGS_FILE, ABOUT_FILE, HISTORY_FILE, "history.json", CURVES_FILE)
RUN_FILES += (checkpoint.MODEL_FILE, checkpoint.STATE_FILE)  # what a run writes into its folder
OPTIONS = ("device", "precision", "compiled", "cuda_graphs")  # of train.fit
MOST_THREADS = 1024  # more cannot be started everywhere, and the process would end
FROM_DATA = ("in_channels", "num_classes")  # fields of CNNConfig that the data decide

DEVICE_HELP = "auto (CUDA before MPS before CPU), cpu, cuda, cuda:1 or mps  [default: auto]"
BENCH_HELP = (
    "loop, frameworks, wide, images, width, avx2, dropout, probes, processes, sweep, waterfall, avx2_bf16, target, "
    "learning, roofline, growth, talk, record, lessons, one_core, or all  [default: loop]"
)
DATA_HELP = f"{', '.join(data.DATASETS)}, or a folder of images (train/CLASS/*, test/CLASS/*)"

Size = Annotated[int | None, typer.Option(help="resize images to SIZE × SIZE pixels")]
Channels = Annotated[int | None, typer.Option(help="read all images as 1 (grey) or 3 (colour) channels")]


def as_option(field: Field) -> inspect.Parameter:
    """Return the command-line option for one field of a configuration; not given, it is None."""
    kind = str if field.name == "init" else type(field.default)
    shown = typer.Option(help=f"{field.metadata['help']}  [default: {field.default}]", show_default=False)
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, shown]
    )


def named_folder(word: str) -> Path:
    """Return the folder that `word` names. Refuses an empty word, which `Path` takes for the current folder."""
    if not word:
        raise typer.BadParameter("expected the name of a folder; write . for the current one")
    return Path(word)


def with_fields(*configs: type) -> Callable[[Callable], Callable]:
    """Give a command that ends in `**chosen` one option for every field of `configs`; `chosen` gets those given."""

    def decorate(command: Callable) -> Callable:
        own = [p for p in inspect.signature(command).parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        added = [as_option(field) for config in configs for field in fields(config) if field.name not in FROM_DATA]
        names = {parameter.name for parameter in added}

        def run(**given: Any) -> None:
            command(**{name: value for name, value in given.items() if name not in names or value is not None})

        run.__signature__ = inspect.Signature([*own, *added])
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in [*own, *added]}
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        return run

    return decorate


@app.command("train")
@with_fields(CNNConfig, train.Recipe)
def train_command(
    *,
    data_name: Annotated[str | None, typer.Option("--data", help=f"{DATA_HELP}  [default: fashion-mnist]")] = None,
    size: Size = None,
    channels: Channels = None,
    images: Annotated[int | None, typer.Option(help="train on so many images only, as many of each class")] = None,
    device_name: Annotated[str | None, typer.Option("--device", help=DEVICE_HELP)] = None,
    precision: Annotated[str | None, typer.Option(help="auto, fp32, bf16, fp16 or fp64  [default: auto]")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; 1 makes a run reproducible bit for bit")] = None,
    compiled: Annotated[bool | None, typer.Option("--compile", help="run the network through torch.compile")] = None,
    cuda_graphs: Annotated[bool | None, typer.Option("--cuda-graphs", help="and as CUDA graphs, on such a GPU")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="folder of the run; default: a new one in runs/", parser=named_folder, metavar="PATH"),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the run in --out, or with the newest")] = False,
    test: Annotated[
        bool | None, typer.Option("--test/--no-test", help="read the test images once, at the end  [default: test]")
    ] = None,
    **chosen: Any,
) -> None:
    """Train the network, say how good it is on the test images, and draw its curves."""
    given = {"data": data_name, "size": size, "channels": channels, "images": images, "threads": threads}
    given |= {"device": device_name, "precision": precision, "compiled": compiled} | chosen
    given |= {"cuda_graphs": cuda_graphs, "test": test}
    given = {name: value for name, value in given.items() if value is not None}
    if given.get("data") not in (None, "", *data.DATASETS) and Path(given["data"]).is_dir():
        given["data"] = str(Path(given["data"]).resolve())  # so that the run can be resumed from another folder
    stays = next(folder for folder in ((out or RUNS).absolute(), *(out or RUNS).absolute().parents) if folder.exists())
    out = folder_of_run(out, resume, given.get("data", "fashion-mnist"))
    settings = (read_settings(out) | given) if resume else given
    preparing = True
    with ExitStack() as cleanup:
        cleanup.callback(remove_empty, out, stays)  # as the settings were refused
        try:
            with parallel.join(device.pick(settings.get("device", "auto"))):
                out = Path(parallel.from_first(str(out)))
                cleanup.enter_context(claimed(out, resume))
                model, images_in, recipe, options = prepare(settings)
                introduce(model, images_in, recipe, options, out)
                options |= {"out": out, "resume": resume}
                record = partial(record_start, settings, model, images_in, recipe, options)
                preparing = False
                with resumable(out):
                    history = train.fit(model, images_in, recipe, **options, on_start=record)
                    result = final_number(model, images_in, recipe, options) if settings.get("test", True) else None
            if parallel.is_first():
                with resumable(out):
                    conclude(images_in, history, result, out)
        except KeyboardInterrupt:
            print(f"\nstopped; {how_to_resume(out)}")
            raise typer.Exit(130) from None
        except parallel.WorkerLost as error:
            if preparing and not parallel.is_first():
                raise typer.Exit(1) from error  # the first process has said what was wrong
            raise parallel.WorkerLost(f"{error}: {how_to_resume(out)}") from error


def prepare(settings: dict[str, Any]) -> tuple[CNN, data.ImageData, train.Recipe, dict[str, Any]]:
    """Return network, data, recipe and the options of `train.fit` that `settings` name.

    Raises ValueError for what is refused.
    """
    unknown = settings.keys() - {"data", "size", "channels", "images", "threads", "test", *OPTIONS}
    unknown -= {field.name for config in (CNNConfig, train.Recipe) for field in fields(config)}
    if unknown:
        raise ValueError(f"unknown settings {', '.join(sorted(unknown))} in {SETTINGS_FILE}: train again")
    recipe = train.Recipe(**fields_of(train.Recipe, settings))
    network = fields_of(CNNConfig, settings)
    network |= {"init": number_or_word(network["init"])} if "init" in network else {}
    CNNConfig(**network)  # wrong fields are refused before any image is read
    where = device.pick(settings.get("device", "auto"))
    precision = device.pick_precision(where, settings.get("precision", "auto"))
    if settings.get("threads") is not None:
        if settings["threads"] not in range(1, MOST_THREADS + 1):
            raise ValueError(f"threads={settings['threads']!r}: expected a whole number from 1 to {MOST_THREADS}")
        torch.set_num_threads(settings["threads"])
    elif parallel.launched():
        torch.set_num_threads(parallel.threads())

    with parallel.in_turn():
        images = data.load(
            settings.get("data", "fashion-mnist"),
            size=settings.get("size"),
            channels=settings.get("channels"),
            progress=parallel.is_first(),
        )
    if settings.get("images") is not None:
        images = images.take(settings["images"])
    torch.manual_seed(recipe.seed)
    model = CNN(CNNConfig(in_channels=images.in_channels, num_classes=images.num_classes, **network))
    first = images.train.images[: recipe.batch_size // recipe.accumulate // parallel.size()]
    check_images(first, images.in_channels)  # before anything is written, not at the first step
    check_norm(first, model.config, training=True)
    options = {"device": str(where), "precision": precision}
    options |= {name: settings[name] for name in OPTIONS if name in settings and name not in options}
    return model, images, recipe, options


def fields_of(config: type, settings: dict[str, Any]) -> dict[str, Any]:
    """Return those of `settings` that are fields of `config`."""
    names = {field.name for field in fields(config)}
    return {name: value for name, value in settings.items() if name in names}


def folder_of_run(out: Path | None, resume: bool, name: str) -> Path:
    """Return the folder to write to. Raises ValueError rather than overwrite a run or resume a finished one."""
    if out is None and resume:
        return newest_run(checkpoint.STATE_FILE, unfinished=True)
    if out is None:
        out = RUNS / f"{datetime.now():%Y%m%d-%H%M%S}-{Path(name).name}"
        return new_folder(out) if parallel.is_first() else out
    refuse_taken(out, resume)
    return out


def refuse_taken(out: Path, resume: bool) -> None:
    """Raise ValueError where `out` holds a run, or, to resume it, a finished one."""
    if resume and (out / HISTORY_FILE).exists():
        raise ValueError(f"the run in --out {out} is finished: there is nothing to resume, train a new one")
    if not resume and (out / checkpoint.STATE_FILE).exists():
        raise ValueError(f"--out {out} holds a run already: add --resume to go on with it, or name another folder")


@contextmanager
def claimed(out: Path, resume: bool) -> Iterator[None]:
    """Keep other runs out of the folder while the block runs. Raises TimeoutError where one is in it already."""
    with files.claimed(out) if parallel.is_first() else nullcontext():
        refuse_taken(out, resume)  # again: another process may have trained in it just before
        yield


def remove_empty(folder: Path, stays: Path) -> None:
    """Remove `folder`, and the folders above it below `stays`, as far as nothing is in them."""
    with suppress(OSError):
        for each in (folder.absolute(), *folder.absolute().parents):
            if each == stays:
                return
            each.rmdir()


def new_folder(out: Path) -> Path:
    """Make the folder `out`, under another name where a run of the same second has it, or of a clock that went back."""
    try:
        return files.new_folder(out)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror} (--out)") from error


def newest_run(file: str, unfinished: bool = False) -> Path:
    """Return the newest folder in runs/ that holds `file`. Raises ValueError if there is none.

    An unfinished run is one that no process is training any more.
    """
    found = sorted(RUNS.glob(f"*/{file}"), key=lambda path: path.stat().st_mtime)
    if unfinished:
        found = [path for path in found if not (path.parent / HISTORY_FILE).exists()]
        found = [path for path in found if not files.is_claimed(path.parent)]
    if not found:
        kind = "no unfinished run" if unfinished else "no run"
        raise ValueError(f"{kind} with a checkpoint in {RUNS}: train one first (python cnn.py), or name its folder")
    return found[-1].parent


def read_settings(out: Path) -> dict[str, Any]:
    """Return the settings that the run in `out` was started with. Raises ValueError if they cannot be read."""
    return tables.read_record(out / SETTINGS_FILE, f"is {out} the folder of a run? If so, train again")


def number_or_word(value: Any) -> Any:
    """Return `value`, a word that is a number (as in --init 0.5) as a float."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def introduce(model: CNN, images: data.ImageData, recipe: train.Recipe, options: dict[str, Any], out: Path) -> None:
    """Print what is about to be trained, on what, and how."""
    shape = "×".join(str(side) for side in images.train.images.shape[1:])
    parameters = sum(weight.numel() for weight in model.parameters())
    sizes = f"{len(images.train):,} images to train, {len(images.validation):,} to validate"
    print(f"data      {images.name}, {shape}: {sizes}")
    print(f"network   {model.config.weighted_layers} weighted layers, {parameters:,} parameters")
    print(f"recipe    {recipe.epochs} epochs, batches of {recipe.batch_size}, lr {recipe.lr}, seed {recipe.seed}")
    processes = f", {os.environ['WORLD_SIZE']} processes" if parallel.launched() else ""
    print(f"device    {options['device']}, {options['precision']}, {torch.get_num_threads()} threads{processes}")
    print(f"run       {shown(out)}")


def record_start(
    settings: dict[str, Any], model: CNN, images: data.ImageData, recipe: train.Recipe, options: dict[str, Any]
) -> None:
    """Write the settings of a run that begins, and what decides its numbers, into its folder."""
    if parallel.is_first():
        earlier = started_on(options["out"]) if options["resume"] else []
        about = described_run(model, images, recipe, options, earlier)
        files.write_record(options["out"] / SETTINGS_FILE, settings)
        files.write_text(options["out"] / ABOUT_FILE, json.dumps(about, indent=1))


def described_run(
    model: CNN, images: data.ImageData, recipe: train.Recipe, options: dict[str, Any], earlier: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return what decides the numbers of a run; its machines are those of `earlier` starts, and this one."""
    from utils import ablation

    machine = device.describe(options["device"], options["precision"])
    machine |= {"processes": parallel.size(), "code": ablation.code_version()}
    source = {"name": images.name, "checksum": images.checksum, "train": len(images.train)}
    settings = {"network": asdict(model.config), "recipe": asdict(recipe), "data": source}
    return settings | {"machines": [*earlier, machine]}


def started_on(out: Path) -> list[dict[str, Any]]:
    """Return the machines that the run in `out` was started and resumed on, as far as that is known."""
    try:
        return list(json.loads((out / ABOUT_FILE).read_text(encoding="utf-8"))["machines"])
    except (OSError, ValueError, KeyError, TypeError):
        return []


@contextmanager
def resumable(out: Path) -> Iterator[None]:
    """Where the block fails for want of memory, disk, a permission or a compiler, say how the run in `out` goes on."""
    try:
        yield
    except OSError as error:
        number = [error.errno] if error.errno else []  # a file lock that is taken has none
        raise OSError(*number, f"{error.strerror or error}. Then: {how_to_resume(out)}") from error
    except (MemoryError, RuntimeError) as error:
        if "InvalidCxxCompiler" in str(error):
            remedy = "install one (on Debian and Ubuntu: apt install g++), or leave out --compile"
            raise ValueError(f"--compile needs a C++ compiler, and there is none on this machine: {remedy}") from error
        reason = device.out_of_memory(error)
        if not reason:
            raise
        remedy = "free some, or train anew with a smaller --batch-size, --width or --size, or with --accumulate"
        raise MemoryError(f"memory was short ({reason}): {remedy}. {how_to_resume(out).capitalize()}") from error


def how_to_resume(out: Path) -> str:
    """Say what was kept of a run that was stopped, and the command that goes on."""
    if not (out / checkpoint.STATE_FILE).exists():
        return "nothing was kept, as the first epoch had not ended: start again"
    command = (
        f"torchrun --standalone --nproc-per-node {os.environ['LOCAL_WORLD_SIZE']}" if parallel.launched() else "python"
    )
    return f"the finished epochs are kept. Go on with: {command} cnn.py --resume --out {quoted(out)}"


def final_number(model: CNN, images: data.ImageData, recipe: train.Recipe, options: dict[str, Any]) -> str:
    """Read the test images, the one time, and say how good the network is on them."""
    split = images.read_test("python cnn.py train: the final number of a run")
    stats = data.input_stats(images.train.images, recipe.input_norm)
    result = train.evaluate(model, split, stats, device=options["device"], precision=options["precision"], shared=True)
    correct = round(result["accuracy"] * len(split))
    return f"test accuracy {result['accuracy']:.2%} ({correct:,} of {len(split):,} images)"


def conclude(images: data.ImageData, history: train.History, result: str | None, out: Path) -> None:
    """Print the final numbers and write history.csv and curves.png beside the checkpoint."""
    seconds = history["seconds"].max()
    speed = history.loc[history["metric"] == "images_per_second", "value"].median()
    validated = history.last("validation", "accuracy")
    print(result or f"validation accuracy {validated:.2%} ({len(images.validation):,} images)")
    print(f"training took {seconds:.0f} s, {speed:,.0f} images/s")
    draw(history, out / CURVES_FILE)
    files.write_rows(out / HISTORY_FILE, history.to_csv(index=False), {})
    for path in map(Path, RUN_FILES):
        for left in files.temporaries(out, path.stem, path.suffix):  # by a process that was killed
            left.unlink(missing_ok=True)
    print(f"wrote {shown(out / CURVES_FILE)}; try: python cnn.py predict --run {quoted(out)} IMAGE")


def draw(history: train.History, path: Path) -> None:
    """Write the curves of `history` to `path`."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    from utils import plots

    plots.use_style()
    figure = plots.history(history)
    with files.atomic_path(path) as beside:
        figure.savefig(beside, dpi=150)
    pyplot.close(figure)


def shown(path: Path) -> Path:
    """Return `path` relative to the working directory where it lies below it."""
    path = path.resolve()
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def quoted(path: Path) -> str:
    """Return `path` as it must be typed in a shell."""
    word = str(shown(path))
    return subprocess.list2cmdline([word]) if os.name == "nt" else shlex.quote(word)


@app.command()
def predict(
    images: Annotated[list[Path], typer.Argument(help="image files", show_default=False)],
    run: Annotated[Path | None, typer.Option(help="folder of a trained run; default: the newest in runs/")] = None,
    invert: Annotated[
        bool, typer.Option("--invert", help="swap dark and light: Fashion-MNIST is light on dark")
    ] = False,
) -> None:
    """Print the three most probable classes of each image, by a trained checkpoint."""
    model, card = checkpoint.load_model(run if run is not None else newest_run(checkpoint.MODEL_FILE))
    stats = train.stats_of(card)
    for path in images:
        image = data.read_image(path, tuple(card["image_size"]), model.config.in_channels)  # C×H×W
        image = 255 - image if invert else image
        with torch.inference_mode():
            probabilities = model(data.normalize(image[None], stats)).softmax(1)[0]
        top = probabilities.topk(min(3, len(probabilities)))
        ranked = ", ".join(
            f"{card['class_names'][i]} {p:.1%}" for p, i in zip(top.values.tolist(), top.indices.tolist(), strict=True)
        )
        print(f"{path}: {ranked}")


@app.command()
def export(
    run: Annotated[Path | None, typer.Option(help="folder of a trained run; default: the newest in runs/")] = None,
    out: Annotated[Path, typer.Option(help="the file to write")] = Path("model.onnx"),
) -> None:
    """Write a trained checkpoint as one ONNX file, which runs without PyTorch, and check it against the original."""
    from utils import examine

    if out.suffix != ".onnx":
        raise ValueError(f"--out {out}: expected the name of a file that ends in .onnx")
    model, card = checkpoint.load_model(run if run is not None else newest_run(checkpoint.MODEL_FILE))
    difference = examine.export_onnx(model, card, out)
    shape = "×".join(map(str, (model.config.in_channels, *card["image_size"])))
    print(f"wrote {shown(out)}: uint8 images N×{shape}, 0 to 255, to logits N×{model.config.num_classes}")
    print(f"onnxruntime's logits differ from PyTorch's by at most {difference:.1e}")


@app.command()
def stats(
    data_name: Annotated[str, typer.Option("--data", help=DATA_HELP)] = "fashion-mnist",
    size: Size = None,
    channels: Channels = None,
) -> None:
    """Print mean and standard deviation of each channel over the training images."""
    images = data.load(data_name, size=size, channels=channels)
    found = data.channel_stats(images.train.images)
    print(f"{images.name}: {len(images.train):,} training images, {found.count:,} pixels a channel, pixel range 0 to 1")
    for name, values in {"mean": found.mean, "std": found.std}.items():
        print(f"{name} = ({', '.join(f'{value:.6f}' for value in values)},)")


@app.command()
def bench(
    what: Annotated[list[str] | None, typer.Argument(help=BENCH_HELP, show_default=False)] = None,
    rounds: Annotated[int, typer.Option(help="measurements of each loop, in turn")] = 7,
    images: Annotated[int, typer.Option(help="training images a measurement")] = 12_288,
) -> None:
    """Measure how fast the course's training loop is, here and now: against other loops, and the machine's peak."""
    from utils import bench as benchmark

    benchmark.speed(what or ["loop"], rounds, images)


@app.command()
def full(
    plan: Annotated[
        str,
        typer.Argument(
            help="full; photos: with harder augmentation; long: a larger network, trained for longer; record: that "
            "network in a hurry, for colour images of 32×32 ('record, SGD' and the like: without one of its ideas)"
        ),
    ] = "full",
    data_name: Annotated[str, typer.Option("--data", help=DATA_HELP)] = "fashion-mnist",
    size: Size = None,
    channels: Channels = None,
    seeds: Annotated[int, typer.Option(help="networks to train, with the seeds from 0 on", min=1)] = 5,
) -> None:
    """Train the full recipe with several seeds, test each network once, and write the runs into results/.

    They take the place of rows of the same seeds; on another machine, of all rows of that plan (git checkout results).
    """
    from utils import full_training

    full_training.find(plan)  # before any image is loaded
    rows = full_training.measure(data.load(data_name, size=size, channels=channels), plan, range(seeds))
    print(full_training.table(rows))


@app.command()
def ablate(
    names: Annotated[list[str] | None, typer.Argument(help="experiments, or all", show_default=False)] = None,
    listed: Annotated[bool, typer.Option("--list", help="list the experiments and whether their rows stand")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="say how much there is to do, and do nothing")] = False,
    jobs: Annotated[int | None, typer.Option(help="processes on this machine; default: one a core")] = None,
    scheduler: Annotated[str | None, typer.Option(help="of Dask: tcp://127.0.0.1:PORT, or tls://HOST:PORT")] = None,
    refresh: Annotated[bool, typer.Option("--refresh", help="train again what is kept, too")] = False,
    device_name: Annotated[str, typer.Option("--device", help=DEVICE_HELP, show_default=False)] = "auto",
    precision: Annotated[str, typer.Option(help="auto, fp32, bf16, fp16 or fp64")] = "auto",
) -> None:
    """Run experiments of the course, in which one field varies, and write their rows and figures."""
    from utils import experiments

    if plan and not names:
        raise ValueError("--plan of what? name experiments, or all: python cnn.py ablate all --plan")
    if listed or not names:
        print("\n".join(described(name) for name in experiments.EXPERIMENTS))
        return
    chosen = list(experiments.EXPERIMENTS) if names == ["all"] else names
    for name in chosen:
        experiments.find(name)  # all of them, before the first is run
    where = {"device": device_name, "precision": precision}
    if plan:
        print(estimate_in_words([trial for name in chosen for trial in experiments.find(name).plan(**where)]))
        return
    try:
        with on(scheduler):
            for name in chosen:
                results = experiments.measure(name, **where, jobs=jobs, refresh=refresh)
                experiments.save(name, results)
                print(f"wrote {shown(files.results_dir() / name)}.csv and {shown(draw_experiment(name, results.runs))}")
    except KeyboardInterrupt:
        print("\nstopped; the finished runs are kept, and the same command goes on")
        raise typer.Exit(130) from None


def described(name: str) -> str:
    """Return a line on the experiment called `name` and on its rows in results/."""
    from utils import experiments

    experiment = experiments.find(name)
    try:
        about, reasons = experiments.load(name).about["measured_on"], experiments.replanned(name)
        state = f"measured on {about['cpu']}, {about['precision']}"
        state += f"; stale ({reasons[0]}): python cnn.py ablate {name}" if reasons else ""
    except tables.ResultsError as error:
        state = str(error)
    return f"{name:<12}{experiment.question} {', '.join(experiment.vary)}; {state}"


def estimate_in_words(trials: list[Any]) -> str:
    """Return what a sweep will take."""
    from utils import ablation

    found = ablation.estimate(list(dict.fromkeys(trials)))
    return (
        f"{found['runs']} runs, {found['kept']} of them kept already; the others take about {found['core_hours']:.1f} "
        f"core-hours and {found['bytes'] / 1e6:.1f} MB"
    )


def on(scheduler: str | None) -> AbstractContextManager:
    """Return the context in which joblib's work is done: by the workers of `scheduler`, or here."""
    if scheduler is None:
        return nullcontext()
    from utils import cluster

    return cluster.connected(scheduler)


def draw_experiment(name: str, runs: Any) -> Path:
    """Draw `plots.experiment` into figures/, and return the file's path."""
    import matplotlib

    matplotlib.use("agg")
    from utils import plots

    plots.use_style()
    plots.save(plots.experiment(runs), f"evidence_{name}", show=False)
    return files.figures_dir() / f"evidence_{name}.png"


cache_app = typer.Typer(help="What is kept, so that it is not made again.", rich_markup_mode=None, no_args_is_help=True)
app.add_typer(cache_app, name="cache")


@cache_app.command()
def info() -> None:
    """Say where the cache is, what it holds, and how large it is."""
    downloads = {f"{name} (download)": files.cache_dir() / name for name in data.TORCHVISION}
    there = {kind: folder for kind, folder in downloads.items() if folder.exists()}
    for kind, folder in (cached() | there).items():
        found = kept_in(folder)
        size = sum(path.stat().st_size for path in found)
        print(f"{kind:<24}{len(found):>6} files {size / 1e6:>8.1f} MB  {folder}")


@cache_app.command()
def clear() -> None:
    """Delete the kept runs and the decoded images. Downloaded data sets stay."""
    for kind, folder in cached().items():
        found = kept_in(folder)
        for path in found:
            path.unlink(missing_ok=True)
        print(f"deleted {len(found)} {kind}")


def kept_in(folder: Path) -> list[Path]:
    """Return the files in `folder` and below, but for locks."""
    return [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]


def cached() -> dict[str, Path]:
    """Return the folders of what can be made again."""
    from utils import ablation

    decoded = files.cache_dir() / "folders"
    return {"finished runs": ablation.folder(), "rows of sweeps": ablation.sweeps(), "decoded images": decoded}


@app.command()
def doctor() -> None:
    """Print what a bug report needs, what is wrong on this machine, and what to do about it."""
    from utils import doctor as examiner

    raise typer.Exit(examiner.main() > 0)


@app.command()
def compare(
    paths: Annotated[
        list[Path] | None, typer.Argument(help="CSV files of experiments, folders of runs", show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option(help="the page to write")] = Path("compare.html"),
) -> None:
    """Write one HTML page that compares runs: curves, differences, settings. Without PATHS, of all that there are."""
    from utils import compare as comparison

    found = comparison.studies(paths)
    files.write_text(out, comparison.page(found))
    print(f"wrote {shown(out)}: {', '.join(study.name for study in found)}; open it in a browser")


@app.command(hidden=True)
def links(
    course: Annotated[str, typer.Option(help="https://github.com/OWNER/REPOSITORY")],
    ref: Annotated[str, typer.Option(help="branch or tag")] = "main",
) -> None:
    """Write another place of the course on the web into every file that names it (then: make format)."""
    from utils import links as places

    changed = places.move(course, ref)
    print(f"{course}, {ref}: changed {', '.join(str(shown(path)) for path in changed) or 'nothing'}")


@app.command(hidden=True)
def readme() -> None:
    """Write the measured figures and the claims of results/ into README.md."""
    from utils import bench as benchmark
    from utils import experiments, full_training, lessons

    benchmark.write_readme()
    lessons.write_readme()
    path = files.ROOT / "README.md"
    files.replace_block(path, experiments.BEGIN, experiments.END, experiments.claims_table(experiments.claims()))
    runs, _ = full_training.read()
    files.replace_block(path, full_training.BEGIN, full_training.END, full_training.table(full_training.whole(runs)))


def main() -> None:
    """Run the command line; `train` is the default command. Wrong input ends in one sentence, not in a traceback."""
    arguments = sys.argv[1:]
    for stream in filter(None, (sys.stdout, sys.stderr)):  # a closed one is None
        stream.reconfigure(errors="replace")  # a "?" where a terminal or a file cannot take "×"
    if not parallel.is_first():
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - one process of a run talks
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments = ["train", *arguments]
    try:
        app(arguments)
    except (
        ValueError,
        OSError,
        train.Diverged,
        parallel.WorkerLost,
        MemoryError,
        torch.OutOfMemoryError,
        ModuleNotFoundError,
    ) as error:
        silent = isinstance(error, train.Diverged) and not parallel.is_first()  # all processes find it at once
        sys.exit(1 if silent else f"error: {folders.shown(error)}")


if __name__ == "__main__":
    main()
