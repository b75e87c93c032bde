"""gpuhunt's catalog as a price table.

Where gpuhunt is installed it reads the rows below itself; else a stand-in with the same attributes
does. Run by hand on 2026-11-24 with gpuhunt 0.1.34: these tests, and `Catalog.load()` against a
local server that published the same rows as zips.
"""

import csv
import importlib.metadata
import sys
from datetime import UTC, date, datetime
from importlib.util import find_spec
from types import SimpleNamespace

import pytest

from thriftlm.price_refresh import Origin, refresh, table_of
from thriftlm.prices import VARIABLE, offers, price, snapshot_id
from thriftlm.review.listings import refreshed, show_refreshed
from thriftlm.spec import InputError, SystemSpec

COLUMNS = (
    "instance_name,location,price,cpu,memory,gpu_count,gpu_name,gpu_memory,spot,disk_size,"
    "gpu_vendor,flags,cpu_arch,provider_data"
)
CATALOG = {
    "aws": """
p4d.24xlarge,us-east-1,21.957642,96,1152,8,A100,40,False,,nvidia,,x86,{}
p4d.24xlarge,us-east-1,11.5,96,1152,8,A100,40,True,,nvidia,,x86,{}
g6f.large,us-east-1,0.2,2,8,1,L4,2.79,False,,nvidia,,x86,{}
g5.xlarge,us-east-1,1.006,4,16,1,A10G,22,False,,nvidia,,x86,{}
g5.xlarge,us-west-2,1.006,4,16,1,A10G,22,False,,nvidia,,x86,{}
g5.xlarge,mars-1,9.006,4,16,1,A10G,22,False,,nvidia,,x86,{}
c5.large,us-east-1,0.085,2,4,0,,,False,,,,x86,{}
""",
    "gcp": """
a3-highgpu-8g,us-central1-a,88.49,208,1872,8,H100,80,False,,nvidia,,x86,{}
a3-highgpu-8g,us-central1-b,30.1,208,1872,8,H100,80,True,,nvidia,,x86,{}
a3-highgpu-8g,us-central1-c,29.1,208,1872,8,H100,80,True,,nvidia,,x86,{}
a3-highgpu-8g,europe-west4-b,33.6,208,1872,8,H100,80,False,,nvidia,,x86,{}
a3-highgpu-8g,europe-west4-b,42.7,208,1872,8,H100,80,True,,nvidia,,x86,{}
a3-highgpu-8g,us-east4-a,20,208,1872,8,H100,80,False,,nvidia,gcp-dws-calendar-mode,x86,{}
""",
    "azure": """
Standard_NC40ads_H100_v5,eastus,6.98,40,320,1,H100,94,False,,nvidia,,x86,{}
Standard_ND96isr_H100_v5,eastus,98.32,96,1900,12,H100,80,False,,nvidia,,x86,{}
Standard_NC24ads_A100_v4,eastus,3.67,24,220,1,A100,80,False,,nvidia,,x86,{}
""",
    "lambdalabs": """
gpu_1x_a100,us-east-1,1.99,30,200,1,A100,40,False,512,nvidia,,x86,{}
gpu_1x_gh200,us-east-3,2.29,64,432,1,GH200,96,False,4096,nvidia,lambda-arm,arm,{}
""",
    "runpod": """
NVIDIA A100-SXM4-80GB,US-KS-2,1.79,16,125,1,A100,80,False,,nvidia,,x86,{}
NVIDIA A100 80GB PCIe,EU-RO-1,3.58,16,125,2,A100,80,False,,nvidia,,x86,{}
NVIDIA GeForce RTX 4090,US,0.34,16,125,1,RTX4090,24,False,,nvidia,,x86,{}
NVIDIA GeForce RTX 4090,EU-RO-1,0.74,16,125,1,RTX4090,24,False,,nvidia,,x86,{}
AMD Instinct MI300X,EU-RO-1,2.22,16,125,1,MI300X,192,False,,amd,,x86,{}
NVIDIA RTX 2000 Ada,EU-RO-1,0.3,16,125,1,RTX2000Ada,16,False,,nvidia,,x86,{}
""",
}


def stand_in(folder):
    """A module that reads a folder of CSVs as gpuhunt does."""

    class Catalog:
        def __init__(self, *, balance_resources, auto_reload):
            pass

        def query(self, *, provider, gpu_vendor, min_gpu_count):
            text = (folder / f"{provider}.csv").read_text()
            for row in csv.DictReader(text.splitlines()):
                if row["gpu_vendor"] == gpu_vendor and int(row["gpu_count"]) >= min_gpu_count:
                    yield SimpleNamespace(
                        provider=provider,
                        instance_name=row["instance_name"],
                        location=row["location"],
                        price=float(row["price"]),
                        cpu=int(row["cpu"]),
                        memory=float(row["memory"]),
                        gpu_count=int(row["gpu_count"]),
                        gpu_name=row["gpu_name"],
                        gpu_memory=float(row["gpu_memory"]),
                        spot=row["spot"] == "True",
                        flags=row["flags"].split(),
                    )

    return SimpleNamespace(Catalog=Catalog, GPUHuntError=ValueError)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for provider, rows in CATALOG.items():
        (tmp_path / f"{provider}.csv").write_text(COLUMNS + rows)
    monkeypatch.setenv("GPUHUNT_CATALOG_DIR", str(tmp_path))
    if find_spec("gpuhunt") is None:
        monkeypatch.setitem(sys.modules, "gpuhunt", stand_in(tmp_path))
        monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.1.34")
    return tmp_path


