"""Population based training: who is replaced by which child, what is written, what it costs."""

import pytest

from thriftlm.review.dry_run import describe_space, expected_tokens
from thriftlm.review.wording import describe
from thriftlm.search.answers.result import answer, best_run
from thriftlm.search.cluster.worker import trunk
from thriftlm.search.history.journal import Branch, Ended, Reported, Suggested
from thriftlm.search.history.recorded import recorded_rows
from thriftlm.search.history.state import SearchState
from thriftlm.search.learning.known import columns_of, take_in
from thriftlm.search.pbt import FACTORS, intervals, most_trials
from thriftlm.spec import RunSpec
from thriftlm.training.schedule import first_difference, peak

STEP = 8192
FIDELITY = {"min_tokens": 2 * STEP, "max_tokens": 9 * STEP, "report_every_tokens": STEP}
INTERVALS = [2 * STEP, 4 * STEP, 6 * STEP, 8 * STEP]


@pytest.fixture
def space(lab):
    def make(population=4, model=None, **changes):
        search = {"scheduler": "pbt", "population": population, "fidelity": FIDELITY}
        search |= changes.pop("search", {})
        usual = {"search_budget": {"trials": 99}} | changes
        return lab.space(search=search, model=model or {"n_layers": 4}, **usual)

    return make


def children(state):
    return [t for t in state.trials.values() if t.branch is not None]


def founders(state):
    return [t for t in state.trials.values() if t.branch is None]


def family(desk):
    """What was decided, in order: each trial with its parent, and how those before it ended."""
    return [
        (e.trial_id, e.branch) if isinstance(e, Suggested) else (e.trial_id, e.reason)
        for e in desk.journal.events
        if isinstance(e, Suggested) or (isinstance(e, Ended) and e.reason)
    ]


def loss_at(trial, tokens):
    return next(p.val_loss for p in trial.curve if p.tokens >= tokens)


def test_intervals_are_the_multiples_of_min_tokens(space):
    assert list(intervals(space().search)) == INTERVALS
    assert most_trials(space().search) == 4 + 4
    assert most_trials(space(population=8).search) == 8 + 4 * 2


def test_the_worst_quarter_is_replaced_by_children_of_the_best_quarter(lab, space):
    desk = lab.searched(space(population=8))
    state = desk.state
    assert len(founders(state)) == 8
    assert len(children(state)) == 2 * len(INTERVALS)
    assert state.ended.reason == "the population was trained to its end"
    for wanted in INTERVALS:
        born = [t for t in children(state) if t.branch.tokens == wanted]
        there = [t for t in state.trials.values() if t.taken_over < wanted <= t.tokens]
        order = [t.trial_id for t in sorted(there, key=lambda t: loss_at(t, wanted))]
        assert len(order) == 8
        assert {t.branch.trial_id for t in born} <= set(order[:2])
        for child, place in zip(born, reversed(order[-2:]), strict=True):
            rate = child.run.optim.lr_changes[-1][1]
            ended = state.trials[place]
            assert (ended.status, ended.tokens) == ("stopped", wanted)
            assert ended.reason == f"pbt: replaced by {child.trial_id} at lr {rate:.3g}"
    done = [t for t in state.trials.values() if t.status == "done"]
    assert len(done) == 8
    assert {t.tokens for t in done} == {9 * STEP}


def test_a_child_is_its_parents_run_with_one_more_change(lab, space):
    state = lab.searched(space()).state
    assert any(len(t.run.optim.lr_changes) > 1 for t in children(state))
    for child in children(state):
        parent = state.trials[child.branch.trial_id]
        tokens, rate = child.run.optim.lr_changes[-1]
        assert tokens == child.branch.tokens
        assert rate / peak(parent.run.optim, tokens) in [pytest.approx(f) for f in FACTORS]
        before = {"optim": parent.run.optim}
        assert child.run.model_copy(update=before) == parent.run
        assert child.run.optim.lr_changes[:-1] == parent.run.optim.lr_changes
        assert child.trial_id == child.run.trial_id != parent.trial_id
        step = tokens // child.run.optim.batch_tokens
        assert first_difference(parent.run, child.run, step) is None
        assert RunSpec.model_validate_json(child.run.model_dump_json()) == child.run


def test_a_child_begins_where_its_parent_was_and_pays_for_the_rest(lab, space):
    desk = lab.desk(space(search={"max_concurrent": 1}))
    lab.run(desk)
    for child in children(desk.state):
        assert child.curve[0].tokens == child.branch.tokens + STEP
        first = next(
            e
            for e in desk.journal.events
            if isinstance(e, Reported) and e.trial_id == child.trial_id
        )
        assert first.progress.tokens == child.branch.tokens + STEP


