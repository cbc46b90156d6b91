from __future__ import annotations

import datetime
import json
import math
import os
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from student.labels import Label
from transforms import write
from transforms.output import PARTIAL_SUFFIX, open_output, remove_abandoned
from transforms.records import ClipEnd, ClipError, ScoredClip, Shard
from transforms.write import (
    CLIPS_FOLDER,
    RUN_KEY,
    RowOptions,
    ShardSummary,
    clip_row,
    clips_schema,
    read_summary,
    tags_of,
    write_rows,
)

LABELS = (Label(0, "", "hum"), Label(1, "/m/0bt9lr", "Dog"), Label(2, "/m/05tny_", "Bark"))
SHARD = Shard("set-0123456789ab", "/data/set.tar", "tar", 1_000)
FAULT = ClipError("decode", "NoAudio", "the audio holds no samples")
DEFAULTS = RowOptions(thresholds=(0.5, 0.25, 0.5))
RUN = '{"fingerprint": "ours"}'
EVERYTHING = RowOptions(thresholds=(0.5, 0.25, 0.5), chunks=True, embeddings=True)


def array(*values: float) -> NDArray[np.float32]:
    return np.array(values, np.float32)


def end(member: str | None = "a.wav", **fields: Any) -> ClipEnd:
    facts = {
        "size_bytes": 100,
        "xxh128": "0" * 32,
        "metadata": {},
        "codec": "flac",
        "sample_rate": 44_100,
        "channels": 2,
        "duration_s": 1.5,
        "peak_dbfs": -6.0,
        "rms_dbfs": -12.5,
    }
    return ClipEnd(member, **(facts | fields))


def good(member: str = "a.wav", scores: NDArray[np.float32] | None = None, **fields: Any):
    scores = array(0.125, 0.25, 0.75) if scores is None else scores
    chunks = [(0.0, 1.0, scores), (0.5, 1.5, scores / 2)]
    return ScoredClip(end(member, **fields), scores, array(1, -2), chunks)


def failed(member: str | None = "b.wav") -> ScoredClip:
    return ScoredClip(ClipEnd(member, 0, None, {}, error=FAULT), None, None, [])


def rows(*clips: ScoredClip, options: RowOptions = DEFAULTS) -> list[dict[str, Any]]:
    return [
        clip_row(clip, SHARD, f"{SHARD.id}/{clip.clip.member}", LABELS, options) for clip in clips
    ]


def schema(options: RowOptions = DEFAULTS) -> pa.Schema:
    return clips_schema(len(LABELS), 2, options)


def destination(folder: Path, name: str = "set-0123456789ab") -> Path:
    return folder / "out" / CLIPS_FOLDER / f"{name}.parquet"


def written(folder: Path, *clips: ScoredClip, options: RowOptions = DEFAULTS) -> pa.Table:
    file = destination(folder)
    write_to(rows(*clips, options=options), schema(options), file, RUN)
    return pq.read_table(file)


def write_to(rows: Iterable[Any], schema: pa.Schema, file: Path, run: str, *before: Any) -> Any:
    summary, size = write_rows(rows, schema, open_output(str(file.parent)), file.name, run, *before)
    assert size in (0, file.stat().st_size)
    return summary


def summary_of(file: Path) -> ShardSummary:
    summary, making = read_summary(open_output(str(file.parent)), file.name)
    assert making == "ours"
    return summary


def metadata_of(**metadata: Any) -> str | None:
    text: str | None = rows(good(metadata=metadata))[0]["metadata"]
    return text


# ------------------------------------------------------------------------- rows


