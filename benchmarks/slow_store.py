"""A read-only S3 server on loopback over a folder, with a delay before every answer: so light that it is not what is measured.

It knows what readers ask: objects, ranges of them, their heads, and the list of a bucket.
"""

import multiprocessing
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

BUCKET = "bucket"


class _Store(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections stay, as those of a real store do
    disable_nagle_algorithm = True
    folder: Path
    delay_s: float

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        time.sleep(self.delay_s)
        address = urlsplit(self.path)
        name = unquote(address.path).removeprefix(f"/{BUCKET}").strip("/")
        path = self.folder / name
        if not name and "list-type" in parse_qs(address.query):
            self._send(200, {"Content-Type": "application/xml"}, self._listing(parse_qs(address.query)), with_body)
        elif not name or not path.is_file():
            self._send(404, {}, b"<Error><Code>NoSuchKey</Code></Error>", with_body)
        else:
            self._send_object(path, with_body)

    def _send_object(self, path: Path, with_body: bool) -> None:
        size = path.stat().st_size
        headers = {"ETag": '"0"', "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT", "Accept-Ranges": "bytes"}
        start, end, status = 0, size, 200
        if asked := self.headers.get("Range"):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, end, status = int(first), min(int(last or size - 1) + 1, size), 206
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        with path.open("rb") as file:
            data = os.pread(file.fileno(), end - start, start) if with_body else bytes(0)
        self._send(status, headers | {"Content-Length": str(end - start)}, data, with_body)

    def _send(self, status: int, headers: dict[str, str], data: bytes, with_body: bool) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(data)

    def _listing(self, query: dict[str, list[str]]) -> bytes:
        prefix = query.get("prefix", [""])[0]
        names = sorted(path.name for path in self.folder.iterdir() if path.is_file() and path.name.startswith(prefix))
        items = "".join(
            f"<Contents><Key>{escape(name)}</Key><Size>{(self.folder / name).stat().st_size}</Size><ETag>0</ETag>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified><StorageClass>STANDARD</StorageClass></Contents>"
            for name in names
        )
        return (
            f'<?xml version="1.0"?><ListBucketResult><Name>{BUCKET}</Name><IsTruncated>false</IsTruncated>'
            f"<KeyCount>{len(names)}</KeyCount>{items}</ListBucketResult>"
        ).encode()


def _serve(port: Any, folder: Path, delay_s: float) -> None:
    _Store.folder, _Store.delay_s = folder, delay_s
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Store)
    port.send(server.server_port)
    server.serve_forever()


@contextmanager
def slow_store(folder: Path, delay_s: float) -> Iterator[str]:
    """Serves a folder from a process of its own as s3://bucket; yields the endpoint for plain HTTP clients."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(there, folder, delay_s), daemon=True)
    process.start()
    endpoint = f"http://127.0.0.1:{here.recv()}"
    os.environ |= {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ["AWS_ENDPOINT_URL"] = endpoint
    try:
        yield endpoint
    finally:
        process.terminate()
        process.join()
