"""Prices of one's own, in the file that $THRIFTLM_PRICES names."""

import sys
from datetime import date

import pytest

from thriftlm.cli import main
from thriftlm.planning.estimate import estimate
from thriftlm.prices import (
    VARIABLE,
    age_days,
    gpus_billed,
    offers,
    price,
    snapshot_id,
    usd_per_hour,
)
from thriftlm.search.spaces.space import load_space
from thriftlm.spec import InputError, SystemSpec
from thriftlm_models.config import ModelSpec

RATES = """
clouds:
  my-cluster:
    accelerators: {A100-80GB: 1.10, RTX 4090: 0.40, cpu: 0.01}
    spot: {A100-80GB: 0.6}
    gpus_per_node: 4
    as_of: 2026-11-24
    source: contract 12
  aws:
    accelerators: {H100: 4.50}
    as_of: 2026-10-01
"""


def system(**fields):
    strategy = "ddp" if fields.get("n_gpus", 1) > 1 else "single"
    return SystemSpec(**({"strategy": strategy} | fields))


@pytest.fixture
def own(tmp_path, monkeypatch):
    def write(text, name="prices.yaml"):
        path = tmp_path / name
        path.write_text(text)
        monkeypatch.setenv(VARIABLE, str(path))
        return path

    return write


def test_a_cluster_of_ones_own_is_paid_by_the_node(own):
    own(RATES)
    six = system(gpu="A100-80GB", n_gpus=6, cloud="my-cluster")
    assert gpus_billed(six) == 8
    assert usd_per_hour(six) == pytest.approx(8 * 1.10)
    assert usd_per_hour(six.model_copy(update={"market": "spot"})) == pytest.approx(8 * 0.6)
    assert usd_per_hour(six.model_copy(update={"billing": "pro_rata"})) == pytest.approx(6 * 1.10)
    assert str(price(six)) == ("my-cluster/on_demand 4x A100-80GB 1.1 USD/GPU-hour (2026-11-24)")
    assert price(six).source == "contract 12"
    card = system(gpu="RTX4090", cloud="my-cluster")
    assert usd_per_hour(card) == pytest.approx(4 * 0.40)
    cpu = system(n_gpus=2, cpus_per_worker=3, cloud="my-cluster")
    assert usd_per_hour(cpu) == pytest.approx(6 * 0.01)


def test_a_rate_on_a_shipped_cloud_keeps_its_instances_and_its_other_prices(own):
    shipped = {g: price(system(gpu=g)) for g in ("H100-80GB", "A100-40GB")}
    spot = price(system(gpu="H100-80GB", market="spot"))
    own(RATES)
    mine = price(system(gpu="H100-80GB"))
    assert mine.usd_per_gpu_hour == 4.50
    assert mine.instance == shipped["H100-80GB"].instance
    assert usd_per_hour(system(gpu="H100-80GB", n_gpus=8)) == pytest.approx(36)
    assert price(system(gpu="A100-40GB")) == shipped["A100-40GB"]
    assert price(system(gpu="H100-80GB", market="spot")) == spot
    assert price(system(gpu="H100-80GB", region=mine.region)) == mine


def test_nodes_of_another_size_replace_the_listed_ones(own):
    own("clouds: {aws: {accelerators: {H100: 4}, gpus_per_node: 2, as_of: 2026-11-24}}")
    three = system(gpu="H100-80GB", n_gpus=3)
    assert (price(three).instance, gpus_billed(three)) == ("2x H100-80GB", 4)
    own("clouds: {mine: {accelerators: {H100: 4}, as_of: 2026-11-24}}", "loose.yaml")
    assert gpus_billed(system(gpu="H100-80GB", n_gpus=3, cloud="mine")) == 3


def test_a_table_replaces_what_it_prices(own):
    own(
        "cloud,InstanceType,AcceleratorName,AcceleratorCount,vCPUs,Price,SpotPrice,Region,"
        "AvailabilityZone,Source,AsOf\naws,p9,T4,4,8,1.2,,us-east-1,,an offer,2026-11-20\n",
        "mine.csv",
    )
    assert price(system(gpu="T4")).usd_per_gpu_hour == 0.3
    assert [p.instance for p in offers() if (p.cloud, p.gpu, p.market) == T4] == ["p9"]
    assert price(system(gpu="T4", cloud="azure")).cloud == "azure"
    assert price(system(gpu="T4", market="spot")).source.startswith("skypilot")
    assert age_days(date(2026, 11, 24)) == 4


T4 = ("aws", "T4-16GB", "on_demand")


def test_estimates_and_searches_see_them(own):
    # Run by hand: a whole search on a cluster of one's own. Its ledger, its answer and the snapshot
    # in its journal followed the file.
    there = ["space.system.cloud=my-cluster"]
    two = system(gpu="A100-80GB", n_gpus=2, cloud="my-cluster", precision="amp_bf16")
    model = ModelSpec(preset="tinyllama-1.1b")
    with pytest.raises(InputError, match="no point is valid: unknown cloud 'my-cluster'"):
        load_space("quickstart", there)
    with pytest.raises(InputError, match="unknown cloud 'my-cluster'"):
        estimate(model, two, 2048, 2**15)
    own(RATES)
    assert load_space("quickstart", there).count().valid
    found = estimate(model, two, 2048, 2**15)
    assert found.instance == "4x A100-80GB"
    per_token = 4 * 1.10 / 3600 / (2 * found.tokens_per_s_per_gpu)
    assert found.usd_per_btok == pytest.approx(per_token * 1e9)


