"""Where files live, and how they are written so that a half-written one is never read."""

import contextlib
import csv
import errno
import glob
import hashlib
import io
import json
import os
import re
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import filelock
import platformdirs

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 60.0  # seconds that a process waits for another one that writes the same file
CHECKSUM, BEFORE = "rows_sha256", "before"  # in a JSON file that says what rows are
LENGTH = "rows_bytes"  # there, where rows are appended to a file: how many of its bytes the checksum is of
CLAIM = ".training.lock"  # held by the process that trains in the folder
OWN = "sha256"  # in a JSON file: the checksum of all the rest of it
READINGS = 10  # of two files until they fit together: another process may be writing them
ABANDONED = 3600.0  # seconds after which nobody works on a temporary file any more

_NO_PERMISSION = ("no permission to write there", "choose a folder that you may write to")
_NO_SPACE = ("the disk is full, or your quota is", "free some space, or choose a folder on another disk")
_WRITE_FAILURES = {  # what happened, what to do
    errno.ENOSPC: _NO_SPACE,
    errno.EFBIG: _NO_SPACE,
    getattr(errno, "EDQUOT", errno.ENOSPC): _NO_SPACE,  # Windows has no quota error
    errno.EACCES: _NO_PERMISSION,
    errno.EPERM: _NO_PERMISSION,
    errno.EROFS: ("the file system is read-only", "choose a folder that you may write to"),
    errno.ENOENT: ("its folder does not exist, or was deleted just now", "check the path, or try again"),
    errno.ENOTDIR: ("a part of the path is a file, not a folder", "check the path"),
    errno.EEXIST: ("a part of the path is a file, not a folder", "check the path"),
    errno.EISDIR: ("a folder of that name is in the way", "remove it, or choose another name"),
}


def cache_dir() -> Path:
    """The folder for downloads and decoded images, made on first use: the user's cache folder, or $CNN_CACHE_DIR."""
    return _folder("CNN_CACHE_DIR")


def results_dir() -> Path:
    """The folder for measured results, made on first use: `results/` in the repository, or $CNN_RESULTS_DIR."""
    return _folder("CNN_RESULTS_DIR")


def figures_dir() -> Path:
    """The folder for figures, made on first use: `figures/` in the repository, or $CNN_FIGURES_DIR."""
    return _folder("CNN_FIGURES_DIR")


def _place(variable: str) -> Path:
    """The folder that a variable of the environment names, or else the course's own."""
    own = {"CNN_RESULTS_DIR": ROOT / "results", "CNN_FIGURES_DIR": ROOT / "figures"}
    own["CNN_CACHE_DIR"] = Path(platformdirs.user_cache_dir("cnn-course", appauthor=False))
    return expanded(os.environ.get(variable) or own[variable])


