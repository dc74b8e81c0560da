"""The examples run, and give what the package gives."""

import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from infer.embedded import resolve, usual_guidance
from infer.run_folder import load_run
from infer.sampler import CoGenerator
from tests.support.training import write_scenes

EXAMPLES = Path(__file__).parent.parent / "examples"


def run_example(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: str) -> dict[str, Any]:
    """Runs an example's file as a program; returns what it defined."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    return runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_the_sampling_example_draws_what_the_package_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt, steps = "a red sphere left of a blue cube", 6
    made = run_example(
        monkeypatch, "sample_minimal.py", prompt, "--seed", "3", "--steps", str(steps), "--out", str(tmp_path / "a.png")
    )
    with CoGenerator.from_pretrained("demo", "demo", device="cpu") as generator:
        ours = generator(prompt, seeds=3, steps=steps, guidance=usual_guidance("demo"), scheduler="ddim")

    difference = np.abs(made["image"].astype(int) - np.asarray(ours.images[0]).astype(int))
    assert difference.max() <= 1
    torch.testing.assert_close(made["latents"][1:], ours.intrinsic_latents, atol=1e-4, rtol=1e-4)
    assert (tmp_path / "a.png").is_file()


def test_the_training_example_learns_and_leaves_a_run_that_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, out = write_scenes(tmp_path / "shards"), str(tmp_path / "run")
    made = run_example(monkeypatch, "train_minimal.py", shards, out, "--steps", "4", "--batch", "2")

    learned = load_run(out).lora.tensors
    assert any(tensor.abs().max() > 0 for name, tensor in learned.items() if "lora_B" in name)
    assert torch.isfinite(made["image_loss"]) and torch.isfinite(made["intrinsic_loss"])
    with CoGenerator.from_pretrained(resolve("demo", "base"), out, device="cpu") as generator:
        assert len(generator("a red cube", steps=2).intrinsics[0]) == 4
