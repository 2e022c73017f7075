"""Widgets as cell outputs that a reader without a kernel can do without."""

from typing import Any


def show(view: Any, text: str) -> None:
    """Shows the widget `view` as a cell's output; `text` stands in where it cannot be shown.

    The output is put together here, because widgets before ipywidgets 8 (Colab has 7.7) have no `_repr_mimebundle_`.
    """
    from IPython.display import display

    reference = {"version_major": 2, "version_minor": 0, "model_id": view.model_id}
    display({"application/vnd.jupyter.widget-view+json": reference, "text/plain": text}, raw=True)
