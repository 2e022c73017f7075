"""The lessons' quizzes and exercises: what they ask, what each wrong answer gives away, and what to say to it."""

import copy
import html
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from utils import ablation, train, widgets


@dataclass(frozen=True)
class Option:
    """One option of a quiz, and the sentence said to whoever chooses it: why it is right, or what is mistaken in it."""

    text: str
    because: str
    right: bool = False


@dataclass(frozen=True)
class Quiz:
    """A question to answer before the lesson does: Markdown, and its options in the order in which they are shown."""

    question: str
    options: tuple[Option, ...]


@dataclass(frozen=True)
class Mistake:
    """A wrong answer that a misconception leads to, and one sentence that names the misconception."""

    answer: Any
    because: str


@dataclass(frozen=True)
class Exercise:
    """An exercise that checks itself: an answer is right, or a known mistake, when it *measures* the same as one.

    `measure` turns an answer into what is compared: numbers, tensors, or anything with ==. An answer that is a function
    is measured by what it does on an input made for it; an answer that is a number needs no `measure`.
    """

    expects: str  # what an answer is, after "expected": "a tuple (N, C, H, W) of whole numbers"
    right: Any  # a right answer
    because: str  # the sentence said to it
    mistakes: tuple[Mistake, ...]
    hints: tuple[str, ...]  # step by step, none of them the solution
    measure: Callable[[Any], Any] = lambda answer: answer
    tolerance: float = 1e-4  # largest difference, relative to the largest number in the right answer


Item = TypeVar("Item", Quiz, Exercise)


def quiz(key: str) -> None:
    """Show the quiz called `key`: question and options as Markdown, which reads without a kernel too, and buttons.

    On the keyboard, Tab moves between the buttons and Space chooses. Raises KeyError for an unknown key.
    """
    import ipywidgets
    from IPython.display import Markdown, display

    question = find(key, Quiz)
    letters = "ABCDEFGH"[: len(question.options)]
    lines = [f"- **{letter}**: {option.text}" for letter, option in zip(letters, question.options, strict=True)]
    display(Markdown("\n".join([f"**Predict.** {question.question}", "", *lines])))

    in_a_row = "orientation" in ipywidgets.RadioButtons.class_trait_names()  # not in the ipywidgets of Colab
    options = {"orientation": "horizontal"} if in_a_row else {}
    buttons = ipywidgets.RadioButtons(options=list(letters), index=None, description="I say", **options)
    feedback = ipywidgets.HTMLMath()

    def answer(change: dict) -> None:
        chosen = question.options[letters.index(change["new"])]
        feedback.value = f"{'✔' if chosen.right else '✘'} {html.escape(chosen.because, quote=False)}"

    buttons.observe(answer, "value")
    widgets.show(ipywidgets.VBox([buttons, feedback]), "(Run this cell to choose an answer.)")


def check(key: str, answer: Any, quiet: bool = False) -> bool | None:
    """Print ✔ or ✘ with one sentence, and return True, False, or None for `...`, an answer that is not there yet.

    Whatever the answer is or does when it is tried, this says so and does not raise. `quiet` prints nothing when the
    answer is right: a folded solution is checked without being given away. Raises KeyError for an unknown key.
    """
    exercise = find(key, Exercise)
    if answer is ...:
        print(f'○ Not answered yet; exercises.hint("{key}") helps.')
        return None
    right, sentence = judge(exercise, answer)
    if not (right and quiet):
        print("✔" if right else "✘", sentence)
    return right


def hint(key: str) -> None:
    """Print the next hint for the exercise `key`, after the last one the first. Raises KeyError for an unknown key."""
    print(next(hints(key)))


@cache
def hints(key: str) -> Iterator[str]:
    """Return the endless round of an exercise's hints; the same one each time, so that it goes on where it stopped."""
    steps = find(key, Exercise).hints
    return itertools.cycle([f"Hint {number} of {len(steps)}: {step}" for number, step in enumerate(steps, start=1)])


