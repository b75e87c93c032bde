"""Pictures of a search, as PNG: loss against dollars, and the learning curves.

Drawn on matplotlib's Agg canvas without pyplot, so that they need no display and leave no state.
Marks carry short numbers, and a key beside the axes says what they stand for: labels of any length
stay apart.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from thriftlm.review.labels import (
    DPI,
    KEY_ROWS,
    number,
    number_in_column,
    write_key,
)
from thriftlm.review.wording import counted, usd

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
"""Okabe and Ito, Color Universal Design (2008): told apart with any colour vision."""
FRONT, WINNER, DOMINATED = PALETTE[0], PALETTE[5], "#A6A6A6"
SIZE_INCHES = (14.0, 7.0)
PARETO_NOTE = (
    "Dollars follow from measured speed; loss at budget is predicted from the curves of the "
    "search, bars are its 90% interval, cut at the edge."
)
CURVES_NOTE = (
    "Filled marks are measured; open ones are predicted at the training budget, from all curves of "
    "the search."
)
GROUP_MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")


@dataclass(frozen=True)
class PicturePoint:
    """One trial in the plane of loss and money."""

    label: str
    """What sets it apart, in a few words."""
    usd_per_btok: float
    """USD per billion tokens."""
    loss: float
    """Predicted loss at the training budget, nats per token."""
    low: float | None = None
    high: float | None = None
    on_front: bool = False
    """Whether no other trial is better in one and as good in the other."""
    is_winner: bool = False

    @property
    def interval(self) -> tuple[float, float] | None:
        """From low to high, where both are known; an end may be infinite."""
        if self.low is None or self.high is None or math.isnan(self.low + self.high):
            return None
        return self.low, self.high


@dataclass(frozen=True)
class PictureCurve:
    """The validation losses of one trial."""

    label: str
    group: str
    """Curves of one group share a colour, for example the strategy."""
    tokens: Sequence[int]
    losses: Sequence[float]
    """Nats per token, one for each of `tokens`."""
    predicted: tuple[float, float] | None = None
    """Tokens that the training budget buys, and the predicted loss there."""
    is_winner: bool = False


Drawn = TypeVar("Drawn", PicturePoint, PictureCurve)


def pareto_picture(
    points: Sequence[PicturePoint], path: Path, search: str, footnote: str = PARETO_NOTE
) -> None:
    """A PNG of loss at budget against USD per billion tokens, the Pareto set joined and numbered.

    Args:
        points: all scored trials.
        path: where the PNG goes.
        search: its name, for the title.
        footnote: what is measured and what is predicted.

    Raises:
        ValueError: no point has a finite loss and a price above zero.
    """
    points = [p for p in points if math.isfinite(p.loss) and 0 < p.usd_per_btok < math.inf]
    if not points:
        raise ValueError("a Pareto picture needs a trial with a finite loss and a price above 0")
    figure, axes = canvas(f"{search}: loss at budget against cost", footnote)
    axes.set_xlabel("USD per billion training tokens (log scale; left is cheaper)", fontsize=12)
    axes.set_ylabel("predicted loss at budget, nats per token (down is better)", fontsize=12)
    log_x(axes, [point.usd_per_btok for point in points], dollars)
    front = sorted((p for p in points if p.on_front), key=lambda p: (p.usd_per_btok, p.loss))
    limit_y(axes, points)
    draw_intervals(axes, points)
    draw_points(axes, points, front)
    shown = for_key(front)
    places = [(p.usd_per_btok, p.loss) for p in points]
    number(axes, [(p.usd_per_btok, p.loss) for p in shown], places)
    key = [(p.label, f"{p.loss:.3f} nats, {usd(p.usd_per_btok)}/Btok", p.is_winner) for p in shown]
    write_key(figure, "Pareto set, cheapest first", key, len(front), WINNER)
    write_legend(axes)
    save(figure, path)


def curves_picture(
    curves: Sequence[PictureCurve], path: Path, search: str, footnote: str = CURVES_NOTE
) -> None:
    """A PNG of validation loss against tokens, one line a trial, coloured by group.

    Args:
        curves: trials with at least one loss; others are left out.
        path: where the PNG goes.
        search: its name, for the title.
        footnote: what is measured and what is predicted.

    Raises:
        ValueError: no curve has a finite loss.
    """
    curves = [finite(curve) for curve in curves]
    curves = [curve for curve in curves if curve.tokens]
    if not curves:
        raise ValueError("a picture of curves needs a trial that measured a finite loss")
    figure, axes = canvas(f"{search}: learning curves", footnote)
    axes.set_xlabel("training tokens (log scale)", fontsize=12)
    axes.set_ylabel("validation loss, nats per token", fontsize=12)
    horizons = [curve.predicted[0] for curve in curves if curve.predicted]
    log_x(axes, [t for curve in curves for t in curve.tokens] + horizons, counted)
    groups = list(dict.fromkeys(curve.group for curve in curves))
    for curve in curves:
        draw_curve(axes, curve, groups.index(curve.group))
    draw_group_legend(axes, groups, curves)
    best = sorted(curves, key=lambda c: c.predicted[1] if c.predicted else c.losses[-1])
    shown = for_key(best)
    number_in_column(axes, [curve_end(curve) for curve in shown])
    key = [(c.label, outcome(c), c.is_winner) for c in shown]
    write_key(figure, "Trials, lowest loss first", key, len(best), WINNER)
    write_legend(axes)
    save(figure, path)


def canvas(title: str, footnote: str) -> tuple[Figure, Axes]:
    """An empty figure with room for a key at its right, and its axes."""
    figure = Figure(figsize=SIZE_INCHES, dpi=DPI, facecolor="white")
    axes = figure.add_axes((0.065, 0.125, 0.515, 0.735))
    figure.text(0.065, 0.945, title, fontsize=16, fontweight="bold")
    figure.text(0.065, 0.018, footnote, fontsize=9, color="#595959")
    axes.grid(True, which="major", color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=11)
    return figure, axes


def log_x(axes: Axes, values: Sequence[float], name: Callable[[float], str]) -> None:
    """A log axis around the values, with enough named ticks also within one decade."""
    axes.set_xscale("log")
    low, high = min(values), max(values)
    margin = max((high / low) ** 0.12, 1.1)
    axes.set_xlim(low / margin, high * margin)
    decades = math.log10(high / low * margin**2)
    if decades < 0.5:
        axes.xaxis.set_major_locator(MaxNLocator(6))
    else:
        steps = (1, 2, 3, 5, 7) if decades < 1.5 else (1, 3) if decades < 4 else (1,)
        axes.xaxis.set_major_locator(LogLocator(subs=steps, numticks=30))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: name(value)))
    axes.xaxis.set_minor_locator(NullLocator())


def limit_y(axes: Axes, points: Sequence[PicturePoint]) -> None:
    """Show all losses; an interval may leave the picture where it is far wider than they differ."""
    losses = [point.loss for point in points]
    spread = max(max(losses) - min(losses), 0.1)
    ends = losses + [end for point in points for end in point.interval or ()]
    bottom = max(min(ends), min(losses) - 0.6 * spread) - 0.08 * spread
    top = min(max(ends), max(losses) + 0.6 * spread) + 0.08 * spread
    axes.set_ylim(bottom, top)


def draw_intervals(axes: Axes, points: Sequence[PicturePoint]) -> None:
    """Thin vertical bars from low to high."""
    bottom, top = axes.get_ylim()
    for point in points:
        if point.interval is not None:
            low, high = max(point.interval[0], bottom), min(point.interval[1], top)
            colour = FRONT if point.on_front else DOMINATED
            axes.vlines(point.usd_per_btok, low, high, colour, linewidth=1, alpha=0.6)


def draw_points(axes: Axes, points: Sequence[PicturePoint], front: Sequence[PicturePoint]) -> None:
    """Dominated trials in grey, the front over them as a step line, the winner as a star."""
    rest = [point for point in points if not point.on_front]
    if rest:
        axes.scatter(*coordinates(rest), s=46, color=DOMINATED, label="dominated", zorder=3)
    if front:
        x, y = coordinates(front)
        axes.step(x, y, where="post", color=FRONT, linewidth=1.6, zorder=4)
        axes.scatter(x, y, s=80, color=FRONT, label="Pareto set", zorder=5)
    winners = [point for point in points if point.is_winner]
    if winners:
        style: dict[str, Any] = {
            "marker": "*",
            "s": 380,
            "color": WINNER,
            "edgecolors": "white",
            "zorder": 6,
        }
        axes.scatter(*coordinates(winners), label="best by the objective", **style)


def coordinates(points: Sequence[PicturePoint]) -> tuple[list[float], list[float]]:
    """Dollars and losses."""
    return [p.usd_per_btok for p in points], [p.loss for p in points]


def draw_curve(axes: Axes, curve: PictureCurve, group: int) -> None:
    """A line with its reports; dashes lead to what is predicted."""
    colour = PALETTE[group % len(PALETTE)]
    mark = GROUP_MARKS[group % len(GROUP_MARKS)]
    width = 2.8 if curve.is_winner else 1.4
    axes.plot(curve.tokens, curve.losses, color=colour, marker=mark, markersize=4, linewidth=width)
    if curve.predicted is not None:
        tokens, loss = curve.predicted
        x, y = [curve.tokens[-1], tokens], [curve.losses[-1], loss]
        axes.plot(x, y, color=colour, linestyle=(0, (2, 3)), linewidth=1)
        style: dict[str, Any] = {
            "marker": mark,
            "s": 60,
            "facecolors": "white",
            "edgecolors": colour,
        }
        axes.scatter([tokens], [loss], zorder=5, **style)
    if curve.is_winner:
        axes.scatter(
            *curve_end(curve), marker="*", s=300, color=WINNER, edgecolors="white", zorder=6
        )


def draw_group_legend(axes: Axes, groups: Sequence[str], curves: Sequence[PictureCurve]) -> None:
    """Which colour and mark is which group."""
    for i, group in enumerate(groups):
        style: dict[str, Any] = {
            "color": PALETTE[i % len(PALETTE)],
            "marker": GROUP_MARKS[i % len(GROUP_MARKS)],
        }
        axes.plot([], [], label=group, **style)
    if any(curve.predicted for curve in curves):
        axes.plot(
            [],
            [],
            label="predicted at budget",
            color="#595959",
            linestyle=(0, (2, 3)),
            marker="o",
            markerfacecolor="white",
        )
    if any(curve.is_winner for curve in curves):
        axes.scatter([], [], marker="*", s=300, color=WINNER, label="best by the objective")


def curve_end(curve: PictureCurve) -> tuple[float, float]:
    """Where its number stands: at the prediction, else at the last report."""
    return curve.predicted or (curve.tokens[-1], curve.losses[-1])


def outcome(curve: PictureCurve) -> str:
    """Its loss in words."""
    measured = f"{curve.losses[-1]:.3f} nats at {counted(curve.tokens[-1])}"
    return measured if curve.predicted is None else f"{curve.predicted[1]:.3f} nats predicted"


def finite(curve: PictureCurve) -> PictureCurve:
    """The curve without what is not finite."""
    pairs = zip(curve.tokens, curve.losses, strict=True)
    kept = [(tokens, loss) for tokens, loss in pairs if tokens > 0 and math.isfinite(loss)]
    predicted = curve.predicted
    if predicted is not None and not (0 < predicted[0] < math.inf and math.isfinite(predicted[1])):
        predicted = None
    tokens, losses = [t for t, _ in kept], [loss for _, loss in kept]
    return replace(curve, tokens=tokens, losses=losses, predicted=predicted)


def for_key(items: Sequence[Drawn]) -> list[Drawn]:
    """As many as the key has room for, the winner among them."""
    shown = list(items[:KEY_ROWS])
    left_out = [item for item in items[KEY_ROWS:] if item.is_winner]
    return shown[: KEY_ROWS - len(left_out)] + left_out


def write_legend(axes: Axes) -> None:
    """What the marks mean, above the axes, where it covers nothing."""
    count = len(axes.get_legend_handles_labels()[0])
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(-0.01, 1.0),
        ncols=count if count <= 6 else math.ceil(count / 2),
        frameon=False,
        fontsize=10,
        columnspacing=1.4,
        handletextpad=0.5,
    )


def dollars(value: float) -> str:
    """USD with three significant digits, as on an axis."""
    return f"${value:,.0f}" if value >= 100 else f"${float(f'{value:.3g}'):g}"


def save(figure: Figure, path: Path) -> None:
    """Write the PNG, and its folder where that is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
