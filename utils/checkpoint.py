"""Trained networks and interrupted runs on disk: safetensors files, written whole or not at all, never unpickled."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from utils import files
from utils.model import CNN, CNNConfig

MODEL_FILE = "model.safetensors"  # the trained weights and what is needed to use them
STATE_FILE = "state.safetensors"  # everything that an interrupted run needs to go on


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or of another network; the message says which and what to do."""


def write(path: Path, record: Any) -> None:
    """Write `record` to `path`: nested dicts, lists, numbers and strings as JSON, the tensors in it as safetensors.

    A SHA-256 over both stands in the file's header. Raises OSError (disk full, no permission) and then leaves the old
    file as it was.
    """
    tensors: dict[str, Tensor] = {}
    text = json.dumps(pack(record, tensors))
    header = {"record": text, "sha256": digest(text, tensors)}
    files.write_bytes(path, save(tensors, metadata=header))


def read(path: Path, *parts: str) -> Any:
    """Return what `write` wrote to `path`, a dict with `parts` if any are named.

    Raises CheckpointError if the file is missing, not exactly what was written, or a checkpoint of another kind.
    """
    remedy = "train again, or take the file from a backup"
    if not Path(path).is_file():
        raise CheckpointError(f"no checkpoint at {path}: train first (python cnn.py), or name another folder")
    try:
        content = Path(path).read_bytes()  # at once, as another process may put a new file in its place
        tensors = load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
        text = header["record"]
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise CheckpointError(f"{path} is not a readable checkpoint ({error}): {remedy}") from error
    if digest(text, tensors) != header.get("sha256"):
        raise CheckpointError(f"{path} is damaged (its SHA-256 is not the one written with it): {remedy}")
    record = unpack(json.loads(text), tensors)
    if parts and not (isinstance(record, dict) and record.keys() >= set(parts)):
        raise CheckpointError(f"{path} is a checkpoint of another kind (expected in it: {', '.join(parts)}): {remedy}")
    return record


def pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Return `value` as JSON can hold it, its tensors moved to `tensors` and named there by a number."""
    if isinstance(value, Tensor):
        name = f"{len(tensors):05d}"
        tensors[name] = value.detach().cpu().clone().contiguous()
        return {"tensor": name}
    if isinstance(value, dict):
        return {"items": [[key, pack(item, tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return [pack(item, tensors) for item in value]
    return value


def unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Return what `pack` packed (tuples come back as lists)."""
    if isinstance(value, dict):
        return tensors[value["tensor"]] if "tensor" in value else {k: unpack(v, tensors) for k, v in value["items"]}
    if isinstance(value, list):
        return [unpack(item, tensors) for item in value]
    return value


def digest(text: str, tensors: dict[str, Tensor]) -> str:
    """Return the SHA-256 of a record and of its tensors' names, types, shapes and bytes."""
    sha = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return sha.hexdigest()


def save_model(folder: Path, model: nn.Module, card: dict[str, Any]) -> None:
    """Write the weights of `model` and its `card` (data, classes, statistics, epoch) to `folder`/model.safetensors."""
    config = asdict(model.config) if isinstance(model, CNN) else None
    write(Path(folder) / MODEL_FILE, {"config": config, "weights": model.state_dict(), "card": card})


def load_model(folder: Path) -> tuple[CNN, dict[str, Any]]:
    """Return the trained CNN of `folder`, in evaluation mode, and its card. Raises CheckpointError."""
    path = Path(folder) / MODEL_FILE
    saved = read(path, "config", "weights", "card")
    if saved["config"] is None:
        raise CheckpointError(
            f"{path} holds a network that is not the course's CNN: load its weights with checkpoint.read"
        )
    try:
        model = CNN(CNNConfig(**saved["config"]))
    except (TypeError, ValueError) as error:  # a field that is unknown here, or a value
        raise CheckpointError(
            f"{path} holds a network that this version of the course does not know ({error}): "
            "use the version that it was trained with, or train again"
        ) from error
    load_weights(model, saved["weights"], path)
    return model.eval(), saved["card"]


def load_weights(model: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """Load `weights` into `model`. Raises CheckpointError that names the first tensors that do not fit."""
    ours = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    theirs = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if ours != theirs:
        wrong = [
            f"{name} is {theirs.get(name, 'missing')} in the file and {ours.get(name, 'missing')} in the network"
            for name in sorted(ours.keys() | theirs.keys())
            if ours.get(name) != theirs.get(name)
        ]
        raise CheckpointError(
            f"{path} is of another architecture ({len(wrong)} tensors differ: {'; '.join(wrong[:2])}): "
            "use the configuration that it was trained with, or another folder"
        )
    model.load_state_dict(weights)
