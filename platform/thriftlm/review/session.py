"""One sitting of a search: what exists already, live view, tracking, answer and pictures."""

from dataclasses import dataclass
from pathlib import Path

from thriftlm.review.live import LiveView, describe
from thriftlm.review.pictures import PictureCurve, PicturePoint, curves_picture, pareto_picture
from thriftlm.review.tracking import MlflowWriter
from thriftlm.search import driver, result
from thriftlm.search.journal import Journal, read
from thriftlm.search.objective import Score
from thriftlm.search.result import SearchResult
from thriftlm.search.space import Space
from thriftlm.search.state import SearchState
from thriftlm.search.storage import Storage, writable
from thriftlm.spec import InputError


@dataclass(frozen=True)
class Sitting:
    """What a person asked for."""

    space: Space
    source: str
    """The space as it was given on the command line."""
    storage: Storage
    name: str
    tracking_uri: str
    address: str | None = None
    resume: bool = False

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
                on_stage=view.stage,
            )
            found, scores = result.write(sitting.folder, sitting.space, desk.state)
            writer.scores({trial_id: numbers(score) for trial_id, score in scores.items()})
            files = draw(found, scores, desk.state, sitting)
            writer.finish(found.model_dump(mode="json"), files)
        finally:
            writer.close()
    return found


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
    files = [sitting.folder / "results.json"]
    if found.best is None:
        return files
    winner = found.best.trial_id
    points = [
        PicturePoint(
            label=describe(state.trials[trial_id]),
            usd_per_btok=score.usd_per_btok,
            loss=score.loss_at_budget,
            low=score.low,
            high=score.high,
            on_front=score.pareto,
            is_winner=trial_id == winner,
        )
        for trial_id, score in scores.items()
        if score.usd_per_btok is not None
    ]
    curves = [
        PictureCurve(
            label=describe(trial),
            group=trial.run.system.strategy,
            tokens=[p.tokens for p in trial.curve if p.val_loss is not None],
            losses=[p.val_loss for p in trial.curve if p.val_loss is not None],
            is_winner=trial.trial_id == winner,
        )
        for trial in state.trials.values()
    ]

    if points:
        pareto_picture(points, sitting.folder / "pareto.png", sitting.name)
    curves_picture(curves, sitting.folder / "curves.png", sitting.name)
    return [*files, *(sitting.folder / name for name in ("best.yaml", "pareto.png", "curves.png"))]
