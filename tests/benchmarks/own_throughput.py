"""Throughput of our training core on this machine, as rows that calibrate the estimator.

    .venv/bin/python tests/benchmarks/own_throughput.py OUT.csv

Each row is measured in processes of its own, one per worker. Machines are slowed by what else runs
on them, so each process takes turns between training steps and what `thriftlm doctor` measures
(matrix products, memory copies), and the row holds the fastest of each: what is calibrated is the
share of the machine's own speed that training reaches, not a speed. Peak memory is the resident set
of one worker after two steps, before anything else is measured.
"""

import csv
import json
import os
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from thriftlm.planning.cases import model_columns
from thriftlm.review.doctor import matmul_tflops, memory_gb_per_s
from thriftlm.spec import RunSpec
from thriftlm.training.engine import build_engine
from thriftlm.training.loop import peak_memory_gb
from thriftlm.training.ranks import joined

ROUNDS = 6
SECONDS_PER_ROUND = 2.0
SMALL = {"n_layers": 6, "d_model": 192, "n_heads": 6, "d_ff": 512}
MEDIUM = {"n_layers": 8, "d_model": 384, "n_heads": 6, "n_kv_heads": 2, "d_ff": 1024}
WIDE = {"n_layers": 4, "d_model": 1024, "n_heads": 16, "d_ff": 2816}
DEEP = {"n_layers": 24, "d_model": 256, "n_heads": 4, "n_kv_heads": 2, "d_ff": 768}
QUICK = {"n_layers": 2, "d_model": 128, "n_heads": 4, "d_ff": 384}
CASES: list[dict[str, Any]] = [
    {"name": "quick", "model": QUICK, "vocab": 2048, "seq_len": 128, "micro_batch": 8},
    {"name": "quick", "model": QUICK, "vocab": 2048, "seq_len": 128, "micro_batch": 32},
    {"name": "small", "model": SMALL, "vocab": 4096, "seq_len": 256, "micro_batch": 8},
    {"name": "small", "model": SMALL, "vocab": 4096, "seq_len": 256, "attention": "math"},
    {"name": "small", "model": SMALL, "vocab": 4096, "seq_len": 1024, "micro_batch": 4},
    {"name": "small", "model": SMALL, "vocab": 4096, "seq_len": 256, "precision": "amp_bf16"},
    {"name": "medium", "model": MEDIUM, "vocab": 8192, "seq_len": 256, "micro_batch": 4},
    {"name": "medium", "model": MEDIUM, "vocab": 8192, "seq_len": 512, "precision": "amp_bf16"},
    {"name": "medium", "model": MEDIUM, "vocab": 32000, "seq_len": 256, "precision": "amp_bf16"},
    {"name": "wide", "model": WIDE, "vocab": 32000, "seq_len": 256, "precision": "amp_bf16"},
    {"name": "wide", "model": WIDE, "vocab": 8192, "seq_len": 256, "micro_batch": 2},
    {"name": "deep", "model": DEEP, "vocab": 32000, "seq_len": 256, "precision": "amp_bf16"},
    {"name": "deep", "model": DEEP, "vocab": 8192, "seq_len": 256, "micro_batch": 4},
    {
        "name": "mobilellm-125m",
        "model": {"preset": "mobilellm-125m"},
        "vocab": 32000,
        "seq_len": 512,
        "micro_batch": 2,
        "precision": "amp_bf16",
    },
    *(
        {
            "name": "medium",
            "model": MEDIUM,
            "vocab": 8192,
            "seq_len": 256,
            "micro_batch": 4,
            "n_gpus": 2,
            "strategy": strategy,
        }
        for strategy in ("ddp", "fsdp_full", "fsdp_grad_op", "zero1", "zero2", "zero3")
    ),
]


NOT_IN_ROWS = ("stored_layers", "span_tokens", "stored_params", "block_matmul_params")
"""What a row's other columns tell."""


