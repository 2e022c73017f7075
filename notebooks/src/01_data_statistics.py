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
# # Data statistics: what does the network see?
#
# A network never sees a shirt. It sees a grid of numbers: each pixel, minus a **mean**, divided by a **standard
# deviation**. This lesson finds these two numbers for a whole data set. The second is wrong in many public
# repositories; you will see why, and by how much.
#
# You need Python and a little PyTorch. Reading takes about 15 minutes, running less than one.

# %%
# Find the course, so that `import utils` works in Jupyter, on Binder and on Colab. Running this twice does no harm.
import re
import subprocess
import sys
from importlib import metadata, util
from pathlib import Path

COURSE, REF = "https://github.com/cnn-course/cnn-course", "main"
here = Path.cwd()
root = next((p for p in [here, *here.parents] if (p / "utils" / "__init__.py").exists()), here / "cnn-course")
if "google.colab" in sys.modules:  # fetch the course once, install what Colab lacks, leave its torch and numpy alone
    if not root.exists():
        subprocess.run(["git", "clone", "--quiet", "--depth=1", f"--branch={REF}", COURSE, str(root)], check=True)
    wanted = re.findall(r"(?m)^(?!torch|numpy|jupyterlab|nbval)[\w-]+", (root / "requirements.txt").read_text())
    missing = set(wanted) - {str(package.name).lower() for package in metadata.distributions()}
    if missing:
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *sorted(missing)], check=True)
sys.path.insert(0, str(root))
spec = util.find_spec("utils")
if spec is None or Path(spec.origin or "").parent != root / "utils":
    raise ImportError(f"`utils` is not the one in {root}: open the course's notebooks folder and restart the kernel.")

# %% [markdown]
# ## The data
#
# Fashion-MNIST: grey pictures of clothes, each pixel one byte from 0 (black) to 255 (white). The network learns from the
# training images; the validation images tell how well. The test images stay closed until a final number is due.

# %%
# NBVAL_CHECK_OUTPUT
from utils import data, plots

plots.use_style()
fashion = data.load("fashion-mnist")
print("train     ", fashion.train)
print("validation", fashion.validation)

# %%
fig = plots.samples(fashion.train, fashion.class_names)
plots.save(fig, "01_samples")

# %% [markdown]
# Trousers are easy. But is it a shirt, a coat or a pullover? The next cell counts the images of each class and averages them.

# %%
import matplotlib.pyplot as plt
import torch

images, labels = fashion.train.images, fashion.train.labels  # uint8 N×1×28×28, int64 N
counts = labels.bincount()
mean_images = torch.stack([images[labels == label].double().mean(0) / 255 for label in range(10)])  # 10×1×28×28
assert counts.min() == counts.max(), "the classes are balanced: no need to weight them"

fig, axes = plt.subplots(2, 5, figsize=(7.2, 3.5))
for ax, image, name in zip(axes.flat, mean_images, fashion.class_names, strict=True):
    plots.show_image(ax, image, title=name)
fig.suptitle(f"mean image of each class, n = {counts[0]:,} images each", fontsize=11)
plots.save(fig, "01_class_means")

# %% [markdown]
# Each class has equally many images, so that plain accuracy is a fair score. Which two mean images are most alike?

# %%
# NBVAL_CHECK_OUTPUT
flat = mean_images.flatten(1)  # 10×784
distance = torch.cdist(flat, flat) / flat.shape[1] ** 0.5  # 10×10, root mean square difference a pixel
a, b = divmod(int(distance.fill_diagonal_(torch.inf).argmin()), 10)
pair = f"{fashion.class_names[a]} and {fashion.class_names[b]}"
print(f"most alike: {pair}, {distance[a, b]:.3f} apart (pixels from 0 to 1)")

# %% [markdown]
# ### Half of it is nothing
#
# How often does each of the 256 pixel values occur?

# %%
share = 100 * images.flatten().bincount(minlength=256) / images.numel()  # % of all pixels

