"""A tiny run for the tests of the training core: 20 steps of 256 tokens, well under a second."""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from thriftlm.spec import Measurement, Progress, RunSpec
from thriftlm.training.loop import Decision, train

TEXT = (
    "the baker sells fresh bread every morning and then a cat runs over to the old market "
    "where people talk about rain wind sun moon stars rivers mountains without any hurry"
)
STEPS = 20
BATCH_TOKENS = 256


@dataclass(frozen=True)
class Bench:
    """A corpus, its shards, and runs over them."""

    folder: Path

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    def spec(self, **changes: Any) -> RunSpec:
        """The tiny run; sections given as keywords are laid over its own."""
        sections: dict[str, dict[str, Any]] = {
            "model": {
                "n_layers": 2,
                "sharing": "immediate",
                "d_model": 32,
                "n_heads": 4,
                "n_kv_heads": 2,
                "d_ff": 64,
            },
            "optim": {"lr": 0.005, "batch_tokens": BATCH_TOKENS, "grad_clip": 0.3},
            "data": {
                "corpus": str(self.folder / "corpus.jsonl"),
                "tokenizer": "bpe:300",
                "seq_len": 32,
                "validation_fraction": 0.1,
            },
            "system": {"micro_batch": 4},
        }
        for name, section in sections.items():
            section.update(changes.pop(name, {}))
        fields = {"tokens": STEPS * BATCH_TOKENS, "report_every_tokens": BATCH_TOKENS}
        return RunSpec.model_validate(sections | fields | {"validation_tokens": 256} | changes)

    def train(
        self,
        spec: RunSpec,
        output: Path | str,
        *,
        stop_at: int | None = None,
        **more: Any,
    ) -> Measurement:
        """What a run in this process measured; `stop_at` is the step of the report that ends it."""

        def report(progress: Progress, written: Path | None) -> Decision:
            return Decision.STOP if progress.step == stop_at else Decision.CONTINUE

        return train(spec, report, cache=self.cache, output=output, **more)


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """The bench over 200 documents of seeded random words."""
    folder = tmp_path_factory.mktemp("bench")
    rng, known = random.Random(0), TEXT.split()
    weights = [1 / rank for rank in range(1, len(known) + 1)]
    with (folder / "corpus.jsonl").open("w") as file:
        for number in range(200):
            words = rng.choices(known, weights, k=rng.randrange(40, 80))
            file.write(json.dumps({"text": f"{number} {' '.join(words)}."}) + "\n")
    return Bench(folder)
