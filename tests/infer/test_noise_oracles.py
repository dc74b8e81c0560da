"""Noise as diffusers has it: known streams are noised by its add_noise, and all streams share the noise of every step."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from infer.condition import signal_and_noise
from infer.model.schedules import Joint, Off
from tests.support.tiny_text import loaded

ALPHAS = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).alphas_cumprod


@pytest.mark.parametrize("timestep", [0, 1, 37, 500, 998, 999])
def test_known_latents_are_noised_as_diffusers_adds_noise(timestep: int) -> None:
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    clean, noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(timestep)).unbind()
    wanted = scheduler.add_noise(clean[None], noise[None], torch.tensor([timestep]))[0]

    signal, sigma = signal_and_noise(ALPHAS, timestep)
    torch.testing.assert_close(signal * clean + sigma * noise, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("timestep", [0.5, 36.25, 719.9, 998.75])
def test_between_two_timesteps_the_logarithm_of_sigma_is_linear(timestep: float) -> None:
    a = ALPHAS.double().numpy()
    log_sigma = np.interp(timestep, np.arange(len(a)), np.log(np.sqrt((1 - a) / a)))  # as Euler's scheduler has it
    signal, sigma = signal_and_noise(ALPHAS, timestep)
    assert sigma / signal == pytest.approx(np.exp(log_sigma), rel=1e-5)
    assert signal**2 + sigma**2 == pytest.approx(1)


@pytest.mark.parametrize("scheduler", ["euler-a", "ddpm"])
def test_samplers_that_add_noise_give_all_streams_the_same(scheduler: str) -> None:
    """Without adapters both streams are the same network on the same tokens, so they stay equal if their noises are."""
    generator = loaded("sd21")
    learned = generator.denoiser.lora_parameters()
    kept = [parameter.detach().clone() for parameter in learned]
    try:
        with torch.no_grad():
            for parameter in learned:
                parameter.zero_()
        for schedule in (Joint(), Off()):
            made = generator("a red cube", seeds=4, steps=4, size=64, scheduler=scheduler, schedule=schedule)
            assert made.intrinsic_latents is not None
            torch.testing.assert_close(made.intrinsic_latents, made.latents, rtol=1e-4, atol=1e-4)
    finally:
        with torch.no_grad():
            for parameter, before in zip(learned, kept, strict=True):
                parameter.copy_(before)
