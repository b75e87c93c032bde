"""`make gpu-check` over tiny shapes on the CPU, without Ray and MLflow, and without CUDA."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent.parent
WITHOUT_RAY = """
import runpy, sys

class Blocked:
    def find_spec(self, name, *more):
        if name.partition(".")[0] in {"ray", "mlflow"}:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
runpy.run_module("tests.gpu.check", run_name="__main__", alter_sys=True)
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT_RAY, *arguments]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has one")
def test_without_cuda_it_says_so_and_exits_2(tmp_path):
    done = run("--out", str(tmp_path))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("gpu-check needs a CUDA device and this machine has none")
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_make_gpu_check_is_that_script():
    shown = subprocess.run(
        ["make", "--no-print-directory", "--dry-run", "gpu-check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.splitlines()[-1].endswith("python -m tests.gpu.check")


def test_all_of_it_runs_on_the_cpu_without_ray_and_mlflow(tmp_path):
    done = run("--device", "cpu", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu_check_cpu.json").read_text())
    ran = {(c["check"], c["case"]) for c in found["checks"] if c["status"] == "right"}
    kernels = {name for name, _ in ran} - {"strategy", "loss, fp32 on the CPU"}
    assert kernels == {"math", "flash"}
    strategies = {case for name, case in ran if name == "strategy"}
    assert {"ddp", "fsdp_full", "fsdp_grad_op", "zero1", "zero2", "zero3"} <= strategies
    (bf16,) = [c for c in found["checks"] if c["case"] == "bf16, flash"]
    assert 0 < bf16["difference"] <= bf16["limit"]  # it is another arithmetic, so it differs
    assert {p["status"] for p in found["points"]} == {"measured"}
    assert all(p["tokens_per_s"] > 0 and p["peak_mem_gb"] > 0 for p in found["points"])
    page = (tmp_path / "gpu_check_cpu.md").read_text()
    assert "| tiny | flash | yes |" in page
