"""What earlier searches measured is taken in once, teaches everybody, and is never paid for again.

Searches run on the simulated cluster of the tests; what they know goes through recorded runs.
"""

import json

import numpy as np
import pytest

from thriftlm.records import read_columns, write_rows
from thriftlm.search.algorithms import _history
from thriftlm.search.answers.result import answer
from thriftlm.search.history.journal import Allocated, Journal, Known, SearchStarted, Suggested
from thriftlm.search.history.recorded import recorded_rows
from thriftlm.search.history.state import SearchState
from thriftlm.search.learning.factored import Factored
from thriftlm.search.learning.known import columns_of, take_in
from thriftlm.search.scores.scoring import beside, score_trials
from thriftlm.spec import InputError

GRID = {
    "model": {"n_layers": [2, 4, 8]},
    "optim": {"lr": [1e-3, 3e-3, 1e-2]},
    "system": {"micro_batch": [1, 2]},
}
ALGORITHMS = ("random", "grid", "optuna", "factored")


def grid(lab, algorithm="random", trials=6, scheduler="none", seed=0, **changes):
    search = {"algorithm": algorithm, "scheduler": scheduler, "seed": seed}
    return lab.space(**(GRID | changes), search=search, search_budget={"trials": trials})


def rows_of(desk):
    return recorded_rows(desk.state)


def taken(space, rows, source="earlier"):
    return take_in(space, source, columns_of(rows), set())


def begun(lab, space, *found, **options):
    """A desk that begins with what was taken in."""
    clock = lab.Clock()
    start = SearchStarted(
        at=clock.now, search_id="new", space=space.document(), versions={}, unique_tokens={}
    )
    known = [one.known.model_copy(update={"at": clock.now}) for one in found]
    return lab.desk(space, clock, events=[start, *known], **options)


@pytest.fixture
def earlier(lab):
    """Rows of a search over six of the grid's points."""
    return rows_of(lab.searched(grid(lab)))


# --- what is taken in ---------------------------------------------------------------------------


def test_runs_of_the_space_count_as_tried_with_all_that_they_measured(lab, earlier):
    found = taken(grid(lab), earlier)
    assert (len(found.known.runs), found.points, found.left_out) == (6, 6, {})
    assert found.assumed == ""
    for one in found.known.runs:
        rows = [row for row in earlier if row["run_id"] == one.run_id]
        assert one.trial_id == one.run_id  # same space and seed
        assert [p.tokens for p in one.reports] == [row["tokens"] for row in rows]
        assert [p.val_loss for p in one.reports] == [row["loss"] for row in rows]
        assert one.usd_per_hour > 0
    assert "6 runs taken in, which cover 6 points" in found.sentence()


def test_another_seed_is_another_run_of_the_same_point(lab, earlier):
    found = taken(grid(lab, seed=7), earlier)
    assert found.points == 6
    assert {one.trial_id for one in found.known.runs}.isdisjoint(row["run_id"] for row in earlier)


def test_a_recipe_outside_the_space_informs_the_law_alone(lab, earlier):
    found = taken(grid(lab, model={"n_layers": [2, 4]}), earlier)
    outside = [one for one in found.known.runs if not one.point]
    assert outside
    assert {one.run.model.n_layers for one in outside} == {8}
    assert all(one.trial_id is None and one.usd_per_hour is None for one in outside)
    assert f"{len(outside)} inform the law" in found.sentence()


def test_a_fixed_field_that_differs_makes_another_recipe(lab, earlier):
    """All varied fields agree; what the space fixes does not."""
    found = taken(grid(lab, model={"n_layers": [2, 4, 8], "d_model": 128}), earlier)
    assert found.points == 0
    assert {tuple(one.point) for one in found.known.runs} == {()}


def test_a_system_outside_the_space_leaves_the_recipe(lab, earlier):
    found = taken(grid(lab, system={"micro_batch": [1]}), earlier)
    halves = [one for one in found.known.runs if one.trial_id is None]
    assert halves
    assert {tuple(one.point) for one in halves} == {("model.n_layers", "optim.lr")}


