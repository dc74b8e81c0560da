"""Which download may go on: bounds on requests at once, on requests per host, and on bytes in memory.

Downloads of one batch are consumed in order, so the one that the consumer waits for (the head of its batch) is never
made to wait here, whatever the bounds say: it alone can set the others free. At most one download of each batch exceeds
the bounds in this way. Everything here runs in one event loop.
"""

import asyncio
import bisect
from collections import Counter
from dataclasses import dataclass, field

RESERVED_BYTES = 128 << 10
"""What a request is counted with before anything is known about its answer."""


@dataclass
class Line:
    """The downloads of one batch in the order of their consumption; `head` is the one that is waited for now."""

    head: int = -1


@dataclass(eq=False)
class Ticket:
    """One download: its line, its place among all downloads of all lines, and the bytes that are counted for it."""

    line: Line
    place: int
    held: int = 0

    @property
    def is_head(self) -> bool:
        return self.place <= self.line.head


@dataclass(eq=False)
class _Waiter:
    ticket: Ticket
    granted: asyncio.Future[None]
    host: str | None = None  # None: it waits for bytes only
    size: int = 0


@dataclass
class Turns:
    """The bounds, and who waits for what.

    concurrency, per_host: requests at once. max_held: bytes of all downloads that were begun and not yet consumed.
    """

    concurrency: int
    per_host: int
    max_held: int
    active: int = 0
    held: int = 0
    hosts: Counter[str] = field(default_factory=Counter)
    _starts: list[_Waiter] = field(default_factory=list)
    _growths: list[_Waiter] = field(default_factory=list)
    _farthest_head: int = -1

    async def start(self, ticket: Ticket, host: str) -> None:
        """Waits until a request to `host` may begin. Each call needs one of stop()."""
        waiter = self._waiter(ticket, host, max(0, RESERVED_BYTES - ticket.held))
        if self._try(waiter):
            return
        bisect.insort(self._starts, waiter, key=lambda other: other.ticket.place)
        await self._wait(waiter, self._starts)

    def stop(self, host: str) -> None:
        """The request is over; its bytes stay counted."""
        self.active -= 1
        self.hosts[host] -= 1
        if not self.hosts[host]:
            del self.hosts[host]
        self.wake()

    def has_room(self, ticket: Ticket, size: int) -> bool:
        """Whether the download may hold `size` bytes in all, at once; then they are counted."""
        return self._try(self._waiter(ticket, None, max(0, size - ticket.held)))

    async def room(self, ticket: Ticket, size: int) -> None:
        """Waits until the download may hold `size` bytes in all."""
        if not self.has_room(ticket, size):
            waiter = self._waiter(ticket, None, size - ticket.held)
            self._growths.append(waiter)
            await self._wait(waiter, self._growths)

    def settle(self, ticket: Ticket, size: int) -> None:
        """The download holds exactly `size` bytes and will not grow; 0 when it was consumed or has failed."""
        self.held += size - ticket.held
        ticket.held = size
        self.wake()

    def lead(self, line: Line, head: int) -> None:
        """The consumer of `line` now waits for the download at place `head`."""
        line.head = head
        self._farthest_head = max(self._farthest_head, head)
        self.wake()

    def wake(self) -> None:
        """Lets go on whoever may."""
        self._growths = [waiter for waiter in self._growths if not self._try(waiter)]
        position = 0
        while position < len(self._starts):
            waiter = self._starts[position]
            if self._try(waiter):
                self._starts.pop(position)
            elif self._is_full() and waiter.ticket.place > self._farthest_head:
                break  # nobody further down can be a head
            else:
                position += 1

    def _try(self, waiter: _Waiter) -> bool:
        if self._may(waiter):
            self._grant(waiter)
            return True
        return False

    def _is_full(self) -> bool:
        return self.active >= self.concurrency or self.held + RESERVED_BYTES > self.max_held

    def _waiter(self, ticket: Ticket, host: str | None, size: int) -> _Waiter:
        return _Waiter(ticket, asyncio.get_running_loop().create_future(), host, size)

    def _may(self, waiter: _Waiter) -> bool:
        if waiter.ticket.is_head:
            return True
        if waiter.host is not None and (self.active >= self.concurrency or self.hosts[waiter.host] >= self.per_host):
            return False
        return self.held + waiter.size <= self.max_held

    def _grant(self, waiter: _Waiter) -> None:
        self.held += waiter.size
        waiter.ticket.held += waiter.size
        if waiter.host is not None:
            self.active += 1
            self.hosts[waiter.host] += 1
        if not waiter.granted.done():
            waiter.granted.set_result(None)

    async def _wait(self, waiter: _Waiter, waiters: list[_Waiter]) -> None:
        try:
            await waiter.granted
        except asyncio.CancelledError:
            if waiter in waiters:
                waiters.remove(waiter)
            elif waiter.host is not None:  # granted in the same moment
                self.stop(waiter.host)
            raise
