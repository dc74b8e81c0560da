"""Range reads of S3 objects over plain HTTP connections that stay open, by addresses that the store's own client signed.

The client of fsspec takes 6 to 8 ms of CPU for a request, most of it in layers that range reads do not need; this takes one.
Whatever goes wrong here is nobody's concern: the caller then asks the client, which knows how to retry and what to say.
"""

import http.client
import threading
import time
from urllib.parse import SplitResult, urlsplit

from fsspec import AbstractFileSystem
from fsspec.utils import get_protocol

VALID_S = 3600
_RENEW_S = VALID_S / 2
_TIMEOUT_S = 20
_KEPT = 256  # signed addresses
_GIVE_UP = 3  # failures before the first success: this store does not work like this


class SignedReads:
    """Reads of one file system; threads may share it, each has a connection of its own."""

    def __init__(self, fs: AbstractFileSystem) -> None:
        self._fs = fs
        self._addresses: dict[str, tuple[float, SplitResult]] = {}
        self._mine = threading.local()
        self._works, self._failures = False, 0

    @staticmethod
    def serve(url: str) -> bool:
        """Whether addresses of this kind can be signed."""
        return get_protocol(url) in ("s3", "s3a")

    def read(self, path: str, start: int, end: int) -> bytes | None:
        """The bytes start..end of an object; None if that did not work, for whatever reason."""
        if not self._works and self._failures >= _GIVE_UP:
            return None
        try:
            address = self._address(path)
            connection = self._connection(address)
            target = f"{address.path}?{address.query}"
            connection.request("GET", target, headers={"Range": f"bytes={start}-{end - 1}"})
            response = connection.getresponse()
            data = response.read()
        except Exception:  # signing may raise anything; see above
            self._mine.connection = None
            self._failures += 1
            return None
        if response.status == http.client.PARTIAL_CONTENT and len(data) == end - start:
            self._works = True
            return data
        self._failures += 1
        return None

    def _address(self, path: str) -> SplitResult:
        known, now = self._addresses.get(path), time.monotonic()
        if known is None or now - known[0] > _RENEW_S:
            if len(self._addresses) >= _KEPT:
                self._addresses.clear()
            known = self._addresses[path] = now, urlsplit(self._fs.sign(path, expiration=VALID_S))
        return known[1]

    def _connection(self, address: SplitResult) -> http.client.HTTPConnection:
        found: http.client.HTTPConnection | None = getattr(self._mine, "connection", None)
        if found is None or self._mine.host != address.netloc:
            kind = http.client.HTTPSConnection if address.scheme == "https" else http.client.HTTPConnection
            found = self._mine.connection = kind(address.netloc, timeout=_TIMEOUT_S)
            self._mine.host = address.netloc
        return found
