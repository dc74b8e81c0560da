"""Without the shared VAE: five streams, each intrinsic a picture to the base's own VAE; up to a run folder that samples."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn

from benchmarks import coupling
from infer.condition import Given
from infer.embedded import EMBEDDED
from infer.model.denoiser import JointDenoiser
from infer.model.lora import StreamLinear
from infer.model.processor import self_attention_layers
from infer.model.schedules import Gaussian, Off
from infer.model.separate_vae import SeparateVae, packed_of, pictures
from infer.model.vae import decode, encode, widen
from infer.run_folder import VAE_CONFIG, Manifest, load_run
from infer.sampler import CoGenerator
from shards.core.errors import UsageError, UserError
from shards.intrinsics import INTRINSICS
from shards.packing import CHANNELS, SLICES, pack
from tests.support import oracle, tiny, tiny_text, training
from tests.support.training import config_of
from train.diffusion_loss import stream_loss, target
from train.lora import draw, load_task, train_lora
from train.vae import save_result, train_vae

STREAMS, IMAGES, ROWS = 5, 2, 20  # two guidance halves, five streams, two images
SEPARATE = "lora.shared_vae=false"
BASES = sorted(tiny.NETWORKS)


def by_stream(x: Tensor) -> Tensor:
    """(G*S*B, ...) -> (S, G*B, ...)."""
    return x.unflatten(0, (-1, STREAMS, IMAGES)).transpose(0, 1).flatten(1, 2)


def image_inputs(arguments: dict[str, Any]) -> dict[str, Any]:
    def pick(x: Any) -> Any:
        if isinstance(x, dict):
            return {name: pick(value) for name, value in x.items()}
        return by_stream(x)[0] if isinstance(x, Tensor) and x.ndim else x

    return {name: pick(value) for name, value in arguments.items()}


def installed(network: nn.Module, std: float = 0.1) -> JointDenoiser:
    """With adapters that do something, unless std is 0."""
    denoiser = JointDenoiser.install(network, rank=8, streams=STREAMS)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in denoiser.lora_parameters() if std else ():
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    return denoiser


# ---- the streams -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_part_of_the_lora_acts_on_its_own_stream_only() -> None:
    torch.manual_seed(0)
    base = nn.Linear(6, 4)
    adapter = StreamLinear(base, rank=8, streams=STREAMS)
    nn.init.normal_(adapter.up)
    x = torch.randn(ROWS, 3, 6)
    plain, before = by_stream(base(x)), by_stream(adapter(base(x), x, IMAGES))
    assert torch.equal(before[0], plain[0])
    down, up = adapter.down.detach().clone(), adapter.up.detach().clone()
    for stream in range(1, STREAMS):
        ranks = slice(2 * (stream - 1), 2 * stream)
        expected = by_stream(x)[stream] @ down[ranks].mT @ up[:, ranks].mT
        torch.testing.assert_close(before[stream] - plain[stream], expected, rtol=0, atol=1e-5)
        for parameter, part in ((adapter.down, adapter.down[ranks]), (adapter.up, adapter.up[:, ranks])):
            kept = parameter.clone()
            part += 1
            after = by_stream(adapter(base(x), x, IMAGES))
            assert [torch.equal(*pair) for pair in zip(after, before, strict=True)] == [
                other != stream for other in range(STREAMS)
            ]
            parameter.copy_(kept)


def test_a_rank_that_cannot_be_shared_out_is_refused() -> None:
    with pytest.raises(UserError, match="rank 6 cannot be shared out evenly among 4"):
        StreamLinear(nn.Linear(4, 4), rank=6, streams=STREAMS)


@pytest.mark.parametrize("base", BASES)
@torch.no_grad()
def test_weight_zero_gives_exactly_the_stock_networks_image(base: str) -> None:
    network = tiny.NETWORKS[base]()
    arguments = tiny.inputs(network, ROWS)
    stock = tiny.forward(network, image_inputs(arguments))
    denoiser = installed(network)
    denoiser.prepare(IMAGES, Off())
    torch.testing.assert_close(by_stream(tiny.forward(network, arguments))[0], stock, rtol=0, atol=1e-5)
    denoiser.prepare(IMAGES, Off(), timesteps=[500.0], intrinsics=False)
    alone = tiny.forward(network, arguments)
    assert torch.equal(by_stream(alone)[0], stock)  # the kernels saw the same shapes
    assert alone.shape[0] == ROWS
    denoiser.uninstall()
    untrained = installed(network, std=0)
    untrained.prepare(IMAGES, Off())
    torch.testing.assert_close(by_stream(tiny.forward(network, arguments))[0], stock, rtol=0, atol=1e-5)


@pytest.mark.parametrize("weight", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("base", ["sd21", "pixart_alpha"])
@torch.no_grad()
def test_every_weight_equals_the_float64_formula(base: str, weight: float) -> None:
    network, exact = tiny.NETWORKS[base](), tiny.NETWORKS[base]().double()
    arguments = tiny.inputs(network, ROWS)
    denoiser = installed(network)
    denoiser.prepare(IMAGES, Gaussian(tau=500.0, alpha=weight))
    made = tiny.forward(network, arguments)
    tensors = dict(denoiser.lora_weights().tensors)
    for name, layer in self_attention_layers(exact).items():
        layer.processor = oracle.Processor(name, IMAGES, weight, tensors, 1.0, STREAMS)  # type: ignore[assignment]

    def double(x: Any) -> Any:
        if isinstance(x, dict):
            return {key: double(value) for key, value in x.items()}
        return x.double() if isinstance(x, Tensor) else x

    expected = tiny.forward(exact, double(arguments))
    torch.testing.assert_close(made.double(), expected, rtol=0, atol=1e-5 * float(expected.abs().max().clamp(min=1)))


@torch.no_grad()
def test_a_community_lora_acts_on_the_image_stream_only(tmp_path: Path) -> None:
    pipeline = tiny_text.pipeline("sd15")
    tiny_text.save_community_lora(pipeline, tmp_path)
    arguments = tiny.inputs(pipeline.unet, ROWS)
    stock = tiny_text.pipeline("sd15")
    stock.load_lora_weights(tmp_path)
    expected = tiny.forward(stock.unet, image_inputs(arguments))
    denoiser = installed(pipeline.unet)
    pipeline.load_lora_weights(tmp_path)
    denoiser.prepare(IMAGES, Off())
    made = by_stream(tiny.forward(pipeline.unet, arguments))
    torch.testing.assert_close(made[0], expected, rtol=0, atol=1e-5)


# ---- the VAE ---------------------------------------------------------------------------------------------------------


def test_packed_intrinsics_become_four_pictures_and_come_back() -> None:
    packed = torch.rand(2, CHANNELS, 4, 6) * 2 - 1
    shown = pictures(packed)
    assert shown.shape == (8, 3, 4, 6)
    for number, (name, channels) in enumerate(SLICES.items()):
        rows = shown.unflatten(0, (4, 2))[number]
        assert torch.equal(rows, packed[:, channels].expand(-1, 3, -1, -1)), name
    torch.testing.assert_close(packed_of(shown), packed, rtol=0, atol=1e-6)


@torch.no_grad()
def test_each_intrinsic_is_what_the_bases_vae_makes_of_its_picture() -> None:
    base = tiny.vae()
    vae, packed = SeparateVae.of(base), torch.rand(2, CHANNELS, 32, 32) * 2 - 1
    latents = encode(vae, packed)
    assert latents.shape == (8, 4, 4, 4)
    made = decode(vae, latents)
    assert made.shape == packed.shape
    for number, channels in enumerate(SLICES.values()):
        alone = encode(base, packed[:, channels].expand(-1, 3, -1, -1))
        torch.testing.assert_close(latents.unflatten(0, (4, 2))[number], alone, rtol=0, atol=1e-5)
        picture = base.decode(alone / base.config["scaling_factor"]).sample
        shown = picture if channels.stop - channels.start == 3 else picture.mean(dim=1, keepdim=True)
        torch.testing.assert_close(made[:, channels], shown.clamp(-1, 1), rtol=0, atol=1e-4)
    assert all(torch.equal(vae.state_dict()[name], value) for name, value in base.state_dict().items())


def test_only_an_rgb_vae_can_take_the_place() -> None:
    with pytest.raises(UserError, match=r"only an RGB autoencoder .* not one of 8 channels"):
        SeparateVae.of(widen(tiny.vae()))


# ---- training, and the run folder ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return training.write_scenes(tmp_path_factory.mktemp("data") / "scenes")


@pytest.fixture(scope="module")
def trained(shards: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, without a stage 1, and with a sheet."""
    out = tmp_path_factory.mktemp("run") / "separate"
    settings = (SEPARATE, "lora.loop.sheets=1", "lora.sample_steps=2")
    assert train_lora(config_of(shards, tiny_text.models("sd21")[0], out, *settings)).finished
    return out


