"""One training run shared by several processes, which `torchrun` starts: each takes its share of every batch.

On CPUs they talk through gloo, on CUDA GPUs through NCCL. What one process would compute on the whole batch, they
compute together: gradients are averaged (PyTorch's DistributedDataParallel), batch norm takes the statistics of all.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

PATIENCE = timedelta(seconds=60)  # how long a process waits for another one that says nothing


class WorkerLost(RuntimeError):
    """Another process of the run has ended or was lost; the message says what to do."""


def launched() -> bool:
    """True if `torchrun` started this process."""
    return dist.is_available() and dist.is_torchelastic_launched()


def is_first() -> bool:
    """True in the one process of a run that prints and writes files, joined or not; always without `torchrun`."""
    return not launched() or os.environ.get("RANK") == "0"


def joined() -> bool:
    """True inside of `join`, under `torchrun`."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Return the number, from 0, of this process among those that have joined; 0 before `join`."""
    return dist.get_rank() if joined() else 0


def size() -> int:
    """Return how many processes have joined the run; 1 before `join`."""
    return dist.get_world_size() if joined() else 1


def threads() -> int:
    """Return the CPU threads of this process: its share of the cores (`torchrun` alone would give it one)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


@contextlib.contextmanager
def join(where: torch.device) -> Iterator[None]:
    """Take part in the run that `torchrun` started, computing on `where`; without `torchrun` this does nothing.

    Raises ValueError for a device on which processes cannot work together. On CPUs raises WorkerLost when another
    process ends before the block does: at once when its connection breaks or `torchrun` says so, else within a minute.
    """
    if not launched():
        yield
        return
    if where.type not in ("cpu", "cuda"):
        raise ValueError(f"several processes cannot share a run on {where.type!r}: choose --device cpu or cuda")
    if where.type == "cuda":
        alone = os.environ.get("LOCAL_WORLD_SIZE") == "1"
        if not alone and where.index != (own := int(os.environ["LOCAL_RANK"])):
            raise ValueError(f"process {own} of this machine cannot share {where} with another: choose --device cuda")
        torch.cuda.set_device(where)
    dist.init_process_group("nccl" if where.type == "cuda" else "gloo", timeout=PATIENCE)
    with stopped_by_torchrun():
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, dist.DistError) or "gloo" in str(error):
                raise_lost(error)
            raise
        finally:
            dist.destroy_process_group()


@contextlib.contextmanager
def in_turn() -> Iterator[None]:
    """Let the first process of each machine run the block before the others: what it caches, they find.

    Nobody goes on before all have run it: everywhere else a process waits for a minute only.
    """
    if size() == 1:
        yield
        return
    patient = dist.new_group(backend="gloo", timeout=timedelta(hours=6))
    later = os.environ["LOCAL_RANK"] != "0"
    if later:
        dist.barrier(patient)
    yield
    if not later:
        dist.barrier(patient)
    dist.barrier(patient)


@contextlib.contextmanager
def stopped_by_torchrun() -> Iterator[None]:
    """While the block runs, SIGTERM, which `torchrun` sends when another process has ended, raises WorkerLost."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: raise_lost())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def raise_lost(cause: BaseException | None = None) -> NoReturn:
    why = f" ({str(cause).splitlines()[0]})" if cause else ""
    raise WorkerLost(f"another process of this run has ended{why}, and no process can go on alone") from cause


def wrap(model: nn.Module) -> nn.Module:
    """Return `model` so that its gradients are averaged over all processes after backward; alone, `model` itself.

    A network some of whose weights have no gradient at some steps says so by an attribute `unused_parameters`.
    """
    if size() == 1:
        return model
    unused = getattr(model, "unused_parameters", False)
    return nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True, find_unused_parameters=unused)


def synchronize_batch_norm(model: nn.Module) -> None:
    """Let the batch norms of `model` (with γ, β and running statistics) normalize by the images of all processes."""
    if size() == 1:
        return
    if next(model.parameters()).is_cuda:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.BatchNorm2d and child.affine and child.track_running_stats:
                setattr(module, name, SyncBatchNorm2d.of(child))
    kinds = {type(module) for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)}
    if alone := sorted(kind.__name__ for kind in kinds - {SyncBatchNorm2d}):
        raise ValueError(
            f"{', '.join(alone)}: on CPUs only a BatchNorm2d with γ, β and running statistics can be shared by several "
            "processes; use one process, or --device cuda"
        )


