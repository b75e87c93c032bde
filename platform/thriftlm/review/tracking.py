"""A search in MLflow: one parent run, one child run per trial, written from the journal.

Everything that MLflow shows is a replay of journal events. `Drafts` folds events into what each run
still has to be told, `RunStore` tells it, `MlflowWriter` does both on a thread of its own, so that
neither the search nor a trial ever waits for a server. Sending twice is harmless: runs are found
again by their tags, and a metric is sent only beyond the step that the server already has.
"""

import json
import logging
import math
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

# Read by mlflow while it is imported. Errors reach the writer as exceptions, so what mlflow would
# log about them is noise; its run links would land in the JSON on stdout.
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "CRITICAL")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
# The defaults are 120 s per request and seven tries inside one call: minutes on a dead server.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException

from thriftlm.search.journal import (
    Allocated,
    Ended,
    Event,
    Released,
    Reported,
    RunMinted,
    SearchEnded,
    SearchResumed,
    SearchStarted,
    StopRequested,
    Suggested,
)
from thriftlm.spec import InputError, Progress, RunSpec, digest
from thriftlm_models.config import (
    FLOP_FORMULA,
    applied_params,
    flops_per_token,
    non_embedding_params,
    stored_params,
)

EXPERIMENT = "thriftlm"
CONNECT_SECONDS = 10.0
"""How long a server may take to answer the first time."""
MIGRATE_SECONDS = 120.0
"""How long a database may take to answer the first time; a new one is migrated, 2 s alone."""
ROUND_SECONDS = 0.5
"""Pause between two rounds of sending; what happens meanwhile is sent in one batch."""
BACKOFF_SECONDS = 60.0
"""Longest pause while the server does not take what it is sent."""
MAX_PARAMS = 30
MAX_TEXT = 5000
"""Characters of a tag or param value that every MLflow store takes."""
MAX_BATCH = 800
"""Metrics in one request; MLflow takes 1000 entries, tags and params included."""

STEP_METRICS = (
    "train_loss",
    "val_loss",
    "val_bits_per_byte",
    "tokens_per_s",
    "mfu",
    "peak_mem_gb",
    "grad_norm",
)
"""Fields of a `Progress` that become metrics, with tokens as their step."""
PLAIN_VERSIONS = ("git_commit", "price_snapshot")
"""Entries of `SearchStarted.versions` that are tags under their own name."""
RUN_STATUS = {
    "done": "FINISHED",
    "stopped": "FINISHED",
    "oom": "FAILED",
    "diverged": "FAILED",
    "failed": "FAILED",
}
"""MLflow's status of a trial that ended; the tag `status` says which it was."""

logger = logging.getLogger(__name__)


@dataclass
class Draft:
    """What one run has not been told yet; `trial_id` is None for the parent of the search."""

    trial_id: str | None
    name: str
    started_at: float
    identity: dict[str, str]
    """Tags that the run is created with and found by."""
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    metrics: list[Metric] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)
    """Artifacts by file name."""
    files: list[Path] = field(default_factory=list)
    status: tuple[str, float] | None = None
    """MLflow's run status, and since when."""
    updates: int = 0
    """Journal events and scores that are waiting in it."""

    def measure(self, key: str, value: float | None, at: float, tokens: int) -> None:
        """Add a metric with tokens as its step; what is missing or not finite is left out."""
        if value is not None and math.isfinite(value):
            self.metrics.append(Metric(key, float(value), int(at * 1000), tokens))

    @property
    def waiting(self) -> bool:
        """Whether there is anything to send."""
        parts = (self.params, self.tags, self.metrics, self.texts, self.files, self.status)
        return any(parts)