def expanded(path: str | Path) -> Path:
    """The path with the home folder in place of ~ or ~name. Raises ValueError when nobody has that name."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{path}: there is no home folder of that name; write the whole path, or ./{path}") from error


def new_folder(path: str | Path) -> Path:
    """Makes the folder `path`, or, where it exists, `path`-2, `path`-3, …: one that nobody else has. Returns it."""
    path, number = Path(path), 1
    with _explaining(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            folder = path if number == 1 else path.with_name(f"{path.name}-{number}")
            try:
                folder.mkdir()
            except FileExistsError:
                number += 1
            else:
                return folder


def sha256(path: str | Path) -> str:
    """The SHA-256 checksum of a file as 64 hexadecimal digits, as `sha256sum` prints it."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, with the same suffix, and renames it over `path` when the block succeeds.

    A reader sees the old file or the whole new one. On any exception, Ctrl-C too, the temporary file is removed; one
    that a killed process left behind is, by a later write of the same file. Makes the parent folder. Raises OSError
    with the path, what happened and the remedy when the disk is full, a permission is missing or the folder cannot be
    made; its errno is that of the cause.
    """
    path = Path(path)
    if path.name in ("", ".."):
        raise ValueError(f"cannot write {path}: it is a folder; expected the name of a file")
    temporary = path.with_name(f".{path.stem}-{secrets.token_hex(4)}{path.suffix}")
    with _explaining(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            _remove_abandoned(path, temporary.stat().st_mtime - ABANDONED)
            temporary.replace(path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def temporaries(folder: str | Path, stem: str = "*", suffix: str = "") -> Iterator[Path]:
    """The temporary files of `atomic_path` in `folder`: those being written, and those that killed processes left."""
    return Path(folder).glob(f".{stem}-{'[0-9a-f]' * 8}{suffix or '*'}")


def _remove_abandoned(path: Path, before: float) -> None:
    """Removes temporary files of `path` last written `before` a time, by the clock of the file system that has them."""
    with contextlib.suppress(OSError):
        for left in temporaries(path.parent, glob.escape(path.stem), glob.escape(path.suffix)):
            if left.stat().st_mtime < before:
                left.unlink()


def write_bytes(path: str | Path, content: bytes) -> None:
    """Writes `content` to `path` through `atomic_path`; once more, if the folder is deleted meanwhile."""
    for last in (False, True):
        try:
            with atomic_path(path) as temporary:
                temporary.write_bytes(content)
            return
        except FileNotFoundError:
            if last:
                raise


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


@contextlib.contextmanager
def alone(path: str | Path) -> Iterator[None]:
    """Keeps other processes out of the block while one is in it: for a file that is read, changed and written.

    The lock is a hidden file beside `path`, which stays; it is held by the process only, and ends with it. Raises
    TimeoutError when another process holds it for a minute, OSError as `atomic_path`.
    """
    path = Path(path)
    lock = filelock.FileLock(path.with_name(f".{path.name}.lock"), timeout=PATIENCE)
    with contextlib.ExitStack() as held:
        with _explaining(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                held.enter_context(lock)
            except filelock.Timeout as error:
                what = f"cannot write {path}: another process has been at it for {PATIENCE:g} s"
                raise TimeoutError(f"{what}; end that one, or try again") from error
        yield


@contextlib.contextmanager
def claimed(folder: str | Path) -> Iterator[None]:
    """Keeps other processes from training in `folder` while one is in the block; makes the folder.

    The lock is a hidden file in it, removed afterwards; one that a killed process left behind holds nobody up. Raises
    TimeoutError at once when another process has the folder, OSError as `atomic_path`.
    """
    lock = filelock.FileLock(Path(folder) / CLAIM, timeout=0)
    with contextlib.ExitStack() as held:
        with _explaining(Path(folder) / CLAIM):
            Path(folder).mkdir(parents=True, exist_ok=True)
            try:
                held.enter_context(lock)
            except filelock.Timeout as error:
                what = f"the run in {folder} is being trained by another process"
                raise TimeoutError(f"{what}: wait until it has ended, end it, or name another folder") from error
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # Windows removes it when it is released
                (Path(folder) / CLAIM).unlink(missing_ok=True)


def is_claimed(folder: str | Path) -> bool:
    """True if a process is in `claimed(folder)` just now, or if that cannot be told: the lock is another user's."""
    if not (Path(folder) / CLAIM).exists():
        return False
    try:
        with claimed(folder):
            return False
    except (PermissionError, TimeoutError):
        return True


def append_row(path: str | Path, row: Mapping[str, object]) -> None:
    """Appends `row` to the CSV file at `path`, which begins with a header line of the row's keys.

    Processes may append at the same time. Raises what `alone` raises.
    """
    path = Path(path)
    with alone(path):
        before = path.read_bytes() if path.exists() else b""
        end = b"\n" if before and not before.endswith(b"\n") else b""  # of a row that something has cut off
        write_bytes(path, (before or _csv_line(row.keys())) + end + _csv_line(row.values()))


