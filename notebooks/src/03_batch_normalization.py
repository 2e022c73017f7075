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
# # Batch normalization: does it really help?
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/cnn-course/cnn-course/blob/main/notebooks/03_batch_normalization.ipynb) [![Open on Binder](https://mybinder.org/badge_logo.svg)](https://mybinder.org/v2/gh/cnn-course/cnn-course/main?labpath=notebooks/03_batch_normalization.ipynb)
#
# "Normalizing each batch led to a huge increase in training accuracy." People who add batch normalization to a network
# often say so. This lesson looks at what it does to one channel, writes it from scratch, measures what it brings and
# where it fails, and then judges the sentence.
#
# **After this lesson you can** write batch normalization from scratch; say what it brings, from which start, and why it
# allows large learning rates; tell where it fails.
#
# **You need** lesson 00 and a little PyTorch. Reading takes about 45 minutes, running about one.

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
# ## One channel of one batch
#
# Here are the images, and the course's network with random weights. All that we need for now is its first convolution,
# with the pooling behind it: it turns an image into 16 *channels* of 14×14 numbers, the *activations*.

# %%
import torch

from utils import data, device, plots
from utils.model import CNN, CNNConfig

plots.use_style()
torch.set_num_threads(1)  # of little use in so small a network; and one thread gives the same numbers every time
fashion = data.load("fashion-mnist", progress=False)
stats = data.channel_stats(fashion.train.images)
images = data.normalize(fashion.train.images[:256], stats)  # float32 256×1×28×28
torch.manual_seed(0)
stem = CNN(CNNConfig(width=16)).stem


@torch.no_grad()
def activations(n, shift=0.0, channel=8):
    """One channel of a batch of the first n images, to whose pixels a number is added: n×14×14."""
    return stem.pool(stem.conv(images[:n] + shift))[:, channel]


x = activations(16)
print(f"{len(x)} images, {x.numel():,} activations: mean {x.mean():.2f}, standard deviation {x.std(correction=0):.2f}")

# %% [markdown]
# Batch normalization makes two moves. It **standardizes**: subtract the mean $\mu$ of these numbers $x$, divide by
# their standard deviation $\sigma$ (with a small $\epsilon$, in case it is zero). Then it **scales and shifts** by
# two numbers $\gamma$ and $\beta$ that the network learns, one pair for each channel ([Ioffe & Szegedy
# 2015](https://arxiv.org/abs/1502.03167)):
#
# $$\hat x = \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} \qquad\qquad y = \gamma\,\hat x + \beta$$

# %%
# NBVAL_CHECK_OUTPUT
def standardize(x, eps=1e-5):
    return (x - x.mean()) / (x.var(correction=0) + eps).sqrt()


gamma, beta = 0.5, 3.0
for name, values in {"before": x, "standardized": standardize(x), "y": gamma * standardize(x) + beta}.items():
    values = values.double()
    print(f"{name:<13} mean {abs(values.mean()):.2f}, standard deviation {values.std(correction=0):.2f}")
assert abs(standardize(x).mean()) < 1e-5
assert abs(standardize(x).std(correction=0) - 1) < 1e-3

# %% [markdown]
# In the picture, a dot is one activation, and a column of dots is one image. The bars beside each cloud count the
# activations; the black mark is their mean and one standard deviation to either side. Keep an eye on the **first
# image**: the diamond is its own mean.


# %%
import matplotlib.pyplot as plt


def count(ax, values):
    """Draw how often each value occurs, with mean and standard deviation, along the y axis."""
    share, edges = torch.histogram(values, 55, range=(-4.5, 6.5))
    ax.stairs(share, edges, fill=True, orientation="horizontal", color=plots.color("batch"))
    ax.errorbar(
        0.6 * share.max(), values.mean(), yerr=values.std(correction=0), fmt="o", ms=4, color=plots.INK, capsize=3
    )
    ax.axis("off")


# %%
def clouds(gamma, beta, n, shift):
    """Draw the two moves of batch normalization, of a batch of the first n images."""
    x = activations(n, shift)
    places = torch.randperm(196, generator=torch.Generator().manual_seed(0))[: max(5, 960 // n)]  # not every dot
    columns = torch.arange(1, n + 1)[:, None] + torch.linspace(-0.35, 0.35, len(places))  # n×places
    fig, axes = plt.subplots(1, 6, figsize=(7.4, 3.5), width_ratios=(3, 1) * 3, sharey=True)
    moves = {"before": x, "standardized": standardize(x), "after γ and β": gamma * standardize(x) + beta}
    for (name, values), cloud, side in zip(moves.items(), axes[::2], axes[1::2], strict=True):
        dots = values.flatten(1)[:, places]  # n×places
        cloud.plot(columns.flatten(), dots.flatten(), ".", ms=2.5, color=plots.GREY)
        cloud.plot(columns[0], dots[0], ".", ms=4, color=plots.VERMILION)
        cloud.plot(1, values[0].mean(), "D", ms=7, mfc="white", mec=plots.VERMILION, mew=2)
        cloud.set(xlabel="image", xlim=(0.4, n + 0.6), ylim=(-4.5, 6.5))
        cloud.set_title(f"{name}:\nmean {values.mean():.1f}, std {values.std(correction=0):.1f}".replace("-0.0", "0.0"))
        cloud.set_xticks([1, n], ["first", f"{n}th" if n > 3 else "2nd"])
        count(side, values)
    axes[0].set_ylabel("activation")
    return fig


# %%
plots.save(
    clouds(gamma, beta, 16, shift=0.0),
    "03_cloud",
    "One channel's activations over a batch as clouds of one form: as they are, standardized, and moved by γ and β",
)

# %% [markdown]
# Every dot makes the same two moves, so each cloud keeps its form. (The dense stripes are the black background.)
# Now play. Three things to try:
#
# - **Shift the input**, as if all photographs were brighter. Which clouds move?
# - **Make the batch small** and large again. What happens to the first image, although it is always the same image?
# - **Undo it.** Which γ and β bring back the first cloud? Could the network learn them?

# %%
numbers = {
    "γ": (0.25, 0.5, 1.0, 1.5, 1.75, 2.0),
    "β": (-2.0, -1.0, 0.0, 0.5, 1.0, 2.0, 2.3, 3.0),
    "images in the batch": (2, 4, 8, 16, 32, 64, 128, 256),
    "input shift": (-1.0, -0.5, 0.0, 0.5, 1.0),
}
choices = {label: {f"{value:g}": value for value in values} for label, values in numbers.items()}
plots.explore_several(clouds, choices, {"γ": "1", "β": "0", "images in the batch": "4", "input shift": "1"})

# %% [markdown]
# A shift of the input is gone after the standardization, but for the border, where the convolution saw zeros instead.
# And with $\gamma = \sqrt{\sigma^2 + \epsilon}$ and $\beta = \mu$ the network could undo everything, for this one
# batch: the next has another $\mu$ and $\sigma$. In `.eval()` mode (below) both are fixed, so there it could undo it
# for all images, and nothing that it could express before is lost. Where the sliders began,
# $\gamma = 2$ and $\beta = 2.3$ come close.

# %%
undone = (x.var(correction=0) + 1e-5).sqrt() * standardize(x) + x.mean()
assert (undone - x).abs().max() < 1e-5
begin = activations(4, shift=1.0)
assert (2 * standardize(begin) + 2.3 - begin).abs().max() < 0.05

# %% [markdown]
# The first image is another matter. Its numbers depend on **the company that it keeps**:

# %%
alone = [standardize(activations(n))[0].mean().item() for n in (2, 4, 256)]
print("mean of the first image in a batch of 2, 4, 256:", ", ".join(f"{value:.2f}" for value in alone))
assert max(alone) - min(alone) > 0.1, "the same image becomes something else in other company"

# %% [markdown]
# Keep this in mind: most of what goes wrong with batch normalization goes wrong here.
#
# ## Which numbers share a mean?
#
# A batch has $N$ images, $C$ channels, and a map of $H \times W$ numbers for each of both.

# %%
from utils import exercises

exercises.quiz("03.means")

# %% [markdown]
# All kinds of normalization do the same two moves. They differ in **which numbers share a mean and a standard
# deviation**:
#
# | | mean over | means in all | the company of an image |
# |---|---|---|---|
# | **batch** ([2015](https://arxiv.org/abs/1502.03167)) | $N, H, W$ | $C$ | the other images |
# | **layer** ([2016](https://arxiv.org/abs/1607.06450)) | $C, H, W$ | $N$ | none |
# | **instance** ([2016](https://arxiv.org/abs/1607.08022)) | $H, W$ | $N \cdot C$ | none |
# | **group** ([2018](https://arxiv.org/abs/1803.08494)) | $H, W$ and a group of channels | $N \cdot$ groups | none |
#
# The picture shows four images (rows) and eight channels of the first convolution (columns). Each frame has a mean of
# its own. The thick one, in full contrast, holds what is averaged for the third channel of the second image.

# %%
with torch.no_grad():
    maps = stem.pool(stem.conv(images[:4]))[:, :8]  # N×C×H×W = 4×8×14×14
N, C, H, W = maps.shape
low, high = maps.amin((2, 3), keepdim=True), maps.amax((2, 3), keepdim=True)
tiles = torch.nn.functional.pad((maps - low) / (high - low), (1, 1, 1, 1), value=1.0)  # each map on its own grey scale
tiles = (tiles * 15).round() / 15  # few shades: the saved file has 256 colours for all of it
picture = tiles.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)  # (N·16)×(C·16)

# %%
from matplotlib.patches import Rectangle

blocks = {"batch": (N, 1), "layer": (1, C), "instance": (1, 1), "group": (1, 2)}  # images × channels that share a mean
over = {"batch": "N, H, W", "layer": "C, H, W", "instance": "H, W", "group": "H, W and two channels"}
shades = {kind: plots.VERMILION if kind == "instance" else plots.color(kind) for kind in blocks}
fig, axes = plt.subplots(2, 2, figsize=(7.2, 4.9))
for (kind, (rows, columns)), ax in zip(blocks.items(), axes.flat, strict=True):
    numbers = f"{N * C // (rows * columns)} means of {rows * columns * H * W:,} numbers"
    plots.show_image(ax, picture, title=f"{kind}: over {over[kind]}\n{numbers}")
    for top in range(0, N, rows):
        for left in range(0, C, columns):
            chosen = top <= 1 < top + rows and left <= 2 < left + columns  # the block of image 2, channel 3
            box = (16 * left - 0.5, 16 * top - 0.5), 16 * columns, 16 * rows
            ax.add_patch(Rectangle(*box, fc="white", alpha=0.0 if chosen else 0.55, ec="none"))
            ax.add_patch(Rectangle(*box, fc="none", ec=shades[kind], lw=4 if chosen else 1.5, zorder=3 + chosen))
    ax.set(ylabel=f"{N} images", xlabel=f"{C} channels")
plots.save(
    fig,
    "03_axes",
    "Grids of maps, images by channels, framed where they share a mean: columns for batch, rows for layer, "
    "single maps for instance, pairs of maps in a row for group",
)

# %% [markdown]
# The same in numbers. One function does all four:

# %%
def normalize(x, axes, eps=1e-5):
    var, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    return (x - mean) / (var + eps).sqrt()


x = maps.double()
pairs = x.view(N, C // 2, 2, H, W)  # groups of two channels
ours = {
    "batch": normalize(x, (0, 2, 3)),
    "layer": normalize(x, (1, 2, 3)),
    "instance": normalize(x, (2, 3)),
    "group": normalize(pairs, (2, 3, 4)).view_as(x),
}

# %% [markdown]
# And PyTorch's own agree:

# %%
# NBVAL_CHECK_OUTPUT
import torch.nn.functional as F

theirs = {
    "batch": F.batch_norm(x, None, None, training=True),
    "layer": F.layer_norm(x, x.shape[1:]),
    "instance": F.instance_norm(x),
    "group": F.group_norm(x, C // 2),
}
for kind in ours:
    assert (ours[kind] - theirs[kind]).abs().max() < 1e-12
    print(f"{kind:<9} agrees to 12 digits")

# %% [markdown]
# ## From scratch, there and back
#
# Now write it for N×C×H×W tensors, and by hand also the way back, which PyTorch would otherwise work out for you.
# With $g = \partial L / \partial y$, the slope of the loss $L$ by the output, and a bar for the mean over $N, H, W$,
# over which the sums go, too:
#
# $$\frac{\partial L}{\partial x} = \frac{\gamma}{\sqrt{\sigma^2 + \epsilon}}
# \left( g - \bar g - \hat x \, \overline{g \hat x} \right)$$
#
# $$\frac{\partial L}{\partial \gamma} = \sum g \hat x \qquad \frac{\partial L}{\partial \beta} = \sum g$$
#
# Two terms are taken out of the gradient. $\bar g$ would only shift the whole channel, and
# $\hat x\,\overline{g \hat x}$ would only stretch it. The normalization undoes both, so they cannot change the loss.

# %%
class Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gamma, beta, eps):  # N×C×H×W, C, C
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)  # 1×C×1×1, biased: divided by n
        scale = (var + eps).rsqrt()
        x_hat = (x - mean) * scale
        ctx.save_for_backward(x_hat, scale * gamma.view(-1, 1, 1))
        return gamma.view(-1, 1, 1) * x_hat + beta.view(-1, 1, 1)

    @staticmethod
    def backward(ctx, g):  # N×C×H×W
        x_hat, scale = ctx.saved_tensors
        g_mean, gx_mean = g.mean((0, 2, 3), keepdim=True), (g * x_hat).mean((0, 2, 3), keepdim=True)
        return scale * (g - g_mean - x_hat * gx_mean), (g * x_hat).sum((0, 2, 3)), g.sum((0, 2, 3)), None


# %% [markdown]
# `gradcheck` moves each input a tiny bit and compares what the output does with what `backward` says:

# %%
# NBVAL_CHECK_OUTPUT
from torch import nn

torch.manual_seed(0)
inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 2, 4, 4), (2,), (2,))]
assert torch.autograd.gradcheck(Normalize.apply, (*inputs, 1e-5))
print("gradients by x, γ and β: right")

