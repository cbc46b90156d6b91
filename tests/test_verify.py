"""`earmark verify`: an output recounted from its inputs, and all that can be wrong with it."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from bench.stand_ins import CloudStorage
from pipeline.cli import cli
from pipeline.verify import verify_output
from transforms.recount import read_ids, recount
from transforms.shards import plan_shards
from transforms.write import RUN_KEY, SHARD_KEY


def earmark(*arguments):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, make_tar, encoded, noise):
    """A tar with a broken clip, a link's worth of names, one that is cut, a Parquet file, loose files."""
    folder = tmp_path_factory.mktemp("inputs")
    wavs = [encoded(noise(4_000 + 3_000 * n, seed=n)) for n in range(4)]
    make_tar(
        folder / "a.tar",
        [
            ("x/one.wav", wavs[0]),
            ("x/one.json", b"{}"),
            ("x/one.wav", wavs[1]),
            ("bad.ogg", b"OggS"),
            ("two.b.wav", wavs[2]),
            ("notes.pdf", b"%"),
        ],
    )
    whole = make_tar(folder / "cut.tar", [("p.wav", wavs[0]), ("q.wav", wavs[1])]).read_bytes()
    (folder / "cut.tar").write_bytes(whole[: len(wavs[0]) + 1_600])
    make_tar(folder / "z.tar.gz", [("p.wav", wavs[0]), ("q.wav", wavs[1])], "w:gz")
    cells = [{"bytes": wavs[0], "path": "k.wav"}, {"bytes": wavs[1], "path": None}, None]
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({"audio": pa.array(cells, struct)}), folder / "t.parquet")
    for name in ("loose/u.wav", "loose/deep/v.wav"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(wavs[3])
    return folder


@pytest.fixture(scope="module")
def annotated(inputs, tmp_path_factory, tiny_checkpoint):
    """Their output. Do not change it."""
    output = tmp_path_factory.mktemp("annotated") / "out"
    done = earmark("annotate", inputs, "-o", output, "--checkpoint", tiny_checkpoint, "--chunks")
    assert done.exit_code == 0, done.output
    return output


@pytest.fixture
def output(annotated, tmp_path):
    """A copy, to be damaged."""
    return Path(shutil.copytree(annotated, tmp_path / "copy"))


def problems(output, *options, **more):
    return verify_output(str(output), *options, **more).named


def file_of(output, stem):
    (file,) = (output / "clips").glob(f"{stem}-*.parquet")
    return file


def rewrite(file, change, totals=lambda totals: totals):
    """Writes a file anew with `change` applied to its rows, and its metadata as it was."""
    metadata = pq.read_metadata(file).metadata
    table = pq.read_table(file)
    rows = table.to_pylist()
    change(rows)
    new = pa.Table.from_pylist(rows, table.schema.remove_metadata())
    stated = json.loads(metadata[SHARD_KEY])
    totals(stated)
    with pq.ParquetWriter(file, new.schema) as writer:
        writer.write_table(new)
        writer.add_key_value_metadata(
            {
                **{k: v for k, v in metadata.items() if k != b"ARROW:schema"},
                SHARD_KEY: json.dumps(stated),
            }
        )


def test_what_annotate_wrote_is_as_it_should_be(annotated):
    done = earmark("verify", annotated)
    assert done.exit_code == 0, done.output
    assert done.output.strip() == (
        f"Verified {annotated}: 13 clips in 5 shards, 10 scored and 3 failed; each clip of the inputs once."
    )
    for option in ("--audio", "--quick"):
        done = earmark("verify", annotated, option)
        assert done.exit_code == 0 and "13 clips in 5 shards" in done.output, done.output
    stated = json.loads(earmark("verify", annotated, "--json").output)
    assert stated["good"] and stated["clips"] == 13 and stated["input_shards"] == 5


def test_clips_are_named_without_decoding_as_they_are_with(inputs):
    shards = plan_shards([str(inputs)]).shards
    assert {shard.kind for shard in shards} == {"tar", "parquet", "files"}
    for shard in shards:
        assert sorted(recount(shard)) == sorted(clip_id for clip_id, _ in read_ids(shard))


def test_a_tars_audio_is_not_read(tmp_path, make_tar, monkeypatch):
    tar = make_tar(tmp_path / "a.tar", [(f"{n}.wav", b"\0" * 100_000) for n in range(10)])
    (shard,) = plan_shards([str(tar)]).shards
    monkeypatch.setattr("transforms.recount.read_clips", None)
    assert len(recount(shard)) == 10


def test_shards_without_a_file_and_files_without_a_shard(output, inputs):
    file_of(output, "cut").unlink()
    assert list(problems(output)) == ["missing shard", "totals"]
    assert "cut.tar" in problems(output)["missing shard"][0]
    found = problems(output, (str(inputs / "a.tar"),))
    assert len(found["foreign file"]) == 3 and "missing shard" not in found
    assert problems(output, quick=True).keys() == {"missing shard", "totals"}


def test_a_run_with_other_inputs_into_the_same_output(
    output, tmp_path, make_tar, encoded, noise, tiny_checkpoint
):
    more = make_tar(tmp_path / "more.tar", [("m.wav", encoded(noise(5_000)))])
    asked = ("--checkpoint", tiny_checkpoint, "--chunks")
    assert earmark("annotate", more, "-o", output, *asked).exit_code == 0
    done = earmark("verify", output)
    assert done.exit_code == 0, done.output
    assert "Note: 1 shards are not of the inputs that run.json names" in done.output
    assert "14 clips in 6 shards" in done.output


def test_a_later_run_with_a_glob_of_loose_files(output, tmp_path, encoded, noise, tiny_checkpoint):
    folder = tmp_path / "f"
    folder.mkdir()
    for name in ("00.wav", "01.wav", "10.wav"):
        (folder / name).write_bytes(encoded(noise(5_000)))
    asked = ("-o", output, "--checkpoint", tiny_checkpoint, "--chunks")
    assert earmark("annotate", folder / "0*.wav", *asked).exit_code == 0
    done = earmark("verify", output)
    assert done.exit_code == 0, done.output
    assert "Note: 1 files are of loose files that no input of run.json names" in done.output
    assert len(problems(output, (str(folder),))["foreign file"]) == 6


def test_a_folder_with_one_file_less_is_not_what_was_annotated(
    tmp_path, encoded, noise, tiny_checkpoint
):
    folder = tmp_path / "f"
    folder.mkdir()
    for name in ("a.wav", "b.wav"):
        (folder / name).write_bytes(encoded(noise(5_000)))
    asked = ("-o", tmp_path / "out", "--checkpoint", tiny_checkpoint)
    assert earmark("annotate", folder, *asked).exit_code == 0
    (folder / "b.wav").unlink()
    assert problems(tmp_path / "out").keys() == {"missing shard", "foreign file"}


def test_relative_places_begin_where_the_run_began(
    tmp_path, monkeypatch, encoded, noise, tiny_checkpoint
):
    began, elsewhere = tmp_path / "began", tmp_path / "elsewhere"
    for folder in (began / "deep", began / "audio", elsewhere):
        folder.mkdir(parents=True)
    for name in ("audio/a.wav", "audio/b.wav", "deep/c.wav"):
        (began / name).write_bytes(encoded(noise(5_000)))
    (began / "audio/b.wav").write_bytes(b"nothing")
    (began / "clips.csv").write_text("path\na.wav\nb.wav\n")
    (began / "lists.txt").write_text("clips.csv\ndeep\n")
    monkeypatch.chdir(began)
    done = earmark("annotate", "--inputs-from", "lists.txt", "--audio-root", "audio",
                   "-o", tmp_path / "out", "--checkpoint", tiny_checkpoint)  # fmt: skip
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "out/run.json").read_text())["started_in"] == str(began)
    monkeypatch.chdir(elsewhere)
    found = verify_output(str(tmp_path / "out"), audio=True)
    assert not found.named and not found.notes and found.compared == 2
    (began / "audio/b.wav").write_bytes(encoded(noise(6_000)))
    done = earmark("retry", tmp_path / "out")
    assert done.exit_code == 0 and "1 got scores" in done.output, done.output
    done = earmark("query", tmp_path / "out", "--extract", "cut")
    assert done.exit_code == 0, done.output
    assert len(list((elsewhere / "cut").glob("*.flac"))) == 3


