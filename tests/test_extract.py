"""`earmark query --extract` and `--play`: the audio of rows, found where it lies."""

import csv
import io
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from click.testing import CliRunner

from bench.stand_ins import CloudStorage
from pipeline import extract
from pipeline.cli import cli
from pipeline.extract import Wanted, file_name
from transforms import find
from transforms.cut import write_clip
from transforms.find import find_clips
from transforms.records import ClipError


def earmark(*arguments, code=0):
    done = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert done.exit_code == code, done.output
    assert "Traceback" not in done.output
    return done


def table(folder):
    """The rows of `clips.csv` by clip_id."""
    with (folder / "clips.csv").open(newline="", encoding="utf-8") as stream:
        return {row["clip_id"].partition("/")[2]: row for row in csv.DictReader(stream)}


@pytest.fixture(scope="module")
def sources(tmp_path_factory, make_tar, encoded, noise):
    """A tar, a tar.gz, a Parquet file and a folder; what is in them by the end of its clip_id."""
    folder = tmp_path_factory.mktemp("sources")
    wav = {name: encoded(noise((24_000, 2), seed=n), subtype="PCM_16")
           for n, name in enumerate(["deep/one.wav", "twice.wav", "other twice"])}  # fmt: skip
    long = encoded(noise(70_000, seed=5), 22_050, "flac", "PCM_24")
    members = [("deep/one.wav", wav["deep/one.wav"]), ("one.json", b"{}"), ("long.flac", long),
               ("twice.wav", wav["twice.wav"]), ("twice.wav", wav["other twice"])]  # fmt: skip
    make_tar(folder / "a.tar", members)
    packed = {"packed.ogg": encoded(noise(20_000, seed=6), format="ogg")}
    make_tar(folder / "b.tar.gz", packed.items(), "w:gz")
    in_rows = [encoded(noise(9_000, seed=10 + n)) for n in range(6)]
    cells = [{"bytes": content, "path": None if n == 4 else f"p{n}.wav"}
             for n, content in enumerate(in_rows)]  # fmt: skip
    pq.write_table(pa.table({"audio": cells}), folder / "c.parquet", row_group_size=2)
    loose = {"x y.wav": encoded(noise(9_000, seed=20)), "sub/-rf.mp3": encoded(noise(9_000, seed=21), format="mp3"),
             "caf\\xe9.wav": encoded(noise(9_000, seed=22))}  # fmt: skip
    for name, content in loose.items():
        place = folder / "loose" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place = os.fsencode(place).replace(b"\\xe9", b"\xe9")
        Path(os.fsdecode(place)).write_bytes(content)
    contents = {"deep/one.wav": wav["deep/one.wav"], "long.flac": long, "twice.wav": wav["twice.wav"],
                "twice.wav#2": wav["other twice"], **packed, **loose,
                **{"row-00000004" if n == 4 else f"p{n}.wav": c for n, c in enumerate(in_rows)}}  # fmt: skip
    return folder, contents


@pytest.fixture(scope="module")
def tags(sources, tiny_checkpoint, tmp_path_factory):
    folder, _ = sources
    output = tmp_path_factory.mktemp("output") / "tags"
    inputs = [folder / name for name in ("a.tar", "b.tar.gz", "c.parquet", "loose")]
    earmark("annotate", *inputs, "-o", output, "--checkpoint", tiny_checkpoint, "--chunks")
    return output


# -------------------------------------------------------------- the whole way


