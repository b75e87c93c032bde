"""What known runs teach a factored search before its first trial."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from thriftlm.planning.law import Curve
from thriftlm.search.history.journal import KnownRun
from thriftlm.search.learning.menu import Menu
from thriftlm.search.learning.standing import Record
from thriftlm.search.scores.objective import LossUnit, curve_of, loss_of
from thriftlm.spec import Progress


@dataclass
class HeadStart:
    """Known runs by place on a menu."""

    places: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Recipe and system of the trials that count as tried."""
    failed: set[str] = field(default_factory=set)
    """Of those, the ones that broke."""
    records: dict[int, Record] = field(default_factory=dict)
    """Of each recipe; of several runs of one, the longest."""
    facts: list[tuple[int, int, float | None, bool]] = field(default_factory=list)
    """Shape, system, tokens per second over all GPUs, and whether memory ran out."""
    elsewhere: list[Curve] = field(default_factory=list)
    """Curves of recipes that are not on the menu."""

    @cached_property
    def open(self) -> set[int]:
        """Recipes whose loss is known and that still need a system of the space to run on."""
        tried = {recipe for trial, (recipe, _) in self.places.items() if trial not in self.failed}
        return {r for r, x in self.records.items() if not x.diverged} - tried


def head_start(menu: Menu, runs: Sequence[KnownRun], unit: LossUnit) -> HeadStart:
    """What runs teach about the recipes and systems of a menu, with losses in that unit."""
    found = HeadStart()
    for one in runs:
        recipe, system = menu.place(one.point) if one.point else (None, None)
        if one.run is not None and (fact := menu.fact(one.run)) is not None:
            _learn_speed(found, one, fact)
        if one.trial_id is not None and recipe is not None and system is not None:
            found.places[one.trial_id] = recipe, system
            if one.status in ("oom", "diverged"):
                found.failed.add(one.trial_id)
        if recipe is not None:
            _learn_curve(found, one, recipe, unit)
        elif one.status != "diverged":
            _learn_law(found, one, unit)
    return found


def _learn_curve(found: HeadStart, one: KnownRun, recipe: int, unit: LossUnit) -> None:
    record = found.records.get(recipe, Record())
    if one.status == "diverged":
        record.diverged = True
    else:
        losses = ((p.tokens, loss_of(p, unit)) for p in one.reports if _counts(p))
        points = [(float(tokens), loss) for tokens, loss in losses if loss]
        if points and points[-1][0] > record.last_tokens:
            record = Record(diverged=record.diverged)
            for tokens, loss in points:
                record.add(tokens, loss)
    if record.tokens or record.diverged:
        found.records[recipe] = record


def _learn_speed(found: HeadStart, one: KnownRun, fact: tuple[int, int]) -> None:
    rates = [p.tokens_per_s for p in one.reports if p.tokens_per_s is not None]
    is_out = one.status == "oom"
    if one.run is not None and (rates or is_out):
        total = None if is_out else float(np.median(rates)) * one.run.system.n_gpus
        found.facts.append((*fact, total, is_out))


def _learn_law(found: HeadStart, one: KnownRun, unit: LossUnit) -> None:
    curve = curve_of(one.recipe_id, one.n_params, [p for p in one.reports if _counts(p)], unit)
    if len(curve.tokens):
        found.elsewhere.append(curve)


def _counts(report: Progress) -> bool:
    return report.tokens > 0 and not report.warming_up
