import math
import subprocess
import sys
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from thriftlm.review import labels, pictures
from thriftlm.review.pictures import PictureCurve, PicturePoint, curves_picture, pareto_picture

FRONT = [PicturePoint(f"front {i}", 1.0 * 2**i, 4.0 - 0.1 * i, 3.5, 4.5, True) for i in range(4)]
REST = [PicturePoint(f"rest {i}", 3.0 + i, 4.2 + 0.05 * i, 4.0, 4.4) for i in range(4)]
POINTS = [*FRONT[:-1], replace(FRONT[-1], is_winner=True), *REST]
CURVES = [
    PictureCurve(
        label=f"trial {i}",
        group=group,
        tokens=[100_000, 200_000, 400_000],
        losses=[5.0 + 0.1 * i, 4.5 + 0.1 * i, 4.2 + 0.1 * i],
        predicted=(5e6, 3.5 + 0.1 * i),
        is_winner=i == 0,
    )
    for i, group in enumerate(["single", "ddp", "zero2"])
]


def count(path: Path, colour: str) -> int:
    """Pixels of a colour; the smoothed edges of black text are grey too."""
    pixels = imread(path)[:, :, :3]
    return int(np.all(np.abs(pixels - np.array(to_rgb(colour))) < 0.01, axis=-1).sum())


def test_the_pareto_picture_shows_front_winner_and_rest(tmp_path: Path) -> None:
    path = tmp_path / "new" / "pareto.png"
    pareto_picture(POINTS, path, "quickstart", "measured")
    assert imread(path).shape[:2] == (700, 1400)
    for colour in (pictures.FRONT, pictures.WINNER, pictures.DOMINATED):
        assert count(path, colour) > 100


def test_no_winner_no_star(tmp_path: Path) -> None:
    pareto_picture(FRONT, tmp_path / "p.png", "quickstart")
    assert count(tmp_path / "p.png", pictures.FRONT) > 100
    assert count(tmp_path / "p.png", pictures.WINNER) == 0
    pareto_picture([*FRONT, *REST], tmp_path / "q.png", "quickstart")
    more = count(tmp_path / "q.png", pictures.DOMINATED)
    assert more > count(tmp_path / "p.png", pictures.DOMINATED) + 100


def test_the_curves_picture_colours_groups(tmp_path: Path) -> None:
    path = tmp_path / "curves.png"
    curves_picture(CURVES, path, "quickstart", "predicted")
    assert imread(path).shape[:2] == (700, 1400)
    for colour in (*pictures.PALETTE[:3], pictures.WINNER):
        assert count(path, colour) > 100


@pytest.mark.parametrize("place", [labels.number_in_column, None], ids=["column", "around"])
def test_numbers_never_overlap(place: object) -> None:
    """Also where all marks lie on one spot, and at the upper edge."""
    figure, axes = pictures.canvas("t", "")
    figure.draw_without_rendering()
    for y in (0.5, 0.99):
        spot = [(0.5 + 0.001 * i, y) for i in range(labels.KEY_ROWS)]
        if place is None:
            boxes = labels.number(axes, spot, spot)
        else:
            boxes = labels.number_in_column(axes, spot)
        for one, other in combinations(boxes, 2):
            assert min(one.x1, other.x1) - max(one.x0, other.x0) < 1e-6 or (
                min(one.y1, other.y1) - max(one.y0, other.y0) < 1e-6
            )
        for box in boxes:
            assert axes.bbox.y0 <= box.y0
            assert box.y1 <= axes.bbox.y1 + 1e-6


def test_the_key_always_has_the_winner() -> None:
    many = [replace(FRONT[0], label=str(i)) for i in range(40)]
    many[30] = replace(many[30], is_winner=True)
    shown = pictures.for_key(many)
    assert len(shown) == labels.KEY_ROWS
    assert shown[-1] is many[30]
    assert [point.label for point in shown[:-1]] == [str(i) for i in range(labels.KEY_ROWS - 1)]


@pytest.mark.parametrize("interval", [(None, None), (math.nan, 4.0), (-math.inf, math.inf)])
def test_intervals_that_are_not_known(
    interval: tuple[float | None, float | None], tmp_path: Path
) -> None:
    low, high = interval
    pareto_picture([replace(FRONT[0], low=low, high=high)], tmp_path / "p.png", "one trial")


def test_what_is_not_finite_is_left_out(tmp_path: Path) -> None:
    broken = [replace(FRONT[0], loss=math.nan), replace(FRONT[0], usd_per_btok=0.0)]
    pareto_picture([*broken, *FRONT], tmp_path / "p.png", "quickstart")
    with pytest.raises(ValueError, match="finite loss and a price above 0"):
        pareto_picture(broken, tmp_path / "q.png", "quickstart")

    diverged = replace(CURVES[0], losses=[5.0, math.inf, math.nan], predicted=(5e6, math.nan))
    assert pictures.finite(diverged).tokens == [100_000]
    assert pictures.finite(diverged).predicted is None
    curves_picture([diverged], tmp_path / "c.png", "quickstart")
    with pytest.raises(ValueError, match="measured a finite loss"):
        curves_picture([replace(diverged, losses=[math.nan] * 3)], tmp_path / "d.png", "x")


@pytest.mark.parametrize(
    ("value", "text"), [(0.0312, "$0.0312"), (5, "$5"), (12.345, "$12.3"), (12345, "$12,345")]
)
def test_dollars(value: float, text: str) -> None:
    assert pictures.dollars(value) == text


def test_no_global_state() -> None:
    code = "import sys, thriftlm.review.pictures; assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
