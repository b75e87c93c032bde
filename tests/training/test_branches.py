"""A decay branch of a trunk is the run that had its schedule from the start, with less to train."""

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from thriftlm.spec import InputError, Measurement, OptimSpec, RunSpec
from thriftlm.training import checkpoint
from thriftlm.training.schedule import first_difference, learning_rate

BATCH_TOKENS = 256
TRUNK_STEPS, BRANCH_STEPS, MIDDLE = 20, 12, 8
WARMUP = {"warmup_fraction": 0.2}
RECIPE_ID = "12ed18b824cd"
"""Of the run below, as the version before branches gave it."""


def trunk_spec(bench: Any, **optim: Any) -> RunSpec:
    found: RunSpec = bench.spec(
        optim=WARMUP | optim,
        checkpoint_every_tokens=4 * BATCH_TOKENS,
        keep_every_tokens=4 * BATCH_TOKENS,
    )
    assert found.steps == TRUNK_STEPS
    return found


def branch_spec(bench: Any, steps: int = BRANCH_STEPS, **optim: Any) -> RunSpec:
    found: RunSpec = bench.spec(tokens=steps * BATCH_TOKENS, optim=WARMUP | optim)
    return found


@pytest.fixture(scope="module")
def trunk(bench: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a wsd run of 20 steps with checkpoints at 4, 8, 12, 16 and 20."""
    folder = tmp_path_factory.mktemp("trunk")
    bench.train(trunk_spec(bench), folder)
    return folder


def at(trunk: Path, step: int) -> Path:
    return trunk / f"step_{step:08d}"


def losses(measured: Measurement) -> list[Any]:
    return [(p.step, p.train_loss, p.val_loss, p.grad_norm) for p in measured.curve]


def test_branch_equals_the_run_with_its_schedule_from_the_start(bench, trunk, tmp_path):
    spec = checkpoint.branch_of(branch_spec(bench), at(trunk, MIDDLE))
    assert spec.optim.trunk_tokens == TRUNK_STEPS * BATCH_TOKENS
    branch = bench.train(spec, tmp_path / "branch", branch_from=at(trunk, MIDDLE))
    scratch = bench.train(spec, tmp_path / "scratch")
    assert branch.status == scratch.status == "done"
    assert losses(branch) == losses(scratch)
    assert [(p.decayed, p.warming_up, p.status) for p in branch.curve] == [
        (p.decayed, p.warming_up, p.status) for p in scratch.curve
    ]
    # And not what the same horizon gives with a warm-up of its own.
    own = bench.train(branch_spec(bench), tmp_path / "own")
    assert losses(own) != losses(scratch)


@pytest.mark.parametrize("trunk_schedule", ["wsd", "constant"])
def test_branch_may_be_longer_than_its_trunk(trunk_schedule, bench, tmp_path):
    """From the end of a constant trunk too, which has no decay to avoid."""
    step = 16 if trunk_schedule == "wsd" else TRUNK_STEPS
    bench.train(trunk_spec(bench, schedule=trunk_schedule), tmp_path / "trunk")
    given = at(tmp_path / "trunk", step)
    spec = checkpoint.branch_of(branch_spec(bench, 28), given)
    branch = bench.train(spec, tmp_path / "branch", branch_from=given)
    scratch = bench.train(spec, tmp_path / "scratch")
    assert (branch.status, branch.final.step) == ("done", 28)
    assert losses(branch) == losses(scratch)


def test_branch_says_where_it_comes_from_and_goes_on_by_itself(bench, trunk, tmp_path):
    spec = checkpoint.branch_of(branch_spec(bench), at(trunk, MIDDLE))
    first = bench.train(spec, tmp_path, branch_from=at(trunk, MIDDLE), stop_at=10)
    state = checkpoint.read_state(first.checkpoint)
    assert state.parent.checkpoint == str(at(trunk, MIDDLE))
    assert (state.parent.step, state.parent.tokens) == (MIDDLE, TRUNK_STEPS * BATCH_TOKENS)
    assert state.parent.recipe_id == trunk_spec(bench).recipe_id != spec.recipe_id
    assert state.spent.seconds < checkpoint.read_state(at(trunk, 20)).spent.seconds + 60
    # The same call again goes on from the branch's own checkpoint, not from the trunk.
    second = bench.train(spec, tmp_path, branch_from=at(trunk, MIDDLE), go_on=True)
    assert second.status == "done"
    assert second.earlier_seconds == state.spent.seconds
    assert checkpoint.read_state(second.checkpoint).parent == state.parent


def test_trunk_without_decay_shares_the_rates_of_every_branch(bench):
    long = trunk_spec(bench)
    spec = branch_spec(bench, trunk_tokens=long.tokens)
    rates = [[learning_rate(r.optim, step, r.steps) for step in range(9)] for r in (long, spec)]
    assert rates[0] == rates[1]  # to the last bit
    assert first_difference(long, spec, 9) is None
    assert learning_rate(spec.optim, 11, 12) == pytest.approx(0.1 * spec.optim.lr)


@pytest.mark.parametrize("schedule", ["wsd", "cosine", "constant"])
@pytest.mark.parametrize("step", [MIDDLE, 16])
def test_branch_with_another_peak_is_the_run_that_had_it_from_the_start(
    schedule, step, bench, tmp_path
):
    """Over the trunk's own tokens, so that it may begin in a fall too."""
    long = trunk_spec(bench, schedule=schedule)
    bench.train(long, tmp_path / "trunk")
    spec = trunk_spec(bench, schedule=schedule, lr_changes=[[step * BATCH_TOKENS, 0.00625]])
    branch = bench.train(spec, tmp_path / "branch", branch_from=at(tmp_path / "trunk", step))
    scratch = bench.train(spec, tmp_path / "scratch")
    assert losses(branch) == losses(scratch)
    assert losses(branch)[step:] != losses(bench.train(long, tmp_path / "again"))[step:]
    assert checkpoint.read_state(branch.checkpoint).parent.recipe_id == long.recipe_id


def test_branch_whose_peak_changes_before_its_trunk_ends_is_refused(bench, trunk, tmp_path):
    spec = trunk_spec(bench, lr_changes=[[(MIDDLE - 1) * BATCH_TOKENS, 0.004]])
    message = refused(bench, spec, at(trunk, MIDDLE), tmp_path)
    assert "by optim.lr_changes the peak learning rate of step 8 is 0.004 here" in message
    assert "and 0.005 there; change it later, or branch from an earlier checkpoint" in message


def refused(bench: Any, spec: RunSpec, given: Path, output: Path) -> str:
    with pytest.raises(InputError) as caught:
        bench.train(spec, output, branch_from=given)
    return str(caught.value)


def test_branching_in_the_decay_of_the_trunk_is_refused(bench, trunk, tmp_path):
    spec = branch_spec(bench, 40, trunk_tokens=TRUNK_STEPS * BATCH_TOKENS)
    message = refused(bench, spec, at(trunk, 20), tmp_path)
    assert "step_00000020 is no trunk of this run" in message
    assert "the learning rate there falls from step 17 on" in message
    assert "branch from an earlier checkpoint" in message


def test_branch_that_would_have_decayed_before_is_refused(bench, trunk, tmp_path):
    spec = branch_spec(bench, 16, decay_fraction=0.5, trunk_tokens=TRUNK_STEPS * BATCH_TOKENS)
    message = refused(bench, spec, at(trunk, 12), tmp_path)
    assert re.search(
        "it is at step 12, and this run's learning rate, .* falls from step 9", message
    )
    assert "raise tokens, lower optim.decay_fraction" in message


def test_branch_with_another_warm_up_is_refused_with_the_value(bench, trunk, tmp_path):
    message = refused(bench, branch_spec(bench), at(trunk, MIDDLE), tmp_path)
    assert f"set optim.trunk_tokens to {TRUNK_STEPS * BATCH_TOKENS}" in message


def test_branch_that_ends_before_the_checkpoint_is_refused(bench, trunk, tmp_path):
    spec = branch_spec(bench, 6, trunk_tokens=TRUNK_STEPS * BATCH_TOKENS)
    message = refused(bench, spec, at(trunk, MIDDLE), tmp_path)
    assert "it is at step 8, after this run's last, 6" in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 1}, "trunk's seed"),
        ({"model": {"n_layers": 3}}, "trunk's model"),
        ({"data": {"seq_len": 64}}, "trunk's data"),
        ({"optim": WARMUP | {"lr": 0.004}}, "optim.lr is 0.004 here and 0.005 there"),
        ({"optim": WARMUP | {"weight_decay": 0.2}}, "optim.weight_decay is 0.2 here"),
    ],
)
def test_another_recipe_is_no_branch(changes, words, bench, trunk, tmp_path):
    assert words in refused(bench, bench.spec(**changes), at(trunk, MIDDLE), tmp_path)


def test_recipes_without_a_trunk_or_changes_keep_their_id(bench):
    """The hash of before the fields existed; a trunk is part of a recipe, and so are changes."""
    spec = RunSpec.model_validate(
        {"model": {"n_layers": 2, "d_model": 64, "n_heads": 2}, "tokens": 1000}
    )
    assert spec.recipe_id == RECIPE_ID
    assert branch_spec(bench, trunk_tokens=5120).recipe_id != branch_spec(bench).recipe_id
    assert branch_spec(bench, lr_changes=()).recipe_id == branch_spec(bench).recipe_id
    assert branch_spec(bench, lr_changes=((256, 1e-3),)).recipe_id != branch_spec(bench).recipe_id


def test_cosine_has_no_trunk():
    with pytest.raises(ValidationError, match="needs a schedule with a stable part, got cosine"):
        OptimSpec(schedule="cosine", trunk_tokens=1000)


def test_warm_up_of_the_trunk_must_end_before_the_decay(bench):
    with pytest.raises(ValidationError, match="the warm-up must end before the decay begins"):
        branch_spec(bench, trunk_tokens=100 * BATCH_TOKENS)