def test_a_catalog_becomes_a_table_that_prices_systems(folder, monkeypatch):
    before = snapshot_id()
    found = refresh(folder / "out" / "own.csv")
    monkeypatch.setenv(VARIABLE, str(folder / "out" / "own.csv"))
    today = datetime.now(UTC).date().isoformat()
    read = {(p.cloud, p.gpu, p.market, p.region): p for p in offers() if "gpuhunt" in p.source}
    assert set(read.values()) == set(found.table.prices)
    assert {key: p.usd_per_gpu_hour for key, p in read.items()} == {
        ("aws", "A100-40GB", "on_demand", "us-east-1"): pytest.approx(21.957642 / 8),
        ("aws", "A100-40GB", "spot", "us-east-1"): pytest.approx(11.5 / 8),
        ("aws", "A10G-24GB", "on_demand", "us-east-1"): 1.006,
        ("aws", "A10G-24GB", "on_demand", "us-west-2"): 1.006,
        ("azure", "A100-80GB-PCIe", "on_demand", "eastus"): 3.67,
        ("azure", "H100-94GB-NVL", "on_demand", "eastus"): 6.98,
        ("gcp", "H100-80GB", "on_demand", "us-central1"): pytest.approx(88.49 / 8),
        ("gcp", "H100-80GB", "spot", "us-central1"): pytest.approx(29.1 / 8),
        ("lambda", "A100-40GB-PCIe", "on_demand", "us-east-1"): 1.99,
        ("lambda", "GH200", "on_demand", "us-east-3"): 2.29,
        ("runpod", "A100-80GB", "on_demand", "US-KS-2"): 1.79,
        ("runpod", "A100-80GB-PCIe", "on_demand", "EU-RO-1"): 1.79,
        ("runpod", "RTX4090", "on_demand", "EU-RO-1"): 0.74,  # US is a community host
    }
    spot = read["gcp", "H100-80GB", "spot", "us-central1"]
    assert spot.zone == "us-central1-c"
    version = importlib.metadata.version("gpuhunt")
    assert spot.source == f"gpuhunt {version} gcp from {folder}/gcp.csv"
    assert all(p.as_of == today for p in read.values())
    assert snapshot_id().startswith(today)
    assert snapshot_id() != before
    assert price(SystemSpec(gpu="T4")).source.startswith("skypilot-catalog")  # not refreshed: stays


def test_what_a_refresh_does_not_believe_is_reported(folder, capsys):
    found = refreshed(folder / "own.csv")
    refused = "\n".join(found["refused"])
    assert "azure/eastus Standard_ND96isr_H100_v5: AcceleratorCount must be one of" in refused
    assert "gcp/europe-west4 a3-highgpu-8g: SpotPrice must not exceed Price: 42.7 > 33.6" in refused
    assert "aws/mars-1 g5.xlarge: g5.xlarge costs 9.006 USD per A10G-24GB-hour, 9 times" in refused
    assert len(found["refused"]) == 3
    assert found["not_in_catalog"] == {"L4 2.79GB": 1, "RTX2000Ada 16GB": 1}
    show_refreshed(found)
    said = capsys.readouterr().out
    assert "refused: azure/eastus" in said
    assert f"export THRIFTLM_PRICES={folder}/own.csv" in said


def test_a_provider_that_does_not_answer_is_named(folder):
    (folder / "azure.csv").unlink()
    assert refresh(folder / "own.csv").silent == ["azure"]


def test_nothing_is_written_where_nothing_came(folder):
    for provider in CATALOG:
        (folder / f"{provider}.csv").write_text(COLUMNS)
    with pytest.raises(InputError, match="gpuhunt gave no price of a GPU of the catalog"):
        refresh(folder / "own.csv")
    assert not (folder / "own.csv").exists()


@pytest.mark.parametrize("name", ["own.yaml", "own"])
def test_a_refresh_is_a_csv(folder, name):
    with pytest.raises(InputError, match=r"--refresh: must name a \.csv file"):
        refresh(folder / name)


def test_without_gpuhunt_a_refresh_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gpuhunt", None)
    with pytest.raises(InputError) as error:
        refresh(tmp_path / "own.csv")
    assert str(error.value) == (
        "--refresh needs gpuhunt: pip install 'gpuhunt>=0.1.34' (or 'thriftlm[prices]')"
    )


def test_a_slice_of_a_gpu_is_not_the_gpu():
    item = SimpleNamespace(
        **{"provider": "aws", "instance_name": "x", "location": "us-east-1", "price": 1.0},
        **{"cpu": 4, "memory": 16.0, "gpu_count": 1, "spot": False, "flags": []},
        **{"gpu_name": "H100", "gpu_memory": 40.0},
    )
    table, left_out = table_of([item], {"aws": Origin("a test", date(2026, 11, 24))})
    assert (table.rows, left_out) == ([], {"H100 40GB": 1})
