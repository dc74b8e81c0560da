"""Colours that a file states without an ICC profile: where it says so, what that means, and the conversion to sRGB.

PNG: cICP, else (without iCCP or sRGB) cHRM and gAMA. AVIF: the box `colr` of type nclx. Any: EXIF that says Adobe RGB, as
cameras do (ColorSpace 65535, interoperability R03). What wins is what these formats say: cICP before a profile, a profile
before everything else. PQ and HLG have no look of their own in sRGB, and are refused.

Two readings of ours, both as screens show such files: gAMA 0.45455 with sRGB's primaries is sRGB (its chunk's own advice),
and so are the curves of BT.709 and BT.601 with sRGB's primaries.
"""

import functools
import struct
from dataclasses import dataclass

import numpy as np
from PIL import ExifTags, Image

from extract.images import sniff

_D65 = (0.3127, 0.3290)
SRGB_PRIMARIES = (0.64, 0.33, 0.30, 0.60, 0.15, 0.06, *_D65)
_ADOBE_PRIMARIES = (0.64, 0.33, 0.21, 0.71, 0.15, 0.06, *_D65)
_ADOBE_GAMMA = 563 / 256
_PRIMARIES = {  # of H.273: x and y of red, green, blue and white
    1: SRGB_PRIMARIES,
    2: SRGB_PRIMARIES,  # unspecified
    4: (0.67, 0.33, 0.21, 0.71, 0.14, 0.08, 0.310, 0.316),
    5: (0.64, 0.33, 0.29, 0.60, 0.15, 0.06, *_D65),
    6: (0.630, 0.340, 0.310, 0.595, 0.155, 0.070, *_D65),
    7: (0.630, 0.340, 0.310, 0.595, 0.155, 0.070, *_D65),
    8: (0.681, 0.319, 0.243, 0.692, 0.145, 0.049, 0.310, 0.316),
    9: (0.708, 0.292, 0.170, 0.797, 0.131, 0.046, *_D65),
    11: (0.680, 0.320, 0.265, 0.690, 0.150, 0.060, 0.314, 0.351),
    12: (0.680, 0.320, 0.265, 0.690, 0.150, 0.060, *_D65),
    22: (0.630, 0.340, 0.295, 0.605, 0.155, 0.077, *_D65),
}
_TRANSFERS: dict[int, str | float] = {  # of H.273; a number is a power
    1: "bt709",
    2: "srgb",  # unspecified
    4: 2.2,
    5: 2.8,
    6: "bt709",
    8: 1.0,
    11: "bt709",
    13: "srgb",
    14: "bt709",
    15: "bt709",
}
_HDR = {16: "PQ", 18: "HLG"}
_SAME_PRIMARIES = 0.005
_USUAL_GAMMA = (0.45, 0.46)
_BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
_BAND_PIXELS = 1 << 18
_EXIF_COLOUR_SPACE, _INTEROPERABILITY_INDEX = 0xA001, 1


class HdrColour(Exception):
    """Colours of high dynamic range: PQ or HLG."""


@dataclass(frozen=True)
class Encoding:
    """How numbers stand for colours."""

    primaries: tuple[float, ...]
    """x and y of red, green, blue and white."""
    transfer: str | float
    """From code to light: "srgb", "bt709", or a power."""


def stated(data: bytes, kind: str, image: Image.Image) -> Encoding | None:
    """What an opened file states beside, or above, its ICC profile; None where that is sRGB, nothing, or the profile counts.

    Raises HdrColour.
    """
    profile = image.info.get("icc_profile")
    if isinstance(profile, bytes):
        _refuse_hdr_profile(profile)
    encoding = None
    if kind == "png":
        encoding, overrides = _of_png(data)
        if overrides:
            return _unless_srgb(encoding)
    elif kind == "avif" and (codes := _nclx(data)):
        encoding = _of_codes(*codes)
    if profile:
        return None
    if encoding is None and _exif_says_adobe(image):
        encoding = Encoding(_ADOBE_PRIMARIES, _ADOBE_GAMMA)
    return _unless_srgb(encoding)


def _unless_srgb(encoding: Encoding | None) -> Encoding | None:
    if encoding is None:
        return None
    of_srgb = max(abs(a - b) for a, b in zip(encoding.primaries, SRGB_PRIMARIES, strict=True)) <= _SAME_PRIMARIES
    return None if of_srgb and encoding.transfer in ("srgb", "bt709") else encoding


def _of_codes(primaries: int, transfer: int) -> Encoding | None:
    """By the code points of H.273; None for those that are not known."""
    if transfer in _HDR:
        raise HdrColour(_HDR[transfer])
    if primaries not in _PRIMARIES or transfer not in _TRANSFERS:
        return None
    return Encoding(_PRIMARIES[primaries], _TRANSFERS[transfer])


def _of_png(data: bytes) -> tuple[Encoding | None, bool]:
    """What a PNG's chunks state, and whether that comes before a profile."""
    chunks: dict[bytes, bytes] = {}
    for kind, start, end in sniff.png_chunks(data):
        if kind == b"IDAT":
            break
        if kind in (b"cICP", b"sRGB", b"gAMA", b"cHRM"):
            chunks.setdefault(kind, data[start:end])
    codes = chunks.get(b"cICP", b"")
    if len(codes) == 4:
        return _of_codes(codes[0], codes[1]), True
    if b"sRGB" in chunks:
        return None, False
    primaries = _chromaticities(chunks.get(b"cHRM", b"")) or SRGB_PRIMARIES
    gamma = struct.unpack(">I", chunks[b"gAMA"])[0] / 100_000 if len(chunks.get(b"gAMA", b"")) == 4 else 0.0
    if not 0.1 <= gamma <= 10:  # none, or nonsense
        return Encoding(primaries, "srgb"), False
    usual = _USUAL_GAMMA[0] <= gamma <= _USUAL_GAMMA[1]
    if usual and max(abs(a - b) for a, b in zip(primaries, SRGB_PRIMARIES, strict=True)) <= _SAME_PRIMARIES:
        return None, False
    return Encoding(primaries, 1 / gamma), False


