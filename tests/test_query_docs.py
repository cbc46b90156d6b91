"""docs/query.md: its definitions are the generated ones, its SQL parses, and what can run here runs."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sqlglot
from click.testing import CliRunner
from sqlglot import exp

from pipeline.cli import cli
from pipeline.schema import (
    DIALECTS,
    TABLES,
    clips_schema_of,
    labels_schema,
    table_definition,
)

ROOT = Path(__file__).parent.parent
DOCUMENT = (ROOT / "docs" / "query.md").read_text("utf-8")
BLOCKS = re.findall(r"```sql (\w+)\n(.*?)```", DOCUMENT, flags=re.DOTALL)
PYTHON = re.findall(r"```python\n(.*?)```", DOCUMENT, flags=re.DOTALL)
DEFINITION = re.compile(r"(CREATE (?:OR REPLACE )?EXTERNAL TABLE|CREATE TABLE|LOAD DATA)\b")

NO_MORE = {"chunks": False, "embeddings": False, "score_type": "float32"}
EVERYTHING = {"chunks": True, "segments": True, "embeddings": True, "score_type": "float32"}


def run_of(scoring):
    return {"checkpoint": {"labels": 527}, "scoring": scoring}


def queries(dialect):
    """The five that every output answers."""
    return [sql for sql in every_query(dialect) if "(segments)" not in sql]


def every_query(dialect):
    return [sql for tag, sql in BLOCKS if tag == dialect and sql.startswith("SELECT")]


def of_segments(dialect):
    """The one that needs --segments."""
    (sql,) = (sql for sql in every_query(dialect) if "(segments)" in sql)
    return sql


# ------------------------------------------------------------------- the page


def test_every_block_parses_in_its_dialect():
    assert {tag for tag, _ in BLOCKS} == {"bigquery", "athena", "trino", "duckdb"}
    for tag, sql in BLOCKS:
        for statement in sqlglot.parse(sql, read=tag):
            assert not isinstance(statement, exp.Command), f"only passed through: {sql}"
            assert not list(statement.find_all(exp.Anonymous)), f"unknown function in {sql}"
    for sql in every_query("trino"):  # the page says that Athena takes them too
        sqlglot.parse_one(sql, read="athena")


def test_definitions_on_the_page_are_the_generated_ones():
    shown = {sql for _, sql in BLOCKS if DEFINITION.match(sql)}
    generated = {
        dialect + "/" + table: table_definition(
            run_of(NO_MORE), f"{scheme}://BUCKET/tags", dialect, table
        )
        for dialect, scheme in [
            ("bigquery", "gs"), ("bigquery-load", "gs"), ("athena", "s3"), ("trino", "gs"),
        ]
        for table in TABLES
    }  # fmt: skip
    assert shown == set(generated.values()) - {generated["bigquery-load/labels"]}


def test_the_commands_on_the_page_are_those_of_the_program():
    commands = re.findall(r"^\$ (earmark schema .*?)(?: [|>].*)?$", DOCUMENT, flags=re.MULTILINE)
    assert len(commands) >= 8
    command = cli.commands["schema"]
    for line in commands:
        arguments = line.split()[2:]
        parsed = command.make_context("schema", arguments)
        assert parsed.params["output"].endswith("://BUCKET/tags")
    dialect = next(option for option in command.params if option.name == "dialect")
    assert tuple(dialect.type.choices) == DIALECTS


def test_each_engine_answers_the_same_five_questions():
    assert {tag: len(queries(tag)) for tag in ("bigquery", "trino", "duckdb")} == {
        "bigquery": 5, "trino": 5, "duckdb": 5,
    }  # fmt: skip
    for translations in zip(
        every_query("bigquery"), every_query("trino"), every_query("duckdb"), strict=True
    ):
        columns = [
            sqlglot.parse_one(sql, read=tag).named_selects
            for tag, sql in zip(("bigquery", "trino", "duckdb"), translations, strict=True)
        ]
        assert columns[0] == columns[1] == columns[2]


# -------------------------------------------------------- what is generated


@pytest.mark.parametrize("table", TABLES)
def test_bigquery_schema_file_is_the_parquet_schema(table):
    fields = json.loads(table_definition(run_of(EVERYTHING), "tags", "bigquery-json", table))
    schema = clips_schema_of(run_of(EVERYTHING)) if table == "clips" else labels_schema()
    compare_fields(fields, schema)
    if table == "clips":
        assert [f["name"] for f in fields if f["mode"] == "REQUIRED"] == ["clip_id", "shard"]


def compare_fields(fields, columns):
    assert [field["name"] for field in fields] == [column.name for column in columns]
    for field, column in zip(fields, columns, strict=True):
        assert field["description"]
        assert set(field) <= {"name", "type", "mode", "description", "fields"}
        kind = column.type
        assert (field["mode"] == "REPEATED") == hasattr(kind, "value_type")
        if hasattr(kind, "value_type"):
            kind = kind.value_type
        if pa.types.is_struct(kind):
            assert field["type"] == "RECORD"
            compare_fields(field["fields"], kind)
        else:
            assert (
                field["type"]
                == {
                    pa.string(): "STRING",
                    pa.int16(): "INT64",
                    pa.int32(): "INT64",
                    pa.float32(): "FLOAT64",
                    pa.float64(): "FLOAT64",
                }[kind]
            )
            assert "fields" not in field


@pytest.mark.parametrize("table", TABLES)
def test_googles_client_reads_the_schema_file(table, tmp_path):
    bigquery = pytest.importorskip("google.cloud.bigquery")
    file = tmp_path / "schema.json"
    file.write_text(table_definition(run_of(EVERYTHING), "tags", "bigquery-json", table), "utf-8")
    client = bigquery.Client.__new__(bigquery.Client)  # reading a file needs no project
    read = client.schema_from_json(str(file))
    assert [field.to_api_repr() for field in read] == json.loads(file.read_text("utf-8"))


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("dialect", ["bigquery", "bigquery-load", "athena", "trino"])
def test_ddl_has_the_columns_of_the_parquet_schema(dialect, table):
    sql = table_definition(run_of(EVERYTHING), "tags", dialect, table)
    (statement,) = sqlglot.parse(sql, read=dialect.split("-")[0])
    schema = clips_schema_of(run_of(EVERYTHING)) if table == "clips" else labels_schema()
    columns = [
        column
        for column in statement.find_all(exp.ColumnDef)
        if not column.find_ancestor(exp.ColumnDef, exp.DataType)  # not a struct's member
    ]
    assert [column.name for column in columns] == schema.names
    for column, field in zip(columns, schema, strict=True):
        assert column.args["kind"] == expected_type(field.type, dialect), field


def expected_type(kind, dialect):
    """A pyarrow type as sqlglot's type: built as a tree, where the code builds text."""
    if hasattr(kind, "value_type"):
        inner = [expected_type(kind.value_type, dialect)]
        return exp.DataType(this=exp.DataType.Type.ARRAY, expressions=inner, nested=True)
    if pa.types.is_struct(kind):
        members = [
            exp.ColumnDef(this=exp.to_identifier(f.name), kind=expected_type(f.type, dialect))
            for f in kind
        ]
        return exp.DataType(this=exp.DataType.Type.STRUCT, expressions=members, nested=True)
    wide = dialect.startswith("bigquery")
    text = exp.DataType.Type.TEXT if wide or dialect == "athena" else exp.DataType.Type.VARCHAR
    return exp.DataType(
        this={
            pa.string(): text,
            pa.int16(): exp.DataType.Type.BIGINT if wide else exp.DataType.Type.SMALLINT,
            pa.int32(): exp.DataType.Type.BIGINT if wide else exp.DataType.Type.INT,
            pa.float32(): exp.DataType.Type.DOUBLE if wide else exp.DataType.Type.FLOAT,
            pa.float64(): exp.DataType.Type.DOUBLE,
        }[kind]
    )


