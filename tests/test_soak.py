"""Long: 200 short runs in one process leave nothing behind. Wide: 30 processes start at once on one checkout."""

import csv
import gc
import multiprocessing
import os
import statistics
import threading
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
from PIL import Image
from torch.nn.modules import module as modules
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from utils import ablation, checkpoint, data, device, examine, files, plots, probes, train
from utils.model import CNN, CNNConfig

RUNS, WARM_UP = 200, 10
STARTS = 30
RECIPE = train.Recipe(epochs=1, batch_size=32, lr=0.05)
SMALL = CNNConfig(width=4)
FAST = {"device": "cpu", "precision": "fp32", "progress": False}


def fresh(workers: int) -> ProcessPoolExecutor:
    """Return so many processes that have imported everything already, and have run nothing."""
    context = multiprocessing.get_context("spawn" if os.name == "nt" else "forkserver")
    if os.name != "nt":
        context.set_forkserver_preload(
            ["utils.ablation", "utils.plots", "utils.examine", "utils.probes", "torch._dynamo"]
        )
    return ProcessPoolExecutor(workers, mp_context=context, initializer=alone)


def alone() -> None:
    """One thread a process; nothing to look at."""
    import matplotlib
    import torch

    matplotlib.use("agg")
    torch.set_num_threads(1)


# ------------------------------------------------------------------------------------------------------------ long


def images_for_a_short_run() -> data.ImageData:
    images = ablation.load(ablation.Source(images=128))
    return replace(images, validation=images.validation[:64])


def one_run(images: data.ImageData, out: Path, seed: int) -> None:
    """What lessons do: a network trained with probes, its checkpoints written and resumed, figures drawn and closed."""
    recipe = replace(RECIPE, seed=seed, ema=0.9 if seed % 2 else 0.0)
    model = CNN(SMALL)
    with probes.Probes(model, every=2) as probe:
        history = train.fit(model, images, recipe, out=out, **FAST)
    probe.frame()
    if seed % 2:
        plots.plt.close(fig := plots.history(history))
        plots.quick_png(fig)
    else:
        train.fit(CNN(SMALL), images, recipe, out=out, resume=True, **FAST)
    if seed % 4 == 0:
        trained, card = checkpoint.load_model(out)
        stats, shown = train.stats_of(card), images.validation[:4]
        examine.grad_cam(trained, shown.images, stats, shown.labels, 4)
        examine.feature_maps(trained, shown.images[0], stats)
        plots.save(plots.samples(shown, images.class_names, 1), f"soak-{seed % 3}", show=False)
        with suppress(train.Diverged):  # and a run that fails in the middle
            train.fit(CNN(SMALL), images, replace(recipe, lr=1e6), **FAST)
    if seed % 10 == 0:
        options = {"source": ablation.Source(images=128), **FAST}
        two = {"norm": ["batch", "none"]}
        ablation.run("soak", SMALL, two, replace(RECIPE, batch_size=64), [seed], jobs=1, refresh=True, **options)


def held(process: psutil.Process, models: list) -> dict[str, float]:
    """Return what this process holds."""
    hooks = sum(
        len(hooks)
        for model in models
        for module in model.modules()
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    )
    everywhere = (modules._global_forward_hooks, modules._global_forward_pre_hooks, modules._global_backward_hooks)
    hooks += sum(map(len, (*everywhere, _global_optimizer_pre_hooks, _global_optimizer_post_hooks)))
    networks = sum(type(each) is CNN for each in gc.get_objects())
    return {
        "memory": process.memory_info().rss,
        "files": process.num_fds() if hasattr(process, "num_fds") else process.num_handles(),
        "threads": threading.active_count(),
        "processes": len(process.children(recursive=True)),
        "figures": len(plots.plt.get_fignums()),
        "hooks": hooks,
        "networks": networks,
    }


def soak(folder: Path, runs: int) -> pd.DataFrame:
    """Do so many runs in this process; return what it held after each."""
    for name in ("cache", "results", "figures"):
        os.environ[f"CNN_{name.upper()}_DIR"] = str(folder / name)
    process, images, rows = psutil.Process(), images_for_a_short_run(), []
    lasting = CNN(SMALL)  # probed again and again: its hooks must go each time
    for seed in range(runs):
        with probes.Probes(lasting, every=1):
            train.fit(lasting, images, replace(RECIPE, seed=seed), **FAST)
        one_run(images, folder / "run", seed)
        gc.collect()
        rows.append(held(process, [lasting]))
    return pd.DataFrame(rows)


def leaks(rows: pd.DataFrame) -> list[str]:
    """Return what grew after the first runs: memory by more than 5 % (medians of ten), anything else at all."""
    found = []
    early, late = (statistics.median(part) for part in (rows["memory"][WARM_UP : 2 * WARM_UP], rows["memory"][-10:]))
    if abs(late / early - 1) > 0.05:
        found.append(f"memory from {early / 1e6:.0f} to {late / 1e6:.0f} MB")
    for name in rows.columns.drop("memory"):
        before, after = rows[name][WARM_UP : 2 * WARM_UP].max(), rows[name][-10:].min()
        found += [f"{name} from {before} to {after}"] if after > before else []
    found += [
        f"{name}: {rows[name].iloc[-1]} are left" for name in ("figures", "hooks", "processes") if rows[name].iloc[-1]
    ]
    return found


