# ---
# jupyter:
#   jupytext:
#     cell_metadata_filter: tags,jupyter,-all
#     notebook_metadata_filter: kernelspec,-jupytext.text_representation.jupytext_version
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Ablations compared: which decision earned its place?
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/cnn-course/cnn-course/blob/main/notebooks/08_compare_ablations.ipynb) [![Open on Binder](https://mybinder.org/badge_logo.svg)](https://mybinder.org/v2/gh/cnn-course/cnn-course/main?labpath=notebooks/08_compare_ablations.ipynb)
#
# The lessons before this one each took one decision out of the network and measured what changed. Here all of it is on
# one page: every claim of the course on one scale, every experiment to look through, and the same for runs of your own.
# And one question that the other lessons had no room for: how many runs does it take to be sure?
#
# **After this lesson you can** read a paired difference and its interval; say how many runs a claim takes; find any
# experiment of the course, and look at your own in the same way.
#
# **You need** lesson 00; the others help. Reading takes about 15 minutes, running less than one.

# %% jupyter={"source_hidden": true}
# Find the course, so that `import utils` works in Jupyter, on Binder and on Colab. Running this twice does no harm.
import re
import subprocess
import sys
from importlib import metadata, util
from pathlib import Path

COURSE, REF = "https://github.com/cnn-course/cnn-course", "main"
here, colab = Path.cwd(), "google.colab" in sys.modules
root = next((p for p in [here, *here.parents] if (p / "utils" / "lessons.py").exists()), here / "cnn-course")
if colab and not root.exists():
    subprocess.run(["git", "clone", "--quiet", "--depth=1", f"--branch={REF}", COURSE, str(root)], check=True)
sys.path.insert(0, str(root))
if (spec := util.find_spec("utils")) is None or Path(spec.origin or "").parent != root / "utils":
    raise ImportError(f"`utils` is not the one in {root}: open the course's notebooks folder and restart the kernel.")
extra = "torch(?!m)|numpy" if colab else "ipycanvas"  # Colab keeps its own; elsewhere a lesson does without ipycanvas
wanted = re.findall(rf"(?m)^(?!jupyterlab|nbval|{extra})[\w-]+", (root / "requirements.txt").read_text())
missing = [name for name in wanted if not any(metadata.distributions(name=name))]
if missing and colab:
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *missing], check=True)
elif missing:
    raise ImportError(
        f"{sys.executable} lacks {', '.join(missing)}: run `pip install -r requirements.txt` (or `make lab`) in {root} "
        "and restart the kernel."
    )

# %% [markdown]
# Before you look:

# %%
from utils import exercises

exercises.quiz("08.largest")

# %% [markdown]
# ## The whole story
#
# Each line is a sentence that people say, and the difference that was measured: accuracy with the one decision, minus
# accuracy without (on validation images, or on training images where the claim is about training; the list below says
# which), both at their own best learning rate, over as many seeds as it says. The short upright mark is the
# *margin*, written down before the first run: the claim holds if the whole interval lies to the right of it. The
# verdicts are corrected for being so many (Holm's method), the intervals drawn are not: one that just clears its margin
# may still be inconclusive.

# %%
from utils import experiments, plots

plots.use_style()
claims = experiments.claims()
print(f"{len(claims)} claims: " + ", ".join(f"{n} {kind}" for kind, n in claims["verdict"].value_counts().items()))

# %%
plots.save(
    plots.claims(claims),
    "08_claims",
    "Forest plot of all claims, with intervals, margins and verdicts: most differences are near zero, a few far right",
)

# %% [markdown]
# (The axis is linear between −1 and 1 and logarithmic beyond, so that a tenth of a point can be seen beside the largest
# difference.) From most to least:

# %%
# NBVAL_CHECK_OUTPUT
ranked = claims.sort_values("difference", ascending=False)
for row in ranked.itertuples():
    print(f"{100 * row.difference:+7.2f}  {row.verdict:<13} {row.claim}{' [train]' * row.metric.startswith('train')}")
assert (claims["low"] <= claims["difference"]).all()
assert set(claims["verdict"]) <= set(plots.VERDICTS)
assert ranked.iloc[0]["experiment"].startswith("residual"), "the answer to the question above"

