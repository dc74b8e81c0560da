"""Known streams: an image gives its maps, any subset of maps gives an image, and masks repaint either."""

import numpy as np
import pytest
import torch
from PIL import Image

from infer.condition import Given, signal_and_noise
from infer.model.schedules import Joint
from infer.model.vae import encode
from shards.core.errors import UsageError, UserError
from shards.intrinsics import INTRINSICS
from shards.packing import pack
from tests.support import tiny
from tests.support.tiny_text import close, loaded

BASES = sorted(tiny.PIPELINES)
PROMPT = "a red cube"
SMALL = {"size": 64, "steps": 3}


def noise_picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8), "RGB")


@pytest.mark.parametrize("name", BASES)
def test_image_to_intrinsics_keeps_the_image_and_depends_on_it(name):
    generator = loaded(name)
    one, two = (generator(PROMPT, given=Given(image=noise_picture(seed)), steps=3, seeds=1) for seed in (0, 1))
    pixels = torch.from_numpy(np.array(noise_picture(0))).movedim(2, 0)[None] / 127.5 - 1
    with torch.no_grad():
        close(one.latents, encode(generator.pipeline.vae, pixels))
    assert not torch.equal(one.intrinsic_latents, two.intrinsic_latents)
    assert one.images[0].size == (64, 64)


