"""Batches that a thread reads while the device computes."""

import queue
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from thriftlm.training.batches import Batches

AHEAD = 8
"""Micro-batches that are ready at most."""


class Prefetch:
    """The batches of a run, in the same order, read ahead by a thread; pinned for a CUDA device.

    The thread starts with the first step that is asked for, and anew where the next one asked for
    is not the next.

    Args:
        batches: what to read.
        steps: optimizer steps of the run: nothing is read beyond.
        device: where the batches go.
    """

    def __init__(self, batches: Batches, steps: int, device: torch.device) -> None:
        self._batches, self._steps, self._device = batches, steps, device
        self._next: int | None = None
        self._stop = threading.Event()
        self._ready: queue.Queue[Tensor | BaseException] = queue.Queue(AHEAD)
        self._thread: threading.Thread | None = None

    def at(self, step: int) -> Iterator[Tensor]:
        """Micro-batches of a step, as of `Batches.at`; what went wrong in the thread is raised."""
        if step >= self._steps:
            yield from self._batches.at(step)
            return
        if self._next != step:
            self._start(step)
        self._next = None  # until all of it is taken
        for _ in range(self._batches.in_step):
            found = self._ready.get()
            if isinstance(found, BaseException):
                self.close()
                raise found
            yield found
        self._next = step + 1

    def real_share(self, step: int) -> float:
        """As of `Batches.real_share`."""
        return self._batches.real_share(step)

    def close(self) -> None:
        """End the thread, and wait until it has ended."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._thread, self._next = None, None

    def _start(self, step: int) -> None:
        self.close()
        self._stop = threading.Event()
        self._ready = queue.Queue(AHEAD)
        self._thread = threading.Thread(
            target=self._read, args=(step, self._ready, self._stop), name="batches", daemon=True
        )
        self._thread.start()

    def _read(
        self, first: int, ready: queue.Queue[Tensor | BaseException], stop: threading.Event
    ) -> None:
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)  # pinning makes a context, on this device only
            for step in range(first, self._steps):
                for batch in self._batches.at(step):
                    found = batch.pin_memory() if self._device.type == "cuda" else batch
                    if not _put(found, ready, stop):
                        return
        except BaseException as error:  # raised where the batch is waited for
            _put(error, ready, stop)


def _put(
    item: Tensor | BaseException, ready: queue.Queue[Tensor | BaseException], stop: threading.Event
) -> bool:
    """Whether the item found its place before the stop."""
    while not stop.is_set():
        try:
            ready.put(item, timeout=0.05)
        except queue.Full:
            continue
        return True
    return False
