from __future__ import annotations

import dataclasses
import gzip
import io
import json
import os
import sys
import threading
import types
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import datasets
import lhotse
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bench.stand_ins import CloudStorage
from transforms import opening, read_manifest, storage
from transforms.listing import InputError
from transforms.manifest import ManifestOptions, find_segment, locate, segment_of, shown
from transforms.read import read_clips
from transforms.records import EncodedClip, Shard
from transforms.shard_id import source_of
from transforms.shards import (
    find_shards,
    limit_shards,
    outdated,
    pack_shards,
    plan_shards,
    unpack_shards,
)

Encode = Callable[..., bytes]


def plan(*patterns: Path | str, files_per_shard: int = 256, **manifests: str) -> list[Shard]:
    options = ManifestOptions(**manifests)
    planned = plan_shards([str(p) for p in patterns], files_per_shard, manifests=options)
    return planned.shards


def notes_of(*patterns: Path | str, **manifests: str) -> list[str]:
    notes: list[str] = []
    list(
        find_shards(
            [str(p) for p in patterns],
            Counter(),
            manifests=ManifestOptions(**manifests),
            notes=notes,
        )
    )
    return notes


def rows(*patterns: Path | str, **options: Any) -> list[dict[str, Any]]:
    """Each clip as it is read: what is said of it, and its bytes or its error's type."""
    found = []
    for shard in plan(*patterns, **options):
        for clip in read_clips(shard):
            row: dict[str, Any] = {"member": clip.member}
            row |= {"cut": (clip.start_s, clip.end_s)} if clip.start_s is not None else {}
            row |= {"name": clip.name} if clip.name is not None else {}
            row |= {"metadata": clip.metadata} if clip.metadata else {}
            if isinstance(clip, EncodedClip):
                row["audio"] = clip.audio.read()
                assert clip.size_bytes == len(row["audio"])
            else:
                assert clip.error.stage == "read"
                row["error"] = clip.error.type
            found.append(row)
    return found


def messages(*patterns: Path | str, **options: Any) -> list[str]:
    clips = (clip for shard in plan(*patterns, **options) for clip in read_clips(shard))
    return [clip.error.message for clip in clips if not isinstance(clip, EncodedClip)]


def write(file: Path, text: str | bytes) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    content = text if isinstance(text, bytes) else text.encode()
    file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)
    return file


@pytest.fixture
def audio(tmp_path: Path) -> Path:
    """A folder of three files, each with its name as its content."""
    for name in ("a.wav", "b.wav", "deep/c.wav"):
        write(tmp_path / name, name)
    return tmp_path


A, B, C = ({"member": n, "audio": n.encode()} for n in ("a.wav", "b.wav", "deep/c.wav"))

# ------------------------------------------------------------- tables and JSON lines

