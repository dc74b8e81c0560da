"""The dataset on disk: deterministic, readable by key, and committed by exactly one writer whatever happens."""

import contextlib
import hashlib
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import shards.writer
from shards.core.errors import UserError
from shards.core.storage import WRITING, Folder
from shards.dataset import Dataset, write_info
from shards.marks import MarkError, seal, unseal
from shards.sample import SampleError, check_key
from shards.writer import ShardWriter, recover

MEMBERS = ["txt", "json"]


@pytest.fixture(params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Folder]:
    folder = Folder(tmp_path / "dataset") if request.param == "local" else Folder(f"memory://{tmp_path}")
    folder.make()
    write_info(folder, {"members": MEMBERS, "totals": None})
    yield folder
    if folder.local_path is None:
        folder.remove("")


def writer(folder: Folder, text: bytes = b"one", **options: str) -> ShardWriter:
    made = ShardWriter(folder, 0, members=MEMBERS, made={"unit": 0}, **options)
    made.add("a", {"json": b"{}", "txt": text})
    made.add("b-2_c", {"txt": b"", "json": b'{"x":1}'})
    made.fail("c", "decode", "truncated", "the file ends early")
    return made


def test_a_sample_is_read_back_by_key(folder: Folder) -> None:
    with writer(folder) as attempt:
        mark = attempt.commit({})
    dataset = Dataset.open(folder.url)
    assert list(dataset.keys()) == ["a", "b-2_c"] and dataset.shard_names() == ["000000"]
    assert dataset.read("a").members == {"txt": b"one", "json": b"{}"}
    assert dataset.read("b-2_c", ["json"]).meta == {"x": 1}
    assert [sample.key for sample in dataset.samples("000000")] == ["a", "b-2_c"]
    assert list(dataset.failures("000000")) == [
        {"key": "c", "stage": "decode", "reason": "truncated", "message": "the file ends early"}
    ]
    assert mark["counts"] == {"in": 3, "ok": 2, "failed": {"truncated": 1}}
    with pytest.raises(UserError, match="no sample 'zzz'"):
        dataset.read("zzz")


def test_the_same_samples_give_the_same_bytes_in_a_tar_that_any_tool_reads(tmp_path: Path) -> None:
    files = []
    for name in ("first", "second"):
        folder = Folder(tmp_path / name)
        with writer(folder) as attempt:
            attempt.commit({"wall_s": len(files)})
        files.append((tmp_path / name / "000000.tar").read_bytes())
    assert files[0] == files[1]
    with tarfile.open(tmp_path / "first" / "000000.tar") as tar:
        assert tar.getnames() == ["a.txt", "a.json", "b-2_c.txt", "b-2_c.json"]
        assert {(info.mtime, info.uid, info.mode, info.uname) for info in tar} == {(0, 0, 0o644, "")}


def test_nothing_is_visible_before_the_commit_and_nothing_is_left_after_an_abort(folder: Folder) -> None:
    with writer(folder):
        assert Dataset.open(folder.url).shard_names() == []
    assert folder.list() in (["dataset.json"], [WRITING, "dataset.json"]) and folder.list(WRITING) == []


def test_of_two_writers_one_wins_and_the_other_leaves_no_trace(folder: Folder) -> None:
    with writer(folder, b"first") as first, writer(folder, b"second") as second:
        won, lost = second.commit({}), first.commit({})
    assert won == lost and Dataset.open(folder.url).read("a").caption == "second"
    assert folder.list(WRITING) == []


