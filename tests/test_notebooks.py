"""The lessons as they are committed: executed, whole, and in step with their text twins, their figures and the README.

Each rule is a function that returns what it objects to, so that every rule is also shown to object to a broken lesson.
"""

import ast
import base64
import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from utils import experiments

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FIGURES = sorted((ROOT / "figures").glob("*.png"))
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "data").rglob("*.md")])

MAX_BYTES = 1_500_000
MAX_LINES = 25
MIN_ALT = 8  # characters
MACHINE_PATH = re.compile(r"(?<![\w.~/-])(?:/(?:tmp|root|home|work|Users|private|content)\b|[A-Z]:\\Users)[^\s'\")<]*")
ALT_OF_IMAGE = re.compile(r"!\[(.*?)\]\(|(<img\b[^>]*>)", re.DOTALL)
LINK = re.compile(r"\]\(<?([^)\s>]+)>?[^)]*\)|\b(?:src|href)=[\"']([^\"']+)[\"']")


# ---------------------------------------------------------------------------------------------- what a notebook holds


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """The code cells with something in them."""
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def markdown(notebook: NotebookNode) -> list[str]:
    return [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]


def outputs(notebook: NotebookNode) -> list[NotebookNode]:
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def output_texts(notebook: NotebookNode) -> Iterator[str]:
    """All text that the outputs show: streams, tracebacks, text, HTML, Markdown, SVG; pictures are left out."""
    for output in outputs(notebook):
        yield output.get("text", "")
        yield from output.get("traceback", [])
        for kind, value in output.get("data", {}).items():
            if kind.startswith("text/") or kind == "image/svg+xml":
                yield value if isinstance(value, str) else "".join(value)


def pictures(notebook: NotebookNode) -> list[bytes]:
    """The PNG files that the outputs show."""
    shown = (output.get("data", {}).get("image/png") for output in outputs(notebook))
    return [base64.b64decode(content) for content in shown if content]


