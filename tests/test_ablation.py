"""Pairs are pairs, nothing finished is lost or trained again, and what is kept is never stale."""

import os
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace

import pandas as pd
import pytest
import torch

from utils import ablation, checkpoint, files, train
from utils.model import CNNConfig

BASE = CNNConfig(width=4)
RECIPE = train.Recipe(epochs=2, batch_size=128, lr=0.1)
OPTIONS = {"source": ablation.Source(images=256), "device": "cpu", "precision": "fp32", "jobs": 1, "progress": False}
VARY = {"norm": ["batch", "none"]}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CNN_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def counted(monkeypatch):
    """The seeds of the runs that are really trained."""
    seeds = []
    real = ablation.Trial.train
    monkeypatch.setattr(ablation.Trial, "train", lambda trial: seeds.append(trial.recipe.seed) or real(trial))
    return seeds


def sweep(vary=VARY, seeds=(0, 1), base=BASE, recipe=RECIPE, **options) -> pd.DataFrame:
    return ablation.run("norms", base, vary, recipe, seeds, **OPTIONS | options)


def numbers(frame: pd.DataFrame) -> list[list]:
    """All columns but the seconds."""
    return frame.drop(columns="seconds").to_numpy().tolist()


def test_rows_are_tidy_and_say_what_they_were_measured_on():
    frame = sweep()
    assert list(frame.columns) == ablation.COLUMNS
    assert list(dict.fromkeys(frame["variant"])) == ["batch", "none"]
    assert set(frame["experiment"]) == {"norms"}
    assert set(frame["lr"]) == {0.1}
    of_run = frame[(frame["variant"] == "none") & (frame["seed"] == 1)]
    assert of_run.groupby(["split", "metric"]).size().to_dict() == {
        ("train", "accuracy"): 2,
        ("train", "diverged"): 1,
        ("train", "loss"): 2,
        ("train", "lr"): 2,
        ("validation", "accuracy"): 2,
        ("validation", "loss"): 2,
    }
    assert frame.attrs["images"] == 256
    assert frame.attrs["validation_images"] == 5000
    assert len(frame.attrs["code"]) == 64
    assert {"torch", "cpu", "precision", "device"} <= set(frame.attrs)


def test_a_run_is_that_of_fit():
    """The same numbers as `train.fit` with that seed, in one thread."""
    frame = sweep(seeds=[3])
    torch.manual_seed(3)
    model = ablation.CNN(BASE)
    history = train.fit(
        model,
        ablation.load(OPTIONS["source"]),
        replace(RECIPE, seed=3),
        device="cpu",
        precision="fp32",
        progress=False,
    )
    ours = frame[(frame["variant"] == "batch") & (frame["split"] == "validation")]["value"].tolist()
    assert ours == history[history["split"] == "validation"]["value"].tolist()


def test_runs_of_one_seed_are_pairs(monkeypatch):
    """The same batches to the bit, and the same first weights wherever shapes agree."""
    seen: dict[str, list] = {"batch": [], "none": []}
    weights: dict[str, dict] = {}
    forward = ablation.CNN.forward

    def watched(model, images):
        if model.training:
            if not seen[model.config.norm]:
                weights[model.config.norm] = {n: w.detach().clone() for n, w in model.named_parameters()}
            seen[model.config.norm].append(images.clone())
        return forward(model, images)

    monkeypatch.setattr(ablation.CNN, "forward", watched)
    sweep(seeds=[7])
    assert len(seen["batch"]) == len(seen["none"]) == 4
    assert all(torch.equal(a, b) for a, b in zip(seen["batch"], seen["none"], strict=True))
    shared = weights["batch"].keys() & weights["none"].keys()
    assert len([name for name in shared if "conv" in name]) == 9
    assert all(torch.equal(weights["batch"][name], weights["none"][name]) for name in shared)


def test_processes_give_the_same_bits_as_one():
    assert numbers(sweep(jobs=1)) == numbers(sweep(jobs=2, refresh=True))


