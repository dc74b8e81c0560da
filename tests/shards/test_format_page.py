"""docs/format.md tells other programs the truth: its own code, run on stored maps, gives what ours gives."""

import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from shards.intrinsics import INTRINSICS, IntrinsicMap, order_segments
from shards.packing import pack, unpack

PAGE = (Path(__file__).parents[2] / "docs" / "format.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """What the page's Python defines."""
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(block, names)
    return names


def maps(seed: int) -> dict[str, IntrinsicMap]:
    rng = np.random.default_rng(seed)
    z = np.exp(rng.uniform(-2, 6, (24, 32))).astype(np.float32)
    z[0], z[1] = np.nan, np.inf
    n = rng.normal(size=(24, 32, 3))
    n = (n / np.linalg.norm(n, axis=2, keepdims=True)).astype(np.float32)
    n[2] = np.nan
    ids = order_segments(rng.integers(0, 9, (4, 4)).repeat(6, 0).repeat(8, 1))
    return {
        "depth": IntrinsicMap(z, {"kind": "metric"}),
        "normal": IntrinsicMap(n),
        "segmentation": IntrinsicMap(ids),
        "line": IntrinsicMap(rng.integers(0, 256, (24, 32)).astype(np.float32) / 255),
    }


@pytest.mark.parametrize("kind", ["metric", "relative"])
def test_the_page_reads_stored_depth_as_we_do(page: dict[str, Any], kind: str) -> None:
    values = maps(1)["depth"].values
    if kind == "relative":
        values = np.where(np.isinf(values), -np.inf, values).astype(np.float32)
    png, info = INTRINSICS["depth"].encode(IntrinsicMap(values, {"kind": kind}))
    theirs = page["depth"](cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED), info)

    np.testing.assert_allclose(theirs, INTRINSICS["depth"].decode(png, info).values, rtol=1e-6)
    if kind == "metric":  # and the truth itself, within the bound that the page states
        inside = np.isfinite(values) & (values > 0.05) & (values < 1000)
        np.testing.assert_allclose(theirs[inside], values[inside], rtol=8e-5)


def test_the_page_reads_stored_normals_as_we_do(page: dict[str, Any]) -> None:
    normals = maps(2)["normal"]
    png, info = INTRINSICS["normal"].encode(normals)
    code = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED)[..., ::-1]
    theirs = page["normal"](code)

    np.testing.assert_allclose(theirs, INTRINSICS["normal"].decode(png, info).values, atol=1e-6)
    valid = ~np.isnan(normals.values[..., 0])
    angles = np.degrees(np.arccos(np.clip((theirs[valid] * normals.values[valid]).sum(-1), -1, 1)))
    assert angles.max() < 0.4


def test_the_page_reads_packed_channels_as_we_do(page: dict[str, Any]) -> None:
    made = maps(3)
    packed, extent = pack(made)
    ours = unpack(packed, extent)
    with np.errstate(invalid="ignore"):
        z, n, codes, line = page["unpack"](packed, extent.lo, extent.hi)

    finite = np.isfinite(made["depth"].values)
    np.testing.assert_allclose(z[finite], ours["depth"].values[finite], rtol=1e-5)
    assert np.isinf(z[np.isinf(made["depth"].values)]).all()
    np.testing.assert_allclose(n, ours["normal"].values, atol=1e-6)
    np.testing.assert_array_equal(order_segments(codes), made["segmentation"].values)
    np.testing.assert_allclose(line, made["line"].values, atol=1e-6)
