"""Turns what the user names into shards, in an order that never changes."""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import os
import posixpath
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, BinaryIO, Literal, cast

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from fsspec.implementations.local import LocalFileSystem

from transforms.braces import expand_braces, has_braces
from transforms.manifest import (
    DEFAULT_MANIFESTS,
    FOLDER_METADATA,
    MANIFEST_SUFFIXES,
    Manifest,
    ManifestError,
    ManifestOptions,
    divide,
    folder_rows,
    head_of,
    lines_of,
    parquet_lines,
    recognise,
    recognise_parquet,
    scp_paths,
    segment_files,
)
from transforms.meter import Meter
from transforms.opening import open_shard
from transforms.read_table import (
    arrow_audio_column,
    count_arrow_rows,
    is_damage,
    open_arrow,
    open_parquet,
    parquet_audio_column,
)
from transforms.read_tar import count_tar_clips
from transforms.read_tfrecord import TFRECORD_NAME, count_tfrecord_clips, has_audio
from transforms.read_zip import zip_members
from transforms.records import ManifestSlice, Shard, as_text
from transforms.storage import (
    CLOUD_STORAGE,
    DEFAULT_ACCESS,
    HUB,
    WEB,
    Access,
    StorageError,
    StoredFile,
    etag_of,
    explain,
    find_cloud,
    glob_cloud,
    is_local,
    list_cloud,
    mtime_of,
    open_file_system,
    open_remote,
    public_name,
    public_url,
    read_all,
    unsigned_url,
)
from transforms.suffixes import is_audio

FILES_PER_SHARD = 256
PARQUET_SHARD_BYTES = 512 << 20  # of row groups; larger Parquet files are split
TAR_SUFFIXES = (
    *(".tar", ".tar.gz", ".tgz", ".tar.zst", ".tzst", ".tar.bz2", ".tbz2", ".tbz"),
    *(".tar.xz", ".txz"),
)
STATE_FILE = "state.json"  # names the files of a dataset that `datasets` saved to disk
PACKED_SHARDS = 1_000
_NAMES_LISTED = 8  # of braces in Cloud Storage: more than these are looked up in a listing
_NAMES_AT_ONCE = 16  # of braces elsewhere that are looked up at a time


class InputError(ValueError):
    """An input cannot be used; the message names it and says what to do."""


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
    told: dict[str, _Told] = {}  # file -> what an AudioFolder's metadata says of it
    notes = [] if notes is None else notes
    flushed: Counter[str] = Counter()  # root -> shards of loose files yielded already
    in_order = False

    def is_new(name: str) -> bool:
        if in_order:
            return True
        known = name in seen
        seen.add(name)
        return not known

    output = leave_out and f"{_uri(*_file_system(leave_out, access))}/"
    for pattern in patterns:
        if not pattern:
            raise InputError("an input is an empty string; is a shell variable unset?")
        if pattern.startswith("pipe:"):
            raise InputError(
                f"{pattern!r} is a command, and no command is run: name the files or URLs themselves"
            )
        fs, path = _file_system(pattern, access)
        remote = not isinstance(fs, LocalFileSystem)
        # A single listing of Cloud Storage names nothing twice, and has an order: nothing
        # of it needs to be kept.
        in_order = (
            pattern.startswith(CLOUD_STORAGE) and len(patterns) == 1 and not has_braces(pattern)
        )
        passed_over: Counter[str] = Counter()
        found = 0
        looked_at: set[str] = set()  # kinds of files that this pattern names
        saved = _Saved(access)
        keeps: bool | None = None  # Cloud Storage's files, until the metadata beside them is read
        for root, file, named in _matches(fs, path, pattern, access, meter):
            uri = _uri(fs, file.path)
            if output and uri.startswith(output):
                continue
            name = public_name(uri, file.path)
            kind = _kind_of(name)
            if kind == "arrow" and (reason := saved.leaves_out(uri, named)):
                passed_over[reason] += 1
                continue
            shards: Iterable[Shard]
            if not named and (rows := _folder_metadata(uri, file, access)) is not None:
                if in_order and flushed[_uri(fs, root)]:
                    passed_over[f"{posixpath.basename(uri)} below the folder named"] += 1
                    continue
                notes.append(f"joins the rows of {as_text(uri)} to the files that they name")
                for place, row in _told_by(_uri(fs, root), uri, rows):
                    if place not in told or told[place].depth <= row.depth:
                        told[place] = row
                shards = []
            elif kind is not None:
                whole = Shard(_id(uri), uri, kind, file.size, checksum=file.checksum)
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
                        _shards_with_audio(whole, must_have_audio=needs_audio, access=access)
                    )
                    if shards:
                        looked_at.add(kind)
                if not shards and named and kind == "parquet":
                    shards = _parquet_manifest(uri, file, files_per_shard, access, manifests, notes)
                if not shards:
                    passed_over[f".{kind} without audio"] += 1
                    continue
            elif (
                named
                and not is_audio(name)
                and not (remote and "files" in looked_at and not _is_manifest_name(name))
                and (manifest := _look(uri, file, access, manifests)) is not None
            ):
                shards = _manifest_shards(
                    uri, file, manifest, files_per_shard, access, meter, notes
                )
            elif named or is_audio(name):
                shards = []
                looked_at.add("files")
                if is_new(unsigned_url(uri)):
                    url = _uri(fs, root)
                    files = loose.setdefault(url, {})
                    files[_below(root, file.path)] = file
                    if in_order and keeps is None:
                        keeps = not named and _has_metadata(root, access, meter)
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


