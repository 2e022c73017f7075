"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): momentum SGD whose steps on matrices are orthogonal."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from utils import device

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # steep at 0: small singular values grow fast, and end near 1, not at it


def orthogonalized(matrix: Tensor, steps: int = 5, dtype: torch.dtype | None = None) -> Tensor:
    """Return M×N `matrix` with singular values near 1: about U Vᵀ of its U S Vᵀ.

    Five steps bring those above 1/500 of the matrix's norm to 0.6 to 1.2; smaller ones grow by 3.4 a step, and stay
    small. By `steps` Newton–Schulz iterations X ← aX + (bA + cA²)X with A = XXᵀ, all products of matrices in `dtype`:
    bf16 by default, whose few digits are enough here, or fp32 where the device has no instructions for bf16, and fp64
    for a matrix in fp64.
    """
    a, b, c = COEFFICIENTS
    x = matrix.to(dtype or (matrix.dtype if matrix.dtype == torch.float64 else fast_dtype(matrix.device)))
    x = x.t() if matrix.shape[0] > matrix.shape[1] else x  # A is then the smaller square
    x = x / x.norm().clamp_min(1e-7)
    for _ in range(steps):
        square = x @ x.t()
        x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.t() if matrix.shape[0] > matrix.shape[1] else x


def fast_dtype(where: torch.device) -> torch.dtype:
    """Return bf16 if `where` multiplies it natively, else fp32: bf16 that is emulated takes many times as long."""
    return torch.bfloat16 if device.pick_precision(where) == "bf16" else torch.float32


class Muon(torch.optim.Optimizer):
    """Nesterov momentum; groups with "orthogonal": True take orthogonal steps, all others are as of torch.optim.SGD.

    A weight of more than two axes, like a convolution's O×C×k×k, is the matrix O×(C·k·k). With `normalized`, these
    weights are brought back to the norm √O before each step, so that the learning rate is an angle. Unlike
    torch.optim.Muon it takes all weights of a network, in one optimizer, and steps no farther in matrices that are
    taller than wide. Raises ValueError for an "orthogonal" weight of fewer than two axes.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        *,
        steps: int = 5,
        normalized: bool = False,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "orthogonal": False}
        super().__init__(groups, defaults | {"steps": steps, "normalized": normalized})
        for group in self.param_groups:
            for weight in group["params"] if group["orthogonal"] else ():
                if weight.ndim < 2:
                    raise ValueError(f"a weight of {weight.ndim} axes cannot be orthogonal: expected two or more")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step along the gradients that the weights hold."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self.update(weight, group)
        return loss

    def update(self, weight: Tensor, group: dict[str, Any]) -> None:
        """Move one weight."""
        gradient, momentum = weight.grad, group["momentum"]
        if not group["orthogonal"]:
            gradient = gradient.add(weight, alpha=group["weight_decay"])
        state = self.state[weight]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        buffer = state["momentum_buffer"]
        buffer.mul_(momentum).add_(gradient)
        direction = gradient.add(buffer, alpha=momentum)  # Nesterov
        if group["orthogonal"]:
            direction = orthogonalized(direction.flatten(1), group["steps"]).view_as(direction).to(weight.dtype)
            if group["normalized"]:
                weight.mul_(len(weight) ** 0.5 / weight.norm().clamp_min(1e-7))
            weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.add_(direction, alpha=-group["lr"])
