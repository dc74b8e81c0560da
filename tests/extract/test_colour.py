"""Colours that files state without a profile, against formulas in float64; masks that no one set; 16 bits."""

import io
import struct

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms

from extract.images.prepare import ImageProblem, ImageRules, Prepared, prepare
from tests.support.hostile import encoded, photo, png_chunk

RULES = ImageRules(size_px=None, min_side_px=8, format="png")
SRGB = (0.64, 0.33, 0.30, 0.60, 0.15, 0.06)
ADOBE = (0.64, 0.33, 0.21, 0.71, 0.15, 0.06)
P3 = (0.680, 0.320, 0.265, 0.690, 0.150, 0.060)
BT2020 = (0.708, 0.292, 0.170, 0.797, 0.131, 0.046)


def xyz(primaries: tuple[float, ...]) -> np.ndarray:
    """Linear RGB to XYZ, white D65: the textbook's way."""
    x, y = np.array(primaries[::2]), np.array(primaries[1::2])
    columns = np.stack([x / y, np.ones(3), (1 - x - y) / y])
    white = np.array([0.3127 / 0.3290, 1, (1 - 0.3127 - 0.3290) / 0.3290])
    return columns * np.linalg.solve(columns, white)


def expected(light: np.ndarray, primaries: tuple[float, ...]) -> np.ndarray:
    """sRGB levels, not rounded, of linear RGB 0..1."""
    linear = (light @ (np.linalg.inv(xyz(SRGB)) @ xyz(primaries)).T).clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def srgb_light(codes: np.ndarray) -> np.ndarray:
    return np.where(codes <= 0.04045, codes / 12.92, ((codes + 0.055) / 1.055) ** 2.4)


def with_chunks(content: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    return content[:33] + b"".join(png_chunk(kind, data) for kind, data in chunks) + content[33:]


def chrm(primaries: tuple[float, ...]) -> tuple[bytes, bytes]:
    return b"cHRM", struct.pack(">8I", *(round(100_000 * value) for value in (0.3127, 0.3290, *primaries)))


def gama(value: int) -> tuple[bytes, bytes]:
    return b"gAMA", struct.pack(">I", value)


def cicp(primaries: int, transfer: int) -> tuple[bytes, bytes]:
    return b"cICP", bytes([primaries, transfer, 0, 1])


def nclx(content: bytes, primaries: int, transfer: int) -> bytes:
    at = content.index(b"nclx") + 4
    return content[:at] + struct.pack(">HH", primaries, transfer) + content[at + 4 :]


def adobe_exif(index: str = "R03", space: int = 0xFFFF) -> bytes:
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0xA001] = space
    exif.get_ifd(0x8769)[0xA005] = {1: index}
    return exif.tobytes()


def reason(content: bytes) -> str:
    with pytest.raises(ImageProblem) as caught:
        prepare(content, RULES)
    return caught.value.reason


def check(prepared: Prepared, wanted: np.ndarray) -> None:
    assert prepared.record["icc"] == "converted" and prepared.record["reencoded"]
    assert np.abs(prepared.pixels - wanted).max() <= 1


PNG = encoded(photo(), "PNG")
CODES = np.asarray(photo()) / 255.0


@pytest.mark.parametrize(
    ("chunks", "light", "primaries"),
    [
        ([gama(100_000)], CODES, SRGB),
        ([gama(55_556)], CODES**1.8, SRGB),
        ([gama(45_470), chrm(ADOBE)], CODES ** (1 / 0.4547), ADOBE),
        ([gama(45_455), chrm(P3)], CODES ** (1 / 0.45455), P3),
        ([chrm(P3)], srgb_light(CODES), P3),
        ([cicp(12, 13)], srgb_light(CODES), P3),
        ([cicp(9, 13), gama(100_000)], srgb_light(CODES), BT2020),
        ([cicp(1, 8)], CODES, SRGB),
        ([cicp(1, 4)], CODES**2.2, SRGB),
        ([cicp(9, 1)], np.where(CODES < 0.081, CODES / 4.5, ((CODES + 0.099) / 1.099) ** (1 / 0.45)), BT2020),
    ],
)
def test_chunks_of_png_are_converted(
    chunks: list[tuple[bytes, bytes]], light: np.ndarray, primaries: tuple[float, ...]
) -> None:
    check(prepare(with_chunks(PNG, *chunks), RULES), expected(light, primaries))