def source_of(shard_id: str) -> str:
    """The part of an id that names the tar, Parquet file, manifest or folder."""
    return re.sub(r"(-rg\d{5}-\d{5}|-\d{5,}-[0-9a-f]{12})$", "", shard_id)


def _file_system(pattern: str, access: Access) -> tuple[Any, str]:
    try:
        fs, path = open_file_system(pattern, access)
    except (ImportError, ValueError) as error:
        raise InputError(f"{public_url(pattern)!r} cannot be opened: {error}") from error
    if isinstance(fs, LocalFileSystem):
        return fs, _plain_path(path)
    return fs, path.rstrip("/") or path


def _plain_path(path: str) -> str:
    """A local path in the one spelling that ids are made of: no `..`, no `//`, no `/` at its end."""
    plain = "/" + os.path.normpath(path).lstrip("/")
    # Through a link, `..` leads elsewhere than it reads.
    if (
        ".." in path.split("/")
        and os.path.exists(path)
        and not (os.path.exists(plain) and os.path.samefile(path, plain))
    ):
        return os.path.realpath(path)
    return plain


def _uri(fs: Any, path: str) -> str:
    return path if isinstance(fs, LocalFileSystem) else fs.unstrip_protocol(path)


def _matches(
    fs: Any, path: str, pattern: str, access: Access, meter: Meter | None
) -> Iterator[tuple[str, StoredFile, bool]]:
    """Yields (root, file, whether the user named this kind of file), sorted."""
    try:
        if has_braces(path) and not _is_there(fs, path, pattern, access):
            yield from _brace_matches(fs, path, pattern, access, meter)
        elif pattern.startswith(CLOUD_STORAGE):
            yield from _cloud_matches(path, pattern, access, meter)
        else:
            yield from _fsspec_matches(fs, path, pattern)
    except InputError:
        raise
    except ValueError as error:  # fsspec's, for a glob such as `a**.tar`
        raise InputError(f"{public_url(pattern)!r} cannot be understood: {error}") from error
    except StorageError as error:
        raise InputError(f"{public_url(pattern)!r} cannot be listed: {error}") from error
    except Exception as error:  # each library behind fsspec has its own
        if isinstance(fs, LocalFileSystem):
            raise
        raise InputError(explain(error, repr(public_url(pattern)))) from error


def _is_there(fs: Any, path: str, pattern: str, access: Access) -> bool:
    """Whether a file has this very name, whatever braces or marks are in it."""
    if pattern.startswith(CLOUD_STORAGE):
        return find_cloud(path, access) is not None
    return bool(fs.exists(path))


def _brace_matches(
    fs: Any, path: str, pattern: str, access: Access, meter: Meter | None
) -> Iterator[tuple[str, StoredFile, bool]]:
    """The files that braces name, each of which must be there."""
    names = list(expand_braces(path))
    root = posixpath.dirname(re.split(r"[*?\[{]", path, maxsplit=1)[0])
    found: dict[str, StoredFile] = {}
    if not any(_is_glob(name) for name in names):
        found = _look_up(fs, names, pattern, access, meter)
    for name in names:
        if name in found:
            yield root, found[name], True
            continue
        try:  # a glob or a folder
            if pattern.startswith(CLOUD_STORAGE):
                yield from _cloud_matches(name, f"gs://{name}", access, meter)
            else:
                yield from _fsspec_matches(fs, name, _uri(fs, name))
        except InputError as error:
            raise InputError(f"{public_url(pattern)!r} names what is not there: {error}") from error


