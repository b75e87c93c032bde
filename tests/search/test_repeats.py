"""Winner and runner-up with other seeds: when, with what money, and what they tell the scores."""

import numpy as np
import pytest

from thriftlm.search.answers.result import answer
from thriftlm.search.history.state import SearchState
from thriftlm.search.scores.scoring import configuration_of


@pytest.fixture
def space(lab):
    def make(repeats=3, **changes):
        search = {"repeats": repeats, "max_concurrent": 2} | changes.pop("search", {})
        usual = {"search_budget": {"trials": 12}} | changes
        return lab.space(search=search, **usual)

    return make


def repeats_of(state):
    return [t for t in state.trials.values() if t.repeat_of is not None]


def suggested(desk):
    return [(e.trial_id, e.repeat_of) for e in desk.journal.events if e.kind == "suggested"]


def test_winner_and_runner_up_run_last_with_the_next_seeds_to_the_same_tokens(lab, space):
    desk = lab.searched(space())
    again = repeats_of(desk.state)
    assert [t.number for t in again] == [8, 9, 10, 11]  # 12 trials, 4 of them kept for repeats
    assert [t.run.seed for t in again] == [1, 1, 2, 2]
    assert len({t.repeat_of for t in again}) == 2
    for trial in again:
        first = desk.state.trials[trial.repeat_of]
        assert trial.run.system == first.run.system
        assert configuration_of(trial.run) == configuration_of(first.run)
        assert trial.run.recipe_id != first.run.recipe_id
        assert trial.tokens == first.tokens
    assert desk.state.ended.reason == "winner and runner-up were trained with other seeds"


def test_none_starts_before_all_else_has_ended(lab, space):
    desk = lab.searched(space())
    first = desk.state.trials
    events = desk.journal.events
    begun = next(i for i, e in enumerate(events) if e.kind == "suggested" and e.repeat_of)
    ended = {e.trial_id for e in events[:begun] if e.kind == "ended"}
    assert ended == {t.trial_id for t in first.values() if t.repeat_of is None}


def test_a_first_run_that_was_stopped_early_is_repeated_to_where_it_came(lab):
    found = lab.space(
        search={
            "repeats": 2,
            "scheduler": "asha",
            "max_concurrent": 1,
            "fidelity": {
                "min_tokens": 8192 * 2,
                "max_tokens": 8192 * 9,
                "report_every_tokens": 8192,
            },
        },
        optim={"lr": [3e-3, 1e-1]},
        model={"n_layers": 4},
        search_budget={"trials": 8},
    )
    desk = lab.searched(found)
    for trial in repeats_of(desk.state):
        first = desk.state.trials[trial.repeat_of]
        assert trial.status in ("done", "stopped")
        late = 8192 if trial.status == "stopped" else 0  # a stop is obeyed one report later
        assert first.tokens <= trial.tokens <= first.tokens + late
        if trial.status == "stopped":
            assert trial.reason == f"repeat: as many tokens as {first.trial_id}"


def test_seeds_of_a_configuration_are_one_curve_and_one_place_in_the_order(lab, space):
    desk = lab.searched(space())
    found, scores = answer(desk.space, desk.state)
    for trial in repeats_of(desk.state):
        assert scores[trial.trial_id].law == scores[trial.repeat_of].law
        rate = desk.state.trials[trial.repeat_of].tokens_per_s()
        assert trial.tokens_per_s() == rate
        ours, first = scores[trial.trial_id], scores[trial.repeat_of]
        assert ours.loss_at_budget == pytest.approx(first.loss_at_budget, rel=1e-12)
    assert found.best.trial_id not in {t.trial_id for t in repeats_of(desk.state)}
    assert len(found.trials) == len(desk.state.trials)


@pytest.mark.parametrize(
    ("algorithm", "usd"), [("random", 0.01), ("random", 0.02), ("optuna", 0.01)]
)
def test_the_money_for_repeats_is_kept_and_the_cap_holds(lab, space, usd, algorithm):
    found = space(search_budget={"usd": usd}, search={"algorithm": algorithm, "repeats": 2})
    desk = lab.searched(found)
    assert desk.state.spent_usd(desk.clock()) <= usd
    assert desk.state.spent_usd(desk.clock()) > 0.8 * usd  # no more is kept than they need
    assert len(repeats_of(desk.state)) == 2


def test_seeds_that_the_budget_does_not_bear_are_left_out_and_the_answer_says_so(lab, space):
    found = space(repeats=9, search_budget={"usd": 0.006}, search={"max_concurrent": 1})
    desk = lab.searched(found)
    told = answer(found, desk.state)[0].confidence.repeats
    assert told.asked == 9
    assert 1 <= told.run < 9
    assert told.usd_missing > 0
    assert desk.state.spent_usd(desk.clock()) <= 0.006


def test_too_few_trials_for_repeats_keep_none_back(lab, space):
    desk = lab.searched(space(search_budget={"trials": 3}))
    assert not repeats_of(desk.state)
    told = answer(desk.space, desk.state)[0].confidence.repeats
    assert (told.asked, told.run) == (3, 1)


