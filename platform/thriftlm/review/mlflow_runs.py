"""Trials that an MLflow experiment holds, as recorded runs: the way back from tracking.

What MLflow does not keep (whether the learning rate had decayed) follows from the run itself, which
each trial has as `run.yaml`.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from mlflow import MlflowClient
from mlflow.entities import Run
from pydantic import ValidationError

from thriftlm.review.mlflow_store import EXPERIMENT, cause, without_password
from thriftlm.spec import InputError, RunSpec
from thriftlm.training.schedule import has_decayed, is_warming_up
from thriftlm_models.counts import non_embedding_params, stored_params

SECTIONS = ("model.", "optim.", "data.", "system.")
COLUMNS = {"loss": "val_loss", "bits_per_byte": "val_bits_per_byte"}
"""Columns of recorded runs that are metrics with tokens as their step."""


def experiment_rows(tracking_uri: str, name: str) -> list[dict[str, Any]]:
    """Recorded runs of all trials of an experiment, one row per report.

    Args:
        tracking_uri: server or database.
        name: of the experiment, `thriftlm` where it is empty; `EXPERIMENT/SEARCH` takes the trials
            of one search.

    Raises:
        InputError: the server does not answer, has no such experiment, or it holds no trials.
    """
    where = without_password(tracking_uri)
    try:
        client = MlflowClient(tracking_uri)
        experiment_id, search = _experiment(client, name or EXPERIMENT)
        condition = "tags.kind = 'learn'"
        if search:
            condition += f" and tags.`thriftlm.search_id` = '{search}'"
        runs = list(_runs(client, experiment_id, condition))
        rows = [row for run in runs for row in _rows(client, run)]
    except InputError:
        raise
    except Exception as error:  # whatever a dead server, a dead database or a driver of one raises
        raise InputError(
            f"--from mlflow:{name}: tracking server {where} cannot be used: {cause(error)}; start "
            "it or correct --tracking-uri"
        ) from error
    if not rows:
        raise InputError(
            f"--from mlflow:{name}: {len(runs)} trials in {where}, none of which has reported"
        )
    return rows


def _experiment(client: MlflowClient, name: str) -> tuple[str, str]:
    """Id of the experiment, and the search that is meant; a name may itself have slashes."""
    whole = client.get_experiment_by_name(name)
    if whole is not None:
        return str(whole.experiment_id), ""
    head, _, search = name.rpartition("/")
    found = client.get_experiment_by_name(head) if head else None
    if found is None:
        names = ", ".join(sorted(one.name for one in client.search_experiments(max_results=20)))
        raise InputError(f"--from mlflow:{name}: no such experiment; there are {names}")
    return str(found.experiment_id), search


def _runs(client: MlflowClient, experiment_id: str, condition: str) -> Iterator[Run]:
    token = None
    while True:
        page = client.search_runs(
            [experiment_id], condition, order_by=["start_time"], page_token=token
        )
        yield from page
        token = page.token
        if not token:
            return


def _rows(client: MlflowClient, run: Run) -> Iterator[dict[str, Any]]:
    spec, tags = _spec(client, run), run.data.tags
    if spec is None:
        return
    fixed = {
        "run_id": tags.get("thriftlm.trial_id", run.info.run_id),
        **{k: _value(v) for k, v in run.data.params.items() if k.startswith(SECTIONS)},
        "params": stored_params(spec.model),
        "non_embedding_params": non_embedding_params(spec.model),
        "run": spec.model_dump_json(),
    }
    metrics = {
        column: _by_tokens(client, run, name)
        for column, name in (COLUMNS | {"rate": "tokens_per_s"}).items()
    }
    at = sorted(set().union(*metrics.values()))
    for tokens in at or [0]:  # one that ran out of memory has no report of its own
        step = -(-tokens // spec.optim.batch_tokens)
        rate = metrics["rate"].get(tokens)
        yield fixed | {
            "tokens": tokens,
            **{column: metrics[column].get(tokens) for column in COLUMNS},
            "tokens_per_s": None if rate is None else rate * spec.system.n_gpus,
            "decayed": has_decayed(spec.optim, step, spec.steps),
            "warming_up": is_warming_up(spec.optim, step, spec.steps),
            "status": tags.get("status", "running") if tokens == (at or [0])[-1] else "running",
        }


def _spec(client: MlflowClient, run: Run) -> RunSpec | None:
    """The whole run; None for one that a newer or much older thriftlm has written."""
    with TemporaryDirectory() as folder:
        path = Path(client.download_artifacts(run.info.run_id, "run.yaml", folder))
        try:
            return RunSpec.model_validate(yaml.safe_load(path.read_text()))
        except ValidationError:
            return None


def _by_tokens(client: MlflowClient, run: Run, metric: str) -> dict[int, float]:
    if metric not in run.data.metrics:
        return {}
    return {one.step: one.value for one in client.get_metric_history(run.info.run_id, metric)}


def _value(text: str) -> Any:
    """A param as it was before it became text."""
    try:
        return json.loads(text)
    except ValueError:
        return text
