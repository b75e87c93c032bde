"""A search space: which runs there are, which of them are valid, and how to draw one."""

from collections import ChainMap, Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice, product
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from pydantic import ValidationError

from thriftlm.catalog import attention_target
from thriftlm.config_file import ConfigFile, KeyPath, did_you_mean, space_files
from thriftlm.planning.estimate import memory_fractions
from thriftlm.planning.machine import Machine
from thriftlm.prices import NoOfferError, price
from thriftlm.search.spaces.domains import MAX_LISTED, Domain, Value
from thriftlm.search.spaces.section import Items, Rejected, read_section, rejected
from thriftlm.search.spaces.settings import Constraints, SpaceFile
from thriftlm.search.spaces.start import Start, read_starts
from thriftlm.spec import DataSpec, InputError, ModelSpec, OptimSpec, RunSpec, Spec, SystemSpec
from thriftlm_models import kernels

__all__ = ["Counts", "Point", "Rejected", "Space", "load_space", "space_files"]

Point = Mapping[str, Value]
"""Varied fields by dotted path: `{"model.n_layers": 12, "optim.lr": 1e-3}`."""
SPECS: dict[str, type[Spec]] = {
    "model": ModelSpec,
    "optim": OptimSpec,
    "system": SystemSpec,
    "data": DataSpec,
}
READS: dict[str, tuple[type[Spec], ...]] = {"optim": (SystemSpec, DataSpec)}
"""Other sections whose numbers the derived fields of a section may read: a batch is what fits."""
MAX_ENUMERATED = MAX_LISTED
"""Larger spaces are sampled where they are counted."""
SAMPLES = 2_000
BLOCK = 64
"""Points looked at together for one that is valid: estimates take many as fast as one."""


class Counts(NamedTuple):
    """How many points of a space are runs; where `sampled`, of that many drawn at random."""

    total: int
    """Points looked at."""
    valid: int
    """Those that are runs."""
    runs: tuple[RunSpec, ...]
    """Different runs among them, in the order found: a single GPU makes all strategies one."""
    rejected: dict[str, int]
    """Points removed, by rule, most first."""
    sampled: bool
    """Whether the points were drawn, not enumerated."""
    size: int | None
    """Points of the whole space; None where a field is continuous."""

    @property
    def distinct(self) -> int:
        """How many different runs there are."""
        return len(self.runs)

    @property
    def models(self) -> tuple[ModelSpec, ...]:
        """Their different models."""
        return tuple(dict.fromkeys(run.model for run in self.runs))


