import math

import numpy as np
import optuna
import pytest
import yaml

from thriftlm.config_file import ConfigFile
from thriftlm.search.spaces.domains import parse_domain
from thriftlm.search.spaces.space import Rejected, Space, load_space
from thriftlm.spec import InputError, RunSpec
from thriftlm_models.counts import stored_params
from thriftlm_models.presets import preset

BASE = """\
name: tiny
data: {corpus: python-stdlib, tokenizer: "bpe:2048", seq_len: 128}
training_budget: {usd: 1}
search_budget: {trials: 8}
search: {algorithm: random, fidelity: {min_tokens: 100000, max_tokens: 1e6}}
space:
  model: {n_layers: [2, 4], d_model: 64, n_heads: 2}
  optim: {batch_tokens: 8192}
  system: {micro_batch: 8}
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write_file(text):
        (tmp_path / "s.yaml").write_text(text)
        return "s.yaml"

    return write_file


@pytest.fixture
def space(write):
    """The base space with changes: sections of `space` by keyword, other keys by `extra`."""

    def make(extra=None, **sections):
        data = yaml.safe_load(BASE) | (extra or {})
        for name, fields in sections.items():
            data["space"][name] = data["space"].get(name, {}) | fields
        return load_space(write(yaml.safe_dump(data, sort_keys=False)))

    return make


def refused(path, *overrides):
    with pytest.raises(InputError) as error:
        load_space(path, overrides)
    return str(error.value)


def only(space, point=None):
    found = space.resolve(point or {}, seed=0)
    assert isinstance(found, RunSpec), found
    return found


# --- what a file says ---------------------------------------------------------------------------


def test_only_what_varies_is_a_domain_in_the_order_of_the_file(space):
    found = space(
        {"data": {"tokenizer": ["bpe:512", "bpe:1024"], "seq_len": [128]}},
        optim={"lr": {"loguniform": [1e-4, 1e-2]}, "betas": [0.9, 0.99]},
        system={"gpu": ["cpu", "T4"]},
    )
    assert list(found.domains) == ["data.tokenizer", "model.n_layers", "optim.lr", "system.gpu"]
    run = only(found, {"data.tokenizer": "bpe:512", "model.n_layers": 4, "optim.lr": 1e-3})
    assert run.optim.betas == (0.9, 0.99)
    assert run.model.vocab == 512  # follows the tokenizer
    assert run.data.seq_len == 128


def test_tokens_and_rungs_of_a_run(space):
    fidelity = space().search.fidelity
    assert fidelity.rungs == (100_000, 300_000, 900_000)
    run = only(space(), {"model.n_layers": 2})
    assert (run.tokens, run.report_every_tokens) == (1_000_000, 100_000)
    assert run.validation_tokens == 65_536


@pytest.mark.parametrize(
    ("algorithm", "scheduler", "resolved"),
    [
        ("random", "auto", "asha"),
        ("optuna", "auto", "asha"),
        ("grid", "auto", "none"),
        ("grid", "asha", "asha"),
        ("random", "none", "none"),
    ],
)
def test_scheduler_auto_fits_the_algorithm(write, algorithm, scheduler, resolved):
    found = load_space(
        write(BASE), [f"search.algorithm={algorithm}", f"search.scheduler={scheduler}"]
    )
    assert found.scheduler == resolved


@pytest.mark.parametrize(
    ("line", "old", "new", "message"),
    [
        (7, "n_layers", "n_layer", "space.model.n_layer: unknown key 'n_layer'; did you mean"),
        (4, "trials", "trial", "search_budget.trial: unknown key 'trial'; did you mean 'trials'?"),
        (5, "algorithm", "algoritm", "search.algoritm: unknown key 'algoritm'; did you mean"),
        (7, "[2, 4]", "[]", "space.model.n_layers: an empty choice: give at least one value"),
        (7, "[2, 4]", "[2, four]", "n_layers[1]: must be a whole number, got 'four'"),
        (7, "[2, 4]", "[2, 2.5]", "n_layers[1]: must be a whole number, got 2.5"),
        (7, "[2, 4]", "[2, 0]", "n_layers[1]: must be above 0, got 0"),
        (7, "[2, 4]", "[2, [3]]", "n_layers: a choice lists numbers"),
        (7, "[2, 4]", "[2, 2]", "n_layers: a choice lists each value once, 2 is there twice"),
        (7, "[2, 4]", "'2'", "n_layers: must be a whole number, got '2'"),
        (7, "[2, 4]", "true", "n_layers: must be a whole number, got True"),
        (7, "[2, 4]", "{uniform: [2, 4]}", "n_layers: uniform and loguniform give fractions"),
        (7, "[2, 4]", "{chioce: [2, 4]}", "n_layers: a domain is one of choice, grid, uniform"),
        (7, "[2, 4]", "{randint: [4, 2]}", "randint takes [low, high] with high left out, low"),
        (7, "[2, 4]", "{quniform: [1, 4, 2]}", "low and high to be multiples of step"),
        (7, "n_layers", "preset: mobilelm-125m, n_layers", "did you mean 'mobilellm-125m'?"),
        (7, "n_heads: 2", "n_heads: 3", "space.model.n_heads: no point is valid: n_heads must"),
        (7, "n_heads: 2", "n_heads: 4, n_kv_heads: 3", "space.model.n_kv_heads: no point is valid"),
        (7, "n_heads: 2", "n_heads: {derive: d_mode/32}", "no numeric field 'd_mode' here; did"),
        (7, "n_heads: 2", "n_heads: {derive: d_model**2}", "derive knows + - * / // ( )"),
        (7, "n_heads: 2", "n_heads: {derive: d_model/}", "takes arithmetic like d_model/head_dim"),
        (
            7,
            "n_heads: 2",
            "n_heads: {ratio: 2, multiple: 4}",
            "ratio goes with multiple_of, got",
        ),
        (8, "{", "{lr: {loguniform: [0, 1]}, ", "space.optim.lr: loguniform needs low above 0"),
        (8, "{", "{schedule: [wsd, cosin]}  # ", "did you mean 'cosine'?"),
        (9, "{", "{gpu: A100-8GB, ", "space.system.gpu: unknown GPU 'A100-8GB'; did you mean"),
        (9, "{", "{gpu: [T4, A100], ", "space.system.gpu[1]: 'A100' names several GPUs"),
        (9, "{", "{cloud: azur, ", "space.system.cloud: no point is valid: unknown cloud 'azur'"),
        (9, "{", "{cpu_offload: true, ", "cpu_offload: no point is valid: cpu_offload needs a"),
        (2, "python-stdlib", "'hf://x/y?a=b'", "data.corpus: hf:// takes ?config="),
        (2, "128", "0", "data.seq_len: must be above 0, got 0"),
        (3, "{usd: 1}", "{}", "training_budget: training_budget needs usd, hours or both"),
        (3, "{usd: 1}", "{usd: -1}", "training_budget.usd: must be above 0, got -1"),
        (4, "{trials: 8}", "{}", "search_budget needs at least one of usd, hours, trials"),
        (5, "random", "bayesian", "search.algorithm: "),
        (5, "random", "optima", "did you mean 'optuna'?"),
        (5, "fid", "repeats: 0, fid", "search.repeats: must be above 0, got 0"),
        (5, "1e6", "1e4", "min_tokens must not exceed max_tokens: 100000 > 10000"),
        (1, "tiny", "a/b", "name: "),
    ],
)
def test_bad_input_names_file_line_and_key(write, line, old, new, message):
    lines = BASE.splitlines()
    assert old in lines[line - 1]
    lines[line - 1] = lines[line - 1].replace(old, new, 1)
    found = refused(write("\n".join(lines)))
    assert found.startswith(f"s.yaml:{line}: ")
    assert message in found
    assert "\n" not in found


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("start_from: [{model: {layers: 2}}]", "start_from[0].model.layers: unknown key 'layers'"),
        ("constraints: {memory_fraction: 0.9}", "memory_fraction: must be a mapping of keys"),
        ("constraints: {parms: {max: 1e6}}", "constraints.parms: unknown key 'parms'; did you"),
        ("constraints: {params: {max: 1, min: 2}}", "min must not exceed max: 2 > 1"),
        ("constraints: {params: 5}", "constraints.params: must be a mapping of keys"),
        ("objective: cheapest", "objective: must be 'loss_at_budget', 'usd_to_loss'"),
        ("objective: weighted", "objective: weighted needs weights"),
        ("objective: {usd_to_loss: -1}", "objective: must be above 0, got -1"),
        ("objective: {weighted: {speed: 1}}", "objective: unknown key 'speed'"),
    ],
)
def test_bad_settings_name_the_line(write, extra, message):
    found = refused(write(BASE + extra + "\n"))
    assert found.startswith("s.yaml:10: ")
    assert message in found


def test_weights_of_an_objective(space):
    found = space({"objective": {"weighted": {"loss": 1, "tokens_per_s": -0.5}}})
    assert found.objective_name == "weighted"
    assert found.objective_weights == {"loss": 1, "usd_per_btok": 0, "tokens_per_s": -0.5}
    assert space().objective_weights is None


def test_an_override_is_named_where_it_is_wrong(write):
    path = write(BASE)
    assert refused(path, "space.model.n_layers=[]").startswith("--set space.model.n_layers: an em")
    assert list(load_space(path, ["space.model.n_layers=3"]).domains) == []
    assert (
        refused(path, "spaces.x=1") == "--set spaces: unknown key 'spaces'; did you mean 'space'?"
    )
    assert refused(path, "space.optim.betas=[0.9]").endswith("too few values, got [0.9]")


def test_an_unsatisfiable_constraint_says_what_removed_how_many(write):
    found = refused(write(BASE + "constraints:\n  params: {max: 1e5}\n"))
    assert found.startswith("s.yaml:11: constraints.params: no point is valid: params above 100000")
    both = "constraints:\n  params: {max: 3e5}\n  flops_per_token: {min: 1e9}\n"
    found = refused(write(BASE + both), "space.model.n_layers=[2, 4, 8]")
    assert "of 3 points, removed by rule: " in found
    assert "params above 300000 (2)" in found
    assert "flops_per_token below 1000000000 (1)" in found


# --- derived fields -----------------------------------------------------------------------------

DERIVED = {
    "n_heads": {"derive": "d_model/head_dim"},
    "d_ff": {"ratio": 2.6667, "multiple_of": 256},
    "head_dim": 64,
    "vocab": 32000,
}


@pytest.mark.parametrize("size", ["125m", "350m", "600m", "1b", "1.5b"])
def test_ratio_and_derive_give_the_published_mobilellm_shapes(space, size):
    published = preset(f"mobilellm-{size}")
    keep = {key: published[key] for key in ("n_layers", "d_model", "n_kv_heads")}
    model = only(space(model=DERIVED | keep)).model
    assert (model.d_ff, model.n_heads) == (published["d_ff"], published["n_heads"])


def test_solve_finds_mobilellm_125m(space):
    fields = {
        "n_layers": 30,
        "n_kv_heads": 3,
        "d_model": {"solve": {"params": 125e6, "multiple_of": 64}},
    }
    model = only(space(model=DERIVED | fields)).model
    assert (model.d_model, model.n_heads, model.d_ff) == (576, 9, 1536)
    assert stored_params(model) == 124_635_456  # MobileLLM, Table 9


@pytest.mark.parametrize("n_layers", [4, 12, 18, 30, 42])
def test_solve_is_the_nearest_multiple(space, n_layers):
    solved = DERIVED | {
        "n_layers": n_layers,
        "n_kv_heads": {"derive": "n_heads"},
        "d_model": {"solve": {"params": 125e6, "multiple_of": 64}},
    }
    model = only(space(model=solved)).model

    def distance(d_model):
        found = only(space(model=solved | {"d_model": d_model})).model
        return abs(stored_params(found) - 125e6)

    d = model.d_model
    assert distance(d) == min(distance(d - 64), distance(d), distance(d + 64))


def test_a_derived_head_count_that_is_no_integer_rejects_the_point(space):
    fields = {"d_model": [64, 100], "head_dim": 32, "n_heads": {"derive": "d_model/head_dim"}}
    found = space(model=fields).resolve({"model.n_layers": 2, "model.d_model": 100}, 0)
    assert found == Rejected(
        "n_heads = d_model/head_dim is not a whole number",
        "n_heads = d_model/head_dim is not a whole number: 3.125",
    )


def test_derive_follows_what_is_derived_and_refuses_circles(space):
    chain = {
        "d_model": 256,
        "head_dim": 32,
        "n_kv_heads": {"derive": "n_heads//4"},
        "n_heads": {"derive": "(d_model + 0) / head_dim"},
    }
    model = only(space(model=chain), {"model.n_layers": 2}).model
    assert (model.n_heads, model.n_kv_heads) == (8, 2)
    circle = {"n_heads": {"derive": "n_kv_heads"}, "n_kv_heads": {"derive": "n_heads"}}
    with pytest.raises(InputError, match="derived fields in a circle"):
        space(model=circle)


def test_a_field_of_the_space_wins_over_the_preset(space):
    model = {"preset": "mobilellm-125m", "n_layers": [12, 30], "d_model": 576, "n_heads": 9}
    run = only(space(model=model), {"model.n_layers": 12})
    assert (run.model.n_layers, run.model.n_kv_heads, run.model.d_ff) == (12, 3, 1536)
    assert run.model.vocab == 2048  # the tokenizer's, not the preset's


# --- points -------------------------------------------------------------------------------------


def test_one_gpu_is_one_strategy(space):
    system = {"n_gpus": [1, 2], "strategy": ["single", "ddp", "zero1"], "micro_batch": [8, 16]}
    counts = space(system=system).count()
    assert (counts.total, counts.size, counts.sampled) == (24, 24, False)
    assert counts.rejected == {"strategy single runs on one GPU": 4}
    # Per depth: two micro batches of one GPU, and two of each of two strategies on two.
    assert (counts.valid, counts.distinct) == (20, 12)


def test_repeats_do_not_matter_without_sharing(space):
    found = space(model={"sharing": ["none", "immediate"], "repeats": [2, 3], "n_layers": 2})
    assert (found.count().valid, found.count().distinct) == (4, 3)


def test_a_gpu_has_one_name(space):
    found = space(system={"gpu": ["T4", "Tesla T4", "L4"], "attention": "math"})
    assert found.count().distinct == 4  # two depths, two GPUs
    assert only(found, {"model.n_layers": 2, "system.gpu": "Tesla T4"}).system.gpu == "T4-16GB"


def test_indivisible_batches_and_missing_prices_are_removed_and_counted(space):
    places = {"gpu": ["cpu", "A100-40GB"], "cloud": ["aws", "gcp"], "attention": "math"}
    counts = space(system=places | {"micro_batch": [8, 12]}, model={"n_layers": 2}).count()
    assert counts.rejected == {
        "micro_batch x n_gpus x seq_len must divide batch_tokens": 3,
        "cloud gcp has no on_demand price for cpu": 2,
    }
    assert counts.valid == 3


def test_data_and_systems_of_a_space_are_listed_once_each(space):
    found = space(
        {"data": {"tokenizer": ["bpe:512", "bpe:1024"], "seq_len": 128}},
        system={"n_gpus": [1, 2], "strategy": ["ddp", "zero1"]},
    )
    assert [data.tokenizer for data in found.data_specs()] == ["bpe:512", "bpe:1024"]
    listed = [(system.n_gpus, system.strategy) for system in found.systems()]
    assert listed == [(1, "single"), (2, "ddp"), (2, "zero1")]
    with pytest.raises(InputError, match="every field of data needs a list of values"):
        space({"data": {"validation_fraction": {"uniform": [0.01, 0.1]}}})


def test_the_document_reads_back_as_the_same_space(space):
    first = space(optim={"lr": {"loguniform": [1e-4, 1e-2]}})
    again = Space(ConfigFile("journal", first.document()))
    point = first.sample(np.random.default_rng(0))
    assert again.domains == first.domains
    assert again.resolve(point, 0) == first.resolve(point, 0)


def test_constraints_have_stable_reasons(space):
    found = space(
        {"constraints": {"params": {"max": 350_000}, "weight_int8_mb": {"max": 10}}},
        model={"n_layers": [2, 4, 6]},
    )
    assert found.count().rejected == {"params above 350000": 2}
    detail = found.resolve({"model.n_layers": 6}, 0).detail
    assert detail.startswith("params above 350000: ")


def test_continuous_spaces_are_counted_by_sample(space):
    counts = space(optim={"lr": {"loguniform": [1e-4, 1e-2]}}, system={"micro_batch": [8, 12]})
    found = counts.count()
    assert (found.total, found.sampled, found.size) == (2000, True, None)
    assert 900 < found.valid < 1100


def test_grid_lists_every_point_in_the_order_of_the_file(space):
    found = space(system={"micro_batch": {"grid": [4, 8]}})
    assert [tuple(point.values()) for point in found.grid()] == [(2, 4), (2, 8), (4, 4), (4, 8)]


def test_grid_names_the_field_that_has_no_list(write):
    text = BASE.replace("{batch_tokens", "{lr: {uniform: [1e-4, 1e-2]}, batch_tokens")
    found = refused(write(text), "search.algorithm=grid")
    assert found.startswith("s.yaml:8: space.optim.lr: grid needs a list of values: use a list")


def test_the_same_point_and_seed_are_the_same_run(space):
    point = {"model.n_layers": 4}
    assert only(space(), point).trial_id == only(space(), point).trial_id
    assert space().resolve(point, 1).recipe_id != space().resolve(point, 2).recipe_id


def test_warnings(write):
    found = load_space(
        write(BASE), ["search.fidelity.min_tokens=1e6", "search.scheduler=asha"]
    ).warnings()
    assert found == ["asha stops nothing: min_tokens is not below max_tokens (1000000)"]
    small = load_space(write(BASE), ["search.algorithm=grid", "search_budget.trials=1"])
    assert small.warnings() == ["grid has 2 points, search_budget allows 1 trials"]


def test_quickstart_has_valid_points_and_varies_what_the_issue_asks():
    found = load_space("quickstart")
    assert {
        "model.n_layers", "model.d_model", "model.sharing", "optim.lr",
        "system.n_gpus", "system.strategy", "system.micro_batch",
    } <= set(found.domains)  # fmt: skip
    assert found.count().valid > 1000
    assert found.search.fidelity.rungs


def test_an_unknown_name_lists_what_is_shipped(write):
    with pytest.raises(InputError, match="did you mean 'quickstart'"):
        load_space("quikstart")
    with pytest.raises(InputError, match="no such file"):
        load_space("quickstart.yaml")


# --- domains ------------------------------------------------------------------------------------

DOMAINS = [
    ([1, "a", None, True, 0.5], {1, "a", None, 0.5}),
    ({"randint": [2, 5]}, {2, 3, 4}),
    ({"quniform": [64, 256, 64]}, {64, 128, 192, 256}),
    ({"quniform": [0.1, 0.4, 0.1]}, {0.1, 0.2, 0.3, 0.4}),
]


@pytest.mark.parametrize(("given", "values"), DOMAINS)
def test_finite_domains_draw_each_value_as_plain_python(given, values):
    domain = parse_domain(given)
    rng = np.random.default_rng(0)
    drawn = [domain.sample(rng) for _ in range(200)]
    assert set(domain.values) == set(drawn) == values
    assert not any(isinstance(value, np.generic) for value in drawn)


def test_loguniform_draws_each_decade_alike():
    domain = parse_domain({"loguniform": [1e-4, 1e-2]})
    rng = np.random.default_rng(0)
    drawn = [domain.sample(rng) for _ in range(4000)]
    assert all(type(value) is float and 1e-4 <= value <= 1e-2 for value in drawn)
    below = sum(value < 1e-3 for value in drawn) / len(drawn)
    assert math.isclose(below, 0.5, abs_tol=0.03)


@pytest.mark.parametrize(
    "given",
    [*(given for given, _ in DOMAINS), {"uniform": [0, 1]}, {"loguniform": [1e-4, 1]}],
)
def test_optuna_draws_within_the_domain(given):
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    domain = parse_domain(given)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(30):
        value = study.ask({"x": domain.distribution()}).params["x"]
        assert not isinstance(value, np.generic)
        if domain.values is None:
            assert domain.low <= value <= domain.high
        else:
            assert any(value == v or value == pytest.approx(v) for v in domain.values)


def test_relative_paths_are_taken_from_where_the_search_was_started(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    space = load_space("quickstart", ["data.corpus=texts/*.txt"])
    (data,) = space.data_specs()
    assert data.corpus == str(tmp_path / "texts/*.txt")
    (data,) = load_space("quickstart").data_specs()
    assert data.corpus == "python-stdlib"
