"""What a trial costs beside its training: plain Tune-plus-Train, cold gangs, and warm ones.

    .venv/bin/python tests/benchmarks/warm_gangs.py [WORKERS ...]

Twelve trials one after the other of the same tiny runs, each way in a Ray of its own. Plain is what
Ray's guide shows: a Tune function trial that calls `TorchTrainer.fit()`. The other two are
`thriftlm search`, with and without `--cold`. Added seconds of a trial are those from its allocation
to its release (plain: in which the Tune trial's function ran) without those from the beginning of
`train()` on its first worker to its last checkpoint, which that checkpoint holds.

Prints a table and writes it to results/warm_gangs.md.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from thriftlm.search.cluster.gang import ON_THE_HEAD
from thriftlm.search.history.journal import Allocated, Released, Suggested, read

TRIALS = 12
TARGET = 50.0
RESULTS = Path(__file__).parent / "results" / "warm_gangs.md"
SETTINGS = {
    "data.tokenizer": "bpe:512",
    "data.seq_len": 64,
    "space.model.n_layers": [2],
    "space.model.d_model": 32,
    "space.optim.batch_tokens": 1024,
    "space.system.micro_batch": 8,
    "search_budget": "{trials: 12, usd: 1}",
    "search.algorithm": "random",
    "search.scheduler": "none",
    "search.max_concurrent": 1,
    "search.fidelity": "{max_tokens: 16384, validation_tokens: 2048}",
}
STRATEGIES = {1: "single", 2: "ddp"}
WAYS = ("plain", "cold", "warm")


def searched(storage: Path, workers: int, *options: str) -> list[float]:
    """Added seconds of the trials of a search."""
    fields = SETTINGS | {
        "space.system.n_gpus": workers,
        "space.system.strategy": STRATEGIES[workers],
    }
    sets = [part for key, value in fields.items() for part in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "thriftlm", "search", "quickstart", "--storage", str(storage)]
    subprocess.run([*command, *sets, *options], check=True, stdout=subprocess.DEVNULL)
    folder = storage / "searches" / "quickstart"
    began: dict[str, float] = {}
    added = []
    for event in read(folder / "journal.jsonl"):
        match event:
            case Allocated(trial_id=trial_id, at=at):
                began[trial_id] = at
            case Released(trial_id=trial_id, at=at):
                trained = trained_seconds(folder / "trials" / trial_id)
                added.append(at - began[trial_id] - trained)
    return added


def trained_seconds(output: Path) -> float:
    """Seconds of `train()` up to its last checkpoint."""
    last = max(path for path in output.iterdir() if path.name.startswith("step_"))
    return float(json.loads((last / "state.json").read_text())["spent"]["seconds"])


def plain(storage: Path, runs: list[dict[str, Any]]) -> list[float]:
    """Added seconds of the same runs in Tune trials that each start Ray Train."""
    import ray
    from ray import tune

    ray.init(num_cpus=os.cpu_count(), include_dashboard=True, log_to_driver=False)
    tuner = tune.Tuner(
        # Of no CPU, or two workers on two cores would be waited for for ever.
        tune.with_resources(plain_trial, tune.PlacementGroupFactory([ON_THE_HEAD])),
        param_space={
            "run": tune.grid_search([json.dumps(run) for run in runs]),
            "storage": str(storage),
        },
        tune_config=tune.TuneConfig(max_concurrent_trials=1, reuse_actors=True),
        run_config=tune.RunConfig(storage_path=str(storage / "ray"), verbose=0),
    )
    found = [result.metrics for result in tuner.fit()]
    ray.shutdown()
    return [float(metrics["added"]) for metrics in found]


def plain_trial(config: dict[str, Any]) -> None:
    """Ray's pattern for a Train run inside a Tune trial."""
    from ray import train as ray_train
    from ray import tune
    from ray.train.torch import TorchConfig, TorchTrainer

    began = time.perf_counter()
    run = json.loads(config["run"])
    name = tune.get_context().get_trial_id()
    trainer = TorchTrainer(
        plain_worker,
        train_loop_config=config | {"name": name},
        scaling_config=ray_train.ScalingConfig(num_workers=run["system"]["n_gpus"]),
        torch_config=TorchConfig(backend="gloo"),
        run_config=ray_train.RunConfig(name=name, storage_path=str(Path(config["storage"]) / "t")),
    )
    trainer.fit()
    seconds = time.perf_counter() - began
    tune.report({"added": seconds - trained_seconds(Path(config["storage"]) / "trials" / name)})


def plain_worker(config: dict[str, Any]) -> None:
    """One rank of such a run."""
    from thriftlm.spec import RunSpec
    from thriftlm.training.loop import Decision, train

    storage = Path(config["storage"])
    train(
        RunSpec.model_validate_json(config["run"]),
        lambda progress, written: Decision.CONTINUE,
        cache=storage / "data",
        output=storage / "trials" / config["name"],
    )


def measured(workers: int) -> dict[str, list[float]]:
    """Added seconds of every way, with so many workers."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        storage = Path(folder)
        for way in ("warm", "cold"):
            found[way] = searched(storage / way, workers, *(["--cold"] if way == "cold" else []))
        events = read(storage / "warm/searches/quickstart/journal.jsonl")
        runs = [e.run.model_dump(mode="json") for e in events if isinstance(e, Suggested)]
        (storage / "plain").mkdir()
        (storage / "plain/data").symlink_to(storage / "warm/data")
        found["plain"] = plain(storage / "plain", runs)
    return found


def table(found: dict[int, dict[str, list[float]]]) -> str:
    lines = [
        f"Measured {datetime.now(UTC):%Y-%m-%d} on {os.cpu_count()} CPU cores: added seconds per "
        f"trial, median of {TRIALS} and in brackets smallest and largest; the largest of a warm "
        "search is its first trial, which starts the gang.",
        "",
        f"| workers | {' | '.join(WAYS)} | plain / warm | target |",
        "|---" * (len(WAYS) + 3) + "|",
    ]
    for workers, ways in found.items():
        cells = [
            f"{np.median(ways[way]):.2f} ({min(ways[way]):.2f} to {max(ways[way]):.2f})"
            for way in WAYS
        ]
        ratio = float(np.median(ways["plain"]) / np.median(ways["warm"]))
        verdict = f"{TARGET:g}x" + ("" if ratio >= TARGET else ", missed")
        lines.append(f"| {workers} | {' | '.join(cells)} | {ratio:.0f}x | {verdict} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    asked = [int(word) for word in sys.argv[1:]] or list(STRATEGIES)
    text = table({workers: measured(workers) for workers in asked})
    print(text)
    RESULTS.write_text(text)


if __name__ == "__main__":
    main()
