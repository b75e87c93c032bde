"""Many trials at a time: a search goes on from any point as it went on, and stays quick."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import search_scale as scale

from thriftlm.search.history.journal import Reported
from thriftlm.search.history.state import SearchState
from thriftlm.search.learning.factored import Factored
from thriftlm.search.simulation.simulate import MemoryJournal, simulate

TRIALS, CONCURRENT = 60, 12


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One factored search, of more recipes than its surrogate is fitted to at once."""
    return scale.searched(tmp_path_factory.mktemp("scale"), 96, CONCURRENT, TRIALS)


def test_so_many_trials_ran_at_a_time(made):
    assert made["found"].trials == TRIALS
    state, most = SearchState(), 0
    for event in made["events"]:
        state.apply(event)
        most = max(most, len(state.running))
    assert most == CONCURRENT
    assert state.paused  # what the searcher looks through at each decision


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9])
def test_it_goes_on_from_a_prefix_of_its_journal_with_the_same_decisions(made, share):
    events = made["events"]
    at = int(share * len(events))
    while not isinstance(events[at], Reported):
        at += 1
    alike, _ = scale.goes_on(made["held"], events, at, 60)
    assert alike >= min(60, len(events) - at - 5)


def test_same_seed_and_history_give_the_same_decisions(made, tmp_path):
    held, truth = scale.world(tmp_path, 96, CONCURRENT, 25)
    journals = [MemoryJournal() for _ in range(2)]
    one, other = (simulate(held, truth, "factored", 5, journal=journal) for journal in journals)
    assert one == other
    assert journals[0].events == journals[1].events


def test_time_of_a_suggestion_does_not_grow_with_trials(made):
    """Processor time; the bound of 50 ms at 10,000 trials is measured by the benchmark."""
    assert np.median(made["seconds"][-20:]) < 0.2


def test_what_is_kept_equals_what_would_be_counted(made):
    """After every event: who runs, waits, is paused, and what was spent."""
    state = SearchState()
    for event in made["events"]:
        state.apply(event)
        trials = list(state.trials.values())
        assert state.running == [t for t in trials if t.is_running]
        held = [t for t in trials if not t.has_ended and not t.is_running]
        assert state.waiting == [t for t in held if not t.is_paused]
        assert {t.trial_id for t in state.paused} == {t.trial_id for t in held if t.is_paused}
        now = event.at + 7
        assert state.spent_usd(now) == pytest.approx(sum(t.usd(now) for t in trials), rel=1e-12)


def test_standings_equal_those_counted_from_the_records(made):
    searcher = Factored(made["held"])
    for event in made["events"]:
        searcher.observe(event)
    at = searcher.standing
    for recipe, record in searcher.records.items():
        rungs = searcher._rungs(recipe)
        assert at.tokens[recipe] == (record.tokens[-1] if record.tokens else 0)
        assert at.level[recipe] == sum(rung <= 1.05 * at.tokens[recipe] for rung in rungs)
        assert at.may_win[recipe] == (bool(record.loss) and not record.diverged)
        assert at.may_go_on[recipe] == (at.tokens[recipe] < 0.95 * rungs[-1])
    untried = np.setdiff1d(np.arange(len(searcher.menu.recipes)), list(searcher.records))
    assert not at.is_known[untried].any()
