"""The surface that training walks on: the loss as a function of the weights, and how curved it is."""

from collections.abc import Mapping, Sequence
from copy import deepcopy

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn

from utils.device import memory_format

Direction = Mapping[str, Tensor]  # a move of some of a network's parameters, by name; the others stay


def prepared(model: nn.Module, images: Tensor) -> nn.Module:
    """Return a copy of `model` whose loss on `images` is a function of the weights alone, in the images' precision.

    Batch norm takes its statistics from the images, as in training; dropout is off. `model` stays as it is.
    """
    copy = deepcopy(model).to(images.device, images.dtype, memory_format=memory_format(images.device)).train()
    for module in copy.modules():
        if isinstance(module, nn.Dropout | nn.Dropout1d | nn.Dropout2d | nn.Dropout3d | nn.AlphaDropout):
            module.eval()
    return copy


def flat(parts: Sequence[Tensor]) -> Tensor:
    """Return all numbers of `parts`, one part after the other."""
    return torch.cat([part.reshape(-1) for part in parts])


def hessian(loss: Tensor, weights: Sequence[Tensor]) -> LinearOperator:
    """Return the P×P matrix of second derivatives of the scalar `loss` by its P `weights`, without ever writing it out.

    A product with a vector is one backward pass through the gradient (Pearlmutter 1994, "Fast exact multiplication by
    the Hessian"). All of a small one is `hessian(loss, weights) @ np.eye(P)`.
    """
    gradient = flat(torch.autograd.grad(loss, weights, create_graph=True))  # P

    def product(vector: np.ndarray) -> np.ndarray:
        v = torch.from_numpy(np.ascontiguousarray(vector).reshape(-1)).to(gradient)
        second = torch.autograd.grad(gradient, weights, v, retain_graph=True, materialize_grads=True)
        return flat(second).cpu().double().numpy()

    return LinearOperator((len(gradient), len(gradient)), matvec=product, dtype=np.float64)


def top_eigenpairs(
    model: nn.Module, images: Tensor, labels: Tensor, k: int = 1, tolerance: float = 1e-3
) -> tuple[Tensor, Tensor]:
    """Return the `k` largest eigenvalues of the loss's Hessian by all P weights, largest first, and k×P eigenvectors.

    The loss is the mean cross-entropy of `model` on `images` (float N×C×H×W, normalized) and `labels`, as `prepared`
    says; bf16 has no second derivatives here. Lanczos' method: about ten to twenty products of `hessian` give an
    eigenvalue to the relative `tolerance` (ARPACK; Lehoucq et al. 1998). Raises ValueError for other than fp32 or fp64.
    """
    if images.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"images are {images.dtype}: expected float32 or float64, in which there are second derivatives"
        )
    copy = prepared(model, images).requires_grad_(True)  # a frozen weight is one of all P, too
    matrix = hessian(F.cross_entropy(copy(images), labels), list(copy.parameters()))
    size = matrix.shape[0]
    start = np.random.default_rng(0).normal(size=size)  # the same one each time
    values, vectors = eigsh(matrix, k, which="LA", v0=start, tol=tolerance, ncv=min(size, 4 * k + 4))
    order = values.argsort()[::-1].copy()
    return torch.from_numpy(values[order]), torch.from_numpy(vectors.T[order])


def direction(model: nn.Module, vector: Tensor) -> dict[str, Tensor]:
    """Return P numbers, in the order of `model.parameters()`, as a Direction. Raises ValueError for other than P."""
    named = dict(model.named_parameters())
    sizes = [weight.numel() for weight in named.values()]
    if vector.shape != (sum(sizes),):
        raise ValueError(f"a vector of shape {tuple(vector.shape)}: expected {sum(sizes)} numbers, one for each weight")
    return {name: part.view_as(named[name]) for name, part in zip(named, vector.split(sizes), strict=True)}


