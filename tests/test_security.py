"""What must not happen: data that run as code, ports open to all, names that become HTML, packages of somebody else."""

import ast
import csv
import hashlib
import html.parser
import io
import json
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path

import browser
import joblib
import nbformat
import numpy as np
import pandas as pd
import psutil
import pytest
import torch
import torchvision
from matplotlib.legend import Legend
from nbconvert import HTMLExporter
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from utils import ablation, cluster, compare, data, device, files, full_training, plots, widgets

ROOT = Path(__file__).parent.parent
POSIX = pytest.mark.skipif(os.name == "nt" or not shutil.which("make"), reason="needs make and a POSIX shell")


# --------------------------------------------------------------------------------------------- nothing that runs data

OURS = [
    path for pattern in ("utils/*.py", "cnn.py", "notebooks/src/*.py", "docs/conf.py") for path in ROOT.glob(pattern)
]
FORBIDDEN = {  # calls that run what they read, or a text, or write where an archive says
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "subprocess.getoutput"),
    *("subprocess.getstatusoutput", "tempfile.mktemp", "shutil.unpack_archive", "runpy.run_path", "code.interact"),
    *("pandas.read_pickle", "joblib.load", "shelve.open", "torch.hub.load", "yaml.unsafe_load", "yaml.full_load"),
    *("torch.hub.load_state_dict_from_url", "ssl._create_unverified_context"),
}
UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "jsonpickle"}
SAFE_ONLY_WITH = {"torch.load": ("weights_only", True), "yaml.load": ("Loader", "yaml.SafeLoader")}
RUN = {"run", "call", "check_call", "check_output", "Popen"}  # of subprocess


def offences(code: str, asserts: bool = False) -> list[str]:
    """Return what in `code` can run data as code, "line: what"; with `asserts`, checks that -O leaves out, too."""
    tree, names, found = ast.parse(code), {}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname or alias.name.partition(".")[0]: alias.name for alias in node.names if alias.asname}
            modules = {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            modules = {(node.module or "").partition(".")[0]}
        else:
            continue
        found += [f"{node.lineno}: imports {module}" for module in modules & UNPICKLERS]
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert) and asserts:
            found.append(f"{node.lineno}: assert")
        if isinstance(node, ast.Call):
            called, given = dotted(node.func, names), {word.arg: word.value for word in node.keywords}
            found += [f"{node.lineno}: {reason}" for reason in of_call(called, node.args, given)]
    return found


def dotted(node: ast.expr, names: dict[str, str]) -> str:
    """Return the name that is called, by the modules' own names; "?.load" for a method of something else."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value, names)}.{node.attr}"
    known = {"np": "numpy", "pd": "pandas"} | names
    return known.get(node.id, node.id) if isinstance(node, ast.Name) else "?"


def of_call(called: str, args: list[ast.expr], given: dict[str | None, ast.expr]) -> Iterator[str]:
    """Yield what is wrong with one call."""
    module, _, name = called.rpartition(".")
    if (
        called in FORBIDDEN
        or name in ("extractall", "mktemp")
        or (module == "os" and name.startswith(("exec", "spawn")))
    ):
        yield called
    if called in SAFE_ONLY_WITH:
        word, value = SAFE_ONLY_WITH[called]
        if word not in given or ast.unparse(given[word]) != str(value):
            yield f"{called} without {word}={value}"
    if "allow_pickle" in given and ast.unparse(given["allow_pickle"]) != "False":
        yield f"{called} with allow_pickle"
    if "shell" in given and ast.unparse(given["shell"]) != "False":
        yield f"{called} with shell"
    if (
        module == "subprocess"
        and name in RUN
        and args
        and isinstance(args[0], ast.JoinedStr | ast.Constant | ast.BinOp)
    ):
        yield f"{called} of a text"
    if "verify" in given and ast.unparse(given["verify"]) == "False":
        yield f"{called} with verify=False"


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.name)
def test_no_code_of_ours_runs_data(path):
    """Lessons assert what they measured, which is no check of input."""
    assert offences(path.read_text(encoding="utf-8"), asserts=path.parent.name != "src") == []


PLANTED = """
import pickle
from pickle import loads as parse
import cloudpickle.cloudpickle
eval(text)
exec(text)
import torch as t
t.load(path)
t.load(path, weights_only=False)
from torch import load
load(path)
np.load(path, allow_pickle=True)
np.load(path, allow_pickle=flag)
pd.read_pickle(path)
import joblib
joblib.load(path)
os.system("ls")
os.execv(path, words)
subprocess.run(f"ls {path}")
subprocess.run("ls " + path)
subprocess.Popen(words, shell=True)
tarfile.open(path).extractall(folder)
zipfile.ZipFile(path).extractall()
shutil.unpack_archive(path)
yaml.load(text)
yaml.load(text, Loader=yaml.Loader)
tempfile.mktemp()
session.get(address, verify=False)
assert size > 0, "from a user"
"""
HARMLESS = """
import json, re, torch
net.eval()
re.compile("a")
torch.load(path, weights_only=True)
np.load(path)
np.load(path, allow_pickle=False)
yaml.load(text, Loader=yaml.SafeLoader)
subprocess.run(["ls", path], check=True)
subprocess.run(command, shell=False)
tempfile.mkdtemp()
model.load(path)
"""


def test_the_scan_finds_each_planted_offence():
    lines = [number for number, line in enumerate(PLANTED.splitlines(), 1) if line and not line.startswith("import t")]
    harmless = {number for number, line in enumerate(PLANTED.splitlines(), 1) if line in (
        "import torch as t", "import joblib", "from torch import load")}  # fmt: skip
    found = {int(offence.partition(":")[0]) for offence in offences(PLANTED, asserts=True)}
    assert found == set(lines) - harmless
    assert offences(HARMLESS, asserts=True) == []
    assert offences("assert size") == []


# -------------------------------------------------------------------------------- what torchvision reads, and unpickles


class Malicious:
    """A pickle that makes a file when it is read."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return (os.mkdir, (str(self.trace),))


