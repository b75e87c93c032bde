"""How sure the answer of a search is: against the runner-up, against luck, against the user's own.

All of it comes from joint draws of the losses at budget: one draw is one law (or one draw of the
searcher's surrogate) for all trials, so that what is uncertain about all of them cancels. Noise of
seeds is added per configuration, since the final run will have a seed of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from thriftlm.planning.scaling_laws import Floats
from thriftlm.search import repeats
from thriftlm.search.history.state import TrialState
from thriftlm.search.scores.comparison import INTERVAL
from thriftlm.search.scores.objective import LossUnit, loss_of
from thriftlm.search.scores.ranking import Ranking
from thriftlm.search.scores.scoring import configuration_of, loss_unit
from thriftlm.search.spaces.space import Space
from thriftlm.spec import Spec

SEED_NOISE, SEED_NOISE_RUNS = 0.0013 / 3.28, 4.0
"""Standard deviation of log loss between seeds: 0.0013 nats at 124M parameters, where GPT-2's loss
is 3.28; and how many repeats that prior is worth."""
SURE = 0.95
"""Probability from which a winner counts as decided. For two single runs that differ by seed alone
it asks for 1.645 x sqrt(2) x 0.0013 = 0.003 nats."""
COMPARED, NOISE_DRAWS = 100, 16
"""Trials that the winner is compared with, the best ones; draws of seeds for each of losses."""
CONFIRMED = 1 / 3
"""Share of the training budget's tokens from which a winner counts as confirmed."""
NEARLY = 0.95
"""Of a limit: reports do not lie exactly on it."""


class Repeats(Spec):
    """Seeds of winner and runner-up."""

    asked: int
    """`search.repeats`."""
    run: int
    """Seeds that both have a loss of, the first included."""
    usd_missing: float
    """Dollars that the others would cost."""


class Confirmation(Spec):
    """How far the winner was trained, and what ended that."""

    tokens: int
    """Most tokens that its recipe was trained for."""
    share: float
    """Of the tokens that the training budget buys."""
    limit: Literal["third_of_training_budget", "max_tokens", "search_budget"]
    """`third_of_training_budget` where it came that far, else what came before: the longest run
    that the space allows, or what the search could pay."""
    missing_tokens: float
    """To a third of the training budget's tokens; 0 where it came that far."""


class Confidence(Spec):
    """How sure the winner is. Losses are in the unit of the scores."""

    unit: LossUnit
    p_best: float
    """Probability that the winner is the best of those tried."""
    runner_up: str | None
    """Best trial of another configuration."""
    p_runner_up: float | None
    """The same of it."""
    difference: float | None
    """Loss at budget of the runner-up minus the winner's."""
    low: float | None
    """5% quantile of the difference, noise of seeds included."""
    high: float | None
    """95% quantile."""
    seed_noise: float
    """Standard deviation of one run's loss between seeds, at the winner's loss."""
    noise_runs: int
    """Repeats that it was measured by, beside the prior."""
    decided: bool
    """Whether the winner beats the runner-up with 95%, by more than seeds explain."""
    confirmation: Confirmation
    repeats: Repeats


class StartComparison(Spec):
    """How much better the winner is than a configuration of `start_from`."""

    entry: int
    """Place in the file, from 0."""
    trial_id: str
    status: str
    """How its trial stands; `not run` where the search never started it."""
    difference: float | None
    """Its loss at budget minus the winner's; None where it has no score."""
    low: float | None
    """5% quantile."""
    high: float | None
    """95% quantile."""
    usd_factor: float | None
    """Training dollars with which it reaches the winner's loss, over those of the winner; None
    where it never does, or has no score."""


@dataclass(frozen=True, eq=False)
class Draws:
    """Losses at budget drawn for some trials together."""

    trial_ids: list[str]
    losses: Floats
    """(draws, trials)."""
    best: Floats
    """Share of the draws in which each trial is the best by the objective (trials,)."""
    noise: float
    """Standard deviation of log loss between seeds."""
    seeds: dict[str, int]
    """Seeds with a loss, by configuration."""

    def difference(self, one: str, other: str) -> Floats:
        """Drawn loss of one trial minus another's."""
        at = self.trial_ids.index
        return np.asarray(self.losses[:, at(one)] - self.losses[:, at(other)])


