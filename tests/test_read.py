from __future__ import annotations

import bz2
import datetime
import gzip
import io
import lzma
import math
import os
import subprocess
import tarfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
import xxhash
import zstandard

from transforms import opening, read_tar
from transforms.listing import InputError
from transforms.read import read_clips
from transforms.read_table import audio_column
from transforms.read_tar import count_tar_clips
from transforms.records import Shard, UnreadableClip
from transforms.shards import plan_shards
from transforms.suffixes import is_audio

MakeTar = Callable[..., Path]
Members = list[tuple[str, bytes]]

AUDIO = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def shard(kind: Any, uri: Path | str, **fields: Any) -> Shard:
    return Shard("shard", str(uri), kind, 0, **fields)


def clips(what: Shard) -> list[tuple[Any, ...]]:
    """(member, bytes, metadata) of each clip; ("unreadable", member, type, metadata) of the rest."""
    found: list[tuple[Any, ...]] = []
    for clip in read_clips(what):
        if isinstance(clip, UnreadableClip):
            assert clip.error.stage == "read"
            found.append(("unreadable", clip.member, clip.error.type, clip.metadata))
        else:
            content = clip.audio.read()
            assert clip.size_bytes == len(content)
            assert clip.xxh128 == xxhash.xxh128_hexdigest(content)
            found.append((clip.member, content, clip.metadata))
    return found


def messages(what: Shard) -> list[str]:
    return [c.error.message for c in read_clips(what) if isinstance(c, UnreadableClip)]


def numbered(count: int) -> Members:
    """Clips of different lengths, each with its metadata after it."""
    members = []
    for number in range(count):
        members.append((f"clip-{number}.wav", bytes([number]) * (300 + 400 * number)))
        members.append((f"clip-{number}.json", b'{"number": %d}' % number))
    return members


BROKEN = ("unreadable", None, "BrokenShard", {})


# ---------------------------------------------------------------------- suffixes


@pytest.mark.parametrize("name", ["a.wav", "a/b.MP3", "a.b.flac", "--04kMEQOAs_0.000_10.000.ogg"])
def test_audio_is_known_by_the_last_suffix(name: str) -> None:
    assert is_audio(name)


@pytest.mark.parametrize(
    "name", ["a.json", "a", "wav", ".wav", "._a.wav", "b/.a.wav", "a.wav/b", "a.wav.txt", "a.wav "]
)
def test_other_names_are_no_audio(name: str) -> None:
    assert not is_audio(name)


# -------------------------------------------------------------------------- tars


def test_clips_of_a_tar_come_in_order_with_their_bytes(tmp_path: Path, make_tar: MakeTar) -> None:
    members = [
        ("b.wav", b"two"),
        ("a.flac", b"one"),
        ("c.MP3", b""),
        ("d.ogg", bytes(range(251)) * 12_600),
    ]
    tar = make_tar(tmp_path / "a.tar", members)
    assert clips(shard("tar", tar)) == [(name, content, {}) for name, content in members]


def test_siblings_before_and_after_the_audio_are_its_metadata(
    tmp_path: Path, make_tar: MakeTar
) -> None:
    members = [
        ("a.json", b'{"speaker": "x", "n": [1, 2.5, null]}'),
        ("a.wav", b"A"),
        ("b.wav", b"B"),
        ("b.json", b'{"speaker": "y"}'),
        ("b.txt", b" hello\n"),
        ("b.cls", b"7\n"),
        ("c.txt", "été".encode()),
        ("c.wav", b"C"),
        ("c.JSON", b'{"late": true}'),
        ("d.wav", b"D"),
    ]
    assert clips(shard("tar", make_tar(tmp_path / "a.tar", members))) == [
        ("a.wav", b"A", {"speaker": "x", "n": [1, 2.5, None]}),
        ("b.wav", b"B", {"speaker": "y", "txt": "hello", "cls": "7"}),
        ("c.wav", b"C", {"txt": "été", "late": True}),
        ("d.wav", b"D", {}),
    ]


