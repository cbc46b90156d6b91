"""`earmark retag`: other tags for an output that is there, from its scores alone."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from bench.stand_ins import CloudStorage, Faults
from evaluation.scores import open_source
from evaluation.thresholds import fit_thresholds
from pipeline.cli import cli
from pipeline.retag import RetagOptions, execute, prepare
from student.checkpoint import read_checkpoint
from student.labels import audioset_labels
from transforms import retag as transform
from transforms.output import LocalOutput
from transforms.write import RUN_KEY, SHARD_KEY

ROOT = Path(__file__).parent.parent


def earmark(*arguments):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def shards(tmp_path_factory, make_tar, encoded, noise):
    """Three tars of three clips, a clip of them broken."""
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(3):
        members = [
            (f"{shard}-{n}.wav", encoded(noise(4_000 + 9_000 * n, seed=10 * shard + n)))
            for n in range(3)
        ]
        if shard == 1:
            members[1] = ("broken.ogg", b"OggS, but no more than that")
        make_tar(folder / f"s-{shard}.tar", members)
    return folder


@pytest.fixture(scope="module")
def annotate(shards, tiny_checkpoint):
    """Runs `earmark annotate` over the shards into a folder."""

    def run(output, *options):
        return earmark(
            "annotate", shards, "--output", output, "--checkpoint", tiny_checkpoint, *options
        )

    return run


@pytest.fixture(scope="module")
def tagged(annotate, tmp_path_factory):
    """The output of a run with the checkpoint's thresholds, 0.2. Do not change it."""
    output = tmp_path_factory.mktemp("tagged") / "out"
    done = annotate(output, "--chunks", "--embeddings")
    assert done.exit_code == 0, done.output
    return output


@pytest.fixture(scope="module")
def thresholds_file(tmp_path_factory, tiny_checkpoint):
    """The full form, with labels that never become tags, fitted on made-up clips."""
    labels = audioset_labels()
    random = np.random.default_rng(0)
    truth = random.random((200, len(labels))) < 0.3
    z = random.normal(-1, 1, truth.shape) + truth * random.choice([0, 3], len(labels))
    scores = (1 / (1 + np.exp(-z))).astype(np.float32)
    fitted = fit_thresholds(
        truth,
        scores,
        labels,
        target_precision=0.7,
        weights_sha256=read_checkpoint(str(tiny_checkpoint)).weights_sha256,
    )
    assert 50 < sum(threshold is None for threshold in fitted.thresholds) < 450
    file = tmp_path_factory.mktemp("thresholds") / "t.json"
    file.write_text(fitted.to_json(), "utf-8")
    return file


def tables(output):
    """Each file's table without what its metadata says of the making."""
    files = sorted((Path(output) / "clips").glob("*.parquet"))
    return {file.name: pq.read_table(file).replace_schema_metadata(None) for file in files}


def bits(table):
    """A table as bytes: NaN and -0.0 too are what they were."""
    stream = io.BytesIO()
    with pa.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    return stream.getvalue()


def same(left, right, *, but_tags=False):
    assert list(left) == list(right)
    for name in left:
        one, other = left[name], right[name]
        if but_tags:
            assert one.schema.equals(other.schema)
            one, other = one.drop_columns("tags"), other.drop_columns("tags")
        assert one.schema.equals(other.schema, check_metadata=True)
        assert bits(one) == bits(other)


def making(output):
    run = json.loads((Path(output) / "run.json").read_text())
    return run["fingerprint"], run["scoring"]


