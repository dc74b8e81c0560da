"""Weighed latent channels: the VAE gives the same pictures back, and channels grow with what they do to them."""

import copy

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from train.demo.latent_channels import weigh_channels


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    return torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def vaes(pictures: torch.Tensor) -> tuple[AutoencoderKL, AutoencoderKL]:
    """A random VAE as it is and weighed."""
    torch.manual_seed(1)
    before = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=5,
        norm_num_groups=1,
    )
    before = before.eval().requires_grad_(False)
    before.post_quant_conv.weight *= torch.tensor([1.0, 0.2, 3.0, 0.5, 1.0])[:, None, None]
    after = copy.deepcopy(before)
    weigh_channels(after, pictures)
    return before, after


def test_the_pictures_that_come_back_stay_the_same(vaes: tuple, pictures: torch.Tensor) -> None:
    before, after = (vae.decode(vae.encode(pictures).latent_dist.mean).sample for vae in vaes)
    assert before.std() > 0.01
    assert (before - after).abs().max() < 1e-3 * before.std()


def test_a_channel_grows_with_the_root_of_its_effect_the_largest_effect_comes_first(
    vaes: tuple, pictures: torch.Tensor
) -> None:
    old, new = vaes
    z = new.encode(pictures).latent_dist.mean
    plain = new.decode(z).sample
    generator = torch.Generator().manual_seed(7)
    there = torch.linalg.pinv(new.post_quant_conv.weight.squeeze()) @ old.post_quant_conv.weight.squeeze()
    growth = there.norm(dim=1).tolist()  # of each new channel, beside a unit of the old ones
    effects = []  # of a unit of the old ones in the direction of each new one, a root mean square
    for channel in range(5):
        total = 0.0
        for _ in range(8):
            moved = z.clone()
            signs = torch.randint(0, 2, (len(z), *z.shape[2:]), generator=generator) * 2.0 - 1
            moved[:, channel] += 0.05 * growth[channel] * signs
            total += float((new.decode(moved).sample - plain).double().square().sum())
        effects.append(total**0.5)
    assert effects == sorted(effects, reverse=True) and effects[0] > 5 * effects[-1]
    ratios = [one / effect**0.5 for one, effect in zip(growth, effects, strict=True)]
    assert max(ratios) < 1.35 * min(ratios)  # a power of 0 or 1 instead would give more than 2


def test_the_posterior_of_each_channel_is_as_wide_as_before_in_its_effect(vaes: tuple, pictures: torch.Tensor) -> None:
    """Noise of the posterior does as much to the pictures as before."""
    done = []
    for vae in vaes:
        posterior = vae.encode(pictures).latent_dist
        generator = torch.Generator().manual_seed(3)
        noise = torch.randn((16, *posterior.mean.shape), generator=generator) * 0.1 * posterior.std
        plain = vae.decode(posterior.mean).sample
        done.append(sum(float((vae.decode(posterior.mean + one).sample - plain).square().mean()) for one in noise))
    assert done[1] == pytest.approx(done[0], rel=0.3)