TABLES = {
    "m.csv": "path,label\na.wav,x\nb.wav,\"y, z\"\n",
    "m.csv.gz": "path,label\na.wav,x\nb.wav,\"y, z\"\n",
    "semicolons.csv": "path;label\na.wav;x\nb.wav;y, z\n",
    "bom.csv": "\ufeffpath,label\r\na.wav,x\r\nb.wav,\"y, z\"\r\n",
    "m.tsv": "path\tlabel\na.wav\tx\nb.wav\ty, z\n",
    "m.tsv.gz": "path\tlabel\na.wav\tx\nb.wav\ty, z\n",
    "m.jsonl": '{"path": "a.wav", "label": "x"}\n\n{"path": "b.wav", "label": "y, z"}',
    "m.jsonl.gz": '{"path": "a.wav", "label": "x"}\n{"path": "b.wav", "label": "y, z"}\n',
    "m.json": '{"path": "a.wav", "label": "x"}\n{"path": "b.wav", "label": "y, z"}\n',
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_a_row_names_a_file_and_its_other_columns_are_metadata(audio: Path, name: str) -> None:
    expected = [A | {"metadata": {"label": "x"}}, B | {"metadata": {"label": "y, z"}}]
    assert rows(write(audio / name, TABLES[name])) == expected


def test_parquet_without_audio_is_a_manifest(audio: Path) -> None:
    table = {"file": ["a.wav", "b.wav"], "n": [1, None], "raw": [b"1", b"2"], "x": [[1.5], []]}
    pq.write_table(pa.table(table), audio / "m.parquet")
    assert rows(audio / "m.parquet") == [
        A | {"metadata": {"n": 1, "x": [1.5]}},
        B | {"metadata": {"n": None, "x": []}},
    ]
    assert notes_of(audio / "m.parquet") == [
        f"reads {audio}/m.parquet as a Parquet manifest: path column 'file'"
    ]


def test_how_a_manifest_is_read_is_said(audio: Path) -> None:
    file = write(audio / "m.csv", "id,filename,start,duration\n1,a.wav,0,1\n")
    assert notes_of(file) == [
        f"reads {file} as a CSV manifest: path column 'filename', id column 'id', cut by 'start' and "
        "'duration'"
    ]


@pytest.mark.parametrize(
    ("header", "row", "cut"),
    [
        ("path,start,end", "a.wav,1.5,2", (1.5, 2.0)),
        ("path,offset,duration", "a.wav,1.5,2", (1.5, 3.5)),
        ("path,start_s,end_s", "a.wav,0,0.5", (0.0, 0.5)),
        ("path,start_time,end_time", "a.wav,1,", (1.0, None)),
        ("path,start_seconds,end_seconds", "a.wav,,3", (0.0, 3.0)),
        ("path,start,end", "a.wav,,", None),
        ("path,start", "a.wav,2", (2.0, None)),
        ("path,start,end,duration", "a.wav,1,2,9", (1.0, 2.0)),
        ("Path,Start Time,End-Time", "a.wav,1,2", (1.0, 2.0)),
        ("filename,onset,offset,event_label", "a.wav,1,2,dog", (1.0, 2.0)),  # DCASE
        ("recording,start_offset_s,end_offset_s,label", "a.wav,5,10,x", (5.0, 10.0)),  # hoplite
    ],
)
def test_a_start_and_an_end_cut_the_file(
    audio: Path, header: str, row: str, cut: tuple[float, float | None] | None
) -> None:
    (found,) = rows(write(audio / "m.csv", f"{header}\n{row}\n"))
    assert found.get("cut") == cut
    assert found["audio"] == b"a.wav"


def test_a_duration_alone_is_a_fact_of_the_file(audio: Path) -> None:
    """As in NeMo's manifests, where it is the length of a cut only beside an offset."""
    lines = [
        {"audio_filepath": "a.wav", "duration": 3.2, "text": "one"},
        {"audio_filepath": "b.wav", "offset": 1.0, "duration": 0.5, "text": "two"},
        {"audio_filepath": "b.wav", "offset": None, "duration": 3.2},
    ]
    file = write(audio / "manifest.json", "".join(json.dumps(line) + "\n" for line in lines))
    assert rows(file) == [
        A | {"metadata": {"duration": 3.2, "text": "one"}},
        B | {"cut": (1.0, 1.5), "metadata": {"text": "two"}},
        B | {"metadata": {"duration": 3.2}},
    ]
    assert rows(write(audio / "m.csv", "path,duration\na.wav,3\n")) == [
        A | {"metadata": {"duration": "3"}}
    ]


def test_columns_can_be_said_or_left_out(audio: Path) -> None:
    file = write(audio / "m.csv", "path,url,from,to,start,id,code\nx,a.wav,1,2,9,i,c\n")
    with pytest.raises(
        InputError, match=r"several columns that may name the audio, path, url: say"
    ):
        plan(file)
    said = {"path_column": "url", "start_column": "from", "end_column": "to", "id_column": "code"}
    (found,) = rows(file, **said)
    assert found == A | {
        "cut": (1.0, 2.0),
        "name": "c",
        "metadata": {"path": "x", "start": "9", "id": "i"},
    }
    (found,) = rows(file, path_column="url", start_column="", id_column="")
    assert found == A | {
        "metadata": {"path": "x", "from": "1", "to": "2", "start": "9", "id": "i", "code": "c"}
    }


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("name,label\na,b\n", {}, "has no path column; it has name, label: name the column of the audio"),
        ("path,label\na,b\n", {"path_column": "file"}, "has no column 'file'; it has path, label: name"),
        ("path,start,offset\na,1,2\n", {}, "that may cut the audio, start, offset: say which with --start"),
        ("path,x\na,1\n", {"end_column": "y"}, "has no column 'y' (--end-column); it has path, x"),
        ("path\n", {}, "is a manifest without rows"),
        ("", {}, "is empty: expected a header and rows, or JSON lines"),
        ('[{"path": "a.wav"}]', {}, "begins as a JSON array: write one object a line"),
        ('path,x\na.wav,1\nb.wav,"open\nc.wav,2\n', {}, "has a quote that is not closed, in row 2"),
        ('{"text": "x", "n": 1}\n', {}, "has no path column; it has text, n: name the column"),
        ("path\na\n".encode("utf-16"), {}, "is UTF-16: save it as UTF-8"),
    ],
)  # fmt: skip
def test_a_manifest_that_cannot_be_used_is_refused(
    tmp_path: Path, text: str | bytes, options: dict[str, str], message: str
) -> None:
    file = write(tmp_path / "m.csv", text)
    with pytest.raises(InputError) as refusal:
        plan(file, **options)
    assert str(refusal.value).startswith(repr(str(file)))
    assert message in str(refusal.value)


def test_each_row_is_a_row_whatever_is_wrong_with_it(audio: Path) -> None:
    os.mkfifo(audio / "pipe.wav")
    lines = [
        "a.wav,0,1,1", "gone.wav,,,2", "a.wav,one,2,3", "a.wav,2,1,4", "a.wav,1,1,5", "a.wav,-1,2,6",
        ",0,1,7", "a.wav,nan,2,8", "a.wav,0,1,9,surplus", "deep,,,10", "a.wav/x,,,11", "pipe.wav,,,12",
        "nosuch://x/a.wav,,,13", "x" * 300 + ".wav,,,14", "a.wav", "b.wav,,,16",
    ]  # fmt: skip
    file = write(audio / "m.csv", "path,start,end,id\n" + "\n".join(lines) + "\n")
    found = rows(file)
    bad, gone = "BadManifestRow", "FileNotFound"
    assert [row.get("error") for row in found] == [
        None, gone, bad, bad, bad, bad, bad, bad, bad, "NoFile", gone, "NoFile", bad, "OSError", None, None,
    ]  # fmt: skip
    assert [row.get("name") for row in found] == [
        *map(str, range(1, 9)), None, *map(str, range(10, 15)), None, "16",
    ]  # fmt: skip
    assert found[6]["member"] == "7"
    assert messages(file)[1:4] == [
        "row 3 of the manifest: its start 'one' is no number of seconds",
        "row 4 of the manifest: its end, 1 s, is not after its start, 2 s",
        "row 5 of the manifest: its end, 1 s, is not after its start, 1 s",
    ]


@pytest.mark.parametrize(
    "url",
    "sftp://127.0.0.1:1/x smb://h/x git://x github://o:r@m/x ftp://127.0.0.1:1/x reference://x dir://x "
    "generic://x zip://x tar://x memory://x local://x abfs://c/x".split(),
)
def test_a_scheme_that_rows_may_not_name_costs_a_row(audio: Path, url: str) -> None:
    found = rows(write(audio / "m.csv", f"path\n{url}\na.wav\n"))
    assert [row.get("error") for row in found] == ["BadManifestRow", None]


