"""Fixtures that several files share."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from extract.download.downloader import Downloader, DownloadSettings
from tests.support.downloads import QUICK
from tests.support.url_tables import Sources
from tests.support.web import Web, photograph


@pytest.fixture(scope="module")
def web() -> Iterator[Web]:
    """A web server on loopback with eight photographs."""
    with Web([photograph(number) for number in range(8)]).serving() as server:
        yield server


@pytest.fixture
def make() -> Iterator[Sources]:
    """Makes sources of URL tables; closes their connections in the end."""
    with Sources() as sources:
        yield sources


@pytest.fixture(scope="module")
def downloader() -> Iterator[Downloader]:
    made = Downloader(DownloadSettings(**QUICK))
    yield made
    made.close()


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A temporary folder whose path is short enough for Ray's sockets."""
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        yield Path(folder)