def test_with_the_same_thresholds_the_tags_are_the_same_bit_for_bit(tagged, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.at_once._HELD", 2)  # fewer than there are shards
    done = earmark("retag", tagged, "--output", tmp_path / "new", "--threshold", 0.2)
    assert done.exit_code == 0, done.output
    assert "Retagged 3 shards" in done.output and "9 clips, 1 of them failed" in done.output
    same(tables(tagged), tables(tmp_path / "new"))
    assert making(tagged) == making(tmp_path / "new")
    before, after = (
        json.loads((folder / "summary.json").read_text()) for folder in (tagged, tmp_path / "new")
    )
    for fact in ("clips", "tagged", "failed", "failures", "audio_s"):
        assert before[fact] == after[fact]
    assert before["tags"] == after["tags"] and sum(after["tags"].values()) > 100
    labels = [(folder / "labels.parquet").read_bytes() for folder in (tagged, tmp_path / "new")]
    assert labels[0] == labels[1]


@pytest.mark.parametrize("options", [(), ("--top-k", 2)])
def test_the_tags_are_those_of_annotate_with_the_same_thresholds(
    annotate, tagged, thresholds_file, tmp_path, options
):
    asked = ("--thresholds", thresholds_file, *options)
    done = earmark("retag", tagged, "--output", tmp_path / "new", *asked)
    assert done.exit_code == 0, done.output
    assert "labels have no threshold and never become tags" in done.output
    assert annotate(tmp_path / "anew", "--chunks", "--embeddings", *asked).exit_code == 0
    same(tables(tmp_path / "anew"), tables(tmp_path / "new"))
    same(tables(tagged), tables(tmp_path / "new"), but_tags=True)
    assert making(tmp_path / "anew") == making(tmp_path / "new")
    beside = [(tmp_path / name / "labels.parquet").read_bytes() for name in ("anew", "new")]
    assert beside[0] == beside[1]

    run = json.loads((tmp_path / "new" / "run.json").read_text())
    origin = json.loads((tagged / "run.json").read_text())
    assert run["retagged"]["from"] == {
        "output": str(tagged),
        "id": origin["id"],
        "fingerprint": origin["fingerprint"],
    }
    assert run["fingerprint"] != origin["fingerprint"]
    assert run["checkpoint"]["thresholds"] == "file"
    stated = json.loads(thresholds_file.read_text())["labels"]
    never = {entry["name"] for entry in stated.values() if entry["threshold"] is None}
    assert {name for name, threshold in run["thresholds"].items() if threshold is None} == never
    shown = pq.read_table(tmp_path / "new" / "labels.parquet").to_pylist()
    assert {row["name"] for row in shown if row["threshold"] is None} == never
    tags = [row for t in tables(tmp_path / "new").values() for row in t["tags"].to_pylist()]
    assert tags.count(None) == 1  # the broken clip
    assert not never & {tag["name"] for row in tags for tag in row or ()}
    assert any(tag["name"] not in never for row in tags for tag in row or ())


def test_every_file_says_its_making_and_its_totals(tagged, tmp_path):
    assert earmark("retag", tagged, "-o", tmp_path / "new", "--threshold", 0.6).exit_code == 0
    run = json.loads((tmp_path / "new" / "run.json").read_text())
    for name, table in tables(tmp_path / "new").items():
        metadata = pq.read_metadata(tmp_path / "new" / "clips" / name).metadata
        assert json.loads(metadata[RUN_KEY]) == run
        # Once, and in no second place where the old one could stand.
        one, other = (
            (folder / "clips" / name).read_bytes() for folder in (tagged, tmp_path / "new")
        )
        assert one.count(RUN_KEY) == other.count(RUN_KEY) == 1
        totals = json.loads(metadata[SHARD_KEY])
        assert totals["clips"] == table.num_rows
        assert sum(totals["tags"].values()) == sum(len(r or ()) for r in table["tags"].to_pylist())
    before = sum(len(r or ()) for t in tables(tagged).values() for r in t["tags"].to_pylist())
    after = sum(
        len(r or ()) for t in tables(tmp_path / "new").values() for r in t["tags"].to_pylist()
    )
    assert 0 < after < before


def test_half_precision(annotate, tmp_path):
    """The score as it is stored decides, in both."""
    assert annotate(tmp_path / "half", "--score-type", "float16").exit_code == 0
    one = next(iter(tables(tmp_path / "half").values()))["scores"].to_pylist()[0]
    threshold = float(np.float16(sorted(one)[-20]))  # a score that is just reached
    asked = ("--threshold", repr(threshold))
    assert earmark("retag", tmp_path / "half", "-o", tmp_path / "new", *asked).exit_code == 0
    assert annotate(tmp_path / "anew", "--score-type", "float16", *asked).exit_code == 0
    same(tables(tmp_path / "anew"), tables(tmp_path / "new"))
    tags = next(iter(tables(tmp_path / "new").values()))["tags"].to_pylist()[0]
    assert min(tag["score"] for tag in tags) == threshold


def test_row_groups_stay_and_no_more_than_one_is_read_at_a_time(tagged, tmp_path, monkeypatch):
    shutil.copytree(tagged, tmp_path / "old")
    (file, *_) = sorted((tmp_path / "old" / "clips").glob("*.parquet"))
    metadata = pq.read_metadata(file).metadata
    whole = pq.read_table(file)
    with pq.ParquetWriter(file, whole.schema.remove_metadata()) as writer:
        for start, length in ((0, 1), (1, 0), (1, 2)):
            writer.write_table(whole.slice(start, length))
        writer.add_key_value_metadata({key: metadata[key] for key in (RUN_KEY, SHARD_KEY)})
    monkeypatch.setattr(transform, "_ROWS_AT_ONCE", 1)
    read = []
    of_one = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile,
        "read_row_group",
        lambda self, group, *a, **k: read.append(group) or of_one(self, group, *a, **k),
    )
    assert (
        earmark("retag", tmp_path / "old", "-o", tmp_path / "new", "--threshold", 0.2).exit_code
        == 0
    )
    same(tables(tagged), tables(tmp_path / "new"))
    groups = pq.read_metadata(tmp_path / "new" / "clips" / file.name)
    assert [groups.row_group(n).num_rows for n in range(groups.num_row_groups)] == [1, 0, 2]
    assert sorted(read) == [0, 0, 0, 1, 2]


