"""One section of a space (model, optim, system, data): what varies, what is constant or derived."""

import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import ValidationError

from thriftlm.catalog import gpu
from thriftlm.config_file import ConfigFile, KeyPath, did_you_mean, explain, is_domain
from thriftlm.search.spaces.derived import Derivation, Derived, parse_derived
from thriftlm.search.spaces.domains import Domain, Steps, Uniform, Value, parse_domain
from thriftlm.spec import InputError, ModelSpec, Spec, SystemSpec
from thriftlm_models.presets import preset

Items = tuple[tuple[str, Value], ...]


@dataclass(frozen=True)
class Rejected:
    """A point that is no run."""

    reason: str
    """The rule it breaks, without the point's values: the same for all that break it."""
    detail: str = ""
    """The rule with this point's values."""


@dataclass(frozen=True)
class Section:
    """Fields of one specification, checked one by one when the file was read."""

    cls: type[Spec]
    constants: Mapping[str, Any]
    domains: Mapping[str, Domain]
    derivation: Derivation
    outside: tuple[str, ...] = ()
    """Fields of other sections that the derived ones read."""

    def given(self, name: str) -> bool:
        """Whether the space says anything about a field."""
        return name in self.constants or name in self.domains or name in self.derivation.names

    def build(self, values: Items, others: Mapping[str, Any] | None = None) -> Spec | Rejected:
        """The specification at a point of this section; `others` are fields of other sections."""
        read = tuple((name, others[name]) for name in self.outside) if others else ()
        return _build(self, values, read)

    def specs(self) -> Iterator[Spec]:
        """The distinct specifications of all points; every domain must be finite."""
        values = [domain.values or () for domain in self.domains.values()]
        rows = (tuple(zip(self.domains, row, strict=True)) for row in product(*values))
        built = (self.build(items) for items in rows)
        return iter(dict.fromkeys(spec for spec in built if not isinstance(spec, Rejected)))

    # A section is its own identity: there is one for each open space.
    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


@lru_cache(maxsize=16_384)
def _build(section: Section, values: Items, outside: Items) -> Spec | Rejected:
    """Cached, since most points of a space share most of their sections."""
    fields = dict(section.constants) | dict(values)
    whole = whole_fields(section.cls)
    for name in whole & fields.keys():
        if isinstance(fields[name], float) and fields[name].is_integer():
            fields[name] = int(fields[name])
    try:
        known = _defaults(section.cls) | _preset_fields(section.cls, fields) | fields
        known |= dict(outside)
        fields |= section.derivation.without(dict(values)).apply(known, whole)
        return section.cls.model_validate(_normal(section.cls, fields))
    except ValidationError as error:
        return rejected(error)
    except ValueError as error:
        return Rejected(_rule(str(error)), str(error))


def rejected(error: ValidationError) -> Rejected:
    """The first thing that is wrong with a point."""
    problem = error.errors(include_url=False)[0]
    if problem["type"] == "value_error":
        detail = str(problem.get("ctx", {})["error"])
    else:
        where = ".".join(map(str, problem["loc"]))
        detail = f"{where} {problem['msg'].replace('Input should', 'must')}: {problem['input']!r}"
        if problem["type"] == "missing":
            detail = f"{where} is required: give it or a preset that has it"
    return Rejected(_rule(detail), detail)


def _rule(message: str) -> str:
    """A message up to its first value: rules come first, values after a colon or comma."""
    ends = [end for mark in (": ", "; ", ", ") if (end := message.find(mark)) >= 0]
    return message[: min(ends, default=len(message))]


def _preset_fields(cls: type[Spec], fields: Mapping[str, Any]) -> dict[str, Any]:
    name = fields.get("preset") if cls is ModelSpec else None
    return {} if name is None else preset(name)


@lru_cache
def _defaults(cls: type[Spec]) -> dict[str, Any]:
    found = {name: info.default for name, info in cls.model_fields.items()}
    return {k: v for k, v in found.items() if type(v) in (int, float)}


def _normal(cls: type[Spec], fields: dict[str, Any]) -> dict[str, Any]:
    """Fields without differences that make none: what is one run has one identity."""
    if cls is SystemSpec:
        fields["gpu"] = gpu(fields.get("gpu", "cpu")).id
        if fields.get("n_gpus", 1) == 1 and not fields.get("cpu_offload"):
            fields["strategy"] = "single"
    if cls is ModelSpec:
        sharing = (_preset_fields(cls, fields) | fields).get("sharing", "none")
        if sharing == "none":
            fields["repeats"] = 1
    return fields


# --- reading ------------------------------------------------------------------------------------


