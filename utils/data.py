"""Images in: data sets as tensors, their channel statistics, and augmented, normalized batches of them."""

import contextlib
import difflib
import errno
import gzip
import hashlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from utils import files, folders, parallel
from utils.device import free_memory, memory_format, pick

FASHION_MNIST = files.ROOT / "data" / "fashion-mnist"
_CLOTHES = "T-shirt/top, Trouser, Pullover, Dress, Coat, Sandal, Shirt, Sneaker, Bag, Ankle boot"
FASHION_MNIST_CLASSES = tuple(_CLOTHES.split(", "))
TORCHVISION = {"mnist": "MNIST", "kmnist": "KMNIST", "cifar10": "CIFAR10", "cifar100": "CIFAR100", "svhn": "SVHN"}
DATASETS = ("fashion-mnist", *TORCHVISION)  # the names that `load` knows
CHARACTERS = ("mnist", "kmnist", "svhn")  # mirrored, a digit or a letter is another one, or none
VALIDATION_EVERY = 12  # of the training images of a class, the first of every 12 is a validation image
TEST_EVERY = 6  # of all images of a class, the first of every 6 is a test image, in a folder without train/ and test/
INPUT_NORMS = {"per-image": (0.0, 1.0), "0.5-0.5": (0.5, 0.5), "0-1": (0.0, 1.0), "0-255": (0.0, 1 / 255)}  # mean, std
MAX_SEED = 2**63 - 1  # of PyTorch, and of a table of results
LARGEST_SIDE = 4096  # pixels of an image that others are scaled to: more is a slip
WORKING_MEMORY = 8 * 10**8  # bytes that a lesson may take, besides what it has when it loads its images
CACHE_FORMAT = 2  # to be raised when images are decoded differently: older caches are then made again