@pytest.fixture
def trap(tmp_path, monkeypatch) -> tuple[bytes, Path]:
    """A malicious pickle and the trace that it leaves, an own cache, and no network."""
    monkeypatch.setenv("CNN_CACHE_DIR", str(tmp_path / "cache"))

    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    trace = tmp_path / "it ran"
    content = pickle.dumps(Malicious(trace))
    pickle.loads(content)
    assert trace.exists(), "the trap works"
    trace.rmdir()
    return content, trace


def honest(monkeypatch, name: str, trap_in: str | None, content: bytes) -> Path:
    """Lay CIFAR's files where torchvision keeps them, with their sums in its lists; `trap_in` is another."""
    dataset = getattr(torchvision.datasets, name.upper())
    folder = files.cache_dir() / name / dataset.base_folder
    folder.mkdir(parents=True)
    classes = 10 if name == "cifar10" else 100

    def lay(file: str, what: dict) -> str:
        good = pickle.dumps(what)
        (folder / file).write_bytes(content if file == trap_in else good)
        return hashlib.md5(good).hexdigest()

    images = np.zeros((2 * classes, 3072), np.uint8)
    batch = {"data": images, "labels" if name == "cifar10" else "fine_labels": [*range(classes)] * 2}
    names = [str(label) for label in range(classes)]
    for part in ("train_list", "test_list"):
        monkeypatch.setattr(dataset, part, [[file, lay(file, batch)] for file, _ in getattr(dataset, part)])
    md5 = lay(dataset.meta["filename"], {"label_names": names, "fine_label_names": names})
    monkeypatch.setattr(dataset, "meta", {**dataset.meta, "md5": md5})
    return folder


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("cifar10", "data_batch_1"),
        ("cifar10", "data_batch_5"),
        ("cifar10", "test_batch"),
        ("cifar10", "batches.meta"),
        ("cifar100", "train"),
        ("cifar100", "test"),
        ("cifar100", "meta"),
    ],
)
def test_a_file_of_cifar_with_another_checksum_is_not_unpickled(name, file, trap, monkeypatch):
    content, trace = trap
    honest(monkeypatch, name, file, content)
    with pytest.raises(OSError, match=f"cannot load {name}"):
        data.load(name)
    assert not trace.exists()


def test_torchvisions_own_sums_are_the_ones_compared(trap):
    """Not patched: a folder with malicious files of all the right names."""
    content, trace = trap
    for name in ("cifar10", "cifar100"):
        dataset = getattr(torchvision.datasets, name.upper())
        folder = files.cache_dir() / name / dataset.base_folder
        folder.mkdir(parents=True)
        for file in [*(file for file, _ in dataset.train_list + dataset.test_list), dataset.meta["filename"]]:
            (folder / file).write_bytes(content)
        with pytest.raises(OSError, match=f"cannot load {name}"):
            data.load(name)
    assert not trace.exists()


