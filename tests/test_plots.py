"""The figures: colours that all can tell apart, files that stay the same, pictures that agree with the numbers."""

import io
import itertools
from datetime import datetime

import ipywidgets
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image

from utils import evidence, plots
from utils.data import Split
from utils.model import CNN, GROWTHS, INITS, NORMS, PLACES, POOLS, CNNConfig
from utils.train import History

# What a reader without one of the three cones sees, in linear RGB (Machado, Oliveira & Fernandes 2009, severity 1.0).
EYES = {
    "typical": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}
# Linear sRGB to XYZ under daylight (D65).
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


@pytest.fixture(autouse=True)
def style():
    plots.use_style()
    yield
    plt.close("all")


def lab(color: str, eye: str) -> np.ndarray:
    """CIELAB coordinates of a colour as `eye` sees it: a distance of about 2 is just visible."""
    rgb = np.array(to_rgb(color))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    x, y, z = TO_XYZ @ np.clip(EYES[eye] @ linear, 0, 1) / TO_XYZ.sum(1)
    f = [t ** (1 / 3) if t > (6 / 29) ** 3 else t / (3 * (6 / 29) ** 2) + 4 / 29 for t in (x, y, z)]
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def closest(colors: list[str], eye: str) -> float:
    return min(np.linalg.norm(lab(a, eye) - lab(b, eye)) for a, b in itertools.combinations(colors, 2))


# --------------------------------------------------------------------------------------------------------- the colours


def test_lab_of_reference_colours():
    assert lab("#ffffff", "typical") == pytest.approx([100, 0, 0], abs=0.02)
    assert lab("#ff0000", "typical") == pytest.approx([53.24, 80.09, 67.20], abs=0.05)  # the textbook's red
    assert closest(["#808080", "#808080"], "typical") == 0


@pytest.mark.parametrize("eye", EYES)
@pytest.mark.parametrize("family", plots.FAMILIES)
def test_variants_compared_in_one_figure_are_told_apart(family, eye):
    assert closest(list(plots.FAMILIES[family].values()), eye) > 15


def test_red_and_green_would_be_found():
    assert closest(["#d62728", "#2ca02c"], "typical") > 100
    assert closest(["#a05020", "#507820"], "deuteranopia") < 15


@pytest.mark.parametrize("variant", plots.COLORS)
def test_colours_stand_out_from_the_page(variant):
    """Contrast with white of at least 2 : 1 (WCAG's definition)."""
    lightness = lab(plots.color(variant), "typical")[0]
    luminance = ((lightness + 16) / 116) ** 3
    assert 1.05 / (luminance + 0.05) > 2


def test_a_variant_has_one_colour_wherever_it_occurs():
    pairs = {pair for family in plots.FAMILIES.values() for pair in family.items()}
    assert len(pairs) == len(plots.COLORS)


def test_every_choice_of_the_network_has_a_colour():
    choices = {"norm": NORMS, "dropout_where": PLACES, "pool": POOLS, "init": INITS, "growth": GROWTHS}
    assert {name: set(plots.FAMILIES[name]) for name in choices} == {name: set(of) for name, of in choices.items()}


def test_unknown_variant():
    with pytest.raises(ValueError, match=r"no colour for variant 'bach'.*batch, layer"):
        plots.color("bach")


# ----------------------------------------------------------------------------------------------------------- the files


def small_figure() -> plt.Figure:
    fig, ax = plt.subplots()
    ax.plot([1, 3, 2], color=plots.color("train"))
    ax.set(xlabel="epoch", ylabel="loss (nats)")
    return fig


def test_saved_twice_is_the_same_file(tmp_path, monkeypatch):
    contents = []
    for folder in ("first", "second"):
        monkeypatch.setenv("CNN_FIGURES_DIR", str(tmp_path / folder))
        plots.save(small_figure(), "loss")
        contents.append((tmp_path / folder / "loss.png").read_bytes())
    assert contents[0] == contents[1]
    image = Image.open(io.BytesIO(contents[0]))
    assert image.width == pytest.approx(7.2 * plots.DPI, rel=0.05)
    assert not image.info.keys() & {"Software", "Creation Time", "date"}
    assert plt.get_fignums() == []  # closed: a notebook shows it once


