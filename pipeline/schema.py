"""Table definitions for SQL engines, made from the schemas that the files are written with.

`docs/query.md` says how they are used. Parquet describes itself; what these add is the types
that each engine calls its own, descriptions, and list inference switched on where BigQuery
would otherwise wrap each list.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa

from transforms.write import CLIPS_FOLDER, RowOptions, clips_schema

Dialect = Literal["bigquery-json", "bigquery", "bigquery-load", "athena", "trino"]
Table = Literal["clips", "labels"]

DIALECTS: tuple[Dialect, ...] = ("bigquery-json", "bigquery", "bigquery-load", "athena", "trino")
TABLES: tuple[Table, ...] = ("clips", "labels")
DATASET = "earmark"  # BigQuery's dataset, Athena's database; Trino's schema is `hive.earmark`

# Hive's rule, which Athena and Trino follow: a table is a folder and all that is in it.
# `labels.parquet` lies beside JSON files, so these two read a copy of it in a folder of its own.
LABELS_FOLDER = "labels"


@dataclass(frozen=True)
class _Types:
    """How an engine spells types."""

    engine: str
    scalars: Mapping[str, str]  # by pyarrow's name
    array: str
    struct: str
    member: str  # of a struct: name, type
    comma: str = ", "  # between members


_BIGQUERY = _Types(
    "BigQuery",
    {
        "string": "STRING",
        "double": "FLOAT64",
        "float": "FLOAT64",
        "int32": "INT64",
        "int16": "INT64",
    },
    "ARRAY<{}>",
    "STRUCT<{}>",
    "{} {}",
)
_ATHENA = _Types(
    "Athena",
    {
        "string": "string",
        "double": "double",
        "float": "float",
        "int32": "int",
        "int16": "smallint",
    },
    "array<{}>",
    "struct<{}>",
    "{}:{}",
    ",",  # Hive's own type strings have no blanks
)
_TRINO = _Types(
    "Trino",
    {
        "string": "varchar",
        "double": "double",
        "float": "real",
        "int32": "integer",
        "int16": "smallint",
    },
    "array({})",
    "row({})",
    "{} {}",
)

_CLIPS_DESCRIPTIONS = {
    "clip_id": "Unique in the output: <shard_id>/<name or member>",
    "shard": "Tar, Parquet file or folder that the clip came from",
    "member": "Its name in the shard; null where a shard is broken between clips",
    "start_s": "Where in the recording the clip begins, seconds; null: at its beginning",
    "end_s": "Where in the recording the clip ends, seconds; null: at its end",
    "duration_s": "Seconds of audio that were decoded",
    "sample_rate": "Hz, as decoded from the source",
    "channels": "Channels of the source",
    "codec": "Codec by ffmpeg's name",
    "audio_xxh128": "XXH128 of the encoded bytes, hexadecimal",
    "peak_dbfs": "Largest sample, dB relative to full scale; -inf for digital silence",
    "rms_dbfs": "Mean power, dB relative to full scale; -inf for digital silence",
    "tags": "Labels whose score reaches their threshold, highest first",
    "tags.index": "Position in scores, from 0",
    "tags.mid": "AudioSet machine id",
    "tags.name": "Display name",
    "tags.score": "Sigmoid score, 0 to 1",
    "scores": "Sigmoid score of every label, by labels.index; no values in a failed clip",
    "metadata": "JSON of what stood beside the clip",
    "error": "Null when the clip is fine; set beside scores where they are of a part of its audio",
    "error.stage": "read or decode",
    "error.type": "What kind of failure",
    "error.message": "What was said",
    "chunks": "Chunks of the clip",
    "chunks.start_s": "Start, seconds into the clip",
    "chunks.end_s": "End, seconds into the clip",
    "chunks.scores": "Sigmoid score of every label in the chunk",
    "segments": "When labels are heard: neighbouring chunks that reach their threshold, merged",
    "segments.index": "Position in scores, from 0",
    "segments.mid": "AudioSet machine id",
    "segments.name": "Display name",
    "segments.start_s": "Start, seconds into the clip",
    "segments.end_s": "End, seconds into the clip",
    "segments.score": "Highest sigmoid score of its chunks, 0 to 1",
    "embedding": "The student's pooled vector, averaged over the chunks",
}
_LABELS_DESCRIPTIONS = {
    "index": "Position in scores, from 0",
    "mid": "AudioSet machine id, null for a label that is not AudioSet's",
    "name": "Display name",
    "threshold": "Score from which the label is a tag in this output; null: never",
    "parents": "Names directly above it in the AudioSet ontology",
    "ancestors": "All names above it, nearest first",
}


def clips_schema_of(run: Mapping[str, Any]) -> pa.Schema:
    """The columns of an output's `clips/*.parquet`, from its parsed `run.json`.

    The length of `embedding` is not in `run.json` and is given as 1: no SQL type has it.

    Raises:
        ValueError: it does not say what the columns are.
    """
    try:
        scoring, labels = run["scoring"], run["checkpoint"]["labels"]
        options = RowOptions(
            thresholds=(),  # they change rows, not columns
            chunks=scoring["chunks"],
            segments=bool(scoring.get("segments")),  # earlier versions had none
            embeddings=scoring["embeddings"],
            score_type=scoring["score_type"],
        )
        return clips_schema(labels, 1, options)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"run.json does not say what columns the output has ({type(error).__name__}: {error}); "
            "give the folder that earmark annotate wrote"
        ) from error


def labels_schema() -> pa.Schema:
    """The columns of `labels.parquet`."""
    from pipeline.ledger import LABELS_SCHEMA

    return LABELS_SCHEMA


def table_definition(
    run: Mapping[str, Any],
    output: str,
    dialect: Dialect,
    table: Table = "clips",
    dataset: str = DATASET,
) -> str:
    """What an engine needs to read a table of an output: SQL, or BigQuery's JSON schema.

    Args:
        run: the output's parsed `run.json`.
        output: where it lies. A place that the engine does not read from, such as a
            local folder, becomes the same name in a bucket called BUCKET.
        dataset: BigQuery's dataset (`project.dataset` too), Athena's database, or
            Trino's schema of the catalogue `hive` (`catalogue.schema` too).

    Raises:
        ValueError: `run` does not say what the columns are, the engine cannot read
            one of them, or a name cannot be written in SQL.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)?", dataset):
        raise ValueError(
            f"{dataset!r} is not a dataset: one or two names of letters, digits, '_' and '-', "
            "with a dot between them"
        )
    schema = clips_schema_of(run) if table == "clips" else labels_schema()
    match dialect:
        case "bigquery-json":
            descriptions = _CLIPS_DESCRIPTIONS if table == "clips" else _LABELS_DESCRIPTIONS
            return json.dumps(bigquery_fields(schema, descriptions), indent=2) + "\n"
        case "bigquery":
            return bigquery_external(schema, f"{dataset}.{table}", _files(output, table))
        case "bigquery-load":
            return bigquery_load(schema, f"{dataset}.{table}", _files(output, table))
        case "athena":
            return athena_table(schema, f"{dataset}.{table}", _folder(output, table, ("s3://",)))
        case "trino":
            name = f"{dataset if '.' in dataset else f'hive.{dataset}'}.{table}"
            return trino_table(schema, name, _folder(output, table, ("gs://", "s3://")))
    raise ValueError(f"{dialect!r} is not one of {', '.join(DIALECTS)}")


