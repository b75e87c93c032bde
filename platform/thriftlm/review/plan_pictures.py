"""The picture of a plan: what a smaller model costs, and where it stops to pay."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from thriftlm.planning.fitting import Fit
from thriftlm.planning.measured import measured_overhead
from thriftlm.planning.plan import Plan
from thriftlm.planning.scaling_laws import CRITICAL_OVERHEAD, BelowFloorError
from thriftlm.review.pictures import (
    DOMINATED,
    FRONT,
    GROUP_MARKS,
    PALETTE,
    WINNER,
    canvas,
    log_x,
    save,
    write_legend,
)
from thriftlm.review.wording import counted, usd

LARGEST_K, TOP_OVERHEAD = 5.0, 2.2
"""Ends of the axes."""
SHADE = "#F2E3D5"
NOTE = (
    "Every point of the curve reaches the same loss. Compute is 6 x parameters x tokens; the curve "
    "depends on the law's exponents alone, unless data repeat."
)


def plan_picture(plan: Plan, path: Path, fit: Fit | None = None) -> None:
    """A PNG of compute overhead against model size, the diminishing returns shaded.

    With a fit, what its runs measured lies over what its law predicts.
    """
    best, law = plan.best, plan.request.law
    figure, axes = canvas(
        f"A loss of {plan.loss:.4g}: smaller models and what they cost (law {law.name})", NOTE
    )
    draw_overhead(axes, plan)
    if fit is not None:
        draw_measured(axes, fit)
    mark(axes, plan)
    axes.set_xlabel("model size over the compute-optimal one, k_N (log scale)", fontsize=12)
    axes.set_ylabel("compute over the optimum's, minus 1", fontsize=12)
    write_legend(axes)
    rows = [
        ("compute-optimal", f"{counted(best.n_params)}, {counted(best.n_tokens)} tokens"),
        ("compute", f"{best.flops:.3g} FLOPs"),
    ]
    if plan.run is not None:
        cost = plan.run.usd
        rows += [
            ("run", f"{counted(plan.run.n_params)}, {counted(plan.run.spec.tokens)} tokens"),
            ("system", f"{plan.run.spec.system.n_gpus} x {plan.run.spec.system.gpu}"),
            ("cost", f"{'no price' if cost is None else usd(cost)}, {plan.run.hours:,.0f} hours"),
        ]
    for i, (name, text) in enumerate(rows):
        y = 0.8 - i * 0.07
        figure.text(0.62, y, name, fontsize=10, color="#595959")
        figure.text(0.74, y, text, fontsize=12)
    save(figure, path)


def draw_overhead(axes: Axes, plan: Plan) -> None:
    """The curve with its critical size and its floor."""
    frontier, best = plan.frontier, plan.best
    critical = frontier.critical_k(best)
    shares = np.geomspace(frontier.law.k_min * 1.001, LARGEST_K, 400)
    pairs = [(k, overhead) for k in shares if (overhead := _overhead(plan, float(k))) is not None]
    log_x(axes, [frontier.law.k_min, LARGEST_K], lambda value: f"{value:g}")
    axes.set_ylim(-0.08, TOP_OVERHEAD)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    left = axes.get_xlim()[0]
    axes.axvspan(left, critical, color=SHADE, zorder=0, label="diminishing returns")
    axes.axvline(frontier.law.k_min, color=DOMINATED, linestyle=":", label="no data suffice")
    axes.plot(*zip(*pairs, strict=True), color=FRONT, linewidth=2.4, label="predicted")
    axes.scatter([critical], [CRITICAL_OVERHEAD], color=FRONT, s=60, zorder=4)
    axes.annotate(
        f"critical size: {critical:.3f}, {counted(critical * best.n_params)} parameters",
        (critical, CRITICAL_OVERHEAD),
        xytext=(10, 6),
        textcoords="offset points",
        fontsize=11,
    )


def draw_measured(axes: Axes, fit: Fit) -> None:
    """The interval of the predicted curve, and the measured sizes by the loss they reached."""
    shares = np.geomspace(fit.law.k_min * 1.001, LARGEST_K, 100)
    band = [(k, *found[1:]) for k in shares if (found := fit.overhead(float(k))) is not None]
    k, low, high = np.minimum(np.array(band), 1e3).T
    axes.fill_between(k, low, high, color=FRONT, alpha=0.15, linewidth=0, label="90% interval")
    measured = measured_overhead(fit.points, fit.law)
    for i, loss in enumerate(sorted({point.loss for point in measured})):
        own = [point for point in measured if point.loss == loss]
        axes.scatter(
            [point.k_n for point in own],
            [point.overhead for point in own],
            marker=GROUP_MARKS[i % len(GROUP_MARKS)],
            color=PALETTE[(i + 1) % len(PALETTE)],
            s=64,
            zorder=5,
            label=f"measured at {loss:.3g}",
        )


def mark(axes: Axes, plan: Plan) -> None:
    """Where the run stands."""
    if plan.run is None:
        return
    share = plan.run.n_params / plan.best.n_params
    compute = plan.run.n_params * plan.run.spec.tokens / (plan.best.n_params * plan.best.n_tokens)
    axes.scatter(
        [share], [compute - 1], marker="*", s=380, color=WINNER, edgecolors="white", zorder=6,
        label="the run",
    )  # fmt: skip


def _overhead(plan: Plan, k_n: float) -> float | None:
    try:
        return k_n * plan.frontier.data_factor(k_n, plan.best) - 1
    except BelowFloorError:
        return None
