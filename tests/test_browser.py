"""Every lesson in JupyterLab, in a real browser: it runs to its end, and what it offers to play with answers."""

import os
import statistics
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import browser
import pytest
from browser import Lesson
from PIL import Image

from utils import compare

NAMES = sorted(path.stem for path in (browser.ROOT / "notebooks").glob("*.ipynb"))
ALWAYS = "01_data_statistics"  # is opened in the quick run, too
LESSONS = [pytest.param(name, marks=[] if name == ALWAYS else pytest.mark.thorough) for name in NAMES]
SLOWEST = 2.5  # seconds from a key to the new picture, median of a lesson; the goal is 0.5, the machine may be busy
PICTURES = Path(os.environ.get("CNN_SCREENSHOTS", browser.ROOT / ".cache" / "screenshots"))  # for people to look at
IN_THE_DARK = "03_batch_normalization"  # is also drawn in the dark theme

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(browser.MISSING is not None, reason=browser.MISSING or ""),
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
        browser.LATENCIES[lesson.name] = seconds
        assert statistics.median(seconds) < SLOWEST


def moves_of_sliders(lesson: Lesson, number: int) -> list[float]:
    """Move each slider of a cell to and fro, and return the seconds that each picture took."""
    sliders, seconds = lesson.cell(number).get_by_role("slider"), []
    lesson.go_to(number)  # JupyterLab moves the focus when another cell becomes the active one
    for slider in sliders.all():
        slider.focus()
        low, now, high = (float(slider.get_attribute(f"aria-value{name}")) for name in ("min", "now", "max"))
        there, back = ("ArrowRight", "ArrowLeft") if now < high else ("ArrowLeft", "ArrowRight")
        further = there if now + 2 <= high or (now == high and now - 2 >= low) else back
        for key in (there, back, there, further):
            seconds.append(lesson.press(number, key, "pictures", "text"))
    return seconds


def test_quizzes_answer_to_the_keyboard(lesson):
    """Tab leads to the buttons, Space chooses; something else is said of each answer."""
    quizzes = lesson.cells_with("exercises.quiz(")
    assert quizzes
    for number in quizzes:
        lesson.go_to(number)
        answers = lesson.cell(number).get_by_role("radio").count()
        said = []
        for _ in range(answers):
            lesson.tab_to(number, kind="radio")
            lesson.press(number, "Space", "text")
            said.append(lesson.cell(number).locator(".widget-htmlmath-content").inner_text())
        assert {sentence[0] for sentence in said} == {"✔", "✘"}
        assert len(set(said)) == answers


def test_keyboard_reaches_all_controls_and_is_not_trapped(lesson):
    """Each control of a cell, in the order in which they stand, and then it goes on."""
    for cell in lesson.cells():
        if cell["hasWidgets"]:
            stops = [at for at in lesson.tabs(cell["number"]) if at["kind"] != "canvas"]  # it gives the focus back
            reached = [at["number"] for at in stops if at["number"] >= 0]
            assert reached == lesson.controls(cell["number"]), f"cell {cell['number']}"


def test_controls_of_compared_runs_change_picture_and_table(lesson):
    """The sliders are moved above."""
    for number in lesson.cells_with("compare.explore"):
        lesson.go_to(number)
        for label in ("experiment", "metric", "against", "baseline"):
            choice = lesson.cell(number).get_by_label(label, exact=True)
            options, chosen = choice.evaluate("choice => [choice.options.length, choice.selectedIndex]")
            if options > 1:
                lesson.open_list(choice, 1 if chosen + 1 < options else -1)
                lesson.press(number, "Enter", "pictures", *([] if label == "against" else ["text"]))
        box = lesson.cell(number).get_by_role("checkbox").first
        for _ in range(2):
            lesson.after(number, partial(lesson.toggle, box), "pictures", "text")
        order = lesson.cell(number).get_by_label("sort by", exact=True)
        lesson.open_list(order, [*compare.SORTS].index("variant"))
        lesson.page.keyboard.press("Enter")
        lesson.page.wait_for_function(SORTED, arg=lesson.cell(number).element_handle())


SORTED = """cell => {
    const names = [...cell.querySelector('table').tBodies[0].rows].map(row => row.cells[0].innerText);
    return names.length > 1 && names.join() === [...names].sort().join();
}"""


def test_own_image_is_uploaded_and_drawn(lesson, tmp_path):
    """By the keyboard but for the drawing, which needs a mouse; what the network says of it is another picture."""
    for number in lesson.cells_with("plots.ask("):
        names = [at["name"] for at in lesson.tabs(number)]
        wanted = ["Upload an image (0)", "pen", "thickness", "Ask", "Clear", "invert: swap dark and light"]
        assert [name for name in dict.fromkeys(names) if name in wanted] == wanted
        Image.linear_gradient("L").save(tmp_path / "own.png")
        chooser = lesson.open_file_chooser(number, name="Upload an image (0)")
        lesson.after(number, partial(chooser.set_files, tmp_path / "own.png"), "pictures")
        lesson.tab_to(number, name="invert: swap dark and light")
        lesson.press(number, "Space", "pictures")
        lesson.draw(lesson.cell(number).locator("canvas"))
        lesson.go_to(number)
        lesson.tab_to(number, name="Ask")
        lesson.press(number, "Space", "pictures")


def test_text_stands_out_in_both_themes(lesson):
    """Of outputs and of controls, from what is behind it: a contrast of 4.5."""
    faint = {}
    for theme in ("JupyterLab Dark", "JupyterLab Light"):
        lesson.use_theme(theme)
        faint[theme] = lesson.page.evaluate(browser.FAINT)
    assert faint == {"JupyterLab Dark": [], "JupyterLab Light": []}


def test_pictures_for_people_to_look_at(lesson):
    for old in PICTURES.glob(f"{lesson.name}-*.png"):
        old.unlink()
    for width in (1280, 600):
        assert lesson.take_pictures(PICTURES / f"{lesson.name}-{width}", width)
    if lesson.name == IN_THE_DARK:
        lesson.use_theme("JupyterLab Dark")
        assert lesson.take_pictures(PICTURES / f"{lesson.name}-dark", 1280)
        lesson.use_theme("JupyterLab Light")


def test_page_logs_no_error(lesson):
    """In all that was done to it above."""
    assert lesson.errors == []
