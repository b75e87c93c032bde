"""The `simulate` command: searches replayed against recorded runs."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer

from thriftlm.review.options import Json

if TYPE_CHECKING:
    from thriftlm.search.simulation.simulate import SimulatedSearch


def simulate(
    space: Annotated[
        str,
        typer.Argument(
            metavar="SPACE", help="A space file, or the name of a shipped one: `thriftlm spaces`."
        ),
    ],
    table: Annotated[
        Path,
        typer.Option(
            metavar="RUNS", help="Recorded runs, as `thriftlm report --runs` writes them."
        ),
    ],
    algorithms: Annotated[
        list[str] | None,
        typer.Option(
            "--algorithm",
            metavar="A",
            help="Who searches; may be given several times. Default: the space's own.",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, metavar="N", help="Searches of each.")] = 1,
    start_up_seconds: Annotated[
        float, typer.Option(min=0, metavar="S", help="Billed before the first token of a trial.")
    ] = 60.0,
    spot_trace: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Preempt trials on market: spot as in a trace of SkyPilot (JSON: instances there "
            "at each tick), which begins with the search.",
        ),
    ] = None,
    spot_speedup: Annotated[
        float, typer.Option(min=1e-3, metavar="X", help="Play the trace so many times as fast.")
    ] = 1.0,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Override one value of the file, as in search_budget.usd=300. May be given "
            "several times.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Replay a search against recorded runs, on a simulated clock, and say what it would find.

    The worth of a run is its recorded loss at the tokens that the training budget buys on the best
    system that the table has for it.
    """
    from thriftlm.search.simulation.simulate import simulate as simulated
    from thriftlm.search.simulation.simulated_cluster import Conditions
    from thriftlm.search.simulation.spot import read_trace
    from thriftlm.search.simulation.truth import truth_of
    from thriftlm.search.spaces.recorded_table import RecordedSpace, read_runs
    from thriftlm.search.spaces.space import load_space
    from thriftlm.spec import InputError

    loaded = load_space(space, overrides or ())
    if loaded.objective_name != "loss_at_budget":
        raise InputError(
            f"simulate knows the worth of a run by loss_at_budget, the space has "
            f"{loaded.objective_name}; add --set objective=loss_at_budget"
        )
    runs = read_runs(table, loaded)
    held = RecordedSpace(loaded, runs)
    truth = truth_of(runs, loaded, table)
    of = "" if loaded.size is None else f" of the {loaded.size:,} in the space"
    print(f"held to the {len(runs):,} recorded runs{of}", file=sys.stderr)
    spot = None if spot_trace is None else read_trace(spot_trace, spot_speedup)
    if spot is not None and not runs.says_market:
        print(f"{table} has no system.market: its prices are taken as spot's", file=sys.stderr)
    conditions = Conditions(start_up_seconds, spot)
    found = []
    for name in algorithms or [loaded.search.algorithm]:
        for seed in range(seeds):
            found.append(simulated(held, truth, name, seed, conditions))
            print(f"{name} seed {seed}: {found[-1].reason}", file=sys.stderr)
    if as_json:
        print(json.dumps([one.model_dump(mode="json") for one in found]))
    else:
        show(found)


def show(found: Sequence["SimulatedSearch"]) -> None:
    """Print one line per algorithm."""
    from thriftlm.review.tables import Column, fitted, plain_console

    columns = [Column("algorithm")]
    numbers = ("seeds", "trials", "spent", "best loss", "regret, median", "regret, worst")
    columns += [Column(name, is_number=True) for name in numbers]
    if any(one.preemptions for one in found):
        columns += [Column(name, is_number=True) for name in ("preemptions", "lost to them")]
    rows = []
    for name in dict.fromkeys(one.algorithm for one in found):
        mine = [one for one in found if one.algorithm == name]
        regrets = [np.inf if one.regret is None else one.regret for one in mine]
        scores = [one.best_score for one in mine if one.best_score is not None]
        worst = (np.median(regrets), max(regrets))
        rows.append(
            [
                name,
                str(len(mine)),
                f"{np.median([one.trials for one in mine]):.0f}",
                f"${np.median([one.spent_usd for one in mine]):,.2f}",
                f"{np.median(scores):.4f}" if scores else "none",
                *(f"{x:.4f}" if np.isfinite(x) else "none" for x in worst),
                f"{np.median([len(one.preemptions) for one in mine]):.0f}",
                f"${np.median([one.preempted_usd for one in mine]):,.2f}",
            ][: len(columns)]
        )
    console = plain_console()
    console.print(fitted(columns, rows, console.width))
    best = found[0].table_best_score
    said = "none: all of its runs broke or diverged" if best is None else f"{best:.4f}"
    console.print(f"[dim]the table's best loss at the training budget: {said}[/]")
    for one in found:
        if one.best_run_id is None:
            said = f"{one.algorithm} seed {one.seed} has no answer."
            console.print(said, *one.learned, sep="\n  ")