@pytest.fixture(scope="module")
def generator(trained: Path) -> CoGenerator:
    made = CoGenerator.from_pretrained(tiny_text.models("sd21")[0], str(trained), device="cpu")
    made.pipeline.set_progress_bar_config(disable=True)
    return made


def test_training_leaves_a_sheet_and_a_run_folder_of_stock_files(trained: Path) -> None:
    assert (trained / "training" / "lora" / "sheets" / "samples-00000005.png").stat().st_size > 1000
    run = load_run(str(trained))
    assert run.manifest.streams == STREAMS and run.lora.rank == 4 * 2 and run.lora.alpha == run.lora.rank
    ups = [tensor for name, tensor in run.lora.tensors.items() if "lora_B" in name]
    assert all(bool(part.any()) for up in ups for part in up.chunk(4, dim=1))  # every stream has learned
    stock, base = (AutoencoderKL.from_pretrained(folder) for folder in (trained / "vae", Path(_base()) / "vae"))
    assert json.loads((trained / VAE_CONFIG).read_text())["_class_name"] == "AutoencoderKL"
    assert all(torch.equal(stock.state_dict()[name], value) for name, value in base.state_dict().items())
    pipeline = tiny_text.pipeline("sd21")
    pipeline.load_lora_weights(trained, weight_name="lora.safetensors")
    assert len(safetensors.torch.load_file(trained / "lora.safetensors")) == len(run.lora.tensors)


