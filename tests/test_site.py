"""The static site: built from the lessons as they are, whole without a network, readable by everybody."""

import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

import browser
import pytest

from utils import links

ROOT = Path(__file__).parent.parent
LESSONS = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
PAGES = ["index", "README", "GLOSSARY", "CONTRIBUTING", "CHANGELOG", *(f"notebooks/{name}" for name in LESSONS)]


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path:
    """The site, built without a warning."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-M", "html", str(ROOT), str(out), "-c", str(ROOT / "docs")]
    done = subprocess.run([*command, "--quiet", "--fail-on-warning", "--keep-going"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out / "html"


class Elements(HTMLParser):
    """The start tags of a page: (tag, attributes)."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.found.append((tag, {name: value or "" for name, value in attributes}))

    handle_startendtag = handle_starttag

    def of(self, *tags: str) -> list[dict[str, str]]:
        return [attributes for tag, attributes in self.found if tag in tags]


@pytest.fixture(params=PAGES)
def page(request, site) -> tuple[Path, Elements]:
    path = site / f"{request.param}.html"
    return path, Elements(path.read_text(encoding="utf-8"))


def test_there_is_a_page_for_each_lesson(site):
    built = {path.relative_to(site).with_suffix("").as_posix() for path in site.rglob("*.html")}
    assert {name for name in built if not name.startswith("_static")} == {*PAGES, "search"}


def test_page_asks_no_other_server(page):
    """Links lead elsewhere; scripts, styles, fonts and pictures all lie beside the page."""
    _, elements = page
    loaded = [
        value
        for attributes in elements.of("script", "img", "link", "iframe", "source", "video")
        for name, value in attributes.items()
        if name in ("src", "href", "srcset") and attributes.get("rel") != "canonical"
    ]
    assert loaded
    assert [value for value in loaded if re.match(r"(https?:)?//", value)] == []


def test_links_of_the_page_lead_to_files(page):
    path, elements = page
    targets = [urlsplit(attributes["href"]) for attributes in elements.of("a", "link") if "href" in attributes]
    local = [unquote(target.path) for target in targets if not target.scheme and not target.netloc and target.path]
    assert [target for target in local if not (path.parent / target).exists()] == []


def test_pictures_of_the_page_have_an_alternative_text(page):
    """None is empty, and none is a path, which Sphinx puts where no text is."""
    _, elements = page
    alts = [attributes.get("alt", "") for attributes in elements.of("img")]
    assert [alt for alt in alts if len(alt) < 8 or alt.endswith(".png")] == []


def test_each_figure_of_a_lesson_has_its_own_text(site):
    """Not that of another figure of the same cell."""
    for name in LESSONS:
        alts = [tag.get("alt") for tag in Elements((site / f"notebooks/{name}.html").read_text("utf-8")).of("img")]
        assert len(set(alts)) == len(alts) > 0, name


def test_page_has_a_title_a_language_and_a_width(page):
    path, elements = page
    text = path.read_text(encoding="utf-8")
    assert [attributes.get("lang") for attributes in elements.of("html")] == ["en"]
    assert re.search(r"<title>[^<]{6,}</title>", text)
    assert "width=device-width" in text


def test_lesson_links_to_colab_and_binder(site):
    for name in LESSONS:
        hrefs = {a.get("href") for a in Elements((site / f"notebooks/{name}.html").read_text("utf-8")).of("a")}
        assert set(links.addresses(name)) <= hrefs, name


def test_equations_are_mathml(site):
    text = (site / "notebooks" / "03_batch_normalization.html").read_text(encoding="utf-8")
    assert text.count("<math ") > 20
    assert "<mfrac>" in text
    for name in LESSONS:
        page = (site / f"notebooks/{name}.html").read_text(encoding="utf-8")
        shown = re.sub(r"<(pre|code|script|style|title)\b.*?</\1>", "", page, flags=re.DOTALL)
        assert re.findall(r"\\(?:frac|mathbf|sqrt|sum|hat|text|operatorname)\b", shown) == [], name
        assert "merror" not in shown


