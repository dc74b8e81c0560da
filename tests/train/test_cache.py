"""train cache: members that give training what the models would give, that are refused where they do not fit, and that
leave the dataset whole."""

import copy
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from extract.workers import cluster
from infer.bases.loading import open_base
from infer.model.vae import encode
from shards.core.errors import UsageError, UserError
from shards.core.storage import Folder
from shards.dataset import Dataset
from shards.inspect.verify import verify
from shards.intrinsics import INTRINSICS
from shards.sample import CACHES
from shards.stream import Item, Stream
from shards.writer import ShardWriter
from tests.support import labelled, tiny_text
from train.__main__ import app
from train.cache import run as cache
from train.cache.format import (
    LATENTS,
    TEXT,
    LatentsSpec,
    TextSpec,
    cached_latents,
    cached_text,
    check_caches,
    encode_text,
    fitting_caches,
    header_of,
    latents_of,
    weights_digest,
)
from train.cache.make_shard import CacheConfig, Models, all_members, cache_shard, pixels_of


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> CacheConfig:
    base, run = tiny_text.models("sdxl")
    shards = tmp_path_factory.mktemp("cache") / "shards"
    labelled.write_dataset(shards, shards=2, per_shard=3)
    return CacheConfig(shards=str(shards), base=base, vae=f"{run}/vae", size_px=32, dtype="float32", batch=2)


@pytest.fixture(scope="module")
def models(config: CacheConfig) -> Models:
    return Models(config, "cpu", torch.float32)


