"""How a search stands, read from its folder while another process, on any node, runs it.

What fits laws is imported where a leader is asked for, so that `stop` answers at once.
"""

import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError

from thriftlm.config_file import ConfigFile, did_you_mean
from thriftlm.search.budget import Budget
from thriftlm.search.history.journal import is_held, read
from thriftlm.search.history.state import SearchState, TrialState
from thriftlm.search.history.stopping import Driver, driver_of, read_request
from thriftlm.search.history.storage import Storage
from thriftlm.search.spaces.settings import SearchSettings
from thriftlm.spec import InputError, Spec

if TYPE_CHECKING:
    from thriftlm.search.answers.result import SearchResult

JOURNAL = "journal.jsonl"
Standing = Literal["starting", "running", "stopping", "interrupted", "finished", "dead"]
"""`starting`: its driver prepares data and Ray. `stopping`: it was asked to end, trials end at
their next report. `dead`: its driver is gone without a word. `--resume` goes on with what is
`interrupted` or `dead`."""


class RunningTrial(Spec):
    """A trial that holds resources now."""

    trial_id: str
    point: dict[str, Any]
    """The varied fields."""
    strategy: str
    n_gpus: int
    tokens: int
    """Trained so far."""
    of_tokens: int
    """Where it would end."""
    loss: float | None
    """Last validation loss in nats per token."""
    tokens_per_s: float | None
    """Measured, over all GPUs."""
    usd: float
    """All its allocations, the open one up to now."""
    stop_reason: str | None
    """Why it ends at its next report; None while it may go on."""
    report_due_seconds: float
    """Seconds to its next report by its pace so far; negative where that is late."""


class Leader(Spec):
    """The trial that the search would answer with now."""

    trial_id: str
    point: dict[str, Any]
    strategy: str
    n_gpus: int
    tokens: int
    loss: float | None
    """Last validation loss in nats per token."""
    loss_at_budget: float
    """Predicted loss at the training budget."""
    low: float
    high: float
    """Ends of its interval; rough, from few refits."""


class SearchStanding(Spec):
    """How one search stands."""

    search_id: str
    status: Standing
    reason: str
    """Why it ended."""
    algorithm: str | None
    """None before its journal has begun."""
    driver: Driver | None
    """Its last driver, alive or not."""
    is_held: bool
    """Whether a driver holds its journal, hence lives."""
    started_at: datetime | None
    last_event_at: datetime | None
    hours: float
    """Wall clock of all its drivers."""
    spent_usd: float
    """All allocations, open ones up to now."""
    budget_usd: float | None
    budget_trials: int | None
    trials: dict[str, int]
    """Trials by status; `known` ones an earlier search has run."""
    running: list[RunningTrial]
    leader: Leader | None
    """None while nothing was learned."""
    waits_for: str
    """What has to happen before it goes on."""


class ListedSearch(Spec):
    """One search of the storage folder."""

    name: str
    status: Standing | Literal["unreadable"]
    algorithm: str | None
    trials: int
    """Proposed so far."""
    spent_usd: float
    budget_usd: float | None
    best_loss_at_budget: float | None
    """Predicted loss of the leader at the training budget."""
    started_at: datetime | None
    last_event_at: datetime | None
    error: str | None
    """Why it cannot be read."""


def folder_of(storage: Storage, name: str) -> Path:
    """The folder of a search.

    Raises:
        InputError: there is none of that name.
    """
    folder = storage.search(name)
    if name and (folder / JOURNAL).exists():
        return folder
    known = [path.name for path in _folders(storage)]
    hint = did_you_mean(name, known) if known else "no search was begun in it"
    raise InputError(f"no search named '{name}' in {storage.root}; {hint}")


