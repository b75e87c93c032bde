"""Labels of a picture that never overlap: numbers beside marks, and the key that explains them."""

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox

from thriftlm.review.wording import shortened

DPI = 100
KEY_ROWS = 13
KEY_CHARACTERS = 66
ROW_PIXELS = 17.0
"""Height of a number."""
NEAR_POINTS = 20.0
"""Numbers further from their mark than this get a line to it."""
BELOW_LEFT = tuple(225 + turn for turn in (0, 30, -30, 60, -60, 90, -90, 120, -120, 150, 180))
"""Directions of a number from its mark in degrees, the first free one is taken: nothing lies below
and left of a Pareto set."""

Place = tuple[float, float]
Row = tuple[str, str, bool]
"""Label, figures and whether it is the winner's."""


def number(axes: Axes, places: Sequence[Place], marks: Sequence[Place]) -> list[Bbox]:
    """Write 1, 2, 3, ... beside the places, clear of all marks; the boxes of the numbers.

    Args:
        axes: with its final limits.
        places: what is numbered, in order.
        marks: what must stay visible.
    """
    taken = [around(axes.transData.transform(mark), 18, 18) for mark in marks]
    boxes = []
    for i, place in enumerate(places, start=1):
        mark = axes.transData.transform(place)
        offset, box = free_place(axes, mark, 12 * len(str(i)), taken)
        taken.append(box)
        boxes.append(box)
        write_number(axes, i, place, offset)
    return boxes


def number_in_column(axes: Axes, places: Sequence[Place]) -> list[Bbox]:
    """Write 1, 2, 3, ... at the right end, as high as the places where possible; their boxes."""
    pixels = [axes.transData.transform(place) for place in places]
    order = sorted(range(len(places)), key=lambda i: float(pixels[i][1]))
    heights = [float(pixels[i][1]) for i in order]
    for i in range(1, len(order)):
        heights[i] = max(heights[i], heights[i - 1] + ROW_PIXELS)
    ceiling = axes.bbox.y1 - ROW_PIXELS / 2
    for i in reversed(range(len(order))):
        heights[i] = min(heights[i], ceiling - (len(order) - 1 - i) * ROW_PIXELS)
    x = axes.bbox.x1 - ROW_PIXELS
    for i, y in zip(order, heights, strict=True):
        offset = (x - pixels[i][0]) * 72 / DPI, (y - pixels[i][1]) * 72 / DPI
        write_number(axes, i + 1, places[i], offset)
    return [around((x, y), 24, ROW_PIXELS) for y in heights]


def write_number(axes: Axes, i: int, place: Place, offset: Place) -> None:
    """Write a number at an offset in points from its place, with a line where that is far."""
    line = {"arrowstyle": "-", "color": "#8C8C8C", "linewidth": 0.7, "shrinkA": 2, "shrinkB": 5}
    axes.annotate(
        str(i),
        place,
        xytext=offset,
        textcoords="offset points",
        ha="center",
        va="center",
        fontsize=12,
        fontweight="bold",
        zorder=7,
        path_effects=[withStroke(linewidth=3, foreground="white")],
        arrowprops=line if math.hypot(*offset) > NEAR_POINTS else None,
    )


def free_place(axes: Axes, mark: Any, width: float, taken: Sequence[Bbox]) -> tuple[Place, Bbox]:
    """Offset in points from the mark and box in pixels of a number that covers nothing.

    Where all places near the mark are taken it is the last one that was tried.
    """
    for radius in (15, 22, 30, 40, 52, 66, 82):
        for angle in map(math.radians, BELOW_LEFT):
            offset = (radius * math.cos(angle), radius * math.sin(angle))
            centre = (mark[0] + offset[0] * DPI / 72, mark[1] + offset[1] * DPI / 72)
            box = around(centre, width, ROW_PIXELS)
            inside = axes.bbox.contains(*box.min) and axes.bbox.contains(*box.max)
            if inside and not any(box.overlaps(other) for other in taken):
                return offset, box
    return offset, box


def around(centre: Any, width: float, height: float) -> Bbox:
    """A box in pixels."""
    return Bbox.from_bounds(centre[0] - width / 2, centre[1] - height / 2, width, height)


def write_key(
    figure: Figure, title: str, rows: Sequence[Row], total: int, winner_colour: str
) -> None:
    """Number, label and figures of each row, at the right of the axes."""
    top, step = 0.845, 0.056
    figure.text(0.60, top, title, fontsize=12, fontweight="bold")
    for i, (label, detail, is_winner) in enumerate(rows, start=1):
        y = top - i * step
        colour = winner_colour if is_winner else "black"
        figure.text(0.617, y, str(i), fontsize=10, fontweight="bold", color=colour, ha="right")
        figure.text(0.626, y, shortened(label, KEY_CHARACTERS), fontsize=10, color=colour)
        figure.text(0.626, y - 0.022, detail, fontsize=9, color="#595959")
    if total > len(rows):
        more, y = f"and {total - len(rows)} more", top - (len(rows) + 1) * step
        figure.text(0.626, y, more, fontsize=9, color="#595959")
