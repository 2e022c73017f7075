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
# # Size and pooling: what does it cost to keep the image large?
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/cnn-course/cnn-course/blob/main/notebooks/02_size_and_pooling.ipynb) [![Open on Binder](https://mybinder.org/badge_logo.svg)](https://mybinder.org/v2/gh/cnn-course/cnn-course/main?labpath=notebooks/02_size_and_pooling.ipynb)
#
# "Each layer doubles the channels and roughly halves the input": that is how most convolutional networks are built. And
# "max pooling reduces the dimensionality by quite a bit, so use it only once". This lesson follows one image through
# the network, counts and measures what each part costs, looks at what is lost on the way, and then judges the two
# sentences.
#
# **After this lesson you can** count the parameters, FLOPs and memory of a layer; say why channels double where the
# image halves, and what that costs in milliseconds; work out a receptive field; say what pooling loses.
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
# ## One image's walk through the network
#
# A network that has learned a little shows more than one with random weights. Three epochs of 3,200 images take a few
# seconds.

# %%
from dataclasses import replace

import torch

from utils import data, device, plots, train
from utils.model import CNN, CNNConfig

plots.use_style()
torch.set_num_threads(1)  # of little use in so small a network; and one thread is timed more reliably
fashion = data.load("fashion-mnist", progress=False)
few = replace(fashion.take(3_200), validation=fashion.validation[:1000])
recipe = train.Recipe(epochs=3, batch_size=64, lr=0.3, crop_padding=0, flip=False)
torch.manual_seed(0)
net = CNN(CNNConfig(width=16))
history = train.fit(net, few, recipe, device="cpu", precision="fp32", progress=False)
print(f"{history.last('validation', 'accuracy'):.0%} of {len(few.validation):,} validation images right")

# %% [markdown]
# The picture is drawn from the network itself: the shapes are those of a real forward pass, and the sheets show what it
# makes of this ankle boot. The *stem* halves the image by max pooling; *layers* 2 to 4 double the channels and halve
# height and width (rounded up).

# %%
stats = data.channel_stats(few.train.images)
labels, names = fashion.validation.labels, fashion.class_names
examples = torch.stack([(labels == label).nonzero()[3, 0] for label in range(10)])  # one image of each class
ten = data.normalize(fashion.validation.images[examples], stats)  # float32 10×1×28×28
plots.save(
    plots.architecture(net, image=ten[names.index("Ankle boot")]),
    "02_network",
    "The network from left to right, with the maps that an ankle boot makes in each layer, ever smaller and more",
)

# %% [markdown]
# What does each part cost? There are four answers:
#
# - **parameters**: the weights that it learns;
# - **FLOPs**: multiplications and additions for one image, in convolutions and matrix products (PyTorch counts no
#   others);
# - **memory**: what training keeps of the forward pass until the gradient comes back and needs it;
# - **time**: measured, on this machine, now.
#
# Memory first. PyTorch calls a hook for each tensor that it keeps for the backward pass. The next cell adds up their
# bytes, each piece of memory once, without the weights, which are there anyway.

# %%
import pandas as pd


def parts_of(net):
    layers = {f"layer {number}": layer for number, layer in enumerate(net.layers, start=1)}
    return {"stem": net.stem, **layers, "head": net.head}


# %%
def kept_for_backward(net, images):
    """Bytes that each part of a network in train mode keeps of a forward pass for the way back, by the part's name."""
    known = {tensor.untyped_storage().data_ptr() for tensor in net.state_dict().values()}
    now, kept = [], []

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            known.add(storage.data_ptr())
            kept.append((now[-1], storage.nbytes()))
        return tensor.detach()  # the tensor itself would keep itself alive, through its own graph

    named = parts_of(net).items()
    hooks = [part.register_forward_pre_hook(lambda *_, name=name: now.append(name)) for name, part in named]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = net(images)  # while this lives, so does all that is kept: no piece of memory is used twice
    for hook in hooks:
        hook.remove()
    del logits
    return pd.DataFrame(kept, columns=["part", "bytes"]).groupby("part")["bytes"].sum()


# %% [markdown]
# Then the time: there and back, with a batch of 128 images, for each part by itself. Other programs can only make it
# longer, so the shortest of several times is the best guess.

# %%
from time import perf_counter


def milliseconds(part, x, rounds=7):
    """The shortest time that a batch takes through a part of the network and its gradient back."""
    times = []
    for _ in range(rounds):
        begin = perf_counter()
        part(x).sum().backward()
        times.append(1000 * (perf_counter() - begin))
    return min(times)


def times_of(net, x):
    """The milliseconds of each part of a network in train mode, by its name."""
    found = {}
    for name, part in parts_of(net).items():
        x = x.mean((2, 3)) if name == "head" else x  # N×C×H×W → N×C
        found[name] = milliseconds(part, x)
        x = part(x).detach().requires_grad_()  # the next part's input; the images themselves need no gradient
    return pd.Series(found)


# %%
from copy import deepcopy

from utils.model import parts

batch = data.normalize(few.train.images[:128], stats)  # float32 128×1×28×28
cost = pd.DataFrame(parts(net), columns=["part", "shape", "parameters", "FLOPs", "field"]).set_index("part")
copy = deepcopy(net).train()  # batch norm in train mode moves its running statistics: those of a copy
cost["kB kept"] = kept_for_backward(copy, batch) / len(batch) / 1000  # of one image
cost["ms"] = times_of(copy, batch)
assert cost["parameters"].sum() == sum(weight.numel() for weight in net.parameters())

# %% [markdown]
# And now the walk. Of each part you see eight maps, those of the channels that differ most from image to image.
# Each map has its own scale, from its darkest to its brightest: compare places in a map, not shades of two maps.

# %%
seen = [plots.activations(net, image) for image in ten]
with_maps = cost.index.drop("head")
chosen = {name: torch.stack([maps[name] for maps in seen]).var(0).mean((1, 2)).topk(8).indices for name in with_maps}
texts = pd.DataFrame({"shape": cost["shape"].map(lambda shape: "×".join(map(str, shape)))})
texts["parameters"] = cost["parameters"].map("{:,}".format)
texts["MFLOP"] = (cost["FLOPs"] / 1e6).map("{:.2f}".format)
texts["kB kept"], texts["ms"] = cost["kB kept"].map("{:.1f}".format), cost["ms"].map("{:.1f}".format)

# %% jupyter={"source_hidden": true}
# Draw the walk: click the dots to unfold the code
import matplotlib.pyplot as plt
import torch.nn.functional as F


def walk(label):
    fig, ax = plt.subplots(figsize=(7.6, 4.6))
    ax.imshow(ten[label, 0], cmap="gray", extent=(0, 1, 0, 1))
    ax.text(1.15, 0.5, names[label], va="center")
    for row, name in enumerate(with_maps):
        maps = F.interpolate(seen[label][name][None, chosen[name]], (28, 28))[0]  # 8×28×28
        tiles = F.pad(maps, (1, 1, 1, 1), value=torch.nan).permute(1, 0, 2).flatten(1)  # 30×240
        ax.imshow(plt.get_cmap("mako")(tiles.numpy()), extent=(0, 8, -row - 1, -row))
    answer = names[seen[label]["head"].argmax()]
    ax.text(0.1, 0.5 - len(cost), f"its answer: {answer}", va="center")
    for place, key in zip((10.4, 12.9, 14.7, 16.6, 17.9), texts, strict=True):
        ax.text(place, 0.5, key, ha="right", va="center", fontsize=10, fontweight="bold")
        for row, text in enumerate(texts[key]):
            ax.text(place, -row - 0.5, text, ha="right", va="center", fontsize=10)
    for row, name in enumerate(cost.index):
        ax.text(-0.2, -row - 0.5, name, ha="right", va="center", fontweight="bold")
    ax.set(xlim=(-1.6, 18), ylim=(-len(cost), 1))
    ax.axis("off")
    return fig


# %%
plots.save(
    walk(names.index("Ankle boot")),
    "02_walk",
    "One boot in each layer: eight maps, ever coarser, and the costs: layer by layer more parameters, less memory",
)

# %% [markdown]
# Send other clothes through with the slider. (The costs stay: they depend on the shapes only.)

# %%
plots.explore(walk, "image", {name: label for label, name in enumerate(names)}, start="Trouser")

# %% [markdown]
# Going down, *where* turns into *what*. In the stem you still see a boot, drawn several times over. In layer 4 a map
# has four numbers left; but there are 128 maps, and together they say what it is.
#
# The costs go opposite ways: **parameters** pile up at the bottom, **memory** at the top. FLOPs are spread evenly over
# the layers. And time? This is how much each part computes in a second, if the way back counts as two more ways there:
# one for the gradient by the weights, one for that by the input. (The stem's input is the image, which needs none. Its
# way back is one way only, and its rate is a third less than the line says.)

# %%
rate = 3 * cost["FLOPs"] * len(batch) / cost["ms"] / 1e6  # 10⁹ FLOPs a second
for name in with_maps:
    print(f"{name:<8} {cost.loc[name, 'ms']:5.1f} ms   {rate[name]:6.1f} GFLOP/s")
inner = cost.loc["layer 1":"layer 4"]
assert inner["parameters"].is_monotonic_increasing
assert inner["kB kept"].is_monotonic_decreasing
assert rate["layer 1":"layer 4"].max() > rate["stem"], "FLOPs are not time"

# %% [markdown]
# The stem has few FLOPs and takes its time all the same. Where does it go? Two of its parts, each by itself,
# there and back:

# %%
maps = copy.stem.conv(batch).detach().requires_grad_()  # 128×16×28×28
as_long = milliseconds(copy.stem.pool, maps, rounds=30) / milliseconds(copy.stem.conv, batch, rounds=30)
print("max pooling takes longer than the convolution:", as_long > 1)
assert as_long > 0.2, "no FLOPs, and yet no small part"

# %% [markdown]
# No small part of it is max pooling, which, like norm and ReLU, counts as no FLOPs at all: it works over the largest
# maps of the network. **FLOPs are not time.** Keep this in mind for later.
#
# ## Why double, why halve?

# %%
from utils import exercises

exercises.quiz("02.flops")

# %% [markdown]
# A convolution with a $k \times k$ kernel that turns $C_{in}$ channels into $C_{out}$ channels of $H \times W$ numbers:
#
# $$\text{parameters} = k^2\, C_{in}\, C_{out} \qquad \text{FLOPs} = 2\, k^2\, C_{in}\, C_{out}\, H\, W$$
#
# $$\text{activations} = C_{out}\, H\, W$$
#
# (2: a multiplication and an addition.) Now double both numbers of channels and halve height and width:
#
# | | changes by | |
# |---|---|---|
# | parameters | $2 \cdot 2$ | **4 times as many** |
# | FLOPs | $2 \cdot 2 \cdot \tfrac12 \cdot \tfrac12$ | **the same** |
# | activations | $2 \cdot \tfrac12 \cdot \tfrac12$ | **half as many** |
#
# So each layer does the same amount of work, with half the activations and four times as many weights. That is the
# idea. Does PyTorch count the same? The next cell watches each convolution of a network: its channels, its kernel, the
# side of the map that it makes, and the FLOPs that were counted inside.

# %%
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


@torch.no_grad()
def convolutions(net, size):
    """A row for each convolution in a network, for an image of size × size, in the order in which they are used."""
    rows, known = [], {module: name for name, module in net.named_modules()}

    def note(conv, _, out):
        rows.append((known[conv], conv.in_channels, conv.out_channels, conv.kernel_size[0], out.shape[2]))

    hooks = [module.register_forward_hook(note) for module in known if isinstance(module, nn.Conv2d)]
    with FlopCounterMode(display=False) as counter:
        net.eval()(torch.zeros(1, 1, size, size))
    for hook in hooks:
        hook.remove()
    frame = pd.DataFrame(rows, columns=["name", "c_in", "c_out", "kernel", "side"]).set_index("name")
    counts = counter.get_flop_counts()
    return frame.assign(FLOPs=[sum(counts[f"CNN.{name}"].values()) for name in frame.index])


# %%
# NBVAL_CHECK_OUTPUT
tables = {size: convolutions(net, size) for size in (32, 28)}
for table in tables.values():
    assert (table["FLOPs"] == 2 * table["kernel"] ** 2 * table["c_in"] * table["c_out"] * table["side"] ** 2).all()
print("3×3 convolution      channels     32×32 image          28×28 image")
for layer in range(4):
    for which, name in ("first ", f"layers.{layer}.0.conv1"), ("second", f"layers.{layer}.0.conv2"):
        rows = [table.loc[name] for table in tables.values()]
        counted = "   ".join(f"{row.side:>2}×{row.side:<2} {row.FLOPs / 1e6:5.2f} MFLOP" for row in rows)
        print(f"layer {layer + 1}, {which}      {rows[0].c_in:>3} → {rows[0].c_out:<3}    {counted}")
second = tables[32].loc[[f"layers.{layer}.0.conv2" for layer in range(4)]]
assert second["FLOPs"].nunique() == 1, "at exact halving they are all the same"

# %% [markdown]
# Read the column of the 32×32 image first: each block's **second** convolution takes exactly the same work. And where
# does the rule fail?
#
# - **From layer 2 on, a block's first convolution** gets the channels of the layer before, half as many: half the work
#   (and its 1×1 shortcut adds a little). Layer 1 does not double, and its two cost the same.
# - **28 cannot be halved four times.** From 7 to 4 the side is rounded up, so that 16 of 49 places are left in place
#   of a quarter, and the work grows.

# %%
# NBVAL_CHECK_OUTPUT
flops = tables[28]["FLOPs"]
first = flops["layers.1.0.conv1"] / flops["layers.1.0.conv2"]
rounded = flops["layers.2.0.conv2"] / flops["layers.1.0.conv2"]
print(f"first convolution of layer 2 / second one: {first:g}")
print(f"second convolution of layer 3 / that of layer 2: {rounded:.3f} = 64/49, {rounded - 1:+.0%}")
assert first == 0.5
assert flops["layers.0.0.conv1"] == flops["layers.0.0.conv2"], "layer 1 does not double"
assert rounded == 64 / 49

# %% [markdown]
# ### Play: other schedules, other sizes
#
# Nothing forces you to double. The course's network has a field for it, `growth`:
#
# | `growth` | channels from layer to layer | the image |
# |---|---|---|
# | `double` | double | halves |
# | `quadruple` | quadruple | halves |
# | `constant` | stay | halves |
# | `flat` | stay | stays as the stem left it |
#
# All start with 16 channels here. Where do the parameters go, where the work, where the activations? And at which image
# sizes is the work of doubling really even?

# %%
grown = {growth: CNN(CNNConfig(width=16, growth=growth)) for growth in ("double", "constant", "flat", "quadruple")}


def bars(growth, size):
    rows = pd.DataFrame(parts(grown[growth], size), columns=["part", "shape", "parameters", "FLOPs", "field"])[1:5]
    activations = rows["shape"].map(lambda shape: shape[0] * shape[1] * shape[2])
    values = {"parameters (thousands)": rows["parameters"] / 1e3, "MFLOP": rows["FLOPs"] / 1e6}
    values["activations (thousands)"] = activations / 1e3
    fig, axes = plt.subplots(1, 3, figsize=(7.4, 2.8))
    for ax, (title, heights) in zip(axes, values.items(), strict=True):
        drawn = ax.bar(range(1, 5), heights, color=plots.color(growth))
        ax.bar_label(drawn, [f"{height:,.3g}" for height in heights], fontsize=10)
        ax.set(xlabel="layer", xticks=range(1, 5), title=title)
        ax.margins(y=0.12)
    shapes = ", ".join("×".join(map(str, shape)) for shape in rows["shape"])
    fig.suptitle(f"{growth}, image of {size}×{size}: {shapes}", fontsize=11)
    return fig


# %%
sizes = {f"{size}×{size}": size for size in (16, 24, 28, 32, 48, 64, 96)}
choices = {"growth": {growth: growth for growth in grown}, "image size": sizes}
plots.explore_several(bars, choices, {"growth": "double", "image size": "28×28"})

# %% [markdown]
# ## Four schedules, equal work
#
# Doubling is one choice of four. To compare them fairly, each rival gets the width at which it does as much work as
# doubling does from 16 channels: the smallest width with *no fewer* FLOPs. So no win of doubling can be a gift.

# %%
# NBVAL_CHECK_OUTPUT
from itertools import count, product


def total(config, column):
    """All parameters (column 2) or FLOPs (column 3) of a network, for an image of 28×28."""
    return sum(row[column] for row in parts(CNN(config)))


double = CNNConfig(width=16)
goal, schedules = total(double, 3), {}
for growth in ("flat", "constant", "quadruple", "double"):
    configs = (replace(double, growth=growth, width=width) for width in count(3))
    schedules[growth] = next(config for config in configs if total(config, 3) >= goal)
for growth, config in schedules.items():
    work, shape = total(config, 3), "→".join(map(str, config.channels))
    said = f"{work / 1e6:.2f} MFLOP ({work / goal - 1:+.1%})"
    print(f"{growth:<10}{shape:<14}{said:<22}{total(config, 2):>8,} parameters")

# %% [markdown]
# Equal work, and very different numbers of parameters. Is the memory equal, too, and the time? Memory as above. For the
# time, the course's own training loop trains each of them on 768 images three times over; the fastest round counts.
# A fifth network joins them: `constant` with a round 32 channels, and so with more work than the others.

# %%
networks = schedules | {"constant 32": replace(schedules["constant"], width=32)}
networks["double"] = networks.pop("double")  # the last row is drawn on top
precision = device.pick_precision(torch.device("cpu"), "auto")  # bf16 where this machine multiplies it natively
brief = replace(fashion.take(768), validation=fashion.validation[:100])
rounds = train.Recipe(epochs=3, batch_size=128, crop_padding=0, flip=False)
bill = pd.DataFrame(columns=["MFLOP", "parameters (thousands)", "kB kept an image", "ms an image"])
for name, config in networks.items():
    model = CNN(config)
    kept = kept_for_backward(model, batch).sum() / len(batch)
    trained = train.fit(model, brief, rounds, device="cpu", precision=precision, progress=False)
    speed = trained.loc[trained["metric"] == "images_per_second", "value"].max()
    bill.loc[name] = [total(config, 3) / 1e6, total(config, 2) / 1e3, kept / 1e3, 1000 / speed]

# %%
fig, axes = plt.subplots(1, 4, figsize=(7.6, 2.9), sharey=True)
shades = {name: plots.color(name.removesuffix(" 32")) for name in bill.index}
for ax, column in zip(axes, bill, strict=True):
    drawn = ax.barh(bill.index, bill[column], color=shades.values())
    ax.bar_label(drawn, [f"{value:,.3g}" for value in bill[column]], padding=3, fontsize=10)
    ax.set(title=column.replace(" (", "\n("), xticks=[])
    ax.margins(x=0.45)
    ax.spines["bottom"].set_visible(False)
axes[2].set_title("kB kept an image\n(in fp32)")
axes[3].set_title(f"ms an image\n(measured, {precision})")
plots.save(
    fig,
    "02_schedules",
    "Bars for five schedules: FLOPs about equal but for constant 32; parameters, memory and time very different",
)
assert bill.drop("constant 32")["MFLOP"].max() < 1.15 * bill["MFLOP"].min(), "equal FLOPs"
assert bill.loc["flat", "kB kept an image"] > 1.2 * bill.loc["double", "kB kept an image"], "but not equal memory"
wider = bill.loc["constant 32"] / bill.loc["constant"]
print(f"32 channels in place of 27: {wider['MFLOP'] - 1:+.0%} FLOPs, {wider['ms an image'] - 1:+.0%} time")

# %% [markdown]
# Processors work on blocks of 8, 16 or 32 numbers at once (AVX2, AVX-512, bf16), and a block that is not full takes as
# long as a full one. That is one reason why widths are round numbers. It would explain that 27 channels take *as long*
# as 32. Where they take even longer (a minus in the line above), there must be more to it: other widths may also need
# their numbers rearranged, or get slower kernels. That is not tested here.
#
# So constant width competes twice below: with 27 channels, which cost the FLOPs of the others, and with a round 32,
# which cost more. Whether that is more **time** depends on the processor: for yours, see the bars.
#
# ## Which one learns best?

# %%
exercises.quiz("02.schedule")

# %% [markdown]
# The first sentence under test. Each schedule gets its own best learning rate, chosen with two seeds, and then ten
# other seeds; runs of one seed see the same images in the same order. All else is the same. The rows come with the
# course; `RECOMPUTE = True` measures them again.

# %%
from utils import experiments

RECOMPUTE = False
read = experiments.measure if RECOMPUTE else experiments.load
schedule, wider_constant = read("schedule"), read("schedule_32")
declared = experiments.find("schedule")
print(f"{declared.source.images:,} images, {declared.recipe.epochs} epochs, batches of {declared.recipe.batch_size}")
plots.save(
    plots.experiment(schedule.runs),
    "02_schedule_runs",
    "Curves and paired differences of four schedules: flat is far behind, quadruple a little, constant hardly",
)
for name in ("schedule", "schedule_32"):
    for growth, changes in experiments.find(name).along.items():
        known = networks["constant 32" if name == "schedule_32" else growth]
        assert changes == {"width": known.width}, "the networks that were measured are the ones above"

# %%
# NBVAL_CHECK_OUTPUT
claims = experiments.claims()


print(experiments.in_words(claims, "schedule", "schedule_32"))
for note, each in {"": schedule, ", constant of 32 channels": wider_constant}.items():
    rates = ", ".join(f"{lr:g} ({name})" for name, lr in sorted(each.about["best_lr"].items()))
    print(f"best learning rates{note}: {rates}")
    assert len(each.about["tuning_seeds"]) == 2

# %% [markdown]
# (*Inconclusive*: ten seeds cannot tell on which side of the margin the difference lies, once the verdict is corrected
# for all claims of the course. An interval that lies on one side of the margin is then not always enough. And an
# interval does not cover the choice of the rates, which two seeds made: lesson 01 shows what may come of that.)
#
# You do not wait for FLOPs, you wait for seconds. So here is the accuracy against the time that you have just measured.
# Up is better, left is cheaper.

# %%
from utils import evidence

accuracy = 100 * evidence.finals(schedule.runs, "validation accuracy")  # a row a seed, a column a schedule
accuracy["constant 32"] = 100 * evidence.finals(wider_constant.runs, "validation accuracy")["constant"]
fig, ax = plt.subplots(figsize=(7.2, 3.4))
for name, shade in shades.items():
    x, y = bill.loc[name, "ms an image"], accuracy[name].mean()
    half = plots.half_intervals(accuracy[[name]].T).iloc[0]
    ax.errorbar(x, y, yerr=half, fmt="o", ms=8, color=shade, capsize=4)
    side, place = {"double": ("right", (-9, 6)), "constant": ("left", (9, -16))}.get(name, ("left", (9, 6)))
    ax.annotate(name, (x, y), place, textcoords="offset points", ha=side, color=shade, fontweight="bold")
ax.set(xlabel=f"ms an image (measured, {precision})", ylabel="validation accuracy (%)")
ax.set_xlim(0, 1.3 * bill["ms an image"].max())
ax.set_title(f"accuracy: mean of n = {len(accuracy)} seeds, 95 % intervals", loc="left")
plots.save(
    fig,
    "02_accuracy_and_time",
    "Validation accuracy against ms an image: double and both constants on top, quadruple a bit lower, flat far below",
)

# %%
# NBVAL_CHECK_OUTPUT
behind = accuracy["double"].mean() - accuracy.mean()
for name in behind.index.drop("double"):
    print(f"{name:<12} {behind[name]:5.2f} points behind double, with {total(networks[name], 2):>7,} parameters")
assert behind["flat"] == behind.max() > 3, "halving matters"
level = claims[claims["claim"].str.contains("constant width")]
assert (level["low"] < 0).all(), "neither with 27 channels nor with 32 …"
assert (level["high"] > 0).all(), "… do ten seeds show a difference"
assert behind["quadruple"] > 0.5

# %% [markdown]
# The network that keeps its maps large does as much work, and is far behind. (Its curve still rises: how far it would
# get in the end, these short runs do not say.) But `flat` and `double` differ in more than halving: `flat` has fewer
# channels in its later layers, and far fewer parameters. So here is a control: `constant` with the 16 channels of
# `flat`. Its maps halve; its 3×3 convolutions are the same (where a map halves, the shortcut needs a 1×1 convolution).
# It trains at the learning rate of the `constant` with 27 channels and, to spare your time, for half as many epochs,
# with one seed.

# %%
control = replace(schedules["constant"], width=schedules["flat"].width)
shorter = replace(declared.recipe, epochs=declared.recipe.epochs // 2, lr=schedule.about["best_lr"]["constant"])
source = fashion.take(declared.source.images)
torch.manual_seed(0)
log = train.fit(CNN(control), source, shorter, device="cpu", precision=precision, progress=False)
reached_by = [100 * log.last("validation", "accuracy")]
for name, config, values in ("flat", schedules["flat"], accuracy["flat"]), ("constant 16", control, reached_by):
    cost_of = f"{total(config, 2):,} parameters, {total(config, 3) / 1e6:.2f} MFLOP"
    print(f"{name:<12} at most {max(values):.1f} %, n = {len(values):>2}, with {cost_of}")
assert min(reached_by) > accuracy["flat"].max(), "halving is ahead, with less work and half the epochs"
assert total(control, 3) < total(schedules["flat"], 3) / 2
assert total(control, 2) < 1.1 * total(schedules["flat"], 2)

# %% [markdown]
# **In runs this short, halving is what counts.** With the same channels, about as many parameters, less than half the
# work and half the epochs, the network that halves is ahead of all ten that do not. For **doubling**, ten seeds show no
# difference: with the same number of channels in every layer the network is about as good, with a fraction of the
# parameters. And quadrupling has most parameters of all and does worse, perhaps because its first layers have so few
# channels.
#
# Keep in mind what was measured: small networks, few images, short runs, in which parameters are not what is lacking.
# With more of everything they may pay.
#
# ## What halving buys: sight
#
# Why does halving help, when it saves no work? One reason may be what a layer gets to see. A value in a map has seen
# only a patch of the image, its **receptive field**, $r$ pixels wide. Each kernel of side $k$ makes it wider, by
# $k - 1$ steps; and a step in the map is as long in the image as the product of all strides $s$ before it ([Araujo et
# al. 2019](https://distill.pub/2019/computing-receptive-fields)):
#
# $$r \;\leftarrow\; r + (k - 1) \prod_{\text{before}} s$$
#
# By hand, for the network that halves and the one that does not:


# %%
# NBVAL_CHECK_OUTPUT
def fields(halves):
    """The receptive field after the stem and after each layer: its side in pixels."""
    field, step, found = 1, 1, []
    stem = [(3, 1), (2, 2)]  # kernel and stride of the convolution and of the pooling
    layers = [[(3, 2 if halves and layer > 0 else 1), (3, 1)] for layer in range(4)]  # two convolutions each
    for part in [stem, *layers]:
        for kernel, stride in part:
            field, step = field + (kernel - 1) * step, step * stride
        found.append(field)
    return found


for growth, halves in ("double", True), ("flat", False):
    table = [row[4] for row in parts(CNN(schedules[growth]))][:5]
    print(f"{growth:<7} stem {table[0]:>2}, layers", ", ".join(f"{field:>2}" for field in table[1:]), "pixels")
    assert fields(halves) == table
assert 28 < fields(False)[-1] < 2 * 28 - 1 <= fields(True)[-1]

# %% [markdown]
# In the end the field of `flat` is larger than the 28 pixels of the image, too. But that is enough only near the middle
# of its map: to see everything from a corner takes $2 \cdot 28 - 1 = 55$. How many places of the last map see it all?


# %%
# NBVAL_CHECK_OUTPUT
def all_seeing(halves):
    """How many places of the last map have the whole image in their field, and how many there are."""
    spans = [(pixel, pixel) for pixel in range(28)]  # the first and the last pixel that each place of a row sees
    convolutions = [(3, 2 if halves and layer > 0 and first else 1, 1) for layer in range(4) for first in (True, False)]
    for kernel, stride, padding in [(3, 1, 1), (2, 2, 0), *convolutions]:
        starts = range(-padding, len(spans) + padding - kernel + 1, stride)
        spans = [(spans[max(at, 0)][0], spans[min(at + kernel, len(spans)) - 1][1]) for at in starts]
    return sum(span == (0, 27) for span in spans) ** 2, len(spans) ** 2


whole = {"double": all_seeing(True), "flat": all_seeing(False)}
for growth, (few_places, places) in whole.items():
    print(f"{growth:<7} {few_places} of {places} places of the last map see the whole image")
assert whole["double"][0] == whole["double"][1]
assert 0 < whole["flat"][0] < whole["flat"][1] / 5

# %% [markdown]
# So `flat` hardly gets there, even at its end. Whether that is why it lags behind is not tested here.
#
# This is what a value *can* see. What does it look at? The gradient of the values in the middle of all maps by the
# pixels says how much each pixel matters to them (added with random signs, so that they do not cancel in the same way
# everywhere). The images here are mosaics of 16 photographs, for the patch is larger than a single one. And the network
# is in `.eval()` mode: in train mode, batch normalization lets every value see every pixel of every image.

# %%
pieces = data.normalize(fashion.validation.images[: 16 * 16], stats)
mosaics = pieces.view(16, 4, 4, 28, 28).transpose(2, 3).reshape(16, 1, 112, 112)


def influence(part):
    """How much each pixel matters to the middle of the maps after the stem and so many layers: 112×112."""
    images = mosaics.clone().requires_grad_()
    maps = nn.Sequential(net.eval().stem, *net.layers[:part])(images)  # 16×C×H×W
    signs = torch.randn(maps.shape[:2], generator=torch.Generator().manual_seed(0)).sign()
    middle = maps.shape[2] // 2
    (gradient,) = torch.autograd.grad((signs * maps[:, :, middle, middle]).sum(), images)
    return gradient[:, 0].abs().mean(0)


# %%
def box(values):
    """The rows and the columns in which there is anything but zero: first, and one after the last."""
    rows, columns = values.sum(1).nonzero()[:, 0], values.sum(0).nonzero()[:, 0]
    return rows[0].item(), rows[-1].item() + 1, columns[0].item(), columns[-1].item() + 1


def inner_side(values, share=0.9):
    """The side of the smallest square in the middle of the box that holds this share of all the influence."""
    top, bottom, left, right = box(values)
    cuts = range((bottom - top) // 2)
    held = [values[top + cut : bottom - cut, left + cut : right - cut].sum() / values.sum() for cut in cuts]
    return bottom - top - 2 * max(cut for cut, inside in zip(cuts, held, strict=True) if inside >= share)


# %%
reached = {name: influence(part) for part, name in enumerate(with_maps)}
fig, axes = plt.subplots(1, 5, figsize=(7.6, 2.5))
sides = {}
for ax, (name, values) in zip(axes, reached.items(), strict=True):
    top, bottom, left, right = box(values)
    sides[name] = cost.loc[name, "field"], bottom - top, inner_side(values)
    ax.imshow(values.sqrt(), cmap="mako")
    cut = (bottom - top - sides[name][2]) / 2
    for inset, shade in (0, plots.ORANGE), (cut, "white"):
        corner = (left + inset - 0.5, top + inset - 0.5)
        ax.add_patch(
            plt.Rectangle(corner, right - left - 2 * inset, bottom - top - 2 * inset, ec=shade, fc="none", lw=1.5)
        )
    ax.set(xticks=[], yticks=[], title=name, xlabel=f"can see {sides[name][0]}\n90 %: {sides[name][2]}")
    ax.spines[:].set_visible(False)
fig.suptitle(
    f"influence on the values of a place (square root), mean of {len(mosaics)} mosaics of 112×112", fontsize=11
)
plots.save(
    fig,
    "02_receptive_field",
    "Influence on the values of a place in five layers: a bright spot that grows, brightest in the middle of its field",
)
assert all(reach <= can for can, reach, _ in sides.values()), "never more than the theory"
assert all(most < 0.8 * can for can, _, most in list(sides.values())[2:]), "most of it comes from the middle"

# %% [markdown]
# Orange frames all that has any influence, and is never wider than the formula says. White holds nine tenths of it.
# What lies between the two can be seen, but hardly counts: few paths lead there through the kernels, and many to the
# middle ([Luo et al. 2016](https://arxiv.org/abs/1701.04128)).
#
# ## Pooling: what is kept, what is lost
#
# Now the second sentence. There are three common ways to make a map smaller. Each looks at windows of $k \times k$
# numbers and moves on by the stride $s$:
#
# - **max pooling** takes the largest number of each window;
# - **average pooling** takes their mean;
# - **a strided convolution** takes a weighted sum, with weights that it learns. With equal weights that is the average;
#   with one weight it picks a single pixel. The largest number is no weighted sum.
#
# Watch them at work on a T-shirt with letters. Three things to try: a stride larger than the kernel; a large kernel at
# stride 1; and, with kernel 2 and stride 2, shift the image pixel by pixel. Which picture flickers most?

# %%
photo = fashion.validation.images[1558].double() / 255  # 1×28×28, pixels from 0 to 1: a T-shirt with letters


def pooled(x, kernel, stride):
    """Three ways to make N×H×W numbers fewer, by name."""
    windows = x.unfold(1, kernel, stride).unfold(2, kernel, stride)  # N×H'×W'×kernel×kernel
    middle = (kernel - 1) // 2
    return {"max": windows.amax((3, 4)), "average": windows.mean((3, 4)), "stride": windows[..., middle, middle]}


def smaller(kernel, stride, shift):
    fig, axes = plt.subplots(1, 4, figsize=(7.4, 2.5))
    image = photo.roll(shift, dims=2)
    for ax, (name, x) in zip(axes, {"image": image, **pooled(image, kernel, stride)}.items(), strict=True):
        sides = f"{x.shape[1]}×{x.shape[2]}"
        plots.show_image(ax, x)
        ax.set_title({"image": "the image", "stride": "one pixel (strided)"}.get(name, name), fontweight="bold")
        ax.set_xlabel(f"{sides}, mean {x.mean():.2f}")
    places = range(0, 28 - kernel + 1, stride)
    read = (len({at + offset for at in places for offset in range(kernel)}) / 28) ** 2
    fig.suptitle(
        f"kernel {kernel}, stride {stride}, shifted by {shift}; windows cover {read:.0%} of the pixels", fontsize=11
    )
    return fig


# %%
values = {"kernel": (1, 2, 3, 4, 5, 7), "stride": (1, 2, 3, 4), "shift": (0, 1, 2, 3, 4)}
choices = {label: {f"{value}": value for value in each} for label, each in values.items()}
plots.explore_several(smaller, choices, {"kernel": "2", "stride": "2", "shift": "0"})

# %% [markdown]
# The maximum keeps what is bright, and the dark letters vanish. The average turns them into grey. The single pixel
# keeps some, torn to pieces, and others after a shift. In numbers, for 1,000 photographs, with kernel 2 and stride 2:
# how bright and how rich in contrast the small picture is; how much is lost when each of its numbers is spread over its
# window again; and how much changes, place by place, when the photograph moves by one pixel (both as a share of the
# variance). The motion itself is in that: the photographs change, too.

# %%
# NBVAL_CHECK_OUTPUT
photos = F.pad(fashion.validation.images[:1000, 0].double() / 255, (2, 2))  # 1000×28×32: nothing is lost by a shift
shifted_photos = photos.roll(1, dims=2)
halved, moved = pooled(photos, 2, 2), pooled(shifted_photos, 2, 2)
lost, changed = {}, {}
motion = ((shifted_photos - photos) ** 2).mean() / photos.var()
print(f"photographs  brightness {photos.mean():.3f}   contrast {photos.std():.3f}   {'':<9}   changed {motion:4.0%}")
for kind, x in halved.items():
    enlarged = x.repeat_interleave(2, 1).repeat_interleave(2, 2)  # 1000×28×28
    lost[kind] = (((enlarged - photos) ** 2).mean() / photos.var()).item()
    changed[kind] = (((moved[kind] - x) ** 2).mean() / x.var()).item()
    shares = f"lost {lost[kind]:4.0%}   changed {changed[kind]:4.0%}"
    print(f"{kind:<12} brightness {x.mean():.3f}   contrast {x.std():.3f}   {shares}")
assert (halved["max"] >= halved["average"]).all()
assert abs(halved["average"].mean() - photos.mean()) < 1e-12, "the average keeps the brightness"
assert lost["average"] == min(lost.values()), "of all numbers, the mean is closest to what it stands for"
assert changed["average"] == min(changed.values())

# %% [markdown]
# So if you want to keep the *picture*, take the average. But a network does not want the picture. Its channels say
# where an edge was found, and the maximum asks: *was it anywhere in here?*
#
# There is another difference. The average of a convolution's outputs is a weighted sum of pixels again: convolution and
# pooling together are **one convolution**, with a larger kernel and a stride. Only the maximum is something new. (So it
# is in this stem, which pools *before* norm and ReLU; lesson 07 says why. Behind a ReLU, as in most networks, the
# average is no weighted sum of pixels either, and what is measured below says nothing about that.) For the stem of the
# network above, with its kernels of 3×3 and windows of 2×2:

# %%
# NBVAL_CHECK_OUTPUT
kernels, x = net.stem.conv.weight.detach().double(), ten.double()  # 16×1×3×3, 10×1×28×28
convolved = F.conv2d(x, kernels, padding=1)  # 10×16×28×28
larger = F.conv2d(kernels, torch.full((1, 1, 2, 2), 0.25, dtype=torch.float64), padding=1)  # 16×1×4×4
at_once = F.conv2d(x, larger, stride=2, padding=1)  # 10×16×14×14
assert (F.avg_pool2d(convolved, 2) - at_once).abs().max() < 1e-12
assert (F.max_pool2d(convolved, 2) - at_once).abs().max() > 0.1
print(f"3×3 kernels and the average are {larger.shape[2]}×{larger.shape[3]} kernels with stride 2; the maximum is not")

# %% [markdown]
# ## A shift by one pixel

# %%
exercises.quiz("02.one_pixel")

# %% [markdown]
# With stride 2, a shift by **two** pixels only moves the small map by one, as long as nothing comes near the border. A
# shift by **one** pixel falls in between: other pixels meet in a window, and other numbers come out. For each of the
# three:

# %%
# NBVAL_CHECK_OUTPUT
wide = F.pad(photos[:100], (4, 4))  # black borders, so that nothing is lost by a shift
for kind in halved:
    start, by_one, by_two = (pooled(wide.roll(shift, dims=2), 2, 2)[kind] for shift in (0, 1, 2))
    follows = torch.equal(by_two, start.roll(1, dims=2))
    between = min((by_one - start.roll(step, dims=2)).abs().mean().item() for step in (0, 1))
    print(f"{kind:<8} follows a shift by two: {follows}; by one, off by {between:.3f} at best")
    assert follows
    assert between > 0

# %% [markdown]
# The whole network halves four times, so that only shifts by 16 pixels pass through it unharmed, and the border aside.
# How much does that matter? Small networks of five kinds, five seeds each:
#
# - `max`: the course's own, max pooling in the stem and strided convolutions in layers 2 to 4;
# - `max everywhere`: max pooling in the stem and in layers 2 to 4;
# - `stride`: strided convolutions only;
# - `flat`: max pooling in the stem, and no halving after it;
# - `trained on shifts`: as `max`, but its training images are shifted at random, by up to four pixels.
#
# The clothes are shrunk to 20×20 pixels, in the middle of a black canvas of 28×28. So they can be moved by up to four
# pixels and nothing is lost. All but the last kind learn from centred clothes only. Then all see the same validation
# images at five places.


# %%
def on_canvas(split):
    """The same images at 20×20 pixels, with a black border of four pixels."""
    small = F.interpolate(split.images.float(), (20, 20), mode="bilinear", antialias=True).round().byte()
    return data.Split(F.pad(small, (4, 4, 4, 4)), split.labels)


part, unseen = fashion.take(960), on_canvas(fashion.validation[:500])
centred = replace(part, train=on_canvas(part.train), validation=unseen[:100])
small, quick = CNNConfig(width=8), replace(recipe, epochs=3)
kinds = {
    "max": (small, quick),
    "max everywhere": (replace(small, pool_everywhere=True), quick),
    "stride": (replace(small, pool="stride"), quick),
    "flat": (replace(small, growth="flat"), quick),
    "trained on shifts": (small, replace(quick, crop_padding=4)),
}
models = {}
for kind, (config, its_recipe) in kinds.items():
    for seed in range(device.budget(5, small=2)):
        torch.manual_seed(seed)
        models[kind, seed] = CNN(config)
        its_recipe = replace(its_recipe, seed=seed)
        train.fit(models[kind, seed], centred, its_recipe, device="cpu", precision="fp32", progress=False)


# %%
@torch.inference_mode()
def answers_to(images, model):
    """A network's answers to N×1×28×28 images that are shifted by 0 to 4 pixels: 5×N."""
    return torch.stack([model.eval()(images.roll(shift, dims=3)).argmax(1) for shift in range(5)])


def percent(flags):
    """The share of True in each row, in percent."""
    return (100 * flags.double().mean(1)).tolist()


canvases = data.normalize(unseen.images, data.channel_stats(centred.train.images))  # 500×1×28×28
truth, rows = unseen.labels, []
for (kind, seed), model in models.items():
    answers = answers_to(canvases, model)  # 5×500
    shares = zip(percent(answers == truth), percent(answers != answers[0]), strict=True)
    rows += [(kind, seed, shift, *both) for shift, both in enumerate(shares)]
shifted = pd.DataFrame(rows, columns=["kind", "seed", "shift", "right", "other"])

# %%
fig, axes = plt.subplots(1, 2, figsize=(7.6, 3.3))
titles = {"right": "validation accuracy (%)", "other": "answers other than\nwithout the shift (%)"}
hues = {kind: plots.COLORS.get(kind, plots.VERMILION) for kind in kinds}
for ax, (column, label) in zip(axes, titles.items(), strict=True):
    ends = {}
    for kind, shade in hues.items():
        values = shifted[shifted["kind"] == kind].pivot(index="shift", columns="seed", values=column)
        mean, half = values.mean(axis=1), plots.half_intervals(values)
        ax.plot(mean.index, mean, "o-", ms=4, color=shade)
        ax.fill_between(mean.index, mean - half, mean + half, color=shade, alpha=0.2, lw=0)
        ends[kind] = mean.iloc[-1]
    ax.set(xlabel="shift to the right (pixels)", ylabel=label, xticks=range(5), xlim=(0, 4.1), ylim=(0, 100))
    for kind, height in plots.spread(ends, ax).items():
        ax.text(4.15, height, kind, color=hues[kind], va="center", fontsize=10, fontweight="bold")
fig.suptitle(f"n = {shifted['seed'].nunique()} networks each, 95 % intervals, {len(truth):,} images", fontsize=11)
plots.save(
    fig,
    "02_shifts",
    "Two panels against the shift in pixels: accuracy falls, answers change; both least if trained on shifted images",
)

# %%
by_shift = shifted.groupby(["kind", "shift"], sort=False)[["right", "other"]].mean()
for kind in kinds:
    centre, one, four = (by_shift.loc[(kind, shift)] for shift in (0, 1, 4))
    tip = f"{one['other']:4.1f} % other answers after one pixel, {four['other']:4.1f} % after four"
    print(f"{kind:<18} {tip}; accuracy {centre['right']:.0f} → {four['right']:.0f} %")
after = {s: shifted[shifted["shift"] == s].pivot(index="seed", columns="kind", values="other") for s in (1, 4)}
gaps = {}
for s, (a, b) in product(after, (("max everywhere", "max"), ("trained on shifts", "max everywhere"))):
    gaps[s, a] = evidence.paired(after[s][a].to_numpy(), after[s][b].to_numpy())
    print(f"other answers, shifted by {s}, {a} − {b}: {evidence.points(gaps[s, a])}")
assert all(row["high"] < 0 or row["n"] < 5 for row in gaps.values()), "fewer answers change, with all five seeds"
other = by_shift["other"].unstack()  # a row a kind, a column a shift
assert (other[1] > 0).all(), "one pixel is enough for some"
assert other.loc["trained on shifts", 4] < other.loc["max", 4] / 2, "seen in training is what helps"
centred_right = by_shift["right"].unstack()[0]
assert centred_right["trained on shifts"] < centred_right["max"] - 3, "shifts of up to four pixels cost accuracy here"
crops = claims[claims["claim"] == "training on randomly shifted images, too, helps"].iloc[0]
assert crops["low"] > 0, "in lesson 06, shifts of up to one pixel do not"

# %% [markdown]
# (`flat` learns slowly, as above, and is right on far fewer: that fewer of its answers change is no merit. The networks
# trained on shifts are right on fewer, too, without a shift; but they still are after four pixels.)
#
# Pooling in every layer helps a little: fewer answers change, although the bands touch. With the same seeds a difference
# is taken seed by seed, and its interval keeps clear of zero. (One of several comparisons that nobody declared
# beforehand: an interval, no verdict.)
#
# Strides are one reason, but not the only one. `flat` halves once, and yet its answers change at a shift by two pixels,
# too. The other reason is **zero padding**. After normalization black is not 0, and neither is what later layers make
# of it. So the zeros around it show, and they tell the network where the border is ([Islam et al.
# 2020](https://arxiv.org/abs/2001.08248)). A shift moves the clothes, and the border stays.
#
# Without a border there would be strides only. `padding_mode="circular"` takes it away: to the right of the last column
# comes the first one again, as on a ring. Two of the five kinds, trained anew like that, one network each:


# %%
def without_border(config):
    """A network whose convolutions go on at the other edge, where they would have met zeros."""
    model = CNN(config)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.padding_mode = "circular"
    return model


rings = {}
for kind in ("max", "flat"):
    torch.manual_seed(0)
    model = without_border(kinds[kind][0])
    train.fit(model, centred, quick, device="cpu", precision="fp32", progress=False)
    answers = answers_to(canvases, model)
    rings[kind] = percent(answers != answers[0])
ring = pd.DataFrame.from_dict(rings, orient="index")  # a row a kind, a column a shift
for kind, shares in ring.iterrows():
    print(f"{kind:<4} without a border: other answers at shifts 0 to 4 {'  '.join(map('{:4.1f}'.format, shares))} %")
assert (ring.loc["flat", [2, 4]] < 0.5).all(), "a shift by two changes nothing (but for ties, by rounding)"
assert (ring.loc["max", [2, 4]] > 10).all(), "it halves four times: that is another matter"
assert (other.loc["flat", [2, 4]] > 1).all(), "with its border, flat changes answers there"

# %% [markdown]
# There it is: without a border, `flat` answers as before at shifts by two and by four, and only there. `max` does not,
# for it halves four times. With zero padding, both reasons act at once.
#
# No kind of pooling makes a network blind to shifts. Some answers tip over at a single pixel already, as [Azulay &
# Weiss (2019)](https://arxiv.org/abs/1805.12177) found in far larger networks. Blurring before each stride helps
# ([Zhang 2019](https://arxiv.org/abs/1904.11486)), but against four pixels nothing here helps as much as **shifted
# training images**: what the images show, the network learns. That is why the course's recipe has random crops. (Here
# they cost accuracy *without* a shift. Lesson 06, with shifts of at most one pixel, a wider network, more images and
# longer runs, sees no such cost; which of these makes the difference was not tested.)
#
# ## Pool once, everywhere, or not at all?

# %%
exercises.quiz("02.pooling")

# %% [markdown]
# The second sentence under test, with networks of 16 channels on photographs of the full 28×28 pixels. `average` joins
# the others: it pools by averages in the stem. Each has its own best learning rate, and ten seeds:

# %%
pooling = read("pooling")
plots.save(
    plots.experiment(pooling.runs),
    "02_pooling_runs",
    "Curves and paired differences of four kinds of pooling: max everywhere level with max, average and stride behind",
)

# %%
# NBVAL_CHECK_OUTPUT
print(experiments.in_words(claims, "pooling"))
ahead = 100 * evidence.finals(pooling.runs, "validation accuracy")
ahead = ahead["max"].mean() - ahead.mean()
[everywhere] = claims[claims["claim"] == "max pooling once is better than in every layer"].itertuples()
assert everywhere.low < 0 < everywhere.high, "where to pool: ten seeds show no difference"
assert min(ahead["average"], ahead["stride"]) > 0.5, "what to pool with matters"
print("best learning rates:", ", ".join(f"{lr:g} ({name})" for name, lr in sorted(pooling.about["best_lr"].items())))
lead = {}
for lr, at in pooling.sweep.groupby("lr"):
    at.attrs = pooling.sweep.attrs
    at_lr = 100 * evidence.finals(at, "validation accuracy")  # a row a seed
    for name in ("average", "stride"):
        lead[name, lr] = at_lr["max"] - at_lr[name]
        seed_by_seed = " and ".join(f"{points:+.1f}" for points in lead[name, lr])
        print(f"both at {lr:g}: max − {name} {seed_by_seed} points (the two seeds that chose the rates)")
assert min(each.min() for (_, lr), each in lead.items() if lr >= 0.1) > 0
assert lead["average", 0.03].max() < 0 < lead["stride", 0.03].min(), "at the smallest rate, averages are ahead"
assert lead["average", 0.1].max() < 0.5 < lead["average", 0.3].min()

# %%
# NBVAL_CHECK_OUTPUT
strided = pooling.sweep[pooling.sweep["variant"] == "stride"].groupby("lr")
strided = {lr: 100 * evidence.finals(at, "validation accuracy")["stride"].mean() for lr, at in strided}
runner_up, top = sorted(strided.items(), key=lambda each: each[1])[-2:]
print(
    f"stride, mean of the two seeds: {top[1]:.2f} % at {top[0]:g}, {runner_up[1]:.2f} % at {runner_up[0]:g}; ", end=""
)
ten_more = 100 * evidence.finals(pooling.runs, "validation accuracy")["stride"].mean()
print(f"ten others at {pooling.about['best_lr']['stride']:g}: {ten_more:.2f} %")
assert top[1] - runner_up[1] < 0.1
assert ten_more < top[1] - 0.5

# %% [markdown]
# **Where** you pool, in the stem only or in every layer, makes no difference that ten seeds would show. If pooling
# throws away too much, then so do the strides that stand in its place. **What** you pool with matters more, at least in
# the stem: there the maximum is clearly better than the average and than a stride. It is the only one of the three that
# is no weighted sum here, before the ReLU, and the stem has one step more in which it can do something new. That may be
# why. (Their rates differ, and were chosen by two seeds. At equal rates from 0.1 on the maximum is ahead with both of
# these, at 0.1 only a little ahead of the average. At 0.03, where all learn too slowly, the average is ahead by a
# little. For the stride the rate was chosen by a hair, and its ten other networks fall behind the two that chose it:
# that the maximum is ahead of it is well supported, by how much is not.)
#
# Others found something like it, in deeper networks that were trained for longer: where [Springenberg et al.
# (2014)](https://arxiv.org/abs/1412.6806) left out max pooling and gave the convolution before it a stride,
# as `stride` does here, the error on CIFAR-10 rose, too (from 9.74 to 10.19 % for their model C). With one more
# convolution, whose stride takes the pooling's place, it did not (9.08 %). There strides stood in for pooling without
# loss, but with a layer more.
#
# ## Your turn: what comes out?
#
# Ten colour images of 30×30 pixels enter this stack. Which shape leaves it (without the number of images), and how many
# parameters does it have? Work it out on paper, then put your answer in place of the dots.

# %%
stack = nn.Sequential(
    nn.Conv2d(3, 16, kernel_size=5, stride=2, padding=2, bias=False),
    nn.BatchNorm2d(16),
    nn.ReLU(),
    nn.MaxPool2d(kernel_size=3, stride=2),
    nn.Conv2d(16, 24, kernel_size=3, padding=1),
)
answer = ...  # (C, H, W, parameters)
exercises.check("02.stack", answer)
# exercises.hint("02.stack")

# %% jupyter={"source_hidden": true} tags=["solution"]
# Solution: click the dots to unfold it
shape = stack(torch.zeros(10, 3, 30, 30)).shape[1:]
parameters = sum(weight.numel() for weight in stack.parameters())
assert exercises.check("02.stack", (*shape, parameters), quiet=True)

# %% [markdown]
# ## Your turn: a network on a budget
#
# Design a network for Fashion-MNIST with **at most 8,000 parameters** and **at most 2 million FLOPs** for an image of
# 28×28. It takes grey images of that size, and of 40×40 just as well, and gives ten logits. Write a function that
# builds it. The check counts parameters and FLOPs, trains your network on 1,280 images at a rate of 0.2, which takes a
# second, and wants to see that it learns: 55 % of the validation images right. (Training keeps images channels last in
# memory: write `x.flatten(1)`, not `x.view(…)`.)

# %%
build = ...  # def build(): … return nn.Sequential(…)
kept = exercises.check("02.budget", build)
# exercises.hint("02.budget")

# %% [markdown]
# How good can it get? This trains it as long as the network at the beginning of the lesson, and compares.


# %%
def race(build, whose="yours"):
    torch.manual_seed(0)
    rival = build()
    result = train.fit(rival, few, recipe, device="cpu", precision="fp32", progress=False)
    for name, model, log in (whose, rival, result), ("the course's", net, history):
        parameters = sum(weight.numel() for weight in model.parameters())
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.eval()(torch.zeros(1, 1, 28, 28))
        cost = f"{parameters:,} parameters, {counter.get_total_flops() / 1e6:.2f} MFLOP"
        print(f"{name:<14} {log.last('validation', 'accuracy'):.0%} of validation images right, with {cost}")


if kept:
    race(build)


# %% jupyter={"source_hidden": true} tags=["solution"]
# Solution: click the dots to unfold it
def solution():
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),  # 14×14
        *(nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),  # 7×7
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),  # 4×4
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)),
    )


