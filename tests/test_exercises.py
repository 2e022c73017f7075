"""Quizzes and exercises: each wrong answer has its own hint, no answer raises, and no key is left over."""

import inspect
import linecache
import math
import re
from dataclasses import replace
from functools import partial
from unittest import mock

import jupytext
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from utils import exercises, files
from utils.exercises import REGISTRY, Exercise, Mistake, Option, Quiz

QUIZZES = {key: item for key, item in REGISTRY.items() if isinstance(item, Quiz)}
EXERCISES = {key: item for key, item in REGISTRY.items() if isinstance(item, Exercise)}
MISTAKES = [(key, mistake) for key, exercise in EXERCISES.items() for mistake in exercise.mistakes]
LESSONS = {path.stem: jupytext.read(path) for path in sorted((files.ROOT / "notebooks" / "src").glob("*.py"))}
NUMBER = Exercise("a number", 2.0, "It is 2.", (Mistake(3.0, "One too many."),), ("Count.", "Count again."))

every_exercise = pytest.mark.parametrize("key", EXERCISES)
every_quiz = pytest.mark.parametrize("key", QUIZZES)


@pytest.fixture
def number(monkeypatch) -> str:
    """The key of a small exercise that is answered by the number 2."""
    monkeypatch.setitem(REGISTRY, "number", NUMBER)
    exercises.hints.cache_clear()
    return "number"


class Hostile:
    """An answer that fails at whatever is done with it."""

    def __getattribute__(self, name):
        raise RuntimeError(name)

    def __eq__(self, other):
        raise RuntimeError("==")

    def __call__(self, *inputs):
        raise HostileError

    __hash__ = __len__ = __iter__ = __float__ = __bool__ = __repr__ = __call__


class HostileError(Exception):
    def __str__(self):
        raise RuntimeError("str")


JUNK = {
    "nothing": None,
    "text": "10",
    "a number": 7,
    "NaN": float("nan"),
    "infinity": float("inf"),
    "a huge integer": 10**400,
    "a complex number": 1j,
    "an empty list": [],
    "a ragged list": [1, [2, 3]],
    "a list of text": ["a"],
    "a dict": {"a": torch.zeros(2)},
    "a tensor": torch.zeros(2, 3),
    "an empty tensor": torch.zeros(0),
    "a tensor with gradient": torch.zeros(4, requires_grad=True),
    "a tensor on no device": torch.zeros(4, device="meta"),
    "a sparse tensor": torch.eye(4).to_sparse(),
    "a class": dict,
    "a module": torch.nn.Linear(2, 2),
    "an object that fails": Hostile(),
    "a function without arguments": lambda: 0,
    "a function that returns nothing": lambda *inputs: None,
    "a function that returns itself": lambda *inputs: Hostile,
    "a function that returns NaN": lambda *inputs: float("nan"),
    "a function that returns its inputs": lambda *inputs: inputs,
    "a function that fails": lambda *inputs: 1 / 0,
    "a function that calls itself": lambda *inputs: JUNK["a function that calls itself"](),
    "a function that exits": lambda *inputs: exit(1),
}


def is_prose(words: str) -> bool:
    """Whether it is one paragraph that ends as a sentence does."""
    return re.fullmatch(r"\S[^\n]*[.?!]", words) is not None


def cells_that_check(key: str) -> list:
    """The cells of the lessons that check an answer to the exercise: the reader's, and the folded solution."""
    mark = f'exercises.check("{key}", '
    return [cell for lesson in LESSONS.values() for cell in lesson.cells if mark in cell.source]


def given_away(exercise: Exercise, solution: str) -> list[str]:
    """The hints that hold a line of the solution's code, or what is right: its field, its numbers one after another."""
    right = exercise.right
    if callable(right):
        solution += inspect.getsource(getattr(right, "func", right))
    lines = {line.split("#")[0].strip() for line in solution.splitlines()}
    told = [hint for hint in exercise.hints if any(line in hint for line in lines if len(line) > 8)]
    fields = list(right) if isinstance(right, dict) else []
    told += [hint for hint in exercise.hints if any(field in hint for field in fields)]
    wanted = [value for value in (right if isinstance(right, tuple) else (right,)) if isinstance(value, (int, float))]
    return told + [hint for hint in exercise.hints if wanted and holds(numbers(hint), wanted)]


def numbers(words: str) -> list[float]:
    return [float(found.replace(",", "")) for found in re.findall(r"\d+(?:,\d{3})*(?:\.\d+)?", words)]


def holds(found: list[float], wanted: list[float]) -> bool:
    """Whether `wanted`, rounded or not, stands somewhere in `found`."""
    parts = (found[start : start + len(wanted)] for start in range(len(found)))
    return any(part == pytest.approx(wanted, rel=0.01) for part in parts if len(part) == len(wanted))


