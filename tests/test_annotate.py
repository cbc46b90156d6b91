"""`earmark annotate` from shards to Parquet, as a user runs it."""

import contextlib
import hashlib
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
import xxhash
from click.testing import CliRunner

from pipeline import run as running
from pipeline.cli import cli
from pipeline.devices import processor_of
from pipeline.options import AnnotateOptions, UsageError
from student import CheckpointError, model
from student.engine import choose_kernel
from student.labels import audioset_labels
from transforms import annotate as annotate_module
from transforms.annotate import (
    Annotation,
    Students,
    Waits,
    annotate_shard,
    check_claim,
    check_versions,
    load_student,
)
from transforms.meter import Meter
from transforms.output import LocalOutput
from transforms.progress import ProgressFile
from transforms.write import RUN_KEY, RowOptions, read_summary

ROOT = Path(__file__).parent.parent


@pytest.fixture
def annotate(tiny_checkpoint):
    """Runs `earmark annotate` in this process with the tiny student."""

    def run(*arguments):
        command = ["annotate", *map(str, arguments)]
        if "--checkpoint" not in command:
            command += ["--checkpoint", str(tiny_checkpoint)]
        return CliRunner().invoke(cli, command)

    return run


@pytest.fixture(scope="module")
def shards(tmp_path_factory, make_tar, encoded, noise):
    """Two tars: clips of several lengths and codecs with metadata, one of them broken."""
    folder = tmp_path_factory.mktemp("shards")
    make_tar(
        folder / "a.tar",
        [
            ("short.wav", encoded(noise(8_000, seed=1))),
            ("short.json", b'{"station": "north", "n": 1}'),
            ("long.flac", encoded(noise(16_000 * 5, seed=2), format="flac")),
            ("long.txt", b"five seconds"),
            ("broken.ogg", b"OggS, but no more than that"),
        ],
    )
    make_tar(
        folder / "b.tar",
        [
            ("stereo.wav", encoded(noise((44_100, 2), seed=3), 44_100)),
            ("quiet.wav", encoded(np.zeros(16_000, np.float32))),
        ],
    )
    return folder


def rows_of(output):
    files = sorted((Path(output) / "clips").glob("*.parquet"))
    return pa.concat_tables(pq.read_table(file) for file in files).sort_by("clip_id").to_pylist()