def test_saved_file_shows_the_figure(tmp_path, monkeypatch):
    """256 colours are enough: no pixel is far from what matplotlib drew."""
    fig = small_figure()
    drawn = io.BytesIO()
    fig.savefig(drawn, dpi=plots.DPI, bbox_inches="tight", pad_inches=0.08)
    full = np.asarray(Image.open(drawn).convert("RGB"), dtype=int)
    small = np.asarray(Image.open(io.BytesIO(plots.png(fig))).convert("RGB"), dtype=int)
    assert full.shape == small.shape
    assert np.abs(full - small).max() <= 24


def test_no_space_left(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    monkeypatch.setenv("CNN_FIGURES_DIR", str(tmp_path / "file"))
    with pytest.raises(OSError, match=r"cannot write .*file: a part of the path is a file"):
        plots.save(small_figure(), "loss", show=False)


# ------------------------------------------------------------------------------------------------------------- a slider


def test_slider_redraws_once_a_value(monkeypatch):
    drawn, shown, sliders = [], [], []

    def draw(height: float) -> plt.Figure:
        drawn.append(height)
        fig, ax = plt.subplots()
        ax.bar(0, height)
        ax.set_ylim(0, 3)
        return fig

    kind = ipywidgets.SelectionSlider
    monkeypatch.setattr(ipywidgets, "SelectionSlider", lambda **options: sliders.append(kind(**options)) or sliders[0])
    monkeypatch.setattr("IPython.display.display", lambda *args, **kwargs: None)
    monkeypatch.setattr(plots, "show_png", lambda content, text, handle=None: shown.append((content, text)) or "handle")
    plots.explore(draw, "height", {"one": 1.0, "two": 2.0}, start="one")
    for value in ("two", "one", "two"):
        sliders[0].value = value
    assert drawn == [1.0, 2.0]
    assert [text for _, text in shown] == [f"height {value}" for value in ("one", "two", "one", "two")]
    assert shown[0][0] == shown[2][0] != shown[1][0]
    assert plt.get_fignums() == []


def test_slider_with_a_start_that_is_no_value():
    with pytest.raises(ValueError, match="start='three': choose one of one, two"):
        plots.explore(lambda value: small_figure(), "height", {"one": 1, "two": 2}, start="three")


def test_several_sliders_give_their_values_in_order(monkeypatch):
    drawn, shown, sliders = [], [], []
    kind = ipywidgets.SelectionSlider
    monkeypatch.setattr(ipywidgets, "SelectionSlider", lambda **options: sliders.append(kind(**options)) or sliders[-1])
    monkeypatch.setattr("IPython.display.display", lambda *args, **kwargs: None)
    monkeypatch.setattr(plots, "show_png", lambda content, text, handle=None: shown.append((text, handle)) or "first")

    def draw(gamma: float, images: int) -> plt.Figure:
        drawn.append((gamma, images))
        return small_figure()

    choices = {"γ": {"1": 1.0, "2": 2.0}, "images": {"4": 4, "64": 64}}
    plots.explore_several(draw, choices, {"γ": "2", "images": "4"})
    sliders[1].value = "64"
    sliders[0].value = "1"
    sliders[1].value = "4"
    sliders[0].value = "2"
    assert drawn == [(2.0, 4), (2.0, 64), (1.0, 64), (1.0, 4)]  # and what was drawn before is kept
    assert [slider.description for slider in sliders] == ["γ", "images"]
    assert [text for text, _ in shown[::4]] == ["γ 2, images 4; loss (nats) against epoch"] * 2
    assert [handle for _, handle in shown] == [None, *["first"] * 4]  # in one place
    with pytest.raises(ValueError, match="images: start=None: choose one of 4, 64"):
        plots.explore_several(draw, choices, {"γ": "2"})


# ---------------------------------------------------------------------------------------------------------- the figures


@pytest.mark.parametrize("channels", [1, 3])
def test_samples_stand_where_they_belong(channels):
    images = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(6, channels, 8, 10).contiguous()
    split = Split(images, torch.tensor([1, 0, 1, 0, 1, 0]))
    ax = plots.samples(split, ["a", "b"], per_class=2).axes[0]
    picture = np.asarray(ax.images[0].get_array())
    assert picture.shape[:2] == (2 * 10, 2 * 12)  # a frame of one pixel around each image
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b"]
    found = [[int(picture[row + 5, column + 6].flat[0]) for column in (0, 12)] for row in (0, 10)]
    assert found == [[1, 3], [0, 2]]


def test_samples_of_a_class_with_few():
    split = Split(torch.zeros(3, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 1]))
    picture = np.asarray(plots.samples(split, ["a", "b"], per_class=2).axes[0].images[0].get_array())
    assert picture[5, 5] == 0
    assert (picture[:10, 10:] == 255).all()  # nothing there: white


