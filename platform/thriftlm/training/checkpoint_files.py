"""Where checkpoints lie, in a folder or an object store, and what makes one whole.

A checkpoint is a folder `step_00001000`. Its `manifest.json` is written last and lists every other
file with size and checksum: without it, it is no checkpoint. In a folder it appears by a rename
from `step_00001000.partial`, everything on disk. An object store cannot rename: there files are
uploaded under their final names, and the manifest alone decides.
"""

import hashlib
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from pydantic import NonNegativeInt

from thriftlm.spec import InputError, Spec
from thriftlm.training.shard_files import sha256_of, sync, write_synced

MANIFEST = "manifest.json"
FORMAT_VERSION = 2
"""Version 1 had no manifest."""
NAME = re.compile(r"step_\d{8,}")

Location = Path | str
"""A local folder, or the URL of one in an object store."""


class FileEntry(Spec):
    """One file of a checkpoint."""

    size_bytes: NonNegativeInt
    """Its length."""
    sha256: str
    """Hash of its content."""


class Manifest(Spec):
    """All files of a checkpoint but the manifest."""

    version: int = FORMAT_VERSION
    """Version of this layout."""
    files: dict[str, FileEntry]
    """By name."""
    sha256: str = ""
    """Hash of the two above, as `signed` makes it."""

    def signed(self) -> "Manifest":
        """The same with its own hash."""
        return self.model_copy(update={"sha256": digest_of(self)})


def digest_of(manifest: Manifest) -> str:
    """Hash of a manifest's content."""
    text = manifest.model_dump_json(exclude={"sha256"})
    return hashlib.sha256(text.encode()).hexdigest()


class Shelf(Protocol):
    """The checkpoints of one run."""

    def names(self) -> list[str]:
        """Names of the complete ones, oldest first."""

    def address(self, name: str) -> Location:
        """Where one is."""

    def clear(self, name: str) -> None:
        """Remove what a kill left, before `name` is written; the first rank calls it."""

    def begin(self, name: str) -> Path:
        """A folder of this machine to write into; every rank calls it."""

    def send(self, work: Path, name: str, files: Iterable[str]) -> None:
        """Bring this rank's files to where the checkpoint will be."""

    def publish(self, work: Path, name: str, manifest: Manifest) -> None:
        """Make it a checkpoint; the first rank calls it."""

    def release(self, work: Path) -> None:
        """Every rank is done with its folder, whether it went well or not."""

    def discard(self, name: str) -> None:
        """Remove what was written of one that failed; the first rank calls it."""

    def remove(self, name: str) -> None:
        """Remove a complete one: first what makes it one, so that it is never found in pieces."""

    def opened(self, name: str) -> Any:
        """A context with its files in a folder of this machine."""


def step_name(step: int) -> str:
    """Folder name of a checkpoint; names sort as steps do."""
    return f"step_{step:08d}"


def step_of(name: str) -> int:
    """The step in a folder name."""
    return int(name.removeprefix("step_"))


def shelf_at(location: Location) -> Shelf:
    """The checkpoints at a local folder or a URL.

    Raises:
        InputError: no file system of that URL is installed or can be reached.
    """
    if isinstance(location, str) and "://" in location:
        return Store(location)
    return Folder(Path(location))


def split_address(address: Location) -> tuple[Shelf, str]:
    """The shelf and the name of one checkpoint."""
    if isinstance(address, str) and "://" in address:
        base, mark, query = address.partition("?")
        parent, _, name = base.rstrip("/").rpartition("/")
        return Store(f"{parent}{mark}{query}"), name
    path = Path(address)
    return Folder(path.parent), path.name


class Folder:
    """Checkpoints in a folder that all ranks see."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def names(self) -> list[str]:
        """Names of the complete ones, oldest first."""
        found = (path for path in self.path.glob("step_*") if NAME.fullmatch(path.name))
        return sorted((p.name for p in found if (p / MANIFEST).is_file()), key=step_of)

    def address(self, name: str) -> Path:
        """Where one is."""
        return self.path / name

    def clear(self, name: str) -> None:
        """Remove what a kill left, and make room for `name`."""
        for leftover in self.path.glob("step_*.*"):
            shutil.rmtree(leftover)
        self._partial(name).mkdir(parents=True)

    def begin(self, name: str) -> Path:
        """The partial folder, the same for all ranks."""
        return self._partial(name)

    def send(self, work: Path, name: str, files: Iterable[str]) -> None:
        """Put this rank's files on disk: they are in place already."""
        for file in files:
            sync(work / file)

    def publish(self, work: Path, name: str, manifest: Manifest) -> None:
        """Write the manifest, then rename; both on disk when this returns."""
        write_synced(work / MANIFEST, manifest.model_dump_json())
        sync(work)
        if (self.path / name).exists():
            self.remove(name)
        work.rename(self.path / name)
        sync(self.path)

    def release(self, work: Path) -> None:
        """Nothing: the folder was renamed, or `discard` removes it."""

    def discard(self, name: str) -> None:
        """Remove the partial folder."""
        shutil.rmtree(self._partial(name), ignore_errors=True)

    def remove(self, name: str) -> None:
        """Remove one: first its name."""
        path = self.path / name
        shutil.rmtree(path.rename(path.with_suffix(".removed")))

    @contextmanager
    def opened(self, name: str) -> Iterator[Path]:
        """Its folder."""
        yield self.path / name

    def _partial(self, name: str) -> Path:
        return self.path / f"{name}.partial"


