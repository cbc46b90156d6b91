"""TFRecord files, written by the `tfrecord` package, and broken on purpose."""

from __future__ import annotations

import gzip
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tfrecord

from transforms import read_tfrecord
from transforms.listing import InputError
from transforms.read import read_clips
from transforms.records import Shard, UnreadableClip
from transforms.shards import limit_shards, plan_shards

FLAC = b"fLaC\0\0\0\x22 and so on"


def write(file: Path, *records: dict[str, tuple[Any, str]]) -> Path:
    writer = tfrecord.TFRecordWriter(str(file))
    for record in records:
        writer.write(record)
    writer.close()
    return file


def numbered(count: int) -> list[dict[str, tuple[Any, str]]]:
    return [{"audio": (FLAC + bytes([n]) * (n + 1), "byte"), "n": (n, "int")} for n in range(count)]


def expected(first: int, end: int) -> list[tuple[Any, ...]]:
    return [(f"record-{n:08d}", FLAC + bytes([n]) * (n + 1), {"n": n}) for n in range(first, end)]


def clips(file: Path) -> list[tuple[Any, ...]]:
    found: list[tuple[Any, ...]] = []
    for clip in read_clips(Shard("shard", str(file), "tfrecord", 0)):
        if isinstance(clip, UnreadableClip):
            found.append((clip.member, clip.error.type, clip.error.message))
        else:
            found.append((clip.member, clip.audio.read(), clip.metadata))
    return found


@pytest.mark.parametrize(
    "name",
    [
        *("a.tfrecord", "a.tfrecords", "A.TFRECORD", "a.tfrecord-00000-of-00010"),
        *("a.tfrecord.gz", "a.tfrecord-00000-of-00010.gz", "a.tfrecord.gz-00000-of-00010"),
    ],
)
def test_tfrecords_are_known_by_their_name(tmp_path: Path, name: str) -> None:
    write(tmp_path / name, *numbered(3))
    if ".gz" in name:
        (tmp_path / name).write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    (planned,) = plan_shards([str(tmp_path)]).shards
    assert (planned.kind, planned.uri) == ("tfrecord", str(tmp_path / name))
    assert clips(tmp_path / name) == expected(0, 3)
    assert limit_shards([planned], 2)[0].max_clips == 2


@pytest.mark.parametrize("pack", [gzip.compress, zlib.compress], ids=["gzip", "zlib"])
def test_compressed_files_are_known_by_their_bytes(tmp_path: Path, pack: Any) -> None:
    file = write(tmp_path / "a.tfrecord", *numbered(40))
    content = file.read_bytes()
    file.write_bytes(pack(content))
    assert clips(file) == expected(0, 40)
    file.write_bytes(pack(content)[:200])
    *before, broken = clips(file)
    assert before == expected(0, len(before))
    assert broken[:2] == (None, "BrokenShard")


def test_other_features_are_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_tfrecord, "MAX_FEATURE_BYTES", 1_000)
    record = {
        "audio/encoded": (FLAC, "byte"),
        "audio/format": (b"flac", "byte"),
        "label": ([3, -7], "int"),
        "score": ([1.5, float("nan")], "float"),
        "text": ("été".encode(), "byte"),
        "raw": (b"\xff\xfe\0", "byte"),
        "embedding": ([0.5] * 1_000, "float"),
        "nothing": ([], "int"),
        "filename": (b"a/b c.flac", "byte"),
    }
    assert clips(write(tmp_path / "a.tfrecord", record)) == [
        (
            "a/b c.flac",
            FLAC,
            {
                "audio/format": "flac",
                "filename": "a/b c.flac",
                "label": [3, -7],
                "score": [1.5, None],
                "text": "été",
            },
        )
    ]


@pytest.mark.parametrize(
    ("features", "found"),
    [
        ({"audio": FLAC, "image": b"\x89PNG\r\n\x1a\n"}, FLAC),
        ({"WAV": FLAC, "text": b"x"}, FLAC),
        ({"bytes": b"text", "audio/encoded": FLAC}, FLAC),
        ({"blob": FLAC, "text": b"x"}, FLAC),
        ({"audio": b"no form that is known", "blob": FLAC}, b"no form that is known"),
    ],
)
def test_the_audio_is_found_by_name_then_by_its_bytes(
    tmp_path: Path, features: dict[str, bytes], found: bytes
) -> None:
    record = {name: (content, "byte") for name, content in features.items()}
    ((_, content, _),) = clips(write(tmp_path / "a.tfrecord", record))
    assert content == found