def test_a_scored_clip_reads_back_as_it_was_written(tmp_path: Path) -> None:
    table = written(tmp_path, good(metadata={"speaker": "é", "n": [1, None]}), options=EVERYTHING)
    assert table.schema.equals(schema(EVERYTHING))
    assert table.to_pylist() == [
        {
            "clip_id": "set-0123456789ab/a.wav",
            "shard": "/data/set.tar",
            "member": "a.wav",
            "start_s": None,
            "end_s": None,
            "duration_s": 1.5,
            "sample_rate": 44_100,
            "channels": 2,
            "codec": "flac",
            "audio_xxh128": "0" * 32,
            "peak_dbfs": -6.0,
            "rms_dbfs": -12.5,
            "tags": [
                {"index": 2, "mid": "/m/05tny_", "name": "Bark", "score": 0.75},
                {"index": 1, "mid": "/m/0bt9lr", "name": "Dog", "score": 0.25},
            ],
            "scores": [0.125, 0.25, 0.75],
            "metadata": '{"speaker": "é", "n": [1, null]}',
            "error": None,
            "chunks": [
                {"start_s": 0.0, "end_s": 1.0, "scores": [0.125, 0.25, 0.75]},
                {"start_s": 0.5, "end_s": 1.5, "scores": [0.0625, 0.125, 0.375]},
            ],
            "embedding": [1.0, -2.0],
        }
    ]


def test_a_failed_clip_reads_back_with_its_error_and_nulls(tmp_path: Path) -> None:
    table = written(tmp_path, failed(), options=EVERYTHING)
    assert table.to_pylist() == [
        {
            **dict.fromkeys(table.column_names),
            "clip_id": "set-0123456789ab/b.wav",
            "shard": "/data/set.tar",
            "member": "b.wav",
            "scores": [None, None, None],
            "error": {
                "stage": "decode",
                "type": "NoAudio",
                "message": "the audio holds no samples",
            },
            "embedding": [None, None],
        }
    ]


@pytest.mark.parametrize("score_type", ["float32", "float16"])
def test_failed_clips_between_good_ones_read_back(tmp_path: Path, score_type: Any) -> None:
    options = RowOptions((0.5,) * 3, chunks=True, embeddings=True, score_type=score_type)
    clips = [
        failed("0"),
        good("1", array(0.5, 0.25, 0.125)),
        failed("2"),
        failed(None),
        good("4", array(1.0, 0.0, 0.5)),
        ScoredClip(end("5"), array(0.0, 0.0, 1.0), array(3, 4), [(0.0, 2.0, array(0, 0, 1))]),
        failed("6"),
    ]
    table = written(tmp_path, *clips, options=options)
    nothing = [None, None, None]
    assert table["member"].to_pylist() == ["0", "1", "2", None, "4", "5", "6"]
    assert table["scores"].to_pylist() == [
        nothing,
        [0.5, 0.25, 0.125],
        nothing,
        nothing,
        [1.0, 0.0, 0.5],
        [0.0, 0.0, 1.0],
        nothing,
    ]
    absent = [None, None]
    assert table["embedding"].to_pylist() == [
        absent,
        [1.0, -2.0],
        absent,
        absent,
        [1.0, -2.0],
        [3.0, 4.0],
        absent,
    ]
    chunks = [
        clip and [(chunk["start_s"], chunk["end_s"], chunk["scores"]) for chunk in clip]
        for clip in table["chunks"].to_pylist()
    ]
    assert chunks == [
        None,
        [(0.0, 1.0, [0.5, 0.25, 0.125]), (0.5, 1.5, [0.25, 0.125, 0.0625])],
        None,
        None,
        [(0.0, 1.0, [1.0, 0.0, 0.5]), (0.5, 1.5, [0.5, 0.0, 0.25])],
        [(0.0, 2.0, [0.0, 0.0, 1.0])],
        None,
    ]


def test_columns_that_were_not_asked_for_are_not_written(tmp_path: Path) -> None:
    names = written(tmp_path, good()).column_names
    assert "chunks" not in names
    assert "embedding" not in names
    with_chunks = RowOptions((0.5,) * 3, chunks=True)
    table = written(tmp_path / "more", good(), options=with_chunks)
    assert table.column_names == [*names, "chunks"]


def test_silence_keeps_its_level(tmp_path: Path) -> None:
    table = written(tmp_path, good(peak_dbfs=-math.inf, rms_dbfs=-math.inf))
    assert table["peak_dbfs"].to_pylist() == table["rms_dbfs"].to_pylist() == [-math.inf]


