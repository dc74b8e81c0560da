"""What goes on the wire for a URL: its text as it stands, wherever it is legal.

Signatures and many servers' keys depend on the exact bytes: `%2F` is no slash, `%2e%2e` no step up, `+` no space, and an
empty query is not none. So nothing is decoded, encoded twice, sorted or normalised. What is not legal is made so as
browsers do it: spaces, non-ASCII (as UTF-8), `"<>` and in paths also `^` `` ` `` `{}` become percent codes, a backslash in
a path becomes a slash, tabs and line breaks are left out, and so is the fragment.
"""

import re

import yarl

_SCHEME = re.compile(r"[a-zA-Z][a-zA-Z0-9+.\-]*:")
_ABSOLUTE = re.compile(r"([a-zA-Z][a-zA-Z0-9+.\-]*)://([^/?#]*)([^#]*)", re.DOTALL)
_ILLEGAL_IN_PATH = re.compile(rb'[\x00-\x20"<>^`{}\x7f-\xff]')
_ILLEGAL_IN_QUERY = re.compile(rb'[\x00-\x20"<>\x7f-\xff]')
_LEFT_OUT = str.maketrans("", "", "\t\r\n")
_AROUND = "".join(map(chr, range(0x21)))


def wire_url(text: str, base: yarl.URL | None = None) -> yarl.URL:
    """The URL of a text; relative ones by `base`. Raises ValueError.

    Its path holds the whole target of the request, the query included, as it is to be sent.
    """
    text = text.strip(_AROUND).translate(_LEFT_OUT)
    if base is not None:
        text = _joined(base, text)
    match = _ABSOLUTE.match(text)
    if not match:
        raise ValueError("it has no scheme and host")
    scheme, authority, rest = match.groups()
    host = yarl.URL(f"{scheme}://{authority}/")
    if not host.raw_host or "\\" in authority:
        raise ValueError("it has no usable host")
    return yarl.URL.build(scheme=host.scheme, authority=host.raw_authority, path=_target(rest), encoded=True)


def _target(rest: str) -> str:
    """Path and query as they are sent, of what follows the host in a URL's text."""
    path, question, query = rest.partition("?")
    path = _legal(path.replace("\\", "/"), _ILLEGAL_IN_PATH) or "/"
    return path + question + _legal(query, _ILLEGAL_IN_QUERY)


def _legal(text: str, illegal: re.Pattern[bytes]) -> str:
    if text.isascii() and not illegal.search(text.encode()):
        return text
    data = text.encode("utf-8", "surrogateescape")  # a header may have bytes that are no UTF-8: they stay what they are
    return illegal.sub(lambda match: b"%%%02X" % match[0][0], data).decode("ascii")


def _joined(base: yarl.URL, text: str) -> str:
    """An absolute URL's text, of a reference as RFC 3986 has them; only relative paths lose their dots."""
    text = text.partition("#")[0]
    origin = f"{base.scheme}://{base.raw_authority}"
    path, _, query = base.raw_path.partition("?")
    if _SCHEME.match(text):
        return text
    if text[:2] in ("//", "\\\\"):
        return f"{base.scheme}://{text[2:]}"
    if text[:1] in ("/", "\\"):
        return origin + text
    if not text:
        return f"{origin}{path}?{query}" if query else origin + path
    if text[:1] == "?":
        return origin + path + text
    relative, question, query = text.partition("?")
    return origin + _without_dots(path.rpartition("/")[0] + "/" + relative) + question + query


def _without_dots(path: str) -> str:
    kept: list[str] = []
    segments = path.split("/")[1:]
    for number, segment in enumerate(segments):
        if segment == "..":
            del kept[-1:]
        elif segment != ".":
            kept.append(segment)
        if segment in (".", "..") and number == len(segments) - 1:
            kept.append("")
    return "/" + "/".join(kept)