assert exercises.check("02.budget", solution, quiet=True)
race(solution, "the solution's")

# %% [markdown]
# ## Summary

# %%
from IPython.display import Markdown


def said(row):
    """The claim, its verdict and its number."""
    interval = f"95 % interval {100 * row.low:+.2f} to {100 * row.high:+.2f}, n = {row.n}"
    return f"*{row.claim}*: **{row.verdict}**, {100 * row.difference:+.2f} points of {row.metric} ({interval})"


mine = claims[claims["experiment"].isin(["schedule", "schedule_32", "pooling"])]
results = [said(row) for row in mine.itertuples()]
fewer, more = (f"{total(networks[name], 2):,}" for name in ("constant", "double"))
last = sides["layer 4"]
tipped = other[1].drop(["trained on shifts", "flat"])
changed, level = (f"{each.min():.0f} to {each.max():.0f}" for each in (tipped, centred_right[tipped.index]))
seeds, on_shifts = shifted["seed"].nunique(), other.loc["trained on shifts", 1]
memory = bill.loc["flat", "kB kept an image"] / bill.loc["double", "kB kept an image"]
on_far = [by_shift.loc[(kind, 4), "right"] for kind in ("trained on shifts", "max")]  # after four pixels
blind = f"""- No pooling makes a network blind to shifts: one pixel changes {changed} % of the answers of networks
  that are right on {level} %, and {on_shifts:.0f} % if trained on shifts; these are right on
  {centred_right["trained on shifts"]:.0f} % only, but after four pixels on {on_far[0]:.0f} %, where `max` is down to
  {on_far[1]:.0f} % (n = {seeds} each). Strides are one reason, padding the other."""

