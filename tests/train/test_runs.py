"""Runs of both stages: the base that they belong to, run folders of checkpoints, few samples, and the end of a stage."""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from infer.run_folder import load_manifest, load_run
from infer.sampler import CoGenerator
from shards.core.errors import UsageError, UserError
from shards.core.storage import Folder
from tests.support import tiny_text, training
from tests.support.training import config_of, in_processes
from train import vae
from train.__main__ import app
from train.checkpoint import Checkpoints
from train.export import export
from train.log import measured_figures
from train.lora import train_lora
from train.run import run_stages
from train.vae import save_result, train_vae


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return training.write_scenes(tmp_path_factory.mktemp("data") / "scenes")


@pytest.fixture(scope="module")
def trained(shards: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of both stages."""
    out = tmp_path_factory.mktemp("run") / "whole"
    config = config_of(shards, tiny_text.models("sd21")[0], out)
    assert train_vae(config).finished and train_lora(config).finished
    return out


def _digest(folder: str) -> str:
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


# ---- another base under a run ----------------------------------------------------------------------------------------


def _changed_base(folder: Path, part: str = "", scheduler: str = "", factor: float = 1.1) -> str:
    """The tiny SD 2.1 with other weights in a part, or with another setting of its scheduler."""
    shutil.copytree(tiny_text.models("sd21")[0], folder)
    if part:
        (file,) = (folder / part).glob("*.safetensors")
        save_file({name: factor * tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    if scheduler:
        path = folder / "scheduler" / "scheduler_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | json.loads(scheduler)))
    return str(folder)


@pytest.mark.parametrize(
    ("part", "scheduler", "named"),
    [
        ("unet", "", r"base\.weights are those of"),
        ("text_encoder", "", r"base\.text\.text_encoder has other weights"),
        ("", '{"prediction_type": "epsilon"}', r"base\.prediction_type was 'v_prediction', and now it is 'epsilon'"),
        ("", '{"beta_end": 0.02}', r"base\.scheduler\.beta_end was"),
        ("", '{"rescale_betas_zero_snr": true}', r"base\.scheduler\.rescale_betas_zero_snr was"),
    ],
)
def test_stage_two_continues_on_its_own_base_only(
    part: str, scheduler: str, named: str, shards: str, trained: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained, tmp_path / "run")
    base = _changed_base(tmp_path / "base", part, scheduler)
    with pytest.raises(UserError, match=rf"was made with another base: its {named}.*give the same --base"):
        train_lora(config_of(shards, base, tmp_path / "run"))
    assert _digest(str(tmp_path / "run" / "vae")) == _digest(str(trained / "vae"))


def test_both_stages_refuse_a_base_with_another_vae_than_stage_one_had(
    shards: str, trained: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained, tmp_path / "run")
    base = _changed_base(tmp_path / "base", "vae")
    with pytest.raises(UserError, match=r"was made with another base: its base\.vae\.weights has other weights"):
        train_vae(config_of(shards, base, tmp_path / "run"))
    shutil.rmtree(tmp_path / "run" / "training")  # stage 2 would begin
    with pytest.raises(UserError, match=r"vae is no intrinsic VAE of this base: .*\(vae\.weights in base\.json\)"):
        train_lora(config_of(shards, base, tmp_path / "run"))
    other = dataclasses.replace(config_of(shards, base, tmp_path / "run", "lora.loop.steps=1"), other_weights=True)
    assert train_lora(other).finished


def test_stage_one_of_sd_is_refused_under_sdxl_by_the_scale_of_its_latents(
    shards: str, trained: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_text.models("sdxl")[0], tmp_path / "sdxl")
    config = json.loads((base / "vae" / "config.json").read_text())
    (base / "vae" / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.13025}))
    shutil.copytree(trained / "vae", tmp_path / "run" / "vae")
    with pytest.raises(
        UserError, match=r"its scaling_factor is 0\.\d+, the base's 0\.13025; train stage 1 beside this"
    ):
        train_lora(config_of(shards, str(base), tmp_path / "run"))


def test_a_checkpoint_that_says_less_of_its_base_is_continued_with_a_note(
    shards: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(trained, tmp_path / "run")
    for path in (out / "training" / "lora" / "checkpoints").glob("*/state.json"):
        state = json.loads(path.read_text())
        state["identity"]["base"] = state["identity"]["base"]["network"]["architecture"]
        path.write_text(json.dumps(state))
    (out / "vae" / "base.json").unlink()
    assert train_lora(config_of(shards, tiny_text.models("sd21")[0], out)).finished
    said = capsys.readouterr().err
    assert "before checkpoints said which weights their base has" in said
    assert "does not say beside which base it was trained" in said


# ---- checkpoints are runs --------------------------------------------------------------------------------------------


def test_any_checkpoint_becomes_a_run_folder_that_samples(shards: str, tmp_path: Path) -> None:
    base = tiny_text.models("sd21")[0]
    both = ("lora.loop.validate_every=1", "lora.loop.learning_rate=1e-2", "lora.loop.keep=9", "vae.loop.steps=1")
    config = config_of(shards, base, tmp_path / "run", *both)
    assert train_vae(config).finished and train_lora(config).finished
    checkpoints = Checkpoints(tmp_path / "run" / "training" / "lora" / "checkpoints", 9)
    (tmp_path / "run" / "manifest.json").unlink()  # as while the training goes on

    runner = CliRunner()
    scores = {step: checkpoints.read(step).score for step in checkpoints.steps()}
    best = min(scores, key=lambda step: scores[step] or 0.0)
    for wanted, step in (("best", best), ("last", 5), ("2", 2)):
        out = tmp_path / wanted
        found = runner.invoke(app, ["export", str(tmp_path / "run"), "--checkpoint", wanted, "--out", str(out)])
        assert found.exit_code == 0 and f"step {step} of lora" in found.output, found.output
        manifest = load_manifest(str(out))
        assert (manifest.training["steps"], manifest.training["held_out_loss"]) == (step, scores[step])
        tensors = load_file(out / "lora.safetensors")
        average = checkpoints.read(step).average
        assert sorted(v.double().sum().item() for v in tensors.values()) == sorted(
            v.double().sum().item() for v in average.values()
        )
    with CoGenerator.from_pretrained(base, str(tmp_path / "2"), device="cpu") as generator:
        generator.pipeline.set_progress_bar_config(disable=True)
        assert generator("a ball", steps=1, size=32).intrinsics[0]["normal"].values.shape == (32, 32, 3)

    for arguments, message in (
        (["--checkpoint", "7"], r"has no checkpoint of step 7; it has 1, 2, 3, 4, 5"),
        (["--checkpoint", "first"], r"--checkpoint first: give best, last, or a step"),
        (["--stage", "both"], r"--stage both: give lora or vae"),
    ):
        found = runner.invoke(app, ["export", str(tmp_path / "run"), "--out", str(tmp_path / "x"), *arguments])
        assert found.exception is not None and re.search(message, str(found.exception)), found.exception
    with pytest.raises(UserError, match=r"is the folder of a training"):
        export(tmp_path / "run", stage="lora", checkpoint="best", out=tmp_path / "run")
    save_result(tiny_text.intrinsic_vae(), tmp_path / "run" / "vae")
    with pytest.raises(UserError, match=r"is not the one that the LoRA of step 5 was trained with"):
        export(tmp_path / "run", stage="lora", checkpoint="last", out=tmp_path / "y")


def test_a_checkpoint_of_stage_one_becomes_a_vae_that_stage_two_takes(
    shards: str, trained: Path, tmp_path: Path
) -> None:
    done = export(trained, stage="vae", checkpoint="last", out=tmp_path / "vae-run")
    assert done.step == 5
    theirs, mine = (
        load_file(run / "vae" / "diffusion_pytorch_model.safetensors") for run in (trained, tmp_path / "vae-run")
    )
    assert theirs.keys() == mine.keys() and all(torch.equal(theirs[name], mine[name]) for name in theirs)
    config = config_of(shards, tiny_text.models("sd21")[0], tmp_path / "vae-run", "lora.loop.steps=1")
    assert train_lora(config).finished


# ---- few samples -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "held_out"), [(1, 0.02), (3, 0.0)])
def test_one_to_four_samples_can_be_overfitted_end_to_end(
    count: int, held_out: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = training.write_scenes(tmp_path / "few", shards=1, per_shard=count)
    base = tiny_text.models("sd21")[0]
    settings = (f"data.held_out={held_out}", "vae.loop.learning_rate=1e-2", "lora.loop.learning_rate=1e-2")
    config = config_of(few, base, tmp_path / "run", *settings, "lora.loop.batch=4", "lora.loop.sheets=1")
    run_stages(config, ("vae", "lora"))
    said = capsys.readouterr()
    why = "data.held_out = 0" if not held_out else rf"none of {count} samples falls into data.held_out = {held_out}"
    assert re.search(rf"nothing is held out \({why}\): what is measured is trained on, too", said.err)
    assert "trained on" in said.out and "held out" not in said.out
    for stage in ("vae", "lora"):
        log = (tmp_path / "run" / "training" / stage / "log.jsonl").read_text()
        assert "trained_on/loss" in log and "held_out/" not in log
        first, *_, last = measured_figures(tmp_path / "run" / "training" / stage)
        assert last["loss"] < first["loss"]
    load_run(str(tmp_path / "run"))


def test_samples_that_are_all_held_out_are_an_error_message_that_names_the_setting(tmp_path: Path) -> None:
    few = training.write_scenes(tmp_path / "few", shards=1, per_shard=2)
    config = config_of(few, tiny_text.models("sd21")[0], tmp_path / "run", "data.held_out=1.0")
    with pytest.raises(UserError, match=r"all 2 samples of .*few are held out by data.held_out = 1.0: set it to 0"):
        train_vae(config)
    weights = config_of(few, tiny_text.models("sd21")[0], tmp_path / "run", "data.weights=[1.0,2.0]")
    with pytest.raises(UsageError, match=r"data.weights has 2 numbers for 1 datasets"):
        train_vae(weights)


def test_sigterm_at_the_end_of_stage_one_does_not_begin_stage_two(
    shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = vae.save_result

    def interrupted(*arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        write(*arguments)

    monkeypatch.setattr(vae, "save_result", interrupted)
    config = config_of(shards, tiny_text.models("sd21")[0], tmp_path, "vae.loop.steps=1", "lora.loop.steps=1")
    run_stages(config, ("vae", "lora"))
    assert (tmp_path / "vae" / "config.json").exists() and not (tmp_path / "training" / "lora").exists()
    assert "stopped after vae was done; the same command continues with lora" in capsys.readouterr().err
    monkeypatch.undo()
    run_stages(config, ("vae", "lora"))
    load_run(str(tmp_path))


def _dies_writing(name: str, stage: str, shards: str, out: Path, rank: int) -> None:
    """Writes the result of a run that is trained already, and dies, as by kill -9, just before this file of it."""
    write = Folder.write

    def die(self: Folder, file: str, data: bytes) -> None:
        if file == name:
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, file, data)

    Folder.write = die  # type: ignore[method-assign]
    {"vae": train_vae, "lora": train_lora}[stage](config_of(shards, tiny_text.models("sd21")[0], out))


@pytest.mark.parametrize(
    ("stage", "name"), [("vae", ".vae.tmp/base.json"), ("lora", "vae/config.json"), ("lora", "manifest.json")]
)
def test_a_result_whose_writing_was_cut_off_is_never_taken_for_one_and_is_written_by_the_same_command(
    stage: str, name: str, shards: str, trained: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(trained, tmp_path / "run")
    if stage == "vae":  # as after the last step, before anything was written
        shutil.rmtree(out / "vae")
    status = in_processes(_dies_writing, name, stage, shards, out, log=tmp_path / "trace")
    assert status == [-signal.SIGKILL]
    if stage == "vae":
        with pytest.raises(UserError, match="has no finished intrinsic VAE; train it first"):
            train_lora(config_of(shards, tiny_text.models("sd21")[0], out))
        assert train_vae(config_of(shards, tiny_text.models("sd21")[0], out)).finished
        assert train_lora(config_of(shards, tiny_text.models("sd21")[0], out)).finished
    else:
        with pytest.raises(UserError, match=r"not a finished run folder: .* `python -m train export`"):
            load_run(str(out))
        assert train_lora(config_of(shards, tiny_text.models("sd21")[0], out)).finished
    theirs, mine = load_run(str(trained)), load_run(str(out))
    assert theirs.manifest.files["lora.safetensors"] == mine.manifest.files["lora.safetensors"]
    assert dataclasses.replace(theirs.manifest, files={}) == dataclasses.replace(mine.manifest, files={})
    weights, others = theirs.vae.state_dict(), mine.vae.state_dict()
    assert all(torch.equal(weights[key], others[key]) for key in weights)
