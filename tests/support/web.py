"""A web server on loopback with the manners of the real web: good images, and every way to be none.

What a request gets is decided by the first part of its path: see Web.answers. The rest of the path is free.
"""

import asyncio
import contextlib
import gzip
import io
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence

import numpy as np
from PIL import Image

Answer = Callable[[asyncio.StreamWriter, str], Awaitable[None]]
PRIVATE = ("http://10.0.0.1/a.jpg", "http://169.254.169.254/latest/meta-data/", "http://[::ffff:10.0.0.1]/a.jpg")


def photograph(number: int, size: tuple[int, int] = (320, 240), quality: int = 90) -> bytes:
    """A JPEG file of smooth colours and some noise, different for each number."""
    generator = np.random.default_rng(number)
    coarse = generator.integers(0, 255, (6, 8, 3), dtype=np.uint8)
    pixels = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)).astype(np.int16)
    noisy = np.clip(pixels + generator.integers(-12, 13, pixels.shape, dtype=np.int16), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(noisy).save(file, "JPEG", quality=quality)
    return file.getvalue()


def head(status: str, *headers: str, length: int | None = None) -> bytes:
    lines = [f"HTTP/1.1 {status}", *headers]
    if length is not None:
        lines.append(f"Content-Length: {length}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


class Web:
    """The server; `requests` counts what was asked for, by path.

    images: JPEG files; /ok/12.jpg is the twelfth of them, counted round. distinct: with a comment that makes each path's
        file another one.
    """

    def __init__(self, images: Sequence[bytes], distinct: bool = False) -> None:
        self.images = images
        self.distinct = distinct
        self.requests: Counter[str] = Counter()
        self.headers: list[str] = []
        self.open = self.most_open = 0
        self.port = 0
        self.answers: dict[str, Answer] = {
            "ok": self._image,
            "late": self._late,
            "typed": self._typed_wrongly,
            "flaky": self._flaky,
            "busy": self._busy,
            "404": self._status("404 Not Found"),
            "410": self._status("410 Gone"),
            "403": self._status("403 Forbidden"),
            "418": self._status("418 I'm a teapot"),
            "204": self._status("204 No Content"),
            "503": self._status("503 Service Unavailable"),
            "banned": self._status("429 Too Many Requests", "Retry-After: 86400"),
            "silent": self._silent,
            "endless": self._endless,
            "dripping": self._dripping,
            "headers": self._endless_headers,
            "huge": self._stated(1 << 40),
            "cut": self._cut_off,
            "short": self._stated(2000),
            "truncated": self._half,
            "html": self._fixed(b"<!DOCTYPE html><html><body>no image here</body></html>", "Content-Type: image/jpeg"),
            "svg": self._fixed(b"<svg xmlns='http://www.w3.org/2000/svg'></svg>", "Content-Type: image/svg+xml"),
            "broken": self._fixed(b"\xff\xd8\xff\xe0" + b"\x00garbage" * 800, "Content-Type: image/jpeg"),
            "empty": self._fixed(b""),
            "bomb": self._fixed(gzip.compress(bytes(30 << 20)), "Content-Encoding: gzip", "Content-Type: image/png"),
            "same": self._fixed(self.images[0]),
            "noai": self._fixed(self.images[0], "X-Robots-Tag: noai, noimageai"),
            "otherbot": self._fixed(self.images[0], "X-Robots-Tag: otherbot: noindex, noai"),
            "nonsense": self._nonsense,
            "hang-up": self._hang_up,
            "loop": self._redirect(None),
            "moved": self._redirect("/ok/0.jpg"),
            "private": self._redirect(PRIVATE[0]),
            "metadata": self._redirect(PRIVATE[1]),
            "mapped": self._redirect(PRIVATE[2]),
            "file": self._redirect("file:///etc/passwd"),
            "nowhere": self._status("302 Found"),
        }

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @contextlib.contextmanager
    def serving(self) -> Iterator["Web"]:
        """Serves in a thread."""
        loops: list[asyncio.AbstractEventLoop] = []
        started, ended = threading.Event(), asyncio.Event()

        async def serve() -> None:
            loops.append(asyncio.get_running_loop())
            server = await asyncio.start_server(self._connection, "127.0.0.1", 0, backlog=1024)
            self.port = server.sockets[0].getsockname()[1]
            started.set()
            await ended.wait()

        thread = threading.Thread(target=asyncio.run, args=(serve(),), daemon=True)
        thread.start()
        started.wait()
        try:
            yield self
        finally:
            loops[0].call_soon_threadsafe(ended.set)
            thread.join()

    async def serve_forever(self, hosts: Sequence[str], port: int, ready: Callable[[int], None]) -> None:
        """Serves in this process until it is interrupted; `ready` is called with the port once it listens."""
        server = await asyncio.start_server(self._connection, list(hosts), port, backlog=1024)
        self.port = server.sockets[0].getsockname()[1]
        ready(self.port)
        await server.serve_forever()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while begin := await reader.read(1):
                if begin == b"\x16":  # of a TLS handshake: answered as web servers do whose port speaks plain HTTP
                    writer.write(head("400 Bad Request", length=0))
                    await writer.drain()
                    break
                request = begin + await reader.readuntil(b"\r\n\r\n")
                path = request.split(b" ", 2)[1].decode()
                self.requests[path] += 1
                self.headers.append(request.decode("latin-1"))
                del self.headers[:-10]
                self.open += 1
                self.most_open = max(self.most_open, self.open)
                try:
                    await self.answers.get(path.split("/")[1], self._status("404 Not Found"))(writer, path)
                    await writer.drain()
                finally:
                    self.open -= 1
                if writer.is_closing():
                    break
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            pass
        finally:
            writer.close()

    # ---- answers -----------------------------------------------------------------------------------------------------

    def picture(self, path: str) -> bytes:
        """The image that a path of the form /ok/12.jpg stands for."""
        digits = "".join(letter for letter in path.rsplit("/", 1)[-1] if letter.isdigit())
        image = self.images[int(digits or 0) % len(self.images)]
        if not self.distinct:
            return image
        comment = path.encode()
        return image[:2] + b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment + image[2:]

    async def _image(self, writer: asyncio.StreamWriter, path: str) -> None:
        data = self.picture(path)
        writer.write(head("200 OK", "Content-Type: image/jpeg", length=len(data)) + data)

    async def _late(self, writer: asyncio.StreamWriter, path: str) -> None:
        await asyncio.sleep(0.05)
        await self._image(writer, path)

    async def _typed_wrongly(self, writer: asyncio.StreamWriter, path: str) -> None:
        data = self.picture(path)
        writer.write(head("200 OK", "Content-Type: text/html", length=len(data)) + data)

    async def _flaky(self, writer: asyncio.StreamWriter, path: str) -> None:
        if self.requests[path] == 1:
            writer.write(head("503 Service Unavailable", length=0))
        else:
            await self._image(writer, path)

    async def _busy(self, writer: asyncio.StreamWriter, path: str) -> None:
        if self.requests[path] == 1:
            writer.write(head("429 Too Many Requests", "Retry-After: 0", length=0))
        else:
            await self._image(writer, path)

    async def _silent(self, writer: asyncio.StreamWriter, path: str) -> None:
        await asyncio.sleep(3600)

    async def _endless(self, writer: asyncio.StreamWriter, path: str) -> None:
        writer.write(head("200 OK", "Connection: close") + b"\xff\xd8\xff\xe0")
        while not writer.is_closing():
            writer.write(bytes(65536))
            await writer.drain()
            await asyncio.sleep(0)

    async def _dripping(self, writer: asyncio.StreamWriter, path: str) -> None:
        writer.write(head("200 OK", "Connection: close") + b"\xff\xd8\xff\xe0")
        while not writer.is_closing():
            writer.write(b"\0")
            await writer.drain()
            await asyncio.sleep(0.05)

    async def _endless_headers(self, writer: asyncio.StreamWriter, path: str) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n")
        while not writer.is_closing():
            writer.write(b"X-More: and more\r\n" * 1000)
            await writer.drain()
            await asyncio.sleep(0)

    def _stated(self, length: int) -> Answer:
        async def answer(writer: asyncio.StreamWriter, path: str) -> None:
            writer.write(head("200 OK", "Content-Type: image/jpeg", length=length) + self.picture(path))
            await writer.drain()
            writer.close()

        return answer

    async def _cut_off(self, writer: asyncio.StreamWriter, path: str) -> None:
        data = self.picture(path)
        writer.write(head("200 OK", length=len(data)) + data[: len(data) // 2])
        await writer.drain()
        writer.close()

    async def _half(self, writer: asyncio.StreamWriter, path: str) -> None:
        data = self.picture(path)[: len(self.picture(path)) // 2]
        writer.write(head("200 OK", length=len(data)) + data)

    def _fixed(self, data: bytes, *headers: str) -> Answer:
        async def answer(writer: asyncio.StreamWriter, path: str) -> None:
            writer.write(head("200 OK", *headers, length=len(data)) + data)

        return answer

    def _status(self, status: str, *headers: str) -> Answer:
        async def answer(writer: asyncio.StreamWriter, path: str) -> None:
            writer.write(head(status, *headers, length=None if status.startswith("204") else 0))

        return answer

    def _redirect(self, target: str | None) -> Answer:
        async def answer(writer: asyncio.StreamWriter, path: str) -> None:
            writer.write(head("302 Found", f"Location: {target or path}", length=0))

        return answer

    async def _nonsense(self, writer: asyncio.StreamWriter, path: str) -> None:
        writer.write(b"SSH-2.0-OpenSSH_9.6\r\n")
        await writer.drain()
        writer.close()

    async def _hang_up(self, writer: asyncio.StreamWriter, path: str) -> None:
        writer.close()
