"""`python -m extract` with pretrained estimators, tiny ones in their published formats, over photographs."""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data as photographs
from typer.testing import CliRunner

from extract.__main__ import app
from extract.estimators.table import find_set, load, tasks_of
from extract.images.prepare import ImageRules
from extract.run.make_shard import Loaded, UnitWork, make_shard
from extract.sources import RawSample, Unit
from extract.workers.cluster import connected
from shards.core.storage import Folder
from shards.dataset import Dataset
from shards.inspect.verify import verify
from shards.intrinsics import INTRINSICS, IntrinsicMap
from tests.support.tiny_estimators import ROWS as TINY

FIRST = {"depth": "depth-anything-v2-small", "normal": "tipsv2", "segmentation": "eomt", "line": "teed"}
SECOND = {"depth": "dpt-large", "normal": "tipsv2", "segmentation": "eomt", "line": "hed"}


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with connected("local", 1):
        yield


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    for name in {*FIRST.values(), *SECOND.values()}:
        TINY[name][0](folder / name)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for name in ("astronaut", "chelsea", "coffee"):
        Image.fromarray(getattr(photographs, name)()).resize((96, 72)).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"a photograph of {name}")
    return folder


def mix(path: Path, rows: dict[str, str], checkpoints: Path) -> str:
    """A .toml with tiny checkpoints for these rows."""
    lines = [f'{intrinsic} = "tiny-{name}"' for intrinsic, name in rows.items()]
    for name in sorted(set(rows.values())):
        lines += [f"[row.tiny-{name}]", f'like = "{name}"', f'weights = "{checkpoints / name}"']
        lines += [f"settings.{key} = {toml(value)}" for key, value in TINY[name][1].items()]
    path.write_text("\n".join(lines))
    return str(path)


def toml(value: object) -> str:
    return "{" + ", ".join(f"{k} = {v}" for k, v in value.items()) + "}" if isinstance(value, dict) else str(value)


def extract(*arguments: str) -> str:
    result = CliRunner().invoke(app, [*arguments, "--no-gallery", "--format", "png"])
    assert result.exit_code == 0, f"{result.output}{result.exception}"
    return result.output


def members(out: Path) -> dict[str, dict[str, bytes]]:
    dataset = Dataset.open(str(out))
    return {key: dict(dataset.read_at(mark, key).members) for mark in dataset.marks() for key in mark["index"]}


@pytest.mark.slow
def test_one_run_verifies_and_each_change_remakes_what_it_must_and_nothing_else(
    cluster: None, pictures: Path, checkpoints: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"

    def made(rows: dict[str, str], *more: str) -> dict[str, dict[str, bytes]]:
        chosen = mix(tmp_path / "mix.toml", rows, checkpoints)
        extract(str(pictures), "--out", str(out), "--estimators", chosen, *more)
        assert not verify(str(out)).problems
        return members(out)

    rows = {name: row for name, row in FIRST.items() if name != "line"}
    first = made(rows)
    assert len(first) == 3 and all(
        set(each) == {"png", "txt", "json", "depth.png", "normal.png", "segmentation.png"} for each in first.values()
    )
    added = made(FIRST, "--only", "line")  # one more intrinsic
    assert changed(first, added) == {"json", "line.png"}
    other = made(FIRST | {"depth": "dpt-large"})
    assert changed(added, other) == {"json", "depth.png"}
    torch.manual_seed(1)
    TINY["teed"][0](checkpoints / "teed")  # another weight file under the same name
    assert changed(other, made(FIRST | {"depth": "dpt-large"})) == {"json", "line.png"}


def changed(before: dict[str, dict[str, bytes]], after: dict[str, dict[str, bytes]]) -> set[str]:
    """The members that differ in some sample."""
    return {name for key in after for name in after[key] if before[key].get(name) != after[key][name]}


class Pictures:
    """A source of photographs of mixed sizes."""

    def __init__(self, count: int) -> None:
        self.count = count

    def read(self, unit: Unit) -> Iterator[RawSample]:
        for i in range(self.count):
            yield RawSample(f"p{i}", photographs.astronaut()[: 64 + 8 * (i % 3), i : i + 80], f"number {i}", {})


def test_out_of_memory_at_random_gives_the_same_bytes(checkpoints: Path, tmp_path: Path) -> None:
    chosen = find_set(mix(tmp_path / "mix.toml", SECOND, checkpoints))
    torch.set_num_threads(1)
    work = UnitWork(
        source=Pictures(7),  # type: ignore[arg-type]
        image=ImageRules(format="png"),
        members=("png", "txt", "json", *(row.member for row in INTRINSICS.values())),
        threads=1,
        window=7,
    )
    estimators = [Loaded(load(task.row, "cpu"), task.intrinsics, task.row.name, 4) for task in tasks_of(chosen)]

    def make(name: str, loaded: Sequence[Loaded]) -> bytes:
        folder = Folder(tmp_path / name)
        folder.make()
        assert make_shard(folder, Unit(0, 7), work, loaded, made={})["counts"]["ok"] == 7
        return folder.read("000000.tar")

    dice = random.Random(3)

    def clumsy(one: Loaded) -> Loaded:
        def estimate(images: Sequence[np.ndarray]) -> list[dict[str, IntrinsicMap]]:
            if dice.random() < 0.25:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return one.estimator(images)

        return Loaded(estimate, one.intrinsics, one.id, one.batch)

    assert make("whole", estimators) == make("clumsy", [clumsy(one) for one in estimators])
