"""Folders of images, one folder a class: listed, and decoded in parallel."""

import contextlib
import hashlib
import os
import re
import stat
import struct
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm.auto import tqdm

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
LAYOUT = f"ROOT/train/CLASS/* and ROOT/test/CLASS/*, or ROOT/CLASS/*, with {', '.join(SUFFIXES)} files"
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # of what is in such a file: of an animation, the first image
OTHERS = (".gif", ".bmp", ".tif", ".tiff", ".heic", ".heif", ".avif", ".jfif", ".jp2", ".ppm", ".pgm")  # left out, told
UNFIT = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")  # line breaks, controls, bytes that are no text
CHUNK = 128  # images that a thread decodes at a time: enough that handing them out costs nothing


class File(NamedTuple):
    path: str  # below the listing's root
    size: int  # bytes
    modified: int  # ns
    label: int  # index into the listing's class names


@dataclass(frozen=True)
class Listing:
    """The image files below `root`, sorted by class and name."""

    root: Path
    class_names: tuple[str, ...]
    files: tuple[File, ...]

    def __len__(self) -> int:
        return len(self.files)

    @property
    def labels(self) -> Tensor:
        return torch.tensor([file.label for file in self.files])  # int64 N

    @property
    def fingerprint(self) -> str:
        """Changes when a file is added, removed, renamed, or written."""
        return hashlib.sha256(repr(self.files).encode()).hexdigest()

    def select(self, mask: Iterable[bool]) -> "Listing":
        return replace(self, files=tuple(file for file, wanted in zip(self.files, mask, strict=True) if wanted))


def shown(text: object) -> str:
    """A path, or a message, on one line: line breaks are escaped, and so are bytes that are no text."""
    return UNFIT.sub(lambda found: repr(found[0])[1:-1], str(text))


def list_images(root: Path) -> tuple[Listing, Listing | None]:
    """The training and the test images below `root`; the second is None when there is no split into train/ and test/.

    Warns of images in other folders, beside train/ and test/ or within a class, and of those of another kind. Raises
    FileNotFoundError without images, ValueError for fewer than two classes or different ones in train and test.
    """
    if not ((root / "train").is_dir() and (root / "test").is_dir()):
        return _list_classes(root), None
    train, test = _list_classes(root / "train"), _list_classes(root / "test")
    if train.class_names != test.class_names:
        only_train, only_test = (
            _some(sorted(set(these.class_names) - set(those.class_names)))
            for these, those in ((train, test), (test, train))
        )
        raise ValueError(
            f"the class folders below {shown(root)} differ: only in train/ are {only_train}, only in test/ "
            f"{only_test}; expected the same in both"
        )
    beside = {path.name: _count(path) for path in _folders(root) if path.name.lower() not in ("train", "test")}
    _warn_of(beside, root, "move them into train/ if they belong to the data: validation images are taken from there")
    return train, test


def _folders(path: Path) -> list[Path]:
    """The folders in a folder, but for hidden ones, and for links, which may lead back."""
    with os.scandir(path) as entries:
        return sorted(Path(e) for e in entries if e.is_dir(follow_symlinks=False) and not e.name.startswith("."))


def _count(path: Path) -> int:
    """How many images there are in a folder and in those below it."""
    files = [name for _, _, names in os.walk(path) for name in names]
    return sum(name.lower().endswith(SUFFIXES) and not name.startswith(".") for name in files)


def _warn_of(left_out: dict[str, int], root: Path, remedy: str) -> None:
    """Warn of the folders below `root` that have images which are not read; `left_out` says how many each."""
    told = [f"{count:,} in {shown(name)}/" for name, count in left_out.items() if count]
    if told:
        some = f"{', '.join(told[:5])}{f' and {len(told) - 5:,} folders more' if len(told) > 5 else ''}"
        warnings.warn(f"images below {shown(root)} are left out ({some}): {remedy}", stacklevel=5)


def _some(names: list[str]) -> str:
    return f"{names[:5]}{f' and {len(names) - 5:,} more' if len(names) > 5 else ''}"


