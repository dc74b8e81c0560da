"""The README keeps its word: every command in it is run, as written, and its Python lines too."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from infer.outputs import read_given
from shards.intrinsics import INTRINSICS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for kind, block in BLOCKS if kind == "console" for line in block.strip().splitlines()]
RECURSIVE = ("make test", "make lint")  # the suite itself, and the step before it


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like a fresh clone with its environment ready, and one image to extract."""
    folder = tmp_path_factory.mktemp("clone")
    for path in ROOT.iterdir():
        if path.name not in ("data", "runs", "samples", ".venv"):
            (folder / path.name).symlink_to(path)
    (folder / ".venv").symlink_to(Path(sys.prefix))
    (folder / "path" / "to" / "images").mkdir(parents=True)
    from skimage import data
    from skimage.io import imsave

    imsave(folder / "path" / "to" / "images" / "cat.png", data.chelsea())
    (folder / "path" / "to" / "images" / "cat.txt").write_text("a cat looks at the camera")
    return folder


@pytest.mark.timeout(900)
def test_every_command_and_python_line_works_in_the_order_of_the_page(clone: Path) -> None:
    of_the_outer_make = ("MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS", "MAKELEVEL", "ARGS")
    environment = {name: value for name, value in os.environ.items() if name not in of_the_outer_make}
    environment |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}  # no network after the set-up, says the page
    for command in COMMANDS:
        if command in RECURSIVE:
            assert re.search(rf"^{command.split()[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
            continue
        done = subprocess.run(
            command, shell=True, cwd=clone, env=environment, capture_output=True, text=True, check=False, timeout=280
        )
        assert done.returncode == 0, f"{command}: {done.stdout[-2000:]} {done.stderr[-2000:]}"
    for kind, block in BLOCKS:
        if kind == "python":
            done = subprocess.run(
                [sys.executable, "-c", block], cwd=clone, env=environment, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr
    assert (clone / "data" / "demo" / "gallery.html").is_file()
    drawn = list((clone / "samples").glob("*.json"))
    assert len(drawn) == sum(command.startswith("make sample") for command in COMMANDS)
    for described in drawn:  # by the embedded base and run, which need no options
        maps = read_given(str(described.with_suffix("")))
        assert set(maps) == set(INTRINSICS) and maps["depth"].values.shape == (64, 64)


def test_every_file_that_the_page_names_is_there() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target