@pytest.mark.parametrize("dialect", DIALECTS)
def test_float16_scores_are_refused(dialect):
    half = run_of(NO_MORE | {"score_type": "float16"})
    with pytest.raises(ValueError, match=r"cannot read .DuckDB.*--score-type float32 into a new"):
        table_definition(half, "tags", dialect)
    assert table_definition(half, "tags", dialect, "labels")  # has no scores


@pytest.mark.parametrize(
    ("output", "dialect", "place"),
    [
        ("gs://b/x/tags/", "bigquery", "'gs://b/x/tags/clips/*.parquet'"),
        ("gcs://b/tags", "trino", "'gs://b/tags/clips/'"),
        ("s3://b/tags", "trino", "'s3://b/tags/clips/'"),
        ("s3://b/tags", "bigquery", "'gs://BUCKET/tags/clips/*.parquet'"),
        ("gs://b/tags", "athena", "'s3://BUCKET/tags/clips/'"),
        ("/home/it's/tags", "bigquery-load", "'gs://BUCKET/tags/clips/*.parquet'"),
    ],
)
def test_where_the_files_lie(output, dialect, place):
    assert place in table_definition(run_of(NO_MORE), output, dialect)


def test_names_that_sql_cannot_have_are_refused():
    with pytest.raises(ValueError, match="quote"):
        table_definition(run_of(NO_MORE), "gs://b/it's", "bigquery")
    with pytest.raises(ValueError, match="not a dataset"):
        table_definition(run_of(NO_MORE), "tags", "bigquery", dataset="a` b")
    with pytest.raises(ValueError, match=r"run.json does not say.*'scoring'"):
        table_definition({"earmark": "1"}, "tags", "bigquery")
    named = table_definition(run_of(NO_MORE), "tags", "bigquery", dataset="my-project.audio")
    assert "`my-project.audio.clips`" in named
    named = table_definition(run_of(NO_MORE), "tags", "trino", dataset="lake.audio")
    assert named.startswith("CREATE TABLE lake.audio.clips (")


