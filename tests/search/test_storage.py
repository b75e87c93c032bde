"""Where searches live, and the folders that cannot hold them."""

import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from thriftlm.search.history.storage import (
    RAY_JOB_VARIABLE,
    STORAGE_VARIABLE,
    Storage,
    storage,
    writable,
)
from thriftlm.spec import InputError


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    for variable in (STORAGE_VARIABLE, RAY_JOB_VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return tmp_path


def test_option_before_variable_before_home(home, monkeypatch):
    assert storage(None) == Storage(home / "home" / "thriftlm")
    monkeypatch.setenv(STORAGE_VARIABLE, "/from/variable")
    assert storage(None).root == Path("/from/variable")
    assert storage("/from/option").root == Path("/from/option")
    monkeypatch.setenv(STORAGE_VARIABLE, "")  # set and empty is not given; least of all "here"
    assert storage(None).root == home / "home" / "thriftlm"


def test_the_folder_is_absolute_however_it_was_given(home):
    assert storage("runs").root == home / "cwd" / "runs"
    assert storage("../x").root == home / "x"
    assert storage("~/x").root == home / "home" / "x"


def test_what_lies_where(home):
    place = storage("/s")
    assert place.search("a") == Path("/s/searches/a")
    assert (place.data, place.runs) == (Path("/s/data"), Path("/s/runs"))
    assert place.tracking_uri == "sqlite:////s/mlflow.db"


def test_a_relative_folder_is_refused_inside_a_ray_job(home, monkeypatch):
    """Ray deletes the job's working directory when the job ends."""
    monkeypatch.setenv(RAY_JOB_VARIABLE, "{}")
    for given in ("runs", "./runs", "../runs"):
        with pytest.raises(InputError, match="absolute path inside a Ray job, got"):
            storage(given)
    monkeypatch.setenv(STORAGE_VARIABLE, "runs")
    with pytest.raises(InputError, match="pass --storage /an/absolute/path"):
        storage(None)
    assert storage("/shared/x").root == Path("/shared/x")
    assert storage("~/x").root == home / "home" / "x"
    monkeypatch.delenv(STORAGE_VARIABLE)
    assert storage(None).root == home / "home" / "thriftlm"


def test_the_variable_is_the_one_that_ray_gives_to_the_entrypoint_of_a_job():
    from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR

    assert RAY_JOB_CONFIG_JSON_ENV_VAR == RAY_JOB_VARIABLE


def test_a_missing_folder_is_made_and_left_empty(home):
    folder = home / "a" / "b"
    assert writable(folder) == folder
    assert list(folder.iterdir()) == []
    assert writable(folder) == folder


@pytest.mark.parametrize(
    ("parent", "says"), [("file/below", "Not a directory"), ("file", "File exists")]
)
def test_a_folder_that_cannot_be_made_is_refused(home, parent, says):
    (home / "file").write_text("")
    with pytest.raises(InputError, match=rf"cannot be written \({says}\); choose another"):
        writable(home / parent)


def test_a_folder_that_cannot_be_written_is_refused():
    with pytest.raises(InputError, match=r"storage /proc/searches cannot be written"):
        writable(Path("/proc/searches"))


def test_a_disk_that_is_almost_full_is_refused(home, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(1e12, 1e12 - 1e8, 1e8))
    with pytest.raises(InputError, match=r"needs 0\.5 GB and has 0\.10 GB free; make room"):
        writable(home / "full")
