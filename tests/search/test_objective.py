"""Trials are ranked by what the training budget would buy, not by what they have reached."""

import math

import numpy as np
import pytest

from thriftlm.planning.law import Curve
from thriftlm.planning.scaling_laws import LossLaw, effective_tokens
from thriftlm.search.scores.comparison import score_all
from thriftlm.search.scores.objective import (
    Observation,
    curve_of,
    pareto_front,
    pooled_curves,
    rank,
    tokens_at_budget,
)
from thriftlm.spec import Progress

LAW = LossLaw(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658)  # arXiv 2404.10102
SPEED = 1e5  # tokens per second
PRICE = 1e-9  # dollars per token: 1e12 tokens for 1000 dollars


def curve(recipe, n_params, last=2e9, *, offset=0.0, points=10):
    tokens = np.linspace(last / points, last, points)
    decayed = tokens > 0.8 * last
    loss = LAW.loss(n_params, tokens) * np.exp(offset + 0.03 * ~decayed)
    return Curve(recipe, n_params, tokens, loss, decayed, np.zeros(points, bool))


def empty(recipe, n_params=1e7):
    return Curve(recipe, n_params, [], [], [], [])


def trial(trial_id, held, *, price=PRICE, speed=SPEED, status="done", basis="measured"):
    return Observation(
        trial_id, held.name, held, price, speed, basis, status, system_key=f"system-{trial_id}"
    )


def scored(*trials, objective="loss_at_budget", usd=10.0, hours=None, unique=None, **options):
    return score_all(
        trials,
        budget_usd=usd,
        budget_hours=hours,
        unique_tokens=unique,
        objective=objective,
        **options,
    )


@pytest.fixture(scope="module")
def sizes():
    return [
        trial(name, curve(name, n, last))
        for name, n, last in [("s", 1e6, 1e9), ("m", 8e6, 2e9), ("l", 6.4e7, 4e9)]
    ]


def test_tokens_at_budget_is_the_tighter_of_dollars_and_hours():
    assert tokens_at_budget(10, None, 1e-9, 1e5) == pytest.approx(1e10)
    assert tokens_at_budget(20, None, 2e-9, 1e5) == pytest.approx(1e10)
    assert tokens_at_budget(10, 1, 1e-9, 1e5) == pytest.approx(3.6e8)
    assert tokens_at_budget(None, 1, 1e-9, 1e5) == pytest.approx(3.6e8)
    with pytest.raises(ValueError, match="usd or hours"):
        tokens_at_budget(None, None, 1e-9, 1e5)
    with pytest.raises(ValueError, match="above 0"):
        tokens_at_budget(10, None, 0.0, 1e5)


def test_loss_at_budget_is_the_law_at_what_the_money_buys(sizes):
    scores = scored(*sizes)
    for seen in sizes:
        score = scores[seen.trial_id]
        truth = float(LAW.loss(seen.curve.n_params, 1e10))
        assert score.tokens_at_budget == pytest.approx(1e10)
        assert score.loss_at_budget == pytest.approx(truth, rel=0.01)
        assert score.low <= truth <= score.high
        assert score.loss_at_budget < score.pessimistic
        assert score.extrapolation == pytest.approx(1e10 / seen.curve.tokens.max())
    assert scores["s"].law_identified


def test_double_price_buys_half_the_tokens_and_a_worse_loss(sizes):
    scores = scored(*sizes, trial("dear", curve("m", 8e6), price=2 * PRICE))
    cheap, dear = scores["m"], scores["dear"]
    assert dear.tokens_at_budget == pytest.approx(cheap.tokens_at_budget / 2)
    assert dear.loss_at_budget > cheap.loss_at_budget
    assert dear.usd_per_btok == pytest.approx(2 * cheap.usd_per_btok) == pytest.approx(2.0)
    assert dear.tokens_per_usd == pytest.approx(5e8)
    assert dear.best_system == "system-m"
    assert dear.best_system_loss == cheap.loss_at_budget
    ranked = rank(scores)
    assert ranked.index("m") < ranked.index("dear")


def test_a_curve_is_paid_for_once(sizes):
    unseen = trial("elsewhere", empty("m", 8e6), price=PRICE / 2, basis="estimated")
    alone, both = scored(*sizes), scored(*sizes, unseen)
    assert both["m"].loss_at_budget == alone["m"].loss_at_budget
    assert both["elsewhere"].loss_at_budget < both["m"].loss_at_budget
    assert both["elsewhere"].basis == "estimated"


