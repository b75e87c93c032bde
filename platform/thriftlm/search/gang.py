"""One trial on Ray: a Tune function trial that runs a Ray Train gang.

The trial itself asks for no CPU, only for the head node's marker, so that drivers cannot starve
the workers they wait for.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray import train as ray_train
from ray import tune
from ray.exceptions import RayActorError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2.api.exceptions import TrainingFailedError
from ray.tune.integration.ray_train import TuneReportCallback

from thriftlm import catalog
from thriftlm.search.worker import train_on_worker
from thriftlm.spec import InputError, Measurement, Progress, RunSpec, SystemSpec

TRIAL_RESOURCES = tune.PlacementGroupFactory([{"node:__internal_head__": 0.001}])
"""What a Tune trial itself holds; its workers hold the gang's resources."""
OUTCOME = "outcome"
"""Key of the last result of a Tune trial."""
LOSSES = 3
"""How often a trial goes on after it lost a worker."""
PEER_LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "NCCL communicator was aborted",
    "remote process exited",
)
"""What gloo and NCCL say on the ranks that are left when another one has died."""
TRAIN_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # reports are fetched this often; Ray's is 2
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",
    "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": "600",  # without it a missing rank is waited for for ever
    "RAY_TRAIN_ENABLE_STATE_ACTOR_RECONCILIATION": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # a trial does not survive preemption yet
}


CPU_WORKER_ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
    "MALLOC_TOP_PAD_": str(2**26),
}
"""What `ranks.keep_freed_memory` sets, told to workers before they start.

Ray trains in a thread of the worker, and glibc gives threads memory of their own that knows none of
it. Measured on two cores: 28% more tokens per second in a small trial.
"""


class Hearing(TuneReportCallback):
    """Passes reports on to Tune, and notes on the board which have arrived."""

    def __init__(self, board: Any, trial_id: str) -> None:
        super().__init__()
        self.board, self.trial_id = board, trial_id

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any
    ) -> None:
        """Called in the gang's controller for each report of all its workers."""
        super().after_report(run_context, metrics, checkpoint)
        tokens = Progress.model_validate_json(metrics[0]["progress"]).tokens
        self.board.note_heard.remote(self.trial_id, tokens)


def run_trial(config: dict[str, Any]) -> None:
    """The Tune function trial: runs the gang and reports how it ended.

    A gang that lost a worker starts again from the trial's last good checkpoint; the trial keeps
    its allocation meanwhile. Running out of memory is a result, and never tried again.

    Args:
        config: `run` (RunSpec as JSON), `trial_id`, `known_tokens` (up to which the journal has its
            curve), `folder` (of the search), `cache` (of shards) and `board` (the stop board).
    """
    os.environ.update(TRAIN_ENVIRONMENT)
    board, trial_id = config["board"], config["trial_id"]
    failures: list[TrainingFailedError] = []
    while True:
        heard = ray.get(board.heard_tokens.remote(trial_id))
        known = config | {"known_tokens": max(config["known_tokens"], heard)}
        try:
            measured = run_gang(known, len(failures))
        except TrainingFailedError as error:
            failures.append(error)
            outcome = failure(error, ray.get(board.memory_note.remote(trial_id)))
            if outcome["status"] != "failed" or not is_worth_retrying(failures):
                break
        else:
            outcome = success(measured, len(failures))
            break
    tune.report({OUTCOME: json.dumps(outcome)})  # Tune flattens mappings


def run_gang(config: dict[str, Any], number: int) -> Measurement:
    """What one start of a trial's gang measured; `number` counts its starts.

    Raises:
        TrainingFailedError: of Ray Train, a worker died or raised.
    """
    spec = RunSpec.model_validate_json(config["run"])
    trainer = TorchTrainer(
        train_on_worker,
        train_loop_config=config,
        scaling_config=scaling(spec.system),
        # As `ranks` makes it: on a GPU gloo stands beside NCCL, for what lies in host memory.
        torch_config=TorchConfig(
            backend="gloo" if spec.system.gpu == "cpu" else "cpu:gloo,cuda:nccl"
        ),
        run_config=ray_train.RunConfig(
            name=f"{config['trial_id']}-{tune.get_context().get_trial_id()}-{number}",
            storage_path=str(Path(config["folder"]) / "ray"),
            callbacks=[Hearing(config["board"], config["trial_id"])],
            # Ray counts failures of every kind alike; `is_worth_retrying` tells them apart.
            failure_config=ray_train.FailureConfig(max_failures=0, controller_failure_limit=2),
            worker_runtime_env=worker_runtime_env(spec.system),
        ),
    )
    return Measurement.model_validate_json(trainer.fit().return_value)


def success(measured: Measurement, starts_lost: int) -> dict[str, str | None]:
    """How a gang that came to an end of its own is recorded."""
    reason = measured.final.detail
    if starts_lost:
        reason = f"{reason} (a worker was lost {starts_lost} time(s), the trial went on)".strip()
    return {"status": measured.status, "reason": reason, "checkpoint": measured.checkpoint}


def is_worth_retrying(failures: Sequence[TrainingFailedError]) -> bool:
    """Whether a trial may start again after these failures.

    A lost worker is nobody's fault, a few times. Bad input is never worth a second time, another
    exception of our own code is worth one: it would be raised again.
    """
    if any(InputError.__name__ in str(error) for error in failures):
        return False
    lost = sum(lost_a_worker(error) for error in failures)
    return lost <= LOSSES and len(failures) - lost <= 1


def lost_a_worker(error: TrainingFailedError) -> bool:
    """Whether a worker died, rather than raised; also where only its peers had time to say so."""
    causes = getattr(error, "worker_failures", {}).values()
    return any(
        isinstance(cause, WorkerHealthCheckFailedError | RayActorError)
        or any(sign in str(cause) for sign in PEER_LOST)
        for cause in causes
    )


def worker_runtime_env(system: SystemSpec) -> dict[str, Any]:
    """What Ray sets up for the workers of a system."""
    return {"env_vars": CPU_WORKER_ENVIRONMENT} if system.gpu == "cpu" else {}


def failure(error: TrainingFailedError, memory_note: str | None) -> dict[str, str | None]:
    """How a gang that broke is recorded: out of memory is a result, anything else a failure."""
    text = str(error)
    if memory_note is None and "ray.exceptions.OutOfMemoryError" in text:
        memory_note = "out of memory on a node: Ray ended a worker"
    if memory_note is not None:
        return {"status": "oom", "reason": memory_note, "checkpoint": None}
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return {"status": "failed", "reason": lines[-1] if lines else repr(error), "checkpoint": None}


def scaling(system: SystemSpec) -> ray_train.ScalingConfig:
    """Workers and their resources."""
    on_gpu = system.gpu != "cpu"
    return ray_train.ScalingConfig(
        num_workers=system.n_gpus,
        use_gpu=on_gpu,
        resources_per_worker={"CPU": system.cpus_per_worker} | ({"GPU": 1} if on_gpu else {}),
        accelerator_type=catalog.gpu(system.gpu).ray_accelerator_type if on_gpu else None,
        placement_strategy="PACK",
    )
