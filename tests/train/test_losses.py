"""The losses of both stages against slow formulas in float64, and what they are to leave out."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from shards.intrinsics import INTRINSICS
from shards.packing import SLICES
from train.diffusion_loss import noised, snr_weight, stream_loss, target
from train.vae import channels_of
from train.vae_loss import kl, reconstruction, weighted


def _inputs(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made, true = (2 * torch.rand(3, 8, 4, 5, generator=generator) - 1 for _ in range(2))
    valid = torch.rand(3, 4, 4, 5, generator=generator) > 0.4
    valid[1, 2] = False
    return made, true, valid


def _slow(made: np.ndarray, true: np.ndarray, valid: np.ndarray) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in INTRINSICS}
    for b in range(len(made)):
        for i, (name, channels) in enumerate(SLICES.items()):
            values = []
            for row in range(made.shape[2]):
                for column in range(made.shape[3]):
                    if not valid[b, i, row, column]:
                        continue
                    y, x = made[b, channels, row, column], true[b, channels, row, column]
                    value = float(np.abs(y - x).mean())
                    if name == "normal":
                        value += 1 - float(y @ x / math.sqrt((y @ y) * (x @ x)))
                    if name == "line":
                        value += float((y - x) @ (y - x))
                    values.append(value)
            found[name].append(sum(values) / len(values) if values else 0.0)
    return found


def test_each_intrinsic_has_its_own_measure_over_its_valid_pixels() -> None:
    made, true, valid = _inputs()
    found = reconstruction(made, true, valid)
    slow = _slow(made.double().numpy(), true.double().numpy(), valid.numpy())
    for name in INTRINSICS:
        np.testing.assert_allclose(found[name].numpy(), slow[name], rtol=2e-5, atol=1e-6)
    assert found["segmentation"][1] == 0


def test_invalid_pixels_give_no_gradient() -> None:
    made, true, valid = _inputs()
    made.requires_grad_()
    sum(term.sum() for term in reconstruction(made, true, valid).values()).backward()  # type: ignore[union-attr]
    assert made.grad is not None and made.grad.isfinite().all()
    for i, channels in enumerate(SLICES.values()):
        nowhere = ~valid[:, i : i + 1].expand_as(made.grad[:, channels])
        assert not made.grad[:, channels][nowhere].any()
        assert made.grad[:, channels][~nowhere].any()


def test_a_sample_counts_the_same_whatever_is_in_its_batch() -> None:
    made, true, valid = _inputs()
    together = reconstruction(made, true, valid)
    for b in range(3):
        alone = reconstruction(made[b : b + 1], true[b : b + 1], valid[b : b + 1])
        assert all(torch.equal(alone[name][0], together[name][b]) for name in INTRINSICS)


def test_kl_is_that_of_two_gaussians() -> None:
    generator = torch.Generator().manual_seed(1)
    mean, logvar = torch.randn(2, 2, 3, 4, 4, generator=generator).double()
    prior = torch.distributions.Normal(torch.tensor(0.3).double(), torch.tensor(5.5).double())
    ours = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    expected = torch.distributions.kl_divergence(ours, prior).flatten(1).mean(dim=1)
    torch.testing.assert_close(kl(mean, logvar, 0.3, torch.tensor(5.5)), expected)


def test_what_was_zeroed_is_not_asked_for_unless_missing_says_so() -> None:
    terms = {name: torch.tensor([float(10**i)] * 2) for i, name in enumerate(INTRINSICS)}
    weights = dict.fromkeys(INTRINSICS, 2.0)
    given = torch.tensor([[True, True, True, True], [True, False, True, False]])
    assert weighted(terms, weights, given, 0.0).tolist() == [2222, 202]
    assert weighted(terms, weights, given, 0.5).tolist() == [2222, 202 + 1010]
    assert channels_of(given).int().tolist()[1] == [1, 0, 0, 0, 1, 1, 1, 0]


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_noising_and_targets_are_those_of_diffusers(kind: str) -> None:
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(prediction_type=kind)
    clean, noise = torch.randn(2, 4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([0, 10, 500, 999])
    level = scheduler.alphas_cumprod[timesteps]
    torch.testing.assert_close(noised(clean, noise, level), scheduler.add_noise(clean, noise, timesteps))
    expected = noise if kind == "epsilon" else scheduler.get_velocity(clean, noise, timesteps)
    torch.testing.assert_close(target(clean, noise, level, kind), expected)


def test_a_learned_variance_is_left_out_of_the_loss() -> None:
    predicted, wanted = torch.randn(2, 8, 3, 3), torch.randn(2, 4, 3, 3)
    expected = [float(((predicted[b, :4] - wanted[b]).double() ** 2).mean()) for b in range(2)]
    np.testing.assert_allclose(stream_loss(predicted, wanted), expected, rtol=1e-5)


def test_min_snr_weights() -> None:
    level = torch.tensor([0.5, 0.99])  # signal to noise 1 and 99
    torch.testing.assert_close(snr_weight(level, 5.0, "epsilon"), torch.tensor([1.0, 5 / 99]))
    torch.testing.assert_close(snr_weight(level, 5.0, "v_prediction"), torch.tensor([0.5, 5 / 100]))
    assert snr_weight(level, 0.0, "epsilon").tolist() == [1, 1]