def find(key: str, kind: type[Item]) -> Item:
    """Return the quiz or exercise called `key`. Raises KeyError that lists those of this kind."""
    there = {name: item for name, item in REGISTRY.items() if isinstance(item, kind)}
    if key not in there:
        raise KeyError(f"no {kind.__name__.lower()} is called {key!r}; there are: {', '.join(there)}")
    return there[key]


def judge(exercise: Exercise, answer: Any) -> tuple[bool, str]:
    """Return whether `answer` is right, and the sentence to say."""
    try:
        got = measured(exercise, answer)
    except (Exception, SystemExit) as error:
        return False, f"That stopped with {name_error(error)}. Expected {exercise.expects}."
    right = measured(exercise, exercise.right)
    if same(got, right, exercise.tolerance):
        return True, exercise.because
    for mistake in exercise.mistakes:
        if same(got, measured(exercise, mistake.answer), exercise.tolerance):
            return False, mistake.because
    return False, f"{oddity(got, right)} Expected {exercise.expects}."


def measured(exercise: Exercise, answer: Any) -> Any:
    """Return what is compared of `answer`, from the same random numbers each time, without touching the reader's."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        return exercise.measure(answer)


def same(got: Any, wanted: Any, tolerance: float) -> bool:
    """True if both are equal, or hold the same numbers to `tolerance` times the largest one wanted. Never raises."""
    a, b = as_numbers(got), as_numbers(wanted)
    if a is not None and b is not None:
        scale = float(b.abs().max()) if b.numel() else 1.0
        return a.shape == b.shape and torch.allclose(a, b, rtol=0.0, atol=tolerance * (scale or 1.0))
    try:
        return type(got) is type(wanted) and bool(got == wanted)
    except Exception:  # an answer may hold anything, also an == that fails
        return False


def as_numbers(value: Any) -> Tensor | None:
    """Return a number, tensor, array or nested sequence of numbers as a float64 tensor; None for everything else."""
    try:
        return torch.as_tensor(value, dtype=torch.float64, device="cpu").detach()
    except Exception:  # the many ways of not being a number
        return None


def oddity(got: Any, wanted: Any) -> str:
    """Return a sentence on what is strange in a wrong result; it does not give the right one away."""
    a, b = as_numbers(got), as_numbers(wanted)
    if a is None or b is None:
        return f"That is not it, it is of type {type(got).__name__}."
    if a.shape != b.shape:
        return f"That is not it: its shape is {tuple(a.shape)}."
    if not a.isfinite().all():
        return "That is not it: it holds NaN or infinity."
    return "That is not it, and none of the usual mistakes either."


def name_error(error: BaseException) -> str:
    """Return an exception's type and the first line of its message, whatever the message is."""
    try:
        line = next(iter(str(error).splitlines()), "")
    except Exception:
        line = ""
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


# ------------------------------------------------------------------------------------------------ 00 Start here


def in_halves(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    *,
    share: float = 0.5,
    clear_first: bool = True,
    clear_each: bool = False,
    step_each: bool = False,
) -> None:
    """Take one training step on a batch in two halves; the options are the mistakes that one can make in it."""
    if clear_first:
        optimizer.zero_grad()
    for x, y in zip(images.chunk(2), labels.chunk(2), strict=True):
        if clear_each:
            optimizer.zero_grad()
        (share * F.cross_entropy(model(x), y)).backward()
        if step_each:
            optimizer.step()
    if not step_each:
        optimizer.step()


def weights_after_steps(step: Callable[[nn.Module, torch.optim.Optimizer, Tensor, Tensor], None]) -> Tensor:
    """Return the weights of a small linear model after two calls of `step` on batches of 8 images of 5 values.

    Raises ValueError when `step` passes more than 4 of them through the model at once.
    """

    def watch(model: nn.Module, inputs: tuple[Tensor]) -> None:
        if len(inputs[0]) > 4:
            raise ValueError(f"{len(inputs[0])} images at once are too many for the memory, of a batch of 8")

    model = nn.Linear(5, 3)
    model.register_forward_pre_hook(watch)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(2):
        step(model, optimizer, torch.randn(8, 5), torch.randint(3, (8,)))
    return model.weight


