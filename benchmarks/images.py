"""What images and maps cost: preparing images of several kinds, and PNG encoders for the four maps.

    python -m benchmarks.images [--seconds 1.0] [--size 512]

One core, one thread. Pictures are scikit-image's photographs; the maps are made from them, as smooth and as busy as
those of estimators: depth (16 bit), normals (RGB), segments (16 bit), lines (8 bit). Milliseconds are medians.
"""

import argparse
import io
import statistics
import time
from collections.abc import Callable
from functools import partial

import cv2
import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table
from skimage import data as photographs
from skimage.segmentation import felzenszwalb

from extract.images.prepare import ImageRules, prepare
from shards.intrinsics import encode_png, order_segments


def milliseconds(call: Callable[[], object], seconds: float) -> float:
    """The median time of one call, of as many as fit into `seconds` (at least three)."""
    call()
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def mean_milliseconds(call: Callable[[np.ndarray], object], values: list[np.ndarray], seconds: float) -> float:
    """The mean over `values` of the median time of `call` on each."""
    return statistics.mean(milliseconds(partial(call, value), seconds / len(values)) for value in values)


def encoded(image: Image.Image, plugin: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, plugin, **options)
    return buffer.getvalue()


def maps_of(photo: np.ndarray) -> dict[str, np.ndarray]:
    """Stored forms of four maps (H, W[, 3]) that look like those of a photograph (H, W, 3)."""
    grey = cv2.cvtColor(photo, cv2.COLOR_RGB2GRAY)
    smooth = cv2.bilateralFilter(grey.astype(np.float32), 9, 30, 9) / 255
    depth = (1 + smooth * 60000 + np.linspace(0, 5000, grey.shape[0])[:, None]).clip(1, 65534)
    normal = np.dstack(
        [cv2.Sobel(smooth, cv2.CV_32F, 1, 0), -cv2.Sobel(smooth, cv2.CV_32F, 0, 1), np.full_like(smooth, 0.3)]
    )
    normal /= np.linalg.norm(normal, axis=2, keepdims=True)
    edges = cv2.absdiff(cv2.GaussianBlur(grey, (0, 0), 1), cv2.GaussianBlur(grey, (0, 0), 2)).astype(np.float32)
    return {
        "depth": depth.astype(np.uint16),
        "normal": np.rint(127.5 * (normal + 1)).astype(np.uint8),
        "segmentation": order_segments(felzenszwalb(photo, scale=300, sigma=0.8, min_size=200) + 1),
        "line": np.rint(255 * edges / max(1.0, float(edges.max()))).astype(np.uint8),
    }


def with_cv2(*options: int) -> Callable[[np.ndarray], bytes]:
    return lambda values: bytes(
        cv2.imencode(".png", values if values.ndim == 2 else values[..., ::-1], list(options))[1]
    )


def with_pillow(level: int) -> Callable[[np.ndarray], bytes]:
    return lambda values: encoded(Image.fromarray(values), "PNG", compress_level=level)


LEVEL, STRATEGY, FILTER = cv2.IMWRITE_PNG_COMPRESSION, cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_FILTER
RLE = cv2.IMWRITE_PNG_STRATEGY_RLE
ENCODERS: dict[str, Callable[[np.ndarray], bytes]] = {
    "Pillow, level 6 (its default)": with_pillow(6),
    "Pillow, level 1": with_pillow(1),
    "cv2, level 6": with_cv2(LEVEL, 6),
    "cv2, level 1": with_cv2(LEVEL, 1),
    "cv2, its default": with_cv2(),
    "cv2, run lengths, all filters": with_cv2(LEVEL, 1, STRATEGY, RLE),
    "cv2, run lengths, average": with_cv2(LEVEL, 1, STRATEGY, RLE, FILTER, cv2.IMWRITE_PNG_FILTER_AVG),
    "ours (cv2, run lengths, up)": encode_png,
}


def compare_encoders(photos: list[np.ndarray], seconds: float) -> Table:
    """Each encoder on the maps of each photograph: milliseconds and kilobytes of one sample's map, and of all four."""
    samples = [maps_of(photo) for photo in photos]
    table = Table("PNG encoder", *samples[0], "all four", "reading them", title="Maps: ms to write (KB); ms to read")
    for name, encode in ENCODERS.items():
        cells, writing_ms, reading_ms, size_kb = [], 0.0, 0.0, 0.0
        for kind in samples[0]:
            maps = [sample[kind] for sample in samples]
            files = [np.frombuffer(encode(values), np.uint8) for values in maps]
            ms = mean_milliseconds(encode, maps, seconds)
            kb = statistics.mean(len(file) for file in files) / 1000
            cells.append(f"{ms:.1f} ({kb:.0f})")
            writing_ms, size_kb = writing_ms + ms, size_kb + kb
            reading_ms += mean_milliseconds(lambda file: cv2.imdecode(file, cv2.IMREAD_UNCHANGED), files, seconds)
        table.add_row(name, *cells, f"{writing_ms:.1f} ({size_kb:.0f})", f"{reading_ms:.1f}")
    return table


def plainly_decoded(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)))


def compare_sources(photo: np.ndarray, size_px: int, seconds: float) -> Table:
    """`prepare` on files of several kinds and sizes, beside plain decoding by Pillow."""
    table = Table(
        "source", "prepare, ms", "decode alone, ms", "ratio", title=f"Preparing images for {size_px} px (jpg)"
    )
    picture = Image.fromarray(photo)
    sides = {"at size": size_px, "2x": 2 * size_px, "phone": 3000}
    cases: dict[str, bytes | np.ndarray] = {f"pixels at size ({size_px})": photo}
    for name, side in sides.items():
        large = picture.resize((side * 4 // 3, side), Image.Resampling.BICUBIC)
        cases[f"jpeg, {name} ({large.width} x {large.height})"] = encoded(large, "JPEG", quality=90)
        if name == "2x":
            for plugin in ("PNG", "WEBP", "AVIF"):
                cases[f"{plugin.lower()}, {name}"] = encoded(large, plugin)
            cases[f"cmyk jpeg, {name}"] = encoded(large.convert("CMYK"), "JPEG", quality=90)
    rules = ImageRules(size_px=size_px)
    for name, content in cases.items():
        ours = milliseconds(partial(prepare, content, rules), seconds)
        if isinstance(content, np.ndarray):
            table.add_row(name, f"{ours:.1f}", "", "")
            continue
        alone = milliseconds(partial(plainly_decoded, content), seconds)
        table.add_row(name, f"{ours:.1f}", f"{alone:.1f}", f"{ours / alone:.2f}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each figure")
    parser.add_argument("--size", type=int, default=512, help="side of the images, in pixels")
    given = parser.parse_args()
    cv2.setNumThreads(1)
    found = [photographs.astronaut(), photographs.coffee(), photographs.chelsea()]
    photos = [cv2.resize(photo, (given.size, given.size), interpolation=cv2.INTER_AREA) for photo in found]
    console = Console()
    console.print(compare_sources(photos[0], given.size, given.seconds))
    console.print(compare_encoders(photos, given.seconds))


if __name__ == "__main__":
    main()
