"""What a price is, and how tables of them are read, each row checked.

A CSV has SkyPilot's columns and four more: `Gpu` (canonical id, where SkyPilot's name does not say
PCIe or SXM), `Checked` (why a price far from the others is right), and `Source` with `AsOf`. Prices
there are USD per instance and hour. A YAML file has rates per GPU and hour, like SkyPilot's for
Kubernetes and Slurm.
"""

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple

from pydantic import Field, PositiveFloat, PositiveInt

from thriftlm.catalog import NODE_SHAPES, Row, gpu, gpus, rows
from thriftlm.config_file import ConfigFile
from thriftlm.spec import InputError, Spec

Market = Literal["on_demand", "spot"]

NORMALISED = "apple_normalised"
"""The cloud whose unit is not USD: ratios of arXiv 2410.19456, A100-40GB = 1."""
OUTLIER_FACTOR = 3.0
"""A price further than this from the median of its GPU is taken for a mistake."""
MEMORY_TOLERANCE = 0.1
"""How far a table's memory may be from the catalog's: a 24 GB card reports 22.4 GiB."""
GPU_COUNTS = (1, 2, 4, 8, 16)
COLUMNS = (
    *("cloud", "InstanceType", "AcceleratorName", "AcceleratorCount", "vCPUs", "Price"),
    *("SpotPrice", "Region", "AvailabilityZone", "Source", "AsOf"),
)
"""What a table must have; `MemoryGiB`, `GpuInfo`, `Gpu` and `Checked` may be left out."""
DATED = re.compile(r"\d{4}(-\d\d(-\d\d)?)?")


class Price(Spec):
    """What one GPU costs for an hour on one kind of instance; for `cpu`, one vCPU."""

    gpu: str
    """Canonical id."""
    usd_per_gpu_hour: PositiveFloat
    """Instance price over its GPUs, in USD; without unit where `normalised`."""
    cloud: str
    region: str | None
    zone: str | None
    """Availability zone of a spot price."""
    market: Market
    instance: str
    gpus_per_instance: PositiveInt
    """GPUs of the instance; for `cpu`, its vCPUs."""
    as_of: str
    """Date of the price, to the month or year where the source says no more."""
    source: str
    normalised: bool = False
    """Whether the unit is A100-40GB hours instead of USD."""

    def __str__(self) -> str:
        place = "/".join(part for part in (self.cloud, self.region, self.market) if part)
        unit = "normalised" if self.normalised else "USD"
        each = "vCPU" if self.gpu == "cpu" else "GPU"
        return (
            f"{place} {self.instance} {self.usd_per_gpu_hour:g} {unit}/{each}-hour ({self.as_of})"
        )


# --- a CSV --------------------------------------------------------------------------------------


class Sifted(NamedTuple):
    """A table after the import checks."""

    rows: list[Row]
    prices: list[Price]
    """Of those rows, on-demand once per region and spot once per zone."""
    refused: list[str]
    """Why the other rows are wrong, each with its `file:line`."""


def parse_prices(text: str, name: str = "prices.csv") -> list[Price]:
    """Prices of a CSV, checked row by row.

    Raises:
        InputError: a column is missing, there is no row, or one breaks a rule; names the row.
    """
    listed = list(rows(name, text))
    missing = [column for column in COLUMNS if column not in listed[0][1]] if listed else []
    if missing or not listed:
        lacking = f"lacks the columns {', '.join(missing)}" if missing else "holds no row"
        raise InputError(f"{name}: {lacking}; a price table has {', '.join(COLUMNS)}")
    found = sift(listed)
    if found.refused:
        raise InputError(found.refused[0])
    return found.prices


def sift(listed: Iterable[tuple[str, Row]]) -> Sifted:
    """Rows that pass the import checks, their prices, and why the others do not."""
    priced, refused = [], []
    for where, row in listed:
        try:
            priced.append((where, row, list(_row_prices(row, where))))
        except InputError as error:
            refused.append(str(error))
    middles = _medians(price for _, _, of_row in priced for price in of_row)
    kept = []
    for where, row, of_row in priced:
        problem = None if row.get("Checked") else _outlier(of_row, middles)
        if problem:
            refused.append(f"{where}: {problem}")
        else:
            kept.append((row, of_row))
    unique = dict.fromkeys(price for _, of_row in kept for price in of_row)
    return Sifted([row for row, _ in kept], list(unique), refused)


