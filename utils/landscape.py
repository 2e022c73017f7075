"""The surface that training walks on: the loss of a network as a function of its weights, and how curved it is there."""

import copy
from collections.abc import Callable, Sequence

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn


# --- the loss along a training step


def along_step(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    lengths: Sequence[float],
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> pd.DataFrame:
    """Return what a step of gradient descent on this batch meets, were it shorter or longer: a row a length.

    From its weights w, where the gradient is g, a copy of `model` goes to w − length·g for each of `lengths`, which are
    learning rates. It is in train mode, as in training: batch norm takes the statistics of the batch, and dropout drops
    the same values everywhere. `model` itself stays as it is, statistics and gradients included. The columns:

    - `length`, and `distance`, the way from w: length × ‖g‖. The first row is w itself, with 0 and 0.
    - `loss` there, and `gradient`, the norm of the gradient g' there.
    - `gradient_change`: ‖g' − g‖, the "gradient predictiveness" of Santurkar et al. 2018, section 3.1; its largest
      share of `distance` is their "effective β-smoothness".

    Raises ValueError unless all lengths are above 0.
    """
    if not lengths or min(lengths) <= 0:
        raise ValueError(f"lengths={list(lengths)!r}: expected one or more learning rates above 0")
    walker = copy.deepcopy(model).train()
    weights = [weight for weight in walker.parameters() if weight.requires_grad]
    start = [weight.detach().clone() for weight in weights]
    value, g = loss_and_gradient(walker, images, labels, loss)
    rows = [[0.0, 0.0, value, norm_of_all(g), 0.0]]
    for length in lengths:
        with torch.no_grad():
            for weight, before, part in zip(weights, start, g, strict=True):
                weight.copy_(before - length * part)
        value, new = loss_and_gradient(walker, images, labels, loss)
        change = norm_of_all([there - here for there, here in zip(new, g, strict=True)])
        rows.append([length, length * norm_of_all(g), value, norm_of_all(new), change])
    return pd.DataFrame(rows, columns=["length", "distance", "loss", "gradient", "gradient_change"])


def loss_and_gradient(
    model: nn.Module, images: Tensor, labels: Tensor, loss: Callable[[Tensor, Tensor], Tensor]
) -> tuple[float, list[Tensor]]:
    """Return the loss on the batch and its gradient by each weight, from the same random numbers at each call."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    with torch.random.fork_rng([images.device] if images.is_cuda else []), torch.enable_grad():
        torch.manual_seed(0)
        value = loss(model(images), labels)
        return value.item(), list(torch.autograd.grad(value, weights))


def norm_of_all(parts: Sequence[Tensor]) -> float:
    """Return the Frobenius norm of all tensors together, summed in float64."""
    return sum(float(torch.linalg.vector_norm(part, dtype=torch.float64)) ** 2 for part in parts) ** 0.5