def bigquery_fields(
    schema: pa.Schema, descriptions: Mapping[str, str], above: str = ""
) -> list[dict[str, Any]]:
    """BigQuery's schema file: `name`, `type`, `mode`, `description`, and `fields` of a RECORD.

    Args:
        schema: the columns; a struct type goes as well.
        descriptions: by dotted path.
        above: path of the struct that they are in, with its dot.
    """
    fields = []
    for column in schema:
        kind, mode = column.type, "NULLABLE" if column.nullable else "REQUIRED"
        if _is_list(kind):
            kind, mode = kind.value_type, "REPEATED"
        field: dict[str, Any] = {
            "name": column.name,
            "type": "RECORD" if pa.types.is_struct(kind) else sql_type(kind, _BIGQUERY),
            "mode": mode,
            "description": descriptions[above + column.name],
        }
        if pa.types.is_struct(kind):
            field["fields"] = bigquery_fields(kind, descriptions, f"{above}{column.name}.")
        fields.append(field)
    return fields


def bigquery_external(schema: pa.Schema, table: str, uri: str) -> str:
    """DDL of a BigQuery table that stays in its files."""
    # No NOT NULL: it would promise of files what only a table of BigQuery's own can keep.
    columns = [f"{column.name} {sql_type(column.type, _BIGQUERY)}" for column in schema]
    return (
        f"CREATE OR REPLACE EXTERNAL TABLE `{table}` (\n{_lines(columns)}\n)\n"
        f"OPTIONS (\n{_parquet_options(uri)}\n);\n"
    )


