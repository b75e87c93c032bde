"""List prices of today, fetched by gpuhunt (the extra `prices`) and written as a price table.

gpuhunt has a row per instance, market and place, what the instance costs being all in. Here
on-demand and spot are one row per region, and every row passes the checks that the shipped table
passes or is reported.
"""

import csv
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, date, datetime
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from thriftlm.catalog import Row, gpu, gpus, shipped
from thriftlm.price_tables import COLUMNS, MEMORY_TOLERANCE, Sifted, parse_prices, sift
from thriftlm.spec import InputError

CLOUDS = {
    "aws": "aws",
    "azure": "azure",
    "gcp": "gcp",
    "lambdalabs": "lambda",
    "runpod": "runpod",
}
"""Clouds of the shipped table by gpuhunt's name."""
NOT_ON_DEMAND = frozenset(("gcp-dws-calendar-mode", "gcp-g4-preview", "runpod-cluster"))
"""gpuhunt's flags of offers that one cannot just ask for: reserved, preview, several nodes."""
FOLDER_VARIABLE = "GPUHUNT_CATALOG_DIR"
"""gpuhunt's own: a folder with a CSV per provider, which it reads instead of the network."""


class Item(Protocol):
    """What is used of gpuhunt's `CatalogItem`."""

    provider: str
    instance_name: str
    location: str
    price: float
    cpu: int
    memory: float
    gpu_count: int
    gpu_name: str | None
    gpu_memory: float | None
    spot: bool
    flags: list[str]


class Origin(NamedTuple):
    """Where a provider's items come from."""

    source: str
    as_of: date


class Refreshed(NamedTuple):
    """What a refresh brought."""

    table: Sifted
    left_out: dict[str, int]
    """Offers of GPUs that the catalog does not have, by gpuhunt's name and memory."""
    silent: list[str]
    """Clouds that gave nothing."""


def refresh(out: Path) -> Refreshed:
    """Write the list prices that gpuhunt has today.

    Raises:
        InputError: gpuhunt is not installed, has nothing, or `out` cannot be written.
    """
    if out.suffix != ".csv":
        raise InputError(f"--refresh: must name a .csv file, got '{out}'")
    items, origins = _fetched()
    table, left_out = table_of(items, origins)
    silent = [cloud for cloud in CLOUDS.values() if cloud not in {p.cloud for p in table.prices}]
    if not table.rows:
        refused = f"; the first refused: {table.refused[0]}" if table.refused else ""
        raise InputError(f"gpuhunt gave no price of a GPU of the catalog{refused}")
    _write(table.rows, out)
    return Refreshed(table, left_out, silent)


def table_of(items: Iterable[Item], origins: Mapping[str, Origin]) -> tuple[Sifted, dict[str, int]]:
    """The price table of gpuhunt's items, and what the catalog does not have."""
    named, left_out = _named(items)
    return sift((_place(row), row) for row in _paired(named, origins)), left_out


# --- gpuhunt ------------------------------------------------------------------------------------


def _fetched() -> tuple[list[Item], dict[str, Origin]]:
    try:
        import gpuhunt
    except ImportError as error:
        raise InputError(
            "--refresh needs gpuhunt: pip install 'gpuhunt>=0.1.34' (or 'thriftlm[prices]')"
        ) from error
    logging.getLogger("gpuhunt").setLevel(logging.CRITICAL)  # it prints a traceback per provider
    catalog = gpuhunt.Catalog(balance_resources=False, auto_reload=False)
    if not os.environ.get(FOLDER_VARIABLE):
        try:
            catalog.load()
        except (gpuhunt.GPUHuntError, OSError) as error:
            raise InputError(
                f"gpuhunt: {error} ({error.__cause__}); it needs the network, or "
                f"${FOLDER_VARIABLE} with a folder of its CSVs"
            ) from error
    items: list[Item] = []
    for provider in CLOUDS:
        try:
            items += catalog.query(provider=provider, gpu_vendor="nvidia", min_gpu_count=1)
        except OSError:
            continue  # a folder without this provider; the answer names it
    return items, {provider: _origin(catalog, provider) for provider in CLOUDS}


def _origin(catalog: Any, provider: str) -> Origin:
    from importlib.metadata import version

    tool = f"gpuhunt {version('gpuhunt')} {provider}"
    if folder := os.environ.get(FOLDER_VARIABLE):
        file = Path(folder) / f"{provider}.csv"
        written = file.stat().st_mtime if file.is_file() else 0
        return Origin(f"{tool} from {file}", datetime.fromtimestamp(written, UTC).date())
    loaded = catalog.catalog.get(provider)
    name = loaded.version if loaded else ""
    day = re.match(r"(\d{4})(\d\d)(\d\d)", name)
    as_of = date(*map(int, day.groups())) if day else datetime.now(UTC).date()
    return Origin(f"{tool} catalog {name}", as_of)


