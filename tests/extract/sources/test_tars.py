"""Tars as a source: every sample arrives with its key and metadata; hostile tars neither run, nor write, nor hide."""

import gzip
import hashlib
import io
import json
import os
import pickle
import subprocess
import tarfile
import tracemalloc
from collections.abc import Iterator, Sequence
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
    assert set(samples.values()) == {IMAGE} and len(samples) == 5 and {"good", "hard", "p"} < set(samples)
    failures = {output.key: output.reason for output in outputs if isinstance(output, Failure)}
    things = dict.fromkeys(("device", "pipe", "folder"), "not_a_file")
    assert failures == things | {"link": "outside", "s": "too_many_bytes"}
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
    return file.getvalue()[: 4 * 512]


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
    assert len(outputs) == 5 and all(KEY.match(key) for key in outputs)
    sparse = outputs.pop("pax")
    assert isinstance(sparse, Failure) and sparse.reason == "bad_tar" and "sparse" in sparse.message
    assert all(isinstance(output, RawSample) for output in outputs.values()), outputs
    assert {key for key in outputs if key not in ("b", "bomb")} == {legal_key("caf\udce9"), legal_key("\udcff\udcfe")}
    with pytest.raises(ImageProblem, match="not_an_image"):
        prepare(outputs["bomb"].image, ImageRules())  # type: ignore[union-attr]


def test_a_compressed_tar_is_one_clear_failure_and_is_not_unpacked(tmp_path: Path) -> None:
    (failure,) = read(write(tmp_path / "a.tar", gzip.compress(THREE + bytes(100 << 20))), keys="own")
    assert isinstance(failure, Failure) and failure.reason == "bad_tar" and "compressed (gzip)" in failure.message
    with pytest.raises(UsageError, match="decompress it first"):
        settings_of("s3://bucket/{000..099}.tar.gz")


def test_a_header_that_leads_back_to_itself_ends_the_tar(tmp_path: Path) -> None:
    header = bytearray(special("a.jpg", tarfile.REGTYPE))
    header[124:136] = (-512).to_bytes(12, "big", signed=True)  # a size of -512 bytes, in GNU's base 256
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    outputs = read(write(tmp_path / "a.tar", tar_of(("b.jpg", IMAGE))[:1024] + bytes(header) + bytes(2048)), keys="own")
    assert [type(output) for output in outputs] == [RawSample, Failure] and "damaged" in outputs[1].message  # type: ignore[union-attr]


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


# ---- links, several archives in one file, sparse files ---------------------------------------------------------------