def filter_normalized(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """Return a random Direction whose every filter is as long as the model's (H. Li et al. 2018, section 4).

    A filter is what makes one output: weight[i] of a convolution or linear layer. A step of length 1 so changes all of
    them by as much as they are, and networks whose weights differ in scale can be compared. Biases and the parameters
    of norms stay, as in the paper's figures. The same `seed` gives the same draw, whatever the weights are.
    """
    generator, steps = torch.Generator().manual_seed(seed), {}
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            draw = torch.randn(weight.shape, generator=generator, dtype=torch.float64)  # out×in×k×k or out×in
            steps[name] = (draw * filter_norms(weight.detach().cpu().double()) / filter_norms(draw)).to(weight)
    return steps


def filter_norms(weight: Tensor) -> Tensor:
    """Return the Frobenius norm of each weight[i], in a shape that `weight` can be divided by."""
    return torch.linalg.vector_norm(weight, dim=tuple(range(1, weight.ndim)), keepdim=True)


def moved(model: nn.Module, *moves: tuple[float, Direction]) -> nn.Module:
    """Return a copy of `model` whose weights are w + Σ distance · direction over the (distance, direction) in `moves`.

    Raises ValueError for a direction that is not of this model.
    """
    copy = deepcopy(model)
    weights = dict(copy.named_parameters())
    for distance, steps in moves:
        for name, step in steps.items():
            if name not in weights or weights[name].shape != step.shape:
                there = ", ".join(f"{key} {tuple(weight.shape)}" for key, weight in weights.items())
                raise ValueError(f"a direction has {name} {tuple(step.shape)}: expected some of {there}")
            with torch.no_grad():
                weights[name].add_(step.to(weights[name]), alpha=distance)
    return copy


@torch.no_grad()
def loss_slice(
    model: nn.Module, images: Tensor, labels: Tensor, across: Direction, up: Direction, x: np.ndarray, y: np.ndarray
) -> np.ndarray:
    """Return the loss on the plane through `model`'s weights w: len(y)×len(x) values, at w + x · across + y · up.

    The loss is that of `top_eigenpairs`: batch norm takes its statistics anew at each point, as it would if training
    came by (H. Li et al. 2018, "Visualizing the loss landscape"). Raises ValueError as `moved` does.
    """
    center = prepared(model, images)
    points = ([moved(center, (float(a), across), (float(b), up)) for a in x] for b in y)
    return np.array([[F.cross_entropy(point(images), labels).item() for point in row] for row in points])


# --- the loss along a training step


def along_step(model: nn.Module, images: Tensor, labels: Tensor, lengths: Sequence[float]) -> pd.DataFrame:
    """Return what a step of gradient descent on this batch meets, were it shorter or longer: a row a length.

    From its weights w, where the gradient is g, a copy of `model` goes to w − length·g for each of `lengths`, which are
    learning rates. The loss is that of `top_eigenpairs`. The columns:

    - `length`, and `distance`, the way from w: length × ‖g‖. The first row is w itself, with 0 and 0.
    - `loss` there, and `gradient`, the norm of the gradient g' there.
    - `gradient_change`: ‖g' − g‖, the "gradient predictiveness" of Santurkar et al. 2018, section 3.1; its largest
      share of `distance` is their "effective β-smoothness".

    Raises ValueError unless all lengths are above 0.
    """
    if not lengths or min(lengths) <= 0:
        raise ValueError(f"lengths={list(lengths)!r}: expected one or more learning rates above 0")
    start = prepared(model, images)
    loss, g = loss_and_gradient(start, images, labels)
    rows = [[0.0, 0.0, loss, size_of(g), 0.0]]
    for length in lengths:
        loss, new = loss_and_gradient(moved(start, (-length, g)), images, labels)
        change = size_of({name: new[name] - g[name] for name in g})
        rows.append([length, length * size_of(g), loss, size_of(new), change])
    return pd.DataFrame(rows, columns=["length", "distance", "loss", "gradient", "gradient_change"])


def loss_and_gradient(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, dict[str, Tensor]]:
    """Return the loss on the batch, and its gradient by each weight that is trained."""
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    loss = F.cross_entropy(model(images), labels)
    return loss.item(), dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))


def size_of(step: Direction) -> float:
    """Return the Euclidean norm of all numbers together, summed in float64."""
    return flat(list(step.values())).double().norm().item()
