"""What passes between Tune's trials and the gangs that run them: one small actor.

A trial hands its job to a gang and waits for news of it; every rank of the gang asks for the next
job, and the first rank hands in reports. The answer to a report says whether the trial must end, so
that a stop is cooperative, the checkpoint is written and the workers stay whole.
"""

import asyncio
from collections import defaultdict
from typing import Any

import ray

Job = dict[str, Any]
News = dict[str, Any]
Outcome = dict[str, str | None]


@ray.remote(num_cpus=0, max_concurrency=10_000)
class Exchange:
    """Jobs of gangs and news of trials; every method is a coroutine on one event loop."""

    def __init__(self) -> None:
        self.changed = asyncio.Condition()
        self.jobs: dict[str, list[Job]] = defaultdict(list)
        self.working: dict[str, str] = {}
        self.gone: set[str] = set()
        self.dismissed: set[str] = set()
        self.stopping: set[str] = set()
        self.memory: dict[str, str] = {}
        self.tokens: dict[str, int] = {}
        self.news_of: dict[str, list[News]] = defaultdict(list)

    # --- the driver and its trials ----------------------------------------------------------------

    async def begin(self, gang: str, job: Job) -> bool:
        """Hand a trial to a gang; whether that is there to take it.

        What was said of the trial before is forgotten.
        """
        if gang in self.gone:
            return False
        trial_id = job["trial_id"]
        self.working[gang] = trial_id
        self.stopping.discard(trial_id)
        for said in (self.memory, self.tokens, self.news_of):
            said.pop(trial_id, None)
        self.jobs[gang].append(job)
        await self._tell()
        return True

    async def news(self, trial_id: str) -> list[News]:
        """What has happened to a trial since this was asked last; waits for something."""
        async with self.changed:
            await self.changed.wait_for(lambda: self.news_of[trial_id])
            return self.news_of.pop(trial_id)

    async def stop(self, trial_id: str) -> None:
        """Ask a trial to end at its next report."""
        self.stopping.add(trial_id)

    async def dismiss(self, gang: str) -> None:
        """Ask a gang to end when it has no job."""
        self.dismissed.add(gang)
        await self._tell()

    # --- the gang ---------------------------------------------------------------------------------

    async def job(self, gang: str, number: int) -> Job | None:
        """The job of a gang with that number; waits for it, None when the gang is dismissed."""

        def is_there() -> bool:
            return len(self.jobs[gang]) > number or gang in self.dismissed

        async with self.changed:
            await self.changed.wait_for(is_there)
        if len(self.jobs[gang]) <= number:
            return None
        job = self.jobs[gang][number]
        known = max(job["known_tokens"], self.tokens.get(job["trial_id"], 0))
        return job | {"known_tokens": known}  # a gang that was lost has been heard of

    async def report(
        self, trial_id: str, tokens: int, progress: str, checkpoint: str | None
    ) -> bool:
        """Take a report in; whether the trial must end now."""
        self.tokens[trial_id] = tokens
        await self._add(trial_id, {"progress": progress, "checkpoint": checkpoint})
        return trial_id in self.stopping

    async def timed(self, trial_id: str, timing: str) -> bool:
        """Take what a probe timed in; whether it must end now."""
        await self._add(trial_id, {"timing": timing})
        return trial_id in self.stopping

    async def ended(self, gang: str, outcome: Outcome) -> None:
        """Record how the trial of a gang ended."""
        await self._add(self.working.pop(gang), {"outcome": outcome})

    async def note_memory(self, trial_id: str, reason: str) -> None:
        """Record that a rank ran out of memory and cannot say so through its peers."""
        self.memory[trial_id] = reason

    async def broke(self, gang: str) -> tuple[int, str | None] | None:
        """What a gang broke in: the number of the job and what was noted of memory.

        None where it had none; then it is gone, and takes no other.
        """
        if gang not in self.working:
            self.gone.add(gang)
            return None
        return len(self.jobs[gang]) - 1, self.memory.get(self.working[gang])

    async def _add(self, trial_id: str, news: News) -> None:
        self.news_of[trial_id].append(news)
        await self._tell()

    async def _tell(self) -> None:
        async with self.changed:
            self.changed.notify_all()