def _base() -> str:
    return tiny_text.models("sd21")[0]


def test_the_run_samples_four_maps_and_a_batch_is_its_images_alone(generator: CoGenerator) -> None:
    told = []
    made = generator(["a ball", "a box"], steps=2, size=32, seeds=[3, 4], schedule="joint", callback=told.append)
    assert [set(maps) for maps in made.intrinsics] == [set(INTRINSICS)] * 2
    assert made.intrinsics[0]["normal"].values.shape == (32, 32, 3)
    assert made.latents.shape[0] == 2 and made.intrinsic_latents is not None and made.intrinsic_latents.shape[0] == 8
    assert told[0].latents.shape[0] == 2 and told[0].intrinsic_latents.shape[0] == 8
    alone = generator("a box", steps=2, size=32, seeds=4, schedule="joint")
    tiny_text.close(made.latents[1:], alone.latents)
    assert alone.intrinsic_latents is not None
    tiny_text.close(made.intrinsic_latents[1::2], alone.intrinsic_latents)


@pytest.mark.parametrize("name", ["sdxl", "pixart_alpha"])
def test_other_bases_learn_and_sample_too(name: str, shards: str, tmp_path: Path) -> None:
    base = tiny_text.models(name)[0]
    assert train_lora(config_of(shards, base, tmp_path, SEPARATE, "lora.loop.steps=1")).finished
    with CoGenerator.from_pretrained(base, str(tmp_path), device="cpu") as made:
        made.pipeline.set_progress_bar_config(disable=True)
        assert set(made("a ball", steps=2, size=32).intrinsics[0]) == set(INTRINSICS)


