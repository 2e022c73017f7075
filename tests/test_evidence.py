"""Intervals and verdicts against SciPy, and by simulation: how often chance alone is taken for an effect."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from utils import evidence


def made_up(values: dict[str, list[float]], lr: float = 0.1, metric: str = "accuracy") -> pd.DataFrame:
    """Runs with these final values of each variant, a seed each, and a worse epoch before."""
    rows = []
    for variant, finals in values.items():
        for seed, value in enumerate(finals):
            for epoch, shown in ((1, value / 2), (2, value)):
                rows.append(["e", variant, lr, seed, epoch, epoch, "validation", metric, shown, 1.0])
            rows.append(["e", variant, lr, seed, 2, 2, "train", "diverged", 0.0, 1.0])
    columns = ["experiment", "variant", "lr", "seed", "epoch", "step", "split", "metric", "value", "seconds"]
    frame = pd.DataFrame(rows, columns=columns)
    frame.attrs = {"validation_images": 5000, "num_classes": 10}
    return frame


OURS = [0.91, 0.93, 0.92, 0.94, 0.90, 0.925]
THEIRS = [0.90, 0.91, 0.915, 0.92, 0.90, 0.91]


def test_numbers_are_those_of_scipy():
    (row,) = evidence.compare(made_up({"a": OURS, "b": THEIRS}), "b").itertuples()
    test = stats.ttest_rel(OURS, THEIRS)
    interval = test.confidence_interval(0.95)
    assert row.n == 6
    assert row.difference == pytest.approx(np.mean(OURS) - np.mean(THEIRS))
    assert (row.low, row.high) == pytest.approx((interval.low, interval.high))
    assert row.p == pytest.approx(test.pvalue)
    assert row.correlation == pytest.approx(stats.pearsonr(OURS, THEIRS).statistic)
    assert row.detectable == pytest.approx((interval.high - interval.low) / 2)
    mean = np.mean(OURS + THEIRS)
    assert row.sampling_error == pytest.approx(math.sqrt(mean * (1 - mean) / 5000))
    assert row.verdict == "supported"


def test_a_margin_moves_the_test_and_not_the_interval():
    runs = made_up({"a": OURS, "b": THEIRS})
    (without,), (beyond,) = (evidence.compare(runs, "b", margin=m).itertuples() for m in (0.0, 0.03))
    assert (without.low, without.high) == (beyond.low, beyond.high)
    assert beyond.p == pytest.approx(stats.ttest_1samp(np.subtract(OURS, THEIRS), 0.03).pvalue)
    assert beyond.verdict == "refuted"
    (between,) = evidence.compare(runs, "b", margin=without.difference).itertuples()
    assert between.verdict == "inconclusive"


def test_lower_can_be_better():
    (row,) = evidence.compare(made_up({"a": OURS, "b": THEIRS}), "b", higher_is_better=False).itertuples()
    assert row.difference == pytest.approx(np.mean(THEIRS) - np.mean(OURS))
    assert row.verdict == "refuted"


def test_holm_is_what_the_paper_says():
    assert evidence.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert evidence.holm([0.6, 0.7]) == [1.0, 1.0]


def test_several_claims_need_more(monkeypatch):
    """A p-value of 0.03 is enough alone, and not beside another one."""
    rows = pd.DataFrame({"p": [0.03, 0.5], "difference": [1.0, 1.0], "margin": [0.0, 0.0]})
    assert evidence.verdicts(rows[:1]) == ["supported"]
    assert evidence.verdicts(rows) == ["inconclusive", "inconclusive"]


def simulated(effect: float, margin: float, rng: np.random.Generator, n: int = 10) -> str:
    """The verdict on one made-up experiment: pairs with a common part, and noise of 0.3 points."""
    common, noise = rng.normal(0.9, 0.002, n), rng.normal(0, 0.003, (2, n))
    result = evidence.paired(common + noise[0] + effect, common + noise[1], margin)
    return evidence.verdicts(pd.DataFrame([result | {"margin": margin}]))[0]


def test_chance_is_seldom_taken_for_an_effect_and_an_effect_seldom_missed():
    """1,000 experiments each: without an effect beyond δ, and with one of δ plus twice what ten seeds can show."""
    rng, margin = np.random.default_rng(0), 0.002
    detectable = stats.t.ppf(0.975, 9) * 0.003 * math.sqrt(2 / 10)
    null = [simulated(margin, margin, rng) for _ in range(1000)]
    real = [simulated(margin + 2 * detectable, margin, rng) for _ in range(1000)]
    assert null.count("supported") <= 50
    assert null.count("supported") + null.count("refuted") <= 75  # 5 %, give or take what 1,000 can show
    assert real.count("supported") >= 900


@pytest.mark.parametrize(
    ("runs", "baseline", "metric", "message"),
    [
        (made_up({"a": [0.9], "b": [0.8]}), "b", "validation accuracy", "1 seed: no interval is possible"),
        (made_up({"a": OURS, "b": THEIRS}), "c", "validation accuracy", "baseline='c': choose one of a, b"),
        (made_up({"a": OURS, "b": THEIRS}), "b", "test accuracy", "metric='test accuracy': choose one of"),
        (made_up({"a": OURS, "b": THEIRS[:4]}), "b", "validation accuracy", r"seeds \[4, 5\] are not of both"),
        (
            pd.concat([made_up({"a": OURS, "b": THEIRS}), made_up({"a": OURS}, lr=0.2)]),
            "b",
            "validation accuracy",
            "'a' has 2 learning rates",
        ),
        (
            pd.concat([made_up({"a": OURS, "b": THEIRS}), made_up({"a": OURS}).assign(experiment="f")]),
            "b",
            "validation accuracy",
            "'a' is a variant of 2 experiments here: rename one",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(runs, baseline, metric, message):
    with pytest.raises(ValueError, match=message):
        evidence.compare(runs, baseline, metric)


def diverging(values: dict[str, list[float]], variant: str, seed: int, **options) -> pd.DataFrame:
    """Runs of which one diverged before its first epoch ended."""
    runs = made_up(values, **options)
    of_run = (runs["variant"] == variant) & (runs["seed"] == seed)
    runs = runs[~(of_run & (runs["metric"] != "diverged"))].copy()
    runs.loc[(runs["variant"] == variant) & (runs["seed"] == seed), "value"] = 1.0
    runs.attrs = {"validation_images": 5000, "num_classes": 10}
    return runs


def test_a_run_that_diverged_counts_as_guessing_and_is_told():
    (row,) = evidence.compare(diverging({"a": OURS, "b": THEIRS}, "b", 2), "b").itertuples()
    assert row.n == 6
    assert row.diverged == 1
    guessed = [*THEIRS[:2], 0.1, *THEIRS[3:]]
    assert row.difference == pytest.approx(np.mean(OURS) - np.mean(guessed))
    with pytest.raises(ValueError, match=r"diverged, and so without loss: b \(seed 2\)"):
        evidence.compare(diverging({"a": OURS, "b": THEIRS}, "b", 2, metric="loss"), "b", "validation loss")


def test_one_variant_alone_is_compared_with_none():
    with pytest.raises(ValueError, match="there are runs of 'a' only: expected those of another variant"):
        evidence.compare(made_up({"a": OURS}), "a")


def test_two_variants_that_diverge_with_one_seed_are_one_pair():
    runs = diverging({"a": OURS, "b": THEIRS}, "b", 2)
    again = diverging({"a": OURS, "b": THEIRS}, "a", 2)
    runs = pd.concat([runs[runs["variant"] == "b"], again[again["variant"] == "a"]])
    runs.attrs = again.attrs
    (row,) = evidence.compare(runs, "b").itertuples()
    assert (row.n, row.diverged) == (6, 2)


def test_a_learning_rate_at_which_every_run_diverges_is_no_good():
    fine, broken = made_up({"a": [0.9, 0.8]}, lr=0.1), made_up({"a": [0.9, 0.8]}, lr=9.0)
    broken = broken[broken["metric"] == "diverged"].assign(value=1.0)  # before the first epoch ended
    runs = pd.concat([fine, broken])
    runs.attrs = fine.attrs
    assert evidence.best_lr(runs) == {"a": 0.1}
    broken.attrs = fine.attrs
    assert evidence.finals(broken, "validation accuracy")["a"].tolist() == [0.1, 0.1]


def test_a_variant_without_the_metric_is_named():
    runs = made_up({"a": [0.9, 0.8], "b": [0.7, 0.6]})
    runs = runs[(runs["variant"] == "a") | (runs["metric"] != "accuracy")]
    with pytest.raises(ValueError, match="'b' has no validation accuracy: leave that variant out"):
        evidence.finals(runs, "validation accuracy")


def test_best_lr_is_the_best_mean_of_each_variant():
    low, high = made_up({"a": [0.9, 0.8], "b": [0.7, 0.7]}, lr=0.1), made_up({"a": [0.8, 0.8], "b": [0.9, 0.6]}, lr=0.5)
    runs = pd.concat([low, high])
    runs.attrs = low.attrs
    assert evidence.best_lr(runs) == {"a": 0.1, "b": 0.5}
    assert evidence.best_lr(runs, higher_is_better=False) == {"a": 0.5, "b": 0.1}


def test_equal_values_everywhere_are_no_effect():
    (row,) = evidence.compare(made_up({"a": [0.9] * 4, "b": [0.9] * 4}), "b").itertuples()
    assert (row.difference, row.p, row.verdict) == (0, 1, "inconclusive")
    assert math.isnan(row.correlation)


def test_runs_that_all_diverged_say_nothing_about_a_margin():
    runs = made_up({"a": OURS, "b": THEIRS})
    runs = runs[runs["metric"] == "diverged"].assign(value=1.0)
    runs.attrs = {"validation_images": 5000, "num_classes": 10}
    for margin in (-0.005, 0.0, 0.005):
        (row,) = evidence.compare(runs, "b", margin=margin).itertuples()
        assert (row.n, row.diverged) == (6, 12)
        assert (row.difference, row.p, row.verdict) == (0, 1, "inconclusive")


@pytest.mark.parametrize("theirs", [[0.9, 0.8], [0.8924, 0.8898, 0.905]], ids=str)
def test_differences_that_agree_to_rounding_have_no_spread(theirs):
    """Accuracies lie on a grid, so that two or three differences are easily the same: by chance, not by certainty."""
    result = evidence.paired(np.array(theirs) + 0.0002, np.array(theirs))
    assert result["p"] == 1
    assert result["difference"] == pytest.approx(0.0002)


def test_a_difference_is_said_in_points_with_its_interval():
    result = evidence.paired(np.array([91.0, 92.0, 93.0]), np.array([90.0, 91.5, 91.5]))
    low, high = stats.t.interval(0.95, 2, loc=1.0, scale=stats.sem([1.0, 0.5, 1.5]))
    assert evidence.points(result, 2) == f"+1.00 points (95 % interval {low:+.2f} to {high:+.2f}, n = 3)"


def test_values_without_a_partner_are_refused():
    with pytest.raises(ValueError, match="5 values and 3: run the same seeds for both"):
        evidence.paired(np.arange(5.0), np.arange(3.0))
    with pytest.raises(ValueError, match="3 values and 2: run the same seeds for both"):
        evidence.paired(np.arange(3.0), np.array([1.0, math.nan, 2.0]))
