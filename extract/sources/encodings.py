"""In which encoding a text table is: UTF-8, what the user names, or Western European text that shows itself to be cp1252.

Text that is not UTF-8 is never guessed at byte by byte: either the whole table has the marks of cp1252 (single accented
letters inside words of plain ones), and the run says so before it begins, or the user is asked to name the encoding.
"""

import codecs
import re

from shards.core.errors import UsageError

HEAD_BYTES = 1 << 20
"""How much of a table its encoding is known by."""
_RUN = re.compile(rb"[\x80-\xff]+")
_WESTERN = frozenset(
    "ÀÁÂÃÄÅÆÇÈÉÊËÌÍÎÏÑÒÓÔÕÖØÙÚÛÜÝßàáâãäåæçèéêëìíîïñòóôõöøùúûüýŒœŠšŽž"
    "€‚ƒ„…†‡ˆ‰‹›‘’“”•–—˜™\u00a0¡¢£¥§¨©ª«¬\u00ad®¯°±²³´µ¶·¸¹º»¼½¾¿×÷"
)


def table_encoding(head: bytes, named: str | None, where: str) -> str:
    """The encoding of a table that begins with `head`. Raises UsageError if the user must name it, or named none that fits."""
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or (not named and b"\0" in head[:64]):
        raise UsageError(f"{where} is UTF-16 or UTF-32; save it as UTF-8, as tables are read line by line")
    if named:
        return checked_encoding(named)
    if head.startswith(codecs.BOM_UTF8):
        return "utf-8"
    cut = head if len(head) < HEAD_BYTES else head[: head.rfind(b"\n") + 1] or head[:-4]
    good, bad = _counts(cut)
    if not bad or good > bad:
        return "utf-8"
    if _is_western(cut):
        return "cp1252"
    raise UsageError(
        f"{where} is not UTF-8, and its encoding cannot be told for sure; name it with source.encoding, such as 'cp1252', "
        "'cp1251', 'gb18030', 'big5' or 'shift_jis' ('utf-8' lets the rows fail that are not), or save the table as UTF-8"
    )


def checked_encoding(name: str) -> str:
    """The encoding itself, if Python knows it and lines can be told in its bytes. Raises UsageError."""
    try:
        codecs.lookup(name)
        plain = "a,b\n".encode(name) == b"a,b\n"
    except (LookupError, UnicodeError) as error:
        raise UsageError(
            f"source.encoding = {name!r} is no text encoding; give one such as 'utf-8' or 'cp1252'"
        ) from error
    if not plain:
        raise UsageError(f"source.encoding = {name!r}: such files cannot be read line by line; save them as UTF-8")
    return name


def _counts(data: bytes) -> tuple[int, int]:
    """How many characters beyond ASCII are right UTF-8, and how many bytes are not."""
    text = data.decode("utf-8", "surrogateescape")
    beyond = [char for char in text if char > "\x7f"] if not text.isascii() else []
    bad = sum("\udc80" <= char <= "\udcff" for char in beyond)
    return len(beyond) - bad, bad


def _is_western(data: bytes) -> bool:
    """Whether bytes are cp1252 by their looks: its own characters only, few next to each other, letters inside plain words."""
    try:
        text = data.decode("cp1252")
    except UnicodeDecodeError:
        return False
    beyond = [char for char in text if char > "\x7f"]
    runs = [len(run[0]) for run in _RUN.finditer(data)]
    in_long_runs = sum(length for length in runs if length > 2)
    signs_in_words = len(re.findall(r"[a-z][¡-¬®-¿×÷‚„†‡ˆ‰‹›˜](?=[a-z])|[a-z][À-ÖØ-ÝŒŠŽ](?![A-Z])", text))
    return set(beyond) <= _WESTERN and in_long_runs <= len(beyond) // 10 and signs_in_words <= len(beyond) // 20
