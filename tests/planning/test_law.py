"""The law is recovered where data identify it, and says so honestly where they do not."""

import subprocess
import sys

import numpy as np
import pytest

from thriftlm.planning.law import Curve, bootstrap, fit_law
from thriftlm.planning.scaling_laws import LossLaw

EPOCH = LossLaw(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658)  # arXiv 2404.10102
HARM = LossLaw(E=1.62, A=406.4, B=410.7, alpha=0.336, beta=0.283)
STEEP = LossLaw(E=1.7, A=400.0, B=4e6, alpha=0.3, beta=0.73)  # data exponent of a real table


def run(name, law, n_params, tokens, *, offset=0.0, decay=0.03, noise=0.0, rng=None, warm_up=None):
    """A WSD run whose learning rate decays over its last fifth."""
    tokens = np.asarray(tokens, float)
    decayed = tokens > 0.8 * tokens.max()
    log_loss = np.log(law.loss(n_params, tokens)) + offset + decay * ~decayed
    if rng is not None:
        log_loss = log_loss + noise * rng.standard_normal(len(tokens))
    warming_up = np.zeros(len(tokens), bool) if warm_up is None else warm_up
    return Curve(name, n_params, tokens, np.exp(log_loss), decayed, warming_up)


def search(law, seed, n_curves=10, *, spread=0.0, noise=0.0, n_points=10):
    """Curves as a search leaves them, and each one's true offset."""
    rng = np.random.default_rng(seed)
    sizes, ends = 10 ** rng.uniform(6, 8, n_curves), 10 ** rng.uniform(7.5, 9.5, n_curves)
    offsets = spread * rng.standard_normal(n_curves)
    curves = [
        run(str(i), law, n, np.linspace(d / n_points, d, n_points), offset=o, noise=noise, rng=rng)
        for i, (n, d, o) in enumerate(zip(sizes, ends, offsets, strict=True))
    ]
    return curves, dict(zip((curve.name for curve in curves), offsets, strict=True))


def test_loss_is_the_published_anchor():
    assert HARM.loss(40e9, 1e12) == pytest.approx(1.8963581331216426, rel=1e-12)


@pytest.mark.parametrize("truth", [EPOCH, HARM, STEEP], ids=["epoch", "harm", "steep"])
def test_surface_is_recovered_inside_the_data(truth):
    curves, _ = search(truth, seed=1, n_curves=16, noise=0.003)
    fit = fit_law(curves)
    sizes = np.geomspace(*fit.n_params_range, 12)[:, None]
    tokens = np.geomspace(fit.n_tokens_range[0] * 3, fit.n_tokens_range[1], 12)
    assert fit.identified
    assert np.abs(fit.law.loss(sizes, tokens) / truth.loss(sizes, tokens) - 1).max() < 0.005


def test_surface_falls_with_parameters_and_tokens():
    curves, _ = search(HARM, seed=2, spread=0.03, noise=0.01)
    surface = fit_law(curves).law.loss(
        np.geomspace(1e5, 1e10, 30)[:, None], np.geomspace(1e6, 1e13, 30)
    )
    assert (np.diff(surface, axis=0) < 0).all()
    assert (np.diff(surface, axis=1) < 0).all()


def test_exponents_have_a_prior_but_are_not_fixed():
    curves, _ = search(STEEP, seed=3, noise=0.003)
    assert fit_law(curves).law.beta == pytest.approx(0.73, abs=0.1)
    curves, _ = search(HARM, seed=3, n_curves=30, noise=0.002)
    assert fit_law(curves).law.beta == pytest.approx(0.283, abs=0.05)


def test_points_in_warm_up_hardly_count():
    tokens = np.linspace(1e8, 2e9, 20)
    early = tokens < 4e8
    sizes = (1e6, 4e6, 1.6e7, 6.4e7)

    def fitted(marked):
        curves = []
        for size in sizes:
            clean = run(str(size), EPOCH, size, tokens, warm_up=early & marked)
            loss = clean.loss * np.where(early, 1.5, 1.0)
            curves.append(Curve(clean.name, size, tokens, loss, clean.decayed, clean.warming_up))
        law = fit_law(curves).law
        return max(abs(law.loss(n, 2e10) / EPOCH.loss(n, 2e10) - 1) for n in sizes)

    assert fitted(marked=True) < 0.03
    assert fitted(marked=False) > 3 * fitted(marked=True)


def test_one_broken_point_does_not_bend_the_law():
    curves, _ = search(EPOCH, seed=4, noise=0.003)
    loss = curves[3].loss.copy()
    loss[5] *= 2
    broken = Curve(
        "3", curves[3].n_params, curves[3].tokens, loss, curves[3].decayed, curves[3].warming_up
    )
    law = fit_law([*curves[:3], broken, *curves[4:]]).law
    assert law.loss(3e7, 1e9) == pytest.approx(float(EPOCH.loss(3e7, 1e9)), rel=0.01)


