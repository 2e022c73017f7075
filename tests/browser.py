"""JupyterLab in headless Chromium, for tests/test_browser.py: a server, and a lesson that is opened and run in it."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
PATIENCE = 300  # seconds that a cell, or anything else, may take: machines that test are busy
TALLEST = 16_000  # pixels of a picture; Chromium draws none above 16,384
SETTINGS = {
    "@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False},
    "@jupyterlab/docmanager-extension:plugin": {"autosave": False},
    "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"},  # otherwise cells out of view are not drawn
}


def what_is_missing() -> str | None:
    """Return what keeps the lessons from being tested in a browser, and what to do; None if they can be."""
    if sys.platform == "win32":
        return "they are not tested on Windows"
    if find_spec("playwright") is None:
        return "playwright is not installed. Install it: pip install -r requirements-dev.txt -c constraints.txt"
    if CHROMIUM is None:
        return "no Chromium was found. Install it (Debian, Ubuntu: apt install chromium; elsewhere: Chrome on the PATH)"
    return None


def wait_until(true, what: str, seconds: float = PATIENCE) -> None:
    """Return when `true()` is, and raise TimeoutError that says `what` was waited for when it is not in time."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {seconds:.0f} s in vain: {what}")
        time.sleep(0.1)


# ---------------------------------------------------------------------------------------------------- the server


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def environment(folder: Path) -> dict[str, str]:
    """Return the environment of a server whose every trace, and that of its kernels, stays in `folder`."""
    for name in ("config/labconfig", "data", "runtime", "checkpoints", "cache", "figures"):
        (folder / name).mkdir(parents=True)
    (folder / "config/labconfig/default_setting_overrides.json").write_text(json.dumps(SETTINGS), encoding="utf-8")
    shutil.copytree(ROOT / "results", folder / "results")
    jupyter = {f"JUPYTER_{name.upper()}_DIR": str(folder / name) for name in ("config", "data", "runtime")}
    course = {f"CNN_{name.upper()}_DIR": str(folder / name) for name in ("results", "figures", "cache")}
    small = {"CNN_BUDGET": "small", "CNN_DEVICE": "cpu", "OMP_WAIT_POLICY": "passive"}
    return {**os.environ, **jupyter, **course, **small}


@contextmanager
def jupyterlab(folder: Path) -> Iterator[str]:
    """Run JupyterLab on the repository, and yield the address of a notebook in it, with {} for its path."""
    port, token = free_port(), secrets.token_hex(16)
    options = [f"--port={port}", f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={ROOT}"]
    options += [f"--FileCheckpoints.checkpoint_dir={folder / 'checkpoints'}", "--LabApp.expose_app_in_browser=True"]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1"]
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(
            [*command, "--ServerApp.port_retries=0", *options], env=environment(folder), stdout=log, stderr=log
        )
        try:
            wait_until(lambda: answers(port) or server.poll() is not None, "JupyterLab to start")
            assert server.poll() is None, (folder / "server.log").read_text()
            yield f"http://127.0.0.1:{port}/lab/tree/{{}}?reset&token={token}"
        finally:
            server.terminate()  # it ends its kernels
            server.wait(60)


@contextmanager
def chromium() -> Iterator[Any]:
    """Run a headless Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        yield browser
        browser.close()
