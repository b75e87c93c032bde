"""Our training step against transformers' Trainer and LitGPT's pretrain step, bf16 on CPU.

    .venv/bin/python tests/benchmarks/rival_steps.py [SHAPE ...]

Each rival runs its own training loop in a process and an environment of its own, which this makes
(venv and pip, in the user's cache folder; torch is ours, the same build for all). Same shape, same
tokens, same threads, bf16 autocast over fp32 parameters, AdamW, gradients clipped. A rival and ours
take turns step by step, so that a slow minute of the machine is everybody's, and a ratio is the
median over turns. LitGPT compiles its model, always; the others are eager unless a row says more.

As a control each rival runs once more with the setting of the C library's memory that our training
core makes on CPUs (`ranks.keep_freed_memory`): what is left then is the training step itself.

Prints a table and writes it to results/rival_steps_cpu.md.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from pydantic import ValidationError

from thriftlm.spec import ModelSpec, SystemSpec
from thriftlm_models.counts import stored_params

ROUNDS = 9
WARM_UP = 2
BARS = {"transformers": 1.5, "litgpt": 1.2}
THREADS = 2
HERE = Path(__file__).parent
RESULTS = HERE / "results" / "rival_steps_cpu.md"
ENVIRONMENTS = (
    Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "thriftlm" / "rivals"
)
PACKAGES = {
    "transformers": ["accelerate==1.15.0"],
    "litgpt": ["litgpt==0.5.13", "torchmetrics==1.9.0", "transformers==4.56.2"],
}
"""What each environment has beside ours; LitGPT's pins are its own."""
SHAPES: dict[str, tuple[dict[str, Any], int, int]] = {
    "10m": ({"n_layers": 10, "d_model": 256, "n_heads": 8, "d_ff": 704, "vocab": 8192}, 8, 256),
    "125m": ({"preset": "mobilellm-125m"}, 2, 512),
}
"""Model, sequences and tokens per sequence by name."""
KEPT_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
    "MALLOC_TOP_PAD_": str(2**26),
}


@dataclass(frozen=True)
class Rival:
    """One row: who, and what is set beside its defaults."""

    name: str
    label: str
    compiled: bool = False
    environment: tuple[tuple[str, str], ...] = ()


RIVALS = (
    Rival("transformers", "transformers Trainer"),
    Rival("transformers", "+ our memory setting", environment=tuple(KEPT_MEMORY.items())),
    Rival("litgpt", "LitGPT pretrain"),
    Rival("litgpt", "+ our memory setting", environment=tuple(KEPT_MEMORY.items())),
    Rival("litgpt", "+ not compiled", environment=(("TORCH_COMPILE_DISABLE", "1"),)),
    Rival("thriftlm", "thriftlm, compiled", compiled=True),
)