def test_show_image_keeps_the_scale_of_the_type():
    _, axes = plt.subplots(1, 3)
    plots.show_image(axes[0], torch.full((1, 4, 4), 100, dtype=torch.uint8))
    plots.show_image(axes[1], torch.full((1, 4, 4), 0.1))
    plots.show_image(axes[2], torch.rand(3, 4, 5), vmin=-1, title="colour")
    assert [ax.images[0].get_clim() for ax in axes] == [(0, 255), (0, 1), (-1, 1)]
    assert axes[2].images[0].get_array().shape == (4, 5, 3)
    assert axes[2].get_title() == "colour"


def make_history(runs: int, epochs: int) -> History:
    rows = [
        (f"run {run}", epoch, 10 * epoch, split, metric, scale * (run + 1) / (epoch + offset), 1.0)
        for run in range(runs)
        for epoch in range(1, epochs + 1)
        for split, offset in (("train", 0), ("validation", 1))
        for metric, scale in (("loss", 1.0), ("accuracy", 0.5))
    ]
    return History(rows, columns=History.COLUMNS)


@pytest.mark.parametrize(("runs", "epochs"), [(1, 1), (1, 5), (2, 3)])
def test_history_draws_the_rows(runs, epochs):
    history = make_history(runs, epochs)
    fig = plots.history(history)
    for ax, metric, factor in zip(fig.axes, ("loss", "accuracy"), (1, 100), strict=True):
        assert metric in ax.get_ylabel()
        assert len(ax.lines) == 2 * runs
        for line in ax.lines:
            run, split = line.get_label().rsplit(" ", 1)
            rows = history[(history["metric"] == metric) & (history["split"] == split) & (history["run"] == run)]
            assert line.get_xdata().tolist() == rows["epoch"].tolist()
            assert line.get_ydata() == pytest.approx(factor * rows["value"].to_numpy())
            assert line.get_color() == plots.color(split)
        assert {text.get_text() for text in ax.texts} == {"train", "validation"}


def test_history_is_redrawn_into_the_same_figure():
    fig = plots.history(make_history(1, 1))
    assert plots.history(make_history(1, 4), fig) is fig
    assert len(fig.axes) == 2
    assert len(fig.axes[0].lines[0].get_xdata()) == 4


def test_labels_are_moved_apart():
    _, ax = plt.subplots()
    ax.set_ylim(0, 1)
    moved = plots.spread({"train": 0.98, "validation": 0.97, "test": 0.2}, ax, gap=0.1)
    assert moved["test"] == pytest.approx(0.2)
    assert moved["train"] - moved["validation"] == pytest.approx(0.1)
    assert max(moved.values()) <= 1


# ----------------------------------------------------------------------------------------------------- the architecture