def _look_up(
    fs: Any, names: list[str], pattern: str, access: Access, meter: Meter | None
) -> dict[str, StoredFile]:
    """Those of the names that are files, in few requests."""
    if pattern.startswith(CLOUD_STORAGE):
        if len(names) <= _NAMES_LISTED:
            files = (find_cloud(name, access, meter) for name in names)
            return {file.path: file for file in files if file is not None}
        wanted, common = set(names), posixpath.commonprefix(names)
        deeper = any("/" in name[len(common) :] for name in names)
        listed = list_cloud(common, access, folders=not deeper, meter=meter)
        return {file.path: file for file in listed if file.path in wanted}

    infos = _infos(fs, names)
    return {name: _stored(fs, name, info) for name, info in infos.items() if info["type"] == "file"}


def _infos(fs: Any, names: list[str]) -> dict[str, dict[str, Any]]:
    """fsspec's details of the names that are there, several looked up at a time."""

    def look(name: str) -> dict[str, Any] | None:
        try:
            return dict(fs.info(name))
        except FileNotFoundError:
            return None

    with ThreadPoolExecutor(_NAMES_AT_ONCE, "earmark-look-up") as pool:
        infos = zip(names, pool.map(look, names), strict=True)
        return {name: info for name, info in infos if info is not None}


def _cloud_matches(
    path: str, pattern: str, access: Access, meter: Meter | None
) -> Iterator[tuple[str, StoredFile, bool]]:
    # Tried in this order, because a name may hold a glob's marks.
    if (file := find_cloud(path, access, meter)) is not None:
        yield posixpath.dirname(path), file, True
        return
    found = False
    for file in list_cloud(f"{path}/", access, meter=meter):
        found = True
        if not _is_hidden(file.path, path) and not file.path.endswith("/"):
            yield path, file, False
    if found:
        return
    if not _is_glob(path):
        raise InputError(f"{pattern!r} does not exist")
    root, named_suffix = _root_of_glob(path)
    for file in glob_cloud(path, access, meter):
        if not _is_hidden(file.path, root) and not file.path.endswith("/"):
            yield root, file, file.path.endswith(named_suffix)


def _fsspec_matches(fs: Any, path: str, pattern: str) -> Iterator[tuple[str, StoredFile, bool]]:
    try:
        info = fs.info(path)
    except FileNotFoundError as error:
        cause = error.__cause__ if path.startswith(WEB) else None
        if cause is not None and getattr(cause, "status", None) != 404:
            # fsspec says that a file is not there whatever failed on the web.
            raise InputError(explain(cause, repr(public_url(pattern)))) from None
        if not _is_glob(path):
            said = (
                f": {error}" if pattern.startswith(HUB) else ""
            )  # is it the repository, the revision?
            raise InputError(f"{public_url(pattern)!r} does not exist{said}") from None
        root, named_suffix = _root_of_glob(path)
        matches = fs.glob(path, detail=True)
        if path.startswith(WEB):  # a page's links have no sizes
            matches |= _infos(fs, list(matches))
        for match, details in sorted(matches.items()):
            if _is_hidden(match, root):
                continue
            if details["type"] == "directory":
                yield from _walk(fs, match, root)
            else:
                named = match.endswith(named_suffix)
                yield root, _stored(fs, match, details), named
        return
    except OSError as error:
        if not isinstance(fs, LocalFileSystem):
            raise
        raise InputError(f"{pattern!r} cannot be read: {error.strerror or error}") from error
    if info["type"] == "directory":
        yield from _walk(fs, path, path)
    else:
        yield posixpath.dirname(public_name(path, path)), _stored(fs, path, info), True


def _stored(fs: Any, path: str, details: dict[str, Any]) -> StoredFile:
    if details["size"] is None and path.startswith(WEB):
        raise InputError(
            f"the server of {public_url(path)!r} does not say how large it is, so that what is cut off "
            "could not be told: download it, and name the copy"
        )
    local = isinstance(fs, LocalFileSystem)
    version = mtime_of(path, details) if local else etag_of(details)
    return StoredFile(path, details["size"] or 0, version)


