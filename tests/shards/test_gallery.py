"""The gallery is one page without network, safe against what datasets hold; and other tools read the shards."""

import json
import re
import tarfile
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from shards.__main__ import app
from shards.core.storage import Folder
from shards.dataset import Dataset
from shards.inspect.display import colour_table, depth_picture, line_picture, picture, segmentation_picture, sheet
from shards.inspect.gallery import write_gallery
from shards.inspect.verify import verify
from shards.intrinsics import INTRINSICS, IntrinsicMap, encode_png
from tests.support.labelled import maps, members_of, write_dataset

HOSTILE = "</script><script>alert(1)</script><!-- <img src=x onerror=alert(1)> & \u2028 \U0001f600"


def blocks(page: str) -> dict[str, object]:
    found = re.findall(r'<script type="application/json" id="([^"]+)">(.*?)</script>', page, re.DOTALL)
    return {name: json.loads(text) for name, text in found}


def test_the_page_loads_nothing_from_outside(tmp_path: Path) -> None:
    page = Path(write_gallery(write_dataset(tmp_path / "data").url)).read_text()
    assert "default-src 'none'" in page
    assert not re.findall(r"https?://|//[a-z]+\.|@import|<link|src=\"|url\(", page)


def test_hostile_text_reaches_the_page_as_data_only(tmp_path: Path) -> None:
    folder = write_dataset(
        tmp_path / "data", change=lambda key, made: members_of(HOSTILE, quality={HOSTILE: 1.0, "segments": 2.0})
    )
    page = Path(write_gallery(folder.url)).read_text()
    assert HOSTILE not in page and "<script>alert" not in page and "<img src=x" not in page
    assert page.count("<script") == page.count("</script>") == 3 + 4 + 1  # about, index, failures; samples; the code
    assert [entry["caption"] for entry in blocks(page)["index"]] == [HOSTILE] * 4  # type: ignore[attr-defined]
    code = page[page.rindex("<script>") :]
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", code)


def test_metadata_that_nobody_expects_does_not_break_page_or_figures(tmp_path: Path) -> None:
    def change(key: str, made: dict[str, bytes]) -> dict[str, bytes]:
        meta = json.loads(made["json"])
        meta["intrinsics"] |= {"image": ["x"], "quality": {"a": float("nan"), "b": "many", "c": 10**400, "segments": 2}}
        return made | {"json": json.dumps(meta).encode()}

    page = Path(write_gallery(write_dataset(tmp_path / "data", change=change).url)).read_text()
    assert blocks(page)["index"][0]["quality"] == {"segments": 2.0}  # type: ignore[index]
    assert "NaN" not in page and "8 x 6" in page


def test_every_sample_has_its_image_and_four_maps(tmp_path: Path) -> None:
    page = Path(write_gallery(write_dataset(tmp_path / "data").url)).read_text()
    found = blocks(page)
    assert found["about"]["columns"] == ["image", *INTRINSICS]  # type: ignore[index]
    assert found["failures-data"] == [[f"bad-{n}", "decode", "truncated", "the file ends early"] for n in range(2)]
    assert [entry["key"] for entry in found["index"]] == ["s0-0", "s0-1", "s1-0", "s1-1"]  # type: ignore[attr-defined]
    assert all(len(found[f"sample-{i}"]) == 5 and all(found[f"sample-{i}"]) for i in range(4))  # type: ignore[arg-type]


def test_a_page_with_fewer_samples_says_so_and_spreads_them(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "data", shards=3, per_shard=4)
    found = blocks(Path(write_gallery(folder.url, limit=3)).read_text())
    assert "shows 3 samples, spread evenly" in found["about"]["shown"]  # type: ignore[index]
    assert [entry["key"] for entry in found["index"]] == ["s0-0", "s1-0", "s2-0"]  # type: ignore[attr-defined]


def test_forgetting_a_sample_removes_the_page_that_shows_it(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "data")
    page = Path(write_gallery(folder.url))
    result = CliRunner().invoke(app, ["forget", folder.url, "--key", "s0-1"])
    assert result.exit_code == 0 and "1 samples removed" in result.output and not page.exists()
    assert CliRunner().invoke(app, ["gallery", folder.url]).output.strip() == str(page)
    assert "s0-1" not in str(blocks(page.read_text())["index"]) and verify(folder.url).problems == []


# ---- pictures --------------------------------------------------------------------------------------------------------


