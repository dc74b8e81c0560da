"""The schedules against the paper's numbers, their forms on disk and on the command line, and the stage maps."""

import json
import math
from pathlib import Path

import pytest
import torch
from diffusers import PixArtTransformer2DModel, UNet2DConditionModel
from hypothesis import given
from hypothesis import strategies as st

from infer.model.processor import self_attention_layers
from infer.model.schedules import Drop, Gaussian, Joint, Off, Table, from_dict, grid_text, parse
from infer.model.stages import StageMap, stage_map_of, stage_maps
from infer.schedule_plot import plot_defaults, plot_schedules
from shards.core.errors import UserError

TABLE = Table((900.0, 100.0), ((1.0, 0.0, 0.5), (0.0, 0.0, 1.0)))


def test_drop_is_equation_2_with_the_papers_numbers():
    drop = stage_maps()["unet4"].schedule("drop")
    assert drop == Drop(tau=900, stages=(3, 4, 5, 6, 7))
    assert drop.at(900, 9) == (0, 0, 1, 1, 1, 1, 1, 0, 0)
    assert drop.at(900.5, 9) == (0,) * 9
    assert drop.at(0, 9) == drop.at(899.25, 9) == drop.at(900, 9)


def test_gaussian_is_equation_3_with_the_papers_numbers():
    gaussian = stage_maps()["unet4"].schedule("gaussian")
    assert gaussian == Gaussian(alpha=1, tau=800, sigma=100)
    assert gaussian.at(800, 9) == (1.0,) * 9
    for t in (999, 750.5, 600):
        assert gaussian.w(1, t) == pytest.approx(math.exp(-((t - 800) ** 2) / 100**2))
    assert Gaussian(alpha=0.5).w(3, 800) == 0.5


def test_off_and_joint_are_constant():
    assert Off().at(500, 3) == (0, 0, 0) and Joint().at(500, 3) == (1, 1, 1)
    assert Off().constant and Joint().constant and not Drop().constant


def test_a_negligible_weight_is_exactly_zero():
    t = 800 - 100 * math.sqrt(-math.log(1e-6))  # where w = 1e-6
    assert Gaussian().w(1, t - 1) > 0
    assert Gaussian().at(t + 0.1, 2) != (0.0, 0.0) and Gaussian().at(t - 0.1, 2) == (0.0, 0.0)


def test_the_last_active_step_is_where_the_intrinsics_cease_to_matter():
    steps = [float(t) for t in range(980, -1, -40)]
    assert steps[Gaussian().last_active(steps, 9)] == 460  # w(420) = 5e-7
    assert Drop().last_active(steps, 9) == len(steps) - 1
    assert Drop(stages=(12,)).last_active(steps, 9) == -1
    assert Off().last_active(steps, 9) == -1
    assert Table((700, 699), ((1.0,), (0.0,))).last_active(steps, 1) == steps.index(700)


@pytest.mark.parametrize("timestep", [-1.0, 1000.5, math.nan])
def test_timesteps_that_are_not_those_of_training_are_refused(timestep):
    for schedule in (Drop(), Gaussian(), TABLE):
        with pytest.raises(UserError, match="timestep"):
            schedule.at(timestep, 3)


def test_a_table_is_linear_between_its_timesteps_and_constant_beyond():
    assert TABLE.timesteps == (100, 900)
    assert TABLE.at(500, 3) == pytest.approx((0.5, 0.0, 0.75))
    assert TABLE.at(1000, 3) == (1.0, 0.0, 0.5) and TABLE.at(0, 3) == (0.0, 0.0, 1.0)
    with pytest.raises(UserError, match="3 stages"):
        TABLE.at(500, 4)


def test_a_table_reads_alike_from_csv_json_and_toml(tmp_path):
    (tmp_path / "a.csv").write_text("timestep,1,2,3\n900,1,0,0.5\n100,0,0,1\n")
    (tmp_path / "a.json").write_text(json.dumps({"timesteps": [900, 100], "weights": [[1, 0, 0.5], [0, 0, 1]]}))
    (tmp_path / "a.toml").write_text("timesteps = [900, 100]\nweights = [[1, 0, 0.5], [0, 0, 1]]\n")
    for kind in ("csv", "json", "toml"):
        assert parse(str(tmp_path / f"a.{kind}")) == TABLE


