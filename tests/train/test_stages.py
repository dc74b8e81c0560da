"""Both stages on tiny bases: what learns and what does not, eq. 5, exact resume, and a run folder that samples."""

import dataclasses
import hashlib
import json
import resource
import shutil
import signal
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from infer.model.denoiser import JointDenoiser
from infer.sampler import CoGenerator
from shards.core.errors import UsageError, UserError
from shards.core.storage import Folder
from shards.dataset import Dataset, add_counts, write_info
from shards.stream.order import Sampler
from tests.support import tiny_text, training
from tests.support.training import config_of, die_at_forward, in_processes
from train.cache.make_shard import CacheConfig, Models, all_members, cache_shard
from train.checkpoint import Checkpoint, Checkpoints
from train.config import LoopConfig, LoraConfig, TrainConfig, load_train_config, recipe_names
from train.data import Batch, Samples
from train.log import measured_figures
from train.lora import Draws, draw, load_task, train_lora
from train.vae import save_result, train_vae


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return training.write_scenes(tmp_path_factory.mktemp("data") / "scenes")


def _digest(folder: str) -> str:
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


@pytest.fixture(scope="module")
def trained(shards: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of both stages, without any interruption."""
    out = tmp_path_factory.mktemp("run") / "calm"
    base = tiny_text.models("sd21")[0]
    before = _digest(base)
    config = config_of(shards, base, out, "lora.loop.sheets=1", "lora.sample_steps=2", "vae.loop.sheets=1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as many as the processes that are killed have: sums depend on it
    assert train_vae(config).finished and train_lora(config).finished
    torch.set_num_threads(threads)
    assert _digest(base) == before
    return out


def test_the_run_folder_samples_with_stock_weights(trained: Path) -> None:
    with CoGenerator.from_pretrained(tiny_text.models("sd21")[0], str(trained), device="cpu") as generator:
        generator.pipeline.set_progress_bar_config(disable=True)
        made = generator("a ball", steps=2, size=32)
        assert made.intrinsics[0]["normal"].values.shape == (32, 32, 3)
        lora = generator.denoiser.lora_weights()
        assert lora.rank == 2 and any(bool(t.any()) for name, t in lora.tensors.items() if "lora_B" in name)


def test_both_stages_leave_sheets_and_logs(trained: Path) -> None:
    for stage, sheet in (("vae", "reconstructions"), ("lora", "samples")):
        folder = trained / "training" / stage
        assert (folder / "sheets" / f"{sheet}-00000005.png").stat().st_size > 1000
        assert "held_out/loss" in (folder / "log.jsonl").read_text()


def _stage(stage: str, shards: str, out: Path, kill_at: int, rank: int) -> None:
    config = config_of(shards, tiny_text.models("sd21")[0], out, f"{stage}.loop.checkpoint_every=1")
    if kill_at and rank == 0:
        die_at_forward(kill_at)
    {"vae": train_vae, "lora": train_lora}[stage](config)


def _final(out: Path, stage: str) -> Checkpoint:
    found = Checkpoints(out / "training" / stage / "checkpoints", 2).load()
    assert found is not None
    return found


@pytest.mark.parametrize("stage", ["vae", "lora"])
def test_a_stage_killed_at_some_steps_ends_bit_equal(stage: str, shards: str, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    if stage == "lora":
        shutil.copytree(trained / "vae", out / "vae")
    statuses = []
    for kill_at in {"vae": (700, 250), "lora": (1500, 700)}[stage]:
        statuses += in_processes(_stage, stage, shards, out, kill_at, log=tmp_path / "trace")
    assert -signal.SIGKILL in statuses and set(statuses) <= {0, -signal.SIGKILL}, statuses
    assert in_processes(_stage, stage, shards, out, 0, log=tmp_path / "trace") == [0]
    mine, calm = _final(out, stage), _final(trained, stage)
    assert (mine.step, mine.consumed) == (calm.step, calm.consumed) == (5, 20)
    for part in ("weights", "average", "optimiser"):
        ours, theirs = getattr(mine, part), getattr(calm, part)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_two_processes_train_the_lora_as_one_does(shards: str, trained: Path, tmp_path: Path) -> None:
    def run(out: Path, rank: int) -> None:
        batch = "lora.loop.batch=2" if out.name == "one" else "lora.loop.batch=1"
        config = config_of(
            shards, tiny_text.models("sd21")[0], out, batch, "lora.loop.steps=1", "lora.loop.accumulate=1"
        )
        train_lora(config)

    for name, world in (("one", 1), ("two", 2)):
        shutil.copytree(trained / "vae", tmp_path / name / "vae")
        assert not any(in_processes(run, tmp_path / name, world=world, log=tmp_path / "trace"))
    one, two = _final(tmp_path / "one", "lora"), _final(tmp_path / "two", "lora")
    for slot, value in one.optimiser.items():
        torch.testing.assert_close(two.optimiser[slot], value, rtol=1e-4, atol=1e-7)


def _starting(shards: str, start: Path | str, out: Path, *settings: str) -> TrainConfig:
    return dataclasses.replace(config_of(shards, tiny_text.models("sd21")[0], out, *settings), start=str(start))


def test_stage_one_goes_on_from_the_vae_of_a_run_and_refuses_one_of_another_shape(
    shards: str, trained: Path, tmp_path: Path
) -> None:
    again = train_vae(_starting(shards, trained, tmp_path / "a", "vae.loop.steps=1"))
    assert again.first["loss"] == pytest.approx(measured_figures(trained / "training" / "vae")[-1]["loss"], rel=1e-5)
    with pytest.raises(UserError, match="reads 3 channels; an intrinsic VAE reads 8"):
        train_vae(_starting(shards, tiny_text.models("sd21")[0], tmp_path / "b"))
    shutil.copytree(trained / "vae", tmp_path / "other" / "vae")
    config = json.loads((tmp_path / "other" / "vae" / "config.json").read_text())
    (tmp_path / "other" / "vae" / "config.json").write_text(json.dumps(config | {"scaling_factor": 3.0}))
    with pytest.raises(UserError, match=r"no intrinsic VAE of this base: its scaling_factor is 3\.0"):
        train_vae(_starting(shards, tmp_path / "other", tmp_path / "c"))


def test_stage_two_goes_on_from_the_lora_of_a_run_and_refuses_one_that_does_not_fit(
    shards: str, trained: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained / "vae", tmp_path / "vae")
    again = train_lora(_starting(shards, trained, tmp_path, "lora.loop.steps=1"))
    before, after = (
        measured_figures(trained / "training" / "lora")[0],
        measured_figures(trained / "training" / "lora")[-1],
    )
    assert again.first["loss"] == pytest.approx(after["loss"], rel=1e-5) != before["loss"]
    with pytest.raises(UserError, match=r"another LoRA .* LoraShape\(rank=2.*not LoraShape\(rank=3"):
        train_lora(_starting(shards, trained, tmp_path, "lora.rank=3"))
    with pytest.raises(UserError, match=r"made with start = .*, and now it is ''"):
        train_lora(_starting(shards, "", tmp_path, "lora.loop.steps=1"))
    with pytest.raises(UserError, match="not a finished run folder"):
        train_lora(_starting(shards, tmp_path / "typo", tmp_path))


def test_a_run_of_a_base_that_was_fine_tuned_since_is_learned_on_from_only_when_that_is_said(
    shards: str, trained: Path, tmp_path: Path
) -> None:
    tuned = shutil.copytree(tiny_text.models("sd21")[0], tmp_path / "tuned")
    (file,) = (tuned / "unet").glob("*.safetensors")
    save_file({name: 1.1 * tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    shutil.copytree(trained / "vae", tmp_path / "run" / "vae")
    config = _starting(shards, trained, tmp_path / "run", "lora.loop.steps=1")
    config = dataclasses.replace(config, base=str(tuned))
    with pytest.raises(UserError, match=r"cannot start from .*\(--other-weights\)"):
        train_lora(config)
    assert train_lora(dataclasses.replace(config, other_weights=True)).finished


def test_a_full_disk_at_the_end_of_stage_one_is_a_sentence_and_the_vae_before_stays(
    trained: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained / "vae", tmp_path / "vae")
    before, limits = _digest(str(tmp_path / "vae")), resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))  # a file that cannot grow, as on a full disk
    try:
        with pytest.raises(UserError, match=r"cannot write .*diffusion_pytorch_model\.safetensors"):
            save_result(tiny_text.intrinsic_vae(), tmp_path / "vae")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert _digest(str(tmp_path / "vae")) == before


def test_both_stages_train_in_bf16_on_the_cpu(shards: str, trained: Path, tmp_path: Path) -> None:
    steps = ("vae.loop.steps=1", "lora.loop.steps=1", "vae.loop.channels_last=true")
    settings = (*steps, "vae.loop.precision=bf16", "lora.loop.precision=bf16")
    config = config_of(shards, tiny_text.models("sd21")[0], tmp_path / "run", *settings)
    assert train_vae(config).finished and train_lora(config).finished
    for stage in ("vae", "lora"):
        bf16, float32 = (measured_figures(run / "training" / stage)[0] for run in (tmp_path / "run", trained))
        assert bf16["loss"] == pytest.approx(float32["loss"], rel=0.05)  # before the first step: the same weights


# ---- eq. 5 -----------------------------------------------------------------------------------------------------------


def _task(shards: str, base: str, out: Path, *settings: str) -> tuple[Any, Samples]:
    """A LoraTask as train_lora makes it, with an untrained intrinsic VAE."""
    save_result(tiny_text.intrinsic_vae(), out / "vae")
    config = config_of(shards, base, out, "data.memory_gb=0", "data.workers=0", *settings)
    return load_task(config, torch.device("cpu"), world=1)


def _batch(task: Any, samples: Samples) -> Batch:
    return next(samples.batches(Sampler(batch=2, samples=2), task.draw))


@pytest.mark.parametrize("base", ["sd15", "sd21", "sdxl", "pixart_alpha"])
def test_the_loss_is_eq_5(base: str, shards: str, tmp_path: Path) -> None:
    folder = tiny_text.models(base)[0]
    task, samples = _task(shards, folder, tmp_path, "lora.intrinsic_weight=0.25", "lora.caption_drop=0.0")
    batch = _batch(task, samples)
    with torch.no_grad():
        for parameter in task.trainable().values():
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
        terms = task.losses(task.module, batch)
    assert torch.allclose(terms["loss"], terms["image"] + 0.25 * terms["intrinsic"])

    pipeline, scheduler = task.pipeline, task.pipeline.scheduler
    for b, sample in enumerate(batch.samples):
        draws = draw([sample.position], config=task.config, seed=0, shape=task.encoder.shape, levels=1000)
        alone = task.encoder(Batch([sample]))
        t = int(draws.timesteps[0, 0])
        assert int(draws.timesteps[1, 0]) == t and not torch.equal(draws.noise[0], draws.noise[1])
        a = float(scheduler.alphas_cumprod[t])
        rows, wanted = [], []
        for stream in range(2):
            z = alone.mean[stream] + alone.std[stream] * draws.posterior[stream]
            rows.append(a**0.5 * z + (1 - a) ** 0.5 * draws.noise[stream])
            v = a**0.5 * draws.noise[stream] - (1 - a) ** 0.5 * z
            wanted.append(v if base == "sd21" else draws.noise[stream])
        prompt: dict[str, Any] = {"prompt": sample.caption, "device": "cpu", "num_images_per_prompt": 1}
        given: dict[str, Any] = {}
        if base == "sdxl":
            text, _, pooled, _ = pipeline.encode_prompt(**prompt, do_classifier_free_guidance=False)
            times = torch.tensor([[16.0, 16, 0, 0, 32, 32]] * 2)
            given["added_cond_kwargs"] = {"text_embeds": pooled.repeat(2, 1), "time_ids": times}
        elif base == "pixart_alpha":
            text, mask, *_ = pipeline.encode_prompt(**prompt, do_classifier_free_guidance=False)
            given["encoder_attention_mask"] = mask.repeat(2, 1)
            size, ratio = torch.full((2, 2), 16.0), torch.ones(2, 1)
            given["added_cond_kwargs"] = {"resolution": size, "aspect_ratio": ratio}
        else:
            text = pipeline.encode_prompt(**prompt, do_classifier_free_guidance=False)[0]
        task.streams.denoiser.prepare(1)
        with torch.no_grad():
            made = task.module(
                torch.cat(rows), timestep=torch.tensor([t, t]), encoder_hidden_states=text.repeat(2, 1, 1), **given
            ).sample
        for stream, name in enumerate(("image", "intrinsic")):
            error = (made[stream, :4].double() - wanted[stream][0].double()) ** 2
            np.testing.assert_allclose(float(terms[name][b]), float(error.mean()), rtol=1e-4)


def test_a_known_stream_is_at_timestep_0_and_has_no_loss_of_its_own(shards: str, tmp_path: Path) -> None:
    task, samples = _task(shards, tiny_text.models("sd21")[0], tmp_path, "lora.known_stream=1.0")
    batch = next(samples.batches(Sampler(batch=8, samples=8), task.draw))
    known = batch.drawn.known
    assert (known.sum(dim=0) == 1).all() and known.any(dim=1).all()
    assert torch.equal(batch.drawn.timesteps == 0, known)
    with torch.no_grad():
        terms = task.losses(task.module, batch)
    assert torch.allclose(terms["loss"], torch.where(known[0], terms["intrinsic"], terms["image"]))


def test_known_streams_are_the_asked_fraction_and_change_no_other_draw() -> None:
    def drawn(positions: range, **options: float) -> Draws:
        config = LoraConfig(loop=LoopConfig(steps=1, batch=1, learning_rate=1.0), **options)  # type: ignore[arg-type]
        return draw(positions, config=config, seed=3, shape=(4, 2, 2), levels=1000)

    plain, mixed = drawn(range(2000)), drawn(range(2000), known_stream=0.3)
    assert not plain.known.any() and mixed.known.float().mean(dim=1).tolist() == pytest.approx([0.15, 0.15], abs=0.03)
    assert torch.equal(torch.where(mixed.known, 0, plain.timesteps), mixed.timesteps)
    for name in ("noise", "posterior", "captioned"):
        assert torch.equal(getattr(plain, name), getattr(mixed, name))
    part = drawn(range(1000, 1010), known_stream=0.3)  # as a resumed run draws it
    assert torch.equal(part.known, mixed.known[:, 1000:1010])


def test_a_run_without_known_streams_is_the_run_that_it_was_before_there_were_any(shards: str, tmp_path: Path) -> None:
    config = config_of(shards, tiny_text.models("sd21")[0], tmp_path)
    assert "known_stream" not in config.identity("lora", 1)
    config = config_of(shards, tiny_text.models("sd21")[0], tmp_path, "lora.known_stream=0.5")
    assert config.identity("lora", 1)["known_stream"] == 0.5


def test_held_out_figures_say_how_well_a_stream_is_read_that_is_known(shards: str, tmp_path: Path) -> None:
    plain, _ = _task(shards, tiny_text.models("sd21")[0], tmp_path / "plain")
    task, _ = _task(shards, tiny_text.models("sd21")[0], tmp_path / "known", "lora.known_stream=0.5")
    without, found = plain.validate(0), task.validate(0)
    assert found.score == without.score and set(found.metrics) - set(without.metrics) == {
        "image_beside_known",
        "intrinsic_beside_known",
    }
    assert found.metrics["image_beside_known"] != found.metrics["image"]


def test_only_the_lora_learns_and_the_image_term_teaches_it_too(shards: str, tmp_path: Path) -> None:
    task, samples = _task(shards, tiny_text.models("sd21")[0], tmp_path, "lora.intrinsic_weight=0.0")
    with torch.no_grad():
        for name, parameter in task.trainable().items():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    frozen = {name for name, p in task.module.named_parameters() if not p.requires_grad}
    assert len(frozen) + len(task.trainable()) == len(list(task.module.parameters()))
    task.losses(task.module, _batch(task, samples))["loss"].mean().backward()
    assert all(p.grad is None for p in task.module.parameters() if not p.requires_grad)
    through = {name for name, p in task.trainable().items() if p.grad is not None and p.grad.any()}
    assert any("to_k" in name for name in through) and any("to_v" in name for name in through)


OPTIONS = {
    "independent_timesteps=1.0": {},
    "known_stream=1.0": {},
    "snr_gamma=5.0": {},
    "noise_offset=0.1": {},
    "train_schedule=gaussian": {},
    'without=["depth","line"]': {},
    "caption_drop=1.0": {},
    "loop.gradient_checkpointing=true": {},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_gives_a_finite_loss_and_gradient_and_all_but_checkpointing_change_it(
    option: str, shards: str, tmp_path: Path
) -> None:
    found = []
    for settings in ((), (f"lora.{option}",)):
        task, samples = _task(shards, tiny_text.models("sd21")[0], tmp_path, *settings)
        with torch.no_grad():
            for parameter in task.trainable().values():
                torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
        loss = task.losses(task.module, _batch(task, samples))["loss"].mean()
        loss.backward()
        loss = loss.detach()
        gradient = torch.cat([p.grad.flatten() for p in task.trainable().values()])
        assert loss.isfinite() and gradient.isfinite().all() and gradient.any()
        found.append((float(loss), gradient))
    same = found[0][0] == found[1][0] and torch.allclose(found[0][1], found[1][1], rtol=1e-4, atol=1e-8)
    assert same == ("checkpointing" in option)


def test_lora_only_trains_the_intrinsics_alone_and_its_result_fits_the_joint_network(
    shards: str, tmp_path: Path
) -> None:
    task, samples = _task(shards, tiny_text.models("sd21")[0], tmp_path, "lora.image_stream=false")
    terms = task.losses(task.module, _batch(task, samples))
    terms["loss"].mean().backward()
    assert not terms["image"].any() and all(p.grad is not None for p in task.trainable().values())
    weights = task.streams.weights({name: p.detach() for name, p in task.trainable().items()})
    JointDenoiser.install(tiny_text.pipeline("sd21").unet, lora=weights)


def _write_caches(config: CacheConfig) -> None:
    """What `train cache` does, without its workers."""
    dataset, out, models = Dataset.open(config.shards), Folder(str(config.out)), Models(config, "cpu", torch.float32)
    specs = models.specs(config)
    out.make()
    caches = {name: {"id": spec.id, **dataclasses.asdict(spec)} for name, spec in specs.items()}
    info = dataset.info | {"members": all_members(dataset, specs), "caches": caches}
    shards = range(len(info["totals"]["shards"]))
    marks = [cache_shard(dataset, out, i, config, models, specs, {"unit": i}) for i in shards]
    write_info(out, info | {"totals": add_counts(marks)})
    out.sweep()


def test_caches_in_the_shards_give_the_loss_that_the_models_give(shards: str, tmp_path: Path) -> None:
    base = tiny_text.models("sd21")[0]
    settings = ("data.mirror_captions=false", "data.flip=1.0", "data.memory_gb=0", "data.workers=0")
    plain, samples = _task(shards, base, tmp_path, *settings)
    expected = plain.losses(plain.module, _batch(plain, samples))
    cached_shards = str(tmp_path / "cached")
    _write_caches(
        CacheConfig(shards=shards, out=cached_shards, base=base, vae=str(tmp_path / "vae"), size_px=32, dtype="float32")
    )
    task, samples = _task(cached_shards, base, tmp_path, *settings, "lora.cache=true")
    batch = _batch(task, samples)
    assert not batch.samples[0].image.numel()  # nothing was decoded
    found = task.losses(task.module, batch)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
    assert [sample.sizes for sample in batch.samples] == [(16, 16, 0, 0, 32, 32)] * 2


# ---- words -----------------------------------------------------------------------------------------------------------


def test_stage_two_asks_for_stage_one(shards: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="train it first with `python -m train vae`"):
        train_lora(config_of(shards, tiny_text.models("sd21")[0], tmp_path))


@pytest.mark.parametrize(
    ("setting", "word"),
    [
        ("lora.without=['sky']", "the intrinsics are depth"),
        ("lora.rank=0", "lora.rank = 0"),
        ("data.size_px=30", "multiple of 8"),
        ("vae.drop=1.5", "from 0 to 1"),
        ("lora.loop.betas=3", "lora.loop.betas"),
        ("run.workers=3", "the tables of a training recipe are data, vae and lora"),
        ("lora.lambda=1", "unknown setting 'lora.lambda'"),
    ],
)
def test_wrong_settings_are_named(setting: str, word: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=word):
        config_of("x", "demo", tmp_path, setting)


@pytest.mark.parametrize("recipe", recipe_names())
def test_every_value_of_a_recipe_says_where_it_comes_from(recipe: str) -> None:
    config = load_train_config(recipe, base=None, shards=["x"], out=None)
    assert dataclasses.asdict(config)["lora"]["rank"] == 32
    text = (resources.files("train") / "recipes" / f"{recipe}.toml").read_text()
    values = [line for line in text.splitlines() if "=" in line.split("#")[0]]
    assert values and all(line.split("#")[1].strip().startswith(("paper", "inferred", "ours")) for line in values)
