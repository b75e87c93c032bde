"""Laws fitted to small real runs, against larger ones they have not seen, as Markdown.

    python tests/benchmarks/law_fits.py --misfitting misfitting_curves.csv --steplaw steplaw.csv \
        > tests/benchmarks/results/law_fits.md

The two tables carry no licence and are not in the repository: the first is the data release of
arXiv 2502.18969, the second that of Step Law (arXiv 2503.04715). Only errors are kept of them.
"""

import argparse
import csv
from itertools import product
from pathlib import Path

import numpy as np

from thriftlm.planning.fitting import Points, fit_points
from thriftlm.planning.scaling_laws import law_named

FORMS = ("chinchilla", "skaling")
SETTLED_STEPS = 1000
"""Shorter Misfitting runs spent much of their time in warm-up."""


def misfitting(path: Path, min_steps: int) -> Points:
    """Final losses of finished runs, the best over learning rates at each size and horizon."""
    rows = [
        (float(row["N_no_emb"]), float(row["D"]), float(row["loss"]))
        for row in csv.DictReader(path.read_text().splitlines())
        if row["current_steps"] == row["total_steps"] and int(row["total_steps"]) >= min_steps
    ]
    return lowest(rows)


def steplaw(path: Path) -> Points:
    """The best final loss over learning rates and batches at each size and horizon."""
    rows = csv.DictReader(path.read_text().splitlines())
    return lowest([(float(row["N"]), float(row["D"]), float(row["loss"])) for row in rows])


def lowest(rows: list[tuple[float, float, float]]) -> Points:
    """Points with the lowest loss of each size and horizon."""
    best: dict[tuple[float, float], float] = {}
    for n, d, loss in rows:
        if np.isfinite(loss):
            best[n, d] = min(loss, best.get((n, d), np.inf))
    n, d = np.array(list(best)).T
    return Points(np.arange(len(n)), n, d, np.array(list(best.values())), "non_embedding")


def held_out(points: Points, below: float, form: str) -> tuple[int, list[list[float]]]:
    """Number of fitted points; N, D, loss, prediction and its interval of each larger model."""
    small = points.n_params < below
    fit = fit_points(points.take(small), form)
    rows = [
        [n, d, loss, *fit.predict(n, d)]
        for n, d, loss in zip(
            points.n_params[~small], points.n_tokens[~small], points.loss[~small], strict=True
        )
    ]
    return int(small.sum()), sorted(rows)


def show_held_out(points: Points, below: float, form: str) -> None:
    fitted, rows = held_out(points, below, form)
    errors = [row[3] / row[2] - 1 for row in rows]
    inside = sum(row[4] <= row[2] <= row[5] for row in rows)
    print(f"\n{form}, fitted to {fitted} points below {below / 1e6:.0f}M: ", end="")
    print(f"largest error {max(map(abs, errors)):.2%}, interval holds {inside} of {len(rows)}\n")
    print("| N | D | error | 90% interval |\n|---|---|---|---|")
    for (n, d, loss, _, low, high), error in zip(rows, errors, strict=True):
        ends = f"{low / loss - 1:+.1%} to {high / loss - 1:+.1%}"
        print(f"| {n / 1e6:.0f}M | {d / 1e9:.1f}B | {error:+.2%} | {ends} |")


def show_synthetic() -> None:
    law = law_named("harm").law
    designs = {
        "12 x 12": (1e7, 1e10, 12, 1e8, 1e12, 12, 1),
        "16 x 16": (1e7, 1e10, 16, 1e8, 1e12, 16, 1),
        "16 x 16, two seeds each": (1e7, 1e10, 16, 1e8, 1e12, 16, 2),
        "20 x 20, a decade wider": (1e6, 1e10, 20, 1e7, 1e12, 20, 1),
    }
    print("| runs | design | worst surface error | worst N_opt a decade outside |")
    print("|---|---|---|---|")
    for name, (n0, n1, sizes, d0, d1, horizons, repeats) in designs.items():
        axes = np.geomspace(n0, n1, sizes), np.geomspace(d0, d1, horizons)
        n, d = (np.repeat(x.ravel(), repeats) for x in np.meshgrid(*axes))
        surface, optimum = [], []
        for seed in range(10):
            noise = 0.01 * np.random.default_rng(seed).standard_normal(len(n))
            loss = law.loss(n, d) * np.exp(noise)
            fitted = fit_points(Points(np.arange(len(n)), n, d, loss, "all"), samples=2).law
            fine = [x.ravel() for x in np.meshgrid(np.geomspace(n0, n1), np.geomspace(d0, d1))]
            surface.append(np.abs(fitted.loss(*fine) / law.loss(*fine) - 1).max())
            ratio = [a.optimum(60 * n1 * d1).n_params for a in (fitted, law)]
            optimum.append(abs(ratio[0] / ratio[1] - 1))
        print(f"| {len(n)} | {name} | {max(surface):.2%} | {max(optimum):.1%} |")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--misfitting", type=Path)
    parser.add_argument("--steplaw", type=Path)
    given = parser.parse_args()
    print("# Fitted laws against runs that they have not seen\n")
    print("By `tests/benchmarks/law_fits.py`. Errors and interval ends are over the measured loss.")
    print("\n## synthetic runs: HARM's law, 1% noise, ten seeds\n")
    show_synthetic()
    if given.misfitting:
        for steps, below, form in product((SETTLED_STEPS, 0), (4e8, 3.5e8), FORMS):
            what = f"runs of at least {steps:,} steps" if steps else "all finished runs"
            print(f"\n## Misfitting, {what}", end="\n")
            show_held_out(misfitting(given.misfitting, steps), below, form)
    if given.steplaw:
        for form in FORMS:
            print("\n## Step Law")
            show_held_out(steplaw(given.steplaw), 5e8, form)


if __name__ == "__main__":
    main()
