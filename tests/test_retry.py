"""`earmark retry` and `annotate --refresh`: finished files that are replaced, in one step."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import xxhash
from click.testing import CliRunner

from bench.stand_ins import CloudStorage
from pipeline.cli import cli
from pipeline.verify import verify_output
from transforms import retry as transform
from transforms.output import LocalOutput
from transforms.records import Shard
from transforms.source import describe_source, what_changed
from transforms.write import ShardSummary, read_footer

ROOT = Path(__file__).parent.parent


def earmark(*arguments):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


@pytest.fixture
def inputs(tmp_path, make_tar, encoded, noise):
    """A tar with two clips that cannot be decoded, and a folder with one."""
    wavs = [encoded(noise(4_000 + 3_000 * n, seed=n)) for n in range(5)]
    folder = tmp_path / "inputs"
    folder.mkdir()
    make_tar(
        folder / "a.tar",
        [("one.wav", wavs[0]), ("two.wav", b"OggS"), ("three.wav", wavs[2]), ("four.wav", wavs[3][:60])],
    )  # fmt: skip
    for name, content in (("u.wav", wavs[3]), ("v.wav", b"nothing"), ("w.wav", wavs[4])):
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def annotate(inputs, tiny_checkpoint):
    def run(output, *options):
        return earmark("annotate", inputs, "-o", output, "--checkpoint", tiny_checkpoint, *options)

    return run


def repair(inputs, make_tar, encoded, noise):
    """The inputs as they should have been, clips that were fine byte for byte the same."""
    wavs = [encoded(noise(4_000 + 3_000 * n, seed=n)) for n in range(5)]
    names = ("one.wav", "two.wav", "three.wav", "four.wav")
    make_tar(inputs / "a.tar", zip(names, wavs, strict=False))
    (inputs / "v.wav").write_bytes(wavs[1])


def tables(output):
    files = sorted((Path(output) / "clips").glob("*.parquet"))
    return {file.name: pq.read_table(file).replace_schema_metadata(None) for file in files}


def bits(table):
    """All values, to the last bit of a float."""
    return repr(table.to_pylist())


def rows_by_id(output):
    found = {}
    for table in tables(output).values():
        for number, clip_id in enumerate(table["clip_id"].to_pylist()):
            found[clip_id] = table.slice(number, 1)
    return found


def test_failed_rows_are_done_once_more_and_the_others_stay_bit_for_bit(
    annotate, inputs, tmp_path, make_tar, encoded, noise, monkeypatch
):
    out = tmp_path / "out"
    assert annotate(out, "--chunks", "--embeddings").exit_code == 0
    before = rows_by_id(out)
    failed = {clip_id for clip_id, row in before.items() if row["error"][0].is_valid}
    assert {clip_id.rpartition("/")[2] for clip_id in failed} == {"two.wav", "four.wav", "v.wav"}

    done = earmark("retry", out)
    assert done.exit_code == 0, done.output
    assert (
        "Tried 3 failed rows of 2 shards once more: 0 got scores. Of all 7 clips 3 failed."
        in done.output
    )
    assert {i: bits(row) for i, row in rows_by_id(out).items()} == {
        i: bits(r) for i, r in before.items()
    }

    repair(inputs, make_tar, encoded, noise)
    files = {file: file.stat().st_ino for file in (out / "clips").glob("*.parquet")}
    done = earmark("retry", out)
    assert done.exit_code == 0, done.output
    assert "3 got scores. Of all 7 clips 0 failed." in done.output
    assert all(file.stat().st_ino != number for file, number in files.items())
    after = rows_by_id(out)
    assert list(after) == list(before)  # the order too
    for clip_id in before.keys() - failed:
        assert bits(after[clip_id]) == bits(before[clip_id])
    assert annotate(tmp_path / "anew", "--chunks", "--embeddings").exit_code == 0
    for clip_id, row in rows_by_id(tmp_path / "anew").items():
        ours = after[clip_id]
        assert ours["scores"].to_pylist()[0] == pytest.approx(
            row["scores"].to_pylist()[0], abs=1e-5
        )
        for column in ("duration_s", "audio_xxh128", "codec", "member", "shard", "error"):
            assert ours[column].equals(row[column])
    assert verify_output(str(out), audio=True).named == {}
    assert earmark("retry", out).output == "No row has an error.\n"
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["clips"], summary["failed"], summary["failures"]) == (7, 0, {})
    # The files' sources are those that were read last: nothing has changed since.
    assert "changed since" not in annotate(out, "--chunks", "--embeddings").output


def test_some_kinds_of_failures_alone(annotate, inputs, tmp_path, make_tar, encoded, noise):
    out = tmp_path / "out"
    assert annotate(out).exit_code == 0
    kinds = Counter(row["error"][0].as_py()["type"] for row in rows_by_id(out).values() if row["error"][0].is_valid)  # fmt: skip
    assert len(kinds) > 1 or kinds.total() == 3
    nothing = earmark("retry", out, "--type", "TimedOut", "--stage", "decode")
    assert nothing.exit_code == 0 and "No row failed so: decode/" in nothing.output
    assert earmark("retry", out, "--stage", "read").output.startswith("No row failed so")
    done = earmark("retry", out, "--stage", "decode", "--type", next(iter(kinds)))
    assert f"Tried {kinds[next(iter(kinds))]} failed row" in done.output


def test_what_cannot_be_vouched_for_stays(
    annotate, inputs, tmp_path, make_tar, encoded, noise, caplog
):
    out = tmp_path / "out"
    assert annotate(out).exit_code == 0
    before = tables(out)
    make_tar(inputs / "a.tar", [("one.wav", encoded(noise(4_000, seed=77))), ("two.wav", b"OggS")])
    done = earmark("retry", out)
    assert done.exit_code == 1 and "1 shard left unchanged" in done.output
    assert "has other bytes for" in caplog.text and "one.wav" in caplog.text
    after = tables(out)
    name = next(name for name in before if name.startswith("a-"))
    assert bits(before[name]) == bits(after[name])
    make_tar(inputs / "a.tar", [("one.wav", encoded(noise(4_000, seed=0)))])
    caplog.clear()
    assert earmark("retry", out).exit_code == 1
    assert "three.wav' any more" in caplog.text


def test_a_tar_whose_end_comes_later(tmp_path, make_tar, encoded, noise, tiny_checkpoint):
    """The clips behind a break get rows, and the row that told of it goes."""
    wavs = [encoded(noise(5_000, seed=n)) for n in range(4)]
    tar = make_tar(tmp_path / "a.tar", [(f"{n}.wav", wav) for n, wav in enumerate(wavs)])
    whole = tar.read_bytes()
    tar.write_bytes(whole[: 3 * 10_752])
    out = tmp_path / "out"
    assert earmark("annotate", tar, "-o", out, "--checkpoint", tiny_checkpoint).exit_code == 0
    assert sum(row["error"][0].is_valid for row in rows_by_id(out).values()) == 1
    first = bits(next(iter(rows_by_id(out).values())))
    tar.write_bytes(whole)
    assert earmark("retry", out, "--type", "BrokenShard").exit_code == 0
    rows = rows_by_id(out)
    assert [clip_id.rpartition("/")[2] for clip_id in rows] == [f"{n}.wav" for n in range(4)]
    assert bits(rows[next(iter(rows))]) == first
    assert verify_output(str(out), audio=True).named == {}


def test_row_groups_of_old_and_new_rows(
    annotate, inputs, tmp_path, make_tar, encoded, noise, monkeypatch
):
    monkeypatch.setattr("transforms.write.ROWS_PER_GROUP", 2)
    out = tmp_path / "out"
    assert annotate(out).exit_code == 0
    before = rows_by_id(out)
    monkeypatch.setattr(transform, "ROWS_PER_GROUP", 3)
    repair(inputs, make_tar, encoded, noise)
    assert earmark("retry", out, "--type", "InvalidDataError").exit_code == 0
    after = rows_by_id(out)
    assert list(before) == list(after)
    for clip_id, row in before.items():
        if not row["error"][0].is_valid:
            assert bits(row) == bits(after[clip_id])
    assert verify_output(str(out)).named == {}


def test_other_weights_are_refused(annotate, inputs, tmp_path, make_checkpoint, tiny_checkpoint):
    out = tmp_path / "out"
    assert annotate(out).exit_code == 0
    done = earmark("retry", out, "--checkpoint", "bundled")
    assert done.exit_code == 2, done.output
    assert "weights_sha256 was" in done.output and "name the same checkpoint" in done.output
    # Where it is does not matter.
    run = json.loads((out / "run.json").read_text())
    run["checkpoint"]["name"] = str(tmp_path / "gone")
    (out / "run.json").write_text(json.dumps(run))
    assert earmark("retry", out).exit_code == 2
    assert earmark("retry", out, "--checkpoint", tiny_checkpoint).exit_code == 0


def test_options_and_thresholds_are_those_of_the_output(
    annotate, inputs, tmp_path, make_tar, encoded, noise
):
    out = tmp_path / "out"
    options = (
        "--threshold",
        0.7,
        "--top-k",
        3,
        "--pool",
        "mean",
        "--score-type",
        "float16",
        "--limit",
        6,
    )
    assert annotate(out, *options).exit_code == 0
    repair(inputs, make_tar, encoded, noise)
    done = earmark("retry", out)
    assert done.exit_code == 0, done.output
    assert annotate(tmp_path / "anew", *options).exit_code == 0
    ours, theirs = rows_by_id(out), rows_by_id(tmp_path / "anew")
    assert len(ours) == 6 and list(ours) == list(theirs)
    for clip_id, row in theirs.items():
        names = [[tag["name"] for tag in r["tags"].to_pylist()[0]] for r in (row, ours[clip_id])]
        assert names[0] == names[1] and len(names[0]) <= 3
    assert verify_output(str(out)).named == {}


def test_inputs_that_moved(annotate, inputs, tmp_path):
    out = tmp_path / "out"
    assert annotate(out).exit_code == 0
    inputs.rename(tmp_path / "moved")
    assert earmark("retry", out).exit_code == 2
    done = earmark("retry", out, tmp_path / "moved")  # other places, so other shards
    assert (
        done.exit_code == 1 and "2 shards with failed rows are not among the inputs" in done.output
    )


KILLED = """
import os, signal, sys
from pathlib import Path

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

