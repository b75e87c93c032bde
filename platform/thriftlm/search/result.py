"""The answer of a search, as a replay of its journal: for `--json` and `best.yaml`."""

from pathlib import Path
from typing import Any, Literal

from thriftlm.search.objective import Score, rank
from thriftlm.search.scoring import score_trials
from thriftlm.search.space import Space
from thriftlm.search.state import SearchState, TrialState
from thriftlm.spec import RunSpec, Spec


class TrialRow(Spec):
    """One trial of the answer."""

    trial_id: str
    kind: Literal["learn"] = "learn"
    """What it measured: loss."""
    status: str
    """`done`, `stopped`, `oom`, `diverged` or `failed`; `running`; `waiting` where the search ended
    before it could start, or start again; `paused` where others promised more."""
    reason: str
    """Why it ended early."""
    config: dict[str, Any]
    """The run, nested like a RunSpec."""
    point: dict[str, Any]
    """The varied fields."""
    tokens: int
    """Tokens trained."""
    loss: float | None
    """Last validation loss in nats per token, measured."""
    loss_at_budget: float | None
    """Predicted loss at the training budget."""
    tokens_per_s: float | None
    """Tokens per second over all GPUs, measured."""
    usd: float
    """Dollars that its allocations cost."""


class Best(Spec):
    """The trial that wins, and what it promises."""

    trial_id: str
    config: dict[str, Any]
    """The run, nested like a RunSpec."""
    loss_at_budget: float
    """Predicted loss in nats per token when the training budget is spent."""
    low: float
    """Lower end of its interval."""
    high: float
    """Upper end of its interval."""
    usd_per_btok: float | None
    """USD per 1e9 training tokens."""
    tokens_at_budget: float | None
    """Tokens that the training budget buys."""
    extrapolation: float | None
    """`tokens_at_budget` over the most tokens that the recipe was trained for."""


class SearchResult(Spec):
    """The answer of a search."""

    search_id: str
    status: Literal["running", "finished", "interrupted"]
    reason: str
    """Why the search ended."""
    spent_usd: float
    """Sum of the ledger: every allocation from start to release, and `idle_usd`."""
    idle_usd: float = 0.0
    """What gangs cost while they waited for their next trial."""
    budget_usd: float | None
    """Cap of the search."""
    hours: float
    """Wall-clock hours."""
    best: Best | None
    """None when no trial gave a score."""
    pareto: list[str]
    """Trials that no other beats in both loss at budget and dollars per token."""
    trials: list[TrialRow]
    """All trials, best first, then those without a score."""


def answer(space: Space, state: SearchState) -> tuple[SearchResult, dict[str, Score]]:
    """The answer as far as the journal tells it, with the scores behind it."""
    now = state.last_at
    scores = score_trials(space, state, state.trials.values())
    order = rank(scores)
    rest = [trial_id for trial_id in state.trials if trial_id not in scores]
    result = SearchResult(
        search_id=state.started.search_id if state.started else "",
        status=state.ended.status if state.ended else "running",
        reason=state.ended.reason if state.ended else "",
        spent_usd=state.spent_usd(now),
        idle_usd=state.idle_usd(now),
        budget_usd=space.search_budget.usd,
        hours=state.hours(now),
        best=best(state.trials[order[0]], scores[order[0]]) if order else None,
        pareto=[trial_id for trial_id in order if scores[trial_id].pareto],
        trials=[row(state.trials[t], scores.get(t), now) for t in [*order, *rest]],
    )
    return result, scores


def best(trial: TrialState, score: Score) -> Best:
    """The winner's summary."""
    return Best(
        trial_id=trial.trial_id,
        config=trial.run.model_dump(mode="json"),
        loss_at_budget=score.loss_at_budget,
        low=score.low,
        high=score.high,
        usd_per_btok=score.usd_per_btok,
        tokens_at_budget=score.tokens_at_budget,
        extrapolation=score.extrapolation,
    )


def row(trial: TrialState, score: Score | None, now: float) -> TrialRow:
    """One trial's line of the answer."""
    status = trial.status or _unended(trial)
    return TrialRow(
        trial_id=trial.trial_id,
        status=status,
        reason=trial.reason,
        config=trial.run.model_dump(mode="json"),
        point=trial.point,
        tokens=trial.tokens,
        loss=trial.loss,
        loss_at_budget=score.loss_at_budget if score else None,
        tokens_per_s=trial.tokens_per_s(),
        usd=trial.usd(now),
    )


def _unended(trial: TrialState) -> str:
    return "running" if trial.is_running else "paused" if trial.is_paused else "waiting"


def best_run(search_id: str, trial: TrialState, score: Score) -> RunSpec:
    """The run to train for real: the winner over the tokens that the training budget buys."""
    tokens = trial.run.tokens
    if score.tokens_at_budget is not None:
        tokens = max(trial.run.optim.batch_tokens, round(score.tokens_at_budget))
    changed = {
        "tokens": tokens,
        "report_every_tokens": max(1, tokens // 20),
        "origin": f"{search_id}/{trial.trial_id}",
    }
    return RunSpec.model_validate(trial.run.model_dump() | changed)


def write(folder: Path, space: Space, state: SearchState) -> tuple[SearchResult, dict[str, Score]]:
    """The answer, with `results.json` and `best.yaml` written into the search's folder."""
    import yaml

    result, scores = answer(space, state)
    (folder / "results.json").write_text(result.model_dump_json(indent=2))
    (folder / "best.yaml").unlink(missing_ok=True)  # an earlier winner can have failed since
    if result.best is not None:
        winner = state.trials[result.best.trial_id]
        run = best_run(result.search_id, winner, scores[winner.trial_id]).model_dump(mode="json")
        head = f"# Winner of search {result.search_id}. Train it: thriftlm train THIS_FILE\n"
        (folder / "best.yaml").write_text(head + yaml.safe_dump(run, sort_keys=False))
    return result, scores
