"""Spot preemptions in simulated searches: what they cost, and that they say nothing of a trial."""

import json
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import recorded_world as world

from thriftlm.records import write_rows
from thriftlm.search.history.journal import Ended, Released
from thriftlm.search.history.state import SearchState
from thriftlm.search.simulation.simulate import MemoryJournal, simulate
from thriftlm.search.simulation.simulated_cluster import FRUITLESS, Conditions
from thriftlm.search.simulation.spot import SpotCapacity, SpotTrace, instances, read_trace
from thriftlm.search.simulation.truth import truth_of
from thriftlm.search.spaces.recorded_table import RecordedSpace, read_runs
from thriftlm.spec import InputError, SystemSpec

START_UP = 60.0
ALWAYS = SpotTrace(600.0, (1,))


def world_of(lab, folder, market, checkpoint_every=None, **changes):
    """The recorded world on one market, or on both where `market` is a list."""
    search = {"algorithm": "random", "scheduler": "none", "max_concurrent": 1}
    fidelity = world.SEARCH | {"checkpoint_every_tokens": checkpoint_every}
    space = lab.space(
        optim={"lr": {"loguniform": [1e-4, 1e-1]}, "schedule": "constant"},
        system={
            "gpu": "A100-80GB",
            "micro_batch": [1, 2],
            "attention": ["math", "flash"],
            "market": market,
        },
        search=search | {"fidelity": fidelity},
        **({"training_budget": {"usd": world.BUDGET_USD}, "search_budget": {"usd": 1}} | changes),
    )
    rows = world.spot_rows()
    wanted = [market] if isinstance(market, str) else market
    path = folder / f"{'-'.join(wanted)}.parquet"
    usd = world.BUDGET_USD * (0.4 if "spot" in wanted else 1.0)
    space.training_budget = space.training_budget.model_copy(update={"usd": usd})
    write_rows([row for row in rows if row["system.market"] in wanted], path)
    runs = read_runs(path, space)
    return RecordedSpace(space, runs), truth_of(runs, space, path)


@pytest.fixture
def search(lab, tmp_path):
    """A search of the recorded world, and its journal."""

    def run(market, spot=None, algorithm="random", seed=0, checkpoint_every=None, **changes):
        held, truth = world_of(lab, tmp_path, market, checkpoint_every, **changes)
        journal = MemoryJournal()
        found = simulate(held, truth, algorithm, seed, Conditions(START_UP, spot), journal=journal)
        return found, journal.events

    return run


def test_without_preemptions_spot_costs_its_share_and_takes_as_long(search):
    few = {"search_budget": {"trials": 3}}
    dear, _ = search("on_demand", **few)
    cheap, _ = search("spot", ALWAYS, **few)
    assert cheap.spent_usd == pytest.approx(0.4 * dear.spent_usd)
    assert cheap.hours == pytest.approx(dear.hours)
    assert (cheap.preemptions, cheap.preempted_usd) == ([], 0)
    assert [row[1:3] for row in cheap.trace] == [
        (row[1].replace("on_demand", "spot"), row[2]) for row in dear.trace
    ]


def test_a_preempted_trial_goes_on_from_its_checkpoint_and_pays_for_starting_again(search):
    """By hand: one trial at 1,500 tokens/s; instances are gone from 300 s to 400 s."""
    one = {"search_budget": {"trials": 1}}
    trace = SpotTrace(100.0, (1, 1, 1, 0, *[1] * 96))
    whole, _ = search("spot", ALWAYS, **one)
    cut, events = search("spot", trace, checkpoint_every=100_000, **one)
    speed = whole.trace[-1][2] / (whole.hours * 3600 - START_UP)
    trained = (300 - START_UP) * speed
    kept = trained // 100_000 * 100_000
    ((_, hours, _, had, has, lost),) = cut.preemptions
    assert (hours * 3600, had, has) == pytest.approx((300, trained, kept))
    more = (trained - kept) / speed + START_UP
    assert cut.hours * 3600 == pytest.approx(whole.hours * 3600 + 100 + more)
    rate = 0.4 * world.USD_PER_HOUR / 3600
    assert lost == pytest.approx(more * rate)
    assert cut.preempted_usd == lost
    assert cut.spent_usd == pytest.approx(whole.spent_usd + lost)
    released = [event for event in events if isinstance(event, Released)]
    assert [event.preempted for event in released] == [True, False]
    state = SearchState(events)
    (trial,) = state.trials.values()
    assert trial.status == "done"
    assert [p.tokens for p in trial.curve] == world.TOKENS[:-1]
    assert (cut.best_run_id, cut.best_score) == (whole.best_run_id, whole.best_score)


