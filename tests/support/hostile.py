"""Builds a folder of hostile files, and knows what must become of each."""

import base64
import io
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageCms
from skimage.color import rgb2lab

OK = "ok"
_ARITHMETIC = (  # 32 x 24 pixels, arithmetic-coded: no library at hand writes such a file
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAYEBQYFBAYGBQYHBwYIChAKCgkJChQODwwQFxQYGBcUFhYaHSUfGhsjHBYWICwgIyYnKSopGR8t"
    "MC0oMCUoKSj/2wBDAQcHBwoIChMKChMoGhYaKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCj/yQAR"
    "CAAYACADASIAAhEBAxEB/8wACgAQEAUBEBEF/9oADAMBAAIRAxEAPwD/ANhw3FzLozz8M4kZAIONsbemK0sSWTrgrf8ATFA8Ap+kwbsvtqv7"
    "FRGhzOsdkew4PeDBoZxC22rlZ7qETRpiV0k8XE24xwGT82sKZNJo7oxHf7FYrCc7/9k="
)


def photo(width: int = 96, height: int = 64) -> Image.Image:
    """A picture whose corners and sides differ, so that turns and swapped channels show."""
    y, x = np.mgrid[0:height, 0:width]
    red, green = 255 * x / max(1, width - 1), 255 * y / max(1, height - 1)
    blue = 120 + 80 * np.sin(x / 7) * np.cos(y / 5)
    return Image.fromarray(np.stack([red, green, blue], axis=-1).astype(np.uint8))