@pytest.mark.parametrize(
    "arguments",
    [
        "gpus",
        "search quickstart --dry-run",
        "estimate tinyllama-1.1b --gpu H100",
        "train run.yaml --output out",
    ],
)
def test_a_wrong_file_stops_every_command_that_prices(
    own, tmp_path, monkeypatch, capsys, arguments
):
    path = own("clouds: {mine: {accelerators: {H10: 1}, as_of: 2026-11-24}}")
    (tmp_path / "run.yaml").write_text(RUN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("THRIFTLM_STORAGE", str(tmp_path / "storage"))
    monkeypatch.setattr(sys, "argv", ["thriftlm", *arguments.split()])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert f"{path.name}:1: clouds.mine.accelerators.H10: unknown GPU 'H10'" in said
    assert not (tmp_path / "storage/data").exists()  # nothing was read before


RUN = """
model: {n_layers: 2, d_model: 64, n_heads: 2, vocab: 2048}
optim: {lr: 1e-3, batch_tokens: 2048}
data: {corpus: python-stdlib, tokenizer: "bpe:2048", seq_len: 128}
system: {gpu: cpu, n_gpus: 1, strategy: single, micro_batch: 8}
tokens: 8192
"""


def test_rates_enter_the_snapshot_but_say_nothing_about_the_age_of_list_prices(own):
    today = date(2026, 11, 24)
    before = snapshot_id(), age_days(today)
    own(RATES)
    first = snapshot_id()
    assert first != before[0]
    assert age_days(today) == before[1]
    own(RATES.replace("1.10", "1.20"), "other.yaml")
    assert snapshot_id() not in (first, before[0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "clouds:\n  mine:\n    accelerators: {H10: 1.1}\n    as_of: 2026-11-24\n",
            "prices.yaml:3: clouds.mine.accelerators.H10: unknown GPU 'H10'; did you",
        ),
        (
            "clouds:\n  mine: {accelerators: {H100: 2}, spot: {H100: 3}, as_of: 2026-11-24}\n",
            "prices.yaml:2: clouds.mine.spot: must not exceed accelerators: H100-80GB 3 > 2",
        ),
        (
            "clouds:\n  mine: {accelerators: {H100: 2, H100-80GB: 3}, as_of: 2026-11-24}\n",
            "clouds.mine.accelerators.H100-80GB: names H100-80GB a second time; keep one",
        ),
        (
            "clouds:\n  mine: {accelerators: {V100: 2}, as_of: 2026-11-24}\n",
            "clouds.mine.accelerators.V100: 'V100' names several GPUs: V100-16GB, V100-32GB; say",
        ),
        (
            "clouds:\n  mine:\n    accelerators: {H100: 0}\n    as_of: 2026-11-24\n",
            "prices.yaml:3: clouds.mine.accelerators.H100: must be above 0, got 0",
        ),
        (
            "clouds:\n  mine: {accelerators: {H100: 2}}\n",
            "prices.yaml:2: clouds.mine.as_of: required, but not given",
        ),
        (
            "clouds:\n  mine: {accelerators: {H100: 2}, as_of: soon}\n",
            "prices.yaml:2: clouds.mine.as_of: must be a valid date",
        ),
        (
            "clouds:\n  mine: {accelerator: {H100: 2}, as_of: 2026-11-24}\n",
            "unknown key 'accelerator'; did you mean 'accelerators'?",
        ),
        (
            "clouds:\n  mine: {as_of: 2026-11-24}\n",
            "clouds.mine: has neither accelerators nor spot; give USD per GPU-hour",
        ),
        (
            "clouds:\n  apple_normalised: {accelerators: {H100: 2}, as_of: 2026-11-24}\n",
            "clouds.apple_normalised: holds ratios; give USD per GPU-hour of your own cloud",
        ),
    ],
)
def test_a_wrong_rate_is_named_with_its_line(own, text, message):
    own(text)
    with pytest.raises(InputError) as error:
        offers()
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["gone.yaml", "prices.txt"])
def test_a_file_that_is_none_is_named(own, tmp_path, monkeypatch, name):
    own("", "prices.txt")
    monkeypatch.setenv(VARIABLE, str(tmp_path / name))
    with pytest.raises(InputError) as error:
        price(system(gpu="T4"))
    assert str(error.value) == (
        "$THRIFTLM_PRICES must name a .csv or .yaml file that exists, got "
        f"'{tmp_path / name}'; correct or unset it"
    )


def test_a_row_of_ones_own_is_checked(own):
    path = own("cloud,Price\naws,1\n", "mine.csv")
    with pytest.raises(InputError, match=f"{path}: lacks the columns InstanceType"):
        offers()
