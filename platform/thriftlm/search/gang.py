"""One trial on Ray: a Tune function trial that runs a Ray Train gang.

The trial itself asks for no CPU, only for the head node's marker, so that drivers cannot starve
the workers they wait for.
"""

import json
import os
from pathlib import Path
from typing import Any

import ray
from ray import train as ray_train
from ray import tune
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError
from ray.tune.integration.ray_train import TuneReportCallback

from thriftlm import catalog
from thriftlm.search.worker import train_on_worker
from thriftlm.spec import Measurement, RunSpec, SystemSpec

TRIAL_RESOURCES = tune.PlacementGroupFactory([{"node:__internal_head__": 0.001}])
"""What a Tune trial itself holds; its workers hold the gang's resources."""
OUTCOME = "outcome"
"""Key of the last result of a Tune trial."""
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


def run_trial(config: dict[str, Any]) -> None:
    """The Tune function trial: runs the gang and reports how it ended.

    Args:
        config: `run` (RunSpec as JSON), `trial_id`, `known_tokens` (up to which the journal has its
            curve), `folder` (of the search), `cache` (of shards) and `board` (the stop board).
    """
    os.environ.update(TRAIN_ENVIRONMENT)
    spec = RunSpec.model_validate_json(config["run"])
    folder = Path(config["folder"])
    attempt = f"{config['trial_id']}-{tune.get_context().get_trial_id()}"
    trainer = TorchTrainer(
        train_on_worker,
        train_loop_config=config,
        scaling_config=scaling(spec.system),
        torch_config=TorchConfig(backend="gloo" if spec.system.gpu == "cpu" else "nccl"),
        run_config=ray_train.RunConfig(
            name=attempt,
            storage_path=str(folder / "ray"),
            callbacks=[TuneReportCallback()],
            failure_config=ray_train.FailureConfig(max_failures=0, controller_failure_limit=2),
            worker_runtime_env=worker_runtime_env(spec.system),
        ),
    )
    try:
        measured = Measurement.model_validate_json(trainer.fit().return_value)
        outcome = {
            "status": measured.status,
            "reason": measured.final.detail,
            "checkpoint": measured.checkpoint,
        }
    except TrainingFailedError as error:
        outcome = failure(error, ray.get(config["board"].memory_note.remote(config["trial_id"])))
    tune.report({OUTCOME: json.dumps(outcome)})  # Tune flattens mappings


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