def test_solutions_are_folded(site):
    for name in LESSONS:
        text = (site / f"notebooks/{name}.html").read_text(encoding="utf-8")
        for place in [match.start() for match in re.finditer(r"# Solution: click", text)]:
            assert text.rfind("<details", 0, place) > text.rfind("</details>", 0, place), name


# ---------------------------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def address(site) -> Iterator[str]:
    """Where the site is served, on this machine."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(site))
    handler.log_message = lambda *args: None
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def chromium() -> Iterator:
    if missing := browser.what_is_missing():
        pytest.skip(missing)
    with browser.chromium() as launched:
        yield launched


class Tab:
    """A page of the site in the browser, with no network but this machine's own; what went wrong is noted."""

    def __init__(self, chromium, address: str) -> None:
        self.address, self.asked, self.errors = address, [], []
        self.page = chromium.new_page(viewport={"width": 1280, "height": 900})
        self.page.route(lambda url: not url.startswith(address), self.refuse)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda said: self.errors.append(said.text) if said.type == "error" else None)

    def refuse(self, route) -> None:
        self.asked.append(route.request.url)
        route.abort()

    def open(self, name: str) -> None:
        self.page.goto(f"{self.address}/{name}.html", wait_until="networkidle")


@pytest.fixture(scope="module")
def tab(chromium, address) -> Iterator[Tab]:
    tab = Tab(chromium, address)
    yield tab
    tab.page.close()


@pytest.fixture(scope="module", params=PAGES[1:])
def opened(request, chromium, address) -> Iterator[Tab]:
    """Each page, opened once for the tests below."""
    tab = Tab(chromium, address)
    tab.open(request.param)
    yield tab
    tab.page.close()


def test_page_stays_on_this_machine(opened):
    assert opened.asked == opened.errors == []
    assert opened.page.evaluate("document.images.length") > 0 or "notebooks" not in opened.page.url
    broken = "[...document.images].filter(image => image.complete && !image.naturalWidth).map(image => image.src)"
    assert opened.page.evaluate(broken) == []


RULES = (
    "button-name color-contrast document-title heading-order html-has-lang image-alt label landmark-one-main link-name "
    "list page-has-heading-one scrollable-region-focusable target-size"
)


@pytest.mark.parametrize("scheme", ["light", pytest.param("dark", marks=pytest.mark.thorough)])
def test_page_can_be_read_by_everybody(opened, scheme):
    """By the rules of axe, which Lighthouse applies too."""
    from axe_playwright_python.sync_playwright import Axe

    opened.page.add_style_tag(content="* {transition: none !important}")
    opened.page.emulate_media(color_scheme=scheme)
    opened.page.wait_for_function(f"document.documentElement.dataset.theme === '{scheme}'")
    code = [] if "00_start" in opened.page.url else [["pre"]]  # thousands of coloured words: those of one page will do
    found = Axe().run(opened.page, {"exclude": code}, {"runOnly": RULES.split()}).response["violations"]
    assert [f"{rule['id']}: {node['target']} {node['any'][:1]}" for rule in found for node in rule["nodes"]] == []


def test_page_fits_a_phone(opened):
    """What is wider than the page scrolls by itself; text is large enough."""
    opened.page.set_viewport_size({"width": 390, "height": 800})
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= 390
    size = "parseFloat(getComputedStyle(document.querySelector('article p')).fontSize)"
    assert opened.page.evaluate(size) >= 14


def test_search_finds_running_variance(tab):
    tab.open("index")
    tab.page.keyboard.press("Control+k")
    tab.page.keyboard.type("running variance")
    tab.page.keyboard.press("Enter")
    tab.page.wait_for_selector("ul.search li a")
    tab.page.wait_for_load_state("networkidle")
    found = tab.page.eval_on_selector_all("ul.search li a", "links => links.map(link => link.href)")
    assert any("03_batch_normalization" in href for href in found)
    assert tab.asked == tab.errors == []


def test_lessons_follow_each_other(tab):
    tab.open("index")
    for name in LESSONS:
        tab.page.click("a.right-next")
        tab.page.wait_for_url(f"**/{name}.html")
        assert tab.page.locator("nav li.current > a").count() > 0
