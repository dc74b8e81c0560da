"""Our Metric3D v2 and MoGe-2 beside their authors' own code, with the same random weights, on the CPU in float32.

    git clone https://github.com/YvanYin/Metric3D /tmp/Metric3D; git clone https://github.com/microsoft/MoGe /tmp/MoGe
    python -m tests.support.upstream_geometry metric3d /tmp/Metric3D large 56x84 70x98 100x120
    python -m tests.support.upstream_geometry moge /tmp/MoGe l 90x120 131x97 168x168
    python -m tests.support.upstream_geometry metric3d /tmp/Metric3D small 56x84 70x98 100x120 --write

--write keeps a grid of the authors' values, and the names of all sizes, in tests/fixtures: what the tests compare with.
--exact lets MoGe's search for the camera, which stops at a tolerance of 1e-3, go to the end: what is left is the network's.
What their code imports and does not need here (mmcv, utils3d, matplotlib, ...) is replaced by empty modules.
"""

import argparse
import importlib
import json
import sys
import types
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, patch

import numpy as np
import scipy.optimize
import torch
from torch import Tensor

from extract.estimators import moge as adapter
from extract.estimators.batching import NetworkEstimator, normalised
from extract.estimators.nets.metric3d_net import SIZES, Metric3DNet
from extract.estimators.nets.metric3d_net import from_published as metric3d_weights
from extract.estimators.nets.moge_net import MoGeConfig, MoGeNet
from extract.estimators.nets.moge_net import from_published as moge_weights
from tests.support.seeded import (
    FIXTURES,
    METRIC3D_GAINS,
    MOGE_FOCAL,
    MOGE_GAINS,
    angles,
    fold_names,
    like_a_camera,
    on_grid,
    seeded_picture,
    seeded_weights,
)

EMPTY = ("matplotlib", "matplotlib.pyplot", "mmcv", "mmcv.utils", "mmengine", "mmengine.utils", "mono.utils.avg_meter")
MOGE_WIDTHS = {"s": 384, "b": 768, "l": 1024}
TOKENS = 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=("metric3d", "moge"))
    parser.add_argument("checkout", type=Path, help="their repository")
    parser.add_argument("size", help="small, large or giant2; s, b or l")
    parser.add_argument("images", nargs="+", help="heights and widths: 56x84 ...")
    parser.add_argument("--write", action="store_true", help="keep the authors' values in tests/fixtures")
    parser.add_argument("--exact", action="store_true", help="let MoGe's search for the camera go to the end")
    chosen = parser.parse_args()
    sys.path.insert(0, str(chosen.checkout))
    sys.modules.update({name: MagicMock() for name in EMPTY})
    compare, names, sizes = (
        (metric3d, metric3d_names, ("small", "large", "giant2"))
        if chosen.network == "metric3d"
        else (moge, moge_names, ("s", "b", "l"))
    )
    with torch.inference_mode(), _exact_search() if chosen.exact else nullcontext():
        values = compare(chosen.checkout, chosen.size, [tuple(map(int, image.split("x"))) for image in chosen.images])
        if chosen.write:
            np.savez_compressed(str(FIXTURES / f"{chosen.network}_{chosen.size}.npz"), **values)  # type: ignore[arg-type]
            table = {size: names(chosen.checkout, size) for size in sizes}
            (FIXTURES / f"{chosen.network}_names.json").write_text(json.dumps(table, separators=(",", ":")))


def _exact_search() -> Any:
    search = scipy.optimize.least_squares
    ends = dict.fromkeys(("ftol", "xtol", "gtol"), 1e-15)
    return patch("scipy.optimize.least_squares", lambda *given, **named: search(*given, **{**named, **ends}))


def metric3d(checkout: Path, size: str, images: list[tuple[int, ...]]) -> dict[str, np.ndarray]:
    theirs = _metric3d(checkout, size)
    weights = seeded_weights(_shapes(theirs), METRIC3D_GAINS)
    theirs.load_state_dict(weights, strict=True, assign=True)
    ours = _ours(lambda: Metric3DNet(SIZES[size]), metric3d_weights(weights))
    kept = {}
    for height, width in images:
        x = normalised(torch.from_numpy(seeded_picture(height, width)).permute(2, 0, 1)[None].float() / 255)
        depth, confidence, outputs = theirs.inference({"input": x})
        normal = outputs["prediction_normal"]
        found = ours(x)
        print(
            f"{height}x{width}: depth {depth.mean():.1f} m +- {depth.std():.1f}, mean difference "
            f"{(found.depth - depth).abs().mean():.1e} m (most {(found.depth - depth).abs().max():.1e}); normals "
            f"{angles(found.normal[0], normal[0, :3]).mean():.1e} degrees; confidence "
            f"{(found.confidence - confidence).abs().mean():.1e}, kappa {(found.kappa - normal[:, 3:]).abs().mean():.1e}"
        )
        kept[f"{height}x{width}"] = on_grid(torch.cat([depth, confidence, normal], dim=1)[0])
    return kept


def metric3d_names(checkout: Path, size: str) -> dict[str, Any]:
    return fold_names(_shapes(_metric3d(checkout, size)), "encoder.blocks.0")


def _metric3d(checkout: Path, size: str) -> Any:
    """Their network, with their configuration file read as Python."""
    decoder = importlib.import_module("mono.model.decode_heads.RAFTDepthNormalDPTDecoder5").RAFTDepthNormalDPT5
    ends = (0.1, 200.0)  # they put the bins on "cuda"
    decoder.get_bins = lambda self, bins: torch.linspace(np.log(ends[0]), np.log(ends[1]), bins).exp()
    make = importlib.import_module("mono.model.monodepth_model").get_configured_monodepth_model
    return _unmade(lambda: make(_config(checkout / "mono/configs/HourglassDecoder" / f"vit.raft5.{size}.py")))


