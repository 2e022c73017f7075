"""The loop's numbers in double precision against formulas and torch's own; what must not reach training, does not."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from utils import data, train
from utils.data import Split
from utils.model import CNN, CNNConfig
from utils.train import Recipe

SMALL = CNNConfig(width=4)
EXACT = dict(rtol=1e-10, atol=1e-12)
EVERYTHING = Recipe(epochs=20, batch_size=128, lr=0.1, label_smoothing=0.1, clip=0.5, ema=0.9, momentum=0.9)


@pytest.fixture(scope="module")
def tiny() -> data.ImageData:
    """128 training and 50 validation images of Fashion-MNIST: an epoch is one step."""
    images = data.load().take(128)
    return replace(images, validation=images.validation[torch.arange(0, 5000, 100)])


def fit(images: data.ImageData, recipe: Recipe, config: CNNConfig = SMALL) -> tuple[CNN, train.History]:
    torch.manual_seed(recipe.seed)
    model = CNN(config)
    return model, train.fit(model, images, recipe, device="cpu", precision="fp64", progress=False)


def batches_of(images: data.ImageData, recipe: Recipe) -> data.Batches:
    augmented = {"crop_padding": recipe.crop_padding, "flip": recipe.flip}
    order = {"shuffle": True, "drop_last": True, "seed": recipe.seed, "dtype": torch.float64}
    return data.Batches(images.train, data.channel_stats(images.train.images), recipe.batch_size, **order, **augmented)


def smoothed(logits: Tensor, labels: Tensor, epsilon: float) -> Tensor:
    """Mean cross-entropy with the target 1 - ε of the label, and ε spread over all classes (Szegedy et al. 2016)."""
    log_p = logits - logits.exp().sum(1, keepdim=True).log()
    return -((1 - epsilon) * log_p[range(len(labels)), labels] + epsilon * log_p.mean(1)).mean()


def by_formula(model: CNN, images: data.ImageData, recipe: Recipe) -> tuple[list[float], dict[str, Tensor]]:
    """Train `model` with nothing of torch.optim; return the loss of each step and the averaged weights."""
    weights = dict(model.named_parameters())
    speed = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    average, losses = {}, []
    batches, steps = batches_of(images, recipe), recipe.epochs * (len(images.train) // recipe.batch_size)
    top = recipe.warmup * steps
    for _ in range(recipe.epochs):
        for pixels, labels in batches:
            step = len(losses)
            lr = recipe.lr * ((step + 1) / (top + 1) if step < top else (steps - step) / (steps - top))
            loss = smoothed(model(pixels), labels, recipe.label_smoothing)
            gradients = dict(zip(weights, torch.autograd.grad(loss, weights.values()), strict=True))
            norm = math.sqrt(sum(float((g**2).sum()) for g in gradients.values()))
            factor = min(1.0, recipe.clip / (norm + 1e-6)) if recipe.clip else 1.0  # torch adds the 1e-6
            with torch.no_grad():
                for name, weight in weights.items():
                    decay = recipe.weight_decay if weight.ndim > 1 else 0.0
                    g = factor * gradients[name] + decay * weight
                    speed[name] = recipe.momentum * speed[name] + g
                    weight -= lr * (g + recipe.momentum * speed[name])  # Nesterov, as Sutskever et al. 2013 and torch
                for name, value in model.state_dict().items():
                    known, share = average.get(name, value.clone()), 1 - recipe.ema
                    average[name] = known + share * (value - known)
            losses.append(loss.item())
    return losses, average


@pytest.mark.parametrize("changes", [{}, {"clip": 0.0, "ema": 0.0, "label_smoothing": 0.0}], ids=["all", "plain"])
def test_twenty_steps_are_those_of_the_formulas(tiny, changes):
    recipe = replace(EVERYTHING, **changes)
    model, history = fit(tiny, recipe)
    torch.manual_seed(recipe.seed)
    losses, average = by_formula(CNN(SMALL).double().train(), tiny, recipe)
    found = history[(history["split"] == "train") & (history["metric"] == "loss")]["value"]
    assert len(losses) == len(found) == 20
    assert losses[-1] < 0.8 * losses[0]  # it learned: equal losses say something
    torch.testing.assert_close(torch.tensor(found.to_numpy()), torch.tensor(losses, dtype=torch.float64), **EXACT)
    for name, value in model.state_dict().items():
        if value.is_floating_point():  # counts are not averaged
            torch.testing.assert_close(value, average[name], **EXACT)


@pytest.mark.parametrize("field", ["clip", "ema", "label_smoothing", "momentum", "weight_decay", "warmup"])
def test_each_term_of_the_formulas_counts(tiny, field):
    """The comparison above would see it if the loop left one of them out."""
    recipe = replace(EVERYTHING, epochs=3)
    without = replace(recipe, **{field: 0.5 if field == "warmup" else 0.0})
    model, _ = fit(tiny, without)
    torch.manual_seed(recipe.seed)
    _, average = by_formula(CNN(SMALL).double().train(), tiny, recipe)
    assert not torch.allclose(model.state_dict()["head.weight"], average["head.weight"], **EXACT)


def test_averaged_weights_and_clipping_are_torchs_own(tiny):
    recipe = replace(EVERYTHING, epochs=3)
    model, _ = fit(tiny, recipe)
    torch.manual_seed(recipe.seed)
    plain = CNN(SMALL).double().train()
    groups = [{"params": [w], "weight_decay": recipe.weight_decay if w.ndim > 1 else 0} for w in plain.parameters()]
    optimizer = torch.optim.SGD(groups, recipe.lr, recipe.momentum, nesterov=True)
    schedule = torchs_one_cycle(optimizer, recipe, steps=3)
    average = AveragedModel(plain, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema), use_buffers=True)
    batches = batches_of(tiny, recipe)
    for _ in range(3):
        for pixels, labels in batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(plain(pixels), labels, label_smoothing=recipe.label_smoothing).backward()
            nn.utils.clip_grad_norm_(plain.parameters(), recipe.clip)
            optimizer.step()
            schedule.step()
            average.update_parameters(plain)
    for name, value in model.state_dict().items():
        expected = (
            average.module if value.is_floating_point() else plain
        )  # torch averages counts too, and cuts them off
        torch.testing.assert_close(value, expected.state_dict()[name], **EXACT)
    assert model.state_dict()["stem.norm.num_batches_tracked"] == 3


def torchs_one_cycle(
    optimizer: torch.optim.Optimizer, recipe: Recipe, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The same line up and down in OneCycleLR's terms: it counts one step more, whose learning rate is 0."""
    top = recipe.warmup * steps
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        recipe.lr,
        total_steps=steps + 1,
        pct_start=(top + 1) / (steps + 1),
        anneal_strategy="linear",
        cycle_momentum=False,
        div_factor=top + 1,
        final_div_factor=1e15,
    )


