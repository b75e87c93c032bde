"""The hard cap, proven on simulated searches."""

import numpy as np
import pytest

from thriftlm import prices
from thriftlm.search.budget import FIRST_REPORT_SECONDS, STOP_SECONDS, Budget
from thriftlm.search.cluster.capacity import Capacity
from thriftlm.search.history.journal import Allocated, Released, Reported
from thriftlm.search.history.state import SearchState

CLUSTER = Capacity({"CPU": 64.0, "GPU:T4": 8.0, "GPU:A100": 16.0, "GPU:H100": 16.0})
GPUS = ["cpu", "T4-16GB", "A100-80GB", "H100-80GB"]
FAILURES = ["oom", "diverged", "failed"]


def scenario(lab, rng, **search_budget):
    """A space with systems of random prices, 0.04 to 100 USD per hour."""
    gpus = [str(gpu) for gpu in rng.choice(GPUS, size=rng.integers(1, 4), replace=False)]
    search = {"seed": int(rng.integers(1000))}
    if rng.random() < 0.7:
        search["max_concurrent"] = int(rng.integers(1, 9))
    strategies = {"n_gpus": [1, 2, 8], "strategy": "ddp"}
    return lab.space(
        system=strategies | {"gpu": gpus}, search=search, search_budget=search_budget or {"usd": 1}
    )


def capped(space, hours):
    """The space with a cap that buys so many hours of its middling system, and the cap."""
    usd = hours * float(np.median([prices.usd_per_hour(s) for s in space.systems()]))
    space.search_budget = space.search_budget.model_copy(update={"usd": usd})
    return usd


def constant_pace(lab, rng):
    """Trials that never run slower than they have, and start like those before them."""
    first = rng.uniform(5, 55)

    def behave(run):
        own = np.random.default_rng(int(run.trial_id, 16))
        failure = (
            (str(own.choice(FAILURES)), int(own.integers(1, 9))) if own.random() < 0.2 else None
        )
        return lab.Behaviour(
            first, own.uniform(0.5, 1) * first, 0.3, own.uniform(0.1, STOP_SECONDS), failure
        )

    return behave


def uneven_pace(lab, rng):
    """Trials of any start-up, some reports of which take far longer than those before."""
    scale = rng.uniform(3, 30)

    def behave(run):
        own = np.random.default_rng(int(run.trial_id, 16))
        failure = (
            (str(own.choice(FAILURES)), int(own.integers(1, 9))) if own.random() < 0.2 else None
        )
        waits = scale * own.lognormal(0, 0.5, 20) * np.where(own.random(20) < 0.1, 8, 1)
        return lab.Behaviour(
            own.uniform(2, 120),
            lambda k: waits[k],
            own.uniform(0, 0.5),
            own.uniform(0.1, 3),
            failure,
        )

    return behave


def intervals(desk, trial_id):
    """Seconds between the signs of life of one trial, from allocation to release."""
    kinds = (Allocated, Reported, Released)
    at = [e.at for e in desk.journal.events if isinstance(e, kinds) and e.trial_id == trial_id]
    return np.diff(at)


def excused_usd(desk, cap):
    """One report interval of each trial that was running when the cap was reached."""
    trials = desk.state.trials.values()
    spans = [(a.since, a.until, a.usd_per_hour, t.trial_id) for t in trials for a in t.allocations]
    low, high = min(s[0] for s in spans), max(s[1] for s in spans)
    for _ in range(60):
        middle = (low + high) / 2
        spent = sum(r * max(0, min(u, middle) - s) / 3600 for s, u, r, _ in spans)
        low, high = (middle, high) if spent < cap else (low, middle)
    running = [(rate, trial_id) for s, u, rate, trial_id in spans if s <= high <= u]
    return sum(rate * max(intervals(desk, trial_id)) / 3600 for rate, trial_id in running)