def test_a_space_that_is_exhausted_repeats_too(lab, space):
    found = space(optim={"lr": 3e-3}, search_budget={"trials": 50}, search={"algorithm": "grid"})
    desk = lab.searched(found)
    assert len(repeats_of(desk.state)) == 4
    assert len(desk.state.trials) == 7


@pytest.mark.parametrize("status", ["oom", "diverged", "failed"])
def test_a_repeat_that_breaks_is_an_observation_and_not_tried_again(lab, space, status):
    desk = lab.searched(
        space(), lambda run: lab.Behaviour(failure=(status, 3) if run.seed == 1 else None)
    )
    again = repeats_of(desk.state)
    assert sorted(t.run.seed for t in again) == [1, 1, 2, 2]
    assert {t.status for t in again if t.run.seed == 1} == {status}
    assert answer(desk.space, desk.state)[0].best is not None


@pytest.mark.parametrize("cut", [0.3, 0.8, 0.95, 0.99])
def test_the_journal_replays_to_the_same_repeats(lab, space, cut):
    whole = lab.searched(space(search={"max_concurrent": 1}))
    events = whole.journal.events
    desk = lab.desk(space(search={"max_concurrent": 1}), events=events[: int(cut * len(events))])
    desk.resume()
    lab.run(desk)
    assert suggested(desk) == suggested(whole)


def test_an_interrupted_repeat_goes_on(lab, space):
    one = space(search={"max_concurrent": 1})
    whole = lab.searched(one)
    begun = next(t for t in repeats_of(whole.state))
    at = begun.allocations[0].since + 20
    desk = lab.desk(one)
    cluster = lab.run(desk, interrupt_at=at)
    assert desk.state.ended.status == "interrupted"
    again = lab.desk(one, clock=desk.clock, events=desk.journal.events)
    again.resume()
    lab.run(again, checkpoints=cluster.checkpoints)
    assert suggested(again) == suggested(whole)
    assert {t.status for t in repeats_of(again.state)} == {"done"}


def test_factored_pools_seeds_and_ends_with_its_own_leader(lab):
    found = lab.space(
        optim={"lr": [1e-3, 3e-3, 1e-2]},
        search={
            "algorithm": "factored",
            "repeats": 2,
            "max_concurrent": 1,
            "fidelity": {"min_tokens": 8192 * 3, "max_tokens": 8192 * 9},
        },
        search_budget={"trials": 11},
    )
    desk = lab.searched(found)
    again = repeats_of(desk.state)
    assert len(again) == 2
    result, scores = answer(found, desk.state)
    assert result.best.trial_id in {t.trial_id for t in desk.contenders}
    record = desk.algorithm.records[desk.algorithm.places[again[0].trial_id][0]]
    assert list(record.others) == [again[0].trial_id]
    tokens, loss = record.tokens[-1], record.loss[-1]
    other = record.others[again[0].trial_id][tokens]
    assert record.mean(tokens, loss) == pytest.approx((loss + other) / 2)
    assert np.isfinite([score.loss_at_budget for score in scores.values()]).all()


def test_one_seed_is_what_it_was_before(lab, space):
    one = lab.searched(space(repeats=1))
    assert not repeats_of(one.state)
    assert one.exploring == one.budget


def test_state_of_a_journal_without_the_field_reads_as_no_repeat(lab, space):
    desk = lab.searched(space(repeats=1))
    state = SearchState(desk.journal.events)
    assert all(trial.repeat_of is None for trial in state.trials.values())


def test_too_few_trials_are_warned_of_before_the_search(space):
    (few,) = space(repeats=3, search_budget={"trials": 5}).warnings()
    assert few.startswith("repeats: 3 seeds of winner and runner-up take 4 trials")


@pytest.mark.parametrize("limit", ["usd", "hours"])
def test_the_cap_holds_with_repeats_whatever_breaks(lab, space, limit):
    """Trials that never run slower than they have, and start like those before them."""
    repeated = 0
    for seed in range(6):
        rng = np.random.default_rng(seed)
        amount = float(rng.uniform(0.01, 0.05) if limit == "usd" else rng.uniform(0.2, 0.6))
        found = space(
            repeats=int(rng.integers(2, 5)),
            search_budget={limit: amount, "trials": 30},
            search={"max_concurrent": int(rng.integers(1, 4)), "seed": seed},
        )
        first = rng.uniform(5, 55)

        def behave(run, first=first):
            own = np.random.default_rng(int(run.trial_id, 16))
            failure = (str(own.choice(["oom", "diverged", "failed"])), int(own.integers(1, 9)))
            broken = failure if own.random() < 0.2 else None
            return lab.Behaviour(first, own.uniform(0.5, 1) * first, 0.3, 2.0, broken)

        desk = lab.searched(found, behave)
        used, turn = desk.state.spent_usd(desk.clock()), 1e-9
        if limit == "hours":
            used, turn = desk.state.hours(desk.clock()), 2 / 3600  # the loop turns at 2 s
        assert used <= amount + turn, seed
        assert all(trial.status is not None for trial in repeats_of(desk.state))
        repeated += bool(repeats_of(desk.state))
    assert repeated >= 3