def test_each_value_of_the_audio_is_a_clip(tmp_path: Path) -> None:
    record = {"audio": ([FLAC + b"1", FLAC + b"2"], "byte"), "id": (7, "int")}
    assert clips(write(tmp_path / "a.tfrecord", record)) == [
        ("7", FLAC + b"1", {"id": 7}),
        ("7", FLAC + b"2", {"id": 7}),
    ]


def test_a_record_without_audio_is_an_error_of_its_own(tmp_path: Path) -> None:
    numbers = {"audio": ([1, 2, 3], "int"), "id": (b"x", "byte")}
    file = write(tmp_path / "a.tfrecord", *numbered(1), numbers, {}, *numbered(1))
    message = "the record has no feature of encoded audio; it has"
    assert clips(file) == [
        *expected(0, 1),
        ("x", "NoBytes", f"{message} audio, id"),
        ("record-00000002", "NoBytes", f"{message} none"),
        ("record-00000003", FLAC + b"\0", {"n": 0}),
    ]


def places_of(file: Path) -> list[tuple[int, int]]:
    """(where it begins, its bytes) of each record: 8 of length, 4 of checksum, data, 4 of checksum."""
    content, at, found = file.read_bytes(), 0, []
    while at < len(content):
        size = int.from_bytes(content[at : at + 8], "little")
        found.append((at, size))
        at += 16 + size
    return found


@pytest.mark.parametrize("place", ["data", "checksum"])
def test_a_damaged_record_is_an_error_between_the_others(tmp_path: Path, place: str) -> None:
    file = write(tmp_path / "a.tfrecord", *numbered(5))
    at, size = places_of(file)[2]
    content = bytearray(file.read_bytes())
    content[at + 12 + (size // 2 if place == "data" else size)] ^= 1
    file.write_bytes(content)
    broken = (None, "BrokenShard", "record 2 of the TFRecord file is damaged: wrong checksum")
    assert clips(file) == [*expected(0, 2), broken, *expected(3, 5)]


@pytest.mark.parametrize("byte", [0, 3, 9])
def test_a_damaged_length_ends_the_file(tmp_path: Path, byte: int) -> None:
    file = write(tmp_path / "a.tfrecord", *numbered(5))
    content = bytearray(file.read_bytes())
    content[places_of(file)[2][0] + byte] ^= 1
    file.write_bytes(content)
    message = "the TFRecord file is broken after 2 records: a length has a wrong checksum"
    assert clips(file) == [*expected(0, 2), (None, "BrokenShard", message)]


def test_a_length_that_no_record_has_reads_nothing_more(tmp_path: Path) -> None:
    head = (1 << 60).to_bytes(8, "little")
    (tmp_path / "a.tfrecord").write_bytes(head + read_tfrecord._masked_crc(head))
    ((_, kind, message),) = clips(tmp_path / "a.tfrecord")
    assert kind == "BrokenShard"
    assert message.endswith(f"a record has {1 << 60} bytes; an Example has less than 2 GiB")


@pytest.mark.parametrize("part", range(1, 20))
def test_a_truncated_file_gives_the_clips_before_the_break(tmp_path: Path, part: int) -> None:
    file = write(tmp_path / "a.tfrecord", *numbered(5))
    places = places_of(file)
    content = file.read_bytes()
    kept = len(content) * part // 20
    file.write_bytes(content[:kept])
    whole = sum(at + 16 + size <= kept for at, size in places)
    found = clips(file)
    assert found[:whole] == expected(0, whole)
    if kept in (at for at, _ in places):
        assert len(found) == whole
    else:
        assert [clip[:2] for clip in found[whole:]] == [(None, "BrokenShard")]


@pytest.mark.parametrize("content", [b"x", b"no records at all, of any length", bytes(50)])
def test_a_file_that_is_no_tfrecord_is_one_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.tfrecord").write_bytes(content)
    (planned,) = plan_shards([str(tmp_path)]).shards
    assert [clip[:2] for clip in clips(Path(planned.uri))] == [(None, "BrokenShard")]


def test_an_empty_file_has_no_records(tmp_path: Path) -> None:
    (tmp_path / "a.tfrecord").write_bytes(b"")
    assert clips(tmp_path / "a.tfrecord") == []


def test_records_of_something_else_are_left_out_or_refused(tmp_path: Path) -> None:
    write(tmp_path / "features.tfrecord", {"embedding": ([0.5], "float"), "id": (b"x", "byte")})
    write(tmp_path / "clips.tfrecord", *numbered(1))
    planned = plan_shards([str(tmp_path)])
    assert [Path(s.uri).name for s in planned.shards] == ["clips.tfrecord"]
    assert planned.ignored == Counter({".tfrecord without audio": 1})
    with pytest.raises(InputError, match=r"no encoded audio in its first record: .*embedding, id$"):
        plan_shards([str(tmp_path / "features.tfrecord")])
