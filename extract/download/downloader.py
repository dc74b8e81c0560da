"""Downloads images from the public internet, many at a time: bounded, polite, and believing nothing.

    with downloader.batch() as batch:
        places = [batch.submit(url, seed=key) for ...]
        for place in places:
            batch.result(place)     # Downloaded, or a DownloadProblem; in any order, best in that of submission

The requests run in an event loop in a thread of the Downloader; the caller's thread only waits. What is bounded:
requests at once, requests per host, redirects, seconds (to connect, without data, in all), attempts, bytes of one
answer (while they arrive, whatever its Content-Length says), and bytes in memory of all answers that were not yet
taken. Compressed answers are declined, and refused if they come. What is no image by its first bytes is given up at
once. What an answer means is in answers.py, who may be asked in addresses.py, who has to wait in turns.py.
"""

import asyncio
import concurrent.futures
import random
import threading
import weakref
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import aiohttp
import yarl

from extract.download.addresses import ForbiddenAddress, Guard, Lookup
from extract.download.flow_control import Line, Ticket, Turns
from extract.download.responses import (
    REDIRECTS,
    DownloadProblem,
    check_content,
    errors_named,
    parse_url,
    redirect_target,
    status_problem,
)
from extract.download.robots import opted_out
from extract.reasons import REASONS
from shards.core.errors import UsageError

_SNIFF_BYTES = 4096
_GROWTH_BYTES = 256 << 10


@dataclass(frozen=True)
class DownloadSettings:
    """How a worker downloads. Every worker process has these bounds for itself.

    concurrency, per_host: requests at once, in all and to one host.
    connect_timeout_s: to look up the name, connect and agree on a cipher; idle_timeout_s: without a byte;
        total_timeout_s: for one attempt with all its redirects, time waited for a turn not counted.
    retries: further attempts after a passing problem, but only one after a timeout: it is slow already. Before the
        n-th: 2^(n-1) times backoff_s, times a random number between 0.5 and 1.5; or what the server's Retry-After
        says, unless that is more than max_retry_after_s.
    max_bytes: of one image. max_held_mb: of all images that were begun and not yet taken, in 2^20 bytes.
    robots: directives of X-Robots-Tag that are obeyed (none: the header is ignored); robots_agent: the name by which
        servers may address us in it.
    allow_hosts: hosts that may be requested although they are not on the public internet.
    """

    concurrency: int = 128
    per_host: int = 8
    connect_timeout_s: float = 6.0
    idle_timeout_s: float = 8.0
    total_timeout_s: float = 30.0
    retries: int = 2
    backoff_s: float = 0.5
    max_retry_after_s: float = 15.0
    max_redirects: int = 5
    max_bytes: int = 32 << 20
    max_held_mb: int = 256
    user_agent: str = "ildm/0.1 (image-text dataset tool; obeys X-Robots-Tag)"
    robots: tuple[str, ...] = ("noai", "noimageai", "noindex", "noimageindex", "none")
    robots_agent: str = "ildm"
    verify_tls: bool = True
    allow_hosts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("concurrency", "per_host", "max_bytes", "max_held_mb"):
            if getattr(self, name) < 1:
                raise UsageError(f"download.{name} = {getattr(self, name)} must be at least 1")
        for name in ("connect_timeout_s", "idle_timeout_s", "total_timeout_s"):
            if not getattr(self, name) > 0:
                raise UsageError(f"download.{name} = {getattr(self, name)} must be above 0")
        for name in ("retries", "backoff_s", "max_retry_after_s", "max_redirects"):
            if getattr(self, name) < 0:
                raise UsageError(f"download.{name} = {getattr(self, name)} must not be negative")
        if not self.user_agent.isascii() or not self.user_agent.isprintable() or not self.user_agent:
            raise UsageError("download.user_agent must be printable ASCII text, such as 'my-lab (mail@example.org)'")


@dataclass(frozen=True)
class Downloaded:
    """An image file as it came. record: status, host (after redirects), redirects, bytes; JSON values."""

    data: bytes
    record: dict[str, Any]


Outcome = Downloaded | DownloadProblem