# %% [markdown]
# A few decisions carry the network: without them it trains badly or not at all. Of many others that people argue about
# these seeds cannot tell on which side of the margin they lie. (That is not to say that they are small: few intervals
# lie within half a point, as the summary counts.)
#
# ## Look for yourself
#
# All experiments of the course; yours follow below, and `python cnn.py compare` puts all on one page. Choose an
# experiment, a metric, and what to draw it against. Tick the variants to see. The table sorts by the column that you
# choose, and below it are the settings in which the first variant and the baseline differ.

# %%
import pandas as pd

from utils import compare, evidence

found = compare.studies()
compare.explore([study for study in found if not study.own], start="batchnorm")

# %% [markdown]
# Do not read the seconds as what a variant *costs*. They are as the clock ran, one variant after another, on a machine
# that had other work, too. How far apart are the fastest and the slowest run of one and the same variant?

# %%
# NBVAL_CHECK_OUTPUT
took = pd.concat([study.rows.assign(study=study.name) for study in found if not study.own])
took = took.groupby(["study", "variant", "seed"])["seconds"].max().groupby(["study", "variant"])
apart = took.max() / took.min()
print(f"the slowest run of a variant took × {apart.median():.2f} as long as its fastest, in the median;")
print(f"at most × {apart.max():.1f} ({', '.join(apart.idxmax())})")
assert apart.median() > 1.1

# %% [markdown]
# So a factor between two variants may be the hour at which they ran. What an operation costs has to be measured in turn,
# as `python cnn.py bench` does it and lesson 07 shows.

# %% [markdown]
# In the curves above, three things to find: an experiment in which a variant is ahead after one epoch and behind at the
# end; one whose best variant by training accuracy is not the best by validation accuracy; one in which the bands
# overlap, and the paired difference is clear all the same.

# %% jupyter={"outputs_hidden": true, "source_hidden": true} tags=["solution"]
# Solution: click the dots to unfold it
import itertools


def ahead(table, a, b):
    """Whether the interval of the paired differences a − b lies above zero."""
    both = table[[a, b]].dropna()
    return len(both) > 1 and evidence.paired(both[a].to_numpy(), both[b].to_numpy())["low"] > 0


def shows(study):
    """Which of the three things this experiment shows."""
    rows = study.rows[(study.rows["split"] == "validation") & (study.rows["metric"] == "accuracy")]
    begins = rows[rows["epoch"] == rows["epoch"].min()].pivot(index="seed", columns="variant", values="value")
    ends = compare.finals(study, "validation accuracy")
    mean, half = ends.mean(), plots.half_intervals(ends.T)
    pairs = [(a, b) for a, b in itertools.permutations(mean.index, 2) if ahead(ends, b, a)]
    turned = [(a, b) for a, b in pairs if ahead(begins, a, b)]
    clear = [(a, b) for a, b in pairs if mean[b] - half[b] < mean[a] + half[a]]
    return turned, compare.finals(study, "train accuracy").mean().idxmax() != mean.idxmax(), clear


# %% jupyter={"outputs_hidden": true, "source_hidden": true} tags=["solution"]
# Solution: click the dots to unfold it
shown = {study.name: shows(study) for study in found if not study.own}
three_things = (
    "clearly ahead at first, behind at the end",
    "another one is best in training",
    "bands overlap, clear all the same",
)
for thing, each in zip(three_things, zip(*shown.values(), strict=True), strict=True):
    print(f"{thing}: {', '.join(name for name, there in zip(shown, each, strict=True) if there)}")
    assert any(each)

# %% [markdown]
# ## How many seeds?
#
# One run says little. Trained twice with nothing changed but the seed, the same network gives two accuracies. How much
# do they scatter? This is the standard deviation of a run over the ten seeds (that of the difference of two runs is
# $\sqrt 2$ times as large), for every variant of the course with as many that gets more than 80 % right (those that
# fail to train scatter for other reasons):

# %%
# NBVAL_CHECK_OUTPUT
rows = []
for study in found:
    if not study.own:
        table = 100 * compare.finals(study, "validation accuracy")
        rows += [(study.name, name, len(table), table[name].mean(), table[name].std()) for name in table]
spread = pd.DataFrame(rows, columns=["experiment", "variant", "n", "mean", "std"]).query("n == 10 and mean > 80")
print(f"{len(spread)} variants above 80 %, ten seeds each")
print(f"standard deviation of a run: median {spread['std'].median():.2f} points, at most {spread['std'].max():.2f}")

