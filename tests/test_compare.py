"""What is compared is what was measured: shipped rows, the reader's sweeps and runs; the page shows that."""

import json
import math
import re
import shutil
import subprocess
from dataclasses import replace

import pandas as pd
import pytest
from scipy import stats

from utils import ablation, compare, evidence, experiments, files, train
from utils.model import CNNConfig
from utils.tables import ResultsError

SETTINGS = {"config": {"norm": "batch", "width": 4}, "recipe": {"epochs": 2}, "source": {"name": "clothes"}}
CHROMIUM = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="the page in a real browser: Chromium is not installed")


def rows_of(variant: str, seeds: range, gain: float = 0.0, lr: float = 0.1) -> list[list]:
    """Rows as `ablation.run` gives them, of two epochs; accuracy differs from seed to seed."""
    rows = []
    for seed in seeds:
        for epoch in (1, 2):
            accuracy = 0.5 + 0.1 * epoch + 0.01 * (seed * seed % 5) + gain * (1 + 0.1 * seed)
            for metric, value in (("loss", 2.0 - accuracy), ("accuracy", accuracy)):
                rows.append(["own", variant, lr, seed, epoch, 5 * epoch, "validation", metric, value, 3.0 * epoch])
    return rows


def write(path, rows: list[list], variants=("a", "b")) -> None:
    pd.DataFrame(rows, columns=ablation.COLUMNS).to_csv(path, index=False)
    about = {"variants": dict.fromkeys(variants, SETTINGS), "measured_on": {"num_classes": 10}}
    path.with_suffix(".json").write_text(json.dumps(about), encoding="utf-8")


@pytest.fixture
def study(tmp_path) -> compare.Study:
    write(tmp_path / "own.csv", rows_of("a", range(5), 0.02) + rows_of("b", range(5)))
    (found,) = compare.studies([tmp_path / "own.csv"])
    return found


@pytest.fixture
def shipped(monkeypatch):
    monkeypatch.setenv("CNN_RESULTS_DIR", str(files.ROOT / "results"))


def test_shipped_rows_are_the_runs_at_the_best_rates_with_their_settings(shipped):
    (found,) = compare.studies([files.ROOT / "results" / "batchnorm.csv"])
    results = experiments.load("batchnorm")
    assert not found.own
    pd.testing.assert_frame_equal(found.rows, results.runs)
    assert found.question == experiments.find("batchnorm").question
    assert found.settings["none"]["norm"] == "none"
    assert {name: found.settings[name]["lr"] for name in found.variants} == results.about["best_lr"]


def test_files_without_rows_of_runs_are_left_out(shipped):
    found = compare.studies(sorted((files.ROOT / "results").glob("*.csv")))
    assert [study.name for study in found] == list(experiments.EXPERIMENTS)


