"""The worker of a gang: trains its rank of one trial after another.

Apart from `gang`, so that a worker process need not import Tune.
"""

from pathlib import Path
from typing import Any

import ray
from ray import train as ray_train

from thriftlm.spec import Measurement, Progress, RunSpec

EXCHANGE_PATIENCE_SECONDS = 30.0


def serve(config: dict[str, Any]) -> None:
    """The Ray Train worker: runs the jobs of its gang until that is dismissed.

    Args:
        config: `exchange` (the actor), `gang`, `cache` (of shards), `first` (number of its first
            job) and `starts_lost` (how often gangs were lost in that job).
    """
    from thriftlm.training.consecutive import between_runs

    exchange, number = config["exchange"], config["first"]
    rank = ray_train.get_context().get_world_rank()
    while (job := ray.get(exchange.job.remote(config["gang"], number))) is not None:
        measured = train_one(job, exchange, Path(config["cache"]), rank)
        if rank == 0:
            starts_lost = config["starts_lost"] if number == config["first"] else 0
            ray.get(exchange.ended.remote(config["gang"], success(measured, starts_lost)))
        del measured
        between_runs()
        number += 1


def success(measured: Measurement, starts_lost: int) -> dict[str, str | None]:
    """How a trial that came to an end of its own is recorded."""
    reason = measured.final.detail
    if starts_lost:
        reason = f"{reason} (a worker was lost {starts_lost} time(s), the trial went on)".strip()
    return {"status": measured.status, "reason": reason, "checkpoint": measured.checkpoint}


def train_one(job: dict[str, Any], exchange: Any, cache: Path, rank: int) -> Measurement:
    """Train one rank of a trial.

    Args:
        job: `run` (RunSpec as JSON), `trial_id`, `known_tokens` (up to which the journal has its
            curve), `until_tokens` (at which it ends early, None for never) and `folder` (of the
            search).
        exchange: who hears of it.
        cache: folder of token shards.
        rank: of this worker.

    Raises:
        OutOfMemoryOnOneRankError: noted with the exchange; the launcher must end the other ranks.
    """
    from thriftlm.training.loop import Decision, OutOfMemoryOnOneRankError, train

    trial_id, until = job["trial_id"], job["until_tokens"]
    origin = {"origin": f"{Path(job['folder']).name}/{trial_id}"}
    spec = RunSpec.model_validate_json(job["run"]).model_copy(update=origin)

    def report(progress: Progress, written: Path | str | None) -> Decision:
        if rank != 0 or progress.tokens <= job["known_tokens"]:
            return Decision.CONTINUE  # a resumed run reports its whole curve again
        told = exchange.report.remote(
            trial_id,
            progress.tokens,
            progress.model_dump_json(),
            str(written) if written else None,
        )
        must_end = ray.get(told, timeout=EXCHANGE_PATIENCE_SECONDS)
        is_there = until is not None and progress.tokens >= until
        return Decision.STOP if must_end or is_there else Decision.CONTINUE

    try:
        return train(
            spec,
            report,
            cache=cache,
            output=Path(job["folder"]) / "trials" / trial_id,
            go_on=True,
        )
    except OutOfMemoryOnOneRankError as error:
        ray.get(
            exchange.note_memory.remote(trial_id, str(error)), timeout=EXCHANGE_PATIENCE_SECONDS
        )
        raise
