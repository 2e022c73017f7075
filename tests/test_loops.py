"""The loops that are compared do the same work, and are counted right."""

import itertools
from dataclasses import astuple, replace
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from utils import data, device, kernels, loops, record, train
from utils.model import CNN, CNNConfig, Stem, parts


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


def test_usual_loop_trains_on_no_image_that_it_is_judged_by(folder):
    loader = loops.usual_loader(folder, 56_000, train.Recipe(), workers=0)
    seen, own = loader.dataset.dataset.data[loader.dataset.indices], data.load()
    assert torch.equal(seen[:55_000], own.train.images[:, 0])
    assert torch.equal(seen[55_000:], seen[:1_000]), "the first ones again"


def test_any_number_of_training_images_can_be_had():
    more = loops.training_images(60_000)
    assert len(more.train) == 60_000
    assert torch.equal(more.train.images[55_000:], more.train.images[:5_000])
    assert len(more.validation) == 500


def test_speed_is_that_of_all_epochs_together(monkeypatch):
    """Two epochs of as many images, one at 100 and one at 300 images/s: together 150, not 200. A first one warms up."""
    rows = [["run", i, i, "train", "images_per_second", speed, 1.0] for i, speed in enumerate((10.0, 100.0, 300.0))]
    monkeypatch.setattr(train, "fit", lambda *_, **__: train.History(rows, columns=train.History.COLUMNS))
    assert loops.course(1024, epochs=2) == pytest.approx(150)


@pytest.fixture
def watched(monkeypatch):
    """What a loop did: the images of each loss that is learned from, and whether each step changed all weights."""
    did, loss_of = Watched([], []), torch.nn.functional.cross_entropy

    def watched_loss(logits, labels, *args, **options):
        if torch.is_grad_enabled():
            did.images.append(len(labels))
        return loss_of(logits, labels, *args, **options)

    def weights(optimizer):
        return [weight for group in optimizer.param_groups for weight in group["params"]]

    def before(optimizer, *_):
        optimizer.seen = [weight.detach().clone() for weight in weights(optimizer)]

    def after(optimizer, *_):
        pairs = zip(weights(optimizer), optimizer.seen, strict=True)
        did.moved.append(sum(not torch.equal(weight, old) for weight, old in pairs) / len(optimizer.seen))

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", watched_loss)
    hooks = [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]
    yield did
    for hook in hooks:
        hook.remove()


class Watched(NamedTuple):
    images: list[int]
    moved: list[float]  # of the weights, the share that a step changed

    def trained_on(self, *batches: int) -> bool:
        """Whether each of these batches, and no other, was a step that changed nearly all weights."""
        return self.images == list(batches) and len(self.moved) == len(batches) and min(self.moved) > 0.9


SIZE = train.Recipe.batch_size


@pytest.mark.parametrize("loop", [loops.course, loops.probed, loops.wide])
def test_loops_train_on_all_images_after_an_epoch_that_is_not_counted(loop, watched):
    assert 1 < loop(2 * SIZE) < 1e7
    assert watched.trained_on(*[SIZE] * 4)


def test_usual_loop_trains_on_all_images(folder, watched):
    assert 1 < loops.usual(folder, 2 * SIZE, workers=0) < 1e7
    assert watched.trained_on(SIZE, SIZE)


def test_first_step_of_the_usual_loop_is_not_counted(folder, watched, monkeypatch):
    monkeypatch.setattr(loops, "time", SimpleNamespace(perf_counter=itertools.count(1).__next__))
    assert loops.usual(folder, 3 * SIZE, workers=0) == 2 * SIZE, "a second passes from look to look"


def test_record_and_airbench94_train(monkeypatch, watched):
    monkeypatch.setattr(record, "RECIPE", replace(record.RECIPE, batch_size=16))
    monkeypatch.setattr(loops, "AIRBENCH94_BATCH", 16)
    assert 1 < loops.record_run(24, steps=1) < 1e7
    assert 1 < loops.airbench94_run(steps=1) < 1e7
    assert watched.trained_on(16, 16, 16, 16)


def test_all_images_of_a_timed_record_are_small(monkeypatch):
    """Also in the epoch that is timed, which is the second one."""
    seen = []
    forward = record.RecordNet.forward
    monkeypatch.setattr(record, "RECIPE", replace(record.RECIPE, batch_size=16))
    watched = lambda net, images: seen.append((net.training, net.step < net.small_steps)) or forward(net, images)  # noqa: E731
    monkeypatch.setattr(record.RecordNet, "forward", watched)
    loops.record_run(24, steps=1)
    assert [small for training, small in seen if training] == [True, True]