def test_segments_are_made_anew_of_chunks(annotate, thresholds_file, tmp_path, monkeypatch):
    monkeypatch.setattr(transform, "_ROWS_AT_ONCE", 2)  # fewer than a row group has
    options = ("--chunk-hop-s", "0.4", "--chunks", "--segments", "--score-type", "float16")
    assert annotate(tmp_path / "old", *options).exit_code == 0
    asked = ("--thresholds", thresholds_file)
    done = earmark("retag", tmp_path / "old", "-o", tmp_path / "new", *asked)
    assert done.exit_code == 0, done.output
    assert annotate(tmp_path / "anew", *options, *asked).exit_code == 0
    same(tables(tmp_path / "anew"), tables(tmp_path / "new"))
    assert making(tmp_path / "anew") == making(tmp_path / "new")
    old, new = (
        [row for table in tables(tmp_path / name).values() for row in table["segments"].to_pylist()]
        for name in ("old", "new")
    )
    assert old != new and old.count(None) == new.count(None) == 1


def test_segments_without_chunks_are_refused_and_nothing_is_written(annotate, tmp_path):
    assert annotate(tmp_path / "old", "--segments").exit_code == 0
    done = earmark("retag", tmp_path / "old", "-o", tmp_path / "new", "--threshold", 0.5)
    assert done.exit_code == 2
    assert "has a column 'segments' and no 'chunks'" in done.output
    assert "--chunks" in done.output and not (tmp_path / "new").exists()


def test_a_shard_without_clips(annotate, tmp_path, tiny_checkpoint, make_tar):
    tar = make_tar(tmp_path / "empty.tar", [])
    assert (
        earmark("annotate", tar, "-o", tmp_path / "out", "--checkpoint", tiny_checkpoint).exit_code
        == 0
    )
    assert (
        earmark("retag", tmp_path / "out", "-o", tmp_path / "new", "--threshold", 0.2).exit_code
        == 0
    )
    same(tables(tmp_path / "out"), tables(tmp_path / "new"))


