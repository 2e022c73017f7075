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
# # Residual connections: does the gradient get lost on the way back?
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/cnn-course/cnn-course/blob/main/notebooks/04_residual_gradient_flow.ipynb) [![Open on Binder](https://mybinder.org/badge_logo.svg)](https://mybinder.org/v2/gh/cnn-course/cnn-course/main?labpath=notebooks/04_residual_gradient_flow.ipynb)
#
# "The depth can be raised to 100 as long as the residual connections stay; otherwise the gradient will fail to get
# propagated all the way back." This lesson follows the gradient through networks of 10 to 102 layers, trains them, and
# asks why the ones learn and the others do not.
#
# **After this lesson you can** read a profile of gradients; say in which networks they vanish, explode or stay, and
# why; tell a vanishing gradient from a network that does not train; make a network of 50 layers train by one change.
#
# **You need** lesson 00 and a little PyTorch; lesson 03 helps. Reading takes about 50 minutes, running about one.

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
# ## One plus sign
#
# A **plain** block sends its input $x$ through two convolutions; call what they do $f$. A **residual** block adds its
# input to what comes out ([He et al. 2015](https://arxiv.org/abs/1512.03385)):
#
# $$\text{plain:}\quad y = f(x) \qquad\qquad \text{residual:}\quad y = x + f(x)$$
#
# In the course's network that is one field, `residual`. Another one, `depth`, counts the blocks: 4, 10, 28 and 50
# blocks of two convolutions, with stem and head, make 10, 22, 58 and 102 weighted layers.
#
# The loss stands behind the last layer. Its gradient starts there and comes back, block by block, to the first one.
# What do you say arrives?

# %%
from utils import exercises

exercises.quiz("04.way_back")

# %% [markdown]
# ## A probe in every layer
#
# To see it, the course has an instrument. `probes.Probes` hooks into every layer of a network, which stays as it is,
# and records what passes: on the way there, on the way back, and when the optimizer takes its step.

# %%
import torch
import torch.nn.functional as F

from utils import data, device, plots, probes
from utils.model import CNN, CNNConfig

plots.use_style()
torch.set_num_threads(1)  # of little use in such narrow networks; and one thread gives the same numbers every time
fashion = data.load("fashion-mnist", progress=False)
stats = data.channel_stats(fashion.train.images)
images = data.normalize(fashion.train.images[:256], stats)  # float32 256×1×28×28
labels = fashion.train.labels[:256]


# %%
def one_step(seed, **fields):
    """A random network, and what the probes see of its first step: 8 images, in double precision."""
    torch.manual_seed(seed)
    net = CNN(CNNConfig(width=8, **fields)).double()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with probes.Probes(net) as probe:  # records the first step, and then every tenth
        F.cross_entropy(net(images[:8].double()), labels[:8]).backward()
        optimizer.step()
    return net, probe.frame()


net, seen = one_step(seed=0)
print(seen[seen["layer"].isin(["layers.0.0.conv1", "layers.0.0.activation1"])].to_string(index=False))

# %% [markdown]
# Two of these metrics are gradients.
#
# - The **activation gradient** is that of the loss by a layer's output. It is what travels back. We read it at the end
#   of each block.
# - The **weight gradient** is what the optimizer uses. It is made of what comes back *and* of the activations that came
#   in.
#
# Double precision, because some of what follows is so small that single precision would call it 0. The next cell gives
# the weighted layers their numbers: 1 is the first convolution, at the **input**; the last one is the head, at the
# **output**.

# %%
def numbers(net):
    """The number of the weighted layer that each convolution, and each non-linearity behind one, belongs to."""
    found = {"stem.conv": 1, "stem.activation": 1}
    blocks = [f"layers.{i}.{j}" for i, layer in enumerate(net.layers) for j in range(len(layer))]
    for place, block in enumerate(blocks):
        for half in (1, 2):
            found[f"{block}.conv{half}"] = found[f"{block}.activation{half}"] = 2 * place + 1 + half
    return found | {"head": 2 * len(blocks) + 2}


def profile(seed, **fields):
    """Norms by number: of activation gradients at the ends of stem and blocks, of weight gradients everywhere."""
    net, frame = one_step(seed, **fields)
    frame["number"] = frame["layer"].map(numbers(net))
    at_end = (frame["metric"] == "activation_gradient") & frame["layer"].str.contains("stem.activation|activation2")
    wanted = (at_end | (frame["metric"] == "weight_gradient")) & frame["number"].notna()
    return frame.loc[wanted, ["metric", "number", "value"]].sort_values("number")


# %% [markdown]
# ## The grid, not the sentence
#
# Plain and residual, without and with batch norm, from He's weights and from PyTorch's default (smaller ones), at four
# depths, two seeds each: 64 random networks, some seconds. They are textbook networks. `scale_residual=False` leaves
# out something that the course's own network does, and to which we come back.

# %%
import itertools

import pandas as pd

KINDS = {"plain": {"residual": False}, "residual": {"residual": True, "scale_residual": False}}
NORMS = {"no norm": {"norm": "none"}, "batch norm": {"norm": "batch"}}
INITS = {"He": {"init": "he"}, "default": {"init": "default"}}
DEPTHS = {10: {"depth": 4}, 22: {"depth": 10}, 58: {"depth": 28}, 102: {"depth": 50}}  # by weighted layers
frames, seeds = [], range(device.budget(2, small=1))
for names in itertools.product(KINDS, NORMS, INITS, DEPTHS):
    fields = {}
    for name, choices in zip(names, (KINDS, NORMS, INITS, DEPTHS), strict=True):
        fields |= choices[name]
    labelled = dict(zip(("kind", "norm", "init", "layers"), names, strict=True))
    frames += [profile(seed, **fields).assign(seed=seed, **labelled) for seed in seeds]
grid = pd.concat(frames, ignore_index=True)


# %%
import numpy as np


def part(metric="activation_gradient", frame=grid, **names):
    """The gradients of one kind of network: a row a weighted layer, a column a seed."""
    chosen = frame[(frame["metric"] == metric) & (frame[list(names)] == pd.Series(names)).all(axis=1)]
    return chosen.pivot(index="number", columns="seed", values="value")


def arriving(table):
    """Of the gradient at the last block, the share that arrives at each block: geometric mean over the seeds."""
    return np.exp(np.log(table / table.iloc[-1]).mean(axis=1))


# %% [markdown]
# The figure shows which share of the last block's gradient arrives at each block. **Read it from right to left:** all
# lines start with 1 at the output. Networks of all depths are drawn equally long.

# %%
import matplotlib.pyplot as plt
import seaborn as sns

SHADES = {kind: dict(zip(DEPTHS, sns.light_palette(plots.color(kind), 9)[2::2], strict=True)) for kind in KINDS}


def mark_ends(ax):
    """Say which end of an axis from 0 to 1 is which."""
    ax.set_xticks([0.16, 0.8], ["input", "output"])
    ax.tick_params(axis="x", length=0)


# %%
def draw_share(ax, metric, **names):
    """Which share of the last layer's gradient is found at each layer of one kind of network, a line a depth."""
    kind = names["kind"]
    for layers in DEPTHS:
        table = part(metric, layers=layers, **names).drop(index=layers, errors="ignore")  # the head is of another kind
        share = arriving(table)
        ax.plot(share.index / share.index.max(), share, color=SHADES[kind][layers], lw=2, label=f"{layers} layers")
    if share.min() < 1e-12:
        power = int(np.floor(np.log10(share.min())))
        ax.text(0.04, 1e-12, f"down to\n$10^{{{power}}}$", color=plots.color(kind), fontsize=10)
    ax.axhline(1, color=plots.GREY, lw=1, zorder=0)
    ax.set(yscale="log", ylim=(1e-13, 1e9), yticks=[10.0**power for power in (-12, -8, -4, 0, 4, 8)])
    mark_ends(ax)


# %%
LABELS = {"He": "He's weights", "default": "PyTorch's default"}


def small_multiples(metric):
    """`draw_share` of every kind of network: a row for each initialization."""
    fig, axes = plt.subplots(2, 4, figsize=(7.6, 5.0), sharex=True, sharey=True)
    for row, init in zip(axes, INITS, strict=True):
        for ax, (kind, norm) in zip(row, itertools.product(KINDS, NORMS), strict=True):
            draw_share(ax, metric, kind=kind, norm=norm, init=init)
            ax.set_title(f"{kind},\n{norm}" if init == "He" else "", color=plots.color(kind), fontweight="bold")
        row[0].set_ylabel(f"{LABELS[init]}\nshare of the last")
    axes[0, 2].legend(loc="lower center", handlelength=1, borderpad=0)
    fig.suptitle(f"{metric.replace('_', ' ')}, geometric mean of n = {len(seeds)} seeds", fontsize=11)
    return fig


plots.save(
    small_multiples("activation_gradient"),
    "04_grid",
    "Activation gradient from input to output, eight kinds of networks: plain, it vanishes without a norm and explodes "
    "with batch norm; residual, it stays, but explodes from He's weights without a norm",
)

# %% [markdown]
# One word for each kind of 102-layer network. *Vanishes*: less than a thousandth of the gradient arrives at the input.
# *Explodes*: more than a thousand times as much arrives. *Stays*: anything between.

# %%
# NBVAL_CHECK_OUTPUT
fate = {}
for names in itertools.product(KINDS, NORMS, INITS):
    share = arriving(part(**dict(zip(("kind", "norm", "init"), names, strict=True)), layers=102)).iloc[0]
    fate[names] = "vanishes" if share < 1e-3 else "explodes" if share > 1e3 else "stays"
    print(f"{', '.join(names):<29} {share:7.0e} times: {fate[names]}")

# %% [markdown]
# So the sentence holds for one column of four. Without batch norm the gradient of a plain network vanishes. **With**
# batch norm it does the contrary: it explodes. And residual connections alone are no guarantee either: from He's
# weights and without a norm the gradient explodes, too.

# %%
from IPython.display import Markdown

assert {fate["plain", "no norm", init] for init in INITS} == {"vanishes"}
assert {fate["plain", "batch norm", init] for init in INITS} == {"explodes"}
assert {fate["residual", "batch norm", init] for init in INITS} == {"stays"}
assert fate["residual", "no norm", "default"] == "stays"
assert fate["residual", "no norm", "He"] == "explodes"
deeper = {}  # 102 layers against 58: how much more arrives?
for kind in KINDS:
    shares = [arriving(part(kind=kind, norm="batch norm", init="He", layers=layers)).iloc[0] for layers in (58, 102)]
    deeper[kind] = shares[1] / shares[0]
assert 1 < deeper["residual"] < 10
assert deeper["plain"] > 100

# %%
Markdown(f"""
In the last column it grows as well, but look at how the lines lie. Where it explodes each further block multiplies, so
the lines fan out with depth. Here the line of 102 layers lies only {deeper["residual"]:.0f} times above that of 58
(plain: {deeper["plain"]:.0f} times): it grows with depth, but not by a factor a block.
""")

# %% [markdown]
# ### And the gradient of the weights?
#
# The optimizer never sees what travels. It sees what arrives at the **weights**, made of the travelling gradient and of
# the activations that came in. The same picture for that:

# %%
plots.save(
    small_multiples("weight_gradient"),
    "04_grid_weights",
    "Weight gradient from input to output, eight kinds of networks: level from He's weights without a norm; in plain "
    "ones exploding with batch norm, and vanishing from PyTorch's default without",
)

# %% [markdown]
# Look at the upper row. From He's weights and without a norm, the travelling gradient of the plain network vanished and
# that of the residual one exploded; their weight gradients are about **level**. Where less gradient comes back, larger
# activations come in. In a plain network without biases that is exact. ReLU makes a layer's output $\alpha$ times as
# large when its weights are, so it makes no difference which layer's weights grow, and
#
# $$\Big\langle W_l, \frac{\partial L}{\partial W_l} \Big\rangle \quad\text{is the same number in every layer } l$$
#
# ($\langle A, B\rangle$: the sum over all products of an entry of $A$ with that of $B$; $W_l$: the weights of layer
# $l$; $L$: the loss; Euler's theorem, [Du et al. 2018](https://arxiv.org/abs/1806.00900)). Check it in 102 layers:

# %%
torch.manual_seed(0)
chain = CNN(CNNConfig(width=8, depth=50, norm="none", **KINDS["plain"])).double()
F.cross_entropy(chain(images[:16].double()), labels[:16]).backward()
weights = [layer.weight for layer in chain.modules() if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear)]
products = np.array([(weight * weight.grad).sum().item() for weight in weights])
deviation = abs(products / products[0] - 1).max()
print(f"{len(products)} layers, the same product in each, but for {deviation:.0e} of it")
assert len(products) == 102
assert np.allclose(products, products[0], rtol=1e-6)

# %% [markdown]
# So level need not be healthy: a share of the last layer says nothing about its size. And the lower row, where the
# weight gradients of the plain network vanish? PyTorch's default also draws **biases**. Take them away, and look at the
# sizes themselves: of the weight gradient in the first, a middle and the last convolution, and of the activations at
# the end.


# %%
def sizes(init, biases):
    """Weight gradients of the first, middle and last convolution of 102 plain layers, and the activations' std."""
    torch.manual_seed(0)
    net, last = CNN(CNNConfig(width=8, depth=50, norm="none", init=init, **KINDS["plain"])).double(), []
    for name, weight in net.named_parameters():
        if name.endswith("bias") and not biases:
            torch.nn.init.zeros_(weight)
    net.layers[-1].register_forward_hook(lambda module, given, out: last.append(out.std().item()))
    F.cross_entropy(net(images[:16].double()), labels[:16]).backward()
    convolutions = [layer.weight for layer in net.modules() if isinstance(layer, torch.nn.Conv2d)]
    return [convolutions[place].grad.norm().item() for place in (0, 50, -1)] + last


# %%
found = {
    "He": sizes("he", biases=False),
    "default, no biases": sizes("default", biases=False),
    "default": sizes("default", biases=True),
}
print(f"{'':<20}{'first':>8}{'middle':>8}{'last':>8}{'activations':>13}")
for name, (first, middle, end, activations) in found.items():
    print(f"{name:<20}{first:>8.0e}{middle:>8.0e}{end:>8.0e}{activations:>13.0e}")
assert all(0.01 < found[name][0] / found[name][2] < 100 for name in ("He", "default, no biases")), "level, and tiny"
assert max(found["He"][:3]) < 1e-4
assert found["default"][0] / found["default"][2] < 1e-12
assert found["default"][3] > 1e6 * max(found["He"][3], found["default, no biases"][3])

# %% [markdown]
# Without biases what is lost going back is lost going forward, too: the weight gradient is about the same in every
# layer, and next to nothing. Drawn biases feed each layer anew and keep the activations up. Then the last layers get a
# gradient that they can use, and the first ones none.

# %%
def at_weights(kind, init):
    """The share of the last convolution's weight gradient that each of 101 has, without a norm."""
    return arriving(part("weight_gradient", kind=kind, norm="no norm", init=init, layers=102).drop(index=102))


for kind in KINDS:
    assert at_weights(kind, "He").between(0.01, 100).all()
assert at_weights("plain", "default").iloc[0] < 1e-12

# %% [markdown]
# Play with it. On the left the gradient that travels, on the right that of the weights, a line a seed. Three things to
# look for:
#
# - a plain network without norm: from which depth on would single precision (below about $10^{-45}$ all is 0) lose it?
# - a residual network without norm, from He's weights: on the right, *where* are the gradients large? Compare with the
#   plain network with batch norm.
# - what does batch norm make of the difference between the two kinds of weights?


# %%
def flow(layers, kind, norm, init):
    """Both gradients of one kind of network by weighted layer, a line a seed, on a logarithmic axis."""
    fig, axes = plt.subplots(1, 2, figsize=(7.4, 3.0), sharey=True)
    for ax, metric in zip(axes, ("activation_gradient", "weight_gradient"), strict=True):
        table = part(metric, kind=kind, norm=norm, init=init, layers=layers)
        ax.plot(table.index, table, "-", color=plots.color(kind), lw=1.5)
        ax.set(xlabel="weighted layer (1: input)", title=metric.replace("_", " "), xlim=(1, layers), yscale="log")
    low, high = axes[0].get_ylim()
    axes[0].set(ylim=(min(low, 1e-3), max(high, 1e2)), ylabel="norm (logarithmic)")
    return fig


choices = {"layers": {str(layers): layers for layers in DEPTHS}}
choices |= {"network": {kind: kind for kind in KINDS}, "norm": {norm: norm for norm in NORMS}}
choices |= {"weights": {init: init for init in INITS}}
plots.explore_several(flow, choices, {"layers": "58", "network": "plain", "norm": "batch norm", "weights": "He"})

# %% jupyter={"outputs_hidden": true, "source_hidden": true} tags=["solution"]
# Solution: click the dots to unfold it
SMALLEST = 2.0**-149  # the smallest number above 0 in single precision
for init in INITS:
    least = {n: part(kind="plain", norm="no norm", init=init, layers=n).min().min() for n in DEPTHS}
    lost = [str(layers) for layers, norm in least.items() if norm < SMALLEST]
    print(f"plain, no norm, {init}: single precision would lose it at {' and '.join(lost) or 'none'} of these depths")
for kind, norm in (("residual", "no norm"), ("plain", "batch norm")):
    weights = part("weight_gradient", kind=kind, norm=norm, init="He", layers=58).drop(index=58)
    ratio = np.exp(np.log(weights.iloc[0] / weights.iloc[-1]).mean())
    print(f"{kind}, {norm}, He, 58 layers: the first layer's weight gradient is {ratio:.2g} times the last one's")
for norm in NORMS:
    he, default = (arriving(part(kind="plain", norm=norm, init=init, layers=58)).iloc[0] for init in INITS)
    print(f"plain, {norm}, 58 layers: with He's weights {he / default:.2g} times as much arrives as with the default's")

# %% [markdown]
# ## Why it vanishes, why it explodes
#
# ### No norm: a factor a layer
#
# On its way back through a convolution with weights of standard deviation $g/\sqrt{\text{fan\_in}}$, where fan-in
# counts the inputs of one output value, a gradient is multiplied by $g$, typically. ReLU lets half of its square
# through. So a layer of a plain network makes it $g/\sqrt2$ times as large. He's $g = \sqrt2$ is chosen to make that
# 1; PyTorch's $g = 1/\sqrt3$ leaves 0.41.
#
# But from He's weights it vanished, too, if more slowly. That is the fault of small maps. At the end they have 2×2
# numbers, and a 3×3 window that is centred on one of them finds 4 numbers and 5 zeros of the padding. What would go to
# the padding is lost. (More of it at the border than in the middle, so that the square is no longer the same
# everywhere: the cell below keeps it for each place of the map.) Does this explain all?

# %%
import math


def expected_share(depth, gain):
    """What should arrive at the first block of a plain network without norm, as a power of ten."""
    blocks = CNNConfig(depth=depth).blocks
    strides = [2 if layer and place == 0 else 1 for layer, n in enumerate(blocks) for place in range(2 * n)]
    sides = list(itertools.accumulate(strides, lambda side, stride: math.ceil(side / stride), initial=14))
    square, ninth, log = torch.ones(1, 1, sides[-1], sides[-1]).double(), torch.ones(1, 1, 3, 3).double() / 9, 0.0
    for stride, side in zip(strides[::-1], sides[-2::-1], strict=True):  # the way back: H×W squares of the gradient
        rest = side - 1 - stride * (square.shape[-1] - 1)
        before = F.conv_transpose2d(square, ninth, stride=stride, padding=1, output_padding=rest)
        log += math.log10(gain**2 / 2 * before.sum() / square.sum()) / 2
        square = before
    return log


# %%
# NBVAL_CHECK_OUTPUT
for init, gain in (("He", math.sqrt(2)), ("default", 1 / math.sqrt(3))):
    for layers, depth in ((layers, fields["depth"]) for layers, fields in DEPTHS.items()):
        log = np.log10(arriving(part(kind="plain", norm="no norm", init=init, layers=layers)).iloc[0])
        said = expected_share(depth, gain)
        off = 10 ** ((log - said) / (2 * depth)) - 1
        print(f"{init:<7} {layers:>3} layers: expected 10^{said:.1f}, found 10^{log:.1f}: {off:+.0%} a layer")
        assert abs(off) < 0.05, "a few percent a layer"

# %% [markdown]
# Over all these decades the rule is right to a few percent a layer. (In networks as narrow as 8 channels, chance adds
# its own; [Hanin & Nica 2018](https://arxiv.org/abs/1812.05994).)
#
# ### Batch norm: what ReLU's mean is worth
#
# Why does batch norm make it grow? Take a wide network, and a value that batch norm has just brought to mean 0 and
# variance 1.
#
# - **Back through ReLU**, half of the gradient's square remains: $\tfrac12$.
# - **Forward through ReLU**, a variance of $\tfrac12 - \tfrac1{2\pi} = \tfrac{\pi-1}{2\pi}$ remains. The mean is
#   positive now, and the next batch norm subtracts it.
#
# That batch norm divides by the standard deviation that is left, and so it multiplies the gradient's square by
# $\tfrac{2\pi}{\pi-1}$. Both together make $\tfrac{\pi}{\pi-1} \approx 1.47$ for the square: each layer enlarges the
# gradient by a fifth, **whatever the weights are** ([Yang et al. 2019](https://arxiv.org/abs/1902.08129)).

# %%
# NBVAL_CHECK_OUTPUT
z = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
assert abs(z.relu().var() - (math.pi - 1) / (2 * math.pi)) < 1e-3
print(f"a wide network, in theory: {math.sqrt(math.pi / (math.pi - 1)):.2f} a layer")
for init in INITS:
    for layers in (58, 102):
        share = arriving(part(kind="plain", norm="batch norm", init=init, layers=layers)).iloc[0]
        growth = share ** (1 / (layers - 2))
        print(f"{layers} layers of 8 to 64 channels, {init}: {growth:.2f} a layer, {share:.0e} in all")
        assert 1.1 < growth < 1.25

# %% [markdown]
# ### Residual: one plus something
#
# The derivative of $x + f(x)$ is $1 + f'(x)$. Whatever $f$ does, there is a 1 in it; and in a chain of blocks the
# product $\prod (1 + f'_i)$ contains the 1 that goes past all of them. With many numbers in $x$ and in $y$, that 1 is
# the identity matrix $I$:
#
# $$\frac{\partial y}{\partial x} = I + \frac{\partial f}{\partial x}$$
#
# Check it with autograd, in a block of the course's network. That one ends with a ReLU, which lets some of the outputs
# pass and stops the others: a factor of 1 or 0 for each row.

# %%
# NBVAL_CHECK_OUTPUT
from torch.autograd.functional import jacobian

torch.manual_seed(0)
block = CNN(CNNConfig(width=2, depth=8)).double().eval().layers[0][1]
x = torch.randn(1, 2, 4, 4, dtype=torch.float64)


def branch(x):
    return block.norm2(block.conv2(block.activation1(block.norm1(block.conv1(x)))))


whole, of_branch = jacobian(block, x).view(32, 32), jacobian(branch, x).view(32, 32)
passes = (x + branch(x) > 0).double().view(32, 1)  # of the ReLU behind the sum
assert torch.allclose(whole, passes * (torch.eye(32) + of_branch), atol=1e-12)
print("the derivative of a residual block is I + that of its branch, row by row where the ReLU lets it pass")

# %% [markdown]
# A 1 does not vanish. In this network two things spoil it a little: that ReLU, and the first blocks of layers 2 to 4,
# whose shortcut is a 1×1 convolution (the steps in the figure below). [He et al.
# 2016](https://arxiv.org/abs/1603.05027) move the ReLU out of the way.
#
# And a sum can grow. If each block adds a branch as large as its input, the signal's variance doubles, 50 times over,
# and the gradient's does so on the way back. Batch norm in the branch keeps what is added at one size: then the
# variance grows by the same amount at each block, and no longer doubles. So by itself it makes the branch the smaller
# part, the more blocks there are ([De & Smith 2020](https://arxiv.org/abs/2002.10444)).
#
# The course's network goes one step further. With `scale_residual=True`, its default, the $n$ branches of a layer start
# at $1/n$ (small enough for any depth: [Hanin & Rolnick 2018](https://arxiv.org/abs/1803.01719)). Then all of them
# together weigh no more than one. With starts of that kind one can do without any norm: [Zhang et al.
# 2019](https://arxiv.org/abs/1901.09321) trained networks of thousands of layers so.

# %%
frames = []
for norm, init in itertools.product(NORMS, INITS):
    fields = {"residual": True, "depth": 50} | NORMS[norm] | INITS[init]
    frames += [profile(seed, **fields).assign(seed=seed, norm=norm, init=init) for seed in seeds]
scaled = pd.concat(frames)
fig, axes = plt.subplots(1, 4, figsize=(7.6, 2.9), sharey=True)
ends = {}
for ax, (norm, init) in zip(axes, itertools.product(NORMS, INITS), strict=True):
    textbook = arriving(part(kind="residual", norm=norm, init=init, layers=102))
    ours = arriving(part(frame=scaled, norm=norm, init=init))
    ax.plot(textbook.index / 102, textbook, color=plots.SKY, lw=2)
    ax.plot(ours.index / 102, ours, color=plots.color("residual"), lw=2)
    ax.set(yscale="log", ylim=(1e-3, 1e6), title=f"{norm},\n{init}")
    mark_ends(ax)
    ax.axhline(1, color=plots.GREY, lw=1, zorder=0)
    ends[norm, init] = textbook.iloc[0], ours.iloc[0]
axes[0].set_ylabel("share that arrives")
axes[1].text(0.95, 1e5, "textbook", color=plots.SKY, fontweight="bold", ha="right")
axes[1].text(0.95, 4e3, "branches\nat 1/n", color=plots.color("residual"), fontweight="bold", ha="right", va="center")
plots.save(
    fig,
    "04_scaled",
    "Share of the gradient that arrives: nearly level with branches at 1/n where the textbook networks let it grow",
)

# %%
# NBVAL_CHECK_OUTPUT
for (norm, init), (textbook, ours) in ends.items():
    print(f"residual, {norm}, {init}: {textbook:.0e} times in the textbook network, {ours:.2f} at 1/n")
    assert 0.01 < ours < 10
print(f"50 doublings of the square: {2**25:.0e} times. On small maps the branches are smaller, as above: padding.")
assert 1000 * ends["no norm", "He"][1] < ends["no norm", "He"][0] < 2**25

# %% [markdown]
# ## Does it train?
#
# A gradient at the start is one thing. What counts is whether the network learns. So: the same depths, plain against
# residual, with batch norm and without; 8 channels, 6,400 images, 4 epochs, He's weights. The residual networks are now
# the course's own, with branches at $1/n$. Each variant has its own learning rate, the best of a sweep by validation
# accuracy, and seeds that were not used to choose it.
#
# The rows come with the course; `RECOMPUTE = True` measures them again.

# %%
from utils import evidence, experiments

RECOMPUTE = False
NAMES = {"batch norm": "residual", "no norm": "residual_no_norm"}
results = {norm: experiments.measure(n) if RECOMPUTE else experiments.load(n) for norm, n in NAMES.items()}
best_lr = {norm: each.about["best_lr"] for norm, each in results.items()}
finals = {norm: 100 * evidence.finals(each.runs, "train accuracy") for norm, each in results.items()}
rates = pd.DataFrame(best_lr).map("{:g}".format)
for norm, table in finals.items():
    lowest, *_, highest = sorted(results[norm].sweep["lr"].unique())
    guessing = table.columns[table.mean() < 10.5]
    rates.loc[guessing, norm] = f"none ({lowest:g} to {highest:g} tried)"
print("best learning rates, and none where at each the network only guesses:", rates.to_string(), sep="\n")

# %%
def draw_losses(ax, table, color, single):
    """Single runs, or their mean with a 95 % band; where some stay far behind the others, it does not describe them."""
    if single:
        ax.plot(table.index, table, "o-", ms=2, lw=1, color=color)
    else:
        mean, half = table.mean(axis=1), plots.half_intervals(table)
        ax.plot(mean.index, mean, "o-", ms=3, color=color)
        ax.fill_between(mean.index, mean - half, mean + half, color=color, alpha=0.25, lw=0)


# %%
fig, axes = plt.subplots(2, 4, figsize=(7.6, 5.0), sharex=True, sharey=True)
for row, (norm, each) in zip(axes, results.items(), strict=True):
    runs = each.runs[(each.runs["split"] == "train") & (each.runs["metric"] == "loss")]
    for ax, layers in zip(row, DEPTHS, strict=True):
        ax.axhline(math.log(10), color=plots.GREY, ls="--", lw=1)
        for kind in KINDS:
            of_kind = runs[runs["variant"] == f"{kind}, {layers} layers"]
            table = of_kind.pivot(index="epoch", columns="seed", values="value")  # a row an epoch, a column a seed
            draw_losses(ax, table, plots.color(kind), single=norm == "no norm")
        ax.set(xticks=[1, 2, 3, 4], title=f"{layers} layers" if norm == "batch norm" else "")
    row[0].set_ylabel(f"{norm}, n = {each.runs['seed'].nunique()}\ntraining loss (nats)")
for ax in axes[1]:
    ax.set_xlabel("epoch")
axes[0, 0].text(4, 1.9, "plain", color=plots.color("plain"), fontweight="bold", ha="right")
axes[0, 0].text(4, 1.5, "residual", color=plots.color("residual"), fontweight="bold", ha="right")
fig.suptitle("above mean and 95 % band, below a line a seed; dashed: guessing, ln 10", fontsize=11)
plots.save(
    fig,
    "04_training",
    "Training loss by epoch at four depths: residual networks fall at each, plain ones hardly at 102 layers; without "
    "a norm plain ones of 58 and 102 layers stay at guessing",
)

# %% [markdown]
# And the training accuracy of the last epoch (counted while the network still learns), against depth. A small dot is
# one seed; on the left with the 95 % interval of the mean. On the right single networks stay far behind the others of
# their kind, or at guessing, and the line through the means is of none.

# %%
fig, axes = plt.subplots(1, 2, figsize=(7.4, 3.2), sharey=True)
for ax, (norm, table) in zip(axes, finals.items(), strict=True):
    for kind in KINDS:
        values = table[[f"{kind}, {layers} layers" for layers in DEPTHS]].T  # a row a depth, a column a seed
        places, mean, half = range(len(DEPTHS)), values.mean(axis=1), plots.half_intervals(values)
        ax.plot(places, values, ".", ms=5, alpha=0.5, color=plots.color(kind))
        half = half if norm == "batch norm" else None  # no norm: no interval describes them
        ax.errorbar(places, mean, yerr=half, fmt="o-", color=plots.color(kind), capsize=4)
    ax.axhline(10, color=plots.GREY, ls="--", lw=1)
    ax.set(xlabel="weighted layers", ylim=(0, 100), title=f"{norm}, n = {len(table)} seeds")
    ax.set_xticks(places, map(str, DEPTHS))
axes[0].set_ylabel("training accuracy (%)")
axes[0].text(0, 12, "guessing", color=plots.DARK, fontsize=10)
axes[0].text(3, 78, "residual", color=plots.color("residual"), fontweight="bold", ha="right")
axes[0].text(1.4, 55, "plain", color=plots.color("plain"), fontweight="bold", ha="right")
plots.save(
    fig,
    "04_depth",
    "Training accuracy against depth, a dot a seed: residual networks stay up with batch norm, plain ones fall to "
    "guessing; without a norm some of either kind stay there",
)

# %% [markdown]
# The verdicts follow the rule that was set before the runs, and are corrected for all claims of the course.

# %%
# NBVAL_CHECK_OUTPUT
claims = experiments.claims()
mine = claims[claims["experiment"].isin(NAMES.values())]


def said(row, between=" "):
    interval = f"95 % interval {100 * row.low:+.1f} to {100 * row.high:+.1f}, n = {row.n}"
    points = f"{100 * row.difference:+.1f} points of {row.metric} ({interval}): more than {100 * row.margin:g} is "
    return f"{row.variant} − {row.baseline}:{between}{points}"


for row in mine.itertuples():
    print(f"{row.claim}:", said(row, between="\n        ") + row.verdict, sep="\n    ")
each = (finals["no norm"]["residual, 58 layers"] - finals["no norm"]["plain, 58 layers"]).sort_values()
print(f"the last one, seed by seed: {', '.join(f'{value:+.0f}' for value in each)}: read its interval as a rough one")
assert mine["claim"].iloc[-1] == "58 layers do not train without residual connections, without batch norm either"

# %%
right = finals["batch norm"].mean()
deep_plain = finals["batch norm"]["plain, 58 layers"]
assert right["plain, 58 layers"] > 40
assert right["plain, 102 layers"] < 15
Markdown(f"""
"Do not train" says more than was measured: with batch norm, 58 plain layers get {right["plain, 58 layers"]:.0f} % of
the training images right ({deep_plain.min():.0f} to {deep_plain.max():.0f}, by seed), far beyond guessing. Of those of
102 layers {(finals["batch norm"]["plain, 102 layers"] < 15).sum()} of {len(deep_plain)} stay near it.
""")

# %% [markdown]
# ### Degradation
#
# A deeper plain network could copy a shallower one and let its other layers pass everything on. So it *can* fit the
# training images at least as well. In these four epochs gradient descent does not find that solution: the network of 22
# plain layers makes **more training errors** than the one of 10. He et al. (2015) found the same and called it
# *degradation*. They trained far longer, still saw a gap, and suspected slow convergence. It is not overfitting, for
# these are the images that it was trained on.
#
# And is a vanishing gradient the cause? He et al. did not think so. Their plain networks had batch norm, the gradients
# that they looked at had healthy norms, and so they called it unlikely. The grid above agrees: with batch norm nothing
# vanishes.
#
# **Without** a norm it does, and at none of the learning rates that were tried do 58 plain layers get beyond guessing.
# Is the slogan right there? It says that the *first* layers go without. Look at the weights from which these networks
# start, He's:

# %%
torch.manual_seed(0)
stuck = CNN(CNNConfig(width=8, norm="none", **KINDS["plain"], **DEPTHS[58])).double()
logits = stuck(images[:16].double())
F.cross_entropy(logits, labels[:16]).backward()
at_start = [layer.weight.grad.norm().item() for layer in stuck.modules() if isinstance(layer, torch.nn.Conv2d)]
first, middle, end = at_start[0], at_start[28], at_start[-1]
at_head, at_bias = stuck.head.weight.grad.norm().item(), stuck.head.bias.grad.norm().item()
print(f"weight gradient: {first:.0e} in the first convolution, {middle:.0e} in the middle one, {end:.0e} in the last,")
print(f"    {at_head:.0e} in the head, {at_bias:.0e} in the head's bias")
print(f"standard deviation of a logit over 16 images: {logits.std(0).mean():.0e}")
assert max(*at_start, at_head) < 1e-3 < 0.1 < at_bias
assert 0.1 < first / end < 10
assert logits.std(0).mean() < 1e-4

# %% [markdown]
# Every layer goes without, the last ones as well as the first. What was lost was lost on the way **forward**: at the
# head all images look the same, and only its bias can learn: how often each class comes. The slogan is right only from
# PyTorch's default weights, whose biases keep the last layers alive.
#
# Residual connections do not make depth a gain, either. They make it harmless: with batch norm 10 to 102 layers come
# out nearly the same on the training images, and the deepest a little worse than the shallowest on others. (Such short
# runs favour small networks.) Without a norm they do not even do that every time:

# %%
for norm, kind in itertools.product(finals, KINDS):
    means = ", ".join(f"{finals[norm][f'{kind}, {layers} layers'].mean():.1f} % ({layers})" for layers in DEPTHS)
    print(f"mean training accuracy (layers), {norm}, {kind:<8} {means}")
verdict = mine.set_index("claim")["verdict"]
assert verdict["without residual connections, 22 layers fit the training images worse than 10"] == "supported"
assert verdict["with residual connections, 102 layers are as good as 10"] == "refuted"
assert {verdict[f"{layers} layers do not train without residual connections"] for layers in (58, 102)} == {"supported"}
batch = finals["batch norm"].mean()
assert batch["residual, 10 layers"] - batch["residual, 102 layers"] < 3
deepest = finals["no norm"]["residual, 102 layers"]
print(f"residual, 102 layers, no norm, each seed: {', '.join(f'{value:.0f} %' for value in deepest)}")
assert deepest.min() < 15 < 50 < deepest.median()
assert finals["batch norm"]["residual, 102 layers"].min() > 50
sweep = results["no norm"].sweep
tried = sweep[(sweep["variant"] == "plain, 58 layers") & (sweep["split"] == "train") & (sweep["metric"] == "accuracy")]
assert tried["value"].max() < 0.15, "at all rates, in all epochs"

# %% [markdown]
# ## 102 layers, live
#
# Train a pair of 102 layers yourself, with the probes in: 160 images, 25 steps, each at its best rate from above.

# %%
from copy import deepcopy
from dataclasses import replace

from utils import train

tiny = replace(fashion.take(160), validation=fashion.validation[:0])  # only the training accuracy is asked for
recipe = train.Recipe(epochs=5, batch_size=32, crop_padding=0, flip=False)
seen, deep = {}, {}
for kind, residual in (("residual", True), ("plain", False)):
    torch.manual_seed(0)
    deep[kind] = CNN(CNNConfig(width=8, depth=50, residual=residual))
    at = replace(recipe, lr=best_lr["batch norm"][f"{kind}, 102 layers"])
    with probes.Probes(deep[kind]) as probe:
        history = train.fit(deep[kind], tiny, at, device="cpu", precision="fp32", progress=False)
    frame = probe.frame()
    seen[kind] = frame.assign(number=frame["layer"].map(numbers(deep[kind]))).dropna(subset="number")
    print(f"{kind:<8} training accuracy in the last epoch: {history.last('train', 'accuracy'):.0%} (one run)")
    assert (history.last("train", "accuracy") > 0.5) == residual

# %% [markdown]
# What did the probes see? Three numbers for each layer, at the first step (thin) and after 20 steps (thick). A unit is
# *dead* when its ReLU is 0 for the whole batch, at every place. The *update ratio* is the length of a step divided by
# that of the weights; about 1 in 1,000 is a rule of thumb for a step that is neither idle nor wild ([Karpathy
# 2022](https://www.youtube.com/watch?v=P6sfmUTpUmc)).

# %%
metrics = {"activation_gradient": "activation gradient", "dead": "dead units (%)", "update_ratio": "update ratio"}
fig, axes = plt.subplots(1, 3, figsize=(7.6, 3.2))
for ax, (metric, title) in zip(axes, metrics.items(), strict=True):
    for kind, step in itertools.product(seen, (1, 21)):
        chosen = seen[kind][(seen[kind]["metric"] == metric) & (seen[kind]["step"] == step)]
        if metric == "activation_gradient":  # at the ends of the blocks
            chosen = chosen[chosen["layer"].str.contains("stem.activation|activation2")]
        chosen = chosen.sort_values("number")
        values = chosen["value"] * (100 if metric == "dead" else 1)
        style = {"lw": 1, "alpha": 0.8} if step == 1 else {"lw": 2.2}
        ax.plot(chosen["number"], values, color=plots.color(kind), **style)
    ax.set(title=title, xlabel="weighted layer", yscale="linear" if metric == "dead" else "log")
axes[2].axhline(probes.UPDATE_GUIDE, color=plots.VERMILION, ls="--", lw=1)
axes[0].set_ylabel("norm (logarithmic)")
axes[0].text(45, 3e3, "plain", color=plots.color("plain"), fontweight="bold")
axes[0].text(2, 0.3, "residual", color=plots.color("residual"), fontweight="bold")
plots.save(
    fig,
    "04_probes",
    "Gradient, dead units and update ratio in each of 102 layers: even in the residual network, not in the plain",
)


# %%
def recorded(kind, step, layer, metric):
    """One number that the probes recorded."""
    frame = seen[kind]
    return frame[(frame["step"] == step) & (frame["layer"] == layer) & (frame["metric"] == metric)]["value"].item()


swept = results["batch norm"].about["variants"]["plain, 102 layers"]
steps_of_sweep = swept["recipe"]["epochs"] * swept["source"]["images"] // swept["recipe"]["batch_size"]
shares = [train.one_cycle(0, steps, recipe.warmup) for steps in (steps_of_sweep, recipe.epochs * 160 // 32)]
first_share = shares[0] / shares[1]  # of a longer run, the first step is a smaller share of the peak
for kind in seen:
    arrived = [recorded(kind, step, "stem.activation", "activation_gradient") for step in (1, 11, 21)]
    moved = recorded(kind, 1, "stem.conv", "update_ratio")
    print(f"{kind}, gradient at the input: {arrived[0]:.0e} at step 1, {arrived[1]:.0e} at 11, {arrived[2]:.0e} at 21;")
    print(f"    step 1 moved the first weights by {moved:.0e} times their length")
    if kind == "plain":
        assert arrived[0] > 1000
        assert arrived[2] < arrived[0] / 10_000
        assert arrived[2] < recorded("residual", 21, "stem.activation", "activation_gradient") / 10
        smallest = results["batch norm"].sweep["lr"].min()
        at_smallest = moved * smallest / best_lr["batch norm"]["plain, 102 layers"] * first_share
        print(f"    in the sweep, at its smallest rate ({smallest:g}), the same gradient would move them by", end=" ")
        print(f"{at_smallest:.0f} times their length")
        assert at_smallest > 2

# %%
ratios = {
    kind: frame[(frame["metric"] == "update_ratio") & (frame["step"] == 21) & (frame["number"] <= 50)]["value"]
    for kind, frame in seen.items()
}
for kind, each in ratios.items():
    print(f"{kind}, update ratio after 20 steps, layers 1 to 50: {each.min():.2e} to {each.max():.2e}")
assert ratios["plain"].max() < 1.3 * ratios["plain"].min()
assert ratios["plain"].min() > ratios["residual"].median()

# %% [markdown]
# Look at what becomes of the explosion. In its very first step the plain network moves the weights near the input by
# many times their own length: what they were drawn as is gone. Some steps later far less arrives there than in the
# residual network, and units are dying. So the sentence comes true after all, but the other way round: the explosion
# came first, and in this run a **vanished gradient is what it left behind**.
#
# (Do not trust the plain network's update ratio. Its layers seem to move more than those of the residual one, and half
# of them all alike, only because momentum still carries on what the first step began.)
#
# Can one avoid it? Not by the rates that were tried: even at the smallest the first step would be a leap. **Clipping**
# the gradient makes it a small one: the whole gradient is scaled down to a length of 1. The same run, with that:

# %%
torch.manual_seed(0)
clipped = CNN(CNNConfig(width=8, depth=50, residual=False))
with probes.Probes(clipped) as probe:
    history = train.fit(clipped, tiny, replace(at, clip=1.0), device="cpu", precision="fp32", progress=False)
frame = probe.frame()
steps = frame[(frame["layer"] == "stem.conv") & (frame["metric"] == "update_ratio")]["value"]
print(f"no step that was recorded moved the first weights by more than {steps.max():.0e} times their length;")
last_conv = [name for name, module in clipped.named_modules() if isinstance(module, torch.nn.Conv2d)][-1]
for which, layer in {"first": "stem.conv", "last": last_conv}.items():
    moved = frame[(frame["layer"] == layer) & (frame["metric"] == "update_ratio")].set_index("step")["value"]
    print(f"the {which} convolution: moved by {', '.join(f'{moved[step]:.0e} at step {step}' for step in (1, 11, 21))}")
print(f"training accuracy in the last epoch: {history.last('train', 'accuracy'):.0%} (one run)")
assert steps.max() < 0.5
assert history.last("train", "accuracy") < 0.3

# %% [markdown]
# No leap, and still it does not learn (at this one rate). But clipping shortens the gradients of all layers alike:
# where those of the first are by far the largest, the last ones hardly move. So this does not tell whether the
# explosion alone is to blame. It tells that the leap alone is not.
#
# ## Why does the one train, and the other not?
#
# Three answers, each with an experiment. None of them is the whole truth, but all of them are more than a slogan.
#
# ### 1. A crowd of short paths
#
# Multiply $(1 + f'_1)(1 + f'_2) \cdots$ out. The gradient of a residual network is a **sum over paths**: at each block
# a path goes through $f$, or past it. There are $2^{50}$ of them, and most go through about 25 branches. Which of them
# carry the gradient? [Veit et al. (2016)](https://arxiv.org/abs/1605.06431) sampled some: forward everything as usual,
# backward only along one path, through $k$ randomly chosen branches and past the others.
#
# The way forward is the same for all paths. So we go it once, and keep of each block its input and both of its ways.
# `detach()` cuts each block off from the one before, so that the gradient goes back one block at a time, by the way
# that we choose.


# %%
def forward_in_pieces(net, x, y):
    """Of the stem and of each block: input, branch, way past, output. And the loss's gradient behind the last block."""
    x = x.clone().requires_grad_()
    out = net.stem(x)
    pieces = [(x, out, None, out)]  # one way only
    for block in (block for layer in net.layers for block in layer):
        x = out.detach().requires_grad_()
        branch = block.norm2(block.conv2(block.activation1(block.norm1(block.conv1(x)))))
        past = block.shortcut(x)
        out = block.activation2(branch + past)
        pieces.append((x, branch, past, out))
    x = out.detach().requires_grad_()
    return pieces, torch.autograd.grad(F.cross_entropy(net.head(x.mean((2, 3))), y), x)[0]


# %%
def back_along(pieces, gradient, through):
    """The gradient at the image, along the path through the branches of these blocks (from 0) and past the others."""
    (image, stem, *_), *blocks = pieces
    for number, (x, branch, past, out) in reversed(list(enumerate(blocks))):
        at_sum = gradient * (out > 0)  # back through the ReLU
        way = branch if number in through else past
        if way is not x:  # an identity passes it on as it is
            (at_sum,) = torch.autograd.grad(way, x, at_sum, retain_graph=True)  # other paths come this way again
        gradient = at_sum
    return torch.autograd.grad(stem, image, gradient, retain_graph=True)[0]


def whole_gradient(net, x, y):
    """The gradient at the image, along all paths: `backward` as usual."""
    x = x.clone().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(net(x), y), x)[0]


# %%
def settled(net):
    """The network in `.eval()` mode, with the batch norm statistics of 256 images."""
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # the statistics of all batches so far: here, of the one
    with torch.no_grad():
        net(images)
    return net.eval()


torch.manual_seed(0)
shallow = settled(CNN(CNNConfig(width=8, depth=4)))
pieces, end = forward_in_pieces(shallow, images[:16], labels[:16])
every_path = [set(through) for k in range(5) for through in itertools.combinations(range(4), k)]
summed = sum(back_along(pieces, end, through) for through in every_path)
assert torch.allclose(summed, whole_gradient(shallow, images[:16], labels[:16]), rtol=1e-3, atol=1e-6)
print(f"10 layers, 4 blocks: the gradients along all {len(every_path)} paths add up to the whole one")

# %%
net, starts = settled(deepcopy(deep["residual"])), {}
for name, scale in (("1/n, at the start", True), ("textbook, at the start", False)):
    torch.manual_seed(0)
    starts[name] = settled(CNN(CNNConfig(width=8, depth=50, scale_residual=scale)))

# %% [markdown]
# Three networks of 102 layers: the course's that you have just trained; the same before training; and a textbook one
# before training. How to add the paths up? Not norm to norm, as Veit et al. do: nearly all pairs of so many directions
# are at right angles, and then the **squares** add up. The cell below checks that against the whole gradient: the two
# norms agree to within a factor of two or so. Whether the paths share a direction after all, or twelve of them missed
# the largest, it cannot tell.

# %%
paths = np.array([math.comb(50, k) for k in range(51)], dtype=float)


def squares_along(net, lengths):
    """The gradient's square along 12 random paths through each number of branches: a row a number, a column a path."""
    pieces, end = forward_in_pieces(net, images[:16], labels[:16])  # once for all paths
    generator = torch.Generator().manual_seed(0)
    drawn = [[set(torch.randperm(50, generator=generator)[:k].tolist()) for _ in range(12)] for k in lengths]
    return np.array([[back_along(pieces, end, each).norm().item() ** 2 for each in row] for row in drawn])


def add_up(lengths, squares):
    """By branches 0, 1, 2, …: gradient along one path, share of all squares; and the root of the squares' sum."""
    every = np.arange(max(lengths) + 1)
    square = np.exp(np.interp(every, lengths, np.log(squares.mean(1))))  # between those sampled: a straight line
    together = paths[every] * square
    return np.sqrt(square), together / together.sum(), math.sqrt(together.sum())


# %%
short, long = [0, 1, 2, 3, 5, 8, 12, 20], [0, 8, 12, 16, 20, 24, 30, 40]  # the rest adds nothing that one could see
networks = {"1/n, trained": net, **starts}
lengths = {name: long if name.startswith("textbook") else short for name in networks}
sampled = {name: squares_along(each, lengths[name]) for name, each in networks.items()}
carried = {name: add_up(lengths[name], squares) for name, squares in sampled.items()}
wholes = {name: whole_gradient(each, images[:16], labels[:16]).norm().item() for name, each in networks.items()}
for name, (_, _, together) in carried.items():
    print(f"{name:<23} root of the sum of squares {together:.2g}, the gradient {wholes[name]:.2g}", end="")
    print(f": {100 * (together / wholes[name]) ** 2:.0f} % of its square")
    assert 0.25 < together / wholes[name] < 4

# %%
fig, axes = plt.subplots(1, 3, figsize=(7.6, 3.1))
axes[0].plot(paths, color=plots.DARK, lw=2)
for name, (size, share, _) in carried.items():
    shade = plots.SKY if name.startswith("textbook") else plots.color("residual")
    for ax, values in ((axes[1], size), (axes[2], share)):
        ax.plot(values, color=shade, lw=2, ls="-" if name.endswith("trained") else "--")
for ax, title in zip(axes, ("how many paths", "gradient of one", "squares, together"), strict=True):
    ax.set(title=title, xlabel="branches on the path", xticks=[0, 10, 20, 30, 40, 50], xlim=(-1, 50))
    if title == "gradient of one":
        ax.set(yscale="log", ylabel="norm (logarithmic)")
    else:
        ax.set(yticks=[], ylabel="linear scale", ylim=(0, None))
labelled = {"color": plots.color("residual"), "fontweight": "bold"}
axes[2].text(11, 0.75 * carried["1/n, trained"][1].max(), "branches\nat 1/n", **labelled)
axes[2].text(29, 0.6 * carried["textbook, at the start"][1].max(), "textbook", **labelled | {"color": plots.SKY})
fig.suptitle("one network each, n = 12 paths a length; dashed: before training, solid: after 25 steps", fontsize=11)
plots.save(
    fig,
    "04_paths",
    "How many paths have how many branches, the gradient of one, and their squares together: short paths carry it in "
    "the course's network, before and after training; in the textbook network, longer ones",
)

# %%
def half_within(share):
    """The number of branches up to which paths carry half of the sum of squares."""
    return int(np.searchsorted(share.cumsum(), 0.5))


half, spans, rng = {}, {}, np.random.default_rng(0)
for name, squares in sampled.items():
    half[name] = half_within(carried[name][1])
    again = [np.array([rng.choice(row, len(row)) for row in squares]) for _ in range(500)]  # bootstrap: other 12 paths
    spans[name] = np.percentile([half_within(add_up(lengths[name], each)[1]) for each in again], (2.5, 97.5))
    interval = f"bootstrap {spans[name][0]:.0f} to {spans[name][1]:.0f}"
    print(f"{name:<23} half of the sum of squares: at most {half[name]:>2} of 50 branches ({interval})")
middle, textbook = half["1/n, trained"], half["textbook, at the start"]
assert max(spans["1/n, trained"][1], spans["1/n, at the start"][1]) < 5
assert spans["textbook, at the start"][0] > 10
assert spans["textbook, at the start"][1] < 25

# %% [markdown]
# (These ranges are rather narrow: of paths of one length a few have by far the largest squares, and twelve may miss
# them all.)
#
# The long paths are many. In the course's network those that were drawn carry next to nothing: as far as they tell, it
# begins to learn along paths that are no longer than a shallow network, and its gradient does not so much *get through*
# all layers as *go past* most of them. That is mostly the start at $1/n$, which makes the branches small; in 25 steps
# little has changed, and a long training was not measured. In the textbook network, before training, the paths that
# count are only somewhat shorter than most.
#
# If that is so, a block more or less should not matter. What do you say?

# %%
exercises.quiz("04.remove_block")

# %%
small = replace(fashion.take(960), validation=fashion.validation[:0])
held_out = fashion.validation[:500]
recipe = train.Recipe(epochs=4, batch_size=32, lr=0.1, crop_padding=0, flip=False)
pair, removed = {}, []
for kind, fields in {"residual": {}, "textbook": KINDS["residual"], "plain": KINDS["plain"]}.items():
    torch.manual_seed(0)
    pair[kind] = CNN(CNNConfig(width=8, depth=10, **fields))
    train.fit(pair[kind], small, recipe, device="cpu", precision="fp32", progress=False)
    tried = {"none": pair[kind]}
    for layer, blocks in enumerate(pair[kind].layers):
        for place in range(1, len(blocks)):  # a layer's first block changes the shape: it has to stay
            tried[f"{layer + 1}.{place + 1}"] = without = deepcopy(pair[kind])
            without.layers[layer][place] = torch.nn.Identity()
    for block, each in tried.items():
        accuracy = train.evaluate(each, held_out, stats, device="cpu", precision="fp32")["accuracy"]
        removed.append((kind, block, accuracy))
removed = pd.DataFrame(removed, columns=["kind", "block", "accuracy"])

# %%
fig, ax = plt.subplots()
shades, last = {kind: plots.SKY if kind == "textbook" else plots.color(kind) for kind in pair}, {}
ax.set(ylim=(0, 100), xlim=(-0.3, 7.3), xlabel="block that is removed (layer.block)", ylabel="validation accuracy (%)")
for kind, rows in removed.groupby("kind", sort=False):
    ax.plot(rows["block"], 100 * rows["accuracy"], "o--", lw=0.8, ms=7, color=shades[kind])
    last[kind] = 100 * rows["accuracy"].iloc[-1]
for kind, height in plots.spread(last, ax).items():
    ax.text(6.2, height, kind, color=shades[kind], fontweight="bold", va="center")
ax.axhline(10, color=plots.GREY, ls="--", lw=1)
ax.set_title(f"22 layers, one network each, {len(held_out)} images; dashed: guessing", loc="left")
plots.save(
    fig,
    "04_remove",
    "Accuracy with one block removed: not much lower in both residual networks, near guessing in the plain one",
)

# %%
for kind, rows in removed.groupby("kind"):
    kept, worst = 100 * rows["accuracy"].iloc[0], 100 * rows["accuracy"].iloc[1:].min()
    print(f"{kind:<8} {kept:.0f} % with all blocks, {worst:.0f} % without the one that is missed most")
    assert (worst > kept - 20) == (kind != "plain")
    assert (worst < 40) == (kind == "plain")

# %% [markdown]
# It is not only that the course's branches start small: the textbook's do not, and it bears the loss of a block, too.
# In both, whatever the block is, half of the paths go around it.

# %% [markdown]
# ### 2. Shattered gradients
#
# A gradient is worth following if it is still about the same a little further on. [Balduzzi et al.
# (2017)](https://arxiv.org/abs/1702.08591) asked how far that goes. Walk in a straight line from one photograph to
# another, in 128 steps, and look at the gradient of an output by the image at each step. How similar are those of two
# places? With cosine 1 they point the same way; with 0 one says nothing about the other.
#
# Random networks with batch norm, whose statistics are those of 256 images.

# %%
def along_line(layers, seed, **fields):
    """The gradients of the first logit by the image at 129 places between two photographs: 129×784."""
    torch.manual_seed(seed)
    net = settled(CNN(CNNConfig(width=8, **DEPTHS[layers], **fields)))
    a, b = images[2 * seed], images[2 * seed + 1]
    line = torch.lerp(a, b, torch.linspace(0, 1, 129)[:, None, None, None])  # 129×1×28×28
    parts = [x.requires_grad_() for x in line.split(64)]
    return torch.cat([torch.autograd.grad(net(x)[:, 0].sum(), x)[0].flatten(1) for x in parts])


def similarity(gradients, lag):
    """The mean cosine of gradients that are `lag` places apart."""
    return F.cosine_similarity(gradients[lag:], gradients[:-lag]).mean().item()


# %%
LAGS = (1, 2, 4, 8, 16, 32, 64)
BRANCHES = {"plain": KINDS["plain"], "residual, textbook": KINDS["residual"], "residual": {"residual": True}}
lines = {
    (name, layers): [along_line(layers, seed, **fields) for seed in range(3)]
    for name, fields in BRANCHES.items()
    for layers in (10, 58)
}
alike = {key: np.array([[similarity(each, lag) for lag in LAGS] for each in found]) for key, found in lines.items()}

# %%
shades = {"plain": plots.color("plain"), "residual, textbook": plots.SKY, "residual": plots.color("residual")}
fig, axes = plt.subplots(1, 2, figsize=(7.4, 3.2), sharey=True)
for ax, layers in zip(axes, (10, 58), strict=True):
    for name, shade in shades.items():
        style = "o-" if name != "residual" or layers == 58 else ":"  # of 10 layers, one block each: 1/n is 1
        ax.plot(np.array(LAGS) / 128, alike[name, layers].T, style, ms=3, lw=1.3, color=shade)
    ax.set(xscale="log", title=f"{layers} layers, n = 3 networks each", xlabel="part of the way between two images")
    ax.set_xticks([1 / 128, 1 / 32, 1 / 8, 1 / 2], ["1/128", "1/32", "1/8", "1/2"])
    ax.minorticks_off()
axes[0].set_ylabel("cosine of the two gradients")
for name, (x, y) in {"residual": (1 / 9, 0.85), "residual, textbook": (1 / 70, 0.33), "plain": (1 / 9, 0.05)}.items():
    axes[1].text(x, y, name, color=shades[name], fontweight="bold")
plots.save(
    fig,
    "04_shattered",
    "Cosine of gradients at two images against their distance: near zero at once in the deep plain network",
)

# %%
for name, layers in alike:
    near = alike[name, layers][:, 0]
    print(f"{name:<18} {layers} layers: cosine {near.min():+.2f} to {near.max():+.2f} after 1/128 of the way")
assert abs(alike["plain", 58][:, 0]).max() < 0.3
assert alike["residual", 58][:, 0].min() > 0.8
assert alike["plain", 10][:, 0].min() > 0.8

# %% [markdown]
# In a plain network of 58 layers the gradient at the *next* place, a 128th of the way on, points somewhere else
# altogether. It is large, and it is noise. That is what "the gradient gets lost" should mean where there is batch norm:
# it arrives, but what it says is no longer true one step further. The textbook residual network is better, and the
# course's, with branches at $1/n$, is at 58 layers as smooth as a shallow one. (At 10 layers each layer has one block, so
# that both are the same network: dotted.)
#
# ### 3. The surface that training walks on
#
# The same question about the weights: how does the loss change when *they* move? [H. Li et al.
# (2018)](https://arxiv.org/abs/1712.09913) draw a plane through the trained weights, along two random directions. In
# each, every **filter is as long as the network's own**, so that a step of 1 means the same in every network.
# `landscape.filter_normalized` makes such directions; at each place batch norm takes its statistics anew.
#
# First your own residual and plain one of 22 layers, coarsely:

# %%
from utils import landscape


def surface(net, places, count=256, seed=0):
    """The loss of `count` training images on a filter-normalized plane through the weights, a row a place."""
    across, up = (landscape.filter_normalized(net, 2 * seed + each) for each in (0, 1))
    axis = np.linspace(-1, 1, places).round(3)
    losses = landscape.loss_slice(net, images[:count], labels[:count], across, up, axis, axis)  # by y and x
    y, x = np.meshgrid(axis, axis, indexing="ij")
    return pd.DataFrame({"x": x.ravel(), "y": y.ravel(), "loss": losses.ravel()})


coarse = {kind: surface(pair[kind], places=7, count=64) for kind in KINDS}
for kind, frame in coarse.items():
    center = frame[(frame["x"] == 0) & (frame["y"] == 0)]["loss"].item()
    with torch.no_grad():
        evaluated = F.cross_entropy(landscape.prepared(pair[kind], images)(images[:64]), labels[:64]).item()
    assert math.isclose(center, evaluated, rel_tol=1e-5), "the centre is the trained network"
    print(f"{kind:<8} loss in the centre {center:.3f}, highest on the plane {frame['loss'].max():.1f}")

# %% [markdown]
# The fine ones, of 22 and 58 layers, come with the course: 6,400 images, 4 epochs, each network at its best rate, three
# seeds. `RECOMPUTE` trains them again and goes over each plane, which takes a quarter of an hour.

# %%
from utils import files, tables

path = files.results_dir() / "loss_surfaces.csv"
if RECOMPUTE:
    rows, trained_on = [], replace(fashion.take(6_400), validation=fashion.validation[:1000])
    for layers, kind, seed in itertools.product((22, 58), KINDS, range(3)):
        lr = best_lr["batch norm"][f"{kind}, {layers} layers"]
        torch.manual_seed(seed)
        net = CNN(CNNConfig(width=8, residual=kind == "residual", **DEPTHS[layers]))
        at = replace(experiments.find("residual").recipe, lr=lr, seed=seed)
        train.fit(net, trained_on, at, device="cpu", precision="fp32", progress=False)
        rows.append(surface(net, places=21, seed=seed).assign(network=kind, layers=layers, seed=seed))
    columns = ["network", "layers", "seed", "x", "y", "loss"]
    files.write_rows(path, pd.concat(rows)[columns].to_csv(index=False, float_format="%.4g"), {})
surfaces, _ = tables.read_table(path)
first = surfaces[surfaces["seed"] == 0]

# %%
from matplotlib.colors import LogNorm

fig, axes = plt.subplots(2, 3, figsize=(7.6, 5.4), sharex=True, sharey=True)
scale = {"norm": LogNorm(0.1, 5), "cmap": "viridis", "levels": np.geomspace(0.1, 5, 21), "extend": "both"}
shown = {"yours, 22 layers": coarse} | {
    f"{layers} layers": {kind: first[(first["layers"] == layers) & (first["network"] == kind)] for kind in KINDS}
    for layers in (22, 58)
}
for column, (title, frames) in zip(axes.T, shown.items(), strict=True):
    for ax, kind in zip(column, ("residual", "plain"), strict=True):
        losses = frames[kind].pivot(index="y", columns="x", values="loss")
        picture = ax.contourf(losses.columns, losses.index, losses, **scale)
        ax.plot(0, 0, "+", color="white", ms=9)
        ax.set_title(f"{kind},\n{title}", color=plots.color(kind))
        ax.set_aspect("equal")
bar = fig.colorbar(picture, ax=axes, label="training loss (nats, logarithmic)", ticks=[0.1, 0.3, 1, 3])
bar.ax.set_yticklabels(["0.1", "0.3", "1", "3"])
fig.suptitle("one network each (with the course: seed 0 of 3)", fontsize=11)
fig.supxlabel("step along the first direction (1: as long as the weights)", fontsize=11)
fig.supylabel("step along the second direction", fontsize=11)
plots.save(
    fig,
    "04_surfaces",
    "Contours of the loss around trained weights: round basins, and a flat high plain around the deep plain one",
)

# %% [markdown]
# How sharp is that? Take the places at about a quarter of the weights' length from the centre, and ask how much of what
# training brought, from guessing ($\ln 10$) down to the centre, is gone there.

# %%
# NBVAL_CHECK_OUTPUT
def sharpness(plane, radius=0.25):
    """The loss in the centre, its mean rise at about this distance (nats), and the rise as a share of what was won."""
    distance = np.hypot(plane["x"], plane["y"])
    center = plane.loc[distance == 0, "loss"].item()
    rise = plane.loc[(distance - radius).abs() < 0.05, "loss"].mean() - center
    return center, rise, rise / (math.log(10) - center)


lost = {}
for (layers, kind), planes in surfaces.groupby(["layers", "network"]):
    center, rise, share = np.array([sharpness(plane) for _, plane in planes.groupby("seed")]).T
    lost[kind, layers] = 100 * share
    ranges = f"{100 * share.min():.0f} to {100 * share.max():.0f} %"
    print(f"{kind:<8} {layers} layers: loss {center.mean():.2f}, rises by {rise.mean():.2f}: {ranges} of it are gone")
assert lost["residual", 58].max() < lost["plain", 58].min() / 2

# %% [markdown]
# At 22 layers both lie in a wide bowl, one a little higher than the other: you could not tell them by their sharpness.
# At 58 layers the residual one still does, while the plain one has found a small hole in a plateau at the height of
# guessing. Li et al. saw the same turn, between 20 and 56 layers. A plane along two random directions of many thousands
# shows little, and the networks ended at different losses; but the picture fits the other two answers.
#
# ## Your turn: who made these?
#
# Three networks of 58 layers, He's weights, textbook. Both gradients of each, on the same axes. Which is which?
#
# 1. plain, no norm
# 2. plain, batch norm
# 3. residual, no norm
# 4. residual, batch norm

# %% jupyter={"source_hidden": true}
# Draw the three profiles (to read this code would be cheating)
candidates = list(itertools.product(KINDS, NORMS))
fig, axes = plt.subplots(1, 3, figsize=(7.6, 3.0), sharey=True)
for ax, letter, number in zip(axes, "ABC", exercises.find("04.profiles", exercises.Exercise).right, strict=True):
    kind, norm = candidates[number - 1]
    for metric, shade in (("activation_gradient", plots.ORANGE), ("weight_gradient", plots.GREEN)):
        table = part(metric, kind=kind, norm=norm, init="He", layers=58).iloc[:-1]
        ax.plot(table.index, np.exp(np.log(table).mean(axis=1)), color=shade, lw=2)
    ax.set(yscale="log", title=letter, xlabel="weighted layer (1: input)")
axes[0].set_ylabel("norm (logarithmic)")
axes[2].text(3, 1e3, "activation gradient", color=plots.ORANGE, fontweight="bold")
axes[2].text(3, 1e2, "weight gradient", color=plots.GREEN, fontweight="bold")
plots.save(
    fig,
    "04_profiles",
    "Activation and weight gradients of three networks towards the input: in A the first grows, the second is nearly "
    "level; in B both grow; in C the first shrinks, the second is nearly level",
)

# %%
answer = ...  # three numbers, for (A, B, C)
exercises.check("04.profiles", answer)
# exercises.hint("04.profiles")

# %% jupyter={"source_hidden": true} tags=["solution"]
# Solution: click the dots to unfold it
# A: the gradient grows on its way back, and yet the weights' gradients are large at the output, too: there the
#    activations are large. A sum at each block and no norm: the residual network.
# B: the gradient grows on its way back, and the weights' gradients with it: the activations stay at one size.
# C: the gradient shrinks on its way back, the activations on their way there, and the weights feel both.
assert exercises.check("04.profiles", (3, 2, 1), quiet=True)

# %% [markdown]
# ## Your turn: make it train
#
# A network of 50 layers: `CNNConfig(width=4, depth=24, residual=False)`, with batch norm and He's weights. The
# recipe: 320 images, `Recipe(epochs=5, batch_size=32, lr=0.1)`. It is plain, and learns next to nothing. Make its 50
# layers train by changing **one** field, of the network or of the recipe. The check trains it, which takes some
# seconds, and wants to see more than half of the training images right.

# %%
change = ...  # one field and its new value, such as {"lr": 0.03}
exercises.check("04.train", change)
# exercises.hint("04.train")

# %% jupyter={"source_hidden": true} tags=["solution"]
# Solution: click the dots to unfold it
assert exercises.check("04.train", {"residual": True}, quiet=True)

# %% [markdown]
# Try other fields, too: the check says what comes of them.
#
# ## Summary

# %%
lines = "\n".join(f"- **{row.claim}:** {said(row)}**{row.verdict}**." for row in mine.itertuples())
vanished, of_he = (
    arriving(part(kind="plain", norm="no norm", init=init, layers=102)).iloc[0] for init in ("default", "He")
)
exploded = arriving(part(kind="plain", norm="batch norm", init="He", layers=102)).iloc[0]
along = {name: 100 * (together / wholes[name]) ** 2 for name, (_, _, together) in carried.items()}
fitted = f"{right['plain, 58 layers']:.0f} % ({deep_plain.min():.0f} to {deep_plain.max():.0f})"

# %%
Markdown(f"""
**"Without residual connections the gradient does not get back through 100 layers"** is right about the result and
wrong about the reason, as soon as there is batch norm.

- **What gets back,** at 102 layers and before training: of a plain network without norm, {vanished:.0e} of the
  gradient (PyTorch's default; {of_he:.0e} from He's weights, where the images are lost on the way forward, too). With
  batch norm {exploded:.0e} times as much as started; in the one run that was watched it vanished there, too, after the
  first steps. Residual with batch norm: {ends["batch norm", "He"][0]:.0f} times in a textbook network,
  {ends["batch norm", "He"][1]:.0f} times in the course's, with branches at 1/n.
{lines}
- **"Do not train"** says more: with batch norm, 58 plain layers get {fitted} of the training images right (by seed).
- **What goes with depth in the plain network** (the cause is not settled): in *random* networks of 58 layers with batch
  norm, the gradients a small step apart, on the way from one image to another, are unrelated (cosine
  {alike["plain", 58][:, 0].mean():+.2f}; {alike["residual, textbook", 58][:, 0].mean():+.2f} with the plus sign alone,
  {alike["residual", 58][:, 0].mean():+.2f} with branches at 1/n as well, n = 3). And
  around trained weights the loss rises at once: at a quarter of their length {lost["plain", 58].mean():.0f} % of what
  it had learned is gone; {lost["residual", 58].mean():.0f} % in the residual one (n = 3). Networks of 102
  layers, which stay near guessing, were not examined in this way.
- **How the course's residual network does it:** as far as single paths tell, by short ones. The squares of the gradient
  along them add up to {along["1/n, trained"]:.0f} % of the whole gradient's square after 25 steps (before them to
  {along["1/n, at the start"]:.0f} %). Half of the sum comes through at most {middle} of 50 branches, before the steps
  through at most {half["1/n, at the start"]}. That is mostly the start at 1/n: at the textbook's it is {textbook}
  (bootstrap {spans["textbook, at the start"][0]:.0f} to {spans["textbook, at the start"][1]:.0f}). Whether it stays so
  in a long training was not measured.
""")

# %% [markdown]
# **When it does not hold.** In a network of ten layers there is little to gain, and depth alone is no aim, as 102
# residual layers show against 10. Nor are residual connections the only way: plain networks of 10,000 layers *have*
# been trained, with weights and activations chosen for just that ([Xiao et al.
# 2018](https://arxiv.org/abs/1806.05393)).
#
# **What these experiments do not tell.** They show what goes with what, in one family of narrow networks. Shattered
# gradients, short paths and the shape of the surface are three views of one thing; which of them is the *cause* is not
# settled. The residual networks that were trained also start their branches at $1/n$: how much the plus sign does alone,
# in training 58 or 102 layers, was not measured.
#
# **Sources.** He, Zhang, Ren & Sun 2015, [Deep residual learning](https://arxiv.org/abs/1512.03385) and [Delving deep
# into rectifiers](https://arxiv.org/abs/1502.01852). Yang et al. 2019, [A mean field theory of batch
# normalization](https://arxiv.org/abs/1902.08129). Hanin & Nica 2018, [Products of many large random
# matrices](https://arxiv.org/abs/1812.05994). Hanin & Rolnick 2018, [How to start
# training](https://arxiv.org/abs/1803.01719). De & Smith 2020, [Batch normalization biases residual blocks towards the
# identity function](https://arxiv.org/abs/2002.10444). Zhang, Dauphin & Ma 2019, [Fixup
# initialization](https://arxiv.org/abs/1901.09321). He, Zhang, Ren & Sun 2016, [Identity mappings in deep residual
# networks](https://arxiv.org/abs/1603.05027). Veit, Wilber & Belongie 2016, [Residual networks behave like ensembles of
# relatively shallow networks](https://arxiv.org/abs/1605.06431). Balduzzi et al. 2017, [The shattered gradients
# problem](https://arxiv.org/abs/1702.08591). Xiao et al. 2018, [Dynamical isometry and a mean field theory of
# CNNs](https://arxiv.org/abs/1806.05393). Du, Hu & Lee 2018, [Algorithmic regularization in learning deep homogeneous
# models](https://arxiv.org/abs/1806.00900). H. Li et al. 2018, [Visualizing the loss landscape of neural
# nets](https://arxiv.org/abs/1712.09913). Karpathy 2022, [Building makemore, part
# 3](https://www.youtube.com/watch?v=P6sfmUTpUmc).
