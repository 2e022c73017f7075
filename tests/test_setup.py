"""The set-up of the Makefile, tried in scratch folders with lists that need no network."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.skipif(not shutil.which("make") or os.name == "nt", reason="needs make and a POSIX shell")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A copy, in a path with spaces, that has been set up once, from empty lists."""
    folder = tmp_path_factory.mktemp("a copy") / "with some spaces"
    folder.mkdir()
    shutil.copy(ROOT / "Makefile", folder)
    for name in ("", "-cluster", "-site", "-dev"):
        (folder / f"requirements{name}.txt").write_text("# nothing\n", encoding="utf-8")
    (folder / "constraints.txt").write_text("# nothing\n", encoding="utf-8")
    first = make(folder, "setup")
    assert first.returncode == 0, first.stderr
    assert first.stdout.splitlines() == ["Setting up .venv from requirements.txt; torch alone is some GB, "
                                         "so the first time takes minutes"]  # fmt: skip
    return folder


@pytest.fixture
def folder(made):
    """The copy, with its lists as they were once the test is over."""
    lists = {path: path.read_text(encoding="utf-8") for path in made.glob("*.txt")}
    yield made
    for path, text in lists.items():
        path.write_text(text, encoding="utf-8")
    make(made, "setup")


def make(folder: Path, *words: str, **env: str) -> subprocess.CompletedProcess:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "PYTHON"))}
    return subprocess.run(["make", *words], cwd=folder, env=clean | env, capture_output=True, text=True)


def stamps(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / ".venv").glob("installed-*.txt"))


def test_it_is_done_once(folder):
    again = make(folder, "setup")
    assert (again.returncode, again.stdout) == (0, "")
    os.utime(folder / "requirements.txt")  # as after a checkout: newer, but the same
    assert make(folder, "setup").stdout == ""


@pytest.mark.parametrize("name", ["requirements.txt", "constraints.txt"])
def test_it_is_repeated_when_a_list_changes(folder, name):
    (folder / name).write_text("# changed\n", encoding="utf-8")
    assert make(folder, "setup").stdout.startswith("Setting up")
    assert make(folder, "setup").stdout == ""


def test_the_tests_need_their_own_list_and_bring_the_other(folder):
    assert make(folder, "setup-dev").stdout.startswith("Setting up .venv from requirements-dev.txt")
    assert stamps(folder) == ["installed-course.txt", "installed-dev.txt", "installed-site.txt"]
    for target in ("setup-dev", "setup", "setup-site"):
        assert make(folder, target).stdout == ""


def test_the_site_needs_its_own_list_only(folder):
    (folder / "requirements-site.txt").write_text("# changed\n", encoding="utf-8")
    assert make(folder, "setup-site").stdout == "Setting up .venv from requirements-site.txt\n"
    assert make(folder, "setup-site").stdout == ""


def test_a_failed_installation_is_not_taken_for_done(folder):
    (folder / "requirements.txt").write_text("./no-such-folder\n", encoding="utf-8")
    for _ in range(2):
        failed = make(folder, "setup")
        assert failed.returncode != 0
        assert "no-such-folder" in failed.stderr
        assert "Set-up failed" in failed.stdout
        assert "installed-course.txt" not in stamps(folder)


def test_an_interrupted_set_up_starts_anew(folder):
    assert not (folder / ".venv.unfinished").exists()
    (folder / ".venv.unfinished").touch()
    (left := folder / ".venv" / "half-written").touch()
    assert make(folder, "setup").stdout.startswith("Setting up")
    assert not left.exists()
    assert make(folder, "setup").stdout == ""


@pytest.mark.parametrize(
    ("says", "python"),
    [("Python 3.11 to 3.14 is needed", "exit 1"), ("lacks its venv module", 'case "$2" in *venv*) exit 1; esac')],
)
def test_a_python_that_will_not_do_is_refused(folder, says, python):
    (folder / "python-stub").write_text(f"#!/bin/sh\n{python}\n", encoding="utf-8")
    (folder / "python-stub").chmod(0o755)
    venv = (folder / ".venv").rename(folder / "elsewhere")
    try:
        refused = make(folder, "setup", "PYTHON=./python-stub")
        assert refused.returncode != 0
        assert says in refused.stdout
        assert "Setting up" not in refused.stdout
        assert not (folder / ".venv").exists()
    finally:
        venv.rename(folder / ".venv")


def test_a_python_that_is_not_there_is_refused(folder):
    shutil.copytree(folder, copy := folder.parent / "no venv", ignore=shutil.ignore_patterns(".venv"))
    refused = make(copy, "setup", "PYTHON=python9")
    assert refused.returncode != 0
    assert "which python9 is not" in refused.stdout
