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
# # Training fast: where do the milliseconds go?
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/cnn-course/cnn-course/blob/main/notebooks/07_training_fast.ipynb) [![Open on Binder](https://mybinder.org/badge_logo.svg)](https://mybinder.org/v2/gh/cnn-course/cnn-course/main?labpath=notebooks/07_training_fast.ipynb)
#
# Nearly the same network, the same images, the same machine: one loop needs a fraction of the time of another. This
# lesson takes a training step apart. **Where do its milliseconds go, and what makes them fewer?** Some tricks cost
# nothing, some change what is learned, and some help on one machine and do harm on another.
#
# **After this lesson you can** profile a training step; tell which tricks are worth it on your machine, and which only
# seem to be; find a layer's place on a roofline; predict what a larger network, or a second machine, will cost; find what
# slows a loop down.
#
# **You need** lesson 00; batch norm (lesson 03) helps. Reading takes about 60 minutes, running about one.

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
# ## The usual loop
#
# Most tutorials train like this: a `DataLoader` that crops, flips and normalizes **image by image**, everything in fp32,
# batches of 128, and a loss that is read with `.item()` at every step. Here it is, with the course's network but for one
# thing (the first layer pools last, as in textbooks):
#
# ```python
# for pixels, labels in loader:                       # torchvision transforms, image by image
#     optimizer.zero_grad()
#     logits = model(pixels)
#     loss = F.cross_entropy(logits, labels)
#     loss.backward()
#     optimizer.step()
#     running_loss += loss.item()
#     correct += (logits.argmax(1) == labels).sum().item()
# ```
#
# Before anybody makes it faster, commit yourself.

# %%
from utils import exercises

exercises.quiz("07.where")

# %% [markdown]
# ## Where a step's time goes
#
# Do not guess, measure: `torch.profiler` writes down every operation that PyTorch carries out, and how long it took by
# itself, without those that it called. That is a list of about a hundred names. `costs.where_time_goes` puts each where
# it belongs: an `aten::copy_` may be a part of the data, of a convolution or of batch norm, and what was called *around*
# it tells. Two loops, a few steps of 128 images each, on your machine's CPU. (The whole lesson measures the CPU, even if
# there is a GPU, because the shipped rows were measured on a CPU.)

# %%
import os
import tempfile
from dataclasses import replace

import pandas as pd
import torch

from utils import bench, costs, data, device, files, loops, plots

plots.use_style()
os.environ["CNN_DEVICE"] = "cpu"
fast_bf16 = device.pick_precision(device.pick()) == "bf16"  # has this CPU instructions for it?
laid_out = tempfile.TemporaryDirectory()
loops.lay_out_for_torchvision(Path(laid_out.name))  # the images, where torchvision looks for them
usual, course = loops.Tricks(), replace(loops.tricks_up_to("pool before norm"), bf16=fast_bf16)
profiles, ours = {}, f"the course's loop, {'bf16' if fast_bf16 else 'fp32'}"
for name, tricks in {"the usual loop": usual, ours: course}.items():
    _, batches, step = loops.prepare(tricks, 4 * 128, laid_out.name)
    with loops.memory_of(tricks):
        profiles[name] = costs.where_time_goes(batches, step)
profiles = pd.DataFrame(profiles)
print(profiles.map("{:.1f}".format).to_string(), "\n\nmilliseconds a step of 128 images, here and now")

# %%
import matplotlib.pyplot as plt

PINK = "#cc78bc"  # seaborn's "colorblind", like the others
SHADES = {"convolution, backward": plots.BLUE, "convolution, forward": plots.SKY, "batch norm": plots.ORANGE}
SHADES |= {"activation": plots.GREEN, "pooling": PINK, "data": plots.VERMILION, "optimizer": plots.BROWN}
SHADES |= {"everything else": plots.GREY}
LIGHT = (plots.SKY, plots.ORANGE, PINK, plots.GREY)  # on which text is dark


def draw_profiles(ax, table):
    """A bar a loop: the milliseconds of a step, by what they went into."""
    left = pd.Series(0.0, table.columns)
    for group, shade in SHADES.items():
        ax.barh(table.columns, table.loc[group], left=left, color=shade, label=group, edgecolor="white", height=0.6)
        for place, (ms, begin) in enumerate(zip(table.loc[group], left, strict=True)):
            if ms > 0.05 * table.sum().max():
                ink = plots.INK if shade in LIGHT else "white"
                ax.text(begin + ms / 2, place, f"{ms:.0f}", ha="center", va="center", color=ink, fontweight="bold")
        left += table.loc[group]
    ax.invert_yaxis()
    ax.set_xlabel("milliseconds a step of 128 images (3 steps, this machine)")
    ax.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.4, 1.0), handlelength=1)


# %%
fig, ax = plt.subplots(figsize=(7.6, 2.6))
draw_profiles(ax, profiles)
plots.save(
    fig,
    "07_profile",
    "Milliseconds of a step by kind of work, the usual loop above the course's: data nearly vanish, most parts shrink",
)
shares = profiles / profiles.sum()
convolutions = shares.loc[["convolution, forward", "convolution, backward"]].sum()
for loop, share in convolutions.items():
    print(f"{loop}: convolutions take {share:.0%} of a step, the largest part is {profiles[loop].idxmax()!r}")
if not (profiles.loc["convolution, backward"] > profiles.loc["convolution, forward"]).all():
    print("Backward takes no longer than forward? Then this machine is busy with something else: run it again.")

# %% [markdown]
# Read it from the left. The backward pass of convolutions takes longer than their forward pass: it has to multiply
# twice, for the gradient with respect to the weights and for the one with respect to the input. "Everything else" is the
# loss, the residual additions, the head, Python between the operations, and the profiler's own work. With more cores the
# convolutions shrink; in the upper bar the data, which one core prepares, do not, and may become the largest part. (If
# your lower bar says fp32, your CPU has no instructions for bf16: that trick is missing there, and the own kernels that
# need it.)
#
# What shrinks from the upper bar to the lower one tells what the tricks are about. But a profile does not tell **what a
# trick brings**: for that, switch it on.
#
# ## The waterfall: one trick at a time
#
# Eight tricks lead from the usual loop to the course's, each one a field of `loops.Tricks`:
#
# | trick | what it does | what it changes |
# |---|---|---|
# | images in one tensor | all images in memory as uint8; a batch is cropped, flipped and normalized at once | nothing but the order of random numbers |
# | no `.item()` a step | loss and hits are summed as tensors, and read at the end | nothing |
# | channels last | in memory, the channels of a pixel lie side by side | rounding |
# | bf16 | convolutions multiply, and activations are kept, in 16 bits instead of 32 | rounding, to 2 or 3 digits |
# | memory kept | what tensors free stays with the process, and is not cleared page by page | nothing |
# | own kernels | convolutions on tiny maps and pooling are written otherwise (`utils.kernels`) | rounding |
# | pool before norm | the first layer pools before norm and ReLU, which then see a quarter of the values | **the network** |
# | batches of 512 | four times as many images a step | **the recipe** |
#
# The rows were measured by `python cnn.py bench waterfall`: all loops in turn, several rounds, so that a busy moment of
# the machine hits each of them alike. A bar goes from the median above to its own, leftward if that is lower; its line
# from the lowest to the highest round: with six rounds or more that is a 95 % interval of the median (the chance that
# all $n$ rounds lie on one side of it is $2 \cdot 2^{-n}$). It is an interval of one session: another day on the same
# machine may differ by more.

# %%
RECOMPUTE = False
if RECOMPUTE:
    parts = ["waterfall", "target", "roofline", "growth", "talk", "avx2_bf16", "learning", "record"]
    bench.speed([*parts, "avx2", "width", "images", "processes"], rounds=7)  # an hour
# With rows of your own, a cell below may stop: the text, and what is asserted of it, is about the shipped ones.
rows = bench.measured_on(folder=files.results_dir()) if RECOMPUTE else bench.shipped()
shipped = {name: table.set_index("what") for name, table in rows.groupby("measurement")}
fall = shipped["waterfall"]
machine = f"{fall['cores'].iloc[0]} cores of an {fall['cpu'].iloc[0]}, {fall['instructions'].iloc[0]}"
assert fall["n"].min() >= 6
print(f"shipped rows: {machine}; n = {fall['n'].iloc[0]} rounds")

# %% [markdown]
# And yours: every loop of the waterfall on 512 images, twice, of which the faster counts. A small measurement, but of
# the machine that you sit at. (512 images are four steps of most loops, and a single one of the last; a first step is
# left out of the time. If the CPU has no instructions for bf16, the loops here take fp32.)

# %%
speeds_here = {}
for name in loops.WATERFALL:
    tricks = loops.tricks_up_to(name)
    tricks = replace(tricks, bf16=tricks.bf16 and fast_bf16)
    speeds_here[name] = max(loops.with_tricks(tricks, 512, laid_out.name) for _ in range(2))
usually, at_best = speeds_here["usual loop"], speeds_here["batches of 512"]
print(f"here and now: {usually:,.0f} images/s usually, {at_best:,.0f} with all tricks")
if at_best < usually:  # the tricks use all cores, so they suffer most when these have other work
    print("That is slower? Then this machine is busy with something else: wait for it, and run the cell again.")


