"""The joint denoiser over every base: what the weight 0, 1 and any other give, and that nothing is ever done silently."""

import copy
import json
from typing import Any

import accelerate
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from infer.model.denoiser import JointDenoiser
from infer.model.processor import JointProcessor, self_attention_layers
from infer.model.schedules import Drop, Gaussian, Joint, Off, Table
from shards.core.errors import UserError
from tests.support import tiny
from tests.support.joint import BASES, HALF, IMAGES, ROWS, at, by_oracle, image_inputs, image_rows, trained


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


@pytest.mark.parametrize("way", ["inside", "outside"])
@torch.no_grad()
def test_a_compiled_network_takes_any_number_of_images_and_compiles_a_bounded_number_of_times(way, monkeypatch, capsys):
    """Numbers of images, sizes, and guidance on and off in turn, as a server or a training's sheets have them."""
    monkeypatch.setattr("infer.model.denoiser.BATCHES", 3)
    larger = tiny.pixart_sigma()
    config = {name: value for name, value in larger.config.items() if not name.startswith("_")}
    network = type(larger)(**(config | {"num_layers": 1})).eval()
    denoiser = trained(network)
    batches = [(1, 2, 8), (2, 2, 8), (1, 2, 8), (2, 1, 8), (1, 1, 16), (3, 2, 8), (2, 2, 8)]  # images, guidance, size

    def outputs(run: Any) -> list[Tensor]:
        found = []
        for images, guidance, size in batches:
            denoiser.prepare(images, Gaussian(tau=500.0, alpha=0.4))
            arguments = tiny.inputs(network, guidance * 2 * images, size=size)
            found.append(run(**arguments, return_dict=False)[0])
        return found

    eager = outputs(network)
    torch._dynamo.reset()
    counter, run = CompileCounter(), network
    if way == "inside":
        denoiser.compile(backend=counter)
    else:
        run = torch.compile(network, backend=counter)
    for mine, expected in zip(outputs(run), eager, strict=True):
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-6)
    said = capsys.readouterr().err
    assert counter.frame_count == (3 if way == "inside" else 5)  # of five kinds of batches
    assert said.count("compiled for 3 kinds of batches") == (way == "inside")
    torch._dynamo.reset()
    with pytest.raises(UserError, match="leave out dynamic"):
        denoiser.compile(dynamic=True)


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
    from infer.model.stages import stage_maps

    with pytest.raises(UserError, match="does not say"):
        JointDenoiser.install(network, stages=stage_maps()["unet3"])
    assert all(not isinstance(p, JointProcessor) for p in network.attn_processors.values())
    described = JointDenoiser.install(network).stages.to_dict()
    assert json.loads(json.dumps(described)) == described and len(described["stages"]) == 9
