"""What of a search's journal goes to MLflow: events folded into one draft a run.

A draft is what its run still has to be told. Everything that MLflow shows is a replay of the
journal, so that the same drafts follow from it at any time.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from thriftlm.search.history.journal import (
    Allocated,
    Ended,
    Event,
    Known,
    Released,
    Reported,
    RunMinted,
    SearchEnded,
    SearchResumed,
    SearchStarted,
    StopRequested,
    Suggested,
)
from thriftlm.spec import Progress, RunSpec, digest
from thriftlm_models.counts import (
    FLOP_FORMULA,
    applied_params,
    flops_per_token,
    non_embedding_params,
    stored_params,
)

MAX_PARAMS = 30

STEP_METRICS = (
    "train_loss",
    "val_loss",
    "val_bits_per_byte",
    "tokens_per_s",
    "mfu",
    "peak_mem_gb",
    "grad_norm",
    "grad_norm_max",
    "loss_spikes",
    "skipped_steps",
    "data_wait_fraction",
    "communication_fraction",
)
"""Fields of a `Progress` that become metrics, with tokens as their step."""
PLAIN_VERSIONS = ("git_commit", "price_snapshot")
"""Entries of `SearchStarted.versions` that are tags under their own name."""
RUN_STATUS = {
    "done": "FINISHED",
    "stopped": "FINISHED",
    "oom": "FAILED",
    "diverged": "FAILED",
    "failed": "FAILED",
}
"""MLflow's status of a trial that ended; the tag `status` says which it was."""


class Number(NamedTuple):
    """One value of a metric."""

    key: str
    value: float
    at: float
    """Unix seconds."""
    tokens: int
    """Its step in MLflow."""


@dataclass
class Draft:
    """What one run has not been told yet; `trial_id` is None for the parent of the search."""

    trial_id: str | None
    name: str
    started_at: float
    identity: dict[str, str]
    """Tags that the run is created with and found by."""
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    metrics: list[Number] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)
    """Artifacts by file name."""
    files: list[Path] = field(default_factory=list)
    status: tuple[str, float] | None = None
    """MLflow's run status, and since when."""
    updates: int = 0
    """Journal events and scores that are waiting in it."""

    def measure(self, key: str, value: float | None, at: float, tokens: int) -> None:
        """Add a metric with tokens as its step; what is missing or not finite is left out."""
        if value is not None and math.isfinite(value):
            self.metrics.append(Number(key, float(value), at, tokens))

    @property
    def waiting(self) -> bool:
        """Whether there is anything to send."""
        parts = (self.params, self.tags, self.metrics, self.texts, self.files, self.status)
        return any(parts)


