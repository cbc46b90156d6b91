"""`earmark export`: events for Audacity, Raven and a table."""

import csv
import io
import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from pipeline.cli import cli
from pipeline.export import audacity_track, raven_table, safe_stem

HOSTILE = (
    "../../../outside.wav",
    "/etc/passwd.wav",
    "..",
    ".hidden.wav",
    "-rf.wav",
    "a/b_c.wav",
    "a_b/c.wav",
    "A_b/c.wav",
    "nul\0tab\tline\n.wav",
    "é" * 200 + ".wav",
    "x" * 300 + ".wav",
    "\u202etxt.exe",
    "***",
    "con",
)


def earmark(*arguments):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def annotate(tmp_path_factory, make_tar, encoded, noise, tiny_checkpoint):
    """Runs `earmark annotate` over two tars, of which a clip is broken."""
    folder = tmp_path_factory.mktemp("shards")
    make_tar(
        folder / "a.tar",
        [("x/long.wav", encoded(noise((88_200, 2), seed=1), 44_100)),
         ("../up.flac", encoded(noise(70_000, seed=2), format="flac"))],
    )  # fmt: skip
    make_tar(
        folder / "b.tar",
        [("low.wav", encoded(noise(30_000, seed=3), 8_000)), ("broken.ogg", b"OggS, no more")],
    )

    def run(output, *options):
        asked = ("--checkpoint", tiny_checkpoint, "--threshold", 0.8, *options)
        done = earmark("annotate", folder, "--output", output, *asked)
        assert done.exit_code == 0, done.output
        return output

    return run


@pytest.fixture(scope="module")
def output(annotate, tmp_path_factory):
    """An output with segments. Do not change it."""
    folder = tmp_path_factory.mktemp("events") / "out"
    return annotate(folder, "--segments", "--chunk-hop-s", 0.5)


def rows_of(output):
    files = sorted((Path(output) / "clips").glob("*.parquet"))
    return pa.concat_tables(pq.read_table(file) for file in files).to_pylist()


def files_of(folder):
    return sorted(str(p.relative_to(folder)) for p in Path(folder).rglob("*") if p.is_file())


# ----------------------------------------------------------------------- what is written


def test_a_label_track_for_each_clip_that_has_events(output, tmp_path):
    done = earmark("export", output, "--audacity", tmp_path / "tracks")
    assert done.exit_code == 0, done.output
    rows = [row for row in rows_of(output) if row["segments"]]
    events = sum(len(row["segments"]) for row in rows)
    assert f"{events:,} events in 3 of 4 clips" in done.output
    assert "1 of which have no scores" in done.output
    assert len(files_of(tmp_path / "tracks")) == len(rows) == 3
    for row in rows:
        shard, _, name = row["clip_id"].partition("/")
        file = tmp_path / "tracks" / shard / f"{safe_stem(name, row['clip_id'])}.txt"
        lines = [line.split("\t") for line in file.read_text("utf-8").splitlines()]
        assert [(float(start), float(end), label) for start, end, label in lines] == [
            (pytest.approx(s["start_s"], abs=1e-6), pytest.approx(s["end_s"], abs=1e-6), s["name"])
            for s in row["segments"]
        ]


def test_the_forms_to_the_letter():
    events = [
        {"index": 0, "mid": "/m/a", "name": "Dog", "start_s": 0.0, "end_s": 10.24, "score": 0.5},
        {"index": 1, "mid": "", "name": "a\tb\nc", "start_s": 1 / 3, "end_s": 20.0, "score": 1.0},
    ]
    assert audacity_track(events) == ("0.000000\t10.240000\tDog\n0.333333\t20.000000\ta b c\n")
    assert raven_table(events, 8_000) == (
        "Selection\tView\tChannel\tBegin Time (s)\tEnd Time (s)\tLow Freq (Hz)\tHigh Freq (Hz)\t"
        "Label\tScore\n"
        "1\tSpectrogram 1\t1\t0.000000\t10.240000\t0.0\t8000.0\tDog\t0.5000\n"
        "2\tSpectrogram 1\t1\t0.333333\t20.000000\t0.0\t8000.0\ta b c\t1.0000\n"
    )


