"""A sweep's runs on several machines: `python cnn.py ablate NAME --scheduler tcp://…` hands them to Dask's workers.

Whoever reaches a scheduler, or a worker, can run code on it. So tcp:// is for one machine; between machines it is tls://,
where each side shows the certificate that only the cluster's machines have.
"""

import contextlib
import ipaddress
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import joblib

WAIT_SECONDS = 10.0
HERE = "--host 127.0.0.1 --dashboard-address 127.0.0.1:0"  # by default workers, and every dashboard, are open to all
CERTIFICATE, KEY = "cluster.pem", "cluster.key"  # in the working directory, as the README makes them
TLS = f"--tls-ca-file {CERTIFICATE} --tls-cert {CERTIFICATE} --tls-key {KEY} --dashboard-address 127.0.0.1:0"


class NoCluster(ConnectionError):
    """A scheduler that does not answer, or has no workers; the message says how to start them."""


@contextlib.contextmanager
def connected(scheduler: str, seconds: float | None = None) -> Iterator[str]:
    """Let joblib hand its work to the Dask workers of `scheduler` (tcp://host:port, tls://…) while the block runs.

    Yields its address and the number of workers, in words. Warns of tcp:// across a network. Raises NoCluster when
    nothing answers within `seconds` (None: WAIT_SECONDS), or no worker is there; FileNotFoundError for tls:// without
    certificate or key; ModuleNotFoundError without Dask's package distributed.
    """
    seconds = WAIT_SECONDS if seconds is None else seconds
    scheduler = scheduler if "://" in scheduler else f"tcp://{scheduler}"  # as Dask takes it
    try:
        from distributed import Client
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "a sweep on several machines needs distributed: pip install -r requirements-cluster.txt -c constraints.txt"
        ) from error
    remedy = f"start it and workers, each in the course's folder: {start_of(scheduler)} (README: On several machines)"
    warn_of_the_open(scheduler)
    shown = security(scheduler)
    try:
        client = Client(scheduler, timeout=seconds, set_as_default=True, security=shown)
    except (OSError, ValueError) as error:
        raise NoCluster(f"no scheduler answers at {scheduler!r} within {seconds:g} s; {remedy}") from error
    with client:
        workers = len(client.scheduler_info(n_workers=-1)["workers"])
        if not workers:
            raise NoCluster(f"the scheduler at {scheduler} has no workers; {remedy}")
        with joblib.parallel_config(backend="dask", wait_for_workers_timeout=seconds):
            yield f"{scheduler}, {workers} workers"


def start_of(scheduler: str) -> str:
    """Return the commands that start a scheduler at this address, and a worker of it."""
    place = urlsplit(scheduler)
    between = place.scheme == "tls"  # machines
    at_scheduler, at_worker = (f"--host tls://{place.hostname} {TLS}", TLS) if between else (HERE, HERE)
    return f"python -m dask scheduler {at_scheduler}, and: python -m dask worker {scheduler} --nthreads 1 {at_worker}"


def warn_of_the_open(scheduler: str) -> None:
    """Warn when `scheduler` is reached without TLS at another address than this machine's own."""
    host = urlsplit(scheduler).hostname or ""
    if scheduler.startswith(("tls://", "wss://")) or host == "localhost":
        return
    with contextlib.suppress(ValueError):  # a name
        if ipaddress.ip_address(host).is_loopback:
            return
    warnings.warn(
        f"{scheduler} has neither password nor encryption: whoever reaches it can run code on its workers; "
        "use tls:// (README, On several machines)",
        stacklevel=4,
    )


def security(scheduler: str) -> Any:
    """Return what a client shows to a scheduler at tls://…: CERTIFICATE and KEY; None for other addresses."""
    from distributed import Security

    if not scheduler.startswith("tls://"):
        return None
    for name in (CERTIFICATE, KEY):
        if not Path(name).is_file():
            raise FileNotFoundError(f"{scheduler} needs the file {name} in {Path.cwd()}: copy it from the scheduler's")
    return Security(tls_ca_file=CERTIFICATE, tls_client_cert=CERTIFICATE, tls_client_key=KEY, require_encryption=True)