@pytest.fixture(scope="module")
def both(config: CacheConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The whole command, on Ray: into another folder, and in place in a copy of the shards."""
    out, copy = (str(tmp_path_factory.mktemp("cache") / name) for name in ("out", "copy"))
    shutil.copytree(config.shards, copy)
    with cluster.connected("local", 1):
        for changed in (replace(config, out=out, workers=1), replace(config, shards=copy, workers=1)):
            assert cache.make_caches(changed).made == 2
            assert cache.make_caches(changed).made == 0  # the same again does nothing
    return out, copy


@pytest.fixture(scope="module")
def made(both: tuple[str, str]) -> str:
    return both[0]


def item_of(url: str, position: int = 0) -> Item:
    return Stream([url], images=False, intrinsics=(), extras=CACHES, shuffle=False)[position]


def specs_of(config: CacheConfig, models: Models) -> tuple[LatentsSpec, TextSpec]:
    found = models.specs(config)
    latents, text = found["latents"], found["text"]
    assert isinstance(latents, LatentsSpec) and isinstance(text, TextSpec)
    return latents, text


@pytest.mark.parametrize("in_place", [False, True])
def test_a_dataset_with_caches_is_whole_and_streams_and_its_other_members_are_the_same(
    config: CacheConfig, models: Models, both: tuple[str, str], in_place: bool
) -> None:
    url = both[in_place]
    assert verify(url).problems == []
    before, after = Dataset.open(config.shards), Dataset.open(url)
    assert after.members == [*before.members, LATENTS, TEXT] and after.info["totals"] == before.info["totals"]
    for key in list(before.keys()):
        own, now = before.read(key).members, dict(after.read(key).members)
        assert own == {name: now[name] for name in own}
    assert list(after.failures("000001")) == list(before.failures("000001"))
    item = Stream([url], extras=[TEXT])[1]
    assert set(item.extras) == {TEXT} and set(item.maps) == set(INTRINSICS)
    check_caches(after, specs_of(config, models))


def test_a_training_finds_caches_that_fit_its_base_and_refuses_a_flip_that_they_lack(
    config: CacheConfig, models: Models, made: str
) -> None:
    dataset, vae = Dataset.open(made), models.vaes["intrinsics"]
    found = fitting_caches([dataset], models.pipeline, vae, size_px=32, flip=False)
    assert found == specs_of(config, models)
    info = copy.deepcopy(dataset.info)
    info["caches"]["latents"]["flips"] = False
    with pytest.raises(UserError, match="flips was False, is True"):
        fitting_caches([Dataset(dataset.folder, info)], models.pipeline, vae, size_px=32, flip=True)


def test_where_the_caches_go_must_be_said(config: CacheConfig) -> None:
    for more in ([], ["--in-place", "--out", "x"]):
        result = CliRunner().invoke(app, ["cache", "--shards", config.shards, "--base", config.base, *more])
        assert isinstance(result.exception, UsageError)


@pytest.mark.parametrize("flip", [False, True])
def test_cached_latents_are_those_that_the_vaes_give_drawn_samples_included(
    config: CacheConfig, models: Models, made: str, flip: bool
) -> None:
    spec, _ = specs_of(config, models)
    item = item_of(made, 4)
    cached = cached_latents(item, spec, flip)
    pixels = pixels_of(Dataset.open(config.shards).read(item.key), config.size_px, flip)
    with torch.inference_mode():
        for name, vae in models.vaes.items():
            mean, std = (value[None] for value in cached[name])
            drawn = latents_of(vae, mean, std, torch.Generator().manual_seed(7))
            wanted = encode(vae, pixels[name][None], torch.Generator().manual_seed(7))
            tiny_text.close(drawn, wanted)
            tiny_text.close(latents_of(vae, mean, std), encode(vae, pixels[name][None]))
            assert (std > 0).all()


def test_cached_text_is_what_the_base_gives(config: CacheConfig, models: Models, made: str) -> None:
    _, spec = specs_of(config, models)
    item = item_of(made, 2)
    cached = cached_text(item, spec)
    with torch.inference_mode():
        wanted = encode_text(open_base(config.base, dtype=torch.float32), [item.caption])
    assert set(cached) == {"prompt_embeds", "pooled_prompt_embeds"} == set(wanted)
    for name, value in wanted.items():
        tiny_text.close(cached[name], value[0])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"size_px": 64}, "size_px was 32, is 64"),
        ({"image_vae": "0"}, "image_vae was"),
        ({"intrinsic_vae": "0"}, "intrinsic_vae was"),
        ({"dtype": "float16"}, "dtype was 'float32', is 'float16'"),
    ],
)
def test_caches_that_do_not_fit_are_refused_naming_what_differs(
    config: CacheConfig, models: Models, made: str, change: dict[str, Any], said: str
) -> None:
    spec = replace(specs_of(config, models)[0], **change)
    with pytest.raises(UserError, match=f"cached latents of .* do not fit: {said}"):
        check_caches(Dataset.open(made), [spec])
    with pytest.raises(UserError, match="other weights or another geometry"):
        cached_latents(item_of(made), spec)
    with pytest.raises(UserError, match="has no cached latents"):
        check_caches(Dataset.open(config.shards), [spec])


def test_a_flip_that_was_not_cached_and_a_member_that_was_not_streamed_are_refused(
    config: CacheConfig, models: Models, made: str
) -> None:
    spec = specs_of(config, models)[0]
    with pytest.raises(UserError, match="streamed without latents"):
        cached_latents(Stream([made], images=False, intrinsics=())[0], spec)
    with pytest.raises(UserError, match=r"has no latents\.safetensors"):
        Stream([config.shards], extras=[LATENTS])
    without = replace(config, flips=False)
    unflipped = specs_of(without, models)[0]
    assert unflipped.id != spec.id


def remade(config: CacheConfig, models: Models, out: Path) -> dict[str, Any]:
    specs = models.specs(config)
    return cache_shard(Dataset.open(config.shards), Folder(out), 0, config, models, specs, {"unit": 0})


def test_members_that_fit_are_kept_and_those_of_another_content_are_made_again(
    config: CacheConfig, models: Models, tmp_path: Path
) -> None:
    Folder(tmp_path).make()
    mark, dataset = remade(config, models, tmp_path), Dataset(Folder(tmp_path), {})
    first = {key: dict(dataset.read_at(mark, key).members) for key in mark["index"]}
    text = first["s0-1"][TEXT]
    marked = first["s0-1"] | {TEXT: text[:-4] + bytes(4)}  # fits by what its header says, so it is kept as it is
    stale = first["s0-2"] | {TEXT: text.replace(header_of(text)["of"].encode(), b"0" * 64)}
    names = all_members(Dataset.open(config.shards), models.specs(config))
    with ShardWriter(Folder(tmp_path), 0, members=names, made={}, replaces=mark["checksum"]) as writer:
        writer.add("s0-1", marked)
        writer.add("s0-2", stale)
        writer.commit({})
    again = remade(config, models, tmp_path)
    assert {key: dataset.read_at(again, key).members for key in first} == first | {"s0-1": marked}
    assert again["counts"] == mark["counts"]


def test_a_sample_that_cannot_be_decoded_is_a_failure_and_the_others_are_cached(
    config: CacheConfig, models: Models, tmp_path: Path
) -> None:
    def damage(key: str, members: dict[str, bytes]) -> dict[str, bytes]:
        return members | {"depth.png": b"no png"} if key == "s0-1" else members

    labelled.write_dataset(tmp_path / "in", shards=1, per_shard=3, change=damage)
    Folder(tmp_path / "out").make()
    mark = remade(replace(config, shards=str(tmp_path / "in")), models, tmp_path / "out")
    assert sorted(mark["index"]) == ["s0-0", "s0-2"] and mark["counts"]["failed"] == {"corrupt": 1, "truncated": 1}


def test_digests_tell_weights_apart_and_not_their_precision() -> None:
    layer = torch.nn.Linear(4, 4)
    before = weights_digest(layer)
    assert weights_digest(layer.to(torch.bfloat16)) == before
    torch.nn.init.zeros_(layer.bias)
    assert weights_digest(layer) != before


def test_what_cannot_be_cached_is_said(config: CacheConfig, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="latents need --vae"):
        replace(config, vae=None)
    with pytest.raises(UsageError, match="--only maps"):
        replace(config, only=("maps",))
    with pytest.raises(UserError, match="is not a VAE's folder"):
        cache.make_caches(replace(config, vae=str(tmp_path)))
    (tmp_path / "other.tar").write_bytes(b"")
    with pytest.raises(UserError, match="is not empty and holds no dataset"):
        cache.make_caches(replace(config, out=str(tmp_path)))
