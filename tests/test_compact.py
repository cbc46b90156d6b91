"""`earmark compact`: the same rows in few files, which all that reads an output reads."""

import io
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from bench.stand_ins import CloudStorage, Faults
from pipeline.cli import cli
from transforms import compact as compacting
from transforms.row_hash import hash_rows
from transforms.write import ShardSummary, count_row, read_footer

ROOT = Path(__file__).parent.parent


def run(*arguments, code=0):
    done = CliRunner().invoke(cli, [*map(str, arguments)])
    assert done.exit_code == code, done.output
    assert "Traceback" not in done.output
    return done.output


@pytest.fixture(scope="module")
def tags(tmp_path_factory, tiny_checkpoint, make_tar, encoded, noise):
    """Three shards with chunks, segments and embeddings; a clip fails, one counts in part."""
    folder = tmp_path_factory.mktemp("compact")
    sound = [encoded((0.1 + n) * noise(9_000 * (1 + n), seed=n)) for n in range(7)]
    make_tar(folder / "b.tar", [("z.wav", sound[0]), ("a.wav", sound[1]), ("ü.wav", sound[2])])
    make_tar(folder / "a.tar", [("x.wav", sound[3]), ("broken.ogg", b"OggS, and no more")])
    cut = encoded(noise(64_000), format="flac")[:-9_000]
    make_tar(folder / "a-b.tar", [("cut.flac", cut), ("x.wav", sound[5]), ("x.wav", sound[6])])
    run("annotate", folder, "--output", folder / "tags", "--checkpoint", tiny_checkpoint,
        "--chunks", "--segments", "--embeddings", "--threshold", 0.9)  # fmt: skip
    return folder / "tags"


