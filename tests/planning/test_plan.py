"""Shapes, recipes and repeated data: what a plan is put together from."""

import numpy as np
import pytest

from thriftlm.planning.frontier import Frontier, least
from thriftlm.planning.hyperparameters import deepseek, power_lines, step_law, whole_batch
from thriftlm.planning.plan import Budget, Request, make_plan, served_cost
from thriftlm.planning.rental import Rental
from thriftlm.planning.scaling_laws import BelowFloorError, effective_tokens, law_named
from thriftlm.planning.shapes import ladder, nearest
from thriftlm.spec import InputError
from thriftlm_models.counts import non_embedding_params, stored_params

HARM = law_named("harm")


# --- shapes and recipes -------------------------------------------------------------------------


def test_shapes_are_apples_and_counted_exactly():
    shapes = ladder(32_000)
    sizes = [shape.stored_params for shape in shapes[:200:20]]
    assert sizes == sorted(sizes)
    one = nearest(1e9, 32_000, "all")
    assert (one.model.d_model, one.model.n_layers, one.model.d_ff % 64) == (1920, 19, 0)
    assert one.stored_params == stored_params(one.model) == 970_458_240  # arXiv 2410.19456
    bare = nearest(1e9, 32_000, "non_embedding")
    assert bare.non_embedding_params == non_embedding_params(bare.model)
    assert bare.stored_params > one.stored_params


@pytest.mark.parametrize("n_params", np.geomspace(2e7, 1e11, 12))
def test_a_shape_is_near_every_size(n_params):
    assert nearest(n_params, 32_000, "all").stored_params == pytest.approx(n_params, rel=0.15)


@pytest.mark.parametrize("n_params", [1e6, 1e12])
def test_sizes_without_a_shape_are_refused(n_params):
    with pytest.raises(InputError, match="a model must have 13,173,696 to"):
        nearest(n_params, 32_000, "all")


def test_recipes_are_the_published_formulas():
    lr, batch = step_law(1e9, 2e10)
    assert lr == pytest.approx(1.79 * 1e9**-0.713 * 2e10**0.307)
    assert batch == pytest.approx(0.58 * 2e10**0.571)
    found = power_lines(1e9, 2e10, 5e5, weight_decay=0.1)
    timescale = 5e5 / (found.lr * 0.1 * 2e10)
    assert timescale == pytest.approx(1.084 * 20**-0.527)
    assert deepseek(1e20).lr == pytest.approx(0.3118 * 1e20**-0.125)
    assert deepseek(1e20).batch_tokens == pytest.approx(0.2920 * 1e20**0.3271)


@pytest.mark.parametrize("wanted", [1e4, 3e5, 1e6, 7e6])
@pytest.mark.parametrize("n_gpus", [1, 6, 8])
def test_batches_are_whole_sequences_on_every_gpu(wanted, n_gpus):
    batch = whole_batch(wanted, n_gpus, 2048)
    each = batch // (n_gpus * 2048)
    assert each * n_gpus * 2048 == batch
    assert each & (each - 1) == 0
    if wanted > n_gpus * 2048:
        assert 1 / 1.42 < batch / wanted < 1.42


# --- repeated data ------------------------------------------------------------------------------


def test_enough_data_change_nothing():
    plain, rich = Frontier(HARM.law), Frontier(HARM.law, 1e13)
    best = plain.optimum(1e21)
    assert rich.optimum(1e21) == best
    assert rich.curve(best) == plain.curve(best)
    assert rich.optimum_of(best.n_params) == pytest.approx(best)


def test_too_few_data_make_the_optimum_larger_and_worse():
    few = Frontier(HARM.law, 5e9)
    fresh, best = HARM.law.optimum(1e21), few.optimum(1e21)
    assert best.flops == pytest.approx(1e21)
    assert best.n_params > 1.2 * fresh.n_params
    assert few.loss(*best) > 1.01 * HARM.law.loss(*fresh)
    for share in (0.97, 1.03):
        assert few.loss(best.n_params * share, best.n_tokens / share) > few.loss(*best)
    again = few.optimum_at(few.loss(*best))
    assert again.flops == pytest.approx(1e21, rel=1e-6)
    assert few.optimum_of(best.n_params).n_tokens == pytest.approx(best.n_tokens, rel=1e-4)


def test_repetition_makes_small_models_dearer():
    few, best = Frontier(HARM.law, 30e9), HARM.law.optimum(1.62e20)  # the optimum takes 27e9
    assert few.data_factor(1, best) == pytest.approx(1)
    trained = few.data_factor(0.3, best) * best.n_tokens  # seven epochs
    fresh = HARM.law.data_factor(0.3) * best.n_tokens
    assert trained > 1.15 * fresh
    assert effective_tokens(trained, 30e9) == pytest.approx(fresh)
    loss = few.loss(0.3 * best.n_params, few.data_factor(0.3, best) * best.n_tokens)
    assert loss == pytest.approx(few.loss(*best))
    assert few.critical_k(best) > HARM.law.critical_k
    with pytest.raises(BelowFloorError, match="however often they repeat"):
        few.data_factor(0.2, best)
    assert few.curve(best, [0.2])[0].n_tokens is None