# ------------------------------------------------------------ a real output


@pytest.fixture(scope="module")
def annotated(tmp_path_factory, tiny_checkpoint, make_tar, encoded, noise):
    """A folder with an output `tags` of six clips, one of them failed, and others of the same.

    `half` is in float16, `heard` has segments.
    """
    folder = tmp_path_factory.mktemp("query")
    clips = [
        (f"{n}.wav", encoded((0.2 + n) * noise(16_000 * (1 + n), seed=n), subtype="FLOAT"))
        for n in range(5)
    ]
    make_tar(folder / "a.tar", clips[:3])
    make_tar(folder / "b.tar", [*clips[3:], ("broken.ogg", b"OggS, but no more than that")])
    for output, options in [
        ("tags", ["--threshold", "0.9"]),
        ("half", ["--score-type", "float16", "--threshold", "0.9"]),
        ("heard", ["--segments", "--chunk-hop-s", "0.5", "--threshold", "0.9"]),
    ]:
        command = ["annotate", str(folder / "a.tar"), str(folder / "b.tar"), "--output"]
        command += [str(folder / output), "--checkpoint", str(tiny_checkpoint), *options]
        result = CliRunner().invoke(cli, command)
        assert result.exit_code == 0, result.output
    return folder


@pytest.fixture
def rows(annotated):
    files = sorted((annotated / "tags" / "clips").glob("*.parquet"))
    return pa.concat_tables(pq.read_table(file) for file in files).to_pylist()


@pytest.fixture
def tagged(rows):
    """A label that some clips have as a tag and others do not, in the place of the page's *Siren*."""
    counts = {}
    for row in rows:
        for tag in row["tags"] or ():
            counts[tag["name"]] = counts.get(tag["name"], 0) + 1
    return min(name for name, count in counts.items() if 1 < count < 5 and "'" not in name)


@pytest.fixture
def connection(annotated, monkeypatch):
    """DuckDB in the folder of the output, with the views of the page."""
    monkeypatch.chdir(annotated)
    with duckdb.connect() as connection:
        for tag, sql in BLOCKS:
            if tag == "duckdb" and sql.startswith("CREATE VIEW"):
                connection.execute(sql)
        yield connection


def test_duckdb_queries_give_what_is_in_the_files(connection, annotated, rows, tagged):
    counts, tags, scores, failures, above = [
        connection.sql(sql.replace("'Siren'", f"'{tagged}'")).fetchall()
        for sql in queries("duckdb")
    ]
    labels = pq.read_table(annotated / "tags" / "labels.parquet").to_pylist()
    index = next(label["index"] for label in labels if label["name"] == tagged)
    fine = [row for row in rows if row["error"] is None]

    names = [tag["name"] for row in fine for tag in row["tags"]]
    by_count = sorted({name: names.count(name) for name in names}.items(), key=lambda n: (-n[1], n))
    assert counts == by_count[:20] and counts

    expected = [
        (row["clip_id"], row["duration_s"], tag["score"])
        for row in fine for tag in row["tags"] if tag["name"] == tagged
    ]  # fmt: skip
    assert tags == sorted(expected, key=lambda row: (-row[2], row[0])) and len(tags) > 1

    expected = [(row["clip_id"], row["scores"][index]) for row in fine]
    assert scores == sorted(expected, key=lambda row: (-row[1], row[0])) and len(scores) == 5

    assert failures == [("decode", "InvalidDataError", 1)]

    ancestors = {label["name"]: [label["name"], *label["ancestors"]] for label in labels}
    clips_above = {}
    for row in fine:
        for name in {up for tag in row["tags"] for up in ancestors[tag["name"]]}:
            clips_above[name] = clips_above.get(name, 0) + 1
    assert above == sorted(clips_above.items(), key=lambda row: (-row[1], row[0]))
    assert len(above) > len(by_count)


