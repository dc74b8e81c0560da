"""The field's measures, on cases worked out by hand."""

import numpy as np
import pytest

from shards.metrics import (
    abs_rel,
    angular_error,
    delta_1,
    edge_f_score,
    log_aligned,
    median_scaled,
    psnr,
    segment_boundaries,
)

TRUTH = np.array([[1, 2], [4, np.inf]], np.float32)


def test_depth_measures_leave_out_what_is_not_finite_on_either_side() -> None:
    predicted = np.array([[1.1, 2], [np.nan, 3]], np.float32)
    assert abs_rel(predicted, TRUTH) == pytest.approx(0.05) and delta_1(predicted, TRUTH) == 1
    assert delta_1(np.array([[1.3, 2], [4, 1]], np.float32), TRUTH) == pytest.approx(2 / 3)
    assert np.isnan(abs_rel(np.full((2, 2), np.nan), TRUTH)) and np.isnan(delta_1(np.full((2, 2), np.nan), TRUTH))


def test_median_scaling_takes_a_wrong_unit_away() -> None:
    np.testing.assert_allclose(median_scaled(TRUTH * 100, TRUTH)[0], TRUTH[0])
    nothing = np.full((2, 2), np.nan)
    assert median_scaled(nothing, TRUTH) is nothing


def test_aligning_logarithms_takes_a_wrong_scale_and_a_wrong_range_away_but_never_turns_depth_round() -> None:
    np.testing.assert_allclose(log_aligned(3 * TRUTH**0.4, TRUTH)[[0, 0, 1], [0, 1, 0]], [1, 2, 4], rtol=1e-6)
    flat = log_aligned(1 / TRUTH, TRUTH)  # the best that is not the other way round is the same depth everywhere
    np.testing.assert_allclose(flat[[0, 0, 1], [0, 1, 0]], 2, rtol=1e-6)
    nothing = np.full((2, 2), np.nan)
    assert log_aligned(nothing, TRUTH) is nothing


def test_the_angle_between_normals_in_degrees() -> None:
    up, right, tilted = [0, 1, 0], [1, 0, 0], [np.sin(np.radians(1e-4)), np.cos(np.radians(1e-4)), 0]
    truth = np.array([[up, up, up, [np.nan] * 3]])
    predicted = np.array([[up, right, tilted, up]])
    assert angular_error(predicted, truth) == pytest.approx((0 + 90 + 1e-4) / 3, abs=1e-9)


def test_an_edge_is_found_within_the_tolerance_and_not_beyond() -> None:
    truth, near, far = (np.zeros((9, 20), bool) for _ in range(3))
    truth[:, 5], near[:, 7], far[:, 8] = True, True, True
    assert edge_f_score(truth, truth) == 1 and edge_f_score(near, truth) == 1 and edge_f_score(far, truth) == 0
    assert edge_f_score(truth | far, truth) == pytest.approx(2 / 3)  # precision 1/2, recall 1
    nothing = np.zeros_like(truth)
    assert edge_f_score(nothing, nothing) == 1 and edge_f_score(nothing, truth) == 0


def test_boundaries_lie_before_each_change_of_id() -> None:
    edges = segment_boundaries(np.array([[1, 1, 2], [1, 1, 2], [3, 3, 3]]))
    assert edges.tolist() == [[False, True, False], [True, True, True], [False, False, False]]


def test_psnr_of_a_constant_error() -> None:
    assert psnr(np.full((3, 3), 0.6), np.full((3, 3), 0.5)) == pytest.approx(20)
    assert psnr(TRUTH[:1], TRUTH[:1]) == np.inf
