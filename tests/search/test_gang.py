"""A live gang on real Ray: trials and a probe one after the other on the same workers."""

import json
from pathlib import Path

import pytest
import ray

from thriftlm.search.cluster.driver import cluster
from thriftlm.search.cluster.exchange import Exchange
from thriftlm.search.cluster.gang import ON_THE_HEAD, hold
from thriftlm.spec import DataSpec, OptimSpec, Progress, RunSpec, SystemSpec
from thriftlm.timings import Timing
from thriftlm.training.mixture import build
from thriftlm_models.config import ModelSpec

BATCH_TOKENS, STEPS = 1024, 8


def run_on(system: SystemSpec, corpus: Path, lr: float = 1e-3) -> RunSpec:
    return RunSpec(
        model=ModelSpec(n_layers=2, d_model=32, n_heads=2, d_ff=96, vocab=512),
        optim=OptimSpec(lr=lr, batch_tokens=BATCH_TOKENS),
        data=DataSpec(corpus=str(corpus), tokenizer="bpe:512", seq_len=64),
        system=system,
        tokens=STEPS * BATCH_TOKENS,
        report_every_tokens=BATCH_TOKENS,
        validation_tokens=2048,
    )


def ask(exchange, run: RunSpec, folder: Path, *systems: SystemSpec, until: int | None = None):
    """The news of a job, to its outcome."""
    job = {
        "run": run.model_dump_json(),
        "trial_id": run.trial_id,
        "branch": None,
        "systems": [system.model_dump_json() for system in systems],
        "known_tokens": 0,
        "until_tokens": until,
        "folder": str(folder),
    }
    assert ray.get(exchange.begin.remote("gang", job))
    news = []
    while not news or "outcome" not in news[-1]:
        news += ray.get(exchange.news.remote(run.trial_id), timeout=300)
    return [*news[:-1], news[-1]["outcome"]]


def losses(news) -> list[float]:
    return [Progress.model_validate_json(one["progress"]).train_loss for one in news[:-1]]


@pytest.mark.slow
@pytest.mark.ray
def test_one_gang_serves_trials_of_other_strategies_and_a_probe(tmp_path, corpus):
    cache, folder = tmp_path / "cache", tmp_path / "search"
    for made in (cache, folder):
        made.mkdir()
    pair = {"n_gpus": 2, "micro_batch": 8}
    ddp, full, zero = (
        SystemSpec(strategy=strategy, **pair) for strategy in ("ddp", "fsdp_full", "zero1")
    )
    build(run_on(ddp, corpus).data, cache)
    with cluster(None):
        exchange = Exchange.remote()
        held = hold.options(resources=ON_THE_HEAD).remote(
            "gang", ddp, exchange, str(folder), str(cache)
        )
        first = ask(exchange, run_on(ddp, corpus), folder)
        sharded = ask(exchange, run_on(full, corpus), folder)
        *timed, outcome = ask(exchange, run_on(ddp, corpus, lr=2e-3), folder, full, zero, ddp)
        paused = ask(exchange, run_on(zero, corpus), folder, until=3 * BATCH_TOKENS)
        ray.get(exchange.dismiss.remote("gang"))
        ray.get(held, timeout=60)
    assert first[-1]["status"] == sharded[-1]["status"] == outcome["status"] == "done"
    assert len(losses(first)) == STEPS
    assert losses(sharded) == pytest.approx(losses(first), abs=1e-5)
    timings = [Timing.model_validate(json.loads(one["timing"])) for one in timed]
    assert [timing.system for timing in timings] == [full, zero, ddp]
    assert all(t.status == "timed" and t.low <= t.tokens_per_s <= t.high for t in timings)
    assert paused[-1]["status"] == "stopped"
    assert losses(paused) == pytest.approx(losses(first)[:3], abs=1e-5)
