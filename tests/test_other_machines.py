"""What other machines have, imitated here: one core, little memory, other encodings, paths, line endings, languages."""

import locale
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path, PurePosixPath

import matplotlib.pyplot as plt
import pytest

from utils import compare, experiments, files

TINY = ["--images", "200", "--epochs", "1", "--batch-size", "100", "--width", "4", "--no-test"]
RESULTS = files.ROOT / "results"
RESERVED = {"CON", "PRN", "AUX", "NUL", *(f"{port}{n}" for port in ("COM", "LPT") for n in range(1, 10))}
tracked = (
    subprocess.run(["git", "ls-files", "-z"], cwd=files.ROOT, capture_output=True).stdout.decode().split("\0")[:-1]
)
in_git = pytest.mark.skipif(not tracked, reason="not a clone")


def train(*arguments: str, root: Path = files.ROOT, prefix: tuple[str, ...] = (), **environment: str) -> str:
    """Train a tiny network from the command line, and return all that is printed. AssertionError when it fails."""
    done = subprocess.run(
        [*prefix, sys.executable, str(root / "cnn.py"), *TINY, *arguments],
        env=os.environ | {"CNN_DEVICE": "cpu"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    printed = done.stdout.decode(errors="replace")
    assert done.returncode == 0, printed
    assert "Traceback" not in printed
    return printed


@pytest.mark.parametrize(
    "encoding", ["ascii", *(pytest.param(e, marks=pytest.mark.thorough) for e in ("cp1252", "cp932"))]
)
def test_a_terminal_that_knows_no_times_sign_gets_all_else(encoding, tmp_path):
    """As on Windows when the output goes to a file, and in LANG=C."""
    printed = train("--out", str(tmp_path / "run"), PYTHONIOENCODING=encoding)
    assert re.search(r"fashion-mnist, 1.+28.+28: 200 images to train", printed)
    assert "validation accuracy" in printed


def test_texts_are_utf8_whatever_the_systems_own_encoding_is(tmp_path):
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "CNN_RESULTS_DIR": str(RESULTS)}
    code = "from utils import experiments, lessons; experiments.load('batchnorm'); print(len(lessons.ABOUT))"
    done = subprocess.run([sys.executable, "-c", code], cwd=files.ROOT, env=os.environ | plain, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    train("--out", str(tmp_path / "run"), **plain)


def test_numbers_have_a_point_in_every_language(monkeypatch):
    """A German or French system has a decimal comma: neither tables nor axes take it over."""
    monkeypatch.setenv("CNN_RESULTS_DIR", str(RESULTS))
    before = locale.setlocale(locale.LC_ALL)
    for name in ("de_DE.UTF-8", "fr_FR.UTF-8", "de-DE"):
        try:
            locale.setlocale(locale.LC_ALL, name)
            break
        except locale.Error:
            continue
    else:
        pytest.skip("no language with a decimal comma is installed")
    try:
        assert locale.localeconv()["decimal_point"] == ","
        assert re.search(r"\d\.\d", experiments.claims_table(experiments.claims()))
        figure, axes = plt.subplots()
        axes.plot([0.25, 0.75])
        figure.canvas.draw()
        assert "," not in "".join(label.get_text() for label in axes.get_yticklabels())
        plt.close(figure)
    finally:
        locale.setlocale(locale.LC_ALL, before)


def test_a_course_in_a_folder_with_spaces_and_letters_of_other_alphabets(tmp_path):
    root = tmp_path / "Kurs für 学生 (neu) 100% #1"
    for name in ("utils", "data"):
        shutil.copytree(files.ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(files.ROOT / "cnn.py", root)
    train("--out", str(root / "runs" / "ein Lauf ü"), root=root, CNN_CACHE_DIR=str(root / "Zwischen Speicher"))
    assert {path.name for path in (root / "runs" / "ein Lauf ü").iterdir()} >= {"model.safetensors", "history.csv"}
    page = tmp_path / "Vergleich ß.html"
    command = [sys.executable, str(root / "cnn.py"), "compare", str(root / "runs" / "ein Lauf ü"), "--out", str(page)]
    subprocess.run(command, check=True, capture_output=True)
    assert "batch_size" in page.read_text(encoding="utf-8")


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not pin processes to cores")
def test_one_core(tmp_path):
    code = "import os, runpy, sys; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); sys.argv = sys.argv[1:]; "
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", code, str(files.ROOT / "cnn.py"), *TINY, "--out", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    assert ", 1 threads" in done.stdout


@pytest.mark.thorough
@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone counts all private memory of a process")
def test_two_gigabytes_are_enough_to_train(tmp_path):
    """With all images, as `make train` does it, and one epoch."""
    code = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_DATA, (2 << 30,) * 2); "
    code += "sys.argv = sys.argv[1:]; "
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    arguments = ["--epochs", "1", "--width", "4", "--no-test", "--threads", "1", "--out", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-c", code, str(files.ROOT / "cnn.py"), *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "55,000 images to train" in done.stdout


@in_git
def test_names_of_files_are_allowed_on_windows_and_macos():
    for name in tracked:
        for part in PurePosixPath(name).parts:
            assert not re.search(r'[<>:"\\|?*\x00-\x1f]|[. ]$', part), name
            assert part.split(".")[0].upper() not in RESERVED, name
            assert part.isascii(), name
        assert len(name) < 120, name  # Windows takes 260 characters, the folder of the course included
    assert len({name.casefold() for name in tracked}) == len(tracked)


@in_git
def test_a_checkout_has_the_same_bytes_on_every_system():
    attributes = (
        subprocess.run(
            ["git", "check-attr", "--stdin", "-z", "eol", "text"],
            input="\0".join(tracked).encode(),
            cwd=files.ROOT,
            capture_output=True,
        )
        .stdout.decode()
        .split("\0")
    )
    found = {}
    for name, attribute, value in zip(attributes[0::3], attributes[1::3], attributes[2::3], strict=False):
        found.setdefault(name, {})[attribute] = value
    for name in tracked:
        assert found[name]["eol"] == "lf" or found[name]["text"] == "unset", name


@in_git
def test_no_text_has_line_endings_of_windows():
    for name in tracked:
        content = (files.ROOT / name).read_bytes()
        assert b"\0" in content[:8000] or b"\r\n" not in content, name


def test_rows_that_were_saved_with_line_endings_of_windows_are_read(tmp_path):
    """A spreadsheet or an editor may have done it: the same runs are found in a reader's own rows."""
    content = (RESULTS / "batchnorm.csv").read_bytes()
    plain, windows = tmp_path / "plain" / "mine.csv", tmp_path / "windows" / "mine.csv"
    for path, text in ((plain, content), (windows, content.replace(b"\n", b"\r\n"))):
        files.write_bytes(path, text)
    (one,), (other,) = compare.studies([plain]), compare.studies([windows])
    assert one.rows.equals(other.rows)
