"""Nothing but the public internet is ever asked, whatever a name or a redirect says."""

import socket
from typing import Any

import pytest

from extract.download.addresses import ForbiddenAddress, Guard, forbidden
from extract.download.downloader import Downloader, DownloadSettings
from extract.download.responses import DownloadProblem
from extract.reasons import REASONS
from tests.support.downloads import QUICK, fetch, loopback, reason
from tests.support.web import Web

PUBLIC = "93.184.215.14"


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.8.9.1", "0.0.0.0", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1"),
        *("169.254.169.254", "100.64.0.1", "100.100.100.200", "224.0.0.1", "239.255.255.255", "240.0.0.1"),
        *("255.255.255.255", "192.0.0.192", "192.0.2.1", "198.18.0.1", "198.51.100.1", "203.0.113.1", "168.63.129.16"),
        *(
            "::",
            "::1",
            "::ffff:127.0.0.1",
            "::ffff:8.8.8.8",
            "::7f00:1",
            "fe80::1",
            "fe80::1%eth0",
            "fc00::1",
            "fd00:ec2::254",
        ),
        *("ff02::1", "64:ff9b::7f00:1", "64:ff9b::808:808", "64:ff9b:1::1", "2002:7f00:1::", "2002:808:808::1"),
        *("2001::1", "2001:db8::1", "2001:2::1", "fec0::1", "100::1", "4000::1", "3fff::1"),
        *("2130706433", "0x7f000001", "0177.0.0.1", "127.1", "1", "127.0.0.1.", "[::1]", "", "nonsense"),
    ],
)
def test_addresses_that_are_not_public_are_forbidden(address: str) -> None:
    assert forbidden(address)


@pytest.mark.parametrize(
    "address", [PUBLIC, "8.8.8.8", "1.1.1.1", "172.32.0.1", "2606:4700::1111", "2001:4860:4860::8888"]
)
def test_public_addresses_are_allowed(address: str) -> None:
    assert forbidden(address) is None


@pytest.mark.parametrize(
    "url",
    [
        *("http://127.0.0.1/", "http://127.0.0.1:22/", "http://[::1]/", "http://[::ffff:127.0.0.1]/", "http://0/"),
        *("http://2130706433/", "http://0x7f000001/", "http://017700000001/", "http://0x7f.1/", "http://127.1/"),
        *("http://127.0.0.1./", "http://１２７.0.0.1/", "http://169.254.169.254/latest/", "http://10.1.2.3/"),
        *("http://[64:ff9b::7f00:1]/", "http://[2002:7f00:1::]/", "http://[fe80::1%25eth0]/", "http://localhost/"),
        *("http://localhost./", "http://LOCALHOST:8080/", "http://ⓛocalhost/"),
    ],
)
def test_no_socket_is_opened_for_a_forbidden_host(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    downloader = Downloader(DownloadSettings(**{**QUICK, "allow_hosts": ()}), loopback)
    opened = watch_sockets(downloader, monkeypatch)
    assert reason(fetch(downloader, url)) in ("forbidden_address", "bad_url")
    assert opened == []
    downloader.close()


def watch_sockets(downloader: Downloader, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The addresses of all sockets that the downloader asks for; none is opened."""
    opened: list[str] = []

    def open_nothing(info: tuple[Any, ...]) -> socket.socket:
        opened.append(info[4][0])
        raise OSError("no sockets in this test")

    monkeypatch.setattr(downloader._session.connector, "_socket_factory", open_nothing)
    return opened


@pytest.mark.parametrize(
    "answer", ["127.0.0.1", "10.0.0.7", "169.254.169.254", "::1", "::ffff:10.0.0.1", "64:ff9b::a00:1"]
)
def test_names_that_lead_to_forbidden_addresses_are_refused(answer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def lookup(host: str, port: int, *_: object) -> list[tuple[Any, ...]]:
        family = socket.AF_INET6 if ":" in answer else socket.AF_INET
        return [(family, socket.SOCK_STREAM, 6, "", (answer, port))]

    downloader = Downloader(DownloadSettings(**QUICK), lookup)
    opened = watch_sockets(downloader, monkeypatch)
    problem = fetch(downloader, "http://images.example/a.jpg")
    assert isinstance(problem, DownloadProblem) and problem.reason == "forbidden_address"
    assert answer in problem.message and opened == []
    downloader.close()


def test_of_several_addresses_only_public_ones_are_connected_to(monkeypatch: pytest.MonkeyPatch) -> None:
    def lookup(host: str, port: int, *_: object) -> list[tuple[Any, ...]]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (number, port)) for number in ("10.0.0.1", PUBLIC)]

    downloader = Downloader(DownloadSettings(**{**QUICK, "retries": 0}), lookup)
    opened = watch_sockets(downloader, monkeypatch)
    assert reason(fetch(downloader, "http://images.example/a.jpg")) == "connect_failed"
    assert opened == [PUBLIC]
    downloader.close()


def test_the_address_that_was_checked_is_the_one_connected_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name server that first gives a public address, and then, had we asked again to connect, our own."""
    answers = [PUBLIC, "127.0.0.1", "127.0.0.1"]
    asked = []

    def lookup(host: str, port: int, *_: object) -> list[tuple[Any, ...]]:
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (answers[len(asked) - 1], port))]

    downloader = Downloader(DownloadSettings(**{**QUICK, "retries": 0}), lookup)
    opened = watch_sockets(downloader, monkeypatch)
    assert reason(fetch(downloader, "http://rebinding.example/a.jpg")) == "connect_failed"
    assert opened == [PUBLIC] and asked == ["rebinding.example"]
    downloader.close()