# -------------------------------------------------------------------------------------------------- the exercises


@every_exercise
def test_right_answer_passes(key, capsys):
    assert exercises.check(key, EXERCISES[key].right) is True
    assert capsys.readouterr().out == f"✔ {EXERCISES[key].because}\n"


@pytest.mark.parametrize(("key", "mistake"), MISTAKES)
def test_wrong_answer_is_recognised(key, mistake, capsys):
    assert exercises.check(key, mistake.answer) is False
    assert capsys.readouterr().out == f"✘ {mistake.because}\n"


@every_exercise
def test_at_least_three_wrong_answers_each_with_its_own_words(key):
    said = [mistake.because for mistake in EXERCISES[key].mistakes]
    assert len(set(said)) == len(said) >= 3
    assert EXERCISES[key].because not in said
    assert [words for words in said if not is_prose(words)] == []


@every_exercise
def test_unfinished_answer_is_no_error(key, capsys):
    assert exercises.check(key, ...) is None
    assert f'exercises.hint("{key}")' in capsys.readouterr().out


@every_exercise
@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.filterwarnings("ignore:Casting complex values")
def test_junk_never_raises(key, junk, capsys):
    assert exercises.check(key, JUNK[junk]) is False
    line = capsys.readouterr().out
    assert line.startswith("✘ ")
    assert line.count("\n") == 1


@every_exercise
def test_hints_are_several_and_none_holds_the_solution(key):
    hints = EXERCISES[key].hints
    assert len(set(hints)) == len(hints) >= 2
    assert [words for words in hints if not is_prose(words)] == []
    [_, solution] = cells_that_check(key)
    assert given_away(EXERCISES[key], solution.source) == []


@pytest.mark.parametrize(
    ("right", "hint"),
    [
        (2.0, "Is it more than 1.99?"),
        (1234, "Expect 1,234 or so."),
        ((3, 64, 5), "The order is N, C, H: 3, 64, 5."),
        ((0.261, "inconclusive"), "The lower end is 0.26."),
        ({"residual": True}, "Try residual."),
        (exercises.with_flips, "Ask model(images.flip(3)) too: images.flip(3) mirrors them."),
        (partial(exercises.in_halves, share=1.0), "Begin with optimizer.zero_grad(), then go on."),
    ],
)
def test_a_hint_that_gives_the_solution_away_is_found(right, hint):
    exercise = replace(NUMBER, right=right, hints=("Think.", hint))
    assert given_away(exercise, "images.flip(3)  # from left to right\n") == [hint]
    assert given_away(replace(exercise, hints=("Think.", "Neither 64 nor 3.")), "images.flip(3)\n") == []


@every_quiz
def test_quiz_has_one_right_option_and_a_misconception_behind_each_other(key):
    options = QUIZZES[key].options
    assert sum(option.right for option in options) == 1
    assert len(options) >= 4
    assert len({option.because for option in options}) == len({option.text for option in options}) == len(options)
    assert [option.because for option in options if not is_prose(option.because)] == []


# ------------------------------------------------------------------------------------------------------ the checks


@pytest.mark.parametrize("answer", [2, 2.0, 2.00001, torch.tensor(2.0, requires_grad=True), torch.tensor(2).numpy()])
def test_numbers_of_any_type_are_compared_by_value(number, answer):
    assert exercises.check(number, answer) is True


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (float("nan"), "NaN"),
        ([2.0], "shape is (1,)"),
        ("2", "type str"),
        (2.5, "none of the usual mistakes"),
        (3.00001, "One too many."),
    ],
)
def test_wrong_answer_is_named(number, answer, said, capsys):
    assert exercises.check(number, answer) is False
    line = capsys.readouterr().out
    assert said in line
    assert said == "One too many." or line.endswith("Expected a number.\n")


def test_error_in_an_answer_is_named(monkeypatch, capsys):
    called = Exercise("a function", lambda: 1, "Yes.", (), (), measure=lambda function: function())
    monkeypatch.setitem(REGISTRY, "called", called)
    assert exercises.check("called", lambda: [][1]) is False
    assert capsys.readouterr().out == "✘ That stopped with IndexError: list index out of range. Expected a function.\n"


def test_an_error_is_told_with_the_readers_own_line(monkeypatch, capsys):
    source = "def answer(value):\n    return [value][3]\n"
    name = "/tmp/ipykernel_1/2.py"
    monkeypatch.setitem(linecache.cache, name, (len(source), None, source.splitlines(True), name))
    exec(compile(source, name, "exec"), space := {})
    monkeypatch.setitem(exercises.REGISTRY, "t.line", replace(NUMBER, right=abs, measure=lambda f: f(2.0)))
    assert not exercises.check("t.line", space["answer"])
    said = capsys.readouterr().out
    assert "IndexError: list index out of range, at `return [value][3]`." in said
    monkeypatch.setitem(exercises.REGISTRY, "t.line", replace(NUMBER, right=abs, measure=lambda f: float(f(2.0))))
    assert not exercises.check("t.line", lambda value: None)
    assert "Does your function end in a return?" in capsys.readouterr().out


