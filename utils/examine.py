"""A trained network examined: what it answers, how sure it is, where it looks, what disturbs it; and its export.

Images are uint8 N×C×H×W as `data.load` has them, `stats` the statistics that the network was trained with; both are
brought to the network's device here. The network is examined in evaluation mode, and left in the mode it was in.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils import data, device, files, train
from utils.data import ChannelStats
from utils.model import CNN, evaluating

BATCH = 500
TOLERANCE = 1e-4  # largest difference of an exported network's logits, as a share of the largest where that is above 1
CORRUPTIONS: dict[str, tuple[float, ...]] = {  # what each severity from 1 on means
    "noise": (0.04, 0.08, 0.12, 0.16, 0.2),  # standard deviation, of pixels from 0 to 1
    "blur": (0.4, 0.6, 0.8, 1.0, 1.5),  # standard deviation of the Gaussian, pixels
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),  # what is left of each pixel's distance from the image's mean
    "rotation": (5.0, 10.0, 15.0, 20.0, 30.0),  # degrees, one way or the other
}


def dtype_of(model: nn.Module) -> torch.dtype:
    """Return the type of the weights of `model`: float64 after a training in fp64."""
    return next(model.parameters()).dtype


# --- what it answers


def probabilities(
    model: nn.Module,
    images: Tensor,
    stats: ChannelStats,
    *,
    flips: bool = False,
    shift: int = 0,
    batch: int = BATCH,
    precision: str = "fp32",
) -> Tensor:
    """Return the N×num_classes probabilities that `model` gives to `images`, in float32, on the CPU.

    Test-time augmentation: with `flips` each image is shown as it is and mirrored, and the two answers are averaged
    (Krizhevsky et al. 2012 average ten crops and flips). With `shift` it is also shown shifted by so many pixels, up
    and to the left, and down and to the right (Jordan 2024); the three views weigh 1/2, 1/4 and 1/4.
    """
    with evaluating(model) as where, torch.inference_mode(), device.autocast(where, precision):
        answers = []
        for part in images.split(batch):
            x = data.normalize(part.to(where), stats, dtype_of(model))
            answers.append(sum(share * answer(model, view, flips) for share, view in views(x, shift)))
    return torch.cat(answers).cpu()


def answer(model: nn.Module, x: Tensor, flips: bool) -> Tensor:
    """Return the probabilities of normalized images, or with `flips` the mean of theirs and their mirror images'."""
    p = model(x).float().softmax(1)
    return (p + model(x.flip(3)).float().softmax(1)) / 2 if flips else p


def views(x: Tensor, shift: int) -> Iterator[tuple[float, Tensor]]:
    """Yield the images N×C×H×W as they are and shifted by `shift` pixels (edges reflected), each with its weight."""
    if not shift:
        yield 1.0, x
        return
    height, width = x.shape[2:]
    padded = F.pad(x, (shift,) * 4, mode="reflect")
    yield 0.5, x
    for begin in (0, 2 * shift):
        yield 0.25, padded[:, :, begin : begin + height, begin : begin + width]


