"""The sampler over stock pipelines of every base: invariants 6 and 7, batches, seeds, streams that stop, known streams."""

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from infer.model.schedules import Drop, Gaussian, Joint, Off
from infer.sampler import CoGenerator, Progress
from shards.core.errors import UsageError, UserError
from shards.intrinsics import INTRINSICS
from shards.packing import DepthRange
from tests.support import tiny, tiny_text
from tests.support.tiny_text import close, loaded, models

BASES = sorted(tiny.PIPELINES)
PROMPT, OTHER = "a red cube", "two blue spheres"
SMALL = {"size": 64, "steps": 3}


def stock(folder: str, seeds=(0,), prompt=PROMPT, output_type="latent", guidance=7.5, steps=3, **options):
    """What the stock pipeline makes, loaded afresh. Latents (B, C, h, w), or PIL images."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    if "PixArt" in type(pipeline).__name__:
        options = {"use_resolution_binning": False, **options}
    scheduler = options.pop("scheduler", None)
    if scheduler is not None:
        import diffusers

        pipeline.scheduler = getattr(diffusers, scheduler).from_config(pipeline.scheduler.config)
    return pipeline(
        prompt and [prompt] * len(seeds),
        height=64,
        width=64,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type=output_type,
        **options,
    ).images


# ---- invariant 6 and 7 -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("guidance", [7.5, 1.0])
def test_off_gives_the_stock_pipelines_image(name, guidance):
    expected = stock(models(name)[0], seeds=(7, 8), guidance=guidance)
    asked = {"seeds": [7, 8], "guidance": guidance, **SMALL}
    close(loaded(name)(PROMPT, schedule="off", **asked).latents, expected)
    alone = loaded(name)(PROMPT, schedule="off", intrinsics=False, **asked)
    assert torch.equal(alone.latents, expected)  # the image's rows run alone: the very same kernels and shapes
    pictures = stock(models(name)[0], seeds=(7, 8), guidance=guidance, output_type="pil")
    for made, wanted in zip(alone.images, pictures, strict=True):
        assert np.array_equal(np.asarray(made), np.asarray(wanted))


@pytest.mark.parametrize("name", BASES)
def test_off_with_a_negative_prompt_gives_the_stock_pipelines_image(name):
    expected = stock(models(name)[0], seeds=(7,), negative_prompt=["blurry"])
    made = loaded(name)(PROMPT, negative_prompt="blurry", seeds=7, schedule="off", intrinsics=False, **SMALL)
    assert torch.equal(made.latents, expected)


@pytest.mark.parametrize("name", BASES)
def test_w_1_is_not_the_base_and_has_four_maps_in_the_datasets_conventions(name):
    made = loaded(name)(PROMPT, seeds=7, schedule=Joint(), **SMALL)
    assert (made.latents - stock(models(name)[0], seeds=(7,))).abs().max() > 1e-2
    assert made.images[0].size == (64, 64)
    assert list(made.intrinsics[0]) == list(INTRINSICS)
    for intrinsic, item in made.intrinsics[0].items():
        png, info = INTRINSICS[intrinsic].encode(item)  # raises unless it keeps the conventions
        assert INTRINSICS[intrinsic].decode(png, info).values.shape[:2] == (64, 64)
    assert not torch.equal(made.latents, made.intrinsic_latents)


@pytest.mark.parametrize("name", BASES)
def test_sampling_leaves_every_weight_of_the_base_as_it_was(name):
    base, run = models(name)
    untouched = DiffusionPipeline.from_pretrained(base)
    with CoGenerator.from_pretrained(base, run, device="cpu") as generator:
        generator.pipeline.set_progress_bar_config(disable=True)
        generator(PROMPT, schedule="gaussian", **SMALL)
    for part in ("vae", "unet", "transformer", "text_encoder"):
        if getattr(untouched, part, None) is not None:
            after = getattr(generator.pipeline, part).state_dict()
            before = getattr(untouched, part).state_dict()
            assert before.keys() == after.keys()
            assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


# ---- seeds and batches -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("scheduler", [None, "euler-a"])
def test_a_batch_equals_its_images_alone(name, scheduler):
    asked = {"schedule": Gaussian(sigma=400), "scheduler": scheduler, **SMALL}
    batch = loaded(name)([PROMPT, OTHER], seeds=[3, 9], **asked)
    for i, (prompt, seed) in enumerate([(PROMPT, 3), (OTHER, 9)]):
        alone = loaded(name)(prompt, seeds=seed, **asked)
        close(batch.latents[i : i + 1], alone.latents)
        close(batch.intrinsic_latents[i : i + 1], alone.intrinsic_latents)


def test_the_same_seed_gives_the_same_result_and_another_one_another():
    one, same, other = (loaded("sd21")(PROMPT, seeds=seed, **SMALL) for seed in (5, 5, 6))
    assert torch.equal(one.latents, same.latents) and torch.equal(one.intrinsic_latents, same.intrinsic_latents)
    assert not torch.equal(one.latents, other.latents)


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"])
def test_stochastic_and_other_schedulers_agree_with_the_stock_pipeline_when_off(name):
    options = {"eta": 0.7} if name == "DDIMScheduler" else {}
    expected = stock(models("sd15")[0], seeds=(1, 2), scheduler=name, **options)
    made = loaded("sd15")(PROMPT, seeds=[1, 2], schedule="off", scheduler=name, **SMALL, **options)
    close(made.latents, expected)


@pytest.mark.parametrize("scheduler", ["ddpm", "dpm++", "heun", "lms", "pndm", "unipc"])
def test_every_named_scheduler_runs_and_drops_the_intrinsics_without_changing_the_image(scheduler):
    asked = {"schedule": "gaussian", "scheduler": scheduler, "size": 64, "steps": 5}
    before = type(loaded("sd15").pipeline.scheduler)
    full, image_only = (loaded("sd15")(PROMPT, intrinsics=wanted, **asked) for wanted in (True, False))
    close(image_only.latents, full.latents)
    assert type(loaded("sd15").pipeline.scheduler) is before  # another scheduler is for one call only


# ---- the intrinsic stream stops --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize(("schedule", "rows"), [(Gaussian(), True), (Off(), True), (Joint(), False)])
def test_image_only_spares_rows_of_the_network_and_gives_the_same_image(name, schedule, rows):
    generator, count = loaded(name), []
    first = generator.denoiser.network.get_submodule("conv_in" if hasattr(generator.pipeline, "unet") else "pos_embed")
    handle = first.register_forward_hook(lambda _, args, out: count.append(args[0].shape[0]))
    try:
        asked = {"seeds": 4, "size": 64, "steps": 8, "schedule": schedule}
        full = generator(PROMPT, **asked)
        all_rows = sum(count)
        count.clear()
        image_only = generator(PROMPT, intrinsics=False, **asked)
    finally:
        handle.remove()
    close(image_only.latents, full.latents)
    assert (sum(count) < all_rows) == rows
    assert image_only.intrinsics == [] and image_only.intrinsic_latents is None


# ---- results and options ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BASES)
def test_shares_callbacks_and_generated_depth_range(name):
    told: list[Progress] = []
    made = loaded(name)(
        PROMPT, shares=True, schedule="joint", callback=told.append, depth=DepthRange("metric", 2.0, 4.0), **SMALL
    )
    assert [progress.step for progress in told] == [0, 1, 2]
    assert told[0].latents.shape == told[0].intrinsic_latents.shape == made.latents.shape
    assert torch.equal(told[-1].latents, made.latents)
    layers = len(loaded(name).denoiser.processors)
    assert len(made.shares) == 3 * layers and made.shares[0].value.shape == (2, 1)
    finite = made.intrinsics[0]["depth"].values
    finite = finite[np.isfinite(finite)]
    assert finite.size == 0 or (finite.min() >= 1.999 and finite.max() <= 4.001)


@pytest.mark.parametrize("name", BASES)
def test_embeddings_of_the_user_stand_for_prompts(name):
    pipeline = loaded(name).pipeline
    given = tiny.embeddings(pipeline, 2)
    expected = stock(models(name)[0], seeds=(0, 1), prompt=None, **given)
    given.pop("negative_prompt", None)
    made = loaded(name)(seeds=[0, 1], schedule="off", intrinsics=False, **given, **SMALL)
    assert torch.equal(made.latents, expected)


def test_settings_of_a_result_are_json_and_name_all_that_matters():
    import json

    made = loaded("sdxl")(PROMPT, schedule="drop:tau=700", scheduler="euler", clip_skip=1, **SMALL)
    settings = json.loads(json.dumps(made.settings))
    assert settings["schedule"] == Drop(tau=700, stages=(3, 4, 5)).to_dict()
    assert settings["scheduler"]["class"] == "EulerDiscreteScheduler"
    assert settings["steps"] == 3 and settings["height"] == 64 and settings["options"] == {"clip_skip": 1}


def test_wrong_arguments_are_sentences():
    generator = loaded("sd15")
    for arguments, message in (
        ({"prompt": None}, "either a prompt or prompt_embeds"),
        ({"prompt": [PROMPT] * 3, "seeds": [1, 2]}, "do not pair"),
        ({"prompt": PROMPT, "size": 60}, "multiples of 8"),
        ({"prompt": PROMPT, "scheduler": "best"}, "no scheduler 'best'"),
        ({"prompt": PROMPT, "scheduler": "DPMSolverSDEScheduler"}, "one noise for the whole batch"),
        ({"prompt": PROMPT, "num_images_per_prompt": 2}, "pass several seeds"),
        ({"prompt": PROMPT, "bogus": 2}, "no option 'bogus'"),
        ({"prompt": PROMPT, "schedule": "bogus"}, "no schedule 'bogus'"),
    ):
        with pytest.raises(UserError, match=message):
            generator(**(SMALL | arguments))
    with pytest.raises(UsageError, match="multiples of 16"):
        loaded("pixart_sigma")(PROMPT, size=72, steps=1)


def test_the_pipeline_by_hand_is_refused_while_ours_and_is_stock_again_after_close():
    base, run = models("sd15")
    expected = stock(base, seeds=(0,))
    generator = CoGenerator.from_pretrained(base, run, device="cpu")
    pipeline = generator.pipeline
    asked = {"prompt": [PROMPT], "height": 64, "width": 64, "num_inference_steps": 3, "output_type": "latent"}
    generator(PROMPT, **SMALL)
    with pytest.raises(UserError, match="how many images"):
        pipeline(**asked)
    generator.close()
    assert torch.equal(pipeline(**asked, generator=[torch.Generator().manual_seed(0)]).images, expected)


# ---- the user's own pipeline -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_a_community_lora_acts_on_the_image_stream_only_with_its_strength(tmp_path, name):
    base, run = models(name)
    pipeline = DiffusionPipeline.from_pretrained(base)
    pipeline.set_progress_bar_config(disable=True)
    adapter = tiny_text.save_community_lora(pipeline, tmp_path)
    generator = CoGenerator(pipeline, run)
    asked = {"seeds": 2, "schedule": "off", **SMALL}
    plain = generator(PROMPT, **asked)
    pipeline.load_lora_weights(adapter, adapter_name="hands")
    full = generator(PROMPT, **asked)
    expected = stock_with_lora(base, adapter, 1.0)
    close(full.latents, expected)
    assert (full.latents - plain.latents).abs().max() > 1e-3
    pipeline.set_adapters("hands", 0.0)
    none = generator(PROMPT, **asked)
    close(none.latents, plain.latents)
    close(none.intrinsic_latents, plain.intrinsic_latents)
    pipeline.set_adapters("hands", 0.5)
    close(generator(PROMPT, **asked).latents, stock_with_lora(base, adapter, 0.5))


def stock_with_lora(base, adapter, strength):
    pipeline = DiffusionPipeline.from_pretrained(base)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(adapter, adapter_name="hands")
    pipeline.set_adapters("hands", strength)
    generator = [torch.Generator().manual_seed(2)]
    return pipeline(
        [PROMPT],
        height=64,
        width=64,
        num_inference_steps=3,
        guidance_scale=7.5,
        generator=generator,
        output_type="latent",
    ).images


def test_vae_tiling_and_slicing_of_the_pipeline_reach_the_intrinsics():
    base, run = models("sd15")
    with CoGenerator.from_pretrained(base, run, device="cpu") as generator:
        generator.pipeline.set_progress_bar_config(disable=True)
        whole = generator([PROMPT, OTHER], seeds=[0, 1], **SMALL)
        generator.pipeline.vae.enable_slicing()
        sliced = generator([PROMPT, OTHER], seeds=[0, 1], **SMALL)
        assert generator.vae.use_slicing
        line = [made.intrinsics[1]["line"].values for made in (whole, sliced)]
        np.testing.assert_allclose(line[0], line[1], atol=1e-4)
        generator.pipeline.vae.enable_tiling()
        generator.pipeline.vae.tile_sample_min_size = 32
        generator.pipeline.vae.tile_latent_min_size = 4
        assert generator(PROMPT, **SMALL).intrinsics[0]["line"].values.shape == (64, 64)
        assert generator.vae.use_tiling


@pytest.mark.parametrize("when", ["before", "after"])
def test_model_offload_moves_the_intrinsic_vae_too_and_gives_the_same_image(when):
    """Offloading wants an accelerator; its hooks are the same with the CPU as the device to compute on."""
    from accelerate import cpu_offload_with_hook

    base, run = models("sd15")
    pipeline = DiffusionPipeline.from_pretrained(base)
    pipeline.set_progress_bar_config(disable=True)
    with CoGenerator.from_pretrained(base, run, device="cpu") as plain:
        plain.pipeline.set_progress_bar_config(disable=True)
        expected = plain(PROMPT, **SMALL)
    generator = CoGenerator(pipeline, run) if when == "after" else None
    hook = None
    for part in ("text_encoder", "unet", "vae"):
        _, hook = cpu_offload_with_hook(getattr(pipeline, part), "cpu", prev_module_hook=hook)
    generator = generator or CoGenerator(pipeline, run)
    made = generator(PROMPT, **SMALL)
    assert torch.equal(made.latents, expected.latents)
    assert torch.equal(made.intrinsic_latents, expected.intrinsic_latents)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", BASES)
def test_half_precision_gives_the_stock_pipelines_image_when_off(name, dtype):
    base, run = models(name)
    pipeline = DiffusionPipeline.from_pretrained(base, dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    options = {"use_resolution_binning": False} if "pixart" in name else {}
    seeds = [torch.Generator().manual_seed(1)]
    asked = {"num_inference_steps": 3, "height": 64, "width": 64, "guidance_scale": 7.5, "generator": seeds}
    expected = pipeline([PROMPT], **asked, **options).images
    with CoGenerator(pipeline, run) as generator:
        made = generator(PROMPT, schedule="off", intrinsics=False, seeds=1, **SMALL)
        joint = generator(PROMPT, schedule="gaussian", seeds=1, **SMALL)
    assert np.array_equal(np.asarray(made.images[0]), np.asarray(expected[0]))
    assert made.latents.dtype == dtype and joint.intrinsics[0]["line"].values.dtype == np.float32
    assert pipeline.vae.dtype == generator.vae.dtype == dtype  # upcasting for a decode is for that decode only


@pytest.mark.parametrize("name", ["sd15", "pixart_alpha"])
def test_the_users_attention_backend_is_used_and_gives_the_same(name):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    expected = loaded(name)(PROMPT, schedule="joint", **SMALL)
    with sdpa_kernel(SDPBackend.MATH):
        made = loaded(name)(PROMPT, schedule="joint", **SMALL)
    torch.testing.assert_close(made.latents, expected.latents, rtol=1e-3, atol=1e-3)


def test_sequential_offload_after_loading_gives_the_same_image():
    from accelerate import cpu_offload

    base, run = models("sd15")
    with CoGenerator.from_pretrained(base, run, device="cpu") as generator:
        generator.pipeline.set_progress_bar_config(disable=True)
        expected = generator(PROMPT, **SMALL)
        for part in ("text_encoder", "unet", "vae"):
            cpu_offload(getattr(generator.pipeline, part), torch.device("cpu"), offload_buffers=True)
        assert all(parameter.is_meta for parameter in generator.denoiser.network.parameters())
        made = generator(PROMPT, **SMALL)
    assert torch.equal(made.latents, expected.latents)
    assert torch.equal(made.intrinsic_latents, expected.intrinsic_latents)


def test_a_second_generator_on_one_pipeline_is_refused():
    base, run = models("sd15")
    with (
        CoGenerator.from_pretrained(base, run, device="cpu") as generator,
        pytest.raises(UserError, match="already installed"),
    ):
        CoGenerator(generator.pipeline, run)


def test_a_lora_that_is_not_the_bases_is_refused():
    with pytest.raises(UserError, match="does not fit"):
        CoGenerator.from_pretrained(models("sd15")[0], models("sdxl")[1], device="cpu")