# %% [markdown]
# The course compares *pairs*: both runs of a seed see the same images in the same order, and begin with the same weights
# where their shapes agree. With $s$ the standard deviation of the $n$ differences, and $t$ the 0.975 quantile of
# Student's distribution with $n - 1$ degrees of freedom, the 95 % interval of their mean $\bar d$ is
#
# $$\bar d \;\pm\; t_{0.975,\,n-1} \, \frac{s}{\sqrt n}$$
#
# In code, against the course's own, for batch norm:

# %%
from scipy import stats

runs = next(study for study in found if study.name == "batchnorm").rows
table = 100 * evidence.finals(runs, "validation accuracy")  # a row a seed
d = table["batch"] - table["none"]
half = stats.t.ppf(0.975, len(d) - 1) * d.std() / len(d) ** 0.5
known = evidence.compare(runs, "none").iloc[0]
assert abs(d.mean() - half - 100 * known["low"]) < 1e-9
assert abs(d.mean() + half - 100 * known["high"]) < 1e-9
print(f"batch norm − none: {d.mean():+.2f} ± {half:.2f} points, n = {len(d)}")

# %% [markdown]
# What is a pair good for? With standard deviations $s_1$ and $s_2$ of its two sides, and their correlation $r$,
#
# $$s^2 = s_1^2 + s_2^2 - 2\,r\,s_1 s_2$$
#
# So the more the two runs have in common, the less their difference varies. How much is it? For each claim, $r$, and
# $s^2$ as a share of $s_1^2 + s_2^2$, which is what runs with nothing in common would have:


# %%
def runs_of(row):
    """The rows of a claim's experiment."""
    return next(study for study in found if study.name == row.experiment).rows


def sides(row):
    """What a claim compares: a row a seed, a column with the decision and one without."""
    return evidence.finals(runs_of(row), row.metric)[[row.variant, row.baseline]]


def same_rate(row):
    """True if both sides of a claim are best at the same learning rate."""
    rates = runs_of(row).groupby("variant")["lr"].first()
    return rates[row.variant] == rates[row.baseline]


# %%
# NBVAL_CHECK_OUTPUT
pairs = claims[claims["correlation"].notna()]
shares = []
for row in pairs.itertuples():
    pair = sides(row)
    s1, s2 = pair.std()
    shares.append((pair[row.variant] - pair[row.baseline]).var() / (s1**2 + s2**2))
    assert abs(shares[-1] - (1 - 2 * row.correlation * s1 * s2 / (s1**2 + s2**2))) < 1e-9, "the formula"
pairs = pairs.assign(share=shares, same_rate=[same_rate(row) for row in pairs.itertuples()])
r, negative = pairs["correlation"], (pairs["correlation"] < 0).sum()
print(f"correlation of a pair: median {r.median():+.2f} over {len(r)} claims, negative in {negative}")
print(f"    same rate on both sides: median {r[pairs['same_rate']].median():+.2f}", end="; ")
print(f"another: {r[~pairs['same_rate']].median():+.2f}")
print(f"variance, of that without anything in common: median {pairs['share'].median():.0%}")
close = pairs[pairs["share"] < 0.5].sort_values("share")
for row in close.itertuples():
    print(f"    {row.variant} − {row.baseline}: r = {row.correlation:.2f}, variance {row.share:.0%}")
constant = claims[claims["correlation"].isna()]
print(f"left out, as all runs of one side got the same: {'; '.join(constant['experiment'])}")
assert abs(r.median()) < 0.2
assert r[pairs["same_rate"]].median() > r[~pairs["same_rate"]].median()
assert pairs["share"].median() > 0.8
assert {"label smoothing", "averaged weights"} == set(close["variant"][close["correlation"] > 0.8])
assert close["same_rate"].all()

# %%
import matplotlib.pyplot as plt

