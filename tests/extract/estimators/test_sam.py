"""Segment everything: the decoder for a whole grid of points, the choice of masks, and the map of ids."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.segment_everything import agreement, read_masks
from extract.estimators.mask_generator import (
    Frame,
    MaskGenerator,
    MaskSettings,
    measure,
    paint,
    point_grid,
    stability_of,
    survivors_of_nms,
    upsample,
)
from extract.estimators.nets.mask_decoder import GridDecoder
from extract.estimators.sam import SquareEncoder, load, make_generator, segmentation
from shards.core.errors import UsageError, UserError
from shards.intrinsics import INTRINSICS, order_segments
from tests.support.random_sam import (
    FIXTURE_SETTINGS,
    FIXTURE_SIDE,
    FIXTURE_SIZES,
    edgetam_small,
    sam2_small,
    sam2_tiny,
    sam_small,
)
from tests.support.seeded import FIXTURES, seeded_picture

SETTINGS = {"points_per_side": 6, "quality": 0.4, "stability": 0.7, "nms": 1.0}


@pytest.fixture(scope="module")
def sam2() -> Any:
    torch.set_num_threads(1)
    return sam2_small()


def generator(model: Any, **settings: Any) -> MaskGenerator:
    decoder = GridDecoder(model)
    return MaskGenerator(SquareEncoder(model, decoder), decoder, MaskSettings(**(SETTINGS | settings)))


def images() -> list[np.ndarray]:
    return [seeded_picture(*size) for size in ((96, 128), (128, 128), (80, 120))]


# ---- the decoder -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [sam2_small, sam_small, edgetam_small])
def test_a_grid_is_decoded_as_the_network_decodes_its_points_one_by_one(make: Any) -> None:
    model = make()
    decoder = GridDecoder(model)
    encode = SquareEncoder(model, decoder)
    pictures = images()[:2]
    features, frames = encode(pictures)
    points = torch.rand(2, 5, 2, generator=torch.Generator().manual_seed(0)) * frames[0].side
    with torch.inference_mode():
        chosen, quality, logits = decoder.decode(features, decoder.tokens(points), minimum=-1e9)
        pixels = torch.cat([encode.pixels(image, frame) for image, frame in zip(pictures, frames, strict=True)])
        expected = model(pixel_values=pixels, input_points=points[:, :, None], multimask_output=True)
    assert chosen.tolist() == list(range(10))
    torch.testing.assert_close(quality.view(2, 5, 3), expected.iou_scores, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits.view(2, 5, 3, 32, 32), expected.pred_masks, atol=1e-3, rtol=1e-3)


def test_masks_are_drawn_only_for_points_with_a_mask_of_enough_quality(sam2: Any) -> None:
    decoder = GridDecoder(sam2)
    features, frames = SquareEncoder(sam2, decoder)(images()[:2])
    tokens = decoder.tokens(point_grid(4).expand(2, -1, -1) * frames[0].side)
    with torch.inference_mode():
        _, quality, logits = decoder.decode(features, tokens, -1e9)
        minimum = float(quality.amax(1).median())
        chosen, some_quality, some_logits = decoder.decode(features, tokens, minimum)
    assert 0 < len(chosen) < 32
    assert chosen.tolist() == torch.nonzero(quality.amax(1) > minimum).flatten().tolist()
    torch.testing.assert_close(some_quality, quality[chosen])
    torch.testing.assert_close(some_logits, logits[chosen], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("make", [sam2_small, edgetam_small])
def test_the_encoder_makes_the_same_maps_without_the_codes_of_places_that_nobody_reads(make: Any) -> None:
    model = make()
    pixels = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        expected = model.get_image_embeddings(pixels)
        make_generator(model, MaskSettings(), "cpu", "float32")
        for ours, theirs in zip(model.get_image_embeddings(pixels), expected, strict=True):
            assert torch.equal(ours, theirs)
        codes = model.vision_encoder(pixels, return_dict=True).fpn_position_encoding
    assert sum(code.numel() for code in codes) < 10


# ---- choosing masks --------------------------------------------------------------------------------------------------


def greedy(boxes: Tensor, limit: float) -> list[bool]:
    """Non-maximum suppression, one box after the other."""
    kept: list[int] = []
    for i, (x0, y0, x1, y1) in enumerate(boxes.tolist()):
        for j in kept:
            a0, b0, a1, b1 = boxes[j].tolist()
            shared = max(0, min(x1, a1) - max(x0, a0)) * max(0, min(y1, b1) - max(y0, b0))
            if shared > limit * ((x1 - x0) * (y1 - y0) + (a1 - a0) * (b1 - b0) - shared):
                break
        else:
            kept.append(i)
    return [i in kept for i in range(len(boxes))]


@pytest.mark.parametrize("limit", [0.0, 0.3, 0.7, 1.0])
def test_suppression_is_the_greedy_one(limit: float) -> None:
    draws = torch.randint(0, 40, (120, 4), generator=torch.Generator().manual_seed(1)).float()
    corner, size = draws[:, :2], draws[:, 2:] // 2  # some of no area
    chain = torch.stack([torch.arange(20.0), torch.zeros(20), torch.arange(20.0) + 10, torch.full((20,), 9.0)], dim=1)
    boxes = torch.cat([torch.cat([corner, corner + size], dim=1), chain])
    assert survivors_of_nms(boxes, limit).tolist() == greedy(boxes, limit)
    assert survivors_of_nms(boxes[:0], limit).tolist() == []


def blobs(count: int) -> Tensor:
    """Smooth logits (N, 32, 32)."""
    draws = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(2)) * 6 - 4
    return F.interpolate(draws, (32, 32), mode="bicubic")[:, 0]


@pytest.mark.parametrize("frame", [Frame(96, 128, 128, 128, 128), Frame(300, 200, 128, 128, 85)])
def test_masks_are_measured_at_the_images_size(frame: Frame) -> None:
    logits = torch.cat([blobs(40), torch.full((1, 32, 32), -5.0)])
    stability, boxes = measure(logits.half(), frame, MaskSettings())
    x = upsample(logits.half(), frame)
    assert x.shape == (41, frame.height, frame.width)
    for row, box, score in zip(x.numpy(), boxes.tolist(), stability.tolist(), strict=True):
        there = np.nonzero(row > 0)
        assert box == ([there[1].min(), there[0].min(), there[1].max(), there[0].max()] if len(there[0]) else [0] * 4)
        assert score == pytest.approx((row > 1).sum() / max(1, (row > -1).sum()))


def test_stability_is_the_share_that_a_higher_threshold_leaves() -> None:
    logits = torch.tensor([[[5.0, 0.5, -0.5, -5.0]], [[5.0, 5.0, 5.0, 5.0]]])
    torch.testing.assert_close(stability_of(logits, 0.0, 1.0), torch.tensor([1 / 3, 1.0]))
    torch.testing.assert_close(stability_of(logits, 5.5, 1.0), torch.tensor([0.0, 0.0]))
    shown = torch.tensor([True, False, True, True])  # the rest is padding
    torch.testing.assert_close(stability_of(logits, 0.0, 1.0, shown), torch.tensor([1 / 2, 1.0]))


def test_a_pixel_belongs_to_the_smallest_mask_that_holds_it() -> None:
    masks = torch.zeros(70, 8, 8, dtype=torch.bool)  # more than are painted at once
    masks[0] = True
    masks[1, 2:6, 2:6] = True
    masks[69, 3, 3] = True
    ids = paint(masks)
    assert ids[0, 0] == 1 and ids[2, 2] == 2 and ids[3, 3] == 70
    assert paint(masks[1:])[0, 0] == 0
    assert paint(masks[:0]).tolist() == [[0] * 8] * 8


# ---- the generator ---------------------------------------------------------------------------------------------------


def test_masks_come_larger_first_above_the_thresholds_and_apart(sam2: Any) -> None:
    for image, found in zip(images(), generator(sam2)(images()), strict=True):
        areas = found.masks.flatten(1).sum(1)
        assert len(areas) > 2 and areas.min() > 0 and (areas.diff() <= 0).all()
        assert found.masks.shape[1:] == image.shape[:2]
        assert (found.quality > SETTINGS["quality"]).all() and (found.stability >= SETTINGS["stability"]).all()


@pytest.mark.parametrize("make", [sam2_small, sam_small])
def test_a_batch_and_its_images_alone_agree_whatever_the_chunks(make: Any) -> None:
    model = make()
    loose = {"quality": -10.0, "stability": 0.7}
    together = [segmentation(found) for found in generator(model, **loose, prompts_at_once=21)(images())]
    for one, image in zip(together, images(), strict=True):
        (alone,) = (segmentation(found) for found in generator(model, **loose, prompts_at_once=64)([image]))
        assert one.values.max() > 1
        assert (one.values == alone.values).mean() > 0.999
        for a, b in zip(one.info["segments"], alone.info["segments"], strict=True):
            assert a["score"] == pytest.approx(b["score"], abs=1e-3)


def test_masks_are_those_of_sam2s_own_generator() -> None:
    pictures = [seeded_picture(*size) for size in FIXTURE_SIZES]
    for found, theirs in zip(
        generator(sam2_tiny(FIXTURE_SIDE), **FIXTURE_SETTINGS)(pictures),
        read_masks(FIXTURES / "sam2_masks.npz"),
        strict=True,
    ):
        assert len(theirs) > 5
        assert min(agreement(found.masks.numpy(), theirs)) >= 0.97


def test_half_precision_finds_nearly_the_same_segments(sam2: Any, tmp_path: Path) -> None:
    sam2.save_pretrained(tmp_path)
    full, half = (
        load(device="cpu", dtype=t, weights=tmp_path, **SETTINGS)(images()[:1])[0] for t in ("float32", "bfloat16")
    )
    assert (full["segmentation"].values > 0).mean() == pytest.approx((half["segmentation"].values > 0).mean(), abs=0.1)


@pytest.mark.parametrize("make", [sam2_small, sam_small, edgetam_small])
def test_a_checkpoint_folder_becomes_maps_in_the_conventions(make: Any, tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    estimator = load(device="cpu", dtype="float32", weights=tmp_path, points_per_side=4, quality=-10.0, stability=0.0)
    for image, maps in zip(images(), estimator(images()), strict=True):
        found = maps["segmentation"]
        assert found.values.shape == image.shape[:2] and found.values.dtype == np.uint16
        np.testing.assert_array_equal(found.values, order_segments(found.values))
        assert [s["id"] for s in found.info["segments"]] == list(range(1, found.values.max() + 1))
        INTRINSICS["segmentation"].encode(found)


def test_no_mask_above_the_thresholds_is_a_map_without_segments(sam2: Any) -> None:
    (found,) = (segmentation(masks) for masks in generator(sam2, quality=2.0)(images()[:1]))
    assert not found.values.any() and found.info["segments"] == []


def test_a_padded_image_is_brought_back_as_by_the_library() -> None:
    from transformers import SamImageProcessor

    logits = blobs(3)
    expected = SamImageProcessor(pad_size={"height": 128, "width": 128}).post_process_masks(
        [logits[None]], [[50, 100]], [[64, 128]], binarize=False, pad_size={"height": 128, "width": 128}
    )
    torch.testing.assert_close(upsample(logits, Frame(50, 100, 128, 64, 128)), expected[0][0])


def test_wrong_settings_and_foreign_checkpoints_are_refused_with_a_sentence(tmp_path: Path) -> None:
    for wrong in ({"points_per_side": 0}, {"nms": 1.5}, {"stability_offset": -1.0}, {"prompts_at_once": -1}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            MaskSettings(**wrong)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"config\.json|No such file"):
        load(device="cpu", dtype="float32", weights=tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(UserError, match="clip"):
        load(device="cpu", dtype="float32", weights=tmp_path)
    with pytest.raises(UsageError, match="points"):
        load(device="cpu", dtype="float32", weights=tmp_path, points=3)
