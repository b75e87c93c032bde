"""Trials and gangs on Ray: a Tune function trial hands its run to a live Ray Train gang.

A gang is one run of Ray Train whose workers train one trial after another. Neither trials nor the
hosts of gangs ask for a CPU, only for the head node's marker, so that they cannot starve the
workers they wait for.
"""

import itertools
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

from thriftlm import catalog
from thriftlm.search.cluster.exchange import Outcome
from thriftlm.search.cluster.worker import serve
from thriftlm.spec import InputError, SystemSpec

ON_THE_HEAD = {"node:__internal_head__": 0.001}
TRIAL_RESOURCES = tune.PlacementGroupFactory([ON_THE_HEAD])
"""What a Tune trial itself holds; its workers hold the gang's resources."""
JOB = ("run", "trial_id", "branch", "systems", "known_tokens", "until_tokens", "folder")
"""What of a trial's configuration its workers are told."""
LAST_WORD_SECONDS = 5.0
"""Between what a gang says last and when it is heard."""
LOST: Outcome = {"status": "lost", "reason": "its gang was gone", "checkpoint": None, "broke": ""}
"""How a trial ends that has to wait for another gang."""
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


def run_trial(config: dict[str, Any]) -> None:
    """The Tune function trial: has its gang run it, passes reports on, and says how it ended.

    Args:
        config: `exchange` (the actor), `gang` (its name), `host` (a list of what `hold` of it
            returns), `is_warm` (whether the gang outlives the trial) and what `worker.train_one`
            wants to know.
    """
    exchange, gang = config["exchange"], config["gang"]
    (host,) = config["host"]
    job = {name: config[name] for name in JOB}
    outcome: Outcome = LOST
    if ray.get(exchange.begin.remote(gang, job)):
        if not config["is_warm"]:
            exchange.dismiss.remote(gang)
        outcome = listen(exchange, config["trial_id"], host)
    lives = config["is_warm"] and outcome.get("broke") is None
    if not lives:
        ray.wait([host])  # it is paid for until its workers are gone
    tune.report({OUTCOME: json.dumps(outcome | {"gang_lives": lives})})  # Tune flattens mappings


def listen(exchange: Any, trial_id: str, host: Any) -> Outcome:
    """How a trial ended; its reports are passed on to Tune as they come."""
    while True:
        news = exchange.news.remote(trial_id)
        ray.wait([news, host])
        ready, _ = ray.wait([news], timeout=LAST_WORD_SECONDS)  # of a gang that has just ended
        if not ready:
            ray.cancel(news)  # else it would take what the trial's next gang reports
            return LOST
        for one in ray.get(news):
            if "outcome" in one:
                outcome: Outcome = one["outcome"]
                return outcome
            tune.report(one)


@ray.remote(num_cpus=0, max_retries=0)
def hold(gang: str, system: SystemSpec, exchange: Any, folder: str, cache: str) -> None:
    """Run a gang until it is dismissed; Ray Train's controller, and what watches over it.

    A gang that lost a worker starts again and its trial goes on from its last good checkpoint; the
    trial keeps its allocation meanwhile. Running out of memory is a result, and never tried again.
    """
    os.environ.update(TRAIN_ENVIRONMENT)
    config = {"exchange": exchange, "gang": gang, "cache": cache, "first": 0, "starts_lost": 0}
    failures: list[TrainingFailedError] = []
    for start in itertools.count():
        try:
            trainer(f"{gang}-{start}", system, folder, config).fit()
            return
        except TrainingFailedError as error:
            broken = ray.get(exchange.broke.remote(gang))
            if broken is None:
                return
            number, memory_note = broken
            failures = [*failures, error] if number == config["first"] else [error]
            outcome = failure(error, memory_note)
            if outcome["status"] != "failed" or not is_worth_retrying(failures):
                ray.get(exchange.ended.remote(gang, outcome))
                return
            config |= {"first": number, "starts_lost": len(failures)}


def trainer(name: str, system: SystemSpec, folder: str, config: dict[str, Any]) -> TorchTrainer:
    """Ray Train's run of one gang, with as many workers as the system has."""
    return TorchTrainer(
        serve,
        train_loop_config=config,
        scaling_config=scaling(system),
        # As `ranks` makes it: on a GPU gloo stands beside NCCL, for what lies in host memory.
        torch_config=TorchConfig(backend="gloo" if system.gpu == "cpu" else "cpu:gloo,cuda:nccl"),
        run_config=ray_train.RunConfig(
            name=name,
            storage_path=str(Path(folder) / "ray"),
            # Ray counts failures of every kind alike; `is_worth_retrying` tells them apart.
            failure_config=ray_train.FailureConfig(max_failures=0, controller_failure_limit=2),
            worker_runtime_env=worker_runtime_env(system),
        ),
    )


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


def failure(error: TrainingFailedError, memory_note: str | None) -> Outcome:
    """How a gang that broke is recorded: out of memory is a result, anything else a failure."""
    text = str(error)
    if memory_note is None and "ray.exceptions.OutOfMemoryError" in text:
        memory_note = "out of memory on a node: Ray ended a worker"
    if memory_note is not None:
        return {"status": "oom", "reason": memory_note, "checkpoint": None, "broke": text}
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    reason = lines[-1] if lines else repr(error)
    return {"status": "failed", "reason": reason, "checkpoint": None, "broke": text}


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
