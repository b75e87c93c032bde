"""The `searches`, `status` and `stop` commands: searches that ran or run elsewhere."""

import json
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from thriftlm.review.options import Json, StorageOption

if TYPE_CHECKING:
    from thriftlm.search.answers.status import ListedSearch, RunningTrial, SearchStanding
    from thriftlm.search.history.stopping import Driver

WAIT_SECONDS = 0.5
"""Between two looks of `stop --wait`."""
SearchName = Annotated[
    str,
    typer.Argument(metavar="SEARCH", help="Name of a search in the storage folder: `searches`."),
]


def searches(storage: StorageOption = None, as_json: Json = False) -> None:
    """List the searches of the storage folder, the latest first."""
    from thriftlm.search.answers.status import listed
    from thriftlm.search.history.storage import storage as storage_at

    place = storage_at(storage)
    found = listed(place)
    if as_json:
        print(json.dumps([one.model_dump(mode="json") for one in found], indent=2))
    elif found:
        show_searches(found)
    else:
        print(f"no search was begun in {place.root}")


def status(search: SearchName, storage: StorageOption = None, as_json: Json = False) -> None:
    """Show how a search stands, also while another process or a Ray job runs it."""
    from thriftlm.search.answers.status import folder_of, standing
    from thriftlm.search.history.storage import storage as storage_at

    found = standing(folder_of(storage_at(storage), search))
    print(found.model_dump_json(indent=2)) if as_json else show_standing(found)


def stop(
    search: SearchName,
    wait: Annotated[bool, typer.Option("--wait", help="Return when the search has ended.")] = False,
    storage: StorageOption = None,
    as_json: Json = False,
) -> None:
    """End a search cleanly, also one that a Ray job on another node runs.

    As Ctrl-C does: its trials end at their next report, it prints its answer so far, and
    `search --resume` goes on. Nothing happens to a search that does not run.
    """
    from thriftlm.search.answers.status import folder_of, standing
    from thriftlm.search.history.storage import storage as storage_at

    folder = folder_of(storage_at(storage), search)
    found = standing(folder, with_leader=False)
    is_asked = found.is_held and found.status in ("starting", "running", "stopping")
    if is_asked:
        _ask(folder, found)
    if wait and found.is_held:
        _wait_for_end(folder, found.driver)
    after = standing(folder, with_leader=False)
    said = {
        "search_id": search,
        "status": after.status,
        "asked": is_asked,
        "message": _outcome(found, after, is_asked),
    }
    print(json.dumps(said) if as_json else said["message"])
    if is_asked and after.status == "dead":
        sys.exit(1)


def _ask(folder: Path, found: "SearchStanding") -> None:
    from thriftlm.search.history.stopping import request_stop
    from thriftlm.spec import InputError

    if found.driver is None:
        raise InputError(
            f"the driver of search {found.search_id} has not said who it is; try again in a "
            "second, or end it with Ctrl-C where it was begun by an older thriftlm"
        )
    request_stop(folder, found.driver)


def _wait_for_end(folder: Path, driver: "Driver | None") -> None:
    """Return when the driver has let go of the journal; one that came after it is not waited for.

    What is waited for is said on stderr whenever it changes.
    """
    from thriftlm.search.answers.status import JOURNAL, standing
    from thriftlm.search.history.journal import is_held
    from thriftlm.search.history.stopping import driver_of

    said: list[str] = []
    while is_held(folder / JOURNAL) and driver_of(folder) == driver:
        found = standing(folder, with_leader=False)
        going = [trial.trial_id for trial in found.running]
        if going != said or not said:
            print(f"waits for {found.waits_for}", file=sys.stderr)
            said = going or [found.status]
        time.sleep(WAIT_SECONDS)


def _outcome(before: "SearchStanding", after: "SearchStanding", is_asked: bool) -> str:
    """What `stop` did, in one sentence."""
    name = before.search_id
    go_on = f"go on with `thriftlm search SPACE --name {name} --resume`"
    if is_asked and after.is_held and after.driver == before.driver:
        return f"search {name} was asked to end: it waits for {after.waits_for}"
    if is_asked:
        ends = {
            "interrupted": f"was ended; {go_on}",
            "finished": "finished by itself before it was ended",
            "dead": f"lost its driver before it had ended; {go_on}",
        }
        return f"search {name} {ends.get(after.status, f'was ended, and is {after.status} again')}"
    if before.status == "dead":
        return f"search {name} does not run: its driver is gone without a word; {go_on}"
    if before.status == "interrupted":
        return f"search {name} does not run: it was interrupted before; {go_on}"
    return f"search {name} does not run: it is finished"


