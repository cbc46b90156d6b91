"""Turns what the user names into shards, in an order that never changes."""

from __future__ import annotations

import dataclasses
import json
import posixpath
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from transforms.braces import has_braces
from transforms.containers import (
    PARQUET_SHARD_BYTES,
    STATE_FILE,
    SavedDatasets,
    kind_of,
    shards_with_audio,
)
from transforms.folder_metadata import Told, folder_metadata, has_metadata, told_by
from transforms.listing import InputError, below, file_system_of, matches, uri_of
from transforms.manifest import (
    DEFAULT_MANIFESTS,
    ManifestOptions,
)
from transforms.manifest_shards import (
    is_manifest_name,
    look_for_manifest,
    manifest_shards,
    parquet_manifest_shards,
)
from transforms.meter import Meter
from transforms.opening import open_shard
from transforms.read_table import (
    count_arrow_rows,
    is_damage,
)
from transforms.read_tar import count_tar_clips
from transforms.read_tfrecord import count_tfrecord_clips
from transforms.read_zip import zip_members
from transforms.records import ManifestSlice, Shard, as_text
from transforms.shard_id import shard_id, short_hash, source_of
from transforms.storage import (
    CLOUD_STORAGE,
    DEFAULT_ACCESS,
    WEB,
    Access,
    StoredFile,
    public_name,
    public_url,
    unsigned_url,
)
from transforms.suffixes import is_audio

FILES_PER_SHARD = 256
PACKED_SHARDS = 1_000


@dataclass(frozen=True)
class Plan:
    """The shards to annotate, and what was found beside them and left out."""

    shards: list[Shard]
    ignored: Counter[str]  # files that are no audio, by suffix


def plan_shards(
    patterns: Sequence[str],
    files_per_shard: int = FILES_PER_SHARD,
    access: Access = DEFAULT_ACCESS,
    meter: Meter | None = None,
    manifests: ManifestOptions = DEFAULT_MANIFESTS,
) -> Plan:
    """The shards of `find_shards`, as a list, and what was left out."""
    ignored: Counter[str] = Counter()
    found = list(
        find_shards(patterns, ignored, files_per_shard, access, meter, manifests=manifests)
    )
    return Plan(found, ignored)


