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
# # Start here
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/cnn-course/cnn-course/blob/main/notebooks/00_start_here.ipynb) [![Open on Binder](https://mybinder.org/badge_logo.svg)](https://mybinder.org/v2/gh/cnn-course/cnn-course/main?labpath=notebooks/00_start_here.ipynb)
#
# **What is inside a convolutional network, and which part makes it work?** This course takes one small network apart,
# decision by decision: predict what a part does, take it out, measure what changes.
#
# In this first lesson the whole thing is built in plain sight: one residual block, the network, and the loop that
# trains it. What a block computes is yours to write, and a training step is. Each piece is checked against the course's
# own code; then you train it on real images, and measure your machine. You need Python and a first acquaintance with
# PyTorch (tensors, `nn.Module`); words and symbols are explained in the [glossary](../GLOSSARY.md).
#
# **After this lesson you can** write a residual block and a training step, and read the network and the loop around
# them; tell from the first loss that something is wrong (not that all is well); say what your machine can train, and in
# which time.
#
# Reading takes about 20 minutes, running about one. To write all of it yourself, empty the cells of `Block`, `Net` and
# `training` and fill them from the text (about an hour): the checks below each say whether you are there. (The text
# before each of these cells ends in the names and numbers that the check counts on.)
#
# Run the cells from top to bottom (Shift+Enter, or *Run → Run All Cells*). An exercise that you leave open stops
# nothing. The first cell is the same in every lesson: it finds the course's code. There is no need to read it.

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
# ## The map
#
# Nine lessons, each with one question. After this one they can be read in any order, but for lesson 05, which needs
# lesson 03.

# %%
LESSONS = [
    ("begin", "Start here", "What are the pieces, and do they learn?"),
    ("the data", "Data statistics", "Which mean and standard deviation does the input need?"),
    ("the network", "Size and pooling", "What does it cost to keep the image large?"),
    ("the network", "Batch normalization", "Does it really help, and why?"),
    ("the network", "Residual connections", "How does a gradient cross 100 layers?"),
    ("the network", "Dropout and initialization", "Where do they matter, and where not?"),
    ("the training", "Full training", "How good is it, and how do you know?"),
    ("the training", "Training fast", "Where do the milliseconds go?"),
    ("the evidence", "Ablations compared", "Which decision earned its place?"),
]

# %% jupyter={"source_hidden": true}
# Draw the map: click the dots to unfold the code
from textwrap import fill

import matplotlib.pyplot as plt

from utils import plots

plots.use_style()
fig, ax = plt.subplots(figsize=(7.4, 4.4))
parts = dict.fromkeys(part for part, *_ in LESSONS)
shades = dict(zip(parts, [plots.GREY, plots.ORANGE, plots.BLUE, plots.GREEN, plots.VERMILION], strict=True))
for number, (part, title, question) in enumerate(LESSONS):
    x, y = number % 3, -(number // 3)
    ax.add_patch(plt.Rectangle((x, y), 0.93, 0.88, fc="none", ec=shades[part], lw=2))
    ax.add_patch(plt.Rectangle((x, y + 0.66), 0.93, 0.22, fc=shades[part], alpha=0.3))
    ax.text(x + 0.04, y + 0.76, f"{number:02d}  {part}", va="center", fontsize=11)
    ax.text(x + 0.04, y + 0.6, fill(title, 20), va="top", fontsize=11.5, fontweight="bold")
    ax.text(x + 0.04, y + 0.05, fill(question, 26), va="bottom", fontsize=10.5)
ax.set(xlim=(-0.02, 2.96), ylim=(-2.03, 0.92))
ax.axis("off")
plots.save(
    fig,
    "00_map",
    "Nine boxes, one a lesson, from the data over the network and the training to the evidence, with each question",
)

# %% [markdown]
# Every lesson has exercises that check themselves. Which of them you have solved is kept in a file on this machine,
# and goes nowhere. This is how far you are:

# %%
from utils import exercises

exercises.progress()

# %% [markdown]
# ## The network
#
# A grey image of 28 × 28 pixels enters on the left; ten numbers leave on the right, one for each class. They are called
# *logits*: the largest one is the answer. In between, a *stem* and four *layers* trade size for channels. From the
# second on, each layer doubles the channels and halves height and width (rounded up).
#
# The picture is drawn from the real shapes of a real network, `utils.model.CNN`.

# %%
import torch

from utils.model import CNN, CNNConfig

threads = torch.get_num_threads()  # what PyTorch takes by itself; the measurement at the end uses it again
torch.manual_seed(0)  # the same random weights each time
reference = CNN(CNNConfig(width=16))  # 16 channels in the first layer
plots.save(
    plots.architecture(reference),
    "00_network",
    "The network from left to right: stem, four layers of shrinking and multiplying maps, average, head",
)

# %%
exercises.quiz("00.first_loss")

# %% [markdown]
# The answer comes with the first training step below.

# %% [markdown]
# ## The data
#
# Fashion-MNIST: photographs of ten kinds of clothing, in the repository, so that nothing is downloaded. Some images are
# set aside as *validation* images: the network never learns from them, so they show what it makes of images it has not
# seen.

# %%
from utils import data, device

fashion = data.load("fashion-mnist", progress=False)
print(fashion.train, "to learn from")
print(fashion.validation, "to check with")
print("classes:", ", ".join(fashion.class_names))  # NBVAL_CHECK_OUTPUT

# %% [markdown]
# Pixels come as whole numbers from 0 to 255. The network gets them shifted and scaled: minus the mean, divided by the
# standard deviation of all training pixels. Lesson 01 asks why these two numbers, and how to compute them.

# %%
stats = data.channel_stats(fashion.train.images)
pixels = data.normalize(fashion.train.images[:5000], stats)  # float32 5000×1×28×28
print(f"mean {stats.mean[0]:.4f}, standard deviation {stats.std[0]:.4f} (black is 0, white is 1)")
print(f"afterwards, in 5,000 images: {abs(pixels.mean()):.1f} and {pixels.std():.1f}")  # NBVAL_CHECK_OUTPUT

# %% [markdown]
# ## One residual block
#
# A block computes $y = \mathrm{relu}(f(x) + s(x))$. Here $x$ is what comes in, $\mathrm{relu}$ turns negative numbers
# into zero, $f$ is two convolutions with their normalization, and $s$ is the *shortcut*, which passes $x$ on. So the
# convolutions need to learn only what has to *change* ([He et al. 2015](https://arxiv.org/abs/1512.03385)). Three
# decisions are in these lines:
#
# - **3×3 kernels with padding 1** keep the size of the image, so that $f(x)$ and $x$ can be added.
# - **No bias:** the normalization behind a convolution subtracts the mean, and any bias with it.
# - **A 1×1 convolution in the shortcut** only where the block changes the shape: otherwise $s(x) = x$ and costs
#   nothing.
#
# *Stride* is by how many pixels the kernel moves from one place to the next: with 2, the image is halved. (Names:
# `conv1`, `norm1`, `conv2`, `norm2`, and `shortcut`, an `nn.Identity` or a `Sequential` of convolution and norm. The
# first convolution has the stride.)

# %%
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(c_out)
        self.shortcut = nn.Identity()
        if stride > 1 or c_in != c_out:
            self.shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))


# %% [markdown]
# ### Your turn: the way through the block
#
# The parts are there, the way through them is not. Write a function that takes a block and what comes in, and returns
# $y$. Put it in place of the first line. For a hint, remove the `#` in the last line; each run gives the next one.

# %%
forward = ...  # def forward(block, x): … return y
solved = exercises.check("00.block", forward)
# exercises.hint("00.block")


# %% jupyter={"source_hidden": true} tags=["solution"]
# Solution: click the dots to unfold it
def solution(block: Block, x: Tensor) -> Tensor:  # N×c_in×H×W
    f = F.relu(block.norm1(block.conv1(x)))
    f = block.norm2(block.conv2(f))
    return F.relu(f + block.shortcut(x))  # N×c_out×H/stride×W/stride


assert exercises.check("00.block", solution, quiet=True)

# %% [markdown]
# From here on the block takes the way that you wrote (and the course's, as long as yours is not right):

# %%
Block.forward = forward if solved else exercises.through_block

# %% [markdown]
# Does the shortcut do what the formula says? With $f = 0$ the block must return $\mathrm{relu}(x)$. Setting the scale
# of the last normalization to zero switches $f$ off.

# %%
block = Block(16, 16, stride=1)
nn.init.zeros_(block.norm2.weight)
x = torch.randn(8, 16, 14, 14)
assert torch.equal(block(x), F.relu(x))

# %% [markdown]
# ## Four layers
#
# The stem turns one channel into 16 and pools once: of each 2×2 pixels only the largest value goes on. That leaves a
# quarter of the values for everything that follows. Each layer here is a single block; in a deeper network it is a row
# of them. The *head* averages each channel over the image and combines the averages into ten logits.
#
# The initial weights are drawn with a standard deviation of $\sqrt{2/\text{fan-in}}$, where fan-in counts the inputs of
# one output value. Then the signal neither dies out nor blows up on its way through ReLUs ([He et al.
# 2015](https://arxiv.org/abs/1502.01852)); lesson 05 puts it to the test.
#
# (Names: `stem`, a `Sequential` of `conv`, `pool`, `norm` and `relu`, in this order; `layers`, a `Sequential` of four
# `Sequential`s of one `Block`, where the channels double from the second on, and the image is halved; `head`.)

# %%
from collections import OrderedDict
from itertools import pairwise


class Net(nn.Module):
    def __init__(self, width: int = 16, num_classes: int = 10) -> None:
        super().__init__()
        conv = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.stem = nn.Sequential(
            OrderedDict(conv=conv, pool=nn.MaxPool2d(2), norm=nn.BatchNorm2d(width), relu=nn.ReLU())
        )
        channels = [width, width, 2 * width, 4 * width, 8 * width]
        blocks = [Block(c_in, c_out, stride=c_out // c_in) for c_in, c_out in pairwise(channels)]
        self.layers = nn.Sequential(*[nn.Sequential(block) for block in blocks])
        self.head = nn.Linear(8 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:  # N×1×28×28
        maps = self.layers(self.stem(images))  # N×8·width×2×2
        return self.head(maps.mean(dim=(2, 3)))  # N×num_classes


# %% [markdown]
# **Check it.** The course's network has the same names inside, so its weights fit into yours. Same weights in, same
# logits out, or one of the two networks is wrong. (In double precision, where rounding is too small to be mistaken for
# an error. And from here to the machine's measurement PyTorch uses one thread: several threads gain little on so small
# a network, and wait for each other when other programs are running.)

# %%
from copy import deepcopy

torch.set_num_threads(1)
twin = Net()
twin.load_state_dict(reference.state_dict())
with torch.no_grad():
    ours, courses = (deepcopy(network).double()(pixels[:256].double()) for network in (twin, reference))
difference = (ours - courses).abs().max().item()
print(f"largest difference of the logits of 256 images: {difference:.1g}")
assert difference < 1e-9

# %% [markdown]
# So the table that the course prints is also the table of your network. Most of the weights stand in layer 4, most of
# the work does not. (FLOPs: multiplications and additions for one image, in convolutions and matrix products; PyTorch
# counts no others. Receptive field: the patch of the image that one value has seen. It may be larger than the image;
# then it ends in padding.)

# %%
print(reference)  # NBVAL_CHECK_OUTPUT

# %% [markdown]
# ## A bare training loop
#
# How large should a step be? Small at first, while the weights are random and a long step is risky. Then large, to get
# ahead. Small at the end, to settle. This is a *one-cycle* schedule, after [Smith & Topin
# 2017](https://arxiv.org/abs/1708.07120) (theirs rises for as long as it falls, and moves the momentum, too).

# %%
import numpy as np


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Rise in a straight line for the first fifth of the run, then fall in a straight line, to zero at the end."""
    return peak * float(np.interp(step, [-1, 0.2 * steps, steps], [0, 1, 0]))


# %% [markdown]
# The loop itself. For each batch of 64 images: how wrong is the network (the loss), which way is downhill (the
# gradient), one step that way. Momentum keeps nine tenths of the last step's direction, which evens out what single
# batches say. Each epoch sees all images once, in a new random order.
#
# The loop is written as a *generator*: it hands out the loss after each step, so that whoever runs it can watch. (What
# the check counts on: SGD with Nesterov's momentum of 0.9; the rate is set before each step; the order is drawn once an
# epoch by `torch.randperm`, from a `torch.Generator` with seed 0, and split into 64s.)

# %%
from collections.abc import Iterator


def training(model: nn.Module, images: Tensor, labels: Tensor, epochs: int = 1, peak: float = 0.1) -> Iterator[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=peak, momentum=0.9, nesterov=True)
    shuffle = torch.Generator().manual_seed(0)
    batches = [rows for _ in range(epochs) for rows in torch.randperm(len(labels), generator=shuffle).split(64)]
    for step, rows in enumerate(batches):
        model.train()  # in case somebody evaluated the network in between
        loss = F.cross_entropy(model(images[rows]), labels[rows])
        optimizer.zero_grad()  # gradients add up unless they are cleared
        loss.backward()
        optimizer.param_groups[0]["lr"] = learning_rate(step, len(batches), peak)
        optimizer.step()
        yield loss.item()


# %% [markdown]
# **Check it.** The course's loop is made of the same pieces: batches, optimizer, schedule. From the same weights,
# twenty steps of both must give the same losses. First the course's pieces, on 1,280 images, as many of each class, in
# twenty random batches:

# %%
from utils import train

small = fashion.take(20 * 64)
small_stats = data.channel_stats(small.train.images)
recipe = train.Recipe(epochs=1, batch_size=64, lr=0.1, weight_decay=0.0, crop_padding=0, flip=False)
batches = train.training_batches(small, small_stats, recipe, torch.device("cpu"), "fp32")
model = deepcopy(reference).double()
optimizer = train.make_optimizer(model, recipe)
schedule = train.make_schedule(optimizer, recipe, steps=len(batches))
theirs = []
for images, labels in batches:
    loss = F.cross_entropy(model(images.double()), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()
    theirs.append(loss.item())

# %% [markdown]
# Now yours. Both run in double precision: the course's layers and yours need not add up in the same order, in another
# order sums are rounded differently, and each step makes such a difference larger. (That is also why two machines
# seldom train exactly the same network.)

# %%
inputs = data.normalize(small.train.images, small_stats).double()
yours = list(training(deepcopy(twin).double(), inputs, small.train.labels))
difference = np.abs(np.subtract(yours, theirs)).max()
print(f"your loss at step 1: {yours[0]:.3f}, at step 20: {yours[-1]:.3f}")
print(f"largest difference from the course's: {difference:.1g}")
assert len(yours) == len(theirs) == 20
assert difference < 1e-6

# %% [markdown]
# And your prediction? A network that knows nothing gives each of the ten classes a probability near 1/10. The loss is
# $-\ln p$, where $p$ is the probability of the true class: $-\ln \tfrac{1}{10} = \ln 10$. When the first loss of a
# network with normalization is far from this, something is wrong with the initialization or the input. It is the
# cheapest test there is, and a coarse one: behind batch norm a wrong scale of the input does not show (lesson 01), nor
# do wrong labels.

# %%
print(f"ln 10 = {np.log(10):.2f}, first loss = {yours[0]:.2f}")
assert abs(yours[0] - np.log(10)) < 0.5

# %% [markdown]
# ## Train it
#
# Now with more images, each of them seen three times. First, two helpers. `predict` gives the probabilities of the
# classes.

# %%
@torch.inference_mode()  # no gradients needed: faster, and less memory
def predict(model: nn.Module, images: Tensor) -> Tensor:  # N×1×28×28 → N×num_classes
    model.eval()  # batch normalization uses what it has learned, not the batch at hand
    return torch.cat([model(part).softmax(dim=1) for part in images.split(500)])


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return (predict(model, images).argmax(dim=1) == labels).sum().item() / len(labels)


# %% [markdown]
# `draw` shows how far training has come: the loss of each step, and the share of validation images classified
# correctly.

# %%
def draw(fig: plt.Figure, losses: list[float], accuracies: dict[int, float], steps: int) -> None:
    fig.clear()
    left, right = fig.subplots(1, 2)
    left.axhline(np.log(10), color=plots.GREY, ls="--", lw=1)
    left.text(steps, np.log(10) + 0.05, "knows nothing: ln 10", ha="right", fontsize=10)
    left.plot(range(1, len(losses) + 1), losses, color=plots.color("train"), lw=1)
    left.set(xlim=(0, steps), ylim=(0, 3), xlabel="step", ylabel="training loss (nats)")
    for step, value in accuracies.items():
        right.annotate(f"{value:.0%}", (step, 100 * value), (-4, 6), textcoords="offset points", ha="right")
    right.plot(accuracies.keys(), [100 * value for value in accuracies.values()], "o-", color=plots.color("validation"))
    right.set(xlim=(-0.15 * steps, 1.05 * steps), ylim=(0, 105), xlabel="step", ylabel="validation accuracy (%)")


# %% [markdown]
# Ready? This takes less than a minute. The picture is redrawn while the network learns.

# %%
from time import perf_counter

from IPython.display import display

subset = fashion.take(6400)
images, labels = data.normalize(subset.train.images, stats), subset.train.labels
unseen, truth = data.normalize(fashion.validation.images, stats), fashion.validation.labels
torch.manual_seed(0)
net, epochs, losses = Net(), device.budget(3, small=2), []
steps_per_epoch = len(labels) // 64
accuracies = {0: accuracy(net, unseen, truth)}  # at step 0: before anything is learned
fig = plt.figure(figsize=(7.2, 3.0))
plt.close(fig)  # only the live picture is shown
alt = {"image/png": {"alt": "Training loss falling and validation accuracy rising, step by step"}}
live, begin = display(fig, display_id=True, metadata=alt), perf_counter()
for step, loss in enumerate(training(net, images, labels, epochs), start=1):
    losses.append(loss)
    if step % steps_per_epoch == 0:
        accuracies[step] = accuracy(net, unseen, truth)
    if step % 20 == 0:
        draw(fig, losses, accuracies, epochs * steps_per_epoch)
        live.update(fig, metadata=alt)
seconds = perf_counter() - begin

# %%
plots.save(fig, "00_training", show=False)
print(f"{epochs} epochs of {len(labels):,} images in {seconds:.0f} s")
print(
    f"{len(truth):,} validation images: {accuracies[0]:.1%} classified correctly before, {accuracies[step]:.1%} after"
)
assert accuracies[0] < 0.3
assert accuracies[step] > 0.75

# %% [markdown]
# ## What does it say?
#
# Six validation images that your network classifies correctly, and six that it does not. Above each: its answer, how
# sure it is, and in the second row what the image is called in the data set. Would you have known?

# %%
probabilities = predict(net, unseen)
sure, answers = probabilities.max(dim=1)
rows = [(answers == truth).nonzero()[:6, 0], (answers != truth).nonzero()[:6, 0]]
fig, axes = plt.subplots(2, 6, figsize=(7.4, 3.5))
for ax, index in zip(axes.flat, torch.cat(rows).tolist(), strict=True):
    said, name = fashion.class_names[answers[index]], fashion.class_names[truth[index]]
    right = said == name
    plots.show_image(ax, fashion.validation.images[index])
    title = f"✔ {said}\n{sure[index]:.0%}" if right else f"✘ {said}\n{sure[index]:.0%}\nis: {name}"
    ax.set_title(title, fontsize=9.5, color=plots.BLUE if right else plots.VERMILION)
plots.save(fig, "00_predictions", "Twelve images with the network's answer and its probability: six right, six wrong")

# %% [markdown]
# ## From here on we import it
#
# That is the course's engine. From the next lesson on it comes from `utils`, which adds what a bare loop leaves out:
#
# | here | the course has | which adds |
# |---|---|---|
# | `Block`, `Net` | `model.CNN(CNNConfig(…))` | every decision as one field: depth, normalization, initialization, … |
# | `pixels[rows]` | `data.Batches` | random crops and flips, the right number format, any device |
# | `training` | `train.fit(model, data, Recipe(…))` | weight decay, checkpoints, GPU, mixed precision, a history |
#
# Your twenty steps from above, now in one line (in double precision, as above):

# %%
from dataclasses import replace

small = replace(small, validation=small.validation[:100])
history = train.fit(deepcopy(reference), small, recipe, device="cpu", precision="fp64", progress=False)
print(f"mean loss of twenty steps: yours {np.mean(yours):.6f}, fit {history.last('train', 'loss'):.6f}")
assert abs(np.mean(yours) - history.last("train", "loss")) < 1e-6

# %% [markdown]
# ## What can this machine do?
#
# The course picks the fastest device that PyTorch finds, and the fastest number format in which that device trains
# safely: 32 bits (`fp32`), or 16 (`bf16`, `fp16`) where it multiplies those natively. Here is what it picked, and how
# many images a second it trains the course's default network on: 32 channels in the first layer, but batches of 256,
# half of the recipe's, which take less memory. The first of two epochs warms up, the second is measured.

# %%
from IPython.display import Markdown

torch.set_num_threads(threads)
machine = device.describe()
speed = {"fp32": 0.0, machine["precision"]: 0.0}
few = replace(fashion.take(10 * 256), validation=fashion.validation[:512])
trial = train.Recipe(epochs=2, batch_size=256, lr=0.1)
for precision in speed:
    history = train.fit(CNN(), few, trial, precision=precision, progress=False)
    speed[precision] = history.last("train", "images_per_second")
measured = {f"images/s in {precision}": f"{value:,.0f}" for precision, value in speed.items()}
lines = [f"| {name} | {value} |" for name, value in (machine | measured).items()]
Markdown("\n".join(["| this machine | |", "|---|---|", *lines]))

# %%
best = max(speed, key=speed.get)
minutes = train.Recipe.epochs * len(fashion.train) / speed[best] / 60
print(f"{train.Recipe.epochs} epochs of {len(fashion.train):,} training images: about {minutes:.1f} minutes in {best}")

# %% [markdown]
# How long will the lessons run? Each was timed on the machine that the course was written on. Where the CPU of yours
# trains more slowly (most lessons train on it, also where there is a GPU), the table multiplies the whole time by how
# much. Only the training slows down that much, so that is a rough guess, and rather too long. (Where yours trains
# faster, the rest may not be faster: the times stay as they are.)

# %%
from utils import lessons

on_cpu = speed[best]
if device.pick().type != "cpu":
    on_cpu = train.fit(CNN(), few, trial, device="cpu", progress=False).last("train", "images_per_second")
rows = [f"| {name} | {seconds:.0f} |" for name, seconds in lessons.expected(on_cpu).items()]
Markdown("\n".join(["| lesson | seconds, about |", "|---|---|", *rows]))

# %% [markdown]
# Other programs that run at the same time take their share: run the cells again when the numbers look odd. What makes
# training fast is the subject of lesson 07.

# %% [markdown]
# ## Your turn: follow the shapes
#
# Ten **colour** images, each **96 pixels high and 80 wide**, enter the network (width 16, with three channels at its
# entrance). Which shape leaves **layer 3**? Work it out on paper first.
#
# Put your answer in place of the dots.

# %%
answer = ...  # (N, C, H, W)
exercises.check("00.shape", answer)
# exercises.hint("00.shape")

# %% jupyter={"source_hidden": true} tags=["solution"]
# Solution: click the dots to unfold it
colour = CNN(CNNConfig(in_channels=3, width=16))
maps = colour.stem(torch.zeros(10, 3, 96, 80))
for layer in colour.layers[:3]:
    maps = layer(maps)
assert exercises.check("00.shape", tuple(maps.shape), quiet=True)

# %% [markdown]
# ## Your turn: half a batch at a time
#
# A batch does not fit into memory, but half of it does. Write a function that takes **one** training step on the whole
# batch while never more than half of it is under way, from the forward pass to the end of its `backward()`. Apart from
# rounding, the weights must end up as if the batch had gone through in one piece. (The number of images is even, and
# the model has no batch normalization: that would see two small batches.) Put your function in place of the first line.

# %%
step_in_halves = ...  # def step_in_halves(model, optimizer, images, labels): …
exercises.check("00.halves", step_in_halves)
# exercises.hint("00.halves")

# %% jupyter={"source_hidden": true} tags=["solution"]
# Solution: click the dots to unfold it
def solution(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> None:
    optimizer.zero_grad()
    for x, y in zip(images.chunk(2), labels.chunk(2), strict=True):
        loss = F.cross_entropy(model(x), y) / 2  # the mean of two means
        loss.backward()  # adds to the gradients that are there
    optimizer.step()


assert exercises.check("00.halves", solution, quiet=True)

# %% [markdown]
# ## Summary

# %%
gain = f"from {accuracies[0]:.1%} to {accuracies[step]:.1%} of {len(truth):,} validation images classified correctly"
Markdown(f"""
- **A convolutional network is short.** Your block, network and loop do what the course's do: in {len(yours)} steps
  the largest difference between their losses was {difference:.1g}.
- **It learns fast.** {len(subset.train):,} images, {epochs} epochs, {seconds:.0f} s: {gain}.
  That is one run with one seed, and no evidence for any single part of the network. Looking for
  that is what the other lessons are for.
- **The first loss is a test.** It was {yours[0]:.2f}; a network that knows nothing has ln 10 = {np.log(10):.2f}.
- **This machine** trains the course's default network on {speed[best]:,.0f} images a second
  ({machine["device"]}, {best}).
""")

# %% [markdown]
# Sources: He et al. 2015, [Deep Residual Learning](https://arxiv.org/abs/1512.03385) and [Delving Deep into
# Rectifiers](https://arxiv.org/abs/1502.01852); Ioffe & Szegedy 2015, [Batch
# Normalization](https://arxiv.org/abs/1502.03167); Smith & Topin 2017,
# [Super-Convergence](https://arxiv.org/abs/1708.07120); Xiao et al. 2017,
# [Fashion-MNIST](https://arxiv.org/abs/1708.07747).
#
# Next: lesson 01 looks at the data before anything learns from them.
