"""Every row that goes through a library loads from a checkpoint in its published format and keeps the conventions."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from skimage import data as photographs

from extract.estimators.table import ROWS, find_set, load
from shards.core.errors import UsageError, UserError
from shards.intrinsics import INTRINSICS
from tests.support.tiny_estimators import ROWS as TINY

LIBRARIES = ("transformers_depth", "transformers_normals", "marigold", "panoptic", "controlnet_lines", "normal_bae")


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    """Three photographs, two of them of one size."""
    return [photographs.astronaut()[:72, :96], photographs.coffee()[:70, :51], photographs.chelsea()[100:172, :96]]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.mark.parametrize("name", TINY)
def test_a_row_loads_its_published_format_and_gives_each_image_its_maps_alone_as_in_a_batch(
    name: str, images: list[np.ndarray], checkpoints: Path
) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(1)
    write, settings = TINY[name]
    write(checkpoints / name)
    row = dataclasses.replace(ROWS[name], weights=checkpoints / name, settings={**ROWS[name].settings, **settings})
    estimator = load(row, "cpu")
    estimator.alone = False  # type: ignore[attr-defined]
    together = estimator(images)
    for image, maps in zip(images, together, strict=True):
        assert set(maps) == set(row.yields)
        for intrinsic, made in maps.items():
            assert made.values.shape[:2] == image.shape[:2]
            png, info = INTRINSICS[intrinsic].encode(made)  # raises where a convention is broken
            assert INTRINSICS[intrinsic].valid(INTRINSICS[intrinsic].decode(png, info).values).mean() > 0.5
    alone = estimator(images[:1])[0]
    for intrinsic, made in alone.items():
        if intrinsic == "segmentation":
            assert (made.values == together[0][intrinsic].values).mean() > 0.99
            assert len(made.info["segments"]) == made.values.max()
        else:
            values = made.values
            np.testing.assert_allclose(together[0][intrinsic].values, values, rtol=2e-3, atol=2e-3 * np.nanstd(values))


def test_every_row_through_a_library_is_tried_above() -> None:
    through = {name for name, row in ROWS.items() if row.load.partition(":")[0].rpartition(".")[2] in LIBRARIES}
    by_format = {(ROWS[name].load, ROWS[name].architecture, ROWS[name].settings.get("kind")) for name in TINY}
    untried = {
        name
        for name in through
        if (ROWS[name].load, ROWS[name].architecture, ROWS[name].settings.get("kind")) not in by_format
    }
    assert not untried


def test_a_folder_of_ones_own_is_recognised_by_its_architecture(tmp_path: Path) -> None:
    TINY["dpt-large"][0](tmp_path / "mine")
    chosen = find_set(str(tmp_path / "mine"))
    row = chosen.row("depth")
    assert row.load == ROWS["dpt-large"].load and row.weights == tmp_path / "mine" and list(chosen.rows) == ["depth"]
    (tmp_path / "mine" / "config.json").write_text('{"architectures": ["Unheard"]}')
    with pytest.raises(UsageError, match="not recognised"):
        find_set(str(tmp_path / "mine"))


def test_depth_anything_says_itself_whether_its_depth_is_metric(tmp_path: Path, images: list[np.ndarray]) -> None:
    from transformers import AutoConfig

    TINY["depth-anything-v2-small"][0](tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    config.depth_estimation_type, config.max_depth = "metric", 20
    config.save_pretrained(tmp_path)
    row = dataclasses.replace(ROWS["depth-anything-v2-small"], weights=tmp_path)
    depth = load(row, "cpu")([images[0][:42, :42]])[0]["depth"]
    assert depth.info["kind"] == "metric" and 0 < depth.values.min() <= depth.values.max() <= 20


def test_marigold_without_noise_of_its_own_is_asked_for(tmp_path: Path) -> None:
    import json

    TINY["marigold-normals"][0](tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "LCMScheduler"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"settings\.steps = 1"):
        load(dataclasses.replace(ROWS["marigold-normals"], weights=tmp_path), "cpu")