@pytest.mark.parametrize(
    ("content", "metadata"),
    [
        (b"[1, 2]", {"json": [1, 2]}),
        (b"7", {"json": 7}),
        (b"{broken", {"json": "{broken"}),
        (b"", {"json": ""}),
        (b'{"a": "\xff"}', {"a": "\ufffd"}),
        (b'{"a": [NaN, Infinity, 1]}', {"a": [None, None, 1]}),
        (b"[" * 100_000, {"json": "[" * 100_000}),
    ],
    ids=["array", "number", "broken", "empty", "not UTF-8", "not finite", "far too deep"],
)
def test_json_that_is_no_object_is_kept_whole(
    tmp_path: Path, make_tar: MakeTar, content: bytes, metadata: dict[str, Any]
) -> None:
    tar = make_tar(tmp_path / "a.tar", [("a.json", content), ("a.wav", b"A")])
    assert clips(shard("tar", tar)) == [("a.wav", b"A", metadata)]


def test_other_siblings_are_passed_over(
    tmp_path: Path, make_tar: MakeTar, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_tar, "MAX_METADATA_BYTES", 10)
    members = [
        ("a.wav", b"A"),
        ("a.npy", b"\x93NUMPY"),
        ("a.json", b'{"much": "too much for metadata"}'),
        ("a.txt", b"0123456789"),
        ("README", b"about"),
    ]
    tar = make_tar(tmp_path / "a.tar", members)
    assert clips(shard("tar", tar)) == [("a.wav", b"A", {"txt": "0123456789"})]


def test_two_audio_members_of_one_sample_are_two_clips(tmp_path: Path, make_tar: MakeTar) -> None:
    members = [
        ("a.mix.wav", b"M"),
        ("a.json", b'{"n": 1}'),
        ("a.voice.flac", b"V"),
        ("b.wav", b"B"),
    ]
    assert clips(shard("tar", make_tar(tmp_path / "a.tar", members))) == [
        ("a.mix.wav", b"M", {"n": 1}),
        ("a.voice.flac", b"V", {"n": 1}),
        ("b.wav", b"B", {}),
    ]


def test_names_with_dots_and_dashes_keep_their_metadata(tmp_path: Path, make_tar: MakeTar) -> None:
    name = "--04kMEQOAs_0.000_10.000"
    other = "-0DLPzsiXXE_30.000_40.000"
    members = [
        (f"{name}.wav", b"1"),
        (f"{name}.json", b'{"n": 1}'),
        (f"{other}.json", b'{"n": 2}'),
        (f"{other}.wav", b"2"),
    ]
    assert clips(shard("tar", make_tar(tmp_path / "a.tar", members))) == [
        (f"{name}.wav", b"1", {"n": 1}),
        (f"{other}.wav", b"2", {"n": 2}),
    ]


def test_folders_in_a_tar_are_part_of_the_key(tmp_path: Path, make_tar: MakeTar) -> None:
    members = [
        ("one/a.json", b'{"n": 1}'),
        ("one/a.wav", b"1"),
        ("two/a.wav", b"2"),
        ("two/a.json", b'{"n": 2}'),
        ("./three.x/a.wav", b"3"),
        ("./three.x/a.json", b'{"n": 3}'),
    ]
    assert clips(shard("tar", make_tar(tmp_path / "a.tar", members))) == [
        ("one/a.wav", b"1", {"n": 1}),
        ("two/a.wav", b"2", {"n": 2}),
        ("./three.x/a.wav", b"3", {"n": 3}),
    ]


def test_metadata_of_names_that_share_a_key_goes_to_the_audio_of_its_stem(
    tmp_path: Path, make_tar: MakeTar
) -> None:
    members = [
        ("talk_0.0.wav", b"0"),
        ("talk_0.0.json", b'{"n": 0}'),
        ("talk_0.5.json", b'{"n": 5}'),
        ("talk_0.5.wav", b"5"),
        ("talk_0.txt", b"both"),
    ]
    assert clips(shard("tar", make_tar(tmp_path / "a.tar", members))) == [
        ("talk_0.0.wav", b"0", {"n": 0, "txt": "both"}),
        ("talk_0.5.wav", b"5", {"n": 5, "txt": "both"}),
    ]


def test_many_clips_of_one_key_are_all_read(tmp_path: Path, make_tar: MakeTar) -> None:
    members = [(f"v1.{number:03d}.wav", b"%d" % number) for number in range(100)]
    assert clips(shard("tar", make_tar(tmp_path / "a.tar", members))) == [
        (name, content, {}) for name, content in members
    ]


