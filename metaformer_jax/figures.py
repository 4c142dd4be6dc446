"""The pixels of figures that matplotlib draws, without a display."""

import pathlib
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import UInt8

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def to_array(figure: "Figure") -> UInt8[np.ndarray, "h w 3"]:
    """The figure's pixels."""
    # Programs that draw nothing do not wait for this import.
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def save_png(figure: "Figure", path: pathlib.Path) -> None:
    """Writes the figure as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure).print_png(str(path))
