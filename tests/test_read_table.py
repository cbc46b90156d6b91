"""Audio in tables: every form that `datasets.Audio` casts from, and datasets saved to disk."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from transforms import storage
from transforms.audio_bytes import is_audio_bytes, wav_of
from transforms.listing import InputError
from transforms.read import read_clips
from transforms.read_table import audio_column
from transforms.records import Shard, UnreadableClip
from transforms.shards import limit_shards, plan_shards

FLAC = b"fLaC\0\0\0\x22 and so on"
MP3 = b"\xff\xfb\x90\x64\0\0\0\0\0\0\0\0"


def shard(kind: Any, file: Path | str) -> Shard:
    return Shard("shard", str(file), kind, 0)


def clips(what: Shard) -> list[tuple[Any, ...]]:
    """(member, bytes, metadata) of each clip; (member, type, message) of what cannot be read."""
    found: list[tuple[Any, ...]] = []
    for clip in read_clips(what):
        if isinstance(clip, UnreadableClip):
            found.append((clip.member, clip.error.type, clip.error.message))
        else:
            found.append((clip.member, clip.audio.read(), clip.metadata))
    return found


def write(file: Path, metadata: dict[str, str] | None = None, **columns: pa.Array) -> Path:
    table = pa.table(columns)
    if metadata is not None:
        features = {name: {"_type": kind} for name, kind in metadata.items()}
        info = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": info})
    pq.write_table(table, file)
    return file


def sound_file(folder: Path, name: str, content: bytes = FLAC) -> Path:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    return folder / name


# -------------------------------------------------------------------- which column

BYTES_PATH = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
ARRAY = pa.struct([("array", pa.list_(pa.float32())), ("sampling_rate", pa.int64())])


@pytest.mark.parametrize(
    ("fields", "features", "column"),
    [
        ({"a": pa.string(), "b": pa.string()}, {"b": "Audio"}, "b"),
        ({"a": BYTES_PATH, "b": pa.binary()}, {"a": "Image", "b": "Audio"}, "b"),
        ({"image": BYTES_PATH}, {"image": "Image"}, None),
        ({"image": BYTES_PATH, "wav": pa.binary()}, {"image": "Image", "wav": "Value"}, "wav"),
        ({"x": BYTES_PATH, "audio": BYTES_PATH}, {"x": "Audio", "audio": "Audio"}, "audio"),
        ({"x": pa.dictionary(pa.int32(), pa.string())}, {"x": "Audio"}, "x"),
        ({"x": pa.int64(), "audio": BYTES_PATH}, {"x": "Audio"}, "audio"),
        ({"text": pa.string(), "MP3": pa.large_binary()}, None, "MP3"),
        ({"content": pa.binary(), "flac": pa.binary()}, None, "flac"),
        ({"speech": ARRAY}, None, "speech"),
        ({"audio": pa.struct([("path", pa.large_string())])}, None, "audio"),
        ({"file": pa.struct([("path", pa.string())])}, None, None),
        ({"audio": pa.string()}, None, None),
        ({"audio": pa.list_(pa.float32())}, None, None),
        ({"thumbnail": pa.binary(), "blob": pa.binary()}, None, "blob"),
        ({"thumbnail": pa.binary()}, None, None),
    ],
    ids=str,
)
def test_the_column_is_found_by_metadata_then_type_then_name_then_bytes(
    fields: dict[str, pa.DataType], features: dict[str, str] | None, column: str | None
) -> None:
    schema = pa.schema(fields)
    if features is not None:
        info = {"features": {name: {"_type": kind} for name, kind in features.items()}}
        schema = schema.with_metadata({"huggingface": json.dumps({"info": info})})
    values = {"blob": [None, MP3], "thumbnail": [b"\x89PNG\r\n\x1a\n" + bytes(8)]}
    assert audio_column(schema, lambda name: values.get(name, [])) == column


@pytest.mark.parametrize("metadata", [b"", b"{", b"[]", b"7", b'{"info": null}', b"\xff"])
def test_metadata_that_says_nothing_is_passed_over(metadata: bytes) -> None:
    schema = pa.schema({"audio": BYTES_PATH}, {"huggingface": metadata})
    assert audio_column(schema) == "audio"


@pytest.mark.parametrize("format", ["WAV", "FLAC", "OGG", "MP3", "AIFF", "AU", "CAF", "RF64"])
def test_audio_is_told_by_its_first_bytes(encoded: Any, noise: Any, format: str) -> None:
    assert is_audio_bytes(encoded(noise(4_000), 16_000, format)[:32])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"RIFF\0\0\0\0AVI LIST",
        b"RIFF\0\0\0\0WEBPVP8 ",
        b"\x89PNG\r\n\x1a\n\0\0\0\0",
        b"\xff\xd8\xff\xe0\0\x10JFIF\0\0",
        "\ufeffsome text in UTF-16".encode("utf-16"),
        b"\0\0\0\x18ftypheic",
        b"{}",
        b"PK\x03\x04" + bytes(20),
        bytes(32),
        b"\xff" * 32,
    ],
)
def test_other_bytes_are_no_audio(content: bytes) -> None:
    assert not is_audio_bytes(content)


# -------------------------------------------------------------------- Parquet


def dictionary(values: list[str | None]) -> pa.Array:
    return pa.array(values).dictionary_encode()


@pytest.mark.parametrize(
    "column",
    [
        pa.array(["a.flac", "b/c.flac", None]),
        pa.array(["a.flac", "b/c.flac", None], pa.large_string()),
        pa.array(["a.flac", "b/c.flac", None], pa.string_view()),
        dictionary(["a.flac", "b/c.flac", None]),
        pa.array([{"path": "a.flac"}, {"path": "b/c.flac"}, None]),
        pa.array([{"bytes": None, "path": p} for p in ("a.flac", "b/c.flac", None)], BYTES_PATH),
        pa.array([{"bytes": None, "path": p} for p in ("a.flac", "b/c.flac", None)]),
    ],
    ids=lambda column: str(column.type),
)
def test_paths_lie_beside_the_parquet_file(tmp_path: Path, column: pa.Array) -> None:
    sound_file(tmp_path, "set/a.flac")
    sound_file(tmp_path, "set/b/c.flac", MP3)
    file = write(
        tmp_path / "set" / "x.parquet", {"sound": "Audio"}, sound=column, n=pa.array([1, 2, 3])
    )
    (planned,) = plan_shards([str(file)]).shards
    assert clips(planned) == [
        ("a.flac", FLAC, {"n": 1}),
        ("b/c.flac", MP3, {"n": 2}),
        ("row-00000002", "NoBytes", "the row holds no audio bytes, and no path"),
    ]


@pytest.mark.parametrize(
    "column",
    [
        pa.array([FLAC, None, b""], pa.binary()),
        pa.array([FLAC, None, b""], pa.large_binary()),
        pa.array([FLAC, None, b""], pa.binary_view()),
        pa.array([FLAC, None, b""], pa.binary()).dictionary_encode(),
        pa.array([{"bytes": FLAC}, {"bytes": None}, {"bytes": b""}]),
        pa.array([{"path": None, "bytes": b} for b in (FLAC, None, b"")]),
    ],
    ids=lambda column: str(column.type),
)
@pytest.mark.parametrize("name", ["audio", "clip"])
def test_bytes_need_no_path(tmp_path: Path, column: pa.Array, name: str) -> None:
    file = write(tmp_path / "x.parquet", **{name: column})
    (planned,) = plan_shards([str(file)]).shards
    assert clips(planned) == [
        ("row-00000000", FLAC, {}),
        ("row-00000001", "NoBytes", "the row holds no audio bytes, and no path"),
        ("row-00000002", b"", {}),
    ]


def test_paths_may_be_absolute_or_urls_or_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "ROW_SCHEMES", (*storage.ROW_SCHEMES, "memory"))
    there = sound_file(tmp_path, "elsewhere/a.flac")
    fsspec.filesystem("memory").pipe("/earmark-test-table/b.flac", MP3)
    (tmp_path / "folder").mkdir()
    (tmp_path / "set").mkdir()
    paths = [
        *(str(there), f"file://{there}", "../elsewhere/a.flac"),
        *("memory://earmark-test-table/b.flac", "memory://earmark-test-table/gone.flac"),
        *("gone.flac", "../folder", "nosuch://x/a.flac", "/dev/zero", "x.parquet/a", "n" * 300),
        *("ftp://127.0.0.1:1/x", "dir://x", "generic://x", "zip://x", "reference://x"),
    ]
    file = write(tmp_path / "set" / "x.parquet", {"a": "Audio"}, a=pa.array(paths))
    found = clips(shard("parquet", file))
    assert [clip[0] for clip in found] == paths
    assert [clip[1] for clip in found] == [
        *(FLAC, FLAC, FLAC, MP3, "FileNotFound", "FileNotFound", "NoFile", "NotReachable"),
        *("NoFile", "FileNotFound", "OSError", *["NotReachable"] * 5),
    ]
    assert (
        found[5][2] == "the row holds no audio bytes, and the file that its path names is not there"
    )


def test_paths_of_a_remote_parquet_file_lie_beside_it(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/earmark-test-table/deep/a.flac", FLAC)
    file = write(
        tmp_path / "x.parquet",
        {"a": "Audio"},
        a=pa.array(["deep/a.flac", "/etc/passwd", "file:///etc/passwd"]),
    )
    memory.pipe("/earmark-test-table/x.parquet", file.read_bytes())
    (planned,) = plan_shards(["memory://earmark-test-table/x.parquet"]).shards
    assert clips(planned) == [
        ("deep/a.flac", FLAC, {}),
        ("/etc/passwd", "NotReachable", "the path is one of another machine"),
        ("file:///etc/passwd", "NotReachable", "the path is one of another machine"),
    ]


SAMPLES = [0.5, -1.0, 1.5, 0.0]


@pytest.mark.parametrize(
    ("values", "stored"),
    [
        (pa.list_(pa.float32()), "float32"),
        (pa.list_(pa.float64()), "float64"),
        (pa.large_list(pa.float32()), "float32"),
        (pa.list_(pa.float32(), 4), "float32"),
        (pa.list_(pa.float16()), "float32"),
        (pa.list_(pa.int16()), "int16"),
        (pa.list_(pa.int32()), "int32"),
    ],
    ids=str,
)
def test_arrays_become_waves_that_hold_them_exactly(
    tmp_path: Path, values: pa.DataType, stored: str
) -> None:
    samples = np.array(SAMPLES if "int" not in stored else [1, -32_768, 32_767, 0], stored)
    given = samples.astype(np.float16) if values == pa.list_(pa.float16()) else samples
    kind = pa.struct([("array", values), ("sampling_rate", pa.int64()), ("path", pa.string())])
    cells = [
        {"array": list(given), "sampling_rate": 22_050, "path": "a.wav"},
        {"array": None, "sampling_rate": 22_050, "path": None},
    ]
    if pa.types.is_fixed_size_list(values):  # of which Arrow reads no null from Parquet
        cells.pop()
    file = write(tmp_path / "x.parquet", x=pa.array(cells, kind))
    (planned,) = plan_shards([str(file)]).shards
    (member, content, _), *missing = clips(planned)
    assert member == "a.wav"
    assert [kind for _, kind, _ in missing] == ["NoBytes"] * (len(cells) - 1)
    found, rate = soundfile.read(io.BytesIO(content), dtype=stored)
    assert rate == 22_050
    assert found.dtype == samples.dtype and found.tolist() == samples.tolist()
    assert clips(planned)[0][1] == content


def test_arrays_of_channels_keep_them(tmp_path: Path) -> None:
    stereo = np.arange(10, dtype=np.float32).reshape(2, 5) / 10
    kind = pa.struct([("array", pa.list_(pa.list_(pa.float32()))), ("sampling_rate", pa.int32())])
    cells = [{"array": a.tolist(), "sampling_rate": 8_000} for a in (stereo, stereo.T, stereo[:1])]
    file = write(tmp_path / "x.parquet", x=pa.array(cells, kind))
    found = [soundfile.read(io.BytesIO(c[1]))[0] for c in clips(shard("parquet", file))]
    assert [np.allclose(a, stereo.T) for a in found[:2]] == [True, True]
    assert np.allclose(found[2], stereo[0])


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        ({"array": [0.0, None], "sampling_rate": 8_000}, "1 of its 2 samples are null"),
        ({"array": [0.0], "sampling_rate": None}, "the sampling_rate is None"),
        ({"array": [0.0], "sampling_rate": 0}, "[1] samples at 0 Hz are no audio"),
        ({"array": [0.0], "sampling_rate": -5}, "[1] samples at -5 Hz are no audio"),
    ],
)
def test_an_array_that_is_no_audio_is_an_error_of_its_row(
    tmp_path: Path, cell: dict[str, Any], reason: str
) -> None:
    good = {"array": [0.5], "sampling_rate": 8_000}
    file = write(tmp_path / "x.parquet", x=pa.array([cell, good], ARRAY))
    bad, (_, content, _) = clips(shard("parquet", file))
    assert bad == ("row-00000000", "BadArray", f"the row's array cannot be read: {reason}")
    assert content.startswith(b"RIFF")


def test_an_array_of_another_type_is_an_error_of_its_row(tmp_path: Path) -> None:
    kind = pa.struct([("array", pa.list_(pa.uint8())), ("sampling_rate", pa.int32())])
    file = write(tmp_path / "x.parquet", x=pa.array([{"array": [1], "sampling_rate": 8_000}], kind))
    assert clips(shard("parquet", file))[0][1:] == (
        "BadArray",
        "the row's array cannot be read: samples are uint8; expected int16, int32, float32 or float64",
    )


@pytest.mark.parametrize("subtype", ["FLOAT", "DOUBLE", "PCM_16", "PCM_32"])
def test_a_wave_is_as_ffmpeg_and_libsndfile_read_it(noise: Any, subtype: str) -> None:
    from transforms.decode import AudioDecoder

    dtype = {"FLOAT": "f4", "DOUBLE": "f8", "PCM_16": "i2", "PCM_32": "i4"}[subtype]
    samples = noise((16_000, 2))
    stored = (
        samples.astype(dtype)
        if "f" in dtype
        else (samples * 2.0 ** (8 * int(dtype[1]) - 1)).astype(dtype)
    )
    content = wav_of(stored, 16_000)
    info = soundfile.info(io.BytesIO(content))
    assert (info.subtype, info.channels, info.frames) == (subtype, 2, 16_000)
    mono = np.concatenate(list(AudioDecoder(io.BytesIO(content)).mono(16_000)))
    assert np.abs(mono - samples.mean(axis=1)).max() < 1e-4


def test_an_empty_array_is_an_empty_wave() -> None:
    assert soundfile.info(io.BytesIO(wav_of(np.zeros(0, np.float32), 16_000))).frames == 0


def test_what_datasets_writes_is_read(tmp_path: Path) -> None:
    """As `datasets` itself casts: its Parquet, with the bytes in it or beside it."""
    sound_file(tmp_path, "a.flac")
    made = datasets.Dataset.from_dict({"speech": [str(tmp_path / "a.flac")], "text": ["hello"]})
    made = made.cast_column("speech", datasets.Audio(decode=False))
    made.to_parquet(tmp_path / "x.parquet")
    (planned,) = plan_shards([str(tmp_path / "x.parquet")]).shards
    ((member, content, metadata),) = clips(planned)
    assert Path(member).name == "a.flac"
    assert (content, metadata) == (FLAC, {"text": "hello"})


# -------------------------------------------------------------------- save_to_disk


def saved(folder: Path, rows: int, shards: int = 1) -> Path:
    cells = [{"bytes": FLAC + bytes([n]), "path": f"{n}.flac"} for n in range(rows)]
    made = datasets.Dataset.from_dict({"audio": cells, "n": list(range(rows))})
    made = made.cast_column("audio", datasets.Audio(decode=False))
    made.save_to_disk(folder, num_shards=shards)
    return folder


def expected(first: int, end: int) -> list[tuple[Any, ...]]:
    return [(f"{n}.flac", FLAC + bytes([n]), {"n": n}) for n in range(first, end)]


def test_a_saved_dataset_is_a_shard_for_each_of_its_files(tmp_path: Path) -> None:
    folder = saved(tmp_path / "set", 25, shards=3)
    planned = plan_shards([str(folder)])
    assert [(s.kind, Path(s.uri).name) for s in planned.shards] == [
        ("arrow", f"data-{n:05d}-of-00003.arrow") for n in range(3)
    ]
    assert planned.ignored == Counter({".json": 2})
    assert [clip for s in planned.shards for clip in clips(s)] == expected(0, 25)
    assert [s.max_clips for s in limit_shards(planned.shards, 12)] == [9, 3]


def test_a_saved_dictionary_of_datasets_has_the_files_of_all(tmp_path: Path) -> None:
    splits = {}
    for name in ("train", "test"):
        folder = saved(tmp_path / name, 3)
        splits[name] = datasets.load_from_disk(str(folder))
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "both"))
    planned = plan_shards([str(tmp_path / "both")]).shards
    assert [Path(s.uri).parent.name for s in planned] == ["test", "train"]
    assert len({s.id for s in planned}) == 2
    assert [clips(s) for s in planned] == [expected(0, 3)] * 2


def test_only_the_files_that_the_state_names_are_read(tmp_path: Path) -> None:
    folder = saved(tmp_path / "set", 3)
    cached = folder / "cache-0123456789abcdef.arrow"
    cached.write_bytes((folder / "data-00000-of-00001.arrow").read_bytes())
    planned = plan_shards([str(folder)])
    assert [Path(s.uri).name for s in planned.shards] == ["data-00000-of-00001.arrow"]
    assert planned.ignored == Counter({".json": 2, ".arrow not in state.json": 1})
    assert plan_shards([str(folder / "*.arrow")]).shards == planned.shards
    (folder / "state.json").unlink()
    with pytest.raises(InputError, match=r"only 2 \.arrow without state\.json, 1 \.json"):
        plan_shards([str(folder)])
    assert len(plan_shards([str(folder / "*.arrow")]).shards) == 2


def test_a_saved_dataset_that_lacks_a_file_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "set", 9, shards=3)
    for name in ("data-00001-of-00003.arrow", "data-00002-of-00003.arrow"):
        (folder / name).unlink()
    with pytest.raises(InputError) as refusal:
        plan_shards([str(tmp_path)])
    assert str(refusal.value) == (
        f"{str(folder)!r} lacks 'data-00001-of-00003.arrow', which its state.json names, and 1 more: "
        "copy the dataset again, whole"
    )


def test_a_state_of_another_program_is_nothing(tmp_path: Path) -> None:
    sound_file(tmp_path, "a.flac")
    for number, text in enumerate(["[]", "{", '{"epoch": 3}', "null"]):
        sound_file(tmp_path, f"{number}/state.json", text.encode())
    assert plan_shards([str(tmp_path)]).ignored == Counter({".json": 4})


def test_a_saved_dataset_without_audio_is_left_out_or_refused(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(str(tmp_path / "text"))
    saved(tmp_path / "set", 1)
    assert plan_shards([str(tmp_path)]).ignored == Counter({".json": 4, ".arrow without audio": 1})
    with pytest.raises(InputError, match=r"no audio column: .*, found text: string"):
        plan_shards([str(tmp_path / "text" / "*.arrow")])


@pytest.mark.parametrize("part", range(1, 12))
def test_a_truncated_arrow_file_gives_the_batches_before_the_break(
    tmp_path: Path, part: int
) -> None:
    batches = pa.table({"audio": [FLAC * 9] * 30}).to_batches(max_chunksize=10)
    with (
        pa.OSFile(str(tmp_path / "x.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, batches[0].schema) as out,
    ):
        for batch in batches:
            out.write_batch(batch)
    content = (tmp_path / "x.arrow").read_bytes()
    (tmp_path / "x.arrow").write_bytes(content[: (len(content) - 8) * part // 12])
    (planned,) = plan_shards([str(tmp_path / "x.arrow")]).shards
    *before, broken = clips(planned)
    assert len(before) in (0, 10, 20) and len(before) <= 30 * part / 12
    assert broken[:2] == (None, "BrokenShard")
    assert broken[2].startswith(f"the Arrow file is broken after {len(before)} rows: ")


@pytest.mark.parametrize("content", [b"", b"no Arrow at all", b"ARROW1\0\0", bytes(100)])
def test_a_file_that_is_no_arrow_is_one_error(tmp_path: Path, content: bytes) -> None:
    sound_file(tmp_path, "x.arrow", content)
    (planned,) = plan_shards([str(tmp_path / "x.arrow")]).shards
    ((member, kind, message),) = clips(planned)
    assert (member, kind) == (None, "BrokenShard")
    assert str(tmp_path) not in message
    assert len(limit_shards([planned], 5)) == 1


def test_the_file_form_of_arrow_is_read_too(tmp_path: Path) -> None:
    table = pa.table({"audio": [FLAC, MP3]})
    with (
        pa.OSFile(str(tmp_path / "x.arrow"), "wb") as sink,
        pa.ipc.new_file(sink, table.schema) as out,
    ):
        out.write_table(table, max_chunksize=1)
    (planned,) = plan_shards([str(tmp_path / "x.arrow")]).shards
    assert [clip[:2] for clip in clips(planned)] == [("row-00000000", FLAC), ("row-00000001", MP3)]


def test_an_arrow_file_with_wild_offsets_is_a_broken_shard(tmp_path):
    """Arrow itself would follow them, and end the process."""
    audio = pa.array([b"RIFF" + bytes(40)] * 4, pa.binary())
    values = pa.StructArray.from_arrays([audio, pa.array(["a", "b", "c", "d"])], ["bytes", "path"])
    table = pa.table({"audio": values})
    with pa.ipc.new_stream(str(tmp_path / "d.arrow"), table.schema) as writer:
        writer.write_table(table)
    content = bytearray((tmp_path / "d.arrow").read_bytes())
    offsets = np.array([0, 44, 88, 132, 176], np.int32).tobytes()
    at = bytes(content).index(offsets)
    content[at + 8 : at + 12] = np.int32(2**30).tobytes()
    (tmp_path / "d.arrow").write_bytes(content)
    (shard,) = plan_shards([str(tmp_path / "d.arrow")]).shards
    *_, last = read_clips(shard)
    assert last.member is None and last.error.type == "BrokenShard"