def standing(folder: Path, now: float | None = None, *, with_leader: bool = True) -> SearchStanding:
    """How the search in a folder stands at `now`, in Unix seconds.

    Raises:
        InputError: its journal cannot be read.
    """
    seen = _Seen(folder, time.time() if now is None else now)
    state = seen.state
    return SearchStanding(
        search_id=folder.name,
        status=seen.status,
        reason=state.ended.reason if state.ended else "",
        algorithm=seen.algorithm,
        driver=seen.driver,
        is_held=seen.held,
        started_at=_instant(state.started.at if state.started else 0),
        last_event_at=_instant(state.last_at),
        hours=state.hours(seen.now) if state.started else 0.0,
        spent_usd=state.spent_usd(seen.now),
        budget_usd=seen.setting("search_budget", "usd"),
        budget_trials=seen.setting("search_budget", "trials"),
        trials=dict(Counter(seen.trial_status(trial) for trial in state.trials.values())),
        running=[seen.running(trial) for trial in state.running] if seen.is_live else [],
        leader=_leader(seen) if with_leader else None,
        waits_for=seen.waits_for(),
    )


def listed(storage: Storage) -> list[ListedSearch]:
    """All searches of a storage folder, the one that was last heard of first."""
    found = [_listed(folder) for folder in _folders(storage)]
    dawn = datetime.fromtimestamp(0, UTC)
    return sorted(found, key=lambda one: one.last_event_at or dawn, reverse=True)


class _Seen:
    """What a search's folder says at one moment."""

    def __init__(self, folder: Path, now: float) -> None:
        # In this order: a driver that ends in between has written everything before it lets go.
        self.held = is_held(folder / JOURNAL)
        self.folder, self.driver = folder, driver_of(folder)
        self.state = SearchState(read(folder / JOURNAL))
        self.is_live = self.held and not self._is_starting and self.state.ended is None
        self.now = now if self.is_live else self.state.last_at

    @property
    def _is_starting(self) -> bool:
        """Whether the driver lives and has written nothing yet."""
        begun = self.state.session_since
        return self.state.started is None or (self.driver is not None and begun < self.driver.since)

    @property
    def status(self) -> Standing:
        if self.held and self._is_starting:
            return "starting"
        if self.state.ended is not None:
            return self.state.ended.status
        if not self.held:
            return "dead"
        request, driver = read_request(self.folder), self.driver
        is_asked = request is not None and driver is not None and request.token == driver.token
        return "stopping" if is_asked else "running"

    def setting(self, section: str, key: str) -> Any:
        started = self.state.started
        return None if started is None else (started.space.get(section) or {}).get(key)

    @property
    def algorithm(self) -> str | None:
        if self.state.started is None:
            return None
        usual = SearchSettings.model_fields["algorithm"].default
        return str(self.setting("search", "algorithm") or usual)

    def trial_status(self, trial: TrialState) -> str:
        if trial.is_only_known:
            return "known"
        if trial.status is not None:
            return trial.status
        if trial.is_running and self.is_live:
            return "running"
        return "paused" if trial.is_paused else "waiting"

    def running(self, trial: TrialState) -> RunningTrial:
        return RunningTrial(
            trial_id=trial.trial_id,
            point=trial.point,
            strategy=trial.run.system.strategy,
            n_gpus=trial.run.system.n_gpus,
            tokens=trial.tokens,
            of_tokens=trial.run.tokens,
            loss=trial.loss,
            tokens_per_s=trial.tokens_per_s(),
            usd=trial.usd(self.now),
            stop_reason=trial.stop_reason,
            report_due_seconds=self._due(trial),
        )

    def _due(self, trial: TrialState) -> float:
        return -Budget().late_seconds(self.state, trial, self.now)

    def waits_for(self) -> str:
        match self.status:
            case "starting":
                return "its driver, which prepares data and Ray"
            case "interrupted" | "finished" if self.held:
                return "its driver, which writes the answer"
            case "interrupted" | "dead":
                return f"you: `thriftlm search SPACE --name {self.folder.name} --resume` goes on"
            case "finished":
                return "nothing"
        return "; ".join(self._waits())

    def _waits(self) -> Iterator[str]:
        running = self.state.running
        if not running:
            yield "its driver, which starts the next trial or ends the search"
            return
        what = "the end" if all(trial.stop_reason for trial in running) else "the next report"
        number = "1 trial" if len(running) == 1 else f"{len(running)} trials"
        due = min(self._due(trial) for trial in running)
        when = f"due in {due:.0f} s" if due >= 0 else f"{-due:.0f} s late"
        yield f"{what} of {number}, {when}"
        queued = [t.trial_id for t in self.state.waiting if not t.is_paused]
        if queued and self.status == "running":
            yield f"{', '.join(queued)} for room or money beside them"


