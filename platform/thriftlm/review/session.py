"""One sitting of a search: what exists already, live view, tracking, answer and pictures."""

import math
from dataclasses import dataclass
from pathlib import Path

from thriftlm.review.live import LiveView, what
from thriftlm.review.pictures import PictureCurve, PicturePoint, curves_picture, pareto_picture
from thriftlm.review.tracking import MlflowWriter
from thriftlm.search.answers import result
from thriftlm.search.answers.result import SearchResult
from thriftlm.search.cluster import driver
from thriftlm.search.history.journal import Journal, Known, read
from thriftlm.search.history.state import SearchState, TrialState
from thriftlm.search.history.storage import Storage, writable
from thriftlm.search.scores.objective import Score
from thriftlm.search.spaces.space import Space
from thriftlm.spec import InputError


@dataclass(frozen=True)
class Sitting:
    """What a person asked for."""

    space: Space
    source: str
    """The space as it was given on the command line."""
    storage: Storage
    name: str
    """Of the search: its folder in the storage and its parent run in MLflow."""
    tracking_uri: str
    address: str | None = None
    """The Ray cluster; None for what the environment says, else this machine."""
    resume: bool = False
    cold: bool = False
    """Whether every trial gets workers of its own, started for it."""
    overrides: tuple[str, ...] = ()
    """The `--set` of the command line, as they were given."""
    known: tuple[Known, ...] = ()
    """What the `--from` of the command line know."""

    @property
    def folder(self) -> Path:
        """Where the search lives."""
        return self.storage.search(self.name)

    @property
    def journal(self) -> Path:
        """The search's journal."""
        return self.folder / "journal.jsonl"


def answered(sitting: Sitting) -> SearchResult | None:
    """The answer of a search that is already finished, None when there is something to do.

    Raises:
        InputError: the name is taken by another space or by a search that was not finished, or
            there is nothing to resume.
    """
    state = SearchState(read(sitting.journal)) if sitting.journal.exists() else SearchState()
    if state.started is None:
        if sitting.resume:
            raise InputError(
                f"nothing to resume: no search named {sitting.name} in {sitting.storage.root}"
            )
        return None
    if state.started.space != sitting.space.document():
        raise InputError(
            f"the name {sitting.name} belongs to another search (its space differs, see "
            f"{sitting.journal}); choose another with --name"
        )
    begun_with = {event.source for event in read(sitting.journal) if isinstance(event, Known)}
    if others := {one.source for one in sitting.known} - begun_with:
        raise InputError(
            f"search {sitting.name} was begun without --from {', '.join(sorted(others))}, and what "
            "a search begins with cannot change; start another with --name"
        )
    if state.ended is not None and state.ended.status == "finished":
        return result.answer(sitting.space, state)[0]
    if not sitting.resume:
        raise InputError(
            f"search {sitting.name} was begun and is not finished; go on with --resume, or start "
            "another with --name"
        )
    return None


def hold(sitting: Sitting, view: LiveView) -> SearchResult:
    """Run the search, or what is left of it, and write its answer.

    Raises:
        InputError: storage, corpus, cluster or tracking server are not usable.
    """
    writable(sitting.folder)
    with Journal(sitting.journal) as journal:
        writer = MlflowWriter(
            sitting.tracking_uri, sitting.name, journal.append, known=journal.events
        )
        view.replay(journal.events)
        journal.listeners = (writer, view)
        try:
            desk = driver.run(
                sitting.space,
                journal,
                sitting.storage.data,
                address=sitting.address,
                known=sitting.known,
                cold=sitting.cold,
                on_stage=view.stage,
            )
            found, scores = result.write(sitting.folder, sitting.space, desk.state)
            own = {key: score for key, score in scores.items() if not is_known(desk.state, key)}
            writer.scores({trial_id: numbers(score) for trial_id, score in own.items()})
            files = draw(found, scores, desk.state, sitting)
            writer.finish(found.model_dump(mode="json"), files)
        finally:
            writer.close()
    return found


def is_known(state: SearchState, trial_id: str) -> bool:
    """Whether another search ran the trial, which tracking has under that one."""
    return state.trials[trial_id].is_only_known


def numbers(score: Score) -> dict[str, float]:
    """The numeric fields of a score, for tracking."""
    fields = score.model_dump(exclude={"trial_id", "law"})
    return {
        name: float(value)
        for name, value in fields.items()
        if isinstance(value, int | float) and value is not None
    }


def draw(
    found: SearchResult, scores: dict[str, Score], state: SearchState, sitting: Sitting
) -> list[Path]:
    """Pictures of the Pareto set and of the curves; the files of the search's folder to keep."""
    names = ["results.json"]
    if found.best is None:
        return [sitting.folder / name for name in names]
    names.append("best.yaml")
    winner = found.best.trial_id
    points = [point(state.trials[key], score, winner) for key, score in scores.items()]
    if any(math.isfinite(p.loss) and 0 < p.usd_per_btok < math.inf for p in points):
        pareto_picture(points, sitting.folder / "pareto.png", sitting.name)
        names.append("pareto.png")
    curves = [curve(trial, scores.get(key), winner) for key, trial in state.trials.items()]
    if any(math.isfinite(loss) for one in curves for loss in one.losses):
        curves_picture(curves, sitting.folder / "curves.png", sitting.name)
        names.append("curves.png")
    return [sitting.folder / name for name in names]


def point(trial: TrialState, score: Score, winner: str) -> PicturePoint:
    """A trial's mark in the Pareto picture."""
    return PicturePoint(
        label=what(trial),
        usd_per_btok=score.usd_per_btok,
        loss=score.loss_at_budget,
        low=score.low,
        high=score.high,
        on_front=score.pareto,
        is_winner=trial.trial_id == winner,
    )


def curve(trial: TrialState, score: Score | None, winner: str) -> PictureCurve:
    """A trial's line in the picture of curves, to its prediction where it has a score."""
    measured = [(p.tokens, p.val_loss) for p in trial.curve if p.val_loss is not None]
    return PictureCurve(
        label=what(trial),
        group=trial.run.system.strategy,
        tokens=[tokens for tokens, _ in measured],
        losses=[loss for _, loss in measured],
        predicted=(score.tokens_at_budget, score.loss_at_budget) if score else None,
        is_winner=trial.trial_id == winner,
    )
