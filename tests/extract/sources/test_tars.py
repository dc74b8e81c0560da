"""Tars as a source: every sample arrives with its key and metadata; hostile tars neither run, nor write, nor hide."""

import gzip
import hashlib
import io
import json
import os
import pickle
import tarfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from extract.estimators import null
from extract.images.prepare import ImageProblem, ImageRules, prepare
from extract.run.make_shard import Loaded, UnitWork, make_shard
from extract.sources import Failure, RawSample
from extract.sources.filters import Filters
from extract.sources.table import open_source, settings_of
from extract.sources.tars import TarSource, expand_braces, legal_key
from shards.core.errors import UsageError, UserError
from shards.core.storage import Folder
from shards.dataset import Dataset
from shards.intrinsics import INTRINSICS
from shards.sample import KEY, member_names
from tests.support.web import photograph

IMAGE = b"\xff\xd8\xff\xe0 the bytes of an image, as they came"


def tar_bytes(*members: tuple[str, bytes], format: int = tarfile.USTAR_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format, encoding="utf-8", errors="surrogateescape") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def read(path: Path, **settings: str) -> list[RawSample | Failure]:
    source = TarSource((str(path),), **settings)
    return [output for unit in source.units(1000) for output in source.read(unit)]


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_members_may_be_interleaved_and_out_of_order(tmp_path: Path) -> None:
    meta = {"url": "x", "n": 1}
    path = write(
        tmp_path / "a.tar",
        tar_bytes(
            ("2.txt", b"two"), ("1.JPG", IMAGE), ("3.webp", IMAGE + b"3"), ("2.jpeg", IMAGE + b"2"),
            ("1.json", json.dumps(meta | {"caption": "one"}).encode()), ("3.caption", "drei ä".encode()),
        ),
    )  # fmt: skip
    outputs = read(path, keys="own")
    assert outputs == [
        RawSample("2", IMAGE + b"2", "two", {}),
        RawSample("1", IMAGE, "one", meta | {"caption": "one"}),
        RawSample("3", IMAGE + b"3", "drei ä", {}),
    ]


def test_braces_globs_and_lists_name_tars_in_a_stable_order(tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / f"{number:05d}.tar", tar_bytes((f"{number}.png", IMAGE)))
    by_braces = TarSource((f"{tmp_path}/{{00000..00002}}.tar",))
    by_glob = TarSource((f"{tmp_path}/*.tar",))
    names = [address.rsplit("/", 1)[-1] for address in by_glob.addresses()]
    assert (
        names == [address.rsplit("/", 1)[-1] for address in by_braces.addresses()] == [f"0000{i}.tar" for i in range(3)]
    )
    assert [output.key for unit in by_glob.units(10, limit=2) for output in by_glob.read(unit)] == [
        "00000-0",
        "00001-1",
    ]
    assert list(expand_braces("x{a,b}{1..2}")) == ["xa1", "xa2", "xb1", "xb2"]
    with pytest.raises(UserError, match="no tar fits"):
        TarSource((f"{tmp_path}/none*.tar",)).addresses()
    with pytest.raises(UsageError, match="named twice"):
        TarSource((f"{tmp_path}/00000.tar", f"{tmp_path}/00000.tar")).addresses()


def test_the_table_of_img2dataset_names_what_failed_upstream_and_what_is_missing(tmp_path: Path) -> None:
    path = write(tmp_path / "00003.tar", tar_bytes(("000030.jpg", IMAGE), ("000030.json", b'{"key": "000030"}')))
    rows = [
        {"key": "000030", "status": "success", "error_message": None},
        {"key": "000031", "status": "failed_to_download", "error_message": "HTTP Error 404: Not Found"},
        {"key": "000032", "status": "success", "error_message": None},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "00003.parquet")
    sample, gone, missing = read(path)
    assert isinstance(sample, RawSample) and sample.key == "000030" and sample.image == IMAGE
    assert isinstance(gone, Failure) and gone.reason == "failed_upstream" and "404" in gone.message
    assert isinstance(missing, Failure) and (missing.key, missing.reason) == ("000032", "missing_in_tar")


