"""The report for a bug: complete, without private data, and still there when nearly everything is broken."""

import getpass
import json
import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from utils import device, doctor, experiments
from utils.doctor import Fact, Problem

ROOT = Path(__file__).parent.parent


def facts(check: str) -> dict[str, str]:
    return {fact.name: fact.value for fact in doctor.CHECKS[check]() if isinstance(fact, Fact)}


def problems(check: str) -> list[Problem]:
    return [found for found in doctor.CHECKS[check]() if isinstance(found, Problem)]


@pytest.fixture
def copy(tmp_path, monkeypatch) -> Path:
    """A course of lists and data only, which can be broken."""
    for name in ("requirements.txt", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "data", tmp_path / "data")
    (tmp_path / "results").mkdir()
    for name in ("batchnorm.csv", "batchnorm.json"):
        shutil.copy(ROOT / "results" / name, tmp_path / "results")
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    return tmp_path


def test_the_report_has_what_a_bug_report_needs():
    text = doctor.report(doctor.examine())
    names = [line.split()[0] for line in text.partition("\n\n")[0].splitlines()]
    assert names[:2] == ["course", "python"]
    assert set(names) >= {"system", "packages", "device", "cpu", "memory", "environment", "cache", "results", "figures"}
    assert set(names) >= {"runs", "data", "kernels", "browser", "self-test"}
    assert platform.python_version() in text
    assert device.cpu_name() in text
    assert "CNN_DEVICE=" in text


def test_it_is_a_command_too():
    """Its exit status is 0 only without a problem."""
    done = subprocess.run([sys.executable, "cnn.py", "doctor"], cwd=ROOT, capture_output=True, text=True)
    assert "self-test" in done.stdout
    assert done.returncode == (0 if "No problem was found." in done.stdout else 1)
    assert "Traceback" not in done.stdout + done.stderr


def test_nothing_private_is_in_it(monkeypatch):
    home, user, node = Path.home(), getpass.getuser(), platform.node()
    monkeypatch.setenv("CNN_CACHE_DIR", str(home / "some cache"))
    monkeypatch.setenv("CNN_RESULTS_DIR", f"{os.sep}scratch{os.sep}{user}{os.sep}x")
    monkeypatch.setenv("JUPYTER_TOKEN", "0123secret")
    monkeypatch.setenv("HTTPS_PROXY", "http://anna:0123secret@proxy:1")
    monkeypatch.setenv("SSH_AUTH_SOCK", "0123secret")
    monkeypatch.setenv("JUPYTERHUB_USER", "anna@school.test")
    text = doctor.report(list(doctor.variables()))
    assert "0123secret" not in text
    assert "anna" not in text
    assert "JUPYTER_TOKEN=(set)" in text
    assert f"CNN_CACHE_DIR=~{os.sep}some cache" in text
    assert f"{os.sep}scratch{os.sep}USER{os.sep}x" in text
    assert str(home) not in text
    assert doctor.private(f"{user}@{node} in {home}x") == f"{user}@MACHINE in {home}x" or len(node) < 2


def test_a_broken_check_leaves_the_others(monkeypatch):
    def broken():
        yield Fact("half", "done")
        raise ZeroDivisionError("x\n  y")

    def lacking():
        raise ModuleNotFoundError("No module named 'torch'")
        yield

    monkeypatch.setattr(doctor, "CHECKS", {"a": broken, "b": lacking, "c": doctor.python})
    half, first, second, *rest = doctor.examine()
    assert half == Fact("half", "done")
    assert first == Problem("a: x y", "see the message")
    assert second == Problem("b: No module named 'torch'", doctor.SET_UP)
    assert rest


def test_without_any_package_it_says_what_to_install(tmp_path):
    """As on a machine where nothing was set up: no site-packages, another folder."""
    command = [sys.executable, "-S", "-m", "utils.doctor"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": ""})
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "✘ packages that are missing: torch, torchvision, numpy" in done.stdout
    assert "make lab" in done.stdout
    assert "images and results are whole" in done.stdout


def test_without_git_the_commit_is_unknown(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert facts("course") == {"course": "of an unknown commit (git is not installed)"}


def test_outside_of_a_checkout_the_commit_is_unknown(copy):
    assert "unknown commit (not a git checkout" in facts("course")["course"]


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_the_commit_and_what_differs_from_it(copy):
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *words], cwd=copy, check=True, capture_output=True)
    assert facts("course")["course"].endswith("unchanged")
    (copy / "requirements.txt").write_text("", encoding="utf-8")
    (copy / "new.txt").touch()
    assert facts("course")["course"].endswith("2 files differ: requirements.txt, new.txt")


def test_packages_are_compared_with_the_tested_ones(copy, monkeypatch):
    (copy / "requirements.txt").write_text("numpy>=1\ntorch>=99.1\nno-such-package>=1\n", encoding="utf-8")
    (copy / "constraints.txt").write_text(f"numpy==0.1\ntorch=={metadata.version('torch')}\n", encoding="utf-8")
    assert facts("packages")["packages"] == f"1 as tested; numpy {metadata.version('numpy')} (tested: 0.1)"
    missing, old = problems("packages")
    assert missing == Problem("packages that are missing: no-such-package", doctor.SET_UP)
    assert old.what.startswith("packages that are too old: torch ")
    assert doctor.numbers("2.10.1+cpu") > doctor.numbers("2.9.12")


def test_torchvision_of_another_build_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.ops", None)
    found = [finding for finding in doctor.examine() if isinstance(finding, Problem)]
    assert any(problem.what.startswith("packages: ") and problem.remedy == doctor.SET_UP for problem in found)


