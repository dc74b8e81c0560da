"""Scenes per second of the demo world, in one process on one thread: composition, caption, image and all maps.

    python -m benchmarks.world [--scenes 200] [--variety 0] [--sheet FILE.png]

Composition does not depend on the size, so it has a line of its own. Times are processor time of this process, so that
what else runs on the machine counts little. --sheet also writes a contact sheet to look at.
"""

import argparse
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy is imported

import cv2

from extract.world import compose, contact_sheet, render

SIZES_PX = (64, 128, 256, 512)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=200, help="scenes per size (fewer at larger sizes)")
    parser.add_argument("--variety", type=float, default=0.0, help="0 for the plain world, 1 for the randomised one")
    parser.add_argument("--sheet", type=Path, help="write a contact sheet of 12 scenes as PNG")
    options = parser.parse_args()
    cv2.setNumThreads(1)

    for index in range(5):  # textures are made on first use
        render(compose(1, index, variety=options.variety), 64)
    start = time.process_time()
    for index in range(options.scenes):
        compose(0, index, variety=options.variety)
    seconds = (time.process_time() - start) / options.scenes
    print(f"{'':>12}  scenes/s  ms/scene")
    print(f"{'compose only':>12}  {1 / seconds:8.1f}  {1000 * seconds:8.2f}")
    for size in SIZES_PX:
        count = max(10, options.scenes * 128 // max(size, 128))
        start = time.process_time()
        for index in range(count):
            render(compose(0, index, variety=options.variety), size)
        seconds = (time.process_time() - start) / count
        print(f"{f'{size} px':>12}  {1 / seconds:8.1f}  {1000 * seconds:8.2f}")

    if options.sheet:
        sheet = contact_sheet(
            [render(compose(0, index, variety=options.variety), 192) for index in range(12)], columns=2
        )
        if not cv2.imwrite(str(options.sheet), sheet[..., ::-1]):
            parser.error(f"cannot write {options.sheet}")


if __name__ == "__main__":
    main()
