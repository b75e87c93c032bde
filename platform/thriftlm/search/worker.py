"""The worker of a gang, and how decisions reach it.

Apart from `gang`, so that a worker process need not import Tune. Decisions come through one small
actor, the stop board: it is asked at each report, so that a stop is cooperative, the checkpoint is
written and the placement group is released by the run that made it.
"""

from pathlib import Path
from typing import Any

import ray
from ray import train as ray_train

from thriftlm.spec import Progress, RunSpec

BOARD_PATIENCE_SECONDS = 30.0


@ray.remote(num_cpus=0, max_concurrency=64)
class StopBoard:
    """Which trials must end at their next report, what was heard of them, and who lacked memory."""

    def __init__(self) -> None:
        self.stopping: set[str] = set()
        self.memory: dict[str, str] = {}
        self.tokens: dict[str, int] = {}

    def stop(self, trial_id: str) -> None:
        """Ask a trial to end."""
        self.stopping.add(trial_id)

    def clear(self, trial_id: str) -> None:
        """Forget what was said of a trial, before it starts again."""
        self.stopping.discard(trial_id)
        self.memory.pop(trial_id, None)
        self.tokens.pop(trial_id, None)

    def is_stopping(self, trial_id: str) -> bool:
        """Whether a trial was asked to end."""
        return trial_id in self.stopping

    def note_memory(self, trial_id: str, reason: str) -> None:
        """Record that a rank ran out of memory and cannot say so through its peers."""
        self.memory[trial_id] = reason

    def note_heard(self, trial_id: str, tokens: int) -> None:
        """Record that a report has reached Tune."""
        self.tokens[trial_id] = tokens

    def heard_tokens(self, trial_id: str) -> int:
        """Tokens of the last report of a trial that reached Tune in this session."""
        return self.tokens.get(trial_id, 0)

    def memory_note(self, trial_id: str) -> str | None:
        """What a rank recorded."""
        return self.memory.get(trial_id)


def train_on_worker(config: dict[str, Any]) -> str:
    """The Ray Train worker: trains its rank and returns the measurement as JSON."""
    from thriftlm.training.loop import Decision, OutOfMemoryOnOneRankError, train

    board, trial_id = config["board"], config["trial_id"]
    origin = {"origin": f"{Path(config['folder']).name}/{trial_id}"}
    spec = RunSpec.model_validate_json(config["run"]).model_copy(update=origin)
    rank = ray_train.get_context().get_world_rank()

    def report(progress: Progress, written: Path | str | None) -> Decision:
        if progress.tokens <= config["known_tokens"]:
            return Decision.CONTINUE  # a resumed run reports its whole curve again
        ray_train.report(
            {
                "progress": progress.model_dump_json(),
                "checkpoint": str(written) if written else None,
            }
        )
        if rank != 0:
            return Decision.CONTINUE
        stopping = ray.get(board.is_stopping.remote(trial_id), timeout=BOARD_PATIENCE_SECONDS)
        return Decision.STOP if stopping else Decision.CONTINUE

    output = Path(config["folder"]) / "trials" / trial_id
    try:
        measured = train(
            spec,
            report,
            cache=Path(config["cache"]),
            output=output,
            go_on=True,
        )
    except OutOfMemoryOnOneRankError as error:
        ray.get(board.note_memory.remote(trial_id, str(error)), timeout=BOARD_PATIENCE_SECONDS)
        raise
    return measured.model_dump_json()
