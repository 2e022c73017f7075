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
# one page: every claim of the course on one scale, every run to look through, yours beside those that came with the
# course. And one question that the other lessons had no room for: how many runs does it take to be sure?
#
# **After this lesson you can** read a paired difference and its interval; say how many runs a claim takes; find any run
# of the course, and put your own beside it.
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
# accuracy without, both at their own best learning rate, over as many seeds as it says. The short upright mark is the
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
# (The axis is linear between −1 and 1 and logarithmic beyond, so that one point and forty fit into one picture.) From
# most to least:

# %%
# NBVAL_CHECK_OUTPUT
ranked = claims.sort_values("difference", ascending=False)
for row in ranked.itertuples():
    print(f"{100 * row.difference:+7.2f}  {row.verdict:<13} {row.claim}")
assert (claims["low"] <= claims["difference"]).all()
assert set(claims["verdict"]) <= set(plots.VERDICTS)
assert ranked.iloc[0]["experiment"].startswith("residual"), "the answer to the question above"

# %% [markdown]
# A few decisions carry the network: without them it trains badly or not at all. Many others that people argue about
# change less than the difference between one seed and the next.
#
# ## Look for yourself
#
# All runs of the course, and your own. Choose an experiment, a metric, and what to draw it against: an epoch costs some
# variants more seconds than others, so that the order can turn. Tick the variants to see. The table
# sorts by the column that you choose, and below it are the settings in which the first variant and the baseline differ.

# %%
from utils import compare

found = compare.studies()
compare.explore([study for study in found if not study.own], start="batchnorm")

# %% [markdown]
# Three things to find: an experiment in which a variant is ahead after one epoch and behind at the end; one whose best
# variant by training accuracy is not the best by validation accuracy; one in which the bands overlap, and the paired
# difference is clear all the same.
#
# ## How many seeds?
#
# One run says little. Trained twice with nothing changed but the seed, the same network gives two accuracies. How far
# apart? This is the standard deviation over the ten seeds, for every variant of the course with as many that gets more
# than 80 % right (those that fail to train scatter for other reasons):

# %%
# NBVAL_CHECK_OUTPUT
import pandas as pd

rows = []
for study in found:
    if not study.own:
        table = 100 * compare.finals(study, "validation accuracy")
        rows += [(study.name, name, len(table), table[name].mean(), table[name].std()) for name in table]
spread = pd.DataFrame(rows, columns=["experiment", "variant", "n", "mean", "std"]).query("n == 10 and mean > 80")
print(f"{len(spread)} variants above 80 %, ten seeds each")
print(f"standard deviation of a run: median {spread['std'].median():.2f} points, at most {spread['std'].max():.2f}")

# %% [markdown]
# A difference of two runs has twice the variance of one, unless the two have something in common. That is why the
# course compares *pairs*: both runs of a seed see the same images in the same order, and begin with the same weights
# where their shapes agree. With $s$ the standard deviation of the $n$ differences, and $t$ the 0.975 quantile of
# Student's distribution with $n - 1$ degrees of freedom, the 95 % interval of their mean $\bar d$ is
#
# $$\bar d \;\pm\; t_{0.975,\,n-1} \, \frac{s}{\sqrt n}$$
#
# In code, against the course's own, for batch norm:

# %%
from scipy import stats

from utils import evidence

runs = next(study for study in found if study.name == "batchnorm").rows
table = 100 * evidence.finals(runs, "validation accuracy")  # a row a seed
d = table["batch"] - table["none"]
half = stats.t.ppf(0.975, len(d) - 1) * d.std() / len(d) ** 0.5
known = evidence.compare(runs, "none").iloc[0]
assert abs(d.mean() - half - 100 * known["low"]) < 1e-9
assert abs(d.mean() + half - 100 * known["high"]) < 1e-9
print(f"batch norm − none: {d.mean():+.2f} ± {half:.2f} points, n = {len(d)}")

# %% [markdown]
# What would fewer seeds have said? Take the first $n$ of the ten, for every claim with ten, and judge by the interval
# alone. How often does the verdict change?


# %%
def verdict(low, high, margin):
    """The rule of the course for one claim alone."""
    return "supported" if low > margin else "refuted" if high < margin else "inconclusive"


def after(row, n):
    """The verdict on a claim after the first n of its seeds."""
    table = evidence.finals(next(study for study in found if study.name == row.experiment).rows, row.metric)
    pair = table.iloc[:n]
    result = evidence.paired(pair[row.variant].to_numpy(), pair[row.baseline].to_numpy(), row.margin)
    return verdict(result["low"], result["high"], row.margin)


