"""Where a network runs, in which precision, with how much memory, within which budget: the one place that decides."""

import contextlib
import ctypes
import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # of glibc's malloc.h
CONTAINER_LIMITS = [  # files of cgroups, version 2 and 1: what a container may use, and what it uses
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
]
CACHES = "/sys/devices/system/cpu/cpu0/cache"  # on Linux: a folder for each cache of the first core
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
MIXED = ("bf16", "fp16")  # of the products only: weights, and all that adds up, stay in fp32


def pick(name: str = "auto") -> torch.device:
    """Return the device called `name`: "auto", "cpu", "cuda", "cuda:1", "mps".

    "auto" is what the environment variable CNN_DEVICE names, and without it CUDA before MPS before CPU. Under
    `torchrun`, "cuda" is the GPU of this process (LOCAL_RANK).

    Raises ValueError if there is no such device on this machine.
    """
    chosen = (os.environ.get("CNN_DEVICE") or "auto") if name == "auto" else name
    by = " (the environment variable CNN_DEVICE)" if chosen != name else ""
    name = chosen
    have = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in have.items() if there)
    if name == "cuda" and have["cuda"] and "LOCAL_RANK" in os.environ:
        name, count = f"cuda:{os.environ['LOCAL_RANK']}", torch.cuda.device_count()
        if int(os.environ["LOCAL_RANK"]) >= count:
            remedy = f"torchrun --nproc-per-node {count}, or --device cpu"
            raise ValueError(f"there are more processes on this machine than GPUs, which are {count}: {remedy}")
    kind, colon, index = str(name).partition(":")
    places = range(torch.cuda.device_count() if kind == "cuda" else 1)
    if not have.get(kind) or (colon and index not in map(str, places)):
        there = ", ".join(kind for kind, is_there in have.items() if is_there)
        raise ValueError(f"device {str(name)!r}{by} is not on this machine: choose auto or one of {there}")
    return torch.device(name)


def synchronize(where: torch.device) -> None:
    """Wait until a GPU has done what it was given; a CPU always has."""
    if where.type == "cuda":
        torch.cuda.synchronize(where)
    if where.type == "mps":
        torch.mps.synchronize()


def pick_precision(device: torch.device, name: str = "auto") -> str:
    """Return "fp32", "bf16", "fp16" or "fp64". "auto" is the fastest that `device` multiplies natively.

    bf16 on CUDA from Ampere on and on CPUs with AMX or AVX512-BF16 instructions; fp16 (with loss scaling) on older
    CUDA; fp32 elsewhere. fp64, to the last digit of a double, is slow, and there to check the others by. Raises
    ValueError for an unknown name, for fp16 on a CPU (its gradients underflow without loss scaling), and for fp64 on
    MPS, which has no doubles.
    """
    if name == "auto":
        if device.type == "cuda":
            return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
        return "bf16" if device.type == "cpu" and cpu_multiplies_bf16() else "fp32"
    if not isinstance(name, str) or name not in PRECISIONS:
        raise ValueError(f"precision {name!r} is unknown: choose auto or one of {', '.join(PRECISIONS)}")
    if name == "fp16" and device.type != "cuda":
        raise ValueError(f"precision 'fp16' needs a CUDA device, and this one is {device.type!r}: choose bf16 or fp32")
    if name == "fp64" and device.type == "mps":
        raise ValueError("precision 'fp64' is not on MPS, which has no doubles: choose fp32, or --device cpu")
    return name


def weight_dtype(precision: str) -> torch.dtype:
    """Return the type in which weights are kept, and losses computed, under `precision`."""
    return torch.float64 if precision == "fp64" else torch.float32


def free_memory(device: torch.device) -> int:
    """Return how many bytes of memory are free on `device`; on a CPU also within the limit of a container (cgroup)."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # to be used again
        return torch.cuda.mem_get_info(device)[0] + kept
    free = psutil.virtual_memory().available
    for limit, used in CONTAINER_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # no container, or "max": no limit
            room = int(Path(limit).read_bytes()) - int(Path(used).read_bytes())
            free = min(free, room + reclaimable(Path(used).with_name("memory.stat")))
    return max(0, free)


def reclaimable(stat: Path) -> int:
    """Return the bytes of cached files that a container counts as used, and gives back when they are needed."""
    found = re.search(r"^(?:total_)?inactive_file (\d+)$", stat.read_text("ascii"), re.MULTILINE)
    return int(found[1]) if found else 0


def budget(full: int, small: int) -> int:
    """Return `full`, or `small` under CNN_BUDGET=small: so much less work, where only running through is tested.

    Raises ValueError for another value of the environment variable.
    """
    name = os.environ.get("CNN_BUDGET") or "full"
    if name not in ("full", "small"):
        raise ValueError(f"CNN_BUDGET={name!r} is unknown: choose full (the default) or small")
    return small if name == "small" else full


def memory_format(device: torch.device) -> torch.memory_format:
    """Return how images lie in memory: channels last, but not on MPS, where batch norm's backward fails then."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def cpu_multiplies_bf16() -> bool:
    """True if this CPU has bf16 matrix instructions that PyTorch may use (ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA)."""
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return False
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return False
    native = [getattr(torch.cpu, check, None) for check in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    return any(check() for check in native if check is not None)


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """Return the context in which convolutions and matrix products run in `precision`, whatever the weights are in."""
    if precision not in MIXED:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=PRECISIONS[precision])


@contextlib.contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Let this process keep the memory that tensors free, for the next ones, while the block runs.

    By default glibc gives every large piece back to Linux, which clears it page by page when the next step asks for it
    again. What that costs depends on the kernel: `python cnn.py bench waterfall` says. See `man 3 mallopt`. Elsewhere
    this does nothing.
    """
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        libc.mallopt(M_MMAP_MAX, 65_536)  # glibc's own value, and the two to which it raises its thresholds by itself
        libc.mallopt(M_MMAP_THRESHOLD, 32 * 2**20)
        libc.mallopt(M_TRIM_THRESHOLD, 64 * 2**20)
        libc.malloc_trim(0)


def describe(device: str = "auto", precision: str = "auto") -> dict[str, str]:
    """Say what the machine at hand is: written beside every result, and shown at the end of the first lesson."""
    where = pick(device)
    return {
        "device": torch.cuda.get_device_name(where) if where.type == "cuda" else where.type,
        "precision": pick_precision(where, precision),
        "cpu": cpu_name(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def out_of_memory(error: BaseException) -> str:
    """Return in one line what `error` says of memory that was short; "" when it is about something else.

    On a CPU PyTorch raises a plain RuntimeError then.
    """
    words = r"can't allocate memory|not enough memory|out of memory|bad_alloc"
    short = isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and re.search(words, str(error)))
    return f"{error}".partition("\n")[0] or type(error).__name__ if short else ""


def cpu_name() -> str:
    """Return the CPU's model name, as Linux states it, else what Python's platform module knows."""
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as lines:
            names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        return names[0]
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def largest_cache() -> int | None:
    """Return the bytes of the CPU's largest cache, as Linux tells them; None where nothing does."""
    sizes = [file.read_text().strip() for file in Path(CACHES).glob("index*/size")]  # "32768K"
    return max((int(size.removesuffix("K")) * 1024 for size in sizes), default=None)
