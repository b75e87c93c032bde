"""The learning rate over a run."""

import math
from itertools import pairwise
from typing import Any

import pytest
from pydantic import ValidationError

from thriftlm.spec import OptimSpec
from thriftlm.training.schedule import has_decayed, is_warming_up, learning_rate, lr_fraction

STEPS = 100
SHAPE: dict[str, Any] = {
    "lr": 2.0,
    "warmup_fraction": 0.1,
    "decay_fraction": 0.2,
    "final_lr_fraction": 0.1,
}


def optim(**changes: Any) -> OptimSpec:
    return OptimSpec(**(SHAPE | changes))


def rates(spec: OptimSpec, steps: int = STEPS) -> list[float]:
    return [learning_rate(spec, step, steps) for step in range(steps)]


@pytest.mark.parametrize("schedule", ["wsd", "cosine", "constant"])
def test_warm_up_is_linear_and_ends_at_the_peak(schedule):
    found = rates(optim(schedule=schedule))
    assert found[:10] == pytest.approx([0.2 * step for step in range(1, 11)])
    assert max(found) == pytest.approx(2.0)
    assert min(found) > 0  # no step is wasted


def test_wsd_is_flat_and_then_falls_linearly_to_the_floor():
    found = rates(optim(schedule="wsd"))
    assert found[9:80] == pytest.approx([2.0] * 71)
    falls = [earlier - later for earlier, later in pairwise(found[79:])]
    assert falls == pytest.approx([2.0 * 0.9 / 20] * 20)
    assert found[-1] == pytest.approx(0.2)


def test_cosine_falls_over_all_the_rest():
    found = rates(optim(schedule="cosine"))
    assert found[54] == pytest.approx(0.2 + 1.8 / 2)  # half-way between warm-up and end
    assert found[32] == pytest.approx(0.2 + 1.8 * 0.5 * (1 + math.cos(math.pi * 23 / 90)))
    assert found[9:] == sorted(found[9:], reverse=True)
    assert found[-1] == pytest.approx(0.2)


def test_constant_stays():
    assert rates(optim(schedule="constant"))[9:] == pytest.approx([2.0] * 91)


@pytest.mark.parametrize("schedule", ["wsd", "cosine", "constant"])
def test_without_warm_up_the_first_step_is_at_the_peak(schedule):
    spec = optim(schedule=schedule, warmup_fraction=0.0)
    assert lr_fraction(spec, 0.0) == 1.0
    assert learning_rate(spec, 0, 10_000) == pytest.approx(2.0, rel=1e-3)


def test_wsd_without_decay_is_constant():
    flat = rates(optim(schedule="constant"))
    assert rates(optim(schedule="wsd", decay_fraction=0.0)) == flat


def test_wsd_that_only_decays_is_a_straight_line():
    spec = optim(schedule="wsd", warmup_fraction=0.0, decay_fraction=1.0, final_lr_fraction=0.0)
    assert rates(spec, 4) == pytest.approx([1.5, 1.0, 0.5, 0.0])


def test_wsd_may_decay_straight_after_warm_up():
    spec = optim(schedule="wsd", warmup_fraction=0.5, decay_fraction=0.5, final_lr_fraction=0.0)
    assert rates(spec, 4) == pytest.approx([1.0, 2.0, 1.0, 0.0])


@pytest.mark.parametrize("schedule", ["wsd", "cosine", "constant"])
@pytest.mark.parametrize("steps", [1, 3, 7])
def test_short_runs_stay_between_zero_and_the_peak(schedule, steps):
    assert all(0 < rate <= 2.0 for rate in rates(optim(schedule=schedule), steps))


def test_warming_up_ends_where_the_peak_is_reached():
    spec = optim()
    assert [is_warming_up(spec, step, STEPS) for step in (0, 9, 10, 99)] == [1, 1, 0, 0]
    assert not is_warming_up(optim(warmup_fraction=0.0), 0, STEPS)


@pytest.mark.parametrize(
    ("changes", "first"),
    [
        ({"schedule": "wsd"}, 90),
        ({"schedule": "wsd", "final_lr_fraction": 0.0}, 90),
        ({"schedule": "wsd", "warmup_fraction": 0.0, "decay_fraction": 1.0}, 50),
        ({"schedule": "cosine"}, 55),
        ({"schedule": "constant"}, None),
        ({"schedule": "wsd", "decay_fraction": 0.0}, None),
        ({"schedule": "wsd", "final_lr_fraction": 1.0}, None),
        ({"schedule": "cosine", "final_lr_fraction": 1.0}, None),
    ],
)
def test_decayed_from_half_of_the_fall_on(changes, first):
    """Low rates of the warm-up are no decay; where nothing falls, nothing has decayed."""
    spec = optim(**changes)
    found = [step for step in range(STEPS + 1) if has_decayed(spec, step, STEPS)]
    assert found == ([] if first is None else list(range(first, STEPS + 1)))


@pytest.mark.parametrize("steps", [10, 20, 30, 70, 110])
def test_rounding_does_not_move_the_half(steps):
    spec = optim(schedule="wsd")
    assert has_decayed(spec, steps * 9 // 10, steps)
    assert not has_decayed(spec, steps * 9 // 10 - 1, steps)


@pytest.mark.parametrize("schedule", ["wsd", "cosine", "constant"])
def test_a_changed_peak_holds_from_its_tokens_on_and_the_shape_stays(schedule):
    plain = optim(schedule=schedule, batch_tokens=10)
    changed = plain.model_copy(update={"lr_changes": ((50, 3.0), (300, 1.0))})
    before, after = rates(plain), rates(changed)
    assert after[:5] == before[:5]  # the sixth step is the first after 50 tokens
    assert after[5:30] == pytest.approx([1.5 * rate for rate in before[5:30]])
    assert after[30:] == pytest.approx([0.5 * rate for rate in before[30:]])
    for step in range(STEPS + 1):
        assert has_decayed(changed, step, STEPS) == has_decayed(plain, step, STEPS)


def test_a_peak_that_changes_within_a_step_counts_from_the_next():
    changed = optim(schedule="constant", batch_tokens=10, lr_changes=[[501, 4.0], [9e9, 1.0]])
    assert rates(changed)[50:52] == [2.0, 4.0]
    assert rates(changed)[-1] == 4.0  # what lies beyond the run changes nothing


@pytest.mark.parametrize("changes", [[[20, 1.0], [10, 2.0]], [[10, 1.0], [10, 2.0]]])
def test_changes_of_the_peak_come_in_order(changes):
    with pytest.raises(ValidationError, match="each at more tokens than before"):
        optim(lr_changes=changes)


@pytest.mark.parametrize("change", [[0, 1.0], [10, 0.0], [10, -1.0], [10]])
def test_a_change_has_tokens_and_a_rate_above_zero(change):
    with pytest.raises(ValidationError):
        optim(lr_changes=[change])
