"""The common first cell of the lessons, run in folders that look like a clone, like Colab, and like a mistake."""

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from test_notebooks import common_first_cell


@pytest.fixture
def path(monkeypatch) -> list[str]:
    """A module search path of its own, without any `utils` in it or imported."""
    monkeypatch.delitem(sys.modules, "utils", raising=False)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if not (Path(entry or ".") / "utils").exists()])
    return sys.path


@pytest.fixture
def ran(monkeypatch) -> list[list[str]]:
    """The commands that the cell gives, none of which runs: a clone appears as a folder with some requirements."""
    commands = []

    def run(command, check):
        commands.append(command)
        if command[0] == "git":
            course(Path(command[-1]))

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def course(root: Path) -> Path:
    (root / "utils").mkdir(parents=True)
    (root / "utils" / "__init__.py").touch()
    (root / "notebooks").mkdir()
    (root / "requirements.txt").write_text(
        "# a list\ntorch>=99\nnumpy>=99\nmatplotlib>=3\nno-such-package>=1  # none\ntorchmetrics-of-none\nnbval\n",
        encoding="utf-8",
    )
    return root


def run_cell() -> None:
    exec(common_first_cell(), {})


@pytest.mark.parametrize("below", [".", "notebooks", "notebooks/src"])
def test_it_finds_the_course_above(tmp_path, monkeypatch, path, ran, below):
    root = course(tmp_path / "a course")
    (root / below).mkdir(exist_ok=True)
    monkeypatch.chdir(root / below)
    run_cell()
    run_cell()
    assert path[0] == str(root)
    assert ran == []


def test_on_colab_it_fetches_the_course_once_and_installs_what_is_missing(tmp_path, monkeypatch, path, ran):
    monkeypatch.setitem(sys.modules, "google.colab", ModuleType("google.colab"))
    monkeypatch.chdir(tmp_path)
    run_cell()
    run_cell()
    assert path[0] == str(tmp_path / "cnn-course")
    assert [command[:2] for command in ran if "pip" not in command] == [["git", "clone"]]
    assert {tuple(command[4:]) for command in ran if "pip" in command} == {
        ("--quiet", "no-such-package", "torchmetrics-of-none")
    }


def test_it_says_when_there_is_no_course(tmp_path, monkeypatch, path, ran):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ImportError, match="open the course's notebooks folder"):
        run_cell()
    assert ran == []


def test_it_says_when_another_utils_stands_in_the_way(tmp_path, monkeypatch, path):
    other = ModuleType("utils")
    other.__spec__ = type("Spec", (), {"origin": "elsewhere/utils.py"})
    monkeypatch.setitem(sys.modules, "utils", other)
    monkeypatch.chdir(course(tmp_path / "course") / "notebooks")
    with pytest.raises(ImportError, match="restart the kernel"):
        run_cell()
