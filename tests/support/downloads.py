"""One download at a time, with short waits, for the tests."""

import socket
from typing import Any

from extract.download.downloader import Downloader, Outcome
from extract.download.responses import DownloadProblem

QUICK: dict[str, Any] = {
    "allow_hosts": ("127.0.0.1",),
    "connect_timeout_s": 0.5,
    "idle_timeout_s": 0.4,
    "total_timeout_s": 0.8,
    "backoff_s": 0.01,
    "retries": 1,
    "max_bytes": 1 << 20,
}


def fetch(downloader: Downloader, url: str) -> Outcome:
    with downloader.batch() as batch:
        return batch.result(batch.submit(url, "seed"))


def reason(outcome: Outcome) -> str:
    return outcome.reason if isinstance(outcome, DownloadProblem) else "ok"


def loopback(host: str, port: int, *_: object) -> list[tuple[Any, ...]]:
    """A name service by which every name leads here."""
    return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]