def test_a_test_file_that_was_exchanged_after_loading_is_not_unpickled(trap, monkeypatch):
    content, trace = trap
    folder = honest(monkeypatch, "cifar10", None, content)
    images = data.load("cifar10")
    (folder / "test_batch").write_bytes(content)
    with pytest.raises(OSError, match="cannot load cifar10"):
        images.read_test("the check")
    assert not trace.exists()


def test_files_that_torchvision_does_not_name_are_left_alone(trap, monkeypatch):
    content, trace = trap
    folder = honest(monkeypatch, "cifar10", None, content)
    for extra in ("data_batch_6", "readme.html", "__init__.py", "data_batch_1.pkl"):
        (folder / extra).write_bytes(content)
    assert len(data.load("cifar10").read_test("the check")) == 20
    assert not trace.exists()


@pytest.mark.parametrize("name", ["mnist", "kmnist"])
def test_legacy_files_of_mnist_are_not_unpickled(name, trap):
    """torchvision still looks for tensors that its earlier versions saved."""
    _, trace = trap
    for file in ("training.pt", "test.pt"):
        path = files.cache_dir() / name / data.TORCHVISION[name] / "processed" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(Malicious(trace), path)
    with pytest.raises(Exception, match="Weights only|cannot load"):
        data.load(name)
    assert not trace.exists()


def test_an_archive_with_another_checksum_is_not_unpacked(trap, monkeypatch):
    """Neither one that lies there, nor one that comes from the network."""
    dataset = torchvision.datasets.CIFAR10
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        member = tarfile.TarInfo("../../outside")
        archive.addfile(member, io.BytesIO(b""))
    root = files.cache_dir() / "cifar10"
    root.mkdir(parents=True)
    (root / dataset.filename).write_bytes(packed.getvalue())
    with pytest.raises(OSError, match="no route to host"):
        data.load("cifar10")

    def send(address: str, path: Path, **options) -> None:
        Path(path).write_bytes(packed.getvalue())

    monkeypatch.setattr("torchvision.datasets.utils._get_redirect_url", lambda url, **options: url)
    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", send)
    with pytest.raises(OSError, match="File not found or corrupted"):
        data.load("cifar10")
    assert list(files.cache_dir().parent.rglob("outside")) == []


# ------------------------------------------------------------------------------------------------------ names from data

NAMES = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "a&b;&lt;",
    "$\\frac$",
    "$x^{",
    "$5 to $6",
    "two\nlines",
    "\u202eright to left\u2069",
    "\u2028\u2029",
    "{{content}}{{title}}",
    "__proto__",
    "%s %(a)s {0} {a}",
    "`x` | *y* | [z](javascript:alert(1))",
    "=cmd|' /C calc'!A0",
    "no text: \udcff",
]