def _folders(storage: Storage) -> list[Path]:
    """Folders of all searches."""
    return sorted(path.parent for path in storage.search("x").parent.glob(f"*/{JOURNAL}"))


def _listed(folder: Path) -> ListedSearch:
    try:
        seen = _Seen(folder, time.time())
    except (InputError, OSError) as error:
        at = _instant((folder / JOURNAL).stat().st_mtime)
        return ListedSearch(
            name=folder.name,
            status="unreadable",
            algorithm=None,
            trials=0,
            spent_usd=0.0,
            budget_usd=None,
            best_loss_at_budget=None,
            started_at=None,
            last_event_at=at,
            error=str(error),
        )
    return ListedSearch(
        name=folder.name,
        status=seen.status,
        algorithm=seen.algorithm,
        trials=seen.state.n_started,
        spent_usd=seen.state.spent_usd(seen.now),
        budget_usd=seen.setting("search_budget", "usd"),
        best_loss_at_budget=_best_loss(seen),
        started_at=_instant(seen.state.started.at if seen.state.started else 0),
        last_event_at=_instant(seen.state.last_at),
        error=None,
    )


def _best_loss(seen: _Seen) -> float | None:
    answer = _answer(seen)
    leader = None if answer else _leader(seen)
    return getattr(answer.best if answer else leader, "loss_at_budget", None)


def _answer(seen: _Seen) -> "SearchResult | None":
    """What the search has written, where nothing has happened since."""
    from thriftlm.search.answers.result import SearchResult

    state = seen.state
    try:
        answer = SearchResult.model_validate_json((seen.folder / "results.json").read_bytes())
    except (OSError, ValidationError):
        return None
    now = (state.spent_usd(state.last_at), state.hours(state.last_at))
    return answer if (answer.spent_usd, answer.hours) == now else None


def _leader(seen: _Seen) -> Leader | None:
    """The answer's winner, else by predicted loss; None where there is none to tell."""
    answer, state = _answer(seen), seen.state
    if answer is None:
        return _best_by_law(seen)
    if answer.best is None or answer.best.trial_id not in state.trials:
        return None
    best = answer.best
    return _leading(state.trials[best.trial_id], best.loss_at_budget, best.low, best.high)


def _best_by_law(seen: _Seen) -> Leader | None:
    """None too where this version does not read the space any more."""
    from thriftlm.search.scores.objective import rank
    from thriftlm.search.scores.scoring import FEW_SAMPLES, score_trials
    from thriftlm.search.spaces.space import Space

    state = seen.state
    if state.started is None or not any(trial.curve for trial in state.trials.values()):
        return None
    try:
        space = Space(ConfigFile(str(seen.folder / JOURNAL), state.started.space))
    except InputError:
        return None
    scores = score_trials(space, state, state.trials.values(), samples=FEW_SAMPLES)
    if not scores:
        return None
    score = scores[rank(scores)[0]]
    return _leading(state.trials[score.trial_id], score.loss_at_budget, score.low, score.high)


def _leading(trial: TrialState, loss_at_budget: float, low: float, high: float) -> Leader:
    return Leader(
        trial_id=trial.trial_id,
        point=trial.point,
        strategy=trial.run.system.strategy,
        n_gpus=trial.run.system.n_gpus,
        tokens=trial.tokens,
        loss=trial.loss,
        loss_at_budget=loss_at_budget,
        low=low,
        high=high,
    )


def _instant(at: float) -> datetime | None:
    return datetime.fromtimestamp(at, UTC) if at else None
