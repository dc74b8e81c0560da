"""LoRA files of the intrinsic stream, and community LoRAs beside it: stock readers, exact effects, no silent change."""

from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from infer.model.denoiser import JointDenoiser
from infer.model.lora import METADATA_KEY, LoraWeights, StreamLinear, read_lora, save_lora
from infer.model.schedules import Off
from shards.core.errors import UserError
from tests.support import tiny
from tests.support.joint import IMAGES, ROWS, image_inputs, image_rows, trained


def test_stream_linear_is_the_base_until_trained_and_then_changes_the_intrinsic_rows_only():
    base = nn.Linear(6, 5)
    adapter = StreamLinear(base, rank=3, alpha=6)
    x = torch.randn(8, 4, 6)
    torch.testing.assert_close(adapter(base(x), x, IMAGES), base(x))
    nn.init.normal_(adapter.up)
    y, delta = adapter(base(x), x, IMAGES), 2 * x @ adapter.down.mT @ adapter.up.mT
    intrinsic = torch.tensor([0, 0, 1, 1, 0, 0, 1, 1]).bool()
    torch.testing.assert_close(y[~intrinsic], base(x)[~intrinsic])
    torch.testing.assert_close(y[intrinsic], base(x)[intrinsic] + delta[intrinsic])
    assert [name for name, _ in adapter.named_parameters()] == ["down", "up"]


@torch.no_grad()
def test_a_saved_lora_is_one_that_stock_diffusers_loads(tmp_path):
    pipeline = tiny.sd21_pipeline()
    denoiser = trained(pipeline.unet, alpha=2.0)
    path = tmp_path / "lora.safetensors"
    save_lora(path, denoiser.lora_weights(), "unet")
    with safe_open(path, "pt") as file:
        assert list(file.metadata()) == [METADATA_KEY]  # several are written in any order: the same LoRA in other files
    stock = tiny.sd21_pipeline()
    stock.load_lora_weights(tmp_path, weight_name="lora.safetensors", adapter_name="ours")
    layers = [m for m in stock.unet.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert len(layers) == 4 * denoiser.check()
    assert all(layer.r == {"ours": 4} and layer.scaling == {"ours": 0.5} for layer in layers)
    # a network whose every row goes through the stock LoRA, and self-attends, is our intrinsic stream without the image
    arguments = tiny.inputs(pipeline.unet, 2)
    theirs = tiny.forward(stock.unet, arguments)
    mine = by_hand(tiny.sd21(), denoiser.lora_weights())
    torch.testing.assert_close(tiny.forward(mine, arguments), theirs, rtol=0, atol=1e-5)
    # what stock diffusers writes, we read: the same adapters
    stock.save_lora_weights(tmp_path / "again", peft.get_peft_model_state_dict(stock.unet, adapter_name="ours"))
    again = load_file(tmp_path / "again" / "pytorch_lora_weights.safetensors")
    assert all(torch.equal(tensor, again[key]) for key, tensor in load_file(path).items())
    loaded = read_lora(path)
    assert (loaded.rank, loaded.alpha, loaded.targets) == (4, 2.0, ("q", "k", "v", "out"))
    other = JointDenoiser.install(tiny.sd21(), lora=loaded)
    assert all(torch.equal(a, b) for a, b in zip(other.lora_parameters(), denoiser.lora_parameters(), strict=True))


def by_hand(network: nn.Module, lora: LoraWeights) -> nn.Module:
    """The network with the adapters merged into its weights."""
    for key in {key.rsplit(".lora_", 1)[0] for key in lora.tensors}:
        down, up = (lora.tensors[f"{key}.lora_{half}.weight"] for half in "AB")
        network.get_submodule(key).weight += lora.alpha / lora.rank * up @ down
    return network


@torch.no_grad()
def test_a_pixart_lora_loads_with_stock_peft(tmp_path):
    network = tiny.pixart_alpha()
    denoiser = trained(network, targets=("q", "v"))
    save_lora(tmp_path / "lora.safetensors", denoiser.lora_weights(), "transformer")
    loaded = read_lora(tmp_path / "lora.safetensors")
    assert loaded.targets == ("q", "v") and loaded.alpha == 4
    stock = tiny.pixart_alpha()
    modules = sorted({key.rsplit(".lora_", 1)[0] for key in loaded.tensors})
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, lora_alpha=4, target_modules=modules), stock)
    result = peft.set_peft_model_state_dict(stock, dict(loaded.tensors))
    assert not result.unexpected_keys
    arguments = tiny.inputs(network, 2)
    expected = tiny.forward(by_hand(tiny.pixart_alpha(), loaded), arguments)
    torch.testing.assert_close(tiny.forward(stock, arguments), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_lora_that_does_not_fit_is_refused(tmp_path):
    lora = trained(tiny.sd15()).lora_weights()
    with pytest.raises(UserError, match="does not fit"):
        JointDenoiser.install(tiny.sdxl(), lora=lora)
    with pytest.raises(UserError, match="does not fit"):
        JointDenoiser.install(tiny.sd15(block_out_channels=(8, 16, 32, 32)), lora=lora)
    (tmp_path / "a.safetensors").write_bytes(b"not a file of tensors")
    with pytest.raises(UserError, match="could not be read"):
        read_lora(tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="no adapters"):
        JointDenoiser.install(tiny.sd15()).lora_weights()


def community_lora(path: Any, base: str = "sd15") -> None:
    """Somebody's LoRA on the base, on many kinds of layers, as stock diffusers writes it."""
    pipeline = tiny.PIPELINES[base]()
    targets = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.2", "proj_in", "conv1", "time_emb_proj"]
    pipeline.unet.add_adapter(peft.LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False))
    pipeline.save_lora_weights(path, peft.get_peft_model_state_dict(pipeline.unet))


