"""The shipped evidence is that of today's code, edited rows are noticed, and the README says what the rows say."""

import contextlib
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from utils import ablation, evidence, experiments, files, tables, train
from utils.device import cpu_multiplies_bf16
from utils.model import CNNConfig

SHIPPED = files.ROOT / "results"

TINY = experiments.Experiment(
    question="Does it work?",
    lesson="01_data_statistics",
    vary={"norm": ("batch", "none")},
    base=CNNConfig(width=4),
    recipe=train.Recipe(epochs=2, batch_size=128),
    source=ablation.Source(images=1024),
    lrs=(0.01, 0.1),
    seeds=(0, 1, 2),
    claims=(experiments.Claim("batch norm helps", "batch", "none"),),
)
OPTIONS = {"device": "cpu", "precision": "fp32", "jobs": 1, "progress": False}


def few_to_check(source: ablation.Source, load=ablation.load):
    """The images of a source with a tenth of those to check with, which take most of the time."""
    images = load(source)
    return replace(images, validation=images.validation[:500])


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Path:
    """A folder with the results of TINY, the one experiment there is."""
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiments, "EXPERIMENTS", {"tiny": TINY})
        patch.setattr(ablation, "load", few_to_check)
        patch.setenv("CNN_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("CNN_RESULTS_DIR", str(folder))
        experiments.save("tiny", experiments.measure("tiny", **OPTIONS))
    return folder


@pytest.fixture
def tiny(measured, tmp_path, monkeypatch) -> Path:
    """A copy of those results, to be damaged."""
    monkeypatch.setattr(experiments, "EXPERIMENTS", {"tiny": TINY})
    monkeypatch.setattr(ablation, "load", few_to_check)
    monkeypatch.setenv("CNN_RESULTS_DIR", str(shutil.copytree(measured, tmp_path / "results")))
    return tmp_path / "results"


# ---------------------------------------------------------------------------------------------------- the shipped rows


@pytest.fixture
def shipped(monkeypatch):
    monkeypatch.setenv("CNN_RESULTS_DIR", str(SHIPPED))


@pytest.mark.parametrize("name", experiments.EXPERIMENTS)
def test_shipped_rows_are_those_of_todays_code(name, shipped):
    assert experiments.stale(name) == []


@pytest.mark.parametrize("name", experiments.EXPERIMENTS)
def test_shipped_rows_are_complete(name, shipped):
    """Every variant with every seed, at the rate that the sweep says is its best."""
    experiment, results = experiments.find(name), experiments.load(name)
    runs = results.runs.groupby("variant")
    expected = dict.fromkeys(results.about["variants"], experiment.seeds)
    assert {variant: tuple(sorted(set(rows["seed"]))) for variant, rows in runs} == expected
    assert len(experiment.seeds) >= 10 or (len(experiment.vary) == 2 and len(experiment.seeds) >= 5)
    assert not set(experiment.seeds) & set(experiment.tuning_seeds)
    assert {variant: rows["lr"].unique().tolist() for variant, rows in runs} == {
        variant: [lr] for variant, lr in evidence.best_lr(results.sweep).items()
    }


@pytest.mark.parametrize("name", experiments.EXPERIMENTS)
def test_no_best_rate_of_a_claim_is_at_the_edge_of_its_sweep(name, shipped):
    """There it could be that a better one was not tried. A variant that learns at no rate at all has no best one."""
    experiment, results = experiments.find(name), experiments.load(name)
    for variant in {name for claim in experiment.claims for name in (claim.variant, claim.baseline)}:
        rates = experiment.lrs[variant] if isinstance(experiment.lrs, dict) else experiment.lrs
        inside = min(rates) < results.about["best_lr"][variant] < max(rates)
        assert inside or highest(results.sweep, variant) < 2 / results.sweep.attrs["num_classes"], variant


def highest(sweep, variant: str) -> float:
    """The highest validation accuracy after any epoch of any run of a variant."""
    rows = sweep[(sweep["variant"] == variant) & (sweep["split"] == "validation") & (sweep["metric"] == "accuracy")]
    return rows["value"].max()


def test_readme_has_the_table_of_claims_that_the_rows_give(shipped):
    text = (files.ROOT / "README.md").read_text(encoding="utf-8")
    table = text.partition(experiments.BEGIN)[2].partition(experiments.END)[0].strip()
    assert table == experiments.claims_table(experiments.claims())


@pytest.mark.parametrize(
    "name",
    ["batchnorm", *(pytest.param(name, marks=pytest.mark.thorough) for name in ("dropout", "batch_size", "residual"))],
)
def test_other_hardware_gives_the_same_fingerprints(name, shipped):
    """AVX2 in place of AVX512 and AMX: other kernels, which round otherwise; where rounding is amplified, too."""
    code = f"from utils import experiments; print(experiments.stale({name!r}))"
    flags = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    assert printed_by(code, files.ROOT, **flags) == "[]"


def test_a_cpu_without_bf16_instructions_is_asked_for_fp32_alone(shipped, monkeypatch):
    asked = []
    monkeypatch.setattr(experiments, "fingerprints", lambda experiment, kinds: asked.append([*kinds]) or {"batch": {}})
    for native in (True, False):
        monkeypatch.setattr(experiments, "cpu_multiplies_bf16", lambda native=native: native)
        with contextlib.suppress(KeyError):
            experiments.stale("batchnorm")
    assert asked == [["fp32", "bf16"], ["fp32"]]


def printed_by(code: str, root: Path, **env: str) -> str:
    """What `python -c code` prints in the folder `root`, whose `utils` it imports."""
    env = os.environ | {"PYTHONPATH": str(root), "CNN_RESULTS_DIR": str(SHIPPED)} | env
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=env, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("module", "old", "new", "reason"),
    [
        ("kernels", "class Conv2d", "# a comment\nclass Conv2d", None),
        (
            "train",
            'momentum: float = option(0.9, "Nest',
            'momentum: float = option(0.8, "Nest',
            "momentum: was 0.9, is 0.8",
        ),
        pytest.param(
            *("kernels", "torch.maximum(left, right)", "torch.minimum(left, right)", "trains otherwise: losses were"),
            marks=pytest.mark.skipif(not cpu_multiplies_bf16(), reason="this kernel acts in bf16 alone"),
        ),
    ],
    ids=["a comment", "a default", "a kernel"],
)
def test_a_change_of_behaviour_makes_rows_stale_and_a_comment_does_not(module, old, new, reason, tmp_path):
    shutil.copytree(files.ROOT / "utils", tmp_path / "utils", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "data").symlink_to(files.ROOT / "data")
    path = tmp_path / "utils" / f"{module}.py"
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1
    path.write_text(text.replace(old, new), encoding="utf-8")
    printed = printed_by("from utils import experiments; print(experiments.stale('batchnorm'))", tmp_path)
    assert (reason in printed) if reason else (printed == "[]")


