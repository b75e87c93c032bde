"""Checkpoints on disk: whole or not there.

A checkpoint is written beside its final name and renamed when every rank is done, so that a folder
named `step_...` without a suffix is always complete. One with a suffix is what a kill left, and
the next save removes it.
"""

import shutil
from pathlib import Path
from pickle import UnpicklingError

from pydantic import NonNegativeInt
from torch.distributed.checkpoint.api import CheckpointException

from thriftlm.spec import InputError, Progress, RunSpec, Spec
from thriftlm.training.engine import Engine, load_weights
from thriftlm.training.ranks import Ranks
from thriftlm.training.shard_files import TOKENIZER, sync, write_synced
from thriftlm_models.decoder import Decoder

UNREADABLE = (
    CheckpointException,  # of torch's distributed checkpoint; no Exception
    EOFError,
    KeyError,
    OSError,
    RuntimeError,
    UnpicklingError,
    ValueError,
)
"""What torch, its distributed checkpoint and DeepSpeed raise on a damaged or missing file."""
KEPT = 2
STATE = "state.json"


class RunState(Spec):
    """What a run needs, beside the weights, to go on. The data position is the step."""

    run: RunSpec
    """The run that wrote it."""
    step: NonNegativeInt
    """Optimizer steps done."""
    curve: tuple[Progress, ...]
    """All reports so far."""


def save(folder: Path, engine: Engine, ranks: Ranks, state: RunState, tokenizer: Path) -> Path:
    """The folder of a new complete checkpoint; older ones but the last two are removed.

    The tokenizer goes in too, so that a checkpoint can be used wherever it is copied to.
    """
    final = folder / f"step_{state.step:08d}"
    partial = folder / f"{final.name}.partial"
    if ranks.rank == 0:
        for leftover in folder.glob("step_*.*"):
            shutil.rmtree(leftover)
        partial.mkdir(parents=True)
    ranks.barrier()
    engine.save(partial)
    ranks.barrier()
    if ranks.rank == 0:
        write_synced(partial / TOKENIZER, tokenizer.read_text(encoding="utf-8"))
        write_synced(partial / STATE, state.model_dump_json())
        if final.exists():
            remove(final)
        partial.rename(final)
        sync(folder)
        for old in complete(folder)[:-KEPT]:
            remove(old)
    ranks.barrier()
    return final


def remove(path: Path) -> None:
    """Remove a checkpoint: first its name, so that it is never found in pieces."""
    shutil.rmtree(path.rename(path.with_suffix(".removed")))


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints of a folder, oldest first."""
    return sorted(path for path in folder.glob("step_*") if not path.suffix)


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint of a folder, None when there is none."""
    found = complete(folder)
    return found[-1] if found else None


def load(folder: Path, engine: Engine, spec: RunSpec) -> RunState:
    """The state of a checkpoint, with weights and optimizer loaded into the engine.

    Raises:
        InputError: it is no checkpoint, or one of another recipe or of a layout that cannot be
            read into this one.
    """
    state = read_state(folder)
    if state.run.recipe_id != spec.recipe_id or state.run.tokens != spec.tokens:
        raise InputError(
            f"{folder} belongs to another run (recipe {state.run.recipe_id} over "
            f"{state.run.tokens} tokens; this one is {spec.recipe_id} over {spec.tokens}); "
            "choose another output folder"
        )
    here, there = (_layout(run) for run in (spec, state.run))
    if here != there:
        raise InputError(
            f"{folder} was written by {there} and cannot be read by {here} yet; "
            "go on with the same system"
        )
    engine.load(folder)
    return state


def read_state(folder: Path) -> RunState:
    """The state of a checkpoint, without its weights.

    Raises:
        InputError: it is no checkpoint.
    """
    try:
        return RunState.model_validate_json((folder / STATE).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} is not a checkpoint: {error}") from error


def load_decoder(folder: Path) -> tuple[Decoder, RunState]:
    """The model of a checkpoint alone, whole in this process and in fp32, whatever wrote it.

    Raises:
        InputError: it is no checkpoint, or is damaged.
    """
    state = read_state(folder)
    decoder = Decoder(state.run.model)
    try:
        load_weights(decoder, folder, by_deepspeed=_layout(state.run) != "torch")
    except UNREADABLE as error:
        reason = (str(error).strip().splitlines() or [repr(error)])[-1]
        raise InputError(f"{folder} cannot be read: {reason}; use another checkpoint") from error
    return decoder, state


def _layout(run: RunSpec) -> str:
    # torch's distributed checkpoints are read at any world size; DeepSpeed's only at their own.
    if run.system.strategy.startswith("zero") and run.system.n_gpus > 1:
        return f"{run.system.strategy} on {run.system.n_gpus} workers"
    return "torch"
