"""Filters on the rows of a table, and the search for repeated rows."""

import decimal
import math
import random

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from extract.reasons import REASONS
from extract.sources.filters import Filters, as_numbers
from shards.core.errors import UsageError
from shards.edit.duplicates import find_repeats


def drops(filters: Filters, values: dict[str, list], captions: list[str] | None = None) -> list[str | None]:
    rows = len(next(iter(values.values()))) if values else len(captions or [])
    found = filters.drops(values, captions or [""] * rows)
    assert all(drop is None or drop[0] in REASONS for drop in found)
    return [drop and drop[0] for drop in found]


def test_scores_on_the_bound_pass_and_missing_ones_do_not() -> None:
    values = {"aesthetic": [6.5, 6.4999, None, math.nan, "6.6", "high", True]}
    assert drops(Filters(min_aesthetic=6.5), values) == [
        *(None, "filtered_aesthetic", "filtered_aesthetic", "filtered_aesthetic"),
        *(None, "filtered_aesthetic", "filtered_aesthetic"),
    ]
    kept = drops(Filters(min_aesthetic=6.5, missing="keep"), values)
    assert kept == [None, "filtered_aesthetic", None, None, None, None, None]


@pytest.mark.parametrize(
    ("filters", "values", "reason"),
    [
        (Filters(max_unsafe=0.5), {"unsafe": [0.5, 0.51]}, "filtered_unsafe"),
        (Filters(max_watermark=0.8), {"watermark": [0.8, 0.81]}, "filtered_watermark"),
        (Filters(min_similarity=0.3), {"similarity": [0.3, 0.29]}, "filtered_similarity"),
        (Filters(min_side_px=256), {"width": [256, 900], "height": [900, 255]}, "filtered_size"),
        (Filters(max_side_px=2000), {"width": [2000, 9], "height": [2000, 2001]}, "filtered_size"),
        (Filters(max_aspect=2.0), {"width": [200, 100], "height": [100, 201]}, "filtered_aspect"),
        (Filters(max_aspect=2.0), {"width": [200, 0], "height": [100, 0]}, "filtered_aspect"),
    ],
)
def test_each_bound_drops_with_its_reason(filters: Filters, values: dict[str, list], reason: str) -> None:
    assert drops(filters, values) == [None, reason]


def test_the_message_says_what_was_wrong() -> None:
    assert Filters(min_aesthetic=6.5).drops({"aesthetic": [6.25, None]}, ["", ""]) == [
        ("filtered_aesthetic", "its aesthetic 6.25 is below 6.5"),
        ("filtered_aesthetic", "its aesthetic is not stated"),
    ]


def test_captions_are_measured_in_characters_without_white_space_around() -> None:
    assert drops(Filters(min_caption=3, max_caption=5), {}, ["  ab  ", "abc", "日本語", "éàüöß", "abcdef"]) == [
        *("filtered_caption_length", None, None, None, "filtered_caption_length"),
    ]


def test_the_share_of_letters_in_a_script_decides() -> None:
    latin = Filters(caption_scripts=("Latin",), min_script_share=0.9)
    captions = ["A red ball, 12 cm!", "Ein schöner Müller", "красный шар", "赤い ball", "1234 !?", ""]
    reason = "filtered_caption_script"
    assert drops(latin, {}, captions) == [None, None, reason, reason, reason, reason]
    both = Filters(caption_scripts=("Han", "Hiragana"), min_script_share=0.3)
    assert drops(both, {}, captions) == [reason, reason, reason, None, reason, reason]


