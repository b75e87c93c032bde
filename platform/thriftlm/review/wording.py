"""Trials, dollars and counts in a few characters: the same words in table, report and picture."""

import math
from collections.abc import Iterable, Mapping
from datetime import date
from typing import Any

from thriftlm import prices

SYSTEM_LAST = ("system.strategy", "system.n_gpus")
"""Varied fields that `describe` says at its end, as they were after normalisation."""
SHORT_NAMES = {"micro_batch": "mb", "batch_tokens": "batch"}
MOST_DECIMALS = 6
"""A millionth of a dollar is the least that is shown."""
STALE_PRICE_DAYS = 90
"""Age from which prices are said to have moved since."""


def describe(point: Mapping[str, Any], strategy: str, n_gpus: int) -> str:
    """What sets a trial apart: `n_layers=4 d_model=64 none lr=0.00799 mb=16 fsdp_full x2`.

    Text stands without its field's name. The strategy is the one that ran: a single GPU makes all
    of them one.
    """
    varied = [word(path, value) for path, value in point.items() if path not in SYSTEM_LAST]
    return " ".join([*varied, strategy, f"x{n_gpus}"])


def seeded(point: Mapping[str, Any], seed: int, repeat_of: str | None) -> Mapping[str, Any]:
    """A point with its seed where that sets the trial apart from the one that it repeats."""
    return point if repeat_of is None else {**point, "seed": seed}


def word(path: str, value: object) -> str:
    """One varied field of a trial."""
    if isinstance(value, str):
        return value
    if path == "optim.lr_changes" and isinstance(value, list | tuple):
        return " ".join(f"lr@{counted(tokens)}={short(lr)}" for tokens, lr in value)
    name = path.rpartition(".")[2]
    return f"{SHORT_NAMES.get(name, name)}={short(value)}"


def short(value: object) -> str:
    """A value in a few characters, numbers with three significant digits."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def shortened(description: str, width: int) -> str:
    """A description in at most `width` characters, as far as its last two words allow.

    Strategy and number of GPUs stay; words before them give way to one `…`.
    """
    if len(description) <= width:
        return description
    words = description.split()
    head, tail = words[:-2], " ".join(["…", *words[-2:]])
    while head and len(" ".join([*head, tail])) > width:
        head.pop()
    return " ".join([*head, tail])


def why_ended(status: str, reason: str) -> str:
    """A status with what ended the trial early: `stopped: asha`, `stopped: budget`."""
    if status != "stopped" or not reason:
        return status
    kind = reason.partition(":")[0]
    return f"stopped: {'budget' if kind.startswith('search budget') else kind}"


def usd(amount: float) -> str:
    """Dollars: three significant digits below one, never fewer than cents; whole ones from 100."""
    if amount >= 99.995:
        return f"${amount:,.0f}"
    if amount >= 0.9995 or amount <= 0:
        return f"${amount:.2f}"
    decimals = min(2 - math.floor(math.log10(amount)), MOST_DECIMALS)
    whole, _, part = f"{amount:.{decimals}f}".partition(".")
    return f"${whole}.{part.rstrip('0').ljust(2, '0')}"


def limits(budget: Mapping[str, float | None]) -> str:
    """A budget: `$0.02, 8 trials`."""
    given = {unit: limit for unit, limit in budget.items() if limit is not None}
    return ", ".join(usd(n) if unit == "usd" else f"{n:g} {unit}" for unit, n in given.items())


def counted(value: float) -> str:
    """A count with three significant digits and k, M, B or T."""
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{float(f'{value / unit:.3g}'):g}{name}"
    return f"{value:g}"


def duration(seconds: float) -> str:
    """A span in minutes and seconds, from an hour on in hours and minutes."""
    minutes = int(seconds) // 60
    if minutes >= 60:
        return f"{minutes // 60}h{minutes % 60:02d}m"
    return f"{minutes}m{int(seconds) % 60:02d}s"


def optional(value: float | None, form: str) -> str:
    """A number in a format, or a dash where nothing was measured."""
    return "-" if value is None else format(value, form)


def stale_prices(as_of: Iterable[str | None], today: date) -> str:
    """A warning where prices with these dates are old enough to have moved, else nothing."""
    oldest = min((day for day in as_of if day), default="")
    if not oldest or prices.days_since(oldest, today) <= STALE_PRICE_DAYS:
        return ""
    return (
        f"warning: prices from {oldest} on, over {STALE_PRICE_DAYS} days old; "
        "`thriftlm gpus --refresh` reads today's"
    )
