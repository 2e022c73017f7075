"""What a bug report needs, and what is wrong on this machine with what to do about it: `make doctor`.

It must work where little else does. So at its top it imports the standard library only, and a check that fails is one
of its findings.
"""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import json
import locale
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST, NEWEST = (3, 11), (3, 14)  # Python that the course, and the versions in constraints.txt, run on
ENOUGH_MEMORY, ENOUGH_DISK = 2 * 10**9, 10**9  # bytes: a lesson takes at most 1.5 GB, the caches some hundred MB
MATTERS = re.compile(  # environment variables that change what is computed, or where it is looked for
    r"(CNN|OMP|MKL|KMP|GOMP|OPENBLAS|ATEN|ONEDNN|DNNL|TORCH|PYTORCH|CUDA|NVIDIA|CUBLAS|JUPYTER|MPL|PYTHON|LD_PRELOAD"
    r"|LC_|LANG|MALLOC|COLAB|BINDER|.*_PROXY|LOCKED)",
    re.IGNORECASE,
)
SECRET = re.compile(r"TOKEN|KEY|SECRET|PASS|PROXY|JUPYTERHUB", re.IGNORECASE)  # of these, only that they are set
SET_UP = "run `make lab`, or `pip install -r requirements.txt -c constraints.txt`"


@dataclass(frozen=True)
class Fact:
    """What a report says of this machine."""

    name: str
    value: str


@dataclass(frozen=True)
class Problem:
    """What is wrong, and what to do."""

    what: str
    remedy: str


Findings = Iterator["Fact | Problem"]


def examine() -> list[Fact | Problem]:
    """Return what all checks find. A check that cannot be made is a problem, too."""
    found: list[Fact | Problem] = []
    for name, check in CHECKS.items():
        try:
            found.extend(check())  # what was found before an error stays
        except ModuleNotFoundError as error:
            found.append(Problem(f"{name}: {error}", SET_UP))
        except Exception as error:  # whatever is broken, the other checks are made
            found.append(Problem(f"{name}: {' '.join(str(error).split()) or type(error).__name__}", "see the message"))
    return found


def report(found: list[Fact | Problem]) -> str:
    """Return the findings as text: facts, then problems; without the names of user and machine."""
    lines = [f"{fact.name:<14}{fact.value}" for fact in found if isinstance(fact, Fact)]
    problems = [problem for problem in found if isinstance(problem, Problem)]
    lines += ["", f"{len(problems)} to mend:" if problems else "No problem was found."]
    lines += [f"✘ {problem.what}\n  → {problem.remedy}" for problem in problems]
    return private("\n".join(lines))


def private(text: str) -> str:
    """Return `text` with ~ for the home folder, and without the user's and the machine's name."""
    with contextlib.suppress(RuntimeError):  # nobody's home
        for home in {str(Path.home()), str(Path.home().resolve())} - {"/"}:
            text = re.sub(rf"(?<![\w.-]){re.escape(home)}(?![\w.-])", "~", text)
    names = {"MACHINE": platform.node()}
    with contextlib.suppress(Exception):  # no such user: KeyError, OSError or ImportError
        names["USER"] = getpass.getuser()
    for stands_for, name in names.items():
        if len(name) > 1:
            text = re.sub(rf"(?<=[/\\@_=]){re.escape(name)}(?![A-Za-z0-9])", stands_for, text)
    return text


# ---------------------------------------------------------------------------------------------------------- the checks


def course() -> Findings:
    """The commit at hand, and whether files differ from it."""
    git = ["git", "-C", str(ROOT)]
    try:
        done = {"capture_output": True, "text": True, "check": True, "encoding": "utf-8", "errors": "replace"}
        name = subprocess.run([*git, "log", "-1", "--format=%h of %cs"], **done).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain"], **done).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError) as error:
        why = "git is not installed" if isinstance(error, FileNotFoundError) else "not a git checkout that git reads"
        yield Fact("course", f"of an unknown commit ({why})")
        return
    state = f"{len(changed)} files differ: {', '.join(line[3:] for line in changed[:5])}" if changed else "unchanged"
    yield Fact("course", f"commit {name}, {state}")


def python() -> Findings:
    """The interpreter, and the system below it."""
    own = "a virtual environment" if sys.prefix != sys.base_prefix else "no virtual environment"
    yield Fact("python", f"{platform.python_version()}, {sys.executable}, {own}")
    yield Fact("system", f"{platform.platform()}, {platform.machine()}")
    yield Fact("text", f"{locale.getpreferredencoding(False)}, output {sys.stdout.encoding}")
    if not OLDEST <= sys.version_info[:2] <= NEWEST:
        what = "old" if sys.version_info < OLDEST else "new: there may be no packages for it yet"
        yield Problem(f"Python {platform.python_version()} is too {what}", "install Python 3.11 to 3.14")
    if sys.maxsize < 2**32:
        yield Problem("this is a 32-bit Python, for which there is no PyTorch", "install a 64-bit one")


