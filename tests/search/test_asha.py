"""Asynchronous successive halving: what it stops, when, and what it does not look at."""

import pytest

from thriftlm.search.asha import bracket, bracket_sizes, rung_reached, rungs_of, survives
from thriftlm.search.history.journal import Reported, StopRequested
from thriftlm.search.scores.scoring import score_trials

RUNGS = (8192, 24576)  # of the base space: a ninth and a third of its 73728 tokens


def asha(lab, trials=9, **changes):
    search = {"scheduler": "asha", **changes.pop("search", {})}
    return lab.space(search=search, search_budget={"trials": trials}, **changes)


def decisions(desk):
    """What asha asked to end, at which rung, in order."""
    asked = [event for event in desk.journal.events if isinstance(event, StopRequested)]
    assert all(event.reason.startswith("asha: ") for event in asked)
    return [(event.trial_id, event.reason) for event in asked]


def test_the_highest_rung_between_two_reports():
    assert rung_reached(RUNGS, 0, 8191) is None
    assert rung_reached(RUNGS, 0, 8192) == 8192
    assert rung_reached(RUNGS, 8192, 16384) is None
    assert rung_reached(RUNGS, 0, 99999) == 24576
    assert rung_reached((), 0, 99999) is None


@pytest.mark.parametrize(("n", "kept"), [(1, 1), (2, 1), (3, 1), (4, 2), (6, 2), (7, 3), (9, 3)])
def test_the_top_third_survives_rounded_up(n, kept):
    values = {str(i): float(n - i) for i in range(n)}  # the last is the best
    survivors = [trial_id for trial_id in values if survives(trial_id, values)]
    assert survivors == list(values)[-kept:]


def test_hyperband_gives_each_bracket_its_share_of_trials():
    assert bracket_sizes(2, 3) == [3, 5, 9]  # of s = 0, 1, 2 with three rungs' worth of budget
    brackets = [bracket(number, 2, 3) for number in range(34)]
    assert [brackets.count(s) for s in range(3)] == [6, 10, 18]
    assert rungs_of("hyperband", 0, RUNGS, 3) == RUNGS
    assert rungs_of("hyperband", 9, RUNGS, 3) == RUNGS[1:]
    assert rungs_of("hyperband", 14, RUNGS, 3) == ()
    assert rungs_of("asha", 14, RUNGS, 3) == RUNGS
    assert rungs_of("none", 14, RUNGS, 3) == ()


def test_hyperband_compares_within_brackets_and_lets_the_last_bracket_be(lab):
    search = {"scheduler": "hyperband", "max_concurrent": 1}
    desk = lab.searched(lab.space(search=search, search_budget={"trials": 17}))
    asked = [e for e in desk.journal.events if isinstance(e, StopRequested)]
    number = {t.trial_id: t.number for t in desk.state.trials.values()}
    assert asked
    assert all(event.reason.startswith("hyperband: not in the top 1/3 of ") for event in asked)
    assert {number[event.trial_id] for event in asked} <= set(range(14))
    first_of_the_second = next(t for t in desk.state.trials.values() if t.number == 9)
    assert first_of_the_second.status == "done"  # alone at its rung, whoever passed it before
    late = [e for e in asked if number[e.trial_id] >= 9]
    assert all("24576 tokens" in event.reason for event in late)


def test_of_equal_trials_the_earlier_survives():
    assert survives("a", {"a": 1.0, "b": 1.0})
    assert not survives("b", {"a": 1.0, "b": 1.0})


