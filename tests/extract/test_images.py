"""Preparing images: what is stored, what the estimators see, and that broken files have a named reason."""

import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps
from skimage.metrics import peak_signal_noise_ratio as psnr

from extract.images.colour import to_srgb
from extract.images.prepare import MAX_PIXELS, ImageProblem, ImageRules, prepare
from extract.reasons import REASONS
from shards.core.errors import UsageError
from tests.support import hostile
from tests.support.hostile import encoded, photo

RECORD = {
    "original_size": list,
    "size": list,
    "orientation": int,
    "crop": list,
    "resized": bool,
    "reencoded": bool,
    "format": str,
    "mode": str,
    "alpha": bool,
    "icc": str,
}
FILES = hostile.images()
SMALL = {name: content for name, (content, _) in FILES.items() if len(content) < 20_000}


def decode(member: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(member)) as image:
        return np.asarray(image.convert("RGB"))


def reason(content: bytes, rules: ImageRules | None = None) -> str:
    with pytest.raises(ImageProblem) as caught:
        prepare(content, rules or ImageRules())
    assert caught.value.message
    return caught.value.reason


@pytest.mark.parametrize("form", ["jpg", "png", "webp"])
@pytest.mark.parametrize("crop", ["none", "center"])
def test_estimators_see_exactly_what_the_stored_file_decodes_to(form: str, crop: str) -> None:
    rules = ImageRules(size_px=48, crop=crop, format=form, min_side_px=16)  # type: ignore[arg-type]
    for name, (content, outcome) in FILES.items():
        if outcome != hostile.OK or name == "largest_allowed.png":
            continue
        prepared = prepare(content, rules)
        assert np.array_equal(prepared.pixels, decode(prepared.member)), name
        assert prepared.pixels.dtype == np.uint8 and prepared.pixels.flags.writeable
        with Image.open(io.BytesIO(prepared.member)) as image:
            assert (image.mode, image.format) == ("RGB", {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[form]), name
            assert image.getexif() == {} and "icc_profile" not in image.info and "comment" not in image.info, name
        assert {key: type(value) for key, value in prepared.record.items()} == RECORD, name


@pytest.mark.parametrize(("form", "plugin"), [("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP")])
def test_source_bytes_stay_untouched_where_nothing_needs_to_change(form: str, plugin: str) -> None:
    content = encoded(photo(), plugin, comment=b"kept") if plugin == "JPEG" else encoded(photo(), plugin)
    prepared = prepare(content, ImageRules(format=form))  # type: ignore[arg-type]
    assert prepared.member == content
    assert prepared.record["reencoded"] is False and prepared.record["resized"] is False
    assert np.array_equal(prepared.pixels, decode(content))


def test_a_greyscale_jpeg_stays_untouched_and_is_seen_in_three_channels() -> None:
    content = encoded(photo().convert("L"), "JPEG")
    prepared = prepare(content, ImageRules(min_side_px=8))
    assert prepared.member == content and prepared.record["mode"] == "L" and not prepared.record["reencoded"]
    assert np.array_equal(prepared.pixels, decode(content)) and prepared.pixels.shape[2] == 3


@pytest.mark.parametrize(
    "name",
    ["cmyk.jpg", "turned_6.jpg", "icc_swapped.jpg", "png_called.jpg", "arithmetic.jpg"],
)
def test_what_other_readers_would_see_differently_is_encoded_anew(name: str) -> None:
    prepared = prepare(FILES[name][0], ImageRules(min_side_px=8))
    assert prepared.record["reencoded"] is True
    assert prepared.member != FILES[name][0]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("plugin", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_every_orientation_is_applied_in_every_format(plugin: str, orientation: int) -> None:
    content = encoded(photo(), plugin, exif=hostile.with_orientation(orientation))
    prepared = prepare(content, ImageRules(format="png"))
    with Image.open(io.BytesIO(content)) as image:
        upright = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert np.array_equal(prepared.pixels, upright)
    assert prepared.record["orientation"] == orientation
    assert prepared.record["original_size"] == [upright.shape[1], upright.shape[0]]


def test_sixteen_bit_grey_spans_black_to_white() -> None:
    values = np.linspace(0, 65535, 64 * 64).round().astype(np.uint16).reshape(64, 64)
    for plugin in ("PNG", "TIFF"):
        prepared = prepare(encoded(Image.fromarray(values), plugin), ImageRules(format="png"))
        assert np.abs(prepared.pixels[..., 0] - values / 257.0).max() <= 0.51
        assert (prepared.pixels == prepared.pixels[..., :1]).all()


def test_transparency_is_laid_onto_white_and_recorded() -> None:
    rgba = photo().convert("RGBA")
    rgba.putalpha(Image.fromarray(np.repeat(np.array([[0, 255]], np.uint8), 32, 0)).resize((96, 64), 0))
    for plugin in ("PNG", "WEBP"):
        options = {"lossless": True} if plugin == "WEBP" else {}
        prepared = prepare(encoded(rgba, plugin, **options), ImageRules(format="png"))
        assert prepared.record["alpha"] is True
        assert (prepared.pixels[:, :48] == 255).all()
        assert np.array_equal(prepared.pixels[:, 48:], np.asarray(photo())[:, 48:])
    opaque = prepare(encoded(photo().convert("RGBA"), "PNG"), ImageRules(format="png"))
    assert opaque.record["alpha"] is False and np.array_equal(opaque.pixels, np.asarray(photo()))


def test_a_colour_profile_is_followed_and_a_broken_one_is_not() -> None:
    plain = np.asarray(photo())
    swapped = prepare(encoded(photo(), "PNG", icc_profile=hostile.swapped_profile()), ImageRules(format="png"))
    assert swapped.record["icc"] == "converted"
    assert np.abs(swapped.pixels.astype(int) - plain[..., ::-1]).max() <= 3
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    content = encoded(photo(), "PNG", icc_profile=srgb)
    assert (prepare(content, ImageRules(format="png")).record["icc"], prepare(content, ImageRules()).record["icc"]) == (
        "srgb",
        "srgb",
    )
    assert prepare(content, ImageRules(format="png")).member == content
    assert prepare(FILES["icc_corrupt.jpg"][0], ImageRules()).record["icc"] == "ignored"
    assert prepare(FILES["icc_of_other_space.jpg"][0], ImageRules()).record["icc"] == "ignored"


def test_profiles_of_grey_and_of_presses_are_followed() -> None:
    grey = photo().convert("L")
    linear = prepare(encoded(grey, "JPEG", icc_profile=hostile.grey_profile(1.0)), ImageRules(format="png"))
    assert linear.record["icc"] == "converted"
    assert linear.pixels.mean() > np.asarray(grey).mean() + 20  # light that was stored linearly is brighter in sRGB
    press = encoded(photo().convert("CMYK"), "JPEG", icc_profile=hostile.cmyk_profile(), quality=95)
    followed = prepare(press, ImageRules(format="png"))
    assert followed.record["icc"] == "converted"
    assert np.abs(followed.pixels.astype(int) - np.asarray(photo())).mean() < 25
    huge = hostile.swapped_profile() + bytes(5 << 20)
    assert to_srgb(photo(), huge)[1] == "ignored"
    assert to_srgb(photo(), hostile.profile(b"RGB ", b"XYZ "))[1] == "ignored"  # it has none of the tags that it needs


@given(
    width=st.integers(32, 300),
    height=st.integers(32, 300),
    size=st.integers(16, 200),
    crop=st.sampled_from(["none", "center"]),
)
@settings(max_examples=60, deadline=None)
def test_sides_shrink_to_the_rule_and_never_grow(width: int, height: int, size: int, crop: str) -> None:
    if max(width, height) > 10 * min(width, height):
        return
    rules = ImageRules(size_px=size, crop=crop, format="png")  # type: ignore[arg-type]
    record = prepare(np.asarray(photo(width, height)), rules).record
    _, _, crop_width, crop_height = record["crop"]
    assert record["original_size"] == [width, height]
    assert (crop_width, crop_height) == ((width, height) if crop == "none" else (min(width, height),) * 2)
    assert min(record["size"]) == min(size, width, height)
    assert record["resized"] == (min(width, height) > size)
    assert abs(record["size"][0] / record["size"][1] - crop_width / crop_height) <= 0.51 * max(
        1 / record["size"][1], crop_width / crop_height / record["size"][1]
    )


def test_a_crop_is_exactly_the_middle() -> None:
    pixels = np.asarray(photo(101, 64))
    prepared = prepare(pixels, ImageRules(size_px=None, crop="center", format="png"))
    assert prepared.record["crop"] == [18, 0, 64, 64]
    assert np.array_equal(prepared.pixels, pixels[:, 18:82])


@pytest.mark.parametrize("crop", ["none", "center"])
def test_decoding_large_jpegs_at_a_reduced_scale_changes_nothing_to_be_seen(crop: str) -> None:
    y, x = np.mgrid[0:1500, 0:2100]
    texture = 127 + 60 * np.sin(x * y / 9000.0) + 60 * np.sin(x / 31.0)
    large = Image.fromarray(np.stack([texture, texture[::-1], 255 - texture], -1).clip(0, 255).astype(np.uint8))
    content = encoded(large, "JPEG", quality=95)
    rules = ImageRules(size_px=128, crop=crop, format="png")  # type: ignore[arg-type]
    with Image.open(io.BytesIO(content)) as image:
        whole = np.asarray(image)
    assert psnr(prepare(whole, rules).pixels, prepare(content, rules).pixels) > 36
    assert prepare(content, rules).record["original_size"] == [2100, 1500]


@pytest.mark.parametrize(("width", "height"), [(320, 240), (700, 420), (200, 600)])
def test_area_means_can_be_chosen_and_look_much_like_lanczos(width: int, height: int) -> None:
    content = encoded(photo(width, height), "JPEG", quality=95)
    lanczos, area = (
        prepare(content, ImageRules(size_px=128, format="png", resample=resample)) for resample in ("lanczos", "area")
    )
    assert lanczos.record == area.record and not np.array_equal(lanczos.pixels, area.pixels)
    assert psnr(lanczos.pixels, area.pixels) > 25


def test_limits_are_checked_before_anything_is_decoded() -> None:
    content = encoded(photo(), "JPEG")
    broken = content[:-20]
    assert reason(broken) == "truncated"  # what decoding says
    assert reason(broken, ImageRules(max_pixels=96 * 64 - 1)) == "too_many_pixels"
    assert reason(broken, ImageRules(max_bytes=len(broken) - 1)) == "too_many_bytes"
    assert reason(broken, ImageRules(min_side_px=65)) == "too_small"
    assert reason(broken, ImageRules(max_aspect=1.4)) == "too_elongated"
    assert reason(broken, ImageRules(max_side_px=95)) == "too_many_pixels"
    assert prepare(content, ImageRules(max_pixels=96 * 64, max_bytes=len(content), min_side_px=64)).pixels.any()


def test_an_image_that_its_format_cannot_hold_is_a_problem_of_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def overflow(*_: object, **__: object) -> None:
        raise ValueError("encoding error 6")  # what libwebp says when a partition of a very large picture overflows

    monkeypatch.setattr(Image.Image, "save", overflow)
    with pytest.raises(ImageProblem) as caught:
        prepare(np.asarray(photo()), ImageRules(format="webp"))
    assert caught.value.reason == "cannot_encode"


def test_rules_that_make_no_sense_are_usage_errors() -> None:
    for wrong in ({"size_px": 3}, {"crop": "left"}, {"format": "gif"}, {"max_aspect": 0.5}, {"max_pixels": 1 << 40}):
        with pytest.raises(UsageError):
            ImageRules(**wrong)  # type: ignore[arg-type]
    assert ImageRules().max_pixels == MAX_PIXELS


def test_one_flipped_bit_in_the_pixels_of_a_png_is_found() -> None:
    content = encoded(photo(), "PNG")
    start, end = content.index(b"IDAT") + 4, len(content) - 16
    for at in range(start, end, 101):
        flipped = content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]
        assert reason(flipped, ImageRules(format="png")) == "corrupt"


@given(st.binary(max_size=300))
@settings(max_examples=200, deadline=None)
def test_arbitrary_bytes_never_raise_anything_but_an_image_problem(content: bytes) -> None:
    with pytest.raises(ImageProblem) as caught:
        prepare(content, ImageRules())
    assert caught.value.reason in REASONS


@given(
    name=st.sampled_from(sorted(SMALL)),
    cut=st.floats(0, 1),
    changes=st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=4)), max_size=6),
)
@settings(max_examples=600, deadline=None)
def test_damaged_files_never_raise_anything_but_an_image_problem(
    name: str, cut: float, changes: list[tuple[float, bytes]]
) -> None:
    content = bytearray(SMALL[name])
    for where, new in changes:
        at = int(where * len(content))
        content[at : at + len(new)] = new
    if not changes or cut < 0.3:
        content = content[: int(cut * len(content))]
    try:
        prepared = prepare(bytes(content), ImageRules(size_px=64, max_pixels=1 << 20))
    except ImageProblem as problem:
        assert problem.reason in REASONS and problem.message
    else:
        assert np.array_equal(prepared.pixels, decode(prepared.member))


