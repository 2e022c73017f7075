"""The common first cell of the lessons, run in folders that look like a clone, like Colab, and like a mistake."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
from test_notebooks import common_first_cell
from test_project import COURSE_LIST, brought_to, sources

from utils import links

ROOT = Path(__file__).parent.parent
LIST = """# a list
torch>=99
torchvision
numpy>=99
zope-of-none>=1  # none has it
torchmetrics
ipycanvas
jupyterlab>=4
nbval
"""
THERE = ("Torch", "torchvision", "NumPy", "Zope_of.None", "torchmetrics", "ipycanvas")  # spelled as others do


@pytest.fixture
def path(tmp_path, monkeypatch) -> list[str]:
    """A module search path with the standard library and the folder `site`; no `utils` is in it or imported."""
    monkeypatch.delitem(sys.modules, "utils", raising=False)
    standard = [entry for entry in sys.path if "-packages" not in entry and not (Path(entry) / "utils").exists()]
    monkeypatch.setattr(sys, "path", [*standard, str(tmp_path / "site")])
    installed(tmp_path / "site", *THERE)
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


@pytest.fixture
def on_colab(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "google.colab", ModuleType("google.colab"))
    monkeypatch.chdir(tmp_path)


def installed(site: Path, *names: str) -> None:
    """Note that these packages are installed in `site`, and beside them one whose note is damaged and has no name."""
    for name in (*names, "damaged"):
        (site / f"{name}-1.0.dist-info").mkdir(parents=True, exist_ok=True)


def gone(site: Path, *names: str) -> None:
    for name in names:
        (site / f"{name}-1.0.dist-info").rmdir()


def course(root: Path) -> Path:
    for name in ("utils/__init__.py", "utils/lessons.py", "notebooks/src/lesson.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    (root / "requirements.txt").write_text(LIST, encoding="utf-8")
    return root


def run_cell() -> None:
    exec(common_first_cell(), {})


def refused() -> str:
    """The one sentence with which the cell stops."""
    with pytest.raises(ImportError) as error:
        run_cell()
    sentence = str(error.value)
    assert re.fullmatch(r"[^\n]*\.", sentence)
    assert ". " not in sentence
    assert sentence.endswith("and restart the kernel.")
    return sentence


# ------------------------------------------------------------------------------------------------- where the course is


@pytest.mark.parametrize("below", [".", "notebooks", "notebooks/src"])
def test_it_finds_the_course_above(tmp_path, monkeypatch, path, ran, below):
    root = course(tmp_path / "a course")
    monkeypatch.chdir(root / below)
    run_cell()
    run_cell()
    assert path[0] == str(root)
    assert ran == []


def test_it_says_when_there_is_no_course(tmp_path, monkeypatch, path, ran):
    monkeypatch.chdir(tmp_path)
    assert "open the course's notebooks folder" in refused()
    assert ran == []


def test_it_takes_no_other_project_for_the_course(tmp_path, monkeypatch, path, ran):
    (tmp_path / "project" / "utils").mkdir(parents=True)
    (tmp_path / "project" / "utils" / "__init__.py").touch()
    monkeypatch.chdir(tmp_path / "project")
    assert "open the course's notebooks folder" in refused()


def test_it_says_when_another_utils_was_imported_before(tmp_path, monkeypatch, path):
    (tmp_path / "project" / "utils").mkdir(parents=True)
    (tmp_path / "project" / "utils" / "__init__.py").touch()
    root = course(tmp_path / "course")
    monkeypatch.chdir(root / "notebooks")
    path.insert(0, str(tmp_path / "project"))
    other = import_module("utils")
    monkeypatch.setitem(sys.modules, "utils", other)  # so that it is forgotten when the test ends
    assert f"`utils` is not the one in {root}:" in refused()


# ----------------------------------------------------------------------------------------------- what the course needs


@pytest.mark.parametrize("names", [("Torch",), ("NumPy", "Zope_of.None"), ("torchvision", "torchmetrics")])
def test_it_says_which_packages_are_missing_and_what_to_do(tmp_path, monkeypatch, path, ran, names):
    root = course(tmp_path / "course")
    monkeypatch.chdir(root / "notebooks")
    gone(tmp_path / "site", *names)
    listed = ", ".join(re.sub("[_.]", "-", name).lower() for name in names)
    assert f" lacks {listed}: run `pip install -r requirements.txt` (or `make lab`) in {root} and" in refused()
    installed(tmp_path / "site", *names)
    run_cell()
    assert ran == []


def test_a_lesson_does_without_the_canvas(tmp_path, monkeypatch, path, ran):
    monkeypatch.chdir(course(tmp_path / "course"))
    gone(tmp_path / "site", "ipycanvas")
    run_cell()
    assert ran == []


def test_on_colab_it_installs_what_is_missing_but_never_what_colab_has_chosen(tmp_path, path, ran, on_colab):
    gone(tmp_path / "site", *THERE)
    run_cell()
    run_cell()
    assert path[0] == str(tmp_path / "cnn-course")
    clone, *pips = ran
    assert clone[:2] == ["git", "clone"]
    assert {tuple(command[4:]) for command in pips} == {("--quiet", "zope-of-none", "torchmetrics", "ipycanvas")}


def test_on_colab_it_installs_nothing_when_all_is_there(path, ran, on_colab):
    run_cell()
    run_cell()
    assert [command[0] for command in ran] == ["git"]


@pytest.mark.parametrize("colab", [False, True])
def test_it_asks_for_what_utils_and_the_lessons_import(tmp_path, monkeypatch, path, ran, colab):
    """No more, as another Jupyter than JupyterLab may run a lesson; typer is for cnn.py, which lesson 6 runs."""
    root = course(tmp_path / "cnn-course")
    shutil.copy(ROOT / "requirements.txt", root)
    gone(tmp_path / "site", *THERE)
    imported = brought_to(sources("cnn.py", "utils/*.py", "notebooks/src/*.py")) & set(COURSE_LIST)
    if colab:
        monkeypatch.setitem(sys.modules, "google.colab", ModuleType("google.colab"))
        monkeypatch.chdir(tmp_path)
        run_cell()
        assert set(ran[0][5:]) == imported - {"torch", "torchvision", "numpy"}
    else:
        monkeypatch.chdir(root)
        asked = re.search(r"lacks (.*): run", refused())[1]
        assert set(asked.split(", ")) == imported - {"ipycanvas"}


def test_the_list_spells_names_as_the_cell_reads_them():
    """In ASCII, which any system's encoding reads, and with the characters that the cell takes for a name."""
    lines = (ROOT / "requirements.txt").read_text(encoding="ascii").splitlines()
    assert [re.match(r"[\w-]+", line)[0] for line in lines if line and line[0] != "#"] == list(COURSE_LIST)


