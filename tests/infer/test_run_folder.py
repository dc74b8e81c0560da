"""Run folders: stock formats, a manifest that fits its base or is refused with a sentence, nothing half-written."""

import dataclasses
import json

import peft
import pytest
import safetensors.torch
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from infer.bases.loading import describe_base, network_of, open_base
from infer.model.denoiser import JointDenoiser
from infer.run_folder import Manifest, load_manifest, load_run, save_run
from infer.sampler import CoGenerator
from shards.core.errors import UserError
from shards.packing import CHANNELS, DepthRange
from tests.support import tiny, tiny_text

BASES = sorted(tiny.PIPELINES)


@pytest.fixture
def run(tmp_path):
    return tiny_text.save_run(tiny.PIPELINES["sd15"](), tmp_path / "run")


def test_a_run_folder_has_stock_files_and_loads_to_the_bit(run):
    assert sorted(path.name for path in run.iterdir()) == ["lora.safetensors", "manifest.json", "vae"]
    loaded = load_run(str(run))
    assert loaded.manifest.lora.rank == 4 and loaded.manifest.packing.depth == DepthRange()
    assert loaded.vae.config.in_channels == CHANNELS
    for name, tensor in tiny_text.intrinsic_vae().state_dict().items():
        assert torch.equal(loaded.vae.state_dict()[name], tensor), name
    stock = safetensors.torch.load_file(run / "lora.safetensors")
    assert {key.removeprefix("unet.") for key in stock} == set(loaded.lora.tensors)


def test_any_fsspec_url_holds_a_run(run):
    loaded = load_run(str(run))
    save_run("memory://runs/one", loaded.manifest, loaded.lora, loaded.vae)
    again = load_run("memory://runs/one")
    assert dataclasses.replace(again.manifest, files={}) == dataclasses.replace(loaded.manifest, files={})
    assert all(torch.equal(again.lora.tensors[key], tensor) for key, tensor in loaded.lora.tensors.items())


@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl"])
def test_stock_diffusers_loads_the_lora_and_the_vae(name, tmp_path):
    pipeline = tiny.PIPELINES[name]()
    run = tiny_text.save_run(pipeline, tmp_path)
    pipeline.load_lora_weights(run, weight_name="lora.safetensors")
    adapted = {key for key, _ in pipeline.unet.named_parameters() if "lora_" in key}
    assert len(adapted) == len(load_run(str(run)).lora.tensors)
    assert isinstance(AutoencoderKL.from_pretrained(run / "vae"), AutoencoderKL)


def test_stock_peft_loads_the_lora_of_a_transformer(tmp_path):
    """PixArt's pipelines have no LoRA loader: peft's own functions take the file."""
    network = tiny.pixart_alpha()
    run = tiny_text.save_run(tiny.PIPELINES["pixart_alpha"](), tmp_path)
    tensors = safetensors.torch.load_file(run / "lora.safetensors")
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=r".*attn1\.(to_q|to_k|to_v|to_out\.0)")
    peft.inject_adapter_in_model(config, network)
    plain = {key.removeprefix("transformer."): tensor for key, tensor in tensors.items()}
    result = peft.set_peft_model_state_dict(network, plain)
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "lora_" in key]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda m: dataclasses.replace(m, prediction_type="v_prediction"), "prediction_type"),
        (lambda m: dataclasses.replace(m, base=dataclasses.replace(m.base, network="Other")), "base.network"),
        (
            lambda m: dataclasses.replace(m, base=dataclasses.replace(m.base, architecture="0" * 64, parameters="")),
            "base.architecture",
        ),
        (lambda m: dataclasses.replace(m, base=dataclasses.replace(m.base, weights=(9.0,) * 64)), "base.weights"),
        (
            lambda m: dataclasses.replace(
                m, packing=dataclasses.replace(m.packing, slices=m.packing.slices | {"line": (6, 7)})
            ),
            "packing",
        ),
    ],
)
def test_a_manifest_that_does_not_fit_the_base_is_refused_naming_the_field(run, change, field):
    loaded = load_run(str(run))
    save_run(str(run), change(loaded.manifest), loaded.lora, loaded.vae)
    with pytest.raises(UserError, match=f"does not fit the base.*{field}"):
        CoGenerator(tiny.PIPELINES["sd15"](), str(run))