class Downloader:
    """A thread with an event loop and a pool of connections, shared by any number of batches; safe for several threads.

    lookup: in place of socket.getaddrinfo, for tests.
    """

    def __init__(self, settings: DownloadSettings, lookup: Lookup | None = None) -> None:
        self.settings = settings
        self.guard = Guard(settings.allow_hosts, lookup)
        self.turns = Turns(settings.concurrency, settings.per_host, settings.max_held_mb << 20)
        self._next_place = 0
        self._lock = threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="download", daemon=True)
        self._thread.start()
        self._session = self.run(self._open_session())
        self._finalizer = weakref.finalize(self, _shut, self._loop, self._thread, self._session)

    async def _open_session(self) -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(
            resolver=self.guard,
            socket_factory=self.guard.open_socket,
            limit=0,  # Turns bounds the connections
            ttl_dns_cache=300,
            ssl=self.settings.verify_tls,
        )
        return aiohttp.ClientSession(
            connector=connector,
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={
                "User-Agent": self.settings.user_agent,
                "Accept": "image/*, */*;q=0.1",
                "Accept-Encoding": "identity",
            },
            timeout=aiohttp.ClientTimeout(
                total=None, connect=self.settings.connect_timeout_s, sock_read=self.settings.idle_timeout_s
            ),
            read_bufsize=_GROWTH_BYTES,
            trust_env=False,
        )

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Runs a coroutine in the event loop and waits for its result."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def place(self) -> int:
        """A number above all that were given out before."""
        with self._lock:
            self._next_place += 1
            return self._next_place

    def call(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Has a function called in the event loop, soon."""
        self._loop.call_soon_threadsafe(function, *arguments)

    def batch(self) -> "Batch":
        return Batch(self)

    def close(self) -> None:
        """Closes all connections and ends the thread; happens by itself in the end. Batches must be closed before."""
        self._finalizer()

    # ---- one download ------------------------------------------------------------------------------------------------

    async def fetch(self, url: str, seed: str, ticket: Ticket) -> Outcome:
        """All attempts at one URL. `seed` makes the pauses between them the same in every run."""
        generator = random.Random(seed)
        attempt = 0
        while True:
            try:
                downloaded = await self._attempt(url, ticket)
                self.turns.settle(ticket, len(downloaded.data))
                return downloaded
            except DownloadProblem as problem:
                self.turns.settle(ticket, 0)
                pause_s = self.settings.backoff_s * 2**attempt * generator.uniform(0.5, 1.5)
                if problem.retry_after_s is not None:
                    pause_s = max(pause_s, problem.retry_after_s)
                attempt += 1
                retries = min(1, self.settings.retries) if problem.reason == "timeout" else self.settings.retries
                out_of_bounds = (problem.retry_after_s or 0) > self.settings.max_retry_after_s
                if not REASONS[problem.reason].passing or attempt > retries or out_of_bounds:
                    return problem
            except BaseException:
                self.turns.settle(ticket, 0)
                raise
            await asyncio.sleep(pause_s)

    async def _attempt(self, text: str, ticket: Ticket) -> Downloaded:
        """One attempt: the request, and those that its redirects lead to. Raises DownloadProblem."""
        url = parse_url(text)
        left_s = self.settings.total_timeout_s
        loop = asyncio.get_running_loop()
        for redirects in range(self.settings.max_redirects + 1):
            host = url.raw_host or ""
            try:
                self.guard.check_host(host)
            except ForbiddenAddress as error:
                raise DownloadProblem("forbidden_address", error.message) from error
            await self.turns.start(ticket, host)
            try:
                began = loop.time()
                with errors_named(url):
                    async with asyncio.timeout(left_s) as clock:
                        answer = await self._request(url, ticket, clock, redirects)
                left_s = max(0.001, left_s - (loop.time() - began))
            finally:
                self.turns.stop(host)
            if isinstance(answer, Downloaded):
                return answer
            url = answer
        raise DownloadProblem("too_many_redirects", f"more than {self.settings.max_redirects} redirects, then to {url}")

    async def _request(
        self, url: yarl.URL, ticket: Ticket, clock: asyncio.Timeout, redirects: int
    ) -> Downloaded | yarl.URL:
        """One request: the image, or where its redirect leads."""
        async with self._session.get(url, allow_redirects=False) as response:
            directive = opted_out(
                response.headers.getall("X-Robots-Tag", []), self.settings.robots, self.settings.robots_agent
            )
            if directive:
                raise DownloadProblem("opted_out", f"{url.host} answers X-Robots-Tag: {directive}")
            if response.status in REDIRECTS:
                return redirect_target(url, response.headers)
            if response.status != 200:
                raise status_problem(response.status, response.headers)
            encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
            if encoding not in ("", "identity"):
                raise DownloadProblem("content_encoded", f"the answer is encoded as {encoding[:40]!r}")
            data = await self._body(response, ticket, clock)
        record = {"status": response.status, "host": url.host, "redirects": redirects, "bytes": len(data)}
        return Downloaded(data, record)

    async def _body(self, response: aiohttp.ClientResponse, ticket: Ticket, clock: asyncio.Timeout) -> bytes:
        """The answer's body, bounded and an image by its first bytes."""
        stated = response.content_length
        if stated is not None and stated > self.settings.max_bytes:
            raise DownloadProblem("too_many_bytes", f"it has {stated} bytes; {self.settings.max_bytes} are allowed")
        await self._room(ticket, stated or 0, clock)
        chunks: list[bytes] = []
        size, sniffed = 0, False
        async for chunk in response.content.iter_any():
            chunks.append(chunk)
            size += len(chunk)
            if size > self.settings.max_bytes:
                raise DownloadProblem("too_many_bytes", f"it has more than {self.settings.max_bytes} bytes")
            if not sniffed and size >= _SNIFF_BYTES:
                check_content(b"".join(chunks))
                sniffed = True
            if size > ticket.held:
                await self._room(ticket, size + _GROWTH_BYTES, clock)
        data = b"".join(chunks)
        if not sniffed:
            check_content(data)
        return data

    async def _room(self, ticket: Ticket, size: int, clock: asyncio.Timeout) -> None:
        """Waits for memory, while the attempt's clock stands still: a slow consumer must not look like a slow server."""
        if self.turns.has_room(ticket, size):
            return
        loop = asyncio.get_running_loop()
        when, began = clock.when(), loop.time()
        clock.reschedule(None)
        await self.turns.room(ticket, size)
        clock.reschedule(None if when is None else when + loop.time() - began)


def _shut(loop: asyncio.AbstractEventLoop, thread: threading.Thread, session: aiohttp.ClientSession) -> None:
    asyncio.run_coroutine_threadsafe(session.close(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@dataclass
class Batch:
    """Downloads that are consumed together. Leaving it ends those that were not taken."""

    _downloader: Downloader
    _line: Line = field(default_factory=Line)
    _waiting: dict[int, concurrent.futures.Future[Outcome]] = field(default_factory=dict)
    _tickets: dict[int, Ticket] = field(default_factory=dict)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def submit(self, url: str, seed: str) -> int:
        """Begins a download; returns its place, which result() takes."""
        place = self._downloader.place()
        self._waiting[place] = concurrent.futures.Future()
        self._tickets[place] = Ticket(self._line, place)
        self._downloader.call(self._begin, place, url, seed)
        return place

    def _begin(self, place: int, url: str, seed: str) -> None:
        if place in self._waiting:  # not closed in between
            task = asyncio.get_running_loop().create_task(self._fetch(place, url, seed))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _fetch(self, place: int, url: str, seed: str) -> None:
        future = self._waiting[place]
        try:
            future.set_result(await self._downloader.fetch(url, seed, self._tickets[place]))
        except asyncio.CancelledError:
            future.cancel()
            raise
        except Exception as error:  # handed to whoever waits, who raises it
            future.set_exception(error)

    def result(self, place: int) -> Outcome:
        """Waits for a download; its bytes are the caller's from now on."""
        future = self._waiting[place]
        if not future.done():
            self._downloader.call(self._downloader.turns.lead, self._line, place)
        outcome = future.result()
        del self._waiting[place]
        self._downloader.call(self._downloader.turns.settle, self._tickets.pop(place), 0)
        return outcome

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends all downloads that were not taken, and gives back their memory."""
        self._downloader.run(self._end())

    async def _end(self) -> None:
        self._waiting.clear()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for ticket in self._tickets.values():
            self._downloader.turns.settle(ticket, 0)
        self._tickets.clear()
