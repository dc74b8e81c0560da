"""The loop's two ramps, held against torch's own schedules and a float64 recursion: the learning rate and the EMA's decay."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from tests.support import training
from train.checkpoint import Checkpoints
from train.config import LoopConfig


def torchs_rates(steps: int, warmup: int, cosine: bool) -> list[float]:
    """Learning rates of torch's schedulers: from 1 / warmup up to 1, then constant or a cosine down to 1 %."""
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    rise = LinearLR(optimiser, start_factor=1 / warmup, total_iters=warmup - 1)
    fall = CosineAnnealingLR(optimiser, T_max=steps - warmup, eta_min=0.01)
    flat = LinearLR(optimiser, start_factor=1.0, total_iters=1)
    schedule = SequentialLR(optimiser, [rise, fall if cosine else flat], milestones=[warmup])
    rates = []
    for _ in range(steps):
        rates.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        schedule.step()
    return rates


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_the_learning_rate_is_that_of_torchs_schedulers(schedule: str) -> None:
    loop = LoopConfig(steps=24, batch=1, learning_rate=1.0, warmup=6, schedule=schedule)  # type: ignore[arg-type]
    rates = [loop.rate(step) for step in range(24)]

    np.testing.assert_allclose(rates, torchs_rates(24, 6, schedule == "cosine"), rtol=1e-9)
    assert rates[0] == pytest.approx(1 / 6) and rates[5] == pytest.approx(1.0)


def test_the_average_follows_the_weights_with_a_decay_that_rises_to_its_limit(tmp_path: Path) -> None:
    shards = training.write_scenes(tmp_path / "scenes")
    limit, steps = 0.3, 9  # (n + 1) / (n + 10) passes 0.3 at n = 3
    seen: list[dict[str, torch.Tensor]] = []
    task = training.Averages()

    def remember() -> None:
        seen.append({name: p.detach().clone() for name, p in task.module.named_parameters()})

    task.hook = remember
    training.run_averages(shards, tmp_path / "run", task, steps=steps, ema=limit)
    final = Checkpoints(tmp_path / "run" / "checkpoints", 2).load()
    assert final is not None and len(seen) == steps

    for name, first in seen[0].items():
        average = first.double()
        after_each_step = [weights[name] for weights in seen[1:]] + [final.weights[name]]
        for n, weights in enumerate(after_each_step):
            decay = min(limit, (n + 1) / (n + 10))
            average = decay * average + (1 - decay) * weights.double()
        torch.testing.assert_close(final.average[name].double(), average, rtol=1e-6, atol=1e-7)
