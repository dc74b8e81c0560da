"""What the answers of servers mean, and what their errors are called: the pure parts of a download."""

import contextlib
import socket
import time
from collections.abc import Iterator, Mapping
from email.utils import parsedate_to_datetime

import aiohttp
import yarl

from extract.download.addresses import ForbiddenAddress
from extract.download.urls import wire_url
from extract.images.sniff import guess_other, sniff
from extract.reasons import REASONS

REDIRECTS = frozenset({301, 302, 303, 307, 308})
_MAX_URL_LENGTH = 8192
_STATUS_REASONS = {
    401: "access_denied",
    402: "access_denied",
    403: "access_denied",
    404: "not_found",
    408: "timeout",
    410: "not_found",
    425: "too_many_requests",
    429: "too_many_requests",
    451: "access_denied",
}


class DownloadProblem(Exception):
    """Why there is no image: a slug of extract.reasons.REASONS, and a sentence. retry_after_s: what the server asked for."""

    def __init__(self, reason: str, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(f"{reason}: {message}")
        assert reason in REASONS, reason
        self.reason = reason
        self.message = message
        self.retry_after_s = retry_after_s


@contextlib.contextmanager
def errors_named(url: yarl.URL) -> Iterator[None]:
    """Turns whatever goes wrong on the way into a DownloadProblem."""
    try:
        yield
    except TimeoutError as error:
        raise DownloadProblem("timeout", f"{url.host} took too long ({error or 'in all'})") from error
    except aiohttp.InvalidURL as error:
        raise DownloadProblem("bad_url", f"{str(url)[:200]!r} cannot be requested: {error}") from error
    except aiohttp.ClientSSLError as error:
        raise DownloadProblem("tls_failed", f"no secure connection to {url.host}: {error}") from error
    except aiohttp.ClientConnectorError as error:
        raise _connect_problem(url, error.os_error) from error
    except (aiohttp.ClientError, OSError) as error:
        words = " ".join(str(error).split())[:200] or type(error).__name__
        raise DownloadProblem("connection_lost", f"the answer of {url.host} broke off: {words}") from error


def _connect_problem(url: yarl.URL, error: OSError) -> DownloadProblem:
    if isinstance(error, ForbiddenAddress):
        return DownloadProblem("forbidden_address", error.message)
    if isinstance(error, socket.gaierror):
        if error.errno in (socket.EAI_NONAME, socket.EAI_NODATA):
            return DownloadProblem("no_such_host", f"there is no host {url.host}")
        return DownloadProblem("dns_failed", f"{url.host} could not be looked up: {error.strerror}")
    return DownloadProblem("connect_failed", f"cannot connect to {url.host}: {error.strerror or error}")


def parse_url(text: str, base: yarl.URL | None = None, reason: str = "bad_url") -> yarl.URL:
    """A URL that may be requested: http or https, with a host and without a password. Raises DownloadProblem.

    base: what a relative URL is relative to. reason: that of the problem.
    """
    shown = text[:200]
    if len(text) > _MAX_URL_LENGTH:
        raise DownloadProblem(reason, f"a URL of {len(text)} characters: {shown}...")
    try:
        url = wire_url(text, base)
        host = url.raw_host
    except ValueError as error:
        raise DownloadProblem(reason, f"{shown!r} is not a URL: {error}") from error
    if url.scheme not in ("http", "https"):
        raise DownloadProblem(reason, f"{shown!r} is not http or https")
    if not host or any(letter in host for letter in " %\\/@\t\r\n"):
        raise DownloadProblem(reason, f"{shown!r} has no usable host")
    if url.user is not None or url.password is not None:
        raise DownloadProblem(reason, f"a URL with a user's name or password in it, to {url.host}")
    return url


def redirect_target(url: yarl.URL, headers: Mapping[str, str]) -> yarl.URL:
    """Where an answer of REDIRECTS leads. Raises DownloadProblem."""
    location = headers.get("Location")
    if not location:
        raise DownloadProblem("bad_redirect", f"{url.host} redirects without saying where to")
    return parse_url(location, url, "bad_redirect")


def status_problem(status: int, headers: Mapping[str, str]) -> DownloadProblem:
    """What an answer is called that is neither 200 nor a redirect."""
    reason = "server_error" if status >= 500 else _STATUS_REASONS.get(status, "http_error")
    return DownloadProblem(reason, f"the server answers {status}", _retry_after_s(headers.get("Retry-After")))


def _retry_after_s(value: str | None) -> float | None:
    """Seconds that a Retry-After header asks to wait for; None if it is absent or unreadable."""
    if not value:
        return None
    if value.strip().isdecimal():
        return float(value.strip()[:9])
    try:
        when = parsedate_to_datetime(value)
        return max(0.0, when.timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


def check_content(data: bytes) -> None:
    """Raises DownloadProblem if what begins like this is not an image that can be read."""
    if not data:
        raise DownloadProblem("empty", "the answer has no bytes")
    kind = sniff(data)
    if kind is None:
        raise DownloadProblem("not_an_image", f"the answer is {guess_other(data)}")
    if not kind.plugin:
        raise DownloadProblem("unsupported_format", f"the answer is a {kind.name}, which is not read")
