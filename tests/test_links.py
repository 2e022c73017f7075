"""Every lesson has badges that lead to itself; all links to the course come from one constant, and move with it."""

import re
import shutil
from pathlib import Path

import pytest

from utils import files, links

LESSONS = sorted((files.ROOT / "notebooks" / "src").glob("*.py"))
NEW = "https://github.com/someone/else.course"


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_begins_with_its_title_and_the_badges_that_open_it(path):
    first = path.read_text(encoding="utf-8").split("# %% [markdown]\n")[1]
    assert first.startswith("# # ")
    assert f"\n# {links.badges(path.stem)}\n" in first
    assert "**After this lesson you can** " in first


def opening(text: str) -> list[str]:
    """The addresses in `text` that open a notebook on Colab or Binder."""
    places = "|".join(re.escape(place) for place in (f"{links.COLAB}/github/", f"{links.BINDER}/v2/"))
    return re.findall(rf"(?:{places})[^)\s\"'<>]*", text)


def strange(text: str) -> list[str]:
    """Those of them that the one constant does not give for a lesson, or whose notebook is not there."""
    notebooks = [path for path in (files.ROOT / "notebooks").glob("*.ipynb") if path.is_file()]
    return sorted(set(opening(text)) - {address for path in notebooks for address in links.addresses(path.stem)})


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_opens_itself_and_nothing_else(path):
    """The notebook, which is what the services show, as well as its text twin."""
    notebook = files.ROOT / "notebooks" / f"{path.stem}.ipynb"
    for text in (path.read_text(encoding="utf-8"), notebook.read_text(encoding="utf-8")):
        assert sorted(opening(text)) == sorted(links.addresses(path.stem))
        assert strange(text) == []


def test_readme_opens_every_lesson_on_both():
    text = (files.ROOT / "README.md").read_text(encoding="utf-8")
    assert set(opening(text)) == {address for path in LESSONS for address in links.addresses(path.stem)}
    assert [path.stem for path in LESSONS if links.in_words(path.stem) not in text] == []
    assert strange(text) == []


@pytest.mark.parametrize("path", sorted(files.ROOT.glob("*.md")), ids=lambda path: path.stem)
def test_no_page_opens_what_is_not_there(path):
    assert strange(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("right", "wrong"),
    [("01_data_statistics", "01_gone"), (f"/{links.REF}", "/other"), (links.COURSE.rpartition("/")[2], "typed")],
)
def test_a_strange_badge_is_found(right, wrong):
    badges = links.badges("01_data_statistics")
    assert strange(badges) == []
    assert len(strange(badges.replace(right, wrong))) == 2


def test_the_address_that_one_clones_will_do(tmp_path):
    links.move(f"{NEW}.git", "v2", copy_of(tmp_path))
    assert f'COURSE, REF = "{NEW}", "v2"' in (tmp_path / "utils" / "links.py").read_text(encoding="utf-8")


def test_a_handout_cannot_move(tmp_path):
    with pytest.raises(FileNotFoundError, match="in the course itself, before `make handout`"):
        links.move(NEW, "v2", tmp_path)


def copy_of(root: Path) -> Path:
    """The files that name the course's place, below `root`."""
    named = ("README.md", "CONTRIBUTING.md", "CITATION.cff", "utils/links.py")
    for name in (*named, *(f"notebooks/src/{path.name}" for path in LESSONS)):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(files.ROOT / name, root / name)
    return root


def test_another_place_is_written_everywhere(tmp_path):
    changed = links.move(NEW, "v2", copy_of(tmp_path))
    assert len(changed) == len(LESSONS) + 4
    for path in changed:
        text = path.read_text(encoding="utf-8")
        assert "cnn-course/cnn-course" not in text
        assert NEW.removeprefix("https://github.com/") in text
    for path in LESSONS:
        text = (tmp_path / "notebooks" / "src" / path.name).read_text(encoding="utf-8")
        assert f'COURSE, REF = "{NEW}", "v2"' in text
        assert f"{links.COLAB}/github/someone/else.course/blob/v2/notebooks/{path.stem}.ipynb" in text
        assert f"{links.BINDER}/v2/gh/someone/else.course/v2?labpath=notebooks/{path.stem}.ipynb" in text


def test_a_place_whose_name_begins_like_the_old_one_is_written_once():
    new, first_cell = f"{links.COURSE}.github.io", 'COURSE, REF = "{}", "{}"'.format
    assert links.moved(first_cell(links.COURSE, links.REF), new, "v2") == first_cell(new, "v2")
    assert links.moved(f"{links.COURSE}.git at {links.COURSE}.", new, "v2") == f"{new}.git at {new}."


def test_the_same_place_changes_nothing(tmp_path):
    assert links.move(links.COURSE, links.REF, copy_of(tmp_path)) == []


@pytest.mark.parametrize(
    ("course", "ref", "named"),
    [("github.com/a/b", "main", "course='github.com/a/b'"), (NEW, "a/b", "ref='a/b'"), (NEW + '"', "main", "course=")],
)
def test_what_is_no_place_is_refused(tmp_path, course, ref, named):
    before = (copy_of(tmp_path) / "README.md").read_bytes()
    with pytest.raises(ValueError, match=named):
        links.move(course, ref, tmp_path)
    assert (tmp_path / "README.md").read_bytes() == before
