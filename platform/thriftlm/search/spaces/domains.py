"""Domains of a space, under Ray Tune's names: what a field may be, and how it is drawn."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, TypeGuard

import numpy as np

Value = str | int | float | bool | None
"""What a sampled field can be: plain Python, so that it goes into JSON, Optuna and MLflow."""
RATIO_IN_LOG = 4.0
"""Recorded numbers that span more than this are compared by their logarithm."""
MAX_LISTED = 20_000
"""Domains with more values than this are not listed, hence not enumerated."""


@dataclass(frozen=True)
class Choice:
    """One of a list; `grid` and a bare list mean the same."""

    values: tuple[Value, ...]

    def sample(self, rng: np.random.Generator) -> Value:
        """One value, all equally likely."""
        return self.values[int(rng.integers(len(self.values)))]

    def distribution(self) -> Any:
        """The same as an Optuna distribution."""
        from optuna.distributions import CategoricalDistribution

        return CategoricalDistribution(self.values)


@dataclass(frozen=True)
class Uniform:
    """A float between two bounds; with `log`, uniform in its logarithm."""

    low: float
    high: float
    log: bool = False
    values: None = None

    def sample(self, rng: np.random.Generator) -> float:
        """One float."""
        if not self.log:
            return float(rng.uniform(self.low, self.high))
        drawn = math.exp(rng.uniform(math.log(self.low), math.log(self.high)))
        return min(max(drawn, self.low), self.high)  # exp(log(x)) can miss x by one bit

    def distribution(self) -> Any:
        """The same as an Optuna distribution."""
        from optuna.distributions import FloatDistribution

        return FloatDistribution(self.low, self.high, log=self.log)


@dataclass(frozen=True)
class Steps:
    """`low`, `low + step`, ... up to and including `high`: `randint` and `quniform`."""

    low: int | float
    high: int | float
    step: int | float = 1

    @property
    def _count(self) -> int:
        return round((self.high - self.low) / self.step) + 1

    @property
    def values(self) -> tuple[int | float, ...] | None:
        """All values, None where they are too many to list."""
        listed = self._count <= MAX_LISTED
        return tuple(self._value(i) for i in range(self._count)) if listed else None

    def _value(self, index: int) -> int | float:
        if isinstance(self.low, int) and isinstance(self.step, int):
            return self.low + index * self.step
        # In decimals: 0.1 + 2 * 0.1 would be 0.30000000000000004.
        return float(Decimal(repr(self.low)) + index * Decimal(repr(self.step)))

    def sample(self, rng: np.random.Generator) -> int | float:
        """One value, all equally likely."""
        return self._value(int(rng.integers(self._count)))

    def distribution(self) -> Any:
        """The same as an Optuna distribution."""
        from optuna.distributions import FloatDistribution, IntDistribution

        if isinstance(self.low, int) and isinstance(self.step, int):
            return IntDistribution(self.low, self.high, step=self.step)
        return FloatDistribution(self.low, self.high, step=self.step)


@dataclass(frozen=True)
class Recorded:
    """A field as far as a table has values of it; numbers are proposed between them and snapped."""

    values: tuple[Value, ...]
    log: bool = False

    def sample(self, rng: np.random.Generator) -> Value:
        """One value, all equally likely."""
        return self.values[int(rng.integers(len(self.values)))]

    def distribution(self) -> Any:
        """The same as an Optuna distribution: continuous where all values are numbers."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution

        if len(self.values) > 1 and all(map(is_number, self.values)):
            low, high = float(self.values[0]), float(self.values[-1])  # type: ignore[arg-type]
            return FloatDistribution(low, high, log=self.log)
        return CategoricalDistribution(self.values)

    def scaled(self, value: Value) -> float | None:
        """A number from 0 to 1 over the field's values; None for a word."""
        if not all(map(is_number, self.values)) or not is_number(value):
            return None
        ends = [float(x) for x in (self.values[0], self.values[-1], value)]  # type: ignore[arg-type]
        low, high, here = np.log(ends) if self.log else ends
        return float((here - low) / (high - low)) if high > low else 0.0


Domain = Choice | Uniform | Steps | Recorded


