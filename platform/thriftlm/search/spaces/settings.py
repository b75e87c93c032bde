"""What a space file says besides its space: budgets, objective, algorithm, constraints."""

from collections.abc import Callable
from typing import Any, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic import model_validator as validator

from thriftlm.spec import ModelSpec, Spec
from thriftlm_models.counts import (
    applied_params,
    flops_per_token,
    kv_bytes_per_token,
    non_embedding_params,
    stored_params,
)

Usd = PositiveFloat
Hours = PositiveFloat

Scheduler = Literal["none", "asha", "hyperband", "pbt"]
SCHEDULERS: dict[str, tuple[Scheduler, ...]] = {
    "random": ("asha", "hyperband", "pbt", "none"),
    "optuna": ("asha", "hyperband", "none"),
    "grid": ("none", "asha", "hyperband"),
    "factored": ("none",),
}
"""Valid schedulers of each algorithm; `auto` picks the first."""
QUANTITIES: dict[str, Callable[[ModelSpec, int], float]] = {
    "params": lambda model, _: stored_params(model),
    "applied_params": lambda model, _: applied_params(model),
    "non_embedding_params": lambda model, _: non_embedding_params(model),
    "weight_int8_mb": lambda model, _: stored_params(model) / 1e6,
    "flops_per_token": flops_per_token,
    "kv_bytes_per_token": lambda model, _: kv_bytes_per_token(model),
}
"""Derived quantity of a model at a sequence length, by the name that constraints use."""


class TrainingBudget(Spec):
    """What the final run may spend; it defines the objective."""

    usd: Usd | None = Field(default=None, allow_inf_nan=False)
    """USD of the final run."""
    hours: Hours | None = Field(default=None, allow_inf_nan=False)
    """Wall-clock hours of the final run."""

    @validator(mode="after")
    def _check(self) -> Self:
        if self.usd is None and self.hours is None:
            raise ValueError("training_budget needs usd, hours or both")
        return self


class SearchBudget(Spec):
    """What the search itself may spend; a hard cap."""

    usd: Usd | None = Field(default=None, allow_inf_nan=False)
    """USD of all trials together."""
    hours: Hours | None = Field(default=None, allow_inf_nan=False)
    """Wall-clock hours of the search."""
    trials: PositiveInt | None = None
    """Trials started."""

    @validator(mode="after")
    def _check(self) -> Self:
        if self.usd is None and self.hours is None and self.trials is None:
            raise ValueError("search_budget needs at least one of usd, hours, trials")
        return self


class Weights(Spec):
    """Weights of the `weighted` objective, on logged, standardised values."""

    loss: float = 0.0
    """Weight of the loss at budget."""
    usd_per_btok: float = 0.0
    """Weight of USD per 1e9 tokens."""
    tokens_per_s: float = 0.0
    """Weight of tokens per second."""

    @validator(mode="after")
    def _check(self) -> Self:
        if not (self.loss or self.usd_per_btok or self.tokens_per_s):
            raise ValueError(
                "weighted needs a weight other than 0: loss, usd_per_btok, tokens_per_s"
            )
        return self


class Objective(Spec):
    """Which score drives the search: `objective: pareto`.

    `{weighted: {loss: 1}}` gives weights, `{usd_to_loss: 3.2}` the loss to reach; without one it is
    the best loss at budget of all trials.
    """

    name: Literal["loss_at_budget", "usd_to_loss", "tokens_per_usd", "weighted", "pareto"]
    """Name of the score."""
    weights: Weights | None = None
    """Weights of `weighted`."""
    target_loss: PositiveFloat | None = Field(default=None, allow_inf_nan=False)
    """Target of `usd_to_loss`, in the unit of the scores."""

    @validator(mode="before")
    @classmethod
    def _read(cls, given: Any) -> Any:
        if isinstance(given, str):
            return {"name": given}
        if isinstance(given, dict) and set(given) == {"weighted"}:
            return {"name": "weighted", "weights": given["weighted"]}
        if isinstance(given, dict) and set(given) == {"usd_to_loss"}:
            return {"name": "usd_to_loss", "target_loss": given["usd_to_loss"]}
        return given

    @validator(mode="after")
    def _check(self) -> Self:
        if (self.name == "weighted") != (self.weights is not None):
            raise ValueError("weighted needs weights: objective: {weighted: {loss: 1}}")
        if self.target_loss is not None and self.name != "usd_to_loss":
            raise ValueError(f"target_loss belongs to usd_to_loss, not to {self.name}")
        return self