CONFIGS = {
    "default": (CNNConfig(), 28),
    "plain, deep": (CNNConfig(width=4, depth=9, residual=False), 33),
    "colour": (CNNConfig(in_channels=3, width=8, num_classes=7, pool="average", pool_everywhere=True), 32),
    "flat": (CNNConfig(width=4, growth="flat"), 28),
    "quadruple": (CNNConfig(width=2, growth="quadruple"), 28),
}


def true_shapes(model: CNN, size: int) -> dict[str, tuple[int, ...]]:
    """The shapes that come out of a forward pass, part by part."""
    x = torch.zeros(1, model.config.in_channels, size, size)
    shapes = {"image": x.shape[1:]}
    for name, part in [("stem", model.stem), *((f"layer {i}", layer) for i, layer in enumerate(model.layers, start=1))]:
        x = part(x)
        shapes[name] = x.shape[1:]
    return shapes | {"average": x.mean((2, 3)).shape[1:], "head": model(torch.zeros(1, *shapes["image"])).shape[1:]}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("with_image", [False, True])
def test_architecture_is_labelled_with_the_real_shapes(name, with_image):
    config, size = CONFIGS[name]
    model = CNN(config).train()
    image = torch.randn(config.in_channels, size, size) if with_image else None
    fig = plots.architecture(model, size, image)
    written = {text.get_gid(): text.get_text() for text in fig.axes[0].texts if text.get_gid()}
    assert written == {part: "×".join(map(str, shape)) for part, shape in true_shapes(model, size).items()}
    words = " ".join(text.get_text() for text in fig.axes[0].texts)
    assert ("residual" in words) == config.residual
    assert f"{config.blocks[0]} block" in words
    assert words.count("stride 2") == (0 if config.pool_everywhere or config.growth == "flat" else 3)
    assert model.training


def test_architecture_shows_what_the_model_makes_of_the_image():
    model = CNN(CNNConfig(width=4))
    image = torch.randn(1, 28, 28)
    seen = plots.activations(model, image)
    with torch.no_grad():
        model.eval()
        maps = model.stem(image[None])[0]
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    expected = (maps - low) / (high - low)
    assert torch.allclose(seen["stem"], expected, atol=1e-5)
    assert all(value.min() >= 0 and value.max() <= 1 for value in seen.values())
    assert plots.png(plots.architecture(model, image=image)) != plots.png(plots.architecture(model))


def test_architecture_is_the_same_file_at_each_drawing():
    model = CNN()
    assert plots.png(plots.architecture(model)) == plots.png(plots.architecture(model))


# ------------------------------------------------------------------------------------------------------- comparisons


def sweep(variants: dict[str, float], seeds: int = 4, lrs: tuple[float, ...] = (0.1,)) -> pd.DataFrame:
    """Made-up runs of three epochs; the last accuracy of a variant is its number, plus a little a seed."""
    rows = []
    for variant, best in variants.items():
        for lr in lrs:
            for seed in range(seeds):
                for epoch in (1, 2, 3):
                    value = best - 0.1 * (3 - epoch) + 0.002 * seed - abs(lr - 0.1)
                    value += 0.0002 * (-1) ** seed * (variant == "batch")  # equal differences would be no evidence
                    rows.append(["e", variant, lr, seed, epoch, epoch, "validation", "accuracy", value, 1.0])
                rows.append(["e", variant, lr, seed, 3, 3, "train", "diverged", 0.0, 1.0])
    columns = ["experiment", "variant", "lr", "seed", "epoch", "step", "split", "metric", "value", "seconds"]
    frame = pd.DataFrame(rows, columns=columns)
    frame.attrs = {"validation_images": 5000, "num_classes": 10}
    return frame


def texts(fig) -> str:
    return " | ".join(text.get_text() for text in fig.findobj(plt.Text) if text.get_text())


