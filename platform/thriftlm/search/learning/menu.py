"""What a factored search chooses from: recipes, systems, and which of them go together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from thriftlm import prices
from thriftlm.planning.cases import Case
from thriftlm.planning.estimate import case_of
from thriftlm.planning.hyperparameters import step_law
from thriftlm.search.learning.curve_model import Features
from thriftlm.search.learning.system_model import Prior
from thriftlm.search.spaces.domains import Domain, Value
from thriftlm.search.spaces.recorded_table import RecordedSpace
from thriftlm.search.spaces.section import Rejected
from thriftlm.search.spaces.space import Point, Space
from thriftlm.spec import RunSpec, SystemSpec
from thriftlm_models.counts import non_embedding_params

Floats = NDArray[np.float64]
MOST_RECIPES, MOST_SYSTEMS = 1_000, 3_000
"""Larger spaces are represented by so many draws."""
TRIES = 30
"""Systems tried for a recipe before it counts as one that runs nowhere."""


@dataclass(eq=False)
class Menu:
    """Recipes (R) and systems (S) of a space. Shapes (K) are what of a recipe speed depends on."""

    space: Space
    recipes: list[Point]
    systems: list[Point]
    runs: list[RunSpec]
    """One run of each recipe, on any system."""
    specs: list[SystemSpec]
    usd_per_hour: Floats
    shapes: list[Case]
    shape_of: NDArray[np.intp]
    """Shape of each recipe."""
    runs_on: NDArray[np.bool_]
    """Whether a shape can run on a system, as far as is known (K, S)."""
    pairs: NDArray[np.bool_] | None
    """Recorded pairs (R, S); None where every pair that can run may be tried."""

    def __post_init__(self) -> None:
        self.recipe_at = {_key(point): i for i, point in enumerate(self.recipes)}
        self.system_at = {_key(point): i for i, point in enumerate(self.systems)}
        self.learn_paths = [p for p in self.space.domains if p in self.recipes[0]]
        self.refused = np.zeros_like(self.runs_on)

    def locate(self, point: Point) -> tuple[int, int]:
        """Recipe and system of a point of the menu."""
        recipe, system = _halves(point)
        return self.recipe_at[_key(recipe)], self.system_at[_key(system)]

    def place(self, point: Point) -> tuple[int | None, int | None]:
        """Recipe and system of a point of which either half may be missing, or not on the menu."""
        recipe, system = _halves(point)
        return self.recipe_at.get(_key(recipe)), self.system_at.get(_key(system))

    def fact(self, run: RunSpec) -> tuple[int, int] | None:
        """Shape and system of a run, also of a recipe that is not on the menu."""
        case = case_of(run)._replace(system=self.specs[0])
        if run.system not in self.specs or case not in self.shapes:
            return None
        shape, system = self.shapes.index(case), self.specs.index(run.system)
        return (shape, system) if self.runs_on[shape, system] else None

    def allowed(self, recipe: int) -> NDArray[np.bool_]:
        """Systems on which a recipe may be tried (S,)."""
        shape = self.shape_of[recipe]
        able = self.runs_on[shape] & ~self.refused[shape]
        return np.asarray(able if self.pairs is None else able & self.pairs[recipe])

    def point(self, recipe: int, system: int) -> dict[str, Value]:
        """The point of a pair, in the order of the space."""
        return _whole(self.space, self.recipes[recipe], self.systems[system])

    def resolve(self, recipe: int, system: int) -> RunSpec | None:
        """The run of a pair; one that is none is not offered again."""
        found = self.space.resolve(self.point(recipe, system), self.space.search.seed)
        if isinstance(found, RunSpec):
            return found
        self.refused[self.shape_of[recipe], system] = True
        return None

    def runs_on_any(self, systems: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Whether some of the systems (S,) takes a recipe, by what is known beforehand (R,)."""
        able = self.runs_on[self.shape_of] & systems
        return np.asarray((able if self.pairs is None else able & self.pairs).any(axis=1))

    @cached_property
    def prior(self) -> Prior:
        """Estimates of every shape on every system."""
        return Prior.of(self.shapes, self.specs, self.runs_on, self.space.machine)

    @cached_property
    def log_n(self) -> Floats:
        """Log of stored parameters without embeddings (R,)."""
        return np.log([float(non_embedding_params(run.model)) for run in self.runs])

    @cached_property
    def raw(self) -> tuple[Floats, NDArray[np.intp]]:
        """Numbers of recipes from 0 to 1 (R, F), and codes of their words (R, W)."""
        numbers, words = [], []
        for path in self.learn_paths:
            if path in ("optim.lr", "optim.batch_tokens"):
                continue  # they enter as what differs from Step Law
            column = [point[path] for point in self.recipes]
            if all(isinstance(x, int | float) and not isinstance(x, bool) for x in column):
                numbers.append(_scaled(np.array(column, float)))
            else:
                order = {word: code for code, word in enumerate(dict.fromkeys(map(str, column)))}
                words.append(np.array([order[str(word)] for word in column]))
        rows = len(self.recipes)
        return (
            np.column_stack([np.zeros((rows, 0)), *numbers]),
            np.column_stack([np.zeros((rows, 0), np.intp), *words]).astype(np.intp),
        )

    @cached_property
    def log_rate(self) -> Floats:
        """Log of the learning rate (R,)."""
        return np.log([run.optim.lr for run in self.runs])

    @cached_property
    def log_batch(self) -> Floats:
        """Log of tokens in a batch (R,)."""
        return np.log([float(run.optim.batch_tokens) for run in self.runs])

    def features(self, recipes: NDArray[np.intp], log_d: Floats, log_early: float) -> Features:
        """What the surrogate sees of some recipes.

        `log_d`: of the tokens that the budget buys each; `log_early`: of those in which runs begin.
        """
        numbers, words = self.raw
        raw, words, log_n = numbers[recipes], words[recipes], self.log_n[recipes]
        law: Any = step_law(cast(Any, np.exp(log_n)), cast(Any, np.exp(log_d)))  # power laws
        u = self.log_rate[recipes] - np.log(law.lr)
        v = self.log_batch[recipes] - np.log(law.batch_tokens)
        early = np.full(len(recipes), log_early)
        return Features(raw, words, log_n, log_d, early, u, v)

    def most_of_recipes(self, of_shapes: Floats) -> Floats:
        """Per recipe the most that its shape has on the systems it may be tried on (R,)."""
        if self.pairs is None or not self.is_partial:
            return np.asarray(of_shapes.max(axis=1)[self.shape_of])
        least = of_shapes.min()
        return np.asarray(np.where(self.pairs, of_shapes[self.shape_of], least).max(axis=1))

    @cached_property
    def is_partial(self) -> bool:
        """Whether recipes of one shape are recorded on different systems."""
        return self.pairs is not None and bool((self.pairs != self.runs_on[self.shape_of]).any())


