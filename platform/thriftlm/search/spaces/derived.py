"""Fields that are computed from others: `derive`, `ratio` and `solve`."""

import ast
import math
import operator
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from fractions import Fraction
from graphlib import CycleError, TopologicalSorter
from typing import Any

from thriftlm_models.config import ModelSpec, fill_model
from thriftlm_models.counts import stored_params

Fields = Mapping[str, Any]

RATIO_SLACK = 1e-3
"""Share of a multiple by which a ratio may exceed it: 2.6667 stands for 8/3."""
MAX_MULTIPLES = 1 << 20
_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}


@dataclass(frozen=True)
class Derive:
    """Arithmetic over fields, computed exactly."""

    expression: str

    @property
    def needs(self) -> frozenset[str]:
        """Fields that the expression reads."""
        tree = ast.parse(self.expression, mode="eval")
        return frozenset(node.id for node in ast.walk(tree) if isinstance(node, ast.Name))

    def value(self, fields: Fields) -> Fraction:
        """The exact result.

        Raises:
            ValueError: a field is not given, or a division by zero.
        """
        missing = sorted(name for name in self.needs if not _is_number(fields.get(name)))
        if missing:
            raise ValueError(f"derive: {self.expression} needs {missing[0]}, which has no value")
        try:
            return _evaluate(ast.parse(self.expression, mode="eval").body, fields)
        except ZeroDivisionError as error:
            raise ValueError(f"derive: {self.expression} divides by zero") from error


@dataclass(frozen=True)
class Ratio:
    """A multiple of `d_model`, rounded up to `multiple_of`."""

    ratio: float
    multiple_of: int
    needs = frozenset(("d_model",))

    def value(self, fields: Fields) -> Fraction:
        """The rounded product.

        Raises:
            ValueError: no `d_model`.
        """
        if not _is_number(fields.get("d_model")):
            raise ValueError("ratio needs d_model, which has no value")
        multiples = self.ratio * fields["d_model"] / self.multiple_of
        return Fraction(max(1, math.ceil(multiples - RATIO_SLACK)) * self.multiple_of)


@dataclass(frozen=True)
class Solve:
    """The multiple of `multiple_of` that brings the stored parameters nearest to `params`.

    It may make no valid shape (3 key-value heads rule out 13 heads): the next one that does can be
    tens of percent off the target, so such a point is rejected, not moved.
    """

    params: int
    multiple_of: int