@pytest.mark.parametrize("name", ["sd21", "pixart_alpha"])
@pytest.mark.parametrize("scheduler", [None, "euler-a", "heun"])
def test_the_network_sees_the_known_stream_at_its_noised_self_in_every_step(name, scheduler):
    generator, seen = loaded(name), []
    alphas = generator.pipeline.scheduler.alphas_cumprod
    network = generator.denoiser.network

    def look(_, args, kwargs):
        sample = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
        timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        seen.append((sample.clone(), float(torch.as_tensor(timestep).reshape(-1)[0])))

    handle = network.register_forward_pre_hook(look, with_kwargs=True)
    try:
        given = Given(image=noise_picture())
        made = generator(PROMPT, given=given, steps=3, seeds=1, scheduler=scheduler, schedule=Joint())
    finally:
        handle.remove()
    noise = torch.randn((1, *made.latents.shape[1:]), generator=torch.Generator().manual_seed(1))
    for sample, timestep in seen:
        signal, sigma = signal_and_noise(alphas, timestep)
        assert signal**2 + sigma**2 == pytest.approx(1)
        for guidance_half in sample.unflatten(0, (2, 2, 1)):
            torch.testing.assert_close(guidance_half[0], signal * made.latents + sigma * noise, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kept", [("depth", "line"), tuple(INTRINSICS)])
def test_given_intrinsics_any_subset_make_an_image_and_come_back_as_given(kept):
    generator = loaded("sd15")
    source = generator(PROMPT, seeds=3, **SMALL).intrinsics[0]
    maps = {name: source[name] for name in kept}
    made = generator(PROMPT, given=Given(maps=maps), seeds=5, steps=3, schedule="joint")
    with torch.no_grad():
        expected = encode(generator.vae, torch.from_numpy(pack(maps)[0])[None])
    close(made.intrinsic_latents, expected)
    assert all(made.intrinsics[0][name] is maps[name] for name in kept)
    assert set(made.intrinsics[0]) == set(INTRINSICS)
    free = generator(PROMPT, seeds=5, steps=3, size=64, schedule="joint")
    assert not torch.equal(made.latents, free.latents)


def test_inpainting_changes_only_latents_under_the_mask():
    generator, mask = loaded("sd15"), np.zeros((64, 64), bool)
    mask[:20, 30:] = True
    given = Given(image=noise_picture(), repaint_image=mask)
    made = generator(PROMPT, given=given, steps=3, seeds=[1, 2])
    pixels = torch.from_numpy(np.array(noise_picture())).movedim(2, 0)[None] / 127.5 - 1
    with torch.no_grad():
        clean = encode(generator.pipeline.vae, pixels)
    changed = (made.latents - clean).abs().amax(dim=(0, 1)) > 1e-4
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[:3, 3:] = True  # rows 0..19 and columns 30.. touch these latents
    assert torch.equal(changed, expected)
    assert not torch.equal(made.latents[0], made.latents[1])


def test_what_does_not_fit_what_is_given_is_a_sentence():
    generator = loaded("sd15")
    maps = {"line": generator(PROMPT, **SMALL).intrinsics[0]["line"]}
    with pytest.raises(UserError, match="line map is 64 x 64; the size asked for is 72 x 64"):
        generator(PROMPT, given=Given(maps=maps), size=(64, 72), steps=1)
    with pytest.raises(UserError, match="the mask is 32 x 16"):
        generator(PROMPT, given=Given(image=noise_picture(), repaint_image=np.ones((16, 32), bool)), steps=1)
    with pytest.raises(UsageError, match="nothing is given"):
        Given()
    with pytest.raises(UsageError, match="mask says what to repaint"):
        Given(image=noise_picture(), repaint_maps=np.ones((4, 4), bool))


def _rows_seen(generator, **options):
    """Input (G, S, B, C, h, w) and timesteps (G, S, B) of every call of the network, and what was made."""
    seen, network = [], generator.denoiser.network

    def look(_, args, kwargs):
        sample = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
        timestep = torch.as_tensor(args[1] if len(args) > 1 else kwargs["timestep"])
        shape = (2, 2, len(sample) // 4)
        seen.append((sample.unflatten(0, shape).clone(), timestep.reshape(-1).expand(len(sample)).unflatten(0, shape)))

    handle = network.register_forward_pre_hook(look, with_kwargs=True)
    try:
        return generator(PROMPT, **options), seen
    finally:
        handle.remove()


@pytest.mark.parametrize("name", ["sd21", "pixart_alpha"])
@pytest.mark.parametrize("known", [0, 1])
def test_a_stream_that_is_held_clean_is_at_timestep_0_in_every_step_and_the_other_is_not(name, known):
    generator = loaded(name)
    maps = generator(PROMPT, seeds=3, **SMALL).intrinsics[0]
    given = Given(maps=maps) if known else Given(image=noise_picture())
    made, seen = _rows_seen(generator, given=given, hold="clean", steps=3, seeds=1, schedule="gaussian")
    latents = made.intrinsic_latents if known else made.latents
    signal, sigma = signal_and_noise(generator.pipeline.scheduler.alphas_cumprod, 0)
    noise = torch.randn((1, *latents.shape[1:]), generator=torch.Generator().manual_seed(1))
    assert len(seen) == 3
    for sample, times in seen:
        assert not times[:, known].any() and times[:, 1 - known].all()
        for guidance_half in sample[:, known]:
            torch.testing.assert_close(guidance_half, signal * latents + sigma * noise, rtol=1e-4, atol=1e-4)


def test_a_stream_that_is_known_in_part_is_noised_even_if_clean_is_asked_for():
    generator, mask = loaded("sd15"), np.zeros((64, 64), bool)
    mask[:20, 30:] = True
    options = {"given": Given(image=noise_picture(), repaint_image=mask), "steps": 3, "seeds": 1}
    clean, seen = _rows_seen(generator, hold="clean", **options)
    noised, _ = _rows_seen(generator, hold="noised", **options)
    assert torch.equal(clean.latents, noised.latents) and all((times == times[0, 0, 0]).all() for _, times in seen)


def test_the_run_says_how_what_is_given_is_held():
    generator = loaded("sd15")
    training = generator.run.manifest.training
    assert generator(PROMPT, given=Given(image=noise_picture()), steps=1).settings["hold"] == "noised"
    for setting in ("known_stream", "independent_timesteps"):
        training[setting] = 0.3
        try:
            assert generator(PROMPT, given=Given(image=noise_picture()), steps=1).settings["hold"] == "clean"
        finally:
            del training[setting]
    assert "hold" not in generator(PROMPT, **SMALL).settings


def test_each_image_of_a_batch_may_have_its_own_maps():
    generator = loaded("sd15")
    sources = generator(PROMPT, seeds=[3, 4], **SMALL).intrinsics
    givens = [Given(maps=maps) for maps in sources]
    options = {"steps": 3, "schedule": "joint"}
    together = generator(PROMPT, given=givens, seeds=[5, 6], **options)
    for i, seed in enumerate((5, 6)):
        alone = generator(PROMPT, given=givens[i], seeds=seed, **options)
        close(together.latents[i : i + 1], alone.latents)
        assert all(together.intrinsics[i][name] is sources[i][name] for name in INTRINSICS)
    with pytest.raises(UsageError, match="2 images or sets of maps are given for 3"):
        generator(PROMPT, given=givens, seeds=[5, 6, 7], **options)