# ---------------------------------------------------------------- stopped, and again

KILLED = """
import os, signal, sys
from transforms.output import LocalOutput
publish, done = LocalOutput.publish, []

def publish_or_die(self, file, name, **options):
    if name.startswith("clips/"):
        if len(done) == int(sys.argv[1]):
            os.kill(os.getpid(), signal.SIGKILL)
        done.append(name)
    return publish(self, file, name, **options)

LocalOutput.publish = publish_or_die
from pipeline.cli import cli
cli(sys.argv[2:])
"""


def test_killed_half_way_and_again_is_as_if_uninterrupted(tagged, tmp_path):
    asked = ("--threshold", "0.45")
    assert earmark("retag", tagged, "-o", tmp_path / "whole", *asked).exit_code == 0
    for done in range(3):
        arguments = ["retag", str(tagged), "-o", str(tmp_path / "cut"), *asked]
        command = [sys.executable, "-c", KILLED, str(min(done, 1)), *arguments]
        killed = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert killed.returncode == -signal.SIGKILL
        assert len(tables(tmp_path / "cut")) == done
        assert not (tmp_path / "cut" / "summary.json").exists()
        assert any((tmp_path / "cut" / "clips").glob(".*.partial"))
        finished = {
            file.name: file.stat().st_mtime_ns
            for file in (tmp_path / "cut" / "clips").glob("*.parquet")
        }
    last = earmark("retag", tagged, "-o", tmp_path / "cut", *asked)
    assert last.exit_code == 0 and "Retagged 1 shard in" in last.output
    assert "2 were finished earlier" in last.output
    same(tables(tmp_path / "whole"), tables(tmp_path / "cut"))
    assert making(tmp_path / "whole") == making(tmp_path / "cut")
    for name, changed_at in finished.items():
        assert (tmp_path / "cut" / "clips" / name).stat().st_mtime_ns == changed_at
    assert not any((tmp_path / "cut" / "clips").glob(".*"))
    totals = [
        json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "cut")
    ]
    for fact in ("clips", "tagged", "failed", "audio_s", "tags"):
        assert totals[0][fact] == totals[1][fact]
    again = earmark("retag", tagged, "-o", tmp_path / "cut", *asked)
    assert again.exit_code == 0 and "Retagged 0 shards" in again.output


def test_shards_that_came_later_are_added(tagged, annotate, tmp_path):
    """An output that was annotated in part when it was retagged."""
    shutil.copytree(tagged, tmp_path / "old")
    later = max((tmp_path / "old" / "clips").glob("*.parquet"))
    later.rename(tmp_path / "later.parquet")
    asked = ("retag", tmp_path / "old", "-o", tmp_path / "new", "--threshold", 0.2)
    assert earmark(*asked).exit_code == 0 and len(tables(tmp_path / "new")) == 2
    (tmp_path / "later.parquet").rename(later)
    assert "Retagged 1 shard in" in earmark(*asked).output
    same(tables(tagged), tables(tmp_path / "new"))


def test_annotate_goes_on_in_a_retagged_output_of_the_same_options(
    annotate, tagged, thresholds_file, tmp_path
):
    options = ("--chunks", "--embeddings")
    asked = ("--thresholds", thresholds_file)
    assert earmark("retag", tagged, "-o", tmp_path / "new", *asked).exit_code == 0
    whole = tables(tmp_path / "new")
    one = max((tmp_path / "new" / "clips").glob("*.parquet"))
    one.unlink()
    gone_on = annotate(tmp_path / "new", *options, *asked)
    assert gone_on.exit_code == 0, gone_on.output
    assert "2 of them finished earlier" in gone_on.output
    same(whole, tables(tmp_path / "new"))

    other = annotate(tmp_path / "new", *options)
    assert other.exit_code == 2 and "thresholds was" in other.output
    same(whole, tables(tmp_path / "new"))