def test_one_clip_in_one_row_out(annotate, shards, tmp_path, tiny_student, encoded, noise):
    result = annotate(shards, "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    rows = {row["member"]: row for row in rows_of(tmp_path / "out")}
    assert sorted(rows) == ["broken.ogg", "long.flac", "quiet.wav", "short.wav", "stereo.wav"]

    short = rows["short.wav"]
    assert short["shard"] == str(shards / "a.tar")
    assert (short["duration_s"], short["sample_rate"], short["channels"]) == (0.5, 16_000, 1)
    assert short["codec"] == "pcm_s16le"
    assert short["audio_xxh128"] == xxhash.xxh128_hexdigest(encoded(noise(8_000, seed=1)))
    assert json.loads(short["metadata"]) == {"station": "north", "n": 1}
    assert short["error"] is None
    waveform, _ = soundfile.read(io.BytesIO(encoded(noise(8_000, seed=1))), dtype="float32")
    expected = tiny_student.score([waveform])[0]
    np.testing.assert_allclose(short["scores"], expected, atol=1e-5)
    assert [tag["index"] for tag in short["tags"]] == [
        int(index) for index in np.argsort(-expected, kind="stable") if expected[index] >= 0.2
    ]
    assert short["tags"][0]["name"] == audioset_labels()[short["tags"][0]["index"]].name

    assert json.loads(rows["long.flac"]["metadata"]) == {"txt": "five seconds"}
    assert (rows["stereo.wav"]["channels"], rows["stereo.wav"]["sample_rate"]) == (2, 44_100)
    assert rows["quiet.wav"]["peak_dbfs"] == -np.inf

    broken = rows["broken.ogg"]
    assert broken["error"]["stage"] == "decode"
    assert broken["audio_xxh128"] == xxhash.xxh128_hexdigest(b"OggS, but no more than that")
    assert set(broken["scores"]) == {None}
    unknown = ("tags", "duration_s", "sample_rate", "channels", "codec", "peak_dbfs", "metadata")
    assert [broken[column] for column in unknown] == [None] * len(unknown)


def test_what_stands_beside_the_clips(annotate, shards, tmp_path, tiny_checkpoint):
    assert annotate(shards, "--output", tmp_path / "out", "--threshold", 0.7).exit_code == 0
    output = tmp_path / "out"
    assert sorted(path.name for path in output.iterdir()) == [
        "clips", "labels.parquet", "run.json", "summary.json",
    ]  # fmt: skip

    labels = pq.read_table(output / "labels.parquet").to_pylist()
    assert [label["name"] for label in labels] == [label.name for label in audioset_labels()]
    dog = next(label for label in labels if label["name"] == "Dog")
    assert dog["mid"] == "/m/0bt9lr" and dog["threshold"] == np.float32(0.7)
    assert dog["parents"] == ["Domestic animals, pets"]
    assert dog["ancestors"] == ["Domestic animals, pets", "Animal"]

    run = json.loads((output / "run.json").read_text())
    weights = (tiny_checkpoint / "model.safetensors").read_bytes()
    assert run["checkpoint"]["weights_sha256"] == hashlib.sha256(weights).hexdigest()
    assert run["scoring"]["chunk_samples"] == 128 * 160
    assert run["thresholds"]["Dog"] == 0.7
    assert run["computed_by"] == {
        "device": "cpu",
        "processor": processor_of(torch.device("cpu")),
        "kernel": choose_kernel(torch.device("cpu"), hidden_size=32),
    }
    files = sorted((output / "clips").iterdir())
    assert [file.name.rsplit("-", 1)[0] for file in files] == ["a", "b"]
    for file in files:
        assert json.loads(pq.read_metadata(file).metadata[RUN_KEY]) == run

    summary = json.loads((output / "summary.json").read_text())
    assert (summary["clips"], summary["tagged"], summary["failed"]) == (5, 4, 1)
    assert summary["failures"] == {"decode": {"InvalidDataError": 1}}
    assert summary["audio_s"] == pytest.approx(0.5 + 5 + 1 + 1)
    assert summary["clips_per_s"] == pytest.approx(5 / summary["wall_s"], rel=0.01)
    tags = duckdb.sql(
        f"SELECT t.name, count(*) FROM '{output}/clips/*.parquet', unnest(tags) AS u(t) GROUP BY 1"
    ).fetchall()
    assert dict(tags) == summary["tags"]


def test_a_second_run_reads_no_finished_shard(annotate, tmp_path, make_tar, encoded, noise):
    (tmp_path / "in").mkdir()
    tar = make_tar(tmp_path / "in" / "a.tar", [("a.wav", encoded(noise(8_000)))])
    assert annotate(tmp_path / "in", "--output", tmp_path / "out").exit_code == 0
    file = next((tmp_path / "out" / "clips").iterdir())
    before = (file.stat().st_mtime_ns, file.read_bytes())

    make_tar(tmp_path / "in" / "b.tar", [("b.wav", encoded(noise(9_000)))])
    tar.write_bytes(b"no tar any more: reading it would give an error row")
    result = annotate(tmp_path / "in", "--output", tmp_path / "out")
    assert result.exit_code == 0
    assert (file.stat().st_mtime_ns, file.read_bytes()) == before
    assert [row["member"] for row in rows_of(tmp_path / "out")] == ["a.wav", "b.wav"]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["clips"], summary["clips_this_run"]) == (2, 1)

    assert "Nothing left to do" in annotate(tmp_path / "in", "-o", tmp_path / "out").output


@pytest.mark.parametrize(
    ("option", "difference"),
    [
        (["--threshold", "0.5"], "thresholds was 0.2, is 0.5"),
        (["--pool", "mean"], 'pool was "max", is "mean"'),
        (["--top-k", "3"], "top_k was null, is 3"),
        (["--chunks"], "chunks was false, is true"),
        (["--limit", "1"], "limit was null, is 1"),
        (["--chunk-hop-s", "0.5"], "chunk_hop_samples was null, is 8000"),
        (["--pad", "repeat"], 'pad was null, is "repeat"'),
        (["--segments"], "segments was null, is true"),
        (["--checkpoint", "bundled"], "weights_sha256 was"),
    ],
)
def test_an_output_of_another_making_is_refused(annotate, shards, tmp_path, option, difference):
    assert annotate(shards, "--output", tmp_path / "out").exit_code == 0
    before = rows_of(tmp_path / "out")
    result = annotate(shards, "--output", tmp_path / "out", *option)
    assert result.exit_code == 2
    assert difference in result.output and "--overwrite" in result.output
    assert rows_of(tmp_path / "out") == before


def test_the_same_weights_in_another_architecture_are_refused(
    annotate, shards, tmp_path, tiny_checkpoint
):
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, checkpoint)
    arguments = (shards, "--output", tmp_path / "out", "--checkpoint", checkpoint)
    assert annotate(*arguments).exit_code == 0
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"num_attention_heads": 4}))
    result = annotate(*arguments)
    assert result.exit_code == 2 and "config_sha256 was" in result.output