def _list_classes(root: Path) -> Listing:
    """Class names are composed (NFC), as most systems write "é"; macOS may hand out an "e" and an accent."""
    with os.scandir(root) as entries:  # closed though _is_class should raise
        paths = sorted((Path(entry) for entry in entries if _is_class(entry)), key=_class_name)
    names = tuple(map(_class_name, paths))
    if len(set(names)) < len(names):
        twice = [name for name, count in Counter(names).items() if count > 1]
        raise ValueError(f"two class folders below {shown(root)} look alike, {_some(twice)}: rename one of them")
    others = Counter()
    files = tuple(file for label, path in enumerate(paths) for file in _list_class(path, label, others))
    if others:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(others.items()))
        remedy = f"convert them if they belong to the data, as only {', '.join(SUFFIXES)} are read"
        warnings.warn(f"images below {shown(root)} are left out ({kinds}): {remedy}", stacklevel=5)
    if not files:
        raise FileNotFoundError(f"no images in class folders below {shown(root)}: expected {LAYOUT}")
    if len(names) == 1:
        raise ValueError(f"{shown(root)} has one class folder only, {names[0]!r}: expected at least two ({LAYOUT})")
    below = {f"{path.name}/{folder.name}": _count(folder) for path in paths for folder in _folders(path)}
    _warn_of(below, root, "move them into the folder of their class, if they belong to the data")
    return Listing(root, names, files)


def _class_name(path: Path) -> str:
    return unicodedata.normalize("NFC", path.name)


def _is_class(entry: os.DirEntry) -> bool:
    """Raises ValueError for a link that leads nowhere, which may stand for a class, and for a name that is no text."""
    if entry.name.startswith("."):
        return False
    if entry.is_symlink() and not os.path.exists(entry):  # noqa: PTH110 - the Path method fails for links in a circle
        raise ValueError(f"{shown(entry.path)} is a link that leads nowhere: mend or remove it")
    if entry.is_dir() and UNFIT.search(entry.name):
        raise ValueError(f"the class folder {shown(entry.path)} has a line break or no text in its name: rename it")
    return entry.is_dir()


def _list_class(path: Path, label: int, others: Counter) -> list[File]:
    """The images of a class; those of another kind are counted in `others`, by their suffix."""
    entries = sorted((e for e in os.scandir(path) if not e.name.startswith(".")), key=lambda entry: entry.name)
    others.update(Path(e.name).suffix.lower() for e in entries if e.name.lower().endswith(OTHERS))
    return [_file(entry, path, label) for entry in entries if entry.name.lower().endswith(SUFFIXES)]


def _file(entry: os.DirEntry, path: Path, label: int) -> File:
    try:
        found = entry.stat()
    except OSError as error:
        raise ValueError(f"{shown(entry.path)} cannot be read: {error.strerror}; mend or remove it") from error
    return File(f"{path.name}/{entry.name}", found.st_size, found.st_mtime_ns, label)


def image_shape(listing: Listing, size: tuple[int, int] | None, channels: int | None) -> tuple[int, int, int]:
    """Height, width and channels of the first image that can be decoded; ValueError when none can."""
    failures = []
    for file in listing.files:
        try:
            return decode(listing.root / file.path, size, channels).shape
        except ValueError as error:
            failures.append(error)
    raise _unreadable(listing, failures)


def decode_all(
    listing: Listing, out: np.ndarray, progress: bool, size: tuple[int, int] | None, channels: int | None
) -> None:
    """Decodes every image into `out`, uint8 N×H×W×C, in parallel.

    Raises ValueError when images cannot be read, after trying them all; when some are grey and some in colour and
    `channels` is None, or sizes differ and `size` is None, as soon as that is seen.
    """

    def decode_chunk(start: int) -> tuple[Counter, list]:
        shapes, failures = Counter(), []
        for i, file in enumerate(listing.files[start : start + CHUNK], start):
            try:
                image = decode(listing.root / file.path, size, channels)
            except ValueError as error:
                failures.append(error)
                continue
            shapes[image.shape] += 1
            if image.shape == out.shape[1:]:
                out[i] = image
        return shapes, failures

    shapes, failures = Counter(), []
    bar = tqdm(total=len(listing), desc=f"decoding {listing.root.name}", unit=" images", disable=not progress)
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        for new_shapes, new_failures in pool.map(decode_chunk, range(0, len(listing), CHUNK)):
            shapes.update(new_shapes)
            failures += new_failures
            if len(shapes) > 1:
                raise _mixed(listing, shapes)
            bar.update(new_shapes.total() + len(new_failures))
    finally:
        bar.close()
        pool.shutdown(cancel_futures=True)
    if failures:
        raise _unreadable(listing, failures)


