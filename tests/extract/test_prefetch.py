"""Working ahead in threads: in order, within its bounds, and without leaving threads behind."""

import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from extract.run.prefetch import map_ahead


def double(position: int, value: int) -> int:
    time.sleep(0.002 if value % 3 == 0 else 0)
    return 2 * value


@given(st.lists(st.integers(0, 100), max_size=40), st.integers(1, 4), st.integers(1, 9), st.integers(1, 300))
@settings(max_examples=30, deadline=None)
def test_results_come_in_order_whatever_the_bounds(values: list[int], threads: int, most: int, room: int) -> None:
    results = map_ahead(values, double, threads=threads, most=most, most_bytes=room, size_of=lambda held: held)
    assert list(results) == [2 * value for value in values]


@pytest.mark.parametrize(("most", "most_bytes", "furthest"), [(3, 1000, 4), (100, 50, 7)])
def test_it_never_runs_further_ahead_than_its_bounds(most: int, most_bytes: int, furthest: int) -> None:
    taken, lead = 0, []

    def inputs() -> Iterator[int]:
        for number in range(50):
            lead.append(number - taken)
            yield number

    for _ in map_ahead(inputs(), lambda _, n: n, threads=1, most=most, most_bytes=most_bytes, size_of=lambda _: 10):
        time.sleep(0.002)
        taken += 1
    assert taken == 50 and max(lead) <= furthest


def test_errors_of_reading_and_of_the_work_are_raised_where_their_result_is_due() -> None:
    def inputs() -> Iterator[int]:
        yield from (1, 2)
        raise LookupError("the table is gone")

    results = map_ahead(inputs(), double, threads=2, most=4, most_bytes=100, size_of=lambda _: 1)
    assert [next(results), next(results)] == [2, 4]
    with pytest.raises(LookupError, match="the table is gone"):
        next(results)
    broken = map_ahead([1, 0, 3], lambda _, n: 6 // n, threads=2, most=4, most_bytes=100, size_of=lambda _: 1)
    assert next(broken) == 6
    with pytest.raises(ZeroDivisionError):
        list(broken)


def test_a_consumer_that_leaves_early_leaves_no_thread_behind() -> None:
    before = threading.active_count()
    results = map_ahead(iter(int, 1), double, threads=2, most=2, most_bytes=100, size_of=lambda _: 1)
    assert next(results) == 0
    results.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before
