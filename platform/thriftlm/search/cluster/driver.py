"""Runs a search on Ray: Tune starts and ends trials, the desk decides which."""

import json
import logging
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from thriftlm.search.cluster.capacity import Capacity
from thriftlm.search.cluster.exchange import Exchange
from thriftlm.search.cluster.gang import ON_THE_HEAD, OUTCOME, TRIAL_RESOURCES, hold, run_trial
from thriftlm.search.desk import Desk, Finished, Wait
from thriftlm.search.history.journal import Journal, Known, SearchStarted
from thriftlm.search.history.provenance import versions
from thriftlm.search.history.state import TrialState
from thriftlm.search.history.stopping import StopRequests
from thriftlm.search.history.storage import writable
from thriftlm.search.spaces.space import Space
from thriftlm.spec import InputError, Progress, RunSpec, digest, identity
from thriftlm.timings import Timing

ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # ours asks the trials to stop, Tune's ends them
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_MAX_PENDING_TRIALS_PG": "64",
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # the journal is the state; Tune's is not used
}
LAST_GANGS_SECONDS = 30.0
"""How long dismissed gangs are waited for at the end, for the ledger; 2 to 4 s are usual."""
OnStage = Callable[[str, float], None]
"""Told what is being waited for before the first trial, and the share of it that is done."""


class Unpickled:
    """Base of what Tune would save with its own state: nothing, the journal is the state."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class Hosts:
    """The gangs that live, by name.

    Args:
        exchange: through which they get their trials.
        folder: of the search.
        cache: of token shards.
    """

    def __init__(self, exchange: Any, folder: Path, cache: Path) -> None:
        self.exchange, self.folder, self.cache = exchange, str(folder), str(cache)
        self.live: dict[str, ray.ObjectRef[None]] = {}
        self.dismissed: set[str] = set()

    def serving(self, trial: TrialState) -> dict[str, Any]:
        """What the Tune trial is told of its gang, which is started where it does not live."""
        name = trial.gang or f"{trial.trial_id}-{len(trial.allocations)}"
        if name not in self.live:
            self.live[name] = hold.options(resources=ON_THE_HEAD).remote(
                name, trial.run.system, self.exchange, self.folder, self.cache
            )
        return {
            "exchange": self.exchange,
            "folder": self.folder,
            "gang": name,
            "host": [self.live[name]],
            "is_warm": trial.gang is not None,
        }

    def settle(self, desk: Desk, patience_seconds: float = 0.0) -> None:
        """Dismiss the gangs that the desk lets go, and tell it of those that have ended."""
        for name in set(desk.gangs_to_dismiss()) - self.dismissed:
            self.exchange.dismiss.remote(name)
            self.dismissed.add(name)
        refs = {ref: name for name, ref in self.live.items()}
        if not refs:
            return
        ended, _ = ray.wait(list(refs), num_returns=len(refs), timeout=patience_seconds)
        for ref in ended:
            desk.gang_ended(refs[ref])
            del self.live[refs[ref]]


class Turn:
    """What is due at every turn of Tune's loop, wherever that happens to stand."""

    def __init__(self, desk: Desk, hosts: Hosts, stops: StopRequests) -> None:
        self.desk, self.hosts, self.stops = desk, hosts, stops
        self.interrupt_asked = False

    def take(self) -> None:
        """Obey an interruption, the budget and the gangs' time limits."""
        self.interrupt_asked |= self.stops.asked()
        if self.interrupt_asked and not self.desk.interrupted:
            self.desk.interrupt()
            self.post_stops()
        if self.desk.check_budget():  # a trial may be late for the report that would tell us
            self.post_stops()
        self.hosts.settle(self.desk)

    def post_stops(self) -> None:
        """Tell the exchange every stop of the desk."""
        for trial in self.desk.state.running:
            if trial.stop_reason is not None:
                self.hosts.exchange.stop.remote(trial.trial_id)