def all_sum(tensor: Tensor) -> Tensor:
    """Return the sum of `tensor` over all processes."""
    if size() > 1:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def gather(tensor: Tensor) -> list[Tensor]:
    """Return the `tensor` of each process, all of one shape, in the order of their ranks."""
    if size() == 1:
        return [tensor]
    on = "cuda" if dist.get_backend() == "nccl" else "cpu"
    parts = [torch.empty_like(tensor, device=on) for _ in range(size())]
    dist.all_gather(parts, tensor.to(on))
    return [part.to(tensor.device) for part in parts]


def from_first(text: str) -> str:
    """Return the `text` of the first process, the same in all of them."""
    own = os.fsencode(text)  # a path may hold bytes that are no text
    lengths = [int(length) for length in gather(torch.tensor(len(own)))]
    padded = torch.tensor(list(own.ljust(max(lengths))), dtype=torch.uint8)
    return os.fsdecode(bytes(gather(padded)[0][: lengths[0]].tolist()))


class SyncBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` over the images of all processes, on CPUs; PyTorch's own `nn.SyncBatchNorm` needs a GPU."""

    @classmethod
    def of(cls, plain: nn.BatchNorm2d) -> "SyncBatchNorm2d":
        """Return the synchronized form of `plain`, which shares its parameters and statistics."""
        module = cls(plain.num_features, plain.eps, plain.momentum)
        for name, weight in plain.named_parameters(recurse=False):
            setattr(module, name, weight)
        for name, statistic in plain.named_buffers(recurse=False):
            setattr(module, name, statistic)
        return module.train(plain.training)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or size() == 1:
            return super().forward(x)
        count, mean, var = global_moments(x.detach())
        self.num_batches_tracked += 1
        share = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(var * count / (count - 1), share)  # unbiased, as nn.BatchNorm2d stores it
        return GlobalBatchNorm.apply(x, self.weight, self.bias, mean, var, count, self.eps)


def global_moments(x: Tensor) -> tuple[float, Tensor, Tensor]:
    """Return number, mean and biased variance of each channel of N×C×H×W `x` over all processes, in float32.

    Each process' mean and variance are merged (Chan, Golub, LeVeque 1983), as sums of squares would cancel.
    """
    unused = torch.zeros(2, x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))
    mean, var = torch.batch_norm_update_stats(x, *unused, 0.0)  # as torch.var_mean, in a twentieth of its time
    own = torch.stack([torch.full_like(mean, x.numel() / x.shape[1]), mean, var])
    counts, means, variances = torch.stack(gather(own)).unbind(1)  # processes×C each
    total = counts.sum(0)
    mean = (counts * means).sum(0) / total
    return total[0].item(), mean, (counts * (variances + (means - mean) ** 2)).sum(0) / total


class GlobalBatchNorm(torch.autograd.Function):
    """Batch norm by given statistics, which are those of the images of all processes (Ioffe & Szegedy 2015)."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, count: float, eps: float):
        ctx.save_for_backward(x, weight, mean, var)
        ctx.count, ctx.eps = count, eps
        return F.batch_norm(x, mean, var, weight, bias, eps=eps)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        """∂x = γ/σ · (g − mean(g) − x̂ · mean(g · x̂)), the means over all processes; ∂γ and ∂β of this one's images."""
        x, weight, mean, var = ctx.saved_tensors
        backward = torch.ops.aten.native_batch_norm_backward
        by_x, by_weight, by_bias = backward(
            gradient, x, weight, mean, var, None, None, False, ctx.eps, [True, True, True]
        )
        g_xhat, g = all_sum(torch.stack([by_weight, by_bias])) / ctx.count
        scale = -weight * (var + ctx.eps).rsqrt()
        by_x += F.batch_norm(x, mean, var, scale * g_xhat, scale * g, eps=ctx.eps)
        return by_x, by_weight, by_bias, None, None, None, None
