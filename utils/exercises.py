"""The lessons' quizzes and exercises: what they ask, what each wrong answer gives away, and what to say to it."""

import contextlib
import copy
import html
import itertools
import math
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, TypeVar
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from utils import ablation, data, files, train, widgets
from utils.model import CNN, Block, CNNConfig

SOLVED = "solved-exercises.json"  # in the cache folder: the keys of exercises that were solved on this machine
NEARLY = 0.1  # a tolerance: within it an answer is told that it is nearly right, where an exercise has words for that


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
    nearly: str = ""  # the sentence said to an answer that is within NEARLY of the right one, and no known mistake


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
    answer is right, and keeps no note of it for `progress`: a folded solution is checked without being given away.
    Raises KeyError for an unknown key.
    """
    exercise = find(key, Exercise)
    if answer is ...:
        print(f'○ Not answered yet; exercises.hint("{key}") helps.')
        return None
    right, sentence = judge(exercise, answer)
    if not (right and quiet):
        print("✔" if right else "✘", sentence)
    if right and not quiet:
        remember(key)
    return right


def progress() -> None:
    """Show how many exercises of each lesson were solved on this machine so far, and which are open, as Markdown."""
    from IPython.display import Markdown, display

    solved, rows = solved_keys(), ["| lesson | solved | still open |", "|---|---|---|"]
    keys = [key for key, item in REGISTRY.items() if isinstance(item, Exercise)]
    for lesson, group in itertools.groupby(keys, key=lambda key: key.partition(".")[0]):
        of_lesson = list(group)
        still_open = [f"`{key}`" for key in of_lesson if key not in solved]
        done = len(of_lesson) - len(still_open)
        rows.append(f"| {lesson} | {'●' * done}{'○' * len(still_open)} | {', '.join(still_open) or '–'} |")
    display(Markdown("\n".join(rows)))


def solved_keys() -> set[str]:
    """Return the exercises that were solved on this machine: what `remember` wrote, and the empty set without that.

    Warns of a note that is damaged, or cannot be read.
    """
    try:
        return noted()
    except OSError as error:
        warn_of_the_note(error)
        return set()


def noted() -> set[str]:
    """Return what `solved_keys` does, but raise OSError where the note is there and cannot be read just now."""
    try:
        return set(files.read_record(files.cache_dir() / SOLVED)["solved"])
    except FileNotFoundError:
        return set()
    except (ValueError, KeyError, TypeError) as error:
        warn_of_the_note(error)
        return set()


def warn_of_the_note(error: Exception) -> None:
    what = f"the note of solved exercises, {SOLVED} in the cache folder, cannot be read ({error})"
    warnings.warn(f"{what}: check your answers again, which writes it anew", stacklevel=4)


def remember(key: str) -> None:
    """Note in a file of the user's cache folder that an exercise is solved; that nothing can be written is no error."""
    with contextlib.suppress(OSError, ValueError), files.alone(path := files.cache_dir() / SOLVED):
        files.write_record(path, {"solved": sorted({*noted(), key})})


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
        what, place = name_error(error), own_line(error)
        lost = " Does your function end in a return?" if "NoneType" in what and callable(answer) and not place else ""
        return False, f"That stopped with {what}{place}.{lost} Expected {exercise.expects}."
    right = measured(exercise, exercise.right)
    if same(got, right, exercise.tolerance):
        return True, exercise.because
    for mistake in exercise.mistakes:
        if same(got, measured(exercise, mistake.answer), exercise.tolerance):
            return False, mistake.because
    if exercise.nearly and same(got, right, NEARLY):
        return False, exercise.nearly
    return False, f"{oddity(got, right)} Expected {exercise.expects}."


def measured(exercise: Exercise, answer: Any) -> Any:
    """Return what is compared of `answer`, from the same random numbers each time, without touching the reader's."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.default_generator.manual_seed(0)  # `torch.manual_seed` sets those of all devices
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
    if (a is None or b is None) and type(got) is not type(wanted):
        return f"That is not it, it is of type {type(got).__name__}."
    if a is None or b is None:
        return "That is not it, and none of the usual mistakes either."
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


def own_line(error: BaseException) -> str:
    """Return at which line of the reader's cells an exception arose, in words; nothing where it was none of them."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.line for frame in frames if "ipykernel_" in frame.filename or "<ipython-input" in frame.filename]
    return f", at `{lines[-1]}`" if lines and lines[-1] else ""


# ------------------------------------------------------------------------------------------------ 00 Start here


def through_block(
    block: nn.Module,
    x: Tensor,
    *,
    between: Callable[[Tensor], Tensor] = F.relu,
    second_norm: bool = True,
    of_branch: Callable[[Tensor], Tensor] = lambda f: f,
    shortcut: Callable[[Tensor], Tensor] | None = None,
    behind: Callable[[Tensor], Tensor] = F.relu,
) -> Tensor:
    """Return what a residual block makes of N×C×H×W activations; the options are what one can get wrong."""
    f = block.conv2(between(block.norm1(block.conv1(x))))
    f = of_branch(block.norm2(f) if second_norm else f)
    return behind(f + (shortcut or block.shortcut)(x))