# %% [markdown]
# In evaluation there may be no batch: one photograph comes, and its class is asked for. So the layer keeps a **running
# mean and variance** of what it saw in training, and uses them in `.eval()` mode. Each batch moves them a little:
#
# $$\text{running} \leftarrow (1 - m)\,\text{running} + m\,\text{batch}$$
#
# Here $m$ is called *momentum*, and it is the weight of the **new** value, 0.1 by default. (An optimizer's momentum is
# that of the old one.) With `momentum=None` the layer takes the plain average of all batches.

# %%
class BatchNorm2d(nn.Module):
    def __init__(self, channels, eps=1e-5, momentum=0.1):
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(channels))  # γ
        self.bias = nn.Parameter(torch.zeros(channels))  # β
        self.register_buffer("running_mean", torch.zeros(channels))  # a buffer is saved, but not trained
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x):  # N×C×H×W
        if not self.training:
            scale = self.weight / (self.running_var + self.eps).sqrt()
            return scale.view(-1, 1, 1) * (x - self.running_mean.view(-1, 1, 1)) + self.bias.view(-1, 1, 1)
        with torch.no_grad():
            var, mean = torch.var_mean(x, (0, 2, 3))  # C, unbiased: divided by n − 1
            self.num_batches_tracked += 1
            m = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean, m)
            self.running_var.lerp_(var, m)
        return Normalize.apply(x, self.weight, self.bias, self.eps)