@pytest.mark.parametrize("name", ["a.csv", "a.json", "a.toml", "bom.csv"])
def test_a_table_whose_stages_are_in_another_order_is_read_as_written(name, tmp_path):
    """By hand: at t = 900 the column "3" holds 0.5, the column "1" holds 1."""
    (tmp_path / "a.csv").write_text("timestep,3,1,2\n900,0.5,1,0\n100,1,0,0\n")
    (tmp_path / "bom.csv").write_text("\ufeffTimestep, l=3, l=1, l=2\n\n900, 0.5, 1, 0\n100, 1, 0, 0\n", "utf-8")
    weights = [[0.5, 1, 0], [1, 0, 0]]
    (tmp_path / "a.json").write_text(json.dumps({"timesteps": [900, 100], "stages": [3, 1, 2], "weights": weights}))
    (tmp_path / "a.toml").write_text(f"timesteps = [900, 100]\nstages = [3, 1, 2]\nweights = {weights}\n")
    table = parse(str(tmp_path / name))
    assert [table.w(stage, 900) for stage in (1, 2, 3)] == [1, 0, 0.5]
    assert [table.w(stage, 100) for stage in (1, 2, 3)] == [0, 0, 1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "900,1,0,0.5\n100,0,0,1\n", "its header is '900,1,0,0.5'"),
        ("a.csv", "timestep,low,middle,high\n900,1,0,0.5\n", "its header is"),
        ("a.csv", "timestep,1,2,4\n900,1,0,0.5\n", "columns are for stages"),
        ("a.csv", "timestep,1,2,2\n900,1,0,0.5\n", "columns are for stages"),
        ("a.csv", "timestep,1,2\n900,1,0,0.5\n", "line 2 has 4 columns, its header 3"),
        ("a.csv", "timestep,1,2\n900,1,0\n\n100,x,1\n", "line 4"),
        ("a.csv", "timestep;1;2\n900;1;0\n", "its header is"),
        ("a.csv", "\n", "it is empty"),
        ("a.csv", "timestep,1\n1200,1\n", "timestep outside 0 to 1000"),
        ("a.json", '{"timesteps": [900], "weights": [[1, 0]], "stages": [1]}', "could not be read"),
        ("a.json", '{"timesteps": [900], "weights": [[1, 0]], "order": [1, 2]}', "it has 'order'"),
        ("a.json", "[]", "could not be read"),
    ],
)
def test_a_table_that_does_not_say_its_stages_is_refused(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        parse(str(tmp_path / name))


def test_a_schedule_for_other_stages_than_the_bases_is_refused(tmp_path):
    base = stage_maps()["unet4"]  # 9 stages
    for count in (8, 10):
        header = ",".join(str(stage) for stage in range(1, count + 1))
        (tmp_path / "a.csv").write_text(f"timestep,{header}\n500" + ",1" * count + "\n")
        with pytest.raises(UserError, match=f"has {count} stages, but this base has 9"):
            base.schedule(str(tmp_path / "a.csv"))
    with pytest.raises(UserError, match="names stage 10, but this base has 9"):
        base.schedule("drop:stages=8-12")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "timestep,1\n",
        "timestep,1\n900,x\n",
        "timestep,1\n900\n",
        "timestep,1\n9,1\n9,1\n",
        "t,1\n9,-1\n",
        "t,1\n9,nan\n",
    ],
)
def test_a_broken_table_is_a_sentence(tmp_path, content):
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(UserError):
        parse(str(tmp_path / "a.csv"))
    with pytest.raises(UserError, match="could not be read"):
        parse(str(tmp_path / "missing.csv"))


SCHEDULES = st.one_of(
    st.just(Off()),
    st.just(Joint()),
    st.builds(Drop, tau=st.floats(0, 1000), stages=st.lists(st.integers(1, 28), max_size=5).map(tuple)),
    st.builds(Gaussian, alpha=st.floats(0, 3), tau=st.floats(0, 1000), sigma=st.floats(1, 1000)),
    st.lists(st.floats(0, 1), min_size=1, max_size=3).map(lambda row: Table((3.0, 9.5), (tuple(row), tuple(row)))),
)


@given(SCHEDULES)
def test_every_schedule_survives_json(schedule):
    assert from_dict(json.loads(json.dumps(schedule.to_dict()))) == schedule


def test_the_command_lines_text_overrides_the_bases_defaults():
    base = stage_maps()["unet3"]
    assert base.schedule("drop") == Drop(900, (3, 4, 5))
    assert base.schedule("drop:stages=1+4-6,tau=700") == Drop(700, (1, 4, 5, 6))
    assert base.schedule("gaussian:sigma=50") == Gaussian(sigma=50)
    assert base.schedule("off") == Off() and parse("joint") == Joint()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "gauss",
        "gaussian:width=3",
        "gaussian:tau",
        "gaussian:sigma=0",
        "gaussian:sigma=x",
        "drop:stages=a",
        "drop:stages=0-3",
        "table",
    ],
)
def test_what_is_no_schedule_is_a_sentence(text):
    with pytest.raises(UserError):
        parse(text)


