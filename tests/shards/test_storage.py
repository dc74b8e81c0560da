"""Folders: complete files or none, exclusive creation, and errors of the operating system as sentences."""

import errno
import os
import threading
from pathlib import Path
from typing import ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from shards.core import storage
from shards.core.errors import UserError
from shards.core.storage import WRITING, Folder


def test_of_many_writers_that_create_one_name_exactly_one_wins(tmp_path: Path) -> None:
    folder, wins = Folder(tmp_path), []
    barrier = threading.Barrier(8)

    def create(text: bytes) -> None:
        barrier.wait()
        if folder.create("name", text):
            wins.append(text)

    threads = [threading.Thread(target=create, args=(str(i).encode(),)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wins) == 1 and folder.read("name") == wins[0] and folder.list() == ["name"]


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Folder(tmp_path)
    folder.write("a", b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        UserError, match=r"cannot write .*/a: the disk is full; free some space and run the same command"
    ):
        folder.write("a", b"new")
    assert folder.read("a") == b"old" and folder.list() == ["a"]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.EROFS, "read-only"),
        (errno.EACCES, "permission denied"),
        (errno.EDQUOT, "quota"),
        (errno.EIO, "Input/output"),
    ],
)
def test_errors_of_the_disk_are_sentences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, words: str
) -> None:
    folder = Folder(tmp_path)

    def broken(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(UserError, match=words):
        folder.create("a", b"")


def test_a_missing_file_a_file_as_folder_and_an_unknown_scheme_are_sentences(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    with pytest.raises(UserError, match="there is no such file"):
        folder.read("no")
    folder.write("file", b"")
    with pytest.raises(UserError, match=r"a part of this address is a file|File exists|exists"):
        Folder(tmp_path / "file").make("sub")
    with pytest.raises(UserError, match="cannot open nonsense://x"):
        Folder("nonsense://x")


def test_listing_reading_ranges_and_sweeping(tmp_path: Path) -> None:
    for folder in (Folder(tmp_path / "a"), Folder(f"memory://{tmp_path}")):
        assert folder.list() == []
        folder.make(WRITING)
        folder.write("b.json", b"0123456789")
        folder.write(f"{WRITING}/x", b"")
        folder.write(".b.json.123.tmp", b"")
        assert folder.read("b.json", 2, 5) == b"234" and folder.size("b.json") == 10
        with folder.open("b.json") as file:
            assert file.read() == b"0123456789"
        folder.sweep()
        assert folder.list() == ["b.json"] and folder.exists("b.json") and not folder.exists(WRITING)


def test_publishing_twice_is_harmless_but_publishing_nothing_is_an_error(tmp_path: Path) -> None:
    for folder in (Folder(tmp_path / "a"), Folder(f"memory://{tmp_path}/publish")):
        folder.make()
        folder.write("from", b"x")
        folder.publish("from", "to")
        folder.remove("from")
        folder.publish("from", "to")
        assert folder.read("to") == b"x"
        with pytest.raises(UserError, match="no such file"):
            folder.publish("never", "nowhere")


class PlainStore(MemoryFileSystem):
    """A store that only reads and writes: fsspec knows no exclusive creation for it."""

    protocol = "plain"
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list] = [""]

    def pipe_file(self, path: str, value: bytes, **options: object) -> None:
        MemoryFileSystem.pipe_file(self, path, value)


def test_of_many_writers_exactly_one_wins_in_a_store_without_conditional_writes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fsspec.register_implementation("plain", PlainStore, clobber=True)
    monkeypatch.setattr(storage, "CLAIM_S", 0.5)
    assert storage._puts_conditionally(fsspec.filesystem("memory"))
    assert not storage._puts_conditionally(fsspec.filesystem("plain"))
    for number in range(5):
        folder, wins = Folder(f"plain://bucket/{number}"), []
        barrier = threading.Barrier(4)

        def create(
            text: bytes, folder: Folder = folder, barrier: threading.Barrier = barrier, wins: list = wins
        ) -> None:
            barrier.wait()
            if folder.create("name", text):
                wins.append(text)

        threads = [threading.Thread(target=create, args=(b"%d" % i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(wins) == 1 and folder.read("name") == wins[0]
        assert not folder.create("name", b"late")


def test_the_claim_of_a_writer_that_died_is_cleared_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.register_implementation("plain", PlainStore, clobber=True)
    monkeypatch.setattr(storage, "CLAIM_S", 0.2)
    folder = Folder("plain://bucket/died")
    folder.write(f"{WRITING}/name.claim", b"token")
    folder.write(f"{WRITING}/name.claimed", b"token")
    assert folder.create("name", b"x") and folder.read("name") == b"x"