fig, ax = plt.subplots()
ax.stairs(share, torch.arange(257) - 0.5, fill=True, color=plots.color("train"))
ax.set(yscale="log", xlim=(-3, 258), xlabel="pixel value (0 black, 255 white)", ylabel="share of pixels (%, log scale)")
ax.annotate(f"background: {share[0]:.0f} % of all pixels are 0", (0, share[0]), (14, share[0]), va="center")
ax.set_title(f"training images, n = {images.numel():,} pixels", loc="right")
plots.save(fig, "01_pixel_values")
assert share[0] > 49, "about half of all pixels are background"

# %% [markdown]
# Such numbers are never negative, and their size is an accident of the file format. The usual remedy is
# **normalization**: subtract the mean of the training pixels and divide by their standard deviation, so that the
# network's input has mean 0 and standard deviation 1.
#
# ### Which standard deviation?
#
# Some people take the standard deviation of all pixels of the data set. Others take it image by image, and average. Does it
# make a difference? Decide before you go on.

# %%
from utils import exercises

exercises.quiz("01.average_std")

# %% [markdown]
# ## Mean and standard deviation of a whole data set
#
# With $x_1, \dots, x_M$ all the pixels of all $N$ training images, as numbers from 0 to 1:
#
# $$\mu = \frac1M \sum_{k=1}^{M} x_k \qquad\qquad \sigma = \sqrt{\frac1M \sum_{k=1}^{M} (x_k - \mu)^2}$$
#
# Not every data set fits into memory at once. So the images come in chunks, and each chunk is reduced to three numbers:
# the count $n$, the mean $m$, and $S$, the sum of squared distances from that mean. Two chunks $a$ and $b$ merge into one
# ([Chan, Golub & LeVeque 1979](http://i.stanford.edu/pub/cstr/reports/cs/tr/79/773/CS-TR-79-773.pdf)), with
# $\delta = m_b - m_a$:
#
# $$n = n_a + n_b \qquad m = m_a + \delta\,\frac{n_b}{n} \qquad S = S_a + S_b + \delta^2\,\frac{n_a n_b}{n}$$
#
# The last term is the heart of this lesson: it is what the *distance between the two means* adds to the spread.


# %%
def moments(images):
    """uint8 N×C×H×W → count, mean and sum of squared distances from the mean, in float64, pixels from 0 to 1."""
    x = images.double() / 255
    return x.numel(), x.mean(), ((x - x.mean()) ** 2).sum()


def merge(a, b):
    (n_a, mean_a, s_a), (n_b, mean_b, s_b) = a, b
    n, delta = n_a + n_b, mean_b - mean_a
    return n, mean_a + delta * n_b / n, s_a + s_b + delta**2 * n_a * n_b / n


# %% [markdown]
# Tried on two very different chunks, 1,000 sandals and 1,000 pullovers, and on both at once:

# %%
# NBVAL_CHECK_OUTPUT
sandals, pullovers = (images[labels == fashion.class_names.index(name)][:1000] for name in ("Sandal", "Pullover"))
rows = {"sandals": moments(sandals), "pullovers": moments(pullovers)}
rows["merged"] = merge(*rows.values())
rows["at once"] = moments(torch.cat([sandals, pullovers]))

for text, (n, mean, squares) in rows.items():
    print(f"{text:<10} {n:>9,} pixels   mean {mean:.4f}   std {(squares / n) ** 0.5:.4f}")
merged, at_once = (torch.tensor(rows[text], dtype=torch.float64) for text in ("merged", "at once"))
assert torch.allclose(merged, at_once, rtol=1e-12, atol=0)

# %% [markdown]
# Now the whole training split, 1,024 images at a time, against the direct computation, which needs all pixels in memory
# at once. `data.channel_stats` does the same for every channel of a colour image.

# %%
# NBVAL_CHECK_OUTPUT
from functools import reduce

count, mean, squares = reduce(merge, map(moments, images.split(1024)))
std = (squares / count) ** 0.5