def img2dataset_shard(folder: Path) -> dict[str, tuple[bytes, str, dict[str, Any]]]:
    """Writes a shard as img2dataset lays it out (samples in the order of their arrival, its parquet and its stats beside);
    returns the image, caption and json of each key."""
    expected: dict[str, tuple[bytes, str, dict[str, Any]]] = {}
    for number in (2, 1, 3, 0, 7, 4):
        image = photograph(number, (288 - number, 192))
        row = {
            "pwatermark": 0.1,
            "caption": f"a café, number {number}",
            "url": f"http://x/{number}",
            "key": f"000030{number}",
        }
        row |= {"status": "success", "error_message": None, "width": 288 - number, "height": 192, "exif": "{}"}
        expected[row["key"]] = image, row["caption"], row | {"sha256": hashlib.sha256(image).hexdigest()}
    members = [
        (f"{key}.{suffix}", data)
        for key, (image, caption, row) in expected.items()
        for suffix, data in (("jpg", image), ("json", json.dumps(row, indent=4).encode()), ("txt", caption.encode()))
    ]
    write(folder / "00003.tar", tar_bytes(*members))
    failed = [
        {"key": "0000308", "status": "failed_to_download", "error_message": "HTTP Error 404: File not found"},
        {"key": "0000309", "status": "failed_to_resize", "error_message": "Image decoding error"},
    ]
    rows = [row for _, _, row in expected.values()] + failed
    pq.write_table(pa.Table.from_pylist(rows), folder / "00003.parquet")
    (folder / "00003_stats.json").write_text(json.dumps({"count": 8, "successes": 6}))
    return expected


def test_a_shard_of_img2dataset_arrives_whole_with_its_keys_metadata_and_untouched_images(tmp_path: Path) -> None:
    expected = img2dataset_shard(tmp_path)
    settings = settings_of(str(tmp_path))
    assert settings is not None and settings["kind"] == "tars"
    source, members = open_source(settings), tuple(member_names("jpg", tuple(INTRINSICS)))
    work = UnitWork(source=source, image=ImageRules(), members=members, threads=1, window=4)
    folder = Folder(tmp_path / "out")
    folder.make()
    (unit,) = source.units(1000)
    mark = make_shard(folder, unit, work, [Loaded(null.estimate, tuple(INTRINSICS), "null@1", 4)], made={})
    assert mark["counts"] == {"in": 8, "ok": 6, "failed": {"failed_upstream": 2}}
    samples = {sample.key: sample for sample in Dataset(folder, {}).samples(mark["shard"])}
    assert list(samples) == list(expected)
    for key, (image, caption, row) in expected.items():
        assert samples[key].members["jpg"] == image and samples[key].caption == caption
        meta = samples[key].meta
        assert meta.pop("intrinsics")["image"]["reencoded"] is False and meta == row
    failures = {line["key"]: line["message"] for line in Dataset(folder, {}).failures(mark["shard"])}
    assert list(failures) == ["0000308", "0000309"] and "404" in failures["0000308"]


def test_the_statistics_of_img2dataset_tell_how_many_inputs_there_are(tmp_path: Path) -> None:
    img2dataset_shard(tmp_path)
    source = TarSource((f"{tmp_path}/*.tar",))
    assert source.total() == 8 == sum(1 for unit in source.units(1000) for _ in source.read(unit))
    for broken in (b"{", b"[]", b'{"count": "8"}', b'{"count": -1}'):
        (tmp_path / "00003_stats.json").write_bytes(broken)
        assert source.total() is None
    write(tmp_path / "00004.tar", THREE)
    assert source.total() is None


@pytest.mark.parametrize("keep", [0, 100, -20])
def test_a_damaged_table_beside_a_tar_is_one_failure_and_costs_no_sample(tmp_path: Path, keep: int) -> None:
    expected = img2dataset_shard(tmp_path)
    table = tmp_path / "00003.parquet"
    table.write_bytes(table.read_bytes()[:keep])
    *samples, failure = read(tmp_path / "00003.tar")
    assert [sample.key for sample in samples] == list(expected)
    assert isinstance(failure, Failure) and (failure.key, failure.reason) == ("00003-table", "table_unreadable")


SHARED = ((f"{i}.{suffix}", data) for i in range(3) for suffix, data in (("jpg", IMAGE * 30), ("txt", b"words")))
THREE = tar_bytes(*SHARED)


def test_a_tar_truncated_anywhere_gives_its_whole_samples_and_one_clear_failure(tmp_path: Path) -> None:
    whole = read(write(tmp_path / "a.tar", THREE), keys="own")
    assert [type(output) for output in whole] == [RawSample] * 3
    end = THREE.rindex(b"words") + 512 - (THREE.rindex(b"words") % 512)  # of the last member; then come zeros only
    for size in range(0, end + 1, 512):
        outputs = read(write(tmp_path / "a.tar", THREE[:size]), keys="own")
        failures = [output for output in outputs if isinstance(output, Failure)]
        assert [failure.reason for failure in failures if failure.reason == "bad_tar"] == ["bad_tar"]
        assert len(failures) == 1 and "a.tar is not whole" in failures[0].message
        for output in outputs:
            if isinstance(output, RawSample):
                assert output.image == IMAGE * 30 and (output.caption == "words" or len(outputs) == 2)


