"""The names under which captions are found: fields of metadata, columns of tables, files beside images, members of tars."""

import re
from collections.abc import Iterable, Sequence

CAPTION_FIELDS = (
    *("caption", "text", "prompt", "description", "title", "captions"),
    *("alt", "alttext", "txt", "texts", "prompts", "descriptions"),
    *("imagecaption", "imagedescription", "imagetext", "imageprompt", "captiontext", "textcaption"),
    *("longcaption", "detailedcaption", "shortcaption", "sentence", "sentences"),
)
"""In the order in which they are looked for; compared in small letters, without signs and spaces (`Alt_Text`: alttext)."""
WEB_FIELDS = ("caption", "text", "alt", "alttext", *CAPTION_FIELDS)
"""For tables of URLs: what a page says about its image stands before prompts and titles."""
HUB_FIELDS = ("caption", "text", "prompt", "captions", *CAPTION_FIELDS)
"""For datasets of the hub, in which `captions` is usual."""
_LIKELY = re.compile(
    r"capti|prompt|text|txt|descri|title|^alt(?!it)|tags?$|^tag|label|keyword|sentence|comment|summary|tooltip"
)
_UNLIKELY = re.compile(
    r"(path|file|filename|url|id|ids|hash|size|length|len|score|similarity|count|num|number|lang|language|font)$"
)

CAPTION_SUFFIXES = (
    *("txt", "caption", "text", "cap", "captions", "prompt"),
    *("caption.txt", "captions.txt", "cap.txt", "text.txt", "prompt.txt"),
    *("caption.json", "captions.json"),
)
"""Of files beside an image and members of a tar, in this order; each also with `.gz` behind it."""
LIKELY_SUFFIXES = (
    "tags",
    "tag",
    "wd14",
    "booru",
    "desc",
    "description",
    "title",
    "alt",
    "label",
    "labels",
    "cls",
    "blip",
    "md",
)
"""Suffixes that may mean captions, and are not taken unless the user names them."""

CAPTION_TREE = re.compile(
    r"(?i)(?:captions?|texts?|txts?|prompts?|descriptions?|(annotations?|annots?|labels?))(?:[_-].*|\d+)?"
)
"""Folders of captions beside a folder of images; those that may be anything else (labels) come last."""
IMAGE_TREE = re.compile(r"(?i)(?:images?|imgs?|photos?|pictures?|pics?|jpe?gs?|pngs?|webps?)(?:[_-].*|\d+)?")
NO_LETTERS = re.compile(r"[\W\d_]*(?:[eE][+-]?\d+[\W\d_]*)*")
"""What is no caption though it is text: the boxes of a detector."""
NOTHING = frozenset({"nan", "NaN", "NAN", "None", "null", "NULL", "<NA>", "NaT", "#N/A"})
"""What programs write where there is no text. A caption that is one of these words alone is empty."""


def plain_name(name: str) -> str:
    """A field's name as it is compared: small letters and digits only."""
    return re.sub(r"[\W_]+", "", name.lower())


def usual_fields(names: Iterable[str], order: Sequence[str] = CAPTION_FIELDS) -> list[str]:
    """Of these names those that usually hold captions, the likeliest first."""
    ranks = {name: rank for rank, name in reversed(list(enumerate(order)))}
    known = [name for name in names if plain_name(name) in ranks]
    return sorted(known, key=lambda name: ranks[plain_name(name)])


def likely_fields(names: Iterable[str]) -> list[str]:
    """Of these names those that may hold captions, usual or not."""
    usual = set(CAPTION_FIELDS)
    return [
        name
        for name in names
        if (plain := plain_name(name)) in usual or (_LIKELY.search(plain) and not _UNLIKELY.search(plain))
    ]
