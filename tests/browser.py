"""JupyterLab in headless Chromium, for tests/test_browser.py: a server, and a lesson that is opened and run in it."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
PATIENCE = 300  # seconds that a cell may take: machines that test are busy
SHORTLY = 60  # seconds that anything else may take
LATENCIES: dict[str, list[float]] = {}  # of a lesson: the times from a key to the new picture, seconds
TALLEST = 16_000  # pixels of a picture; Chromium draws none above 16,384
SETTINGS = {
    "@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False},
    "@jupyterlab/docmanager-extension:plugin": {"autosave": False},
    # Otherwise cells out of view are not drawn, and a picture of the whole ends in an empty page.
    "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none", "scrollPastEnd": False},
}


def what_is_missing() -> str | None:
    """Return what keeps the lessons from being tested in a browser, and what to do; None if they can be."""
    if sys.platform == "win32":
        return "they are not tested on Windows"
    if find_spec("playwright") is None:
        return "playwright is not installed. Install it: pip install -r requirements-dev.txt -c constraints.txt"
    if CHROMIUM is None:
        return "no Chromium was found. Install it (Debian, Ubuntu: apt install chromium; elsewhere: Chrome on the PATH)"
    return None


MISSING = what_is_missing()


def wait_until(true, what: str, seconds: float = SHORTLY) -> None:
    """Return when `true()` is, and raise TimeoutError that says `what` was waited for when it is not in time."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {seconds:.0f} s in vain: {what}")
        time.sleep(0.1)


# ---------------------------------------------------------------------------------------------------- the server


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def environment(folder: Path) -> dict[str, str]:
    """Return the environment of a Jupyter whose every trace, and that of its kernels, stays in `folder`."""
    for name in ("config/labconfig", "data", "runtime", "checkpoints", "cache", "figures"):
        (folder / name).mkdir(parents=True)
    (folder / "config/labconfig/default_setting_overrides.json").write_text(json.dumps(SETTINGS), encoding="utf-8")
    shutil.copytree(ROOT / "results", folder / "results")
    jupyter = {f"JUPYTER_{name.upper()}_DIR": str(folder / name) for name in ("config", "data", "runtime")}
    course = {f"CNN_{name.upper()}_DIR": str(folder / name) for name in ("results", "figures", "cache")}
    small = {"CNN_BUDGET": "small", "CNN_DEVICE": "cpu", "OMP_WAIT_POLICY": "passive"}
    own = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}  # the tests' own: no pictures
    return {**own, **jupyter, **course, **small}


