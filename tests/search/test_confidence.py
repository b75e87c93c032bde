"""How sure the answer is, what the next dollars buy, and the winner against the user's own."""

import itertools

import numpy as np
import pytest

from thriftlm import prices
from thriftlm.search.answers.confidence import SEED_NOISE, Judge, seed_noise
from thriftlm.search.answers.next_dollars import next_dollars
from thriftlm.search.answers.result import SearchResult, answer
from thriftlm.search.cluster.capacity import Capacity
from thriftlm.search.scores.hypervolume import hypervolume, spent_by
from thriftlm.search.scores.ranking import ranking
from thriftlm.search.scores.scoring import configuration_of
from thriftlm.spec import SystemSpec
from thriftlm_models.counts import non_embedding_params

MAX = 8192 * 9


def judged(desk):
    return Judge(desk.space, ranking(desk.space, desk.state))


@pytest.fixture
def two(lab):
    """A search over two learning rates of one model."""

    def make(rates, **changes):
        search = {"algorithm": "grid", "max_concurrent": 1} | changes.pop("search", {})
        space = lab.space(
            model={"n_layers": 4}, optim={"lr": list(rates)}, search=search, **changes
        )
        return lab.searched(space)

    return make


def test_what_is_uncertain_of_all_trials_cancels(two, lab):
    desk = two((lab.BEST_LR, 6e-2))
    found, scores = answer(desk.space, desk.state)
    sure = found.confidence
    other = scores[sure.runner_up]
    assert found.best.high > other.low  # the intervals alone would decide nothing
    assert sure.p_best > 0.99
    assert sure.decided
    assert 0 < sure.low < sure.difference < sure.high
    assert found.trials[0].p_best == sure.p_best


def test_a_tie_is_no_decision(two):
    desk = two((3.0e-3, 3.02e-3))
    sure = answer(desk.space, desk.state)[0].confidence
    assert 0.2 < sure.p_best < 0.9
    assert not sure.decided
    assert sure.low < 0 < sure.high
    assert sure.p_best + sure.p_runner_up == pytest.approx(1)


@pytest.mark.parametrize(
    "objective", ["loss_at_budget", "usd_to_loss", "weighted", "pareto", "tokens_per_usd"]
)
def test_probabilities_add_up_for_every_objective(lab, objective):
    objective = {"weighted": {"loss": 1}} if objective == "weighted" else objective
    desk = lab.searched(lab.space(objective=objective))
    found = answer(desk.space, desk.state)[0]
    assert sum(trial.p_best for trial in found.trials) == pytest.approx(1)
    assert SearchResult.model_validate_json(found.model_dump_json()) == found
    assert (found.hypervolume is not None) == (objective == "pareto")


def test_luck_of_seeds_alone_decides_nothing(two, lab):
    """Without repeats, .003 nats between two runs are needed at a loss of 3.28."""
    judge = judged(two((lab.BEST_LR, 6e-2)))
    noise = seed_noise(judge.space, judge.ranking)
    assert noise == (pytest.approx(SEED_NOISE), 0)
    assert pytest.approx(0.003, rel=0.02) == 1.645 * 2**0.5 * SEED_NOISE * 3.28
    gap = judge.draws.difference(*judge.draws.trial_ids[::-1])
    loss = judge.ranking.scores[judge.ranking.order[0]].loss_at_budget
    assert gap.std() > 2**0.5 * SEED_NOISE * loss * 0.9


def test_repeats_measure_the_noise_of_seeds_and_lessen_it(two, lab):
    desk = two((3.0e-3, 3.02e-3), search={"repeats": 6}, search_budget={"trials": 50})
    judge = judged(desk)
    noise, runs = seed_noise(judge.space, judge.ranking)
    assert runs == 10  # five more seeds of each
    final = {}
    for trial in desk.state.trials.values():
        final.setdefault(trial.run.optim.lr, []).append(np.log(trial.loss))
    sds = [np.std(values, ddof=1) for values in final.values()]
    mean = np.sqrt((4 * SEED_NOISE**2 + 5 * sum(sd**2 for sd in sds)) / 14)
    assert noise == pytest.approx(mean)
    assert set(judge.draws.seeds.values()) == {6}
    told = judge.confidence()
    assert (told.repeats.asked, told.repeats.run, told.repeats.usd_missing) == (6, 6, 0)
    assert told.noise_runs == 10


