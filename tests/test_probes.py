"""The probes against autograd, against numbers made by hand, and against training without them."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.optim import optimizer as torch_optimizer

from utils import data, probes, train
from utils.model import ACTIVATIONS, CNN, CNNConfig
from utils.probes import Probes

FORWARD = ("activation_mean", "activation_std", "dead")


class Net(nn.Module):
    """3×3 convolution, ReLU called twice, an Identity, a head: N×2×6×6 to N×3."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 4, 3)
        self.relu, self.pass_on, self.head = nn.ReLU(), nn.Identity(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pass_on(self.relu(self.conv(x)))
        return self.head(self.relu(x.mean((2, 3)) - 0.2))


def batch(n: int = 8, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, 2, 6, 6, generator=torch.Generator().manual_seed(1)).to(dtype)


def step(model: nn.Module, images: Tensor, optimizer: torch.optim.Optimizer | None = None) -> None:
    """One training step on the loss mean(outputs²)."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.zero_grad()
    model(images).square().mean().backward()
    optimizer.step()


def value(probe: Probes, layer: str, metric: str, at: int = 1) -> float:
    frame = probe.frame()
    return frame[(frame["step"] == at) & (frame["layer"] == layer) & (frame["metric"] == metric)]["value"].item()


def steps(probe: Probes) -> list[int]:
    return sorted(set(probe.frame()["step"]))


def is_clean(model: nn.Module) -> bool:
    """True if no hook is left: on any module of `model`, on all modules, on all optimizers."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called", "_backward_hooks")
    of_modules = [vars(module)[kind] for module in model.modules() for kind in kinds]
    of_all = [getattr(torch_module, f"_global{kind}") for kind in kinds]
    of_optimizers = [torch_optimizer._global_optimizer_pre_hooks, torch_optimizer._global_optimizer_post_hooks]
    return not any(of_modules + of_all + of_optimizers)


# ------------------------------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_are_those_of_autograd(dtype):
    """Outputs and gradients of a plain forward pass, the update of plain SGD: lr · ‖gradient‖ / ‖weight‖."""
    model, images = Net().to(dtype), batch(dtype=dtype)
    maps = model.conv(images)
    active = maps.relu()
    pooled = active.mean((2, 3)) - 0.2
    outputs = {"conv": maps, "relu": active, "relu#2": pooled.relu()}
    outputs["head"] = model.head(outputs["relu#2"])
    of_weights = {"conv": model.conv.weight, "head": model.head.weight}
    asked = [*outputs.values(), *of_weights.values()]
    gradients = torch.autograd.grad(outputs["head"].square().mean(), asked)
    sizes = {name: weight.norm().item() for name, weight in of_weights.items()}

    with Probes(model) as probe:
        step(model, images)
        step(model, images)  # not recorded: it must change no number of the first
    assert steps(probe) == [1]
    close = dict(rel=1e-5 if dtype == torch.float32 else 1e-12)
    assert set(probe.frame()["layer"]) == set(outputs)  # and no row of the Identity
    for (name, output), gradient in zip(outputs.items(), gradients, strict=False):
        assert value(probe, name, "activation_mean") == pytest.approx(output.mean().item(), abs=1e-7)
        assert value(probe, name, "activation_std") == pytest.approx(output.std(correction=0).item(), **close)
        assert value(probe, name, "activation_gradient") == pytest.approx(gradient.norm().item(), **close)
    for (name, size), gradient in zip(sizes.items(), gradients[len(outputs) :], strict=True):
        assert value(probe, name, "weight_gradient") == pytest.approx(gradient.norm().item(), **close)
        ratio = 0.1 * gradient.norm().item() / size
        assert value(probe, name, "update_ratio") == pytest.approx(ratio, rel=max(1e-4, close["rel"]))


