"""The embedded base's training: exact resume, and a pipeline that diffusers loads."""

import dataclasses
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file
from typer.testing import CliRunner

from extract.world import compose
from shards.core.errors import UsageError, UserError
from shards.dataset import Dataset
from shards.inspect.verify import verify
from train.__main__ import app
from train.demo import loop
from train.demo.base_networks import ARCHITECTURES, make_tokenizer
from train.demo.ground_truth import TruthSettings, write_truth
from train.demo.text_to_image import BaseTraining, Pictures, evenly, train_base


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A dozen scenes in two shards."""
    url = str(tmp_path_factory.mktemp("truth") / "shards")
    write_truth(url, TruthSettings(count=12, shard_size=8), workers=1, progress=lambda done: None)
    return url


def test_truth_shards_are_a_whole_dataset_and_writing_them_again_changes_nothing(truth: str) -> None:
    before = {path.name: path.read_bytes() for path in Path(truth).iterdir() if path.is_file()}
    assert write_truth(truth, TruthSettings(count=12, shard_size=8), workers=1, progress=lambda done: None)["ok"] == 12
    assert {path.name: path.read_bytes() for path in Path(truth).iterdir() if path.is_file()} == before
    assert not verify(truth).problems


def test_named_truth_has_only_the_scenes_whose_captions_name_all(tmp_path: Path) -> None:
    settings = TruthSettings(count=12, shard_size=8, named=True)
    write_truth(str(tmp_path), settings, workers=1, progress=lambda done: None)
    whole = [index for index in range(12) if len((scene := compose(1, index)).mentioned) == len(scene.things)]
    dataset = Dataset.open(str(tmp_path))
    keys = [sample.key for shard in dataset.shard_names() for sample in dataset.samples(shard)]
    assert keys == [f"truth-1-{index:07d}" for index in whole] and 0 < len(whole) < 12
    assert not verify(str(tmp_path)).problems


def test_every_caption_is_read_without_an_unknown_word_and_in_full() -> None:
    tokenizer = make_tokenizer()
    for index in range(60):
        ids = tokenizer(compose(3, index).caption)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert len(ids) <= tokenizer.model_max_length


def _three_steps(truth: str, out: Path) -> BaseTraining:
    return BaseTraining(shards=truth, out=out, vae_steps=2, vae_batch=2, steps=3, batch=2, warmup=1, save_every=1)


@pytest.fixture(scope="module")
def whole(truth: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline of a training that nothing interrupted."""
    return train_base(_three_steps(truth, tmp_path_factory.mktemp("base") / "whole"))


def test_a_compiled_network_is_saved_as_the_same_pipeline(truth: str, whole: Path, tmp_path: Path) -> None:
    """Compiling takes minutes; here torch runs what is to be compiled as it is, so the bits must be equal."""
    with torch.compiler.set_stance("force_eager"):
        fused = train_base(dataclasses.replace(_three_steps(truth, tmp_path / "fused"), compile=True))
    one, other = (load_file(folder / "unet" / "diffusion_pytorch_model.safetensors") for folder in (whole, fused))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_an_interrupted_training_ends_with_the_weights_of_an_uninterrupted_one(
    truth: str, whole: Path, tmp_path: Path
) -> None:
    first = _three_steps(truth, tmp_path / "parts")
    train_base(first)
    state = tmp_path / "parts" / "unet" / "training.safetensors"
    state.unlink()  # killed before the second stage began; the first is there
    parts = train_base(first)
    for part in ("unet", "vae", "text_encoder"):
        (name,) = (path.name for path in (whole / part).glob("*.safetensors"))
        one, other = load_file(whole / part / name), load_file(parts / part / name)
        assert all(torch.equal(one[key], other[key]) for key in one)
    pipeline = StableDiffusionPipeline.from_pretrained(whole, use_safetensors=True)
    image = pipeline("a red cube", num_inference_steps=1, output_type="np").images
    assert image.shape == (1, 64, 64, 3)


def test_a_training_that_stops_on_the_way_has_a_pipeline_and_ends_as_one_that_did_not(
    truth: str, whole: Path, tmp_path: Path
) -> None:
    config = _three_steps(truth, tmp_path / "parts")
    stopped = load_file(_unet(train_base(dataclasses.replace(config, stop_at=1))))
    ended = load_file(_unet(train_base(config)))
    once = load_file(_unet(whole))
    assert all(torch.equal(once[key], ended[key]) for key in once)
    assert not all(torch.equal(once[key], stopped[key]) for key in once)


def _unet(pipeline: Path) -> Path:
    return pipeline / "unet" / "diffusion_pytorch_model.safetensors"


def test_every_architecture_learns_and_samples_an_image_of_its_size(truth: str, tmp_path: Path) -> None:
    for name, architecture in ARCHITECTURES.items():
        config = dataclasses.replace(_three_steps(truth, tmp_path / name), architecture=name, steps=1, vae_steps=1)
        pipeline = StableDiffusionPipeline.from_pretrained(train_base(config), use_safetensors=True)
        made = pipeline("a red cube", num_inference_steps=1, output_type="latent").images
        side = int(name.partition("x")[0])
        assert made.shape == (1, architecture.latent_channels, side, side)
        assert pipeline.vae_scale_factor * side == architecture.image_px