def test_a_run_whose_output_was_started_anew_publishes_nothing_more(tmp_path):
    with pytest.raises(RuntimeError, match="another run has started"):
        check_claim(LocalOutput(tmp_path), '{"id": "ours"}')  # emptied
    (tmp_path / "run.json").write_text('{"id": "theirs"}')
    with pytest.raises(RuntimeError, match="another run has started"):
        check_claim(LocalOutput(tmp_path), '{"id": "ours"}')
    check_claim(LocalOutput(tmp_path), '{"id": "theirs"}')


def test_overwrite_starts_anew_and_spares_what_is_not_earmarks(annotate, shards, tmp_path):
    output = tmp_path / "out"
    assert annotate(shards / "a.tar", "--output", output).exit_code == 0
    (output / "notes.txt").write_text("mine")
    result = annotate(shards / "b.tar", "--output", output, "--overwrite", "--threshold", "0.9")
    assert result.exit_code == 0
    assert [row["member"] for row in rows_of(output)] == ["quiet.wav", "stereo.wav"]
    assert (output / "notes.txt").read_text() == "mine"


def test_a_foreign_clips_folder_is_refused(annotate, shards, tmp_path):
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "mine.parquet").write_text("mine")
    result = annotate(shards, "--output", tmp_path, "--overwrite")
    assert result.exit_code == 2 and "earmark did not make" in result.output
    assert (tmp_path / "clips" / "mine.parquet").read_text() == "mine"


def test_a_folder_that_changed_is_refused_rather_than_doubled(annotate, tmp_path, encoded, noise):
    source = tmp_path / "in"
    source.mkdir()
    for name in "bcd":
        (source / f"{name}.wav").write_bytes(encoded(noise(8_000)))
    arguments = (source, "--output", tmp_path / "out", "--files-per-shard", 2)
    assert annotate(*arguments).exit_code == 0
    (source / "a.wav").write_bytes(encoded(noise(8_000)))
    result = annotate(*arguments)
    assert result.exit_code == 2 and "twice" in result.output
    assert annotate(*arguments, "--overwrite").exit_code == 0
    assert [row["member"] for row in rows_of(tmp_path / "out")] == [f"{n}.wav" for n in "abcd"]


def test_chunks_embeddings_top_k_and_half_precision(annotate, shards, tmp_path, tiny_student):
    options = ("--chunks", "--embeddings", "--top-k", 2, "--score-type", "float16")
    assert annotate(shards / "a.tar", "--output", tmp_path, *options).exit_code == 0
    rows = {row["member"]: row for row in rows_of(tmp_path)}
    long = rows["long.flac"]
    # 5 s in chunks of 1.28 s: three full ones and a last one that ends with the clip
    spans = [(round(c["start_s"], 6), round(c["end_s"], 6)) for c in long["chunks"]]
    assert spans == [(0.0, 1.28), (1.28, 2.56), (2.56, 3.84), (3.72, 5.0)]
    pooled = np.max([chunk["scores"] for chunk in long["chunks"]], axis=0)
    np.testing.assert_array_equal(np.array(long["scores"], np.float32), pooled.astype(np.float32))
    assert len(long["tags"]) == 2
    assert len(long["embedding"]) == tiny_student.embedding_size
    schema = pq.read_schema(next((tmp_path / "clips").iterdir()))
    assert schema.field("scores").type == pa.list_(pa.float16(), 527)
    assert rows["broken.ogg"]["chunks"] is None and set(rows["broken.ogg"]["embedding"]) == {None}


@pytest.mark.parametrize("decoding", [0, 1])
def test_overlapping_chunks_and_segments(
    annotate, shards, tmp_path, tiny_student, noise, encoded, decoding
):
    options = ("--chunk-hop-s", 0.5, "--chunks", "--segments", "--threshold", 0.7)
    done = annotate(
        shards / "a.tar", "--output", tmp_path, *options, "--decode-processes", decoding
    )
    assert done.exit_code == 0, done.output
    rows = {row["member"]: row for row in rows_of(tmp_path)}
    long = rows["long.flac"]
    spans = [(chunk["start_s"], chunk["end_s"]) for chunk in long["chunks"]]
    starts = [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 3.72]
    assert np.array(spans) == pytest.approx(np.array([(s, s + 1.28) for s in starts]))
    waveform, _ = soundfile.read(
        io.BytesIO(encoded(noise(16_000 * 5, seed=2), format="flac")), dtype="float32"
    )
    pieces = [waveform[round(start * 16_000) : round(end * 16_000)] for start, end in spans]
    np.testing.assert_allclose(
        [chunk["scores"] for chunk in long["chunks"]], tiny_student.score(pieces), atol=1e-5
    )
    for row in rows.values():
        if row["error"] is not None:
            assert row["segments"] is None
            continue
        expected = []
        for label in tiny_student.labels:
            for chunk in row["chunks"]:
                score = chunk["scores"][label.index]
                if score < np.float32(0.7):
                    continue
                last = expected[-1] if expected else None
                if last and last["index"] == label.index and chunk["start_s"] <= last["end_s"]:
                    last["end_s"], last["score"] = chunk["end_s"], max(last["score"], score)
                else:
                    expected.append(
                        {"index": label.index, "mid": label.mid, "name": label.name,
                         "start_s": chunk["start_s"], "end_s": chunk["end_s"], "score": score}
                    )  # fmt: skip
        expected.sort(key=lambda segment: (segment["start_s"], segment["index"]))
        assert row["segments"] == expected
        # With the maximum over chunks the tags are the labels that have segments.
        assert {s["index"] for s in row["segments"]} == {tag["index"] for tag in row["tags"]}
    several = Counter(segment["index"] for segment in long["segments"])
    assert max(several.values()) > 1 and len(rows["short.wav"]["segments"]) > 0