@dataclass(frozen=True, eq=False)
class Judge:
    """A standing with what is drawn from it."""

    space: Space
    ranking: Ranking

    @cached_property
    def draws(self) -> Draws:
        """Of the best trials and of the user's own."""
        stand, order = self.ranking, self.ranking.order
        own = [t for t in self.starts.values() if t in order]
        runner_up = [stand.runner_up.trial_id] if stand.runner_up else []
        shown = list(dict.fromkeys([*order[:COMPARED], *runner_up, *own]))
        comparison, trials = stand.comparison, [stand.state.trials[t] for t in shown]
        assert comparison is not None  # there is an order
        noise, _ = seed_noise(self.space, stand)
        names = [configuration_of(trial.run) for trial in trials]
        seeds = _seeds(stand)
        unique = list(dict.fromkeys(names))
        at = {trial_id: i for i, trial_id in enumerate(comparison.trial_ids)}
        among = [at[trial_id] for trial_id in shown]
        drawn = np.repeat(comparison.draws[:, among], NOISE_DRAWS, axis=0)
        scale = np.array([noise / np.sqrt(max(1, seeds.get(name, 1))) for name in unique])
        rng = np.random.default_rng(self.space.search.seed)
        luck = rng.standard_normal((len(drawn), len(unique))) * scale
        losses = drawn * np.exp(luck[:, [unique.index(name) for name in names]])
        return Draws(shown, losses, self._best(losses, among), noise, seeds)

    def _best(self, losses: Floats, among: Sequence[int]) -> Floats:
        """Shares of the draws that each wins; of equal values the first wins."""
        comparison = self.ranking.comparison
        assert comparison is not None
        values = losses
        if comparison.objective != "loss_at_budget":
            rows = losses[::NOISE_DRAWS]
            values = np.array([comparison.values(row, among) for row in rows])
        return np.bincount(values.argmin(axis=1), minlength=len(among)) / len(values)

    def p_best(self, trial_id: str) -> float | None:
        """Probability that a trial is the best of those tried; None where it is not compared."""
        if trial_id not in self.ranking.order or trial_id not in self.draws.trial_ids:
            return None
        return float(self.draws.best[self.draws.trial_ids.index(trial_id)])

    @cached_property
    def starts(self) -> dict[int, str]:
        """Trials of `start_from` by entry."""
        found = {}
        for start in self.space.starts:
            run = self.space.resolve(start.point, self.space.search.seed)
            found[start.entry] = getattr(run, "trial_id", "")
        return found

    def confidence(self) -> Confidence | None:
        """How sure the winner is; None where there is none."""
        winner, other = self.ranking.winner, self.ranking.runner_up
        if winner is None:
            return None
        draws, scores = self.draws, self.ranking.scores
        loss = scores[winner.trial_id].loss_at_budget
        gap = None if other is None else draws.difference(other.trial_id, winner.trial_id)
        low, high = (None, None) if gap is None else np.quantile(gap, INTERVAL).tolist()
        between = None
        if other is not None:
            between = scores[other.trial_id].loss_at_budget - loss
        return Confidence(
            unit=loss_unit(self.space),
            p_best=self.p_best(winner.trial_id) or 0.0,
            runner_up=None if other is None else other.trial_id,
            p_runner_up=None if other is None else self.p_best(other.trial_id),
            difference=between,
            low=low,
            high=high,
            seed_noise=draws.noise * loss,
            noise_runs=seed_noise(self.space, self.ranking)[1],
            decided=other is None or self._is_decided(winner, other),
            confirmation=self.confirmation(winner),
            repeats=self._repeats(),
        )

    def _is_decided(self, winner: TrialState, other: TrialState) -> bool:
        """By the objective, in 95% of the draws; noise of seeds is in them."""
        draws, comparison = self.draws, self.ranking.comparison
        assert comparison is not None
        at = {trial_id: i for i, trial_id in enumerate(comparison.trial_ids)}
        pair = [winner.trial_id, other.trial_id]
        columns = [draws.trial_ids.index(trial_id) for trial_id in pair]
        among = [at[trial_id] for trial_id in pair]
        rows = draws.losses[:, columns]
        if comparison.objective == "loss_at_budget":
            values = rows
        else:
            values = np.array([comparison.values(row, among) for row in rows[::NOISE_DRAWS]])
        return bool((values[:, 0] < values[:, 1]).mean() >= SURE)

    def confirmation(self, winner: TrialState) -> Confirmation:
        """How far the winner was trained."""
        score = self.ranking.scores[winner.trial_id]
        tokens = round(score.tokens_at_budget / score.extrapolation)
        third = CONFIRMED * score.tokens_at_budget
        limit: Literal["third_of_training_budget", "max_tokens", "search_budget"]
        if tokens >= NEARLY * third:
            limit = "third_of_training_budget"
        elif tokens >= NEARLY * self.space.search.fidelity.max_tokens:
            limit = "max_tokens"
        else:
            limit = "search_budget"
        missing = 0.0 if limit == "third_of_training_budget" else third - tokens
        share = tokens / score.tokens_at_budget
        return Confirmation(tokens=tokens, share=share, limit=limit, missing_tokens=missing)

    def _repeats(self) -> Repeats:
        state, asked = self.ranking.state, self.space.search.repeats
        again = [t for t in state.trials.values() if t.repeat_of is not None]
        firsts = [state.trials[t] for t in dict.fromkeys(str(trial.repeat_of) for trial in again)]
        both = [self.ranking.winner, self.ranking.runner_up]
        firsts = firsts or [trial for trial in both if trial is not None and trial.allocations]
        seeds = [_seeds(self.ranking).get(configuration_of(t.run), 1) for t in firsts]
        left = repeats.missing(state, firsts, self.space.search.seed, asked)
        missing = sum(repeats.price(first) for pairs in left for first, _ in pairs)
        return Repeats(asked=asked, run=min(seeds, default=1), usd_missing=missing)

    def against_starts(self) -> list[StartComparison]:
        """The winner against each configuration of the user."""
        return [self._against(entry, trial_id) for entry, trial_id in self.starts.items()]

    def _against(self, entry: int, trial_id: str) -> StartComparison:
        stand, winner = self.ranking, self.ranking.winner
        trial = stand.state.trials.get(trial_id)
        status = "not run" if trial is None else trial.stage
        difference = low = high = factor = None
        if winner is not None and trial_id in stand.order and stand.comparison is not None:
            own, best = stand.scores[trial_id], stand.scores[winner.trial_id]
            difference = own.loss_at_budget - best.loss_at_budget
            drawn = self.draws.difference(trial_id, winner.trial_id)
            low, high = np.quantile(drawn, INTERVAL).tolist()
            usd = stand.comparison.usd_to(trial_id, best.loss_at_budget)
            spent = best.tokens_at_budget * best.usd_per_btok / 1e9
            factor = None if usd is None else usd / spent
        return StartComparison(
            entry=entry,
            trial_id=trial_id,
            status=status,
            difference=difference,
            low=low,
            high=high,
            usd_factor=factor,
        )


