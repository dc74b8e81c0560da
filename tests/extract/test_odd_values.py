"""Odd values on every way into a dataset: what is accepted can be verified, counted, shown and forgotten again."""

import json
import subprocess
import sys
import tarfile
import uuid
from collections import Counter
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from extract.images.prepare import ImageRules
from extract.run.make_shard import UnitWork, make_shard
from extract.sources import Source
from extract.sources.folder import FolderSource
from extract.sources.huggingface import HuggingFaceSource
from extract.sources.tars import TarSource, is_shard_of_ours
from shards.__main__ import app
from shards.core.errors import UserError
from shards.core.storage import Folder
from shards.dataset import Dataset, add_counts, write_info
from shards.marks import seal
from shards.metadata import MAX_METADATA_BYTES, MAX_METADATA_DEPTH
from tests.support.labelled import write_dataset
from tests.support.url_tables import Sources
from tests.support.web import Web, photograph

MEMBERS = ("jpg", "txt", "json")
JPEG = photograph(0)
FAR = pa.array([0, 1 << 62, -(1 << 62), None], pa.int64())


def deep(levels: int) -> str:
    return '{"x":' + "[" * levels + "]" * levels + "}"


def exactly(size: int) -> str:
    return '{"x":"' + "y" * (size - 8) + '"}'


def extracted(source: Source, out: Path) -> Dataset:
    """The dataset of a source, without maps."""
    folder = Folder(out)
    folder.make()
    work = UnitWork(source=source, image=ImageRules(), members=MEMBERS, threads=1, window=4)
    marks = [make_shard(folder, unit, work, [], made={}) for unit in source.units(1000)]
    folder.remove(".writing")
    info = {
        "recipe": "test",
        "config": {},
        "members": list(MEMBERS),
        "image": "jpg",
        "depth_kind": None,
        "estimators": {},
    }
    write_info(folder, info | {"shards": len(marks), "totals": add_counts(marks)})
    return Dataset.open(str(out))


