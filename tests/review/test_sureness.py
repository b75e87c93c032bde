"""The sentences about how sure an answer is."""

import pytest

from thriftlm.review.sureness import against_rest, against_start, purchase, seeds, trained
from thriftlm.search.answers.confidence import Confidence, Confirmation, Repeats, StartComparison
from thriftlm.search.answers.next_dollars import NextDollars
from thriftlm.search.answers.result import SearchResult

CONFIRMED = Confirmation(tokens=1000, share=0.1, limit="max_tokens", missing_tokens=2333.0)
SURE = Confidence(
    unit="nats_per_token",
    p_best=0.874,
    runner_up="b",
    p_runner_up=0.1,
    difference=0.0123,
    low=-0.004,
    high=0.03,
    seed_noise=0.0013,
    noise_runs=2,
    decided=False,
    confirmation=CONFIRMED,
    repeats=Repeats(asked=3, run=2, usd_missing=12.5),
)
RESULT = SearchResult(
    search_id="s",
    status="finished",
    reason="",
    spent_usd=1.0,
    budget_usd=None,
    hours=1.0,
    best=None,
    pareto=[],
    trials=[],
)


def test_the_winner_against_the_rest():
    assert against_rest(SURE) == (
        "the best of those tried with probability 87%; runner-up b is 0.0123 worse (90% interval "
        "-0.0040 to +0.0300 nats/token, seeds differ by 0.0013): not decided"
    )
    alone = SURE.model_copy(update={"runner_up": None})
    assert against_rest(alone).endswith("no other configuration has a score")
    sure = SURE.model_copy(update={"difference": -0.002})
    assert "0.0020 better by prediction" in against_rest(sure)


def test_how_far_the_winner_was_trained():
    assert trained(CONFIRMED) == (
        "trained to 1,000 tokens, 10% of the training budget's: the longest run that the space "
        "allows (search.fidelity.max_tokens); 2,333 more make a third, from which a winner counts "
        "as confirmed"
    )
    third = CONFIRMED.model_copy(update={"limit": "third_of_training_budget"})
    assert trained(third).endswith(": confirmed, a third is what that takes")


def test_seeds_that_are_missing():
    assert seeds(SURE).endswith("the others cost $12.50, more than the search had left")
    done = SURE.model_copy(update={"repeats": Repeats(asked=3, run=3, usd_missing=0.0)})
    assert seeds(done) == "3 of 3 seeds of winner and runner-up"
    broke = SURE.model_copy(update={"repeats": Repeats(asked=3, run=2, usd_missing=0.0)})
    assert seeds(broke).endswith("the others broke")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "start_from[0] (t) is 0.1000 worse than the winner (90% interval +0.0500 to +0.1500)"),
        ({}, "it takes 1.80x the training dollars to get there"),
        ({"usd_factor": None}, "no training budget brings it there"),
        ({"difference": None, "status": "oom"}, "start_from[0] has no score (oom)"),
    ],
)
def test_the_user_s_own(changes, said):
    fields = {"entry": 0, "trial_id": "t", "status": "done", "difference": 0.1}
    fields |= {"low": 0.05, "high": 0.15, "usd_factor": 1.8} | changes
    assert said in against_start(StartComparison(**fields), RESULT)


def test_the_next_dollars():
    bought = NextDollars(what="probe", usd=3.0, gain=0.0042, why="time 2 systems")
    assert purchase(bought) == (
        "next $3.00: a probe of systems, worth 0.0042 of loss on average; time 2 systems"
    )
