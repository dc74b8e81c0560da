"""The table of reasons why an input gives no sample: each is a slug, the stage it belongs to, and what it means.

The slugs stand in the shards' failure files and statistics, the explanations in docs/failures.md. Whoever changes the
table writes that page anew:

    python -m extract.reasons > docs/failures.md
"""

from typing import NamedTuple


class Reason(NamedTuple):
    """stage: read | decode | estimate | encode. explanation: one sentence for a person.

    passing: another attempt, later, may well succeed (a server that was busy); False is final (it is not an image).
    """

    stage: str
    explanation: str
    passing: bool = False


REASONS: dict[str, Reason] = {
    # reading the source
    "missing_file": Reason(
        "read", "the table of captions names a file that is not there, or it went away during the run"
    ),
    "broken_link": Reason("read", "a link, of a folder or in a tar, that leads to nothing, or in a circle"),
    "not_a_file": Reason("read", "a folder, pipe, socket or device with the name of an image"),
    "unreadable": Reason("read", "the operating system or the object store refused to read the file", passing=True),
    "too_many_bytes": Reason("read", "the file is larger than max_bytes"),
    "bad_row": Reason(
        "read", "a row of the table that cannot be read, names no file, or has metadata beyond the limits"
    ),
    "duplicate_row": Reason(
        "read", "a second row of the table for a file that an earlier row captions; the first one counts"
    ),
    "caption_unreadable": Reason("read", "the caption file is not an ordinary file, or it cannot be read"),
    "caption_not_utf8": Reason(
        "read", "the caption is not UTF-8 text (nor what source.encoding says), or has NUL characters in it"
    ),
    "caption_too_long": Reason("read", "the caption has more bytes than max_caption_bytes"),
    "bad_metadata": Reason(
        "read",
        "the sample's .json is no JSON object or beyond the limits of metadata, or its caption is not text, or several of "
        "which none is named",
    ),
    "no_image": Reason("read", "a sample of a tar or dataset that has no image"),
    "forgotten": Reason("read", "removed on request, by `python -m shards forget`; it never comes back"),
    "several_images": Reason(
        "read", "a sample of a tar with several images; source.image_member says which one is meant"
    ),
    "outside": Reason("read", "a dataset that refers to an image outside its own folder, or a link out of its tar"),
    "bad_tar": Reason("read", "the tar is damaged or ends too early; its whole samples before the damage were used"),
    "duplicate_member": Reason("read", "a sample of a tar has two members of one name"),
    "missing_in_tar": Reason("read", "img2dataset's table lists the sample as a success, but it is not in the tar"),
    "failed_upstream": Reason("read", "img2dataset could not get the image; its own words are in the message"),
    # choosing rows of a table of URLs
    "filtered_aesthetic": Reason("read", "its aesthetic score is below the filter's"),
    "filtered_size": Reason("read", "its width or height, as the table states them, are outside the filter's bounds"),
    "filtered_aspect": Reason("read", "it is more elongated, by the table's width and height, than the filter allows"),
    "filtered_caption_length": Reason("read", "its caption has fewer or more characters than the filter allows"),
    "filtered_caption_script": Reason(
        "read", "too few letters of its caption are of the scripts that the filter wants"
    ),
    "filtered_unsafe": Reason("read", "it is more probably unsafe than the filter allows"),
    "filtered_watermark": Reason("read", "it more probably has a watermark than the filter allows"),
    "filtered_similarity": Reason("read", "image and caption fit each other less than the filter demands"),
    "filtered_repeated_url": Reason("read", "an earlier row has the same URL"),
    "filtered_repeated_hash": Reason("read", "an earlier row has the same value in a column that must be distinct"),
    "filtered_repeated_content": Reason("read", "an earlier row of the same shard led to exactly the same bytes"),
    "table_unreadable": Reason("read", "a part of a table could not be read when its turn came", passing=True),
    # downloading
    "bad_url": Reason("read", "not a usable http or https URL"),
    "forbidden_address": Reason("read", "the host is not on the public internet, and allow_hosts does not name it"),
    "no_such_host": Reason("read", "the host's name does not exist"),
    "dns_failed": Reason("read", "the host's name could not be looked up", passing=True),
    "connect_failed": Reason("read", "no connection to the host came about", passing=True),
    "tls_failed": Reason("read", "the host's certificate is not valid, or no common encryption was found"),
    "timeout": Reason("read", "the host took too long to connect, to answer, or for all of it", passing=True),
    "connection_lost": Reason("read", "the connection ended before the answer did, or spoke no HTTP", passing=True),
    "server_error": Reason("read", "the server says that it has a problem (5xx)", passing=True),
    "too_many_requests": Reason("read", "the server asks for fewer requests (429)", passing=True),
    "not_found": Reason("read", "the server says that the image is gone (404, 410)"),
    "access_denied": Reason("read", "the server refuses (401, 402, 403, 451)"),
    "http_error": Reason("read", "the server gave another answer than the image; its status is in the message"),
    "bad_redirect": Reason("read", "a redirect that leads nowhere, or to something that is not http or https"),
    "too_many_redirects": Reason("read", "more redirects than max_redirects"),
    "opted_out": Reason("read", "the server's X-Robots-Tag asks not to be used (noai, noindex, ...)"),
    "content_encoded": Reason("read", "the server compressed the answer although this was declined"),
    "hash_mismatch": Reason("read", "the bytes are not those whose md5 or sha256 the table states"),
    # decoding the image
    "empty": Reason("decode", "the file has no bytes"),
    "not_an_image": Reason("decode", "the content is not an image, whatever the file is called"),
    "unsupported_format": Reason("decode", "an image or document of a format or pixel type that is not read"),
    "animated": Reason("decode", "an animated GIF, PNG, WebP or AVIF"),
    "truncated": Reason("decode", "the file, or the data of its image, ends before the image does"),
    "corrupt": Reason(
        "decode", "the file has the right beginning, but cannot be decoded, or its decoder says that parts are damaged"
    ),
    "hdr": Reason(
        "decode", "its colours are of high dynamic range (PQ or HLG), which have no look of their own in sRGB"
    ),
    "blank": Reason(
        "decode", "its transparent parts, laid onto white, leave one colour: a white logo, or an empty layer"
    ),
    "too_many_pixels": Reason("decode", "more pixels than max_pixels, or a side longer than max_side_px"),
    "too_small": Reason("decode", "a side shorter than min_side_px"),
    "too_elongated": Reason("decode", "the longer side is more than max_aspect times the shorter one"),
    "too_many_scans": Reason("decode", "a progressive JPEG of so many scans that decoding it would take minutes"),
    "out_of_memory": Reason("decode", "there was not enough memory to decode the image"),
    "killed_worker": Reason(
        "decode",
        "decoding or estimating this image killed its worker, or held it up for run.stall_limit_s, alone with it, twice",
    ),
    # estimating
    "estimator_failed": Reason(
        "estimate", "an estimator could not cope with this image; its own words are in the message"
    ),
    # storing the sample
    "duplicate_key": Reason("encode", "an earlier input of the same shard has the same key"),
    "cannot_encode": Reason(
        "encode", "the image cannot be stored in the dataset's format (WebP, of very large images)"
    ),
}


def is_passing(reason: str) -> bool:
    """Whether another attempt, later, may well succeed."""
    return reason in REASONS and REASONS[reason].passing


_PAGE = """# Why an input gives no sample

Every input of a run is either a sample of a shard, or one line of the shard's `.failed.jsonl`: its key, the stage at
which it failed, a reason of this table, and a message with the particulars. `python -m shards stats URL` counts them.

A *passing* failure may well succeed at another attempt, and `python -m extract DATA --retry-failed` makes one; all others
are final. Inputs whose reason begins with `filtered_`, and forgotten ones, were left out on purpose: they are counted
apart, and not among the failures that `--max-failed` bounds.

This page is written by `python -m extract.reasons > docs/failures.md`.

| reason | stage | what it means |
|---|---|---|
{rows}
"""


def page() -> str:
    """docs/failures.md."""
    rows = (
        f"| `{name}` | {reason.stage} | {reason.explanation}{' (*passing*)' if reason.passing else ''} |"
        for name, reason in REASONS.items()
    )
    return _PAGE.format(rows="\n".join(rows))


if __name__ == "__main__":
    print(page(), end="")
