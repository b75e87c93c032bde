"""The user's own configurations: what they resolve to, that they come first, what is refused."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import recorded_world as world

from thriftlm.config_file import ConfigFile
from thriftlm.search.history.recorded import recorded_rows
from thriftlm.search.learning.menu import menu_of
from thriftlm.search.simulation.simulate import simulate
from thriftlm.search.simulation.truth import truth_of
from thriftlm.search.spaces.domains import Choice, Steps, Uniform, contains
from thriftlm.search.spaces.recorded_table import RecordedSpace, read_runs
from thriftlm.search.spaces.space import Space
from thriftlm.search.spaces.start import nearest
from thriftlm.spec import InputError

OWN = {"model": {"n_layers": 3}, "optim": {"lr": 5e-5, "weight_decay": 0.2}}
"""Values that the space does not have, and a field that it does not vary."""


def space(lab, entries, **changes):
    return lab.space(start_from=entries, **changes)


def run_of(space, start=0):
    return space.resolve(space.starts[start].point, space.search.seed)


def test_what_an_entry_gives_wins_and_the_rest_is_the_space_s(lab):
    found = space(lab, [OWN])
    run = run_of(found)
    assert (run.model.n_layers, run.optim.lr, run.optim.weight_decay) == (3, 5e-5, 0.2)
    assert (run.model.d_model, run.optim.batch_tokens, run.tokens) == (64, 8192, 8192 * 9)
    assert found.starts[0].point == {
        "model.n_layers": 3,
        "optim.lr": 5e-5,
        "optim.weight_decay": 0.2,
    }


def test_a_varied_field_that_is_not_given_takes_the_nearest_value_to_its_default(lab):
    found = space(lab, [{"model": {"d_model": 128}}], system={"micro_batch": [2, 4, 64]})
    point = found.starts[0].point
    assert point["optim.lr"] == 1e-3  # the default lies in the domain
    assert point["system.micro_batch"] == 4  # nearest to the default
    assert run_of(found).model.d_model == 128


def test_a_preset_gives_its_shape_and_the_vocabulary_follows_the_tokenizer(lab):
    found = space(lab, [{"model": {"preset": "mobilellm-125m"}}])
    model = run_of(found).model
    assert (model.n_layers, model.d_model, model.n_heads, model.n_kv_heads) == (30, 576, 9, 3)
    assert model.vocab == 512


def test_a_given_field_wins_over_the_rule_that_derives_it(lab):
    rules = {"d_ff": {"ratio": 2.0, "multiple_of": 64}, "d_model": [64, 128]}
    found = space(lab, [{"model": {"d_model": 128}}, {"model": {"d_ff": 320}}], model=rules)
    assert [run_of(found, i).model.d_ff for i in (0, 1)] == [256, 320]
    assert "model.d_ff" not in found.starts[0].point
    assert found.starts[1].point["model.d_ff"] == 320


def test_what_makes_no_other_run_is_not_kept(lab):
    found = space(lab, [{"model": {"d_model": 64}, "system": {"strategy": "ddp"}}])
    assert set(found.starts[0].point) == {"model.n_layers", "optim.lr"}  # one GPU is `single`


@pytest.mark.parametrize(
    ("domain", "wanted", "found"),
    [
        (Uniform(1e-4, 1e-2, log=True), None, 1e-3),
        (Uniform(0.0, 2.0), None, 1.0),
        (Uniform(0.0, 2.0), 5, 2.0),
        (Choice((1, 4, 16)), 9, 16),  # 9 / 4 is more than 16 / 9
        (Choice((1, 4, 16)), None, 4),
        (Choice(("math", "flash")), "flash", "flash"),
        (Choice(("math", "flash")), "other", "math"),
        (Steps(0, 10, 5), 7, 5),
        (Steps(0, 10**6), 2 * 10**6, 10**6),
        (Steps(0, 10**6), None, 0),
    ],
)
def test_nearest_value_of_a_domain(domain, wanted, found):
    assert nearest(domain, wanted) == pytest.approx(found)


def test_what_a_domain_contains():
    assert contains(Steps(0.1, 0.5, 0.1), 0.3)
    assert contains(Steps(0, 10**6, 2), 10)
    assert not contains(Steps(0, 10**6, 2), 11)
    assert not contains(Choice((1, 2)), True)
    assert not contains(Uniform(0.0, 1.0), "0.5")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({}, "start_from[0]: an entry gives at least one field"),
        ({"modell": {"n_layers": 2}}, "start_from[0].modell: unknown key 'modell'"),
        ({"model": {"layers": 2}}, "start_from[0].model.layers: unknown key 'layers'"),
        ({"model": {"n_layers": -2}}, "start_from[0].model.n_layers: must be above 0, got -2"),
        ({"model": {"n_layers": [2, 4]}}, "start_from[0].model.n_layers: start_from gives each"),
        ({"model": {"n_heads": 5}}, "start_from[0]: is no valid run: "),
        ({"data": {"corpus": "other"}}, "the space has python-stdlib, got other"),
        ({"optim": {"batch_tokens": 1000}}, "is no valid run: micro_batch x n_gpus x seq_len"),
    ],
)
def test_what_is_no_valid_run_is_one_error_before_anything_starts(lab, entry, message):
    with pytest.raises(InputError) as error:
        space(lab, [entry])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_number_of_a_bad_entry_is_named(lab):
    with pytest.raises(InputError, match=r"start_from\[1\]: is no valid run.*params above"):
        space(
            lab,
            [{"model": {"n_layers": 2}}, {"model": {"n_layers": 400}}],
            constraints={"params": {"max": 1e6}},
        )
    with pytest.raises(InputError, match=r"start_from\[1\]: is the same run as start_from\[0\]"):
        space(lab, [{"model": {"n_layers": 4}}, {"model": {"n_layers": 4, "d_model": 64}}])


@pytest.mark.parametrize("algorithm", ["random", "grid", "optuna", "factored"])
def test_every_algorithm_begins_with_them(lab, algorithm):
    entries = [OWN, {"model": {"n_layers": 4}, "optim": {"lr": 1e-2}, "system": {"micro_batch": 2}}]
    found = space(
        lab,
        entries,
        optim={"lr": [1e-3, 1e-2]},
        system={"micro_batch": [1, 2]},
        search_budget={"trials": 5},
        search={"algorithm": algorithm},
    )
    state = lab.searched(found).state
    first = [trial for trial in state.trials.values() if not trial.systems]  # else a probe
    assert [trial.run for trial in first[:2]] == [run_of(found, 0), run_of(found, 1)]
    assert all(trial.tokens > 0 for trial in first)
    assert len({trial.trial_id for trial in first}) == len(first)  # none is paid for again
    assert len(state.trials) == 5


def test_a_resumed_search_does_not_begin_again(lab):
    found = space(lab, [OWN], search_budget={"trials": 3}, search={"algorithm": "optuna"})
    events = lab.searched(found).journal.events
    first = next(i for i, event in enumerate(events) if event.kind == "ended")
    desk = lab.desk(found, events=events[: first + 1])
    desk.resume()
    lab.run(desk)
    own = run_of(found).trial_id
    assert [e.trial_id for e in desk.journal.events if e.kind == "suggested"].count(own) == 1


def test_the_menu_has_recipe_and_system_of_an_entry_outside_the_space(lab):
    entry = OWN | {"system": {"micro_batch": 8}}
    found = space(lab, [entry], system={"micro_batch": [1, 2]}, search={"algorithm": "factored"})
    menu = menu_of(found)
    recipe, system = menu.locate(found.starts[0].point)
    assert menu.runs[recipe].optim.weight_decay == 0.2
    assert menu.specs[system].micro_batch == 8
    other = menu.resolve(recipe, 0)
    assert (other.recipe_id, other.system.micro_batch) == (run_of(found).recipe_id, 1)
    assert menu.raw[0].shape[0] == len(menu.recipes)


def test_recorded_rows_say_what_the_others_have_where_an_entry_sets_more(lab):
    rows = recorded_rows(lab.searched(space(lab, [OWN], search_budget={"trials": 2})).state)
    assert {row["optim.weight_decay"] for row in rows} == {0.2, 0.1}


class TestSimulated:
    @pytest.fixture
    def held(self, lab, tmp_path):
        def make(*entries):
            given = world.space(lab, start_from=list(entries))
            path = world.write(tmp_path)
            runs = read_runs(path, given)
            return RecordedSpace(given, runs), truth_of(runs, given, path)

        return make

    @pytest.mark.parametrize("algorithm", ["random", "optuna", "factored", "grid"])
    def test_the_first_run_of_a_replay_is_the_entry_s(self, held, algorithm):
        one, truth = held({"model": {"n_layers": 8}, "optim": {"lr": 3e-2}})
        for seed in (0, 1):
            first = simulate(one, truth, algorithm, seed).trace[0][1]
            point = one.point(one.runs.ids.index(first))
            assert (point["model.n_layers"], point["optim.lr"]) == (8, 3e-2)
            assert point["system.micro_batch"] == 2  # not given: nearest to the default

    @pytest.mark.parametrize(
        "entry", [{"model": {"n_layers": 3}}, {"optim": {"lr": 3e-3, "weight_decay": 0.3}}]
    )
    def test_what_the_table_does_not_have_is_one_message(self, held, entry):
        with pytest.raises(
            InputError, match=r"start_from\[0\]: the table has no run with .*=0?.?3"
        ):
            held(entry)


def test_the_document_with_entries_reads_back(lab):
    found = space(lab, [OWN])
    again = Space(ConfigFile("again.yaml", found.document()))
    assert [s.point for s in again.starts] == [s.point for s in found.starts]