def encoded(image: Image.Image, plugin: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, plugin, **options)
    return buffer.getvalue()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *, bits: int = 8, colour: int = 0, rows: int = 0, extra: bytes = b"") -> bytes:
    """A PNG whose pixels are all zero bits, of which only `rows` rows are really there. colour: 0 grey, 2 RGB, 6 RGBA."""
    row = 1 + (width * bits * {0: 1, 2: 3, 6: 4}[colour] + 7) // 8
    packer = zlib.compressobj(1)
    block = bytes(row * 64)
    data = b"".join(packer.compress(block[: row * min(64, rows - at)]) for at in range(0, rows, 64)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    chunks = png_chunk(b"IHDR", header) + extra + png_chunk(b"IDAT", data) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def swapped_profile() -> bytes:
    """A proper RGB profile in which red and blue have changed places."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile.replace(b"rXYZ", b"!XYZ").replace(b"bXYZ", b"rXYZ").replace(b"!XYZ", b"bXYZ")


def profile(space: bytes, connection: bytes, **tags: bytes) -> bytes:
    """An ICC profile of the given colour and connection spaces with these tags, and nothing else."""
    white = struct.pack(">iii", 63190, 65536, 54061)  # D50
    contents = {"wtpt": b"XYZ \0\0\0\0" + white, "desc": b"desc" + bytes(86), **tags}
    table, data = struct.pack(">I", len(contents)), b""
    for name, content in contents.items():
        table += name.encode() + struct.pack(">II", 132 + 12 * len(contents) + len(data), len(content))
        data += content + bytes(-len(content) % 4)
    header = bytes(4) + b"\x02\x40\0\0" + (b"prtr" if space == b"CMYK" else b"mntr") + space + connection
    header += bytes(12) + b"acsp" + bytes(28) + white
    return struct.pack(">I", 128 + len(table) + len(data)) + bytes(4) + header[4:].ljust(120, b"\0") + table + data


def cmyk_profile() -> bytes:
    """A profile of an ideal press: its colours at the 16 corners of CMYK are those of plain subtraction."""
    inks = np.array(np.meshgrid([0, 1], [0, 1], [0, 1], [0, 1], indexing="ij")).reshape(4, 16).T.astype(float)
    lab = rgb2lab((1 - inks[:, :3]) * (1 - inks[:, 3:]))
    corners = np.stack([lab[:, 0] * 2.55, lab[:, 1] + 128, lab[:, 2] + 128], -1).clip(0, 255).round().astype(np.uint8)
    identity = struct.pack(">9i", *(65536 if i % 4 == 0 else 0 for i in range(9)))
    ramp = bytes(range(256))
    table = b"mft1\0\0\0\0\x04\x03\x02\0" + identity + ramp * 4 + corners.tobytes() + ramp * 3
    return profile(b"CMYK", b"Lab ", A2B0=table)


def grey_profile(gamma: float) -> bytes:
    return profile(b"GRAY", b"XYZ ", kTRC=b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)))


def with_orientation(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def _animation(plugin: str) -> bytes:
    return encoded(photo(), plugin, save_all=True, append_images=[photo().rotate(180)], duration=100)


def _bomb_jpeg() -> bytes:
    data = encoded(photo(), "JPEG")
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", 65500, 65500) + data[at + 4 :]


def _bomb_gif() -> bytes:
    data = encoded(photo(), "GIF")
    return data[:6] + struct.pack("<HH", 65535, 65535) + data[10:]


def _bomb_bmp() -> bytes:
    data = encoded(photo(), "BMP")
    return data[:18] + struct.pack("<ii", 60000, 60000) + data[26:]


def _bomb_tiff() -> bytes:
    """Width and height of the first directory set to 60,000, as 32-bit values."""
    data = bytearray(encoded(photo(), "TIFF"))
    at = struct.unpack_from("<I", data, 4)[0]
    for entry in range(at + 2, at + 2 + 12 * struct.unpack_from("<H", data, at)[0], 12):
        if struct.unpack_from("<H", data, entry)[0] in (256, 257):
            struct.pack_into("<HII", data, entry + 2, 4, 1, 60000)
    return bytes(data)


def _bomb_webp() -> bytes:
    body = b"VP8X" + struct.pack("<I", 10) + bytes(4) + (16382).to_bytes(3, "little") * 2
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def _many_scans(progressive: bool) -> bytes:
    data = encoded(photo(), "JPEG", progressive=progressive)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * 300 + b"\xff\xd9"


def _ycck() -> bytes:
    """A CMYK JPEG whose Adobe marker says that it is YCCK: other colours, the same decoder as real ones."""
    data = encoded(photo().convert("CMYK"), "JPEG")
    at = data.index(b"Adobe") + 11
    return data[:at] + b"\x02" + data[at + 1 :]


def _polyglot() -> bytes:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("evil.sh", "echo evil")
    return encoded(photo(), "JPEG") + archive.getvalue()


def _rgb16() -> bytes:
    return bytes(cv2.imencode(".png", np.asarray(photo()).astype(np.uint16) * 257)[1])


def _grey16(plugin: str) -> bytes:
    return encoded(Image.fromarray(np.asarray(photo().convert("L")).astype(np.uint16) * 257), plugin)


def images() -> dict[str, tuple[bytes, str]]:
    """name: (content, what becomes of it), for everything that is a plain file."""
    jpg, whole_png, webp = encoded(photo(), "JPEG"), encoded(photo(), "PNG"), encoded(photo(), "WEBP")
    gif, tiff, avif = encoded(photo(), "GIF"), encoded(photo(), "TIFF"), encoded(photo(), "AVIF")
    palette, rgba = photo().quantize(16), photo().convert("RGBA")
    rgba.putalpha(photo().convert("L"))
    zeros = zlib.compress(bytes(100_000_000), 1)
    found: dict[str, tuple[bytes, str]] = {
        # unusual, but images
        "progressive.jpg": (encoded(photo(), "JPEG", progressive=True), OK),
        "arithmetic.jpg": (base64.b64decode(_ARITHMETIC), "too_small"),
        "cmyk.jpg": (encoded(photo().convert("CMYK"), "JPEG"), OK),
        "ycck.jpg": (_ycck(), OK),
        "grey.jpg": (encoded(photo().convert("L"), "JPEG"), OK),
        "grey16.png": (_grey16("PNG"), OK),
        "grey16.tiff": (_grey16("TIFF"), OK),
        "rgb16.png": (_rgb16(), OK),
        "one_bit.png": (encoded(photo().convert("1"), "PNG"), OK),
        "one_bit.tif": (encoded(photo().convert("1"), "TIFF", compression="group4"), OK),
        "palette.png": (encoded(palette, "PNG"), OK),
        "palette_transparent.png": (encoded(palette, "PNG", transparency=3), OK),
        "rgb_transparent.png": (encoded(photo(), "PNG", transparency=(0, 0, 120)), OK),
        "rgba.png": (encoded(rgba, "PNG"), OK),
        "rgba.webp": (encoded(rgba, "WEBP"), OK),
        "grey_alpha.png": (encoded(rgba.convert("LA"), "PNG"), OK),
        "still.gif": (gif, OK),
        "still.webp": (webp, OK),
        "still.bmp": (encoded(photo(), "BMP"), OK),
        "still.avif": (avif, OK),
        "two_pages.tif": (encoded(photo(), "TIFF", save_all=True, append_images=[photo()]), OK),
        "two_pictures.jpg": (encoded(photo(), "MPO", save_all=True, append_images=[photo()]), OK),
        "broken_exif.jpg": (encoded(photo(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff garbage"), OK),
        "orientation_99.jpg": (encoded(photo(), "JPEG", exif=with_orientation(99)), OK),
        "icc_corrupt.jpg": (encoded(photo(), "JPEG", icc_profile=b"\0\1\2" * 100), OK),
        "icc_swapped.jpg": (encoded(photo(), "JPEG", icc_profile=swapped_profile()), OK),
        "icc_of_other_space.jpg": (encoded(photo().convert("L"), "JPEG", icc_profile=swapped_profile()), OK),
        "garbage_after_end.jpg": (jpg + os.urandom(1) * 5000, OK),
        "polyglot_zip.jpg": (_polyglot(), OK),
        "png_called.jpg": (whole_png, OK),
        "jpg_called.webp": (jpg, OK),
        "SHOUTING.JPG": (jpg, OK),
        # far too much
        "bomb_header.png": (png(50_000, 50_000), "too_many_pixels"),
        "bomb_zeros.png": (png(30_000, 30_000, bits=1, rows=30_000), "too_many_pixels"),
        "bomb_text.png": (png(64, 64, rows=64, extra=png_chunk(b"zTXt", b"Comment\0\0" + zeros)), "corrupt"),
        "bomb_profile.png": (png(64, 64, rows=64, extra=png_chunk(b"iCCP", b"icc\0\0" + zeros)), "corrupt"),
        "bomb.jpg": (_bomb_jpeg(), "too_many_pixels"),
        "bomb.gif": (_bomb_gif(), "too_many_pixels"),
        "bomb.bmp": (_bomb_bmp(), "too_many_pixels"),
        "bomb.tiff": (_bomb_tiff(), "too_many_pixels"),
        "bomb.webp": (_bomb_webp(), "too_many_pixels"),
        "bomb_scans.jpg": (_many_scans(progressive=True), "too_many_scans"),
        "repeated_scan.jpg": (_many_scans(progressive=False), "corrupt"),  # decoders take one scan of such files
        "wide_20000.png": (png(20_000, 2_001, bits=1, rows=2_001), "too_many_pixels"),
        "largest_allowed.png": (png(8192, 8192, colour=2, rows=8192), OK),
        "largest_with_alpha.png": (png(8192, 8192, colour=6, rows=8192), "blank"),  # black under a mask that hides all
        "pq.png": (png(64, 64, colour=2, rows=64, extra=png_chunk(b"cICP", bytes([9, 16, 0, 1]))), "hdr"),
        # far too little, or of an odd shape
        "one_pixel.png": (encoded(photo(1, 1), "PNG"), "too_small"),
        "20000x2.png": (encoded(photo(20_000, 2), "PNG"), "too_small"),
        "2x20000.png": (encoded(photo(2, 20_000), "PNG"), "too_small"),
        "strip.png": (encoded(photo(2000, 40), "PNG"), "too_elongated"),
        "empty.jpg": (b"", "empty"),
        # cut off
        **{f"cut_{at}.jpg": (jpg[:at], "truncated") for at in (4, 20, 200, len(jpg) // 2, len(jpg) - 2)},
        **{f"cut_{at}.png": (whole_png[:at], "truncated") for at in (20, 60, len(whole_png) // 2, len(whole_png) - 9)},
        **{f"cut_{at}.webp": (webp[:at], "truncated") for at in (18, 60, len(webp) - 1)},
        "cut.gif": (gif[: len(gif) // 2], "truncated"),
        "cut.tif": (tiff[: len(tiff) // 2], "truncated"),
        "cut.avif": (avif[: len(avif) // 2], "truncated"),
        "missing_rows.png": (png(64, 64, rows=20), "truncated"),  # a whole file; Pillow makes the rows black
        "signature_only.jpg": (b"\xff\xd8\xff", "truncated"),
        # animated
        "animated.gif": (_animation("GIF"), "animated"),
        "animated.webp": (_animation("WEBP"), "animated"),
        "animated.png": (_animation("PNG"), "animated"),
        "animated.avif": (_animation("AVIF"), "animated"),
        # something else
        "drawing.png": (b"<?xml version='1.0'?>\n<svg xmlns='http://www.w3.org/2000/svg'/>", "unsupported_format"),
        "paper.jpg": (b"%PDF-1.7\n" + bytes(500), "unsupported_format"),
        "postscript.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "unsupported_format"),
        "phone.heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99), "unsupported_format"),
        "float.tiff": (encoded(photo().convert("F"), "TIFF"), "unsupported_format"),
        "not_found.jpg": (b"<!DOCTYPE html><html><body>404</body></html>", "not_an_image"),
        "archive.jpg": (b"PK\x03\x04" + bytes(100), "not_an_image"),
        "noise.jpg": (bytes(range(7, 251)) * 40, "not_an_image"),
        "damaged_pixels.png": (whole_png[:300] + bytes(8) + whole_png[308:], "corrupt"),
        "damaged_header.png": (whole_png[:8] + b"\xff" * 40 + whole_png[48:], "truncated"),
    }
    for orientation in range(1, 9):
        found[f"turned_{orientation}.jpg"] = (encoded(photo(), "JPEG", exif=with_orientation(orientation)), OK)
    return found


# name of the image: (suffix and content of the file beside it, what becomes of it)
CAPTIONS: dict[str, tuple[str, bytes, str]] = {
    "caption_latin1": (".txt", "ein Käfer".encode("latin-1"), "caption_not_utf8"),
    "caption_utf16": (".txt", "a beetle".encode("utf-16"), OK),
    "caption_nul": (".txt", b"a\0beetle", "caption_not_utf8"),
    "caption_huge": (".txt", b"beetle " * 20_000, "caption_too_long"),
    "caption_bom": (".txt", b"\xef\xbb\xbfa beetle\r\n", OK),
    "caption_empty": (".txt", b"", OK),
    "json_list": (".json", b'["a beetle"]', "bad_metadata"),
    "json_broken": (".json", b'{"caption": "a beet', "bad_metadata"),
    "json_deep": (".json", b'{"a":' * 100_000, "bad_metadata"),
    "json_surrogate": (".json", b'{"caption": "a", "note": "\\ud800"}', OK),
    "json_object_caption": (".json", b'{"caption": {"en": "a beetle", "fi": "kovakuoriainen"}}', "bad_metadata"),
    "json_nan": (".json", b'\xef\xbb\xbf{"TEXT": "a beetle", "score": NaN, "big": 1e999}', OK),
    "json_number": (".json", b'{"caption": 7}', OK),
    "json_huge": (".json", b'{"caption": "a"' + b" " * (2 << 20) + b"}", "bad_metadata"),
}

# Names that are hard to keep apart, to print, or to hand to a shell; the last is no UTF-8.
NAMES = (
    *(b"a b.jpg", b"a_b.jpg", b"a-b.jpg", b"case.jpg", b"CASE.jpg", b"case.jpeg", b"deep/er.jpg", b"deep_er.jpg"),
    *(b"-rf.jpg", b"$(touch evil).jpg", b"new\nline.jpg", b"two..dots.jpg", b".jpg", b"%00.jpg", b"back\\slash.jpg"),
    *("\u7167\u7247\u4e00.jpg".encode(), "\u7167\u7247\u4e8c.jpg".encode(), "\u202egnp.jpg".encode()),
    *(b"long" * 62 + b"one.jpg", b"long" * 62 + b"two.jpg", b"not\xff\xfeutf8.jpg"),
)


def build(folder: Path) -> dict[bytes, str]:
    """Fills `folder`; returns what must become of every input: its reason, or OK, by its path."""
    expected: dict[bytes, str] = {}
    jpg = encoded(photo(), "JPEG")

    def put(path: bytes, outcome: str, content: bytes | None = jpg) -> Path:
        target = folder / os.fsdecode(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        if content is not None:
            target.write_bytes(content)
        expected[path] = outcome
        return target

    for name, (content, outcome) in images().items():
        put(name.encode(), outcome, content)
    for name, (suffix, content, outcome) in CAPTIONS.items():
        put(f"{name}.jpg".encode(), outcome)
        (folder / f"{name}{suffix}").write_bytes(content)
    for path in NAMES:
        put(path, OK)

    outside = folder.parent / "outside"
    outside.mkdir()
    (outside / "linked.jpg").write_bytes(jpg)
    special: dict[bytes, tuple[str, Callable[[Path], object]]] = {
        b"folder.jpg": ("not_a_file", Path.mkdir),
        b"pipe.jpg": ("not_a_file", os.mkfifo),
        b"dangling.jpg": ("broken_link", lambda path: path.symlink_to("nowhere.jpg")),
        b"circle.jpg": ("broken_link", lambda path: path.symlink_to("circle.jpg")),
        b"linked_folder.jpg": ("not_a_file", lambda path: path.symlink_to(outside)),
        b"device.jpg": ("not_a_file", lambda path: path.symlink_to("/dev/zero")),
        b"outside.jpg": (OK, lambda path: path.symlink_to(outside / "linked.jpg")),
    }
    for path, (outcome, make) in special.items():
        make(put(path, outcome, None))
    put(b"folder.jpg/inside.jpg", OK)
    (folder / "around").symlink_to(folder)  # a link in a circle
    put(b"unreadable.jpg", OK if os.geteuid() == 0 else "unreadable").chmod(0)
    with put(b"ten_gigabytes.jpg", "too_many_bytes").open("r+b") as file:
        file.truncate(10 << 30)  # sparse
    put(b"caption_pipe.jpg", "caption_unreadable")
    os.mkfifo(folder / "caption_pipe.txt")
    put(b"caption_folder.jpg", "caption_unreadable")
    (folder / "caption_folder.txt").mkdir()
    for ignored in ("notes.md", "Thumbs.db", "archive.zip", "orphan.txt"):
        (folder / ignored).write_bytes(b"not an image")
    return expected