def test_the_bytes_as_they_lie_there(tags, sources, tmp_path):
    contents = sources[1]
    earmark("query", tags, "--extract", tmp_path / "out", "--format-audio", "original")
    found = table(tmp_path / "out")
    assert set(found) == set(contents)
    for name, row in found.items():
        file = tmp_path / "out" / row["file"]
        assert file.read_bytes() == contents[name] and not row["problem"]
        if not name.startswith("row-"):
            assert file.suffix == Path(name.partition("#")[0]).suffix
    names = {row["file"] for row in found.values()} | {"clips.csv"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == names


def test_decoded_to_the_sample(tags, sources, tmp_path):
    earmark("query", tags, "--extract", tmp_path)
    found = table(tmp_path)
    for name, subtype, dtype in [("deep/one.wav", "PCM_16", "int16"), ("long.flac", "PCM_24", "int32"),
                                 ("packed.ogg", "PCM_16", None), ("sub/-rf.mp3", "PCM_16", None)]:  # fmt: skip
        row = found[name]
        with soundfile.SoundFile(tmp_path / row["file"]) as sound:
            assert (sound.format, sound.subtype) == ("FLAC", subtype)
            samples = sound.read(dtype=dtype or "float32")
            rate = sound.samplerate
        expected, expected_rate = soundfile.read(
            io.BytesIO(sources[1][name]), dtype=dtype or "float32"
        )
        assert rate == expected_rate and float(row["written_s"]) == len(samples) / rate
        if dtype:
            np.testing.assert_array_equal(samples, expected)
        elif name.endswith("ogg"):
            np.testing.assert_allclose(samples, expected, atol=1e-3)
        assert row["tags"].split("; ")[0].rpartition(" ")[2] > "0.2"


def test_of_chunks_only_the_chunk(tags, sources, tmp_path):
    where = "FROM chunks WHERE clip_id LIKE '%long.flac'"
    earmark("query", tags, f"SELECT clip_id, start_s, end_s {where}", "--chunk", "--extract", tmp_path,
            "--format-audio", "wav")  # fmt: skip
    whole, rate = soundfile.read(io.BytesIO(sources[1]["long.flac"]), dtype="int32")
    with (tmp_path / "clips.csv").open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 3  # 3.17 s in chunks of 1.28 s
    for row in rows:
        start, end = (round(float(row[name]) * rate) for name in ("start_s", "end_s"))
        samples, _ = soundfile.read(tmp_path / row["file"], dtype="int32")
        np.testing.assert_array_equal(samples, whole[start:end])
    earmark("query", tags, "--chunk", "--tag", "Speech>0", "--extract", tmp_path / "flags")
    assert len(list((tmp_path / "flags").glob("long-*.flac"))) == 3


@pytest.mark.parametrize("flags", [[], ["--chunk"]])
def test_columns_need_not_name_what_finds_the_audio(tags, tmp_path, flags):
    asked = ["--tag", "Speech>0", *flags, "--limit", 2, "--extract"]
    earmark("query", tags, *asked, tmp_path / "all")
    earmark("query", tags, "--columns", "Speech", *asked, tmp_path / "one")
    first, second = ((tmp_path / name / "clips.csv").read_text() for name in ("all", "one"))
    assert first.count("\n") == 3 and first == second


def test_a_clip_that_is_a_part_of_a_recording(tags, sources, tmp_path):
    output = tmp_path / "tags"
    shutil.copytree(tags, output)
    for file in (output / "clips").iterdir():
        rows = pq.read_table(file)
        for name, value in (("start_s", 0.25), ("end_s", 0.5)):
            values = pa.array([value] * len(rows), pa.float64())
            rows = rows.set_column(rows.schema.get_field_index(name), name, values)
        pq.write_table(rows, file)
    asked = "SELECT * FROM clips WHERE member = 'deep/one.wav'"
    earmark("query", output, asked, "--extract", tmp_path / "out")
    row = table(tmp_path / "out")["deep/one.wav"]
    assert (row["start_s"], row["end_s"], row["written_s"]) == ("0.25", "0.5", "0.25")
    samples, _ = soundfile.read(tmp_path / "out" / row["file"], dtype="int16")
    whole, _ = soundfile.read(io.BytesIO(sources[1]["deep/one.wav"]), dtype="int16")
    np.testing.assert_array_equal(samples, whole[4_000:8_000])
    # A chunk's times are those of the clip.
    asked = "SELECT clip_id, 0.1 AS start_s, 0.2 AS end_s FROM clips WHERE member = 'deep/one.wav'"
    earmark("query", output, asked, "--chunk", "--extract", tmp_path / "chunk")
    row = table(tmp_path / "chunk")["deep/one.wav"]
    samples, _ = soundfile.read(tmp_path / "chunk" / row["file"], dtype="int16")
    np.testing.assert_array_equal(samples, whole[5_600:7_200])
    said = earmark(
        "query", output, "--extract", tmp_path / "original", "--format-audio", "original", code=1
    )
    assert "cannot be cut" in said.output


def test_what_changed_or_is_gone_is_said(sources, tiny_checkpoint, encoded, noise, tmp_path):
    folder = tmp_path / "sources"
    shutil.copytree(sources[0] / "loose", folder / "loose")
    shutil.copy(sources[0] / "a.tar", folder)
    tags = tmp_path / "tags"
    earmark(
        "annotate", folder / "a.tar", folder / "loose", "-o", tags, "--checkpoint", tiny_checkpoint
    )
    (folder / "loose" / "x y.wav").write_bytes(encoded(noise(8_000, seed=99)))
    (folder / "loose" / "sub" / "-rf.mp3").unlink()
    (folder / "a.tar").unlink()
    said = earmark("query", tags, "--extract", tmp_path / "out", code=1)
    found = table(tmp_path / "out")
    assert "it has changed since" in found["x y.wav"]["problem"]
    assert "is not in" in found["sub/-rf.mp3"]["problem"]
    assert "a.tar is not there" in found["long.flac"]["problem"]
    assert [row["file"] != "" for row in found.values()].count(True) == 1
    assert "Wrote 1 file and" in said.stderr
    assert "and 1 more; clips.csv names them all" in said.stderr  # five are named


def test_the_query_must_say_which_clips(tags, tmp_path):
    def said(*arguments):
        return earmark("query", tags, *arguments, "--extract", tmp_path / "out", code=2).output

    assert "add clip_id" in said("SELECT member FROM clips")
    assert "add start_s" in said("SELECT clip_id FROM clips", "--chunk")
    assert "no clip 'x'" in said("SELECT 'x' AS clip_id")
    assert "a row has no clip_id" in said("SELECT NULL AS clip_id")
    assert "cannot be cut out" in said("--chunk", "--format-audio", "original")
    assert "at a time" in said("--play") and "at a time" in said("--format", "csv")
    assert not (tmp_path / "out").exists()
    inside = earmark("query", tags, "--extract", tags, code=2).output
    assert "inside of OUTPUT" in inside
    file = tmp_path / "file"
    file.touch()
    assert "is a file; name a folder" in earmark("query", tags, "--extract", file, code=2).output


def test_another_extract_replaces_the_files_of_the_first_alone(tags, tmp_path):
    out = tmp_path / "out"
    earmark("query", tags, "--extract", out)
    first = {file.name for file in out.iterdir()}
    (out / "notes.txt").write_text("mine")
    with (out / "clips.csv").open("a") as stream:
        stream.write("notes.txt\n../beside.txt\n")
    (tmp_path / "beside.txt").write_text("mine")
    earmark("query", tags, "--extract", out, "--limit", 1)
    left = {file.name for file in out.iterdir()}
    named = {row["file"] for row in table(out).values()}
    assert left == {"clips.csv", "notes.txt"} | named and named < first and len(named) == 1
    assert (tmp_path / "beside.txt").exists()


def test_ctrl_c_says_what_stays(tags, tmp_path, monkeypatch):
    from pipeline import extract

    real, done = extract._written, []

    def interrupted(*arguments):
        if done:
            raise KeyboardInterrupt
        done.append(real(*arguments))
        return done[0]

    monkeypatch.setattr(extract, "_written", interrupted)
    said = earmark("query", tags, "--extract", tmp_path / "out", code=130).output
    assert "keeps the files that were written" in said
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"clips.csv", done[0].file}


