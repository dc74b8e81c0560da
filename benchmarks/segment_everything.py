"""Segment everything with the same SAM 2.1 weights and grid: ours, transformers' pipeline, sam2's own generator.

    python -m benchmarks.segment_everything [--images 4] [--points 16] [--size 512] [--threads 2] [--device cuda]
                                            [--dtype bfloat16] [--quality 0.8] [--sam2 PYTHON] [--no-pipeline]

Each contender runs in a process of its own: seconds an image (the first is not counted), and CPU seconds, which tell more
on a busy machine; the most memory of the process, on a GPU of the device; and the agreement of its masks with sam2's, or
without it with the pipeline's: the mean IoU of each of their masks with the best of ours, that of each of ours with the
best of theirs, and that of the segments of the painted maps. The weights are random (tests/support/random_sam.py), the
configuration is SAM 2.1 tiny; images are renderings of the demo world and scikit-image's photographs in turn.

sam2 is no dependency of ours: --sam2 names the Python of an environment that has it (pip install sam2) and what we need.
--fixture FILE writes sam2's masks of two small images, which tests/extract/estimators/test_sam.py compares with ours.
"""

import argparse
import importlib
import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from skimage import data as photographs

from extract.world import compose, render
from tests.support.random_sam import FIXTURE_SETTINGS, FIXTURE_SIDE, FIXTURE_SIZES, THRESHOLDS, sam2_tiny
from tests.support.seeded import seeded_picture

PHOTOGRAPHS = (
    "astronaut",
    "coffee",
    "chelsea",
    "rocket",
    "immunohistochemistry",
    "retina",
    "hubble_deep_field",
    "brick",
)
Found = tuple[np.ndarray, list[float]]  # the masks of an image, bool (M, H, W), and their predicted quality