pixels = images.double().div_(255)  # 8 bytes a pixel
print(f"streamed: mean {mean:.6f}, std {std:.6f}; at most {1024 * 784 * 8 / 1e6:.0f} MB of pixels at a time")
print(
    f"direct:   mean {pixels.mean():.6f}, std {pixels.std(correction=0):.6f}; {pixels.numel() * 8 / 1e6:.0f} MB at once"
)
assert abs(mean - pixels.mean()) < 1e-9
assert abs(std - pixels.std(correction=0)) < 1e-9

stats = data.channel_stats(images)
assert abs(stats.mean[0] - mean) < 1e-9
assert abs(stats.std[0] - std) < 1e-9
del pixels

# %% [markdown]
# The numbers that people use for Fashion-MNIST are 0.2860 and 0.3530
# ([in bytes: 73 and 90](https://github.com/zalandoresearch/fashion-mnist/issues/161)), those of all 60,000 published training
# images. The validation images here were taken out of these. With them back in, the same numbers must come out:

# %%
# NBVAL_CHECK_OUTPUT
published = data.channel_stats([images, fashion.validation.images])
print(f"mean {published.mean[0]:.4f}, std {published.std[0]:.4f}, n = {published.count // 784:,} images")
assert (round(published.mean[0], 4), round(published.std[0], 4)) == (0.2860, 0.3530)

# %% [markdown]
# For training, the course uses those of its own training split: whatever is learned from data, these two numbers included,
# must not have seen the validation images.
#
# ## The puzzle of the two standard deviations
#
# One mean $m_i$ and one standard deviation $s_i$ for each image $i$, over its own 784 pixels:

# %%
# NBVAL_CHECK_OUTPUT
parts = [torch.std_mean(chunk.flatten(1).double() / 255, dim=1, correction=0) for chunk in images.split(10_000)]
s, m = (torch.cat(part) for part in zip(*parts, strict=True))  # N each: std and mean of every image

print(f"average of the means  {m.mean():.4f}   mean of all pixels {mean:.4f}")
print(f"average of the stds   {s.mean():.4f}   std of all pixels  {std:.4f}")
assert abs(m.mean() - mean) < 1e-9, "means may be averaged"
assert s.mean() < std - 0.03, "standard deviations may not"

# %% [markdown]
# Averaging is right for the means. For the standard deviations it gives too little.
#
# This is no rare mistake. For CIFAR-10, the best-known set of small colour pictures, both kinds are in use:
#
# | std of red, green, blue | what it is | used by, for example |
# |---|---|---|
# | 0.2470, 0.2435, 0.2616 | of all pixels | [airbench](https://github.com/KellerJordan/cifar10-airbench/blob/master/airbench94.py) |
# | 0.2023, 0.1994, 0.2010 | average over the images ([reproduced](https://github.com/chenyaofo/image-classification-codebase/issues/5)) | [pytorch-cifar](https://github.com/kuangliu/pytorch-cifar/blob/master/main.py) |
#
# What does the average lose? The **law of total variance** says it. For $N$ images of equally many pixels,
#
# $$\sigma^2 \;=\; \underbrace{\frac1N \sum_{i=1}^N s_i^2}_{\text{within the images}}
# \;+\; \underbrace{\frac1N \sum_{i=1}^N (m_i - \mu)^2}_{\text{between the images}}$$
#
# where $\sigma^2$ is the variance of all pixels, $\mu$ their mean, and $s_i^2$ the variance of image $i$ around its own mean
# $m_i$. An average of the $s_i$ knows nothing of the second term: some images are bright, others dark.
#
# It loses a part of the first term too, because it averages $s_i$ and not $s_i^2$. Let $\bar s$ be the average of the
# $s_i$. Then the average of $s_i^2$ is $\bar s^2$ plus the variance of the $s_i$, and the first term splits in two:
#
# $$\sigma^2 \;=\; \bar s^2 \;+\; \operatorname{Var}(s_i) \;+\; \operatorname{Var}(m_i)$$
#
# No term is negative. So $\bar s$ is **never too large**, and it is right only if all images have the same mean and
# the same standard deviation. Both formulas in numbers:

# %%
# NBVAL_CHECK_OUTPUT
within, between = (s**2).mean(), m.var(correction=0)
print(f"all pixels {std**2:.6f} = within {within:.6f} + between {between:.6f}")
assert abs(within + between - std**2) < 1e-12

