"""The loop against a plain one, torch's own schedules, and itself after an interruption."""

import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from utils import checkpoint, data, train
from utils.model import CNN, CNNConfig
from utils.train import Recipe

SMALL = CNNConfig(width=4)


@pytest.fixture(scope="module")
def tiny():
    """640 training and 200 validation images of Fashion-MNIST."""
    images = data.load().take(640)
    return replace(images, validation=images.validation[torch.arange(0, 5000, 25)])


def fit(images, recipe, config=SMALL, **options):
    torch.manual_seed(recipe.seed)
    model = CNN(config)
    history = train.fit(model, images, recipe, device="cpu", **{"precision": "fp32", "progress": False} | options)
    return model, history


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_history_is_tidy(tiny):
    _, history = fit(tiny, Recipe(epochs=2, batch_size=128), run="a")
    assert list(history.columns) == ["run", "epoch", "step", "split", "metric", "value", "seconds"]
    assert set(history["run"]) == {"a"}
    assert history.groupby(["split", "metric"]).size().eq(2).all()
    assert {"loss", "accuracy"} == set(history.loc[history["split"] == "validation", "metric"])
    assert list(history.loc[history["metric"] == "lr", "step"]) == [5, 10]
    assert history["seconds"].is_monotonic_increasing
    assert type(history[history["epoch"] == 1]) is train.History
    with pytest.raises(KeyError, match="no test loss.*validation accuracy"):
        history.last("test", "loss")


def test_accuracy_is_correct_over_total_for_any_batch(tiny, monkeypatch):
    model = CNN(SMALL).eval()
    stats = data.channel_stats(tiny.train.images)
    results = []
    for size in (7, 200):
        monkeypatch.setattr(train, "EVAL_BATCH", size)
        results.append(train.evaluate(model, tiny.validation, stats, device="cpu", precision="fp32"))
    logits = model(data.normalize(tiny.validation.images, stats))
    expected = (logits.argmax(1) == tiny.validation.labels).sum().item() / 200
    assert results[0]["accuracy"] == results[1]["accuracy"] == expected
    assert results[0]["loss"] == pytest.approx(F.cross_entropy(logits, tiny.validation.labels).item(), rel=1e-5)


def test_evaluate_leaves_the_mode_of_each_part_as_it_was(tiny, monkeypatch):
    """Also where a part is in another mode than the rest, and after an error."""
    model, stats = CNN(SMALL).train(), data.channel_stats(tiny.train.images)
    model.stem.norm.eval()
    modes = [module.training for module in model.modules()]
    train.evaluate(model, tiny.validation, stats, device="cpu")
    assert [module.training for module in model.modules()] == modes
    str(model)
    assert [module.training for module in model.modules()] == modes
    monkeypatch.setattr(data, "free_memory", lambda _: 0)
    with pytest.raises(MemoryError):
        train.evaluate(model, tiny.validation, stats, device="cpu")
    assert [module.training for module in model.modules()] == modes


def test_weight_decay_spares_norms_and_biases():
    model = CNN(CNNConfig(norm="batch"))
    groups = train.make_optimizer(model, Recipe(weight_decay=0.01)).param_groups
    by_id = {id(weight): group["weight_decay"] for group in groups for weight in group["params"]}
    for name, weight in model.named_parameters():
        spared = "norm" in name or name.endswith("bias") or "shortcut.1" in name
        assert by_id[id(weight)] == (0.0 if spared else 0.01), name


def planned_lrs(recipe: Recipe, steps: int) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], recipe.lr)
    schedule = train.make_schedule(optimizer, recipe, steps)
    lrs = []
    for _ in range(steps):
        lrs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return lrs


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 50])
@pytest.mark.parametrize("schedule", train.SCHEDULES)
def test_schedules_never_leave_zero_to_peak(schedule, steps):
    lrs = planned_lrs(Recipe(lr=0.5, schedule=schedule), steps)
    assert 0 < min(lrs) <= max(lrs) <= 0.5
    assert max(lrs) >= 0.25
    assert steps < 50 or schedule == "constant" or lrs[-1] < 0.02