t = stats.t.ppf(0.975, 10 - 2)
chance = t / (10 - 2 + t**2) ** 0.5  # 95 % of the correlations of ten pairs with nothing in common are below it
of_ten = pairs[pairs["n"] == 10].groupby("same_rate")["correlation"]
outside = of_ten.agg(lambda column: f"{(column.abs() > chance).sum()} of {len(column)}")
print(f"beyond what chance explains, of claims with ten pairs: {outside[True]} at the same rate, ", end="")
print(f"{outside[False]} at another")
fig, ax = plt.subplots(figsize=(7.2, 2.2))
ax.axvspan(-chance, chance, color="0.92", lw=0)
ax.axvline(0, color=plots.GREY, lw=1)
for (same, n), part in pairs.sort_values("correlation").groupby(["same_rate", "n"]):
    heights = [same + 0.14 * (place % 3 - 1) for place in range(len(part))]  # apart, so that none hides another
    ax.plot(part["correlation"], heights, "o", ms=6, color=plots.BLUE, mfc=plots.BLUE if n == 10 else "white")
for row, height in zip(close.itertuples(), (1.4, 0.6, 1.75), strict=True):  # apart, above the dots and below them
    ax.text(row.correlation + 0.08, height, row.variant, ha="right", va="center", fontsize=9)
ax.set(xlim=(-1, 1.06), ylim=(-0.5, 2.0), yticks=[0, 1], xlabel="correlation of the two runs of a pair, a dot a claim")
ax.set_yticklabels(["another rate", "the same rate"])
plots.save(
    fig,
    "08_pairs",
    "Correlation of the two runs of a pair, a dot a claim: most where chance puts them, a few far right",
)
assert (r.abs() < chance).mean() > 0.8, "most"
assert outside[False].startswith("0 of")

# %% [markdown]
# (Grey: where 95 % of the dots would lie if ten pairs had nothing in common; of five, the hollow ones, it is wider.)
# Where the rates differ, the same seed hardly makes a pair. At the same rate it tends to, though ten pairs measure a
# correlation poorly. With label smoothing, and with averaged weights, where even the training is the same, it is near
# 1, and pairing saves most of the variance; so it does for a network without batch norm, with dropout and without.
# Pairing costs no run, but degrees of freedom: ten pairs with nothing in common have a longer interval than two groups
# of ten. It was chosen before the first run, so it stays; the interval is right either way, for these rates and these
# images. It covers neither the choice of the rates, which one to five other seeds made, nor that of the images
# (Bouthillier et al. 2021 measure what is left out).
#
# What would fewer seeds have said? Take the first $n$ of the ten, for every claim with ten, and judge by the interval
# alone. How often does the verdict change?


# %%
def verdict(low, high, margin):
    """The rule of the course for one claim alone."""
    return "supported" if low > margin else "refuted" if high < margin else "inconclusive"


def after(row, n):
    """The verdict on a claim after the first n of its seeds."""
    pair = sides(row).iloc[:n]
    result = evidence.paired(pair[row.variant].to_numpy(), pair[row.baseline].to_numpy(), row.margin)
    return verdict(result["low"], result["high"], row.margin)


# %%
ten = [row for row in claims.itertuples() if row.n == 10]
judged = pd.DataFrame({n: [after(row, n) for row in ten] for n in range(2, 11)})
counts = judged.apply(lambda column: column.value_counts()).reindex(plots.VERDICTS).fillna(0)
fig, ax = plt.subplots(figsize=(7.2, 2.9))
bottom = 0 * counts.loc["supported"]
for name, (shade, _) in plots.VERDICTS.items():
    drawn = ax.bar(counts.columns, counts.loc[name], bottom=bottom, color=shade, width=0.8)
    grey = name == "inconclusive"
    words = [f"{n:.0f}" if n > 1 else "" for n in counts.loc[name]]
    ax.bar_label(drawn, words, label_type="center", color="black" if grey else "white")
    shade, middle = plots.INK if grey else shade, bottom[10] + counts.loc[name, 10] / 2
    ax.text(10.6, middle, name, color=shade, va="center", fontweight="bold", fontsize=10)
    bottom = bottom + counts.loc[name]
ax.set(xlabel="seeds", ylabel=f"claims, of {len(ten)}", xticks=range(2, 11))
ax.set_title("judged by the interval alone, not corrected", loc="left", fontsize=10)
plots.save(
    fig,
    "08_seeds",
    "Stacked bars of verdicts against the number of seeds: with two most are inconclusive, with more a minority",
)

