"""Tokens per second of our training step against transformers' LlamaForCausalLM, bf16 on CPU.

    .venv/bin/python tests/benchmarks/training_step.py [SHAPE ...]

Each contestant lives in a process of its own, as its users run it, and they take turns step by
step, so that a slow minute of the machine is everybody's. Same shape, same batch, same optimizer
(torch's fused AdamW, gradients clipped), bf16 autocast over fp32 parameters. transformers has its
best settings for this: SDPA attention, no cache, its own loss. As a control it runs once more with
the memory setting that our training core makes on CPUs (`ranks.keep_freed_memory`).

Prints a table and writes it to results/training_step_cpu.md. Shares are of the bf16 matmul peak
measured in the same run.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import IO, Any

import torch

from thriftlm.spec import RunSpec
from thriftlm_models.counts import flops_per_token, stored_params

ROUNDS = 9
TARGET = 1.5
THREADS = os.cpu_count() or 1
RESULTS = Path(__file__).parent / "results" / "training_step_cpu.md"
SHAPES: dict[str, tuple[dict[str, Any], int, int]] = {
    "wide-shallow": ({"n_layers": 4, "d_model": 1024, "n_heads": 16, "vocab": 32_000}, 4, 256),
    "narrow-deep": (
        {"n_layers": 24, "d_model": 256, "n_heads": 4, "n_kv_heads": 2, "vocab": 32_000},
        4,
        256,
    ),
    "mobilellm-125m": ({"preset": "mobilellm-125m"}, 2, 512),
}
"""Model, sequences and tokens per sequence by name."""
CONTESTANTS = ("thriftlm", "transformers", "transformers, our allocator")


def run_of(shape: str) -> RunSpec:
    model, sequences, seq_len = SHAPES[shape]
    return RunSpec.model_validate(
        {
            "model": model,
            "data": {"seq_len": seq_len, "tokenizer": "bpe:32000"},
            "optim": {"batch_tokens": sequences * seq_len},
            "system": {
                "micro_batch": sequences,
                "precision": "amp_bf16",
                "cpus_per_worker": THREADS,
            },
            "tokens": 10**6,
        }
    )


def batch_of(run: RunSpec) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (run.system.micro_batch, run.data.seq_len + 1)
    return torch.randint(run.model.vocab, shape, generator=generator)


def our_step(run: RunSpec) -> Callable[[], None]:
    from thriftlm.training.engine import build_engine
    from thriftlm.training.ranks import Ranks, keep_freed_memory

    keep_freed_memory()
    engine = build_engine(run, Ranks(rank=0, world_size=1, device=torch.device("cpu")))
    batch = batch_of(run)

    def step() -> None:
        engine.accumulate(batch, last=True)
        engine.step(1e-3)

    return step


def their_step(run: RunSpec) -> Callable[[], None]:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = run.model
    theirs = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=model.d_model,
            intermediate_size=model.d_ff,
            num_hidden_layers=model.n_layers,
            num_attention_heads=model.n_heads,
            num_key_value_heads=model.n_kv_heads,
            head_dim=model.head_dim,
            vocab_size=model.vocab,
            tie_word_embeddings=model.tie_embeddings,
            use_cache=False,
            attn_implementation="sdpa",
        )
    )
    assert sum(p.numel() for p in theirs.parameters()) == stored_params(model)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-3, fused=True)
    tokens = batch_of(run)[:, :-1].contiguous()

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = theirs(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def contest(contestant: str, shape: str) -> None:
    """A contestant's process: a step, and its seconds on stdout, for every line on stdin."""
    torch.set_num_threads(THREADS)
    if contestant == "transformers, our allocator":
        from thriftlm.training.ranks import keep_freed_memory

        keep_freed_memory()
    run = run_of(shape)
    step = our_step(run) if contestant == "thriftlm" else their_step(run)
    step()
    step()
    print("ready", flush=True)
    for _ in sys.stdin:
        begin = time.perf_counter()
        step()
        print(time.perf_counter() - begin, flush=True)


def measured(shape: str) -> dict[str, list[float]]:
    """Seconds per step of each contestant, one after the other in every round."""
    processes = {
        name: subprocess.Popen(
            [sys.executable, __file__, "--contest", name, shape],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in CONTESTANTS
    }
    pipes: dict[str, tuple[IO[str], IO[str]]] = {}
    for name, process in processes.items():
        assert process.stdin is not None
        assert process.stdout is not None
        pipes[name] = process.stdin, process.stdout
        while process.stdout.readline().strip() != "ready":
            assert process.poll() is None, f"{name} died"
    seconds: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    for _ in range(ROUNDS):
        for name, (ask, answer) in pipes.items():
            print("go", file=ask, flush=True)
            seconds[name].append(float(answer.readline()))
    for name, process in processes.items():
        pipes[name][0].close()
        process.wait()
    return seconds


def peak_flops_per_second() -> float:
    """The best of twenty square bf16 matrix products."""
    a, b = (torch.randn(2048, 2048).bfloat16() for _ in range(2))
    taken = []
    for _ in range(20):
        begin = time.perf_counter()
        a @ b
        taken.append(time.perf_counter() - begin)
    return 2 * 2048**3 / min(taken)


def main(shapes: list[str]) -> None:
    torch.set_num_threads(THREADS)
    peak = peak_flops_per_second()
    rows = []
    for shape in shapes:
        seconds = measured(shape)
        run = run_of(shape)
        tokens = run.optim.batch_tokens
        flops = flops_per_token(run.model, run.data.seq_len) * tokens
        for name in CONTESTANTS:
            middle = median(seconds[name])
            # Round by round, so that what slows the machine for a while cancels out.
            ratios = sorted(t / o for t, o in zip(seconds[name], seconds["thriftlm"], strict=True))
            rows.append(
                f"| {shape} | {name} | {tokens / middle:,.0f} | {flops / middle / peak:.0%} | "
                f"{median(ratios):.2f} ({ratios[1]:.2f} to {ratios[-2]:.2f}) |"
            )
    text = "\n".join(
        [
            f"Measured {datetime.now(UTC).date()} on {THREADS} CPU cores, torch "
            f"{torch.__version__}, {ROUNDS} rounds; bf16 matmul peak {peak / 1e12:.3f} TFLOP/s. "
            f"Ours over theirs should reach {TARGET}.",
            "",
            "| shape | training step | tokens/s | share of peak (6N+attn) | ours is faster by |",
            "|---|---|---|---|---|",
            *rows,
        ]
    )
    print(text)
    RESULTS.write_text(text + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--contest"]:
        contest(*sys.argv[2:])
    else:
        main(sys.argv[1:] or list(SHAPES))