def test_segments_need_no_chunks_in_the_output(annotate, shards, tmp_path):
    for name, options in [("with", ("--chunks",)), ("without", ())]:
        asked = (shards / "a.tar", "--output", tmp_path / name, "--segments", "--threshold", 0.7)
        assert annotate(*asked, *options).exit_code == 0
    without = rows_of(tmp_path / "without")
    assert "chunks" not in without[0]
    assert [row["segments"] for row in without] == [
        row["segments"] for row in rows_of(tmp_path / "with")
    ]


def test_a_short_clip_is_repeated_where_that_was_asked(annotate, shards, tmp_path, tiny_student):
    scores = {}
    for pad in ("zero", "repeat"):
        asked = (shards / "a.tar", "--output", tmp_path / pad, "--pad", pad)
        assert annotate(*asked).exit_code == 0
        scores[pad] = {row["member"]: row["scores"] for row in rows_of(tmp_path / pad)}
    assert scores["zero"]["long.flac"] == scores["repeat"]["long.flac"]
    apart = np.abs(np.subtract(scores["zero"]["short.wav"], scores["repeat"]["short.wav"]))
    assert apart.max() > 0.01


def test_mean_pooling_is_the_mean_of_the_chunks(annotate, shards, tmp_path):
    options = ("--chunks", "--pool", "mean")
    assert annotate(shards / "a.tar", "--output", tmp_path, *options).exit_code == 0
    long = next(row for row in rows_of(tmp_path) if row["member"] == "long.flac")
    expected = np.mean([chunk["scores"] for chunk in long["chunks"]], axis=0)
    np.testing.assert_allclose(long["scores"], expected, rtol=1e-5)


def test_that_nothing_was_tagged_is_said(annotate, shards, tmp_path):
    done = annotate(shards, "--output", tmp_path, "--threshold", 1)
    assert done.exit_code == 0
    assert "No score reached its threshold, so that no clip has a tag" in done.output


def test_limit_takes_the_first_clips(annotate, shards, tmp_path):
    assert annotate(shards, "--output", tmp_path, "--limit", 4).exit_code == 0
    assert [row["member"] for row in rows_of(tmp_path)] == [
        "broken.ogg", "long.flac", "short.wav", "stereo.wav",
    ]  # fmt: skip


def test_parquet_and_folder_give_the_same_scores_as_the_tar(
    annotate, tmp_path, make_tar, encoded, noise
):
    audio = {f"{n}.wav": encoded(noise(10_000 + 5_000 * n, seed=n)) for n in range(3)}
    make_tar(tmp_path / "clips.tar", audio.items())
    (tmp_path / "folder" / "sub").mkdir(parents=True)
    for name, content in audio.items():
        (tmp_path / "folder" / "sub" / name).write_bytes(content)
    cells = [{"bytes": content, "path": name} for name, content in audio.items()]
    table = pa.table({"audio": cells, "speaker": ["x", "y", "z"]})
    pq.write_table(table, tmp_path / "clips.parquet")

    scores = {}
    for source in ("clips.tar", "folder", "clips.parquet"):
        output = tmp_path / f"out-{source}"
        assert annotate(tmp_path / source, "--output", output).exit_code == 0
        rows = rows_of(output)
        scores[source] = {Path(row["member"]).name: row["scores"] for row in rows}
        metadata = [json.loads(row["metadata"]) for row in rows if row["metadata"]]
        expected = [{"speaker": s} for s in "xyz"] if source == "clips.parquet" else []
        assert metadata == expected
    assert scores["clips.tar"] == scores["folder"] == scores["clips.parquet"]
    assert sorted(scores["folder"]) == sorted(audio)


