"""The joint denoiser over every base: what the weight 0, 1 and any other give, and that nothing is ever done silently."""

import copy
import json
from typing import Any

import accelerate
import peft
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from infer.denoiser import JointDenoiser
from infer.lora import METADATA_KEY, LoraWeights, StreamLinear, read_lora, save_lora
from infer.processor import JointProcessor, self_attention_layers
from infer.schedules import Drop, Gaussian, Joint, Off, Table
from shards.errors import UserError
from tests import oracle, tiny

BASES = sorted(tiny.NETWORKS)
IMAGES, ROWS = 2, 8  # two guidance halves, two streams, two images
HALF = Gaussian(tau=500.0, alpha=0.4)  # w = 0.4 at the tests' timestep


def image_rows(x: Tensor) -> Tensor:
    """(G*2*B, ...) -> (G*B, ...)."""
    return x.unflatten(0, (-1, 2, IMAGES))[:, 0].flatten(0, 1)


def image_inputs(arguments: dict[str, Any]) -> dict[str, Any]:
    def pick(x: Any) -> Any:
        if isinstance(x, dict):
            return {name: pick(value) for name, value in x.items()}
        return image_rows(x) if isinstance(x, Tensor) and x.ndim else x

    return {name: pick(value) for name, value in arguments.items()}


def at(network: nn.Module, arguments: dict[str, Any], timestep: float) -> Tensor:
    return tiny.forward(network, arguments | {"timestep": torch.full_like(arguments["timestep"], timestep)})


