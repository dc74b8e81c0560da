"""Networks that are compiled, and the way of images to a GPU and of maps back."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from extract.estimators import Estimator
from extract.estimators.batching import NetworkEstimator, uploaded
from extract.estimators.compiled import compile_networks
from extract.estimators.table import ROWS, EstimatorRow, load
from shards.core.errors import UsageError, UserError
from tests.support.random_sam import sam2_small
from tests.support.seeded import seeded_picture
from tests.support.tiny_estimators import ROWS as TINY

SIZES = ((64, 80), (96, 64), (70, 120), (64, 64), (90, 130))


class Graphs:
    """A compiler that leaves networks as they are, and counts."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        self.count += 1
        return graph.forward


def row_of(name: str, folder: Path) -> EstimatorRow:
    torch.manual_seed(1)
    write, settings = TINY[name]
    write(folder)
    return dataclasses.replace(ROWS[name], weights=folder, settings={**ROWS[name].settings, **settings})


@pytest.fixture(autouse=True)
def forgotten() -> None:
    torch.set_num_threads(1)
    torch._dynamo.reset()


def test_a_compiled_network_gives_the_same_maps_and_is_compiled_for_few_sizes(tmp_path: Path) -> None:
    row = row_of("lineart", tmp_path)
    plain, compiled, graphs = load(row, "cpu"), load(row, "cpu"), Graphs()
    compile_networks(compiled, "lineart", graphs)
    counts = []
    for size in SIZES:
        image = seeded_picture(*size)
        ours, theirs = (lines(estimator, [image])[0] for estimator in (compiled, plain))
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
        counts.append(graphs.count)
    assert counts[0] > 0 and len(set(counts[2:])) == 1, counts  # the sizes that come later need nothing new


def test_sams_encoder_is_compiled_once(tmp_path: Path) -> None:
    sam2_small().save_pretrained(tmp_path)
    row = dataclasses.replace(ROWS["sam2-1-tiny"], weights=tmp_path, settings={"points_per_side": 3, "quality": -10.0})
    plain, compiled, graphs = load(row, "cpu"), load(row, "cpu"), Graphs()
    compile_networks(compiled, "sam2-1-tiny", graphs)
    once = graphs.count
    for size in SIZES[:2]:
        ours, theirs = (e([seeded_picture(*size)])[0]["segmentation"].values for e in (compiled, plain))
        assert (ours == theirs).mean() > 0.999
    assert graphs.count == once > 0


def test_a_row_asks_for_it_and_what_cannot_be_compiled_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="leave the setting out"):
        load(dataclasses.replace(ROWS["null"], compile=True), "cpu")

    def fail(graph: object, inputs: object) -> None:
        raise RuntimeError("no compiler here")

    row = dataclasses.replace(row_of("teed", tmp_path), compile=True)
    compile_with = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, backend: compile_with(module, backend=fail))
    with pytest.raises(UserError, match="teed cannot be compiled on this machine"):
        load(row, "cpu")


def test_an_image_is_a_tensor_of_channels_from_0_to_1() -> None:
    image = seeded_picture(5, 7)[:, ::-1]  # not contiguous
    x = uploaded(image, torch.device("cpu"))
    assert x.shape == (3, 5, 7) and x.dtype == torch.float32
    np.testing.assert_allclose(x.permute(1, 2, 0).numpy(), image / 255.0, rtol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="copies that overlap need a GPU")
def test_on_a_gpu_buckets_that_overlap_give_the_maps_of_the_cpu(tmp_path: Path) -> None:
    row = row_of("lineart", tmp_path)
    on_cpu, on_gpu = load(row, "cpu"), load(row, "cuda")
    assert isinstance(on_gpu, NetworkEstimator)
    images = [seeded_picture(*size) for size in SIZES * 4]
    for ours, theirs in zip(lines(on_gpu, images), lines(on_cpu, images), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-2)


def lines(estimator: Estimator, images: list[np.ndarray]) -> list[np.ndarray]:
    return [maps["line"].values for maps in estimator(images)]