def test_half_precision_is_stored_as_such(tmp_path: Path) -> None:
    options = RowOptions((0.2,) * 3, score_type="float16", chunks=True, embeddings=True)
    scores = array(0.1, 0.3, 0.7)
    table = written(tmp_path, good(scores=scores), options=options)
    assert table.schema.field("scores").type == pa.list_(pa.float16(), 3)
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), 2)
    half = scores.astype(np.float16)
    (row,) = table.to_pylist()
    assert row["scores"] == half.tolist()
    assert row["chunks"][0]["scores"] == half.tolist()
    assert row["chunks"][1]["scores"] == (scores / 2).astype(np.float16).tolist()
    assert [tag["score"] for tag in row["tags"]] == [float(half[2]), float(half[1])]


# ------------------------------------------------------------------------- tags


def tags(scores: NDArray[np.float32], options: RowOptions) -> list[tuple[str, float]]:
    found = tags_of(scores, LABELS, options)
    for tag in found:
        label = LABELS[tag["index"]]
        assert (tag["mid"], tag["name"]) == (label.mid, label.name)
    return [(tag["name"], tag["score"]) for tag in found]


def test_tags_are_the_labels_that_reach_their_threshold_highest_first() -> None:
    options = RowOptions(thresholds=(0.5, 0.25, 0.75))
    assert tags(array(0.5, 0.875, 0.625), options) == [("Dog", 0.875), ("hum", 0.5)]
    assert tags(array(0.25, 0.125, 0.5), options) == []
    assert tags(array(1, 1, 1), options) == [("hum", 1.0), ("Dog", 1.0), ("Bark", 1.0)]


def test_tags_are_at_most_top_k() -> None:
    scores = array(0.5, 0.75, 0.625)
    every = [("Dog", 0.75), ("Bark", 0.625), ("hum", 0.5)]
    for top_k, expected in [(1, every[:1]), (2, every[:2]), (3, every), (9, every), (None, every)]:
        assert tags(scores, RowOptions((0.1,) * 3, top_k=top_k)) == expected


def test_a_score_equal_to_its_threshold_reaches_it() -> None:
    options = RowOptions(thresholds=(0.2, 0.2, 0.2))
    below = np.nextafter(np.float32(0.2), np.float32(0))
    assert tags(array(0.2, below, 0), options) == [("hum", pytest.approx(0.2, abs=1e-7))]


def test_the_score_as_it_is_stored_decides() -> None:
    # 0.2 in half precision is 0.19995.
    assert tags(array(0.2, 0, 0), RowOptions((0.2,) * 3, score_type="float16")) == []
    assert tags(array(0.2, 0, 0), RowOptions((0.19995,) * 3, score_type="float16")) == [
        ("hum", float(np.float16(0.2)))
    ]


# --------------------------------------------------------------------- metadata


def test_no_metadata_is_null() -> None:
    assert metadata_of() is None


def test_metadata_is_json_with_dates_as_text() -> None:
    text = metadata_of(day=datetime.date(2024, 2, 29), name="été", nested={"a": [1, 2.5, None]})
    assert text == '{"day": "2024-02-29", "name": "été", "nested": {"a": [1, 2.5, null]}}'


@pytest.mark.parametrize("half", ["\\ud83d", "\\udc80", "\\udcff"])
def test_metadata_that_is_not_valid_unicode_is_valid_json(tmp_path: Path, half: str) -> None:
    title = json.loads(f'"cut {half}"')  # half of an emoji, as a JSON file may hold it
    table = written(tmp_path, good(metadata={"title": title, "n": 1}))
    (text,) = table["metadata"].to_pylist()
    assert json.loads(text)["n"] == 1
    assert json.loads(text)["title"].startswith("cut ")


def test_metadata_that_cannot_be_json_says_so() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    text = metadata_of(deep=deep)
    assert text == '{"unwritable": "RecursionError in the clip\'s metadata"}'


# -------------------------------------------------------------------- one shard