@pytest.mark.parametrize(
    ("algorithm", "scheduler", "points"),
    [("random", "none", 0), ("random", "asha", 6), ("factored", "none", 6)],
)
def test_enough_tokens_are_those_of_the_first_verdict(lab, earlier, algorithm, scheduler, points):
    fidelity = {"min_tokens": 3 * 8192, "max_tokens": 9 * 8192}
    search = {"algorithm": algorithm, "scheduler": scheduler, "fidelity": fidelity}
    space = lab.space(**GRID, search=search, search_budget={"trials": 6})
    short = [row for row in earlier if row["tokens"] <= 3 * 8192]
    assert taken(space, short).points == points
    shorter = [row for row in earlier if row["tokens"] <= 2 * 8192]
    found = taken(space, shorter)
    assert (found.points, len(found.known.runs)) == (0, 6)


def test_another_corpus_or_tokenizer_is_left_out_with_the_reason(lab, earlier):
    space = grid(lab, data={"corpus": "python-stdlib", "tokenizer": "bpe:300", "seq_len": 128})
    with pytest.raises(InputError, match=r"none of its 6 runs.*tokenizer bpe:512.*bpe:300"):
        taken(space, earlier)
    other = rows_of(lab.searched(space))
    found = taken(grid(lab), [*earlier, *other])
    assert len(found.known.runs) == 6
    assert found.left_out == {"tokenizer bpe:300, where the space has bpe:512": 6}
    assert "6 left out: tokenizer bpe:300" in found.sentence()


def test_what_failed_is_run_again_and_what_broke_is_not(lab):
    def behave(run):
        ends = {2: ("oom", 1), 4: ("diverged", 3), 8: ("failed", 4)}
        return lab.Behaviour(failure=ends[run.model.n_layers])

    found = taken(grid(lab), rows_of(lab.searched(grid(lab), behave)))
    tried = {one.run.model.n_layers: one.trial_id is not None for one in found.known.runs}
    assert tried == {2: True, 4: True, 8: False}
    assert {one.status for one in found.known.runs} == {"oom", "diverged", "running"}


def test_a_table_of_others_is_matched_by_its_columns(lab, earlier, tmp_path):
    plain = [{k: v for k, v in row.items() if k not in ("run", "decayed")} for row in earlier]
    write_rows(plain, tmp_path / "runs.csv")
    space = grid(lab)
    found = take_in(space, "runs.csv", read_columns(tmp_path / "runs.csv"), set())
    assert found.points == 6
    assert "does not say its corpus" in found.assumed
    ours = {one.trial_id: one for one in taken(space, earlier).known.runs}
    for one in found.known.runs:
        assert one.run == ours[one.trial_id].run
        rates = [p.tokens_per_s for p in one.reports]
        assert rates == [p.tokens_per_s for p in ours[one.trial_id].reports]
    larger = [row | {"params": row["params"] + 1} for row in plain]
    assert taken(space, larger).points == 0  # their model is another one
    elsewhere = [row | {"data.corpus": "hf://them"} for row in plain]
    with pytest.raises(InputError, match=r"corpus hf://them, where the space has python-stdlib"):
        taken(space, elsewhere)


def test_a_table_without_what_is_needed_is_refused(lab, earlier):
    with pytest.raises(InputError, match=r"need the columns run_id, tokens, loss; missing: loss"):
        taken(grid(lab), [{"run_id": 1, "tokens": 3}])
    bare = [{"run_id": r["run_id"], "tokens": r["tokens"], "loss": r["loss"]} for r in earlier]
    with pytest.raises(InputError, match=r"outside the space, and without non_embedding_params"):
        taken(grid(lab), bare)


@pytest.mark.parametrize(("word", "points"), [("interrupted", 6), (None, 6), ("failed", 0)])
def test_what_was_cut_short_counts_by_its_tokens(lab, earlier, word, points):
    ends = {row["run_id"]: row["tokens"] for row in earlier}
    rows = [
        row | {"status": word if row["tokens"] == ends[row["run_id"]] else "running"}
        for row in earlier
    ]
    found = taken(grid(lab), rows)
    assert (found.points, len(found.known.runs)) == (points, 6)


def test_two_sources_of_one_run_cover_one_point(lab, earlier):
    claimed = set()
    first = take_in(grid(lab), "a", columns_of(earlier), claimed)
    second = take_in(grid(lab), "b", columns_of(earlier), claimed)
    assert (first.points, second.points) == (6, 0)