def test_without_checkpoints_all_of_it_is_lost(search):
    cut, _ = search("spot", SpotTrace(300.0, (1, 0, *[1] * 96)), search_budget={"trials": 1})
    ((_, _, _, trained, kept, lost),) = cut.preemptions
    assert (trained > 0, kept) == (True, 0)
    assert lost == pytest.approx(0.4 * world.USD_PER_HOUR * 300 / 3600)


@pytest.mark.parametrize("algorithm", ["random", "optuna", "factored"])
def test_preemption_is_no_failure_and_the_same_seed_gives_the_same_search(search, algorithm):
    trace = SpotTrace(240.0, (1, 1, 0, 1, 1, 1, 0, 0))
    options = {"checkpoint_every": 20_000, "search_budget": {"usd": 0.1}}
    found, events = search("spot", trace, algorithm, 1, **options)
    assert len(found.preemptions) > 1
    assert not [e for e in events if isinstance(e, Ended) and e.status == "failed"]
    assert found.best_score is not None
    assert 0 < found.preempted_usd < found.spent_usd <= 0.1
    again, other = search("spot", trace, algorithm, 1, **options)
    assert again == found
    assert other == events


def test_a_trial_that_never_gets_to_a_checkpoint_ends_as_failed(search):
    found, events = search("spot", SpotTrace(90.0, (1, 0)), search_budget={"trials": 1})
    assert len(found.preemptions) == FRUITLESS
    (ended,) = [event for event in events if isinstance(event, Ended)]
    assert ended.status == "failed"
    assert "before it wrote a checkpoint" in ended.reason
    assert found.best_run_id is None
    assert found.preempted_usd == pytest.approx(found.spent_usd)  # nothing else was bought


def test_while_spot_is_dry_others_run_on_demand(search):
    trace = SpotTrace(1e5, (0, 1))
    found, events = search(["on_demand", "spot"], trace, search_budget={"trials": 4})
    state = SearchState(events)
    assert {trial.run.system.market for trial in state.trials.values()} == {"on_demand"}
    assert found.hours * 3600 < 1e5


def test_the_search_waits_for_capacity_and_that_costs_nothing(search):
    few = {"search_budget": {"trials": 2}}
    now, _ = search("spot", ALWAYS, **few)
    later, _ = search("spot", SpotTrace(7200.0, (0, *[1] * 50)), **few)
    assert later.hours == pytest.approx(now.hours + 2)
    assert later.spent_usd == pytest.approx(now.spent_usd)


def test_a_wait_beyond_the_hours_of_the_budget_ends_the_search(search):
    with pytest.raises(InputError, match="no trial could start: search budget of 1 hours"):
        search("spot", SpotTrace(7200.0, (0, 1)), search_budget={"hours": 1})


def test_systems_that_never_fit_do_not_end_the_factored_search(lab, tmp_path):
    """Two nodes are the cheapest per token, and the market never has more than one."""
    space = lab.space(
        optim={"lr": {"loguniform": [1e-4, 1e-1]}, "schedule": "constant"},
        system={
            "gpu": "A100-80GB",
            "n_gpus": [1, 2],
            "gpus_per_node": 1,
            "strategy": "ddp",
            "market": "spot",
        },
        search={
            "algorithm": "factored",
            "scheduler": "none",
            "max_concurrent": 1,
            "fidelity": world.SEARCH,
        },
        training_budget={"usd": world.BUDGET_USD},
        search_budget={"usd": 10 * world.BUDGET_USD},
    )
    rows = [row for row in world.rows() if row["system.attention"] == "flash"]
    for row in rows:
        row["system.n_gpus"] = row.pop("system.micro_batch")
        del row["system.attention"]
    write_rows(rows, tmp_path / "runs.parquet")
    runs = read_runs(tmp_path / "runs.parquet", space)
    held, truth = RecordedSpace(space, runs), truth_of(runs, space, tmp_path / "runs.parquet")
    journal = MemoryJournal()
    found = simulate(held, truth, "factored", 0, Conditions(START_UP, ALWAYS), journal=journal)
    assert found.trials == 9
    assert {t.run.system.n_gpus for t in SearchState(journal.events).trials.values()} == {1}


