"""A sweep on a real Dask cluster: a scheduler and two worker processes, started as the README says."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pandas as pd
import psutil
import pytest

from utils import ablation, cluster, files, train
from utils.model import CNNConfig

pytest.importorskip("distributed")

OPTIONS = {"source": ablation.Source(images=256), "device": "cpu", "precision": "fp32", "progress": False}
RECIPE = train.Recipe(epochs=2, batch_size=128, lr=0.1)


def start(*words: str) -> subprocess.Popen:
    """`python -m dask WORDS` in the course's folder."""
    words = (sys.executable, "-m", "dask", *words, "--no-dashboard")
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(words, cwd=files.ROOT, **quiet)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture
def scheduler() -> Iterator[tuple[str, list[subprocess.Popen]]]:
    """The address of a scheduler, and its two workers."""
    port = free_port()
    address = f"tcp://127.0.0.1:{port}"
    server = start("scheduler", "--host", "127.0.0.1", "--port", str(port))
    workers = [start("worker", address, "--nthreads", "1", "--host", "127.0.0.1") for _ in range(2)]
    yield address, workers
    for process in [*workers, server]:
        for child in [*psutil.Process(process.pid).children(recursive=True), process]:
            child.kill()
        process.wait()


def wait_for_workers(address: str, count: int, seconds: float = 60) -> None:
    from distributed import Client

    with Client(address, timeout=seconds, set_as_default=False) as client:
        client.wait_for_workers(count, timeout=seconds)


def sweep(seeds: range, **options) -> pd.DataFrame:
    vary = {"norm": ["batch", "none"]}
    return ablation.run("norms", CNNConfig(width=4), vary, RECIPE, seeds, **OPTIONS | options)


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL on Windows")
def test_a_cluster_gives_the_same_bits_though_a_worker_is_killed(scheduler, tmp_path, monkeypatch):
    monkeypatch.setenv("CNN_CACHE_DIR", str(tmp_path))
    address, workers = scheduler
    wait_for_workers(address, 2)
    killed = []
    keep = ablation.keep

    def keep_and_kill(*arguments):
        """After the third run, with others in flight, kill -9 a worker process and the nanny that minds it."""
        keep(*arguments)
        if len(list(ablation.folder().glob("[!.]*"))) == 3:
            for process in [psutil.Process(workers[0].pid), *psutil.Process(workers[0].pid).children(recursive=True)]:
                process.send_signal(signal.SIGKILL)
                killed.append(process.pid)

    monkeypatch.setattr(ablation, "keep", keep_and_kill)
    with cluster.connected(address) as where:
        assert where == f"{address}, 2 workers"
        on_cluster = sweep(range(6), refresh=True)
    assert len(killed) >= 2
    monkeypatch.setattr(ablation, "keep", keep)
    here = sweep(range(6), jobs=1, refresh=True)
    assert on_cluster.drop(columns="seconds").equals(here.drop(columns="seconds"))


def test_a_scheduler_that_does_not_answer_is_named():
    address, begin = f"tcp://127.0.0.1:{free_port()}", time.monotonic()
    message = f"no scheduler answers at '{address}' within 1 s; start it"
    with pytest.raises(cluster.NoCluster, match=message), cluster.connected(address, 1):
        pass
    assert time.monotonic() - begin < 30
    with (
        pytest.raises(cluster.NoCluster, match="no scheduler answers at 'nonsense"),
        cluster.connected("nonsense://", 1),
    ):
        pass


def test_a_scheduler_without_workers_is_told():
    port = free_port()
    server = start("scheduler", "--host", "127.0.0.1", "--port", str(port))
    try:
        message = f"the scheduler at tcp://127.0.0.1:{port} has no workers; start it and workers"
        with pytest.raises(cluster.NoCluster, match=message), cluster.connected(f"tcp://127.0.0.1:{port}", 30):
            pass
    finally:
        server.kill()
        server.wait()