# --- nothing is paid for again ------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_known_points_are_not_run_again_and_the_rest_of_the_space_is(lab, earlier, algorithm):
    space = grid(lab, algorithm, trials=100)
    found = taken(space, earlier)
    desk = begun(lab, space, found)
    lab.run(desk)
    known = {one.trial_id for one in found.known.runs}
    ran = [event.trial_id for event in desk.journal.events if isinstance(event, Allocated)]
    assert len(known) == 6
    assert known.isdisjoint(ran)
    if algorithm != "factored":  # it pays for each recipe once, on whatever system
        assert len(set(ran)) == 18 - 6
    recipes = {desk.state.trials[t].run.recipe_id for t in [*known, *ran]}
    assert len(recipes) == 9


def test_known_trials_are_not_counted_against_the_budget(lab, earlier):
    space = grid(lab, trials=4)
    desk = begun(lab, space, taken(space, earlier))
    lab.run(desk)
    assert desk.state.n_started == 4
    assert [e.number for e in desk.journal.events if isinstance(e, Suggested)] == [0, 1, 2, 3]
    assert desk.state.spent_usd(desk.clock()) == pytest.approx(
        sum(t.usd(0) for t in desk.state.trials.values() if not t.is_only_known)
    )


def test_a_space_that_is_known_whole_costs_nothing_and_has_an_answer(lab):
    rows = rows_of(lab.searched(grid(lab, trials=100)))
    space = grid(lab, trials=100)
    desk = begun(lab, space, taken(space, rows, "before"))
    lab.run(desk)
    assert desk.state.ended.reason == "every point of the space that fits has been tried"
    result, scores = answer(space, desk.state)
    assert result.spent_usd == 0
    assert len(scores) == 18
    assert result.best.source == "before"
    assert {row.status for row in result.trials} == {"known"}


def test_the_answer_and_its_scores_are_those_of_the_search_that_paid(lab):
    space = grid(lab, trials=100)
    paid = lab.searched(space)
    desk = begun(lab, space, taken(space, rows_of(paid)))
    ours, theirs = (
        score_trials(space, one.state, one.state.trials.values()) for one in (desk, paid)
    )
    assert ours.keys() == theirs.keys()
    for trial_id, score in ours.items():
        assert score.loss_at_budget == pytest.approx(theirs[trial_id].loss_at_budget, rel=1e-6)
        assert score.usd_per_btok == pytest.approx(theirs[trial_id].usd_per_btok)


def test_a_search_with_known_runs_names_the_better_of_old_and_new(lab, earlier):
    space = grid(lab, "optuna", trials=4)
    desk = begun(lab, space, taken(space, earlier, "before"))
    lab.run(desk)
    result, _ = answer(space, desk.state)
    best = min(result.trials, key=lambda row: (row.loss_at_budget is None, row.loss_at_budget))
    assert {row.source for row in result.trials} == {None, "before"}
    assert result.best.loss_at_budget <= best.loss_at_budget * 1.01
    assert (result.best.source is None) == (desk.state.trials[result.best.trial_id].source is None)


# --- everybody learns ---------------------------------------------------------------------------


def test_runs_outside_the_space_move_the_law(lab, earlier):
    space = grid(lab, model={"n_layers": [2, 4]}, trials=2)
    alone = lab.searched(space)
    desk = begun(lab, space, taken(space, earlier))
    assert len(beside(desk.state)) == sum(not o.point for o in desk.state.known) > 0
    lab.run(desk)
    laws = [
        next(iter(score_trials(space, d.state, d.state.trials.values()).values())).law
        for d in (alone, desk)
    ]
    assert laws[0] != laws[1]


def test_optuna_begins_with_the_known_trials(lab, earlier):
    space = grid(lab, "optuna")
    desk = begun(lab, space, taken(space, earlier))
    distributions = {name: domain.distribution() for name, domain in space.domains.items()}
    history = _history(space, desk.state, distributions)
    assert len(history) == 6
    assert all(one.value is not None for one in history)


def test_the_factored_searcher_knows_curves_and_speeds(lab, earlier):
    space = grid(lab, "factored")
    desk = begun(lab, space, taken(space, earlier))
    searcher = desk.algorithm
    assert isinstance(searcher, Factored)
    assert len(searcher.records) == len({t.run.recipe_id for t in desk.state.trials.values()})
    assert searcher.systems.measured
    assert np.exp(list(searcher.systems.measured.values())) == pytest.approx(1000.0)
    assert searcher.leader(desk.state) in desk.state.trials


