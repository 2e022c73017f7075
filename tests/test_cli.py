"""The command line as a user meets it: train, interrupt, resume, predict, and one sentence for every mistake."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial

import pytest
import torch
from PIL import Image

import cnn
from utils import ablation, checkpoint, cluster, data, examine, experiments, files, train
from utils.model import CNNConfig

FAST = ["--images", "640", "--batch-size", "128", "--width", "4", "--threads", "1", "--precision", "fp32"]


@pytest.fixture(autouse=True)
def own_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(cnn, "RUNS", tmp_path / "runs")


def run(monkeypatch, capsys, *arguments: object) -> tuple[int, str]:
    """Return the exit status and everything printed by `python cnn.py arguments`."""
    monkeypatch.setattr(sys, "argv", ["cnn.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        cnn.main()
    printed = capsys.readouterr()
    if isinstance(left.value.code, str):
        return 1, printed.out + printed.err + left.value.code
    return left.value.code or 0, printed.out + printed.err


@pytest.fixture
def trained(tmp_path, monkeypatch, capsys):
    """A run of two epochs on 640 images."""
    out = tmp_path / "a run"
    status, printed = run(monkeypatch, capsys, *FAST, "--epochs", 2, "--out", out)
    assert status == 0, printed
    return out, printed


def test_python_without_the_packages_is_told_of_the_environment():
    command = [sys.executable, "-S", str(files.ROOT / "cnn.py")]  # -S: no packages but Python's own
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    assert told.returncode == 1
    assert re.fullmatch(r".* lacks torch: .*activate.*pip install -r requirements\.txt.*\n", told.stderr), told.stderr


def test_train_says_what_it_does_and_how_good_the_network_is(trained):
    out, printed = trained
    for words in (
        "640 images to train",
        "10 weighted layers",
        "cpu, fp32, 1 threads",
        "of 10,000 images",
        "images/s",
        "curves.png",
    ):
        assert words in printed
    history = (out / "history.csv").read_text(encoding="utf-8").splitlines()
    assert history[0] == "run,epoch,step,split,metric,value,seconds"
    with Image.open(out / "curves.png") as picture:
        assert min(picture.size) > 300
    reads = (files.results_dir() / "test_reads.csv").read_text(encoding="utf-8").splitlines()
    assert "fashion-mnist" in reads[-1]
    assert "final number" in reads[-1]


def test_progress_shows_loss_accuracy_and_speed(trained):
    _, printed = trained
    assert re.search(r"epoch 2: loss \d\.\d+, accuracy \d+\.\d+%, [\d,]+ images/s, validation \d+\.\d+%", printed)


def test_no_test_reads_no_test_images(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data.ImageData, "read_test", lambda *_: pytest.fail("the test images were read"))
    status, printed = run(monkeypatch, capsys, "train", *FAST, "--epochs", 1, "--no-test")
    assert status == 0
    assert "validation accuracy" in printed
    assert len(list(cnn.RUNS.glob("*-fashion-mnist/model.safetensors"))) == 1


def test_a_run_without_the_test_images_is_resumed_without_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data.ImageData, "read_test", lambda *_: pytest.fail("the test images were read"))
    assert run(monkeypatch, capsys, *FAST, "--epochs", 1, "--no-test", "--out", tmp_path)[0] == 0
    (tmp_path / cnn.HISTORY_FILE).unlink()  # as if it had been stopped after its last epoch
    status, printed = run(monkeypatch, capsys, "--resume", "--out", tmp_path)
    assert status == 0, printed
    assert "validation accuracy" in printed


def test_a_finished_run_deletes_its_own_leftovers_and_none_of_the_users_files(tmp_path, monkeypatch, capsys):
    users = [".backup-20241127.tar.gz", ".notes-deadbeef.md", ".model-20241127.bin"]
    for name in [*users, ".model-0123abcd.safetensors", ".settings-0123abcd.json"]:
        (tmp_path / name).touch()
    status, printed = run(monkeypatch, capsys, *FAST, "--epochs", 1, "--no-test", "--out", tmp_path)
    assert status == 0, printed
    written = [path for path in tmp_path.iterdir() if path.suffix != ".lock"]
    assert {path.name for path in written} == {*users, *cnn.RUN_FILES}


def test_predict_ranks_three_classes(trained, tmp_path, monkeypatch, capsys):
    out, _ = trained
    image = data.load().validation.images[0, 0]
    Image.fromarray(image.numpy()).save(tmp_path / "boot.png")
    Image.fromarray(255 - image.numpy()).resize((56, 56)).convert("RGB").save(tmp_path / "inverted.png")
    status, printed = run(monkeypatch, capsys, "predict", "--run", out, tmp_path / "boot.png")
    assert status == 0
    assert printed.count("%") == 3
    shares = [float(word.rstrip("%,")) for word in printed.split() if "%" in word]
    assert shares == sorted(shares, reverse=True)
    model, card = checkpoint.load_model(out)
    stats = data.ChannelStats(tuple(card["mean"]), tuple(card["std"]), 0)
    best = card["class_names"][model(data.normalize(image[None, None], stats)).argmax()]
    assert printed.split("boot.png: ")[1].startswith(best)
    assert run(monkeypatch, capsys, "predict", "--run", out, "--invert", tmp_path / "inverted.png")[1].count("%") == 3


def test_export_writes_an_onnx_file_that_says_the_same(trained, tmp_path, monkeypatch, capsys):
    out, _ = trained
    status, printed = run(monkeypatch, capsys, "export", "--run", out, "--out", tmp_path / "made" / "net.onnx")
    assert status == 0, printed
    assert "net.onnx: uint8 images N×1×28×28, 0 to 255, to logits N×10" in printed
    assert float(re.search(r"by at most (\S+)", printed)[1]) <= 1e-4
    model, card = checkpoint.load_model(out)
    images = data.load().validation.images[:20]
    expected = model(data.normalize(images, data.ChannelStats(tuple(card["mean"]), tuple(card["std"]), 0)))
    found = examine.run_onnx(tmp_path / "made" / "net.onnx", images)
    torch.testing.assert_close(found, expected.detach(), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--run", "nowhere"], "no checkpoint at nowhere/model.safetensors: train first"),
        ([], "no run with a checkpoint"),
        (["--out", "net.pt"], "--out net.pt: expected the name of a file that ends in .onnx"),
    ],
)
def test_export_says_what_is_wrong(arguments, words, monkeypatch, capsys):
    status, printed = run(monkeypatch, capsys, "export", *arguments)
    assert status == 1
    assert words in printed.replace("\\", "/")


def test_what_an_export_needs_is_not_loaded_before():
    """It takes seconds; `python cnn.py` must not wait for it."""
    heavy = "captum", "onnx", "onnxruntime", "onnxscript", "torchmetrics", "ipycanvas"
    code = f"import cnn, sys; from utils import examine; print([name for name in {heavy} if name in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", code], cwd=files.ROOT, capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == "[]"


def test_every_field_of_both_configurations_is_an_option(monkeypatch, capsys):
    _, printed = run(monkeypatch, capsys, "train", "--help")
    for config in (cnn.CNNConfig, cnn.train.Recipe):
        for field in cnn.fields(config):
            if field.name not in cnn.FROM_DATA:
                assert f"--{field.name.replace('_', '-')}" in printed


def test_options_reach_the_configurations(tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    status, printed = run(
        monkeypatch,
        capsys,
        *FAST,
        "--epochs",
        1,
        "--no-test",
        "--out",
        out,
        "--no-residual",
        "--init",
        0.5,
        "--pool",
        "average",
    )
    assert status == 0, printed
    config = checkpoint.load_model(out)[0].config
    assert (config.residual, config.init, config.pool, config.width) == (False, 0.5, "average", 4)


@pytest.mark.skipif(sys.platform == "win32", reason="no process can be sent Ctrl-C alone there")
def test_ctrl_c_says_how_to_resume_and_resume_ends_the_same(trained, tmp_path, monkeypatch, capsys):
    """A real process gets a real SIGINT; its run, resumed, ends with the weights of the undisturbed run."""
    out = tmp_path / "interrupted"
    command = [sys.executable, "cnn.py", *FAST, "--epochs", "12", "--out", str(out)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    listen = partial(
        signal.signal, signal.SIGINT, signal.SIG_DFL
    )  # tests started in the background would pass on "ignore"
    process = subprocess.Popen(command, cwd=files.ROOT, preexec_fn=listen, **pipes)
    deadline = time.monotonic() + 120
    while not (out / checkpoint.STATE_FILE).exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert f"python cnn.py --resume --out {out}" in printed
    stopped_at = checkpoint.load_model(out)[1]["epoch"]
    assert 1 <= stopped_at < 12
    assert run(monkeypatch, capsys, "--resume", "--out", out, "--no-test")[0] == 0
    whole = tmp_path / "whole"
    assert run(monkeypatch, capsys, *FAST, "--epochs", 12, "--no-test", "--out", whole)[0] == 0
    resumed, undisturbed = (checkpoint.read(folder / checkpoint.MODEL_FILE) for folder in (out, whole))
    assert resumed["card"]["epoch"] == 12
    assert all(torch.equal(resumed["weights"][name], weight) for name, weight in undisturbed["weights"].items())


def test_resume_takes_the_settings_of_the_run_and_refuses_others(trained, monkeypatch, capsys):
    out, _ = trained
    status, printed = run(monkeypatch, capsys, "--resume", "--out", out)
    assert (status, "is finished: there is nothing to resume" in printed) == (1, True)
    (out / cnn.HISTORY_FILE).unlink()  # as if it had been stopped after its last epoch
    before = {name: (out / name).read_bytes() for name in cnn.RUN_FILES if (out / name).exists()}
    status, printed = run(monkeypatch, capsys, "--resume", "--out", out, "--no-test", "--width", 8)
    assert status == 1
    assert "network.width was 4 and is 8" in printed
    assert {name: (out / name).read_bytes() for name in before} == before
    assert run(monkeypatch, capsys, "--resume", "--out", out, "--no-test")[0] == 0
    assert len(json.loads((out / cnn.ABOUT_FILE).read_text(encoding="utf-8"))["machines"]) == 2
    assert files.read_record(out / cnn.SETTINGS_FILE)["test"] is False  # what was said last holds for a next time
    (out / cnn.HISTORY_FILE).unlink()
    (out / cnn.SETTINGS_FILE).write_text('{"widht": 4}')
    status, printed = run(monkeypatch, capsys, "--resume", "--out", out)
    assert (status, "unknown settings widht" in printed) == (1, True)


def test_stats_prints_numbers_to_paste(monkeypatch, capsys):
    status, printed = run(monkeypatch, capsys, "stats")
    assert status == 0
    found: dict = {}
    exec("\n".join(line for line in printed.splitlines() if " = " in line), found)
    assert found["mean"] == pytest.approx((0.2860,), abs=2e-3)  # the published figures are of all 60,000
    assert found["std"] == pytest.approx((0.3530,), abs=2e-3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "cifar11"], "did you mean 'cifar10'"),
        (["--lr", "0"], "lr=0.0: expected"),
        (["--lr", "nan"], "lr=nan"),
        (["--lr", "fast"], "'--lr'"),
        (["--device", "gpu"], "'gpu' is not on this machine"),
        (["--precision", "fp8"], "'fp8' is unknown"),
        (["--norm", "bathc"], "norm='bathc': choose one of batch"),
        (["--batch-size", "641", "--images", "640"], "641"),
        (["--images", "3"], "take(3)"),
        (["--size", "5"], "expected 8"),
        (["--bogus", "1"], "No such option"),
        (["--resume"], "no unfinished run with a checkpoint"),
        (["--resume", "--out", "nowhere"], "nowhere"),
        (["--out", "/proc/nowhere"], "/proc/nowhere"),
        (["--out", ""], "'--out': expected the name of a folder"),
        (["predict", "nothing.png"], "train one first"),
        (["bench", "--rounds", "0"], "rounds=0"),
        (["full", "recrod", "--data", "nowhere"], "unknown plan 'recrod': choose one of full"),
        (["trian"], "No such command"),
    ],
)
def test_a_mistake_is_answered_in_one_sentence(arguments, words, monkeypatch, capsys):
    if "/proc/nowhere" in arguments and sys.platform != "linux":
        pytest.skip("/proc is Linux's")
    status, printed = run(monkeypatch, capsys, *arguments)
    assert status != 0
    assert words in printed
    assert "Traceback" not in printed


def make_pictures(folder, size: int):
    """Ten pictures of `size`×`size` pixels of each of two classes, for training and for testing."""
    for path in (folder / split / kind for split in ("train", "test") for kind in "ab"):
        path.mkdir(parents=True)
        for number in range(10):
            Image.new("L", (size, size), 20 * number).save(path / f"{number}.png")
    return folder


@pytest.mark.parametrize(
    ("size", "arguments", "words"),
    [
        (16, ["--batch-size", "512"], "batch_size is 512: expected 1 to"),
        (16, ["--batch-size", "2", "--crop-padding", "16"], "crop_padding is 16: expected 0 to 15"),
        (4, ["--batch-size", "2"], "images of 4×4 pixels"),
        (16, ["--batch-size", "1"], "one image at a time is too little for batch norm"),
    ],
)
def test_refused_settings_leave_no_folder(size, arguments, words, tmp_path, monkeypatch, capsys):
    pictures = make_pictures(tmp_path / "pictures", size)
    (tmp_path / "there").mkdir()
    for out in ([], ["--out", tmp_path / "out"], ["--out", tmp_path / "there" / "a" / "b"]):
        status, printed = run(monkeypatch, capsys, "--data", pictures, *arguments, *out)
        assert (status, words in printed) == (1, True), printed
        assert sorted(path.name for path in tmp_path.iterdir()) == ["pictures", "there"]
        assert list((tmp_path / "there").iterdir()) == []


def test_a_second_run_in_the_same_folder_is_refused(trained, monkeypatch, capsys):
    out, _ = trained
    before = (out / checkpoint.MODEL_FILE).read_bytes()
    status, printed = run(monkeypatch, capsys, *FAST, "--out", out)
    assert status == 1
    assert "holds a run already: add --resume" in printed
    assert (out / checkpoint.MODEL_FILE).read_bytes() == before


def test_a_folder_that_another_process_trains_in_is_left_alone(trained, monkeypatch, capsys):
    """Neither a start nor a resume gets in; what resumes the newest run takes the newest that nobody is at."""
    out, _ = trained
    (out / cnn.HISTORY_FILE).unlink()  # as if it had been stopped after its last epoch
    for folder in ("older", "newer"):
        shutil.copytree(out, cnn.RUNS / folder)
    os.utime(cnn.RUNS / "older" / checkpoint.STATE_FILE, (0, 0))
    with files.claimed(cnn.RUNS / "newer"), files.claimed(cnn.RUNS / "begun"):
        for arguments in (["--resume", "--out", cnn.RUNS / "newer"], [*FAST, "--out", cnn.RUNS / "begun"]):
            status, printed = run(monkeypatch, capsys, *arguments)
            assert (status, "is being trained by another process" in printed) == (1, True), printed
        status, printed = run(monkeypatch, capsys, "--resume", "--no-test")
        assert (status, "older" in printed) == (0, True), printed
        assert not (cnn.RUNS / "newer" / cnn.HISTORY_FILE).exists()
    assert run(monkeypatch, capsys, "--resume", "--no-test")[0] == 0
    assert (cnn.RUNS / "newer" / cnn.HISTORY_FILE).exists()


def test_predict_names_a_file_that_is_no_image(trained, tmp_path, monkeypatch, capsys):
    out, _ = trained
    (tmp_path / "note.png").write_text("no image")
    status, printed = run(monkeypatch, capsys, "predict", "--run", out, tmp_path / "note.png")
    assert status == 1
    assert "note.png" in printed


# ------------------------------------------------------------------------------------------------------------- ablate


def test_ctrl_c_after_the_last_epoch_says_how_the_run_ends(tmp_path, monkeypatch, capsys):
    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cnn, "draw", stopped)
        status, printed = run(patch, capsys, *FAST, "--epochs", 1, "--no-test", "--out", tmp_path)
    assert (status, "Go on with: python cnn.py --resume" in printed) == (130, True), printed
    assert run(monkeypatch, capsys, "--resume", "--out", tmp_path)[0] == 0
    assert (tmp_path / cnn.HISTORY_FILE).exists()


def test_compiling_without_a_compiler_is_answered_in_one_sentence(tmp_path, monkeypatch, capsys):
    def without(*_):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found")

    monkeypatch.setattr(train, "compile_network", lambda *_: without)
    status, printed = run(monkeypatch, capsys, *FAST, "--epochs", 1, "--compile", "--out", tmp_path)
    assert (status, "--compile needs a C++ compiler, and there is none" in printed) == (1, True), printed


def test_an_error_without_a_number_is_told_without_one(tmp_path):
    with pytest.raises(OSError, match=r"^busy\. Then: nothing was kept"), cnn.resumable(tmp_path):
        raise TimeoutError("busy")


def test_a_closed_output_is_no_error(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "argv", ["cnn.py", "cache", "info"])
    with pytest.raises(SystemExit) as left:
        cnn.main()
    assert not left.value.code


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_folder_whose_name_is_no_text_is_trained_on_and_exported(tmp_path, monkeypatch, capsys):
    pictures = make_pictures(tmp_path / "pictures-\udcff", 16)
    arguments = ["--data", pictures, "--batch-size", "8", "--width", "4", "--epochs", 1, "--precision", "fp32"]
    status, printed = run(monkeypatch, capsys, *arguments, "--out", tmp_path / "run")
    assert status == 0, printed
    status, printed = run(monkeypatch, capsys, "export", "--run", tmp_path / "run", "--out", tmp_path / "model.onnx")
    assert status == 0, printed


@pytest.fixture
def tiny_experiment(tmp_path, monkeypatch):
    """One experiment, of four runs for its sweep and four at the best rates; folders of its own."""
    tiny = experiments.Experiment(
        question="Does it work?",
        lesson="01_data_statistics",
        vary={"norm": ("batch", "none")},
        base=CNNConfig(width=4),
        recipe=train.Recipe(epochs=1, batch_size=128),
        source=ablation.Source(images=1024),
        lrs=(1e-5, 0.1),
        seeds=(0, 1),
        claims=(experiments.Claim("batch norm helps", "batch", "none"),),
    )
    monkeypatch.setattr(experiments, "EXPERIMENTS", {"tiny": tiny})
    for kind in ("cache", "results", "figures"):
        monkeypatch.setenv(f"CNN_{kind.upper()}_DIR", str(tmp_path / kind))
    return tmp_path


def test_ablate_plans_runs_and_writes_rows_and_a_figure(tiny_experiment, monkeypatch, capsys):
    status, printed = run(monkeypatch, capsys, "ablate", "tiny", "--plan")
    assert status == 0
    assert re.search(r"12 runs, 0 of them kept already; the others take about 0\.0 core-hours and 0\.0 MB", printed)
    status, printed = run(monkeypatch, capsys, "ablate", "--plan")
    assert status == 1
    assert "--plan of what? name experiments, or all" in printed
    status, printed = run(monkeypatch, capsys, "ablate", "all", "--jobs", 1, "--precision", "fp32")
    assert status == 0, printed
    assert "tiny.csv and" in printed
    assert len(experiments.load("tiny").runs["seed"].unique()) == 2
    with Image.open(tiny_experiment / "figures" / "evidence_tiny.png") as picture:
        assert min(picture.size) > 300
    assert re.search(r"norm; measured on [^;]*\n", run(monkeypatch, capsys, "ablate", "--list")[1])
    monkeypatch.setitem(experiments.EXPERIMENTS, "tiny", replace(experiments.find("tiny"), lrs=(0.2,)))
    told = run(monkeypatch, capsys, "ablate", "--list")[1]
    assert "stale (lrs: was [1e-05, 0.1], is [0.2]): python cnn.py ablate tiny" in told, told
    monkeypatch.setitem(experiments.EXPERIMENTS, "tiny", replace(experiments.find("tiny"), lrs=(1e-5, 0.1)))
    assert "12 runs, 12 of them kept" in run(monkeypatch, capsys, "ablate", "tiny", "--plan", "--precision", "fp32")[1]


def test_ablate_lists_the_experiments_and_the_cache_says_what_it_holds(tiny_experiment, monkeypatch, capsys):
    status, printed = run(monkeypatch, capsys, "ablate", "--list")
    assert status == 0
    assert "tiny        Does it work? norm; no results: " in printed
    (files.cache_dir() / "mnist" / "raw").mkdir(parents=True)
    (files.cache_dir() / "mnist" / "raw" / "images").write_bytes(b"x" * 3_000_000)
    (ablation.folder()).mkdir(parents=True)
    (ablation.folder() / "a.safetensors").write_bytes(b"x" * 2_000_000)
    printed = run(monkeypatch, capsys, "cache", "info")[1]
    assert re.search(r"finished runs +1 files +2\.0 MB", printed)
    assert re.search(r"mnist \(download\) +1 files +3\.0 MB", printed)
    assert "deleted 1 finished runs" in run(monkeypatch, capsys, "cache", "clear")[1]
    assert list(ablation.folder().iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nosuch"], "no experiment 'nosuch': choose one of"),
        (["input", "--scheduler", "tcp://nobody"], "no scheduler answers at 'tcp://nobody'"),
        (["input", "--precision", "fp8"], "precision 'fp8' is unknown"),
    ],
)
def test_ablate_says_what_is_wrong(arguments, words, monkeypatch, capsys):
    monkeypatch.setattr(cluster, "WAIT_SECONDS", 1.0)
    status, printed = run(monkeypatch, capsys, "ablate", *arguments)
    assert status == 1
    assert words in printed


@pytest.mark.skipif(sys.platform == "win32", reason="a console's Ctrl-C cannot be sent there")
def test_ctrl_c_ends_a_sweep_with_one_sentence(tmp_path):
    env = os.environ | {f"CNN_{kind}_DIR": str(tmp_path) for kind in ("CACHE", "RESULTS", "FIGURES")}
    code = (
        "import signal, sys, cnn; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "sys.argv = ['cnn.py', 'ablate', 'schedule', '--jobs', '1']; cnn.main()"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=files.ROOT, env=env, **pipes)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "runs").glob("[!.]*")) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the finished runs are kept, and the same command goes on" in printed
    assert "Traceback" not in errors


def test_compare_writes_one_page_of_trained_runs(trained, tmp_path, monkeypatch, capsys):
    out, _ = trained
    page = tmp_path / "page.html"
    status, printed = run(monkeypatch, capsys, "compare", out, "--out", page)
    assert status == 0, printed
    assert "page.html: runs; open it in a browser" in printed
    text = page.read_text(encoding="utf-8")
    assert '"batch_size":128' in text
    assert '"validation accuracy":{"x":[1,2]' in text


def test_compare_says_what_is_missing(tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    for path, words in ((tmp_path / "no.csv", "there is no"), (tmp_path / "empty", "there is nothing to compare")):
        status, printed = run(monkeypatch, capsys, "compare", path, "--out", tmp_path / "page.html")
        assert status == 1
        assert words in printed
    assert not (tmp_path / "page.html").exists()
