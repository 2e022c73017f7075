"""What `examine` says of a trained network, against torchmetrics, torchvision, NumPy, and hand-made cases."""

import json
import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from utils import checkpoint, data, examine, train
from utils.model import CNN, CNNConfig

STATS = data.ChannelStats((0.3,), (0.25,), 0)
COLOUR_STATS = data.ChannelStats((0.4, 0.5, 0.6), (0.2, 0.25, 0.3), 0)


def network(channels: int = 1, classes: int = 10, **fields) -> CNN:
    """A small network with random weights and batch-norm statistics of random images."""
    torch.manual_seed(0)
    model = CNN(CNNConfig(in_channels=channels, num_classes=classes, width=4, **fields))
    with torch.no_grad():
        for _ in range(3):
            model.train()(torch.randn(64, channels, 28, 28))
    return model.eval()


def pictures(n: int = 6, channels: int = 1, height: int = 28, width: int = 28) -> torch.Tensor:
    """Smooth random images, uint8 N×C×H×W."""
    coarse = torch.rand(n, channels, 5, 5, generator=torch.Generator().manual_seed(1))
    return (255 * F.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)).to(torch.uint8)


def answers(n: int = 4000, classes: int = 10, sharpness: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random probabilities N×K, and labels drawn from them: perfectly calibrated."""
    generator = torch.Generator().manual_seed(2)
    p = (sharpness * torch.randn(n, classes, generator=generator, dtype=torch.float64)).softmax(1)
    return p, torch.multinomial(p, 1, generator=generator)[:, 0]


# ---------------------------------------------------------------------------------------------------- what it answers


def test_probabilities_are_those_of_the_network_on_normalized_images():
    model, images = network(), pictures(7)
    expected = model(data.normalize(images, STATS)).softmax(1).detach()
    torch.testing.assert_close(examine.probabilities(model, images, STATS, batch=3), expected)


def test_a_network_in_double_precision_is_examined_and_stays_one(tmp_path):
    model, images = network(), pictures(3)
    expected = examine.probabilities(model, images, STATS)
    model = model.double()
    assert torch.allclose(examine.probabilities(model, images, STATS).float(), expected, atol=1e-5)
    assert examine.features(model, images, STATS).shape[0] == 3
    assert examine.feature_maps(model, images[0], STATS)
    assert examine.grad_cam(model, images, STATS).isfinite().all()
    train.evaluate(model, data.Split(images, torch.zeros(3, dtype=torch.int64)), STATS, device="cpu")
    assert examine.export_onnx(model, card_of(STATS), tmp_path / "model.onnx") <= 1e-4
    assert next(model.parameters()).dtype == torch.float64


def test_shifted_views_weigh_a_half_a_quarter_and_a_quarter():
    model, images = network(), pictures()
    height, width = images.shape[2:]
    x = torch.nn.functional.pad(data.normalize(images, STATS), (1, 1, 1, 1), mode="reflect")
    with torch.no_grad():
        p = [model(x[:, :, at : at + height, at : at + width]).softmax(1) for at in (1, 0, 2)]
    torch.testing.assert_close(examine.probabilities(model, images, STATS, shift=1), p[0] / 2 + p[1] / 4 + p[2] / 4)


def test_flips_average_an_image_and_its_mirror_image():
    model, images = network(), pictures()
    both = [examine.probabilities(model, x, STATS) for x in (images, images.flip(3))]
    assert (both[0] - both[1]).abs().max() > 1e-3
    found = examine.probabilities(model, images, STATS, flips=True)
    torch.testing.assert_close(found, (both[0] + both[1]) / 2)
    torch.testing.assert_close(examine.probabilities(model, images.flip(3), STATS, flips=True), found)


@pytest.mark.parametrize("training", [True, False])
def test_examining_leaves_the_network_as_it_was(training):
    model, images = network(dropout=0.5, dropout_where="everywhere"), pictures()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train(training)
    first, second = (examine.probabilities(model, images, STATS) for _ in range(2))
    assert torch.equal(first, second)  # no dropout
    examine.features(model, images, STATS)
    examine.feature_maps(model, images[0], STATS)
    examine.grad_cam(model, images, STATS)
    assert model.training is training
    assert all(weight.grad is None for weight in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


def test_confusion_counts_as_torchmetrics_does():
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    generator = torch.Generator().manual_seed(0)
    predicted, labels = torch.randint(5, (2, 300), generator=generator)
    expected = multiclass_confusion_matrix(predicted, labels, 5)
    assert torch.equal(examine.confusion(predicted, labels, 5), expected)
    assert examine.confusion(torch.tensor([1]), torch.tensor([0]), 3).tolist() == [[0, 1, 0], [0, 0, 0], [0, 0, 0]]


def test_confident_mistakes_come_worst_first():
    p = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.3, 0.7]])
    assert examine.confident_mistakes(p, torch.tensor([0, 0, 1, 0]), 2).tolist() == [1, 3]
    assert examine.confident_mistakes(p, torch.tensor([0, 1, 0, 1]), 2).tolist() == []


# ------------------------------------------------------------------------------------------------------ how sure it is


@pytest.mark.parametrize("bins", [1, 5, 15])
def test_calibration_error_is_that_of_torchmetrics(bins):
    from torchmetrics.functional.classification import multiclass_calibration_error

    p, labels = answers()
    p = examine.at_temperature(p, 0.6)  # too sure
    expected = multiclass_calibration_error(p, labels, 10, n_bins=bins, norm="l1").item()
    assert expected > 0.05
    assert examine.calibration_error(p, labels, bins) == pytest.approx(expected, abs=1e-6)


def test_reliability_counts_by_hand():
    p = torch.tensor([[0.625, 0.375], [0.75, 0.25], [0.0625, 0.9375], [0.0, 1.0]])
    labels = torch.tensor([0, 1, 1, 0])
    rows = examine.reliability(p, labels, bins=4)
    assert rows["n"].tolist() == [0, 0, 2, 2]  # 0.75 belongs to the bin that ends with it, and 1 to the last one
    assert rows["accuracy"].tolist()[2:] == [0.5, 0.5]
    assert rows["confidence"].tolist()[2:] == [0.6875, 0.96875]
    assert rows["accuracy"].isna().tolist() == [True, True, False, False]
    assert examine.calibration_error(p, labels, bins=4) == 0.5 * 0.1875 + 0.5 * 0.46875


def test_answers_that_are_as_often_right_as_they_are_sure_are_calibrated():
    p, labels = answers(40_000)
    assert examine.calibration_error(p, labels) < 0.015
    assert examine.calibration_error(examine.at_temperature(p, 0.5), labels) > 0.08


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
def test_temperature_is_found_again(temperature):
    p, labels = answers(20_000)
    spoiled = examine.at_temperature(p, 1 / temperature)  # logits × temperature
    assert examine.fit_temperature(spoiled, labels) == pytest.approx(temperature, rel=0.03)
    torch.testing.assert_close(examine.at_temperature(spoiled, temperature), p)


def test_probabilities_of_zero_have_a_temperature():
    p = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    labels = torch.tensor([0, 1, 0, 1])
    assert examine.fit_temperature(p, labels) > 5
    assert torch.isfinite(examine.at_temperature(p, 2.0)).all()


# ----------------------------------------------------------------------------------------- what it has learned, where


def test_features_are_what_the_head_gets():
    model, images = network(), pictures()
    x = data.normalize(images, STATS)
    found = examine.features(model, images, STATS)
    assert found.shape == (6, 32)
    torch.testing.assert_close(model.head(found), model(x))


def test_feature_maps_are_those_of_stem_and_layers():
    model, image = network(), pictures()[0]
    maps = examine.feature_maps(model, image, STATS)
    assert {name: tuple(x.shape) for name, x in maps.items()} == {
        "stem": (4, 14, 14),
        "layer 1": (4, 14, 14),
        "layer 2": (8, 7, 7),
        "layer 3": (16, 4, 4),
        "layer 4": (32, 2, 2),
    }
    torch.testing.assert_close(model.head(maps["layer 4"].mean((1, 2))), model(data.normalize(image[None], STATS))[0])


def test_principal_components_are_those_of_numpy():
    values = torch.randn(200, 6, generator=torch.Generator().manual_seed(3)) * torch.tensor([5.0, 3, 1, 1, 0.5, 0.1])
    coordinates, shares = examine.principal_components(values, 2)
    centred = values.numpy() - values.numpy().mean(0)
    left, singular, _ = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(coordinates.abs().numpy(), abs(left[:, :2] * singular[:2]), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(shares.numpy(), (singular**2 / (singular**2).sum())[:2], rtol=1e-4)
    same, _ = examine.principal_components(-values, 2)
    np.testing.assert_allclose(same.numpy(), -coordinates.numpy(), atol=1e-6)  # the directions do not turn round


def test_neighbour_accuracy_counts_by_hand():
    values = torch.tensor([[0.0], [1.0], [10.0], [12.0], [13.0]])
    assert examine.neighbour_accuracy(values, torch.tensor([0, 0, 1, 1, 1])) == 1.0
    assert examine.neighbour_accuracy(values, torch.tensor([0, 1, 1, 1, 0])) == 0.2  # that at 10, by the one at 12


@pytest.mark.parametrize("layer", [1, 2, 3, 4])
def test_grad_cam_is_the_formula(layer):
    """Selvaraju et al. 2017, equations 1 and 2, with torch.autograd and no hooks."""
    model, images = network(), pictures()
    x = model.stem(data.normalize(images, STATS))
    for part in model.layers[:layer]:
        x = part(x)
    maps = x.detach().requires_grad_()
    out = maps
    for part in model.layers[layer:]:
        out = part(out)
    logits = model.head(out.mean((2, 3)))
    classes = torch.tensor([3, 1, 4, 1, 5, 9])
    gradients = torch.autograd.grad(logits.gather(1, classes[:, None]).sum(), maps)[0]
    weighted = (gradients.mean((2, 3), keepdim=True) * maps).sum(1, keepdim=True).relu()
    expected = F.interpolate(weighted, (28, 28), mode="bilinear")[:, 0].detach()
    expected = expected / expected.amax((1, 2), keepdim=True).clamp_min(1e-12)
    torch.testing.assert_close(examine.grad_cam(model, images, STATS, classes, layer), expected, atol=1e-5, rtol=1e-4)
    assert expected.amax() == 1


def test_grad_cam_is_of_the_answer_unless_a_class_is_asked_for():
    model, images = network(), pictures()
    answered = examine.probabilities(model, images, STATS).argmax(1)
    torch.testing.assert_close(
        examine.grad_cam(model, images, STATS), examine.grad_cam(model, images, STATS, answered.tolist())
    )


def test_grad_cam_finds_the_half_that_matters():
    """A network that only adds up the left half of the image: nothing speaks from the right."""

    class LeftHalf(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Conv2d(1, 1, 1, bias=False)])
            self.layers[0].weight.data.fill_(1.0)

        def forward(self, images):
            x = self.layers[0](images)
            left = x[..., : x.shape[3] // 2]
            return torch.stack([left.sum((1, 2, 3)), -left.sum((1, 2, 3))], 1)

    images = torch.full((1, 1, 8, 8), 200, dtype=torch.uint8)
    images[..., 4:] = 0  # darker than the mean: below 0 once it is normalized
    heat = examine.grad_cam(LeftHalf(), images, STATS, [0], layer=1)[0]
    assert heat[:, :4].min() == 1
    assert heat[:, 4:].max() == 0
    assert examine.grad_cam(LeftHalf(), images, STATS, [1], layer=1).max() <= 1


def test_grad_cam_refuses_a_layer_that_there_is_not():
    with pytest.raises(ValueError, match="layer=5: expected 1 to 4"):
        examine.grad_cam(network(), pictures(), STATS, layer=5)


# --------------------------------------------------------------------------------------------------- what disturbs it


@pytest.mark.parametrize("kind", examine.CORRUPTIONS)
@pytest.mark.parametrize("channels", [1, 3])
def test_corruptions_are_the_same_each_time_and_worse_with_severity(kind, channels):
    images = pictures(20, channels)
    images[0, :, 4:9, 10:12] = 255
    moved = []
    for severity in range(1, 6):
        found = examine.corrupt(images, kind, severity, seed=1)
        assert found.dtype == torch.uint8
        assert found.shape == images.shape
        assert torch.equal(found, examine.corrupt(images, kind, severity, seed=1))
        moved.append((found.float() - images.float()).square().mean().item())
    assert moved == sorted(moved)
    assert moved[0] > 0
    differ = not torch.equal(examine.corrupt(images, kind, 3, seed=2), examine.corrupt(images, kind, 3, seed=1))
    assert differ == (kind in ("noise", "rotation"))


def test_noise_has_the_standard_deviation_that_it_says():
    grey = torch.full((50, 1, 28, 28), 128, dtype=torch.uint8)
    for severity, std in enumerate(examine.CORRUPTIONS["noise"], start=1):
        found = examine.corrupt(grey, "noise", severity).float() / 255
        assert found.std().item() == pytest.approx(std, rel=0.03)
        assert found.mean().item() == pytest.approx(128 / 255, abs=0.01)


@pytest.mark.parametrize("severity", [1, 3, 5])
@pytest.mark.parametrize("channels", [1, 3])
def test_blur_is_that_of_torchvision(severity, channels):
    from torchvision.transforms.v2.functional import gaussian_blur

    images, sigma = pictures(4, channels), examine.CORRUPTIONS["blur"][severity - 1]
    side = 2 * math.ceil(3 * sigma) + 1
    expected = gaussian_blur(images.float() / 255, [side, side], [sigma, sigma])
    found = examine.blur(images.float() / 255, sigma, torch.Generator())
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("channels", [1, 3])
def test_contrast_is_that_of_torchvision(channels):
    from torchvision.transforms.v2.functional import adjust_contrast

    images = pictures(4, channels).float() / 255
    found = examine.lower_contrast(images, 0.4, torch.Generator())
    expected = torch.stack([adjust_contrast(image, 0.4) for image in images])
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)  # its weights have four digits


@pytest.mark.parametrize(("height", "width"), [(28, 28), (24, 40)])
def test_rotation_is_that_of_torchvision_up_to_the_borders(height, width):
    from torchvision.transforms.v2.functional import InterpolationMode, rotate

    images = pictures(30, 1, height, width).float() / 255
    found = examine.rotate(images, 20.0, torch.Generator().manual_seed(0))
    ways = [rotate(images, angle, interpolation=InterpolationMode.BILINEAR)[..., 8:-8, 8:-8] for angle in (20.0, -20.0)]
    errors = torch.stack([(found[..., 8:-8, 8:-8] - way).abs().amax((1, 2, 3)) for way in ways])  # 2×N
    assert errors.min(0).values.max() < 1e-4
    assert 5 < (errors[0] < errors[1]).sum() < 25  # some to the left, some to the right


@pytest.mark.parametrize(("kind", "severity"), [("fog", 1), ("noise", 0), ("noise", 6)])
def test_corrupt_says_what_there_is(kind, severity):
    with pytest.raises(ValueError, match=f"kind='{kind}', severity={severity}: choose one of noise, blur"):
        examine.corrupt(pictures(), kind, severity)


# ------------------------------------------------------------------------------------------------------------- export


def card_of(stats: data.ChannelStats) -> dict:
    names = {"data": "clothes", "class_names": ["a", "b"], "image_size": [28, 28]}
    return names | {"mean": list(stats.mean), "std": list(stats.std), "per_image": stats.per_image}


@pytest.fixture(scope="module", params=[1, 3], ids=["grey", "colour"])
def exported(request, tmp_path_factory):
    """A network, the images it takes, its statistics, and its ONNX file."""
    model, path = network(channels=request.param), tmp_path_factory.mktemp("onnx") / "a model.onnx"
    stats = STATS if request.param == 1 else COLOUR_STATS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert examine.export_onnx(model, card_of(stats), path) <= 1e-4
    return model, pictures(9, request.param), stats, path


def test_onnx_file_says_what_the_network_says(exported):
    """For pixels as they are, any number of them, to 1e-4."""
    model, images, stats, path = exported
    expected = model(data.normalize(images, stats)).detach()
    for part in (slice(0, 1), slice(0, 9), slice(2, 5)):
        torch.testing.assert_close(examine.run_onnx(path, images[part]), expected[part], atol=1e-4, rtol=0)
    assert expected.std() > 0.01


def test_large_logits_are_compared_by_their_size(tmp_path):
    model = network()
    with torch.no_grad():
        model.head.weight *= 1e5
    examine.export_onnx(model, card_of(STATS), tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").exists()


def test_onnx_file_stands_alone_and_knows_its_classes(exported):
    import onnx

    made = onnx.load(exported[3])
    metadata = {entry.key: entry.value for entry in made.metadata_props}
    assert json.loads(metadata["class_names"]) == ["a", "b"]
    assert metadata["data"] == "clothes"
    assert [path.name for path in exported[3].parent.iterdir()] == ["a model.onnx"]


@pytest.mark.parametrize("kind", ["data set", *data.INPUT_NORMS])
def test_what_is_exported_normalizes_as_the_loader_does(kind):
    images = pictures(channels=3)
    stats = data.input_stats(images, kind)
    found = examine.FromPixels(nn.Identity(), stats)(images)
    torch.testing.assert_close(found, data.normalize(images, stats), atol=1e-5, rtol=1e-5)


def test_an_export_that_differs_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(examine, "to_onnx", lambda *_: b"")
    monkeypatch.setattr(examine, "run_onnx", lambda _, images: torch.zeros(len(images), 10))
    with pytest.raises(ValueError, match="differs from the original by up to .*, expected 0.0002 at most: nothing was"):
        examine.export_onnx(network(), card_of(STATS), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_run_onnx_says_what_is_wrong(exported, tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    with pytest.raises(ValueError, match="cannot run .*bad.onnx"):
        examine.run_onnx(tmp_path / "bad.onnx", pictures())
    with pytest.raises(ValueError, match="cannot run .*a model.onnx"):
        examine.run_onnx(exported[3], pictures().float())


# ------------------------------------------------------------------------------------------- on a folder of any images


def test_everything_runs_on_a_small_folder_of_colour_images(tmp_path):
    """What lesson 6 does, on 36 pictures of three classes, 24 pixels wide and 20 high."""
    for label, name in enumerate(("sky", "grass", "brick")):
        folder = tmp_path / "pictures" / name
        folder.mkdir(parents=True)
        for number, image in enumerate(pictures(12, 3, 20, 24)):
            image[2 - label] = 255  # blue, green, red
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{number}.png")
    images = data.load(tmp_path / "pictures", progress=False)
    stats, looked_at = data.channel_stats(images.train.images), images.validation
    model = CNN(CNNConfig(in_channels=images.in_channels, num_classes=images.num_classes, width=4))
    recipe = train.Recipe(epochs=3, batch_size=9, lr=0.1)
    history = train.fit(model, images, recipe, device="cpu", precision="fp32", progress=False)
    card = train.card(images, stats, 3, history.last("validation", "accuracy"))
    checkpoint.save_model(tmp_path / "run", model, card)
    model, card = checkpoint.load_model(tmp_path / "run")
    assert train.stats_of(card) == replace(stats, count=0)

    p = examine.probabilities(model, looked_at.images, stats, flips=True)
    assert p.shape == (len(looked_at), 3)
    assert examine.confusion(p.argmax(1), looked_at.labels, 3).sum() == len(looked_at)
    assert 0 <= examine.calibration_error(p, looked_at.labels) <= 1
    assert examine.grad_cam(model, looked_at.images, stats).shape == (len(looked_at), 20, 24)
    assert examine.feature_maps(model, looked_at.images[0], stats)["stem"].shape == (4, 10, 12)
    points, _ = examine.principal_components(examine.features(model, looked_at.images, stats))
    assert points.shape == (len(looked_at), 2)
    for kind in examine.CORRUPTIONS:
        assert examine.corrupt(looked_at.images, kind, 5).shape == looked_at.images.shape

    examine.export_onnx(model, card, tmp_path / "model.onnx")
    logits = examine.run_onnx(tmp_path / "model.onnx", looked_at.images)
    torch.testing.assert_close(logits, model(data.normalize(looked_at.images, stats)).detach(), atol=1e-4, rtol=0)