class _Table(dict[str, Any]):
    __getattr__ = dict.__getitem__


def _config(path: Path) -> Any:
    """An mmcv configuration: a Python file whose tables come on top of those of its _base_ files."""
    names: dict[str, Any] = {}
    exec(path.read_text(), names)
    own = {name: value for name, value in names.items() if not name.startswith("__") and name != "_base_"}
    merged: dict[str, Any] = {}
    for base in names.get("_base_", []):
        _merge(merged, _config(path.parent / base))
    _merge(merged, {name: value for name, value in own.items() if not isinstance(value, types.ModuleType)})
    return _table(merged)


def _merge(into: dict[str, Any], given: dict[str, Any]) -> None:
    for name, value in given.items():
        if isinstance(value, dict) and isinstance(into.get(name), dict):
            _merge(into[name], value)
        else:
            into[name] = value


def _table(value: Any) -> Any:
    return _Table({name: _table(inner) for name, inner in value.items()}) if isinstance(value, dict) else value


def moge(checkout: Path, size: str, images: list[tuple[int, ...]]) -> dict[str, np.ndarray]:
    theirs, config = _moge(checkout, size), moge_config(checkout, size)
    weights = seeded_weights(_shapes(theirs), MOGE_GAINS)
    like_a_camera(weights, MOGE_FOCAL)
    theirs.load_state_dict(weights, strict=True, assign=True)
    ours = _ours(lambda: MoGeNet(MoGeConfig.from_checkpoint(config)), moge_weights(weights))
    working_size = partial(adapter.working_size, tokens=TOKENS)
    network = adapter.MoGe(ours, config["remap_output"])
    estimate = NetworkEstimator(network, working_size, torch.device("cpu"), torch.float32, adapter.prepare)
    kept = {}
    for height, width in images:
        picture = seeded_picture(height, width)
        x = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255
        raw = theirs.forward(x, TOKENS)
        solved = theirs.infer(x, num_tokens=TOKENS, use_fp16=False, apply_mask=False)
        depth, normal = solved["depth"][0], raw["normal"][0].permute(2, 0, 1)
        focal_px, mask = float(solved["intrinsics"][0, 0, 0]) * width, solved["mask"][0]
        found = estimate([picture])[0]
        z, n = torch.from_numpy(found["depth"].values), torch.from_numpy(found["normal"].values).permute(2, 0, 1)
        same = z.isfinite() & mask
        turned = n * torch.tensor([1.0, -1.0, -1.0])[:, None, None]
        print(
            f"{height}x{width}: depth {depth[same].mean():.2f} m +- {depth[same].std():.2f}, mean difference "
            f"{(z - depth)[same].abs().mean():.1e} m; normals {angles(turned[:, same], normal[:, same]).mean():.1e} degrees; "
            f"focal length {found['depth'].info['focal_px']:.2f} px, theirs {focal_px:.2f}; mask the same in "
            f"{(z.isfinite() == mask).float().mean():.2%}, geometry in {mask.float().mean():.0%}"
        )
        kept[f"{height}x{width}"] = on_grid(torch.cat([depth[None], normal, mask[None].float()]))
        kept[f"{height}x{width}/focal_px"] = np.asarray(focal_px, np.float32)
    return kept


def moge_names(checkout: Path, size: str) -> dict[str, Any]:
    names = fold_names(_shapes(_moge(checkout, size)), "encoder.backbone.blocks")
    return names | {"config": moge_config(checkout, size)}


def moge_config(checkout: Path, size: str) -> dict[str, Any]:
    """`model_config` as in their published checkpoints: that of L is in their repository; S and B have a lighter neck and
    read two blocks, which gives the published files' sizes to the byte."""
    config: dict[str, Any] = json.loads((checkout / "configs/train/v2.json").read_text())["model"]
    width = MOGE_WIDTHS[size]
    if size != "l":
        config["encoder"] = {"backbone": f"dinov2_vit{size}14", "intermediate_layers": [5, 11], "dim_out": width}
        config["neck"]["num_res_blocks"] = [0, 1, 1, 1, 0]
    config["neck"]["dim_in"][0] = width + 2
    for name in ("neck", "points_head", "normal_head", "mask_head"):
        config[name]["dim_res_blocks"][0] = width
        if name != "neck":
            config[name]["dim_in"][0] = width
    config["scale_head"]["dims"] = [width, width, width, 1]
    return config


def _moge(checkout: Path, size: str) -> Any:
    utils3d = types.ModuleType("utils3d")
    utils3d.np, utils3d.pt = MagicMock(), MagicMock()  # type: ignore[attr-defined]
    utils3d.pt.intrinsics_from_focal_center = lambda fx, fy, cx, cy: torch.diag_embed(
        torch.stack([fx, fy, fx / fx], -1)
    )
    sys.modules["utils3d"] = utils3d
    make = importlib.import_module("moge.model.v2").MoGeModel
    return _unmade(lambda: make(**moge_config(checkout, size)))


def _shapes(net: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in net.state_dict().items()}


def _ours(make: Callable[[], torch.nn.Module], weights: dict[str, Tensor]) -> Any:
    net = _unmade(make)
    net.load_state_dict(weights, strict=True, assign=True)
    return net


def _unmade(make: Callable[[], Any]) -> Any:
    """A network without values: they come from us anyway. Their constructors need the values of a linspace."""
    with torch.device("meta"), patch("torch.linspace", partial(torch.linspace, device="cpu")):
        return make().eval()


if __name__ == "__main__":
    main()
