"""What Binder builds from this repository, by the rules of repo2docker, which are retold here.

They are those of its `BuildPack.binder_dir`, `BaseImage`, `CondaBuildPack` and `Repo2Docker.buildpacks`. Each rule is a
function that returns what it objects to, so that every rule is also shown to object to a broken repository.
"""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from test_project import COURSE_LIST

ROOT = Path(__file__).parent.parent
FILE = "binder/environment.yml"

PYTHON = re.compile(r"python\s*=+\s*([\d\.]*)")  # repo2docker's own; matched at the beginning of a dependency
PYTHONS = ("3.11", "3.12", "3.13")  # the course's, of those that repo2docker and all builds of torch from 2.6 on have
FIRST = ("Dockerfile", "Project.toml", "JuliaProject.toml", "REQUIRE", "default.nix", "runtime.txt")  # win over conda
TORCH = {"pytorch": "torch", "pytorch-cpu": "torch", "pytorch-gpu": "torch", "torchvision": "torchvision"}
FETCHING = re.compile(r"\b(?:curl|wget|git|urllib|urlretrieve|requests|gdown|aria2c|download\w*|cnn\.py)\b|https?://")


# -------------------------------------------------------------------------------------------------- what the files say


def folder(root: Path) -> Path:
    """The one folder that repo2docker reads: what stands at the top counts only without it."""
    return next((root / name for name in (".binder", "binder") if (root / name).is_dir()), root)


def environment(root: Path) -> dict:
    return yaml.safe_load((folder(root) / "environment.yml").read_text(encoding="utf-8"))


def from_conda(root: Path) -> list[str]:
    return [each for each in environment(root)["dependencies"] if isinstance(each, str)]


def from_pip(root: Path) -> list[str]:
    """The lines that conda writes into a list of requirements beside the file, and gives to pip with the option -U."""
    sections = [each for each in environment(root)["dependencies"] if isinstance(each, dict)]
    return [line for section in sections for line in section.get("pip", [])]


def pip_commands(root: Path) -> list[list[str]]:
    """The options of each `pip install` of postBuild, which runs at the top of the repository."""
    found = re.findall(r"(?m)^python -m pip install (.+)$", scripts(root).get("postBuild", ""))
    return [options.split() for options in found]


def name_of(dependency: str) -> str:
    return re.match(r"[\w.-]+", dependency)[0]


def scripts(root: Path) -> dict[str, str]:
    """The files beside the environment that run while the image is built, or when it starts."""
    paths = [folder(root) / name for name in ("postBuild", "start")]
    return {path.name: path.read_bytes().decode() for path in paths if path.exists()}


# ----------------------------------------------------------------------------------------------------------- the rules


def two_folders(root: Path) -> list[str]:
    """repo2docker stops where there are both."""
    return ["both binder and .binder"] if (root / "binder").is_dir() and (root / ".binder").is_dir() else []


def not_by_conda(root: Path) -> list[str]:
    there = [name for name in FIRST if (folder(root) / name).exists()]
    return there if (folder(root) / "environment.yml").exists() else [*there, "no environment.yml"]


def other_python(root: Path) -> list[str]:
    """Only `python=X.Y` is read, and the first one: any other form silently builds repo2docker's default, 3.10."""
    matches = [match for each in from_conda(root) if (match := PYTHON.match(each))]
    version = ".".join(matches[0][1].split(".")[:2]) if matches else "3.10"
    found = [] if version in PYTHONS else [f"Python {version}, expected one of {', '.join(PYTHONS)}"]
    same = yaml.safe_load((root / "environment.yml").read_text(encoding="utf-8"))["dependencies"]
    return found + ([] if f"python={version}" in same else [f"another Python than environment.yml: {version}"])


def other_list(root: Path) -> list[str]:
    """postBuild installs the course's one list, and stops at an error."""
    named = [options[options.index("-r") + 1] for options in pip_commands(root) if "-r" in options]
    found = [f"{name} is not there" for name in named if not (root / name).is_file()]
    if "requirements.txt" not in named:
        found.append("not the course's list")
    return found if "set -e" in scripts(root).get("postBuild", "").splitlines() else [*found, "errors are passed over"]


def torch_for_gpus(root: Path) -> list[str]:
    """conda's torch is the one for CPUs, without some GB of GPU libraries, and pip leaves it alone.

    `env update`, which repo2docker runs, gives pip the option `-U`: pip replaces every package that a list names by the
    newest one. Without it pip keeps what satisfies the list.
    """
    found = [f"pip replaces torch: {line}" for line in from_pip(root)]
    found += [f"pip replaces torch: {options}" for options in pip_commands(root) if {"-U", "--upgrade"} & {*options}]
    by_conda = {name_of(each): each for each in from_conda(root) if name_of(each) in TORCH}
    if set(by_conda) != {"pytorch-cpu", "torchvision"}:
        found.append("conda's torch may be one for GPUs")
    return found + [f"{each}: other versions than the course's" for each in by_conda.values() if not same_bound(each)]


def same_bound(dependency: str) -> bool:
    package = TORCH[name_of(dependency)]
    return (
        Requirement(package + dependency.removeprefix(name_of(dependency))).specifier == COURSE_LIST[package].specifier
    )


def other_index(root: Path) -> list[str]:
    """Packages come from where pip takes them by itself."""
    options = {"-i", "--index-url", "--extra-index-url", "--no-index", "--find-links"}
    return [f"{option}" for command in pip_commands(root) for option in command if option.split("=")[0] in options]


