"""A file that a disk, a copy or an editor has damaged never gives another number, and is named with what to do.

Each kind of file that the course reads is read with flipped bits, cut off, and replaced by something else. Then there
is what the whole file gives (since it can be made anew, or since nothing that counts was hit), or one sentence.
"""

import io
import json
import pickle
import random
import re
import shutil
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import cnn
from utils import (
    ablation,
    bench,
    checkpoint,
    compare,
    data,
    exercises,
    experiments,
    files,
    full_training,
    tables,
    train,
)
from utils.model import CNN, CNNConfig

SHIPPED = files.ROOT / "results"
TABLES = ("speed", "corruptions", "loss_surfaces", "test_reads")  # which lessons read besides experiments' rows
QUICK, THOROUGH = 20, 200  # flips of each kind
HEAD = 2_000  # bytes of a file in which its names, types and shapes are
FROM_GIT = "git checkout"


@dataclass(frozen=True)
class Kind:
    """Files of one kind, and what the course makes of each of them: `read` raises, warns, or returns it."""

    read: dict[Path, Callable[[], Any]]
    remedy: str  # a pattern of what is to be done
    another: dict[Path, bytes] = field(default_factory=dict)  # whole files of the same format, which are not these
    made_anew: bool = False  # what is damaged may be made again, with a warning or without


# ------------------------------------------------------------------------------------------------ the kinds of files


def embedded_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kind:
    folder = shutil.copytree(data.FASHION_MNIST, tmp_path / "fashion-mnist")
    monkeypatch.setattr(data, "FASHION_MNIST", folder)
    training, test = (
        (lambda: vars(data._read_fashion_mnist(True)[0])),
        (lambda: vars(data._read_fashion_mnist(False)[0])),
    )
    read = {path: training if path.name.startswith("train") else test for path in sorted(folder.glob("*.gz"))}
    labels = (folder / "t10k-labels-idx1-ubyte.gz").read_bytes()
    another = {folder / "train-labels-idx1-ubyte.gz": labels}
    return Kind(read | {folder / "SHA256SUMS": test}, FROM_GIT, another)


def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: list[str], read: Callable[[str], Any]) -> Kind:
    """The tables of results/ called `names`, in a copy; each of them stands for another one, too."""
    folder = tmp_path / "results"
    folder.mkdir()
    monkeypatch.setenv("CNN_RESULTS_DIR", str(folder))
    paths = [folder / f"{name}.{suffix}" for name in names for suffix in ("csv", "json")]
    for path in paths:
        shutil.copy(SHIPPED / path.name, path)
    for path in paths[::2]:  # without what `make train` has appended here to the log of the test images
        path.write_bytes(path.read_bytes()[: files.read_record(path.with_suffix(".json")).get("rows_bytes")])
    another = {path: (SHIPPED / f"schedule_32{path.suffix}").read_bytes() for path in paths}
    return Kind({path: (lambda stem=path.stem: read(stem)) for path in paths}, FROM_GIT, another)


def experiments_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kind:
    names = [name for name in experiments.EXPERIMENTS if name != "schedule_32"]
    return shipped(tmp_path, monkeypatch, names, lambda name: vars(experiments.load(name)))


def full_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kind:
    return shipped(tmp_path, monkeypatch, ["full_training"], lambda name: full_training.read())


def speeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kind:
    monkeypatch.setattr(files, "ROOT", tmp_path)
    return shipped(tmp_path, monkeypatch, ["speed"], lambda name: bench.measured_on())


def other_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kind:
    return shipped(
        tmp_path, monkeypatch, list(TABLES[1:]), lambda name: tables.read_table(files.results_dir() / f"{name}.csv")
    )


def shipped_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kind:
    monkeypatch.setenv("CNN_RESULTS_DIR", str(tmp_path))
    shutil.copytree(SHIPPED / "full_training", full_training.folder())
    return Kind({full_training.folder() / checkpoint.MODEL_FILE: shown_network}, "train again|train first")