@pytest.fixture(scope="module")
def compacted(tags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compacted") / "tags"
    run("compact", tags, "--to", folder)
    return folder


def rows_of(output):
    files = sorted((Path(output) / "clips").glob("*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def by_id(rows):
    return sorted(rows, key=lambda row: row["clip_id"])


# ------------------------------------------------------------------------ the rows


def test_the_rows_are_the_same_and_sorted(tags, compacted):
    rows = rows_of(compacted)
    assert rows == by_id(rows_of(tags)) and len(rows) == 8
    assert sum(row["error"] is not None for row in rows) == 2
    assert [file.name for file in (compacted / "clips").iterdir()] == ["part-00000.parquet"]
    assert sorted(file.name for file in compacted.iterdir()) == [
        "clips", "labels.parquet", "run.json", "summary.json"
    ]  # fmt: skip


def test_the_schema_is_the_same_and_a_missing_vector_a_list_of_nulls(tags, compacted):
    (part,) = (compacted / "clips").iterdir()
    for file in (tags / "clips").iterdir():
        assert pq.read_schema(part).remove_metadata() == pq.read_schema(file).remove_metadata()
        assert pq.ParquetFile(part).schema.equals(pq.ParquetFile(file).schema)
    (failed,) = (row for row in rows_of(compacted) if row["tags"] is None)
    assert set(failed["scores"]) == {None} and len(failed["scores"]) == 527


def test_metadata_and_totals(tags, compacted):
    from transforms.output import LocalOutput

    (part,) = (compacted / "clips").iterdir()
    metadata = pq.read_metadata(part).metadata
    assert json.loads(metadata[b"earmark.run"]) == json.loads((compacted / "run.json").read_text())
    footer = read_footer(LocalOutput(str(compacted)), "clips/part-00000.parquet")
    counted = ShardSummary()
    for row in rows_of(compacted):
        count_row(counted, row)
    assert compacting.differing(footer.summary, counted) == []
    assert footer.summary.partial == footer.summary.failed == 1
    before, after = (json.loads((p / "run.json").read_text()) for p in (tags, compacted))
    origin = {"output": str(tags), "id": before["id"], "fingerprint": before["fingerprint"]}
    assert after["compacted"]["from"] == origin and after["compacted"]["clips"] == 8
    assert after["id"] != before["id"]
    assert (tags / "summary.json").read_bytes() == (compacted / "summary.json").read_bytes()
    assert pq.read_table(tags / "labels.parquet") == pq.read_table(compacted / "labels.parquet")


def test_small_targets_give_many_files(tags, tmp_path):
    done = json.loads(run("compact", tags, "--to", tmp_path / "t", "--target-mb", 0.02, "--json"))
    assert len(done["files"]) > 2 and done["rows"] == 8 and done["files_before"] == 3
    for file in done["files"]:
        assert (tmp_path / "t" / file["name"]).stat().st_size == file["bytes"]
    assert rows_of(tmp_path / "t") == by_id(rows_of(tags))
    again = json.loads(run("compact", tmp_path / "t", "--to", tmp_path / "u", "--json"))
    assert len(again["files"]) == 1 and again["rows_xxh3"] == done["rows_xxh3"]
    made = json.loads((tmp_path / "u" / "run.json").read_text())
    assert made["compacted"]["from"]["output"] == str(tags)


def shuffled(tags, target, rows_per_group):
    """A copy of an output whose rows lie across files and row groups without any order."""
    shutil.copytree(tags, target)
    files = sorted((target / "clips").iterdir())
    tables = [pq.read_table(file) for file in files]
    together = pa.concat_tables(table.replace_schema_metadata(None) for table in tables)
    together = together.take(np.random.default_rng(5).permutation(len(together)))
    for n, (file, table) in enumerate(zip(files, tables, strict=True)):
        metadata = pq.read_metadata(file).metadata
        own = together.slice(n * len(together) // len(files))
        own = own.slice(0, (n + 1) * len(together) // len(files) - n * len(together) // len(files))
        counted = ShardSummary()
        for row in own.to_pylist():
            count_row(counted, row)
        with pq.ParquetWriter(file, table.schema.remove_metadata()) as writer:
            writer.write_table(own, row_group_size=rows_per_group)
            writer.add_key_value_metadata(
                {
                    "earmark.run": metadata[b"earmark.run"],
                    "earmark.shard": json.dumps(vars(counted)),
                }
            )
    return target


@pytest.mark.parametrize("rows_per_group", [1, 2, 100])
def test_runs_that_overlap_are_merged(tags, tmp_path, monkeypatch, rows_per_group):
    monkeypatch.setattr(compacting, "_ROWS_AT_ONCE", 3)
    source = shuffled(tags, tmp_path / "source", rows_per_group)
    assert rows_of(source) != by_id(rows_of(tags))
    run("compact", source, "--to", tmp_path / "t")
    assert rows_of(tmp_path / "t") == by_id(rows_of(tags))


def test_rows_without_order_need_little_memory(tmp_path):
    """All 60,000 rows, 130 MB of scores, of which each row group has some everywhere."""
    code = """
import json, os, resource
import numpy as np, pyarrow as pa, pyarrow.parquet as pq
from transforms.compact import Rows, plan, write_parts
from transforms.output import LocalOutput
from transforms.write import RowOptions, ShardSummary, clips_schema
schema = clips_schema(527, 1, RowOptions((0.5,) * 527))
rows, groups = 60_000, 20
rng = np.random.default_rng(0)
ids = np.array([f"s/{n:08d}.wav" for n in range(rows)])[rng.permutation(rows)]
run = json.dumps({"fingerprint": "f"})
with pq.ParquetWriter("s.parquet", schema, compression="zstd") as writer:
    for some in np.array_split(ids, groups):
        n = len(some)
        columns = [pa.nulls(n, f.type) for f in schema]
        columns[0] = pa.array(some, pa.string())
        columns[1] = pa.array(["s"] * n)
        columns[schema.get_field_index("scores")] = pa.FixedSizeListArray.from_arrays(
            pa.array(rng.random(n * 527, np.float32)), 527)
        writer.write_table(pa.table(columns, schema=schema))
    summary = ShardSummary(clips=rows)
    writer.add_key_value_metadata({"earmark.run": run, "earmark.shard": json.dumps(vars(summary))})
os.mkdir("clips"); os.rename("s.parquet", "clips/s.parquet")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
planned = plan(LocalOutput("."), ["clips/s.parquet"], "f")
assert [len(c) for c in planned.clusters] == [groups]
read = Rows(LocalOutput("."), planned)
parts = list(write_parts(read, planned.schema, LocalOutput("to"), run, 1 << 25))
assert sum(p.digest for p in parts) % 2**64 == read.digest and read.rows == rows
ordered = [i for p in parts for i in pq.read_table("to/" + p.name, columns=["clip_id"])["clip_id"].to_pylist()]
assert ordered == sorted(ids)
print(len(parts), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    parts, more_mib = done.stdout.split()
    assert int(parts) > 2
    assert float(more_mib) < 450


def test_row_groups_are_of_a_size_that_engines_like():
    small = pa.table({"n": np.arange(300_000)})
    groups = list(compacting._groups([small.slice(0, 7), small.slice(7)], 64 << 20))
    assert [len(group) for group in groups] == [122_880, 122_880, 54_240]
    assert pa.concat_tables(groups) == small
    large = pa.table(
        {"v": pa.FixedSizeListArray.from_arrays(np.zeros(40_000 * 527, np.float32), 527)}
    )
    pieces = [large.slice(at, 8_192) for at in range(0, 40_000, 8_192)]
    groups = list(compacting._groups(pieces, 64 << 20))
    assert sum(map(len, groups)) == 40_000
    for group in groups[:-1]:
        assert 60 << 20 < group.nbytes < 68 << 20


# ------------------------------------------------------------------------ what reads it


def test_every_reader_reads_it(tags, compacted, tmp_path):
    sql = "SELECT clip_id, score('Dog') AS s, len(tags) AS n FROM clips ORDER BY clip_id"
    queries = [run("query", place, sql, "--format", "csv") for place in (tags, compacted)]
    assert queries[0] == queries[1]
    run("export", tags, "--csv", tmp_path / "a.csv")
    run("export", compacted, "--csv", tmp_path / "b.csv")
    assert sorted((tmp_path / "a.csv").read_text().splitlines()) == sorted(
        (tmp_path / "b.csv").read_text().splitlines()
    )
    run("report", compacted, "--to", tmp_path / "report.html")
    run("schema", compacted, "--dialect", "bigquery")


def test_retag_of_it_is_that_of_the_source(tags, compacted, tmp_path):
    run("retag", tags, "--output", tmp_path / "a", "--threshold", 0.5)
    run("retag", compacted, "--output", tmp_path / "b", "--threshold", 0.5)
    run("retag", compacted, "--output", tmp_path / "b", "--threshold", 0.5)
    assert by_id(rows_of(tmp_path / "a")) == rows_of(tmp_path / "b")
    assert "1 file" in run("verify", tmp_path / "b")


def test_annotate_and_retry_into_it_are_refused(tags, compacted, tiny_checkpoint):
    before = sorted(compacted.rglob("*"))
    said = run("annotate", tags.parent, "--output", compacted, "--checkpoint", tiny_checkpoint,
               "--chunks", "--segments", "--embeddings", "--threshold", 0.9, code=2)  # fmt: skip
    assert "was made by earmark compact" in said and str(tags) in said
    assert "was made by earmark compact" in run("retry", compacted, code=2)
    assert "was made by earmark compact" in run(
        "retag", tags, "--output", compacted, "--threshold", 0.9, code=2
    )
    assert sorted(compacted.rglob("*")) == before


def test_verify_checks_rows_and_totals(tags, compacted, tmp_path):
    said = run("verify", compacted)
    assert "8 clips in 1 file" in said and "not compared with the inputs" in said
    assert str(tags) in said
    assert "verify the output that it was made of" in run("verify", compacted, "--audio", code=2)
    assert "no shards'" in run("verify", compacted, tags.parent, code=2)
    run("compact", tags, "--to", tmp_path / "t", "--target-mb", 0.02)
    (tmp_path / "t" / "clips" / "part-00001.parquet").unlink()
    said = run("verify", tmp_path / "t", code=1)
    assert "8 clips were compacted" in said
    damaged = tmp_path / "damaged"
    shutil.copytree(compacted, damaged)
    (part,) = (damaged / "clips").iterdir()
    table = pq.read_table(part)
    metadata = {k: v for k, v in pq.read_metadata(part).metadata.items() if k != b"ARROW:schema"}
    with pq.ParquetWriter(part, table.schema.remove_metadata()) as writer:
        writer.write_table(table.take(list(range(7, -1, -1))))
        writer.add_key_value_metadata(metadata)
    assert "the rows are not sorted" in run("verify", damaged, code=1)


# ------------------------------------------------------------------------ whole or not at all


def test_what_was_interrupted_begins_anew(tags, compacted, tmp_path, monkeypatch):
    target = tmp_path / "t"
    wanted = json.loads(run("compact", tags, "--to", tmp_path / "w", "--target-mb", 0.02, "--json"))
    real, calls = compacting._read_again, []

    def fails(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(compacting, "_read_again", fails)
    said = run("compact", tags, "--to", target, "--target-mb", 0.02, code=1)
    assert "No space left" in said and "is no output until it is whole" in said
    assert len(list((target / "clips").iterdir())) == 2 and not (target / "run.json").exists()
    assert "holds no run.json" in run("query", target, "FROM clips", code=2)
    monkeypatch.undo()
    run("compact", tags, "--to", target)
    assert [file.name for file in (target / "clips").iterdir()] == ["part-00000.parquet"]
    assert rows_of(target) == rows_of(compacted) and not (target / "compacting.json").exists()
    assert wanted["rows"] == 8


def test_another_one_that_began_later_wins(tags, tmp_path, monkeypatch):
    target = tmp_path / "t"
    real = compacting._read_again

    def meanwhile(*arguments):
        monkeypatch.undo()
        run("compact", tags, "--to", target)
        return real(*arguments)

    monkeypatch.setattr(compacting, "_read_again", meanwhile)
    assert "another compaction" in run("compact", tags, "--to", target, code=1)
    assert rows_of(target) == by_id(rows_of(tags))


def test_places_that_are_refused(tags, compacted, tmp_path):
    assert "is OUTPUT or inside" in run("compact", tags, "--to", tags, code=2)
    assert "is OUTPUT or inside" in run("compact", tags, "--to", tags / "x", code=2)
    assert "holds an output already" in run("compact", tags, "--to", compacted, code=2)
    (tmp_path / "mine" / "clips").mkdir(parents=True)
    (tmp_path / "mine" / "clips" / "photo.jpg").write_bytes(b"x")
    assert "did not make" in run("compact", tags, "--to", tmp_path / "mine", code=2)
    assert (tmp_path / "mine" / "clips" / "photo.jpg").exists()
    assert "holds no run.json" in run("compact", tmp_path / "mine", "--to", tmp_path / "t", code=2)
    assert "is empty" in run("compact", tags, "--to", "", code=2)
    assert not (tmp_path / "t").exists()


def test_a_damaged_source_is_told_of(tags, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(tags, source)
    file = sorted((source / "clips").iterdir())[0]
    content = bytearray(file.read_bytes())
    content[1_000:1_400] = os.urandom(400)
    file.write_bytes(content)
    assert file.name in run("compact", source, "--to", tmp_path / "t", code=2)
    file.write_bytes(content[:-50])
    assert file.name in run("compact", source, "--to", tmp_path / "u", code=2)
    assert not (tmp_path / "u").exists() and not (tmp_path / "t" / "run.json").exists()


def test_a_row_that_is_written_otherwise_is_noticed(tags, tmp_path, monkeypatch):
    real = compacting._groups

    def altered(tables, limit):
        for table in real(tables, limit):
            at = table.schema.get_field_index("rms_dbfs")
            values = table["rms_dbfs"].to_pylist()
            values[0] = 1.0
            yield table.set_column(at, table.schema.field(at), pa.array(values, pa.float32()))

    monkeypatch.setattr(compacting, "_groups", altered)
    said = run("compact", tags, "--to", tmp_path / "t", code=2)
    assert "rows with the hash" in said and not (tmp_path / "t" / "run.json").exists()


def test_a_bucket(tags, compacted, tmp_path, earmark):
    with CloudStorage("b") as cloud:
        for file in tags.rglob("*"):
            if file.is_file():
                cloud.put("b", f"tags/{file.relative_to(tags)}", file.read_bytes())
        cloud.faults = Faults(rate=0.1, kinds=("503", "reset", "short"), seed=1)
        earmark(cloud.env, "compact", "gs://b/tags", "--to", "gs://b/few")
        earmark(cloud.env, "compact", "gs://b/few", "--to", tmp_path / "t")
    assert rows_of(tmp_path / "t") == rows_of(compacted)


# ------------------------------------------------------------------------ the hash of rows


def a_table(**changes):
    columns = {
        "s": pa.array(["a", None, "", "ü"]),
        "f": pa.array([1.5, None, float("nan"), 0.0]),
        "h": pa.array(np.array([1, 2, 3, 4], np.float16)),
        "l": pa.array([[{"n": 1, "t": "x"}], None, [], [{"n": None, "t": None}, None]],
                      pa.list_(pa.struct([("n", pa.int16()), ("t", pa.string())]))),
        "v": pa.array([[1.0, 2.0], [None, None], [0.0, 1.0], [2.0, None]], pa.list_(pa.float32(), 2)),
        "c": pa.array([[{"v": [1.0, 2.0]}], [], None, [{"v": [None, 1.0]}, {"v": [3.0, 4.0]}]],
                      pa.list_(pa.struct([("v", pa.list_(pa.float32(), 2))]))),
    }  # fmt: skip
    return pa.table(columns | changes)


def test_the_hash_is_that_of_the_rows_whatever_their_order():
    table = a_table()
    whole = hash_rows(table)
    assert hash_rows(table.take([2, 0, 3, 1])) == whole
    parts = [table.slice(0, 1), table.slice(1, 2), table.slice(3)]
    assert sum(map(hash_rows, parts)) % 2**64 == whole
    assert hash_rows(pa.concat_tables(parts)) == whole
    stored = io.BytesIO()
    pq.write_table(table, stored, row_group_size=2)
    assert hash_rows(pq.read_table(stored)) == whole
    assert hash_rows(table.slice(0, 0)) == 0


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("s", ["a", "", "", "ü"]),
        ("s", ["a", None, "", "u"]),
        ("f", [1.5, 0.0, float("nan"), 0.0]),
        ("f", [1.5, None, float("nan"), -0.0]),
        ("h", [1, 2, 3, 5]),
        ("l", [[{"n": 1, "t": "x"}], [], [], [{"n": None, "t": None}, None]]),
        ("l", [[{"n": 1, "t": "x"}], None, [], [{"n": None, "t": None}]]),
        ("l", [[{"n": 1, "t": "x"}], None, [], [None, None]]),
        ("v", [[1.0, 2.0], [0.0, 0.0], [0.0, 1.0], [2.0, None]]),
        ("v", [[1.0, 2.0], [None, None], [0.0, 1.0], [2.0, 0.0]]),
        ("c", [[{"v": [1.0, 2.0]}], None, None, [{"v": [None, 1.0]}, {"v": [3.0, 4.0]}]]),
        ("c", [[{"v": [1.0, 2.0]}], [], None, [{"v": [0.0, 1.0]}, {"v": [3.0, 4.0]}]]),
    ],
)
def test_one_value_changes_the_hash(column, values):
    table = a_table()
    changed = a_table(**{column: pa.array(values, table.schema.field(column).type)})
    assert hash_rows(changed) != hash_rows(table)


def test_rows_that_swap_a_value_change_the_hash():
    table = a_table()
    swapped = a_table(s=pa.array(["ü", None, "", "a"]))
    assert hash_rows(swapped) != hash_rows(table)
    assert Counter(swapped["s"].to_pylist()) == Counter(table["s"].to_pylist())