def test_links_in_a_tar_are_errors_and_folders_are_nothing(tmp_path: Path) -> None:
    special = {"d.wav": tarfile.DIRTYPE, "s.wav": tarfile.SYMTYPE, "h.wav": tarfile.LNKTYPE}
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, kind in {**special, "s.txt": tarfile.SYMTYPE}.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "other.wav"
            tar.addfile(info)
        info = tarfile.TarInfo("a.wav")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"A"))
    assert clips(shard("tar", tmp_path / "a.tar")) == [
        ("unreadable", "s.wav", "Link", {}),
        ("unreadable", "h.wav", "Link", {}),
        ("a.wav", b"A", {}),
    ]
    assert (
        messages(shard("tar", tmp_path / "a.tar"))
        == ["the member is a link to 'other.wav'; links in tars are not followed"] * 2
    )


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_and_every_tar_format_are_read(tmp_path: Path, format: int) -> None:
    # ustar takes at most 100 bytes of name, in a folder of at most 155.
    name = "f" * 120 + "/" + "n" * 90 + ".wav"
    with tarfile.open(tmp_path / "a.tar", "w", format=format) as tar:
        for member in (name, "b.wav"):
            info = tarfile.TarInfo(member)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
    assert clips(shard("tar", tmp_path / "a.tar")) == [(name, b"abc", {}), ("b.wav", b"abc", {})]


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.tar"])
def test_a_compressed_tar_is_read(tmp_path: Path, make_tar: MakeTar, name: str) -> None:
    tar = make_tar(tmp_path / name, numbered(4), "w:gz")
    assert clips(shard("tar", tar)) == [
        (f"clip-{n}.wav", bytes([n]) * (300 + 400 * n), {"number": n}) for n in range(4)
    ]


def test_a_compressed_tar_of_several_gzip_members_is_read(
    tmp_path: Path, make_tar: MakeTar
) -> None:
    content = make_tar(tmp_path / "a.tar", numbered(3)).read_bytes()
    parts = [content[:1_000], content[1_000:2_000], content[2_000:]]
    (tmp_path / "b.tar.gz").write_bytes(b"".join(map(gzip.compress, parts)))
    expected = clips(shard("tar", tmp_path / "a.tar"))
    assert len(expected) == 3
    assert clips(shard("tar", tmp_path / "b.tar.gz")) == expected


def test_a_compressed_tar_with_a_wrong_checksum_is_an_error(
    tmp_path: Path, make_tar: MakeTar
) -> None:
    tar = make_tar(tmp_path / "a.tar.gz", numbered(2), "w:gz")
    content = bytearray(tar.read_bytes())
    content[-8] ^= 1
    tar.write_bytes(content)
    assert clips(shard("tar", tar)) == [
        ("clip-0.wav", bytes(300), {"number": 0}),
        ("clip-1.wav", b"\1" * 700, {"number": 1}),
        BROKEN,
    ]


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": partial(bz2.compress, compresslevel=1),  # blocks of 100,000 bytes
    "xz": partial(lzma.compress, preset=0),
    "zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}


@pytest.mark.parametrize(
    ("name", "form"),
    [
        *(("a.tar.zst", "zst"), ("a.tzst", "zst"), ("a.tar.bz2", "bz2"), ("a.tbz2", "bz2")),
        *(("a.tbz", "bz2"), ("a.tar.xz", "xz"), ("A.TXZ", "xz"), ("a.tgz", "gz"), ("a.tar", "zst")),
    ],
)
def test_tars_are_read_in_whatever_they_are_packed(
    tmp_path: Path, make_tar: MakeTar, name: str, form: str
) -> None:
    content = make_tar(tmp_path / "plain", numbered(6)).read_bytes()
    expected = clips(shard("tar", tmp_path / "plain"))
    (tmp_path / name).write_bytes(PACKERS[form](content))
    (planned,) = plan_shards([str(tmp_path / name)]).shards
    assert planned.kind == "tar"
    assert planned.id.startswith(("a-", "A.TXZ-"))
    assert clips(planned) == expected
    # Parts that were packed one by one, as several threads do.
    parts = [content[:1_000], content[1_000:2_000], content[2_000:]]
    (tmp_path / name).write_bytes(b"".join(map(PACKERS[form], parts)))
    assert clips(planned) == expected


