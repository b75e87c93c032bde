"""The append-only journal of a search: everything that the search knows is a replay of it.

One JSON object a line, flushed to disk before the search acts on it. A line that a kill cut short
is dropped when the journal is opened again.
"""

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from threading import RLock
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, TypeAdapter, ValidationError

from thriftlm.spec import InputError, Progress, RunSpec, Spec, Status, SystemSpec
from thriftlm.timings import Timing

JOURNAL_VERSION = 1
CLAIMS, CLAIM_SECONDS = 3, 0.1
"""Who looks whether a journal is held (`is_held`) holds it for a moment: a lock is tried so often
again, with that pause before."""


class Event(Spec):
    """Base of all journal lines."""

    at: float = Field(default_factory=lambda: datetime.now(UTC).timestamp())
    """Unix seconds at which it happened."""


class SearchStarted(Event):
    """First line: what is searched, where, with which prices and versions."""

    kind: Literal["search_started"] = "search_started"
    version: int = JOURNAL_VERSION
    search_id: str
    """Name of the search and of its storage folder."""
    space: dict[str, Any]
    """The resolved space file."""
    versions: dict[str, str]
    """Packages, Python, git commit, price snapshot."""
    unique_tokens: dict[str, int]
    """Training tokens in each corpus that the space uses, by the digest of its `DataSpec`."""


class KnownRun(Spec):
    """What an earlier search knows of one run, as far as it is of use to this one."""

    run_id: str
    """What its source calls it."""
    recipe_id: str
    """Of the recipe in this search where that is one of its space, else of the source."""
    n_params: PositiveFloat
    """Stored parameters without embeddings."""
    point: dict[str, Any]
    """Its varied fields: all of them, without those of the system where that lies outside the
    space, or none where the recipe does and only the law learns of it."""
    trial_id: str | None
    """The trial that it stands for and that is not run again; None where it was measured to too few
    tokens, and outside the space."""
    run: RunSpec | None
    """The whole run, as far as it is known."""
    usd_per_hour: float | None
    """Price of its system when it was taken in; None outside the space."""
    status: Status
    """How it ended; `running` where it was cut short."""
    reports: tuple[Progress, ...]
    """What it measured, by tokens."""


class Known(Event):
    """Runs of an earlier search that this one begins with; follows the first line."""

    kind: Literal["known"] = "known"
    source: str
    """Where they came from."""
    runs: tuple[KnownRun, ...]


class SearchResumed(Event):
    """A new driver took over; allocations still open in the journal ended with the last line."""

    kind: Literal["search_resumed"] = "search_resumed"


class Branch(Spec):
    """The beginning of a trial that goes on with another's run."""

    trial_id: str
    """The other."""
    tokens: PositiveInt
    """Trained by the other."""


class Suggested(Event):
    """The searcher proposed a trial. Its number gives the order of proposals, from 0."""

    kind: Literal["suggested"] = "suggested"
    trial_id: str
    number: int
    point: dict[str, Any]
    """The varied fields by dotted path, as sampled."""
    run: RunSpec
    """The whole run."""
    repeat_of: str | None = None
    """The trial that it trains again with another seed."""
    systems: tuple[SystemSpec, ...] = ()
    """What a probe times with the run's model, batch and optimizer; none in a trial that learns."""
    branch: Branch | None = None
    """Where it begins, when it is a child of scheduler pbt."""


class Allocated(Event):
    """Resources are held for a trial from now on."""

    kind: Literal["allocated"] = "allocated"
    trial_id: str
    usd_per_hour: float
    """Price of everything billed for it."""
    price: str
    """Cloud, region, market, instance and date of that price."""
    gang: str | None = None
    """The gang that runs it, where gangs outlive their trials; a waiting one is no longer idle."""


class Reported(Event):
    """A trial measured something."""

    kind: Literal["reported"] = "reported"
    trial_id: str
    progress: Progress
    checkpoint: str | None = None


class Probed(Event):
    """A probe has timed one of its systems."""

    kind: Literal["probed"] = "probed"
    trial_id: str
    timing: Timing


class StopRequested(Event):
    """Scheduler, budget or person asked a trial to end at its next report."""

    kind: Literal["stop_requested"] = "stop_requested"
    trial_id: str
    reason: str


class Released(Event):
    """The resources of a trial are free again. What it cost runs from `Allocated` to here."""

    kind: Literal["released"] = "released"
    trial_id: str
    usd: float
    preempted: bool = False
    """Whether the market took them back; the trial goes on from its last checkpoint."""


class Idle(Event):
    """A gang has released its trial and waits for the next; it is billed as if it had one."""

    kind: Literal["idle"] = "idle"
    gang: str
    system: SystemSpec
    """Of its last trial."""
    usd_per_hour: float


class Dismissed(Event):
    """A gang that waited has ended. What it cost idle runs from `Idle` to here."""

    kind: Literal["dismissed"] = "dismissed"
    gang: str
    usd: float