if sys.argv[1] == "before":
    import transforms.output as output
    output.LocalOutput._replace = die
else:
    of_path = Path.replace
    def replace_and_die(self, target):
        found = of_path(self, target)
        if "/clips/" in str(target):
            die()
        return found
    Path.replace = replace_and_die
from pipeline.cli import cli
cli(sys.argv[2:])
"""


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_kill_leaves_the_old_file_or_the_new_one(
    annotate, inputs, tmp_path, make_tar, encoded, noise, moment
):
    out = tmp_path / "out"
    assert annotate(out).exit_code == 0
    old = {name: bits(table) for name, table in tables(out).items()}
    repair(inputs, make_tar, encoded, noise)
    command = [sys.executable, "-c", KILLED, moment, "retry", str(out)]
    killed = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert killed.returncode == -signal.SIGKILL
    changed = sum(bits(table) != old[name] for name, table in tables(out).items())
    assert changed == (moment == "after")
    assert earmark("retry", out).exit_code == 0
    assert verify_output(str(out), audio=True).named == {}
    assert not any((out / "clips").glob(".*"))


def test_a_file_that_another_replaced_is_not_replaced_again(tmp_path):
    output = LocalOutput(str(tmp_path))
    (tmp_path / "f").write_text("old")
    version = output.version("f")
    with output.scratch("f") as scratch:
        scratch.write_text("mine")
        (tmp_path / "g").write_text("theirs")
        (tmp_path / "g").rename(tmp_path / "f")
        assert not output.publish(scratch, "f", replace=version)
    assert (tmp_path / "f").read_text() == "theirs"
    assert output.version("nothing") is None
    with output.scratch("f") as scratch:
        scratch.write_text("mine")
        assert output.publish(scratch, "f", replace=output.version("f"))
    assert (tmp_path / "f").read_text() == "mine"


def test_retry_in_the_cloud_replaces_one_generation(
    tmp_path, inputs, make_tar, encoded, noise, earmark
):
    with CloudStorage("in", "out") as cloud:
        cloud.put("in", "a.tar", (inputs / "a.tar").read_bytes())
        earmark(cloud.env, "annotate", "gs://in/", "--output", "gs://out/o")
        repair(inputs, make_tar, encoded, noise)
        cloud.put("in", "a.tar", (inputs / "a.tar").read_bytes())
        said = earmark(cloud.env, "annotate", "gs://in/", "--output", "gs://out/o")
        assert "1 finished shard changed since: gs://in/a.tar" in said
        cloud.requests.clear()
        said = earmark(cloud.env, "retry", "gs://out/o")
        assert "2 got scores" in said
        matched = [r.query.get("ifGenerationMatch") for r in cloud.requests if r.kind == "write"]
        assert [int(generation) > 0 for generation in matched if generation] == [True]
        assert "each clip of the inputs once" in earmark(
            cloud.env, "verify", "gs://out/o", "--audio"
        )


# ---------------------------------------------------------------- inputs that change


def test_a_changed_input_is_said_and_done_anew_when_asked(
    annotate, inputs, tmp_path, make_tar, encoded, noise
):
    out = tmp_path / "out"
    assert annotate(out).exit_code == 0
    before = {name: bits(table) for name, table in tables(out).items()}
    wav = encoded(noise(9_000, seed=9))
    make_tar(inputs / "a.tar", [("one.wav", wav), ("five.wav", wav)])
    (inputs / "w.wav").write_bytes(wav)
    done = annotate(out)
    assert done.exit_code == 0, done.output
    assert "2 finished shards changed since" in done.output
    assert f"{inputs / 'a.tar'} (" in done.output and "1 of 3 files: w.wav" in done.output
    assert "--refresh does them anew" in done.output
    assert {name: bits(table) for name, table in tables(out).items()} == before
    assert "missing clip" in verify_output(str(out)).named

    done = annotate(out, "--refresh")
    assert done.exit_code == 0 and "They are done anew" in done.output
    assert verify_output(str(out), audio=True).named == {}
    assert annotate(tmp_path / "anew").exit_code == 0
    ours, theirs = tables(out), tables(tmp_path / "anew")
    assert {n: bits(t) for n, t in ours.items()} == {n: bits(t) for n, t in theirs.items()}
    summary = json.loads((out / "summary.json").read_text())
    assert summary["clips"] == summary["clips_this_run"] == 5
    again = annotate(out, "--refresh")
    assert "Nothing left to do" in again.output and "changed since" not in again.output


def test_the_same_size_and_another_time_is_a_change(annotate, inputs, tmp_path):
    out = tmp_path / "out"
    assert annotate(out).exit_code == 0
    os.utime(inputs / "a.tar", (1, 1))
    done = annotate(out)
    assert "a.tar (the same size, another modification time)" in done.output
    assert "w.wav" not in done.output


def test_metadata_beside_files_that_changed_is_a_change(annotate, inputs, tmp_path):
    out = tmp_path / "out"
    (inputs / "metadata.csv").write_text("file_name,who\nu.wav,me\n")
    assert annotate(out).exit_code == 0
    assert "changed" not in annotate(out).output
    (inputs / "metadata.csv").write_text("file_name,who\nu.wav,you\n")
    assert "1 of 3 files: u.wav" in annotate(out).output
    assert annotate(out, "--refresh").exit_code == 0
    (table,) = (table for name, table in tables(out).items() if name.startswith("inputs-"))
    told = dict(zip(table["member"].to_pylist(), table["metadata"].to_pylist(), strict=True))
    assert json.loads(told["u.wav"]) == {"who": "you"}
    assert "changed" not in annotate(out).output
    plain = Shard("f", "f", "files", 5, ("a.wav",), file_sizes=(5,), file_checksums=("mtime:1",))
    assert describe_source(plain)["files"] == [xxhash.xxh32_hexdigest(b"5 mtime:1")]


def test_many_finished_shards_are_looked_at_when_asked(annotate, inputs, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert annotate(out).exit_code == 0
    (inputs / "w.wav").touch()
    monkeypatch.setattr("pipeline.run._LOOKED_AT", 1)
    done = annotate(out)
    assert "changed since:" not in done.output and "for more with --refresh" in done.output
    assert "1 finished shard changed since" in annotate(out, "--refresh").output


def test_files_that_do_not_say_what_their_source_was_are_not_complained_of(
    annotate, inputs, tmp_path
):
    out = tmp_path / "out"
    assert annotate(out).exit_code == 0
    for file in (out / "clips").glob("*.parquet"):
        metadata = pq.read_metadata(file).metadata
        table = pq.read_table(file).replace_schema_metadata(None)
        with pq.ParquetWriter(file, table.schema) as writer:
            writer.write_table(table)
            writer.add_key_value_metadata(
                {key: metadata[key] for key in (b"earmark.run", b"earmark.shard")}
            )
        assert read_footer(LocalOutput(str(out)), f"clips/{file.name}").source is None
    (inputs / "w.wav").touch()
    done = annotate(out)
    assert done.exit_code == 0 and "changed" not in done.output
    assert "changed" not in annotate(out, "--refresh").output


def test_what_a_source_says_and_what_is_a_change():
    tar = Shard("a", "gs://b/a.tar", "tar", 9, checksum="4waSgw==")
    assert describe_source(tar) == {
        "uri": "gs://b/a.tar",
        "size_bytes": 9,
        "version": "crc32c:4waSgw==",
    }
    recorded = describe_source(tar)
    assert what_changed(recorded, tar) is None
    assert (
        what_changed(recorded, Shard("a", "gs://b/a.tar", "tar", 10, checksum="x"))
        == "9 bytes, now 10"
    )
    other = Shard("a", "gs://b/a.tar", "tar", 9, checksum="x")
    assert what_changed(recorded, other) == "the same size, another crc32c"
    # A file system that shows nothing, or something else, is no change.
    for checksum in (None, "mtime:1", "etag:1"):
        assert (
            what_changed(recorded, Shard("a", "gs://b/a.tar", "tar", 9, checksum=checksum)) is None
        )
    part = Shard(
        "p", "p.parquet", "parquet", 5, row_groups=(0, 1), file_sizes=(50,), checksum="mtime:1"
    )
    assert describe_source(part)["size_bytes"] == 50


def test_retries_are_counted_by_what_failed():
    summary = ShardSummary(failures=Counter({"decode/TimedOut": 2, "read/Link": 3, "decode/X": 5}))
    assert transform.Retry().count(summary) == 10
    assert transform.Retry(stages=("decode",)).count(summary) == 7
    assert transform.Retry(stages=("decode",), types=("TimedOut", "Link")).count(summary) == 2
