"""The house: packages import downwards only, and what must be quick to import is."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = ("shards", "extract", "infer", "train")  # from the ground up


ROOMS = {  # a room, and what nothing in it may import
    "shards/core": ("shards", "extract", "infer", "train"),  # but itself
    "infer/model": ("extract", "infer.evaluation", "infer.sampler", "infer.jobs"),
    "extract/world": ("extract.sources", "extract.run", "extract.workers", "extract.estimators"),
    "extract/images": ("extract.sources", "extract.run", "extract.workers", "extract.estimators", "extract.download"),
    "extract/download": ("extract.sources", "extract.run", "extract.workers", "extract.estimators"),
    "extract/estimators": ("extract.sources", "extract.run", "extract.workers", "extract.download"),
}


def imports(path: Path) -> set[str]:
    """The modules that a file imports, wherever in the file it does so."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
    return found


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def forbidden_imports(folder: str, forbidden: tuple[str, ...]) -> dict[str, list[str]]:
    """What the files of a folder import of the forbidden packages, by file; the folder may import itself."""
    own = folder.replace("/", ".")
    files = list((ROOT / folder).rglob("*.py"))
    assert files, folder
    wrong = {}
    for path in files:
        modules = {name for name in imports(path) if not within(name, own)}
        names = sorted(name for name in modules if any(within(name, package) for package in forbidden))
        if names:
            wrong[str(path.relative_to(ROOT))] = names
    return wrong


@pytest.mark.parametrize("layer", LAYERS)
def test_a_package_imports_nothing_above_itself(layer: str) -> None:
    assert not forbidden_imports(layer, (*LAYERS[LAYERS.index(layer) + 1 :], "tests", "benchmarks"))


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_does_not_see_what_it_must_not(room: str) -> None:
    assert not forbidden_imports(room, ROOMS[room])


@pytest.mark.parametrize("package", LAYERS)
def test_the_command_lines_answer_help_without_loading_torch(package: str) -> None:
    code = (
        "import sys, runpy; sys.argv = [sys.argv[1], '--help']\n"
        "try: runpy.run_module(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as stop: assert not stop.code\n"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    run = subprocess.run([sys.executable, "-c", code, package], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "Usage" in run.stdout
