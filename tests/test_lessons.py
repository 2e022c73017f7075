"""The README's table of lessons: every lesson, with the time that was measured."""

import ast
import json
import os
import re

import lesson_memory
import pytest

from utils import bench, files, lessons

NAMES = sorted(path.stem for path in (files.ROOT / "notebooks" / "src").glob("*.py"))


def test_every_lesson_is_described_in_three_sentences():
    assert list(lessons.ABOUT) == NAMES
    for about in lessons.ABOUT.values():
        assert sum(about.count(end) for end in (". ", "? ")) == 2
        assert about.endswith(".")


def test_titles_are_those_of_the_lessons():
    assert lessons.title("02_size_and_pooling") == "Size and pooling"
    start = (files.ROOT / "notebooks" / "src" / "00_start_here.py").read_text(encoding="utf-8")
    on_the_map = re.search(r"^LESSONS = (\[.*?^\])", start, re.MULTILINE | re.DOTALL).group(1)
    assert [title for _, title, _ in ast.literal_eval(on_the_map)] == [lessons.title(name) for name in NAMES]


def test_a_lesson_without_a_heading_is_named(tmp_path):
    (tmp_path / "notebooks").mkdir()
    cell = {"cell_type": "markdown", "source": ["## Not a title"]}
    (tmp_path / "notebooks" / "x.ipynb").write_text(json.dumps({"cells": [cell]}))
    with pytest.raises(ValueError, match=r"notebooks/x.ipynb has no heading"):
        lessons.title("x", tmp_path)
    with pytest.raises(ValueError, match=r"notebooks/x.ipynb lacks the sentence"):
        lessons.reading("x", tmp_path)


def test_reading_time_is_that_of_the_lessons_head():
    assert lessons.reading("06_full_training") == 60


@pytest.mark.parametrize("name", NAMES)
def test_reading_time_fits_the_length_of_the_lesson(name):
    """120 words or 30 lines of code a minute: slow enough to think. Folded cells are not counted."""
    words = lines = 0
    for cell in json.loads((files.ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            words += len(re.findall(r"\w+", re.sub(r"\(http[^)]*\)", "", source)))
        elif not cell["metadata"].get("jupyter", {}).get("source_hidden"):
            lines += sum(bool(line.strip()) for line in source.splitlines())
    assert abs(lessons.reading(name) - (words / 120 + lines / 30)) <= 5


def test_readme_has_the_table_with_the_seconds_that_were_measured():
    rows = bench.shipped()
    took = lessons.seconds(rows)
    assert set(took) == set(NAMES)
    readme = (files.ROOT / "README.md").read_text(encoding="utf-8")
    table = lessons.table(took, lessons.memory(rows), lessons.on_one_core(rows))
    assert f"{lessons.BEGIN}\n{table}\n{lessons.END}" in readme


def test_lessons_kept_their_budget_when_they_were_measured():
    """90 seconds and 1.5 GB, as the course promises."""
    rows = bench.shipped()
    rows = rows[rows["measurement"] == "lessons"]
    for row in rows.itertuples():
        assert row.median <= (90 if row.unit == "s" else 1.5), row.what


def test_lessons_were_usable_on_one_core_without_bf16():
    """The times are stated; the course promises that they are bearable."""
    took = lessons.on_one_core(bench.shipped())
    assert set(took) == set(NAMES)
    assert max(took.values()) < 300


def test_a_lesson_that_takes_too_much_memory_is_named():
    assert lesson_memory.too_large({"small": 10**9, "large": 2 * 10**9}) == ["large took 2.00 GB, at most 1.5 GB"]
    before = lesson_memory.peak(os.getpid())
    ballast = bytearray(b"x") * (before + 10**8)  # larger than all that was there so far
    assert lesson_memory.peak(os.getpid()) > len(ballast)


def test_a_machine_half_as_fast_takes_at_most_twice_the_time_and_a_faster_one_is_promised_nothing():
    loop = bench.shipped().set_index("what")["median"]["the course's loop, bf16"]
    took = lessons.seconds(bench.shipped())
    assert lessons.expected(loop / 2) == pytest.approx({name: 2 * time for name, time in took.items()})
    assert lessons.expected(10 * loop) == took
