"""The benchmark measures what it says, both loops do the same work, and nothing is lost when it appends."""

import re
from itertools import count

import pandas as pd
import pytest
import torch

from utils import bench, files, train
from utils.model import CNN, CNNConfig, parts


def test_loops_are_measured_in_turn_and_the_first_round_is_not_counted():
    order = []
    ticks = count()

    def loop(name):
        order.append(name)
        return next(ticks)

    measured = bench.interleave({"a": lambda: loop("a"), "b": lambda: loop("b")}, rounds=2)
    assert order == ["a", "b"] * 3
    assert measured == {"a": [2, 4], "b": [3, 5]}


def test_training_takes_three_times_the_forward_flops():
    """But for the gradient of the image, which nobody needs: backward costs two products for each forward one."""
    forward = {name: flops for name, *_, flops, _ in parts(CNN(), 28)}
    assert bench.step_flops(CNNConfig(), (28, 28)) == 3 * sum(forward.values()) - forward["stem"]


def test_peak_is_that_of_a_matrix_product(monkeypatch):
    monkeypatch.setattr(bench, "PEAK_SIDE", 256)
    assert 1e8 < bench.matmul_peak(torch.device("cpu"), "fp32", repeats=2) < 1e16


def test_usual_loop_sees_the_embedded_images(tmp_path):
    """torchvision's own data set, normalized as ours is: one epoch without crops has the mean and std of the split."""
    bench.lay_out_for_torchvision(tmp_path)
    recipe = train.Recipe(crop_padding=0, batch_size=500)
    loader = bench.usual_loader(str(tmp_path), 2000, recipe, workers=0)
    images = torch.cat([images for images, _ in loader])
    assert images.shape == (2000, 1, 28, 28)
    assert images.mean().item() == pytest.approx(0, abs=0.02)
    assert images.std().item() == pytest.approx(1, abs=0.02)


def test_speed_compares_the_loops_and_keeps_the_rows(monkeypatch, capsys):
    """Two batches and one round: the figures are not to be believed, but all of them are there."""
    monkeypatch.setattr(bench, "PEAK_SIDE", 256)
    table = bench.speed(rounds=1, images=2 * train.Recipe.batch_size).set_index("what")
    usual, course = (
        table.filter(like=name, axis=0).query("unit == 'images/s'")["median"].item() for name in ("usual", "course")
    )
    assert table.loc["ratio of the two", "median"] == pytest.approx(course / usual)
    assert set(table["unit"]) == {"images/s", "×", "GFLOP/s", "%", "GB", "s"}
    assert "ratio of the two" in capsys.readouterr().out
    assert len(pd.read_csv(files.results_dir() / bench.SPEED_FILE)) == len(table)


def test_too_few_rounds_are_refused():
    with pytest.raises(ValueError, match="rounds=0"):
        bench.speed(rounds=0)


def test_rows_are_appended_with_their_machine(tmp_path):
    path = tmp_path / "speed.csv"
    for value in (1.0, 2.0):
        bench.append(path, pd.DataFrame([bench.row("a", "x", [value, value + 1, value + 3])]), {"cpu": "x, y"})
    rows = pd.read_csv(path)
    assert rows["median"].tolist() == [2.0, 3.0]
    assert rows["max"].tolist() == [4.0, 5.0]
    assert rows["n"].tolist() == [3, 3]
    assert set(rows["cpu"]) == {"x, y"}
    assert rows["commit"].str.len().gt(5).all()


def test_readme_states_rows_that_are_kept():
    """Rows that somebody adds later do not make it wrong."""
    readme = (files.ROOT / "README.md").read_text(encoding="utf-8")
    dates = re.search(rf"<!-- {bench.ACCURACY_FILE} of (\S+), {bench.SPEED_FILE} of (\S+) -->", readme)
    assert dates, "python cnn.py readme writes them"
    assert f"{bench.BEGIN}\n{bench.measured_block(*dates.groups())}\n{bench.END}" in readme


def test_stated_figures_are_those_that_the_course_promises():
    """At least 93.5 % in at most 4 minutes, twice the usual loop's speed, the first step within 8 s."""
    readme = (files.ROOT / "README.md").read_text(encoding="utf-8")
    dates = re.search(rf"<!-- {bench.ACCURACY_FILE} of (\S+), {bench.SPEED_FILE} of (\S+) -->", readme).groups()
    runs, loops = bench.measured_on(bench.ACCURACY_FILE, dates[0]), bench.measured_on(bench.SPEED_FILE, dates[1])
    median = loops.set_index("what")["median"]
    assert len(runs) == 5
    assert runs["test_accuracy"].median() >= 0.935
    assert runs["seconds"].median() <= 240
    assert median["ratio of the two"] >= 2
    assert median["from `python cnn.py` to the first step"] <= 8