@dataclass(frozen=True)
class Derivation:
    """The derived fields of one section, each after what it needs."""

    steps: tuple[tuple[str, Derive | Ratio], ...] = ()
    solve: tuple[str, Solve] | None = None

    @property
    def names(self) -> frozenset[str]:
        """The derived fields."""
        return frozenset(name for name, _ in (*self.steps, *filter(None, (self.solve,))))

    def without(self, names: Collection[str]) -> "Derivation":
        """The same for a point that gives some of the derived fields itself."""
        if self.names.isdisjoint(names):
            return self
        solve = None if self.solve is None or self.solve[0] in names else self.solve
        return Derivation(tuple(step for step in self.steps if step[0] not in names), solve)

    @classmethod
    def of(cls, fields: Mapping[str, "Derived"]) -> "Derivation":
        """The order in which to compute the derived fields of a section.

        Raises:
            ValueError: they need each other, or more than one is solved.
        """
        solved = [(name, how) for name, how in fields.items() if isinstance(how, Solve)]
        if len(solved) > 1:
            raise ValueError(f"one field can be solved for, got {', '.join(n for n, _ in solved)}")
        rest = {name: how for name, how in fields.items() if not isinstance(how, Solve)}
        try:
            order = TopologicalSorter({name: how.needs for name, how in rest.items()})
            steps = tuple((name, rest[name]) for name in order.static_order() if name in rest)
        except CycleError as error:
            raise ValueError(f"derived fields in a circle: {' -> '.join(error.args[1])}") from error
        return cls(steps, solved[0] if solved else None)

    def apply(self, fields: dict[str, Any], whole: frozenset[str]) -> dict[str, Any]:
        """The derived fields' values, given the others; `whole` are those that must be integers.

        Raises:
            ValueError: a value that cannot be computed, or is no whole number where it must be.
        """
        found: dict[str, Any] = {}
        if self.solve:
            name, how = self.solve
            found[name] = self._solved(name, how, fields)
        for name, step in self.steps:
            exact = step.value(fields | found)
            if name in whole and exact.denominator != 1:
                rule = step.expression if isinstance(step, Derive) else "ratio"
                raise ValueError(f"{name} = {rule} is not a whole number: {float(exact):g}")
            found[name] = int(exact) if exact.denominator == 1 else float(exact)
        return found

    def _solved(self, name: str, how: Solve, fields: dict[str, Any]) -> int:
        def count(multiples: int) -> int:
            return self._stored(fields | {name: multiples * how.multiple_of}, name)

        high = 1
        while count(high) < how.params:
            high *= 2
            if high > MAX_MULTIPLES:
                raise ValueError(f"{name} = solve finds no value: params stay below {how.params}")
        low = high // 2  # count(low) < params, or low is 0
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if count(middle) < how.params else (low, middle)
        nearest = low if low and how.params - count(low) <= count(high) - how.params else high
        return nearest * how.multiple_of

    def _stored(self, fields: dict[str, Any], solved: str) -> int:
        """Stored parameters of a candidate, its derived fields rounded down."""
        model = dict(fields)
        for name, step in self.steps:
            model[name] = max(1, math.floor(step.value(model)))
        if _is_number(model.get("n_heads")) and _is_number(model.get("d_model")):
            model.setdefault("head_dim", max(1, model["d_model"] // model["n_heads"]))
        model = fill_model(model)
        missing = sorted(name for name in _COUNTED if not _is_number(model.get(name)))
        if missing:
            raise ValueError(f"{solved} = solve needs {missing[0]}, which has no value")
        return stored_params(ModelSpec.model_construct(**model))


_COUNTED = ("n_layers", "d_model", "n_heads", "n_kv_heads", "head_dim", "d_ff", "vocab")
Derived = Derive | Ratio | Solve


def parse_derived(value: Mapping[str, Any]) -> Derived | None:
    """The derived field that a mapping of a space file stands for, None where it is none.

    Raises:
        ValueError: bad arithmetic, or keys that do not belong.
    """
    if "derive" in value:
        _only(value, "derive", ())
        return _derive(value["derive"])
    if "ratio" in value:
        _only(value, "ratio", ("multiple_of",))
        return Ratio(_positive("ratio", value["ratio"]), _multiple(value))
    if "solve" in value:
        _only(value, "solve", ())
        return _solve(value["solve"])
    return None


def _solve(given: Any) -> Solve:
    if not isinstance(given, dict) or "params" not in given:
        raise ValueError(f"solve takes {{params: N, multiple_of: M}}, got {given!r}")
    _only(given, "params", ("multiple_of",))
    return Solve(round(_positive("solve params", given["params"])), _multiple(given))


def _derive(given: Any) -> Derive:
    expression = str(given)
    try:
        _check(ast.parse(expression, mode="eval").body)
    except SyntaxError as error:
        raise ValueError(f"derive takes arithmetic like d_model/head_dim, got {given!r}") from error
    return Derive(expression)


def _check(node: ast.expr) -> None:
    match node:
        case ast.BinOp(left, op, right) if type(op) in _OPERATORS:
            _check(left)
            _check(right)
        case ast.UnaryOp(ast.USub(), operand):
            _check(operand)
        case ast.Name() | ast.Constant(int()):
            pass
        case _:
            raise ValueError(
                f"derive knows + - * / // ( ), whole numbers and fields; not '{ast.unparse(node)}'"
            )


def _evaluate(node: ast.expr, fields: Fields) -> Fraction:
    match node:
        case ast.BinOp(left, op, right):
            return Fraction(_OPERATORS[type(op)](_evaluate(left, fields), _evaluate(right, fields)))
        case ast.UnaryOp(_, operand):
            return -_evaluate(operand, fields)
        case ast.Name(name):
            return Fraction(fields[name])
        case ast.Constant(int(number)):
            return Fraction(number)
    raise AssertionError(f"unchecked expression {ast.dump(node)}")


def _only(value: Mapping[str, Any], name: str, others: tuple[str, ...]) -> None:
    for key in value:
        if key not in (name, *others):
            known = ", ".join(others) or "no other key"
            raise ValueError(f"{name} goes with {known}, got '{key}'")


def _multiple(value: Mapping[str, Any]) -> int:
    given = value.get("multiple_of", 1)
    number = _positive("multiple_of", given)
    if not number.is_integer():
        raise ValueError(f"multiple_of must be a whole number, got {given!r}")
    return int(number)


def _positive(name: str, given: Any) -> float:
    if not _is_number(given) or not 0 < given < math.inf:
        raise ValueError(f"{name} must be a number above 0, got {given!r}")
    return float(given)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