class Tags(html.parser.HTMLParser):
    """The elements of a page with their attributes' names, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.seen, self.text = Counter(), []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.seen[tag, *sorted(name for name, _ in attrs)] += 1

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def study_of(name: str) -> compare.Study:
    rows = []
    for variant, gain in ((name, 0.02), ("base", 0.0)):
        for seed in range(3):
            for epoch in (1, 2):
                accuracy = 0.5 + 0.1 * epoch + 0.01 * seed + gain * seed
                for metric, value in (("loss", 2 - accuracy), ("accuracy", accuracy)):
                    rows.append(["own", variant, 0.1, seed, epoch, epoch, "validation", metric, value, 3.0 * epoch])
    frame = pd.DataFrame(rows, columns=ablation.COLUMNS)
    return compare.Study(name, name, frame, {name: {"data": name, name: 1}, "base": {"data": "x"}}, own=True)


@pytest.mark.parametrize("name", NAMES)
def test_a_page_says_names_as_text(name):
    page, plain = (Tags(compare.page([study_of(each)])) for each in (name, "plain"))
    assert page.seen == plain.seen
    content = json.loads(next(text for text in page.text if text.startswith('{"studies"')))
    (study,) = content["studies"]
    assert (study["name"], study["question"], study["variants"][0]["name"]) == (name, name, name)
    assert study["variants"][0]["settings"][name] == 1
    title = page.text[[text.startswith("Runs compared") for text in page.text].index(True)]
    assert title == f"Runs compared: {name}".replace("\udcff", "?")


@pytest.mark.parametrize("name", NAMES)
def test_tables_of_a_notebook_say_names_as_text(name):
    words = ("validation accuracy", [name, "base"], "base", "mean")
    table, plain = Tags(compare.tables(study_of(name), *words)), Tags(
        compare.tables(study_of("plain"), words[0], ["plain", "base"], *words[2:])
    )  # fmt: skip
    assert table.seen == plain.seen


QUICK = ("$x^{", "no text: \udcff", "__proto__")
FIGURES = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.thorough) for name in NAMES]


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.filterwarnings("ignore:Glyph|constrained_layout")
def test_figures_draw_names_as_they_are(name):
    names, runs = ["plain", name], study_of(name).rows
    split = data.Split(torch.zeros(8, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1] * 4))
    figures = [
        plots.samples(split, names, 2),
        plots.confusion(torch.tensor([[3, 1], [0, 4]]), names),
        plots.explanation(split.images[0], torch.zeros(8, 8), torch.tensor([0.2, 0.8]), names),
        plots.compare(runs, baseline="base"),
        plots.lr_sweep(runs),
        plots.experiment(runs.replace({"variant": {"base": "none"}})) if ", " not in name else plots.lr_sweep(runs),
        compare.figure(study_of(name), "validation accuracy", [name, "base"], "base"),
        compare.figure(study_of(name), "validation loss", [name, "base"], name),
    ]
    for figure in figures:
        assert plots.png(figure).startswith(b"\x89PNG")
        shown = [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]
        expected = plots.plain(name)
        assert any(expected in text for text in shown), shown
        for legend in figure.findobj(Legend):
            assert expected in [text.get_text() for text in legend.texts], 'matplotlib passes over "__proto__"'
        compare.closed(figure)
    assert "\\" not in plots.plain(name).replace("\\$", "").replace("\\frac", "")


def test_dollars_of_a_name_are_drawn_and_described_as_dollars():
    assert plots.plain(plots.plain("$x^{")) == plots.plain("$x^{") == r"\$x^{"
    split = data.Split(torch.zeros(8, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1] * 4))
    figure = plots.explanation(split.images[0], torch.zeros(8, 8), torch.tensor([0.2, 0.8]), ["a", "$5"])
    assert "what speaks for $5" in plots.described(figure, "x")
    compare.closed(figure)


@pytest.mark.parametrize("name", NAMES[:2])
def test_the_alternative_text_of_a_picture_stays_a_text_in_a_web_page(name):
    picture = {"image/png": "iVBORw0KGgo="}
    output = nbformat.v4.new_output("display_data", picture, metadata={"image/png": {"alt": name, "width": 3}})
    cell = nbformat.v4.new_code_cell("1", outputs=[output])
    for template in ("lab", "classic", "basic"):
        exporter = HTMLExporter(template_name=template, exclude_anchor_links=True)
        body, _ = exporter.from_notebook_node(nbformat.v4.new_notebook(cells=[cell]))
        tags = Tags(body)
        assert not [tag for tag in tags.seen if "onerror" in tag], template
        assert "alert(1)" not in " ".join(tags.text).replace(name, ""), template


def test_widgets_pick_variants_by_their_names(monkeypatch):
    name, shown = "<img src=x onerror=alert(1)>", []
    monkeypatch.setattr(widgets, "show", lambda view, text: shown.append(view))
    monkeypatch.setattr("ipywidgets.__version__", "7.7.1")  # whose descriptions are HTML
    compare.explore([study_of(name)], name)
    (view,) = shown
    boxes = view.children[5].children[1].children
    assert [box.description for box in boxes] == ["&lt;img src=x onerror=alert(1)&gt;", "base"]
    table = view.children[-1]
    assert table.value.count("&lt;img") >= 1
    boxes[0].value = False  # only the baseline is left
    assert "&lt;img" not in table.value
    assert "<img" not in table.value
    monkeypatch.setattr("ipywidgets.__version__", "8.1.9")
    assert widgets.description(name) == name


def test_what_is_wrong_with_an_upload_is_said_as_text(monkeypatch, tmp_path):
    shown = []
    monkeypatch.setattr(widgets, "show", lambda view, text: shown.append(view))

    def refuse(path: Path, invert: bool):
        raise ValueError(f"{path} is not an image")

    plots.ask(refuse, tmp_path / "<img src=x onerror=alert(1)>.png")
    said = shown[0].children[-1].value
    assert "&lt;img src=x onerror=alert(1)&gt;.png is not an image" in said
    assert "<" not in said


def test_tables_of_the_readme_keep_their_cells():
    rows = []
    for seed in range(2):
        rows += [["a|b <script>", seed, 1, 1, "test", "accuracy", 0.5, 3.0]]
    row = full_training.table(pd.DataFrame(rows, columns=full_training.COLUMNS)).splitlines()[-1]
    assert "<script>" not in row
    assert len(re.split(r"(?<!\\)\|", row)) == 7


FORMULAS = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1"]


@pytest.mark.parametrize("name", FORMULAS)
def test_a_table_for_a_spreadsheet_has_no_formula_in_a_name(name, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "ROOT", tmp_path)
    path = compare.save(study_of(name), "validation accuracy", [name, "base"], "base", "epoch", 1, "csv")
    with path.open(encoding="utf-8", newline="") as lines:
        cells = [row["variant"] for row in csv.DictReader(lines)]
    assert cells == [f"'{name}", "base"]
    assert pd.read_csv(path)["difference"].iloc[0] > 0, "numbers stay numbers"


def test_a_carriage_return_ends_no_row():
    assert compare.no_formula("a\r=1") == "a =1"


@pytest.mark.browser
@pytest.mark.thorough
@pytest.mark.skipif(browser.MISSING is not None, reason=str(browser.MISSING))
def test_the_page_saves_no_formula_and_runs_no_name(tmp_path):
    from playwright.sync_api import sync_playwright

    name = "=<img src=x onerror=document.title='ran'>"
    (tmp_path / "page.html").write_text(compare.page([study_of(name)]), encoding="utf-8")
    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=browser.CHROMIUM, args=["--no-sandbox"])
        page = chromium.new_page()
        page.goto((tmp_path / "page.html").as_uri())
        with page.expect_download() as download:
            page.click('[data-save="csv"]')
        with Path(download.value.path()).open(encoding="utf-8", newline="") as lines:
            cells = [row["variant"] for row in csv.DictReader(lines)]
        assert sorted(cells) == sorted([f"'{name}", "base"])
        assert page.title().startswith("Runs compared")
        assert page.locator("img").count() == 0
        chromium.close()


# ------------------------------------------------------------------------------------------------------ the environment

ODD = ["$(touch ran)", "`touch ran`; touch ran", "a b", "'\"", "-rf", "%TEMP%", "é\u202e"]


@pytest.mark.parametrize("value", ODD)
@pytest.mark.parametrize("name", ["cache", "results", "figures"])
def test_folders_of_odd_names_are_folders_of_these_names(name, value, tmp_path, monkeypatch):
    if os.name == "nt" and set(value) & set("\"'`;$%"):
        pytest.skip("no such names on Windows")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(f"CNN_{name.upper()}_DIR", value)
    found = getattr(files, f"{name}_dir")()
    assert found.resolve() == (tmp_path / value).resolve()
    assert found.is_dir()
    assert not (tmp_path / "ran").exists()


def test_the_home_of_nobody_is_refused_in_one_sentence(monkeypatch):
    monkeypatch.setenv("CNN_CACHE_DIR", "~nobody-of-that-name/x")
    with pytest.raises(ValueError, match="~nobody-of-that-name/x: there is no home folder of that name; write"):
        files.cache_dir()
    with pytest.raises(ValueError, match="~nobody-of-that-name: there is no home folder"):
        data.load("~nobody-of-that-name")


@pytest.mark.parametrize("value", ["cpu; ls", "cuda:99", "CPU", "cpu:0:1", "\u202e", "0"])
def test_an_odd_device_is_refused_in_one_sentence(value, monkeypatch):
    monkeypatch.setenv("CNN_DEVICE", value)
    with pytest.raises(ValueError, match=r"\(the environment variable CNN_DEVICE\) is not on this machine: choose"):
        device.pick()


@pytest.mark.parametrize("value", ["FULL", "small ", "1"])
def test_an_odd_budget_is_refused_in_one_sentence(value, monkeypatch):
    monkeypatch.setenv("CNN_BUDGET", value)
    with pytest.raises(ValueError, match="CNN_BUDGET=.*choose full"):
        device.budget(10, 2)


# -------------------------------------------------------------------------------------------------------------- ports


def family(process: subprocess.Popen) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        return [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    return []


@contextmanager
def ended(processes: list[subprocess.Popen]) -> Iterator[None]:
    """End the processes, and all that they started, when the block is left."""
    try:
        yield
    finally:
        for process in processes:
            for each in family(process):
                with suppress(psutil.NoSuchProcess):
                    each.kill()
            process.wait()


def open_to_others(processes: list[subprocess.Popen]) -> list[str]:
    """Return the addresses at which the processes, and all that they started, listen for other machines."""
    found = [each.net_connections() for process in processes for each in family(process)]
    ports = [connection.laddr for each in found for connection in each if connection.status == psutil.CONN_LISTEN]
    assert ports, "nothing listens at all"
    return [f"{port.ip}:{port.port}" for port in ports if port.ip not in ("127.0.0.1", "::1")]


def make_line(target: str, *words: str) -> str:
    """Return the last line that `make target` would run, by this Python."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "--no-print-directory", "-n", target, f"PY={sys.executable}", *words]
    shown = subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True, check=True).stdout
    return shown.replace("\\\n", " ").splitlines()[-1]