@dataclass(frozen=True, eq=False)
class Split:
    """Images (uint8 N×C×H×W) and what they show (int64 N, indices of class names)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index) -> "Split":
        """The images at a slice, an index tensor or a mask."""
        return Split(self.images[index], self.labels[index])

    def __repr__(self) -> str:
        return f"Split({len(self):,} images, {'×'.join(map(str, self.images.shape[1:]))})"


@dataclass(frozen=True, eq=False)
class ImageData:
    """A data set. Its test images come from `read_test` only.

    `can_flip` says that a mirrored image is still an image of its class.
    """

    name: str
    train: Split
    validation: Split
    class_names: tuple[str, ...]
    can_flip: bool = True
    _test: Callable[[], Split] | None = field(default=None, repr=False)

    @cached_property
    def checksum(self) -> str:
        """The SHA-256 of the training and validation images and labels, computed when it is asked for."""
        return _checksum(self.train, self.validation)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def in_channels(self) -> int:
        return self.train.images.shape[1]

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return tuple(self.train.images.shape[2:])

    def take(self, n: int) -> "ImageData":
        """The same data with `n` of its training images: the first of each class, as many of every class as it has.

        Raises ValueError when `n` is less than one image a class or more than there are.
        """
        if not _is_whole(n, self.num_classes, len(self.train)):
            few, many = self.num_classes, len(self.train)
            raise ValueError(f"take({n!r}) of {self.name}: expected {few} (one image a class) to {many} (all of them)")
        labels, ranks = self.train.labels, _rank_in_class(self.train.labels)
        in_turn = np.lexsort((labels.numpy(), ranks.numpy()))  # the first of each class, then the second of each, …
        return replace(self, train=self.train[torch.from_numpy(np.sort(in_turn[:n]))])

    def join_validation(self) -> "ImageData":
        """The same data with its validation images behind its training images, and none left to choose by.

        For a last training, when every choice was made on the validation images.
        """
        pairs = zip(vars(self.train).values(), vars(self.validation).values(), strict=True)
        return replace(self, train=Split(*map(torch.cat, pairs)), validation=self.validation[:0])

    def read_test(self, purpose: str) -> Split:
        """The test images. The reading is logged in results_dir()/test_reads.csv, with its `purpose`.

        Raises ValueError without a purpose or without test images.
        """
        if not purpose.strip():
            raise ValueError(f"purpose is {purpose!r}: expected a few words, which are logged with this reading")
        if self._test is None:
            raise ValueError(f"{self.name} has no test images: use its validation images")
        test = self._test()
        if not parallel.is_first():
            return test
        date = datetime.now(UTC).isoformat(timespec="seconds")
        row = {"date": date, "data": self.name, "checksum": self.checksum[:12], "purpose": purpose}
        files.append_row(files.results_dir() / "test_reads.csv", row)
        return test


def load(
    name_or_path: str | Path = "fashion-mnist",
    *,
    size: int | None = None,
    channels: int | None = None,
    progress: bool = True,
) -> ImageData:
    """A data set by its name (one of `DATASETS`), or a folder of images.

    fashion-mnist is in the repository; the others are downloaded by torchvision into cache_dir() on first use.
    A folder is ROOT/train/CLASS/* and ROOT/test/CLASS/*; or ROOT/CLASS/*, where the first of every 6 images of a class
    are the test split. Its images are decoded once, with a bar when `progress` is on, and cached in cache_dir().
    Of all training images the first of every 12 of a class are the validation split: no random generator is involved.
    `size` scales all images to size×size pixels; `channels` makes all of them grey (1) or colour (3).

    Raises ValueError for an unknown name, images that are damaged or do not fit together; FileNotFoundError for missing
    ones; OSError when a download or writing the cache fails; MemoryError when the images do not fit into memory.
    """
    if size is not None and not _is_whole(size, 8, LARGEST_SIDE):
        raise ValueError(f"size is {size!r}: expected 8 to {LARGEST_SIDE} pixels, a whole number (int)")
    _check_channels(channels)
    warn_of_little_memory()
    options = {"size": size and (size, size), "channels": channels}
    known = name_or_path if isinstance(name_or_path, str) else None
    if known == "fashion-mnist":
        name, read = known, _read_fashion_mnist
    elif known in TORCHVISION:
        name, read = known, partial(_read_torchvision, known)
    else:
        root = _existing_folder(name_or_path)
        name, read = folders.shown(root.name), partial(_read_folder, _list_folder(root), progress=progress, **options)
    both, class_names = read(train=True)
    both = _fit(both, **options)
    held_out = for_validation(both.labels)
    train, validation = both[~held_out], both[held_out]
    return ImageData(
        name=name,
        train=train,
        validation=validation,
        class_names=tuple(class_names),
        can_flip=known not in CHARACTERS,
        _test=partial(_read_test, read, options),
    )


def _read_test(read: Callable, options: dict) -> Split:
    """A function of the module, not a lambda in `load`, so that an ImageData can be sent to another process."""
    split, _ = read(train=False)
    return _fit(split, **options)


def _existing_folder(path: str | Path) -> Path:
    if isinstance(path, str | Path) and str(path).strip():
        root = files.expanded(path)
        with contextlib.suppress(OSError, RuntimeError, ValueError):  # too long, links in a circle, a null character
            if root.is_dir():
                return root.resolve()
    close = difflib.get_close_matches(str(path).lower().replace("_", "-"), DATASETS, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(
        f"no data set and no folder is called {str(path)!r}{hint}; "
        f"expected one of {', '.join(DATASETS)}, or a folder of images: {folders.LAYOUT}"
    )


def for_validation(labels: Tensor) -> Tensor:
    """True for those images of a whole training set (by its labels, N) that `load` makes the validation split."""
    return _rank_in_class(labels) % VALIDATION_EVERY == 0


def _rank_in_class(labels: Tensor) -> Tensor:
    """How many equal labels stand before each: [3, 5, 3, 3] → [0, 0, 1, 2]."""
    labels = labels.numpy()
    counts = np.bincount(labels)
    ranks = np.empty(len(labels), dtype=np.int64)
    ranks[np.argsort(labels, kind="stable")] = np.arange(len(labels)) - np.repeat(counts.cumsum() - counts, counts)
    return torch.from_numpy(ranks)


def _checksum(*splits: Split) -> str:
    digest = hashlib.sha256()
    for split in splits:
        digest.update(str(tuple(split.images.shape)).encode())
        for images in split.images.split(4096):
            digest.update(images.contiguous().numpy())
        digest.update(split.labels.contiguous().numpy())
    return digest.hexdigest()


def _fit(split: Split, size: tuple[int, int] | None, channels: int | None) -> Split:
    """The same images with `channels` channels, scaled to `size` (height, width); as they are where that is None."""
    images = split.images
    if channels == 1 and images.shape[1] == 3:
        images = torch.cat([_grey(part) for part in images.split(1024)])
    if channels == 3 and images.shape[1] == 1:
        images = images.expand(-1, 3, -1, -1)
    if size and images.shape[2:] != size:
        pixels = (*images.shape[:2], *size)
        check_memory(2 * math.prod(pixels), f"{'×'.join(map(str, pixels))} scaled pixels")
        images = torch.cat([_resize(part, size) for part in images.split(1024)])
    return Split(images, split.labels)


def _grey(images: Tensor) -> Tensor:
    weights = torch.tensor([0.299, 0.587, 0.114])  # ITU-R 601, as Pillow does it
    return torch.einsum("nchw,c->nhw", images.float(), weights).round_().byte()[:, None]


def _resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    scaled = torch.nn.functional.interpolate(images.float(), size, mode="bilinear", antialias=True)
    return scaled.round_().clamp_(0, 255).byte()


def _read_fashion_mnist(train: bool) -> tuple[Split, tuple[str, ...]]:
    part = "train" if train else "t10k"
    images = _read_idx(FASHION_MNIST / f"{part}-images-idx3-ubyte.gz", header=16)
    labels = _read_idx(FASHION_MNIST / f"{part}-labels-idx1-ubyte.gz", header=8)
    return Split(images.view(-1, 1, 28, 28), labels.long()), FASHION_MNIST_CLASSES


def _read_idx(path: Path, header: int) -> Tensor:
    """The bytes after the header of a gzipped IDX file, when its checksum is the one in SHA256SUMS beside it."""
    remedy = "restore it with `git checkout -- data/fashion-mnist`"
    sums = path.with_name("SHA256SUMS")  # lines of digest and file name
    try:
        lines, content = sums.read_text(encoding="utf-8", errors="replace").splitlines(), path.read_bytes()
    except OSError as error:
        what = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise type(error)(f"{error.filename} {what}: {remedy}") from error
    expected = [line.split()[0] for line in lines if line.endswith(path.name)]
    found = hashlib.sha256(content).hexdigest()
    if [found] != expected:
        what = f"the SHA-256 of its {len(content)} bytes is {found}, expected {' '.join(expected) or 'none'}"
        raise ValueError(f"{path} is damaged, or {sums.name} beside it: {what}; {remedy}")
    return torch.frombuffer(bytearray(gzip.decompress(content)), dtype=torch.uint8, offset=header)


def _read_torchvision(name: str, train: bool) -> tuple[Split, tuple[str, ...]]:
    from torchvision import datasets  # here: the embedded data need not wait for it

    folder = files.cache_dir() / name
    make = partial(getattr(datasets, TORCHVISION[name]), folder, download=True)
    try:
        for part in (False, True) if train else (False,):  # test images that cannot be had are told before the training
            dataset = make(split="train" if part else "test") if name == "svhn" else make(train=part)
    except (OSError, RuntimeError, ValueError, EOFError, AssertionError) as error:  # all that torchvision raises
        what = " ".join(str(error).split())
        raise OSError(
            f"cannot load {name}: {what}. It is downloaded into {folder} on first use: connect to the network and try "
            "again (delete that folder first if an earlier download broke off), put torchvision's files there, or use "
            "fashion-mnist, which needs no network"
        ) from error
    images = torch.as_tensor(dataset.data)
    if images.ndim == 3:
        images = images[:, None]  # N×H×W → N×1×H×W
    elif images.shape[3] == 3:
        images = images.permute(0, 3, 1, 2)  # N×H×W×3 → N×3×H×W
    labels = torch.as_tensor(dataset.labels if name == "svhn" else dataset.targets).long()
    class_names = map(str, range(10)) if name in ("mnist", "svhn") else dataset.classes
    return Split(images, labels), tuple(class_names)


def _list_folder(root: Path) -> dict[bool, folders.Listing]:
    """The image files below `root` that are for training and validation (True) and for the test (False)."""
    train, test = folders.list_images(root)
    if test is not None:
        _require_images(train, 2, "one each for training and validation")
    else:
        _require_images(train, 3, "one each for training, validation and test")
        first = _rank_in_class(train.labels) % TEST_EVERY == 0
        train, test = train.select(~first), train.select(first)
    _require_images(test, 1, "for the test")
    return {True: train, False: test}


def _require_images(listing: folders.Listing, least: int, purpose: str) -> None:
    counts = torch.bincount(listing.labels, minlength=len(listing.class_names)).tolist()
    few = {name: count for name, count in zip(listing.class_names, counts, strict=True) if count < least}
    if few:
        some = f"{dict(list(few.items())[:5])}{f' and {len(few) - 5:,} classes more' if len(few) > 5 else ''}"
        where = folders.shown(listing.root)
        raise ValueError(f"too few images a class below {where}: {some}; expected at least {least}, {purpose}")


def _read_folder(
    listings: dict[bool, folders.Listing], *, train: bool, progress: bool, **options: object
) -> tuple[Split, tuple[str, ...]]:
    """The training or the test images, from their cache, which is made when it is missing, outdated or damaged."""
    paths = {part: _cache_path(listing, part, **options) for part, listing in listings.items()}
    for part, path in paths.items():  # both at once: a damaged test image should not wait until training is over
        if not _is_current(path, listings[part]):
            _make_cache(path, listings[part], progress, **options)
    path, listing = paths[train], listings[train]
    try:
        split = _read_cache(path)
    except (OSError, SafetensorError, ValueError) as error:
        _warn_of_damage(path, error)
        split = _make_cache(path, listing, progress, **options)
    return split, listing.class_names


def _cache_path(listing: folders.Listing, train: bool, **options: object) -> Path:
    key = hashlib.sha256(repr((str(listing.root), sorted(options.items()))).encode()).hexdigest()[:16]
    return files.cache_dir() / "folders" / f"{key}-{'train' if train else 'test'}.safetensors"


def _is_current(path: Path, listing: folders.Listing) -> bool:
    if not path.exists():
        return False
    try:
        with _opened(path) as cache:
            return (cache.metadata() or {}).get("fingerprint") == _fingerprint(listing)
    except (OSError, SafetensorError) as error:
        _warn_of_damage(path, error)
        return False


def _fingerprint(listing: folders.Listing) -> str:
    return f"{CACHE_FORMAT} {listing.fingerprint}"


def _warn_of_damage(path: Path, error: Exception) -> None:
    warnings.warn(f"the cached images in {path} are damaged ({error}): decoding them again", stacklevel=5)


def _make_cache(path: Path, listing: folders.Listing, progress: bool, **options: object) -> Split:
    shape = (len(listing), *folders.image_shape(listing, **options))  # N×H×W×C
    check_memory(2 * math.prod(shape), f"{'×'.join(map(str, shape))} pixels below {folders.shown(listing.root)}")
    images = torch.empty(shape, dtype=torch.uint8)
    folders.decode_all(listing, images.numpy(), progress, **options)
    split = Split(images, listing.labels)
    metadata = {"fingerprint": _fingerprint(listing), "checksum": _checksum(split)}
    with files.atomic_path(path) as temporary:
        save_file({"images": split.images, "labels": split.labels}, temporary, metadata)
    return Split(split.images.permute(0, 3, 1, 2), split.labels)  # N×H×W×C → N×C×H×W


def _opened(path: Path) -> safe_open:
    """The file, opened by safetensors, which raises RuntimeError for one that goes away between two of its looks."""
    try:
        return safe_open(path, "pt")
    except RuntimeError as error:
        raise FileNotFoundError(errno.ENOENT, "deleted just now", str(path)) from error


def _read_cache(path: Path) -> Split:
    with _opened(path) as cache:
        # Copies: Windows replaces no file that is in use, and these tensors are views of this one.
        split = Split(cache.get_tensor("images").clone(), cache.get_tensor("labels").clone())
        if _checksum(split) != (cache.metadata() or {}).get("checksum"):
            raise ValueError("the checksum differs")
    return Split(split.images.permute(0, 3, 1, 2), split.labels)  # N×H×W×C → N×C×H×W


def read_image(path: str | Path, size: tuple[int, int] | None = None, channels: int | None = None) -> Tensor:
    """One image file as uint8 C×H×W, brought to `size` (height, width) and `channels` as `load` does it for a folder.

    Raises FileNotFoundError when there is none, ValueError when it cannot be read.
    """
    if not isinstance(path, str | Path):
        raise ValueError(f"path is {path!r}: expected that of an image file")
    pair = isinstance(size, tuple) and len(size) == 2 and all(_is_whole(side, 1, LARGEST_SIDE) for side in size)
    if size is not None and not pair:
        raise ValueError(f"size is {size!r}: expected height and width, each 1 to {LARGEST_SIDE} pixels, in a tuple")
    _check_channels(channels)
    return torch.tensor(folders.decode(Path(path), size, channels)).permute(2, 0, 1)


def _check_channels(channels: object) -> None:
    if channels is not None and not (_is_whole(channels, 1, 3) and channels != 2):
        raise ValueError(f"channels is {channels!r}: expected 1 (grey) or 3 (colour)")


def _is_whole(value: object, least: int, most: int) -> bool:
    """True for an int from `least` to `most`; False for bool, NumPy's numbers and everything else."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def warn_of_little_memory() -> None:
    """Warns where a lesson may end with a kernel that "died": there its memory would not suffice."""
    free = free_memory(torch.device("cpu"))
    if free < WORKING_MEMORY:
        warnings.warn(
            f"{free / 1e9:.1f} GB of memory are free, and a lesson may need {WORKING_MEMORY / 1e9:.1f}: shut down "
            "other notebooks (in JupyterLab: Kernel, Shut Down All Kernels), then restart this one",
            stacklevel=3,
        )


def check_memory(needed: int, what: str, device: str | torch.device = "cpu", available: int | None = None) -> None:
    """Raises MemoryError when `what` needs more bytes than are `available`: what the device has free, if None."""
    device = torch.device(device)
    available = free_memory(device) if available is None else available
    if needed > available:
        raise MemoryError(
            f"{what} need {needed / 1e9:.3f} GB of memory, and {available / 1e9:.3f} GB are free on {device}: "
            "use fewer images (data.take(n)), smaller ones (size=32, --size 32), or a machine with more memory"
        )


@dataclass(frozen=True)
class Moments:
    """Of the values of each channel: how many, their mean, and M2, the sum of squared deviations from it.

    `a.merge(b)` are the moments of the values of both together. Unlike sums of squares, nothing large cancels; unlike
    an average of standard deviations, it is exact (Chan, Golub, LeVeque 1983, "Algorithms for computing the sample
    variance").
    """

    count: int
    mean: Tensor  # float64 C
    m2: Tensor  # float64 C

    @staticmethod
    def of(images: Tensor) -> "Moments":
        """The moments of images N×C×H×W, in their own units."""
        values = images.transpose(0, 1).flatten(1).to(torch.float64, copy=True)  # C×(N·H·W)
        mean = values.mean(1, keepdim=True)
        return Moments(values.shape[1], mean[:, 0], values.sub_(mean).square_().sum(1))

    def merge(self, other: "Moments") -> "Moments":
        count = self.count + other.count
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        m2 = self.m2 + other.m2 + delta**2 * (self.count * other.count / count)
        return Moments(count, mean, m2)


@dataclass(frozen=True)
class ChannelStats:
    """Mean and population standard deviation of each channel, uint8 pixels taken as 0 to 1, and pixels a channel.

    With `per_image`, an image that is normalized by them is then brought to mean 0 and standard deviation 1 by its own.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    count: int
    per_image: bool = False


def channel_stats(images: Tensor | Iterable[Tensor], chunk: int = 2**20) -> ChannelStats:
    """The mean and standard deviation of each channel over all pixels of all images, in float64.

    `images` are uint8 (0 to 255, taken as 0 to 1) or float (taken as they are) N×C×H×W, or an iterable of such tensors,
    of which one at a time is held. `chunk` numbers at a time are made float64. Raises ValueError without images, and
    for a wrong or changing shape.
    """
    total = None
    for batch in [images] if isinstance(images, Tensor) else images:
        if batch.ndim != 4 or (total is not None and batch.shape[1] != len(total.mean)):
            expected = f"N×{'C' if total is None else len(total.mean)}×H×W"
            raise ValueError(f"images have shape {tuple(batch.shape)}: expected {expected}")
        unit = 255 if batch.dtype == torch.uint8 else 1
        for part in _parts(batch, chunk):
            moments = Moments.of(part)
            moments = Moments(moments.count, moments.mean / unit, moments.m2 / unit**2)
            total = total.merge(moments) if total else moments
    if total is None:
        raise ValueError("channel_stats got no images: expected at least one")
    return ChannelStats(tuple(total.mean.tolist()), tuple((total.m2 / total.count).sqrt().tolist()), total.count)


def _parts(images: Tensor, chunk: int) -> Iterator[Tensor]:
    """Cut images N×C×H×W into whole images, or else rows of one image, of about `chunk` numbers."""
    if not images.numel():
        return
    _, channels, height, width = images.shape
    for some in images.split(max(1, chunk // (channels * height * width))):
        yield from some.split(max(1, chunk // (channels * width)) if len(some) == 1 else height, dim=2)


def input_stats(images: Tensor, kind: str) -> ChannelStats:
    """What uint8 training images N×C×H×W are normalized by, so that the network's input is of this `kind`.

    "data set": mean 0 and std 1 over all of them. "per-image": over each image. "0.5-0.5": pixels from -1 to 1. "0-1",
    "0-255": pixels in these ranges. Raises ValueError for another kind.
    """
    if kind == "data set":
        return channel_stats(images)
    if kind not in INPUT_NORMS:
        raise ValueError(f"input_norm={kind!r}: choose one of data set, {', '.join(INPUT_NORMS)}")
    mean, std = ((value,) * images.shape[1] for value in INPUT_NORMS[kind])
    return ChannelStats(mean, std, 0, per_image=kind == "per-image")


def normalize(images: Tensor, stats: ChannelStats, dtype: torch.dtype = torch.float32) -> Tensor:
    """(images / 255 - mean) / std of each channel, for uint8 images N×C×H×W; floats are not divided by 255.

    A channel that never changes (std 0) becomes 0 everywhere, and so does a constant image `per_image`.
    """
    scale, shift = (x.view(-1, 1, 1).to(images.device) for x in scale_and_shift(stats, images.dtype))
    values = images.float() * scale + shift
    return (standardize(values) if stats.per_image else values).to(dtype)


def standardize(images: Tensor) -> Tensor:
    """Float images, B first, each brought to mean 0 and standard deviation 1 by its own; constant ones to 0.

    So do those that all but are: a standard deviation below 1e-6 is taken for rounding (one pixel in a million that is
    one step of 255 off gives more).
    """
    axes = tuple(range(1, images.ndim))
    std, mean = torch.std_mean(images, axes, correction=0, keepdim=True)
    return (images - mean) / std.clamp(min=1e-6)


def scale_and_shift(stats: ChannelStats, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """By what each channel of images of `dtype` is multiplied to normalize it, and what is added then: float32 C, C."""
    mean, std = torch.tensor([stats.mean, stats.std], dtype=torch.float64)
    std = torch.where(std > 0, std, 1.0)
    unit = 255 if dtype == torch.uint8 else 1
    return (1 / (unit * std)).float(), (-mean / std).float()


class Batches:
    """A split as one uint8 tensor on the device, and batches of it: cropped, flipped, normalized.

    An iteration is an epoch; it yields images (`dtype`, B×C×H×W) and labels (int64 B), and `len` counts its batches.
    In order and unchanged, unless `shuffle`, `flip` (mirrors every second image, by chance; with `alternate` each image
    in every second epoch instead, see Jordan 2024, "94 % on CIFAR-10 in 3.29 seconds on a single GPU"), `crop_padding`
    (cuts the image at a random place out of itself, padded with so many reflected pixels at every edge) or `cutout`
    (blanks a square of so many pixels a side around a random pixel, DeVries & Taylor 2017) say otherwise.
    An epoch's random numbers are drawn from `generator` when it begins: between epochs its state and `epoch`, which
    counts them, are all that must be saved to go on with the same batches.
    Images lie in memory in channels-last format where that is safe (None: not on MPS), or as `channels_last` says.
    `share` = (i, n) yields of every batch the part of the i-th of n processes: together they see the same batches.

    Raises ValueError for a batch size below 1, or above the number of images when training (`shuffle` or `drop_last`),
    or one that n processes cannot share equally;
    for a crop padding below 0 or not below the image's side, or a cutout as large; for statistics of another number of
    channels; without images. Raises MemoryError when the images do not fit on the device.
    """

    def __init__(
        self,
        split: Split,
        stats: ChannelStats,
        batch_size: int,
        *,
        device: str | torch.device = "cpu",
        shuffle: bool = False,
        crop_padding: int = 0,
        flip: bool = False,
        alternate: bool = False,
        cutout: int = 0,
        drop_last: bool = False,
        dtype: torch.dtype = torch.float32,
        channels_last: bool | None = None,
        seed: int = 0,
        share: tuple[int, int] = (0, 1),
    ):
        n, channels, height, width = split.images.shape
        device = pick(str(device))
        if n == 0:
            raise ValueError("the split has no images: expected at least one")
        if not _is_whole(batch_size, 1, n if shuffle or drop_last else MAX_SEED):
            most = f"to {n}, the number of images" if shuffle or drop_last else "or more images"
            raise ValueError(f"batch_size is {batch_size!r}: expected 1 {most}")
        if batch_size % share[1]:
            raise ValueError(f"batch_size is {batch_size}: expected a multiple of {share[1]}, the number of processes")
        largest = min(height, width) - 1
        for option, value in {"crop_padding": crop_padding, "cutout": cutout}.items():
            if not _is_whole(value, 0, largest):
                raise ValueError(f"{option} is {value!r}: expected 0 to {largest} for images of {height}×{width}")
        if not _is_whole(seed, 0, MAX_SEED):
            raise ValueError(f"seed is {seed!r}: expected a whole number (int) from 0 to {MAX_SEED}")
        if len(stats.mean) != channels:
            raise ValueError(f"stats are of {len(stats.mean)} channels: expected {channels}, as the images have")
        padded = n * channels * (height + 2 * crop_padding) * (width + 2 * crop_padding)
        check_memory(2 * padded if crop_padding else padded, f"{n} images of {channels}×{height}×{width}", device)

        if channels_last is None:
            channels_last = memory_format(device) is torch.channels_last
        self.batch_size, self.drop_last, self.dtype, self.channels_last = batch_size, drop_last, dtype, channels_last
        self.shuffle, self.crop_padding, self.flip, self.share = shuffle, crop_padding, flip, share
        self.image_size, self.per_image, self.cutout, self.epoch = (height, width), stats.per_image, cutout, 0
        self.generator = torch.Generator().manual_seed(seed)
        self.turns = torch.rand(n, generator=torch.Generator().manual_seed(seed)) < 0.5 if alternate else None
        self.labels = split.labels.to(device)
        # Stored and augmented as N×H×W×C, so that permuted to N×C×H×W they are in channels-last format without a copy.
        self.images = _reflect(split.images.to(device).permute(0, 2, 3, 1), crop_padding).contiguous()
        # One scale for each of the W·C numbers of an image's row: they are scaled in one long run, not C at a time.
        self.scale, self.shift = (x.repeat(width).to(device) for x in scale_and_shift(stats, torch.uint8))

    def __len__(self) -> int:
        n = len(self.labels)
        return n // self.batch_size if self.drop_last else math.ceil(n / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        n, device = len(self.labels), self.labels.device
        order = torch.randperm(n, generator=self.generator) if self.shuffle else torch.arange(n)
        top, left = torch.randint(2 * self.crop_padding + 1, (2, n), generator=self.generator)
        mirrored = torch.rand(n, generator=self.generator) < 0.5
        if self.turns is not None:
            mirrored = (self.turns ^ (self.epoch % 2 == 1))[order]
        self.epoch += 1
        height, width = self.image_size
        hidden = torch.rand(2, n, generator=self.generator) if self.cutout else torch.zeros(2, n)
        order, top, left, mirrored, hidden = (_to_device(x, device) for x in (order, top, left, mirrored, hidden))
        windows = self.images.unfold(1, height, 1).unfold(2, width, 1).movedim(3, 5)  # N×(2p+1)×(2p+1)×H×W×C, a view
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            batch = slice(start + self.share[0], start + self.batch_size, self.share[1])
            images = windows[order[batch], top[batch], left[batch]]  # B×H×W×C
            if self.flip:
                images = torch.where(mirrored[batch, None, None, None], images.flip(2), images)
            images = self._normalize(images)
            yield self._hide(images, hidden[:, batch]) if self.cutout else images, self.labels[order[batch]]

    def _normalize(self, images: Tensor) -> Tensor:
        """As `normalize` does; B×H×W×C in, B×C×H×W out."""
        rows = images.flatten(2).float().mul_(self.scale).add_(self.shift)  # B×H×(W·C)
        rows = standardize(rows) if self.per_image else rows
        images = rows.to(self.dtype).view(images.shape).permute(0, 3, 1, 2)
        return images if self.channels_last else images.clone(memory_format=torch.contiguous_format)

    def _hide(self, images: Tensor, places: Tensor) -> Tensor:
        """Blank a square in each of B×C×H×W, around the pixel at `places` (2×B, 0 to 1); a part may lie outside."""
        inside = []
        for side, place in zip(self.image_size, places, strict=True):
            first = (place * side).long()[:, None] - self.cutout // 2
            pixel = torch.arange(side, device=images.device)
            inside.append((pixel >= first) & (pixel < first + self.cutout))  # B×side
        return images.mul_(~(inside[0][:, None, :, None] & inside[1][:, None, None, :]))


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`. A CUDA device fetches it from pinned memory by itself, and nobody waits for it."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.contiguous().pin_memory().to(device, non_blocking=True)


def _reflect(images: Tensor, padding: int) -> Tensor:
    """Images N×H×W×C with `padding` reflected pixels at every edge, as torch.nn.functional.pad does it for floats."""
    for dim in (1, 2) if padding else ():
        last = images.shape[dim] - 1
        places = torch.arange(-padding, last + padding + 1, device=images.device)
        images = images.index_select(dim, last - (last - places.abs()).abs())
    return images