def test_compare_shows_mean_curves_in_the_variants_colours_and_the_paired_differences():
    fig = plots.compare(sweep({"batch": 0.9, "group": 0.88, "none": 0.85}), baseline="none", margin=0.01)
    left, right = fig.axes
    ends = {line.get_color(): line.get_ydata()[-1] for line in left.get_lines()}
    assert ends == pytest.approx(
        {plots.color(name): 100 * v + 0.3 for name, v in (("batch", 0.9), ("group", 0.88), ("none", 0.85))}
    )
    written = texts(fig)
    for words in ("batch − none, n = 4", "+5.00: supported", "group − none, n = 4", "mean of 4 seeds, 95 % band"):
        assert words in written
    assert [line.get_xdata()[0] for line in right.get_lines()][-2:] == [0, 1]  # no difference, and the margin
    plt.close(fig)


def test_an_experiment_is_a_row_of_curves_and_differences_for_each_half_of_its_grid():
    finals = {"he, batch norm": 0.9, "default, batch norm": 0.89, "he, no norm": 0.87, "default, no norm": 0.82}
    fig = plots.experiment(sweep(finals))
    assert len(fig.axes) == 4
    titles = [ax.get_title("left") for ax in fig.axes]
    assert titles[0].startswith("batch norm: mean of 4 seeds")
    assert titles[2].startswith("no norm: mean of 4 seeds")
    ends = [line.get_ydata()[-1] for ax in fig.axes[::2] for line in ax.get_lines()]
    assert ends == pytest.approx([100 * value + 0.3 for value in finals.values()])
    written = texts(fig)
    for words in ("he − default, n = 4", "+1.00", "+5.00"):
        assert words in written
    assert "supported" not in written  # a verdict takes all claims of the course
    plt.close(fig)
    assert len(plots.experiment(sweep({"batch": 0.9, "none": 0.85})).axes) == 2


def test_compare_tells_of_runs_that_diverged():
    runs = sweep({"batch": 0.9, "none": 0.85})
    broken = (runs["variant"] == "none") & (runs["seed"] == 1)
    runs.loc[broken & (runs["metric"] == "diverged"), "value"] = 1.0
    fig = plots.compare(runs)
    assert "none (1 diverged)" in texts(fig)
    plt.close(fig)


def test_lr_sweep_has_a_line_a_variant_on_a_logarithmic_axis():
    fig = plots.lr_sweep(sweep({"batch": 0.9, "none": 0.85}, lrs=(0.01, 0.1, 0.3)))
    (ax,) = fig.axes
    assert ax.get_xscale() == "log"
    assert {line.get_color(): line.get_xdata().tolist() for line in ax.get_lines()} == {
        plots.color("batch"): [0.01, 0.1, 0.3],
        plots.color("none"): [0.01, 0.1, 0.3],
    }
    plt.close(fig)


def test_variants_without_a_colour_get_ones_that_no_other_has():
    shades = plots.colors_of(["batch", "width 16", "width 32", "none"])
    assert shades["batch"] == plots.color("batch")
    assert len(set(shades.values())) == 4
    with pytest.raises(ValueError, match="expected at most 6"):
        plots.colors_of([f"width {n}" for n in range(7)])


def test_claims_are_drawn_with_interval_margin_and_verdict():
    row = {"lesson": "01_data", "claim": "one helps", "n": 7, "difference": 0.02, "low": 0.01, "high": 0.03}
    table = pd.DataFrame(
        [row | {"margin": 0.005, "verdict": "supported"}, row | {"margin": 0.05, "verdict": "refuted"}]
    )
    (ax,) = plots.claims(table).axes
    intervals = [line for line in ax.get_lines() if list(line.get_xdata()) == [1.0, 3.0]]
    assert [line.get_color() for line in intervals] == [plots.BLUE, plots.VERMILION]
    assert {0.5, 5.0} <= {line.get_xdata()[0] for line in ax.get_lines() if len(line.get_xdata()) == 2}
    assert [text.get_text() for text in ax.texts].count("+2.0, n = 7") == 2
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        "supported: 1",
        "inconclusive: 0",
        "refuted: 1",
    ]


