"""The frameworks' loops train the course's network, on as many images as they say, and leave nothing behind."""

import builtins
import logging
import warnings

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from utils import data, device, frameworks, train
from utils.model import CNN

BATCH = train.Recipe.batch_size
IMAGES = 2 * BATCH


def loader() -> DataLoader:
    """Noise in a DataLoader as tutorials build it, with a rest that makes no whole batch."""
    labels = torch.arange(IMAGES + 100) % 10
    noise = torch.rand(len(labels), 1, 28, 28)
    return DataLoader(TensorDataset(noise, labels), BATCH, shuffle=True, drop_last=True)


LOOPS = {
    "lightning": [
        lambda: frameworks.lightning_speed(loader()),
        lambda: frameworks.lightning_best_speed(IMAGES),
        lambda: frameworks.lightning_best_speed(IMAGES, all_ours=True),
    ],
    "fastai": [
        lambda: frameworks.fastai_speed(loader()),
        lambda: frameworks.fastai_best_speed(IMAGES),
        lambda: frameworks.fastai_best_speed(IMAGES, all_ours=True),
    ],
}


class Watched(CNN):
    """The network, with its first weights and the sizes of the batches that it was trained on."""

    made: list["Watched"]

    def __init__(self, *options: object) -> None:
        super().__init__(*options)
        self.before = self.head.weight.detach().clone()
        self.batches: list[int] = []
        self.made.append(self)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.batches += [len(images)] if self.training else []
        return super().forward(images)


@pytest.mark.parametrize("best", [0, 1, 2], ids=["tutorial", "best", "all ours"])
@pytest.mark.parametrize("framework", LOOPS)
def test_network_is_trained_on_all_images_in_silence(framework, best, monkeypatch, tmp_path, capfd):
    with warnings.catch_warnings(action="ignore"):
        pytest.importorskip(framework)
    monkeypatch.setattr(Watched, "made", [], raising=False)
    monkeypatch.setattr(frameworks, "CNN", Watched)
    monkeypatch.chdir(tmp_path)
    level = logging.getLogger("lightning.pytorch").level
    speed = LOOPS[framework][best]()
    (network,) = Watched.made
    assert 1 < speed < 1e7
    assert network.batches == [BATCH] * (IMAGES // BATCH)
    assert torch.isfinite(network.head.weight).all()
    assert not torch.equal(network.head.weight.cpu(), network.before)
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("lightning.pytorch").level == level
    assert list(tmp_path.iterdir()) == []


def test_images_in_memory_are_those_of_our_own_loop():
    few, recipe, where = data.load().take(IMAGES), train.Recipe(epochs=1), device.pick()
    stats, precision = data.channel_stats(data.load().train.images), device.pick_precision(where)
    images, labels = next(iter(frameworks.in_memory(IMAGES, precision)))
    ours, our_labels = next(iter(train.training_batches(few, stats, recipe, where, precision)))
    assert images.dtype == ours.dtype
    assert images.stride() == ours.stride()
    assert torch.equal(images, ours)
    assert torch.equal(labels, our_labels)


def test_networks_have_the_layers_that_they_should_and_compute_the_same():
    torch.manual_seed(0)
    plain = frameworks.network()
    ours = frameworks.network(all_ours=True)
    ours.load_state_dict(plain.state_dict())
    modules = [{type(module).__module__ for module in model.modules()} for model in (plain, ours)]
    assert "utils.kernels" not in modules[0]
    assert "utils.kernels" in modules[1]
    images = torch.randn(2, 1, 28, 28)
    assert torch.equal(plain(images), ours(images))


def test_a_loop_that_leaves_out_images_has_no_speed_and_the_first_step_is_not_counted(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(frameworks.time, "perf_counter", lambda: now[0])
    clock = frameworks.Clock(6, torch.device("cpu"))
    for second in (90, 91, 92):
        with pytest.raises(RuntimeError, match=f"trained on {clock.images} images: expected 6"):
            clock.speed()
        now[0] = second
        clock.count(2)
    assert clock.speed() == 2


@pytest.mark.parametrize("framework", LOOPS)
def test_a_missing_framework_is_named_with_its_remedy(framework, monkeypatch):
    real = builtins.__import__

    def absent(name, *rest):
        if name.split(".")[0] == framework:
            raise ModuleNotFoundError(f"No module named {framework!r}", name=framework)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    for loop in LOOPS[framework]:
        with pytest.raises(
            ModuleNotFoundError, match=f"{framework} is not installed: pip install -r requirements-bench"
        ):
            loop()