def test_images_alone_are_the_bases_where_no_weight_is_left(generator: CoGenerator) -> None:
    asked: dict[str, Any] = {"steps": 2, "size": 32, "seeds": 3, "schedule": "off"}
    alone, joint = generator("a ball", intrinsics=False, **asked), generator("a ball", **asked)
    tiny_text.close(alone.latents, joint.latents)
    assert alone.intrinsics == []


def test_a_given_map_is_kept_and_the_others_are_made_anew(generator: CoGenerator) -> None:
    source = generator("a ball", steps=2, size=32, seeds=1).intrinsics[0]
    maps = {"normal": source["normal"]}
    first, second = (generator("a ball", given=Given(maps=maps), steps=2, seeds=seed) for seed in (5, 6))
    with torch.no_grad():
        expected = encode(generator.vae, torch.from_numpy(pack(maps)[0])[None])
    for made in (first, second):
        assert made.intrinsic_latents is not None
        tiny_text.close(made.intrinsic_latents[1], expected[1])
        assert made.intrinsics[0]["normal"] is maps["normal"]
    assert first.intrinsic_latents is not None and second.intrinsic_latents is not None
    changed = (first.intrinsic_latents != second.intrinsic_latents).flatten(1).any(dim=1)
    assert changed.tolist() == [True, False, True, True]
    picture = Image.fromarray(np.zeros((32, 32, 3), np.uint8))
    assert set(generator("a ball", given=Given(image=picture), steps=2).intrinsics[0]) == set(INTRINSICS)


