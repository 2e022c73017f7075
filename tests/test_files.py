"""Files: written whole or not at all, with errors that say what to do."""

import csv
import errno
import hashlib
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest

from utils import files


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_sha256_is_that_of_the_standard(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert files.sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_root_is_the_repository():
    assert (files.ROOT / "utils" / "files.py").samefile(files.__file__)


@pytest.mark.parametrize(
    ("folder", "variable"), [(files.cache_dir, "CNN_CACHE_DIR"), (files.results_dir, "CNN_RESULTS_DIR")]
)
def test_folders_are_made_where_the_environment_says(folder, variable, tmp_path, monkeypatch):
    monkeypatch.setenv(variable, str(tmp_path / "a" / "b"))
    assert folder() == tmp_path / "a" / "b"
    assert folder().is_dir()


def test_a_folder_that_cannot_be_made_is_an_error_with_its_path(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("CNN_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(OSError, match=r"cannot write .*cache: .*path"):
        files.cache_dir()


def test_atomic_path_makes_the_folder_and_replaces_the_file(tmp_path):
    path = tmp_path / "new" / "picture.png"
    for content in (b"first", b"second"):
        with files.atomic_path(path) as temporary:
            assert temporary.suffix == ".png"
            assert temporary.parent == path.parent
            temporary.write_bytes(content)
        assert path.read_bytes() == content
    assert names(path.parent) == ["picture.png"]


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path, error):
    files.write_text(tmp_path / "a.txt", "old")
    with pytest.raises(type(error)), files.atomic_path(tmp_path / "a.txt") as temporary:  # noqa: PT012
        temporary.write_text("half of the n", encoding="utf-8")
        raise error
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "old"
    assert names(tmp_path) == ["a.txt"]


def test_text_is_written_as_utf8_with_its_own_line_endings(tmp_path):
    files.write_text(tmp_path / "a.txt", "N×C\nµ\n")
    assert (tmp_path / "a.txt").read_bytes() == "N×C\nµ\n".encode()


@pytest.mark.parametrize("number", ["ENOSPC", "EDQUOT", "EFBIG"])
def test_a_full_disk_is_explained(tmp_path, monkeypatch, number):
    code = getattr(errno, number, errno.ENOSPC)

    def write_half(path, content):
        with path.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "write_bytes", write_half)
    with pytest.raises(OSError, match=r"model.bin: the disk is full.*free some space") as caught:
        files.write_bytes(tmp_path / "model.bin", b"0123456789")
    assert caught.value.errno == code
    assert names(tmp_path) == []


LIMITED = """
import resource, sys
import numpy as np
from safetensors.numpy import save_file
from utils import files
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
for write in (lambda path: path.write_bytes(bytes(5000)), lambda path: save_file({"weight": np.zeros(5000)}, path)):
    try:
        with files.atomic_path(sys.argv[1] + "/a.safetensors") as path:
            write(path)
    except OSError as error:
        print(error.errno, error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on the size of a file")
def test_a_real_limit_on_the_size_of_files_is_explained_whoever_writes(tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, cwd=files.ROOT, check=True
    )
    lines = run.stdout.splitlines()  # Python's own write, then the one of safetensors, which raises no OSError itself
    assert len(lines) == 2, run.stdout + run.stderr
    assert all(line.startswith(f"{errno.EFBIG} ") and "the disk is full" in line for line in lines)
    assert names(tmp_path) == []


def test_a_folder_that_refuses_is_explained():
    folder = Path("/sys/kernel")  # refuses new files even from the administrator
    if not folder.is_dir():
        pytest.skip("needs Linux's /sys")
    with pytest.raises(OSError, match=r"/sys/kernel/here/a.txt: (no permission|the file system is read-only).*choose"):
        files.write_text(folder / "here" / "a.txt", "")
    with pytest.raises(OSError, match=r"/sys/kernel/a.csv: (no permission|the file system is read-only).*choose"):
        files.append_row(folder / "a.csv", {"a": 1})


def test_a_path_through_a_file_is_explained(tmp_path):
    files.write_text(tmp_path / "a.txt", "")
    with pytest.raises(OSError, match=r"cannot write .*b.txt: .*path"):
        files.write_text(tmp_path / "a.txt" / "b.txt", "")


def test_errors_about_other_files_stay_as_they_are(tmp_path):
    with pytest.raises(FileNotFoundError) as caught, files.atomic_path(tmp_path / "copy"):
        (tmp_path / "elsewhere" / "missing").read_bytes()
    assert "cannot write" not in str(caught.value)


def test_rows_are_appended_as_csv(tmp_path):
    rows = [{"name": "a,b", "purpose": 'says "é"'}, {"name": "c", "purpose": "two\nlines"}]
    for row in rows:
        files.append_row(tmp_path / "a.csv", row)
    with (tmp_path / "a.csv").open(newline="", encoding="utf-8") as file:
        assert list(csv.DictReader(file)) == rows


def test_a_file_that_was_left_empty_gets_its_header(tmp_path):
    (tmp_path / "a.csv").touch()
    for number in "12":
        files.append_row(tmp_path / "a.csv", {"number": number})
    assert (tmp_path / "a.csv").read_text(encoding="utf-8") == "number\n1\n2\n"


def append_many(path: Path, name: str) -> None:
    for i in range(300):
        files.append_row(path, {"name": name, "number": i})


def test_two_processes_can_append_at_the_same_time(tmp_path):
    path = tmp_path / "a.csv"
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=append_many, args=(path, name)) for name in "ab"]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    with path.open(newline="", encoding="utf-8") as file:
        rows = [tuple(row.values()) for row in csv.DictReader(file)]
    assert sorted(rows) == sorted((name, str(i)) for name in "ab" for i in range(300))


def test_sha256_of_a_file_larger_than_a_buffer(tmp_path):
    content = bytes(range(256)) * 10_000
    files.write_bytes(tmp_path / "large", content)
    assert files.sha256(tmp_path / "large") == hashlib.sha256(content).hexdigest()


def test_a_block_is_replaced_between_its_marks_only(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- a -->\nold\n<!-- b -->\nafter\n", encoding="utf-8")
    files.replace_block(page, "<!-- a -->", "<!-- b -->", "new")
    assert page.read_text(encoding="utf-8") == "before\n<!-- a -->\nnew\n<!-- b -->\nafter\n"
    for begin, end in (("<!-- c -->", "<!-- b -->"), ("<!-- a -->", "<!-- c -->"), ("<!-- b -->", "<!-- a -->")):
        with pytest.raises(ValueError, match="page.md lacks the line"):
            files.replace_block(page, begin, end, "newer")
    assert "\nnew\n" in page.read_text(encoding="utf-8")


def test_a_folder_is_claimed_by_one_process_and_a_killed_one_leaves_it_free(tmp_path):
    folder = tmp_path / "new"
    code = "import sys, time; from utils import files\nwith files.claimed(sys.argv[1]): print(flush=1); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, folder], cwd=files.ROOT, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        assert files.is_claimed(folder)
        with pytest.raises(TimeoutError, match="new is being trained by another process"), files.claimed(folder):
            pass
        other.kill()
    assert list(folder.iterdir())  # the lock that is left
    assert not files.is_claimed(folder)
    with files.claimed(folder):
        assert files.is_claimed(folder)
    assert list(folder.iterdir()) == []
