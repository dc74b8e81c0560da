"""Training of the detector: labels are those of the scene, and a run that was stopped goes on as if nothing had happened."""

import dataclasses

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from extract.world import compose
from infer.evaluation.detector import COLOUR_CLASSES, SHAPE_CLASSES, load_detector
from infer.evaluation.shapes import load_shapes
from shards.dataset import Dataset
from shards.errors import UserError
from train.detector import DetectorTraining, labels, make_batch, read_scenes, train_detector
from train.shapes import ShapeTraining, fray, read_things, train_shapes
from train.truth import TruthSettings, write_truth

SCENES = TruthSettings(seed=4, count=3, size_px=32)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    torch.set_num_threads(1)
    url = str(tmp_path_factory.mktemp("truth"))
    write_truth(url, SCENES, 1, lambda done: None)
    return url


def test_every_pixel_is_labelled_with_what_the_scene_says(shards):
    dataset = Dataset.open(shards)
    for index, sample in enumerate(dataset.samples(dataset.shard_names()[0])):
        made, scene = labels(sample), compose(SCENES.seed, index)
        for thing in sample.meta["objects"]:
            here = sample.map("segmentation").values == thing["segment"]
            truth = scene.things[thing["thing"]]
            assert set(made["shape"][here]) == {SHAPE_CLASSES.index(truth.shape)}
            assert set(made["colour"][here]) == {COLOUR_CLASSES.index(truth.colour)}
        nothing = made["colour"] == 0
        assert {SHAPE_CLASSES[i] for i in np.unique(made["shape"][nothing])} <= {"floor", "wall", "sky"}


def test_a_stopped_run_ends_with_the_weights_of_an_undisturbed_one(shards, tmp_path):
    recipe = DetectorTraining(shards=shards, out=tmp_path / "a", phases=((2, 2), (1, 2)), save_every=2)
    train_detector(recipe)
    part = dataclasses.replace(recipe, out=tmp_path / "b", phases=((2, 2),))
    train_detector(part)  # the first phase alone, then the rest
    train_detector(dataclasses.replace(recipe, out=part.out))
    whole, resumed = (load_file(out / "training.safetensors") for out in (recipe.out, part.out))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert load_detector(recipe.out).config.working_px == 64


def test_shapes_learn_from_the_things_of_the_scenes_and_resume(shards, tmp_path):
    things = read_things(shards, 3)
    assert len(things.thing) == sum(len(compose(SCENES.seed, index).things) for index in range(3))
    recipe = ShapeTraining(shards=shards, out=tmp_path / "a", steps=4, batch=2, save_every=2)
    train_shapes(recipe)
    state = (recipe.out / "shapes-training.safetensors").read_bytes()
    train_shapes(recipe)  # nothing is left to do
    assert (recipe.out / "shapes-training.safetensors").read_bytes() == state
    assert load_shapes(recipe.out).config.side_px == 24


def test_a_frayed_mask_is_never_empty():
    mask = np.zeros((16, 16), bool)
    mask[4:7, 4:7] = True
    frayed = [fray(mask, np.random.default_rng(seed)) for seed in range(60)]
    assert all(one.any() for one in frayed)
    assert len({one.tobytes() for one in frayed}) > 3


def test_batches_depend_on_the_step_alone(shards):
    recipe = DetectorTraining(shards=shards, phases=((2, 3),))
    scenes = read_scenes(shards, 3)
    first, again, other = (make_batch(recipe, scenes, step)["image"] for step in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_folder_without_scenes_is_named(tmp_path):
    with pytest.raises(UserError, match="no dataset"):
        read_scenes(str(tmp_path), 3)
