"""ICC profiles: which ones are sRGB already, and the conversion of the others."""

import functools
import io

import numpy as np
from PIL import Image, ImageCms

MAX_PROFILE_BYTES = 4 << 20
_SPACE_OF_MODE = {"RGB": b"RGB ", "L": b"GRAY", "CMYK": b"CMYK"}
_SAME_COLOUR = 3  # levels of 255; published variants of sRGB differ by less
_SRGB = ImageCms.createProfile("sRGB")


def to_srgb(image: Image.Image, profile: bytes | None) -> tuple[Image.Image, str]:
    """The image (mode L, RGB or CMYK) in sRGB, and what was done with its profile.

    "none": there is no profile. "srgb": it says sRGB, nothing to do. "converted": the pixels were converted.
    "ignored": the profile is broken, of another colour space than the pixels, or absurdly large.
    Without a conversion, a CMYK image stays CMYK.
    """
    if not profile:
        return image, "none"
    if len(profile) > MAX_PROFILE_BYTES or profile[36:40] != b"acsp" or profile[16:20] != _SPACE_OF_MODE[image.mode]:
        return image, "ignored"
    transform = _transform(profile, image.mode)
    if not isinstance(transform, ImageCms.ImageCmsTransform):
        return image, transform
    try:
        return ImageCms.applyTransform(image, transform) or image, "converted"
    except ImageCms.PyCMSError:
        return image, "ignored"


@functools.lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | str:
    """The transform of a profile to sRGB; "srgb" if it changes (next to) nothing; "ignored" if it cannot be used."""
    try:
        source = ImageCms.getOpenProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(source, _SRGB, mode, "RGB", ImageCms.Intent.PERCEPTUAL)
        if mode == "CMYK":
            return transform
        probe = _probe(mode)
        converted = ImageCms.applyTransform(probe, transform) or probe
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return "ignored"
    change = np.abs(np.asarray(converted, np.int16) - np.asarray(probe.convert("RGB"), np.int16)).max()
    return "srgb" if change <= _SAME_COLOUR else transform


def _probe(mode: str) -> Image.Image:
    """A small image whose colours stand for all of them: a 9 x 9 x 9 grid, or all greys."""
    if mode == "L":
        return Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    steps = np.linspace(0, 255, 9).round().astype(np.uint8)
    return Image.fromarray(np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1).reshape(27, 27, 3))