def bigquery_load(schema: pa.Schema, table: str, uri: str) -> str:
    """SQL that copies the files into a table of BigQuery's own, in place of what it held.

    `LOAD DATA INTO` would append: run twice, it has every clip twice.
    """
    columns = [
        f"{column.name} {sql_type(column.type, _BIGQUERY)}{'' if column.nullable else ' NOT NULL'}"
        for column in schema
    ]
    return (
        f"LOAD DATA OVERWRITE `{table}` (\n{_lines(columns)}\n)\n"
        f"FROM FILES (\n{_parquet_options(uri)}\n);\n"
    )


def athena_table(schema: pa.Schema, table: str, folder: str) -> str:
    """DDL of an Athena table over a folder."""
    columns = [f"`{column.name}` {sql_type(column.type, _ATHENA)}" for column in schema]
    return (
        f"CREATE EXTERNAL TABLE {_quoted(table, '`')} (\n{_lines(columns)}\n)\n"
        f"STORED AS PARQUET\nLOCATION '{folder}';\n"
    )


def trino_table(schema: pa.Schema, table: str, folder: str) -> str:
    """DDL of a table of Trino's Hive connector over a folder."""
    columns = [f"{column.name} {sql_type(column.type, _TRINO)}" for column in schema]
    options = ["format = 'PARQUET'", f"external_location = '{folder}'"]
    name = _quoted(table, '"') if "-" in table else table
    return f"CREATE TABLE {name} (\n{_lines(columns)}\n)\nWITH (\n{_lines(options)}\n);\n"


def sql_type(kind: pa.DataType, types: _Types) -> str:
    """A pyarrow type as an engine spells it.

    Raises:
        ValueError: the engine has no such type.
    """
    if _is_list(kind):
        return types.array.format(sql_type(kind.value_type, types))
    if pa.types.is_struct(kind):
        members = [types.member.format(f.name, sql_type(f.type, types)) for f in kind]
        return types.struct.format(types.comma.join(members))
    if pa.types.is_float16(kind):
        raise ValueError(
            f"the scores of this output are float16, which {types.engine} cannot read (DuckDB, "
            "Polars and pyarrow can); annotate with --score-type float32 into a new --output"
        )
    return types.scalars[str(kind)]


def _is_list(kind: pa.DataType) -> bool:
    # Parquet stores both as LIST; the fixed length is known to Arrow alone.
    return pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind)


def _parquet_options(uri: str) -> str:
    return _lines(["format = 'PARQUET'", f"uris = ['{uri}']", "enable_list_inference = TRUE"])


def _lines(items: list[str]) -> str:
    return ",\n".join(f"  {item}" for item in items)


def _quoted(table: str, mark: str) -> str:
    return ".".join(f"{mark}{name}{mark}" for name in table.split("."))


def _files(output: str, table: Table) -> str:
    """The URI of a table's files, for BigQuery."""
    root = _place(output, ("gs://",))
    return f"{root}/{CLIPS_FOLDER}/*.parquet" if table == "clips" else f"{root}/labels.parquet"


def _folder(output: str, table: Table, schemes: tuple[str, ...]) -> str:
    """The URI of the folder that is a table, for Athena and Trino."""
    return f"{_place(output, schemes)}/{CLIPS_FOLDER if table == 'clips' else LABELS_FOLDER}/"


def _place(output: str, schemes: tuple[str, ...]) -> str:
    root = re.sub("^gcs://", "gs://", output.rstrip("/"))
    if not root.startswith(schemes):
        root = f"{schemes[0]}BUCKET/{root.rpartition('/')[2] or 'OUTPUT'}"
    if re.search(r"['\\*?\n]", root):
        raise ValueError(
            f"{root!r} has a quote, backslash or wildcard, which its URI in SQL cannot have: "
            "copy the output to a folder of another name"
        )
    return root