def test_bigquery_queries_mean_the_same(connection, tagged):
    """Translated to DuckDB they give what the queries written for DuckDB give."""
    connection.execute("CREATE SCHEMA earmark")
    connection.execute("CREATE VIEW earmark.clips AS FROM main.clips")
    connection.execute("CREATE VIEW earmark.labels AS FROM main.labels")
    for theirs, ours in zip(queries("bigquery"), queries("duckdb"), strict=True):
        theirs, ours = (sql.replace("'Siren'", f"'{tagged}'") for sql in (theirs, ours))
        expected = connection.sql(ours).fetchall()
        assert connection.sql(in_duckdb(theirs)).fetchall() == expected and expected


def test_queries_of_segments_give_what_is_in_the_files(connection, annotated, tagged):
    files = sorted((annotated / "heard" / "clips").glob("*.parquet"))
    rows = pa.concat_tables(pq.read_table(file) for file in files).to_pylist()
    expected = sorted(
        (s["start_s"] - s["end_s"], row["clip_id"], s["start_s"], s["end_s"], s["score"])
        for row in rows for s in row["segments"] or () if s["name"] == tagged
    )  # fmt: skip
    connection.execute("CREATE OR REPLACE VIEW clips AS SELECT * FROM 'heard/clips/*.parquet'")
    connection.execute("CREATE SCHEMA earmark")
    connection.execute("CREATE VIEW earmark.clips AS FROM main.clips")
    ours, theirs = (
        of_segments(dialect).replace("Siren", tagged) for dialect in ("duckdb", "bigquery")
    )
    assert connection.sql(ours).fetchall() == [row[1:] for row in expected] and len(expected) > 1
    assert connection.sql(in_duckdb(theirs)).fetchall() == connection.sql(ours).fetchall()


def in_duckdb(bigquery):
    tree = sqlglot.parse_one(bigquery, read="bigquery")
    for bracket in tree.find_all(exp.Bracket):
        # sqlglot counts a literal index from 1, but leaves one that is a column as it is.
        assert bracket.args["offset"] == 0 and bracket.args["safe"]
        bracket.set("expressions", [exp.Add(this=i, expression=exp.Literal.number(1))
                                    for i in bracket.expressions])  # fmt: skip
    return tree.sql(dialect="duckdb")


def test_native_copy_in_bigquery_has_no_null_scores(connection):
    (copy,) = [sql for tag, sql in BLOCKS if tag == "bigquery" and "AS\nSELECT * REPLACE" in sql]
    connection.execute("CREATE SCHEMA earmark")
    connection.execute("CREATE VIEW earmark.clips AS FROM main.clips")
    connection.execute(sqlglot.transpile(copy, read="bigquery", write="duckdb")[0])
    count = (
        "SELECT count(*) FILTER (list_count(scores) < len(scores)), count(*), count(error) FROM "
    )
    assert connection.sql(count + "earmark.clips").fetchall() == [(1, 6, 1)]
    assert connection.sql(count + "earmark.clips_native").fetchall() == [(0, 6, 1)]


def test_copy_that_every_engine_reads(connection, annotated, rows):
    (copy,) = [sql for tag, sql in BLOCKS if tag == "duckdb" and sql.startswith("COPY")]
    for output, tolerance in [("tags", 0), ("half", 1e-3)]:
        connection.execute(
            f"CREATE OR REPLACE VIEW clips AS SELECT * FROM '{output}/clips/*.parquet'"
        )
        connection.execute(copy)
        table = pq.read_table("clips-portable.parquet")
        assert table.schema.field("scores").type.value_type == pa.float32()
        by_id = {row["clip_id"].partition("/")[2]: row for row in table.to_pylist()}
        assert len(by_id) == len(rows)
        for row in rows:
            copied = by_id[row["clip_id"].partition("/")[2]]
            if row["error"] is None:
                np.testing.assert_allclose(copied["scores"], row["scores"], atol=tolerance)
                assert copied["error"] is None
            else:
                assert copied["scores"] is None and copied["error"] == row["error"]


