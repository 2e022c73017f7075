"""Bad input: whatever is given is accepted and then right, or refused by one sentence that names it.

The cases are drawn by hypothesis, the same at each run. `make test` tries some of each kind, `make thorough` the rest;
the last lines of a run say how many there were.
"""

import contextlib
import functools
import io
import math
import os
import reprlib
import socket
import struct
import sys
import threading
import time
import traceback
import unicodedata
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, fields, replace
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import psutil
import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

import cnn
from utils import ablation, data, experiments, files, folders, links, model, train
from utils.data import Batches, ChannelStats, ImageData, Split
from utils.model import CNN, CNNConfig
from utils.train import Recipe

OURS = tuple(str(path) for path in (files.ROOT / "utils", files.ROOT / "cnn.py"))
REFUSED = object()  # instead of a result
LONGEST = 2000  # characters of a message: what a terminal shows without much scrolling
CASES: dict[str, Counter] = {"quick": Counter(), "thorough": Counter()}  # of each profile: accepted, refused
LEAST = {"quick": 150, "thorough": 500}
PROPERTIES: set[str] = set()  # the names of the tests that count
RAN: dict[str, set[str]] = {"quick": set(), "thorough": set()}


# ------------------------------------------------------------------------------------------- how a property is tested


class Profile:
    """How many cases a test tries, and the count of them."""

    def __init__(self, name: str) -> None:
        self.name, self.count = name, CASES[name]

    def try_cases(self, test: Callable, *, quick: int, thorough: int, **strategies: st.SearchStrategy) -> None:
        """Call `test` with values from `strategies`, so many times."""
        options = {"max_examples": {"quick": quick, "thorough": thorough}[self.name], "database": None}
        options |= {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}
        options |= {"phases": (Phase.explicit, Phase.generate, Phase.shrink)}
        settings(**options)(given(**strategies)(test))()

    def accepted(self) -> None:
        """Count a case whose result was checked."""
        self.count["accepted"] += 1

    def result(self, call: Callable[[], Any], names: Sequence[str], values: Sequence[Any] = (), kinds=()) -> Any:
        """Return what `call` gives, or REFUSED when our own check raises an error that names it.

        The message must be one line, contain one of `names` and show one of `values`; `kinds` may be raised besides
        ValueError and TypeError.
        """
        try:
            return call()
        except (ValueError, TypeError, *kinds) as caught:
            error = caught
        where = traceback.extract_tb(error.__traceback__)[-1].filename
        assert where.startswith(OURS), f"not a check of ours: {error!r} from {where}"
        check_message(str(error), names, values)
        self.count["refused"] += 1
        return REFUSED


@pytest.fixture(params=["quick", pytest.param("thorough", marks=pytest.mark.thorough)])
def profile(request) -> Iterator[Profile]:
    """Both profiles in turn; what was counted goes into the report, from where the last lines of a run have it."""
    before = Counter(CASES[request.param])
    yield Profile(request.param)
    RAN[request.param].add(request.node.originalname)
    request.node.user_properties.append(("bad input", dict(CASES[request.param] - before)))


def counted(test: Callable) -> Callable:
    """Mark a test as one of those whose cases are counted."""
    PROPERTIES.add(test.__name__)
    return test


def check_message(message: str, names: Sequence[str], values: Sequence[Any] = ()) -> None:
    """Assert that a message is one line that any terminal shows, and names what was wrong."""
    assert len(message.splitlines()) == 1, f"not one line: {message!r}"
    message.encode()  # UnicodeEncodeError for bytes of a file name that are no text
    assert len(message) <= LONGEST, f"{len(message)} characters: {message[:200]}…"
    assert any(name in message for name in names), f"names none of {names}: {message}"
    shown = {text(value) for value in values for text in (repr, str, reprlib.repr)}
    assert not values or any(text in message for text in shown), f"shows none of {shown}: {message}"


INTEGERS = (-(10**400), -1, 0, 1, 2, 7, 8, 64, 1000, 10**6, 10**9, 2**31, 2**32, 2**63, 2**64, 10**20, 10**400)
FLOATS = (-1.0, -0.0, 0.0, 5e-324, 1e-45, 0.5, 1.0, 1.5, 1e30, 1e300, math.inf, -math.inf, math.nan)
NUMPY = (np.int64(3), np.uint8(8), np.float32(0.25), np.float64(0.25), np.bool_(True), np.arange(3), np.array([]))
OTHERS = (
    None,
    True,
    False,
    "",
    "3",
    "nan",
    "x" * 300,
    "new\nline",
    "\udcff",
    "\0",
    b"3",
    (),
    (3,),
    [],
    [3],
    {},
    {3},
    {"a": 1},
    1j,
    Fraction(1, 2),
    Decimal("0.5"),
    torch.tensor(3),
    torch.zeros(3),
    Path("3"),
    int,
    print,
    range(3),
)
ANY = st.one_of(
    st.sampled_from(INTEGERS),
    st.sampled_from(FLOATS),
    st.sampled_from(NUMPY),
    st.sampled_from(OTHERS),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=8),
)


def often(right: st.SearchStrategy) -> st.SearchStrategy:
    """Half of the values from `right`, and half any."""
    return st.booleans().flatmap(lambda is_right: right if is_right else ANY)


# --------------------------------------------------------------------------------------------- configurations, recipes

WORDS = [model.ACTIVATIONS, model.NORMS, model.PLACES, model.POOLS, model.GROWTHS, model.INITS, train.SCHEDULES]
WORDS = [
    [*words, "batch"] for words in (*WORDS, ("data set", *data.INPUT_NORMS))
]  # of a field; "batch" is one of norm's


def plausible(default: Any) -> st.SearchStrategy:
    """Values of the right type, about half of them right."""
    if isinstance(default, bool):
        return st.booleans()
    if isinstance(default, int):
        return st.integers(-1, 12)
    if isinstance(default, float):
        return st.floats(-0.1, 1.1)
    return st.sampled_from(next((words for words in WORDS if default in words), (default,)))


def changes(config: type) -> st.SearchStrategy:
    """Any values for one to three fields of a configuration."""
    defaults = {field.name: field.default for field in fields(config)}
    names = st.lists(st.sampled_from(sorted(defaults)), min_size=1, max_size=3, unique=True)
    values = {name: often(plausible(default)) for name, default in defaults.items()}
    return names.flatmap(lambda chosen: st.fixed_dictionaries({name: values[name] for name in chosen}))


@counted
def test_a_network_is_what_its_configuration_says_or_is_refused(profile):
    def test(given: dict[str, Any]) -> None:
        config = profile.result(lambda: CNNConfig(**given), list(given), list(given.values()))
        if config is not REFUSED:
            check_network(config)
            profile.accepted()

    profile.try_cases(test, quick=40, thorough=600, given=changes(CNNConfig))


def check_network(config: CNNConfig) -> None:
    """Assert that a network has a bounded size, and gives finite logits of the right shape."""
    assert config.depth <= 1000
    assert config.weights <= 10**9
    if config.depth > 20 or config.weights > 10**6:
        return  # takes long, and is no other code
    torch.manual_seed(0)
    network = CNN(config)
    kernels = [weight for weight in network.parameters() if weight.ndim == 4 and weight.shape[2] == 3]
    assert sum(weight.numel() for weight in (*kernels, network.head.weight)) == config.weights
    side = 32 if config.norm in ("group", "layer") else 8  # of a map of 8×8 only single numbers are left
    images = torch.randn(3, config.in_channels, side, side)
    explodes = config.norm == "none" and not isinstance(config.init, str)  # which lesson 5 shows
    for mode in (True, False):
        logits = network.train(mode)(images)
        assert logits.shape == (3, config.num_classes)
        assert logits.isfinite().all() or explodes


