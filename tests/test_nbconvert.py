"""Every lesson by `jupyter nbconvert --execute`, as somebody runs it who wants a page or a PDF of it."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parent.parent
LESSONS = sorted((ROOT / "notebooks").glob("*.ipynb"))

pytestmark = pytest.mark.slow


def execute(lesson: Path, folder: Path) -> subprocess.CompletedProcess:
    """Run a lesson with a small budget and folders of its own; the executed notebook is written to `folder`."""
    shutil.copytree(ROOT / "results", folder / lesson.stem / "results")
    own = {f"CNN_{name.upper()}_DIR": str(folder / lesson.stem / name) for name in ("results", "figures", "cache")}
    command = [sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute", "--output-dir", str(folder)]
    environment = os.environ | own | {"CNN_BUDGET": "small", "OMP_WAIT_POLICY": "passive"}
    timeout = ["--ExecutePreprocessor.timeout=300"]
    return subprocess.run([*command, *timeout, str(lesson)], env=environment, capture_output=True, text=True)


def test_every_lesson_runs_to_its_end(tmp_path):
    """Two at a time, as a lesson mostly calculates on one core; but what measures time runs alone."""
    timed = [lesson for lesson in LESSONS if "speeds_here" in lesson.read_text(encoding="utf-8")]
    together = [lesson for lesson in LESSONS if lesson not in timed]
    with ThreadPoolExecutor(2) as pool:
        runs = dict(zip(together, pool.map(lambda lesson: execute(lesson, tmp_path), together), strict=True))
    runs |= {lesson: execute(lesson, tmp_path) for lesson in timed}
    failed = {lesson.stem: run.stderr[-600:] for lesson, run in runs.items() if run.returncode}
    assert not failed, "\n\n".join(f"{name}: {said}" for name, said in failed.items())
    for lesson in LESSONS:
        executed = nbformat.read(tmp_path / lesson.name, as_version=4)
        counts = [cell.execution_count for cell in executed.cells if cell.cell_type == "code"]
        assert counts == list(range(1, len(counts) + 1))