@pytest.mark.parametrize("kept", [0.2, 0.9, 0.999])
def test_a_file_that_is_cut(output, kept):
    file = file_of(output, "a")
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * kept)])
    assert list(problems(output)) == ["unreadable"]
    assert earmark("verify", output, "--quick").exit_code == 1


def test_a_file_that_is_damaged_before_its_footer(output):
    file = file_of(output, "a")
    content = bytearray(file.read_bytes())
    content[200:5_000] = b"\xaa" * 4_800
    file.write_bytes(content)
    assert "unreadable" in problems(output)
    assert not problems(output, quick=True)  # which is what it says


def set_score(rows):
    rows[0]["scores"][3] = 1.5


def set_nan(rows):
    rows[0]["scores"][3] = float("nan")


def drop_tag(rows):
    del rows[0]["tags"][0]


def raise_score(rows):
    low = int(np.argmin(rows[0]["scores"]))
    rows[0]["scores"][low] = 0.99


def drop_scores(rows):
    rows[0]["scores"] = [None] * 527


def drop_a_score(rows):
    rows[0]["scores"][5] = None


def wrong_chunk(rows):
    rows[0]["chunks"][0]["scores"][0] = -0.5


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (set_score, "is 1.5"),
        (set_nan, "is nan"),
        (drop_tag, "its tags are not those of its scores and thresholds"),
        (raise_score, "its tags are not those of its scores and thresholds"),
        (drop_scores, "it has neither scores nor an error"),
        (drop_a_score, "1 of its scores are null"),
        (wrong_chunk, "a score of a chunk is not within 0 and 1"),
    ],
)
def test_rows_that_contradict_themselves(output, change, said):
    rewrite(file_of(output, "a"), change)
    found = problems(output)
    assert any(said in what for what in found["row"]), found
    assert not problems(output, quick=True)


