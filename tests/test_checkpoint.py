"""Checkpoints come back as they went in, or not at all."""

import errno
import math
import random
import re

import pytest
import torch

from utils import checkpoint, files
from utils.model import CNN, CNNConfig

RECORD = {
    "weights": {"a": torch.randn(3, 4), "steps": torch.tensor(7)},
    "optimizer": {"state": {0: {"momentum": torch.randn(2)}, 1: {"momentum": None}}, "lrs": [0.1, 1 / 3]},
    "words": ["ö", "", True, math.inf, 1e-300],
}


def equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b and type(a) is type(b)


def test_what_is_written_is_read(tmp_path):
    checkpoint.write(tmp_path / "x.safetensors", RECORD)
    assert equal(checkpoint.read(tmp_path / "x.safetensors"), RECORD)


def test_shared_and_strided_tensors_survive(tmp_path):
    shared = torch.randn(4, 4)
    checkpoint.write(tmp_path / "x.safetensors", {"a": shared, "b": shared, "c": shared.T})
    back = checkpoint.read(tmp_path / "x.safetensors")
    assert torch.equal(back["a"], back["b"])
    assert torch.equal(back["c"], shared.T)


def test_any_flipped_bit_or_cut_is_noticed(tmp_path):
    path = tmp_path / "x.safetensors"
    checkpoint.write(path, RECORD)
    good = path.read_bytes()
    draw = random.Random(0)
    for _ in range(200):
        bad = bytearray(good)
        bad[draw.randrange(len(bad))] ^= 1 << draw.randrange(8)
        path.write_bytes(bad)
        with pytest.raises(checkpoint.CheckpointError, match=re.escape(str(path))):
            checkpoint.read(path)
    for cut in (0, 7, 8, 100, len(good) - 1):
        path.write_bytes(good[:cut])
        with pytest.raises(checkpoint.CheckpointError, match="not a readable checkpoint|damaged"):
            checkpoint.read(path)


def test_pickles_are_not_loaded(tmp_path):
    torch.save(RECORD, tmp_path / "x.safetensors")
    with pytest.raises(checkpoint.CheckpointError):
        checkpoint.read(tmp_path / "x.safetensors")


def test_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    checkpoint.write(path, RECORD)

    def full(self, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(path), "write_bytes", full)
    with pytest.raises(OSError, match="x.safetensors.*") as error:
        checkpoint.write(path, {"other": 1})
    assert error.value.errno == errno.ENOSPC
    monkeypatch.undo()
    assert equal(checkpoint.read(path), RECORD)
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]


def test_trained_network_comes_back(tmp_path):
    model = CNN(CNNConfig(width=3, init=0.7, norm="group", in_channels=3)).eval()
    checkpoint.save_model(tmp_path, model, {"class_names": ["a", "b"]})
    back, card = checkpoint.load_model(tmp_path)
    assert back.config == model.config
    assert card == {"class_names": ["a", "b"]}
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(back(images), model(images))


def test_weights_of_another_architecture_are_refused(tmp_path):
    with pytest.raises(
        checkpoint.CheckpointError, match="another architecture.*head.weight is \\(10, 256\\) in the file"
    ):
        checkpoint.load_weights(CNN(CNNConfig(width=4)), CNN().state_dict(), tmp_path)


@pytest.mark.parametrize("field", [{"attention": True}, {"norm": "spectral"}])
def test_a_network_of_another_version_is_refused(field, tmp_path):
    checkpoint.save_model(tmp_path, CNN(CNNConfig(width=3)), {})
    saved = checkpoint.read(tmp_path / checkpoint.MODEL_FILE)
    checkpoint.write(tmp_path / checkpoint.MODEL_FILE, saved | {"config": saved["config"] | field})
    with pytest.raises(checkpoint.CheckpointError, match=f"does not know .*{next(iter(field))}.*or train again"):
        checkpoint.load_model(tmp_path)


def test_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(checkpoint.CheckpointError, match="no checkpoint at .*train first"):
        checkpoint.load_model(tmp_path)
    assert not list(files.ROOT.glob("model.safetensors"))