# %%
def draw_waterfall(ax, speeds, here):
    """A bar a loop: the median of the shipped rounds, their range, and what was measured here."""
    for place, name in enumerate(loops.WATERFALL):
        row = speeds.loc[f"up to: {name}"]
        below = speeds.loc[f"up to: {list(loops.WATERFALL)[place - 1]}", "median"] if place else 0
        shade = plots.VERMILION if name in ("pool before norm", "batches of 512") else plots.BLUE
        ax.barh(place, row["median"] - below, left=below, color=shade if place else plots.DARK, alpha=0.75, height=0.6)
        ax.plot([row["min"], row["max"]], [place, place], color=plots.INK, lw=2)
        gain = speeds.loc[f"gain: {name}"] if place else None
        text = f"× {gain['median']:.2f} ({gain['min']:.2f}–{gain['max']:.2f})" if place else f"{row['median']:,.0f}"
        ax.annotate(text, (row["max"], place), (6, 0), textcoords="offset points", va="center", fontsize=10)
        mark = {"color": plots.GREEN, "ms": 5, "mec": "white", "label": "here and now" * (place == 0)}
        ax.plot(here[name], place + 0.4, "D", **mark)  # below the words, which it may meet
    ax.set_yticks(range(len(here)), [("+ " if place else "") + name for place, name in enumerate(here)])
    fastest = max(speeds.loc[speeds.index.str.startswith("up to"), "max"].max(), *here.values())
    ax.set(xlabel="images a second", ylim=(len(here) - 0.5, -0.6), xlim=(0, 1.3 * fastest))


fig, ax = plt.subplots(figsize=(7.6, 4.2))
draw_waterfall(ax, fall[fall.index.str.startswith(("up to", "gain:"))], speeds_here)
ax.legend(loc="upper right")
title = f"×: the rounds' ratios to the row above (n = {fall['n'].iloc[0]}); orange: network or recipe changed"
ax.set_title(title, loc="left", fontsize=10)
plots.save(fig, "07_waterfall", "Images a second, trick by trick: about three times as many as by the usual loop")

# %%
# NBVAL_CHECK_OUTPUT
def said(row, digits=2, unit=""):
    """Median and range of a shipped row, in words."""
    low, high = f"{row['min']:,.{digits}f}", f"{row['max']:,.{digits}f}"
    return f"{row['median']:,.{digits}f}{unit} ({low} to {high}, n = {row['n']})"


of_128 = fall.loc["up to: pool before norm", "median"] / fall.loc["up to: usual loop", "median"]
print(f"all tricks but batches of 512 against none: × {of_128:.2f} (ratio of the medians)")
print("all tricks against none: ×", said(fall.loc["all tricks against none"]))
print("train.fit against all tricks: ×", said(fall.loc["train.fit against all tricks"]))
assert fall.loc["all tricks against none", "min"] > 2
ends = fall.loc["train.fit against all tricks"]
assert ends["min"] < 1 < ends["max"], "the waterfall ends where the course is"

# %% [markdown]
# The last line checks where the figure ends: these rounds show no difference between `train.fit`, the course's own loop,
# and the loop that was put together here from its tricks.
#
# ### What the order hides
#
# Each gain depends on what came before. Ten milliseconds saved are a small share of a slow step and a large one of a fast
# step. So here is the other direction: from the end, with all tricks, take away **one**. How many times faster is the
# whole because of it? (With bf16 the own kernels go, too: most of them act in bf16 only.)

# %%
def draw_orders(ax, table):
    """The gain of each trick, added in the waterfall's order and taken away from the end."""
    tricks = list(loops.WATERFALL)[1:-1]
    for kind, shade, shift in (("gain", plots.SKY, -0.15), ("gain at the end", plots.BLUE, 0.15)):
        gains = table.loc[[f"{kind}: {name}" for name in tricks]]
        middle = gains["median"].to_numpy()
        spread = [middle - gains["min"].to_numpy(), gains["max"].to_numpy() - middle]
        places = [place + shift for place in range(len(tricks))]
        label = {"gain": "added, in order", "gain at the end": "taken away from the end"}[kind]
        ax.errorbar(middle, places, xerr=spread, fmt="o", color=shade, capsize=3, label=label)
    ax.axvline(1, color=plots.GREY, lw=1)
    ax.set_yticks(range(len(tricks)), tricks)
    ax.set(xscale="log", ylim=(len(tricks) - 0.5, -0.5), xlabel="times faster with it (logarithmic)")
    ticks = [0.9, 1, 1.2, 1.5, 2, 3]
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.minorticks_off()
    ax.legend(loc="lower center", bbox_to_anchor=(0.4, 1), ncols=2)


# %%
fig, ax = plt.subplots(figsize=(7.2, 3.4))
draw_orders(ax, fall)
ax.text(1, 1.02, f"n = {fall['n'].iloc[0]} rounds", transform=ax.transAxes, ha="right", fontsize=10)
plots.save(
    fig, "07_order", "Gain of each trick, added in order or taken away from the end: most factors are larger there"
)
for name in ("images in one tensor", "channels last"):
    in_order, at_end = (fall.loc[f"{kind}: {name}", "median"] for kind in ("gain", "gain at the end"))
    assert at_end > in_order, f"{name}: a larger factor, the faster the rest is"

# %% [markdown]
# Three things that a list of tricks does not say.
#
# - **They hide each other.** While all the rest is slow, the images are one part of a step among others. Once it is fast,
#   they are in the way: the DataLoader costs about as many microseconds as before (below), which are a larger factor now.
# - **Some need each other**: most of the own kernels act in bf16 only. These rows cannot show it: in both orders the
#   kernels are measured with bf16 on. A larger *factor* at the end would be no sign of it, either. Channels last has one,
#   too, and of each trick the two ranges of the *time* that it saves overlap.
# - **Some bring little or nothing on a CPU.** Lists of performance tips tell you to avoid `.item()` (so does [PyTorch's
#   guide](https://docs.pytorch.org/tutorials/recipes/recipes/tuning_guide.html)). On a **GPU** it makes the CPU wait
#   until all that was handed over is done, at every step. A CPU has done its work before it goes on, so there is
#   nothing to wait for. It is a good habit; it is no trick for a CPU. Nor do these rounds show a gain from memory that
#   is kept. Pooling before the norm leaves three quarters of the values of norm and ReLU out. By the times of single
#   layers (measured further below, for the roofline) that should save some microseconds an image, and so say the
#   medians below; but the rounds scatter by more.

# %%
# NBVAL_CHECK_OUTPUT
import itertools

item = fall.loc["gain: no .item() a step"]
kept = fall.loc["gain: memory kept"]
print("without .item(): ×", said(item))
print("memory kept: ×", said(kept))
gains = {name: fall.loc[f"gain at the end: {name}", "median"] for name in list(loops.WATERFALL)[1:-1]}
saved = {name: fall.loc[[f"saved: {name}", f"saved at the end: {name}"]] for name in gains}  # µs an image
print(f"\n{'':<21} at the end:    µs an image that it saves (median, range of {fall['n'].iloc[0]} rounds)")
print(f"{'':<21} times faster   {'in order':<20} at the end")
for name, gain in sorted(gains.items(), key=lambda pair: -pair[1]):
    in_order, at_end = (f"{round(row.median):4} ({row.min:.0f} to {row.max:.0f})" for row in saved[name].itertuples())
    print(f"{name:<21} × {gain:<12.2f} {in_order:<20} {at_end}{', with the own kernels' * (name == 'bf16')}")
without_gain = "no .item() a step", "memory kept", "pool before norm"
for name, kind in itertools.product(without_gain, ("gain", "gain at the end")):
    assert fall.loc[f"{kind}: {name}", "min"] < 1 < fall.loc[f"{kind}: {name}", "max"], "no gain that shows"
layer_ms = shipped["roofline"]["median"]
stem = [f"stem.{part}, {way}" for part in ("norm", "activation") for way in ("forward", "backward")]
least = 3 * 1e3 * layer_ms[stem].sum() / 512  # µs an image: these times are of 512, on a quarter of the values
print(f"pool before norm, by the times of its layers: {least:.0f}")
assert all(row.min < least < row.max for row in saved["pool before norm"].itertuples())
assert gains["bf16"] > 1.3
assert all(rows["min"].max() < rows["max"].min() for rows in saved.values()), "the two ranges of each overlap"
assert saved["images in one tensor"]["min"].min() > 100, "of which this one is far from zero"

# %% [markdown]
# ### Which help only on this hardware?
#
# bf16 is fast where a CPU has instructions that multiply such numbers (AVX512-BF16, or Intel's AMX). Where it has none,
# PyTorch computes bf16 in other ways, and then the trick is a brake. The same machine, told to use the older AVX2
# instructions only, as many laptops have them:

# %%
# NBVAL_CHECK_OUTPUT
narrow = shipped["avx2_bf16"].loc["AVX2 only: bf16 against fp32"]
whole = shipped["avx2"].loc["AVX2 only: ratio of the two"]
print("AVX2 only, bf16 against fp32, all other tricks on: ×", said(narrow))
print("AVX2 only, the course's loop (which then takes fp32) against the usual one: ×", said(whole))
assert narrow["max"] < 0.8
assert whole["median"] > 1.3

# %% [markdown]
# That is why `device.pick_precision` asks the machine first. (The usual loop of the last line is nearer to the course's
# than this lesson's: the same network with its own kernels, batches of 512, and workers where they help. So do not
# compare it with the figure above.) And "memory kept" does something on Linux with glibc only.
#
# ### Which cost accuracy?
#
# Tricks that change nothing but the order of sums, or of random numbers, cannot cost accuracy on average. bf16 rounds,
# own kernels round otherwise, pooling before norm makes another network, and larger batches another recipe. So train
# pairs, both of the same seed: the loop in batches of 128 with all tricks, against the same without one of them
# (without bf16, the own kernels go, too); and batches of 512 against it, for as many images, which is a quarter of the
# steps. (The learning rate grows with the batch, in proportion: [Goyal et al.
# 2017](https://arxiv.org/abs/1706.02677).)

# %%
cost = shipped["learning"]
names = ["bf16", "own kernels", "pool before norm", "batches of 512"]
fig, ax = plt.subplots(figsize=(7.2, 2.5))
for place, name in enumerate(names):
    row = cost.loc[f"accuracy by: {name}"]
    shade = plots.VERMILION if place > 1 else plots.BLUE
    ax.plot([row["min"], row["max"]], [place, place], color=shade, lw=2.5)
    ax.plot(row["median"], place, "o", color=shade)
    ax.annotate(f"{row['median']:+.2f}", (row["max"], place), (8, 0), textcoords="offset points", va="center")