def test_a_truncated_shard_gives_the_rows_before_the_break_and_one_that_says_where(
    annotate, tmp_path, make_tar, encoded, noise
):
    tar = make_tar(tmp_path / "a.tar", [(f"{n}.wav", encoded(noise(8_000))) for n in range(4)])
    tar.write_bytes(tar.read_bytes()[:40_000])  # in the third of four 16 kB members
    assert annotate(tar, "--output", tmp_path / "out").exit_code == 0
    rows = rows_of(tmp_path / "out")
    assert [(row["member"], row["error"] is None) for row in rows] == [
        ("0.wav", True), ("1.wav", True), ("2.wav", False),
    ]  # fmt: skip
    assert rows[2]["error"] == {
        "stage": "read",
        "type": "BrokenShard",
        "message": "the tar is broken inside member 3: it ends inside a member",
    }


def test_too_many_failures_exit_with_1_after_all_is_written(
    annotate, tmp_path, make_tar, encoded, noise
):
    tar = make_tar(
        tmp_path / "a.tar",
        [("good.wav", encoded(noise(8_000))), ("bad.wav", b"no"), ("worse.wav", b"")],
    )
    result = annotate(tar, "--output", tmp_path / "out")
    assert result.exit_code == 1
    assert "2 of 3 clips failed" in result.output
    assert len(rows_of(tmp_path / "out")) == 3
    assert annotate(tar, "--output", tmp_path / "out", "--max-failure-ratio", 0.7).exit_code == 0


