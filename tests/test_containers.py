"""One folder with a file of every form, tagged by the bundled student; names that are only data."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tfrecord
import webdataset
import zstandard

from transforms.audio_bytes import wav_of


def test_a_file_of_every_form_is_tagged(
    tmp_path: Path, noise: Any, encoded: Any, earmark: Callable[..., str]
) -> None:
    samples = noise(32_000)
    wav, folder = wav_of(samples, 16_000), tmp_path / "in"
    (folder / "tables").mkdir(parents=True)
    (folder / "loose.wav").write_bytes(wav)
    with webdataset.TarWriter(str(folder / "x-000000.tar")) as writer:
        writer.write({"__key__": "in-tar", "wav": wav, "json": {"n": 1}})
    packed = zstandard.compress((folder / "x-000000.tar").read_bytes())
    (folder / "x-000001.tar.zst").write_bytes(packed)
    with zipfile.ZipFile(folder / "x.zip", "w") as archive:
        archive.writestr("in-zip.wav", wav)
    record = tfrecord.TFRecordWriter(str(folder / "x.tfrecord-00000-of-00001"))
    record.write({"audio": (wav, "byte"), "id": (b"in-tfrecord", "byte")})
    record.close()
    saved = datasets.Dataset.from_dict({"audio": [{"bytes": wav, "path": "saved.wav"}]})
    saved.cast_column("audio", datasets.Audio(decode=False)).save_to_disk(folder / "saved")
    array = {"array": samples, "sampling_rate": 16_000}
    columns = {
        "binary": pa.array([wav]),
        "large_binary": pa.array([wav], pa.large_binary()),
        "bytes": pa.array([{"bytes": wav}]),
        "path": pa.array([{"path": "../loose.wav"}]),
        "both": pa.array([{"bytes": wav, "path": "both.wav"}]),
        "array": pa.array([array], pa.struct({"array": pa.list_(pa.float32()), "sampling_rate": pa.int64()})),
    }  # fmt: skip
    for name, column in columns.items():
        pq.write_table(pa.table({"audio": column}), folder / "tables" / f"{name}.parquet")
    paths = datasets.Dataset.from_dict({"sound": ["../loose.wav"]})
    paths = paths.cast_column("sound", datasets.Audio(decode=False))
    pq.write_table(
        pa.table({"sound": ["../loose.wav"]}).replace_schema_metadata(paths.data.schema.metadata),
        folder / "tables" / "string.parquet",
    )

    said = earmark({}, "annotate", folder, "-o", tmp_path / "out", "--checkpoint", "bundled")
    assert "13 shards" in said
    rows = duckdb.sql(
        "SELECT regexp_extract(shard, '[^/]+$'), member, error, duration_s, scores "
        f"FROM '{tmp_path}/out/clips/*.parquet' ORDER BY 1"
    ).fetchall()
    assert [row[:4] for row in rows] == [
        ("array.parquet", "row-00000000", None, 2.0),
        ("binary.parquet", "row-00000000", None, 2.0),
        ("both.parquet", "both.wav", None, 2.0),
        ("bytes.parquet", "row-00000000", None, 2.0),
        ("data-00000-of-00001.arrow", "saved.wav", None, 2.0),
        ("in", "loose.wav", None, 2.0),
        ("large_binary.parquet", "row-00000000", None, 2.0),
        ("path.parquet", "../loose.wav", None, 2.0),
        ("string.parquet", "../loose.wav", None, 2.0),
        ("x-000000.tar", "in-tar.wav", None, 2.0),
        ("x-000001.tar.zst", "in-tar.wav", None, 2.0),
        ("x.tfrecord-00000-of-00001", "in-tfrecord", None, 2.0),
        ("x.zip", "in-zip.wav", None, 2.0),
    ]
    scores = np.array([row[4] for row in rows])
    assert scores.shape == (13, 527) and np.abs(scores - scores[0]).max() < 1e-5
    assert "Nothing left to do" in earmark(
        {}, "annotate", folder, "-o", tmp_path / "out", "--checkpoint", "bundled"
    )


ODD = [
    *("../../escaped.wav", "/absolute/escaped.wav", "a/../../../escaped.wav", 'it\'s "quoted".wav'),
    *(
        "new\nline.wav",
        "tab\there.wav",
        "🎵 é.wav",
        "a b/c d.wav",
        "$(touch x);`x`.wav",
        "%2e%2e/x.wav",
    ),
    *("C:\\x\\y.wav", "n" * 300 + ".wav", "-rf.wav", "{a,b}*?.wav"),
]


def test_names_in_archives_are_data_and_nothing_else(
    tmp_path: Path, noise: Any, encoded: Any, make_tar: Any, earmark: Callable[..., str]
) -> None:
    wav = encoded(noise(4_000))
    (tmp_path / "a" / "b" / "in").mkdir(parents=True)
    make_tar(tmp_path / "a/b/in/x.tar", [(name, wav) for name in ODD])
    with zipfile.ZipFile(tmp_path / "a/b/in/x.zip", "w") as archive:
        for name in ODD:
            archive.writestr(name, wav)
    before = {file for file in tmp_path.rglob("*")}
    output = tmp_path / "a" / "b" / "out"
    earmark({}, "annotate", tmp_path / "a/b/in", "-o", output)
    for form in ("tar", "zip"):
        rows = duckdb.sql(
            f"SELECT member, error FROM '{output}/clips/*.parquet' WHERE shard LIKE '%.{form}'"
        ).fetchall()
        assert sorted(rows) == sorted((name, None) for name in ODD)
    written = {file for file in tmp_path.rglob("*")} - before
    assert all(file == output or output in file.parents for file in written)
    assert not list(Path("/").glob("absolute*"))
