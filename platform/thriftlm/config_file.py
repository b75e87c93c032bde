"""YAML files with line numbers: every error names file, line and key.

`extends: other.yaml` inherits, `--set a.b=value` overrides. YAML 1.1 reads `2e8` as text; here it
is a number.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Self, TypeVar, cast, get_args

import yaml
from pydantic import BaseModel, ValidationError

from thriftlm.spec import InputError

KeyPath = tuple[str | int, ...]
Problem = Any
T = TypeVar("T", bound=BaseModel)

DOMAIN_NAMES = frozenset(
    ("choice", "grid", "uniform", "loguniform", "randint", "quniform", "derive", "ratio", "solve")
)
"""A mapping with one of these keys is one value: inheriting replaces it whole."""


def is_domain(value: object) -> bool:
    """Whether a value is a domain or a derived field, and not a section of keys."""
    return isinstance(value, dict) and not DOMAIN_NAMES.isdisjoint(value)


@dataclass(frozen=True)
class ConfigFile:
    """The content of a YAML file, and where each key of it came from."""

    name: str
    """How errors call the file."""
    data: dict[str, Any]
    """Keys and values, inherited and overridden ones included."""
    places: Mapping[KeyPath, str] = field(default_factory=dict, repr=False)
    """`file:line:` of each key, or `--set`."""

    @classmethod
    def read(cls, path: str | Path, overrides: Sequence[str] = ()) -> Self:
        """The file with what it extends and the overrides (`a.b=value`) laid over it.

        Raises:
            InputError: no such file, not YAML, a key twice, a circle of `extends`, a bad override.
        """
        file = _read_extended(Path(path), ())
        for override in overrides:
            file = _overridden(file, override)
        return cls(file.name, file.data, file.places)

    def error(self, key_path: KeyPath, message: str) -> InputError:
        """One message that names file, line and key."""
        shown = dotted(key_path)
        return InputError(f"{self.place(key_path)} {f'{shown}: ' if shown else ''}{message}")

    def place(self, key_path: KeyPath) -> str:
        """Where a key, or the nearest section around it, was written."""
        around = (key_path[:end] for end in range(len(key_path), 0, -1))
        found = (self.places[path] for path in around if path in self.places)
        return next(found, f"{self.name}:")

    def parse(self, cls: type[T]) -> T:
        """The whole file as a specification.

        Raises:
            InputError: a key is unknown, missing or has a bad value; one line for each.
        """
        try:
            return cls.model_validate(self.data)
        except ValidationError as error:
            raise self.from_validation(error, cls=cls) from error

    def from_validation(
        self,
        error: ValidationError,
        prefix: KeyPath = (),
        cls: type[BaseModel] | None = None,
    ) -> InputError:
        """What pydantic found, a line for each problem, with file, line and key.

        Args:
            error: raised by validating the part of the file at `prefix`.
            prefix: where that part lies.
            cls: what it was validated as; names the nearest key when one is unknown.
        """
        lines = []
        for problem in error.errors(include_url=False):
            if problem["type"] == "default_factory_not_called":
                continue  # follows from another problem
            path = prefix + self._keys(problem, prefix)
            message = explain(problem, _fields(cls, problem["loc"]))
            if problem["type"] == "value_error":
                path += self._named_key(path, message)
            lines.append(str(self.error(path, message)))
        return InputError("\n".join(lines))

    def _keys(self, problem: Problem, prefix: KeyPath) -> KeyPath:
        """The keys of a location, without the names pydantic puts in for members of a union."""
        path: KeyPath = ()
        for part in problem["loc"]:
            if self._holds((*prefix, *path, part)):
                path = (*path, part)
        return (*path, problem["loc"][-1]) if problem["type"] == "missing" else path

    def _holds(self, path: KeyPath) -> bool:
        at = self._value(path[:-1])
        if isinstance(at, list | tuple):
            return isinstance(path[-1], int) and path[-1] < len(at)
        return isinstance(at, dict) and path[-1] in at

    def _value(self, path: KeyPath) -> object:
        at: Any = self.data
        for part in path:
            try:
                at = at[part]
            except (KeyError, IndexError, TypeError):
                return None
        return at

    def _named_key(self, path: KeyPath, message: str) -> KeyPath:
        """The key of the section that a rule over several keys speaks of first."""
        section = self._value(path)
        keys = section if isinstance(section, dict) else {}
        return next(((word,) for word in re.findall(r"\w+", message) if word in keys), ())


def dotted(path: KeyPath) -> str:
    """A key path as people write it: `space.model.n_layers[1]`."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return "".join(parts).removeprefix(".")


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """A hint at the nearest known word, else the list of them."""
    near = get_close_matches(str(word), known, n=1)
    return f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}"