@contextmanager
def jupyterlab(folder: Path) -> Iterator[str]:
    """Run JupyterLab on the repository, and yield the address of a notebook in it, with {} for its path."""
    port, token = free_port(), secrets.token_hex(16)
    options = [f"--port={port}", f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={ROOT}"]
    options += [f"--FileCheckpoints.checkpoint_dir={folder / 'checkpoints'}", "--LabApp.expose_app_in_browser=True"]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1"]
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(
            [*command, "--ServerApp.port_retries=0", *options], env=environment(folder), stdout=log, stderr=log
        )
        try:
            wait_until(lambda: answers(port) or server.poll() is not None, "JupyterLab to start")
            assert server.poll() is None, (folder / "server.log").read_text()
            yield f"http://127.0.0.1:{port}/lab/tree/{{}}?reset&token={token}"
        finally:
            server.terminate()  # it ends its kernels
            server.wait(60)


@contextmanager
def chromium() -> Iterator[Any]:
    """Run a headless Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


# ------------------------------------------------------------------------------------------------------- a lesson

NOTEBOOK = "const notebook = window.jupyterapp.shell.currentWidget.content;"
# "Run All Cells" is lost unless the kernel is connected, which its icon alone does not tell.
READY = """() => {
    const widget = window.jupyterapp?.shell?.currentWidget;
    return widget?.context?.isReady && widget.sessionContext?.isReady
        && widget.sessionContext.session?.kernel?.connectionStatus === 'connected'
        && widget.sessionContext.session.kernel.status === 'idle';
}"""
CELLS = f"""() => {{
    {NOTEBOOK}
    return notebook.widgets.map((widget, number) => {{
        const cell = widget.model.toJSON(), code = cell.cell_type === 'code';
        return {{
            number, code, source: cell.source, count: code ? cell.execution_count : null,
            errors: (cell.outputs ?? []).filter(output => output.output_type === 'error')
                .map(error => error.ename + ': ' + error.evalue),
            hasWidgets: widget.node.querySelector('.jp-OutputArea .jupyter-widgets') !== null,
        }};
    }});
}}"""
# How many code cells have run; true when all have and the kernel rests, and after an error, which stops the rest.
PROGRESS = f"""before => {{
    {NOTEBOOK}
    const code = notebook.widgets.map(widget => widget.model).filter(model => model.type === 'code');
    const ran = code.filter(model => model.executionCount !== null);
    const failed = ran.some(model => model.outputs.toJSON().some(output => output.output_type === 'error'));
    const idle = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.status === 'idle';
    if (failed || ran.length === code.length) return failed || idle;
    return ran.length > before && ran.length;
}}"""
# Notes each picture that a cell shows, however short, as a live plot's are.
WATCH = f"""() => {{
    {NOTEBOOK}
    window.pictures = new Map();
    const note = image => {{
        const cell = image.closest('.jp-Cell');
        if (cell && image.src) window.pictures.set(cell, (window.pictures.get(cell) ?? new Set()).add(image.src));
    }};
    const look = node => node.matches?.('img') ? note(node) : node.querySelectorAll?.('img').forEach(note);
    new MutationObserver(changes => changes.forEach(change => [change.target, ...change.addedNodes].forEach(look)))
        .observe(notebook.node, {{subtree: true, childList: true, attributes: true, attributeFilter: ['src']}});
}}"""
FRAMES = f"number => {{ {NOTEBOOK} return window.pictures.get(notebook.widgets[number].node)?.size ?? 0; }}"
# What a cell shows below its code: the sources of its pictures, and its text.
SHOWN = """cell => {
    const output = cell.querySelector('.jp-OutputArea');
    const images = [...output.querySelectorAll('.jp-RenderedImage img')];
    const pictures = images.every(image => image.complete) && images.map(image => image.src).join(' ');
    return {pictures, text: output.innerText};
}"""
BEFORE = f"""cell => {{
    window.shown = ({SHOWN})(cell);
    window.acted = performance.now();
    addEventListener('keydown', () => {{ window.acted = performance.now(); }}, {{capture: true, once: true}});
}}"""
# Milliseconds from the key to what it changed, once that can be seen.
AFTER = f"""([cell, what]) => {{
    const now = ({SHOWN})(cell);
    return what.every(kind => now[kind] && now[kind] !== window.shown[kind]) && performance.now() - window.acted;
}}"""
FOCUSED = f"""() => {{
    {NOTEBOOK}
    const element = document.activeElement, cell = element.closest('.jp-Cell');
    const label = element.labels?.[0] ?? element.closest('.jupyter-widgets')?.querySelector('label');
    return {{
        cell: notebook.widgets.findIndex(widget => widget.node === cell), body: element === document.body,
        number: cell ? [...cell.querySelectorAll('.jp-OutputArea *')].indexOf(element) : -1,
        kind: element.getAttribute('role') ?? element.type ?? element.tagName.toLowerCase(),
        name: (element.matches('button') ? element : label)?.innerText.trim() ?? '',
    }};
}}"""
# What the keyboard should reach in the output of a cell. (The square to draw in is for the mouse, and keeps every key.)
CONTROLS = """cell => [...cell.querySelectorAll('.jp-OutputArea *')].flatMap((element, number) =>
    element.matches('a[href], button, input, select, [contenteditable], [tabindex="0"]:not(canvas)')
        && element.checkVisibility() ? [number] : [])"""
TO_NOTEBOOK = f"() => {{ {NOTEBOOK} document.activeElement.blur(); notebook.mode = 'command'; notebook.activate(); }}"
# The cell that the arrow keys have come to, once it has the focus.
ACTIVE = f"""() => {{
    {NOTEBOOK}
    return document.activeElement === notebook.activeCell.node ? {{cell: notebook.activeCellIndex}} : null;
}}"""


class Lesson:
    """A lesson in a page of the browser; cells are numbered from 0, those of text too."""

    def __init__(self, browser: Any, address: str, name: str) -> None:
        self.name, self.errors, self.choosers = name, [], []
        self.page = browser.new_page(viewport={"width": 1280, "height": 900})
        self.page.set_default_timeout(1000 * SHORTLY)
        self.page.on("pageerror", lambda error: self.errors.append(f"{error} {error.stack}"))
        self.page.on("console", lambda said: self.errors.append(said.text) if said.type == "error" else None)
        here = address.partition("/lab")[0]
        self.page.on("filechooser", lambda chooser: self.choosers.append(chooser))  # no bound method of a built-in
        self.page.route(lambda url: not url.startswith(here), self.stand_in)
        self.page.goto(address.format(f"notebooks/{name}.ipynb"))
        self.page.wait_for_function(READY)
        self.command("notebook:clear-all-cell-outputs")  # what is there afterwards has been run
        self.page.evaluate(WATCH)

    @staticmethod
    def stand_in(route: Any) -> None:
        """Answer with an empty picture where a badge is fetched from another server."""
        empty = '<svg xmlns="http://www.w3.org/2000/svg" width="1" height="1"/>'
        route.fulfill(content_type="image/svg+xml", body=empty)

    def command(self, name: str, **options: Any) -> None:
        self.page.evaluate("([name, options]) => window.jupyterapp.commands.execute(name, options)", [name, options])

    def run_all(self) -> None:
        """Choose "Run All Cells" from the menu, and return when all have run, or one has failed."""
        self.page.get_by_role("menuitem", name="Run", exact=True).click()
        self.page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        ran = 0
        while ran is not True:
            ran = self.page.wait_for_function(PROGRESS, arg=ran, timeout=1000 * PATIENCE).json_value()

    def cells(self) -> list[dict[str, Any]]:
        return self.page.evaluate(CELLS)

    def cells_with(self, *words: str) -> list[int]:
        """Return the numbers of the code cells that hold one of `words`."""
        code = [cell for cell in self.cells() if cell["code"]]
        return [cell["number"] for cell in code if any(word in cell["source"] for word in words)]

    def cell(self, number: int) -> Any:
        return self.page.locator(".jp-Notebook .jp-Cell").nth(number)

    def frames(self, number: int) -> int:
        """Return how many different pictures a cell has shown so far."""
        return self.page.evaluate(FRAMES, number)

    def go_to(self, number: int) -> None:
        """Make a cell the active one, with the arrow keys."""
        self.page.evaluate(TO_NOTEBOOK)
        while (now := self.page.wait_for_function(ACTIVE).json_value()["cell"]) != number:
            self.page.keyboard.press("ArrowDown" if now < number else "ArrowUp")
            self.page.wait_for_function(f"now => ({ACTIVE})()?.cell !== now", arg=now)

    def tabs(self, number: int) -> list[dict[str, Any]]:
        """Return what the Tab key reaches in a cell, one after the other, until it leaves the cell.

        Raises AssertionError when it does not leave it.
        """
        self.go_to(number)
        reached = []
        for _ in range(60):
            self.page.keyboard.press("Tab")
            at = self.page.evaluate(FOCUSED)
            if at["cell"] != number and not at["body"]:
                return reached
            reached.append(at)
        raise AssertionError(f"Tab does not leave cell {number}, where it reached {reached}")

    def tab_to(self, number: int, **wanted: str) -> None:
        """Press Tab until a control of a cell has the focus, another one than before, of a `kind` or with a `name`."""
        for _ in range(60):
            self.page.keyboard.press("Tab")
            at = self.page.evaluate(FOCUSED)
            if at["cell"] == number and wanted.items() <= at.items():
                return
        raise AssertionError(f"Tab does not reach {wanted} in cell {number}")

    def controls(self, number: int) -> list[int]:
        """Return what the Tab key should reach in the output of a cell, as the numbers that `tabs` has."""
        return self.cell(number).evaluate(CONTROLS)

    def after(self, number: int, act: Callable[[], Any], *what: str) -> float:
        """Act; return the seconds until `what` ("pictures", "text") of a cell have changed, from the key on if any."""
        cell = self.cell(number).element_handle()
        self.page.evaluate(BEFORE, cell)
        act()
        return self.page.wait_for_function(AFTER, arg=[cell, what]).json_value() / 1000

    def press(self, number: int, key: str, *what: str) -> float:
        """Press a key; return the seconds until `what` of a cell have changed."""
        return self.after(number, lambda: self.page.keyboard.press(key), *what)

    def open_list(self, choice: Any, steps: int) -> None:
        """Open a drop-down list with the keyboard, and move in it; Enter then chooses."""
        choice.focus()
        self.page.keyboard.press("Space")
        for _ in range(abs(steps)):
            self.page.keyboard.press("ArrowDown" if steps > 0 else "ArrowUp")

    def toggle(self, box: Any) -> None:
        """Press Space in a checkbox, and again where a list that is only just closing took the key."""
        checked = box.is_checked()
        for _ in range(10):
            box.focus()
            self.page.keyboard.press("Space")
            self.page.wait_for_timeout(100)
            if box.is_checked() != checked:
                return
        raise AssertionError(f"the box stays {'checked' if checked else 'unchecked'}")

    def open_file_chooser(self, number: int, **button: str) -> Any:
        """Press Space on a `button` of a cell, and again if nothing opens: on busy machines Chromium may drop a key."""
        self.choosers.clear()
        for _ in range(20):
            self.go_to(number)
            self.tab_to(number, **button)
            self.page.keyboard.press("Space")
            self.page.wait_for_timeout(500)
            if self.choosers:
                return self.choosers[0]
        raise AssertionError(f"no file chooser opens from {button} in cell {number}")

    def draw(self, canvas: Any) -> None:
        """Draw a stroke with the mouse."""
        canvas.scroll_into_view_if_needed()
        box = canvas.bounding_box()
        self.page.mouse.move(box["x"] + 0.3 * box["width"], box["y"] + 0.3 * box["height"])
        self.page.mouse.down()
        self.page.mouse.move(box["x"] + 0.6 * box["width"], box["y"] + 0.8 * box["height"], steps=5)
        self.page.mouse.up()

    def use_theme(self, theme: str) -> None:
        self.command("apputils:change-theme", theme=theme)
        light = str(theme == "JupyterLab Light").lower()
        self.page.wait_for_function(f"document.body.dataset.jpThemeLight === '{light}'")
        # JupyterLab fails to remove its splash screen for two changes at once.
        self.page.locator("#jupyterlab-splash").wait_for(state="detached")

    def take_pictures(self, path: Path, width: int) -> list[Path]:
        """Write the whole lesson into `path`-1.png, `path`-2.png, …, each at most `TALLEST` pixels tall."""
        path.parent.mkdir(parents=True, exist_ok=True)
        pane = self.page.locator(".jp-WindowedPanel-outer")
        self.page.evaluate("() => { window.jupyterapp.shell.collapseLeft(); document.activeElement.blur(); }")
        self.page.set_viewport_size({"width": width, "height": 900})
        height, inside = pane.evaluate("pane => [pane.scrollHeight, pane.clientHeight]")
        self.page.set_viewport_size({"width": width, "height": min(TALLEST, height + 900 - inside)})
        inside, paths = pane.evaluate("pane => pane.clientHeight"), []
        for place, top in enumerate(range(0, height, inside), start=1):
            pane.evaluate("(pane, top) => { pane.scrollTop = top; }", top)
            paths.append(path.with_name(f"{path.name}-{place}.png"))
            self.page.screenshot(path=paths[-1])
        self.page.set_viewport_size({"width": 1280, "height": 900})
        return paths

    def close(self) -> None:
        """Close the page, and end its kernel."""
        self.page.evaluate("() => window.jupyterapp.serviceManager.sessions.shutdownAll()")
        self.page.close()


# Text in HTML outputs and controls (what is printed has JupyterLab's own colours) whose contrast with what is behind it
# is below 4.5, as [contrast, colour, background, text].
FAINT = """() => {
    const parse = text => {
        const [r, g, b, alpha = 1] = text.match(/[\\d.]+/g).map(Number);
        return text.startsWith('color(srgb') ? [255 * r, 255 * g, 255 * b, alpha] : [r, g, b, alpha];
    };
    const over = (top, below) => [0, 1, 2].map(i => top[3] * top[i] + (1 - top[3]) * below[i]);
    const behind = element => {
        if (!element) return [255, 255, 255];
        const own = parse(getComputedStyle(element).backgroundColor);
        return own[3] === 1 ? own.slice(0, 3) : over(own, behind(element.parentElement));
    };
    const linear = value => value <= 0.04045 * 255 ? value / 255 / 12.92 : ((value / 255 + 0.055) / 1.055) ** 2.4;
    const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
    const found = new Map();
    for (const output of document.querySelectorAll('.jp-OutputArea-output:not(.jp-RenderedText)')) {
        const walker = document.createTreeWalker(output, NodeFilter.SHOW_TEXT);
        while (walker.nextNode()) {
            const text = walker.currentNode.textContent.trim();
            const element = walker.currentNode.parentElement.closest(':not(option)');
            if (!text || !element.checkVisibility({visibilityProperty: true})) continue;
            const background = behind(element), color = over(parse(getComputedStyle(element).color), background);
            const [low, high] = [luminance(color), luminance(background)].sort((a, b) => a - b);
            const contrast = (high + 0.05) / (low + 0.05), round = values => values.map(Math.round).join(' ');
            if (contrast < 4.5) {
                const colors = [contrast.toFixed(2), round(color), round(background)];
                if (!found.has(colors.join())) found.set(colors.join(), [...colors, text.slice(0, 40)]);
            }
        }
    }
    return [...found.values()];
}"""
