"""Writes the rows of a query: a table for a terminal, CSV, JSON lines or Parquet."""

from __future__ import annotations

import csv
import datetime
import decimal
import io
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, Any

import click

from pipeline.options import UsageError
from pipeline.terminal import visible
from transforms.records import as_text

FORMATS = ("table", "csv", "jsonl", "parquet")
TABLE_ROWS = 50  # of a table without --limit
_SUFFIXES = {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
_ROWS_AT_ONCE = 2_048
_NARROWEST = 6  # cells of a column that gives way to others
_PLACES = ("clip_id", "shard", "member")
_PIPED_CELLS = 200  # of a line that no terminal shows
_WIDEST = 2_000  # characters of a cell that are made before it is cut to fit


def format_of(file: str | None, asked: str | None) -> str:
    """The format asked for, else that of the file's suffix, else a table.

    Raises:
        UsageError: the file's suffix names none, or it is to be a table.
    """
    if file is None:
        return asked or "table"
    if asked == "table":
        raise UsageError("--format table is for the terminal; --to takes csv, jsonl or parquet")
    suffix = Path(file).suffix.lower()
    if asked is None and suffix not in _SUFFIXES:
        raise UsageError(
            f"--to {file!r} has none of the suffixes {', '.join(_SUFFIXES)}; say which --format it is to be"
        )
    return asked or _SUFFIXES[suffix]


def rows_of(result: Any) -> Iterator[tuple[Any, ...]]:
    """The rows of a DuckDB result, a few at a time."""
    while rows := result.fetchmany(_ROWS_AT_ONCE):
        yield from rows


def write_table(
    names: Sequence[str], rows: Iterable[tuple[Any, ...]], limit: int | None
) -> tuple[int, bool]:
    """Prints a table as wide as the terminal: (rows printed, whether more were left).

    Args:
        names: of the columns.
        rows: of the result.
        limit: most rows; None: `TABLE_ROWS`.
    """
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    left = iter(rows)
    few = list(islice(left, TABLE_ROWS if limit is None else limit))
    cells = [[safe(cell(value)) for value in row] for row in few]
    headers = [safe(name) for name in names]
    console = Console()
    # What reads a pipe takes more than 80 cells, which is what is said where nobody knows.
    unbounded = not console.is_terminal and "COLUMNS" not in os.environ
    room = max(console.width, _PIPED_CELLS) if unbounded else console.width
    natural = [max(map(cell_len, column)) for column in zip(headers, *cells, strict=True)]
    widths = _shared(
        natural,
        room - 2 * (len(names) - 1),
        # What reads a pipe takes ids whole.
        () if console.is_terminal else [at for at, name in enumerate(names) if name == "clip_id"],
    )
    if unbounded:
        console = Console(width=max(room, sum(widths) + 2 * (len(names) - 1)))
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for at, name in enumerate(headers):
        numbers = all(isinstance(row[at], int | float | None) for row in few)
        table.add_column(
            Text(_fitted(name, widths[at], False)),
            justify="right" if numbers else "left",
            no_wrap=True,
        )
    for row in cells:
        table.add_row(
            *(Text(_fitted(text, widths[at], names[at] in _PLACES)) for at, text in enumerate(row))
        )
    console.print(table, soft_wrap=True)
    if console.is_terminal and widths != natural:
        click.echo("Cells are cut to fit; --format csv, jsonl or parquet has them whole.", err=True)
    return len(few), limit is None and next(left, None) is not None


def _shared(natural: Sequence[int], width: int, whole: Sequence[int] = ()) -> list[int]:
    """Widths of columns that together are no more than `width`: the widest give way.

    The columns `whole` keep theirs, whatever becomes of the sum.
    """
    if whole:
        left = [at for at in range(len(natural)) if at not in whole]
        rest = width - sum(natural[at] for at in whole)
        given = dict(zip(left, _shared([natural[at] for at in left], rest), strict=True))
        return [given.get(at, own) for at, own in enumerate(natural)]
    widths = list(natural)
    while widths and sum(widths) > width and max(widths) > _NARROWEST:
        widest = max(widths)
        among = [at for at, own in enumerate(widths) if own == widest]
        second = max([own for own in widths if own < widest], default=_NARROWEST)
        too_much = sum(widths) - width
        give = min(widest - max(second, _NARROWEST), -(-too_much // len(among)))
        for at in among:
            widths[at] -= max(1, give)
    return widths


def _fitted(text: str, width: int, at_end: bool) -> str:
    """`text` cut to `width` cells of a terminal; of a place the end is kept, which tells more."""
    from rich.cells import cell_len

    if cell_len(text) <= width:
        return text
    head, tail = ((width - 1) // 3, width - 1 - (width - 1) // 3) if at_end else (width - 1, 0)
    return f"{_first_cells(text, head)}…{_first_cells(text[::-1], tail)[::-1]}"


def _first_cells(text: str, width: int) -> str:
    from rich.cells import cell_len

    taken = text[: max(0, width)]
    while cell_len(taken) > width:
        taken = taken[:-1]
    return taken


def cell(value: Any) -> str:
    """A value for a person: tags by name and score, an error in a line, numbers short."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, dict):
        if set(value) == {"stage", "type", "message"}:
            return f"{value['stage']}/{value['type']}: {value['message']}"
        if {"name", "score"} <= set(value) and value["score"] is not None:
            span = f" {value['start_s']:g}-{value['end_s']:g} s" if "start_s" in value else ""
            return f"{value['name']} {value['score']:.2f}{span}"
        return ", ".join(f"{name}: {cell(entry)}" for name, entry in value.items())
    if isinstance(value, list | tuple):
        cells, length = [], 0
        for entry in value:
            cells.append(cell(entry))
            length += len(cells[-1])
            if length > _WIDEST:
                break
        return ", ".join(cells)
    return str(value)


def safe(text: str) -> str:
    """`visible` text, of bounded length."""
    return visible(as_text(text[:_WIDEST]))


def write_csv(names: Sequence[str], rows: Iterable[tuple[Any, ...]], stream: IO[str]) -> int:
    """Writes CSV with a header; lists and structs are JSON. Gives the number of rows."""
    shown = safe if stream.isatty() else as_text
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(map(shown, names))
    count = 0
    for row in rows:
        writer.writerow(
            [
                shown(value) if isinstance(value, str)
                else shown(_json(value)) if isinstance(value, list | tuple | dict)
                else value
                for value in row
            ]
        )  # fmt: skip
        count += 1
    return count


def write_jsonl(names: Sequence[str], rows: Iterable[tuple[Any, ...]], stream: IO[str]) -> int:
    """Writes a JSON object a line. Gives the number of rows.

    Raises:
        UsageError: two columns have one name.
    """
    twice = sorted({name for name in names if list(names).count(name) > 1})
    if twice:
        raise UsageError(f"two columns are called {twice[0]!r}: name one otherwise with AS")
    count = 0
    for row in rows:
        stream.write(_json(dict(zip(names, row, strict=True))) + "\n")
        count += 1
    return count


def write_parquet(relation: Any, names: Sequence[str], stream: Any) -> int:
    """Writes what gives an Arrow stream as Parquet. Gives the number of rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    reader = pa.RecordBatchReader.from_stream(relation)
    schema = pa.schema([f.with_name(n) for f, n in zip(reader.schema, names, strict=True)])
    count = 0
    with pq.ParquetWriter(stream, schema, compression="zstd") as writer:
        for batch in reader:
            writer.write_batch(batch.rename_columns(list(names)))
            count += batch.num_rows
    return count


def write_file(place: str, write: Callable[[Any], int], *, binary: bool) -> int:
    """Makes a local file, which appears when it is whole.

    Args:
        place: its path.
        write: is given the open file, and gives the number of rows.
        binary: whether it writes bytes.

    Raises:
        UsageError: it cannot be written.
    """
    path = Path(place)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with (
            partial.open("wb") if binary
            else partial.open("w", encoding="utf-8", newline="")
        ) as stream:  # fmt: skip
            count = write(stream)
        partial.replace(path)
    except OSError as error:
        raise UsageError(f"--to {place!r} cannot be written: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)
    return count


def _json(value: Any) -> str:
    text = json.dumps(_plain(value), ensure_ascii=False, default=_other)
    # A terminal obeys some characters that JSON leaves as they are; escaped they mean the same.
    return "".join(
        c if c.isprintable() else "".join(f"\\u{unit:04x}" for unit in _utf16(c)) for c in text
    ) if not text.isprintable() else text  # fmt: skip


def _utf16(character: str) -> list[int]:
    content = character.encode("utf-16-be", "surrogatepass")
    return [int.from_bytes(content[at : at + 2], "big") for at in range(0, len(content), 2)]


def _plain(value: Any) -> Any:
    """A value as JSON has it: what is no finite number is null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value


def _other(value: Any) -> Any:
    if isinstance(value, decimal.Decimal):
        return float(value)
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, bytes):
        return value.hex()
    return str(value)


def to_stdout(binary: bool) -> Any:
    """Standard output.

    Raises:
        UsageError: bytes would go to a terminal.
    """
    if binary and sys.stdout.isatty():
        raise UsageError("Parquet is no text for a terminal: give --to FILE, or > FILE")
    if binary:
        return sys.stdout.buffer
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")
    return sys.stdout
