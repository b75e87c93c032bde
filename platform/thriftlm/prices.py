"""Prices, each with its source and date, and who pays how much for what.

`data/prices.csv` has SkyPilot's columns and four more: `Gpu` (canonical id, where SkyPilot's name
does not say PCIe or SXM), `Checked` (why a price far from the others is right), and `Source` with
`AsOf`. Prices there are USD per instance and hour.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from datetime import date
from difflib import get_close_matches
from functools import cache, lru_cache
from statistics import median
from typing import Literal, NamedTuple

from pydantic import PositiveFloat, PositiveInt

from thriftlm.catalog import NODE_SHAPES, Row, gpu, gpus, rows, shipped
from thriftlm.spec import InputError, Spec, SystemSpec

Market = Literal["on_demand", "spot"]
Billing = Literal["whole_node", "pro_rata"]

NORMALISED = "apple_normalised"
"""The cloud whose unit is not USD: ratios of arXiv 2410.19456, A100-40GB = 1."""
OUTLIER_FACTOR = 3.0
"""A price further than this from the median of its GPU is taken for a mistake."""
GPU_COUNTS = (1, 2, 4, 8, 16)


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


@cache
def offers() -> list[Price]:
    """Every price of the catalog, on-demand once per region and spot once per zone."""
    return [*parse_prices(shipped("prices.csv")), *_normalised_prices()]


def parse_prices(text: str, name: str = "prices.csv") -> list[Price]:
    """Prices of a CSV in SkyPilot's columns plus cloud, Source and AsOf, checked row by row.

    Raises:
        InputError: a row breaks a rule; names the row.
    """
    found = {entry: where for where, row in rows(name, text) for entry in _row_prices(row, where)}
    _refuse_outliers(found, {where for where, row in rows(name, text) if row.get("Checked")})
    return list(found)


def _row_prices(row: Row, where: str) -> Iterator[Price]:
    on_demand, spot = _positive(row, "Price", where), _positive(row, "SpotPrice", where)
    if on_demand is None and spot is None:
        raise InputError(f"{where}: neither Price nor SpotPrice; give one or drop the row")
    if on_demand is not None and spot is not None and spot > on_demand:
        raise InputError(f"{where}: SpotPrice must not exceed Price: {spot:g} > {on_demand:g}")
    if on_demand is not None:
        yield _price_of_row(row, where, on_demand, "on_demand")
    if spot is not None and spot != on_demand:  # equal means that there is no spot signal
        yield _price_of_row(row, where, spot, "spot")


def _price_of_row(row: Row, where: str, usd: float, market: Market) -> Price:
    count = _units(row, where)
    return Price(
        gpu=_row_gpu(row, where),
        usd_per_gpu_hour=usd / count,
        cloud=row["cloud"],
        region=row["Region"],
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
        raise InputError(f"{where}: {column} must be one of {GPU_COUNTS}, got '{row[column]}'")
    return int(count)


def _row_gpu(row: Row, where: str) -> str:
    if not row["AcceleratorName"]:
        return "cpu"
    by_skypilot = {entry.skypilot_name: key for key, entry in reversed(gpus().items())}
    found = row.get("Gpu") or (by_skypilot | NODE_SHAPES).get(row["AcceleratorName"])
    if found not in gpus():
        raise InputError(f"{where}: unknown AcceleratorName '{row['AcceleratorName']}'")
    return found


def _positive(row: Row, column: str, where: str) -> float | None:
    text = row[column]
    try:
        value = float(text) if text else None
    except ValueError as error:
        raise InputError(f"{where}: {column} must be a number, got '{text}'") from error
    if value is not None and not 0 < value < float("inf"):
        raise InputError(f"{where}: {column} must be above 0, got '{text}'")
    return value


def _refuse_outliers(found: Mapping[Price, str], checked: set[str]) -> None:
    for key in {entry.gpu for entry in found}:
        listed = {p: at for p, at in found.items() if (p.gpu, p.market) == (key, "on_demand")}
        middle = median(p.usd_per_gpu_hour for p in listed) if listed else 0.0
        for entry, where in listed.items():
            ratio = entry.usd_per_gpu_hour / middle
            if where not in checked and not 1 / OUTLIER_FACTOR <= ratio <= OUTLIER_FACTOR:
                raise InputError(
                    f"{where}: {entry.instance} costs {entry.usd_per_gpu_hour:g} USD per "
                    f"{key}-hour, {ratio:.2g} times the median {middle:g}; correct it, or say "
                    "in the column Checked why it is right"
                )


def _normalised_prices() -> Iterator[Price]:
    for _, row in rows("apple_normalised.csv", shipped("apple_normalised.csv")):
        yield Price(
            gpu=row["Gpu"],
            usd_per_gpu_hour=float(row["Ratio"]),
            cloud=NORMALISED,
            region=None,
            zone=None,
            market="on_demand",
            instance="single-GPU",
            gpus_per_instance=1,
            as_of=row["AsOf"],
            source=row["Source"],
            normalised=True,
        )


def snapshot_id() -> str:
    """Newest date among the prices and eight digits of the table's SHA-256."""
    digest = hashlib.sha256((shipped("prices.csv") + shipped("apple_normalised.csv")).encode())
    return f"{_newest()}-{digest.hexdigest()[:8]}"


