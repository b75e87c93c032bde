"""A small model, trained for real on the words of a little corpus."""

import json
import random
from pathlib import Path

import pytest

from thriftlm.spec import Progress, RunSpec
from thriftlm.training.loop import Decision, train

SENTENCE = "the baker sells fresh bread and a cat runs over to the old market where people talk"


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with shared layers, of 120 steps."""
    folder = tmp_path_factory.mktemp("release")
    rng, words = random.Random(0), SENTENCE.split()
    with (folder / "corpus.jsonl").open("w") as file:
        for _ in range(200):
            first = rng.randrange(len(words))
            text = " ".join(words[(first + i) % len(words)] for i in range(40))
            file.write(json.dumps({"text": text}) + "\n")
    run = RunSpec.model_validate(
        {
            "model": {
                "n_layers": 2, "sharing": "immediate", "d_model": 64, "n_heads": 4, "d_ff": 128,
            },
            "optim": {"lr": 0.01, "batch_tokens": 512},
            "data": {
                "corpus": str(folder / "corpus.jsonl"), "tokenizer": "bpe:300", "seq_len": 32,
                "validation_fraction": 0.1,
            },
            "tokens": 120 * 512, "validation_tokens": 256, "origin": "small-search/0123456789ab",
        }
    )  # fmt: skip

    def report(progress: Progress, written: Path | None) -> Decision:
        return Decision.CONTINUE

    measured = train(run, report, cache=folder / "data", output=folder / "run")
    assert measured.final.val_loss is not None
    assert measured.final.val_loss < 1.0
    return folder / "run"
