"""CUDA graphs and latents in memory: what makes stage 2 fast on a GPU gives what the plain way gives."""

from pathlib import Path

import pytest
import torch

from shards.core.errors import UsageError, UserError
from shards.stream.order import Sampler
from tests.support import tiny_text, training
from tests.support.training import config_of
from train.cuda_graph import GraphedNetwork
from train.data import Samples
from train.engine import make_accelerator
from train.lora import LoraTask, load_task, train_lora
from train.vae import train_vae

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return training.write_scenes(tmp_path_factory.mktemp("data") / "scenes")


def _task(shards: str, out: Path, *settings: str) -> tuple[LoraTask, Samples]:
    config = config_of(shards, tiny_text.models("sd21")[0], out, "vae.loop.steps=1", "vae.loop.accumulate=1", *settings)
    if not (out / "vae").exists():
        train_vae(config)
    return load_task(config, make_accelerator().device, 1)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("lora.loop.accumulate=2",), "one batch a step"),
        (("lora.loop.accumulate=1", "lora.loop.compile=true"), "without compile"),
        (("lora.loop.accumulate=1", "lora.train_schedule=gaussian"), "w = 1"),
    ],
)
def test_what_a_cuda_graph_cannot_replay_is_refused(settings: tuple[str, ...], words: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=words):
        config_of("none", "none", tmp_path, "lora.cuda_graph=true", *settings)


def test_a_cuda_graph_without_a_gpu_is_refused_in_a_sentence() -> None:
    with pytest.raises(UserError, match="NVIDIA GPU"):
        GraphedNetwork(torch.nn.Linear(1, 1), torch.float32)


def test_what_is_read_ahead_is_what_is_read_in_turn(shards: str, tmp_path: Path) -> None:
    settings = ("lora.loop.steps=100", "lora.loop.accumulate=1", "data.workers=2", "data.size_px=32")
    (plain, one), (ahead, other) = (_task(shards, tmp_path, *settings) for _ in range(2))
    other.read_ahead(ahead.encoder.remember)
    for samples, task in ((one, plain), (other, ahead)):
        assert samples.in_memory and task.encoder._keep
    batches = (s.batches(Sampler(batch=4, samples=40), plain.draw) for s in (one, other))
    for mine, theirs in zip(*batches, strict=True):
        assert all(torch.equal(vars(mine.drawn)[name], value) for name, value in vars(theirs.drawn).items())
        assert mine.keys == theirs.keys and [s.caption for s in mine.samples] == [s.caption for s in theirs.samples]
        assert all(sample.image.numel() == 0 for sample in theirs.samples)
        a, b = plain.encoder(mine), ahead.encoder(theirs)
        assert torch.equal(a.mean, b.mean) and torch.equal(a.std, b.std)
        assert all(torch.equal(a.text[name], b.text[name]) for name in a.text)


def test_a_remembered_sample_is_encoded_as_it_is_alone(shards: str, tmp_path: Path) -> None:
    task, samples = _task(shards, tmp_path, "lora.loop.steps=100")
    batches = list(samples.batches(Sampler(batch=3, samples=30)))
    for batch in batches:
        together = task.encoder(batch)
        for row, sample in enumerate(batch.samples):
            alone = task.encoder._encode([sample])
            assert torch.equal(together.mean[:, [row]], alone.mean) and torch.equal(together.std[:, [row]], alone.std)
            assert all(torch.equal(together.text[name][[row]], alone.text[name]) for name in alone.text)


@GPU
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_replayed_step_has_the_gradients_of_a_launched_one(precision: str, shards: str, tmp_path: Path) -> None:
    found = {}
    for graph in ("false", "true"):
        settings = (f"lora.cuda_graph={graph}", "lora.loop.accumulate=1", f"lora.loop.precision={precision}")
        task, samples = _task(shards, tmp_path, *settings)
        found[graph] = []
        for parameter in task.trainable().values():
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator("cuda").manual_seed(parameter.numel()))
        for batch in samples.batches(Sampler(batch=2, samples=6), task.draw):
            with torch.autocast("cuda", task.amp, task.amp != torch.float32):
                loss = task.losses(task.module, batch)["loss"].mean()
            loss.backward()
            found[graph].append((loss.item(), [p.grad.clone() for p in task.trainable().values()]))
            for parameter in task.trainable().values():
                parameter.grad = None
                parameter.data.mul_(0.9)  # the graph must see weights as they are now
    for (plain, gradients), (loss, replayed) in zip(found["false"], found["true"], strict=True):
        assert loss == pytest.approx(plain, rel=0.02)
        for a, b in zip(gradients, replayed, strict=True):
            assert torch.allclose(a, b, atol=0.05 * float(a.abs().max()))


@GPU
def test_a_gpu_learns_from_latents_that_it_read_ahead(shards: str, tmp_path: Path) -> None:
    settings = ("lora.loop.steps=100", "lora.loop.accumulate=1", "lora.cuda_graph=true", "data.workers=2")
    task, samples = _task(shards, tmp_path, *settings)
    assert all(s.image.numel() == 0 for batch in samples.batches(Sampler(batch=4, samples=40)) for s in batch.samples)
    config = config_of(shards, tiny_text.models("sd21")[0], tmp_path, *settings)
    outcome = train_lora(config)
    assert outcome.finished and outcome.last["intrinsic"] < outcome.first["intrinsic"]
    assert isinstance(task.module, GraphedNetwork)