def _is_glob(path: str) -> bool:
    if path.startswith(WEB):  # where a `?` begins the query
        path = path.partition("?")[0]
    return any(mark in path for mark in "*?[")


def _root_of_glob(path: str) -> tuple[str, str]:
    """(the folder above the first mark, the suffix that the glob names, or one that no name has)."""
    root = posixpath.dirname(re.split(r"[*?\[]", path, maxsplit=1)[0])
    suffix = posixpath.splitext(path)[1]
    return root, suffix if suffix and not any(mark in suffix for mark in "*?[]") else "\0"


def _walk(fs: Any, folder: str, root: str) -> Iterator[tuple[str, StoredFile, bool]]:
    for file, details in sorted(fs.find(folder, detail=True).items()):
        if not _is_hidden(file, folder):
            yield root, _stored(fs, file, details), False


def _is_hidden(file: str, folder: str) -> bool:
    return any(part.startswith(".") for part in _below(folder, file).split("/"))


def _below(folder: str, file: str) -> str:
    """A path relative to a folder above it, to the letter: `a//b` and `a/b` are two objects."""
    return file.removeprefix(f"{folder.rstrip('/')}/")


def _kind_of(name: str) -> Literal["tar", "parquet", "arrow", "tfrecord", "zip"] | None:
    """The kind of the shard that a file of this name is; None where it is no container."""
    name = name.lower()
    if name.endswith(TAR_SUFFIXES):
        return "tar"
    if name.endswith(".parquet"):
        return "parquet"
    if name.endswith(".arrow"):
        return "arrow"
    if name.endswith(".zip"):
        return "zip"
    return "tfrecord" if TFRECORD_NAME.search(name) else None


class _Saved:
    """Datasets that `datasets` saved to disk: which Arrow files of a folder belong to one.

    The same folder may hold what `map` and `filter` cached beside them.
    """

    def __init__(self, access: Access) -> None:
        self._access = access
        self._names: dict[str, set[str] | None] = {}  # folder -> what its state.json names
        self._seen: dict[str, set[str]] = {}

    def leaves_out(self, uri: str, named: bool) -> str | None:
        """Why an Arrow file is no input; None where it is one."""
        folder, name = posixpath.split(uri)
        self._seen.setdefault(folder, set()).add(name)
        names = self._names_of(folder)
        if names is None:
            return None if named else f".arrow without {STATE_FILE}"
        return None if name in names else f".arrow not in {STATE_FILE}"

    def check(self, uri: str) -> None:
        """Refuses a dataset that lacks a file; called with `STATE_FILE`, which sorts after `data-*`.

        Raises:
            InputError: a file that it names is not there.
        """
        folder = posixpath.dirname(uri)
        lacks = sorted((self._names_of(folder) or set()) - self._seen.get(folder, set()))
        if lacks:
            raise InputError(
                f"{folder!r} lacks {lacks[0]!r}, which its {STATE_FILE} names"
                + (f", and {len(lacks) - 1} more" if len(lacks) > 1 else "")
                + ": copy the dataset again, whole"
            )

    def _names_of(self, folder: str) -> set[str] | None:
        if folder not in self._names:
            self._names[folder] = self._read(folder)
        return self._names[folder]

    def _read(self, folder: str) -> set[str] | None:
        try:
            state = json.loads(read_all(f"{folder}/{STATE_FILE}", self._access))
            return {str(file["filename"]) for file in state["_data_files"]}
        except (FileNotFoundError, ValueError, KeyError, TypeError):  # another program's state.json
            return None


def _shards_with_audio(whole: Shard, *, must_have_audio: bool, access: Access) -> Iterator[Shard]:
    """One shard, or several where it is a large Parquet file; none where there is no audio."""
    if whole.kind == "parquet":
        yield from _parquet_shards(whole, access)
        return
    with open_shard(whole, access, in_order=False) as stream:
        if whole.kind == "zip":
            there = zip_members(stream, is_audio) != []
            lacks = "no audio member: expected files with the suffix of an audio format"
        elif whole.kind == "tfrecord":
            there, features = has_audio(stream)
            lacks = (
                "no encoded audio in its first record: expected a tf.train.Example with bytes in a "
                f"feature such as 'audio' or 'audio/encoded', found {features or 'no feature'}"
            )
        else:
            there, columns = _arrow_has_audio(stream)
            lacks = f"no audio column: expected one as `datasets` saves it, found {columns}"
    if there:
        yield whole
    elif must_have_audio:
        raise InputError(f"{public_url(whole.uri)!r} has {lacks}")


