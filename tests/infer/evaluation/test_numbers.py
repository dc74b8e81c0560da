"""FID, CMMD and bootstrap against float64 oracles; agreement of maps; prompt sets."""

import math

import numpy as np
import pytest
from scipy import linalg

from extract.world import compose, render
from extract.world.grammar import parse
from infer.evaluation import compare
from infer.evaluation.agreement import agreement, resized
from infer.evaluation.fidelity import Standard, cmmd, fid, kernels
from infer.evaluation.generate import maps_of, parse_methods
from infer.evaluation.run import search_methods
from infer.evaluation.sets import (
    UNSEEN,
    demo_captions,
    depth_captions,
    multi_prompts,
    place_words,
    prompt_set,
    read_names,
)
from shards.core.errors import UsageError
from shards.inspect.display import depth_picture
from shards.intrinsics import IntrinsicMap

RNG = np.random.default_rng(5)
A = RNG.normal(size=(60, 7))
B = RNG.normal(size=(45, 7)) @ np.diag([1, 2, 1, 0.5, 1, 3, 1]) + 0.3


def test_fid_is_the_frechet_distance_of_the_two_gaussians():
    cov_a, cov_b = np.cov(A.T), np.cov(B.T)
    mean = ((A.mean(axis=0) - B.mean(axis=0)) ** 2).sum()
    expected = mean + np.trace(cov_a + cov_b - 2 * linalg.sqrtm(cov_a @ cov_b).real)
    assert fid(A, B) == pytest.approx(expected, rel=1e-9)
    assert fid(A, A) == pytest.approx(0, abs=1e-9)
    assert fid(B, A) == pytest.approx(fid(A, B), rel=1e-9)


def test_cmmd_is_the_mean_over_all_pairs():
    def mean_kernel(x: np.ndarray, y: np.ndarray) -> float:
        return math.fsum(math.exp(-((p - q) ** 2).sum() / 200) for p in x for q in y) / (len(x) * len(y))

    expected = 1000 * (mean_kernel(A, A) + mean_kernel(B, B) - 2 * mean_kernel(A, B))
    assert cmmd(A, B) == pytest.approx(expected, rel=1e-9)
    assert cmmd(A, A) == pytest.approx(0, abs=1e-9)


def test_weights_count_rows_as_often():
    weights = RNG.integers(0, 3, len(A))
    repeated = np.repeat(A, weights, axis=0)
    assert fid(A, B, weights) == pytest.approx(fid(repeated, B), rel=1e-9)
    assert kernels(A, B).cmmd(weights) == pytest.approx(cmmd(repeated, B), rel=1e-9)


def test_standard_features_have_mean_0_and_deviation_1_over_the_reference():
    made = Standard.of(B)(B)
    assert made.mean(axis=0) == pytest.approx(np.zeros(7), abs=1e-12)
    assert made.std(axis=0) == pytest.approx(np.ones(7))


# ---- bootstrap -------------------------------------------------------------------------------------------------------


def test_the_interval_is_that_of_captions_not_of_images():
    captions = 100
    caption = np.repeat(np.arange(captions), 4)
    values = np.repeat(RNG.normal(size=captions), 4)  # seeds of one caption say all the same
    made = compare.mean(values, caption, compare.draws(captions))
    expected = 1.96 * values.std() / math.sqrt(captions)
    assert made.value == pytest.approx(values.mean())
    assert (made.high - made.low) / 2 == pytest.approx(expected, rel=0.15)


def test_a_paired_difference_is_sharper_than_the_two_means():
    captions = 200
    caption, hard = np.arange(captions), RNG.normal(size=captions)
    drawn = compare.draws(captions)
    other, value = hard, hard + 0.1
    made = compare.difference(value, caption, other, caption, drawn)
    assert made.value == pytest.approx(0.1) and made.low == pytest.approx(0.1) and made.high == pytest.approx(0.1)


def test_values_that_do_not_apply_are_left_out():
    values = np.array([1.0, np.nan, 3.0, np.nan])
    made = compare.mean(values, np.arange(4), compare.draws(4))
    assert made.value == 2.0
    assert math.isnan(compare.mean(np.full(4, np.nan), np.arange(4), compare.draws(4)).value)


# ---- agreement -------------------------------------------------------------------------------------------------------


def maps(size: int) -> dict[str, IntrinsicMap]:
    made = render(compose(9, 4), size)
    return {
        "depth": IntrinsicMap(made.depth_m),
        "normal": IntrinsicMap(made.normal),
        "segmentation": IntrinsicMap(made.segmentation, {}),
        "line": IntrinsicMap(made.line),
    }


def test_maps_agree_with_themselves_whatever_the_scale_and_the_range_of_depth():
    made = maps(48)
    farther = made | {"depth": IntrinsicMap(3 * made["depth"].values ** 0.5)}
    same = agreement(farther, made)
    assert same["abs_rel"] == pytest.approx(0, abs=1e-6) and same["normal_deg"] == pytest.approx(0, abs=1e-3)
    assert same["boundary_f"] == same["line_f"] == 1