def test_spend_never_passes_the_cap_where_no_trial_gets_slower(lab):
    used = []
    for seed in range(100):
        rng = np.random.default_rng(seed)
        space = scenario(lab, rng)
        cap = capped(space, rng.uniform(0.05, 0.4))
        desk = lab.searched(space, constant_pace(lab, rng), capacity=CLUSTER)
        spent = desk.state.spent_usd(desk.clock())
        assert spent <= cap * (1 + 1e-9), seed
        used.append(spent / cap)
    assert np.mean(used) > 0.75


def test_spend_passes_the_cap_by_at_most_one_report_interval_of_each_running_trial(lab):
    passed = 0
    for seed in range(100):
        rng = np.random.default_rng(1000 + seed)
        space = scenario(lab, rng)
        cap = capped(space, rng.uniform(0.05, 0.4))
        desk = lab.searched(space, uneven_pace(lab, rng), capacity=CLUSTER)
        spent = desk.state.spent_usd(desk.clock())
        if spent > cap:
            passed += 1
            assert spent - cap <= excused_usd(desk, cap), seed
    assert passed < 50  # reserves cover most of what gets slower


@pytest.mark.parametrize("seed", range(6))
def test_a_budget_that_is_large_for_its_trials_is_used(lab, seed):
    rng = np.random.default_rng(seed)
    space = scenario(lab, rng)
    cap = capped(space, 3.0)  # a trial takes minutes
    desk = lab.searched(space, uneven_pace(lab, rng), capacity=CLUSTER)
    assert desk.state.spent_usd(desk.clock()) > 0.7 * cap
    assert "USD leaves no room for another trial" in desk.state.ended.reason


