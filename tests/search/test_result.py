"""The answer is a replay: its keys, its winner, and the run to train next."""

import json

import pytest
import yaml

from thriftlm import prices
from thriftlm.config_file import ConfigFile
from thriftlm.search.answers.result import answer, write
from thriftlm.search.history.state import SearchState
from thriftlm.spec import RunSpec


@pytest.fixture
def searched(lab):
    return lab.searched(lab.space())


def test_the_json_has_the_keys_of_the_design(searched):
    found = json.loads(answer(searched.space, searched.state)[0].model_dump_json())
    assert found.keys() >= {
        *("search_id", "status", "spent_usd", "budget_usd", "best", "pareto", "trials")
    }
    assert found["best"].keys() >= {
        *("trial_id", "config", "loss_at_budget", "low", "high", "usd_per_btok")
    }
    for trial in found["trials"]:
        assert trial.keys() >= {
            *("trial_id", "kind", "status", "config", "tokens", "loss", "loss_at_budget"),
            *("tokens_per_s", "usd"),
        }
        assert trial["config"].keys() >= {"model", "optim", "data", "system"}  # like a RunSpec
    assert (found["search_id"], found["status"]) == ("tiny", "finished")


def test_dollars_of_the_trials_add_up_to_the_ledger(searched):
    found = answer(searched.space, searched.state)[0]
    released = sum(e.usd for e in searched.journal.events if e.kind == "released")
    assert sum(trial.usd for trial in found.trials) == pytest.approx(found.spent_usd, rel=1e-12)
    assert released == pytest.approx(found.spent_usd, rel=1e-12)


def test_the_winner_is_first_and_inside_its_interval(searched, lab):
    found, scores = answer(searched.space, searched.state)
    best = found.best
    assert best.trial_id == found.trials[0].trial_id
    assert best.low <= best.loss_at_budget <= best.high
    assert found.pareto  # the winner, picked pessimistically, need not be in it
    assert {trial.trial_id for trial in found.trials} == set(searched.state.trials)
    assert (
        best.loss_at_budget
        == found.trials[0].loss_at_budget
        == scores[best.trial_id].loss_at_budget
    )
    done = [trial for trial in found.trials if trial.status == "done"]
    assert all(t.tokens == 8192 * lab.REPORTS for t in done)


def test_best_yaml_is_a_run_over_what_the_training_budget_buys(searched, tmp_path):
    found, _ = write(tmp_path, searched.space, searched.state)
    text = (tmp_path / "best.yaml").read_text()
    assert text.startswith("# Winner of search tiny. Train it: thriftlm train")
    run = ConfigFile.read(tmp_path / "best.yaml").parse(RunSpec)
    winner = searched.state.trials[found.best.trial_id].run
    assert (run.model, run.optim, run.data, run.system) == (
        *(winner.model, winner.optim, winner.data, winner.system),
    )
    assert run.trial_id == winner.trial_id
    usd_per_token = prices.usd_per_hour(run.system) / 3600 / 1000  # 1000 tokens per second
    assert run.tokens == round(0.05 / usd_per_token) == round(found.best.tokens_at_budget)
    assert run.report_every_tokens == run.tokens // 20
    assert RunSpec.model_validate(yaml.safe_load(text)) == run
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(
        found.model_dump_json()
    )


def test_a_winner_over_a_budget_of_less_than_a_step_trains_one(lab, tmp_path):
    space = lab.space(training_budget={"usd": 1e-9}, search_budget={"trials": 2})
    write(tmp_path, space, lab.searched(space).state)
    assert yaml.safe_load((tmp_path / "best.yaml").read_text())["tokens"] == 8192


@pytest.mark.parametrize("status", ["oom", "diverged", "failed"])
def test_without_a_score_there_is_no_winner_and_no_old_one_stays(lab, tmp_path, status):
    desk = lab.searched(lab.space(), lambda run: lab.Behaviour(failure=(status, 3)))
    (tmp_path / "best.yaml").write_text("an earlier winner that has failed since")
    found, scores = write(tmp_path, desk.space, desk.state)
    assert (found.best, found.pareto, scores) == (None, [], {})
    assert [trial.status for trial in found.trials] == [status] * 6
    assert all(trial.loss_at_budget is None and trial.usd > 0 for trial in found.trials)
    assert not (tmp_path / "best.yaml").exists()


@pytest.mark.parametrize("status", ["oom", "diverged", "failed"])
def test_a_trial_that_broke_does_not_win(lab, status):
    """The best learning rate breaks at its last report; it would have won."""
    space = lab.space(
        model={"n_layers": 4}, optim={"lr": [lab.BEST_LR, 2e-2, 3e-2]}, search={"algorithm": "grid"}
    )
    whole = answer(space, lab.searched(space).state)[0]
    assert whole.best.config["optim"]["lr"] == lab.BEST_LR

    def behave(run):
        return lab.Behaviour(failure=(status, 9) if run.optim.lr == lab.BEST_LR else None)

    found = answer(space, lab.searched(space, behave).state)[0]
    assert found.best.config["optim"]["lr"] == 2e-2
    broken = next(trial for trial in found.trials if trial.status == status)
    assert broken.trial_id not in found.pareto
    assert broken.loss is not None  # measured before, and kept
    assert found.trials[-1] == broken


def test_the_answer_of_a_replay_is_that_of_the_live_search(lab, tmp_path):
    space = lab.space()
    desk = lab.desk(space)
    live = {}
    end = desk.end

    def watched(*arguments, **options):
        end(*arguments, **options)
        live[len(desk.journal.events)] = answer(space, desk.state)[0]

    desk.end = watched
    lab.run(desk, interrupt_at=desk.clock() + 130)
    live[len(desk.journal.events)] = answer(space, desk.state)[0]
    statuses = []
    for length, found in live.items():
        assert answer(space, SearchState(desk.journal.events[:length]))[0] == found
        statuses.append(found.status)
    assert statuses == ["running"] * (len(live) - 1) + ["interrupted"]
    assert {trial.status for trial in found.trials} == {"done", "waiting"}


def test_an_empty_search_has_an_answer_too(lab):
    desk = lab.desk(lab.space())
    found = answer(desk.space, desk.state)[0]
    assert (found.status, found.best, found.trials, found.spent_usd) == ("running", None, [], 0)
    desk.next_trial()
    (row,) = answer(desk.space, desk.state)[0].trials
    assert (row.status, row.tokens, row.loss) == ("running", 0, None)