def test_a_reused_layer_has_rows_for_each_call():
    model = Net()
    with Probes(model, every=1) as probe:
        step(model, batch())
        step(model, batch())
    frame = probe.frame()
    assert list(frame.columns) == ["step", "layer", "metric", "value"]
    assert set(frame[frame["metric"] == "dead"]["layer"]) == {"relu", "relu#2"}  # counted anew at each step
    assert not frame.duplicated(["step", "layer", "metric"]).any()
    assert frame["value"].notna().all()


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_dead_units_are_found(name, memory_format):
    """Of five channels one is negative, one far above saturation, one constantly 0 and one constantly 1."""
    images = torch.linspace(-1, 1, 2 * 5 * 3 * 3).reshape(2, 5, 3, 3)
    images[:, 0] -= 5
    images[:, 1] += 200
    images[:, 2] = 0
    images[:, 3] = 1
    layer = ACTIVATIONS[name]()
    with Probes(layer) as probe:
        layer(images.to(memory_format=memory_format))
    dead = {"relu": 2, "tanh": 3}.get(name, 2)  # a ReLU's: negative and 0; others': what is constant or saturated
    assert value(probe, "model", "dead") == pytest.approx(dead / 5)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_bf16_statistics_are_those_of_float64(memory_format):
    """On half a million values, whose mean is large beside their deviation."""
    images = (3 + 0.1 * torch.randn(64, 32, 16, 16)).to(torch.bfloat16, memory_format=memory_format)
    exact = images.double()
    found = probes.statistics(nn.ReLU(), images)
    assert {number.dtype for number in found.values()} == {torch.float32}
    assert found["activation_mean"].item() == pytest.approx(exact.mean().item(), rel=1e-6)
    assert found["activation_std"].item() == pytest.approx(exact.std(correction=0).item(), rel=1e-5)
    assert probes.norm(images).item() == pytest.approx(exact.norm().item(), rel=1e-5)