def test_same_seed_gives_the_same_weights_and_another_seed_others(tiny):
    config = CNNConfig(width=4, dropout=0.2, dropout_where="everywhere")
    runs = [fit(tiny, Recipe(epochs=1, batch_size=128, seed=seed), config)[0] for seed in (3, 3, 4)]
    assert same_weights(runs[0], runs[1])
    assert not same_weights(runs[0], runs[2])


class Interrupted(Exception):
    pass


def interrupt_after(epoch: int):
    def on_epoch(history):
        if history["epoch"].max() == epoch:
            raise Interrupted

    return on_epoch


@pytest.mark.parametrize(("ema", "schedule"), [(0.0, "one-cycle"), (0.9, "cosine")])
def test_resume_ends_in_bit_identical_weights(tiny, tmp_path, ema, schedule):
    config = CNNConfig(width=4, dropout=0.2, dropout_where="everywhere")
    recipe = Recipe(epochs=4, batch_size=128, ema=ema, schedule=schedule)
    undisturbed, expected = fit(tiny, recipe, config)
    for epoch in (1, 3):
        with pytest.raises(Interrupted):
            fit(tiny, recipe, config, out=tmp_path, resume=epoch == 3, on_epoch=interrupt_after(epoch))
    resumed, history = fit(tiny, recipe, config, out=tmp_path, resume=True)
    assert same_weights(undisturbed, resumed)
    assert not same_weights(undisturbed, fit(tiny, replace(recipe, seed=1), config)[0])
    timed = history["metric"] == "images_per_second"
    assert history.loc[~timed, "value"].tolist() == expected.loc[~timed, "value"].tolist()
    kept, card = checkpoint.load_model(tmp_path)
    assert same_weights(kept, resumed)
    assert card["epoch"] == 4


def test_resumed_momentum_lies_in_memory_as_the_weights_do(tiny, tmp_path, monkeypatch):
    """CUDA's fused SGD refuses anything else."""
    recipe = Recipe(epochs=1, batch_size=128)
    fit(tiny, recipe, out=tmp_path)
    made = []
    monkeypatch.setattr(
        train, "make_optimizer", lambda *a, make=train.make_optimizer: made.append(make(*a)) or made[-1]
    )
    fit(tiny, recipe, out=tmp_path, resume=True)
    (optimizer,) = made
    buffers = [(weight, state["momentum_buffer"]) for weight, state in optimizer.state.items()]
    assert len(buffers) == len(list(CNN(SMALL).parameters()))
    assert all(weight.stride() == buffer.stride() for weight, buffer in buffers)


def test_resumed_moments_of_any_optimizer_lie_in_memory_as_the_weights_do(tiny, tmp_path):
    made = []

    def adam(model, recipe):
        made.append(torch.optim.AdamW(model.parameters(), lr=1e-3))
        return made[-1]

    for resume in (False, True):
        fit(tiny, Recipe(epochs=1, batch_size=128), out=tmp_path, resume=resume, optimizer=adam)
    states = made[-1].state.items()
    moments = [(weight, state[name]) for weight, state in states for name in ("exp_avg", "exp_avg_sq")]
    assert len(moments) == 2 * len(list(CNN(SMALL).parameters()))
    assert all(weight.stride() == moment.stride() for weight, moment in moments)


def test_a_state_that_does_not_fit_the_optimizer_is_told(tiny, tmp_path):
    recipe = Recipe(epochs=1, batch_size=128)
    fit(tiny, recipe, out=tmp_path)
    with pytest.raises(checkpoint.CheckpointError, match="the state of optimizer in .* does not fit"):
        fit(tiny, recipe, out=tmp_path, resume=True, optimizer=lambda m, r: torch.optim.SGD(m.parameters(), lr=0.1))


