"""Deduplication over shards: of equal images the first stays, whoever dies on the way."""

from pathlib import Path

from typer.testing import CliRunner

from shards.__main__ import app
from shards.core.storage import Folder
from shards.dataset import Dataset
from shards.edit.dedup import dedup
from shards.edit.forget import Forgotten, forget
from shards.inspect.stats import stats
from shards.inspect.verify import verify
from shards.intrinsics import encode_png
from tests.support.labelled import write_dataset

SHADES = {"s0-0": 1, "s0-1": 2, "s1-0": 2, "s1-1": 3, "s2-0": 1, "s2-1": 3, "s3-0": 4, "s3-1": 5}


def dataset(path: Path) -> Folder:
    import numpy as np

    def image(key: str, made: dict[str, bytes]) -> dict[str, bytes]:
        return made | {"png": encode_png(np.full((6, 8, 3), SHADES[key], np.uint8))}

    return write_dataset(path, shards=4, change=image)


def test_of_equal_images_the_first_stays_and_other_shards_are_not_touched(tmp_path: Path) -> None:
    folder = dataset(tmp_path / "d")
    untouched = {name: folder.read(name) for name in folder.list() if name[:6] in ("000000", "000003")}
    shown = CliRunner().invoke(app, ["dedup", folder.url])
    assert shown.exit_code == 0 and "3 repeated samples removed; 2 shards" in shown.output
    assert list(Dataset.open(folder.url).keys()) == ["s0-0", "s0-1", "s1-1", "s3-0", "s3-1"]
    assert verify(folder.url).problems == []
    assert {name: folder.read(name) for name in untouched} == untouched
    figures = stats(folder.url, sample=0)
    assert figures["drops"] == {"forgotten": 3} and figures["counts"]["in"] == 12
    after = {name: folder.read(name) for name in folder.list()}
    assert dedup(folder.url).samples == 0 and {name: folder.read(name) for name in folder.list()} == after


def test_a_run_that_died_between_two_shards_is_finished_by_the_next(tmp_path: Path) -> None:
    whole, half = dataset(tmp_path / "whole"), dataset(tmp_path / "half")
    dedup(whole.url)
    forget(half.url, Forgotten.of(keys=["s1-0"]))  # all that a killed run had done
    dedup(half.url)
    names = [name for name in whole.list() if name.endswith((".tar", ".failed.jsonl"))]
    assert all(whole.read(name) == half.read(name) for name in names)
    assert whole.read("forgotten.json") == half.read("forgotten.json")
