"""Two processes that share a run compute what one computes, and a lost one ends the run with a message."""

import itertools
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from utils import checkpoint, data, files, parallel, record, train
from utils.model import CNN, CNNConfig

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
not_on_windows = pytest.mark.skipif(os.name == "nt", reason="torchrun's workers cannot be signalled on Windows")
RECIPE = train.Recipe(epochs=20, batch_size=128, lr=0.05, clip=1.0, ema=0.9)  # 128 images: an epoch is one step


def start(*command: object, **options: object) -> subprocess.Popen:
    """Start `command` with two processes on CPUs."""
    environment = os.environ | {"PYTHONPATH": str(files.ROOT), "OMP_NUM_THREADS": "1", "CNN_DEVICE": "cpu"}
    environment |= {"GLOO_SOCKET_IFNAME": "lo0"} if sys.platform == "darwin" else {}
    arguments = [*TORCHRUN, *map(str, command)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(arguments, env=environment, cwd=files.ROOT, **pipes, **options)


def finish(process: subprocess.Popen, seconds: float = 120) -> str:
    """Return what `process` printed, which must end well."""
    try:
        printed = process.communicate(timeout=seconds)[0]
    finally:
        for child in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else ():
            child.kill()
        process.kill()
    assert process.returncode == 0, printed
    return printed


def twenty_steps() -> tuple[CNN, train.History]:
    """Train a small network for 20 steps in fp32; each history row "train loss" is the loss of one step.

    Its activation and pooling are smooth: with ReLU and max pooling, one value that rounds to the other side of zero
    can move a gradient by a percent, and in 20 steps differences in rounding grow to some 1e-3 in the loss.
    """
    images = data.load().take(128)
    images = replace(images, validation=images.validation[torch.arange(0, 5000, 25)])
    torch.manual_seed(RECIPE.seed)
    model = CNN(CNNConfig(width=4, activation="silu", pool="average"))
    return model, train.fit(model, images, RECIPE, device="cpu", precision="fp32", progress=False)


def column(history: train.History, split: str, metric: str) -> torch.Tensor:
    rows = history[(history["split"] == split) & (history["metric"] == metric)]
    return torch.tensor(rows["value"].to_numpy())


def check_moments_and_gradients() -> None:
    """The synchronized batch norm on half of a batch against `nn.BatchNorm2d` on all of it, in float64."""
    torch.manual_seed(0)
    images, direction = torch.randn(2, 8, 3, 5, 5, dtype=torch.float64) * 3 + 100
    for momentum in (0.1, None):
        plain = nn.BatchNorm2d(3, momentum=momentum).double()
        nn.init.normal_(plain.weight)
        ours = parallel.SyncBatchNorm2d.of(nn.BatchNorm2d(3, momentum=momentum).double())
        ours.load_state_dict(plain.state_dict())
        half = slice(4 * parallel.rank(), 4 * parallel.rank() + 4)
        whole, part = images.clone().requires_grad_(), images[half].clone().requires_grad_()
        for _ in range(2):
            expected, found = plain(whole), ours(part)
        torch.testing.assert_close(found, expected[half])
        (expected * direction).sum().backward()
        (found * direction[half]).sum().backward()
        torch.testing.assert_close(part.grad, whole.grad[half])
        torch.testing.assert_close(parallel.all_sum(ours.weight.grad), plain.weight.grad)
        torch.testing.assert_close(parallel.all_sum(ours.bias.grad), plain.bias.grad)
        for name, value in plain.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[name], value)
        torch.testing.assert_close(ours.eval()(part), plain.eval()(whole)[half])


def check_bf16() -> None:
    """The same in bf16 on weights in fp32, as under autocast: to its rounding."""
    torch.manual_seed(0)
    images, direction = (torch.randn(8, 3, 5, 5).bfloat16().to(memory_format=torch.channels_last) for _ in "ab")
    half = slice(4 * parallel.rank(), 4 * parallel.rank() + 4)
    plain, ours = nn.BatchNorm2d(3), parallel.SyncBatchNorm2d.of(nn.BatchNorm2d(3))
    whole, part = images.clone().requires_grad_(), images[half].clone().requires_grad_()
    expected, found = plain(whole), ours(part)
    assert found.dtype == torch.bfloat16
    (expected * direction).sum().backward()
    (found * direction[half]).sum().backward()
    torch.testing.assert_close(found, expected[half])
    torch.testing.assert_close(part.grad, whole.grad[half], rtol=0.02, atol=0.02)
    torch.testing.assert_close(ours.running_var, plain.running_var, rtol=1e-3, atol=1e-5)