ax.axvline(0, color=plots.GREY, lw=1)
ax.set_yticks(range(len(names)), [f"with {name}" for name in names])
ax.set(ylim=(len(names) - 0.5, -0.5), xlabel="difference of validation accuracy, points")
n_pairs = cost["n"].iloc[0]
ax.set_title(f"n = {n_pairs} pairs; line: lowest to highest", loc="left")
plots.save(
    fig,
    "07_accuracy",
    "Difference in validation accuracy by four tricks: batches of 512 cost points, the other three lie around zero",
)

# %%
# NBVAL_CHECK_OUTPUT
for name in names:
    row = cost.loc[f"accuracy by: {name}"]
    print(f"{name:<17} {row['median']:+.2f} points ({row['min']:+.2f} to {row['max']:+.2f}, n = {row['n']})")
accuracy = cost.loc["accuracy with all tricks but batches of 512"]
print("after 4 epochs of 6,144 images, in batches of 128:", said(accuracy, 1, " % of the validation images right"))
assert n_pairs >= 6
for name in names[:3]:
    row = cost.loc[f"accuracy by: {name}"]
    assert row["min"] < -0.4 < 0.4 < row["max"], f"{name}: no cost that shows"
assert cost.loc["accuracy by: batches of 512", "max"] < -1

# %% [markdown]
# Of the first three no cost shows. That is not to say none: the pairs scatter by half a point either way, so that a
# tenth or two could hide. Batches of 512 cost points, for as many images. How much of that the number of steps costs,
# and how much the rate, this does not tell.

# %% [markdown]
# ### Faster steps, or faster learning?
#
# A loop that handles more images a second is of use only if it does not need more images. So: how many **seconds** until
# 85 % of 1,000 validation images are right? They are looked at after every 1,024 training images, while the clock stands
# still, and the first time counts. The same seeds for all three loops; a constant learning rate, 0.1 for batches of 128
# and 0.4 for 512, in proportion again, neither of them tuned.

# %%
reached = shipped["target"]
labels = {"usual loop": "usual loop", "pool before norm": "all tricks,\nbatches of 128"}
labels |= {"batches of 512": "all tricks,\nbatches of 512"}
fig, axes = plt.subplots(1, 2, figsize=(7.6, 2.6), sharey=True)
for ax, unit in zip(axes, ("images", "s"), strict=True):
    table = reached[reached["unit"] == unit]
    for place, (name, shade) in enumerate(zip(labels, (plots.DARK, plots.BLUE, plots.VERMILION), strict=True)):
        row = table.loc[f"to 85%: {name}"]
        ax.barh(place, row["median"], color=shade, alpha=0.75, height=0.6)
        ax.plot([row["min"], row["max"]], [place, place], color=plots.INK, lw=2)
        text = f"{row['median']:,.0f}" if unit == "images" else f"{row['median']:.1f} s"
        ax.annotate(text, (row["max"], place), (6, 0), textcoords="offset points", va="center")
    name = {"images": "images", "s": "seconds"}[unit]
    ax.set(xlabel=f"{name} until 85 % are right", xlim=(0, 1.3 * table["max"].max()))
axes[0].set_yticks(range(3), labels.values())
axes[0].invert_yaxis()
axes[0].set_title(f"n = {reached['n'].iloc[0]} seeds; line: lowest to highest", loc="left")
plots.save(fig, "07_target", "Images and seconds to the target accuracy: small batches with all tricks are quickest")

# %%
# NBVAL_CHECK_OUTPUT
ratio = {name: reached.loc[f"to 85%: usual loop against {name}"] for name in list(labels)[1:]}
for name, row in ratio.items():
    print(f"seconds to 85 %, usual loop against {labels[name]!r}: × {said(row)}".replace("\\n", " "))
needed, taken, steps = reached[reached["unit"] == "images"], reached[reached["unit"] == "s"], {}
for name, size in (("pool before norm", 128), ("batches of 512", 512)):
    row = needed.loc[f"to 85%: {name}"]
    steps[size], low, high = (row[column] / size for column in ("median", "min", "max"))
    print(f"{steps[size]:.0f} steps of {size} images (median; {low:.0f} to {high:.0f}, n = {row['n']})")
print(f"images to 85 %: {4 * steps[512] / steps[128]:.2f} times as many in batches of 512 (medians)")
assert 0.8 < steps[128] / steps[512] < 1.25, "about as many"
assert ratio["pool before norm"]["min"] > 1.2
assert ratio["batches of 512"]["median"] < 1, "images a second are not learning a second"
assert ratio["batches of 512"]["max"] > 1, "by the median"
assert needed.loc["to 85%: batches of 512", "min"] > needed.loc["to 85%: pool before norm", "max"], "images"
assert taken.loc["to 85%: batches of 512", "min"] > taken.loc["to 85%: pool before norm", "max"], "seconds"

# %% [markdown]
# Look at the last trick again. In the waterfall, batches of 512 are faster. To 85 %, every run with them took longer
# than any in batches of 128 with the same tricks: about as many steps are needed, and each has four times as many
# images. By the median, that gives back all that the other tricks had brought against the usual loop, and more (but not
# with every seed: the range of that ratio reaches beyond 1). A rate four times as high did not make up for it. ([Goyal
# et al. 2017](https://arxiv.org/abs/1706.02677) let it rise slowly, as one-cycle does; here it is constant. What a
# warm-up would change was not measured.) **Images a second are not learning a second.**
#
# The course's full recipe (`experiments.FULL`) takes batches of 512 all the same. There the rate rises and falls, over
# 18 epochs of all training images; here it is constant, and the images are 12,288 of them, again and again. Batches of
# 128 were not compared there.

# %% [markdown]
# ## Why: the roofline
#
# Batch norm calculates nearly nothing. Is its time nearly nothing, too? And which layers would a faster multiplier help?
# A machine has two speeds. It can **calculate** so many FLOPs a second (the *peak*), and it can **move** so many bytes a
# second from and to memory (the *bandwidth*). An operation that does $I$ FLOPs for each byte that it moves (its
# *intensity*) cannot be faster than either allows ([Williams et al. 2009](https://doi.org/10.1145/1498765.1498785)):
#
# $$\text{FLOP/s} \le \min(\text{peak},\; I \cdot \text{bandwidth})$$
#
# On logarithmic axes that is a roof: a slope on the left, where memory decides, and a flat part on the right, where the
# multiplying units do. They meet at the *ridge*. First the two speeds: the peak as that of a large matrix product, the
# bandwidth as that of $a = b + s\,c$ on long vectors $a$, $b$ and $c$, with a number $s$ (the *triad* of
# [STREAM](https://www.cs.virginia.edu/stream/), McCalpin 1995). Each is the median of the rounds: a roof is what can be
# reached at most, but not what one lucky round reached. (Within a round, the best of a few repeats counts; of a layer,
# too.) On short vectors, which stay in the cache, the same sum gives a second, steeper slope.

# %%
roof_rows = shipped["roofline"]
per_s = {name: roof_rows.loc[name, "median"] * 1e9 for name in roof_rows.index if "product" in name or "width" in name}
roofs = {p: costs.Roof(per_s[f"peak of the {p} matrix product"], per_s["memory bandwidth"]) for p in ("fp32", "bf16")}
for what in per_s:
    print(f"{what}:", said(roof_rows.loc[what], 0, f" {roof_rows.loc[what, 'unit']}"))
for precision, roof in roofs.items():
    print(f"{precision}: ridge at {roof.ridge:.0f} FLOPs a byte")
assert roofs["bf16"].ridge > roofs["fp32"].ridge

# %% [markdown]
# Then each layer of the network, alone, on a batch of 512: its FLOPs (counted by `torch.utils.flop_counter`; those of
# norms, ReLUs and pooling by hand), the bytes that it has to move at least (what comes in, what goes out, the weights),
# and the time that it takes, forward and backward. Start with one, the first 3×3 convolution of the first block, 32 to 32
# channels on 14×14 pixels:

# %%
# NBVAL_CHECK_OUTPUT
torch.manual_seed(0)
network, batch, _ = costs.course_step(512)
layers = costs.layer_costs(network, batch.bfloat16(), "bf16").set_index(["layer", "direction"])
conv, norm = (layers.loc[f"layers.0.0.{name}", "forward"] for name in ("conv1", "norm1"))
by_hand = 2 * 512 * 14 * 14 * 32 * 32 * 9  # a multiply-add is two FLOPs
assert conv["flops"] == by_hand
for name, each in {"convolution": conv, "batch norm": norm}.items():
    gflop, mb = each["flops"] / 1e9, each["bytes"] / 1e6
    print(f"{name}: {gflop:.2f} GFLOP, {mb:.1f} MB: {each['flops'] / each['bytes']:.1f} FLOPs a byte")
assert 60 < conv["flops"] / norm["flops"] < 100, "about 80 times the FLOPs"

# %% [markdown]
# The convolution uses every value that it reads 9 × 32 times. Batch norm uses it a handful of times. So what do you say?

# %%
exercises.quiz("07.flops")

# %%
# NBVAL_CHECK_OUTPUT
conv_ms, norm_ms = (roof_rows.loc[f"layers.0.0.{name}, forward"] for name in ("conv1", "norm1"))
print("forward, milliseconds: convolution", said(conv_ms), "and batch norm", said(norm_ms))
quarter = norm_ms["median"] / conv_ms["median"]
print(f"batch norm: {norm['flops'] / conv['flops']:.1%} of the convolution's FLOPs, {quarter:.0%} of its time")
assert 0.1 < quarter < 1

# %%
import numpy as np