# %%
# NBVAL_CHECK_OUTPUT
open_ = (judged == "inconclusive").sum()
changed = judged.ne(judged[10], axis=0).sum()
taken_back = (judged[9] != "inconclusive") & (judged[10] == "inconclusive")
undone = taken_back.sum()
turned = sum(set(row) >= {"supported", "refuted"} for row in judged.to_numpy())
print(f"inconclusive: {open_[2]} of {len(ten)} claims after two seeds, {open_[9]} after nine, {open_[10]} after ten")
print(f"another verdict than after ten seeds: {changed[2]} after two, {changed[5]} after five, {changed[9]} after nine")
print(f"once called supported, and once refuted: {turned}")
print(f"decided after nine seeds, and open again after ten: {undone}")
steps = [row for row, back in zip(ten, taken_back, strict=True) if back and row.experiment == "ledger"]
print(f"    of these in lesson 06's ledger: {', '.join(row.variant for row in steps)}")
for row in steps:
    pair = sides(row)
    change = pair[row.variant] - pair[row.baseline]
    assert (change - change.median()).abs().idxmax() == change.index[-1], "the tenth is the odd one of each"
assert len(steps) > 1
assert open_[10] < open_[2]

# %% [markdown]
# With two seeds the interval is so wide that hardly anything can be decided; that is honest. Look at the last bar, too:
# the tenth seed opens verdicts again. Those of the ledger are several verdicts, but come from one seed, which falls
# behind in the rows with the higher of two rates (lesson 06: the likely reason, not a tested one), in rows that share
# their networks. So this is one example of how a late seed can undo a verdict, and no measure of how often.
#
# Whoever compares two *single* runs decides always: rightly where the difference is large, by the toss of a coin where
# it is small. How often is the sign of one pair's difference not that of the mean of the other nine? Over all claims,
# and over those whose sign ten seeds show (the same seeds, so the second number is rather too low):

# %%
# NBVAL_CHECK_OUTPUT
wrong = {}
for row in ten:
    pair = sides(row)
    difference = pair[row.variant] - pair[row.baseline]
    others = (difference.sum() - difference) / (len(difference) - 1)  # the mean without this pair
    wrong[row.claim] = (difference * others <= 0).mean()
wrong = pd.Series(wrong)
clear = wrong[[row.claim for row in ten if row.low > 0 or row.high < 0]]
print(f"single pairs that point the wrong way: {wrong.mean():.0%} on average over {len(wrong)} claims,")
print(f"{clear.mean():.0%} over the {len(clear)} whose interval keeps clear of zero")
print(f"the worst of these: {clear.max():.0%} ({clear.idxmax()})")

# %% [markdown]
# ## Your own runs
#
# What you train yourself appears beside the rest: runs of `python cnn.py train`, and everything that
# `ablation.run` has measured. Change the field or the values, and run the cells again.

# %%
import torch

from utils import ablation, device, train
from utils.model import CNNConfig

few, short = ablation.Source(images=1_280), train.Recipe(epochs=3, batch_size=64, lr=0.1, crop_padding=0, flip=False)
torch.set_num_threads(1)
vary = {"activation": ["silu", "relu"]}
seeds = range(device.budget(3, small=2))
mine = ablation.run("my activations", CNNConfig(width=8), vary, short, seeds=seeds, source=few, progress=False)
own = [study for study in compare.studies() if study.own]
assert "my activations" in [study.name for study in own]
compare.explore(own, start="my activations")

# %% [markdown]
# Without a notebook, one command writes all of this into a single HTML file that needs no network, to keep or to send:
#
#     python cnn.py compare --out compare.html

# %%
page = compare.page(compare.studies())
print(f"one page with all runs: {len(page) / 1e6:.1f} MB" if len(page) > 1e6 else f"one page: {len(page) / 1e3:.0f} kB")
asks = r"(?<![.\w])(?:src|href)\s*=|https?://(?!www\.w3\.org/2000/svg)"
assert not re.search(asks, compare.TEMPLATE.read_text(encoding="utf-8")), "it asks nothing of a network"

# %% [markdown]
# ## Your turn: judge a claim
#
# Here are the accuracies of two variants, in percent, a pair a seed. The margin is half a point. Compute the low and the
# high end of the 95 % interval of the paired difference (first − second), and the verdict: `"supported"`, `"refuted"` or
# `"inconclusive"`. Two decimals or more. (SciPy has the quantile: `scipy.stats.t.ppf`.)

# %%
first, second = exercises.PAIRS  # seven accuracies each
print("first ", *first)
print("second", *second)
answer = ...  # (low, high, verdict)
exercises.check("08.verdict", answer)
# exercises.hint("08.verdict")

