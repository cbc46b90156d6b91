"""What a shard's file says of its source, and whether the source is still the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import xxhash

from transforms.records import Shard, as_text
from transforms.storage import public_url

SOURCE_KEY = b"earmark.source"  # Parquet key-value metadata: `describe_source`
_NAMED_FILES = 3  # of those that differ


def describe_source(shard: Shard) -> dict[str, Any]:
    """What a listing shows of a shard, for its file's metadata.

    `uri` and `size_bytes`; of a tar or Parquet file its `version` (`crc32c:`, `etag:` or
    `mtime:`; null where the file system shows none), of loose files a `version` of all and
    in `files` 8 hex digits for each, in the shard's order, of the file and its metadata.
    """
    described: dict[str, Any] = {
        "uri": as_text(public_url(shard.uri)),
        "size_bytes": _size_bytes(shard),
    }
    if shard.kind != "files":
        return described | {"version": _version(shard.checksum)}
    files = [_file_version(shard, number) for number in range(len(shard.files))]
    return described | {
        "version": xxhash.xxh3_64_hexdigest("".join(files).encode()),
        "files": files,
    }


def what_changed(recorded: Mapping[str, Any], shard: Shard) -> str | None:
    """How a shard's source differs from what its finished file recorded, in words.

    None where it does not, as far as listings show.
    """
    found = describe_source(shard)
    if (was := recorded.get("files")) is not None and shard.kind == "files":
        now = found["files"]
        if len(was) != len(now):  # another division has another id; so this is not ours
            return f"{len(was):,} files, now {len(now):,}"
        changed = [
            name
            for name, before, after in zip(shard.files, was, now, strict=True)
            if before != after
        ]
        if not changed:
            return None
        named = ", ".join(as_text(name) for name in changed[:_NAMED_FILES])
        more = f" and {len(changed) - _NAMED_FILES:,} more" * (len(changed) > _NAMED_FILES)
        return f"{len(changed):,} of {len(now):,} files: {named}{more}"
    if recorded.get("size_bytes") != found["size_bytes"]:
        return f"{recorded.get('size_bytes'):,} bytes, now {found['size_bytes']:,}"
    before, after = recorded.get("version"), found["version"]
    # Versions of two kinds (a copy in another place's words) cannot be compared.
    if before and after and before != after and _kind(before) == _kind(after):
        kind = {"mtime": "modification time"}.get(_kind(before), _kind(before))
        return f"the same size, another {kind}"
    return None


def _size_bytes(shard: Shard) -> int:
    """Bytes of the whole file where the shard is some row groups of it."""
    return shard.file_sizes[0] if shard.row_groups and shard.file_sizes else shard.size_bytes


def _version(checksum: str | None) -> str | None:
    return checksum if checksum is None or ":" in checksum else f"crc32c:{checksum}"


def _kind(version: str) -> str:
    return version.partition(":")[0]


def _file_version(shard: Shard, number: int) -> str:
    size = shard.file_sizes[number] if shard.file_sizes else None
    checksum = shard.file_checksums[number] if shard.file_checksums else None
    metadata = shard.file_metadata[number] if shard.file_metadata else ""
    told = f" {metadata}" if metadata else ""  # so that a file without any has the version it had
    return xxhash.xxh32_hexdigest(f"{size} {checksum}{told}".encode("utf-8", "surrogateescape"))