def packages() -> Findings:
    """Which packages are missing, too old, or others than the tested ones."""
    tested = {normal(name): pin for name, pin in listed("constraints.txt", "==")}
    missing, old, other, same = [], [], [], 0
    for name, least in listed("requirements.txt", ">="):
        try:
            have = metadata.version(name)
        except metadata.PackageNotFoundError:
            missing.append(name)
            continue
        pin = tested.get(normal(name), "")
        same += have == pin
        other += [f"{name} {have} (tested: {pin})"] if have != pin else []
        old += [f"{name} {have} (needed: {least} or newer)"] if numbers(have) < numbers(least) else []
    yield Fact("packages", "; ".join([f"{same} as tested", *other]))
    for what, names in {"missing": missing, "too old": old}.items():
        if names:
            yield Problem(f"packages that are {what}: {', '.join(names)}", SET_UP)
    import torchvision.ops  # noqa: F401 - of another build than torch it cannot be imported


def listed(file: str, operator: str) -> list[tuple[str, str]]:
    """Return name and version of each line of a list of packages."""
    text = (ROOT / file).read_text(encoding="utf-8")
    return re.findall(rf"(?m)^([\w.-]+){operator}([\w.]+)", text)


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def numbers(version: str) -> list[int]:
    """Return the numbers of a release: "2.6.0+cpu" → [2, 6, 0]."""
    return [int(number) for number in re.findall(r"\d+", version.partition("+")[0])[:3]]


def machine() -> Findings:
    """Device, precision, CPU, threads and memory, as the course takes them."""
    import torch

    from utils import device

    found = device.describe()
    yield Fact("device", f"{found['device']}, {found['precision']}")
    yield Fact("cpu", f"{found['cpu']}, {found['cores']} cores, {found['threads']} threads, {found['instructions']}")
    free = device.free_memory(torch.device("cpu"))
    yield Fact("memory", f"{free / 1e9:.1f} GB free")
    if free < ENOUGH_MEMORY:
        yield Problem(
            f"only {free / 1e9:.1f} GB of memory are free", "close other programs; a lesson takes up to 1.5 GB"
        )
    if torch.cuda.is_available():
        name, total = torch.cuda.get_device_name(), torch.cuda.mem_get_info()
        yield Fact("gpu", f"{name}, CUDA {torch.version.cuda}, {total[0] / 1e9:.1f} of {total[1] / 1e9:.1f} GB free")


def variables() -> Findings:
    """The environment variables that matter; of what may be secret only that it is set."""
    found = {name: value for name, value in sorted(os.environ.items()) if MATTERS.match(name)}
    shown = [f"{name}={'(set)' if SECRET.search(name) else value}" for name, value in found.items()]
    yield Fact("environment", ", ".join(shown) or "none that matters")


def folders() -> Findings:
    """Where things are written, whether they can be, and how much room there is."""
    from utils import files

    places = {name: getattr(files, f"{name}_dir") for name in ("cache", "results", "figures")}
    places["runs"] = lambda: next(folder for folder in (ROOT / "runs", ROOT) if folder.is_dir())
    for name, place in places.items():
        try:
            folder = place()
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(bytes(4096))
        except (OSError, ValueError) as error:
            what = " ".join(str(error).split())
            other = "--out FOLDER" if name == "runs" else f"the environment variable CNN_{name.upper()}_DIR"
            yield Problem(f"{name} cannot be written: {what}", f"name another folder by {other}")
            continue
        inside = [] if folder == ROOT else [path for path in folder.rglob("*") if path.is_file()]
        size, free = sum(path.stat().st_size for path in inside), shutil.disk_usage(folder).free
        room = f"{len(inside)} files, {size / 1e6:,.1f} MB; {free / 1e9:,.1f} GB free"
        yield Fact(name, f"{folder}: {room}")
        if free < ENOUGH_DISK:
            yield Problem(f"only {free / 1e9:.1f} GB are free for {folder}", "free some space, or name another folder")


