"""From a budget to a training run: model, tokens, batch, learning rate, system, hours, dollars.

A budget names an optimum: the model and the tokens that reach a loss with the least compute `6 N
D`. Compute, loss and parameters name it directly. Dollars and hours name it through what a system
does with a model, by estimate: of the shapes there are, the one whose tokens for that money make it
the optimum. The run is that model, or one that is smaller on purpose: at the same loss where the
budget is no limit, within the budget where it is one.
"""

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

from pydantic import ValidationError

from thriftlm.planning.frontier import Frontier
from thriftlm.planning.hyperparameters import WEIGHT_DECAY, step_law
from thriftlm.planning.rental import Rental, Rented
from thriftlm.planning.scaling_laws import INFERENCE_SHARE, BelowFloorError, NamedLaw, Optimum
from thriftlm.planning.shapes import Shape, ladder, nearest
from thriftlm.spec import DataSpec, InputError, OptimSpec, RunSpec, vocab_from_tokenizer

BUDGETS = ("flops", "usd", "hours", "loss", "params")
DEFAULT_VOCAB = 32_000
TOO_FAR = 1.3
"""Ratio to the wanted size beyond which the largest model that fits is no answer."""


@dataclass(frozen=True)
class Budget:
    """One of them is given.

    Raises:
        InputError: none or several are, or the one is not a positive number.
    """

    flops: float | None = None
    """Of training, `6 N D`."""
    usd: float | None = None
    hours: float | None = None
    loss: float | None = None
    """Nats per token."""
    params: float | None = None
    """N of the optimum."""

    def __post_init__(self) -> None:
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(given) != 1:
            options = ", ".join(f"--{name}" for name in BUDGETS)
            said = " and ".join(f"--{name}" for name in given) or "none"
            raise InputError(f"plan needs exactly one of {options}; given: {said}")
        if not (self.value > 0 and math.isfinite(self.value)):
            raise InputError(f"--{self.kind} must be a number above 0, got {self.value:g}")

    @property
    def kind(self) -> str:
        """Which one is given."""
        return next(name for name in BUDGETS if getattr(self, name) is not None)

    @property
    def value(self) -> float:
        """The one that is given."""
        return float(getattr(self, self.kind))