def test_a_folder_of_others_is_left_alone(tags, tmp_path):
    (tmp_path / "clips.csv").write_text("file,mine\na.wav,1\n")
    said = earmark("query", tags, "--extract", tmp_path, code=2).output
    assert "is not empty" in said
    assert [file.name for file in tmp_path.iterdir()] == ["clips.csv"]
    assert (tmp_path / "clips.csv").read_text() == "file,mine\na.wav,1\n"


def test_rows_in_the_order_of_the_query_each_once(tags, tmp_path):
    asked = "SELECT clip_id FROM tags ORDER BY clip_id DESC"
    earmark("query", tags, asked, "--extract", tmp_path, "--limit", 400)
    names = list(table(tmp_path))
    full = [
        row["clip_id"] for row in csv.DictReader((tmp_path / "clips.csv").open(encoding="utf-8"))
    ]
    assert full == sorted(full, reverse=True) and len(set(names)) == len(names)


def test_play(tags, tmp_path, monkeypatch):
    made = tmp_path / "made"
    made.mkdir()
    monkeypatch.setattr(extract.tempfile, "tempdir", str(made))
    monkeypatch.setattr(extract.shutil, "which", lambda name: None)
    done = earmark("query", tags, "SELECT clip_id FROM clips WHERE member = 'twice.wav'", "--play")
    assert len(list(made.glob("earmark-play-*/*.wav"))) == 2 and str(made) in done.stdout
    assert "neither of ffplay and aplay" in done.stderr

    played = []
    monkeypatch.setattr(extract.shutil, "which", lambda name: name == "aplay")
    monkeypatch.setattr(
        extract.subprocess, "run",
        lambda command, check: played.append((command[0], soundfile.info(command[-1]).format)),
    )  # fmt: skip
    monkeypatch.setattr(extract, "PLAYED", 3)
    earmark("query", tags, "--play")
    assert played == [("aplay", "WAV")] * 3