LESSON_00 = {
    "00.first_loss": Quiz(
        "The network above has random weights and ten classes to choose from. How large is its cross-entropy loss "
        "before it has learned anything?",
        (
            Option(
                "about 0.9, because nine answers of ten are wrong",
                "0.9 is the error rate; cross-entropy is −ln of the probability that the true class was given.",
            ),
            Option(
                "about ln 10 ≈ 2.3, because each class gets about one tenth of the probability",
                "Nothing learned means a probability near 1/10 for the true class, and −ln(1/10) = ln 10.",
                right=True,
            ),
            Option(
                "about 10, one for each class",
                "The classes do not add up: only the probability of the true class enters the loss.",
            ),
            Option(
                "it can be anything, because random weights are sure of random answers",
                "Weights of just any size would; initialization and normalization keep the logits near unit size.",
            ),
        ),
    ),
    "00.shape": Exercise(
        expects="a tuple (N, C, H, W) of whole numbers",
        right=(10, 64, 12, 10),
        because="The stem and layers 2 and 3 halve the image, and layers 2 and 3 double the channels.",
        mistakes=(
            Mistake((10, 64, 6, 5), "Layer 1 keeps the image as the stem left it: only layers 2 to 4 halve it again."),
            Mistake((10, 64, 24, 20), "The stem pools: the image is half as large before the first layer sees it."),
            Mistake((10, 128, 12, 10), "Layer 1 has as many channels as the stem: doubling begins with layer 2."),
            Mistake((10, 64, 10, 12), "Height comes before width in N×C×H×W."),
            Mistake((10, 12, 10, 64), "PyTorch's order is N×C×H×W: channels come before height and width."),
        ),
        hints=(
            "Begin behind the stem: how many channels are there, and what does pooling do to height and width?",
            "Go layer by layer: which of layers 1, 2 and 3 have stride 2?",
            "A layer with stride 2 halves height and width, and doubles the channels of the layer before it.",
        ),
    ),
    "00.halves": Exercise(
        expects="a function f(model, optimizer, images, labels) that takes one training step",
        right=in_halves,
        because="The gradient of the batch's mean loss is the mean of the halves' gradients, and backward() adds up.",
        mistakes=(
            Mistake(
                partial(in_halves, share=1.0),
                "Your step is twice as long: each half's loss is a mean over that half, and the gradients are added.",
            ),
            Mistake(
                partial(in_halves, share=1.0, clear_each=True),
                "Only the second half counts: zero_grad() between the halves throws the first half's gradient away.",
            ),
            Mistake(
                partial(in_halves, clear_each=True),
                "Only the second half counts, and half as much as it should: zero_grad() belongs before both halves.",
            ),
            Mistake(
                partial(in_halves, share=1.0, clear_each=True, step_each=True),
                "Those are two steps on small batches: the second half saw weights that the first had already changed.",
            ),
            Mistake(
                partial(in_halves, clear_first=False),
                "The second call still carries the first call's gradient: something has to clear it.",
            ),
            Mistake(
                lambda model, optimizer, images, labels: None,
                "The weights did not move: what computes the gradients, and what applies them?",
            ),
        ),
        hints=(
            "backward() adds to the gradients that are there; zero_grad() clears them. When must they be cleared?",
            "images.chunk(2) gives two halves, each with a forward and a backward pass. How many optimizer steps?",
            "The loss of the whole batch is a mean over all its images. What is it in terms of the two halves' losses?",
        ),
        measure=weights_after_steps,
    ),
}

# ----------------------------------------------------------------------------------------- 01 Data statistics

Triple = tuple[float, float, float]  # how many values, their mean, their standard deviation


