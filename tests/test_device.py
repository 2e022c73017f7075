"""Device and precision: what is chosen, and what is refused."""

import os
import subprocess
import sys

import psutil
import pytest
import torch

from utils import device


def test_environment_decides_what_auto_is(monkeypatch):
    monkeypatch.setenv("CNN_DEVICE", "nonsense")
    with pytest.raises(ValueError, match="'nonsense'"):
        device.pick()
    assert device.pick("cpu").type == "cpu"
    monkeypatch.setenv("CNN_DEVICE", "")  # as an unset one
    assert device.pick().type in ("cpu", "cuda", "mps")


def test_budget_is_full_unless_the_environment_says_small(monkeypatch):
    monkeypatch.delenv("CNN_BUDGET", raising=False)
    assert device.budget(10, 2) == 10
    for name, wanted in {"small": 2, "full": 10}.items():
        monkeypatch.setenv("CNN_BUDGET", name)
        assert device.budget(10, 2) == wanted
    monkeypatch.setenv("CNN_BUDGET", "")
    assert device.budget(10, 2) == 10
    monkeypatch.setenv("CNN_BUDGET", "tiny")
    with pytest.raises(ValueError, match="CNN_BUDGET='tiny' is unknown: choose full"):
        device.budget(10, 2)


def test_auto_prefers_cuda_then_mps_then_cpu(monkeypatch):
    monkeypatch.delenv("CNN_DEVICE")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device.pick().type == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device.pick().type == "mps"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert device.pick().type == "cpu"


def test_more_processes_than_gpus_are_told_so(monkeypatch):
    monkeypatch.delenv("CNN_DEVICE")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert device.pick() == torch.device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(
        ValueError, match="more processes on this machine than GPUs, which are 1: torchrun --nproc-per-node 1"
    ):
        device.pick()


def test_memory_that_pytorch_keeps_on_a_gpu_is_free(monkeypatch):
    for name, value in {"mem_get_info": (100, 1000), "memory_reserved": 600, "memory_allocated": 250}.items():
        monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value)
    assert device.free_memory(torch.device("cuda")) == 100 + 350


def test_a_wrong_environment_variable_is_named(monkeypatch):
    monkeypatch.setenv("CNN_DEVICE", "gpu")
    with pytest.raises(ValueError, match="'gpu' \\(the environment variable CNN_DEVICE\\) is not on this machine"):
        device.pick()
    assert device.pick("cpu").type == "cpu"


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "", "tpu", "cpu:", "cpu:00", "cpu:1", "cpu:²"])
def test_unknown_device_is_named(name):
    with pytest.raises(ValueError, match=f"'{name}'.*choose auto"):
        device.pick(name)


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_precision_on_cuda_follows_the_generation(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda where: capability)
    assert device.pick_precision(torch.device("cuda")) == expected


def test_precision_on_the_cpu():
    cpu = torch.device("cpu")
    assert device.pick_precision(cpu) == ("bf16" if device.cpu_multiplies_bf16() else "fp32")
    assert device.pick_precision(cpu, "fp32") == "fp32"
    with pytest.raises(ValueError, match="'fp8'.*fp32, bf16, fp16"):
        device.pick_precision(cpu, "fp8")
    with pytest.raises(ValueError, match="fp16.*CUDA"):
        device.pick_precision(cpu, "fp16")


def test_cpu_kept_from_its_bf16_instructions_trains_in_fp32():
    limits = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    code = "from utils import device; print(device.describe('cpu')['precision'])"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | limits, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "fp32"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_autocast_multiplies_in_the_precision(precision):
    with device.autocast(torch.device("cpu"), precision):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == device.PRECISIONS[precision]


def container(folder, monkeypatch, limit: str, used: int, stat: str = "anon 5\n") -> None:
    """Pretend to run in a container with these numbers of bytes."""
    for name, text in {"memory.max": limit, "memory.current": str(used), "memory.stat": stat}.items():
        (folder / name).write_text(text + "\n", encoding="ascii")
    files = (folder / "memory.max", folder / "memory.current")
    monkeypatch.setattr(device, "CONTAINER_LIMITS", [("/no/such/file", "/none"), files])


def test_free_memory_of_a_container_is_what_its_limit_leaves(tmp_path, monkeypatch):
    """Binder and Docker limit a container to less than psutil sees; cached files do not count."""
    cpu = torch.device("cpu")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 10**10}))
    container(tmp_path, monkeypatch, "max", 10)
    assert device.free_memory(cpu) == 10**10
    container(tmp_path, monkeypatch, str(10**9), 4 * 10**8, "anon 1\ninactive_file 100000000\nactive_file 7")
    assert device.free_memory(cpu) == 7 * 10**8
    container(tmp_path, monkeypatch, str(10**9), 2 * 10**9)
    assert device.free_memory(cpu) == 0
    container(tmp_path, monkeypatch, str(10**12), 10)
    assert device.free_memory(cpu) == 10**10


def test_largest_cache_is_read_where_linux_tells_it(tmp_path, monkeypatch):
    monkeypatch.setattr(device, "CACHES", tmp_path)
    assert device.largest_cache() is None
    for place, size in enumerate(("32K", "1024K", "32768K")):
        (tmp_path / f"index{place}").mkdir()
        (tmp_path / f"index{place}" / "size").write_text(size + "\n", encoding="ascii")
    assert device.largest_cache() == 32 * 2**20