def test_nobody_goes_on_before_all_have_come(lab, space):
    desk = lab.searched(space(search={"max_concurrent": 2}), lambda run: lab.Behaviour())
    reached: dict[str, int] = {}
    state = SearchState()
    for event in desk.journal.events:
        state.apply(event)
        if isinstance(event, Reported):
            reached[event.trial_id] = event.progress.tokens
            living = [t for t in state.trials.values() if not t.has_ended]
            slowest = min(sum(t.tokens >= i for i in INTERVALS) for t in living)
            passed = sum(event.progress.tokens > i for i in INTERVALS)
            assert passed <= slowest
    assert reached


@pytest.mark.parametrize("cut", [0.1, 0.3, 0.45, 0.6, 0.75, 0.9])
def test_the_journal_replays_to_the_same_family(lab, space, cut):
    one = space(search={"max_concurrent": 1})
    whole = lab.searched(one)
    events = whole.journal.events
    desk = lab.desk(one, events=events[: int(cut * len(events))])
    desk.resume()
    lab.run(desk)
    assert {t for t, _ in family(desk)} == {t for t, _ in family(whole)}
    assert [one for one in family(desk) if one[1]] == [one for one in family(whole) if one[1]]


def test_a_search_that_died_between_an_end_and_its_child_begins_that_child(lab, space):
    whole = lab.searched(space())
    events = whole.journal.events
    at = next(i for i, e in enumerate(events) if isinstance(e, Ended) and e.reason)
    desk = lab.desk(space(), events=events[: at + 1])
    desk.resume()
    lab.run(desk)
    first = next(e for e in events[at:] if isinstance(e, Suggested))
    again = [e for e in desk.journal.events if isinstance(e, Suggested) and e.branch]
    assert (again[0].trial_id, again[0].branch) == (first.trial_id, first.branch)
    assert sum(isinstance(e, Ended) and e.trial_id == events[at].trial_id for e in events) == 1


@pytest.mark.parametrize("seconds", [14, 60, 115, 116, 118, 140])
def test_an_interrupted_population_goes_on(lab, space, seconds):
    """At 115 s one is interrupted as it comes to an interval, and goes on before it is judged."""
    one = space(search={"max_concurrent": 2})
    desk = lab.desk(one)
    lab.run(desk, interrupt_at=desk.clock() + seconds)
    assert desk.state.ended.status == "interrupted"
    later = lab.desk(one, lab.Clock(desk.clock() + 1000), events=desk.journal.events)
    later.resume()
    lab.run(later)
    state = later.state
    assert state.ended.reason == "the population was trained to its end"
    assert sum(t.status == "done" for t in state.trials.values()) == 4
    assert len(children(state)) in (3, 4)


def test_decisions_depend_on_losses_alone(lab, space):
    """Not on speed, on how many run at a time, nor on who is late."""
    speeds = iter(range(1, 1000))
    quick = lab.searched(space(search={"max_concurrent": 1}))
    other = lab.searched(
        space(search={"max_concurrent": 2}), lambda run: lab.Behaviour(9.0, 1.0 * next(speeds))
    )
    found = [{(t.trial_id, t.reason) for t in d.state.trials.values()} for d in (quick, other)]
    assert found[0] == found[1]


@pytest.mark.parametrize("status", ["oom", "diverged", "failed"])
def test_who_breaks_later_is_replaced_by_a_child_and_who_breaks_at_once_by_a_founder(
    lab, space, status
):
    early, late = [], []

    def breaks(run):
        if not early or run.trial_id in early:
            early.append(run.trial_id)
            return lab.Behaviour(failure=(status, 1))
        if not late:
            late.append(run.trial_id)
            return lab.Behaviour()
        if late == [run.trial_id]:  # its second start, past the first interval
            late.append(run.trial_id)
            return lab.Behaviour(failure=(status, 1))
        return lab.Behaviour()

    state = lab.searched(space(search={"max_concurrent": 1}), breaks).state
    assert len(founders(state)) == 5
    assert state.trials[early[0]].status == status
    statuses = [t.status for t in state.trials.values()]
    assert statuses.count(status) == 2
    assert statuses.count("done") == 4  # the population is whole again


def test_a_small_space_gives_a_small_population(lab, space):
    state = lab.searched(space(optim={"lr": [1e-3, 2e-3, 4e-3]})).state
    assert len(founders(state)) == 3
    assert len(children(state)) == len(INTERVALS)
    assert sum(t.status == "done" for t in state.trials.values()) == 3


def test_without_trials_left_all_go_on_and_none_is_replaced(lab, space):
    state = lab.searched(space(search_budget={"trials": 5})).state
    assert len(children(state)) == 1
    assert state.ended.reason == "search budget of 5 trials"
    assert [t.status for t in state.trials.values()].count("done") == 4


