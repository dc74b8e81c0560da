"""The table of failure reasons and its page in the documentation say the same."""

import re
from pathlib import Path

from extract.reasons import REASONS, page

ROOT = Path(__file__).parent.parent


def test_the_page_of_failures_explains_exactly_the_reasons_of_the_table() -> None:
    written = (ROOT / "docs" / "failures.md").read_text(encoding="utf-8")
    assert written == page(), "write it anew with: python -m extract.reasons > docs/failures.md"


def test_reasons_are_slugs_of_known_stages_with_one_sentence_each() -> None:
    for name, reason in REASONS.items():
        assert re.fullmatch(r"[a-z][a-z0-9_]*", name)
        assert reason.stage in ("read", "decode", "estimate", "encode")
        assert reason.explanation and "|" not in reason.explanation and not reason.explanation.endswith(".")
