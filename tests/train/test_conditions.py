"""What a base is told of size and crop, against SDXL's Algorithm 1 carried out on pixels that know where they are."""

from typing import Any

import cv2
import numpy as np
import pytest
import torch

from shards.geometry import Geometry, square
from tests.support import tiny
from train.conditions import Sizes, sizes_of
from train.network import network_arguments

SOURCE = (600, 900)  # height, width


def coordinates() -> np.ndarray:
    """(600, 900, 2) float32: each pixel of the source says its own row and column."""
    rows, columns = np.mgrid[: SOURCE[0], : SOURCE[1]].astype(np.float32) + 0.5
    return np.stack([rows, columns], axis=-1)


def stored(size: tuple[int, int], crop: tuple[int, int, int, int] | None = None) -> dict[str, Any]:
    """A sample's json as extraction writes it; crop: x, y, width, height."""
    kept = list(crop or (0, 0, SOURCE[1], SOURCE[0]))
    image = {"original_size": [SOURCE[1], SOURCE[0]], "size": [size[1], size[0]], "crop": kept}
    return {"intrinsics": {"image": image}}


def resized(values: np.ndarray, height: int, width: int) -> np.ndarray:
    return cv2.resize(values, (width, height), interpolation=cv2.INTER_AREA)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("shorter", [600, 512, 384])  # as stored: untouched, and shrunk by extraction
@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_the_corner_is_where_algorithm_1_crops_whatever_the_size_in_which_the_image_is_stored(flip, shorter, seed):
    size_px = 256
    image = resized(coordinates(), shorter, shorter * 3 // 2)
    rng = None if seed is None else np.random.default_rng(seed)
    geometry = square(*image.shape[:2], size_px, rng=rng, flip=flip)
    sizes = sizes_of(stored(image.shape[:2]), image.shape[:2], geometry)
    assert sizes[:2] == SOURCE and sizes[4:] == (size_px, size_px)

    # Algorithm 1: mirror, resize the shorter side to the training's size, cut at the corner that the network is told
    whole = resized(np.ascontiguousarray(coordinates()[:, ::-1]) if flip else coordinates(), size_px, size_px * 3 // 2)
    theirs = whole[sizes.top : sizes.top + size_px, sizes.left : sizes.left + size_px]
    x, y, width, height = geometry.box
    cut = image[y : y + height, x : x + width]
    ours = resized(np.ascontiguousarray(cut[:, ::-1]) if flip else cut, size_px, size_px)
    np.testing.assert_allclose(ours, theirs, atol=1.5)  # of 600 x 900: half a pixel of the training's size is 1.2


def test_by_hand():
    """900 x 600 stored as 768 x 512, trained on at 256: the middle square begins at column 150 of the source, 64 of 384."""
    assert sizes_of(stored((512, 768)), (512, 768), square(512, 768, 256)) == Sizes(600, 900, 0, 64, 256, 256)
    right = Geometry((256, 0, 512, 512), 256, 256)
    assert sizes_of(stored((512, 768)), (512, 768), right).left == 128
    mirrored = Geometry((256, 0, 512, 512), 256, 256, flip=True)
    assert sizes_of(stored((512, 768)), (512, 768), mirrored).left == 0


def test_extractions_own_crop_counts():
    """Extraction kept the square at column 300; it is trained on whole. Resized to 256, that column is 128."""
    meta = stored((512, 512), (300, 0, 600, 600))
    assert sizes_of(meta, (512, 512), square(512, 512, 256)) == Sizes(600, 900, 0, 128, 256, 256)


@pytest.mark.parametrize("meta", [{}, {"intrinsics": None}, {"intrinsics": {"image": {"original_size": [0, "x"]}}}])
def test_an_image_that_says_nothing_of_its_source_is_its_own(meta):
    assert sizes_of(meta, (512, 768), square(512, 768, 256)) == Sizes(512, 768, 0, 64, 256, 256)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_networks_are_told_whole_pixels_in_every_number_type(dtype):
    sizes = torch.tensor([Sizes(1023, 1537, 0, 131, 512, 768)])
    text = {"prompt_embeds": torch.zeros(1, 5, 16, dtype=dtype), "prompt_attention_mask": torch.ones(1, 5)}
    told = network_arguments(tiny.PIPELINES["sdxl"](), text | {"pooled_prompt_embeds": torch.zeros(1, 16)}, sizes)
    assert told["added_cond_kwargs"]["time_ids"].tolist() == [[1023, 1537, 0, 131, 512, 768]]
    told = network_arguments(tiny.PIPELINES["pixart_alpha"](), text, sizes)["added_cond_kwargs"]
    assert told["resolution"].tolist() == [[1023, 1537]]  # of the source, as its authors trained it
    assert told["aspect_ratio"].tolist() == [[pytest.approx(512 / 768)]]  # of what is trained on
