"""Names for shards: to read, unique, and the same in every run."""

from __future__ import annotations

import os
import re

import xxhash

from transforms.storage import (
    public_url,
    unsigned_url,
)
from transforms.suffixes import TAR_SUFFIXES

_ROW_GROUPS = r"-rg\d{5}-\d{5}$"


def has_row_groups(shard_id: str) -> bool:
    """Whether an id is of some row groups of a Parquet file."""
    return re.search(_ROW_GROUPS, shard_id) is not None


def source_of(shard_id: str) -> str:
    """The part of an id that names the tar, Parquet file, manifest or folder."""
    return re.sub(rf"({_ROW_GROUPS}|-\d{{5,}}-[0-9a-f]{{12}}$)", "", shard_id)


def shard_id(uri: str) -> str:
    """A file name for a URI: its stem to read, its hash to be unique."""
    stem = os.path.basename(public_url(uri).rstrip("/"))
    for suffix in (*TAR_SUFFIXES[::-1], ".parquet", ".arrow", ".zip"):
        stem = stem.removesuffix(suffix)
    readable = re.sub(r"[^A-Za-z0-9._-]+", "_", stem).lstrip("._")[:80] or "shard"
    return f"{readable}-{short_hash(unsigned_url(uri))}"


def short_hash(text: str) -> str:
    """12 hex digits: among a million equal stems, two collide with a chance of 0.2 %."""
    return xxhash.xxh3_64_hexdigest(text.encode("utf-8", "surrogateescape"))[:12]