def find_shards(
    patterns: Sequence[str],
    ignored: Counter[str],
    files_per_shard: int = FILES_PER_SHARD,
    access: Access = DEFAULT_ACCESS,
    meter: Meter | None = None,
    leave_out: str | None = None,
    manifests: ManifestOptions = DEFAULT_MANIFESTS,
    notes: list[str] | None = None,
) -> Iterator[Shard]:
    """Yields the shards behind files, folders (walked recursively) and globs.

    Tars, Parquet files, manifests and the like come as they are found, loose files at the end. One
    pattern in Cloud Storage is listed once and held a page at a time, whatever it matches.

    Args:
        patterns: paths or URLs of any fsspec file system, with globs and braces. A tar, a
            zip, a Parquet, Arrow or TFRecord file is a shard (a large Parquet file several,
            by row groups). Audio files are grouped by the folder that was named, in sorted
            order.
        ignored: receives the files that are no audio, by suffix.
        files_per_shard: audio files in one shard at most.
        access: how remote storage is used.
        meter: counts `list_retries`.
        leave_out: a folder whose files are no input: the output, where it lies among them.
        manifests: what the user says of manifests. A file that is named is read as one where
            its content is; in a folder, `metadata.csv` and the like join the rows of its files.
        notes: receives how each manifest is read.

    Raises:
        InputError: a pattern matches nothing that earmark reads.
    """
    seen: set[str] = set()  # shard ids and files, so that overlapping inputs give none twice
    loose: dict[str, dict[str, StoredFile]] = {}  # root -> relative path -> file
    told: dict[str, Told] = {}  # file -> what an AudioFolder's metadata says of it
    notes = [] if notes is None else notes
    flushed: Counter[str] = Counter()  # root -> shards of loose files yielded already
    in_order = False

    def is_new(name: str) -> bool:
        if in_order:
            return True
        known = name in seen
        seen.add(name)
        return not known

    output = leave_out and f"{uri_of(*file_system_of(leave_out, access))}/"
    for pattern in patterns:
        if not pattern:
            raise InputError("an input is an empty string; is a shell variable unset?")
        if pattern.startswith("pipe:"):
            raise InputError(
                f"{pattern!r} is a command, and no command is run: name the files or URLs themselves"
            )
        fs, path = file_system_of(pattern, access)
        remote = not isinstance(fs, LocalFileSystem)
        # A single listing of Cloud Storage names nothing twice, and has an order: nothing
        # of it needs to be kept.
        in_order = (
            pattern.startswith(CLOUD_STORAGE) and len(patterns) == 1 and not has_braces(pattern)
        )
        passed_over: Counter[str] = Counter()
        found = 0
        looked_at: set[str] = set()  # kinds of files that this pattern names
        saved = SavedDatasets(access)
        keeps: bool | None = None  # Cloud Storage's files, until the metadata beside them is read
        for root, file, named in matches(fs, path, pattern, access, meter):
            uri = uri_of(fs, file.path)
            if output and uri.startswith(output):
                continue
            name = public_name(uri, file.path)
            kind = kind_of(name)
            if kind == "arrow" and (reason := saved.leaves_out(uri, named)):
                passed_over[reason] += 1
                continue
            shards: Iterable[Shard]
            if not named and (rows := folder_metadata(uri, file, access)) is not None:
                if in_order and flushed[uri_of(fs, root)]:
                    passed_over[f"{posixpath.basename(uri)} below the folder named"] += 1
                    continue
                notes.append(
                    f"joins the rows of {as_text(public_url(uri))} to the files that they name"
                )
                for place, row in told_by(uri_of(fs, root), uri, rows):
                    if place not in told or told[place].depth <= row.depth:
                        told[place] = row
                shards = []
            elif kind is not None:
                whole = Shard(shard_id(uri), uri, kind, file.size, checksum=file.checksum)
                if kind == "tar":
                    shards = [whole]
                elif remote and named and kind in looked_at and file.size <= PARQUET_SHARD_BYTES:
                    # A look costs a round trip or two. Where the user says `*.parquet`, one
                    # tells whether it is audio that they mean.
                    shards = [whole]
                else:
                    # A Parquet file without audio may be a manifest.
                    needs_audio = named and kind != "parquet"
                    shards = list(
                        shards_with_audio(whole, must_have_audio=needs_audio, access=access)
                    )
                    if shards:
                        looked_at.add(kind)
                if not shards and named and kind == "parquet":
                    shards = parquet_manifest_shards(
                        uri, file, files_per_shard, access, manifests, notes
                    )
                if not shards:
                    passed_over[f".{kind} without audio"] += 1
                    continue
            elif (
                named
                and not is_audio(name)
                and not (remote and "files" in looked_at and not is_manifest_name(name))
                and (manifest := look_for_manifest(uri, file, access, manifests)) is not None
            ):
                shards = manifest_shards(uri, file, manifest, files_per_shard, access, meter, notes)
            elif named or is_audio(name):
                shards = []
                looked_at.add("files")
                if is_new(unsigned_url(uri)):
                    url = uri_of(fs, root)
                    files = loose.setdefault(url, {})
                    files[below(root, file.path)] = file
                    if in_order and keeps is None:
                        keeps = not named and has_metadata(root, access, meter)
                    if in_order and not keeps and len(files) == files_per_shard:
                        shards = [_file_shard(url, flushed[url], loose.pop(url), told)]
                        flushed[url] += 1
            else:
                if not named and posixpath.basename(name) == STATE_FILE:
                    saved.check(uri)
                passed_over[posixpath.splitext(name)[1] or "no suffix"] += 1
                continue
            found += 1
            yield from (shard for shard in shards if is_new(shard.id))
        if not found:
            only = ", ".join(f"{count} {suffix}" for suffix, count in passed_over.most_common(5))
            raise InputError(
                f"{public_url(pattern)!r} matches no tar, no Parquet with an audio column and no audio file"
                + (f" (only {only})" if only else "")
                + "; check the path, and quote globs so that the shell leaves them alone"
            )
        ignored += passed_over
    for place, row in told.items():
        if in_order and flushed[row.root]:
            continue  # the file may be there, in a shard that has gone out
        if row.name not in loose.get(row.root, {}) and is_new(place):
            loose.setdefault(row.root, {})[row.name] = StoredFile(place, -1)
    for root in sorted(loose):
        files = sorted(loose[root].items())
        for start in range(0, len(files), files_per_shard):
            group = dict(files[start : start + files_per_shard])
            yield _file_shard(root, flushed[root], group, told)
            flushed[root] += 1