def test_trials_of_one_recipe_are_one_curve():
    first, second = curve("r", 1e7, 1e9, points=4), curve("r", 1e7, 3e9, points=5)
    failed = trial("c", curve("r", 1e7), status="diverged")
    pooled = pooled_curves([trial("b", second), trial("a", first), failed])
    assert list(pooled) == ["r"]
    assert len(pooled["r"].tokens) == 9
    assert (np.diff(pooled["r"].tokens) > 0).all()


def test_ranking_is_by_loss_at_budget_and_not_by_loss_so_far():
    """The large model has had fewer tokens and is behind; the budget is what it needs."""
    trials = [
        trial("small", curve("small", 1e6, 4e9)),
        trial("medium", curve("medium", 8e6, 2e9)),
        trial("large", curve("large", 6.4e7, 3e7)),
    ]
    so_far = {seen.trial_id: seen.curve.loss.min() for seen in trials}
    assert so_far["small"] < so_far["large"]
    assert rank(scored(*trials, usd=20.0)) == ["large", "medium", "small"]


def test_less_certain_trials_rank_behind_equals():
    trials = [
        trial("long", curve("long", 8e6, 5e9)),
        trial("short", curve("short", 8e6, 1e8)),
        *(trial(str(n), curve(str(n), n, 2e9)) for n in (1e6, 3e6)),
    ]
    scores = scored(*trials)
    assert scores["short"].loss_at_budget == pytest.approx(scores["long"].loss_at_budget, rel=0.01)
    assert scores["short"].high - scores["short"].low > scores["long"].high - scores["long"].low
    assert rank(scores).index("long") < rank(scores).index("short")


def test_a_small_corpus_caps_what_tokens_are_worth(sizes):
    free, capped = scored(*sizes)["m"], scored(*sizes, unique=5e8)["m"]
    assert free.effective_tokens == free.tokens_at_budget
    assert capped.effective_tokens == pytest.approx(effective_tokens(1e10, 5e8))
    richer = scored(*sizes, usd=1e6, unique=5e8)["m"]
    assert richer.effective_tokens < 16.4 * 5e8
    assert richer.tokens_at_budget == pytest.approx(1e15)


def test_measured_tokens_count_as_repeated_too():
    """Curves that follow the law in effective tokens are predicted as such."""
    unique = 2e8
    trials = []
    for n in (1e6, 8e6, 6.4e7):
        base = curve(str(n), n)
        worth = np.array([effective_tokens(tokens, unique) for tokens in base.tokens])
        loss = LAW.loss(n, worth) * np.exp(0.03 * ~base.decayed)
        trials.append(
            trial(str(n), Curve(str(n), n, base.tokens, loss, base.decayed, base.warming_up))
        )
    score = scored(*trials, unique=unique)["8000000.0"]
    truth = LAW.loss(8e6, effective_tokens(1e10, unique))
    assert score.loss_at_budget == pytest.approx(float(truth), rel=0.01)


def test_what_failed_or_is_unknown_gets_no_score(sizes):
    scores = scored(
        *sizes,
        trial("oom", curve("m", 8e6), status="oom"),
        trial("diverged", curve("m", 8e6), status="diverged"),
        trial("no-points", empty("new")),
        trial("no-price", curve("m", 8e6), price=None),
        trial("no-speed", curve("m", 8e6), speed=None, status="running"),
    )
    assert set(scores) == {"s", "m", "l"}
    assert scored(trial("a", empty("a"))) == {}
    assert scored() == {}


def test_diverged_points_stay_out_of_the_law(sizes):
    wild = curve("wild", 8e6)
    wild = Curve("wild", 8e6, wild.tokens, 3 * wild.loss, wild.decayed, wild.warming_up)
    assert scored(*sizes, trial("w", wild, status="diverged")) == scored(*sizes)


def test_one_trial_with_one_point_has_a_score_with_a_wide_interval():
    score = scored(trial("a", curve("a", 1e6, 1e7, points=1)))["a"]
    assert math.isfinite(score.loss_at_budget)
    assert score.high / score.low > 1.2
    assert not score.law_identified
    assert score.pareto


