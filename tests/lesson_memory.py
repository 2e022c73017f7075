"""A plugin of pytest for `make lessons`: prints the most memory that each lesson took, and holds it to 1.5 GB."""

from pathlib import Path

import psutil
import pytest

LIMIT = 1.5e9  # bytes; what Binder gives, and what the course promises
PEAKS: dict[str, int] = {}


def peak(pid: int) -> int:
    """The most memory that a process took so far, bytes; where the system does not keep that, what it takes now."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        memory = psutil.Process(pid).memory_info()
        return getattr(memory, "peak_wset", memory.rss)  # Windows keeps it, too


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Look at the kernel after each cell."""
    kernel = getattr(item.parent, "kernel", None)  # nbval's
    if kernel is not None and kernel.is_alive():
        name = item.path.stem
        PEAKS[name] = max(PEAKS.get(name, 0), peak(kernel.km.provisioner.pid))


def too_large(peaks: dict[str, int]) -> list[str]:
    return [
        f"{name} took {size / 1e9:.2f} GB, at most {LIMIT / 1e9} GB" for name, size in peaks.items() if size > LIMIT
    ]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    sizes = ", ".join(f"{name[:2]} {size / 1e9:.2f} GB" for name, size in PEAKS.items())
    terminalreporter.write_line(f"memory of the lessons' kernels at their peak: {sizes}")
    for line in too_large(PEAKS):
        terminalreporter.write_line(f"ERROR: {line}", red=True)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if too_large(PEAKS):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
