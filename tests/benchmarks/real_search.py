"""The factored search beside Optuna's joint search, for real: tiny models on this CPU.

    .venv/bin/python tests/benchmarks/real_search.py [SEEDS [RECORDS.json]]

Each algorithm searches the quickstart's space with the same dollars, on real Ray, with the same
seeds in turn; `optuna` with asha, both on warm gangs. Then each winner is trained over its training
budget by `thriftlm train`, alone on the machine, and its validation loss is what counts. A search
that ends without an answer has lost. Records are added to those of the file.

Prints a table and writes it to results/real_search.md.
"""

import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import yaml

ALGORITHMS = ("factored", "optuna")
TRAINING_USD, SEARCH_USD = 0.0005, 0.002
SETTINGS = {
    "training_budget": f"{{usd: {TRAINING_USD}}}",
    "search_budget": f"{{usd: {SEARCH_USD}}}",
    "search.scheduler": "auto",
    "search.fidelity": "{min_tokens: 32768, max_tokens: 393216, report_every_tokens: 16384, "
    "validation_tokens: 8192}",
    "space.model.n_layers": [1, 2, 3, 4],
    "space.model.d_model": [32, 64, 96],
    "space.optim.lr": "{loguniform: [5e-4, 5e-2]}",
}
RESULTS = Path(__file__).parent / "results" / "real_search.md"


def thriftlm(*words: str, launcher: Sequence[str] = ()) -> dict[str, Any]:
    """The JSON of a command."""
    command = [sys.executable, *launcher, "-m", "thriftlm", *words, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if not done.stdout:
        sys.exit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def searched(storage: Path, algorithm: str, seed: int) -> dict[str, Any]:
    """One search, and what its winner came to."""
    fields = SETTINGS | {"search.algorithm": algorithm, "search.seed": seed}
    sets = [part for key, value in fields.items() for part in ("--set", f"{key}={value}")]
    name = f"{algorithm}-{seed}"
    place = ["--storage", str(storage)]
    found = thriftlm("search", "quickstart", "--name", name, *place, *sets)
    counted = {"algorithm": algorithm, "seed": seed, "trials": len(found["trials"])}
    counted["spent"] = found["spent_usd"]
    if found["best"] is None:
        return counted | {"what": "no answer", "predicted": np.nan, "loss": np.inf, "usd": 0.0}
    best = storage / "searches" / name / "best.yaml"
    ranks = yaml.safe_load(best.read_text())["system"]["n_gpus"]
    trained = trained_by(ranks, best, storage)
    return counted | {
        "predicted": found["best"]["loss_at_budget"],
        "loss": trained["val_loss"],
        "usd": trained["usd"],
        "what": described(found["best"]["config"]),
    }


def trained_by(ranks: int, run: Path, storage: Path) -> dict[str, Any]:
    """The JSON of training a run, under torchrun where it has several workers."""
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", str(ranks))
    words = ("train", str(run), "--storage", str(storage))
    return thriftlm(*words, launcher=torchrun if ranks > 1 else ())


def described(config: dict[str, Any]) -> str:
    model, system = config["model"], config["system"]
    return (
        f"{model['n_layers']} layers {model['sharing']}, width {model['d_model']}, lr "
        f"{config['optim']['lr']:.3g}, {system['n_gpus']} x {system['strategy']}, micro batch "
        f"{system['micro_batch']}"
    )


def table(rows: list[dict[str, Any]]) -> str:
    medians = {
        name: float(np.median([row["loss"] for row in rows if row["algorithm"] == name]))
        for name in ALGORITHMS
    }
    pairs = len(rows) // len(ALGORITHMS)
    by = {(row["algorithm"], row["seed"]): row["loss"] for row in rows}
    won = sum(by["factored", seed] < by["optuna", seed] for seed in range(pairs))
    lines = [
        f"Measured {datetime.now(UTC):%Y-%m-%d} on {os.cpu_count()} CPU cores: "
        f"${SEARCH_USD:g} for each search, ${TRAINING_USD:g} for each winner's training. Loss is "
        "validation loss in nats per token after that training, measured; predicted is what the "
        "search had promised.",
        "",
        f"Median loss of the winner: factored {medians['factored']:.4f}, optuna with asha "
        f"{medians['optuna']:.4f}; factored was lower in {won} of {pairs} seeds.",
        "",
        "| seed | algorithm | trials | search USD | winner | predicted | loss | training USD |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['seed']} | {row['algorithm']} | {row['trials']} | {row['spent']:.5f} | "
        f"{row['what']} | {row['predicted']:.3f} | {row['loss']:.4f} | {row['usd']:.5f} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    seeds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    records = Path(sys.argv[2]) if len(sys.argv) > 2 else None
    rows = json.loads(records.read_text()) if records and records.exists() else []
    there = {(row["seed"], row["algorithm"]) for row in rows}
    with tempfile.TemporaryDirectory() as folder:
        for seed, algorithm in itertools.product(range(seeds), ALGORITHMS):
            if (seed, algorithm) in there:
                continue
            rows.append(searched(Path(folder), algorithm, seed))
            print(rows[-1], flush=True)
            if records:
                records.write_text(json.dumps(rows))
    text = table(rows)
    print(text)
    RESULTS.write_text(text)


if __name__ == "__main__":
    main()