def test_columns_are_found_by_their_published_names() -> None:
    filters = Filters(min_aesthetic=6.5, max_unsafe=0.5, max_watermark=0.8, min_side_px=256)
    laion = ["URL", "TEXT", "WIDTH", "HEIGHT", "AESTHETIC_SCORE", "punsafe", "pwatermark", "hash", "similarity"]
    assert filters.columns(laion, "laion") == {
        "aesthetic": "AESTHETIC_SCORE",
        "width": "WIDTH",
        "height": "HEIGHT",
        "unsafe": "punsafe",
        "watermark": "pwatermark",
    }
    coyo = [
        "id",
        "url",
        "text",
        "width",
        "height",
        "nsfw_score_opennsfw2",
        "watermark_score",
        "aesthetic_score_laion_v2",
    ]
    assert filters.columns(coyo, "coyo")["aesthetic"] == "aesthetic_score_laion_v2"


def test_a_filter_without_its_column_is_an_error_that_names_the_setting() -> None:
    with pytest.raises(UsageError, match=r"punsafe.*source\.filters\.unsafe_column"):
        Filters(max_unsafe=0.5).columns(["URL", "TEXT"], "a.parquet")
    with pytest.raises(UsageError, match="Score"):
        Filters(min_aesthetic=5, aesthetic_column="Score").columns(["score"], "a.parquet")


@pytest.mark.parametrize(
    "settings",
    [
        {"max_aspect": 0.5},
        {"min_caption": 9, "max_caption": 3},
        {"caption_scripts": ("Elvish",)},
        {"min_script_share": 2.0},
    ],
)
def test_filters_that_cannot_work_are_refused(settings: dict) -> None:
    with pytest.raises(UsageError, match="filters"):
        Filters(**settings)


@pytest.mark.parametrize(
    "column",
    [
        pa.array([1, None, -3, (1 << 62) + 1], pa.int64()),
        pa.array([0, None, (1 << 64) - 1], pa.uint64()),
        pa.array([0.5, None, math.nan, math.inf, -math.inf], pa.float32()),
        pa.array([1.5, None, 0.25], pa.float16()),
        pa.array(["0.5", "x", None, " 7 "]),
        pa.array([True, None, False]),
        pa.array(["a", "3", None]).dictionary_encode(),
        pa.array([decimal.Decimal("2.5"), None]),
        pa.array([7, 8, 9, None]).slice(1),
    ],
    ids=lambda column: str(column.type),
)
def test_planning_sees_the_numbers_of_a_column_as_workers_see_those_of_its_rows(column: pa.Array) -> None:
    values = column.to_pylist()
    np.testing.assert_array_equal(as_numbers(column), as_numbers(values))
    for missing in ("drop", "keep"):
        filters = Filters(min_aesthetic=0.5, max_unsafe=7, min_caption=2, missing=missing)
        captions = ["xy"] * (len(values) - 1) + ["x"]
        drops = filters.drops({"aesthetic": values, "unsafe": values}, captions)
        passing = filters.passing({"aesthetic": column, "unsafe": column}, captions)
        assert passing.tolist() == [drop is None for drop in drops]


@settings(deadline=None)
@given(st.lists(st.lists(st.one_of(st.none(), st.sampled_from("abcdefgh")), max_size=9), max_size=9))
def test_repeats_are_exactly_the_rows_whose_text_came_before(batches: list[list[str | None]]) -> None:
    rows = [text for batch in batches for text in batch]
    expected = [number for number, text in enumerate(rows) if text is not None and text in rows[:number]]
    found = find_repeats(batches)
    assert found.rows == len(rows)
    assert found.within(0, len(rows)) == expected
    for start in range(0, len(rows), 5):
        stop = min(start + 7, len(rows))
        assert found.within(start, stop) == [number - start for number in expected if start <= number < stop]


def test_many_repeats_are_found_over_many_batches() -> None:
    generator = random.Random(0)
    rows = [f"http://host/{generator.randrange(20_000)}.jpg" for _ in range(50_000)]
    seen: set[str] = set()
    expected = []
    for number, text in enumerate(rows):
        if text in seen:
            expected.append(number)
        seen.add(text)
    found = find_repeats([rows[start : start + 999] for start in range(0, len(rows), 999)])
    assert found.within(0, len(rows)) == expected
