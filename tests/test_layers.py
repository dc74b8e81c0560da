"""The house: packages import downwards only, and what must be quick to import is."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = ("shards", "extract", "infer", "train")  # from the ground up


def imports(path: Path) -> set[str]:
    """The top-level packages that a module imports, wherever in the file it does so."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


@pytest.mark.parametrize("layer", LAYERS)
def test_a_package_imports_nothing_above_itself(layer: str) -> None:
    forbidden = {*LAYERS[LAYERS.index(layer) + 1 :], "tests", "benchmarks"}
    modules = list((ROOT / layer).rglob("*.py"))
    assert modules
    wrong = {str(path.relative_to(ROOT)): sorted(imports(path) & forbidden) for path in modules}
    assert not {path: names for path, names in wrong.items() if names}


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