def test_the_factored_searcher_has_known_points_of_a_continuous_space_on_its_menu(lab):
    lr = {"lr": {"loguniform": [1e-4, 1e-1]}}
    first = lab.searched(grid(lab, "random", optim=lr))
    space = grid(lab, "factored", trials=8, optim=lr)
    desk = begun(lab, space, taken(space, rows_of(first)))
    assert len(desk.algorithm.places) == 6
    lab.run(desk)
    assert desk.state.n_started == 8
    ran = {e.trial_id for e in desk.journal.events if isinstance(e, Allocated)}
    assert ran.isdisjoint(first.state.trials)


def test_a_known_curve_is_not_shortened_by_a_run_on_another_system(lab, earlier):
    """The best recipe is known on a system that the space does not have: it is run there first."""
    space = grid(lab, "factored", system={"micro_batch": [1]}, trials=9)
    rows = [row for row in earlier if row["system.micro_batch"] == 2]
    desk = begun(lab, space, taken(space, rows))
    searcher = desk.algorithm
    known = {recipe: record.last_tokens for recipe, record in searcher.records.items()}
    assert searcher.taught.open == set(known)
    assert searcher.leader(desk.state) is None
    lab.run(desk)
    first = next(e.trial_id for e in desk.journal.events if isinstance(e, Suggested))
    assert searcher.places[first][0] in known
    for recipe, tokens in known.items():
        assert searcher.records[recipe].last_tokens >= tokens


def test_the_winner_of_an_earlier_search_is_confirmed_before_the_money_ends(lab):
    """It was measured to its first rung; a third of the budget's tokens needs a run of our own."""
    fidelity = {"min_tokens": 8192, "max_tokens": 9 * 8192}
    search = {"algorithm": "factored", "scheduler": "none", "fidelity": fidelity}
    budget = {"training_budget": {"usd": 0.002}, "search_budget": {"usd": 0.02, "trials": 40}}
    space = lab.space(**GRID, search=search, **budget)
    rows = rows_of(lab.searched(grid(lab, trials=100)))
    short = [row for row in rows if row["tokens"] <= 2 * 8192]
    desk = begun(lab, space, taken(space, short))
    assert len([t for t in desk.state.trials.values() if t.is_only_known]) == 18
    lab.run(desk)
    started = [t for t in desk.state.trials.values() if t.allocations]
    assert len(started) <= 3
    for trial in started:
        assert trial.source == "earlier"
        assert trial.tokens > 2 * 8192
        assert trial.curve[0].tokens == 8192  # from its beginning: its checkpoint is elsewhere


def test_known_memory_verdicts_keep_a_system_from_being_tried(lab):
    rows = rows_of(
        lab.searched(
            grid(lab, trials=100),
            lambda run: lab.Behaviour(failure=("oom", 1) if run.system.micro_batch == 2 else None),
        )
    )
    oom = [row for row in rows if row["system.micro_batch"] == 2]
    space = grid(lab, "factored", trials=100)
    desk = begun(lab, space, taken(space, oom))
    lab.run(desk)
    ran = [t for t in desk.state.trials.values() if t.allocations]
    assert {t.run.system.micro_batch for t in ran} == {1}
    assert len({t.run.recipe_id for t in ran}) == 9


# --- the journal --------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_search_is_a_replay_of_its_journal_without_the_source(lab, earlier, algorithm, tmp_path):
    space = grid(lab, algorithm, trials=5)
    whole = begun(lab, space, taken(space, earlier))
    lab.run(whole)
    with Journal(tmp_path / "copy.jsonl") as copy:
        for event in whole.journal.events:
            copy.append(event)
    with Journal(tmp_path / "copy.jsonl") as copy:
        assert copy.events == whole.journal.events
        again = SearchState(copy.events)
    assert answer(space, again)[0] == answer(space, whole.state)[0]

    cut = begun(lab, space, taken(space, earlier))
    first = lab.run(cut, interrupt_at=cut.clock() + 80)
    resumed = lab.desk(space, cut.clock, events=cut.journal.events)
    resumed.resume()
    lab.run(resumed, checkpoints=first.checkpoints)
    known = {t for t, trial in resumed.state.trials.items() if trial.is_only_known}
    assert len(known) == 6
    assert resumed.state.n_started == whole.state.n_started
    assert len(resumed.state.known) == 6


def test_the_event_is_one_line_that_says_where_it_came_from(lab, earlier):
    space = grid(lab)
    desk = begun(lab, space, taken(space, earlier, "mine"))
    line = desk.journal.path.read_text().splitlines()[1]
    assert json.loads(line)["kind"] == "known"
    (event,) = [e for e in desk.journal.events if isinstance(e, Known)]
    assert event.source == "mine"
