"""Files below a folder of a disk or an object store: atomic, checked by sha256, tried again.

On a disk everything is on the platter before its name changes.  On an object store, which knows
no renaming, a folder is put beside the old one first.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import pyarrow as pa
from pyarrow import fs

from sft_ray.errors import ConfigError, ResourceError
from sft_ray.location import refuse_credentials, refuse_lost_slashes
from sft_ray.retries import retried

CHECKSUMS = "checksums.json"  # of a finished run, and of every folder that is written as a whole
GOOD = ".good"  # ends the name of a last-good copy
NEXT = ".next"  # ends the name of a folder that is to replace another one
CHUNK_BYTES = 1 << 20  # of a file that is hashed
Found = TypeVar("Found")


class FileStore:
    """A folder below a storage location; names are relative to it.

    Args:
        storage: a folder, or a URI that pyarrow understands (`s3://…`, `gs://…`).
        name: the folder's name.

    Attributes:
        location: where a user finds it, and what opens it again.

    Raises:
        ResourceError: the storage cannot be opened, or its URI holds credentials.
    """

    def __init__(self, storage: str, name: str) -> None:
        self.storage, self.name = storage, name
        try:
            refuse_lost_slashes(storage)
        except ValueError as error:
            raise ResourceError(f"storage: {error}") from None
        if "://" in storage:
            try:
                refuse_credentials(storage)
                opened = retried(storage, lambda: fs.FileSystem.from_uri(storage))
            except (pa.ArrowException, ValueError) as error:
                raise ResourceError(f"storage: cannot be opened: {error}") from None
            filesystem, base = opened
            if not base:
                raise ResourceError(f"storage: a URI names a bucket, got {storage!r}")
            self.local_root: Path | None = None
            place, mark, options = storage.partition("?")
            self._place, self._options = f"{place.rstrip('/')}/{name}", mark + options
        else:
            filesystem, base = fs.LocalFileSystem(), str(Path(storage).absolute())
            self.local_root = Path(base) / name
            self._place, self._options = str(Path(storage) / name), ""
        self.location = self._place + self._options
        self._filesystem = fs.SubTreeFileSystem(f"{base}/{name}", filesystem)
        self._parent = fs.SubTreeFileSystem(base, filesystem)
        self._has_folders = filesystem.type_name == "local"  # object stores have names only

    def path_of(self, path: str) -> str:
        """Where a user finds a file."""
        return f"{self._place}/{path}{self._options}"

    def _try(self, operation: Callable[[], Found]) -> Found:
        return operation() if self._has_folders else retried(self._place, operation)

    def exists(self, path: str) -> bool:
        found = self._try(lambda: self._filesystem.get_file_info(path))
        return bool(found.type != fs.FileType.NotFound)

    def modified(self, path: str) -> datetime | None:
        """When a file was written last; None if it does not exist."""
        found: datetime | None = self._try(lambda: self._filesystem.get_file_info(path)).mtime
        return found

    def files_below(self, folder: str) -> list[str]:
        """Every file below a folder, sorted; none if there is no such folder."""
        selector = fs.FileSelector(folder, allow_not_found=True, recursive=True)
        found = self._try(lambda: self._filesystem.get_file_info(selector))
        return sorted(info.path for info in found if info.type == fs.FileType.File)

    def folders_below(self, folder: str) -> set[str]:
        """Every folder below a folder that has files of its own."""
        return {path.rpartition("/")[0] for path in self.files_below(folder)}

    # -- reading -----------------------------------------------------------------------------

    def read_bytes(self, path: str) -> bytes | None:
        """The content of a file, None if it does not exist."""

        def read() -> bytes:
            with self._filesystem.open_input_stream(path, compression=None) as stream:
                return bytes(stream.read())

        try:
            return self._try(read)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def read_text(self, path: str) -> str | None:
        """The text of a file, None if it does not exist.

        Raises:
            ConfigError: the file is damaged.
        """
        content = self.read_bytes(path)
        try:
            return None if content is None else content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{self.path_of(path)}: damaged, no UTF-8: {error}") from None

    def read_json(self, path: str) -> Any:
        """The value of a JSON file, None if it does not exist.

        Raises:
            ConfigError: the file is damaged.
        """
        text = self.read_text(path)
        try:
            return None if text is None else json.loads(text)
        except (ValueError, RecursionError) as error:  # a number of 5,000 digits, for one
            raise ConfigError(f"{self.path_of(path)}: damaged JSON: {error}") from None

    def sha256(self, path: str) -> str:
        """Of a file's content, which is never held as a whole."""

        def read() -> str:
            digest = hashlib.sha256()
            # A name that ends in .gz must not make pyarrow unpack it.
            with self._filesystem.open_input_stream(path, compression=None) as stream:
                while chunk := stream.read(CHUNK_BYTES):
                    digest.update(chunk)
            return digest.hexdigest()

        return self._try(read)

    # -- writing one file --------------------------------------------------------------------

    def write_text(self, path: str, text: str, *, waits: bool = True) -> None:
        """Replace a file as a whole: a reader sees the old text or the new one.

        Args:
            waits: for the disk, so that not even a lost machine loses it.
        """
        self.write_bytes(path, text.encode("utf-8"), waits=waits)

    def write_json(self, path: str, value: Any) -> None:
        self.write_text(path, json_text(value))

    def write_bytes(self, path: str, content: bytes, *, waits: bool = True) -> None:
        """Replace a file as a whole, on disk before its name changes."""
        if self.local_root is None:  # an object appears when its upload is complete
            self._make_folder(str(PurePosixPath(path).parent))

            def write() -> None:
                with self._filesystem.open_output_stream(path, compression=None) as stream:
                    stream.write(content)

            self._try(write)
            return
        target = self.local_root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
        try:
            with unfinished.open("wb") as file:
                file.write(content)
                file.flush()
                if waits:
                    os.fsync(file.fileno())
            unfinished.replace(target)
            if waits:
                sync(target.parent)
        finally:
            unfinished.unlink(missing_ok=True)

    def write_good(self, path: str, content: bytes) -> None:
        """Keep a copy of a file that tells whether it is whole: its sha256 is the first line."""
        digest = hashlib.sha256(content).hexdigest()
        self.write_bytes(f"{path}{GOOD}", f"sha256 {digest}\n".encode() + content)

    def read_good(self, path: str) -> bytes | None:
        """The last-good copy of a file; None if there is none, or it is damaged itself."""
        head, _, content = (self.read_bytes(f"{path}{GOOD}") or b"").partition(b"\n")
        digest = hashlib.sha256(content).hexdigest()
        return content if head == f"sha256 {digest}".encode() else None

    def append_text(self, path: str, text: str) -> None:
        """Add lines to a text file; on object stores the whole file is written again.

        A last line that was torn by a kill stays by itself.
        """
        if self.local_root is None:
            old = self.read_bytes(path) or b""
            between = b"\n" if old and not old.endswith(b"\n") else b""
            self.write_bytes(path, old + between + text.encode("utf-8"))
            return
        target = self.local_root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    text = f"\n{text}"
            file.write(text.encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())

    def _make_folder(self, path: str) -> None:
        """Make room for files at a URI of a disk."""
        if self._has_folders:
            self._filesystem.create_dir(path)

    # -- whole folders -----------------------------------------------------------------------

    @contextmanager
    def replacing_folder(self, path: str) -> Iterator[Path]:
        """A local folder to fill, put in place of `path` at the end with its checksums.

        A kill between any two steps leaves the old folder or the new one; `restore_folder` puts
        it where it belongs.
        """
        if self.local_root is None:
            with tempfile.TemporaryDirectory(prefix="sft_ray-") as local:
                yield Path(local)
                self.put_folder(Path(local), path)
            return
        target = self.local_root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        suffix = uuid.uuid4().hex
        unfinished = target.with_name(f".{target.name}.{suffix}")
        outdated = target.with_name(f".{target.name}.{suffix}.old")
        unfinished.mkdir()
        try:
            yield unfinished
            with ThreadPoolExecutor(max_workers=1) as beside:  # the disk has its own time
                synced = beside.map(sync, list(unfinished.rglob("*")))
                _write_checksums(unfinished)
                list(synced)  # raises what went wrong
            sync(unfinished / CHECKSUMS)
            sync(unfinished)
            if target.exists():
                target.rename(outdated)
            unfinished.rename(target)
            sync(target.parent)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
            shutil.rmtree(outdated, ignore_errors=True)

    def put_folder(self, local: Path, path: str) -> None:
        """Upload a folder in place of `path`: beside it first, then over it within the store."""
        _write_checksums(local)
        self.delete_folder(f"{path}{NEXT}")
        files = [str(f.relative_to(local)) for f in sorted(local.rglob("*")) if f.is_file()]
        for file in _checksums_last(files):
            target = f"{path}{NEXT}/{file}"
            self._make_folder(str(PurePosixPath(target).parent))
            self._try(
                lambda file=file, target=target: fs.copy_files(  # type: ignore[misc]
                    str(local / file), target, destination_filesystem=self._filesystem
                )
            )
        self._put_next_in_place(path)

    def _put_next_in_place(self, path: str) -> None:
        self.delete_folder(path)
        self._copy_within(self._filesystem, f"{path}{NEXT}", path)
        self.delete_folder(f"{path}{NEXT}")

    def _copy_within(self, filesystem: Any, source: str, target: str) -> None:
        """Copy a folder inside the store, its checksums last."""
        selector = fs.FileSelector(source, recursive=True)
        infos = self._try(lambda: filesystem.get_file_info(selector))
        files = [info.path for info in infos if info.type == fs.FileType.File]
        for file in _checksums_last(files):
            to = f"{target}{file.removeprefix(source)}"
            if self._has_folders:
                filesystem.create_dir(str(PurePosixPath(to).parent))
            self._try(lambda file=file, to=to: filesystem.copy_file(file, to))  # type: ignore[misc]

    def restore_folder(self, path: str) -> None:
        """Finish or undo what `replacing_folder` was killed in."""
        if self.local_root is None:
            if self.is_intact(f"{path}{NEXT}"):
                self._put_next_in_place(path)
            else:
                self.delete_folder(f"{path}{NEXT}")
            return
        target = self.local_root / path
        if target.exists():
            return
        for outdated in sorted(target.parent.glob(f".{target.name}.*.old")):
            outdated.rename(target)
            return

    def is_intact(self, folder: str) -> bool:
        """Whether a folder holds every file it was written with, byte by byte."""
        try:
            listed = self.read_json(f"{folder}/{CHECKSUMS}")["sha256"]
            return all(self.sha256(f"{folder}/{file}") == listed[file] for file in listed)
        except (ConfigError, TypeError, KeyError, FileNotFoundError):
            return False

    def fetch_folder(self, path: str, local: Path) -> None:
        """Copy a folder into a local one."""
        for file in self.files_below(path):
            target = local / file.removeprefix(f"{path}/")
            target.parent.mkdir(parents=True, exist_ok=True)
            self._try(
                lambda file=file, target=target: fs.copy_files(  # type: ignore[misc]
                    file, str(target), source_filesystem=self._filesystem
                )
            )

    @contextmanager
    def fetched_folder(self, path: str) -> Iterator[Path]:
        """A folder as a local one, for reading."""
        if self.local_root is not None:
            yield self.local_root / path
            return
        with tempfile.TemporaryDirectory(prefix="sft_ray-") as local:
            self.fetch_folder(path, Path(local))
            yield Path(local)

    def delete_folder(self, path: str) -> None:
        if self.exists(path):
            self._try(lambda: self._filesystem.delete_dir(path))

    def delete_file(self, path: str) -> None:
        if self.exists(path):
            self._try(lambda: self._filesystem.delete_file(path))

    # -- the store itself --------------------------------------------------------------------

    def is_there(self) -> bool:
        found = self._try(lambda: self._parent.get_file_info(self.name))
        return bool(found.type != fs.FileType.NotFound)

    def delete(self) -> None:
        """Remove the whole folder."""
        if self.is_there():
            self._try(lambda: self._parent.delete_dir(self.name))

    def rename(self, name: str) -> None:
        """Give the folder another name; an object store copies it."""
        if self._has_folders:
            self._parent.move(self.name, name)
        else:
            self._copy_within(self._parent, self.name, name)
            self.delete()


def json_text(value: Any) -> str:
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def sync(path: Path) -> None:
    """Have a file or the names in a folder on disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _write_checksums(folder: Path) -> None:
    digests = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and name != CHECKSUMS:
            with path.open("rb") as file:
                digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    (folder / CHECKSUMS).write_text(json_text({"sha256": digests}), encoding="utf-8")


def _checksums_last(files: list[str]) -> list[str]:
    """Whoever finds the checksums finds everything."""
    return sorted(files, key=lambda file: (PurePosixPath(file).name == CHECKSUMS, file))