def combine(a: Triple, b: Triple, *, within: bool = True, between: bool = True, root: bool = True) -> Triple:
    """Return count, mean and std of two sets of values together; the options are what one can leave out."""
    (n_a, mean_a, std_a), (n_b, mean_b, std_b) = a, b
    n = n_a + n_b
    mean = (n_a * mean_a + n_b * mean_b) / n
    variance = within * (n_a * std_a**2 + n_b * std_b**2) / n
    variance += between * (n_a * (mean_a - mean) ** 2 + n_b * (mean_b - mean) ** 2) / n
    return n, mean, variance**0.5 if root else variance


def averaged(a: Triple, b: Triple, *, weighted: bool) -> Triple:
    """Return the count, and the averages of the two means and stds, weighted by the counts or not."""
    share = b[0] / (a[0] + b[0]) if weighted else 0.5
    return a[0] + b[0], (1 - share) * a[1] + share * b[1], (1 - share) * a[2] + share * b[2]


def combined_cases(function: Callable[[Triple, Triple], Triple]) -> list[list[float]]:
    """Return what `function` makes of sets that differ in count, in mean and in spread."""
    a, b, c = (2.0, 0.2, 0.1), (6.0, 0.7, 0.3), (3.0, 0.2, 0.1)
    return [list(function(a, b)), list(function(b, c)), list(function(a, c))]


def steps_needed(
    curvatures: Sequence[float],
    lr: float,
    *,
    pick: Callable[[list[float]], float] = max,
    rounded: Callable[[float], float] = math.ceil,
) -> float:
    """Return how many steps of gradient descent bring the distance along each axis of a quadratic to 1 % or less.

    `math.inf` if some distance does not shrink. The options are the mistakes that one can make in it.
    """
    slowest = pick([abs(1 - lr * curvature) for curvature in curvatures])
    return math.inf if slowest >= 1 else rounded(math.log(0.01) / math.log(slowest))


def steps_cases(function: Callable[[list[float], float], float]) -> list[float]:
    """Return what `function` says of a round bowl, of narrow ones, and of rates that overshoot or diverge; ∞ is -1."""
    cases = [([1.0, 4.0], 0.2), ([4.0, 1.0], 0.3), ([100.0, 3.0, 1.0], 0.012), ([4.0, 1.0], 0.48), ([4.0, 1.0], 0.52)]
    said = [function(list(curvatures), lr) for curvatures, lr in cases]
    return [-1 if value == math.inf else value for value in said]