# %% [markdown]
# **Check it** against `nn.BatchNorm2d`, in double precision, for three settings of the momentum: the output, three
# gradients, everything in the state, through five batches, and then the output in `.eval()` mode. Whatever differs by
# more than $10^{-12}$ is found.

# %%
# NBVAL_CHECK_OUTPUT
for momentum in (0.1, 0.5, None):
    mine, reference = BatchNorm2d(3, momentum=momentum).double(), nn.BatchNorm2d(3, momentum=momentum).double()
    start = {name: torch.rand(3) if "batches" not in name else value for name, value in reference.state_dict().items()}
    mine.load_state_dict(start)  # the same names and shapes, or this raises an error
    reference.load_state_dict(mine.state_dict())
    for _ in range(5):
        x = (3 * torch.randn(4, 3, 5, 5, dtype=torch.float64) + 2).requires_grad_()
        g = torch.randn_like(x)
        outputs = [layer(x) for layer in (mine, reference)]
        pairs = zip(outputs, (mine, reference), strict=True)
        slopes = [torch.autograd.grad(out, (x, *layer.parameters()), g) for out, layer in pairs]
        for a, b in zip((outputs[0], *slopes[0]), (outputs[1], *slopes[1]), strict=True):
            assert (a - b).abs().max() < 1e-12
        for name, value in reference.state_dict().items():
            assert (mine.state_dict()[name] - value).abs().max() < 1e-12, name
    assert (mine.eval()(x) - reference.eval()(x)).abs().max() < 1e-12
    print(f"momentum {momentum}: output, gradients, {', '.join(reference.state_dict())} and .eval() agree")

# %% [markdown]
# ### Why two variances?
#
# Look again: the forward pass divides by $n$ (the *biased* variance), and the running variance gets a division by
# $n - 1$ (the *unbiased* one), with $n = N \cdot H \cdot W$. Both are right, for different questions.
#
# - The forward pass wants **this batch** to have variance 1. Its variance is what it is; nothing is estimated.
# - The running variance stands for the variance of **all the data**. A batch is a small sample. It lies closer to its
#   own mean than to that of the data, and so its variance is too small on average ($\mathbb E$), for $n$ independent
#   numbers $x_i$ with mean $\bar x$, from data of variance $\sigma^2$, by
#
# $$\mathbb{E}\left[\frac1n \sum_i (x_i - \bar x)^2\right] = \frac{n-1}{n}\,\sigma^2$$
#
# This can be verified without any sampling error: of six numbers, take *all* possible samples of $n$ and average their
# variances. In units of $\sigma^2$, the variance of the six:

# %%
# NBVAL_CHECK_OUTPUT
population = activations(64).flatten()[1000:1006].double()
true = population.var(correction=0)
for n in (2, 3, 4, 5):
    samples = torch.cartesian_prod(*[population] * n)  # 6ⁿ×n: each sample that there is
    biased, unbiased = samples.var(1, correction=0).mean() / true, samples.var(1).mean() / true
    print(f"n = {n}, {len(samples):>5,} samples: average variance {biased:.4f} biased, {unbiased:.4f} unbiased")
    assert abs(biased - (n - 1) / n) < 1e-9
    assert abs(unbiased - 1) < 1e-9

# %% [markdown]
# How much is it here? The course's last layer has maps of 2×2, so that in a batch of two images $n$ is only 8, and the
# biased variance is an eighth too small. (At least: neighbouring numbers of a map resemble each other, so they tell
# less than independent ones.) What was divided by it in training is divided by the larger, unbiased one in `.eval()`
# mode. With a hundred images in a batch nobody notices.
#
# ## What does it bring?
#
# Now the sentence under test. Two networks differ in one field, `norm="batch"` or `norm="none"`; all else is the same:
# 16 channels, 12,800 images, 4 epochs, batches of 128, He initialization, no augmentation. Each gets
#
# - **its own learning rate**, the best of six by validation accuracy. At one common rate you would compare the rate,
#   not the normalization;
# - **ten seeds**, which were not used to choose that rate. Runs of one seed start from the same weights and see the
#   same batches, so they are compared in pairs.
#
# "Huge" was set to *more than five points* of training accuracy, before the first run. What would you say? Note it
# down. (Training accuracy is counted while the network learns: each batch before its step, in train mode, over the last
# epoch. So it also rewards learning early, and can lie below the validation accuracy.)
#
# The rows come with the course; `RECOMPUTE = True` measures them again. First the sweep over the learning rates.

# %%
from utils import experiments

RECOMPUTE = False
results = experiments.measure("batchnorm") if RECOMPUTE else experiments.load("batchnorm")
plots.save(
    plots.lr_sweep(results.sweep, "train accuracy"),
    "03_lr_sweep",
    "Training accuracy against learning rate: with batch norm nearly level, without it falling to guessing",
)

# %%
plots.save(
    plots.lr_sweep(results.sweep, "validation accuracy"),
    "03_lr_sweep_validation",
    "Validation accuracy against learning rate: with batch norm nearly level, without it falling to guessing",
)

# %% [markdown]
# Over which range does each train *at all*? Say: more than half of the training images right in the last epoch, with
# every one of the five seeds.

# %%
from utils import evidence


def rates_that_train(sweep, variant):
    """The learning rates at which every seed ends with more than half of the training images right."""
    good = []
    for lr, runs in sweep[sweep["variant"] == variant].groupby("lr"):
        runs.attrs = sweep.attrs
        if evidence.finals(runs, "train accuracy")[variant].min() > 0.5:  # a run that diverged counts as guessing
            good.append(lr)
    return good


def final_means(runs):
    """The mean training accuracy of each variant, in percent."""
    runs.attrs = results.sweep.attrs
    return 100 * evidence.finals(runs, "train accuracy").mean()


# %%
# NBVAL_CHECK_OUTPUT
ranges = {variant: rates_that_train(results.sweep, variant) for variant in ("batch", "none")}
best_lr = results.about["best_lr"]
for variant, rates in ranges.items():
    print(f"{variant:<5} trains from {min(rates):g} to {max(rates):g}; best at {best_lr[variant]:g}")
