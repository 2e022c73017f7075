"""Data: against NumPy in float64, Pillow and torchvision; every error that a reader can meet."""

import csv
import gzip
import hashlib
import math
import pickle
import shutil
import struct
import warnings
import weakref
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from unittest import mock
from urllib.error import URLError

import numpy as np
import psutil
import pytest
import scipy.io
import scipy.stats
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torchvision.transforms import v2

from utils import data, files, folders
from utils.data import Batches, ChannelStats, ImageData, Moments, Split

RAW = ChannelStats((0.0,), (1 / 255,), 1)  # normalizing with these gives the pixels back


@pytest.fixture(autouse=True)
def private_folders(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("CNN_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("CNN_RESULTS_DIR", str(tmp_path_factory.mktemp("results")))


@pytest.fixture(scope="module")
def fashion() -> ImageData:
    return data.load()


def random_images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def split_of(n: int, channels: int = 1, side: int = 8, num_classes: int = 2) -> Split:
    return Split(random_images(n, channels, side, side), torch.arange(n) % num_classes)


def make_folder(root: Path, counts: dict[str, int], size=(10, 8), mode="RGB", suffix=".png") -> Path:
    """Random images of `size` (width, height) in root/CLASS/000.png, …: as many of each class as `counts` says."""
    generator = np.random.default_rng(len(str(counts)))
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
            pixels = generator.integers(0, 256, shape, dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i:03}{suffix}")
    return root


def pixels(path: Path) -> torch.Tensor:
    with Image.open(path) as image:
        array = np.array(image)
    return torch.from_numpy(array.reshape(*array.shape[:2], -1)).permute(2, 0, 1)


# ---- Fashion-MNIST


def test_fashion_mnist_is_split_into_500_validation_images_a_class(fashion):
    assert (len(fashion.train), len(fashion.validation)) == (55_000, 5_000)
    assert fashion.validation.labels.bincount().tolist() == [500] * 10
    assert fashion.train.labels.bincount().tolist() == [5_500] * 10
    assert (fashion.in_channels, fashion.image_size, fashion.num_classes) == (1, (28, 28), 10)
    assert fashion.can_flip
    assert repr(fashion.train) == "Split(55,000 images, 1×28×28)"


@pytest.fixture(scope="module")
def torchvision_fashion(tmp_path_factory) -> dict[bool, torchvision.datasets.FashionMNIST]:
    root = tmp_path_factory.mktemp("torchvision")
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for path in data.FASHION_MNIST.glob("*.gz"):
        (raw / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    return {train: torchvision.datasets.FashionMNIST(root, train=train) for train in (True, False)}


def test_fashion_mnist_is_what_torchvision_reads(fashion, torchvision_fashion):
    whole = torchvision_fashion[True]
    held_out = torch.zeros(60_000, dtype=torch.bool)
    for label in range(10):
        held_out[(whole.targets == label).nonzero()[::12]] = True  # the first of every 12 of a class, in file order
    for split, mask in ((fashion.train, ~held_out), (fashion.validation, held_out)):
        assert torch.equal(split.images[:, 0], whole.data[mask])
        assert torch.equal(split.labels, whole.targets[mask])
    assert list(fashion.class_names) == whole.classes


def test_the_test_split_is_what_torchvision_reads_and_each_reading_is_logged(fashion, torchvision_fashion):
    log = files.results_dir() / "test_reads.csv"
    assert not log.exists()
    test = fashion.read_test("accuracy, once")
    fashion.read_test("and again")
    assert torch.equal(test.images[:, 0], torchvision_fashion[False].data)
    assert torch.equal(test.labels, torchvision_fashion[False].targets)
    with log.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["purpose"] for row in rows] == ["accuracy, once", "and again"]
    assert list(rows[0]) == ["date", "data", "checksum", "purpose"]
    assert (rows[0]["data"], rows[0]["checksum"]) == ("fashion-mnist", fashion.checksum[:12])


def test_checksum_is_of_the_images_that_are_there(fashion):
    few, others = replace(fashion, train=fashion.train[:64]), replace(fashion, train=fashion.train[64:128])
    assert few.checksum != others.checksum
    assert few.checksum == replace(others, train=fashion.train[:64]).checksum
    every = replace(fashion, train=fashion.train[:64:2])  # does not lie in memory in one piece
    assert every.checksum == replace(fashion, train=fashion.train[torch.arange(0, 64, 2)]).checksum


def test_the_test_split_is_not_read_without_a_purpose(fashion):
    with pytest.raises(ValueError, match="purpose is ' '"):
        fashion.read_test(" ")
    no_test = ImageData("made-up", fashion.train, fashion.validation, fashion.class_names)
    with pytest.raises(ValueError, match="made-up has no test images"):
        no_test.read_test("accuracy")


def test_data_can_be_sent_to_another_process(fashion):
    received = pickle.loads(pickle.dumps(fashion.take(20)))
    assert torch.equal(received.train.images, fashion.take(20).train.images)
    assert len(received.read_test("sent")) == 10_000


def test_loading_twice_gives_the_same_checksum_and_other_data_another(fashion):
    assert len(fashion.checksum) == 64
    assert data.load("fashion-mnist").checksum == fashion.checksum
    assert len({fashion.checksum, fashion.take(100).checksum, fashion.take(101).checksum}) == 3


def test_the_published_statistics_are_those_of_all_60000_images(fashion):
    whole = torch.cat([fashion.train.images, fashion.validation.images])
    stats = data.channel_stats(whole)
    assert (round(stats.mean[0], 4), round(stats.std[0], 4)) == (0.2860, 0.3530)
    assert stats.count == 60_000 * 28 * 28


@pytest.fixture
def own_copy(tmp_path, monkeypatch) -> Path:
    folder = shutil.copytree(data.FASHION_MNIST, tmp_path / "fashion-mnist")
    monkeypatch.setattr(data, "FASHION_MNIST", folder)
    return folder


@pytest.mark.parametrize("damage", ["flipped", "truncated"])
def test_a_damaged_file_is_an_error_that_names_both_checksums(own_copy, damage):
    path = own_copy / "train-labels-idx1-ubyte.gz"
    expected, content = files.sha256(path), bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content if damage == "flipped" else content[:1000])
    with pytest.raises(ValueError, match=r"train-labels-idx1-ubyte.gz is damaged") as caught:
        data.load()
    for part in (expected, files.sha256(path), "git checkout -- data/fashion-mnist"):
        assert part in str(caught.value)


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte.gz", "SHA256SUMS"])
def test_a_missing_file_is_an_error_with_the_remedy(own_copy, name):
    (own_copy / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} is missing: .*git checkout -- data/fashion-mnist"):
        data.load()


def test_a_damaged_test_file_is_noticed_when_it_is_read(own_copy):
    (own_copy / "t10k-images-idx3-ubyte.gz").write_bytes(b"")
    fashion = data.load()
    with pytest.raises(ValueError, match=r"t10k-images-idx3-ubyte.gz is damaged"):
        fashion.read_test("accuracy")


# ---- load: names and options


@pytest.mark.parametrize(
    ("name", "close"), [("fashion_mnist", "fashion-mnist"), ("CIFAR-10", "cifar10"), ("MNIST", "mnist"), ("xyz", None)]
)
def test_an_unknown_name_is_an_error_that_lists_the_known_ones(name, close):
    with pytest.raises(ValueError, match=f"no data set and no folder is called '{name}'") as caught:
        data.load(name)
    assert all(known in str(caught.value) for known in (*data.DATASETS, "a folder of images", "ROOT/train/CLASS"))
    assert ("did you mean" in str(caught.value)) == (close is not None)
    assert close is None or f"did you mean '{close}'?" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 7}, "size is 7: expected 8"),
        ({"size": 0}, "size is 0: expected 8"),
        ({"channels": 2}, "channels is 2: expected 1"),
        ({"channels": 0}, "channels is 0: expected 1"),
    ],
)
def test_wrong_options_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        data.load(**options)


