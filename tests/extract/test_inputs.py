"""What decides a shard's bytes: changed inputs are made again, by name; two runs at once never mix."""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.two_runs import PAIRS, faults_of, trial
from extract.config import load_extract_config, merge
from extract.run import run as module
from extract.run.inputs import Changes, is_current, made_of, same_source
from extract.run.run import Summary, run
from extract.sources import InputFile, Unit
from extract.sources.urls import UrlSource
from shards.core.errors import UserError
from shards.core.storage import Folder
from shards.dataset import Dataset, write_info
from shards.description import DescriptionChanged, check_kind, create_info, kind_of, replace_info, update_info
from shards.inspect.verify import verify
from shards.marks import seal
from tests.extract.sources.test_tars import tar_bytes
from tests.support.object_store import object_store
from tests.support.web import photograph

PHOTOS = [photograph(number, (96, 64)) for number in range(6)]


def extract(data: Path | str, out: Path | str, **options: Any) -> Summary:
    base = {"run": {"estimators": "none", "shard_size": 2, "workers": 1, "threads": 1, "max_failed": 1.0}}
    return run(load_extract_config(str(data), str(out), merge(base, options)), in_process=True)


def tar_of(*numbers: int) -> bytes:
    members = ((f"{n:05d}.{s}", d) for n in numbers for s, d in (("jpg", PHOTOS[n]), ("txt", b"number %d" % n)))
    return tar_bytes(*members)


def keys(out: Path | str) -> list[str]:
    return list(Dataset.open(str(out)).keys())


def without_clock(out: Path) -> dict[str, Any]:
    """A dataset's files; of the marks all but what depends on the clock."""
    found: dict[str, Any] = {}
    for path in out.iterdir():
        if path.suffix == ".json" and path.stem.isdigit():
            mark = json.loads(path.read_bytes())
            found[path.name] = {key: mark[key] for key in mark if key not in ("timings", "checksum")}
        else:
            found[path.name] = path.read_bytes()
    return found


# ---- inputs that change ----------------------------------------------------------------------------------------------


def test_a_tar_that_grew_is_made_again_and_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tar, out = tmp_path / "whole.tar", tmp_path / "out"
    tar.write_bytes(tar_of(0, 1, 2, 3, 4, 5)[: 10 * 512])  # half of it, as a download leaves it
    (tmp_path / "other.tar").write_bytes(tar_of(0))
    extract(tmp_path / "*.tar", out)
    size = tar.stat().st_size
    tar.write_bytes(tar_of(0, 1, 2, 3, 4, 5))
    summary = extract(tmp_path / "*.tar", out)
    assert f"shard 000001 is made again because whole.tar grew from {size} to {tar.stat().st_size} bytes" in " ".join(
        capfd.readouterr().err.split()
    )
    assert summary.made == 6, "the other tar did not change"
    assert verify(str(out)).problems == [] and len(keys(out)) == 7
    extract(tmp_path / "*.tar", tmp_path / "fresh")
    assert without_clock(out) == without_clock(tmp_path / "fresh")
    assert extract(tmp_path / "*.tar", out).made == 0