def onto_the_shortcut(block, x):
    f = block.norm2(block.conv2(torch.relu(block.norm1(block.conv1(x)))))
    y = block.shortcut(x)
    y += f
    return torch.relu(y)


def test_block_exercise_refuses_what_overwrites_the_input_or_takes_parts_that_are_not_there(capsys):
    assert not exercises.check("00.block", onto_the_shortcut)
    assert "write y = y + f in place of y += f" in capsys.readouterr().out
    assert not exercises.check("00.block", lambda block, x: block(x))
    assert "has no attribute" in capsys.readouterr().out


def in_single_precision(curvatures, lr):
    slowest = (1 - lr * torch.tensor(curvatures)).abs().max()
    if slowest >= 1:
        return math.inf
    return 1 if slowest == 0 else int(torch.ceil(torch.log(torch.tensor(0.01)) / torch.log(slowest)))


def by_a_loop(curvatures, lr, most=10**6):
    slowest, distance, steps = max(abs(1 - lr * curvature) for curvature in curvatures), 1.0, 0
    while slowest < 1 and distance > 0.01 and steps < most:
        distance, steps = distance * slowest, steps + 1
    return steps if distance <= 0.01 else math.inf


def test_steps_exercise_takes_other_right_answers_and_no_loop_that_gives_up(capsys):
    assert exercises.check("01.steps", in_single_precision)
    assert exercises.check("01.steps", by_a_loop)
    capsys.readouterr()
    assert not exercises.check("01.steps", partial(by_a_loop, most=10_000))
    assert "gives up" in capsys.readouterr().out
    assert not exercises.check("01.steps", lambda curvatures, lr: math.ceil(math.log(0.01) / math.log(1 - lr)))


def test_quiet_check_is_silent_only_about_a_right_answer(number, capsys):
    assert exercises.check(number, 2, quiet=True) is True
    assert capsys.readouterr().out == ""
    assert exercises.check(number, 3, quiet=True) is False
    assert capsys.readouterr().out == "✘ One too many.\n"


@every_exercise
def test_check_leaves_the_readers_random_numbers_alone(key):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    exercises.check(key, EXERCISES[key].right)
    assert torch.equal(torch.rand(3), expected)


def one_loss(model, images, labels):
    return torch.nn.functional.cross_entropy(model(images), labels)


def both_losses(model, images, labels):
    pairs = zip(images.chunk(2), labels.chunk(2), strict=True)
    return sum(one_loss(model, *pair) for pair in pairs) / 2


def joined_logits(model, images, labels):
    return torch.nn.functional.cross_entropy(torch.cat([model(half) for half in images.chunk(2)]), labels)


@pytest.mark.parametrize("loss", [one_loss, both_losses, joined_logits])
def test_half_batch_exercise_refuses_a_whole_batch_in_memory(loss, capsys):
    """Also in two parts, when what both of them need for backward() is kept at once."""

    def step(model, optimizer, images, labels):
        optimizer.zero_grad()
        loss(model, images, labels).backward()
        optimizer.step()

    assert exercises.check("00.halves", step) is False
    assert "8 images at once wait for backward(): too many" in capsys.readouterr().out


def halves_by_grad(model, optimizer, images, labels):
    """`torch.autograd.grad` adds nothing to `.grad` by itself."""
    weights = list(model.parameters())
    pairs = zip(images.chunk(2), labels.chunk(2), strict=True)
    gradients = [torch.autograd.grad(one_loss(model, *pair), weights) for pair in pairs]
    for weight, *parts in zip(weights, *gradients, strict=True):
        weight.grad = sum(parts) / 2
    optimizer.step()


def halves_watched(model, optimizer, images, labels):
    """What goes through without a gradient waits for nothing."""
    for half in images.chunk(2):
        with torch.no_grad():
            model(half)
    exercises.in_halves(model, optimizer, images, labels)


@pytest.mark.parametrize("step", [halves_by_grad, halves_watched])
def test_half_batch_exercise_takes_other_right_answers(step):
    assert exercises.check("00.halves", step) is True