# %%
import matplotlib.pyplot as plt

ten = [row for row in claims.itertuples() if row.n == 10]
judged = pd.DataFrame({n: [after(row, n) for row in ten] for n in range(2, 11)})
counts = judged.apply(lambda column: column.value_counts()).reindex(plots.VERDICTS).fillna(0)
fig, ax = plt.subplots(figsize=(7.2, 2.9))
bottom = 0 * counts.loc["supported"]
for name, (shade, _) in plots.VERDICTS.items():
    drawn = ax.bar(counts.columns, counts.loc[name], bottom=bottom, color=shade, width=0.8)
    ax.bar_label(drawn, [f"{n:.0f}" if n else "" for n in counts.loc[name]], label_type="center", color="white")
    ax.text(10.6, bottom[10] + counts.loc[name, 10] / 2, name, color=shade, va="center", fontweight="bold", fontsize=10)
    bottom = bottom + counts.loc[name]
ax.set(xlabel="seeds", ylabel=f"claims, of {len(ten)}", xticks=range(2, 11))
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
print(f"decided after nine seeds, and open again after ten: {undone}")
print(f"once called supported, and once refuted: {turned}")
assert open_[10] < open_[2]
assert {row.experiment for row, back in zip(ten, taken_back, strict=True) if back} == {"ledger"}, "that of lesson 06"

# %% [markdown]
# With two seeds the interval is so wide that hardly anything can be decided; that is honest. The last bar is a warning:
# the tenth seed takes verdicts back. (In lesson 06 you met it: the seed at which the higher of two rates did harm.)
# Whoever stops as soon as the interval looks good stops too early.
#
# Whoever compares two *single* runs decides always: rightly where the difference is large, by the toss of a coin where it
# is small. How often is the sign of one pair's difference not that of the mean of all ten? Over all claims, and over
# those whose sign ten seeds show:

# %%
# NBVAL_CHECK_OUTPUT
wrong = {}
for row in ten:
    table = evidence.finals(next(study for study in found if study.name == row.experiment).rows, row.metric)
    difference = table[row.variant] - table[row.baseline]
    wrong[row.claim] = (difference * difference.mean() <= 0).mean()
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
#     python cnn.py compare results/*.csv runs/* --out compare.html

# %%
page = compare.page(compare.studies())
print(f"one page with all runs: {len(page) / 1e6:.1f} MB" if len(page) > 1e6 else f"one page: {len(page) / 1e3:.0f} kB")
assert "http://" not in page.replace("http://www.w3.org/2000/svg", ""), "it asks nothing of a network"

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
# The differences of pairs have a standard deviation of 0.4 points. How many seeds does it take at least, so that half of
# the 95 % interval is no longer than 0.2 points? (The quantile $t$ depends on $n$, too.)

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
# ## Summary

# %%
from IPython.display import Markdown

kinds = claims["verdict"].value_counts()
large = claims[(claims["verdict"] == "supported") & (claims["difference"] > 0.05)]
small = claims[claims["difference"].abs() < 0.005]
within = claims[(claims["low"] > -0.005) & (claims["high"] < 0.005)]
Markdown(f"""
- Of {len(claims)} sentences that people say, {kinds.get("supported", 0)} are supported by these runs,
  {kinds.get("refuted", 0)} refuted, {kinds.get("inconclusive", 0)} left open.
- {len(large)} differences are larger than five points: {"; ".join(f"*{claim}*" for claim in large["claim"])}.
- {len(small)} were measured below half a point, either way; of {len(within)} the whole interval lies there.
- One run's accuracy varies by {spread["std"].median():.2f} points (the median standard deviation over ten seeds). A
  single pair of runs points the wrong way in {wrong.mean():.0%} of the cases over all claims, and in {clear.mean():.0%}
  over those whose sign ten seeds show.
- They hold for small networks, short runs and this data set. Whether one holds for yours, you can measure: it is one
  entry in `utils/experiments.py`.
""")

# %% [markdown]
# **Sources.** Student 1908, [The probable error of a mean](https://doi.org/10.1093/biomet/6.1.1). Holm 1979, [A simple
# sequentially rejective multiple test procedure](https://www.jstor.org/stable/4615733). Bouthillier et al. 2021,
# [Accounting for variance in machine learning benchmarks](https://arxiv.org/abs/2103.03098). Picard 2021,
# [torch.manual_seed(3407) is all you need](https://arxiv.org/abs/2109.08203), on how much a seed changes. Meyes et al.
# 2019, [Ablation studies in artificial neural networks](https://arxiv.org/abs/1901.08644).