def confusion(predicted: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Return how many images of each true class (row) were taken for each class (column): int64 K×K."""
    return torch.bincount(labels * num_classes + predicted, minlength=num_classes**2).view(num_classes, num_classes)


def confident_mistakes(p: Tensor, labels: Tensor, n: int) -> Tensor:
    """Return the places of the `n` images with a wrong answer of the highest probability, the worst first."""
    confidence, predicted = p.max(1)
    wrong = (predicted != labels).nonzero()[:, 0]
    return wrong[confidence[wrong].argsort(descending=True, stable=True)][:n]


# --- how sure it is


def reliability(p: Tensor, labels: Tensor, bins: int = 15) -> pd.DataFrame:
    """Return a row for each bin of confidence: low, high, n, mean confidence, accuracy (NaN in an empty bin).

    The confidence is the probability of the answer, the largest of N×K `p`. A bin holds those above `low`, up to and
    with `high` (Guo et al. 2017, "On calibration of modern neural networks").
    """
    confidence, predicted = p.double().max(1)
    right = (predicted == labels).double()
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)
    place = torch.bucketize(confidence, edges[1:-1])  # N
    n = torch.bincount(place, minlength=bins)
    means = [torch.bincount(place, values, minlength=bins) / n for values in (confidence, right)]
    columns = (edges[:-1], edges[1:], n, *means)
    names = ("low", "high", "n", "confidence", "accuracy")
    return pd.DataFrame({name: column.numpy() for name, column in zip(names, columns, strict=True)})


def calibration_error(p: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Return the expected calibration error: the mean over the images of |accuracy − confidence| of their bin.

    Of `reliability`'s bins (Naeini et al. 2015; Guo et al. 2017, equation 3). From 0 to 1; 0 is perfect.
    """
    rows = reliability(p, labels, bins)
    return float(((rows["accuracy"] - rows["confidence"]).abs() * rows["n"]).sum() / rows["n"].sum())


def fit_temperature(p: Tensor, labels: Tensor) -> float:
    """Return the temperature T that softmax(log p / T) must have for the smallest cross-entropy (Guo et al. 2017).

    T > 1 makes all answers less sure, T < 1 more; none of them changes. Fit it on images that are not judged with it.
    """
    from scipy.optimize import minimize_scalar

    logits = p.double().clamp_min(1e-30).log()
    found = minimize_scalar(
        lambda log_t: F.cross_entropy(logits / math.exp(log_t), labels).item(), bounds=(-3, 3), method="bounded"
    )
    return math.exp(found.x)


def at_temperature(p: Tensor, temperature: float) -> Tensor:
    """Return the probabilities softmax(log p / T)."""
    return (p.double().clamp_min(1e-30).log() / temperature).softmax(1)


# --- what it has learned, and where it looks


@contextmanager
def watched(parts: Mapping[str, nn.Module], seen: dict[str, Tensor], inputs: bool = False) -> Iterator[None]:
    """Put what comes out of each of `parts` into `seen`, or what goes in, while the block runs."""

    def keep(name: str):
        return lambda _, given, out: seen.__setitem__(name, given[0] if inputs else out)

    hooks = [part.register_forward_hook(keep(name)) for name, part in parts.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def layer_names(model: CNN) -> dict[str, nn.Module]:
    """Return stem and layers by name: "stem", "layer 1" to "layer 4"."""
    return {"stem": model.stem} | {f"layer {number}": layer for number, layer in enumerate(model.layers, start=1)}


def feature_maps(model: CNN, image: Tensor, stats: ChannelStats) -> dict[str, Tensor]:
    """Return what stem and layers of `model` make of one C×H×W image: maps C×H×W by name, on the CPU."""
    seen: dict[str, Tensor] = {}
    with evaluating(model) as where, torch.inference_mode(), watched(layer_names(model), seen):
        model(data.normalize(image[None].to(where), stats, dtype_of(model)))
    return {name: maps[0].float().cpu() for name, maps in seen.items()}


def features(model: CNN, images: Tensor, stats: ChannelStats) -> Tensor:
    """Return the N×C numbers that reach the linear head of `model`: all that it knows about each image."""
    seen: dict[str, Tensor] = {}
    found = []
    with evaluating(model) as where, torch.inference_mode(), watched({"head": model.head}, seen, inputs=True):
        for part in images.split(BATCH):
            model(data.normalize(part.to(where), stats, dtype_of(model)))
            found.append(seen["head"].float().cpu())
    return torch.cat(found)


def principal_components(values: Tensor, k: int = 2) -> tuple[Tensor, Tensor]:
    """Return N×k coordinates along the directions of largest variance of N×C `values`, and each one's share of it.

    Pearson 1901. A direction's largest weight is positive, so that the picture is the same each time.
    """
    centred = values.double() - values.double().mean(0)
    variance, directions = torch.linalg.eigh(centred.T @ centred)  # ascending; C×C, a direction a column
    directions = directions.flip(1)[:, :k]
    signs = directions.gather(0, directions.abs().argmax(0, keepdim=True)).sign()
    return centred @ (directions * signs), (variance.flip(0)[:k] / variance.sum().clamp_min(1e-30))


def neighbour_accuracy(values: Tensor, labels: Tensor) -> float:
    """Return the share of the N×C `values` whose nearest other one has the same label."""
    distances = torch.cdist(values.double(), values.double()).fill_diagonal_(math.inf)
    return (labels[distances.argmin(1)] == labels).double().mean().item()


def grad_cam(
    model: CNN, images: Tensor, stats: ChannelStats, classes: Sequence[int] | Tensor | None = None, layer: int = 3
) -> Tensor:
    """Return where in each image is what speaks for its class: N×H×W from 0 to 1, 1 at its own strongest place.

    Grad-CAM (Selvaraju et al. 2017): the maps behind `layer`, 1 to 4, each weighted with the mean gradient of the
    logit by it, added up, and cut at 0; all 0 where nothing speaks for the class. `classes`: one an image; None: those
    that `model` answers. Raises ValueError for another layer.
    """
    from captum.attr import LayerAttribution, LayerGradCam

    if layer not in range(1, len(model.layers) + 1):
        raise ValueError(f"layer={layer!r}: expected 1 to {len(model.layers)}, one of the network's layers")
    with evaluating(model) as where, torch.enable_grad():
        x = data.normalize(images.to(where), stats, dtype_of(model))
        asked = model(x).argmax(1) if classes is None else torch.as_tensor(classes, device=where)
        maps = LayerGradCam(model, model.layers[layer - 1]).attribute(x, asked, relu_attributions=True)  # N×1×h×w
    heat = LayerAttribution.interpolate(maps.detach(), tuple(images.shape[2:]), "bilinear")[:, 0].cpu()  # N×H×W
    return heat / heat.amax((1, 2), keepdim=True).clamp_min(1e-12)


# --- what disturbs it


def corrupt(images: Tensor, kind: str, severity: int, seed: int = 0) -> Tensor:
    """Return `images` with noise, blur, less contrast, or rotated; `CORRUPTIONS` says what each severity, 1 to 5, does.

    The same images, kind, severity and seed give the same pixels. Noise, Gaussian blur and contrast are among the
    corruptions of Hendrycks & Dietterich 2019. Raises ValueError for another kind or severity.
    """
    if kind not in CORRUPTIONS or severity not in range(1, len(CORRUPTIONS[kind]) + 1):
        raise ValueError(
            f"kind={kind!r}, severity={severity!r}: choose one of {', '.join(CORRUPTIONS)}, and a severity from 1 to 5"
        )
    amount, generator = CORRUPTIONS[kind][severity - 1], torch.Generator().manual_seed(seed)
    change = {"noise": add_noise, "blur": blur, "contrast": lower_contrast, "rotation": rotate}[kind]
    parts = [change(part.float() / 255, amount, generator) for part in images.cpu().split(BATCH)]
    return (torch.cat(parts) * 255).round().clamp(0, 255).to(torch.uint8)


def add_noise(images: Tensor, std: float, generator: torch.Generator) -> Tensor:
    """Add Gaussian noise to each number of float N×C×H×W images."""
    return images + std * torch.randn(images.shape, generator=generator)


def blur(images: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    """Blur float N×C×H×W images with a Gaussian, first along rows, then along columns; borders are reflected."""
    radius = min(math.ceil(3 * sigma), min(images.shape[2:]) - 1)
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
    kernel = kernel / kernel.sum()
    n, channels, height, width = images.shape
    x = F.pad(images, (radius,) * 4, mode="reflect").flatten(0, 1)[:, None]  # (N·C)×1×H'×W'
    return F.conv2d(F.conv2d(x, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1)).view(n, channels, height, width)


def lower_contrast(images: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Draw each pixel of float N×C×H×W images towards the mean brightness of its image; `share` of the way is left."""
    weights = torch.tensor([0.299, 0.587, 0.114] if images.shape[1] == 3 else [1.0])  # ITU-R 601
    mean = torch.einsum("nchw,c->nhw", images, weights).mean((1, 2))[:, None, None, None]
    return mean + share * (images - mean)


def rotate(images: Tensor, degrees: float, generator: torch.Generator) -> Tensor:
    """Rotate each float N×C×H×W image about its middle, to the left or to the right by chance; borders go on."""
    turn = math.radians(degrees) * (2 * torch.randint(2, (len(images),), generator=generator) - 1)  # N, left positive
    height, width = images.shape[2:]
    cos, sin, zero = torch.cos(turn), torch.sin(turn), torch.zeros(len(images))
    # affine_grid's coordinates go from -1 to 1 along either side, whatever its length
    rows = [torch.stack([cos, -sin * height / width, zero], 1), torch.stack([sin * width / height, cos, zero], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


# --- export


class FromPixels(nn.Module):
    """A network that takes pixels: uint8 N×C×H×W images as they are in a file, 0 to 255, to logits N×num_classes."""

    def __init__(self, model: nn.Module, stats: ChannelStats) -> None:
        super().__init__()
        self.model, self.per_image = model, stats.per_image
        for name, values in zip(("scale", "shift"), data.scale_and_shift(stats, torch.uint8), strict=True):
            self.register_buffer(name, values.view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        x = images.float() * self.scale + self.shift
        return self.model(data.standardize(x) if self.per_image else x)


def export_onnx(model: CNN, card: Mapping[str, Any], path: str | Path) -> float:
    """Write `model` to `path` as ONNX: one file that other programs run without PyTorch, and without this course.

    Its input "images" is uint8 N×C×H×W, pixels as they are in an image file, for any N: the normalization is part of
    the graph, where it cannot be forgotten. Its output "logits" is float32 N×num_classes. The names of the classes and
    the rest of the `card` are in the metadata, as JSON.

    Before anything is written, onnxruntime runs it on random images. Returns the largest difference from the logits of
    `model` in fp32; raises ValueError when that is above `TOLERANCE`, OSError when the file cannot be written.
    """
    height, width = card["image_size"]
    shape = (model.config.in_channels, height, width)
    images = torch.randint(256, (8, *shape), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    with evaluating(model), torch.no_grad():
        network = deepcopy(FromPixels(model, train.stats_of(card))).cpu().float().eval()
        content = to_onnx(network, images[:2], card)
        logits = network(images)
        difference = (run_onnx(content, images) - logits).abs().max().item()
    allowed = TOLERANCE * max(1.0, logits.abs().max().item())  # fp32 has so many digits, not so many decimals
    if not difference <= allowed:
        raise ValueError(
            f"the exported network differs from the original by up to {difference:.2g}, expected {allowed:.1g} at "
            "most: nothing was written; try another version of PyTorch, onnxscript or onnxruntime"
        )
    files.write_bytes(path, content)
    return difference


def to_onnx(network: nn.Module, example: Tensor, card: Mapping[str, Any]) -> bytes:
    """Return the content of the ONNX file of `network`, for images like `example`, any number of them."""
    import onnx
    import onnxscript  # noqa: F401 - PyTorch's exporter needs it: where it is missing, that is said here

    exported = torch.onnx.export(
        network,
        (example,),
        dynamo=True,  # PyTorch's default since 2.9, there since 2.5; the older exporter is deprecated
        verbose=False,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("N", min=1)},),
    )
    made = exported.model_proto
    for key, value in card.items():
        made.metadata_props.add(key=key, value=value if isinstance(value, str) else json.dumps(value))
    onnx.checker.check_model(made, full_check=True)
    return made.SerializeToString()


def run_onnx(model: str | Path | bytes, images: Tensor) -> Tensor:
    """Return the logits N×num_classes of an ONNX file, its path or content, for uint8 images: onnxruntime, on the CPU.

    Raises ValueError for a file that cannot be run, or images that do not fit.
    """
    import onnxruntime

    source = model if isinstance(model, bytes) else str(model)
    try:
        session = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
        parts = [session.run(["logits"], {"images": part.numpy()})[0] for part in images.cpu().split(BATCH)]
    except Exception as error:  # onnxruntime's errors have no common class of their own
        name = "the exported network" if isinstance(model, bytes) else model
        raise ValueError(f"cannot run {name} on images {tuple(images.shape)}: {error}") from error
    return torch.cat([torch.from_numpy(part) for part in parts])