def block_outputs(function: Callable[[nn.Module, Tensor], Tensor]) -> Tensor:
    """Return what `function` makes of 3×4×6×5 activations with the parts of two blocks, one of which halves them.

    The blocks have no other parts than those of the lesson. Raises ValueError for an output of another shape, and when
    `function` changes the activations in place: `backward()` would need them.
    """
    outputs = []
    for fan_out in (4, 8):
        block = Block(CNNConfig(), 4, fan_out, halve=fan_out > 4).eval()
        for norm in (part for part in block.modules() if isinstance(part, nn.BatchNorm2d)):
            for values in (norm.weight, norm.bias, norm.running_mean):
                nn.init.normal_(values)
        for part in ("pool", "activation1", "activation2", "dropout"):
            delattr(block, part)
        x, shape = torch.randn(3, 4, 6, 5), (3, fan_out, *((3, 3) if fan_out > 4 else (6, 5)))
        y = function(block, given := x.clone())
        if not torch.equal(given, x):
            raise ValueError("x has changed, and backward() needs it as it was: write y = y + f in place of y += f")
        if tuple(y.shape) != shape:
            raise ValueError(f"of {tuple(x.shape)} it makes {tuple(y.shape)}, not {shape}")
        outputs.append(y.flatten())
    return torch.cat(outputs)


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

    Raises ValueError when more than 4 of them have passed through the model and still wait for `backward()`.
    """
    waiting = 0

    def count(model: nn.Module, inputs: tuple[Tensor]) -> None:
        nonlocal waiting
        waiting += len(inputs[0])
        if waiting > 4:
            raise ValueError(f"{waiting} images at once wait for backward(): too many for the memory, of a batch of 8")

    def free(gradient: Tensor) -> None:
        nonlocal waiting
        waiting = 0

    def watch(model: nn.Module, inputs: tuple[Tensor], logits: Tensor) -> None:
        nonlocal waiting
        if logits.requires_grad:
            logits.register_hook(free)  # of backward() and of torch.autograd.grad
        else:
            waiting -= len(inputs[0])

    model = nn.Linear(5, 3)
    model.register_forward_pre_hook(count)
    model.register_forward_hook(watch)
    # Momentum and weight decay tell one step from two, and half the gradient from half the learning rate.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9, weight_decay=0.1)
    for _ in range(2):
        step(model, optimizer, torch.randn(8, 5), torch.randint(3, (8,)))
    return model.weight


LESSON_00 = {
    "00.first_loss": Quiz(
        "The network above has random weights and ten classes to choose from. How large is its cross-entropy loss "
        "(minus the natural logarithm of the probability it gives to the true class, averaged) before it has learned "
        "anything?",
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
    "00.block": Exercise(
        expects="a function f(block, x) that returns what the block makes of x",
        right=through_block,
        because="Convolution, norm, ReLU, convolution, norm; then the shortcut is added, and one more ReLU.",
        mistakes=(
            Mistake(
                partial(through_block, shortcut=lambda x: 0.0),
                "That is f alone: the shortcut is missing.",
            ),
            Mistake(
                partial(through_block, behind=lambda y: y),
                "The last ReLU is missing: y may not be negative.",
            ),
            Mistake(
                partial(through_block, of_branch=F.relu, behind=lambda y: y),
                "The last ReLU comes too early: it acts on f alone, so that a block could add, and never take away.",
            ),
            Mistake(
                partial(through_block, of_branch=F.relu),
                "There is a ReLU too many: f may be negative, only the sum may not.",
            ),
            Mistake(
                partial(through_block, between=lambda f: f),
                "Without a ReLU between them, two convolutions are one convolution with a larger kernel.",
            ),
            Mistake(
                partial(through_block, second_norm=False),
                "The second norm is missing: each convolution has its own.",
            ),
        ),
        hints=(
            "A norm stands behind each convolution, and of the two ReLUs one stands between the convolutions.",
            "In the formula the outer relu acts on a sum. What are its two parts, and when are both there?",
            "Where the block changes the shape, x itself does not fit: the part called shortcut takes x, and fits.",
        ),
        measure=block_outputs,
    ),
    "00.shape": Exercise(
        expects="a tuple (N, C, H, W) of whole numbers",
        right=(10, 64, 12, 10),
        because="The stem and layers 2 and 3 halve the image, and layers 2 and 3 double the channels.",
        mistakes=(
            Mistake(
                (10, 64, 6, 5),
                "Halved once too often: the stem halves once, by its pooling, and layer 1 keeps what the stem left.",
            ),
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
                partial(in_halves, clear_each=True, step_each=True),
                "Those are two steps, each half as long: the second half saw weights that the first had changed.",
            ),
            Mistake(
                partial(in_halves, step_each=True),
                "Those are two steps, and the first half's gradient is in both: step once, when both are added up.",
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

STEPS_TOLERANCE = 1e-6  # of tens of thousands of steps: a whole one counts
Triple = tuple[float, float, float]  # how many values, their mean, their standard deviation


def combine(
    a: Triple, b: Triple, *, within: bool = True, between: bool = True, root: bool = True, less: int = 0
) -> Triple:
    """Return count, mean and std of two sets of values together; the options are what one can get wrong."""
    (n_a, mean_a, std_a), (n_b, mean_b, std_b) = a, b
    n = n_a + n_b
    mean = (n_a * mean_a + n_b * mean_b) / n
    variance = within * ((n_a - less) * std_a**2 + (n_b - less) * std_b**2) / (n - less)
    variance += between * (n_a * (mean_a - mean) ** 2 + n_b * (mean_b - mean) ** 2) / (n - less)
    return n, mean, variance**0.5 if root else variance


def averaged(a: Triple, b: Triple, *, weighted: bool) -> Triple:
    """Return the count, and the averages of the two means and stds, weighted by the counts or not."""
    share = b[0] / (a[0] + b[0]) if weighted else 0.5
    return a[0] + b[0], (1 - share) * a[1] + share * b[1], (1 - share) * a[2] + share * b[2]


def combined_cases(function: Callable[[Triple, Triple], Triple]) -> list[list[float]]:
    """Return what `function` makes of sets that differ in count, in mean and in spread."""
    a, b, c = (2.0, 0.2, 0.1), (6.0, 0.7, 0.3), (3.0, 0.2, 0.1)
    said = [list(function(*pair)) for pair in ((a, b), (b, c), (a, c))]
    if len(said[0]) != 3:
        raise ValueError(f"{len(said[0])} values came back, not three: count, mean and standard deviation")
    return said


def steps_needed(
    curvatures: Sequence[float],
    lr: float,
    *,
    pick: Callable[[list[float]], float] = max,
    rounded: Callable[[float], float] = math.ceil,
    landed: float = 1,
    never: float = math.inf,
) -> float:
    """Return how many steps of gradient descent bring the distance along each axis of a quadratic to 1 % or less.

    `math.inf` if some distance does not shrink. The options are the mistakes that one can make in it.
    """
    slowest = pick([abs(1 - lr * curvature) for curvature in curvatures])
    if slowest == 0:
        return landed
    return never if slowest >= 1 else rounded(math.log(0.01) / math.log(slowest))


def steps_cases(function: Callable[[list[float], float], float]) -> list[tuple[float, float]]:
    """Return what `function` says of narrow bowls, of rates that overshoot, never settle or diverge, and of one that
    lands at the bottom: a finite number and 0, or 0 and 1 for ∞. Of the last one only if all the rest is right."""
    cases = [([1.0, 4.0], 0.2), ([4.0, 1.0], 0.3), ([100.0, 3.0, 1.0], 0.012), ([4.0, 1.0], 0.48), ([4.0, 1.0], 0.52)]
    cases += [([4.0, 1.0], 0.5), ([3.0, 100.0, 1.0, 2.0], 0.0195)]
    cases.append(([3 * 2**-15, 0.5], 1.0))  # 50,299 steps, in single precision, too

    def coded(value: float) -> tuple[float, float]:
        return (0, 1) if value == math.inf else (value, 0)

    said, wanted = ([coded(f(list(curvatures), lr)) for curvatures, lr in cases] for f in (function, steps_needed))
    if not same(said, wanted, STEPS_TOLERANCE):
        return [*said, (0, 0)]
    try:
        return [*said, coded(function([2.0, 2.0], 0.5))]
    except (ValueError, ZeroDivisionError):  # math.log(0)
        return [*said, (0, 0)]  # what NumPy makes of it


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
            Mistake(partial(combine, less=1), "Divide by n, not by n − 1: all pixels are there."),
            Mistake(lambda a, b: (*combine(a, b)[1:], a[0] + b[0]), "The order is count, mean, std."),
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
        "initial weights are the same. How curved is the loss now, as a function of the weights?",
        (
            Option(
                "As curved as before: a scale is only a unit, and no network cares about units",
                "Its weights care: a step of one weight by 0.01 now changes the output 255 times as much.",
            ),
            Option(
                "Much more curved, whatever network it is",
                "Without normalization inside, yes; but batch norm divides by the standard deviation that it finds, "
                "and the scale is gone.",
            ),
            Option(
                "Much more curved without batch norm, exactly as curved with it",
                "The first batch norm divides by the standard deviation of its input: a factor cancels, and so does "
                "its effect on every derivative behind it.",
                right=True,
            ),
            Option(
                "Much more curved with batch norm, because its statistics grow too",
                "They grow, and that is the cure: what is 255 times as large is divided by 255 times as much.",
            ),
        ),
    ),
    "01.accuracy": Quiz(
        "Each of the five inputs trains at its own best learning rate, without batch norm. How much validation "
        "accuracy do normalized pixels bring, against pixels from 0 to 1 and against bytes?",
        (
            Option(
                "much against both: networks need mean 0 and standard deviation 1",
                "Against bytes, yes; pixels from 0 to 1 are near unit size already: one or two points behind, less at "
                "equal rates.",
            ),
            Option(
                "little against pixels from 0 to 1, and how much hangs on the rates; far more against bytes",
                "What counts is that the input is near the size that the initial weights are made for.",
                right=True,
            ),
            Option(
                "they lose against pixels from 0 to 1, whose loss surface is the flattest",
                "At the start it is, but that lets them stand no larger rates, and training soon leaves the start. "
                "Two tuning seeds can say so all the same, as you will see.",
            ),
            Option(
                "nothing against either: a network can undo any scale, given its own best rate",
                "It can represent the same function, but gradient descent starts far from it and does not get there.",
            ),
        ),
    ),
    "01.steps": Exercise(
        expects="a function of a list of curvatures and a learning rate that returns a number of steps, or math.inf",
        right=steps_needed,
        because="The slowest axis decides: the flattest one at small rates, the most curved one when it overshoots.",
        mistakes=(
            Mistake(
                partial(steps_needed, pick=min),
                "You follow the axis that arrives first; all of them have to, so the slowest decides.",
            ),
            Mistake(
                lambda curvatures, lr: steps_needed([max(curvatures)], lr),
                "You follow the most curved axis only: the flattest is slower, as long as nothing overshoots.",
            ),
            Mistake(
                lambda curvatures, lr: steps_needed([min(curvatures)], lr),
                "You follow the flattest axis only: at a large rate the most curved one overshoots and is slower.",
            ),
            Mistake(
                lambda curvatures, lr: steps_needed([curvatures[0], curvatures[-1]], lr),
                "You follow the first and the last curvature: the list need not be sorted.",
            ),
            Mistake(
                partial(steps_needed, landed=0),
                "A rate that lands at the bottom takes one step, and log(0) has no value: treat it apart.",
            ),
            Mistake(
                partial(steps_needed, never=-1),
                "What never arrives takes math.inf steps, not −1.",
            ),
            Mistake(
                lambda curvatures, lr: n if (n := steps_needed(curvatures, lr)) <= 1_000 else math.inf,
                "A loop that gives up after so many steps takes slow for never: look at the factor instead.",
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
        tolerance=STEPS_TOLERANCE,
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
    """Return whether the network that `build` makes takes 40×40 images, too, keeps each budget, and learns.

    Other images are only tried, and training too, when the budgets are kept. Raises TypeError when `build` returns no
    nn.Module, and ValueError when a 28×28 image does not give ten logits.
    """
    network = build()
    if not isinstance(network, nn.Module):
        raise TypeError(f"one nn.Module should come back, not {type(network).__name__}")
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        shape = tuple(network.eval()(torch.zeros(1, 1, 28, 28)).shape)
    if shape != (1, 10):
        raise ValueError(f"of one 28×28 image, 1×1×28×28, it makes the shape {shape}, not (1, 10)")
    parameters = sum(weight.numel() for weight in network.parameters())
    cheap = [parameters <= MOST_PARAMETERS, counter.get_total_flops() <= MOST_FLOPS]
    fits = not all(cheap) or takes(network, 40)
    return [fits, *cheap, fits and all(cheap) and learned(network) >= LEAST_ACCURACY]


def takes(network: nn.Module, size: int) -> bool:
    """Return whether `network` makes ten numbers of a grey image of size × size."""
    try:
        return network(torch.zeros(1, 1, size, size)).shape == (1, 10)
    except RuntimeError:  # what layers raise for a shape that they cannot take
        return False


def learned(network: nn.Module) -> float:
    """Return the validation accuracy of `network` after three epochs of 1,280 images, 0 when its loss diverges.

    A small one takes a second.
    """
    images = ablation.load(ablation.Source(images=1_280))
    images = replace(images, validation=images.validation[:1_000])
    recipe = train.Recipe(epochs=3, batch_size=64, lr=0.2, crop_padding=0, flip=False)
    try:
        history = train.fit(network, images, recipe, device="cpu", precision="fp32", progress=False)
    except train.Diverged:
        return 0.0
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
    "02.schedule": Quiz(
        "Four networks do about equal work. In three of them the image halves from layer to layer, and the channels "
        "double, stay as they are, or quadruple. In the fourth, `flat`, image and channels stay as they are. Which one "
        "learns best, in a short training?",
        (
            Option(
                "the one that doubles: that most networks do so has its reasons",
                "It is among the best; but ten seeds show no difference between it and the one whose channels stay.",
            ),
            Option(
                "`flat`: it alone throws no detail away",
                "It keeps the detail, and is far behind the other three.",
            ),
            Option(
                "the one that quadruples: it has most parameters",
                "It has, and does worse than doubling here. Parameters are not what is lacking in a short training.",
            ),
            Option(
                "the one that doubles and the one whose channels stay, with no difference to see",
                "Both halve the image, and ten seeds show no difference between them. `flat`, which does not, is far "
                "behind.",
                right=True,
            ),
        ),
    ),
    "02.one_pixel": Quiz(
        "Shift an image by one pixel, and a convolution's output shifts by one pixel. So if all validation images move "
        "one pixel to the right, how many of the network's answers change?",
        (
            Option(
                "none, because convolutions shift along and the average over the map forgets the place",
                "So it would be without strides and without borders. A stride of 2 picks other pixels after a shift by "
                "one; and padding with zeros shows where the border is.",
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
    "02.pooling": Quiz(
        "Four networks differ in how they halve the image. In three of them the stem does so by max pooling, by "
        "averages, or by a strided convolution, and the layers after it by strides. The fourth uses max pooling "
        "everywhere. Which one learns best, in a short training?",
        (
            Option(
                "max pooling in the stem only: each further one throws numbers away",
                "The strides that stand in its place throw away as many. Ten seeds show no difference between the two.",
            ),
            Option(
                "both with max pooling, with no difference to see",
                "Ten seeds show none between them; averages and strides in the stem are behind.",
                right=True,
            ),
            Option(
                "averages in the stem: they keep most of the picture",
                "They do, but to the network they are part of the convolution before them: a weighted sum of a sum.",
            ),
            Option(
                "strides in the stem: there the network learns how to halve",
                "It learns the weights of a sum, and the largest of four numbers is no weighted sum. It is behind.",
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
            Mistake(
                (24, 5, 5, 4712),
                "Either the second convolution's padding is missing, or the pooling moved by 3 in place of its stride "
                "of 2.",
            ),
            Mistake((24, 6, 6, 4712), "The first convolution's padding is missing: it adds two pixels on each side."),
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
        because="Both budgets are kept, images of another size fit, and it learns.",
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
                "It keeps both budgets but hardly learns (rate 0.2): does a norm stand behind each convolution? Do "
                "logits come out, without softmax? Else spend more on channels and layers.",
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
    eps_inside: bool = True,
    mean: bool = True,
    bias: bool = True,
    scaled_bias: bool = True,
    beta: bool = True,
) -> nn.Conv2d:
    """Return one convolution that does what `conv` and `norm` behind it do; the options are what one can get wrong."""
    variance = norm.running_var + (norm.eps if eps and eps_inside else 0.0)
    deviation = (variance.sqrt() if root else variance) + (0.0 if eps_inside else norm.eps)
    scale = norm.weight / deviation  # C
    folded = copy.deepcopy(conv)
    folded.weight = nn.Parameter(conv.weight * scale.view([-1 if place == axis else 1 for place in range(4)]))
    offset = torch.zeros_like(scale) if conv.bias is None or not bias else conv.bias
    offset = offset - norm.running_mean if mean else offset
    folded.bias = nn.Parameter(norm.bias * beta + (offset * scale if scaled_bias else offset))
    return folded


def fold_with_usual_eps(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    """Return what `fold` does where ε is not the norm's, but the one that is usual."""
    norm = copy.deepcopy(norm)
    norm.eps = 1e-5
    return fold(conv, norm)


