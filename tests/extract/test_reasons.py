"""The table of failure reasons and its page in the documentation say the same."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from extract.reasons import REASONS, page
from shards.edit.forget import REASON as FORGOTTEN

ROOT = Path(__file__).parents[2]

MAKERS = {"Failure", "failure", "fail", "ImageProblem", "ReadProblem", "DownloadProblem"}
STAGES = ("read", "decode", "estimate", "encode")


def reasons_given_by(path: Path) -> Iterator[str]:
    """The reasons that stand as words in a module's calls of what makes failures."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            words = (a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str))
            if name in MAKERS:
                yield from (word for word in words if word not in STAGES and re.fullmatch(r"[a-z_]+", word))


def test_every_reason_that_the_code_gives_is_in_the_table() -> None:
    given = {(word, path.name) for path in (ROOT / "extract").rglob("*.py") for word in reasons_given_by(path)}
    assert len(given) > 30
    assert {use for use in given if use[0] not in REASONS} == set()
    assert FORGOTTEN in REASONS


def test_the_page_of_failures_explains_exactly_the_reasons_of_the_table() -> None:
    written = (ROOT / "docs" / "failures.md").read_text(encoding="utf-8")
    assert written == page(), "write it anew with: python -m extract.reasons > docs/failures.md"


def test_reasons_are_slugs_of_known_stages_with_one_sentence_each() -> None:
    for name, reason in REASONS.items():
        assert re.fullmatch(r"[a-z][a-z0-9_]*", name)
        assert reason.stage in STAGES
        assert reason.explanation and "|" not in reason.explanation and not reason.explanation.endswith(".")
