"""What holds for every test: it writes neither into the user's cache nor into the repository, and opens no window."""

import os
import statistics
import time
from collections.abc import Iterator

import browser
import pytest
import torch
from hypothesis import settings

os.environ.setdefault("CNN_DEVICE", "cpu")  # the tests are of the code, not of the accelerator at hand
os.environ["MPLBACKEND"] = "Agg"  # before anything imports matplotlib

# The same inputs at every run, however slow the machine is just then.
settings.register_profile("course", deadline=None, derandomize=True)
settings.load_profile("course")


# Two threads that wait for each other on busy cores are far slower than one, and one gives the same bits every time.
torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def own_folders(tmp_path_factory):
    """Points the folders that `utils.files` hands out at temporary ones."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("CNN_CACHE_DIR", "CNN_RESULTS_DIR", "CNN_FIGURES_DIR"):
            patch.setenv(name, str(tmp_path_factory.mktemp(name.lower())))
        yield


def pytest_runtest_setup() -> None:
    """Leaves out what has not begun at the time TESTS_UNTIL (seconds since 1970), where that is set."""
    if time.time() > float(os.environ.get("TESTS_UNTIL") or "inf"):
        pytest.skip("left out: it is later than TESTS_UNTIL")


@pytest.hookimpl(wrapper=True, tryfirst=True)  # the outermost: what it writes stands below all else
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Iterator[None]:
    """Says how fast the lessons answered in a browser, or that they were left out, and how much bad input was tried."""
    yield
    for name, seconds in browser.LATENCIES.items():
        words = f"median {statistics.median(seconds):.2f} s, slowest {max(seconds):.2f} s, n = {len(seconds)}"
        terminalreporter.write_line(f"{name}: from a key to the new picture {words}")
    reports = [report for found in terminalreporter.stats.values() for report in found]
    tried = [value for report in reports if getattr(report, "when", "") == "teardown"
             for name, value in report.user_properties if name == "bad input"]  # fmt: skip
    if tried:
        accepted, refused = (sum(counts.get(kind, 0) for counts in tried) for kind in ("accepted", "refused"))
        words = f"{refused:,} refused by a message that names them, {accepted:,} accepted and checked"
        terminalreporter.write_line(f"Bad input: {accepted + refused:,} cases, {words}")
    if browser.MISSING and any("test_browser.py" in getattr(report, "nodeid", "") for report in reports):
        left_out = f"Left out: the lessons in a real browser (tests/test_browser.py), and the site: {browser.MISSING}"
        terminalreporter.write_line(left_out, yellow=True)
