import csv
from datetime import date
from importlib.resources import files

import pytest

from thriftlm.catalog import (
    age_days,
    gpu,
    gpus,
    gpus_billed,
    parse_prices,
    price,
    prices,
    snapshot_id,
    usd_per_hour,
)
from thriftlm.spec import InputError, SystemSpec


def system(**fields):
    strategy = "ddp" if fields.get("n_gpus", 1) > 1 else "single"
    return SystemSpec(**({"strategy": strategy} | fields))


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("A100-80GB", "A100-80GB"),  # an id wins over the same SkyPilot name of the PCIe card
        ("a100 80gb", "A100-80GB"),
        ("A100-80G", "A100-80GB"),  # Ray's optional label
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),  # nvidia-smi
        ("NVIDIA A100 80GB PCIe", "A100-80GB-PCIe"),
        ("NVIDIA H100 80GB HBM3", "H100-80GB"),
        ("H100", "H100-80GB"),  # without a form factor it means SXM
        ("H100-NVL", "H100-94GB-NVL"),
        ("Tesla V100-SXM2-16GB", "V100-16GB"),
        ("H100-MEGA", "H100-80GB"),
        ("l40s", "L40S-48GB"),
        ("NVIDIA GeForce RTX 3090", "RTX3090"),
        ("RTX-4090", "RTX4090"),
        ("4090", "RTX4090"),
        ("NVIDIA GeForce RTX 5090", "RTX5090"),
        ("rtx 5060 ti", "RTX5060Ti-16GB"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTXPRO6000-96GB"),
        ("NVIDIA RTX A6000", "A6000"),
        ("nvidia a40", "A40"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("H100 64GB", "H100-64GB"),
        ("A100-SXM-64GB", "A100-64GB"),
        ("CPU", "cpu"),
    ],
)
def test_names_of_ray_skypilot_and_people(name, key):
    assert gpu(name).id == key


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("A100", "'A100' names several GPUs: A100-40GB, A100-80GB; say which"),
        ("V100", "'V100' names several GPUs: V100-16GB, V100-32GB; say which"),
        ("A100-8GB", "did you mean 'A100-80GB'?"),
        ("H1000", "did you mean 'H100-80GB'?"),
        ("abacus", "unknown GPU 'abacus'; known: A100-40GB,"),
        ("RTX 6000", "unknown GPU 'RTX 6000'"),  # neither the PRO 6000 nor the A6000
        ("RTX 3090 Ti", "unknown GPU 'RTX 3090 Ti'"),
        ("", "unknown GPU ''"),
    ],
)
def test_a_name_that_is_not_one_gpu_is_refused(name, message):
    with pytest.raises(InputError) as error:
        gpu(name)
    assert message in str(error.value)


def test_every_entry_has_a_source_and_cpu_has_no_peak():
    assert all(entry.source for entry in gpus().values())
    assert gpu("cpu").bf16_tflops is None
    assert gpu("T4").bf16_tflops is None  # no bf16 tensor cores
    assert gpu("H200").bf16_tflops == 989  # dense, not the 1979 of the sparse sheet


def test_every_own_name_finds_its_entry():
    for key, entry in gpus().items():
        assert gpu(key) is gpu(key.lower()) is gpu(entry.product if key != "cpu" else key) is entry


def test_prices_of_a_whole_node_and_of_a_share_of_it():
    # p4d.24xlarge, 21.957642 USD/h (Karpenter, 2026-07-20), comes only with eight GPUs.
    two = system(gpu="A100-40GB", n_gpus=2)
    assert price(two).instance == "p4d.24xlarge"
    assert price(two).usd_per_gpu_hour == pytest.approx(21.957642 / 8)
    assert gpus_billed(two) == 8
    assert usd_per_hour(two) == pytest.approx(21.957642)
    shared = two.model_copy(update={"billing": "pro_rata"})
    assert gpus_billed(shared) == 2
    assert usd_per_hour(shared) == pytest.approx(21.957642 / 4)
    assert usd_per_hour(system(gpu="A100-40GB", n_gpus=16)) == pytest.approx(2 * 21.957642)


def test_a_system_is_priced_on_nodes_that_hold_it():
    # Eight g6e.xlarge are half the price of one g6e.48xlarge, on eight machines.
    assert price(system(gpu="L40S", n_gpus=1)).instance == "g6e.xlarge"
    assert price(system(gpu="L40S", n_gpus=2)).instance == "g6e.12xlarge"
    assert price(system(gpu="L40S", n_gpus=8)).instance == "g6e.48xlarge"
    apart = system(gpu="L40S", n_gpus=8, gpus_per_node=1)
    assert price(apart).instance == "g6e.xlarge"
    assert usd_per_hour(apart) == pytest.approx(8 * 1.861)
    # RunPod lists single GPUs only: the largest there is.
    assert usd_per_hour(system(gpu="H100", n_gpus=8, cloud="runpod")) == pytest.approx(8 * 3.99)


def test_cpu_is_paid_by_the_vcpu():
    two = system(n_gpus=2, cpus_per_worker=3)
    assert price(two).usd_per_gpu_hour == pytest.approx(0.1785 / 4)  # c7i.xlarge
    assert gpus_billed(two) == 6
    assert usd_per_hour(two) == pytest.approx(6 * 0.1785 / 4)
    whole = system(n_gpus=1, cpus_per_worker=3, billing="whole_node")
    assert gpus_billed(whole) == 4
    assert usd_per_hour(whole) == pytest.approx(0.1785)