def decode(path: Path, size: tuple[int, int] | None = None, channels: int | None = None) -> np.ndarray:
    """One image as uint8 H×W×C, upright (by its EXIF orientation), and on white, as a page shows it, where transparent.

    `size` is height and width: the largest such rectangle around the middle is scaled to it. `channels`: 1 for grey, 3
    for colour, None for as it is; an image with a palette is grey when all its pixels are. Raises ValueError when it
    cannot be read, FileNotFoundError when it is not there.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ValueError("it is a folder or a device")
        with Image.open(path, formats=FORMATS) as image:  # which reads the header only
            _limit(image)
            return _pixels(image, size, channels)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no image {shown(path)}") from error
    except Image.DecompressionBombError as error:
        remedy = "Make it smaller, or raise PIL.Image.MAX_IMAGE_PIXELS if you trust it"
        raise ValueError(f"{shown(path)} has too many pixels: {error} {remedy}") from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{shown(path)} is not an image of a kind that is read ({', '.join(FORMATS)})") from error
    except MemoryError:
        raise
    except Exception as error:  # a damaged file can make Pillow raise nearly anything
        what = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{shown(path)} cannot be read: {what}") from error


def _limit(image: Image.Image) -> None:
    """Raises DecompressionBombError above Pillow's limit; Pillow itself does so above twice that, and warns before."""
    limit, pixels = Image.MAX_IMAGE_PIXELS, image.width * image.height
    if limit is not None and pixels > limit:
        raise Image.DecompressionBombError(f"{pixels:,} pixels, and the limit is {limit:,}.")


def _pixels(image: Image.Image, size: tuple[int, int] | None, channels: int | None) -> np.ndarray:
    if size:
        image.draft(None, (2 * max(size),) * 2)  # lets a large JPEG be decoded at a half, a quarter, … of its size
    image.load()
    with contextlib.suppress(SyntaxError, ValueError, KeyError, TypeError, struct.error):  # EXIF that is no EXIF
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would clip at 255
        deep = np.asarray(image)
        image = Image.fromarray(np.where(deep == image.info.get("transparency"), 255, deep // 256).astype(np.uint8))
    numbered = image.mode in ("P", "PA")  # its pixels are numbers of colours
    if numbered or "transparency" in image.info:
        image = image.convert("LA" if image.mode in ("1", "L") else "RGBA")
    image = _on_white(image)
    grey = image.mode in ("1", "L", "F") or (numbered and _is_grey(image)) if channels is None else channels == 1
    image = image.convert("L" if grey else "RGB")
    if size:
        image = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.BILINEAR)
    return np.asarray(image).reshape(image.height, image.width, -1)


def _on_white(image: Image.Image) -> Image.Image:
    """The image on white where it is transparent: the colours below that are nobody's choice, often noise."""
    if image.mode not in ("LA", "RGBA"):
        return image
    white = Image.new(image.mode[:-1], image.size, "white")
    white.paste(image.convert(white.mode), mask=image.getchannel("A"))
    return white


def _is_grey(image: Image.Image) -> bool:
    red, green, blue = np.moveaxis(np.asarray(image), 2, 0)
    return np.array_equal(red, green) and np.array_equal(green, blue)


def _mixed(listing: Listing, shapes: Counter) -> ValueError:
    seen, grey = shapes.total(), sum(n for (_, _, channels), n in shapes.items() if channels == 1)
    if 0 < grey < seen:
        what = f"{grey} are grey and {seen - grey} in colour: make all of them one or the other"
        remedy = "with channels=1 or channels=3 (--channels)"
    else:
        sizes = ", ".join(f"{width}×{height} ({n})" for (height, width, _), n in shapes.most_common(5))
        what = f"the sizes are {sizes}: scale all of them to one"
        remedy = "with size=32, say (--size 32)"
    return ValueError(f"of the first {seen} images below {shown(listing.root)}, {what} {remedy}")


def _unreadable(listing: Listing, failures: list[ValueError]) -> ValueError:
    examples = "; ".join(str(error) for error in failures[:3])
    more = "; …" if len(failures) > 3 else ""
    what = f"{len(failures)} of {len(listing)} images cannot be read"
    return ValueError(f"{what}, repair or remove them: {examples}{more}")