def noise(n: int, channels: int = 1, side: int = 8, classes: int = 2) -> Split:
    images = torch.randint(0, 256, (n, channels, side, side), generator=torch.Generator().manual_seed(n))
    return Split(images.to(torch.uint8), torch.arange(n) % classes)


NOISE = ImageData("noise", noise(64), noise(8), ("a", "b"))
TINY = Recipe(epochs=1, batch_size=32)


@counted
def test_a_recipe_trains_or_is_refused(profile):
    def test(given: dict[str, Any]) -> None:
        given = {"epochs": 1, "batch_size": 32} | given
        names, values = list(given), list(given.values())
        recipe = profile.result(lambda: Recipe(**given), names, values)
        if recipe is REFUSED:
            return
        history = profile.result(lambda: fitted(recipe), names, [*values, "one image"])
        if history is not REFUSED:
            assert history is None or np.isfinite(history.loc[history["split"] == "train", "value"]).all()
            profile.accepted()

    profile.try_cases(test, quick=25, thorough=400, given=changes(Recipe))


def fitted(recipe: Recipe) -> train.History | None:
    """Train one epoch on 64 images; None for a learning rate that diverges. The schedule is asked for all epochs."""
    network = CNN(CNNConfig(width=2, num_classes=2))
    steps = recipe.epochs * max(1, 64 // recipe.batch_size)
    schedule = train.make_schedule(train.make_optimizer(network, recipe), recipe, steps)
    factors = [factor(step) for factor in getattr(schedule, "lr_lambdas", ()) for step in (0, steps // 2, steps)]
    assert all(0 <= factor <= 1 for factor in factors)
    options = {"device": "cpu", "precision": "fp32", "progress": False}
    try:
        return train.fit(network, NOISE, replace(recipe, epochs=1), **options)
    except train.Diverged as error:
        check_message(str(error), ["(--lr)"])
        return None


# ------------------------------------------------------------------------------------------- arguments of the functions


def pattern(path: Path, size: tuple[int, int] = (9, 8), mode: str = "RGB", seed: int = 0) -> np.ndarray:
    """Write random pixels, `size` is height and width, and return them: H×W×C."""
    shape = size if mode == "L" else (*size, len(mode))
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(pixels, mode).save(path)
    return pixels.reshape(*size, -1)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A folder of two classes with 12 images each."""
    root = tmp_path_factory.mktemp("images") / "small"
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
        for i in range(12):
            pattern(root / name / f"{i:02}.png", seed=i)
    return root


def refuse_network(*args, **kwargs):
    raise OSError("no network in this test")


SIZES = often(st.sampled_from((8, 9, 16, 31, 4096, 4097, 10**5)))
CHANNELS = often(st.sampled_from((1, 2, 3, 4, 1.0, 3.0)))


@counted
def test_size_and_channels_of_data_are_kept_or_refused(profile, small):
    def test(size: Any, channels: Any) -> None:
        assume(not isinstance(size, int) or size <= 64 or size > data.LARGEST_SIDE)  # much memory, and no other code
        given = {"size": size, "channels": channels}
        call = functools.partial(data.load, small, progress=False, **given)
        found = profile.result(call, ["size", "channels"], [size, channels])
        if found is REFUSED:
            return
        assert found.train.images.shape == (18, channels or 3, *((size, size) if size else (9, 8)))
        profile.accepted()

    def test_one(size: Any) -> None:
        test(size, None)

    def test_other(channels: Any) -> None:
        test(None, channels)

    profile.try_cases(test_one, quick=8, thorough=60, size=SIZES)
    profile.try_cases(test_other, quick=8, thorough=60, channels=CHANNELS)
    profile.try_cases(test, quick=4, thorough=30, size=SIZES, channels=CHANNELS)


DATA_NAMES = ("fashion_mnist", "MNIST", "", " ", ".", "..", "~", "~nobody/x", "/dev/null", "\0", "a\nb", "x" * 300)


@counted
def test_a_data_set_is_found_or_refused(profile, small, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", refuse_network)
    monkeypatch.chdir(small)
    places = {name: (Path(name).resolve(), Path(name).expanduser()) for name in (".", "..", "~", "/dev/null")}

    def test(name: Any) -> None:
        found = profile.result(
            lambda: data.load(name, progress=False),
            ["data set", "images", "folder"],
            [name, *(places[name] if isinstance(name, str) and name in places else ())],
            kinds=(OSError,),
        )
        assert (found is REFUSED) == (not isinstance(name, str) or name != ".")
        if found is not REFUSED:
            assert found.name == "small"
            profile.accepted()

    profile.try_cases(test, quick=12, thorough=80, name=often(st.sampled_from(DATA_NAMES)))


@counted
def test_take_gives_so_many_images_or_refuses(profile):
    def test(n: Any) -> None:
        part = profile.result(lambda: NOISE.take(n), ["take("], [n])
        if part is not REFUSED:
            assert len(part.train) == n
            assert part.train.labels.bincount().tolist() == [n - n // 2, n // 2]
            profile.accepted()

    profile.try_cases(test, quick=10, thorough=60, n=often(st.integers(0, 70)))


RAW = ChannelStats((0.0,), (1 / 255,), 1)
BATCH_OPTIONS = {
    "batch_size": often(st.integers(0, 70)),
    "crop_padding": often(st.integers(-1, 9)),
    "cutout": often(st.integers(-1, 9)),
    "seed": ANY,
    "device": often(st.sampled_from(("cpu", "cuda:99", "gpu", "cpu:0", "mps:7"))),
    "shuffle": st.booleans(),
    "drop_last": st.booleans(),
    "flip": st.booleans(),
    "alternate": st.booleans(),
}


@counted
def test_batches_hold_each_image_once_or_are_refused(profile):
    def test(given: dict[str, Any]) -> None:
        given = {"batch_size": 16} | given
        names, values = [*given, "number of images"], list(given.values())
        batches = profile.result(lambda: Batches(NOISE.train, RAW, **given), names, values)
        if batches is REFUSED:
            return
        epoch = list(batches)
        count = len(batches) * given["batch_size"] if given.get("drop_last") else 64
        assert (len(epoch), sum(len(labels) for _, labels in epoch)) == (len(batches), count)
        assert all(images.shape[1:] == (1, 8, 8) and images.isfinite().all() for images, _ in epoch)
        profile.accepted()

    names = st.lists(st.sampled_from(sorted(BATCH_OPTIONS)), min_size=1, max_size=4, unique=True)
    given = names.flatmap(lambda chosen: st.fixed_dictionaries({name: BATCH_OPTIONS[name] for name in chosen}))
    profile.try_cases(test, quick=25, thorough=250, given=given)


@counted
def test_one_image_is_read_in_the_size_asked_for_or_refused(profile, small):
    pair = st.tuples(st.integers(-1, 20), st.integers(-1, 20))
    path = small / "a" / "00.png"

    def test(size: Any, channels: Any) -> None:
        found = profile.result(lambda: data.read_image(path, size, channels), ["size", "channels"], [size, channels])
        if found is not REFUSED:
            assert found.shape == (channels or 3, *(size or (9, 8)))
            profile.accepted()

    def test_path(name: Any) -> None:
        values = [name, Path(name), folders.shown(name)] if isinstance(name, str) else [name]
        found = profile.result(lambda: data.read_image(name), ["image", "cannot be read"], values, kinds=(OSError,))
        assert found is REFUSED

    profile.try_cases(lambda size: test(size, None), quick=6, thorough=50, size=often(pair))
    profile.try_cases(lambda channels: test(None, channels), quick=6, thorough=50, channels=CHANNELS)
    profile.try_cases(test_path, quick=10, thorough=60, name=often(st.sampled_from(DATA_NAMES)))


# ------------------------------------------------------------------------------------------------- arguments of a sweep

PLAN = {"base": CNNConfig(width=2), "vary": {"norm": ["batch", "none"]}, "recipe": TINY, "seeds": [0, 1]}
VARY = (
    {},
    {"norm": []},
    {"norm": ["batch"]},
    {"norm": "batch"},
    {"norm": ["batch", "batch"]},
    {"norm": ["batch", None]},
    {"norm": None},
    {"norm": 5},
    {"nrom": ["batch", "none"]},
    {"seed": [0, 1]},
    {"lr": [0.1, 0.2]},
    {"width": [2, 10**9]},
    {"width": [2, "3"]},
    {"width": np.array([2, 3])},
    {"width": range(2, 5)},
    {"width": {"small": 2, "large": 3}},
    {"width": iter([2, 3])},
    {"norm": ["batch", "none"], "width": [2, 3]},
    {"norm": [[], {}]},
    {3: [1, 2]},
    "norm",
    ["norm"],
    [("norm", ["batch", "none"])],
)
SWEEPS = {
    "vary": often(st.sampled_from(VARY)),
    "base": ANY,
    "recipe": ANY,
    "seeds": st.lists(often(st.integers(0, 9)), max_size=3),
    "lr": st.one_of(
        ANY,
        st.lists(often(st.floats(0.01, 1)), max_size=3),
        st.sampled_from(({}, {"batch": 0.1}, {"batch": 0.1, "none": [0.1, 0.2]}, {"batch": "x", "none": 0.1}, [])),
    ),
    "along": st.one_of(
        ANY,
        st.sampled_from(({}, {"none": {"width": 3}}, {"nosuch": {}}, {"none": 5}, {"none": {"seed": 1}}, {"none": {}})),
    ),
    "grid": ANY,
    "source": ANY,
    "device": often(st.sampled_from(("cpu", "gpu", "auto"))),
    "precision": often(st.sampled_from(("fp32", "fp64", "fp8", "fp16", "auto"))),
}


@counted
def test_a_sweep_is_planned_or_refused(profile):
    def test(given: dict[str, Any]) -> None:
        values = [] if "vary" in given else [*given.values(), *(p for value in given.values() for p in parts(value))]
        names = [*given, "seed=", "variants", *(str(part) for value in given.values() for part in parts(value))]
        trials = profile.result(lambda: ablation.plan(**PLAN | given), names, values)
        if trials is not REFUSED:
            assert trials
            for (_, lr, seed), trial in trials.items():
                assert (trial.recipe.lr, trial.recipe.seed) == (lr, seed)
                assert isinstance(trial.config, CNNConfig)
            profile.accepted()

    names = st.lists(st.sampled_from(sorted(SWEEPS)), min_size=1, max_size=2, unique=True)
    given = names.flatmap(lambda chosen: st.fixed_dictionaries({name: SWEEPS[name] for name in chosen}))
    profile.try_cases(test, quick=30, thorough=300, given=given)


def parts(value: Any) -> list[Any]:
    """What stands in a nested argument."""
    if isinstance(value, Mapping):
        return [*value, *(part for inner in value.values() for part in (inner, *parts(inner)))]
    return list(value) if isinstance(value, list | tuple | range) else []


@counted
def test_the_name_and_the_processes_of_a_sweep_are_refused_before_anything_is_trained(profile, monkeypatch):
    made_up = [[1, 2, "train", train.DIVERGED, 0.0, 0.1]]
    monkeypatch.setattr(ablation, "in_parallel", lambda trials, jobs: [(trial, made_up) for trial in trials])
    options = PLAN | {"seeds": [0], "source": ablation.Source(images=64), "progress": False, "device": "cpu"}
    trained = []
    monkeypatch.setattr(ablation, "keep", lambda trial, rows: trained.append(trial))

    def test(experiment: Any, jobs: Any) -> None:
        trained.clear()
        call = functools.partial(ablation.run, experiment, **options, jobs=jobs)
        rows = profile.result(call, ["experiment", "jobs"], [experiment, jobs])
        if rows is REFUSED:
            assert not trained
        else:
            assert len(trained) == len(rows) == 2
            written = set(ablation.sweeps().parent.rglob("*.csv"))
            assert written
            assert {path.parent for path in written} == {ablation.sweeps()}
            for path in written:
                path.unlink()
            profile.accepted()

    names = often(st.sampled_from(("../../x", "..", "/etc/passwd", "", "a b", "x" * 300, "é", "CON")))
    profile.try_cases(lambda experiment: test(experiment, 1), quick=8, thorough=40, experiment=names)
    profile.try_cases(lambda jobs: test("named", jobs), quick=8, thorough=40, jobs=ANY)


def test_no_more_processes_are_started_than_there_are_runs(monkeypatch):
    """joblib would start all that it is allowed to."""
    trials = list(ablation.plan(**PLAN, device="cpu").values())
    asked = []
    monkeypatch.setattr(ablation.joblib, "Parallel", lambda n_jobs, **_: asked.append(n_jobs) or (lambda tasks: []))
    for jobs in (1, 10**6, None):
        assert list(ablation.in_parallel(trials, jobs)) == []
    assert asked[:2] == [1, 4]
    assert asked[2] == min(4, joblib.cpu_count())


# --------------------------------------------------------------------------------------------------- folders of images

HEIGHT, WIDTH = 9, 7
TURNS = {  # EXIF orientation → how the stored pixels are brought upright (CIPA DC-008, table 6)
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


def random_pixels(seed: int, channels: int, dtype: type = np.uint8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max + 1, (HEIGHT, WIDTH, channels), dtype)


def image_of(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def by_pillow(path: Path, mode: str = "RGB") -> np.ndarray:
    """What Pillow makes of a file's first image."""
    with Image.open(path) as image:
        converted = np.array(image.convert(mode))
    return converted.reshape(*converted.shape[:2], -1)


def on_white(pixels: np.ndarray) -> np.ndarray:
    """H×W×2 or H×W×4 pixels, the last channel alpha, over white; others as they are."""
    if pixels.shape[2] not in (2, 4):
        return pixels
    colour, alpha = pixels[:, :, :-1].astype(float), pixels[:, :, -1:] / 255
    return np.round(colour * alpha + 255 * (1 - alpha)).astype(np.uint8)


def png(width: int, height: int, depth: int, colour: int, rows: bytes | Iterator[bytes], extra: bytes = b"") -> bytes:
    """A PNG file by its specification; `rows` are compressed one after the other."""
    packer = zlib.compressobj(6)
    packed = b"".join(packer.compress(row) for row in ([rows] if isinstance(rows, bytes) else rows)) + packer.flush()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def saved(mode: str, suffix: str, channels: int, exact: bool = True, **options: Any) -> Callable:
    """Make a file by Pillow, from random pixels; exactly those are read, or what Pillow reads."""

    def make(path: Path, seed: int) -> np.ndarray:
        pixels = random_pixels(seed, channels)
        image_of(pixels).convert(mode).save(path, **options)
        return on_white(pixels if exact else by_pillow(path, {1: "L", 3: "RGB", 4: "RGBA"}[channels]))

    make.suffix = suffix
    return make


def deep(colour: int, channels: int) -> Callable:
    """16 bits a channel: the upper 8 are kept."""

    def make(path: Path, seed: int) -> np.ndarray:
        pixels = random_pixels(seed, channels, np.uint16)
        rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
        path.write_bytes(png(WIDTH, HEIGHT, 16, colour, rows))
        upper = on_white((pixels >> 8).astype(np.uint8))
        return upper.repeat(3, 2) if channels == 2 else upper  # Pillow has no such greys

    make.suffix = ".png"
    return make


def turned(orientation: int, suffix: str) -> Callable:
    def make(path: Path, seed: int) -> np.ndarray:
        exif = Image.Exif()
        exif[0x0112] = orientation
        image_of(random_pixels(seed, 3)).save(path, exif=exif)
        return TURNS[orientation](by_pillow(path))

    make.suffix = suffix
    return make


def animated(suffix: str, as_format: str) -> Callable:
    """Three images in one file, of which the first is read."""

    def make(path: Path, seed: int) -> np.ndarray:
        first, *others = (image_of(random_pixels(seed + i, 3)) for i in range(3))
        lossless = {"lossless": True} if as_format == "WEBP" else {}
        first.save(path, as_format, save_all=True, append_images=others, duration=100, **lossless)
        return np.array(first) if as_format != "GIF" else by_pillow(path)

    make.suffix = suffix
    return make


def made(suffix: str, write: Callable[[Path, int], Any]) -> Callable:
    """A file that `write` makes; it returns the pixels, or None: the file is refused."""

    def make(path: Path, seed: int) -> np.ndarray | None:
        return write(path, seed)

    make.suffix = suffix
    return make


def palette(path: Path, seed: int) -> np.ndarray:
    """Colours by number, some of them transparent."""
    pixels = random_pixels(seed, 3)
    image_of(pixels).quantize(16).save(path, transparency=bytes(range(0, 256, 16)))
    return on_white(by_pillow(path, "RGBA"))


def grey_with_a_transparent_value(path: Path, seed: int) -> np.ndarray:
    pixels = random_pixels(seed, 1)
    image_of(pixels).save(path, transparency=int(pixels[0, 0, 0]))
    return np.where(pixels == pixels[0, 0, 0], np.uint8(255), pixels)


def black_and_white(path: Path, seed: int) -> np.ndarray:
    pixels = random_pixels(seed, 1) // 128 * 255
    image_of(pixels).convert("1").save(path)
    return pixels


def another_format(as_format: str) -> Callable[[Path, int], np.ndarray]:
    """A file whose name says another kind than it is."""

    def write(path: Path, seed: int) -> np.ndarray:
        image_of(random_pixels(seed, 3)).save(path, as_format)
        return by_pillow(path)

    return write


def one_pixel(path: Path, seed: int) -> np.ndarray:
    pixels = random_pixels(seed, 3)[:1, :1]
    image_of(pixels).save(path)
    return pixels


def a_link(path: Path, seed: int) -> np.ndarray:
    target = path.with_name(f".target-{seed}.png")
    pixels = random_pixels(seed, 3)
    image_of(pixels).save(target)
    path.symlink_to(target.name)
    return pixels


def refused(content: Callable[[], bytes]) -> Callable[[Path, int], None]:
    return lambda path, seed: path.write_bytes(content()) and None


def as_bytes(suffix: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image_of(random_pixels(3, 3)).save(file, suffix, **options)
    return file.getvalue()


def a_listening_socket(path: Path, seed: int) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


def tiff(mode: str) -> Callable[[Path, int], None]:
    """Pixels of 32 bits, which nothing says the range of, in a TIFF file that is called a PNG."""
    return lambda path, seed: Image.new(mode, (WIDTH, HEIGHT), 1000).save(path, "TIFF")


def jpeg_of_claimed_size() -> bytes:
    """A JPEG file of 9 × 7 pixels whose header says 65,500 × 65,500."""
    return as_bytes("JPEG").replace(struct.pack(">HH", HEIGHT, WIDTH), struct.pack(">HH", 65_500, 65_500), 1)


def inflating_text() -> bytes:
    """100 MB of comment, in 100 kB."""
    comment = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(10**8), 9))
    return png(WIDTH, HEIGHT, 8, 0, bytes((WIDTH + 1) * HEIGHT), comment)


GOOD = {
    "grey": saved("L", ".png", 1),
    "grey and alpha": saved("LA", ".png", 2),
    "colour": saved("RGB", ".png", 3),
    "colour and alpha": saved("RGBA", ".png", 4),
    "upper-case suffix": saved("RGB", ".PNG", 3),
    "black and white": made(".png", black_and_white),
    "palette, in part transparent": made(".png", palette),
    "one transparent grey": made(".png", grey_with_a_transparent_value),
    "16-bit grey": deep(0, 1),
    "16-bit grey and alpha": deep(4, 2),
    "16-bit colour": deep(2, 3),
    "16-bit colour and alpha": deep(6, 4),
    "interlaced by name": saved("RGB", ".Png", 3, optimize=True),
    "JPEG": saved("RGB", ".jpg", 3, exact=False),
    "grey JPEG": saved("L", ".JPEG", 1, exact=False),
    "progressive JPEG": saved("RGB", ".jpeg", 3, exact=False, progressive=True),
    "CMYK JPEG": saved("CMYK", ".jpg", 3, exact=False),
    "WebP": saved("RGB", ".webp", 3, lossless=True),
    "WebP with alpha": saved("RGBA", ".WEBP", 4, exact=False, lossless=True),
    "animated WebP": animated(".webp", "WEBP"),
    "animated PNG": animated(".png", "PNG"),
    "animated GIF called PNG": animated(".png", "GIF"),
    "BMP called JPEG": made(".jpg", another_format("BMP")),
    "WebP called PNG": made(".png", another_format("WEBP")),
    "1×1 pixel": made(".png", one_pixel),
    "a link": made(".png", a_link),
    **{f"turned PNG {i}": turned(i, ".png") for i in TURNS},
    "turned JPEG 6": turned(6, ".jpg"),
    "turned WebP 3": turned(3, ".webp"),
}
BAD = {
    "empty": made(".png", refused(lambda: b"") and (lambda path, seed: path.touch())),
    "text": made(".png", refused(lambda: b"no image")),
    "truncated PNG": made(".png", refused(lambda: as_bytes("PNG")[:-60])),
    "truncated JPEG": made(".jpg", refused(lambda: as_bytes("JPEG")[:-200])),
    "header only": made(".webp", refused(lambda: as_bytes("WEBP")[:30])),
    "wrong checksum": made(".png", refused(lambda: as_bytes("PNG").replace(b"IDAT", b"IDAT\1", 1))),
    "no pixels": made(".png", refused(lambda: png(0, 0, 8, 0, b""))),
    "SVG": made(".png", refused(lambda: b"<svg xmlns='http://www.w3.org/2000/svg' width='8' height='8'/>")),
    "PostScript": made(".jpg", refused(lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n")),
    "ZIP archive": made(".png", refused(lambda: b"PK\3\4" + bytes(100))),
    "32-bit TIFF": made(".png", tiff("I")),
    "TIFF of floats": made(".png", tiff("F")),
    "claimed size": made(".jpg", refused(jpeg_of_claimed_size)),
    "inflating text": made(".png", refused(inflating_text)),
    "a folder": made(".png", lambda path, seed: path.mkdir()),
    "a link to nothing": made(".png", lambda path, seed: path.symlink_to("nothing.png")),
    "a link to itself": made(".png", lambda path, seed: path.symlink_to(path.name)),
    "links in a circle": made(".png", lambda path, seed: in_a_circle(path)),
    "a pipe": made(".png", lambda path, seed: os.mkfifo(path)),
    "a socket": made(".png", a_listening_socket),
    "a device": made(".png", lambda path, seed: path.symlink_to("/dev/zero")),
}
LEFT_OUT = {
    "GIF": made(".gif", another_format("GIF")),
    "BMP": made(".BMP", another_format("BMP")),
    "TIFF": made(".tiff", another_format("TIFF")),
}


def in_a_circle(path: Path) -> None:
    other = path.with_name(f".{path.name[:50]}")
    path.symlink_to(other.name)
    other.symlink_to(path.name)


def can_be_made(make: Callable, folder: Path) -> bool:
    """Whether this system has such files: Windows has no pipes, and links only for some."""
    try:
        with contextlib.chdir(folder):
            make(Path(f"x{make.suffix}"), 0)
    except (OSError, AttributeError, NotImplementedError):
        return False
    return True


@pytest.fixture(scope="module")
def kinds(tmp_path_factory) -> dict[str, dict[str, Callable]]:
    found = {}
    for title, group in {"good": GOOD, "bad": BAD, "left out": LEFT_OUT}.items():
        found[title] = {
            name: make for name, make in group.items() if can_be_made(make, tmp_path_factory.mktemp("kind"))
        }
    return found


def expected(native: np.ndarray, size: tuple[int, int] | None, channels: int | None) -> np.ndarray:
    """What the course makes of upright pixels H×W×C, by Pillow's own conversion."""
    grey = native.shape[2] == 1 if channels is None else channels == 1
    image = image_of(np.ascontiguousarray(native)).convert("L" if grey else "RGB")
    if size:
        image = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.BILINEAR)
    return np.array(image).reshape(image.height, image.width, -1)


@counted
def test_each_kind_of_image_is_what_pillow_makes_of_it_or_is_refused(profile, kinds, tmp_path):
    """Every kind in the quick profile, in every size and channels in the thorough one."""
    count = iter(range(10**6))

    def test(name: str, size: tuple[int, int] | None, channels: int | None) -> None:
        good = name in kinds["good"]
        make = (kinds["good"] | kinds["bad"])[name]
        folder = tmp_path / str(next(count))
        folder.mkdir()
        with contextlib.chdir(folder):  # a socket's path is short
            native = make(path := Path(f"some{make.suffix}"), 1)
            if good:
                assert np.array_equal(folders.decode(path, size, channels), expected(native, size, channels)), name
                profile.accepted()
            else:
                assert (
                    profile.result(lambda: folders.decode(path, size, channels), [path.name], (), (OSError,)) is REFUSED
                )

    for name in (*kinds["good"], *kinds["bad"]):
        test(name, None, None)
    sizes = st.one_of(st.none(), st.tuples(st.integers(1, 20), st.integers(1, 20)))
    options = {"size": sizes, "channels": st.sampled_from((None, 1, 3))}
    profile.try_cases(test, quick=20, thorough=400, name=st.sampled_from([*kinds["good"], *kinds["bad"]]), **options)


NAMES = (
    "plain",
    "with spaces",
    " before and after ",
    "caf\u00e9",  # é in one piece (NFC), as Linux and Windows write it
    "cafe\u0301",  # and in two (NFD), as macOS may
    "日本語",
    "👩\u200d🔬",
    "العربية",
    "new\nline",
    "tab\tand\rreturn",
    "\u2028",
    "\x7f\x1b[31m",
    "100%s {0} {x}",
    'it\'s "quoted"',
    "-rf",
    "--help",
    "~",
    "$HOME `id` $(id) ; & | > <",
    "a*b?[c]",
    "#1",
    "train",
    "n" * 200,
    "é" * 100,
    os.fsdecode(b"latin-1 caf\xe9") if os.name == "posix" else "latin",
    "CON",
    "trailing.",
    "<b>bold</b>",
    ".hidden",
)


def to_use(names: Sequence[str], folder: Path) -> list[str]:
    """Those of `names` that a file may have on this system, and that it gives back as they are."""
    found = []
    for name in names:
        with contextlib.suppress(OSError, ValueError):
            (folder / name).mkdir()
            found += [name] if name in {entry.name for entry in os.scandir(folder)} else []
    return found


def no_text(name: str) -> bool:
    return any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in name)


@dataclass
class Made:
    """A folder as it was made: the pixels of each image, or None, by class and name."""

    root: Path
    pixels: dict[str, dict[str, np.ndarray | None]]
    left_out: int


def make_folder(root: Path, classes: dict[str, list[tuple[str, str]]], kinds: dict[str, dict[str, Callable]]) -> Made:
    """Make a folder: of each class, names (without suffix) and kinds of its files."""
    everything, found, left_out = kinds["good"] | kinds["bad"] | kinds["left out"], {}, 0
    for label, files_in in classes.items():
        (root / label).mkdir(parents=True)
        found[label] = {}
        for seed, (name, kind) in enumerate(files_in):
            make = everything[kind]
            path = root / label / f"{seed}{name}{make.suffix}"
            with contextlib.chdir(path.parent):
                native = make(Path(path.name), seed)
            if kind in kinds["left out"]:
                left_out += 1
            else:
                found[label][path.name] = native
    return Made(root, found, left_out)


@counted
def test_a_folder_is_read_as_it_is_or_refused(profile, kinds, tmp_path):
    """Any names, any kinds of files: the pixels are Pillow's, the labels are the folders', a message names the file."""
    count = iter(range(10**6))
    names = to_use(NAMES, tmp_path)
    texts = [name for name in names if not no_text(name) and not name.startswith(".")]
    short = [name for name in names if len(os.fsencode(name)) < 150 and not name.startswith(".")]
    plain = [name for name in kinds["good"] if "turned" not in name and "1×1" not in name]
    colour = [name for name in plain if "grey" not in name and name != "black and white"]

    def folder(of_kinds: st.SearchStrategy, labels: list[str], least: int) -> st.SearchStrategy:
        files_in = st.lists(st.tuples(st.sampled_from(short), of_kinds), min_size=least, max_size=9)
        return st.dictionaries(st.sampled_from(labels), files_in, min_size=least - 1, max_size=3)

    def test(classes: dict, size: int | None, channels: int | None) -> None:
        made = make_folder(tmp_path / f"n{next(count)}", classes, kinds)
        check_folder(profile, made, size, channels)

    options = {"size": st.sampled_from((None, 8)), "channels": st.sampled_from((None, 1, 3))}
    mostly_good = st.one_of(st.sampled_from(plain), st.sampled_from(plain), st.sampled_from(sorted(kinds["bad"])))
    for of_kinds, labels, least, quick in (
        (st.sampled_from(colour), texts, 3, 12),
        (st.sampled_from([*plain, *kinds["left out"]]), texts, 3, 12),
        (st.sampled_from([*kinds["good"]]), names, 2, 6),
        (mostly_good, names, 2, 6),
    ):
        profile.try_cases(test, quick=quick, thorough=12 * quick, classes=folder(of_kinds, labels, least), **options)


def check_folder(profile: Profile, made: Made, size: int | None, channels: int | None) -> None:
    """Assert that `data.load` reads a folder as it was made, or says what is wrong with it."""
    classes = {name: made.pixels[name] for name in made.pixels if not name.startswith(".")}
    normal = {name: unicodedata.normalize("NFC", name) for name in classes}
    reasons = [name for name in classes if no_text(name)]
    reasons += [name for name in classes if len(classes[name]) < 3]
    reasons += [name for name in classes if list(normal.values()).count(normal[name]) > 1]
    broken = [name for files_in in classes.values() for name, pixels in files_in.items() if pixels is None]
    all_pixels = [pixels for files_in in classes.values() for pixels in files_in.values() if pixels is not None]
    shapes = {expected(pixels, size and (size, size), channels).shape for pixels in all_pixels}
    mixed = ["--size", "--channels"] if len(shapes) > 1 else []
    alone = ["class folder"] if len(classes) < 2 else []
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        found = profile.result(
            functools.partial(data.load, made.root, size=size, channels=channels, progress=False),
            [repr(name)[1:-1] for name in (*reasons, *broken)] + [*reasons, *broken, *mixed, *alone],
            kinds=(FileNotFoundError,),
        )
    told = [str(warning.message) for warning in warned if "left out" in str(warning.message)]
    assert len(told) <= 1
    if found is REFUSED:
        return
    assert bool(told) == any(made.left_out for _ in (0,) if made.left_out)
    assert not reasons
    assert not broken
    assert not mixed
    assert not alone
    names = sorted(classes, key=normal.get)
    assert found.class_names == tuple(normal[name] for name in names)
    test = found.read_test("bad input")
    splits = {"train": found.train, "validation": found.validation, "test": test}
    wanted: dict[str, list[tuple[np.ndarray, int]]] = {name: [] for name in splits}
    for label, name in enumerate(names):
        in_order = [classes[name][file] for file in sorted(classes[name])]
        rest = [pixels for i, pixels in enumerate(in_order) if i % data.TEST_EVERY]
        wanted["test"] += [(pixels, label) for pixels in in_order[:: data.TEST_EVERY]]
        wanted["validation"] += [(pixels, label) for pixels in rest[:: data.VALIDATION_EVERY]]
        wanted["train"] += [(pixels, label) for i, pixels in enumerate(rest) if i % data.VALIDATION_EVERY]
    for part, split in splits.items():
        assert split.labels.tolist() == [label for _, label in wanted[part]]
        for image, (pixels, _) in zip(split.images, wanted[part], strict=True):
            assert np.array_equal(image.permute(1, 2, 0), expected(pixels, size and (size, size), channels))
    profile.accepted()


def test_train_and_test_may_write_an_accent_differently(tmp_path):
    """As after a ZIP archive from macOS."""
    for part, name in (("train", "caf\u00e9"), ("test", "cafe\u0301"), ("train", "b"), ("test", "b")):
        (tmp_path / part / name).mkdir(parents=True)
        for i in range(3):
            pattern(tmp_path / part / name / f"{i}.png")
    assert data.load(tmp_path, progress=False).class_names == ("b", "caf\u00e9")


@pytest.mark.skipif(os.name == "nt", reason="links are for some users only")
def test_a_class_that_is_a_link_to_nothing_is_not_left_out_in_silence(small, tmp_path):
    for target in ("nothing", "c"):
        root = tmp_path / target
        root.mkdir()
        for name in ("a", "b"):
            (root / name).symlink_to(small / name)
        assert len(data.load(root, progress=False).train) == 18
        (root / "c").symlink_to(target)
        with pytest.raises(ValueError, match="c is a link that leads nowhere: mend or remove it"):
            data.load(root, progress=False)


@pytest.mark.skipif(os.name == "nt", reason="links are for some users only")
def test_a_link_to_the_folder_above_ends(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(3):
            pattern(tmp_path / name / f"{i}.png")
        (tmp_path / name / "up").symlink_to(tmp_path)
    assert len(data.load(tmp_path, progress=False).train) == 2


def test_images_of_other_kinds_are_left_out_and_told(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(3):
            pattern(tmp_path / name / f"{i}.png")
        for suffix in (".gif", ".HEIC"):
            (tmp_path / name / f"left{suffix}").write_bytes(b"")
    (tmp_path / "a" / "notes.txt").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"are left out \(2 .gif, 2 .heic\): convert them") as warned:
        assert len(data.load(tmp_path, progress=False).train) == 2
    assert len([each for each in warned if each.category is UserWarning]) == 1  # another test's leaks are not of it


# --------------------------------------------------------------------------------------------------- limits of a folder


@contextlib.contextmanager
def memory_watched() -> Iterator[list[int]]:
    """Collect how much more memory than before the process takes while the block runs, about every millisecond."""
    process, ended, grown = psutil.Process(), threading.Event(), [0]
    before = process.memory_info().rss

    def watch() -> None:
        while not ended.wait(0.001):
            grown.append(process.memory_info().rss - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield grown
    finally:
        ended.set()
        watcher.join()


def write_bomb(path: Path, side: int, depth: int = 8) -> None:
    """A white square of so many pixels a side; its rows are compressed one by one."""
    row = b"\0" + b"\xff" * (side * depth // 8)
    path.write_bytes(png(side, side, depth, 0, (row for _ in range(side))))


@pytest.mark.parametrize(
    ("side", "depth"), [(20_000, 1), pytest.param(20_000, 8, marks=pytest.mark.thorough), (10_000, 1)]
)
def test_a_decompression_bomb_is_refused_before_it_is_decoded(side, depth, small, tmp_path):
    """20,000 × 20,000 pixels would take 400 MB, in each thread; they come in less than 1 MB."""
    bomb = tmp_path / "bomb.png"
    write_bomb(bomb, side, depth)
    assert bomb.stat().st_size < 10**6
    root = tmp_path / "images"
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
        for path in (small / name).iterdir():
            (root / name / path.name).write_bytes(path.read_bytes())
    (root / "a" / "bomb.png").write_bytes(bomb.read_bytes())
    remedy = "bomb.png has too many pixels: .*limit.*[Mm]ake it smaller, or raise PIL.Image.MAX_IMAGE_PIXELS"
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    with memory_watched() as grown:
        for call in (
            lambda: data.read_image(bomb),
            lambda: data.read_image(bomb, (28, 28), 1),
            lambda: data.load(root, size=28, progress=False),
        ):
            with pytest.raises(ValueError, match=remedy) as caught:
                call()
            check_message(str(caught.value), ["bomb.png"])
    assert max(grown) < 60e6


def test_the_watch_sees_an_image_that_is_decoded(tmp_path):
    write_bomb(tmp_path / "large.png", 9000)  # just below Pillow's limit
    with memory_watched() as grown:
        assert data.read_image(tmp_path / "large.png").shape == (1, 9000, 9000)
    assert max(grown) > 70e6


def test_inflating_text_takes_no_memory(tmp_path):
    (tmp_path / "text.png").write_bytes(inflating_text())
    with memory_watched() as grown, pytest.raises(ValueError, match="text.png cannot be read: "):
        data.read_image(tmp_path / "text.png")
    assert max(grown) < 50e6


def test_ten_thousand_classes_of_one_image_are_refused_at_once_and_in_brief(tmp_path):
    content = as_bytes("PNG")
    for label in range(10_000):
        (tmp_path / "images" / f"class {label:05}").mkdir(parents=True)
        (tmp_path / "images" / f"class {label:05}" / "one.png").write_bytes(content)
    begin = time.perf_counter()
    with pytest.raises(ValueError, match="'class 00000': 1, .* and 9,995 classes more; expected at least 3") as caught:
        data.load(tmp_path / "images", progress=False)
    assert time.perf_counter() - begin < 20
    check_message(str(caught.value), ["class 00000"])
    assert len(str(caught.value)) < 500

    (tmp_path / "split" / "test" / "other").mkdir(parents=True)
    (tmp_path / "split" / "test" / "other" / "one.png").write_bytes(content)
    (tmp_path / "images").rename(tmp_path / "split" / "train")
    (tmp_path / "split" / "test" / "another").mkdir()
    with pytest.raises(ValueError, match="only in train/ are .* and 9,995 more, only in test/") as caught:
        data.load(tmp_path / "split", progress=False)
    assert len(str(caught.value)) < 500


# ----------------------------------------------------------------------------------------- files that torchvision reads


@counted
def test_damaged_files_of_a_named_set_are_refused(profile, monkeypatch, tmp_path):
    """MNIST's files have no checksum once they are unpacked; whatever stands in them is refused, or read as it is."""
    monkeypatch.setattr("urllib.request.urlopen", refuse_network)
    monkeypatch.setenv("CNN_CACHE_DIR", str(tmp_path))
    raw = files.cache_dir() / "mnist" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (36, 28, 28), dtype=np.uint8)
    whole = {
        "images-idx3-ubyte": struct.pack(">HBB3I", 0, 8, 3, 36, 28, 28) + images.tobytes(),
        "labels-idx1-ubyte": struct.pack(">HBBI", 0, 8, 1, 36) + bytes(i % 10 for i in range(36)),
    }
    for part in ("train", "t10k"):
        for name, content in whole.items():
            (raw / f"{part}-{name}").write_bytes(content)

    def test(name: str, place: int, byte: int, cut: int) -> None:
        damaged = bytearray(whole[name])
        damaged[place] = byte
        (raw / f"train-{name}").write_bytes(damaged[:cut] if cut < 100 else damaged)
        found = profile.result(lambda: data.load("mnist"), ["mnist"], kinds=(OSError,))
        (raw / f"train-{name}").write_bytes(whole[name])
        if found is not REFUSED:
            assert found.image_size == (28, 28)
            assert len(found.train) + len(found.validation) == 36
            profile.accepted()

    numbers = {"place": st.integers(0, 19), "byte": st.integers(0, 255), "cut": st.integers(0, 200)}
    profile.try_cases(test, quick=15, thorough=100, name=st.sampled_from(sorted(whole)), **numbers)


# --------------------------------------------------------------------------------------------------- the command line

WORDY = ("", " ", "abc", "-1", "0", "1", "2", "3", "8", "nan", "inf", "-inf", "1e999", "1e-400", "1e3", "0x10", "1_0")
WORDY += ("99999999999999999999", "９", "½", "True", "None", "null", "[]", "é", "--", "--lr", "-h5", "../..", "a\nb")
WORDY += ("'; rm -rf /", "%s", "{}", "~nobody", "\udcff", "x" * 300, "1" * 400, "*", "\x1b[31m", "0.1", "0.5")


def run(*arguments: str) -> tuple[int, str]:
    """Return the exit status of `python cnn.py arguments`, and all that is printed."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(out), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(sys, "argv", ["cnn.py", *arguments])
        with pytest.raises(SystemExit) as left:
            cnn.main()
    printed = out.buffer.getvalue().decode(errors="surrogateescape")
    code = left.value.code
    return (1, f"{printed}\n{code}") if isinstance(code, str) else (code or 0, printed)


def check_answer(profile: Profile, arguments: Sequence[str], names: Sequence[str], said: Sequence[str] = ()) -> bool:
    """Whether a command succeeded; assert that, or one sentence that names an argument: of `said`, if there are any."""
    status, printed = run(*arguments)
    assert "Traceback" not in printed
    if status == 0:
        profile.accepted()
        return True
    last = printed.rstrip("\n").rpartition("\n")[2] if status == 2 else printed[printed.rindex("\nerror: ") + 1 :]
    assert status in (1, 2), printed
    words = said or arguments
    values = {text for word in words for text in (word, repr(word)[1:-1], str(Path(folders.shown(word)))) if text}
    values |= {os.path.abspath(word) for word in words if ".." in word}  # noqa: PTH100 - the Path method keeps ".."
    check_message(last, [*names, *(name.replace("-", "_") for name in names), *values])
    assert not any(word in last for word in ("codec", "not supported between", "has no attribute", "NoneType")), last
    profile.count["refused"] += 1
    return False


TRAIN_OPTIONS = [field.name.replace("_", "-") for config in (CNNConfig, Recipe) for field in fields(config)]
TRAIN_OPTIONS = [name for name in TRAIN_OPTIONS if name.replace("-", "_") not in cnn.FROM_DATA]
SWITCHES = [name for name in TRAIN_OPTIONS if isinstance(getattr(CNNConfig, name.replace("-", "_"), 0), bool)]
SWITCHES += [name for name in TRAIN_OPTIONS if isinstance(getattr(Recipe, name.replace("-", "_"), 0), bool)]
TRAIN_OPTIONS = [name for name in TRAIN_OPTIONS if name not in SWITCHES]
TRAIN_OPTIONS += ["data", "size", "channels", "images", "device", "precision", "threads", "out", "bogus"]


@pytest.fixture
def quiet_course(tmp_path, monkeypatch):
    """A working directory, runs and a cache of its own; no network, no browser, no picture."""
    monkeypatch.setattr(cnn, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(cnn, "draw", lambda history, path: None)
    monkeypatch.setattr("urllib.request.urlopen", refuse_network)
    monkeypatch.setattr("utils.cluster.WAIT_SECONDS", 0.2)
    for kind in ("CACHE", "RESULTS", "FIGURES"):
        monkeypatch.setenv(f"CNN_{kind}_DIR", str(tmp_path / kind))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)


@counted
def test_options_of_train_are_taken_or_refused(profile, small, quiet_course):
    """Each option in turn, with any word; a run that is not refused ends with a finite history."""
    count = iter(range(10**6))

    def test(options: dict[str, str]) -> None:
        out = quiet_course / f"run{next(count)}"
        given = {"data": str(small), "epochs": "1", "batch-size": "8", "width": "2", "out": str(out)} | options
        words = [word for name, value in given.items() for word in (f"--{name}", value)]
        also = [
            "batch_size is 8",
            "take(-1)",
            "learning rate",
            "(--lr)",
        ]  # too many for the images; a loss that is infinite
        taken = check_answer(profile, [*words, "--no-test"], [*options, *also], list(options.values()))
        if taken and "out" not in options and "help" not in options:
            history = (out / cnn.HISTORY_FILE).read_text(encoding="utf-8").splitlines()
            values = [float(line.split(",")[5]) for line in history if ",train," in line]  # as before the last step
            assert values
            assert all(map(math.isfinite, values))

    names = st.lists(st.sampled_from(TRAIN_OPTIONS), min_size=1, max_size=2, unique=True)
    known = [word for words in WORDS for word in words]
    word = st.one_of(st.sampled_from(WORDY), st.sampled_from(known), st.text(st.characters(codec="utf-8"), max_size=6))
    word = word.filter(lambda text: "\0" not in text)  # no argument can have one
    options = names.flatmap(lambda chosen: st.fixed_dictionaries(dict.fromkeys(chosen, word)))
    profile.try_cases(test, quick=40, thorough=300, options=options)
    for name in TRAIN_OPTIONS if profile.name == "thorough" else ():
        for each in WORDY:
            test({name: each})


SETTINGS = {field.name: field.default for config in (CNNConfig, Recipe) for field in fields(config)}
SETTINGS |= {"data": "mnist", "size": 8, "channels": 3, "images": 8, "threads": 1, "device": "cpu", "precision": "auto"}
SETTINGS = {name: default for name, default in SETTINGS.items() if name not in cnn.FROM_DATA} | {"nosuch": 0}


@counted
def test_settings_of_a_run_that_is_resumed_are_taken_or_refused(profile, small, quiet_course):
    """They stand in a JSON file, which may have been edited."""
    anything = st.recursive(
        st.one_of(st.none(), st.booleans(), st.sampled_from(INTEGERS), st.floats(allow_nan=True), st.text(max_size=5)),
        lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(st.text(max_size=3), inner, max_size=2)),
        max_leaves=3,
    )

    def test(changed: dict[str, Any]) -> None:
        given = {"data": str(small), "batch_size": 8, "width": 2, "precision": "fp32"} | changed
        found = profile.result(
            lambda: cnn.prepare(given), [*changed, "take", "images", "data set", "mnist"], kinds=(OSError,)
        )
        if found is not REFUSED:
            network, images, _, options = found
            assert network(images.validation.images.float()).isfinite().all() or "init" in changed
            assert options["device"] == "cpu"
            profile.accepted()

    names = st.lists(st.sampled_from(sorted(SETTINGS)), min_size=1, max_size=2, unique=True)
    values = {name: st.one_of(anything, plausible(default), st.just(default)) for name, default in SETTINGS.items()}
    changed = names.flatmap(lambda chosen: st.fixed_dictionaries({name: values[name] for name in chosen}))
    profile.try_cases(test, quick=20, thorough=300, changed=changed)


def command(*words: str | st.SearchStrategy) -> st.SearchStrategy:
    return st.tuples(*(st.just(word) if isinstance(word, str) else word for word in words))


@counted
def test_arguments_of_the_other_commands_are_taken_or_refused(profile, small, quiet_course, monkeypatch):
    """With a trained network, images of all kinds, and files that are none."""
    here = quiet_course
    trained = here / "trained"
    options = ["--epochs", "1", "--batch-size", "8", "--width", "2", "--out", str(trained)]
    assert run("--data", str(small), *options)[0] == 0
    tiny = experiments.Experiment(
        question="?", lesson="01_data_statistics", vary={"norm": ("batch", "none")}, base=CNNConfig(width=2),
        recipe=TINY, source=ablation.Source(images=64), lrs=(0.1,), seeds=(0, 1), claims=(),
    )  # fmt: skip
    monkeypatch.setattr(experiments, "EXPERIMENTS", {"tiny": tiny})
    monkeypatch.setattr(ablation, "execute", lambda *_: pytest.fail("a sweep began"))
    monkeypatch.setattr(links, "move", lambda course, ref: links.moved(links.COURSE, course, ref) and [])
    for name, make in (GOOD | BAD).items():
        if "link" not in name and can_be_made(make, here / "here"):
            (here / "here" / f"x{make.suffix}").rename(here / "here" / f"{name}{make.suffix}")
    (here / "here" / "broken.csv").write_bytes(b"\xff\0,,\n1")
    (here / "here" / "columns.csv").write_text(",".join(ablation.COLUMNS) + "\n", encoding="utf-8")
    (here / "here" / "odd.csv").write_text(",".join(ablation.COLUMNS) + "\na,b,c,d,e,f,g,h,i,j\n", encoding="utf-8")
    for name, text in (("settings.json", "{"), ("history.csv", "a,b\n1,2\n"), ("model.safetensors", "x")):
        (here / "here" / "broken run").mkdir(exist_ok=True)
        (here / "here" / "broken run" / name).write_text(text, encoding="utf-8")
    there = st.sampled_from(sorted(path.name for path in (here / "here").iterdir()))
    word = st.one_of(st.sampled_from(WORDY), there, st.text(st.characters(codec="utf-8"), max_size=6))
    word = word.filter(lambda text: "\0" not in text)
    folder = st.one_of(st.just(str(trained)), word)
    too_few = st.sampled_from(("0", "-1", "abc", "", "nan", "1.5", "0x10", "½", "1e3", "-h5", "a\nb"))  # more would run
    own, network = str(small), str(trained)
    commands = st.one_of(
        command("predict", "--run", network, word),
        command("predict", "--run", folder, "colour.png"),
        command("predict", word),
        command("stats", "--data", st.one_of(st.just(own), word)),
        command("stats", "--data", own, "--size", word),
        command("stats", "--data", own, "--channels", word),
        command("export", "--run", word),
        command("export", "--run", network, "--out", word),
        command("bench", word.filter(lambda text: text != "--")),
        command("bench", "--rounds", too_few),
        command("bench", "--images", too_few),
        command("ablate", word.filter(lambda text: text not in ("", "--"))),
        command("ablate", "tiny", "--plan", "--precision", word),
        command("ablate", "tiny", "--plan", "--device", word),
        command("ablate", "tiny", "--jobs", st.sampled_from(("-1", "0", "two", "", "1e3"))),
        command(
            "ablate", "tiny", "--scheduler", st.sampled_from(("", "nobody", "tcp://", "tcp://x:y", "\udcff", "a\nb"))
        ),
        command("full", word, "--data", own, "--seeds", too_few),
        command("full", "--data", word.filter(lambda text: text != "..")),
        command("compare", word),
        command("compare", network, "--out", word),
        command("cache", word),
        command("links", "--course", word),
        command("links", "--course", links.COURSE, "--ref", word),
        command(word.filter(lambda text: text and not text.startswith("-"))),
    )

    def test(words: tuple[str, ...]) -> None:
        check_answer(
            profile,
            words,
            [
                "no such",
                "No such",
                "Missing",
                "IMAGES",
                "argument",
                "no results",
                "nothing to compare",
                "run",
                "''",
                "size is",
                "channels is",
            ],
        )

    profile.try_cases(test, quick=40, thorough=500, words=commands)


# ------------------------------------------------------------------------------------------------------------ the count


@pytest.mark.parametrize("name", ["quick", pytest.param("thorough", marks=pytest.mark.thorough)])
def test_enough_cases_were_tried(name):
    """The last test of the file: it counts what those before it did."""
    if RAN[name] != PROPERTIES:
        pytest.skip("a part of this file only was run")
    assert CASES[name].total() >= LEAST[name]
    assert min(CASES[name]["accepted"], CASES[name]["refused"]) >= CASES[name].total() // 10
