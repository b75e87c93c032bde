"""A search in MLflow while it runs: one parent run, one child run per trial.

The writer works on a thread of its own, so that neither the search nor a trial ever waits for a
server; what a server missed is sent when it answers again, or by `rebuild` from the journal.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from thriftlm.review.drafts import Drafts
from thriftlm.review.mlflow_store import RunStore, cause, connect, without_password
from thriftlm.search.history.journal import Event, SearchStarted
from thriftlm.spec import InputError

ROUND_SECONDS = 0.5
"""Pause between two rounds of sending; what happens meanwhile is sent in one batch."""
BACKOFF_SECONDS = 60.0
"""Longest pause while the server does not take what it is sent."""

logger = logging.getLogger(__name__)


class MlflowWriter:
    """The one writer of a search to MLflow; a journal listener that returns at once.

    Args:
        tracking_uri: server or database.
        search_id: name of the parent run.
        record: appends to the journal; called with `RunMinted` from the writer's own thread.
        known: events of the journal so far, in order, when a search is resumed.
        connect_seconds: how long the server may take to answer; when not given, what suits it.
        backoff_seconds: longest pause while it does not take what it is sent.

    Raises:
        InputError: nothing answers at the URI.
    """

    def __init__(
        self,
        tracking_uri: str,
        search_id: str,
        record: Callable[[Event], None],
        known: Iterable[Event] = (),
        *,
        connect_seconds: float | None = None,
        backoff_seconds: float = BACKOFF_SECONDS,
    ) -> None:
        self.tracking_uri = tracking_uri
        client, experiment_id = connect(tracking_uri, connect_seconds)
        self._backoff_seconds = backoff_seconds
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
            pause = ROUND_SECONDS if self._deliver() else min(2 * pause, self._backoff_seconds)

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
