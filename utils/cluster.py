"""A sweep's runs on several machines: `python cnn.py ablate NAME --scheduler tcp://…` hands them to Dask's workers."""

import contextlib
from collections.abc import Iterator

import joblib

WAIT_SECONDS = 10.0


class NoCluster(ConnectionError):
    """A scheduler that does not answer, or has no workers; the message says how to start them."""


@contextlib.contextmanager
def connected(scheduler: str, seconds: float | None = None) -> Iterator[str]:
    """Let joblib hand its work to the Dask workers of `scheduler` (tcp://host:port) while the block runs.

    Yields its address and the number of workers, in words. Raises NoCluster when nothing answers within `seconds`
    (None: WAIT_SECONDS), or no worker is there; ModuleNotFoundError without Dask's package distributed.
    """
    seconds = WAIT_SECONDS if seconds is None else seconds
    try:
        from distributed import Client
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "a sweep on several machines needs distributed: pip install -r requirements-cluster.txt -c constraints.txt"
        ) from error
    remedy = (
        "start it and workers, each in the course's folder: python -m dask scheduler --host HOST, "
        f"and: python -m dask worker {scheduler} --nthreads 1"
    )
    try:
        client = Client(scheduler, timeout=seconds, set_as_default=True)
    except (OSError, ValueError) as error:
        raise NoCluster(f"no scheduler answers at {scheduler!r} within {seconds:g} s; {remedy}") from error
    with client:
        workers = len(client.scheduler_info(n_workers=-1)["workers"])
        if not workers:
            raise NoCluster(f"the scheduler at {scheduler} has no workers; {remedy}")
        with joblib.parallel_config(backend="dask", wait_for_workers_timeout=seconds):
            yield f"{scheduler}, {workers} workers"
