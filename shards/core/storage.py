"""A folder of files at any fsspec URL, written so that a crash at any instant leaves no half-written file behind."""

import contextlib
import errno
import inspect
import os
import random
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import fsspec
from fsspec.asyn import AsyncFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from shards.core.errors import StoreAway, UserError

WRITING = ".writing"
"""The subfolder for files on their way to their final name."""
CLAIM_S = 30.0
"""How long a claim may stand without its file; see _Claim."""


class Folder:
    """A folder on a local disk or in an object store, addressed by names relative to it.

    On a local disk a file appears under its name only when it is complete and on the disk (temporary name, fsync,
    rename, fsync of the folder); object stores give the same by themselves. Errors of the operating system (disk full,
    read-only, no permission, missing) are raised as UserError sentences.
    """

    def __init__(self, url: str | os.PathLike[str]) -> None:
        self.url = os.fspath(url).rstrip("/") or "/"
        try:
            fs, path = url_to_fs(self.url)
        except (ValueError, ImportError) as error:
            raise UserError(f"cannot open {self.url}: {error}") from error
        self.fs: fsspec.AbstractFileSystem = fs
        self.path: str = path.rstrip("/")
        self.local_path: Path | None = Path(self.path) if isinstance(fs, LocalFileSystem) else None

    def __str__(self) -> str:
        return self.url

    def address(self, name: str) -> str:
        """The full address of `name`, for messages."""
        return f"{self.url}/{name}"

    def _full(self, name: str) -> str:
        return f"{self.path}/{name}"

    @contextlib.contextmanager
    def explained(self, name: str, action: str) -> Iterator[None]:
        """Turns the errors of file systems into sentences."""
        try:
            yield
        except OSError as error:
            kind = StoreAway if _is_away(error, self.local_path is not None) else UserError
            raise kind(_sentence(error, action, self.address(name))) from error
        except _store_errors() as error:
            kind = StoreAway if _is_away(error, self.local_path is not None) else UserError
            raise kind(f"cannot {action} {self.address(name)}: {error}") from error

    def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """The bytes of a file, or of its range start..end (one range read)."""
        with self.explained(name, "read"):
            return bytes(self.fs.cat_file(self._full(name), start=start, end=end))

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[IO[bytes]]:
        """A file opened for reading as a stream."""
        with self.explained(name, "read"), self.fs.open(self._full(name), "rb") as file:
            yield file

    def exists(self, name: str) -> bool:
        with self.explained(name, "look for"):
            return bool(self.fs.exists(self._full(name)))

    def size(self, name: str) -> int:
        with self.explained(name, "read"):
            return int(self.fs.size(self._full(name)))

    def list(self, inside: str = "") -> list[str]:
        """The sorted names directly inside this folder (or inside its subfolder `inside`); [] if it does not exist."""
        with self.explained(inside, "list"):
            try:
                self.fs.invalidate_cache()
                found = self.fs.ls(self._full(inside).rstrip("/"), detail=False)
            except FileNotFoundError:
                return []
        return sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in found)

    def make(self, inside: str = "") -> None:
        """Makes the folder (or its subfolder) if it is not there."""
        with self.explained(inside, "make the folder"):
            self.fs.makedirs(self._full(inside).rstrip("/"), exist_ok=True)

    def write(self, name: str, data: bytes) -> None:
        """Writes a whole file; readers see the old one or the new one, never a part."""
        with self.explained(name, "write"):
            if self.local_path is None:
                self.fs.pipe_file(self._full(name), data)
                return
            target = self.local_path / name
            temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
            try:
                _write_to_disk(temporary, data)
                temporary.replace(target)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
            _sync_folder(target.parent)

    def create(self, name: str, data: bytes) -> bool:
        """Writes a file only if there is none of this name; False if there is. Of several writers exactly one wins.

        On a local disk by a hard link, in stores with conditional writes (S3's If-None-Match) by one of these; elsewhere by
        a claim (below), by which at most one writer wins.
        """
        with self.explained(name, "write"):
            if self.local_path is None:
                if not _puts_conditionally(self.fs):
                    return _Claim(self, name).create(data)
                try:
                    self.fs.pipe_file(self._full(name), data, mode="create")
                except FileExistsError:
                    return False
                return True
            target = self.local_path / name
            temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
            try:
                _write_to_disk(temporary, data)
                os.link(temporary, target)  # fails if the target exists; complete from the first moment
            except FileExistsError:
                return False
            finally:
                temporary.unlink(missing_ok=True)
            _sync_folder(target.parent)
            return True

    def upload(self, source: Path, name: str) -> None:
        """Brings a finished local file (already on the disk) into the folder, under `name`."""
        with self.explained(name, "write"):
            if self.local_path is None:
                self.fs.put_file(str(source), self._full(name))
                source.unlink()
            else:
                source.replace(self.local_path / name)

    def publish(self, source: str, target: str) -> None:
        """Gives the file `source` the name `target`. Calling it again is harmless: a source that is gone was published."""
        with self.explained(target, "write"):
            try:
                if self.local_path is None:
                    self.fs.copy(self._full(source), self._full(target))
                else:
                    (self.local_path / source).replace(self.local_path / target)
                    _sync_folder((self.local_path / target).parent)
            except FileNotFoundError:
                if not self.fs.exists(self._full(target)):
                    raise

    def remove(self, name: str) -> None:
        """Removes a file or a folder with all that is in it; nothing happens if it is not there."""
        with self.explained(name, "remove"), contextlib.suppress(FileNotFoundError):
            self.fs.rm(self._full(name), recursive=True)

    def sweep(self) -> None:
        """Removes what killed writers left behind. Only for a folder to which nobody writes any more."""
        self.remove(WRITING)
        for name in self.list():
            if name.startswith(".") and name.endswith(".tmp"):
                self.remove(name)


