"""Captions of every source: what is found under which name, what is refused, and what is said of what was not taken."""

import gzip
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from extract.sources import Failure, RawSample, Source
from extract.sources.caption_report import Captioned, CaptionReport
from extract.sources.encodings import table_encoding
from extract.sources.table import open_source
from extract.sources.urls import UrlSource
from shards.core.errors import UsageError
from tests.support.hostile import encoded, photo

JPG = encoded(photo(), "JPEG")
DOG = "a dog"


def folder(path: Path, *images: str) -> Path:
    """A folder with these images."""
    for name in images:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(JPG)
    return path


def put(path: Path, text: str | bytes | Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(text, str | bytes):
        text = json.dumps(text)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())


def tar(path: Path, **members: bytes | str | dict[str, Any]) -> Path:
    """A tar of members by name (a double underscore stands for a dot)."""
    with tarfile.open(path, "w") as file:
        for name, content in members.items():
            content = json.dumps(content) if isinstance(content, dict) else content
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name.replace("__", "."))
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def opened(kind: str, where: Path, **settings: Any) -> Source:
    place = {"folder": {"path": str(where)}, "tars": {"tars": [str(where)]}, "urls": {"tables": str(where)}}
    return open_source({"kind": kind, **place.get(kind, {"dataset": str(where)}), **settings})


def report(source: Source, limit: int | None = None) -> CaptionReport:
    assert isinstance(source, Captioned)
    return source.caption_report(limit)


def outputs(source: Source) -> list[RawSample | Failure]:
    return [output for unit in source.units(1000) for output in source.read(unit)]


def captions(source: Source) -> list[str]:
    """Captions in order; the reason of what failed."""
    return [output.reason if isinstance(output, Failure) else output.caption for output in outputs(source)]


def rows(source: Source) -> list[str]:
    """Captions of a table of URLs in order, and reasons of rows that fail; nothing is downloaded."""
    assert isinstance(source, UrlSource)
    found = [row for unit in source.units(1000) for part in unit.items for row in source._rows(part)]
    return [row.reason if isinstance(row, Failure) else row.caption for row in found]


def urls(count: int) -> list[str]:
    return [f"http://host.example/{number}.jpg" for number in range(count)]


def table(path: Path, caption: pa.Array, **more: Any) -> Path:
    pq.write_table(pa.table({"url": urls(len(caption)), "caption": caption, **more}), path)
    return path


# ---- folders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "suffix",
    [".txt", ".caption", ".text", ".cap", ".captions", ".TXT", ".Caption", ".caption.txt", ".jpg.txt", ".jpg.caption"],
)
def test_files_beside_images_under_all_usual_names(tmp_path: Path, suffix: str) -> None:
    folder(tmp_path, "a.jpg", "b.jpg")
    put(tmp_path / f"a{suffix}", DOG)
    put(tmp_path / f"b{suffix}.gz", gzip.compress(b"a cat"))
    source = opened("folder", tmp_path)
    assert captions(source) == [DOG, "a cat"]
    said = report(source)
    assert (said.inputs, said.filled, said.complete) == (2, 2, True)


def test_json_beside_the_whole_name_of_an_image(tmp_path: Path) -> None:
    folder(tmp_path, "a.jpg", "b.jpg")
    put(tmp_path / "a.jpg.json", {"Alt-Text": ["", DOG], "id": 7})
    put(tmp_path / "b.captions.json", ["", "a cat"])
    first, second = outputs(opened("folder", tmp_path))
    assert isinstance(first, RawSample) and (first.caption, first.meta["id"]) == (DOG, 7)
    assert isinstance(second, RawSample) and second.caption == "a cat"


