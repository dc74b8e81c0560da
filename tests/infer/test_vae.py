"""The intrinsic VAE: widened from an RGB one, an ordinary diffusers folder, and back."""

import pytest
import torch
from diffusers import AutoencoderKL

from infer.model.vae import GROUPS, decode, encode, narrow, widen
from shards.core.errors import UserError
from shards.packing import CHANNELS


def rgb_vae(**changes: object) -> AutoencoderKL:
    torch.manual_seed(0)
    settings: dict[str, object] = {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "sample_size": 16,
    }
    return AutoencoderKL(**(settings | changes)).eval()


def in_every_group(picture: torch.Tensor) -> torch.Tensor:
    """A picture (B, 3, H, W) as packed channels (B, 8, H, W): itself in the groups of three, its mean in the others."""
    grey = picture.mean(dim=1, keepdim=True)
    return torch.cat([picture if size == 3 else grey for size in GROUPS], dim=1)


def test_widened_vae_has_the_packed_channels_and_the_base_latents() -> None:
    base = rgb_vae()
    wide = widen(base)
    packed = torch.rand(2, CHANNELS, 16, 32) * 2 - 1
    with torch.no_grad():
        latents = encode(wide, packed)
        assert latents.shape == encode(base, packed[:, :3]).shape == (2, 4, 8, 16)
        back = decode(wide, latents)
    assert back.shape == packed.shape and back.abs().max() <= 1
    assert type(wide) is AutoencoderKL
    assert wide.config.scaling_factor == base.config.scaling_factor
    assert (wide.config.in_channels, wide.config.out_channels) == (CHANNELS, CHANNELS)


@torch.no_grad()
def test_a_grey_picture_in_every_group_gives_exactly_what_the_base_makes_of_it() -> None:
    base = rgb_vae()
    wide = widen(base)
    picture = (torch.rand(1, 1, 16, 16) * 2 - 1).expand(1, 3, 16, 16)
    torch.testing.assert_close(encode(wide, in_every_group(picture)), encode(base, picture), atol=1e-5, rtol=1e-5)
    latents = encode(base, picture)
    drawn = base.decode(latents / base.config.scaling_factor).sample
    wide_drawn = wide.decode(latents / wide.config.scaling_factor).sample
    torch.testing.assert_close(wide_drawn, in_every_group(drawn), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_widening_leaves_the_base_as_it_was_and_shares_no_memory_with_it() -> None:
    base = rgb_vae()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    wide = widen(base)
    for parameter in wide.parameters():
        parameter.zero_()
    assert all(torch.equal(before[name], value) for name, value in base.state_dict().items())


def test_narrowing_a_widened_vae_gives_the_base_back_to_the_bit() -> None:
    base = rgb_vae()
    back = narrow(widen(base))
    assert dict(back.config)["in_channels"] == 3
    for name, value in base.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name


@torch.no_grad()
def test_an_ordinary_diffusers_folder_round_trips_to_the_bit(tmp_path) -> None:
    wide = widen(rgb_vae(scaling_factor=0.13025, shift_factor=0.1))
    wide.save_pretrained(tmp_path / "vae")
    assert {path.name for path in (tmp_path / "vae").iterdir()} == {
        "config.json",
        "diffusion_pytorch_model.safetensors",
    }
    loaded = AutoencoderKL.from_pretrained(tmp_path / "vae")
    for name, value in wide.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert loaded.config.shift_factor == 0.1
    packed = torch.rand(1, CHANNELS, 16, 16)
    assert torch.equal(encode(loaded, packed), encode(wide, packed))


@torch.no_grad()
@pytest.mark.parametrize(
    "scale", [{"scaling_factor": 0.5, "shift_factor": 0.25}, {"latents_mean": [0.1] * 4, "latents_std": [2.0] * 4}]
)
def test_decode_undoes_the_scaling_of_encode(scale: dict) -> None:
    wide = widen(rgb_vae(**scale))
    packed = torch.rand(1, CHANNELS, 16, 16)
    plain = wide.decode(wide.encode(packed).latent_dist.mode()).sample.clamp(-1, 1)
    torch.testing.assert_close(decode(wide, encode(wide, packed)), plain, atol=1e-5, rtol=1e-5)


def test_a_sampled_posterior_follows_its_generator() -> None:
    wide = widen(rgb_vae())
    packed = torch.rand(1, CHANNELS, 16, 16)
    with torch.no_grad():
        one, same, other = (encode(wide, packed, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_what_cannot_be_widened_is_refused_with_a_sentence() -> None:
    wide = widen(rgb_vae())
    with pytest.raises(UserError, match="RGB autoencoder"):
        widen(wide)
    with pytest.raises(UserError, match="1 or 3 wide"):
        widen(rgb_vae(), groups=(2, 3))
    with pytest.raises(UserError, match="no channel groups"):
        narrow(rgb_vae())
