"""Every lesson in JupyterLab, in a real browser: it runs to its end, and what it offers to play with answers."""

import os
import statistics
from collections.abc import Iterator
from pathlib import Path

import browser
import pytest
from browser import Lesson
from PIL import Image

LESSONS = sorted(path.stem for path in (browser.ROOT / "notebooks").glob("*.ipynb"))
SLOWEST = 2.5  # seconds from a key to the new picture, median of a lesson; on a machine that is not busy 0.5 is the goal
PICTURES = Path(os.environ.get("CNN_SCREENSHOTS", browser.ROOT / ".cache" / "screenshots"))  # for people to look at
IN_THE_DARK = "03_batch_normalization"  # is also drawn in the dark theme

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(browser.what_is_missing() is not None, reason=f"{browser.what_is_missing()}"),
]


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> Iterator[str]:
    with browser.jupyterlab(tmp_path_factory.mktemp("jupyterlab")) as address:
        yield address


@pytest.fixture(scope="module")
def chromium() -> Iterator:
    with browser.chromium() as chromium:
        yield chromium


@pytest.fixture(scope="module", params=LESSONS)
def lesson(request, chromium, address) -> Iterator[Lesson]:
    """Each lesson, opened and run once for the tests below."""
    lesson = Lesson(chromium, address, request.param)
    lesson.run_all()
    yield lesson
    lesson.close()


def test_all_cells_run_without_an_error(lesson):
    code = [cell for cell in lesson.cells() if cell["code"]]
    assert {cell["number"]: cell["errors"] for cell in code if cell["errors"]} == {}
    assert [cell["count"] for cell in code] == list(range(1, len(code) + 1))


def test_live_plots_show_several_frames(lesson):
    frames = {number: lesson.frames(number) for number in lesson.cells_with("live.update(")}
    assert len(frames) == (lesson.name[:2] in ("00", "06"))
    assert [number for number, count in frames.items() if count < 3] == [], frames


def test_sliders_change_picture_and_text(lesson):
    """By the keyboard alone; the first picture of a value is drawn then, the others are kept."""
    cells = lesson.cells_with("plots.explore", "compare.explore")
    seconds = [taken for number in cells for taken in moves_of_sliders(lesson, number)]
    assert len(seconds) >= 4 * len(cells)
    if seconds:
        browser.LATENCIES[lesson.name] = statistics.median(seconds)
        assert statistics.median(seconds) < SLOWEST


def moves_of_sliders(lesson: Lesson, number: int) -> list[float]:
    """Move each slider of a cell to and fro, and return the seconds that each picture took."""
    sliders, seconds = lesson.cell(number).get_by_role("slider"), []
    for slider in sliders.all():
        slider.focus()
        low, now, high = (float(slider.get_attribute(f"aria-value{name}")) for name in ("min", "now", "max"))
        there, back = ("ArrowRight", "ArrowLeft") if now < high else ("ArrowLeft", "ArrowRight")
        further = there if now + 2 <= high or (now == high and now - 2 >= low) else back
        for key in (there, back, there, further):
            readout = slider.locator("xpath=ancestor::*[contains(@class, 'widget-hslider')]//*[contains(@class, 'readout')]")
            before = readout.inner_text()
            seconds.append(lesson.press(number, key))
            assert readout.inner_text() != before
    return seconds