def write_rows(path: str | Path, rows: str, about: Mapping[str, Any]) -> None:
    """Writes `rows` to the CSV file at `path`, and to the JSON file beside it what they are rows of.

    Whenever this is interrupted, `read_rows` finds the old rows with the old record, or both new: while the rows are
    replaced, the new record has the old one in it, and the checksum in each says which rows are its own.
    """
    path, before = Path(path), None
    record = _sealed({**about, CHECKSUM: hashlib.sha256(rows.encode()).hexdigest()})
    with alone(path):
        with contextlib.suppress(OSError, ValueError):
            _, before = read_rows(path)
        write_text(path.with_suffix(".json"), _json(record | {BEFORE: before}))
        write_text(path, rows)
        write_text(path.with_suffix(".json"), _json(record))


def read_rows(path: str | Path) -> tuple[bytes, dict[str, Any] | None]:
    """The CSV file at `path`, and what it has rows of; None for that where either is not what was written.

    Raises FileNotFoundError when it is missing, or the JSON file beside it; ValueError when that is none.
    """
    for attempt in range(READINGS):
        time.sleep(0.01 if attempt else 0.0)
        rows = Path(path).read_bytes()
        record = _json_object(Path(path).with_suffix(".json"))
        both = record.pop(BEFORE, None) or {}, record
        found = [each for each in both if _is_whole(each) and each.get(CHECKSUM) == _sum(rows, each)]
        if found:
            return rows, found[0]
    return rows, None


def write_record(path: str | Path, record: Mapping[str, Any]) -> None:
    """Writes `record` to `path` as JSON, with a checksum of its own, through `atomic_path`."""
    write_text(path, _json(_sealed(record)))


def read_record(path: str | Path) -> dict[str, Any]:
    """What `write_record` wrote to `path`, or somebody by hand, without a checksum.

    Raises FileNotFoundError when it is missing, ValueError when it is no JSON object, or not the one that was written.
    """
    record = _json_object(Path(path))
    if not record or (OWN in record and not _is_whole(record)):
        raise ValueError("it is damaged or edited: the checksum in it is another one, or gone")
    return {name: value for name, value in record.items() if name != OWN}


def _json_object(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("lists within lists, too many") from error
    if not isinstance(record, dict):
        raise ValueError(f"it holds {type(record).__name__}, expected names and values")
    return record


def _sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with the checksum of all the rest of it, as JSON has it."""
    rest = {name: value for name, value in record.items() if name != OWN}
    return rest | {OWN: hashlib.sha256(json.dumps(rest).encode()).hexdigest()}


def _is_whole(record: Any) -> bool:
    return isinstance(record, dict) and OWN in record and _sealed(record)[OWN] == record[OWN]


def _sum(rows: bytes, record: Mapping[str, Any]) -> str:
    return hashlib.sha256(rows[: record.get(LENGTH)]).hexdigest()


def _json(record: Mapping[str, Any]) -> str:
    return json.dumps(record, indent=1) + "\n"


def _csv_line(values: Iterable[object]) -> bytes:
    line = io.StringIO(newline="")
    csv.writer(line, lineterminator="\n").writerow(values)
    return line.getvalue().encode()


def _folder(variable: str) -> Path:
    folder = _place(variable)
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
        raise OSError(code, f"cannot write {path}: {what}; {remedy}{_how(path)}") from error


def _how(path: Path) -> str:
    """How another folder is chosen for `path`, where that is done by a variable of the environment."""
    for variable in ("CNN_CACHE_DIR", "CNN_RESULTS_DIR", "CNN_FIGURES_DIR"):
        with contextlib.suppress(ValueError):
            if path.absolute().is_relative_to(_place(variable).absolute()):
                return f" (the environment variable {variable})"
    return ""


def _rust_errno(error: Exception) -> int | None:
    """safetensors raises errors of its own, with the system's number in the text only: "… (os error 28)"."""
    number = re.search(r"\(os error (\d+)\)", str(error))
    return int(number.group(1)) if number else None