def _scaled(column: Floats) -> Floats:
    low, high = column.min(), column.max()
    if high <= low:
        return np.zeros_like(column)
    if low > 0 and high / low > 4:
        column, low, high = np.log(column), np.log(low), np.log(high)
    return np.asarray((column - low) / (high - low))


def menu_of(space: Space, also: Sequence[Point] = ()) -> Menu:
    """The menu of a space; that of a recorded one is computed once and shared by its searches.

    Where not all points are listed, those of `also` are on it; one may be of a recipe alone.
    """
    if isinstance(space, RecordedSpace):
        if "menu" not in space.shared:
            space.shared["menu"] = _recorded_menu(space)
        found: Menu = space.shared["menu"]
        return found
    return _menu(space, also)


def _recorded_menu(space: RecordedSpace) -> Menu:
    runs = space.runs
    pairs = np.zeros((len(runs.recipes), len(runs.systems)), bool)
    pairs[runs.recipe, runs.system] = True
    recipes = [_ordered(space, point) for point in runs.recipes]
    systems = [_ordered(space, point) for point in runs.systems]
    price = np.ones(len(systems))
    price[runs.system] = runs.usd_per_hour[runs.first[:-1]]
    return _assembled(space, recipes, systems, pairs, price)


def _ordered(space: Space, point: Mapping[str, Value]) -> dict[str, Value]:
    return {path: point[path] for path in space.domains if path in point}


def _menu(space: Space, also: Sequence[Point]) -> Menu:
    """All recipes and systems where they are few, else so many draws of the space's seed."""
    rng = np.random.default_rng(space.search.seed)
    learn = {p: d for p, d in space.domains.items() if not p.startswith("system.")}
    where = {p: d for p, d in space.domains.items() if p.startswith("system.")}
    recipes, systems = _points(learn, MOST_RECIPES, rng), _points(where, MOST_SYSTEMS, rng)
    for recipe, system in map(_halves, [*(start.point for start in space.starts), *also]):
        recipes += [recipe] if recipe not in recipes else []
        systems += [system] if len(system) >= len(where) and system not in systems else []
    return _assembled(space, recipes, systems, None, None)


