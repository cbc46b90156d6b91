"""`earmark dataset`: what `load_dataset` reads is what the output and the sources say."""

import csv
import io
import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import webdataset
from click.testing import CliRunner

from bench.stand_ins import CloudStorage
from pipeline.cli import cli
from pipeline.dataset import divide, shares_of
from pipeline.extract import Wanted
from pipeline.options import UsageError
from student.labels import audioset_labels

NAMES = [label.name for label in audioset_labels()]
HOSTILE = {
    "../../etc/pass.wd.wav": 1,
    "a`b|c](x)\n# h.wav": 2,
    "red\x1b[31m\u202egnp.wav": 3,
    "same.name.wav": 4,
    "sub/same.name.wav": 5,
    "ü\udce9.wav".encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace"): 6,
    "'; DROP TABLE clips; --.wav": 7,
}


def run(*arguments, code=0):
    done = CliRunner().invoke(cli, [*map(str, arguments)])
    assert done.exit_code == code, done.output
    assert "Traceback" not in done.output
    return done.output


@pytest.fixture(scope="module")
def sound(encoded, noise):
    def make(seed, seconds=0.7, **options):
        return encoded((0.05 + seed / 20) * noise(int(16_000 * seconds), seed=seed), **options)

    return make


@pytest.fixture(scope="module")
def sources(tmp_path_factory, make_tar, sound):
    """A tar of hostile names, one with copies and a broken clip, parts of a recording."""
    folder = tmp_path_factory.mktemp("sources")
    make_tar(folder / "hostile.tar", [(name, sound(n)) for name, n in HOSTILE.items()])
    copies = [(f"copy{n}.wav", sound(20 + n // 3)) for n in range(12)]
    make_tar(folder / "copies.tar", [*copies, ("broken.ogg", b"OggS, but no more than that")])
    (folder / "long.flac").write_bytes(sound(30, 6, format="flac"))
    (folder / "parts.csv").write_text(
        "path,id,start,end\n" + "".join(f"long.flac,p{n},{n},{n + 1}\n" for n in range(6))
    )
    return folder


@pytest.fixture(scope="module")
def tags(sources, tiny_checkpoint, tmp_path_factory):
    output = tmp_path_factory.mktemp("output") / "tags"
    inputs = [sources / name for name in ("hostile.tar", "copies.tar", "parts.csv")]
    run("annotate", *inputs, "-o", output, "--checkpoint", tiny_checkpoint, "--threshold", 0.95)
    return output


@pytest.fixture(scope="module")
def rows(tags):
    """The rows with scores, by clip_id."""
    files = sorted((tags / "clips").glob("*.parquet"))
    every = [row for file in files for row in pq.read_table(file).to_pylist()]
    return {row["clip_id"]: row for row in every if row["error"] is None}


def loaded(folder, tmp_path, **options):
    """The dataset in a folder, audio as it is stored."""
    found = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"), **options)
    for name, split in found.items():
        for column, feature in split.features.items():
            if isinstance(feature, datasets.Audio) or column in ("wav", "flac"):
                found[name] = split.cast_column(column, datasets.Audio(decode=False))
    return found


def original(sources, row):
    """The bytes of a clip in its tar."""
    import tarfile

    with tarfile.open(row["shard"]) as tar:
        return next(tar.extractfile(m).read() for m in tar if m.name == row["member"])


def check_audio(content, row, sources):
    if row["member"] == "long.flac":
        whole, rate = soundfile.read(sources / "long.flac", dtype="int16")
        piece, found_rate = soundfile.read(io.BytesIO(content), dtype="int16")
        start, end = round(row["start_s"] * rate), round(row["end_s"] * rate)
        np.testing.assert_array_equal(piece, whole[start:end])
        assert found_rate == rate
    else:
        assert content == original(sources, row)


# ------------------------------------------------------------------------ both formats


def test_parquet_is_read_by_datasets(tags, sources, rows, tmp_path):
    said = run("dataset", tags, "--to", tmp_path / "d", "--scores")
    assert f"train: {len(rows)} clips" in said and len(rows) == 25
    found = loaded(tmp_path / "d", tmp_path)
    assert list(found) == ["train"]
    assert isinstance(found["train"].features["tags"].feature, datasets.ClassLabel)
    assert found["train"].features["tags"].feature.names == NAMES
    assert {clip["clip_id"] for clip in found["train"]} == set(rows)
    for clip in found["train"]:
        row = rows[clip["clip_id"]]
        assert [NAMES[n] for n in clip["tags"]] == [tag["name"] for tag in row["tags"]]
        assert clip["tag_scores"] == [tag["score"] for tag in row["tags"]]
        assert clip["scores"] == row["scores"]
        assert clip["audio_xxh128"] == row["audio_xxh128"]
        check_audio(clip["audio"]["bytes"], row, sources)
        assert "/" not in clip["audio"]["path"] and clip["audio"]["path"].isprintable()
    assert any(clip["tags"] for clip in found["train"])
    assert not (tmp_path / "d" / "left_out.csv").exists()


def test_the_schema_says_it_without_the_card(tags, rows, tmp_path):
    run("dataset", tags, "--to", tmp_path / "d")
    (tmp_path / "d" / "README.md").unlink()
    found = loaded(tmp_path / "d", tmp_path)["train"]
    assert found.features["tags"].feature.names == NAMES and len(found) == len(rows)
    assert isinstance(found.features["audio"], datasets.Audio)
    stated = pq.read_schema(tmp_path / "d" / "data" / "train-00000.parquet").metadata
    features = json.loads(stated[b"huggingface"])["info"]["features"]
    assert features["audio"]["_type"] == "Audio" and "scores" not in features


@pytest.mark.parametrize("scores", [False, True])
def test_webdataset_is_read_by_datasets_and_by_webdataset(tags, sources, rows, tmp_path, scores):
    run("dataset", tags, "--to", tmp_path / "d", "--format", "webdataset", *["--scores"] * scores)
    found = loaded(tmp_path / "d", tmp_path)["train"]
    assert found.features["json"]["tags"].feature.names == NAMES
    assert {clip["json"]["clip_id"] for clip in found} == set(rows)
    for clip in found:
        row = rows[clip["json"]["clip_id"]]
        assert [NAMES[n] for n in clip["json"]["tags"]] == [tag["name"] for tag in row["tags"]]
        assert clip["json"].get("scores") == (row["scores"] if scores else None)
        check_audio(clip["wav"]["bytes"], row, sources)
    keys = set()
    place = str(tmp_path / "d" / "data" / "train-00000.tar")
    for sample in webdataset.WebDataset(place, shardshuffle=False):
        about = json.loads(sample["json"])
        check_audio(sample["wav"], rows[about["clip_id"]], sources)
        assert about["tags"] == [tag["name"] for tag in rows[about["clip_id"]]["tags"]]
        assert "/" not in sample["__key__"] and sample["__key__"].isprintable()
        keys.add(sample["__key__"])
    assert len(keys) == len(rows)


@pytest.mark.parametrize("format", ["parquet", "webdataset"])
def test_small_shards_are_many_files(tags, rows, tmp_path, format, monkeypatch):
    from pipeline import dataset_files

    monkeypatch.setattr(dataset_files, "_ROWS_PER_GROUP", 2)
    run("dataset", tags, "--to", tmp_path / "d", "--format", format, "--shard-mb", 0.06)
    files = sorted((tmp_path / "d" / "data").iterdir())
    assert len(files) > 3 and files[1].name.startswith("train-00001.")
    assert len(loaded(tmp_path / "d", tmp_path)["train"]) == len(rows)


# ------------------------------------------------------------------------ which clips


def test_the_filters_are_those_of_query(tags, rows, tmp_path):
    counted = Counter(tag["name"] for row in rows.values() for tag in row["tags"])
    name = next(name for name, count in counted.most_common() if count < len(rows) - 2)
    asked = ("--tag", name, "--where", "duration_s > 0.9 -- of a second")
    run("dataset", tags, "--to", tmp_path / "d", *asked)
    wanted = {
        id for id, row in rows.items()
        if row["duration_s"] > 0.9 and any(tag["name"] == name for tag in row["tags"])
    }  # fmt: skip
    found = loaded(tmp_path / "d", tmp_path)["train"]
    assert set(found["clip_id"]) == wanted
    run("dataset", tags, "--to", tmp_path / "e", "--where", f"score('{name}') > 0.5", "--limit", 3)
    assert len(loaded(tmp_path / "e", tmp_path)["train"]) == 3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--tag", "Dgo"], "there is no label 'Dgo'"),
        (["--where", "duration_s >"], "syntax error"),
        (["--where", " "], "--where is empty"),
        (["--where", "duration_s"], "not a condition"),
        (["--where", "1=1) OR (1=1"], "syntax error"),
        (["--where", "1=1 LIMIT 3"], "syntax error"),
        (["--where", "duration_s > 1e9"], "no clip is as asked"),
        (["--where", "true); DROP TABLE labels; SELECT (1"], "one query at a time"),
        (["--split", "train=0.9"], "expected 1"),
        (["--split", "train=0.9,test"], "is not NAME=SHARE"),
        (["--split", "../x=0.5,b=0.5"], "is not NAME=SHARE"),
        (["--split", "a=0.5,A=0.5"], "names a split twice"),
        (["--split", "train=0.9999,test=0.0001"], "gets none of the"),
        (["--billing-project", "p"], "is for gs://"),
    ],
)
def test_what_is_refused(tags, tmp_path, options, said):
    assert said in run("dataset", tags, "--to", tmp_path / "d", *options, code=2)
    assert not list(tmp_path.iterdir())


def test_places_that_are_refused(tags, tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "photo.jpg").write_bytes(b"x")
    assert "is there already" in run("dataset", tags, "--to", tmp_path / "d", code=2)
    assert "inside of OUTPUT" in run("dataset", tags, "--to", tags / "d", code=2)
    assert "on this machine" in run("dataset", tags, "--to", "gs://b/d", code=2)
    assert "holds no run.json" in run("dataset", tmp_path, "--to", tmp_path.parent / "e", code=2)
    assert "is empty" in run("dataset", tags, "--to", "", code=2)
    assert [file.name for file in tmp_path.iterdir()] == ["d"]


# ------------------------------------------------------------------------ splits


def test_splits_do_not_leak(tags, rows, tmp_path):
    run("dataset", tags, "--to", tmp_path / "d", "--split", "train=0.6,dev=0.2,test=0.2")
    found = loaded(tmp_path / "d", tmp_path)
    assert set(found) == {"train", "dev", "test"}
    assert sum(map(len, found.values())) == len(rows)
    splits_of = {}
    for name, split in found.items():
        for clip in split:
            row = rows[clip["clip_id"]]
            splits_of.setdefault(row["audio_xxh128"], set()).add(name)
            splits_of.setdefault((row["shard"], row["member"]), set()).add(name)
    assert all(len(splits) == 1 for splits in splits_of.values())
    again = run("dataset", tags, "--to", tmp_path / "e", "--split", "train=0.6,dev=0.2,test=0.2")
    assert "train:" in again
    other = loaded(tmp_path / "e", tmp_path)
    assert {n: set(s["clip_id"]) for n, s in other.items()} == {
        n: set(s["clip_id"]) for n, s in found.items()
    }


def a_row(id, member, digest):
    return Wanted(id, "s", member, digest, None, (), (None, None), None)


def test_groups_stay_together_in_turn_and_shares_are_kept():
    # a1 and a2 are one recording, a2 and b1 the same bytes, b1 and b2 one recording.
    chain = [a_row("a1", "a", "1"), a_row("a2", "a", "2"), a_row("b1", "b", "2"), a_row("b2", "b", "3")]  # fmt: skip
    others = [a_row(f"c{n:04d}", f"c{n}", f"c{n}") for n in range(1_000)]
    shares = shares_of("train=0.8,test=0.2")
    drawn = set()
    for seed in range(12):
        split_of = divide([*chain, *others], shares, seed)
        assert len({split_of[row.clip_id] for row in chain}) == 1
        assert abs(sum(split == "test" for split in split_of.values()) - 200) <= 4
        assert split_of == divide([*others[::-1], *chain[::-1]], shares, seed)
        drawn.add(split_of["a1"])
    assert drawn == {"train", "test"}


def test_one_group_cannot_be_divided():
    with pytest.raises(UsageError, match="gets none"):
        divide([a_row("a", "x", "1"), a_row("b", "y", "1")], shares_of("train=0.5,test=0.5"), 0)


# ------------------------------------------------------------------------ what is not there


def test_what_is_not_found_is_left_out_and_said(tags, sources, rows, tmp_path, make_tar, sound):
    there = sources.parent / "gone"
    shutil.move(sources / "copies.tar", there)
    try:
        # One is gone, one has changed; the tar is otherwise as it was.
        make_tar(
            sources / "copies.tar",
            [(f"copy{n}.wav", sound(20 + n // 3 if n else 99)) for n in range(11)],
        )
        said = run("dataset", tags, "--to", tmp_path / "d", code=1)
        run("dataset", tags, "--to", tmp_path / "e", "--allow-missing")
    finally:
        shutil.move(there, sources / "copies.tar")
    assert "2 clips have no audio any more" in said
    with (tmp_path / "d" / "left_out.csv").open(encoding="utf-8", newline="") as stream:
        left = {row["member"]: row["reason"] for row in csv.DictReader(stream)}
    assert set(left) == {"copy0.wav", "copy11.wav"}
    assert "changed since" in left["copy0.wav"] and "not in" in left["copy11.wav"]
    for folder in ("d", "e"):
        assert len(loaded(tmp_path / folder, tmp_path)["train"]) == len(rows) - 2
        assert "2 clips that were asked for are left out" in (
            tmp_path / folder / "README.md"
        ).read_text("utf-8")


def test_nothing_found_is_an_error(tags, sources, tmp_path):
    there = sources.parent / "gone"
    shutil.move(sources / "hostile.tar", there)
    try:
        said = run("dataset", tags, "--to", tmp_path / "d", "--where", "shard LIKE '%hostile.tar'", code=2)  # fmt: skip
    finally:
        shutil.move(there, sources / "hostile.tar")
    assert "the audio of none of the 7 clips" in said and not list(tmp_path.iterdir())


def test_what_a_killed_one_left_is_removed(tags, tmp_path):
    code = (
        "import os, signal; from pipeline import dataset, dataset_card; from click.testing import CliRunner; "
        "dataset_card.card = lambda *a: os.kill(os.getpid(), signal.SIGKILL); "
        f"dataset.write_dataset(dataset.DatasetOptions({str(tags)!r}, {str(tmp_path / 'd')!r}))"
    )
    killed = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent)
    assert killed.returncode == -9
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".d.") and list((left / "data").iterdir())
    run("dataset", tags, "--to", tmp_path / "d")
    assert [file.name for file in tmp_path.iterdir()] == ["d"]


# ------------------------------------------------------------------------ the card


def test_the_card_says_how_it_was_made(tags, rows, tmp_path):
    made = json.loads((tags / "run.json").read_text())
    where = "member <> '`|</td>\n# x'"
    run("dataset", tags, "--to", tmp_path / "d", "--where", where, "--split", "train=0.5,test=0.5",
        "--seed", 7)  # fmt: skip
    text = (tmp_path / "d" / "README.md").read_text("utf-8")
    from huggingface_hub import DatasetCard

    card = DatasetCard.load(tmp_path / "d" / "README.md")
    assert card.data.configs[0]["data_files"][1]["split"] == "test"
    for said in (made["fingerprint"], made["id"], made["checkpoint"]["weights_sha256"], "0.95 for every label",
                 "`train=0.5,test=0.5`, seed 7", "0 clips that were asked for are left out",
                 "1 clips of the output failed when they were tagged, and are never here (InvalidDataError 1)"):  # fmt: skip
        assert said in text
    (line,) = (line for line in text.splitlines() if line.startswith("| clips |"))
    assert r"\`" not in line and "``" in line and line.count(" | ") == 1
    table = [line for line in text.splitlines() if line.startswith(("| train |", "| test |"))]
    assert sum(int(line.split(" | ")[1]) for line in table) == len(rows)


def test_hostile_names_reach_no_terminal(tags, sources, tmp_path, make_tar):
    there = sources.parent / "gone"
    shutil.move(sources / "hostile.tar", there)
    make_tar(sources / "hostile.tar", [])
    try:
        said = run("dataset", tags, "--to", tmp_path / "d", code=1)
    finally:
        shutil.move(there, sources / "hostile.tar")
    assert "\x1b" not in said and "\u202e" not in said and "gnp.wav" in said


# ------------------------------------------------------------------------ elsewhere


def test_a_bucket(sources, rows, tmp_path, earmark):
    with CloudStorage("b") as cloud:
        for name in ("hostile.tar", "copies.tar"):
            cloud.put("b", f"in/{name}", (sources / name).read_bytes())
        earmark(cloud.env, "annotate", "gs://b/in", "--output", "gs://b/tags")
        earmark(cloud.env, "dataset", "gs://b/tags", "--to", tmp_path / "d")
    found = loaded(tmp_path / "d", tmp_path)["train"]
    wanted = Counter(row["audio_xxh128"] for row in rows.values() if row["member"] != "long.flac")
    assert Counter(found["audio_xxh128"]) == wanted


def test_a_compacted_output_gives_the_same(tags, tmp_path):
    run("compact", tags, "--to", tmp_path / "few")
    run("dataset", tags, "--to", tmp_path / "a")
    run("dataset", tmp_path / "few", "--to", tmp_path / "b")
    name = Path("data") / "train-00000.parquet"
    assert pq.read_table(tmp_path / "a" / name) == pq.read_table(tmp_path / "b" / name)


def test_help_is_fast():
    code = (
        "import sys; from click.testing import CliRunner; from pipeline.cli import cli; "
        "assert CliRunner().invoke(cli, ['dataset', '--help']).exit_code == 0; "
        "sys.exit(bool({'datasets', 'pyarrow', 'duckdb'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
