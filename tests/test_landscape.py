"""The loss surface: second derivatives against torch's own and known spectra, slices against the loss itself."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from utils import landscape
from utils.model import CNN, CNNConfig

SPECTRUM = [50.0, 8.0, 3.0, 1.0, 0.5, 0.2, 0.1, 0.05, 0.01, -4.0]


@pytest.fixture
def network() -> nn.Module:
    """A small smooth network with batch norm and dropout, whose loss has second derivatives everywhere."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Tanh(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(8, 3)]
    return nn.Sequential(*layers).double().eval()


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(12, 1, 4, 4, generator=generator, dtype=torch.float64), torch.arange(12) % 3


@pytest.fixture
def quadratic() -> torch.Tensor:
    """A symmetric matrix of the eigenvalues in SPECTRUM."""
    generator = torch.Generator().manual_seed(0)
    vectors, _ = torch.linalg.qr(torch.randn(10, 10, generator=generator, dtype=torch.float64))
    return vectors @ torch.diag(torch.tensor(SPECTRUM, dtype=torch.float64)) @ vectors.T


def by_torch(network: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The Hessian of the training loss without dropout, by torch.autograd.functional."""
    network = nn.Sequential(*[layer for layer in network if not isinstance(layer, nn.Dropout)]).train()
    named = dict(network.named_parameters())
    sizes = [weight.numel() for weight in named.values()]

    def loss(vector: torch.Tensor) -> torch.Tensor:
        parts = zip(named, vector.split(sizes), strict=True)
        return F.cross_entropy(
            functional_call(network, {name: part.view_as(named[name]) for name, part in parts}, (images,)), labels
        )

    start = torch.cat([weight.detach().flatten() for weight in named.values()])
    return torch.autograd.functional.hessian(loss, start)


def whole(matrix) -> np.ndarray:
    return matrix @ np.eye(matrix.shape[0])


# ------------------------------------------------------------------------------------------------ second derivatives


def test_hessian_is_that_of_torch(network, batch):
    images, labels = batch
    copy = landscape.prepared(network, images)
    ours = whole(landscape.hessian(F.cross_entropy(copy(images), labels), list(copy.parameters())))
    expected = by_torch(network, images, labels).numpy()
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(ours, expected, atol=1e-10)


def test_top_eigenpairs_are_those_of_numpy(network, batch):
    expected = np.linalg.eigvalsh(by_torch(network, *batch).numpy())[::-1]
    values, vectors = landscape.top_eigenpairs(network, *batch, k=3, tolerance=1e-8)
    np.testing.assert_allclose(values.numpy(), expected[:3], rtol=1e-6)
    assert vectors.shape == (3, len(expected))
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(3, dtype=torch.float64))


def test_a_rough_tolerance_and_single_precision_are_near(batch):
    torch.manual_seed(0)
    model, images = CNN(CNNConfig(width=4)), torch.randn(16, 1, 8, 8)
    labels = torch.arange(16) % 10
    exact, _ = landscape.top_eigenpairs(model, images.double(), labels, tolerance=1e-8)
    rough, _ = landscape.top_eigenpairs(model, images, labels, tolerance=1e-2)
    torch.testing.assert_close(rough, exact, rtol=1e-2, atol=0.0)


def test_largest_eigenvalue_is_the_most_positive_one(quadratic: torch.Tensor):
    """Not the largest in size: a steep descent is no limit to the learning rate."""
    weights = [torch.zeros(4, dtype=torch.float64, requires_grad=True), torch.zeros(2, 3, dtype=torch.float64)]
    weights[1].requires_grad_()

    def loss(sign: float) -> torch.Tensor:
        w = landscape.flat(weights)
        return sign * w @ quadratic @ w / 2

    np.testing.assert_allclose(whole(landscape.hessian(loss(1.0), weights)), quadratic.numpy(), atol=1e-12)
    [top] = landscape.eigsh(landscape.hessian(loss(-1.0), weights), 1, which="LA", return_eigenvectors=False)
    assert top == pytest.approx(4.0)


def test_the_model_stays_as_it_is(network, batch):
    before = {name: value.clone() for name, value in network.state_dict().items()}
    first, _ = landscape.top_eigenpairs(network, *batch)
    again, _ = landscape.top_eigenpairs(network, *batch)
    assert first == again, "dropout is off, and Lanczos begins at the same vector"
    assert not network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(weight.grad is None for weight in network.parameters())


def test_half_precision_is_refused(network, batch):
    images, labels = batch
    with pytest.raises(ValueError, match="bfloat16: expected float32 or float64"):
        landscape.top_eigenpairs(network, images.bfloat16(), labels)


def test_linear_filter_has_the_second_moments_of_its_patches(batch):
    """Of ½ E (w·p + b − t)² by w and b, the Hessian is E p pᵀ, with a 1 behind each patch p."""
    images, _ = batch
    torch.manual_seed(0)
    convolution = nn.Conv2d(1, 1, 3, padding=1).double()
    loss = ((convolution(images) - torch.randn_like(images)) ** 2).mean() / 2
    patches = F.unfold(images, 3, padding=1).transpose(1, 2).reshape(-1, 9)
    patches = torch.cat([patches, torch.ones(len(patches), 1)], dim=1)
    ours = whole(landscape.hessian(loss, list(convolution.parameters())))
    np.testing.assert_allclose(ours, (patches.T @ patches / len(patches)).numpy(), atol=1e-12)


@pytest.mark.parametrize(("share", "grows"), [(0.99, False), (1.01, True)])
def test_gradient_descent_is_stable_up_to_two_over_the_top_eigenvalue(share, grows):
    torch.manual_seed(0)
    inputs, targets = torch.randn(50, 6, dtype=torch.float64), torch.randn(50, 1, dtype=torch.float64)
    layer = nn.Linear(6, 1).double()

    def loss() -> torch.Tensor:
        return ((layer(inputs) - targets) ** 2).mean() / 2

    top = np.linalg.eigvalsh(whole(landscape.hessian(loss(), list(layer.parameters()))))[-1]
    optimizer, losses = torch.optim.SGD(layer.parameters(), lr=share * 2 / top), []
    for _ in range(600):
        optimizer.zero_grad()
        losses.append(loss())
        losses[-1].backward()
        optimizer.step()
    assert (losses[-1] > 10 * losses[0]) == grows
    assert (losses[-1] < losses[0]) != grows


# ------------------------------------------------------------------------------------------------------------- slices


def test_slice_is_the_loss_of_moved_weights(network, batch):
    images, labels = batch
    across = {"0.weight": torch.randn(2, 1, 3, 3), "0.bias": torch.ones(2)}
    up = {"5.bias": torch.tensor([1.0, 0.0, -1.0])}
    x, y = np.array([-1.0, 0.0, 2.0]), np.array([0.0, 0.5])
    losses = landscape.loss_slice(network, images, labels, across, up, x, y)
    assert losses.shape == (2, 3)

    network[4].p = 0.0  # no dropout
    network.train()
    assert losses[0, 1] == pytest.approx(F.cross_entropy(network(images), labels).item())
    with torch.no_grad():
        network[0].weight += 2 * across["0.weight"]
        network[0].bias += 2
        network[5].bias += 0.5 * up["5.bias"]
    assert losses[1, 2] == pytest.approx(F.cross_entropy(network(images), labels).item())


def test_slice_leaves_the_model_as_it_is(network, batch):
    before = {name: value.clone() for name, value in network.state_dict().items()}
    move = {"0.bias": torch.ones(2)}
    landscape.loss_slice(network, *batch, move, move, np.ones(1), np.ones(1))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_slice_bends_as_the_eigenvalue_says(network, batch):
    values, vectors = landscape.top_eigenpairs(network, *batch, tolerance=1e-8)
    move, h = landscape.direction(network, vectors[0]), 1e-3
    [[below, here, above]] = landscape.loss_slice(network, *batch, move, {}, np.array([-h, 0, h]), np.zeros(1))
    assert (above - 2 * here + below) / h**2 == pytest.approx(values.item(), rel=1e-3)


def test_direction_has_the_shapes_of_the_weights_in_their_order(network):
    sizes = [weight.numel() for weight in network.parameters()]
    parts = landscape.direction(network, torch.arange(float(sum(sizes))))
    assert {name: part.shape for name, part in parts.items()} == {
        name: weight.shape for name, weight in network.named_parameters()
    }
    assert torch.equal(landscape.flat(list(parts.values())), torch.arange(float(sum(sizes))))
    with pytest.raises(ValueError, match=rf"expected {sum(sizes)} numbers"):
        landscape.direction(network, torch.zeros(3))


@pytest.mark.parametrize("move", [{"1.gamma": torch.ones(2)}, {"0.bias": torch.ones(3)}])
def test_direction_of_another_model_is_refused(network, move):
    [name] = move
    with pytest.raises(ValueError, match=rf"a direction has {name} .* expected some of 0.weight \(2, 1, 3, 3\)"):
        landscape.moved(network, (1.0, move))


def test_filter_normalized_direction_by_hand(network):
    """Each filter of the draw, divided by its own length and multiplied by that of the model's filter."""
    move = landscape.filter_normalized(network, seed=7)
    assert set(move) == {"0.weight", "5.weight"}, "biases and the norm stay"
    generator = torch.Generator().manual_seed(7)
    for name, weight in (("0.weight", network[0].weight), ("5.weight", network[5].weight)):
        draw = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        for filter_of_move, filter_of_model, d in zip(move[name], weight, draw, strict=True):
            expected = d / (d**2).sum().sqrt() * (filter_of_model**2).sum().sqrt()
            torch.testing.assert_close(filter_of_move, expected)


def test_filter_normalized_direction_scales_with_each_filter_and_depends_on_the_seed(network):
    before = landscape.filter_normalized(network, seed=0)
    with torch.no_grad():
        network[0].weight[1] *= 10  # what batch norm behind it would undo
        network[5].weight[2] = 0.0
    after = landscape.filter_normalized(network, seed=0)
    torch.testing.assert_close(after["0.weight"][1], 10 * before["0.weight"][1])
    torch.testing.assert_close(after["0.weight"][0], before["0.weight"][0])
    assert not after["5.weight"][2].any()
    other = landscape.filter_normalized(network, seed=1)
    assert abs(F.cosine_similarity(other["0.weight"].flatten(), after["0.weight"].flatten(), dim=0)) < 0.9


def test_filter_normalized_slice_is_the_same_for_rescaled_weights(batch):
    """Batch norm undoes the scale of the weights, and the direction grows with it: so the slice stays (Li et al.)."""
    torch.manual_seed(0)
    model, images, labels = CNN(CNNConfig(width=4)).double(), torch.randn(16, 1, 8, 8).double(), torch.arange(16) % 10
    x, slices = np.array([-1.0, 0.0, 0.5]), []
    for _ in range(2):
        across, up = (landscape.filter_normalized(model, seed) for seed in (0, 1))
        slices.append(landscape.loss_slice(model, images, labels, across, up, x, x))
        with torch.no_grad():
            for block in (block for layer in model.layers for block in layer):
                block.conv1.weight *= 3
    np.testing.assert_allclose(slices[1], slices[0], rtol=1e-3)  # not exactly, for the ε of batch norm
    assert slices[0].std() > 0.05


def test_frozen_weights_count_among_all():
    torch.manual_seed(0)
    model, x, y = CNN(CNNConfig(width=2)), torch.randn(8, 1, 8, 8), torch.arange(8)
    values, vectors = landscape.top_eigenpairs(model, x, y)
    model.stem.conv.weight.requires_grad_(False)
    again, _ = landscape.top_eigenpairs(model, x, y)
    torch.testing.assert_close(again, values)
    assert vectors.shape[1] == sum(weight.numel() for weight in model.parameters())