# ------------------------------------------------------------------------------------------------------------ lesson 6


def full_history(epochs: int = 3, run: str = "run") -> pd.DataFrame:
    rows = []
    for epoch in range(1, epochs + 1):
        for split, metric, value in (
            ("train", "loss", 1 / epoch),
            ("train", "accuracy", 0.5 + 0.1 * epoch),
            ("train", "images_per_second", 1000.0),
            ("train", "lr", 0.1 * epoch),
            ("validation", "loss", 1.1 / epoch),
            ("validation", "accuracy", 0.4 + 0.1 * epoch),
        ):
            rows.append([run, epoch, epoch * 10, split, metric, value, float(epoch)])
    return History(rows, columns=History.COLUMNS)


def test_progress_shows_loss_accuracy_learning_rate_and_speed_and_is_redrawn_in_place():
    fig = plots.progress(full_history(2))
    assert plots.progress(full_history(3), fig) is fig
    lines = {ax.get_ylabel(): [line.get_ydata().tolist() for line in ax.lines] for ax in fig.axes}
    assert lines["accuracy (%)"] == [pytest.approx([60, 70, 80]), pytest.approx([50, 60, 70])]
    assert lines["loss (nats)"] == [pytest.approx([1, 1 / 2, 1 / 3]), pytest.approx([1.1, 1.1 / 2, 1.1 / 3])]
    assert lines["learning rate"] == [pytest.approx([0.1, 0.2, 0.3])]
    assert lines["images/s"] == [[1000] * 3]
    assert "train" in texts(fig)
    assert "validation" in texts(fig)


def test_progress_of_several_runs_is_several_lines():
    both = pd.concat([full_history(run="a"), full_history(run="b")])
    assert [len(ax.lines) for ax in plots.progress(both).axes] == [4, 4, 2, 2]