@POSIX
def test_make_lab_names_the_loopback_address():
    line = make_line("lab")
    assert "-m jupyterlab" in line
    assert "--ServerApp.ip=127.0.0.1" in line
    assert not re.search(r"token|password|0\.0\.0\.0|disable_check_xsrf|allow_origin", line)


@POSIX
@pytest.mark.thorough
def test_make_lab_serves_this_machine_and_who_has_the_token(tmp_path):
    """Even where the user's own settings open Jupyter to the network."""
    environment = browser.environment(tmp_path)
    settings = json.dumps({"ServerApp": {"ip": "0.0.0.0"}})
    (tmp_path / "config" / "jupyter_server_config.json").write_text(settings, encoding="utf-8")
    port = browser.free_port()
    line = make_line("lab", f"ARGS=--no-browser --ServerApp.port={port} --ServerApp.port_retries=0")
    server = subprocess.Popen(["sh", "-c", line], cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    with ended([server]):
        browser.wait_until(lambda: list((tmp_path / "runtime").glob("jpserver-*.json")) and browser.answers(port), "up")
        (about,) = (json.loads(path.read_text()) for path in (tmp_path / "runtime").glob("jpserver-*.json"))
        assert len(about["token"]) >= 32
        assert status(port, "") == 403
        assert status(port, "wrong") == 403
        assert status(port, about["token"]) == 200
        assert status(port, about["token"], "/api/kernels", "POST") == 201
        browser.wait_until(lambda: len(family(server)) > 2, "a kernel")
        time.sleep(3)  # the kernel opens its ports
        assert open_to_others([server]) == []
        if sys.platform == "linux":  # where all of 127.0.0.0/8 is this machine: open to all would answer there, too
            with socket.socket() as other:
                assert other.connect_ex(("127.0.0.2", port)) != 0


def status(port: int, token: str, path: str = "/api/contents", method: str = "GET") -> int:
    headers = {"Authorization": f"token {token}"} if token else {}
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers=headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def commands_of_the_readme(address: str) -> list[str]:
    """Return the lines of the README that start a cluster at `address`."""
    lines = [line.strip() for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()]
    return [
        line.partition("  #")[0] for line in lines if line.startswith(("python -m dask", "TLS=")) and address in line
    ]


def start(line: str, folder: Path, port: int, host: str) -> subprocess.Popen:
    """Run a line of the README at another port."""
    words = line.replace("8786", str(port)).replace("HOST", host).split()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CNN_DEVICE": "cpu"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen([sys.executable, *words[1:]], cwd=folder, env=environment, **quiet)


def test_the_readme_keeps_a_cluster_on_this_machine_or_behind_certificates():
    for line in commands_of_the_readme(""):
        assert "--dashboard-address 127.0.0.1:0" in line or '"${TLS[@]}"' in line or line.startswith("TLS=")
        assert "--host 127.0.0.1" in line or "tls://" in line or line.startswith("TLS=")
    assert len(commands_of_the_readme("")) == 5


@pytest.mark.thorough
def test_the_cluster_of_the_readme_is_open_to_nobody_else(tmp_path):
    pytest.importorskip("distributed")
    port = browser.free_port()
    commands = [line for line in commands_of_the_readme("127.0.0.1") if not line.startswith("TLS=")]
    processes = [start(line, ROOT, port, "127.0.0.1") for line in commands]
    assert len(processes) == 2
    with ended(processes):
        assert squares_of(f"tcp://127.0.0.1:{port}") == [0, 1, 4]
        assert open_to_others(processes) == []


def squares_of(address: str) -> list[int]:
    """Let the workers at `address` compute, as soon as one is there."""
    for _ in range(60):
        with suppress(cluster.NoCluster), cluster.connected(address, 60):
            return joblib.Parallel()(joblib.delayed(pow)(number, 2) for number in range(3))
        time.sleep(1)
    pytest.fail("no worker came")


@pytest.mark.thorough
@pytest.mark.skipif(not shutil.which("openssl"), reason="needs openssl")
def test_a_cluster_with_certificates_refuses_who_has_none(tmp_path, monkeypatch):
    """The README's own lines, in a folder with a certificate that is made as it says there."""
    pytest.importorskip("distributed")
    from distributed import Client, Security

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (make_certificate,) = re.findall(r"^    (openssl .+)$", text, re.MULTILINE)
    for folder in (tmp_path / "ours", tmp_path / "theirs"):
        folder.mkdir()
        subprocess.run(make_certificate.split(), cwd=folder, check=True, capture_output=True)
    (options,) = re.findall(r"^    TLS=\((.+)\)$", text, re.MULTILINE)
    port = browser.free_port()
    commands = [line.replace('"${TLS[@]}"', options) for line in commands_of_the_readme("tls://")]
    processes = [start(line, tmp_path / "ours", port, "127.0.0.1") for line in commands]
    assert len(processes) == 2
    address = f"tls://127.0.0.1:{port}"
    monkeypatch.chdir(tmp_path / "ours")
    with ended(processes):
        assert squares_of(address) == [0, 1, 4]
        with pytest.raises(OSError):  # noqa: PT011 - by any of the errors of a connection
            Client(f"tcp://127.0.0.1:{port}", timeout=3)
        stranger = tmp_path / "theirs" / "cluster.pem", tmp_path / "theirs" / "cluster.key"
        theirs = Security(
            tls_ca_file="cluster.pem", tls_client_cert=str(stranger[0]), tls_client_key=str(stranger[1]),
            require_encryption=True,
        )  # fmt: skip
        with pytest.raises(OSError):  # noqa: PT011
            Client(address, timeout=3, security=theirs)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="needs the file cluster.pem in .*: copy it from the scheduler's"):
        cluster.security(address)