def test_a_flipped_header_byte_ends_the_tar_there_and_says_so(tmp_path: Path) -> None:
    damaged = bytearray(THREE)
    damaged[THREE.index(b"1.jpg")] ^= 1
    outputs = read(write(tmp_path / "a.tar", bytes(damaged)), keys="own")
    assert [output.key for output in outputs] == ["0", "a"] and "damaged at byte" in outputs[1].message


class Bomb:
    def __reduce__(self) -> tuple:
        return (os.mkdir, (str(Bomb.target),))

    target = Path()


def special(name: str, type: bytes, link: str = "", size: int = 0) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = type, link, size
    return info.tobuf(tarfile.GNU_FORMAT)


def sparse_of_ten_gigabytes() -> bytes:
    header = bytearray(special("s.jpg", tarfile.GNUTYPE_SPARSE, size=512))
    header[386 : 386 + 24] = b"00000000000\0" + b"00000001000\0"
    header[483 : 483 + 12] = b"112402762000"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + bytes(512)


def test_hostile_members_are_never_followed_run_or_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Bomb.target = tmp_path / "executed"
    good = tar_bytes(("good.jpg", IMAGE), ("good.txt", b"fine"))[: 4 * 512]
    data = b"".join(
        [
            tar_bytes(("p.pyd", pickle.dumps(Bomb())), ("p.pkl", pickle.dumps(Bomb())), ("p.jpg", IMAGE))[: 6 * 512],
            tar_bytes(("../../escaped.jpg", IMAGE), ("/tmp/absolute.jpg", IMAGE))[: 4 * 512],
            special("link.jpg", tarfile.SYMTYPE, "/etc/passwd"),
            special("hard.jpg", tarfile.LNKTYPE, "good.jpg"),
            special("device.jpg", tarfile.CHRTYPE),
            special("pipe.jpg", tarfile.FIFOTYPE),
            special("folder.jpg", tarfile.DIRTYPE),
            sparse_of_ten_gigabytes(),
            good,
            bytes(1024),
        ]
    )
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    outputs = read(write(tmp_path / "a.tar", data), keys="own")
    samples = {output.key: output.image for output in outputs if isinstance(output, RawSample)}
    assert set(samples.values()) == {IMAGE} and len(samples) == 4 and "good" in samples and "p" in samples
    assert all(KEY.match(output.key) for output in outputs)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.tar", "work"]


def sparse_in_pax_of_ten_gigabytes() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("pax.jpg")
        stated = {"major": "1", "minor": "0", "name": "pax.jpg", "realsize": str(10 << 30)}
        info.pax_headers = {f"GNU.sparse.{name}": value for name, value in stated.items()}
        data = b"1\n0\n10737418240\n".ljust(512, b"\0")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    return file.getvalue()[: -tarfile.RECORDSIZE]


def test_bombs_and_odd_names_in_a_tar_cost_no_memory_and_spare_the_other_samples(tmp_path: Path) -> None:
    bomb = gzip.compress(bytes(200 << 20))
    members = [("bomb.jpg", bomb), ("bomb.txt", b"a gzip file"), ("b.json.gz", bomb), ("b.jpg", IMAGE)]
    odd = tar_bytes(("caf\udce9.jpg", IMAGE), ("\udcff\udcfe.jpg", IMAGE))  # names that are no UTF-8
    data = sparse_in_pax_of_ten_gigabytes() + odd[: 4 * 512] + tar_bytes(*members)
    path = write(tmp_path / "a.tar", data)
    tracemalloc.start()
    outputs = {output.key: output for output in read(path, keys="own")}
    assert tracemalloc.get_traced_memory()[1] < 2 * len(bomb) + (4 << 20)
    tracemalloc.stop()
    assert len(outputs) == 4 and all(KEY.match(key) for key in outputs)
    assert all(isinstance(output, RawSample) for output in outputs.values()), outputs
    assert {key for key in outputs if key not in ("b", "bomb")} == {legal_key("caf\udce9"), legal_key("\udcff\udcfe")}
    with pytest.raises(ImageProblem, match="not_an_image"):
        prepare(outputs["bomb"].image, ImageRules())  # type: ignore[union-attr]


def test_a_compressed_tar_is_one_clear_failure_and_is_not_unpacked(tmp_path: Path) -> None:
    (failure,) = read(write(tmp_path / "a.tar", gzip.compress(THREE + bytes(100 << 20))), keys="own")
    assert isinstance(failure, Failure) and failure.reason == "bad_tar"