def _halves(point: Point) -> tuple[dict[str, Value], dict[str, Value]]:
    """What of a point is the recipe, and what the system."""
    system = {path: value for path, value in point.items() if path.startswith("system.")}
    return {path: value for path, value in point.items() if path not in system}, system


def _whole(space: Space, recipe: Point, system: Point) -> dict[str, Value]:
    """A point in the order of the space; what a start sets beside it comes last."""
    both = {**recipe, **system}
    return {**{path: both[path] for path in space.domains}, **both}


def _key(point: Point) -> frozenset[tuple[str, Any]]:
    """A point without its order; lists, as a journal has them, are as good as tuples."""
    plain = ((p, tuple(x) if isinstance(x, list) else x) for p, x in point.items())
    return frozenset(plain)


def _points(
    domains: Mapping[str, Domain], most: int, rng: np.random.Generator
) -> list[dict[str, Value]]:
    if not domains:
        return [{}]
    listed = [domain.values for domain in domains.values()]
    sizes = [len(values) if values is not None else most + 1 for values in listed]
    if np.prod(sizes, dtype=float) <= most:
        grid = np.indices(sizes).reshape(len(sizes), -1).T
        return [
            {p: (v or ())[i] for p, v, i in zip(domains, listed, row, strict=True)}
            for row in grid.tolist()
        ]
    drawn = ({path: domain.sample(rng) for path, domain in domains.items()} for _ in range(most))
    return list({tuple(point.values()): point for point in drawn}.values())


def _assembled(
    space: Space,
    recipes: Sequence[Point],
    systems: Sequence[Point],
    pairs: NDArray[np.bool_] | None,
    price: Floats | None,
) -> Menu:
    """Resolves each recipe on one system and each system with one recipe; drops what never runs."""
    order = np.random.default_rng(0)
    found: dict[int, RunSpec] = {}
    specs: dict[int, SystemSpec] = {}

    def tried(r: int, s: int) -> bool:
        run = space.resolve(_whole(space, recipes[r], systems[s]), space.search.seed)
        if isinstance(run, Rejected):
            return False
        found.setdefault(r, run)
        specs.setdefault(s, run.system)
        return True

    everywhere = np.arange(len(systems))
    for recipe, system in (_halves(start.point) for start in space.starts if pairs is None):
        tried(recipes.index(recipe), systems.index(system))
    for r in range(len(recipes)):
        able = everywhere if pairs is None else np.flatnonzero(pairs[r])
        any(tried(r, int(s)) for s in order.permutation(able)[:TRIES])
    kept = np.array(sorted(found))
    for s in range(len(systems)):
        if s not in specs:
            able = kept if pairs is None else kept[pairs[kept, s]]
            any(tried(int(r), s) for r in order.permutation(able)[:TRIES])
    where = np.array(sorted(specs))
    return _menu_of_kept(space, recipes, systems, pairs, price, kept, where, found, specs)


def _menu_of_kept(
    space: Space,
    recipes: Sequence[Point],
    systems: Sequence[Point],
    pairs: NDArray[np.bool_] | None,
    price: Floats | None,
    kept: NDArray[np.intp],
    where: NDArray[np.intp],
    found: Mapping[int, RunSpec],
    specs: Mapping[int, SystemSpec],
) -> Menu:
    runs, listed = [found[r] for r in kept.tolist()], [specs[s] for s in where.tolist()]
    cases = [case_of(run)._replace(system=listed[0]) for run in runs]
    shapes = list(dict.fromkeys(cases))
    shape_of = np.array([shapes.index(case) for case in cases])
    kept_pairs = None if pairs is None else pairs[np.ix_(kept, where)]
    runs_on = np.array([[_divides(case, spec) for spec in listed] for case in shapes])
    if kept_pairs is not None:
        recorded = np.zeros_like(runs_on)
        np.logical_or.at(recorded, shape_of, kept_pairs)
        runs_on &= recorded
    if price is None:
        usd = np.array([prices.usd_per_hour(spec) for spec in listed])
    else:
        usd = price[where]
    return Menu(
        space=space,
        recipes=[recipes[r] for r in kept.tolist()],
        systems=[systems[s] for s in where.tolist()],
        runs=runs,
        specs=listed,
        usd_per_hour=usd,
        shapes=shapes,
        shape_of=shape_of,
        runs_on=runs_on,
        pairs=kept_pairs,
    )


def _divides(case: Case, spec: SystemSpec) -> bool:
    return case.batch_tokens % (spec.micro_batch * spec.n_gpus * case.seq_len) == 0