def space_files() -> dict[str, Path]:
    """Shipped search spaces by name: the installed ones, in a checkout those at its root.

    Raises:
        InputError: neither folder exists.
    """
    package = Path(__file__).resolve().parent
    folders = (package / "search_spaces", package.parents[1] / "search_spaces")
    for folder in folders:
        if folder.is_dir():
            return {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    raise InputError(f"no shipped search spaces: neither {folders[0]} nor {folders[1]} exists")


# --- reading ------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads `2e8` and `3e-4` as numbers, like YAML 1.2."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _read_extended(path: Path, inheriting: tuple[Path, ...]) -> ConfigFile:
    file = _read_one(path)
    base = file.data.pop("extends", None)
    if base is None:
        return file
    if not isinstance(base, str):
        raise file.error(("extends",), f"must be the path or name of one file, got {base!r}")
    parent = _extended_path(file, path, base)
    chain = (*inheriting, path.resolve())
    if parent.resolve() in chain:
        circle = " -> ".join(step.name for step in (*chain, parent))
        raise file.error(("extends",), f"goes in a circle: {circle}")
    below = _read_extended(parent, chain)
    return ConfigFile(file.name, _merged(below.data, file.data), {**below.places, **file.places})


def _extended_path(file: ConfigFile, path: Path, base: str) -> Path:
    beside = path.parent / base
    if beside.is_file():
        return beside
    shipped = space_files()
    if base not in shipped:
        hint = did_you_mean(base, list(shipped))
        raise file.error(("extends",), f"neither the file {beside} nor a shipped space; {hint}")
    return shipped[base]


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Sections are merged key by key; lists, domains and plain values are replaced."""
    result = dict(below)
    for key, value in above.items():
        old = result.get(key)
        sections = isinstance(old, dict) and isinstance(value, dict)
        whole = not sections or is_domain(old) or is_domain(value)
        result[key] = value if whole else _merged(cast(dict[str, Any], old), value)
    return result


def _read_one(path: Path) -> ConfigFile:
    name = _shown(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise InputError(f"{name}: no such file") from error
    except IsADirectoryError as error:
        raise InputError(f"{name}: is a folder, not a YAML file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{name}: cannot be read as text: {error}") from error
    value, places = _compose(text, name)
    if not isinstance(value, dict):
        what = "is empty" if value is None else f"holds a {type(value).__name__}"
        raise InputError(f"{name}: must hold a mapping of keys, but {what}")
    return ConfigFile(name, value, places)


def _shown(path: Path) -> str:
    whole, here = path.absolute(), Path.cwd()
    return str(whole.relative_to(here) if whole.is_relative_to(here) else path)


def _compose(text: str, name: str) -> tuple[Any, dict[KeyPath, str]]:
    """Value of a YAML text, and the `file:line:` of each of its keys."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        places: dict[KeyPath, str] = {}
        return _Builder(loader, name, places).build(node, ()) if node else None, places
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise InputError(
            f"{name}{line}: not valid YAML: {error.problem or error.context}"
        ) from error
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{name}: not valid YAML: {error}") from error


@dataclass
class _Builder:
    loader: _Loader
    name: str
    places: dict[KeyPath, str]
    open_nodes: list[yaml.Node] = field(default_factory=list)

    def build(self, node: yaml.Node, path: KeyPath) -> Any:
        if any(node is parent for parent in self.open_nodes):
            raise InputError(f"{self._at(node)} {dotted(path)}: an alias that contains itself")
        self.places.setdefault(path, self._at(node))
        self.open_nodes.append(node)
        try:
            if isinstance(node, yaml.MappingNode):
                return dict(self._items(node, path))
            if isinstance(node, yaml.SequenceNode):
                return [self.build(item, (*path, i)) for i, item in enumerate(node.value)]
            return self.loader.construct_object(node)
        finally:
            self.open_nodes.pop()

    def _items(self, node: yaml.MappingNode, path: KeyPath) -> Iterator[tuple[str, Any]]:
        seen: dict[str, str] = {}
        for key_node, value in node.value:
            key = self.loader.construct_object(key_node)
            at = self._at(key_node)
            here = f"{at} {dotted((*path, str(key)))}:"
            if not isinstance(key, str):
                raise InputError(f"{here} keys must be words, got {key!r}")
            if key in seen:
                raise InputError(f"{here} key given twice, first at {seen[key].rstrip(':')}")
            seen[key] = self.places[(*path, key)] = at
            yield key, self.build(value, (*path, key))

    def _at(self, node: yaml.Node) -> str:
        return f"{self.name}:{node.start_mark.line + 1}:"


def _overridden(file: ConfigFile, override: str) -> ConfigFile:
    key, equals, text = override.partition("=")
    path = tuple(key.strip().split("."))
    if not equals or not all(path):
        raise InputError(f"--set {override}: must look like space.model.n_layers=[8,12]")
    value, _ = _compose(text, f"--set {key}")
    root = dict(file.data)
    section = root
    for end, part in enumerate(path[:-1], start=1):
        inner = section.get(part, {})
        if not isinstance(inner, dict) or is_domain(inner):
            raise InputError(f"--set {override}: {dotted(path[:end])} is a value, not a section")
        section[part] = section = dict(inner)
    section[path[-1]] = value
    kept = {at: place for at, place in file.places.items() if at[: len(path)] != path}
    written: dict[KeyPath, str] = {path[:end]: "--set" for end in range(1, len(path) + 1)}
    return ConfigFile(file.name, root, {**written, **kept})


# --- messages -----------------------------------------------------------------------------------

_MESSAGES = {
    "missing": "required, but not given",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be finite",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "string_type": "must be text",
    "dict_type": "must be a mapping of keys",
    "model_type": "must be a mapping of keys",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
    "too_short": "must have at least {min_length}",
    "greater_than": "must be above {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "less_than": "must be below {lt:g}",
    "less_than_equal": "must be at most {le:g}",
    "literal_error": "must be {expected}",
}
_SILENT_VALUE = ("missing", "model_type", "dict_type")


def explain(problem: Problem, fields: Sequence[str] = ()) -> str:
    """What pydantic found wrong, in plain words; `fields` are the keys known there."""
    kind, context = problem["type"], problem.get("ctx", {})
    if kind == "extra_forbidden":
        key = problem["loc"][-1]
        return f"unknown key '{key}'; {did_you_mean(key, fields)}" if fields else "unknown key"
    if kind == "value_error":
        return f"{context['error']}"
    plain = problem["msg"].replace("Input should", "must", 1)
    said = _MESSAGES[kind].format(**context) if kind in _MESSAGES else str(plain)
    if kind in _SILENT_VALUE:
        return said
    value = problem["input"]
    expected = re.findall(r"'([^']*)'", context.get("expected", ""))
    near = get_close_matches(str(value), expected, n=1)
    return f"{said}, got {value!r}" + (f"; did you mean '{near[0]}'?" if near else "")


def _fields(cls: type[BaseModel] | None, location: KeyPath) -> list[str]:
    """Names of the keys allowed beside the one at `location`."""
    models = [cls] if cls else []
    for part in location[:-1]:
        inside = [m.model_fields[part] for m in models if part in m.model_fields]
        models = [m for info in inside for m in _models(info.annotation)] or models
    return [name for model in models for name in model.model_fields]


def _models(annotation: object) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]
