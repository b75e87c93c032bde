"""The four figures of Apple's study (arXiv 2410.19456), estimated beside published, as PNG."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullLocator

from thriftlm.review.apple_study import FIGURES, MODELS, Figure, Mark, Study, published
from thriftlm.review.labels import DPI
from thriftlm.review.pictures import GROUP_MARKS, PALETTE, save
from thriftlm.review.wording import counted
from thriftlm.spec import InputError

SIZE_INCHES = (14.0, 10.0)
LABELS = {"batch": "global batch, sequences", "n_gpus": "GPUs", "nodes": "nodes of up to 8 GPUs"}
FOOTNOTE = (
    "Lines with filled marks: estimated. Open marks: published, with error bars, read from the "
    "paper's vector paths.\nEach point is the best over all that is not shown; 0 is out of memory."
)


def draw(study: Study, folder: Path) -> list[Path]:
    """The four figures as `figure1_STACK.png` and so on in a folder, made where it is missing.

    Raises:
        InputError: they cannot be written.
    """
    paths = []
    for figure in FIGURES:
        path = folder / f"figure{figure.number}_{study.stack}.png"
        try:
            save(picture(study, figure), path)
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror}") from error
        paths.append(path)
    return paths


def picture(study: Study, figure: Figure) -> Canvas:
    """One figure: a panel for each model, the same colour for estimated and published."""
    canvas = Canvas(figsize=SIZE_INCHES, dpi=DPI, facecolor="white")
    fixed = "".join(f", {value}" for value in figure.fixed.values())
    title = f"Apple's study, Figure {figure.number}{fixed}: stack {study.stack}, by estimate"
    canvas.text(0.065, 0.962, title, fontsize=16, fontweight="bold")
    canvas.text(0.065, 0.012, FOOTNOTE, fontsize=9, color="#595959")
    panels = canvas.subplots(2, 2, gridspec_kw={"hspace": 0.28, "wspace": 0.18})
    canvas.subplots_adjust(left=0.065, right=0.985, top=0.885, bottom=0.105)
    estimated, theirs = study.figure(figure), published(figure.number)
    for panel, model in zip(panels.flat, MODELS, strict=True):
        for i, name in enumerate(figure.names):
            draw_series(panel, i, estimated[model, name], theirs[model, name])
        finish(panel, model, [mark.x for mark in theirs[model, figure.names[-1]]])
        panel.set_xlabel(LABELS[figure.x], fontsize=11)
    for panel in panels[:, 0]:
        panel.set_ylabel("tokens/s per GPU / normalised price", fontsize=11)
    write_legend(canvas, figure.names)
    return canvas


def draw_series(axes: Axes, i: int, ours: Sequence[Mark], theirs: Sequence[Mark]) -> None:
    """One line of estimates, and the published points with their error bars."""
    colour, mark = PALETTE[i], GROUP_MARKS[i]
    axes.plot(
        [point.x for point in ours],
        [point.value for point in ours],
        color=colour,
        marker=mark,
        markersize=6,
        linewidth=1.6,
        clip_on=False,
    )
    bars = [
        [point.value - point.low for point in theirs],
        [point.high - point.value for point in theirs],
    ]
    axes.errorbar(
        [point.x for point in theirs],
        [point.value for point in theirs],
        yerr=bars,
        color=colour,
        marker=mark,
        markersize=7,
        markerfacecolor="white",
        linestyle=(0, (1, 3)),
        linewidth=1,
        elinewidth=1.2,
        capsize=3,
        clip_on=False,
        zorder=4,
    )


def finish(axes: Axes, title: str, xs: Sequence[int]) -> None:
    """Named axes: doubling to the right, from zero upwards."""
    axes.set_title(title, fontsize=12, loc="left")
    axes.set_xscale("log", base=2)
    axes.set_xticks(xs, [str(x) for x in xs])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: counted(value)))
    axes.set_ylim(bottom=0)
    axes.margins(y=0.08)
    axes.grid(True, color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def write_legend(canvas: Canvas, names: Sequence[str]) -> None:
    """Which colour and mark is which series, and what is estimated, above the panels."""
    lines = [
        Line2D([], [], color=PALETTE[i], marker=GROUP_MARKS[i], linewidth=1.6, label=name)
        for i, name in enumerate(names)
    ]
    grey = "#595959"
    lines.append(Line2D([], [], color=grey, marker="o", label="estimated"))
    lines.append(
        Line2D(
            [],
            [],
            color=grey,
            marker="o",
            markerfacecolor="white",
            linestyle=(0, (1, 3)),
            label="published",
        )
    )
    canvas.legend(
        handles=lines,
        loc="upper left",
        bbox_to_anchor=(0.058, 0.95),
        ncols=len(lines),
        frameon=False,
        fontsize=11,
    )
