"""The record's network whitens, makes images smaller for a while, and trains with our loop."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from utils import checkpoint, data, record, train
from utils.data import ImageData, Split
from utils.record import RecordConfig

SMALL = RecordConfig(widths=(8, 16, 16))
RECIPE = replace(record.RECIPE, epochs=2, batch_size=50)


@pytest.fixture
def colours() -> ImageData:
    """400 images of 32×32 pixels: smooth noise, brighter in the channel of their class, of three."""
    torch.manual_seed(0)
    labels = torch.arange(400) % 3
    noise = nn.functional.interpolate(torch.rand(400, 3, 8, 8), (32, 32), mode="bilinear")
    noise[torch.arange(400), labels] += 0.3
    images = (180 * noise).clamp(0, 255).to(torch.uint8)
    few = data.load(progress=False)
    train_part, validation = Split(images[:300], labels[:300]), Split(images[300:], labels[300:])
    return replace(few, train=train_part, validation=validation, class_names=("red", "green", "blue"))


def test_whitening_leaves_patches_uncorrelated_of_variance_one(colours):
    images = data.normalize(colours.train.images, data.channel_stats(colours.train.images))
    filters = record.whitening(images, eps=0.0)
    out = nn.functional.conv2d(images.double(), filters.double())
    rows = out.movedim(1, 3).flatten(0, 2)  # patches × 24
    second_moments = rows.T @ rows / len(rows)
    assert filters.shape == (24, 3, 2, 2)
    assert torch.allclose(second_moments[:12, :12], torch.eye(12, dtype=torch.float64), atol=1e-3)
    assert torch.equal(filters[12:], -filters[:12])


def test_whitening_sees_all_classes_of_sorted_images(colours, monkeypatch):
    monkeypatch.setattr(record, "WHITENED", 60)
    order = colours.train.labels.argsort(stable=True)
    ordered = replace(colours, train=colours.train[order])
    seen = []
    monkeypatch.setattr(record, "whitening", lambda images: seen.append(images) or torch.zeros(24, 3, 2, 2))
    record.network(ordered, SMALL, RECIPE)
    brightest = seen[0].mean((2, 3)).argmax(1)
    assert 60 <= len(seen[0]) < 120
    assert torch.bincount(brightest, minlength=3).min() > 10


def test_first_layer_is_frozen_and_all_else_learns(colours):
    net = record.network(colours, SMALL, RECIPE)
    before = {name: weight.detach().clone() for name, weight in net.named_parameters()}
    train.fit(net, colours, RECIPE, progress=False, optimizer=record.optimizer)
    same = {name for name, weight in net.named_parameters() if torch.equal(weight, before[name])}
    frozen = {name for name, weight in net.named_parameters() if not weight.requires_grad}
    assert same == frozen
    assert "whiten.weight" in frozen
    assert "whiten.bias" not in frozen


@pytest.mark.parametrize("change", [{}, {"muon": False}, {"whiten": False}, {"small": 0}])
def test_it_learns_with_each_idea_and_without(colours, change):
    torch.manual_seed(0)
    net = record.network(colours, replace(SMALL, **change), RECIPE)
    history = train.fit(net, colours, replace(RECIPE, epochs=4), progress=False, optimizer=record.optimizer)
    assert history.last("validation", "accuracy") > 0.6, change


def test_images_are_smaller_for_the_first_steps_of_training_only(colours):
    net = record.network(colours, replace(SMALL, small=16, small_share=0.5), RECIPE)  # 6 of 12 steps
    seen = []
    net.whiten.register_forward_hook(lambda _, inputs, out: seen.append(inputs[0].shape[2]))
    train.fit(net, colours, RECIPE, progress=False, optimizer=record.optimizer)
    assert seen == [16] * 6 + [32] + [32] * 6 + [32]  # after each epoch of six, the validation images as they are


def with_sides(images: ImageData, height: int, width: int) -> ImageData:
    """The images cut to so many pixels, or repeated where they have not so many."""
    cut = [
        Split(split.images.repeat(1, 1, 2, 2)[:, :, :height, :width], split.labels)
        for split in (images.train, images.validation)
    ]
    return replace(images, train=cut[0], validation=cut[1])


@pytest.mark.parametrize(("height", "width", "first"), [(20, 40, (16, 32)), (16, 16, (16, 16)), (12, 12, (12, 12))])
def test_images_are_made_smaller_and_never_larger_nor_squeezed(colours, height, width, first):
    images, seen = with_sides(colours, height, width), []
    net = record.network(images, replace(SMALL, small=16, small_share=1.0), RECIPE)
    net.whiten.register_forward_hook(lambda _, inputs, out: seen.append(tuple(inputs[0].shape[2:])))
    train.fit(net, images, replace(RECIPE, epochs=1), progress=False, optimizer=record.optimizer)
    assert set(seen[:6]) == {first}


def test_images_that_are_too_small_are_named_with_the_remedy(colours):
    with pytest.raises(ValueError, match=r"8×8 pixels: .* takes 9×9 or more; enlarge them \(--size 9\)"):
        record.network(with_sides(colours, 8, 8), SMALL, RECIPE)
    for small in (6, -4):
        with pytest.raises(ValueError, match=f"small={small}: expected at least 9 pixels, or 0"):
            record.network(colours, replace(SMALL, small=small), RECIPE)
    record.network(with_sides(colours, 9, 9), replace(SMALL, small=9), RECIPE)(torch.rand(2, 3, 9, 9))


def test_batches_in_parts_are_small_for_as_many_steps(colours):
    seen, recipe = [], replace(RECIPE, accumulate=5)  # six batches an epoch, in five parts each
    net = record.network(colours, replace(SMALL, small=16, small_share=0.5), recipe)
    net.whiten.register_forward_hook(lambda _, inputs, out: seen.append(inputs[0].shape[2]))
    train.fit(net, colours, recipe, progress=False, optimizer=record.optimizer)
    assert seen.count(16) == 5 * 6
    assert net.bias_steps == 5 * round(12 * SMALL.bias_share)


@pytest.mark.parametrize("change", [{"muon": False}, {"small": 0}, {"whiten": False}])
def test_resume_refuses_another_network_of_the_same_kind(colours, change, tmp_path):
    train.fit(record.network(colours, SMALL, RECIPE), colours, RECIPE, out=tmp_path, progress=False)
    other = record.network(colours, replace(SMALL, **change), RECIPE)
    with pytest.raises(checkpoint.CheckpointError, match=f"network.{next(iter(change))} was"):
        train.fit(other, colours, RECIPE, out=tmp_path, resume=True, progress=False)


def test_it_resumes_at_the_size_it_was_at(colours):
    net = record.network(colours, SMALL, RECIPE)
    net.step += 7
    other = record.network(colours, SMALL, RECIPE)
    other(colours.train.images[:2].float())
    other.load_state_dict(net.state_dict())
    assert other.step.item() == 7
    other.small_steps, seen = 8, []
    other.whiten.register_forward_hook(lambda _, inputs, out: seen.append(inputs[0].shape[2]))
    for _ in range(2):
        other(colours.train.images[:2].float())
    assert seen == [SMALL.small, colours.image_size[0]]
    assert other.counted() == (False, False)  # its biases, too, have had their steps
    assert other.step.item() == 10


@pytest.mark.parametrize(("share", "learns"), [(0.5, [True, False]), (1.0, [True, True])])
def test_biases_of_the_first_layer_learn_for_the_first_steps_only(colours, share, learns):
    torch.manual_seed(0)
    net = record.network(colours, replace(SMALL, bias_share=share), RECIPE)
    seen = [net.whiten.bias.detach().clone()]
    keep = lambda _: seen.append(net.whiten.bias.detach().clone())  # noqa: E731
    train.fit(net, colours, RECIPE, progress=False, optimizer=record.optimizer, on_epoch=keep)
    assert [not torch.equal(*pair) for pair in itertools.pairwise(seen)] == learns


def test_a_first_layer_that_is_learned_learns_to_the_end(colours):
    config = replace(SMALL, whiten=False, bias_share=0.1)
    assert record.network(colours, config, RECIPE).bias_steps == math.inf


def test_trained_networks_have_gradients_at_their_images(colours):
    net = record.network(colours, SMALL, RECIPE)
    net.step += 100
    pixels = torch.rand(2, 3, 32, 32, requires_grad=True)
    net.eval()(pixels).sum().backward()
    assert pixels.grad.abs().sum() > 0


@pytest.mark.parametrize("size", [(15, 15), (7, 7), (15, 8), (8, 15), (8, 8), (17, 17)])
def test_what_pooling_leaves_out_is_not_computed_and_all_else_is_the_same(size):
    torch.manual_seed(0)
    layer = record.conv(4, 6, record.EvenConv2d).double()
    images = torch.randn(3, 4, *size, dtype=torch.float64, requires_grad=True)
    plain = nn.functional.conv2d(images, layer.weight, padding=1)
    out = layer(images)
    sides = size if max(size) > record.LARGE_MAP else [side // 2 * 2 for side in size]
    assert list(out.shape[2:]) == list(sides)
    torch.testing.assert_close(nn.functional.max_pool2d(out, 2), nn.functional.max_pool2d(plain, 2))
    of_both = [nn.functional.max_pool2d(maps, 2).square().sum() for maps in (out, plain)]
    gradients = [torch.autograd.grad(loss, (layer.weight, images)) for loss in of_both]
    torch.testing.assert_close(*gradients)


def test_convolutions_begin_by_handing_on_what_comes_in():
    layer = record.conv(4, 8)
    images = torch.randn(2, 4, 6, 6)
    assert torch.allclose(layer(images)[:, :4], images, atol=1e-6)


def test_every_weight_is_in_one_group(colours):
    net = record.network(colours, SMALL, RECIPE)
    for config in (SMALL, replace(SMALL, muon=False)):
        net.config = config
        groups = record.optimizer(net, RECIPE).param_groups
        ids = [id(weight) for group in groups for weight in group["params"]]
        assert sorted(ids) == sorted(id(weight) for weight in net.parameters() if weight.requires_grad)
        assert any(group["orthogonal"] for group in groups) is config.muon


def test_norms_shift_and_do_not_scale(colours):
    norms = [layer for layer in record.network(colours, SMALL, RECIPE).modules() if isinstance(layer, nn.BatchNorm2d)]
    assert len(norms) == 2 * len(SMALL.widths)
    assert not any(layer.weight.requires_grad for layer in norms)