@pytest.mark.parametrize("form", PACKERS)
@pytest.mark.parametrize("part", [1, 5, 10, 15, 19])
def test_a_packed_tar_that_is_cut_gives_the_clips_before_the_cut(
    tmp_path: Path, make_tar: MakeTar, form: str, part: int
) -> None:
    random = np.random.default_rng(0)
    members = [(f"{number}.wav", random.bytes(50_000)) for number in range(20)]
    content = PACKERS[form](make_tar(tmp_path / "plain", members).read_bytes())
    (tmp_path / "a.tar").write_bytes(content[: len(content) * part // 20])
    *before, broken = clips(shard("tar", tmp_path / "a.tar"))
    assert (broken[0], broken[2:]) == ("unreadable", ("BrokenShard", {}))
    assert [(name, audio) for name, audio, _ in before] == members[: len(before)]
    assert len(before) >= part - 5  # nothing comes of a block that is not whole


@pytest.mark.parametrize("form", PACKERS)
def test_a_packed_tar_with_a_wrong_byte_is_an_error(
    tmp_path: Path, make_tar: MakeTar, form: str
) -> None:
    content = bytearray(PACKERS[form](make_tar(tmp_path / "plain", numbered(3)).read_bytes()))
    content[-6 if form != "xz" else len(content) // 2] ^= 0x10
    (tmp_path / "a.tar").write_bytes(content)
    assert clips(shard("tar", tmp_path / "a.tar"))[-1][2] == "BrokenShard"


def test_what_webdataset_writes_is_read_as_it_reads_it(tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "x-000000.tar")) as writer:
        writer.write(
            {"__key__": "a/0001", "flac": b"A", "json": {"text": ["a dog"], "tag": ["dog"]}}
        )
        writer.write({"__key__": "a/0002", "voice.wav": b"B", "music.wav": b"C", "txt": "two"})
        writer.write(
            {"__key__": "--04kMEQOAs_0", "000_10.000.wav": b"D", "000_10.000.json": {"n": 1}}
        )
    ours = clips(shard("tar", tmp_path / "x-000000.tar"))
    assert ours == [
        ("a/0001.flac", b"A", {"text": ["a dog"], "tag": ["dog"]}),
        ("a/0002.music.wav", b"C", {"txt": "two"}),
        ("a/0002.voice.wav", b"B", {"txt": "two"}),
        ("--04kMEQOAs_0.000_10.000.wav", b"D", {"n": 1}),
    ]
    theirs = webdataset.WebDataset(str(tmp_path / "x-000000.tar"), shardshuffle=False)
    found = [
        value
        for sample in theirs
        for name, value in sample.items()
        if name.endswith(("wav", "flac"))
    ]
    assert sorted(found) == [audio for _, audio, _ in sorted(ours, key=lambda clip: clip[1])]


def test_a_sparse_member_and_old_headers_are_read(tmp_path: Path) -> None:
    """As GNU tar writes a file with holes, and as version 7 wrote all."""
    (tmp_path / "a.wav").write_bytes(b"")
    with (tmp_path / "a.wav").open("r+b") as file:
        for place in (0, 1 << 20, 3 << 20):
            file.seek(place)
            file.write(b"sound" * 1_000)
    (tmp_path / "b.wav").write_bytes(b"B" * 700)
    content = (tmp_path / "a.wav").read_bytes()
    for format in ("gnu", "oldgnu", "posix", "v7"):
        options = ["--sparse"] if format in ("gnu", "oldgnu", "posix") else []
        subprocess.run(
            ["tar", f"--format={format}", *options, "-cf", "x.tar", "a.wav", "b.wav"],
            cwd=tmp_path,
            check=True,
        )
        sparse = (tmp_path / "x.tar").stat().st_size < len(content)
        assert clips(shard("tar", tmp_path / "x.tar"))[-2:] == [
            ("a.wav", content, {}), ("b.wav", b"B" * 700, {})
        ], format  # fmt: skip
        assert sparse == bool(options)


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_that_are_not_utf8_become_valid_text(tmp_path: Path, format: int) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", format=format, errors="surrogateescape") as tar:
        for name, content in [(b"caf\xe9.wav", b"A"), (b"caf\xe9.json", b'{"n": 1}')]:
            info = tarfile.TarInfo(os.fsdecode(name))
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    assert clips(shard("tar", tmp_path / "a.tar")) == [("caf\\xe9.wav", b"A", {"n": 1})]


def test_a_large_member_waits_on_disk(
    tmp_path: Path, make_tar: MakeTar, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "_IN_MEMORY_BYTES", 1_000)
    content = bytes(range(250)) * 20
    tar = make_tar(tmp_path / "a.tar", [("a.wav", content), ("b.wav", b"B")])
    assert clips(shard("tar", tar)) == [("a.wav", content, {}), ("b.wav", b"B", {})]


def test_a_tar_without_clips_gives_none(tmp_path: Path, make_tar: MakeTar) -> None:
    tar = make_tar(tmp_path / "a.tar", [("a.txt", b"text")])
    assert clips(shard("tar", tar)) == []
    assert clips(shard("tar", make_tar(tmp_path / "empty.tar", []))) == []


def test_a_missing_tar_is_an_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        clips(shard("tar", tmp_path / "gone.tar"))


def test_tar_clips_are_counted_no_further_than_needed(tmp_path: Path, make_tar: MakeTar) -> None:
    tar = make_tar(tmp_path / "a.tar", numbered(5))
    counts = []
    for enough in (1, 4, 5, 99):
        with tar.open("rb") as stream:
            counts.append(count_tar_clips(stream, enough))
    assert counts == [1, 4, 5, 5]


# ------------------------------------------------------------------- broken tars


def complete_clips(tar: Path, kept: int) -> list[str]:
    """Audio members that lie within the first `kept` bytes of `tar`."""
    with tarfile.open(tar) as opened:
        return [
            info.name
            for info in opened
            if is_audio(info.name) and info.offset_data + info.size <= kept
        ]


@pytest.mark.parametrize("part", range(41))
def test_a_truncated_tar_gives_the_clips_before_the_break_and_one_error(
    tmp_path: Path, make_tar: MakeTar, part: int
) -> None:
    members = numbered(6)
    tar = make_tar(tmp_path / "a.tar", members)
    content = tar.read_bytes()
    with tarfile.open(tar) as opened:
        end = opened.getmembers()[-1].offset_data + 512  # where the end marker begins
    kept = end * part // 40
    (tmp_path / "cut.tar").write_bytes(content[:kept])

    *before, broken = clips(shard("tar", tmp_path / "cut.tar"))
    expected = complete_clips(tar, kept)
    assert [(name, audio) for name, audio, _ in before] == [
        (name, audio) for name, audio in members if name in expected
    ]
    assert broken[0] == "unreadable"
    assert broken[2:] == ("BrokenShard", {})


@pytest.mark.parametrize("part", [1, 5, 10, 15, 18, 19])
def test_a_truncated_compressed_tar_loses_no_clip_silently(
    tmp_path: Path, make_tar: MakeTar, part: int
) -> None:
    random = np.random.default_rng(0)  # incompressible: a break is near where it is cut
    members = [(f"{number}.wav", random.bytes(5_000)) for number in range(20)]
    tar = make_tar(tmp_path / "a.tar", members)
    content = gzip.compress(tar.read_bytes())
    kept = content[: len(content) * part // 20]
    (tmp_path / "cut.tar.gz").write_bytes(kept)

    *before, broken = clips(shard("tar", tmp_path / "cut.tar.gz"))
    assert (broken[0], broken[2:]) == ("unreadable", ("BrokenShard", {}))
    whole = complete_clips(tar, len(zlib.decompressobj(31).decompress(kept)))
    assert [(name, audio) for name, audio, _ in before] == members[: len(whole)]


def test_the_metadata_of_the_last_clip_before_a_break_is_kept(
    tmp_path: Path, make_tar: MakeTar
) -> None:
    tar = make_tar(tmp_path / "a.tar", numbered(2))
    tar.write_bytes(tar.read_bytes()[: 4 * 512 + 100])  # inside the header of clip-1.wav
    first = ("clip-0.wav", bytes(300), {"number": 0})
    assert clips(shard("tar", tar)) == [first, BROKEN]
    assert messages(shard("tar", tar)) == [
        "the tar is broken after 2 members: it ends inside a header"
    ]


def test_a_tar_that_ends_inside_a_clip_names_it(tmp_path: Path, make_tar: MakeTar) -> None:
    tar = make_tar(tmp_path / "a.tar", [("a.wav", b"A" * 600), ("b.wav", b"B" * 600)])
    tar.write_bytes(tar.read_bytes()[: 512 + 1_024 + 512 + 300])
    assert clips(shard("tar", tar)) == [
        ("a.wav", b"A" * 600, {}),
        ("unreadable", "b.wav", "BrokenShard", {}),
    ]
    assert messages(shard("tar", tar)) == [
        "the tar is broken inside member 2: it ends inside a member"
    ]


def test_a_tar_without_its_end_marker_says_so(tmp_path: Path, make_tar: MakeTar) -> None:
    tar = make_tar(tmp_path / "a.tar", [("a.wav", b"A")])
    tar.write_bytes(tar.read_bytes()[:1_024])
    assert clips(shard("tar", tar)) == [("a.wav", b"A", {}), BROKEN]
    assert messages(shard("tar", tar)) == [
        "the tar is broken after 1 members: it ends without tar's end marker"
    ]


@pytest.mark.parametrize("kept", [512, 1_024])
def test_an_end_marker_without_the_padding_behind_it_is_enough(
    tmp_path: Path, make_tar: MakeTar, kept: int
) -> None:
    tar = make_tar(tmp_path / "a.tar", [("a.wav", b"A")])
    tar.write_bytes(tar.read_bytes()[: 1_024 + kept])
    assert clips(shard("tar", tar)) == [("a.wav", b"A", {})]


@pytest.mark.parametrize("damage", [b"\xff" * 512, b"\x01", b"x" * 512], ids=["ff", "bit", "text"])
def test_a_damaged_header_in_the_middle_is_an_error(
    tmp_path: Path, make_tar: MakeTar, damage: bytes
) -> None:
    tar = make_tar(tmp_path / "a.tar", [(f"{n}.wav", b"x") for n in range(3)])
    content = bytearray(tar.read_bytes())
    content[1_024 : 1_024 + len(damage)] = damage
    tar.write_bytes(content)
    assert clips(shard("tar", tar)) == [("0.wav", b"x", {}), BROKEN]
    assert messages(shard("tar", tar)) == ["the tar is broken after 1 members: a header is damaged"]


@pytest.mark.parametrize(
    "content",
    [b"", b"x", b"no tar at all" * 500, gzip.compress(b"x" * 9_000)],
    ids=["empty", "a letter", "words", "gzip"],
)
@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
def test_a_file_that_is_no_tar_is_one_error(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert clips(shard("tar", tmp_path / name)) == [BROKEN]


def test_messages_of_broken_tars_name_no_path_and_no_address(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"no tar at all" * 500)
    (message,) = messages(shard("tar", tmp_path / "a.tar"))
    assert message.startswith("the tar is broken after 0 members: ")
    assert str(tmp_path) not in message
    assert "0x" not in message


# ----------------------------------------------------------------------- Parquet


def write_parquet(
    file: Path, cells: list[Any], row_group_size: int | None = None, **columns: Any
) -> Path:
    table = pa.table({"audio": pa.array(cells, AUDIO), **columns})
    pq.write_table(table, file, row_group_size=row_group_size)
    return file


def cells(count: int) -> list[dict[str, Any]]:
    return [{"bytes": bytes([n]) * (n + 1), "path": f"{n}.wav"} for n in range(count)]


def expected_rows(first: int, end: int) -> list[tuple[Any, ...]]:
    return [(f"{n}.wav", bytes([n]) * (n + 1), {}) for n in range(first, end)]


def test_rows_of_a_parquet_file_are_clips(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", cells(40), row_group_size=7)
    assert clips(shard("parquet", file)) == expected_rows(0, 40)


def test_a_row_without_a_path_is_named_by_its_number(tmp_path: Path) -> None:
    rows = [{"bytes": b"A", "path": None}, {"bytes": b"B", "path": ""}, {"bytes": b"C"}]
    file = write_parquet(tmp_path / "a.parquet", rows)
    assert [clip[0] for clip in clips(shard("parquet", file))] == [
        "row-00000000",
        "row-00000001",
        "row-00000002",
    ]


def test_a_row_without_bytes_is_an_error_of_its_own(tmp_path: Path) -> None:
    rows = [
        {"bytes": b"A", "path": "a.wav"},
        {"bytes": None, "path": "b.wav"},
        None,
        {"bytes": b"", "path": "d.wav"},
    ]
    file = write_parquet(tmp_path / "a.parquet", rows, n=[1, 2, 3, 4])
    assert clips(shard("parquet", file)) == [
        ("a.wav", b"A", {"n": 1}),
        ("unreadable", "b.wav", "FileNotFound", {"n": 2}),
        ("unreadable", "row-00000002", "NoBytes", {"n": 3}),
        ("d.wav", b"", {"n": 4}),
    ]
    assert messages(shard("parquet", file)) == [
        "the row holds no audio bytes, and the file that its path names is not there",
        "the row holds no audio bytes, and no path",
    ]


def test_other_columns_are_metadata_unless_they_hold_bytes(tmp_path: Path) -> None:
    file = write_parquet(
        tmp_path / "a.parquet",
        cells(1),
        text=["é"],
        day=[datetime.date(2024, 2, 29)],
        nested=[{"a": [1, 2, None, math.nan]}],
        level=[-math.inf],
        missing=pa.array([None], pa.string()),
        image=[{"bytes": b"PNG", "path": "a.png"}],
        raw=[b"raw"],
    )
    expected = {
        "text": "é",
        "day": "2024-02-29",
        "nested": {"a": [1, 2, None, None]},
        "level": None,
        "missing": None,
        "image": {"path": "a.png"},
    }
    assert clips(shard("parquet", file)) == [("0.wav", b"\0", expected)]


def test_a_value_that_python_cannot_hold_is_null_in_the_metadata(tmp_path: Path) -> None:
    far = pa.array([2**60], pa.int64()).cast(pa.timestamp("us"))  # the year 38,505
    table = pa.table({"audio": pa.array(cells(1), AUDIO), "far": far, "n": [1]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert clips(shard("parquet", tmp_path / "a.parquet")) == [
        ("0.wav", b"\0", {"far": None, "n": 1})
    ]


def test_only_the_row_groups_of_a_shard_are_read(tmp_path: Path) -> None:
    rows = [{"bytes": bytes([n]), "path": None} for n in range(10)]
    file = write_parquet(tmp_path / "a.parquet", rows, row_group_size=3)
    found = [
        [(member, content) for member, content, _ in clips(shard("parquet", file, row_groups=part))]
        for part in [(0, 1), (1, 3), (3, 4)]
    ]
    expected = [(f"row-{n:08d}", bytes([n])) for n in range(10)]
    assert found == [expected[:3], expected[3:9], expected[9:]]


def test_a_large_binary_column_is_audio_too(tmp_path: Path) -> None:
    kind = pa.struct([("bytes", pa.large_binary()), ("path", pa.string())])
    pq.write_table(pa.table({"sound": pa.array(cells(2), kind)}), tmp_path / "a.parquet")
    assert clips(shard("parquet", tmp_path / "a.parquet")) == expected_rows(0, 2)


@pytest.mark.parametrize(
    ("fields", "column"),
    [
        ([("audio", AUDIO)], "audio"),
        ([("first", AUDIO), ("second", AUDIO)], "first"),
        ([("first", AUDIO), ("audio", AUDIO)], "audio"),
        ([("sound", pa.struct([("bytes", pa.binary())]))], "sound"),
        ([("audio", pa.binary())], "audio"),
        ([("audio", pa.struct([("bytes", pa.string())]))], None),
        ([("audio", pa.struct([("path", pa.string())]))], "audio"),
        ([], None),
    ],
    ids=str,
)
def test_the_audio_column_is_found_by_its_type(fields: list[Any], column: str | None) -> None:
    assert audio_column(pa.schema(fields)) == column


@pytest.mark.parametrize("kept", [0, 4, 200, -1, -9, -200])
def test_a_truncated_parquet_file_is_one_error(tmp_path: Path, kept: int) -> None:
    file = write_parquet(tmp_path / "a.parquet", cells(40), row_group_size=10)
    file.write_bytes(file.read_bytes()[:kept])
    assert clips(shard("parquet", file)) == [BROKEN]
    (message,) = messages(shard("parquet", file))
    assert message.startswith("the Parquet file is broken: ")
    assert str(tmp_path) not in message
    assert "\n" not in message


@pytest.mark.parametrize("broken_group", range(4))
def test_a_damaged_row_group_loses_no_row_of_the_others(tmp_path: Path, broken_group: int) -> None:
    file = write_parquet(tmp_path / "a.parquet", cells(40), row_group_size=10)
    column = pq.read_metadata(file).row_group(broken_group).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    content = bytearray(file.read_bytes())
    content[start : start + 40] = b"\xff" * 40
    file.write_bytes(content)
    lost = 10 * broken_group
    assert clips(shard("parquet", file)) == [
        *expected_rows(0, lost),
        BROKEN,
        *expected_rows(lost + 10, 40),
    ]
    (message,) = messages(shard("parquet", file))
    assert message.startswith(
        f"row group {broken_group} is broken, rows {lost} to {lost + 9} are lost: "
    )


def test_a_parquet_file_without_audio_is_one_error(tmp_path: Path) -> None:
    pq.write_table(pa.table({"score": [0.5]}), tmp_path / "a.parquet")
    assert clips(shard("parquet", tmp_path / "a.parquet")) == [BROKEN]
    assert messages(shard("parquet", tmp_path / "a.parquet")) == [
        "the Parquet file is broken: it has no audio column"
    ]


def test_a_missing_parquet_file_is_an_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        clips(shard("parquet", tmp_path / "gone.parquet"))


# ------------------------------------------------------------------------- files


def test_files_are_read_in_the_order_of_the_shard(tmp_path: Path) -> None:
    contents = {"b.wav": b"B", "deep/a.wav": bytes(range(251)) * 12_600, "c.flac": b""}
    for name, content in contents.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert clips(shard("files", tmp_path, files=tuple(contents))) == [
        (name, content, {}) for name, content in contents.items()
    ]


def test_a_file_that_is_gone_is_an_error_between_the_others(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(b"A")
    (tmp_path / "c.wav").write_bytes(b"C")
    (tmp_path / "d.wav").mkdir()
    what = shard("files", tmp_path, files=("a.wav", "b.wav", "c.wav", "d.wav"))
    assert clips(what) == [
        ("a.wav", b"A", {}),
        ("unreadable", "b.wav", "FileNotFound", {}),
        ("c.wav", b"C", {}),
        ("unreadable", "d.wav", "NoFile", {}),
    ]
    assert messages(what) == ["the file is gone", "it is a folder, a pipe or a device, and no file"]


def test_a_file_whose_name_is_not_utf8_is_read_under_a_valid_name(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.wav")
    (tmp_path / name).write_bytes(b"A")
    assert clips(shard("files", tmp_path, files=(name,))) == [("caf\\xe9.wav", b"A", {})]


def test_files_of_another_file_system_are_read() -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/earmark-test-read/deep/a.wav", b"A")
    what = shard(
        "files", "memory:///earmark-test-read", files=("deep/a.wav", "gone.wav"), file_sizes=(1, 1)
    )
    assert clips(what) == [
        ("deep/a.wav", b"A", {}),
        ("unreadable", "gone.wav", "FileNotFound", {}),
    ]


@pytest.mark.parametrize("kind", ["files", "tar", "parquet"])
def test_audio_is_seekable_and_stands_at_its_start(
    tmp_path: Path, make_tar: MakeTar, kind: str
) -> None:
    (tmp_path / "a.wav").write_bytes(b"0123456789")
    make_tar(tmp_path / "a.tar", [("a.wav", b"0123456789")])
    write_parquet(tmp_path / "a.parquet", [{"bytes": b"0123456789", "path": "a.wav"}])
    what = {
        "files": shard("files", tmp_path, files=("a.wav",)),
        "tar": shard("tar", tmp_path / "a.tar"),
        "parquet": shard("parquet", tmp_path / "a.parquet"),
    }[kind]
    for clip in read_clips(what):
        assert not isinstance(clip, UnreadableClip)
        assert (clip.audio.tell(), clip.audio.read(3)) == (0, b"012")
        assert (clip.audio.seek(-2, os.SEEK_END), clip.audio.read()) == (8, b"89")
        assert (clip.member, clip.size_bytes) == ("a.wav", 10)


def test_a_pipe_is_no_file_and_holds_nothing_up(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "p.wav")
    (tmp_path / "q.wav").write_bytes(b"x")
    (planned,) = plan_shards([str(tmp_path)]).shards
    first, second = read_clips(planned)
    assert (first.member, first.error.type) == ("p.wav", "NoFile")
    assert second.member == "q.wav"
    with pytest.raises(InputError, match="is a pipe or a device"):
        plan_shards([str(tmp_path / "p.wav")])