@pytest.mark.parametrize(
    ("first", "stride", "second", "said"),
    [
        (2, 3, 1, "Either the second convolution's padding is missing, or the pooling moved by 3"),
        (2, 2, 0, "Either the second convolution's padding is missing, or the pooling moved by 3"),
        (0, 2, 1, "The first convolution's padding is missing"),
    ],
)
def test_stack_exercise_names_the_padding_or_the_stride_that_was_overlooked(first, stride, second, said, capsys):
    """`first` and `second` are the paddings of the two convolutions, `stride` is that of the pooling."""
    layers = torch.nn.Conv2d(3, 16, 5, 2, first), torch.nn.MaxPool2d(3, stride), torch.nn.Conv2d(16, 24, 3, 1, second)
    shape = torch.nn.Sequential(*layers)(torch.zeros(1, 3, 30, 30)).shape[1:]
    assert exercises.check("02.stack", (*shape, 4712)) is False
    assert said in capsys.readouterr().out


def test_budget_exercise_measures_size_parameters_flops_and_learning():
    """Each known mistake breaks another set of the conditions; a network that breaks one is not trained."""
    exercise = EXERCISES["02.budget"]
    kept = [exercises.kept_budgets(mistake.answer) for mistake in exercise.mistakes]
    signs = ["".join("-+"[each] for each in conditions) for conditions in kept]
    assert signs == ["+-+-", "++--", "+---", "-++-", "+++-"]
    torch.manual_seed(0)
    assert exercises.kept_budgets(exercise.right) == [True] * 4


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        (lambda: (torch.nn.Conv2d(1, 10, 3, padding=1),), "it makes the shape (1, 10, 28, 28), not (1, 10)"),
        (lambda: (torch.nn.Flatten(), torch.nn.Linear(784, 5)), "it makes the shape (1, 5), not (1, 10)"),
        (
            lambda: (torch.nn.Conv2d(1, 64, 5), torch.nn.Flatten(), torch.nn.Linear(36_864, 10)),
            "Too many parameters and too many FLOPs",  # and for images of 28×28 only
        ),
    ],
)
def test_budget_exercise_names_a_wrong_shape_and_both_broken_budgets(layers, said, capsys):
    assert exercises.check("02.budget", lambda: torch.nn.Sequential(*layers())) is False
    assert said in capsys.readouterr().out


def test_budget_exercise_asks_a_network_without_norm_for_one(capsys):
    def build():
        pairs = zip((1, 8, 16), (8, 16, 32), strict=True)
        layers = [(torch.nn.Conv2d(*pair, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2)) for pair in pairs]
        end = torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(32, 10)
        return torch.nn.Sequential(*sum(layers, ()), *end)

    assert exercises.check("02.budget", build) is False
    assert "hardly learns (rate 0.2): does a norm stand behind each convolution?" in capsys.readouterr().out


def test_budget_exercise_counts_as_torch_does():
    """8,000 parameters are within the budget, 8,001 are not."""
    for extra, kept in ((0, True), (1, False)):
        network = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(1, 10))
        network.register_parameter("spare", torch.nn.Parameter(torch.zeros(8_000 - 20 + extra)))
        assert exercises.kept_budgets(lambda network=network: network)[1] is kept