def _row_prices(row: Row, where: str) -> Iterator[Price]:
    on_demand, spot = _positive(row, "Price", where), _positive(row, "SpotPrice", where)
    if on_demand is None and spot is None:
        raise InputError(f"{where}: neither Price nor SpotPrice; give one or drop the row")
    if on_demand is not None and spot is not None and spot > on_demand:
        raise InputError(f"{where}: SpotPrice must not exceed Price: {spot:g} > {on_demand:g}")
    if not DATED.fullmatch(row["AsOf"]) or not row["Source"]:
        raise InputError(
            f"{where}: AsOf must be a date like 2026-11-24 and Source must say where it was read, "
            f"got '{row['AsOf']}' and '{row['Source']}'"
        )
    if on_demand is not None:
        yield _price_of_row(row, where, on_demand, "on_demand")
    if spot is not None and spot != on_demand:  # equal means that there is no spot signal
        yield _price_of_row(row, where, spot, "spot")


def _price_of_row(row: Row, where: str, usd: float, market: Market) -> Price:
    count, key = _units(row, where), _row_gpu(row, where)
    _agree_with_info(row, where, count, key)
    return Price(
        gpu=key,
        usd_per_gpu_hour=usd / count,
        cloud=row["cloud"],
        region=row["Region"] or None,
        zone=(row["AvailabilityZone"] or None) if market == "spot" else None,
        market=market,
        instance=row["InstanceType"],
        gpus_per_instance=count,
        as_of=row["AsOf"],
        source=row["Source"],
    )


def _units(row: Row, where: str) -> int:
    """GPUs of the row's instance, vCPUs where it has no GPU."""
    column = "AcceleratorCount" if row["AcceleratorName"] else "vCPUs"
    count = _positive(row, column, where)
    whole = count is not None and count.is_integer()
    if count is None or not whole or (row["AcceleratorName"] and count not in GPU_COUNTS):
        rule = f"one of {GPU_COUNTS}" if row["AcceleratorName"] else "a whole number"
        raise InputError(f"{where}: {column} must be {rule}, got '{row[column]}'")
    return int(count)


def _row_gpu(row: Row, where: str) -> str:
    if not row["AcceleratorName"]:
        return "cpu"
    by_skypilot = {entry.skypilot_name: key for key, entry in reversed(gpus().items())}
    found = row.get("Gpu") or (by_skypilot | NODE_SHAPES).get(row["AcceleratorName"])
    if found not in gpus():
        raise InputError(
            f"{where}: unknown AcceleratorName '{row['AcceleratorName']}'; say the canonical id in "
            "the column Gpu: `thriftlm gpus` lists them"
        )
    return found


def _agree_with_info(row: Row, where: str, count: int, key: str) -> None:
    """SkyPilot's `GpuInfo` says count and memory again: Azure's once had 12 GPUs beside 8."""
    for entry in _gpu_info(row, where):
        said, mib = entry.get("Count"), entry.get("MemoryInfo", {}).get("SizeInMiB")
        if said is not None and said != count:
            raise InputError(
                f"{where}: AcceleratorCount {count} contradicts GpuInfo, which counts {said:g}; "
                "correct one of them"
            )
        nominal = gpus()[key].memory_gib
        if mib and nominal and abs(mib / 1024 / nominal - 1) > MEMORY_TOLERANCE:
            raise InputError(
                f"{where}: GpuInfo says {mib / 1024:g} GiB, {key} has {nominal:g}; correct it, or "
                "say the canonical id in the column Gpu"
            )


def _gpu_info(row: Row, where: str) -> list[dict[str, Any]]:
    text = row.get("GpuInfo") or "{'Gpus': []}"
    try:
        return list(ast.literal_eval(text)["Gpus"])
    except (ValueError, SyntaxError, KeyError, TypeError) as error:
        raise InputError(f"{where}: GpuInfo must be SkyPilot's mapping, got '{text}'") from error


def _positive(row: Row, column: str, where: str) -> float | None:
    text = row[column]
    try:
        value = float(text) if text else None
    except ValueError as error:
        raise InputError(f"{where}: {column} must be a number, got '{text}'") from error
    if value is not None and not 0 < value < float("inf"):
        raise InputError(f"{where}: {column} must be above 0, got '{text}'")
    return value


