"""The user's own configurations (`start_from`), which a search evaluates before any other."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import log, sqrt
from typing import Any

from thriftlm.config_file import ConfigFile, KeyPath
from thriftlm.search.spaces.domains import Domain, Uniform, Value, contains, is_number
from thriftlm.search.spaces.section import Rejected, Section, read_section
from thriftlm.search.spaces.settings import StartEntry
from thriftlm.spec import ModelSpec, RunSpec
from thriftlm_models.presets import preset

Point = Mapping[str, Value]
Resolve = Callable[[Point], RunSpec | Rejected]


@dataclass(frozen=True)
class Start:
    """One entry of `start_from`."""

    entry: int
    """Its place in the file, from 0."""
    point: Point
    """The varied fields, and those that the entry sets against the space's constants and rules."""
    given: tuple[str, ...]
    """Dotted paths that the entry gives itself."""


def read_starts(
    config: ConfigFile,
    entries: Sequence[StartEntry],
    sections: Mapping[str, Section],
    resolve: Resolve,
) -> list[Start]:
    """The points of the entries, each checked to be a run that no other entry is.

    What an entry gives wins over the space and need not be among its values, except for `data`:
    losses on other data do not compare. A preset gives all of its fields but the vocabulary, which
    follows the tokenizer. What it does not give is the space's constant or derived by the space's
    rule; a varied field takes the default of preset or specification, or the value of the space
    nearest to it.

    Raises:
        InputError: an entry is no valid run, or twice the same; names the entry, rule and value.
    """
    found: list[Start] = []
    runs: dict[str, int] = {}
    for number, entry in enumerate(entries):
        start = _read(config, number, entry, sections, resolve)
        run = resolve(start.point)
        if isinstance(run, Rejected):
            raise config.error(
                ("start_from", number),
                f"is no valid run: {run.detail}; give the fields that this rule speaks of",
            )
        if (first := runs.setdefault(run.trial_id, number)) != number:
            raise config.error(("start_from", number), f"is the same run as start_from[{first}]")
        found.append(start)
    return found


def _read(
    config: ConfigFile,
    number: int,
    entry: StartEntry,
    sections: Mapping[str, Section],
    resolve: Resolve,
) -> Start:
    point: dict[str, Value] = {}
    others: dict[str, Value] = {}
    given: list[str] = []
    for name, section in sections.items():
        at = ("start_from", number, name)
        fields = _fields(config, at, getattr(entry, name), section)
        if name == "data":
            _same_data(config, at, fields, section)
        given += [f"{name}.{field}" for field in fields]
        usual = _usual_fields(section, fields)
        for field, domain in section.domains.items():
            value = fields[field] if field in fields else nearest(domain, usual.get(field))
            point[f"{name}.{field}"] = value
        others |= {f"{name}.{f}": v for f, v in fields.items() if f not in section.domains}
    return Start(number, point | _needed(point, others, resolve), tuple(given))


def _fields(
    config: ConfigFile, at: KeyPath, given: Mapping[str, Any], section: Section
) -> dict[str, Any]:
    """What an entry gives of a section, its preset spelt out."""
    found = read_section(config, at, given, section.cls)
    for name in (*found.domains, *found.derivation.names):
        raise config.error((*at, name), "start_from gives each field one value, not a domain")
    for name, value in found.constants.items():
        if isinstance(value, dict):
            raise config.error((*at, name), "start_from gives numbers, words and lists; leave it")
    fields = dict(found.constants)
    if section.cls is ModelSpec and fields.get("preset") is not None:
        shape = {k: v for k, v in preset(fields["preset"]).items() if k != "vocab"}
        plain = {k: tuple(v) if isinstance(v, list) else v for k, v in shape.items()}
        fields = plain | fields
    return fields


def _same_data(
    config: ConfigFile, at: KeyPath, fields: Mapping[str, Any], section: Section
) -> None:
    defaults = {name: info.default for name, info in section.cls.model_fields.items()}
    for name, value in fields.items():
        domain = section.domains.get(name)
        if domain is not None and contains(domain, value):
            continue
        own = section.constants.get(name, defaults[name])
        if domain is not None or value != own:
            known = ", ".join(map(str, domain.values or ())) if domain is not None else own
            raise config.error(
                (*at, name),
                f"losses on other data do not compare: the space has {known}, got {value}",
            )


def _usual_fields(section: Section, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults of a section's fields: its preset's, else the specification's."""
    usual = {name: info.default for name, info in section.cls.model_fields.items()}
    if section.cls is ModelSpec:
        varied = section.domains.get("preset")
        first = None if varied is None or varied.values is None else varied.values[0]
        name = fields.get("preset", section.constants.get("preset", first))
        usual |= {} if name is None else preset(str(name))
    return usual


def nearest(domain: Domain, wanted: Any) -> Value:
    """The value of a domain nearest to a wanted one; its middle or first where none is wanted."""
    if contains(domain, wanted):
        return wanted  # type: ignore[no-any-return]
    if isinstance(domain, Uniform):
        if is_number(wanted):
            return float(min(max(wanted, domain.low), domain.high))
        return sqrt(domain.low * domain.high) if domain.log else (domain.low + domain.high) / 2
    if domain.values is None:  # steps too many to list
        return domain.low if not is_number(wanted) or wanted < domain.low else domain.high
    numbers = [value for value in domain.values if is_number(value)]
    if len(numbers) < len(domain.values):
        return domain.values[0]
    if not is_number(wanted):
        return numbers[len(numbers) // 2]
    if wanted > 0 and min(numbers) > 0:
        return min(numbers, key=lambda value: abs(log(value / wanted)))
    return min(numbers, key=lambda value: abs(value - wanted))


def _needed(point: Point, others: Mapping[str, Value], resolve: Resolve) -> dict[str, Value]:
    """Those fields beside the varied ones without which it would be another run."""
    kept = dict(others)
    whole = resolve({**point, **kept})
    if isinstance(whole, Rejected):
        return kept
    for path in others:
        less = {name: value for name, value in kept.items() if name != path}
        run = resolve({**point, **less})
        if isinstance(run, RunSpec) and run.trial_id == whole.trial_id:
            kept = less
    return kept