def test_each_json_line_is_a_row_whatever_is_wrong_with_it(audio: Path) -> None:
    lines = [
        b'{"path": "a.wav"}', b"{broken", b'{"path": 7}', b'{"text": "no path"}', b"[1]",
        b'{"path": "a\\u0000.wav"}', b'{"path": "a.wav", "start": true}', b"[" * 100_000,
        b'{"path": "a.wav", "start": 1, "offset": 2}', b'{"path": "b.wav", "start": "1", "end": 2.5}',
    ]  # fmt: skip
    found = rows(write(audio / "m.jsonl", b"\n".join(lines)))
    assert [row.get("error") for row in found] == [None, *["BadManifestRow"] * 8, None]
    assert [row["member"] for row in found][:4] == [
        "a.wav",
        "row-00000001",
        "row-00000002",
        "row-00000003",
    ]
    assert found[3]["metadata"] == {"text": "no path"}
    assert found[-1] == B | {"cut": (1.0, 2.5)}


def test_quotes_and_line_ends_in_fields(audio: Path) -> None:
    text = 'path,text\na.wav,"two\nlines, ""quoted"""\nb.wav,5" nail\n'
    expected = [
        A | {"metadata": {"text": 'two\nlines, "quoted"'}},
        B | {"metadata": {"text": '5" nail'}},
    ]
    file = write(audio / "m.csv", text)
    assert rows(file) == rows(file, files_per_shard=1) == expected
    # In a TSV, as Common Voice writes it, a quote may stand alone.
    text = 'path\ttext\na.wav\t"Well, he said\nb.wav\t"""Well"", he said"\n'
    assert rows(write(audio / "m.tsv", text)) == [
        A | {"metadata": {"text": '"Well, he said'}},
        B | {"metadata": {"text": '"Well", he said'}},
    ]


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    name = b"caf\xe9.wav"
    Path(os.fsdecode(tmp_path / os.fsdecode(name))).write_bytes(b"1")
    for manifest in ("m.csv", "m.csv.gz"):
        file = write(tmp_path / manifest, b"path,label\n" + name + b",\xe9\n")
        expected = {"member": "caf\\xe9.wav", "metadata": {"label": "\\xe9"}, "audio": b"1"}
        assert rows(file) == [expected]
        (packet,) = pack_shards(plan(file))
        assert list(unpack_shards(packet)) == plan(file)


def test_relative_paths_begin_at_the_manifest_or_at_the_root(audio: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "lists/m.csv", f"path\n../a.wav\n{audio}/b.wav\nfile://{audio}/b.wav\n")
    assert [row["audio"] for row in rows(file)] == [b"a.wav", b"b.wav", b"b.wav"]
    file = write(tmp_path / "lists/n.csv", "path\nc.wav\n")
    assert rows(file, audio_root=str(audio / "deep"))[0]["audio"] == b"deep/c.wav"
    assert rows(file)[0]["error"] == "FileNotFound"


@pytest.mark.parametrize(
    ("path", "root", "url"),
    [
        ("a.wav", "/in/set", "/in/set/a.wav"),
        ("/a.wav", "/in/set", "/a.wav"),
        ("file:///a.wav", "gs://b", "/a.wav"),
        ("x/a.wav", "gs://b/set/", "gs://b/set/x/a.wav"),
        ("../x/./a.wav", "gs://b/set", "gs://b/x/a.wav"),
        ("../../../a.wav", "gs://b/set", "gs://b/a.wav"),
        ("s3://c/a.wav", "gs://b", "s3://c/a.wav"),
        ("x//a.wav", "gs://b", "gs://b/x//a.wav"),
    ],
)
def test_where_a_path_leads(path: str, root: str, url: str) -> None:
    assert locate(path, root) == url


def test_what_lets_one_in_is_not_shown() -> None:
    assert shown("https://me:secret@h/a.wav?x=1") == "https://h/a.wav?x=1"
    assert shown("https://h/a.wav?n=1&X-Amz-Signature=abc") == "https://h/a.wav?n=1"
    assert shown("https://h/a.wav?x-oss-signature=abc&key=abc") == "https://h/a.wav"
    assert shown("ftp://me:secret@h/a.wav") == "ftp://h/a.wav"
    assert shown("a.wav?sig=1") == "a.wav?sig=1"


# ----------------------------------------------------------------------- shards


def numbered(folder: Path, count: int, name: str = "m.csv") -> Path:
    text = "".join(f'{n}.wav,"some, text {n}"\n' for n in range(count))
    return write(folder / name, "path,text\n" + text)


@pytest.mark.parametrize("name", ["m.csv", "m.csv.gz"])
def test_a_shard_is_a_slice_of_rows(tmp_path: Path, name: str) -> None:
    file = numbered(tmp_path, 10, name)
    planned = plan(file, files_per_shard=4)
    assert [(s.kind, s.uri, s.manifest.rows) for s in planned] == [
        ("manifest", str(file), 4), ("manifest", str(file), 4), ("manifest", str(file), 2)
    ]  # fmt: skip
    assert [s.manifest.text is None for s in planned] == [name == "m.csv"] * 3
    members = [clip.member for shard in planned for clip in read_clips(shard)]
    assert members == [f"{n}.wav" for n in range(10)]
    assert len({s.id for s in planned}) == 3
    assert {source_of(s.id) for s in planned} == {source_of(planned[0].id)}
    (packet,) = pack_shards(planned)
    assert list(unpack_shards(packet)) == planned
    assert hash(planned[0]) is not None


