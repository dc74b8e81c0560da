"""An S3-compatible server on loopback, which can be told to throttle and to fail."""

import random
import threading
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import fsspec
import s3fs
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_MAX_ATTEMPTS": "8",
}


class Trouble:
    """A share of requests is answered 503 SlowDown or 500 before it reaches the store."""

    def __init__(self) -> None:
        self.share, self.injected, self.random = 0.0, 0, random.Random(0)

    def wrap(self, app: Callable) -> Callable:
        def troubled(environ: dict[str, Any], start_response: Callable) -> Iterable[bytes]:
            if self.random.random() >= self.share:
                return app(environ, start_response)
            self.injected += 1
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            status, code = self.random.choice((("503 Slow Down", "SlowDown"), ("500 Error", "InternalError")))
            start_response(status, [("Content-Type", "application/xml")])
            return [f"<Error><Code>{code}</Code><Message>injected</Message></Error>".encode()]

        return troubled


class _Silent(WSGIRequestHandler):
    def log_request(self, *_: object) -> None:
        pass


@contextmanager
def object_store() -> Iterator[tuple[dict[str, str], Trouble]]:
    """The environment variables that lead s3fs to a fresh store with the bucket "bucket", and its trouble-maker."""
    trouble = Trouble()
    app = trouble.wrap(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=_Silent)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        urllib.request.urlopen(f"{endpoint}/moto-api/reset", data=b"").close()  # the store outlives its server
        s3fs.S3FileSystem.clear_instance_cache()
        fsspec.filesystem("s3", key="test", secret="test", endpoint_url=endpoint).mkdir("bucket")
        s3fs.S3FileSystem.clear_instance_cache()
        yield CREDENTIALS | {"AWS_ENDPOINT_URL": endpoint}, trouble
    finally:
        server.shutdown()
        s3fs.S3FileSystem.clear_instance_cache()