def pictures(count: int, shorter: int) -> list[np.ndarray]:
    """uint8 (H, W, 3): renderings and photographs in turn, of several shapes."""
    found = []
    for i in range(count):
        if i % 2 == 0:
            found.append(render(compose(i, 3), (shorter, shorter * (4 + i // 2 % 3) // 4)).image)
            continue
        photo = getattr(photographs, PHOTOGRAPHS[i // 2 % len(PHOTOGRAPHS)])()
        photo = photo if photo.ndim == 3 else np.stack([photo] * 3, axis=2)
        scale = shorter / min(photo.shape[:2])
        size = (round(photo.shape[1] * scale), round(photo.shape[0] * scale))
        found.append(np.ascontiguousarray(cv2.resize(photo, size, interpolation=cv2.INTER_AREA)))
    return found


# ---- contenders: from the model and the options to a function of one image -------------------------------------------


def ours(model: Any, options: argparse.Namespace) -> Callable[[np.ndarray], Found]:
    from extract.estimators.mask_generator import MaskSettings
    from extract.estimators.sam import make_generator

    generator = make_generator(model, MaskSettings(**options.settings), options.device, options.dtype)

    def run(image: np.ndarray) -> Found:
        (found,) = generator([image])
        return found.masks.cpu().numpy(), found.quality.tolist()

    return run


def pipeline(model: Any, options: argparse.Namespace) -> Callable[[np.ndarray], Found]:
    import transformers
    from PIL import Image

    side = model.prompt_encoder.input_image_size
    processor = transformers.Sam2ImageProcessor(size={"height": side, "width": side})
    model = model.to(options.device, getattr(torch, options.dtype))
    generate = transformers.pipeline("mask-generation", model=model, image_processor=processor, device=options.device)
    settings = {
        "points_per_crop": options.settings["points_per_side"],
        "points_per_batch": 64,
        "pred_iou_thresh": options.settings["quality"],
        "stability_score_thresh": options.settings["stability"],
        "crops_nms_thresh": options.settings["nms"],
    }

    def run(image: np.ndarray) -> Found:
        found = generate(Image.fromarray(image), **settings)
        masks = [np.asarray(mask) for mask in found["masks"]]
        return np.stack(masks) if masks else np.zeros((0, *image.shape[:2]), bool), found["scores"].tolist()

    return run


def sam2(model: Any, options: argparse.Namespace) -> Callable[[np.ndarray], Found]:
    from sam2.automatic_mask_generator import SAM2AutomaticMaskGenerator
    from sam2.build_sam import build_sam2

    side = model.prompt_encoder.input_image_size
    network = build_sam2(
        "configs/sam2.1/sam2.1_hiera_t.yaml",
        ckpt_path=None,
        device=options.device,
        hydra_overrides_extra=[f"++model.image_size={side}"],
    )
    report = network.load_state_dict(names_of_sam2(model.state_dict()), strict=False)
    video = re.compile(r"memory|maskmem|obj_ptr|mask_downsample|no_mem_pos|no_obj")
    if report.unexpected_keys or not all(video.search(name) for name in report.missing_keys):
        raise SystemExit(f"the weights do not fit sam2's: {report}")
    generator = SAM2AutomaticMaskGenerator(
        network,
        points_per_side=options.settings["points_per_side"],
        pred_iou_thresh=options.settings["quality"],
        stability_score_thresh=options.settings["stability"],
        box_nms_thresh=options.settings["nms"],
    )
    generator.predictor._bb_feat_sizes = [(side // step, side // step) for step in (4, 8, 16)]  # fixed there for 1024

    def run(image: np.ndarray) -> Found:
        found = generator.generate(image)
        masks = [one["segmentation"] for one in found]
        return np.stack(masks) if masks else np.zeros((0, *image.shape[:2]), bool), [o["predicted_iou"] for o in found]

    return run


PASSED_ON = ("images", "points", "quality", "size", "encoder", "threads", "device", "dtype")
CONTENDERS = {"ours": ours, "pipeline": pipeline, "sam2": sam2}
RENAMED = (
    (r"^vision_encoder\.backbone\.", "image_encoder.trunk."),
    (r"^vision_encoder\.neck\.convs\.(\d)\.", r"image_encoder.neck.convs.\1.conv."),
    (r"patch_embed\.projection", "patch_embed.proj"),
    (r"layer_norm_final_attn", "norm_final_attn"),
    (
        r"^prompt_encoder\.shared_embedding\.positional_embedding",
        "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
    ),
    (r"mask_embed\.conv1", "mask_downscaling.0"),
    (r"mask_embed\.layer_norm1", "mask_downscaling.1"),
    (r"mask_embed\.conv2", "mask_downscaling.3"),
    (r"mask_embed\.layer_norm2", "mask_downscaling.4"),
    (r"mask_embed\.conv3", "mask_downscaling.6"),
    (r"upscale_conv1", "output_upscaling.0"),
    (r"upscale_layer_norm", "output_upscaling.1"),
    (r"upscale_conv2", "output_upscaling.3"),
    (r"layer_norm(\d)", r"norm\1"),
    (r"\bo_proj", "out_proj"),
    (r"(hypernetworks_mlps\.\d|_head)\.layers\.0", r"\1.layers.1"),
    (r"(hypernetworks_mlps\.\d|_head)\.proj_in", r"\1.layers.0"),
    (r"(hypernetworks_mlps\.\d|_head)\.proj_out", r"\1.layers.2"),
    (r"mlp\.proj_in", "mlp.layers.0"),
    (r"mlp\.proj_out", "mlp.layers.1"),
    (r"^(prompt_encoder|mask_decoder)\.", r"sam_\1."),
    (r"^no_memory_embedding", "no_mem_embed"),
)


def names_of_sam2(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of a Sam2Model under sam2's names."""
    renamed: dict[str, torch.Tensor] = {}
    for name, tensor in weights.items():
        if name == "prompt_encoder.point_embed.weight":
            renamed |= {f"sam_prompt_encoder.point_embeddings.{i}.weight": tensor[i : i + 1] for i in range(4)}
        elif not name.startswith("shared_image_embedding."):
            for pattern, replacement in RENAMED:
                name = re.sub(pattern, replacement, name)
            renamed[name] = tensor
    return renamed


# ---- runs ------------------------------------------------------------------------------------------------------------


def child(options: argparse.Namespace) -> None:
    """One contender over all images; writes its masks and figures."""
    torch.set_num_threads(options.threads)
    # Before transformers looks for it: else .ci/repair_torchvision.py, where torch is for CPUs only, half works.
    importlib.import_module("torchvision")
    on_gpu = options.device != "cpu"
    run = CONTENDERS[options.only](sam2_tiny(options.encoder), options)
    loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    seconds, cpu_seconds, masks, qualities = [], [], [], []
    for image in pictures(options.images, options.size):
        start, cpu_start = time.perf_counter(), time.process_time()
        found, quality = run(image)
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
        masks.append(found)
        qualities.append(quality)
    peak = (
        torch.cuda.max_memory_allocated() / 2**20
        if on_gpu
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    )
    figures = {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "loaded_mb": 0 if on_gpu else loaded,
        "peak_mb": peak,
        "quality": qualities,
    }
    save_masks(Path(options.out), masks)
    Path(options.out).with_suffix(".json").write_text(json.dumps(figures))


def write_fixture(path: Path) -> None:
    """sam2's masks of the pictures of the fixture, with FIXTURE_SETTINGS."""
    run = sam2(sam2_tiny(FIXTURE_SIDE), argparse.Namespace(device="cpu", dtype="float32", settings=FIXTURE_SETTINGS))
    save_masks(path, [run(seeded_picture(*size))[0] for size in FIXTURE_SIZES])


def start(name: str, python: str, options: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], list[np.ndarray]]:
    """The figures and the masks, one array (M, H, W) an image, of a contender run in its own process."""
    out = folder / f"{name}.npz"
    passed = [f"--{key}={getattr(options, key)}" for key in PASSED_ON]
    subprocess.run(
        [python, "-W", "ignore", "-m", "benchmarks.segment_everything", *passed, f"--only={name}", f"--out={out}"],
        check=True,
        cwd=Path(__file__).parent.parent,
    )
    return json.loads(out.with_suffix(".json").read_text()), read_masks(out)


def save_masks(path: Path, masks: list[np.ndarray]) -> None:
    arrays = {f"masks{i}": np.packbits(one) for i, one in enumerate(masks)}
    arrays |= {f"shape{i}": np.array(one.shape) for i, one in enumerate(masks)}
    np.savez_compressed(str(path), **arrays)  # type: ignore[arg-type]


def read_masks(path: Path) -> list[np.ndarray]:
    """The masks that a child wrote: one bool array (M, H, W) an image."""
    with np.load(path, allow_pickle=False) as arrays:
        shapes = [tuple(arrays[f"shape{i}"]) for i in range(len(arrays.files) // 2)]
        flat = (np.unpackbits(arrays[f"masks{i}"], count=int(np.prod(shape))) for i, shape in enumerate(shapes))
        return [mask.reshape(shape).astype(bool) for mask, shape in zip(flat, shapes, strict=True)]


def agreement(mine: np.ndarray, theirs: np.ndarray) -> tuple[float, float, float]:
    """Mean IoU of their masks with the best of mine, of mine with the best of theirs, of their painted segments with mine."""
    if not len(mine) or not len(theirs):
        return (float(len(mine) == len(theirs)),) * 3
    a, b = (torch.from_numpy(masks).flatten(1).float() for masks in (mine, theirs))
    shared = a @ b.T
    iou = shared / (a.sum(1)[:, None] + b.sum(1) - shared)
    return float(iou.amax(0).mean()), float(iou.amax(1).mean()), painted_iou(painted(mine), painted(theirs))


def painted(masks: np.ndarray) -> np.ndarray:
    """Ids (H, W) of masks in any order, painted by our rule."""
    from extract.estimators.mask_generator import paint

    flat = masks.reshape(len(masks), -1)
    order = np.lexsort((flat.argmax(1), -flat.sum(1)))
    return paint(torch.from_numpy(masks[order])).numpy()


def painted_iou(mine: np.ndarray, theirs: np.ndarray) -> float:
    """The mean over the segments of `theirs` (H, W), and what is in none, of the IoU with the best segment of `mine`."""
    scores = []
    for i in np.unique(theirs):
        there = theirs == i
        near = [mine == j for j in np.unique(mine[there])]
        scores.append(max((there & other).sum() / (there | other).sum() for other in near))
    return float(np.mean(scores))


def compare(options: argparse.Namespace) -> Table:
    names = ["pipeline"] * options.pipeline + ["ours"] + ["sam2"] * bool(options.sam2)
    with tempfile.TemporaryDirectory() as folder:
        results = {n: start(n, options.sam2 if n == "sam2" else sys.executable, options, Path(folder)) for n in names}
    reference = "sam2" if options.sam2 else "pipeline"
    table = Table(
        title=f"{options.images} images, shorter side {options.size} px, {options.points} x {options.points} points, "
        f"{options.dtype} on {options.device} ({options.threads} threads); {options.settings}"
    )
    columns = ("", "s an image", "as fast", "CPU s", "as fast", "peak MB", "above loaded MB", "masks")
    for column in (*columns, f"mIoU with {reference}"):
        table.add_column(column)
    base = results[names[0]][0]
    for name in names:
        figures, masks = results[name]
        scores = [agreement(m, t) for m, t in zip(masks, results[reference][1], strict=True)]
        table.add_row(
            name,
            *timing(figures["seconds"], base["seconds"]),
            *timing(figures["cpu_seconds"], base["cpu_seconds"]),
            f"{figures['peak_mb']:.0f}",
            f"{figures['peak_mb'] - figures['loaded_mb']:.0f}",
            f"{np.mean([len(m) for m in masks]):.1f}",
            " / ".join(f"{score:.4f}" for score in np.mean(scores, axis=0)) + f" (least {np.min(scores):.3f})",
        )
    return table


def timing(seconds: list[float], base: list[float]) -> tuple[str, str]:
    """The mean without the first, and by how much `base` is slower."""
    mine, other = (float(np.mean(given[1:] or given)) for given in (seconds, base))
    return f"{mine:.2f}", f"{other / mine:.2f} x"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--points", type=int, default=16, help="points on a side of the grid")
    parser.add_argument("--quality", type=float, default=THRESHOLDS["quality"], help="smallest predicted IoU of a mask")
    parser.add_argument("--size", type=int, default=512, help="shorter side of the images")
    parser.add_argument("--encoder", type=int, default=1024, help="pixels on a side that the encoder sees")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--sam2", default="", metavar="PYTHON", help="a Python that has sam2 and what we need")
    parser.add_argument(
        "--no-pipeline", dest="pipeline", action="store_false", help="without the pipeline: with --sam2"
    )
    parser.add_argument(
        "--fixture", default="", metavar="FILE", help="only write sam2's masks for tests/extract/estimators/test_sam.py"
    )
    parser.add_argument("--only", choices=tuple(CONTENDERS), help=argparse.SUPPRESS)
    parser.add_argument("--out", default="", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.fixture:
        write_fixture(Path(options.fixture))
        return
    options.settings = {"points_per_side": options.points, **THRESHOLDS, "quality": options.quality}
    if options.only:
        child(options)
    else:
        Console(width=180).print(compare(options))


if __name__ == "__main__":
    main()