def test_the_same_image_gives_the_same_bytes_in_many_threads() -> None:
    names = [name for name, (_, outcome) in FILES.items() if outcome == hostile.OK and name != "largest_allowed.png"]
    rules = ImageRules(size_px=48)
    alone = {name: prepare(FILES[name][0], rules).member for name in names}
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda name: (name, prepare(FILES[name][0], rules).member), names * 4))
    assert all(alone[name] == member for name, member in together)


def test_problems_travel_between_processes() -> None:
    problem = ImageProblem("truncated", "it ends")
    copy = pickle.loads(pickle.dumps(problem))
    assert (copy.reason, copy.message) == ("truncated", "it ends")


def test_only_rgb_pixels_are_taken_as_arrays() -> None:
    for wrong in (np.zeros((64, 64), np.uint8), np.zeros((64, 64, 3), np.float32), np.zeros((64, 64, 4), np.uint8)):
        with pytest.raises(TypeError):
            prepare(wrong, ImageRules())


@pytest.mark.parametrize("side", [2000, 2200])  # in one piece of Pillow's memory, and in two
def test_pixels_of_large_images_are_those_of_the_stored_file(side: int) -> None:
    source = np.asarray(photo(side, side))
    prepared = prepare(source, ImageRules(size_px=None))
    with Image.open(io.BytesIO(prepared.member)) as image:
        assert np.array_equal(prepared.pixels, np.asarray(image)) and prepared.pixels.flags.writeable