def test_disk_full_between_the_two_files_loses_no_epoch(tiny, tmp_path, monkeypatch):
    recipe = Recipe(epochs=2, batch_size=128)
    whole, _ = fit(tiny, recipe)
    writes = []

    def fourth_write_fails(path, record, write=checkpoint.write):
        writes.append(path)
        if len(writes) == 4:
            raise OSError(28, "No space left on device")
        write(path, record)

    monkeypatch.setattr(checkpoint, "write", fourth_write_fails)
    with pytest.raises(OSError, match="No space"):
        fit(tiny, recipe, out=tmp_path)
    monkeypatch.undo()
    resumed, history = fit(tiny, recipe, out=tmp_path, resume=True)
    assert same_weights(whole, resumed)
    assert checkpoint.load_model(tmp_path)[1]["epoch"] == history["epoch"].max() == 2


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.thorough)])
def test_compiled_network_trains_the_same(tiny, monkeypatch, precision):
    """Through torch.compile's tracing, but without the C++ compiler that its default backend calls."""
    recipe = Recipe(epochs=1, batch_size=128)
    config = replace(SMALL, dropout=0.1, dropout_where="everywhere")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    plain, compiled = (fit(tiny, recipe, config, compiled=choice, precision=precision)[0] for choice in (False, True))
    assert same_weights(plain, compiled)


@pytest.mark.parametrize(("saved", "now"), [("cuda", "cpu"), ("cpu", "cpu")])
def test_random_numbers_go_on_where_the_device_is_the_same(saved, now):
    """A state of a GPU's generator is nothing for a CPU: there the draws begin anew, and the run can be resumed."""
    torch.manual_seed(1)
    state, expected = torch.get_rng_state(), torch.rand(1)
    torch.manual_seed(2)
    other = torch.rand(1)
    torch.manual_seed(2)
    train.set_random_state({"device": saved, "states": [state]}, torch.device(now))
    assert torch.rand(1) == (expected if saved == now else other)


def test_gradients_left_on_the_network_do_not_count(tiny):
    torch.manual_seed(0)
    model = CNN(SMALL).eval()  # so that the statistics of batch norm stay as they are
    model(torch.ones(8, 1, 28, 28)).sum().backward()
    train.fit(model, tiny, Recipe(epochs=1, batch_size=128), device="cpu", precision="fp32", progress=False)
    assert same_weights(model, fit(tiny, Recipe(epochs=1, batch_size=128))[0])


def test_class_names_go_with_the_weights(tiny, tmp_path):
    fit(tiny, Recipe(epochs=1, batch_size=128), out=tmp_path)
    _, card = checkpoint.load_model(tmp_path)
    assert card["class_names"] == list(tiny.class_names)


def test_a_run_from_before_optimizers_were_recorded_is_resumed(tiny, tmp_path):
    recipe = Recipe(epochs=1, batch_size=128)
    fit(tiny, recipe, out=tmp_path)
    saved = checkpoint.read(tmp_path / checkpoint.STATE_FILE)
    del saved["identity"]["optimizer"]
    checkpoint.write(tmp_path / checkpoint.STATE_FILE, saved)
    fit(tiny, recipe, out=tmp_path, resume=True)


def test_a_network_may_have_a_configuration_that_json_does_not_know(tiny, tmp_path):
    @dataclass
    class Settings:
        root: Path = tmp_path

    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    model.config = Settings()
    options = {"device": "cpu", "precision": "fp32", "progress": False, "out": tmp_path}
    train.fit(model, tiny, Recipe(epochs=1, batch_size=128), **options)
    train.fit(model, tiny, Recipe(epochs=1, batch_size=128), **options, resume=True)


