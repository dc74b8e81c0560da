"""One training at a time in a folder: a lock that the operating system takes back when its owner ends, however it ends."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from shards.core.errors import UserError
from shards.core.storage import Folder

LOCK = "lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""What file systems answer that have no locks."""
_held: set[Path] = set()
_guard = threading.Lock()


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Holds FOLDER/lock, making the folder if need be. Raises UserError, naming the owner, while another training has it.

    A POSIX record lock belongs to a process, not to a file that is open: forked loader workers that outlive their killed
    parent do not hold it. The file stays; only the lock on it counts, so a file that was left behind stops nobody. NFS,
    Lustre (mounted with `flock`), GPFS and CephFS pass such locks on between nodes. Where a disk has none, that is said.
    """
    path = folder.absolute() / LOCK
    with Folder(folder).explained(LOCK, "write"):
        folder.mkdir(parents=True, exist_ok=True)
    with _guard:
        if path in _held:  # the system would grant it to the same process again
            raise UserError(f"this process trains in {folder} already; choose another --out")
        _held.add(path)
    try:
        with Folder(folder).explained(LOCK, "write"):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            _take(descriptor, folder)
            yield
        finally:
            os.close(descriptor)  # gives the lock back
    finally:
        with _guard:
            _held.discard(path)


def _take(descriptor: int, folder: Path) -> None:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise UserError(
                f"another training works in {folder} ({_owner(descriptor)}): wait for its end, or choose another --out"
            ) from error
        if error.errno not in _NO_LOCKS:
            raise
        print(
            f"note: the disk of {folder} has no file locks ({error.strerror}): see to it that only one training at a time "
            "works there",
            file=sys.stderr,
        )
        return

    owner = {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    with contextlib.suppress(OSError):  # a full disk: this is information only
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(owner).encode(), 0)


def _owner(descriptor: int) -> str:
    try:
        owner = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {owner['process']} on {owner['host']}, since {owner['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "its owner is unknown"
