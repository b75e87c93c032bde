"""Checkpoints written while the run goes on.

The step loop waits for one thing only: the copy of its state into host memory. A thread of each
rank then writes, over a process group of its own. At most one write is in flight. One that fails is
a line on stderr and in the measurement, not the end of the run.
"""

import shutil
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import save as save_checkpoint

from thriftlm.training.checkpoint_files import (
    FileEntry,
    Location,
    Manifest,
    Shelf,
    entry_of,
    outdated,
    shelf_at,
    step_name,
    step_of,
)
from thriftlm.training.engine_state import State
from thriftlm.training.random_state import random_state
from thriftlm.training.ranks import Ranks

PATIENCE = timedelta(hours=2)
"""How long one rank's write waits for another's; a rank that died is noticed at once."""
Found = TypeVar("Found")


class WriteError(Exception):
    """A checkpoint could not be written, on this rank or another; the message is the reason."""


class Writer:
    """Writes the checkpoints of one run.

    Args:
        location: the run's folder, or its URL in an object store.
        ranks: the ranks of the run; all of them make a writer.
        last: how many of the newest checkpoints are kept.
        every_steps: the first at or after each multiple of these is kept too.
    """

    def __init__(
        self, location: Location, ranks: Ranks, *, last: int, every_steps: int | None = None
    ) -> None:
        self.shelf: Shelf = shelf_at(location)
        self.ranks, self.last, self.every_steps = ranks, last, every_steps
        self.group = dist.new_group(backend="gloo", timeout=PATIENCE) if several(ranks) else None
        self.thread: threading.Thread | None = None
        self.stager: DefaultStager | None = None
        self.written: Location | None = None  # the last complete one
        self.unreported: Location | None = None
        self.failures: list[str] = []
        self.stall_seconds = 0.0

    def save(self, step: int, state: State, texts: dict[str, str]) -> None:
        """Copy the state, and write it in the background; all ranks call it.

        Args:
            step: optimizer steps done.
            state: what an engine's `state` gives.
            texts: contents of further files by name, written by the first rank.
        """
        begin = time.perf_counter()
        self.wait()
        staged = self.stage(state)
        random = random_state()
        self.stall_seconds += time.perf_counter() - begin

        def write() -> None:
            try:
                self.written = self.unreported = self._write(step, staged, random, texts)
            except BaseException as error:  # a thread has nobody to raise to
                self._fail(step, error)

        # Not waited for by an interpreter that ends with an error; what it left is partial.
        self.thread = threading.Thread(target=write, name="checkpoint", daemon=True)
        self.thread.start()

    def stage(self, state: State) -> State:
        """A copy in host memory; pinned, and kept for the next time, where that copy is slow."""
        on_gpu = self.ranks.device.type == "cuda"
        if self.stager is None or not on_gpu:
            self.stager = DefaultStager(StagingOptions(on_gpu, False, False, False))
        staged: State = self.stager.stage(state)  # type: ignore[assignment]
        return staged

    def wait(self) -> None:
        """Return when nothing is in flight."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def news(self) -> Location | None:
        """A checkpoint that was completed since this was last asked."""
        found, self.unreported = self.unreported, None
        return found

    def close(self) -> None:
        """Wait, and give back the process group; all ranks call it."""
        self.wait()
        if self.group is not None:
            dist.destroy_process_group(self.group)
            self.group = None

    def _write(
        self, step: int, staged: State, random: dict[str, Any], texts: dict[str, str]
    ) -> Location:
        name, first = step_name(step), self.ranks.rank == 0
        self._on_all(lambda: self.shelf.clear(name) if first else None)
        work = self._on_all(lambda: self.shelf.begin(name))[self.ranks.rank]
        try:
            self._on_all(lambda: self._write_state(work, staged))
            entries = self._on_all(lambda: self._write_rest(work, name, random, texts))
            files = {file: entry for listed in entries for file, entry in listed.items()}
            manifest = Manifest(files=files).signed()
            self._on_all(lambda: self._publish(work, name, manifest) if first else None)
        finally:
            self.shelf.release(work)
        return self.shelf.address(name)

    def _write_state(self, work: Path, staged: State) -> None:
        alone = self.group is None
        writer = FileSystemWriter(work, single_file_per_rank=True, sync_files=True)
        save_checkpoint(staged, storage_writer=writer, process_group=self.group, no_dist=alone)

    def _write_rest(
        self, work: Path, name: str, random: dict[str, Any], texts: dict[str, str]
    ) -> dict[str, FileEntry]:
        rank = self.ranks.rank
        torch.save(random, work / random_file(rank))
        files = [path.name for path in work.glob(f"__{rank}_*")] + [random_file(rank)]
        if rank == 0:
            for file, text in texts.items():
                (work / file).write_text(text, encoding="utf-8")
            files += [".metadata", *texts]
        found = {file: entry_of(work / file) for file in sorted(files)}
        self.shelf.send(work, name, found)
        return found

    def _publish(self, work: Path, name: str, manifest: Manifest) -> None:
        self.shelf.publish(work, name, manifest)
        names = self.shelf.names()
        later = [other for other in names if step_of(other) > step_of(name)]  # of before a way back
        earlier = [other for other in names if other not in later]
        for old in outdated(earlier, self.last, self.every_steps) + later:
            self.shelf.remove(old)

    def _on_all(self, do: Callable[[], Found]) -> list[Found]:
        """What `do` gave on each rank.

        Raises:
            WriteError: it raised on any rank.
        """
        try:
            mine: tuple[Any, str | None] = do(), None
        except (Exception, CheckpointException) as error:
            mine = None, reason_of(error)
        every: list[Any] = [mine]
        if self.group is not None:
            every = [None] * self.ranks.world_size
            dist.all_gather_object(every, mine, group=self.group)
        for _, reason in every:
            if reason is not None:
                raise WriteError(reason)
        return [found for found, _ in every]

    def _fail(self, step: int, error: BaseException) -> None:
        reason = str(error) if isinstance(error, WriteError) else reason_of(error)
        line = f"checkpoint of step {step} could not be written: {reason}{self._room()}"
        self.failures.append(line)
        if self.ranks.rank == 0:
            with suppress(Exception):
                self.shelf.discard(step_name(step))
            last = f"the last good one is {self.written}" if self.written else "there is none yet"
            print(f"warning: {line}; the run goes on, {last}", file=sys.stderr, flush=True)

    def _room(self) -> str:
        path = getattr(self.shelf, "path", None)
        if not isinstance(path, Path) or not path.exists():
            return ""
        return f" ({shutil.disk_usage(path).free / 1e6:,.0f} MB free in {path})"


def several(ranks: Ranks) -> bool:
    """Whether there are ranks to write with."""
    return ranks.world_size > 1


def random_file(rank: int) -> str:
    """Name of the file with a rank's random states."""
    return f"random_{rank}.pt"


def reason_of(error: BaseException) -> str:
    """An error in a line, the cause inside torch's own kind first."""
    if isinstance(error, CheckpointException):
        error = next((wrapped[0] for wrapped in error.failures.values()), error)
    while error.__context__ is not None and not isinstance(error, OSError):
        error = error.__context__
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else repr(error)
