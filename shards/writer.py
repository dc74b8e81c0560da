"""Writes one shard, and commits it so that of several writers exactly one wins, and a crash at any instant heals.

The tar, the failures and the mark are written in full, and synced, and then committed together (shards.commit), the mark
last. A shard that is to be replaced goes the same way.
"""

import contextlib
import hashlib
import json
import os
import tempfile
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from shards.commit import Commit
from shards.core.storage import WRITING, Folder
from shards.marks import VERSION, MarkError, seal, shard_name, unseal
from shards.sample import SampleError
from shards.tar import TarWriter

_SUFFIXES = ("tar", "failed.jsonl", "json")  # in the order of publication: the mark is last
STAGES = ("read", "decode", "estimate", "encode")


class ShardWriter:
    """One attempt at one shard. Use as a context manager: leaving it without commit() removes what was written.

    folder: the dataset. index: the shard's number. members: what every sample must have, in order.
    made: what the shard was made from and with; kept in its mark.
    replaces: the checksum of the committed mark that this shard is to replace; None for a new shard.
    check: called when the commit is won; what it raises gives the commit up.
    """

    def __init__(
        self,
        folder: Folder,
        index: int,
        *,
        members: Iterable[str],
        made: Mapping[str, Any],
        replaces: str | None = None,
        check: Callable[[], object] = lambda: None,
    ) -> None:
        self._folder, self._name, self._made, self._replaces = folder, shard_name(index), dict(made), replaces
        self._members, self._check = list(members), check
        self._token = uuid.uuid4().hex
        self._failed: Counter[str] = Counter()
        self._failed_sha256 = hashlib.sha256()
        self._handed_over = False  # once true, the files belong to the dataset: recover() finishes what we do not
        if folder.local_path is None:
            self._scratch = Path(tempfile.mkdtemp(prefix="ildm-shard-"))
        else:
            folder.make(WRITING)
            self._scratch = folder.local_path / WRITING
        with self._explained():
            self._tar_file: IO[bytes] = self._path("tar").open("xb")
            self._failed_file: IO[bytes] = self._path("failed.jsonl").open("xb")
        self._tar = TarWriter(self._tar_file)

    def _path(self, suffix: str) -> Path:
        return self._scratch / f"{self._name}.{self._token}.{suffix}"

    def _explained(self) -> contextlib.AbstractContextManager[None]:
        return self._folder.explained(f"{self._name}.tar", "write")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def __contains__(self, key: str) -> bool:
        return key in self._tar.index

    def add(self, key: str, members: Mapping[str, bytes]) -> None:
        """Appends a sample. Raises SampleError for an illegal or doubled key, or if a member is missing or unknown."""
        if set(members) != set(self._members):
            raise SampleError(
                f"sample {key} has the members {sorted(members)}; this dataset has {sorted(self._members)}"
            )
        with self._explained():
            self._tar.add(key, {name: members[name] for name in self._members})

    def fail(self, key: str, stage: str, reason: str, message: str) -> None:
        """Records an input sample that is not in the tar. stage: read, decode, estimate or encode; reason: a slug."""
        if stage not in STAGES:
            raise ValueError(f"{stage!r} is not one of {STAGES}")
        line = {"key": key, "stage": stage, "reason": reason, "message": message}
        data = (json.dumps(line) + "\n").encode()
        with self._explained():
            self._failed_file.write(data)
        self._failed_sha256.update(data)
        self._failed[reason] += 1

    def commit(self, timings: Mapping[str, float]) -> dict[str, Any]:
        """Makes the shard appear, whole, under its final names; returns its mark (another writer's, if that one won)."""
        tar_sha256, failures = self._finish_files()
        ok, failed = len(self._tar.index), sum(self._failed.values())
        mark = seal(
            {
                "version": VERSION,
                "shard": self._name,
                "counts": {"in": ok + failed, "ok": ok, "failed": dict(self._failed)},
                "tar": {"sha256": tar_sha256, "size": self._tar.size},
                "failures": failures,
                "index": self._tar.index,
                "made": self._made,
                "timings": dict(timings),
            }
        )
        with self._explained(), self._path("json").open("xb") as file:
            file.write(mark)
            file.flush()
            os.fsync(file.fileno())
        if self._folder.local_path is None:
            for suffix in _SUFFIXES:
                self._folder.upload(self._path(suffix), f"{WRITING}/{self._path(suffix).name}")
        _commit(self._folder, self._name).attempt(self._token, self._replaces, check=self._check, won=self._hand_over)
        self.abort()
        return read_mark(self._folder, self._name)

    def _hand_over(self) -> None:
        self._handed_over = True

    def _finish_files(self) -> tuple[str, dict[str, Any]]:
        """Brings both files to the disk; returns the tar's sha256, and the sha256 and size of the failures."""
        with self._explained():
            tar_sha256 = self._tar.finish()
            for file in (self._tar_file, self._failed_file):
                file.flush()
                os.fsync(file.fileno())
                file.close()
            size = self._path("failed.jsonl").stat().st_size
        return tar_sha256, {"sha256": self._failed_sha256.hexdigest(), "size": size}

    def abort(self) -> None:
        """Removes whatever this writer left in .writing; harmless after commit()."""
        for file in (self._tar_file, self._failed_file):
            with contextlib.suppress(OSError):
                file.close()
        for suffix in _SUFFIXES if not self._handed_over else ():
            self._path(suffix).unlink(missing_ok=True)
            if self._folder.local_path is None:
                self._folder.remove(f"{WRITING}/{self._path(suffix).name}")
        if self._folder.local_path is None:
            with contextlib.suppress(OSError):
                self._scratch.rmdir()


def committed_mark(folder: Folder, name: str) -> dict[str, Any] | None:
    """The shard's mark; None if it is not committed."""
    return read_mark(folder, name) if folder.exists(f"{name}.json") else None


def _committed(folder: Folder, name: str) -> str | None:
    """The checksum of the shard's mark; None if it has none."""
    mark = committed_mark(folder, name)
    return None if mark is None else str(mark["checksum"])


def _commit(folder: Folder, name: str) -> Commit:
    return Commit(folder, name, _SUFFIXES, lambda: _committed(folder, name))


def recover(folder: Folder, name: str) -> None:
    """Finishes the commit of a writer that died after it had won; does nothing if there is none."""
    _commit(folder, name).recover()


def read_mark(folder: Folder, name: str) -> dict[str, Any]:
    """The commit mark of a shard. Raises MarkError when it is damaged."""
    mark = unseal(folder.read(f"{name}.json"), folder.address(f"{name}.json"))
    if mark.get("shard") != name:
        raise MarkError(f"{folder.address(name)}.json belongs to shard {mark.get('shard')!r}; a file was misplaced")
    return mark