def test_size_and_channels_of_a_named_set(fashion, monkeypatch):
    scaled = data.load(size=14, channels=3)
    assert scaled.train.images.shape == (55_000, 3, 14, 14)
    assert scaled.checksum != fashion.checksum
    for i in (0, 1, 2):
        image = Image.fromarray(fashion.train.images[i, 0].numpy()).resize((14, 14), Image.Resampling.BILINEAR)
        difference = scaled.train.images[i].int() - torch.from_numpy(np.array(image)).int()
        assert difference.abs().max() <= 1
    assert scaled.read_test("shape").images.shape == (10_000, 3, 14, 14)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 10**9}))
    with pytest.raises(MemoryError, match=r"60000×1×224×224 scaled pixels need 6.021 GB.* 1.000 GB are free on cpu"):
        data.load(size=224)


def test_grey_is_what_pillow_calls_grey():
    images = random_images(5, 3, 9, 9)
    grey = data._fit(Split(images, torch.zeros(5)), None, 1).images
    for ours, image in zip(grey, images, strict=True):
        theirs = np.array(Image.fromarray(image.permute(1, 2, 0).numpy()).convert("L")).astype(int)
        assert np.abs(ours[0].numpy() - theirs).max() <= 1


# ---- load: through torchvision


def write_idx(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.tobytes())


@pytest.mark.parametrize("name", ["mnist", "kmnist"])
def test_mnist_and_kmnist_are_read_where_torchvision_keeps_them(name):
    raw = files.cache_dir() / name / name.upper() / "raw"
    images, labels = random_images(240, 28, 28).numpy(), np.arange(240, dtype=np.uint8) % 10
    for part, n in (("train", 240), ("t10k", 40)):
        write_idx(raw / f"{part}-images-idx3-ubyte", images[:n])
        write_idx(raw / f"{part}-labels-idx1-ubyte", labels[:n])
    found = data.load(name)
    assert (len(found.train), len(found.validation), found.num_classes) == (220, 20, 10)
    assert torch.equal(found.validation.images[:10, 0], torch.from_numpy(images[:10]))
    assert torch.equal(found.read_test("shape").images[:, 0], torch.from_numpy(images[:40]))
    assert not found.can_flip
    assert name == "kmnist" or found.class_names == tuple("0123456789")


def write_cifar(folder: Path, name: str, classes: int) -> str:
    """Makes a file of CIFAR's format, and returns its MD5 sum, which torchvision compares."""
    names = [f"name {i}" for i in range(classes)]
    key = "fine_labels" if classes == 100 else "labels"
    batch = {"data": random_images(2 * classes, 3 * 32 * 32, seed=len(name)).numpy(), key: [*range(classes)] * 2}
    content = pickle.dumps({"label_names": names, "fine_label_names": names} if "meta" in name else batch)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    return hashlib.md5(content).hexdigest()


@pytest.mark.parametrize(("name", "classes", "train_files"), [("cifar10", 10, 5), ("cifar100", 100, 1)])
def test_cifar_is_read_where_torchvision_keeps_it(name, classes, train_files, monkeypatch):
    dataset = getattr(torchvision.datasets, name.upper())
    folder = files.cache_dir() / name / dataset.base_folder
    for part in ("train_list", "test_list"):
        sums = [[file, write_cifar(folder, file, classes)] for file, _ in getattr(dataset, part)]
        monkeypatch.setattr(dataset, part, sums)
    md5 = write_cifar(folder, dataset.meta["filename"], classes)
    monkeypatch.setattr(dataset, "meta", {**dataset.meta, "md5": md5})
    found = data.load(name)
    assert (found.in_channels, found.image_size, found.num_classes) == (3, (32, 32), classes)
    assert len(found.train) + len(found.validation) == 2 * classes * train_files
    assert found.class_names[3] == "name 3"
    theirs = dataset(files.cache_dir() / name, train=False)
    test = found.read_test("shape")
    assert torch.equal(test.images, torch.stack([v2.functional.pil_to_tensor(image) for image, _ in theirs]))
    assert test.labels.tolist() == [label for _, label in theirs]
    assert found.can_flip


def test_svhn_is_read_where_torchvision_keeps_it(monkeypatch):
    root = files.cache_dir() / "svhn"
    root.mkdir()
    for part in ("train", "test"):
        images = random_images(32, 32, 3, 40).numpy()  # H×W×C×N
        scipy.io.savemat(root / f"{part}.mat", {"X": images, "y": np.arange(40)[:, None] % 10 + 1})  # 10 stands for 0
        md5 = hashlib.md5((root / f"{part}.mat").read_bytes()).hexdigest()
        monkeypatch.setitem(torchvision.datasets.SVHN.split_list, part, ["", f"{part}.mat", md5])
    found = data.load("svhn")
    test = found.read_test("shape")
    assert torch.equal(test.images, torch.from_numpy(images).permute(3, 2, 0, 1))
    assert test.labels.tolist() == [*range(1, 10), 0] * 4
    assert (len(found.train), found.class_names, found.can_flip) == (30, tuple("0123456789"), False)
    (root / "test.mat").unlink()
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: (_ for _ in ()).throw(URLError("no route to host")))
    with pytest.raises(OSError, match="cannot load svhn"):  # before a training, not behind it
        data.load("svhn")