class Fidelity(Spec):
    """Tokens of a trial: at most, before it may be stopped, between two reports."""

    max_tokens: PositiveInt
    """Tokens of a trial that is never stopped, the horizon of its learning rate."""
    min_tokens: PositiveInt = Field(default_factory=lambda given: max(1, given["max_tokens"] // 9))
    """Tokens before a trial may be stopped; a ninth of `max_tokens` when not given."""
    factor: int = Field(default=3, ge=2)
    """Ratio of successive rungs; asha and hyperband keep one trial in `factor`. pbt looks at each
    multiple of `min_tokens`."""
    report_every_tokens: PositiveInt = Field(
        default_factory=lambda given: max(1, min(given["min_tokens"], given["max_tokens"] // 8))
    )
    """Tokens between two reports; `min_tokens`, at most an eighth of `max_tokens`."""
    checkpoint_every_tokens: PositiveInt | None = None
    """Tokens between two checkpoints; one at the end when not given."""
    validation_tokens: PositiveInt = 65_536
    """Tokens of the validation split read at each report."""

    @validator(mode="after")
    def _check(self) -> Self:
        if self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens must not exceed max_tokens: {self.min_tokens} > {self.max_tokens}"
            )
        return self

    @property
    def rungs(self) -> tuple[int, ...]:
        """Tokens at which trials are compared: min_tokens x factor^k below max_tokens."""
        found, tokens = [], self.min_tokens
        while tokens < self.max_tokens:
            found.append(tokens)
            tokens *= self.factor
        return tuple(found)


class SearchSettings(Spec):
    """How the space is searched."""

    algorithm: Literal["random", "grid", "optuna", "factored"] = "optuna"
    """Who proposes trials."""
    scheduler: Literal["auto"] | Scheduler = "auto"
    """Who stops trials early."""
    population: int = Field(default=8, ge=2)
    """Trials of scheduler pbt beside each other; as many run at a time as fit, the others wait."""
    seed: NonNegativeInt = 0
    """Seed of proposals and of every trial."""
    max_concurrent: PositiveInt | None = None
    """Trials at a time; as many as fit when not given."""
    repeats: PositiveInt = 1
    """Seeds that winner and runner-up are trained with, the search's own among them."""
    fidelity: Fidelity
    """Tokens of a trial."""

    @validator(mode="after")
    def _pair(self) -> Self:
        if self.scheduler not in ("auto", *SCHEDULERS[self.algorithm]):
            raise ValueError(
                f"algorithm {self.algorithm} takes scheduler "
                f"{' or '.join(SCHEDULERS[self.algorithm])}, got {self.scheduler}"
            )
        return self

    @property
    def resolved_scheduler(self) -> Scheduler:
        """The scheduler, with `auto` resolved by what fits the algorithm."""
        return SCHEDULERS[self.algorithm][0] if self.scheduler == "auto" else self.scheduler


class Bound(Spec):
    """Bounds on a derived quantity, both included."""

    min: float | None = Field(default=None, allow_inf_nan=False)
    """Smallest value."""
    max: float | None = Field(default=None, allow_inf_nan=False)
    """Largest value."""

    @validator(mode="after")
    def _check(self) -> Self:
        if self.min is None and self.max is None:
            raise ValueError("a constraint needs min, max or both")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min must not exceed max: {self.min:g} > {self.max:g}")
        return self

    def broken_by(self, name: str, value: float) -> str | None:
        """The rule that a value of a quantity breaks, None where it keeps both."""
        if self.max is not None and value > self.max:
            return f"{name} above {self.max:.15g}"
        if self.min is not None and value < self.min:
            return f"{name} below {self.min:.15g}"
        return None


class Constraints(Spec):
    """Bounds on derived quantities of the model; points outside are removed and counted."""

    params: Bound | None = None
    """Stored parameters, all."""
    applied_params: Bound | None = None
    """Parameters as the forward pass applies them."""
    non_embedding_params: Bound | None = None
    """Stored parameters without embedding and output head."""
    weight_int8_mb: Bound | None = None
    """Weights at one byte per stored parameter, in 1e6 bytes."""
    flops_per_token: Bound | None = None
    """Training FLOPs per token, by the formula `6N+attn`."""
    kv_bytes_per_token: Bound | None = None
    """Bytes of bf16 keys and values cached per token."""

    memory_fraction: Bound | None = None
    """Share of a GPU's memory that training needs, estimated; what is not known is kept."""

    def broken_by(self, model: ModelSpec, seq_len: int) -> tuple[str, float] | None:
        """The first bound that a model breaks, and its value; None where it keeps all."""
        for name, quantity in QUANTITIES.items():
            bound = getattr(self, name)
            value = None if bound is None else quantity(model, seq_len)
            if bound and value is not None and (broken := bound.broken_by(name, value)):
                return broken, value
        return None


class Sections(Spec):
    """The fields that may vary, section by section, as the file has them."""

    model: dict[str, Any]
    """Fields of `ModelSpec`."""
    optim: dict[str, Any] = Field(default_factory=dict)
    """Fields of `OptimSpec`."""
    system: dict[str, Any] = Field(default_factory=dict)
    """Fields of `SystemSpec`."""


class StartEntry(Spec):
    """A configuration to begin with: fields by section, `{model: {n_layers: 12}}`."""

    model: dict[str, Any] = Field(default_factory=dict)
    """Fields of `ModelSpec`."""
    optim: dict[str, Any] = Field(default_factory=dict)
    """Fields of `OptimSpec`."""
    system: dict[str, Any] = Field(default_factory=dict)
    """Fields of `SystemSpec`."""
    data: dict[str, Any] = Field(default_factory=dict)
    """Fields of `DataSpec`, of the values that the space has."""

    @validator(mode="after")
    def _check(self) -> Self:
        if not (self.model or self.optim or self.system or self.data):
            raise ValueError("an entry gives at least one field: {model: {n_layers: 12}}")
        return self


class SpaceFile(Spec):
    """A space file as a whole."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the searches over it; names a folder."""
    data: dict[str, Any] = Field(default_factory=dict)
    """Fields of `DataSpec`."""
    training_budget: TrainingBudget
    """What the final run may spend."""
    search_budget: SearchBudget
    """What this search may spend."""
    objective: Objective = Objective(name="loss_at_budget")
    """What drives the search."""
    search: SearchSettings
    """How it is searched."""
    start_from: list[StartEntry] = Field(default_factory=list)
    """The user's own configurations, evaluated first."""
    space: Sections
    """What may vary."""
    constraints: Constraints = Constraints()
    """Which points are left out."""