def test_raven_tables_and_one_table_of_all(output, tmp_path):
    done = earmark("export", output, "--raven", tmp_path / "raven", "--csv", tmp_path / "all.csv")
    assert done.exit_code == 0, done.output
    rows = {row["clip_id"]: row for row in rows_of(output) if row["segments"]}
    with open(tmp_path / "all.csv", encoding="utf-8", newline="") as stream:
        table = list(csv.DictReader(stream))
    expected = [
        {name: str(value) for name, value in
         {**{c: row[c] for c in ("clip_id", "shard", "member")},
          "clip_start_s": "", "clip_end_s": "", **segment}.items()}
        for row in rows.values() for segment in row["segments"]
    ]  # fmt: skip
    key = lambda event: json.dumps(event, sort_keys=True)  # noqa: E731
    assert sorted(table, key=key) == sorted(expected, key=key)
    assert list(table[0]) == [
        "clip_id", "shard", "member", "clip_start_s", "clip_end_s", "start_s", "end_s", "index", "mid", "name", "score",
    ]  # fmt: skip
    highest = {}
    for row in rows.values():
        shard, _, name = row["clip_id"].partition("/")
        file = tmp_path / "raven" / shard / f"{safe_stem(name, row['clip_id'])}.selections.txt"
        lines = list(csv.DictReader(io.StringIO(file.read_text("utf-8")), delimiter="\t"))
        assert [line["Selection"] for line in lines] == [
            str(n) for n in range(1, len(row["segments"]) + 1)
        ]
        highest[name] = {line["High Freq (Hz)"] for line in lines}
    # The student hears up to 8 kHz; a source of 8 kHz has nothing above 4.
    assert highest == {"x/long.wav": {"8000.0"}, "../up.flac": {"8000.0"}, "low.wav": {"4000.0"}}
    assert not [name for name in os.listdir(tmp_path) if "partial" in name]