def test_a_sweep_of_the_reader_appears_without_a_further_step(tmp_path, monkeypatch):
    monkeypatch.setenv("CNN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(files, "ROOT", tmp_path)
    recipe = train.Recipe(epochs=1, batch_size=128, lr=0.1)
    options = {
        "source": ablation.Source(images=256),
        "device": "cpu",
        "precision": "fp32",
        "jobs": 1,
        "progress": False,
    }
    frame = ablation.run("my norms", CNNConfig(width=4), {"norm": ["batch", "none"]}, recipe, [0, 1], **options)
    (found,) = compare.studies()
    assert (found.name, found.own, found.variants) == ("my norms", True, ["batch", "none"])
    assert found.settings["none"]["norm"] == "none"
    assert found.settings["none"]["images"] == 256
    accuracies = evidence.finals(frame, "validation accuracy")
    pd.testing.assert_frame_equal(compare.finals(found, "validation accuracy"), accuracies)
    ablation.run("batchnorm", CNNConfig(width=4), {"norm": ["batch", "none"]}, recipe, [0], **options)
    ablation.run(".mine", CNNConfig(width=4), {"norm": ["batch", "none"]}, recipe, [0], **options)
    found = {study.name for study in compare.studies()}
    assert "batchnorm (own)" in found, "a sweep of the reader's that is called like one of the course's"
    assert "my norms" in found
    assert any(name.startswith("_mine") for name in found), "no hidden file"
    assert len(found) == 3


def test_what_a_shipped_experiment_left_behind_is_shown_once(tmp_path, monkeypatch, shipped):
    monkeypatch.setenv("CNN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(files, "ROOT", tmp_path)
    results = experiments.load("batchnorm")
    about = {"variants": results.about["variants"], "measured_on": results.runs.attrs}
    files.write_rows(ablation.sweeps() / "batchnorm.csv", results.runs.to_csv(index=False), about)
    assert [study.name for study in compare.studies() if "batchnorm" in study.name] == ["batchnorm"]


def test_more_seeds_of_a_shipped_experiment_are_the_readers_own(tmp_path, monkeypatch, shipped):
    monkeypatch.setenv("CNN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(files, "ROOT", tmp_path)
    results = experiments.load("batchnorm")
    more = results.runs.assign(seed=results.runs["seed"] + 1000)
    about = {"variants": results.about["variants"], "measured_on": {}}
    files.write_rows(ablation.sweeps() / "batchnorm.csv", more.to_csv(index=False), about)
    assert "batchnorm (own)" in [study.name for study in compare.studies()]


def test_a_table_saved_by_a_spreadsheet_is_read(tmp_path):
    write(tmp_path / "own.csv", rows_of("a", range(3)) + rows_of("b", range(3)))
    (tmp_path / "own.csv").write_text((tmp_path / "own.csv").read_text(encoding="utf-8"), encoding="utf-8-sig")
    (found,) = compare.studies([tmp_path / "own.csv"])
    assert found.variants == ["a", "b"]


def test_a_variant_without_the_metric_is_left_out_and_the_others_stay(tmp_path):
    rows = pd.DataFrame(rows_of("a", range(3)) + rows_of("b", range(3)), columns=ablation.COLUMNS)
    study = compare.Study("own", "?", rows[(rows["variant"] == "a") | (rows["metric"] != "accuracy")], {}, own=True)
    assert list(compare.finals(study, "validation accuracy")) == ["a"]


def test_each_rate_of_a_sweep_is_a_variant_of_its_own(tmp_path):
    write(tmp_path / "rates.csv", rows_of("a", range(2), lr=0.1) + rows_of("a", range(2), lr=0.3), ["a"])
    (found,) = compare.studies([tmp_path / "rates.csv"])
    assert found.variants == ["a, lr 0.1", "a, lr 0.3"]
    assert compare.differences(found.settings, *found.variants).to_dict("list") == {
        "a, lr 0.1": [0.1],
        "a, lr 0.3": [0.3],
    }


def test_rates_of_ones_own_sweep_are_among_the_settings_that_differ(tmp_path):
    write(tmp_path / "two.csv", rows_of("a", range(2), lr=0.3) + rows_of("b", range(2), lr=0.03))
    (found,) = compare.studies([tmp_path / "two.csv"])
    assert compare.differences(found.settings, "a", "b").to_dict("list") == {"a": [0.3], "b": [0.03]}
    assert [variant["lr"] for variant in compare.as_json(found)["variants"]] == [0.3, 0.03]


def folder(path, seed: int, accuracy: float, **given) -> None:
    path.mkdir(parents=True)
    (path / "settings.json").write_text(json.dumps({"seed": seed, "threads": 1, **given}), encoding="utf-8")
    columns = ["run", "epoch", "step", "split", "metric", "value", "seconds"]
    pd.DataFrame([["run", 1, 5, "validation", "accuracy", accuracy, 2.0]], columns=columns).to_csv(
        path / "history.csv", index=False
    )


def test_runs_that_differ_in_the_seed_only_are_one_variant(tmp_path):
    for seed, accuracy in ((0, 0.5), (1, 0.6)):
        folder(tmp_path / f"default {seed}", seed, accuracy)
        folder(tmp_path / f"norm {seed}", seed, accuracy + 0.1, norm="none", lr=0.2)
    (tmp_path / "unfinished").mkdir()
    (found,) = compare.studies([tmp_path])
    assert found.variants == ["defaults", "norm none, lr 0.2"]
    table = compare.finals(found, "validation accuracy")
    assert (table["norm none, lr 0.2"] - table["defaults"]).tolist() == pytest.approx([0.1, 0.1])
    assert set(compare.differences(found.settings, *found.variants).index) == {"norm", "lr"}
    (again,) = compare.studies(sorted(tmp_path.iterdir()))
    pd.testing.assert_frame_equal(again.rows, found.rows)


def test_runs_on_other_data_or_channels_are_variants_of_their_own_and_a_default_is_none(tmp_path):
    own = (
        {"data": "/a/photos", "channels": 3},
        {"data": "/a/photos", "channels": 1},
        {"data": "/b/photos", "channels": 1},
        {"precision": "bf16"},
    )
    for number, settings in enumerate(own):
        folder(tmp_path / f"own {number}", 0, 0.5 + 0.1 * number, **settings)
    folder(tmp_path / "said", 0, 0.8, lr=train.Recipe().lr)
    (found,) = compare.studies([tmp_path])
    assert len(found.variants) == 5
    assert "precision bf16" in found.variants
    assert "defaults" in found.variants
    ends = compare.finals(found, "validation accuracy").iloc[0]
    assert sorted(ends.tolist()) == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.8])


@pytest.mark.parametrize("order", [("said", "usual"), ("usual", "said")])
def test_data_that_is_named_and_is_the_usual_one_is_the_same_variant(order, tmp_path):
    for seed, name in enumerate(order):
        folder(tmp_path / str(seed), seed, 0.8, **({"data": "fashion-mnist"} if name == "said" else {}))
    (found,) = compare.studies([tmp_path])
    assert found.variants == ["defaults"]


def test_a_variant_may_have_any_name(tmp_path):
    names = ["None", "NA", "0.10"]
    write(tmp_path / "odd.csv", [row for name in names for row in rows_of(name, range(2))], names)
    (found,) = compare.studies([tmp_path / "odd.csv"])
    assert sorted(found.rows["variant"].unique()) == sorted(names)
    assert "0.10" in compare.page([found])


def test_curves_have_the_t_interval_and_the_chosen_axis(study):
    frame = compare.curves(study, "validation accuracy", "seconds")
    last = frame[(frame["variant"] == "a") & (frame["epoch"] == 2)].iloc[0]
    values = study.rows.query("variant == 'a' and epoch == 2 and metric == 'accuracy'")["value"]
    low, high = stats.t.interval(0.95, len(values) - 1, values.mean(), stats.sem(values))
    assert (last["x"], last["n"]) == (6.0, 5)
    assert (last["mean"] - last["half"], last["mean"] + last["half"]) == pytest.approx((low, high))
    smooth = compare.curves(study, "validation accuracy", smoothing=2)
    assert smooth["x"].tolist() == [1, 2, 1, 2]
    assert smooth["mean"].iloc[1] == pytest.approx(frame["mean"].iloc[:2].mean())
    alone = compare.curves(replace(study, rows=study.rows[study.rows["seed"] == 0]), "validation accuracy")
    assert alone["half"].isna().all(), "of one run there is no interval"
    with pytest.raises(ValueError, match="axis='steps': choose epoch or seconds"):
        compare.curves(study, "validation accuracy", "steps")


def test_the_interval_of_a_smoothed_curve_is_that_of_smoothed_runs(study):
    frame = compare.curves(study, "validation accuracy", smoothing=2)
    runs = study.rows.query("variant == 'a' and metric == 'accuracy'").groupby("seed")["value"].mean()
    low, high = stats.t.interval(0.95, len(runs) - 1, runs.mean(), stats.sem(runs))
    last = frame[(frame["variant"] == "a") & (frame["epoch"] == 2)].iloc[0]
    assert (last["mean"] - last["half"], last["mean"] + last["half"]) == pytest.approx((low, high))


def test_what_is_not_finite_is_a_gap_and_never_the_best(study):
    rows = study.rows.copy()
    loss = (rows["variant"] == "a") & (rows["seed"] == 0) & (rows["metric"] == "loss")
    rows.loc[loss & (rows["epoch"] == 2), "value"] = math.inf
    rows.attrs = study.rows.attrs
    study = replace(study, rows=rows)
    table = compare.summary(study, "validation loss", ["a", "b"], "b").set_index("variant")
    assert table["n"].to_dict() == {"a": 4, "b": 5}
    assert table[["mean", "difference"]].loc["a"].notna().all()
    assert compare.curves(study, "validation loss")["n"].tolist() == [5, 4, 5, 5]
    curve, finals = (compare.as_json(study)["variants"][0][what]["validation loss"] for what in ("curves", "finals"))
    assert [len(curve["runs"]), "0" in finals] == [5, False]
    assert compare.clean(curve["runs"][0])[1] is None


def test_two_runs_of_one_seed_are_told(tmp_path):
    write(tmp_path / "own.csv", rows_of("a", range(3)) + rows_of("a", range(2, 4)) + rows_of("b", range(3)))
    with pytest.raises(ResultsError, match=r"own.csv has two runs of the variant 'a' with seed 2: expected one; give"):
        compare.studies([tmp_path / "own.csv"])


def test_runs_that_end_at_different_epochs_are_told(study):
    short = study.rows[(study.rows["seed"] > 0) | (study.rows["epoch"] == 1)]
    table = compare.summary(replace(study, rows=short), "validation accuracy", ["a", "b"], "b")
    assert table["epochs"].tolist() == ["1–2", "1–2"]
    assert compare.summary(study, "validation accuracy", ["a"], "b")["epochs"].tolist() == ["2"]


def test_runs_that_diverged_count_as_guessing_and_have_no_loss(study):
    broken = [["own", "b", 0.1, 7, 0, 0, "train", train.DIVERGED, 1.0, 0.0]]
    broken += [["own", "a", 0.1, 7, 2, 0, "validation", name, 0.9, 0.0] for name in ("accuracy", "loss")]
    rows = pd.concat([study.rows, pd.DataFrame(broken, columns=ablation.COLUMNS)], ignore_index=True)
    rows.attrs = study.rows.attrs
    study = replace(study, rows=rows)
    assert compare.finals(study, "validation accuracy").loc[7, "b"] == 0.1
    assert pd.isna(compare.finals(study, "validation loss").loc[7, "b"])
    assert compare.as_json(study)["variants"][1]["diverged"] == 1
    legend = compare.figure(study, "validation accuracy", ["a", "b"], "b").axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b (1 diverged)"]
    assert compare.summary(study, "validation accuracy", ["a", "b"], "b")["diverged"].tolist() == [0, 1]


def test_differences_of_unknown_variants_are_refused():
    with pytest.raises(ValueError, match="no settings of 'c': choose one of a, b"):
        compare.differences({"a": {}, "b": {}}, "a", "c")


@pytest.mark.parametrize(
    "variants",
    [
        ["he, batch", "he, none", "mine, batch", "mine, none"],
        [str(n) for n in range(9)],
        [f"{norm}, lr {lr}" for norm in ("batch", "none") for lr in (0.01, 0.03, 0.1, 0.3, 1, 3)],
    ],
)
def test_every_variant_looks_different(variants):
    found = compare.looks(variants)
    assert list(found) == variants
    drawn = {(shade, number % len(compare.DASHES)) for shade, number in found.values()}
    assert len(drawn) == len(variants)


def test_a_grid_has_the_colours_of_its_first_field():
    found = compare.looks(["he, batch norm", "he, no norm", "xavier, batch norm", "xavier, no norm"])
    assert found["he, batch norm"][0] == found["he, no norm"][0] != found["xavier, no norm"][0]


# ------------------------------------------------------------------------------------------------------- the page


def test_page_is_one_file_that_asks_nothing_of_a_network(study):
    text = compare.page([study])
    assert re.findall(r"(?<![.\w])(?:src|href)\s*=|url\(|@import|https?://(?!www\.w3\.org/2000/svg)", text) == []


def test_names_from_data_cannot_leave_the_page(study):
    name = "</script><script>alert('x')</script><b>"
    rows = study.rows.replace({"variant": {"a": name}})
    rows.attrs = study.rows.attrs
    text = compare.page([replace(study, name=name, rows=rows, settings={name: {"data": name}})])
    assert "<b>" not in text
    assert text.count("</script>") == 2
    content = re.search(r'type="application/json">(.*?)</script>', text, re.DOTALL)[1]
    assert json.loads(content)["studies"][0]["variants"][0]["name"] == name


def test_patterns_that_the_shell_left_alone_are_matched(study, tmp_path):
    """runs/* stays as it is where there are no runs, and everywhere on Windows."""
    names = [found.name for found in compare.studies([tmp_path / "*.csv", tmp_path / "runs" / "*"])]
    assert names == [study.name]


def test_nothing_to_compare_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"there is no .*gone.csv: name CSV files of experiments"):
        compare.studies([tmp_path / "gone.csv"])
    (tmp_path / "other.csv").write_text("a,b\n1,2\n", encoding="utf-8")
    with pytest.raises(ValueError, match="there is nothing to compare"):
        compare.page(compare.studies([tmp_path / "other.csv"]))


