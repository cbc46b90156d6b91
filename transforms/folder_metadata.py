"""Joins an AudioFolder's metadata to the files that it names."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from transforms.listing import InputError, below
from transforms.manifest import (
    FOLDER_METADATA,
    ManifestError,
    ManifestOptions,
    folder_rows,
    head_of,
    parquet_lines,
    recognise,
    recognise_parquet,
)
from transforms.manifest_shards import open_file, text_lines
from transforms.meter import Meter
from transforms.read_table import (
    parquet_audio_column,
)
from transforms.storage import (
    Access,
    StoredFile,
    find_cloud,
    is_local,
    public_url,
)
from transforms.suffixes import is_audio


@dataclass(frozen=True)
class Told:
    """What an AudioFolder's metadata says of one file."""

    root: str  # and `name`: the file's place in `loose`
    name: str
    depth: int  # of the metadata; of two, the one nearer to the file holds
    metadata: str  # JSON


def folder_metadata(uri: str, file: StoredFile, access: Access) -> list[tuple[str, str]] | None:
    """(file_name, metadata) of each row of an AudioFolder's metadata; None where a file is none.

    Raises:
        InputError: it is one, and cannot be read.
    """
    name = posixpath.basename(file.path)
    if name not in FOLDER_METADATA or not file.size:
        return None
    options = ManifestOptions(path_column="file_name", id_column="", start_column="")
    try:
        if name.endswith(".parquet"):
            with open_file(uri, file, access) as stream:
                parquet = pq.ParquetFile(stream, pre_buffer=False)
                if parquet_audio_column(parquet) is not None:
                    return None
                manifest = recognise_parquet(parquet.schema_arrow, options)
                rows = list(folder_rows(manifest, parquet_lines(parquet)))
        else:
            found = recognise(name, head_of(text_lines(uri, file, access)), options)
            if found is None or found.form not in ("table", "json"):
                return None
            rows = None
            lines = text_lines(uri, file, access)
    except (ManifestError, pa.ArrowException):
        return None  # without a column `file_name`
    try:
        if rows is None:
            rows = list(folder_rows(found, lines))
    except ManifestError as error:
        raise InputError(f"{public_url(uri)!r} {error}") from error
    return [(row.url, json.dumps(row.metadata, default=str)) for row in rows if row.url is not None]


def told_by(root: str, uri: str, rows: list[tuple[str, str]]) -> Iterator[tuple[str, Told]]:
    """(file, what is said of it) of the rows of the metadata at `uri`.

    Rows of what is no audio, or lies outside of the metadata's folder, say nothing.
    """
    folder = below(root, posixpath.dirname(uri)) if posixpath.dirname(uri) != root else ""
    for name, metadata in rows:
        inside = posixpath.normpath(name)
        leaves = inside == ".." or inside.startswith(("/", "../")) or not is_local(name)
        if leaves or not is_audio(name):
            continue
        place = posixpath.normpath(posixpath.join(folder, name))
        url = f"{root.rstrip('/')}/{place}"
        yield url, Told(root, place, folder.count("/") + bool(folder), metadata)


def has_metadata(root: str, access: Access, meter: Meter | None) -> bool:
    """Whether a folder of Cloud Storage has such a file directly in it."""
    return any(find_cloud(f"{root}/{name}", access, meter) for name in FOLDER_METADATA)
