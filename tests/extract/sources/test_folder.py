"""A folder of images as a source: what counts, in which order, under which keys, and with which captions."""

import json
import os
import pickle
import re
import tomllib
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from extract.images.prepare import ImageRules
from extract.sources import Failure, RawSample
from extract.sources.filters import Filters
from extract.sources.folder import FolderSource, key_of
from extract.sources.table import open_source, resolve, settings_of
from shards.core.config import load_config
from shards.core.errors import UsageError
from shards.marks import digest
from shards.sample import KEY
from tests.support.hostile import encoded, photo

JPG = encoded(photo(), "JPEG")


def fill(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(JPG)


def outputs(source: FolderSource, shard_size: int = 2) -> list[RawSample | Failure]:
    return [output for unit in source.units(shard_size) for output in source.read(pickle.loads(pickle.dumps(unit)))]


def by_file(source: FolderSource) -> dict[str, Any]:
    """Caption by file, or reason by key for what failed."""
    return {o.reason if isinstance(o, Failure) else o.meta["file"]: getattr(o, "caption", "") for o in outputs(source)}


def jsonl(*rows: dict[str, Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


# ---- what counts, and in which order ---------------------------------------------------------------------------------


def test_images_are_found_by_name_in_every_subfolder_in_the_order_of_their_paths(tmp_path: Path) -> None:
    names = ["a/z.jpg", "a.jpg", "a-b.png", "B.JPEG", "a/b/c.webp", "a0.gif", ".hidden/x.tiff"]
    fill(tmp_path, *names, "a/readme.md", "notes.txt", "jpg")
    files = [output.meta["file"] for output in outputs(FolderSource(str(tmp_path)))]  # type: ignore[union-attr]
    assert files == sorted(names, key=str.encode)


@given(st.lists(st.lists(st.sampled_from(["a", "a-", "a0", "b", "B", "é"]), min_size=1, max_size=4), max_size=12))
@settings(max_examples=30, deadline=None)
def test_the_order_is_that_of_whole_paths_for_any_tree(
    tmp_path_factory: pytest.TempPathFactory, paths: list[list[str]]
) -> None:
    folder = tmp_path_factory.mktemp("tree")
    names = {"/".join(path) + ".jpg" for path in paths} | {"x.jpg"}
    fill(folder, *names)
    found = [item.path.encode("latin-1") for unit in FolderSource(str(folder)).units(3) for item in unit.items]
    assert found == sorted(name.encode() for name in names)


def test_units_are_stable_small_and_cut_by_size_and_limit(tmp_path: Path) -> None:
    fill(tmp_path, *(f"{i:03}.jpg" for i in range(10)))
    source = FolderSource(str(tmp_path))
    units = list(source.units(4))
    assert [(unit.index, len(unit.items)) for unit in units] == [(0, 4), (1, 4), (2, 2)]
    assert units == list(source.units(4)) == list(FolderSource(str(tmp_path)).units(4))
    assert [len(unit.items) for unit in source.units(4, limit=5)] == [4, 1]
    assert list(source.units(4, limit=0)) == []
    assert source.total() == 10
    assert len(pickle.dumps(units[0])) < 1000
    assert digest({"items": units[0].items}) == digest({"items": next(iter(source.units(4))).items})
    (tmp_path / "001.jpg").write_bytes(JPG + b"!")
    changed = list(source.units(4))
    assert changed[0] != units[0] and changed[1:] == units[1:]
    assert pickle.loads(pickle.dumps(source)) == source


def test_a_folder_that_changed_describes_itself_differently(tmp_path: Path) -> None:
    def describe() -> dict[str, Any]:
        return json.loads(json.dumps(FolderSource(str(tmp_path)).describe()))

    fill(tmp_path, "a.jpg", "b.jpg")
    before = describe()
    assert describe() == before and before["inputs"] == 2
    os.utime(tmp_path / "a.jpg", (1, 1))  # a copy of the folder is the same folder
    assert describe() == before
    seen = [before]
    for change in (
        lambda: (tmp_path / "a.txt").write_text("caption"),
        lambda: (tmp_path / "a.txt").write_text("longer caption"),
        lambda: (tmp_path / "a.jpg").write_bytes(JPG + b"!"),
        lambda: (tmp_path / "b.jpg").rename(tmp_path / "c.jpg"),
        lambda: fill(tmp_path, "d.jpg"),
    ):
        change()
        assert describe() not in seen
        seen.append(describe())


def test_folders_without_images_or_that_do_not_exist_are_usage_errors(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing to see")
    with pytest.raises(UsageError, match="no images"):
        FolderSource(str(tmp_path)).describe()
    with pytest.raises(UsageError, match="does not exist"):
        FolderSource(str(tmp_path / "nowhere")).describe()
    with pytest.raises(UsageError, match="is a file"):
        list(FolderSource(str(tmp_path / "notes.txt")).units(2))


def test_a_file_that_goes_away_after_planning_is_a_failure(tmp_path: Path) -> None:
    fill(tmp_path, "a.jpg", "b.jpg")
    source = FolderSource(str(tmp_path))
    units = list(source.units(2))
    (tmp_path / "a.jpg").unlink()
    first, second = (output for unit in units for output in source.read(unit))
    assert isinstance(first, Failure) and (first.stage, first.reason) == ("read", "missing_file")
    assert isinstance(second, RawSample)


# ---- captions beside the images --------------------------------------------------------------------------------------


def test_captions_come_from_txt_then_json_and_other_fields_are_kept(tmp_path: Path) -> None:
    fill(tmp_path, "a.jpg", "b.jpg", "c.jpg", "d.JPG", "e.jpg", "deep/f.jpg")
    (tmp_path / "a.txt").write_text("  from the text \n")
    (tmp_path / "a.json").write_text(json.dumps({"caption": "not this", "width": 7}))
    (tmp_path / "b.json").write_text(json.dumps({"TEXT": "upper case", "tags": ["x", {"y": None}]}))
    (tmp_path / "c.json").write_text(json.dumps({"captions": 1, "text": ["first", "second"]}))
    (tmp_path / "d.TXT").write_text("old habits")
    (tmp_path / "deep" / "f.txt").write_text("tief\nunten")
    samples = {o.meta["file"]: o for o in outputs(FolderSource(str(tmp_path))) if isinstance(o, RawSample)}
    assert {name: sample.caption for name, sample in samples.items()} == {
        "a.jpg": "from the text",
        "b.jpg": "upper case",
        "c.jpg": "first",
        "d.JPG": "old habits",
        "e.jpg": "",
        "deep/f.jpg": "tief\nunten",
    }
    assert samples["a.jpg"].meta == {"caption": "not this", "width": 7, "file": "a.jpg"}
    assert samples["b.jpg"].meta == {"TEXT": "upper case", "tags": ["x", {"y": None}], "file": "b.jpg"}
    assert samples["a.jpg"].image == JPG


def test_a_field_can_be_named_and_captions_can_be_left_out(tmp_path: Path) -> None:
    fill(tmp_path, "a.jpg")
    (tmp_path / "a.json").write_text(json.dumps({"caption": "short", "long_caption": "long"}))
    assert by_file(FolderSource(str(tmp_path), caption_column="long_caption")) == {"a.jpg": "long"}
    assert by_file(FolderSource(str(tmp_path), captions="none")) == {"a.jpg": ""}


# ---- captions in a table ---------------------------------------------------------------------------------------------

ROWS = [
    {"file_name": "b.jpg", "text": 'says "b", twice\nand more', "width": 7},
    {"file_name": "./deep/c.jpg", "text": "c", "width": 8},
    {"file_name": "gone.jpg", "text": "gone", "width": 9},
    {"file_name": "no_suffix", "text": "named by the table alone", "width": 10},
]


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_one_table_at_the_top_is_found_and_joined(tmp_path: Path, suffix: str) -> None:
    fill(tmp_path, "a.jpg", "b.jpg", "deep/c.jpg", "no_suffix")
    table = tmp_path / f"captions.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), table)
    elif suffix == "jsonl":
        table.write_text(jsonl(*ROWS))
    else:
        tab = "\t" if suffix == "tsv" else ","
        quoted = [[str(value).replace('"', '""') for value in row.values()] for row in ROWS]
        lines = [tab.join(f'"{value}"' for value in row) for row in [list(ROWS[0]), *quoted]]
        table.write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8")
    found = outputs(FolderSource(str(tmp_path)))
    assert len(found) == 5
    samples = {output.meta["file"]: output for output in found if isinstance(output, RawSample)}
    assert {name: sample.caption for name, sample in samples.items()} == {
        "a.jpg": "",
        "b.jpg": 'says "b", twice\nand more',
        "deep/c.jpg": "c",
        "no_suffix": "named by the table alone",
    }
    width = "7" if suffix in ("csv", "tsv") else 7  # a csv has no types: fields stay as they stand there
    assert samples["b.jpg"].meta == {**ROWS[0], "width": width, "file": "b.jpg"}
    assert samples["a.jpg"].meta == {"file_name": None, "text": None, "width": None, "file": "a.jpg"}
    (failure,) = (output for output in found if isinstance(output, Failure))
    assert failure.reason == "missing_file" and "gone.jpg" in failure.message


def test_rows_that_cannot_be_used_are_counted_one_by_one(tmp_path: Path) -> None:
    fill(tmp_path, "a.jpg")
    (tmp_path / "t.csv").write_bytes(
        b"path,caption\na.jpg,one\na.jpg,two\n,nameless\ntoo,many,values\n../../etc/passwd,out\n"
        b"b.jpg,caf\xc3\xa9 caf\xc3\xa9 caf\xe9\n" + b"c.jpg," + b"x" * (2 << 20) + b"\n"
    )
    fill(tmp_path, "b.jpg")
    reasons = [output.reason for output in outputs(FolderSource(str(tmp_path))) if isinstance(output, Failure)]
    assert sorted(set(reasons)) == ["bad_row", "caption_not_utf8", "duplicate_row", "missing_file"]
    keys = [output.key for output in outputs(FolderSource(str(tmp_path)))]
    assert len(keys) == len(set(keys)) and all(KEY.match(key) for key in keys)
    (tmp_path / "t.csv").unlink()
    (tmp_path / "t.jsonl").write_text('{"file": "a.jpg", "caption": "one"}\n{"file": \n[1]\n{"caption": "x"}\n\n')
    reasons = [output.reason for output in outputs(FolderSource(str(tmp_path))) if isinstance(output, Failure)]
    assert reasons == ["bad_row", "bad_row", "bad_row"]


@pytest.mark.parametrize("beside", [True, False])
def test_images_are_filtered_by_their_fields_and_captions_before_they_are_read(tmp_path: Path, beside: bool) -> None:
    fields = [("a", 6.6, "fine"), ("b", 6.4, "low"), ("c", None, "none"), ("d", 7.0, "x"), ("e", 5.0, "not even there")]
    fill(tmp_path, *(f"{name}.jpg" for name, _, _ in fields[:4]))
    rows = {f"{name}.jpg": {"aesthetic": score, "caption": caption} for name, score, caption in fields}
    if beside:
        for name, row in rows.items():
            (tmp_path / name).with_suffix(".json").write_text(json.dumps(row))
    else:
        (tmp_path / "t.jsonl").write_text(jsonl(*({"file": name, **row} for name, row in rows.items())))

    def found(**filters: Any) -> list[str]:
        source = open_source({"kind": "folder", "path": str(tmp_path), "filters": filters})
        return [o.reason if isinstance(o, Failure) else "ok" for unit in source.units(9) for o in source.read(unit)]

    low = "filtered_aesthetic"
    assert found()[:4] == ["ok"] * 4
    assert found(min_aesthetic=6.5) == ["ok", low, low, "ok"] + ([] if beside else [low])
    assert found(min_aesthetic=6.5, missing="keep", min_caption=2)[:4] == ["ok", low, "ok", "filtered_caption_length"]
    described = [FolderSource(str(tmp_path), filters=Filters(min_caption=n)).describe() for n in (1, 2)]
    assert described[0] != described[1], "filters choose the samples, so they are a part of the dataset's identity"
    if not beside:
        with pytest.raises(UsageError, match="needs the column similarity"):
            found(min_similarity=0.3)


def test_absolute_paths_inside_the_folder_are_understood(tmp_path: Path) -> None:
    fill(tmp_path, "a.jpg")
    (tmp_path / "t.jsonl").write_text(jsonl({"path": str(tmp_path / "a.jpg"), "caption": "absolute"}))
    assert by_file(FolderSource(str(tmp_path))) == {"a.jpg": "absolute"}


@pytest.mark.parametrize(
    ("files", "given_settings", "words"),
    [
        ({"a.csv": "file,text\n", "b.jsonl": ""}, {}, "2 tables"),
        ({"a.csv": "name,text\nx,y\n"}, {}, "names the image files"),
        ({"a.csv": "file,path,text\nx,y,z\n"}, {}, "several columns"),
        ({"a.csv": "file,text,caption\nx,y,z\n"}, {}, "several columns"),
        ({"a.csv": "file,text\nx.jpg,y\n", "x.txt": "beside"}, {}, "also beside"),
        ({"a.csv": "file,text\nx,y\n"}, {"captions": "b.csv"}, "has no table b.csv"),
        ({"a.csv": "file,text\nx,y\n"}, {"captions": "everywhere"}, "neither"),
        ({"a.csv": "file,text\nx,y\n"}, {"caption_column": "words"}, "no column 'words'"),
        ({"a.parquet": "not parquet"}, {}, "cannot be read as parquet"),
    ],
)
def test_what_is_ambiguous_or_wrong_is_a_usage_error_that_says_what_to_do(
    tmp_path: Path, files: dict[str, str], given_settings: dict[str, str], words: str
) -> None:
    fill(tmp_path, "x.jpg")
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=words):
        FolderSource(str(tmp_path), **given_settings).describe()  # type: ignore[arg-type]


def test_a_choice_settles_what_is_ambiguous(tmp_path: Path) -> None:
    fill(tmp_path, "x.jpg")
    (tmp_path / "a.csv").write_text("file,text\nx.jpg,from a\n")
    (tmp_path / "b.csv").write_text("image,file,words,text\nx.png,x.jpg,from b,no\n")
    (tmp_path / "x.txt").write_text("beside")
    folder = str(tmp_path)
    assert by_file(FolderSource(folder, "a.csv")) == {"x.jpg": "from a"}
    assert by_file(FolderSource(folder, "b.csv", file_column="file", caption_column="words")) == {"x.jpg": "from b"}
    assert by_file(FolderSource(folder, "beside")) == {"x.jpg": "beside"}


# ---- keys ------------------------------------------------------------------------------------------------------------


@given(st.lists(st.binary(min_size=1, max_size=300).filter(lambda path: b"\0" not in path), max_size=40, unique=True))
@settings(max_examples=300, deadline=None)
def test_keys_are_legal_short_and_unique_for_any_paths(paths: list[bytes]) -> None:
    keys = [key_of(path) for path in paths]
    assert all(KEY.match(key) and len(key) <= 80 for key in keys)
    assert len(set(keys)) == len(paths)
    assert keys == [key_of(path) for path in paths]


def test_keys_are_readable() -> None:
    assert key_of(b"holiday/IMG_0042.jpg").startswith("holiday_IMG_0042-")
    assert key_of("Übung/café au lait.png".encode()).startswith("Ubung_cafe_au_lait-")
    assert key_of("\u7167\u7247.jpg".encode()).startswith("image-")
    assert key_of(b"x" * 100 + b"_end.jpg").split("-")[0].endswith("_end")


# ---- other places, and the table of kinds ----------------------------------------------------------------------------


def test_a_folder_in_an_object_store_gives_what_a_local_one_gives(tmp_path: Path) -> None:
    fill(tmp_path, "a.jpg", "b/c é.png", "b/a.webp")
    (tmp_path / "a.txt").write_text("caption")
    (tmp_path / "b" / "a.json").write_text('{"caption": "json"}')
    (tmp_path / "b" / "large.jpg").write_bytes(bytes(5000))
    fs = fsspec.filesystem("memory")
    fs.put(str(tmp_path), "/bucket/images", recursive=True)
    local = FolderSource(str(tmp_path), max_bytes=4000)
    remote = FolderSource("memory://bucket/images", max_bytes=4000)
    assert outputs(local) == outputs(remote)
    assert {**local.describe(), "place": ""} == {**remote.describe(), "place": ""}
    (tmp_path / "t.csv").write_text("file,caption\na.jpg,x\nnone.jpg,y\n")
    fs.put(str(tmp_path / "t.csv"), "/bucket/images/t.csv")
    assert outputs(FolderSource(str(tmp_path), "t.csv")) == outputs(FolderSource("memory://bucket/images", "t.csv"))
    fs.rm("/bucket", recursive=True)


def test_an_object_store_that_fails_is_a_failure_of_the_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe("/shaky/a.jpg", JPG)
    source = FolderSource("memory://shaky")
    units = list(source.units(2))

    def refuse(*_: object, **__: object) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(fs), "cat_file", refuse)
    (output,) = source.read(units[0])
    assert isinstance(output, Failure) and output.reason == "unreadable"
    fs.rm("/shaky", recursive=True)


def test_a_folder_that_cannot_be_listed_is_a_failure_and_not_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, "a.jpg", "private/b.jpg")
    scandir = os.scandir

    def guarded(path: Path) -> Any:
        if Path(path).name == "private":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    sample, failure = outputs(FolderSource(str(tmp_path)))
    assert isinstance(sample, RawSample)
    assert isinstance(failure, Failure) and failure.reason == "unreadable" and "listed" in failure.message


def test_data_arguments_stand_for_sources(tmp_path: Path) -> None:
    fill(tmp_path / "photos", "a.jpg")
    (tmp_path / "photos" / "backup.tar").write_bytes(b"")
    fill(tmp_path / "downloaded", "00000.tar", "00000.parquet")
    fill(tmp_path / "saved", "dataset_info.json")
    assert settings_of(str(tmp_path / "photos")) == {"kind": "folder", "path": str(tmp_path / "photos")}
    assert settings_of("s3://bucket/photos") == {"kind": "folder", "path": "s3://bucket/photos"}
    assert settings_of("x/{00..12}.tar") == {"kind": "tars", "tars": ["x/{00..12}.tar"]}
    assert settings_of(str(tmp_path / "downloaded")) == {"kind": "tars", "tars": [f"{tmp_path}/downloaded/*.tar"]}
    assert settings_of(str(tmp_path / "saved")) == {"kind": "huggingface", "dataset": str(tmp_path / "saved")}
    assert settings_of("laion") is None
    fill(tmp_path / "laion-art", "part-0.parquet", "part-1.parquet")
    assert settings_of(str(tmp_path / "laion-art")) == {"kind": "urls", "tables": str(tmp_path / "laion-art")}
    assert settings_of("s3://bucket/part-0.parquet") == {"kind": "urls", "tables": "s3://bucket/part-0.parquet"}
    fill(tmp_path / "with_table", "captions.csv", "images/a.jpg")
    assert settings_of(str(tmp_path / "with_table")) == {"kind": "folder", "path": str(tmp_path / "with_table")}


def test_sources_are_opened_by_kind_with_checked_settings(tmp_path: Path) -> None:
    source = open_source({"kind": "folder", "path": str(tmp_path), "captions": "none"})
    assert source == FolderSource(str(tmp_path), captions="none")
    assert resolve({"kind": "folder", "path": "x"})["captions"] == "auto"
    demo = open_source({"kind": "demo", "count": 3})
    assert demo.total() == 3 and resolve({"kind": "demo", "count": 3})["seed"] == 0
    for wrong in ({"kind": "fold"}, {}, {"kind": "folder"}, {"kind": "folder", "path": "x", "capshuns": "none"}):
        with pytest.raises(UsageError):
            open_source(wrong)


def test_the_recipe_in_the_documentation_names_settings_that_exist(tmp_path: Path) -> None:
    page = (Path(__file__).parents[3] / "docs" / "sources.md").read_text(encoding="utf-8")
    example = page.partition("```toml\n")[2].partition("```")[0]
    everything = re.sub(r"^# (\w+ = )", r"\1", example, flags=re.MULTILINE)  # what is commented out, too
    for text in (example, everything):
        tables = tomllib.loads(text)
        source, rules = open_source(tables["source"]), load_config(ImageRules, tables["image"])
        assert rules == ImageRules() and isinstance(source, FolderSource)
        assert (source.max_bytes, source.max_caption_bytes) == (FolderSource("x").max_bytes, 64 << 10)