@pytest.mark.parametrize(
    ("training_usd", "search", "limit"),
    [
        (1e-3, {"trials": 2}, "third_of_training_budget"),
        (1.0, {"trials": 2}, "max_tokens"),
        (1.0, {"usd": 0.003}, "search_budget"),
    ],
)
def test_which_limit_the_winner_reached(lab, training_usd, search, limit):
    space = lab.space(
        model={"n_layers": 4},
        optim={"lr": [lab.BEST_LR, 6e-2]},
        search={"algorithm": "grid", "max_concurrent": 1},
        training_budget={"usd": training_usd},
        search_budget=search,
    )
    desk = lab.searched(space, lambda run: lab.Behaviour(first=60.0, intervals=60.0))
    found = answer(desk.space, desk.state)[0]
    confirmed = found.confidence.confirmation
    assert confirmed.limit == limit
    winner = desk.state.trials[found.best.trial_id]
    assert confirmed.tokens == winner.tokens
    assert confirmed.share == pytest.approx(winner.tokens / found.best.tokens_at_budget, rel=1e-4)
    third = found.best.tokens_at_budget / 3
    missing = 0 if limit == "third_of_training_budget" else third - winner.tokens
    assert confirmed.missing_tokens == pytest.approx(missing, rel=1e-4)


class TestNext:
    def test_a_tie_buys_a_longer_run_of_both(self, two):
        desk = two((3.0e-3, 3.02e-3))
        found = answer(desk.space, desk.state)[0]
        assert found.next.what == "longer_run"
        third = found.best.tokens_at_budget / 3 - MAX
        price = found.best.usd_per_btok / 1e9
        assert found.next.usd == pytest.approx(2 * third * price, rel=1e-3)

    def test_where_the_runs_are_long_enough_a_tie_buys_seeds(self, two):
        """D_B is what was trained: nothing is extrapolated, and only luck is left."""
        per_token = prices.usd_per_hour(SystemSpec(gpu="cpu", micro_batch=1)) / 3600 / 1000
        desk = two((3.0e-3, 3.02e-3), training_budget={"usd": MAX * per_token})
        found = answer(desk.space, desk.state)[0]
        assert found.next.what == "seeds"
        firsts = [t.usd for t in found.trials]
        assert sum(firsts) < found.next.usd < 1.5 * sum(firsts)

    def test_a_clear_winner_buys_more_trials(self, two, lab):
        desk = two((lab.BEST_LR, 6e-2, 7e-2, 8e-2, 9e-2), search_budget={"trials": 3})
        found = answer(desk.space, desk.state)[0]
        assert found.confidence.decided
        assert found.next.what == "trials"
        mean = sum(t.usd for t in found.trials) / len(found.trials)
        assert found.next.usd == pytest.approx(8 * mean)

    def test_an_exhausted_space_with_a_clear_winner_promises_next_to_nothing(self, two, lab):
        found = next_dollars(judged(two((lab.BEST_LR, 1e-1))))
        assert found.what in ("longer_run", "seeds")
        assert found.gain < 1e-3

    def test_a_cheaper_system_that_was_not_tried_buys_a_probe(self, lab):
        space = lab.space(
            model={"n_layers": 4},
            optim={"lr": [lab.BEST_LR, 1e-1]},
            system={"gpu": ["V100-16GB", "H100-80GB"], "n_gpus": [1], "cloud": "aws"},
            search={"algorithm": "grid", "max_concurrent": 1},
        )
        capacity = Capacity({"CPU": 64.0, "GPU:V100": 8.0})
        desk = lab.searched(space, capacity=capacity)
        assert {t.run.system.gpu for t in desk.state.trials.values()} == {"V100-16GB"}
        found = answer(space, desk.state)[0].next
        assert found.what == "probe"
        assert "H100-80GB" in found.why
        assert found.usd > 0


