"""What all tests share: the checkout on the path, installed or not, and the command line."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "platform"), str(ROOT / "models")])


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the groups in its own
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Among several processes a file's tests stay together, and all that start Ray do."""
    for item in items:
        group = "ray" if item.get_closest_marker("ray") else item.nodeid.partition("::")[0]
        item.add_marker(pytest.mark.xdist_group(group))


def call(
    *arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command, run in this process."""
    from thriftlm import cli

    monkeypatch.setattr(sys, "argv", ["thriftlm", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out, said.err


@pytest.fixture
def thriftlm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    monkeypatch.setenv("THRIFTLM_STORAGE", str(tmp_path / "storage"))
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: call(*arguments, monkeypatch=monkeypatch, capsys=capsys)
