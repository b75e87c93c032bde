"""The worker of a gang: trains its rank of one trial after another.

Apart from `gang`, so that a worker process need not import Tune.
"""

from pathlib import Path
from typing import Any

import ray
from ray import train as ray_train

from thriftlm.search.cluster.exchange import Outcome
from thriftlm.search.history.journal import Branch
from thriftlm.spec import Measurement, Progress, RunSpec, SystemSpec
from thriftlm.timings import Timing

EXCHANGE_PATIENCE_SECONDS = 30.0


def serve(config: dict[str, Any]) -> None:
    """The Ray Train worker: runs the jobs of its gang until that is dismissed.

    Args:
        config: `exchange` (the actor), `gang`, `cache` (of shards), `first` (number of its first
            job) and `starts_lost` (how often gangs were lost in that job).
    """
    from thriftlm.training.consecutive import before_runs, between_runs

    before_runs()
    exchange, number = config["exchange"], config["first"]
    rank = ray_train.get_context().get_world_rank()
    while (job := ray.get(exchange.job.remote(config["gang"], number))) is not None:
        run_one = probe_one if job["systems"] else train_one
        outcome = run_one(job, exchange, Path(config["cache"]), rank)
        if rank == 0:
            starts_lost = config["starts_lost"] if number == config["first"] else 0
            ray.get(exchange.ended.remote(config["gang"], said_of_losses(outcome, starts_lost)))
        between_runs()
        number += 1


def success(measured: Measurement) -> Outcome:
    """How a trial that came to an end of its own is recorded."""
    final = measured.final
    return {"status": measured.status, "reason": final.detail, "checkpoint": measured.checkpoint}


def said_of_losses(outcome: Outcome, starts_lost: int) -> Outcome:
    """The outcome of a trial that may have lost workers on its way."""
    if not starts_lost:
        return outcome
    lost = f"(a worker was lost {starts_lost} time(s), the trial went on)"
    return outcome | {"reason": f"{outcome['reason']} {lost}".strip()}


def train_one(job: dict[str, Any], exchange: Any, cache: Path, rank: int) -> Outcome:
    """Train one rank of a trial.

    Args:
        job: `run` (RunSpec as JSON), `trial_id`, `known_tokens` (up to which the journal has its
            curve), `until_tokens` (at which it ends early, None for never), `branch` (a `Branch`
            as JSON, None where it begins at its beginning) and `folder` (of the search).
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
        measured = train(
            spec,
            report,
            cache=cache,
            output=Path(job["folder"]) / "trials" / trial_id,
            go_on=True,
            branch_from=trunk(job, spec),
        )
    except OutOfMemoryOnOneRankError as error:
        ray.get(
            exchange.note_memory.remote(trial_id, str(error)), timeout=EXCHANGE_PATIENCE_SECONDS
        )
        raise
    return success(measured)


def trunk(job: dict[str, Any], spec: RunSpec) -> Path | None:
    """The newest checkpoint of the run that a trial takes over, up to where it leaves that.

    None where there is none, as after a kill before it was written: then the trial begins at the
    beginning of its run, which gives the same losses.
    """
    from thriftlm.training.checkpoint import complete
    from thriftlm.training.checkpoint_files import step_of

    if job["branch"] is None:
        return None
    branch = Branch.model_validate_json(job["branch"])
    taken_from = Path(job["folder"]) / "trials" / branch.trial_id
    steps = branch.tokens // spec.optim.batch_tokens
    names = [name for name in complete(taken_from) if step_of(name) <= steps]
    return taken_from / names[-1] if names else None


def probe_one(job: dict[str, Any], exchange: Any, cache: Path, rank: int) -> Outcome:
    """Time, on one rank, the systems of a probe that are left.

    Args:
        job: as of `train_one`, with `systems` (SystemSpec as JSON, each).
        exchange: who hears of each.
        cache: folder of token shards.
        rank: of this worker.
    """
    from thriftlm.training.loop import Decision
    from thriftlm.training.probe import probe

    run = RunSpec.model_validate_json(job["run"])
    systems = [SystemSpec.model_validate_json(text) for text in job["systems"]]
    status = "done"

    def report(timing: Timing) -> Decision:
        nonlocal status
        if rank != 0:
            return Decision.CONTINUE
        told = exchange.timed.remote(job["trial_id"], timing.model_dump_json())
        if not ray.get(told, timeout=EXCHANGE_PATIENCE_SECONDS):
            return Decision.CONTINUE
        status = "stopped"
        return Decision.STOP

    probe(run, systems, report, cache=cache)
    return {"status": status, "reason": "", "checkpoint": None}