LESSON_01 = {
    "01.average_std": Quiz(
        "You take the standard deviation of every training image over its own pixels, and average those numbers. "
        "Compared with the standard deviation of all pixels of all images together, the average is …",
        (
            Option(
                "the same, as it is for the mean: all images have equally many pixels",
                "That holds for the mean; but a deviation is measured from a mean, and each image has its own.",
            ),
            Option(
                "smaller",
                "Each image is measured from its own mean, so that the differences between the images are lost.",
                right=True,
            ),
            Option(
                "larger",
                "The other way round: an image's pixels lie closer to their own mean than to the common one.",
            ),
            Option(
                "smaller or larger, that depends on the images",
                "Only by how much depends on them: the average is never larger.",
            ),
        ),
    ),
    "01.combine": Exercise(
        expects="a function of two triples (count, mean, std) that returns one",
        right=combine,
        because="Variance within the two sets plus variance between their means: that combines any number of sets.",
        mistakes=(
            Mistake(
                partial(averaged, weighted=True),
                "Your std is an average of stds: average squares, and add what lies between.",
            ),
            Mistake(
                partial(averaged, weighted=False),
                "You average as if both sets were equally large: weight by the counts.",
            ),
            Mistake(
                partial(combine, between=False),
                "You have the variance within the two sets; their means differ too, and that is variance as well.",
            ),
            Mistake(
                partial(combine, within=False),
                "You have the variance between the two means only: add the one within the sets.",
            ),
            Mistake(
                partial(combine, root=False),
                "That is the variance of both together: a standard deviation is its square root.",
            ),
        ),
        hints=(
            "The mean of both together is an average weighted by the counts.",
            "Go from stds to variances first; the law of total variance speaks of variances.",
            "Within: the average of the two variances. Between: the average of the squared distances of the two means "
            "from the common one. Both are weighted by the counts, like the mean.",
        ),
        measure=combined_cases,
    ),
    "01.scale": Quiz(
        "You feed a network bytes from 0 to 255 instead of pixels from 0 to 1: its input is 255 times as large, its "
        "initial weights are the same. How steep is the loss now, as a function of the weights?",
        (
            Option(
                "As steep as before: a scale is only a unit, and no network cares about units",
                "Its weights care: a step of one weight by 0.01 now changes the output 255 times as much.",
            ),
            Option(
                "Much steeper, whatever network it is",
                "Without normalization inside, yes; but batch norm divides by the standard deviation that it finds, "
                "and the scale is gone.",
            ),
            Option(
                "Much steeper without batch norm, exactly as steep with it",
                "The first batch norm divides by the standard deviation of its input: a factor cancels, and so does "
                "its effect on every derivative behind it.",
                right=True,
            ),
            Option(
                "Much steeper with batch norm, because its statistics grow too",
                "They grow, and that is the cure: what is 255 times as large is divided by 255 times as much.",
            ),
        ),
    ),
    "01.steps": Exercise(
        expects="a function of a list of curvatures and a learning rate that returns a number of steps, or math.inf",
        right=steps_needed,
        because="The slowest axis decides: the flattest one at small rates, the steepest one when it overshoots.",
        mistakes=(
            Mistake(
                partial(steps_needed, pick=min),
                "You follow the axis that arrives first; all of them have to, so the slowest decides.",
            ),
            Mistake(
                lambda curvatures, lr: steps_needed([max(curvatures)], lr),
                "You follow the steepest axis only: the flattest is slower, as long as nothing overshoots.",
            ),
            Mistake(
                lambda curvatures, lr: steps_needed([min(curvatures)], lr),
                "You follow the flattest axis only: at a large rate the steepest one overshoots and is slower.",
            ),
            Mistake(
                partial(steps_needed, rounded=math.floor),
                "Rounded down, the distance is still above 1 %: steps are whole, so round up.",
            ),
            Mistake(
                partial(steps_needed, rounded=lambda steps: steps),
                "There is no part of a step: round up to a whole number.",
            ),
            Mistake(
                lambda curvatures, lr: math.ceil(math.log(100) * max(curvatures) / min(curvatures)),
                "That is the rule of thumb for one rate, 1 / λ_max: your answer must depend on lr.",
            ),
        ),
        hints=(
            "After n steps the distance along an axis of curvature λ is |1 − lr·λ| to the power n of what it was.",
            "Which axis has the largest |1 − lr·λ|? What does it mean when that is 1 or more?",
            "Solve factor ** n ≤ 0.01 for n with logarithms; mind the sign of the logarithm of a number below 1.",
        ),
        measure=steps_cases,
    ),
}

# ------------------------------------------------------------------------------------------- 02 Size and pooling

MOST_PARAMETERS, MOST_FLOPS, LEAST_ACCURACY = 8_000, 2_000_000, 0.55  # of the network that "02.budget" asks for


def small_network(channels: tuple[int, ...] = (8, 16, 32), strides: tuple[int, ...] = (2, 2, 2)) -> nn.Module:
    """Return 3×3 convolutions with batch norm and ReLU, the average of each map, and a linear head."""
    layers: list[nn.Module] = []
    for c_in, c_out, stride in zip((1, *channels[:-1]), channels, strides, strict=True):
        layers += [nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], 10))