def test_rows_lost_doubled_and_of_nowhere(output):
    def change(rows):
        rows[0] = rows[1]  # one.wav is lost, one.wav#2 doubled
        rows[2]["clip_id"] = rows[2]["clip_id"].replace("bad.ogg", "else.ogg")

    rewrite(file_of(output, "a"), change)
    found = problems(output)
    assert [clip.rpartition("/")[2] for clip in sorted(found["missing clip"])] == [
        "bad.ogg",
        "one.wav",
    ]
    assert [clip.rpartition("/")[2] for clip in found["foreign row"]] == ["else.ogg"]
    assert ["one.wav#2 (2 rows)" in clip for clip in found["double row"]] == [True]


def test_a_row_that_is_gone_and_totals_that_know_it(output):
    rewrite(file_of(output, "a"), lambda rows: rows.pop())
    found = problems(output)
    assert len(found["missing clip"]) == 1 and found["totals"]

    def fewer(totals):
        totals["clips"] -= 1

    rewrite(file_of(output, "a"), lambda rows: None, fewer)
    assert "missing clip" in problems(output)


def test_totals_that_are_wrong(output):
    def change(totals):
        totals["tags"] = {"Dog": 1}
        totals["audio_s"] += 1

    rewrite(file_of(output, "z"), lambda rows: None, change)
    found = problems(output)["totals"]
    assert any("audio_s" in what for what in found) and any(
        "tags of its footer" in w for w in found
    )
    summary = json.loads((output / "summary.json").read_text())
    (output / "summary.json").write_text(json.dumps(summary | {"clips": 12}))
    assert any("clips is 12, the files add up to 13" in what for what in problems(output)["totals"])


def test_a_file_of_another_making(output):
    file = file_of(output, "z")
    metadata = pq.read_metadata(file).metadata
    table = pq.read_table(file).replace_schema_metadata(None)
    run = json.loads(metadata[RUN_KEY]) | {"fingerprint": "0" * 64}
    with pq.ParquetWriter(file, table.schema) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({RUN_KEY: json.dumps(run), SHARD_KEY: metadata[SHARD_KEY]})
    assert list(problems(output)) == ["making"]
    assert list(problems(output, quick=True)) == ["making"]


def test_a_run_file_that_was_changed(output):
    run = json.loads((output / "run.json").read_text())
    changed = run | {"scoring": run["scoring"] | {"pool": "mean"}}
    (output / "run.json").write_text(json.dumps(changed))
    assert "run" in problems(output)
    (output / "run.json").write_text(json.dumps(run | {"thresholds": {}}))
    done = earmark("verify", output)
    assert done.exit_code == 2 and "names other thresholds" in done.output


