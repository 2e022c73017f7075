"""Widgets as cell outputs that a reader without a kernel can do without."""

import html
import io
from collections.abc import Callable, Sequence
from typing import Any

Stroke = tuple[str, float, list[tuple[float, float]]]  # colour, thickness in pixels, the points that it goes through
SIDE = 224  # of the square to draw in, pixels
PENS = {"white": "#ffffff", "grey": "#909090", "black": "#000000"}
COLOURED_PENS = PENS | {
    "red": "#d03030",
    "green": "#309030",
    "blue": "#3050d0",
    "yellow": "#e8d040",
    "brown": "#805030",
}


def show(view: Any, text: str) -> None:
    """Shows the widget `view` as a cell's output; `text` stands in where it cannot be shown.

    The output is put together here, because widgets before ipywidgets 8 (Colab has 7.7) have no `_repr_mimebundle_`.
    """
    from IPython.display import display

    reference = {"version_major": 2, "version_minor": 0, "model_id": view.model_id}
    display({"application/vnd.jupyter.widget-view+json": reference, "text/plain": text}, raw=True)


def description(name: str) -> str:
    """Return a name that comes from data as a widget's description: before ipywidgets 8 that was HTML."""
    import ipywidgets

    return html.escape(name) if int(ipywidgets.__version__.partition(".")[0]) < 8 else name


def uploader(receive: Callable[[str, bytes], None]) -> Any:
    """Return a button that uploads an image file, and hands its name and content to `receive`."""
    import ipywidgets

    button = ipywidgets.FileUpload(
        accept="image/*", multiple=False, description="Upload an image", layout={"width": "max-content"}
    )

    def hand_over(_: Any) -> None:
        for name, content in uploaded(button.value):
            receive(name, content)

    button.observe(hand_over, "value")
    return button


def uploaded(value: Any) -> list[tuple[str, bytes]]:
    """Return name and content of each file in a FileUpload's value: a tuple of dicts, or before ipywidgets 8 a dict."""
    if isinstance(value, dict):
        return [(name, bytes(file["content"])) for name, file in value.items()]
    return [(file["name"], bytes(file["content"])) for file in value]


def sketcher(receive: Callable[[str, bytes], None], colour: bool = False) -> list[Any]:
    """Return a square to draw in with the mouse or a finger, light on dark, and its buttons; none without ipycanvas.

    "Ask" hands what was drawn to `receive`, as the name and content of a PNG file.
    """
    try:
        import ipycanvas
    except ModuleNotFoundError:
        return []
    import ipywidgets

    pens, strokes = COLOURED_PENS if colour else PENS, []
    canvas = ipycanvas.Canvas(width=SIDE, height=SIDE, layout={"border": "1px solid #949494"})
    canvas.add_class("cnn-square")
    # ipycanvas takes every key, Tab too, once Tab has reached the square. What is not visible loses the focus again.
    style = "<style>.cnn-square:focus-visible {visibility: hidden}</style>"
    no_trap = ipywidgets.HTML(style, layout={"display": "none"})
    pen = ipywidgets.Dropdown(options=list(pens), description="pen")
    thickness = ipywidgets.IntSlider(value=18, min=2, max=60, description="thickness")
    clear, ask = (ipywidgets.Button(description=text) for text in ("Clear", "Ask"))

    def wipe(_: Any = None) -> None:
        strokes.clear()
        canvas.fill_style = "#000000"
        canvas.fill_rect(0, 0, SIDE, SIDE)

    def start(x: float, y: float) -> None:
        strokes.append((pens[pen.value], float(thickness.value), [(x, y)]))
        canvas.stroke_style, canvas.line_width, canvas.line_cap = pens[pen.value], thickness.value, "round"
        canvas.stroke_line(x, y, x + 0.01, y)
        down.append(True)

    def move(x: float, y: float) -> None:
        if down:
            canvas.stroke_line(*strokes[-1][2][-1], x, y)
            strokes[-1][2].append((x, y))

    down: list[bool] = []
    canvas.on_mouse_down(start)
    canvas.on_mouse_move(move)
    canvas.on_mouse_up(lambda x, y: down.clear())
    canvas.on_mouse_out(lambda x, y: down.clear())
    canvas.on_touch_start(lambda touches: start(*touches[0]))
    canvas.on_touch_move(lambda touches: move(*touches[0]))
    canvas.on_touch_end(lambda touches: down.clear())
    clear.on_click(wipe)
    ask.on_click(lambda _: receive("drawing.png", drawn(strokes)))
    wipe()
    buttons = ipywidgets.VBox([pen, thickness, ipywidgets.HBox([ask, clear])])
    return [ipywidgets.HBox([canvas, buttons, no_trap], layout={"flex_flow": "row wrap"})]


def drawn(strokes: Sequence[Stroke], side: int = SIDE) -> bytes:
    """Return the PNG file of `strokes` on a black square of `side` pixels."""
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", (side, side))
    pencil = ImageDraw.Draw(picture)
    for colour, thickness, points in strokes:
        pencil.line(points, fill=colour, width=round(thickness), joint="curve")
        for x, y in points:  # round ends, and a dot where there is one point only
            half = thickness / 2
            pencil.ellipse((x - half, y - half, x + half, y + half), fill=colour)
    content = io.BytesIO()
    picture.save(content, format="PNG")
    return content.getvalue()