def test_only_what_is_new_is_trained(counted):
    sweep()
    assert sorted(counted) == [0, 0, 1, 1]
    counted.clear()
    first = sweep(seeds=(0, 1, 2))
    assert counted == [2, 2]
    counted.clear()
    sweep({"norm": ["batch", "none", "group"]})
    assert sorted(counted) == [0, 1]
    counted.clear()
    again = sweep(seeds=(0, 1, 2))
    assert counted == []
    pd.testing.assert_frame_equal(first, again)
    sweep(refresh=True)
    assert sorted(counted) == [0, 0, 1, 1]


@pytest.mark.parametrize(
    "change",
    [
        {"base": replace(BASE, width=5)},
        {"recipe": replace(RECIPE, epochs=1)},
        {"lr": 0.2},
        {"source": ablation.Source(images=260)},
    ],
)
def test_other_settings_are_other_runs(counted, change):
    sweep(seeds=[0])
    counted.clear()
    sweep(seeds=[0], **change)
    assert counted == [0, 0]


def test_changed_code_gives_no_stale_rows_and_a_changed_comment_does(tmp_path, monkeypatch):
    """A helper of a helper counts: kernels.py, which ablation.py does not import itself."""
    package = tmp_path / "utils"
    package.mkdir()
    for path in (files.ROOT / "utils").glob("*.py"):
        (package / path.name).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(ablation, "__file__", str(package / "ablation.py"))

    def version() -> str:
        ablation.code_version.cache_clear()
        return ablation.code_version()

    first, kernels = version(), package / "kernels.py"
    text = kernels.read_text(encoding="utf-8")
    kernels.write_text('"""Another docstring."""\n# a comment\n' + text.partition('"""\n')[2], encoding="utf-8")
    assert version() == first
    kernels.write_text(text.replace("SMALL_MAP = 4", "SMALL_MAP = 9"), encoding="utf-8")
    assert version() != first
    (package / "plots.py").write_text("raise SystemExit", encoding="utf-8")  # no run depends on it
    kernels.write_text(text, encoding="utf-8")
    assert version() == first
    ablation.code_version.cache_clear()


def test_a_damaged_file_is_trained_again_with_a_warning(counted):
    first = sweep(seeds=[0])
    path = sorted((files.cache_dir() / "runs").glob("*.safetensors"))[0]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    counted.clear()
    with pytest.warns(UserWarning, match="damaged and will be trained again"):
        again = sweep(seeds=[0])
    assert counted == [0]
    assert numbers(first) == numbers(again)
    with warnings.catch_warnings(action="error"):
        sweep(seeds=[0])