class Drafts:
    """The drafts of all runs of one search, folded from its journal, parent first."""

    def __init__(self, search_id: str) -> None:
        self.search_id = search_id
        self.search_key: str | None = None
        """Tells this search from another of the same name on the same server."""
        self.runs: dict[str | None, Draft] = {}
        self.minted: dict[str | None, str] = {}
        self._tokens: dict[str, int] = {}
        self._usd: dict[str, float] = {}
        self._attempts: dict[str, int] = {}
        self._ended: set[str] = set()
        self._version_tags: dict[str, str] = {}
        self._knows = 0

    def add(self, event: Event) -> None:
        """Fold one journal event."""
        match event:
            case SearchStarted():
                self._start(event)
            case Known():
                self._knows += 1
                told = f"{len(event.runs)} runs of {event.source}"
                self._draft(None, event.at).tags[f"known.{self._knows}"] = told
            case SearchResumed():
                self._resume(event)
            case Suggested():
                self._suggest(event)
            case Allocated():
                self._allocate(event)
            case Reported():
                self._report(event)
            case StopRequested():
                self._draft(event.trial_id, event.at).tags["reason"] = event.reason
            case Released():
                self._pay(event)
            case Ended():
                self._end(event)
            case RunMinted():
                self.minted[event.trial_id] = event.mlflow_run_id
            case SearchEnded():
                self._finish(event)

    def score(self, scores: Mapping[str, Mapping[str, float]], at: float) -> None:
        """Add objective scores by trial, as metrics at the tokens that the trial has reached.

        A score replaces one that is still waiting: of two at one step and millisecond MLflow
        would show the larger.
        """
        for trial_id, values in scores.items():
            draft, tokens = self._draft(trial_id, at), self._tokens.get(trial_id, 0)
            draft.metrics = [m for m in draft.metrics if m.key not in values or m.tokens != tokens]
            for key, value in values.items():
                draft.measure(key, value, at, tokens)

    def results(self, results: dict[str, Any], files: list[Path], at: float) -> None:
        """Add the answer of the search as artifacts of the parent run."""
        draft = self._draft(None, at)
        draft.texts["results.json"] = json.dumps(results, indent=2, default=str)
        draft.files += files

    def _start(self, event: SearchStarted) -> None:
        self.search_key = digest({"search": event.search_id, "started_at": event.at})
        for name, version in event.versions.items():
            key = name if name in PLAIN_VERSIONS else f"version.{name}"
            self._version_tags[key] = version
        draft = self._draft(None, event.at)
        draft.tags |= self._version_tags | {"status": "running"}
        settings = {
            key: event.space[key] for key in event.space if key not in {"space", "start_from"}
        }
        draft.params = dict(islice(flat(settings), MAX_PARAMS))
        draft.texts["space.yaml"] = yaml.safe_dump(event.space, sort_keys=False)

    def _resume(self, event: SearchResumed) -> None:
        draft = self._draft(None, event.at)
        draft.status = ("RUNNING", event.at)
        draft.tags |= {"status": "running", "reason": ""}

    def _suggest(self, event: Suggested) -> None:
        draft = self._draft(event.trial_id, event.at, name=f"{event.number:03d}-{event.trial_id}")
        draft.identity |= {"trial_id": event.trial_id, "recipe_id": event.run.recipe_id}
        draft.params = trial_params(event.point, event.run)
        draft.tags |= self._version_tags | {"status": "pending", "number": str(event.number)}
        draft.texts["run.yaml"] = yaml.safe_dump(event.run.model_dump(mode="json"), sort_keys=False)

    def _allocate(self, event: Allocated) -> None:
        attempt = self._attempts[event.trial_id] = self._attempts.get(event.trial_id, 0) + 1
        draft = self._draft(event.trial_id, event.at)
        draft.status = ("RUNNING", event.at)
        draft.tags |= {
            "status": "running",
            "reason": "",
            "attempt": str(attempt),
            "price": event.price,
            "usd_per_hour": str(event.usd_per_hour),
        }

    def _report(self, event: Reported) -> None:
        """A trial that went back to its checkpoint says again what is known: only later counts."""
        progress, trial_id = event.progress, event.trial_id
        draft = self._draft(trial_id, event.at)
        if event.checkpoint is not None:
            draft.tags["checkpoint"] = event.checkpoint
        if progress.tokens <= self._tokens.get(trial_id, -1):
            return
        self._tokens[trial_id] = progress.tokens
        draft.tags |= progress_tags(progress)
        for key in STEP_METRICS:
            draft.measure(key, getattr(progress, key), event.at, progress.tokens)
        if progress.trace is not None and Path(progress.trace).is_file():
            draft.files.append(Path(progress.trace))  # where the storage is shared with the trial

    def _pay(self, event: Released) -> None:
        """All that the trial cost so far, over every time that it held resources."""
        trial_id, at = event.trial_id, event.at
        self._usd[trial_id] = self._usd.get(trial_id, 0.0) + event.usd
        tokens = self._tokens.get(trial_id, 0)
        self._draft(trial_id, at).measure("usd", self._usd[trial_id], at, tokens)
        all_tokens = sum(self._tokens.values())
        self._draft(None, at).measure("usd", sum(self._usd.values()), at, all_tokens)

    def _end(self, event: Ended) -> None:
        self._ended.add(event.trial_id)
        draft = self._draft(event.trial_id, event.at)
        draft.status = (RUN_STATUS.get(event.status, "KILLED"), event.at)
        draft.tags["status"] = event.status
        if event.checkpoint is not None:
            draft.tags["checkpoint"] = event.checkpoint
        if event.reason:
            draft.tags["reason"] = event.reason

    def _finish(self, event: SearchEnded) -> None:
        for trial_id in [key for key in self.runs if key is not None and key not in self._ended]:
            draft = self._draft(trial_id, event.at)
            draft.status = ("KILLED", event.at)
            draft.tags |= {"status": "interrupted", "reason": event.reason}
        draft = self._draft(None, event.at)
        draft.status = ("FINISHED" if event.status == "finished" else "KILLED", event.at)
        draft.tags |= {"status": event.status, "reason": event.reason}

    def _draft(self, trial_id: str | None, at: float, name: str = "") -> Draft:
        if trial_id not in self.runs:
            identity = self._identity(trial_id)
            name = name or trial_id or self.search_id
            self.runs[trial_id] = Draft(trial_id, name, at, identity)
        self.runs[trial_id].updates += 1
        return self.runs[trial_id]

    def _identity(self, trial_id: str | None) -> dict[str, str]:
        tags = {
            "thriftlm.search_id": self.search_id,
            "thriftlm.search_key": str(self.search_key),
            "kind": "search" if trial_id is None else "learn",
        }
        return tags if trial_id is None else tags | {"thriftlm.trial_id": trial_id}


def trial_params(point: Mapping[str, Any], run: RunSpec) -> dict[str, str]:
    """Params of a trial: what varied, then where and how large it is, at most `MAX_PARAMS`."""
    varied = {key: as_text(value) for key, value in point.items()}
    model, system = run.model, run.system
    facts = {
        "stored_params": stored_params(model),
        "non_embedding_params": non_embedding_params(model),
        "applied_params": applied_params(model),
        "flops_per_token": flops_per_token(model, run.data.seq_len),
        "flop_formula": FLOP_FORMULA,
        "tokens": run.tokens,
        "system.gpu": system.gpu,
        "system.n_gpus": system.n_gpus,
        "system.strategy": system.strategy,
        "system.micro_batch": system.micro_batch,
        "seed": run.seed,
    }
    free = MAX_PARAMS - len(facts.keys() - varied.keys())
    kept = dict(islice(varied.items(), free))
    return kept | {key: as_text(value) for key, value in facts.items() if key not in kept}


def progress_tags(progress: Progress) -> dict[str, str]:
    """What a report says in words."""
    tags = {} if progress.mfu is None else {"mfu_formula": progress.mfu_formula}
    return tags | ({"detail": progress.detail} if progress.detail else {})


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Leaves of nested settings by dotted path."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", as_text(value)


def as_text(value: Any) -> str:
    """The value as MLflow stores it: text as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, default=str)
