"""Muon against torch.optim.Muon, torch.optim.SGD and the singular value decomposition."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from utils import device
from utils.muon import Muon, orthogonalized


@pytest.mark.parametrize("shape", [(8, 8), (6, 20), (20, 6)])
def test_singular_values_come_near_to_one(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    values = torch.linalg.svdvals(orthogonalized(matrix, dtype=torch.float32))
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_singular_vectors_stay_what_they_are():
    torch.manual_seed(0)
    matrix = torch.randn(8, 30, dtype=torch.float64)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    turned = u.T @ orthogonalized(matrix, dtype=torch.float64) @ v.T  # diagonal, if the vectors are the same
    assert torch.allclose(turned, turned.diag().diag(), atol=1e-9)


@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_products_are_in_bf16_only_where_the_machine_has_instructions_for_it(monkeypatch, native, expected):
    monkeypatch.setattr(device, "cpu_multiplies_bf16", lambda: native)
    assert orthogonalized(torch.randn(8, 20)).dtype == expected


def test_doubles_stay_doubles():
    assert orthogonalized(torch.randn(8, 20, dtype=torch.float64)).dtype == torch.float64


def trained(make, shape: tuple[int, ...], steps: int = 5) -> torch.Tensor:
    """A weight after some steps with random gradients."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(shape))
    optimizer = make(weight)
    for _ in range(steps):
        weight.grad = torch.randn(shape)
        optimizer.step()
    return weight.detach()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_matrices_move_as_by_torch_optim_muon(weight_decay):
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": weight_decay}
    ours = trained(lambda w: Muon([{"params": [w], "orthogonal": True}], **options), (6, 20))
    theirs = trained(lambda w: torch.optim.Muon([w], **options), (6, 20))
    assert torch.allclose(ours, theirs, atol=2e-2)  # products in bf16
    assert not torch.allclose(ours, trained(lambda w: Muon([{"params": [w]}], **options), (6, 20)), atol=2e-2)


def test_all_else_moves_as_by_torch_optim_sgd():
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
    ours = trained(lambda w: Muon([{"params": [w]}], **options), (7,))
    theirs = trained(lambda w: torch.optim.SGD([w], nesterov=True, **options), (7,))
    assert torch.allclose(ours, theirs)


def test_a_convolution_is_the_matrix_of_its_filters():
    flat = trained(lambda w: Muon([{"params": [w], "orthogonal": True}], lr=0.1), (4, 18))
    folded = trained(lambda w: Muon([{"params": [w], "orthogonal": True}], lr=0.1), (4, 2, 3, 3))
    assert torch.allclose(flat, folded.flatten(1))


def test_normalized_weights_keep_their_norm_but_for_the_step():
    weight = trained(lambda w: Muon([{"params": [w], "orthogonal": True}], lr=1e-6, normalized=True), (16, 2, 3, 3))
    assert weight.norm().item() == pytest.approx(4, rel=1e-3)


def test_a_bias_cannot_be_orthogonal():
    with pytest.raises(ValueError, match="a weight of 1 axes cannot be orthogonal"):
        Muon([{"params": [nn.Parameter(torch.zeros(3))], "orthogonal": True}], lr=0.1)


def test_its_state_can_be_saved_and_loaded():
    gradients = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(0))
    weight = nn.Parameter(torch.ones(2, 3))
    optimizer = Muon([{"params": [weight], "orthogonal": True}], lr=0.1, momentum=0.9)
    for turn, gradient in enumerate(gradients):
        if turn == 2:
            other, state = nn.Parameter(weight.detach().clone()), deepcopy(optimizer.state_dict())
        weight.grad = gradient
        optimizer.step()
    resumed = Muon([{"params": [other], "orthogonal": True}], lr=0.1, momentum=0.9)
    resumed.load_state_dict(state)
    for gradient in gradients[2:]:
        other.grad = gradient
        resumed.step()
    assert torch.equal(other, weight)
