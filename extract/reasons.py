"""The table of reasons why an input gives no sample: each is a slug, the stage it belongs to, and what it means.

The slugs stand in the shards' failure files and statistics, the explanations in docs/sources.md (a test compares them).
"""

from typing import NamedTuple


class Reason(NamedTuple):
    """stage: read | decode | estimate | encode. explanation: one sentence for a person."""

    stage: str
    explanation: str


REASONS: dict[str, Reason] = {
    # reading the source
    "missing_file": Reason(
        "read", "the table of captions names a file that is not there, or it went away during the run"
    ),
    "broken_link": Reason("read", "a symbolic link that leads to nothing, or in a circle"),
    "not_a_file": Reason("read", "a folder, pipe, socket or device with the name of an image"),
    "unreadable": Reason("read", "the operating system or the object store refused to read the file"),
    "too_many_bytes": Reason("read", "the file is larger than max_bytes"),
    "bad_row": Reason("read", "a row of the table that cannot be read, or that names no file"),
    "duplicate_row": Reason(
        "read", "a second row of the table for a file that an earlier row captions; the first one counts"
    ),
    "caption_unreadable": Reason("read", "the caption file is not an ordinary file, or it cannot be read"),
    "caption_not_utf8": Reason("read", "the caption is not UTF-8 text, or has NUL characters in it"),
    "caption_too_long": Reason("read", "the caption has more bytes than max_caption_bytes"),
    "bad_metadata": Reason("read", "the .json beside the image is not a JSON object, or its caption is not text"),
    "no_image": Reason("read", "a sample of a tar or dataset that has no image"),
    "bad_tar": Reason("read", "the tar is damaged or ends too early; its whole samples before the damage were used"),
    "duplicate_member": Reason("read", "a sample of a tar has two members of one name"),
    "missing_in_tar": Reason("read", "img2dataset's table lists the sample as a success, but it is not in the tar"),
    "failed_upstream": Reason("read", "img2dataset could not get the image; its own words are in the message"),
    # decoding the image
    "empty": Reason("decode", "the file has no bytes"),
    "not_an_image": Reason("decode", "the content is not an image, whatever the file is called"),
    "unsupported_format": Reason("decode", "an image or document of a format or pixel type that is not read"),
    "animated": Reason("decode", "an animated GIF, PNG, WebP or AVIF"),
    "truncated": Reason("decode", "the file ends before its image does"),
    "corrupt": Reason("decode", "the file has the right beginning, but cannot be decoded"),
    "too_many_pixels": Reason("decode", "more pixels than max_pixels, or a side longer than max_side_px"),
    "too_small": Reason("decode", "a side shorter than min_side_px"),
    "too_elongated": Reason("decode", "the longer side is more than max_aspect times the shorter one"),
    "too_many_scans": Reason("decode", "a progressive JPEG of so many scans that decoding it would take minutes"),
    "out_of_memory": Reason("decode", "there was not enough memory to decode the image"),
}
