"""Faults that are really injected, and nothing is lost: killed processes, full disks, folders that refuse or vanish.

Where a moment matters it is drawn at random, but the same at each run; a few always, twenty in `make test-all`.
"""

import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from PIL import Image

import cnn
from utils import ablation, checkpoint, data, exercises, experiments, files, full_training, plots, train
from utils.model import CNNConfig

if os.name == "nt":
    pytest.skip("faults are injected by signals, limits and mounts, which Windows lacks", allow_module_level=True)
import resource

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.test_faults"])  # so that a process has at once all that is imported here
MOMENTS = [pytest.param(3, id="3 moments"), pytest.param(20, id="20 moments", marks=pytest.mark.thorough)]
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="mounts and limits as Linux has them")


@pytest.fixture(autouse=True)
def own_folders_for_each(tmp_path, monkeypatch):
    for kind in ("cache", "results", "figures"):
        monkeypatch.setenv(f"CNN_{kind.upper()}_DIR", str(tmp_path / kind))
    monkeypatch.setattr(cnn, "RUNS", tmp_path / "runs")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """A folder of 3 classes of 60 noisy images of 16×16 pixels, of which a class is brighter than the one before."""
    root, draw = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for label in range(3):
        (root / f"class {label}").mkdir()
        for number in range(60):
            pixels = draw.integers(60 * label, 60 * label + 120, (16, 16), dtype=np.uint8)
            Image.fromarray(pixels).save(root / f"class {label}" / f"{number}.png")
    return root


def begin(work: Callable, *arguments: object, log: Path | None = None) -> multiprocessing.Process:
    """Start `work(*arguments)` in a process of its own, in one thread, its output going to `log`."""
    process = FORKS.Process(target=_inside, args=(work, arguments, dict(os.environ), log and str(log)))
    process.start()
    return process