def test_an_empty_file_gives_way_to_one_with_text(tmp_path: Path) -> None:
    folder(tmp_path, "a.jpg", "b.jpg")
    for name in ("a.txt", "b.txt"):
        put(tmp_path / name, "")
    put(tmp_path / "a.caption", DOG)
    put(tmp_path / "b.json", {"caption": "a cat"})
    assert captions(opened("folder", tmp_path)) == [DOG, "a cat"]


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_tables_of_imagefolders_stand_in_subfolders(tmp_path: Path, suffix: str) -> None:
    for split in ("train", "test"):
        folder(tmp_path, f"{split}/a.jpg")
        fields = [{"file_name": "a.jpg", "text": f"{DOG} of {split}"}]
        name = tmp_path / split / f"metadata.{suffix}"
        if suffix == "parquet":
            pq.write_table(pa.Table.from_pylist(fields), name)
        elif suffix == "jsonl":
            put(name, "".join(json.dumps(row) + "\n" for row in fields))
        else:
            tab = "\t" if suffix == "tsv" else ","
            put(name, "\n".join(tab.join(values) for values in (fields[0], fields[0].values())) + "\n")
    source = opened("folder", tmp_path)
    assert captions(source) == [f"{DOG} of test", f"{DOG} of train"]
    assert "metadata" in " ".join(report(source).lines())


COCO = {
    "images": [{"id": 1, "file_name": "1.jpg"}, {"id": 2, "file_name": "2.jpg"}],
    "annotations": [
        {"image_id": 1, "caption": ""},
        {"image_id": 1, "caption": DOG},
        {"image_id": 2, "caption": "a cat"},
        {"image_id": 1, "caption": "one more"},
    ],
}


def test_annotations_of_coco_caption_the_images_of_their_split(tmp_path: Path) -> None:
    folder(tmp_path, "train2017/1.jpg", "train2017/2.jpg", "val2017/1.jpg")
    put(tmp_path / "annotations" / "captions_train2017.json", COCO)
    put(tmp_path / "annotations" / "captions_val2017.json", {"images": COCO["images"][:1], "annotations": [
        {"image_id": 1, "caption": "a hen"}]})  # fmt: skip
    put(tmp_path / "annotations" / "instances_train2017.json", {"images": [], "annotations": []})
    found = outputs(opened("folder", tmp_path))
    assert [output.caption for output in found if isinstance(output, RawSample)] == [DOG, "a cat", "a hen"]
    assert isinstance(found[0], RawSample) and found[0].meta["captions"] == ["", DOG, "one more"]


@pytest.mark.parametrize(
    "content",
    [
        {"a.jpg": DOG, "b.jpg": ["a cat", "another"]},
        {"a.jpg": {"caption": DOG, "tags": "x"}, "b.jpg": {"caption": "a cat", "tags": "y"}},
        [{"image": "a.jpg", "caption": DOG}, {"image": "b.jpg", "caption": "a cat"}],
    ],
)
def test_one_json_for_all_images(tmp_path: Path, content: Any) -> None:
    folder(tmp_path, "a.jpg", "b.jpg")
    put(tmp_path / "captions.json", content)
    assert captions(opened("folder", tmp_path)) == [DOG, "a cat"]


def test_a_table_whose_names_are_relative_to_the_folder_of_images(tmp_path: Path) -> None:
    folder(tmp_path, "Images/a.jpg", "Images/b.jpg")
    put(tmp_path / "captions.csv", "image,caption\na.jpg,a dog\nb.jpg,a cat\n")
    assert captions(opened("folder", tmp_path)) == [DOG, "a cat"]


@pytest.mark.parametrize(
    ("image", "text"),
    [
        ("images/x/a.jpg", "captions/x/a.txt"),
        ("train/images/a.jpg", "train/labels/a.txt"),
        ("images_512/a.jpg", "text_c10/a.txt"),
        ("x/a.jpg", "prompts/x/a.caption"),
        ("a.jpg", "captions/a.txt"),
    ],
)
def test_captions_in_a_tree_of_their_own(tmp_path: Path, image: str, text: str) -> None:
    folder(tmp_path, image)
    put(tmp_path / text, DOG)
    source = opened("folder", tmp_path)
    assert captions(source) == [DOG]
    assert not report(source).passed_over


def test_the_boxes_of_a_detector_are_no_captions(tmp_path: Path) -> None:
    folder(tmp_path, "images/a.jpg")
    put(tmp_path / "labels" / "a.txt", "0 0.5 0.5 0.25 1e-3\n")
    source = opened("folder", tmp_path)
    assert captions(source) == [""]
    with pytest.raises(UsageError, match=r"(?s)no caption.*labels/a\.txt"):
        report(source).check()


