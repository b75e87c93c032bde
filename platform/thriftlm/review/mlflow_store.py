"""The runs of a search on a tracking server: found by their tags, created, told what is new.

The only module that imports mlflow. Sending twice is harmless: a metric is sent only beyond the
step that the server already has.
"""

import os
import queue
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

# Read by mlflow while it is imported. Errors reach the writer as exceptions, so what mlflow would
# log about them is noise; its run links would land in the JSON on stdout.
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "CRITICAL")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
# The defaults are 120 s per request and seven tries inside one call: minutes on a dead server.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException

from thriftlm.review.drafts import Draft, Drafts, Number
from thriftlm.search.history.journal import Event, RunMinted
from thriftlm.spec import InputError

EXPERIMENT = "thriftlm"
CONNECT_SECONDS = 10.0
"""How long a server may take to answer the first time."""
MIGRATE_SECONDS = 120.0
"""How long a database may take to answer the first time; a new one is migrated, 2 s alone."""
MAX_TEXT = 5000
"""Characters of a tag or param value that every MLflow store takes."""
MAX_BATCH = 800
"""Metrics in one request; MLflow takes 1000 entries, tags and params included."""


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
        metrics = [as_metric(number) for number in draft.metrics if self._is_news(run, number)]
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

    def _is_news(self, run: KnownRun, number: Number) -> bool:
        """Whether the number lies beyond the last step on the server, or changes its value."""
        if run.last is None:
            run.last = self._last_metrics(run.run_id)
        step, value = run.last.get(number.key, (-1, None))
        if number.tokens < step or (number.tokens == step and number.value == value):
            return False
        run.last[number.key] = (number.tokens, number.value)
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


def as_metric(number: Number) -> Metric:
    """The number as MLflow takes it."""
    return Metric(number.key, number.value, int(number.at * 1000), number.tokens)


def connect(tracking_uri: str, timeout_seconds: float | None = None) -> tuple[MlflowClient, str]:
    """A client of a server that answers, and the id of the experiment.

    Args:
        tracking_uri: server or database.
        timeout_seconds: how long it may take to answer; when not given, what suits its kind.

    Raises:
        InputError: it does not answer in time, or cannot be used.
    """
    is_server = tracking_uri.startswith(("http://", "https://"))
    usual = CONNECT_SECONDS if is_server else MIGRATE_SECONDS
    seconds = usual if timeout_seconds is None else timeout_seconds
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