def test_a_device_that_is_not_there_is_told_with_the_remedy(monkeypatch):
    monkeypatch.setenv("CNN_DEVICE", "cuda:77")
    monkeypatch.setattr(doctor, "CHECKS", {"machine": doctor.machine})
    (problem,) = doctor.examine()
    assert "device 'cuda:77' (the environment variable CNN_DEVICE) is not on this machine: choose auto" in problem.what


def test_little_memory_and_a_full_disk_are_told(monkeypatch):
    monkeypatch.setattr(device, "free_memory", lambda where: 10**9)
    (problem,) = problems("machine")
    assert problem.what == "only 1.0 GB of memory are free"
    full = shutil.disk_usage(ROOT)._replace(free=10**8)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: full)
    assert len([found for found in problems("folders") if "only 0.1 GB are free" in found.what]) == 4


def test_folders_that_cannot_be_written_are_told(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("CNN_CACHE_DIR", str(tmp_path / "file" / "below"))
    monkeypatch.setenv("CNN_FIGURES_DIR", "~nobody-of-that-name/x")

    def refuse(dir):
        raise PermissionError(13, "Permission denied", str(dir))

    first, third = problems("folders")
    assert first.what.startswith("cache cannot be written: ")
    assert first.remedy == "name another folder by the environment variable CNN_CACHE_DIR"
    assert third.what.startswith("figures cannot be written: ~nobody-of-that-name/x: there is no home folder")
    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    assert [found.what.partition(" ")[0] for found in problems("folders")] == ["cache", "results", "figures", "runs"]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("data/fashion-mnist/train-images-idx3-ubyte.gz", "data/fashion-mnist/train-images-idx3-ubyte.gz"),
        ("results/batchnorm.csv", "results/batchnorm.*"),
        ("results/batchnorm.json", "results/batchnorm.*"),
    ],
)
@pytest.mark.parametrize("how", ["gone", "changed"])
def test_damaged_data_are_told(name, told, how, copy):
    assert problems("data") == []
    path = copy / name
    content = path.read_bytes()
    path.unlink() if how == "gone" else path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    (problem,) = problems("data")
    assert problem.what == f"missing, damaged or changed: {told}"
    assert problem.remedy == f"restore them: git checkout -- {told}"


def test_a_record_that_was_edited_is_told(copy):
    path = copy / "results/batchnorm.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    record["measured_on"]["cpu"] = "another one"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (problem,) = problems("data")
    assert problem.what == "missing, damaged or changed: results/batchnorm.*"


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_results_that_were_deleted_are_told_by_git(copy):
    assert facts("data")["data"] == "images and results are whole (without git, deleted results are not noticed)"
    for command in (["init", "--quiet"], ["add", "results"]):
        subprocess.run(["git", "-C", copy, *command], check=True)
    assert facts("data")["data"] == "images and results are whole"
    for path in copy.glob("results/*"):
        path.unlink()
    (problem,) = problems("data")
    assert problem.what == "missing, damaged or changed: results/batchnorm.*"
    subprocess.run([*problem.remedy.partition(": ")[2].split()], cwd=copy, check=True)
    assert problems("data") == []


def test_a_list_of_checksums_that_is_gone_is_told(copy, monkeypatch):
    (copy / "data/fashion-mnist/SHA256SUMS").unlink()
    monkeypatch.setattr(doctor, "CHECKS", {"data": doctor.data})
    (problem,) = doctor.examine()
    assert problem.what.startswith("data: ")


@pytest.mark.parametrize(
    ("specs", "what"),
    [
        ({}, "Jupyter has no kernel python3"),
        ({"python3": {"spec": {"argv": ["/elsewhere/bin/python", "-m"]}}}, "the kernel python3 runs /elsewhere"),
    ],
)
def test_a_kernel_that_is_not_this_python_is_told(specs, what, monkeypatch):
    done = subprocess.CompletedProcess([], 0, json.dumps({"kernelspecs": specs}), "")
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: done)
    (problem,) = problems("jupyter")
    assert problem.what.startswith(what)


def test_the_kernel_of_this_python_is_found():
    assert problems("jupyter") == []
    assert "python3" in facts("jupyter")["kernels"]


def test_without_jupyter_that_is_told(monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: subprocess.CompletedProcess([], 1, "", "no"))
    assert problems("jupyter") == [Problem("Jupyter's kernels cannot be listed", doctor.SET_UP)]


def test_a_network_that_learns_otherwise_is_told(monkeypatch):
    assert problems("self-test") == []
    kept = experiments.fingerprint
    monkeypatch.setattr(experiments, "fingerprint", lambda trial: [1.01 * loss for loss in kept(trial)])
    (problem,) = problems("self-test")
    assert problem.what == "the network learns otherwise than where the results were measured"
    assert torch.get_num_threads() == 1


@pytest.mark.skipif(not shutil.which("make") or os.name == "nt", reason="needs make and a POSIX shell")
def test_make_doctor_sets_nothing_up(tmp_path):
    for name in ("Makefile", "requirements.txt", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "utils").mkdir()
    for name in ("__init__.py", "doctor.py"):
        shutil.copy(ROOT / "utils" / name, tmp_path / "utils")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "PYTHON"))}
    words = ["make", "--no-print-directory", "doctor", f"PYTHON={sys.executable}"]
    done = subprocess.run(words, cwd=tmp_path, env=clean, capture_output=True, text=True)
    assert "python        " in done.stdout
    assert "✘ data: " in done.stdout
    assert "Traceback" not in done.stderr
    assert done.returncode != 0
    assert not (tmp_path / ".venv").exists()