# -------------------------------------------------------------- what is read


def test_of_a_tar_the_bodies_between_are_not_read(sources, monkeypatch, tmp_path):
    with tarfile.open(tmp_path / "big.tar", "w") as tar:
        for name, size in [("a.wav", 8 << 20), ("b.wav", 100), ("c.wav", 8 << 20)]:
            info = tarfile.TarInfo(name)
            info.size = size
            tar.addfile(info, io.BytesIO(bytes(size)))
    read = []

    class Counted(io.FileIO):
        def readinto(self, buffer):
            read.append(super().readinto(buffer))
            return read[-1]

    class Local:
        def open(self, path, mode):
            return io.BufferedReader(Counted(path))

    monkeypatch.setattr(find, "open_file_system", lambda url, access: (Local(), url))
    monkeypatch.setattr(find, "_size", lambda *_: 16 << 20)
    (clip,) = find_clips(str(tmp_path / "big.tar"), ["b.wav"])
    assert clip.size_bytes == 100
    assert sum(read) < 100_000


def test_of_a_parquet_file_only_the_row_groups_that_hold_them(sources, monkeypatch):
    read = []
    whole = find.read_clips
    monkeypatch.setattr(
        find,
        "read_clips",
        lambda shard, access: read.append(shard.row_groups) or whole(shard, access),
    )
    clips = list(find_clips(str(sources[0] / "c.parquet"), ["p3.wav", "row-00000004"]))
    assert [clip.member for clip in clips] == ["p3.wav", "row-00000004"]
    assert read == [(1, 2), (2, 3)]


def test_a_manifest_names_files_that_lie_elsewhere(sources, tmp_path):
    folder, contents = sources
    (folder / "list.csv").write_text("path\nloose/x y.wav\n")
    absolute = str(folder / "loose" / "x y.wav")
    for shard, member, root in [
        (str(folder / "list.csv"), "loose/x y.wav", None),
        (str(folder / "list.csv"), "x y.wav", str(folder / "loose")),
        (str(tmp_path / "list.jsonl.gz"), absolute, None),
    ]:
        (clip,) = (c.audio.read() for c in find_clips(shard, [member, "no.wav"], audio_root=root))
        assert clip == contents["x y.wav"]


