"""What there is: published shapes, hardware and prices, shipped spaces, token shards."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from thriftlm import catalog
from thriftlm.config_file import space_files
from thriftlm.search.space import load_space
from thriftlm.spec import DataSpec
from thriftlm.training.shards import build
from thriftlm_models.config import (
    ModelSpec,
    applied_params,
    flops_per_token,
    presets,
    stored_params,
)

LISTED_SEQ_LEN = 2048
STALE_PRICE_DAYS = 90
"""Age from which a listing warns that prices have moved since."""


def model_rows() -> list[dict[str, Any]]:
    """Every preset with its counts; FLOPs per token at 2,048 tokens, formula `6N+attn`."""
    rows = []
    for name, fields in presets().items():
        model = ModelSpec.model_validate({"preset": name})
        rows.append(
            {
                "name": name,
                "stored_params": stored_params(model),
                "applied_params": applied_params(model),
                "flops_per_token": flops_per_token(model, LISTED_SEQ_LEN),
                "source": fields["source"],
            }
        )
    return rows


def show_models(rows: list[dict[str, Any]]) -> None:
    """Print the presets."""
    table = _table("model", "stored params", "applied params", "GFLOPs/token", right=3)
    for row in rows:
        table.add_row(
            row["name"],
            f"{row['stored_params']:,}",
            f"{row['applied_params']:,}",
            f"{row['flops_per_token'] / 1e9:.2f}",
        )
    console = Console(highlight=False)
    console.print(table)
    console.print(f"[dim]training FLOPs by 6N+attn at {LISTED_SEQ_LEN} tokens[/]")


def gpu_rows() -> list[dict[str, Any]]:
    """Every GPU of the catalog with its prices."""
    offers = catalog.prices()
    return [
        gpu.model_dump() | {"prices": [p.model_dump() for p in offers if p.gpu == name]}
        for name, gpu in catalog.gpus().items()
    ]


def show_gpus(rows: list[dict[str, Any]]) -> None:
    """Print the hardware with the cheapest on-demand price of each cloud."""
    table = _table("gpu", "bf16 TFLOP/s", "GiB", "GB/s", "USD/GPU-hour, cheapest of each cloud")
    for row in rows:
        numbers = (row["bf16_tflops"], row["memory_gib"], row["memory_gb_per_s"])
        table.add_row(
            row["id"],
            *("-" if number is None else f"{number:g}" for number in numbers),
            cheapest(row["prices"]) or "no price",
        )
    console = Console(highlight=False)
    console.print(table)
    age = catalog.age_days(datetime.now(UTC).date())
    console.print(f"[dim]prices {catalog.snapshot_id()}, {age} days old; cpu is per vCPU-hour[/]")
    if age > STALE_PRICE_DAYS:
        console.print(f"[yellow]warning: prices are over {STALE_PRICE_DAYS} days old[/]")


def cheapest(offers: list[dict[str, Any]]) -> str:
    """The lowest on-demand USD price of each cloud, in one line."""
    lowest: dict[str, float] = {}
    for offer in offers:
        if offer["market"] == "on_demand" and not offer["normalised"]:
            cloud, usd = offer["cloud"], offer["usd_per_gpu_hour"]
            lowest[cloud] = min(usd, lowest.get(cloud, usd))
    return "  ".join(f"{cloud} {usd:.3g}" for cloud, usd in sorted(lowest.items()))


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
    table = _table("space", "varies", "file")
    for row in rows:
        varied = ", ".join(path.rpartition(".")[2] for path in row["varied"])
        table.add_row(row["name"], varied, row["file"])
    Console(highlight=False).print(table)


def build_shards(corpus: str, tokenizer: str, cache: Path) -> dict[str, Any]:
    """Build token shards; where they are and what they hold."""
    console = Console(stderr=True, highlight=False)
    data = DataSpec(corpus=corpus, tokenizer=tokenizer)
    with console.status("reading") as status:
        shards = build(data, cache, lambda stage, done: status.update(f"{stage} {done:.0%}"))
    return {
        "folder": str(shards.path),
        "train_tokens": shards.n_tokens("train"),
        "validation_tokens": shards.n_tokens("validation"),
        "vocab": shards.vocab,
        "bytes_per_token": round(shards.bytes_per_token("train"), 3),
    }


def _table(*names: str, right: int = 0) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, name in enumerate(names):
        table.add_column(name, justify="right" if 0 < index <= right else "left", no_wrap=True)
    return table