def trained(network: nn.Module, rank: int = 4, **options: Any) -> JointDenoiser:
    """Installed with adapters that do something."""
    denoiser = JointDenoiser.install(network, rank=rank, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in denoiser.lora_parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return denoiser


def by_oracle(
    network: nn.Module, arguments: dict[str, Any], weight: Any, lora: LoraWeights
) -> tuple[Tensor, dict[str, Tensor]]:
    """The same network and arguments in float64, with the oracle in every self-attention layer; and the shares."""
    exact = copy.deepcopy(network).double()
    processors = {}
    for name, layer in self_attention_layers(exact).items():
        tensors, scale = dict(lora.tensors), lora.alpha / lora.rank
        layer.processor = processors[name] = oracle.Processor(name, IMAGES, weight, tensors, scale)

    def double(x: Any) -> Any:
        if isinstance(x, dict):
            return {key: double(value) for key, value in x.items()}
        return x.double() if isinstance(x, Tensor) else x

    return tiny.forward(exact, double(arguments)), {name: p.share for name, p in processors.items()}


@pytest.mark.parametrize("base", BASES)
@torch.no_grad()
def test_weight_zero_gives_exactly_the_stock_networks_image(base):
    network = tiny.NETWORKS[base]()
    arguments = tiny.inputs(network, ROWS)
    stock = tiny.forward(network, image_inputs(arguments))
    denoiser = trained(network)
    denoiser.prepare(IMAGES, Off())
    both = tiny.forward(network, arguments)
    torch.testing.assert_close(image_rows(both), stock, rtol=0, atol=1e-5)
    denoiser.prepare(IMAGES, Off(), timesteps=[500.0], intrinsics=False)
    alone = tiny.forward(network, arguments)
    assert torch.equal(image_rows(alone), stock)  # the kernels saw the same shapes
    assert alone.shape == both.shape and alone.isfinite().all()


@pytest.mark.parametrize("base", BASES)
@torch.no_grad()
def test_the_streams_meet_in_joint_attention_only(base):
    network = tiny.NETWORKS[base]()
    denoiser = trained(network)
    arguments = tiny.inputs(network, ROWS)
    name = next(iter(arguments))
    other = arguments | {name: arguments[name].clone()}
    other[name].unflatten(0, (-1, 2, IMAGES))[:, 1] += 1
    outputs = {}
    for schedule in (Off(), HALF, Joint()):
        denoiser.prepare(IMAGES, schedule)
        outputs[schedule.name] = [image_rows(tiny.forward(network, a)) for a in (arguments, other)]
    assert torch.equal(*outputs["off"])
    assert (outputs["joint"][0] - outputs["joint"][1]).abs().max() > 1e-4
    assert (outputs["gaussian"][0] - outputs["gaussian"][1]).abs().max() > 1e-4


@pytest.mark.parametrize("weight", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("base", BASES)
@torch.no_grad()
def test_every_weight_equals_the_float64_formula_and_so_do_the_shares(base, weight):
    network = tiny.NETWORKS[base]()
    stock = copy.deepcopy(network)
    arguments = tiny.inputs(network, ROWS)
    denoiser = trained(network, alpha=2.0)
    denoiser.prepare(IMAGES, Gaussian(tau=500.0, alpha=weight), record="mean")
    output = tiny.forward(network, arguments)
    expected, shares = by_oracle(stock, arguments, weight, denoiser.lora_weights())
    scale = float(expected.abs().max().clamp(min=1))
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=1e-5 * scale)
    assert [share.layer for share in denoiser.shares] == list(denoiser.processors)
    for share in denoiser.shares:
        assert share.value.shape == (2, IMAGES) and share.timestep == 500.0
        assert share.value.min() >= 0 and share.value.max() <= 1
        mean = shares[share.layer].mean((1, 2)).unflatten(0, (-1, IMAGES))
        torch.testing.assert_close(share.value.double(), mean, rtol=0, atol=1e-5)
    denoiser.prepare(IMAGES, record=None)
    torch.testing.assert_close(
        tiny.forward(network, arguments), output, rtol=0, atol=1e-5 * scale
    )  # looking changes nothing


@torch.no_grad()
def test_a_share_map_has_a_value_for_each_query():
    network = tiny.sd15()
    stock, arguments = copy.deepcopy(network), tiny.inputs(network, ROWS)
    denoiser = trained(network)
    denoiser.prepare(IMAGES, HALF, record="map")
    tiny.forward(network, arguments)
    _, shares = by_oracle(stock, arguments, 0.4, denoiser.lora_weights())
    first = denoiser.shares[0]
    assert first.value.shape == (2, IMAGES, 64) and first.stage == 1
    torch.testing.assert_close(
        first.value.double(), shares[first.layer].mean(1).unflatten(0, (-1, IMAGES)), rtol=0, atol=1e-5
    )


@torch.no_grad()
def test_each_stage_gets_its_own_weight():
    network = tiny.sd15()
    arguments = tiny.inputs(network, ROWS)
    denoiser = trained(network)
    denoiser.prepare(IMAGES, Table((0.0,), (tuple(i / 10 for i in range(9)),)), record="mean")
    tiny.forward(network, arguments)
    assert {share.stage: bool(share.value.any()) for share in denoiser.shares} == {
        1: False, 2: True, 3: True, 5: True, 7: True, 8: True, 9: True,
    }  # fmt: skip
    denoiser.prepare(IMAGES, Drop(stages=(5,)))
    middle = tiny.forward(network, arguments)
    denoiser.prepare(IMAGES, Off())
    assert not torch.equal(image_rows(middle), image_rows(tiny.forward(network, arguments)))


@torch.no_grad()
def test_rows_with_timesteps_of_their_own_get_weights_of_their_own():
    network = tiny.pixart_sigma()
    arguments = tiny.inputs(network, ROWS)
    denoiser = trained(network)
    denoiser.prepare(IMAGES, HALF)
    times = torch.tensor([500.0, 430.0])
    mixed = tiny.forward(network, arguments | {"timestep": times.repeat(4)})
    for image, t in enumerate(times):
        alone = at(network, arguments, float(t))
        torch.testing.assert_close(mixed[image::2], alone[image::2], rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="different timesteps"):
        tiny.forward(network, arguments | {"timestep": torch.arange(8.0)})


@pytest.mark.parametrize("base", BASES)
@torch.no_grad()
def test_uninstalling_restores_the_network_exactly(base):
    network = tiny.NETWORKS[base]()
    arguments = tiny.inputs(network, ROWS)
    before, weights = tiny.forward(network, arguments), {k: v.clone() for k, v in network.state_dict().items()}
    processors, forward = network.attn_processors, network.forward
    denoiser = trained(network)
    denoiser.freeze()
    denoiser.prepare(IMAGES, Joint())
    assert not torch.equal(tiny.forward(network, arguments), before)
    denoiser.uninstall()
    assert torch.equal(tiny.forward(network, arguments), before)
    assert all(network.attn_processors[name] is processor for name, processor in processors.items())
    assert network.forward == forward and "forward" not in network.__dict__
    assert network.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in network.state_dict().items())
    assert all(p.requires_grad for p in network.parameters())
    JointDenoiser.install(network)


