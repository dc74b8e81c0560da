"""Training of the embedded network: it learns, and a run that was stopped goes on as if nothing had happened."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from train.demo.estimator import EstimatorTraining, augment, boundaries, losses, make_batch, train_estimator
from train.demo.scene_store import SceneStore, open_chunk


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> EstimatorTraining:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("training")
    recipe = EstimatorTraining(
        out=folder / "a",
        scenes=folder / "scenes",
        chunks=1,
        render_px=48,
        steps=4,
        shapes=((32, 3), (64, 2)),
        save_every=2,
    )
    recipe.store().render_chunk(0)
    return recipe


def test_a_stopped_run_ends_with_the_weights_of_an_undisturbed_one(
    recipe: EstimatorTraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_estimator(recipe)
    stopped = dataclasses.replace(recipe, out=recipe.out.with_name("b"))

    def interrupt(*arguments: object) -> dict:
        if arguments[2] == 3:
            raise KeyboardInterrupt
        return make_batch(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("train.demo.estimator.make_batch", interrupt)
        train_estimator(stopped)
    train_estimator(stopped)
    whole, resumed = (load_file(out / "training.safetensors") for out in (recipe.out, stopped.out))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_crop_that_is_flipped_mirrors_its_maps_and_negates_normal_x(recipe: EstimatorTraining) -> None:
    chunk = open_chunk(recipe.store().path(0))
    scene = {name: np.asarray(array[0]) for name, array in chunk.items()}
    for seed in range(20):
        rng = np.random.default_rng(seed)
        made = augment(scene, 48, rng)
        rng = np.random.default_rng(seed)
        whole = rng.random() < 0.4
        if not whole:
            continue
        rng.integers(1, size=2)
        mirrored = rng.random() < 0.5
        expected = scene["depth"][:, ::-1] if mirrored else scene["depth"]
        np.testing.assert_array_equal(made["depth"], expected.astype(np.float32))
        x = (scene["normal"][..., 0] / 127).astype(np.float32)
        np.testing.assert_allclose(made["normal"][0], -x[:, ::-1] if mirrored else x, atol=1e-6)


def test_the_loss_of_the_truth_is_the_least(recipe: EstimatorTraining) -> None:
    from extract.estimators.nets.demo_net import Prediction

    batch = make_batch(recipe, [open_chunk(recipe.store().path(0))], 0)
    sky, z = torch.isinf(batch["depth"]), batch["depth"].clamp(max=100)

    def prediction(scale: float, sign: float) -> Prediction:
        edges = [(batch[name] * 2 - 1) * 8 * sign for name in ("boundary", "line")]
        return Prediction((z * scale).log(), (sky.float() * 2 - 1) * 8 * sign, batch["normal"] * sign, *edges)

    right, scaled, wrong = (losses(prediction(*how), batch) for how in ((1, 1), (2, 1), (1, -1)))
    assert right["depth"] < 1e-5 and right["edges"] < 1e-5 and right["normal"] < 1e-2
    assert scaled["depth"] < 1e-5 and scaled["scale"] > 0.05  # the scale is not told by one picture
    assert all(right[name] <= wrong[name] for name in right) and wrong["normal"] > 1


def test_boundaries_are_two_pixels_wide() -> None:
    assert boundaries(np.array([[1, 1, 2, 2]])).tolist() == [[False, True, True, False]]


def test_rendering_goes_on_with_the_chunks_that_are_missing(tmp_path: Path) -> None:
    store = SceneStore(folder=tmp_path, seed=1, chunks=2, size_px=16, chunk=2)
    store.render_chunk(1)
    (tmp_path / "16px-seed1-0000.tmp").mkdir()  # left by a killed run
    assert list(store.render_missing(1)) == [0] and len(store.ready()) == 2
    assert open_chunk(store.path(0))["image"].shape == (2, 16, 16, 3)
