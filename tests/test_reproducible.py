"""The same command gives the same bits, in another process too, and each result says what it was made with."""

import csv
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pandas as pd
import pytest
import torch

import cnn
from utils import ablation, checkpoint, compare, device, examine, experiments, files, train
from utils.model import CNNConfig

ROOT = Path(__file__).parent.parent
NETWORK = ["--width", "8", "--dropout", "0.1", "--dropout-where", "head"]
RECIPE = ["--images", "512", "--epochs", "2", "--batch-size", "128", "--seed", "7"]
COMMAND = ["--device", "cpu", "--threads", "1", *NETWORK, *RECIPE]
SAYS = {"device", "precision", "cpu", "cores", "threads", "instructions", "torch", "python", "system"}
FROM_THE_CLOCK = ("seconds", "images_per_second")


@pytest.fixture(scope="module")
def fresh():
    """Starts processes that have imported everything already, but run nothing yet."""
    context = multiprocessing.get_context("spawn" if os.name == "nt" else "forkserver")
    if os.name != "nt":
        context.set_forkserver_preload(["cnn", "utils.plots", "utils.ablation", "torch._dynamo"])

    def call(function, *arguments):
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(function, *arguments).result()

    return call


def command(folder: Path, *words: str) -> None:
    """`python cnn.py WORDS` in `folder`, which has the caches too."""
    for name in ("cache", "results", "figures"):
        os.environ[f"CNN_{name.upper()}_DIR"] = str(folder / name)
    sys.argv = ["cnn.py", *words]
    with Path(os.devnull).open("w", encoding="utf-8") as sys.stdout:
        sys.stderr = sys.stdout
        try:
            cnn.main()
        except SystemExit as left:
            if left.code:
                raise RuntimeError(left.code) from left


def history(folder: Path) -> pd.DataFrame:
    """The rows of a run but for what a clock says."""
    rows = pd.read_csv(folder / "history.csv")
    return rows[~rows["metric"].isin(FROM_THE_CLOCK)].drop(columns="seconds")


def same_runs(one: Path, two: Path) -> None:
    first, second = (checkpoint.read(folder / checkpoint.MODEL_FILE) for folder in (one, two))
    assert first["weights"].keys() == second["weights"].keys()
    assert all(torch.equal(weight, second["weights"][name]) for name, weight in first["weights"].items())
    assert first["card"] == second["card"]
    assert len(history(one)) == 2 * 5
    pd.testing.assert_frame_equal(history(one), history(two), check_exact=True)
    assert (one / "curves.png").read_bytes() == (two / "curves.png").read_bytes()
    assert (one / "about.json").read_bytes() == (two / "about.json").read_bytes()


@pytest.fixture(scope="module")
def twice(fresh, tmp_path_factory) -> list[Path]:
    """The folders of two runs of one command, each in a process of its own."""
    folders = [tmp_path_factory.mktemp(name) / "run" for name in ("first", "second")]
    for folder in folders:
        fresh(command, folder.parent, *COMMAND, "--out", str(folder))
    return folders


def test_the_same_command_gives_the_same_bits_in_another_process(twice):
    same_runs(*twice)