def test_offsets_are_recovered_and_shrunk():
    curves, offsets = search(EPOCH, seed=5, n_curves=24, spread=0.03, noise=0.003)
    curves.append(run("short", EPOCH, 1e7, [3e8], offset=0.08))
    fit = fit_law(curves)
    names = [curve.name for curve in curves[:-1]]
    found = np.array([fit.effects[name].offset for name in names])
    true = np.array([offsets[name] for name in names])
    assert np.corrcoef(found, true)[0, 1] > 0.95
    assert fit.tau == pytest.approx(0.03, rel=0.5)
    assert 0 < fit.effects["short"].offset < 0.08
    assert fit.effects["short"].offset_sd > 1.5 * fit.effects["0"].offset_sd


def test_offsets_vanish_where_there_are_none():
    curves, _ = search(EPOCH, seed=6, n_curves=24, noise=0.003)
    fit = fit_law(curves)
    assert fit.tau < 0.015
    assert max(abs(effect.offset) for effect in fit.effects.values()) < 0.01


@pytest.mark.parametrize("decay", [0.0, 0.03, 0.06])
def test_decayed_and_undecayed_points_are_told_apart(decay):
    rng = np.random.default_rng(7)
    curves = [
        run(str(n), EPOCH, n, np.linspace(1e8, d, 15), decay=decay, noise=0.002, rng=rng)
        for n, d in [(1e6, 1e9), (4e6, 3e9), (1.6e7, 1e9), (6e7, 3e9)]
    ]
    fit = fit_law(curves)
    assert fit.decay_offset == pytest.approx(decay, abs=0.01)
    gain = fit.predict("1000000.0", 1e6, 1e9, decayed=False) / fit.predict("1000000.0", 1e6, 1e9)
    assert np.log(gain) == pytest.approx(fit.decay_offset)


def test_interval_holds_the_truth():
    hits, widths = [], []
    for seed in range(5):
        curves, offsets = search(EPOCH, seed=seed, n_curves=6, spread=0.02, noise=0.004)
        samples = bootstrap(curves, fit_law(curves), samples=40, seed=seed)
        for curve in curves:
            truth = EPOCH.loss(curve.n_params, 1e10) * np.exp(offsets[curve.name])
            draws = [sample.predict(curve.name, curve.n_params, 1e10) for sample in samples]
            low, high = np.quantile(draws, [0.05, 0.95])
            hits.append(low <= truth <= high)
            widths.append(high / low - 1)
    assert np.mean(hits) > 0.8
    assert np.median(widths) < 0.2


def test_interval_narrows_with_data_and_widens_with_distance():
    def width(n_curves, tokens):
        curves = search(EPOCH, seed=8, n_curves=12, noise=0.003)[0][:n_curves]
        samples = bootstrap(curves, fit_law(curves))
        draws = [sample.predict("0", curves[0].n_params, tokens) for sample in samples]
        return np.log(draws).std()

    assert width(1, 2e10) > 1.5 * width(12, 2e10)
    assert width(12, 1e12) > 1.3 * width(12, 2e10)


def test_one_point_gives_a_finite_answer_and_says_that_it_is_the_prior():
    curve = run("only", EPOCH, 1e6, [1e7])
    fit = fit_law([curve])
    assert not fit.identified
    assert len(fit.reasons) == 4
    assert fit.predict("only", 1e6, 1e7) == pytest.approx(curve.loss[0], rel=0.02)
    assert 0 < fit.predict("only", 1e6, 1e9) < fit.predict("only", 1e6, 1e7)
    draws = [s.predict("only", 1e6, 1e9) for s in bootstrap([curve], fit)]
    assert np.isfinite(draws).all()
    assert np.quantile(draws, 0.95) / np.quantile(draws, 0.05) > 1.2


def test_one_model_size_leaves_the_law_unidentified_but_usable():
    curves = [run(str(i), EPOCH, 1e7, np.linspace(1e8, 2e9, 10), offset=0.01 * i) for i in range(4)]
    fit = fit_law(curves)
    assert fit.reasons == ("sizes span less than 2x",)
    assert fit.law.alpha == pytest.approx(0.3478, rel=0.2)
    assert fit.predict("0", 1e7, 1e10) == pytest.approx(float(EPOCH.loss(1e7, 1e10)), rel=0.03)


def test_same_seed_same_fit():
    curves, _ = search(EPOCH, seed=9, n_curves=4, spread=0.02, noise=0.01)
    first, second = fit_law(curves, seed=3), fit_law(curves, seed=3)
    assert first == second
    assert bootstrap(curves, first, samples=3) == bootstrap(curves, second, samples=3)


def test_curves_that_cannot_be_fitted_are_refused():
    with pytest.raises(ValueError, match="one length"):
        Curve("a", 1e6, [1.0, 2.0], [3.0], [False], [False])
    with pytest.raises(ValueError, match="above 0"):
        Curve("a", 1e6, [1e6], [np.nan], [False], [False])
    empty = Curve("a", 1e6, [], [], [], [])
    with pytest.raises(ValueError, match="measured point"):
        fit_law([empty])
    point = run("a", EPOCH, 1e6, [1e7])
    with pytest.raises(ValueError, match="one curve per name"):
        fit_law([point, point])
    assert fit_law([run("b", EPOCH, 1e6, [1e7]), empty]).effects.keys() == {"b"}


def test_planning_needs_no_torch_and_no_ray():
    code = (
        "import sys, thriftlm.planning.law; "
        "sys.exit(bool({'torch', 'ray', 'mlflow'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