def test_a_shard_is_replaced_only_by_a_writer_that_knew_it(folder: Folder) -> None:
    with writer(folder, b"old") as attempt:
        old = attempt.commit({})
    with (
        writer(folder, b"new", replaces=old["checksum"]) as knows,
        writer(folder, b"late", replaces=old["checksum"]) as late,
    ):
        knows.commit({})
        late.commit({})
    assert Dataset.open(folder.url).read("a").caption == "new"


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the writer runs after it, not even its clean-up."""


@pytest.mark.parametrize("step", range(9))
@pytest.mark.parametrize("replace", [False, True])
def test_a_writer_killed_at_any_step_of_the_commit_is_healed_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, replace: bool
) -> None:
    folder = Folder(tmp_path)
    write_info(folder, {"members": MEMBERS, "totals": None})
    options = {}
    if replace:
        with writer(folder, b"old") as attempt:
            options["replaces"] = attempt.commit({})["checksum"]
    calls = 0

    def counted(method):  # type: ignore[no-untyped-def]
        def call(*arguments: object, **named: object) -> object:
            nonlocal calls
            calls += 1
            if calls > step:
                raise Killed
            return method(*arguments, **named)

        return call

    killed = writer(folder, b"killed", **options)
    with monkeypatch.context() as patch:
        for name in ("create", "publish", "remove"):
            patch.setattr(Folder, name, counted(getattr(Folder, name)))
        with contextlib.suppress(Killed):
            killed.commit({})
    with writer(folder, b"next", **options) as attempt:
        attempt.commit({})
    dataset = Dataset.open(folder.url)
    assert dataset.read("a").caption == ("next" if step == 0 else "killed")
    assert dataset.mark("000000")["tar"]["size"] == (tmp_path / "000000.tar").stat().st_size
    folder.sweep()
    assert folder.list() == ["000000.failed.jsonl", "000000.json", "000000.tar", "dataset.json"]


@pytest.mark.parametrize("step", range(9))
@pytest.mark.parametrize("replace", [False, True])
def test_a_writer_that_stands_still_and_comes_back_cannot_commit_twice(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, step: int, replace: bool
) -> None:
    options = {}
    if replace:
        with writer(folder, b"old") as attempt:
            options["replaces"] = attempt.commit({})["checksum"]
    calls, committed = 0, []

    def paused(method):  # type: ignore[no-untyped-def]
        def call(*arguments: object, **named: object) -> object:
            nonlocal calls
            calls += 1
            if calls == step + 1:  # the other one does the whole unit meanwhile
                with writer(folder, b"other", **options) as other:
                    committed.append(other.commit({}))
                committed.append({path: folder.read(path) for path in folder.list() if path.startswith("000000")})
            return method(*arguments, **named)

        return call

    with monkeypatch.context() as patch:
        for name in ("create", "publish", "remove"):
            patch.setattr(Folder, name, paused(getattr(Folder, name)))
        with writer(folder, b"paused", **options) as slow:
            mark = slow.commit({})

    dataset = Dataset.open(folder.url)
    assert dataset.read("a").caption in ("other", "paused") and dataset.mark("000000") == mark
    if committed:  # the step exists
        assert committed[0] == mark and committed[1] == {p: folder.read(p) for p in committed[1]}
    assert hashlib.sha256(folder.read("000000.tar")).hexdigest() == mark["tar"]["sha256"]
    assert folder.list(WRITING) == []


def test_a_winner_that_failed_while_publishing_keeps_its_files_for_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Folder(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="disk is full"), writer(folder) as attempt:

        def full(*_: object) -> None:
            raise UserError("the disk is full")

        patch.setattr(Folder, "publish", full)
        attempt.commit({})
    recover(folder, "000000")
    assert shards.writer.read_mark(folder, "000000")["counts"]["ok"] == 2


def test_a_doubled_or_illegal_key_and_a_thin_sample_are_refused(tmp_path: Path) -> None:
    with writer(Folder(tmp_path)) as attempt:
        for key, members in (("a", MEMBERS), ("a.b", MEMBERS), ("ok", ["txt"]), ("ok", [*MEMBERS, "pyd"])):
            with pytest.raises(SampleError):
                attempt.add(key, dict.fromkeys(members, b""))
        with pytest.raises(ValueError, match="lunch"):
            attempt.fail("d", "lunch", "truncated", "")


@given(st.text(max_size=110))
def test_a_key_is_legal_only_if_every_tool_can_carry_it(key: str) -> None:
    legal = 1 <= len(key) <= 100 and all(c.isascii() and (c.isalnum() or c in "-_") for c in key)
    if legal:
        assert check_key(key) == key
    else:
        with pytest.raises(SampleError):
            check_key(key)


@given(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5), max_size=4), st.data())
@settings(max_examples=60, deadline=None)
def test_a_sealed_document_comes_back_and_any_flipped_bit_is_found(document: dict, data: st.DataObject) -> None:
    file = seal(document | {"version": 1})
    body = {key: value for key, value in document.items() if key not in ("version", "checksum")}
    assert unseal(file, "x") | body | {"version": 1} == unseal(file, "x")
    position = data.draw(st.integers(0, len(file) - 1))
    flipped = bytearray(file)
    flipped[position] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(MarkError):
        unseal(bytes(flipped), "x")


def test_a_folder_without_a_dataset_says_what_to_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no dataset.*python -m extract"):
        Dataset.open(str(tmp_path))