def _inside(work: Callable, arguments: tuple, environment: dict[str, str], log: str | None) -> None:
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    file = os.open(log or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    work(*arguments)


def end(process: multiprocessing.Process, seconds: float = 120) -> int:
    """Return the exit status of `process`, or -N when signal N ended it."""
    process.join(seconds)
    assert process.exitcode is not None, "it does not end"
    return process.exitcode


def alone(work: Callable, *arguments: object, log: Path | None = None) -> int:
    return end(begin(work, *arguments, log=log))


# ------------------------------------------------------------------------------------------------- writing, killed


class Kept(NamedTuple):
    """A way to keep something: `write(folder, n)` keeps the n-th thing, `read(folder)` says which is there."""

    write: Callable[[Path, int], None]
    read: Callable[[Path], int]


def write_checkpoint(folder: Path, n: int) -> None:
    checkpoint.write(folder / "x.safetensors", {"n": n, "weights": torch.full((3000,), n)})


def read_checkpoint(folder: Path) -> int:
    found = checkpoint.read(folder / "x.safetensors")
    assert torch.equal(found["weights"], torch.full((3000,), found["n"]))
    return found["n"]


def some_rows(n: int) -> pd.DataFrame:
    return pd.DataFrame([["e", "v", 0.1, s, 1, 1, "train", "loss", n / 3, 0.5] for s in range(60)], columns=COLUMNS)


COLUMNS = ablation.COLUMNS


def write_results(folder: Path, n: int) -> None:
    experiments.write_rows("x", some_rows(n), {"n": n})


def read_results(folder: Path) -> int:
    rows, about = experiments.read_rows("x", COLUMNS, "ablate x")
    assert rows["value"].tolist() == [about["n"] / 3] * 60
    return about["n"]


def write_sweep(folder: Path, n: int) -> None:
    frame = some_rows(n)
    frame.attrs = {"n": n}
    ablation.leave("my sweep 0.5", frame, {})


def read_sweep(folder: Path) -> int:
    text, about = files.read_rows(ablation.sweeps() / "my sweep 0.5.csv")
    n = about["measured_on"]["n"]
    assert text.decode() == some_rows(n).to_csv(index=False)
    return n


def write_log(folder: Path, n: int) -> None:
    files.append_row(folder / "log.csv", {"n": n, "purpose": f'"{n}"\n' + "long " * 2000})


def read_log(folder: Path) -> int:
    rows = pd.read_csv(folder / "log.csv")
    assert (rows["purpose"].str.len() > 10_000).all()
    return rows["n"].iloc[-1]


def write_progress(folder: Path, n: int) -> None:
    exercises.remember(f"exercise {n} " + "x" * 500)


def read_progress(folder: Path) -> int:
    return max(int(key.split()[1]) for key in exercises.solved_keys())


def write_full(folder: Path, n: int) -> None:
    rows = some_rows(n).assign(run="pictures", seed=n)[full_training.COLUMNS]
    full_training.save(rows, "pictures", {"epochs": 3})


def read_full(folder: Path) -> int:
    rows, about = full_training.read()
    assert about["runs"] == {"pictures": {"epochs": 3}}
    assert (rows.groupby("seed")["value"].unique().map(list) == [[n / 3] for n in sorted(set(rows["seed"]))]).all()
    return rows["seed"].max()


KEPT = {
    "checkpoint": Kept(write_checkpoint, read_checkpoint),
    "results": Kept(write_results, read_results),
    "rows of a sweep": Kept(write_sweep, read_sweep),
    "log": Kept(write_log, read_log),
    "progress": Kept(write_progress, read_progress),
    "full runs": Kept(write_full, read_full),
}
NOT_SO_MANY = 77  # exit status: there was no step of that number
STEPS = ("open", "os.rename", "os.mkdir", "os.remove")  # of Python's audit events


def at_step(folder: str, number: int, act: Callable[[], None], work: Callable, *arguments: object) -> None:
    """Do `work`, and `act` before the step of this number that touches `folder`."""
    counted, busy = iter(range(number + 1)), []

    def step(event: str, details: tuple) -> None:
        if event in STEPS and not busy and str(details[0]).startswith(folder) and next(counted, None) == number:
            busy.append(event)
            act()
            busy.clear()

    sys.addaudithook(step)
    work(*arguments)
    if next(counted, None) is not None:
        os._exit(NOT_SO_MANY)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_at_byte(size: int, work: Callable, *arguments: object) -> None:
    """Do `work` until a file grows beyond `size` bytes: then the system kills the process, whoever writes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    work(*arguments)


def sizes(folder: Path) -> list[int]:
    return [path.stat().st_size for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize("kind", KEPT)
def test_killed_at_any_step_of_a_write_leaves_the_old_or_the_new(kind, tmp_path):
    kept, deaths = KEPT[kind], 0
    kept.write(tmp_path, 1)
    for number in range(100):
        before = kept.read(tmp_path)
        status = alone(at_step, str(tmp_path), number, die, kept.write, tmp_path, before + 1)
        assert kept.read(tmp_path) in (before, before + 1)
        if status == NOT_SO_MANY:
            break
        assert status == -signal.SIGKILL
        deaths += 1
        kept.write(tmp_path, before + 1)  # the next one is not kept from it
        assert kept.read(tmp_path) == before + 1
    assert deaths >= 3  # before opening, renaming, removing


@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize("kind", KEPT)
def test_killed_at_a_random_byte_leaves_the_old_or_the_new(kind, moments, tmp_path):
    kept, draw = KEPT[kind], random.Random(kind)
    kept.write(tmp_path, 1)
    for _ in range(moments):
        before, size = kept.read(tmp_path), draw.randrange(max(sizes(tmp_path)))
        assert alone(killed_at_byte, size, kept.write, tmp_path, before + 1) == -signal.SIGXFSZ
        assert kept.read(tmp_path) == before
    kept.write(tmp_path, before + 1)
    assert kept.read(tmp_path) == before + 1


@pytest.mark.parametrize("kind", KEPT)
def test_killed_at_the_first_write_leaves_nothing_that_keeps_from_the_second(kind, tmp_path):
    kept = KEPT[kind]
    for number in range(100):
        folder = tmp_path / str(number)
        for name in ("CACHE", "RESULTS"):
            os.environ[f"CNN_{name}_DIR"] = str(folder)  # the fixture puts back what was there
        folder.mkdir()
        status = alone(at_step, str(folder), number, die, kept.write, folder, 1)
        kept.write(folder, 2)
        assert kept.read(folder) == 2
        if status == NOT_SO_MANY:
            break
    assert number >= 3


def test_what_a_killed_write_left_is_removed_by_a_later_one(tmp_path):
    """A temporary file may be another process' at work: it goes when nobody has touched it for an hour."""
    other = tmp_path / ".y-01234567.safetensors"  # of another file
    other.touch()
    write_checkpoint(tmp_path, 1)
    assert alone(killed_at_byte, 2000, write_checkpoint, tmp_path, 2) == -signal.SIGXFSZ
    (left,) = files.temporaries(tmp_path, "x")
    write_checkpoint(tmp_path, 2)
    assert left.exists()
    for path in (left, other):
        os.utime(path, (time.time() - 7200,) * 2)
    write_checkpoint(tmp_path, 3)
    assert [path.name for path in files.temporaries(tmp_path)] == [other.name]


def look_at(pictures: Path) -> None:
    data.load(pictures, progress=False)


def brighter(pictures: Path, folder: Path, level: int) -> None:
    """A copy of `pictures`, whose first image is all of one grey level."""
    shutil.copytree(pictures, folder, dirs_exist_ok=True)
    Image.fromarray(np.full((16, 16), level, dtype=np.uint8)).save(folder / "class 0" / "1.png")


@pytest.mark.parametrize("moments", MOMENTS)
def test_killed_while_images_are_cached_the_next_load_is_right(moments, pictures, tmp_path):
    draw, cache, own = random.Random(0), tmp_path / "cache", tmp_path / "own"
    brighter(pictures, own, 0)
    look_at(own)
    size = max(sizes(cache))
    deaths = [(at_step, str(cache), number, die) for number in range(min(moments, 12))]
    deaths += [(killed_at_byte, draw.randrange(size)) for _ in range(moments)]
    with warnings.catch_warnings(action="error"):  # a half-written file would be reported as damaged
        for level, death in enumerate(deaths, start=1):
            brighter(pictures, own, level)
            assert alone(*death, look_at, own) in (-signal.SIGKILL, -signal.SIGXFSZ, NOT_SO_MANY)
            images = data.load(own, progress=False)
            everything = torch.cat([images.train.images, images.validation.images])
            assert (everything == level).flatten(1).all(1).any()


# ------------------------------------------------------------------------------------------------ training, killed

FAST = ["--epochs", "8", "--batch-size", "32", "--width", "4", "--depth", "4", "--threads", "1", "--precision", "fp32"]
FAST += ["--device", "cpu", "--dropout", "0.1", "--dropout-where", "head", "--ema", "0.9"]
REMAIN = {
    "about.json",
    "curves.png",
    "history.csv",
    "history.json",
    "model.safetensors",
    "settings.json",
    "state.safetensors",
}


def command(*arguments: object) -> None:
    """Do what `python cnn.py arguments` does."""
    sys.argv = ["cnn.py", *map(str, arguments)]
    cnn.main()


def training(pictures: Path, out: Path) -> list[object]:
    return [*FAST, "--data", pictures, "--out", out]


def same_run(a: Path, b: Path) -> None:
    """The same weights, and the same history but for what a clock says; nothing is left that does not belong there."""
    weights = [checkpoint.read(out / checkpoint.MODEL_FILE) for out in (a, b)]
    assert weights[0]["card"] == weights[1]["card"]
    assert all(torch.equal(weights[0]["weights"][name], weight) for name, weight in weights[1]["weights"].items())
    histories = [pd.read_csv(out / cnn.HISTORY_FILE, dtype=str) for out in (a, b)]  # every digit
    assert all((history["seconds"].astype(float) >= 0).all() for history in histories)
    untimed = [h[h["metric"] != "images_per_second"].drop(columns="seconds") for h in histories]
    pd.testing.assert_frame_equal(*untimed)
    assert left_in(b) == REMAIN


def left_in(out: Path) -> set[str]:
    return {path.name for path in out.iterdir() if path.suffix != ".lock"}


@pytest.fixture(scope="session")
def undisturbed(pictures, tmp_path_factory) -> Path:
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        for kind in ("cache", "results", "figures"):
            patch.setenv(f"CNN_{kind.upper()}_DIR", str(folder / kind))
        log = folder / "log"
        assert alone(command, *training(pictures, folder / "run"), log=log) == 0, log.read_text("utf-8")
    return folder / "run"


def wait_for(least: int, count: Callable[[], int], process: multiprocessing.Process) -> None:
    """Wait until so many are counted, or `process` has ended."""
    deadline = time.monotonic() + 120
    while count() < least and process.is_alive():
        assert time.monotonic() < deadline, "it does not come to this"
        time.sleep(0.001)


def epochs_in(out: Path) -> int:
    """Return how many epochs of the run are kept."""
    try:
        return checkpoint.read(out / checkpoint.STATE_FILE)["progress"]["epoch"]
    except checkpoint.CheckpointError:
        return 0


def go_on(pictures: Path, out: Path, log: Path) -> str:
    """Finish the run in `out` as its reader would, and say what was kept of it."""
    log.write_text("", encoding="utf-8")
    if (out / cnn.HISTORY_FILE).exists():
        return "all"
    if alone(command, "--resume", "--out", out, log=log) == 0:
        return "epochs"
    assert "train first (python cnn.py)" in log.read_text("utf-8") or "cannot read" in log.read_text("utf-8")
    assert not (out / checkpoint.STATE_FILE).exists()
    assert alone(command, *training(pictures, out), log=log) == 0, log.read_text("utf-8")
    return "nothing"


@pytest.mark.parametrize("moments", MOMENTS)
def test_training_killed_at_random_moments_ends_in_the_same_bits(moments, pictures, undisturbed, tmp_path):
    seconds = pd.read_csv(undisturbed / cnn.HISTORY_FILE)["seconds"].max() / 8  # an epoch
    draw, kept = random.Random(1), []
    for number in range(moments):
        out, log = tmp_path / str(number), tmp_path / "log"
        process = begin(command, *training(pictures, out), log=log)
        wait_for(8 * number // moments, partial(epochs_in, out), process)  # one moment in each part of the run
        time.sleep(seconds * draw.random())
        process.kill()
        end(process)
        kept.append(go_on(pictures, out, log))
        same_run(undisturbed, out)
    assert "epochs" in kept


@pytest.mark.parametrize(
    "steps", [range(5, 45, 20), pytest.param(range(0, 60, 3), marks=pytest.mark.thorough, id="20")]
)
def test_training_killed_at_any_of_its_writes_ends_in_the_same_bits(steps, pictures, undisturbed, tmp_path):
    for number in steps:
        out, log = tmp_path / str(number), tmp_path / "log"
        alone(at_step, str(out), number, die, command, *training(pictures, out), log=log)
        go_on(pictures, out, log)
        same_run(undisturbed, out)


# -------------------------------------------------------------------------------------------------- sweeps, killed

BASE = CNNConfig(width=4, depth=4)
RECIPE = train.Recipe(epochs=2, batch_size=32, lr=0.1)


def sweep(pictures: Path, jobs: int = 1, **changes: object) -> None:
    options = {"source": ablation.Source(str(pictures)), "device": "cpu", "precision": "fp32", "progress": False}
    vary = {"norm": ["batch", "none"]}
    options |= {"base": BASE, "vary": vary, "recipe": RECIPE, "seeds": range(4), "jobs": jobs}
    ablation.run("norms", **options | changes)


def told(work: Callable, *arguments: object) -> None:
    """Do `work`, and end as `python cnn.py` does: with one sentence where it fails."""
    cnn.app, sys.argv = (lambda _: work(*arguments)), ["cnn.py", "work"]
    cnn.main()


def swept() -> list[list[str]]:
    """The rows of the sweep but for their seconds."""
    rows = pd.read_csv(ablation.sweeps() / "norms.csv", dtype=str)
    return rows.drop(columns="seconds").to_numpy().tolist()


def runs() -> dict[str, tuple[int, int]]:
    """Where each kept run lies on the disk, and when it was written."""
    kept = [path for path in ablation.folder().glob("[!.]*") if path.exists()]
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in kept}


@pytest.fixture(scope="session")
def whole_sweep(pictures, tmp_path_factory) -> tuple[list[list[str]], float]:
    """The rows of the sweep that nothing disturbed, and the seconds it took."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CNN_CACHE_DIR", str(tmp_path_factory.mktemp("sweep")))
        look_at(pictures)
        start = time.monotonic()
        assert alone(sweep, pictures) == 0
        return swept(), time.monotonic() - start


@pytest.mark.parametrize("moments", MOMENTS)
def test_a_sweep_killed_at_random_moments_goes_on_and_gives_the_same_rows(
    moments, pictures, whole_sweep, tmp_path, monkeypatch
):
    rows, seconds = whole_sweep
    draw, counts = random.Random(2), []
    for number in range(moments):
        monkeypatch.setenv("CNN_CACHE_DIR", str(tmp_path / str(number)))
        look_at(pictures)
        process = begin(sweep, pictures)
        wait_for(8 * number // moments, lambda: len(runs()), process)
        time.sleep(seconds / 8 * draw.random())
        process.kill()
        end(process)
        finished = runs()
        assert alone(sweep, pictures) == 0
        assert swept() == rows
        assert finished.items() <= runs().items()  # not trained again
        counts.append(len(finished))
    assert any(0 < count < 8 for count in counts)


def workers(process: multiprocessing.Process) -> list[psutil.Process]:
    """The processes that joblib started for `process`."""
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if "LokyProcess" in " ".join(child.cmdline())]


def begin_with_workers(pictures: Path, log: Path) -> tuple[multiprocessing.Process, list[psutil.Process]]:
    process = begin(told, sweep, pictures, 2, log=log)
    wait_for(1, lambda: len(runs()), process)
    return process, workers(process)


@pytest.mark.thorough
@pytest.mark.parametrize("victim", [0, 1])
def test_a_sweep_goes_on_after_one_of_its_workers_was_killed(victim, pictures, whole_sweep, tmp_path):
    log = tmp_path / "log"
    process, busy = begin_with_workers(pictures, log)
    assert len(busy) == 2
    busy[victim].kill()
    assert end(process) == 1
    assert "error: a process of the sweep was lost" in log.read_text("utf-8")
    assert "run it again to go on" in log.read_text("utf-8")
    finished = runs()
    assert 0 < len(finished) < 8
    assert alone(sweep, pictures) == 0
    assert swept() == whole_sweep[0]
    assert finished.items() <= runs().items()


@pytest.mark.thorough
def test_workers_end_when_their_sweep_was_killed(pictures, whole_sweep, tmp_path):
    """Else they would keep cores and memory from what comes after it."""
    process, busy = begin_with_workers(pictures, tmp_path / "log")
    process.kill()
    end(process)
    assert len(busy) == 2
    _, alive = psutil.wait_procs(busy, timeout=10)
    assert not alive
    assert alone(sweep, pictures) == 0
    assert swept() == whole_sweep[0]


# ------------------------------------------------------------------------------------------------------- full disks


class Disk(NamedTuple):
    """A small disk of its own."""

    folder: Path

    def fill(self) -> None:
        with (self.folder / "ballast").open("ab", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))

    def free(self) -> None:
        (self.folder / "ballast").unlink()


def mount(*arguments: object) -> None:
    done = subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path) -> Iterator[Disk]:
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("a disk can be mounted by Linux's administrator only; limits on files are tested everywhere")
    folder = tmp_path / "disk"
    folder.mkdir()
    mount("-t", "tmpfs", "-o", "size=4m", "tmpfs", folder)
    yield Disk(folder)
    subprocess.run(["umount", "-l", str(folder)], check=True)


def is_full(text: str, path: Path) -> None:
    assert "Traceback" not in text
    assert f"cannot write {path}" in text
    assert "the disk is full, or your quota is; free some space, or choose a folder on another disk" in text


def test_training_on_a_disk_that_fills_up_goes_on_when_there_is_room(disk, pictures, undisturbed, tmp_path):
    out, log = disk.folder / "run", tmp_path / "log"
    process = begin(command, *training(pictures, out), log=log)
    wait_for(1, partial(epochs_in, out), process)
    disk.fill()
    assert end(process) == 1
    is_full(log.read_text("utf-8"), out)
    assert f"the finished epochs are kept. Go on with: python cnn.py --resume --out {out}" in log.read_text("utf-8")
    assert checkpoint.read(out / checkpoint.STATE_FILE)["progress"]["epoch"] < 8
    disk.free()
    assert go_on(pictures, out, log) == "epochs"
    same_run(undisturbed, out)


def test_a_sweep_on_a_disk_that_fills_up_goes_on_when_there_is_room(disk, pictures, whole_sweep, tmp_path, monkeypatch):
    log = tmp_path / "log"
    monkeypatch.setenv("CNN_CACHE_DIR", str(disk.folder))
    process = begin(told, sweep, pictures, log=log)
    wait_for(2, lambda: len(runs()), process)
    disk.fill()
    assert end(process) == 1
    is_full(log.read_text("utf-8"), ablation.folder())
    assert "(the environment variable CNN_CACHE_DIR)" in log.read_text("utf-8")
    finished = runs()
    assert 2 <= len(finished) < 8
    disk.free()
    assert alone(sweep, pictures) == 0
    assert swept() == whole_sweep[0]
    assert finished.items() <= runs().items()


@pytest.mark.parametrize("kind", KEPT)
def test_a_full_disk_leaves_what_was_there(kind, disk, monkeypatch):
    kept = KEPT[kind]
    for name in ("CACHE", "RESULTS"):
        monkeypatch.setenv(f"CNN_{name}_DIR", str(disk.folder))
    kept.write(disk.folder, 1)
    disk.fill()
    if kind == "progress":
        kept.write(disk.folder, 2)  # that it cannot be kept is not an error of the exercise
    else:
        with pytest.raises(OSError, match="cannot write .*: the disk is full, .*; free some space"):
            kept.write(disk.folder, 2)
    assert kept.read(disk.folder) == 1
    assert not list(files.temporaries(disk.folder))
    disk.free()
    kept.write(disk.folder, 2)
    assert kept.read(disk.folder) == 2


def test_images_that_find_no_room_in_the_cache_are_told(disk, pictures, monkeypatch):
    monkeypatch.setenv("CNN_CACHE_DIR", str(disk.folder))
    disk.fill()
    with pytest.raises(OSError, match=f"cannot write {disk.folder}/folders.*the disk is full.*CNN_CACHE_DIR"):
        look_at(pictures)
    disk.free()
    look_at(pictures)


# ------------------------------------------------------------------------------------------- folders that refuse


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Let nobody write below `folder`, not even the administrator."""
    folder.mkdir(parents=True, exist_ok=True)
    if os.geteuid() != 0:
        below = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
        modes = {path: path.stat().st_mode for path in below}
        for path in below:
            path.chmod(0o555)
        try:
            yield
        finally:
            for path, mode in modes.items():
                path.chmod(mode)
        return
    if sys.platform != "linux":
        pytest.skip("nothing is read-only for this system's administrator")
    mount("--bind", folder, folder)
    try:
        mount("-o", "remount,bind,ro", folder)
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


REFUSED = "cannot write .*: (no permission to write there|the file system is read-only); choose a folder that you may"


@pytest.mark.parametrize("kind", KEPT)
def test_a_read_only_folder_is_told_and_can_be_read(kind, tmp_path, monkeypatch):
    kept, folder = KEPT[kind], tmp_path / "kept"
    for name in ("CACHE", "RESULTS"):
        monkeypatch.setenv(f"CNN_{name}_DIR", str(folder))
    kept.write(folder, 1)
    with read_only(folder):
        assert kept.read(folder) == 1
        if kind == "progress":
            kept.write(folder, 2)
        else:
            with pytest.raises(OSError, match=REFUSED):
                kept.write(folder, 2)
        assert kept.read(folder) == 1
    kept.write(folder, 2)
    assert kept.read(folder) == 2


def test_a_figure_that_cannot_be_kept_is_shown_all_the_same(tmp_path, monkeypatch):
    """In a course that was installed for all, by somebody else, lessons can be read and run."""
    shown = []
    monkeypatch.setattr(plots, "show_png", lambda content, alt: shown.append(alt))
    with read_only(tmp_path / "figures"):
        with pytest.warns(UserWarning, match="the figure is shown, but not kept: cannot write .*CNN_FIGURES_DIR"):
            plots.save(plots.plt.figure(), "x", "nothing")
        with pytest.raises(OSError, match=REFUSED):
            plots.save(plots.plt.figure(), "x", show=False)
    assert shown == ["nothing"]


def test_training_into_a_read_only_folder_says_how_to_choose_another(pictures, tmp_path):
    log, out = tmp_path / "log", tmp_path / "runs"
    with read_only(out):
        assert alone(command, *training(pictures, out / "x"), log=log) == 1
    text = log.read_text("utf-8")
    assert f"cannot write {out}" in text
    assert "Traceback" not in text


def test_test_images_that_cannot_be_logged_lose_no_training(pictures, undisturbed, tmp_path):
    """Their reading is logged, or they are not read; the run goes on from its last epoch when that can be."""
    log, out = tmp_path / "log", tmp_path / "run"
    with read_only(tmp_path / "results"):
        assert alone(command, *training(pictures, out), log=log) == 1
    text = log.read_text("utf-8")
    assert "test_reads.csv" in text
    assert "CNN_RESULTS_DIR" in text
    assert f"Go on with: python cnn.py --resume --out {out}" in text
    assert "Traceback" not in text
    assert go_on(pictures, out, log) == "epochs"
    same_run(undisturbed, out)


# ------------------------------------------------------------------------------------------- folders that vanish


def test_a_sweep_goes_on_while_its_cache_is_deleted(pictures, whole_sweep, tmp_path):
    process = begin(told, sweep, pictures, log=tmp_path / "log")
    while process.is_alive():
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        time.sleep(0.02)
    text = (tmp_path / "log").read_text("utf-8")
    assert end(process) == 0 or "try again (the environment variable CNN_CACHE_DIR)" in text, text
    assert alone(sweep, pictures) == 0
    assert swept() == whole_sweep[0]


@pytest.mark.parametrize("kind", KEPT)
def test_a_folder_deleted_at_any_step_of_a_write_is_made_again_or_told(kind, tmp_path):
    kept, log = KEPT[kind], tmp_path / "log"
    for number in range(100):
        folder = tmp_path / str(number)
        for name in ("CACHE", "RESULTS"):
            os.environ[f"CNN_{name}_DIR"] = str(folder)
        status = alone(at_step, str(folder), number, _Delete(folder), told, kept.write, folder, 1, log=log)
        text = log.read_text("utf-8")
        assert "Traceback" not in text
        assert status in (0, NOT_SO_MANY) or "try again" in text, text
        log.write_text("", encoding="utf-8")
        kept.write(folder, 2)
        assert kept.read(folder) == 2
        if status == NOT_SO_MANY:
            break
    assert number >= 3


class _Delete(NamedTuple):
    folder: Path

    def __call__(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.mark.parametrize("steps", [range(0, 40, 8), pytest.param(range(40), marks=pytest.mark.thorough, id="40")])
def test_images_are_loaded_though_their_cache_is_deleted(steps, pictures, tmp_path):
    cache, log = tmp_path / "cache", tmp_path / "log"
    for number in steps:
        status = alone(at_step, str(cache), number, _Delete(cache), told, look_at, pictures, log=log)
        text = log.read_text("utf-8")
        assert status in (0, NOT_SO_MANY) or "try again" in text, text
        log.unlink()


# ----------------------------------------------------------------------------------------------- two at the same time


def write_often(kind: str, folder: Path, first: int) -> None:
    for n in range(first, first + 20):
        KEPT[kind].write(folder, n)


@pytest.mark.parametrize("kind", KEPT)
def test_two_processes_write_the_same(kind, tmp_path):
    """Whoever reads meanwhile finds one or the other whole; of what is added to, nothing is lost."""
    kept = KEPT[kind]
    kept.write(tmp_path, 1)
    both = [begin(write_often, kind, tmp_path, first) for first in (100, 200)]
    read = {kept.read(tmp_path) for _ in iter(lambda: any(process.is_alive() for process in both), False)}
    assert [end(process) for process in both] == [0, 0]
    assert read <= {1, *range(100, 120), *range(200, 220)}
    assert kept.read(tmp_path) in (119, 219)
    written = {1, *range(100, 120), *range(200, 220)}
    if kind == "log":
        assert set(pd.read_csv(tmp_path / "log.csv")["n"]) == written
    if kind == "full runs":
        assert set(full_training.read()[0]["seed"]) == written
    if kind == "progress":
        assert {int(key.split()[1]) for key in exercises.solved_keys()} == written


def test_one_that_waits_too_long_for_another_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PATIENCE", 0.1)
    holding, free = threading.Event(), threading.Event()

    def hold() -> None:
        with files.alone(tmp_path / "log.csv"):
            holding.set()
            free.wait(60)

    other = threading.Thread(target=hold)
    other.start()
    holding.wait(60)
    with pytest.raises(
        TimeoutError, match="cannot write .*log.csv: another process has been at it for 0.1 s; end that"
    ):
        files.append_row(tmp_path / "log.csv", {"n": 1})
    free.set()
    other.join()
    files.append_row(tmp_path / "log.csv", {"n": 1})


def test_two_processes_make_the_same_sweep(pictures, whole_sweep):
    both = [begin(sweep, pictures) for _ in "ab"]
    assert [end(process) for process in both] == [0, 0]
    assert swept() == whole_sweep[0]
    assert alone(sweep, pictures) == 0
    assert swept() == whole_sweep[0]


# ---------------------------------------------------------------------------------------------- clocks that are wrong


class Stopped(datetime):
    """A clock that always shows the same second."""

    @classmethod
    def now(cls, tz: object = None) -> datetime:
        return datetime(2026, 1, 1, 12, 0, 0, tzinfo=tz)


def train_at_noon(pictures: Path, folder: Path, seed: int) -> None:
    cnn.RUNS, cnn.datetime = folder, Stopped
    arguments = training(pictures, folder)[:-2]
    command(*arguments, "--no-test", "--seed", seed)


def test_runs_of_the_same_second_have_folders_of_their_own(pictures, tmp_path):
    """Of a shell's loop, or of the hour that comes twice when summer time ends."""
    three = [begin(train_at_noon, pictures, tmp_path / "runs", seed) for seed in range(3)]
    assert [end(process) for process in three] == [0, 0, 0]
    found = sorted((tmp_path / "runs").iterdir())
    assert [path.name.removeprefix("20260101-120000-") for path in found] == [
        f"{pictures.name}{number}" for number in ("", "-2", "-3")
    ]
    seeds = [json.loads((path / cnn.SETTINGS_FILE).read_text(encoding="utf-8"))["seed"] for path in found]
    assert sorted(seeds) == [0, 1, 2]
    assert all(left_in(path) == REMAIN for path in found)


def test_settings_that_are_refused_leave_no_folder(pictures, tmp_path, monkeypatch):
    for arguments in (["--data", pictures, "--lr", "0"], ["--data", "nowhere"]):
        monkeypatch.setattr(sys, "argv", ["cnn.py", *map(str, arguments)])
        with pytest.raises(SystemExit):
            cnn.main()
    assert not (tmp_path / "runs").exists()


def backwards(*arguments: object) -> None:
    """Do `command` while the clock runs backwards, an hour at each look."""
    ticks = iter(range(10**9, 0, -3600))
    time.time = lambda: float(next(ticks))
    time.time_ns = lambda: next(ticks) * 10**9
    command(*arguments)


def test_a_clock_that_runs_backwards_changes_nothing(pictures, undisturbed, tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    alone(at_step, str(out), 20, die, backwards, *training(pictures, out), log=log)
    for path in out.iterdir():
        os.utime(path, (4e9, 4e9))  # written in the year 2096
    assert alone(backwards, "--resume", "--out", out, log=log) == 0, log.read_text("utf-8")
    same_run(undisturbed, out)


def test_a_cache_from_the_future_is_used_and_one_of_other_images_is_not(pictures, tmp_path):
    own = tmp_path / "own"
    brighter(pictures, own, 7)
    look_at(own)
    (path,) = (tmp_path / "cache" / "folders").glob("*-train*")
    os.utime(path, (4e9, 4e9))
    before = path.stat().st_ino
    look_at(own)
    assert path.stat().st_ino == before
    for image in own.rglob("*.png"):
        os.utime(image, (1, 1))  # of 1970: older than their cache, and yet others
    look_at(own)
    assert path.stat().st_ino != before


# -------------------------------------------------------------------------------------------------- memory that ends


def short_of_memory(spare: int, work: Callable, *arguments: object) -> None:
    """Do `work` with `spare` bytes of memory more than there is in use now, and so do the processes that it starts."""
    limit = psutil.Process().memory_info().vms + spare
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    work(*arguments)


@on_linux
def test_training_without_memory_is_told(pictures, tmp_path):
    log, out = tmp_path / "log", tmp_path / "run"
    large = [*training(pictures, out), "--size", 256, "--width", 128]
    look_at(pictures)
    assert alone(short_of_memory, 3 * 10**8, command, *large, log=log) == 1
    text = log.read_text("utf-8")
    assert "Traceback" not in text, text
    assert "error: memory was short (" in text, text
    assert "smaller --batch-size" in text


@on_linux
@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.thorough)])
def test_a_sweep_without_memory_is_told_and_keeps_what_was_finished(jobs, pictures, whole_sweep, tmp_path):
    log = tmp_path / "log"
    assert alone(sweep, pictures) == 0
    finished = runs()
    vary = {"width": [4, 256]}
    size = ablation.Source(str(pictures), size=128)
    large = [short_of_memory, 6 * 10**8, told, _Sweep(jobs, {"vary": vary, "source": size}), pictures]
    assert alone(*large, log=log) == 1
    text = log.read_text("utf-8")
    assert "Traceback" not in text, text
    assert "error: a run of the sweep ran out of memory (" in text, text
    assert "the finished runs are kept: run it again to go on, with fewer jobs" in text
    assert len(runs()) > len(finished)
    assert alone(sweep, pictures) == 0
    assert swept() == whole_sweep[0]


class _Sweep(NamedTuple):
    jobs: int
    changes: dict[str, object]

    def __call__(self, pictures: Path) -> None:
        sweep(pictures, self.jobs, **self.changes)