def test_gain_exercise_knows_what_can_be_calculated():
    """A leaky ReLU's gain is √(2 / (1 + slope²)) (He et al. 2015); the other two by quadrature instead of draws."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(200)
    squares = [weights @ f(torch.tensor(nodes)).numpy() ** 2 / weights.sum() for f in (F.silu, F.gelu)]
    expected = [math.sqrt(2 / 1.25), *(square**-0.5 for square in squares)]
    torch.manual_seed(0)
    assert exercises.gains_of_three(EXERCISES["05.gain"].right) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("seed", range(5))
def test_gain_exercise_takes_a_simulation_of_100_000_draws_and_asks_a_noisy_one_for_more(seed, capsys):
    generator = torch.Generator().manual_seed(seed)
    said = {}
    for draws in (100_000, 1_000):
        sample = partial(torch.randn, generator=generator)
        exercises.check("05.gain", lambda f, n=draws, sample=sample: f(sample(n)).pow(2).mean().rsqrt().item())
        said[draws] = capsys.readouterr().out[:8]
    assert said[100_000].startswith("✔")
    assert said[1_000] == "✘ Nearly"


def test_gain_exercise_asks_for_normal_numbers(capsys):
    def uniform(count):  # of variance 1
        return (2 * torch.rand(count) - 1) * math.sqrt(3)

    assert exercises.check("05.gain", partial(exercises.gain_of, sample=uniform)) is False
    assert "else look at what you draw: z is normal" in capsys.readouterr().out


def test_only_a_near_answer_that_is_no_known_mistake_is_called_nearly_right(monkeypatch, capsys):
    mistake = Mistake(2.1, "A tenth too many.")
    monkeypatch.setitem(REGISTRY, "number", replace(NUMBER, mistakes=(mistake,), nearly="Nearly: go on."))
    for answer in (1.9, 2.1, 2.3):
        assert exercises.check("number", answer) is False
    assert [line[2:8] for line in capsys.readouterr().out.splitlines()] == ["Nearly", "A tent", "That i"]


def scaled_up(network):
    """PyTorch's default has a gain of 1/√3; times √6 that is He's."""
    with torch.no_grad():
        for conv in exercises.convolutions(network):
            conv.weight.mul_(math.sqrt(6))


def all_but_the_stem(network):
    exercises.he(torch.nn.Sequential(*exercises.convolutions(network)[1:]))


@pytest.mark.parametrize(
    "repair",
    [
        scaled_up,
        all_but_the_stem,
        partial(exercises.he, draw=torch.nn.init.kaiming_uniform_),
        partial(exercises.he, draw=partial(torch.nn.init.orthogonal_, gain=math.sqrt(2))),
    ],
)
def test_repair_exercise_takes_other_right_answers(repair):
    assert exercises.check("05.repair", repair) is True


def half_of_them(network):
    exercises.he(torch.nn.Sequential(*exercises.convolutions(network)[:6]))


@pytest.mark.parametrize(
    ("repair", "said"),
    [
        (half_of_them, "Only some of its convolutions have changed"),
        (partial(exercises.he, draw=partial(torch.nn.init.normal_, std=0.1)), "one number for all layers"),
        (partial(exercises.he, draw=torch.nn.init.dirac_), "a standard deviation of √(2 / fan-in)"),
    ],
)
def test_repair_exercise_names_other_mistakes(repair, said, capsys):
    assert exercises.check("05.repair", repair) is False
    assert said in capsys.readouterr().out


def test_repair_exercise_trains_only_what_may_learn(monkeypatch):
    """The other mistakes are found without training: of what is told here, each has another set of signs."""
    trained = []
    monkeypatch.setattr(exercises, "educated", lambda network: trained.append(network) or 0.0)
    found = [tuple(exercises.revived(mistake.answer)) for mistake in EXERCISES["05.repair"].mistakes]
    assert len(set(found)) == len(found)
    assert len(trained) == 1


def test_fifty_layers_train_with_one_change_only():
    plain, recipe = exercises.FIFTY_LAYERS, exercises.FIFTY_LAYERS_RECIPE
    assert plain.weighted_layers == 50
    assert not plain.residual
    assert exercises.trained_accuracy(plain, recipe) < 0.4, "as it is given"
    assert exercises.one_change({"residual": True}) == "trains"
    failed = [exercises.one_change(mistake.answer) for mistake in EXERCISES["04.train"].mistakes]
    assert len(set(failed)) == len(failed), "each mistake is told apart"
    assert not any("trains" in told for told in failed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "one field and its new value"),
        ({"residual": True, "lr": 0.1}, "one field and its new value"),
        ({"epochs": 50}, "epochs stays as it is"),
        ({"width": 64}, "width stays as it is"),
        ({"skip": True}, "neither CNNConfig nor Recipe has a field 'skip'"),
        ({"lr": -1.0}, "lr=-1.0: expected a learning rate above 0"),
    ],
)
def test_fifty_layers_refuse_other_changes(change, message):
    with pytest.raises(ValueError, match=message):
        exercises.one_change(change)


@pytest.mark.parametrize("change", [{"weight_decay": 0.0}, {"pool": "average"}])
def test_fifty_layers_know_of_each_field_that_it_does_not_help(change, capsys):
    assert exercises.check("04.train", change) is False
    assert capsys.readouterr().out.startswith("✘ That field does not help")


def half_the_rate(model, optimizer, images, labels):
    """The sum of two full gradients, at half the learning rate: weight decay is halved, too."""
    optimizer.param_groups[0]["lr"] /= 2
    exercises.in_halves(model, optimizer, images, labels, share=1.0)
    optimizer.param_groups[0]["lr"] *= 2


def two_steps_from_one_place(model, optimizer, images, labels):
    """Both halves' gradients at the old weights, applied one after the other: with momentum that is no single step."""
    gradients = []
    for x, y in zip(images.chunk(2), labels.chunk(2), strict=True):
        loss = 0.5 * F.cross_entropy(model(x), y)
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    for half in gradients:
        for weight, gradient in zip(model.parameters(), half, strict=True):
            weight.grad = gradient
        optimizer.step()


@pytest.mark.parametrize("step", [half_the_rate, two_steps_from_one_place])
def test_halves_exercise_refuses_what_only_plain_gradient_descent_forgives(step):
    assert exercises.check("00.halves", step) is False


def counted_steps(curvatures, lr):
    """The steps, counted one by one; with rounding, a distance may end a hair above 1 %."""
    if max(abs(1 - lr * curvature) for curvature in curvatures) >= 1:
        return math.inf
    distances, steps = [1.0] * len(curvatures), 0
    while max(abs(distance) for distance in distances) > 0.01:
        distances = [d * (1 - lr * curvature) for d, curvature in zip(distances, curvatures, strict=True)]
        steps += 1
    return steps