def show_searches(found: "list[ListedSearch]") -> None:
    """Print one line per search."""
    from thriftlm.review.tables import Column, fitted, plain_console
    from thriftlm.review.wording import optional, usd

    columns = [
        Column("search"),
        Column("status"),
        Column("algorithm", dispensable=3),
        Column("trials", is_number=True, dispensable=2),
        Column("spent", is_number=True),
        Column("of", is_number=True, dispensable=2),
        Column("at budget", is_number=True),
        Column("begun", dispensable=1),
        Column("last event", dispensable=4),
    ]
    rows = [
        [
            one.name,
            one.status,
            one.algorithm or "-",
            str(one.trials),
            usd(one.spent_usd),
            "-" if one.budget_usd is None else usd(one.budget_usd),
            optional(one.best_loss_at_budget, ".4f"),
            instant(one.started_at),
            instant(one.last_event_at),
        ]
        for one in found
    ]
    console = plain_console()
    console.print(fitted(columns, rows, console.width))
    for one in found:
        if one.error is not None:
            console.print(f"{one.name}: {one.error}", soft_wrap=True, markup=False)


def show_standing(found: "SearchStanding") -> None:
    """Print how a search stands."""
    from thriftlm.review.tables import Column, fitted, plain_console
    from thriftlm.review.wording import describe, optional, shortened

    console = plain_console()
    for name, value in _facts(found):
        console.print(f"{name:<10} {value}", soft_wrap=True, markup=False)
    if found.leader is not None:
        one = found.leader
        what = describe(one.point, one.strategy, one.n_gpus)
        console.print(
            f"{'leader':<10} {one.trial_id} {what}, loss {optional(one.loss, '.4f')} at "
            f"{one.tokens:,} tokens, {one.loss_at_budget:.3f} predicted at the training budget "
            f"({one.low:.3f} to {one.high:.3f})",
            soft_wrap=True,
            markup=False,
        )
    if found.running:
        columns = [
            Column("trial"),
            Column("what", shorten=shortened, least=24),
            Column("tokens", is_number=True),
            Column("loss", is_number=True),
            Column("tok/s", is_number=True, dispensable=2),
            Column("USD", is_number=True),
            Column("next report"),
        ]
        console.print(fitted(columns, [_cells(one) for one in found.running], console.width))


def _facts(found: "SearchStanding") -> list[tuple[str, str]]:
    from thriftlm.review.wording import duration, usd

    ended = f": {found.reason}" if found.reason and found.status == "finished" else ""
    of_usd = "" if found.budget_usd is None else f" of {usd(found.budget_usd)}"
    of_trials = "" if found.budget_trials is None else f" of {found.budget_trials}"
    counts = ", ".join(f"{number} {name}" for name, number in found.trials.items())
    own = sum(number for name, number in found.trials.items() if name != "known")
    driver = "not known"
    if found.driver is not None:
        verb = "lives" if found.is_held else "is gone"
        driver = f"{verb}: process {found.driver.pid} on {found.driver.host}"
    return [
        ("search", f"{found.search_id}, {found.algorithm or 'not begun'}"),
        ("status", found.status + ended),
        ("waits for", found.waits_for),
        ("driver", driver),
        ("begun", f"{instant(found.started_at)}, last event {instant(found.last_event_at)}"),
        ("spent", f"{usd(found.spent_usd)}{of_usd} in {duration(found.hours * 3600)}"),
        ("trials", f"{own}{of_trials}{f' ({counts})' if counts else ''}"),
    ]


def _cells(one: "RunningTrial") -> list[str]:
    from thriftlm.review.wording import counted, describe, optional, usd

    due = one.report_due_seconds
    when = f"in {due:.0f} s" if due >= 0 else f"{-due:.0f} s late"
    return [
        one.trial_id,
        describe(one.point, one.strategy, one.n_gpus),
        f"{counted(one.tokens)} {one.tokens / one.of_tokens:.0%}",
        optional(one.loss, ".4f"),
        optional(one.tokens_per_s, ",.0f"),
        usd(one.usd),
        when + (f", ends ({one.stop_reason})" if one.stop_reason else ""),
    ]


def instant(at: datetime | None) -> str:
    """A point in time on this machine's clock."""
    return "-" if at is None else at.astimezone().strftime("%Y-%m-%d %H:%M:%S")