# %%
Markdown(f"""
**"Each layer doubles the channels and roughly halves the input"**

- At exact halving, a block's second convolution costs the same FLOPs in every layer, and its output has half as many
  numbers. From layer 2 on its first one costs {first:g} of that; from 7 to 4 the work grows by {rounded - 1:.0%}.
- **Halving counts; for doubling, ten seeds show no difference**, in short runs of small networks: `constant` is
  {behind["constant"]:.2f} points behind `double`, with {fewer} parameters for {more}. `flat` is {behind["flat"]:.1f}
  behind, {accuracy["flat"].max():.1f} % at most; a run of it that halves has {reached_by[0]:.1f} % in half the epochs.
- **FLOPs are not time, nor memory.** From 27 to 32 channels: {wider["MFLOP"] - 1:+.0%} FLOPs, and the time as the bars
  above say. At equal FLOPs, `flat` keeps (in fp32) {memory:.1f} times the memory of `double`.
- {results[0]}.
- {results[1]}.
- {results[2]}.
- {results[3]}.
- Halving widens the view: layer 4 can see {last[0]} pixels, {fields(False)[-1]} without it, where {whole["flat"][0]}
  of {whole["flat"][1]} places see the whole image. Nine tenths of the influence come from the inner {last[2]}.

**"Max pooling reduces the dimensionality by quite a bit, so use it only once"**

- {results[4]} (its further poolings stand behind a ReLU, the stem's before it).
- {results[5]}.
- {results[6]}.
{blind}
""")

# %% [markdown]
# **Sources.** Simonyan & Zisserman 2014, [Very deep convolutional networks](https://arxiv.org/abs/1409.1556). He et al.
# 2015, [Deep residual learning](https://arxiv.org/abs/1512.03385). Springenberg et al. 2014, [Striving for
# simplicity](https://arxiv.org/abs/1412.6806), on strides in place of pooling. Scherer, Müller & Behnke 2010,
# [Evaluation of pooling operations](https://doi.org/10.1007/978-3-642-15825-4_10). Luo et al. 2016, [Understanding the
# effective receptive field](https://arxiv.org/abs/1701.04128). Araujo, Norris & Sim 2019, [Computing receptive
# fields](https://distill.pub/2019/computing-receptive-fields). Islam, Jia & Bruce 2020, [How much position information
# do convolutional neural networks encode?](https://arxiv.org/abs/2001.08248), on zero padding. Zhang 2019, [Making
# convolutional networks shift-invariant again](https://arxiv.org/abs/1904.11486). Azulay & Weiss 2019, [Why do deep
# convolutional networks generalize so poorly to small image transformations?](https://arxiv.org/abs/1805.12177)
