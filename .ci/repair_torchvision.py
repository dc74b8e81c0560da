"""Makes `import torchvision` work in this virtual environment when torch is a CPU-only build.

The torchvision wheel of the public index is built for CUDA. Beside a CPU-only torch its compiled operators do not
load, and `import torchvision` fails with `RuntimeError: operator torchvision::nms does not exist`; timm, controlnet-aux,
peft and the image processors of transformers fail with it. On exactly that error (and no other) this script installs a
small module and a `.pth` file into the environment, so that every process of it, Ray workers included, defines the
two missing operators the moment torchvision is first imported. On a healthy install it does nothing.

    .venv/bin/python .ci/repair_torchvision.py
"""

import subprocess
import sys
import sysconfig
from pathlib import Path

MODULE = '''"""Installed by .ci/repair_torchvision.py: torchvision's operators for a CPU-only torch."""

import importlib.abc
import importlib.util
import sys


def _define_operators():
    import torch

    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

    def nms(dets, scores, iou_threshold):
        """Greedy non-maximum suppression of (N, 4) boxes x1, y1, x2, y2 by falling score."""
        areas = (dets[:, 2] - dets[:, 0]) * (dets[:, 3] - dets[:, 1])
        order, keep = scores.argsort(descending=True, stable=True), []
        while order.numel():
            first, order = order[0], order[1:]
            keep.append(first)
            low = torch.maximum(dets[first, :2], dets[order, :2])
            high = torch.minimum(dets[first, 2:], dets[order, 2:])
            overlap = (high - low).clamp(min=0).prod(dim=1)
            order = order[overlap / (areas[first] + areas[order] - overlap) <= iou_threshold]
        return torch.stack(keep) if keep else torch.empty(0, dtype=torch.int64)

    library.impl("nms", nms, "CPU")
    return library  # the definitions live as long as the library object does


class _AroundTorchvision(importlib.abc.MetaPathFinder):
    """Defines the operators just before torchvision is imported, and tells it afterwards that they are there."""

    def find_spec(self, name, path=None, target=None):
        if name != "torchvision":
            return None
        sys.meta_path.remove(self)
        sys.modules[__name__]._library = _define_operators()
        spec = importlib.util.find_spec(name)
        import_as_usual = spec.loader.exec_module

        def exec_module(module):
            import_as_usual(module)
            module.extension._has_ops = lambda: True

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, _AroundTorchvision())
'''


def import_error() -> str:
    """The message of a failing `import torchvision` in a fresh process; empty when it works."""
    code = "import torchvision, torchvision.transforms.v2"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return run.stderr if run.returncode else ""


def main() -> int:
    error = import_error()
    if "operator torchvision::nms does not exist" in error:
        site = Path(sysconfig.get_paths()["purelib"])
        (site / "_torchvision_cpu_operators.py").write_text(MODULE)
        (site / "_torchvision_cpu_operators.pth").write_text("import _torchvision_cpu_operators\n")
        error = import_error()
    if error:
        print(f"torchvision does not import in this environment:\n{error}", file=sys.stderr)
    return 1 if error else 0


if __name__ == "__main__":
    raise SystemExit(main())
