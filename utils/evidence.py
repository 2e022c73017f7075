"""What the seeds say about a difference: its 95 % interval, and a verdict by a rule that was set before the runs.

The difference of two variants is taken seed by seed. It is *supported* when p < 0.05 against the margin δ and it lies
above δ, *refuted* when below, else *inconclusive*. Among several claims p is corrected (Holm 1979), while the intervals
shown are of each claim alone: one may clear the margin and its claim still be inconclusive. Intervals are Student's:
bootstrap intervals of ten values miss the truth too often. Pairs that all differ by the same, as when every run
diverged, show no spread to judge the difference by: p is 1.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from utils.train import DIVERGED

CONFIDENCE = 0.95
ROUNDING = 1e-12  # relative to the values: a smaller spread comes from their subtraction


def compare(
    runs: pd.DataFrame,
    baseline: str,
    metric: str = "validation accuracy",
    *,
    margin: float = 0.0,
    higher_is_better: bool = True,
) -> pd.DataFrame:
    """Return one row for each other variant: how much better than `baseline` it is by `metric` ("split name").

    Columns: variant, baseline, metric, margin, n, difference (mean over seeds, positive: better), low, high (95 %
    interval), p (two-sided, against `margin`), correlation (of the pairs), sampling_error (standard error of an
    accuracy by the number of images of its split, where it is known), detectable (half of the interval: by how much a
    difference that is found has to exceed `margin`), diverged (runs of either, which count as guessing), verdict.
    Raises ValueError for fewer than two seeds or variants, seeds that are not those of the baseline, an unknown variant
    or metric, and several learning rates a variant.
    """
    table = finals(runs, metric)
    if baseline not in table:
        raise ValueError(f"baseline={baseline!r}: choose one of {', '.join(table.columns)}")
    if len(table.columns) < 2:
        raise ValueError(f"there are runs of {baseline!r} only: expected those of another variant to compare with it")
    sign = 1 if higher_is_better else -1
    rows = []
    for variant in table.columns.drop(baseline):
        pair = table[[variant, baseline]]
        if pair.isna().any(axis=None):
            alone = pair.index[pair.isna().any(axis=1)].tolist()
            raise ValueError(f"seeds {alone} are not of both {variant!r} and {baseline!r}: run the same seeds for both")
        result = paired(sign * pair[variant].to_numpy(), sign * pair[baseline].to_numpy(), margin)
        broken = runs[runs["variant"].isin([variant, baseline]) & (runs["metric"] == DIVERGED)]["value"].sum()
        error = sampling_error(pair.to_numpy().mean(), metric, runs.attrs)
        labels = {"variant": variant, "baseline": baseline, "metric": metric, "margin": margin}
        rows.append(labels | result | {"sampling_error": error, "diverged": int(broken)})
    return pd.DataFrame(rows).assign(verdict=lambda rows: verdicts(rows))


def paired(ours: np.ndarray, theirs: np.ndarray, margin: float = 0.0) -> dict[str, float]:
    """Return n, difference, low, high, p, correlation, detectable of pairs of values."""
    n = len(ours)
    if n < 2:
        raise ValueError(f"{n} seed: no interval is possible; expected two or more, and ten for a claim")
    if len(theirs) != n or not np.isfinite([ours, theirs]).all():
        raise ValueError(
            f"{np.isfinite(ours).sum()} values and {np.isfinite(theirs).sum()}: run the same seeds for both"
        )
    differences = ours - theirs
    mean, error = differences.mean(), differences.std(ddof=1) / math.sqrt(n)
    error = 0.0 if error <= ROUNDING * np.abs([ours, theirs]).max() else error
    half = stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * error
    p = 2 * stats.t.sf(abs(mean - margin) / error, n - 1) if error else 1.0
    with np.errstate(invalid="ignore", divide="ignore"):
        constant = ours.std() == 0 or theirs.std() == 0
        correlation = math.nan if constant else np.corrcoef(ours, theirs)[0, 1]
    result = {"n": n, "difference": mean, "low": mean - half, "high": mean + half, "p": p}
    return result | {"correlation": correlation, "detectable": half}


def points(row: Mapping[str, float], digits: int = 1) -> str:
    """Return in words what `paired` says of values in percent: a difference in percentage points, its interval, n."""
    low, high = f"{row['low']:+.{digits}f}", f"{row['high']:+.{digits}f}"
    return f"{row['difference']:+.{digits}f} points (95 % interval {low} to {high}, n = {row['n']})"


def verdicts(rows: pd.DataFrame) -> list[str]:
    """Return the verdict on each difference, their p-values corrected for being several (Holm 1979).

    One difference alone is supported when its 95 % interval lies beyond the margin, and refuted when it lies below.
    """
    found = []
    for p, difference, margin in zip(holm(rows["p"].to_list()), rows["difference"], rows["margin"], strict=True):
        clear = "supported" if difference > margin else "refuted"
        found.append(clear if p < 1 - CONFIDENCE else "inconclusive")
    return found


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values after Holm's step-down correction."""
    order = np.argsort(p_values)
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = largest
    return corrected


