"""Damaged files are refused, and files that only look damaged are not. The figures are those of `benchmarks.damage`."""

import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from benchmarks.damage import closed, damaged_files, good_files, refusal
from extract.images.damage import flat_rest
from extract.images.prepare import ImageRules, prepare
from tests.support.hostile import encoded, png_chunk
from tests.support.hostile import png as bare_png

TEXTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 128, 3), np.uint8)).resize((512, 384))


def refused(content: bytes) -> str:
    problem = refusal(content)
    return problem.reason if problem else "ok"


def zero_tail(content: bytes, share: float) -> bytes:
    at = int(len(content) * share)
    return content[:at] + bytes(len(content) - at)


def test_of_varied_good_files_none_is_refused() -> None:
    for file in good_files(60, 11):
        assert refusal(file.content) is None, (file.format, file.encoder, file.scene)


def test_most_damaged_files_are_found() -> None:
    kinds = [(kind, refusal(file.content) is not None) for kind, file in damaged_files(40, 12)]
    sure = [found for kind, found in kinds if kind in ("cut", "cut and closed", "zero tail", "zero pages")]
    assert np.mean(sure) > 0.85 and np.mean([found for _, found in kinds]) > 0.7


def test_good_jpegs_have_the_pixels_and_bytes_that_they_had() -> None:
    for file in good_files(60, 13):
        if file.format == "jpeg" and "CMYK" not in file.encoder:
            with Image.open(io.BytesIO(file.content)) as image:
                wanted = np.asarray(image.convert("RGB"))
            for form in ("png", "jpg"):
                rules = ImageRules(size_px=None, max_aspect=100, min_side_px=8, format=form)  # type: ignore[arg-type]
                prepared = prepare(file.content, rules)
                if form == "png" or not prepared.record["reencoded"]:
                    assert np.array_equal(prepared.pixels, wanted), file.encoder
            assert prepared.record["reencoded"] == ("arithmetic" in file.encoder), file.encoder
            assert prepared.record["reencoded"] or prepared.member == file.content


def test_pixels_of_one_image_stay_when_the_next_is_decoded_into_the_same_memory() -> None:
    first, second = (Image.new("RGB", (640, 480), colour) for colour in ("red", "navy"))
    for form in ("jpg", "png"):
        for size_px in (None, 120):
            rules = ImageRules(size_px=size_px, format=form)  # type: ignore[arg-type]
            kept = prepare(encoded(first, "JPEG"), rules)
            prepare(encoded(second, "JPEG"), rules)
            assert np.abs(kept.pixels.astype(int) - (255, 0, 0)).max() <= 2


def test_images_are_decoded_side_by_side_by_threads() -> None:
    contents = [encoded(TEXTURE.resize((400 + 10 * n, 300)), "JPEG") for n in range(24)]
    rules = ImageRules(size_px=None)
    with ThreadPoolExecutor(8) as pool:
        for content, prepared in zip(
            contents, pool.map(lambda content: prepare(content, rules), contents), strict=True
        ):
            with Image.open(io.BytesIO(content)) as image:
                assert np.array_equal(prepared.pixels, np.asarray(image))


# ---- JPEG ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 4}, {"subsampling": 0}])
def test_half_a_jpeg_closed_with_its_end_marker_is_refused(options: dict[str, object]) -> None:
    content = encoded(TEXTURE, "JPEG", **options)
    assert refused(content) == "ok"
    assert refused(content[: len(content) // 2] + b"\xff\xd9") in ("truncated", "corrupt")
    assert refused(zero_tail(content, 0.5)[:-2] + b"\xff\xd9") in ("truncated", "corrupt")


def test_a_progressive_jpeg_cut_between_two_scans_is_refused() -> None:
    content = encoded(TEXTURE, "JPEG", progressive=True)
    last_scan = content.rindex(b"\xff\xda")
    tables = content.rindex(b"\xff\xc4", 0, last_scan)
    assert refused(content[:tables] + b"\xff\xd9") == "truncated"


def test_a_lost_piece_between_restart_markers_is_refused() -> None:
    content = encoded(TEXTURE, "JPEG", restart_marker_rows=1)
    assert refused(content[:9000] + content[9600:]) in ("corrupt", "truncated")


def test_stray_bytes_and_odd_headers_are_no_damage_and_hide_none() -> None:
    content = encoded(TEXTURE, "JPEG")
    half = content[: len(content) // 2] + b"\xff\xd9"
    tables = content.index(b"\xff\xdb")
    for change in (
        lambda data: data[:-2] + bytes(13) + data[-2:],  # padding before the end marker
        lambda data: data[:-2] + b"A" + data[-2:],
        lambda data: data + bytes(3000),
        lambda data: data[:tables] + b"stray bytes between segments" + data[tables:],
        lambda data: data[:11] + b"\x09\x09" + data[13:],  # a version of JFIF that is not known
    ):
        assert refused(change(content)) == "ok"
        assert refused(change(half)) in ("truncated", "corrupt")
    assert refused(content[:-2] + b"garbage that no block wanted" + content[-2:]) == "corrupt"


# ---- other formats ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("plugin", "options"), [("WEBP", {}), ("WEBP", {"lossless": True}), ("AVIF", {"speed": 9})])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_zero_tails_of_webp_and_avif_are_refused(plugin: str, options: dict[str, object], share: float) -> None:
    content = encoded(TEXTURE, plugin, **options)
    assert refused(content) == "ok"
    assert refused(zero_tail(content, share)) in ("corrupt", "truncated")


@pytest.mark.parametrize("plugin", ["WEBP", "AVIF", "PNG", "JPEG", "BMP", "TIFF", "GIF"])
def test_images_that_really_end_in_one_colour_are_not(plugin: str) -> None:
    for colour in (0, 255):
        pixels = np.asarray(TEXTURE).copy()
        pixels[200:] = colour
        assert refused(encoded(Image.fromarray(pixels), plugin)) == "ok"
    assert refused(encoded(Image.new("RGB", (1200, 900), "white"), plugin)) == "ok"


def test_a_png_of_too_few_rows_is_refused_whatever_its_last_row() -> None:
    content = encoded(TEXTURE, "PNG")
    assert refused(closed(content[: len(content) // 2])) == "truncated"
    assert refused(bare_png(64, 64, rows=63)) == "truncated" and refused(bare_png(64, 64, rows=64)) == "ok"
    assert refused(bare_png(64, 64, rows=64, extra=png_chunk(b"tEXt", b"Comment\0whole"))) == "ok"


def test_raw_pixels_that_end_in_zeros_within_a_row_are_refused() -> None:
    for plugin in ("BMP", "TIFF"):
        content = encoded(TEXTURE, plugin)
        assert refused(zero_tail(content, 0.6007)) == "corrupt", plugin
        assert refused(content) == "ok"


def test_a_flat_rest_needs_a_row_that_breaks_off() -> None:
    cells = np.zeros((20, 40), np.float32)
    cells[:10] = 200
    assert not flat_rest(cells)
    cells[10, :15] = 200
    assert flat_rest(cells)
    cells[9, 20:] = 0  # a silhouette
    assert not flat_rest(cells)
