"""Where files live, and how they are written so that a half-written one is never read."""

import contextlib
import csv
import errno
import hashlib
import io
import os
import re
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import platformdirs

ROOT = Path(__file__).resolve().parent.parent

_NO_PERMISSION = ("no permission to write there", "choose a folder that you may write to")
_NO_SPACE = ("the disk is full, or your quota is", "free some space, or choose a folder on another disk")
_WRITE_FAILURES = {  # what happened, what to do
    errno.ENOSPC: _NO_SPACE,
    errno.EFBIG: _NO_SPACE,
    getattr(errno, "EDQUOT", errno.ENOSPC): _NO_SPACE,  # Windows has no quota error
    errno.EACCES: _NO_PERMISSION,
    errno.EPERM: _NO_PERMISSION,
    errno.EROFS: ("the file system is read-only", "choose a folder that you may write to"),
    errno.ENOENT: ("the folder does not exist and could not be made", "check the path"),
    errno.ENOTDIR: ("a part of the path is a file, not a folder", "check the path"),
    errno.EEXIST: ("a part of the path is a file, not a folder", "check the path"),
}


def cache_dir() -> Path:
    """The folder for downloads and decoded images, made on first use: the user's cache folder, or $CNN_CACHE_DIR."""
    return _folder(os.environ.get("CNN_CACHE_DIR") or platformdirs.user_cache_dir("cnn-course", appauthor=False))


def results_dir() -> Path:
    """The folder for measured results, made on first use: `results/` in the repository, or $CNN_RESULTS_DIR."""
    return _folder(os.environ.get("CNN_RESULTS_DIR") or ROOT / "results")


def figures_dir() -> Path:
    """The folder for figures, made on first use: `figures/` in the repository, or $CNN_FIGURES_DIR."""
    return _folder(os.environ.get("CNN_FIGURES_DIR") or ROOT / "figures")


def sha256(path: str | Path) -> str:
    """The SHA-256 checksum of a file as 64 hexadecimal digits, as `sha256sum` prints it."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, with the same suffix, and renames it over `path` when the block succeeds.

    A reader sees the old file or the whole new one. On any exception, Ctrl-C too, the temporary file is removed.
    Makes the parent folder. Raises OSError with the path, what happened and the remedy when the disk is full, a
    permission is missing or the folder cannot be made; its errno is that of the cause.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}-{secrets.token_hex(4)}{path.suffix}")
    with _explaining(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            temporary.replace(path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def write_bytes(path: str | Path, content: bytes) -> None:
    """Writes `content` to `path` through `atomic_path`."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: str | Path, text: str) -> None:
    """Writes `text` to `path` as UTF-8 with the line endings it has, through `atomic_path`."""
    write_bytes(path, text.encode())


def replace_block(path: str | Path, begin: str, end: str, text: str) -> None:
    """Puts `text` between the lines `begin` and `end` of the UTF-8 file at `path`.

    Raises ValueError when they are not there.
    """
    before, found, rest = Path(path).read_text(encoding="utf-8").partition(begin)
    _, found_too, after = rest.partition(end)
    if not (found and found_too):
        raise ValueError(f"{path} lacks the line {begin!r} or, after it, {end!r}: put both where the block belongs")
    write_text(path, f"{before}{begin}\n{text}\n{end}{after}")


def append_row(path: str | Path, row: Mapping[str, object]) -> None:
    """Appends `row` to the CSV file at `path`, which begins with a header line of the row's keys.

    Processes may append at the same time, but not on Windows: elsewhere a row is one write at the end of the file, and
    nothing comes between. Raises OSError as `atomic_path`.
    """
    path, header, line = Path(path), _csv_line(row.keys()), _csv_line(row.values())
    append = os.O_WRONLY | os.O_APPEND | getattr(os, "O_BINARY", 0)
    with _explaining(path):
        try:
            file = os.open(path, append | os.O_CREAT | os.O_EXCL, 0o666)  # only one process can be the first
            line = header + line
        except FileExistsError:
            file = os.open(path, append)
            if _stays_empty(file):
                line = header + line
        try:
            os.write(file, line)
        finally:
            os.close(file)


def _stays_empty(file: int, seconds: float = 1.0) -> bool:
    """Whether the open file is still empty after so long: else somebody has just made it, and writes the header."""
    deadline = time.monotonic() + seconds
    while not (written := os.fstat(file).st_size) and time.monotonic() < deadline:
        time.sleep(0.001)
    return not written


def _csv_line(values: Iterable[object]) -> bytes:
    line = io.StringIO(newline="")
    csv.writer(line, lineterminator="\n").writerow(values)
    return line.getvalue().encode()


def _folder(path: str | Path) -> Path:
    folder = Path(path).expanduser()
    with _explaining(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def _explaining(path: Path) -> Iterator[None]:
    """Says path, cause and remedy when the block cannot write to `path`, in an OSError of the same errno."""
    try:
        yield
    except Exception as error:
        code = error.errno if isinstance(error, OSError) else _rust_errno(error)
        about = Path(getattr(error, "filename", None) or path)
        elsewhere = about not in (path, *path.parents) and about.parent != path.parent
        if code not in _WRITE_FAILURES or elsewhere:
            raise
        what, remedy = _WRITE_FAILURES[code]
        raise OSError(code, f"cannot write {path}: {what}; {remedy}") from error


def _rust_errno(error: Exception) -> int | None:
    """safetensors raises errors of its own, with the system's number in the text only: "… (os error 28)"."""
    number = re.search(r"\(os error (\d+)\)", str(error))
    return int(number.group(1)) if number else None
