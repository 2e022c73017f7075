"""The project as a whole: its lists of packages, the floors of `utils`, the commands that it promises."""

import ast
import hashlib
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from utils import doctor, links

ROOT = Path(__file__).parent.parent

# A module of utils imports only from floors below its own; sideways only where it is named here.
FLOORS = {
    "files": 0,
    "tables": 1,
    "links": 1,
    "folders": 0,
    "device": 0,
    "widgets": 0,
    "kernels": 0,
    "muon": 1,
    "parallel": 0,
    "cluster": 0,
    "data": 1,
    "model": 1,
    "train": 2,
    "checkpoint": 2,
    "probes": 2,
    "landscape": 2,
    "ablation": 3,
    "evidence": 3,
    "examine": 3,
    "loops": 3,
    "costs": 3,
    "record": 3,
    "frameworks": 3,
    "bench": 4,
    "experiments": 4,
    "plots": 5,
    "exercises": 5,
    "full_training": 5,
    "lessons": 5,
    "compare": 6,
    "doctor": 6,
}

SIDEWAYS = {("train", "checkpoint"), ("loops", "record")}


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------------- lists of packages


def requirements(text: str) -> dict[str, Requirement]:
    """The packages that a list names, without comments and without lines such as `-r other.txt`."""
    lines = [line.split("#")[0].strip() for line in text.splitlines()]
    found = [Requirement(line) for line in lines if line and not line.startswith("-")]
    names = [canonicalize_name(requirement.name) for requirement in found]
    assert len(set(names)) == len(names), f"named twice: {sorted({name for name in names if names.count(name) > 1})}"
    return dict(zip(names, found, strict=True))


COURSE_LIST = requirements(read("requirements.txt"))
DEV_LIST = requirements(read("requirements-dev.txt"))
BENCH_LIST = requirements(read("requirements-bench.txt"))
CLUSTER_LIST = requirements(read("requirements-cluster.txt"))
SITE_LIST = requirements(read("requirements-site.txt"))
LISTS = (COURSE_LIST, DEV_LIST, BENCH_LIST, CLUSTER_LIST, SITE_LIST)
CONSTRAINTS = requirements(read("constraints.txt"))


