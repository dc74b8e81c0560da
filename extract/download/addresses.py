"""Which network addresses may be connected to: public ones, and hosts that the user named.

A table of URLs is written by strangers, and what they name is requested from inside the user's network. So the address
that is checked is the one that is connected to: names are resolved once, by Guard.resolve, which leaves out what is
forbidden; redirects go the same way; and Guard.open_socket looks again at what the socket is about to connect to.
"""

import asyncio
import errno
import ipaddress
import re
import socket
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from aiohttp.abc import AbstractResolver, ResolveResult

Lookup = Callable[..., list[tuple[Any, ...]]]
"""socket.getaddrinfo, or what tests put in its place."""

# From IANA's registries of special-purpose addresses; what is listed first counts.
_IPV4: tuple[tuple[ipaddress.IPv4Network, str], ...] = tuple(
    (ipaddress.IPv4Network(network), kind)
    for network, kind in (
        ("0.0.0.0/8", "an unspecified"),
        ("10.0.0.0/8", "a private"),
        ("100.64.0.0/10", "a shared (carrier-grade NAT)"),
        ("127.0.0.0/8", "a loopback"),
        ("168.63.129.16/32", "a cloud provider's own"),  # public by its number, but answers only inside Azure
        ("169.254.0.0/16", "a link-local"),
        ("172.16.0.0/12", "a private"),
        ("192.0.0.0/24", "a reserved"),
        ("192.0.2.0/24", "a documentation"),
        ("192.88.99.0/24", "a 6to4 relay"),
        ("192.168.0.0/16", "a private"),
        ("198.18.0.0/15", "a benchmarking"),
        ("198.51.100.0/24", "a documentation"),
        ("203.0.113.0/24", "a documentation"),
        ("224.0.0.0/4", "a multicast"),
        ("240.0.0.0/4", "a reserved"),
    )
)
_IPV6: tuple[tuple[ipaddress.IPv6Network, str], ...] = tuple(
    (ipaddress.IPv6Network(network), kind)
    for network, kind in (
        ("::/128", "an unspecified"),
        ("::1/128", "a loopback"),
        ("::ffff:0:0/96", "an IPv4-mapped"),
        ("64:ff9b::/96", "a NAT64"),
        ("64:ff9b:1::/48", "a NAT64"),
        ("fc00::/7", "a private"),
        ("fe80::/10", "a link-local"),
        ("ff00::/8", "a multicast"),
        ("2001::/32", "a Teredo"),
        ("2001::/23", "a reserved"),
        ("2001:db8::/32", "a documentation"),
        ("2002::/16", "a 6to4"),
        ("3fff::/20", "a documentation"),
    )
)
_IPV6_PUBLIC = ipaddress.IPv6Network("2000::/3")  # all that was ever assigned
_NUMERIC = re.compile(r"(?:\d+|0[xX][0-9a-fA-F]*)\.?")
"""A last label of this form makes a host an IPv4 address to some resolver: 2130706433, 0x7f.1, 127.1, 0177.0.0.1."""


class ForbiddenAddress(OSError):
    """A host that is not to be connected to; the message is a sentence."""

    def __init__(self, message: str) -> None:
        super().__init__(errno.EACCES, message)
        self.message = message


def forbidden(address: str) -> str | None:
    """What kind of address this is, as in "a loopback address", if it is not a public one; None if it is.

    address: an IPv4 or IPv6 address in its plain form; a zone (`%eth0`) is allowed. Anything else is forbidden.
    """
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return "not an address in its usual form"
    kind: str | None
    if isinstance(parsed, ipaddress.IPv4Address):
        kind = next((kind for network, kind in _IPV4 if parsed in network), None)
    else:
        parsed = ipaddress.IPv6Address(int(parsed))  # without its zone
        kind = next((kind for network, kind in _IPV6 if parsed in network), None)
        if kind is None and parsed not in _IPV6_PUBLIC:
            kind = "a reserved"
    return kind and f"{kind} address"


class Guard(AbstractResolver):
    """Resolves names for aiohttp and keeps forbidden addresses away from its sockets.

    allow_hosts: hosts, as they stand in URLs (names or addresses, without port), that may be connected to wherever they
        are: a server of one's own network, or of a test.
    lookup: like socket.getaddrinfo, which blocks; it runs in `threads` threads.
    """

    def __init__(self, allow_hosts: Iterable[str] = (), lookup: Lookup | None = None, threads: int = 32) -> None:
        self._allowed = frozenset(host.strip("[]").lower().rstrip(".") for host in allow_hosts)
        self._vouched = {host for host in self._allowed if not _is_name(host)}
        self._lookup = lookup or socket.getaddrinfo
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="dns")

    def allows(self, host: str) -> bool:
        """Whether the user named this host."""
        return host.lower().rstrip(".") in self._allowed

    def check_host(self, host: str) -> None:
        """Raises ForbiddenAddress if a URL's host is an address that is forbidden, however it is written."""
        if self.allows(host) or _is_name(host):
            return
        kind = forbidden(host)
        if kind:
            raise ForbiddenAddress(f"{host} is {kind}")

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """The permitted addresses of a name. Raises ForbiddenAddress if it has none but others, socket.gaierror for none."""
        loop = asyncio.get_running_loop()
        try:
            found = await loop.run_in_executor(
                self._threads, lambda: self._lookup(host, port, family, socket.SOCK_STREAM, 0, socket.AI_ADDRCONFIG)
            )
        except UnicodeError as error:  # a label that is too long
            raise socket.gaierror(socket.EAI_NONAME, f"{host} is not a legal name: {error}") from error
        results: list[ResolveResult] = []
        refused = ""
        for kind, _, proto, _, address in found:
            number = str(address[0])
            if self.allows(host):
                self._vouched.add(number)
            elif problem := forbidden(number):
                refused = f"{host} leads to {number}, {problem}"
                continue
            results.append(
                ResolveResult(
                    hostname=host,
                    host=number,
                    port=port,
                    family=kind,
                    proto=proto,
                    flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
                )
            )
        if refused and not results:
            raise ForbiddenAddress(refused)
        return results

    def open_socket(self, info: tuple[Any, ...]) -> socket.socket:
        """A socket for one address of getaddrinfo's form; the last look before it is connected."""
        family, kind, proto, _, address = info
        problem = forbidden(address[0])
        if problem and address[0] not in self._vouched:
            raise ForbiddenAddress(f"{address[0]} is {problem}")
        return socket.socket(family, kind, proto)

    async def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


def _is_name(host: str) -> bool:
    """Whether a host is a name to be resolved, rather than an address in whatever form."""
    return ":" not in host and not _NUMERIC.fullmatch(host.rstrip(".").rsplit(".", 1)[-1])
