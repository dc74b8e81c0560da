"""The one file that a simple training loop goes on from: what does not belong to it is refused with a sentence."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from shards.core.errors import UserError
from train.demo.state import averaged, load_state, save_state


def _stepped(net: nn.Module, optimiser: torch.optim.Optimizer) -> None:
    net(torch.ones(1, 3)).sum().backward()
    optimiser.step()


@pytest.fixture()
def state(tmp_path: Path) -> Path:
    """Of a network of three numbers to two, which AdamW moved away from its average; kept as after step 7."""
    net = nn.Linear(3, 2)
    optimiser = torch.optim.AdamW(net.parameters())
    average = averaged(net)
    _stepped(net, optimiser)
    save_state(tmp_path / "state.safetensors", 7, net, average, optimiser)
    return tmp_path / "state.safetensors"


def test_training_goes_on_with_the_step_the_weights_and_the_moments(state: Path) -> None:
    net = nn.Linear(3, 2)
    optimiser = torch.optim.AdamW(net.parameters())
    average = averaged(net)
    assert load_state(state, net, average, optimiser) == 7
    kept = load_file(state)
    assert torch.equal(net.weight, kept["net.weight"]) and torch.equal(average["weight"], kept["average.weight"])
    assert not torch.equal(net.weight, average["weight"])
    moments = optimiser.state_dict()["state"]
    assert len(moments) == 2 and torch.equal(moments[0]["exp_avg"], kept["optimiser.0.exp_avg"])


def test_a_state_of_another_optimiser_is_refused(state: Path) -> None:
    net = nn.Linear(3, 2)
    with pytest.raises(UserError, match=r"state.safetensors: it learned by AdamW, not by SGD; remove it"):
        load_state(state, net, averaged(net), torch.optim.SGD(net.parameters(), momentum=0.9))


@pytest.mark.parametrize(("net", "named"), [(nn.Linear(3, 4), "net.bias"), (nn.Linear(3, 2, bias=False), "net.bias")])
def test_a_state_of_another_network_is_refused_by_the_name_of_what_differs(
    state: Path, net: nn.Module, named: str
) -> None:
    with pytest.raises(UserError, match=f"another network .{named}."):
        load_state(state, net, averaged(net), torch.optim.AdamW(net.parameters()))


def test_a_damaged_state_is_refused_with_its_name(state: Path) -> None:
    state.write_bytes(state.read_bytes()[:100])
    net = nn.Linear(3, 2)
    with pytest.raises(UserError, match=r"cannot go on from .*state.safetensors"):
        load_state(state, net, averaged(net), torch.optim.AdamW(net.parameters()))


def test_settings_that_changed_since_are_said_and_what_a_state_does_not_name_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net = nn.Linear(3, 2)
    optimiser, average, path = torch.optim.AdamW(net.parameters()), averaged(net), tmp_path / "state.safetensors"
    save_state(path, 7, net, average, optimiser, {"rate": 0.1, "batch": 2})
    assert load_state(path, net, average, optimiser, {"rate": 0.1, "batch": 2, "newer": 1}) == 7
    assert not capsys.readouterr().err
    assert load_state(path, net, average, optimiser, {"rate": 0.2, "batch": 2}) == 7
    said = capsys.readouterr().err
    assert "was made with rate = 0.1; from step 7 on it is 0.2" in said and "batch" not in said
