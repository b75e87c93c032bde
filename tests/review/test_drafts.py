import subprocess
import sys

from thriftlm.review.drafts import Drafts
from thriftlm.search.history.journal import Released, SearchStarted


def test_dollars_are_the_ledgers() -> None:
    """Each release books one allocation; the sums are what the journal says."""
    drafts = Drafts("toy")
    drafts.add(SearchStarted(at=0.0, search_id="toy", space={}, versions={}, unique_tokens={}))
    for trial_id, usd in (("a", 0.25), ("b", 1.0), ("a", 0.5)):
        drafts.add(Released(at=1.0, trial_id=trial_id, usd=usd))
    booked = {key: [number.value for number in draft.metrics] for key, draft in drafts.runs.items()}
    assert booked == {None: [0.25, 1.25, 1.75], "a": [0.25, 0.75], "b": [1.0]}


def test_drafts_need_no_mlflow() -> None:
    code = "import sys, thriftlm.review.drafts; assert 'mlflow' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