def test_the_summary_counts_what_was_written(tmp_path: Path) -> None:
    broken = ScoredClip(
        ClipEnd(None, 0, None, {}, error=ClipError("read", "BrokenShard", "it ends")),
        None,
        None,
        [],
    )
    clips = [good("1"), failed(), good("2", duration_s=2.25), failed(), broken, good("3")]
    summary = write_to(rows(*clips), schema(), destination(tmp_path), RUN)
    assert summary == ShardSummary(
        clips=6,
        failed=3,
        audio_s=5.25,
        failures=Counter({"decode/NoAudio": 2, "read/BrokenShard": 1}),
        tags=Counter({"Bark": 3, "Dog": 3}),
    )
    assert summary_of(destination(tmp_path)) == summary


def test_summaries_add_up() -> None:
    one = ShardSummary(2, 1, 1.5, Counter({"a/b": 1}), Counter({"Dog": 1}))
    other = ShardSummary(3, 2, 0.25, Counter({"a/b": 1, "c/d": 1}), Counter({"hum": 2}))
    total = ShardSummary()
    total.add(one)
    assert total == one
    total.add(other)
    assert total == ShardSummary(
        5, 3, 1.75, Counter({"a/b": 2, "c/d": 1}), Counter({"Dog": 1, "hum": 2})
    )
    assert one.clips == 2


def test_the_run_is_in_the_files_metadata(tmp_path: Path) -> None:
    run = json.dumps({"fingerprint": "é"})
    write_to(rows(good()), schema(), destination(tmp_path), run)
    assert pq.read_metadata(destination(tmp_path)).metadata[RUN_KEY] == run.encode()


@pytest.mark.parametrize("options", [DEFAULTS, EVERYTHING], ids=["defaults", "everything"])
def test_a_shard_without_clips_is_a_file_without_rows(tmp_path: Path, options: RowOptions) -> None:
    file = destination(tmp_path)
    assert write_to([], schema(options), file, RUN) == ShardSummary()
    table = pq.read_table(file)
    assert (table.num_rows, table.schema.equals(schema(options))) == (0, True)
    assert summary_of(file) == ShardSummary()


def test_rows_are_grouped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "ROWS_PER_GROUP", 2)
    table = written(tmp_path, *(good(str(number)) for number in range(5)))
    footer = pq.read_metadata(destination(tmp_path))
    assert [footer.row_group(group).num_rows for group in range(3)] == [2, 2, 1]
    assert footer.num_row_groups == 3
    assert table["member"].to_pylist() == ["0", "1", "2", "3", "4"]


def test_as_many_rows_as_a_group_holds_leave_no_empty_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write, "ROWS_PER_GROUP", 2)
    written(tmp_path, *(good(str(number)) for number in range(4)))
    footer = pq.read_metadata(destination(tmp_path))
    assert [footer.row_group(g).num_rows for g in range(footer.num_row_groups)] == [2, 2]


@pytest.mark.parametrize("large", ["chunks", "metadata"])
def test_large_rows_fill_a_group_sooner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: str
) -> None:
    monkeypatch.setattr(write, "BYTES_PER_GROUP", 20_000)
    clip = good("large", metadata={"text": "x" * 15_000} if large == "metadata" else {})
    if large == "chunks":
        clip.chunks.extend([(0.0, 1.0, array(0, 0, 0))] * 1_250)  # of 12 bytes each
    clips = [clip, failed(), clip, good("small"), clip, clip, failed()]
    table = written(tmp_path, *clips, options=EVERYTHING)
    footer = pq.read_metadata(destination(tmp_path))
    assert [footer.row_group(g).num_rows for g in range(footer.num_row_groups)] == [3, 3, 1]
    members = ["large", "b.wav", "large", "small", "large", "large", "b.wav"]
    assert table["member"].to_pylist() == members


def test_rows_are_written_while_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "ROWS_PER_GROUP", 10)
    sizes = []

    def coming() -> Iterator[dict[str, Any]]:
        for number in range(40):
            (partial,) = destination(tmp_path).parent.iterdir()
            sizes.append(partial.stat().st_size)
            yield from rows(good(f"{number:09d}" * 5_000))

    write_to(coming(), schema(), destination(tmp_path), RUN)
    assert sizes[9] < sizes[10] < sizes[30]