def test_float16_is_read_where_the_page_says(connection, annotated):
    files = sorted((annotated / "half" / "clips").glob("*.parquet"))
    table = pa.concat_tables(pq.read_table(file) for file in files)
    assert table.schema.field("scores").type.value_type == pa.float16()
    stored = np.array([row for row in table["scores"].to_pylist() if row[0] is not None])
    read = connection.sql(
        "SELECT scores FROM 'half/clips/*.parquet' WHERE error IS NULL ORDER BY clip_id"
    ).fetchall()
    np.testing.assert_array_equal(np.array([row for (row,) in read], np.float32), stored)


def test_lists_have_the_form_that_list_inference_wants(annotated):
    """BigQuery takes a LIST for an array when it is `group (LIST) { repeated list { element } }`."""
    for file in [*(annotated / "tags" / "clips").iterdir(), annotated / "tags" / "labels.parquet"]:
        parquet = pq.ParquetFile(file)
        columns = [parquet.schema.column(n).path for n in range(len(parquet.schema))]
        lists = {field.name for field in parquet.schema_arrow if hasattr(field.type, "value_type")}
        assert lists
        for path in columns:
            assert (path.split(".")[0] in lists) == (".list.element" in path), path


def test_python_blocks_for_local_files_run(annotated):
    (_, pandas, arrow) = PYTHON
    assert "import pandas" in pandas and "import pyarrow" in arrow
    assert "count" in run_python(pandas, annotated)
    assert run_python(arrow, annotated) == "(5, 527) float32\n"


def test_duckdb_reads_a_bucket(annotated, rows, tmp_path):
    """The page's block as it stands, against an emulator of Cloud Storage."""
    pytest.importorskip("gcsfs")
    emulator = pytest.importorskip("gcp_storage_emulator.server")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    block = PYTHON[0].replace("GCSFileSystem()", "GCSFileSystem(token='anon')")
    block = block.replace("BUCKET", "b")
    with emulator.create_server("127.0.0.1", port, in_memory=True, default_bucket="b"):
        for file in (annotated / "tags").rglob("*.parquet"):
            name = f"tags/{file.relative_to(annotated / 'tags').as_posix()}".replace("/", "%2F")
            url = f"http://127.0.0.1:{port}/upload/storage/v1/b/b/o?uploadType=media&name={name}"
            request = urllib.request.Request(
                url, file.read_bytes(), {"Content-Type": "application/octet-stream"}
            )
            urllib.request.urlopen(request, timeout=30).close()
        printed = run_python(block, tmp_path, STORAGE_EMULATOR_HOST=f"http://127.0.0.1:{port}")
    assert printed == f"[({len(rows)}, 1)]\n"


def run_python(code, folder, **environment):
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


# ----------------------------------------------------------------- the command


def test_schema_command(annotated, tmp_path):
    def schema(*arguments):
        return CliRunner().invoke(cli, ["schema", *map(str, arguments)])

    output = annotated / "tags"
    run = json.loads((output / "run.json").read_text("utf-8"))
    for dialect in DIALECTS:
        for table in TABLES:
            result = schema(output, "--dialect", dialect, "--table", table)
            assert result.exit_code == 0, result.output
            assert result.stdout == table_definition(run, str(output), dialect, table)

    result = schema(annotated / "half", "--dialect", "bigquery")
    assert result.exit_code == 2
    assert "float16, which BigQuery cannot read" in result.output

    result = schema(tmp_path, "--dialect", "bigquery")
    assert result.exit_code == 2
    assert "run.json" in result.output and "earmark annotate" in result.output

    damaged = tmp_path / "damaged"
    damaged.mkdir()
    shutil.copy(output / "labels.parquet", damaged / "run.json")
    result = schema(damaged, "--dialect", "bigquery")
    assert result.exit_code == 2 and "run.json" in result.output


def test_schema_of_an_output_with_everything(tiny_checkpoint, make_tar, encoded, noise, tmp_path):
    """What `run.json` says of the columns is what is in the files."""
    make_tar(tmp_path / "a.tar", [("a.wav", encoded(noise(16_000)))])
    command = ["annotate", str(tmp_path / "a.tar"), "--output", str(tmp_path / "tags")]
    command += ["--checkpoint", str(tiny_checkpoint), "--chunks", "--embeddings"]
    assert CliRunner().invoke(cli, command).exit_code == 0
    run = json.loads((tmp_path / "tags" / "run.json").read_text("utf-8"))
    (file,) = (tmp_path / "tags" / "clips").iterdir()
    written, stated = pq.read_schema(file), clips_schema_of(run)
    assert written.names == stated.names
    for column in written:
        if column.name != "embedding":  # its length is not in run.json
            assert column.type == stated.field(column.name).type