def test_rungs_keep_the_top_third_by_the_driving_objective(lab):
    """Every decision is checked against the scores at the rung as they were at that moment."""
    space = asha(lab, trials=6)
    desk = lab.desk(space)
    asked = {}
    report = desk.report

    def watched(trial_id, progress, checkpoint):
        stops = report(trial_id, progress, checkpoint)
        if progress.tokens in RUNGS:
            reached = [t for t in desk.state.trials.values() if t.tokens >= progress.tokens]
            scores = score_trials(space, desk.state, reached, until_tokens=progress.tokens)
            order = sorted(scores, key=lambda i: scores[i].value)
            asked[trial_id, progress.tokens] = len(order)
            assert stops == (order.index(trial_id) >= -(-len(order) // 3))
        return stops

    desk.report = watched
    lab.run(desk)
    first = next(iter(desk.state.trials))
    assert asked[first, 8192] == 1
    assert desk.state.trials[first].tokens > 8192  # nothing to compare it with
    assert [n for (_, rung), n in asked.items() if rung == 8192] == [1, 2, 3, 4, 5, 6]
    stopped = dict(decisions(desk))
    assert 2 <= len(stopped) <= 5
    for trial_id, reason in stopped.items():
        trial = desk.state.trials[trial_id]
        assert (trial.status, trial.reason) == ("stopped", reason)
        assert trial.tokens in {rung + 8192 for rung in RUNGS}  # obeyed at the next report
        assert trial.checkpoint == f"ckpt-{trial.tokens}"


def test_no_trial_is_stopped_before_min_tokens(lab):
    search = {"fidelity": {"min_tokens": 40960, "max_tokens": 73728, "report_every_tokens": 8192}}
    desk = lab.searched(asha(lab, trials=5, search=search))
    assert decisions(desk)
    for event in desk.journal.events:
        if isinstance(event, StopRequested):
            before = desk.journal.events[: desk.journal.events.index(event)]
            tokens = [e.progress.tokens for e in before if isinstance(e, Reported)]
            assert tokens[-1] == 40960


def test_rungs_that_fall_between_reports_count_at_the_report_that_reaches_them(lab):
    search = {"fidelity": {"min_tokens": 8000, "max_tokens": 73728, "report_every_tokens": 8192}}
    desk = lab.searched(asha(lab, trials=4, search=search))
    assert [reason.partition(" of ")[2] for _, reason in decisions(desk)][:1] == [
        "2 at 8000 tokens"
    ]


def test_what_diverged_or_ran_out_of_memory_does_not_count(lab):
    """Failed ones first; the next trial is the first to count, so nothing stops it."""
    kinds = iter([("diverged", 3), ("oom", 3), ("failed", 3)])

    def behave(run):
        return lab.Behaviour(failure=next(kinds, None))

    space = asha(lab, trials=4, search={"max_concurrent": 1})
    desk = lab.searched(space, behave)
    statuses = [trial.status for trial in desk.state.trials.values()]
    assert statuses[0] == "diverged"
    assert statuses[1:3] == ["oom", "failed"]
    counts = [reason.split(" of ")[1] for _, reason in decisions(desk)]
    assert "3 at 24576 tokens" not in counts
    assert not any(count.startswith("4") for count in counts)


def test_decisions_do_not_depend_on_the_clock(lab):
    """Slow start-up, another day, long reports: the same reports, the same decisions."""
    space = asha(lab, trials=5, search={"max_concurrent": 1})
    quick = lab.searched(space, lambda run: lab.Behaviour(5, 2.0))
    slow = lab.searched(
        space, lambda run: lab.Behaviour(90, lambda k: 10.0 * k), clock=lab.Clock(2e9)
    )
    assert decisions(quick) == decisions(slow) != []


def test_without_a_scheduler_nobody_is_stopped(lab):
    desk = lab.searched(lab.space())
    assert decisions(desk) == []
    assert {trial.status for trial in desk.state.trials.values()} == {"done"}


def test_a_resumed_trial_is_judged_again_at_a_rung_that_it_measures_again(lab):
    """It had passed the rung; its driver was killed; it begins anew, now beside better ones."""
    space = asha(lab, trials=3, search={"max_concurrent": 1})
    desk = lab.desk(space)
    events = lab.searched(space).journal.events
    worst = next(i for i, e in enumerate(events) if isinstance(e, StopRequested))
    trial_id = events[worst].trial_id
    desk = lab.desk(space, events=events[:worst])  # killed just before it was asked
    desk.resume()
    lab.run(desk)
    assert trial_id in dict(decisions(desk))
    assert desk.state.trials[trial_id].status == "stopped"
