"""Options of training that are off by default: what they do, and what they say where their package is missing."""

import functools
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor, nn

from infer.model.vae import widen
from shards.core.errors import UserError
from tests.support import tiny_text, training
from tests.support.training import Averages, config_of, run_averages
from train.checkpoint import Checkpoints
from train.data import Batch, Samples
from train.vae import VaeTask, perceptual, train_vae


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return training.write_scenes(tmp_path_factory.mktemp("data") / "scenes")


class Distance(nn.Module):
    """In LPIPS' place: the mean absolute difference of two pictures of three channels."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        assert a.shape == b.shape and a.shape[1] == 3
        return (a - b).abs().mean(dim=(1, 2, 3), keepdim=True)


def test_the_perceptual_term_sees_each_intrinsic_as_a_picture_and_counts_them_alike() -> None:
    x, made = torch.zeros(2, 8, 4, 4), torch.zeros(2, 8, 4, 4)
    made[0, 0], made[1, 1:4], made[1, 7] = 1.0, 0.5, 0.25  # depth; normals and lines
    assert perceptual(Distance(), made, x).tolist() == pytest.approx([0.25, (0.5 + 0.25) / 4])


@pytest.mark.parametrize(
    ("setting", "package"),
    [("lpips=0.5", "lpips"), ("loop.wandb=true", "wandb"), ("loop.optimiser=adamw8bit", "bitsandbytes")],
)
def test_an_option_without_its_package_is_said_in_a_sentence(
    setting: str, package: str, shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(UserError, match=f"needs the package {package}: install it, or"):
        train_vae(config_of(shards, tiny_text.models("sd21")[0], tmp_path, f"vae.{setting}"))


def test_wandb_is_told_every_figure_and_goes_on_with_the_same_run(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[dict[str, Any]] = []
    told: list[tuple[int, dict[str, float]]] = []

    class Run:
        def log(self, values: dict[str, float], step: int) -> None:
            told.append((step, values))

        def finish(self) -> None:
            told.append((-1, {}))

    wandb = types.ModuleType("wandb")
    wandb.init = lambda **options: begun.append(options) or Run()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for steps in (2, 4):
        run_averages(shards, tmp_path / "run", Averages(), wandb=True, steps=steps, log_every=1)
    steps = [step for step, values in told if "train/loss" in values]
    assert steps == [1, 2, 3, 4] and [step for step, _ in told].count(-1) == 2
    assert begun[0]["id"] == begun[1]["id"] and begun[1]["resume"] == "allow"


def test_a_compiled_stage_learns_what_it_learns_otherwise(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def as_it_is(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=as_it_is))  # traced, not translated
    found = {}
    for name in ("plain", "compiled"):
        compiled = f"vae.loop.compile={str(name == 'compiled').lower()}"
        train_vae(config_of(shards, tiny_text.models("sd21")[0], tmp_path / name, "vae.loop.steps=1", compiled))
        assert bool(graphs) == (name == "compiled")
        found[name] = Checkpoints(tmp_path / name / "training" / "vae" / "checkpoints", 2).load()
    plain, traced = found["plain"], found["compiled"]
    assert plain is not None and traced is not None and plain.weights.keys() == traced.weights.keys()
    for name, weights in plain.weights.items():
        torch.testing.assert_close(traced.weights[name], weights, rtol=1e-4, atol=1e-5)


def test_the_kl_term_asks_each_latent_channel_for_the_mean_and_deviation_that_pictures_have_in_it(
    shards: str, tmp_path: Path
) -> None:
    config = config_of(shards, "none", tmp_path)
    held = Samples(config.shards, config.data, config.seed).held_out()
    vae = widen(AutoencoderKL(latent_channels=3, block_out_channels=(32,)))
    wide = torch.tensor([4.0, 1.0, 0.1])[:, None, None]
    latents = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(2)) * wide + 2 * wide
    task = VaeTask(config.vae, vae, held, latents, 0, torch.device("cpu"))
    std, mean = torch.std_mean(latents, dim=(0, 2, 3))
    with torch.no_grad():  # an encoder that answers so, whatever it is shown
        vae.quant_conv.weight.zero_()
        vae.quant_conv.bias.copy_(torch.cat([mean, 2 * std.log()]))
        samples = [one.sample for one in held]
        batch = Batch(samples, task.draw([sample.position for sample in samples]))
        assert task.losses(task.module, batch)["kl"].abs().max() < 1e-5
        vae.quant_conv.bias.copy_(torch.cat([mean.roll(1), 2 * std.roll(1).log()]))
        assert task.losses(task.module, batch)["kl"].min() > 1
