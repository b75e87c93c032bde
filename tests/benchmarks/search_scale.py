"""A search of ten thousand trials, two hundred at a time, on a simulated clock, as Markdown.

    python tests/benchmarks/search_scale.py > tests/benchmarks/results/search_scale.md

Recorded runs are made up: a law with a best learning rate, on systems of four speeds. What is
measured is the searcher: its processor time per suggestion (all that it is asked and told between
one suggestion and the next), the process's memory, how long the journal takes to be read again, and
whether a search that goes on from a prefix of it decides as the whole one did.
"""

import argparse
import itertools
import resource
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from thriftlm.config_file import ConfigFile
from thriftlm.records import write_rows
from thriftlm.search import algorithms
from thriftlm.search.desk import Desk, Finished, Wait
from thriftlm.search.history.journal import Ended, Event, Released, Reported, Suggested, read
from thriftlm.search.history.state import SearchState
from thriftlm.search.learning.factored import Factored
from thriftlm.search.simulation.simulate import AS_RECORDED, MemoryJournal, desk_of, simulate
from thriftlm.search.simulation.simulated_cluster import Clock
from thriftlm.search.simulation.truth import Truth, truth_of
from thriftlm.search.spaces.recorded_table import RecordedSpace, read_runs
from thriftlm.search.spaces.space import Space

LAYERS, BATCHES = (2, 4, 6, 8), (8192, 16384, 32768)
SPEED = {("math", 1): 600.0, ("math", 2): 900.0, ("flash", 1): 1000.0, ("flash", 2): 1500.0}
TOKENS = [int(tokens) for tokens in np.geomspace(8192, 800_000, 7)]
USD_PER_HOUR, BUDGET_USD = 0.5, 0.05