def recorded(values: list[Value]) -> Recorded:
    """The domain of the values that a table has of a field."""
    distinct = list(dict.fromkeys(values))
    if not all(map(is_number, distinct)):
        return Recorded(tuple(sorted(distinct, key=str)))
    numbers = sorted(distinct, key=float)  # type: ignore[arg-type]
    low, high = float(numbers[0]), float(numbers[-1])  # type: ignore[arg-type]
    return Recorded(tuple(numbers), log=low > 0 and high / low > RATIO_IN_LOG)


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a value is a number; truth values are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def contains(domain: Domain, value: object) -> bool:
    """Whether a value is one of a domain's, and no more than close to one."""
    if isinstance(domain, Uniform):
        return is_number(value) and domain.low <= value <= domain.high
    if domain.values is not None:
        return _same(value, list(domain.values))
    if not is_number(value) or not domain.low <= value <= domain.high:
        return False
    steps = (Decimal(repr(value)) - Decimal(repr(domain.low))) % Decimal(repr(domain.step))
    return not steps


def parse_domain(value: object) -> Domain | None:
    """The domain that a value of a space file stands for, None where it is a constant.

    Raises:
        ValueError: an empty choice, bad bounds, an unknown domain.
    """
    if isinstance(value, list):
        return _choice(value)
    if not isinstance(value, dict):
        return None
    if len(value) != 1 or next(iter(value)) not in DOMAINS:
        raise ValueError(
            f"a domain is one of {', '.join(DOMAINS)} with its values, or derive, ratio, solve; "
            f"got keys {', '.join(map(str, value)) or 'none'}"
        )
    ((name, given),) = value.items()
    if not isinstance(given, list):
        raise ValueError(f"{name} takes a list, got {given!r}")
    return DOMAINS[name](given)


def _choice(given: list[Any]) -> Choice:
    if not given:
        raise ValueError("an empty choice: give at least one value")
    for value in given:
        if not isinstance(value, str | int | float | bool | None):
            raise ValueError(f"a choice lists numbers, words, true, false or null; got {value!r}")
    twice = [value for i, value in enumerate(given) if _same(value, given[:i])]
    if twice:
        raise ValueError(f"a choice lists each value once, {twice[0]!r} is there twice")
    return Choice(tuple(given))


def _same(value: Any, others: list[Any]) -> bool:
    """Whether a value is among others; True is not 1, but 1.0 is."""
    return any(
        value == other and isinstance(value, bool) == isinstance(other, bool) for other in others
    )


def _uniform(given: list[Any]) -> Uniform:
    low, high = _bounds("uniform", given, "[low, high]", 2)
    return Uniform(float(low), float(high))


def _loguniform(given: list[Any]) -> Uniform:
    low, high = _bounds("loguniform", given, "[low, high]", 2)
    if low <= 0:
        raise ValueError(f"loguniform needs low above 0, got {given}")
    return Uniform(float(low), float(high), log=True)


def _randint(given: list[Any]) -> Steps:
    low, high = _bounds("randint", given, "[low, high] with high left out", 2)
    if not (float(low).is_integer() and float(high).is_integer()):
        raise ValueError(f"randint takes whole numbers, got {given}")
    return Steps(int(low), int(high) - 1)


def _quniform(given: list[Any]) -> Steps:
    low, high, step = _bounds("quniform", given, "[low, high, step]", 3)
    exact = [Decimal(repr(number)) for number in (low, high, step)]
    if step <= 0 or exact[0] % exact[2] or exact[1] % exact[2]:
        raise ValueError(f"quniform needs low and high to be multiples of step, got {given}")
    return Steps(low, high, step)


def _bounds(name: str, given: list[Any], shape: str, length: int) -> list[int | float]:
    numbers = [
        x
        for x in given
        if isinstance(x, int | float) and not isinstance(x, bool) and abs(x) < 1e300
    ]
    if len(numbers) != len(given) or len(given) != length or not numbers[0] < numbers[1]:
        raise ValueError(f"{name} takes {shape}, low below high, got {given}")
    return numbers


DOMAINS: dict[str, Callable[[list[Any]], Domain]] = {
    "choice": _choice,
    "grid": _choice,
    "uniform": _uniform,
    "loguniform": _loguniform,
    "randint": _randint,
    "quniform": _quniform,
}
"""Reader of each domain by its name in Ray Tune."""
