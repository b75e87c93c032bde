"""What a checkpoint holds, and going on from one.

Weights and optimizer lie in torch's distributed format under parameter names, so that a run goes
on with any strategy and any number of ranks (`engine_state`). Beside them: `state.json`, the
tokenizer, and each rank's random states. `checkpoint_files` says what makes one whole,
`checkpoint_writer` writes it.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, ValidationError
from torch.distributed.checkpoint.api import CheckpointException

from thriftlm.spec import InputError, Progress, RunSpec, Spec
from thriftlm.training.checkpoint_files import (
    MANIFEST,
    NAME,
    Location,
    Manifest,
    damage,
    read_manifest,
    shelf_at,
    split_address,
)
from thriftlm.training.checkpoint_writer import random_file, reason_of
from thriftlm.training.engine import Engine
from thriftlm.training.engine_state import load_weights
from thriftlm.training.random_state import set_random_state
from thriftlm.training.ranks import Ranks
from thriftlm.training.schedule import first_difference
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
"""What torch and its distributed checkpoint raise on a damaged or missing file."""
STATE = "state.json"
ALONE = Ranks(0, 1, torch.device("cpu"))


class Spent(Spec):
    """What a run has cost, from the start of its processes to a moment."""

    seconds: NonNegativeFloat = 0.0
    """Wall clock; what a killed start did after its last checkpoint is not known."""
    usd: NonNegativeFloat = 0.0
    """At the price of the system that each start ran on."""

    def plus(self, seconds: float, usd_per_hour: float) -> "Spent":
        """The same and a while more."""
        usd = seconds * usd_per_hour / 3600
        return Spent(seconds=self.seconds + seconds, usd=self.usd + usd)


class Parent(Spec):
    """The checkpoint that a run branched from."""

    checkpoint: str
    """Its folder or URL."""
    step: NonNegativeInt
    """Optimizer steps that were taken over."""
    recipe_id: str
    """Recipe of the trunk."""
    tokens: NonNegativeInt
    """Horizon of the trunk."""


class RunState(Spec):
    """What a run needs, beside weights and random states, to go on.

    The schedule is that of `run` at `step`. So is the position in the data: batch number `step` is
    the same whoever asks for it (`batches.Batches`).
    """

    run: RunSpec
    """The run that wrote it."""
    step: NonNegativeInt
    """Optimizer steps done since the run's beginning."""
    tokens: NonNegativeInt
    """Tokens trained since the run's beginning."""
    curve: tuple[Progress, ...]
    """All reports so far."""
    spent: Spent = Spent()
    """Position in the ledger: what all starts so far have cost."""
    parent: Parent | None = None
    """Where its first steps come from, when they are another run's."""


def complete(location: Location) -> list[str]:
    """Names of the complete checkpoints of a run's folder or URL, oldest first."""
    return shelf_at(location).names()


def latest(location: Location) -> Location | None:
    """The newest complete checkpoint of a run, its checksums not compared; None without one."""
    shelf = shelf_at(location)
    found = shelf.names()
    return shelf.address(found[-1]) if found else None


def resume(
    location: Location, engine: Engine, spec: RunSpec, ranks: Ranks
) -> tuple[RunState, Location] | None:
    """State and address of a run's newest undamaged checkpoint, loaded; None without any.

    All ranks call it. Each damaged one on the way is a line on stderr.

    Raises:
        InputError: all are damaged, or it belongs to another recipe.
    """
    shelf = shelf_at(location)
    names: list[str] = ranks.same(shelf.names() if ranks.rank == 0 else [])
    reason = ""
    for name in reversed(names):
        with shelf.opened(name) as folder:
            bad = damage_of(folder, ranks)
            if bad is None:
                address = shelf.address(name)
                return load(folder, address, engine, spec, ranks), address
        reason = f"{shelf.address(name)} is damaged: {bad}"
        if ranks.rank == 0:
            print(f"warning: {reason}; trying the one before", file=sys.stderr, flush=True)
    if names:
        raise InputError(f"{reason}, and none before it is whole; choose another output folder")
    return None


def load_named(
    address: Location, engine: Engine, spec: RunSpec, ranks: Ranks, *, branch: bool = False
) -> RunState:
    """The state of one given checkpoint, loaded into the engine; all ranks call it.

    Raises:
        InputError: it is no checkpoint, is damaged, or belongs to another recipe; for a branch: it
            is no trunk of this run.
    """
    with undamaged(address, ranks) as folder:
        return load(folder, address, engine, spec, ranks, branch=branch)


def load(
    folder: Path,
    address: Location,
    engine: Engine,
    spec: RunSpec,
    ranks: Ranks,
    *,
    branch: bool = False,
) -> RunState:
    """The state of a checkpoint whose files are whole, loaded into the engine.

    Raises:
        InputError: it belongs to another run, is no trunk of it, or cannot be read.
    """
    state = parse_state(folder, address)
    if branch:
        state = branched(state, address, spec)
    else:
        refuse_foreign(state, address, spec)
    try:
        engine.load(folder)
        reason = None
    except UNREADABLE as error:
        reason = reason_of(error)
    if ranks.any(reason is not None):
        raise unreadable(address, reason or "another rank could not read it")
    random = folder / random_file(ranks.rank)
    if random.is_file():  # none where it was written by fewer ranks
        set_random_state(torch.load(random, weights_only=True))
    return state