class TestStart:
    def against(self, lab, entry, **changes):
        space = lab.space(
            model={"n_layers": [4, 8]},
            start_from=[entry],
            optim={"lr": [lab.BEST_LR, 1e-2]},
            search={"algorithm": "grid", "max_concurrent": 1},
            **changes,
        )
        desk = lab.searched(space, self.behave(lab))
        found, scores = answer(space, desk.state)
        (start,) = found.start_from
        return found, scores, start

    def behave(self, lab):
        return lambda run: lab.Behaviour(failure=("oom", 2) if run.optim.lr == 0.05 else None)

    def test_how_much_better_the_winner_is_in_loss_and_dollars(self, lab):
        found, scores, start = self.against(lab, {"model": {"n_layers": 2}, "optim": {"lr": 3e-2}})
        own, best = scores[start.trial_id], scores[found.best.trial_id]
        gap = own.loss_at_budget - best.loss_at_budget
        assert start.difference == pytest.approx(gap)
        assert gap > 0.05
        assert 0 < start.low < start.difference < start.high
        assert start.usd_factor is None or start.usd_factor > 1

    def test_dollars_to_equal_loss_invert_the_law(self, lab):
        space = lab.space(
            start_from=[{"model": {"n_layers": 4}, "optim": {"lr": 8e-3}}],
            model={"n_layers": 4},
            optim={"lr": [lab.BEST_LR, 3e-2]},
            search={"algorithm": "grid", "max_concurrent": 1},
        )
        desk = lab.searched(space)
        judge = judged(desk)
        (start,) = judge.against_starts()
        best = judge.ranking.scores[judge.ranking.order[0]]
        own = judge.ranking.scores[start.trial_id]
        assert start.usd_factor > 1
        usd = start.usd_factor * best.tokens_at_budget * best.usd_per_btok / 1e9
        run, fit = desk.state.trials[start.trial_id].run, judge.ranking.comparison.fit
        reached = fit.predict(
            configuration_of(run), non_embedding_params(run.model), usd * own.tokens_per_usd
        )
        assert reached == pytest.approx(best.loss_at_budget, rel=1e-3)

    def test_the_user_s_own_can_be_the_winner(self, lab):
        found, _, start = self.against(lab, {"optim": {"lr": 3e-3}, "model": {"n_layers": 16}})
        if found.best.trial_id == start.trial_id:
            assert (start.difference, start.usd_factor) == (0, pytest.approx(1))
        assert start.status == "done"

    def test_one_without_a_score_says_why(self, lab):
        _, _, start = self.against(lab, {"optim": {"lr": 0.05}})
        assert (start.status, start.difference, start.usd_factor) == ("oom", None, None)

    def test_one_that_does_not_fit_the_cluster_was_not_run(self, lab):
        entry = {"system": {"n_gpus": 4, "strategy": "ddp"}}
        _, _, start = self.against(lab, entry)
        assert (start.status, start.difference) == ("not run", None)


def test_nothing_to_be_sure_of_without_a_score(lab):
    desk = lab.searched(lab.space(), lambda run: lab.Behaviour(failure=("oom", 2)))
    found = answer(desk.space, desk.state)[0]
    assert (found.confidence, found.next, found.start_from) == (None, None, [])


def test_hypervolume_against_a_fine_grid():
    rng = np.random.default_rng(0)
    for _ in range(5):
        points = [tuple(p) for p in rng.random((7, 2)).tolist()]
        at = (np.arange(400) + 0.5) / 400
        x, y = np.meshgrid(at, at)
        covered = np.any([(x >= a) & (y >= b) for a, b in points], axis=0).mean()
        assert hypervolume(points, (1.0, 1.0)) == pytest.approx(covered, abs=0.01)
    assert hypervolume([(2.0, 0.0)], (1.0, 1.0)) == 0
    assert hypervolume([], (1.0, 1.0)) == 0


def test_hypervolume_grows_with_the_dollars_that_were_spent(lab):
    space = lab.space(
        objective="pareto", system={"micro_batch": [1, 2, 4]}, search_budget={"trials": 12}
    )

    def behave(run):
        return lab.Behaviour(tokens_per_s=1000.0 * run.system.micro_batch)

    desk = lab.searched(space, behave)
    found = answer(space, desk.state)[0]
    usd, area = zip(*found.hypervolume, strict=True)
    assert all(a <= b for a, b in itertools.pairwise(usd))
    assert all(a <= b for a, b in itertools.pairwise(area))
    assert area[-1] > area[0] > 0
    assert spent_by(desk.state, desk.state.last_at) == pytest.approx(found.spent_usd)


def test_factored_answers_by_its_own_surrogate(lab):
    space = lab.space(
        optim={"lr": [1e-3, 3e-3, 1e-2]},
        search={"algorithm": "factored", "max_concurrent": 1},
        search_budget={"trials": 6},
    )
    desk = lab.searched(space)
    stand = ranking(space, desk.state)
    assert stand.comparison.draws.shape[0] == 256
    found = answer(space, desk.state)[0]
    assert found.best.trial_id == desk.leader()
    assert found == answer(space, desk.state)[0]
