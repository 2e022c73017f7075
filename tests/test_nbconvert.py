"""Every lesson under `jupyter nbconvert --execute`, as on a server without a browser."""

import subprocess
import sys

import browser
import nbformat
import pytest

LESSONS = sorted(path.stem for path in (browser.ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.thorough
@pytest.mark.parametrize("name", LESSONS)
def test_nbconvert_executes_the_lesson(name, tmp_path):
    """Within the small budget; what it writes stays in a temporary folder."""
    command = [sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute", "--ExecutePreprocessor.timeout=300"]
    done = subprocess.run(
        [*command, f"--output-dir={tmp_path}", str(browser.ROOT / "notebooks" / f"{name}.ipynb")],
        env=browser.environment(tmp_path),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    code = [cell for cell in nbformat.read(tmp_path / f"{name}.ipynb", 4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
