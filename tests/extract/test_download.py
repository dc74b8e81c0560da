"""The downloader: bounds, retries, manners. Whom it asks: test_addresses.py."""

import asyncio
import time
from typing import Any

import pytest

from extract.download.downloader import Downloaded, Downloader, DownloadSettings
from extract.download.flow_control import RESERVED_BYTES
from extract.download.responses import DownloadProblem, parse_url
from extract.download.robots import opted_out
from shards.core.errors import UsageError
from tests.support.downloads import QUICK, fetch, loopback, reason
from tests.support.web import Web, photograph

# ---- answers ---------------------------------------------------------------------------------------------------------


def test_an_image_arrives_byte_for_byte_with_its_record(web: Web, downloader: Downloader) -> None:
    outcome = fetch(downloader, f"{web.address}/ok/3.jpg")
    assert isinstance(outcome, Downloaded)
    assert outcome.data == web.images[3]
    assert outcome.record == {"status": 200, "host": "127.0.0.1", "redirects": 0, "bytes": len(web.images[3])}


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("typed/1.jpg", "ok"),  # an image, whatever its content type says
        ("otherbot/1.jpg", "ok"),  # the directives are for another bot
        ("moved/1.jpg", "ok"),
        ("flaky/a1.jpg", "ok"),
        ("busy/a1.jpg", "ok"),
        ("404/1.jpg", "not_found"),
        ("410/1.jpg", "not_found"),
        ("403/1.jpg", "access_denied"),
        ("418/1.jpg", "http_error"),
        ("204/1.jpg", "http_error"),
        ("503/1.jpg", "server_error"),
        ("banned/1.jpg", "too_many_requests"),
        ("silent/1.jpg", "timeout"),
        ("dripping/1.jpg", "timeout"),
        ("headers/1.jpg", "connection_lost"),
        ("endless/1.jpg", "too_many_bytes"),
        ("huge/1.jpg", "too_many_bytes"),
        ("cut/1.jpg", "connection_lost"),
        ("html/1.jpg", "not_an_image"),
        ("svg/1.svg", "unsupported_format"),
        ("empty/1.jpg", "empty"),
        ("bomb/1.png", "content_encoded"),
        ("noai/1.jpg", "opted_out"),
        ("nonsense/1.jpg", "connection_lost"),
        ("hang-up/1.jpg", "connection_lost"),
        ("loop/1.jpg", "too_many_redirects"),
        ("private/1.jpg", "forbidden_address"),
        ("metadata/1.jpg", "forbidden_address"),
        ("mapped/1.jpg", "forbidden_address"),
        ("file/1.jpg", "bad_redirect"),
        ("nowhere/1.jpg", "bad_redirect"),
    ],
)
def test_every_answer_has_its_reason(web: Web, downloader: Downloader, path: str, expected: str) -> None:
    assert reason(fetch(downloader, f"{web.address}/{path}")) == expected


def test_of_a_body_longer_than_stated_nothing_but_the_stated_part_is_taken(web: Web, downloader: Downloader) -> None:
    outcome = fetch(downloader, f"{web.address}/short/1.jpg")
    if isinstance(outcome, Downloaded):
        assert outcome.data == web.images[1][:2000]
    else:  # the rest came along at once, and is not what may follow an answer
        assert outcome.reason == "connection_lost" and "\n" not in outcome.message


def test_passing_problems_are_tried_again_and_final_ones_are_not(web: Web, downloader: Downloader) -> None:
    for path, requests in (("503/tries.jpg", 2), ("404/tries.jpg", 1), ("html/tries.jpg", 1), ("noai/tries.jpg", 1)):
        fetch(downloader, f"{web.address}/{path}")
        assert web.requests[f"/{path}"] == requests


def test_a_long_retry_after_is_not_waited_for(web: Web, downloader: Downloader) -> None:
    began = time.monotonic()
    assert reason(fetch(downloader, f"{web.address}/banned/now.jpg")) == "too_many_requests"
    assert web.requests["/banned/now.jpg"] == 1
    assert time.monotonic() - began < 5


