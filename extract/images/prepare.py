"""From the bytes of any image file to the pixels that the estimators see and the file that is stored, or a named reason.

Nothing is believed: the content is sniffed, and bytes, pixels and sides are limited by the header before any decoding.
Only the formats of READABLE are ever opened (no SVG, PDF or PostScript). What is done to an image, in this order:

    decode (JPEGs far larger than needed at 1/2, 1/4 or 1/8 scale), grey from 16 bits, palette to RGB, transparency onto
    white, EXIF or XMP orientation, centre crop if asked for, shorter side down to size_px (area means and Lanczos;
    never up), ICC profile or other stated colours (encoding.py) to sRGB, RGB. Damaged files are refused (jpeg.py, damage.py).

Source bytes are stored untouched when they are in the dataset's format and nothing of the above was needed (greyscale
files included: every reader of RGB makes the same three channels of them). Everything else is encoded (JPEG of
quality 95 without chroma subsampling), and the record says so. Untouched files keep their metadata (EXIF with camera
and GPS data, comments, bytes after the end of the image); re-encoded ones have none.

Peak memory of one call: the file's bytes plus 12 bytes per pixel of the source (0.8 GB at the default limit), or 20 if
its size is kept (1.4 GB); of images above 16 megapixels only one at a time is decoded in a process. Safe to call from
several threads; Pillow lets go of the GIL while it decodes, resizes and encodes.
"""

import contextlib
import io
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import cv2
import numpy as np
import pyarrow as pa
from PIL import AvifImagePlugin, ExifTags, Image, TiffImagePlugin, WebPImagePlugin

from extract.images import damage, encoding, jpeg, sniff
from extract.images.colour import to_srgb
from extract.images.jpeg import DamagedImage
from extract.reasons import REASONS
from shards.core.errors import UsageError

# Imported for what they register: without them Image.open would load every plugin that Pillow has.
_PLUGINS = (AvifImagePlugin, TiffImagePlugin, WebPImagePlugin)
warnings.filterwarnings(
    "ignore", module=r"PIL\."
)  # of broken metadata, one line for each file; max_pixels is our limit
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

READABLE = ("jpeg", "png", "webp", "gif", "bmp", "tiff", "avif")
MAX_BYTES = 64 << 20
MAX_PIXELS = 1 << 26  # 8192 x 8192
_PILLOW_MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 0)  # Pillow itself refuses more
_MAX_JPEG_SCANS = 100  # encoders write about ten; each of thousands of empty scans costs a pass over the whole image
_BLANK_LEVELS = 8  # of 255
_LARGE_PIXELS = 16_000_000
_large_image = threading.Lock()