# ------------------------------------------------------------------------- refused


def refused(*arguments, code=2):
    done = earmark("retag", *arguments)
    assert done.exit_code == code, done.output
    assert "Traceback" not in done.output
    return done.output


def test_an_output_of_another_making_is_refused(tagged, annotate, tmp_path):
    new = tmp_path / "new"
    assert earmark("retag", tagged, "-o", new, "--threshold", 0.5).exit_code == 0
    before = tables(new)
    assert "thresholds was 0.5, is 0.6" in refused(tagged, "-o", new, "--threshold", 0.6)
    assert "top_k was null, is 3" in refused(tagged, "-o", new, "--threshold", 0.5, "--top-k", 3)
    same(before, tables(new))
    # Made alike, and yet of other rows: another run's.
    assert annotate(tmp_path / "other", "--chunks", "--embeddings").exit_code == 0
    said = refused(tmp_path / "other", "-o", new, "--threshold", 0.5)
    assert f"retagged from {tagged}" in said and "--overwrite" in said
    said = refused(tagged, "-o", tmp_path / "other", "--threshold", 0.2)
    assert "made by earmark annotate" in said
    same(before, tables(new))
    (new / "notes.txt").write_text("mine")
    done = earmark("retag", tmp_path / "other", "-o", new, "--threshold", 0.7, "--overwrite")
    assert done.exit_code == 0 and making(new)[1]["thresholds"] == 0.7
    assert (new / "notes.txt").read_text() == "mine"


def test_what_cannot_be_retagged_is_said_and_leaves_no_trace(tagged, tmp_path, thresholds_file):
    new = tmp_path / "new"
    asked = ("-o", new, "--threshold", 0.5)
    assert "is OUTPUT itself" in refused(tagged, "-o", f"{tagged}/../out", "--threshold", 0.5)
    assert "holds no run.json" in refused(tmp_path, *asked)
    assert "Give --threshold T for all labels" in refused(tagged, "-o", new)
    assert "--threshold is nan, expected a score" in refused(
        tagged, "-o", new, "--threshold", "nan"
    )
    assert "give one" in refused(tagged, *asked, "--thresholds", thresholds_file)
    assert "--output is empty" in refused(tagged, "-o", "", "--threshold", 0.5)
    assert "cannot be read: No such file" in refused(tagged, "-o", new, "--thresholds", "no.json")
    assert "nothing here is there" in refused(tagged, *asked, "--kms-key", "k")
    assert "cannot be used" in refused(tagged, "-o", "odd://x/y", "--threshold", 0.5)
    (tmp_path / "bad.json").write_text("{,")
    said = refused(tagged, "-o", new, "--thresholds", tmp_path / "bad.json")
    assert "bad.json' is no JSON (Expecting" in said and "expected an object of label name" in said
    said = refused(tmp_path / "bad.json", "-o", new, "--threshold", 0.5)
    assert "bad.json' is a file; expected the folder that earmark annotate wrote" in said
    (tmp_path / "bad.json").write_text('{"Unicorn": 0.5}')
    said = refused(tagged, "-o", new, "--thresholds", tmp_path / "bad.json")
    assert "bad.json states a threshold for 'Unicorn', which is no label" in said
    assert not new.exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("scores", "has no column 'scores', without which tags cannot be recomputed"),
        ("labels", "labels.parquet is not there"),
        ("other labels", "has other labels than the run.json beside it"),
        ("garbage labels", "labels.parquet is damaged"),
        ("half", "has scores of type"),
        ("run", "run.json is damaged or no earmark annotate's"),
        ("nothing", "holds no finished shard"),
        ("no parquet", "none of the 3 files of"),
    ],
)
def test_an_output_that_lacks_something_is_said_and_leaves_no_trace(
    tagged, tmp_path, damage, message
):
    old = tmp_path / "old"
    shutil.copytree(tagged, old)
    first = min((old / "clips").glob("*.parquet"))
    table = pq.read_table(first)
    if damage == "scores":
        pq.write_table(table.drop_columns("scores"), first)
    elif damage == "half":
        kind = pa.list_(pa.float32(), 3)
        column = pa.array([[0.5] * 3] * table.num_rows, kind)
        pq.write_table(
            table.set_column(table.schema.get_field_index("scores"), "scores", column), first
        )
    elif damage == "labels":
        (old / "labels.parquet").unlink()
    elif damage == "other labels":
        labels = pq.read_table(old / "labels.parquet")
        pq.write_table(labels.slice(1), old / "labels.parquet")
    elif damage == "garbage labels":
        (old / "labels.parquet").write_bytes(b"PAR1")
    elif damage == "run":
        (old / "run.json").write_text('{"scoring": {}}')
    elif damage == "nothing":
        shutil.rmtree(old / "clips")
    else:
        for file in (old / "clips").glob("*.parquet"):
            file.write_bytes(b"nothing that can be read")
    assert message in refused(old, "-o", tmp_path / "new", "--threshold", 0.5)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("damage", ["garbage", "cut short", "no footer of ours", "rows", "making"])