@pytest.mark.parametrize("unique", [None, 60e9])
def test_the_size_for_serving_is_the_cheapest(unique):
    frontier, best = Frontier(HARM.law, unique), HARM.law.optimum(1.62e20)
    k_n = frontier.scale_for_demand(5e11, best)
    cost = served_cost(frontier, k_n, best, 5e11)
    assert all(cost < served_cost(frontier, k_n * x, best, 5e11) for x in (0.97, 1.03))
    if unique is None:
        assert cost < 6 * best.n_params * best.n_tokens + 2 * best.n_params * 5e11


def test_golden_section_finds_a_minimum():
    assert least(lambda x: (np.log(x) - 3) ** 2, 1, 1e4) == pytest.approx(np.exp(3), rel=1e-6)


# --- plans --------------------------------------------------------------------------------------


@pytest.mark.parametrize("gpu", ["A100-40GB", "H100-80GB", "L4-24GB"])
@pytest.mark.parametrize("usd", [50, 5000, 200_000])
def test_dollars_are_spent_and_not_exceeded(gpu, usd):
    plan = make_plan(Request(Budget(usd=usd), HARM, Rental(gpus=(gpu,))))
    batch_usd = plan.run.rented.usd(plan.run.spec.optim.batch_tokens)
    assert usd - batch_usd < plan.run.usd <= usd
    # A node that runs full makes the next size several times dearer: 12% below the optimum there.
    assert plan.best.n_params == pytest.approx(plan.run.n_params, rel=0.16)
    assert plan.loss == pytest.approx(plan.run.loss)
    assert plan.run.rented.estimate.fits


def test_hours_take_the_fastest_and_dollars_the_cheapest():
    rental = Rental(gpus=("H100",), n_gpus=(8, 32))
    fast = make_plan(Request(Budget(hours=24), HARM, rental)).run
    cheap = make_plan(Request(Budget(usd=1000), HARM, rental)).run
    assert (fast.spec.system.n_gpus, cheap.spec.system.n_gpus) == (32, 8)
    assert fast.hours <= 24 < 1.01 * fast.hours


@pytest.mark.parametrize(
    "budget", [Budget(flops=1.62e20), Budget(loss=2.5), Budget(params=3e8), Budget(usd=900)]
)
@pytest.mark.parametrize("k_n", [None, 0.4])
def test_a_smaller_run_has_the_optimums_loss(budget, k_n):
    plan = make_plan(Request(budget, HARM, Rental(gpus=("A100-40GB",)), k_n=k_n))
    scale = k_n or 1.0
    assert plan.run.n_params / plan.best.n_params == pytest.approx(scale, rel=0.08)
    assert plan.run.loss == pytest.approx(plan.loss, rel=1e-4)
    compute = 6 * plan.run.n_params * plan.run.spec.tokens
    assert compute / plan.best.flops - 1 == pytest.approx(HARM.law.overhead(scale), abs=0.15)
    if budget.usd is not None:
        assert plan.run.usd <= budget.usd


def test_a_model_too_large_for_one_node_gets_more():
    plan = make_plan(Request(Budget(params=3e10), HARM, Rental(gpus=("A100-40GB",))))
    assert plan.run.spec.system.n_gpus > 8
    assert plan.run.rented.estimate.fits


def test_serving_sizes_the_run_within_the_dollars():
    rental = Rental(gpus=("H100",))
    alone = make_plan(Request(Budget(usd=5000), HARM, rental))
    served = make_plan(Request(Budget(usd=5000), HARM, rental, inference_tokens=1e12))
    assert served.run.n_params < 0.6 * alone.run.n_params
    assert served.run.usd <= 5000
    assert served.scale == pytest.approx(
        HARM.law.scale_for_demand(1e12 / served.best.n_tokens), rel=1e-6
    )


def test_a_card_without_a_price_has_hours_and_no_dollars():
    rental = Rental(gpus=("RTX4090",))
    run = make_plan(Request(Budget(params=1.5e8), HARM, rental)).run
    assert run.hours > 1
    assert run.usd is None
    with pytest.raises(InputError, match="no on_demand price for RTX4090"):
        make_plan(Request(Budget(usd=100), HARM, rental))


def test_the_batch_is_that_of_the_tokens_that_are_trained():
    request = Request(Budget(usd=5000), HARM, Rental(gpus=("H100",)), k_n=0.3)
    spec = make_plan(request).run.spec
    wanted = step_law(non_embedding_params(spec.model), spec.tokens).batch_tokens
    assert 1 / 1.5 < spec.optim.batch_tokens / wanted < 1.5


def test_without_a_gpu_the_law_still_answers():
    plan = make_plan(Request(Budget(flops=1e15), HARM))
    assert plan.run is None
    assert "a model must have" in plan.why_no_run
    with pytest.raises(InputError, match="a model must have"):
        make_plan(Request(Budget(flops=1e15), HARM, Rental(gpus=("H100",))))