def check_gradients_of_the_default_network() -> None:
    """With ReLU and max pooling, in float64, where rounding does not matter: two processes against one."""
    images = data.load().take(64)
    stats = data.channel_stats(images.train.images)
    gradients = []
    for share in ((0, 1), (parallel.rank(), 2)):
        torch.manual_seed(0)
        model = network = CNN(CNNConfig(width=4)).double()
        if share[1] == 2:
            parallel.synchronize_batch_norm(model)
            network = parallel.wrap(model)
        (batch,) = data.Batches(images.train, stats, 64, shuffle=True, dtype=torch.float64, share=share)
        F.cross_entropy(network(batch[0]), batch[1]).backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-9, atol=1e-12)


def check_a_first_layer_that_stops_learning() -> None:
    """The record's biases, to which no gradient comes after two of eight steps; the processes go on together."""
    images = data.load().take(200)
    images = replace(images, validation=images.validation[:100])
    recipe = replace(record.RECIPE, epochs=4, batch_size=100)
    torch.manual_seed(0)
    network = record.network(images, record.RecordConfig(widths=(8, 16), bias_share=0.25, small=0), recipe)
    biases = [network.whiten.bias.detach().clone()]
    keep = lambda _: biases.append(network.whiten.bias.detach().clone())  # noqa: E731
    options = {"device": "cpu", "precision": "fp32", "optimizer": record.optimizer, "on_epoch": keep}
    train.fit(network, images, recipe, progress=False, **options)
    assert [torch.equal(*pair) for pair in itertools.pairwise(biases)] == [False, True, True, True]
    for weight in network.parameters():
        torch.testing.assert_close(parallel.all_sum(weight.detach()), 2 * weight.detach())


def worker(out: str) -> None:
    """What each of the two processes of the tests does."""
    torch.set_num_threads(1)
    with parallel.join(torch.device("cpu")):
        check_moments_and_gradients()
        check_gradients_of_the_default_network()
        check_bf16()
        check_a_first_layer_that_stops_learning()
        assert parallel.from_first(f"rank {parallel.rank()} ä " + "x" * parallel.rank()) == "rank 0 ä "
        model, history = twenty_steps()
        if parallel.is_first():
            checkpoint.write(Path(out), {"weights": model.state_dict(), "history": history.to_numpy().tolist()})


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    """Weights and history of `twenty_steps` by two processes."""
    out = tmp_path_factory.mktemp("parallel") / "result"
    finish(start("-m", "tests.test_parallel", out))
    found = checkpoint.read(out)
    return found["weights"], train.History(found["history"], columns=train.History.COLUMNS)


@not_on_windows
def test_two_processes_train_as_one(of_two):
    """The loss of each of 20 steps to 1e-4; then the weights and batch norm's statistics, and the validation."""
    weights, history = of_two
    model, alone = twenty_steps()
    losses = column(alone, "train", "loss")
    assert len(losses) == 20
    assert losses[-1] < 0.9 * losses[0]
    torch.testing.assert_close(column(history, "train", "loss"), losses, rtol=0, atol=1e-4)
    assert torch.equal(column(history, "train", "accuracy"), column(alone, "train", "accuracy"))
    torch.testing.assert_close(
        column(history, "validation", "loss"), column(alone, "validation", "loss"), rtol=0, atol=1e-3
    )
    for name, value in model.state_dict().items():
        torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-3)


FAST = ["--images", "640", "--batch-size", "128", "--width", "4", "--precision", "fp32", "--no-test"]


@not_on_windows
def test_a_killed_worker_ends_the_run_and_resume_goes_on(tmp_path, monkeypatch):
    """The message comes within a minute; the resumed run ends with the very weights of one that nothing disturbed."""
    dropout = ["--dropout", 0.1, "--dropout-where", "head"]
    printed = finish(start("cnn.py", *FAST, "--epochs", 8, *dropout, "--out", tmp_path / "a"))
    assert "threads, 2 processes" in printed
    assert printed.count("validation accuracy") == 1  # one process talks

    run = start("cnn.py", *FAST, "--epochs", 8, *dropout, "--out", tmp_path / "b")
    state = tmp_path / "b" / checkpoint.STATE_FILE
    deadline = time.monotonic() + 60
    while not state.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    workers = [child for child in psutil.Process(run.pid).children() if "cnn.py" in " ".join(child.cmdline())]
    assert len(workers) == 2
    second = next(child for child in workers if child.environ()["RANK"] == "1")
    begin = time.monotonic()
    second.send_signal(signal.SIGKILL)
    printed = run.communicate(timeout=90)[0]
    assert run.returncode != 0
    assert time.monotonic() - begin < 60
    message = re.search(r"error: another process of this run has ended.*Go on with: (.*)", printed)
    assert message, printed
    assert message.group(1).startswith("torchrun --standalone --nproc-per-node 2 cnn.py --resume --out")
    assert not (tmp_path / "b" / "history.csv").exists()

    finish(start("cnn.py", "--resume", "--no-test", "--out", tmp_path / "b"))
    weights = [checkpoint.read(tmp_path / run / checkpoint.MODEL_FILE)["weights"] for run in "ab"]
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


