"""Population based training in step (Jaderberg et al., arXiv 1711.09846).

`search.population` trials are drawn at random. Each trains from one interval to the next and waits
there for the others. Then the worst quarter by measured loss ends, and each place goes to a child
of one of the best quarter: its run, from its checkpoint, at 0.8 or 1.25 times its learning rate.
The child's run has the change in it (`optim.lr_changes`), so that what a population finds is one
run, which gives the same losses when it is trained from its beginning.

They wait because losses alone should decide, neither the clock nor how many run at a time: a replay
decides the same, and a population may be larger than the cluster. Who waits holds no resources.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence

import numpy as np

from thriftlm.search.algorithms import Proposal, Searcher, random
from thriftlm.search.asha import rung_reached
from thriftlm.search.history.journal import Branch
from thriftlm.search.history.state import PAUSED, SearchState, TrialState
from thriftlm.search.scores.objective import loss_of
from thriftlm.search.scores.scoring import loss_unit
from thriftlm.search.spaces.settings import SearchSettings
from thriftlm.search.spaces.space import Space
from thriftlm.training.schedule import peak

QUARTER = 4
"""One in so many is replaced at an interval, at least one."""
FACTORS = (0.8, 1.25)
"""A child's learning rate is its parent's times one of these: up and down again is no change."""


def intervals(settings: SearchSettings) -> range:
    """Tokens at which a population is compared: the multiples of `fidelity.min_tokens`."""
    fidelity = settings.fidelity
    return range(fidelity.min_tokens, fidelity.max_tokens, fidelity.min_tokens)


def most_trials(settings: SearchSettings) -> int:
    """Trials of a population where none breaks: its founders, and children at each interval."""
    members = settings.population
    return members + len(intervals(settings)) * _replaced(members)


def _replaced(members: int) -> int:
    return max(1, members // QUARTER) if members > 1 else 0


class Population(Searcher):
    """The searcher of `scheduler: pbt`."""

    pauses = True
    exhausted = "the population was trained to its end"

    def __init__(self, space: Space) -> None:
        super().__init__(space, random)
        self.size = space.search.population
        self.intervals, self.unit = intervals(space.search), loss_unit(space)
        self.has_all = False
        """Whether the space has no further founder."""

    def pause(self, trial: TrialState) -> str | None:
        """Why a running trial should wait now."""
        before = trial.curve[-2].tokens if len(trial.curve) > 1 else trial.taken_over
        reached = rung_reached(self.intervals, before, trial.tokens)
        return None if reached is None else f"{PAUSED} at {trial.tokens} tokens"

    def pauses_at(self, trial: TrialState) -> int | None:
        """The next interval; None on the way to the end."""
        passed = self._passed(trial.tokens)
        return self.intervals[passed] if passed < len(self.intervals) else None

    def resume(self, state: SearchState, is_last: bool) -> str | None:
        """The first that waits where the last members are now, once every place there is taken.

        `is_last`: nobody can be replaced any more, so all go on.
        """
        if not is_last and (self._wants_founder(state) or any(self._free(state))):
            return None
        passed = self._reached(state)
        ready = [t for t in state.paused if passed and self._passed(t.tokens) == passed]
        return min(ready, key=lambda t: t.number).trial_id if ready else None

    def propose(self, state: SearchState) -> Iterator[Proposal]:
        """Founders, and later children."""
        if self._wants_founder(state):
            yield from super().propose(state)
            self.has_all = True
        for place, child in self._free(state):
            ends = None
            if place is not None and not state.trials[place].has_ended:
                rate = child.run.optim.lr_changes[-1][1]
                ends = place, f"pbt: replaced by {child.trial_id} at lr {rate:.3g}"
            yield Proposal(child.point, child.run, branch=child.branch, ends=ends)

    # --- where the population stands --------------------------------------------------------------

    def _passed(self, tokens: int) -> int:
        """How many intervals lie at or before so many tokens."""
        return bisect_right(self.intervals, tokens)

    def _wants_founder(self, state: SearchState) -> bool:
        return not self.has_all and len(self._founders(state)) < self.size

    def _founders(self, state: SearchState) -> list[TrialState]:
        """Without those that broke before they could be compared: another takes their place."""
        firsts = [t for t in members(state) if t.branch is None]
        return [t for t in firsts if not t.has_ended or self._passed(t.tokens)]

    def _reached(self, state: SearchState) -> int:
        """Intervals that every member which lives has passed.

        Who has been asked to wait and holds its resources still has not come yet.
        """
        living = [t for t in members(state) if not t.has_ended]
        passed = [self._passed(t.tokens) - (t.is_running and bool(t.stop_reason)) for t in living]
        return max(0, min(passed, default=0))

    def _ranked(self, state: SearchState, passed: int) -> list[tuple[TrialState, int]]:
        """All that were trained to an interval, best first, with their tokens there."""
        wanted, found = self.intervals[passed - 1], []
        for trial in members(state):
            there = next((p for p in trial.curve if p.tokens >= wanted), None)
            loss = None if there is None else loss_of(there, self.unit)
            if there is not None and loss is not None and trial.taken_over < wanted:
                found.append((loss, trial.number, trial, there.tokens))
        return [(trial, tokens) for *_, trial, tokens in sorted(found, key=lambda one: one[:2])]

    def _free(self, state: SearchState) -> Iterator[tuple[str | None, Proposal]]:
        """Who is to be replaced by which child; None stands for a member that broke.

        Who was interrupted as it came here has gone on since, and keeps its place.
        """
        if not (passed := self._reached(state)):
            return
        ranked = self._ranked(state, passed)
        worst = ranked[len(ranked) - _replaced(len(ranked)) :]
        broke = min(self.size, len(self._founders(state))) - len(ranked)
        went_on = {t.trial_id for t, tokens in worst if t.is_running or t.tokens > tokens}
        places = [trial.trial_id for trial, _ in reversed(worst)] + [None] * broke
        best = ranked[: max(1, len(worst))]
        for place, child in zip(places, self._variants(best, passed), strict=False):
            if child.trial_id not in state.trials and place not in went_on:
                yield place, child

    def _variants(self, best: Sequence[tuple[TrialState, int]], passed: int) -> Iterator[Proposal]:
        """Each of the best with each factor once, in an order that the seed gives."""
        pairs = [(trial, tokens, factor) for trial, tokens in best for factor in FACTORS]
        rng = np.random.default_rng([self.space.search.seed, passed, len(pairs)])
        for i in rng.permutation(len(pairs)).tolist():
            yield child_of(*pairs[i])


def members(state: SearchState) -> list[TrialState]:
    """Trials of the population, those that were replaced and those that broke too."""
    own = (t for t in state.trials.values() if t.repeat_of is None)
    return [trial for trial in own if not trial.is_only_known]


def child_of(parent: TrialState, tokens: int, factor: float) -> Proposal:
    """A run that leaves another one after so many tokens, with its learning rate multiplied."""
    optim = parent.run.optim
    changes = (*optim.lr_changes, (tokens, factor * peak(optim, tokens)))
    changed = optim.model_copy(update={"lr_changes": changes})
    return Proposal(
        {**parent.point, "optim.lr_changes": changes},
        parent.run.model_copy(update={"optim": changed}),
        branch=Branch(trial_id=parent.trial_id, tokens=tokens),
    )
