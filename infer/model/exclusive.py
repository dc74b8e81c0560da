"""One call at a time: a network in joint attention holds the state of the call that runs, as a stock pipeline does."""

import threading
from collections.abc import Callable
from functools import wraps
from types import TracebackType
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from shards.core.errors import UsageError, UserError

P = ParamSpec("P")
T = TypeVar("T")


class Exclusive:
    """A lock that other threads wait for. The thread that holds it cannot take it again: it would overwrite its own call.

    A copy is a lock of its own, and open.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: int | None = None

    def __enter__(self) -> None:
        if self._owner == threading.get_ident():
            raise UsageError("this generator is at work already, in a callback of its own call: use another one there")
        self._lock.acquire()
        self._owner = threading.get_ident()

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._owner = None
        self._lock.release()

    def check(self) -> None:
        """UserError if another thread holds it."""
        if self._owner not in (None, threading.get_ident()):
            raise UserError(
                "another thread samples with this network: call the CoGenerator, which waits for its turn, or load another"
            )

    def __reduce__(self) -> tuple[type["Exclusive"], tuple[()]]:
        return Exclusive, ()


class Holds(Protocol):
    @property
    def busy(self) -> Exclusive: ...


H = TypeVar("H", bound=Holds)


def one_at_a_time(method: Callable[Concatenate[H, P], T]) -> Callable[Concatenate[H, P], T]:
    """A method that holds self.busy while it runs."""

    @wraps(method)
    def waits(self: H, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with self.busy:
            return method(self, *args, **kwargs)

    return waits
