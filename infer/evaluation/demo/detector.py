"""The whole detector: the objects of pictures, with their names and how they stand to each other.

Where an object may be is asked twice: connected regions of one colour, and the segments that the embedded estimator finds.
The close look names them all, of those that are one object the surest stays, and each two that stay are looked at together.
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from itertools import permutations
from pathlib import Path

import cv2
import numpy as np
import torch

from extract.estimators.table import find_set, load, tasks_of
from infer.evaluation.demo.crop_nets import CloseNet, cut_out, cut_pair, load_close, window
from infer.evaluation.demo.layout import RELATED, Found, find_objects, find_segments
from infer.evaluation.demo.pixel_net import SHIPPED, DetectorNet, Seen, load_detector

SAME = 0.4
"""Two candidates that share more than this of their union, or of the smaller one twice this, are one object."""
LARGER = 0.1
"""The power of its area by which a candidate's sureness is weighed: of two that are about as sure, the larger is the whole."""
SEGMENTS_PX = 128
"""Small pictures are enlarged to this side for the segments of the estimators, which know no smaller ones."""


class FirstLook:
    """What is where in pictures, in batches, before anything is looked at closely."""

    def __init__(self, net: DetectorNet, batch: int = 64) -> None:
        self.net, self.batch = net.to(memory_format=torch.channels_last), batch  # type: ignore[call-overload]
        self._segments = load(tasks_of(find_set("demo"), ("segmentation",))[0].row, "cpu")

    def fit(self, image: np.ndarray) -> np.ndarray:
        """An image uint8 RGB (H, W, 3) at the working size, by area means."""
        side = self.net.config.working_px
        if image.shape[:2] == (side, side):
            return image
        shrink = min(image.shape[:2]) >= side
        how = cv2.INTER_AREA if shrink else cv2.INTER_CUBIC
        return np.asarray(cv2.resize(image, (side, side), interpolation=how))

    @torch.inference_mode()
    def __call__(self, images: Sequence[np.ndarray]) -> list[Seen]:
        """images: uint8 RGB (H, W, 3) each. What is seen of each, at the working size."""
        found = []
        for start in range(0, len(images), self.batch):
            small = np.stack([self.fit(image) for image in images[start : start + self.batch]])
            x = torch.from_numpy(small).permute(0, 3, 1, 2).float() / 255
            seen = self.net(x.contiguous(memory_format=torch.channels_last))
            parts = (seen.shape.softmax(1), seen.colour.softmax(1), seen.log_depth.exp(), seen.features)
            found += [Seen(*row) for row in zip(*(part.numpy() for part in parts), strict=True)]
        return found

    def candidates(self, small: Sequence[np.ndarray], seen: Sequence[Seen]) -> list[list[Found]]:
        """Where objects may be in pictures at the working size, several times the same one."""
        return [[*find_objects(one), *find_segments(one, ids)] for one, ids in zip(seen, self._ids(small), strict=True)]

    def _ids(self, small: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
        """The segments of pictures at the working size: int (h, w) each."""
        side = self.net.config.working_px
        picks = ((np.arange(side) + 0.5) * SEGMENTS_PX / side).astype(np.int64)
        for start in range(0, len(small), self.batch):
            part = small[start : start + self.batch]
            large = [cv2.resize(image, (SEGMENTS_PX, SEGMENTS_PX), interpolation=cv2.INTER_CUBIC) for image in part]
            for maps in self._segments(large):
                yield maps["segmentation"].values[picks[:, None], picks]


class Detector:
    """Finds objects in pictures of any size."""

    def __init__(self, first: FirstLook, things: CloseNet, pairs: CloseNet) -> None:
        self.first, self.things, self.pairs = first, things, pairs

    @classmethod
    def load(cls, folder: Path = SHIPPED) -> "Detector":
        """That of a checkpoint folder. Raises UserError naming the file that cannot be loaded."""
        return cls(FirstLook(load_detector(folder)), load_close("things", folder), load_close("pairs", folder))

    def __call__(self, images: Sequence[np.ndarray]) -> list[tuple[Seen, list[Found]]]:
        """images: uint8 RGB (H, W, 3) each. What is seen of each, and the objects in it, largest first."""
        small = [self.first.fit(image) for image in images]
        seen = self.first(small)
        named = self._named(small, self.first.candidates(small, seen))
        return list(zip(seen, self._related(small, list(map(surest, named))), strict=True))

    def _named(self, small: Sequence[np.ndarray], found: Sequence[Sequence[Found]]) -> list[list[Found]]:
        """The candidates with the shape and the colour that they have when looked at closely."""
        side = self.things.config.side_px
        cuts = [
            cut_out(image, one.mask, window(one.mask), side)
            for image, things in zip(small, found, strict=True)
            for one in things
        ]
        rows = iter(self.things.ask(cuts, self.first.batch))
        return [[_named_by(one, *next(rows)) for one in things] for things in found]

    def _related(self, small: Sequence[np.ndarray], found: Sequence[Sequence[Found]]) -> list[list[Found]]:
        """The objects, numbered, with what each is to the others."""
        side = self.pairs.config.side_px
        cuts = [
            cut_pair(image, one.mask, other.mask, window(one.mask | other.mask), side)
            for image, things in zip(small, found, strict=True)
            for one, other in permutations(things, 2)
        ]
        rows = iter(self.pairs.ask(cuts, self.first.batch))
        whole = []
        for things in found:
            related = np.zeros((len(things), len(things), len(RELATED)), np.float32)
            for i, j in permutations(range(len(things)), 2):
                (related[i, j],) = next(rows)
            whole.append([dataclasses.replace(one, number=i, related=related[i]) for i, one in enumerate(things)])
        return whole

    def fingerprint(self) -> str:
        """A short digest of the weights."""
        total = hashlib.sha256()
        for net in (self.first.net, self.things, self.pairs):
            for name, tensor in sorted(net.state_dict().items()):
                total.update(name.encode() + tensor.contiguous().numpy().tobytes())
        return total.hexdigest()[:8]


def _named_by(one: Found, shapes: np.ndarray, colours: np.ndarray) -> Found:
    return dataclasses.replace(one, shapes=shapes, colours=colours)


def surest(candidates: Sequence[Found]) -> list[Found]:
    """The candidates without those that are another one, which is surer; largest first."""
    kept: list[Found] = []
    for one in sorted(candidates, key=lambda one: -one.sure * one.share**LARGER):
        if not any(same(one.mask, other.mask) for other in kept):
            kept.append(one)
    return sorted(kept, key=lambda one: -one.share)


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two masks (h, w) are of one object."""
    common = int((a & b).sum())
    return common > SAME * int((a | b).sum()) or common > 2 * SAME * min(int(a.sum()), int(b.sum()))
