"""The prices in force, and who pays how much for what.

Shipped: `data/prices.csv` and the ratios of `data/apple_normalised.csv`. The file that
$THRIFTLM_PRICES names, a price table (.csv) or rates (.yaml), replaces what is shipped for each
cloud, GPU and market that it prices. It is read once a process.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from datetime import date
from difflib import get_close_matches
from functools import cache, lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

from thriftlm.catalog import gpu, gpus, rows, shipped
from thriftlm.price_tables import NORMALISED, Market, Price, parse_prices, read_rates
from thriftlm.spec import InputError, SystemSpec

Billing = Literal["whole_node", "pro_rata"]

VARIABLE = "THRIFTLM_PRICES"
"""Environment variable that names a file of prices of one's own."""


class NoOfferError(InputError):
    """A system that no price in force is for."""


class Table(NamedTuple):
    """Every price in force."""

    prices: list[Price]
    newest: str
    """Date of the newest price of a table. One's own rates do not count: they say nothing about
    the age of list prices."""
    snapshot_id: str


def offers() -> list[Price]:
    """Every price in force, on-demand once per region and spot once per zone.

    Raises:
        InputError: the file that $THRIFTLM_PRICES names is missing or wrong.
    """
    return _table(os.environ.get(VARIABLE, "")).prices


def snapshot_id() -> str:
    """Newest date among the prices and eight digits of the SHA-256 of all of them."""
    return _table(os.environ.get(VARIABLE, "")).snapshot_id


def age_days(today: date) -> int:
    """Days since the newest price of a table was read."""
    return days_since(_table(os.environ.get(VARIABLE, "")).newest, today)


def days_since(as_of: str, today: date) -> int:
    """Days since a date of the tables; a month or year without day is as old as its first."""
    year, month, day = (*map(int, as_of.split("-")), 1, 1)[:3]
    return (today - date(year, month, day)).days


@cache
def _table(file: str) -> Table:
    listed = [*parse_prices(shipped("prices.csv")), *_normalised_prices()]
    text = shipped("prices.csv") + shipped("apple_normalised.csv")
    own, rates = _own(Path(file), listed) if file else ([], [])
    found = _replaced(_replaced(listed, own), rates)
    newest = max(price.as_of for price in (*listed, *own))
    text += "".join(price.model_dump_json() for price in (*own, *rates))
    return Table(found, newest, f"{newest}-{hashlib.sha256(text.encode()).hexdigest()[:8]}")


def _own(path: Path, listed: list[Price]) -> tuple[list[Price], list[Price]]:
    """Prices of a file: those of a table and those of rates, one of the two empty."""
    if path.suffix not in {".csv", ".yaml", ".yml"} or not path.is_file():
        rule = "must name a .csv or .yaml file that exists"
        raise InputError(f"${VARIABLE} {rule}, got '{path}'; correct or unset it")
    if path.suffix != ".csv":
        return [], read_rates(path, listed)
    try:
        return parse_prices(path.read_text(encoding="utf-8"), str(path)), []
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"${VARIABLE}: cannot read {path}: {error}") from error


def _replaced(listed: list[Price], own: list[Price]) -> list[Price]:
    named = {(price.cloud, price.gpu, price.market) for price in own}
    return [p for p in listed if (p.cloud, p.gpu, p.market) not in named] + own


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
        NoOfferError: no such price; names where there is one.
        InputError: the file that $THRIFTLM_PRICES names is missing or wrong.
    """
    return _cheapest(_demand(system))


def gpus_billed(system: SystemSpec) -> int:
    """GPUs paid for, idle ones of whole nodes included; for `cpu`, vCPUs."""
    demand = _demand(system)
    return _billed(_cheapest(demand), demand)


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


def _cheapest(demand: Demand) -> Price:
    return _offer(demand, os.environ.get(VARIABLE, ""))


@lru_cache(maxsize=4096)
def _offer(demand: Demand, file: str) -> Price:
    wanted = (demand.gpu, demand.cloud, demand.market)
    found = [p for p in _table(file).prices if (p.gpu, p.cloud, p.market) == wanted]
    found = [p for p in found if demand.region in (None, p.region)]
    if not found:
        raise NoOfferError(_no_offer(demand))
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