def test_the_loss_of_the_intrinsics_is_the_mean_of_their_streams(shards: str, tmp_path: Path) -> None:
    settings = (SEPARATE, "lora.caption_drop=0.0", "lora.intrinsic_weight=0.25", "data.memory_gb=0", "data.workers=0")
    config = config_of(shards, _base(), tmp_path, *settings)
    task, samples = load_task(config, torch.device("cpu"), world=1)
    batch = next(samples.batches(training.Sampler(batch=2, samples=2), task.draw))
    with torch.no_grad():
        terms = task.losses(task.module, batch)
    torch.testing.assert_close(terms["loss"], terms["image"] + 0.25 * terms["intrinsic"])
    draws = batch.drawn
    assert draws.noise.shape[:2] == (STREAMS, 2) and all(torch.equal(t, draws.timesteps[0]) for t in draws.timesteps)
    assert len({float(noise[0, 0, 0, 0]) for noise in draws.noise}) == STREAMS
    clean = task.encoder(batch).sample(draws.posterior)
    a = task.levels[draws.timesteps][..., None, None, None]
    noisy = a.sqrt() * clean + (1 - a).sqrt() * draws.noise
    text = task.pipeline.encode_prompt([s.caption for s in batch.samples], "cpu", 1, False)[0]
    task.streams.denoiser.prepare(2)
    with torch.no_grad():
        made = task.module(
            noisy.flatten(0, 1), timestep=draws.timesteps.flatten(), encoder_hidden_states=text.repeat(STREAMS, 1, 1)
        ).sample.unflatten(0, (STREAMS, 2))
    each = torch.stack(
        [
            stream_loss(made[i], target(clean[i], draws.noise[i], task.levels[draws.timesteps[i]], "v_prediction"))
            for i in range(STREAMS)
        ]
    )
    torch.testing.assert_close(terms["image"], each[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(terms["intrinsic"], each[1:].mean(dim=0), rtol=1e-4, atol=1e-6)


def test_gradient_checkpointing_and_a_schedule_in_training_give_gradients(shards: str, tmp_path: Path) -> None:
    found = {}
    for option in (
        "",
        "lora.loop.gradient_checkpointing=true",
        "lora.train_schedule=gaussian",
        'lora.without=["depth"]',
    ):
        settings = [SEPARATE, "data.memory_gb=0", "data.workers=0", *([option] if option else [])]
        task, samples = load_task(config_of(shards, _base(), tmp_path, *settings), torch.device("cpu"), world=1)
        with torch.no_grad():
            for parameter in task.trainable().values():
                nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
        batch = next(samples.batches(training.Sampler(batch=2, samples=2), task.draw))
        task.losses(task.module, batch)["loss"].mean().backward()
        found[option] = torch.cat([p.grad.flatten() for p in task.trainable().values() if p.grad is not None])
        assert found[option].isfinite().all() and found[option].any()
    plain, checkpointed, *others = found.values()
    torch.testing.assert_close(checkpointed, plain, rtol=1e-4, atol=1e-8)
    assert not any(torch.allclose(other, plain, rtol=1e-4, atol=1e-8) for other in others)


def test_independent_timesteps_are_one_for_the_image_and_one_for_all_intrinsics(shards: str, tmp_path: Path) -> None:
    config = config_of(shards, _base(), tmp_path, SEPARATE, "lora.independent_timesteps=1.0")
    made = draw(range(4), config=config.lora, seed=0, shape=(4, 2, 2), levels=1000).timesteps
    assert all(torch.equal(row, made[1]) for row in made[2:]) and not torch.equal(made[0], made[1])


def test_learning_goes_on_from_a_run_of_its_kind_only(shards: str, trained: Path, tmp_path: Path) -> None:
    def starting(start: Path | str, out: str, *settings: str) -> Any:
        return dataclasses.replace(config_of(shards, _base(), tmp_path / out, *settings), start=str(start))

    assert train_lora(starting(trained, "again", SEPARATE, "lora.loop.steps=1")).finished
    shared = tiny_text.models("sd21")[1]
    with pytest.raises(
        UserError, match=r"trained with lora\.shared_vae = true, and now it is false; --warm-start '' begins"
    ):
        train_lora(starting(shared, "a", SEPARATE))
    save_result(tiny_text.intrinsic_vae(), tmp_path / "b" / "vae")
    with pytest.raises(UserError, match=r"trained with lora\.shared_vae = false, and now it is true"):
        train_lora(starting(trained, "b"))
    with pytest.raises(UserError, match=r"trained with lora\.shared_vae = false, and now it is true"):
        train_vae(starting(trained, "c"))


def test_what_does_not_go_without_the_shared_vae_is_a_sentence(shards: str, tmp_path: Path) -> None:
    for setting, message in (
        ("lora.cache=true", "cached latents are of the shared VAE"),
        ("lora.image_stream=false", "needs the image's stream"),
    ):
        with pytest.raises(UsageError, match=message):
            config_of(shards, _base(), tmp_path, SEPARATE, setting)
    with pytest.raises(UsageError, match="there is no stage 1: run `python -m train lora` alone"):
        train_vae(config_of(shards, _base(), tmp_path, SEPARATE))
    (tmp_path / "training" / "vae").mkdir(parents=True)
    with pytest.raises(UserError, match=r"has a stage 1, which lora\.shared_vae = false does not use"):
        train_lora(config_of(shards, _base(), tmp_path, SEPARATE))


def test_a_manifest_that_does_not_say_so_is_of_a_shared_vae() -> None:
    shipped = EMBEDDED / "demo" / "run"
    manifest = Manifest.from_json((shipped / "manifest.json").read_bytes(), "the shipped run's")
    assert manifest.shared_vae and manifest.streams == 2
    load_run(str(shipped))  # its digests are those of its files


def test_the_coupling_benchmark_measures_such_a_run(trained: Path) -> None:
    streams = coupling.Streams(_base(), str(trained), 2)
    assert len(streams.clean) == STREAMS
    assert all(np.isfinite(streams.losses(streams.clean, (500, 0))))
