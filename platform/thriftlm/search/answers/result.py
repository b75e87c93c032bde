"""The answer of a search, as a replay of its journal: for `--json` and `best.yaml`."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from thriftlm.search.answers import lessons
from thriftlm.search.answers.confidence import Confidence, Judge, StartComparison
from thriftlm.search.answers.next_dollars import NextDollars, next_dollars
from thriftlm.search.history.state import SearchState, TrialState
from thriftlm.search.scores.hypervolume import over_time
from thriftlm.search.scores.measured_systems import on_best_system
from thriftlm.search.scores.objective import Score
from thriftlm.search.scores.ranking import ranking
from thriftlm.search.spaces.space import Space
from thriftlm.spec import RunSpec, Spec
from thriftlm.timings import Timing


class TrialRow(Spec):
    """One trial of the answer."""

    trial_id: str
    kind: Literal["learn", "probe"] = "learn"
    """What it measured: loss, or the throughput of `timings`."""
    source: str | None = None
    """The earlier search that measured it; None where this one did."""
    status: str
    """`done`, `stopped`, `oom`, `diverged` or `failed`; `running`; `waiting` where the search ended
    before it could start, or start again; `paused` where others promised more; `known` where an
    earlier search has run it and this one has not."""
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
    p_best: float | None
    """Probability that it is the best of those tried; None where it was not compared."""
    repeat_of: str | None
    """The trial that it trains again with another seed."""
    tokens_per_s: float | None
    """Tokens per second over all GPUs, measured."""
    usd: float
    """Dollars that its allocations cost."""
    timings: tuple[Timing, ...] = ()
    """What a probe measured, one system each."""


class Best(Spec):
    """The trial that wins, and what it promises."""

    trial_id: str
    source: str | None = None
    """The earlier search that measured it; None where this one did."""
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
    effective_tokens: float | None = None
    """Fresh tokens that `tokens_at_budget` is worth where the corpus has to be repeated."""
    best_system: str | None = None
    """System of the trials on which its recipe gets the most tokens."""


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
    confidence: Confidence | None = None
    """How sure it is; None when no trial gave a score."""
    next: NextDollars | None = None
    """What the next dollars should buy; None where nothing promises a gain."""
    start_from: list[StartComparison] = Field(default_factory=list)
    """The winner against the user's own configurations, in the order of the file."""
    pareto: list[str]
    """Trials that no other beats in both loss at budget and dollars per token."""
    hypervolume: list[tuple[float, float]] | None = None
    """For the objective `pareto`: dollars spent and area that the trials so far dominate, at the
    end of each trial; see `search.hypervolume`."""
    learned: list[str] = Field(default_factory=list)
    """Where there is no answer: how trials ended, what that says, and what to try, in sentences."""
    trials: list[TrialRow]
    """All trials, best first, then those without a score."""


def answer(space: Space, state: SearchState) -> tuple[SearchResult, dict[str, Score]]:
    """The answer as far as the journal tells it, with the scores behind it."""
    now = state.last_at
    stand = ranking(space, state)
    judge, scores, order = Judge(space, stand), stand.scores, stand.order
    rest = [trial_id for trial_id in state.trials if trial_id not in order]
    rows = [row(state.trials[t], scores.get(t), now, judge.p_best(t)) for t in [*order, *rest]]
    result = SearchResult(
        search_id=state.started.search_id if state.started else "",
        status=state.ended.status if state.ended else "running",
        reason=state.ended.reason if state.ended else "",
        spent_usd=state.spent_usd(now),
        idle_usd=state.idle_usd(now),
        budget_usd=space.search_budget.usd,
        hours=state.hours(now),
        best=best(state, state.trials[order[0]], scores[order[0]]) if order else None,
        confidence=judge.confidence(),
        next=next_dollars(judge),
        start_from=judge.against_starts(),
        pareto=[trial_id for trial_id in order if scores[trial_id].pareto],
        hypervolume=over_time(stand) if space.objective_name == "pareto" else None,
        learned=[] if order else lessons.learned(space, state),
        trials=rows,
    )
    return result, scores


def best(state: SearchState, trial: TrialState, score: Score) -> Best:
    """The winner's summary, on the best system that was measured with its model."""
    return Best(
        trial_id=trial.trial_id,
        source=trial.source if trial.is_only_known else None,
        config=on_best_system(state, trial).model_dump(mode="json"),
        loss_at_budget=score.loss_at_budget,
        low=score.low,
        high=score.high,
        usd_per_btok=score.usd_per_btok,
        tokens_at_budget=score.tokens_at_budget,
        extrapolation=score.extrapolation,
        effective_tokens=score.effective_tokens,
        best_system=score.best_system,
    )


def row(
    trial: TrialState, score: Score | None, now: float, p_best: float | None = None
) -> TrialRow:
    """One trial's line of the answer."""
    return TrialRow(
        trial_id=trial.trial_id,
        kind=trial.kind,
        source=trial.source,
        status=trial.stage,
        reason=trial.reason,
        config=trial.run.model_dump(mode="json"),
        point=trial.point,
        tokens=trial.tokens,
        loss=trial.loss,
        loss_at_budget=score.loss_at_budget if score else None,
        p_best=p_best,
        repeat_of=trial.repeat_of,
        tokens_per_s=trial.tokens_per_s(),
        usd=trial.usd(now),
        timings=tuple(trial.timings),
    )


def best_run(search_id: str, state: SearchState, trial: TrialState, score: Score) -> RunSpec:
    """The run to train for real: the winner over the tokens that the training budget buys.

    It is on the best system that was measured with its model. Where its learning rate changes at
    given tokens, a longer run warms up as the trial did: so it repeats it, up to the trial's fall.
    """
    tokens, run = trial.run.tokens, on_best_system(state, trial)
    if score.tokens_at_budget is not None:
        tokens = max(trial.run.optim.batch_tokens, round(score.tokens_at_budget))
    changed = {
        "tokens": tokens,
        "report_every_tokens": max(1, tokens // 20),
        "keep_every_tokens": None,  # what children of a population began from
        "origin": f"{search_id}/{trial.trial_id}",
    }
    optim = run.optim
    if optim.lr_changes and optim.schedule != "cosine" and tokens > run.tokens:
        horizon = {"trunk_tokens": optim.trunk_tokens or run.tokens}
        run = run.model_copy(update={"optim": optim.model_copy(update=horizon)})
    return RunSpec.model_validate(run.model_dump() | changed)


def write(folder: Path, space: Space, state: SearchState) -> tuple[SearchResult, dict[str, Score]]:
    """The answer, with `results.json` and `best.yaml` written into the search's folder."""
    import yaml

    result, scores = answer(space, state)
    (folder / "results.json").write_text(result.model_dump_json(indent=2))
    (folder / "best.yaml").unlink(missing_ok=True)  # an earlier winner can have failed since
    if result.best is not None:
        winner = state.trials[result.best.trial_id]
        run = best_run(result.search_id, state, winner, scores[winner.trial_id])
        head = f"# Winner of search {result.search_id}. Train it: thriftlm train THIS_FILE\n"
        (folder / "best.yaml").write_text(
            head + yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False)
        )
    return result, scores
