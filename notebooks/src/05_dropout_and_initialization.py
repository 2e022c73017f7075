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
# # Dropout and initialization: where does noise help, and how large should weights begin?
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/cnn-course/cnn-course/blob/main/notebooks/05_dropout_and_initialization.ipynb) [![Open on Binder](https://mybinder.org/badge_logo.svg)](https://mybinder.org/v2/gh/cnn-course/cnn-course/main?labpath=notebooks/05_dropout_and_initialization.ipynb)
#
# Two decisions about random numbers. The first are drawn anew at every training step: **dropout** sets values to zero
# by chance. "It only belongs before the last linear layer," say some; "it made a difference everywhere," say others.
# The second are drawn once, before anything else: the **initial weights**. "He initialization is the right one for
# ReLU." This lesson looks at both, measures both, and ends with all that the course has measured so far, in one figure.
#
# **After this lesson you can** say what dropout does to a value, a variance and an accuracy; derive the right gain
# for an activation, and check it; tell which start a network survives, and what batch norm changes about that.
#
# **You need** lessons 00 and 03; lesson 04 helps. Reading takes about 55 minutes, running about one.

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
# ## Dropout: one image, many masks
#
# In training, dropout multiplies every value $x$ by a random *mask* $m$: it is zero with probability $p$, the *rate*.
# What is kept is divided by $1 - p$, so that the mean of the result $\tilde x$ over all masks, $\mathbb{E}[\tilde x]$,
# stays what it was. In evaluation, nothing happens at all
# ([Srivastava et al. 2014](https://jmlr.org/papers/v15/srivastava14a.html)):
#
# $$\tilde x = \frac{m\,x}{1 - p} \qquad \Pr(m = 0) = p \qquad \Rightarrow \qquad \mathbb{E}[\tilde x] = x$$
#
# The course's network has a field for where it acts, `dropout_where`:
#
# | `dropout_where` | what is dropped |
# |---|---|
# | `head` | values, before the linear head only |
# | `everywhere` | values, between the two convolutions of each block, and before the head |
# | `channels` | whole maps, in each block, and values before the head |
#
# (Dropping whole maps is due to [Tompson et al. 2015](https://arxiv.org/abs/1411.4280). Drawing masks takes time:
# `python cnn.py bench dropout` measures how much.)
#
# To see it, we need a network that has learned something. A few seconds of training, with dropout everywhere:

# %%
from dataclasses import replace

import torch

from utils import data, device, plots, train
from utils.model import CNN, CNNConfig

plots.use_style()
torch.set_num_threads(1)  # of little use in so small a network; and one thread gives the same numbers every time
fashion = data.load("fashion-mnist", progress=False)
few = replace(fashion.take(3_000), validation=fashion.validation[:1000])
stats = data.channel_stats(few.train.images)
sight, truth = data.normalize(few.validation.images, stats), few.validation.labels  # float32 1000×1×28×28; 1000
rate = 0.3
torch.manual_seed(0)
net = CNN(CNNConfig(width=8, dropout=rate, dropout_where="everywhere"))
recipe = train.Recipe(epochs=5, batch_size=64, lr=0.3, crop_padding=0, flip=False)
history = train.fit(net, few, recipe, device="cpu", precision="fp32", progress=False)
print(f"{history.last('validation', 'accuracy'):.0%} of {len(truth):,} validation images right")

# %% [markdown]
# Now one image goes in, a sneaker. Here are six of the maps that arrive at the dropout of the first block, and what a
# mask of values and a mask of channels make of them. Red is dropped.

# %%
import matplotlib.pyplot as plt


def arriving(part, images):
    """What arrives at a part of the network in evaluation mode: N×C×H×W."""
    caught = []
    hook = part.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    with torch.no_grad():
        net.eval()(images)
    hook.remove()
    return caught[0]


sneaker = (truth == fashion.class_names.index("Sneaker")).nonzero()[0]
maps = arriving(net.layers[0][0].dropout, sight[sneaker])[0]  # C×H×W
torch.manual_seed(1)
by_value, by_channel = torch.rand(maps.shape) < rate, torch.rand(len(maps), 1, 1).expand_as(maps) < rate
masks = {"none": torch.zeros_like(by_value), "everywhere": by_value, "channels": by_channel}

# %%
shown = maps.var((1, 2)).topk(6).indices
fig, axes = plt.subplots(1, 3, figsize=(7.6, 1.9))
names = {"none": "in evaluation", "everywhere": "everywhere: values", "channels": "channels: whole maps"}
for ax, (where, mask) in zip(axes, masks.items(), strict=True):
    tiles = (maps / maps.amax((1, 2), keepdim=True).clamp(min=1e-9))[shown]
    colours = torch.tensor(plt.get_cmap("mako")(tiles.numpy()))[..., :3]  # 6×H×W×3
    colours[mask[shown]] = torch.tensor(plt.get_cmap("Reds")(0.75)[:3], dtype=colours.dtype)
    framed = torch.nn.functional.pad(colours, (0, 0, 1, 1, 1, 1), value=1.0)  # 6×(H+2)×(W+2)×3
    picture = torch.cat([torch.cat(list(row), dim=1) for row in framed.view(2, 3, *framed.shape[1:])])
    ax.imshow(picture.numpy())
    ax.set(xticks=[], yticks=[])
    ax.set_title(names[where], color=plots.color(where), fontweight="bold")
    ax.spines[:].set_visible(False)
plots.save(
    fig, "05_masks", "Maps of one image: as they are; values dropped, the shape still shows; two whole maps gone"
)
assert abs(by_value.float().mean() - rate) < 0.05

# %% [markdown]
# Why whole maps? Neighbours in a map resemble each other, and so a part of what is dropped in one place can still be
# read off the place beside it. How much they resemble each other, once each map's mean is taken out (values of one map
# are alike anyway, when the map as a whole is bright):

# %%
many = arriving(net.layers[0][0].dropout, sight[:200])  # 200×C×H×W
many = many - many.mean((2, 3), keepdim=True)
beside, below = (many[..., :-1], many[..., 1:]), (many[..., :-1, :], many[..., 1:, :])
alike = [torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item() for a, b in (beside, below)]
print(f"correlation of neighbours in a map: {alike[0]:.2f} side by side, {alike[1]:.2f} one above the other")
assert min(alike) > 0.1

# %% [markdown]
# ### One unit, 200 masks
#
# A unit of the next convolution adds up what is left, $y = \sum_i w_i \tilde x_i$, with its weights $w_i$. With every
# mask it says something else. Its mean is what it says in evaluation, and its variance can be calculated, for masks of
# values $i$ and for masks of whole channels $c$ (the mask's own variance is $p(1-p)$, divided by $(1-p)^2$):
#
# $$\operatorname{Var}[y] = \frac{p}{1 - p} \sum_i w_i^2 x_i^2$$
#
# $$\operatorname{Var}[y] = \frac{p}{1 - p} \sum_c \Big(\sum_{i \in c} w_i x_i\Big)^2$$

# %%
patch = maps[:, 5:8, 5:8].double()  # the C×3×3 values that a unit in the middle of the map sees
weights = net.layers[0][0].conv2.weight[shown[1]].detach().double()
products = (weights * patch).flatten(1)  # C×9
in_evaluation = products.sum().item()


def outputs(p, masks, channels=False, seed=0):
    """What the unit says under so many masks: of its C×9 inputs each, or of its C channels."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(masks, len(products), 1 if channels else 9, generator=generator) >= p
    return (products * kept / (1 - p)).sum((1, 2))


def predicted_std(p, channels=False):
    """The same unit's standard deviation, calculated."""
    terms = products.sum(1) if channels else products
    return (p / (1 - p) * (terms**2).sum()).sqrt().item()


# %%
# NBVAL_CHECK_OUTPUT
for p in (0.1, 0.5):
    for channels in (False, True):
        said = outputs(p, 50_000, channels)
        assert abs(said.mean() - in_evaluation) < 0.03 * predicted_std(p, channels)
        assert abs(said.std() / predicted_std(p, channels) - 1) < 0.03
print("mean and standard deviation over 50,000 masks are those of the formulas, to 3 %")

# %%
def histograms(p):
    widest = 2.5 * predicted_std(p, channels=True)
    fig, axes = plt.subplots(1, 2, figsize=(7.4, 3.0), sharey=True)
    for ax, where in zip(axes, ("everywhere", "channels"), strict=True):
        said, std = outputs(p, 200, where == "channels"), predicted_std(p, where == "channels")
        ax.hist(said, 40, range=(in_evaluation - widest, in_evaluation + widest), color=plots.color(where))
        ax.axvline(in_evaluation, color=plots.INK, ls="--")
        ax.plot(said.mean(), -1.5, "^", color=plots.INK, ms=7, clip_on=False)
        ax.plot(in_evaluation + torch.tensor([-std, std]), [0, 0], color=plots.INK, lw=5, solid_capstyle="butt")
        ax.set(xlabel="output of the unit", xlim=(in_evaluation - widest, in_evaluation + widest))
        ax.set_title(f"{names[where]}\nstd {std:.2f} by the formula", color=plots.color(where))
    axes[0].set_ylabel("of 200 masks")
    dashed = f"dashed: in evaluation ({in_evaluation:.2f})"
    fig.suptitle(f"rate {p:g}; {dashed}; triangle: mean; bar: ± one standard deviation", fontsize=11)
    return fig


plots.save(
    histograms(0.3),
    "05_unit",
    "Two histograms of one unit's output under random masks: wider with whole maps dropped than with single values",
)
assert predicted_std(0.3, channels=True) > predicted_std(0.3)

# %% [markdown]
# Move the rate (the axis goes along). Does the middle move? At which rate is the standard deviation as large as the
# mean (in absolute value): of values dropped, and of whole maps?

# %%
tried = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9)
plots.explore(histograms, "rate", {f"{p:g}": p for p in tried}, start="0.1")

# %% jupyter={"outputs_hidden": true, "source_hidden": true} tags=["solution"]
# Solution: click the dots to unfold it
for channels, what in enumerate(("values", "whole maps")):
    odds = in_evaluation**2 / predicted_std(0.5, channels) ** 2  # p / (1 − p) at which both are equal; at 0.5 it is 1
    print(f"{what}: the middle stays; the standard deviation is as large as the mean at {odds / (1 + odds):.2f}")

# %% [markdown]
# ## Where does it help?
#
# Dropout is meant against **overfitting**: a network that can rely on no single value must spread what it knows. So the
# first measurement gives it every chance. 3,000 images, 16 times over, are so few that the network learns them by heart.
# A rate of 0.2; none, before the head, everywhere, of channels; with and without batch norm; each variant at its own best
# learning rate (chosen with two seeds), ten other seeds, compared in pairs. What would you say? Note it down: which of
# the three helps, by how many points of validation accuracy?

# %%
from utils import ablation, evidence, experiments

RECOMPUTE = False
read = experiments.measure if RECOMPUTE else experiments.load
dropped = read("dropout")
fig = plots.experiment(dropped.runs[dropped.runs["epoch"] >= 6])  # before, the lines only climb
for ax in fig.axes[::2]:
    ax.set_xlim(left=5.8)
plots.save(
    fig,
    "05_dropout",
    "Curves and paired differences, few images: small gains, clear for all with batch norm, else for channels only",
)

# %% [markdown]
# And the gap between the images that it has trained on and those that it has not?


# %%
places = ("none", "head", "everywhere", "channels")


def draw_gap(ax, runs):
    """Training and validation accuracy, and what lies between them, a row for each place of the dropout."""
    ends = {split: 100 * evidence.finals(runs, f"{split} accuracy") for split in ("train", "validation")}
    there = [where for where in places if where in ends["train"]]
    for row, where in enumerate(there):
        for split, table in ends.items():
            half = plots.half_intervals(table[[where]].T).iloc[0]
            label = split if row == 0 else None
            ax.errorbar(table[where].mean(), row, xerr=half, fmt="o", color=plots.color(split), capsize=3, label=label)
        low, high = sorted(table[where].mean() for table in ends.values())
        ax.plot([low, high], [row, row], color=plots.GREY, lw=1.5, zorder=0)
        gap = ends["train"][where].mean() - ends["validation"][where].mean()
        ax.text((low + high) / 2, row - 0.16, f"gap {gap:.1f}", ha="center", fontsize=10)
    ax.set(yticks=range(len(there)), yticklabels=there, ylim=(len(there) - 0.6, -0.7), xlabel="accuracy (%)")


# %%
fig, axes = plt.subplots(1, 2, figsize=(7.6, 3.0), sharex=True)
for ax, norm in zip(axes, ("batch norm", "no norm"), strict=True):
    runs = ablation.facet(dropped.runs, norm)
    draw_gap(ax, runs)
    ax.set_title(f"{norm}, n = {runs['seed'].nunique()} seeds", loc="left")
axes[1].set_yticklabels([])
axes[1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
plots.save(
    fig,
    "05_gap",
    "Training and validation accuracy on few images, two panels by norm: dropout in the blocks narrows the gap",
)


# %%
# NBVAL_CHECK_OUTPUT
from utils.evidence import points

for norm in ("batch norm", "no norm"):
    runs = ablation.facet(dropped.runs, norm)
    gaps = 100 * (evidence.finals(runs, "train accuracy") - evidence.finals(runs, "validation accuracy"))
    for where in gaps.columns.drop("none"):
        change = evidence.paired(gaps[where].to_numpy(), gaps["none"].to_numpy())
        print(f"{norm}, {where}: the gap changes by {points(change)}")

# %% [markdown]
# A word of caution. The training accuracy is counted during training, **with** the masks. So where a gap is smaller, a
# part of that is no merit: the network answers training images with a handicap, and validation images without. How
# large is it? The network above as it is at the end, and its 3,000 training images, with and without masks. (Its rate
# is higher than the figure's, and its training shorter: a sign that there is a handicap, not how large the figure's is.)

# %%
from torch import nn


@torch.no_grad()
def with_masks(images, times):
    """The network's probabilities under so many masks; batch norm stays in evaluation mode: times×N×10."""
    net.eval()
    for layer in net.modules():
        if isinstance(layer, nn.Dropout):  # the course's Dropout is one
            layer.train()
    answers = torch.stack([net(images).softmax(1) for _ in range(times)])
    net.eval()
    return answers


torch.manual_seed(0)
parts = data.normalize(few.train.images, stats).split(500)
masked = (torch.cat([with_masks(part, 1)[0] for part in parts]).argmax(1) == few.train.labels).double().mean()
plain = train.evaluate(net, few.train, stats, device="cpu", precision="fp32")["accuracy"]
print(f"training images right: {masked:.1%} with masks, {plain:.1%} without (one network)")
assert plain > masked + 0.005

# %% [markdown]
# Each variant also has its own learning rate, and the rate by itself changes the gap: without batch norm a low one
# narrows it, with batch norm a very high one. In the sweep that chose the rates (two seeds a rate; one run that did not
# train is left out):

# %%
# NBVAL_CHECK_OUTPUT
assert len(dropped.about["tuning_seeds"]) == 2
gap_at, untrained = {}, 0
for variant in ("none, no norm", "head, no norm", "none, batch norm", "head, batch norm"):
    swept, used = dropped.sweep[dropped.sweep["variant"] == variant], dropped.about["best_lr"][variant]
    gap_at[variant] = {}
    for lr in sorted(swept["lr"].unique()):
        of_lr = swept[swept["lr"] == lr]
        right = evidence.finals(of_lr, "validation accuracy")[variant]
        gap = (evidence.finals(of_lr, "train accuracy")[variant] - right)[right > 0.2]
        untrained += (right <= 0.2).sum()
        gap_at[variant][lr] = 100 * gap.mean()
    found = [f"{gap:.1f} at {lr:g}{' (used)' if lr == used else ''}" for lr, gap in gap_at[variant].items()]
    print(f"{variant:<17} gap " + ", ".join(found))
    lowest, *others, highest = gap_at[variant].values()
    assert min(highest, *others) > lowest + 2 if "no norm" in variant else min(lowest, *others) > highest + 2
assert untrained == 1
assert gap_at["head, no norm"][dropped.about["best_lr"]["head, no norm"]] < max(gap_at["head, no norm"].values()) - 2

# %% [markdown]
# That is why the verdicts on dropout look at validation images only. They follow the rule that was set before the runs,
# and are corrected for all claims of the course. *Inconclusive* means: the seeds cannot tell on which side of the
# margin the difference lies.

# %%
# NBVAL_CHECK_OUTPUT
claims = experiments.claims()

print(experiments.in_words(claims, "dropout"))

# %% [markdown]
# ### How much of it?
#
# The same with rates of 0.1 and 0.5, but with five seeds, and a single one to choose each learning rate:

# %%
def at_edge(name):
    """The variants of an experiment with the best learning rate at the edge of those tried; no claim rests on them."""
    tried = read(name).sweep.groupby("variant")["lr"].agg(["min", "max"])
    found = {variant for variant, lr in read(name).about["best_lr"].items() if lr in tried.loc[variant].to_list()}
    rows = claims[claims["experiment"] == name]
    assert found.isdisjoint({*rows["variant"], *rows["baseline"]})
    return found


at_rate, edges = {}, {}
for norm, name in {"batch norm": "dropout_rate", "no norm": "dropout_rate_no_norm"}.items():
    rates = read(name)
    assert [len(rates.about[which]) for which in ("seeds", "tuning_seeds")] == [5, 1]
    at_rate[norm] = {0.1: ablation.facet(rates.runs, "rate 0.1"), 0.2: ablation.facet(dropped.runs, norm)}
    at_rate[norm][0.5] = ablation.facet(rates.runs, "rate 0.5")
    edges[norm] = {(where, p) for where in places[1:] for p in (0.1, 0.5) if f"{where}, rate {p}" in at_edge(name)}
assert edges["batch norm"]
assert not at_edge("dropout"), "none of the rate 0.2 is hollow"


# %%
def draw_rates(ax, runs_at, hollow):
    """Validation accuracy against the dropout rate, a line a place: mean and 95 % interval; grey: no dropout."""
    tables = {p: 100 * evidence.finals(runs, "validation accuracy") for p, runs in runs_at.items()}
    none, ends = tables[0.2]["none"], {}
    for shift, where in zip((-0.006, 0, 0.006), places[1:], strict=True):
        means = [tables[p][where].mean() for p in tables]
        halves = [plots.half_intervals(tables[p][[where]].T).iloc[0] for p in tables]
        ax.errorbar([p + shift for p in tables], means, yerr=halves, fmt="o-", color=plots.color(where), capsize=4)
        for p, mean in zip(tables, means, strict=True):
            if (where, p) in hollow:
                ax.plot(p + shift, mean, "o", color=plots.color(where), mfc="white", ms=5, zorder=3)
        ends[where] = means[-1]
    half = plots.half_intervals(none.to_frame().T).iloc[0]
    ax.axhspan(none.mean() - half, none.mean() + half, color=plots.color("none"), alpha=0.25, lw=0)
    ends["none"] = none.mean()
    for where, height in plots.spread(ends, ax).items():
        ax.text(0.53, height, where, color=plots.color(where), fontweight="bold", va="center", fontsize=10)
    ax.set(xlabel="dropout rate", xticks=list(tables), xlim=(0.08, 0.52))
    return ", ".join(f"{len(tables[p])} at {p}" for p in tables)


# %%
fig, axes = plt.subplots(1, 2, figsize=(7.6, 3.4))
for ax, norm in zip(axes, at_rate, strict=True):
    counts = draw_rates(ax, at_rate[norm], edges[norm])
    ax.set_title(norm, loc="left")
axes[0].set_ylabel("validation accuracy (%)")
counts += f"; none: {dropped.runs['seed'].nunique()}\nhollow: best learning rate at the edge of those tried"
fig.suptitle(f"mean and 95 % intervals; n = {counts}", fontsize=11)
plots.save(
    fig,
    "05_rates",
    "Accuracy against dropout rate, by norm: without one, the highest in the blocks harms; the head's stays level",
)

# %%
# NBVAL_CHECK_OUTPUT
print(experiments.in_words(claims, "dropout_rate", "dropout_rate_no_norm"))

# %% [markdown]
# With a learning rate beyond those tried, the hollow points might lie higher; no claim rests on them. Half of all
# values in each block is too much for a network without batch norm. Before the head, where it costs one layer its
# inputs, even that does no harm that five seeds could show.

# %%
# NBVAL_CHECK_OUTPUT
half = 100 * evidence.finals(at_rate["no norm"][0.5], "validation accuracy")
without = 100 * evidence.finals(at_rate["no norm"][0.2], "validation accuracy")["none"][half.index]
for where in half:
    change = evidence.paired(half[where].to_numpy(), without.to_numpy())
    print(f"no norm, {where}: half of it dropped against nothing {points(change)}")
    assert (change["high"] < 0) == (where != "head")

# %% [markdown]
# ### With all images
#
# And when images are many? The same network sees all training images, each of them once, with a rate of 0.2 (again a
# single seed chose each learning rate). Then there is little to overfit, and a value that is dropped is a value that was
# not learned from. (The training accuracy is counted while the network still learns; after a single epoch the gap may
# well be negative.)

# %%
def draw_differences(ax, runs, baseline, name, norm):
    """Paired differences in an experiment, hollow where the best learning rate is at the edge of those tried."""
    rows = evidence.compare(runs, baseline).drop(columns="verdict")
    shades = plots.colors_of(rows["variant"])
    plots.draw_forest(ax, rows, shades, 0.0)
    for place, row in enumerate(rows.itertuples()):
        if f"{row.variant}, {norm}" in at_edge(name):
            ax.plot(100 * row.difference, place, "o", color=shades[row.variant], mfc="white", ms=7)
            ax.set_xlabel("difference, points; hollow: best\nlearning rate at the edge of those tried")


# %%
assert len(read("dropout_full").about["tuning_seeds"]) == 1
full = {norm: ablation.facet(read("dropout_full").runs, norm) for norm in ("batch norm", "no norm")}
fig, axes = plt.subplots(2, 2, figsize=(7.6, 6.4))
for (norm, runs), (left, right) in zip(full.items(), axes, strict=True):
    draw_gap(left, runs)
    left.set_title(norm, loc="left")
    draw_differences(right, runs, "none", "dropout_full", norm)
axes[0, 0].legend(loc="upper right", bbox_to_anchor=(1.02, 1.2), ncols=2)
plots.save(
    fig,
    "05_full",
    "Accuracies and paired differences, all images: validation above training, dropout behind none or level with it",
)

# %%
# NBVAL_CHECK_OUTPUT
print(experiments.in_words(claims, "dropout_full"))
for runs in full.values():
    against = evidence.compare(runs, "none").set_index("variant")
    assert (against.loc[["everywhere", "channels"], "high"] < 0).all()
assert at_edge("dropout_full") == {"channels, no norm"}

# %% [markdown]
# Where there is nothing to overfit, dropout in the blocks costs accuracy, with batch norm and without. (Of channels
# without a norm, hollow, the highest learning rate that was tried did best: with a higher one they might cost less.)
#
# ## Dropout and batch norm disagree

# %%
from utils import exercises

exercises.quiz("05.shift")

# %% [markdown]
# Batch normalization stores the variance that it sees in training, with the masks' noise in it, and divides by it in
# evaluation, when there is no noise. For a unit $y = \sum_i w_i \tilde x_i$ of the layer between the two, the
# calculation above says by how much it is too large ($\mathbb{E}$ is the mean over images and places):
#
# $$\underbrace{\operatorname{Var}[y]}_{\text{in training}} = \underbrace{\operatorname{Var}[y]}_{\text{in evaluation}}
# + \frac{p}{1-p} \sum_i w_i^2\, \mathbb{E}[x_i^2]$$
#
# [X. Li et al. (2018)](https://arxiv.org/abs/1801.05134) call it the *variance shift*. Check it, channel by channel, on
# a block of the network above: calculated from what passes without masks, and measured with them.

# %%
import torch.nn.functional as F

block = net.layers[1][0]
conv = block.conv2
with torch.no_grad():
    x = arriving(block.dropout, sight[:500]).double()  # N×C×H×W
    weight = conv.weight.double()  # C×C×3×3
    quiet = F.conv2d(x, weight, padding=1).var((0, 2, 3))  # C
    noise = rate / (1 - rate) * F.conv2d(x**2, weight**2, padding=1).mean((0, 2, 3))  # C
    torch.manual_seed(0)
    measured = F.conv2d(F.dropout(x, rate), weight, padding=1).var((0, 2, 3))
errors = ((quiet + noise) / measured - 1).abs()
print(f"{len(measured)} channels: calculated and measured agree to {errors.max():.1%}")
print(f"in evaluation the variance is {(quiet / measured).min():.2f} to {(quiet / measured).max():.2f} times as large")
assert errors.max() < 0.05
assert (quiet < measured).all()

# %% [markdown]
# Does it matter where the dropout stands? In the course's blocks it stands **before** the second convolution and its
# norm. Moved **behind** a block's last norm, the next norm is one addition, one ReLU and one convolution further away.
# No change of the course's network is needed for that: the last norm gets a dropout behind it.
#
# A few small networks of each kind, with a rate of one half. Of each batch norm: the variance that arrives in
# evaluation, as a multiple of the stored one.

# %%
from utils import kernels

kinds = {"none": plots.color("none"), "before the norm": plots.color("everywhere"), "behind it": plots.VERMILION}
brief = replace(few.take(1_000), validation=few.validation[:100])
half_rate = 0.5


def build(kind, seed):
    torch.manual_seed(seed)
    where = {"dropout": half_rate, "dropout_where": "everywhere"} if kind == "before the norm" else {}
    network = CNN(CNNConfig(width=8, **where))
    if kind == "behind it":
        for block in (block for layer in network.layers for block in layer):
            block.norm2 = nn.Sequential(block.norm2, kernels.Dropout(half_rate))
        network.dropout = kernels.Dropout(half_rate)  # before the head, as in the other kind
    return network


# %%
networks, seeds = {}, range(device.budget(5, small=2))
for kind in kinds:
    for seed in seeds:
        networks[kind, seed] = build(kind, seed)
        short = replace(recipe, epochs=4, seed=seed)
        train.fit(networks[kind, seed], brief, short, device="cpu", precision="fp32", progress=False)
print(f"{len(networks)} networks, {len(seeds)} of each kind")

# %%
import numpy as np


@torch.no_grad()
def shift_of(network, images):
    """For each batch norm the variance that arrives in evaluation, divided by the stored one: mean over channels."""
    found, hooks = [], []

    def note(norm, inputs):
        ratios = inputs[0].var((0, 2, 3)) / norm.running_var  # C
        found.append(ratios.log().mean().exp().item())  # their geometric mean

    for name, norm in network.named_modules():
        if isinstance(norm, nn.BatchNorm2d) and "shortcut" not in name:  # those on the main path, in its order
            hooks.append(norm.register_forward_pre_hook(note))
    network.eval()(images)
    for hook in hooks:
        hook.remove()
    return found


seen = data.normalize(brief.train.images, stats)
shifts = {kind: np.array([shift_of(networks[kind, seed], seen) for seed in seeds]) for kind in kinds}  # nets×norms

# %%
import pandas as pd

fig, ax = plt.subplots(figsize=(7.8, 3.2))
labels = ["stem", *(f"{layer}\n{half}" for layer in range(1, 5) for half in ("first", "second"))]
for kind, shade in kinds.items():
    mean, half = shifts[kind].mean(0), plots.half_intervals(pd.DataFrame(shifts[kind]).T)
    ax.errorbar(range(9), mean, yerr=half, fmt="o-", color=shade, capsize=4, lw=1.5, label=kind)
ax.axhline(1, color=plots.GREY, ls="--", lw=1)
ax.set_xticks(range(9), labels)
ax.set(xlabel="layer, and which of its norms", ylabel="variance in evaluation /\nstored variance", ylim=(0.5, 1.15))
ax.legend(title="dropout", loc="center left", bbox_to_anchor=(1, 0.5), alignment="left")
ax.set_title(f"mean of n = {len(seeds)} networks, 95 % intervals, rate {half_rate}", loc="left")
plots.save(
    fig,
    "05_shift",
    "Variance in evaluation over stored, norm by norm: near one without dropout, lowest at norms right behind it",
)
second, later = slice(2, None, 2), slice(3, None, 2)  # each block's second norm, and the first one from layer 2 on
assert shifts["before the norm"][:, second].mean() < 0.85
assert shifts["behind it"][:, later].mean() < 0.95 < shifts["before the norm"][:, later].mean()
assert shifts["behind it"][:, -2].mean() < shifts["behind it"][:, 3].mean(), "it piles up, from layer to layer"
assert abs(shifts["none"].mean() - 1) < 0.08

# %% [markdown]
# Directly behind a block's dropout the shift is plain to see, and one norm later it is gone. With the dropout behind the
# norm it is spread over the norms that follow, and piles up along the network. Without dropout there is next to none.
#
# And what does it **cost**? There is a remedy that needs no training: compute the running statistics once more, over
# the training images, with dropout off. What it gives back is what the shift took, and what else these statistics do: so
# compare it with what they do to networks without dropout.

# %%
from copy import deepcopy


@torch.no_grad()
def right_share(network):
    """Percent of the validation images that are right, in evaluation."""
    return 100 * (network.eval()(sight).argmax(1) == truth).float().mean().item()


@torch.no_grad()
def renewed(network, images):
    """A copy whose batch norms have the statistics of these images without dropout; the weights stay."""
    network = deepcopy(network).eval()
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.reset_running_stats()
            layer.momentum = None  # the plain average of all batches
            layer.train()
    for part in images.split(400):
        network(part)
    return network.eval()


# %%
gains_of, given_back = {}, {}
for kind in kinds:
    before = np.array([right_share(networks[kind, seed]) for seed in seeds])
    gains_of[kind] = np.array([right_share(renewed(networks[kind, seed], seen)) for seed in seeds]) - before
    given_back[kind] = evidence.paired(gains_of[kind], 0 * before)
more_than_none = {kind: evidence.paired(gains_of[kind], gains_of["none"]) for kind in kinds if kind != "none"}

# %%
for kind, row in given_back.items():
    print(f"dropout {kind:<16} new statistics give back {points(row)}")
for kind, row in more_than_none.items():
    print(f"dropout {kind:<16} more than without dropout: {points(row)}")
assert all(row["low"] < 0.5 for row in more_than_none.values()), "no cost of half a point is shown"
assert all(abs(row["difference"]) < 3 for row in given_back.values()), "a few points at most"

# %% [markdown]
# So the disagreement is real, and it can be calculated. That it **costs** anything, beyond what new statistics do
# without dropout, these few networks do not show. Nor do they show that it costs nothing, where an interval reaches
# beyond half a point, which would matter here. X. Li et al. found it costly in deep networks on CIFAR. Their advice, to
# put dropout behind the last batch norm only, is what `dropout_where="head"` does.
#
# ## Does the network know what it does not know?
#
# Leave the masks on in evaluation and ask the same question 200 times: each mask is another network, and where they
# disagree, the answer is uncertain. [Gal & Ghahramani (2016)](https://arxiv.org/abs/1506.02142) show that this is an
# approximation of what a Bayesian would compute (*Monte-Carlo dropout*). With $p_t$ the answer (the probabilities)
# under mask $t$ of $T$, $\bar p$ the mean of these answers, and $H$ the entropy, the disagreement estimates the
# mutual information of answer and weights ([Houlsby et al. 2011](https://arxiv.org/abs/1112.5745); with masks [Gal,
# Islam & Ghahramani 2017](https://arxiv.org/abs/1703.02910)):
#
# $$\underbrace{H(\bar p)}_{\text{uncertainty in all}} -
# \underbrace{\textstyle\frac1T \sum_t H(p_t)}_{\text{of each network by itself}}$$

# %%
def entropy(p):
    return -(p * p.clamp_min(1e-12).log()).sum(-1)


torch.manual_seed(0)
answers = with_masks(sight, 20)  # 20×1000×10
disagreement = entropy(answers.mean(0)) - entropy(answers).mean(0)  # 1000
assert (disagreement > -1e-5).all(), "entropy is concave: never below zero"

# %% [markdown]
# Two images on which the masks agree, and two on which they do not. A dot is the answer of one mask.

# %%
order = disagreement.argsort()
clear = [order[0], next(image for image in order if truth[image] != truth[order[0]])]  # of two classes
four = torch.stack([*clear, order[-1], order[-2]])
torch.manual_seed(0)
asked = with_masks(sight[four], 200)  # 200×4×10
fig, axes = plt.subplots(2, 4, figsize=(7.8, 4.0), height_ratios=(1.5, 1))
for column, image in enumerate(four):
    top = asked[:, column].mean(0).topk(3).indices
    plots.show_image(axes[0, column], few.validation.images[image])
    axes[0, column].set_title(f"{'masks agree' if column < 2 else 'masks disagree'}\n({disagreement[image]:.2f} nats)")
    for row, label in enumerate(top):
        height = row + 0.3 * (torch.rand(200) - 0.5)
        shade = plots.BLUE if label == truth[image] else plots.GREY
        axes[1, column].plot(asked[:, column, label], height, ".", ms=3, color=shade, alpha=0.5)
    axes[1, column].set_yticks(range(3), [fashion.class_names[label] for label in top], rotation=0)
    axes[1, column].set(xlim=(-0.05, 1.05), ylim=(2.5, -0.5), xlabel="probability", xticks=(0, 1))
fig.suptitle("200 masks each; blue: the true class", fontsize=11)
plots.save(
    fig,
    "05_uncertainty",
    "Four images and their class probabilities under many masks: for two all masks agree, for two they scatter",
)
assert asked[:, 2:].std(0).max() > 3 * asked[:, :2].std(0).max()

# %% [markdown]
# A measure of uncertainty is good when the network is right where it is certain. So sort 1,000 images, the most certain
# first, and ask how many of the first 10 %, 20 %, … are right. There is a cheap rival that needs one pass and no masks:
# the probability that the network gives to its answer anyway. The mean answer of the masks has such a probability, too.

# %%
with torch.no_grad():
    once = net(sight).softmax(1)
measures = {
    "disagreement of 20 masks": (disagreement, answers.mean(0), plots.color("everywhere")),
    "probability, 20 masks": (1 - answers.mean(0).amax(1), answers.mean(0), plots.VERMILION),
    "probability, one pass": (1 - once.amax(1), once, plots.color("none")),
}
shares, curves = np.arange(100, 1001, 50), {}
fig, ax = plt.subplots()
for name, (doubt, p, shade) in measures.items():
    right = (p.argmax(1) == truth)[doubt.argsort()].double()
    curves[name] = 100 * np.array([right[:count].mean() for count in shares])
    ax.plot(shares / 10, curves[name], "o-", ms=3, color=shade, label=name)
ax.set(xlabel="share of the images that are answered, the most certain first (%)", ylabel="right (%)")
ax.legend(loc="lower left")
ax.set_title(f"n = {len(truth):,} validation images, one network", loc="left")
plots.save(
    fig,
    "05_coverage",
    "Share right by share of images answered, surest first: all lines fall, that of the disagreement first of all",
)

# %%
lead = {name: np.mean(curve - curves["probability, one pass"]) for name, curve in curves.items()}
print("                          right in the certain half   in all   minus one pass, mean of the curve")
for name, curve in curves.items():
    print(f"{name:<26}{curve[8]:>23.1f} % {curve[-1]:>7.1f} %   {lead[name]:>+14.2f} points")
    assert curve[8] > curve[-1] + 3, "all know a good deal about what the network does not know"
assert abs(lead["probability, 20 masks"]) < 0.4, "with the same score: close"
assert lead["disagreement of 20 masks"] < lead["probability, 20 masks"] - 0.2, "disagreement alone: worse"

# %% [markdown]
# Monte-Carlo dropout does know where the network errs. But with the same score, 20 masks and one pass are close in this
# network, and one pass is a twentieth of the work. The disagreement alone ranks worse: it is about the weights, not
# about images that are unclear to every one of the networks. It was made to choose the images whose labels would teach
# most; and Gal & Ghahramani use masks in regression, where a network gives no probability by itself, and for inputs
# unlike those in training. Before you pay for the masks, try the rival.

# %% [markdown]
# ## Initialization: how large should weights begin?
#
# A layer adds up products, $y = \sum_{i=1}^{n} w_i x_i$, over its $n$ inputs; for a 3×3 convolution $n$, the *fan-in*,
# is 9 times its channels. If the weights are drawn independently with mean 0 and variance $g^2 / n$, then, with
# $\mathbb{E}$ the mean over such draws and $\overline{x^2}$ the mean of $x^2$ over the inputs,
#
# $$\mathbb{E}[y^2] = \sum_{i=1}^{n} \operatorname{Var}[w_i]\, x_i^2 = g^2 \cdot \overline{x^2}$$
#
# The fan-in is gone, and $g$, the **gain**, is all that is left to decide. What does a network look like with one that
# is too small?

# %%
exercises.quiz("05.layers")

# %% [markdown]
# A ReLU sets the negative half to zero. For $y$ whose distribution is symmetric about zero (it is, over draws of
# weights that are symmetric themselves), that is half of the mean square, so from the outputs $y_l$ of layer $l$ to
# those of the next
#
# $$\mathbb{E}[y_{l+1}^2] = \frac{g^2}{2}\, \mathbb{E}[y_l^2] \qquad\Rightarrow\qquad
# \text{after } L \text{ layers: } \left(\frac{g^2}{2}\right)^{L}$$
#
# The gradient goes the same way back, with the fan-out $n_{out}$, 9 times the channels of the output, in place of the
# fan-in, here $n_{in}$. Three answers:
#
# | | variance of a weight | made for | gain | mean square, a ReLU layer |
# |---|---|---|---|---|
# | **Xavier** (2010) | $2 / (n_{in} + n_{out})$ | linear layers, both ways | $1$ if $n_{in} = n_{out}$ | $\times\,1/2$ |
# | **He** (2015) | $2 / n_{in}$ | ReLU layers, forwards | $\sqrt 2$ | $\times\,1$ |
# | **PyTorch's default** | $1 / (3\, n_{in})$ | no layer in particular | $1/\sqrt 3$ | $\times\,1/6$ |
#
# (Xavier [Glorot & Bengio 2010](https://proceedings.mlr.press/v9/glorot10a.html), Kaiming [He et al.
# 2015](https://arxiv.org/abs/1502.01852).)
#
# (PyTorch's default also draws biases, which the last column leaves out: they keep the numbers up (lesson 04), but not
# what tells images apart, as we shall see.)
#
# The last one surprises many. The code of `nn.Conv2d` says `kaiming_uniform_(weight, a=math.sqrt(5))`, and that sounds
# like He. But $a$ is the slope of a leaky ReLU; with $\sqrt 5$ the gain is $\sqrt{2 / (1 + 5)}$. Believe your eyes:

# %%
import math

torch.manual_seed(0)
layer = nn.Conv2d(128, 128, 3)
fan_in = layer.weight[0].numel()
found = {"default": layer.weight.std().item() * math.sqrt(fan_in)}
nn.init.xavier_normal_(layer.weight)
found["xavier"] = layer.weight.std().item() * math.sqrt(fan_in)
nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
found["he"] = layer.weight.std().item() * math.sqrt(fan_in)
gains = {"default": math.sqrt(1 / 3), "xavier": 1.0, "he": math.sqrt(2)}
for init, gain in gains.items():
    print(f"{init:<8} gain {found[init]:.3f}, calculated {gain:.3f}")
    assert abs(found[init] / gain - 1) < 0.01

# %% [markdown]
# ### Layer by layer
#
# Now the course's network, without batch norm, without residual connections and with biases of zero, so that nothing
# else keeps the signal in shape. Four images go in, one gradient comes back, and `Probes` note what passes each
# convolution. For ReLU and for tanh, six gains, 10 to 102 layers, in double precision: single precision would have
# called some of these numbers zero.

# %%
from utils import probes

inputs, labels = data.normalize(few.train.images[:4], stats).double(), few.train.labels[:4]


def signal(gain, depth, activation="relu", seed=0):
    """Of each convolution: the standard deviation of its output, and the norm of the gradient there."""
    torch.manual_seed(seed)
    options = {"depth": depth, "init": gain, "activation": activation}
    network = CNN(CNNConfig(width=16, residual=False, norm="none", **options)).double()
    with probes.Probes(network) as probe:
        F.cross_entropy(network(inputs), labels).backward()
    rows = probe.frame()
    rows = rows[rows["layer"].str.contains("conv")]
    table = rows.pivot(index="layer", columns="metric", values="value")
    return table.loc[rows["layer"].unique()].reset_index()  # in the order of the network


named = {"too small": 0.3, **gains, "too large": 5.0}
others = {"1.67": 5 / 3}
depths = {"10 layers": 4, "22 layers": 10, "102 layers": 50}
grid = [(g, d, a) for g in (*named.values(), *others.values()) for d in depths.values() for a in ("relu", "tanh")]
signals = {key: signal(*key) for key in grid}

# %%
COLUMNS = {"activation_std": "standard deviation\nof the layer's output", "activation_gradient": "norm of the gradient"}
lines = {name: (gain, plots.color(name)) for name, gain in named.items()} | {"1.67": (others["1.67"], plots.INK)}


def profile(gain, depth, activation):
    fig, axes = plt.subplots(1, 2, figsize=(7.6, 3.4))
    for ax, (column, label) in zip(axes, COLUMNS.items(), strict=True):
        for name, (value, shade) in lines.items():
            if name in named or value == gain:
                values = signals[value, depth, activation][column]
                ax.plot(range(1, len(values) + 1), values, color=shade, lw=4 if value == gain else 1.3, label=name)
        ax.set(yscale="log", xlabel="convolution", ylabel=label)
        ax.minorticks_off()
    axes[1].legend(bbox_to_anchor=(1, 0.5), loc="center left")
    last = signals[gain, depth, activation]["activation_std"]
    change = f"output × {last.iloc[-1] / last.iloc[0]:.0e}, first to last"
    fig.suptitle(f"gain {gain:.2f}, {2 * depth + 2} layers, {activation}: {change}", fontsize=11)
    return fig


# %%
plots.save(
    profile(math.sqrt(2), 10, "relu"),
    "05_signal",
    "Output deviation and gradient norm by layer, log scale: He falls a little, small gains vanish, a large explodes",
)

# %% [markdown]
# All five gains multiply: nearly straight lines on a logarithmic axis. He's is the least steep, but falls. Play:
#
# - **Deeper.** How far from $\sqrt 2$ may the gain be in 10 layers, and how far in 102?
# - **tanh.** It cannot output more than 1, so large gains no longer explode *forwards*. And backwards?
# - **Both at once.** For one gain of the six and ReLU, in this draw, output and gradient *end* within a factor of ten of
#   where they began, after 102 layers. Which one is it? (Not the one that you expect.) And what do they do on the way?

# %%
gain_choices = {f"{name} ({g:.2f})": g for name, g in named.items()} | others
gain_choices = dict(sorted(gain_choices.items(), key=lambda item: item[1]))
choices = {"gain": gain_choices, "depth": depths, "activation": {"ReLU": "relu", "tanh": "tanh"}}
plots.explore_several(profile, choices, {"gain": "he (1.41)", "depth": "102 layers", "activation": "ReLU"})

# %% jupyter={"outputs_hidden": true, "source_hidden": true} tags=["solution"]
# Solution: click the dots to unfold it
for name, n_blocks in depths.items():
    within = 10 ** (1 / (2 * n_blocks))  # factor ** (number of steps from convolution to convolution) = 10
    print(
        f"{name}: to stay within a factor of ten, the gain may be off by a factor of {within:.2f} (the border left out)"
    )
tanh = signals[named["too large"], 50, "tanh"]["activation_gradient"]
print(f"tanh, gain 5, 102 layers: the gradient is {tanh.iloc[0] / tanh.iloc[-1]:.0e} times as large at the input")
ratios = {name: signals[g, 50, "relu"][list(COLUMNS)].iloc[[0, -1]] for name, g in (named | others).items()}
steady = [name for name, ends in ratios.items() if (ends.max() / ends.min() < 10).all()]
on_the_way = signals[others["1.67"], 50, "relu"]["activation_std"]
print(f"both at once, in this draw: {', '.join(steady)}; on the way its output is", end=" ")
print(f"{on_the_way.max() / on_the_way.iloc[0]:.0e} times as large: it grows on large maps, and falls on small ones")
assert steady == ["1.67"]
assert on_the_way.max() > 100 * on_the_way.iloc[0]

# %%
def factor(gain, depth, activation, column="activation_std"):
    values = signals[gain, depth, activation][column]
    return values.iloc[-1] / values.iloc[0]


for name, gain in named.items():
    print(f"{name:<10} gain {gain:.2f}: in 102 layers the signal is multiplied by {factor(gain, 50, 'relu'):.0e}")
assert factor(5.0, 50, "relu") > 1e20 > 1e-20 > factor(gains["default"], 50, "relu")
assert min(named, key=lambda name: abs(math.log(factor(named[name], 10, "relu")))) == "he"
assert factor(named["he"], 10, "relu") < 0.5, "in 22 layers"
assert factor(5.0, 50, "tanh") < 10, "tanh does not explode forwards"
assert factor(5.0, 50, "tanh", "activation_gradient") < 1e-5, "but backwards it does"
assert all(0.1 < factor(others["1.67"], 50, "relu", column) < 10 for column in COLUMNS), "a gain above He's"

# %% [markdown]
# (In other draws 1.67 does better or worse; how far draws scatter, the next figure shows.) And with the biases
# that PyTorch's default draws, too? They feed each layer anew, but they are the same for every image:

# %%
torch.manual_seed(0)
network = CNN(CNNConfig(width=16, depth=50, residual=False, norm="none", init="default")).double()
passed = []  # of each convolution: the standard deviation of its output, and that between the images
for part in network.modules():
    if isinstance(part, nn.Conv2d):
        part.register_forward_hook(lambda _, inputs, out: passed.append((out.std(), out.var(0).mean().sqrt())))
with torch.no_grad():
    network(inputs)
size, difference = (end / begin for begin, end in zip(passed[0], passed[-1], strict=True))
print(f"default, with its biases: in 102 layers the output is multiplied by {size:.0e},")
print(f"what tells images apart by {difference:.0e} (all that is left are rounding errors)")
assert size > 1e-3
assert difference < 1e-12

# %% [markdown]
# ### He's line sinks, too
#
# With He's gain the formula promises a level line, and in 102 layers it is not level; a gain of 1.67 ended nearer to
# where it began, in that draw. What did the derivation forget? **The border.** At the edge of a map a part of the
# kernel lies on the padding, and zeros add nothing: on a map of 2×2 only four of nine weights meet a value (lesson 04
# has the same for the gradient). The edge gets less than the middle, so the mean square has to be kept for each place
# of the map:


# %%
def expected(depth):
    """He's calculation with the border counted: the root mean square as a multiple of the first one's, by layer."""
    square, ninth, found = torch.ones(1, 1, 14, 14).double(), torch.ones(1, 1, 3, 3).double() / 9, []
    for layer, count in enumerate(CNNConfig(depth=depth).blocks):
        for place in range(2 * count):
            square = F.conv2d(square, ninth, stride=2 if layer and place == 0 else 1, padding=1)
            found.append(square.mean().item())
    return np.sqrt(np.array(found) / found[0])


# %%
draws = [signal(math.sqrt(2), 28, seed=seed)["activation_std"].to_numpy()[1:] for seed in range(10)]
relative = np.array([values / values[0] for values in draws])  # draws×convolutions, from the first block's on
fig, ax = plt.subplots()
layers = np.arange(2, relative.shape[1] + 2)
for values in relative:
    ax.plot(layers, values, color=plots.color("he"), lw=0.8, alpha=0.5)
ax.plot(layers, np.exp(np.log(relative).mean(0)), color=plots.color("he"), lw=3, label="a typical draw")
ax.plot(layers, np.sqrt((relative**2).mean(0)), color=plots.color("he"), lw=3, ls=":", label="root mean square")
ax.plot(layers, expected(28), color=plots.INK, ls="--", lw=2, label="calculated, with the border")
ax.axhline(1, color=plots.GREY, ls=":", lw=2, label="calculated, without")
ax.set(yscale="log", xlabel="convolution", ylabel="standard deviation,\nmultiple of the 2nd")
ax.legend(loc="lower left")
ax.set_title("He, 58 layers: n = 10 draws (thin); thick: their geometric mean", loc="left")
plots.save(
    fig, "05_border", "Standard deviation along 58 layers with He: it falls, a typical draw more than calculated"
)

# %%
typical, promised = np.exp(np.log(relative[:, -1]).mean()), expected(28)[-1]
root = np.sqrt((relative[:, -1] ** 2).mean())
print(f"58 layers, of the second convolution's output the last has {typical:.0e} in a typical draw (geometric mean),")
print(f"{root:.0e} as the root of the mean square; with the border counted {promised:.0e}")
print(f"10 layers: with the border counted {expected(4)[-1]:.2f}")
assert typical < promised < 1e-3
assert typical < root
assert 1 / 3 < expected(4)[-1] < 1 / 2

# %% [markdown]
# The border explains most of the fall: by the calculation, less than a half is left in ten layers, and in 58 less than
# a thousandth. A typical draw lies lower still. The formula is about the mean *square* over all draws, which a few
# large ones rule (so that ten draws do not settle it); and the narrower the layers, the less a single one keeps to it
# ([Hanin & Rolnick 2018](https://arxiv.org/abs/1803.01719)). In a deep network no single gain is right everywhere. Then
# it is better to measure the signal and to rescale each layer until it fits ([Mishkin & Matas
# 2015](https://arxiv.org/abs/1511.06422)), or to let batch norm do so at every step.

# %% [markdown]
# ## Does it matter in training?
#
# Five ways to begin, in the course's network of ten layers with its residual connections: He, Xavier, PyTorch's default,
# a gain of 0.3 (too small) and one of 5 (too large). With and without batch norm. The weights are the same draw, only
# scaled; but the default's are uniform, and without a norm it also draws biases, where all others begin with zeros.
# Everything else is equal. Each at its own best learning rate (chosen with two seeds), with ten other seeds. Note down
# what you expect: how many points does He gain over the default, without batch norm and with it?

# %%
start = read("init")
assert len(start.about["tuning_seeds"]) == 2
INITS = ("he", "xavier", "default", "too small", "too large")
by_norm = {norm: ablation.facet(start.runs, norm) for norm in ("no norm", "batch norm")}
shades = plots.colors_of(INITS)
fig, axes = plt.subplots(2, 2, figsize=(7.4, 7.6), width_ratios=[3, 2])
for (norm, runs), (left, right) in zip(by_norm.items(), axes, strict=True):
    plots.draw_curves(left, runs, "validation accuracy", shades)
    draw_differences(right, runs, "default", "init", norm)
    left.set_title(f"{norm}: {left.get_title('left')}", loc="left")
plots.save(
    fig,
    "05_init",
    "Curves and paired differences of five initializations: far apart without a norm, close with batch norm",
)

# %%
# NBVAL_CHECK_OUTPUT
print(experiments.in_words(claims, "init"))
assert at_edge("init") == {"too small, batch norm"}
small_start = evidence.finals(by_norm["no norm"], "validation accuracy")
behind = small_start["too small"] < small_start["default"]
assert (small_start["too small"] < 0.2).sum() == 1
assert behind.sum() >= 9

# %% [markdown]
# With batch norm, the gain that is too small did best at the highest learning rate that was tried (hollow): at a higher
# one it might do better still. (Without, one of its ten networks did not train. So its interval is a rough one: it
# reaches beyond zero, though the other nine are behind the default.)
#
# ### How long to 80 percent?
#
# After how many epochs are 80 % of the validation images right? They are looked at after each, so what happens within
# the first one is not known. A run that does not get there counts as later than all others, and the median is over all
# ten.


# %%
def epochs_to(runs, goal):
    """The first epoch after which each run has reached the goal, ∞ if none: a row a seed, a column a variant."""
    rows = runs[(runs["split"] == "validation") & (runs["metric"] == "accuracy")]
    rows = rows.assign(when=rows["epoch"].where(rows["value"] >= goal, math.inf))
    return rows.groupby(["seed", "variant"])["when"].min().unstack()


# %%
needed = {norm: epochs_to(runs, 0.8).reindex(columns=INITS) for norm, runs in by_norm.items()}
fig, axes = plt.subplots(1, 2, figsize=(7.6, 3.0), sharex=True, sharey=True)
last_epoch = start.runs["epoch"].max()
for ax, (norm, table) in zip(axes, needed.items(), strict=True):
    for row, init in enumerate(INITS):
        for epoch, seeds in table[init].replace(math.inf, last_epoch + 1).value_counts().items():
            ax.text(epoch, row, seeds, color=shades[init], ha="center", va="center", fontsize=12, fontweight="bold")
    ax.set(yticks=range(len(INITS)), yticklabels=INITS, ylim=(len(INITS) - 0.5, -0.5), xlim=(0.5, last_epoch + 1.5))
    ax.set_xticks(range(1, last_epoch + 2), ["1 or\nsooner", *range(2, last_epoch + 1), "never"])
    ax.set(xlabel="epochs to 80 %")
    ax.set_title(norm, loc="left")
fig.suptitle(f"how many of {len(table)} seeds have 80 % right after so many epochs, and not before", fontsize=11)
plots.save(
    fig, "05_time", "Seeds by epochs to 80 %, five initializations: without a norm He is first, with one most need one"
)

# %%
# NBVAL_CHECK_OUTPUT
for norm, table in needed.items():
    for init, median in table.median().items():
        never = (table[init] == math.inf).sum()
        when = "never" if math.isinf(median) else f"{'at most ' * (median == 1)}{median:g}"
        print(f"{norm:<11} {init:<10} median {when}" + (f"; {never} of {len(table)} seeds never" if never else ""))

# %% [markdown]
# ### How much of it does batch norm remove?
#
# The same difference twice: He minus the default without batch norm, and with it. Their difference, seed by seed, is
# what batch norm takes away.

# %%
# NBVAL_CHECK_OUTPUT
ends = {norm: 100 * evidence.finals(runs, "validation accuracy") for norm, runs in by_norm.items()}
gained = {norm: (table["he"] - table["default"]).to_numpy() for norm, table in ends.items()}
range_of = {norm: table.mean().max() - table.mean().min() for norm, table in ends.items()}
removed = evidence.paired(gained["no norm"], gained["batch norm"])
lead_of_he = {norm: evidence.paired(gained[norm], 0 * gained[norm]) for norm in ends}
for norm in ends:
    print(f"{norm:<11} He − default: {points(lead_of_he[norm], 2)}")
    print(f"{'':<11} best of the five means − worst: {range_of[norm]:.1f} points")
print(f"taken away by batch norm: {points(removed, 2)}")
assert removed["low"] > 2
assert range_of["batch norm"] < 2 < 10 < range_of["no norm"]
assert lead_of_he["batch norm"]["high"] < 0 < lead_of_he["no norm"]["low"], "with batch norm the default is ahead"

# %% [markdown]
# ### Why: with batch norm, size is speed
#
# With batch norm behind it, a convolution may have weights of any size: a factor $\alpha$ in all its weights cancels
# (lesson 03). So what can a "wrong" gain still do?

# %%
exercises.quiz("05.with_norm")

# %% [markdown]
# The outputs stay; the gradient by the larger weights is $\alpha$ times smaller; the weights themselves are $\alpha$
# times larger. So a step changes them, **as a share of themselves**, $\alpha^2$ times less ($\Delta W$ is the step,
# $\eta$ the learning rate, $L$ the loss; on the right, $W$ are the weights without the factor):
#
# $$\frac{\Delta W}{W} = -\eta\, \frac{1}{\alpha W}\cdot \frac{1}{\alpha} \frac{\partial L}{\partial W} =
# -\frac{\eta}{\alpha^2}\, \frac1W \frac{\partial L}{\partial W}$$
#
# A gain that is $\alpha$ times too large is nothing but a learning rate that is $\alpha^2$ times too small (without
# weight decay). Check it: two networks, the convolutions of one 10 times as large, and with a learning rate 100 times as
# large. After ten steps their logits are still the same.


# %%
def ten_steps(alpha, factor):
    """Logits after ten plain gradient steps from weights α times as large; their rate is multiplied by the factor."""
    torch.manual_seed(0)
    network = CNN(CNNConfig(width=8)).double()
    filters = {name: weight for name, weight in network.named_parameters() if weight.ndim == 4}
    rest = [weight for name, weight in network.named_parameters() if name not in filters]
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.eps = 1e-16  # the one thing that does not scale along
    with torch.no_grad():
        for weight in filters.values():
            weight.mul_(alpha)
    groups = [{"params": list(filters.values()), "lr": 0.1 * factor}, {"params": rest, "lr": 0.1}]
    optimizer = torch.optim.SGD(groups)
    for _ in range(10):
        optimizer.zero_grad()
        F.cross_entropy(network(inputs), labels).backward()
        optimizer.step()
    return network(inputs).detach()


# %%
# NBVAL_CHECK_OUTPUT
reference = ten_steps(1, 1)
same, slower = (ten_steps(10, 100) - reference).abs().max(), (ten_steps(10, 1) - reference).abs().max()
assert same < 1e-9
assert slower > 0.1
print("weights × 10, learning rate × 100: after ten steps the logits are equal to nine digits")
print("weights × 10, the same learning rate: they are not")

# %% [markdown]
# That is why an initialization must not be judged at one learning rate. Here is the sweep that chose the rates, first
# with batch norm. Were it the rate of the convolutions only, the curve of a larger gain would be the same curve, moved
# to the right. Is it? (A rate of 10, which was tried with the gain of 5 only, is left out: the network hardly trains
# there.)

# %%
with_norm = ablation.facet(start.sweep, "batch norm")
plots.save(
    plots.lr_sweep(with_norm[with_norm["lr"] < 10]),
    "05_lr_sweep_batch_norm",
    "Accuracy against learning rate with batch norm: at low rates larger gains do worse, the best are nearly equal",
)

# %%
# NBVAL_CHECK_OUTPUT
best = {norm: {init: start.about["best_lr"][f"{init}, {norm}"] for init in INITS} for norm in by_norm}
print("best learning rate:  no norm  batch norm  (for the convolutions, from He's)")
for init, gain in sorted(named.items(), key=lambda item: item[1]):
    calculated = best["batch norm"]["he"] * (gain / named["he"]) ** 2
    marks = {norm: "*" if f"{init}, {norm}" in at_edge("init") else " " for norm in by_norm}
    rates_of = [f"{best[norm][init]:g}{marks[norm]}" for norm in by_norm]
    print(f"{init:<10} gain {gain:<5.2f}{rates_of[0]:>9}  {rates_of[1]:>10} ({calculated:.2g})")
print("* at the edge of those tried; Xavier's gain is 1 where the channels do not change, else smaller")
at_rate_of = {lr: 100 * evidence.finals(rows, "validation accuracy").mean() for lr, rows in with_norm.groupby("lr")}
assert at_rate_of[10]["too large"] < 30 < 85 < min(at_rate_of[lr]["he"] for lr in (0.3, 1.0)), (
    "10 and 0.8 are not alike"
)
at_low = 100 * evidence.finals(with_norm[with_norm["lr"] == 0.01], "validation accuracy").mean()
print("batch norm, at a rate of 0.01:", ", ".join(f"{init} {at_low[init]:.1f} %" for init in named if init in at_low))
assert at_low["too small"] > at_low["default"] > at_low["he"], "slower, the larger the gain"
gain_5, of_he = at_rate_of[0.1]["too large"], at_rate_of[0.01]["he"]
as_far = 0.1 * (named["he"] / named["too large"]) ** 2
print(f"gain 5 at 0.1: {gain_5:.1f} %; as calculated, so much as He at {as_far:g}; at 0.01 He has {of_he:.1f} %")
assert as_far < 0.01
assert gain_5 > of_he + 1, "its curve has moved less far than calculated"

# %% [markdown]
# On the left, where the rates are too low, the order is as calculated: the larger the gain, the slower the network
# learns. (By how much the curves have moved is another matter: that of gain 5 by less than calculated.) But the best
# rates lie closer together than the calculation says, and there are two reasons for that. First, one rate drives all
# weights here: the head, γ and β have it too, and what suits them does not move along with the gain. (With a gain of 5,
# a rate of 10 is for the convolutions what 0.8 is for He's, at which these learn well. What cannot take 10 is
# presumably the rest.) Second, weight decay: a step takes off a share of the weights that is proportional to the rate,
# so at a rate $\alpha^2$ times as large it takes $\alpha^2$ times as much. (Without it the calculation holds for any
# number of steps.) And the best rate is hard to see, for the curves are flat near their tops: a gradient step makes
# weights longer (lesson 03), small ones by far the most, and what was wrong with them fades. Two epochs, at a rate of
# 0.3:


# %%
def measured_gain(network):
    """The gain that the weights have now: the geometric mean over the convolutions."""
    filters = [part.weight for part in network.modules() if isinstance(part, nn.Conv2d)]
    return math.exp(np.mean([math.log(w.std().item() * math.sqrt(w[0].numel())) for w in filters]))


for init in ("too small", "he", "too large"):
    torch.manual_seed(0)
    network = CNN(CNNConfig(width=8, init=named[init]))
    before = measured_gain(network)
    train.fit(network, brief, replace(recipe, epochs=2), device="cpu", precision="fp32", progress=False)
    print(f"{init:<10} gain {before:.2f}, after training {measured_gain(network):.2f}")
    assert init != "too small" or measured_gain(network) > 2 * before
    assert init != "too large" or 0.9 * before < measured_gain(network) < before

# %% [markdown]
# Weights that are too small grow into shape. Those that are too large stay large, and slow: here decay outweighs the
# steps.
#
# Without batch norm there is no such way out. Every gain has a rate beyond which nothing trains at all, and where the
# best rate lies close to it, the seeds differ widely:

# %%
without_norm = ablation.facet(start.sweep, "no norm")
plots.save(
    plots.lr_sweep(without_norm),
    "05_lr_sweep_no_norm",
    "Accuracy against learning rate without a norm: He does well at most rates, too large a gain at none",
)
at_most = {init: without_norm[without_norm["variant"] == init]["lr"].max() for init in INITS}
for init, lr in at_most.items():
    runs = without_norm[(without_norm["variant"] == init) & (without_norm["lr"] == lr)]
    assert evidence.finals(runs, "validation accuracy").mean().item() < 0.2, "the highest rate that was tried"

# %% [markdown]
# ## Your turn: a gain for every activation
#
# For ReLU one half of the mean square is lost, and so the gain is $\sqrt 2$. For other activations $f$ there may be no
# formula, but there is always a simulation. Let $z$ be a unit's input, normal with mean 0 and standard deviation 1, as
# the sum of many independent products nearly is. With the gain $g$, the next layer should see the same size again:
#
# $$g^2 \cdot \mathbb{E}\left[f(z)^2\right] = 1, \qquad z \sim \mathcal N(0, 1)$$
#
# Write a function that takes an activation (a function of tensors) and returns its gain as a number, by simulation with
# 100,000 draws or more. The check tries it on a leaky ReLU, on SiLU and on GELU. This is what your gain then does in a
# stack of 20 layers:


# %%
def try_out(gain_of):
    """The size of the signal after 20 layers of 512 units, with your gain and with He's."""
    for name, activation in {"leaky ReLU, slope 0.5": lambda z: F.leaky_relu(z, 0.5), "SiLU": F.silu}.items():
        sizes = []
        for gain in (gain_of(activation), math.sqrt(2)):
            torch.manual_seed(0)
            z = torch.randn(256, 512)
            for _ in range(20):
                z = activation(z) @ torch.randn(512, 512).mul_(gain / math.sqrt(512))
            sizes.append(z.pow(2).mean().sqrt().item())
        print(f"{name:<22} gain {gain_of(activation):.2f}: size {sizes[0]:.2f}; with He's 1.41: {sizes[1]:.2f}")


# %%
gain_of = ...  # def gain_of(activation): … return a number
if exercises.check("05.gain", gain_of):
    try_out(gain_of)
# exercises.hint("05.gain")


# %% jupyter={"source_hidden": true} tags=["solution"]
# Solution: click the dots to unfold it
def solution(activation):
    z = torch.randn(1_000_000)
    return 1 / activation(z).pow(2).mean().sqrt().item()


assert exercises.check("05.gain", solution, quiet=True)
try_out(solution)

# %% [markdown]
# For the leaky ReLU the gain is right for signals of any size: twice the input is twice the output. For SiLU it is not.
# Near zero SiLU halves, far away it is a ReLU, and your gain is right in between, at size 1:

# %%
z, gain = torch.randn(1_000_000), 1 / F.silu(torch.randn(1_000_000)).pow(2).mean().sqrt()
after = {size: (gain * F.silu(size * z).pow(2).mean().sqrt()).item() for size in (0.5, 1.0, 2.0)}
print("SiLU, one layer:", ", ".join(f"a signal of size {size:g} becomes {value:.2f}" for size, value in after.items()))
assert after[0.5] < 0.48
assert abs(after[1.0] - 1) < 0.02
assert after[2.0] > 2.1

# %% [markdown]
# What begins a little off drifts away. With such activations, depth needs a norm all the more.
#
# ## Your turn: bring a network back to life
#
# 14 plain layers without batch norm, begun as PyTorch begins them. The loss stands still at $\ln 10$: nothing gets
# through. Repair it **without adding a layer**: write a function that takes the network and changes its weights in
# place. The check trains it for two epochs, as below, and wants to see at least half of the validation images right. Your
# function is all that stands between this network and an education:


# %%
def educate(repair=None):
    """Train the network for two epochs, repaired or as it is, and say how it went."""
    torch.manual_seed(0)
    patient = CNN(CNNConfig(width=8, depth=6, residual=False, norm="none", init="default"))
    if repair is not None:
        repair(patient)
    pupils = few.take(1_280)
    lesson = train.Recipe(epochs=2, batch_size=32, lr=0.03, clip=1.0, crop_padding=0, flip=False)
    end = train.fit(patient, pupils, lesson, device="cpu", precision="fp32", progress=False)
    loss, right = end.last("train", "loss"), end.last("validation", "accuracy")
    state = "as it is" if repair is None else "repaired"
    print(f"{state}: training loss {loss:.2f}, {right:.0%} of the validation images right")
    return right


ill = educate()

# %%
repair = ...  # def repair(network): … change network's weights in place
if exercises.check("05.repair", repair):
    educate(repair)
# exercises.hint("05.repair")


# %% jupyter={"source_hidden": true} tags=["solution"]
# Solution: click the dots to unfold it
def solution(network):
    for part in network.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, nonlinearity="relu")
            nn.init.zeros_(part.bias)


assert exercises.check("05.repair", solution, quiet=True)
assert educate(solution) > ill + 0.2

# %% [markdown]
# ## Summary
#
# The sentences below are put together from the verdicts, whatever they are.

# %%
judged, lowest = claims.set_index("claim")["verdict"], claims.set_index("claim")["low"]
everywhere, more = "dropout everywhere helps", "dropout everywhere helps more than in the head alone"
may_help = "helps" if lowest[everywhere] > 0 else "may help"
helps = {
    "supported": "With batch norm, dropout everywhere helps by more than half a point when images are few",
    "refuted": "With batch norm, dropout everywhere does not help by half a point, even when images are few",
    "inconclusive": f"With batch norm, dropout everywhere {may_help} when images are few; ten seeds cannot tell if by "
    "half a point",
}
plain_ends = 100 * evidence.finals(ablation.facet(dropped.runs, "no norm"), "validation accuracy")
plain_change = evidence.paired(plain_ends["everywhere"].to_numpy(), plain_ends["none"].to_numpy())
without_norm_too = "lies above zero" if plain_change["low"] > 0 else "includes zero"
than_head = f"That it does half a point more than in the head alone is {judged[more]}"
with_all = "dropout everywhere helps, with all training images"
seen_once = [judged[with_all], judged[f"{with_all} and without batch norm"]]
about_all = "That it helps by half a point with all images, each seen once, is "
about_all += f"{seen_once[0]} with batch norm, and {seen_once[1]} without"
about_dropout = (
    f"{helps[judged[everywhere]]}; without a norm, its interval {without_norm_too}. {than_head}. {about_all}."
)
he = [judged[f"He initialization beats PyTorch's default, {norm} batch norm"] for norm in ("without", "with")]
about_he = f"That He's initialization beats PyTorch's default is {he[0]} without batch norm, and {he[1]} with it."


# %%
def listed(*names):
    """The claims of these experiments as a Markdown list."""
    rows = claims[claims["experiment"].isin(names)].to_dict("records")
    return "\n".join(f"- {row['claim'][0].upper()}{row['claim'][1:]}: {verdict_on(row)}" for row in rows)


def verdict_on(row):
    """The verdict on a claim, its margin and its difference, in words."""
    margin = f"by more than {100 * row['margin']:g}" if row["margin"] > 0 else f"to within {-100 * row['margin']:g}"
    difference = points({key: 100 * row[key] for key in ("difference", "low", "high")} | {"n": row["n"]})
    return f"**{row['verdict']}** ({margin}); {difference}."


# %%
from IPython.display import Markdown

shift_before = shifts["before the norm"][:, second].mean()
Markdown(f"""
**{about_dropout}**

{listed("dropout", "dropout_rate", "dropout_rate_no_norm", "dropout_full")}

- **Dropout and batch norm disagree**: directly behind a dropout of {half_rate}, the variance in evaluation is
  {shift_before:.2f} times the stored one. More than without dropout, new statistics give back
  {points(more_than_none["before the norm"])}; with dropout behind the norm {points(more_than_none["behind it"])}.
- **Masks left on in evaluation** tell where the network errs; with the same score, 20 masks and one pass without
  masks are close ({lead["probability, 20 masks"]:+.2f} points), and the disagreement alone ranks worse
  ({lead["disagreement of 20 masks"]:+.2f} points; one network, {len(truth):,} images).

**{about_he}**

{listed("init")}

- **Batch norm leaves nothing of He's lead** over the default (which, without a norm, also draws biases): without it
  {points(lead_of_he["no norm"])}, with it, where a gain is a learning rate, {points(lead_of_he["batch norm"])}.
- **In depth everything multiplies**: in 102 plain layers PyTorch's default weights leave
  {factor(gains["default"], 50, "relu"):.0e} of the signal (without its biases, which keep the numbers up, but not what
  tells images apart), and He {factor(gains["he"], 50, "relu"):.0e} (one draw each): the padding's zeros count, too.
""")

# %% [markdown]
# **Where it holds, and where not.** All of this is one small network on small grey images, in short runs. Dropout was
# made for networks with huge linear layers, trained for long ([Srivastava et al.
# 2014](https://jmlr.org/papers/v15/srivastava14a.html)); the head here is tiny. With batch norm five starts of ten
# layers ended close together (the gain that is too large a little behind), without one far apart; in depth the factors
# multiply, so expect more there. But a deep network was not trained here.
#
# ## Five lessons in one figure
#
# What people say, and what came of it: every claim that lessons 01 to 05 have measured, each with its difference in
# percentage points, its 95 % interval and its number of seeds. The short black line is the margin that was set before
# the runs. The axis is linear between −1 and 1 and logarithmic beyond.

# %%
# NBVAL_CHECK_OUTPUT
so_far = claims[claims["lesson"] < "06"]
plots.save(
    plots.claims(so_far),
    "05_claims",
    "Forest plot of the claims of lessons 01 to 05, by lesson: inconclusive is the most frequent verdict",
)
counts = so_far["verdict"].value_counts()
print(f"{len(so_far)} claims: " + ", ".join(f"{counts[verdict]} {verdict}" for verdict in plots.VERDICTS))
assert counts.idxmax() == "inconclusive"

# %% [markdown]
# Lesson 06 predicts and measures some more, and lesson 08 opens with them all. As a table, with links to the curves
# behind them, they are in the [README](../README.md).
#
# **Sources.** Srivastava et al. 2014, [Dropout: a simple way to prevent neural networks from
# overfitting](https://jmlr.org/papers/v15/srivastava14a.html). Tompson et al. 2015, [Efficient object localization
# using convolutional networks](https://arxiv.org/abs/1411.4280) (dropout of channels). X. Li et al. 2018,
# [Understanding the disharmony between dropout and batch normalization by variance
# shift](https://arxiv.org/abs/1801.05134). Gal & Ghahramani 2016, [Dropout as a Bayesian
# approximation](https://arxiv.org/abs/1506.02142). Houlsby et al. 2011, [Bayesian active learning for classification
# and preference learning](https://arxiv.org/abs/1112.5745) (the disagreement). Gal, Islam & Ghahramani 2017, [Deep
# Bayesian active learning with image data](https://arxiv.org/abs/1703.02910). Glorot & Bengio 2010, [Understanding the
# difficulty of training deep feedforward neural networks](https://proceedings.mlr.press/v9/glorot10a.html). He et al.
# 2015, [Delving deep into rectifiers](https://arxiv.org/abs/1502.01852). Mishkin & Matas 2015, [All you need is a good
# init](https://arxiv.org/abs/1511.06422). Hanin & Rolnick 2018, [How to start
# training](https://arxiv.org/abs/1803.01719).