class Ended(Event):
    """A trial is over and will not run again."""

    kind: Literal["ended"] = "ended"
    trial_id: str
    status: Status | Literal["failed"]
    """How the run ended; `failed` where it broke in a way that is no result."""
    reason: str = ""
    checkpoint: str | None = None
    """Folder of the last complete checkpoint."""


class RunMinted(Event):
    """The tracking server gave a run its id; `trial_id` is None for the parent of the search."""

    kind: Literal["run_minted"] = "run_minted"
    trial_id: str | None
    mlflow_run_id: str


class SearchEnded(Event):
    """The search is over. `interrupted` searches can be resumed, `finished` ones are answered."""

    kind: Literal["search_ended"] = "search_ended"
    status: Literal["finished", "interrupted"]
    reason: str


AnyEvent = Annotated[
    SearchStarted
    | Known
    | SearchResumed
    | Suggested
    | Allocated
    | Reported
    | Probed
    | StopRequested
    | Released
    | Idle
    | Dismissed
    | Ended
    | RunMinted
    | SearchEnded,
    Field(discriminator="kind"),
]
Listener = Callable[[Event], None]
_event: TypeAdapter[Event] = TypeAdapter(AnyEvent)


class Journal:
    """An open journal: `append` writes a line and tells the listeners.

    It is locked while it is open, and the kernel lets go of the lock when the process dies.

    Args:
        path: the file; created when missing.
        listeners: called with each appended event, in order, after it is on disk.

    Raises:
        InputError: another driver holds the journal, or it cannot be read.
    """

    def __init__(self, path: Path, listeners: tuple[Listener, ...] = ()) -> None:
        self.path = path
        self.listeners = listeners
        self._lock = RLock()  # the tracking thread appends the ids it got
        self._file = path.open("ab", buffering=0)  # what failed to be written must not wait here
        try:
            self._claim()
            self.events: list[Event] = list(read(path))
            self._cut_torn_line()
        except BaseException:
            self._file.close()
            raise

    def append(self, event: Event) -> None:
        """Write the event to disk, then tell every listener.

        Raises:
            OSError: it could not be written; the journal is what it was before.
        """
        with self._lock:
            self._write_whole(event.model_dump_json().encode() + b"\n")
            self.events.append(event)
            for listener in self.listeners:
                listener(event)

    def _claim(self) -> None:
        for pause in (*[CLAIM_SECONDS] * CLAIMS, None):
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError as error:
                if pause is None:
                    raise self._is_taken() from error
                time.sleep(pause)
            except OSError as error:
                raise InputError(
                    f"{self.path} cannot be locked ({error.strerror}), so two drivers could mix "
                    "their searches; choose a storage folder whose file system has locks with "
                    "--storage"
                ) from error

    def _is_taken(self) -> InputError:
        return InputError(
            f"another driver is running this search (it holds {self.path}); wait for its end, end "
            f"it with `thriftlm stop {self.path.parent.name}`, or start another search with --name"
        )

    def _write_whole(self, line: bytes) -> None:
        before = os.fstat(self._file.fileno()).st_size
        left = line
        try:
            while left:
                left = left[self._file.write(left) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            os.ftruncate(self._file.fileno(), before)
            raise OSError(
                error.errno,
                f"{error.strerror}; everything up to here is kept: make room, go on with --resume",
                str(self.path),
            ) from error

    def _cut_torn_line(self) -> None:
        whole = self.path.read_bytes()
        os.ftruncate(self._file.fileno(), whole.rfind(b"\n") + 1)

    def close(self) -> None:
        """Close the file and let go of its lock."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def is_held(path: Path) -> bool:
    """Whether a driver holds the journal, on any machine whose locks reach the file system.

    A shared lock is taken for a moment to find out, which needs no right to write.
    """
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # without locks no driver could have begun
            return False
    return False


def read(path: Path) -> Iterator[Event]:
    """The events of a journal, in order; a last line without its end is left out.

    Raises:
        InputError: a line is not an event, or a newer version wrote the journal.
    """
    text = path.read_bytes()
    lines = text[: text.rfind(b"\n") + 1].splitlines()
    _refuse_newer(path, lines[:1])
    for number, line in enumerate(lines, start=1):
        try:
            yield _event.validate_json(line)
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            where = ".".join(map(str, problem["loc"]))
            raise InputError(
                f"{path}:{number}: not a line of a journal: {where and f'{where}: '}"
                f"{problem['msg']}; repair the file, or start another search with --name"
            ) from error


def _refuse_newer(path: Path, first: list[bytes]) -> None:
    """Before anything else is read: a newer version may have fields that this one refuses."""
    try:
        version = json.loads(first[0])["version"]
    except (IndexError, KeyError, TypeError, ValueError):
        return  # empty, or no journal, which reading it will say
    if version > JOURNAL_VERSION:
        raise InputError(
            f"{path}: written by a newer thriftlm (journal version {version}, this one reads "
            f"{JOURNAL_VERSION}); update thriftlm"
        )