SWEEP = """
import sys
from utils import ablation, train
from utils.model import CNNConfig
ablation.run("norms", CNNConfig(width=4), {"norm": ["batch", "none"]}, train.Recipe(epochs=2, batch_size=128, lr=0.1),
    range(6), source=ablation.Source(images=256), device="cpu", precision="fp32", jobs=int(sys.argv[1]), progress=False)
"""


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL on Windows")
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_killed_sweep_loses_only_the_runs_in_flight(jobs, counted):
    process = subprocess.Popen([sys.executable, "-c", SWEEP, str(jobs)], cwd=files.ROOT, start_new_session=True)
    folder = files.cache_dir() / "runs"
    deadline = time.monotonic() + 90
    while len(list(folder.glob("[!.]*"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    finished = len(list(folder.glob("[!.]*.safetensors")))
    assert 3 <= finished < 12
    frame = sweep(seeds=range(6))
    assert len(counted) == 12 - finished
    assert len(frame.groupby(["variant", "seed"])) == 12


def test_two_sweeps_at_once_do_no_harm(counted):
    both = [subprocess.Popen([sys.executable, "-c", SWEEP, "1"], cwd=files.ROOT) for _ in range(2)]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    sweep(seeds=range(6))
    assert counted == []


def test_a_run_that_diverges_is_kept_and_told(counted):
    frame = sweep({"norm": ["batch", "none"]}, lr=1e6)
    diverged = frame[frame["metric"] == "diverged"].set_index(["variant", "seed"])["value"]
    assert diverged["none"].tolist() == [1, 1]
    counted.clear()
    sweep({"norm": ["batch", "none"]}, lr=1e6)
    assert counted == []


def test_learning_rates_are_swept_or_given_for_each_variant():
    frame = sweep(seeds=[0], lr=[0.1, 0.2])
    assert frame.groupby("variant")["lr"].unique().map(list).to_dict() == {"batch": [0.1, 0.2], "none": [0.1, 0.2]}
    frame = sweep(seeds=[0], lr={"batch": 0.2, "none": 0.05})
    assert frame.groupby("variant")["lr"].unique().map(list).to_dict() == {"batch": [0.2], "none": [0.05]}


def test_variants_change_one_field_or_two_of_a_grid():
    def made(vary, base=BASE, grid=False):
        return ablation.variants(base, RECIPE, vary, grid)

    assert made({"norm": ["batch", "none"]})["none"] == (replace(BASE, norm="none"), RECIPE)
    assert list(made({"residual": [True, False]})) == ["residual", "plain"]
    assert made({"batch_size": [64, 128]})["batch_size 64"] == (BASE, replace(RECIPE, batch_size=64))
    assert made({"init": {"small": 0.1, "He": "he"}})["small"][0].init == 0.1
    grid = made({"norm": ["batch", "none"], "residual": [True, False]}, grid=True)
    assert list(grid) == ["batch, residual", "batch, plain", "none, residual", "none, plain"]
    assert grid["none, plain"][0] == replace(BASE, norm="none", residual=False)
    dropped = replace(BASE, dropout=0.1, dropout_where="head")
    places = made({"dropout_where": ["none", "head", "everywhere"]}, base=dropped)
    assert [config.dropout for config, _ in places.values()] == [0.0, 0.1, 0.1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vary": {"nrom": ["batch", "none"]}}, "no field 'nrom' to change: choose one of norm"),
        ({"vary": {"norm": ["batch", "bach"]}}, "norm='bach': choose one of batch"),
        (
            {"vary": {"norm": ["batch", "none"], "residual": [True, False]}},
            "vary names 2 fields .*or two and grid=True",
        ),
        ({"vary": {}}, "vary names 0 fields"),
        ({"grid": True}, "vary names 1 fields .norm.: expected two fields for grid=True"),
        ({"vary": {"norm": ["batch"]}}, "expected two or more values to compare"),
        ({"vary": {"norm": "batch"}}, "expected two or more values to compare"),
        ({"vary": {"norm": ["batch", "batch"]}}, "two variants are called 'batch'"),
        ({"vary": {"lr": [0.1, 0.2]}}, "give lrs by lr="),
        ({"vary": {"seed": [1, 2]}}, "give seeds by seeds="),
        ({"seeds": []}, r"seeds=\[\]: expected one or more"),
        ({"seeds": [1, 1]}, "each of them once"),
        ({"lr": {"batch": 0.1}}, "expected a learning rate, or several, for each of batch, none"),
        ({"source": ablation.Source("no-such-folder")}, "no-such-folder"),
    ],
)
def test_what_cannot_be_run_is_refused(arguments, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        sweep(**arguments)


def test_an_estimate_counts_runs_and_hours_before_they_start(counted):
    trials = ablation.plan(BASE, VARY, RECIPE, range(3), **{k: OPTIONS[k] for k in ("source", "device", "precision")})
    sweep(seeds=[0])
    kept = len(counted)
    found = ablation.estimate(list(trials.values()))
    assert (found["runs"], found["kept"]) == (6, kept)
    assert 1e-6 < found["core_hours"] < 1
    assert found["bytes"] == (2 * 5 + 1) * 4 * ablation.BYTES_A_ROW
    folder = files.cache_dir() / "runs"
    sizes = [path.stat().st_size for path in folder.glob("*.safetensors")]
    assert max(sizes) < 1.5 * (2 * 5 + 1) * ablation.BYTES_A_ROW


def test_a_worker_with_other_code_is_refused(monkeypatch):
    trial = next(iter(ablation.plan(BASE, VARY, RECIPE, [0]).values()))
    with pytest.raises(RuntimeError, match="a worker runs other code"):
        ablation.work(trial, "other")


def test_kept_runs_are_never_unpickled():
    sweep(seeds=[0])
    for path in (files.cache_dir() / "runs").iterdir():
        assert isinstance(checkpoint.read(path)["rows"], list)