spread = s.var(correction=0)
print(f"all pixels {std**2:.6f} = (average std)² {s.mean() ** 2:.6f} + Var(s) {spread:.6f} + Var(m) {between:.6f}")
assert abs(s.mean() ** 2 + spread + between - std**2) < 1e-12

# %% [markdown]
# In the picture, each image is a point. Were all images alike, the cloud would be a single point on the blue line. But it is
# wide, because images differ in brightness, and high, because they differ in contrast. The arms of the cross show one
# standard deviation of each; their squares are the two grey blocks, and exactly what the average lacks.

# %%
fig, (cloud, bar) = plt.subplots(1, 2, figsize=(7.2, 3.6), width_ratios=(1.9, 1))
cloud.hexbin(m, s, gridsize=45, bins="log", cmap="Greys", mincnt=1, vmax=10_000, linewidths=0.1)
for height, kind, side in (std, "data set", "bottom"), (s.mean(), "per-image", "top"):
    cloud.axhline(height, color=plots.color(kind), lw=2)
    text = f"all pixels\n{height:.4f}" if kind == "data set" else f"average\n{height:.4f}"
    cloud.text(0.82, height, text, color=plots.color(kind), va=side, fontweight="bold")
cloud.errorbar(m.mean(), s.mean(), yerr=spread**0.5, xerr=between**0.5, color=plots.INK, lw=2, capsize=4)
cloud.set(xlabel="mean of an image (pixels 0–1)", ylabel="std of an image (pixels 0–1)", xlim=(0, 0.8))
cloud.set_title(f"n = {len(s):,} training images")

bottom = 0.0
shades = plots.color("per-image"), "#bbbbbb", plots.GREY
for part, text, shade in zip((s.mean() ** 2, spread, between), ("average²", "Var(s)", "Var(m)"), shades, strict=True):
    bar.bar(0, part, bottom=bottom, color=shade)
    bar.text(0.45, bottom + part / 2, f"{text} {part:.4f}", va="center")
    bottom += part
bar.set(xlim=(-0.45, 2), xticks=[], ylabel="variance of all pixels")
plots.save(fig, "01_two_stds")

# %% [markdown]
# ## Play: how many images at a time?
#
# Others average the standard deviations of *batches*. What does that give? Move the slider (or click it and use the arrow
# keys): the grey area shows how the standard deviations of batches of $n$ images are distributed.


# %%
def batch_stds(n, order=slice(None)):
    """The std of each batch of n images, by the law of total variance from the images' own m and s."""
    means, variances = m[order].view(-1, n), s[order].view(-1, n) ** 2  # batches×n
    return (variances.mean(1) + means.var(1, correction=0)).sqrt()


def draw(n):
    stds = batch_stds(n)
    fig, ax = plt.subplots(figsize=(7.2, 2.6))
    share, edges = torch.histogram(stds, 84, range=(0.06, 0.48))
    ax.stairs(100 * share / len(stds), edges, fill=True, color="#bbbbbb")
    ax.axvline(std, color=plots.color("data set"), lw=2, label=f"all pixels: {std:.4f}")
    ax.axvline(stds.mean(), color=plots.color("per-image"), lw=2, ls="--", label=f"average: {stds.mean():.4f}")
    ax.set(xlabel="standard deviation of a batch (pixels 0–1)", ylabel="share of batches (%)", xlim=(0.06, 0.48))
    ax.set_title(f"{len(stds):,} batches of n = {n:,} images", loc="left")
    ax.legend(loc="upper left")
    return fig


sizes = [1, 2, 4, 10, 20, 50, 100, 250, 500, 1000, 5000, len(s)]  # all divide the number of images
plots.explore(draw, "images in a batch", {f"{n:,}": n for n in sizes}, start="1")

# %% [markdown]
# All $n$ in one figure, and once more with the images sorted by class, as they lie in the folders of many data sets. Mixed
# batches resemble each other, and averaging does little harm. Batches of one class do not.