class DeskSearcher(Unpickled, Searcher):
    """Tune's question "what next?", put to the desk."""

    def __init__(self, desk: Desk, hosts: Hosts, turn: Turn) -> None:
        super().__init__()
        self.desk, self.hosts, self.turn = desk, hosts, turn
        self.finished = ""

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The configuration of the next trial, None to wait, `FINISHED` when there is none.

        While no trial is left, Tune asks this again and again and does nothing else.
        """
        self.turn.take()
        answer = self.desk.next_trial()
        match answer:
            case Finished(reason):
                self.finished = self.finished or reason
                return str(Searcher.FINISHED)
            case Wait():
                return None
        return self.hosts.serving(answer) | {
            "run": answer.run.model_dump_json(),
            "trial_id": answer.trial_id,
            "branch": None if answer.branch is None else answer.branch.model_dump_json(),
            "systems": [system.model_dump_json() for system in answer.systems_left],
            "known_tokens": answer.tokens,
            "until_tokens": self.desk.pauses_at(answer),
        }

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Nothing: the scheduler hears of it, with the trial."""

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Nothing."""


class DeskScheduler(Unpickled, FIFOScheduler):
    """Tune's results, told to the desk; a stop goes to the exchange and is obeyed at a report."""

    def __init__(self, desk: Desk, turn: Turn) -> None:
        super().__init__()
        self.desk, self.turn = desk, turn
        self.outcomes: dict[str, dict[str, Any]] = {}

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        """The first trial that waits; called at every turn of Tune's loop with trials."""
        self.turn.take()
        return super().choose_trial_to_run(tune_controller)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Always `CONTINUE`: trials end themselves."""
        if OUTCOME in result:
            self.outcomes[trial.trial_id] = json.loads(result[OUTCOME])
        elif "timing" in result:
            timing = Timing.model_validate_json(result["timing"])
            self.desk.probed(trial.config["trial_id"], timing)
            self.turn.post_stops()
        elif "progress" in result:
            progress = Progress.model_validate_json(result["progress"])
            self.desk.report(trial.config["trial_id"], progress, result["checkpoint"])
            self.turn.post_stops()
        return str(TrialScheduler.CONTINUE)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Release what the trial held."""
        outcome = self.outcomes.get(trial.trial_id) or {
            "status": "failed",
            "reason": "the trial ended without an outcome",
            "checkpoint": None,
        }
        outcome.pop("broke", None)
        self.desk.end(trial.config["trial_id"], **outcome)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """The Tune trial itself broke, not its gang: a failure, not the end of the search."""
        exchange = self.turn.hosts.exchange
        exchange.stop.remote(trial.config["trial_id"])
        exchange.dismiss.remote(trial.config["gang"])
        reason = str(trial.get_error() or "the trial's process died").strip().splitlines()[-1]
        self.desk.end(trial.config["trial_id"], "failed", reason)


def run(
    space: Space,
    journal: Journal,
    cache: Path,
    *,
    address: str | None = None,
    known: Sequence[Known] = (),
    cold: bool = False,
    on_stage: OnStage = lambda stage, fraction: None,
) -> Desk:
    """The desk of the search when it has ended, finished or interrupted.

    Args:
        space: what to search.
        journal: open, in the search's folder, on storage that every node sees; one that has
            events is resumed.
        cache: absolute folder of token shards, on such storage too.
        address: Ray cluster; a local one is started when None and no job gave one.
        known: what earlier searches measured; a resumed search has it in its journal.
        cold: whether every trial gets workers of its own, started for it.
        on_stage: told what is being waited for before the first trial.

    Raises:
        InputError: storage, corpus or cluster are not usable.
    """
    stops = StopRequests(journal.path.parent)
    unique_tokens = prepare_data(space, cache, stops.heeded(on_stage))
    on_stage("starting Ray" if address is None else f"connecting to Ray at {address}", 0.0)
    with cluster(address) as capacity:
        refuse_unfitting(space, capacity)
        is_new = not journal.events
        if is_new:
            started = SearchStarted(
                search_id=journal.path.parent.name,
                space=space.document(),
                versions=versions(),
                unique_tokens=unique_tokens,
            )
            journal.append(started)
            for one in known:
                journal.append(one.model_copy(update={"at": started.at}))
        desk = Desk(space, journal, capacity, warm=not cold)
        if not is_new:
            desk.resume()
        desk.close(drive(desk, cache, stops))
    return desk