@pytest.mark.parametrize(
    "chunks",
    [
        [(b"sRGB", b"\0"), gama(45_455), chrm(SRGB)],
        [gama(45_455)],
        [gama(45_455), chrm(SRGB)],
        [cicp(1, 13)],
        [cicp(1, 1)],
        [(b"sRGB", b"\0"), gama(100_000)],
        [gama(0)],
        [(b"cHRM", bytes(32))],
        [cicp(200, 200)],
    ],
)
def test_png_that_is_srgb_or_says_nonsense_stays_untouched(chunks: list[tuple[bytes, bytes]]) -> None:
    content = with_chunks(PNG, *chunks)
    assert prepare(content, RULES).member == content


def test_grey_and_16_bits_are_converted_from_all_their_bits() -> None:
    grey = np.linspace(0, 1, 64 * 64).reshape(64, 64)
    wanted = 255 * np.where(grey <= 0.0031308, 12.92 * grey, 1.055 * grey ** (1 / 2.4) - 0.055)
    values = np.rint(grey * 65535).astype(np.uint16)
    colour = np.dstack([values, values[::-1], values.T])
    for pixels in (values, colour):
        content = with_chunks(bytes(cv2.imencode(".png", pixels)[1]), gama(100_000))
        prepared = prepare(content, RULES)
        assert prepared.record["icc"] == "converted"
        of_first = prepared.pixels[..., 2] if pixels.ndim == 3 else prepared.pixels[..., 0]  # OpenCV writes BGR
        assert np.abs(of_first - wanted).max() <= 1


def test_adobe_rgb_of_cameras_is_converted_and_other_exif_is_not() -> None:
    content = encoded(photo(), "JPEG", quality=95, exif=adobe_exif())
    with Image.open(io.BytesIO(content)) as image:
        codes = np.asarray(image) / 255.0
    check(prepare(content, RULES), expected(codes ** (563 / 256), ADOBE))
    for exif in (adobe_exif("R98", 1), adobe_exif("R98"), adobe_exif("", 0xFFFF)):
        other = encoded(photo(), "JPEG", exif=exif)
        assert prepare(other, ImageRules(min_side_px=8)).member == other
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    with_profile = encoded(photo(), "JPEG", exif=adobe_exif(), icc_profile=srgb)
    assert prepare(with_profile, ImageRules(min_side_px=8)).member == with_profile  # a profile says it better


@pytest.mark.parametrize(("code", "primaries"), [(12, P3), (9, BT2020)])
def test_nclx_of_avif_is_converted(code: int, primaries: tuple[float, ...]) -> None:
    plain = encoded(photo(), "AVIF", quality=95, subsampling="4:4:4")
    assert prepare(plain, RULES).record["icc"] == "none"
    check(prepare(nclx(plain, code, 13), RULES), expected(srgb_light(prepare(plain, RULES).pixels / 255.0), primaries))


def test_pq_and_hlg_are_refused_by_name() -> None:
    avif = encoded(photo(), "AVIF")
    for transfer, name in ((16, "PQ"), (18, "HLG")):
        srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        tag = b"cicp" + struct.pack(">II", len(srgb), 12)
        profile = srgb[:132] + tag + srgb[144:] + b"cicp" + bytes(4) + bytes([9, transfer, 0, 1])
        profile = struct.pack(">I", len(profile)) + profile[4:]
        for content in (
            with_chunks(PNG, cicp(9, transfer)),
            nclx(avif, 9, transfer),
            encoded(photo(), "JPEG", icc_profile=profile),
        ):
            assert reason(content) == "hdr"
            with pytest.raises(ImageProblem, match=name):
                prepare(content, RULES)