# %%
by_class = labels.argsort(stable=True)
mixed = [batch_stds(n).mean() for n in sizes]  # in the order of the file, which is mixed
sorted_by_class = [batch_stds(n, by_class).mean() for n in sizes]

fig, ax = plt.subplots()
ax.axhline(std, color=plots.color("data set"), lw=2)
ax.text(1, std + 0.001, "std of all pixels", color=plots.color("data set"), fontweight="bold", va="bottom")
ax.plot(sizes, mixed, "o-", color=plots.color("per-image"))
ax.plot(sizes, sorted_by_class, "o--", color=plots.GREEN)
ax.text(14, mixed[3] - 0.001, "averaged over mixed batches", color=plots.color("per-image"), va="top")
ax.text(300, sorted_by_class[7] - 0.003, "averaged over batches\nsorted by class", color=plots.GREEN, va="top")
ax.set(xscale="log", xlabel="images in a batch", ylabel="average std (pixels 0–1)", ylim=(0.317, 0.361))
ax.set_title(f"n = {len(s):,} training images", loc="right")
plots.save(fig, "01_batch_stds")
assert all(value < std for value in [*mixed[:-1], *sorted_by_class[:-1]]), "never too large"
assert abs(mixed[-1] - std) < 1e-12, "one batch of everything is the std of all pixels"

# %% [markdown]
# The standard deviation of all pixels is the same for every batch size and every order. So there is no reason to average.
#
# ## Before and after
#
# Normalization happens to each batch at the network's entrance:
# $x \mapsto (x - \mu) / \sigma$, channel by channel where there are three.

# %%
# NBVAL_CHECK_OUTPUT
batches = data.Batches(fashion.train, stats, batch_size=512, shuffle=True, seed=0)
one_batch, _ = next(iter(batches))  # float32 512×1×28×28
whole = data.channel_stats(batch for batch, _ in batches)

print(f"one batch of {len(one_batch)} images: mean {one_batch.mean():.2f}, std {one_batch.std(correction=0):.2f}")
print(f"all {len(images):,} images: mean {abs(whole.mean[0]):.4f}, std {whole.std[0]:.4f}")
assert abs(whole.mean[0]) < 1e-5
assert abs(whole.std[0] - 1) < 1e-5

wrong_stats = data.ChannelStats(stats.mean, (float(s.mean()),), stats.count)
wrong = data.channel_stats(data.normalize(chunk, wrong_stats) for chunk in images.split(1024))
print(f"all {len(images):,} images, with the average of the stds: std {wrong.std[0]:.4f}")
assert abs(wrong.std[0] - std / s.mean()) < 1e-5, "too large by the ratio of the two"

# %% [markdown]
# One image three ways, on one grey scale: as it is in the file, normalized, and normalized with the wrong standard
# deviation. Below, how often each value occurs; the dot is the mean, its arms are one standard deviation.

# %%
as_it_is = data.ChannelStats((0.0,), (1.0,), 1)
ways = (
    (as_it_is, "0-1", "pixels (0–1)"),
    (stats, "data set", "normalized"),
    (wrong_stats, "per-image", "with average of stds"),
)
fig, axes = plt.subplots(2, 3, figsize=(7.2, 4.2), height_ratios=(1.3, 1), sharex="row", sharey="row")
for (how, kind, title), top, below in zip(ways, *axes, strict=True):
    seen = data.normalize(fashion.validation.images, how)
    plots.show_image(top, seen[7], title=title, vmin=-1, vmax=2.3)
    share_seen, edges = torch.histogram(seen, 68, range=(-1.0, 2.4))
    below.stairs(100 * share_seen / seen.numel(), edges, fill=True, color=plots.color(kind))
    center, arm = seen.mean().item(), seen.std(correction=0).item()
    below.errorbar(center, 70, xerr=arm, fmt="o", color=plots.INK, capsize=4)
    below.text(center, 100, f"{center:.2f} ± {arm:.2f}", ha="center", va="bottom")
    below.set(yscale="log", xlabel="value", xlim=(-1.15, 2.4), ylim=(0.02, 400), yticks=(0.1, 1, 10, 100))
