"""What learns in the joint denoiser: the adapters only, with the gradients of the float64 formula."""

import copy

import pytest
import torch
from torch import Tensor

from infer.model.denoiser import JointDenoiser
from infer.model.schedules import Gaussian, Joint, Off
from tests.support import tiny
from tests.support.joint import HALF, IMAGES, ROWS, by_oracle, trained


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