@pytest.mark.parametrize("steps", [3, 20, 1605])
@pytest.mark.parametrize("warmup", [0.05, 0.2, 0.9])
def test_one_cycle_is_torchs_one_cycle(steps, warmup):
    recipe = Recipe(lr=0.5, warmup=warmup)
    ours, theirs = (torch.optim.SGD([nn.Parameter(torch.zeros(1))], recipe.lr) for _ in range(2))
    schedules = train.make_schedule(ours, recipe, steps), torchs_one_cycle(theirs, recipe, steps)
    for step in range(steps):
        found, expected = (schedule.get_last_lr()[0] for schedule in schedules)
        assert found == pytest.approx(expected, rel=1e-9), step
        for optimizer, schedule in zip((ours, theirs), schedules, strict=True):
            optimizer.step()
            schedule.step()


def test_cosine_and_constant_are_their_formulas(tiny):
    for schedule, share in {
        "cosine": lambda step: (1 + math.cos(math.pi * step / 5)) / 2,
        "constant": lambda _: 1,
    }.items():
        _, history = fit(tiny, Recipe(epochs=5, batch_size=128, lr=0.1, schedule=schedule))
        lrs = history[history["metric"] == "lr"]["value"].tolist()
        assert lrs == pytest.approx([0.1 * share(step) for step in range(1, 6)], abs=1e-15)


@pytest.mark.parametrize("parts", [2, 4, 128])
def test_gradients_of_parts_add_up_to_those_of_the_batch(tiny, parts):
    recipe = replace(EVERYTHING, epochs=5)
    config = replace(SMALL, norm="none")  # batch norm sees each part by itself
    whole, of_whole = fit(tiny, recipe, config)
    split, of_parts = fit(tiny, replace(recipe, accumulate=parts), config)
    for a, b in zip(whole.state_dict().values(), split.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, **EXACT)
    same = of_whole["metric"].isin(["loss", "accuracy", "lr"])
    assert of_parts[same]["value"].tolist() == pytest.approx(of_whole[same]["value"].tolist(), rel=1e-10)
    assert of_parts["step"].tolist() == of_whole["step"].tolist()