def test_steps_exercise_takes_a_loop_that_knows_when_it_never_ends():
    assert exercises.check("01.steps", counted_steps) is True


def test_fold_exercise_wants_a_new_convolution(capsys):
    def in_place(conv, norm):
        conv.load_state_dict(exercises.fold(conv, norm).state_dict(), strict=False)
        return conv

    def emptied(conv, norm):
        folded = exercises.fold(conv, norm)
        torch.nn.init.zeros_(conv.weight)
        return folded

    for function in (in_place, emptied):
        assert exercises.check("03.fold", function) is False
        assert "the convolution that you were given has changed" in capsys.readouterr().out


def new_convolution(conv, norm, sides=None):
    """A folded convolution that is made anew, and so draws random weights first; kernel and padding may be fixed."""
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    kernel, padding = sides or (conv.kernel_size, conv.padding)
    folded = torch.nn.Conv2d(conv.in_channels, conv.out_channels, kernel, conv.stride, padding)
    with torch.no_grad():
        folded.weight.copy_(conv.weight * scale.view(-1, 1, 1, 1))
        folded.bias.copy_(norm.bias + ((0 if conv.bias is None else conv.bias) - norm.running_mean) * scale)
    return folded


@pytest.mark.parametrize("fold", [new_convolution, torch.nn.utils.fusion.fuse_conv_bn_eval])
def test_fold_exercise_takes_other_right_answers(fold):
    assert exercises.check("03.fold", fold) is True


def test_fold_exercise_refuses_what_folds_no_shortcut(capsys):
    """Its lesson folds 1×1 convolutions, too."""
    assert exercises.check("03.fold", partial(new_convolution, sides=(3, 1))) is False
    assert "take over channels, kernel size, stride and padding" in capsys.readouterr().out


def test_flips_exercise_refuses_the_training_mode(capsys):
    """There, dropout and batch norm would answer another question."""
    assert exercises.check("06.flips", lambda model, images: exercises.with_flips(model.train(), images)) is False
    assert "the network was asked in training mode" in capsys.readouterr().out
    assert exercises.check("06.flips", lambda model, images: exercises.with_flips(model.eval(), images)) is True