def kept_budgets(build: Callable[[], nn.Module]) -> list[bool]:
    """Return whether the network that `build` makes takes 28×28 and 40×40 images, keeps each budget, and learns.

    Raises TypeError when `build` returns no nn.Module.
    """
    network = build()
    if not isinstance(network, nn.Module):
        raise TypeError(f"one nn.Module should come back, not {type(network).__name__}")
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        fits = network.eval()(torch.zeros(1, 1, 28, 28)).shape == (1, 10)
    parameters = sum(weight.numel() for weight in network.parameters())
    cheap = [parameters <= MOST_PARAMETERS, counter.get_total_flops() <= MOST_FLOPS]
    fits = fits and takes(network, 40)
    return [fits, *cheap, fits and all(cheap) and learned(network) >= LEAST_ACCURACY]


def takes(network: nn.Module, size: int) -> bool:
    """Return whether `network` makes ten numbers of a grey image of size × size."""
    try:
        return network(torch.zeros(1, 1, size, size)).shape == (1, 10)
    except RuntimeError:  # what layers raise for a shape that they cannot take
        return False


def learned(network: nn.Module) -> float:
    """Return the validation accuracy of `network` after three epochs of 1,280 images; a small one takes a second."""
    images = ablation.load(ablation.Source(images=1_280))
    images = replace(images, validation=images.validation[:1_000])
    recipe = train.Recipe(epochs=3, batch_size=64, lr=0.2, crop_padding=0, flip=False)
    history = train.fit(network, images, recipe, device="cpu", precision="fp32", progress=False)
    return history.last("validation", "accuracy")


LESSON_02 = {
    "02.flops": Quiz(
        "In layer 2 a 3×3 convolution turns 32 channels of 8×8 numbers into as many. In layer 3 one turns 64 channels "
        "of 4×4 numbers into as many: twice the channels, half the height and half the width. How many "
        "multiplications does it take, compared with the one in layer 2?",
        (
            Option(
                "half as many, because there are half as many numbers",
                "There are half as many numbers, but each of them is now a sum over twice as many channels.",
            ),
            Option(
                "as many",
                "A quarter of the places, twice the channels in, twice the channels out: ¼ · 2 · 2 = 1.",
                right=True,
            ),
            Option(
                "twice as many, because the channels double",
                "They double on both sides, in and out, and the places are a quarter.",
            ),
            Option(
                "four times as many, like the parameters",
                "It has four times the weights, but slides them over a quarter of the places.",
            ),
        ),
    ),
    "02.one_pixel": Quiz(
        "Shift an image by one pixel, and a convolution's output shifts by one pixel. So if all validation images move "
        "one pixel to the right, how many of the network's answers change?",
        (
            Option(
                "none, because convolutions shift along and the average over the map forgets the place",
                "So it would be without strides; but from a shift by one pixel, every second pixel is another one.",
            ),
            Option(
                "none, because max pooling makes the network invariant to small shifts",
                "It forgets where in its 2×2 window the largest value was; a shift also moves values between windows.",
            ),
            Option(
                "some of them",
                "Halving keeps shifts by whole strides only: anything between gives other numbers, and some answers "
                "tip over.",
                right=True,
            ),
            Option(
                "nearly all, because the network has learned from centred images only",
                "It has, but neighbouring shifts look alike to it, and most answers stand.",
            ),
        ),
    ),
    "02.stack": Exercise(
        expects="a tuple (C, H, W, parameters) of whole numbers",
        right=(24, 7, 7, 4712),
        because="The sizes are 30, 15, 7, 7, and the parameters 1,200 + 32 + 3,456 + 24.",
        tolerance=1e-6,
        mistakes=(
            Mistake((24, 8, 8, 4712), "You rounded up: a window that does not fit any more is left out."),
            Mistake((24, 5, 5, 4712), "The pooling's window has side 3, but it moves by its stride of 2, not by 3."),
            Mistake((24, 6, 6, 4712), "One of the two paddings is missing: each adds pixels on both sides."),
            Mistake((24, 7, 7, 4688), "The second convolution has biases, one for each output channel."),
            Mistake((24, 7, 7, 4728), "The first convolution has no biases: bias=False."),
            Mistake((24, 7, 7, 4680), "Batch norm has parameters too: a γ and a β for each channel."),
            Mistake((24, 7, 7, 4744), "Running mean and variance are buffers: they are kept, but not trained."),
            Mistake((24, 7, 7, 4696), "Batch norm has two parameters for each channel, γ and β."),
            Mistake((10, 24, 7, 7), "Asked for are C, H, W and the parameters; the number of images stays out of it."),
        ),
        hints=(
            "Along one side: (length + 2 · padding − kernel) / stride + 1, rounded down. Which layers change it?",
            "A convolution has kernel · kernel · channels in · channels out weights, and channels out biases if any.",
            "Which of the five layers have something to learn? For each of them, print its .parameters() in your mind.",
        ),
    ),
    "02.budget": Exercise(
        expects="a function without arguments that returns an nn.Module, N×1×28×28 → N×10",
        right=small_network,
        because="Few channels while the maps are large, more as they shrink: both budgets are kept, and it learns.",
        mistakes=(
            Mistake(
                partial(small_network, (8, 16, 64, 64), (2, 2, 2, 1)),
                "Too many parameters: a 3×3 convolution has 9 · channels in · channels out; where are most of yours?",
            ),
            Mistake(
                partial(small_network, (16, 16), (1, 1)),
                "Too many FLOPs: every weight is used at every place; make the maps smaller early.",
            ),
            Mistake(
                partial(small_network, (32, 64, 64), (1, 2, 1)),
                "Too many parameters and too many FLOPs: fewer channels help with both.",
            ),
            Mistake(
                lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 10)),
                "It takes images of 28×28 only: average each channel over its map before the linear head.",
            ),
            Mistake(
                partial(small_network, (2,), (2,)),
                "It keeps both budgets but hardly learns: it may spend more of them, on channels and on layers.",
            ),
        ),
        hints=(
            "The course's way: halve the maps by strides or pooling, and double the channels as you do.",
            "End with nn.AdaptiveAvgPool2d(1), nn.Flatten() and a linear layer: then any image size will do.",
            "Three convolutions are enough. Begin with few channels, and count as you go: "
            "sum(weight.numel() for weight in network.parameters()).",
        ),
        measure=kept_budgets,
    ),
}