axes[1, 0].set_ylabel("share of pixels\n(%, log scale)")
fig.suptitle(f"one image, and the pixels of n = {len(seen):,} validation images", fontsize=11)
plots.save(fig, "01_before_after")

# %% [markdown]
# The picture stays the same; its zero and its unit change. That has one side effect. Convolutions pad images with zeros,
# and zero was black, like the background. Now zero is the average grey, and the background is a negative number:

# %%
# NBVAL_CHECK_OUTPUT
background = data.normalize(torch.zeros(1, 1, 1, 1, dtype=torch.uint8), stats).item()
print(f"a background pixel was 0 and is now {background:.3f} = -mean / std")
assert abs(background + stats.mean[0] / stats.std[0]) < 1e-6

# %% [markdown]
# Whether any of this matters for *training* is a question of its own, and it takes measurements, not algebra.
#
# ## Your turn: combine without sharing
#
# Two hospitals want to normalize their X-rays alike. They may not show each other a single image, but each can name three
# numbers: how many pixels it has, their mean, and their standard deviation. Write a function that takes two such triples
# and returns the triple of all pixels together, in place of the first line.
#
# For a hint, remove the `#` in the last line; each run gives the next one.

# %%
combine = ...  # def combine(a, b): … return n, mean, std
exercises.check("01.combine", combine)
# exercises.hint("01.combine")

# %% [markdown]
# **Solution:** click the three dots below to unfold it.

# %% jupyter={"source_hidden": true} tags=["solution"]
# Solution: click the dots to unfold it
def solution(a, b):
    (n_a, mean_a, std_a), (n_b, mean_b, std_b) = a, b
    n = n_a + n_b
    mean = (n_a * mean_a + n_b * mean_b) / n
    within = (n_a * std_a**2 + n_b * std_b**2) / n
    between = (n_a * (mean_a - mean) ** 2 + n_b * (mean_b - mean) ** 2) / n
    return n, mean, (within + between) ** 0.5


assert exercises.check("01.combine", solution, quiet=True)
ten = [data.channel_stats(images[labels == label]) for label in range(10)]  # each hospital has one class
assert abs(reduce(solution, [(each.count, each.mean[0], each.std[0]) for each in ten])[2] - std) < 1e-9

# %% [markdown]
# ## Summary

# %%
from IPython.display import Markdown

Markdown(f"""
- The training images have mean **{mean:.4f}** and standard deviation **{std:.4f}** (pixels from 0 to 1,
  n = {len(images):,} images); {share[0]:.0f} % of the pixels are background.
- **One pass over chunks is enough:** merge count, mean and sum of squared distances. This agrees with the direct
  computation to 10⁻⁹.
- **Means may be averaged** over images of equal size, **standard deviations may not**. The average of the images' own
  is {s.mean():.4f}, {100 * (1 - s.mean() / std):.0f} % too small; images normalized with it have standard deviation
  {wrong.std[0]:.2f} instead of 1.
- The difference is exact: $\\sigma^2 = \\bar s^2 + \\operatorname{{Var}}(s_i) + \\operatorname{{Var}}(m_i)$, here
  {std**2:.4f} = {s.mean() ** 2:.4f} + {spread:.4f} + {between:.4f}.
- It is small for batches of mixed images ({mixed[5]:.4f} at n = {sizes[5]}), larger when they are sorted by class
  ({sorted_by_class[5]:.4f}), and zero only if all batches have the same mean and the same spread.
""")

# %% [markdown]
# **Sources.** Xiao, Rasul & Vollgraf 2017, [Fashion-MNIST](https://arxiv.org/abs/1708.07747). Chan, Golub & LeVeque
# 1979, [Updating formulae and a pairwise algorithm for computing sample
# variances](http://i.stanford.edu/pub/cstr/reports/cs/tr/79/773/CS-TR-79-773.pdf). CIFAR-10's standard deviations:
# [airbench](https://github.com/KellerJordan/cifar10-airbench), [pytorch-cifar](https://github.com/kuangliu/pytorch-cifar),
# and [the issue](https://github.com/chenyaofo/image-classification-codebase/issues/5) that reproduces both.