@pytest.mark.parametrize("seed", range(10))
def test_the_cap_holds_over_interruptions_and_kills(lab, seed):
    rng = np.random.default_rng(seed)
    space = scenario(lab, rng)
    cap, behave = capped(space, rng.uniform(0.2, 0.6)), constant_pace(lab, rng)
    desk = lab.desk(space, capacity=CLUSTER)
    checkpoints = lab.run(desk, behave, interrupt_at=desk.clock() + 150).checkpoints
    for _ in range(3):
        events = desk.journal.events
        events = events[: len(events) - int(rng.integers(len(events) // 3))]
        desk = lab.desk(space, desk.clock, events=events, capacity=CLUSTER)
        desk.resume()
        lab.run(desk, behave, checkpoints=dict(checkpoints))
    assert desk.state.spent_usd(desk.clock()) <= cap * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_hours_are_kept_where_no_trial_gets_slower(lab, seed):
    rng = np.random.default_rng(seed)
    hours = rng.uniform(0.1, 0.3)
    space = scenario(lab, rng, hours=hours)
    desk = lab.searched(space, constant_pace(lab, rng), capacity=CLUSTER)
    assert 0.5 * hours < desk.state.hours(desk.clock()) <= hours + 2 / 3600  # the loop turns at 2 s
    assert "hours" in desk.state.ended.reason


def test_hours_stop_only_the_trials_that_do_not_fit_into_them(lab):
    space = lab.space(
        search_budget={"hours": 300 / 3600, "trials": 2},
        model={"n_layers": [2, 4]},
        optim={"lr": 1e-3},
    )
    slow = lab.Behaviour(first=55, intervals=50)  # nine reports take 455 s
    quick = lab.Behaviour(first=55, intervals=20)  # 215 s
    desk = lab.searched(space, lambda run: slow if run.model.n_layers == 2 else quick)
    ended = {t.run.model.n_layers: (t.status, t.reason) for t in desk.state.trials.values()}
    assert ended[2] == ("stopped", "search budget of 0.0833333 hours")
    assert ended[4] == ("done", "")
    assert desk.state.hours(desk.clock()) <= 300 / 3600


@pytest.mark.parametrize("trials", [1, 5, 8])
def test_exactly_as_many_trials_as_allowed_start(lab, trials):
    space = lab.space(search_budget={"trials": trials})
    desk = lab.searched(space, lambda run: lab.Behaviour(failure=("failed", 2)))
    assert len(desk.state.trials) == trials
    assert all(len(t.allocations) == 1 for t in desk.state.trials.values())


def test_a_budget_too_small_for_one_trial_starts_none_and_says_so(lab):
    desk = lab.searched(lab.space(search_budget={"usd": 1e-6}))
    assert desk.state.spent_usd(desk.clock()) == 0
    assert desk.state.ended.reason == "search budget of 1e-06 USD leaves no room for another trial"


@pytest.mark.parametrize("algorithm", ["random", "optuna", "grid", "factored"])
def test_a_trial_that_the_budget_does_not_bear_gives_way_to_one_that_it_does(lab, algorithm):
    """Enough for the first report of one worker, not for that of two."""
    space = lab.space(
        search={"algorithm": algorithm, "scheduler": "none"},
        search_budget={"usd": 1},
        optim={"lr": [1e-3, 3e-3]},
        system={"n_gpus": [2, 1], "strategy": ["ddp", "single"]},
    )
    per_hour = min(prices.usd_per_hour(system) for system in space.systems())
    first = 2 * FIRST_REPORT_SECONDS + STOP_SECONDS
    usd = 1.5 * per_hour * first / 3600
    space.search_budget = space.search_budget.model_copy(update={"usd": usd})
    desk = lab.searched(space)
    begun = [trial for trial in desk.state.trials.values() if trial.allocations]
    assert begun
    assert begun[0].run.system.n_gpus == 1
    assert desk.state.spent_usd(desk.clock()) <= usd


def test_a_trial_that_is_late_is_asked_to_end_before_its_next_report(lab):
    """Its third interval takes 100 times as long: told at that report it would cost two of them."""
    space = lab.space(optim={"lr": 1e-3}, search_budget={"usd": 1})
    usd_per_hour = prices.usd_per_hour(next(space.systems()))
    space.search_budget = space.search_budget.model_copy(update={"usd": usd_per_hour * 140 / 3600})
    pace = lab.Behaviour(first=10, intervals=lambda k: 1000 if k == 2 else 10)
    desk = lab.searched(space, lambda run: pace, capacity=Capacity({"CPU": 1}))
    trial = next(iter(desk.state.trials.values()))
    assert trial.status == "stopped"
    assert len(trial.curve) == 3
    assert trial.usd(0) == pytest.approx(usd_per_hour * (10 + 10 + 1000 + 2.3) / 3600)


def test_what_a_running_trial_reserves(lab):
    desk = lab.desk(lab.space())
    trial = desk.next_trial()
    state, clock = desk.state, desk.clock
    begin = clock.now
    assert Budget().reserve_seconds(state, trial, begin) == 60 + 60 + 5  # nothing was seen
    assert (
        Budget().reserve_seconds(state, trial, begin + 90) == 0 + 90 + 5
    )  # late, and may be so again

    def report(after, status="running", tokens=1):
        clock.now = begin + after
        progress = {"status": status, "step": 1, "tokens": tokens}
        state.apply(
            Reported.model_validate(
                {"at": clock.now, "trial_id": trial.trial_id, "progress": progress}
            )
        )

    report(20)
    assert (
        Budget().reserve_seconds(state, trial, clock.now) == 20 + 20 + 5
    )  # start-up bounds the interval
    report(26)
    assert Budget().reserve_seconds(state, trial, clock.now) == 6 + 6 + 5
    assert Budget().reserve_seconds(state, trial, clock.now + 4) == 2 + 6 + 5
    trial.stop_reason = "asha"
    assert Budget().reserve_seconds(state, trial, clock.now + 4) == 2 + 5
    report(32, status="done")
    assert Budget().reserve_seconds(state, trial, clock.now + 1) == 4


def test_without_bounds_everything_goes_on(lab):
    desk = lab.desk(lab.space())
    trial = desk.next_trial()
    assert Budget().refusal(desk.state, 1e12, usd_per_hour=1e9) is None
    assert Budget().stop_reason(desk.state, trial, 1e12) is None
    assert Budget(usd=1).refusal(SearchState(), 0.0, usd_per_hour=28.7) is None  # 125 s of it
    assert Budget(usd=1).refusal(SearchState(), 0.0, usd_per_hour=28.9) == "search budget of 1 USD"
