"""Where the trials of a search stand: who leads, who follows, and the joint draws behind it."""

from collections.abc import Mapping
from dataclasses import dataclass

from thriftlm.search.algorithms import started
from thriftlm.search.history.state import SearchState, TrialState
from thriftlm.search.scores.comparison import Comparison
from thriftlm.search.scores.objective import Predicted, Score, rank
from thriftlm.search.scores.scoring import compare_trials, configuration_of
from thriftlm.search.spaces.space import Space


@dataclass(frozen=True, eq=False)
class Ranking:
    """All trials that can be scored."""

    state: SearchState
    comparison: Comparison | None
    """None while nothing can be scored."""
    order: list[str]
    """Trials, best first; repeats of one with another seed stand for it and are left out."""

    @property
    def scores(self) -> dict[str, Score]:
        """Scores by trial id, repeats included."""
        return {} if self.comparison is None else self.comparison.scores

    @property
    def winner(self) -> TrialState | None:
        """The first."""
        return self.state.trials[self.order[0]] if self.order else None

    @property
    def runner_up(self) -> TrialState | None:
        """The best one of another configuration than the winner's."""
        trials = [self.state.trials[trial_id] for trial_id in self.order]
        own = configuration_of(trials[0].run) if trials else ""
        return next((t for t in trials if configuration_of(t.run) != own), None)


def ranking(space: Space, state: SearchState) -> Ranking:
    """The standing as far as the journal tells it.

    A searcher with a surrogate of its own is replayed and asked for its predictions, so that the
    answer is the trial that it has chosen and confirmed; else the law of all curves decides.
    """
    trials = state.trials.values()
    predicted = _predicted(space, state)
    found = compare_trials(space, state, trials, predicted=predicted)
    ranked = [] if found is None else rank(found.scores)
    return Ranking(state, found, [t for t in ranked if state.trials[t].repeat_of is None])


def _predicted(space: Space, state: SearchState) -> Mapping[str, Predicted] | None:
    searcher = started(space)
    if not searcher.predicts:
        return None
    for event in state.events:
        searcher.observe(event)
    return searcher.predicted()
