"""`python -m infer evaluate` from end to end over a tiny base: table, sheet, continuing, other sets, the hub's models."""

import json

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel
from typer.testing import CliRunner

from extract.world import compose, render
from infer.__main__ import app
from infer.condition import Given
from infer.evaluation.sets import UNSEEN, demo_captions
from infer.sampler import CoGenerator
from shards.core.errors import UserError
from tests.support import tiny_text
from train.demo.ground_truth import exact_maps


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    pipeline = tiny_text.pipeline("sd15")
    pipeline.save_pretrained(root / "base")
    tiny_text.save_run(pipeline, root / "run")
    return ["--base", str(root / "base"), "--run", str(root / "run"), "--size", "64", "--steps", "2"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = tiny_text.clip_tokenizer()
    text = tiny_text.clip_text_model().config.to_dict()
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    size = {"height": 16, "width": 16}
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def evaluate(models, out, *arguments: str) -> str:
    """Runs the command in this process; raises what it raises. Returns what it prints."""
    result = CliRunner().invoke(app, ["evaluate", *models, "--out", str(out), *arguments], catch_exceptions=True)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_demo_captions_give_a_table_with_every_method_beside_real_renderings(models, tmp_path):
    asked = ["--captions", "3", "--seeds", "2", "--batch", "2", "--reference", "4", "--methods", "base,base-2x,joint"]
    printed = evaluate(models, tmp_path, *asked)
    assert "18 images made" in printed and "table.md" in printed
    table = json.loads((tmp_path / "table.json").read_text())
    rows = {row["method"]: row for row in table["rows"]}
    assert list(rows) == ["renderings", "base", "base-2x", "joint"]
    assert [row["images"] for row in rows.values()] == [3, 6, 6, 6]
    real, base, joint = rows["renderings"]["values"], rows["base"]["values"], rows["joint"]["values"]
    assert real["layout"]["value"] > base["layout"]["value"]
    assert real["fid_real"]["value"] < base["fid_real"]["value"]
    assert real["abs_rel"]["value"] < joint["abs_rel"]["value"] and "abs_rel" not in base
    assert rows["joint"]["against_base"]["layout"]["low"] <= rows["joint"]["against_base"]["layout"]["value"]
    assert "cmmd_base" in joint and "cmmd_base" not in base
    text = (tmp_path / "table.md").read_text()
    assert "## Layout" in text and "| joint (6) |" in text
    assert Image.open(tmp_path / "sheet.png").width > 8 * 128

    again = evaluate(models, tmp_path, *asked)
    assert "\n0 images made" in f"\n{again}"
    assert json.loads((tmp_path / "table.json").read_text()) == table

    other = evaluate(models, tmp_path, *asked, "--guidance", "2", "--methods", "base")
    assert "6 images made" in other  # nothing of other settings is taken for its own


def test_every_prompt_has_noise_of_its_own_whatever_the_batches_and_the_sampler_draws_the_same_of_its_seed(
    models, tmp_path
):
    prompts = tmp_path / "same.txt"
    prompts.write_text("\n".join(f"a ball {i}" for i in range(5)))
    drawn = {}
    for batch in ("2", "5"):
        out = tmp_path / batch
        asked = ["--prompts", str(prompts), "--seeds", "2", "--seed", "7", "--methods", "base", "--estimators", "none"]
        evaluate(models, out, *asked, "--batch", batch)
        assert (out / "sheet.png").exists()  # though nothing measures these prompts
        for number in range(2):  # files of a seed, in the order of their prompts
            files = sorted((out / "images" / "base").glob(f"s{7 + number}-*.npz"))
            drawn[batch, number] = np.concatenate([np.load(file)["image"] for file in files]).astype(int)
    for number in range(2):  # but for rounding, which is a batch's
        assert abs(drawn["2", number] - drawn["5", number]).max() <= 1 and len(drawn["2", number]) == 5
    values = dict(zip(models[::2], models[1::2], strict=True))
    with CoGenerator.from_pretrained(values["--base"], values["--run"], device="cpu") as generator:
        seeds = [7 + 1 + 3 * 1000, 7 + 1]
        own, another = generator("a ball 3", seeds=seeds, steps=2, size=64, schedule="off").images
    assert abs(np.asarray(own) - drawn["2", 1][3]).max() <= 1 < abs(np.asarray(another) - drawn["2", 1][3]).max()


def test_the_base_of_a_schedule_that_is_off_is_the_base(models, tmp_path):
    asked = ["--captions", "2", "--seeds", "1", "--reference", "4", "--methods", "base,off,gaussian:alpha=0"]
    evaluate(models, tmp_path, *asked)
    rows = {row["method"]: row for row in json.loads((tmp_path / "table.json").read_text())["rows"]}
    assert rows["gaussian:alpha=0"]["values"]["fid_base"]["value"] == pytest.approx(0, abs=1e-3)


def test_the_oracle_is_drawn_with_the_exact_maps_of_each_captions_scene(models, tmp_path):
    asked = ["--captions", "2", "--seeds", "1", "--reference", "4", "--methods", "base", "--oracle-intrinsics"]
    for hold in ("noised", "clean"):
        evaluate(models, tmp_path, *asked, "--hold", hold)
        table = json.loads((tmp_path / "table.json").read_text())
        assert [row["method"] for row in table["rows"]] == ["renderings", "base", "oracle-joint"]
        assert "abs_rel" not in table["rows"][2]["values"]  # its maps are given, not made
    files = sorted((tmp_path / "images" / "oracle-joint").glob("*.npz"))
    assert len(files) == 2
    drawn = [np.load(file)["image"].astype(int) for file in files]

    prompts = demo_captions(2)
    renderings = [render(compose(UNSEEN, scene), 64) for scene in prompts.scenes]
    values = dict(zip(models[::2], models[1::2], strict=True))
    with CoGenerator.from_pretrained(values["--base"], values["--run"], device="cpu") as generator:
        for hold in ("noised", "clean"):
            options = {"seeds": [0, 1000], "steps": 2, "size": 64, "schedule": "joint", "hold": hold, "guidance": 7.5}
            given = [Given(maps=exact_maps(one)) for one in renderings]
            images = generator(list(prompts.prompts), given=given, **options).images
            own = np.stack([np.asarray(image) for image in images]).astype(int)
            assert min(abs(own - other).max() for other in drawn) <= 2 < max(abs(own - other).max() for other in drawn)


def test_other_prompts_are_judged_by_the_models_of_the_hub(models, clip, tmp_path):
    prompts = tmp_path / "mine.txt"
    prompts.write_text("a dog\na cat on a mat\n")
    asked = ["--prompts", str(prompts), "--seeds", "2", "--methods", "base,drop", "--estimators", "none"]
    evaluate(models, tmp_path / "out", *asked, "--clip", clip, "--hps", clip)
    rows = {row["method"]: row for row in json.loads((tmp_path / "out" / "table.json").read_text())["rows"]}
    assert list(rows) == ["base", "drop"]
    assert rows["base"]["values"]["clip"]["value"] == pytest.approx(rows["base"]["values"]["hps"]["value"], abs=1e-6)
    assert -1 <= rows["drop"]["values"]["clip"]["value"] <= 1
    assert rows["drop"]["values"]["cmmd_clip"]["value"] >= 0 and "cmmd_clip" not in rows["base"]["values"]


def test_a_search_runs_the_grid_beside_the_base(models, tmp_path):
    grid = tmp_path / "grid.toml"
    grid.write_text('[drop]\ntau = [500, 900]\nstages = ["3-4"]\n')
    asked = ["--search", str(grid), "--captions", "2", "--seeds", "1", "--reference", "4", "--map-seeds", "0"]
    printed = evaluate(models, tmp_path / "out", *asked)
    assert "drop:tau=500,stages=3-4" in printed and "drop:tau=900,stages=3-4" in printed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--methods", "base,magic"], "magic"),
        (["--set", "parti"], "PartiPrompts.tsv"),
        (["--set", "coco"], "demo, depth, multi, parti"),
        (["--clip", "/nowhere"], "/nowhere"),
        (["--detector", "/nowhere"], "/nowhere"),
        (["--estimators", "magic"], "magic"),
        (["--set", "multi", "--oracle-intrinsics"], "oracle-joint needs scenes"),
        (["--hold", "tight"], "--hold tight"),
    ],
)
def test_mistakes_are_sentences(models, tmp_path, arguments, said):
    with pytest.raises(UserError, match=said):
        evaluate(models, tmp_path, "--captions", "2", "--seeds", "1", "--methods", "base", *arguments)