def test_a_run_of_one_base_is_refused_by_another(tmp_path):
    run = tiny_text.save_run(tiny.PIPELINES["sdxl"](), tmp_path)
    for other in ("sd15", "pixart_alpha"):
        with pytest.raises(UserError, match="does not fit the base"):
            CoGenerator(tiny.PIPELINES[other](), str(run))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_base_fits_in_every_dtype_and_a_fine_tuned_one_only_when_told(run, dtype):
    manifest = load_manifest(str(run))
    network = tiny.sd15().to(dtype)
    manifest.check(describe_base(network, "half"), "epsilon")
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1.05)
    with pytest.raises(UserError, match=r"base\.weights.*other-weights"):
        manifest.check(describe_base(network, "tuned"), "epsilon")
    manifest.check(describe_base(network, "tuned"), "epsilon", other_weights=True)


def test_a_base_is_recognised_whatever_was_put_into_it():
    pipeline = tiny.PIPELINES["sd15"]()
    before = describe_base(pipeline.unet, "base")
    denoiser = JointDenoiser.install(pipeline.unet, rank=2)
    assert describe_base(pipeline.unet, "base") == before
    denoiser.uninstall()
    pipeline.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "conv1"]))
    assert describe_base(pipeline.unet, "base") == before


@pytest.mark.parametrize("name", ["lora.safetensors", "vae/config.json", "vae/diffusion_pytorch_model.safetensors"])
def test_a_damaged_or_missing_file_is_named(run, name):
    data = (run / name).read_bytes()
    (run / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(UserError, match=f"{name} is not the file that the manifest describes"):
        load_run(str(run))
    (run / name).unlink()
    with pytest.raises(UserError, match=f"cannot read .*{name}"):
        load_run(str(run))


def test_an_unfinished_folder_and_foreign_manifests_are_refused(run):
    manifest = json.loads((run / "manifest.json").read_text())
    for change, message in (
        ({"version": 2}, "version 2"),
        ({"surprise": 1}, "surprise"),
        ({"prediction_type": 5}, "prediction_type"),
        ({"lora": {"rank": 4}}, "lora.alpha"),
    ):
        (run / "manifest.json").write_text(json.dumps(manifest | change))
        with pytest.raises(UserError, match=message):
            load_manifest(str(run))
    (run / "manifest.json").write_text("[]")
    with pytest.raises(UserError, match="version None"):
        load_manifest(str(run))
    (run / "manifest.json").unlink()
    with pytest.raises(UserError, match="not a finished run folder"):
        load_run(str(run))


def test_saving_over_a_run_never_leaves_a_manifest_beside_other_files(run, monkeypatch):
    loaded = load_run(str(run))
    from shards.core.storage import Folder

    def full(self, name, data):
        raise UserError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "write", full)
        with pytest.raises(UserError, match="disk is full"):
            save_run(str(run), loaded.manifest, loaded.lora, loaded.vae)
    with pytest.raises(UserError, match="not a finished run folder"):
        load_run(str(run))


def test_a_manifest_survives_json():
    network = tiny.sd15()
    from infer.run_folder import manifest_for

    lora = JointDenoiser.install(network, rank=2, targets=("q", "v")).lora_weights()
    manifest = manifest_for(network, "tiny", "epsilon", lora, training={"steps": 10, "rates": [1e-4]})
    assert Manifest.from_json(manifest.to_json(), "here").to_json() == manifest.to_json()
    assert manifest.lora.targets == ("q", "v")
    assert manifest.stage_map.stages == 9


