"""An MLflow database that is migrated once, and a port on which nothing listens."""

import socket
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def first_use(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A database that a writer made in a folder that was missing, and all that it printed."""
    path = tmp_path_factory.mktemp("empty") / "deep" / "er" / "mlflow.db"
    code = (
        "import sys; from thriftlm.review.tracking import MlflowWriter;"
        "MlflowWriter(sys.argv[1], 'toy', print).close()"
    )
    command = [sys.executable, "-c", code, f"sqlite:///{path}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return path, done.stdout + done.stderr


@pytest.fixture(scope="session")
def migrated(first_use: tuple[Path, str]) -> bytes:
    """An empty MLflow database without experiments: its migrations take seconds, once is enough."""
    path = first_use[0].with_name("copy.db")
    with closing(sqlite3.connect(first_use[0])) as source, closing(sqlite3.connect(path)) as copy:
        source.backup(copy)
        copy.execute("delete from experiments where name = 'thriftlm'")
        copy.commit()
    return path.read_bytes()


@pytest.fixture
def uri(tmp_path: Path, migrated: bytes) -> str:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "mlflow.db").write_bytes(migrated)
    return f"sqlite:///{tmp_path / 'store' / 'mlflow.db'}"


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