def test_dollars_to_the_best_loss(sizes):
    scores = scored(*sizes, objective="usd_to_loss")
    best = min(scores.values(), key=lambda score: score.loss_at_budget)
    assert best.usd_to_loss == pytest.approx(10.0)
    assert best.target_loss == best.loss_at_budget
    assert scores["s"].usd_to_loss is None  # 1M parameters never get there
    assert rank(scores)[0] == best.trial_id
    assert all(math.isfinite(score.value) for score in scores.values())


def test_dollars_to_a_given_loss_invert_the_law(sizes):
    target = float(LAW.loss(8e6, 5e9))
    for unique in (None, 2e9):
        scores = scored(*sizes, objective="usd_to_loss", target_loss=target, unique=unique)
        usd = scores["m"].usd_to_loss
        assert usd is not None
        again = scored(*sizes, usd=usd, unique=unique)["m"]
        assert again.loss_at_budget == pytest.approx(target, rel=1e-6)
    assert scored(*sizes, target_loss=1.0)["l"].usd_to_loss is None
    assert scored(*sizes, target_loss=100.0)["l"].usd_to_loss is not None


def test_tokens_per_dollar_looks_at_price_alone(sizes):
    trials = [*sizes, trial("cheap", curve("s", 1e6), price=PRICE / 3)]
    scores = scored(*trials, objective="tokens_per_usd")
    assert rank(scores)[0] == "cheap"
    assert scores["cheap"].value == pytest.approx(-math.log(scores["cheap"].tokens_per_usd))


def test_weights_choose_between_loss_price_and_speed(sizes):
    trials = [*sizes, trial("fast", curve("s", 1e6), price=10 * PRICE, speed=100 * SPEED)]

    def winner(**weights):
        return rank(scored(*trials, objective="weighted", weights=weights))[0]

    assert winner(tokens_per_s=1.0) == "fast"
    assert winner(loss=1.0) == rank(scored(*trials))[0]
    assert winner(loss=0.1, usd_per_btok=1.0) != "fast"
    with pytest.raises(ValueError, match="loss, usd_per_btok, tokens_per_s; got watts"):
        winner(watts=1.0)


def test_pareto_objective_puts_the_front_first(sizes):
    trials = [
        *sizes,
        trial("worse", curve("s2", 1e6, 1e9, offset=0.05), price=2 * PRICE),
        trial("cheap", curve("s", 1e6, 1e9), price=PRICE / 4, speed=10 * SPEED),
    ]
    scores = scored(*trials, objective="pareto")
    front = {name for name, score in scores.items() if score.pareto}
    assert "cheap" in front
    assert "worse" not in front
    ranked = rank(scores)
    assert set(ranked[: len(front)]) == front


def test_pareto_front_against_its_definition():
    rng = np.random.default_rng(0)
    for _ in range(50):
        points = [tuple(map(float, p)) for p in rng.integers(0, 8, (rng.integers(0, 20), 2))]

        def dominated(i, points=points):
            return any(
                q[0] <= points[i][0] and q[1] <= points[i][1] and q != points[i] for q in points
            )

        assert pareto_front(points) == [i for i in range(len(points)) if not dominated(i)]


def test_scores_are_json_and_deterministic(sizes):
    first, second = scored(*sizes), scored(*sizes)
    assert first == second
    assert type(first["m"]).model_validate_json(first["m"].model_dump_json()) == first["m"]


def test_curve_of_reports_takes_validation_points_only():
    def report(tokens, val_loss, **fields):
        return Progress(
            **{
                "status": "running",
                "step": 1,
                "tokens": tokens,
                "train_loss": 9.0,
                "val_loss": val_loss,
                "val_bits_per_byte": None if val_loss is None else val_loss / 3,
                "decayed": False,
                "warming_up": False,
                "tokens_per_s": 1.0,
                "mfu": None,
                "mfu_formula": "6N+attn",
                "peak_mem_gb": None,
                "grad_norm": None,
            }
            | fields
        )

    reports = [
        report(0, 8.0),
        report(100, 6.0, warming_up=True),
        report(200, None),
        report(300, math.nan),
        report(400, 3.0, decayed=True, status="done"),
    ]
    held = curve_of("r", 1e6, reports)
    assert held.tokens.tolist() == [100, 400]
    assert held.loss.tolist() == [6.0, 3.0]
    assert held.warming_up.tolist() == [True, False]
    assert held.decayed.tolist() == [False, True]
    assert curve_of("r", 1e6, reports, "bits_per_byte").loss.tolist() == [2.0, 1.0]
    assert len(curve_of("r", 1e6, []).tokens) == 0