def test_texts_of_other_images_are_never_taken(tmp_path: Path) -> None:
    folder(tmp_path, "photos/1.jpg", "text_images/1.jpg")
    put(tmp_path / "text_images" / "1.txt", DOG)
    assert captions(opened("folder", tmp_path)) == ["", DOG]


def test_what_was_not_taken_is_named_with_the_setting_that_takes_it(tmp_path: Path) -> None:
    folder(tmp_path, "a.jpg", "b.jpg")
    put(tmp_path / "a.tags", "dog, grass")
    put(tmp_path / "b.json", {"blip_score": 0.5, "blip_caption": DOG, "title": 1984})
    source = opened("folder", tmp_path)
    with pytest.raises(UsageError) as error:
        report(source).check()
    message = str(error.value)
    assert "source.captions=none" in message
    assert "source.caption_suffix=.tags" in message
    assert "source.caption_column=blip_caption" in message and "blip_score" not in message
    assert "'title' (a number)" in message
    assert captions(opened("folder", tmp_path, caption_suffix=".tags")) == ["dog, grass", ""]
    assert captions(opened("folder", tmp_path, caption_column="title")) == ["", "1984"]
    report(opened("folder", tmp_path, captions="none")).check()


def test_files_called_in_other_letters_are_told(tmp_path: Path) -> None:
    folder(tmp_path, "IMG_1.JPG", "b.jpg")
    put(tmp_path / "img_1.txt", DOG)
    put(tmp_path / "b.txt", "a cat")
    lines = "\n".join(report(opened("folder", tmp_path)).lines())
    assert "1 of 2; 1 empty" in lines and "img_1.txt" in lines


def test_encodings_of_caption_files(tmp_path: Path) -> None:
    folder(tmp_path, "a.jpg", "b.jpg")
    put(tmp_path / "a.txt", "Café".encode("utf-16"))
    put(tmp_path / "b.txt", "Café".encode("cp1252"))
    assert captions(opened("folder", tmp_path)) == ["Café", "caption_not_utf8"]
    (tmp_path / "a.txt").write_bytes("Кот".encode("cp1251"))
    (tmp_path / "b.txt").write_bytes("шар".encode("cp1251"))
    assert captions(opened("folder", tmp_path, encoding="cp1251")) == ["Кот", "шар"]


def test_gzip_that_unpacks_to_more_than_a_caption_is_a_failure(tmp_path: Path) -> None:
    folder(tmp_path, "a.jpg", "b.jpg")
    put(tmp_path / "a.txt.gz", gzip.compress(bytes(50 << 20)))
    put(tmp_path / "b.txt.gz", gzip.compress(b"a dog")[:-9])
    assert captions(opened("folder", tmp_path)) == ["caption_too_long", "caption_unreadable"]


def test_binary_columns_of_a_folders_table_are_text(tmp_path: Path) -> None:
    folder(tmp_path, "a.jpg", "b.jpg")
    pq.write_table(pa.table({"file": ["a.jpg", "b.jpg"], "caption": [b"a dog", b"caf\xe9"]}), tmp_path / "t.parquet")
    assert captions(opened("folder", tmp_path)) == [DOG, "", "bad_row"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("t.csv", "file,caption,caption\na.jpg,x,y\n", "2 columns called 'caption'"),
        ("t.jsonl", '{"file": "a.jpg", "caption": {"en": "x", "de": "y"}}\n', "caption.en"),
        ("t.jsonl", '{"file": "a.jpg", "caption": true}\n', "'caption'.*bool"),
        ("t.jsonl", '{"file": "a.jpg", "caption": 5}\n', "'caption'.*int64"),
        ("t.csv", "file,caption\na.jpg,красный шар\n".encode("cp1251"), "source.encoding"),
        ("t.csv", "file,caption\na.jpg,x\n".encode("utf-16"), "UTF-16"),
    ],
)
def test_tables_that_cannot_caption_are_refused_by_the_columns_name(
    tmp_path: Path, name: str, content: str | bytes, words: str
) -> None:
    folder(tmp_path, "a.jpg")
    put(tmp_path / name, content)
    with pytest.raises(UsageError, match=words):
        opened("folder", tmp_path).describe()