def command(*arguments: Any) -> str:
    """What a command of `python -m shards` prints, which must end well."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, (arguments, result.output, result.exception)
    return result.output


def checked(dataset: Dataset) -> dict[str, dict[str, Any]]:
    """The metadata by key, of a dataset that every command of ours accepts."""
    url = dataset.folder.url
    command("verify", url)
    command("stats", url)
    command("gallery", url)
    samples = {key: dataset.read(key) for key in list(dataset.keys())}
    for key in list(samples)[:3]:
        assert key in command("show", key, url)
    if samples:
        first = next(iter(samples))
        command("forget", url, "--key", first)
        command("verify", url)
        assert first not in list(Dataset.open(url).keys())
    return {key: sample.meta for key, sample in samples.items()}


def reasons(dataset: Dataset) -> dict[str, str]:
    return {line["key"]: line["reason"] for shard in dataset.shard_names() for line in dataset.failures(shard)}


def tar(path: Path, samples: dict[str, str]) -> TarSource:
    """A tar of an image and a json for each sample."""
    with tarfile.open(path, "w") as file:
        for name, text in samples.items():
            for suffix, data in (("jpg", JPEG), ("txt", b"a dog"), ("json", text.encode())):
                info = tarfile.TarInfo(f"{name}.{suffix}")
                info.size = len(data)
                file.addfile(info, BytesIO(data))
    return TarSource((str(path),), keys="own")


def folder(path: Path, samples: dict[str, str]) -> FolderSource:
    path.mkdir()
    for name, text in samples.items():
        (path / f"{name}.jpg").write_bytes(JPEG)
        (path / f"{name}.json").write_text(text)
    return FolderSource(str(path))


# ---- json beside images and in tars ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [tar, folder])
def test_odd_json_costs_a_value_or_its_own_sample(kind: Any, tmp_path: Path) -> None:
    at_limit = {"depth": deep(MAX_METADATA_DEPTH - 1), "size": exactly(MAX_METADATA_BYTES - 100)}
    good = {"nan": '{"caption":"c","punsafe":NaN}', "inf": '{"x":[Infinity,-1e999]}', "half": '{"x":"\\ud800"}'}
    bad = {f"k{levels}": deep(levels) for levels in (MAX_METADATA_DEPTH, 300, 970, 979, 985, 50_000)}
    bad |= {"large": exactly(MAX_METADATA_BYTES + 1), "digits": '{"x":' + "9" * 5000 + "}"}
    dataset = extracted(kind(tmp_path / "in", good | at_limit | bad), tmp_path / "out")
    assert set(reasons(dataset).values()) <= {"bad_metadata", "too_many_bytes"} and len(reasons(dataset)) == len(bad)
    found = {key.partition("-")[0]: meta for key, meta in checked(dataset).items()}
    assert set(found) == {*good, *at_limit}
    assert found["nan"]["punsafe"] is None and found["inf"]["x"] == [None, None] and found["half"]["x"] == "\ufffd"


@pytest.mark.parametrize("kind", [tar, folder])
def test_a_foreign_field_called_intrinsics_is_kept_under_another_name(kind: Any, tmp_path: Path) -> None:
    foreign = {"caption": "cam", "intrinsics": {"fx": 500, "image": {"size": [1, 1]}}, "intrinsics_of_source": 7}
    (meta,) = checked(extracted(kind(tmp_path / "in", {"a": json.dumps(foreign)}), tmp_path / "out")).values()
    assert meta["intrinsics_of_source_"] == foreign["intrinsics"] and meta["intrinsics_of_source"] == 7
    assert meta["intrinsics"]["image"]["size"] == [96, 64] or meta["intrinsics"]["image"]["size"] != [1, 1]


def test_only_whole_shards_of_our_own_are_taken_for_ours(tmp_path: Path) -> None:
    first = extracted(tar(tmp_path / "in.tar", {"a": '{"n":1}'}), tmp_path / "first")
    own = tmp_path / "first" / "000000.tar"
    assert is_shard_of_ours(str(own))
    (sample,) = first.samples("000000")
    (again,) = extracted(TarSource((str(own),)), tmp_path / "second").samples("000000")
    assert again.meta == sample.meta, "what we noted of an image is still true"

    (tmp_path / "fake").mkdir()
    foreign = tar(tmp_path / "fake" / "000000.tar", {"a": '{"intrinsics":{"fx":1}}'})
    (tmp_path / "fake" / "dataset.json").write_text("{}")
    assert not is_shard_of_ours(foreign.tars[0])
    (tmp_path / "fake" / "dataset.json").write_bytes(first.folder.read("dataset.json"))
    (tmp_path / "fake" / "000000.json").write_bytes(first.folder.read("000000.json"))
    assert not is_shard_of_ours(foreign.tars[0]), "another tar under the name of ours"
    (kept,) = extracted(foreign, tmp_path / "third").samples("000000")
    assert kept.meta["intrinsics_of_source"] == {"fx": 1}


@pytest.mark.parametrize("kind", [tar, folder])
def test_chosen_fields_alone_are_kept(kind: Any, tmp_path: Path) -> None:
    import dataclasses

    source = kind(tmp_path / "in", {"a": '{"caption":"c","n":1,"other":2}'})
    chosen = dataclasses.replace(source, columns=("n", "absent"))
    assert chosen.describe() != source.describe() and "columns" not in source.describe()
    (sample,) = extracted(chosen, tmp_path / "out").samples("000000")
    assert set(sample.meta) - {"intrinsics", "file"} == {"n"}


# ---- tables of URLs ------------------------------------------------------------------------------------------------------


def table(path: Path, web: Web, **columns: Any) -> Path:
    count = len(next(iter(columns.values())))
    urls = [f"{web.address}/ok/{number}.jpg" for number in range(count)]
    pq.write_table(pa.table({"url": urls, "caption": ["a"] * count, **columns}), path)
    return path


@pytest.mark.parametrize(
    "column",
    [
        FAR.cast(pa.timestamp("us")),
        FAR.cast(pa.timestamp("ms", "Mars/Olympus")),
        pa.array([0, 1 << 30, -(1 << 30), None], pa.int32()).cast(pa.date32()),
        FAR.cast(pa.duration("s")),
        pa.array([*(uuid.UUID(int=n).bytes for n in range(3)), None], pa.uuid()),
        pa.array([float("nan"), float("inf"), 1.0, None]),
        pa.array([[{"when": 1}], [], None, [{"when": None}]]),
    ],
    ids=lambda column: str(column.type),
)
def test_odd_columns_cost_no_row(make: Sources, web: Web, tmp_path: Path, column: pa.Array) -> None:
    dataset = extracted(make(table(tmp_path / "a.parquet", web, odd=column)), tmp_path / "out")
    assert not reasons(dataset)
    values = [meta["odd"] for meta in checked(dataset).values()]
    assert len(values) == 4 and values[3] in (None, [{"when": None}])


def test_a_deep_row_and_a_huge_cell_are_bad_rows(make: Sources, web: Web, tmp_path: Path) -> None:
    lines = [json.dumps({"url": f"{web.address}/ok/{n}.jpg", "caption": "a"}) for n in range(4)]
    lines += [lines[0].replace("/ok/0", f"/ok/{n}")[:-1] + f',"x":{"[" * n}{"]" * n}}}' for n in (63, 64, 700, 990)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    found = extracted(make(tmp_path / "a.jsonl"), tmp_path / "deep")
    assert reasons(found) == dict.fromkeys(("00000-000000005", "00000-000000006", "00000-000000007"), "bad_row")
    checked(found)

    huge = table(tmp_path / "b.parquet", web, html=["w", "y" * (20 << 20), "z"])
    found = extracted(make(huge), tmp_path / "huge")
    assert reasons(found) == {"00000-000000001": "bad_row"}
    (line,) = found.failures("000000")
    assert "'html' has 20,971,520 bytes" in line["message"] and "source.columns" in line["message"]
    without = extracted(make(huge, columns=[]), tmp_path / "without")
    assert not reasons(without)
    assert all(set(meta) == {"url", "sha256", "download", "intrinsics"} for meta in checked(without).values())


def test_a_cell_of_300_mb_is_refused_without_being_copied_about(tmp_path: Path) -> None:
    text = pa.array(["w", "x" * (300 << 20), "y"])
    pq.write_table(pa.table({"url": ["http://a/1", "http://a/2", "http://a/3"], "html": text}), tmp_path / "a.parquet",
                   compression="zstd")  # fmt: skip
    script = """