def test_a_worker_reads_no_more_than_its_rows(tmp_path: Path, monkeypatch: Any) -> None:
    planned = plan(numbered(tmp_path, 1_000), files_per_shard=10)
    asked: list[int] = []

    class Counting(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            asked.append(size or 0)
            return super().read(size)

    content = (tmp_path / "m.csv").read_bytes()
    monkeypatch.setattr(read_manifest, "open_shard", lambda *_: Counting(content))
    list(read_clips(planned[50]))
    assert asked == [planned[50].size_bytes]


def test_an_id_depends_on_the_rows_and_where_their_paths_lead(tmp_path: Path) -> None:
    file = numbered(tmp_path, 10)
    before = plan(file, files_per_shard=4)
    assert plan(file, file, tmp_path / "x" / ".." / "m.csv", files_per_shard=4) == before
    assert {s.id for s in plan(file, files_per_shard=4, audio_root="/x")}.isdisjoint(
        s.id for s in before
    )
    file.write_text(file.read_text() + "10.wav,x\n")
    after = plan(file, files_per_shard=4)
    assert [s.id for s in after[:2]] == [s.id for s in before[:2]]
    sources = {source_of(s.id) for s in after}
    assert outdated(sources, {s.id for s in before} - {s.id for s in after}) == [before[2].id]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("m.csv", "path,label\n{},x\na.wav,y\n"),
        ("m.jsonl", '{{"path": "{}", "label": "x"}}\n'),
        ("wav.scp", "one {}\n"),
    ],
)
def test_urls_that_are_signed_anew_are_the_same_shard(tmp_path: Path, name: str, text: str) -> None:
    def ids(url: str) -> list[str]:
        return [s.id for s in plan(write(tmp_path / name, text.format(url)))]

    url = "https://h/a.wav?id=1"
    assert ids(f"{url}&X-Amz-Signature=1") == ids(f"{url}&X-Amz-Signature=2") != ids(url)
    assert ids("https://h/a.wav?id=2&X-Amz-Signature=1") != ids(f"{url}&X-Amz-Signature=1")
    assert ids("/x.wav?sig=1") != ids("/x.wav?sig=2")


def test_rows_of_one_recording_stay_in_one_shard(tmp_path: Path) -> None:
    names = ["a"] * 3 + ["b"] * 7 + ["c", "d"] + ["e"] * 100
    file = write(
        tmp_path / "m.csv", "path,start\n" + "".join(f"{n},{i}\n" for i, n in enumerate(names))
    )
    planned = plan(file, files_per_shard=4)
    assert [s.manifest.rows for s in planned] == [10, 64, 38]  # of `e` more than 16 times 4
    assert [c.member for s in planned for c in read_clips(s)] == names


def test_a_limit_counts_rows(tmp_path: Path) -> None:
    planned = plan(numbered(tmp_path, 10), files_per_shard=4)
    limited = limit_shards(planned, 6)
    assert [shard.max_clips for shard in limited] == [4, 2]


def test_a_manifest_that_changes_under_way_is_noticed(tmp_path: Path) -> None:
    file = numbered(tmp_path, 10)
    first, second, _ = plan(file, files_per_shard=4)
    content = file.read_bytes()
    file.write_bytes(content.replace(b"text 5", b"text 6"))
    assert len(list(read_clips(first))) == 4  # its rows are as they were
    with pytest.raises(OSError, match=r"m\.csv has changed since the run was planned \(bytes"):
        list(read_clips(second))
    file.write_bytes(content[:100])
    with pytest.raises(OSError, match="has changed since the run was planned"):
        list(read_clips(second))


def test_rows_of_one_local_file_read_it_once_and_share_no_position(
    audio: Path, monkeypatch: Any
) -> None:
    hashed: list[str] = []
    seekable = read_manifest.seekable
    monkeypatch.setattr(read_manifest, "seekable", lambda f: hashed.append(f.name) or seekable(f))
    file = write(audio / "m.csv", "path,start\na.wav,0\na.wav,1\na.wav,2\nb.wav,0\na.wav,3\n")
    (shard,) = plan(file)
    clips = read_clips(shard)
    first = next(clips)
    copy = os.dup(first.audio.fileno())  # as decode processes take it
    second = next(clips)
    second.audio.read()
    assert os.lseek(copy, 0, os.SEEK_CUR) == 0
    os.close(copy)
    assert len(list(clips)) == 3
    assert [Path(name).name for name in hashed] == ["a.wav", "b.wav", "a.wav"]


def test_a_hundred_thousand_rows_are_described_in_little_room(tmp_path: Path) -> None:
    file = tmp_path / "m.csv"
    with file.open("w") as out:
        out.write("path,start,end,label\n")
        out.writelines(f"audio/{n:08}.flac,0,10,label {n % 527}\n" for n in range(100_000))
    packets = list(pack_shards(find_shards([str(file)], Counter())))
    planned = [shard for packet in packets for shard in unpack_shards(packet)]
    assert sum(shard.manifest.rows for shard in planned) == 100_000
    assert len(planned) == 391
    assert sum(map(len, packets)) < 50_000


# ------------------------------------------------------------------------- Kaldi


def test_kaldi_wav_scp(audio: Path) -> None:
    text = (
        f"utt1 a.wav\nutt2\t{audio}/b.wav\nutt3 sph2pipe -f wav x.sph |\nutt4 deep/c.wav  \nutt5\n"
    )
    found = rows(write(audio / "wav.scp", text))
    assert found == [
        A | {"name": "utt1"},
        {"member": f"{audio}/b.wav", "name": "utt2", "audio": b"b.wav"},
        {"member": "utt3", "name": "utt3", "error": "Command"},
        C | {"name": "utt4"},
        {"member": "utt5", "name": "utt5", "error": "BadManifestRow"},
    ]
    assert rows(write(audio / "list.txt", "utt1 a.wav\n")) == [A | {"name": "utt1"}]


