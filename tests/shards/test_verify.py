"""verify finds every kind of damage, and names it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from shards.__main__ import app
from shards.core.errors import UserError
from shards.core.storage import Folder
from shards.dataset import add_counts, write_info
from shards.edit.forget import Forgotten, forget
from shards.inspect.verify import verify
from shards.intrinsics import encode_png
from shards.marks import seal
from shards.writer import ShardWriter
from tests.support.labelled import INFO, MEMBERS, members_of, write_dataset


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return write_dataset(tmp_path / "data")


def problems(folder: Folder, *, quick: bool = False) -> list[str]:
    return verify(folder.url, quick).problems


def local(folder: Folder) -> Path:
    assert folder.local_path is not None
    return folder.local_path


def reseal(path: Path, **changes: object) -> None:
    path.write_bytes(seal(json.loads(path.read_bytes()) | changes))


@pytest.mark.parametrize("quick", [False, True])
def test_a_whole_dataset_has_no_problems(folder: Folder, quick: bool) -> None:
    report = verify(folder.url, quick)
    assert report.problems == []
    size = sum(path.stat().st_size for path in local(folder).glob("*.tar"))
    assert report.counts == {"shards": 2, "in": 6, "ok": 4, "failed": {"truncated": 2}, "bytes": size}


def test_any_single_flipped_bit_is_found(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "data", shards=1, per_shard=1)
    forget(folder.url, Forgotten.of(keys=["not-there"]))
    tried = 0
    for path in sorted(local(folder).iterdir()):
        whole = path.read_bytes()
        bits = 8 * len(whole)
        for bit in range(0, bits, max(1, bits // 150) | 1):  # an odd stride meets all eight bits of a byte
            damaged = bytearray(whole)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            assert problems(folder), f"bit {bit} of {path.name}"
            tried += 1
        path.write_bytes(whole)
    assert tried > 600 and problems(folder) == []


def test_flipped_bits_in_letters_beyond_ascii_are_found(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "data", shards=1, per_shard=1)  # some flips make half a surrogate pair
    path = local(folder) / "dataset.json"
    whole = seal(json.loads(path.read_bytes()) | {"config": {"data": "\ud55c\ud7a3"}})
    begin = whole.index("\ud55c\ud7a3".encode())
    for bit in range(8 * begin, 8 * begin + 48):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        assert any("dataset.json" in problem for problem in problems(folder, quick=True)), bit


@pytest.mark.parametrize("left", [0, 511, 512, 3000, -1024, -1])
def test_a_truncated_tar_is_found(folder: Folder, left: int) -> None:
    path = local(folder) / "000001.tar"
    path.write_bytes(path.read_bytes()[:left])
    assert any("000001.tar is truncated" in problem for problem in problems(folder))
    assert any("000001.tar has" in problem for problem in problems(folder, quick=True))


@pytest.mark.parametrize("suffix", ["tar", "json", "failed.jsonl"])
def test_a_missing_file_is_named(folder: Folder, suffix: str) -> None:
    (local(folder) / f"000001.{suffix}").unlink()
    assert any(f"000001.{suffix} is missing" in problem for problem in problems(folder, quick=True))


def test_a_missing_and_a_superfluous_shard_are_named(folder: Folder) -> None:
    data = local(folder)
    for suffix in ("tar", "json", "failed.jsonl"):
        (data / f"000000.{suffix}").rename(data / f"000002.{suffix}")
    found = problems(folder)
    assert any("shard 000000 is missing" in problem for problem in found)
    assert any("shard 000002 is there, but" in problem for problem in found)
    assert any("belongs to shard '000000'" in problem for problem in found)


def test_a_stale_mark_is_named(folder: Folder, tmp_path: Path) -> None:
    other = write_dataset(tmp_path / "other", change=lambda key, made: made | {"txt": b"longer than before" * 100})
    shutil.copy(local(other) / "000001.tar", local(folder) / "000001.tar")
    found = problems(folder)
    assert any("the mark is stale" in problem and "s1-0" in problem for problem in found)
    assert any("000001.tar has" in problem and "its mark says" in problem for problem in found)


def test_a_key_in_two_shards_is_named(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "data")
    folder.make()
    marks = []
    for shard in range(2):
        with ShardWriter(folder, shard, members=MEMBERS, made={}) as writer:
            writer.add("same", members_of())
            marks.append(writer.commit({}))
    write_info(folder, INFO | {"shards": 2, "totals": add_counts(marks)})
    folder.sweep()
    assert [problem.split(";")[0] for problem in problems(folder)] == ["000001.tar: the key same is also in 000000.tar"]


def test_a_key_twice_in_one_tar_is_named(folder: Folder) -> None:
    path = local(folder) / "000000.tar"
    tar = path.read_bytes()
    path.write_bytes(tar[:-1024] + tar)
    assert any("the key s0-0 is there twice" in problem for problem in problems(folder))


def test_a_dataset_of_another_version_is_named(folder: Folder) -> None:
    reseal(local(folder) / "000001.json", version=2)
    assert any("000001.json has format version 2" in problem for problem in problems(folder))
    reseal(local(folder) / "dataset.json", version=0)
    assert any("dataset.json has format version 0" in problem for problem in problems(folder))


def test_an_unfinished_dataset_says_how_to_go_on(folder: Folder) -> None:
    write_info(folder, INFO | {"shards": None, "totals": None})
    assert len(problems(folder)) == 1 and "run the same `python -m extract` command again" in problems(folder)[0]


def test_leftovers_and_foreign_files_are_named(folder: Folder) -> None:
    (local(folder) / "notes.txt").write_text("mine")
    (local(folder) / "gallery.html").write_text("known")
    (local(folder) / ".writing").mkdir()
    assert len(problems(folder)) == 1 and "notes.txt" in problems(folder)[0]
    (local(folder) / ".writing" / "000000.abc.tar").write_bytes(b"")
    assert any("killed writer" in problem for problem in problems(folder))


def test_counts_that_do_not_add_up_are_named(folder: Folder) -> None:
    data = local(folder)
    info = json.loads((data / "dataset.json").read_bytes())
    reseal(data / "dataset.json", totals=info["totals"] | {"in": 7})
    assert [problem.split(" are ")[0] for problem in problems(folder)] == ["dataset.json: totals"]
    reseal(data / "dataset.json", totals=info["totals"])
    reseal(data / "000000.json", counts={"in": 3, "ok": 1, "failed": {"truncated": 1}})
    assert any("000000.json: the counts do not add up" in problem for problem in problems(folder))
    reseal(data / "000000.json", counts={"in": 3, "ok": 2, "failed": {"other": 1}})
    assert any("000000.failed.jsonl lists the failures" in problem for problem in problems(folder, quick=True))


def _members(**members: bytes) -> Callable[[str, dict[str, bytes]], dict[str, bytes]]:
    renamed = {name.replace("_", "."): data for name, data in members.items()}
    return lambda key, made: made | renamed if key == "s1-1" else made


def _described(**fields: dict[str, object]) -> Callable[[str, dict[str, bytes]], dict[str, bytes]]:
    changes: dict[str, Any] = dict(fields)
    return _members(json=members_of(**changes)["json"])


_COLUMNS = np.tile(np.arange(8, dtype=np.uint16), (6, 1))
FAULTS = [
    (_members(txt=b"\xff\xfe"), "s1-1.txt is not UTF-8"),
    (_members(json=b"{"), "s1-1.json is not JSON"),
    (_members(json=b"{}"), 's1-1.json has no object "intrinsics"'),
    (_members(png=b"GIF89a"), "s1-1.png is damaged"),
    (_members(png=encode_png(np.zeros((6, 9, 3), np.uint8))), "s1-1.json says the image has the size [8, 6]"),
    (_members(depth_png=encode_png(np.zeros((6, 9), np.uint16))), "s1-1.depth.png has 9 x 6 pixels"),
    (_members(depth_png=encode_png(np.zeros((6, 8), np.uint8))), "s1-1.depth.png: a PNG of bit depth 8"),
    (_members(normal_png=encode_png(np.full((6, 8, 3), 60, np.uint8))), "48 normals whose length is not 1"),
    (_members(line_png=b"\x89PNG"), "s1-1.line.png: not a PNG"),
    (_members(segmentation_png=encode_png(_COLUMNS)), "does not list the ids 1..7"),
    (_members(segmentation_png=encode_png(_COLUMNS * 2)), "the id 1 is missing"),
    (_described(segmentation={"segments": [{"id": 1, "area": 48}, {"id": 2, "area": 0}]}), "areas that are not"),
    (_described(depth={"by": "other"}), "intrinsics.depth.by is 'other', but dataset.json declares 'test@depth'"),
    (_described(depth={"kind": "relative", "lo": 0, "hi": 1}), "depths of two kinds must not be mixed"),
    (_described(depth={"focal_px": -3}), "focal_px is -3"),
    (_described(quality={"segments": 10**400}), "intrinsics.quality.segments is 1000"),
    (_described(quality={"segments": "many"}), "intrinsics.quality.segments is 'many'"),
]


@pytest.mark.parametrize(("change", "message"), FAULTS, ids=[message for _, message in FAULTS])
def test_a_sample_that_breaks_the_format_is_named(
    tmp_path: Path, change: Callable[[str, dict[str, bytes]], dict[str, bytes]], message: str
) -> None:
    folder = write_dataset(tmp_path / "data", change=change)
    found = problems(folder)
    assert any("000001.tar" in problem and "s1-1" in problem and message in problem for problem in found), found


def test_hostile_marks_are_problems_and_no_crash(folder: Folder) -> None:
    for field in ("counts", "index", "tar", "failures"):
        values: list[object] = [None, [], {"a": 1}, "text"]
        for value in values:
            path = local(folder) / "000000.json"
            whole = path.read_bytes()
            reseal(path, **{field: value})
            assert any("000000.json" in problem for problem in problems(folder)), (field, value)
            path.write_bytes(whole)
    for field in ("members", "image", "estimators", "depth_kind", "totals", "shards"):
        reseal(local(folder) / "dataset.json", **{**INFO, "shards": 2, "totals": {"in": 0}, field: None})
        assert problems(folder), field


@pytest.mark.parametrize("shards", ["2", -1, True, [], 10**18])
def test_a_number_of_shards_that_cannot_be_is_a_problem_and_costs_nothing(folder: Folder, shards: object) -> None:
    reseal(local(folder) / "dataset.json", shards=shards)
    assert any("shard" in problem for problem in problems(folder, quick=True))


def test_values_that_a_mark_cannot_hold_are_damage(folder: Folder) -> None:
    path = local(folder) / "000000.json"
    for value in (b"NaN", b'"\\ud800"', b"1e999"):
        path.write_bytes(path.read_bytes().replace(b'"timings": {', b'"timings": {"a": ' + value + b", "))
        assert any("000000.json is damaged" in problem for problem in problems(folder, quick=True)), value


def test_maps_whose_estimator_is_not_declared_are_named(folder: Folder) -> None:
    reseal(local(folder) / "dataset.json", estimators={name: INFO["estimators"][name] for name in ("depth", "normal")})
    assert any("intrinsics.line.by" in problem and "declares None" in problem for problem in problems(folder))


def test_text_of_a_dataset_cannot_drive_the_terminal(tmp_path: Path) -> None:
    meta = json.loads(members_of()["json"])
    meta["intrinsics"]["quality"] = {"\x1b[2J\ud800": "many"}
    folder = write_dataset(tmp_path / "data", change=_members(json=json.dumps(meta).encode()))
    result = CliRunner().invoke(app, ["verify", folder.url])
    assert result.exit_code == 1 and "quality. [2J " in result.output and "\x1b" not in result.output


def test_the_command_exits_with_1_and_names_each_problem(folder: Folder) -> None:
    assert CliRunner().invoke(app, ["verify", folder.url]).exit_code == 0
    path = local(folder) / "000000.tar"
    path.write_bytes(path.read_bytes()[:-1])
    result = CliRunner().invoke(app, ["verify", folder.url])
    assert result.exit_code == 1 and "000000.tar is truncated" in result.output


def test_what_is_no_dataset_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no dataset"):
        verify(str(tmp_path))


def test_a_dataset_in_an_object_store_is_verified_too(tmp_path: Path) -> None:
    folder = write_dataset(f"memory://{tmp_path}")
    assert problems(folder) == []
    tar = folder.read("000001.tar")
    folder.write("000001.tar", tar[:700] + bytes([tar[700] ^ 1]) + tar[701:])
    assert any("000001.tar is damaged" in problem for problem in problems(folder))
    folder.remove("")