def test_without_a_certificate_no_scheduler_is_said_to_be_silent(tmp_path, monkeypatch):
    pytest.importorskip("distributed")
    monkeypatch.chdir(tmp_path)
    with (
        pytest.raises(FileNotFoundError, match="tls://127.0.0.1:1 needs the file cluster.pem"),
        cluster.connected("tls://127.0.0.1:1", 0.2),
    ):
        pass


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:8786", "tls://HOST:8786"])
def test_a_cluster_is_started_by_the_options_of_the_readme(address):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (options,) = re.findall(r"^    TLS=\((.+)\)$", text, re.MULTILINE)
    told = cluster.start_of(address).replace("tls://host", "tls://HOST").split(", and: ")
    lines = [line.replace('"${TLS[@]}"', options) for line in commands_of_the_readme("python -m dask")]
    lines = [line for line in lines if ("tls://" in line) == address.startswith("tls://")]
    assert [line.replace(" --port 8786", "").split() for line in lines] == [words.split() for words in told]


@pytest.mark.parametrize(
    "address", ["tcp://192.0.2.9:8786", "tcp://[2001:db8::1]:8786", "tcp://some-machine:8786", "ws://some-machine:1"]
)
def test_a_scheduler_across_a_network_without_certificates_is_warned_of(address):
    with pytest.warns(UserWarning, match="neither password nor encryption: .* use tls://"):
        cluster.warn_of_the_open(address)


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "tcp://localhost:1", "tcp://[::1]:1", "tls://some-machine:1"])
@pytest.mark.filterwarnings("error")
def test_a_scheduler_on_this_machine_or_with_certificates_is_not(address):
    cluster.warn_of_the_open(address)