def tar_of(*members: tuple[str, bytes | str | tarfile.TarInfo], format: int = tarfile.GNU_FORMAT) -> bytes:
    """A tar of files (bytes), symbolic links (text), hard links (text that begins with "=") and other things (headers)."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
                continue
            if isinstance(content, tarfile.TarInfo):
                info.type = content.type
            else:
                info.type = tarfile.LNKTYPE if content.startswith("=") else tarfile.SYMTYPE
                info.linkname = content.removeprefix("=")
            tar.addfile(info)
    return file.getvalue()


def thing(type: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo()
    info.type = type
    return info


def outcomes(path: Path, **settings: str) -> dict[str, str]:
    """The caption of each sample, whose image must be IMAGE, or the reason of its failure."""
    found: dict[str, str] = {}
    for output in read(path, keys="own", **settings):
        assert output.key not in found
        assert isinstance(output, Failure) or output.image == IMAGE
        found[output.key] = output.reason if isinstance(output, Failure) else output.caption
    return found


def test_tars_one_after_the_other_in_one_file_are_all_read(tmp_path: Path) -> None:
    first = tar_of(("a.jpg", IMAGE), ("a.txt", b"one"))
    second = tar_of(("b.jpg", IMAGE), ("b.txt", b"two"))
    expected = {"a": "one", "b": "two", "c": "three"}
    third = tar_of(("c.jpg", IMAGE), ("c.txt", b"three"), format=tarfile.PAX_FORMAT)
    assert outcomes(write(tmp_path / "a.tar", first + second + third)) == expected
    shortest = first.rstrip(b"\0")
    shortest += bytes(-len(shortest) % 512)  # `cat` of tars whose end was one block of zeros, or none
    assert outcomes(write(tmp_path / "a.tar", shortest + bytes(512) + second + bytes(3 << 20) + third)) == expected
    assert outcomes(write(tmp_path / "a.tar", shortest + second + third)) == expected
    source = TarSource((str(tmp_path / "a.tar"),), keys="own")
    assert [output.key for unit in source.units(10, limit=2) for output in source.read(unit)] == ["a", "b"]


def test_equal_names_in_tars_of_one_file_are_two_samples_and_parts_of_a_sample_are_one(tmp_path: Path) -> None:
    twice = tar_of(("a.jpg", IMAGE), ("a.txt", b"one")) + tar_of(("a.jpg", IMAGE), ("a.txt", b"two"))
    found = outcomes(write(tmp_path / "a.tar", twice))
    assert list(found.values()) == ["one", "two"] and list(found) == ["a", legal_key("a (archive 2)")]
    apart = tar_of(("a.jpg", IMAGE), ("b.jpg", IMAGE)) + tar_of(("a.txt", b"one"), ("b.txt", b"two"))
    assert outcomes(write(tmp_path / "a.tar", apart)) == {"a": "one", "b": "two"}


@pytest.mark.parametrize("junk", [b"\x1f\x8b a gzip file", b"x" * 600, bytes(700) + b"signature", THREE[512:1024]])
def test_what_follows_the_end_and_is_no_tar_is_one_failure_and_costs_no_sample(tmp_path: Path, junk: bytes) -> None:
    *samples, failure = read(write(tmp_path / "a.tar", tar_of(("a.jpg", IMAGE), ("b.jpg", IMAGE)) + junk), keys="own")
    assert [sample.key for sample in samples] == ["a", "b"] and isinstance(failure, Failure)
    assert failure.reason == "bad_tar" and "follows its end" in failure.message


def test_a_second_tar_that_is_cut_is_said_like_a_first(tmp_path: Path) -> None:
    second = tar_of(("b.jpg", IMAGE), ("c.jpg", IMAGE * 30), ("c.txt", b"words"))
    cut = tar_of(("a.jpg", IMAGE)) + second[: 4 * 512]
    outputs = read(write(tmp_path / "a.tar", cut))
    assert [type(output) for output in outputs] == [RawSample, RawSample, Failure]
    assert "truncated" in outputs[-1].message  # type: ignore[union-attr]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_links_to_members_are_followed_and_others_are_failures(tmp_path: Path, format: int) -> None:
    data = tar_of(
        ("early.jpg", "x/real.jpg"),  # before what it leads to
        ("x/real.jpg", IMAGE),
        ("x/real.txt", b"words"),
        ("early.txt", "./x/real.txt"),
        ("hard.jpg", "=x/real.jpg"),
        ("hard.txt", "=./x/real.txt"),
        ("x/beside.jpg", "real.jpg"),
        ("x/up.jpg", "../hard.jpg"),  # to a hard link to the file
        ("y/chain.jpg", "../x/up.jpg"),
        ("train", "x"),  # a link to a folder
        ("folder.jpg", "train/real.jpg"),
        ("loop1.jpg", "loop2.jpg"),
        ("loop2.jpg", "loop1.jpg"),
        ("self.jpg", "self.jpg"),
        ("gone.jpg", "x/gone.jpg"),
        ("absolute.jpg", "/x/real.jpg"),
        ("outside.jpg", "../x/real.jpg"),
        ("x/outside.jpg", "../../etc/passwd"),
        ("hardout.jpg", "=/etc/passwd"),
        ("caption.jpg", IMAGE),
        ("caption.txt", "nowhere.txt"),
        ("ignored.jpg", IMAGE),
        ("ignored.cls", "/nowhere"),
        format=format,
    )
    found = outcomes(write(tmp_path / "a.tar", data))
    real, beside, up, chain = (legal_key(name) for name in ("x/real", "x/beside", "x/up", "y/chain"))
    good = {"early": "words", real: "words", "hard": "words", beside: "", up: "", chain: "", "folder": ""}
    circles = dict.fromkeys(("loop1", "loop2", "self", "gone", "caption"), "broken_link")
    outside = dict.fromkeys(("absolute", "outside", legal_key("x/outside"), "hardout"), "outside")
    assert found == good | circles | outside | {"ignored": ""}


def test_many_links_in_a_row_and_to_devices_end_in_failures(tmp_path: Path) -> None:
    chain = [(f"{i}.jpg", f"{i + 1}.jpg") for i in range(100)]
    data = tar_of(*chain, ("100.jpg", IMAGE), ("d.jpg", thing(tarfile.CHRTYPE)), ("e.jpg", "d.jpg"), ("f.jpg", "d.jpg"))
    found = outcomes(write(tmp_path / "a.tar", data))
    assert len(found) == 104 and found["0"] == "broken_link" and found["99"] == found["100"] == ""
    assert (found["d"], found["e"]) == ("not_a_file", "broken_link")


@pytest.mark.parametrize("type", [tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE, b"M", b"Z"])
def test_what_has_the_name_of_an_image_and_is_no_file_is_counted(tmp_path: Path, type: bytes) -> None:
    data = tar_of(("x.v2", thing(tarfile.DIRTYPE)), ("a.jpg", thing(type)), ("b.jpg", IMAGE))
    assert outcomes(write(tmp_path / "a.tar", data)) == {"a": "not_a_file", "b": ""}


def test_sparse_files_and_long_names_written_by_gnu_tar_are_read(tmp_path: Path) -> None:
    folder, holes = tmp_path / "in", bytearray(1 << 20)
    folder.mkdir()
    holes[:4], holes[300_000:300_004], holes[-4:] = b"head", b"mid.", b"tail"
    with (folder / "s.jpg").open("wb") as file:  # with real holes, which tar -S looks for
        file.write(b"head")
        file.seek(300_000)
        file.write(b"mid.")
        file.seek((1 << 20) - 4)
        file.write(b"tail")
    long = "n" * 180
    (folder / f"{long}.jpg").write_bytes(IMAGE)
    for options in (["--format=gnu"], ["--format=pax"], ["--format=pax", "--sparse-version=0.1"]):
        path = tmp_path / "a.tar"
        command = ["tar", "-S", *options, "-cf", str(path), "-C", str(folder), "s.jpg", f"{long}.jpg"]
        subprocess.run(command, check=True)
        assert path.stat().st_size < 200_000, "this tar did not store the holes as holes"
        sparse, named = read(path, keys="own")
        assert isinstance(sparse, RawSample) and sparse.image == bytes(holes)
        assert isinstance(named, RawSample) and named.image == IMAGE and named.key == legal_key(long)


def test_a_tar_made_by_gnu_tar_of_hard_linked_files_gives_them_all(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(IMAGE)
    os.link(folder / "a.jpg", folder / "b.jpg")
    (folder / "c.jpg").symlink_to("a.jpg")
    subprocess.run(["tar", "-cf", str(tmp_path / "a.tar"), "-C", str(tmp_path), "./in"], check=True)
    assert outcomes(tmp_path / "a.tar") == {legal_key(f"in/{name}"): "" for name in "abc"}


# ---- several images in a sample --------------------------------------------------------------------------------------


def test_a_sample_with_two_images_fails_with_both_names_or_takes_the_one_that_is_asked_for(tmp_path: Path) -> None:
    mask = b"\x89PNG a mask"
    path = write(
        tmp_path / "a.tar",
        tar_bytes(
            ("a.webp", IMAGE), ("a.png", mask), ("a.txt", b"words"), ("b.png", mask), ("b.jpg", IMAGE),
            ("c.jpg", IMAGE), ("c.mask.png", mask), ("d.original.JPG", IMAGE), ("d.preview.jpg", mask),
        ),
    )  # fmt: skip
    outputs = {output.key: output for output in read(path, keys="own")}
    for key, names in (("a", ("a.webp", "a.png")), ("b", ("b.png", "b.jpg"))):
        failure = outputs[key]
        assert isinstance(failure, Failure) and failure.reason == "several_images"
        assert all(name in failure.message for name in names) and "source.image_member" in failure.message
    assert isinstance(outputs["c"], RawSample) and outputs["c"].image == IMAGE
    assert isinstance(outputs["d"], Failure) and "source.image_member = 'original.jpg'" in outputs["d"].message

    assert outcomes(path, image_member="webp") == {"a": "words", "b": "no_image", "c": "no_image", "d": "no_image"}
    assert outcomes(path, image_member="Original.jpg")["d"] == ""
    with pytest.raises(UsageError, match="image_member is empty"):
        TarSource((str(path),), image_member="")


def test_names_with_dots_never_lose_a_captioned_image(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.tar",
        tar_bytes(
            ("img_1.jpg", IMAGE), ("img_1.txt", b"one"), ("img_1.5.jpg", IMAGE), ("img_1.5.txt", b"one and a half"),
        ),
    )  # fmt: skip
    (failure,) = read(path, keys="own")
    assert isinstance(failure, Failure) and failure.reason == "several_images"
    assert "img_1.jpg" in failure.message and "img_1.5.jpg" in failure.message and "first dot" in failure.message
    assert outcomes(path, image_member="jpg") == {"img_1": "one"}
    assert outcomes(path, image_member="5.jpg") == {"img_1": "one and a half"}


def test_the_member_that_is_the_image_is_a_part_of_the_datasets_identity() -> None:
    plain, chosen = (TarSource(("x.tar",), image_member=name).describe() for name in (None, "webp"))
    assert "image_member" not in plain, "datasets made before the setting existed go on"
    assert chosen == plain | {"image_member": "webp"}


# ---- keys of several tars --------------------------------------------------------------------------------------------


def downloaded(folder: Path, keys: Sequence[str], stem: str = "00000") -> None:
    """A tar and its table, as img2dataset leaves them."""
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / f"{stem}.tar", tar_bytes(*((f"{key}.jpg", IMAGE) for key in keys)))
    rows = [{"key": key, "status": "success", "error_message": None} for key in keys]
    pq.write_table(pa.Table.from_pylist(rows), folder / f"{stem}.parquet")


def keys_of(*tars: Path, **settings: str) -> list[str]:
    source = TarSource(tuple(map(str, tars)), **settings)
    return [output.key for unit in source.units(10) for output in source.read(unit)]


def test_equal_keys_of_two_downloads_get_their_folders_name_in_front(tmp_path: Path) -> None:
    for name in ("laion", "coyo"):
        downloaded(tmp_path / name, ["000000000", "000000001"])
    both = (tmp_path / "laion" / "*.tar", tmp_path / "coyo" / "*.tar")
    expected = [f"{name}-00000000{i}" for name in ("laion", "coyo") for i in range(2)]
    assert keys_of(*both) == expected
    assert keys_of(*both, keys="prefixed") == [key.replace("-", "-00000-") for key in expected]
    with pytest.raises(UsageError, match=r"'000000000', in .*coyo/00000.tar and in .*laion/00000.tar; set source.keys"):
        keys_of(*both, keys="own")
    # one folder alone, or two whose keys differ, keep the keys that they always had
    assert keys_of(both[0]) == ["000000000", "000000001"]
    downloaded(tmp_path / "more", ["000010000"], stem="00001")
    assert keys_of(both[0], tmp_path / "more" / "*.tar") == ["000000000", "000000001", "000010000"]
    downloaded(tmp_path / "odd", ["000000001"], stem="0000000")  # another number of digits, and the same key
    assert keys_of(both[0], tmp_path / "odd" / "*.tar") == ["laion-000000000", "laion-000000001", "odd-000000001"]


def test_equal_keys_of_plain_tars_are_told_apart_by_the_shortest_end_of_their_path(tmp_path: Path) -> None:
    for name in ("a/train", "b/train"):
        (tmp_path / name).mkdir(parents=True)
        write(tmp_path / name / "0.tar", tar_bytes(("x.jpg", IMAGE)))
    both = [tmp_path / name / "train" / "0.tar" for name in "ab"]
    assert keys_of(*both) == ["a_train-0-x", "b_train-0-x"]
    write(both[1], tar_bytes(("y.jpg", IMAGE)))
    assert keys_of(*both) == ["0-x", "0-y"], "what was never equal stays as it was"


def test_keys_that_only_the_join_makes_equal_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.tar", tar_bytes(("b-c.jpg", IMAGE)))
    write(tmp_path / "a-b.tar", tar_bytes(("c.jpg", IMAGE)))
    with pytest.raises(UsageError, match=r"'a-b-c'.*rename one of the tars"):
        keys_of(tmp_path / "*.tar")
    write(tmp_path / "a-b.tar", tar_bytes(("d.jpg", IMAGE)))
    assert sorted(keys_of(tmp_path / "*.tar")) == ["a-b-c", "a-b-d"]


def test_equal_own_keys_of_plain_tars_in_one_folder_are_refused(tmp_path: Path) -> None:
    for name in "ab":
        write(tmp_path / f"{name}.tar", tar_bytes((f"{name}.jpg", IMAGE), ("same.jpg", IMAGE)))
    with pytest.raises(UsageError, match="'same'"):
        keys_of(tmp_path / "*.tar", keys="own")


# ---- the files of a unit ---------------------------------------------------------------------------------------------


def test_a_unit_knows_its_tar_and_table_by_size_and_ends_and_not_by_time(tmp_path: Path) -> None:
    downloaded(tmp_path, ["000000000"])
    tar = tmp_path / "00000.tar"

    def files() -> dict[str, tuple[int, str]]:
        (unit,) = TarSource((str(tar),)).units(10)
        return {file.name: (file.size, file.tag) for file in unit.files}

    before = files()
    assert before["00000.tar"][0] == tar.stat().st_size and set(before) == {"00000.tar", "00000.parquet"}
    os.utime(tar, (1, 1))
    assert files() == before
    write(tar, tar.read_bytes().replace(b"as they came", b"as they CAME"))
    assert files()["00000.tar"][0] == before["00000.tar"][0] and files() != before
    (tmp_path / "00000.parquet").unlink()
    assert files()["00000.parquet"] == (-1, "")