class Store:
    """Checkpoints in an object store, or anything that pyarrow or fsspec opens by URL.

    Each rank writes into a temporary folder of its machine and uploads from there.
    """

    def __init__(self, url: str) -> None:
        self.base, mark, query = url.rstrip("/").partition("?")
        self.query = f"{mark}{query}"
        self.files, self.path = file_system(url)

    def names(self) -> list[str]:
        """Names of those with a manifest, oldest first."""
        found = {Path(path).parent.name for path in self._paths() if Path(path).name == MANIFEST}
        return sorted(filter(NAME.fullmatch, found), key=step_of)

    def address(self, name: str) -> str:
        """Its URL."""
        return f"{self.base}/{name}{self.query}"

    def clear(self, name: str) -> None:
        """Remove what has no manifest, and an older one of that name."""
        complete = set(self.names())
        folders = {Path(path).parent.name for path in self._paths()}
        for folder in filter(NAME.fullmatch, folders):
            if folder not in complete or folder == name:
                self.remove(folder)

    def begin(self, name: str) -> Path:
        """A new temporary folder of this rank."""
        return Path(tempfile.mkdtemp(prefix=f"{name}-"))

    def send(self, work: Path, name: str, files: Iterable[str]) -> None:
        """Upload this rank's files."""
        from pyarrow.fs import LocalFileSystem, copy_files

        self.files.create_dir(f"{self.path}/{name}", recursive=True)
        for file in files:
            copy_files(
                str(work / file),
                f"{self.path}/{name}/{file}",
                source_filesystem=LocalFileSystem(),
                destination_filesystem=self.files,
            )

    def publish(self, work: Path, name: str, manifest: Manifest) -> None:
        """Upload the manifest: from then on it is a checkpoint."""
        (work / MANIFEST).write_text(manifest.model_dump_json())
        self.send(work, name, [MANIFEST])

    def release(self, work: Path) -> None:
        """Remove the temporary folder."""
        shutil.rmtree(work, ignore_errors=True)

    def discard(self, name: str) -> None:
        """Nothing: what was uploaded has no manifest, and the next save removes it."""

    def remove(self, name: str) -> None:
        """Remove one: first its manifest."""
        folder = f"{self.path}/{name}"
        if self.files.get_file_info(f"{folder}/{MANIFEST}").is_file:
            self.files.delete_file(f"{folder}/{MANIFEST}")
        self.files.delete_dir(folder)

    @contextmanager
    def opened(self, name: str) -> Iterator[Path]:
        """Its files, downloaded into a temporary folder."""
        from pyarrow.fs import LocalFileSystem, copy_files

        with tempfile.TemporaryDirectory(prefix=f"{name}-") as folder:
            if self.files.get_file_info(f"{self.path}/{name}/{MANIFEST}").is_file:
                copy_files(
                    f"{self.path}/{name}",
                    folder,
                    source_filesystem=self.files,
                    destination_filesystem=LocalFileSystem(),
                )
            yield Path(folder)

    def _paths(self) -> list[str]:
        from pyarrow.fs import FileSelector

        chosen = FileSelector(self.path, recursive=True, allow_not_found=True)
        return [info.path for info in self.files.get_file_info(chosen) if info.is_file]


def file_system(url: str) -> tuple[Any, str]:
    """The file system of a URL, pyarrow's or else fsspec's, and the path there.

    Raises:
        InputError: neither has one.
    """
    import pyarrow as pa
    from fsspec.core import url_to_fs
    from pyarrow.fs import FileSystem, FSSpecHandler, PyFileSystem

    try:
        found, path = FileSystem.from_uri(url)
    except pa.ArrowInvalid:
        try:
            opened, path = url_to_fs(url.partition("?")[0])
        except (ImportError, ValueError) as error:
            raise InputError(f"{url} cannot be opened: {error}") from error
        found = PyFileSystem(FSSpecHandler(opened))
    except OSError as error:
        raise InputError(f"{url} cannot be opened: {error}") from error
    return found, path.rstrip("/")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        ValueError: it is damaged or of another version.
    """
    try:
        manifest = Manifest.model_validate_json((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{MANIFEST} cannot be read") from error
    if manifest.version != FORMAT_VERSION:
        raise ValueError(f"{MANIFEST} has format {manifest.version}, this is {FORMAT_VERSION}")
    if manifest.sha256 != digest_of(manifest):
        raise ValueError(f"{MANIFEST} has another checksum than when it was written")
    return manifest


def entry_of(path: Path) -> FileEntry:
    """Size and checksum of a file as it is."""
    return FileEntry(size_bytes=path.stat().st_size, sha256=sha256_of(path))


def damage(path: Path, entry: FileEntry) -> str | None:
    """How a file differs from its entry, None where it does not."""
    if not path.is_file():
        return f"{path.name} is missing"
    size = path.stat().st_size
    if size != entry.size_bytes:
        return f"{path.name} has {size:,} bytes instead of {entry.size_bytes:,}"
    if sha256_of(path) != entry.sha256:
        return f"{path.name} has another checksum than when it was written"
    return None


def outdated(names: list[str], last: int, every_steps: int | None) -> list[str]:
    """Which of the complete checkpoints, oldest first, need not be kept.

    Kept are the last ones, and the first at or after each multiple of `every_steps`.
    """
    kept = set(names[-last:])
    if every_steps is not None:
        first: dict[int, str] = {}
        for name in names:
            first.setdefault(step_of(name) // every_steps, name)
        kept |= {name for multiple, name in first.items() if multiple > 0}
    return [name for name in names if name not in kept]