@pytest.mark.parametrize("which", [0, 1])
def test_a_damaged_shard_is_named_and_the_others_are_done(tagged, tmp_path, damage, which):
    old, new = tmp_path / "old", tmp_path / "new"
    shutil.copytree(tagged, old)
    file = sorted((old / "clips").glob("*.parquet"))[which]
    whole = file.read_bytes()
    table, metadata = pq.read_table(file), pq.read_metadata(file).metadata
    if damage == "garbage":
        file.write_bytes(b"nothing that can be read")
    elif damage == "cut short":
        file.write_bytes(whole[: len(whole) // 2])
    elif damage == "rows":  # the footer is sound
        file.write_bytes(b"PAR1" + bytes(len(whole) * 3 // 4) + whole[4 + len(whole) * 3 // 4 :])
    else:
        with pq.ParquetWriter(file, table.schema.remove_metadata()) as writer:
            writer.write_table(table)
            other = json.loads(metadata[RUN_KEY]) | {"fingerprint": "another"}
            if damage == "making":
                writer.add_key_value_metadata(
                    {RUN_KEY: json.dumps(other), SHARD_KEY: metadata[SHARD_KEY]}
                )
    asked = (old, "-o", new, "--threshold", 0.5)
    said = refused(*asked)
    assert "1 of 3 shards could not be retagged" in said and "Retagged 2 shards in" in said
    reason = "is of another making than the run.json" if damage == "making" else "cannot be read ("
    assert f"{file} {reason}" in said
    assert len(tables(new)) == 2 and file.name not in tables(new)
    assert json.loads((new / "summary.json").read_text())["clips"] == 6
    assert "1 of 1 shard could not be retagged" in refused(*asked)

    file.write_bytes(whole)
    done = earmark("retag", *asked)
    assert done.exit_code == 0 and "Retagged 1 shard in" in done.output
    assert earmark("retag", tagged, "-o", tmp_path / "whole", "--threshold", 0.5).exit_code == 0
    same(tables(tmp_path / "whole"), tables(new))


def test_a_new_file_that_cannot_be_written_ends_it(tagged, tmp_path, monkeypatch):
    """It is not the source's fault, and so would be the next one's."""
    tried = []

    def full(self, file, name, **options):
        if name.startswith("clips/"):
            tried.append(name)
            raise OSError(28, "No space left on device")
        return publish(self, file, name, **options)

    publish = LocalOutput.publish
    monkeypatch.setattr(LocalOutput, "publish", full)
    said = refused(tagged, "-o", tmp_path / "new", "--threshold", 0.5, code=1)
    assert "No space left on device" in said and len(tried) < 3


def test_how_fast_tags_are_made_is_not_said_to_be_how_fast_clips_are_scored(tagged, tmp_path):
    assert earmark("retag", tagged, "-o", tmp_path / "new", "--threshold", 0.5).exit_code == 0
    summary = json.loads((tmp_path / "new" / "summary.json").read_text())
    assert (summary["clips"], summary["clips_this_run"], summary["clips_per_s"]) == (9, 0, 0)
    assert open_source(str(tagged)).clips_per_s > 0
    assert not open_source(str(tmp_path / "new")).clips_per_s


def test_an_output_that_was_begun_anew_receives_nothing_more(tagged, tmp_path):
    new = tmp_path / "new"
    old_job = prepare(RetagOptions(str(tagged), str(new), threshold=0.5))
    execute(prepare(RetagOptions(str(tagged), str(new), threshold=0.6, overwrite=True)))
    whole = tables(new)
    for file in (new / "clips").glob("*.parquet"):
        file.unlink()
    with pytest.raises(RuntimeError, match="another run has started"):
        execute(old_job)
    assert tables(new) == {}
    execute(prepare(RetagOptions(str(tagged), str(new), threshold=0.6)))
    same(whole, tables(new))


def test_thresholds_of_other_weights_are_used_with_a_warning(tagged, tmp_path, thresholds_file):
    stated = json.loads(thresholds_file.read_text())
    stated["fitted_on"]["weights_sha256"] = "0" * 64
    (tmp_path / "t.json").write_text(json.dumps(stated))
    asked = ("--thresholds", tmp_path / "t.json")
    done = earmark("retag", tagged, "-o", tmp_path / "new", *asked)
    assert done.exit_code == 0 and "fitted on scores of other weights" in done.output


def test_ctrl_c_ends_it_and_begins_no_other_shard(tagged, tmp_path, monkeypatch):
    publish, published = LocalOutput.publish, []

    def interrupted(self, file, name, **options):
        if name.startswith("clips/"):
            published.append(name)
            raise KeyboardInterrupt
        return publish(self, file, name, **options)

    monkeypatch.setattr(LocalOutput, "publish", interrupted)
    said = refused(tagged, "-o", tmp_path / "new", "--threshold", 0.5, code=130)
    assert "Stopped" in said and len(published) < 3


def test_neither_model_nor_torch_nor_beam_is_loaded(tagged, tmp_path):
    code = (
        "import sys; from pipeline.cli import cli\n"
        f"try: cli(['retag', {str(tagged)!r}, '-o', {str(tmp_path / 'new')!r}, '--threshold', '0.3'])\n"
        "except SystemExit as ended: assert ended.code == 0\n"
        "sys.exit(bool({'torch', 'apache_beam', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
    assert len(tables(tmp_path / "new")) == 3


# ----------------------------------------------------------------------- in a bucket


def test_from_bucket_to_bucket(tagged, tmp_path, lead_to):
    assert earmark("retag", tagged, "-o", tmp_path / "new", "--threshold", 0.5).exit_code == 0
    with CloudStorage("in", "out") as cloud:
        lead_to(cloud.env)
        for file in tagged.rglob("*"):
            if file.is_file():
                cloud.put("in", f"tags/{file.relative_to(tagged)}", file.read_bytes())
        cloud.faults = Faults(rate=0.1, kinds=("503", "reset", "short"), seed=1)
        asked = ("retag", "gs://in/tags", "-o", "gs://out/new", "--threshold", 0.5)
        done = earmark(*asked)
        assert done.exit_code == 0, done.output
        assert cloud.faults.counts  # requests failed, and were made again
        there = {
            name: pq.read_table(io.BytesIO(cloud.get("out", f"new/clips/{name}")))
            for name in tables(tagged)
        }
        same(
            tables(tmp_path / "new"),
            {name: table.replace_schema_metadata(None) for name, table in there.items()},
        )
        run = json.loads(cloud.get("out", "new/run.json"))
        assert run["retagged"]["from"]["output"] == "gs://in/tags"
        assert "Retagged 0 shards" in earmark(*asked).output