tried = sorted(results.sweep["lr"].unique())
print(f"tried: {', '.join(f'{lr:g}' for lr in tried)}")
assert ranges["batch"] == tried, "all of them: the range may be wider still"
assert max(ranges["none"]) < max(tried)
means = {lr: final_means(at) for lr, at in results.sweep.groupby("lr")}
at_largest = means[max(tried)]["batch"] - means[max(tried)]["none"]
print(f"at {max(tried):g}, batch norm − none: {at_largest:.0f} points of training accuracy (means of the five seeds)")
by_training = max(each["batch"] for each in means.values()) - max(each["none"] for each in means.values())
print(f"at the rates that are best by *training* accuracy: {by_training:+.1f} points")
assert by_training < 5

# %% [markdown]
# Now each at its best rate, with ten other seeds. On the left the learning curves, on the right what remains at the
# end. Above with He initialization, which the course's network has. Below with PyTorch's default, which most people
# have: an `nn.Conv2d` starts with smaller weights by itself (lesson 05 is about this; the lower rows are of its
# experiment, where two seeds chose each rate, not five).

# %%
import pandas as pd

lesson_05 = experiments.load("init")
assert [len(each.about["tuning_seeds"]) for each in (results, lesson_05)] == [5, 2]
starts = lesson_05.runs
default = starts[starts["variant"].str.startswith("default")]
renamed = {"default, batch norm": "batch, default init", "default, no norm": "none, default init"}
both = pd.concat([results.runs.assign(variant=results.runs["variant"] + ", He init"), default.replace(renamed)])
both.attrs = results.runs.attrs
fig = plots.experiment(both, "train accuracy")
for ax in fig.axes[1::2]:
    ax.set_xlim(-1, 14)
    ax.axvline(5, color=plots.GREY, ls="--")  # what was called huge
    ax.text(5, -0.55, " huge", color=plots.DARK, va="top")
plots.save(
    fig,
    "03_claim",
    "Training accuracy with and without batch norm: ahead from both starts, beyond the mark of huge only from default",
)

# %% [markdown]
# And does the gain arrive at images that the network has not seen? The verdicts follow the rule that was set before the
# runs, and are corrected for all claims of the course.

# %%
# NBVAL_CHECK_OUTPUT
claims = experiments.claims()
mine = claims[claims["claim"].str.contains("batch norm raises")]
for row in mine.itertuples():
    start = "He" if row.experiment == "batchnorm" else "PyTorch's default"
    low, high, margin = 100 * row.low, 100 * row.high, 100 * row.margin
    print(f"{row.metric}, from {start} initialization: more than {margin:g} points is {row.verdict}")
    print(f"    {100 * row.difference:+.1f} points, 95 % interval {low:+.1f} to {high:+.1f}, n = {row.n}")
assert list(mine["verdict"]) == ["refuted", "supported", "supported"]

# %% [markdown]
# By this measure the sentence is right about a network that starts with PyTorch's weights, and wrong about one that
# starts with He's. Most of the "huge increase" can be had without any normalization, by He's start (larger weights,
# drawn from a normal distribution, and biases at 0, where PyTorch draws both evenly from an interval). The network with
# He's start is at another rate here than above, where it does better still: there five seeds chose the rate, here two.

# %%
# NBVAL_CHECK_OUTPUT
plain = starts[starts["variant"].isin(["he, no norm", "default, no norm"])]
gain = evidence.compare(plain, "default, no norm", "train accuracy").iloc[0]
interval = f"95 % interval {100 * gain['low']:+.1f} to {100 * gain['high']:+.1f}, n = {gain['n']}"
print(f"no norm, He instead of the default: {100 * gain['difference']:+.1f} points of training accuracy ({interval})")
huge = mine["difference"].iloc[2]
print(f"batch norm, from the default:       {100 * huge:+.1f} points")
assert gain["difference"] > huge / 2
rate_here, rate_above = lesson_05.about["best_lr"]["he, no norm"], best_lr["none"]
print(f"no norm, He: at a rate of {rate_here:g} here, of {rate_above:g} above")
assert rate_here != rate_above

# %% [markdown]
# One advantage remains, from PyTorch's default weights as well: the range of learning rates.

# %%
# NBVAL_CHECK_OUTPUT
from_default = {norm: rates_that_train(lesson_05.sweep, f"default, {norm}") for norm in ("batch norm", "no norm")}
for norm, rates in from_default.items():
    print(f"default, {norm}: trains from {min(rates):g} to {max(rates):g} (both seeds)")
assert max(from_default["no norm"]) < max(ranges["none"]) < max(from_default["batch norm"])

# %% [markdown]
# [Bjorck et al. (2018)](https://arxiv.org/abs/1806.02375) see in it the cause of all the others.
#
# ## Why so many learning rates?
#
# ### Large weights get small gradients
#
# Make all weights $W$ of a convolution $\alpha$ times as large. Its outputs grow by $\alpha$, their mean and their
# standard deviation grow by $\alpha$, and after the normalization $\mathrm{BN}$ **nothing has changed**. But if the
# loss $L$ does not change, then its slope by $\alpha W$ must be $\alpha$ times as small:
#
# $$\mathrm{BN}(\alpha W x) = \mathrm{BN}(W x)$$
#
# $$\Rightarrow\quad \frac{\partial L}{\partial (\alpha W)} = \frac1\alpha \frac{\partial L}{\partial W}
# \quad\text{and}\quad \left\langle W, \frac{\partial L}{\partial W} \right\rangle = 0$$
#
# ($x$: the input; $\langle A, B\rangle$: the sum over all products of an entry of $A$ with that of $B$, 0 at a right
# angle.)

# %%
# NBVAL_CHECK_OUTPUT
weight = stem.conv.weight.detach().double()  # 16×1×3×3
batch, target = images[:32].double(), torch.randn(32, 16, 28, 28, dtype=torch.float64)
slopes = {}
for alpha in (1.0, 10.0):
    w = (alpha * weight).requires_grad_()
    out = F.batch_norm(F.conv2d(batch, w, padding=1), None, None, training=True, eps=1e-12)
    (slopes[alpha],) = torch.autograd.grad(((out - target) ** 2).mean(), w)
assert (slopes[10.0] - slopes[1.0] / 10).abs().max() < 1e-9
assert abs((slopes[1.0] * weight).sum()) < 1e-9
print(f"weights times 10: gradient times {slopes[10.0].norm() / slopes[1.0].norm():.4f}, and at a right angle to them")

# %% [markdown]
# That is a brake. A step of plain gradient descent leaves at a right angle, so it always makes the weights longer. (Our
# recipe also has momentum, whose older gradients need not be at a right angle, and weight decay, which shortens them;
# the two come to a balance, [van Laarhoven 2017](https://arxiv.org/abs/1706.05350).) And a step that is too long makes
# them much longer. Then the next gradients are smaller, until the steps fit ([Arora et al.
# 2018](https://arxiv.org/abs/1812.03981)). Without normalization it is the other way round: longer weights in one layer
# mean *larger* gradients in the others.
#
# ### How far does the very first step reach?
#
# Follow the gradient from the random weights and look at the loss on the way: `landscape.along_step` takes the first
# step at several learning rates, each from the same point; then at five more between the last that lowers the loss and
# the first that does not. Ten networks, five of each kind.

# %%
import numpy as np