def test_events_are_made_of_chunks_where_there_are_no_segments(annotate, output, tmp_path):
    chunks = annotate(tmp_path / "chunks", "--chunks", "--chunk-hop-s", 0.5)
    for name, source in (("a", output), ("b", chunks)):
        done = earmark("export", source, "--audacity", tmp_path / name)
        assert done.exit_code == 0, done.output
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b") != []
    for name in files_of(tmp_path / "a"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_some_labels_and_high_scores_alone(output, tmp_path):
    segments = [s for row in rows_of(output) for s in row["segments"] or ()]
    one, other = sorted({(s["name"], s["mid"]) for s in segments if s["mid"]})[:2]
    done = earmark(
        "export", output, "--csv", tmp_path / "few.csv", "--label", one[0], "--label", other[1]
    )
    assert done.exit_code == 0, done.output
    with open(tmp_path / "few.csv", encoding="utf-8", newline="") as stream:
        found = [line["name"] for line in csv.DictReader(stream)]
    wanted = [s["name"] for s in segments if s["name"] in (one[0], other[0])]
    assert sorted(found) == sorted(wanted) and set(found) == {one[0], other[0]}

    middle = float(np.median([s["score"] for s in segments]))
    asked = ("--csv", tmp_path / "high.csv", "--min-score", middle)
    assert earmark("export", output, *asked).exit_code == 0
    with open(tmp_path / "high.csv", encoding="utf-8", newline="") as stream:
        found = [float(line["score"]) for line in csv.DictReader(stream)]
    assert len(found) == sum(s["score"] >= middle for s in segments) < len(segments)


def test_a_clip_of_a_recording_says_which_part_it_is(output, tmp_path):
    copy = tmp_path / "out"
    (copy / "clips").mkdir(parents=True)
    for name in ("run.json", "labels.parquet"):
        (copy / name).write_bytes((output / name).read_bytes())
    for file in (output / "clips").glob("*.parquet"):
        table = pq.read_table(file)
        for column, value in (("start_s", 100.0), ("end_s", None)):
            values = pa.array([value] * len(table), pa.float64())
            table = table.set_column(table.schema.get_field_index(column), column, values)
        pq.write_table(table, copy / "clips" / file.name)
    assert earmark("export", copy, "--csv", tmp_path / "all.csv").exit_code == 0
    with open(tmp_path / "all.csv", encoding="utf-8", newline="") as stream:
        lines = list(csv.DictReader(stream))
    assert {(line["clip_start_s"], line["clip_end_s"]) for line in lines} == {("100.0", "")}
    assert min(float(line["start_s"]) for line in lines) == 0.0  # into the clip


def test_an_export_again_replaces_what_was_there(output, tmp_path):
    asked = ("export", output, "--audacity", tmp_path / "tracks")
    assert earmark(*asked).exit_code == 0
    before = files_of(tmp_path / "tracks")
    (tmp_path / "tracks" / before[0]).write_text("edited")
    assert earmark(*asked).exit_code == 0
    assert files_of(tmp_path / "tracks") == before
    assert (tmp_path / "tracks" / before[0]).read_text() != "edited"


def test_no_events_are_no_error(output, tmp_path):
    done = earmark("export", output, "--audacity", tmp_path / "none", "--min-score", 1)
    assert done.exit_code == 0 and "0 events in 0 of 4 clips" in done.output
    assert not (tmp_path / "none").exists()


# ----------------------------------------------------------------------------- file names


def test_names_stay_in_their_folder_and_apart(tmp_path):
    stems = [safe_stem(name, f"s/{name}") for name in HOSTILE]
    assert len({stem.lower() for stem in stems}) == len(HOSTILE)
    for stem in stems:
        assert "/" not in stem and "\\" not in stem and "\0" not in stem
        assert stem[0] not in ".-" and len(f".{stem}.selections.txt.partial".encode()) <= 255
        (tmp_path / f"{stem}.txt").write_text("")
    assert len(files_of(tmp_path)) == len(HOSTILE)
    assert safe_stem("dog 1.wav", "s/dog 1.wav").startswith("dog_1.wav-")
    # The same clip in another name's place, the same name of another clip.
    assert safe_stem("a", "s/a") == safe_stem("a", "s/a") != safe_stem("a", "t/a")


def test_hostile_clip_ids_write_nothing_outside(output, tmp_path):
    copy = tmp_path / "out"
    (copy / "clips").mkdir(parents=True)
    for name in ("run.json", "labels.parquet"):
        (copy / name).write_bytes((output / name).read_bytes())
    (file, *_) = sorted((output / "clips").glob("*.parquet"))
    row = next(row for row in pq.read_table(file).to_pylist() if row["segments"])
    rows = [row | {"clip_id": name} for name in HOSTILE]
    pq.write_table(pa.Table.from_pylist(rows, pq.read_schema(file)), copy / "clips" / "s.parquet")
    place = tmp_path / "deep" / "down" / "tracks"
    done = earmark("export", copy, "--audacity", place)
    assert done.exit_code == 0, done.output
    assert len(files_of(place)) == len(HOSTILE)
    assert files_of(tmp_path / "deep") == [f"down/tracks/{name}" for name in files_of(place)]


# --------------------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "what is to be written? Give --audacity DIR"),
        (("--audacity", ""), "--audacity is ''; expected a path"),
        (("--csv", "gs://b/all.csv"), "expected a path of this machine"),
        (("--csv", "x.csv", "--label", "Dogg"), "--label 'Dogg' is no label of this output; the nearest are 'Dog'"),
        (("--csv", "x.csv", "--label", "qqqqqq"), "--label 'qqqqqq' is no label"),
        (("--csv", "x.csv", "--min-score", "2"), "'--min-score'"),
        (("--csv", "."), "--csv '.' is a folder; name a file"),
        (("--csv", "no/such/folder.csv"), "--csv 'no/such/folder.csv' cannot be written: No such file"),
        (("--audacity", "{output}/run.json"), "cannot be written: Not a directory"),
    ],
)  # fmt: skip
def test_wrong_options_are_said(output, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    done = earmark("export", output, *[a.format(output=output) for a in arguments])
    assert done.exit_code == 2 and message in done.output
    assert "Traceback" not in done.output and os.listdir(tmp_path) == []


def test_an_output_without_events_says_what_to_do(annotate, tmp_path):
    plain = annotate(tmp_path / "plain")
    done = earmark("export", plain, "--audacity", tmp_path / "tracks")
    assert done.exit_code == 2
    assert "neither segments nor chunks" in done.output and "--segments" in done.output
    assert not (tmp_path / "tracks").exists()


def test_what_is_no_output_is_said(tmp_path):
    done = earmark("export", tmp_path, "--csv", tmp_path / "x.csv")
    assert done.exit_code == 2 and "holds no run.json" in done.output


def test_a_damaged_file_is_named_and_leaves_no_half_a_table(output, tmp_path):
    copy = tmp_path / "out"
    (copy / "clips").mkdir(parents=True)
    for name in files_of(output):
        (copy / name).write_bytes((output / name).read_bytes())
    last = sorted((copy / "clips").glob("*.parquet"))[-1]
    last.write_bytes(last.read_bytes()[:-100])
    done = earmark("export", copy, "--csv", tmp_path / "x.csv")
    assert done.exit_code == 2 and f"{last} cannot be read" in done.output
    assert sorted(os.listdir(tmp_path)) == ["out"]