@not_on_windows
def test_wrong_input_that_one_process_finds_is_all_that_is_said(tmp_path):
    """Of data that are missing, and of a folder that another process trains in."""
    with files.claimed(tmp_path):
        for arguments, words in (
            (["--data", "/nonexistent"], "no data set and no folder is called '/nonexistent'"),
            ([*FAST, "--out", tmp_path], "is being trained by another process"),
        ):
            run = start("cnn.py", *arguments)
            printed = run.communicate(timeout=120)[0]
            assert run.returncode != 0
            assert len(re.findall("error: .*", printed)) == 1, printed
            assert words in printed


@not_on_windows
def test_processes_diverge_together():
    """One of them says at which step, and none that another one was lost."""
    run = start("cnn.py", *FAST, "--epochs", 2, "--lr", 1e6, "--norm", "none")
    printed = run.communicate(timeout=120)[0]
    assert run.returncode != 0
    assert len(re.findall(r"error: the loss became (nan|inf) at step \d+", printed)) == 1, printed
    assert "Go on with" not in printed


def test_a_batch_that_cannot_be_shared_is_refused():
    images = data.load().take(100)
    stats = data.channel_stats(images.train.images)
    with pytest.raises(ValueError, match="batch_size is 25: expected a multiple of 2, the number of processes"):
        data.Batches(images.train, stats, 25, shuffle=True, share=(0, 2))


def test_shares_are_parts_of_the_same_batches():
    images = data.load().take(100)
    stats = data.channel_stats(images.train.images)
    options = {"shuffle": True, "crop_padding": 2, "flip": True, "seed": 3}
    whole = list(data.Batches(images.train, stats, 20, **options))
    shares = [list(data.Batches(images.train, stats, 20, **options, share=(i, 2))) for i in range(2)]
    for batch, *parts in zip(whole, *shares, strict=True):
        for i, part in enumerate(parts):
            assert torch.equal(part[0], batch[0][i::2])
            assert torch.equal(part[1], batch[1][i::2])


def test_without_torchrun_nothing_changes():
    model = CNN(CNNConfig(width=4))
    with parallel.join(torch.device("mps")):  # not even a device is looked at
        assert (parallel.rank(), parallel.size(), parallel.is_first()) == (0, 1, True)
        assert parallel.wrap(model) is model
        parallel.synchronize_batch_norm(model)
        assert not any(isinstance(module, parallel.SyncBatchNorm2d) for module in model.modules())
        total = torch.ones(2)
        assert parallel.all_sum(total) is total
        assert parallel.gather(total) == [total]


def test_batch_norms_that_processes_cannot_share_are_refused(monkeypatch):
    monkeypatch.setattr(parallel, "size", lambda: 2)
    shared = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2))
    parallel.synchronize_batch_norm(shared)
    assert isinstance(shared[1], parallel.SyncBatchNorm2d)
    parallel.synchronize_batch_norm(shared)  # trained again
    with pytest.raises(ValueError, match="BatchNorm1d: on CPUs only a BatchNorm2d with .* use one process"):
        parallel.synchronize_batch_norm(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)))
    with pytest.raises(ValueError, match="BatchNorm2d: on CPUs only"):
        parallel.synchronize_batch_norm(
            torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2, affine=False))
        )


@pytest.mark.parametrize(("rank", "expected"), [("0", ["block", "wait", "wait"]), ("1", ["wait", "block", "wait"])])
def test_nobody_goes_on_before_all_have_had_their_turn(monkeypatch, rank, expected):
    """In the group that waits for hours; what follows waits for a minute only."""
    did = []
    monkeypatch.setattr(parallel, "size", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setattr(parallel.dist, "new_group", lambda **options: options["timeout"].total_seconds())
    monkeypatch.setattr(parallel.dist, "barrier", lambda patience: did.append("wait" if patience > 3600 else "?"))
    with parallel.in_turn():
        did.append("block")
    assert did == expected


def test_a_device_that_cannot_work_with_others_is_refused(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    refused = pytest.raises(ValueError, match="cannot share a run on 'mps': choose --device cpu or cuda")
    with refused, parallel.join(torch.device("mps")):
        pass


def test_only_losses_of_a_partner_are_reported_as_such(monkeypatch):
    """An error of our own stays what it is; SIGTERM, which torchrun sends the others, is a lost partner."""
    monkeypatch.setattr(parallel, "launched", lambda: True)
    monkeypatch.setattr(parallel.dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(parallel.dist, "destroy_process_group", lambda: None)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError, match="shapes differ") as raised, parallel.join(torch.device("cpu")):
        raise RuntimeError("shapes differ")
    assert not isinstance(raised.value, parallel.WorkerLost)
    with (
        pytest.raises(parallel.WorkerLost, match=r"ended \(\[gloo/.*closed by peer\)"),
        parallel.join(torch.device("cpu")),
    ):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer")
    with pytest.raises(parallel.WorkerLost), parallel.join(torch.device("cpu")):
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


if __name__ == "__main__":
    worker(sys.argv[1])
