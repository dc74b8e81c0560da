"""X-Robots-Tag: what a server asks of those who fetch its images."""

import re
from collections.abc import Collection, Iterable

# Directives that carry a value after a colon; before any other colon stands the name of the agent that is addressed.
_WITH_VALUE = ("unavailable_after", "max-snippet", "max-image-preview", "max-video-preview")
_AGENT = re.compile(r"\s*([^\s,:;]+)\s*:\s*(.*)", re.DOTALL)


def opted_out(headers: Iterable[str], directives: Collection[str], agent: str) -> str | None:
    """The first of `directives` that the headers' values hold for everybody or for `agent`; None if there is none.

    `X-Robots-Tag: noai, noindex` is for everybody; `X-Robots-Tag: somebot: noai, noindex` for somebot, up to the next name.
    """
    wanted = {directive.lower() for directive in directives}
    for header in headers:
        addressed = True
        for part in header.split(","):
            match = _AGENT.match(part)
            if match and match[1].lower() not in _WITH_VALUE:
                addressed = match[1].lower() in ("*", agent.lower())
                part = match[2]
            directive = part.strip().lower()
            if addressed and directive in wanted:
                return directive
    return None