@pytest.mark.parametrize("name", list(data.TORCHVISION))
def test_no_network_is_an_error_that_says_where_the_files_belong(name, monkeypatch):
    def refuse(*args, **kwargs):
        raise URLError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    with pytest.raises(OSError, match=f"cannot load {name}: .*no route to host.*connect to the network") as caught:
        data.load(name)
    assert str(files.cache_dir() / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_download_that_broke_off_is_an_error_with_the_remedy():
    raw = files.cache_dir() / "mnist" / "MNIST" / "raw"
    write_idx(raw / "train-images-idx3-ubyte", random_images(20, 28, 28).numpy())
    for name in ("train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"):
        (raw / name).write_bytes(b"")
    with pytest.raises(OSError, match=r"cannot load mnist.*delete that folder first"):
        data.load("mnist")


# ---- load: folders of images


def test_a_folder_with_train_and_test(tmp_path):
    make_folder(tmp_path / "train", {"cat": 26, "dog": 13, "ant": 2})
    make_folder(tmp_path / "test", {"cat": 3, "dog": 1, "ant": 1})
    found = data.load(tmp_path, progress=False)
    assert found.class_names == ("ant", "cat", "dog")
    assert (found.name, found.in_channels, found.image_size, found.can_flip) == (tmp_path.name, 3, (8, 10), True)
    assert found.validation.labels.bincount().tolist() == [1, 3, 2]  # the first of every 12 of a class
    assert found.train.labels.bincount().tolist() == [1, 23, 11]
    expected = [pixels(tmp_path / "train" / name) for name in ("ant/000.png", "cat/000.png", "cat/012.png")]
    assert torch.equal(found.validation.images[:3], torch.stack(expected))
    test = found.read_test("pixels")
    assert torch.equal(test.images, torch.stack([pixels(path) for path in sorted(tmp_path.glob("test/*/*"))]))
    assert test.labels.tolist() == [0, 1, 1, 1, 2]


def test_a_folder_without_train_and_test_is_split(tmp_path):
    make_folder(tmp_path, {"a": 72, "b": 3}, mode="L")
    found = data.load(str(tmp_path), progress=False)
    test = found.read_test("counts")
    assert test.labels.bincount().tolist() == [12, 1]  # the first of every 6 of a class
    assert found.validation.labels.bincount().tolist() == [5, 1]  # the first of every 12 of the others
    assert found.train.labels.bincount().tolist() == [55, 1]
    everything = torch.cat([found.train.images, found.validation.images, test.images])
    assert len({image.numpy().tobytes() for image in everything}) == 75  # no image is in two splits
    assert torch.equal(test.images[1], pixels(tmp_path / "a" / "006.png"))


def test_other_files_and_hidden_ones_are_left_out(tmp_path):
    make_folder(tmp_path, {"a": 3, "b": 3})
    for name in ("a/.DS_Store", "a/._000.png", "a/notes.txt", "readme.md"):
        (tmp_path / name).write_text("no image", encoding="utf-8")
    (tmp_path / ".git").mkdir()
    assert data.load(tmp_path, progress=False).class_names == ("a", "b")


@pytest.mark.parametrize(("suffix", "tolerance"), [(".png", 0), (".webp", 40), (".jpg", 40), (".JPEG", 40)])
def test_formats(tmp_path, suffix, tolerance):
    gradient = np.broadcast_to(np.arange(0, 256, 16, dtype=np.uint8)[:, None, None], (16, 16, 3))
    for name in ("a/0", "a/1", "a/2", "b/0", "b/1", "b/2"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(gradient).save(tmp_path / (name + suffix))
    images = data.load(tmp_path, progress=False).train.images
    difference = images.int() - torch.from_numpy(gradient.copy()).permute(2, 0, 1).int()
    assert difference.abs().max() <= tolerance


def test_exif_orientation_is_honoured(tmp_path):
    upright = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(6, 8) * 5)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: to be shown rotated by 90° clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(folders.decode(tmp_path / "turned.png")[:, :, 0], np.array(upright))


def test_exif_that_is_none_does_no_harm(tmp_path):
    """Cameras and programs write it into images whose pixels are whole."""
    pixels = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5
    Image.fromarray(pixels).save(tmp_path / "whole.png", exif=b"no exif at all")
    assert np.array_equal(folders.decode(tmp_path / "whole.png")[:, :, 0], pixels)


def test_too_little_memory_is_no_damage(tmp_path, monkeypatch):
    Image.new("L", (8, 8)).save(tmp_path / "whole.png")
    monkeypatch.setattr(folders, "_on_white", mock.Mock(side_effect=MemoryError("too little")))
    with pytest.raises(MemoryError, match="too little"):
        folders.decode(tmp_path / "whole.png")


def on_white(pixels: np.ndarray) -> np.ndarray:
    """H×W×2 or H×W×4 pixels, the last channel alpha, over white (Porter & Duff 1984)."""
    colour, alpha = pixels[:, :, :-1].astype(float), pixels[:, :, -1:] / 255
    return np.round(colour * alpha + 255 * (1 - alpha)).astype(np.uint8)


def test_16_bits_palettes_and_transparency_become_8_bits_a_channel(tmp_path):
    deep = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert np.array_equal(folders.decode(tmp_path / "deep.png")[:, :, 0], deep // 256)
    colour = Image.fromarray(random_images(8, 8, 4).numpy())  # with an alpha channel
    colour.save(tmp_path / "alpha.png")
    assert np.array_equal(folders.decode(tmp_path / "alpha.png"), on_white(np.array(colour)))
    colour.convert("RGB").quantize(16).save(tmp_path / "palette.png")
    expected = np.array(colour.convert("RGB").quantize(16).convert("RGB"))
    assert np.array_equal(folders.decode(tmp_path / "palette.png"), expected)


def test_what_hides_below_transparent_pixels_is_not_seen(tmp_path):
    """Whether alpha is a channel, or belongs to one colour or to the palette's."""
    noise = random_images(8, 8, 3).numpy()
    opaque = Image.fromarray(noise)
    for mode in ("RGBA", "LA"):
        hidden = opaque.convert(mode)
        hidden.putalpha(0)
        hidden.save(tmp_path / f"{mode}.png")
    for mode, kind in (("P", bytes(256)), ("L", 7), ("RGB", (7, 7, 7))):
        image = opaque.quantize(16) if mode == "P" else Image.new(mode, (8, 8), kind)
        image.save(tmp_path / f"{mode}.png", transparency=kind)
    Image.fromarray(np.full((8, 8), 7, np.uint16)).save(tmp_path / "deep.png", transparency=7)
    for path in tmp_path.iterdir():
        assert (folders.decode(path, channels=3) == 255).all(), path.name


def test_a_palette_of_greys_is_grey(tmp_path):
    """Where all of it is: a folder of such images, and others that have no palette, is grey."""
    greys = make_folder(tmp_path, {"a": 6, "b": 6}, mode="L")
    for path in (greys / "b").iterdir():
        with Image.open(path) as image:
            wanted = np.array(image)
            image.convert("P").save(path)
        assert np.array_equal(folders.decode(path)[:, :, 0], wanted)
        assert folders.decode(path, channels=3).shape[2] == 3
    assert data.load(tmp_path, progress=False).in_channels == 1


def test_images_in_folders_that_are_not_read_are_told(tmp_path):
    for part in ("train", "test", "val"):
        make_folder(tmp_path / part, {"a": 6, "b": 6})
    make_folder(tmp_path / "train" / "a", {"more": 2})
    with pytest.warns(UserWarning, match="left out") as warned:
        data.load(tmp_path, progress=False)
    told = [str(each.message) for each in warned if each.category is UserWarning]
    within, beside = told
    assert "(2 in a/more/): move them into the folder of their class" in within
    assert "(12 in val/): move them into train/" in beside


def test_size_makes_mixed_sizes_one(tmp_path):
    make_folder(tmp_path, {"a": 6}, size=(40, 20))
    make_folder(tmp_path, {"b": 6}, size=(30, 50))
    found = data.load(tmp_path, size=16, progress=False)
    assert found.image_size == (16, 16)
    with Image.open(tmp_path / "a" / "001.png") as image:
        expected = np.array(ImageOps.fit(image, (16, 16), Image.Resampling.BILINEAR))  # the middle square
    assert torch.equal(found.validation.images[0], torch.from_numpy(expected).permute(2, 0, 1))


def test_a_large_jpeg_is_scaled_as_a_png_is(tmp_path):
    y, x = np.mgrid[0:600, 0:800] / 100
    picture = (127 + 60 * np.sin(x)[..., None] + 60 * np.cos(y)[..., None] * [1, 0.5, -1]).astype(np.uint8)
    for suffix in ("png", "jpg"):
        Image.fromarray(picture).save(tmp_path / f"a.{suffix}")
    jpeg, png = (folders.decode(tmp_path / f"a.{suffix}", size=(24, 32)).astype(int) for suffix in ("jpg", "png"))
    assert jpeg.shape == (24, 32, 3)
    assert np.abs(jpeg - png).max() <= 8


@pytest.mark.parametrize("channels", [1, 3])
def test_channels_makes_grey_and_colour_one(tmp_path, channels):
    make_folder(tmp_path, {"a": 6}, mode="L")
    make_folder(tmp_path, {"b": 6}, mode="RGB")
    found = data.load(tmp_path, channels=channels, progress=False)
    assert found.in_channels == channels
    with Image.open(tmp_path / "b" / "001.png") as image:
        expected = np.array(image.convert("L" if channels == 1 else "RGB")).reshape(8, 10, channels)
    assert torch.equal(found.validation.images[1], torch.from_numpy(expected).permute(2, 0, 1))


def test_mixed_sizes_are_an_error_that_names_them(tmp_path):
    make_folder(tmp_path, {"a": 4}, size=(40, 20))
    make_folder(tmp_path, {"b": 3}, size=(30, 50))
    with pytest.raises(ValueError, match=r"the sizes are 40×20 \(3\), 30×50 \(2\): .*--size"):
        data.load(tmp_path, progress=False)


def test_grey_and_colour_mixed_is_an_error_that_counts_them(tmp_path):
    make_folder(tmp_path, {"a": 4}, mode="L")
    make_folder(tmp_path, {"b": 3}, mode="RGB")
    with pytest.raises(ValueError, match=r"3 are grey and 2 in colour: .*channels=1 or channels=3 \(--channels\)"):
        data.load(tmp_path, progress=False)


def test_mixed_images_are_noticed_before_all_are_decoded(tmp_path, monkeypatch):
    make_folder(tmp_path, {"a": 12}, mode="L")
    make_folder(tmp_path, {"b": 400}, mode="RGB", size=(2, 2))
    monkeypatch.setattr(folders, "CHUNK", 10)
    monkeypatch.setattr(folders.os, "cpu_count", lambda: 1)
    with pytest.raises(ValueError, match="of the first 20 images"):
        data.load(tmp_path, progress=False)


def test_an_empty_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no images in class folders below .*ROOT/CLASS"):
        data.load(tmp_path)
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(FileNotFoundError, match="no images in class folders"):
        data.load(tmp_path)
    (tmp_path / "a").mkdir()
    with pytest.raises(FileNotFoundError, match="no images in class folders"):
        data.load(tmp_path)


def test_one_class_is_an_error(tmp_path):
    make_folder(tmp_path, {"cat": 12})
    with pytest.raises(ValueError, match="one class folder only, 'cat': expected at least two"):
        data.load(tmp_path)


def test_too_few_images_of_a_class_are_an_error_that_names_it(tmp_path):
    make_folder(tmp_path / "all", {"cat": 12, "dog": 2})
    with pytest.raises(ValueError, match=r"below .*all: {'dog': 2}; expected at least 3, one each for training, val"):
        data.load(tmp_path / "all")
    make_folder(tmp_path / "own" / "train", {"cat": 12, "dog": 1})
    make_folder(tmp_path / "own" / "test", {"cat": 1, "dog": 1})
    with pytest.raises(ValueError, match=r"{'dog': 1}; expected at least 2"):
        data.load(tmp_path / "own")
    make_folder(tmp_path / "own" / "train", {"dog": 2})
    (tmp_path / "own" / "test" / "cat" / "000.png").unlink()
    with pytest.raises(ValueError, match=r"test: {'cat': 0}; expected at least 1"):
        data.load(tmp_path / "own")


def test_different_classes_in_train_and_test_are_an_error_that_names_them(tmp_path):
    make_folder(tmp_path / "train", {"cat": 3, "dog": 3, "cow": 3})
    make_folder(tmp_path / "test", {"cat": 3, "dogs": 3, "cow": 3})
    with pytest.raises(ValueError, match=r"only in train/ are \['dog'\], only in test/ \['dogs'\]"):
        data.load(tmp_path)


def test_unreadable_images_are_an_error_that_names_and_counts_them(tmp_path):
    make_folder(tmp_path, {"a": 150, "b": 150}, suffix=".jpg")
    (tmp_path / "a" / "001.jpg").write_bytes(b"")
    (tmp_path / "b" / "010.jpg").write_text("no image", encoding="utf-8")
    whole = (tmp_path / "b" / "149.jpg").read_bytes()
    (tmp_path / "b" / "149.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="3 of 250 images cannot be read, repair or remove them") as caught:
        data.load(tmp_path, progress=False)
    parts = ("001.jpg is not an image", "010.jpg is not an image", "149.jpg cannot be read: ")
    assert all(part in str(caught.value) for part in parts)
    assert list(files.cache_dir().rglob("*.safetensors")) == []


def test_a_folder_of_unreadable_images_only_is_an_error(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(4):
            (tmp_path / name / f"{i}.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"6 of 6 images cannot be read.*; …"):
        data.load(tmp_path, progress=False)


def test_a_damaged_test_image_is_noticed_before_training(tmp_path):
    make_folder(tmp_path, {"a": 12, "b": 12})
    (tmp_path / "a" / "000.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="1 of 4 images cannot be read"):
        data.load(tmp_path, progress=False)


def test_a_decompression_bomb_is_explained(tmp_path, monkeypatch):
    make_folder(tmp_path, {"a": 3, "b": 3}, size=(100, 100))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"001.png has too many pixels: .*10000 pixels.*Image.MAX_IMAGE_PIXELS"):
        data.load(tmp_path, progress=False)


def test_a_folder_larger_than_memory_is_an_error(tmp_path, monkeypatch):
    make_folder(tmp_path, {"a": 12, "b": 12})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1000}))
    pixels = r"20×8×10×3 pixels below .* need .* GB of memory, and 0.000 GB are free"
    with pytest.warns(match="GB of memory are free"), pytest.raises(MemoryError, match=pixels):
        data.load(tmp_path, progress=False)


def test_one_image_file(tmp_path):
    make_folder(tmp_path, {"a": 1}, size=(12, 10))
    path = tmp_path / "a" / "000.png"
    assert torch.equal(data.read_image(path), pixels(path))
    assert data.read_image(path, (8, 9), 1).shape == (1, 8, 9)
    with pytest.raises(FileNotFoundError):
        data.read_image(tmp_path / "none.png")
    path.write_text("no image", encoding="utf-8")
    with pytest.raises(ValueError, match=r"000.png is not an image"):
        data.read_image(path)


# ---- the cache of decoded images


@pytest.fixture
def small_folder(tmp_path) -> Path:
    return make_folder(tmp_path / "small", {"a": 12, "b": 12})


@pytest.fixture
def decoded(monkeypatch) -> list[int]:
    """Collects the number of images at each decoding of a folder."""
    calls, decode_all = [], folders.decode_all
    monkeypatch.setattr(
        folders,
        "decode_all",
        lambda listing, *args, **kwargs: (calls.append(len(listing)), decode_all(listing, *args, **kwargs)),
    )
    return calls


def caches() -> dict[str, Path]:
    return {path.stem.split("-")[1]: path for path in (files.cache_dir() / "folders").iterdir()}


def test_a_folder_is_decoded_once(small_folder, decoded):
    first = data.load(small_folder, progress=False)
    assert decoded == [20, 4]
    again = data.load(small_folder, progress=False)
    assert decoded == [20, 4]
    assert again.checksum == first.checksum
    assert torch.equal(again.train.images, first.train.images)
    data.load(small_folder, size=16, progress=False)
    assert decoded == [20, 4] * 2
    assert data.load(small_folder, progress=False).image_size == (8, 10)
    assert decoded == [20, 4] * 2


def test_a_changed_folder_is_decoded_again(small_folder, decoded):
    first = data.load(small_folder, progress=False)
    Image.new("RGB", (10, 8)).save(small_folder / "a" / "005.png")
    changed = data.load(small_folder, progress=False)
    assert decoded == [20, 4, 20]
    assert changed.checksum != first.checksum
    (small_folder / "a" / "005.png").unlink()
    assert len(data.load(small_folder, progress=False).train) == len(first.train) - 1
    assert len(caches()) == 2  # the outdated ones are gone


@pytest.mark.parametrize("damage", ["flipped", "truncated", "empty"])
def test_a_damaged_cache_is_made_again_with_a_warning(small_folder, decoded, damage):
    first = data.load(small_folder, progress=False)
    path = caches()["train"]
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes({"flipped": content, "truncated": content[:-100], "empty": b""}[damage])
    with pytest.warns(UserWarning, match="train.safetensors are damaged .*decoding them again"):
        again = data.load(small_folder, progress=False)
    assert decoded == [20, 4, 20]
    assert again.checksum == first.checksum
    data.load(small_folder, progress=False)
    assert decoded == [20, 4, 20]


def test_a_cache_that_is_deleted_while_it_is_opened_is_made_again(small_folder, monkeypatch):
    first = data.load(small_folder, progress=False)

    def gone(path, framework):
        raise RuntimeError(f"unable to open file <{path}> in read-only mode: No such file or directory (2)")

    monkeypatch.setattr(data, "safe_open", gone)
    with pytest.warns(UserWarning, match="deleted just now"):
        again = data.load(small_folder, progress=False)
    assert again.checksum == first.checksum
    assert torch.equal(again.train.images, first.train.images)


def test_a_half_written_cache_is_never_there(small_folder, monkeypatch):
    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(data, "save_file", fail)
        with pytest.raises(OSError, match="the disk is full"):
            data.load(small_folder, progress=False)
    assert caches() == {}
    data.load(small_folder, progress=False)


def test_the_test_cache_is_not_read_before_the_test_split_is_asked_for(small_folder, monkeypatch):
    read, read_cache = [], data._read_cache
    monkeypatch.setattr(data, "_read_cache", lambda path: (read.append(path), read_cache(path))[1])
    found = data.load(small_folder, progress=False)
    assert read == [caches()["train"]]
    found.read_test("trial")
    assert read == [caches()["train"], caches()["test"]]
    caches()["test"].unlink()
    assert len(found.read_test("made again")) == 4


# ---- a part of the training images


def test_take_gives_as_many_of_each_class_in_file_order(fashion):
    part = fashion.take(25)
    assert sorted(part.train.labels.bincount().tolist()) == [2] * 5 + [3] * 5
    images = {image.numpy().tobytes() for image in part.train.images}
    for label in range(10):
        first = fashion.train.images[fashion.train.labels == label][:2]
        assert all(image.numpy().tobytes() in images for image in first)
    assert torch.equal(fashion.take(25).train.images, part.train.images)
    assert part.validation is fashion.validation
    assert len(part.read_test("take keeps the test split")) == 10_000


def test_take_fills_up_when_a_class_has_too_few():
    split = Split(random_images(10, 1, 8, 8), torch.tensor([0, 0, 0, 0, 1, 0, 0, 0, 0, 1]))
    made_up = ImageData("made-up", split, split, ("a", "b"))
    assert made_up.take(6).train.labels.tolist() == [0, 0, 0, 0, 1, 1]
    assert torch.equal(made_up.take(10).train.images, split.images)


@pytest.mark.parametrize("n", [-1, 0, 9, 55_001])
def test_take_of_too_few_or_too_many_is_an_error(fashion, n):
    with pytest.raises(ValueError, match=rf"take\({n}\) of fashion-mnist: expected 10 .* to 55000"):
        fashion.take(n)


def test_joined_data_has_all_images_once_and_none_to_choose_by(fashion):
    joined = fashion.join_validation()
    assert torch.equal(joined.train.images, torch.cat([fashion.train.images, fashion.validation.images]))
    assert torch.equal(joined.train.labels, torch.cat([fashion.train.labels, fashion.validation.labels]))
    assert joined.train.labels.bincount().tolist() == [6000] * 10
    assert len(joined.validation) == 0
    assert joined.checksum != fashion.checksum
    assert joined._test is fashion._test


# ---- channel statistics


def direct(images: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    pixels = images.numpy().astype(np.float64) / (255 if images.dtype == torch.uint8 else 1)
    return pixels.mean((0, 2, 3)), pixels.std((0, 2, 3))


@pytest.mark.parametrize("chunk", [1, 1000, 2**20])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_statistics_are_exact(chunk, layout):
    images = random_images(50, 3, 13, 11).contiguous(memory_format=layout)
    images[:, 2] //= 50
    stats = data.channel_stats(images, chunk)
    mean, std = direct(images)
    np.testing.assert_allclose(stats.mean, mean, rtol=1e-12)
    np.testing.assert_allclose(stats.std, std, rtol=1e-12)
    assert stats.count == 50 * 13 * 11


def test_statistics_of_fashion_mnist_are_exact_to_1e9(fashion):
    stats = data.channel_stats(fashion.train.images)
    counts = sum(np.bincount(part.flatten().numpy(), minlength=256) for part in fashion.train.images.split(5000))
    n, total, squares = (sum(int(count) * value**power for value, count in enumerate(counts)) for power in (0, 1, 2))
    mean, variance = Fraction(total, n), Fraction(squares, n) - Fraction(total, n) ** 2  # exact
    assert abs(stats.mean[0] - mean / 255) < 1e-9
    assert abs(stats.std[0] - math.sqrt(variance) / 255) < 1e-9
    assert stats.count == n


def test_a_large_mean_does_not_cancel_the_deviation():
    images = 1e8 + torch.randn(40, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    stats = data.channel_stats(images, chunk=100)
    assert stats.std == pytest.approx(direct(images)[1], rel=1e-7)  # sums of squares would give noise here


def test_the_images_are_not_changed():
    images = torch.rand(1, 3, 8, 8, dtype=torch.float64)
    before = images.clone()
    data.channel_stats(images)
    data.normalize(images, ChannelStats((0.5,) * 3, (0.5,) * 3, 1))
    assert torch.equal(images, before)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(0, 1000))
def test_merged_moments_are_those_of_everything(sizes, seed):
    parts = [random_images(n, 2, 3, 4, seed=seed + i) for i, n in enumerate(sizes)]
    merged = Moments.of(parts[0])
    for part in parts[1:]:
        merged = merged.merge(Moments.of(part))
    everything = torch.cat(parts).double()
    torch.testing.assert_close(merged.mean, everything.mean((0, 2, 3)), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        merged.m2 / merged.count, everything.var((0, 2, 3), correction=0), rtol=1e-12, atol=1e-12
    )


def test_statistics_of_a_stream_hold_one_batch_at_a_time():
    earlier, used = [], []
    before = psutil.Process().memory_info().rss

    def stream() -> Iterator[torch.Tensor]:
        for i in range(60):  # 47 MB as uint8, 380 MB as float64
            batch = torch.full((64, 3, 64, 64), i, dtype=torch.uint8)
            earlier.append(weakref.ref(batch))
            yield batch
            del batch
            used.append(psutil.Process().memory_info().rss - before)

    stats = data.channel_stats(stream())
    values = np.arange(60) / 255
    assert stats.mean == pytest.approx([values.mean()] * 3, rel=1e-12)
    assert stats.std == pytest.approx([values.std()] * 3, rel=1e-12)
    assert sum(reference() is not None for reference in earlier) <= 1
    assert max(used) < 150e6


def test_a_stream_of_batches_of_different_sizes_and_floats(fashion):
    images = fashion.validation.images
    as_floats = (images[a:b].float() / 255 for a, b in ((0, 1), (1, 700), (700, 700), (700, 5000)))
    stats, expected = data.channel_stats(as_floats), data.channel_stats(images)
    assert stats.mean == pytest.approx(expected.mean, rel=1e-6)
    assert stats.std == pytest.approx(expected.std, rel=1e-6)
    assert stats.count == expected.count


def test_statistics_of_nothing_or_of_wrong_shapes_are_errors():
    for nothing in (iter([]), torch.empty(0, 3, 8, 8)):
        with pytest.raises(ValueError, match="no images"):
            data.channel_stats(nothing)
    with pytest.raises(ValueError, match=r"shape \(3, 8, 8\): expected N×C×H×W"):
        data.channel_stats(torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match=r"shape \(1, 1, 8, 8\): expected N×3×H×W"):
        data.channel_stats([torch.zeros(1, 3, 8, 8), torch.zeros(1, 1, 8, 8)])


# ---- normalization


@pytest.mark.parametrize("images", [random_images(6, 3, 9, 7), random_images(6, 3, 9, 7).float() / 255])
def test_normalize_is_what_torchvision_does(images):
    stats = ChannelStats((0.4, 0.5, 0.6), (0.2, 0.3, 0.4), 1)
    expected = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(stats.mean, stats.std)])(images)
    torch.testing.assert_close(data.normalize(images, stats), expected, rtol=1e-5, atol=1e-6)
    assert data.normalize(images, stats, torch.bfloat16).dtype == torch.bfloat16


def test_normalized_images_have_mean_0_and_variance_1():
    images = random_images(40, 3, 9, 7)
    normalized = data.normalize(images, data.channel_stats(images))
    assert normalized.mean((0, 2, 3)).abs().max() < 1e-5
    assert (normalized.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-5


def test_a_constant_channel_becomes_zero():
    images = random_images(20, 3, 8, 8)
    images[:, 1] = 77
    stats = data.channel_stats(images)
    assert stats.std[1] == 0
    assert data.normalize(images, stats)[:, 1].abs().max() < 1e-6
    assert torch.isfinite(data.normalize(images, stats)).all()


# ---- batches


def pixels_of(batches: Batches) -> torch.Tensor:
    return torch.cat([images for images, _ in batches]).round().to(torch.uint8)


def test_without_augmentation_batches_are_the_images_in_order():
    split, stats = split_of(100, channels=3), ChannelStats((0.4, 0.5, 0.6), (0.2, 0.3, 0.4), 1)
    batches = Batches(split, stats, 32)
    assert len(batches) == 4
    assert [len(labels) for _, labels in batches] == [32, 32, 32, 4]
    assert torch.equal(torch.cat([images for images, _ in batches]), data.normalize(split.images, stats))
    assert torch.equal(torch.cat([labels for _, labels in batches]), split.labels)
    assert [len(labels) for _, labels in Batches(split, stats, 500)] == [100]


def test_drop_last_drops_the_incomplete_batch():
    batches = Batches(split_of(100), RAW, 32, drop_last=True)
    assert len(batches) == 3
    assert [len(labels) for _, labels in batches] == [32, 32, 32]


def test_an_epoch_has_every_image_once_in_an_order_of_its_own():
    n = 1000
    split = Split(torch.arange(n)[:, None, None, None].expand(n, 1, 8, 8).to(torch.uint8), torch.arange(n))
    batches = Batches(split, RAW, 64, shuffle=True)
    epochs = [torch.cat([labels for _, labels in batches]) for _ in range(3)]
    for labels in epochs:
        assert labels.sort().values.tolist() == list(range(n))
        assert abs(scipy.stats.spearmanr(labels, np.arange(n)).statistic) < 0.15
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[1], epochs[2])
    images, labels = next(iter(batches))
    assert torch.equal(images[:, 0, 0, 0].round().long(), labels % 256)  # an image keeps its label


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("crop_padding", [0, 2])
def test_dtype_and_memory_format(channels, dtype, crop_padding):
    split, stats = split_of(20, channels), ChannelStats((0.5,) * channels, (0.5,) * channels, 1)
    for channels_last in (None, True, False):  # None on a CPU: channels last
        options = {"dtype": dtype, "crop_padding": crop_padding, "flip": True, "channels_last": channels_last}
        images, labels = next(iter(Batches(split, stats, 10, **options)))
        assert (images.shape, images.dtype, labels.dtype) == ((10, channels, 8, 8), dtype, torch.int64)
        expected = torch.contiguous_format if channels_last is False else torch.channels_last
        assert images.is_contiguous(memory_format=expected)
        assert images.stride() == torch.empty_like(images, memory_format=expected).stride()


def windows_of(image: torch.Tensor, padding: int) -> dict[bytes, tuple[int, int, bool]]:
    """Each crop (top, left, mirrored) of a padded image C×H×W, by its pixels; padded by torch itself."""
    _, height, width = image.shape
    padded = torch.nn.functional.pad(image[None].float(), (padding,) * 4, mode="reflect")[0].to(torch.uint8)
    places = [(top, left) for top in range(2 * padding + 1) for left in range(2 * padding + 1)]
    crops = {(top, left): padded[:, top : top + height, left : left + width] for top, left in places}
    plain = {crop.numpy().tobytes(): (*place, False) for place, crop in crops.items()}
    return {crop.flip(2).contiguous().numpy().tobytes(): (*place, True) for place, crop in crops.items()} | plain


def test_crops_and_flips_are_uniform_independent_and_those_of_torchvision():
    n, padding = 6000, 2
    image = random_images(3, 9, 11)
    split = Split(image.expand(n, -1, -1, -1), torch.zeros(n, dtype=torch.int64))
    stats = ChannelStats(RAW.mean * 3, RAW.std * 3, 1)
    windows = windows_of(image, padding)
    assert len(windows) == 50
    batches = Batches(split, stats, 500, crop_padding=padding, flip=True, seed=1)
    seen = np.array([windows[crop.contiguous().numpy().tobytes()] for crop in pixels_of(batches)])
    counts = np.zeros((5, 5, 2))
    np.add.at(counts, tuple(seen.astype(int).T), 1)
    assert scipy.stats.chisquare(counts.ravel()).pvalue > 0.01

    crop = v2.Compose([v2.RandomCrop((9, 11), padding=padding, padding_mode="reflect"), v2.RandomHorizontalFlip()])
    torch.manual_seed(0)
    assert {crop(image).numpy().tobytes() for _ in range(1000)} == set(windows)


def test_neighbours_in_a_batch_are_cropped_independently():
    n, padding = 4000, 1
    image = random_images(1, 8, 8)
    windows = windows_of(image, padding)
    batches = Batches(Split(image.expand(n, -1, -1, -1), torch.zeros(n)), RAW, 512, crop_padding=padding, flip=True)
    seen = np.array([windows[crop.contiguous().numpy().tobytes()] for crop in pixels_of(batches)]).astype(int)
    code = seen @ [6, 2, 1]
    table = np.zeros((18, 18))
    np.add.at(table, (code[:-1], code[1:]), 1)
    assert scipy.stats.chi2_contingency(table).pvalue > 0.01


def test_flip_alone_and_crop_alone():
    n = 2000
    image = random_images(1, 8, 8)
    split = Split(image.expand(n, -1, -1, -1), torch.zeros(n, dtype=torch.int64))
    flipped = (pixels_of(Batches(split, RAW, 500, flip=True)) == image.flip(2)).flatten(1).all(1)
    assert 900 < flipped.sum() < 1100
    plain = (pixels_of(Batches(split, RAW, 500, flip=True)) == image).flatten(1).all(1)
    assert torch.equal(plain, ~flipped)
    windows = windows_of(image, 6)
    crops = pixels_of(Batches(split, RAW, 500, crop_padding=6))
    places = [windows[crop.contiguous().numpy().tobytes()] for crop in crops]
    assert not any(mirrored for _, _, mirrored in places)
    assert len(set(places)) == 13 * 13


def test_cutout_blanks_a_square_around_a_uniform_pixel():
    """Each pixel is the middle of a square equally often, and those at the edge have a part of theirs outside."""
    n, side = 8000, 9
    ones = Split(torch.ones(n, 2, side, side, dtype=torch.uint8), torch.zeros(n, dtype=torch.int64))
    stats = ChannelStats(RAW.mean * 2, RAW.std * 2, 1)
    images = torch.cat([images for images, _ in Batches(ones, stats, 500, cutout=3, seed=1)])
    blank = images == 0
    assert torch.equal(blank[:, 0], blank[:, 1])
    rows, columns = blank[:, 0].any(2), blank[:, 0].any(1)  # N×side
    assert torch.equal(blank[:, 0], rows[:, :, None] & columns[:, None, :])
    for lines in (rows, columns):
        assert set(lines.sum(1).tolist()) == {2, 3}
        middle = (lines * torch.arange(side)).sum(1) / lines.sum(1)
        middle = torch.where(lines.sum(1) == 3, middle, (middle > side / 2) * (side - 1.0)).long()
        assert scipy.stats.chisquare(torch.bincount(middle, minlength=side).numpy()).pvalue > 0.01


@pytest.mark.parametrize(("cutout", "first", "last"), [(1, 4, 4), (2, 3, 4), (4, 2, 5)])
def test_cutout_has_the_side_it_is_given(cutout, first, last):
    batches = Batches(split_of(4), RAW, 4, cutout=cutout)
    images = batches._hide(torch.ones(1, 1, 8, 8), torch.tensor([[0.5], [0.5]]))
    hidden = (images[0, 0] == 0).nonzero()
    assert hidden.min().item() == first
    assert hidden.max().item() == last
    assert len(hidden) == cutout**2


def test_cutout_leaves_the_other_random_numbers_alone():
    split = split_of(64)
    plain, blanked = (next(iter(Batches(split, RAW, 16, **TRAINING, cutout=cutout))) for cutout in (0, 3))
    assert torch.equal(plain[1], blanked[1])
    kept = blanked[0] != 0
    assert torch.equal(plain[0][kept], blanked[0][kept])


def test_alternating_flips_mirror_every_image_in_every_second_epoch():
    n = 400
    images = random_images(1, 8, 8).expand(n, -1, -1, -1)
    split = Split(images, torch.arange(n))
    batches = Batches(split, RAW, 100, flip=True, alternate=True, shuffle=True, seed=5)
    turns = []
    for _ in range(4):
        shown, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        plain = (shown == images.float()).flatten(1).all(1)
        turns.append(plain[labels.argsort()])
    assert 150 < turns[0].sum() < 250
    assert torch.equal(turns[1], ~turns[0])
    assert torch.equal(turns[2], turns[0])
    assert torch.equal(turns[3], turns[1])


def epochs_of(batches: Batches, n: int) -> list[torch.Tensor]:
    return [torch.cat([images for images, _ in batches]) for _ in range(n)]


TRAINING = {"shuffle": True, "crop_padding": 2, "flip": True, "drop_last": True}


def test_the_same_seed_gives_the_same_batches_and_another_others():
    split = split_of(64)
    first, same, other = (epochs_of(Batches(split, RAW, 16, seed=seed, **TRAINING), 2) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])