@pytest.mark.parametrize("first", ["lora", "install"])
@torch.no_grad()
def test_a_community_lora_acts_on_the_image_stream_only_with_its_strength(tmp_path, first):
    community_lora(tmp_path)
    arguments = tiny.inputs(tiny.sd15(), ROWS)
    plain = tiny.sd15_pipeline().unet
    reference = trained(plain)
    reference.prepare(IMAGES, Off())
    without = tiny.forward(plain, arguments)

    pipeline = tiny.sd15_pipeline()
    if first == "lora":
        pipeline.load_lora_weights(tmp_path, adapter_name="theirs")
    denoiser = trained(pipeline.unet)
    if first == "install":
        pipeline.load_lora_weights(tmp_path, adapter_name="theirs")
    stock = tiny.sd15_pipeline()
    stock.load_lora_weights(tmp_path, adapter_name="theirs")
    denoiser.prepare(IMAGES, Off())
    for strength in (1.0, 0.5):
        pipeline.set_adapters("theirs", strength)
        stock.set_adapters("theirs", strength)
        expected = tiny.forward(stock.unet, image_inputs(arguments))
        image = image_rows(tiny.forward(pipeline.unet, arguments))
        torch.testing.assert_close(image, expected, rtol=0, atol=1e-5)
        assert (image - image_rows(without)).abs().max() > 1e-3
    pipeline.set_adapters("theirs", 0.0)
    torch.testing.assert_close(tiny.forward(pipeline.unet, arguments), without, rtol=0, atol=1e-5)
    pipeline.unload_lora_weights()
    torch.testing.assert_close(tiny.forward(pipeline.unet, arguments), without, rtol=0, atol=1e-6)


@torch.no_grad()
def test_a_community_lora_leaves_the_intrinsic_streams_own_layers_untouched(tmp_path):
    community_lora(tmp_path)
    arguments = tiny.inputs(tiny.sd15(), ROWS)
    seen: dict[str, list[Tensor]] = {"with": [], "without": []}
    for name, given in seen.items():
        pipeline = tiny.sd15_pipeline()
        denoiser = trained(pipeline.unet)
        if name == "with":
            pipeline.load_lora_weights(tmp_path)
        denoiser.prepare(IMAGES, Off())
        layer = pipeline.unet.down_blocks[0].resnets[0]  # before the first meeting of the streams
        layer.register_forward_hook(lambda module, inputs, output, given=given: given.append(output))
        tiny.forward(pipeline.unet, arguments)
    ours, plain = (seen[name][0].unflatten(0, (-1, 2, IMAGES)) for name in ("with", "without"))
    torch.testing.assert_close(ours[:, 1], plain[:, 1], rtol=0, atol=1e-6)
    assert (ours[:, 0] - plain[:, 0]).abs().max() > 1e-3


@pytest.mark.parametrize("first", ["lora", "install"])
@torch.no_grad()
def test_a_community_lora_on_pixart_comes_by_stock_peft(tmp_path, first):
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_v", "proj_out", "linear_1"], init_lora_weights=False)
    peft.get_peft_model(tiny.pixart_alpha(), config).save_pretrained(tmp_path)
    arguments = tiny.inputs(tiny.pixart_alpha(), ROWS)
    plain = tiny.pixart_alpha()
    expected = tiny.forward(peft.PeftModel.from_pretrained(tiny.pixart_alpha(), tmp_path), image_inputs(arguments))
    assert (expected - tiny.forward(plain, image_inputs(arguments))).abs().max() > 1e-3
    if first == "lora":
        network = peft.PeftModel.from_pretrained(plain, tmp_path)
        denoiser = trained(network)
    else:
        denoiser = trained(plain)
        network = peft.PeftModel.from_pretrained(plain, tmp_path)
    denoiser.prepare(IMAGES, Off())
    torch.testing.assert_close(image_rows(tiny.forward(network, arguments)), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_fused_community_lora_is_refused_and_uninstalling_frees_an_unfused_one(tmp_path):
    community_lora(tmp_path)
    pipeline = tiny.sd15_pipeline()
    pipeline.load_lora_weights(tmp_path)
    arguments = tiny.inputs(pipeline.unet, ROWS)
    stock = tiny.forward(pipeline.unet, arguments)
    denoiser = trained(pipeline.unet)
    denoiser.prepare(IMAGES, Off())
    pipeline.fuse_lora()
    with pytest.raises(UserError, match="unfuse"):
        tiny.forward(pipeline.unet, arguments)
    pipeline.unfuse_lora()
    tiny.forward(pipeline.unet, arguments)
    denoiser.uninstall()
    torch.testing.assert_close(tiny.forward(pipeline.unet, arguments), stock, rtol=0, atol=1e-5)
