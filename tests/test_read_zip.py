"""Zip archives of audio files."""

from __future__ import annotations

import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import fsspec
import pytest

from transforms.listing import InputError
from transforms.read import read_clips
from transforms.records import Shard, UnreadableClip
from transforms.shards import limit_shards, plan_shards


def write(file: Path, members: dict[str, bytes], packing: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(file, "w", packing) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file


def clips(file: Path | str) -> list[tuple[Any, ...]]:
    found: list[tuple[Any, ...]] = []
    (planned,) = plan_shards([str(file)]).shards
    for clip in read_clips(planned):
        if isinstance(clip, UnreadableClip):
            found.append((clip.member, clip.error.type, clip.error.message))
        else:
            found.append((clip.member, clip.audio.read()))
    return found


@pytest.mark.parametrize(
    "packing", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]
)
def test_audio_members_are_clips_in_the_order_of_the_archive(tmp_path: Path, packing: int) -> None:
    members = {"b.wav": b"B" * 9_000, "a/é.FLAC": b"A", "README": b"x", "c.wav": b""}
    file = write(tmp_path / "a.zip", members | {"__MACOSX/._b.wav": b"x", "d.wav/": b""}, packing)
    assert clips(file) == [("b.wav", b"B" * 9_000), ("a/é.FLAC", b"A"), ("c.wav", b"")]
    assert limit_shards(plan_shards([str(file)]).shards, 9)[0].max_clips == 3


def test_a_damaged_member_is_an_error_between_the_others(tmp_path: Path) -> None:
    members = {f"{n}.wav": bytes([65 + n]) * 500 for n in range(3)}
    file = write(tmp_path / "a.zip", members, zipfile.ZIP_STORED)
    content = bytearray(file.read_bytes())
    content[content.index(b"B" * 500) + 3] ^= 1
    file.write_bytes(content)
    message = "the member of the zip cannot be read: Bad CRC-32 for file '1.wav'"
    assert clips(file) == [
        ("0.wav", b"A" * 500),
        ("1.wav", "BrokenMember", message),
        ("2.wav", b"C" * 500),
    ]


def test_an_encrypted_member_is_an_error(tmp_path: Path) -> None:
    file = write(tmp_path / "a.zip", {"a.wav": b"A"}, zipfile.ZIP_STORED)
    content = bytearray(file.read_bytes())
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(mark) + offset] |= 1
    file.write_bytes(content)
    message = "the member of the zip cannot be read: it is encrypted"
    assert clips(file) == [("a.wav", "BrokenMember", message)]


@pytest.mark.parametrize("kept", [0, 30, -1, -30])
def test_a_truncated_zip_is_one_error(tmp_path: Path, kept: int) -> None:
    file = write(tmp_path / "a.zip", {"a.wav": b"A" * 100})
    file.write_bytes(file.read_bytes()[:kept])
    ((member, kind, message),) = clips(file)
    assert (member, kind) == (None, "BrokenShard")
    assert message.startswith("the zip is broken: ")


def test_a_zip_without_audio_is_left_out_or_refused(tmp_path: Path) -> None:
    write(tmp_path / "code.zip", {"a.py": b""})
    write(tmp_path / "clips.zip", {"a.wav": b"A"})
    planned = plan_shards([str(tmp_path)])
    assert [Path(shard.uri).name for shard in planned.shards] == ["clips.zip"]
    assert planned.ignored == Counter({".zip without audio": 1})
    with pytest.raises(InputError, match=r"code\.zip' has no audio member"):
        plan_shards([str(tmp_path / "code.zip")])


def test_a_zip_elsewhere_is_read(tmp_path: Path) -> None:
    content = write(tmp_path / "a.zip", {"a.wav": b"A" * 200_000}, zipfile.ZIP_STORED).read_bytes()
    fsspec.filesystem("memory").pipe("/earmark-test-zip/a.zip", content)
    assert clips("memory://earmark-test-zip/a.zip") == [("a.wav", b"A" * 200_000)]
    assert isinstance(plan_shards(["memory://earmark-test-zip"]).shards[0], Shard)


def test_a_name_that_is_no_utf8_in_a_zip_is_one_error(tmp_path):
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        archive.writestr("\u00e4.wav", b"x")
    content = (tmp_path / "z.zip").read_bytes().replace("\u00e4".encode(), b"\xff\xfe")
    (tmp_path / "z.zip").write_bytes(content)
    (shard,) = plan_shards([str(tmp_path / "z.zip")]).shards
    (clip,) = read_clips(shard)
    assert clip.error.type == "BrokenShard"
