"""Runs in processes that have run others before: they give what new processes give."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("consecutive_ranks.py")
STEPS, BATCH_TOKENS = 6, 256
TOGETHER = ("ddp", "fsdp_full", "hsdp", "zero1", "zero3")
ALONE: dict[str, dict[str, Any]] = {
    "single": {},
    "fsdp_full": {"cpu_offload": True},
    "zero3": {"cpu_offload": True},
}
Found = dict[str, list[dict[str, Any]]]


def run_of(bench: Any, n_ranks: int, strategy: str, seed: int) -> Any:
    """Seed 0 is the run whose losses count, another one comes before it, on another model."""
    more = ALONE[strategy] if n_ranks == 1 else {"gpus_per_node": 1}
    spec = bench.spec(
        tokens=STEPS * BATCH_TOKENS,
        seed=seed,
        model={"d_model": 32 + 16 * seed, "head_dim": 8, "sharing": "none"},
        system={"strategy": strategy, "n_gpus": n_ranks, "micro_batch": 4 // n_ranks} | more,
    )
    return spec.model_dump(mode="json")


def strategies(n_ranks: int) -> tuple[str, ...]:
    return tuple(ALONE) if n_ranks == 1 else TOGETHER


@pytest.fixture(scope="module")
def found(bench: Any, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """By name of the chain: what each of its runs gave."""
    folder = tmp_path_factory.mktemp("consecutive")
    chains = []
    for n_ranks in (1, 2):
        pairs = [
            run_of(bench, n_ranks, strategy, seed)
            for strategy in strategies(n_ranks)
            for seed in (1, 0)
        ]
        chains.append({"name": f"{n_ranks}-warm", "ranks": n_ranks, "runs": pairs})
        chains += [
            {
                "name": f"{n_ranks}-{strategy}",
                "ranks": n_ranks,
                "runs": [run_of(bench, n_ranks, strategy, 0)],
            }
            for strategy in strategies(n_ranks)
        ]
    (folder / "chains.json").write_text(json.dumps({"cache": str(bench.cache), "chains": chains}))
    ended = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder)],
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return {
        chain["name"]: json.loads((folder / f"{chain['name']}.json").read_text())
        for chain in chains
    }


def numbers(one: dict[str, Any]) -> list[Any]:
    fields = ("status", "tokens", "train_loss", "val_loss", "grad_norm")
    return [[report[field] for field in fields] for report in one["measured"]["curve"]]


@pytest.mark.parametrize(
    ("n_ranks", "strategy"), [(n, name) for n in (1, 2) for name in strategies(n)]
)
def test_a_run_after_others_gives_the_losses_of_new_processes_bit_for_bit(n_ranks, strategy, found):
    after = found[f"{n_ranks}-warm"][2 * strategies(n_ranks).index(strategy) + 1]
    fresh = found[f"{n_ranks}-{strategy}"][0]
    assert len(numbers(fresh)) == STEPS
    assert numbers(after) == numbers(fresh)


@pytest.mark.parametrize("n_ranks", [1, 2])
def test_nothing_of_a_run_stays(n_ranks, found):
    for one in found[f"{n_ranks}-warm"]:
        assert one["alive"] == 0
        assert one["groups"] == (n_ranks > 1)
