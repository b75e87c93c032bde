import csv
from datetime import date
from importlib.resources import files

import pytest

from thriftlm.price_tables import parse_prices
from thriftlm.prices import age_days, gpus_billed, offers, price, snapshot_id, usd_per_hour
from thriftlm.spec import InputError, SystemSpec


def system(**fields):
    strategy = "ddp" if fields.get("n_gpus", 1) > 1 else "single"
    return SystemSpec(**({"strategy": strategy} | fields))


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
    assert not any(entry.normalised for entry in offers() if entry.cloud != "apple_normalised")
    assert gpus_billed(system(gpu="H100", cloud="apple_normalised", n_gpus=2)) == 2


def test_spot_is_the_cheapest_zone_that_has_a_spot_signal():
    found = price(system(gpu="A100-40GB", market="spot"))
    assert (found.zone, found.usd_per_gpu_hour) == ("use1-az2", pytest.approx(6.5323 / 8))
    # use1-az1 lists p5.48xlarge at SpotPrice == Price: no signal, so no row.
    zones = {p.zone for p in offers() if p.instance == "p5.48xlarge" and p.market == "spot"}
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


@pytest.mark.parametrize(
    ("key", "cloud", "usd"),
    [
        ("RTX3090", "runpod", 0.50),
        ("RTX4090", "runpod", 0.74),
        ("RTX5090", "runpod", 0.99),
        ("RTXPRO6000", "runpod", 2.09),
        ("RTXPRO6000", "aws", 3.36312),
        ("A40", "runpod", 0.49),
        ("A6000", "lambda", 1.09),
        ("GH200", "lambda", 2.29),
    ],
)
def test_cards_are_priced_where_they_are_rented(key, cloud, usd):
    found = price(system(gpu=key, cloud=cloud))
    assert found.usd_per_gpu_hour == pytest.approx(usd)
    assert found.market == "on_demand"


@pytest.fixture
def table():
    text = files("thriftlm").joinpath("data/prices.csv").read_text()
    return list(csv.DictReader(text.splitlines()))


def text_of(table):
    rows = [",".join(table[0]), *(",".join(f'"{v}"' for v in row.values()) for row in table)]
    return "\n".join(rows)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("SpotPrice", "9.99", "SpotPrice must not exceed Price: 9.99 > 0.526"),
        ("SpotPrice", "0", "SpotPrice must be above 0"),
        ("Price", "0", "Price must be above 0"),
        ("Price", "nan", "Price must be above 0"),
        ("Price", "cheap", "Price must be a number, got 'cheap'"),
        ("AcceleratorCount", "12", "AcceleratorCount must be one of (1, 2, 4, 8, 16), got '12'"),
        ("AcceleratorCount", "2", "AcceleratorCount 2 contradicts GpuInfo, which counts 1"),
        ("AcceleratorName", "T5", "unknown AcceleratorName 'T5'"),
        ("Gpu", "T5", "unknown AcceleratorName 'T4'"),
        # RunPod's rows at SkyPilot have GiB in the field for MiB.
        ("GpuInfo", "{'Gpus': [{'Count': 1, 'MemoryInfo': {'SizeInMiB': 16}}]}", "GpuInfo says 0"),
        ("GpuInfo", "16 GiB", "GpuInfo must be SkyPilot's mapping, got '16 GiB'"),
        ("Price", "5.26", "times the median"),
        ("AsOf", "last week", "AsOf must be a date like 2026-11-24"),
        ("Source", "", "Source must say where it was read"),
    ],
)
def test_a_bad_row_is_named(table, column, value, message):
    table[0][column] = value
    with pytest.raises(InputError) as error:
        parse_prices(text_of(table), "mine.csv")
    assert str(error.value).startswith("mine.csv:2: ")
    assert message in str(error.value)


def test_a_row_needs_a_price(table):
    table[0] |= {"Price": "", "SpotPrice": ""}
    with pytest.raises(InputError, match="neither Price nor SpotPrice"):
        parse_prices(text_of(table))


def test_a_name_for_two_cards_is_told_apart_by_memory(table):
    # SkyPilot calls Azure's H100 NVL of 94 GB an H100.
    row = next(row for row in table if row["InstanceType"] == "Standard_NC40ads_H100_v5")
    row |= {"AcceleratorName": "H100", "Gpu": ""}
    row["GpuInfo"] = "{'Gpus': [{'Count': 1, 'MemoryInfo': {'SizeInMiB': 96256}}]}"
    with pytest.raises(InputError, match="GpuInfo says 94 GiB, H100-80GB has 80"):
        parse_prices(text_of(table))


def test_a_spot_price_that_is_the_list_price_is_no_signal(table):
    table[0]["SpotPrice"] = table[0]["Price"]
    (found,) = parse_prices(text_of(table[:1]))
    assert found.market == "on_demand"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cloud,Price\naws,1\n", "mine.csv: lacks the columns InstanceType, AcceleratorName"),
        ("", "mine.csv: holds no row"),
    ],
)
def test_a_table_has_its_columns(text, message):
    with pytest.raises(InputError) as error:
        parse_prices(text, "mine.csv")
    assert message in str(error.value)


def test_an_outlier_needs_a_reason(table):
    row = next(row for row in table if row["Checked"])
    assert row["InstanceType"] == "gpu_8x_v100_n"
    row["Checked"] = ""
    with pytest.raises(InputError, match=r"gpu_8x_v100_n costs 0\.79 USD per V100-16GB-hour"):
        parse_prices(text_of(table))


def test_prices_are_dated():
    assert all(entry.as_of and entry.source for entry in offers())
    assert snapshot_id().startswith("2026-11-09-")
    assert age_days(date(2026, 11, 22)) == 13


def test_a_price_reads_as_one_line():
    assert str(price(system())) == (
        "aws/us-east-1/on_demand c7i.xlarge 0.044625 USD/vCPU-hour (2026-02-09)"
    )