# ------------------------------------------------------------------------------------------------- measure, save, load


def test_an_experiment_is_swept_and_then_run_with_other_seeds_at_the_best_rates(tiny):
    results = experiments.load("tiny")
    assert set(results.sweep["seed"]) == {100, 101}
    assert set(results.sweep["lr"]) == {0.01, 0.1}
    assert set(results.runs["seed"]) == {0, 1, 2}
    assert results.about["best_lr"] == evidence.best_lr(results.sweep)
    assert results.runs.groupby("variant")["lr"].unique().map(list).to_dict() == {
        variant: [lr] for variant, lr in results.about["best_lr"].items()
    }
    assert results.about["measured_on"].keys() >= {"torch", "cpu", "precision", "threads", "device", "code", "checksum"}


def test_fresh_rows_are_not_stale(tiny):
    assert experiments.stale("tiny") == []


def test_rows_are_read_as_they_were_measured(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("CNN_CACHE_DIR", str(tmp_path / "cache"))
    again, shipped = experiments.measure("tiny", **OPTIONS), experiments.load("tiny")
    for ours, theirs in ((again.sweep, shipped.sweep), (again.runs, shipped.runs)):
        pd.testing.assert_frame_equal(ours.drop(columns="seconds"), theirs.drop(columns="seconds"), check_exact=True)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"base": CNNConfig(width=4, activation="silu")}, "activation: was 'relu', is 'silu'"),
        ({"lrs": (0.01, 0.1, 0.3)}, "lrs: was [0.01, 0.1], is [0.01, 0.1, 0.3]"),
        ({"seeds": (0, 1)}, "seeds: was [0, 1, 2], is [0, 1]"),
        ({"claims": (replace(TINY.claims[0], margin=0.0),)}, "claims: was"),
        ({"vary": {"norm": ("batch", "group")}}, "none is no more"),
        ({"vary": {"norm": ("batch", "none", "group")}}, "variants: 'group' is new"),
        ({"along": {"none": {"width": 5}}}, "none: config: width: was 4, is 5"),
    ],
)
def test_another_plan_makes_rows_stale(tiny, monkeypatch, change, reason):
    monkeypatch.setattr(experiments, "EXPERIMENTS", {"tiny": replace(TINY, **change)})
    assert any(reason in line for line in experiments.stale("tiny"))


def test_a_new_field_that_changes_nothing_keeps_the_rows(tiny):
    path = tiny / "tiny.json"
    about = files.read_record(path)
    for setting in about["variants"].values():
        del setting["config"]["pool_everywhere"]  # as if the field had been added since
    files.write_record(path, about)
    assert experiments.stale("tiny") == []