def refuse_foreign(state: RunState, address: Location, spec: RunSpec) -> None:
    """Nothing, where a checkpoint is of this run; on whatever system it was written.

    Raises:
        InputError: it is not.
    """
    if state.run.recipe_id != spec.recipe_id or state.run.tokens != spec.tokens:
        raise InputError(
            f"{address} belongs to another run (recipe {state.run.recipe_id} over "
            f"{state.run.tokens} tokens; this one is {spec.recipe_id} over {spec.tokens}); "
            "choose another output folder, or branch with --branch-from"
        )


def branch_of(spec: RunSpec, address: Location) -> RunSpec:
    """The run with its trunk's warm-up, where it does not say what its warm-up counts of.

    Raises:
        InputError: `address` is no checkpoint, or the warm-up leaves no room for the decay.
    """
    trunk = read_state(address).run
    horizon = trunk.optim.trunk_tokens or trunk.tokens
    if spec.optim.trunk_tokens is not None or spec.tokens == horizon:
        return spec
    optim = spec.optim.model_copy(update={"trunk_tokens": horizon})
    try:
        return RunSpec.model_validate(spec.model_copy(update={"optim": optim}).model_dump())
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise InputError(f"a branch from {address}: {reason}") from error


def branched(state: RunState, address: Location, spec: RunSpec) -> RunState:
    """The state of a run that begins with the steps of a checkpoint of another one.

    Raises:
        InputError: the run itself would have done those steps differently.
    """
    trunk = state.run
    for name in ("model", "data", "seed"):
        if getattr(trunk, name) != getattr(spec, name):
            raise InputError(
                f"a branch has its trunk's {name}, and this run's differs from that of {address}; "
                "only tokens, the end of the schedule and later lr_changes may differ"
            )
    other = first_difference(trunk, spec, state.step)
    if other is not None:
        raise InputError(f"{address} is no trunk of this run: {other}")
    parent = Parent(
        checkpoint=str(address), step=state.step, recipe_id=trunk.recipe_id, tokens=trunk.tokens
    )
    curve = tuple(report.model_copy(update={"status": "running"}) for report in state.curve)
    return state.model_copy(
        update={"run": spec, "curve": curve, "spent": Spent(), "parent": parent}
    )


def parse_state(folder: Path, address: Location) -> RunState:
    """The state in a folder of files.

    Raises:
        InputError: it is no checkpoint.
    """
    try:
        return RunState.model_validate_json((folder / STATE).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{address} is not a checkpoint: {error}") from error


def read_state(address: Location) -> RunState:
    """The state of a checkpoint, without its weights.

    Raises:
        InputError: it is no checkpoint.
    """
    shelf, name = split_address(address)
    with shelf.opened(name) as folder:
        return parse_state(folder, address)


def load_decoder(address: Location) -> tuple[Decoder, RunState]:
    """The model of a checkpoint alone, whole in this process and in fp32, whatever wrote it.

    Raises:
        InputError: it is no checkpoint, or is damaged.
    """
    with undamaged(address, ALONE) as folder:
        state = parse_state(folder, address)
        decoder = Decoder(state.run.model)
        try:
            load_weights(decoder, folder)
        except UNREADABLE as error:
            raise unreadable(address, reason_of(error)) from error
    return decoder, state


@contextmanager
def undamaged(address: Location, ranks: Ranks) -> Iterator[Path]:
    """The files of a checkpoint in a folder of this machine, compared with their checksums.

    Raises:
        InputError: it is no checkpoint, or a file is damaged; names the file.
    """
    shelf, name = split_address(address)
    with shelf.opened(name) as folder:
        if not (folder / MANIFEST).is_file():
            raise InputError(
                f"{address} is not a checkpoint of this version: it has no {MANIFEST}; use another"
            )
        bad = damage_of(folder, ranks)
        if bad is not None:
            raise InputError(f"{address} is damaged: {bad}; use another checkpoint")
        yield folder


def damage_of(folder: Path, ranks: Ranks) -> str | None:
    """What is wrong with the files of a checkpoint, None where they are whole.

    Each rank compares its share; all come to the same answer.
    """
    try:
        manifest, reason = read_manifest(folder), None
    except ValueError as error:
        manifest, reason = Manifest(files={}), str(error)
    if ranks.any(reason is not None):
        return reason or f"{MANIFEST} cannot be read on another rank"
    files = sorted(manifest.files)
    found = [
        damage(folder / name, manifest.files[name])
        if number % ranks.world_size == ranks.rank
        else None
        for number, name in enumerate(files)
    ]
    bad = ranks.sum(*(float(reason is not None) for reason in found))
    for name, reason, count in zip(files, found, bad, strict=True):
        if count:
            return reason or f"{name} is not as it was written"
    return None


def is_name(path: Path) -> bool:
    """Whether a path is named as a checkpoint is."""
    return NAME.fullmatch(path.name) is not None


def unreadable(address: Location, reason: str) -> InputError:
    """The error for a checkpoint whose files are whole and still cannot be used."""
    return InputError(f"{address} cannot be read: {reason}; use another checkpoint")
