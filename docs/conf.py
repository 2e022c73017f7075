"""The course as a static site, from the lessons as they are committed: `make site`.

Sphinx reads the repository's own pages and notebooks; nothing is executed, and nothing is kept for the site alone. The
pages ask no other server for anything, so that the site also works from disk, without a network.
"""

import json
import re
import shutil
import sys
from pathlib import Path

import latex2mathml.converter
from docutils.nodes import SkipNode

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from utils import links  # noqa: E402

project = "What makes a convolutional network work"
author = copyright = "the authors of the course"
language = "en"
root_doc = "README"
LESSONS = [f"notebooks/{path.stem}" for path in sorted((ROOT / "notebooks").glob("*.ipynb"))]
PAGES = ["GLOSSARY", "CONTRIBUTING", "CHANGELOG"]
include_patterns = ["README.md", *(f"{page}.md" for page in PAGES), "notebooks/*.ipynb"]
ON_GITHUB = f"{links.COURSE}/blob/{links.REF}"  # where files are that are no pages of the site

extensions = ["myst_nb"]
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
myst_url_schemes = ["http", "https", "mailto"]
nb_execution_mode = "off"
nb_render_markdown_format = "myst"  # the equations in what a cell shows as Markdown, too
nb_mime_priority_overrides = [("html", "application/vnd.jupyter.widget-view+json", None)]  # its text says what it does
nb_ipywidgets_js = {}

html_theme = "sphinx_book_theme"
html_static_path, html_css_files = ["static"], ["site.css"]
html_title = project
html_math_renderer = "mathml"
html_copy_source = html_show_sourcelink = html_use_index = False
html_context = {"default_mode": "auto"}  # light or dark, as the reader's system is
html_theme_options = {
    "repository_url": links.COURSE,
    "repository_branch": links.REF,
    "use_repository_button": True,
    "use_download_button": False,
    "show_toc_level": 2,
    "home_page_in_toc": True,
}


def prepare(app, name: str, source: list[str]) -> None:
    """Turn a page as GitHub and JupyterLab read it into what Sphinx reads; called before each page is parsed."""
    if name in LESSONS:
        source[0] = json.dumps(lesson(json.loads(source[0])))
    else:
        source[0] = linked(source[0]) + (contents() if name == root_doc else "")


def contents() -> str:
    """Return the navigation, as Markdown: the lessons with the first half of their titles, then the other pages.

    (`utils.lessons` knows the titles too, but it needs torch, which the making of the site does without.)
    """
    lessons = []
    for name in LESSONS:
        heading = json.loads((ROOT / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"][0]["source"][0]
        lessons.append(f"{name[10:12]} {heading.removeprefix('# ').partition(':')[0].strip()} <{name}>")
    parts = {"Lessons": lessons, "Beside them": PAGES}
    trees = [f"```{{toctree}}\n:hidden:\n:caption: {part}\n\n" + "\n".join(parts[part]) + "\n```" for part in parts]
    return "\n\n".join(["", *trees, ""])


def lesson(notebook: dict) -> dict:
    """Return a notebook with links instead of badges, folded code where JupyterLab folds it, and its figures' texts."""
    cells = []
    for cell in notebook["cells"]:
        cell["source"] = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            cells.append(cell | {"source": linked(cell["source"])})
            continue
        cell["source"] = cell["source"].removeprefix("# NBVAL_CHECK_OUTPUT\n")
        if cell["metadata"].get("jupyter", {}).get("source_hidden"):
            cell["metadata"]["tags"] = [*cell["metadata"].get("tags", []), "hide-input"]
        cells += one_figure_each(cell)
    return notebook | {"cells": cells}


def one_figure_each(cell: dict) -> list[dict]:
    """Return a code cell as several, of which only the first shows its code: MyST-NB has one figure text a cell."""
    parts = [cell | {"metadata": dict(cell["metadata"]), "outputs": []}]
    for output in cell["outputs"]:
        alt = output.get("metadata", {}).get("image/png", {}).get("alt")
        if alt and "mystnb" in parts[-1]["metadata"]:
            parts.append(
                cell | {"metadata": {"tags": ["remove-input"]}, "outputs": [], "id": f"{cell['id']}-{len(parts)}"}
            )
        if alt:
            parts[-1]["metadata"]["mystnb"] = {"image": {"alt": alt}}
        parts[-1]["outputs"].append(output)
    return parts


def linked(text: str) -> str:
    """Return Markdown in which a badge, an image of another server, is the link behind it, and code is on GitHub."""
    text = re.sub(r"\[!\[([^\]]+)\]\(https://[^)]+\)\]", r"[\1]", text)
    return re.sub(r"\]\(((?:utils|results|data|LICENSE|CITATION)[^)]*)\)", rf"]({ON_GITHUB}/\1)", text)


def mathml(latex: str, display: str) -> str:
    return latex2mathml.converter.convert(latex, display=display)


def visit_math(self, node) -> None:
    self.body.append(mathml(node.astext(), "inline"))
    raise SkipNode


def visit_math_block(self, node) -> None:
    self.body.append(f'<div class="equation" tabindex="0">{mathml(node.astext(), "block")}</div>')
    raise SkipNode


def write_index(app, error: Exception | None) -> None:
    """Let the site open without the name of a page: index.html is the README."""
    if error is None:
        shutil.copyfile(Path(app.outdir) / "README.html", Path(app.outdir) / "index.html")


def setup(app) -> None:
    app.connect("source-read", prepare)
    app.connect("build-finished", write_index)
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))
