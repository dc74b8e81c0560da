"""The search for inputs that kill their worker: all are found, nobody else is blamed, whatever dies meanwhile."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extract.workers.poison import CrashBisection
from shards.core.errors import UserError


def search(count: int, killers: set[int], accidents: list[bool] | None = None) -> tuple[list[int], int]:
    """Answers an inquiry as workers would; `accidents` says at which questions a worker dies without a reason."""
    inquiry, deaths, chance = CrashBisection("unit 0"), 0, iter(accidents or ())
    while (question := inquiry.question) is not None:
        start, stop = question
        died = any(start <= position < stop for position in killers) or next(chance, False)
        deaths += died
        inquiry.answer(survived=not died, count=count)
    return sorted(inquiry.killers), deaths


@given(st.integers(0, 70), st.sets(st.integers(0, 69), max_size=5))
def test_every_killer_is_found_and_nobody_else(count: int, killers: set[int]) -> None:
    there = {position for position in killers if position < count}
    found, deaths = search(count, there)
    assert found == sorted(there)
    assert deaths <= len(there) * (count.bit_length() + 2)


@given(st.integers(1, 40), st.sets(st.integers(0, 39), max_size=3), st.integers(0, 200))
def test_a_worker_that_dies_by_chance_blames_nobody(count: int, killers: set[int], when: int) -> None:
    there = {position for position in killers if position < count}
    accidents = [number == when for number in range(when + 1)]
    assert search(count, there, accidents)[0] == sorted(there)


def test_a_unit_that_cannot_even_be_read_stops_the_run_with_a_sentence() -> None:
    inquiry = CrashBisection("unit 7")
    with pytest.raises(UserError, match="unit 7: a worker dies as soon as it reads these inputs"):
        for _ in range(3):
            assert inquiry.question == (0, 0)
            inquiry.answer(survived=False)