class Drafts:
    """The drafts of all runs of one search, folded from its journal, parent first."""

    def __init__(self, search_id: str) -> None:
        self.search_id = search_id
        self.search_key: str | None = None
        """Tells this search from another of the same name on the same server."""
        self.runs: dict[str | None, Draft] = {}
        self.minted: dict[str | None, str] = {}
        self._tokens: dict[str, int] = {}
        self._usd: dict[str, float] = {}
        self._held: dict[str, Allocated] = {}
        self._attempts: dict[str, int] = {}
        self._ended: set[str] = set()
        self._version_tags: dict[str, str] = {}

    def add(self, event: Event) -> None:
        """Fold one journal event."""
        match event:
            case SearchStarted():
                self._start(event)
            case SearchResumed():
                self._resume(event)
            case Suggested():
                self._suggest(event)
            case Allocated():
                self._allocate(event)
            case Reported():
                self._report(event)
            case StopRequested():
                self._draft(event.trial_id, event.at).tags["reason"] = event.reason
            case Released():
                self._pay(event)
            case Ended():
                self._end(event)
            case RunMinted():
                self.minted[event.trial_id] = event.mlflow_run_id
            case SearchEnded():
                self._finish(event)

    def score(self, scores: Mapping[str, Mapping[str, float]], at: float) -> None:
        """Add objective scores by trial, as metrics at the tokens that the trial has reached.

        A score replaces one that is still waiting: of two at one step and millisecond MLflow
        would show the larger.
        """
        for trial_id, values in scores.items():
            draft, tokens = self._draft(trial_id, at), self._tokens.get(trial_id, 0)
            draft.metrics = [m for m in draft.metrics if m.key not in values or m.step != tokens]
            for key, value in values.items():
                draft.measure(key, value, at, tokens)

    def results(self, results: dict[str, Any], files: list[Path], at: float) -> None:
        """Add the answer of the search as artifacts of the parent run."""
        draft = self._draft(None, at)
        draft.texts["results.json"] = json.dumps(results, indent=2, default=str)
        draft.files += files

    def _start(self, event: SearchStarted) -> None:
        self.search_key = digest({"search": event.search_id, "started_at": event.at})
        for name, version in event.versions.items():
            key = name if name in PLAIN_VERSIONS else f"version.{name}"
            self._version_tags[key] = version
        draft = self._draft(None, event.at)
        draft.tags |= self._version_tags | {"status": "running"}
        settings = {
            key: event.space[key] for key in event.space if key not in {"space", "start_from"}
        }
        draft.params = dict(islice(flat(settings), MAX_PARAMS))
        draft.texts["space.yaml"] = yaml.safe_dump(event.space, sort_keys=False)

    def _resume(self, event: SearchResumed) -> None:
        draft = self._draft(None, event.at)
        draft.status = ("RUNNING", event.at)
        draft.tags |= {"status": "running", "reason": ""}

    def _suggest(self, event: Suggested) -> None:
        draft = self._draft(event.trial_id, event.at, name=f"{event.number:03d}-{event.trial_id}")
        draft.identity |= {"trial_id": event.trial_id, "recipe_id": event.run.recipe_id}
        draft.params = trial_params(event.point, event.run)
        draft.tags |= self._version_tags | {"status": "pending", "number": str(event.number)}
        draft.texts["run.yaml"] = yaml.safe_dump(event.run.model_dump(mode="json"), sort_keys=False)

    def _allocate(self, event: Allocated) -> None:
        self._held[event.trial_id] = event
        attempt = self._attempts[event.trial_id] = self._attempts.get(event.trial_id, 0) + 1
        draft = self._draft(event.trial_id, event.at)
        draft.status = ("RUNNING", event.at)
        draft.tags |= {
            "status": "running",
            "reason": "",
            "attempt": str(attempt),
            "price": event.price,
            "usd_per_hour": str(event.usd_per_hour),
        }

    def _report(self, event: Reported) -> None:
        """A trial that went back to its checkpoint says again what is known: only later counts."""
        progress, trial_id = event.progress, event.trial_id
        draft = self._draft(trial_id, event.at)
        if event.checkpoint is not None:
            draft.tags["checkpoint"] = event.checkpoint
        if progress.tokens <= self._tokens.get(trial_id, -1):
            return
        self._tokens[trial_id] = progress.tokens
        draft.tags |= progress_tags(progress)
        for key in STEP_METRICS:
            draft.measure(key, getattr(progress, key), event.at, progress.tokens)

    def _pay(self, event: Released) -> None:
        """All that the trial cost so far, over every time that it held resources."""
        trial_id, at = event.trial_id, event.at
        if (held := self._held.pop(trial_id, None)) is None:
            return
        usd = held.usd_per_hour * (at - held.at) / 3600
        self._usd[trial_id] = self._usd.get(trial_id, 0.0) + usd
        tokens = self._tokens.get(trial_id, 0)
        self._draft(trial_id, at).measure("usd", self._usd[trial_id], at, tokens)
        all_tokens = sum(self._tokens.values())
        self._draft(None, at).measure("usd", sum(self._usd.values()), at, all_tokens)

    def _end(self, event: Ended) -> None:
        self._ended.add(event.trial_id)
        draft = self._draft(event.trial_id, event.at)
        draft.status = (RUN_STATUS.get(event.status, "KILLED"), event.at)
        draft.tags["status"] = event.status
        if event.checkpoint is not None:
            draft.tags["checkpoint"] = event.checkpoint
        if event.reason:
            draft.tags["reason"] = event.reason

    def _finish(self, event: SearchEnded) -> None:
        for trial_id in [key for key in self.runs if key is not None and key not in self._ended]:
            draft = self._draft(trial_id, event.at)
            draft.status = ("KILLED", event.at)
            draft.tags |= {"status": "interrupted", "reason": event.reason}
        draft = self._draft(None, event.at)
        draft.status = ("FINISHED" if event.status == "finished" else "KILLED", event.at)
        draft.tags |= {"status": event.status, "reason": event.reason}

    def _draft(self, trial_id: str | None, at: float, name: str = "") -> Draft:
        if trial_id not in self.runs:
            identity = self._identity(trial_id)
            name = name or trial_id or self.search_id
            self.runs[trial_id] = Draft(trial_id, name, at, identity)
        self.runs[trial_id].updates += 1
        return self.runs[trial_id]

    def _identity(self, trial_id: str | None) -> dict[str, str]:
        tags = {
            "thriftlm.search_id": self.search_id,
            "thriftlm.search_key": str(self.search_key),
            "kind": "search" if trial_id is None else "learn",
        }
        return tags if trial_id is None else tags | {"thriftlm.trial_id": trial_id}