def test_samples_are_filtered_by_the_fields_of_their_json_before_their_image_is_read(tmp_path: Path) -> None:
    fields = [{"AESTHETIC_SCORE": 6.6}, {"aesthetic": 6.4}, {}, {"AESTHETIC_SCORE": "7"}]
    members = [(f"{n}.json", json.dumps(row).encode()) for n, row in enumerate(fields)]
    members += [(f"{n}.jpg", IMAGE) for n in range(4)] + [(f"{n}.txt", b"ab" if n == 3 else b"words") for n in range(4)]
    path = write(tmp_path / "a.tar", tar_bytes(*members))

    def reasons(**settings: Any) -> list[str]:
        source = open_source({"kind": "tars", "tars": [str(path)], "filters": settings})
        outputs = [output for unit in source.units(1000) for output in source.read(unit)]
        return [output.reason if isinstance(output, Failure) else "ok" for output in outputs]

    low = "filtered_aesthetic"
    assert reasons(min_aesthetic=6.5) == ["ok", low, low, "ok"]
    assert reasons(min_aesthetic=6.5, missing="keep", min_caption=3) == ["ok", low, "ok", "filtered_caption_length"]
    described = [TarSource((str(path),), filters=Filters(min_caption=n)).describe() for n in (1, 2)]
    assert described[0] != described[1], "filters choose the samples, so they are a part of the dataset's identity"


def test_an_endless_header_is_refused_without_reading_it(tmp_path: Path) -> None:
    huge = special("x", tarfile.XHDTYPE, size=8 << 30)
    (failure,) = read(write(tmp_path / "a.tar", huge + bytes(2048)), keys="own")
    assert isinstance(failure, Failure) and failure.reason == "bad_tar" and "above the limit" in failure.message


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("1.jpg", IMAGE), ("1.jpg", IMAGE)], "duplicate_member"),
        ([("1.txt", b"alone")], "no_image"),
        ([("1.jpg", IMAGE), ("1.json", b"[1]")], "bad_metadata"),
        ([("1.jpg", IMAGE), ("1.json", b"{" * 50_000)], "bad_metadata"),
        ([("1.jpg", IMAGE), ("1.txt", b"\xff\xfe\x00")], "caption_not_utf8"),
        ([("1.jpg", IMAGE), ("1.txt", bytes(1 << 21))], "too_many_bytes"),
    ],
)
def test_a_bad_sample_is_one_failure_with_its_reason(tmp_path: Path, members: list, reason: str) -> None:
    bad, good = read(write(tmp_path / "a.tar", tar_bytes(*members, ("2.jpg", IMAGE))), keys="own")
    assert isinstance(bad, Failure) and bad.reason == reason and isinstance(good, RawSample)


def test_equal_keys_of_different_tars_stay_apart(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / f"{name}.tar", tar_bytes(("000.jpg", IMAGE)))
    assert [output.key for output in read(tmp_path / "*.tar")] == ["a-000", "b-000"]


@given(st.text() | st.binary().map(lambda data: data.decode("utf-8", "surrogateescape")))
@settings(deadline=None)
def test_every_name_becomes_a_legal_key_and_legal_ones_stay(name: str) -> None:
    key = legal_key(name)
    assert KEY.match(key) and (key == name or not KEY.match(name))


@given(st.binary(max_size=3000))
@settings(max_examples=60, deadline=None)
def test_arbitrary_bytes_are_a_failure_not_an_error(data: bytes) -> None:
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"ildm-arbitrary-{os.getpid()}.tar"
    try:
        outputs = read(write(path, data), keys="own")
    finally:
        path.unlink()
    assert all(isinstance(output, Failure) for output in outputs)
    if data[:512] != bytes(512):
        assert [output.reason for output in outputs] == ["bad_tar"]


@pytest.fixture
def folder_of_ours(tmp_path: Path) -> Iterator[Path]:
    from shards.core.storage import Folder
    from shards.dataset import write_info
    from shards.writer import ShardWriter

    folder = Folder(tmp_path / "ours")
    with ShardWriter(folder, 0, members=["jpg", "txt", "json"], made={}) as writer:
        writer.add("k-1", {"jpg": IMAGE, "txt": b"mine", "json": b'{"url": "u"}'})
        writer.commit({})
    write_info(folder, {"members": ["jpg", "txt", "json"], "totals": None})
    yield tmp_path / "ours"


def test_our_own_output_is_a_source_and_keeps_its_keys(folder_of_ours: Path) -> None:
    assert read(folder_of_ours / "*.tar") == [RawSample("k-1", IMAGE, "mine", {"url": "u"})]