def test_requests_say_who_asks_and_decline_compression(web: Web, downloader: Downloader) -> None:
    fetch(downloader, f"{web.address}/ok/1.jpg")
    request = web.headers[-1].lower()
    assert "user-agent: ildm/" in request
    assert "accept-encoding: identity" in request
    assert "cookie" not in request and "referer" not in request


def test_an_endless_answer_is_left_within_its_byte_limit(web: Web, downloader: Downloader) -> None:
    problem = fetch(downloader, f"{web.address}/endless/limit.jpg")
    assert isinstance(problem, DownloadProblem) and "1048576" in problem.message
    assert downloader.turns.held == 0 and downloader.turns.active == 0


def test_connections_are_used_again(web: Web, downloader: Downloader) -> None:
    ports = set()
    answer = web.answers["ok"]

    async def noting(writer: Any, path: str) -> None:
        ports.add(writer.get_extra_info("peername"))
        await answer(writer, path)

    web.answers["ok"] = noting
    try:
        for _ in range(5):
            fetch(downloader, f"{web.address}/ok/1.jpg")
    finally:
        web.answers["ok"] = answer
    assert len(ports) == 1


# ---- many at a time --------------------------------------------------------------------------------------------------


def test_results_come_in_any_order_while_requests_per_host_stay_bounded(web: Web) -> None:
    downloader = Downloader(DownloadSettings(**QUICK, per_host=5))
    web.most_open = 0
    with downloader.batch() as batch:
        places = [batch.submit(f"{web.address}/late/{number}.jpg", "s") for number in range(40)]
        datas = [batch.result(place) for place in places]
    downloader.close()
    assert [outcome.data for outcome in datas if isinstance(outcome, Downloaded)] == [
        web.images[n % 8] for n in range(40)
    ]
    assert 2 <= web.most_open <= 8  # the head never waits, and the server counts an answer a little longer than we do


def test_bytes_in_memory_stay_bounded_while_nobody_takes_them(web: Web) -> None:
    size = len(web.images[0])
    downloader = Downloader(DownloadSettings(**QUICK, per_host=64, max_held_mb=1))
    with downloader.batch() as batch:
        places = [batch.submit(f"{web.address}/ok/{number}.jpg", "s") for number in range(200)]
        deadline = time.monotonic() + 1
        most = 0
        while time.monotonic() < deadline:
            most = max(most, downloader.turns.held)
            time.sleep(0.01)
        assert 0 < most <= 1 << 20
        # A consumer this slow must not make good downloads fail, though their time was long up.
        assert all(isinstance(batch.result(place), Downloaded) for place in places)
    assert downloader.turns.held == 0
    assert size < RESERVED_BYTES
    downloader.close()


def test_one_image_larger_than_all_the_memory_allowed_still_arrives(web: Web) -> None:
    image = photograph(1, (1600, 1200), quality=100)
    assert len(image) > 1 << 20
    with Web([image]).serving() as server:
        downloader = Downloader(DownloadSettings(**{**QUICK, "max_bytes": 8 << 20}, max_held_mb=1))
        with downloader.batch() as batch:
            places = [batch.submit(f"{server.address}/ok/{number}.jpg", "s") for number in range(6)]
            outcomes = [batch.result(place) for place in places]
        assert all(isinstance(outcome, Downloaded) and outcome.data == image for outcome in outcomes)
        assert downloader.turns.held == 0
        downloader.close()


def test_slow_hosts_do_not_hold_up_others(web: Web) -> None:
    downloader = Downloader(DownloadSettings(**{**QUICK, "retries": 0}, concurrency=16, per_host=4), loopback)
    with Web([photograph(0)]).serving() as other:
        hosts = f"http://127.0.0.1:{web.port}", f"http://fast.test:{other.port}"
        downloader.guard._allowed |= {"fast.test"}
        with downloader.batch() as batch:
            slow = [batch.submit(f"{hosts[0]}/silent/{number}.jpg", "s") for number in range(40)]
            began = time.monotonic()
            fast = [batch.submit(f"{hosts[1]}/ok/{number}.jpg", "s") for number in range(20)]
            assert all(isinstance(batch.result(place), Downloaded) for place in fast)
            assert time.monotonic() - began < 2  # the slow ones take 4 s
            del slow
    downloader.close()


