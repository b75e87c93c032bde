"""A search on a simulated cluster: a real desk and journal, a clock that jumps, trials that report
and obey as `worker.py` and `driver.py` do. A worker polls for a stop as it hands a report in, which
is before that report is handled: a stop asked for at report k is obeyed at report k + 1. Where a
trial must wait it knows when it starts, and ends at that report.
"""

import copy
import heapq
import itertools
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from pathlib import Path

import numpy as np
import pytest

from thriftlm.config_file import ConfigFile
from thriftlm.search.cluster.capacity import Capacity
from thriftlm.search.desk import Desk, Finished, Wait
from thriftlm.search.history.journal import Journal, SearchStarted
from thriftlm.search.spaces.space import Space
from thriftlm.spec import Progress
from thriftlm.timings import Timing
from thriftlm_models.counts import non_embedding_params

REPORTS = 9
"""Reports of a whole trial in the base space."""
BASE = {
    "name": "tiny",
    "data": {"corpus": "python-stdlib", "tokenizer": "bpe:512", "seq_len": 128},
    "training_budget": {"usd": 0.05},
    "search_budget": {"trials": 6},
    "search": {
        "algorithm": "random",
        "scheduler": "none",
        "fidelity": {"min_tokens": 8192, "max_tokens": 8192 * REPORTS},
    },
    "space": {
        "model": {"n_layers": [2, 4, 8], "d_model": 64, "n_heads": 2},
        "optim": {"lr": {"loguniform": [1e-4, 1e-1]}, "batch_tokens": 8192},
        "system": {"attention": "math", "gpu": "cpu", "micro_batch": 1},
    },
}
BEST_LR = 3e-3


def synthetic_loss(run, tokens):
    """A law with a best learning rate and a little noise that belongs to the run."""
    n = non_embedding_params(run.model)
    law = 1.5 + 15 / n**0.2 + 12 / tokens**0.25
    noise = np.random.default_rng(int(run.trial_id, 16) + tokens).normal(0, 0.002)
    return float(law * (1 + 0.02 * np.log(run.optim.lr / BEST_LR) ** 2) + noise)


@dataclass
class Behaviour:
    """How one trial runs. Seconds; a failure is (status, number of the report it happens at)."""

    first: float = 10.0
    intervals: object = 5.0
    delay: float = 0.3
    stop: float = 2.0
    failure: tuple[str, int] | None = None
    tokens_per_s: float = 1000.0

    def interval(self, k):
        return self.intervals(k) if callable(self.intervals) else self.intervals


@dataclass
class Clock:
    now: float = 1_000_000.0

    def __call__(self):
        return self.now


@dataclass
class Cluster:
    """Runs the trials of a desk, and asks it as Tune's loop does.

    Gangs outlive their trials where the desk is a warm one: a trial on a live gang starts at once,
    and a dismissed one is gone after `gone` seconds.
    """

    desk: Desk
    clock: Clock
    behave: object
    checkpoints: dict = dataclass_field(default_factory=dict)
    poll: float = 2.0
    gone: float = 3.0
    interrupt_at: float | None = None
    stop_asked: object = lambda: False
    reason: str | None = None

    def __post_init__(self):
        self.board, self.queue, self.order = set(), [], itertools.count()
        self.live, self.dismissed, self.until = set(), set(), {}

    def after(self, seconds, action):
        heapq.heappush(self.queue, (self.clock.now + seconds, next(self.order), action))

    def run(self):
        """The reason why nothing started any more; the search is closed."""
        self.tick()
        while self.reason is None or self.desk.state.running:
            self.turn()
            state = self.desk.state
            assert self.reason or state.running or state.idle, "the desk waits for nothing"
            self.clock.now, _, action = heapq.heappop(self.queue)
            action()
        self.desk.close(self.reason)
        return self.reason

    def tick(self):
        self.after(self.poll, self.tick)

    def turn(self):
        desk = self.desk
        due = self.interrupt_at is not None and self.clock.now >= self.interrupt_at
        if (due or self.stop_asked()) and not desk.interrupted:
            desk.interrupt()
            self.post_stops()
        if desk.check_budget():
            self.post_stops()
        self.settle()
        while self.reason is None:
            match desk.next_trial():
                case Finished(reason):
                    self.reason = reason
                case Wait():
                    return
                case trial:
                    self.start(trial)

    def settle(self):
        for gang in set(self.desk.gangs_to_dismiss()) - self.dismissed:
            self.dismissed.add(gang)
            self.after(self.gone, lambda gang=gang: self.desk.gang_ended(gang))

    def post_stops(self):
        self.board |= {t.trial_id for t in self.desk.state.running if t.stop_reason}

    def start(self, trial):
        self.board.discard(trial.trial_id)
        behaviour = self.behave(trial.run)
        tokens = self.checkpoints.get(trial.trial_id, trial.taken_over)
        self.until[trial.trial_id] = self.desk.pauses_at(trial) or trial.run.tokens
        assert trial.gang not in self.dismissed
        is_live = trial.gang is not None and trial.gang in self.live
        self.live.add(trial.gang)
        first = behaviour.interval(1) if is_live else behaviour.first
        if trial.systems:
            self.after(first, lambda: self.time(trial, behaviour))
        else:
            self.after(first, lambda: self.hand_in(trial.run, behaviour, tokens, 1))

    def time(self, trial, behaviour):
        """The life of a probe: its systems one after the other."""
        if not trial.systems_left or trial.trial_id in self.board:
            status = "stopped" if trial.systems_left else "done"
            self.desk.end(trial.trial_id, status, gang_lives=True)
            return
        timing = Timing(
            system=trial.systems_left[0],
            status="timed",
            tokens_per_s=behaviour.tokens_per_s,
            low=behaviour.tokens_per_s,
            high=behaviour.tokens_per_s,
            repeats=3,
        )
        if self.desk.probed(trial.trial_id, timing):
            self.post_stops()
        self.after(behaviour.interval(1), lambda: self.time(trial, behaviour))

    def hand_in(self, run, behaviour, before, k):
        tokens = min(before + run.report_every_tokens, run.tokens)
        obeys = run.trial_id in self.board or tokens >= self.until[run.trial_id]
        status = "done" if tokens >= run.tokens else "running"
        if behaviour.failure and behaviour.failure[1] == k:
            status = behaviour.failure[0]
        checkpoint = None
        if status == "done" or (status == "running" and obeys):
            self.checkpoints[run.trial_id] = tokens
            checkpoint = f"ckpt-{tokens}"
        if status != "failed":
            progress = Progress(
                status=status,
                step=tokens // run.optim.batch_tokens,
                tokens=before if status == "oom" else tokens,
                val_loss=synthetic_loss(run, tokens) if status in ("running", "done") else None,
                tokens_per_s=behaviour.tokens_per_s,
            )
            written = checkpoint if status == "done" else None
            self.after(behaviour.delay, lambda: self.handle(run.trial_id, progress, written))
        if status == "running" and not obeys:
            wait = behaviour.interval(k)
            self.after(wait, lambda: self.hand_in(run, behaviour, tokens, k + 1))
            return
        status = "stopped" if status == "running" else status
        self.after(
            behaviour.delay + behaviour.stop,
            lambda: self.desk.end(
                run.trial_id, status, "", checkpoint, gang_lives=status not in ("failed", "oom")
            ),
        )

    def handle(self, trial_id, progress, checkpoint):
        if self.desk.report(trial_id, progress, checkpoint):
            self.post_stops()


