"""Laws fitted to small published runs predict larger ones.

The tables carry no licence: point THRIFTLM_SHARED_DATA at the folder that holds them, else these
tests are skipped.
"""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from law_fits import SETTLED_STEPS, held_out, misfitting, steplaw

FOLDER = Path(os.environ.get("THRIFTLM_SHARED_DATA", "not given"))
needs_data = pytest.mark.skipif(
    not (FOLDER / "misfitting_curves.csv").exists(), reason="THRIFTLM_SHARED_DATA is not given"
)


@needs_data
@pytest.mark.parametrize("form", ["chinchilla", "skaling"])
def test_misfitting_runs_below_400m_predict_a_billion(form):
    fitted, rows = held_out(misfitting(FOLDER / "misfitting_curves.csv", SETTLED_STEPS), 4e8, form)
    assert fitted > 40
    assert {row[0] for row in rows} == {1002009344.0}
    for _, _, loss, predicted, *_ in rows:
        assert predicted == pytest.approx(loss, rel=0.015)


@needs_data
def test_step_law_runs_below_500m_are_fitted_and_their_interval_is_wide():
    fitted, rows = held_out(steplaw(FOLDER / "steplaw.csv"), 5e8, "chinchilla")
    assert (fitted, len(rows)) == (12, 5)
    assert all(low < predicted < high for *_, predicted, low, high in rows)