def common_first_cell() -> str:
    """The cell that every lesson's code begins with: the block of CONTRIBUTING.md that looks for the course."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.DOTALL)
    return next(block.strip() for block in blocks if "find_spec" in block)


# ---------------------------------------------------------------------------------------------------------- the rules


def not_counted(notebook: NotebookNode) -> list[str]:
    """Run top to bottom in one go, all of it. A cell that never ran would also pass nbval, whatever it shows."""
    counts = [cell.execution_count for cell in code_cells(notebook)]
    return [] if counts == list(range(1, len(counts) + 1)) else [f"execution counts are {counts}, expected 1 to n"]


def widget_state(notebook: NotebookNode) -> list[str]:
    """GitHub shows a notebook with saved widget state as invalid."""
    return ["metadata.widgets is saved"] if "widgets" in notebook.metadata else []


def other_kernel(notebook: NotebookNode) -> list[str]:
    """`python3` is the one kernel name that every service knows."""
    name = notebook.metadata.get("kernelspec", {}).get("name")
    return [] if name == "python3" else [f"the kernel is {name!r}, expected 'python3'"]


def errors(notebook: NotebookNode) -> list[str]:
    raised = [output.ename for output in outputs(notebook) if output.output_type == "error"]
    return raised + ["a printed traceback" for text in output_texts(notebook) if "Traceback (most recent" in text]


def stderr(notebook: NotebookNode) -> list[str]:
    return [f"on stderr: {output.text[:80]!r}" for output in outputs(notebook) if output.get("name") == "stderr"]


def timing(notebook: NotebookNode) -> list[str]:
    """Timestamps would change at every execution."""
    return ["timing metadata is saved" for cell in notebook.cells if "execution" in cell.metadata]


def long_cells(notebook: NotebookNode) -> list[str]:
    return [
        f"{len(lines)} lines, at most {MAX_LINES}: {lines[0]}"
        for cell in code_cells(notebook)
        if len(lines := cell.source.strip().splitlines()) > MAX_LINES
    ]


def machine_paths(notebook: NotebookNode) -> list[str]:
    """A lesson shows nothing of the machine that it was executed on."""
    return [found for text in output_texts(notebook) for found in MACHINE_PATH.findall(text)]


def other_first_cell(notebook: NotebookNode) -> list[str]:
    cells = code_cells(notebook)
    return [] if cells and cells[0].source.strip() == common_first_cell() else ["does not begin with the common cell"]


def images_without_alt(notebook: NotebookNode) -> list[str]:
    """Images in the prose, pictures that a cell shows through Markdown or HTML, and figures, by metadata."""
    shown = [text for text in output_texts(notebook) if not text.lstrip().startswith("<svg")]
    figures = [output for output in outputs(notebook) if "image/png" in output.get("data", {})]
    bare = [output for output in figures if len(output.metadata.get("image/png", {}).get("alt", "")) < MIN_ALT]
    return [found for text in markdown(notebook) + shown for found in without_alt(text)] + [
        f"a figure without alternative text: {output.data.get('text/plain', '')}" for output in bare
    ]


def headings_out_of_order(notebook: NotebookNode) -> list[str]:
    """One title, and below it no level left out: screen readers jump from heading to heading."""
    prose = re.sub(r"```.*?```", "", "\n".join(markdown(notebook)), flags=re.DOTALL)
    levels = [len(marks) for marks in re.findall(r"^(#+) ", prose, re.MULTILINE)]
    jumps = [f"from level {a} to {b}" for a, b in itertools.pairwise(levels) if b > a + 1]
    return jumps if levels[:1] == [1] and levels.count(1) == 1 else [*jumps, "expected one title, and it first"]


def without_alt(text: str) -> list[str]:
    """The images in Markdown or HTML that have no alternative text."""
    return [
        match.group()
        for match in ALT_OF_IMAGE.finditer(text)
        if not (match[1] or re.search(r"\balt=[\"'][^\"']", match[2] or ""))
    ]


RULES = (
    not_counted,
    widget_state,
    other_kernel,
    errors,
    stderr,
    timing,
    long_cells,
    machine_paths,
    other_first_cell,
    images_without_alt,
    headings_out_of_order,
)


def good() -> NotebookNode:
    """A lesson that no rule objects to."""
    figure = new_output(
        "display_data",
        {"image/png": base64.b64encode(b"a picture").decode(), "text/plain": "<Figure>"},
        metadata={"image/png": {"alt": "Loss against epoch, falling"}},
    )
    cells = [
        new_markdown_cell("# A lesson\n\n![a network of four layers](../figures/network.png)"),
        new_code_cell(common_first_cell(), execution_count=1),
        new_code_cell(
            "print(1)", execution_count=2, outputs=[new_output("stream", name="stdout", text="1/2 in work\n")]
        ),
        new_code_cell("plot()", execution_count=3, outputs=[figure], metadata={"tags": ["figure"]}),
    ]
    return new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})


def printed(text: str, name: str = "stdout") -> Callable[[NotebookNode], None]:
    """A change that lets the last cell print `text`."""
    return lambda notebook: notebook.cells[-1].outputs.append(new_output("stream", name=name, text=text))


def shown(**data: str) -> Callable[[NotebookNode], None]:
    """A change that lets the last cell show `data`, such as html="<b>"."""
    data = {f"text/{kind}": value for kind, value in data.items()}
    return lambda notebook: notebook.cells[-1].outputs.append(new_output("display_data", data))


def changed(index: int, **fields) -> Callable[[NotebookNode], None]:
    """A change of one cell."""
    return lambda notebook: notebook.cells[index].update(fields)


def raised(notebook: NotebookNode) -> None:
    notebook.cells[-1].outputs.append(
        new_output("error", ename="ValueError", evalue="no", traceback=["ValueError: no"])
    )


BROKEN = [
    (not_counted, changed(2, execution_count=None)),
    (not_counted, changed(1, execution_count=7)),
    (widget_state, lambda notebook: notebook.metadata.update(widgets={})),
    (other_kernel, lambda notebook: notebook.metadata.kernelspec.update(name="cnn-course")),
    (other_kernel, lambda notebook: notebook.metadata.pop("kernelspec")),
    (errors, raised),
    (errors, printed("Traceback (most recent call last):\n")),
    (stderr, printed("UserWarning: slow\n", name="stderr")),
    (timing, changed(2, metadata={"execution": {"iopub.status.busy": "2026-01-01T00:00:00Z"}})),
    (long_cells, changed(2, source="\n".join(f"a = {n}" for n in range(MAX_LINES + 1)))),
    (machine_paths, printed("saved to /tmp/x/model.safetensors")),
    (machine_paths, printed("PosixPath('/home/me/cnn-course')")),
    (machine_paths, shown(html=r"C:\Users\me\cnn-course")),
    (other_first_cell, changed(1, source="import utils")),
    (images_without_alt, changed(0, source="# A lesson\n\n![](../figures/network.png)")),
    (images_without_alt, changed(0, source='# A lesson\n\n<img src="../figures/network.png" width="600">')),
    (images_without_alt, shown(markdown="![](data:image/png;base64,AAAA)")),
    (images_without_alt, lambda notebook: notebook.cells[-1].outputs[0].update(metadata={})),
    (headings_out_of_order, lambda notebook: notebook.cells.append(new_markdown_cell("### Skips a level"))),
    (headings_out_of_order, lambda notebook: notebook.cells.append(new_markdown_cell("# A second title"))),
    (headings_out_of_order, changed(0, source="No title, ![a network of four layers](../figures/network.png)")),
]


@pytest.mark.parametrize("rule", RULES)
def test_a_good_lesson_passes(rule):
    assert rule(good()) == []


@pytest.mark.parametrize(("rule", "damage"), BROKEN)
def test_a_broken_lesson_is_found(rule, damage):
    broken = good()
    damage(broken)
    assert rule(broken)
    assert [other for other in RULES if other is not rule and other(broken)] == []


def test_every_rule_is_shown_to_fail():
    assert {rule for rule, _ in BROKEN} == set(RULES)


# -------------------------------------------------------------------------------------------------------- the lessons


def test_the_first_lessons_are_there():
    assert {"00_start_here", "01_data_statistics"} <= {path.stem for path in NOTEBOOKS}


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def lesson(request) -> Path:
    return request.param


@pytest.mark.parametrize("rule", RULES)
def test_lesson(lesson, rule):
    assert rule(nbformat.read(lesson, as_version=4)) == []


def test_lesson_is_a_valid_notebook_of_moderate_size(lesson):
    nbformat.validate(nbformat.read(lesson, as_version=4))
    assert lesson.stat().st_size <= MAX_BYTES


# ----------------------------------------------------------------------------------------------------- the text twins


def twin_of(lesson: Path) -> Path:
    return lesson.parent / "src" / f"{lesson.stem}.py"


def content(notebook: NotebookNode) -> list[tuple]:
    """What the two files of a lesson have in common: kind, source and tags of each cell."""
    return [(cell.cell_type, cell.source.strip(), cell.metadata.get("tags", [])) for cell in notebook.cells]


def test_lesson_is_in_step_with_its_twin(lesson):
    twin = jupytext.read(twin_of(lesson))
    assert content(nbformat.read(lesson, as_version=4)) == content(twin)
    assert twin.metadata.get("kernelspec", {}).get("name") == "python3"


def test_every_twin_has_its_lesson():
    twins = (ROOT / "notebooks" / "src").glob("*.py")
    assert {path.stem for path in twins} == {path.stem for path in NOTEBOOKS}


@pytest.mark.parametrize(
    "damage", [changed(0, source="# Other"), changed(2, source="print(2)"), changed(3, metadata={})]
)
def test_a_changed_cell_is_out_of_step(damage):
    twin = jupytext.reads(jupytext.writes(good(), "py:percent"), "py:percent")
    assert content(twin) == content(good())
    broken = good()
    damage(broken)
    assert content(twin) != content(broken)


# -------------------------------------------------------------------------------------------------------- the figures


def saved_figures(code: str) -> dict[str, bool]:
    """The names that `code` gives to plots.save, each with whether the saved file is also what the notebook shows."""
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    return {
        call.args[1].value: all(not (word.arg == "show" and word.value.value is False) for word in call.keywords)
        for call in calls
        if ast.unparse(call.func) == "plots.save" and len(call.args) > 1 and isinstance(call.args[1], ast.Constant)
    }


def lesson_figures(lesson: Path) -> dict[str, bool]:
    return saved_figures(twin_of(lesson).read_text(encoding="utf-8"))


def test_saved_figures_are_found():
    code = "plots.save(fig, 'one')\nplots.save(draw(), 'two', show=False)\nother.save(fig, 'three')"
    assert saved_figures(code) == {"one": True, "two": False}


def test_every_figure_is_drawn_by_a_lesson_or_for_an_experiment():
    drawn = {name for path in NOTEBOOKS for name in lesson_figures(path)}
    drawn |= {f"evidence_{name}" for name in experiments.EXPERIMENTS}
    assert {path.stem for path in FIGURES} == drawn


def test_figures_are_the_ones_that_the_lesson_shows(lesson):
    seen = pictures(nbformat.read(lesson, as_version=4))
    names = [name for name, is_shown in lesson_figures(lesson).items() if is_shown]
    assert [name for name in names if (ROOT / "figures" / f"{name}.png").read_bytes() not in seen] == []


def alternative_texts(code: str) -> set[str]:
    """The texts that `code` gives to plots.save; of two, for shipped data and for the reader's, the first."""
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    saved = [call for call in calls if ast.unparse(call.func) == "plots.save"]
    texts = [call.args[2] for call in saved if len(call.args) > 2]
    return {(text.body if isinstance(text, ast.IfExp) else text).value for text in texts}