def finals(runs: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Return the last value of `metric` ("split name") of each run: a row a seed, a column a variant.

    A run that diverged counts as guessing: accuracy 1 / classes; for other metrics it is an error. So is a variant that
    has several learning rates, or stands in several experiments.
    """
    split, _, name = metric.partition(" ")
    wanted = runs[(runs["split"] == split) & (runs["metric"] == name)]
    if wanted.empty and not (runs["metric"] == DIVERGED).all():  # each of a few runs may have diverged at once
        there = sorted({f"{a} {b}" for a, b in zip(runs["split"], runs["metric"], strict=True)})
        raise ValueError(f"metric={metric!r}: choose one of {', '.join(there)}")
    several = runs.groupby("variant")["experiment"].nunique()
    if (several > 1).any():
        raise ValueError(f"{several.idxmax()!r} is a variant of {several.max()} experiments here: rename one of them")
    several = runs.groupby("variant")["lr"].nunique()
    if (several > 1).any():
        raise ValueError(f"{several.idxmax()!r} has {several.max()} learning rates: compare variants at their best_lr")
    table = wanted.sort_values("epoch").drop_duplicates(["seed", "variant"], keep="last")
    table = table.pivot(index="seed", columns="variant", values="value")
    table = fill_diverged(table, runs, name)
    without = [variant for variant in dict.fromkeys(runs["variant"]) if variant not in table]
    if without:
        raise ValueError(f"{without[0]!r} has no {metric}: leave that variant out, or choose another metric")
    return table[list(dict.fromkeys(runs["variant"]))].sort_index()


def fill_diverged(table: pd.DataFrame, runs: pd.DataFrame, name: str) -> pd.DataFrame:
    """Return `table` with the value of guessing for the runs that diverged."""
    broken = runs[(runs["metric"] == DIVERGED) & (runs["value"] > 0)]
    if broken.empty:
        return table
    classes = runs.attrs.get("num_classes")
    if name != "accuracy" or classes is None:
        which = ", ".join(f"{row.variant} (seed {row.seed})" for row in broken.itertuples())
        raise ValueError(f"diverged, and so without {name}: {which}; compare accuracies, or a lower learning rate")
    seeds, variants = (pd.Index(broken[column].unique()) for column in ("seed", "variant"))
    table = table.reindex(index=table.index.union(seeds), columns=table.columns.union(variants))
    for row in broken.itertuples():
        table.loc[row.seed, row.variant] = 1 / classes
    return table


def best_lr(
    runs: pd.DataFrame, metric: str = "validation accuracy", *, higher_is_better: bool = True
) -> dict[str, float]:
    """Return for each variant of a sweep the learning rate with the best mean of `metric` over its seeds.

    Give them to `ablation.run` with *other* seeds: the best of several is better than it will be again.
    """
    found = {}
    for variant in dict.fromkeys(runs["variant"]):
        of_variant = runs[runs["variant"] == variant]
        means = {}
        for lr, group in of_variant.groupby("lr"):
            group.attrs = runs.attrs
            means[lr] = finals(group, metric)[variant].mean()
        found[variant] = (max if higher_is_better else min)(means, key=means.get)
    return found


def sampling_error(accuracy: float, metric: str, about: Mapping[str, Any]) -> float:
    """Return the standard error of an accuracy on so many images, √(p(1 − p)/N); NaN for what is no accuracy."""
    split, _, name = metric.partition(" ")
    images = about.get({"train": "images"}.get(split, f"{split}_images"))
    return math.nan if images is None or name != "accuracy" else math.sqrt(accuracy * (1 - accuracy) / images)