def _medians(prices: Iterable[Price]) -> dict[str, float]:
    """Median on-demand USD per GPU-hour by GPU. Spot prices differ by more than any factor."""
    listed: dict[str, list[float]] = {}
    for price in dict.fromkeys(prices):
        if price.market == "on_demand":
            listed.setdefault(price.gpu, []).append(price.usd_per_gpu_hour)
    return {key: median(usd) for key, usd in listed.items()}


def _outlier(of_row: Iterable[Price], middles: Mapping[str, float]) -> str | None:
    for price in of_row:
        if price.market == "on_demand":
            ratio = price.usd_per_gpu_hour / middles[price.gpu]
            if not 1 / OUTLIER_FACTOR <= ratio <= OUTLIER_FACTOR:
                return (
                    f"{price.instance} costs {price.usd_per_gpu_hour:g} USD per {price.gpu}-hour, "
                    f"{ratio:.2g} times the median {middles[price.gpu]:g}; correct it, or say in "
                    "the column Checked why it is right"
                )
    return None


# --- rates of one's own -------------------------------------------------------------------------


class Rates(Spec):
    """What one cloud or cluster costs; `cpu` is a GPU of the catalog like any other."""

    accelerators: dict[str, PositiveFloat] = Field(default_factory=dict)
    """USD per GPU-hour on demand, by any name of the GPU; for `cpu` per vCPU-hour."""
    spot: dict[str, PositiveFloat] = Field(default_factory=dict)
    """The same for spot."""
    gpus_per_node: PositiveInt | None = None
    """GPUs of one node, which is paid whole. Default: as the cloud's listed instances, else 1."""
    as_of: date
    """Since when the rates hold."""
    source: str = "your own rate"
    """Who says so."""


class RateFile(Spec):
    """A YAML file of rates."""

    clouds: dict[str, Rates]
    """By the name that `system.cloud` has; one that is shipped keeps its other prices."""


def read_rates(path: Path, listed: Iterable[Price]) -> list[Price]:
    """Prices of a YAML file of rates; where the cloud is listed, on the instances listed there.

    Raises:
        InputError: not such a file, an unknown GPU, a spot rate above the other.
    """
    file = ConfigFile.read(path)
    shapes: dict[tuple[str, str], list[Price]] = {}
    for price in listed:
        shapes.setdefault((price.cloud, price.gpu), []).append(price)
    found: list[Price] = []
    for cloud, rates in file.parse(RateFile).clouds.items():
        if cloud == NORMALISED or not (rates.accelerators or rates.spot):
            rule = "holds ratios" if cloud == NORMALISED else "has neither accelerators nor spot"
            raise file.error(("clouds", cloud), f"{rule}; give USD per GPU-hour of your own cloud")
        on_demand = _by_gpu(file, cloud, "accelerators", rates.accelerators)
        spot = _by_gpu(file, cloud, "spot", rates.spot)
        for key, usd in spot.items():
            if usd > on_demand.get(key, usd):
                raise file.error(
                    ("clouds", cloud, "spot"),
                    f"must not exceed accelerators: {key} {usd:g} > {on_demand[key]:g}",
                )
        by_market: dict[Market, dict[str, float]] = {"on_demand": on_demand, "spot": spot}
        for market, by_gpu in by_market.items():
            for key, usd in by_gpu.items():
                found += _at_rate(cloud, key, market, usd, rates, shapes.get((cloud, key), []))
    return list(dict.fromkeys(found))


def _by_gpu(
    file: ConfigFile, cloud: str, section: str, rates: Mapping[str, float]
) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, usd in rates.items():
        where = ("clouds", cloud, section, name)
        try:
            key = gpu(name).id
        except InputError as error:
            raise file.error(where, str(error)) from error
        if key in found:
            raise file.error(where, f"names {key} a second time; keep one of them")
        found[key] = usd
    return found


def _at_rate(
    cloud: str, key: str, market: Market, usd: float, rates: Rates, shapes: list[Price]
) -> Iterator[Price]:
    new = {
        "usd_per_gpu_hour": usd,
        "market": market,
        "as_of": rates.as_of.isoformat(),
        "source": rates.source,
    }
    known = [p for p in shapes if p.market == market] or shapes
    if known and rates.gpus_per_node is None:
        for price in known:
            yield price.model_copy(update={**new, "zone": price.zone if market == "spot" else None})
        return
    size = rates.gpus_per_node or 1
    yield Price.model_validate(
        new
        | {"gpu": key, "cloud": cloud, "region": None, "zone": None}
        | {"instance": f"{size}x {key}", "gpus_per_instance": size}
    )
