"""What the next dollars of a search should buy: what is expected to gain most at the budget.

Four things can be bought, each with what it may gain in loss at the training budget: a longer run
of winner and runner-up, or more seeds of them (the wrong one may lead), more trials (a better one
may be untried), a probe of other systems (one may train more tokens for the money).
"""

from collections.abc import Iterator
from typing import Literal

import numpy as np

from thriftlm import prices
from thriftlm.planning.estimate import estimate_runs
from thriftlm.search import repeats
from thriftlm.search.answers.confidence import CONFIRMED, NEARLY, Judge
from thriftlm.search.history.state import TrialState
from thriftlm.search.scores.scalar import expected_improvement
from thriftlm.search.scores.scoring import configuration_of
from thriftlm.spec import InputError, RunSpec, Spec, SystemSpec

LONGER = 3.0
"""Times the tokens so far that a winner beyond a third of its budget is trained to next."""
MORE_TRIALS = 8
"""Trials that are thought of as the next ones."""
PROBE_SECONDS, MOST_PROBED, MOST_SYSTEMS = 120.0, 4, 400
"""Held for one system; systems in a probe; systems that are estimated."""
EIGHTY = 2 * 1.2816
"""Width of the 80% interval of an estimate in standard deviations."""


class NextDollars(Spec):
    """What to buy next."""

    what: Literal["longer_run", "seeds", "trials", "probe"]
    usd: float
    """Dollars that it takes."""
    gain: float
    """Loss at budget that it is expected to gain, on average over what may come out."""
    why: str
    """One sentence."""


def next_dollars(judge: Judge) -> NextDollars | None:
    """The purchase that promises the largest gain; None where none promises any."""
    options = [*_separation(judge), *_trials(judge), *_probe(judge)]
    return max(options, key=lambda option: option.gain, default=None)


def _separation(judge: Judge) -> Iterator[NextDollars]:
    """A longer run or more seeds: by which of the two leaves more open who is better."""
    winner, other = judge.ranking.winner, judge.ranking.runner_up
    if winner is None or other is None:
        return
    scores, draws = judge.ranking.scores, judge.draws
    gap = scores[other.trial_id].loss_at_budget - scores[winner.trial_id].loss_at_budget
    loss = scores[winner.trial_id].loss_at_budget
    both = draws.difference(other.trial_id, winner.trial_id).var()
    counts = [draws.seeds.get(configuration_of(t.run), 1) for t in (winner, other)]
    luck = draws.noise * loss * np.sqrt(sum(1 / count for count in counts))
    law = np.sqrt(max(0.0, both - luck**2))
    names = f"{winner.trial_id} and {other.trial_id}"
    missing = [_longer(judge, trial) for trial in (winner, other)]
    if sum(missing) > 0:
        yield NextDollars(
            what="longer_run",
            usd=sum(missing),
            gain=_improvement(-gap, float(law)),
            why=f"train {names} on: their losses at budget differ by {abs(gap):.4f}, and the "
            f"extrapolation leaves {law:.4f} of that open",
        )
    if not (winner.allocations and other.allocations):
        return  # known from an earlier search: what a repeat costs here is not
    yield NextDollars(
        what="seeds",
        usd=repeats.price(winner) + repeats.price(other),
        gain=_improvement(-gap, float(luck)),
        why=f"train {names} with another seed: they differ by {abs(gap):.4f}, seeds alone by "
        f"{luck:.4f}",
    )


def _longer(judge: Judge, trial: TrialState) -> float:
    """Dollars from where a trial is to a third of its budget, or to three times its tokens."""
    score = judge.ranking.scores[trial.trial_id]
    tokens = score.tokens_at_budget / score.extrapolation
    third = CONFIRMED * score.tokens_at_budget
    to = third if tokens < NEARLY * third else min(score.tokens_at_budget, LONGER * tokens)
    return 0.0 if tokens > NEARLY * to else (to - tokens) * score.usd_per_btok / 1e9