def test_an_old_dataset_of_a_folder_goes_on(tmp_path: Path) -> None:
    """The description and the units of folders that were read rightly before are what they were."""
    folder(tmp_path, "a.jpg", "b.jpg")
    put(tmp_path / "a.txt", DOG)
    source = opened("folder", tmp_path)
    assert source.describe().keys().isdisjoint({"caption_suffix", "encoding"})
    assert source.describe()["captions"] == "beside"
    (unit,) = source.units(10)
    size = len(JPG)
    assert [tuple(item) for item in unit.items] == [
        ("a.jpg", "a.txt", None, (size, len(DOG), -1), None, None, None),
        ("b.jpg", None, None, (size, -1, -1), None, None, None),
    ]


# ---- tars ------------------------------------------------------------------------------------------------------------


def test_members_and_fields_of_a_tar_under_all_usual_names(tmp_path: Path) -> None:
    fields: list[dict[str, Any]] = [
        {"caption": [DOG, "b"]}, {"caption": {"en": DOG}}, {"captions": [None, " ", DOG]}, {"alt": DOG},
        {"description": DOG}, {"title": DOG}, {"Caption": DOG}, {"ALT_TEXT": DOG}, {"text": "", "prompt": DOG},
        {"captions": [{"raw": DOG, "tokens": ["a", "dog"]}]}, {"caption": 5, "title": DOG},
    ]  # fmt: skip
    texts = {"text": DOG, "cap": DOG, "caption__txt": DOG, "captions__json": DOG, "txt__gz": DOG, "jpg__txt": DOG}
    texts |= {"TXT": DOG, "caption__json": json.dumps({"en": DOG})}
    members: dict[str, Any] = {}
    for number, field in enumerate(fields):
        members |= {f"j{number}__jpg": JPG, f"j{number}__json": field}
    for suffix, text in texts.items():
        members |= {f"m_{suffix.replace('__', '-')}__jpg": JPG, f"m_{suffix.replace('__', '-')}__{suffix}": text}
    members |= {"p__jpg": JPG, "p__txt__gz": gzip.compress(DOG.encode())}
    path = tar(tmp_path / "a.tar", **members)
    found = captions(opened("tars", path))
    assert found == [DOG] * len(found) and len(found) == len(fields) + len(texts) + 1


def test_numbers_are_captions_only_by_name_and_what_is_left_is_told(tmp_path: Path) -> None:
    path = tar(
        tmp_path / "a.tar", a__jpg=JPG, a__json={"caption": 5}, b__jpg=JPG, b__tags="x, y", c__jpg=JPG, c__txt=DOG
    )
    source = opened("tars", path)
    first, second, third = outputs(source)
    assert isinstance(first, RawSample) and first.passed_over == ("field 'caption' (a number)",)
    assert isinstance(second, RawSample) and second.passed_over == ("member .tags",)
    assert isinstance(third, RawSample) and third.caption == DOG
    lines = "\n".join(report(source).lines())
    assert (
        "1 of 3; 2 empty" in lines
        and "source.caption_suffix=.tags" in lines
        and "source.caption_column=caption" in lines
    )
    assert captions(opened("tars", path, caption_column="caption"))[0] == "5"
    assert captions(opened("tars", path, caption_suffix="tags"))[1] == "x, y"
    assert captions(opened("tars", path, captions="none")) == [""] * 3


