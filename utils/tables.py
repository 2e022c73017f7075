"""Tables of numbers on disk, as `files.write_rows` writes them, read so that a damaged one is refused."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from pandas.api.types import is_numeric_dtype

from utils import files

NUMBERS = ("lr", "seed", "epoch", "step", "value", "seconds", "n", "median", "min", "max")  # columns of these names


class ResultsError(ValueError):
    """Results that are missing, damaged or edited; the message says which and what to do."""


def read_table(
    path: str | Path,
    remedy: str | None = None,
    columns: Sequence[str] = (),
    *,
    by_hand: bool = False,
    dtype: dict[str, type] | None = None,
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Return the rows of the CSV file at `path`, which has `columns`, and what the JSON file beside it says of them.

    `by_hand`: the JSON file may be missing, or have no checksums. Raises ResultsError, which ends in `remedy` (None:
    from git), where a file is missing or unreadable, and where the rows or what is said of them are not as written.
    """
    path = Path(path)
    beside = path.with_suffix(".json")
    remedy = remedy or f"measure them again, or take them from git (git checkout {path.parent.name}/{path.stem}.*)"
    try:
        text, about = files.read_rows(path) if beside.exists() or not by_hand else (path.read_bytes(), {})
        if about is None and by_hand:
            about = _without_checksums(beside)
    except FileNotFoundError as error:
        raise ResultsError(f"no results: {error.filename} is missing; {remedy}") from error
    except (OSError, ValueError) as error:
        raise ResultsError(f"{path}, or {beside.name} beside it, cannot be read ({error}): {remedy}") from error
    if about is None:
        raise ResultsError(f"the rows in {path} are not those that were measured (damaged, or edited): {remedy}")
    return _parsed(path, text, remedy, columns, dtype), about


def read_record(path: str | Path, remedy: str) -> dict[str, Any]:
    """Return what `files.read_record` does. Raises ResultsError, which ends in `remedy`."""
    try:
        return files.read_record(path)
    except (OSError, ValueError) as error:
        raise ResultsError(f"cannot read {path} ({error}): {remedy}") from error


def _parsed(path: Path, text: bytes, remedy: str, columns: Sequence[str], dtype: Any) -> pd.DataFrame:
    try:
        rows = pd.read_csv(io.BytesIO(text), dtype=dtype)
        names = [name for name in ("variant", "run") if name in rows]
        if names:  # also those that look like a number, or like none (0.1, None, NA)
            rows[names] = pd.read_csv(io.BytesIO(text), usecols=names, dtype=str, keep_default_na=False)[names]
    except (ValueError, OverflowError) as error:
        raise ResultsError(f"{path} is no table that can be read ({error}): {remedy}") from error
    missing = [name for name in columns if name not in rows]
    if missing:
        raise ResultsError(f"{path} lacks the column {', '.join(missing)}: {remedy}")
    words = [name for name in NUMBERS if name in columns and not is_numeric_dtype(rows[name])]
    if words:
        raise ResultsError(f"{path} has no numbers, or other things too, in the column {', '.join(words)}: {remedy}")
    return rows


def _without_checksums(path: Path) -> dict[str, Any] | None:
    """Return a record that somebody wrote by hand; None for one that has a checksum, which was found to be wrong."""
    record = files.read_record(path)
    return None if files.CHECKSUM in record else record