def test_no_command_is_run(audio: Path) -> None:
    write(audio / "wav.scp", f"utt1 touch {audio}/ran |\n")
    assert rows(audio / "wav.scp")[0]["error"] == "Command"
    assert messages(audio / "wav.scp") == [
        "row 1 of the manifest: it is a command, and commands are not run"
    ]
    assert not (audio / "ran").exists()


@pytest.mark.parametrize("named", ["wav.scp", "segments"])
def test_kaldi_segments(audio: Path, named: str) -> None:
    write(audio / "wav.scp", "rec1 a.wav\nrec2 cat x |\n")
    write(
        audio / "segments", "u1 rec1 0.0 1.5\nu2 rec1 1.5 -1\nu3 rec2 0 1\nu4 rec9 0 1\nu5 rec1\n"
    )
    assert rows(audio / named) == [
        A | {"name": "u1", "cut": (0.0, 1.5), "metadata": {"recording": "rec1"}},
        A | {"name": "u2", "cut": (1.5, None), "metadata": {"recording": "rec1"}},
        {"member": "u3", "name": "u3", "metadata": {"recording": "rec2"}, "error": "Command"},
        {
            "member": "rec9",
            "name": "u4",
            "metadata": {"recording": "rec9"},
            "error": "BadManifestRow",
        },
        {"member": "row-00000004", "error": "BadManifestRow"},
    ]
    assert plan(audio / "wav.scp", audio / "segments") == plan(audio / named)


# ------------------------------------------------------------------------ lhotse


@pytest.fixture
def recordings(tmp_path: Path, encoded: Encode, noise: Any) -> lhotse.RecordingSet:
    """Two recordings of a second each, made by lhotse from files."""
    for seed, name in enumerate(("one", "two")):
        write(tmp_path / f"{name}.wav", encoded(noise(16_000, seed)))
    files = [lhotse.Recording.from_file(tmp_path / f"{name}.wav") for name in ("one", "two")]
    return lhotse.RecordingSet.from_recordings(files)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_lhotse_recordings(tmp_path: Path, recordings: Any, suffix: str) -> None:
    file = tmp_path / f"recordings{suffix}"
    recordings.to_file(file)
    found = rows(file)
    assert [(row["name"], row["member"]) for row in found] == [
        (name, str(tmp_path / f"{name}.wav")) for name in ("one", "two")
    ]
    assert found[0]["audio"] == (tmp_path / "one.wav").read_bytes()
    assert found[0]["metadata"]["sampling_rate"] == 16_000
    assert "cut" not in found[0]
    assert notes_of(file) == [f"reads {file} as a lhotse manifest"]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_lhotse_cuts(tmp_path: Path, recordings: Any, suffix: str) -> None:
    said = lhotse.SupervisionSegment("s", "one", 0.0, 1.0, text="hello")
    cuts = lhotse.CutSet.from_manifests(
        recordings, lhotse.SupervisionSet.from_segments([said])
    ).to_eager()
    whole, windows = list(cuts), list(cuts.cut_into_windows(0.4))
    mixed = whole[0].mix(whole[1])
    file = tmp_path / f"cuts{suffix}"
    lhotse.CutSet.from_cuts([*whole, *windows, mixed]).to_file(file)
    found = rows(file)
    assert len(found) == 2 + 6 + 1
    assert [row.get("cut") for row in found[:2]] == [None, None]
    assert [row["cut"] for row in found[2:5]] == [(0.0, 0.4), (0.4, 0.8), (0.8, 1.0)]
    assert [row["name"] for row in found] == [cut.id for cut in (*whole, *windows, mixed)]
    assert found[0]["metadata"]["supervisions"][0]["text"] == "hello"
    assert found[-1]["error"] == "BadManifestRow"


def test_lhotse_commands_and_what_holds_no_file(tmp_path: Path) -> None:
    source = lhotse.audio.AudioSource
    sources = [
        [source("command", [0], f"touch {tmp_path}/ran")],
        [source("memory", [0], b"bytes")],
        [source("file", [0], "a.wav"), source("file", [1], "b.wav")],
    ]
    made = [lhotse.Recording(f"r{n}", s, 16_000, 16_000, 1.0) for n, s in enumerate(sources)]
    file = tmp_path / "recordings.jsonl"
    with file.open("w") as out:
        for recording in made:
            out.write(json.dumps(recording.to_dict(), default=str) + "\n")
    found = rows(file)
    assert [row["error"] for row in found] == ["Command", "BadManifestRow", "BadManifestRow"]
    assert [row["name"] for row in found] == ["r0", "r1", "r2"]
    assert not (tmp_path / "ran").exists()


# ---------------------------------------------------------------------- AudioSet

SEGMENTS = """\
# Segments csv created Sun Mar  5 10:54:31 2017
# num_ytids=20371, num_segs=20371, num_unique_labels=527, num_positive_labels=51804
# YTID, start_seconds, end_seconds, positive_labels
--4gqARaEJE, 0.000, 10.000, "/m/068hy,/m/07q6cd_,/m/0bt9lr,/m/0jbk"
-0RWZT-miFs, 420.000, 430.000, "/m/03v3yw,/m/0k4j"
0cF4TdXHjKE, 30.000, 40.000, "/m/09x0r"
Yabcdefghij, 30.000, 40.000, "/m/09x0r"
zzzzzzzzzzz, 30.000, 40.000, "/m/09x0r"
"""


