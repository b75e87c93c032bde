"""A population on real Ray: children go on from checkpoints, and one run file repeats a child."""

from pathlib import Path

import pytest
import yaml

from thriftlm.config_file import ConfigFile
from thriftlm.search.answers.result import answer, best_run
from thriftlm.search.history.journal import read
from thriftlm.search.history.state import SearchState, TrialState
from thriftlm.search.spaces.space import Space
from thriftlm.spec import Progress, RunSpec
from thriftlm.training.checkpoint import complete, read_state
from thriftlm.training.loop import Decision, train

pytestmark = [pytest.mark.slow, pytest.mark.ray]
STEP = 1024
SPACE = {
    "name": "population",
    "data": {"tokenizer": "bpe:512", "seq_len": 64},
    "training_budget": {"usd": 0.01},
    "search_budget": {"usd": 0.05},
    "search": {
        "algorithm": "random",
        "scheduler": "pbt",
        "population": 3,
        "fidelity": {
            "min_tokens": 4 * STEP,
            "max_tokens": 12 * STEP,
            "report_every_tokens": 2 * STEP,
            "validation_tokens": 2048,
        },
    },
    "space": {
        "model": {"n_layers": 1, "d_model": 32, "n_heads": 2, "d_ff": 96},
        "optim": {"lr": {"loguniform": [1e-4, 1e-1]}, "batch_tokens": STEP, "schedule": "constant"},
        "system": {"gpu": "cpu", "micro_batch": 8},
    },
}


@pytest.fixture(scope="module")
def population(tmp_path_factory, corpus, searched) -> tuple[Path, Space, SearchState]:
    """The storage of a finished search, its space and what it knows."""
    folder = tmp_path_factory.mktemp("population")
    space = SPACE | {"data": SPACE["data"] | {"corpus": str(corpus)}}
    (folder / "space.yaml").write_text(yaml.safe_dump(space))
    found = searched(folder / "space.yaml", folder)
    assert found["reason"] == "the population was trained to its end"
    events = read(folder / "searches/population/journal.jsonl")
    return folder, Space(ConfigFile("space.yaml", space)), SearchState(events)


def children(state: SearchState) -> list[TrialState]:
    return [trial for trial in state.trials.values() if trial.branch is not None]


def trained(spec: RunSpec, cache: Path, output: Path, until: int) -> dict[int, float | None]:
    """Validation losses of a run by tokens, from its beginning to so many tokens."""

    def report(progress: Progress, written: object) -> Decision:
        return Decision.STOP if progress.tokens >= until else Decision.CONTINUE

    return {p.tokens: p.val_loss for p in train(spec, report, cache=cache, output=output).curve}


def test_children_go_on_from_the_checkpoint_of_their_parent(population):
    storage, _, state = population
    trials = storage / "searches/population/trials"
    assert [child.branch.tokens for child in children(state)] == [4 * STEP, 8 * STEP]
    for child in children(state):
        newest = complete(trials / child.trial_id)[-1]
        parent = read_state(trials / child.trial_id / newest).parent
        steps = child.branch.tokens // STEP
        assert parent.checkpoint == str(trials / child.branch.trial_id / f"step_{steps:08d}")
        assert child.curve[0].tokens == child.branch.tokens + 2 * STEP
        reasons = [trial.reason for trial in state.trials.values()]
        assert sum(f"replaced by {child.trial_id} at lr" in reason for reason in reasons) == 1


def test_the_run_file_of_a_child_repeats_it_from_the_beginning(population, tmp_path):
    storage, space, state = population
    result, scores = answer(space, state)
    winner = state.trials[result.best.trial_id]
    best = yaml.safe_load((storage / "searches/population/best.yaml").read_text())
    written = best_run("population", state, winner, scores[winner.trial_id])
    assert RunSpec.model_validate(best) == written
    child = next(trial for trial in children(state) if trial.status == "done")
    run = best_run("population", state, child, scores[child.trial_id])
    assert run.tokens > child.run.tokens
    run = run.model_copy(update={"report_every_tokens": 2 * STEP, "validation_tokens": 2048})
    optim = run.optim.model_copy(update={"lr_changes": ()})
    unchanged = run.model_copy(update={"optim": optim})
    losses = trained(run, storage / "data", tmp_path / "child", child.tokens)
    others = trained(unchanged, storage / "data", tmp_path / "unchanged", child.tokens)
    for progress in child.curve:
        assert losses[progress.tokens] == pytest.approx(progress.val_loss, abs=1e-4)
    assert others[child.tokens] != pytest.approx(child.loss, abs=1e-4)