from utils import landscape

first, answers = images[:128], fashion.train.labels[:128]
rates = [0.002, 0.01, 0.05, 0.2, 1.0, 4.0]


def walk_of(network):
    """The loss along the first step: at all the rates, and closer together where it stops falling."""
    walk = landscape.along_step(network, first, answers, rates)
    lowers = (walk["loss"][1:] < walk["loss"][0]).to_numpy()
    last = lowers.nonzero()[0].max()
    between = np.geomspace(rates[last], rates[last + 1], 7)[1:-1].tolist()
    return pd.concat([walk, landscape.along_step(network, first, answers, between)[1:]]).sort_values("length")


walks = []
for norm in ("batch", "none"):
    for seed in range(5):
        torch.manual_seed(seed)
        walks.append(walk_of(CNN(CNNConfig(width=16, norm=norm))).assign(norm=norm, seed=seed))
walks = pd.concat(walks)

# %%
fig, ax = plt.subplots()
ax.axhline(torch.tensor(10.0).log(), color=plots.GREY, ls="--", lw=1)
ax.text(0.0021, 2.05, "knows nothing: ln 10", fontsize=10, va="top")
for (norm, _), walk in walks.groupby(["norm", "seed"]):
    ax.plot(walk["length"][1:], walk["loss"][1:], "o-", ms=3, lw=1.2, color=plots.color(norm))
ax.text(0.3, 1.35, "batch norm", color=plots.color("batch"), fontweight="bold", ha="right")
ax.text(0.012, 9, "no norm", color=plots.color("none"), fontweight="bold", ha="right")
ax.set(xscale="log", yscale="log", ylim=(1, 100), xlabel="learning rate (logarithmic)")
ax.set_xticks(rates, [f"{rate:g}" for rate in rates])
ax.set_yticks([1, 3, 10, 30, 100], ["1", "3", "10", "30", "100"])
ax.minorticks_off()
ax.set_ylabel("loss after one step\n(nats, logarithmic)")
ax.set_title("n = 5 networks each, a line a network", loc="left")
plots.save(
    fig,
    "03_first_step",
    "Loss after one step against its learning rate: without a norm it shoots up early, with batch norm it stays low",
)

# %%
from itertools import pairwise

found = []
for (norm, seed), walk in walks.groupby(["norm", "seed"]):
    far = walk[walk["loss"] < walk["loss"].iloc[0]].iloc[-1]  # the longest step that lowers the loss
    size = walk["gradient"].iloc[0]  # ‖g‖, before the step
    found.append({"norm": norm, "seed": seed, "rate": far["length"], "‖g‖": size, "distance": far["distance"]})
reach = pd.DataFrame(found).pivot(index="seed", columns="norm")  # rows: seeds; columns: what, norm
print("the longest first step that lowers the loss, to a factor of 1.3; n = 5 networks each:")
factors = {}
for what in ("rate", "‖g‖", "distance"):
    with_it, without = reach[what]["batch"], reach[what]["none"]
    factors[what] = (with_it / without).median()
    print(f"{what:<9} {with_it.min():.2g} to {with_it.max():.2g} with batch norm, ", end="")
    print(f"{without.min():.2g} to {without.max():.2g} without; median ratio {factors[what]:.2g}")
assert max(after / before for before, after in pairwise(rates)) ** (1 / 6) < 1.31, "how far apart they are"
assert (reach["rate"]["batch"] >= 3 * reach["rate"]["none"]).all()
assert (reach["‖g‖"]["none"] > 2 * reach["‖g‖"]["batch"]).all()
assert 1.3 < factors["distance"] < factors["rate"] / 3
assert best_lr["none"] > reach["rate"]["none"].max()

# %% [markdown]
# A rate is not yet a distance: the step is rate × $\lVert g\rVert$ long, with the gradient $g$. Without a norm the
# first gradient is several times as large, and that is much of the factor between the rates. A smaller factor remains:
# with batch norm the loss falls further along the way, too, though by how much differs from network to network. (The
# ratios are medians of five, each by itself: two of them need not multiply to the third.)
#
# The best rate of the plain network is larger than any at which its first step would lower the loss. Presumably it
# survives because the schedule begins with far smaller ones (lesson 00).
#
# ### And along a whole run?
#
# [Santurkar et al. (2018)](https://arxiv.org/abs/1805.11604) asked the same question all along the training. From the
# weights of the moment, go half to four times the run's peak learning rate along the gradient (the schedule's own is
# lower at most places, 0 at the last, and the real step has momentum), and note two things:
#
# - **the loss**: how much does it vary on the way? A wide band is a rough surface (the axis is logarithmic: further down
#   the same width means less);
# - **the gradient** $g'$ that you find there: how far is it from the gradient $g$ that you followed? That is
#   $\lVert g' - g\rVert / \lVert g\rVert$. Near 0 the surface is straight and the gradient keeps its promise; at 1 it is
#   as wrong as it is long.
#
# Two short live runs, at a learning rate at which both train. `Probes` also record what passes through each layer.

# %%
from dataclasses import replace

from utils import probes, train

few = replace(fashion.take(1_280), validation=fashion.validation[:500])
recipe = train.Recipe(epochs=6, batch_size=64, lr=0.03, crop_padding=0, flip=False)


def watch(norm):
    """Train; return the history, what the probes saw every five steps, and the loss along the step after each epoch."""
    torch.manual_seed(0)
    model, walks = CNN(CNNConfig(width=16, norm=norm)), []

    def measure(history=None):
        step = 0 if history is None else history["step"].max()
        walk = landscape.along_step(model, first, answers, [recipe.lr * factor for factor in (0.5, 1, 2, 4)])
        walks.append(walk.assign(norm=norm, step=step, turn=walk["gradient_change"] / walk["gradient"].iloc[0]))

    measure()
    with probes.Probes(model, every=5) as probe:
        history = train.fit(model, few, recipe, device="cpu", precision="fp32", progress=False, on_epoch=measure)
    return history, probe.frame().assign(norm=norm), pd.concat(walks)


# %%
seen = {norm: watch(norm) for norm in ("batch", "none")}
for norm, (history, _, _) in seen.items():
    trained, validated = history.last("train", "accuracy"), history.last("validation", "accuracy")
    print(f"{norm:<5} training accuracy {trained:.1%}, validation accuracy {validated:.1%} (one run: no evidence)")

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(7.4, 3.3))
for norm, (_, _, walks) in seen.items():
    steps = walks[walks["length"] > 0].groupby("step")
    for ax, column in (left, "loss"), (right, "turn"):
        low, high = steps[column].min(), steps[column].max()
        ax.fill_between(low.index, low, high, color=plots.color(norm), alpha=0.3, lw=0)
        for edge in (low, high):
            ax.plot(edge.index, edge, color=plots.color(norm), lw=1.2)
left.set(yscale="log", xlabel="training step", ylabel="loss along the step (nats)", title="the loss")
right.axhline(1, color=plots.GREY, ls="--", lw=1)
right.set(yscale="log", xlabel="training step", ylabel="‖g′ − g‖ / ‖g‖", title="the gradient")
left.text(60, 2, "no norm", color=plots.color("none"), fontweight="bold")
left.text(5, 0.15, "batch norm", color=plots.color("batch"), fontweight="bold")
fig.suptitle("band: steps of 0.5 to 4 × the peak learning rate; one run each", fontsize=11)
plots.save(
    fig,
    "03_along_the_run",
    "Bands along a step, during training: without a norm the loss is higher, and so is the gradient's largest change",
)