# --------------------------------------------------------------------------------------- 03 Batch normalization


def fold(
    conv: nn.Conv2d,
    norm: nn.BatchNorm2d,
    *,
    axis: int = 0,
    root: bool = True,
    eps: bool = True,
    mean: bool = True,
    bias: bool = True,
    scaled_bias: bool = True,
) -> nn.Conv2d:
    """Return one convolution that does what `conv` and `norm` behind it do; the options are what one can get wrong."""
    variance = norm.running_var + (norm.eps if eps else 0.0)
    scale = norm.weight / (variance.sqrt() if root else variance)  # C
    folded = copy.deepcopy(conv)
    folded.weight = nn.Parameter(conv.weight * scale.view([-1 if place == axis else 1 for place in range(4)]))
    offset = torch.zeros_like(scale) if conv.bias is None or not bias else conv.bias
    offset = offset - norm.running_mean if mean else offset
    folded.bias = nn.Parameter(norm.bias + (offset * scale if scaled_bias else offset))
    return folded


def folded_outputs(function: Callable[[nn.Conv2d, nn.BatchNorm2d], nn.Conv2d]) -> Tensor:
    """Return what two folded convolutions, one with a bias and one without, make of 2×4×6×6 activations.

    Raises TypeError when `function` returns anything but one convolution.
    """
    outputs = []
    for bias, stride in ((True, 1), (False, 2)):
        conv, norm = nn.Conv2d(4, 4, 3, stride, padding=1, bias=bias), nn.BatchNorm2d(4, eps=1e-2).eval()
        for values in (norm.weight, norm.bias, norm.running_mean):
            nn.init.normal_(values)
        nn.init.uniform_(norm.running_var, 0.02, 0.5)
        folded = function(conv, norm)
        if not isinstance(folded, nn.Conv2d):
            raise TypeError(f"one nn.Conv2d should come back, not {type(folded).__name__}")
        outputs.append(folded(torch.randn(2, 4, 6, 6)).flatten())
    return torch.cat(outputs)


