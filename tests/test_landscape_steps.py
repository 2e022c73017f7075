"""The loss along a training step, against closed forms and against PyTorch's own derivatives."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from utils import landscape, probes
from utils.model import CNN, CNNConfig

LENGTHS = (0.05, 0.2, 1.0)


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(12, 1, 8, 8, dtype=torch.float64, generator=generator)
    return images, torch.randint(10, (12,), generator=generator)


def network(norm: str = "batch", **options) -> CNN:
    torch.manual_seed(1)
    return CNN(CNNConfig(width=2, norm=norm, **options)).double()


class Linear(nn.Linear):
    """Logits of 1×2×2 images: softmax regression."""

    def forward(self, images):
        return super().forward(images.flatten(1))


def softmax_regression(weight: np.ndarray, x: np.ndarray, labels: np.ndarray) -> tuple[float, np.ndarray]:
    """The loss of 3 classes and its gradient (p − y)ᵀ·x / n, by the textbook's formulas."""
    scores = np.exp(x @ weight.T)
    p = scores / scores.sum(1, keepdims=True)
    return -np.log(p[np.arange(len(x)), labels]).mean(), (p - np.eye(3)[labels]).T @ x / len(x)


def test_softmax_regression_has_a_closed_form():
    torch.manual_seed(0)
    images, labels = torch.randn(9, 1, 2, 2).double(), torch.randint(3, (9,))
    model = Linear(4, 3, bias=False).double()
    w, x, y = model.weight.detach().numpy(), images.flatten(1).numpy(), labels.numpy()
    _, g = softmax_regression(w, x, y)
    frame = landscape.along_step(model, images, labels, LENGTHS)
    assert frame["length"].tolist() == [0, *LENGTHS]
    for row in frame.itertuples():
        loss, new = softmax_regression(w - row.length * g, x, y)
        assert row.loss == pytest.approx(loss, rel=1e-9)
        assert row.distance == pytest.approx(row.length * np.linalg.norm(g), rel=1e-9)
        assert row.gradient == pytest.approx(np.linalg.norm(new), rel=1e-9)
        assert row.gradient_change == pytest.approx(np.linalg.norm(new - g), rel=1e-9, abs=1e-12)


def test_gradient_change_of_a_short_step_is_that_of_the_hessian():
    torch.manual_seed(0)
    images, labels = torch.randn(9, 1, 2, 2).double(), torch.randint(3, (9,))
    model = Linear(4, 3, bias=False).double()
    x, weight = images.flatten(1), model.weight.detach()
    h = torch.autograd.functional.hessian(lambda w: F.cross_entropy(x @ w.view(3, 4).T, labels), weight.flatten())
    g = torch.from_numpy(softmax_regression(weight.numpy(), x.numpy(), labels.numpy())[1]).flatten()
    row = landscape.along_step(model, images, labels, [1e-5]).iloc[1]
    assert row["gradient_change"] / row["distance"] == pytest.approx(float((h @ g).norm() / g.norm()), rel=1e-4)


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_network_against_functional_gradients(norm, batch):
    model = network(norm)
    images, labels = batch
    weights = {name: weight.detach().clone().requires_grad_() for name, weight in model.named_parameters()}

    def loss_at(point):
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        return F.cross_entropy(functional_call(model, (point, buffers), (images,)), labels)

    g = torch.autograd.grad(loss_at(weights), list(weights.values()))
    frame = landscape.along_step(model, images, labels, LENGTHS)
    for row in frame.itertuples():
        point = {name: (w - row.length * part).detach() for (name, w), part in zip(weights.items(), g, strict=True)}
        point = {name: w.requires_grad_() for name, w in point.items()}
        value = loss_at(point)
        new = torch.autograd.grad(value, list(point.values()))
        change = torch.cat([(a - b).flatten() for a, b in zip(new, g, strict=True)]).norm().item()
        assert row.loss == pytest.approx(value.item(), rel=1e-9)
        assert row.gradient == pytest.approx(torch.cat([part.flatten() for part in new]).norm().item(), rel=1e-9)
        assert row.gradient_change == pytest.approx(change, rel=1e-9, abs=1e-12)


def test_a_short_step_lowers_the_loss_by_length_times_squared_gradient(batch):
    rows = landscape.along_step(network(), *batch, [1e-7])
    assert (rows["loss"][0] - rows["loss"][1]) / 1e-7 == pytest.approx(rows["gradient"][0] ** 2, rel=1e-3)


def test_model_and_gradients_stay_as_they_are(batch):
    model = network().eval()
    model.head.weight.grad = torch.ones_like(model.head.weight)
    before = copy.deepcopy(model.state_dict())
    landscape.along_step(model, *batch, LENGTHS)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.training
    assert torch.equal(model.head.weight.grad, torch.ones_like(model.head.weight))
    assert model.stem.conv.weight.grad is None


def test_dropout_is_off(batch):
    """Else the gradient would change, however short the step."""
    rows = landscape.along_step(network("none", dropout=0.5, dropout_where="everywhere"), *batch, [1e-9])
    assert rows["gradient_change"][1] < 1e-6 * rows["gradient"][0]


def test_frozen_weights_stay_where_they_are(batch):
    model = network()
    model.stem.requires_grad_(False)
    found = landscape.along_step(model, *batch, LENGTHS)
    assert found["gradient"][0] < landscape.along_step(network(), *batch, LENGTHS)["gradient"][0]


def test_probes_of_a_run_do_not_count_these_passes(batch):
    model, (images, labels) = network(), batch
    with probes.Probes(model, every=1) as probe:
        F.cross_entropy(model(images), labels).backward()
        landscape.along_step(model, images, labels, LENGTHS)
    assert probe.step == 1


@pytest.mark.parametrize("lengths", [(), (0.1, 0.0), (-1.0,)])
def test_lengths_that_are_no_step(lengths, batch):
    model = network()
    with pytest.raises(ValueError, match="expected one or more learning rates above 0"):
        landscape.along_step(model, *batch, lengths)