def trial_params(point: Mapping[str, Any], run: RunSpec) -> dict[str, str]:
    """Params of a trial: what varied, then where and how large it is, at most `MAX_PARAMS`."""
    varied = {key: as_text(value) for key, value in point.items()}
    model, system = run.model, run.system
    facts = {
        "stored_params": stored_params(model),
        "non_embedding_params": non_embedding_params(model),
        "applied_params": applied_params(model),
        "flops_per_token": flops_per_token(model, run.data.seq_len),
        "flop_formula": FLOP_FORMULA,
        "tokens": run.tokens,
        "system.gpu": system.gpu,
        "system.n_gpus": system.n_gpus,
        "system.strategy": system.strategy,
        "system.micro_batch": system.micro_batch,
        "seed": run.seed,
    }
    free = MAX_PARAMS - len(facts.keys() - varied.keys())
    kept = dict(islice(varied.items(), free))
    return kept | {key: as_text(value) for key, value in facts.items() if key not in kept}


def progress_tags(progress: Progress) -> dict[str, str]:
    """What a report says in words."""
    tags = {} if progress.mfu is None else {"mfu_formula": progress.mfu_formula}
    return tags | ({"detail": progress.detail} if progress.detail else {})


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Leaves of nested settings by dotted path."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", as_text(value)


