"""What flows through each layer while a network trains, forwards and backwards, and how far its weights move.

PyTorch's public hooks bring the numbers: neither network nor training loop change, nor does any bit of the result.
"""

from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any, Self

import pandas as pd
import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from utils.model import ACTIVATIONS

UPDATE_GUIDE = 1e-3  # of `update_ratio`: far above it a layer learns too fast, far below it too slowly (Karpathy)
NON_LINEAR = tuple(ACTIVATIONS.values())


class Probes:
    """Records what passes through `model` at its training steps 1, 1 + every, 1 + 2·every, … within a `with` block:

        with probes.Probes(model) as probe:
            train.fit(model, data)
        probe.frame()

    A training step is a forward pass of `model` in train mode with gradients on; evaluation is not counted. A layer is
    a module without children that returns one floating-point tensor, `nn.Identity` excepted (its rows would be those of
    the layer before it). When a layer is called again in the same forward pass, "#2", "#3", … stand behind its name; a
    network that is one layer is called "model". The metrics:

    - `activation_mean`, `activation_std`: over all values of the layer's output (std divides by their number).
    - `dead`, of non-linearities with an output of two or more axes: share of units (axis 1) that say the same for the
      whole batch: a ReLU's are 0 in all images and places; those of others give one and the same value there.
    - `activation_gradient`: Frobenius norm of the loss gradient with respect to the layer's output. He et al. 2015
      ("Delving deep", section 2.2) ask that it neither grows nor shrinks from layer to layer.
    - `weight_gradient`: Frobenius norm of the gradient of a parameter of two or more axes, as the optimizer gets it:
      after clipping, without the loss scale of fp16.
    - `update_ratio`: ‖w_after − w_before‖ / ‖w_before‖ of that optimizer step; about 1e-3 is a guide (Karpathy 2022,
      "Building makemore part 3", "update:data ratio").

    The optimizer step of a training step is the first one after it. (With `Recipe.accumulate` each part of a batch is a
    training step: its activation gradient is that of its share of the loss, and of the parts only the last recorded one
    before the optimizer step has the metrics of weights.) The loss
    scale is read from the optimizer, where `torch.amp.GradScaler` leaves it for fused ones; when it was taken off
    earlier (for clipping) there is no `activation_gradient`, and optimizers that are not fused give it with the scale.

    Statistics are float32 (float64 of float64) and stay on the device until `frame`: training never waits for them.
    Functions (`F.relu`) are no layers, and `torch.compile` is not supported: train with compiled=False.

    Raises ValueError unless `every` is a whole number from 1, RuntimeError when it is entered a second time.
    """

    def __init__(self, model: nn.Module, every: int = 10) -> None:
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ValueError(f"every={every!r}: expected a whole number of at least 1; every=1 records each step")
        self.model, self.every, self.entered = model, every, False
        self.step = self.recorded = 0  # training steps so far, and the newest one that is recorded
        self.rows: dict[tuple[int, str, str], Tensor] = {}  # (step, layer, metric) → scalar
        self.scales: dict[int, Any] = {}  # step → loss scale of its activation gradients; None: not known
        self.calls: Counter[str] = Counter()  # of each layer in this forward pass
        self.due: dict[str, Tensor] = {}  # weights whose optimizer step is still to come
        self.copies: dict[str, tuple[Tensor, Tensor]] = {}  # weights in their optimizer step, and copies from before
        self.lasting: list[Any] = []  # handles of the hooks of the whole block, and of those of one forward pass
        self.passing: list[Any] = []

    def __enter__(self) -> Self:
        if self.entered:
            raise RuntimeError("these Probes were entered before: expected one `with` block each; make another Probes")
        self.entered = True
        # A function, for `copy.deepcopy(model)` (as for EMA) copies methods together with their object.
        begin = self.model.register_forward_pre_hook(lambda module, _: self.begin_forward(module))
        before = register_optimizer_step_pre_hook(lambda optimizer, *_: self.before_update(optimizer))
        self.lasting = [begin, before, register_optimizer_step_post_hook(lambda *_: self.after_update())]
        return self

    def __exit__(self, *_: object) -> None:
        remove(self.lasting)
        remove(self.passing)
        self.due, self.copies = {}, {}

    def frame(self) -> pd.DataFrame:
        """Return a row for each number: step (from 1), layer, metric, value. Raises ValueError when there is none."""
        if not self.rows:
            raise ValueError(
                f"nothing is recorded after {self.step} training steps: expected one at least; train the network "
                "inside of `with Probes(model) as probe`, in train mode, with gradients on, not compiled"
            )
        return pd.DataFrame(self.unscaled(), columns=["step", "layer", "metric", "value"])

    def unscaled(self) -> Iterator[tuple[int, str, str, float]]:
        """Yield the rows, activation gradients without the loss scale, or not at all where it is unknown."""
        for (step, layer, metric), value in self.rows.items():
            scale = self.scales.get(step, 1.0) if metric == "activation_gradient" else 1.0
            if scale is not None:
                yield step, layer, metric, float(value / scale)

    def begin_forward(self, module: nn.Module) -> None:
        """Count a training step; if it is to be recorded, listen to every layer until the forward pass ends."""
        if module is not self.model or not module.training or not torch.is_grad_enabled():
            return
        self.step += 1
        if (self.step - 1) % self.every:
            return
        remove(self.passing)  # there are some only if the user interrupted the forward pass before
        self.calls.clear()
        self.recorded, self.due = self.step, weights(module)
        for name, layer in layers(module).items():
            self.passing.append(layer.register_forward_hook(partial(self.record, name)))
        self.passing.append(module.register_forward_hook(lambda *_: remove(self.passing), always_call=True))

    def record(self, name: str, layer: nn.Module, inputs: Any, output: Any) -> None:
        """Keep the statistics of a layer's `output`, and later those of its gradient."""
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return
        self.calls[name] += 1
        label = name if self.calls[name] == 1 else f"{name}#{self.calls[name]}"
        for metric, value in statistics(layer, output.detach()).items():
            self.rows[self.recorded, label, metric] = value
        if output.requires_grad:
            output.register_hook(partial(self.record_gradient, (self.recorded, label, "activation_gradient")))

    def record_gradient(self, key: tuple[int, str, str], gradient: Tensor) -> None:
        self.rows[key] = norm(gradient.detach())

    def before_update(self, optimizer: Optimizer) -> None:
        """Keep the gradients that `optimizer` is about to use, and copies of its weights, where they are due."""
        if not self.due:
            return
        held = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
        now = {name: w for name, w in self.due.items() if id(w) in held and w.grad is not None}
        if now:
            self.scales[self.recorded] = scale = getattr(optimizer, "grad_scale", 1.0)
        for name, weight in now.items():
            gradient = norm(weight.grad)
            self.rows[self.recorded, name, "weight_gradient"] = gradient if scale is None else gradient / scale
            self.copies[name] = self.due.pop(name), weight.detach().clone()

    def after_update(self) -> None:
        """Compare the weights with their copies."""
        for name, (weight, copy) in self.copies.items():
            self.rows[self.recorded, name, "update_ratio"] = norm(weight.detach() - copy) / norm(copy)
        self.copies = {}


