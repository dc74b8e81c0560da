"""Folders: complete files or none, exclusive creation, and errors of the operating system as sentences."""

import errno
import os
import threading
from pathlib import Path

import pytest

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
