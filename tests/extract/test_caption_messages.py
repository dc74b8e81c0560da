"""What the command line says of captions: before the work, at its end, in a plan; and its exit status without any."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from extract.__main__ import app
from extract.workers.cluster import connected
from shards.dataset import Dataset
from tests.support.hostile import encoded, photo

MAPS = ("--estimators", "none", "--no-gallery", "--workers", "1")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with connected("local", 2):
        yield


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Three images: one with a caption, one with a word for nothing, one with a file that is not taken."""
    place = tmp_path / "pictures"
    place.mkdir()
    for name in "abc":
        (place / f"{name}.jpg").write_bytes(encoded(photo(), "JPEG"))
    (place / "a.txt").write_text("a dog")
    (place / "b.txt").write_text("None")
    (place / "c.tags").write_text("dog, grass")
    return place


def said(*arguments: str) -> str:
    """All output of the command, with single spaces: its tables break lines."""
    result = CliRunner().invoke(app, [*arguments, *MAPS])
    assert result.exit_code == 0, f"{result.output}{result.exception}"
    return " ".join(result.output.split())


def test_captions_are_said_before_the_work_and_at_its_end(cluster: None, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    plan = said(str(pictures), "--out", str(out), "--dry-run")
    assert "captions .txt beside the images, 1 of 3; 2 empty ('a dog') not taken: file .tags of 1 input" in plan
    assert not (out / "dataset.json").exists()

    text = said(str(pictures), "--out", str(out))
    before, end = text.split("samples 3 of 3 inputs")
    assert "captions: .txt beside the images, 1 of 3; 2 empty ('a dog')" in before
    assert "not taken: file .tags of 1 input (--set source.caption_suffix=.tags takes it)" in before
    assert "captions 1 of 3 samples have one (.txt beside the images); 2 are empty not taken: file .tags" in end
    dataset = Dataset.open(str(out))
    captions = [dataset.read_at(mark, key, ["txt"]).caption for mark in dataset.marks() for key in mark["index"]]
    assert captions == ["a dog", "", ""]


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_a_dataset_without_captions_is_refused_before_the_work(
    pictures: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    (pictures / "a.txt").unlink()
    command = [sys.executable, "-m", "extract", str(pictures), "--out", str(tmp_path / "out"), *MAPS, *more]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    message = " ".join(result.stderr.split())
    assert "all 3 inputs have no caption" in message and "--set source.captions=none" in message
    assert "source.caption_suffix=.tags takes it" in message
    assert not list((tmp_path / "out").glob("*.json"))


def test_images_without_captions_are_taken_when_asked_for(cluster: None, pictures: Path, tmp_path: Path) -> None:
    text = said(str(pictures), "--out", str(tmp_path / "out"), "--set", "source.captions=none")
    assert text.count('none, as source.captions = "none" asks') == 2  # before the work and at its end
    assert "samples 3 of 3 inputs" in text
