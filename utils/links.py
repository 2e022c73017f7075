"""Where the course is on the web: the one place that says so, and the badges that open a lesson there.

`python cnn.py links --course URL --ref REF` writes another place into every file that names it.
"""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent  # `files` knows it too, but needs packages that the making of the site does without
COURSE, REF = "https://github.com/cnn-course/cnn-course", "main"
COLAB, BINDER = "https://colab.research.google.com", "https://mybinder.org"


def badges(lesson: str) -> str:
    """Return as Markdown the two badges that open `lesson` ("01_data_statistics") on Colab and on Binder."""
    colab, binder = addresses(lesson)
    colab = f"[![Open in Colab]({COLAB}/assets/colab-badge.svg)]({colab})"
    return f"{colab} [![Open on Binder]({BINDER}/badge_logo.svg)]({binder})"


def in_words(lesson: str) -> str:
    """Return as Markdown the two links behind `badges`, without their images."""
    colab, binder = addresses(lesson)
    return f"[Colab]({colab}), [Binder]({binder})"


def addresses(lesson: str) -> tuple[str, str]:
    """Return where `lesson` opens on Colab and on Binder."""
    course, path = COURSE.removeprefix("https://github.com/"), f"notebooks/{lesson}.ipynb"
    return f"{COLAB}/github/{course}/blob/{REF}/{path}", f"{BINDER}/v2/gh/{course}/{REF}?labpath={path}"


def moved(text: str, course: str, ref: str) -> str:
    """Return `text` with every link to the course, and the constant of a first cell, for another place.

    Raises ValueError unless `course` is the address of a GitHub repository and `ref` the name of a branch or tag.
    """
    if not re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+", course):
        raise ValueError(f"course={course!r}: expected https://github.com/OWNER/REPOSITORY")
    if not re.fullmatch(r"[\w.-]+", ref):
        raise ValueError(f"ref={ref!r}: expected the name of a branch or tag, without a slash")
    old, new = COURSE.removeprefix("https://github.com/"), course.removeprefix("https://github.com/")
    text = text.replace(f"{COLAB}/github/{old}/blob/{REF}/", f"{COLAB}/github/{new}/blob/{ref}/")
    text = text.replace(f"{BINDER}/v2/gh/{old}/{REF}?", f"{BINDER}/v2/gh/{new}/{ref}?")
    text = text.replace(f'COURSE, REF = "{COURSE}", "{REF}"', f'COURSE, REF = "{COURSE}", "{ref}"')
    return re.sub(rf"{re.escape(COURSE)}(?![\w-]|\.(?!git\b)\w)", course, text)  # not of cnn-course.github.io


def move(course: str, ref: str, root: Path = ROOT) -> list[Path]:
    """Write another place of the course into every file below `root` that names it, and return these files.

    Raises what `moved` does, and FileNotFoundError in a handout, which lacks the lessons' text twins.
    """
    from utils import files

    if not (root / "notebooks" / "src").exists():
        raise FileNotFoundError(f"{root} has no notebooks/src: run this in the course itself, before `make handout`")
    course = course.removesuffix("/").removesuffix(".git")
    paths = [root / name for name in ("README.md", "CONTRIBUTING.md", "CITATION.cff", "utils/links.py")]
    paths += sorted((root / "notebooks" / "src").glob("*.py"))
    texts = {path: path.read_text(encoding="utf-8") for path in paths}
    changed = {path: moved(text, course, ref) for path, text in texts.items() if moved(text, course, ref) != text}
    for path, text in changed.items():
        files.write_text(path, text)
    return list(changed)