def test_audio_that_changed_without_a_trace(tmp_path, tiny_checkpoint, make_tar, encoded, noise):
    tar = make_tar(tmp_path / "a.tar", [("a.wav", encoded(noise(8_000, seed=1)))])
    stat = tar.stat()
    assert (
        earmark("annotate", tar, "-o", tmp_path / "out", "--checkpoint", tiny_checkpoint).exit_code
        == 0
    )
    make_tar(tar, [("a.wav", encoded(noise(8_000, seed=2)))])
    os.utime(tar, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert not problems(tmp_path / "out")
    assert list(problems(tmp_path / "out", audio=True)) == ["changed audio"]


def test_audio_that_is_gone_is_told_where_audio_is_looked_at(
    tmp_path, tiny_checkpoint, encoded, noise
):
    for number in range(2):
        (tmp_path / f"{number}.wav").write_bytes(encoded(noise(8_000, seed=number)))
    (tmp_path / "clips.csv").write_text("path\n0.wav\n1.wav\nnever.wav\n")
    asked = ("-o", tmp_path / "out", "--checkpoint", tiny_checkpoint)
    assert earmark("annotate", tmp_path / "clips.csv", *asked).exit_code == 0
    assert not problems(tmp_path / "out", audio=True)
    (tmp_path / "1.wav").unlink()
    assert not problems(tmp_path / "out")
    (told,) = problems(tmp_path / "out", audio=True)["changed audio"]
    assert told.endswith("/1.wav (it cannot be read)")


def test_a_parquet_file_with_a_damaged_page_has_a_row_for_it(
    tmp_path, tiny_checkpoint, encoded, noise
):
    cells = [{"bytes": encoded(noise(8_000, seed=n)), "path": f"{n}.wav"} for n in range(6)]
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    file = tmp_path / "t.parquet"
    table = pa.table({"audio": pa.array(cells, struct)})
    pq.write_table(table, file, row_group_size=2, compression="zstd", use_dictionary=False)
    page = pq.read_metadata(file).row_group(1).column(0)
    content = bytearray(file.read_bytes())
    end = page.data_page_offset + page.total_compressed_size
    content[page.data_page_offset + 40 : end] = b"\xaa" * (end - page.data_page_offset - 40)
    file.write_bytes(content)
    asked = ("-o", tmp_path / "out", "--checkpoint", tiny_checkpoint)
    assert earmark("annotate", file, *asked).exit_code == 0
    found = verify_output(str(tmp_path / "out"))
    assert not found.named and found.total.clips == 5 and found.total.failed == 1
    assert not problems(tmp_path / "out", audio=True)


def test_segments_need_no_chunks_to_be_verified(tmp_path, inputs, tiny_checkpoint):
    asked = ("-o", tmp_path / "out", "--checkpoint", tiny_checkpoint, "--segments")
    assert earmark("annotate", inputs / "a.tar", *asked).exit_code == 0
    assert not problems(tmp_path / "out")


def test_inputs_that_are_gone(output, inputs, tmp_path):
    run = json.loads((output / "run.json").read_text())
    (output / "run.json").write_text(json.dumps(run | {"inputs": [str(tmp_path / "gone")]}))
    done = earmark("verify", output)
    assert done.exit_code == 0, done.output
    assert "Note: an input is gone" in done.output and "does not exist" in done.output
    # The files say where their shards were, and there they are.
    assert "5 shards are not of the inputs that run.json names" in done.output
    rewrite(file_of(output, "a"), set_score)
    assert earmark("verify", output).exit_code == 1
    assert earmark("verify", output, tmp_path / "gone").exit_code == 2
    assert earmark("verify", output, inputs).exit_code == 1


def test_no_more_than_so_many_are_named(output):
    def change(rows):
        for row in rows:
            row["clip_id"] += "\x1b[31m"

    rewrite(file_of(output, "a"), change)
    done = earmark("verify", output, "--show", 2)
    assert done.exit_code == 1 and "and 2 more" in done.output
    assert "\x1b" not in done.output and "\\x1b[31m" in done.output
    stated = json.loads(earmark("verify", output, "--show", 1, "--json").output)
    assert stated["problems"]["foreign row"]["count"] == 4
    assert len(stated["problems"]["foreign row"]["named"]) == 1


def test_an_output_in_the_cloud(tmp_path, inputs, earmark):
    with CloudStorage("in", "out") as cloud:
        for name in ("a.tar", "cut.tar", "t.parquet"):
            cloud.put("in", name, (inputs / name).read_bytes())
        earmark(cloud.env, "annotate", "gs://in/", "--output", "gs://out/o")
        said = earmark(cloud.env, "verify", "gs://out/o")
        assert "in 3 shards" in said and "each clip of the inputs once" in said
        said = earmark(cloud.env, "verify", "gs://out/o", "--audio")
        name = next(n for n in cloud.names("out") if n.startswith("o/clips/cut"))
        cloud.delete("out", name)
        assert "1 shards of the inputs without a file" in earmark(
            cloud.env, "verify", "gs://out/o", code=1
        )


def test_what_is_no_output(tmp_path):
    assert earmark("verify", tmp_path).exit_code == 2
    assert earmark("verify", tmp_path, "--quick", "--audio").exit_code == 2