class Lab:
    """Makes spaces, desks and clusters; journals lie in a folder of their own."""

    Behaviour, Clock, REPORTS, BEST_LR = Behaviour, Clock, REPORTS, BEST_LR
    loss = staticmethod(synthetic_loss)

    def __init__(self, folder):
        self.folder, self.journals = folder, []

    def space(self, *, model=None, optim=None, system=None, **changes):
        """The base space, with sections merged into and other keys replaced."""
        data = copy.deepcopy(BASE)
        for name, fields in (("model", model), ("optim", optim), ("system", system)):
            data["space"][name] |= fields or {}
        for name, value in changes.items():
            data[name] = data[name] | value if name == "search" else value
        return Space(ConfigFile("space.yaml", data))

    def desk(self, space, clock=None, *, events=(), capacity=None, warm=False):
        """A desk with a new journal, or with one that holds events of a driver that died."""
        clock = clock or Clock()
        journal = Journal(self.folder / f"{len(self.journals)}.jsonl")
        self.journals.append(journal)
        begin = SearchStarted(
            at=clock.now,
            search_id=space.name,
            space=space.document(),
            versions={},
            unique_tokens={"a": 10**9},
        )
        for event in events or (begin,):
            journal.append(event)
        return Desk(space, journal, capacity or Capacity({"CPU": 2.0}), clock, warm=warm)

    def run(self, desk, behave=lambda run: Behaviour(), **options):
        """The cluster, after the search has ended on it."""
        cluster = Cluster(desk, desk.clock, behave, **options)
        cluster.run()
        return cluster

    def run_until(self, desk, stop_asked, ask_at=None, ask=None, **options):
        """The cluster of a search whose driver looks for requests; one is made at `ask_at`."""
        cluster = Cluster(desk, desk.clock, lambda run: Behaviour(), **options)
        cluster.stop_asked = stop_asked
        if ask is not None:
            cluster.after(ask_at - desk.clock(), ask)
        cluster.run()
        return cluster

    def searched(self, space, behave=lambda run: Behaviour(), **options):
        """The desk of a search that ran to its end."""
        desk = self.desk(space, **options)
        self.run(desk, behave)
        return desk

    def close(self):
        for journal in self.journals:
            journal.close()


@pytest.fixture
def lab(tmp_path, monkeypatch):
    # Hundreds of searches: what reaches the disk is tested with the journal itself.
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    lab = Lab(tmp_path)
    yield lab
    lab.close()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder with eight modules of the standard library, for searches on real Ray."""
    folder, library = tmp_path_factory.mktemp("corpus"), Path(os.__file__).parent
    for name in ("argparse", "ast", "calendar", "codecs", "csv", "dis", "enum", "ftplib"):
        (folder / f"{name}.py").write_text((library / f"{name}.py").read_text())
    return folder


@pytest.fixture(scope="session")
def searched():
    """Runs `thriftlm search --json` on real Ray, and gives what it printed."""

    def run(space, storage, *options):
        command = ["search", str(space), "--storage", str(storage), "--json", *options]
        done = subprocess.run(
            [sys.executable, "-m", "thriftlm", *command],
            capture_output=True,
            text=True,
            check=False,
            timeout=500,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run
