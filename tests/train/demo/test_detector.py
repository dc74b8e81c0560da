"""Training of the detector: labels are those of the scene, and a run that was stopped goes on as if nothing had happened."""

import dataclasses
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from extract.world import compose
from infer.evaluation.demo.crop_nets import cut_pair, load_close, window
from infer.evaluation.demo.layout import RELATED
from infer.evaluation.demo.pixel_net import COLOUR_CLASSES, SHAPE_CLASSES, load_detector
from shards.core.errors import UserError
from shards.dataset import Dataset
from train.demo import loop
from train.demo.crop_nets import CloseTraining, fray, pairs_of, train_close, whose
from train.demo.crop_nets import read_scenes as read_close
from train.demo.ground_truth import TruthSettings, write_truth
from train.demo.pixel_net import DetectorTraining, labels, make_batch, read_scenes, train_detector
from train.stop import Stopped

SCENES = TruthSettings(seed=4, count=3)


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


def test_sigterm_ends_it_after_the_step_at_hand_saved(shards, tmp_path, monkeypatch):
    recipe = DetectorTraining(shards=shards, out=tmp_path / "a", phases=((1, 4),), save_every=100)
    train_detector(recipe)
    stopped, step_on = dataclasses.replace(recipe, out=tmp_path / "b"), loop.follow

    def terminate(average, net, decay, step):
        step_on(average, net, decay, step)
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(Stopped, match="stopped after step 2 of the detector, saved"):
        patch.setattr(loop, "follow", terminate)
        train_detector(stopped)
    train_detector(stopped)
    whole, resumed = (load_file(out / "training.safetensors") for out in (recipe.out, stopped.out))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.fixture(scope="module")
def first(shards, tmp_path_factory) -> Path:
    """A detector's first part that has learned nothing."""
    out = tmp_path_factory.mktemp("first")
    return train_detector(DetectorTraining(shards=shards, out=out, phases=((1, 1),)))


@pytest.mark.parametrize(("name", "side"), [("things", 24), ("pairs", 32)])
def test_the_close_look_learns_from_scenes_and_resumes(shards, first, tmp_path, name, side):
    recipe = CloseTraining(shards=shards, out=tmp_path, steps={name: 4}, batch=2, save_every=2)
    with pytest.raises(UserError, match="detector"):
        train_close(name, recipe)  # its first part is not there
    for file in ("config.json", "model.safetensors"):
        shutil.copy(first / file, tmp_path)
    train_close(name, dataclasses.replace(recipe, steps={name: 2}))
    state = tmp_path / f"{name}-training.safetensors"
    begun = state.read_bytes()
    train_close(name, recipe)
    whole = state.read_bytes()
    train_close(name, recipe)  # nothing is left to do
    assert begun != whole and state.read_bytes() == whole
    assert load_close(name, tmp_path).config.side_px == side


def test_things_and_pairs_are_those_of_the_scenes_and_masks_of_the_first_look_are_theirs(shards, first):
    scenes = read_close(CloseTraining(shards=shards, out=first))
    again = read_close(CloseTraining(shards=shards, out=first))  # from the file
    assert np.array_equal(scenes.masks, again.masks) and scenes.owned == again.owned
    counts = [len(compose(SCENES.seed, index).things) for index in range(3)]
    assert len(scenes.things) == sum(counts) and len(scenes.pairs) == sum(n * (n - 1) for n in counts)
    for (scene, segment), rows in scenes.owned.items():
        for row in rows:
            mask = np.unpackbits(scenes.masks[row]).reshape(64, 64).astype(bool)
            assert whose(mask, scenes.segmentation[scene]) == segment


def test_a_mask_is_that_of_the_segment_it_shares_most_with_or_of_no_one():
    segmentation = np.zeros((10, 10), np.uint8)
    segmentation[:5, :5], segmentation[5:, 5:] = 1, 2
    left = np.zeros((10, 10), bool)
    left[:6, :5] = True
    assert whose(left, segmentation) == 1 and whose(left.T[::-1, ::-1], segmentation) == 2
    assert whose(np.ones((10, 10), bool), segmentation) is None


def test_pairs_are_named_from_both_sides():
    meta = {
        "objects": [{"thing": i, "segment": 10 + i} for i in range(3)],
        "relations": [
            {"subject": 0, "relation": "standing on", "object": -1},
            {"subject": 1, "relation": "on top of", "object": 0},
            {"subject": 0, "relation": "behind", "object": 2},
            {"subject": 2, "relation": "in front of", "object": 0},
            {"subject": 1, "relation": "left of", "object": 2},
        ],
    }
    named = {(a, b): RELATED[relation] for a, b, relation in pairs_of(meta)}
    wanted = {(11, 10): "on top of", (10, 11): "under", (10, 12): "behind", (12, 10): "in front of"}
    assert named == wanted | {(11, 12): "", (12, 11): ""}


def test_the_cut_out_of_a_pair_holds_both_masks_in_their_order():
    image, one, other = np.zeros((16, 16, 3), np.uint8), np.zeros((16, 16), bool), np.zeros((16, 16), bool)
    one[4:8, 4:8], other[8:12, 8:12] = True, True
    cut = cut_pair(image, one, other, window(one | other), 32)
    assert cut.shape == (32, 32, 5) and cut[:18, :18, 3].sum() == cut[..., 3].sum() > 100
    assert cut[14:, 14:, 4].sum() == cut[..., 4].sum() > 100


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


def test_the_close_look_of_a_run_that_died_while_writing_it_is_written_by_the_next(
    shards, first, tmp_path, monkeypatch
):
    recipe = CloseTraining(shards=shards, out=tmp_path, steps={"things": 2}, batch=2, save_every=100)
    for file in ("config.json", "model.safetensors"):
        shutil.copy(first / file, tmp_path / file)

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("train.demo.crop_nets.save_close", die)
        train_close("things", recipe)
    with pytest.raises(UserError):
        load_close("things", tmp_path)
    train_close("things", recipe)
    assert load_close("things", tmp_path).config.side_px == 24