# ----------------------------------------------------------------------------------------------------------- the lock

LOCK = (ROOT / "constraints-lock.txt").read_text(encoding="utf-8")
BLOCKS = re.split(r"\n(?=[A-Za-z])", re.sub(r"(?m)^#.*\n", "", LOCK).strip())


def locked() -> dict[str, set[str]]:
    """The versions that the lock has of each package (another one for another Python), by its normal name."""
    found: dict[str, set[str]] = {}
    for block in BLOCKS:
        requirement = Requirement(block.partition("\\")[0])
        (pin,) = requirement.specifier
        assert pin.operator == "=="
        found.setdefault(canonicalize_name(requirement.name), set()).add(pin.version)
    return found


def test_each_line_of_the_lock_has_the_hashes_of_its_files():
    for block in BLOCKS:
        first, *hashes = block.split(" \\\n    ")
        assert hashes, first
        assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", each) for each in hashes), first
        assert len(set(hashes)) == len(hashes)
    assert "://" not in LOCK, "no index is named"


def test_the_lock_has_the_tested_versions():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line.partition("#")[0]) for line in lines if line and not line.startswith("#")]
    have = locked()
    other = [
        str(pin) for pin in pins if next(iter(pin.specifier)).version not in have.get(canonicalize_name(pin.name), ())
    ]
    assert other == [], "make lock"
    assert Version(next(iter(have["pip"]))) >= Version("26.1"), "older ones do not read the hashes of constraints"


