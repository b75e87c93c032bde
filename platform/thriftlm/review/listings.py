"""What there is: published shapes, hardware and prices, shipped spaces."""

from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

from thriftlm import catalog, prices
from thriftlm.config_file import space_files
from thriftlm.price_refresh import refresh
from thriftlm.review.tables import Column, fitted, plain_console
from thriftlm.review.wording import STALE_PRICE_DAYS, limits, optional, usd
from thriftlm.search.spaces.space import load_space
from thriftlm_models.config import ModelSpec
from thriftlm_models.counts import FLOP_FORMULA, applied_params, flops_per_token, stored_params
from thriftlm_models.presets import presets

LISTED_SEQ_LEN = 2048
LISTED_REFUSALS = 10


def model_rows() -> list[dict[str, Any]]:
    """Every preset with its counts; FLOPs per token by `6N+attn`.

    Those are at 2,048 tokens, or at the end of learned positions where that comes first.
    """
    rows = []
    for name, fields in presets().items():
        model = ModelSpec.model_validate({"preset": name})
        rows.append(
            {
                "name": name,
                "stored_params": stored_params(model),
                "applied_params": applied_params(model),
                "flops_per_token": flops_per_token(
                    model, min(LISTED_SEQ_LEN, model.max_positions or LISTED_SEQ_LEN)
                ),
                "source": fields["source"],
            }
        )
    return rows


def show_models(rows: list[dict[str, Any]]) -> None:
    """Print the presets."""
    names = ("stored params", "applied params", "GFLOPs/token")
    columns = [Column("model"), *(Column(name, is_number=True) for name in names)]
    cells = [
        [
            row["name"],
            f"{row['stored_params']:,}",
            f"{row['applied_params']:,}",
            f"{row['flops_per_token'] / 1e9:.2f}",
        ]
        for row in rows
    ]
    console = plain_console()
    console.print(fitted(columns, cells, console.width))
    console.print(
        f"[dim]training FLOPs per token by {FLOP_FORMULA}, at {LISTED_SEQ_LEN:,} tokens "
        "(fewer where learned positions end)[/]"
    )


def gpu_rows() -> list[dict[str, Any]]:
    """Every GPU of the catalog with its prices."""
    offers = prices.offers()
    return [
        gpu.model_dump() | {"prices": [p.model_dump() for p in offers if p.gpu == name]}
        for name, gpu in catalog.gpus().items()
    ]


def show_gpus(rows: list[dict[str, Any]]) -> None:
    """Print the hardware, with the cheapest on-demand USD per GPU-hour of each cloud."""
    offers = {row["id"]: cheapest(row["prices"]) for row in rows}
    clouds = sorted({cloud for lowest in offers.values() for cloud in lowest})
    today = datetime.now(UTC).date()
    columns = [
        Column("gpu"),
        Column("bf16 TFLOP/s", is_number=True, dispensable=2),
        Column("fp32", is_number=True, dispensable=3),
        Column("GiB", is_number=True, dispensable=1),
        Column("GB/s", is_number=True, dispensable=2),
        *(Column(cloud, is_number=True) for cloud in clouds),
    ]
    cells = [
        [
            row["id"],
            *(optional(row[key], "g") for key in ("bf16_tflops", "fp32_tflops")),
            optional(row["usable_memory_gib"], ".3g"),
            optional(row["memory_gb_per_s"], "g"),
            *(_dated(offers[row["id"]].get(cloud), today) for cloud in clouds),
        ]
        for row in rows
    ]
    console = plain_console()
    console.print(fitted(columns, cells, console.width))
    console.print(
        "[dim]cheapest on-demand price per GPU-hour in each cloud; cpu per vCPU-hour\n"
        f"  * read over {STALE_PRICE_DAYS} days ago; --refresh reads today's\n"
        "dense peaks in TFLOP/s, fp32 without TF32; GiB as the driver reports them where known\n"
        f"prices {prices.snapshot_id()}, newest {prices.age_days(today)} days old[/]"
    )


def _dated(offer: dict[str, Any] | None, today: date) -> str:
    if offer is None:
        return "-"
    stale = prices.days_since(offer["as_of"], today) > STALE_PRICE_DAYS
    return usd(offer["usd_per_gpu_hour"]) + ("*" if stale else " ")


def cheapest(offers: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The on-demand offer with the lowest USD per GPU-hour, by cloud."""
    lowest: dict[str, dict[str, Any]] = {}
    for offer in offers:
        if offer["market"] == "on_demand" and not offer["normalised"]:
            known = lowest.setdefault(offer["cloud"], offer)
            if offer["usd_per_gpu_hour"] < known["usd_per_gpu_hour"]:
                lowest[offer["cloud"]] = offer
    return lowest


def refreshed(out: Path) -> dict[str, Any]:
    """Write today's list prices to a file; what came and what was refused."""
    found = refresh(out)
    return {
        "file": str(out.resolve()),
        "rows": len(found.table.rows),
        "gpus": len({price.gpu for price in found.table.prices}),
        "clouds": sorted({price.cloud for price in found.table.prices}),
        "clouds_without_answer": found.silent,
        "refused": found.table.refused,
        "not_in_catalog": found.left_out,
    }


def show_refreshed(found: dict[str, Any]) -> None:
    """Print what a refresh brought, and how it takes effect."""
    console = plain_console()
    refused = found["refused"]
    for reason in refused[:LISTED_REFUSALS]:
        console.print(f"refused: {reason}", markup=False)
    if len(refused) > LISTED_REFUSALS:
        console.print(f"... and {len(refused) - LISTED_REFUSALS} more: --json lists them all")
    if missing := found["clouds_without_answer"]:
        console.print(f"[yellow]nothing from {', '.join(missing)}: their shipped prices stay[/]")
    if others := found["not_in_catalog"]:
        console.print(f"[dim]not in the catalog: {', '.join(others)}[/]")
    console.print(
        f"{found['rows']:,} rows of {found['gpus']} GPUs in {', '.join(found['clouds'])}; "
        f"{len(refused):,} refused\nuse them: export {prices.VARIABLE}={found['file']}",
        markup=False,
        soft_wrap=True,
    )


def space_rows() -> list[dict[str, Any]]:
    """Every shipped space."""
    rows = []
    for name, path in space_files().items():
        space = load_space(name)
        rows.append(
            {
                "name": name,
                "file": str(path),
                "varied": list(space.domains),
                "algorithm": space.search.algorithm,
                "search_budget": space.search_budget.model_dump(),
            }
        )
    return rows


def show_spaces(rows: list[dict[str, Any]]) -> None:
    """Print the spaces."""
    columns = [
        Column("space"),
        Column("search budget", dispensable=1),
        Column("varies"),
        Column("file", dispensable=2),
    ]
    cells = [
        [
            row["name"],
            limits(row["search_budget"]),
            ", ".join(path.rpartition(".")[2] for path in row["varied"]),
            row["file"],
        ]
        for row in rows
    ]
    console = plain_console()
    console.print(fitted(columns, cells, console.width))