@pytest.mark.parametrize(
    "host", ["stranger.test", "localhost", "2130706433", "0x7f.1", "127.1", "[::ffff:127.0.0.1]", "[::1]", "10.0.0.1"]
)
def test_a_redirect_is_checked_like_a_url(web: Web, monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    downloader = Downloader(DownloadSettings(**QUICK), loopback)
    monkeypatch.setitem(web.answers, "elsewhere", web._redirect(f"//{host}:{web.port}/ok/target.jpg"))
    assert reason(fetch(downloader, f"{web.address}/elsewhere/1.jpg")) == "forbidden_address"
    assert not any("target" in path for path in web.requests)
    downloader.close()


def test_the_last_look_before_a_socket_refuses_too() -> None:
    guard = Guard()
    for number in ("127.0.0.1", "10.0.0.1"):
        with pytest.raises(ForbiddenAddress):
            guard.open_socket((socket.AF_INET, socket.SOCK_STREAM, 6, "", (number, 80)))
    guard.open_socket((socket.AF_INET, socket.SOCK_STREAM, 6, "", (PUBLIC, 80))).close()
    Guard(["127.0.0.1"]).open_socket((socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 80))).close()


def test_an_allowed_name_does_not_open_its_address_to_others(web: Web) -> None:
    downloader = Downloader(DownloadSettings(**{**QUICK, "allow_hosts": ("intranet.test",)}), loopback)
    assert reason(fetch(downloader, f"http://intranet.test:{web.port}/ok/1.jpg")) == "ok"
    assert reason(fetch(downloader, f"http://stranger.test:{web.port}/ok/1.jpg")) == "forbidden_address"
    assert reason(fetch(downloader, f"http://127.0.0.1:{web.port}/ok/1.jpg")) == "forbidden_address"
    downloader.close()


@pytest.mark.parametrize(
    ("code", "expected"),
    [(socket.EAI_NONAME, "no_such_host"), (socket.EAI_AGAIN, "dns_failed"), (socket.EAI_FAIL, "dns_failed")],
)
def test_names_that_cannot_be_resolved_have_their_reason(code: int, expected: str) -> None:
    def lookup(*_: object) -> list[tuple[Any, ...]]:
        raise socket.gaierror(code, "injected")

    downloader = Downloader(DownloadSettings(**QUICK), lookup)
    assert reason(fetch(downloader, "http://nowhere.example/")) == expected
    assert REASONS["dns_failed"].passing and not REASONS["no_such_host"].passing
    downloader.close()


def test_a_port_where_nobody_listens_is_a_passing_problem(downloader: Downloader) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    assert reason(fetch(downloader, f"http://127.0.0.1:{port}/")) == "connect_failed"


def test_https_with_a_bad_partner_is_named(web: Web, downloader: Downloader) -> None:
    assert reason(fetch(downloader, f"https://127.0.0.1:{web.port}/ok/1.jpg")) == "tls_failed"