@pytest.mark.parametrize("base", ["sd21", "pixart_alpha"])
@torch.no_grad()
def test_a_removed_processor_raises_at_the_next_forward(base):
    network = tiny.NETWORKS[base]()
    denoiser = trained(network)
    denoiser.prepare(IMAGES, Joint())
    arguments = tiny.inputs(network, ROWS)
    layers = self_attention_layers(network)
    assert denoiser.check() == len(layers)
    last = list(layers)[-1]
    kept = layers[last].processor
    stock = next(p for p in network.attn_processors.values() if not isinstance(p, JointProcessor))
    layers[last].set_processor(stock)
    with pytest.raises(UserError, match=f"{len(layers) - 1} of {len(layers)}.*{last}"):
        tiny.forward(network, arguments)
    layers[last].set_processor(kept)
    tiny.forward(network, arguments)
    network.set_attn_processor(AttnProcessor2_0())
    with pytest.raises(UserError, match=f"0 of {len(layers)}"):
        tiny.forward(network, arguments)


@torch.no_grad()
def test_attention_without_the_wrapper_raises():
    network = tiny.sd15()
    denoiser = trained(network)
    denoiser.prepare(IMAGES, Joint())
    del network.__dict__["forward"]
    with pytest.raises(UserError, match="wrapper is gone"):
        tiny.forward(network, tiny.inputs(network, ROWS))


@torch.no_grad()
def test_wrong_use_is_a_sentence():
    network = tiny.sd15()
    denoiser = JointDenoiser.install(network)
    arguments = tiny.inputs(network, ROWS)
    with pytest.raises(UserError, match="not told"):
        tiny.forward(network, arguments)
    denoiser.prepare(3)
    with pytest.raises(UserError, match="8 rows"):
        tiny.forward(network, arguments)
    denoiser.prepare(IMAGES)
    with pytest.raises(UserError, match="attention mask"):
        network(**arguments, attention_mask=torch.ones(ROWS, 64))
    with pytest.raises(UserError, match="already installed"):
        JointDenoiser.install(network)
    with pytest.raises(UserError, match="timesteps"):
        denoiser.prepare(IMAGES, intrinsics=False)
    with pytest.raises(UserError, match="at least one"):
        denoiser.prepare(0)
    with pytest.raises(UserError, match="not one of"):
        JointDenoiser.install(tiny.sd15(), rank=4, targets=("q", "ff"))
    with pytest.raises(UserError, match="compiled already"):
        JointDenoiser.install(torch.compile(tiny.sd15()))
    with pytest.raises(UserError, match="no self-attention"):
        JointDenoiser.install(nn.Linear(2, 2))


@torch.no_grad()
def test_the_intrinsic_stream_is_dropped_only_once_it_cannot_matter_any_more():
    network = tiny.sd15()
    arguments = tiny.inputs(network, ROWS)
    rows: list[int] = []
    network.conv_in.register_forward_hook(lambda module, given, output: rows.append(len(output)))
    denoiser = trained(network)
    times = [900.0, 700.0, 500.0, 400.0, 100.0]
    late = Table((100.0, 400.0, 401.0), ((0.0,) * 9, (0.3,) * 9, (0.0,) * 9))
    for schedule, expected in (
        (Gaussian(), [8, 8, 8, 4, 4]),
        (late, [8, 8, 8, 8, 4]),
        (Off(), [4] * 5),
        (Joint(), [8] * 5),
    ):
        rows.clear()
        denoiser.prepare(IMAGES, schedule, timesteps=times, intrinsics=False)
        images = [image_rows(at(network, arguments, t)) for t in times]
        assert rows == expected
        denoiser.prepare(IMAGES, schedule)
        for t, image in zip(times, images, strict=True):
            torch.testing.assert_close(image_rows(at(network, arguments, t)), image, rtol=0, atol=1e-5)
    denoiser.prepare(IMAGES, Gaussian(), timesteps=times, intrinsics=False)
    at(network, arguments, 100.0)
    with pytest.raises(UserError, match="was dropped"):
        at(network, arguments, 700.0)