def pack_shards(shards: Iterable[Shard]) -> Iterator[bytes]:
    """Shards in packets of `PACKED_SHARDS`, compressed.

    Names in one listing are much alike: a million tars take about 28 MB so, in a job's
    description and in memory, instead of some hundred.
    """
    left = iter(shards)
    while packet := list(islice(left, PACKED_SHARDS)):
        text = json.dumps([list(vars(shard).values()) for shard in packet], default=vars)
        yield zlib.compress(text.encode(), 6)


def unpack_shards(packet: bytes) -> Iterator[Shard]:
    """The shards of one packet."""
    for values in json.loads(zlib.decompress(packet)):
        yield Shard(*map(_unpacked, values))


def _unpacked(value: Any) -> Any:
    if isinstance(value, dict):
        return ManifestSlice(**{name: _unpacked(entry) for name, entry in value.items()})
    return tuple(value) if isinstance(value, list) else value


def limit_shards(
    shards: Iterable[Shard], max_clips: int, access: Access = DEFAULT_ACCESS
) -> list[Shard]:
    """The first shards that together hold `max_clips` clips; the last one is cut short."""
    limited: list[Shard] = []
    left = max_clips
    for shard in shards:
        if left <= 0:
            break
        clips = min(left, _count_clips(shard, left, access))
        limited.append(dataclasses.replace(shard, max_clips=clips))
        left -= clips
    return limited


def outdated(sources: set[str], not_planned: Iterable[str]) -> list[str]:
    """Finished shards of a folder, Parquet file or manifest that is divided otherwise by now.

    Their rows would stand beside those of the new division, some of them twice.

    Args:
        sources: `source_of` each planned shard.
        not_planned: ids of finished shards that are not among the planned ones.
    """
    return sorted(shard_id for shard_id in not_planned if source_of(shard_id) in sources)


def _file_shard(
    root: str, number: int, found: dict[str, StoredFile], told: Mapping[str, Told]
) -> Shard:
    files, sizes = tuple(found), tuple(file.size for file in found.values())
    names = [unsigned_url(f"{root}/{file}") for file in files] if root.startswith(WEB) else files
    metadata = (
        tuple(
            told[place].metadata if (place := f"{root.rstrip('/')}/{name}") in told else ""
            for name in files
        )
        if told
        else ()
    )
    return Shard(
        id=f"{shard_id(root)}-{number:05d}-{short_hash(chr(0).join(names))}",
        uri=root,
        kind="files",
        size_bytes=sum(size for size in sizes if size > 0),
        files=files,
        file_sizes=sizes,
        file_checksums=tuple(file.checksum for file in found.values()),
        file_metadata=metadata if any(metadata) else (),
    )


def _count_clips(shard: Shard, enough: int, access: Access) -> int:
    if shard.kind == "files":
        return len(shard.files)
    if shard.manifest is not None:
        return shard.manifest.rows
    with open_shard(shard, access) as stream:
        if shard.kind == "tar":
            return count_tar_clips(stream, enough)
        if shard.kind == "tfrecord":
            return count_tfrecord_clips(stream, enough)
        if shard.kind == "arrow":
            return count_arrow_rows(stream, enough)
        if shard.kind == "zip":
            members = zip_members(stream, is_audio)
            return 1 if members is None else len(members)
        try:
            footer = pq.ParquetFile(stream).metadata
        except (pa.ArrowException, OSError) as error:
            if not is_damage(error):
                raise
            return 1  # the row that says that the file is broken
        first, end = shard.row_groups or (0, footer.num_row_groups)
        return sum(footer.row_group(group).num_rows for group in range(first, end))