def test_the_grid_prints_a_line_for_each_timestep_and_a_column_for_each_stage():
    lines = grid_text(Drop(), 9, (950, 900)).splitlines()
    assert len(lines) == 4
    assert lines[0].split() == ["t", "|", *(f"l={stage}" for stage in range(1, 10))]
    assert lines[2].split() == ["950", "|", *["."] * 9]
    assert lines[3].split() == ["900", "|", ".", ".", *["1.00"] * 5, ".", "."]


@pytest.mark.parametrize("kind", ["svg", "png"])
def test_the_plot_shows_the_weights_and_is_the_same_every_time(tmp_path, kind):
    drawn = []
    for name in ("a", "b"):
        path = tmp_path / f"{name}.{kind}"
        plot_schedules({"Drop": Drop(), "Gaussian": Gaussian()}, 9, path)
        drawn.append(path.read_bytes())
    assert drawn[0] == drawn[1] and len(drawn[0]) > 1000
    plot_schedules({"Drop": Off(), "Gaussian": Off()}, 9, tmp_path / f"c.{kind}")
    assert (tmp_path / f"c.{kind}").read_bytes() != drawn[0]
    with pytest.raises(UserError, match="svg"):
        plot_schedules({"Drop": Drop()}, 9, tmp_path / "a.gif")


def test_the_documents_figure_is_what_our_code_draws(tmp_path):
    plot_defaults(tmp_path / "schedules.svg")
    kept = Path(__file__).parents[2] / "docs" / "schedules.svg"
    assert kept.read_text() == (tmp_path / "schedules.svg").read_text(), (
        "run python -m infer.schedule_plot docs/schedules.svg"
    )


def full_size(name: str) -> torch.nn.Module:
    """The real networks, without memory for their weights."""
    sd = {
        "sample_size": 64,
        "block_out_channels": (320, 640, 1280, 1280),
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    }
    sd21 = {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True}
    sdxl = {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (5, 10, 20),
        "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }
    with torch.device("meta"):
        if name == "pixart":
            return PixArtTransformer2DModel(caption_channels=4096, cross_attention_dim=1152)
        return UNet2DConditionModel(**{"sd15": sd, "sd21": sd | sd21, "sdxl": sdxl}[name])


@pytest.mark.parametrize(
    ("name", "map_name", "layers", "used"),
    [
        ("sd15", "unet4", 16, {1, 2, 3, 5, 7, 8, 9}),
        ("sd21", "unet4", 16, {1, 2, 3, 5, 7, 8, 9}),
        ("sdxl", "unet3", 70, {2, 3, 4, 5, 6}),
        ("pixart", "pixart28", 28, set(range(1, 29))),
    ],
)
def test_the_stage_maps_are_complete_for_the_real_networks(name, map_name, layers, used):
    network = full_size(name)
    stages = stage_map_of(network)
    assert stages.name == map_name
    numbers = stages.of(self_attention_layers(network))
    assert len(numbers) == layers and set(numbers.values()) == used


def test_stages_count_from_the_input_through_the_middle():
    stages = stage_maps()["unet4"]
    assert stages.stages == 9
    assert stages.stage("down_blocks.0.attentions.0.transformer_blocks.0.attn1") == 1
    assert stages.stage("mid_block.attentions.0.transformer_blocks.0.attn1") == 5
    assert stages.stage("up_blocks.3.attentions.2.transformer_blocks.0.attn1") == 9


def test_a_layer_that_the_map_does_not_know_is_an_error():
    with pytest.raises(UserError, match="does not say"):
        stage_maps()["unet3"].of(["up_blocks.3.attentions.0.transformer_blocks.0.attn1"])
    with pytest.raises(UserError, match="no blocks"):
        stage_map_of(torch.nn.Linear(2, 2))
    assert stage_maps()["pixart28"].stage("transformer_blocks.1.attn1") == 2  # not taken for transformer_blocks.1x


def test_every_default_of_the_data_is_a_schedule_within_its_stages():
    for stages in stage_maps().values():
        drop = stages.schedule("drop")
        assert isinstance(drop, Drop) and set(drop.stages) <= set(range(1, stages.stages + 1))
        assert stages.schedule("gaussian") == Gaussian()


def test_a_network_that_no_table_names_is_counted_by_the_same_rule():
    with torch.device("meta"):
        network = PixArtTransformer2DModel(
            num_layers=6, attention_head_dim=8, num_attention_heads=2, cross_attention_dim=16
        )
    stages = stage_map_of(network)
    assert stages.stages == 6 and stages.stage("transformer_blocks.5.attn1") == 6
    assert set(stages.schedule("drop").stages) < set(range(1, 7))


def test_groups_of_blocks_can_be_one_stage():
    stages = StageMap("two", (("down_blocks", "mid_block"), ("up_blocks",)))
    assert stages.of(["down_blocks.3.x", "mid_block.y", "up_blocks.0.z"]) == {
        "down_blocks.3.x": 1,
        "mid_block.y": 1,
        "up_blocks.0.z": 2,
    }
