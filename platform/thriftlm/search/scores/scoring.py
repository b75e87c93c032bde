"""From trials to scores: which points of which curves enter, and what a token costs."""

from collections.abc import Iterable, Mapping, Sequence

from threadpoolctl import threadpool_limits

from thriftlm.search.history.journal import KnownRun
from thriftlm.search.history.state import SearchState, TrialState
from thriftlm.search.scores.comparison import Comparison, compare
from thriftlm.search.scores.measured_systems import Measured, best_systems
from thriftlm.search.scores.objective import LossUnit, Observation, Predicted, Score, curve_of
from thriftlm.search.spaces.space import Space
from thriftlm.spec import Progress, RunSpec, Status
from thriftlm_models.counts import non_embedding_params

INTERVAL_SAMPLES = 64
"""Refits behind the interval of an answer."""
FEW_SAMPLES = 4
"""Refits where only the central prediction decides."""


def score_trials(
    space: Space,
    state: SearchState,
    trials: Iterable[TrialState],
    *,
    until_tokens: int | None = None,
    samples: int = INTERVAL_SAMPLES,
) -> dict[str, Score]:
    """The score of every trial that measured a loss and did not diverge, by trial id.

    With `until_tokens` only the reports up to the first that reached it count, so that trials are
    compared at a rung on equal terms. Who needs no interval asks for `FEW_SAMPLES`.
    """
    found = compare_trials(space, state, trials, until_tokens=until_tokens, samples=samples)
    return {} if found is None else found.scores


def compare_trials(
    space: Space,
    state: SearchState,
    trials: Iterable[TrialState],
    *,
    until_tokens: int | None = None,
    samples: int = INTERVAL_SAMPLES,
    predicted: Mapping[str, Predicted] | None = None,
) -> Comparison | None:
    """The same with the draws behind the scores; None while nothing can be scored.

    Seeds of one configuration are one curve. `predicted` are a searcher's own predictions by
    `configuration_of`.
    """
    if state.started is None:
        return None
    unit, known = loss_unit(space), best_systems(state)
    observations = [
        observation(trial, unit, until_tokens, known.get(trial.shape)) for trial in trials
    ]
    observations += [known_observation(one, unit, until_tokens) for one in beside(state)]
    with threadpool_limits(1):  # the cores belong to the workers
        return compare(
            observations,
            budget_usd=space.training_budget.usd,
            budget_hours=space.training_budget.hours,
            unique_tokens=min(state.started.unique_tokens.values(), default=None),
            objective=space.objective_name,
            weights=space.objective_weights,
            target_loss=space.target_loss,
            samples=samples,
            seed=space.search.seed,
            predicted=predicted,
        )


def loss_unit(space: Space) -> LossUnit:
    """Of the losses that are compared: bits per byte where the tokenizer varies."""
    return "bits_per_byte" if "data.tokenizer" in space.domains else "nats_per_token"


def configuration_of(run: RunSpec) -> str:
    """Identity of a recipe whatever its seed: what the seeds of one configuration share."""
    return run.recipe_id if run.seed == 0 else run.model_copy(update={"seed": 0}).recipe_id


def beside(state: SearchState) -> list[KnownRun]:
    """Known runs whose points belong to the law and that are no trial's.

    Those outside the space, those of too few tokens, and those of trials that are trained again.
    """
    if not state.known:
        return []
    own = {trial.trial_id for trial in state.trials.values() if trial.is_only_known}
    return [one for one in state.known if one.trial_id not in own]


def known_observation(one: KnownRun, unit: LossUnit, until_tokens: int | None) -> Observation:
    """Points of a known run for the law; it gets no score."""
    recipe = one.recipe_id if one.run is None else configuration_of(one.run)
    return Observation(
        trial_id=f"known/{one.run_id}",
        recipe_id=recipe,
        curve=curve_of(recipe, one.n_params, _until(one.reports, until_tokens), unit),
        usd_per_token=None,
        tokens_per_s_total=None,
        basis="measured",
        status=one.status,
        system_key="",
    )


def observation(
    trial: TrialState, unit: LossUnit, until_tokens: int | None, best: Measured | None
) -> Observation:
    """What a trial measured; what a token costs is that of the best system known for its shape."""
    reports = _until(trial.curve, until_tokens)
    system, recipe = best.system if best else trial.run.system, configuration_of(trial.run)
    return Observation(
        trial_id=trial.trial_id,
        recipe_id=recipe,
        curve=curve_of(recipe, non_embedding_params(trial.run.model), reports, unit),
        usd_per_token=best.usd_per_token if best else None,
        tokens_per_s_total=best.tokens_per_s if best else None,
        basis="measured",
        status=outcome(trial),
        system_key=f"{system.n_gpus} x {system.gpu} {system.strategy}",
    )


def _until(reports: Sequence[Progress], until_tokens: int | None) -> list[Progress]:
    """Reports up to the first that reached a token count, all of them without one."""
    before = [0, *(report.tokens for report in reports)]
    return [p for p, b in zip(reports, before, strict=False) if b < (until_tokens or p.tokens)]


def outcome(trial: TrialState) -> Status:
    """How a trial ended as far as scores care.

    One that failed counts like one out of memory: its points stay in the law, which belongs to the
    recipe, but it gets no score, since nobody can train it on.
    """
    if trial.curve and trial.curve[-1].status in ("oom", "diverged"):
        return trial.curve[-1].status
    if trial.status in ("oom", "failed"):
        return "oom"
    return "running" if trial.status is None else "done"
