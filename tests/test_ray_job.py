"""`ray job submit` of this checkout, as deploy/README.md shows it, on a cluster of its own."""

import json
import os
import shutil
import signal
import site
import socket
import subprocess
import time
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WHERE = (
    "import ray, thriftlm; ray.init(); "
    "here = lambda: __import__('thriftlm').__file__; "
    "print('FOUND', here(), ray.get(ray.remote(here).remote()))"
)
TINY = [
    "search_budget.trials=2",
    "data={corpus: platform/thriftlm, tokenizer: 'bpe:300', seq_len: 32, validation_fraction: 0.2}",
    "space.model.d_model=32",
    "space.optim.batch_tokens=256",
    "space.system.n_gpus=2",
    "space.system.strategy=ddp",
    "space.system.micro_batch=4",
    "search.fidelity={min_tokens: 512, max_tokens: 4096, validation_tokens: 256}",
]
SEARCH = ["-m", "thriftlm", "search", "search_spaces/quickstart.yaml", "--json"]
SEARCH += [part for setting in TINY for part in ("--set", setting)]
pytestmark = pytest.mark.ray


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """The dependencies without thriftlm, token authentication on, a home of its own."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder / "venv", with_pip=False, symlinks=True)
    (packages,) = (folder / "venv/lib").glob("python*/site-packages")
    (packages / "dependencies.pth").write_text(site.getsitepackages()[0])
    kept = {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "RAY_ADDRESS"}}
    path = f"{folder / 'venv/bin'}{os.pathsep}{os.environ['PATH']}"
    return kept | {"PATH": path, "HOME": str(folder), "RAY_AUTH_MODE": "token"}


@pytest.fixture(scope="module")
def dashboard(environment) -> str:
    """Address of a head node that lives as long as the tests of this file."""
    port, ui = free_port(), free_port()
    # A short folder: the paths of Ray's sockets have at most 107 characters.
    temporary = Path("/tmp") / f"thriftlm-{port}"
    subprocess.run(
        ray("get-auth-token", "--generate"), env=environment, check=True, stdout=subprocess.DEVNULL
    )
    command = ["start", "--head", "--block", f"--port={port}", f"--dashboard-port={ui}"]
    command += ["--num-cpus=2", f"--temp-dir={temporary}"]
    with subprocess.Popen(ray(*command), env=environment, stdout=subprocess.DEVNULL) as head:
        try:
            wait_for(ui, head)
            yield f"http://127.0.0.1:{ui}"
        finally:
            head.send_signal(signal.SIGTERM)
            head.wait(timeout=60)
            shutil.rmtree(temporary, ignore_errors=True)


def ray(*args: str) -> list[str]:
    return ["python", "-m", "ray.scripts.scripts", *args]


def wait_for(port: int, head: subprocess.Popen) -> None:
    for _ in range(600):
        assert head.poll() is None, "ray start ended"
        with socket.socket() as trying:
            if trying.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise AssertionError(f"nothing listens on port {port} after a minute")


def submit(
    environment: dict[str, str], dashboard: str, *entrypoint: str
) -> subprocess.CompletedProcess:
    command = ray("job", "submit", f"--address={dashboard}", "--working-dir=.")
    command += ["--runtime-env=deploy/runtime_env.yaml", "--", "python", *entrypoint]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=400
    )


def test_thriftlm_is_not_installed_there(environment):
    done = subprocess.run(
        ["python", "-c", "import thriftlm"],
        cwd="/",
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "No module named 'thriftlm'" in done.stderr


def test_driver_and_worker_import_the_uploaded_tree(environment, dashboard):
    done = submit(environment, dashboard, "-c", WHERE)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("FOUND")]
    for path in line.split()[1:]:
        assert "/working_dir_files/" in path
        assert path.endswith("platform/thriftlm/__init__.py")


def test_search_runs_in_a_job_and_its_results_outlive_it(environment, dashboard, tmp_path):
    done = submit(environment, dashboard, *SEARCH, "--storage", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"status": "finished"' in done.stdout
    folder = tmp_path / "searches/quickstart"
    found = json.loads((folder / "results.json").read_text())
    assert len(found["trials"]) == 2
    assert found["best"] is not None
    assert (folder / "best.yaml").exists()
    assert (tmp_path / "mlflow.db").exists()


def test_no_placement_group_is_left(environment, dashboard):
    command = ray("list", "placement-groups", f"--address={dashboard}", "--format=json")
    for _ in range(20):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        states = {group["state"] for group in json.loads(done.stdout)}
        if states <= {"REMOVED"}:
            return
        time.sleep(1)
    raise AssertionError(f"placement groups are left after 20 s: {states}")


def test_a_relative_storage_is_refused_in_a_job(environment, dashboard):
    search = ("-m", "thriftlm", "search", "quickstart")
    done = submit(environment, dashboard, *search, "--storage", "here")
    assert done.returncode != 0
    assert "storage must be an absolute path inside a Ray job" in done.stdout