def test_a_spot_trace_without_spot_systems_is_refused(search):
    with pytest.raises(InputError, match=r"--set space\.system\.market=spot"):
        search("on_demand", ALWAYS)


def test_instances_and_capacity():
    node = SystemSpec(gpu="A100-80GB", n_gpus=16, strategy="ddp", market="spot")
    assert instances(node) == 2
    assert instances(node.model_copy(update={"gpus_per_node": 4})) == 4
    now = [0.0]
    held = SpotCapacity({}, SpotTrace(60.0, (2, 3)), lambda: now[0])
    assert held.can_hold(node, ())
    assert not held.can_hold(node, [node])
    four = node.model_copy(update={"n_gpus": 32})
    assert not held.can_ever_hold(four)
    assert held.can_hold(four.model_copy(update={"market": "on_demand"}), [node])
    assert SpotCapacity({}, None, lambda: 0.0).can_hold(four, [node])


def test_changes_of_a_trace():
    trace = SpotTrace(10.0, (1, 1, 0, 2))
    assert [trace.at(t) for t in (0, 19, 20, 39.9, 40)] == [1, 1, 0, 2, 1]
    assert [trace.next_change(t) for t in (0, 20, 35)] == [20, 30, 40]
    assert ALWAYS.next_change(0.0) is None
    assert trace.begun_at(0) == trace
    assert len({trace.begun_at(seed).offset for seed in range(20)}) > 1


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "not a spot trace"),
        ('{"data": [1]}', "not a spot trace"),
        ('{"metadata": {"gap_seconds": 60}, "data": []}', "at least one tick"),
        ('{"metadata": {"gap_seconds": 60}, "data": [1, -1]}', "below"),
    ],
)
def test_what_is_no_trace_is_one_message(tmp_path, text, why):
    path = tmp_path / "trace.json"
    path.write_text(text)
    with pytest.raises(InputError, match=why):
        read_trace(path)
    with pytest.raises(InputError, match="readable file"):
        read_trace(tmp_path / "missing.json")


def test_the_command_says_how_many_preemptions_and_what_they_cost(lab, thriftlm, tmp_path):
    held, _ = world_of(lab, tmp_path, "spot", 20_000, search_budget={"usd": 0.1})
    import yaml

    space = held.document()
    space["training_budget"] = {"usd": 0.4 * world.BUDGET_USD}
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(space))
    trace = {"metadata": {"gap_seconds": 1200}, "data": [1, 1, 0, 1, 1, 1, 0, 0]}
    (tmp_path / "trace.json").write_text(json.dumps(trace))
    arguments = ["simulate", "space.yaml", "--table", "spot.parquet", "--spot-trace", "trace.json"]
    code, out, _ = thriftlm(*arguments, "--spot-speedup", "5", "--json")
    assert code == 0
    (found,) = json.loads(out)
    assert len(found["preemptions"]) > 1
    assert 0 < found["preempted_usd"] < found["spent_usd"]
    assert found["preempted_usd"] == pytest.approx(sum(row[-1] for row in found["preemptions"]))
    code, out, _ = thriftlm(*arguments, "--spot-speedup", "5")
    assert code == 0
    assert "preemptions" in out.splitlines()[0]


TRACES = Path(os.environ.get("THRIFTLM_SHARED_DATA", "not given")) / "spot_traces"


@pytest.mark.skipif(not TRACES.is_dir(), reason="THRIFTLM_SHARED_DATA is not given")
def test_published_traces_can_be_replayed(search):
    few = {"search_budget": {"usd": 0.1}}
    for path in TRACES.glob("*.json"):
        found, _ = search("spot", read_trace(path, 4), checkpoint_every=50_000, **few)
        assert found.preemptions
        assert found.best_run_id is not None