def test_fingerprints_agree_within_the_tolerance_only():
    then = {"fp32": [2.0, 2.1], "bf16": [2.0, 2.1]}
    assert experiments.agree(then, {"fp32": [2.001, 2.099], "bf16": [2.03, 2.07]})
    assert not experiments.agree(then, {"fp32": [2.01, 2.1], "bf16": [2.0, 2.1]})
    assert not experiments.agree(then, {"fp32": [2.0, 2.11], "bf16": [2.0, 2.1]})
    assert not experiments.agree(then, {"fp32": [2.0, 2.1], "bf16": [2.1, 2.1]})
    assert experiments.agree(then, {"fp32": [2.001, 2.099]})
    assert not experiments.agree(then, {"fp32": [2.01, 2.1]})
    shaky = {"fp32": [2.0, 2.1], "bf16": [2.01, 2.1]}  # rounding is amplified: fp32 and bf16 differ by half a percent
    assert experiments.agree(shaky, {"fp32": [2.025, 2.1]})
    assert not experiments.agree(shaky, {"fp32": [2.035, 2.1]})
    assert experiments.agree(shaky, {"fp32": [2.0, 2.125]})
    assert not experiments.agree(shaky, {"fp32": [2.0, 2.135]})
    chaotic = {"fp32": [2.0, 300.0], "bf16": [2.0, 5.0]}
    assert experiments.agree(chaotic, {"fp32": [2.0, 400.0], "bf16": [2.0, 5.0]})


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "tiny.csv").unlink(), "no results: .*tiny.csv is missing; measure them"),
        (lambda folder: (folder / "tiny.json").unlink(), "tiny.json is missing"),
        (
            lambda folder: edit(folder / "tiny.csv", ",batch,", ",botch,"),
            "not those that were measured .damaged, or edited..",
        ),
        (lambda folder: edit(folder / "tiny.csv", ",seed,", ",sead,"), "not those that were measured"),
        (lambda folder: edit(folder / "tiny.json", "{", "["), "tiny.csv, or tiny.json beside it, cannot be read"),
        (
            lambda folder: (folder / "tiny.json").write_text("[]", encoding="utf-8"),
            "tiny.json beside it, cannot be read",
        ),
        (lambda folder: (folder / "tiny.csv").write_bytes(b"\xff\x00"), "not those that were measured"),
        (lambda folder: (folder / "tiny.csv").write_bytes(b""), "not those that were measured"),
    ],
)
def test_damaged_results_are_refused_with_the_remedy(tiny, damage, message):
    damage(tiny)
    with pytest.raises(tables.ResultsError, match=message) as refused:
        experiments.load("tiny")
    assert "python cnn.py ablate tiny" in str(refused.value)


def test_an_unknown_experiment_is_refused():
    with pytest.raises(ValueError, match="no experiment 'batchnrm': choose one of input, schedule"):
        experiments.load("batchnrm")


# -------------------------------------------------------------------------------------------------------------- claims


def test_verdicts_are_corrected_over_all_claims(tiny, monkeypatch):
    """What is supported alone is not beside nine claims that are not."""
    alone = experiments.claims()
    assert alone.loc[0, "claim"] == "batch norm helps"
    assert alone.loc[0, "n"] == 3
    many = replace(TINY, claims=TINY.claims * 10)
    monkeypatch.setattr(experiments, "EXPERIMENTS", {"tiny": many})
    table = experiments.claims()
    assert table["verdict"].tolist() == evidence.verdicts(table)
    assert table["p"].tolist() == alone["p"].tolist() * 10
    text = experiments.claims_table(table)
    assert text.count("batch norm helps") == len(table)
    decided, undecided = text.split("<details>")
    assert undecided.count("inconclusive") == (table["verdict"] == "inconclusive").sum()
    assert decided.count("](figures/evidence_tiny.png)") == (table["verdict"] != "inconclusive").sum()


def test_every_claim_names_variants_that_its_experiment_has():
    for name, experiment in experiments.EXPERIMENTS.items():
        variants = set(
            ablation.variants(experiment.base, experiment.recipe, experiment.vary, len(experiment.vary) == 2)
        )
        for claim in experiment.claims:
            assert {claim.variant, claim.baseline} <= variants, f"{name}: {claim.text}"


def test_the_declared_budget_is_kept():
    """A typical run is 12,800 images x 4 epochs; the longest, of the ledger, sees 6,400 fifteen times."""
    for experiment in experiments.EXPERIMENTS.values():
        assert (experiment.source.images or 55_000) * experiment.recipe.epochs <= 96_000
