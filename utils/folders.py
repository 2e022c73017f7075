"""Folders of images, one folder a class: listed, and decoded in parallel."""

import hashlib
import os
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


def list_images(root: Path) -> tuple[Listing, Listing | None]:
    """The training and the test images below `root`; the second is None when there is no split into train/ and test/.

    Raises FileNotFoundError without images, ValueError for fewer than two classes or different ones in train and test.
    """
    if not ((root / "train").is_dir() and (root / "test").is_dir()):
        return _list_classes(root), None
    train, test = _list_classes(root / "train"), _list_classes(root / "test")
    if train.class_names != test.class_names:
        only_train = sorted(set(train.class_names) - set(test.class_names))
        only_test = sorted(set(test.class_names) - set(train.class_names))
        raise ValueError(
            f"the class folders below {root} differ: only in train/ are {only_train}, only in test/ {only_test}; "
            "expected the same in both"
        )
    return train, test


def _list_classes(root: Path) -> Listing:
    names = tuple(sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith(".")))
    files = tuple(file for label, name in enumerate(names) for file in _list_class(root, name, label))
    if not files:
        raise FileNotFoundError(f"no images in class folders below {root}: expected {LAYOUT}")
    if len(names) == 1:
        raise ValueError(f"{root} has one class folder only, {names[0]!r}: expected at least two ({LAYOUT})")
    return Listing(root, names, files)


def _list_class(root: Path, name: str, label: int) -> list[File]:
    entries = sorted(os.scandir(root / name), key=lambda entry: entry.name)
    images = [e for e in entries if e.name.lower().endswith(SUFFIXES) and not e.name.startswith(".")]
    return [File(f"{name}/{e.name}", e.stat().st_size, e.stat().st_mtime_ns, label) for e in images]


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
    """One image as uint8 H×W×C, upright (by its EXIF orientation), without transparency.

    `size` is height and width: the largest such rectangle around the middle is scaled to it. `channels`: 1 for grey, 3
    for colour, None for as it is. Raises ValueError when it cannot be read, FileNotFoundError when it is not there.
    """
    try:
        with Image.open(path) as image:
            return _pixels(image, size, channels)
    except FileNotFoundError:
        raise
    except Image.DecompressionBombError as error:
        remedy = "Make it smaller, or raise PIL.Image.MAX_IMAGE_PIXELS if you trust it"
        raise ValueError(f"{path} has too many pixels: {error} {remedy}") from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is not an image") from error
    except Exception as error:  # a damaged file can make Pillow raise nearly anything
        raise ValueError(f"{path} cannot be read: {error or type(error).__name__}") from error


def _pixels(image: Image.Image, size: tuple[int, int] | None, channels: int | None) -> np.ndarray:
    if size:
        image.draft(None, (2 * max(size),) * 2)  # lets a large JPEG be decoded at a half, a quarter, … of its size
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would clip at 255
        image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
    grey = image.mode in ("1", "L", "LA", "La", "F") if channels is None else channels == 1
    image = image.convert("L" if grey else "RGB")
    if size:
        image = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.BILINEAR)
    return np.asarray(image).reshape(image.height, image.width, -1)


def _mixed(listing: Listing, shapes: Counter) -> ValueError:
    seen, grey = shapes.total(), sum(n for (_, _, channels), n in shapes.items() if channels == 1)
    if 0 < grey < seen:
        what = f"{grey} are grey and {seen - grey} in colour: make all of them one or the other"
        remedy = "with channels=1 or channels=3 (--channels)"
    else:
        sizes = ", ".join(f"{width}×{height} ({n})" for (height, width, _), n in shapes.most_common(5))
        what = f"the sizes are {sizes}: scale all of them to one"
        remedy = "with size=32, say (--size 32)"
    return ValueError(f"of the first {seen} images below {listing.root}, {what} {remedy}")


def _unreadable(listing: Listing, failures: list[ValueError]) -> ValueError:
    examples = "; ".join(str(error) for error in failures[:3])
    more = "; …" if len(failures) > 3 else ""
    return ValueError(f"{len(failures)} of {len(listing)} images are damaged, repair or remove them: {examples}{more}")