@dataclass(frozen=True)
class Request:
    """What a plan is made from."""

    budget: Budget
    law: NamedLaw
    rental: Rental = Rental()  # noqa: RUF009
    k_n: float | None = None
    """The run's model over the optimum's; None: 1, or the best one for what is served."""
    inference_tokens: float | None = None
    """Tokens that the model will serve, prompt and answer."""
    unique_tokens: float | None = None
    """Fresh tokens that exist; None: as many as it takes."""
    data: DataSpec = field(
        default_factory=lambda: DataSpec(tokenizer=f"bpe:{DEFAULT_VOCAB}", seq_len=2048)
    )

    def __post_init__(self) -> None:
        for name in ("k_n", "inference_tokens", "unique_tokens"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                option = "--" + name.replace("_", "-")
                raise InputError(f"{option} must be a number above 0, got {value:g}")

    @property
    def vocab(self) -> int:
        """What the tokenizer makes it."""
        given = vocab_from_tokenizer({}, {"tokenizer": self.data.tokenizer})
        return int(given.get("vocab", DEFAULT_VOCAB))


@dataclass(frozen=True)
class PlannedRun:
    """One training run with what it costs, by estimate."""

    spec: RunSpec
    shape: Shape
    rented: Rented
    n_params: int
    """The law's N."""
    loss: float
    """By the law."""

    @property
    def hours(self) -> float:
        """Of training at the estimated speed; start-up is not in it."""
        return self.rented.hours(self.spec.tokens)

    @property
    def usd(self) -> float | None:
        """Dollars of those hours, idle GPUs of whole nodes included."""
        return self.rented.usd(self.spec.tokens)


@dataclass(frozen=True)
class Plan:
    """The answer. `run` is None where no system could be named, and `why_no_run` says why."""

    request: Request
    best: Optimum
    """The optimum at the plan's loss; N is the law's."""
    scale: float
    """The run's model over the optimum's, as asked for."""
    run: PlannedRun | None
    why_no_run: str = ""

    @cached_property
    def frontier(self) -> Frontier:
        """The law with the data that exist."""
        return Frontier(self.request.law.law, self.request.unique_tokens)

    @cached_property
    def loss(self) -> float:
        """Of the optimum."""
        return self.frontier.loss(*self.best)

    def usd_at(self, n_params: float, n_tokens: float) -> float | None:
        """Dollars of a model of the curve: the nearest shape's on its best system, to scale."""
        if self.run is None:
            return None
        request, counts = self.request, self.request.law.counts
        try:
            shape = nearest(n_params, request.vocab, counts)
            rented = _rented(request.rental, shape, n_tokens)
        except InputError:
            return None
        usd = rented.usd(n_tokens)
        return None if usd is None else usd * n_params / shape.n_params(counts)


def make_plan(request: Request) -> Plan:
    """The run that a budget pays for.

    Raises:
        InputError: nothing can be planned: a budget out of all proportion, a model below the law's
            floor, a GPU that was asked for and cannot hold it.
    """
    frontier = Frontier(request.law.law, request.unique_tokens)
    if request.k_n is not None:
        frontier.law.data_factor(request.k_n)  # refuses what lies below the floor
    if request.budget.kind in ("usd", "hours"):
        return _within(request, frontier)
    return _at_loss(request, frontier)


# --- a loss is given, at least in effect --------------------------------------------------------


def _at_loss(request: Request, frontier: Frontier) -> Plan:
    budget = request.budget
    name = {"flops": "optimum", "loss": "optimum_at", "params": "optimum_of"}[budget.kind]
    best: Optimum = getattr(frontier, name)(budget.value)
    _refuse_absurd(budget, best)
    scale = _scale(request, frontier, best)
    tokens = frontier.data_factor(scale, best) * best.n_tokens
    try:
        run = _run_to(frontier.loss(*best), scale * best.n_params, tokens, request, frontier)
    except BelowFloorError:
        raise
    except InputError as error:
        if request.rental.gpus:
            raise
        return Plan(request, best, scale, None, str(error))
    return Plan(request, best, scale, run)


def _run_to(
    loss: float, n_params: float, n_tokens: float, request: Request, frontier: Frontier
) -> PlannedRun:
    """The run of the nearest shape that reaches a loss."""
    counts = request.law.counts
    shape = nearest(n_params, request.vocab, counts)
    tokens = frontier.tokens_to(loss, shape.n_params(counts))
    if not math.isfinite(tokens):  # so near the floor that rounding the shape went below it
        larger = [s for s in ladder(request.vocab) if s.n_params(counts) > n_params]
        shape, tokens = larger[0], frontier.tokens_to(loss, larger[0].n_params(counts))
    rented = _rented(request.rental, shape, n_tokens)
    return _planned(request, frontier, shape, rented, tokens, up=True)


# --- a budget is a limit ------------------------------------------------------------------------


def _within(request: Request, frontier: Frontier) -> Plan:
    """The shape for which what the budget buys is the optimum, or the wanted share of one."""
    budget, shapes = request.budget, ladder(request.vocab)
    if budget.kind == "hours":
        if not request.rental.gpus:
            raise InputError("--hours needs --gpu: what an hour does depends on it")
        request = replace(request, rental=replace(request.rental, by_speed=True))
    else:
        request = replace(request, rental=replace(request.rental, needs_price=True))
    counts = request.law.counts

    def bought(i: int) -> tuple[Rented, float]:
        """On the best system of a shape; the batch is that of the tokens it is optimal for."""
        shape = shapes[i]
        tokens = frontier.law.optimum_of(shape.n_params(counts)).n_tokens
        rented = _rented(request.rental, shape, tokens)
        return rented, _affordable(budget, rented)

    def excess(i: int) -> float:
        """Log of the model's size over the wanted one; infinite where nothing holds it."""
        try:
            _, tokens = bought(i)
            best = frontier.optimum_at(frontier.loss(shapes[i].n_params(counts), tokens))
        except InputError:
            return math.inf
        size = shapes[i].n_params(counts) / best.n_params
        return math.log(size / _scale(request, frontier, best))

    bought(0)  # says what is wrong with GPU, cloud or price
    known: dict[int, float] = {}
    look: Callable[[int], float] = lambda i: known.setdefault(i, excess(i))  # noqa: E731
    first = bisect_left(range(len(shapes)), 0.0, key=look)
    i = min(range(max(0, first - 1), min(first + 1, len(shapes))), key=lambda i: abs(look(i)))
    ends = first in (0, len(shapes)) or math.isinf(look(first))
    if ends and abs(look(i)) > math.log(TOO_FAR):  # else a full node makes the next size dear
        raise InputError(_out_of_range(request, shapes, first, bought))
    rented = _rented(request.rental, shapes[i], bought(i)[1])  # at the batch of these tokens
    tokens = _affordable(budget, rented)
    run = _planned(request, frontier, shapes[i], rented, tokens, up=False)
    best = frontier.optimum_at(frontier.loss(run.n_params, run.spec.tokens))
    return Plan(request, best, _scale(request, frontier, best), run)


def _out_of_range(
    request: Request, shapes: tuple[Shape, ...], first: int, bought: Callable[[int], object]
) -> str:
    budget = request.budget
    smallest, largest = (shapes[i].stored_params for i in (0, -1))
    said = f"--{budget.kind} {budget.value:g}"
    if first == 0:
        return (
            f"{said} must pay for the smallest model of {smallest:,} parameters, it buys too few "
            "tokens for it; give more, or take a smaller --tokenizer"
        )
    if first < len(shapes):
        try:
            bought(first)
        except InputError as error:
            return str(error)
    return f"{said} must be spent on at most {largest:.3g} parameters, it asks for more; give less"


def _affordable(budget: Budget, rented: Rented) -> float:
    """Tokens that dollars or hours buy."""
    if budget.usd is not None:
        return 1e9 * budget.usd / (rented.estimate.usd_per_btok or math.inf)
    return budget.value * 3600 * rented.tokens_per_s


# --- shared -------------------------------------------------------------------------------------


def _scale(request: Request, frontier: Frontier, best: Optimum) -> float:
    if request.k_n is not None:
        return request.k_n
    return frontier.scale_for_demand(request.inference_tokens or 0.0, best)


def _rented(rental: Rental, shape: Shape, n_tokens: float) -> Rented:
    """The best system for a shape at the batch of so many tokens."""
    return rental.best(shape.model, step_law(shape.non_embedding_params, n_tokens).batch_tokens)


def _planned(
    request: Request,
    frontier: Frontier,
    shape: Shape,
    rented: Rented,
    n_tokens: float,
    *,
    up: bool,
) -> PlannedRun:
    """The run in whole optimizer steps, rounded up to reach a loss, down to keep a budget."""
    steps = (math.ceil if up else math.floor)(n_tokens / rented.batch_tokens + (-1e-9 if up else 0))
    if steps < 1:
        raise InputError(
            f"--{request.budget.kind} {request.budget.value:g} must pay for one step of "
            f"{rented.batch_tokens:,} tokens, it buys {n_tokens:,.0f}; give more"
        )
    recipe = step_law(shape.non_embedding_params, n_tokens)
    try:
        spec = RunSpec(
            model=shape.model,
            optim=OptimSpec(
                lr=float(f"{recipe.lr:.3g}"),
                batch_tokens=rented.batch_tokens,
                weight_decay=WEIGHT_DECAY,
            ),
            data=request.data,
            system=rented.system,
            tokens=steps * rented.batch_tokens,
            report_every_tokens=max(rented.batch_tokens, steps * rented.batch_tokens // 20),
        )
    except ValidationError as error:
        raise InputError(str(error.errors()[0]["msg"]).removeprefix("Value error, ")) from error
    n_params = shape.n_params(request.law.counts)
    return PlannedRun(spec, shape, rented, n_params, frontier.loss(n_params, spec.tokens))


def _refuse_absurd(budget: Budget, best: Optimum) -> None:
    if not (1e4 <= best.n_params <= 1e13 and 1e4 <= best.n_tokens <= 1e17):
        raise InputError(
            f"--{budget.kind} {budget.value:g} must ask for a language model, it asks for "
            f"{best.n_params:.3g} parameters and {best.n_tokens:.3g} tokens; change it"
        )


def served_cost(frontier: Frontier, k_n: float, best: Optimum, served_tokens: float) -> float:
    """FLOPs of training a model `k_n` times the optimum's size to its loss and of serving it."""
    ratio = served_tokens / best.n_tokens
    return best.flops * k_n * (frontier.data_factor(k_n, best) + ratio * INFERENCE_SHARE)