def _arrow_has_audio(stream: BinaryIO) -> tuple[bool, str]:
    """(whether an Arrow file has audio or cannot be read, its columns)."""
    try:
        schema, batches = open_arrow(stream)
        column = arrow_audio_column(schema, None)
        column = column or arrow_audio_column(schema, next(batches, None))
    except (pa.ArrowException, OSError) as error:
        if not is_damage(error):
            raise
        return True, ""  # reading it gives the row that says what is broken
    return column is not None, _columns_of(schema)


def _columns_of(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name}: {field.type}" for field in schema)[:300]


def _parquet_shards(whole: Shard, access: Access) -> Iterator[Shard]:
    """One shard, or several where the row groups are large; none where there is no audio."""
    size = whole.size_bytes
    try:
        with open_shard(whole, access) as stream:
            parquet = open_parquet(stream)
            footer = parquet.metadata
            column = parquet_audio_column(parquet)
    except (pa.ArrowException, OSError) as error:
        if not is_damage(error):
            raise
        yield whole  # reading it gives the row that says what is broken
        return
    if column is None:
        return
    if size <= PARQUET_SHARD_BYTES or footer.num_row_groups < 2:
        yield whole
        return
    first, group_bytes = 0, 0
    for group in range(footer.num_row_groups):
        columns = footer.row_group(group)
        group_bytes += sum(
            columns.column(c).total_compressed_size for c in range(columns.num_columns)
        )
        if group_bytes >= PARQUET_SHARD_BYTES or group == footer.num_row_groups - 1:
            yield dataclasses.replace(
                whole,
                id=f"{whole.id}-rg{first:05d}-{group + 1:05d}",
                size_bytes=group_bytes,
                row_groups=(first, group + 1),
                file_sizes=(size,),
            )
            first, group_bytes = group + 1, 0


def _file_shard(
    root: str, number: int, found: dict[str, StoredFile], told: Mapping[str, _Told]
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
        id=f"{_id(root)}-{number:05d}-{_hash(chr(0).join(names))}",
        uri=root,
        kind="files",
        size_bytes=sum(size for size in sizes if size > 0),
        files=files,
        file_sizes=sizes,
        file_checksums=tuple(file.checksum for file in found.values()),
        file_metadata=metadata if any(metadata) else (),
    )


# ---------------------------------------------------------------- manifests


_NO_AUDIO = (b"PK\3\4", b"%PDF", b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"7z\xbc\xaf", b"Rar!",
             b"\x89HDF", b"\x93NUMPY", b"\x7fELF", b"SQLite", b"BZh", b"\xfd7zXZ")  # fmt: skip
_AUDIO = (b"RIFF", b"RIFX", b"RF64", b"BW64", b"fLaC", b"OggS", b"ID3", b"FORM", b".snd", b"caff",
          b"#!AMR", b"ADIF", b"MAC ", b"wvPK", b"TTA", b"MPCK", b"MP+", b"DSD ")  # fmt: skip
_LOOKED_AT_BYTES = 64 << 10
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


def _manifest_name(path: str) -> str:
    return posixpath.basename(path).lower().removesuffix(".gz")


def _is_manifest_name(path: str) -> bool:
    return _manifest_name(path).endswith(MANIFEST_SUFFIXES)


def _look(uri: str, file: StoredFile, access: Access, options: ManifestOptions) -> Manifest | None:
    """How a file is to be read that the user named; None where it may be audio.

    Raises:
        InputError: it is neither.
    """
    name = _manifest_name(file.path)
    with _open_file(uri, file, access) as stream:
        start = stream.read(_LOOKED_AT_BYTES)
    if start.startswith(_AUDIO):
        return None
    packed = start.startswith(b"\x1f\x8b")
    if packed:
        try:
            start = zlib.decompressobj(31).decompress(start, _LOOKED_AT_BYTES)
        except zlib.error as error:
            raise InputError(f"{uri!r} is a damaged gzip file: {error}") from error
    is_meant = _is_manifest_name(file.path)
    is_text = _is_text(start, is_meant) or (is_meant and start.startswith(_UTF16))
    if not is_text or not (start or is_meant):
        if packed or is_meant or start.startswith(_NO_AUDIO):
            raise InputError(
                f"{uri!r} is no audio, no manifest and no shard that earmark reads; name tars, Parquet, "
                "audio files, manifests, or folders of them"
            )
        return None
    try:
        manifest = recognise(name, head_of(_lines(uri, file, access)), options)
    except ManifestError as error:
        raise InputError(f"{uri!r} {error}") from error
    if manifest is None:
        raise InputError(
            f"{uri!r} is text: no audio, and no manifest, which has a header with a column such as path, "
            "or JSON lines. A list of inputs is given with --inputs-from"
        )
    return manifest