def test_a_damaged_tar_gives_what_comes_before(sources, tmp_path):
    content = (sources[0] / "a.tar").read_bytes()
    for cut in (len(content) - 30_000, 120_000, 700):
        (tmp_path / "cut.tar").write_bytes(content[:cut])
        names = [clip.member for clip in find_clips(str(tmp_path / "cut.tar"), ["deep/one.wav"])]
        assert names == (["deep/one.wav"] if cut > 100_000 else [])


@pytest.mark.parametrize("ranged_from", [1, 1 << 40], ids=["ranged", "streamed"])
def test_in_a_bucket(sources, lead_to, tiny_checkpoint, tmp_path, monkeypatch, ranged_from):
    monkeypatch.setattr(find, "_RANGED_FROM_BYTES", ranged_from)
    folder, contents = sources
    with CloudStorage("b") as cloud:
        lead_to(cloud.env)
        for file in folder.rglob("*"):
            if file.is_file() and b"\xe9" not in os.fsencode(file):
                cloud.put("b", f"in/{file.relative_to(folder)}", file.read_bytes())
        inputs = [f"gs://b/in/{name}" for name in ("a.tar", "c.parquet", "loose")]
        earmark("annotate", *inputs, "-o", "gs://b/tags", "--checkpoint", tiny_checkpoint)
        earmark("query", "gs://b/tags", "--extract", tmp_path, "--format-audio", "original")
        found = table(tmp_path)
        assert {"long.flac", "twice.wav#2", "p3.wav", "sub/-rf.mp3"} <= set(found)
        for name, row in found.items():
            assert (tmp_path / row["file"]).read_bytes() == contents[name]


# --------------------------------------------------------------------- pieces


@pytest.mark.parametrize(
    "clip_id",
    ["s/../../../etc/passwd", "s//abs/olute.wav", "s/..", "s/", "s/a\nb\x1b[2J.wav", "s/-rf", "s/.hidden",
     "s/" + "x" * 5_000, "s/nul\0.wav", "s/c:\\windows\\a.wav", "s/日本語.wav", "s/a.wav#2"],
)  # fmt: skip
def test_a_file_name_is_nothing_but_a_name(clip_id):
    def row(clip_id, chunk_s=None):
        return Wanted(clip_id, "s", "m", "x", None, (), (None, None), chunk_s)

    name = file_name(row(clip_id), ".flac")
    assert os.path.basename(name) == name and name[0] not in ".-" and len(name) < 130
    assert name.isascii() and name.isprintable() and " " not in name and "\\" not in name
    assert name != file_name(row(clip_id + "'"), ".flac")
    assert name != file_name(row(clip_id, (0.0, 1.0)), ".flac")


def test_a_piece_of_what_cannot_be_decoded(tmp_path, encoded, noise):
    target = tmp_path / "x.flac"
    with pytest.raises(ClipError, match=r"."):
        write_clip(io.BytesIO(b"no audio at all"), target)
    with pytest.raises(ClipError, match="no samples there"):
        write_clip(io.BytesIO(encoded(noise(16_000))), target, start_s=2.0, end_s=3.0)
    many = encoded(noise((1_600, 12)))
    with pytest.raises(ClipError, match="12 channels"):
        write_clip(io.BytesIO(many), target)
    assert write_clip(io.BytesIO(many), target, "wav") == (0.1, None)
    assert soundfile.info(target).channels == 12


def test_what_breaks_off_is_written_as_far_as_it_goes(tmp_path, encoded, noise):
    content = encoded(noise(160_000), format="flac")
    damaged = content[:100_000] + b"\0" * 40_000 + content[140_000:]
    seconds, amiss = write_clip(io.BytesIO(damaged), tmp_path / "x.flac")
    assert 1 < seconds < 10.1
    assert soundfile.info(tmp_path / "x.flac").duration == pytest.approx(seconds)
    assert amiss is None or "breaks off" in amiss
