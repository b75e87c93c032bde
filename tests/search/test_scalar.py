"""Objectives of the factored searcher: each as a line in log loss, and what its search finds."""

import numpy as np
import pytest

from thriftlm.search.answers.result import answer
from thriftlm.search.history.journal import SearchStarted
from thriftlm.search.learning.curve_model import Posterior
from thriftlm.search.learning.factored import Factored
from thriftlm.search.scores.scalar import FALL_SD, line, predictions
from thriftlm.spec import InputError

LOSS, USD, SPEED = (np.log(x) for x in ([3.0, 3.1, 3.3, 9.0], [4.0, 2.0, 1.0, 1.0], [1, 2, 4, 4.0]))


def values(objective, weights=None, share=0.5):
    found = line(objective, weights, LOSS, USD, SPEED, 3, share)
    return found.slope * LOSS + found.known


def test_loss_drives_what_is_the_same_in_loss():
    for objective in ("loss_at_budget", "usd_to_loss"):
        assert values(objective) == pytest.approx(LOSS)


def test_price_alone_drives_tokens_per_usd():
    assert values("tokens_per_usd") == pytest.approx(USD)


def test_weights_are_of_standardised_logs_of_what_was_tried():
    found = values("weighted", {"loss": 2, "usd_per_btok": 0.5, "tokens_per_s": 1})
    sds = [x[:3].std() for x in (LOSS, USD, SPEED)]
    assert found == pytest.approx(2 * LOSS / sds[0] + 0.5 * USD / sds[1] - SPEED / sds[2])


def test_the_share_goes_from_one_end_of_the_front_to_the_other():
    ends = [int(np.argmin(values("pareto", share=share)[:3])) for share in (0.0, 1.0)]
    assert ends == [2, 0]
    alone = line("pareto", None, LOSS[:1], USD[:1], SPEED[:1], 1)
    assert np.isfinite([alone.slope, *alone.known]).all()


def test_a_line_carries_mean_and_covariance():
    scores = Posterior(LOSS, np.diag([1.0, 2, 3, 4]))
    found = line("weighted", {"loss": 1}, LOSS, USD, SPEED, 4).of(scores)
    slope = 1 / LOSS.std()
    assert found.mean == pytest.approx(slope * LOSS)
    assert found.covariance == pytest.approx(slope**2 * scores.covariance)


def test_predictions_are_drawn_together():
    common = Posterior(np.log([3.0, 3.1]), np.full((2, 2), 0.01) + 1e-8 * np.eye(2))
    found = predictions(["a", "b"], np.array([1e9, 2e9]), common, common.mean, 0)
    assert (found["a"].tokens, found["a"].loss) == (1e9, pytest.approx(3.0))
    assert np.log(found["a"].draws).std() == pytest.approx(0.1, rel=0.2)
    gap = np.log(found["b"].draws / found["a"].draws)
    assert gap.std() < 1e-3  # what they share cancels
    assert found["a"].spread < 1e-3


def test_a_long_way_to_fall_is_a_wide_interval_that_all_share():
    scores = Posterior(np.log([3.0, 3.0, 3.0]), 1e-8 * np.eye(3))
    measured = np.log([3.0, 3.0 * np.exp(0.2), 3.0 * np.exp(0.4)])
    found = predictions(["at", "near", "far"], np.full(3, 1e9), scores, measured, 0)
    at, near, far = (np.log(one.draws / 3) for one in found.values())
    assert at.std() < 1e-3
    assert near.std() == pytest.approx(0.2 * FALL_SD, rel=0.2)
    assert far == pytest.approx(2 * near, abs=1e-3)


def test_the_factored_search_follows_its_objective(lab):
    """The smallest model has the cheapest tokens, the largest the lowest loss."""

    def behave(run):
        return lab.Behaviour(tokens_per_s=8000.0 / run.model.n_layers)

    best = {}
    for objective in ("loss_at_budget", "tokens_per_usd"):
        space = lab.space(
            objective=objective,
            optim={"lr": 3e-3},
            model={"n_layers": [2, 4, 8, 16]},
            search={"algorithm": "factored", "max_concurrent": 1},
            search_budget={"trials": 4},
            training_budget={"usd": 1.0},
        )
        desk = lab.searched(space, behave)
        best[objective] = answer(space, desk.state)[0].best.config["model"]["n_layers"]
        assert desk.state.trials[desk.leader()].run.model.n_layers == best[objective]
    assert best["tokens_per_usd"] == 2
    assert best["loss_at_budget"] > 2


@pytest.mark.parametrize("objective", ["pareto", {"weighted": {"loss": 1}}, "usd_to_loss"])
def test_every_objective_ends_with_an_answer(lab, objective):
    space = lab.space(objective=objective, search={"algorithm": "factored"})
    desk = lab.searched(space)
    assert answer(space, desk.state)[0].best is not None


def test_a_target_loss_in_the_space_file_is_what_dollars_are_counted_to(lab):
    desk = lab.searched(lab.space(objective={"usd_to_loss": 4.5}))
    scores = answer(desk.space, desk.state)[1]
    assert {score.target_loss for score in scores.values()} == {4.5}


def test_a_target_belongs_to_dollars_to_a_loss(lab):
    with pytest.raises(InputError, match="target_loss belongs to usd_to_loss, not to pareto"):
        lab.space(objective={"name": "pareto", "target_loss": 3})


def test_a_small_corpus_is_worth_fewer_tokens_to_the_surrogate(lab):
    def log_d(unique):
        space = lab.space(search={"algorithm": "factored"})
        searcher = Factored(space)
        searcher.observe(
            SearchStarted(search_id="s", space={}, versions={}, unique_tokens={"a": unique})
        )
        return searcher._features(np.arange(8)).log_d

    assert (log_d(10**3) < log_d(10**9)).all()