def ledger_rows() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Three variants of ten seeds: +1 point, then +0.1 points; and their claims."""
    rows = []
    for variant, accuracy in (("start", 0.88), ("one-cycle", 0.89), ("flips", 0.891)):
        for seed in range(10):
            value = accuracy + 0.0005 * (seed % 3) + (0.0002 * (seed % 2) if variant == "flips" else 0)
            value += 0.0001 * (-1) ** seed * (variant == "one-cycle")  # equal differences would be no evidence
            rows.append(["e", variant, 0.1, seed, 1, "validation", "accuracy", value])
    runs = pd.DataFrame(rows, columns=["experiment", "variant", "lr", "seed", "epoch", "split", "metric", "value"])
    steps = [
        evidence.compare(runs[runs["variant"].isin(pair)], pair[0], margin=0.005)
        for pair in (("start", "one-cycle"), ("one-cycle", "flips"))
    ]
    return runs, pd.concat(steps)


def test_ledger_stands_on_the_row_above():
    runs, steps = ledger_rows()
    left, right = plots.ledger(runs, steps).axes
    bars = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in left.patches]
    means = [88 + 0.045, 89 + 0.045, 89.1 + 0.055]
    assert bars == [pytest.approx(means[:2]), pytest.approx(means[1:])]
    assert [label.get_text() for label in left.get_yticklabels()] == ["start", "+ one-cycle", "+ flips"]
    assert [text.get_text() for text in right.texts] == ["+1.00", "+0.11"]
    assert [text.get_color() for text in right.texts] == [plots.VERDICTS[row][0] for row in ("supported", "refuted")]


def test_confusion_writes_the_counts_and_leaves_out_zeros():
    matrix = torch.tensor([[5, 0, 1], [2, 3, 0], [0, 0, 0]])
    fig = plots.confusion(matrix, ["a", "b", "c"])
    assert [text.get_text() for text in fig.axes[0].texts] == ["5", "1", "2", "3"]
    assert [label.get_text() for label in fig.axes[0].get_yticklabels()] == ["a", "b", "c"]
    assert fig.axes[0].get_title("left") == "n = 11 images"
    assert len(plots.confusion(torch.ones(30, 30, dtype=torch.int64), list(map(str, range(30)))).axes[0].texts) == 0


def test_reliability_leaves_out_bins_that_say_nothing():
    rows = pd.DataFrame({"n": [3, 0, 50], "confidence": [0.2, np.nan, 0.9], "accuracy": [1.0, np.nan, 0.8]})
    _, ax = plt.subplots()
    plots.draw_reliability(ax, rows, plots.BLUE)
    assert ax.collections[0].get_offsets().tolist() == [pytest.approx([90, 80])]


@pytest.mark.parametrize("channels", [1, 3])
def test_heat_is_warm_where_it_is_and_grey_elsewhere(channels):
    heat = torch.zeros(8, 8)
    heat[:4] = 1.0
    _, ax = plt.subplots()
    plots.show_heat(ax, torch.full((channels, 8, 8), 100, dtype=torch.uint8), heat)
    pixels = ax.images[0].get_array()
    assert np.ptp(pixels[5, 3]) < 1e-6  # grey
    assert pixels[2, 3, 0] - pixels[2, 3, 2] > 0.2  # more red than blue


@pytest.mark.parametrize("channels", [1, 3])
def test_explanation_names_the_answer_and_ranks_the_classes(channels):
    image, p = torch.zeros(channels, 28, 28, dtype=torch.uint8), torch.tensor([0.1, 0.7, 0.2])
    picture, heat, bars = plots.explanation(image, torch.zeros(28, 28), p, ["a", "b", "c"]).axes
    assert heat.get_title() == "what speaks for\nb"
    assert [label.get_text() for label in bars.get_yticklabels()] == ["b", "c", "a"]
    assert [bar.get_width() for bar in bars.patches] == pytest.approx([70, 20, 10])
    assert len(picture.images) == 1


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """`plots.ask` shown: what was asked for (path, inverted), what was shown (text, handle), and the widgets."""
    calls, shown, views = [], [], []
    monkeypatch.setattr(plots, "show_png", lambda content, text, handle=None: shown.append((text, handle)) or "first")
    monkeypatch.setattr(plots.widgets, "show", lambda view, text: views.append(view))

    def answer(path, invert):
        if path.suffix == ".txt":
            raise ValueError(f"{path} is not an image, <b>really</b>")
        calls.append((path, invert))
        return small_figure()

    example = tmp_path / "example.png"
    example.write_bytes(b"an image")
    plots.ask(answer, example)
    upload, *_, invert, said = views[0].children
    return calls, shown, upload, invert, said


def upload_file(button: ipywidgets.FileUpload, name: str, content: bytes) -> None:
    file = {"name": name, "type": "image/png", "size": len(content), "content": memoryview(content)}
    button.value = (file | {"last_modified": datetime(2026, 1, 1)},)


def test_ask_shows_the_example_then_what_is_uploaded_in_its_place(asked):
    calls, shown, upload, invert, _ = asked
    assert shown == [("the answer to example.png; loss (nats) against epoch", None)]
    upload_file(upload, "../my shirt.png", b"other")
    assert calls[-1][0].name == "my shirt.png"
    assert calls[-1][0].read_bytes() == b"other"
    assert "tmp" not in shown[-1][0]
    invert.value = True
    assert calls[-1][1] is True
    assert [handle for _, handle in shown] == [None, "first", "first"]
    assert plt.get_fignums() == []


def test_ask_says_what_is_wrong_with_an_image_and_goes_on(asked):
    calls, _, upload, _, said = asked
    upload_file(upload, "notes.txt", b"no image")
    assert said.value == "✘ notes.txt is not an image, &lt;b&gt;really&lt;/b&gt;"
    upload_file(upload, "b.png", b"image")
    assert said.value == ""
    assert len(calls) == 2