def test_the_same_names_twice_stay_two_rows(annotate, tmp_path, make_tar, encoded, noise):
    audio = encoded(noise(8_000))
    tar = make_tar(tmp_path / "a.tar", [("x.wav", audio), ("y.wav", audio), ("x.wav", audio)])
    assert annotate(tar, "--output", tmp_path / "out").exit_code == 0
    ids = [row["clip_id"].partition("/")[2] for row in rows_of(tmp_path / "out")]
    assert ids == ["x.wav", "x.wav#2", "y.wav"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing/*.tar", "--output", "out"], "'nothing/*.tar' matches no tar"),
        (["nowhere.tar", "--output", "out"], "'nowhere.tar' does not exist"),
        (["{shards}", "--output", "out", "--devcie", "cuda"], "No such option: --devcie. Did you mean --device?"),
        (["{shards}", "--output", "out", "--direct_num_wrokers", "2"], "Did you mean --direct_num_workers?"),
        (["{shards}", "--output", "out", "--direct_num_workers"], "needs a value"),
        (["{shards}", "--output", "out", "--direct_num_workers", "two"], "invalid int value"),
        (["{shards}", "--output", "out", "--threshold", "7"], "'--threshold'"),
        (["{shards}", "--output", "out", "--chunk-hop-s", "0"], "'--chunk-hop-s'"),
        (["{shards}", "--output", "out", "--chunk-hop-s", "2"], "at most 1.28 s, the length of this student's chunk"),
        (["{shards}", "--output", "out", "--pad", "reflect"], "'--pad'"),
        (["{shards}", "--output", "out", "--checkpoint", "./nowhere"], "neither 'bundled', nor an existing"),
        (["{shards}", "--output", "out", "--device", "tpu"], "device 'tpu'"),
        (["{shards}", "--output", "nosuch://bucket/out"], "Protocol not known: nosuch"),
        (["{shards}", "--output", ""], "--output is empty"),
        (["{shards}", "--output", "out", "--gpu", "nvidia-l4"], "--gpu is for --runner DataflowRunner"),
        (["{shards}", "--output", "out", "--threshold", "0.5", "--thresholds", "t.json"], "give one"),
        (["{shards}", "--output", "out", "--thresholds", "t.json"], "'t.json' cannot be read: No such file"),
        (["--inputs-from", "list.txt", "--output", "out"], "'list.txt' cannot be read: No such file"),
        (["{shards}"], "--output"),
        (["--output", "out"], "INPUT"),
    ],
)  # fmt: skip
def test_bad_arguments_exit_with_2_and_a_sentence(
    annotate, shards, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    result = annotate(*[argument.format(shards=shards) for argument in arguments])
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "out" / "clips").exists()


def test_a_missing_gpu_is_an_error_and_no_fallback(annotate, shards, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    result = annotate(shards, "--output", tmp_path / "out", "--device", "cuda")
    assert result.exit_code == 2 and "device 'cuda' was asked for" in result.output


def test_an_unwritable_output_is_a_sentence(annotate, shards, tmp_path):
    (tmp_path / "file").write_text("in the way")
    result = annotate(shards, "--output", tmp_path / "file" / "out")
    assert result.exit_code == 2 and "cannot be written" in result.output


@pytest.mark.parametrize(
    "beam",
    [
        ["--runner", "DirectRunner"],
        ["--runner", "DirectRunner", "--direct_num_workers", "2", "--direct_running_mode", "multi_threading"],
        ["--runner", "DirectRunner", "--direct_num_workers", "2", "--direct_running_mode", "multi_processing"],
        ["--device", "cpu", "--devices", "2"],
        ["--decode-processes", "2"],
    ],
    ids=["direct", "threads", "processes", "devices", "decode-processes"],
)  # fmt: skip
def test_other_runners_give_the_same_rows(annotate, shards, tmp_path, tiny_checkpoint, beam):
    assert annotate(shards, "--output", tmp_path / "here").exit_code == 0
    command = [sys.executable, "-m", "pipeline", "annotate", shards, "--output", tmp_path / "there"]
    command += ["--checkpoint", tiny_checkpoint, *beam]
    # As many threads as here: with another number the last bit of a sum may differ.
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    run = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, cwd=ROOT, env=os.environ | threads
    )
    assert run.returncode == 0, run.stderr
    assert rows_of(tmp_path / "there") == rows_of(tmp_path / "here")
    assert "5 clips" in run.stdout


def test_rows_after_sigkill_equal_those_of_an_undisturbed_run(tiny_checkpoint):
    command = [sys.executable, "bench/kill.py", "--kills", "3", "--shards", "4", "--clips", "100"]
    command += ["--max-delay", "0.7", "--checkpoint", str(tiny_checkpoint)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stdout + run.stderr
    result = json.loads(run.stdout)
    assert (result["kills"], result["outputs_that_differ"]) == (3, 0)
    assert (result["rows"], result["duplicates"]) == (400, 0)


def test_a_killed_runs_partial_files_are_removed(annotate, shards, tmp_path):
    assert annotate(shards / "b.tar", "--output", tmp_path).exit_code == 0
    dead = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True
    )
    abandoned = (
        tmp_path / "clips" / f".x.{socket.gethostname()}.{int(dead.stdout)}.0a1b2c3d.partial"
    )
    alive = tmp_path / "clips" / f".y.{socket.gethostname()}.{os.getpid()}.0a1b2c3d.partial"
    abandoned.write_text("")
    alive.write_text("")
    assert annotate(shards / "b.tar", "--output", tmp_path).exit_code == 0
    assert not abandoned.exists() and alive.exists()


def test_a_worker_with_other_weights_stops(annotate, shards, tmp_path, monkeypatch):
    read = model.read_checkpoint
    monkeypatch.setattr(model, "read_checkpoint", lambda name: read("bundled"))
    result = annotate(shards, "--output", tmp_path / "out")
    assert result.exit_code == 1
    assert "give all workers the same files" in result.output
    assert not list((tmp_path / "out").glob("clips/*.parquet"))


def test_a_summary_needs_no_rows(annotate, shards, tmp_path):
    assert annotate(shards / "a.tar", "--output", tmp_path).exit_code == 0
    file = next((tmp_path / "clips").glob("*.parquet"))
    summary, _ = read_summary(LocalOutput(tmp_path), f"clips/{file.name}")
    assert (summary.clips, summary.failed) == (3, 1)
    assert summary.failures == {"decode/InvalidDataError": 1}


# ---------------------------------------------------------------- a worker's parts


def annotation_of(tiny_checkpoint, **changes):
    facts = model.read_checkpoint(str(tiny_checkpoint))
    made = Annotation(
        checkpoint=str(tiny_checkpoint),
        weights_sha256=facts.weights_sha256,
        config_sha256=facts.config_sha256,
        device="cpu",
        dtype="auto",
        pool="max",
        rows=RowOptions(thresholds=facts.thresholds),
        output="out",
        run="{}",
    )
    return replace(made, **changes)


def test_threads_are_dealt_over_the_gpus_and_each_gpu_loads_once(tiny_checkpoint, monkeypatch):
    class Loaded:
        size_bytes = 1_234

        def __init__(self, device):
            self.device = device

    loads = []

    def load(annotation, device):
        loads.append(device)
        time.sleep(0.02)  # long enough for another thread to come in between
        return Loaded(device)

    gpus = ["cuda:0", "cuda:1", "cuda:2"]
    asked = []
    monkeypatch.setattr(annotate_module, "devices_of", lambda device: asked.append(device) or gpus)
    monkeypatch.setattr(annotate_module, "load_student", load)
    students = Students(annotation_of(tiny_checkpoint, device="cuda"))
    meter = Meter()
    with ThreadPoolExecutor(7) as pool:
        taken = list(pool.map(lambda _: students.take(meter), range(7)))
    assert asked == ["cuda"]
    assert sorted(loads) == gpus
    assert Counter(student.device for student in taken) == {"cuda:0": 3, "cuda:1": 2, "cuda:2": 2}
    assert len({id(student) for student in taken}) == 3
    counts, values = meter.take()
    assert counts == {} and values["model_byte_size"] == [1_234] * 3
    assert len(values["load_model_latency_milli_secs"]) == 3
    assert min(values["load_model_latency_milli_secs"]) >= 20


def test_threads_share_the_student_of_a_cpu(tiny_checkpoint, tiny_student):
    students = Students(annotation_of(tiny_checkpoint))
    meter = Meter()
    first, second = students.take(meter), students.take(meter)
    assert first is second and first.device == torch.device("cpu")
    assert meter.take()[1]["model_byte_size"] == [4 * tiny_student.parameters]


def test_a_thread_whose_gpu_is_missing_stops(tiny_checkpoint):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(model.DeviceError, match="device 'cuda' was asked for"):
        Students(annotation_of(tiny_checkpoint, device="cuda"))


@pytest.mark.parametrize("what", ["weights", "config"])
def test_other_weights_or_another_config_are_refused(tiny_checkpoint, what):
    annotation = annotation_of(tiny_checkpoint, **{f"{what}_sha256": "0" * 64})
    with pytest.raises(CheckpointError) as refusal:
        load_student(annotation)
    found = getattr(annotation_of(tiny_checkpoint), f"{what}_sha256")
    assert str(refusal.value) == (
        f"checkpoint {str(tiny_checkpoint)!r} has {what} {found[:12]}... on this worker, but the "
        "run was started with 000000000000...; give all workers the same files"
    )


def test_waits_are_told_in_words():
    waits = Waits()
    waits.add(
        {"wait_for_audio_msec": [300, 450], "wait_for_model_msec": [10], "shard_msec": [1000]}
    )
    assert waits.sentence() == (
        "the model waited for audio 75 % of the time, decoding waited for the model 1 %; reading "
        "and decoding are the bottleneck: more vCPUs or threads for each model"
    )
    waits.add({"wait_for_model_msec": [1_590], "shard_msec": [500, 500], "model_byte_size": [9]})
    assert waits.sentence() == (
        "the model waited for audio 38 % of the time, decoding waited for the model 80 %; the model "
        "is the bottleneck: a faster device, or more of them"
    )


def test_waits_are_logged_now_and_then_and_begin_anew(monkeypatch, caplog):
    now = [1_000.0]
    monkeypatch.setattr(annotate_module.time, "monotonic", lambda: now[0])
    caplog.set_level("INFO", annotate_module.logger.name)
    waits = Waits()
    audio = {"wait_for_audio_msec": [90], "wait_for_model_msec": [0], "shard_msec": [100]}
    model_ = {"wait_for_audio_msec": [0], "wait_for_model_msec": [80], "shard_msec": [100]}
    logged = []
    for seconds, values in [
        (59, audio),  # too early
        (2, audio),
        (30, model_),
        (29, model_),  # too early again
        (1, model_),
        (120, {}),  # nothing was done: nothing to say
    ]:
        now[0] += seconds
        caplog.clear()
        waits.add(values)
        logged.append([record.getMessage()[:34] for record in caplog.records])
    assert logged == [
        [],
        ["the model waited for audio 90 % of"],
        [],
        [],
        ["the model waited for audio 0 % of "],
        [],
    ]


def test_a_worker_with_other_code_says_which_and_what_to_do():
    earmark, beam = version("earmark-audio"), version("apache-beam")
    check_versions([("earmark-audio", earmark), ("apache-beam", beam)])
    check_versions([])
    for package, found, expected in [
        ("earmark-audio", earmark, "9.9"),
        ("apache-beam", beam, "2.1"),
    ]:
        with pytest.raises(RuntimeError) as refusal:
            check_versions([(package, expected)])
        assert str(refusal.value) == (
            f"this worker has {package} {found}, the job was launched with {expected}: launch it "
            "from the same image or environment that the workers run (--sdk_container_image)"
        )


def test_a_misspelt_input_does_not_cost_the_old_output(annotate, shards, tmp_path):
    output = tmp_path / "out"
    assert annotate(shards / "a.tar", "--output", output).exit_code == 0
    before = rows_of(output)
    result = annotate(shards / "a.tar", shards / "misspelt.tar", "--output", output, "--overwrite")
    assert result.exit_code == 2 and "does not exist" in result.output
    assert rows_of(output) == before


def test_what_lies_in_the_output_is_no_input(annotate, tmp_path, encoded, noise):
    audio = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    cells = [{"bytes": encoded(noise(8_000, seed=n)), "path": f"{n}.wav"} for n in range(3)]
    pq.write_table(pa.table({"audio": pa.array(cells, audio)}), tmp_path / "a.parquet")
    for _ in range(3):
        arguments = (f"{tmp_path}/**/*.parquet", "--output", tmp_path / "out")
        assert annotate(*arguments).exit_code == 0
        assert len(rows_of(tmp_path / "out")) == 3


@pytest.fixture
def prepared(tiny_checkpoint, tmp_path, encoded, noise):
    """Prepares a run over a folder of files, without executing it."""

    def prepare_run(**options):
        chosen = {"inputs": (str(tmp_path / "in"),), "output": str(tmp_path / "out")}
        chosen |= {"checkpoint": str(tiny_checkpoint), "device": "cpu"}
        return running.prepare(AnnotateOptions(**(chosen | options)))

    (tmp_path / "in").mkdir()
    for number in range(2):
        (tmp_path / "in" / f"{number}.wav").write_bytes(encoded(noise(8_000, seed=number)))
    return prepare_run


def execute(job):
    return running.execute(
        job, lambda job, folder: contextlib.nullcontext(), lambda job, places: None
    )


def test_a_run_that_was_overwritten_publishes_nothing_more(prepared, tmp_path):
    old = prepared(files_per_shard=1)
    new = prepared(files_per_shard=2, overwrite=True)
    execute(new)
    with pytest.raises(RuntimeError, match="another run has started"):
        execute(old)
    assert [row["member"] for row in rows_of(tmp_path / "out")] == ["0.wav", "1.wav"]


def test_two_runs_that_divide_a_folder_differently_do_not_end_well(
    prepared, tmp_path, encoded, noise
):
    first = prepared()
    (tmp_path / "in" / "2.wav").write_bytes(encoded(noise(8_000, seed=2)))
    second = prepared()
    execute(first)
    with pytest.raises(UsageError, match="divided otherwise by now"):
        execute(second)


def test_a_folders_name_does_not_make_its_files_row_groups(prepared, tmp_path):
    folder = (tmp_path / "in").rename(tmp_path / "my-rg-set")
    for number in (0, 1):
        execute(prepared(inputs=(str(folder / f"{number}.wav"),)))
    assert len(list((tmp_path / "out" / "clips").glob("*.parquet"))) == 2


def test_a_bundle_that_comes_again_does_nothing_twice(prepared, tiny_student):
    job = prepared(files_per_shard=1)
    annotation, meter = running.annotation_of(job, None), Meter()
    for again in (False, True):
        for shard in job.todo:
            progress = ProgressFile(None)
            summary = annotate_shard(shard, tiny_student, annotation, job.output, progress, meter)
            assert summary.clips == 1
        counts, _ = meter.take()
        assert counts.get("num_inferences", 0) == (0 if again else 2)
        assert counts.get("shards_published_by_another", 0) == (2 if again else 0)


@pytest.mark.parametrize("option", ["--kms-key", "--billing-project"])
def test_options_of_cloud_storage_are_refused_elsewhere(annotate, shards, tmp_path, option):
    result = annotate(shards, "--output", tmp_path / "out", option, "mine")
    assert result.exit_code == 2 and "nothing here is there" in result.output


@pytest.mark.parametrize("option", ["manifest", "inputs_from", "audio_root"])
def test_what_a_manifest_or_list_names_may_be_in_cloud_storage(option):
    from pipeline.options import AnnotateOptions
    from pipeline.run import _refuse_cloud_options_elsewhere

    asked = {
        "manifest": {"inputs": ("clips.csv",)},
        "inputs_from": {"inputs": (), "inputs_from": ("list.txt",)},
        "audio_root": {"inputs": ("a.txt",), "audio_root": "gs://audio/all"},
    }[option]
    _refuse_cloud_options_elsewhere(AnnotateOptions(output="out", billing_project="p", **asked))


def test_progress_is_by_rows_where_bytes_say_nothing():
    from pipeline.plan import Todo
    from pipeline.quantities import amount
    from transforms.progress import Progress

    done = Progress(clips=5, bytes=4_000, shards=1)
    assert Todo(shards=2, rows=20).done(done) == 0.25
    assert Todo(shards=2, rows=20, max_clips=10).done(done) == 0.5
    assert Todo(shards=4, rows=20, size_bytes=8_000).done(done) == 0.25  # shards of both kinds
    assert Todo(shards=4, size_bytes=8_000).done(done) == 0.5
    assert Todo().done(done) == 0
    assert amount(0, 1) == "1 row of manifests"
    assert amount(2_000, 30) == "30 rows of manifests, 2.0 kB beside"
    assert amount(2_000, 0) == "2.0 kB"