@pytest.mark.parametrize("clip", [False, True])
def test_the_loss_scale_is_taken_off(clip):
    """A fused optimizer gets gradients that are 1024 times too large; clipping takes the scale off before it."""
    plain, scaled = Net(), Net()
    with Probes(plain) as want:
        step(plain, batch())
    optimizer = torch.optim.SGD(scaled.parameters(), lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with Probes(scaled) as got:
        scaler.scale(scaled(batch()).square().mean()).backward()
        if clip:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    for metric in ("weight_gradient", "update_ratio"):
        assert value(got, "conv", metric) == pytest.approx(value(want, "conv", metric), rel=1e-4)
    if clip:  # rather no number than one 1024 times too large
        assert "activation_gradient" not in set(got.frame()["metric"])
    else:
        assert value(got, "conv", "activation_gradient") == pytest.approx(
            value(want, "conv", "activation_gradient"), rel=1e-5
        )


# --------------------------------------------------------------------------------------------------- what is recorded


def test_every_nth_training_step_is_recorded():
    model = Net()
    with Probes(model, every=3) as probe:
        for _ in range(8):
            step(model, batch())
            with torch.no_grad():
                model(batch())
            with torch.inference_mode():
                model.eval()(batch())
            model(batch())  # eval mode, gradients on
            model.train()
    assert steps(probe) == [1, 4, 7]
    assert probe.step == 8
    per_step = probe.frame().groupby("step")["metric"].value_counts().unstack("metric")
    assert (per_step == per_step.iloc[0]).all().all()  # evaluation has written nothing over


def test_nothing_listens_between_recorded_steps():
    model = Net()
    with Probes(model, every=2):
        step(model, batch())
        assert not any(module._forward_hooks for module in model.modules())
        step(model, batch())
        assert not any(module._forward_hooks for module in model.modules())


def test_an_update_follows_its_gradients():
    """Gradients summed over two steps, by two optimizers, beside one that holds no weight of the network."""
    model, other = Net(), nn.Linear(2, 2)
    parts = [torch.optim.SGD(part.parameters(), lr=0.1) for part in (model.conv, model.head)]
    outside = torch.optim.SGD(other.parameters(), lr=0.1)
    with Probes(model) as probe:
        model(batch()).square().mean().backward()
        step(other, torch.ones(1, 2), outside)
        assert not set(probe.frame()["metric"]) & {"weight_gradient", "update_ratio"}
        model(batch()).square().mean().backward()
        total = {name: getattr(model, name).weight.grad.norm().item() for name in ("conv", "head")}
        for optimizer in parts:
            optimizer.step()
    assert steps(probe) == [1]
    for name, gradient in total.items():
        assert value(probe, name, "weight_gradient") == pytest.approx(gradient, rel=1e-5)


def test_frozen_weights_have_no_rows():
    model = Net()
    model.conv.requires_grad_(False)
    with Probes(model) as probe:
        step(model, batch())
    frame = probe.frame()
    assert set(frame[frame["layer"] == "conv"]["metric"]) == {"activation_mean", "activation_std"}
    assert value(probe, "head", "update_ratio") > 0


def test_weights_are_named_by_their_module():
    names = set(probes.weights(nn.Sequential(nn.MultiheadAttention(4, 2), nn.BatchNorm1d(4))))
    assert names == {"0.in_proj_weight", "0.out_proj"}
    assert set(probes.weights(nn.Linear(2, 2))) == set(probes.layers(nn.Linear(2, 2))) == {"model"}


# --------------------------------------------------------------------------------------- in the course's training loop


@pytest.fixture(scope="module")
def images():
    """512 training and 100 validation images of Fashion-MNIST."""
    all_images = data.load()
    return replace(all_images.take(512), validation=all_images.validation[torch.arange(100)])


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_training_is_bit_identical_with_probes(images, ema):
    recipe = train.Recipe(epochs=2, batch_size=64, lr=0.1, ema=ema)
    models = [CNN(CNNConfig(width=4)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    options = dict(device="cpu", precision="fp32", progress=False)
    plain = train.fit(models[0], images, recipe, **options)
    with Probes(models[1], every=5) as probe:
        probed = train.fit(models[1], images, recipe, **options)
    states = [model.state_dict() for model in models]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert (plain.last("validation", "loss"), len(plain)) == (probed.last("validation", "loss"), len(probed))
    assert steps(probe) == [1, 6, 11, 16]
    assert probe.step == 2 * 512 // 64


def test_the_first_update_of_the_network_is_that_of_sgd(images):
    """Nesterov's first update is (1 + momentum) · lr · (gradient + decay · weight); no decay here."""
    recipe = train.Recipe(epochs=1, batch_size=512, lr=0.1, schedule="constant", weight_decay=0.0)
    torch.manual_seed(0)
    model = CNN(CNNConfig(width=4))
    sizes = {name: weight.norm().item() for name, weight in model.named_parameters()}
    with Probes(model) as probe:
        train.fit(model, images, recipe, device="cpu", precision="fp32", progress=False)
    for name in ("stem.conv", "layers.3.0.conv2", "head"):
        ratio = 1.9 * recipe.lr * value(probe, name, "weight_gradient") / sizes[f"{name}.weight"]
        assert value(probe, name, "update_ratio") == pytest.approx(ratio, rel=1e-3)


# ------------------------------------------------------------------------------------------------ nothing is left over


def test_the_model_is_left_as_it_was():
    model = Net()
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    with Probes(model) as probe:
        step(model, batch())
        assert not is_clean(model)
    assert is_clean(model)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    step(model, batch())
    assert probe.step == 1


def fail_forward(model: nn.Module) -> None:
    model(torch.zeros(1, 3, 6, 6))  # of three channels, not two


def fail_backward(model: nn.Module) -> None:
    model(batch()).backward()  # of a matrix


@pytest.mark.parametrize("fail", [fail_forward, fail_backward])
def test_an_exception_leaves_nothing_behind(fail):
    model = Net()
    with pytest.raises(RuntimeError, match="channels|scalar"), Probes(model, every=1):
        fail(model)
    assert is_clean(model)


def test_a_failed_forward_pass_is_no_longer_listened_to():
    model = Net()
    with Probes(model, every=2) as probe:
        with pytest.raises(RuntimeError, match="channels"):
            model(torch.zeros(1, 3, 6, 6))
        assert not any(module._forward_hooks for module in model.modules())
        step(model, batch())
        step(model, batch())
    assert value(probe, "conv", "activation_std", at=3) > 0


def test_a_copy_of_the_network_is_not_recorded():
    model = Net()
    with Probes(model, every=1) as probe:
        other = copy.deepcopy(model)
        step(other, batch())
        assert probe.step == 0
        step(model, batch())
    assert probe.step == 1


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("every", [0, -1, 2.5, True, "10"])
def test_every_is_a_whole_number(every):
    with pytest.raises(ValueError, match=f"every={every!r}: expected a whole number of at least 1"):
        Probes(Net(), every=every)


def test_an_empty_record_says_what_to_do():
    model = Net()
    with Probes(model) as probe:
        model.eval()(batch())
    with pytest.raises(ValueError, match="nothing is recorded after 0 training steps.*with Probes"):
        probe.frame()


def test_probes_are_entered_once():
    model = Net()
    with Probes(model) as probe:
        with pytest.raises(RuntimeError, match="entered before.*make another"), probe:
            pass
        step(model, batch())
    assert steps(probe) == [1]
    assert is_clean(model)


def test_two_probes_do_not_disturb_each_other():
    model = Net()
    with Probes(model, every=1) as outer:
        with Probes(model, every=1) as inner:
            step(model, batch())
        step(model, batch())
    assert steps(inner) == [1]
    assert steps(outer) == [1, 2]
    assert outer.frame().query("step == 1")["value"].tolist() == inner.frame()["value"].tolist()


def test_other_outputs_than_tensors_are_left_out():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = nn.LSTM(2, 3), nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.head(self.lstm(x)[0]))

    model = Two()
    with Probes(model) as probe:
        step(model, torch.ones(4, 1, 2))
    assert {"activation_mean", "activation_std"} == set(probe.frame()["metric"]) & set(FORWARD)
    assert value(probe, "lstm.weight_ih_l0", "update_ratio") >= 0