def test_the_global_generator_is_neither_used_nor_changed():
    split = split_of(64)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = epochs_of(Batches(split, RAW, 16, **TRAINING), 1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(epochs_of(Batches(split, RAW, 16, **TRAINING), 1)[0], first[0])


@pytest.mark.parametrize("options", [TRAINING, TRAINING | {"alternate": True, "cutout": 3}])
def test_a_restored_generator_goes_on_with_the_same_batches(options):
    split = split_of(64)
    batches = Batches(split, RAW, 16, **options)
    epochs_of(batches, 3)
    state, epoch = batches.generator.get_state(), batches.epoch
    expected = epochs_of(batches, 2)
    resumed = Batches(split, RAW, 16, **options)
    resumed.generator.set_state(state)
    resumed.epoch = epoch
    assert all(torch.equal(a, b) for a, b in zip(epochs_of(resumed, 2), expected, strict=True))


def test_the_split_itself_is_not_changed():
    split = split_of(64, channels=3)
    images, labels = split.images.clone(), split.labels.clone()
    epochs_of(Batches(split, ChannelStats((0.5,) * 3, (0.5,) * 3, 1), 16, **TRAINING), 1)
    assert torch.equal(split.images, images)
    assert torch.equal(split.labels, labels)


@pytest.mark.parametrize(
    ("n", "options", "message"),
    [
        (10, {"batch_size": 0}, "batch_size is 0: expected 1 or more images"),
        (10, {"batch_size": 11, "shuffle": True}, "batch_size is 11: expected 1 to 10, the number of images"),
        (10, {"batch_size": 11, "drop_last": True}, "batch_size is 11: expected 1 to 10"),
        (10, {"batch_size": 5, "crop_padding": 8}, "crop_padding is 8: expected 0 to 7 for images of 8×8"),
        (10, {"batch_size": 5, "crop_padding": -1}, "crop_padding is -1: expected 0 to 7"),
        (10, {"batch_size": 5, "cutout": 8}, "cutout is 8: expected 0 to 7 for images of 8×8"),
        (
            10,
            {"batch_size": 5, "stats": ChannelStats((0.5,) * 3, (0.5,) * 3, 1)},
            "stats are of 3 channels: expected 1",
        ),
        (0, {"batch_size": 5}, "no images"),
    ],
)
def test_wrong_options_of_batches_are_errors(n, options, message):
    with pytest.raises(ValueError, match=message):
        Batches(split_of(n), **{"stats": RAW, **options})


def test_batches_larger_than_memory_are_an_error(monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1000}))
    with pytest.raises(MemoryError, match=r"100 images of 1×8×8 need .* GB of memory"):
        Batches(split_of(100), RAW, 10)