def test_audioset_segments(tmp_path: Path) -> None:
    files = ["--4gqARaEJE_0.000_10.000.wav", "deep/Y-0RWZT-miFs.flac", "0cF4TdXHjKE_30000.wav",
             "Yabcdefghij_99.000.wav", "YYabcdefghij.wav", "else.wav"]  # fmt: skip
    for name in files:
        write(tmp_path / "audio" / name, name)
    file = write(tmp_path / "eval_segments.csv", SEGMENTS)
    found = rows(file, audio_root=str(tmp_path / "audio"))
    assert found[0] == {
        "member": files[0],
        "name": "--4gqARaEJE",
        "metadata": {
            "start_seconds": 0.0,
            "end_seconds": 10.0,
            "positive_labels": ["/m/068hy", "/m/07q6cd_", "/m/0bt9lr", "/m/0jbk"],
        },
        "audio": files[0].encode(),
    }
    assert [(row["member"], row.get("cut"), row.get("error")) for row in found[1:]] == [
        (files[1], (420.0, 430.0), None),
        (files[2], None, None),
        (files[4], (30.0, 40.0), None),
        ("zzzzzzzzzzz", None, "FileNotFound"),
    ]
    # Beside the manifest, and not cut where the user says so.
    assert [row.get("member") for row in rows(file)] == [
        f"audio/{r['member']}" for r in found[:4]
    ] + ["zzzzzzzzzzz"]
    assert all("cut" not in row for row in rows(file, start_column=""))
    assert notes_of(file) == [
        f"reads {file} as an AudioSet segments manifest: path by 'YTID', cut by start and end"
    ]


def test_audioset_as_others_write_it(tmp_path: Path, shared: Path) -> None:
    with (shared / "labels" / "eval_segments_clean.csv").open() as lines:
        head = [next(lines) for _ in range(4)]
    file = write(tmp_path / "clean.csv", "".join(head))
    ytid, start, end, _ = head[1].split(",", 3)
    name = f"{ytid}_{float(start):.3f}_{float(end):.3f}.flac"
    write(tmp_path / name, "1")
    assert [row.get("error") for row in rows(file)] == [None, "FileNotFound", "FileNotFound"]


@pytest.mark.parametrize(
    ("file", "named"),
    [
        ("-0RWZT-miFs.wav", ("-0RWZT-miFs", None, None)),
        ("Y-0RWZT-miFs.wav", ("-0RWZT-miFs", None, None)),
        ("x/-0RWZT-miFs_30.000.wav", ("-0RWZT-miFs", "30.000", None)),
        ("-0RWZT-miFs_30.000_40.000.flac", ("-0RWZT-miFs", "30.000", "40.000")),
        ("-0RWZT-miFs_30000.wav", ("-0RWZT-miFs", "30000", None)),
        ("-0RWZT-miFs_30000_40000.mp3", ("-0RWZT-miFs", "30000", "40000")),
        ("__________1_0_10.mp3", ("__________1", "0", "10")),
        ("Yabcdefghij_30.000.wav", ("Yabcdefghij", "30.000", None)),
        ("short.wav", None),
        ("-0RWZT-miFs-extra.wav", None),
    ],
)
def test_names_of_audioset_files(file: str, named: tuple[str, ...] | None) -> None:
    assert segment_of(file) == named


def test_of_several_files_the_segment_itself_is_taken() -> None:
    names = ["abcdefghijk.wav", "abcdefghijk_0.000.wav", "abcdefghijk_30000_40000.wav"]
    files = "\0".join(names)
    assert find_segment(files, "0.000", "10.000") == names[1]
    assert find_segment(files, "30.000", "40.000") == names[2]
    assert find_segment(files, "30.000", "35.000") == names[0]
    assert find_segment("", "0", "1") == ""


# -------------------------------------------------------------- AudioFolder


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "metadata.parquet"])
def test_the_metadata_of_a_folder_joins_its_files(audio: Path, name: str) -> None:
    table = pa.table({"file_name": ["a.wav", "deep/c.wav", "gone.wav"], "label": ["x", "y", "z"]})
    if name.endswith(".parquet"):
        pq.write_table(table, audio / name)
    elif name.endswith(".csv"):
        table.to_pandas().to_csv(audio / name, index=False)
    else:
        table.to_pandas().to_json(audio / name, orient="records", lines=True)
    assert rows(audio) == [
        A | {"metadata": {"label": "x"}},
        B,
        C | {"metadata": {"label": "y"}},
        {"member": "gone.wav", "metadata": {"label": "z"}, "error": "FileNotFound"},
    ]
    assert notes_of(audio) == [f"joins the rows of {audio / name} to the files that they name"]
    # Named itself, it is a manifest: the files that it does not name are no rows.
    assert [row["member"] for row in rows(audio / name)] == ["a.wav", "deep/c.wav", "gone.wav"]


def test_an_audiofolder_gives_what_datasets_loads(
    tmp_path: Path, encoded: Encode, noise: Any, monkeypatch: Any
) -> None:
    for split in ("train", "test"):
        names = [f"{split}-{n}.wav" for n in range(3)]
        for n, name in enumerate(names):
            write(tmp_path / "set" / split / name, encoded(noise(1_600, n)))
        lines = [
            json.dumps({"file_name": name, "n": n, "split": split}) for n, name in enumerate(names)
        ]
        write(tmp_path / "set" / split / "metadata.jsonl", "\n".join(lines))
    # `datasets` imports it even where nothing is encoded.
    encoders = types.ModuleType("torchcodec.encoders")
    encoders.AudioEncoder = None
    monkeypatch.setitem(sys.modules, "torchcodec", types.ModuleType("torchcodec"))
    monkeypatch.setitem(sys.modules, "torchcodec.encoders", encoders)
    loaded = datasets.load_dataset(
        "audiofolder", data_dir=str(tmp_path / "set"), cache_dir=tmp_path / "cache"
    )
    expected = {}
    for part in loaded.values():
        for row in part.cast_column("audio", datasets.Audio(decode=False)):
            expected[row["audio"]["path"]] = {"n": row["n"], "split": row["split"]}
    assert len(expected) == 6
    found = {
        str(tmp_path / "set" / row["member"]): row["metadata"] for row in rows(tmp_path / "set")
    }
    assert found == expected