# ---------------------------------------------------------------------------------------------------------- tricks


def test_waterfall_goes_from_the_usual_loop_to_all_tricks_by_one_field_a_step():
    steps = [loops.tricks_up_to(name) for name in loops.WATERFALL]
    assert steps[0] == loops.Tricks()
    for before, after in itertools.pairwise(steps):
        assert sum(a != b for a, b in zip(astuple(before), astuple(after), strict=True)) == 1
    assert all(a != b for a, b in zip(astuple(steps[0]), astuple(steps[-1]), strict=True))


@pytest.mark.parametrize("name", list(loops.WATERFALL)[1:])
def test_all_tricks_but_one(name):
    every = loops.tricks_up_to(list(loops.WATERFALL)[-1])
    gone = {"bf16": ("bf16", "kernels")}.get(name, tuple(loops.WATERFALL[name]))
    assert loops.without(every, name) == replace(every, **{field: getattr(loops.Tricks(), field) for field in gone})


def test_network_without_tricks_is_that_of_textbooks_with_the_same_weights():
    torch.manual_seed(0)
    plain = loops.network_with(loops.Tricks())
    torch.manual_seed(0)
    course = loops.network_with(loops.tricks_up_to("pool before norm"))
    assert all(type(layer).__module__ != kernels.__name__ for layer in plain.modules())
    assert any(type(layer).__module__ == kernels.__name__ for layer in course.modules())
    assert plain.state_dict().keys() == course.state_dict().keys()
    assert all(torch.equal(value, course.state_dict()[name]) for name, value in plain.state_dict().items())
    images = torch.randn(4, 1, 28, 28)
    stem = plain.stem
    expected = stem.pool(torch.relu(stem.norm(stem.conv(images))))
    assert torch.allclose(stem(images), expected)
    assert isinstance(course.stem, Stem)
    assert not isinstance(course.stem, loops.TextbookStem)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """Where torchvision finds the embedded images."""
    path = tmp_path_factory.mktemp("images")
    loops.lay_out_for_torchvision(path)
    return str(path)


def up_to(name: str) -> loops.Tricks:
    """The tricks up to `name`, in fp32 on a CPU that would have to emulate bf16, at a tenth of the speed."""
    tricks = loops.tricks_up_to(name)
    return replace(tricks, bf16=tricks.bf16 and device.cpu_multiplies_bf16())


@pytest.mark.parametrize("name", loops.WATERFALL)
def test_loops_with_tricks_train_on_as_many_images(folder, name, watched):
    tricks = loops.tricks_up_to(name) if name == "bf16" else up_to(name)  # emulated, that once
    assert 1 < loops.with_tricks(tricks, 512, folder) < 1e7
    assert watched.trained_on(*[tricks.batch_size] * (1 + 512 // tricks.batch_size))


def test_a_loop_with_tricks_learns(folder):
    """Ten steps on the same batch: the loss falls."""
    model, batches, step = loops.prepare(replace(loops.Tricks(), in_memory=True, no_item=True), 128, folder)
    pixels, labels = next(iter(batches))
    losses = []
    for _ in range(10):
        losses.append(torch.nn.functional.cross_entropy(model(pixels), labels).item())
        step(pixels, labels)
    assert losses[-1] < 0.7 * losses[0]


def test_seconds_to_an_accuracy_are_those_of_the_steps(folder):
    tricks = up_to("pool before norm")
    seconds, images = loops.seconds_to(0.15, tricks, folder, seed=0)
    assert seconds > 0
    assert images % 1024 == 0
    with pytest.raises(RuntimeError, match="below 100% after 1024 images"):
        loops.seconds_to(1.0, tricks, folder, seed=0, most=1024)


def test_what_is_learned_depends_on_the_seed_and_is_reproducible():
    tricks = replace(loops.tricks_up_to("pool before norm"), bf16=False)
    first, again, other = (loops.learned(tricks, seed, 256, epochs=1) for seed in (0, 0, 1))
    assert 0 <= first <= 1
    assert first == again
    assert first != other


def test_threads_are_given_back():
    before = torch.get_num_threads()
    assert loops.on_threads(2, 512) > 1
    assert torch.get_num_threads() == before


def test_images_of_any_side_can_be_measured():
    assert 1 < loops.of_side(14, 512) < 1e7