def shown_network(folder: Path | None = None) -> Any:
    network, card = checkpoint.load_model(folder or full_training.folder())
    return {**network.state_dict(), "config": vars(network.config), "card": card}


def decoded_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kind:
    monkeypatch.setenv("CNN_CACHE_DIR", str(tmp_path / "cache"))
    draw = np.random.default_rng(0)
    for name in ("train/a", "train/b", "test/a", "test/b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(3):
            pixels = draw.integers(256, size=(8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{number}.png")

    def read() -> Any:
        images = data.load(tmp_path / "images", progress=False)
        return vars(images.train), vars(images.validation), images.checksum, vars(images._test())

    read()
    return Kind(dict.fromkeys(sorted((files.cache_dir() / "folders").iterdir()), read), "remove it", made_anew=True)


RECIPE = train.Recipe(epochs=1, batch_size=64, lr=0.1)
SOURCE = ablation.Source(images=64)
NORMS = {"norm": ["batch", "none"]}


def kept_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kind:
    monkeypatch.setenv("CNN_CACHE_DIR", str(tmp_path))
    trial, *_ = ablation.plan(CNNConfig(width=4), NORMS, RECIPE, [0], source=SOURCE, device="cpu").values()
    ablation.keep(trial, [[1, 1, "train", "loss", 2.5, 0.1], [1, 1, "validation", "accuracy", 0.25, 0.1]])
    (path,) = ablation.folder().glob("*.safetensors")
    return Kind(
        {path: lambda: ablation.kept(trial)}, "trained again|remove it", {path: of_another_kind()}, made_anew=True
    )


def of_another_kind() -> bytes:
    """A whole checkpoint that holds nothing that anybody looks for."""
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(checkpoint.pack({"nothing": torch.arange(3)}, tensors))
    return checkpoint.save(tensors, metadata={"record": text, "sha256": checkpoint.digest(text, tensors)})


def sweeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kind:
    monkeypatch.setenv("CNN_CACHE_DIR", str(tmp_path))
    trials = ablation.plan(CNNConfig(width=4), NORMS, RECIPE, [0, 1], source=SOURCE, device="cpu")
    rows = [["mine", *labels, 1, 1, "validation", "accuracy", 0.25, 0.1] for labels in trials]
    frame = pd.DataFrame(rows, columns=ablation.COLUMNS)
    frame.attrs = {"num_classes": 10, "cpu": "some"}
    ablation.leave("mine", frame, trials)
    another = {
        ablation.sweeps() / f"mine.{kind}": (SHIPPED / f"batchnorm.{kind}").read_bytes() for kind in ("csv", "json")
    }
    return Kind(dict.fromkeys(another, lambda: studied(ablation.sweeps())), "run that sweep again, or delete", another)


def studied(folder: Path) -> Any:
    """The rows and the settings of what `compare` finds."""
    known = compare.defaults()
    return [
        (study.name, study.rows, [{name: each.get(name) for name in known} for each in study.settings.values()])
        for study in compare.studies([folder])
    ]


def trained(folder: Path) -> tuple[CNN, data.ImageData]:
    """A run of two epochs in `folder`, as `python cnn.py` leaves it; its network as it was made, and its images."""
    images = data.load(progress=False).take(64)
    settings = {
        "width": 4,
        "epochs": 2,
        "batch_size": 32,
        "images": 64,
        "threads": 1,
        "device": "cpu",
        "precision": "fp32",
    }
    files.write_record(folder / cnn.SETTINGS_FILE, settings)
    model, images, recipe, options = cnn.prepare(settings)
    history = train.fit(model, images, recipe, **options, out=folder, progress=False)
    cnn.conclude(images, history, None, folder)
    return model, images


def networks_of_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kind:
    torch.manual_seed(0)
    checkpoint.save_model(tmp_path, CNN(CNNConfig(width=4)), {"epoch": 1, "mean": [0.1]})
    path = tmp_path / checkpoint.MODEL_FILE
    return Kind({path: lambda: shown_network(tmp_path)}, "train again|train first", {path: of_another_kind()})


def interrupted_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kind:
    images, recipe = data.load(progress=False).take(32), train.Recipe(epochs=1, batch_size=32)
    images = replace(images, validation=images.validation[:8])

    def read(resume: bool = True) -> Any:
        torch.manual_seed(0)
        model = CNN(CNNConfig(width=2))
        history = train.fit(model, images, recipe, device="cpu", out=tmp_path, resume=resume, progress=False)
        return {**model.state_dict(), "history": pd.DataFrame(history)}

    read(resume=False)
    path = tmp_path / checkpoint.STATE_FILE
    return Kind({path: read}, "train again|train first", {path: of_another_kind()})


def records_of_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kind:
    folder = tmp_path / "run"
    rows = [["run", epoch, epoch, "validation", "accuracy", 0.1 * epoch, 1.5 * epoch] for epoch in (1, 2, 3)]
    files.write_rows(
        folder / cnn.HISTORY_FILE, train.History(rows, columns=train.History.COLUMNS).to_csv(index=False), {}
    )
    files.write_record(folder / cnn.SETTINGS_FILE, {"lr": 0.125, "seed": 3, "width": 8, "norm": "none"})
    paths = [folder / cnn.HISTORY_FILE, folder / "history.json", folder / cnn.SETTINGS_FILE]
    another = {paths[0]: (SHIPPED / "batchnorm.csv").read_bytes(), paths[1]: (SHIPPED / "batchnorm.json").read_bytes()}
    return Kind(dict.fromkeys(paths, lambda: studied(folder)), "train again, or delete the folder", another)


def solved_exercises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kind:
    monkeypatch.setenv("CNN_CACHE_DIR", str(tmp_path))
    for key in ("00.block", "00.network", "01.mean"):
        exercises.remember(key)
    return Kind({tmp_path / exercises.SOLVED: exercises.solved_keys}, "check your answers again", made_anew=True)


KINDS = {
    kind.__name__.replace("_", " "): kind
    for kind in (
        embedded_images,
        experiments_rows,
        full_runs,
        speeds,
        other_tables,
        shipped_network,
        decoded_images,
        kept_runs,
        sweeps,
        networks_of_runs,
        interrupted_runs,
        records_of_runs,
        solved_exercises,
    )
}


@pytest.fixture(autouse=True)
def nobody_else_writes(monkeypatch):
    """What does not fit together is not read again, in case that another process is writing it just then."""
    monkeypatch.setattr(files, "READINGS", 1)


@pytest.fixture(params=KINDS)
def kind(request, tmp_path, monkeypatch) -> Kind:
    return KINDS[request.param](tmp_path, monkeypatch)


# --------------------------------------------------------------------------------------------------------- the faults


@dataclass(frozen=True)
class Trap:
    """What runs code when it is unpickled: it makes the file `path`."""

    path: Path

    def __reduce__(self):
        return Path.touch, (self.path,)


def others(trap: Path) -> dict[str, bytes]:
    """Whole files of other types."""
    picture, archive, one = io.BytesIO(), io.BytesIO(), np.arange(3)
    Image.new("L", (4, 4)).save(picture, "PNG")
    with zipfile.ZipFile(archive, "w") as packed:
        packed.writestr("data.pkl", pickle.dumps(Trap(trap)))
    numbers = io.BytesIO()
    np.savez(numbers, one=one)
    saved = io.BytesIO()
    torch.save({"weights": torch.zeros(2), "trap": Trap(trap)}, saved)
    return {
        "a picture": picture.getvalue(),
        "an archive": archive.getvalue(),
        "arrays": numbers.getvalue(),
        "a pickle": pickle.dumps(Trap(trap)),
        "a pickle of PyTorch": saved.getvalue(),
        "a text": "Dear reader,\nthis is 1 of 2 lines, and not in ASCII: é\n".encode("latin-1"),
        "a table": b"a,b\n1,2\n",
        "a list": b"[1, 2, 3]\n",
        "a number": b"3\n",
        "names": b"{}\n",
        "nothing there": b"null\n",
        "deep lists": b"[" * 100_000,
        "zeros": bytes(5_000),
    }


def same(one: Any, other: Any) -> bool:
    """True for equal values, with frames, arrays and tensors in them."""
    if type(one) is not type(other):
        return False
    if isinstance(one, pd.DataFrame):
        return one.equals(other) and one.attrs == other.attrs
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def outcome(kind: Kind, path: Path, whole: Any) -> str:
    """Return "refused", "the same" or "made anew"; fail for another value, and for a sentence that does not help."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found, sentence = answer(kind.read[path])
    if sentence is None and same(found, whole):
        return "the same"
    assert sentence is not None or (kind.made_anew and not found), f"another value: {found}"
    words = sentence or " ".join(str(each.message) for each in said)
    assert helps(words, path, kind.remedy), words
    return "refused" if sentence else "made anew"


def answer(read: Callable[[], Any]) -> tuple[Any, str | None]:
    """Return what `read` returns, and what it says where it refuses."""
    try:
        return read(), None
    except (ValueError, OSError) as error:
        return None, str(error)


def helps(sentence: str, path: Path, remedy: str) -> bool:
    """True if it names the file (or of a pair the other one) and says what to do, in one line."""
    return path.stem in sentence and re.search(remedy, sentence) is not None and "\n" not in sentence


def put(path: Path, content: bytes | None) -> None:
    """Put a file with this content in the place of what is at `path`; None: a folder."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.mkdir() if content is None else path.write_bytes(content)


# ---------------------------------------------------------------------------------------------------------- the tests


def test_flipped_bits_never_give_another_number(kind):
    flip(kind, QUICK, "quick")


@pytest.mark.thorough
def test_many_flipped_bits_never_give_another_number(kind):
    flip(kind, max(THOROUGH, 10 * len(kind.read)), "thorough")


def flip(kind: Kind, times: int, seed: str) -> None:
    """Flip one bit of one of the files in turn, each time of the whole one: anywhere, and near its head by turns."""
    draw, paths = random.Random(seed), list(kind.read)
    contents = {path: path.read_bytes() for path in paths}
    whole = {path: kind.read[path]() for path in paths[:times]}
    found = []
    for number in range(times):
        path = paths[number % len(paths)]
        end = HEAD if number // len(paths) % 2 else len(contents[path])
        place, bit = draw.randrange(min(end, len(contents[path]))), draw.randrange(8)
        damaged = bytearray(contents[path])
        damaged[place] ^= 1 << bit
        put(path, damaged)
        try:
            found.append(outcome(kind, path, whole[path]))
        except Exception as error:
            error.add_note(f"bit {bit} of byte {place} of {path.name}")
            raise
        put(path, contents[path])
    assert found.count("the same") < times / 2 or kind.made_anew, "hardly any of these bits mattered"


def test_files_that_are_cut_off_are_refused_or_made_anew(kind):
    cut_off(kind, 3)


@pytest.mark.thorough
def test_all_files_that_are_cut_off_are_refused_or_made_anew(kind):
    cut_off(kind, len(kind.read), pieces=10)


def cut_off(kind: Kind, most: int, pieces: int = 3) -> None:
    """Cut off so many of the files, each at its beginning, at its end, and between."""
    for path in some(kind, most):
        content, whole = path.read_bytes(), kind.read[path]()
        for length in {0, 1, len(content) - 2, *range(2, len(content) - 2, len(content) // pieces)}:
            put(path, content[:length])
            found = outcome(kind, path, whole)
            much = length > len(content) / 2  # what is left may be all that this reader needs
            assert found != "the same" or kind.made_anew or much, f"{length} bytes of {path.name} are as good as all"
        put(path, content)


def test_files_of_other_types_are_refused_or_made_anew(kind, tmp_path_factory):
    replace_by_others(kind, 2, tmp_path_factory.mktemp("trap") / "sprung")


@pytest.mark.thorough
def test_all_files_of_other_types_are_refused_or_made_anew(kind, tmp_path_factory):
    replace_by_others(kind, len(kind.read), tmp_path_factory.mktemp("trap") / "sprung")


def replace_by_others(kind: Kind, most: int, trap: Path) -> None:
    """Put files of all `others` in the place of so many files, a folder, and a whole file of the same format."""
    for path in some(kind, most):
        content, whole = path.read_bytes(), kind.read[path]()
        another = {"another of its kind": kind.another[path]} if path in kind.another else {}
        for name, other in {"a folder": None, **others(trap), **another}.items():
            put(path, other)
            try:
                found = outcome(kind, path, whole)
            except Exception as error:
                error.add_note(f"{name} in the place of {path.name}")
                raise
            assert found != "the same" or kind.made_anew, f"{name} is taken for {path.name}"
            assert not trap.exists(), f"{name} ran its code"
        put(path, content)
        assert same(kind.read[path](), whole)


def some(kind: Kind, most: int) -> list[Path]:
    """Return so many of the files, the same ones each time."""
    return random.Random(1).sample(list(kind.read), min(most, len(kind.read)))


def test_the_trap_is_one(tmp_path):
    """Each file that is to run code does so where it is unpickled."""
    for name in ("a pickle", "a pickle of PyTorch"):
        content = others(tmp_path / name)[name]
        pickle.loads(content) if name == "a pickle" else torch.load(io.BytesIO(content), weights_only=False)
        assert (tmp_path / name).exists()


def test_every_shipped_file_of_results_has_a_kind(tmp_path, monkeypatch):
    known = set()
    for number, make in enumerate((experiments_rows, full_runs, speeds, other_tables, shipped_network)):
        folder = tmp_path / str(number)
        folder.mkdir()
        known |= {path.name for path in make(folder, monkeypatch).read}
    there = {path.name for path in SHIPPED.rglob("*") if path.is_file() and path.name[0] != "."}
    assert there - known == {"schedule_32.csv", "schedule_32.json"}  # which stand for others above


# -------------------------------------------------------------------------------------------- what is not lost by it


def test_a_kept_run_that_is_damaged_is_trained_again_and_gives_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("CNN_CACHE_DIR", str(tmp_path))
    options = {"source": SOURCE, "device": "cpu", "precision": "fp32", "jobs": 1, "progress": False}
    first = ablation.run("mine", CNNConfig(width=4), NORMS, RECIPE, [0], **options).drop(columns="seconds")
    for path, content in zip(sorted(ablation.folder().glob("*.safetensors")), (b"", of_another_kind()), strict=True):
        put(path, content)
    with pytest.warns(UserWarning, match="a kept run is damaged and will be trained again"):
        again = ablation.run("mine", CNNConfig(width=4), NORMS, RECIPE, [0], **options).drop(columns="seconds")
    pd.testing.assert_frame_equal(again, first, check_exact=True)
    for path in ablation.folder().glob("*.safetensors"):
        put(path, None)
    with (
        pytest.warns(UserWarning, match="trained again"),
        pytest.raises(OSError, match="a folder of that name.*remove"),
    ):
        ablation.run("mine", CNNConfig(width=4), NORMS, RECIPE, [0], **options)


def test_damaged_results_are_told_before_anything_is_measured(tmp_path, monkeypatch):
    """Not when an hour of training is over, or five minutes of measurements."""
    for make in (full_runs, speeds):
        folder = tmp_path / make.__name__
        folder.mkdir()
        for path in make(folder, monkeypatch).read:
            content = path.read_bytes()
            put(path, content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
            monkeypatch.setattr(train, "fit", lambda *_, **__: pytest.fail("something was trained"))
            monkeypatch.setitem(bench.MEASUREMENTS, "loop", lambda *_: pytest.fail("something was measured"))
            with pytest.raises(tables.ResultsError, match="git checkout"):
                bench.speed() if make is speeds else full_training.measure(data.load().take(64), progress=False)
            put(path, content)


def test_rows_that_are_added_here_are_rows_too(tmp_path, monkeypatch):
    """A reader's own measurements and readings of test images stand beside those that came with the course."""
    monkeypatch.setattr(bench, "commit", lambda: "1234567")
    speeds(tmp_path, monkeypatch)
    shutil.copy(SHIPPED / "test_reads.csv", files.results_dir())
    shutil.copy(SHIPPED / "test_reads.json", files.results_dir())
    path, reads = files.results_dir() / bench.SPEED_FILE, files.results_dir() / "test_reads.csv"
    before, first = bench.read(path), tables.read_table(reads)[0]
    bench.append(path, pd.DataFrame([bench.row("a", "x", [1.0, 2.0])]).assign(measurement="loop"), {"cpu": "some"})
    data.load(progress=False).read_test("a test")
    assert bench.read(path)["median"].tolist() == [*before["median"], 1.5]
    assert tables.read_table(reads)[0]["purpose"].tolist() == [*first["purpose"], "a test"]


def test_a_row_that_is_appended_after_one_that_was_cut_off_stands_alone(tmp_path):
    path = tmp_path / "log.csv"
    for number in (1, 2):
        files.append_row(path, {"a": number, "b": "some words"})
    path.write_bytes(path.read_bytes()[:-6])
    files.append_row(path, {"a": 3, "b": "other words"})
    assert pd.read_csv(path)["a"].tolist() == [1, 2, 3]
    assert pd.read_csv(path)["b"].tolist() == ["some words", "some ", "other words"]


def test_rows_that_somebody_wrote_by_hand_are_read(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text(
        "experiment,variant,lr,seed,epoch,step,split,metric,value,seconds\n"
        "mine,a,0.1,0,1,1,validation,accuracy,0.5,1\n",
        encoding="utf-8",
    )
    assert compare.studies([path])[0].rows["value"].tolist() == [0.5]
    path.with_suffix(".json").write_text('{"variants": {"a": {"config": {"width": 4}}}}', encoding="utf-8")
    assert compare.studies([path])[0].settings == {"a": {"width": 4, "lr": 0.1}}
    for text in ('{"variants": [1]}', '{"variants": {"a": 3}}', '{"measured_on": 3}'):
        path.with_suffix(".json").write_text(text, encoding="utf-8")
        with pytest.raises(tables.ResultsError, match="mine.json .*: run that sweep again, or delete"):
            compare.studies([path])
    path.with_suffix(".json").unlink()
    path.write_text(path.read_text(encoding="utf-8").replace(",0,1,1,", ",zero,1,1,"), encoding="utf-8")
    with pytest.raises(tables.ResultsError, match="mine.csv has no numbers, or other things too, in the column seed"):
        compare.studies([path])


# --------------------------------------------------------------------------------------------------- the command line


@pytest.fixture(scope="module")
def course(tmp_path_factory) -> Path:
    """A copy of what the commands read: results, README and lessons, a run that ended and one that did not, a sweep."""
    root = tmp_path_factory.mktemp("course")
    shutil.copytree(SHIPPED, root / "results")
    shutil.copytree(files.ROOT / "notebooks" / "src", root / "notebooks" / "src")
    shutil.copytree(data.FASHION_MNIST, root / "images")
    shutil.copy(files.ROOT / "README.md", root)
    trained(root / "runs" / "ended")
    shutil.copytree(root / "runs" / "ended", root / "runs" / "stopped")
    (root / "runs" / "stopped" / cnn.HISTORY_FILE).unlink()
    (root / "runs" / "stopped" / "history.json").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CNN_CACHE_DIR", str(root / "cache"))
        (root / "sweep").mkdir()
        sweeps(root / "cache", patch)
    Image.new("L", (28, 28)).save(root / "picture.png")
    return root


COMMANDS = {
    "predict": ("runs/ended/model.safetensors", ["predict", "--run", "runs/ended", "picture.png"]),
    "export": ("runs/ended/model.safetensors", ["export", "--run", "runs/ended", "--out", "network.onnx"]),
    "resume": ("runs/stopped/state.safetensors", ["--resume", "--out", "runs/stopped", "--no-test"]),
    "resume, settings": ("runs/stopped/settings.json", ["--resume", "--out", "runs/stopped", "--no-test"]),
    "compare, history": ("runs/ended/history.csv", ["compare", "runs/ended"]),
    "compare, record": ("runs/ended/history.json", ["compare", "runs/ended"]),
    "compare, settings": ("runs/ended/settings.json", ["compare", "runs/ended"]),
    "compare, experiment": ("results/init.csv", ["compare", "results/init.csv"]),
    "compare, sweep": ("cache/sweeps/mine.csv", ["compare", "cache/sweeps/mine.csv"]),
    "compare, all": ("cache/sweeps/mine.json", ["compare"]),
    "readme, speeds": ("results/speed.csv", ["readme"]),
    "readme, claims": ("results/ledger.json", ["readme"]),
    "readme, runs": ("results/full_training.csv", ["readme"]),
    "stats": ("images/train-labels-idx1-ubyte.gz", ["stats"]),
    "stats, sums": ("images/SHA256SUMS", ["stats"]),
}


ALWAYS = ("predict", "resume", "compare, history", "readme, speeds", "stats")


@pytest.mark.parametrize(
    "name", [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.thorough) for name in COMMANDS]
)
def test_commands_end_in_one_sentence(name, course, tmp_path, monkeypatch, capsys):
    """For each fault: `error: …`, exit status 1, and no file is written."""
    file, words = COMMANDS[name]
    shutil.copytree(course, tmp_path / "course")
    stand_in(tmp_path / "course", monkeypatch)
    path = Path(file)
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    there = listing(path)
    for damaged in (content[:-4], bytes(flipped), b"", None, pickle.dumps(Trap(tmp_path / "sprung"))):
        put(path, damaged)
        ended = str(status(words, monkeypatch))
        assert ended.startswith("error: "), capsys.readouterr()
        assert helps(ended, path, "git checkout|train again|train first|run that sweep again"), ended
        assert listing(path) == there
    assert not (tmp_path / "sprung").exists()
    put(path, content)
    assert status(words, monkeypatch) in (0, None)


def status(words: list[str], monkeypatch: pytest.MonkeyPatch) -> str | int | None:
    """Return what `python cnn.py` with these `words` leaves the shell with: a sentence, or 0."""
    monkeypatch.setattr("sys.argv", ["cnn.py", *words])
    with pytest.raises(SystemExit) as ended:
        cnn.main()
    return ended.value.code


def stand_in(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the commands work in `root`, the copy of the course."""
    monkeypatch.chdir(root)
    monkeypatch.setattr(files, "ROOT", root)
    monkeypatch.setattr(data, "FASHION_MNIST", root / "images")
    for name in ("results", "figures", "cache"):
        monkeypatch.setenv(f"CNN_{name.upper()}_DIR", str(root / name))


def listing(damaged: Path) -> set[str]:
    """Return what other files there are, but for hidden ones, and for the record of where a run was started."""
    found = {
        path for path in Path().rglob("*") if path.is_file() and path.name[0] != "." and path.name != cnn.ABOUT_FILE
    }
    return {str(path) for path in found - {damaged}}


def test_the_list_of_experiments_says_which_rows_are_damaged(course, tmp_path, monkeypatch, capsys):
    shutil.copytree(course, tmp_path / "course")
    stand_in(tmp_path / "course", monkeypatch)
    put(Path("results/init.csv"), b"")
    put(Path("results/pooling.json"), None)
    assert status(["ablate", "--list"], monkeypatch) in (0, None)
    lines = {line.partition(" ")[0]: line for line in capsys.readouterr().out.splitlines()}
    assert (
        "init.csv are not those that were measured (damaged, or edited): measure them (python cnn.py ablate init)"
        in lines["init"]
    )
    assert "pooling.json beside it, cannot be read" in lines["pooling"]
    assert "measured on" in lines["ledger"]