def read_section(
    config: ConfigFile,
    path: KeyPath,
    given: object,
    cls: type[Spec],
    others: Sequence[type[Spec]] = (),
) -> Section:
    """A section of a space file, every value checked against its field.

    A derived field reads fields of its own section, and then of `others`, which are built before
    it and so can need nothing of it.

    Raises:
        InputError: an unknown field, a bad domain or value; names file, line and key.
    """
    constants: dict[str, Any] = {}
    domains: dict[str, Domain] = {}
    derived: dict[str, Derived] = {}
    for name, value in (given if isinstance(given, dict) else {}).items():
        at = (*path, name)
        if name not in cls.model_fields:
            hint = did_you_mean(name, list(cls.model_fields))
            raise config.error(at, f"unknown key '{name}'; {hint}")
        found = _read_field(config, at, value, cls)
        if isinstance(found, Derived):
            derived[name] = found
        elif isinstance(found, Domain) and (only := _only_value(found)):
            constants[name] = only[0]
        elif isinstance(found, Domain):
            domains[name] = found
        else:
            constants[name] = found
    needed = {name for how in derived.values() for name in getattr(how, "needs", ())}
    outside = tuple(sorted(needed - cls.model_fields.keys()))
    derivation = _derivation(config, path, derived, (cls, *others))
    return Section(cls, constants, domains, derivation, outside)


def _read_field(config: ConfigFile, at: KeyPath, value: Any, cls: type[Spec]) -> Any:
    name = str(at[-1])
    if isinstance(value, list) and tuple in field_kinds(cls, name):
        _check_value(config, at, value, cls, name)
        return tuple(value)
    if isinstance(value, dict) and not is_domain(value) and _takes_a_section(cls, name):
        _check_value(config, at, value, cls, name)
        return value
    try:
        found = (parse_derived(value) if isinstance(value, dict) else None) or parse_domain(value)
    except ValueError as error:
        raise config.error(at, str(error)) from error
    if found is None:
        _check_value(config, at, value, cls, name)
        return value
    if not isinstance(found, Derived):
        _check_domain(config, at, value, found, cls)
    elif not field_kinds(cls, name) & {int, float}:
        raise config.error(at, "derive, ratio and solve compute numbers; this field takes none")
    return found


def _takes_a_section(cls: type[Spec], name: str) -> bool:
    return any(isinstance(kind, type) and issubclass(kind, Spec) for kind in field_kinds(cls, name))


def _only_value(domain: Domain) -> tuple[Value, ...]:
    values = domain.values
    return values if values is not None and len(values) == 1 else ()


def _check_domain(
    config: ConfigFile, at: KeyPath, given: Any, domain: Domain, cls: type[Spec]
) -> None:
    name = str(at[-1])
    if isinstance(domain, Uniform) and float not in field_kinds(cls, name):
        raise config.error(
            at, "uniform and loguniform give fractions; use a list, randint or quniform"
        )
    inner = at if isinstance(given, list) else (*at, next(iter(given)))
    if isinstance(domain, Uniform | Steps):
        for i, bound in enumerate((domain.low, domain.high)):
            _check_value(config, (*inner, i), bound, cls, name)
        return
    for i, value in enumerate(domain.values):
        _check_value(config, (*inner, i), value, cls, name)


def _check_value(config: ConfigFile, at: KeyPath, value: Any, cls: type[Spec], name: str) -> None:
    """Raise what is wrong with one value of one field, whatever the others are."""
    kinds = field_kinds(cls, name)
    if kinds & {int, float} and isinstance(value, str | bool) and bool not in kinds:
        number = "a number" if float in kinds else "a whole number"
        raise config.error(at, f"must be {number}, got {value!r}")
    try:
        if cls is SystemSpec and name == "gpu" and isinstance(value, str):
            gpu(value)
        cls.model_validate({name: value})
    except InputError as error:
        raise config.error(at, str(error)) from error
    except ValidationError as error:
        own = [
            problem
            for problem in error.errors(include_url=False)
            if problem["loc"][:1] == (name,) or (name == "preset" and not problem["loc"])
        ]
        if own and own[0]["type"] == "missing" and isinstance(value, list):
            raise config.error(at, f"a list with too few values, got {value}") from error
        if own:
            inner = tuple(part for part in own[0]["loc"][1:] if isinstance(value, dict))
            raise config.error((*at, *inner), explain(own[0])) from error


def _derivation(
    config: ConfigFile,
    path: KeyPath,
    derived: Mapping[str, Derived],
    specs: Sequence[type[Spec]],
) -> Derivation:
    numeric = [
        name for cls in specs for name in cls.model_fields if field_kinds(cls, name) & {int, float}
    ]
    for name, how in derived.items():
        for needed in getattr(how, "needs", ()):
            if needed not in numeric:
                hint = did_you_mean(needed, numeric)
                raise config.error((*path, name), f"no numeric field '{needed}' here; {hint}")
    try:
        return Derivation.of(derived)
    except ValueError as error:
        raise config.error(path, str(error)) from error


@lru_cache
def whole_fields(cls: type[Spec]) -> frozenset[str]:
    """Fields of a specification that take whole numbers."""
    kinds = {name: field_kinds(cls, name) for name in cls.model_fields}
    return frozenset(name for name, found in kinds.items() if int in found and float not in found)


@lru_cache
def field_kinds(cls: type[Spec], name: str) -> frozenset[Any]:
    """Plain types that a field takes: {int}, {str, NoneType}, {tuple}, ..."""
    return frozenset(_kinds(cls.model_fields[name].annotation))


def _kinds(annotation: Any) -> Iterable[Any]:
    origin = get_origin(annotation)
    if origin is Annotated:
        return _kinds(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [kind for part in get_args(annotation) for kind in _kinds(part)]
    return [origin or annotation]
