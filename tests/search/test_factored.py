"""The factored search on plain spaces, whose systems nobody has measured."""

import numpy as np
import pytest

from thriftlm.search.history.journal import Allocated, Suggested
from thriftlm.search.history.state import PAUSED, SearchState
from thriftlm.search.learning.curve_model import EARLIEST
from thriftlm.search.learning.factored import CONFIRMED, Factored
from thriftlm.search.spaces.space import load_space

QUICKSTART = (
    "search.algorithm=factored",
    "search.scheduler=auto",
    "training_budget.usd=0.01",  # the machine here trains 1,000 tokens a second
    "search_budget.usd=0.05",
    "search_budget.trials=8",
)


@pytest.fixture
def searched(lab):
    """A finished search, by what the space file is changed in."""
    return lambda *sets: lab.searched(load_space("quickstart", (*QUICKSTART, *sets)))


def decisions(events):
    """What the searcher decided, with how many events before it."""
    begun = set()
    for place, event in enumerate(events):
        if isinstance(event, Suggested):
            yield place, event.trial_id, "propose"
        elif isinstance(event, Allocated):
            if event.trial_id in begun:
                yield place, event.trial_id, "resume"
            begun.add(event.trial_id)


def test_an_unmeasured_machine_is_searched_to_the_end(searched):
    desk = searched()
    trials = desk.state.trials.values()
    assert len(trials) == 8
    assert desk.state.ended.status == "finished"
    assert any(len(trial.allocations) > 1 for trial in trials)  # went on from a rung
    assert any((trial.stop_reason or "").startswith(PAUSED) for trial in trials)  # or never
    searcher = desk.algorithm
    for trial in trials:  # the first rung is known before anything was measured
        assert 8192 <= trial.curve[0].tokens <= searcher.targets[trial.trial_id]
    winner = desk.state.trials[desk.leader()]
    recipe, _ = searcher.places[winner.trial_id]
    most = desk.space.search.fidelity.max_tokens
    needed = min(CONFIRMED * searcher.tokens_at_budget[recipe], 0.95 * most)
    assert winner.tokens >= needed


def test_measured_speed_replaces_no_estimate(searched):
    searcher = searched().algorithm
    assert not searcher.systems.prior.is_known
    assert searcher.systems.knows_speed
    speed = np.exp(searcher.systems.tokens_per_s()[searcher.menu.runs_on])
    assert 300 < np.median(speed) < 6000  # one or two workers of 1,000 tokens per second


def test_same_decisions_after_a_replay_cut_anywhere(searched):
    desk = searched()
    events = desk.journal.events
    seen = []
    for place, trial_id, kind in decisions(events):
        state, again = SearchState(events[:place]), Factored(desk.space)
        for event in events[:place]:
            again.observe(event)
        is_last = len(state.trials) >= desk.budget.trials
        if kind == "resume":
            assert again.resume(state, is_last) == trial_id
        else:
            assert again.resume(state, is_last) is None
            assert next(again.propose(state)).run.trial_id == trial_id
        seen.append(kind)
    assert set(seen) == {"propose", "resume"}


def test_a_trial_pauses_at_its_target(searched):
    desk = searched()
    searcher = Factored(desk.space)
    paused = 0
    for event in desk.journal.events:
        searcher.observe(event)
        if event.kind == "stop_requested" and event.reason.startswith(PAUSED):
            paused += 1
            before = [
                e for e in desk.journal.events if getattr(e, "trial_id", "") == event.trial_id
            ]
            reports = [
                e.progress.tokens for e in before[: before.index(event)] if e.kind == "reported"
            ]
            assert reports[-1] >= searcher.targets[event.trial_id]
            assert len(reports) == 1 or reports[-2] < searcher.targets[event.trial_id]
    assert paused


def test_rungs_lie_between_equal_tokens_and_equal_dollars():
    space = load_space("quickstart", QUICKSTART)
    fidelity = space.search.fidelity
    end = fidelity.max_tokens / 4
    by_dollars = end * fidelity.min_tokens / fidelity.max_tokens
    assert by_dollars < Factored(space)._first_rung(end) < fidelity.min_tokens


def test_runs_begin_alike_in_tokens(searched):
    searcher = searched().algorithm
    features = searcher._features(np.arange(3))
    assert len(set(features.log_early.tolist())) == 1
    assert np.exp(features.log_early[0]) * EARLIEST <= searcher.space.search.fidelity.max_tokens * (
        1 + 1e-9
    )


RATES = (
    "space.model={n_layers: 2, d_model: 64, n_heads: 2, d_ff: 192}",
    "space.optim.lr={loguniform: [5e-4, 5e-2]}",
    "search_budget.trials=12",
)


def test_a_second_first_trial_is_no_twin_of_the_first(searched):
    """Both start before anything is measured."""
    first, second, *_ = searched(*RATES).state.trials.values()
    assert second.allocations[0].since < first.reported_at[0]
    assert abs(np.log(first.run.optim.lr / second.run.optim.lr)) > 0.1


def test_a_twin_of_the_leader_is_no_second_chance(searched):
    """What a recipe has for itself, its nearest neighbours in rate have too."""
    searcher = searched(*RATES).algorithm
    known, points = searcher._data()
    leader = searcher._ranked()[0]
    away = np.abs(searcher.menu.log_rate - searcher.menu.log_rate[leader])
    left = np.setdiff1d(np.arange(len(away)), known)
    twin, other = (left[np.argmin(np.abs(away[left] - gap))] for gap in (0.01, 0.3))
    recipes = np.array([*known.tolist(), twin, other])
    posterior = searcher.curves.posterior(searcher._features(recipes), points)
    sd = posterior.sd_of_difference(known.tolist().index(leader))
    assert away[twin] < 0.05
    assert sd[-2] < sd[-1] / 4