def test_resume_refuses_another_run(tiny, tmp_path):
    recipe = Recipe(epochs=1, batch_size=128)
    fit(tiny, recipe, out=tmp_path)
    before = (tmp_path / checkpoint.STATE_FILE).read_bytes()
    with pytest.raises(checkpoint.CheckpointError, match=r"recipe.lr was 0\.4 and is 0\.2"):
        fit(tiny, replace(recipe, lr=0.2), out=tmp_path, resume=True)
    with pytest.raises(checkpoint.CheckpointError, match="network.depth was 4 and is 5"):
        fit(tiny, recipe, CNNConfig(width=4, depth=5), out=tmp_path, resume=True)
    with pytest.raises(checkpoint.CheckpointError, match="optimizer was 'SGD' and is 'Adam'"):
        fit(tiny, recipe, out=tmp_path, resume=True, optimizer=lambda model, _: torch.optim.Adam(model.parameters()))
    with pytest.raises(checkpoint.CheckpointError, match="checksum"):
        fit(tiny.take(320), recipe, out=tmp_path, resume=True)
    with pytest.raises(checkpoint.CheckpointError, match="no checkpoint at"):
        fit(tiny, recipe, out=tmp_path / "nothing", resume=True)
    with pytest.raises(ValueError, match="resume=True without out"):
        fit(tiny, recipe, resume=True)
    assert (tmp_path / checkpoint.STATE_FILE).read_bytes() == before


@pytest.mark.parametrize("norm", ["none"])
def test_diverged_loss_stops_at_once_and_keeps_the_last_checkpoint(tiny, tmp_path, norm):
    """The weights are made NaN after the first epoch: the first step of the second one (step 6) is bad."""
    torch.manual_seed(0)
    model = CNN(replace(SMALL, norm=norm))

    def spoil(history):
        with torch.no_grad():
            model.head.weight.fill_(math.nan)

    with pytest.raises(train.Diverged, match=r"nan at step 6: .*--lr"):
        train.fit(
            model,
            tiny,
            Recipe(epochs=2, batch_size=128, lr=0.01),
            device="cpu",
            progress=False,
            out=tmp_path,
            on_epoch=spoil,
        )
    kept, card = checkpoint.load_model(tmp_path)
    assert card["epoch"] == 1
    assert all(weight.isfinite().all() for weight in kept.parameters())


def test_too_high_a_learning_rate_is_reported_not_trained_on(tiny):
    with pytest.raises(train.Diverged, match="step"):
        fit(tiny, Recipe(epochs=3, batch_size=64, lr=1e6), replace(SMALL, norm="none"))