timed = roof_rows[roof_rows["unit"] == "ms"]["median"].rename("ms").reset_index()
timed[["layer", "direction"]] = timed["what"].str.split(", ", expand=True)
points = layers.join(timed.set_index(["layer", "direction"])["ms"]).reset_index()
points["speed"], points["intensity"] = points["flops"] / points["ms"] * 1e3, points["flops"] / points["bytes"]
KIND = {"convolution": plots.BLUE, "batch norm": plots.ORANGE, "activation": plots.GREEN, "pooling": PINK}
KIND |= {"head": plots.BROWN}


def draw_roof(ax, points, roofs, cache):
    """Each layer as a point beside the roof of the machine: filled forward, hollow backward."""
    x = np.logspace(-1.2, 3.2, 200)
    for precision, roof in roofs.items():
        ax.plot(x, [roof.limit(i) / 1e9 for i in x], "-" if precision == "bf16" else "--", color=plots.INK, lw=1.5)
        ax.text(x[-1], roof.peak / 1e9, precision, va="bottom", ha="right", fontsize=10)
    ax.plot(x, np.minimum(x * cache, max(roof.peak for roof in roofs.values())) / 1e9, ":", color=plots.INK, lw=1)
    for (kind, direction), each in points.groupby(["kind", "direction"], sort=False):
        face = KIND[kind] if direction == "forward" else "none"
        label = kind if direction == "forward" else None
        ax.scatter(each["intensity"], each["speed"] / 1e9, 34, edgecolors=KIND[kind], facecolors=face, label=label)
    ax.set(xscale="log", yscale="log", xlabel="intensity (FLOPs a byte)", ylabel="GFLOP/s")


# %%
fig, ax = plt.subplots(figsize=(7.2, 3.9))
draw_roof(ax, points, roofs, per_s["cache bandwidth"])
ax.legend(loc="lower right")
title = f"filled: forward, hollow: backward; dotted: from the cache; medians, n = {roof_rows['n'].iloc[0]}"
ax.set_title(title, loc="left", fontsize=10)
plots.save(
    fig,
    "07_roofline",
    "Speed against intensity, a point a layer: ReLUs between the slopes of memory and cache, convolutions near the top",
)
reach = {kind: (each["flops"].sum() / each["ms"].sum() / 1e6) for kind, each in points.groupby("kind", sort=False)}
for kind in ("convolution", "batch norm", "activation", "pooling"):
    print(f"{kind:<11} {reach[kind]:7.1f} GFLOP/s, {100 * reach[kind] * 1e9 / roofs['bf16'].peak:5.1f} % of the peak")
assert reach["convolution"] > 3 * reach["batch norm"]
ridge, block = roofs["bf16"].ridge, points["layer"].str.contains(r"layers.*conv")
assert points.loc[points["kind"].isin(["batch norm", "activation", "pooling"]), "intensity"].max() < ridge
assert points.loc[block, "intensity"].min() > ridge

# %% [markdown]
# Norms, ReLUs and pooling stand left of the ridge, where the slopes are: a faster multiplier would not help them.
# (Horace He calls such layers *memory-bound*, in [Making deep learning go brrrr](https://horace.io/brrr_intro.html).)
# What can help is to move fewer bytes: bf16 halves them, and pooling **before** the norm quarters what the first norm
# reads. The 3×3 convolutions of the blocks stand right of the ridge, where the peak decides. (The stem's convolution,
# of one channel, and the 1×1 shortcuts use each value less often.)
#
# But is it main memory that those on the left wait for? How near does each kind come to the limit at its intensity, by
# the slope of main memory and by that of the cache?

# %%
L3 = roof_rows["median"].get("largest cache", np.nan) * 2**20  # bytes, of the rows' machine (Linux alone says it)
from_cache = costs.Roof(roofs["bf16"].peak, per_s["cache bandwidth"])
for name, roof in {"memory": roofs["bf16"], "cache": from_cache}.items():
    points[name] = points["speed"] / [roof.limit(intensity) for intensity in points["intensity"]]
near = points.groupby("kind", sort=False)[["memory", "cache", "bytes"]].agg(["min", "max"])
for kind in ("convolution", "batch norm", "activation", "pooling"):
    shares = [f"{low:4.0%} to {high:4.0%}" for low, high in (near.loc[kind, "memory"], near.loc[kind, "cache"])]
    low, high = near.loc[kind, "bytes"] / 1e6
    print(f"{kind:<11} {shares[0]} of its limit, {shares[1]} with the cache's slope; moves {low:.0f} to {high:.0f} MB")
print(f"the long vectors: {3 * 2**27 / 1e6:.0f} MB; the cache: {L3 / 1e6:.0f} MB")
luckier = roof_rows.loc["memory bandwidth", "max"] / roof_rows.loc["memory bandwidth", "median"]
low, high = near.loc["activation", "memory"] / luckier
below = (points.loc[points["kind"] == "activation", "memory"] < luckier).mean()
print(f"by memory's fastest round: activation {low:.0%} to {high:.0%} of its limit, {below:.0%} of them below it")
assert near.loc["activation", ("memory", "min")] > 1 > near.loc["activation", ("cache", "max")], "between the slopes"
assert near.loc["activation", ("bytes", "max")] < L3, "its maps fit into the cache"
assert 0.5 < below < 1, "by memory's fastest round most of them are below"
assert near.loc[["batch norm", "pooling"], ("memory", "max")].max() < 1, "below both"
assert near.loc["convolution", ("memory", "max")] > 1
zeros = {side: 1 - ((3 * side - 2) / (3 * side)) ** 2 for side in (2, 4)}  # share of products with the padding
assert np.allclose([zeros[2], zeros[4]], [5 / 9, 0.31], atol=0.005)

# %% [markdown]
# ReLUs lie between the two slopes: faster than main memory gives in the median round, slower than the cache. (By its
# fastest round, most of them would lie below both.) What they move fits into the cache, other than the long vectors,
# and comes again at every repeat, so it is probably served from there. This roofline does not say which of the two they
# wait for. Batch norm and pooling stay below both slopes. Batch norm passes over its input more than once, since it has
# to know the mean before it can subtract it; what else slows these two down, a roofline does not say.
#
# Some convolutions stand above the roof, which nothing can. The peak is what *one* large product reached. And the FLOPs
# are those of the formula, products with the zeros of the padding included: on a map of 2×2 pixels these are 5 of 9,
# which the course's own kernel leaves out, on one of 4×4 still 31 %, of which the library's kernels may leave out a
# part. So these are shares of the formula's FLOPs, not of those that were carried out.
#
# ### Your machine
#
# The same for the machine at hand, with a batch of 64, which fits into many a cache. Filled and hollow as above; in grey,
# the points from there. (The long vectors are 50 MB here. On a CPU whose cache holds them, the slope is the cache's.)

# %%
own_network, own_images, own_precision = costs.course_step(64)
peaks = {p: loops.matmul_peak(own_images.device, p, 1, side=1024) for p in roofs if p in ("fp32", own_precision)}
memory = costs.bandwidth(2**24, 5)
own = costs.layer_costs(own_network, own_images, own_precision)
with device.freed_memory_kept():
    own = own.merge(costs.layer_seconds(own_network, own_images, own_precision, 3), on=["layer", "direction"])
own["speed"], own["intensity"] = own["flops"] / own["seconds"], own["flops"] / own["bytes"]
own_roofs = {precision: costs.Roof(peak, memory) for precision, peak in peaks.items()}
fig, ax = plt.subplots(figsize=(7.2, 3.9))
ax.scatter(points["intensity"], points["speed"] / 1e9, 34, color="0.7", label="shipped", zorder=0)
draw_roof(ax, own, own_roofs, costs.bandwidth(2**20, 30))
ax.legend(loc="lower right")
ax.set_title(f"your machine: {own_precision}, batch of 64", loc="left")
plots.save(
    fig,
    "07_own_roofline",
    "Speed against intensity: your machine's layers and its own roof, the shipped layers in grey",
)
assert own.groupby("kind")["speed"].median()["convolution"] > own.groupby("kind")["speed"].median()["activation"]

# %% [markdown]
# ### FLOPs are not time
#
# Papers compare networks by FLOPs. How well does that order the layers by the time that they take? (Spearman's rank
# correlation is 1 where two orders agree, and 0 where they have nothing to do with each other.)

# %%
from scipy import stats

fig, ax = plt.subplots(figsize=(7.2, 3.4))
for (kind, direction), each in points.groupby(["kind", "direction"], sort=False):
    face, label = (KIND[kind], kind) if direction == "forward" else ("none", None)
    ax.scatter(each["flops"] / 1e9, each["ms"], 34, edgecolors=KIND[kind], facecolors=face, label=label)
ax.set(xscale="log", yscale="log", xlabel="GFLOP for a batch of 512 (logarithmic)", ylabel="milliseconds (logarithmic)")
ax.legend(loc="lower right")
ax.set_title(f"filled: forward, hollow: backward; medians, n = {roof_rows['n'].iloc[0]}", loc="left", fontsize=10)
plots.save(
    fig,
    "07_flops",
    "Milliseconds against FLOPs, a point a layer: rising together, but pooling takes as long as large convolutions",
)
kinds = {"all layers": set(KIND), "convolutions": {"convolution"}, "all others": set(KIND) - {"convolution"}}
agree = {}
for name, of in kinds.items():
    chosen = points[points["kind"].isin(of)]
    agree[name] = stats.spearmanr(chosen["flops"], chosen["ms"])[0]
by_kind = points.groupby("kind", sort=False)[["flops", "ms", "bytes"]].sum() / points[["flops", "ms", "bytes"]].sum()
print("rank correlation of FLOPs and time:", ", ".join(f"{value:.2f} ({name})" for name, value in agree.items()))
print((100 * by_kind).map("{:.1f} %".format).rename(columns={"ms": "time"}).to_string())