@pytest.mark.parametrize("base", ["sd21", "sdxl", "pixart_alpha"])
def test_training_changes_the_adapters_only_and_untrained_adapters_are_the_base(base):
    network = tiny.NETWORKS[base]()
    arguments = tiny.inputs(network, ROWS)
    before = {name: p.clone() for name, p in network.named_parameters()}
    plain = JointDenoiser.install(network)
    plain.prepare(IMAGES, Joint())
    expected = tiny.forward(network, arguments).detach()
    plain.uninstall()
    denoiser = JointDenoiser.install(network, rank=4)
    parameters = denoiser.freeze()
    assert {id(p) for p in network.parameters() if p.requires_grad} == {id(p) for p in parameters}
    denoiser.prepare(IMAGES, Joint())
    torch.testing.assert_close(tiny.forward(network, arguments), expected, rtol=0, atol=1e-5)
    optimiser = torch.optim.SGD(parameters, lr=0.5)
    for schedule in (Joint(), HALF):
        denoiser.prepare(IMAGES, schedule)
        optimiser.zero_grad()
        tiny.forward(network, arguments).square().mean().backward()
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in parameters)
        optimiser.step()
    assert not torch.equal(tiny.forward(network, arguments), expected)
    denoiser.uninstall()
    assert all(torch.equal(p, before[name]) for name, p in network.named_parameters())


@pytest.mark.parametrize("weight", [0.4, 1.0])
@pytest.mark.parametrize("base", ["sd15", "pixart_alpha"])
def test_the_adapters_gradients_equal_the_float64_formula_for_the_image_term_and_the_intrinsic_term(base, weight):
    network = tiny.NETWORKS[base]()
    stock, arguments = copy.deepcopy(network), tiny.inputs(network, ROWS)
    denoiser = trained(network)
    parameters = denoiser.freeze()
    denoiser.prepare(IMAGES, Gaussian(tau=500.0, alpha=weight))
    for stream in (0, 1):  # the image's loss teaches the adapters too, through the keys and values that it reads
        found = []
        for output in (
            tiny.forward(network, arguments),
            by_oracle(stock, arguments, weight, denoiser.lora_weights())[0],
        ):
            loss = output.unflatten(0, (-1, 2, IMAGES))[:, stream].square().mean()
            found.append(torch.autograd.grad(loss, parameters, allow_unused=True))
        for mine, expected in zip(*found, strict=True):
            mine, expected = (torch.zeros(1) if g is None else g for g in (mine, expected))
            torch.testing.assert_close(mine, expected.float(), rtol=1e-3, atol=1e-5)
        assert any(g is not None and g.abs().max() > 1e-6 for g in found[0])


@pytest.mark.parametrize("base", ["sd15", "sdxl", "pixart_sigma"])
def test_gradient_checkpointing_gives_the_same_gradients_even_after_other_forwards(base):
    network = tiny.NETWORKS[base]().train()
    denoiser = trained(network)
    parameters = denoiser.freeze()
    arguments = tiny.inputs(network, ROWS)

    def gradients() -> list[Tensor]:
        network.zero_grad()
        losses = []
        for schedule in (Joint(), HALF):  # two forwards, then both backwards: each must recall its own weights
            denoiser.prepare(IMAGES, schedule)
            losses.append(tiny.forward(network, arguments).square().mean())
        with torch.no_grad():
            denoiser.prepare(IMAGES, Off())
            tiny.forward(network, arguments)
        sum(losses).backward()
        return [p.grad.clone() for p in parameters]

    plain = gradients()
    network.enable_gradient_checkpointing()
    assert network.is_gradient_checkpointing
    for mine, expected in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-7)
    denoiser.uninstall()
    tiny.forward(network, arguments).mean().backward()  # the stock checkpoints are back


@pytest.mark.parametrize("way", ["blocks", "outside", "inside"])
@torch.no_grad()
def test_every_way_to_compile_gives_the_same_and_compiles_a_few_times_only(way):
    network = tiny.pixart_sigma()
    if way == "blocks":  # diffusers compiles them for U-Nets only
        kinds = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
        network = tiny.sd15(block_out_channels=(16,), **kinds)
    denoiser = trained(network)
    arguments = tiny.inputs(network, ROWS)
    runs = [(Gaussian(tau=500.0), t) for t in (480.0, 460.0, 440.0)] + [(Off(), 480.0)]

    def outputs(run: Any) -> list[Tensor]:
        found = []
        for schedule, t in runs:
            denoiser.prepare(IMAGES, schedule, record="mean")
            given = arguments | {"timestep": torch.full_like(arguments["timestep"], t)}
            found.append(run(**given, return_dict=False)[0])
            assert len(denoiser.shares) == denoiser.check()
        return found

    eager = outputs(network)
    torch._dynamo.reset()
    counter, run = CompileCounter(), network
    if way == "blocks":
        network.compile_repeated_blocks(fullgraph=True, backend=counter)
    elif way == "outside":
        run = torch.compile(network, backend=counter)
    else:
        denoiser.compile(fullgraph=True, backend=counter)
    for mine, expected in zip(outputs(run), eager, strict=True):
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-6)
    # fractional and 0; a block's code is shared by layers of one shape, whatever their stage and weight
    assert counter.frame_count == 2
    torch._dynamo.reset()


