"""Metric3D v2: like its authors' code to the last digits, its four traps, its checkpoints, and its maps in our conventions.

What their code gives for weights and pictures made by a rule (tests.support.seeded) is kept in fixtures;
tests.support.upstream_geometry
made them.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from extract.estimators.batching import NetworkEstimator, normalised
from extract.estimators.checkpoints import load_strictly
from extract.estimators.metric3d import Canvas, Metric3D, load
from extract.estimators.nets.dinov2 import DinoV2
from extract.estimators.nets.metric3d_net import (
    SIZES,
    Metric3DNet,
    Metric3DSize,
    Prediction,
    ReluBlock,
    from_published,
    upsample_convex,
)
from shards.core.errors import UsageError, UserError
from shards.intrinsics import INTRINSICS
from tests.support.seeded import (
    FIXTURES,
    METRIC3D_GAINS,
    angles,
    on_grid,
    read_fixture,
    seeded_picture,
    seeded_weights,
    unfold_names,
)

FILE = "metric_depth_vit_small_800k.pth"
SETTINGS: dict[str, Any] = {
    "file": FILE,
    "size": "small",
    "canvas": (84, 112),
    "full_canvas": False,
    "focal_share": 0.9,
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def published() -> dict[str, Tensor]:
    """Weights of S under its authors' names."""
    return seeded_weights(unfold_names(read_fixture("metric3d_names.json")["small"]), METRIC3D_GAINS)