# ------------------------------------------------------------------ publication


def test_nothing_but_the_file_is_left(tmp_path: Path) -> None:
    written(tmp_path, good())
    assert list((tmp_path / "out").rglob("*")) == [
        destination(tmp_path).parent,
        destination(tmp_path),
    ]


@pytest.mark.parametrize("before", [0, 1, 7])
@pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt])
def test_a_fault_among_the_rows_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: int, kind: type[BaseException]
) -> None:
    monkeypatch.setattr(write, "ROWS_PER_GROUP", 2)
    seen = []

    def breaking() -> Iterator[dict[str, Any]]:
        yield from rows(*(good(str(number)) for number in range(before)))
        seen.extend(destination(tmp_path).parent.iterdir())
        raise kind("the network is gone")

    with pytest.raises(kind):
        write_to(breaking(), schema(), destination(tmp_path), RUN)
    assert len(seen) == 1  # there was a partial file
    assert list(destination(tmp_path).parent.iterdir()) == []


def test_what_stops_publication_leaves_no_file(tmp_path: Path) -> None:
    def refuse() -> None:
        assert not destination(tmp_path).exists()
        raise RuntimeError("the output is another run's by now")

    with pytest.raises(RuntimeError, match="the output is another run's by now"):
        write_to(rows(good()), schema(), destination(tmp_path), RUN, refuse)
    assert list(destination(tmp_path).parent.iterdir()) == []


def test_a_fault_leaves_the_file_of_an_earlier_run(tmp_path: Path) -> None:
    written(tmp_path, good())
    before = destination(tmp_path).read_bytes()

    def breaking() -> Iterator[dict[str, Any]]:
        yield from rows(failed())
        raise OSError("the network is gone")

    with pytest.raises(OSError, match="the network is gone"):
        write_to(breaking(), schema(), destination(tmp_path), RUN)
    assert destination(tmp_path).read_bytes() == before
    assert list(destination(tmp_path).parent.iterdir()) == [destination(tmp_path)]


def test_a_file_that_is_being_written_is_hidden_from_readers_of_the_folder(tmp_path: Path) -> None:
    written(tmp_path, good("whole"))
    folder = destination(tmp_path).parent

    def looking() -> Iterator[dict[str, Any]]:
        yield from rows(failed())
        assert list(folder.glob("*.parquet")) == [destination(tmp_path)]
        assert pq.read_table(folder)["member"].to_pylist() == ["whole"]

    write_to(looking(), schema(), destination(tmp_path, "other"), RUN)
    assert sorted(pq.read_table(folder)["member"].to_pylist()) == ["b.wav", "whole"]


def test_two_writers_of_one_file_both_succeed(tmp_path: Path) -> None:
    both_write = threading.Barrier(2, timeout=10)
    summaries = []

    def slowly() -> Iterator[dict[str, Any]]:
        yield from rows(good("1"))
        both_write.wait()
        yield from rows(good("2"))

    def write_one() -> None:
        summaries.append(write_to(slowly(), schema(), destination(tmp_path), RUN))

    threads = [threading.Thread(target=write_one) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [summary.clips for summary in summaries] == [2, 2]
    assert pq.read_table(destination(tmp_path))["member"].to_pylist() == ["1", "2"]
    assert list(destination(tmp_path).parent.iterdir()) == [destination(tmp_path)]


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    clips = [good(str(number)) for number in range(10)]
    written(tmp_path / "one", *clips, options=EVERYTHING)
    written(tmp_path / "two", *clips, options=EVERYTHING)
    assert destination(tmp_path / "one").read_bytes() == destination(tmp_path / "two").read_bytes()


# ----------------------------------------------------------------- what is found


def test_the_summary_of_a_foreign_file_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [1]}), tmp_path / "foreign.parquet")
    (tmp_path / "text.parquet").write_text("no Parquet")
    (tmp_path / "empty.parquet").write_bytes(b"")
    for name in ("foreign", "text", "empty"):
        file = tmp_path / f"{name}.parquet"
        with pytest.raises(ValueError) as refusal:
            summary_of(file)
        assert str(refusal.value) == (
            f"{file} is not a file that earmark finished; remove it and run again"
        )