# %% [markdown]
# Over all layers, FLOPs do order them, roughly: the expensive ones are convolutions, and those have most FLOPs. But
# that is all they can do. Norms, ReLUs and pooling have next to no FLOPs and take a good part of the time. How much,
# FLOPs cannot say, and bytes alone cannot either: compare the last two columns. And among convolutions a FLOP has no
# fixed price. (By the formula. One of them is left out here: its kernel skips all of the padding, so that the formula
# counts FLOPs that it does not do. The library behind the others may skip a part, too; how much, these rows do not
# tell.)

# %%
cheap = [kind for kind in by_kind.index if kind not in ("convolution", "head")]
rest = by_kind.loc[cheap].sum()
chosen = points[(points["kind"] == "convolution") & (points["layer"] != "layers.3.0.conv2")]
price = (chosen["ms"] / chosen["flops"]).set_axis(chosen["layer"] + ", " + chosen["direction"])
print(f"norms, ReLUs and pooling: {rest['flops']:.1%} of the FLOPs, {rest['ms']:.0%} of the time")
print(f"convolutions: a FLOP of {price.idxmax()} costs {price.max() / price.min():.0f} times one of {price.idxmin()}")
assert rest["ms"] > 5 * rest["flops"]
assert price.max() / price.min() > 3

# %% [markdown]
# ## How the cost grows
#
# Four things make training more expensive: more channels, more layers, larger images, more images. The first three
# against their FLOPs: where a curve is flatter than the dashed line, time grows more slowly than the FLOPs do.

# %%
from utils.model import CNN, CNNConfig

grown, wider = (shipped[name][["median", "min", "max"]].T for name in ("growth", "width"))
grids = {"width": {}, "layers": {}, "side of the image": {}}  # value → (median, min, max of µs an image), config, side
for n in (16, 32, 64, 128):
    grids["width"][n] = wider[f"time an image, width {n}"], CNNConfig(width=n), 28
for n in (4, 10, 28):
    grids["layers"][2 * n + 2] = grown[f"time an image, {2 * n + 2} layers"], CNNConfig(depth=n), 28
for n in (14, 28, 56):
    grids["side of the image"][n] = grown[f"time an image, {n}×{n} pixels"], CNNConfig(), n

# %%
fig, ax = plt.subplots(figsize=(7.2, 3.6))
drawn = {}
for (what, grid), shade in zip(grids.items(), (plots.BLUE, plots.ORANGE, plots.GREEN), strict=True):
    flops = np.array([loops.step_flops(CNN(config), (1, side, side)) for _, config, side in grid.values()]) / 1e9
    times, low, high = np.array([time for time, *_ in grid.values()]).T
    ax.plot(flops, times, "o-", color=shade, label=what)
    middle = list(grid).index({"width": 32, "layers": 10, "side of the image": 28}[what])  # the course's own network
    shift = {"width": (4, -12), "layers": (4, -13), "side of the image": (-16, 5)}[what]
    first = {"width": (-20, 4), "side of the image": (-20, -5)}.get(what, shift)
    for place, value in enumerate(grid):
        if place != middle:
            at = flops[place], times[place]
            beside = shift if place else first
            ax.annotate(str(value), at, beside, textcoords="offset points", color=shade, fontsize=10)
    ratios = np.array([times[-1] / times[middle], low[-1] / high[middle], high[-1] / low[middle]])
    drawn[what] = flops, times, 2 ** (np.log(ratios) / np.log(flops[-1] / flops[middle]))  # for twice the FLOPs
ax.annotate("the course's network", (flops[middle], times[middle]), (8, -14), textcoords="offset points", fontsize=10)
ax.plot(flops[middle] * np.array([0.2, 20]), times[middle] * np.array([0.2, 20]), "--", color=plots.GREY, lw=1)
ax.set(xscale="log", yscale="log", xlabel="GFLOP an image and step", ylabel="µs an image")
ax.legend(title=f"dashed: time ∝ FLOPs\nmedians, n = {shipped['growth']['n'].iloc[0]}")
plots.save(fig, "07_growth", "Time an image against FLOPs as width, depth or image size grow: flatter, by the medians")

# %%
# NBVAL_CHECK_OUTPUT
assert set(shipped["growth"]["n"]) == set(shipped["width"]["n"]), "the figure gives one n"
twice = {}
for what, (_, _, (middle, low, high)) in drawn.items():
    twice[what] = f"{middle:.2f} times ({low:.2f} to {high:.2f})"
    print(f"{what:<18} from the course's network on: twice the FLOPs, {twice[what]} the time")
print("(by the medians, and at least and at most by the rounds' ranges)")
for what, value in ("width", "16 instead of 32"), ("side of the image", "14 instead of 28"):
    flops, times, _ = drawn[what]
    print(f"{what} {value}: {flops[0] / flops[1]:.0%} of the FLOPs, {times[0] / times[1]:.0%} of the time")
    assert times[0] / times[1] > 1.2 * flops[0] / flops[1]
assert all(drawn[what][2][2] < 2 for what in ("width", "layers"))
images = shipped["images"].loc["time an image, 60,000 against 1,000"]
print("time an image, 60,000 images against 1,000: ×", said(images))
threads = shipped["growth"].filter(like="threads", axis=0)["median"]
print(f"{threads.index[-1].rpartition(', ')[2]} against one: × {threads.iloc[0] / threads.iloc[-1]:.2f}")
assert abs(images["median"] - 1) < 0.1
assert threads.iloc[0] / threads.iloc[-1] > 1.2

# %% [markdown]
# Upward, by width and by depth, twice the FLOPs cost less than twice the time; for larger images the rounds do not rule
# out twice. Between depth and width they show no clear order. (What it brings in accuracy is another matter: lesson 02.)
# **Downward, less is saved than the FLOPs promise.** Each operation has a fixed cost. With half the channels, moreover,
# the FLOPs of most convolutions fall to a quarter but the passes over memory to a half, and fewer channels get less out
# of the multiplier. With smaller images the weights stay as many, and with them the optimizer's work. Which of these it
# is, these rows do not tell. Twice the images take twice the time, within the noise; and two threads are not twice as
# fast as one: the last line says what the second one brings.
#
# ## Two processes, eight machines
#
# The next step is more machines. In *data-parallel* training each process takes its share of every batch, and then all
# of them sum up their gradients: an **all-reduce**. Two processes on the two cores of the rows' machine, against one
# process on both:

# %%
# NBVAL_CHECK_OUTPUT
both = shipped["processes"].loc["two processes against one"]
print("images/s, two processes that share each batch against one process: ×", said(both))
assert both["max"] < 1, "on one machine that is a loss"

# %% [markdown]
# What does talking cost? To sum up $n$ bytes two processes need a **latency** $\alpha$, however few they are, and a time
# $\beta$ for each byte, in all a time of
#
# $$T(n) = \alpha + \beta n$$
#
# Nine sizes from 256 bytes to 16 MiB, by gloo, PyTorch's library for processes on CPUs; each value is the mean of thirty
# all-reduces, because a step pays for the slow ones, too. The line has the least relative squared error.

# %%
talk = shipped["talk"]
heard = talk[talk["unit"] == "µs"]
sizes = [int(what.split()[2]) for what in heard.index]
model = costs.Talk.fitted(sizes, 1e-6 * heard["median"])
fig, ax = plt.subplots(figsize=(7.2, 3.2))
middle = heard["median"].to_numpy()
spread = [middle - heard["min"].to_numpy(), heard["max"].to_numpy() - middle]
ax.errorbar(sizes, middle, yerr=spread, fmt="o", color=plots.BLUE, capsize=3, label="measured")
x = np.logspace(2, 7.5, 100)
ax.plot(x, [1e6 * model.seconds(size) for size in x], color=plots.INK, label="α + βn")
ax.axvline(model.latency / model.per_byte, color=plots.GREY, ls="--", lw=1)
ax.set(xscale="log", yscale="log", xlabel="bytes of a message", ylabel="µs an all-reduce")
ax.legend(title=f"median and range, n = {heard['n'].iloc[0]} rounds")
plots.save(
    fig,
    "07_talk",
    "Time of an all-reduce against message size: level for small messages, then rising, close to the fitted model",
)
print(f"α = {1e6 * model.latency:.0f} µs, 1/β = {1e-9 / model.per_byte:.1f} GB/s; n = {heard['n'].iloc[0]} a size")
print("dashed: the size from which on bytes cost more than the latency")
assert len(sizes) >= 8

# %% [markdown]
# Does the line predict a whole training step? In a step of the course's network on two processes, the first hands its
# statistics on. Then each batch norm sends a message on the way there (its statistics must be those of **all** images),
# and one on the way back. Last comes the gradient of every weight. `costs.messages` lists them, the gradients as one
# message: in truth PyTorch sends a first piece of about 1 MB, so that talking can begin early, then pieces of up to 25
# MB (here one more), each of which costs $\alpha$ more. The rest of the step is calculating, and that is measured
# separately: the same two processes, in the same round, but muted. Each takes its own numbers for those of all.

# %%
# NBVAL_CHECK_OUTPUT
net = CNN(CNNConfig())
sent = costs.messages(net)
print(f"{len(sent)} messages a step, {sum(sent) / 1e6:.1f} MB, {max(sent) / sum(sent):.0%} of that in the gradients")
muted, joined = (talk.loc[f"a step shared by two processes{end}"] for end in (" that say nothing", ""))
predicted = 1e3 * costs.step_seconds(1e-3 * muted["median"], net, model)
error = predicted / joined["median"] - 1
print("a step of 512 images: muted", said(muted, 0, " ms"))
print(f"predicted {predicted:.0f} ms, measured {said(joined, 0, ' ms')}: off by {error:+.0%}")
talking, guessed = joined["median"] - muted["median"], predicted - muted["median"]
print(f"of that, talking: predicted {guessed:.0f} ms, measured {talking:.0f} ms: off by {guessed / talking - 1:+.0%}")
slowest = costs.Talk.fitted(sizes, 1e-6 * heard["max"])  # through the highest round of every size
at_worst = 1e3 * costs.step_seconds(1e-3 * muted["median"], net, slowest) - muted["median"]
print(f"by the highest round of every size: predicted {at_worst:.0f} ms of talking")
waiting = 1e3 * len(sent) * model.latency
print(f"{waiting / guessed:.0%} of the predicted talking is the latency of its {len(sent)} messages")
assert waiting / guessed > 0.9
assert -0.25 < error < 0
assert 0.4 < guessed / talking < 0.6, "of the talking itself, about half"
assert guessed < at_worst < 0.9 * talking