def run_of(case: dict[str, Any]) -> RunSpec:
    workers = case.get("n_gpus", 1)
    micro_batch = case.get("micro_batch", 8)
    return RunSpec.model_validate(
        {
            "model": {**case["model"], "vocab": case["vocab"]},
            "data": {"seq_len": case["seq_len"], "tokenizer": f"bpe:{case['vocab']}"},
            "optim": {"batch_tokens": micro_batch * case["seq_len"] * workers},
            "system": {
                "n_gpus": workers,
                "strategy": case.get("strategy", "single"),
                "micro_batch": micro_batch,
                "attention": case.get("attention", "flash"),
                "precision": case.get("precision", "fp32"),
                "cpus_per_worker": (os.cpu_count() or 1) // workers,
            },
            "tokens": 10**6,
        }
    )


def work(run: RunSpec) -> None:
    """One worker: prints what it measured as JSON, then leaves without unwinding process groups."""
    with joined(run.system) as ranks:
        engine = build_engine(run, ranks)
        generator = torch.Generator().manual_seed(0)
        shape = (run.system.micro_batch, run.data.seq_len + 1)
        batch = torch.randint(run.model.vocab, shape, generator=generator)

        def step() -> float:
            begin = time.perf_counter()
            engine.accumulate(batch, last=True)
            engine.step(1e-3)
            return time.perf_counter() - begin

        step()
        step()
        resident = peak_memory_gb(ranks.device)
        each = max(1, round(SECONDS_PER_ROUND / ranks.mean(step())[0]))
        found: dict[str, list[float]] = {"step": [], "fp32": [], "bf16": [], "memory": []}
        for _ in range(ROUNDS):
            ranks.barrier()
            found["fp32"].append(matmul_tflops("cpu", torch.float32))
            found["bf16"].append(matmul_tflops("cpu", torch.bfloat16))
            found["memory"].append(memory_gb_per_s("cpu"))
            ranks.barrier()
            found["step"].extend(step() for _ in range(each))
        ranks.barrier()
        told = {name: max(values) for name, values in found.items()}
        told |= {"step": min(found["step"]), "peak_mem_gb": resident}
        print(json.dumps(told), flush=True)
        if ranks.world_size > 1:
            dist.barrier()
        os._exit(0)


def measured(case: dict[str, Any]) -> dict[str, float]:
    """What one case measured, averaged over its workers."""
    workers = case.get("n_gpus", 1)
    shared = {"WORLD_SIZE": str(workers), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29591"}
    started = [
        subprocess.Popen(
            [sys.executable, __file__, "--work", json.dumps(case)],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(workers)
    ]
    told = [json.loads(process.communicate()[0].splitlines()[-1]) for process in started]
    return {name: sum(found[name] for found in told) / workers for name in told[0]}


def row_of(case: dict[str, Any], found: dict[str, float]) -> dict[str, Any]:
    run = run_of(case)
    shape = model_columns(run.model, run.data.seq_len)
    kept = [name for name in shape if name not in NOT_IN_ROWS]
    per_worker = run.system.micro_batch * run.data.seq_len
    return {
        "source": "thriftlm",
        "model": case["name"],
        **{name: shape[name] for name in kept},
        "gpu": "cpu",
        "n_gpus": run.system.n_gpus,
        "strategy": run.system.strategy,
        "micro_batch": run.system.micro_batch,
        "grad_accum": 1,
        "act_ckpt": "none",
        "attention": run.system.attention,
        "precision": run.system.precision,
        "stack": "thriftlm",
        "tokens_per_s_per_gpu": f"{per_worker / found['step']:.5g}",
        "peak_mem_gb": f"{found['peak_mem_gb']:.3f}",
        "peak_bf16_tflops": f"{found['bf16']:.4g}",
        "peak_fp32_tflops": f"{found['fp32']:.4g}",
        "memory_gb_per_s": f"{found['memory']:.4g}",
        "notes": f"{datetime.now(UTC).date()}; {run.system.cpus_per_worker} threads a worker; "
        "tests/benchmarks/own_throughput.py",
    }


def main(target: Path) -> None:
    rows = []
    for case in CASES:
        rows.append(row_of(case, measured(case)))
        print(rows[-1], flush=True)
    with target.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    if sys.argv[1] == "--work":
        work(run_of(json.loads(sys.argv[2])))
    main(Path(sys.argv[1]))
