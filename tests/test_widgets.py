"""Uploads and drawings: the same file, whichever widget and whichever ipywidgets it comes from."""

import io
import sys

import numpy as np
import pytest
from PIL import Image

from utils import widgets


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)))


def test_uploads_of_both_generations_of_ipywidgets_are_read():
    now = ({"name": "a.png", "type": "image/png", "size": 2, "content": memoryview(b"ab"), "last_modified": 0},)
    before = {"a.png": {"metadata": {"name": "a.png"}, "content": b"ab"}}
    assert widgets.uploaded(now) == widgets.uploaded(before) == [("a.png", b"ab")]
    assert widgets.uploaded(()) == widgets.uploaded({}) == []


def test_drawing_is_a_picture_of_its_strokes():
    picture = pixels(widgets.drawn([("#ffffff", 10.0, [(20, 50), (80, 50)])], side=100))
    assert picture.shape == (100, 100, 3)
    white = (picture == 255).all(2)
    assert white[46:54, 20:80].all()
    assert not white[:44].any()
    assert not white[57:].any()
    assert white[50, 16]  # a round end
    assert not white[50, 10]
    assert pixels(widgets.drawn([], side=100)).max() == 0


def test_a_touch_is_a_dot_and_later_strokes_lie_on_top():
    picture = pixels(widgets.drawn([("#ffffff", 30.0, [(50, 50)]), ("#000000", 10.0, [(50, 50)])], side=100))
    assert picture[50, 50].max() == 0
    assert picture[50, 60].min() == 255
    assert picture[50, 70].max() == 0


class Mouse:
    """Stands for the browser: the canvas of a sketcher, told to move."""

    def __init__(self, views):
        [row] = views
        self.canvas, controls, _ = row.children
        self.pen, self.thickness, buttons = controls.children
        self.ask, self.clear = buttons.children

    def draw(self, *points: tuple[float, float]) -> None:
        self.canvas._mouse_move_callbacks(60.0, 200.0)  # before the button is down
        self.canvas._mouse_down_callbacks(*points[0])
        for point in points[1:]:
            self.canvas._mouse_move_callbacks(*point)
        self.canvas._mouse_up_callbacks(*points[-1])
        self.canvas._mouse_move_callbacks(60.0, 200.0)


@pytest.fixture
def sketch():
    received = []
    return Mouse(widgets.sketcher(lambda name, content: received.append((name, content)))), received


def test_sketcher_hands_over_what_was_drawn(sketch):
    mouse, received = sketch
    mouse.thickness.value = 20
    mouse.draw((40.0, 100.0), (120.0, 100.0), (120.0, 160.0))
    mouse.pen.value = "grey"
    mouse.draw((200.0, 200.0))
    mouse.ask.click()
    [(name, content)] = received
    assert name == "drawing.png"
    picture = pixels(content)
    assert picture.shape == (widgets.SIDE, widgets.SIDE, 3)
    assert picture[100, 80].tolist() == picture[140, 120].tolist() == [255] * 3
    assert picture[200, 200].tolist() == [0x90] * 3
    assert picture[:, 25].max() == 0
    assert picture[180:, 30:90].max() == 0  # where the mouse went with its button up


def test_clear_empties_the_square(sketch):
    mouse, received = sketch
    mouse.draw((40.0, 100.0), (120.0, 100.0))
    mouse.clear.click()
    mouse.ask.click()
    assert pixels(received[0][1]).max() == 0


def test_colours_are_there_where_images_have_them():
    assert Mouse(widgets.sketcher(print, colour=True)).pen.options != Mouse(widgets.sketcher(print)).pen.options


def test_without_ipycanvas_there_is_nothing_to_draw_in(monkeypatch):
    monkeypatch.setitem(sys.modules, "ipycanvas", None)
    assert widgets.sketcher(print) == []
