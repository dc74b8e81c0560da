"""The figures of a dataset are what one computes by hand."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from shards.__main__ import app
from shards.core.storage import Folder
from shards.dataset import Dataset
from shards.inspect.gallery import write_gallery
from shards.inspect.stats import percentiles, spread, stats
from shards.marks import MarkError, seal
from tests.support.labelled import members_of, write_dataset


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    captions = {"s0-0": b"", "s0-1": b"four", "s1-0": b"sixsix", "s1-1": b"eight888"}
    return write_dataset(tmp_path / "data", change=lambda key, made: made | {"txt": captions[key]})


def test_counts_failures_bytes_and_timings_come_from_all_marks(folder: Folder) -> None:
    found = stats(folder.url)
    assert found["counts"] == {"shards": 2, "in": 6, "ok": 4, "failed": 2, "dropped": 0, "retried": 0}
    assert found["failures"] == {"truncated": 2} and found["timings_s"] == {"unit_s": 3.0}
    assert found["bytes"]["txt"] == 18 and found["bytes_per_sample"]["txt"] == 4.5
    assert found["bytes"]["depth.png"] == 4 * len(members_of()["depth.png"])
    assert found["bytes"]["tars"] == sum(path.stat().st_size for path in Path(folder.url).glob("*.tar"))


def test_captions_and_resolutions(folder: Folder) -> None:
    found = stats(folder.url)
    assert found["decoded"] == 4 and found["resolutions"] == {"8 x 6": 4}
    assert found["captions"] == {"empty": 1, "characters": percentiles([0, 4, 6, 8])}
    assert percentiles([0, 4, 6, 8])["50"] == 5 and percentiles([0, 4, 6, 8])["100"] == 8


def test_the_distribution_of_each_intrinsic(folder: Folder) -> None:
    found = stats(folder.url)["intrinsics"]
    depth = dict(zip(zip(found["depth"]["edges"], found["depth"]["edges"][1:], strict=False),
                     found["depth"]["histogram"], strict=True))  # fmt: skip
    assert depth.pop((2, 5)) == pytest.approx(5 / 6, abs=1e-6) and set(depth.values()) == {0}
    assert found["depth"]["far"] == pytest.approx(1 / 6, abs=1e-6) and found["depth"]["invalid"] == 0
    assert found["normal"]["directions"]["up"] == pytest.approx(5 / 6, abs=1e-6)
    assert found["normal"]["directions"]["facing"] == 0 and found["normal"]["invalid"] == pytest.approx(1 / 6, abs=1e-6)
    assert found["segmentation"]["segments"]["50"] == 2 and found["segmentation"]["segmented"] == 1
    assert found["segmentation"]["largest"] == pytest.approx(5 / 6, abs=1e-6)
    assert found["line"]["density"]["50"] == pytest.approx(1 / 6, abs=1e-6)


def test_the_worst_samples_of_each_score_are_named(tmp_path: Path) -> None:
    scores = {"s0-0": 0.1, "s0-1": 0.4, "s1-0": 0.2, "s1-1": 0.3}
    folder = write_dataset(
        tmp_path / "data",
        change=lambda key, _: members_of(quality={"depth_flatness": scores[key], "depth_range": scores[key]}),
    )
    found = stats(folder.url)["quality"]
    assert [item["key"] for item in found["depth_flatness"]["worst"]] == ["s0-1", "s1-1", "s1-0", "s0-0"]
    assert [item["key"] for item in found["depth_range"]["worst"]] == ["s0-0", "s1-0", "s1-1", "s0-1"]
    assert found["depth_flatness"]["percentiles"]["50"] == pytest.approx(0.25)


def test_a_sample_of_the_samples_is_spread_over_the_dataset(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "data", shards=3, per_shard=4)
    dataset = Dataset.open(folder.url)
    assert [key for _, key in spread(dataset, 3)] == ["s0-0", "s1-0", "s2-0"]
    assert [key for _, key in spread(dataset, 4)] == ["s0-0", "s0-3", "s1-2", "s2-1"]
    assert [key for _, key in spread(dataset, 99)] == list(dataset.keys())
    assert stats(folder.url, sample=5)["decoded"] == 5
    few = stats(folder.url, sample=0)
    assert few["decoded"] == 0 and few["counts"]["ok"] == 12


def test_the_command_says_how_many_were_decoded_and_prints_json(folder: Folder) -> None:
    printed = CliRunner().invoke(app, ["stats", folder.url, "--sample", "2"])
    assert printed.exit_code == 0 and "2 samples, spread evenly" in printed.output
    figures = json.loads(CliRunner().invoke(app, ["stats", folder.url, "--json"]).stdout)
    assert figures == json.loads(json.dumps(stats(folder.url)))


def test_list_and_show(folder: Folder, tmp_path: Path) -> None:
    assert CliRunner().invoke(app, ["list", folder.url, "--keys"]).output.split() == ["s0-0", "s0-1", "s1-0", "s1-1"]
    assert "truncated\tthe file ends early" in CliRunner().invoke(app, ["list", folder.url, "--failures"]).output
    assert CliRunner().invoke(app, ["list", folder.url]).output.startswith("000000\t2\t1\t")
    shown = CliRunner().invoke(app, ["show", "s1-1", folder.url, "--save", str(tmp_path / "sheet.png")])
    assert shown.exit_code == 0 and "eight888" in shown.output
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")


def test_an_empty_dataset_has_figures_too(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "data", per_shard=0)
    found = stats(folder.url)
    assert found["counts"]["ok"] == 0 and found["counts"]["failed"] == 2 and found["intrinsics"] == {}
    assert CliRunner().invoke(app, ["stats", folder.url]).exit_code == 0


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("000001.json", "counts", {"in": 3, "ok": 2, "failed": 1}),
        ("000001.json", "index", {"s1-0": {}, "s1-1": {"txt": [-1, 3]}}),
        ("000001.json", "index", {"s1-0": {"txt": [0, 10**400]}, "s1-1": {"txt": [0, 3]}}),
        ("000001.json", "tar", None),
        ("dataset.json", "members", [["txt"]]),
    ],
)
def test_crafted_marks_are_refused_with_a_sentence(folder: Folder, name: str, field: str, value: object) -> None:
    path = Path(folder.url) / name
    path.write_bytes(seal(json.loads(path.read_bytes()) | {field: value}))
    for look in (stats, write_gallery):
        with pytest.raises(MarkError, match=f"{name}: .*python -m shards verify"):
            look(folder.url)


def test_the_command_line_starts_without_torch() -> None:
    code = "import sys, shards.__main__; sys.exit(any(name in sys.modules for name in ('torch', 'cv2', 'datasets')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