def test_the_metadata_nearest_to_a_file_holds(audio: Path) -> None:
    write(audio / "metadata.csv", "file_name,from\ndeep/c.wav,above\na.wav,above\n")
    write(audio / "deep/metadata.csv", "file_name,from\nc.wav,beside\n")
    expected = [
        A | {"metadata": {"from": "above"}},
        B,
        C | {"metadata": {"from": "beside"}},
    ]
    assert rows(audio) == expected
    assert sorted(row["member"] for row in rows(audio, audio / "deep")) == [
        "a.wav",
        "b.wav",
        "deep/c.wav",
    ]


def test_metadata_changes_no_id(audio: Path) -> None:
    (before,) = plan(audio)
    write(audio / "metadata.csv", "file_name,label\na.wav,x\n")
    (after,) = plan(audio)
    assert dataclasses.replace(after, file_metadata=()) == before
    (packet,) = pack_shards([after])
    assert list(unpack_shards(packet)) == [after]


@pytest.mark.parametrize("text", ["name,label\na.wav,x\n", "", "no table"])
def test_other_files_of_that_name_are_left_aside(audio: Path, text: str) -> None:
    write(audio / "metadata.csv", text)
    planned = plan_shards([str(audio)])
    assert planned.ignored == Counter({".csv": 1})
    assert rows(audio) == [A, B, C]


def test_metadata_names_audio_of_its_own_folder_only(audio: Path) -> None:
    for name in ("a.wav", "pic.jpg", "sub/b.wav"):
        write(audio / "set" / name, name)
    names = ["a.wav", "pic.jpg", "../a.wav", f"{audio}/a.wav", "file:///a.wav", "http://h/x.wav",
             "../set/../deep/c.wav", "gone.wav", "./sub/../sub/b.wav"]  # fmt: skip
    write(audio / "set/metadata.csv", "file_name,label\n" + "".join(f"{n},x\n" for n in names))
    found = {row["member"]: row.get("error") for row in rows(audio / "set")}
    assert found == {"a.wav": None, "gone.wav": "FileNotFound", "sub/b.wav": None}


def test_manifests_in_a_folder_are_left_aside(audio: Path) -> None:
    numbered(audio, 3)
    assert rows(audio) == [A, B, C]
    assert [row["member"] for row in rows(audio / "*.csv")] == ["0.wav", "1.wav", "2.wav"]


# ---------------------------------------------------------- what is none of these


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("README.md", b"# A set\n\nof sounds\n"),
        ("notes.txt", b"These are notes, on sounds.\n"),
        ("notes", "été\n".encode() * 20_000),
        ("set.docx", b"PK\3\4\0\0\0\0"),
        ("a.pdf", b"%PDF-1.7\n%\xb5\xb5"),
        ("m.csv", b"\0\1\2\3"),
        ("a.dat.gz", gzip.compress(b"RIFF\4\0\0\0WAVE", mtime=0)),
    ],
)
def test_what_is_no_audio_is_refused_when_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as refusal:
        plan(tmp_path / name)
    assert str(refusal.value).startswith(repr(str(tmp_path / name)))
    assert "Traceback" not in str(refusal.value)


@pytest.mark.parametrize(
    "content", [b"RIFF\4\0\0\0WAVE", b"ID3\4\0\0", b"\xff\xfe\0\0", b"", bytes(99)]
)
def test_what_may_be_audio_is_taken_when_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.dat").write_bytes(content)
    (shard,) = plan(tmp_path / "x.dat")
    assert (shard.kind, shard.files) == ("files", ("x.dat",))


def test_every_file_of_the_zoo_is_taken_whatever_its_name(shared: Path, tmp_path: Path) -> None:
    zoo = [file for file in sorted((shared / "audio-zoo").rglob("*")) if file.is_file()]
    audio = [file for file in zoo if file.suffix not in (".md", ".csv", ".txt")]
    assert len(audio) > 150
    for n, file in enumerate(audio):
        (tmp_path / f"{n:03}.dat").symlink_to(file)
    (shard,) = plan(tmp_path / "*.dat")
    assert len(shard.files) == len(audio)


