"""Where searches live: one absolute folder that every node sees.

STORAGE/data/             token shards, shared by all searches
STORAGE/searches/NAME/    journal.jsonl, best.yaml, results.json, pictures, checkpoints
STORAGE/mlflow.db         tracking, unless --tracking-uri says otherwise
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from thriftlm.spec import InputError

STORAGE_VARIABLE = "THRIFTLM_STORAGE"
RAY_JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Ray's job supervisor gives it to the entrypoint of a submitted job, and to nothing else."""
MINIMUM_FREE_BYTES = 500_000_000
"""Room for shards, checkpoints and Ray's files of a small search."""


@dataclass(frozen=True)
class Storage:
    """Paths under one storage folder."""

    root: Path

    @property
    def data(self) -> Path:
        """Token shards."""
        return self.root / "data"

    @property
    def runs(self) -> Path:
        """Single runs of `thriftlm train`."""
        return self.root / "runs"

    def search(self, name: str) -> Path:
        """Folder of the search with that name."""
        return self.root / "searches" / name

    @property
    def tracking_uri(self) -> str:
        """The embedded MLflow store."""
        return f"sqlite:///{self.root / 'mlflow.db'}"


def storage(path: str | None) -> Storage:
    """The storage at `path`, else at $THRIFTLM_STORAGE, else `thriftlm` in the user's home.

    Raises:
        InputError: a relative path inside a Ray job, whose folder Ray deletes when the job ends.
    """
    given = path or os.environ.get(STORAGE_VARIABLE)
    if not given:
        return Storage(Path.home() / "thriftlm")
    root = Path(given).expanduser()
    if not root.is_absolute() and RAY_JOB_VARIABLE in os.environ:
        raise InputError(
            f"storage must be an absolute path inside a Ray job, got '{given}': Ray deletes the "
            "job's folder, and the results with it; pass --storage /an/absolute/path"
        )
    return Storage(root.resolve())


def writable(folder: Path) -> Path:
    """The folder, made if it is missing.

    Raises:
        InputError: it cannot be made or written, or its disk is almost full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink(missing_ok=True)  # another search may try at the same moment
    except OSError as error:
        raise InputError(
            f"storage {folder} cannot be written ({error.strerror}); choose another with --storage"
        ) from error
    free = shutil.disk_usage(folder).free
    if free < MINIMUM_FREE_BYTES:
        raise InputError(
            f"storage {folder} needs {MINIMUM_FREE_BYTES / 1e9:.1f} GB and has {free / 1e9:.2f} GB "
            "free; make room or choose another with --storage"
        )
    return folder
