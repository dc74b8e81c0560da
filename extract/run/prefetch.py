"""Works ahead of a consumer in other threads, in order, and never further than a bound on memory allows."""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Room:
    """Counts the bytes that are held ahead. One entry always has room, however large it is."""

    def __init__(self, limit: int) -> None:
        self._limit, self._used, self._entries = limit, 0, 0
        self._changed = threading.Condition()
        self._closed = False

    def enter(self) -> bool:
        """Waits until there is room for one more entry; False if the consumer has gone."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._entries == 0 or self._used < self._limit)
            self._entries += 1
            return not self._closed

    def grow(self, size: int) -> None:
        """An entry turned out to hold `size` bytes more (or fewer, if negative)."""
        with self._changed:
            self._used += size
            self._changed.notify_all()

    def leave(self, size: int) -> None:
        """An entry that held `size` bytes was taken."""
        with self._changed:
            self._entries -= 1
            self._used -= size
            self._changed.notify_all()

    def close(self) -> None:
        """The consumer has gone: nobody waits any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


def map_ahead(
    inputs: Iterable[T],
    work: Callable[[int, T], R],
    *,
    threads: int,
    most: int,
    most_bytes: int,
    size_of: Callable[[T | R], int],
) -> Iterator[R]:
    """work(position, input) of each input, in order. Another thread reads the inputs, `threads` more do the work.

    At most `most` results or inputs are held ahead, and not many more bytes than `most_bytes` (by one input, and one
    result for each thread); size_of says how many an input or a result holds. What reading or work raises is raised here.
    """
    ahead: queue.Queue[Any] = queue.Queue()
    room, places, end = Room(most_bytes), threading.Semaphore(most), object()

    def sized(position: int, value: T, before: int) -> R:
        result = work(position, value)
        room.grow(size_of(result) - before)
        return result

    def read() -> None:
        try:
            with ThreadPoolExecutor(threads, "ahead") as pool:
                for position, value in enumerate(inputs):
                    places.acquire()
                    if not room.enter():
                        return
                    size = size_of(value)
                    room.grow(size)
                    ahead.put(pool.submit(sized, position, value, size))
            ahead.put(end)
        except BaseException as error:  # handed to the thread that waits for the next result
            ahead.put(error)

    reader = threading.Thread(target=read, name="read", daemon=True)
    reader.start()
    try:
        while (entry := ahead.get()) is not end:
            if isinstance(entry, BaseException):
                raise entry
            result = entry.result()
            room.leave(size_of(result))
            places.release()
            yield result
    finally:
        room.close()
        places.release()
        reader.join()
