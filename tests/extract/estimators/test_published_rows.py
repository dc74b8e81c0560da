"""Every row of the table: a checkpoint in its published format, `python -m extract` over photographs, `verify`.

A dataset takes a row for each map, so rows run together: each depth estimator once, the others beside them in turn.
"""

from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

import pytest
from PIL import Image
from skimage import data as photographs
from typer.testing import CliRunner

from extract.__main__ import app
from extract.estimators.table import ROWS
from extract.workers.cluster import connected
from shards.dataset import Dataset
from shards.inspect.verify import verify
from shards.intrinsics import INTRINSICS
from tests.support.published_rows import WITHOUT, published_row

PICTURES = {"astronaut": (96, 72), "chelsea": (72, 90)}  # width and height


def mixes() -> list[dict[str, str]]:
    """A row for each intrinsic, as often as it takes for every row to appear."""
    of = {name: [row for row in ROWS if row not in WITHOUT and name in ROWS[row].yields] for name in INTRINSICS}
    normals = cycle(row for row in of["normal"] if row not in of["depth"])
    segments, lines = cycle(of["segmentation"]), cycle(of["line"])
    found = []
    for depth in of["depth"]:
        normal = depth if depth in of["normal"] else next(normals)
        found.append({"depth": depth, "normal": normal, "segmentation": next(segments), "line": next(lines)})
    return found


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with connected("local", 1):
        yield


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for name, size in PICTURES.items():
        Image.fromarray(getattr(photographs, name)()).resize(size).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"a photograph of {name}")
    return folder


def test_every_row_has_its_turn() -> None:
    assert {row for mix in mixes() for row in mix.values()} == set(ROWS) - WITHOUT


@pytest.mark.slow
@pytest.mark.parametrize("mix", mixes(), ids=lambda mix: mix["depth"])
def test_rows_run_from_their_published_format_and_the_dataset_verifies(
    cluster: None, mix: dict[str, str], pictures: Path, tmp_path: Path
) -> None:
    chosen = tmp_path / "mix.toml"
    lines = [f'{intrinsic} = "my-{name}"' for intrinsic, name in mix.items()]
    for name in dict.fromkeys(mix.values()):
        row = published_row(name, tmp_path / name)
        lines += [f"[row.my-{name}]", f'like = "{name}"', f'weights = "{row.weights}"']
        lines += [f"settings.{key} = {toml(value)}" for key, value in row.settings.items()]
    chosen.write_text("\n".join(lines))
    out = str(tmp_path / "out")
    result = CliRunner().invoke(app, [str(pictures), "--out", out, "--estimators", str(chosen), "--no-gallery"])
    assert result.exit_code == 0, f"{result.output}{result.exception}"
    assert not verify(out).problems
    dataset = Dataset.open(out)
    samples = [dataset.read_at(mark, key) for mark in dataset.marks() for key in mark["index"]]
    assert len(samples) == len(PICTURES)
    assert all({row.member for row in INTRINSICS.values()} <= set(sample.members) for sample in samples)


def toml(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml(each)}" for key, each in value.items()) + "}"
    return str(value).lower() if isinstance(value, bool) else repr(value)