def test_figures_have_the_texts_that_the_lesson_gives_them(lesson):
    """Also those that were changed since it was executed."""
    shown = {output.metadata["image/png"]["alt"] for output in outputs(nbformat.read(lesson, as_version=4))
             if "image/png" in output.get("data", {})}  # fmt: skip
    given = alternative_texts(twin_of(lesson).read_text(encoding="utf-8"))
    assert given
    assert given - shown == set()


# ---------------------------------------------------------------------------------------------------- links and pages


def broken_links(text: str, folder: Path) -> list[str]:
    """The links and images in `text` that point to no file, seen from `folder`. Addresses on the web are not tried."""
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    targets = [(match[1] or match[2]).split("#")[0] for match in LINK.finditer(prose)]
    local = [target for target in targets if target and not re.match(r"[a-z]+:", target)]
    return [target for target in local if not (folder / target).exists()]


def test_readme_is_there():
    assert ROOT / "README.md" in PAGES


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_page_links_to_files_that_exist(page):
    text = page.read_text(encoding="utf-8")
    assert broken_links(text, page.parent) == []
    assert without_alt(text) == []


def test_lesson_links_to_files_that_exist(lesson):
    text = "\n\n".join(markdown(nbformat.read(lesson, as_version=4)))
    assert broken_links(text, lesson.parent) == []


def test_broken_links_are_found(tmp_path):
    (tmp_path / "here.md").write_text("", encoding="utf-8")
    whole = "[a](here.md) [b](here.md#part) [c](https://example.org/x) [d](#part) `[e](gone.md)` <img src='here.md'>"
    assert broken_links(whole, tmp_path) == []
    assert broken_links("[a](gone.md) ![b](gone.png 'title') <img src=\"gone.svg\">", tmp_path) == [
        "gone.md",
        "gone.png",
        "gone.svg",
    ]