def in_browser(studies, folder, script: str = "") -> str:
    """The page as a browser has drawn it, after a `script` in it."""
    page = compare.page(studies).replace("</body>", f"<script>{script}</script></body>")
    (folder / "compare.html").write_text(page, encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000", f"--user-data-dir={folder}"]
    command = [CHROMIUM, *flags, "--dump-dom", (folder / "compare.html").as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120).stdout


@needs_chromium
@pytest.mark.parametrize("clicks", [1, 2])
def test_what_is_not_known_is_sorted_last_either_way(clicks, tmp_path):
    """Of one seed there is no interval: a table of the lower ends, with two such variants between three others."""
    known = {"a": 0.3, "c": 0.1, "e": 0.2}
    rows = [row for name in "abcde" for row in rows_of(name, range(3 if name in known else 1), known.get(name, 0.0))]
    write(tmp_path / "own.csv", rows, "abcde")
    script = "document.querySelectorAll('#table button')[5].click();" * clicks  # "low"
    shown = in_browser(compare.studies([tmp_path / "own.csv"]), tmp_path, script)
    table = shown[shown.index('<table id="table">') : shown.index("Settings that differ")]
    order = re.findall(r'<td class="">(\w)</td>', table)
    expected = sorted(known, key=known.get, reverse=clicks == 2)
    assert order[:3] == expected
    assert set(order[3:]) == {"b", "d"}


@needs_chromium
def test_claims_stand_there_as_a_table_too(tmp_path, shipped):
    shown = in_browser(compare.studies([files.ROOT / "results" / "batchnorm.csv"]), tmp_path)
    claim = next(each for each in experiments.find("batchnorm").claims)
    table = shown[shown.index('<table id="claimed">') :]
    assert f"<td>{claim.text}</td><td>{claim.metric}</td>" in table


@needs_chromium
def test_browser_shows_the_differences_that_evidence_gives(study, tmp_path):
    """The page's own arithmetic against `evidence.compare`, in the text of the drawn page."""
    shown = in_browser([study], tmp_path)
    row = evidence.compare(study.rows, "b").iloc[0]
    low, high, mean = (
        f"{100 * value:+.2f}".replace("-", "−") for value in (row["low"], row["high"], row["difference"])
    )
    assert f"a − b: {mean} ({low} to {high}), n = 5" in shown
    cells = [f'<td class="number">{100 * row[name]:.2f}</td>' for name in ("difference", "low", "high")]
    assert "".join(cells) in shown
    assert "<polyline" in shown
    assert "They are the same." in shown


@needs_chromium
def test_browser_draws_gaps_where_there_is_no_number_and_no_band_of_one_run(study, tmp_path):
    rows = pd.concat([study.rows, *(study.rows.assign(epoch=study.rows["epoch"] + more) for more in (2, 4))])
    rows = rows[(rows["variant"] == "a") | (rows["seed"] == 0)]  # five runs of a, and one of b
    gone = (rows["variant"] == "b") & (rows["epoch"] == 3) & (rows["metric"] == "accuracy")
    rows.loc[gone, "value"] = math.nan
    rows.attrs = study.rows.attrs
    shown = in_browser([replace(study, rows=rows)], tmp_path)
    curves = shown[shown.index('<figure id="curves"') : shown.index("Differences")]
    assert [curves.count(f"<{kind}") for kind in ("polygon", "polyline")] == [1, 3], "a whole, b in two parts"
    assert "NaN" not in curves
    assert '<td class="number">6</td>' in shown, "the epochs"


# ------------------------------------------------------------------------------------------------- in a notebook


def test_summary_has_the_difference_that_evidence_gives(study):
    table = compare.summary(study, "validation accuracy", ["a", "b"], "b").set_index("variant")
    row = evidence.compare(study.rows, "b").iloc[0]
    for name in ("difference", "low", "high"):
        assert table.loc["a", name] == pytest.approx(100 * row[name])
    assert pd.isna(table.loc["b", "difference"])
    assert table["seconds"].tolist() == [6.0, 6.0]
    alone = study.rows[(study.rows["variant"] == "b") | (study.rows["seed"] == 0)]
    few = compare.summary(replace(study, rows=alone), "validation accuracy", ["a"], "b")
    assert few["n"].tolist() == [1], "one pair: shown, but without a difference"
    assert few["difference"].isna().all()


def test_figure_draws_the_chosen_variants_and_their_differences(study):
    fig = compare.figure(study, "validation loss", ["a", "b"], "b", "seconds", smoothing=2)
    top, bottom = fig.axes
    assert [text.get_text() for text in top.get_legend().get_texts()] == ["a", "b"]
    assert top.get_xlabel() == "seconds of training, as the clock ran"
    assert [label.get_text().partition(":")[0] for label in bottom.get_yticklabels()] == ["a"]
    assert len(compare.closed(fig).axes) == 2


def test_the_axis_of_an_accuracy_ends_at_what_one_can_be(tmp_path):
    write(tmp_path / "own.csv", rows_of("a", range(2), 0.2))  # 0.8 and 0.83: the t interval goes beyond 1
    (found,) = compare.studies([tmp_path / "own.csv"])
    top = compare.figure(found, "validation accuracy", ["a"], "a").axes[0]
    low, high = top.get_ylim()
    assert -1 <= low < high <= 101
    assert max(path.vertices[:, 1].max() for path in top.collections[0].get_paths()) > 101


def test_exports_are_written_whole(study, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "ROOT", tmp_path)
    paths = [
        compare.save(study, "validation accuracy", ["a", "b"], "b", "epoch", 1, kind) for kind in ("png", "svg", "csv")
    ]
    assert [path.read_bytes()[:4] for path in paths[:2]] == [b"\x89PNG", b"<?xm"]
    assert pd.read_csv(paths[2])["variant"].tolist() == ["a", "b"]
    assert {path.parent.name for path in paths} == {"exports"}


def test_tables_sort_and_escape(study):
    rows = study.rows.replace({"variant": {"a": "<i>"}})
    rows.attrs = study.rows.attrs
    text = compare.tables(replace(study, rows=rows), "validation accuracy", ["b", "<i>"], "b", "mean")
    assert text.index("&lt;i&gt;") < text.index("<td>b</td>"), "the best one first"
    assert "<i>" not in text