def no_script(root: Path) -> list[str]:
    """What runs begins with the name of its interpreter, has no CRLF; `start` hands over to Jupyter."""
    found = [f"{name} has no #!" for name, text in scripts(root).items() if not text.startswith("#!/")]
    found += [f"{name} has CRLF" for name, text in scripts(root).items() if "\r" in text]
    start = scripts(root).get("start", 'exec "$@"').rstrip()
    return found if start.endswith('exec "$@"') else [*found, "start does not end with exec"]


def no_system_package(root: Path) -> list[str]:
    """apt.txt is a list of names, one a line."""
    path = folder(root) / "apt.txt"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.partition("#")[0].strip() for line in lines]
    return [name for name in names if name and not re.fullmatch(r"[a-z0-9.+-]+", name)]


def downloads(root: Path) -> list[str]:
    """Packages are all that is fetched: the images are in the repository."""
    lines = [line for text in scripts(root).values() for line in text.splitlines()]
    return [line for line in lines if FETCHING.search(line)]


RULES = (
    two_folders,
    not_by_conda,
    other_python,
    other_list,
    torch_for_gpus,
    other_index,
    no_script,
    no_system_package,
    downloads,
)


@pytest.mark.parametrize("rule", RULES)
def test_the_repository(rule):
    assert rule(ROOT) == []


# -------------------------------------------------------------------------------------------------- broken repositories

GOOD = """# what Binder builds
name: cnn-course
channels:
  - conda-forge
dependencies:
  - python=3.12
  - pip
  - pytorch-cpu>=2.6
  - torchvision>=0.21
"""
SCRIPT = "#!/bin/bash\nset -e\npython -m pip install --no-cache-dir -r requirements.txt\n"
POST_BUILD = "binder/postBuild"


def good(root: Path) -> Path:
    """A repository that no rule objects to."""
    for name in ("requirements.txt", "environment.yml"):
        shutil.copy(ROOT / name, root)
    written(FILE, GOOD)(root)
    written(POST_BUILD, SCRIPT)(root)
    written("binder/start", '#!/bin/bash\nexport A=1\nexec "$@"\n')(root)
    written("binder/apt.txt", "# a comment\n\ngit-lfs  # another\nlibstdc++6\n")(root)
    return root


def written(name: str, text: str) -> Callable[[Path], object]:
    """A change that writes a file."""

    def change(root: Path) -> None:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text, encoding="utf-8", newline="")

    return change


def changed(old: str, new: str, name: str = FILE) -> Callable[[Path], object]:
    """A change that replaces text in a file which has it."""

    def change(root: Path) -> None:
        text = (root / name).read_text(encoding="utf-8")
        assert old in text
        written(name, text.replace(old, new))(root)

    return change


BROKEN = [
    (two_folders, lambda root: shutil.copytree(root / "binder", root / ".binder")),
    (not_by_conda, written("binder/Dockerfile", "FROM python")),
    (not_by_conda, written("binder/runtime.txt", "r-2024-01-01")),
    (other_python, changed("python=3.12", "python>=3.12")),
    (other_python, changed("python=3.12", "python 3.12")),
    (other_python, changed("python=3.12", "conda-forge::python=3.12")),
    (other_python, changed("python=3.12", "python=3.9")),
    (other_python, changed("python=3.12", "python=3")),
    (other_python, changed("python=3.12", "python=3.11")),
    (other_list, changed("-r requirements.txt", "-r ../requirements.txt", POST_BUILD)),
    (other_list, changed("-r requirements.txt", "torch", POST_BUILD)),
    (other_list, changed("set -e\n", "", POST_BUILD)),
    (other_list, lambda root: (root / POST_BUILD).unlink()),
    (torch_for_gpus, changed("- pip\n", "- pip\n  - pip:\n      - -r ../requirements.txt\n")),
    (torch_for_gpus, changed("install", "install -U", POST_BUILD)),
    (torch_for_gpus, changed("pytorch-cpu", "pytorch")),
    (torch_for_gpus, changed("  - torchvision>=0.21\n", "")),
    (torch_for_gpus, changed("pytorch-cpu>=2.6", "pytorch-cpu>=2.5")),
    (torch_for_gpus, changed("pytorch-cpu>=2.6", "pytorch-cpu")),
    (other_index, changed("-r", "--extra-index-url https://example.org -r", POST_BUILD)),
    (no_script, written("binder/postBuild", "echo built\n")),
    (no_script, written("binder/postBuild", SCRIPT.replace("\n", "\r\n"))),
    (no_script, written("binder/start", "#!/bin/bash\nexport A=1\n")),
    (no_system_package, written("binder/apt.txt", "Graphviz\n")),
    (no_system_package, written("binder/apt.txt", "graphviz make\n")),
    (downloads, written("binder/postBuild", f"{SCRIPT}wget -q example.org/cifar.tar\n")),
    (downloads, written("binder/postBuild", f"{SCRIPT}python cnn.py --data cifar10\n")),
    (downloads, changed("-r", "git+https://example.org/more -r", POST_BUILD)),
]


@pytest.mark.parametrize("rule", RULES)
def test_a_good_repository_passes(tmp_path, rule):
    assert rule(good(tmp_path)) == []


@pytest.mark.parametrize(("rule", "damage"), BROKEN)
def test_a_broken_repository_is_found(tmp_path, rule, damage):
    damage(good(tmp_path))
    assert rule(tmp_path)


def test_every_rule_is_shown_to_fail():
    assert {rule for rule, _ in BROKEN} == set(RULES)


def test_the_top_counts_only_without_the_folder(tmp_path):
    assert folder(good(tmp_path)) == tmp_path / "binder"
    shutil.rmtree(tmp_path / "binder")
    assert folder(tmp_path) == tmp_path