def test_batch_norm_sees_each_part_by_itself(tiny):
    """With it, accumulation is a plain loop of backward passes before one step, and not the large batch."""
    recipe = Recipe(epochs=1, batch_size=128, accumulate=2, momentum=0.0, weight_decay=0.0)
    model, _ = fit(tiny, recipe)
    torch.manual_seed(0)
    plain = CNN(SMALL).double().train()
    [(pixels, labels)] = batches_of(tiny, recipe)
    for half in (slice(0, 64), slice(64, 128)):
        (nn.functional.cross_entropy(plain(pixels[half]), labels[half]) / 2).backward()
    lr = recipe.lr * train.one_cycle(0, 1, recipe.warmup)
    with torch.no_grad():
        for weight in plain.parameters():
            weight -= lr * weight.grad
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[name], **EXACT)


def test_accumulating_takes_less_memory():
    """Of what the CPU's allocator hands out at most: activations are kept for a part only."""

    def peak(accumulate: int) -> int:
        model, its_recipe = CNN(CNNConfig(width=8)), replace(recipe, accumulate=accumulate)
        return peak_memory(lambda: train.fit(model, images, its_recipe, **options))

    images = data.load().take(512)
    images = replace(images, validation=images.validation[torch.arange(10)])
    recipe, options = Recipe(epochs=1, batch_size=512), {"device": "cpu", "precision": "fp32", "progress": False}
    peak(1)  # what is made once
    assert peak(8) < 0.5 * peak(1)


def peak_memory(work: Callable[[], object]) -> int:
    """Do `work`, and return the bytes that the CPU's allocator hands out at most: no other process or test counts."""
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        work()
    sizes = [record.total_allocated for record in memory_records(profiler)]
    return max(sizes) - min(sizes)


def memory_records(profiler: torch.profiler.profile) -> list:
    """The profiler's records of the CPU's memory, of which each has the bytes that were in use then."""
    from torch._C._profiler import _EventType

    waiting, found = list(profiler.profiler.kineto_results.experimental_event_tree()), []
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.tag == _EventType.Allocation:
            found.append(event.extra_fields)
    return found


def test_no_validation_image_reaches_training(tiny):
    """Other validation images change what is said about them, and nothing else, to the last bit."""
    noise = torch.randint(256, tiny.validation.images.shape, generator=torch.Generator().manual_seed(1)).byte()
    other = replace(tiny, validation=Split(noise, tiny.validation.labels.flip(0)))
    recipe = replace(EVERYTHING, epochs=3)
    (model, history), (its_model, its_history) = fit(tiny, recipe), fit(other, recipe)
    for a, b in zip(model.state_dict().values(), its_model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    trained = (history["split"] == "train") & (history["metric"] != "images_per_second")
    assert its_history[trained]["value"].tolist() == history[trained]["value"].tolist()
    validated = history["split"] == "validation"
    assert its_history[validated]["value"].tolist() != history[validated]["value"].tolist()


def test_every_training_image_of_the_file_is_in_one_split_only():
    images = data.load()
    everything, _ = data._read_fashion_mnist(train=True)
    held_out = torch.zeros(len(everything), dtype=torch.bool)
    for label in range(10):
        held_out[(everything.labels == label).nonzero()[:, 0][:: data.VALIDATION_EVERY]] = True
    assert torch.equal(images.validation.images, everything.images[held_out])
    assert torch.equal(images.train.images, everything.images[~held_out])


def test_no_test_image_is_read_in_training(tiny):
    def forbidden() -> Split:
        raise AssertionError("the test images were read")

    fit(replace(tiny, _test=forbidden), Recipe(epochs=1, batch_size=128))


def test_statistics_of_a_billion_pixels_are_exact_in_bounded_memory():
    """Values whose sums are known as fractions: image i of n shows i % 251 everywhere, in two of three channels."""
    n, side, found = 32, 3228, []

    def stream() -> Iterator[Tensor]:
        for i in range(n):
            batch = torch.empty(1, 3, side, side, dtype=torch.uint8)
            batch[:, 0], batch[:, 1], batch[:, 2] = i % 251, 255 - i % 251, 7
            yield batch

    used = peak_memory(lambda: found.append(data.channel_stats(stream())))
    [stats] = found
    values = [i % 251 for i in range(n)]
    mean = Fraction(sum(values), n)
    std = math.sqrt(Fraction(sum(value**2 for value in values), n) - mean**2)
    assert 3 * stats.count > 1e9
    assert stats.mean == pytest.approx([mean / 255, 1 - mean / 255, 7 / 255], rel=1e-12)
    assert stats.std == pytest.approx([std / 255, std / 255, 0], rel=1e-12, abs=1e-15)
    assert used < 150e6  # two images of 31 MB, and some rows as float64; one image as float64 is 250 MB
