"""Factored searches on real Ray: one asks for a probe, and the next pays for nothing twice."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from thriftlm.search.history.journal import Known, Probed, read
from thriftlm.search.history.state import SearchState

pytestmark = [pytest.mark.slow, pytest.mark.ray]
STEP = 2048
SPACE = {
    "name": "first",
    "data": {"tokenizer": "bpe:512", "seq_len": 64},
    "training_budget": {"usd": 1.0},  # a probe costs half a cent here
    "search_budget": {"usd": 0.2, "trials": 4},
    "search": {
        "algorithm": "factored",
        "max_concurrent": 1,
        "fidelity": {
            "min_tokens": 4 * STEP,
            "max_tokens": 16 * STEP,
            "report_every_tokens": 2 * STEP,
            "validation_tokens": 2048,
        },
    },
    "space": {
        "model": {"n_layers": [1, 2], "d_model": 32, "n_heads": 2, "d_ff": 96},
        "optim": {"lr": [3e-3, 1e-2, 3e-2], "batch_tokens": STEP, "schedule": "constant"},
        "system": {"gpu": "cpu", "micro_batch": [1, 8, 32], "act_ckpt": ["none", "full"]},
    },
}


@pytest.fixture(scope="module")
def storage(tmp_path_factory, corpus) -> Path:
    folder: Path = tmp_path_factory.mktemp("factored")
    space = SPACE | {"data": SPACE["data"] | {"corpus": str(corpus)}}
    (folder / "space.yaml").write_text(yaml.safe_dump(space))
    return folder


def events(storage: Path, name: str) -> list[Any]:
    return list(read(storage / "searches" / name / "journal.jsonl"))


@pytest.fixture(scope="module")
def first(storage, searched) -> dict[str, Any]:
    found: dict[str, Any] = searched(storage / "space.yaml", storage)
    return found


def test_a_search_asks_for_a_probe_and_its_timings_teach_it(storage, first):
    journal = events(storage, "first")
    timings = [event.timing for event in journal if isinstance(event, Probed)]
    timed = [one for one in timings if one.status == "timed"]
    assert len(timed) >= 2
    assert all(one.repeats >= 3 and one.low <= one.tokens_per_s <= one.high for one in timed)
    probes = [trial for trial in SearchState(journal).trials.values() if trial.systems]
    assert {trial.status for trial in probes} == {"done"}
    assert all(trial.usd(trial.allocations[-1].until) > 0 for trial in probes)
    assert first["spent_usd"] <= SPACE["search_budget"]["usd"]


def test_what_an_earlier_search_measured_is_not_paid_for_again(storage, first, searched):
    found = searched(storage / "space.yaml", storage, "--name", "second", "--from", "first")
    before, after = (SearchState(events(storage, name)) for name in ("first", "second"))
    measured = {t.run.recipe_id for t in before.trials.values() if t.curve}
    (known,) = [event for event in events(storage, "second") if isinstance(event, Known)]
    assert {one.recipe_id for one in known.runs if one.reports} == measured
    paid = {t.run.recipe_id for t in after.trials.values() if t.allocations and not t.systems}
    assert len(measured) + len(paid) == 6  # what the space holds
    assert not measured & paid
    assert found["best"]["trial_id"] in after.trials