@pytest.fixture(scope="module")
def checkpoint(published: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("metric3d")
    torch.save({"model_state_dict": published}, folder / FILE)
    return folder


@pytest.fixture(scope="module")
def net(published: dict[str, Tensor]) -> Metric3DNet:
    return build("small", from_published(published))


def build(size: str, weights: dict[str, Tensor]) -> Metric3DNet:
    with torch.device("meta"):
        net = Metric3DNet(SIZES[size])
    net.load_state_dict(weights, strict=True, assign=True)
    return net.eval()


def pixels(height: int, width: int) -> Tensor:
    return normalised(torch.from_numpy(seeded_picture(height, width)).permute(2, 0, 1)[None].float() / 255)


# ---- the network -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["56x84", "70x98", "100x120"])  # multiples of 28, of 14, of neither
@torch.inference_mode()
def test_depth_and_normals_are_those_of_its_authors_code(net: Metric3DNet, size: str) -> None:
    with np.load(FIXTURES / "metric3d_small.npz") as fixture:
        depth, confidence, *normal, kappa = fixture[size]
    assert depth.std() > 10 and np.stack(normal).std(axis=(1, 2)).min() > 0.1, "nothing to compare"
    found = net(pixels(*map(int, size.split("x"))))
    ours = on_grid(torch.cat(found, dim=1)[0])
    assert np.abs(ours[0] - depth).mean() < 1e-3
    assert angles(torch.from_numpy(ours[2:5]), torch.from_numpy(np.stack(normal))).mean() < 0.05
    np.testing.assert_allclose(ours[1], confidence, atol=1e-4)
    np.testing.assert_allclose(ours[5], kappa, atol=1e-4)


@pytest.mark.parametrize(("size", "million"), [("small", 37.5), ("large", 411.9), ("giant2", 1377.7)])
def test_every_name_of_a_published_checkpoint_has_its_place(size: str, million: float) -> None:
    shapes = unfold_names(read_fixture("metric3d_names.json")[size])
    net = build(size, from_published({name: torch.empty(shape, device="meta") for name, shape in shapes.items()}))
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(million, abs=0.05)


def test_the_position_of_the_class_token_is_kept(published: dict[str, Tensor], net: Metric3DNet) -> None:
    name = "depth_model.encoder."
    expected = published[f"{name}cls_token"] + published[f"{name}pos_embed"][:, :1]
    torch.testing.assert_close(net.encoder.vit.cls_token.detach(), expected)
    torch.testing.assert_close(net.encoder.vit.pos_embed.detach(), published[f"{name}pos_embed"][:, 1:])


# ---- the four traps --------------------------------------------------------------------------------------------------


def cubic_samples(count: int, side: int = 37) -> Tensor:
    """(count, side) float64: weights that resample `side` values to `count` by cubic convolution (a = -0.75), written out.

    Sample i is taken at (i + 1/2) side / (count + 0.1) - 1/2, without smoothing; beyond the ends the end value counts.
    """
    weights = torch.zeros(count, side, dtype=torch.float64)
    for i in range(count):
        place = (i + 0.5) * side / (count + 0.1) - 0.5
        for tap in range(int(np.floor(place)) - 1, int(np.floor(place)) + 3):
            x, a = abs(place - tap), -0.75
            near, far = (a + 2) * x**3 - (a + 3) * x**2 + 1, a * (x**3 - 5 * x**2 + 8 * x - 4)
            weights[i, min(max(tap, 0), side - 1)] += near if x <= 1 else far
    return weights


def test_trap_1_positions_are_resampled_as_the_weights_were_trained() -> None:
    with torch.device("meta"):
        backbone = DinoV2("vit_small_patch14_reg4_dinov2")
    learned = torch.randn(1, 37 * 37, 384, generator=torch.Generator().manual_seed(0))
    backbone.vit.pos_embed = nn.Parameter(learned)
    grid = learned[0].double().reshape(37, 37, 384)
    expected = torch.einsum("ia,jb,abc->ijc", cubic_samples(5), cubic_samples(9), grid)
    with torch.inference_mode():
        torch.testing.assert_close(backbone.positions(5, 9)[0].double(), expected.flatten(0, 1), atol=1e-4, rtol=0)
        assert torch.equal(backbone.positions(37, 37), learned)


class Seen:
    """Keeps what a module is given."""

    def __init__(self, module: nn.Module) -> None:
        self.inputs: list[Any] = []
        self.handle = module.register_forward_pre_hook(lambda _, inputs: self.inputs.append(inputs))


@torch.inference_mode()
def test_trap_2_small_and_large_read_the_same_normed_tokens_four_times(net: Metric3DNet) -> None:
    readers = [Seen(net.decoder.token2feature[f"read_{i}"]) for i in range(4)]
    net(pixels(28, 56))
    normed = net.encoder(pixels(28, 56), [11], normed=True)[0]
    for reader in readers:
        reader.handle.remove()
        torch.testing.assert_close(reader.inputs[0][0], normed)
    assert SIZES["large"].normed and set(SIZES["large"].blocks) == {23}


@torch.inference_mode()
def test_trap_2_giant2_reads_blocks_10_20_30_and_40_without_norm() -> None:
    giant = SIZES["giant2"]
    assert giant.blocks == (9, 19, 29, 39) and not giant.normed
    # The same, a third as deep: the finest features come from the first of the four.
    size = Metric3DSize(
        backbone=SIZES["small"].backbone, blocks=(2, 5, 8, 11), normed=False, features=(8, 8, 384), hidden=8, steps=1
    )
    small = Metric3DNet(size).eval()
    readers = [Seen(small.decoder.token2feature[f"read_{i}"]) for i in range(4)]
    left = [torch.zeros(0)] * 4
    for i, block in enumerate(size.blocks):
        small.encoder.vit.blocks[block].register_forward_hook(lambda *given, i=i: left.__setitem__(i, given[2]))
    small(pixels(28, 56))
    for i, reader in enumerate(readers):
        assert torch.equal(reader.inputs[0][0], left[i])
    assert not torch.equal(left[0], left[3])


@torch.inference_mode()
def test_trap_3_the_shortcut_is_rectified() -> None:
    block = ReluBlock(4)
    for weight in block.parameters():
        weight.zero_()
    x = torch.randn(1, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(block(x), x.clamp(min=0))


@torch.inference_mode()
def test_trap_3_the_context_sees_rectified_features_at_1_7_and_1_14_but_not_at_1_4(net: Metric3DNet) -> None:
    encoder = net.decoder.context_feature_encoder
    seen = {name: Seen(encoder[name][0]) for name in ("outputs04", "outputs08", "outputs16")}  # type: ignore[index]
    net(pixels(56, 56))
    for each in seen.values():
        each.handle.remove()
    assert seen["outputs08"].inputs[0][0].min() == 0 and seen["outputs16"].inputs[0][0].min() == 0
    assert seen["outputs04"].inputs[0][0].min() < 0


@torch.inference_mode()
def test_trap_4_in_bfloat16_the_state_stays_float32_so_near_depth_has_no_steps(net: Metric3DNet) -> None:
    seen = Seen(net.decoder.update_block)
    x = pixels(56, 84)
    with torch.autocast("cpu", torch.bfloat16):
        found = net(x)
    seen.handle.remove()
    assert all(state.dtype == torch.float32 for _, _, state in seen.inputs)
    assert all(part.dtype == torch.float32 for part in found)
    near = found.depth[found.depth.gt(0.11) & found.depth.lt(50)]
    steps = ((near - 200) / 100).bfloat16().unique().numel()
    assert near.numel() > 500 and near.unique().numel() > 4 * steps
    exact = net(x)
    assert (found.depth - exact.depth).abs().mean() < 0.05 * exact.depth.mean()
    assert angles(found.normal[0], exact.normal[0]).mean() < 2


# ---- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "named"),
    [("missing", "update_block.gru16.convq.bias"), ("surplus", "decoder.other"), ("shape", "depth_regressor.2.bias")],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(
    published: dict[str, Tensor], wrong: str, named: str
) -> None:
    weights = dict(published)
    if wrong == "missing":
        del weights[f"depth_model.decoder.{named}"]
    elif wrong == "surplus":
        weights["depth_model.decoder.other"] = torch.zeros(1)
    else:
        weights[f"depth_model.decoder.{named}"] = torch.zeros(7)
    with torch.device("meta"):
        net = Metric3DNet(SIZES["small"])
    with pytest.raises(UserError, match=named):
        load_strictly(net, from_published(weights), Path(FILE))


@pytest.mark.parametrize(
    "settings", [{"size": "huge"}, {"focal_share": 0.0}, {"canvas": (600, 1064)}, {"canvas": (616,)}]
)
def test_settings_without_meaning_are_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        load(device="cpu", dtype="float32", weights=tmp_path, **SETTINGS | settings)


# ---- the estimator ---------------------------------------------------------------------------------------------------


def test_a_batch_of_mixed_sizes_gives_what_each_image_gives_alone(checkpoint: Path) -> None:
    estimate = load(device="cpu", dtype="float32", weights=checkpoint, **SETTINGS)
    images = [seeded_picture(*size) for size in ((90, 120), (150, 100), (45, 60), (90, 121))]
    together = estimate(images)
    for image, maps in zip(images, together, strict=True):
        alone = estimate([image])[0]
        for name in ("depth", "normal"):
            assert maps[name].values.shape[:2] == image.shape[:2]
            np.testing.assert_allclose(maps[name].values, alone[name].values, rtol=2e-3, atol=2e-3)
            INTRINSICS[name].encode(maps[name])  # raises where a convention is broken
        assert maps["depth"].info == {"kind": "metric", "focal_px": 0.9 * max(image.shape), "focal_from": "assumed"}


class Known(nn.Module):
    """A network that gives the green of its input as canonical depth, in half decametres, and one normal."""

    def __init__(self, normal: tuple[float, float, float]) -> None:
        super().__init__()
        self.normal = torch.tensor(normal)

    def forward(self, x: Tensor) -> Prediction:
        green = x[:, 1:2] * 0.224 + 0.456
        normal = self.normal[None, :, None, None].expand(len(x), -1, *x.shape[2:])
        return Prediction(green * 255 / 5, green, normal, green)


def known(normal: tuple[float, float, float] = (0, -1, 0), full: bool = False, share: float = 1.0) -> NetworkEstimator:
    canvas = Canvas(616, 1064, full)
    return NetworkEstimator(
        Metric3D(Known(normal), canvas, share), canvas, torch.device("cpu"), torch.float32, canvas.prepare
    )


@pytest.mark.parametrize(("theirs", "ours"), [((0, -1, 0), (0, 1, 0)), ((1, 0, 0), (1, 0, 0)), ((0, 0, -1), (0, 0, 1))])
def test_floors_point_up_and_what_faces_the_camera_towards_it(theirs: Any, ours: Any) -> None:
    normal = known(theirs)([seeded_picture(40, 60)])[0]["normal"].values
    np.testing.assert_allclose(normal, np.broadcast_to(np.float32(ours), normal.shape), atol=1e-6)


@pytest.mark.parametrize(
    ("size", "resized_px"), [((308, 308), 616), ((532, 532), 616), ((300, 1064), 1064), ((1232, 308), 616)]
)
def test_depth_is_scaled_from_the_canonical_focal_length_to_the_images(size: tuple[int, int], resized_px: int) -> None:
    image = np.full((*size, 3), 100, np.uint8)  # 20 m for the canonical camera
    depth = known(share=0.5)([image])[0]["depth"]
    # Resized, the longer side is `resized_px`, and so its focal length half of that.
    np.testing.assert_allclose(depth.values, 20 * 0.5 * resized_px / 1000, rtol=1e-3)
    assert depth.info["focal_px"] == 0.5 * max(size)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("size", [(231, 399), (400, 150), (100, 400), (77, 77)])
def test_what_was_filled_is_cut_off_and_every_pixel_comes_back_to_its_place(size: tuple[int, int], full: bool) -> None:
    rows, columns = np.mgrid[: size[0], : size[1]]
    green = 60 + 80 * rows / size[0] + 60 * columns / size[1]
    image = np.repeat(np.rint(green).astype(np.uint8)[:, :, None], 3, axis=2)
    estimate = known(full=full)
    depth = estimate([image])[0]["depth"]
    canonical = depth.values * 1000 / (max(size) * Canvas(616, 1064, full).scale(size))
    assert np.abs(canonical * 5 - green).max() < 2


def test_inputs_are_the_whole_canvas_or_the_least_multiples_of_28() -> None:
    assert Canvas(616, 1064, True)((512, 512)) == (616, 1064)
    assert Canvas(616, 1064, False)((512, 512)) == (616, 616)
    assert Canvas(616, 1064, False)((480, 640)) == (616, 840)  # 616 x 821 in it
    assert Canvas(616, 1064, False)((100, 1000)) == (112, 1064)


def test_the_end_of_the_range_is_infinitely_far() -> None:
    class Sky(Known):
        def forward(self, x: Tensor) -> Prediction:
            found = super().forward(x)
            depth = found.depth.clone()
            depth[:, :, : x.shape[2] // 2] = 200.0
            return found._replace(depth=depth)

    canvas = Canvas(616, 1064, False)
    estimate = NetworkEstimator(
        Metric3D(Sky((0, -1, 0)), canvas, 1.0), canvas, torch.device("cpu"), torch.float32, canvas.prepare
    )
    maps = estimate([np.full((60, 80, 3), 100, np.uint8)])[0]
    assert np.isposinf(maps["depth"].values[:29]).all() and np.isfinite(maps["depth"].values[31:]).all()
    assert np.isnan(maps["normal"].values[:29]).all() and np.isfinite(maps["normal"].values[31:]).all()
    INTRINSICS["depth"].encode(maps["depth"])


def test_upsampling_by_convex_combinations_keeps_what_is_constant() -> None:
    state = torch.full((1, 2, 5, 6), 3.0)
    weights = torch.randn(1, 144, 5, 6, generator=torch.Generator().manual_seed(0))
    fine = upsample_convex(state, weights)
    assert fine.shape == (1, 2, 20, 24)
    torch.testing.assert_close(fine[:, :, 4:-4, 4:-4], torch.full((1, 2, 12, 16), 3.0))
    one = torch.full((1, 9, 16, 5, 6), -50.0)
    one[:, 4] = 50.0  # all weight on the middle
    ramp = torch.arange(30.0).view(1, 1, 5, 6)
    assert torch.allclose(
        upsample_convex(ramp, one.flatten(1, 2)), F.interpolate(ramp, scale_factor=4.0, mode="nearest")
    )