def _chromaticities(content: bytes) -> tuple[float, ...] | None:
    """x and y of red, green, blue and white by a cHRM chunk; None if they span no triangle."""
    if len(content) != 32:
        return None
    white_x, white_y, *others = (value / 100_000 for value in struct.unpack(">8I", content))
    primaries = (*others, white_x, white_y)
    if any(y <= 0 or x + y > 1.001 for x, y in zip(primaries[::2], primaries[1::2], strict=True)):
        return None
    return primaries if abs(np.linalg.det(_columns(primaries))) > 1e-3 else None


def _nclx(data: bytes) -> tuple[int, int] | None:
    """Primaries and transfer of an AVIF's first colour box of type nclx."""
    for kind, start, end in sniff.boxes(data):
        if kind != b"meta":
            continue
        for inner, begin, finish in sniff.boxes(data, start + 4, end):
            if inner != b"iprp":
                continue
            for container, first, last in sniff.boxes(data, begin, finish):
                if container != b"ipco":
                    continue
                for name, at, _ in sniff.boxes(data, first, last):
                    if name == b"colr" and data[at : at + 4] == b"nclx":
                        primaries, transfer = struct.unpack_from(">HH", data, at + 4)
                        return primaries, transfer
    return None


def _exif_says_adobe(image: Image.Image) -> bool:
    try:
        exif = image.getexif()
        space = exif.get_ifd(ExifTags.IFD.Exif).get(_EXIF_COLOUR_SPACE)
        if space == 2:  # not of the standard, but written for Adobe RGB
            return True
        if space != 0xFFFF:
            return False
        index = exif.get_ifd(ExifTags.IFD.Interop).get(_INTEROPERABILITY_INDEX, "")
    except Exception:  # whatever broken metadata may raise: it is no reason to lose an image
        return False
    return str(index).strip("\0 ") == "R03"


def _refuse_hdr_profile(profile: bytes) -> None:
    """Raises HdrColour for a profile whose tag `cicp` says PQ or HLG."""
    count = int.from_bytes(profile[128:132], "big")
    for at in range(132, 132 + 12 * min(count, 100), 12):
        if profile[at : at + 4] == b"cicp":
            offset = int.from_bytes(profile[at + 4 : at + 8], "big")
            transfer = profile[offset + 9 : offset + 10]
            if transfer and transfer[0] in _HDR:
                raise HdrColour(_HDR[transfer[0]])


# ---- conversion ------------------------------------------------------------------------------------------------------


def convert(values: np.ndarray, encoding: Encoding) -> np.ndarray:
    """uint8 sRGB of uint8 or uint16 values, grey (H, W) or RGB (H, W, 3)."""
    light = _light_of_codes(encoding.transfer, values.dtype.itemsize)
    if values.ndim == 2:
        return _codes_of_light(light)[values]
    matrix = to_srgb_matrix(encoding.primaries).astype(np.float32)
    result = np.empty(values.shape, np.uint8)
    rows = max(1, _BAND_PIXELS // values.shape[1])
    for top in range(0, len(values), rows):
        result[top : top + rows] = _codes_of_light(light[values[top : top + rows]] @ matrix.T)
    return result


def to_srgb_matrix(primaries: tuple[float, ...]) -> np.ndarray:
    """3 x 3, from linear RGB of these primaries to linear sRGB; whites by Bradford's adaptation."""
    source, target = (_to_xyz(values) for values in (primaries, SRGB_PRIMARIES))
    white, wanted = (_BRADFORD @ matrix.sum(axis=1) for matrix in (source, target))
    adaptation = np.linalg.inv(_BRADFORD) @ np.diag(wanted / white) @ _BRADFORD
    return np.asarray(np.linalg.inv(target) @ adaptation @ source)


def _columns(primaries: tuple[float, ...]) -> np.ndarray:
    """XYZ of red, green and blue as columns, each with Y = 1."""
    pairs = zip(primaries[:6:2], primaries[1:6:2], strict=True)
    return np.array([[x / y, 1.0, (1 - x - y) / y] for x, y in pairs]).T


def _to_xyz(primaries: tuple[float, ...]) -> np.ndarray:
    x, y = primaries[6:]
    columns = _columns(primaries)
    return np.asarray(columns * np.linalg.solve(columns, np.array([x / y, 1.0, (1 - x - y) / y])))


@functools.lru_cache(maxsize=16)
def _light_of_codes(transfer: str | float, bytes_per_value: int) -> np.ndarray:
    """float32: the light of each code, 0..1."""
    code = np.linspace(0, 1, 256**bytes_per_value)
    if transfer == "srgb":
        light = np.where(code <= 0.04045, code / 12.92, ((code + 0.055) / 1.055) ** 2.4)
    elif transfer == "bt709":
        light = np.where(code < 0.081, code / 4.5, ((code + 0.099) / 1.099) ** (1 / 0.45))
    else:
        light = code ** float(transfer)
    return light.astype(np.float32)


def _codes_of_light(light: np.ndarray) -> np.ndarray:
    light = light.clip(0, 1)
    code = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** np.float32(1 / 2.4) - 0.055)
    return np.rint(255 * code).astype(np.uint8)
