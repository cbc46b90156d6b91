"""docs/schema.md says what the code writes."""

import re
from pathlib import Path

import pyarrow as pa

from pipeline.ledger import LABELS_SCHEMA
from transforms.write import RowOptions, clips_schema

DOCUMENT = Path(__file__).parent.parent / "docs" / "schema.md"


def test_documented_columns_are_the_written_ones():
    options = RowOptions((0.2,) * 527, chunks=True, segments=True, embeddings=True)
    every = clips_schema(527, 768, options)
    assert documented("clips/*.parquet") == described(every)


def test_default_columns_are_the_first_table():
    plain = clips_schema(527, 768, RowOptions((0.2,) * 527))
    assert documented("clips/*.parquet")[: len(plain)] == described(plain)


def test_documented_labels_are_the_written_ones():
    assert documented("labels.parquet") == described(LABELS_SCHEMA)


def documented(heading):
    """(column, type) of the tables under a heading, up to the next of its level."""
    section = DOCUMENT.read_text("utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    section = section.split("\n### ")[0]
    return re.findall(r"^\| `(\w+)` \| (.+?) \|", section, flags=re.MULTILINE)


def described(schema):
    return [(field.name, type_name(field)) for field in schema]


def type_name(field):
    def name(kind):
        if pa.types.is_fixed_size_list(kind):
            size = {527: "labels", 768: "hidden size"}[kind.list_size]
            return f"fixed_size_list<{name(kind.value_type)}>[{size}]"
        if pa.types.is_list(kind):
            return f"list<{name(kind.value_type)}>"
        if pa.types.is_struct(kind):
            return "struct<" + ", ".join(f"{f.name}: {name(f.type)}" for f in kind) + ">"
        return str(kind)

    return name(field.type)
