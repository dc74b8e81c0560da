"""What is written for a generated image: the files of one sample, in the dataset's own formats.

KEY.png KEY.txt KEY.json                   the picture, its prompt, everything that is needed to repeat it
KEY.depth.png KEY.normal.png ...           its maps, as in a dataset (an unpacked WebDataset sample)
KEY.sheet.png                              picture and maps side by side, to look at
KEY.base.png KEY.shares.json               the base model's picture (--compare), the attention shares (--shares)
"""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from infer.decode import Generated
from infer.model.denoiser import AttentionShare
from infer.run_folder import Manifest
from shards.core.errors import UserError
from shards.core.storage import Folder
from shards.inspect.display import sheet
from shards.intrinsics import INTRINSICS, IntrinsicMap
from shards.marks import digest
from shards.quality import quality_scores
from shards.sample import Sample, encode_meta

IMAGE = "png"
SHEET_PX = (192, 512)  # the longer side of each picture of a sheet, at least and at most


def maker(manifest: Manifest) -> dict[str, Any]:
    """The fingerprint of the run as the source of maps, as datasets have it of their estimators."""
    weights = manifest.files["lora.safetensors"]
    rest = {"name": "ildm", "weights": weights, "settings": manifest.files, "version": str(manifest.version)}
    return {"id": f"ildm@{digest(rest)[:8]}", **rest}


def sample_members(made: Generated, index: int, about: Mapping[str, Any], by: str) -> dict[str, bytes]:
    """The members of image `index`: png, txt, json and the maps that were made, as a dataset's sample has them.

    about: what json says besides "intrinsics". by: the id of the run's fingerprint.
    """
    image, maps = made.images[index], made.intrinsics[index] if made.intrinsics else {}
    described: dict[str, Any] = {
        "image": {
            "original_size": list(image.size),
            "size": list(image.size),
            "orientation": 1,
            "crop": [0, 0, *image.size],
            "resized": False,
            "reencoded": True,
        }
    }
    members = {IMAGE: _png(image), "txt": made.prompts[index].encode(), "json": b""}
    for name, item in maps.items():
        members[INTRINSICS[name].member], info = INTRINSICS[name].encode(item)
        described[name] = {**info, "by": by}
    if maps:
        described["quality"] = {**quality_scores(maps), "by": by}
    members["json"] = encode_meta({**about, "intrinsics": described})
    return members


def extra_files(made: Generated, index: int, base: Image.Image | None) -> dict[str, bytes]:
    """The sheet, and where they were asked for, the base model's picture and the attention shares."""
    files: dict[str, bytes] = {}
    if made.intrinsics:
        rows = [(np.asarray(made.images[index]), made.intrinsics[index], made.prompts[index])]
        least, most = SHEET_PX
        files["sheet.png"] = _png(sheet(rows, size_px=min(most, max(least, *made.images[index].size))))
    if base is not None:
        files["base.png"] = _png(base)
    if made.shares is not None:
        files["shares.json"] = json.dumps(share_table(made.shares, index), indent=1).encode()
    return files


def share_table(shares: Sequence[AttentionShare], index: int) -> list[dict[str, Any]]:
    """For each layer and step: timestep, layer, stage, and the mean share of image `index` (with guidance, of its prompt)."""
    return [
        {
            "timestep": item.timestep[index] if isinstance(item.timestep, tuple) else item.timestep,
            "layer": item.layer,
            "stage": item.stage,
            "share": round(float(item.value[-1, index].mean()), 6),
        }
        for item in shares
    ]


def write_sample(folder: Folder, key: str, files: Mapping[str, bytes]) -> None:
    """Writes KEY.<member> for each file; json last, so that a sample that has it is whole."""
    for name in sorted(files, key=lambda name: name == "json"):
        folder.write(f"{key}.{name}", files[name])


def is_written(folder: Folder, key: str, *, compare: bool, shares: bool) -> bool:
    """Whether the sample is there and whole, with what was asked for beside it."""
    wanted = ["json", *(["base.png"] if compare else []), *(["shares.json"] if shares else [])]
    return all(folder.exists(f"{key}.{name}") for name in wanted)


def read_given(prefix: str, only: Sequence[str] = ()) -> dict[str, IntrinsicMap]:
    """The maps of a written or unpacked sample: PREFIX.json and PREFIX.depth.png and so on; all, or `only` these.

    Raises UserError when one is missing or damaged.
    """
    if unknown := sorted(set(only) - set(INTRINSICS)):
        raise UserError(f"{unknown[0]!r} is not an intrinsic; they are {', '.join(INTRINSICS)}")
    path = Path(prefix)
    names = {name: path.with_name(f"{path.name}.{row.member}") for name, row in INTRINSICS.items()}
    wanted = [name for name in INTRINSICS if (name in only if only else names[name].is_file())]
    members: dict[str, bytes] = {}
    for member, file in (("json", path.with_name(f"{path.name}.json")), *((n, names[n]) for n in wanted)):
        try:
            members[INTRINSICS[member].member if member in INTRINSICS else member] = file.read_bytes()
        except OSError as error:
            raise UserError(f"cannot read the given {member}, {file}: {error.strerror}") from error
    if not wanted:
        raise UserError(f"there are no maps at {prefix}; name a sample without its endings, such as OUT/KEY")
    return Sample(path.name, members).maps()


def read_image(path: Path, mode: str = "RGB") -> Image.Image:
    """A picture from a file. Raises UserError."""
    try:
        with Image.open(path) as image:
            return image.convert(mode)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read the picture {path}: {error}") from error


def _png(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "PNG", compress_level=1)
    return data.getvalue()