_ENCODERS: dict[str, tuple[str, str, dict[str, Any]]] = {  # format: (name by content, Pillow's name, options)
    "jpg": ("jpeg", "JPEG", {"quality": 95, "subsampling": 0}),
    "png": ("png", "PNG", {"compress_level": 6}),
    "webp": ("webp", "WEBP", {"quality": 95, "method": 4}),
}
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What Pillow raises on broken files, here and there: each of its plugins parses foreign bytes in plain Python.
_DECODER_ERRORS = (
    OSError,
    EOFError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    AssertionError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


@dataclass(frozen=True)
class ImageRules:
    """How images are prepared. Sides in pixels, of the image as it is seen (EXIF orientation applied).

    size_px: shorter side at most; None keeps the size. crop: "center" cuts out the largest square.
    resample: "lanczos", or "area": means of areas, softer, in two thirds of the time.
    min_side_px, max_side_px, max_aspect, max_pixels, max_bytes: images beyond are refused, before they are decoded.
    """

    size_px: int | None = 512
    crop: Literal["none", "center"] = "none"
    format: Literal["jpg", "png", "webp"] = "jpg"
    resample: Literal["lanczos", "area"] = "lanczos"
    min_side_px: int = 32
    max_side_px: int = 16383  # WebP holds no more
    max_aspect: float = 10.0
    max_pixels: int = MAX_PIXELS
    max_bytes: int = MAX_BYTES

    def __post_init__(self) -> None:
        if self.size_px is not None and self.size_px < 16:
            raise UsageError(f"image.size_px = {self.size_px} is too small; give at least 16, or leave it out")
        if self.crop not in ("none", "center"):
            raise UsageError(f"image.crop = {self.crop!r} is not one of 'none', 'center'")
        if self.format not in _ENCODERS:
            raise UsageError(f"image.format = {self.format!r} is not one of {', '.join(_ENCODERS)}")
        if self.resample not in ("lanczos", "area"):
            raise UsageError(f"image.resample = {self.resample!r} is not one of 'lanczos', 'area'")
        if not 1 <= self.min_side_px <= self.max_side_px <= 16383:
            raise UsageError("image.min_side_px and image.max_side_px must be in this order, between 1 and 16383")
        if not self.max_aspect >= 1:
            raise UsageError(f"image.max_aspect = {self.max_aspect} must be at least 1")
        if not 1 <= self.max_pixels <= _PILLOW_MAX_PIXELS:
            raise UsageError(f"image.max_pixels = {self.max_pixels} must be between 1 and {_PILLOW_MAX_PIXELS}")
        if self.max_bytes < 1:
            raise UsageError(f"image.max_bytes = {self.max_bytes} must be at least 1")


class ImageProblem(Exception):
    """Why an image cannot be used: a slug of extract.reasons.REASONS, and a sentence."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(f"{reason}: {message}")
        assert reason in REASONS, reason
        self.reason = reason
        self.message = message

    def __reduce__(self) -> tuple[type["ImageProblem"], tuple[str, str]]:
        return ImageProblem, (self.reason, self.message)


@dataclass
class Prepared:
    """An image ready for the estimators and for storage.

    member: the stored file, a jpg, png or webp; of one channel only where a greyscale source is untouched.
    record: what was done; the same keys and types for every image:
        original_size [w, h]  of the source, with its orientation applied
        size [w, h]           as stored
        orientation int       the source's EXIF orientation, 1..8
        crop [x, y, w, h]     the part of the original that was kept, in pixels of original_size
        resized bool, reencoded bool
        format str            what the source's content was: jpeg, png, ... or "array"
        mode str              Pillow's name of its pixel type: RGB, L, P, CMYK, I;16, ...
        alpha bool            it had transparent pixels, which were laid onto white
        icc str               its colour profile: none, srgb, converted or ignored (extract.images.colour)
    """

    member: bytes
    record: dict[str, Any]
    _pixels: np.ndarray | None = None

    @property
    def pixels(self) -> np.ndarray:
        """uint8 RGB (H, W, 3), writable: exactly what Pillow decodes `member` to; decoded when first asked for."""
        if self._pixels is None:
            self._pixels = _decode(self.member)
        return self._pixels


@dataclass
class _Loaded:
    """A decoded source: mode L, RGB or CMYK, upright. size: of the original, upright (the image may be a draft of it)."""

    image: Image.Image
    size: tuple[int, int]
    kind: str
    mode: str
    orientation: int = 1
    alpha: bool = False
    profile: bytes | None = None
    stated: encoding.Encoding | None = None
    """What the file states about its colours in other words than a profile; None once that was done."""
    converted: bool = False
    portable: bool = True


def prepare(image: bytes | np.ndarray, rules: ImageRules, *, decoded: bool = True) -> Prepared:
    """Turns an image file, or uint8 RGB pixels (H, W, 3), into what is stored. Raises ImageProblem, and nothing else.

    decoded: False spares decoding what was encoded, where nobody will look at the pixels.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise TypeError(f"pixels must be uint8 (H, W, 3), not {image.dtype} {image.shape}")
        size = (image.shape[1], image.shape[0])
        _check_size(size, rules)
        return _finish(_Loaded(Image.fromarray(image), size, "array", "RGB"), None, rules, decoded)
    kind = _identify(image, rules)
    try:
        with _decoder_errors_named(image, kind.name):
            opened = Image.open(io.BytesIO(image), formats=[kind.plugin])
            _check_size(opened.size, rules)
        with _turn_of_large_images(opened.size):
            with _decoder_errors_named(image, kind.name):
                loaded = _load(opened, image, kind.name, rules)
            return _finish(loaded, image, rules, decoded)
    except MemoryError as error:
        raise ImageProblem("out_of_memory", f"not enough memory to decode this {kind.name}") from error


@contextlib.contextmanager
def _decoder_errors_named(data: bytes, name: str) -> Iterator[None]:
    """Turns whatever a decoder raises on broken data into an ImageProblem."""
    try:
        yield
    except Image.DecompressionBombError as error:
        raise ImageProblem("too_many_pixels", str(error)) from error
    except DamagedImage as error:
        words = f"this {name} is damaged: {error}"
        raise ImageProblem("truncated" if error.cut_off else "corrupt", words) from error
    except _DECODER_ERRORS as error:
        words = str(error).strip() or type(error).__name__
        if isinstance(error, Image.UnidentifiedImageError):  # its message is the address of a buffer
            words = "its header cannot be read"
        if "truncated" in words.lower() or sniff.is_cut_off(data, name):
            raise ImageProblem("truncated", f"this {name} ends before its image does ({words})") from error
        raise ImageProblem("corrupt", f"this {name} cannot be decoded: {words}") from error


def _identify(data: bytes, rules: ImageRules) -> sniff.Kind:
    """What `data` is, or an ImageProblem: everything that can be refused before a decoder is asked."""
    if not data:
        raise ImageProblem("empty", "the file has no bytes")
    if len(data) > rules.max_bytes:
        raise ImageProblem("too_many_bytes", f"{len(data)} bytes are more than max_bytes = {rules.max_bytes}")
    kind = sniff.sniff(data)
    if kind is None:
        raise ImageProblem("not_an_image", f"this is {sniff.guess_other(data)}")
    if not kind.plugin:
        raise ImageProblem("unsupported_format", f"this is a {kind.name}; formats that are read: {', '.join(READABLE)}")
    if kind.name == "jpeg" and (scans := sniff.jpeg_scans(data)) > _MAX_JPEG_SCANS:
        raise ImageProblem("too_many_scans", f"this JPEG has up to {scans} scans; {_MAX_JPEG_SCANS} are allowed")
    if kind.name == "webp" and (canvas := sniff.webp_canvas(data)):
        _check_size(canvas[:2], rules)  # here, since its decoder allocates the canvas when it is opened
        if canvas[2]:
            raise ImageProblem("animated", "this is an animated webp; only still images are used")
    if kind.name in ("png", "webp", "avif") and sniff.is_cut_off(data, kind.name):
        raise ImageProblem("truncated", f"this {kind.name} ends before its last part")
    if kind.name == "png" and sniff.png_is_damaged(data):
        raise ImageProblem("corrupt", "this png is damaged: a checksum is wrong")
    with _decoder_errors_named(data, kind.name):
        damage.check_file(data, kind.name)
    return kind


def _check_size(size: tuple[int, int], rules: ImageRules) -> None:
    width, height = size
    short, long = min(size), max(size)
    if width * height > rules.max_pixels:
        raise ImageProblem(
            "too_many_pixels", f"{width} x {height} pixels are more than max_pixels = {rules.max_pixels}"
        )
    if short < rules.min_side_px:
        raise ImageProblem("too_small", f"{width} x {height} pixels: a side is shorter than {rules.min_side_px}")
    if long > rules.max_side_px:
        raise ImageProblem("too_many_pixels", f"{width} x {height} pixels: a side is longer than {rules.max_side_px}")
    if long > rules.max_aspect * short:
        raise ImageProblem("too_elongated", f"{width} x {height} pixels: more elongated than {rules.max_aspect:g} to 1")


@contextlib.contextmanager
def _turn_of_large_images(size: tuple[int, int]) -> Iterator[None]:
    """Lets one large image at a time through, which bounds the memory of all threads together."""
    with _large_image if size[0] * size[1] > _LARGE_PIXELS else contextlib.nullcontext():
        yield


def _load(opened: Image.Image, data: bytes, kind: str, rules: ImageRules) -> _Loaded:
    """Decodes an opened image. Raises ImageProblem for what is refused, and the decoder's own errors."""
    if kind in ("gif", "png", "webp", "avif") and getattr(opened, "is_animated", False):
        raise ImageProblem("animated", f"this is an animated {kind}; only still images are used")
    loaded = _Loaded(opened, opened.size, kind, opened.mode, _orientation(opened))
    loaded.profile = opened.info.get("icc_profile")
    try:
        loaded.stated = encoding.stated(data, kind, opened)
    except encoding.HdrColour as error:
        raise ImageProblem("hdr", f"its colours are of high dynamic range ({error})") from error
    if kind == "jpeg":
        loaded.portable = sniff.jpeg_header(data).portable
        if rules.size_px is not None:
            # Half sizes cost a fraction to decode, and are means of areas. Kept at twice the final size or more, they
            # change nothing to be seen before Lanczos.
            shrink = (1 if rules.resample == "area" else 2) * rules.size_px / min(opened.size)
            opened.draft(None, (max(1, round(opened.width * shrink)), max(1, round(opened.height * shrink))))
    image = jpeg.decode(data, opened.mode, opened.size, opened.size != loaded.size) if kind == "jpeg" else None
    if image is None:
        opened.load()
        damage.check_pixels(opened, data, kind)
        image = opened
    if isinstance(image, TiffImagePlugin.TiffImageFile) and image.mode == "P":
        _widen_palette(image)
    if image.mode.startswith("I;16"):
        loaded.image, loaded.alpha = _grey_of_16_bits(image, loaded)
    elif (deep := _deep_png(data, image, loaded)) is not None:
        loaded.image, loaded.alpha = deep
    else:
        loaded.image, loaded.alpha = _simplify(image)
    turned = loaded.orientation >= 5
    if kind != "tiff" and loaded.orientation != 1:  # Pillow has turned a TIFF upright already
        loaded.image = loaded.image.transpose(_TURNS[loaded.orientation])
    if turned:
        loaded.size = (loaded.size[1], loaded.size[0])
    if kind == "tiff":
        loaded.size = loaded.image.size
    return loaded


def _orientation(image: Image.Image) -> int:
    """The EXIF (or XMP) orientation 1..8; 1 where there is none, or where the metadata cannot be read."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except _DECODER_ERRORS:
        return 1  # broken metadata is no reason to lose a picture
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _simplify(image: Image.Image) -> tuple[Image.Image, bool]:
    """A loaded image of any mode as L, RGB or CMYK, and whether it had transparent pixels."""
    if image.has_transparency_data and image.mode in ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa"):
        return _onto_white(image)
    if image.mode in ("L", "RGB", "CMYK"):
        return image, False
    if image.mode == "1":
        return image.convert("L"), False
    if image.mode in ("P", "RGBX", "YCbCr", "HSV"):
        return image.convert("RGB"), False
    raise ImageProblem("unsupported_format", f"pixels of the type {image.mode} (Pillow's name) have no defined colours")


def _widen_palette(image: TiffImagePlugin.TiffImageFile) -> None:
    """A TIFF's colour map has 16 bits; some writers store 8, which would be black: all values below 256, as libtiff has it."""
    colours = np.array(image.tag_v2.get(TiffImagePlugin.COLORMAP, ()), np.int64)
    if colours.size and colours.size % 3 == 0 and 0 < colours.max() < 256:
        image.putpalette(colours.reshape(3, -1).T.astype(np.uint8).tobytes())


def _grey_of_16_bits(image: Image.Image, loaded: _Loaded) -> tuple[Image.Image, bool]:
    """16-bit grey, whose full range is black to white, as 8 bits; converts `loaded.stated`, if there is one."""
    values = np.asarray(image).astype(np.uint16)
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        most = 2 ** int(image.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0]) - 1
        if most < 65535:
            values = (np.minimum(values, most).astype(np.uint32) * 65535 // most).astype(np.uint16)
        if image.tag_v2.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0:  # white is zero
            values = np.uint16(65535) - values
    if loaded.stated:
        grey = encoding.convert(values, loaded.stated)
        loaded.stated, loaded.converted = None, True
    else:
        grey = ((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
    clear = image.info.get("transparency")
    return _without_hidden(grey, values == clear if isinstance(clear, int) else None)


def _deep_png(data: bytes, image: Image.Image, loaded: _Loaded) -> tuple[Image.Image, bool] | None:
    """RGB of a PNG of 16 bits a channel whose lower bits matter: for its transparent colour, or its encoding.

    None for all other files: Pillow keeps the upper 8 bits of each channel, which is all that they need.
    """
    clear = image.info.get("transparency")
    if loaded.kind != "png" or image.mode != "RGB" or data[24] != 16 or not (clear or loaded.stated):
        return None
    values = _rgb16(data)
    if loaded.stated:
        pixels = encoding.convert(values, loaded.stated)
        loaded.stated, loaded.converted = None, True
    else:
        pixels = np.asarray(image).copy()
    return _without_hidden(pixels, (values == np.array(clear, np.uint16)).all(axis=2) if clear else None)


def _rgb16(data: bytes) -> np.ndarray:
    """uint16 (H, W, 3) of a PNG of 16-bit RGB."""
    values = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if values is None or values.dtype != np.uint16 or values.ndim != 3:
        raise OSError("its 16-bit pixels cannot be read")
    return values[..., 2::-1]


def _without_hidden(pixels: np.ndarray, hidden: np.ndarray | None) -> tuple[Image.Image, bool]:
    """Pixels, those that are hidden in white; a mask that hides everything is none."""
    if hidden is None or not hidden.any() or hidden.all():
        return Image.fromarray(pixels), False
    pixels[hidden] = 255
    return _unless_blank(Image.fromarray(pixels)), True


def _onto_white(image: Image.Image) -> tuple[Image.Image, bool]:
    """RGB of an image with transparency, laid onto white."""
    clear = image.info.get("transparency")
    if image.mode == "RGB" and not (isinstance(clear, tuple) and max(clear) <= 255):
        return image, False  # no colour of 8 bits
    rgba = image if image.mode == "RGBA" else image.convert("RGBA")
    least, most = rgba.getchannel("A").getextrema()
    if least == 255:
        return rgba.convert("RGB"), False
    if most == 0:  # a mask that no one set: what lies under it was meant to be seen
        return _unless_blank(rgba.convert("RGB")), False
    page = Image.new("RGB", rgba.size, "white")
    page.paste(rgba, mask=rgba)
    return _unless_blank(page), True


def _unless_blank(image: Image.Image) -> Image.Image:
    """Refuses what is of one colour only because of its transparency.

    A failure, and no score to filter by: such a sample teaches that a caption means white paper. Images that are of one
    colour without our doing stay; they are what they say.
    """
    extrema = np.array(image.getextrema()).reshape(-1, 2)  # of each channel, low and high
    if (extrema[:, 1] - extrema[:, 0]).max() <= _BLANK_LEVELS:
        raise ImageProblem("blank", "transparent parts on white (or a mask that hides all) leave nothing to be seen")
    return image


def _finish(loaded: _Loaded, source: bytes | None, rules: ImageRules, decoded: bool) -> Prepared:
    """Crops, resizes and converts a decoded source, and stores it: untouched if that is possible, else encoded anew."""
    width, height = loaded.size
    x, y, crop_width, crop_height = 0, 0, width, height
    if rules.crop == "center":
        crop_width = crop_height = min(width, height)
        x, y = (width - crop_width) // 2, (height - crop_height) // 2
    scale = min(1.0, (rules.size_px or min(loaded.size)) / min(crop_width, crop_height))
    size = (max(1, round(crop_width * scale)), max(1, round(crop_height * scale)))

    image = loaded.image
    resized, cropped = size != (crop_width, crop_height), (crop_width, crop_height) != (width, height)
    if resized:
        draft_x, draft_y = image.width / width, image.height / height
        box = (x * draft_x, y * draft_y, (x + crop_width) * draft_x, (y + crop_height) * draft_y)
        if rules.resample == "area":
            image = image.resize(size, Image.Resampling.BOX, box=box)
        else:  # first by whole factors with area means: never worse than area alone, and faster than Lanczos alone
            image = image.resize(size, Image.Resampling.LANCZOS, box=box, reducing_gap=1.0)
    elif cropped:
        image = image.crop((x, y, x + crop_width, y + crop_height))
    if loaded.converted:
        icc = "converted"
    elif loaded.stated and image.mode != "CMYK":
        image, icc = Image.fromarray(encoding.convert(np.asarray(image), loaded.stated)), "converted"
    else:
        image, icc = to_srgb(image, loaded.profile)

    content, plugin, options = _ENCODERS[rules.format]
    untouched = (
        source is not None
        and loaded.kind == content
        and loaded.mode in ("RGB", "L")
        and loaded.portable
        and loaded.orientation == 1
        and not (cropped or resized or loaded.alpha)
        and icc != "converted"
    )
    image = image if image.mode == "RGB" else image.convert("RGB")
    if untouched and source is not None:
        member = source
    else:
        image.info = {}  # or Pillow would write the source's profile and comments into the new file
        buffer = io.BytesIO()
        try:
            image.save(buffer, plugin, **options)
        except (OSError, ValueError) as error:  # WebP cannot hold every large picture
            raise ImageProblem("cannot_encode", f"it cannot be stored as {rules.format}: {error}") from error
        member = buffer.getvalue()
    pixels = _array(image) if untouched or rules.format == "png" else _decode(member) if decoded else None
    record = {
        "original_size": [width, height],
        "size": [image.width, image.height],
        "orientation": loaded.orientation,
        "crop": [x, y, crop_width, crop_height],
        "resized": resized,
        "reencoded": not untouched,
        "format": loaded.kind,
        "mode": loaded.mode,
        "alpha": loaded.alpha,
        "icc": icc,
    }
    return Prepared(member, record, pixels)


def _decode(member: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(member)) as image:
        image.load()
        return _array(image)


def _array(image: Image.Image) -> np.ndarray:
    """uint8 (H, W, 3), writable: the pixels of an RGB image, copied once where numpy would copy them three times."""
    try:
        cells = pa.array(image)
    except ValueError:  # a large image lies in several pieces
        return np.array(image)
    values = cells.flatten().to_numpy().reshape(image.height, image.width, 4)
    return np.asarray(cv2.cvtColor(values, cv2.COLOR_RGBA2RGB))