# %% [markdown]
# The step is predicted within a quarter, since most of it is calculating. Of the talking, only about half is. Nearly
# all of what is predicted is latency, and that is uncertain: see how far the rounds of small messages scatter. But the
# highest of them would not make up for it. Nor would it help to take each message for what it is: the statistics on the
# way there are gathered, and the first process's own are handed on, both of which take less than an all-reduce. What
# the model lacks is waiting for the slower process (the all-reduces above begin together), the second piece of the
# gradients, and PyTorch's own work around the messages, which the muted step does without. How much each is, these rows
# do not tell.
#
# ### Eight GPUs and ImageNet
#
# Now extrapolate, with the same model. In a ring of $p$ processes an all-reduce of $n$ bytes takes $2(p - 1)$ messages,
# one after the other, of $n/p$ bytes each ([Thakur et al. 2005](https://doi.org/10.1177/1094342005051521); [Patarasuk &
# Yuan 2009](https://doi.org/10.1016/j.jpdc.2008.09.002)). Between two processes that is two messages of $n/2$ bytes, and
# our $\alpha$ is the latency of both together. So one message costs $\alpha/2 + \beta n/p$, and all of them
#
# $$T(n, p) = (p - 1)\,\alpha + \frac{2 (p - 1)}{p}\, \beta n$$
#
# **Nothing below is measured.** These are assumptions, and you may change each of them:
#
# | | assumed |
# |---|---|
# | network | ResNet-50: 25.6 million weights, gradients of 4 bytes each; 8.2 GFLOP forward an image, three times that a step |
# | data | ImageNet: 1.28 million images of 224×224, 256 a GPU and step |
# | a GPU | 60 TFLOP/s sustained, about what [NVIDIA's own script](https://github.com/NVIDIA/DeepLearningExamples) reaches on an A100 with this network |
# | links | bandwidth, and latency of an all-reduce between two: NVLink 200 GB/s, 20 µs, up to 8 GPUs; PCIe 12 GB/s, 30 µs, up to 8 GPUs; Ethernet, one GPU a machine, each with its own 10 Gbit/s, 100 µs |
# | overlap | none: nobody talks while calculating |
# | gradients | all in one message |

# %%
WEIGHTS, FLOPS, SUSTAINED, EPOCH, SHARE = 25.6e6, 3 * 8.2e9, 60e12, 1.28e6, 256  # assumptions
LINKS = {"NVLink": (20e-6, 200e9), "PCIe": (30e-6, 12e9), "10 Gbit Ethernet": (100e-6, 10e9 / 8)}
GPUS = (1, 2, 4, 8, 16, 32)


def efficiency(processes, link, share=SHARE):
    """Share of the time in which GPUs calculate, and the seconds of an epoch."""
    latency, bandwidth = LINKS[link]
    calculating = share * FLOPS / SUSTAINED
    talking = costs.Talk(latency, 1 / bandwidth).seconds(4 * WEIGHTS, processes) if processes > 1 else 0.0
    step = calculating + talking
    return calculating / step, EPOCH / (processes * share) * step


# %%
def draw_scaling(share):
    """The efficiency against the number of GPUs, a line a link."""
    fig, ax = plt.subplots(figsize=(7.2, 3.0))
    for link, shade, below in zip(LINKS, (plots.BLUE, plots.ORANGE, plots.VERMILION), (8, -14, 8), strict=True):
        values = [100 * efficiency(p, link, share)[0] for p in GPUS if p <= 8 or "Ethernet" in link]
        ax.plot(range(len(values)), values, "o-", color=shade)
        style = {"textcoords": "offset points", "color": shade, "ha": "right", "fontweight": "bold"}
        ax.annotate(link, (len(values) - 1, values[-1]), (-4, below), **style)
    ax.set(xlabel="GPUs", ylabel="time spent calculating (%)", ylim=(0, 118))
    ax.set_title(f"assumed, not measured; {share} images a GPU and step", loc="left")
    ax.set_xticks(range(len(GPUS)), GPUS)
    return fig


# %%
plots.save(
    draw_scaling(SHARE),
    "07_scaling",
    "Share of time spent calculating by number of GPUs: nearly all with NVLink, with Ethernet less than half from 4 on",
)
for link in LINKS:
    useful, seconds = efficiency(8, link)
    print(f"8 GPUs, {link:<17} {useful:.0%} of the time calculating, {seconds:.0f} s an epoch of ImageNet")
assert efficiency(2, "10 Gbit Ethernet")[0] > 0.5 > efficiency(4, "10 Gbit Ethernet")[0]
assert efficiency(8, "NVLink")[0] > efficiency(8, "PCIe")[0] > efficiency(8, "10 Gbit Ethernet")[0]

# %% [markdown]
# With fewer images a GPU, there is less to calculate between two messages. Move the slider: how many images does each
# of 8 GPUs need so that with Ethernet it spends half of the time calculating? It is between two of the slider's values:
# compute it, by the formula and the assumptions above.

# %%
plots.explore(draw_scaling, "images a GPU", {f"{n}": n for n in (8, 16, 32, 64, 128, 256, 512)}, start="64")

# %%
half_calculating = ...  # images a GPU and step
exercises.check("07.half", half_calculating)
# exercises.hint("07.half")

# %% jupyter={"source_hidden": true} tags=["solution"]
# Solution: click the dots to unfold it
latency, bandwidth = LINKS["10 Gbit Ethernet"]
by_ethernet = costs.Talk(latency, 1 / bandwidth).seconds(4 * WEIGHTS, 8)
assert exercises.check("07.half", by_ethernet * SUSTAINED / FLOPS, quiet=True)

# %% [markdown]
# The batch grows with the machines, and a learning rate that suits it has to grow, too. [Goyal et al.
# 2017](https://arxiv.org/abs/1706.02677) found how far that goes: in proportion, with a warm-up, up to 8,192 images.

# %% [markdown]
# ## A record of our own
#
# So far: the same learning in less time. Now turn it round. **How much learning fits into a few minutes?** People race
# for that, too: the least time to 94 % of CIFAR-10's test images.
# [airbench94](https://github.com/KellerJordan/cifar10-airbench) (Jordan 2024) says 2.6 seconds, on one large GPU. What
# follows is a network after its ideas, for two cores: one more `nn.Module`, in `utils/record.py`, that our loop trains
# like any other.
#
# | idea | why it might help | when left out |
# |---|---|---|
# | **wide convolutions of stride 1**, with pooling in between | large products, right of the ridge, come near the peak | half as wide |
# | **a frozen first layer that whitens** patches of 2×2 pixels | neighbours are alike; what is new in each is there from the first step on | a first layer that learns |
# | **Muon**, an optimizer whose steps are orthogonal | directions that gradients seldom point to are learned as fast as the others | SGD |
# | **flips that alternate**: mirrored in every second epoch | any two successive epochs show every image both ways | flips by chance |
# | **small images first** (not airbench94's: [Howard 2018](https://www.fast.ai/posts/2018-04-30-dawnbench-fastai.html)) | fewer pixels are fewer FLOPs, and coarse forms can be learned from few | whole images throughout |
#
# **Whitening** you can check by hand. The layer has each filter twice, once with its sign turned, since the activation
# that follows cuts off most of what is negative. What leaves the first half of the filters should have no correlation
# left from channel to channel (lesson 01 has that picture for pixels), and a variance of 1. (All of it about zero: the
# mean of normalized pixels is near it.) The filters are computed once and stay. Their biases learn, for the first tenth
# of the run (airbench94's: for three of eight epochs); after that the way back ends one layer earlier, and that layer has
# the largest maps.

# %%
# NBVAL_CHECK_OUTPUT
import torch.nn.functional as F

from utils import muon, record

fashion = data.load(progress=False)
few = data.normalize(fashion.train.images[:1000], data.channel_stats(fashion.train.images))
patches = few.unfold(2, 2, 1).unfold(3, 2, 1).reshape(-1, 4)  # patches × 4 pixels
filters = record.whitening(few)[:4]  # the other four are these with the sign turned
white = F.conv2d(few, filters).movedim(1, 3).reshape(-1, 4)  # patches × 4 filters
for name, values in {"pixels of a patch": patches, "whitened": white}.items():
    moments = values.T @ values / len(values)
    apart = (moments / moments.diagonal().outer(moments.diagonal()).sqrt()).fill_diagonal_(0).abs().max()
    low, high = moments.diagonal().aminmax()
    print(f"{name:<17} largest correlation {apart:.2f}, variances {low:.2f} to {high:.2f}")
assert apart < 0.01
assert (moments.diagonal() - 1).abs().max() < 0.05

# %% [markdown]
# **Pooling** by 2×2 drops the last row and column of a map with an odd number of them. The convolution in front of it
# need not compute what is dropped, and the network stays the same. (Ours leaves it out on maps of up to
# `record.LARGE_MAP` pixels a side.)

# %%
# NBVAL_CHECK_OUTPUT
layer = record.conv(8, 8, record.EvenConv2d)
for side in (15, 11, 7, 5):  # of the record's smaller maps, for images of 32 and of 24 pixels
    maps = torch.randn(2, 8, side, side)
    all_of_it, cut = F.conv2d(maps, layer.weight, padding=1), layer(maps)
    torch.testing.assert_close(F.max_pool2d(cut, 2), F.max_pool2d(all_of_it, 2))
    saved = 1 - cut.numel() / all_of_it.numel()
    print(f"{side}×{side}: {saved:.0%} fewer numbers to compute, the same {side // 2}×{side // 2} maxima")