class Space:
    """A space file that was read and checked.

    Args:
        config: the file.
        machine: what workers on a CPU run on, for estimates.

    Raises:
        InputError: anything that is wrong with it, a space without a valid point included.
    """

    domains: dict[str, Domain]
    """What varies, by dotted path, in the order of the file."""
    starts: list[Start]
    """What is evaluated first."""

    def __init__(self, config: ConfigFile, machine: Machine | None = None) -> None:
        self.config = config
        self.machine = machine
        self.anchor = Path.cwd()
        file = config.parse(SpaceFile)
        self.name = file.name
        self.training_budget = file.training_budget
        self.search_budget = file.search_budget
        self.search = file.search
        self.scheduler = file.search.resolved_scheduler
        self.constraints = file.constraints
        self.objective_name = file.objective.name
        weights = file.objective.weights
        self.target_loss = file.objective.target_loss
        self.objective_weights = None if weights is None else weights.model_dump()
        self._sections = {
            name: read_section(config, _path(name), given, SPECS[name], READS.get(name, ()))
            for name, given in _given(config.data)
        }
        for name, cls in SPECS.items():
            self._sections.setdefault(name, read_section(config, _path(name), {}, cls))
        self.domains = {
            f"{name}.{field}": domain
            for name, section in self._sections.items()
            for field, domain in section.domains.items()
        }
        self._require_lists("data", "system")
        self._vocab_follows = not self._sections["model"].given("vocab")
        self._require_a_valid_point()
        self.starts = read_starts(
            config,
            file.start_from,
            self._sections,
            lambda point: self.resolve(point, self.search.seed),
        )

    def document(self) -> dict[str, Any]:
        """The file as a mapping, with what it inherits and the overrides."""
        return self.config.data

    def data_specs(self) -> Iterator[DataSpec]:
        """The different data of the space's runs."""
        specs = cast(Iterator[DataSpec], self._sections["data"].specs())
        return (data.anchored(self.anchor) for data in specs)

    def systems(self) -> Iterator[SystemSpec]:
        """The different systems of the space's runs."""
        return cast(Iterator[SystemSpec], self._sections["system"].specs())

    def resolve(self, point: Point, seed: int) -> RunSpec | Rejected:
        """The run at a point, or why there is none; fields beside the varied ones win too."""
        found = self._resolve(point, seed)
        if isinstance(found, Rejected):
            return found
        return self._too_large([found]).get(found, found)

    def _resolve(self, point: Point, seed: int) -> RunSpec | Rejected:
        """The same without the bound on memory."""
        values = _by_section(point)
        data = self._sections["data"].build(values["data"])
        if isinstance(data, Rejected):
            return data
        data = cast(DataSpec, data).anchored(self.anchor)
        try:
            vocab = data.bpe_vocab if self._vocab_follows else None
        except ValueError as error:
            return Rejected("tokenizer bpe:N is malformed", str(error))
        if vocab is not None and "vocab" not in dict(values["model"]):
            values["model"] = (*values["model"], ("vocab", vocab))
        built: dict[str, Any] = {"data": data}
        for name in ("model", "system", "optim"):
            read = ChainMap(*(vars(built[key]) for key in ("system", "data") if key in built))
            built[name] = self._sections[name].build(values[name], read)
            if isinstance(built[name], Rejected):
                return cast(Rejected, built[name])
        return (
            self._unpriced(built["system"])
            or self._unrunnable(built["model"], built["system"], built["data"])
            or self._constrained(built)
            or self._run(built, seed)
        )

    def _too_large(self, runs: Sequence[RunSpec]) -> dict[RunSpec, Rejected]:
        """Runs that break the bound on memory. One call for many is a thousand times faster."""
        bound = self.constraints.memory_fraction
        if bound is None or not runs:
            return {}
        found = {}
        for run, fraction in zip(runs, memory_fractions(runs, self.machine).tolist(), strict=True):
            if broken := bound.broken_by("memory_fraction", fraction):
                found[run] = Rejected(broken, f"{broken}: {fraction:.3g} on {run.system.gpu}")
        return found

    def _run(self, built: dict[str, Any], seed: int) -> RunSpec | Rejected:
        fidelity = self.search.fidelity
        try:
            return RunSpec(
                **built,
                seed=seed,
                tokens=fidelity.max_tokens,
                report_every_tokens=fidelity.report_every_tokens,
                checkpoint_every_tokens=fidelity.checkpoint_every_tokens,
                keep_every_tokens=fidelity.min_tokens if self.scheduler == "pbt" else None,
                validation_tokens=fidelity.validation_tokens,
            )
        except ValidationError as error:
            return rejected(error)

    def _unpriced(self, system: SystemSpec) -> Rejected | None:
        try:
            price(system)
        except NoOfferError as error:
            return Rejected(str(error).split(";", maxsplit=1)[0], str(error))
        return None

    def _unrunnable(self, model: ModelSpec, system: SystemSpec, data: DataSpec) -> Rejected | None:
        target = attention_target(system.gpu, system.precision)
        try:
            kernels.check(system.attention, model, f"on {system.gpu}", target, data.document_mask)
        except ValueError as error:
            return Rejected(str(error).split("; what can")[0], str(error))
        return None

    def _constrained(self, built: dict[str, Any]) -> Rejected | None:
        broken = self.constraints.broken_by(built["model"], built["data"].seq_len)
        return broken and Rejected(broken[0], f"{broken[0]}: {broken[1]:.15g}")

    @property
    def size(self) -> int | None:
        """Points before constraints; None where a field is continuous."""
        listed = [domain.values for domain in self.domains.values()]
        return None if None in listed else prod(len(values or ()) for values in listed)

    def sample(self, rng: np.random.Generator) -> dict[str, Value]:
        """One point at random, valid or not."""
        return {path: domain.sample(rng) for path, domain in self.domains.items()}

    def nearest(self, point: Point) -> dict[str, Value]:
        """The point of the space nearest to one that a sampler proposed: itself."""
        return dict(point)

    def grid(self) -> Iterator[dict[str, Value]]:
        """Every point, valid or not; the last field varies fastest.

        Raises:
            InputError: a field is continuous.
        """
        self._require_lists(*SPECS)
        listed = {path: domain.values for path, domain in self.domains.items()}
        rows = product(*(values or () for values in listed.values()))
        return (dict(zip(listed, row, strict=True)) for row in rows)

    def count(self) -> Counts:
        """How many points are valid, and what removes the others.

        All points where they are finite and at most 20,000, else 2,000 drawn at random.
        """
        sampled = self.size is None or self.size > MAX_ENUMERATED
        points = self._sample_points() if sampled else self.grid()
        runs: Counter[RunSpec] = Counter()
        removed: Counter[str] = Counter()
        total = 0
        for total, point in enumerate(points, start=1):  # noqa: B007
            found = self._resolve(point, self.search.seed)
            if isinstance(found, Rejected):
                removed[found.reason] += 1
            else:
                runs[found] += 1
        for run, rejection in self._too_large(tuple(runs)).items():
            removed[rejection.reason] += runs.pop(run)
        valid = total - removed.total()
        rejected = dict(removed.most_common())
        return Counts(total, valid, tuple(runs), rejected, sampled, self.size)

    def warnings(self) -> list[str]:
        """What is allowed and probably not meant."""
        search, found = self.search, []
        if self.scheduler != "none" and not search.fidelity.rungs:
            found.append(
                f"{self.scheduler} stops nothing: min_tokens is not below max_tokens "
                f"({search.fidelity.min_tokens})"
            )
        on_cpu = any(system.gpu == "cpu" for system in self.systems())
        if self.constraints.memory_fraction and on_cpu and self.machine is None:
            found.append(
                "memory_fraction removes nothing on cpu: this machine is not measured; "
                "`thriftlm doctor` does"
            )
        trials = self.search_budget.trials
        if trials is not None and search.repeats > 1 and trials < 2 * search.repeats:
            found.append(
                f"repeats: {search.repeats} seeds of winner and runner-up take "
                f"{2 * (search.repeats - 1)} trials, search_budget allows {trials} in all"
            )
        if self.scheduler == "pbt" and trials is not None and trials <= search.population:
            found.append(
                f"pbt replaces nobody: its population is {search.population}, search_budget allows "
                f"{trials} trials"
            )
        if search.algorithm == "grid" and trials is not None and trials < (self.size or 0):
            found.append(f"grid has {self.size} points, search_budget allows {trials} trials")
        return found

    def _sample_points(self) -> Iterator[dict[str, Value]]:
        rng = np.random.default_rng(self.search.seed)
        return (self.sample(rng) for _ in range(SAMPLES))

    def _require_lists(self, *sections: str) -> None:
        for path, domain in self.domains.items():
            section, field = path.split(".")
            if section in sections and domain.values is None:
                whose = f"every field of {section}" if len(sections) < len(SPECS) else "grid"
                raise self.config.error(
                    (*_path(section), field),
                    f"{whose} needs a list of values: use a list or quniform here"
                    + ("" if section in ("data", "system") else ", or algorithm random or optuna"),
                )

    def _require_a_valid_point(self) -> None:
        if self.search.algorithm == "grid":
            self.grid()
        small = self.size is not None and self.size <= MAX_ENUMERATED
        points = self.grid() if small else self._sample_points()
        first: dict[str, Rejected] = {}
        while block := list(islice(points, BLOCK)):
            found = [self._resolve(point, self.search.seed) for point in block]
            runs = dict.fromkeys(one for one in found if isinstance(one, RunSpec))
            too_large = self._too_large(tuple(runs))
            if len(too_large) < len(runs):
                return
            for broken in (*too_large.values(), *(o for o in found if isinstance(o, Rejected))):
                first.setdefault(broken.reason, broken)
        raise self._unsatisfiable(first)

    def _unsatisfiable(self, first: Mapping[str, Rejected]) -> InputError:
        if len(first) == 1:
            ((reason, found),) = first.items()
            return self.config.error(self._blamed(reason), f"no point is valid: {found.detail}")
        counts = self.count()
        listed = ", ".join(f"{reason} ({n})" for reason, n in counts.rejected.items())
        what = "points drawn" if counts.sampled else "points"
        message = f"no point is valid; of {counts.total} {what}, removed by rule: {listed}"
        return self.config.error(self._blamed(next(iter(counts.rejected))), message)

    def _blamed(self, reason: str) -> KeyPath:
        """The key that a rule speaks of first, as far as the file has it."""
        words = reason.split()
        if words[0] in Constraints.model_fields:
            return ("constraints", words[0])
        given = [(*_path(name), key) for name, keys in _given(self.config.data) for key in keys]
        return next((path for word in words for path in given if path[-1] == word), ("space",))


def load_space(
    path_or_name: str | Path, overrides: Sequence[str] = (), machine: Machine | None = None
) -> Space:
    """The space of a YAML file, or of the name of a shipped one, with overrides (`a.b=value`).

    Raises:
        InputError: no such file or name, or anything that is wrong with it.
    """
    path = Path(path_or_name)
    if not path.exists() and path.suffix not in (".yaml", ".yml"):
        shipped = space_files()
        if str(path_or_name) not in shipped:
            hint = did_you_mean(str(path_or_name), list(shipped))
            raise InputError(f"{path_or_name}: neither a file nor a shipped space; {hint}")
        path = shipped[str(path_or_name)]
    return Space(ConfigFile.read(path, overrides), machine)


def _given(data: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The sections of a file in its order."""
    for key, value in data.items():
        if key == "data":
            yield key, value
        elif key == "space":
            yield from value.items()


def _path(section: str) -> KeyPath:
    return ("data",) if section == "data" else ("space", section)


def _by_section(point: Point) -> dict[str, Items]:
    found: dict[str, list[tuple[str, Value]]] = {name: [] for name in SPECS}
    for path, value in point.items():
        section, _, field = path.partition(".")
        found[section].append((field, value))
    return {name: tuple(values) for name, values in found.items()}