def _is_text(start: bytes, any_encoding: bool) -> bool:
    if re.search(rb"[\0-\x08\x0e-\x1a\x1c-\x1f]", start):
        return False
    try:
        start.decode("utf-8")
    except UnicodeDecodeError as error:
        return any_encoding or error.start >= len(start) - 3 >= 1  # cut inside a letter
    return True


def _open_file(uri: str, file: StoredFile, access: Access) -> BinaryIO:
    if is_local(uri):
        return open(uri, "rb")
    fs, path = open_file_system(uri, access)
    if not file.size:  # a web server that does not say
        return io.BytesIO(read_all(uri, access))
    return open_remote(fs, path, file.size, checksum=file.checksum, in_order=True)


def _lines(uri: str, file: StoredFile, access: Access) -> Iterator[bytes]:
    """The lines of a text file, unpacked where it is gzip.

    Raises:
        ManifestError: it cannot be unpacked, or is no text.
    """
    with _open_file(uri, file, access) as stream:
        packed = stream.read(2) == b"\x1f\x8b"
        stream.seek(0)
        if not packed:
            yield from lines_of(stream)
            return
        try:
            yield from lines_of(cast(BinaryIO, gzip.GzipFile(fileobj=stream)))
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ManifestError(f"is a damaged gzip file: {error}") from error


def _manifest_shards(
    uri: str,
    file: StoredFile,
    manifest: Manifest,
    rows_per_shard: int,
    access: Access,
    meter: Meter | None,
    notes: list[str],
) -> Iterator[Shard]:
    """The shards of a manifest of text.

    Raises:
        InputError: it has no rows, or cannot be divided into them.
    """
    folder = posixpath.dirname(uri)
    root = folder
    if manifest.options.audio_root:
        root = _uri(*_file_system(manifest.options.audio_root, access))
    files = None
    try:
        if manifest.form in ("wav.scp", "segments"):
            scp, segments = uri, f"{folder}/segments"
            if manifest.form == "segments":
                scp, segments = f"{folder}/wav.scp", uri
            if (found := _stored_at(segments, access)) is not None:
                paths = _stored_at(scp, access)
                if paths is None:
                    raise ManifestError(
                        "needs a wav.scp beside it, with the paths of its recordings"
                    )
                manifest = dataclasses.replace(manifest, form="segments")
                files = scp_paths(_lines(scp, paths, access))
                uri, file = segments, found
        elif manifest.form == "audioset":
            fs, path = _file_system(root, access)
            below = (found.path for _, found, _ in _matches(fs, path, root, access, meter))
            files = segment_files(_below(path, name) for name in below if is_audio(name))
        notes.append(f"reads {as_text(uri)} as {manifest.said()}")
        packed = not file.size or _is_packed(uri, file, access)
        parts = divide(
            manifest, _lines(uri, file, access), root, rows_per_shard, embedded=packed, files=files
        )
        yield from _shards_of(uri, file, parts)
    except ManifestError as error:
        raise InputError(f"{uri!r} {error}") from error


def _parquet_manifest(
    uri: str,
    file: StoredFile,
    rows_per_shard: int,
    access: Access,
    options: ManifestOptions,
    notes: list[str],
) -> Iterator[Shard]:
    """The shards of a Parquet file without audio, whose rows name audio files.

    Raises:
        InputError: it has no column that names them.
    """
    with _open_file(uri, file, access) as stream:
        parquet = pq.ParquetFile(stream, pre_buffer=False)
        try:
            manifest = recognise_parquet(parquet.schema_arrow, options)
        except ManifestError as error:
            raise InputError(
                f"{uri!r} has no audio column (a struct<bytes, path> as Hugging Face stores audio), and "
                f"as a manifest it {error}"
            ) from error
        root = posixpath.dirname(uri)
        if options.audio_root:
            root = _uri(*_file_system(options.audio_root, access))
        notes.append(
            f"reads {as_text(uri)} as a Parquet manifest: {manifest.said().partition(': ')[2]}"
        )
        try:
            lines = parquet_lines(parquet)
            yield from _shards_of(
                uri, file, divide(manifest, lines, root, rows_per_shard, embedded=True)
            )
        except (pa.ArrowException, OSError) as error:
            if not is_damage(error):
                raise
            raise InputError(f"{uri!r} is a damaged Parquet file: {error}") from error