def folded_outputs(function: Callable[[nn.Conv2d, nn.BatchNorm2d], nn.Conv2d]) -> Tensor:
    """Return what folded convolutions make of 2×4×6×6 activations: one with a bias, one without, and a 1×1 shortcut.

    The shortcut has one output channel, so that scales on the wrong axis fit, and are found by what comes out. Raises
    TypeError when `function` returns anything but one convolution, ValueError when that has another kernel or stride,
    or is the one that was given.
    """
    outputs = []
    for channels, kernel, stride, bias in ((4, 3, 1, True), (4, 3, 2, False), (1, 1, 2, False)):
        conv = nn.Conv2d(4, channels, kernel, stride, padding=kernel // 2, bias=bias).eval()
        norm = nn.BatchNorm2d(channels, eps=1e-2).eval()
        for values in (norm.weight, norm.bias, norm.running_mean):
            nn.init.normal_(values)
        nn.init.uniform_(norm.running_var, 0.02, 0.5)
        x = torch.randn(2, 4, 6, 6)
        given = copy.deepcopy(conv)
        with torch.random.fork_rng(devices=[]):  # a new nn.Conv2d draws weights
            folded = function(conv, norm)
        if not isinstance(folded, nn.Conv2d):
            raise TypeError(f"one nn.Conv2d should come back, not {type(folded).__name__}")
        if folded is conv or not torch.equal(conv.weight, given.weight):
            raise ValueError("the convolution that you were given has changed: leave it as it is, and return a new one")
        if folded.weight.shape != conv.weight.shape or folded(x).shape != conv(x).shape:
            raise ValueError(f"{conv} became {folded}: take over channels, kernel size, stride and padding")
        outputs.append(folded(x).flatten())
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
            Mistake(fold_with_usual_eps, "You wrote ε as a number: take norm.eps, which need not be the usual 1e-5."),
            Mistake(
                partial(fold, eps_inside=False),
                "You add ε to the root: batch normalization adds it to the variance, under the root.",
            ),
            Mistake(
                partial(fold, beta=False),
                "You left β out: batch normalization adds it in the end, so it belongs to the bias.",
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

# -------------------------------------------------------------------------------------- 04 Residual gradient flow

FIFTY_LAYERS = CNNConfig(width=4, depth=24, residual=False)  # the network that "04.train" is about, and its recipe
FIFTY_LAYERS_RECIPE = train.Recipe(epochs=5, batch_size=32, lr=0.1, crop_padding=0, flip=False)
TRAINED = 0.5  # training accuracy from which on the network counts as trained; guessing has 0.1
SLOW = ("width", "growth", "epochs", "batch_size")  # what would make the check take longer
EXPLAINED = ("scale_residual", "init", "norm", "lr", "clip", "activation")  # they do not help; each has its own mistake


def one_change(change: dict[str, Any]) -> str:
    """Return what comes of the 50-layer plain network after the change {field: value} of its network or its recipe.

    Fields that `EXPLAINED` does not have share one name. Raises ValueError for anything but one field and its value.
    """
    if not isinstance(change, dict) or len(change) != 1:
        raise ValueError('one field and its new value are asked for, in braces: {"lr": 0.03}')
    [field] = change
    if change[field] == getattr(FIFTY_LAYERS, field, getattr(FIFTY_LAYERS_RECIPE, field, ...)):
        raise ValueError(f"{field} is {change[field]!r} already: change it")
    if field in SLOW:
        raise ValueError(f"{field} stays as it is here, or this check would take long")
    if field == "depth":
        return "no 50 layers"
    if field in ablation.names(CNNConfig):
        accuracy = trained_accuracy(replace(FIFTY_LAYERS, **change), FIFTY_LAYERS_RECIPE)
    elif field in ablation.names(train.Recipe):
        accuracy = trained_accuracy(FIFTY_LAYERS, replace(FIFTY_LAYERS_RECIPE, **change))
    else:
        raise ValueError(f"neither CNNConfig nor Recipe has a field {field!r}")
    if accuracy >= TRAINED:
        return "trains"
    return f"{field if field in EXPLAINED else 'another field'} does not help"


@cache
def trained_accuracy(config: CNNConfig, recipe: train.Recipe) -> float:
    """Return the accuracy on 320 training images in the last epoch, 0 when the loss diverges; takes some seconds."""
    images = ablation.load(ablation.Source(images=320))
    images = replace(images, validation=images.validation[:100])
    torch.manual_seed(0)
    try:
        history = train.fit(CNN(config), images, recipe, device="cpu", precision="fp32", progress=False)
    except train.Diverged:
        return 0.0
    return history.last("train", "accuracy")


LESSON_04 = {
    "04.way_back": Quiz(
        "A plain network of 102 layers, without residual connections, but with batch norm and He's weights. It is not "
        "trained yet. The loss sends its gradient back, from the last layer to the first. Compared with the last "
        "block, the gradient that arrives at the first layer is …",
        (
            Option(
                "vanishingly small: it gets lost on the way, as everybody says",
                "So it would be without batch norm; but batch norm enlarges what the layers before it passed on.",
            ),
            Option(
                "about as large, because batch norm keeps all signals at the same size",
                "It keeps the activations at the same size, on the way there; nothing does so for the gradient.",
            ),
            Option(
                "about as large, because He's weights keep the variance in both directions",
                "They are made for that, with ReLU alone; batch norm between the layers overrules whatever size the "
                "weights have.",
            ),
            Option(
                "millions of times larger: it explodes",
                "Each layer enlarges it by about a fifth, and 100 layers do so one after the other.",
                right=True,
            ),
        ),
    ),
    "04.remove_block": Quiz(
        "Two trained networks of 22 layers, one residual, one plain. From each you remove one block of two "
        "convolutions: what came in now goes on to the next block. Nothing is trained again. What happens to the "
        "accuracy?",
        (
            Option(
                "both fall to guessing: each layer needs what the layer before it has made",
                "So it is for the plain network; a residual block only adds something to what is passed on anyway.",
            ),
            Option(
                "both stay about the same: one block of ten is not much",
                "In the plain network there is no way around the block, and the next one gets what it has never seen.",
            ),
            Option(
                "the residual one stays about the same, the plain one falls far",
                "Half of all paths through the residual network go around the block, and they are still there.",
                right=True,
            ),
            Option(
                "the residual one falls far, because its blocks were trained to work together",
                "They were trained together, but each adds a little to the sum: the sum stays about the same.",
            ),
        ),
    ),
    "04.profiles": Exercise(
        expects="a tuple of three numbers from 1 to 4, for A, B and C",
        right=(3, 2, 1),
        because="The two that grow differ in the weights' gradients: these are also large where the activations are.",
        mistakes=(
            Mistake(
                (2, 3, 1),
                "A and B both explode, but look at the weights: without a norm the activations grow towards the "
                "output, and a weight's gradient is activation times gradient.",
            ),
            Mistake(
                (3, 1, 2),
                "You read the axis the wrong way round: the gradient starts at the output, on the right.",
            ),
            Mistake((1, 1, 1), "Not all that is deep and plain vanishes, and two of these grow on their way back."),
            Mistake(
                (3, 2, 4),
                "C loses its gradient on the way: with residual connections and batch norm it would arrive.",
            ),
            Mistake(
                (4, 2, 1),
                "The weights' gradients of A are in the hundreds and thousands all along: batch norm would keep the "
                "activations, and with them these gradients, small.",
            ),
        ),
        hints=(
            "Start on the right, where the gradient starts, and go left: which of them grow, which shrink?",
            "Which network keeps its activations at one size, whatever the depth? And which lets them grow?",
            "The gradient of a weight is large where the activations that come in are large, or the gradient that "
            "comes back is, or both.",
        ),
        tolerance=1e-6,
    ),
    "04.train": Exercise(
        expects='one field of CNNConfig or Recipe and its new value, such as {"lr": 0.03}',
        right={"residual": True},
        because="With a way around each block, the same 50 layers train at the same rate, on the same images.",
        mistakes=(
            Mistake(
                {"momentum": 0.0},
                "That field does not help, or not enough: fewer than half of the training images are right.",
            ),
            Mistake(
                {"init": "default"},
                "Not the initial weights: batch norm takes their size out again, and the gradient grows as before.",
            ),
            Mistake(
                {"norm": "none"},
                "Another norm, or none, makes the gradient grow less or vanish; 50 layers one after the other still "
                "garble it.",
            ),
            Mistake(
                {"lr": 0.01},
                "Not at this rate: after 50 steps not half of the images are right. Where the gradient soon points "
                "elsewhere, only very short steps are safe, and 50 of those do not lead far.",
            ),
            Mistake(
                {"clip": 1.0},
                "Clipping makes an exploding gradient shorter, but it keeps the direction: that is what is wrong.",
            ),
            Mistake(
                {"activation": "tanh"},
                "Another activation changes little, at best it helps half way; all 50 layers still stand in a row.",
            ),
            Mistake({"scale_residual": False}, "There are no residual branches yet whose size it could change."),
            Mistake({"depth": 4}, "Then it is no network of 50 layers any more: the task is to keep them."),
        ),
        hints=(
            "The network is plain, has batch norm and He's weights. What happens to its gradient on the way back?",
            "The size of the gradient is not all: neighbouring places must have similar gradients.",
            "Which field of CNNConfig gives the gradient a way around each block?",
        ),
        measure=one_change,
    ),
}

# ------------------------------------------------------------------------------- 05 Dropout and initialization


def gain_of(
    activation: Callable[[Tensor], Tensor],
    *,
    sample: Callable[[int], Tensor] = torch.randn,
    size: Callable[[Tensor], Tensor] = lambda out: out.pow(2).mean().sqrt(),
    inverse: bool = True,
) -> float:
    """Return the gain that keeps the mean square through `activation`; the options are what one can get wrong."""
    measured = size(activation(sample(200_000)).double()).item()
    return 1 / measured if inverse else measured


def gains_of_three(function: Callable[[Callable[[Tensor], Tensor]], float]) -> list[float]:
    """Return the gains that `function` finds for a leaky ReLU of slope 0.5, for SiLU, and for GELU."""
    leaky = partial(F.leaky_relu, negative_slope=0.5)
    return [float(function(activation)) for activation in (leaky, F.silu, F.gelu)]


PATIENT = CNNConfig(width=8, depth=6, residual=False, norm="none", init="default")  # of "05.repair", and its treatment
TREATMENT = train.Recipe(epochs=2, batch_size=32, lr=0.03, clip=1.0, crop_padding=0, flip=False)
REVIVED = 0.5  # validation accuracy from which on it counts as alive; guessing has 0.1
VANISHED, LOST, EXPLODED = 1e-2, 1e-6, 1e2  # of what distinguishes images, from the first convolution to the last


def convolutions(network: nn.Module) -> list[nn.Conv2d]:
    """Return the convolutions of `network`, in its order."""
    return [part for part in network.modules() if isinstance(part, nn.Conv2d)]


def he(network: nn.Module, draw: Callable[[Tensor], Any] = nn.init.kaiming_normal_) -> None:
    """Draw the weights of all convolutions anew, by default as He et al. (2015) do for ReLU, without biases."""
    for conv in convolutions(network):
        draw(conv.weight)
        nn.init.zeros_(conv.bias)


def he_first_only(network: nn.Module) -> None:
    """Draw only the first convolution's weights anew."""
    nn.init.kaiming_normal_(convolutions(network)[0].weight)


def with_batch_norm(network: nn.Module) -> None:
    """Put batch norm where there was none."""
    for layer in network.layers:
        for block in layer:
            block.norm1, block.norm2 = (nn.BatchNorm2d(block.conv1.out_channels) for _ in range(2))


def revived(repair: Callable[[nn.Module], Any]) -> list[float]:
    """Return what `repair` made of the 14-layer plain network.

    That is: whether its layers are those of before, whether convolutions changed (0: none; 0.5: some, and the signal
    vanishes; 1), whether their kernels differ, what its signal is like, and whether it learns.

    The signal: 0 well, -1 vanished, -2 lost, 1 exploded. What fails ends the examination, and the rest counts as 0.
    """
    network = CNN(PATIENT)
    before, weights = layout(network), [conv.weight.clone() for conv in convolutions(network)]
    repair(network)
    if layout(network) != before:
        return [0.0, 0.0, 0.0, 0.0, 0.0]
    pairs = list(zip(convolutions(network), weights, strict=True))
    moved = [not torch.equal(conv.weight, old) for conv, old in pairs]
    differ = all(conv.weight.std(0).max() > 0 for conv in convolutions(network))
    signal = signal_class(network) if any(moved) and differ else 0
    if signal < 0 and not all(moved):
        return [1.0, 0.5, 0.0, 0.0, 0.0]
    alive = any(moved) and differ and signal == 0 and educated(network) >= REVIVED
    return [1.0, float(any(moved)), float(differ), float(signal), float(alive)]


def layout(network: nn.Module) -> list[tuple[str, type, tuple]]:
    """Return the name, the type and the shape of the weight of each part of `network`."""
    parts = [(name, type(part), getattr(part, "weight", None)) for name, part in network.named_modules()]
    return [(name, kind, tuple(weight.shape) if isinstance(weight, Tensor) else ()) for name, kind, weight in parts]


@torch.no_grad()
def signal_class(network: nn.Module) -> int:
    """Return what becomes of the differences between images, from the first convolution to the last; see `revived`."""
    spreads = []
    hooks = [
        conv.register_forward_hook(lambda conv, _, out: spreads.append(float(out.var(0).mean().sqrt())))
        for conv in convolutions(network)
    ]
    network(patients().train.images[:64] / 128 - 1)
    for hook in hooks:
        hook.remove()
    ratio = spreads[-1] / spreads[0] if spreads[0] > 0 else 0.0
    return 0 if VANISHED <= ratio <= EXPLODED else 1 if not ratio <= EXPLODED else -1 if ratio > LOST else -2


def patients() -> data.ImageData:
    """Return the images of "05.repair": 1,280 to train on, and 500."""
    images = ablation.load(ablation.Source(images=1_280))
    return replace(images, validation=images.validation[:500])


def educated(network: nn.Module) -> float:
    """Return the validation accuracy of `network` after its treatment, 0 when the loss diverges; takes a second."""
    try:
        history = train.fit(network, patients(), TREATMENT, device="cpu", precision="fp32", progress=False)
    except train.Diverged:
        return 0.0
    return history.last("validation", "accuracy")


LESSON_05 = {
    "05.shift": Quiz(
        "In training a network drops half of the values and doubles those it keeps. A convolution follows, and then "
        "batch norm, which stores the variance that it sees. In `.eval()` mode nothing is dropped. Compared with the "
        "stored variance, the variance that arrives is …",
        (
            Option(
                "the same: kept values are doubled to make up for the dropped ones",
                "That makes up for the mean; around it, a value that is 0 or doubled varies more than one that stays.",
            ),
            Option(
                "smaller",
                "In training the masks' noise comes on top of what the images differ by; in evaluation it is gone.",
                right=True,
            ),
            Option(
                "larger: no value is zero any more",
                "Twice as many values arrive, but each is half as large as the kept ones were.",
            ),
            Option(
                "the same: batch norm brings every variance to 1",
                "It divides by the stored one in evaluation; it does not look at what arrives.",
            ),
        ),
    ),
    "05.layers": Quiz(
        "PyTorch's `nn.Conv2d` draws weights of variance 1/(3 · fan-in). Without its biases, from layer to layer of a "
        "plain network with ReLUs, the mean square of the signal …",
        (
            Option(
                "stays as it is: that is what an initialization is for",
                "It is what He's is for, with a variance of 2/fan-in.",
            ),
            Option(
                "shrinks to a third",
                "So it would without the ReLUs; each of them takes away the negative half as well.",
            ),
            Option(
                "shrinks to a sixth",
                "A third by the weights, and a half of that by the ReLU.",
                right=True,
            ),
            Option(
                "grows, because each value is a sum over hundreds of inputs",
                "The fan-in in the variance makes up for their number.",
            ),
        ),
    ),
    "05.with_norm": Quiz(
        "Two networks with batch norm behind every convolution. In the second one, all convolutions begin with weights "
        "that are 10 times as large. Both are trained with the same learning rate. What happens?",
        (
            Option(
                "the second one explodes: 10 times in every layer",
                "Batch norm divides each factor of 10 out again: before the first step, the logits are the same.",
            ),
            Option(
                "nothing: they train alike",
                "They begin alike; but the gradient by larger weights is smaller, and the same step is a smaller share "
                "of them.",
            ),
            Option(
                "the second one's convolutions learn as if their learning rate were 100 times smaller",
                "The gradient is 10 times smaller, and the weights are 10 times larger: as a share, 100 times less.",
                right=True,
            ),
            Option(
                "the second one's convolutions learn as if their learning rate were 10 times larger",
                "The other way round: what is scaled up has a smaller gradient, for its scale cancels.",
            ),
        ),
    ),
    "05.gain": Exercise(
        expects="a function f(activation) that returns a number, from 100,000 draws or more",
        right=gain_of,
        because="What the activation leaves of a mean square of 1, the weights make up for.",
        mistakes=(
            Mistake(
                partial(gain_of, size=lambda out: out.pow(2).mean()),
                "That is g², which multiplies the mean square: the gain multiplies the weights themselves.",
            ),
            Mistake(
                partial(gain_of, size=torch.std),
                "You keep the variance, without the mean: but the next layer adds up squares, the mean's included.",
            ),
            Mistake(
                partial(gain_of, size=torch.var),
                "That is 1 / variance: take the mean of the squares, without subtracting a mean, and the root of it.",
            ),
            Mistake(
                partial(gain_of, inverse=False),
                "That is what the activation leaves; the weights have to undo it.",
            ),
            Mistake(
                partial(gain_of, size=lambda out: out.abs().mean()),
                "A mean of absolute values is not what adds up over independent weights: their squares do.",
            ),
            Mistake(
                partial(gain_of, sample=torch.rand),
                "torch.rand draws from 0 to 1: a unit's input is as often negative as positive, and normal.",
            ),
            Mistake(
                lambda activation: math.sqrt(2),
                "That is ReLU's, whatever the activation: these leave more or less than one half.",
            ),
        ),
        hints=(
            "Draw many numbers z from a normal distribution (100,000 or more), and pass them through the activation.",
            "What is the mean of their squares afterwards? Before it was 1.",
            "The weights multiply the mean square by g². Which g brings it back to 1?",
        ),
        measure=gains_of_three,
        tolerance=0.02,
        nearly="Nearly. With fewer than 100,000 draws it is noise; else look at what you draw: z is normal.",
    ),
    "05.repair": Exercise(
        expects="a function f(network) that changes the weights of its convolutions in place",
        right=he,
        because="Now each layer hands on about as much as it gets, forwards and backwards, and the network learns.",
        mistakes=(
            Mistake(
                lambda network: None,
                "Its weights are as they were: functions of nn.init whose names end in _ change a tensor in place.",
            ),
            Mistake(
                he_first_only,
                "Only some of its convolutions have changed: the signal still shrinks in the others.",
            ),
            Mistake(
                partial(he, draw=nn.init.xavier_normal_),
                "The signal still vanishes: this gain suits layers without ReLU, which takes half of the mean square.",
            ),
            Mistake(
                partial(he, draw=partial(nn.init.normal_, std=0.01)),
                "Nothing arrives at the last layer: a standard deviation has to go with 1/√fan_in, whatever the layer.",
            ),
            Mistake(
                partial(he, draw=partial(nn.init.normal_, std=1.0)),
                "The signal explodes: each value is a sum over fan_in inputs, and grows with √fan_in.",
            ),
            Mistake(
                partial(he, draw=partial(nn.init.constant_, val=0.02)),
                "All kernels of a layer are equal: they get equal gradients, and stay equal for ever.",
            ),
            Mistake(
                partial(he, draw=partial(nn.init.kaiming_normal_, mode="fan_out")),
                "Something arrives, but after two epochs less than half is right. Each layer needs a standard "
                "deviation of √(2 / fan-in), its own fan-in: fan-out keeps the size of the gradients instead, and one "
                "number for all layers suits only some.",
            ),
            Mistake(
                with_batch_norm,
                "Its layers are others now: batch norm would help, but here the weights alone have to do it.",
            ),
        ),
        hints=(
            "network.modules() gives all its parts; those that are an nn.Conv2d have a weight and a bias.",
            "By what does a layer of this network multiply the mean square, and by what should it?",
            "torch.nn.init has a function for ReLU networks, named after Kaiming He; its default is the right mode.",
        ),
        measure=revived,
    ),
}

# -------------------------------------------------------------------------------------------------- 06 Full training


def calibration_gap(
    p: Tensor,
    labels: Tensor,
    bins: int,
    *,
    confidence: Callable[[Tensor, Tensor], Tensor] = lambda p, labels: p.amax(1),
    gap: Callable[[Tensor, Tensor, float], Tensor] = lambda right, sure, middle: (right.mean() - sure.mean()).abs(),
    total: Callable[[Tensor, Tensor], Tensor] = lambda gaps, shares: (gaps * shares).sum(),
    one_in_last: bool = True,
) -> float:
    """Return the expected calibration error of probabilities N×K; the options are what one can get wrong."""
    sure, right = confidence(p, labels), (p.argmax(1) == labels).double()
    place = (sure * bins).long().clamp(max=bins - 1 if one_in_last else bins)
    gaps, shares = [], []
    for number in place.unique():
        inside = place == number
        gaps.append(gap(right[inside], sure[inside], (number.item() + 0.5) / bins))
        shares.append(inside.double().mean())
    return total(torch.stack(gaps), torch.stack(shares)).item()


def without_certain(p: Tensor, labels: Tensor, bins: int) -> float:
    """Return the calibration error when confidences of exactly 1 fall out of the last bin."""
    kept = p.amax(1) < 1
    return calibration_gap(p[kept], labels[kept], bins) * kept.double().mean().item()


def without_first(p: Tensor, labels: Tensor, bins: int) -> float:
    """Return the calibration error when the first bin is left out."""
    kept = p.amax(1) * bins >= 1
    return calibration_gap(p[kept], labels[kept], bins) * kept.double().mean().item()


def signed(right: Tensor, sure: Tensor, middle: float) -> Tensor:
    """Return accuracy minus confidence."""
    return right.mean() - sure.mean()


def calibration_cases(function: Callable[[Tensor, Tensor, int], float]) -> list[float]:
    """Return what `function` says of answers that are too sure where they are sure, and too modest elsewhere.

    Two of them are wrong with a probability of 1, which belongs to the last bin; and so is one of four others, whose
    bin is too modest without it.
    """
    p = (2.5 * torch.randn(400, 5, dtype=torch.float64)).softmax(1)
    labels = torch.where(torch.rand(400) < 0.6, torch.multinomial((0.1 + p) ** 0.5, 1)[:, 0], p.argmax(1))
    p, labels = torch.cat([p, torch.eye(5, dtype=p.dtype)[:2]]), torch.cat([labels, torch.tensor([3, 4])])
    said = [float(function(p.clone(), labels.clone(), bins)) for bins in (10, 4, 2)]
    few = torch.tensor([[0.6, 0.4]] * 3 + [[1.0, 0.0]], dtype=p.dtype)
    return [*said, float(function(few, torch.tensor([0, 0, 0, 1]), 2))]


def with_flips(
    model: nn.Module,
    images: Tensor,
    *,
    mirror: Callable[[Tensor], Tensor] = lambda images: images.flip(3),
    join: Callable[[Tensor, Tensor], Tensor] = lambda a, b: (a.softmax(1) + b.softmax(1)) / 2,
) -> Tensor:
    """Return the mean answer to each image and to its mirror image; the options are what one can get wrong."""
    return join(model(images), model(mirror(images)))


def flipped_cases(function: Callable[[nn.Module, Tensor], Tensor]) -> Tensor:
    """Return what `function` makes of three colour images and a network that tells left from right and up from down.

    Raises ValueError when `function` asks the network in training mode.
    """
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(96, 5)).eval()
    model.register_forward_pre_hook(refuse_training)
    with torch.no_grad():
        model[3].weight.mul_(8)
        return function(model, torch.randn(3, 3, 6, 8))


def refuse_training(model: nn.Module, _: tuple[Tensor, ...]) -> None:
    """Raise ValueError when a network is asked in training mode."""
    if model.training:
        raise ValueError("the network was asked in training mode: there, the answer to an image changes with its batch")


LESSON_06 = {
    "06.ledger": Quiz(
        "Six changes to a plain recipe, one after the other, each staying: 6,400 images, 15 epochs, ten seeds a row. "
        "All together, they clearly help. Of how many of the six *single* steps do these seeds show that it brings "
        "more than half a point of validation accuracy?",
        (
            Option(
                "of all six",
                "The sum of all six stands out of the noise; a sixth of it need not.",
            ),
            Option(
                "of those three or four that change what the network sees or how it steps",
                "They do bring the most, and some of them clearly help; but each interval reaches below half a point.",
            ),
            Option(
                "of one: the learning rate that rises and falls",
                "On average it is beyond half a point here, but its interval is not.",
            ),
            Option(
                "of none",
                "Each interval reaches below the margin: only the sum is large enough for ten seeds.",
                right=True,
            ),
        ),
    ),
    "06.test": Quiz(
        "Twenty recipes are in truth equally good: each of them gets 94 % of all images in the world right. You test "
        "each on 10,000 images and report the best number of the twenty. What will it be, about?",
        (
            Option(
                "94.0 %: that is what they are",
                "So it would be for one recipe that you chose before; the best of twenty was chosen for its luck, too.",
            ),
            Option(
                "94.4 %",
                "One test is off by 0.24 points by chance (√(0.94 · 0.06 / 10,000)); the luckiest of twenty, by almost "
                "twice that.",
                right=True,
            ),
            Option(
                "96 %",
                "With some hundred test images, yes; with 10,000, chance moves a number by a quarter of a point.",
            ),
            Option(
                "less than 94 %, because the test images are new to the network",
                "94 % of all images means just that: new ones. They cannot be harder on average.",
            ),
        ),
    ),
    "06.corruptions": Quiz(
        "A network trained on mirrored images, shifted by up to a pixel, against one trained without. Now both look at "
        "corrupted images, at five severities. Averaged over these, where do five seeds show that augmentation helps?",
        (
            Option(
                "everywhere: who has seen more variety is harder to disturb",
                "Variety helps against what it is like; noise, blur and low contrast are not in it.",
            ),
            Option(
                "with rotated images, and not with noise, blur or low contrast",
                "A rotation moves parts of the image, as shifts do; the other three change the pixels' values.",
                right=True,
            ),
            Option(
                "with blurred images: averaging over shifts is a kind of blur",
                "Each shifted copy is as sharp as the original; the network never sees their mean.",
            ),
            Option(
                "nowhere: what was not in the training images cannot be learned from them",
                "It need not be the same; it is enough that it is alike.",
            ),
        ),
    ),
    "06.calibration": Quiz(
        "This network was trained with label smoothing: the target of a shirt is 91 % shirt, and 1 % each other class. "
        "Compare its confidence, on average, with how often it is right on validation images.",
        (
            Option(
                "it promises too much: deep networks are overconfident",
                "So Guo et al. found it, of networks with targets of 100 %. This one was never asked to be that sure.",
            ),
            Option(
                "it keeps its word: cross-entropy is lowest for honest probabilities",
                "Honest about the targets that it was given, and these were blurred on purpose.",
            ),
            Option(
                "it is better than it says",
                "Its targets say 91 % even where nothing is in doubt; so does the network, and is right more often.",
                right=True,
            ),
            Option(
                "its right answers are near 100 %, its wrong ones near 0 %",
                "It cannot know which are wrong. And the answer is the most probable of ten classes: never below 10 %.",
            ),
        ),
    ),
    "06.faithful": Quiz(
        "300 images that the network gets right. Paint over the warmest quarter of each, in its own map or in that of "
        "another image with the same answer, for each of the four layers. How many of the answers stay the same?",
        (
            Option(
                "hardly any: what spoke for the answer is gone",
                "A warm place is one reason among others: the rest of a shoe looks like a shoe, too.",
            ),
            Option(
                "most; with the own map fewer, and not in every layer",
                "In some layer the map finds what matters in this image; in others, any such map does as much.",
                right=True,
            ),
            Option(
                "most; in all layers as many as with another image's map",
                "Then the maps would say nothing about this image. In some layer, 300 images show a clear difference.",
            ),
            Option(
                "all: an image that it gets right is an easy one",
                "Right is not the same as sure, and the network has never seen an image with a painted quarter.",
            ),
        ),
    ),
    "06.ece": Exercise(
        expects="a function f(p, labels, bins) that returns a number from 0 to 1",
        right=calibration_gap,
        because="Each image counts once, in the bin of its confidence, by how far that bin is from the diagonal.",
        mistakes=(
            Mistake(
                partial(calibration_gap, total=lambda gaps, shares: gaps.mean()),
                "A bin of two images counts as much as one of a hundred: weigh each with its share of the images.",
            ),
            Mistake(
                partial(calibration_gap, gap=signed),
                "Bins above and below the diagonal cancel: it is the distance that counts, in each bin.",
            ),
            Mistake(
                partial(calibration_gap, gap=signed, total=lambda gaps, shares: (gaps * shares).sum().abs()),
                "The absolute value comes too late: take it in each bin, before they are added up.",
            ),
            Mistake(
                partial(calibration_gap, confidence=lambda p, labels: p.gather(1, labels[:, None])[:, 0]),
                "You sorted by the probability of the true class; the confidence is that of the answer, right or not.",
            ),
            Mistake(
                partial(calibration_gap, total=lambda gaps, shares: gaps.max()),
                "That is the largest gap, the *maximum* calibration error; asked for is the mean.",
            ),
            Mistake(
                partial(calibration_gap, total=lambda gaps, shares: (gaps**2 * shares).sum().sqrt()),
                "That is the root of the mean square; asked for is the mean of the distances themselves.",
            ),
            Mistake(
                partial(calibration_gap, gap=lambda right, sure, middle: (right.mean() - middle).abs()),
                "You took the middle of the bin for its confidence; take the mean of those that are in it.",
            ),
            Mistake(
                without_certain,
                "Confidences of exactly 1 are lost: times the number of bins, they lie behind the last one, but belong "
                "to it.",
            ),
            Mistake(
                partial(calibration_gap, one_in_last=False),
                "Confidences of exactly 1 have got a bin of their own: they belong to the last one.",
            ),
            Mistake(without_first, "The first bin is missing: bins are numbered from 0."),
            Mistake(
                partial(calibration_gap, total=lambda gaps, shares: 100 * (gaps * shares).sum()),
                "That is in percent; asked for is a number from 0 to 1.",
            ),
        ),
        hints=(
            "p.max(1) gives both: how sure each answer is, and which class it is.",
            "With 10 bins, a confidence of 0.83 belongs to bin number 8: multiply, and cut the decimals off.",
            "In each bin: the share that is right, the mean confidence, and the distance of the two; the mean of an "
            "empty bin is NaN: skip it.",
            "Then the mean of the distances, each weighted with the number of images in its bin.",
        ),
        measure=calibration_cases,
        tolerance=1e-5,
    ),
    "06.flips": Exercise(
        expects="a function f(model, images) that returns probabilities, N×K",
        right=with_flips,
        because="Two views of each image, two answers, and their mean, which is a probability again.",
        mistakes=(
            Mistake(
                partial(with_flips, mirror=lambda images: images.flip(2)),
                "That turns the images upside down: in N×C×H×W, the width is the last axis.",
            ),
            Mistake(
                partial(with_flips, mirror=lambda images: images.flip(1)), "That swaps the colours, red with blue."
            ),
            Mistake(
                partial(with_flips, mirror=lambda images: images.flip(0)),
                "That turns the batch round: each image is averaged with another one.",
            ),
            Mistake(
                partial(with_flips, mirror=lambda images: images),
                "Both views are the same: nothing is mirrored.",
            ),
            Mistake(
                partial(with_flips, join=lambda a, b: b.softmax(1)),
                "That is the answer to the mirror image alone.",
            ),
            Mistake(
                partial(with_flips, join=lambda a, b: a.softmax(1) + b.softmax(1)),
                "A row adds up to 2: divide.",
            ),
            Mistake(
                partial(with_flips, join=lambda a, b: (a + b) / 2),
                "Those are logits: probabilities of a row add up to 1.",
            ),
            Mistake(
                partial(with_flips, join=lambda a, b: ((a + b) / 2).softmax(1)),
                "That averages the logits, a geometric mean of the answers: often as good, but asked for is the mean "
                "of the probabilities.",
            ),
        ),
        hints=(
            "images.flip(axis) mirrors along an axis. Which of N×C×H×W is from left to right?",
            "Ask the model twice, and make probabilities of the logits each time.",
        ),
        measure=flipped_cases,
    ),
}

# ------------------------------------------------------------------------------------------------- 07 Training fast

FAULTS = {  # of a slow epoch, and what its check says about each
    "all pixels anew": "every step makes all training images float again, to use a few of them",
    "image by image": "images are fetched or augmented one by one in Python",
    "item": "steps ask for a tensor's value, as .item() and .cpu() do, and wait for it",
    "gradients": "validation keeps what only a backward pass would need",
    "one at a time": "validation sends its images through the network one at a time",
}
FAULT_BATCH = 16
FAULT_LR = 0.1
Epoch = Callable[[nn.Module, torch.optim.Optimizer, Tensor, Tensor, Tensor, Tensor], tuple[float, float]]


def as_pixels(images: Tensor) -> Tensor:
    """Return uint8 images as the float images that the network of the exercise takes."""
    return (images.float() / 255 - 0.286) / 0.353


def epoch_with(
    faults: Sequence[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    val_images: Tensor,
    val_labels: Tensor,
) -> tuple[float, float]:
    """Train one epoch in batches of 16 and return mean loss and validation accuracy, with the `faults` named."""
    losses = []
    model.train()
    for batch in torch.randperm(len(images)).split(FAULT_BATCH):
        x = as_pixels(images)[batch] if "all pixels anew" in faults else as_pixels(images[batch])
        flipped = torch.rand(len(x)) < 0.5
        if "image by image" in faults:
            pairs = zip(x, flipped.tolist(), strict=True)
            x = torch.stack([image.flip(-1) if flip else image for image, flip in pairs])
        else:
            x = torch.where(flipped.view(-1, 1, 1, 1), x.flip(-1), x)
        loss = F.cross_entropy(model(x), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item() if "item" in faults else loss.detach())
    model.eval()
    with torch.set_grad_enabled("gradients" in faults):
        parts = as_pixels(val_images).split(1 if "one at a time" in faults else 500)
        guesses = torch.cat([model(part).argmax(1) for part in parts])
    return float(torch.as_tensor(losses if "item" in faults else torch.stack(losses)).mean()), (
        (guesses == val_labels).float().mean().item()
    )


class Watched(TorchDispatchMode):
    """Counts, of all operations that PyTorch carries out inside of the block, those that give a fault away."""

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.all, self.one = images.numel(), images[0].numel()
        self.whole = self.single = self.numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = function(*args, **(kwargs or {}))
        self.numbers += function is torch.ops.aten._local_scalar_dense.default
        if isinstance(out, Tensor) and function.namespace == "aten":
            self.whole += out.numel() >= self.all and out.is_floating_point()
            self.single += out.numel() == self.one and out.shape[-1] == out.shape[-2] if out.ndim > 1 else False
        return out


def watched_epoch(epoch: Epoch) -> list[str]:
    """Return which of `FAULTS` an epoch has, by what PyTorch and the network are asked to do, on 192 small images.

    Raises ValueError when it does not do an epoch's work: every image once, in a random order, in batches of 16, each
    mirrored by its own coin, a step down the gradient for each batch, and then the accuracy on the validation images,
    in evaluation mode. Raises it, too, when the steps' graphs are still there in the end.
    """
    images, labels = torch.randint(0, 256, (192, 1, 7, 7), dtype=torch.uint8), torch.randint(0, 3, (192,))
    val_images, val_labels = torch.randint(0, 256, (40, 1, 7, 7), dtype=torch.uint8), torch.randint(0, 3, (40,))
    model = nn.Sequential(nn.Flatten(), nn.Linear(49, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    calls: list[tuple[Tensor, Tensor, bool, bool]] = []  # images, logits, train mode?, gradients?
    graphs: list[weakref.ref] = []  # of what dies with a step's graph

    def note(module: nn.Module, inputs: tuple[Tensor, ...], logits: Tensor) -> None:
        kept = inputs[0].detach().clone(), logits.detach().clone()
        calls.append((*kept, module.training, torch.is_grad_enabled()))
        if module.training and logits.grad_fn is not None:
            logits.grad_fn.register_hook(hook := partial(lambda *_: None))
            graphs.append(weakref.ref(hook))

    def alive() -> int:
        return sum(graph() is not None for graph in graphs)

    twin = copy.deepcopy(model)
    model.eval()  # as the epoch before has left it
    noted = model.register_forward_hook(note)
    optimizer = torch.optim.SGD(model.parameters(), lr=FAULT_LR)
    watch, steps = Watched(images), []
    optimizer.register_step_post_hook(lambda *_: steps.append((watch.whole, watch.single, watch.numbers, alive())))
    with watch, counted_reads(watch), only_tensors(lambda: len(steps) < len(images) // FAULT_BATCH):
        result = epoch(model, optimizer, images, labels, val_images, val_labels)
    if not torch.is_grad_enabled():
        raise ValueError("after the epoch gradients are still off: use `with torch.inference_mode():`")
    noted.remove()
    seen, looked = ([call for call in calls if call[2] is training] for training in (True, False))
    order = check_epoch([call[0] for call in seen], len(steps), images)
    loss = F.cross_entropy(torch.cat([call[1] for call in seen]), labels[order]).item()
    model.eval()
    with torch.no_grad():
        accuracy = (model(as_pixels(val_images)).argmax(1) == val_labels).float().mean().item()
    whole, single, _, kept = steps[-1]  # up to the last step: what validation does is another matter
    if kept > 2:  # the last one's, and that of the step before it
        raise ValueError(f"after the last step, the graphs of {kept} steps are still there: keep losses without them")
    check_result(result, loss, accuracy, sum(len(call[0]) for call in looked))
    check_steps(model, twin, [call[0] for call in seen], labels[order])
    reading = sum(after[2] > before[2] for before, after in itertools.pairwise(steps))  # after the first step
    found = {
        "all pixels anew": whole >= len(steps),
        "image by image": single >= len(images) // 4,
        "item": reading > 1,
        "gradients": any(call[3] for call in looked),
        "one at a time": len(looked) >= len(val_images) // 2,
    }
    return [fault for fault, there in found.items() if there]


def check_steps(model: nn.Module, twin: nn.Module, batches: list[Tensor], labels: Tensor) -> None:
    """Raise ValueError unless `model` learned what its `twin`, as it was before, learns by an SGD step a batch."""
    optimizer = torch.optim.SGD(twin.parameters(), lr=FAULT_LR)
    for images, truth in zip(batches, labels.split(FAULT_BATCH), strict=True):
        optimizer.zero_grad()
        F.cross_entropy(twin(images), truth).backward()
        optimizer.step()
    for weight, expected in zip(model.parameters(), twin.parameters(), strict=True):
        if not torch.allclose(weight, expected, atol=1e-4):
            order = "of each batch, first zero_grad(), then loss.backward(), then step()"
            raise ValueError(f"the network has not learned what one step down the gradient a batch teaches it: {order}")


@contextlib.contextmanager
def counted_reads(watch: Watched) -> Iterator[None]:
    """Count what a TorchDispatchMode does not see: one number that `tolist()`, `cpu()` or `to("cpu")` fetches."""

    def count(name: str, function: Callable) -> Callable:
        def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            fetched = name != "to" or "cpu" in map(str, (*args, *kwargs.values()))
            watch.numbers += tensor.numel() == 1 and fetched
            return function(tensor, *args, **kwargs)

        return counted

    with contextlib.ExitStack() as stack:
        for name in ("tolist", "cpu", "to"):
            stack.enter_context(mock.patch.object(Tensor, name, count(name, getattr(Tensor, name))))
        yield


@contextlib.contextmanager
def only_tensors(training: Callable[[], bool]) -> Iterator[None]:
    """Raise ValueError if a tensor is made a NumPy array while `training()`: what is done there, nobody can count."""

    def refuse(name: str, function: Callable) -> Callable:
        def refused(*args: Any, **kwargs: Any) -> Any:
            if training():
                raise ValueError(f"Tensor.{name} was called while training, and waits like .item(): keep to PyTorch")
            return function(*args, **kwargs)

        return refused

    with contextlib.ExitStack() as stack:
        for name in ("numpy", "__array__"):
            stack.enter_context(mock.patch.object(Tensor, name, refuse(name, getattr(Tensor, name))))
        yield


def check_epoch(seen: list[Tensor], steps: int, images: Tensor) -> Tensor:
    """Return which images the network saw, in order.

    Raises ValueError unless it saw every image once, normalized, in a random order, about half of them mirrored, with a
    coin an image, 16 a step.
    """
    if steps != len(images) // FAULT_BATCH or [len(batch) for batch in seen] != [FAULT_BATCH] * steps:
        raise ValueError(
            f"{steps} steps on {sum(map(len, seen))} images in train mode: expected {len(images) // FAULT_BATCH} on "
            f"{len(images)}, in batches of {FAULT_BATCH}"
        )
    expected, ramp = as_pixels(images), torch.linspace(0, 1, images.shape[-1])
    got = torch.cat(seen).float()
    keys, found = (x.double().square().sum((1, 2, 3)) for x in (expected, got))  # the same for a mirrored image
    if not torch.allclose(found.sort().values, keys.sort().values, rtol=1e-5):
        raise ValueError("the network did not see every training image once, normalized as given")
    order = keys.argsort()[found.argsort().argsort()]
    mirrored = ((got - expected[order]) * ramp).sum((1, 2, 3)).abs() > 1e-2
    if not 0.2 < mirrored.float().mean() < 0.8:
        raise ValueError(f"{mirrored.float().mean():.0%} of the images were mirrored: expected about half, by chance")
    in_batch = mirrored.view(steps, FAULT_BATCH).sum(1)
    if ((in_batch == 0) | (in_batch == FAULT_BATCH)).sum() > 2:  # by chance hardly one
        raise ValueError("whole batches were mirrored, and whole batches were not: expected a coin for each image")
    if (order.diff().abs() == 1).float().mean() > 0.5:  # also backward, or a batch after another
        raise ValueError("the images came in the order in which they lie: expected a new random order")
    return order


def check_result(result: Any, loss: float, accuracy: float, looked: int) -> None:
    """Raise ValueError unless an epoch returned the mean loss of its steps and the accuracy of the network as it is."""
    if looked == 0:
        raise ValueError("no image was looked at in evaluation mode: expected model.eval() before validation")
    told, found = (float(value) for value in result)
    if not abs(told - loss) < 1e-3:
        raise ValueError(f"mean loss {told:.3f} returned: expected {loss:.3f}, of each image with its own label")
    if not abs(found - accuracy) < 1e-3:
        raise ValueError(f"validation accuracy {found:.3f} returned: expected {accuracy:.3f}, of the trained network")


def what_remains(faults: Sequence[str]) -> str:
    """Return the sentence on an epoch that still has these faults."""
    number = {1: "One fault of five remains", 5: "All five faults are there"}
    begin = number.get(len(faults), f"{len(faults)} of five faults remain")
    return f"{begin}: {'; '.join(FAULTS[fault] for fault in faults)}."


REMAINING = [faults for number in range(1, 6) for faults in itertools.combinations(FAULTS, number)]


def roofline_share(*, a_multiply_add: int = 2, write: bool = True) -> float:
    """Return the share of 800 GFLOP/s that a 1×1 convolution, 64 to 32 channels, can reach at 40 GB/s."""
    intensity = a_multiply_add * 64 * 32 / (4 * (64 + 32 * write))
    return min(1.0, intensity * 40 / 800)


def half_calculating(*, ways: int = 2, both: int = 1, steps: int = 3, bits: int = 8) -> float:
    """Return how many images each of 8 GPUs needs, by lesson 07's assumptions, to calculate half of the time."""
    talking = 7 * 100e-6 * both + ways * 7 / 8 * 4 * 25.6e6 / (10e9 / bits)  # s, over Ethernet
    return talking * 60e12 / (steps * 8.2e9)


LESSON_07 = {
    "07.where": Quiz(
        "The usual loop: a DataLoader that crops, flips and normalizes image by image, the network in fp32, and a loss "
        "that is read with `.item()` at every step. On two cores of a CPU, without workers, what takes the most time?",
        (
            Option(
                "preparing the images",
                "It takes its share; with many cores, which speed up convolutions only, it may take the largest.",
            ),
            Option(
                "the convolutions, mostly their backward pass",
                "Two products backward for each one forward: a gradient for the weights, and one for the input.",
                right=True,
            ),
            Option(
                "`.item()`, which stops everything at every step",
                "It waits for what was asked for. A CPU has that done already; a GPU has not.",
            ),
            Option(
                "the optimizer, which touches every weight",
                "It does, once a step; a convolution touches every weight once for each place of each image.",
            ),
        ),
    ),
    "07.flops": Quiz(
        "In the first block, a 3×3 convolution of 32 to 32 channels takes about 80 times the FLOPs of the batch norm "
        "behind it. Forward, on a CPU with bf16 instructions, it takes about …",
        (
            Option(
                "80 times the time: work is work",
                "So it would be if both waited for the multiplier; batch norm hardly multiplies.",
            ),
            Option(
                "as much time, within a factor of ten",
                "The convolution multiplies much, on units made for it; batch norm hardly, but reads every value.",
                right=True,
            ),
            Option(
                "a hundredth: matrix instructions are that fast",
                "They are fast, but the convolution has to read and write the same values, too.",
            ),
            Option(
                "300 times the time: a convolution also reads its weights",
                "Its weights are few and stay in the cache: 9,216 numbers.",
            ),
        ),
    ),
    "07.record": Quiz(
        "Leave one idea out of the record, and train it for as many epochs. Which one costs most test accuracy?",
        (
            Option(
                "the frozen first layer: one that learns takes its place",
                "It may cost something, but three networks cannot tell that from nothing.",
            ),
            Option(
                "the width: all layers but the first have half as many channels",
                "With a quarter of the FLOPs it learns less in as many epochs. It is faster, too: whether it catches "
                "up in as many seconds is the next question.",
                right=True,
            ),
            Option(
                "Muon: SGD takes its place",
                "SGD, at one untuned rate and without rescaled weights, stays behind, but by less than half the width.",
            ),
            Option(
                "flips that alternate: they come by chance",
                "By chance half of the images are seen the same way in two successive epochs. Three networks cannot "
                "tell what that costs.",
            ),
        ),
    ),
    "07.faults": Exercise(
        expects="a function f(model, optimizer, images, labels, val_images, val_labels) → (mean loss, accuracy)",
        right=partial(epoch_with, ()),
        because="None of the five faults is left, and the epoch still does its work.",
        mistakes=tuple(Mistake(partial(epoch_with, faults), what_remains(faults)) for faults in REMAINING),
        hints=(
            "Which lines would take longer with twice as many training images, although a step uses as many as before?",
            "torch.where chooses between two tensors. Which shape must the choice have, to choose whole images?",
            "A loss can be kept as a tensor, without its graph. When does anybody have to know its value?",
            "Validation has no backward pass. What tells PyTorch so, and how many images fit through at once?",
        ),
        measure=watched_epoch,
    ),
    "07.half": Exercise(
        expects="a number of images",
        right=half_calculating(),
        because="Talking takes 144 ms a step, whatever the batch, and that is how long so many images take.",
        mistakes=(
            Mistake(half_calculating(both=0), "Bytes are not all: each message has a latency, too."),
            Mistake(half_calculating(ways=1), "The bytes go round twice: 2 (p - 1) / p times β n."),
            Mistake(half_calculating(steps=1), "That is the way there alone: a step takes three times its FLOPs."),
            Mistake(half_calculating(bits=1), "10 Gbit are 1.25 GB a second: a byte has 8 bits."),
            Mistake(8 * half_calculating(), "Of one GPU, not of all eight."),
            Mistake(half_calculating(both=2), "α is that of two messages together: (p - 1) α, not 2 (p - 1) α."),
        ),
        hints=(
            "Half of the time: talking takes as long as calculating.",
            "What does T(n, p) give for p = 8, and n the bytes of 25.6 million gradients?",
            "How many FLOPs does a GPU do in that time, and how many does an image need in a step?",
        ),
        tolerance=0.003,
    ),
    "07.ridge": Exercise(
        expects="a number between 0 and 1",
        right=roofline_share(),
        because="4,096 FLOPs a pixel over 384 bytes are 10.7 FLOPs a byte, and at 40 GB/s these make 427 GFLOP/s.",
        mistakes=(
            Mistake(roofline_share(a_multiply_add=1), "A multiply-add is two FLOPs."),
            Mistake(roofline_share(write=False), "The output has to be written to memory, too."),
            Mistake(1.0, "That would take 20 FLOPs a byte, or more: count the bytes of input and output in fp32."),
            Mistake(roofline_share() * 800, "Asked for is the share of the peak, not the GFLOP/s."),
            Mistake(100 * roofline_share(), "That is in percent: asked for is a number between 0 and 1."),
            Mistake(1 / roofline_share(), "Upside down: a share of the peak is at most 1."),
        ),
        hints=(
            "For one pixel: how many multiply-adds make its 32 outputs from its 64 inputs?",
            "How many bytes are these 96 numbers in fp32?",
            "FLOPs a byte times bytes a second are FLOPs a second.",
        ),
        tolerance=0.01,
    ),
}

# ------------------------------------------------------------------------------------------- 08 Ablations compared

PAIRS = ((90.1, 89.7, 90.6, 90.0, 90.9, 89.9, 90.4), (89.9, 88.8, 90.1, 89.9, 89.9, 89.2, 89.8))  # percent, a seed each


def judged_pairs(sign: int = 1, quantile: float = 2.4469, margin: float = 0.5, of_mean: bool = True) -> tuple:
    """Return the 95 % interval of the difference of PAIRS and the verdict; the options are what one can get wrong."""
    d = torch.tensor(PAIRS[0], dtype=torch.float64) - torch.tensor(PAIRS[1], dtype=torch.float64)
    half = quantile * d.std().item() / (len(d) ** 0.5 if of_mean else 1)
    low, high = sign * d.mean().item() - half, sign * d.mean().item() + half
    return low, high, "supported" if low > margin else "refuted" if high < margin else "inconclusive"


def unpaired() -> tuple:
    """Return what `judged_pairs` does when the pairs are taken for two groups of runs that share nothing."""
    a, b = (torch.tensor(values, dtype=torch.float64) for values in PAIRS)
    half = 2.1788 * ((a.var() + b.var()) / len(a)).sqrt().item()  # t of 12 degrees of freedom
    return (a.mean() - b.mean()).item() - half, (a.mean() - b.mean()).item() + half, "inconclusive"


def to_two_digits(answer: tuple) -> tuple:
    """Return low and high to two digits, and the verdict in small letters, or none where the numbers are wrong."""
    low, high, verdict = answer
    ends = round(float(low), 2), round(float(high), 2)
    right = ends == tuple(round(end, 2) for end in judged_pairs()[:2])
    return *ends, str(verdict).strip().lower() if right else ""


LESSON_08 = {
    "08.largest": Quiz(
        "Which decision makes the largest difference to accuracy (in training or in validation, as its claim has it), "
        "each variant at its own best learning rate?",
        (
            Option(
                "doubling the channels from layer to layer, in place of keeping them constant",
                "At equal FLOPs that hardly makes a difference in these networks.",
            ),
            Option(
                "batch normalization, in the network of ten layers with He initialization",
                "It helps, by a few points: He initialization has done a good part of its work already.",
            ),
            Option(
                "residual connections, in a network of 58 layers",
                "Without them it hardly trains at all: by far the largest of these four; deeper, it is larger still.",
                right=True,
            ),
            Option(
                "dropout, on a small training set",
                "Its effect is small in such short runs, and even ten seeds do not always tell.",
            ),
        ),
    ),
    "08.verdict": Exercise(
        expects='a tuple (low, high, verdict), two numbers and "supported", "refuted" or "inconclusive"',
        right=judged_pairs(),
        because="The interval holds the margin of half a point: these seeds cannot tell, although zero lies outside.",
        mistakes=(
            Mistake(
                (*judged_pairs()[:2], "supported"), "Zero is outside of the interval, but the margin is half a point."
            ),
            Mistake(
                (*judged_pairs()[:2], "refuted"),
                "The interval reaches above the margin: it may be more than half a point.",
            ),
            Mistake(
                (*judged_pairs()[1::-1], "inconclusive"),
                "The low end comes first, then the high one: you swapped them.",
            ),
            Mistake(judged_pairs(quantile=1.96), "1.96 is the normal quantile: with seven pairs, t is larger."),
            Mistake(judged_pairs(quantile=1.9432), "0.95 leaves 5 % on one side; 2.5 % on each side is 0.975."),
            Mistake(judged_pairs(quantile=2.4469 * (6 / 7) ** 0.5), "NumPy's std() divides by n; ddof=1 is n − 1."),
            Mistake(judged_pairs(quantile=2.3646), "Seven differences leave six degrees of freedom, not seven."),
            Mistake(
                judged_pairs(of_mean=False), "That is where single differences lie; their mean varies by 1/√n of it."
            ),
            Mistake(unpaired(), "You took two groups: the same seed makes a pair, so take the differences first."),
            Mistake(judged_pairs(sign=-1), "Asked for is first − second: above zero where the first is better."),
        ),
        hints=(
            "Take the seven differences first, a seed each. Their mean is the middle of the interval.",
            "Half of its length is t · s / √n. Which s has pandas' .std()? How many degrees of freedom has t?",
            "Compare both ends with the margin, not with zero: if it lies between them, nothing is decided.",
        ),
        measure=to_two_digits,
    ),
    "08.seeds": Exercise(
        expects="a whole number",
        right=18,
        because="With 18 pairs t is 2.11, and 2.11 · 0.4 / √18 is just below 0.2; with 17 it is not.",
        tolerance=1e-6,
        mistakes=(
            Mistake(16, "That is so with the normal quantile 1.96; Student's t is larger, and falls with n."),
            Mistake(4, "Either you took one standard error in place of t of them, or √n was not squared in the end."),
            Mistake(64, "Asked for is half of the interval, to either side of the mean, not all of it."),
            Mistake(5, "√n stands under s: square, in the end, what you have found for it."),
        ),
        hints=(
            "Half of the interval is t · s / √n. Everything but t and n is given.",
            "t depends on n, so try: for n in itertools.count(2), until it is short enough.",
            "scipy.stats.t.ppf(0.975, n - 1) is t.",
        ),
    ),
}

REGISTRY: dict[str, Quiz | Exercise] = {
    **LESSON_00,
    **LESSON_01,
    **LESSON_02,
    **LESSON_03,
    **LESSON_04,
    **LESSON_05,
    **LESSON_06,
    **LESSON_07,
    **LESSON_08,
}