def test_a_last_step_that_ruins_the_network_is_reported_and_not_kept(tiny, tmp_path):
    """No training loss is behind it."""
    recipe = Recipe(epochs=1, batch_size=64, lr=1e6, schedule="constant", crop_padding=0, flip=False)
    with pytest.raises(train.Diverged, match="the validation loss is nan after step 1: training stopped"):
        fit(replace(tiny, train=tiny.train[:64]), recipe, replace(SMALL, norm="none"), out=tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def test_without_validation_images_the_weights_tell():
    model = CNN(SMALL)
    train.check_finite(model, {}, 3)
    with torch.no_grad():
        model.head.weight[0, 0] = math.inf
    with pytest.raises(train.Diverged, match="a weight is not finite after step 3"):
        train.check_finite(model, {}, 3)


def test_parts_of_a_shared_batch_are_alike_or_refused(tiny, monkeypatch):
    monkeypatch.setattr(train.parallel, "size", lambda: 2)
    with pytest.raises(ValueError, match=r"batch_size=20: expected a multiple of 8, the processes \(2\) × accumulate"):
        fit(tiny, Recipe(epochs=1, batch_size=20, accumulate=4))


def test_meter_finds_the_step_on_a_device_that_is_not_asked_every_step():
    meter = train.Meter(torch.device("cpu"), steps=3, first_step=10)
    meter.losses = torch.tensor([1.0, math.inf, math.nan])
    meter.updates = meter.count = 3
    with pytest.raises(train.Diverged, match="inf at step 12"):
        meter.total()


def test_bf16_trains_like_fp32(tiny):
    recipe = Recipe(epochs=2, batch_size=64, lr=0.1)
    losses = [fit(tiny, recipe, precision=precision)[1].last("train", "loss") for precision in ("fp32", "bf16")]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def test_any_network_trains(tiny, tmp_path):
    """torchvision's resnet18 takes three channels: the grey images three times."""
    rgb = data.Split(tiny.train.images.expand(-1, 3, -1, -1), tiny.train.labels)[torch.arange(128)]
    colour = replace(tiny, train=rgb, validation=data.Split(rgb.images[:32], rgb.labels[:32]))
    model = torchvision.models.resnet18(num_classes=10)
    recipe = Recipe(epochs=4, batch_size=64, lr=0.05)
    history = train.fit(model, colour, recipe, device="cpu", progress=False, out=tmp_path)
    losses = history.loc[(history["split"] == "train") & (history["metric"] == "loss"), "value"]
    assert losses.iloc[-1] < losses.iloc[0]
    with pytest.raises(checkpoint.CheckpointError, match="not the course's CNN"):
        checkpoint.load_model(tmp_path)
    resumed = torchvision.models.resnet18(num_classes=10)
    train.fit(resumed, colour, recipe, device="cpu", progress=False, out=tmp_path, resume=True)
    assert same_weights(model, resumed)


def test_202_weighted_layers_train(monkeypatch):
    """Loss falls clearly within one epoch on 2,500 images (width 4 here: the depth is what is tested)."""
    images = data.load().take(2500)
    images = replace(images, validation=images.validation[torch.arange(0, 5000, 50)])
    torch.manual_seed(0)
    model = CNN(CNNConfig(width=4, depth=100))
    result, losses = train.Meter.result, []
    monkeypatch.setattr(train.Meter, "result", lambda meter: losses.extend(meter.losses.tolist()) or result(meter))
    train.fit(model, images, Recipe(epochs=1, batch_size=64), device="cpu", progress=False)
    assert model.config.weighted_layers == 202
    assert len(losses) == 2500 // 64
    assert sum(losses[-8:]) < 0.75 * sum(losses[:8])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lr", 0),
        ("lr", -0.1),
        ("lr", math.nan),
        ("lr", math.inf),
        ("lr", "fast"),
        ("epochs", 0),
        ("epochs", 1.5),
        ("batch_size", 0),
        ("schedule", "cyclic"),
        ("warmup", 1.0),
        ("momentum", 1.0),
        ("weight_decay", -1e-4),
        ("label_smoothing", 1.0),
        ("clip", math.nan),
        ("ema", 1.0),
        ("crop_padding", -1),
        ("flip", "no"),
        ("alternate", 1),
        ("cutout", -1),
        ("seed", -1),
    ],
)
def test_recipe_refuses(field, value):
    with pytest.raises(ValueError, match=f"{field}=") as error:
        Recipe(**{field: value})
    assert repr(value) in str(error.value)


def test_batch_larger_than_the_set_is_refused(tiny):
    with pytest.raises(ValueError, match="641.*640"):
        fit(tiny, Recipe(batch_size=641))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_no_step_waits_for_the_gpu(tiny, monkeypatch):
    """PyTorch itself raises at the first synchronization between the first batch of an epoch and its last."""
    epoch = data.Batches.__iter__

    def watched(batches):
        torch.cuda.set_sync_debug_mode("error" if batches.shuffle else "default")
        try:
            yield from epoch(batches)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(data.Batches, "__iter__", watched)
    train.fit(CNN(SMALL), tiny, Recipe(epochs=2, batch_size=128), device="cuda", progress=False)


def test_cuda_graphs_need_cuda(tiny):
    with pytest.raises(ValueError, match="cuda_graphs=True needs a CUDA device, and this one is 'cpu'"):
        fit(tiny, Recipe(epochs=1, batch_size=128), cuda_graphs=True)
    with pytest.raises(ValueError, match="cuda_graphs=True with accumulate=2: .* leave one of them out"):
        fit(tiny, Recipe(epochs=1, batch_size=128, accumulate=2), cuda_graphs=True)