@pytest.mark.slow
def test_twins_are_read_in_their_steps_and_change_nothing_in_the_others(
    truth: str, whole: Path, tmp_path: Path
) -> None:
    """A training of which no step happens to have twins is the training without them; one of twins alone is another."""

    def trained(name: str, **options: Any) -> dict[str, torch.Tensor]:
        config = dataclasses.replace(_three_steps(truth, tmp_path / name), vae=whole, steps=2)
        return load_file(_unet(train_base(dataclasses.replace(config, **options))))

    none, rare, always = (trained(f"{share}", twins=share) for share in (0.0, 1e-9, 1.0))
    assert all(torch.equal(none[name], rare[name]) for name in none)
    assert none.keys() == always.keys() and not all(torch.equal(none[name], always[name]) for name in none)

    trained("parts", twins=1.0, stop_at=1)
    parts = trained("parts", twins=1.0)
    assert all(torch.equal(always[name], parts[name]) for name in always)


def test_twins_need_an_even_batch_and_no_compiling(truth: str) -> None:
    with pytest.raises(UsageError, match="even batch, not 3"):
        BaseTraining(shards=truth, twins=0.5, batch=3)
    with pytest.raises(UsageError, match="leave --compile out"):
        BaseTraining(shards=truth, twins=0.5, compile=True)
    with pytest.raises(UsageError, match="from 0 to 1"):
        BaseTraining(shards=truth, twins=2)


def test_an_architecture_that_there_is_not_is_a_usage_error(truth: str) -> None:
    with pytest.raises(UsageError, match=r"9x9.*8x8, 16x16"):
        BaseTraining(shards=truth, architecture="9x9")


def test_sigterm_ends_the_command_after_the_step_at_hand_and_a_second_one_is_refused_meanwhile(
    truth: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step_on, out = loop.follow, tmp_path / "out"

    def terminate(average: Any, net: Any, decay: float, step: int) -> None:
        step_on(average, net, decay, step)
        with pytest.raises(UserError, match=r"trains in .* already"):
            train_base(_three_steps(truth, out))
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "follow", terminate)
        found = CliRunner().invoke(app, ["base", "--shards", truth, "--out", str(out)])
    assert found.exit_code == 0 and "stopped after step 2 of VAE, saved; the same command continues" in found.output
    with safe_open(out / "vae" / "training.safetensors", "pt") as file:
        assert file.metadata()["step"] == "2"


def test_only_pictures_whose_captions_name_everything_are_learned_from(truth: str) -> None:
    whole = [scene for scene in (compose(1, index) for index in range(12)) if len(scene.mentioned) == len(scene.things)]
    assert Pictures.read(truth).captions == [scene.caption for scene in whole]


def test_all_but_the_held_out_pictures_are_learned_from_mirrored_as_well() -> None:
    images = np.arange(8 * 2 * 2 * 3).astype(np.uint8).reshape(8, 2, 2, 3)
    learned, held_out = Pictures(images, [f"a cube {i} left of a cone" for i in range(8)]).split(100)
    assert len(held_out.images) == 2 and np.array_equal(held_out.images, images[6:])
    assert len(learned.images) == 12 and np.array_equal(learned.images[7], images[1][:, ::-1])
    assert learned.captions[1] == "a cube 1 left of a cone" and learned.captions[7] == "a cube 1 right of a cone"


def test_rare_relations_are_drawn_more_often_than_they_are_there() -> None:
    captions = ["a red cube left of a blue cone"] * 9 + ["a red cube on top of a blue cone"]
    shares = evenly(captions)
    assert shares.sum() == pytest.approx(1) and shares[:9].sum() == pytest.approx(3 * shares[9])


def test_a_finished_pipeline_learns_on_with_its_own_vae(truth: str, whole: Path, tmp_path: Path) -> None:
    sizes = {"shards": truth, "vae_steps": 1, "vae_batch": 2, "batch": 2, "warmup": 1, "save_every": 1}
    still = train_base(BaseTraining(out=tmp_path / "still", pretrained=whole, steps=1, rate=0.0, **sizes))
    more = train_base(BaseTraining(out=tmp_path / "more", pretrained=whole, steps=1, **sizes))
    for part, learned in (("vae", False), ("unet", True), ("text_encoder", True)):
        (name,) = (path.name for path in (whole / part).glob("*.safetensors"))
        before, same, after = (load_file(folder / part / name) for folder in (whole, still, more))
        assert all(torch.equal(before[key], same[key]) for key in before)
        assert all(torch.equal(before[key], after[key]) for key in before) != learned


def test_a_base_may_take_the_vae_of_another_and_learn_the_rest_anew(truth: str, whole: Path, tmp_path: Path) -> None:
    sizes = {"shards": truth, "vae_steps": 1, "vae_batch": 2, "batch": 2, "warmup": 1, "save_every": 1, "steps": 1}
    taken = train_base(BaseTraining(out=tmp_path / "taken", vae=whole, vae_rate=1.0, seed=9, **sizes))
    for part, same in (("vae", True), ("unet", False), ("text_encoder", False)):
        (name,) = (path.name for path in (whole / part).glob("*.safetensors"))
        one, other = (load_file(folder / part / name) for folder in (whole, taken))
        assert all(torch.equal(one[key], other[key]) for key in one) == same


def test_a_pretrained_base_that_is_no_pipeline_is_a_sentence(truth: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="model_index"):
        train_base(BaseTraining(shards=truth, out=tmp_path / "out", pretrained=tmp_path / "typo"))


def test_a_base_takes_its_vae_from_one_pipeline() -> None:
    found = CliRunner().invoke(app, ["base", "--pretrained", "demo", "--vae", "demo"])
    assert isinstance(found.exception, UsageError) and "--pretrained brings its own VAE" in str(found.exception)