import resource, sys
from extract.sources.url_tables import Table
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
table = Table(sys.argv[1])
rows = list(table.rows(next(table.cuts(10, 10))))
print([type(row).__name__ for row in rows], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024 - before)
"""
    run = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "a.parquet"], capture_output=True, text=True, check=True
    )
    kinds, _, megabytes = run.stdout.strip().rpartition(" ")
    assert kinds == "['dict', 'str', 'dict']"
    assert int(megabytes) < 1400, "arrow's page and its column, and no copy of ours"


def test_what_planning_takes_for_the_first_of_a_repeated_url_is_what_work_takes(
    make: Sources, web: Web, tmp_path: Path
) -> None:
    url = f"{web.address}/ok/1.jpg"
    rows = [
        {"url": url, "caption": float("nan")},
        {"url": url, "caption": "a good one"},
        {"url": url, "caption": "late"},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pq.write_table(pa.table({"url": [url, url], "caption": [None, "a good one"]}), tmp_path / "b.parquet")
    for name, kept in (("a.jsonl", 1), ("b.parquet", 1)):
        found = extracted(make(tmp_path / name, filters={"min_caption": 2}), tmp_path / f"{name}.out")
        assert [sample.caption for sample in found.samples("000000")] == ["a good one"]
        assert Counter(reasons(found).values())["filtered_caption_length"] == kept

    hashes = {"url": [None, f"{web.address}/ok/2.jpg"], "caption": ["a", "b"], "phash": ["h", "h"]}
    pq.write_table(pa.table(hashes), tmp_path / "c.parquet")
    found = extracted(make(tmp_path / "c.parquet", distinct=["phash"]), tmp_path / "c")
    assert reasons(found) == {"00000-000000000": "bad_row"}, "a row without a URL is no first one"


# ---- Hugging Face and tables in folders ----------------------------------------------------------------------------------


def test_odd_columns_of_a_hugging_face_dataset_are_kept_as_json(tmp_path: Path) -> None:
    import datasets

    image = [{"bytes": JPEG, "path": None}] * 4
    mask = [{"bytes": bytes(2 << 20), "path": "m.png"}] * 4
    columns = {"when": FAR.cast(pa.timestamp("us")), "vector": pa.array([[1.0, float("nan")], [], None, [2.0]]),
               "intrinsics": pa.array([1, 2, 3, 4]), "raw": pa.array([b"\xff", None, b"", b"a"])}  # fmt: skip
    features = {"image": datasets.Image(), "mask": datasets.Image(), "caption": datasets.Value("string")}
    data = datasets.Dataset(pa.table({"image": image, "mask": mask, "caption": ["a", "b", "c", "d"], **columns}))
    data = data.cast(datasets.Features(data.features | features))
    data.save_to_disk(tmp_path / "in")
    dataset = extracted(HuggingFaceSource(str(tmp_path / "in"), image="image"), tmp_path / "out")
    assert not reasons(dataset)
    metas = list(checked(dataset).values())
    assert [meta["intrinsics_of_source"] for meta in metas] == [1, 2, 3, 4]
    assert metas[0]["vector"] == [1.0, None] and metas[1]["when"] == str(np.datetime64(1 << 62, "us"))
    assert metas[0]["raw"] == "ff" and "mask" not in metas[0]
    chosen = HuggingFaceSource(str(tmp_path / "in"), image="image", columns=("raw",))
    assert set(next(extracted(chosen, tmp_path / "b").samples("000000")).meta) == {"raw", "intrinsics"}


def test_odd_cells_of_a_table_in_a_folder_cost_no_image(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", {})
    for number in range(4):
        (tmp_path / "in" / f"{number}.jpg").write_bytes(JPEG)
    names = [f"{number}.jpg" for number in range(4)]
    odd = {"when": FAR.cast(pa.timestamp("us")), "intrinsics": [1, 2, 3, 4], "text": ["x"] * 4}
    pq.write_table(pa.table({"file_name": names, **odd}), tmp_path / "in" / "metadata.parquet")
    metas = list(checked(extracted(source, tmp_path / "out")).values())
    assert [meta["intrinsics_of_source"] for meta in metas] == [1, 2, 3, 4]
    assert metas[1]["when"] == str(np.datetime64(1 << 62, "us"))


# ---- the terminal --------------------------------------------------------------------------------------------------------

ESCAPES = "\x1b]0;owned\x07\x1b[2J\x9b31m\x7f\u202e\ud800[red]"


def clean(text: str) -> bool:
    return all(letter.isprintable() or letter == "\n" or letter == "\t" for letter in text)


def hostile_mark(out: Folder, **changes: Any) -> None:
    mark = json.loads(out.read("000000.json"))
    out.write("000000.json", seal(mark | changes))


@pytest.mark.parametrize(
    "change",
    [
        {"index": None}, {"index": [1]}, {"index": {"s0-0": None}}, {"index": {"s0-0": {}}}, {"counts": 3},
        {"counts": {"in": 1, "ok": "x", "failed": {}}}, {"tar": None}, {"index": {"s0-0": {"json": [0]}}},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("name", ["show", "list", "stats", "gallery", "forget", "dedup", "verify"])
def test_every_command_answers_a_crafted_mark_with_an_error_message(tmp_path: Path, name: str, change: Any) -> None:
    folder = write_dataset(tmp_path / "data", shards=1)
    hostile_mark(folder, **change)
    arguments = {"show": ["show", "s0-0"], "forget": ["forget", "--key", "s0-0"]}.get(name, [name])
    result = CliRunner().invoke(app, [*arguments, folder.url])
    assert result.exit_code != 0 and isinstance(result.exception, SystemExit | UserError), result.exception
    assert "000000.json" in result.output + str(result.exception)


def test_nothing_of_a_dataset_drives_the_terminal(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "data", shards=1)
    evil = ESCAPES.replace("\ud800", "")
    line = json.dumps({"key": evil, "stage": "read", "reason": evil, "message": evil}) + "\n"
    mark = json.loads(folder.read("000000.json"))
    places = mark["index"]["s0-0"]
    hostile_mark(
        folder,
        index={evil: places | {evil: [0, 1]}, "s0-1": mark["index"]["s0-1"]},
        counts={"in": 3, "ok": 2, "failed": {evil: 1}},
        timings={evil: 1.0},
    )
    folder.write("000000.failed.jsonl", line.encode())
    for arguments in (["show", evil], ["show", "s0-1"], ["list"], ["list", "--keys"], ["list", "--failures"], ["stats"],
                      ["verify"], ["verify", "--quick"], ["show", "no\x1b[2J"], ["select", "--where", "x > 1"]):  # fmt: skip
        run = subprocess.run([sys.executable, "-m", "shards", *arguments, folder.url], capture_output=True, check=False)
        printed = (run.stdout + run.stderr).decode()
        assert "Traceback" not in printed and clean(printed), (arguments, printed)