def as_text(value: Any) -> str:
    """The value as MLflow stores it: text as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


@dataclass
class KnownRun:
    """A run that the server has, and how far it got."""

    run_id: str
    status: str
    params: dict[str, str]
    last: dict[str, tuple[int, float]] | None
    """Last step and value by metric; None until the server is asked."""


class RunStore:
    """The runs of one search on a tracking server. Every method may raise what the server raises.

    Args:
        client: a client of a server that answers.
        experiment_id: where the runs live.
        record: journals the id of a run that the journal does not know.
    """

    def __init__(
        self, client: MlflowClient, experiment_id: str, record: Callable[[Event], None]
    ) -> None:
        self.client = client
        self.experiment_id = experiment_id
        self._record = record
        self._runs: dict[str | None, KnownRun] | None = None

    def answers(self) -> bool:
        """Whether the server answers at all."""
        try:
            self.client.get_experiment(self.experiment_id)
        except Exception:  # whatever a dead server, a dead database or a driver of one raises
            return False
        return True

    def forget(self) -> None:
        """Ask the server again what it has: a request that failed may have been carried out."""
        self._runs = None

    def send(self, draft: Draft, drafts: Drafts) -> None:
        """Tell a run what its draft holds, and empty the draft part by part."""
        run = self._ensure(draft, drafts)
        self._log(run, draft)
        for name in list(draft.texts):
            self.client.log_text(run.run_id, draft.texts[name], name)
            del draft.texts[name]
        while draft.files:
            self.client.log_artifact(run.run_id, str(draft.files[0]))
            del draft.files[0]
        if draft.status is not None:
            self._set_status(run, *draft.status)
            draft.status = None
        draft.updates = 0

    def _ensure(self, draft: Draft, drafts: Drafts) -> KnownRun:
        """The run of a draft: found by its tags, else created; its id is journalled."""
        if self._runs is None:
            self._runs = self._find(drafts)
        if draft.trial_id not in self._runs:
            tags = dict(draft.identity)
            if draft.trial_id is not None:
                tags["mlflow.parentRunId"] = self._ensure(drafts.runs[None], drafts).run_id
            run = self.client.create_run(
                self.experiment_id, int(draft.started_at * 1000), tags, draft.name
            )
            self._runs[draft.trial_id] = KnownRun(run.info.run_id, "RUNNING", {}, {})
        known = self._runs[draft.trial_id]
        if drafts.minted.get(draft.trial_id) != known.run_id:
            with suppress(ValueError):  # the journal is closed: the tag will find the run
                self._record(RunMinted(trial_id=draft.trial_id, mlflow_run_id=known.run_id))
            drafts.minted[draft.trial_id] = known.run_id
        return known

    def _find(self, drafts: Drafts) -> dict[str | None, KnownRun]:
        """Runs of the search by trial; of two with one tag, the one that the journal names."""
        found: dict[str | None, KnownRun] = {}
        for run in self._search(f"tags.`thriftlm.search_key` = '{drafts.search_key}'"):
            trial_id = run.data.tags.get("thriftlm.trial_id")
            if trial_id not in found or drafts.minted.get(trial_id) == run.info.run_id:
                found[trial_id] = KnownRun(
                    run.info.run_id, run.info.status, dict(run.data.params), None
                )
        return found

    def _search(self, condition: str) -> Iterator[Run]:
        token = None
        while True:
            page = self.client.search_runs(
                [self.experiment_id], condition, order_by=["start_time"], page_token=token
            )
            yield from page
            token = page.token
            if not token:
                return

    def _log(self, run: KnownRun, draft: Draft) -> None:
        """Params are immutable: one that changed since (a newer thriftlm) becomes a tag."""
        params = {key: value[:MAX_TEXT] for key, value in draft.params.items()}
        changed = {k: v for k, v in params.items() if run.params.get(k, v) != v}
        tags = draft.tags | {f"changed.{key}": value for key, value in changed.items()}
        metrics = [metric for metric in draft.metrics if self._is_news(run, metric)]
        new_params = [Param(key, value) for key, value in params.items() if key not in run.params]
        new_tags = [RunTag(key, value[:MAX_TEXT]) for key, value in tags.items()]
        if not (new_params or new_tags or metrics):
            return
        for start in range(0, max(1, len(metrics)), MAX_BATCH):
            self.client.log_batch(
                run.run_id, metrics[start : start + MAX_BATCH], new_params, new_tags, True
            )
            new_params, new_tags = [], []
        run.params |= params
        draft.params, draft.tags, draft.metrics = {}, {}, []

    def _is_news(self, run: KnownRun, metric: Metric) -> bool:
        """Whether the metric lies beyond the last step on the server, or changes its value."""
        if run.last is None:
            run.last = self._last_metrics(run.run_id)
        step, value = run.last.get(metric.key, (-1, None))
        if metric.step < step or (metric.step == step and metric.value == value):
            return False
        run.last[metric.key] = (metric.step, metric.value)
        return True

    def _last_metrics(self, run_id: str) -> dict[str, tuple[int, float]]:
        latest = self.client.get_run(run_id).data.metrics
        steps = {key: self.client.get_metric_history(run_id, key) for key in latest}
        return {key: (max(m.step for m in steps[key]), latest[key]) for key in latest}

    def _set_status(self, run: KnownRun, status: str, at: float) -> None:
        if status == run.status:
            return
        if status == "RUNNING":
            self.client.update_run(run.run_id, status)
        else:
            self.client.set_terminated(run.run_id, status, int(at * 1000))
        run.status = status


class MlflowWriter:
    """The one writer of a search to MLflow; a journal listener that returns at once.

    Args:
        tracking_uri: server or database.
        search_id: name of the parent run.
        record: appends to the journal; called with `RunMinted` from the writer's own thread.
        known: events of the journal so far, in order, when a search is resumed.

    Raises:
        InputError: nothing answers at the URI.
    """

    def __init__(
        self,
        tracking_uri: str,
        search_id: str,
        record: Callable[[Event], None],
        known: Iterable[Event] = (),
    ) -> None:
        self.tracking_uri = tracking_uri
        client, experiment_id = connect(tracking_uri)
        self._drafts = Drafts(search_id)
        self._store = RunStore(client, experiment_id, record)
        self._folds: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._has_warned = False
        for event in known:
            self(event)
        self._thread = threading.Thread(target=self._work, name="mlflow-writer", daemon=True)
        self._thread.start()

    def __call__(self, event: Event) -> None:
        """Take a journal event; it is sent with the next round."""
        self._folds.put(partial(self._drafts.add, event))

    def scores(self, scores: Mapping[str, Mapping[str, float]]) -> None:
        """Take objective scores by trial; those that did not change are not sent again."""
        self._folds.put(partial(self._drafts.score, scores, time.time()))

    def finish(self, results: dict[str, Any], files: Iterable[Path] = ()) -> None:
        """Take the answer of the search and its files, kept as artifacts of the parent run."""
        self._folds.put(partial(self._drafts.results, results, list(files), time.time()))

    def close(self, timeout_seconds: float | None = 30.0) -> int:
        """Send what is left, trying once; updates that were not delivered, also logged."""
        self._closing.set()
        self._thread.join(timeout_seconds)
        left = self._folds.qsize() + sum(
            draft.updates for draft in list(self._drafts.runs.values())
        )
        if left:
            logger.warning(
                "%d updates did not reach the tracking server %s; the journal has them: "
                "thriftlm.review.tracking.rebuild sends them again",
                left,
                without_password(self.tracking_uri),
            )
        return left

    def _work(self) -> None:
        pause = ROUND_SECONDS
        is_last = False
        while not is_last:
            is_last = self._closing.wait(pause)
            self._drain()
            pause = ROUND_SECONDS if self._deliver() else min(2 * pause, BACKOFF_SECONDS)

    def _drain(self) -> None:
        while not self._folds.empty():
            self._folds.get()()

    def _deliver(self) -> bool:
        """Send every draft, the parent's first; whether all of them arrived."""
        if self._drafts.search_key is None:
            return True
        complete = True
        for draft in [draft for draft in self._drafts.runs.values() if draft.waiting]:
            try:
                self._store.send(draft, self._drafts)
            except Exception as error:  # a search never stops because its tracking does
                complete = False
                self._warn(error)
                self._store.forget()
                if not self._store.answers():
                    break
        return complete

    def _warn(self, error: Exception) -> None:
        if not self._has_warned:
            logger.warning(
                "tracking server %s does not take updates (%s); the search goes on, they are sent "
                "when it does",
                without_password(self.tracking_uri),
                cause(error),
            )
        self._has_warned = True