def _trials(judge: Judge) -> Iterator[NextDollars]:
    """More trials: what the best of some more normal draws gains over the best of those so far.

    The largest of n standard normal draws lies near sqrt(2 log n).
    """
    stand, winner = judge.ranking, judge.ranking.winner
    state, comparison = stand.state, stand.comparison
    if winner is None or comparison is None or _is_exhausted(judge):
        return
    tried = [trial for trial in state.trials.values() if trial.allocations and not trial.repeat_of]
    if not tried:
        return
    n = max(2, len({configuration_of(trial.run) for trial in tried}))
    spread = _spread(judge) or comparison.fit.tau * stand.scores[winner.trial_id].loss_at_budget
    gain = spread * float(np.sqrt(2 * np.log(n + MORE_TRIALS)) - np.sqrt(2 * np.log(n)))
    each = sum(trial.usd(state.last_at) for trial in tried) / len(tried)
    yield NextDollars(
        what="trials",
        usd=MORE_TRIALS * each,
        gain=gain,
        why=f"try {MORE_TRIALS} more: the better half of the configurations differs by "
        f"{spread:.4f} at budget, and {n} were tried",
    )


def _spread(judge: Judge) -> float:
    """Standard deviation of losses at budget by their better half: the worse half can be broken.

    0 for fewer than four configurations.
    """
    best: dict[str, float] = {}
    for trial_id in judge.ranking.order:
        name = configuration_of(judge.ranking.state.trials[trial_id].run)
        loss = judge.ranking.scores[trial_id].loss_at_budget
        best[name] = min(loss, best.get(name, loss))
    losses = np.array(list(best.values()))
    better = losses[losses <= np.median(losses)]
    return float(np.sqrt(np.mean((np.median(losses) - better) ** 2))) if len(losses) > 3 else 0.0


def _is_exhausted(judge: Judge) -> bool:
    ended, size = judge.ranking.state.ended, judge.space.size
    if ended is not None and ended.reason.startswith("every point"):
        return True
    return size is not None and len(judge.ranking.state.trials) >= size


def _probe(judge: Judge) -> Iterator[NextDollars]:
    """Systems that the estimate believes to train the winner for less, none of which was tried."""
    stand, winner = judge.ranking, judge.ranking.winner
    if winner is None or stand.comparison is None:
        return
    tried = {t.run.system for t in stand.state.trials.values() if t.allocations}
    runs = [winner.run, *_elsewhere(judge, winner.run, tried)]
    found = estimate_runs(runs, judge.space.machine)
    with np.errstate(invalid="ignore", divide="ignore"):
        saved = np.log(found.usd_per_btok[0] / found.usd_per_btok[1:])
        sd = np.log(found.high[1:] / found.low[1:]) / EIGHTY
    usable = np.isfinite(saved) & np.isfinite(sd) & (found.fits[1:] == 1)
    if not usable.any():
        return
    saved, sd = np.where(usable, saved, -100.0), np.where(usable, sd, 1.0)
    hope = expected_improvement(saved, sd)
    best = np.argsort(-hope, kind="stable")[:MOST_PROBED]
    asked = [runs[1 + i].system for i in best.tolist() if hope[i] > hope[best[0]] / 2]
    yield NextDollars(
        what="probe",
        usd=sum(prices.usd_per_hour(system) for system in asked) * PROBE_SECONDS / 3600,
        gain=float(hope[best[0]]) * stand.comparison.slope(winner.trial_id),
        why=f"time {len(asked)} systems that no trial ran on, first "
        f"{asked[0].n_gpus} x {asked[0].gpu} {asked[0].strategy} with micro batch "
        f"{asked[0].micro_batch}: the estimate puts its tokens at "
        f"{np.exp(-saved[best[0]]):.2f} of the winner's price",
    )


def _elsewhere(judge: Judge, run: RunSpec, tried: set[SystemSpec]) -> Iterator[RunSpec]:
    """The run on other systems of the space; those on which it cannot run are left out."""
    others = [system for system in judge.space.systems() if system not in tried]
    order = np.random.default_rng(judge.space.search.seed).permutation(len(others))
    for i in order[:MOST_SYSTEMS].tolist():
        try:
            prices.usd_per_hour(others[i])
            yield RunSpec.model_validate(run.model_dump() | {"system": others[i]})
        except (InputError, ValueError):  # no offer for it, or the batch does not divide
            continue


def _improvement(gain: float, sd: float) -> float:
    return float(expected_improvement(np.array([gain]), np.array([max(sd, 1e-12)]))[0])