# %% [markdown]
# **Muon** takes the gradient of a weight (with momentum) as a matrix, an output channel a row. The *singular value
# decomposition* (SVD) is $G = U S V^\top$, with the singular values on the diagonal of $S$; Muon steps by about $U
# V^\top$: the same directions, all with the same length. An SVD a step would be slow. A few rounds of
#
# $$X \leftarrow a X + (b A + c A^2) X, \quad A = X X^\top$$
#
# from $X = G / \lVert G \rVert$ are matrix products alone, which machines are good at. Their $a$, $b$ and $c$
# (`muon.COEFFICIENTS`) are chosen to lift small singular values fast, not to end at exactly 1. The record takes three
# rounds. Below is the gradient of one convolution, before the first step:

# %%
torch.manual_seed(0)
begun = record.network(fashion.take(1000), record.RecordConfig(widths=(32, 64, 64)), record.RECIPE)
F.cross_entropy(begun(few[:200]), fashion.train.labels[:200]).backward()
gradient = begun.blocks[4].weight.grad.flatten(1)  # 32×32×3×3 → 32×288
u, s, vt = torch.linalg.svd(gradient, full_matrices=False)
fig, ax = plt.subplots(figsize=(7.2, 2.9))
ax.plot(s / s.max(), "o-", color=plots.DARK, label="the gradient, SGD's step (largest = 1)")
condition = {"gradient": s.max() / s.min()}
for steps, shade in {1: plots.SKY, 3: plots.BLUE, 5: plots.GREEN}.items():
    step = muon.orthogonalized(gradient, steps).float()
    values = torch.linalg.svdvals(step)
    condition[f"after {steps}"] = values.max() / values.min()
    agree = (step * (u @ vt)).sum() / step.norm() / (u @ vt).norm()
    ax.plot(values, "o-", ms=4, color=shade, label=f"after {steps}, cosine to $UV^\\top$: {agree:.2f}")
ax.set(yscale="log", xlabel="singular value, from the largest to the smallest", ylabel="size")
ax.legend(loc="lower center", bbox_to_anchor=(0.45, 1), ncols=2)
plots.save(fig, "07_muon", "Singular values of a gradient, falling off, and of Muon's steps: level after 5 rounds")
assert agree > 0.9
print("largest by smallest singular value:", ", ".join(f"{what} {ratio:,.1f}" for what, ratio in condition.items()))

# %% [markdown]
# Now leave out one idea at a time, and train again: all training images of CIFAR-10 (the JPEG copies that lesson 06
# used), each network tested once: every image as it is, and then with *flips and shifts*, mirrored and moved by a pixel,
# the answers averaged. (The recipe is not the first that was tested: lesson 06 has the log.) Width cannot be left out,
# only halved: for as many epochs as the record, as all others here, and once for about as many **seconds**. Which idea
# costs most accuracy, for as many epochs?

# %%
exercises.quiz("07.record")

# %%
from utils import evidence, full_training

RECORD = "cifar10-jpeg, record"
changed = {  # what is said of it → the name of its runs
    "half as wide": "half as wide",
    "half as wide, as many seconds": "half as wide, as long",
    "SGD instead of Muon": "SGD",
    "a first layer that learns": "first layer learned",
    "flips by chance": "random flips",
    "whole images throughout": "one size",
}
runs, _ = full_training.read()
runs = runs[runs["run"].isin([RECORD, *(f"{RECORD}, {run}" for run in changed.values())])]
views = runs[(runs["split"] == "test") & (runs["metric"] == full_training.FLIPS)]
views = 100 * views.pivot(index="seed", columns="run", values="value").dropna()  # percent, a row a seed
of_run = (
    runs.groupby(["run", "seed"])["seconds"].max().groupby("run").median().rename(lambda run: run[len(RECORD) + 2 :])
)
left_out = {what: evidence.paired(views[f"{RECORD}, {run}"], views[RECORD]) for what, run in changed.items()}
ended = runs.groupby("run")[["epoch", "step"]].max().drop(f"{RECORD}, {changed['half as wide, as many seconds']}")
assert ended.drop_duplicates().shape[0] == 1, "as many epochs"

# %%
fig, ax = plt.subplots(figsize=(7.2, 3.2))
for place, row in enumerate(left_out.values()):
    ax.plot([row["low"], row["high"]], [place, place], color=plots.BLUE, lw=2.5)
    ax.plot(row["difference"], place, "o", color=plots.BLUE)
ax.axvline(0, color=plots.GREY, lw=1)
ax.set_yticks(range(len(left_out)), [f"{what}: {of_run[run]:.0f} s" for what, run in changed.items()])
ax.set(ylim=(len(left_out) - 0.5, -0.5), xlabel="test accuracy, flips and shifts, against the record (points)")
ax.set_title(
    f"paired by seed, 95 % interval, n = {len(views)}; the record: {of_run['']:.0f} s", loc="left", fontsize=10
)
plots.save(
    fig, "07_record", "Accuracy with an idea left out: half the width loses most, then SGD; whole images gain a little"
)

# %%
# NBVAL_CHECK_OUTPUT
plain = 100 * full_training.finals(runs).set_index("run").loc[RECORD, ["accuracy", "low", "high"]]
mean, half = views[RECORD].mean(), plots.half_intervals(views[[RECORD]].T).item()
looks = f"{mean:.2f} % ({mean - half:.2f} to {mean + half:.2f}) with flips and shifts"
one_look = f"{plain['accuracy']:.2f} % ({plain['low']:.2f} to {plain['high']:.2f})"
print(f"the record: {looks} of the test images right, {one_look} without")
print(f"(95 % intervals, n = {len(views)}); {of_run['']:.0f} s a run")
corrected = dict(zip(left_out, evidence.holm([row["p"] for row in left_out.values()]), strict=True))
for what, row in left_out.items():
    print(f"{what:<29} {evidence.points(row, 2)}, p = {corrected[what]:.3f}")
print(f"(p: corrected for all {len(left_out)}, Holm)")
assert left_out["half as wide"]["high"] < left_out["SGD instead of Muon"]["low"] < 0, "the most"
assert left_out["half as wide, as many seconds"]["high"] < 0
assert all(left_out[w]["low"] < 0 < left_out[w]["high"] for w in ("a first layer that learns", "flips by chance"))
assert left_out["whole images throughout"]["low"] > 0
clear = ("half as wide", "half as wide, as many seconds", "SGD instead of Muon")
assert max(corrected[what] for what in clear) < 0.05 < corrected["whole images throughout"]

# %%
# NBVAL_CHECK_OUTPUT
nets = (
    record.RecordNet(3, 10, full_training.PLANS[plan].network).eval() for plan in ("record, half as wide", "record")
)
narrow_flops, all_flops = (loops.step_flops(net, loops.WIDE_IMAGE) for net in nets)
longer = {run: of_run[run] / of_run[""] - 1 for run in changed.values()}
print(f"half as wide: {narrow_flops / all_flops:.0%} of the FLOPs, {1 + longer['half as wide']:.0%} of the time")
more = full_training.PLANS["record, half as wide, as long"].recipe.epochs
print(f"for about as many seconds: {more} epochs, {longer['half as wide, as long']:+.0%} of the time")
print(f"whole images throughout: {longer['one size']:+.0%}", end="; ")
print(f"a first layer that learns: {longer['first layer learned']:+.0%}", end="; ")
print(f"flips by chance, which cost nothing: {longer['random flips']:+.1%}")
assert narrow_flops / all_flops < 0.3 < 1 + longer["half as wide"] < 0.5
assert abs(longer["half as wide, as long"]) < 0.05
assert abs(longer["random flips"]) < longer["first layer learned"] / 2 < longer["one size"] / 2
by_idea = ", ".join(
    f"{what} {row['difference']:+.2f} ({row['low']:+.2f} to {row['high']:+.2f})" for what, row in left_out.items()
)

# %% [markdown]
# For as many epochs, **half the width** costs most. It has about a quarter of the FLOPs, but takes more than a third of
# the time: norms, activations and pooling are only halved, and narrow layers may come less near to the peak. So the
# fairer question is the second: for as many *seconds*, nearly three times as many epochs, half the width is still behind.
# (By the record's recipe, whose rates were not tuned for it.)
#
# **Small images** seem to cost a few tenths of a point (the interval keeps clear of zero, but *p*, corrected for all
# six, is not below 0.05), and whole ones throughout take much longer. The record spends these seconds on epochs;
# whether fewer epochs of whole images would be as good was not measured. (Nor were these runs timed in turn, but one
# kind after the other. What flips by chance took more or less, is how far that alone may go.)
#
# Leaving out **Muon** costs nearly a point, with all three seeds. But that leaves out more than orthogonal steps. With
# Muon the convolutions' weights are brought back to a fixed norm before each step, without weight decay, and the
# momentum is 0.6. With SGD nothing rescales them, weight decay and momentum (0.85) are airbench94's, and there is one
# learning rate: the one that airbench94 had before Muon, for batches of 1,024, in proportion, and not tuned here. Which
# of these costs the points, this does not tell.
#
# What the whitening layer and the alternating flips bring in accuracy, three networks cannot tell. That is not to say
# nothing: airbench94's author trained hundreds of networks to see tenths of a point, and lesson 08 computes why. What a
# frozen layer does bring is time: one that learns, biases and all, needs its gradients to the end. (Of six comparisons,
# one looks clear by chance more easily than a single one. Holm's method, which lesson 08 explains, corrects for that:
# the *p* above are its.)
#
# How fast is it, beside the original? Seconds depend on the machine, so `python cnn.py bench record` times both in turn:
# a few steps of ours, and of airbench94's network, batch size and optimizer in plain PyTorch and bf16, from which it
# reckons the seconds of a run. Neither learns the first layer's biases meanwhile, so what these cost is missing on both
# sides, more of it on airbench94's. Ours include augmentation and averaged weights; airbench94's get one batch that
# lies ready. (The whole runs above took longer than is reckoned here, for one because of those biases.) These are
# seconds alone: what accuracy airbench94 has on these JPEG copies is not measured here, and its 94 % are of the
# original pixels.