# %%
turns, far = {}, {}
for norm, (_, _, walks) in seen.items():
    later = walks[walks["step"] > 0]
    turns[norm], far[norm] = later["turn"].max(), later[later["length"] == recipe.lr]["distance"].median()
print("largest change of the gradient after the first epoch:", end=" ")
print(f"batch norm {turns['batch']:.1f}, no norm {turns['none']:.1f}")
print(f"a step at the peak rate, median distance: batch norm {far['batch']:.3f}, no norm {far['none']:.3f}")
assert turns["batch"] < turns["none"]
assert far["batch"] < far["none"], "the longer gradient goes the longer way"

# %% [markdown]
# Both go along at the same **rate**, as in the paper. Where the gradient is longer the step is longer, too: compare the
# two distances. That part of the wider band is distance, not roughness. And a narrow band alone is no smooth road:
# where the network without a norm is still near guessing, it gives nearly the same answer to all images.

# %% [markdown]
# ### The other explanation: drifting activations
#
# Its inventors explained batch normalization differently: the inputs of a layer *drift* while the layers before it
# learn, and each layer runs after them ("internal covariate shift"). Do they drift? The probes saw what leaves each
# ReLU: its mean and its standard deviation. Here they are as multiples of what they were at the first step.

# %%
drift = {}
for norm, (_, frame, _) in seen.items():
    relus = frame[frame["layer"].str.contains("activation")]
    for metric in ("std", "mean"):
        rows = relus[relus["metric"] == f"activation_{metric}"]
        table = rows.pivot(index="layer", columns="step", values="value")  # layers × steps
        table = table.loc[["stem.activation", *table.index.drop("stem.activation")]]  # in the order of the network
        drift[norm, metric] = np.log2(table.div(table[1], axis=0))  # 0: as at the first step; 1: twice as much

# %%
fig, axes = plt.subplots(2, 2, figsize=(7.4, 5.2), sharex=True, sharey=True)
look = {"cmap": "vlag", "vmin": -4, "vmax": 4, "aspect": "auto", "interpolation": "nearest"}
for ax, ((norm, metric), table) in zip(axes.T.flat, drift.items(), strict=True):
    shown = ax.imshow(table, **look, extent=(1, table.columns.max() + 5, len(table) - 0.5, -0.5))
    ax.set_title(f"{'batch norm' if norm == 'batch' else 'no norm'}: {metric}")
    ax.set_yticks(range(9), ["stem", *(f"layer {layer} {half}" for layer in range(1, 5) for half in "ab")])
for ax in axes[1]:
    ax.set_xlabel("training step")
bar = fig.colorbar(shown, ax=axes, ticks=(-4, -2, 0, 2, 4), label="multiple of the value at step 1")
bar.ax.set_yticklabels(["1/16", "1/4", "1", "4", "16"])
plots.save(
    fig,
    "03_drift",
    "Mean and standard deviation of each layer along training: steady with batch norm, wandering without",
)

# %%
largest = {norm: 2 ** drift[norm, "std"].abs().max().max() for norm in seen}
print("largest factor between a standard deviation and that of the first step:")
print(f"{largest['batch']:.1f} with batch norm, {largest['none']:.1f} without")
at_end = {norm: 2 ** drift[norm, "std"].iloc[:, -1].abs().max() for norm in seen}
print(f"at the end of the run: {at_end['batch']:.1f} and {at_end['none']:.1f}")
assert largest["batch"] < 2 < largest["none"]

# %% [markdown]
# Behind batch norm they hardly move. (Without, the largest factor is of a moment early in the run, when the network is
# near guessing.) But that is nearly so by construction: the mean and the standard deviation that the norms just before
# them fix, up to γ and β. Santurkar et al. measured the drift otherwise, too: by how much a layer's gradient changes
# when the layers before it take their step. They found no reduction of it by batch norm. And they let a
# batch-normalized network's activations drift on purpose, by adding noise after the normalization: it still trained as
# well. A smoother surface is the explanation that fits the range of learning rates here. It is disputed, too: measured
# by the Hessian, batch norm need not smooth the surface of a shallow network ([Yao et al.
# 2020](https://arxiv.org/abs/1912.07145)).
#
# ## Where it fails
#
# ### Small batches?
#
# Statistics of a few numbers are noisy, and so batch norm is said to fail when a batch is small. Group and layer norm
# do not look at other images. For all three, and for batches of 2 to 256 images: 3,200 images, 2 epochs, each at the
# best of three learning rates, five seeds.

# %%
small = experiments.measure("batch_size") if RECOMPUTE else experiments.load("batch_size")
sizes, kinds = (2, 8, 32, 256), ("batch", "group", "layer")
table = 100 * evidence.finals(small.runs, "validation accuracy")  # a row a seed, a column a variant
fig, ax = plt.subplots()
ends = {}
for kind in kinds:
    values = table[[f"{kind}, {size} images" for size in sizes]].T
    mean, half = values.mean(axis=1), plots.half_intervals(values)
    ax.errorbar(sizes, mean, yerr=half, fmt="o-", color=plots.color(kind), capsize=4)
    ends[kind] = mean.iloc[-1]
for kind, height in plots.spread(ends, ax).items():
    ax.text(300, height, kind, color=plots.color(kind), va="center", fontweight="bold")
ax.set(xscale="log", xlabel="images in a batch (logarithmic)", ylabel="validation accuracy (%)", xlim=(1.7, 290))
ax.set_xticks(sizes, map(str, sizes))
ax.minorticks_off()
ax.set_title(f"mean of n = {len(table)} seeds, 95 % intervals", loc="left")
plots.save(
    fig,
    "03_batch_size",
    "Validation accuracy against batch size: batch, group and layer norm close together, at 256 all fall, layer most",
)

# %%
# NBVAL_CHECK_OUTPUT
for row in claims[claims["experiment"] == "batch_size"].itertuples():
    low, high = 100 * row.low, 100 * row.high
    print(
        f"{row.variant} − {row.baseline}: {100 * row.difference:+.1f} points ({low:+.1f} to {high:+.1f}), n = {row.n}"
    )
    print(f"   {row.claim} (by more than {100 * row.margin:g} points): {row.verdict}")
assert claims[claims["experiment"] == "batch_size"]["verdict"].iloc[0] == "refuted"

# %% [markdown]
# In batches of two, batch norm keeps up with group norm **here**. Elsewhere it does not: on ImageNet, a ResNet-50 with
# batch norm makes 10.6 points more errors than one with group norm when there are two images in a batch ([Wu & He
# 2018](https://arxiv.org/abs/1803.08494)). Network, images and length of training all differ, so this experiment cannot
# tell why. But it does tell that "batch norm needs large batches" is no law.
#
# Compare the three at one batch size. From left to right something else changes too: all runs see as many images, so
# larger batches mean fewer steps. And each point is at the best of only three rates. Where that is the smallest or the
# largest, a better one may lie beyond it, and the point too low:

# %%
# NBVAL_CHECK_OUTPUT
best, ends = evidence.best_lr(small.sweep), {"smallest": [], "largest": []}
for variant, rates in small.sweep.groupby("variant", sort=False)["lr"]:
    for name, end in {"smallest": rates.min(), "largest": rates.max()}.items():
        if best[variant] == end:
            ends[name].append(variant)
for name, variants in ends.items():
    print(f"best at the {name} rate tried: {'; '.join(variants)}")
assert ends == {"smallest": ["layer, 32 images", "group, 8 images"], "largest": ["batch, 256 images"]}
sweep_256 = small.sweep[small.sweep["variant"] == "batch, 256 images"]
rising = [evidence.finals(runs, "validation accuracy").iloc[:, 0].mean() for _, runs in sweep_256.groupby("lr")]
assert rising == sorted(rising)
assert max(ranges["batch"]) >= 10 * best["batch, 256 images"] - 1e-9

# %% [markdown]
# For batch norm in batches of 256 it is the largest that was tried, accuracy still rises there, and above it trained at
# ten times that rate (in batches of 128). So how much it really loses in batches of 256 is not known.
#
# ### Forgetting `.eval()`

# %%
exercises.quiz("03.without_eval")

# %% [markdown]
# Five networks, each trained for a few seconds. Then all of them classify 1,000 validation images, a hundred of each
# class. The images are the same in all cases; what differs is the mode, the order, and the size of the batches.

# %%
labels = fashion.validation.labels
chosen = torch.cat([(labels == label).nonzero()[:100, 0] for label in range(10)])  # sorted by class
pixels, truth = fashion.validation.images[chosen] / 255, labels[chosen]
mixed = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
brief = replace(fashion.take(3_200), validation=fashion.validation[:500])
nets = []
for seed in range(device.budget(5, small=2)):
    torch.manual_seed(seed)
    nets.append(CNN(CNNConfig(width=8)))
    quick = train.Recipe(epochs=2, batch_size=64, lr=0.3, crop_padding=0, flip=False, seed=seed)
    train.fit(nets[-1], brief, quick, device="cpu", precision="fp32", progress=False)


# %%
from copy import deepcopy


@torch.no_grad()
def accuracy(net, x, truth, batch=250):
    """Percent correct, in the mode that the network is in."""
    answers = torch.cat([net(part).argmax(1) for part in x.split(batch)])
    return 100 * (answers == truth).sum().item() / len(truth)


sight = data.normalize(pixels, stats)
right = [accuracy(net.eval(), sight, truth) for net in nets]
batch_sizes, wrong = (10, 25, 100), {"mixed": [], "sorted by class": []}
for order, name in (mixed, "mixed"), (torch.arange(1000), "sorted by class"):
    for batch in batch_sizes:
        copies = [deepcopy(net).train() for net in nets]  # the wrong mode changes the running statistics, too
        wrong[name].append([accuracy(net, sight[order], truth[order], batch) for net in copies])
        if name == "sorted by class" and batch == 10:
            ruined = [accuracy(net.eval(), sight, truth) for net in copies]

# %%
fig, ax = plt.subplots()
lines = {"right mode": ([right] * len(batch_sizes), plots.BLUE), "train mode, mixed": (wrong["mixed"], plots.ORANGE)}
lines["train mode, sorted by class"] = wrong["sorted by class"], plots.VERMILION
for name, (values, shade) in lines.items():
    values = np.array(values)  # batch sizes × networks
    ax.plot(batch_sizes, values.mean(1), "o-", color=shade)
    ax.fill_between(batch_sizes, values.min(1), values.max(1), color=shade, alpha=0.25, lw=0)
    above = name != "train mode, mixed"
    height, side = values[-1].mean() + (4 if above else -4), "bottom" if above else "top"
    ax.text(100, height, name, color=shade, ha="right", va=side, fontweight="bold")
ax.set(xscale="log", ylim=(0, 100), xlabel="images in a batch (logarithmic)", ylabel="validation accuracy (%)")
ax.set_xticks(batch_sizes, map(str, batch_sizes))
ax.minorticks_off()
ax.set_title(f"mean and range of n = {len(nets)} networks, 1,000 images", loc="left")
plots.save(
    fig,
    "03_without_eval",
    "Validation accuracy in the right and in the wrong mode: mixed batches cost little, sorted ones most of it",
)


# %%
def difference(ours, theirs):
    """The difference of two accuracies of the same networks, in words."""
    row = evidence.paired(np.array(ours), np.array(theirs))
    interval = f"95 % interval {row['low']:+.0f} to {row['high']:+.0f}, n = {row['n']}"
    return f"{row['difference']:+.0f} points ({interval})"


by_class = wrong["sorted by class"][-1]
print(f"train mode, sorted batches of 100, instead of .eval(): {difference(by_class, right)}")
assert np.mean(right) - np.mean(by_class) > 20, "of the same networks, on the same images"

# %% [markdown]
# Nothing is wrong with these networks. But a batch of a hundred shirts is brought to mean 0 and standard deviation 1 by
# its own statistics, and what told shirts from the average image is subtracted.
#
# It goes on. Without `.eval()` the layer also *learns* its running statistics from these batches, so that afterwards
# even the right mode is worse than it was:

# %%
print(f".eval() mode, after a pass in train mode over sorted batches of 10: {difference(ruined, right)}")
assert np.mean(ruined) < np.mean(right) - 2

# %% [markdown]
# ### Other light than in training
#
# The running statistics are those of the training images. What if the photographs that come later are darker, or noisy?
# The weights may still be right, but mean and variance are not. One remedy needs no labels: reset the running
# statistics and compute them again on the new images (*adaptive batch normalization*, [Li et al.
# 2016](https://arxiv.org/abs/1603.04779)).

# %%
@torch.no_grad()
def with_new_statistics(net, x):
    """A copy of the network whose running statistics are those of the images x; weights, γ and β stay."""
    net = deepcopy(net).train()
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.reset_running_stats()
            layer.momentum = None  # the plain average of all batches
    for part in x[mixed].split(250):
        net(part)
    return net.eval()


noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
shifts = {
    "light (1 = as in training)": {light: pixels * light for light in (1.0, 0.5, 0.2)},
    "noise (std, pixels 0–1)": {std: (pixels + std * noise).clamp(0, 1) for std in (0.0, 0.2, 0.4)},
}
stored, renewed = {}, {}
for name, variants in shifts.items():
    inputs = [data.normalize(x, stats) for x in variants.values()]
    stored[name] = [[accuracy(net, x, truth) for net in nets] for x in inputs]
    renewed[name] = [[accuracy(with_new_statistics(net, x), x, truth) for net in nets] for x in inputs]

# %%
fig, axes = plt.subplots(1, 2, figsize=(7.4, 3.2), sharey=True)
for ax, (name, variants) in zip(axes, shifts.items(), strict=True):
    kinds = (stored, "statistics of the training", plots.DARK), (renewed, "of the new images", plots.BLUE)
    for values, text, shade in kinds:
        found = np.array(values[name])  # strengths × networks
        ax.plot(list(variants), found.mean(1), "o-", color=shade, label=text)
        ax.fill_between(list(variants), found.min(1), found.max(1), color=shade, alpha=0.25, lw=0)
    ax.set(xlabel=name, ylim=(0, 100))
