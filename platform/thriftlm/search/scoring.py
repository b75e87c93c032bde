"""From trials to scores: which points of which curves enter, and what a token costs."""

from collections.abc import Iterable

from thriftlm.search.objective import LossUnit, Observation, Score, curve_of, score_all
from thriftlm.search.space import Space
from thriftlm.search.state import SearchState, TrialState
from thriftlm.spec import Status
from thriftlm_models.config import non_embedding_params


def score_trials(
    space: Space,
    state: SearchState,
    trials: Iterable[TrialState],
    *,
    until_tokens: int | None = None,
) -> dict[str, Score]:
    """The score of every trial that measured a loss and did not diverge, by trial id.

    With `until_tokens` only what was measured up to there counts, so that trials are compared at
    a rung on equal terms. Losses are in bits per byte where the tokenizer varies.
    """
    if state.started is None:
        return {}
    unit: LossUnit = "bits_per_byte" if "data.tokenizer" in space.domains else "nats_per_token"
    return score_all(
        [observation(trial, unit, until_tokens) for trial in trials],
        budget_usd=space.training_budget.usd,
        budget_hours=space.training_budget.hours,
        unique_tokens=min(state.started.unique_tokens.values()),
        objective=space.objective_name,
        weights=space.objective_weights,
        seed=space.search.seed,
    )


def observation(trial: TrialState, unit: LossUnit, until_tokens: int | None) -> Observation:
    """What a trial measured."""
    reports = [p for p in trial.curve if until_tokens is None or p.tokens <= until_tokens]
    rate = trial.tokens_per_s()
    usd_per_hour = trial.allocations[-1].usd_per_hour if trial.allocations else None
    system = trial.run.system
    return Observation(
        trial_id=trial.trial_id,
        recipe_id=trial.run.recipe_id,
        curve=curve_of(trial.run.recipe_id, non_embedding_params(trial.run.model), reports, unit),
        usd_per_token=usd_per_hour / (rate * 3600) if rate and usd_per_hour else None,
        tokens_per_s_total=rate,
        basis="measured",
        status=outcome(trial),
        system_key=f"{system.n_gpus} x {system.gpu} {system.strategy}",
    )


def outcome(trial: TrialState) -> Status:
    """How a trial ended as far as its curve tells; a broken one keeps what it measured."""
    if trial.curve and trial.curve[-1].status in ("oom", "diverged"):
        return trial.curve[-1].status
    if trial.status == "oom":
        return "oom"
    return "running" if trial.status is None else "done"
