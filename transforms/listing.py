"""Lists what a path, a URL, a glob or braces name, in an order that never changes."""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from transforms.braces import expand_braces, has_braces
from transforms.meter import Meter
from transforms.storage import (
    CLOUD_STORAGE,
    HUB,
    WEB,
    Access,
    StorageError,
    StoredFile,
    etag_of,
    explain,
    find_cloud,
    glob_cloud,
    list_cloud,
    mtime_of,
    open_file_system,
    public_name,
    public_url,
)

_NAMES_LISTED = 8  # of braces in Cloud Storage: more than these are looked up in a listing
_NAMES_AT_ONCE = 16  # of braces elsewhere that are looked up at a time


class InputError(ValueError):
    """An input cannot be used; the message names it and says what to do."""


def file_system_of(pattern: str, access: Access) -> tuple[Any, str]:
    """The file system of a path or URL, and the path in it, in the one spelling that ids are made of.

    Raises:
        InputError: there is none for such a URL.
    """
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


def uri_of(fs: Any, path: str) -> str:
    """A path of a file system as a URL, or as it is on a local disk."""
    return path if isinstance(fs, LocalFileSystem) else fs.unstrip_protocol(path)


def matches(
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
                yield from _fsspec_matches(fs, name, uri_of(fs, name))
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
    return {
        name: stored_file(fs, name, info) for name, info in infos.items() if info["type"] == "file"
    }


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
                yield root, stored_file(fs, match, details), named
        return
    except OSError as error:
        if not isinstance(fs, LocalFileSystem):
            raise
        raise InputError(f"{pattern!r} cannot be read: {error.strerror or error}") from error
    if info["type"] == "directory":
        yield from _walk(fs, path, path)
    elif _is_no_file(fs, info):
        raise InputError(
            f"{pattern!r} is a pipe or a device; expected files, which can be read twice"
        )
    else:
        yield posixpath.dirname(public_name(path, path)), stored_file(fs, path, info), True


def stored_file(fs: Any, path: str, details: dict[str, Any]) -> StoredFile:
    """What fsspec's details say of a file.

    Raises:
        InputError: a web server does not say how large it is.
    """
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


def _is_no_file(fs: Any, info: dict[str, Any]) -> bool:
    return isinstance(fs, LocalFileSystem) and info["type"] not in ("file", "link", "directory")


def _walk(fs: Any, folder: str, root: str) -> Iterator[tuple[str, StoredFile, bool]]:
    for file, details in sorted(fs.find(folder, detail=True).items()):
        if not _is_hidden(file, folder):
            yield root, stored_file(fs, file, details), False


def _is_hidden(file: str, folder: str) -> bool:
    return any(part.startswith(".") for part in below(folder, file).split("/"))


def below(folder: str, file: str) -> str:
    """A path relative to a folder above it, to the letter: `a//b` and `a/b` are two objects."""
    return file.removeprefix(f"{folder.rstrip('/')}/")