@pytest.mark.thorough
def test_neither_hash_seed_nor_threads_nor_folder_nor_locale_matter(tmp_path):
    """The command itself, as a reader types it."""
    (tmp_path / "elsewhere").mkdir()
    for name, folder, environment in (
        ("a", ROOT, {"PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "1"}),
        (
            "b",
            tmp_path / "elsewhere",
            {"PYTHONHASHSEED": "2", "OMP_NUM_THREADS": "3", "LC_ALL": "C", "TZ": "Asia/Tokyo"},
        ),
    ):
        own = {f"CNN_{part}_DIR": str(tmp_path / name / part) for part in ("CACHE", "RESULTS", "FIGURES")}
        words = [sys.executable, ROOT / "cnn.py", *COMMAND, "--out", tmp_path / name / "run"]
        environment = os.environ | {"PYTHONPATH": ""} | environment | own
        subprocess.run(words, cwd=folder, env=environment, check=True, capture_output=True)
    same_runs(tmp_path / "a" / "run", tmp_path / "b" / "run")


def test_a_run_says_what_it_was_made_with(twice):
    about = json.loads((twice[0] / "about.json").read_text(encoding="utf-8"))
    assert about["recipe"]["seed"] == 7
    assert about["recipe"]["momentum"] == train.Recipe().momentum, "what was not chosen, too"
    assert about["network"]["width"] == 8
    assert about["data"]["train"] == 512
    assert about["data"]["checksum"] == ablation.load(ablation.Source(images=512)).checksum
    (machine,) = about["machines"]
    assert machine.keys() == SAYS | {"processes", "code"}
    assert (machine["device"], machine["threads"], machine["torch"]) == ("cpu", "1", torch.__version__)
    assert machine["code"] == ablation.code_version()


def test_a_resumed_run_says_each_machine(twice, fresh, tmp_path):
    shutil.copytree(twice[0], out := tmp_path / "run")
    (out / "history.csv").unlink()  # so it is not finished
    about = json.loads((out / "about.json").read_text(encoding="utf-8"))
    about["machines"][0]["cpu"] = "another one"
    (out / "about.json").write_text(json.dumps(about), encoding="utf-8")
    fresh(command, tmp_path, "--resume", "--no-test", "--out", str(out))
    machines = json.loads((out / "about.json").read_text(encoding="utf-8"))["machines"]
    assert [machine["cpu"] for machine in machines] == ["another one", device.cpu_name()]


@pytest.mark.parametrize("text", [None, "{", "[]", '{"machines": 3}', "\udcff"])
def test_a_run_without_that_file_can_be_resumed(text, tmp_path):
    """Of an earlier version of the course, or damaged."""
    if text is not None:
        (tmp_path / "about.json").write_bytes(text.encode(errors="surrogateescape"))
    assert cnn.started_on(tmp_path) == []


# ------------------------------------------------------------------------------------------------------ sweeps, figures


def sweep(folder: Path, hash_name: str) -> bytes:
    os.environ["CNN_CACHE_DIR"] = str(folder / hash_name)
    options = {
        "source": ablation.Source(images=256),
        "device": "cpu",
        "precision": "fp32",
        "jobs": 1,
        "progress": False,
    }
    recipe = train.Recipe(epochs=2, batch_size=64, lr=0.1)
    ablation.run("twice", CNNConfig(width=4), {"norm": ["batch", "none"]}, recipe, range(2), **options)
    rows = pd.read_csv(ablation.sweeps() / "twice.csv").drop(columns="seconds")
    about = files.read_record(ablation.sweeps() / "twice.json")
    del about[files.CHECKSUM]  # of the rows with their seconds
    return rows.to_csv(index=False).encode() + json.dumps(about).encode()


@pytest.mark.thorough
def test_a_sweep_gives_the_same_rows_in_another_process(fresh, tmp_path):
    first = fresh(sweep, tmp_path, "a")
    assert first.count(b"\n") > 40
    assert first == fresh(sweep, tmp_path, "b")


def page(folder: Path) -> str:
    os.environ["CNN_CACHE_DIR"] = str(folder)
    os.environ["CNN_RESULTS_DIR"] = str(ROOT / "results")
    return compare.page(compare.studies([ROOT / "results" / name for name in ("batchnorm.csv", "pooling.csv")]))


def test_a_page_is_the_same_in_another_process(fresh, tmp_path):
    first = fresh(page, tmp_path)
    assert len(first) > 30_000
    assert first == fresh(page, tmp_path)


@pytest.mark.thorough
def test_a_page_does_not_depend_on_the_hash_seed(tmp_path):
    pages = []
    for seed in ("1", "2"):
        words = [sys.executable, "cnn.py", "compare", "results/batchnorm.csv", "results/init.csv", "--out"]
        environment = os.environ | {"PYTHONHASHSEED": seed, "CNN_RESULTS_DIR": str(ROOT / "results")}
        subprocess.run([*words, tmp_path / seed], cwd=ROOT, env=environment, check=True, capture_output=True)
        pages.append((tmp_path / seed).read_bytes())
    assert pages[0] == pages[1]


@pytest.mark.parametrize("kind", ["png", "svg", "csv"])
def test_an_export_is_the_same_file_at_each_time(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("CNN_RESULTS_DIR", str(ROOT / "results"))
    monkeypatch.setattr(files, "ROOT", tmp_path)
    (study,) = compare.studies([ROOT / "results" / "batchnorm.csv"])
    chosen = (study, "validation accuracy", study.variants, study.variants[-1], "epoch", 1)
    first = compare.save(*chosen, kind).read_bytes()
    assert len(first) > 100
    assert first == compare.save(*chosen, kind).read_bytes()


@pytest.mark.thorough
def test_an_exported_network_is_the_same_file_at_each_time(tmp_path):
    model, card = checkpoint.load_model(ROOT / "results" / "full_training")
    for name in ("a.onnx", "b.onnx"):
        examine.export_onnx(model, card, tmp_path / name)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


# ------------------------------------------------------------------------------------------------------ what is shipped


@pytest.mark.thorough
def test_a_shipped_run_comes_out_again(monkeypatch):
    """To the bit on the kind of machine that it was measured on; to a digit or so elsewhere, by its fingerprint."""
    monkeypatch.setenv("CNN_RESULTS_DIR", str(ROOT / "results"))
    experiment, shipped = experiments.find("pooling"), experiments.load("pooling")
    then = shipped.about["measured_on"]
    plan = {"device": "cpu", "precision": then["precision"]} | experiment.options()
    trials = ablation.plan(seeds=list(experiment.seeds)[:1], lr=shipped.about["best_lr"], **plan)
    (variant, *_), trial = list(trials.items())[-1]
    now = device.describe("cpu", then["precision"])
    alike = [now[name] == then[name] for name in ("cpu", "instructions", "torch", "precision", "system")]
    if not all(alike):
        lowest = ablation.plan(seeds=[0], lr=min(experiment.lrs), **plan | {"precision": "fp32"})
        of_variant = next(trial for (name, *_), trial in lowest.items() if name == variant)
        found, expected = experiments.fingerprint(of_variant), shipped.about["fingerprints"][variant]["fp32"]
        assert found == pytest.approx(expected, rel=experiments.TOLERANCE["fp32"])
        return
    rows = shipped.runs.query("variant == @variant and seed == @trial.recipe.seed")[ablation.ROWS]
    again = pd.DataFrame(trial.train(), columns=ablation.ROWS)
    pd.testing.assert_frame_equal(
        rows.drop(columns="seconds").reset_index(drop=True), again.drop(columns="seconds"), check_exact=True
    )


MEASURED = [path for path in sorted((ROOT / "results").glob("*.json")) if b'"measured_on"' in path.read_bytes()]


def test_each_experiment_is_among_them():
    assert {path.stem for path in MEASURED} >= {*experiments.EXPERIMENTS, "full_training"}


@pytest.mark.parametrize("path", MEASURED, ids=lambda path: path.stem)
def test_each_shipped_result_says_seeds_threads_and_versions(path):
    about = json.loads(path.read_text(encoding="utf-8"))
    for run in about.get("runs", {"": about}).values():
        machine = run["measured_on"]
        assert machine.keys() >= SAYS
        assert all(str(machine[name]) for name in SAYS)
    with path.with_suffix(".csv").open(encoding="utf-8", newline="") as lines:
        assert "seed" in next(csv.reader(lines))


def test_each_measured_speed_says_threads_versions_and_commit():
    with (ROOT / "results" / "speed.csv").open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert rows
    assert [row for row in rows if not all(row[name] for name in SAYS | {"commit", "date"})] == []
