"""Estimators: the table, fingerprints, and what the embedded network must be able to do."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from skimage import data as photographs

from extract.estimators.nets.demo_net import DemoNet, DemoNetConfig, load_demo_net, save_demo_net
from extract.estimators.regions import segments
from extract.estimators.table import ROWS, find_set, fingerprint, load, tasks_of
from extract.world import compose, render
from shards.core.errors import UsageError, UserError
from shards.intrinsics import INTRINSICS, IntrinsicMap
from shards.metrics import abs_rel, angular_error, delta_1, edge_f_score, median_scaled, segment_boundaries

SIZES = ((256, 256), (200, 333), (64, 48), (600, 500))


@pytest.fixture(scope="module")
def demo():  # type: ignore[no-untyped-def]
    torch.set_num_threads(1)
    return load(ROWS["demo-net"], "cpu")


def image(size: tuple[int, int], seed: int = 0) -> np.ndarray:
    return render(compose(seed, 3), size).image


def check_conventions(maps: dict[str, IntrinsicMap], size: tuple[int, int]) -> None:
    assert set(maps) == set(INTRINSICS)
    for name, item in maps.items():
        assert item.values.shape[:2] == size
        INTRINSICS[name].decode(*INTRINSICS[name].encode(item))  # raises where a convention is broken
    assert maps["depth"].info["kind"] == "metric" and maps["depth"].info["focal_px"] > 0
    assert len(maps["segmentation"].info["segments"]) == maps["segmentation"].values.max()


@pytest.mark.parametrize("name", ["demo", "null"])
def test_every_embedded_set_gives_all_maps_in_the_conventions_at_each_images_own_size(name: str) -> None:
    images = [image(size) for size in SIZES]
    for task in tasks_of(find_set(name)):
        for maps, size in zip(load(task.row, "cpu")(images), SIZES, strict=True):
            check_conventions(maps, size)


def test_a_batch_gives_what_its_images_alone_give(demo) -> None:  # type: ignore[no-untyped-def]
    images = [image((128, 128), seed) for seed in range(3)] + [image((96, 128))]
    for together, one in zip(demo(images), images, strict=True):
        alone = demo([one])[0]
        np.testing.assert_allclose(together["depth"].values, alone["depth"].values, rtol=1e-3)
        np.testing.assert_allclose(together["line"].values, alone["line"].values, atol=1e-3)
        np.testing.assert_allclose(together["normal"].values, alone["normal"].values, atol=2e-3)
        assert (together["segmentation"].values == alone["segmentation"].values).mean() > 0.99


def test_the_embedded_network_knows_unseen_scenes(demo) -> None:  # type: ignore[no-untyped-def]
    found = []
    for index in range(12):
        truth = render(compose(7_000_001, index), 256)
        maps = demo([truth.image])[0]
        z = median_scaled(maps["depth"].values, truth.depth_m)
        found.append(
            (
                abs_rel(z, truth.depth_m),
                delta_1(z, truth.depth_m),
                angular_error(maps["normal"].values, truth.normal),
                edge_f_score(maps["line"].values > 0.5, truth.line > 0.5),
                edge_f_score(segment_boundaries(maps["segmentation"].values), segment_boundaries(truth.segmentation)),
            )
        )
    relative, delta, degrees, lines, borders = np.nanmean(found, axis=0)
    assert relative < 0.14 and delta > 0.85 and degrees < 15 and lines > 0.7 and borders > 0.65


def test_floors_point_up_and_the_sky_is_far_away(demo) -> None:  # type: ignore[no-untyped-def]
    up, far = [], []
    for index in range(12):
        truth = render(compose(1, index), 192)
        maps = demo([truth.image])[0]
        floor = truth.normal[..., 1] > 0.7
        up.append(np.nanmean(maps["normal"].values[..., 1][floor]))
        if np.isinf(truth.depth_m).mean() > 0.1:
            far.append(np.isinf(maps["depth"].values)[np.isinf(truth.depth_m)].mean())
    assert np.mean(up) > 0.7 and np.mean(far) > 0.8


@pytest.mark.parametrize("name", ["astronaut", "chelsea", "coffee", "rocket"])
def test_a_photograph_gives_maps_that_are_not_trivial(demo, name: str) -> None:  # type: ignore[no-untyped-def]
    photograph = getattr(photographs, name)()
    maps = demo([photograph])[0]
    check_conventions(maps, photograph.shape[:2])
    z = maps["depth"].values
    assert np.isfinite(z).mean() > 0.2 and np.nanstd(np.log(z[np.isfinite(z)])) > 0.05
    assert maps["segmentation"].values.max() >= 3 and 0.002 < maps["line"].values.mean() < 0.4


def test_a_border_parts_two_segments_also_where_it_has_a_gap() -> None:
    edge = np.full((64, 64), 0.05)
    edge[:, 30:32] = 0.9
    edge[28:36, 30:32] = 0.05
    ids = segments(edge)
    assert ids.max() == 2 and len(np.unique(ids[:, :28])) == 1 and len(np.unique(ids[:, 34:])) == 1
    assert (segments(np.full((8, 8), 0.9)) == 1).all() and (segments(np.full((40, 60), 0.1)) == 1).all()


# ---- the table -------------------------------------------------------------------------------------------------------


def test_the_shipped_weights_are_at_most_6_megabytes() -> None:
    folder = ROWS["demo-net"].weights
    assert folder is not None and sum(path.stat().st_size for path in folder.iterdir()) <= 6 << 20


def test_a_row_runs_once_however_many_of_its_maps_are_wanted() -> None:
    assert [(task.row.name, task.intrinsics) for task in tasks_of(find_set("demo"))] == [
        ("demo-net", tuple(INTRINSICS))
    ]
    assert tasks_of(find_set("demo"), ("line", "depth"))[0].intrinsics == ("depth", "line")
    with pytest.raises(UsageError, match="there is no intrinsic 'smell'"):
        tasks_of(find_set("demo"), ("smell",))


def test_the_fingerprint_changes_with_weights_settings_and_version(tmp_path: Path) -> None:
    row = ROWS["demo-net"]
    copy = dataclasses.replace(row, weights=tmp_path / "copy")
    assert row.weights is not None
    shutil.copytree(row.weights, tmp_path / "copy")
    assert fingerprint(copy) == fingerprint(row) and fingerprint(row)["id"].startswith("demo-net@")
    others = [dataclasses.replace(row, version=2), dataclasses.replace(row, settings={"working_px": 128})]
    net = DemoNet(DemoNetConfig())
    save_demo_net(net, tmp_path / "copy")
    ids = {fingerprint(each)["id"] for each in (row, copy, *others)}
    assert len(ids) == 4


def test_a_missing_or_damaged_checkpoint_is_a_sentence(tmp_path: Path) -> None:
    missing = dataclasses.replace(ROWS["demo-net"], weights=tmp_path / "nowhere")
    with pytest.raises(UserError, match="is missing"):
        fingerprint(missing)
    with pytest.raises(UserError, match="is missing"):
        load(missing, "cpu")
    save_demo_net(DemoNet(DemoNetConfig(widths=(8, 16), heads=8)), tmp_path / "small")
    assert load_demo_net(tmp_path / "small").config.widths == (8, 16)
    (tmp_path / "small" / "config.json").write_text(json.dumps({"widths": [8, 24], "heads": 8}))
    with pytest.raises(UserError, match="cannot be loaded"):
        load_demo_net(tmp_path / "small")
    (tmp_path / "small" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_demo_net(tmp_path / "small")