axes[0].invert_xaxis()
axes[0].set_ylabel("validation accuracy (%)")
axes[0].legend(loc="lower left")
fig.suptitle(f"mean and range of n = {len(nets)} networks, 1,000 images", fontsize=11)
plots.save(fig, "03_shift", "Accuracy under less light and more noise: new statistics give back much of what is lost")

# %%
for name in shifts:
    print(f"{name}: at the strongest shift {difference(stored[name][-1], right)}")
    print(f"    new statistics give back {difference(renewed[name][-1], stored[name][-1])}")
dark = [np.array(values["light (1 = as in training)"]) for values in (stored, renewed)]
assert dark[1][-1].mean() > dark[0][-1].mean() + 5
assert (abs(dark[1] - dark[1][0]) < 5).all(), "a change of light is undone"

# %% [markdown]
# Darker pixels are the old ones times a constant. The first convolution passes that on as a scale and a shift of each
# channel (but for the border), and the new statistics take out both: the algebra promises that next to nothing remains.
# Noise is no such change. It destroys something, and statistics bring back only a part.
#
# ## Your turn: make it disappear
#
# In `.eval()` mode batch normalization is the same scaling and shift for every image. A convolution can do that by
# itself. So a trained network can be **folded**: one convolution instead of convolution and normalization, with the
# same result.
#
# Write a function that takes an `nn.Conv2d` and the `nn.BatchNorm2d` behind it, in `.eval()` mode, and returns one
# `nn.Conv2d`. The check compares outputs to $10^{-5}$; then your function folds all blocks of a trained network, and
# both are timed. This is what they run:

# %%
from time import perf_counter


def race(fold):
    """Fold the blocks of a trained network; compare its logits and its speed with those of the network itself."""
    whole, folded = deepcopy(nets[0]).eval(), deepcopy(nets[0]).eval()
    for block in (block for layer in folded.layers for block in layer):
        block.conv1, block.norm1 = fold(block.conv1, block.norm1), nn.Identity()
        block.conv2, block.norm2 = fold(block.conv2, block.norm2), nn.Identity()
        if isinstance(block.shortcut, nn.Sequential):
            block.shortcut = fold(*block.shortcut)
    seconds = {whole: [], folded: []}
    with torch.inference_mode():
        difference = (whole(sight[:250]) - folded(sight[:250])).abs().max() / whole(sight[:250]).abs().max()
        for _ in range(7):
            for net in seconds:
                begin = perf_counter()
                net(sight[:250])
                seconds[net].append(perf_counter() - begin)
    assert difference < 1e-5
    before, after = (1000 * min(times) for times in seconds.values())
    print(f"logits agree to {difference:.0e}; 250 images took {before:.1f} ms, and {after:.1f} ms when folded")


# %%
fold = ...  # def fold(conv, norm): … return a new nn.Conv2d
if exercises.check("03.fold", fold):
    race(fold)
# exercises.hint("03.fold")

# %% jupyter={"source_hidden": true} tags=["solution"]
# Solution: click the dots to unfold it
def solution(conv, norm):
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()  # one number a channel
    folded = deepcopy(conv)
    folded.weight = nn.Parameter(conv.weight * scale.view(-1, 1, 1, 1))  # out_channels is the first axis
    bias = 0 if conv.bias is None else conv.bias
    folded.bias = nn.Parameter(norm.bias + (bias - norm.running_mean) * scale)
    return folded


assert exercises.check("03.fold", solution, quiet=True)
race(solution)

# %% [markdown]
# Once you have it, a question to take along: in the stem a max pooling stands between convolution and normalization.
# When may it be folded too? (Only if no γ is negative: a negative one would turn the largest value into the smallest.)
#
# ## Summary

# %%
def said(row):
    interval = f"95 % interval {100 * row['low']:+.1f} to {100 * row['high']:+.1f}, n = {row['n']}"
    return (
        f"{100 * row['difference']:+.1f} points ({interval}); more than {100 * row['margin']:g} is **{row['verdict']}**"
    )


he, validation, default = (said(row) for _, row in mine.iterrows())
in_twos = said(claims[claims["experiment"] == "batch_size"].iloc[0])
recipes = [each.about["variants"][name] for each, name in ((results, "none"), (lesson_05, "default, no norm"))]
epochs, seen_images = recipes[0]["recipe"]["epochs"], recipes[0]["source"]["images"]
assert all(recipes[0][part] == recipes[1][part] for part in ("recipe", "source")), "both verdicts are of such runs"

# %%
from IPython.display import Markdown

Markdown(f"""
**"Normalizing each batch led to a huge increase in training accuracy"** is {mine["verdict"].iloc[0]} for a network that
starts with He's weights, and {mine["verdict"].iloc[2]} for one that starts with PyTorch's. Both verdicts are after
{epochs} epochs of {seen_images:,} images: a head start, which longer training may shrink.

- **From He initialization,** each at the rate of its best *validation* accuracy ({best_lr["batch"]:g} with it,
  {best_lr["none"]:g} without): {he}.
- **From PyTorch's default:** {default}.
- **On validation images,** from He: {validation}.
- **It forgives learning rates.** With it the network trains at all rates that were tried, {min(tried):g} to
  {max(tried):g}; without it up to {max(ranges["none"]):g} (with every one of {len(results.about["tuning_seeds"])}
  seeds). At a rate of {max(tried):g}, too large for the plain network, the gain is {at_largest:.0f} points.
- **What goes with it:** the scale of the weights cancels, and a step reaches further. The first step lowered the loss
  up to a rate of {reach["rate"]["batch"].min():.2g} or more with it, {reach["rate"]["none"].max():.2g} or less without
  (n = 5 networks each). Much of this is the first gradient, {1 / factors["‖g‖"]:.2g} times as large without; by
  distance the step reached {factors["distance"]:.2g} times as far with it (medians, each by itself).
- **Where it fails:** without `.eval()`, on images sorted by class: {difference(by_class, right)}.
  At a fifth of the light: {difference(dark[0][-1], right)}; new statistics alone bring back
  {difference(dark[1][-1], dark[0][-1])}.
- **Where it does not fail,** here: in batches of 2. Group norm against it: {in_twos}.
""")

# %% [markdown]
# **Sources.** Ioffe & Szegedy 2015, [Batch normalization](https://arxiv.org/abs/1502.03167). Ba, Kiros & Hinton 2016,
# [Layer normalization](https://arxiv.org/abs/1607.06450). Ulyanov, Vedaldi & Lempitsky 2016, [Instance
# normalization](https://arxiv.org/abs/1607.08022). Wu & He 2018, [Group
# normalization](https://arxiv.org/abs/1803.08494). Santurkar et al. 2018, [How does batch normalization help
# optimization?](https://arxiv.org/abs/1805.11604). Bjorck et al. 2018, [Understanding batch
# normalization](https://arxiv.org/abs/1806.02375). Yao et al. 2020, [PyHessian: neural networks through the lens of the
# Hessian](https://arxiv.org/abs/1912.07145). Arora, Li & Lyu 2018, [Theoretical analysis of auto rate-tuning by
# batch normalization](https://arxiv.org/abs/1812.03981). Van Laarhoven 2017, [L2 regularization versus batch and weight
# normalization](https://arxiv.org/abs/1706.05350). Li et al. 2016, [Revisiting batch normalization for practical
# domain adaptation](https://arxiv.org/abs/1603.04779).