def remove(handles: list[Any]) -> None:
    """Remove the hooks of `handles` and empty the list."""
    while handles:
        handles.pop().remove()


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules without children by name, without `nn.Identity`."""
    leaves = {name: module for name, module in model.named_modules() if not any(module.children())}
    return {name or "model": module for name, module in leaves.items() if not isinstance(module, nn.Identity)}


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters of two or more axes: by their module's name if they are its `weight`, else by their own."""
    named = {name: weight for name, weight in model.named_parameters() if weight.ndim > 1 and weight.requires_grad}
    return {f".{name}".removesuffix(".weight").removeprefix(".") or "model": weight for name, weight in named.items()}


def statistics(layer: nn.Module, output: Tensor) -> dict[str, Tensor]:
    """Return mean, standard deviation and, for a non-linearity of N×C×…, the share of dead units of `output`."""
    dtype = wide(output)
    mean = output.mean(dtype=dtype)
    deviations = output.to(dtype, copy=True).sub_(mean)  # `var_mean` takes ten times as long on a CPU
    found = {"activation_mean": mean, "activation_std": norm(deviations) / output.numel() ** 0.5}
    if isinstance(layer, NON_LINEAR) and output.ndim > 1:
        found["dead"] = dead_share(layer, output)
    return found


def dead_share(layer: nn.Module, output: Tensor) -> Tensor:
    """Return the share of units of `output` (N×C×…) that are 0 for the whole batch (ReLU) or never change (others)."""
    highest = highest_by_unit(output)
    dead = highest <= 0 if isinstance(layer, nn.ReLU) else highest == -highest_by_unit(-output)
    return dead.mean(dtype=wide(output))


def highest_by_unit(output: Tensor) -> Tensor:
    """Return the highest value of each unit: N×C×… → C.

    Over the images first, in the order of the memory: on a CPU over ten times as fast as `output.amax((0, 2, 3))`.
    """
    channels_last = output.movedim(1, -1)  # N×…×C
    if channels_last.is_contiguous():
        return channels_last.amax(0).reshape(-1, output.shape[1]).amax(0)
    return output.amax(0).reshape(output.shape[1], -1).amax(1)


def norm(values: Tensor) -> Tensor:
    """Return the Frobenius norm: of each image or filter first, for one long sum in float32 is off by up to 1e-3."""
    parts = torch.linalg.vector_norm(values, dim=tuple(range(1, values.ndim)), dtype=wide(values))
    return torch.linalg.vector_norm(parts)


def wide(values: Tensor) -> torch.dtype:
    """Return the type to compute statistics of `values` in: float32, or float64 if they are."""
    return torch.promote_types(values.dtype, torch.float32)
