"""A small table of recorded runs: nine recipes on four systems of the base space."""

import itertools

import numpy as np

from thriftlm.records import write_rows

LAYERS, RATES = (2, 4, 8), (3e-4, 3e-3, 3e-2)
MICRO_BATCHES, ATTENTIONS = (1, 2), ("math", "flash")
SPEED = {1: 1000.0, 2: 1500.0}
USD_PER_HOUR = 0.5
TOKENS = [int(tokens) for tokens in np.geomspace(8192, 800_000, 9)]
BUDGET_USD = 0.05
"""Buys 540,000 tokens on the best system: 0.05 / 0.5 hours at 1,500 tokens per second."""
SEARCH = {"min_tokens": 20_000, "max_tokens": 540_000}


def space(lab, **changes):
    search = {"algorithm": "random", "scheduler": "none", "max_concurrent": 1, "fidelity": SEARCH}
    usual = {
        "search": search,
        "training_budget": {"usd": BUDGET_USD},
        "search_budget": {"usd": 3 * BUDGET_USD},
    }
    return lab.space(
        optim={"lr": {"loguniform": [1e-4, 1e-1]}, "schedule": "constant"},
        system={"micro_batch": list(MICRO_BATCHES), "attention": list(ATTENTIONS)},
        **(usual | changes),
    )


def loss(layers, rate, tokens):
    return 2 + 20 / layers**0.5 / 10 + 40 / tokens**0.35 + 0.05 * abs(np.log(rate / 3e-3))


def rows(speed=SPEED, ends=lambda layers, rate, micro: "done", tokens=TOKENS):
    """One row per report; a run that is out of memory has one, one that diverges three."""
    found = []
    for number, (layers, rate, micro, attention) in enumerate(
        itertools.product(LAYERS, RATES, MICRO_BATCHES, ATTENTIONS)
    ):
        status = ends(layers, rate, micro)
        reports = {"oom": [0], "diverged": tokens[:3]}.get(status, tokens)
        factor = 1.0 if attention == "flash" else 0.6
        for at in reports:
            is_last = at == reports[-1]
            broke = is_last and status in ("oom", "diverged")
            found.append(
                {
                    "run_id": f"run{number}",
                    "model.n_layers": layers,
                    "optim.lr": rate,
                    "system.micro_batch": micro,
                    "system.attention": attention,
                    "params": 1000 * layers,
                    "tokens": at,
                    "loss": None if broke else loss(layers, rate, at),
                    "tokens_per_s": None if status == "oom" else speed[micro] * factor,
                    "usd_per_hour": USD_PER_HOUR,
                    "status": status if is_last else "running",
                }
            )
    return found


def write(folder, **changes):
    path = folder / "runs.parquet"
    write_rows(rows(**changes), path)
    return path


def spot_rows(discount=0.4, **changes):
    """The table on both markets; spot costs a share of the on-demand price."""
    found = []
    for market, price in (("on_demand", USD_PER_HOUR), ("spot", discount * USD_PER_HOUR)):
        for row in rows(**changes):
            name = f"{row['run_id']}-{market}"
            found.append(row | {"run_id": name, "system.market": market, "usd_per_hour": price})
    return found
