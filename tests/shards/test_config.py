"""Configuration and command lines: settings are typed, mistakes are sentences, exit statuses are as documented."""

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from shards.core.config import load_config, read_toml
from shards.core.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Image:
    size_px: int | None = 512
    format: Literal["jpg", "png"] = "jpg"

    def __post_init__(self) -> None:
        if self.size_px is not None and self.size_px < 1:
            raise UsageError("image.size_px must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Config:
    data: str
    share: float = 0.1
    careful: bool = False
    only: tuple[str, ...] = ()
    out: Path = Path("data")
    extra: dict = field(default_factory=dict)
    image: Image = field(default_factory=Image)


def test_later_layers_win_and_none_means_not_given() -> None:
    recipe = {"data": "demo", "only": ["line"], "image": {"size_px": 256}}
    command_line = {"share": 1, "only": None, "out": "x", "image": {"format": "png", "size_px": None}}
    assert load_config(Config, recipe, command_line) == Config(
        data="demo", share=1.0, only=("line",), out=Path("x"), image=Image(size_px=256, format="png")
    )


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ({}, "'data' is missing"),
        ({"data": "x", "dat": 1}, "unknown setting 'dat'; known here: data, share"),
        ({"data": "x", "image": {"sise": 1}}, "unknown setting 'image.sise'"),
        ({"data": "x", "image": 3}, "'image' must be a table"),
        ({"data": "x", "image": {"format": "bmp"}}, "image.format = 'bmp' is not one of 'jpg', 'png'"),
        ({"data": "x", "image": {"size_px": True}}, "image.size_px = True is not of type"),
        ({"data": "x", "image": {"size_px": 0}}, "size_px must be at least 1"),
        ({"data": 3}, "data = 3 is not of type str"),
        ({"data": "x", "share": "much"}, "share = 'much' is not of type float"),
        ({"data": "x", "careful": 1}, "careful = 1 is not of type bool"),
        ({"data": "x", "only": "line"}, "only = 'line' is not of type"),
        ({"data": "x", "only": [1]}, "only = 1 is not of type str"),
    ],
)
def test_a_wrong_setting_is_named_with_its_table(layer: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_config(Config, layer)


def test_a_toml_file_that_is_missing_or_broken_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read .*no\.toml"):
        read_toml(tmp_path / "no.toml")
    (tmp_path / "bad.toml").write_text("a = ")
    with pytest.raises(UsageError, match=r"bad\.toml is not valid TOML"):
        read_toml(tmp_path / "bad.toml")
    (tmp_path / "good.toml").write_text("[image]\nsize_px = 3")
    assert read_toml(tmp_path / "good.toml") == {"image": {"size_px": 3}}


PROGRAM = """
import sys
from shards.core import cli
from shards.core.errors import TooManyFailures, UsageError, UserError
app = cli.new_app("Tries errors.")
@app.command()
def go(error: str, debug: cli.DebugOption = False):
    raise {"user": UserError, "usage": UsageError, "many": TooManyFailures}[error]("it broke")
cli.run(app)
"""


@pytest.mark.parametrize(("error", "status"), [("user", 1), ("usage", 2), ("many", 3)])
def test_an_error_is_one_sentence_and_its_exit_status(error: str, status: int) -> None:
    run = subprocess.run([sys.executable, "-c", PROGRAM, error], capture_output=True, text=True, check=False)
    assert run.returncode == status and len(run.stderr.splitlines()) == 1 and "Traceback" not in run.stderr


def test_debug_shows_the_traceback() -> None:
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, "user", "--debug"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 1 and "Traceback" in run.stderr and "it broke" in run.stderr