def learn(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def without_zero_grad(optimizer, loss):
    loss.backward()
    optimizer.step()


def zeroed_behind(optimizer, loss):
    loss.backward()
    optimizer.zero_grad()
    optimizer.step()


def without_backward(optimizer, loss):
    optimizer.step()


def upwards(optimizer, loss):
    learn(optimizer, -loss)


def an_epoch(
    model,
    optimizer,
    images,
    labels,
    val_images,
    val_labels,
    *,
    roll=0,
    loss_by=None,
    read=None,
    keep=torch.Tensor.detach,
    every=1,
    order=torch.randperm,
    coins=len,
    learn=learn,
):
    """A right epoch for the exercise with five faults; the options are ways to cheat."""
    losses = []
    model.train()
    for step, batch in enumerate(order(len(images)).split(16)):
        x = exercises.as_pixels(images[batch])
        x = torch.where(torch.rand(coins(x), 1, 1, 1) < 0.5, x.flip(-1), x)
        loss = F.cross_entropy(model(x), labels.roll(roll)[batch])
        learn(optimizer, loss)
        losses.append(keep(loss))
        if read is not None and step % every == 0:
            read(losses[-1])
    model.eval()
    with torch.inference_mode():
        right = (model(exercises.as_pixels(val_images)).argmax(1) == val_labels).float().mean()
    return torch.stack(losses).mean() if loss_by is None else loss_by, right


@pytest.mark.parametrize(
    ("cheat", "said"),
    [
        ({"roll": 1}, "each image with its own label"),
        ({"loss_by": 0.0}, "mean loss 0.000 returned"),
        ({"loss_by": math.nan}, "mean loss nan returned"),
        ({"read": lambda loss: float(loss.numpy())}, "Tensor.numpy was called while training"),
        ({"read": np.asarray}, "Tensor.__array__ was called while training"),
        ({"read": float}, "steps ask for a tensor's value"),
        ({"read": torch.Tensor.item, "every": 3}, "steps ask for a tensor's value"),
        ({"read": lambda loss: loss.tolist()}, "steps ask for a tensor's value"),
        ({"keep": lambda loss: loss.detach().cpu()}, "steps ask for a tensor's value"),
        ({"keep": lambda loss: loss.detach().to(device="cpu")}, "steps ask for a tensor's value"),
        ({"keep": lambda loss: loss}, "the graphs of 12 steps are still there"),
        ({"coins": lambda x: 1}, "expected a coin for each image"),
        ({"learn": without_zero_grad}, "first zero_grad(), then loss.backward(), then step()"),
        ({"learn": zeroed_behind}, "has not learned what one step down the gradient a batch teaches"),
        ({"learn": without_backward}, "has not learned what one step down the gradient a batch teaches"),
        ({"learn": upwards}, "has not learned what one step down the gradient a batch teaches"),
        ({"order": torch.arange}, "expected a new random order"),
        ({"order": lambda count: torch.arange(count).flip(0)}, "expected a new random order"),
        ({"order": lambda count: torch.arange(count).view(-1, 16)[torch.randperm(count // 16)].flatten()}, "in which"),
    ],
)
def test_faults_exercise_is_not_fooled(cheat, said, capsys):
    assert exercises.check("07.faults", an_epoch)
    assert not exercises.check("07.faults", partial(an_epoch, **cheat))
    assert said in capsys.readouterr().out


def test_faults_exercise_asks_for_train_mode_also_in_a_second_epoch(capsys):
    def as_it_is(model, *rest):
        with mock.patch.object(model, "train"):
            return an_epoch(model, *rest)

    assert not exercises.check("07.faults", as_it_is)
    assert "on 0 images in train mode" in capsys.readouterr().out


def test_faults_exercise_takes_a_step_that_reads_once():
    assert exercises.check("07.faults", partial(an_epoch, read=float, every=100))
    assert exercises.check("07.faults", partial(an_epoch, keep=lambda loss: loss.detach().to(torch.float64)))


def test_faults_exercise_finds_the_graphs_in_a_running_sum(capsys):
    total = 0.0

    def add(loss):
        nonlocal total
        total = total + loss
        return loss.detach()

    assert not exercises.check("07.faults", partial(an_epoch, keep=add))
    assert "the graphs of 12 steps are still there" in capsys.readouterr().out


def test_faults_exercise_names_the_fetching_of_images_one_by_one(capsys):
    def epoch(model, optimizer, images, labels, *validation):
        one_by_one = torch.stack([image.clone() for image in images])
        return an_epoch(model, optimizer, one_by_one, labels, *validation)

    assert not exercises.check("07.faults", epoch)
    assert "images are fetched or augmented one by one in Python" in capsys.readouterr().out


def with_verdict(verdict, **wrong):
    return *exercises.judged_pairs(**wrong)[:2], verdict


@pytest.mark.parametrize("verdict", ["supported", "refuted", "inconclusive"])
def test_verdict_exercise_looks_at_the_numbers_first(verdict, capsys):
    assert not exercises.check("08.verdict", with_verdict(verdict, quantile=1.96))
    assert "1.96 is the normal quantile" in capsys.readouterr().out
    assert not exercises.check("08.verdict", (*exercises.judged_pairs()[1::-1], verdict))
    assert "you swapped them" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("verdict", "said"),
    [("refuted", "reaches above the margin"), ("supported", "Zero is outside"), ("yes", "Expected a tuple")],
)
def test_verdict_exercise_judges_the_verdict_of_right_numbers(verdict, said, capsys):
    assert not exercises.check("08.verdict", with_verdict(verdict))
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("logarithm", [math.log, lambda factor: float(np.log(np.float64(factor)))])
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_steps_exercise_names_the_rate_that_lands_at_the_bottom(logarithm, capsys):
    def needed(curvatures, lr):
        slowest = max(abs(1 - lr * curvature) for curvature in curvatures)
        return math.inf if slowest >= 1 else math.ceil(math.log(0.01) / logarithm(slowest))

    assert not exercises.check("01.steps", needed)
    assert "log(0) has no value: treat it apart" in capsys.readouterr().out


def test_an_answer_of_the_right_type_is_not_called_wrong_for_its_type(capsys):
    assert not exercises.check("08.verdict", (3.1, 4.1, "supported"))
    assert "type" not in capsys.readouterr().out.partition("Expected")[0]


def test_hints_come_one_at_a_time_and_begin_again(number, capsys):
    for _ in range(3):
        exercises.hint(number)
    said = capsys.readouterr().out.splitlines()
    assert said == ["Hint 1 of 2: Count.", "Hint 2 of 2: Count again.", "Hint 1 of 2: Count."]


@pytest.mark.parametrize("function", [exercises.quiz, exercises.hint, lambda key: exercises.check(key, 1)])
def test_unknown_key_is_named_with_those_there_are(function):
    with pytest.raises(KeyError, match=r"no (quiz|exercise) is called '00.typo'; there are: .*00\.") as error:
        function("00.typo")
    assert "__" not in str(error.value)


# ------------------------------------------------------------------------------------------------------- the quizzes


@pytest.fixture
def shown(monkeypatch) -> list:
    """What a quiz displays, and the widgets that it makes."""
    import IPython.display
    import ipywidgets

    outputs = []
    monkeypatch.setattr(IPython.display, "display", lambda *things, raw=False: outputs.extend(things))
    box = ipywidgets.VBox
    monkeypatch.setattr(ipywidgets, "VBox", lambda children: outputs.extend(children) or box(children))
    return outputs


@every_quiz
def test_quiz_reads_without_a_kernel(key, shown):
    exercises.quiz(key)
    markdown, _, _, widget = shown
    assert QUIZZES[key].question in markdown.data
    assert [option.text in markdown.data for option in QUIZZES[key].options] == [True] * len(QUIZZES[key].options)
    assert not any(option.because in markdown.data for option in QUIZZES[key].options)
    assert widget["text/plain"].startswith("(Run this cell")


def test_quiz_answers_each_choice(shown, monkeypatch):
    options = (Option("one", "Too few."), Option("two", "a < b & c", right=True))
    monkeypatch.setitem(REGISTRY, "quiz", Quiz("How many?", options))
    exercises.quiz("quiz")
    _, buttons, feedback, _ = shown
    assert feedback.value == ""
    buttons.value = "A"
    assert feedback.value == "✘ Too few."
    buttons.value = "B"
    assert feedback.value == "✔ a &lt; b &amp; c"


# ------------------------------------------------------------------------------------------------------- the lessons


def used(function: str) -> set[str]:
    """The keys that the lessons' code, hints that are commented out included, gives to a function of this module."""
    code = [cell.source for lesson in LESSONS.values() for cell in lesson.cells if cell.cell_type == "code"]
    return set(re.findall(rf'exercises\.{function}\(\s*"([^"]+)"', "\n".join(code)))


def test_every_key_is_used_and_every_used_key_exists():
    assert used("quiz") == set(QUIZZES)
    assert used("check") == set(EXERCISES)
    assert used("hint") == set(EXERCISES)


@pytest.mark.parametrize("key", REGISTRY)
def test_key_begins_with_its_lesson(key):
    number, name = key.split(".")
    [lesson] = [lesson for stem, lesson in LESSONS.items() if stem.startswith(f"{number}_")]
    assert any(f'"{key}"' in cell.source for cell in lesson.cells)
    assert re.fullmatch(r"[a-z_]+", name)


@every_exercise
def test_lesson_holds_an_open_answer_and_a_folded_solution_that_is_checked(key):
    reader, solution = cells_that_check(key)
    assert "..." in reader.source
    assert f'assert exercises.check("{key}", ' in solution.source
    assert solution.metadata["tags"] == ["solution"]
    assert solution.metadata["jupyter"]["source_hidden"] is True


# ------------------------------------------------------------------------------------------------------- progress


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """A cache folder in which nobody has solved anything."""
    monkeypatch.setenv("CNN_CACHE_DIR", str(tmp_path))
    return tmp_path


def shown_progress(monkeypatch) -> str:
    """What `progress` shows."""
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    exercises.progress()
    return shown[0].data


def test_a_solved_exercise_is_remembered_and_no_other(number, own_cache, monkeypatch):
    assert "○" in shown_progress(monkeypatch)
    assert "●" not in shown_progress(monkeypatch)
    exercises.check("number", 3)
    exercises.check("number", ...)
    exercises.check("number", 2, quiet=True)  # a folded solution
    assert exercises.solved_keys() == set()
    exercises.check("number", 2)
    exercises.check("number", 3)  # once solved is solved
    assert exercises.solved_keys() == {"number"}
    assert "| number | ● | – |" in shown_progress(monkeypatch)


def test_progress_has_every_exercise_of_every_lesson(own_cache, monkeypatch):
    text = shown_progress(monkeypatch)
    assert text.count("○") == len(EXERCISES)
    assert all(f"`{key}`" in text for key in EXERCISES)


@pytest.mark.parametrize("content", ["", "{", "3", '{"a": 1}', "[1, null]", "\x00"])
def test_a_damaged_note_is_as_none(number, own_cache, content):
    (own_cache / exercises.SOLVED).write_text(content)
    for look in (exercises.solved_keys, lambda: exercises.check("number", 2)):
        with pytest.warns(UserWarning, match="solved-exercises.json .* cannot be read .*: check your answers again"):
            assert look() in (set(), True)
    assert exercises.solved_keys() == {"number"}


def test_where_nothing_can_be_written_a_right_answer_is_still_right(number, own_cache, monkeypatch, capsys):
    monkeypatch.setattr(files, "write_text", lambda *_: (_ for _ in ()).throw(PermissionError("read-only")))
    assert exercises.check("number", 2) is True
    assert "✔" in capsys.readouterr().out