def rebuild(events: Iterable[Event], tracking_uri: str) -> None:
    """Bring MLflow to what a journal says; what is there already is found and not repeated.

    Raises:
        InputError: the journal is empty, nothing answers at the URI, or it stopped answering.
    """
    known = list(events)
    if not known or not isinstance(known[0], SearchStarted):
        raise InputError("a journal begins with search_started; this one does not")
    writer = MlflowWriter(tracking_uri, known[0].search_id, lambda event: None, known)
    if left := writer.close(timeout_seconds=None):
        raise InputError(
            f"{left} updates did not reach {without_password(tracking_uri)}; try again"
        )


def connect(tracking_uri: str) -> tuple[MlflowClient, str]:
    """A client of a server that answers, and the id of the experiment.

    Raises:
        InputError: it does not answer in time, or cannot be used.
    """
    is_server = tracking_uri.startswith(("http://", "https://"))
    seconds = CONNECT_SECONDS if is_server else MIGRATE_SECONDS
    answer: queue.SimpleQueue[tuple[MlflowClient, str] | Exception] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answer.put(open_experiment(tracking_uri))
        except Exception as error:  # passed on to the caller below
            answer.put(error)

    # On a thread, because a name server that hangs is under no timeout of MLflow's.
    threading.Thread(target=ask, name="mlflow-connect", daemon=True).start()
    try:
        result = answer.get(timeout=seconds)
    except queue.Empty:
        result = TimeoutError(f"no answer within {seconds:g} s")
    if isinstance(result, Exception):
        raise InputError(
            f"tracking server {without_password(tracking_uri)} cannot be used: "
            f"{cause(result)}; start it, correct --tracking-uri, or leave that out to track "
            "in the storage folder"
        ) from result
    return result


