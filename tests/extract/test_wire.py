"""What a server gets as the target of a request is the text of the URL; illegal text becomes legal as browsers do it."""

import socket
import threading
from collections.abc import Iterator

import pytest

from extract.download.downloader import Downloaded, Downloader, DownloadSettings
from extract.download.urls import wire_url
from tests.support.downloads import QUICK, fetch
from tests.support.web import photograph

LEGAL = (
    "/a%2Fb.jpg",
    "/a%2fb.jpg",
    "/%2e%2e/a.jpg",
    "/a/../b.jpg",
    "/a/./b.jpg",
    "/a//b.jpg",
    "//a.jpg",
    "/a.jpg?",
    "/a.jpg??",
    "/a.jpg?x=1&&y=",
    "/a.jpg?x=a+b%20c",
    "/a.jpg?signature=AbC%2Bd%2F%3D%3d&Expires=1",
    "/a.jpg?q=%7Btilde%7E~",
    "/%41%7e.jpg",
    "/a;v=1,2.jpg",
    "/a:b@c!$&'()*+,;=.jpg",
    "/a.jpg?a=/?:@!$'()*,;",
    "/%E4%B8%AD.jpg",
    "/%e4%b8%ad.jpg",
    "/%ff%00.jpg",
    "/a%20b.jpg",
    "/a.jpg?x=%26%23",
    "/a.jpg?b=2&a=1",
    "/a|b.jpg",
    "/a[1].jpg",
    "/100%.jpg",
    "/-_.~",
)
MENDED = {
    "/a b.jpg": "/a%20b.jpg",
    "/a.jpg?x=a b": "/a.jpg?x=a%20b",
    "/中.jpg?é": "/%E4%B8%AD.jpg?%C3%A9",
    '/"<a>".jpg': "/%22%3Ca%3E%22.jpg",
    "/{a}^`.jpg?{a}^`": "/%7Ba%7D%5E%60.jpg?{a}^`",
    "/a\\b.jpg?a\\b": "/a/b.jpg?a\\b",
    "/a%2F b.jpg": "/a%2F%20b.jpg",
    "/a.jpg#part": "/a.jpg",
    "/a\tb\n.jpg": "/ab.jpg",
    "": "/",
    "?x=1": "/?x=1",
}


class _Log:
    """A server of one connection after another; keeps each request line as it came."""

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self.location: bytes | None = None
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        image = photograph(1)
        while True:
            try:
                connection = self.socket.accept()[0]
            except OSError:
                return
            with connection:
                request = b""
                while b"\r\n\r\n" not in request:
                    request += connection.recv(65536)
                self.lines.append(request.split(b"\r\n")[0])
                if self.location is not None:
                    answer, self.location = b"HTTP/1.1 302 Found\r\nLocation: " + self.location, None
                    connection.sendall(answer + b"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                else:
                    head = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(image)
                    connection.sendall(head + image)


@pytest.fixture(scope="module")
def log() -> Iterator[_Log]:
    server = _Log()
    yield server
    server.socket.close()


@pytest.fixture(scope="module")
def downloader() -> Iterator[Downloader]:
    downloader = Downloader(DownloadSettings(**QUICK | {"connect_timeout_s": 5.0, "total_timeout_s": 9.0}))
    yield downloader
    downloader.close()


@pytest.mark.parametrize(("text", "wanted"), [*((text, text) for text in LEGAL), *MENDED.items()])
def test_the_request_line_has_the_text_of_the_url(log: _Log, downloader: Downloader, text: str, wanted: str) -> None:
    log.lines.clear()
    assert isinstance(fetch(downloader, f"http://127.0.0.1:{log.port}{text}"), Downloaded)
    assert log.lines == [f"GET {wanted} HTTP/1.1".encode()]


@pytest.mark.parametrize(
    ("location", "wanted"),
    [
        ("{origin}/a%2Fb.jpg?s=%2B+%3d&", "/a%2Fb.jpg?s=%2B+%3d&"),
        ("{origin}/a/../%2e%2e/b.jpg?", "/a/../%2e%2e/b.jpg?"),
        ("/a%2Fb//c.jpg?", "/a%2Fb//c.jpg?"),
        ("//127.0.0.1:{port}/a%2Fb.jpg", "/a%2Fb.jpg"),
        ("?x=%2F", "/first/old%2F.jpg?x=%2F"),
        ("new%2F.jpg", "/first/new%2F.jpg"),
        ("../new.jpg?../x", "/new.jpg?../x"),
        ("./", "/first/"),
        ("/a b.jpg", "/a%20b.jpg"),
    ],
)
def test_where_redirects_lead_stays_as_the_server_said_it(
    log: _Log, downloader: Downloader, location: str, wanted: str
) -> None:
    log.lines.clear()
    log.location = location.format(origin=f"http://127.0.0.1:{log.port}", port=log.port).encode()
    assert isinstance(fetch(downloader, f"http://127.0.0.1:{log.port}/first/old%2F.jpg?q=%2F"), Downloaded)
    assert log.lines == [b"GET /first/old%2F.jpg?q=%2F HTTP/1.1", f"GET {wanted} HTTP/1.1".encode()]


def test_bytes_of_a_redirect_that_are_no_utf8_stay_what_they_are(log: _Log, downloader: Downloader) -> None:
    log.lines.clear()
    log.location = b"/caf\xe9.jpg"
    assert isinstance(fetch(downloader, f"http://127.0.0.1:{log.port}/a.jpg"), Downloaded)
    assert log.lines[1] == b"GET /caf%E9.jpg HTTP/1.1"


def test_hosts_are_written_as_names_are_looked_up() -> None:
    assert wire_url("HTTP://Bücher.Example:80/A").raw_host == "xn--bcher-kva.example"
    assert str(wire_url("http://[2001:db8::1]:8080/a%2F?")) == "http://[2001:db8::1]:8080/a%2F?"