def seed_noise(space: Space, stand: Ranking) -> tuple[float, int]:
    """Standard deviation of log loss between seeds, and the repeats that say so.

    Seeds of one configuration are compared at the most tokens that all of them have reached.
    """
    total, freedom = SEED_NOISE_RUNS * SEED_NOISE**2, 0
    unit = loss_unit(space)
    for trials in _with_seeds(stand).values():
        curves = [
            [(p.tokens, loss) for p in trial.curve if (loss := loss_of(p, unit)) is not None]
            for trial in trials
        ]
        curves = [curve for curve in curves if curve]
        common = min((curve[-1][0] for curve in curves), default=0)
        at = [np.interp(common, *np.array(curve).T) for curve in curves]
        if len(at) > 1:
            total += float(np.var(np.log(at)) * len(at))
            freedom += len(at) - 1
    return float(np.sqrt(total / (SEED_NOISE_RUNS + freedom))), freedom


def _with_seeds(stand: Ranking) -> dict[str, list[TrialState]]:
    """First runs and repeats with a loss that did not diverge, of what was repeated."""
    found: dict[str, list[TrialState]] = {}
    for trial in stand.state.trials.values():
        if trial.repeat_of is None:
            continue
        first = stand.state.trials[trial.repeat_of]
        runs = found.setdefault(configuration_of(trial.run), [first])
        if trial.loss is not None and trial.curve[-1].status != "diverged":
            runs.append(trial)
    return found


def _seeds(stand: Ranking) -> dict[str, int]:
    return {name: len(trials) for name, trials in _with_seeds(stand).items()}