def test_the_memory_check_says_what_is_needed_what_is_there_and_what_to_do():
    data.check_memory(1000, "they", available=1000)
    with pytest.raises(MemoryError, match=r"they need 3.000 GB of memory, and 2.500 GB are free on cpu") as caught:
        data.check_memory(3 * 10**9, "they", available=25 * 10**8)
    assert all(remedy in str(caught.value) for remedy in ("take(n)", "--size"))


def test_loading_warns_where_a_lesson_would_not_fit(monkeypatch):
    monkeypatch.setattr(data, "free_memory", lambda device: 3 * 10**8)
    with pytest.warns(UserWarning, match=r"0.3 GB of memory are free, and a lesson may need 0.8: shut down other"):
        data.load("fashion-mnist")
    monkeypatch.setattr(data, "free_memory", lambda device: 3 * 10**9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.load("fashion-mnist")


def accelerator() -> str:
    """The accelerator of this machine, when it gives memory too; hosted macOS machines have one that does not."""
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else None
    if device is None:
        pytest.skip("no accelerator")
    try:
        torch.zeros(2**20, device=device)
    except RuntimeError as error:
        pytest.skip(f"{device} gives no memory: {error}")
    return device


@pytest.mark.gpu
def test_an_accelerator_gives_the_same_batches():
    device = accelerator()
    split, stats = split_of(200, channels=3), ChannelStats((0.4, 0.5, 0.6), (0.2, 0.3, 0.4), 1)
    here, there = (epochs_of(Batches(split, stats, 64, device=name, **TRAINING), 2) for name in ("cpu", device))
    for ours, theirs in zip(here, there, strict=True):
        assert theirs.device.type == device
        torch.testing.assert_close(theirs.cpu(), ours)
    with pytest.raises(MemoryError, match=f"are free on {device}"):
        data.check_memory(10**15, "they", device)


# ----------------------------------------------------------------------------------------------- input normalization


@pytest.mark.parametrize("kind", ["data set", *data.INPUT_NORMS])
def test_each_input_normalization_gives_the_values_that_it_is_called_by(kind):
    """Against the definition, in float64; `Batches` and `normalize` agree."""
    split = split_of(60, channels=3)
    stats = data.input_stats(split.images, kind)
    seen = torch.cat([images for images, _ in Batches(split, stats, 16)])
    assert torch.allclose(seen, data.normalize(split.images, stats), atol=1e-6)
    pixels = split.images.double()
    std, mean = torch.std_mean(pixels, (0, 2, 3), correction=0, keepdim=True)
    own_std, own_mean = torch.std_mean(pixels, (1, 2, 3), correction=0, keepdim=True)
    expected = {
        "data set": (pixels - mean) / std,
        "per-image": (pixels - own_mean) / own_std,
        "0.5-0.5": pixels / 127.5 - 1,
        "0-1": pixels / 255,
        "0-255": pixels,
    }
    assert torch.allclose(seen.double(), expected[kind], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [28, 224])
def test_per_image_normalization_gives_unit_deviation_to_the_faintest_image(size):
    images = torch.full((1, 1, size, size), 100, dtype=torch.uint8)
    images[0, 0, 3, 4] = 101
    assert data.normalize(images, data.input_stats(images, "per-image")).std().item() == pytest.approx(1, abs=0.01)


def test_a_constant_image_becomes_zero_per_image():
    images = torch.full((2, 1, 8, 8), 200, dtype=torch.uint8)
    assert data.normalize(images, data.input_stats(images, "per-image")).abs().max() < 1e-3


def test_an_unknown_input_normalization_is_refused():
    with pytest.raises(ValueError, match="input_norm='imagenet': choose one of data set, per-image"):
        data.input_stats(split_of(4).images, "imagenet")
