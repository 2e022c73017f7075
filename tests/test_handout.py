"""What a teacher hands out: the lessons without solutions and outputs, which still run from top to bottom."""

import ast
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest

from utils import lessons

ROOT = Path(__file__).parent.parent
TWINS = sorted((ROOT / "notebooks" / "src").glob("*.py"))


def bound(code: str) -> set[str]:
    """The names that a cell's code defines at its top level or below, functions' own ones too."""
    nodes = list(ast.walk(ast.parse(code)))
    names = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    names |= {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    return names | {a.asname or a.name for n in nodes if isinstance(n, ast.Import | ast.ImportFrom) for a in n.names}


def used(code: str) -> set[str]:
    """The names that a cell's code reads."""
    return {
        node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    }


def missing_without_solutions(cells: list[tuple[str, bool]]) -> set[str]:
    """The names that cells (code, whether a solution) take from solutions only."""
    known, solved, missing = set(), set(), set()
    for code, is_solution in cells:
        if is_solution:
            solved |= bound(code) - known
        else:
            missing |= (used(code) - bound(code) - known) & solved
            known |= bound(code)
    return missing


def test_a_name_from_a_solution_is_found():
    assert missing_without_solutions([("a = 1", False), ("b = a", True), ("a + b", False)]) == {"b"}
    assert missing_without_solutions([("a = 1", False), ("a = 2", True), ("a", False)]) == set()
    assert missing_without_solutions([("import os", True), ("os.getcwd()", False)]) == {"os"}


@pytest.mark.parametrize("twin", TWINS, ids=lambda path: path.stem)
def test_lesson_runs_without_its_solutions(twin):
    cells = [cell for cell in jupytext.read(twin).cells if cell.cell_type == "code"]
    assert (
        missing_without_solutions([(cell.source, "solution" in cell.metadata.get("tags", [])) for cell in cells])
        == set()
    )


@pytest.mark.parametrize("twin", TWINS, ids=lambda path: path.stem)
def test_no_text_points_to_a_solution_that_a_handout_lacks(twin):
    for cell in jupytext.read(twin).cells:
        if cell.cell_type == "markdown" and "solution" not in cell.metadata.get("tags", []):
            assert not re.search(r"(?i)\*\*solution|unfold|folded up|solution (is )?below", cell.source), cell.source


@pytest.mark.skipif(shutil.which("make") is None, reason="the handout: make is not installed")
def test_handout_is_the_course_without_solutions_and_outputs(tmp_path):
    commands = ["make", "-n", "handout", "LESSON=00_start_here"]
    lines = subprocess.run(commands, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    begin = lines.index("rm -rf handout && mkdir -p handout/notebooks")  # before it, .venv is set up
    script = re.sub(r"\bhandout\b", shlex.quote(str(tmp_path / "handout")), "\n".join(["set -e", *lines[begin:]]))
    subprocess.run(["sh", "-c", script], cwd=ROOT, check=True, capture_output=True)
    for name in (".gitattributes", ".gitignore"):  # or git on Windows changes line ends, and with them checksums
        assert (tmp_path / "handout" / name).exists()
    lesson = Path("notebooks", "00_start_here.ipynb")
    whole, handed = (nbformat.read(root / lesson, as_version=4) for root in (ROOT, tmp_path / "handout"))
    solutions = [cell for cell in whole.cells if "solution" in cell.metadata.get("tags", [])]
    assert len(solutions) > 0
    assert len(handed.cells) == len(whole.cells) - len(solutions)
    assert all(cell.outputs == [] and cell.execution_count is None for cell in handed.cells if cell.cell_type == "code")
    first = next(cell.source for cell in handed.cells if cell.cell_type == "code")
    code = f"{first}\nfrom utils import data\nprint(root, len(data.load().validation))"
    where = tmp_path / "handout" / "notebooks"
    shown = subprocess.run([sys.executable, "-c", code], cwd=where, capture_output=True, text=True, check=False)
    assert shown.stdout.split() == [str(where.parent), "5000"], f"it runs from its own folder: {shown.stderr}"
    for said in (lessons.title, lessons.reading):  # by the notebook: a handout has no text twin
        assert said(lesson.stem, tmp_path / "handout") == said(lesson.stem)