def test_the_lock_has_all_that_the_lists_bring():
    """Followed through the requirements of what is installed here."""
    have, waiting, seen = locked(), [], set()
    for path in ROOT.glob("requirements*.txt"):
        lines = (line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
        waiting += [Requirement(line) for line in lines if line and not line.startswith("-")]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in seen or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        seen.add(name)
        assert name in have, f"{name}: make lock"
        with suppress(metadata.PackageNotFoundError):  # those of make bench need not be here
            waiting += map(Requirement, metadata.requires(requirement.name) or [])
    assert {"torch", "numpy", "jupyterlab", "pytest"} <= seen


@POSIX
@pytest.mark.thorough
def test_set_up_by_the_lock_refuses_a_file_that_is_another(tmp_path):
    """By the pip of the lock, which is fetched; with a package of our own, once as it was locked and once exchanged."""
    import zipfile

    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "requirements.txt").write_text("lockedpackage>=1\n", encoding="utf-8")
    wheel = tmp_path / "lockedpackage-1.0-py3-none-any.whl"

    def pack(value: int) -> str:
        inside = "lockedpackage-1.0.dist-info"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("lockedpackage.py", f"VALUE = {value}\n")
            archive.writestr(f"{inside}/METADATA", "Metadata-Version: 2.1\nName: lockedpackage\nVersion: 1.0\n")
            archive.writestr(f"{inside}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            archive.writestr(f"{inside}/RECORD", "")
        return files.sha256(wheel)

    pip = next(block for block in BLOCKS if block.startswith("pip=="))
    lock = f"lockedpackage==1.0 \\\n    --hash=sha256:{pack(1)}\n{pip}\nzzz==1 \\\n    --hash=sha256:{'0' * 64}\n"
    (tmp_path / "constraints-lock.txt").write_text(lock, encoding="utf-8")
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "PYTHON"))}
    own |= {"PIP_FIND_LINKS": str(tmp_path), "LOCKED": "1"}

    def set_up() -> subprocess.CompletedProcess:
        return subprocess.run(["make", "setup"], cwd=tmp_path, env=own, capture_output=True, text=True)

    first = set_up()
    if first.returncode and "lockedpackage" not in first.stderr:
        pytest.skip(f"pip cannot be fetched here: {first.stderr.strip().splitlines()[-1]}")
    assert first.returncode == 0, first.stderr
    assert set_up().stdout == "", "it is done once"
    shutil.rmtree(tmp_path / ".venv")
    pack(2)
    refused = set_up()
    assert refused.returncode != 0
    assert "DO NOT MATCH THE HASHES" in refused.stderr
    assert not list((tmp_path / ".venv").rglob("lockedpackage.py"))