class _Claim:
    """Exclusive creation in a store that has plain reads and writes only, if readers see what was written before.

    A writer puts its token into one file, looks for a second, writes that, and wins if the first still holds its token.
    However the steps of several writers mix, at most one wins; it may be that none does. A claim that stands without its
    file for CLAIM_S is that of a writer which died, or of several which stopped each other, and is cleared. This is where
    the guarantee ends: a writer that sleeps for longer between two of its steps may then be a second winner.
    """

    def __init__(self, folder: Folder, name: str) -> None:
        self._folder, self._name = folder, name
        stem = name.rsplit("/", 1)[-1]
        self._holder, self._taken = f"{WRITING}/{stem}.claim", f"{WRITING}/{stem}.claimed"

    def create(self, data: bytes) -> bool:
        folder, begin = self._folder, time.monotonic()
        folder.make(WRITING)
        while not self._exists(self._name):
            if self._won():
                if self._exists(self._name):
                    break
                folder.write(self._name, data)
                self._clear()
                return True
            if time.monotonic() - begin > CLAIM_S:
                self._clear()
                begin = time.monotonic()
            time.sleep(random.uniform(0.2, 1.0) * CLAIM_S / 30)
        return False

    def _won(self) -> bool:
        token = uuid.uuid4().hex.encode()
        if self._exists(self._taken):
            return False
        self._folder.write(self._holder, token)
        if self._exists(self._taken):
            return False
        self._folder.write(self._taken, token)
        try:
            return self._folder.read(self._holder) == token
        except UserError:
            return False

    def _exists(self, name: str) -> bool:
        self._folder.fs.invalidate_cache()  # what others wrote since the last listing counts
        return self._folder.exists(name)

    def _clear(self) -> None:
        self._folder.remove(self._taken)
        self._folder.remove(self._holder)


def _puts_conditionally(fs: fsspec.AbstractFileSystem) -> bool:
    """Whether a store's own code writes a file only if there is none; fsspec's general one looks first, and then writes."""
    for name in ("_pipe_file", "pipe_file"):
        method = getattr(type(fs), name, None)
        general = (getattr(fsspec.AbstractFileSystem, name, None), getattr(AsyncFileSystem, name, None))
        if method is not None and method not in general and "mode" in inspect.signature(method).parameters:
            return True
    return False


def _write_to_disk(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    """Makes renames inside a local folder survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _store_errors() -> tuple[type[Exception], ...]:
    """What object stores raise beside OSError: no credentials, no connection, too many retries."""
    botocore = sys.modules.get("botocore.exceptions")  # there only if an S3 address was opened
    aiohttp = sys.modules.get("aiohttp")  # likewise, of most stores
    of_s3 = (botocore.BotoCoreError, botocore.ClientError) if botocore else ()
    return (*of_s3, aiohttp.ClientError) if aiohttp else of_s3


_AWAY = frozenset(
    {
        errno.ESTALE,
        errno.ENOTCONN,
        errno.ETIMEDOUT,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.EREMOTEIO,
        errno.EBUSY,
        errno.EAGAIN,
    }
)
"""Errors of a network disk, or of a store, that pass."""


def _is_away(error: Exception, is_local: bool) -> bool:
    """Whether waiting may help: not where a file is missing, or access is refused."""
    botocore, aiohttp = sys.modules.get("botocore.exceptions"), sys.modules.get("aiohttp")
    if botocore and isinstance(error, botocore.ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return bool(status >= 500 or status == 429)
    if botocore and isinstance(error, botocore.BotoCoreError):
        return isinstance(error, (botocore.ConnectionError, botocore.HTTPClientError))
    if aiohttp and isinstance(error, aiohttp.ClientError):
        status = getattr(error, "status", 599)
        return bool(status >= 500 or status == 429)
    if isinstance(error, (ConnectionError, TimeoutError)):
        return True
    if not isinstance(error, OSError) or isinstance(error, (FileNotFoundError, PermissionError)):
        return False
    return error.errno in _AWAY or (not is_local and error.errno in (None, errno.EIO))


def _sentence(error: OSError, action: str, address: str) -> str:
    advice: dict[int, Any] = {
        errno.ENOSPC: "the disk is full; free some space and run the same command again",
        errno.EDQUOT: "the disk quota is used up; free some space and run the same command again",
        errno.EFBIG: "the file would be larger than this file system or process allows",
        errno.EROFS: "the file system is read-only; choose another place",
        errno.EACCES: "permission denied; check who owns the folder, or choose another place",
        errno.EPERM: "not permitted; check who owns the folder, or choose another place",
        errno.ENOENT: "there is no such file",
        errno.ENOTDIR: "a part of this address is a file, not a folder",
        errno.EISDIR: "this is a folder, not a file",
    }
    if isinstance(error, FileNotFoundError):
        reason = advice[errno.ENOENT]
    else:
        reason = advice.get(error.errno or 0, str(error) or type(error).__name__)
    return f"cannot {action} {address}: {reason}"