@pytest.mark.parametrize("usd", [0.002, 0.005])
def test_the_cap_holds(lab, space, usd):
    desk = lab.searched(space(search_budget={"usd": usd}))
    assert 0 < desk.state.spent_usd(desk.clock()) <= usd


def test_own_configurations_are_founders(lab, space):
    one = space(start_from=[{"optim": {"lr": 0.05}}])
    state = lab.searched(one).state
    assert len(founders(state)) == 4
    assert founders(state)[0].run.optim.lr == 0.05


def test_repeats_train_a_child_whole_with_another_seed(lab, space):
    one = space(search={"repeats": 2}, search_budget={"trials": 12})
    desk = lab.searched(one)
    again = [t for t in desk.state.trials.values() if t.repeat_of is not None]
    assert len(again) == 2
    for trial in again:
        first = desk.state.trials[trial.repeat_of]
        assert trial.branch is None
        assert trial.run.optim == first.run.optim
        assert (trial.curve[0].tokens, trial.tokens) == (STEP, first.tokens)


def test_the_answer_is_one_run_that_begins_as_the_trial_did(lab, space):
    desk = lab.searched(space(training_budget={"usd": 0.05}))
    _, scores = answer(desk.space, desk.state)
    child = next(t for t in children(desk.state) if t.status == "done")
    run = best_run("s", desk.state, child, scores[child.trial_id])
    assert run.tokens > child.run.tokens
    assert run.optim.lr_changes == child.run.optim.lr_changes
    steps = int(0.8 * child.run.steps)  # up to the fall of the trial
    assert first_difference(child.run, run, steps) is None


def test_without_a_child_the_answer_keeps_its_warm_up(lab, space):
    desk = lab.searched(space())
    _, scores = answer(desk.space, desk.state)
    one = next(t for t in founders(desk.state) if t.trial_id in scores)
    assert best_run("s", desk.state, one, scores[one.trial_id]).optim == one.run.optim


@pytest.mark.parametrize(
    ("there", "found"),
    [([4, 8, 12], 8), ([4, 12], 4), ([12], None), ([], None), ([8], 8)],
)
def test_a_child_begins_at_the_newest_checkpoint_before_it_leaves(there, found, lab, tmp_path):
    run = lab.searched(lab.space(search_budget={"trials": 1})).state.trials.popitem()[1].run
    folder = tmp_path / "trials" / "parent"
    for step in there:
        (folder / f"step_{step:08d}").mkdir(parents=True)
        (folder / f"step_{step:08d}" / "manifest.json").touch()
    branch = Branch(trial_id="parent", tokens=8 * run.optim.batch_tokens)
    job = {"folder": str(tmp_path), "branch": branch.model_dump_json()}
    assert trunk(job, run) == (None if found is None else folder / f"step_{found:08d}")
    assert trunk(job | {"branch": None}, run) is None


def test_recorded_runs_tell_a_child_from_its_parent(lab, space):
    """Another search takes founders for points of its space, and children for the law alone."""
    one = space()
    state = lab.searched(one).state
    rows = [row for row in recorded_rows(state) if row["tokens"] > 0]
    assert {row["optim.lr_changes"] for row in rows if row["run_id"] == founders(state)[0].trial_id}
    taken = take_in(one, "earlier", columns_of(rows), set())
    points = {run.run_id for run in taken.known.runs if run.trial_id is not None}
    assert points == {t.trial_id for t in founders(state)}
    assert len(taken.known.runs) == len(state.trials)


def test_a_child_is_shown_with_its_changes(lab, space):
    child = children(lab.searched(space()).state)[0]
    tokens, rate = child.run.optim.lr_changes[-1]
    assert f"lr@16.4k={rate:.3g} single x1" in describe(child.point, "single", 1)
    assert tokens == 16384


def test_a_dry_run_counts_the_trials_of_a_population(space):
    found = describe_space(space(population=8))
    assert found["rungs_tokens"] == INTERVALS
    assert expected_tokens(space(population=8)) == 9 * STEP * 8 / 16
    assert expected_tokens(space(population=8, search_budget={"trials": 4})) == 9 * STEP
    few = space(population=8, search_budget={"trials": 8})
    assert few.warnings() == [
        "pbt replaces nobody: its population is 8, search_budget allows 8 trials"
    ]


def test_a_journal_of_before_has_no_branch(lab):
    events = lab.searched(lab.space()).journal.events
    line = next(e for e in events if isinstance(e, Suggested)).model_dump(exclude={"branch"})
    assert Suggested.model_validate(line).branch is None