@torch.no_grad()
def test_device_and_dtype_moves_take_the_adapters_along():
    network = tiny.sd15()
    denoiser = trained(network)
    denoiser.prepare(IMAGES, HALF)
    arguments = tiny.inputs(network, ROWS)
    full = tiny.forward(network, arguments)
    network.to(torch.bfloat16)
    assert {p.dtype for p in denoiser.lora_parameters()} == {torch.bfloat16}
    half = tiny.forward(network, {k: v.bfloat16() for k, v in arguments.items()})
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), full, rtol=0, atol=0.1)
    network.to("meta")
    assert {p.device.type for p in denoiser.lora_parameters()} == {"meta"} and denoiser.check()


@torch.no_grad()
def test_offload_hooks_may_come_before_or_after_and_a_lost_wrapper_is_noticed():
    arguments = tiny.inputs(tiny.sd15(), ROWS)
    stock = tiny.forward(tiny.sd15(), arguments)
    network = tiny.sd15()  # hook on top of ours
    denoiser = trained(network)
    denoiser.prepare(IMAGES, Joint())
    expected = tiny.forward(network, arguments)
    accelerate.hooks.add_hook_to_module(network, accelerate.hooks.ModelHook())
    assert torch.equal(tiny.forward(network, arguments), expected)
    denoiser.uninstall()
    assert torch.equal(tiny.forward(network, arguments), stock)
    denoiser = trained(network)  # ours on top of the hook
    denoiser.prepare(IMAGES, Joint())
    assert torch.equal(tiny.forward(network, arguments), expected)
    accelerate.hooks.remove_hook_from_module(network)
    with pytest.raises(UserError, match="wrapper is gone"):
        tiny.forward(network, arguments)


@torch.no_grad()
def test_sequential_offload_loads_the_adapters_when_they_are_needed():
    network = tiny.sd15()
    denoiser = trained(network)
    denoiser.prepare(IMAGES, HALF)
    arguments = tiny.inputs(network, ROWS)
    expected = tiny.forward(network, arguments)
    accelerate.cpu_offload(network, execution_device=torch.device("cpu"))
    assert {
        p.device.type for p in denoiser.processors["mid_block.attentions.0.transformer_blocks.0.attn1"].parameters()
    } == {"meta"}
    assert torch.equal(tiny.forward(network, arguments), expected)


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


@pytest.mark.parametrize("base", BASES)
@torch.no_grad()
def test_a_stock_pipeline_with_the_doubled_batch_gives_the_stock_image_at_weight_zero(base):
    options: dict[str, Any] = {"num_inference_steps": 2, "height": 64, "width": 64, "output_type": "latent"}
    if base.startswith("pixart"):
        options["use_resolution_binning"] = False
    pipeline = tiny.PIPELINES[base]()
    embeddings = tiny.embeddings(pipeline, IMAGES)
    noise = torch.randn(IMAGES, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    stock = pipeline(**embeddings, **options, latents=noise.clone()).images
    network = pipeline.transformer if base.startswith("pixart") else pipeline.unet
    denoiser = trained(network)
    doubled = {name: x if x is None else torch.cat([x, x]) for name, x in embeddings.items()}
    denoiser.prepare(IMAGES, Off())
    both = pipeline(**doubled, **options, latents=torch.cat([noise, noise])).images
    torch.testing.assert_close(both[:IMAGES], stock, rtol=0, atol=1e-5)
    denoiser.prepare(IMAGES, Joint())
    joint = pipeline(**doubled, **options, latents=torch.cat([noise, noise])).images
    assert (joint[:IMAGES] - stock).abs().max() > 1e-3


def test_a_stage_map_that_misses_a_layer_is_refused_and_json_describes_the_map():
    network = tiny.sd15()
    from infer.stages import stage_maps

    with pytest.raises(UserError, match="does not say"):
        JointDenoiser.install(network, stages=stage_maps()["unet3"])
    assert all(not isinstance(p, JointProcessor) for p in network.attn_processors.values())
    described = JointDenoiser.install(network).stages.to_dict()
    assert json.loads(json.dumps(described)) == described and len(described["stages"]) == 9