def python_of(name: str) -> str:
    """The interpreter of a contestant, its environment made where it is missing."""
    if name == "thriftlm":
        return sys.executable
    wanted = " ".join(PACKAGES[name])
    folder = ENVIRONMENTS / name
    python, stamp = folder / "bin" / "python", folder / "installed"
    if not stamp.is_file() or stamp.read_text() != wanted:
        print(f"making {folder}: {wanted}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        (site,) = folder.glob("lib/python*/site-packages")
        # Behind its own packages, so that its pins win.
        ours = [path for path in sys.path if path.endswith("site-packages")]
        (site / "ours.pth").write_text("\n".join(ours) + "\n")
        install = [python, "-m", "pip", "install", "-qq", *PACKAGES[name]]
        subprocess.run(install, check=True, stdout=sys.stderr)
        stamp.write_text(wanted)
    return str(python)


def task_of(shape: str, folder: Path) -> dict[str, Any]:
    """What every contestant is told of a shape; the batches are written once."""
    fields, sequences, seq_len = SHAPES[shape]
    model = ModelSpec.model_validate(fields)
    kept = folder / f"{shape}.pt"
    if not kept.exists():
        generator = torch.Generator().manual_seed(0)
        size = (sequences, seq_len + 1)
        torch.save([torch.randint(model.vocab, size, generator=generator) for _ in range(8)], kept)
    return {
        "model": model.model_dump(mode="json"),
        "stored_params": stored_params(model),
        "sequences": sequences,
        "seq_len": seq_len,
        "threads": THREADS,
        "lr": 1e-4,
        "batches": str(kept),
    }


class Contestant:
    """A process that does a step when asked."""

    def __init__(self, rival: Rival, task: dict[str, Any]) -> None:
        told = json.dumps(task | {"compile": rival.compiled})
        script = str(HERE / "rival_contestants.py")
        environment = os.environ | {"OMP_NUM_THREADS": str(THREADS)} | dict(rival.environment)
        self.process = subprocess.Popen(
            [python_of(rival.name), script, rival.name, told],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.step_count = 0

    def step(self) -> float:
        """Seconds of the next step."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        # The first line begins the first step, each later one also ends the step before it.
        print("go", file=self.process.stdin, flush=True)
        while line := self.process.stdout.readline():
            if line.startswith("STEP "):
                return float(line.split()[1])
        raise RuntimeError(f"a contestant ended: {self.process.args}")

    def end(self) -> None:
        """Let it go."""
        self.process.kill()
        self.process.wait()


@contextmanager
def entered(rival: Rival, task: dict[str, Any]) -> Iterator[Contestant]:
    contestant = Contestant(rival, task)
    try:
        yield contestant
    finally:
        contestant.end()


def duel(rival: Rival, task: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Seconds of our steps and of the rival's, in turns. Two at a time: memory is for more."""
    ours: list[float] = []
    theirs: list[float] = []
    with entered(Rival("thriftlm", "ours"), task) as us, entered(rival, task) as them:
        for _ in range(WARM_UP):
            us.step()
            them.step()
        for _ in range(ROUNDS):
            ours.append(us.step())
            theirs.append(them.step())
    return ours, theirs


def row(shape: str, rival: Rival, task: dict[str, Any]) -> str:
    ours, theirs = duel(rival, task)
    tokens = task["sequences"] * task["seq_len"]
    ratios = [t / o for t, o in zip(theirs, ours, strict=True)]
    low, _, high = quantiles(ratios, n=4)
    bar = BARS.get(rival.name) if not rival.environment else None
    verdict = "" if bar is None else f"{bar} {'reached' if median(ratios) >= bar else 'missed'}"
    return (
        f"| {shape} | {rival.label} | {tokens / median(theirs):,.0f} | "
        f"{tokens / median(ours):,.0f} | {median(ratios):.2f} ({low:.2f} to {high:.2f}) | "
        f"{verdict} |"
    )


def is_built(rival: Rival) -> bool:
    """Whether this version can run it: compiled blocks are newer than this benchmark."""
    try:
        SystemSpec(compile=rival.compiled)
    except ValidationError:
        return False
    return True


def main(shapes: list[str]) -> None:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for shape in shapes:
            task = task_of(shape, Path(folder))
            for rival in filter(is_built, RIVALS):
                rows.append(row(shape, rival, task))
                print(rows[-1], flush=True)
    versions = ", ".join(" ".join(names) for names in PACKAGES.values())
    text = "\n".join(
        [
            f"Measured {datetime.now(UTC).date()} on {THREADS} CPU cores, torch "
            f"{torch.__version__}, {versions}; {ROUNDS} turns a row, bf16 autocast. In brackets "
            "the middle half of the turns.",
            "",
            "| shape | rival | its tokens/s | ours | ours is faster by | bar |",
            "|---|---|---|---|---|---|",
            *rows,
        ]
    )
    print(text)
    RESULTS.write_text(text + "\n")


if __name__ == "__main__":
    main(sys.argv[1:] or list(SHAPES))
