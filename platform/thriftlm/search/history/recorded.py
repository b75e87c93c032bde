"""What a search has measured, as recorded runs: see `thriftlm.records`."""

from typing import Any

from thriftlm.search.history.state import SearchState, TrialState
from thriftlm.spec import Progress, digest, identity
from thriftlm_models.counts import non_embedding_params, stored_params


def recorded_rows(state: SearchState) -> list[dict[str, Any]]:
    """One row per trial and report, in order of proposal; trials that never started have none."""
    varied = list(dict.fromkeys(path for trial in state.trials.values() for path in trial.point))
    unique = state.started.unique_tokens if state.started else {}
    return [
        row
        for trial in sorted(state.trials.values(), key=lambda trial: trial.number)
        for row in _rows(trial, unique, varied)
    ]


def _rows(trial: TrialState, unique: dict[str, int], varied: list[str]) -> list[dict[str, Any]]:
    if not trial.allocations:
        return []
    run = trial.run
    fixed = {
        "run_id": trial.trial_id,
        **{path: _value(trial, path) for path in varied},
        "params": stored_params(run.model),
        "non_embedding_params": non_embedding_params(run.model),
        "unique_tokens": unique.get(digest(identity(run.data))),
        "run": run.model_dump_json(),
    }
    usd_per_hour = trial.allocations[-1].usd_per_hour
    curve = trial.curve
    if not curve and trial.status == "oom":  # a worker that was ended could not report it
        curve = [Progress(status="oom", step=0, tokens=0)]
    return [
        fixed | _report(one, run.system.n_gpus, usd_per_hour, _status(trial, one is curve[-1]))
        for one in curve
    ]


def _value(trial: TrialState, path: str) -> Any:
    """A field of the point; of one that only the user's own configuration sets, the run's value."""
    if path in trial.point:
        value = trial.point[path]
    else:
        section, field = path.split(".")
        value = getattr(getattr(trial.run, section), field)
    return str(list(value)) if isinstance(value, list | tuple) else value


def _report(report: Progress, n_gpus: int, usd_per_hour: float, status: str) -> dict[str, Any]:
    rate = report.tokens_per_s
    return {
        "tokens": report.tokens,
        "loss": report.val_loss,
        "bits_per_byte": report.val_bits_per_byte,
        "tokens_per_s": None if rate is None else rate * n_gpus,
        "usd_per_hour": usd_per_hour,
        "decayed": report.decayed,
        "warming_up": report.warming_up,
        "status": status,
    }


def _status(trial: TrialState, is_last: bool) -> str:
    """`running` at every report but the last, which says how the trial ended."""
    return (trial.status or "running") if is_last else "running"
