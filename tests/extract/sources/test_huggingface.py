"""Hugging Face datasets as a source: saved folders, parquet and imagefolders; columns found or named; nothing run."""

import io
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from extract.sources import Failure, RawSample
from extract.sources.filters import Filters
from extract.sources.huggingface import HuggingFaceSource
from shards.core.errors import UsageError, UserError

datasets.disable_progress_bars()


def png(number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((8, 12, 3), number, np.uint8)).save(file, "png")
    return file.getvalue()


def table(rows: int = 7) -> datasets.Dataset:
    columns = {
        "picture": [{"bytes": png(i), "path": None} for i in range(rows)],
        "text": [f"caption {i}" for i in range(rows)],
        "score": [i / 10 for i in range(rows)],
    }
    kinds = {"picture": datasets.Image(), "text": datasets.Value("string"), "score": datasets.Value("float64")}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))


def read(source: HuggingFaceSource, limit: int | None = None) -> list[RawSample | Failure]:
    return [output for unit in source.units(3, limit) for output in source.read(unit)]


@pytest.mark.parametrize("form", ["saved", "parquet", "stream", "imagefolder"])
def test_every_row_arrives_with_its_bytes_caption_and_fields(tmp_path: Path, form: str) -> None:
    folder = tmp_path / "data"
    if form == "saved":
        table().save_to_disk(folder)
    elif form == "imagefolder":
        folder.mkdir()
        for i in range(7):
            (folder / f"{i}.png").write_bytes(png(i))
        rows = "".join(f"{i}.png,caption {i},{i / 10}\n" for i in range(7))
        (folder / "metadata.csv").write_text("file_name,text,score\n" + rows)
    else:
        for i, part in enumerate((table(7).select(range(4)), table(7).select(range(4, 7)))):
            part.to_parquet(folder / f"{i}.parquet")
    source = HuggingFaceSource(str(folder), streaming=form == "stream")
    outputs = read(source)
    assert all(isinstance(output, RawSample) for output in outputs)
    assert [output.caption for output in outputs] == [f"caption {i}" for i in range(7)]  # type: ignore[union-attr]
    assert [output.image for output in outputs] == [png(i) for i in range(7)]  # type: ignore[union-attr]
    assert [output.meta["score"] for output in outputs] == [i / 10 for i in range(7)]  # type: ignore[union-attr]
    assert len({output.key for output in outputs}) == 7
    assert source.total() == (None if form == "stream" else 7)
    assert [output.key for output in read(source, limit=5)] == [output.key for output in outputs[:5]]


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_are_filtered_by_their_columns(tmp_path: Path, streaming: bool) -> None:
    (tmp_path / "data").mkdir()
    table().to_parquet(tmp_path / "data" / "0.parquet")
    filters = Filters(min_aesthetic=0.25, aesthetic_column="score", max_caption=9)
    outputs = read(HuggingFaceSource(str(tmp_path / "data"), streaming=streaming, filters=filters))
    reasons = [output.reason if isinstance(output, Failure) else "ok" for output in outputs]
    assert reasons == ["filtered_aesthetic"] * 3 + ["ok"] * 4
    missing = HuggingFaceSource(str(tmp_path / "data"), streaming=streaming, filters=Filters(max_unsafe=0.5))
    with pytest.raises(UsageError, match="unsafe_column"):
        read(missing)


def test_the_split_and_columns_must_exist(tmp_path: Path) -> None:
    datasets.DatasetDict({"train": table()}).save_to_disk(tmp_path / "d")
    assert len(read(HuggingFaceSource(str(tmp_path / "d")))) == 7
    for wrong, message in (
        ({"split": "test"}, "no split 'test'; it has train"),
        ({"image": "photo"}, "no column 'photo'; it has picture, text, score"),
        ({"caption": "words"}, "no column 'words'"),
    ):
        with pytest.raises(UsageError, match=message):
            read(HuggingFaceSource(str(tmp_path / "d"), **wrong))


def test_a_table_without_an_image_column_asks_for_its_name(tmp_path: Path) -> None:
    table().remove_columns("picture").save_to_disk(tmp_path / "d")
    with pytest.raises(UsageError, match=r"name the image column .* its columns are text, score"):
        read(HuggingFaceSource(str(tmp_path / "d")))


def test_a_row_cannot_name_a_file_outside_its_dataset(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png(1))
    rows = [{"picture": {"bytes": None, "path": str(tmp_path / "secret.png")}}, {"picture": None}]
    (tmp_path / "d").mkdir()
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema({"picture": kind})), tmp_path / "d" / "0.parquet")
    outside, empty = read(HuggingFaceSource(str(tmp_path / "d"), image="picture"))
    assert isinstance(outside, Failure) and outside.reason == "outside"
    assert isinstance(empty, Failure) and empty.reason == "no_image"


def test_a_dataset_that_is_not_there_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="cannot be loaded"):
        read(HuggingFaceSource("nobody/nothing"))


# ---- captions of other types -----------------------------------------------------------------------------------------


DOG = "a dog"


def saved(path: Path, feature: Any, values: list[Any], name: str = "caption") -> str:
    images = [{"bytes": png(1), "path": None}] * len(values)
    features = datasets.Features({"image": datasets.Image(), name: feature})
    datasets.Dataset.from_dict({"image": images, name: values}, features=features).save_to_disk(path)
    return str(path)


def captions(dataset: str, **settings: Any) -> list[str]:
    outputs = read(HuggingFaceSource(dataset, **settings))
    return [output.reason if isinstance(output, Failure) else output.caption for output in outputs]


@pytest.mark.parametrize(
    ("feature", "values", "expected"),
    [
        (datasets.Value("binary"), [b"a dog", b"caf\xe9"], [DOG, "caption_not_utf8"]),
        (datasets.Value("large_string"), [DOG, None], [DOG, ""]),
        (datasets.ClassLabel(names=["a cat", DOG]), [1, 0], [DOG, "a cat"]),
        (datasets.List(datasets.Value("string")), [[None, "", DOG], []], [DOG, ""]),
        ({"en": datasets.Value("string")}, [{"en": DOG}, {"en": ""}], [DOG, ""]),
        (datasets.List({"raw": datasets.Value("string")}), [[{"raw": DOG}], []], [DOG, ""]),
    ],
)
def test_columns_of_hugging_face_of_other_types(
    tmp_path: Path, feature: Any, values: list[Any], expected: list[str]
) -> None:
    assert captions(saved(tmp_path / "d", feature, values)) == expected


def test_columns_of_hugging_face_that_are_refused_or_named(tmp_path: Path) -> None:
    two = {"en": datasets.Value("string"), "de": datasets.Value("string")}
    path = saved(tmp_path / "two", two, [{"en": DOG, "de": "ein Hund"}])
    with pytest.raises(UsageError, match=r"source.caption = 'caption.en'"):
        HuggingFaceSource(path).caption_report()
    assert captions(path, caption="caption.de") == ["ein Hund"]
    number = saved(tmp_path / "number", datasets.Value("int64"), [5])
    with pytest.raises(UsageError, match="int64"):
        HuggingFaceSource(number).caption_report()
    assert captions(number, caption="caption") == ["5"]


def test_a_hugging_face_dataset_without_captions_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "d", datasets.ClassLabel(names=["cat", "dog"]), [0, 1], "label")
    with pytest.raises(UsageError, match=r"(?s)no caption.*source.caption=label"):
        HuggingFaceSource(path).caption_report().check()
    assert captions(path, caption="label") == ["cat", "dog"]
    HuggingFaceSource(path, captions="none").caption_report().check()