def data() -> Findings:
    """Whether the embedded images are those that were committed, and all shipped results there, with their records."""
    images, results = ROOT / "data" / "fashion-mnist", ROOT / "results"
    damaged = []
    for line in (images / "SHA256SUMS").read_text(encoding="utf-8").splitlines():
        expected, name = line.split()
        damaged += [f"data/fashion-mnist/{name}"] if digest(images / name) != expected else []
    shipped = committed("results")
    tables = {path.stem for path in [*results.glob("*.csv"), *results.glob("*.json"), *map(Path, shipped or [])]}
    damaged += [f"results/{name}.*" for name in sorted(tables) if not is_whole(results / f"{name}.csv")]
    unknown = "" if shipped else " (without git, deleted results are not noticed)"
    yield Fact("data", "damaged" if damaged else f"images and results are whole{unknown}")
    if damaged:
        what = f"missing, damaged or changed: {', '.join(damaged)}"
        yield Problem(what, f"restore them: git checkout -- {' '.join(damaged)}")


def committed(folder: str) -> list[str]:
    """Return the tables and records in `folder` that git has; none where there is no git or no checkout."""
    command = ["git", "-C", str(ROOT), "ls-files", f":(glob){folder}/*.csv", f":(glob){folder}/*.json"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, encoding="utf-8").stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return []


def is_whole(rows: Path) -> bool:
    """Whether a table and the JSON file beside it are those that `files.write_rows` wrote, which needs packages."""
    try:
        record = json.loads(rows.with_suffix(".json").read_text(encoding="utf-8"))
        rest = {name: value for name, value in record.items() if name not in ("sha256", "before")}
        sealed = hashlib.sha256(json.dumps(rest).encode()).hexdigest() == record["sha256"]
        return sealed and digest(rows, record.get("rows_bytes")) == record["rows_sha256"]
    except (OSError, ValueError, LookupError, AttributeError):  # missing, no JSON, or another
        return False


def digest(path: Path, length: int | None = None) -> str:
    """Return the SHA-256 of a file, or of its first `length` bytes; "" for one that cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()[:length]).hexdigest()
    except OSError:
        return ""


def jupyter() -> Findings:
    """The kernel that a lesson runs in, and whether it is this Python."""
    command = [sys.executable, "-m", "jupyter_client.kernelspecapp", "list", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace", timeout=60)
    if done.returncode:
        yield Problem("Jupyter's kernels cannot be listed", SET_UP)
        return
    specs = json.loads(done.stdout)["kernelspecs"]
    program = (specs.get("python3", {}).get("spec", {}).get("argv") or [""])[0]
    yield Fact("kernels", ", ".join(specs) or "none")
    if not program:
        yield Problem("Jupyter has no kernel python3", SET_UP)
    elif shutil.which(program) is None or (Path(program).is_absolute() and not same_python(program)):
        remedy = f"choose another kernel in Jupyter, or: {Path(sys.executable).name} -m ipykernel install --sys-prefix"
        yield Problem(f"the kernel python3 runs {program}, which is not this Python ({sys.executable})", remedy)


def same_python(program: str) -> bool:
    """Whether `program` is in the environment of this Python (python and python3 are one)."""
    return Path(program).parent.resolve() == Path(sys.executable).parent.resolve()


def chromium() -> Findings:
    """The browser that only tests need."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    yield Fact("browser", found or "no Chromium on the path; only some tests need one")


def network() -> Findings:
    """Train for a second or two, and compare the loss with the one that was written down with the shipped results."""
    from utils import ablation, experiments

    experiment = experiments.find("batchnorm")
    begin = time.perf_counter()
    plan = ablation.plan(seeds=[0], lr=min(experiment.lrs), device="cpu", precision="fp32", **experiment.options())
    (variant, *_), trial = next(iter(plan.items()))
    loss = experiments.fingerprint(trial)[0]
    about = json.loads((ROOT / "results" / "batchnorm.json").read_text(encoding="utf-8"))
    expected = about["fingerprints"][variant]["fp32"][0]
    seconds = time.perf_counter() - begin
    yield Fact("self-test", f"a training loss of {loss:.6f}, expected {expected:.6f}, in {seconds:.1f} s")
    if not math.isclose(loss, expected, rel_tol=experiments.TOLERANCE["fp32"]):
        remedy = "if utils/ is unchanged, PyTorch computes wrongly here: install the tested versions (constraints.txt)"
        yield Problem("the network learns otherwise than where the results were measured", remedy)


CHECKS: dict[str, Callable[[], Findings]] = {
    "course": course,
    "python": python,
    "packages": packages,
    "machine": machine,
    "environment": variables,
    "folders": folders,
    "data": data,
    "jupyter": jupyter,
    "browser": chromium,
    "self-test": network,
}


def main() -> int:
    """Print the report; return the number of problems."""
    found = examine()
    with contextlib.suppress(AttributeError):  # not a file but something that stands for it
        sys.stdout.reconfigure(errors="replace")
    print(report(found))
    return sum(isinstance(finding, Problem) for finding in found)


if __name__ == "__main__":
    sys.exit(main() > 0)