def age_days(today: date) -> int:
    """Days since the newest price was read."""
    year, month, day = (*map(int, _newest().split("-")), 1, 1)[:3]
    return (today - date(year, month, day)).days


def _newest() -> str:
    return max(entry.as_of for entry in offers())


# --- what a system costs ------------------------------------------------------------------------


class Demand(NamedTuple):
    """What a system asks of a cloud. Units are GPUs, for `cpu` vCPUs."""

    gpu: str
    units: int
    units_per_node: int | None
    cloud: str
    region: str | None
    market: Market
    billing: Billing


def price(system: SystemSpec) -> Price:
    """The price that a system pays: of the instances that hold it, the one that costs least.

    An instance holds a system when it has as many GPUs as the system puts on one node
    (`gpus_per_node`, else the catalog's); where none is that large, the largest does.

    Raises:
        InputError: no such price; names where there is one.
    """
    return _offer(_demand(system))


def gpus_billed(system: SystemSpec) -> int:
    """GPUs paid for, idle ones of whole nodes included; for `cpu`, vCPUs."""
    demand = _demand(system)
    return _billed(_offer(demand), demand)


def usd_per_hour(system: SystemSpec) -> float:
    """USD per hour of everything billed for a system (A100-40GB hours for `apple_normalised`)."""
    return price(system).usd_per_gpu_hour * gpus_billed(system)


def _demand(system: SystemSpec) -> Demand:
    key = gpu(system.gpu).id
    each = system.cpus_per_worker if key == "cpu" else 1
    shared = key == "cpu" or system.cloud == NORMALISED
    return Demand(
        gpu=key,
        units=system.n_gpus * each,
        units_per_node=system.gpus_per_node and system.gpus_per_node * each,
        cloud=system.cloud,
        region=system.region,
        market=system.market,
        billing=system.billing or ("pro_rata" if shared else "whole_node"),
    )


@lru_cache(maxsize=4096)
def _offer(demand: Demand) -> Price:
    wanted = (demand.gpu, demand.cloud, demand.market)
    found = [p for p in offers() if (p.gpu, p.cloud, p.market) == wanted]
    found = [p for p in found if demand.region in (None, p.region)]
    if not found:
        raise InputError(_no_offer(demand))
    per_node = demand.units_per_node or gpus()[demand.gpu].gpus_per_node or demand.units
    largest = max(p.gpus_per_instance for p in found)
    least = min(demand.units, per_node, largest)
    return min((p for p in found if p.gpus_per_instance >= least), key=_cost_for(demand))


def _cost_for(demand: Demand) -> Callable[[Price], tuple[float, int, str, str]]:
    def cost(offer: Price) -> tuple[float, int, str, str]:
        usd = offer.usd_per_gpu_hour * _billed(offer, demand)
        # Rounded: the same price per GPU differs in its last bit between instance sizes.
        return round(usd, 9), offer.gpus_per_instance, offer.region or "", offer.instance

    return cost


def _billed(offer: Price, demand: Demand) -> int:
    if demand.billing == "pro_rata":
        return demand.units
    per_node = min(demand.units_per_node or demand.units, offer.gpus_per_instance)
    return -(-demand.units // per_node) * offer.gpus_per_instance


def _no_offer(demand: Demand) -> str:
    clouds = sorted({p.cloud for p in offers()})
    if demand.cloud not in clouds:
        near = get_close_matches(demand.cloud, clouds, n=1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        return f"unknown cloud '{demand.cloud}'; {hint}known: {', '.join(clouds)}"
    place = " ".join(filter(None, (demand.cloud, demand.region)))
    known = {f"{p.cloud} {p.region or ''} {p.market}" for p in offers() if p.gpu == demand.gpu}
    listed = ", ".join(sorted(known)) or "no cloud"
    return f"cloud {place} has no {demand.market} price for {demand.gpu}; there is: {listed}"