def drive(desk: Desk, cache: Path, stops: StopRequests) -> str:
    """Run trials until the desk has no more; the reason why it ended."""
    os.environ.update(ENVIRONMENT)
    folder = desk.journal.path.parent
    hosts = Hosts(Exchange.remote(), folder, cache)  # type: ignore[attr-defined]
    turn = Turn(desk, hosts, stops)
    searcher, scheduler = DeskSearcher(desk, hosts, turn), DeskScheduler(desk, turn)
    tuner = tune.Tuner(
        tune.with_resources(run_trial, TRIAL_RESOURCES),
        tune_config=tune.TuneConfig(
            search_alg=searcher, scheduler=scheduler, num_samples=-1, reuse_actors=True
        ),
        run_config=tune.RunConfig(
            name=f"tune-{len(desk.journal.events)}",
            storage_path=str(folder / "ray"),
            verbose=0,
            callbacks=[],
        ),
    )
    with interruptible(turn):
        tuner.fit()
        desk.let_gangs_go()
        hosts.settle(desk, LAST_GANGS_SECONDS)
    return searcher.finished


@contextmanager
def interruptible(turn: Turn) -> Iterator[None]:
    """The first Ctrl-C asks all trials to end at their next report, the second ends at once."""

    def on_signal(number: int, frame: object) -> None:
        if turn.interrupt_asked:
            raise KeyboardInterrupt
        turn.interrupt_asked = True  # acted on from Tune's loop, not from inside a write

    before = {n: signal.signal(n, on_signal) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def cluster(address: str | None) -> Iterator[Capacity]:
    """A connection to Ray and what it can hold; a local cluster that we started is shut down.

    Raises:
        InputError: the cluster does not answer, or lacks the State API (`ray[default]`).
    """
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    address = address or os.environ.get("RAY_ADDRESS")
    try:
        if address is None:
            ray.init(num_cpus=os.cpu_count(), include_dashboard=True, **quiet)
        else:
            ray.init(address=address, **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise InputError(f"no Ray cluster at {address or 'this machine'}: {error}") from error
    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        check_state_api()
        yield Capacity(cluster_resources(ray.cluster_resources()))
    finally:
        ray.shutdown()


def check_state_api() -> None:
    """Make sure that Ray can clean up after a trial that dies.

    Raises:
        InputError: the State API does not answer; placement groups would leak in silence.
    """
    from ray.util.state import list_placement_groups

    try:
        list_placement_groups(address=ray.get_runtime_context().gcs_address, limit=1)
    except Exception as error:  # ray raises many kinds here, all mean the same to us
        raise InputError(
            "Ray's State API does not answer, and without it stopped trials keep their resources; "
            f"install ray[default] on the cluster and start its dashboard ({error})"
        ) from error


def cluster_resources(resources: dict[str, float]) -> dict[str, float]:
    """Ray's resources by the names of `Capacity`: GPUs counted by accelerator type."""
    kinds = [name for name in resources if name.startswith("accelerator_type:")]
    found = {"CPU": resources.get("CPU", 0.0)}
    for kind in kinds:
        # Ray does not count GPUs by type; with one type in the cluster all of them are of it.
        nodes = [n["Resources"] for n in ray.nodes() if n["Alive"] and kind in n["Resources"]]
        gpus = sum(node.get("GPU", 0.0) for node in nodes)
        found[f"GPU:{kind.removeprefix('accelerator_type:')}"] = gpus
    return found


def refuse_unfitting(space: Space, capacity: Capacity) -> None:
    """Make sure that something of the space fits the cluster.

    Raises:
        InputError: no system of the space does, or not that of an entry of `start_from`.
    """
    for number, start in enumerate(space.starts):
        run = space.resolve(start.point, space.search.seed)
        if isinstance(run, RunSpec) and not capacity.can_ever_hold(run.system):
            raise InputError(
                f"start_from[{number}] wants {run.system.n_gpus} x {run.system.gpu}, which the "
                "cluster does not have; give it another system, or leave the entry out"
            )
    if not any(capacity.can_ever_hold(system) for system in space.systems()):
        raise InputError(
            "no system of this space fits the cluster, which has "
            + ", ".join(f"{amount:g} {name}" for name, amount in capacity.total.items())
            + "; lower n_gpus or cpus_per_worker, or use another gpu"
        )


def prepare_data(space: Space, cache: Path, on_stage: OnStage) -> dict[str, int]:
    """Build the token shards of the space; unique training tokens by digest of the data spec."""
    from thriftlm.training.mixture import build

    unique = {}
    for data in space.data_specs():
        unique[digest(identity(data))] = build(data, writable(cache), on_stage).unique_tokens
    return unique