def imported(code: str) -> set[str]:
    """The top-level packages that `code` imports anywhere, from outside the standard library and this repository."""
    names = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module)
    here = {"utils", "cnn", "tests", "conftest", "__future__"} | {path.stem for path in (ROOT / "tests").glob("*.py")}
    return {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - here


BRINGS = packages_distributions()


def distributions(package: str) -> set[str]:
    """The distributions that bring `package`: {"pillow"} for PIL."""
    return {canonicalize_name(name) for name in BRINGS.get(package, [package])}


def sources(*patterns: str) -> list[Path]:
    return sorted(path for pattern in patterns for path in ROOT.glob(pattern))


BENCH_CODE = sources("utils/frameworks.py")  # the one file that imports what only a benchmark needs
CLUSTER_CODE = sources("utils/cluster.py")  # and the one that imports what only a sweep on several machines needs
OPTIONAL_CODE = [*BENCH_CODE, *CLUSTER_CODE]
COURSE_CODE = [path for path in sources("cnn.py", "utils/*.py", "notebooks/src/*.py") if path not in OPTIONAL_CODE]


def undeclared(paths: list[Path], known: set[str]) -> list[str]:
    found = [(path.name, package) for path in paths for package in sorted(imported(path.read_text(encoding="utf-8")))]
    return [f"{name} imports {package}" for name, package in found if not distributions(package) & known]


def test_what_the_course_imports_is_declared():
    assert undeclared(COURSE_CODE, set(COURSE_LIST)) == []
    assert undeclared(BENCH_CODE, set(COURSE_LIST) | set(BENCH_LIST)) == []
    assert undeclared(CLUSTER_CODE, set(COURSE_LIST) | set(CLUSTER_LIST)) == []


def test_what_the_tests_import_is_declared():
    assert undeclared(sources("tests/**/*.py"), set(COURSE_LIST) | set(CLUSTER_LIST) | set(DEV_LIST)) == []
    assert undeclared(sources("docs/*.py"), set(SITE_LIST) | {"docutils"}) == []  # Sphinx is made of docutils


def test_what_the_site_takes_from_the_course_needs_no_package():
    """`make site` installs its own list only."""
    assert re.findall(r"^from utils import (.+?)(?:  #|$)", read("docs/conf.py"), re.MULTILINE) == ["links"]
    subprocess.run([sys.executable, "-S", "-c", "from utils import links"], cwd=ROOT, check=True, timeout=60)


def test_undeclared_imports_are_found(tmp_path):
    code = (
        "import os, torch.nn\nfrom utils import data\ndef f():\n    from PIL import Image\n    import absent_package\n"
    )
    assert imported(code) == {"torch", "PIL", "absent_package"}
    (tmp_path / "some.py").write_text(code, encoding="utf-8")
    assert undeclared([tmp_path / "some.py"], {"torch", "pillow"}) == ["some.py imports absent_package"]


def test_every_declared_package_is_used():
    """By an import; or by name: commands, Sphinx's extension and theme, SciPy (SVHN), onnxscript (of torch.onnx)."""
    assert set(COURSE_LIST) - brought_to(COURSE_CODE) - {"jupyterlab", "nbval", "scipy", "onnxscript"} == set()
    assert set(DEV_LIST) - brought_to(sources("tests/**/*.py")) - {"nbconvert", "pytest-xdist", "ruff"} == set()
    assert set(BENCH_LIST) - brought_to(BENCH_CODE) == set()
    assert set(CLUSTER_LIST) - brought_to(CLUSTER_CODE) == set()
    by_name = {name for name in SITE_LIST if name.replace("-", "_") in read("docs/conf.py")} | {"sphinx"}
    assert set(SITE_LIST) - by_name == set()


def brought_to(paths: list[Path]) -> set[str]:
    """The distributions that the files at `paths` import from."""
    packages = {package for path in paths for package in imported(path.read_text(encoding="utf-8"))}
    return {name for package in packages for name in distributions(package)}


def test_no_package_is_declared_twice():
    assert len(set().union(*LISTS)) == sum(map(len, LISTS))
    below = {"dev": ["cluster.txt", "site.txt"], "cluster": [".txt"], "bench": [".txt"], "site": []}
    for name, others in below.items():
        assert re.findall(r"^-r requirements-?(.+)$", read(f"requirements-{name}.txt"), re.MULTILINE) == others
    with pytest.raises(AssertionError, match="named twice: \\['numpy'\\]"):
        requirements("numpy>=2\ntorch\nnumpy>=1\n")


@pytest.mark.parametrize("requirement", [requirement for names in LISTS for requirement in names.values()], ids=str)
def test_requirement_has_a_lower_bound_and_a_tested_version(requirement):
    assert [bound.operator for bound in requirement.specifier] == [">="]
    (pin,) = CONSTRAINTS[canonicalize_name(requirement.name)].specifier
    assert pin.operator == "=="
    assert requirement.specifier.contains(pin.version)


def test_constraints_are_exact_and_leave_the_gpu_libraries_to_torch():
    assert {spec.operator for pinned in CONSTRAINTS.values() for spec in pinned.specifier} == {"=="}
    assert [name for name in CONSTRAINTS if name.startswith(("nvidia-", "cuda-", "triton"))] == []


def test_a_notebook_service_keeps_its_own_torch():
    assert COURSE_LIST["torch"].specifier.contains("2.6.0")
    assert COURSE_LIST["torchvision"].specifier.contains("0.21.0")


def test_environment_refers_to_the_list():
    lines = [line.strip().removeprefix("- ") for line in read("environment.yml").splitlines()]
    assert "python=3.12" in lines
    assert "-r requirements.txt" in lines
    assert [line for line in lines if canonicalize_name(re.split(r"[=<>]", line)[0]) in COURSE_LIST] == []


# ------------------------------------------------------------------------------------------------- floors of the code


def imports_of(code: str) -> set[str]:
    """The modules of `utils` that `code`, a module of `utils`, imports: absolute or relative, at any place in it."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.level or node.module.split(".")[0] == "utils"):
            module = (node.module or "").removeprefix("utils").strip(".")
            found |= {module.split(".")[0]} if module else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("utils.")}
    return found


def climbing(module: str, code: str) -> list[str]:
    above = [other for other in imports_of(code) if FLOORS.get(other, 9) >= FLOORS[module]]
    return [f"{module} imports {other}" for other in above if (module, other) not in SIDEWAYS]


@pytest.mark.parametrize("path", sources("utils/*.py"), ids=lambda path: path.stem)
def test_imports_run_downwards(path):
    if path.stem == "__init__":
        assert imports_of(path.read_text(encoding="utf-8")) == set()
    else:
        assert path.stem in FLOORS, f"give {path.stem} a floor in this test"
        assert climbing(path.stem, path.read_text(encoding="utf-8")) == []


def test_an_import_upwards_is_found():
    assert climbing("train", "from . import files\nfrom .model import CNN\nimport utils.device\nimport torch") == []
    assert climbing("data", "def f():\n    from utils import train") == ["data imports train"]
    assert climbing("data", "from .model import CNN") == ["data imports model"]
    assert climbing("data", "from utils.plots import color") == ["data imports plots"]
    assert climbing("data", "import utils.bench") == ["data imports bench"]


# ------------------------------------------------------------------------------------------------------- the promises

TARGETS = dict(re.findall(r"^([a-z-]+):.*?## (.+)$", read("Makefile"), re.MULTILINE))


def test_make_help_lists_every_target():
    rules = set(re.findall(r"^([a-z-]+):", read("Makefile"), re.MULTILINE))
    assert {rule for rule in rules if not rule.startswith("setup")} == set(TARGETS)
    assert set(TARGETS) >= {"help", "lab", "train", "test", "notebooks", "format", "clean"}
    if shutil.which("make"):
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
        printed = subprocess.run(["make"], cwd=ROOT, env=clean, capture_output=True, text=True, check=True).stdout
        assert [line.split()[:2] for line in printed.splitlines()] == [["make", target] for target in TARGETS]


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_commands_of_the_page_exist(page):
    named = set(re.findall(r"\bmake ([a-z-]+)", " ".join(re.findall(r"`[^`]+`|^ {4}.+$", read(page), re.MULTILINE))))
    rules = set(re.findall(r"^([a-z-]+):", read("Makefile"), re.MULTILINE))
    assert named <= rules


def test_readme_has_the_two_commands():
    (block,) = re.findall(r"^ {4}git clone .+\n((?: {4}make .+\n)+)", read("README.md"), re.MULTILINE)
    assert [line.split()[:2] for line in block.splitlines()] == [["make", "train"], ["make", "lab"]]
    assert "`make test`" in read("README.md")


def test_the_versions_of_python_are_the_same_everywhere():
    oldest, newest = (".".join(map(str, version)) for version in (doctor.OLDEST, doctor.NEWEST))
    for page in ("README.md", "CONTRIBUTING.md", "Makefile", "utils/doctor.py"):
        assert f"Python {oldest} to {newest}" in read(page), page
    assert f"{doctor.OLDEST} <= sys.version_info[:2] <= {doctor.NEWEST}" in read("Makefile")
    assert f'python: ["{oldest}", "{newest}"]' in read(".github/workflows/test.yml")


def test_the_address_of_the_course_is_the_same_everywhere():
    pages = sources("*.md", "*.cff", "notebooks/src/*.py")
    text = "\n".join(path.read_text(encoding="utf-8") for path in pages)
    name = re.escape(links.COURSE.rpartition("/")[2])
    assert set(re.findall(rf"https://github\.com/[\w.-]+/{name}\b", text)) == {links.COURSE}


def test_embedded_data_is_whole():
    folder = ROOT / "data" / "fashion-mnist"
    sums = [line.split() for line in (folder / "SHA256SUMS").read_text(encoding="utf-8").splitlines()]
    assert {name for _, name in sums} == {path.name for path in folder.glob("*.gz")}
    assert [name for sha, name in sums if hashlib.sha256((folder / name).read_bytes()).hexdigest() != sha] == []
