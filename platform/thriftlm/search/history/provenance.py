"""What made the numbers of a search: code, packages, prices."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import thriftlm
from thriftlm import prices

PACKAGES = ("torch", "ray", "deepspeed", "mlflow", "optuna")


def versions() -> dict[str, str]:
    """Versions of packages and Python, git commit, and the snapshot of the prices."""
    return {
        "thriftlm": thriftlm.__version__,
        "python": sys.version.split()[0],
        **{name: version(name) for name in PACKAGES},
        "git_commit": git_commit(),
        "price_snapshot": prices.snapshot_id(),
    }


def git_commit() -> str:
    """Commit of the checkout that this package runs from; empty outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