def _shards_of(
    uri: str, file: StoredFile, parts: Iterable[tuple[ManifestSlice, tuple[str, ...]]]
) -> Iterator[Shard]:
    number = -1
    for number, (part, files) in enumerate(parts):
        # What is in the rows and where their paths begin, wherever they stand in the manifest.
        content = dataclasses.replace(part, first_row=0, start=0, end=0, text=None)
        yield Shard(
            id=f"{_id(uri)}-{number:05d}-{_hash(json.dumps([vars(content), files]))}",
            uri=uri,
            kind="manifest",
            size_bytes=part.end - part.start,
            files=files,
            file_sizes=(file.size,),
            manifest=part,
        )
    if number < 0:
        raise InputError(f"{uri!r} is a manifest without rows")


def _is_packed(uri: str, file: StoredFile, access: Access) -> bool:
    with _open_file(uri, file, access) as stream:
        return stream.read(2) == b"\x1f\x8b"


def _stored_at(uri: str, access: Access) -> StoredFile | None:
    fs, path = open_file_system(uri, access)
    if uri.startswith(CLOUD_STORAGE):
        return find_cloud(path, access)
    try:
        return _stored(fs, path, fs.info(path))
    except FileNotFoundError:
        return None


# ------------------------------------------------------------ AudioFolder metadata


@dataclass(frozen=True)
class _Told:
    """What an AudioFolder's metadata says of one file."""

    root: str  # and `name`: the file's place in `loose`
    name: str
    depth: int  # of the metadata; of two, the one nearer to the file holds
    metadata: str  # JSON


def _folder_metadata(uri: str, file: StoredFile, access: Access) -> list[tuple[str, str]] | None:
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
            with _open_file(uri, file, access) as stream:
                parquet = pq.ParquetFile(stream, pre_buffer=False)
                if parquet_audio_column(parquet) is not None:
                    return None
                manifest = recognise_parquet(parquet.schema_arrow, options)
                rows = list(folder_rows(manifest, parquet_lines(parquet)))
        else:
            found = recognise(name, head_of(_lines(uri, file, access)), options)
            if found is None or found.form not in ("table", "json"):
                return None
            rows = None
            lines = _lines(uri, file, access)
    except (ManifestError, pa.ArrowException):
        return None  # without a column `file_name`
    try:
        if rows is None:
            rows = list(folder_rows(found, lines))
    except ManifestError as error:
        raise InputError(f"{uri!r} {error}") from error
    return [(row.url, json.dumps(row.metadata, default=str)) for row in rows if row.url is not None]


def _told_by(root: str, uri: str, rows: list[tuple[str, str]]) -> Iterator[tuple[str, _Told]]:
    """(file, what is said of it) of the rows of the metadata at `uri`."""
    folder = _below(root, posixpath.dirname(uri)) if posixpath.dirname(uri) != root else ""
    for name, metadata in rows:
        place = posixpath.normpath(posixpath.join(folder, name))
        url = f"{root.rstrip('/')}/{place}"
        yield url, _Told(root, place, folder.count("/") + bool(folder), metadata)


def _has_metadata(root: str, access: Access, meter: Meter | None) -> bool:
    return any(find_cloud(f"{root}/{name}", access, meter) for name in FOLDER_METADATA)


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


def _id(uri: str) -> str:
    """A file name for a URI: its stem to read, its hash to be unique."""
    stem = os.path.basename(public_url(uri).rstrip("/"))
    for suffix in (*TAR_SUFFIXES[::-1], ".parquet", ".arrow", ".zip"):
        stem = stem.removesuffix(suffix)
    readable = re.sub(r"[^A-Za-z0-9._-]+", "_", stem).lstrip("._")[:80] or "shard"
    return f"{readable}-{_hash(unsigned_url(uri))}"


def _hash(text: str) -> str:
    """12 hex digits: among a million equal stems, two collide with a chance of 0.2 %."""
    return xxhash.xxh3_64_hexdigest(text.encode("utf-8", "surrogateescape"))[:12]