def test_spellings_of_a_local_path_are_one_input(audio: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(audio)
    expected = plan(audio)
    spellings = [".", "./", "deep/..", f"{audio}/deep/../", f"{audio}//", f"/{audio}"]
    for spelling in spellings:
        assert plan(spelling) == expected
    assert plan(*spellings, "deep/../*.wav", "./a.wav") == expected
    write(audio / "a.tar", bytes(1_024))
    assert (
        len(plan("a.tar", "./a.tar", "deep/../a.tar", f"{audio}/deep/..//a.tar", "deep/../*.tar"))
        == 1
    )


def test_a_path_through_a_link_leads_where_the_system_says(audio: Path, tmp_path: Path) -> None:
    write(tmp_path / "far/place/x.wav", "x")
    write(tmp_path / "far/y.wav", "y")
    (tmp_path / "link").symlink_to(tmp_path / "far" / "place")
    (shard,) = plan(tmp_path / "link" / ".." / "y.wav")
    (clip,) = read_clips(shard)
    assert isinstance(clip, EncodedClip)


# ------------------------------------------------------------------------- remote


@pytest.fixture(scope="module")
def running() -> Iterator[CloudStorage]:
    with CloudStorage("in") as cloud:
        yield cloud


@pytest.fixture
def cloud(running: CloudStorage, monkeypatch: Any, lead_to: Callable[..., None]) -> CloudStorage:
    for name in running.names("in"):
        running.delete("in", name)
    running.faults = None
    running.requests.clear()
    monkeypatch.setattr(storage, "FIRST_WAIT_S", 0.001)
    lead_to(running.env)
    return running


def test_manifests_and_audio_in_cloud_storage(cloud: CloudStorage, tmp_path: Path) -> None:
    for name in ("a.wav", "b.wav"):
        cloud.put("in", f"set/{name}", name.encode())
    lines = [
        "a.wav,0",
        "gs://in/set/a.wav,1",
        "gone.wav,0",
        "gs://nobucket/a.wav,0",
        "../set/b.wav,0",
    ]
    text = "path,start\n" + "\n".join(lines)
    for name in ("set/m.csv", "set/m.csv.gz"):
        content = text.encode()
        cloud.put("in", name, gzip.compress(content) if name.endswith("gz") else content)
        found = rows(f"gs://in/{name}", files_per_shard=2)
        assert [row.get("audio") or row["error"] for row in found] == [
            b"a.wav", b"a.wav", "FileNotFound", "FileNotFound", b"b.wav"
        ]  # fmt: skip
    local = write(tmp_path / "m.csv", "path\na.wav\n")
    assert rows(local, audio_root="gs://in/set")[0]["audio"] == b"a.wav"


def test_rows_of_one_remote_file_fetch_it_once(cloud: CloudStorage, monkeypatch: Any) -> None:
    monkeypatch.setattr(opening, "_IN_MEMORY_BYTES", 10)
    cloud.put("in", "long.wav", b"long" * 100)
    cloud.put("in", "m.csv", b"path,start\n" + b"".join(b"long.wav,%d\n" % n for n in range(20)))
    (shard,) = plan("gs://in/m.csv")
    cloud.requests.clear()
    read_out = [clip.audio.read() for clip in read_clips(shard)]
    assert read_out == [b"long" * 100] * 20
    assert sum("long.wav" in str(r) and r.kind == "read" for r in cloud.requests) == 1


def test_the_metadata_of_a_folder_in_cloud_storage(cloud: CloudStorage) -> None:
    for n in range(5):
        cloud.put("in", f"set/{n}.wav", b"%d" % n)
    cloud.put("in", "set/metadata.csv", b"file_name,label\n0.wav,x\n4.wav,y\ngone.wav,z\n")
    found = rows("gs://in/set", files_per_shard=2)
    assert [(row["member"], row.get("metadata", {}).get("label")) for row in found] == [
        ("0.wav", "x"), ("1.wav", None), ("2.wav", None), ("3.wav", None), ("4.wav", "y"), ("gone.wav", "z"),
    ]  # fmt: skip
    assert found[-1]["error"] == "FileNotFound"


@pytest.fixture
def web(audio: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            if self.path.startswith("/forbidden"):
                self.send_error(403)
            else:
                super().do_GET()

        do_HEAD = do_GET

    server = ThreadingHTTPServer(
        ("127.0.0.1", 0), lambda *a, **k: Quiet(*a, directory=str(audio), **k)
    )
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_audio_and_manifests_of_the_web(audio: Path, web: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(storage, "FIRST_WAIT_S", 0.001)
    lines = [
        f"{web}/a.wav",
        f"{web}/gone.wav",
        f"{web}/forbidden.wav",
        "http://127.0.0.1:1/x.wav",
        "a.wav",
    ]
    file = write(audio / "m.csv", "path\n" + "\n".join(lines) + "\n")
    expected = [b"a.wav", "FileNotFound", "Refused", "Unreachable", b"a.wav"]
    assert [row.get("audio") or row["error"] for row in rows(file)] == expected
    assert [row.get("audio") or row["error"] for row in rows(f"{web}/m.csv")] == expected


def test_a_manifest_of_the_web_names_no_file_of_this_machine(audio: Path, web: str) -> None:
    write(audio / "m.csv", f"path\n{audio}/a.wav\nfile://{audio}/a.wav\na.wav\n")
    found = [row.get("error") for row in rows(f"{web}/m.csv")]
    assert found == ["NotReachable", "NotReachable", None]
    write(audio / "m.csv", f"path\n{audio}/a.wav\n{audio}/deep/c.wav\n../a.wav\nc.wav\n")
    found = [row.get("error") for row in rows(f"{web}/m.csv", audio_root=str(audio / "deep"))]
    assert found == ["NotReachable", None, "NotReachable", None]


# --------------------------------------------------------------------- end to end


def test_a_manifest_is_tagged_resumed_and_not_doubled(
    tmp_path: Path, earmark: Callable[..., str], encoded: Encode, noise: Callable[..., np.ndarray]
) -> None:
    for n in range(5):
        write(tmp_path / f"{n}.wav", encoded(noise(16_000, n)))
    text = "path,id,label\n" + "".join(f"{n}.wav,clip {n},x\n" for n in range(6))
    file, output = write(tmp_path / "m.csv", text), tmp_path / "out"
    said = earmark({}, "annotate", file, "-o", output, "--files-per-shard", 2)
    assert "reads" in said and "as a CSV manifest: path column 'path', id column 'id'" in said
    table = pq.read_table(output / "clips")
    assert table["member"].to_pylist() == [f"{n}.wav" for n in range(6)]
    assert [e and e["type"] for e in table["error"].to_pylist()] == [None] * 5 + ["FileNotFound"]
    assert json.loads(table["metadata"][0].as_py()) == {"label": "x"}
    assert json.loads((output / "run.json").read_text())["options"]["path_column"] is None

    next((output / "clips").glob("*-00001-*")).unlink()
    earmark({}, "annotate", file, "-o", output, "--files-per-shard", 2)
    assert pq.read_table(output / "clips").num_rows == 6
    refused = earmark({}, "annotate", file, "-o", output, "--files-per-shard", 3, code=2)
    assert "is divided otherwise by now" in " ".join(refused.split())
    refused = earmark({}, "annotate", file, "-o", output, "--path-column", "nothing", code=2)
    assert "--path-column" in refused