def unfinished(folder: Path) -> list[str]:
    """Return the temporary files below `folder`; a lock stays, for the next one."""
    return [path.name for path in folder.rglob(".*") if path.suffix != ".lock"]


@pytest.mark.thorough
def test_200_runs_in_one_process_leave_nothing_behind(tmp_path):
    with fresh(1) as pool:
        rows = pool.submit(soak, tmp_path, RUNS).result()
    assert len(rows) == RUNS
    assert leaks(rows) == []
    assert unfinished(tmp_path) == []


def test_a_few_runs_leave_no_hook_figure_file_or_process(tmp_path):
    with fresh(1) as pool:
        rows = pool.submit(soak, tmp_path, 3).result()
    last = rows.iloc[-1]
    assert (last["figures"], last["hooks"], last["processes"]) == (0, 0, 0)
    assert last["networks"] == rows["networks"].iloc[-2]
    assert last["files"] == rows["files"].iloc[-2]
    assert last["threads"] == rows["threads"].iloc[-2]


@pytest.mark.parametrize("name", ["memory", "files", "threads", "processes", "figures", "hooks", "networks"])
def test_what_grows_is_found(name):
    flat = pd.DataFrame([dict.fromkeys(["memory", "files", "threads", "networks"], 400) for _ in range(40)])
    flat = flat.assign(processes=0, figures=0, hooks=0)
    assert leaks(flat) == []
    growing = flat.assign(**{name: flat[name] + 2 * flat.index})
    assert leaks(growing)[0].startswith(f"{name} from ")


# ------------------------------------------------------------------------------------------------------------ wide


def start(folder: Path, begin: float) -> tuple[str, str, str]:
    """What a kernel does first, at the same time as all others; return the sums of what it got."""
    for name in ("cache", "results", "figures"):
        os.environ[f"CNN_{name.upper()}_DIR"] = str(folder / name)
    warnings.filterwarnings("error", message=".*damaged")  # a file that was read half-written would be made again
    time.sleep(max(0.0, begin - time.time()))
    photos = data.load(folder / "photos", size=16, progress=False)
    test = photos.read_test("thirty at once")
    options = {"source": ablation.Source(images=64), **FAST}
    rows = ablation.run("wide", SMALL, {"norm": ["batch", "none"]}, RECIPE, [0], jobs=1, **options)
    numbers = rows.drop(columns="seconds").to_csv(index=False)
    files.write_text(files.results_dir() / "shared.txt", numbers)
    plots.save(plots.samples(photos.validation, photos.class_names, 1), "shared", show=False)
    return photos.checksum, data._checksum(test), numbers


def photos(folder: Path, classes: int, images: int) -> None:
    draws = np.random.default_rng(0)
    for label in range(classes):
        (folder / f"class {label}").mkdir(parents=True)
        for number in range(images):
            pixels = draws.integers(0, 256, (24, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"class {label}" / f"{number}.png")


def all_at_once(folder: Path, count: int) -> None:
    """Start so many processes on cold caches; all must get the same, and leave whole files only."""
    photos(folder / "photos", 3, 18)
    with fresh(count) as pool:
        begin = time.time() + 2
        found = list(pool.map(start, [folder] * count, [begin] * count))
    assert len(found) == count
    assert len(set(found)) == 1
    with (folder / "results" / "test_reads.csv").open(encoding="utf-8", newline="") as lines:
        reads = list(csv.reader(lines))
    assert reads[0] == ["date", "data", "checksum", "purpose"]
    assert [row[1:] for row in reads[1:]] == [["photos", found[0][0][:12], "thirty at once"]] * count
    assert (folder / "results" / "shared.txt").read_text(encoding="utf-8") == found[0][2]
    with Image.open(folder / "figures" / "shared.png") as picture:
        picture.load()
    kept = sorted((folder / "cache").rglob("*.safetensors"))
    assert len([path for path in kept if path.parent.name == "runs"]) == 2
    assert len([path for path in kept if path.parent.name == "folders"]) == 2
    assert unfinished(folder) == []


def sound(folder: Path, monkeypatch) -> None:
    """What is cached is taken by the next one, without a warning, and nothing is made again."""
    for name in ("cache", "results", "figures"):
        monkeypatch.setenv(f"CNN_{name.upper()}_DIR", str(folder / name))
    monkeypatch.setattr(data, "_make_cache", lambda *args, **options: pytest.fail("decoded again"))
    monkeypatch.setattr(ablation.Trial, "train", lambda self: pytest.fail("trained again"))
    start(folder, 0.0)


@pytest.mark.skipif(os.name == "nt", reason="Windows starts processes one after the other, and locks open files")
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("count", [4, pytest.param(STARTS, marks=pytest.mark.thorough)])
def test_simultaneous_starts_get_the_same_and_leave_sound_caches(count, tmp_path, monkeypatch):
    if device.free_memory(device.pick("cpu")) < count * 3 * 10**8:
        pytest.skip(f"{count} processes need {count * 0.3:.0f} GB of memory")
    all_at_once(tmp_path, count)
    sound(tmp_path, monkeypatch)
