"""Muon of many matrices at once is Muon of each."""

from functools import partial

import pytest
import timm.optim.muon
import torch
from timm.optim.muon import Muon
from torch import nn

from train.muon import StackedMuon, has_bf16


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 5))


def test_matrices_that_are_stepped_together_go_where_timms_muon_takes_each(monkeypatch: pytest.MonkeyPatch) -> None:
    if not has_bf16(torch.device("cpu")):  # timm's products are in bfloat16 everywhere
        exact = partial(timm.optim.muon.zeropower_via_newtonschulz, dtype=torch.float32)
        monkeypatch.setattr(timm.optim.muon, "zeropower_via_newtonschulz", exact)
    mine, theirs = _network(), _network()
    together = StackedMuon([{"params": list(mine.parameters())}], weight_decay=0.1, betas=(0.9, 0.99))
    apart = Muon(theirs.parameters(), nesterov=True, weight_decay=0.1, betas=(0.9, 0.99))
    for step in range(4):
        x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(step))
        for network, optimiser in ((mine, together), (theirs, apart)):
            for group in optimiser.param_groups:
                group["lr"] = 0.02
            optimiser.zero_grad()
            network(x).square().mean().backward()
            optimiser.step()
    for one, other in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-4)  # products in bf16 round as they are batched


def test_a_step_of_a_matrix_is_orthogonal_and_of_adamws_size() -> None:
    """The float64 singular value decomposition is the oracle: U V^T of the gradient at the first step."""
    weight = nn.Parameter(torch.randn(16, 24, generator=torch.Generator().manual_seed(1)))
    before, gradient = weight.detach().clone(), torch.randn(16, 24, generator=torch.Generator().manual_seed(2))
    optimiser = StackedMuon([{"params": [weight], "lr": 0.1}], weight_decay=0.0, betas=(0.9, 0.99))
    weight.grad = gradient.clone()
    optimiser.step()
    step = (before - weight.detach()).double()
    u, _, vt = torch.linalg.svd(gradient.double(), full_matrices=False)
    assert torch.nn.functional.cosine_similarity(step.flatten(), (u @ vt).flatten(), dim=0) > 0.99
    assert abs(step.square().mean().sqrt() / (0.1 * 0.2) - 1) < 0.1
    assert weight.grad is None  # so AdamW, which comes after, leaves it alone