# %% jupyter={"source_hidden": true} tags=["solution"]
# Solution: click the dots to unfold it
difference = pd.Series(first) - pd.Series(second)
half = stats.t.ppf(0.975, len(difference) - 1) * difference.std() / len(difference) ** 0.5
low, high = difference.mean() - half, difference.mean() + half
assert exercises.check("08.verdict", (low, high, verdict(low, high, 0.5)), quiet=True)

# %% [markdown]
# ## Your turn: plan an experiment
#
# The differences of pairs turn out to have a standard deviation of 0.4 points, however many there are. How many seeds
# does it take at least, so that half of the 95 % interval is no longer than 0.2 points? (The quantile $t$ depends on
# $n$, too.)

# %%
answer = ...  # a whole number
exercises.check("08.seeds", answer)
# exercises.hint("08.seeds")

# %% jupyter={"source_hidden": true} tags=["solution"]
# Solution: click the dots to unfold it
from itertools import count

seeds = next(n for n in count(2) if stats.t.ppf(0.975, n - 1) * 0.4 / n**0.5 <= 0.2)
assert exercises.check("08.seeds", seeds, quiet=True)

# %% [markdown]
# **Precise is not decided.** Say the true difference lies 0.2 points beyond the margin, with the same scatter. How often
# does the whole interval of ten pairs, as many as the course mostly has, lie beyond the margin, too? Student's $t$ with a
# mean that is not zero has a distribution of its own (*noncentral*):


# %%
def decided(n, beyond=0.2, s=0.4):
    """How often n pairs decide a claim whose true difference lies so far beyond its margin."""
    return stats.nct.sf(stats.t.ppf(0.975, n - 1), n - 1, beyond / s * n**0.5)


enough = min(n for n in range(2, 100) if decided(n) >= 0.8)
print(f"ten pairs: {decided(10):.0%} of the time; 80 % takes {enough} pairs, without a correction for other claims")
assert decided(10) < 0.5

# %% [markdown]
# ## Summary

# %%
from IPython.display import Markdown

kinds = claims["verdict"].value_counts()
large = claims[(claims["verdict"] == "supported") & (claims["low"] > 0.05)]
small = claims[claims["difference"].abs() < 0.005]
within = claims[(claims["low"] > -0.005) & (claims["high"] < 0.005)]
Markdown(f"""
- Of {len(claims)} sentences that people say, {kinds.get("supported", 0)} are supported by these runs,
  {kinds.get("refuted", 0)} refuted, {kinds.get("inconclusive", 0)} left open.
- Of {len(large)} differences the whole interval lies beyond five points:
  {"; ".join(f"*{claim}*" for claim in large["claim"])}.
- {len(small)} were measured below half a point, either way; of {len(within)} the whole interval lies there.
- Two runs of the same seed have little in common where their rates differ (median correlation over the claims
  {r[~pairs["same_rate"]].median():+.2f}), more where they are the same ({r[pairs["same_rate"]].median():+.2f}). Pairing
  saves most of the variance of {"; ".join(f"{row.variant} ({row.correlation:.2f})" for row in close.itertuples())}.
- By the interval alone, {undone} verdicts that nine seeds had given are open again after ten, {len(steps)} of them by
  one seed of lesson 06's ledger: an example of what a late seed can do, and no measure of how often.
- One run's accuracy varies by {spread["std"].median():.2f} points (the median standard deviation over ten seeds). A
  single pair of runs points the wrong way in {wrong.mean():.0%} of the cases over all claims, and in {clear.mean():.0%}
  over those whose sign ten seeds show.
- They hold for small networks, short runs, the rates that were chosen, and these images. Whether one holds for yours,
  you can measure: it is one entry in `utils/experiments.py`.
""")

# %% [markdown]
# **Sources.** Student 1908, [The probable error of a mean](https://doi.org/10.1093/biomet/6.1.1). Holm 1979, [A simple
# sequentially rejective multiple test procedure](https://www.jstor.org/stable/4615733). Bouthillier et al. 2021,
# [Accounting for variance in machine learning benchmarks](https://arxiv.org/abs/2103.03098). Picard 2021,
# [torch.manual_seed(3407) is all you need](https://arxiv.org/abs/2109.08203), on how much a seed changes. Meyes et al.
# 2019, [Ablation studies in artificial neural networks](https://arxiv.org/abs/1901.08644).