# ------------------------------------------------------------------------------------ a real clone, and Colab's machine

PIP = """
import os, sys
from pathlib import Path
with open(os.environ["ASKED"], "a") as log:
    print(*sys.argv[1:], file=log)
for name in sys.argv[3:]:
    (Path(__file__).parent.parent / f"{name.replace('-', '_')}-1.0.dist-info").mkdir()
"""
COLAB = """
import json, sys
from importlib import metadata
from pathlib import Path
import google.colab
exec(sys.argv[1], {})
Path("cnn-course/mine.txt").touch()
exec(sys.argv[1], {})
import utils
from utils import model
print(json.dumps({"torch": metadata.version("torch"), "utils": utils.__file__, "network": type(model.CNN()).__name__}))
"""
LOCAL = """
import sys
changes = []
def watch(event, details):
    if event in ("subprocess.Popen", "os.system", "os.mkdir", "os.remove", "os.rename", "socket.connect"):
        changes.append(event)
    if event == "open" and set(str(details[1])) & set("wax+"):
        changes.append(f"write {details[0]}")
sys.addaudithook(watch)
exec(sys.argv[1], {})
exec(sys.argv[1], {})
print(*changes, sep="\\n", end="")
"""


def git(*words: str) -> None:
    """Run git as on a machine where nothing is configured."""
    own = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    subprocess.run(["git", "-c", "user.name=n", "-c", "user.email=e", *words], check=True, env=os.environ | own)