def test_an_object_of_several_languages_needs_a_name(tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar", a__jpg=JPG, a__json={"caption": {"en": DOG, "de": "ein Hund"}})
    (failure,) = outputs(opened("tars", path))
    assert isinstance(failure, Failure) and failure.reason == "bad_metadata" and "caption.en" in failure.message
    assert captions(opened("tars", path, caption_column="caption.de")) == ["ein Hund"]


def test_captions_of_a_tar_in_a_folder_of_their_own(tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar", **{"x/images/1__jpg": JPG, "x/captions/1__txt": DOG, "x/other/2__txt": "?"})
    assert captions(opened("tars", path)) == [DOG, "no_image"]


def test_a_tar_without_captions_is_refused(tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar", a__jpg=JPG, b__jpg=JPG, b__json={"width": 7})
    with pytest.raises(UsageError, match="all 2 inputs have no caption"):
        report(opened("tars", path)).check()
    report(opened("tars", path, captions="none")).check()


def test_text_of_a_tar_keeps_its_white_space(tmp_path: Path) -> None:
    assert captions(opened("tars", tar(tmp_path / "a.tar", a__jpg=JPG, a__txt=" a dog\n"))) == [" a dog\n"]


def test_an_old_dataset_of_tars_goes_on(tmp_path: Path) -> None:
    described = opened("tars", tar(tmp_path / "a.tar", a__jpg=JPG)).describe()
    assert set(described) == {"kind", "tars", "listing", "keys", "filters"}


# ---- tables of URLs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        (pa.array([b"a dog", b"caf\xe9", None]), [DOG, "caption_not_utf8", ""]),
        (pa.array([b"a dog", b"caf\xe9", None]).view(pa.string()), [DOG, "caption_not_utf8", ""]),
        (pa.array([[None, DOG], [], ["", " ", "a cat"]]), [DOG, "", "a cat"]),
        (pa.array([DOG, "a cat", DOG]).dictionary_encode(), [DOG, "a cat", DOG]),
        (pa.array([[b"\xff"], [b"a dog"], None]), ["caption_not_utf8", DOG, ""]),
        (pa.array([{"en": DOG}, {"en": None}, None]), [DOG, "", ""]),
        (pa.array([DOG, "x" * (65 << 10), "a\0b"]), [DOG, "caption_too_long", "caption_not_utf8"]),
    ],
)
def test_columns_of_odd_types_are_text_or_a_failure_of_their_row(
    tmp_path: Path, caption: pa.Array, expected: list[str]
) -> None:
    assert rows(opened("urls", table(tmp_path / "a.parquet", caption))) == expected


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        (pa.array([{"en": DOG, "de": "x"}]), "'caption'.*struct of en, de.*caption.en"),
        (pa.array([True]), "'caption'.*bool"),
        (pa.array([5]), "'caption'.*int64.*source.caption_column = 'caption'"),
        (pa.array([[{"en": DOG, "de": "x"}]]), "caption.en"),
    ],
)
def test_columns_that_are_no_text_are_refused_by_name(tmp_path: Path, caption: pa.Array, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        list(opened("urls", table(tmp_path / "a.parquet", caption)).units(10))


def test_an_entry_of_a_struct_and_a_number_can_be_named(tmp_path: Path) -> None:
    path = table(tmp_path / "a.parquet", pa.array([{"en": DOG, "de": "ein Hund"}]), number=[5])
    assert rows(opened("urls", path, caption_column="caption.de")) == ["ein Hund"]
    assert rows(opened("urls", path, caption_column="number")) == ["5"]


def test_a_csv_in_another_encoding_is_read_or_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    text = "url,caption\n" + "".join(f"{url},Café à Zürich {n}\n" for n, url in enumerate(urls(3)))
    put(path, text.encode("cp1252"))
    assert rows(opened("urls", path)) == [f"Café à Zürich {n}" for n in range(3)]
    assert "cp1252" in "\n".join(report(opened("urls", path)).lines())
    put(path, text.replace("Café à Zürich", "красный шар").encode("cp1251"))
    with pytest.raises(UsageError, match=r"source.encoding"):
        list(opened("urls", path).units(10))
    named = opened("urls", path, encoding="cp1251")
    assert rows(named) == [f"красный шар {n}" for n in range(3)]
    put(path, text.encode() + b"http://x/4.jpg,caf\xe9\n")
    assert rows(opened("urls", path)) == [*(f"Café à Zürich {n}" for n in range(3)), "caption_not_utf8"]


@pytest.mark.parametrize(
    ("encoding", "text", "expected"),
    [
        ("cp1252", "“it’s” – naïve, 5 €", "cp1252"),
        ("utf-8", "naïve", "utf-8"),
        ("cp1251", "красный шар", ""),
        ("shift_jis", "赤いボール", ""),
        ("gb18030", "红色的球", ""),
        ("cp1250", "zażółć gęślą jaźń", ""),
        ("mac_roman", "Café, Zürich, élève", ""),
        ("euc_kr", "빨간 공", ""),
    ],
)
def test_only_western_text_is_known_by_its_looks(encoding: str, text: str, expected: str) -> None:
    head = f"url,caption\nhttp://x,{text}\n".encode(encoding)
    if expected:
        assert table_encoding(head, None, "t.csv") == expected
    else:
        with pytest.raises(UsageError, match=r"source.encoding"):
            table_encoding(head, None, "t.csv")
    assert table_encoding(head, encoding, "t.csv") == encoding


def test_doubled_columns_are_refused_in_every_form(tmp_path: Path) -> None:
    put(tmp_path / "a.csv", "url,caption,caption\nhttp://x/1.jpg,first,second\n")
    put(tmp_path / "b.tsv", "url\tcaption\turl\nhttp://x/1.jpg\tfirst\thttp://x/2.jpg\n")
    pq.write_table(pa.table([["http://x"], ["a"], ["b"]], names=["url", "caption", "caption"]), tmp_path / "c.parquet")
    for name in ("a.csv", "b.tsv", "c.parquet"):
        with pytest.raises(UsageError, match=r"2 columns called '(caption|url)'"):
            list(opened("urls", tmp_path / name).units(10))
    put(tmp_path / "d.csv", "http://x/1.jpg,first\n")
    with pytest.raises(UsageError, match="2 columns called 'url'"):
        list(opened("urls", tmp_path / "d.csv", header=["url", "url"]).units(10))


def test_nan_is_no_caption_in_planning_nor_in_work(tmp_path: Path) -> None:
    same = ["http://host.example/1.jpg"] * 2
    put(tmp_path / "a.jsonl", "".join(
        json.dumps({"url": url, "caption": caption}) + "\n" for url, caption in zip(same, [float("nan"), DOG], strict=True)
    ))  # fmt: skip
    source = opened("urls", tmp_path / "a.jsonl", filters={"min_caption": 2})
    assert rows(source) == ["filtered_caption_length", DOG]
    assert (report(source).inputs, report(source).filled) == (2, 1)


WORDS_FOR_NOTHING = ("nan", "NaN", "None", "null", "NULL", "<NA>", " nan\n")


def test_words_that_programs_write_for_nothing_are_no_captions(tmp_path: Path) -> None:
    words = [*WORDS_FOR_NOTHING, DOG, "Nan and her dog", "none of them"]
    path = table(tmp_path / "a.parquet", pa.array(words))
    source = opened("urls", path)
    assert rows(source) == ["", "", "", "", "", "", "", DOG, "Nan and her dog", "none of them"]
    assert (report(source).inputs, report(source).filled) == (10, 3)

    place = folder(tmp_path / "files", "a.jpg", "b.jpg", "c.jpg")
    put(place / "a.txt", "None")
    put(place / "b.json", {"caption": "nan", "title": DOG})
    put(place / "c.json", {"caption": ["null", DOG]})
    assert captions(opened("folder", place)) == ["", DOG, DOG]


def test_a_caption_inside_an_object_is_told(tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar", a__jpg=JPG, a__json={"meta": {"caption": DOG, "id": 3}, "other": {"n": 1}})
    with pytest.raises(UsageError, match=r"source\.caption_column=meta\.caption takes it"):
        report(opened("tars", path)).check()
    assert captions(opened("tars", path, caption_column="meta.caption")) == [DOG]


@pytest.mark.parametrize("name", ["captions.txt", "metadata.json1", "my_prompts.ods"])
def test_a_table_under_another_name_is_told(tmp_path: Path, name: str) -> None:
    place = folder(tmp_path / "files", "a.jpg")
    put(place / name, f"file_name,caption\na.jpg,{DOG}\n")
    with pytest.raises(UsageError) as error:
        report(opened("folder", place)).check()
    assert name in str(error.value)
    if name.endswith(".txt"):
        assert f"source.captions={name} takes it" in str(error.value)
        taken = opened("folder", place, captions=name)
        assert captions(taken) == [DOG] and name not in " ".join(report(taken).passed_over)


@pytest.mark.parametrize("content", ["file_name;caption\na.jpg;a dog, brown\n", "file_name\tcaption\na.jpg\ta dog\n"])
def test_a_csv_with_another_separator_is_refused_with_its_first_line(tmp_path: Path, content: str) -> None:
    place = folder(tmp_path / "files", "a.jpg")
    put(place / "captions.csv", content)
    with pytest.raises(UsageError, match=r"its first line is 'file_name[; ]caption', and commas should separate"):
        report(opened("folder", place))


def test_rows_without_their_image_count_as_no_captions(tmp_path: Path) -> None:
    place = folder(tmp_path / "files", "sub/a.JPG", "sub/b.jpg")
    put(place / "captions.csv", f"file_name,caption\nsub/a.jpg,{DOG}\n/elsewhere/sub/b.jpg,a cat\n")
    with pytest.raises(UsageError, match="all 2 inputs have no caption"):
        report(opened("folder", place)).check()
    put(place / "captions.csv", f"file_name,caption\nsub/a.JPG,{DOG}\nsub/c.jpg,a cat\n")
    assert (report(opened("folder", place)).inputs, report(opened("folder", place)).filled) == (2, 1)


def test_paths_of_windows_in_a_table(tmp_path: Path) -> None:
    place = folder(tmp_path / "files", "sub/a.jpg", "sub/b.jpg")
    put(place / "captions.csv", f"file_name,caption\nsub\\a.jpg,{DOG}\n.\\sub\\b.jpg,a cat\n")
    assert captions(opened("folder", place)) == [DOG, "a cat"]
    odd = folder(tmp_path / "odd", "a\\b.jpg")  # a legal name elsewhere
    put(odd / "captions.csv", f"file_name,caption\na\\b.jpg,{DOG}\n")
    assert captions(opened("folder", odd)) == [DOG]


def test_quotes_of_a_tsv_are_told(tmp_path: Path) -> None:
    put(tmp_path / "a.tsv", f'url\tcaption\n{urls(1)[0]}\t"a ""big"" dog"\n')
    assert rows(opened("urls", tmp_path / "a.tsv")) == ['"a ""big"" dog"']
    assert "a.tsv: fields in quotes" in " ".join(report(opened("urls", tmp_path / "a.tsv")).notes)
    put(tmp_path / "b.tsv", f'url\tcaption\n{urls(1)[0]}\t"Sit!" he said\n')
    assert report(opened("urls", tmp_path / "b.tsv")).notes == ()


@pytest.mark.parametrize("first", [b"caf\xe9", b"x" * (65 << 10), b"a\0b"])
def test_a_row_that_fails_does_not_take_the_next_with_its_url_along(tmp_path: Path, first: bytes) -> None:
    same = ["http://host.example/1.jpg"] * 3
    pq.write_table(pa.table({"url": same, "caption": [first, b"a dog", b"again"]}), tmp_path / "a.parquet")
    failed, kept, repeated = rows(opened("urls", tmp_path / "a.parquet"))
    assert failed.startswith("caption_") and kept == DOG and repeated == "filtered_repeated_url"


def test_a_table_without_captions_is_refused(tmp_path: Path) -> None:
    path = table(tmp_path / "a.parquet", pa.array([None, "", " "]), blip_text=[DOG] * 3)
    source = opened("urls", path)
    with pytest.raises(UsageError, match=r"(?s)no caption.*captions=none.*caption_column=blip_text"):
        report(source).check()
    for settings in ({"captions": "none"}, {"caption_column": ""}, {"caption_column": "blip_text"}):
        report(opened("urls", path, **settings)).check()


def test_an_old_dataset_of_urls_goes_on(tmp_path: Path) -> None:
    described = opened("urls", table(tmp_path / "a.parquet", pa.array([DOG]))).describe()
    assert described.keys().isdisjoint({"captions", "encoding"})


# ---- what is said ----------------------------------------------------------------------------------------------------


def test_what_is_said_cannot_play_with_a_terminal(tmp_path: Path) -> None:
    folder(tmp_path, "a.jpg")
    put(tmp_path / "a.txt", "\x1b[2J [bold]" + DOG)
    (line,) = report(opened("folder", tmp_path)).lines()
    assert line.isprintable() and "\\x1b" in line


def test_only_as_many_inputs_as_are_meant_are_looked_at(tmp_path: Path) -> None:
    path = table(tmp_path / "a.parquet", pa.array([None] * 5 + [DOG]))
    report(opened("urls", path)).check()
    with pytest.raises(UsageError, match="all 5 inputs"):
        report(opened("urls", path), limit=5).check()