def test_depth_gets_brighter_towards_the_eye_in_even_steps() -> None:
    grey = cv2.cvtColor(colour_table()[None], cv2.COLOR_RGB2LAB)[0, :, 0].astype(int)
    assert (np.diff(grey) >= -1).all() and grey[-1] - grey[0] > 180
    near, far = np.float32(1), np.float32(9)
    metric = depth_picture(IntrinsicMap(np.array([[near, far]]), {"kind": "metric"}))
    relative = depth_picture(IntrinsicMap(np.array([[far, near]]), {"kind": "relative"}))
    assert metric[0, 0].sum() > metric[0, 1].sum() and (metric == relative).all()


def test_sky_and_invalid_depth_have_colours_of_their_own() -> None:
    shown = depth_picture(IntrinsicMap(np.array([[1, 2, np.inf, np.nan]], np.float32), {"kind": "metric"}))
    table = {tuple(colour) for colour in colour_table().tolist()}
    sky, invalid = tuple(shown[0, 2].tolist()), tuple(shown[0, 3].tolist())
    assert sky not in table and invalid not in table and sky != invalid
    depth_picture(IntrinsicMap(np.full((2, 2), np.nan, np.float32), {"kind": "relative"}))  # nothing to scale by


def test_segments_differ_from_their_neighbours_and_lines_are_dark() -> None:
    ids = np.repeat(np.arange(0, 40, dtype=np.uint16), 4)[None].repeat(3, 0)
    colours = segmentation_picture(IntrinsicMap(ids))[1, 2::4].astype(int)
    assert np.abs(np.diff(colours, axis=0)).sum(axis=1).min() > 30
    assert line_picture(IntrinsicMap(np.array([[0, 1]], np.float32)))[0, :, 0].tolist() == [255, 0]


def test_a_sheet_holds_rows_of_several_sizes_and_missing_maps() -> None:
    image = np.zeros((6, 8, 3), np.uint8)
    all_maps = maps()
    row = sheet([(image, all_maps, "a floor")], 64)
    two = sheet([(image, all_maps, "a floor"), (np.zeros((90, 30, 3), np.uint8), {}, "word " * 400)], 64)
    assert two.height > row.height and two.mode == "RGB"
    assert all(picture(name, item, image).shape == (6, 8, 3) for name, item in all_maps.items())
    with pytest.raises(ValueError, match="at least one row"):
        sheet([])


@pytest.mark.parametrize(("size", "shown"), [((20, 10), (60, 30)), ((21, 10), (21, 10)), ((90, 60), (60, 40))])
def test_a_sheet_enlarges_tiny_pictures_only(size: tuple[int, int], shown: tuple[int, int]) -> None:
    drawn = np.asarray(sheet([(np.full((*size, 3), (255, 0, 0), np.uint8), {}, "red")], 60))
    rows, columns = np.nonzero((drawn == (255, 0, 0)).all(axis=2))
    assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == shown


# ---- other tools -----------------------------------------------------------------------------------------------------

CODES = np.arange(48, dtype=np.uint16).reshape(6, 8) * 1365 + 1  # needs all 16 bits


@pytest.fixture
def deep(tmp_path: Path) -> Folder:
    return write_dataset(tmp_path / "data", change=lambda key, made: made | {"depth.png": encode_png(CODES)})


def as_codes(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(png)))


def test_tarfile_reads_the_shards(deep: Folder) -> None:
    with tarfile.open(Path(deep.url) / "000000.tar") as tar:
        file = tar.extractfile("s0-1.depth.png")
        assert file is not None and (as_codes(file.read()) == CODES).all()


def test_webdataset_reads_the_shards(deep: Folder) -> None:
    import webdataset

    pattern = f"file:{deep.url}/{{000000..000001}}.tar"
    samples = list(webdataset.WebDataset(pattern, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == list(Dataset.open(deep.url).keys())
    assert all((as_codes(sample["depth.png"]) == CODES).all() for sample in samples)
    assert samples[0]["txt"] == b"a floor, 0" and "intrinsics" in json.loads(samples[0]["json"])


def test_hugging_face_datasets_stream_the_shards(deep: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    shards = [f"{deep.url}/{number:06d}.tar" for number in range(2)]
    stream = datasets.load_dataset(
        "webdataset", data_files={"train": shards}, split="train", streaming=True, cache_dir=str(tmp_path / "cache")
    )
    samples = list(stream)
    assert [sample["__key__"].rsplit("/")[-1] for sample in samples] == ["s0-0", "s0-1", "s1-0", "s1-1"]
    assert all((np.asarray(sample["depth.png"]) == CODES).all() for sample in samples)
    assert samples[0]["txt"] == "a floor, 0"