def test_maps_of_another_scene_do_not_agree():
    other = render(compose(9, 5), 48)
    made = agreement({"depth": IntrinsicMap(other.depth_m), "normal": IntrinsicMap(other.normal)}, maps(48))
    assert made["abs_rel"] > 0.1 and made["normal_deg"] > 10
    assert math.isnan(made["boundary_f"])


def test_maps_at_half_the_size_are_close_to_those_made_there():
    large, small = maps(96), maps(48)
    halved = {name: resized(name, item, (48, 48)) for name, item in large.items()}
    close = agreement(halved, small)
    assert close["abs_rel"] < 0.03 and close["normal_deg"] < 8 and close["boundary_f"] > 0.95


# ---- prompts and methods ---------------------------------------------------------------------------------------------


def test_multi_names_3_to_5_classes_and_a_place():
    classes, places = read_names("coco"), [place_words(name) for name in read_names("places365")]
    assert (len(classes), len(places)) == (80, 365)
    numbers = set()
    for prompt in multi_prompts(200):
        things, _, place = prompt.partition(" in a ")
        named = things.split(" and ")
        assert place in places and all(name.removesuffix("s") in classes for name in named)
        assert len(set(named)) == len(named)
        numbers.add(len(named))
    assert numbers == {3, 4, 5}
    assert multi_prompts(10) == multi_prompts(200)[:10]
    assert place_words("subway_station/platform") == "platform subway station"


def test_parti_is_read_from_its_table(tmp_path):
    table = tmp_path / "PartiPrompts.tsv"
    table.write_text('Prompt\tCategory\tNote\na "big" cat\tAnimals\tx\n300\tAbstract\t\na "big" cat\tAnimals\t\n')
    assert prompt_set("parti", 10, table).prompts == ('a "big" cat', "300")
    with pytest.raises(UsageError, match="Prompt"):
        prompt_set("parti", 10, _written(tmp_path / "other.tsv", "a\tb\n1\t2\n"))
    with pytest.raises(UsageError, match=r"PartiPrompts\.tsv"):
        prompt_set("parti", 10)


def _written(path, text):
    path.write_text(text)
    return path


def test_own_prompts_come_from_a_file_once_each(tmp_path):
    file = _written(tmp_path / "mine.txt", "a dog\n\na cat\na dog\n")
    assert prompt_set("file", 10, file).prompts == ("a dog", "a cat")
    with pytest.raises(UsageError, match="no prompts"):
        prompt_set("file", 10, _written(file, "\n"))
    with pytest.raises(UsageError, match="demo, depth, multi, parti"):
        prompt_set("coco", 10)


def test_demo_captions_are_all_different_and_in_the_grammar():
    made = demo_captions(12)
    assert len(set(made.prompts)) == 12 and made.in_grammar
    assert demo_captions(5).prompts == made.prompts[:5]


def test_depth_captions_say_what_is_behind_or_in_front_and_none_is_among_the_demo_ones_before_them():
    made = depth_captions(4, after=20)
    assert len(set(made.prompts)) == 4 and not set(made.prompts) & set(demo_captions(20).prompts)
    for prompt, scene in zip(made.prompts, made.scenes, strict=True):
        assert {stated.relation for stated in parse(prompt).relations} & {"behind", "in front of"}
        assert compose(UNSEEN, scene).caption == prompt


def test_methods_keep_the_settings_of_their_schedule():
    made = parse_methods("base, base-3x,drop:tau=800,stages=2-4,gaussian")
    assert [(m.schedule, m.times_steps) for m in made] == [
        ("off", 1),
        ("off", 3),
        ("drop:tau=800,stages=2-4", 1),
        ("gaussian", 1),
    ]
    with pytest.raises(UsageError):
        parse_methods("base,base")


def test_a_search_is_every_combination_beside_the_base(tmp_path):
    grid = _written(tmp_path / "grid.toml", '[drop]\ntau = [700, 800]\nstages = ["2-4", "3"]\n[joint]\n')
    assert [m.name for m in search_methods(grid)] == [
        "base",
        "drop:tau=700,stages=2-4",
        "drop:tau=700,stages=3",
        "drop:tau=800,stages=2-4",
        "drop:tau=800,stages=3",
        "joint",
    ]
    with pytest.raises(UsageError, match="lists of values"):
        search_methods(_written(tmp_path / "bad.toml", "[drop]\ntau = 700\n"))


def test_a_blocks_depth_is_metric_and_shown_with_near_bright():
    depth = np.repeat(np.linspace(1, 9, 16, dtype=np.float32)[:, None], 16, axis=1)  # near at the top
    (item,) = maps_of({"depth": depth[None]}, 0).values()
    shown = depth_picture(item).astype(int).sum(axis=2)
    assert shown[1, 8] > shown[14, 8]