# --- items to rows ------------------------------------------------------------------------------


def _named(items: Iterable[Item]) -> tuple[list[tuple[str, Item]], dict[str, int]]:
    """Items with the canonical id of their GPU; the others counted by name and memory."""
    found: list[tuple[str, Item]] = []
    left_out: Counter[str] = Counter()
    for item in items:
        if NOT_ON_DEMAND.isdisjoint(item.flags) and not _is_community(item):
            if key := _gpu_id(item):
                found.append((key, item))
            else:
                left_out[f"{item.gpu_name} {item.gpu_memory or 0:g}GB"] += 1
    return found, dict(left_out.most_common())


def _is_community(item: Item) -> bool:
    """RunPod's community hosts stand in a country, its own in a data centre such as US-KS-2."""
    return item.provider == "runpod" and "-" not in item.location


def _gpu_id(item: Item) -> str | None:
    """Canonical id: gpuhunt says neither PCIe nor SXM, the instance often does."""
    name = f"{item.gpu_name}"
    sized = f"{name} {item.gpu_memory:g}GB" if item.gpu_memory else name
    guesses = [_gpu_of_instance().get((CLOUDS[item.provider], item.instance_name)), sized, name]
    if "pcie" in item.instance_name.casefold():
        guesses.insert(0, f"{sized} PCIe")
    key = next((key for guess in guesses if guess and (key := _known(guess))), None)
    nominal = gpus()[key].memory_gib if key else None
    if item.gpu_memory and nominal and abs(item.gpu_memory / nominal - 1) > MEMORY_TOLERANCE:
        return None  # a slice of one, or another card of that name
    return key


def _known(name: str) -> str | None:
    try:
        return gpu(name).id
    except InputError:
        return None


@cache
def _gpu_of_instance() -> dict[tuple[str, str], str]:
    """What the shipped table says of an instance: Lambda's gpu_1x_a100 is PCIe."""
    prices = parse_prices(shipped("prices.csv"))
    return {(price.cloud, price.instance): price.gpu for price in prices}


def _paired(
    named: Iterable[tuple[str, Item]], origins: Mapping[str, Origin]
) -> Iterator[dict[str, str]]:
    """A row for each instance and region: its cheapest on-demand price and its cheapest spot."""
    groups: dict[tuple[str, str, str, int, str], list[Item]] = {}
    for key, item in named:
        at = (item.provider, _instance(item), _region(item), item.gpu_count, key)
        groups.setdefault(at, []).append(item)
    for (provider, instance, region, count, key), offers in sorted(groups.items()):
        spot = min((o for o in offers if o.spot), key=_usd, default=None)
        on_demand = min((o for o in offers if not o.spot), key=_usd, default=None)
        any_of_them = offers[0]
        yield {
            "cloud": CLOUDS[provider],
            "InstanceType": instance,
            "AcceleratorName": str(any_of_them.gpu_name),
            "AcceleratorCount": f"{count}",
            "vCPUs": f"{any_of_them.cpu or ''}",
            "MemoryGiB": f"{any_of_them.memory or ''}",
            "Price": f"{on_demand.price:.10g}" if on_demand else "",
            "SpotPrice": f"{spot.price:.10g}" if spot else "",
            "Region": region,
            "AvailabilityZone": spot.location if spot and spot.location != region else "",
            "Source": origins[provider].source,
            "AsOf": origins[provider].as_of.isoformat(),
            "Gpu": key,
        }


def _usd(item: Item) -> float:
    return item.price


def _instance(item: Item) -> str:
    """RunPod's instance is a GPU, of which one takes as many as one likes."""
    if item.provider == "runpod":
        return f"{item.gpu_count}x {item.instance_name}"
    return item.instance_name


def _region(item: Item) -> str:
    """Google's places are zones."""
    return item.location.rpartition("-")[0] if item.provider == "gcp" else item.location


def _place(row: Row) -> str:
    return f"{row['cloud']}/{row['Region']} {row['InstanceType']}"


def _write(table: list[Row], out: Path) -> None:
    columns = [*COLUMNS[:5], "MemoryGiB", *COLUMNS[5:], "Gpu"]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(table)
    except OSError as error:
        raise InputError(f"--refresh: cannot write {out}: {error}") from error