def open_experiment(tracking_uri: str) -> tuple[MlflowClient, str]:
    """A client and the id of the experiment, created where it is missing."""
    folder = sqlite_folder(tracking_uri)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    client = MlflowClient(tracking_uri)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        artifacts = None if folder is None else (folder / "mlartifacts").as_uri()
        try:
            return client, client.create_experiment(EXPERIMENT, artifacts)
        except MlflowException:  # another search may have been faster
            experiment = client.get_experiment_by_name(EXPERIMENT)
            if experiment is None:
                raise
    if experiment.lifecycle_stage != "active":
        raise InputError(
            f"its experiment {EXPERIMENT} is deleted: mlflow experiments restore "
            f"--experiment-id {experiment.experiment_id}"
        )
    return client, experiment.experiment_id


def sqlite_folder(tracking_uri: str) -> Path | None:
    """Absolute folder of an SQLite file; None for any other store."""
    scheme, _, database = tracking_uri.partition(":///")
    if not scheme.startswith("sqlite") or not database:
        return None
    return Path(database.partition("?")[0]).absolute().parent


def without_password(text: str) -> str:
    """The text with user and password taken out of every URI."""
    return re.sub(r"://[^/@\s]*@", "://***@", text)


def cause(error: Exception) -> str:
    """What went wrong, in one line: the system's own words where the network or a file failed."""
    at_bottom: BaseException = error
    while at_bottom.__context__ is not None:
        at_bottom = at_bottom.__context__
    told = at_bottom if isinstance(at_bottom, OSError) else error
    lines = str(told).strip().splitlines() or [type(told).__name__]
    return without_password(lines[0][:300])