def test_apple_ratios_are_flagged():
    found = {key: price(system(gpu=key, cloud="apple_normalised")) for key in ("A100-80GB", "H100")}
    assert [entry.usd_per_gpu_hour for entry in found.values()] == [1.46, 2.53]
    assert all(entry.normalised and "normalised/GPU-hour" in str(entry) for entry in found.values())
    assert not any(entry.normalised for entry in prices() if entry.cloud != "apple_normalised")
    assert gpus_billed(system(gpu="H100", cloud="apple_normalised", n_gpus=2)) == 2


def test_spot_is_the_cheapest_zone_that_has_a_spot_signal():
    found = price(system(gpu="A100-40GB", market="spot"))
    assert (found.zone, found.usd_per_gpu_hour) == ("use1-az2", pytest.approx(6.5323 / 8))
    # use1-az1 lists p5.48xlarge at SpotPrice == Price: no signal, so no row.
    zones = {p.zone for p in prices() if p.instance == "p5.48xlarge" and p.market == "spot"}
    assert "use1-az1" not in zones
    assert "use1-az2" in zones


def test_pcie_and_sxm_are_priced_apart():
    assert price(system(gpu="H100-80GB-PCIe", cloud="lambda")).instance == "gpu_1x_h100_pcie"
    assert price(system(gpu="H100-80GB", cloud="lambda")).instance == "gpu_1x_h100_sxm5"
    azure = price(system(gpu="A100-80GB", cloud="azure", n_gpus=8))
    assert azure.instance == "Standard_ND96amsr_A100_v4"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"gpu": "T4", "cloud": "runpod"},
            "runpod has no on_demand price for T4-16GB; there is: aws",
        ),
        ({"gpu": "T4", "cloud": "amazon"}, "unknown cloud 'amazon'"),
        ({"gpu": "T4", "cloud": "azur"}, "did you mean 'azure'?"),
        ({"gpu": "T4", "region": "mars"}, "cloud aws mars has no on_demand price"),
        ({"gpu": "T4", "cloud": "azure", "market": "spot"}, "azure eastus on_demand"),
    ],
)
def test_a_missing_price_says_where_there_is_one(fields, message):
    with pytest.raises(InputError) as error:
        price(system(**fields))
    assert message in str(error.value)


@pytest.fixture
def table():
    text = files("thriftlm").joinpath("data/prices.csv").read_text()
    return list(csv.DictReader(text.splitlines()))


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("SpotPrice", "9.99", "SpotPrice must not exceed Price: 9.99 > 0.526"),
        ("SpotPrice", "0", "SpotPrice must be above 0"),
        ("Price", "nan", "Price must be above 0"),
        ("Price", "cheap", "Price must be a number, got 'cheap'"),
        ("AcceleratorCount", "12", "AcceleratorCount must be one of (1, 2, 4, 8, 16), got '12'"),
        ("AcceleratorName", "T5", "unknown AcceleratorName 'T5'"),
        ("Price", "5.26", "times the median"),
    ],
)
def test_a_bad_row_is_named(table, column, value, message):
    table[0][column] = value
    rows = [",".join(table[0]), *(",".join(f'"{v}"' for v in row.values()) for row in table)]
    with pytest.raises(InputError) as error:
        parse_prices("\n".join(rows), "mine.csv")
    assert str(error.value).startswith("mine.csv:2: ")
    assert message in str(error.value)


def test_an_outlier_needs_a_reason(table):
    row = next(row for row in table if row["Checked"])
    assert row["InstanceType"] == "gpu_8x_v100_n"
    row["Checked"] = ""
    rows = [",".join(table[0]), *(",".join(f'"{v}"' for v in row.values()) for row in table)]
    with pytest.raises(InputError, match=r"gpu_8x_v100_n costs 0\.79 USD per V100-16GB-hour"):
        parse_prices("\n".join(rows))


def test_prices_are_dated():
    assert all(entry.as_of and entry.source for entry in prices())
    assert snapshot_id().startswith("2026-11-09-")
    assert age_days(date(2026, 11, 22)) == 13


def test_a_price_reads_as_one_line():
    assert str(price(system())) == (
        "aws/us-east-1/on_demand c7i.xlarge 0.044625 USD/vCPU-hour (2026)"
    )


def test_every_canonical_id_of_the_design_is_there_with_what_an_estimate_needs():
    ids = [
        "A100-40GB",
        "A100-80GB",
        "A100-64GB",
        "H100-80GB",
        "H100-64GB",
        "H100-96GB",
        "H200-141GB",
        "B200-180GB",
        "L4-24GB",
        "A10G-24GB",
        "L40S-48GB",
        "V100-16GB",
        "V100-32GB",
        "T4-16GB",
        "RTX3090",
        "RTX4090",
        "RTX5090",
        "RTX5060Ti-16GB",
        "RTXPRO6000-96GB",
        "A6000",
        "A40",
        "GH200",
    ]
    for entry in map(gpu, ids):
        assert entry.memory_gib is not None
        assert entry.memory_gb_per_s is not None
        assert entry.compute_capability is not None
        assert entry.compute_capability < 8 or entry.bf16_tflops is not None
    # fp32 accumulation, which training uses: half of what the boxes of consumer cards say.
    assert gpu("RTX4090").bf16_tflops == 165.2
    assert gpu("RTXPRO6000").compute_capability == 12.0