def test_leaving_a_batch_early_ends_its_downloads(web: Web, downloader: Downloader) -> None:
    began = time.monotonic()
    with downloader.batch() as batch:
        for number in range(100):
            batch.submit(f"{web.address}/silent/early{number}.jpg", "s")
        time.sleep(0.05)
    assert time.monotonic() - began < 3  # all of them take 8 s
    assert downloader.turns.active == 0 and downloader.turns.held == 0 and not downloader.turns._starts


def test_pauses_between_attempts_grow_and_are_the_same_in_every_run(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[list[float]] = []
    sleep = asyncio.sleep

    async def noting(seconds: float) -> None:
        pauses[-1].append(seconds)
        await sleep(0)

    monkeypatch.setattr(asyncio, "sleep", noting)
    for _ in range(2):
        pauses.append([])
        downloader = Downloader(DownloadSettings(**{**QUICK, "backoff_s": 1.0, "retries": 3}))
        fetch(downloader, f"{web.address}/503/again.jpg")
        downloader.close()
    assert pauses[0] == pauses[1]
    assert all(0.5 * 2**n <= pause <= 1.5 * 2**n for n, pause in enumerate(pauses[0])) and len(pauses[0]) == 3


# ---- URLs and headers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        *("", "   ", "image.jpg", "//host/a.jpg", "ftp://host/a.jpg", "file:///etc/passwd", "data:image/png;base64,AA"),
        *(
            "gopher://host/",
            "http://",
            "http:///a.jpg",
            "http://user:secret@host/",
            "http://a b.example/",
            "http://host:99999/",
        ),
        *("http://[::1", "http://" + "a" * 9000, "javascript:alert(1)", "http://host\\@127.0.0.1/"),
    ],
)
def test_what_is_no_usable_url_is_refused(url: str) -> None:
    with pytest.raises(DownloadProblem) as caught:
        parse_url(url)
    assert caught.value.reason == "bad_url"
    assert "secret" not in caught.value.message


def test_urls_with_odd_characters_are_quoted_once() -> None:
    assert str(parse_url(" http://host/a b%20c?x=é#part ")) == "http://host/a%20b%20c?x=%C3%A9"


def test_a_line_break_in_a_url_cannot_add_a_header() -> None:
    assert "\r" not in str(parse_url("http://host/a\r\nX-Injected: 1")) and "\n" not in str(
        parse_url("http://host/a\nb")
    )


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        (["noai"], "noai"),
        (["all", "max-image-preview: large, NoImageAI"], "noimageai"),
        (["googlebot: noindex"], None),
        (["googlebot: nofollow, noai, ildm: noindex"], "noindex"),
        (["ILDM: noai"], "noai"),
        (["*: noai"], "noai"),
        (["unavailable_after: 25 Jun 2010 15:00:00 PST, noindex"], "noindex"),
        (["nofollow", "index"], None),
        ([], None),
    ],
)
def test_robots_headers_are_read_for_everybody_and_for_us(headers: list[str], expected: str | None) -> None:
    assert opted_out(headers, DownloadSettings().robots, "ildm") == expected


def test_robots_headers_can_be_ignored(web: Web) -> None:
    downloader = Downloader(DownloadSettings(**QUICK, robots=()))
    assert reason(fetch(downloader, f"{web.address}/noai/1.jpg")) == "ok"
    downloader.close()


@pytest.mark.parametrize(
    "setting", [{"concurrency": 0}, {"idle_timeout_s": 0}, {"retries": -1}, {"user_agent": "a\nb"}]
)
def test_settings_that_cannot_work_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(setting))):
        DownloadSettings(**setting)
