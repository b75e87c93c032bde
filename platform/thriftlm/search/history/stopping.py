"""How a search is asked to end from another process, on any node that shares its storage.

The driver writes who it is into the search's folder; `thriftlm stop` writes a request beside it
that names that driver. A driver obeys no request but its own, so one that came too late, or that
a killed driver left behind, never stops the next `search --resume`.
"""

import os
import secrets
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from thriftlm.spec import Spec

DRIVER_FILE, REQUEST_FILE = "driver.json", "stop.json"
LOOK_SECONDS = 1.0
"""Between two looks for a request; on shared storage each one asks a server."""
OnStage = Callable[[str, float], None]
T = TypeVar("T", bound=Spec)


class Driver(Spec):
    """Who runs a search."""

    token: str
    """Tells this driver from every other one of the search."""
    host: str
    """Name of its machine."""
    pid: int
    """Its process there."""
    since: float
    """Unix seconds at which it began."""


class StopRequest(Spec):
    """That one driver is to end its search."""

    token: str
    """Of the driver that is asked."""
    at: float
    """Unix seconds."""


class StopRequests:
    """The driver's side: says who runs the search in `folder`, and looks for requests to end it.

    To be made by who holds the search's journal.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.folder, self.clock = folder, clock
        self.driver = Driver(
            token=secrets.token_hex(8),
            host=socket.gethostname(),
            pid=os.getpid(),
            since=time.time(),
        )
        self._looked_at = -LOOK_SECONDS
        self._asked = False
        _write(folder / DRIVER_FILE, self.driver)

    def asked(self) -> bool:
        """Whether this driver was asked to end its search; looks at most once a second."""
        now = self.clock()
        if not self._asked and now - self._looked_at >= LOOK_SECONDS:
            self._looked_at = now
            request = read_request(self.folder)
            self._asked = request is not None and request.token == self.driver.token
        return self._asked

    def heeded(self, on_stage: OnStage) -> OnStage:
        """`on_stage`, interrupted by a request: what is prepared before a search has no trials."""

        def told(stage: str, fraction: float) -> None:
            if self.asked():
                raise KeyboardInterrupt
            on_stage(stage, fraction)

        return told


def driver_of(folder: Path) -> Driver | None:
    """The last driver of the search in a folder, alive or not; None where none was seen."""
    return _read(folder / DRIVER_FILE, Driver)


def read_request(folder: Path) -> StopRequest | None:
    """The last request to end the search in a folder."""
    return _read(folder / REQUEST_FILE, StopRequest)


def request_stop(folder: Path, driver: Driver) -> None:
    """Ask a driver to end its search, as the first Ctrl-C does."""
    _write(folder / REQUEST_FILE, StopRequest(token=driver.token, at=time.time()))


def _write(path: Path, content: Spec) -> None:
    """In one piece: whoever reads finds the old content or the new."""
    part = path.with_name(f".{path.name}-{os.getpid()}")
    part.write_text(content.model_dump_json())
    part.replace(path)


def _read(path: Path, cls: type[T]) -> T | None:
    try:
        return cls.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None