# ---- masks -----------------------------------------------------------------------------------------------------------


def with_alpha(pixels: np.ndarray, alpha: np.ndarray | int) -> Image.Image:
    return Image.fromarray(np.dstack([pixels, np.broadcast_to(np.uint8(alpha), pixels.shape[:2])]))


@pytest.mark.parametrize("plugin", ["PNG", "TIFF"])
def test_a_mask_that_hides_everything_is_no_mask(plugin: str) -> None:
    pixels = np.asarray(photo())
    prepared = prepare(encoded(with_alpha(pixels, 0), plugin), RULES)
    assert np.array_equal(prepared.pixels, pixels) and prepared.record["alpha"] is False
    grey = with_alpha(pixels, 0).convert("LA")
    assert np.array_equal(prepare(encoded(grey, "PNG"), RULES).pixels[..., 0], np.asarray(grey)[..., 0])


def test_what_flattening_leaves_blank_is_refused_and_what_was_plain_is_not() -> None:
    logo = np.zeros((64, 96), np.uint8)
    logo[20:40, 30:60] = 255
    white = np.full((64, 96, 3), 255, np.uint8)
    assert reason(encoded(with_alpha(white, logo), "PNG")) == "blank"
    assert reason(encoded(with_alpha(np.zeros_like(white), 0), "PNG")) == "blank"
    assert reason(encoded(with_alpha(np.zeros_like(white), 1), "PNG")) == "blank"  # a mask of 0 and 1
    assert prepare(encoded(with_alpha(np.zeros_like(white), logo), "PNG"), RULES).pixels.min() == 0
    assert (prepare(encoded(Image.fromarray(white), "PNG"), RULES).pixels == 255).all()


# ---- 16 bits ---------------------------------------------------------------------------------------------------------


def test_a_transparent_colour_of_16_bits_is_honoured_to_its_last_bit() -> None:
    values = np.asarray(photo()).astype(np.uint16) * 257
    values[:20], values[20:30] = (257, 514, 771), (258, 514, 771)
    content = bytes(cv2.imencode(".png", values[..., ::-1])[1])
    prepared = prepare(with_chunks(content, (b"tRNS", struct.pack(">3H", 257, 514, 771))), RULES)
    assert prepared.record["alpha"] is True
    assert (prepared.pixels[:20] == 255).all() and (prepared.pixels[20:30] == (1, 2, 3)).all()
    assert np.array_equal(prepared.pixels[30:], np.asarray(photo())[30:])
    absent = prepare(with_chunks(content, (b"tRNS", struct.pack(">3H", 1, 1, 1))), RULES)
    assert absent.record["alpha"] is False and np.array_equal(absent.pixels[30:], np.asarray(photo())[30:])


@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
def test_grey_tiffs_of_16_bits_are_never_negative(photometric: str) -> None:
    values = np.linspace(0, 65535, 64 * 64).round().astype(np.uint16).reshape(64, 64)
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, values, photometric=photometric)
    seen = 65535 - values.astype(int) if photometric == "miniswhite" else values
    assert np.abs(prepare(buffer.getvalue(), RULES).pixels[..., 0] - seen / 257).max() <= 0.51


@pytest.mark.parametrize("scale", [257, 1])
def test_a_tiffs_colour_map_of_eight_bits_is_not_black(scale: int) -> None:
    rng = np.random.default_rng(5)
    indices = rng.integers(0, 256, (32, 40), np.uint8)
    colours = rng.integers(0, 256, (3, 256), np.uint16)
    file = io.BytesIO()
    tifffile.imwrite(file, indices, photometric="palette", colormap=colours * np.uint16(scale))
    assert (prepare(file.getvalue(), RULES).pixels == colours.T[indices]).all()
