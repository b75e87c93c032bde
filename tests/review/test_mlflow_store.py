"""A tracking server that cannot be used is bad input, at once and in one message."""

import socket
import time
from pathlib import Path

import pytest

from thriftlm.review.mlflow_store import connect
from thriftlm.review.tracking import MlflowWriter
from thriftlm.spec import InputError


def test_a_refused_port_is_bad_input(port: int) -> None:
    with pytest.raises(InputError, match=rf"127\.0\.0\.1:{port} cannot be used.*--tracking-uri"):
        MlflowWriter(f"http://127.0.0.1:{port}", "toy", lambda event: None)


def test_a_server_that_hangs_is_bad_input() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        port = silent.getsockname()[1]
        began = time.perf_counter()
        with pytest.raises(InputError, match=r"no answer within 0\.2 s"):
            connect(f"http://me:secret@127.0.0.1:{port}", timeout_seconds=0.2)
        assert time.perf_counter() - began < 3


def test_messages_hide_passwords(port: int) -> None:
    with pytest.raises(InputError) as caught:
        MlflowWriter(f"http://me:secret@127.0.0.1:{port}", "toy", lambda event: None)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("uri", ["htp://nowhere", "sqlite:////proc/nowhere/mlflow.db"])
def test_an_unusable_uri_is_bad_input(uri: str) -> None:
    with pytest.raises(InputError, match="cannot be used"):
        MlflowWriter(uri, "toy", lambda event: None)


def test_nothing_is_printed(first_use: tuple[Path, str]) -> None:
    """MLflow's migrations and run links would land between the lines of the search."""
    path, printed = first_use
    assert path.exists()
    assert printed == ""