LESSON_03 = {
    "03.means": Quiz(
        "A batch of 64 images leaves a convolution with 32 channels of 14×14 numbers. How many means does batch "
        "normalization compute?",
        (
            Option(
                "64, one for each image",
                "That is layer normalization: an image by itself. Batch normalization mixes the images of a batch.",
            ),
            Option(
                "32, one for each channel",
                "A channel's mean is taken over all images and all places, for the same kernel made all of them.",
                right=True,
            ),
            Option(
                "2,048, one for each channel of each image",
                "That is instance normalization: no number of another image takes part.",
            ),
            Option(
                "6,272, one for each place of each channel",
                "So it would be behind a linear layer; a convolution uses one kernel at all places, and they belong "
                "together.",
            ),
        ),
    ),
    "03.without_eval": Quiz(
        "A well-trained network with batch normalization classifies validation images in batches of 100, sorted by "
        "class: first 100 T-shirts, then 100 trousers, … Somebody forgot `.eval()`. Compared with the right mode, the "
        "accuracy is …",
        (
            Option(
                "the same, because no weight has changed",
                "The weights are the same, but mean and variance now come from the batch: other numbers arrive.",
            ),
            Option(
                "a little lower, because the statistics of 100 images are noisy",
                "So it would be for mixed images; but here all images of a batch resemble each other.",
            ),
            Option(
                "far lower, because each batch is normalized by the statistics of its own class",
                "What tells a class from the average image is subtracted, and the network no longer sees it.",
                right=True,
            ),
            Option(
                "higher, because the statistics fit the images at hand",
                "They fit too well: they take away what all images of the batch have in common, their class.",
            ),
        ),
    ),
    "03.fold": Exercise(
        expects="a function f(conv, norm) that returns one nn.Conv2d",
        right=fold,
        because="Both are linear for fixed statistics, so one convolution does the work of both.",
        mistakes=(
            Mistake(
                partial(fold, root=False),
                "You divide by the variance: batch normalization divides by its square root.",
            ),
            Mistake(
                partial(fold, eps=False),
                "You left ε out: it is part of the division, and counts where a variance is small.",
            ),
            Mistake(
                partial(fold, axis=1),
                "You scale the channels that come in: a weight is out_channels×in_channels×height×width.",
            ),
            Mistake(
                partial(fold, mean=False),
                "The running mean is still in there: batch normalization subtracts it before it scales.",
            ),
            Mistake(
                partial(fold, bias=False),
                "The convolution's own bias is lost: where there is one, it is normalized too.",
            ),
            Mistake(
                partial(fold, scaled_bias=False),
                "What the convolution adds, less the mean, passes through the scaling as well: you only added it.",
            ),
            Mistake(
                lambda conv, norm: copy.deepcopy(conv),
                "That is the convolution as it was: the normalization has to go into its weight and its bias.",
            ),
        ),
        hints=(
            "In .eval() mode every channel is multiplied by one number and has another one added. Which two?",
            "A convolution that is multiplied by a number is the convolution whose weights are multiplied by it; each "
            "output channel has its own.",
            "Write y = γ · (W∗x + b − mean) / √(var + ε) + β, and sort it into what stands before x and what does not.",
        ),
        measure=folded_outputs,
        tolerance=1e-5,
    ),
}

REGISTRY: dict[str, Quiz | Exercise] = {**LESSON_00, **LESSON_01, **LESSON_02, **LESSON_03}