# %%
# NBVAL_CHECK_OUTPUT
raced = shipped["record"]
for what in (what for what in raced.index if raced.loc[what, "unit"] == "s"):
    print(f"{what}:", said(raced.loc[what], 0, " s of training"))
against = raced.loc["airbench94 in plain PyTorch against the record"]
print("airbench94's against ours: ×", said(against))
sides = [what for what in raced.index if what.startswith("the record's network")]
smaller = raced.loc[sides[1], "median"] / raced.loc[sides[0], "median"]
print(f"an image of {record.RecordConfig().small} pixels a side takes {smaller:.0%} of the time of a whole one")
assert against["min"] > 1
assert raced.loc[f"the record, {record.RECIPE.epochs} epochs", "max"] < of_run[""], "whole runs take longer"

# %% [markdown]
# ## Your turn: five faults
#
# This loop works. It returns the mean loss of an epoch and the validation accuracy, and it has **five faults** that
# cost time, here or on a GPU. Make a faster one that does the same work: every image once, in a new random order, in
# batches of 16, each image mirrored by a coin of its own, with a probability of one half.


# %%
def slow(model, optimizer, images, labels, val_images, val_labels):
    losses, hits = [], 0
    model.train()
    for batch in torch.randperm(len(images)).split(16):
        pixels = ((images.float() / 255 - 0.286) / 0.353)[batch]  # uint8 N×1×H×W → float32 16×1×H×W
        flips = (torch.rand(len(pixels)) < 0.5).tolist()
        pixels = torch.stack([x.flip(2) if flip else x for x, flip in zip(pixels, flips, strict=True)])
        loss = F.cross_entropy(model(pixels), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    for image, label in zip(val_images, val_labels, strict=True):
        pixels = (image[None].float() / 255 - 0.286) / 0.353
        hits += (model(pixels).argmax(1) == label).sum().item()
    return sum(losses) / len(losses), hits / len(val_labels)


# %% [markdown]
# The check uses no clock. It counts what PyTorch and the network are asked to do. Below it, a race: your epoch against
# the slow one, on 1,600 images, twice; the better time of each counts.

# %%
import time


def race(epoch):
    """Seconds of the slow epoch against those of `epoch`, with a small network."""
    train_part, validation, seconds = fashion.train[:1600], fashion.validation[:500], {"slow": [], "yours": []}
    for name, function in [("slow", slow), ("yours", epoch)] * 2:
        torch.manual_seed(0)
        net = CNN(CNNConfig(width=4))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        begin = time.perf_counter()
        loss, right = function(
            net, optimizer, train_part.images, train_part.labels, validation.images, validation.labels
        )
        seconds[name].append(time.perf_counter() - begin)
        print(f"{name:<6} {seconds[name][-1]:.1f} s, loss {loss:.2f}, {right:.0%} of the validation images right")
    return min(seconds["slow"]) / min(seconds["yours"])


# %%
fast = ...  # def fast(model, optimizer, images, labels, val_images, val_labels): … return loss, accuracy
if exercises.check("07.faults", fast):
    print(f"{race(fast):.1f} times as fast")
# exercises.hint("07.faults")


# %% jupyter={"source_hidden": true} tags=["solution"]
# Solution: click the dots to unfold it
def solution(model, optimizer, images, labels, val_images, val_labels):
    losses = []
    model.train()
    for batch in torch.randperm(len(images)).split(16):
        pixels = (images[batch].float() / 255 - 0.286) / 0.353  # only the images of this batch
        flips = torch.rand(len(pixels), 1, 1, 1) < 0.5
        pixels = torch.where(flips, pixels.flip(3), pixels)  # all of them at once
        loss = F.cross_entropy(model(pixels), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())  # nobody waits for it
    model.eval()
    with torch.inference_mode():  # no graph
        guesses = torch.cat([model((x.float() / 255 - 0.286) / 0.353).argmax(1) for x in val_images.split(500)])
    return torch.stack(losses).mean().item(), (guesses == val_labels).float().mean().item()


assert exercises.check("07.faults", solution, quiet=True)
gained = race(solution)
print(f"{gained:.1f} times as fast")

# %% [markdown]
# ## Your turn: below which roof?
#
# A machine can calculate 800 GFLOP/s and move 40 GB/s. A 1×1 convolution turns 64 channels into 32, forward: each number
# that comes in is read once and each that goes out is written once, in fp32 (4 bytes a number). A multiplication with its
# addition is two FLOPs. Its weights are few: leave them out. Which **share of the peak** can it reach at most?

# %%
share = ...  # a number between 0 and 1
exercises.check("07.ridge", share)
# exercises.hint("07.ridge")

# %% jupyter={"source_hidden": true} tags=["solution"]
# Solution: click the dots to unfold it
flops, moved = 2 * 64 * 32, 4 * (64 + 32)  # of one pixel
assert exercises.check("07.ridge", min(1, flops / moved * 40 / 800), quiet=True)

# %% [markdown]
# ## Summary

# %%
from IPython.display import Markdown

strong = sorted((name for name in gains if gains[name] > 1.15), key=gains.get, reverse=True)
by_tricks = ", ".join(f"{name} × {gains[name]:.2f}" for name in strong)
by_tricks = by_tricks.replace("bf16", "bf16 (and with it the own kernels)")
points_of = {name: f"{cost.loc[f'accuracy by: {name}', 'median']:+.2f} points" for name in names}
target = {name: f"× {said(row)}" for name, row in ratio.items()}
of_peak = {kind: reach[kind] * 1e9 / roofs["bf16"].peak for kind in reach}

# %%
Markdown(f"""
- **From the usual loop to the course's**, on {machine}: × {of_128:.2f} in batches of 128 (ratio of the medians), and
  × {said(fall.loc["all tricks against none"])} in batches of 512. Taken away from the end, one by one: {by_tricks}.
- **Nothing that these rounds show**: no `.item()` at every step (× {said(item)}, on a CPU), and keeping the memory that
  tensors free (× {said(kept)}).
- **Only with the right instructions**: bf16. With AVX2 alone it is × {narrow["median"]:.2f}.
- **Cost in accuracy** (n = {n_pairs} pairs): none shown for bf16 ({points_of["bf16"]}), own kernels
  ({points_of["own kernels"]}), pooling before the norm ({points_of["pool before norm"]}; its gain, some {least:.0f} µs
  an image by its layers' times, is too small for these rounds). Batches of 512: {points_of["batches of 512"]}, untuned.
- **Seconds to 85 %**, of the usual loop against all tricks: {target["pool before norm"]} in batches of 128,
  {target["batches of 512"]} in batches of 512, at rates in proportion, not tuned. Images a second are not learning a
  second.
- **Two roofs**: convolutions reach {of_peak["convolution"]:.0%} of the peak, by the formula's FLOPs, batch norm
  {of_peak["batch norm"]:.1%}. Norms, ReLUs and pooling are {rest["flops"]:.1%} of the FLOPs and {rest["ms"]:.0%} of the
  time: they calculate next to nothing, so that a higher peak would not help them. ReLUs lie between the slopes of main
  memory (median round) and of the cache; for which of the two they wait, this roofline does not say.
- **Growth**, from the course's network on: twice the FLOPs by width take {twice["width"]} the time, by depth
  {twice["layers"]}, by larger images {twice["side of the image"]} (by the medians, and by the rounds' ranges).
- **A record of our own**: {one_look} of CIFAR-10's JPEG copies, {looks} at test time, in {of_run[""]:.0f} s (means,
  95 % intervals, and the median time, of n = {len(views)}). An idea left out, with flips and shifts, points: {by_idea}.
  (SGD has no rescaling, other settings, and one untuned rate. Whole images take {longer["one size"]:.0%} longer.)
- **Talking**, as fitted, takes {1e3 * model.latency:.1f} ms an all-reduce (the rounds of small ones scatter), and a
  second for {1e-9 / model.per_byte:.1f} GB: that predicts {-error:.0%} too little for a shared step, and of the talking
  in it {guessed / talking:.0%}; nearly all of what is predicted is the latency of {len(sent)} messages.
""")

# %% [markdown]
# **Where it holds, and where not.** One small network on two cores. On a GPU the order changes: there the
# images often come too slowly, `.item()` hurts, and small operations cost more to launch than to carry out.
# `python cnn.py bench waterfall` measures yours. Measure before you optimize, one change at a time, and let seconds to a
# given accuracy decide.
#
# **Sources.** Williams, Waterman & Patterson 2009, [Roofline: an insightful visual performance
# model](https://doi.org/10.1145/1498765.1498785). McCalpin 1995, [STREAM: sustainable memory bandwidth in high
# performance computers](https://www.cs.virginia.edu/stream/). Horace He 2022, [Making deep learning go brrrr from first
# principles](https://horace.io/brrr_intro.html). PyTorch, [Performance tuning
# guide](https://docs.pytorch.org/tutorials/recipes/recipes/tuning_guide.html). Goyal et al. 2017, [Accurate, large
# minibatch SGD](https://arxiv.org/abs/1706.02677). Thakur, Rabenseifner & Gropp 2005, [Optimization of collective
# communication operations in MPICH](https://doi.org/10.1177/1094342005051521). Patarasuk & Yuan 2009, [Bandwidth optimal
# all-reduce algorithms](https://doi.org/10.1016/j.jpdc.2008.09.002). He et al. 2015, [Deep residual
# learning](https://arxiv.org/abs/1512.03385) (ResNet-50). Jordan 2024, [airbench](https://arxiv.org/abs/2404.00498) and
# [Muon](https://kellerjordan.github.io/posts/muon/).