def test_a_tar_replaced_by_one_of_the_same_size_and_one_that_is_only_touched(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tar, out = tmp_path / "a.tar", tmp_path / "out"
    tar.write_bytes(tar_of(0, 1))
    extract(tar, out)
    os.utime(tar, (1, 1))
    assert extract(tar, out).made == 0
    tar.write_bytes(tar.read_bytes().replace(b"number 1", b"number 7"))
    assert extract(tar, out).made == 2
    assert "a.tar was replaced by another of the same size" in " ".join(capfd.readouterr().err.split())


def test_the_table_beside_a_tar_that_arrives_later_is_an_input_too(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "0.tar").write_bytes(tar_of(0))
    extract(tmp_path / "0.tar", out, source={"keys": "own"})
    rows = [{"key": "00000", "status": "success"}, {"key": "00001", "status": "failed_to_download"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "0.parquet")
    assert extract(tmp_path / "0.tar", out, source={"keys": "own"}).stand.failed == {"failed_upstream": 1}


def test_an_image_replaced_in_a_folder_has_its_shard_made_again_and_another_folder_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    for number in range(4):
        (images / f"{number}.jpg").write_bytes(PHOTOS[number])
    (images / "1.txt").write_text("another caption")
    extract(images, out)
    (images / "3.jpg").write_bytes(PHOTOS[5])
    (images / "0.txt").write_text("a caption")
    assert extract(images, out).made == 4
    said = " ".join(capfd.readouterr().err.split())
    assert "shard 000001 is made again because 3.jpg" in said and "shard 000000 is made again because" in said
    (images / "2.jpg").write_bytes(PHOTOS[0])
    assert extract(images, out).made == 2
    shutil.copytree(images, tmp_path / "moved")
    assert extract(tmp_path / "moved", out).made == 0, "the same content at another place is the same source"
    (images / "1.jpg").write_bytes(PHOTOS[4])
    before = without_clock(out)
    with pytest.raises(UserError, match="other settings: source"):
        extract(images, out)  # another place than the last run's, and another content
    (images / "another.jpg").write_bytes(PHOTOS[4])
    with pytest.raises(UserError, match="other settings: source"):
        extract(images, out)
    assert without_clock(out) == before


def test_the_units_of_a_table_name_it_with_its_size_and_content(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"

    def files() -> tuple[InputFile, ...]:
        source = UrlSource((str(table),))
        (unit,) = source.units(10)
        return unit.files

    table.write_text("url,caption\nhttp://x/1,one\n")
    first = files()
    assert [(file.name, file.size) for file in first] == [("t.csv", table.stat().st_size)]
    table.write_text("url,caption\nhttp://x/2,one\n")
    assert files() != first and files()[0].size == first[0].size
    os.utime(table, (1, 1))
    assert files() == files()


def test_a_table_that_grew_continues_and_one_that_has_other_columns_of_settings_does_not(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text("url,caption\nhttp://x/1,one\n")
    before = UrlSource((str(table),)).describe()
    table.write_text("url,caption\nhttp://x/1,one\nhttp://x/2,two\n")
    after = UrlSource((str(table),)).describe()
    assert before != after and same_source(before, after)
    assert not same_source(before, UrlSource((str(table),), caption_column="").describe())
    earlier = {name: value for name, value in before.items() if name not in ("names", "place")}
    assert same_source(earlier, before) and not same_source(earlier, after), "an earlier version kept no names"


def test_a_saved_dataset_and_a_parquet_of_hugging_face_are_made_again_when_their_files_change(tmp_path: Path) -> None:
    def save(*numbers: int) -> None:
        rows = {"image": [{"bytes": PHOTOS[n], "path": None} for n in numbers], "text": [str(n) for n in numbers]}
        features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
        datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")

    save(0, 1)
    extract(tmp_path / "saved", tmp_path / "out")
    assert extract(tmp_path / "saved", tmp_path / "out").made == 0
    shutil.rmtree(tmp_path / "saved")
    save(0, 2)
    assert extract(tmp_path / "saved", tmp_path / "out").made == 2
    captions = [sample.caption for sample in Dataset.open(str(tmp_path / "out")).samples("000000")]
    assert captions == ["0", "2"]


def test_inputs_that_became_fewer_leave_no_shard_behind(tmp_path: Path) -> None:
    def save(count: int) -> None:
        rows = "".join(json.dumps({"file": f"{n}.jpg", "caption": "x"}) + "\n" for n in range(count))
        (tmp_path / "images" / "t.jsonl").write_text(rows)

    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.jpg").write_bytes(PHOTOS[0])
    save(1)
    extract(tmp_path / "images", tmp_path / "out")
    (tmp_path / "out" / "000001.json").write_bytes((tmp_path / "out" / "000000.json").read_bytes())
    extract(tmp_path / "images", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").glob("*.json") if path.stem.isdigit()] == ["000000.json"]


def test_marks_of_an_earlier_version_are_kept_and_that_is_said(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tar, out = tmp_path / "a.tar", tmp_path / "out"
    tar.write_bytes(tar_of(0, 1))
    extract(tar, out)
    mark = json.loads((out / "000000.json").read_bytes())
    mark["made"] = {name: mark["made"][name] for name in ("unit", "estimators")}
    (out / "000000.json").write_bytes(seal(mark))
    capfd.readouterr()
    assert extract(tar, out).made == 0
    assert "cannot be told" in " ".join(capfd.readouterr().err.split())


def test_an_etag_of_an_object_store_tells_a_replaced_tar_of_the_same_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with object_store() as (environment, _):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        store, url = Folder("s3://bucket/in"), "s3://bucket/in/*.tar"
        store.write("a.tar", tar_of(0, 1))
        extract(url, tmp_path / "out")
        assert extract(url, tmp_path / "out").made == 0
        store.write("a.tar", tar_of(0, 1).replace(b"number 1", b"number 7"))
        assert extract(url, tmp_path / "out").made == 2


def test_a_mark_is_current_only_with_the_same_image_settings() -> None:
    config = load_extract_config("demo", "x", {})
    unit = Unit(0, (0, 1), (InputFile("a", 1),))
    made = made_of(unit, {}, config.image)
    assert made == json.loads(json.dumps(made)) and is_current(made, made)
    for other in (
        made_of(unit, {}, dataclasses.replace(config.image, size_px=64)),
        made_of(unit, {"line": "x"}, config.image),
        made_of(dataclasses.replace(unit, items=(0, 2)), {}, config.image),
        made_of(dataclasses.replace(unit, files=(InputFile("a", 2),)), {}, config.image),
        made_of(dataclasses.replace(unit, files=(InputFile("b", 1),)), {}, config.image),
        made_of(dataclasses.replace(unit, files=(InputFile("a", 1, "tag"),)), {}, config.image),
    ):
        assert not is_current(made, other) and not is_current(other, made)


def test_many_changed_shards_are_said_in_few_lines() -> None:
    changes, config = Changes(), load_extract_config("demo", "x", {})
    said = []
    for index in range(50):
        units = [Unit(index, index, tuple(InputFile(f"{i}.jpg", size) for i in range(9))) for size in (1, 2)]
        old, new = (made_of(unit, {}, config.image) for unit in units)
        said.append(changes.look(f"{index:06d}", old, new, units[1].files))
    lines = [line for line in said if line]
    assert len(lines) == 20 and "0.jpg grew from 1 to 2 bytes" in lines[0] and "and 6 more" in lines[0]
    assert changes.summary() == ["inputs changed: 50 shards in all are made again"]


# ---- two runs at once ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("differs", PAIRS)
def test_two_runs_at_once_never_mix(tmp_path: Path, differs: str) -> None:
    result = trial(tmp_path / "out", differs, offset_s=0.0)
    assert result.faults == ()
    refused = [message for message in result.messages if message]
    assert all("another run" in message or "other settings" in message for message in refused), refused
    if differs in ("size", "format", "shard size"):
        assert len(refused) == 1


def test_the_search_for_mixtures_finds_one(tmp_path: Path) -> None:
    for size in (48, 64):
        extract("demo", tmp_path / str(size), image={"size_px": size}, run={"limit": 4}, source={"size_px": 64})
    assert faults_of(tmp_path / "48") == []
    for suffix in ("tar", "json", "failed.jsonl"):
        shutil.copy(tmp_path / "64" / f"000001.{suffix}", tmp_path / "48")
    assert any("other settings" in fault for fault in faults_of(tmp_path / "48"))


def description(**changed: Any) -> dict[str, Any]:
    base = {"config": {}, "image": "jpg", "members": ["jpg", "txt", "json"], "estimators": {}, "totals": None}
    return base | changed


@pytest.mark.parametrize("place", ["local", "memory"])
def test_a_description_is_replaced_only_by_who_read_it(tmp_path: Path, place: str) -> None:
    folder = Folder(tmp_path / "out" if place == "local" else f"memory://{tmp_path}/description")
    folder.make()
    first, second, third = (description(config={"n": n}) for n in range(3))
    assert create_info(folder, first) and not create_info(folder, second)
    read = check_kind(folder, kind_of(first))
    assert replace_info(folder, second, read["checksum"])
    assert not replace_info(folder, third, read["checksum"]), "it was not the second one that this writer read"
    with pytest.raises(DescriptionChanged, match=r"dataset\.json was changed by another run"):
        update_info(folder, first | {"totals": {}})
    update_info(folder, second | {"totals": {"in": 1}})
    assert check_kind(folder, kind_of(second))["totals"] == {"in": 1}
    assert folder.list(".writing") == []


def test_a_run_whose_dataset_is_described_anew_commits_nothing_more(tmp_path: Path) -> None:
    out, seen = tmp_path / "out", []

    finished = module._RunCounts.finished

    def taken_over(tally: Any, unit: Unit, outcome: Any) -> None:
        finished(tally, unit, outcome)
        seen.append(unit.index)
        info = Dataset.open(str(out)).info
        write_info(Folder(out), {**info, "config": info["config"] | {"limit": 99}})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module._RunCounts, "finished", taken_over)
        with pytest.raises(UserError, match="changed by another run"):
            extract("demo", out, run={"limit": 8}, source={"size_px": 64})
    assert seen == [0] and list(out.glob("000001.*")) == []


def test_new_shards_that_would_lack_the_maps_of_the_others_are_refused_by_name(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"image": {"size_px": 48}, "source": {"size_px": 64}}
    extract("demo", tmp_path, run={"limit": 2, "estimators": "null"}, **settings)
    with pytest.raises(UserError, match=r"samples have depth, .*shard 000001 is not made yet"):
        extract("demo", tmp_path, run={"limit": 4, "estimators": "none"}, **settings)
    extract("demo", tmp_path, run={"limit": 4, "estimators": "null"}, **settings)
    assert len(keys(tmp_path)) == 4 and verify(str(tmp_path)).problems == []