@pytest.fixture(scope="session")
def remote(tmp_path_factory) -> Path:
    """A repository of the course as it is now, uncommitted changes too, that needs two more packages than there are."""
    root = tmp_path_factory.mktemp("remote")
    shutil.copytree(ROOT / "utils", root / "utils", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "notebooks" / "src", root / "notebooks", ignore=shutil.ignore_patterns("__pycache__"))
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    (root / "requirements.txt").write_text(f"{text}one-of-none>=1\ntwo-of-none  # none\n", encoding="utf-8")
    git("init", "--quiet", f"--initial-branch={links.REF}", str(root))
    git("-C", str(root), "add", ".")
    git("-C", str(root), "commit", "--quiet", "--message=all")
    return root


@pytest.fixture(scope="session")
def colab(remote, tmp_path_factory) -> dict:
    """What the cell, run twice, does in an empty folder with google.colab, another torch, and another `utils`."""
    machine = tmp_path_factory.mktemp("machine")
    front, content, foreign = machine / "front", machine / "content", machine / "foreign"
    content.mkdir()
    for file, text in {
        front / "google" / "colab" / "__init__.py": "",
        front / "pip" / "__init__.py": "",
        front / "pip" / "__main__.py": PIP,
        front
        / "torch-2.5.0+cu121.dist-info"
        / "METADATA": "Metadata-Version: 2.1\nName: torch\nVersion: 2.5.0+cu121\n",
        foreign / "utils" / "__init__.py": "raise ImportError('this is the other one')",
    }.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(front), str(foreign)]),
        "ASKED": str(machine / "asked.txt"),
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.{remote.as_uri()}.insteadOf",
        "GIT_CONFIG_VALUE_0": links.COURSE,
        "GIT_ALLOW_PROTOCOL": "file",  # so that a clone of anything else fails
    }
    command = [sys.executable, "-c", COLAB, common_first_cell()]
    done = subprocess.run(command, cwd=content, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    asked = (machine / "asked.txt").read_text(encoding="utf-8").splitlines()
    return json.loads(done.stdout) | {"asked": asked, "content": content, "said": done.stderr}


def test_colab_gets_one_clone_and_its_utils_wins(colab):
    clone = colab["content"] / "cnn-course"
    assert [entry.name for entry in colab["content"].iterdir()] == ["cnn-course"]
    assert (clone / "mine.txt").exists(), "what a reader writes there between two runs stays"
    assert Path(colab["utils"]) == clone / "utils" / "__init__.py"
    assert colab["network"] == "CNN"
    assert colab["said"] == ""


def test_colab_keeps_its_torch_and_is_asked_once_for_the_two_packages_that_it_lacks(colab):
    assert colab["torch"] == "2.5.0+cu121"
    assert colab["asked"] == ["install --quiet one-of-none two-of-none"]


def test_in_a_clone_it_starts_nothing_and_changes_nothing(remote, tmp_path):
    git("clone", "--quiet", remote.as_uri(), str(tmp_path / "course"))
    shutil.copy(ROOT / "requirements.txt", tmp_path / "course")
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    command = [sys.executable, "-c", LOCAL, common_first_cell()]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=tmp_path / "course" / "notebooks", env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")} == before


@pytest.mark.parametrize(
    ("code", "found"),
    [("import subprocess; subprocess.run(['git'])", "subprocess.Popen"), ("open('x', 'w')", "write x")],
)
def test_a_cell_that_does_more_is_found(tmp_path, code, found):
    done = subprocess.run([sys.executable, "-c", LOCAL, code], cwd=tmp_path, capture_output=True, text=True)
    assert found in done.stdout.splitlines()