def world(folder: Path, recipes: int, concurrent: int, trials: int) -> tuple[RecordedSpace, Truth]:
    """So many recipes, each recorded on two of four systems, and a search of so many trials."""
    rates = np.geomspace(1e-4, 1e-1, -(-recipes // (len(LAYERS) * len(BATCHES))))
    space = Space(
        ConfigFile(
            "scale.yaml",
            {
                "name": "scale",
                "data": {"corpus": "python-stdlib", "tokenizer": "bpe:512", "seq_len": 128},
                "training_budget": {"usd": BUDGET_USD},
                "search_budget": {"trials": trials},
                "search": {
                    "algorithm": "factored",
                    "max_concurrent": concurrent,
                    "fidelity": {"min_tokens": 20_000, "max_tokens": 540_000},
                },
                "space": {
                    "model": {"n_layers": list(LAYERS), "d_model": 64, "n_heads": 2},
                    "optim": {
                        "lr": {"loguniform": [1e-4, 1e-1]},
                        "batch_tokens": list(BATCHES),
                        "schedule": "constant",
                    },
                    "system": {
                        "gpu": "cpu",
                        "attention": ["math", "flash"],
                        "micro_batch": [1, 2],
                    },
                },
            },
        )
    )
    path = folder / "runs.parquet"
    write_rows(list(_rows(rates.tolist())), path)
    runs = read_runs(path, space)
    return RecordedSpace(space, runs), truth_of(runs, space, path)


def _rows(rates: list[float]) -> Any:
    systems = list(SPEED)
    for number, (layers, batch, rate) in enumerate(itertools.product(LAYERS, BATCHES, rates)):
        status = "diverged" if rate > 0.05 and layers > 4 else "done"
        for attention, micro in (systems[-1], systems[number % 3]):
            reports = TOKENS[:3] if status == "diverged" else TOKENS
            for tokens in reports:
                last = tokens == reports[-1]
                off = np.log(rate / 3e-3) ** 2 + 0.3 * np.log(batch / 16384) ** 2
                loss = 2 + 2 / layers**0.5 + 40 / tokens**0.35 + 0.03 * off
                yield {
                    "run_id": f"run{number}-{attention}-{micro}",
                    "model.n_layers": layers,
                    "optim.lr": rate,
                    "optim.batch_tokens": batch,
                    "system.attention": attention,
                    "system.micro_batch": micro,
                    "params": 1000 * layers,
                    "tokens": tokens,
                    "loss": None if last and status == "diverged" else loss,
                    "tokens_per_s": SPEED[attention, micro],
                    "usd_per_hour": USD_PER_HOUR,
                    "status": status if last else "running",
                }


@dataclass
class Times:
    """Processor seconds of the searcher before each suggestion, and memory then."""

    seconds: list[float] = field(default_factory=list)
    megabytes: list[float] = field(default_factory=list)
    running: float = 0.0

    def suggested(self) -> None:
        """A suggestion was made; what follows counts for the next."""
        self.seconds.append(self.running)
        self.megabytes.append(resident())
        self.running = 0.0


class Timed:
    """A searcher, and how long it takes."""

    pauses = True

    def __init__(self, searcher: algorithms.Searcher, times: Times) -> None:
        self.searcher, self.times = searcher, times

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.searcher, name)

        def timed(*arguments: Any) -> Any:
            since = time.process_time()
            found = method(*arguments)
            if name == "propose":
                found = list(itertools.islice(found, 1))
            self.times.running += time.process_time() - since
            if name == "observe" and isinstance(arguments[0], Suggested):
                self.times.suggested()
            return found

        return timed


def resident() -> float:
    """Megabytes of this process, the most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def goes_on(held: RecordedSpace, events: list[Event], at: int, most: int) -> tuple[int, float]:
    """Go on from the first `at` events as they went on; decisions that came out alike, and seconds.

    Reports and ends are what the cluster does; everything else must come out again.

    Raises:
        AssertionError: a decision differs.
    """
    clock, journal = Clock(events[at - 1].at), MemoryJournal()
    journal.events += events[:at]
    since = time.perf_counter()
    desk = desk_of(held, journal, clock, AS_RECORDED)
    seconds = time.perf_counter() - since
    _settle(desk)
    until = min(len(events) - 1, at + most)
    while len(journal.events) < until:
        event = events[len(journal.events)]
        clock.now = event.at
        match event:
            case Reported():
                desk.report(event.trial_id, event.progress, None)
            case Released():
                _release(desk, events, len(journal.events))
            case _:
                raise AssertionError(f"{event.kind} was not decided again at {clock.now}")
        _settle_where(desk, events)
        here = len(journal.events)
        assert journal.events[at:here] == events[at:here], "decided otherwise"
    return len(journal.events) - at, seconds


def _settle_where(desk: Desk, events: list[Event]) -> None:
    """Ask for trials where the cluster did: once a report, and the end that it led to, are done."""
    following = events[len(desk.journal.events)]
    if not isinstance(following, Released) or following.at != desk.clock():
        _settle(desk)


def _settle(desk: Desk) -> None:
    while not isinstance(desk.next_trial(), Wait | Finished):
        pass


def _release(desk: Desk, events: list[Event], at: int) -> None:
    released = events[at]
    assert isinstance(released, Released)
    after = events[at + 1]
    ended = after if isinstance(after, Ended) and after.trial_id == released.trial_id else None
    desk.end(released.trial_id, "stopped" if ended is None else ended.status)
    desk.leader()


def searched(folder: Path, recipes: int, concurrent: int, trials: int) -> dict[str, Any]:
    """What one search took."""
    held, truth = world(folder, recipes, concurrent, trials)
    times, journal = Times(), MemoryJournal()
    before, since = resident(), time.perf_counter()
    found = simulate(
        held,
        truth,
        "factored",
        0,
        searcher=lambda space: Timed(Factored(space), times),  # type: ignore[arg-type,return-value]
        journal=journal,
    )
    return {
        "held": held.searched_by("factored", 0),
        "found": found,
        "events": journal.events,
        "seconds": np.array(times.seconds),
        "megabytes": np.array(times.megabytes) - before,
        "total": time.perf_counter() - since,
    }


def report(made: dict[str, Any], folder: Path, concurrent: int) -> str:
    """The measurements as Markdown."""
    found, events, ms = made["found"], made["events"], 1000 * made["seconds"]
    count = len(ms)
    path = folder / "journal.jsonl"
    path.write_bytes(b"".join(event.model_dump_json().encode() + b"\n" for event in events))
    since = time.perf_counter()
    state = SearchState(read(path))
    reload_seconds = time.perf_counter() - since
    rows = []
    for first in range(0, count, max(1, count // 5)):
        part = slice(first, first + max(1, count // 5))
        rows.append(
            f"| {first + 1} to {min(part.stop, count)} | {ms[part].mean():.1f} "
            f"| {np.quantile(ms[part], 0.95):.1f} | {made['megabytes'][part][-1]:.0f} |"
        )
    prefixes = []
    for share in (0.01, 0.25, 0.5, 0.75, 0.99):
        at = int(share * len(events))
        while not isinstance(events[at], Reported):
            at += 1
        alike, seconds = goes_on(made["held"], events, at, 300)
        prefixes.append(f"| {at} | {seconds:.1f} | {alike} |")
    tpe = _tpe_seconds(made["held"], state)
    return "\n".join(
        [
            f"# A search of {found.trials} trials, {concurrent} at a time",
            "",
            "`tests/benchmarks/search_scale.py`; recorded runs that are made up, a simulated "
            f"clock, one thread. **Measured**: {made['total'] / 60:.1f} minutes in all, with other "
            "work beside it. Times of the searcher are of the processor; they hold all "
            "that it was told, asked to promote, to propose and to answer between suggestions.",
            "",
            "| suggestions | ms per suggestion, mean | 95% | MB more than before the search |",
            "|---|---|---|---|",
            *rows,
            "",
            f"The journal has {len(events)} lines ({path.stat().st_size / 1e6:.0f} MB) and is read "
            f"again in {reload_seconds:.1f} s. Optuna's TPE takes {1000 * tpe:.0f} ms to propose "
            f"at {len(state.trials)} trials (its own time, without ours).",
            "",
            "Gone on from a prefix of the journal, the search made the same decisions:",
            "",
            "| lines before | s to replay | lines compared, all alike |",
            "|---|---|---|",
            *prefixes,
        ]
    )


def _tpe_seconds(held: RecordedSpace, state: SearchState) -> float:
    """Seconds for one suggestion of Optuna's sampler with as many trials as the search had."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions = {name: domain.distribution() for name, domain in held.domains.items()}
    sampler = optuna.samplers.TPESampler(seed=0, multivariate=True)
    study = optuna.create_study(sampler=sampler)
    study.add_trials(
        [
            optuna.trial.create_trial(
                params=trial.point, distributions=distributions, values=[trial.loss]
            )
            for trial in state.trials.values()
            if trial.loss is not None
        ]
    )
    taken = []
    for _ in range(5):
        since = time.process_time()
        study.ask(distributions)
        taken.append(time.process_time() - since)
    return float(np.median(taken))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--concurrent", type=int, default=200)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipes = round(1.2 * given.trials)
        made = searched(folder, recipes, given.concurrent, given.trials)
        print(f"searched in {made['total']:.0f} s", file=sys.stderr)
        print(report(made, folder, given.concurrent))


if __name__ == "__main__":
    main()
