"""The loops that are compared do the same work, and are counted right."""

import pytest
import torch

from utils import loops, train
from utils.model import CNN, CNNConfig, parts


def test_training_takes_three_times_the_forward_flops():
    """But for the gradient of the image, which nobody needs: backward costs two products for each forward one."""
    forward = {name: flops for name, *_, flops, _ in parts(CNN(), 28)}
    assert loops.step_flops(CNN(CNNConfig()), (1, 28, 28)) == 3 * sum(forward.values()) - forward["stem"]


def test_wide_network_has_the_flops_of_its_source():
    """airbench94 says 2.9e14 FLOPs for 8 epochs of 50,000 images: 0.7 GFLOP an image, three times the forward pass."""
    flops = loops.step_flops(loops.wide_network(), loops.WIDE_IMAGE)
    assert pytest.approx(flops, rel=0.1) == 2.9e14 / (8 * 50_000)


def test_peak_is_that_of_a_matrix_product(monkeypatch):
    monkeypatch.setattr(loops, "PEAK_SIDE", 256)
    assert 1e8 < loops.matmul_peak(torch.device("cpu"), "fp32", repeats=2) < 1e16


def test_usual_loop_sees_the_embedded_images(tmp_path):
    """torchvision's own data set, normalized as ours is: one epoch without crops has the mean and std of the split."""
    loops.lay_out_for_torchvision(tmp_path)
    recipe = train.Recipe(crop_padding=0, batch_size=500)
    loader = loops.usual_loader(str(tmp_path), 2000, recipe, workers=0)
    images = torch.cat([images for images, _ in loader])
    assert images.shape == (2000, 1, 28, 28)
    assert images.mean().item() == pytest.approx(0, abs=0.02)
    assert images.std().item() == pytest.approx(1, abs=0.02)


def test_any_number_of_training_images_can_be_had():
    more = loops.training_images(60_000)
    assert len(more.train) == 60_000
    assert torch.equal(more.train.images[55_000:], more.train.images[:5_000])
    assert len(more.validation) == 500


def test_speed_is_that_of_all_epochs_together(monkeypatch):
    """Two epochs of as many images, one at 100 and one at 300 images/s: together 150, not 200."""
    rows = [["run", i, i, "train", "images_per_second", speed, 1.0] for i, speed in enumerate((100.0, 300.0))]
    monkeypatch.setattr(train, "fit", lambda *_, **__: train.History(rows, columns=train.History.COLUMNS))
    assert loops.course(1024, epochs=2) == pytest.approx(150)


@pytest.mark.parametrize("loop", [loops.course, loops.probed])
def test_loops_train(loop):
    assert 1 < loop(train.Recipe.batch_size) < 1e7


def test_wide_loop_trains():
    assert 1 < loops.wide(train.Recipe.batch_size) < 1e7