@pytest.mark.parametrize("kept", [4, 500, -1, -8])
def test_the_summary_of_a_truncated_file_is_refused(tmp_path: Path, kept: int) -> None:
    written(tmp_path, good())
    file = destination(tmp_path)
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ValueError, match="is not a file that earmark finished"):
        summary_of(file)


def partial(output: Path, mark: str) -> Path:
    file = output / CLIPS_FOLDER / f".{mark}{PARTIAL_SUFFIX}"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"half")
    return file


def ended_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_only_partial_files_of_ended_processes_of_this_host_are_removed(tmp_path: Path) -> None:
    host, dead, alive = socket.gethostname(), ended_process(), os.getpid()
    written(tmp_path, good())
    output = tmp_path / "out"
    abandoned = [
        partial(output, f"set-0123456789ab.{host}.{dead}.deadbeef"),
        partial(output, f"a.b.c-0123456789ab.{host}.{dead}.deadbeef"),
    ]
    kept = [
        destination(tmp_path),
        partial(output, f"set-0123456789ab.{host}.{alive}.deadbeef"),
        partial(output, f"set-0123456789ab.another{host}.{dead}.deadbeef"),
        partial(output, f"set-0123456789ab.another.{dead}.deadbeef"),
    ]
    remove_abandoned(output, output / CLIPS_FOLDER)
    assert [file.exists() for file in abandoned] == [False, False]
    assert [file.exists() for file in kept] == [True] * 4


@pytest.mark.parametrize("mark", ["notes", "notes.1", ""])
def test_partial_files_of_another_making_are_left_alone(tmp_path: Path, mark: str) -> None:
    file = partial(tmp_path, mark)
    remove_abandoned(tmp_path, tmp_path / CLIPS_FOLDER)
    assert file.exists()


def test_a_partial_file_of_a_killed_process_is_removed(tmp_path: Path) -> None:
    code = (
        "import os, sys, pathlib\n"
        "from transforms.output import open_output\n"
        "from transforms.write import RowOptions, clips_schema, write_rows\n"
        "def rows():\n"
        "    os._exit(9)\n"
        "    yield\n"
        "schema = clips_schema(3, 2, RowOptions((0.5,) * 3))\n"
        "file = pathlib.Path(sys.argv[1])\n"
        "write_rows(rows(), schema, open_output(str(file.parent)), file.name, '{}')\n"
    )
    file = destination(tmp_path)
    done = subprocess.run([sys.executable, "-c", code, str(file)])
    assert done.returncode == 9
    assert [left.suffix for left in file.parent.iterdir()] == [PARTIAL_SUFFIX]
    remove_abandoned(tmp_path / "out", tmp_path / "out" / CLIPS_FOLDER)
    assert list(file.parent.iterdir()) == []


def test_nothing_is_removed_where_there_is_no_output_yet(tmp_path: Path) -> None:
    remove_abandoned(tmp_path / "out", tmp_path / "out" / CLIPS_FOLDER)
    assert list(tmp_path.iterdir()) == []


def test_a_clip_that_counts_in_part_has_scores_and_is_not_failed(tmp_path: Path) -> None:
    fault = ClipError("decode", "Truncated", "1.00 s of 2.50 s are missing: the file ends early")
    half = good("c.wav", error=fault, start_s=1.0, end_s=3.5)
    table = written(tmp_path, half, failed())
    row, _ = table.to_pylist()
    assert (row["scores"], row["error"]["type"]) == ([0.125, 0.25, 0.75], "Truncated")
    assert (row["start_s"], row["end_s"], row["duration_s"]) == (1.0, 3.5, 1.5)
    summary = summary_of(destination(tmp_path))
    assert (summary.clips, summary.failed, summary.partial) == (2, 1, 1)
    assert summary.failures["decode/Truncated"] == 1
