"""What estimators give becomes maps in our conventions: kinds of depth, axes, signs, polarities; each by a hand-made case."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from extract.estimators import controlnet_lines as lines
from extract.estimators.batching import Resolution, buckets, metric_depth, resized, unit_normals
from extract.estimators.marigold import affine_to_inverse
from extract.estimators.normal_bae import SIGNS as BAE_SIGNS
from extract.estimators.panoptic import Panoptic, Rules, segments
from extract.estimators.transformers_depth import Depth, canonical_to_metric
from shards.core.errors import UsageError

NEAR_LEFT = torch.tensor([[4.0, 2.0, 1.0]])  # inverse depth or, read as metres, far on the left


class Fixed(nn.Module):
    """Stands for a network: the same answer whatever it is asked."""

    def __init__(self, **answer: torch.Tensor | None) -> None:
        super().__init__()
        self.answer = SimpleNamespace(**answer)

    def forward(self, **asked: torch.Tensor) -> SimpleNamespace:
        return self.answer


def depth_of(kind: str, **answer: torch.Tensor | None):  # type: ignore[no-untyped-def]
    network = Depth(Fixed(predicted_depth=NEAR_LEFT[None], **answer), kind, (0.5,) * 3, (0.5,) * 3)
    found = network.predict(torch.zeros(1, 3, 1, 3), [(1, 3)])
    return network.maps({name: tensor.numpy() for name, tensor in found[0].items()}, (1, 3))["depth"]


def test_relative_depth_is_stored_as_inverse_depth_larger_is_nearer() -> None:
    depth = depth_of("relative")
    assert depth.info == {"kind": "relative"} and depth.values.tolist() == NEAR_LEFT.tolist()


def test_metric_depth_is_stored_in_metres() -> None:
    depth = depth_of("metric")
    assert depth.info["kind"] == "metric" and depth.values.tolist() == NEAR_LEFT.tolist()


@pytest.mark.parametrize("focal_px", [-14.0, 0.0, np.nan, np.inf])
def test_depth_for_a_focal_length_that_no_camera_has_is_refused(focal_px: float) -> None:
    with pytest.raises(ValueError, match="fits no camera"):
        metric_depth(NEAR_LEFT.numpy(), focal_px, "estimated")


def test_canonical_inverse_depth_becomes_metres_by_the_estimated_focal_length_which_is_recorded() -> None:
    depth = depth_of("canonical", field_of_view=torch.tensor([90.0]))
    assert depth.info == {"kind": "metric", "focal_px": 1.5, "focal_from": "estimated by the network"}
    np.testing.assert_allclose(depth.values, [[0.5 / 4, 0.5 / 2, 0.5]], rtol=1e-5)  # focal / width = 1 / 2


def test_without_a_field_of_view_the_focal_length_is_said_to_be_assumed() -> None:
    depth = canonical_to_metric(np.array([[0.5, 0.0]], np.float32), None, 640)
    assert depth.info == {"kind": "metric", "focal_px": 640.0, "focal_from": "assumed"}
    np.testing.assert_allclose(depth.values, [[2, 1000]], rtol=1e-5)  # 0 is as far as can be stored


def test_affine_depth_becomes_inverse_depth_larger_is_nearer() -> None:
    inverse = affine_to_inverse(np.array([0.0, 0.5, 1.0, 2.0]), near=0.5)
    np.testing.assert_allclose(inverse, [2, 1, 1 / 1.5, 1 / 1.5])


def test_normal_baes_x_axis_points_left_and_is_turned_round() -> None:
    left, up, viewer = np.eye(3, dtype=np.float32)
    found = np.stack([left, up, viewer], axis=1)[:, None]  # three pixels (3, 1, 3)
    assert unit_normals(found, BAE_SIGNS).values[0].tolist() == [[-1, 0, 0], [0, 1, 0], [0, 0, 1]]


def test_normals_are_unit_again_after_resizing_and_invalid_between_opposite_ones() -> None:
    right, up = torch.tensor([1.0, 0, 0]), torch.tensor([0, 1.0, 0])
    between = unit_normals(resized(torch.stack([right, up], dim=1)[:, None], (1, 5)).numpy()).values
    np.testing.assert_allclose(np.linalg.norm(between, axis=2), 1, atol=1e-6)
    opposite = unit_normals(resized(torch.stack([right, -right], dim=1)[:, None], (1, 5)).numpy()).values
    assert np.isnan(opposite[0, 2]).all() and opposite[0, 0].tolist() == [1, 0, 0]


# ---- lines -----------------------------------------------------------------------------------------------------------

PAPER = torch.ones(1, 3, 2, 2)
PAPER[:, :, 0, 0] = 0  # a dark line on white


def drawn(kind: str, net) -> list[list[float]]:  # type: ignore[no-untyped-def]
    """What is made of the line drawing on PAPER by a network that copies its input."""
    return lines.KINDS[kind].draw(net, PAPER)[0, 0].tolist()


def test_dark_lines_on_white_become_white_on_black() -> None:
    assert drawn("lineart", lambda x: x[:, :1]) == [[1, 0], [0, 0]]
    assert drawn("lineart_anime", lambda x: x[:, :1]) == [[1, 0], [0, 0]]  # it sees and draws in -1..1


def test_networks_that_draw_white_on_black_keep_their_polarity() -> None:
    assert drawn("pidinet", lambda x: [x[:, :1] * 0, 1 - x[:, :1]]) == [[1, 0], [0, 0]]  # the last output counts
    for kind in ("teed", "hed"):  # they take 0..255 and give logits, at several sizes
        found = drawn(kind, lambda x: [(127.5 - x[:, :1]), (127.5 - x[:, :1])])
        np.testing.assert_allclose(found, [[1, 0], [0, 0]], atol=1e-6)


def test_pidinet_is_given_bgr() -> None:
    blue = torch.zeros(1, 3, 1, 1)
    blue[:, 2] = 1
    assert lines.KINDS["pidinet"].draw(lambda x: [x[:, :1]], blue).item() == 1


# ---- panoptic --------------------------------------------------------------------------------------------------------


def test_masks_compete_by_score_and_one_that_loses_most_of_its_area_goes() -> None:
    big, hidden, small = torch.full((3, 1, 4, 4), -9.0)
    big[:, :, :] = 9
    hidden[:, :, :2] = 9  # inside the big one, which is surer
    small[:, 3, 3] = 12
    network = Panoptic(None, Rules(), {}, (), ())
    found = network._compete(torch.cat([big, hidden, small]), torch.tensor([0.9, 0.85, 0.99]), torch.arange(3), (4, 4))
    winner = found["winner"]
    assert winner[3, 3] == 3 and (winner[:3] == 1).all() and (winner != 2).all()


def test_stuff_of_one_label_is_one_segment_and_labels_and_scores_follow_the_order_by_area() -> None:
    winner = np.array([[1, 1, 2, 2], [3, 3, 3, 0], [4, 4, 4, 4]])
    found = segments(
        winner, np.array([0, 7, 90, 90]), np.array([0.5, 0.6, 0.7, 0.8]), {0: "cat", 7: "dog", 90: "sky"}, Rules()
    )
    assert found.values.tolist() == [[2, 2, 3, 3], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert [(s["id"], s["area"], s["label"], s["score"]) for s in found.info["segments"]] == [
        (1, 7, "sky", 0.7),
        (2, 2, "cat", 0.5),
        (3, 2, "dog", 0.6),
    ]


# ---- resolution ------------------------------------------------------------------------------------------------------


def test_a_network_sees_images_in_proportion_at_multiples_of_its_stride() -> None:
    assert Resolution(shorter=518, multiple=14)((512, 768)) == (518, 784)
    assert Resolution(longer=768, multiple=8)((512, 768)) == (512, 768)
    assert Resolution(shorter=512, most=1.0)((300, 401)) == (300, 401)
    assert Resolution(shorter=512, most=1.0, multiple=256, up=True)((300, 401)) == (512, 512)
    assert Resolution(square=1536)((300, 401)) == (1536, 1536)
    assert Resolution(multiple=8)((3, 3)) == (8, 8)
    with pytest.raises(UsageError, match="one of shorter, longer and square"):
        Resolution(shorter=3, square=4)


def test_images_share_a_batch_if_the_network_sees_them_at_the_same_size() -> None:
    images = [np.zeros((*size, 3), np.uint8) for size in ((100, 150), (50, 50), (200, 300), (60, 60))]
    assert buckets(images, Resolution(shorter=56, multiple=14)) == [[0, 2], [1, 3]]
