"""Probes: when they pay, what they teach, and that they are trials like others."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import recorded_world as world

from thriftlm.search.algorithms import Proposal, Searcher, random
from thriftlm.search.answers.result import row
from thriftlm.search.cluster.capacity import Capacity
from thriftlm.search.desk import Desk, Wait
from thriftlm.search.history.journal import (
    Allocated,
    Ended,
    Journal,
    Probed,
    Released,
    SearchStarted,
    Suggested,
)
from thriftlm.search.history.state import SearchState, TrialState
from thriftlm.search.learning.factored import Factored
from thriftlm.search.learning.probing import gangs_of, plan
from thriftlm.search.learning.system_model import Costs
from thriftlm.search.scores.measured_systems import best_systems, on_best_system
from thriftlm.search.simulation.simulate import simulate
from thriftlm.search.simulation.truth import truth_of
from thriftlm.search.spaces.recorded_table import RecordedSpace, read_runs
from thriftlm.spec import SystemSpec
from thriftlm.timings import Timing

SCALE = 100
"""Times the tokens and dollars of the small world: there a minute of start-up is no large part."""
FOUR = [
    SystemSpec(micro_batch=micro, attention=kind) for micro in (1, 2) for kind in ("math", "flash")
]


def costs(speeds, sd=0.3, p_oom=0.0):
    n = len(speeds)
    return Costs(np.log(np.array(speeds, float)), np.full(n, sd), np.full(n, p_oom))


def planned(costs, specs=tuple(FOUR), usd=1.0, most_usd=np.inf, training_usd=1000.0):
    return plan(
        costs,
        np.full(len(specs), usd),
        gangs_of(specs),
        np.ones(len(specs), bool),
        batch_tokens=1000,
        training_usd=training_usd,
        most_usd=most_usd,
    )


def test_a_probe_is_planned_where_what_it_saves_is_more_than_its_price():
    found = planned(costs([1000, 1010, 990, 1005]))
    assert sorted(found.systems) == [0, 1, 2, 3]
    assert 100 < found.value_usd < 500  # the best of four with 30% spread: 1 - exp(-0.3)
    assert found.price_usd == pytest.approx((60 + 4 * (10 + 8)) / 3600, rel=0.1)
    assert planned(costs([1000, 1010, 990, 1005]), training_usd=0.01) is None
    assert planned(costs([1000, 1010, 990, 1005]), most_usd=0.01) is None


def test_what_is_known_or_hopeless_is_not_timed():
    known = costs([1000, 1010, 990, 1005])
    known.sd[1] = 0.0
    assert 1 not in planned(known).systems
    assert planned(costs([1000, 1010, 990, 1005], sd=0.0)) is None
    hopeless = costs([1000, 10, 10, 10])
    hopeless.sd[0] = 0.0
    assert planned(hopeless) is None
    assert planned(costs([1000, 1000, 1000, 1000], p_oom=0.9)) is None


def test_a_probe_keeps_to_one_kind_of_gang():
    two = [*FOUR[:2], *(one.model_copy(update={"cpus_per_worker": 2}) for one in FOUR[:2])]
    found = planned(costs([1000, 1000, 900, 900]), two)
    assert sorted(found.systems) == [0, 1]


def test_what_an_estimate_promises_is_timed_before_it_is_believed():
    """Where a dearer system is the best that was measured."""
    measured = costs([1000, 1300, 900, 900], sd=0.05)
    measured.sd[0] = 0.0
    found = planned(measured)
    assert found.systems == [1]
    assert found.value_usd == pytest.approx(1000 * (1 - 1 / 1.3), rel=0.05)


# --- the desk -----------------------------------------------------------------------------------


class Probing(Searcher):
    """Asks for one probe before anything else."""

    def __init__(self, space):
        super().__init__(space, random)

    def probe(self, state):
        if state.trials:
            return None
        first = next(random(self.space, state))
        systems = tuple(
            first.run.system.model_copy(update={"attention": kind}) for kind in ("math", "flash")
        )
        return Proposal(first.point, first.run, systems)


class Watch:
    now = 1000.0

    def __call__(self):
        return self.now


def begun(lab, journal, watch, **changes):
    space = world.space(lab, **changes)
    if not journal.events:
        journal.append(
            SearchStarted(
                at=watch(), search_id="s", space=space.document(), versions={}, unique_tokens={}
            )
        )
    return Desk(
        space, journal, Capacity({"CPU": 4.0}), watch, lambda run: (0.5, "x"), searcher=Probing
    )


def timed(system, rate):
    return Timing(system=system, status="timed", tokens_per_s=rate, low=rate, high=rate, repeats=3)


def test_a_probe_is_a_trial_that_is_billed_and_resumed(lab, tmp_path):
    watch = Watch()
    with Journal(tmp_path / "journal.jsonl") as journal:
        desk = begun(lab, journal, watch)
        probe = desk.next_trial()
        assert probe.kind == "probe"
        assert isinstance(desk.next_trial(), Wait)  # max_concurrent is 1
        watch.now += 70
        assert desk.probed(probe.trial_id, timed(probe.systems[0], 100.0)) is False
    with Journal(tmp_path / "journal.jsonl") as journal:  # the driver was killed
        watch.now += 500
        desk = begun(lab, journal, watch)
        desk.resume()
        probe = desk.next_trial()
        assert probe.systems_left == [probe.systems[1]]
        watch.now += 36
        desk.probed(probe.trial_id, timed(probe.systems[1], 200.0))
        desk.end(probe.trial_id, "done")
        learn = desk.next_trial()
        assert learn.kind == "learn"
    replayed = SearchState(journal.events).trials[probe.trial_id]
    assert replayed.usd(watch()) == pytest.approx(0.5 * (70 + 36) / 3600)
    shown = row(replayed, None, watch())
    assert (shown.kind, shown.status, len(shown.timings)) == ("probe", "done", 2)


def test_a_probe_ends_at_its_next_system_where_the_budget_is_spent(lab, tmp_path):
    watch = Watch()
    with Journal(tmp_path / "journal.jsonl") as journal:
        desk = begun(lab, journal, watch, search_budget={"usd": 0.02})
        probe = desk.next_trial()
        watch.now += 100  # of 144 seconds that the budget buys
        assert desk.probed(probe.trial_id, timed(probe.systems[0], 100.0)) is True
        desk.end(probe.trial_id, "stopped")
        assert desk.state.trials[probe.trial_id].status == "stopped"


def test_the_best_system_of_a_model_is_the_cheapest_that_was_measured(lab, tmp_path):
    watch = Watch()
    with Journal(tmp_path / "journal.jsonl") as journal:
        desk = begun(lab, journal, watch)
        probe = desk.next_trial()
        watch.now += 70
        for system, rate in zip(probe.systems, (100.0, 200.0), strict=True):
            desk.probed(probe.trial_id, timed(system, rate))
        found = best_systems(desk.state)[probe.shape]
    assert found.system == probe.systems[1]
    assert found.usd_per_token == pytest.approx(0.5 / 3600 / 200)
    other_seed = TrialState("a", 1, {}, probe.run.model_copy(update={"seed": 7}))
    assert on_best_system(desk.state, other_seed).system == probe.systems[1]
    batch = probe.run.optim.model_copy(update={"batch_tokens": 2 * probe.run.optim.batch_tokens})
    wider = TrialState("b", 2, {}, probe.run.model_copy(update={"optim": batch}))
    assert on_best_system(desk.state, wider).system == wider.run.system


# --- a simulated world --------------------------------------------------------------------------


@pytest.fixture
def large(lab, tmp_path):
    """A hundred times the tokens and dollars, and a truth that the estimate does not expect."""
    budget = SCALE * world.BUDGET_USD
    fidelity = {"min_tokens": SCALE * 20_000, "max_tokens": SCALE * 540_000}
    space = world.space(
        lab,
        training_budget={"usd": budget},
        search_budget={"usd": 2 * budget},
        search={"algorithm": "factored", "max_concurrent": 1, "fidelity": fidelity},
    )
    path = world.write(
        tmp_path, speed={1: 1000.0, 2: 1150.0}, tokens=[SCALE * at for at in world.TOKENS]
    )
    runs = read_runs(path, space)
    return RecordedSpace(space, runs), truth_of(runs, space, path)


class WithoutProbes(Factored):
    def probe(self, state):
        return None


def searched(large, probe, seed):
    return simulate(*large, "factored", seed, searcher=Factored if probe else WithoutProbes)


def test_the_system_that_broke_a_probe_is_not_timed_again(large):
    space = large[0].searched_by("factored", 0)
    searcher = Factored(space)
    recipe, state = 0, SearchState()
    able = np.ones(len(searcher.menu.specs), bool)
    searcher.prober.timed(recipe, timed(searcher.menu.specs[-1], 500.0))
    first = searcher.prober.proposal(state, recipe, able)
    state.apply(SearchStarted(at=0, search_id="s", space={}, versions={}, unique_tokens={}))
    asked = {"trial_id": first.trial_id, "at": 1.0}
    events = [
        Suggested(number=0, point=first.point, run=first.run, systems=first.systems, **asked),
        Allocated(usd_per_hour=0.5, price="x", **asked),
        Probed(timing=timed(first.systems[0], 900.0), **asked),
    ]
    for event in events:
        state.apply(event), searcher.observe(event)
    assert searcher.prober.proposal(state, recipe, able) is None  # one at a time
    for event in (Released(usd=0.1, **asked), Ended(status="failed", **asked)):
        state.apply(event), searcher.observe(event)
    again = searcher.prober.proposal(state, recipe, able)
    assert again is None or not {0, 1} & {first.systems.index(one) for one in again.systems}
    assert first.trial_id not in searcher.failed


def test_with_probes_the_answer_has_a_cheaper_system_and_the_cap_holds(large):
    seeds = range(2)
    with_probes = [searched(large, True, seed) for seed in seeds]
    without = [searched(large, False, seed) for seed in seeds]
    for one, other in zip(with_probes, without, strict=True):
        assert one.system_regret <= other.system_regret + 1e-9
        assert one.spent_usd <= 2 * SCALE * world.BUDGET_USD
    assert max(one.system_regret for one in with_probes) < 0.01
    assert min(one.system_regret for one in without) > 0.1