@pytest.mark.parametrize("name", BASES)
def test_a_base_folder_is_loaded_and_nothing_of_it_is_unpickled(name, tmp_path):
    folder = tiny_text.save_base(name, tmp_path)
    pipeline = open_base(str(folder), dtype=torch.float32)
    assert type(pipeline) is type(tiny.PIPELINES[name]())
    part = "transformer" if name.startswith("pixart") else "unet"
    weights = next((folder / part).glob("*.safetensors"))
    torch.save(safetensors.torch.load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(UserError, match="cannot load the base"):
        open_base(str(folder), dtype=torch.float32)


def test_bases_that_are_not_there_are_sentences(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, message in (
        (str(tmp_path), "no model_index.json"),
        (str(tmp_path / "missing"), "neither a folder here nor a hub id"),
        ("nobody/nothing-here", "check the id and the network"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            open_base(name, dtype=torch.float32)
        assert "\n" not in str(caught.value)


def test_a_compiled_or_foreign_pipeline_is_refused():
    pipeline = tiny.PIPELINES["sd15"]()
    assert isinstance(network_of(pipeline), UNet2DConditionModel)
    pipeline.unet = torch.compile(pipeline.unet)
    with pytest.raises(UserError, match="compiled already"):
        network_of(pipeline)
    with pytest.raises(UserError, match="cannot be a base"):
        network_of(torch.nn.Identity())


# ---- one base in other words -----------------------------------------------------------------------------------------


def written(network: torch.nn.Module) -> dict:
    return {key: value for key, value in network.config.items() if not key.startswith("_")}


def in_other_words(name: str) -> torch.nn.Module:
    """The same network as tests.support.tiny makes, as the config.json of a fine-tuned variant says it."""
    network = tiny.NETWORKS[name]()
    config = written(network)
    if name.startswith("pixart"):
        config |= {"use_additional_conditions": name == "pixart_alpha", "upcast_attention": None, "dropout": 0.1}
        config |= {"interpolation_scale": 2 if name == "pixart_alpha" else 1}
    else:
        heads = config["attention_head_dim"]
        blocks = len(config["down_block_types"])
        config |= {"attention_head_dim": [heads] * blocks if isinstance(heads, int) else list(heads)}
        config |= {"cross_attention_dim": [config["cross_attention_dim"]] * blocks, "layers_per_block": [1] * blocks}
        config |= {"sample_size": 96, "upcast_attention": None, "dual_cross_attention": None, "dropout": 0.1}
        config |= {"only_cross_attention": [False] * blocks, "mid_block_scale_factor": 1.0, "said_by_a_trainer": "yes"}
    variant = type(network).from_config(config)
    variant.load_state_dict(network.state_dict())
    return variant.eval()


@pytest.mark.parametrize("name", BASES)
def test_one_network_in_other_words_is_the_same_base(name, tmp_path):
    ours, variant = tiny.NETWORKS[name](), in_other_words(name)
    given = tiny.inputs(ours, 2, size=16)
    assert torch.equal(tiny.forward(variant, given), tiny.forward(ours, given))  # or else they were two networks
    run = tiny_text.save_run(tiny.PIPELINES[name](), tmp_path)
    manifest = load_manifest(str(run))
    base = describe_base(variant, "variant")
    assert base.architecture != manifest.base.architecture
    manifest.check(base, manifest.prediction_type)


@pytest.mark.parametrize(
    ("name", "changes", "field"),
    [
        ("sd15", {"attention_head_dim": (2, 2, 4, 2)}, "attention_head_dim"),
        ("sd15", {"act_fn": "gelu"}, "act_fn"),
        ("sd15", {"norm_num_groups": 4}, "norm_num_groups"),
        ("sd15", {"flip_sin_to_cos": False}, "flip_sin_to_cos"),
        ("pixart_sigma", {"sample_size": 32}, "sample_size"),
        ("pixart_sigma", {"interpolation_scale": 4}, "interpolation_scale"),
        ("sd15", {"block_out_channels": (16, 16, 32, 64)}, "block_out_channels"),
    ],
)
def test_another_network_is_refused_naming_the_setting_even_as_a_variant(name, changes, field, tmp_path):
    network = tiny.NETWORKS[name]()
    run = tiny_text.save_run(tiny.PIPELINES[name](), tmp_path)
    other = type(network).from_config(written(network) | changes)
    manifest = load_manifest(str(run))
    with pytest.raises(UserError, match=rf"base\.config .* has {field} = "):
        manifest.check(describe_base(other, "other"), manifest.prediction_type, other_weights=True)


def test_a_manifest_that_holds_a_digest_only_fits_its_own_base(run):
    manifest = load_manifest(str(run))
    older = dataclasses.replace(manifest, base=dataclasses.replace(manifest.base, config={}, parameters=""))
    older.check(describe_base(tiny.sd15(), "base"), "epsilon")
    with pytest.raises(UserError, match=r"base\.architecture"):
        older.check(describe_base(tiny.sd15(act_fn="gelu"), "other"), "epsilon", other_weights=True)
