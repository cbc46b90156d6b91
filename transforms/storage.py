"""Reaches files wherever they are: the local disk, Cloud Storage, or what fsspec knows.

Cloud Storage is listed and written with google-cloud-storage and read with gcsfs; other
schemes are fsspec's. Remote files are read in blocks, one ahead of the reader. A block
that does not come, or not whole, is asked for again from where it stopped, and counted.
"""

from __future__ import annotations

import asyncio
import base64
import errno
import functools
import hashlib
import io
import os
import posixpath
import random
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import fsspec.core
import google_crc32c
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import glob_translate

from transforms.meter import Meter

CLOUD_STORAGE = ("gs://", "gcs://")
WEB = ("http://", "https://")
HUB = "hf://"
# What rows may name. fsspec knows many more, some of which lead back to this machine or to others.
ROW_SCHEMES = ("gs", "gcs", "s3", "s3a", "hf", "http", "https", "abfs", "abfss", "az", "adl")
_AZURE = ("abfs", "abfss", "az", "adl")

MAX_TRIES = 8  # with the waits below, half a minute to a minute
FIRST_WAIT_S = 0.5
MAX_WAIT_S = 30.0
RETRY_S = 300.0  # how long google-cloud-storage tries again: several stalls
ETAG = "etag:"  # begins a checksum that is none of the content
MTIME = "mtime:"  # likewise, of a local file
STALL_S = 30.0  # a connection that gives no byte for so long is given up

MIN_BLOCK_BYTES = 1 << 20
MAX_BLOCK_BYTES = 16 << 20  # two blocks are held: the one being read and the next
_FOOTER_BYTES = 64 << 10  # what a first read at an odd place (a Parquet footer) fetches

_sleep = time.sleep  # replaced where a test does not want to wait


@dataclass(frozen=True)
class Access:
    """How remote storage is used."""

    billing_project: str | None = None  # pays for requests to requester-pays buckets
    kms_key: str | None = None  # Cloud KMS key that encrypts what is written


DEFAULT_ACCESS = Access()


class StorageError(OSError):
    """Storage cannot be reached or refuses; the message says what to do.

    It has an errno, because an OSError without one is how pyarrow says that the
    content of a file is damaged.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.errno = errno.EIO


@dataclass(frozen=True)
class StoredFile:
    """A file as a listing shows it."""

    path: str  # as the file system names it: without `gs://`
    size: int  # bytes
    # As Cloud Storage gives it: crc32c, base64. Elsewhere `etag:` and the ETag, where there is one.
    # Of a local file `mtime:` and microseconds: it only tells a file that has changed.
    checksum: str | None = None


def is_local(url: str) -> bool:
    """Whether `url` is a path of this machine."""
    return "://" not in url


def public_url(url: str) -> str:
    """A URL as it may be stored and shown: on the web, without its user, query and fragment.

    A presigned URL's query opens the file to whoever reads it.
    """
    if not url.startswith(WEB):
        return url
    scheme, _, rest = re.split(r"[?#]", url, maxsplit=1)[0].partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def public_name(root: str, name: str) -> str:
    """`name` below `root` as it may be stored and shown, as `public_url` says."""
    return re.split(r"[?#]", name, maxsplit=1)[0] if root.startswith(WEB) else name


# What a query holds that says who may read, not which file: of S3, Cloud Storage, CloudFront, Azure.
_SIGNING = re.compile(
    r"(?i)(x-(amz|goog|oss)-[^=]*|awsaccesskeyid|googleaccessid|key-pair-id|signature|expires|policy"
    r"|sig|se|st|sp|sr|sv|spr|sip|ske|skt|sks|skv|skoid|sktid|(access_)?token|api_?key)(=|$)"
)


def is_signed(url: str) -> bool:
    """Whether a URL of the web says, for a while, who may read."""
    query = url.partition("#")[0].partition("?")[2].split("&")
    return url.startswith(WEB) and any(map(_SIGNING.match, query))


def unsigned_url(url: str) -> str:
    """What tells a file on the web from others: its URL without what signs it anew each day."""
    if not url.startswith(WEB):
        return url
    query = url.partition("#")[0].partition("?")[2].split("&")
    kept = "&".join(part for part in query if part and not _SIGNING.match(part))
    return public_url(url) + (f"?{kept}" if kept else "")


def shown_url(url: str) -> str:
    """A path or URL that a row names, as it is stored and shown: without what lets one in.

    What else a query says stays, as it may tell one file from another.
    """
    if is_local(url):
        return url
    if not url.startswith(WEB):
        return re.sub(r"://[^/@]*@", "://", url)
    place, mark, query = unsigned_url(url).partition("?")
    # `key` may be a file's or one that lets one in: it tells files apart, and is not shown.
    kept = "&".join(part for part in query.split("&") if not re.match(r"(?i)key(=|$)", part))
    return place + (mark + kept if kept else "")


def refuse_scheme(url: str, beside: str) -> None:
    """Refuses a URL in a row whose scheme is not one of `ROW_SCHEMES` nor that of `beside`.

    Args:
        url: what a row names.
        beside: the manifest or table, or where its paths begin, which the user named.

    Raises:
        ValueError: it is neither, or its library is not installed.
    """
    if is_local(url):
        return
    scheme = url.partition("://")[0]
    if not is_local(beside) and scheme == beside.partition("://")[0]:
        return
    if scheme not in ROW_SCHEMES:
        raise ValueError(
            f"{scheme[:40]}:// is none of the schemes that rows may name: {', '.join(ROW_SCHEMES)}"
        )
    if scheme in _AZURE:
        try:
            fsspec.get_filesystem_class(scheme)
        except ImportError as error:
            raise ValueError(f"{scheme}:// cannot be read here: {error}") from None


def open_file_system(url: str, access: Access = DEFAULT_ACCESS) -> tuple[Any, str]:
    """(file system, path in it) of a path or URL.

    What has no scheme is a local path whatever is in it: fsspec takes `::` for a
    chain of file systems.

    Raises:
        ImportError, ValueError: the scheme is unknown or its library is absent.
    """
    if is_local(url):
        local = LocalFileSystem()
        return local, local._strip_protocol(url)
    if url.startswith(CLOUD_STORAGE):
        fs = _cloud_file_system(access.billing_project)
        return fs, fs._strip_protocol(url)
    # Not fsspec's url_to_fs, for which `::` in a name begins another file system.
    fs = fsspec.filesystem(url.partition("://")[0])
    return fs, fs._strip_protocol(url)


def open_remote(
    fs: Any,
    path: str,
    size: int,
    *,
    checksum: str | None = None,
    in_order: bool = False,
    meter: Meter | None = None,
) -> BinaryIO:
    """A buffered file over `RemoteFile`."""
    raw = RemoteFile(fs, path, size, checksum=checksum, in_order=in_order, meter=meter)
    return io.BufferedReader(raw, buffer_size=128 << 10)


def read_all(url: str, access: Access = DEFAULT_ACCESS, meter: Meter | None = None) -> bytes:
    """The bytes of a small file.

    Raises:
        OSError: it is not there or cannot be read.
    """
    fs, path = open_file_system(url, access)
    if isinstance(fs, LocalFileSystem):
        with fs.open(path, "rb") as stream:
            return bytes(stream.read())
    if url.startswith(CLOUD_STORAGE):
        stored = find_cloud(path, access, meter)
        if stored is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), url)
        checksum = stored.checksum
        with open_remote(
            fs, path, stored.size, checksum=checksum, in_order=True, meter=meter
        ) as stream:
            return stream.read()
    return patiently(lambda: bytes(fs.cat_file(path)), url, "read_retries", meter)


# ------------------------------------------------------------------- reading


class RemoteFile(io.RawIOBase):
    """A file in remote storage, read in blocks, the next of them fetched ahead.

    Args:
        fs: an fsspec file system.
        path: in `fs`.
        size: bytes, from the listing: a block that ends before it is asked for again.
        checksum: crc32c of the whole, base64; checked when the file has been read
            from its start to its end in order.
        in_order: whether the file will be read from start to end, so that the first
            read fetches a whole block.
        meter: counts `read_retries`.

    Raises:
        OSError: (from `read`) the file is gone, has changed since it was listed, or
            cannot be read after `MAX_TRIES` tries.
    """

    def __init__(
        self,
        fs: Any,
        path: str,
        size: int,
        *,
        checksum: str | None = None,
        in_order: bool = False,
        meter: Meter | None = None,
    ) -> None:
        super().__init__()
        self._fs, self._path, self._size = fs, path, size
        self._url = public_url(fs.unstrip_protocol(path))  # for messages
        self._checksum, self._meter = checksum, meter
        # Sized to the file: a small one is not cut into many requests, a large one
        # is not held in memory.
        self._block_bytes = min(MAX_BLOCK_BYTES, max(MIN_BLOCK_BYTES, -(-size // 8)))
        self._in_order = in_order
        self._position = 0
        self._start, self._block = 0, b""  # the bytes at hand, and where they begin
        self._ahead: tuple[int, Future[bytes]] | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._whole: Any = None  # all of the file, on disk, where it only comes so
        self._digest, self._digested = google_crc32c.Checksum(), 0

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Moves; nothing is read."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        """Where the next read begins."""
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fills `buffer` with what is at hand, or with the next block's."""
        if self._position >= self._size:
            return 0
        if not self._start <= self._position < self._start + len(self._block):
            self._load(len(buffer))
        offset = self._position - self._start
        piece = self._block[offset : offset + len(buffer)]
        buffer[: len(piece)] = piece
        self._position += len(piece)
        return len(piece)

    def close(self) -> None:
        """Gives up what was fetched ahead."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
        if self._whole is not None:
            self._whole.close()
        super().close()

    def _load(self, wanted: int) -> None:
        position = self._position
        follows = position == self._start + len(self._block) and (self._block or self._in_order)
        size = self._block_bytes if follows else max(wanted, _FOOTER_BYTES)
        end = min(self._size, position + size)
        if self._ahead is not None and self._ahead[0] == position:
            block = self._ahead[1].result()
        else:
            block = self._fetch(position, end)
        self._ahead = None
        self._start, self._block = position, block
        if position == self._digested:
            self._digest.update(block)
            self._digested += len(block)
            self._compare()
        following = position + len(block)
        if follows and following < self._size:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(1, "earmark-fetch")
            until = min(self._size, following + self._block_bytes)
            self._ahead = (following, self._pool.submit(self._fetch, following, until))

    def _fetch(self, start: int, end: int) -> bytes:
        """Bytes `start` to `end`, whole, taken up again where an answer stopped short."""
        if self._whole is not None:
            return os.pread(self._whole.fileno(), end - start, start)
        pieces: list[bytes] = []
        at = start

        def one() -> None:
            nonlocal at
            if self.closed:  # between two tries of a block that was fetched ahead
                raise ValueError("nobody waits for this block any more")
            piece = self._fs.cat_file(self._path, start=at, end=end)
            if len(piece) > end - at:
                if len(piece) != self._size:
                    raise StorageError(
                        f"{self._url}: asked for {end - at} bytes, {len(piece)} came"
                    )
                # Of a web server that knows no ranges: it is not asked once for each block.
                self._whole = tempfile.TemporaryFile()  # noqa: SIM115
                self._whole.write(piece)
                self._whole.flush()
                piece = piece[at:end]
            pieces.append(piece)
            at += len(pieces[-1])
            if at < end:
                raise ShortRead(f"{end - at} of {end - start} bytes are missing")

        patiently(one, self._url, "read_retries", self._meter)
        return b"".join(pieces)

    def _compare(self) -> None:
        if self._checksum is None or self._digested != self._size:
            return
        if self._checksum.startswith(ETAG):
            self._fs.invalidate_cache(self._path)
            info = patiently(
                lambda: self._fs.info(self._path), self._url, "read_retries", self._meter
            )
            found = etag_of(info)
        else:
            found = base64.b64encode(self._digest.digest()).decode()
        if found != self._checksum:
            raise StorageError(
                f"{self._url}: what was read has checksum {found}, the listing said {self._checksum}: "
                "the file was replaced since, or damaged on its way; run again"
            )


def etag_of(info: Mapping[str, Any]) -> str | None:
    """What tells one content of a file from another, in fsspec's details of it."""
    return f"{ETAG}{info['ETag']}" if info.get("ETag") else None


def mtime_of(path: str, info: Mapping[str, Any]) -> str:
    """When a local file was last written, in fsspec's details of it; of a link, its target."""
    # A link that leads nowhere is one more file that cannot be opened.
    followed = info.get("islink") and os.path.exists(path)
    seconds = os.stat(path).st_mtime if followed else info["mtime"]
    return f"{MTIME}{round(seconds * 1e6)}"


class ShortRead(OSError):
    """Storage answered with fewer bytes than it was asked for."""


def patiently(
    action: Callable[[], Any], what: str, counter: str, meter: Meter | None = None
) -> Any:
    """The result of `action`, tried again after faults that pass.

    Waits `FIRST_WAIT_S`, doubled each time up to `MAX_WAIT_S`, with jitter, so that
    a thousand workers do not come back at the same moment.

    Raises:
        StorageError: the last of `MAX_TRIES` faults, or one that will not pass.
        FileNotFoundError: `what` is not there.
    """
    what = public_url(what)
    for number in range(1, MAX_TRIES + 1):
        try:
            return action()
        except FileNotFoundError as error:
            cause = _without_secret(error)
            raise FileNotFoundError(errno.ENOENT, f"{what} is not there any more") from cause
        except Exception as error:
            cause = _without_secret(error)
            if not is_passing(error):
                if (
                    cause
                    and isinstance(error, OSError)
                    and (type(error) is not OSError or error.errno)
                ):
                    error.errno = error.errno or errno.EIO  # see StorageError
                    raise
                raise StorageError(explain(error, what)) from cause
            if number == MAX_TRIES:
                raise StorageError(
                    f"{what} failed {MAX_TRIES} times, last with {_first_line(error)}"
                ) from cause
            if meter is not None:
                meter.add(counter)
            wait_s = min(MAX_WAIT_S, FIRST_WAIT_S * 2 ** (number - 1))
            _sleep(wait_s * random.uniform(0.5, 1))
    raise AssertionError("unreachable")


def _without_secret(error: BaseException) -> BaseException | None:
    """The error, for a traceback; None where it shows a URL with a query."""
    return None if _QUERY.search(str(error)) else error


_QUERY = re.compile(r"(https?://)(?:[^\s/'\"@]*@)?([^\s?'\"]*)\?[^\s'\")]*")


def is_passing(error: BaseException) -> bool:
    """Whether a fault is one that passes: 408, 429, 5xx, a connection that broke or stalled."""
    from gcsfs.retry import is_retriable
    from google.cloud.storage.retry import DEFAULT_RETRY

    if isinstance(
        error,
        ShortRead | ConnectionError | TimeoutError | asyncio.TimeoutError | fsspec.FSTimeoutError,
    ):
        return True
    if isinstance(error, OSError) and error.errno in (errno.EBUSY, errno.EREMOTEIO):
        return True  # what s3fs makes of S3's 503 and 500
    if type(error).__module__.startswith("aiohttp") and hasattr(error, "status"):
        return error.status in (408, 429) or error.status >= 500
    if any(
        kind.__module__.startswith("httpx") and kind.__name__ == "TransportError"
        for kind in type(error).__mro__
    ):
        return True  # the Hub's client
    if type(error).__module__.startswith("botocore") and type(error).__name__ in _BOTOCORE_PASSING:
        return True
    return bool(DEFAULT_RETRY._predicate(error) or is_retriable(error))


_BOTOCORE_PASSING = (
    "ConnectionClosedError",
    "ConnectTimeoutError",
    "EndpointConnectionError",
    "ReadTimeoutError",
    "ResponseStreamingError",
)


def explain(error: BaseException, what: str) -> str:
    """One sentence on why storage refused, and the cure where it is known."""
    text = _first_line(error)
    # Google's own sentence, out of the answer's JSON and the client's address around it.
    said = re.search(r'"message":\s*"((?:[^"\\]|\\.)*)"', str(error))
    if said:
        text = f"{type(error).__name__}: {said.group(1)}"
    if "requester pays" in text:
        return f"{what} is in a requester-pays bucket: name the project that pays with --billing-project"
    if "Invalid Credentials" in text or type(error).__name__ == "RefreshError":
        return (
            f"the Google credentials for {what} have expired or are not valid: run "
            "`gcloud auth application-default login`"
        )
    if type(error).__name__ in ("ConnectError", "ConnectTimeout", "OfflineModeIsEnabled"):
        return (
            f"{what}: the Hugging Face Hub cannot be reached ({text}); check the network, or fetch the files "
            "with `hf download --repo-type dataset OWNER/NAME --local-dir DIR` and name DIR"
        )
    if type(error).__name__ == "NoCredentialsError":  # botocore's
        return (
            f"{what} needs AWS credentials and there are none: set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        )
    status = error.status if hasattr(error, "status") else getattr(error, "code", None)
    if "Range Not Satisfiable" in text or status == 416:
        return f"{what} is shorter than it was listed: it was replaced since; run again"
    if type(error).__name__ == "DefaultCredentialsError":
        return (
            f"{what} needs Google credentials and there are none: run "
            "`gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS"
        )
    if type(error).__name__ in ("Forbidden", "Unauthorized") or "Forbidden" in text:
        return f"access to {what} is refused: {text}"
    return f"{what}: {text}"


def _first_line(error: BaseException) -> str:
    lines = _QUERY.sub(r"\1\2", str(error)).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


# ------------------------------------------------------------- Cloud Storage


@functools.cache
def _cloud_file_system(billing_project: str | None) -> Any:
    """gcsfs for reading blocks, one try a request; `patiently` tries again and counts.

    Taken from `gcsfs.core`, because the class that `gcsfs` exports asks for every
    bucket's type over gRPC first, which takes a minute where that is not reachable.
    """
    import aiohttp
    from gcsfs.core import GCSFileSystem

    class CloudStorage(GCSFileSystem):  # type: ignore[misc]
        protocol = ("gs", "gcs")

        async def _request(self, *args: Any, **kwargs: Any) -> Any:
            return await GCSFileSystem._request.__wrapped__(self, *args, **kwargs)

    return CloudStorage(
        # An emulator knows no credentials; google-cloud-storage sends none either.
        token="anon" if os.environ.get("STORAGE_EMULATOR_HOST") else None,
        requester_pays=billing_project or False,
        requests_timeout=aiohttp.ClientTimeout(total=None, sock_connect=STALL_S, sock_read=STALL_S),
        # Bytes as they are stored: an object with `Content-Encoding: gzip` has its
        # listed size and checksum only so.
        session_kwargs={"auto_decompress": False},
    )


def forget_clients() -> None:
    """Closes nothing, but makes the next call look at the environment anew."""
    cloud_client.cache_clear()
    _cloud_file_system.cache_clear()


@functools.cache
def cloud_client(billing_project: str | None = None) -> Any:
    """A google-cloud-storage client, one a process.

    Raises:
        StorageError: there are no credentials.
    """
    # The client would ask for each bucket's metadata once, for traces that nobody collects.
    os.environ.setdefault("DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA", "true")
    from google.auth.credentials import AnonymousCredentials
    from google.auth.exceptions import GoogleAuthError
    from google.cloud import storage
    from requests.adapters import HTTPAdapter

    try:
        if os.environ.get("STORAGE_EMULATOR_HOST"):
            client = storage.Client(project="emulator", credentials=AnonymousCredentials())
        else:
            try:
                client = storage.Client(project=billing_project)
            except OSError:  # credentials without a project; objects need none
                client = storage.Client(project="none")
    except GoogleAuthError as error:
        raise StorageError(explain(error, "Cloud Storage")) from error
    for scheme in ("https://", "http://"):  # a connection for each thread that may ask
        client._http.mount(scheme, HTTPAdapter(pool_maxsize=64))
    return client


def cloud_bucket(path: str, access: Access) -> tuple[Any, str]:
    """(google-cloud-storage bucket, object name) of `bucket/name`.

    Raises:
        StorageError: there are no credentials, or a bucket cannot have this name.
    """
    bucket, _, name = path.partition("/")
    client = cloud_client(access.billing_project)
    try:
        return client.bucket(bucket, user_project=access.billing_project), name
    except (ValueError, IndexError) as error:  # IndexError: the client looks at the first letter
        raise StorageError(f"gs://{path} names no bucket: expected gs://BUCKET/NAME") from error


def counted_retry(counter: str, meter: Meter | None = None) -> Any:
    """google-cloud-storage's own retry, with each try counted."""
    from google.api_core.retry import Retry
    from google.cloud.storage.retry import DEFAULT_RETRY

    return Retry(
        predicate=DEFAULT_RETRY._predicate,
        initial=FIRST_WAIT_S,
        maximum=MAX_WAIT_S,
        timeout=RETRY_S,
        on_error=None if meter is None else lambda error: meter.add(counter),
    )


def list_cloud(
    path: str, access: Access, *, folders: bool = False, meter: Meter | None = None
) -> Iterator[StoredFile]:
    """Objects whose name begins with `path` (`bucket/prefix`), sorted, page by page.

    A page is a request and 1,000 objects, and no more than a page is held.

    Args:
        path: bucket and prefix.
        access: who pays.
        folders: stop at the next `/`; what lies deeper comes as a path that ends in `/`
            with size 0, in its place among the objects.
        meter: counts `list_retries`.

    Raises:
        StorageError: the bucket is not there, or may not be listed.
    """
    from google.api_core.exceptions import GoogleAPICallError, NotFound, RetryError
    from google.auth.exceptions import GoogleAuthError

    bucket, prefix = cloud_bucket(path, access)
    try:
        found = bucket.client.list_blobs(
            bucket,
            prefix=prefix or None,
            delimiter="/" if folders else None,
            fields="items(name,size,crc32c),prefixes,nextPageToken",
            retry=counted_retry("list_retries", meter),
        )
        for page in found.pages:
            names = f"{bucket.name}/"
            files = [StoredFile(names + blob.name, blob.size or 0, blob.crc32c) for blob in page]
            files += [StoredFile(names + folder, 0) for folder in page.prefixes]
            yield from sorted(files, key=lambda file: file.path)
    except NotFound as error:
        raise StorageError(f"there is no bucket gs://{bucket.name}: check the spelling") from error
    except (GoogleAPICallError, RetryError, GoogleAuthError) as error:
        raise StorageError(explain(error, f"gs://{path}")) from error


def glob_cloud(
    path: str, access: Access = DEFAULT_ACCESS, meter: Meter | None = None
) -> Iterator[StoredFile]:
    """Objects that a glob matches, and those in the folders that it matches, sorted."""
    matches = re.compile(glob_translate(path)).match
    fixed = re.split(r"[*?\[]", path, maxsplit=1)[0]
    if "/" in path[len(fixed) :]:
        below = re.compile(re.sub(r"\\[zZ]$", "", glob_translate(path)) + "/")
        for found in list_cloud(fixed, access, meter=meter):
            if matches(found.path) or below.match(found.path):
                yield found
        return
    # The pattern looks at one folder only: what lies deeper beside it is not listed.
    for found in list_cloud(fixed, access, folders=True, meter=meter):
        if not found.path.endswith("/"):
            if matches(found.path):
                yield found
        elif matches(found.path.rstrip("/")):
            yield from list_cloud(found.path, access, meter=meter)


def find_cloud(path: str, access: Access, meter: Meter | None = None) -> StoredFile | None:
    """One object, or None where there is none of exactly this name."""
    from google.api_core.exceptions import GoogleAPICallError, RetryError
    from google.auth.exceptions import GoogleAuthError

    bucket, name = cloud_bucket(path, access)
    if not name:
        return None
    try:
        blob = bucket.get_blob(name, retry=counted_retry("list_retries", meter))
    except (GoogleAPICallError, RetryError, GoogleAuthError) as error:
        raise StorageError(explain(error, f"gs://{path}")) from error
    return blob and StoredFile(path, blob.size or 0, blob.crc32c)


# ------------------------------------------------------------------ folders


def fetch_folder(
    url: str, suffixes: tuple[str, ...], access: Access = DEFAULT_ACCESS, cache: Path | None = None
) -> Path:
    """A local copy of the files directly in a remote folder, made once for each content.

    Args:
        url: the folder, such as `gs://bucket/student`.
        suffixes: of the files that are wanted.
        access: how remote storage is used.
        cache: where copies are kept; by default `earmark` in the user's cache folder.

    Raises:
        OSError: the folder holds no such file, or cannot be read.
    """
    url = url.rstrip("/")
    fs, path = open_file_system(url, access)
    facts: dict[str, str] = {}  # a time, an ETag: new content may have the old size
    if url.startswith(CLOUD_STORAGE):
        listed = list_cloud(f"{path}/", access, folders=True)
        found = [file for file in listed if not file.path.endswith("/")]
    else:
        fs.invalidate_cache()
        entries = patiently(lambda: fs.ls(path, detail=True), url, "list_retries")
        found = [StoredFile(e["name"], e["size"]) for e in entries if e["type"] == "file"]
        facts = {entry["name"]: repr(sorted(entry.items())) for entry in entries}
    wanted = sorted((f for f in found if f.path.endswith(suffixes)), key=lambda file: file.path)
    if not wanted:
        raise FileNotFoundError(f"{url!r} holds none of {', '.join(suffixes)}")
    if cache is None:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        cache = Path(home) / "earmark"
    content = repr((url, [(file, facts.get(file.path)) for file in wanted]))
    digest = hashlib.sha256(content.encode()).hexdigest()[:16]
    copy = cache / f"{posixpath.basename(path)}-{digest}"
    if copy.is_dir():
        return copy
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetching-", dir=cache) as name:
        whole = Path(name) / "whole"
        whole.mkdir()
        for file in wanted:
            stream = open_remote(fs, file.path, file.size, checksum=file.checksum, in_order=True)
            with stream, (whole / posixpath.basename(file.path)).open("wb") as target:
                shutil.copyfileobj(stream, target, 1 << 20)
        try:
            whole.rename(copy)
        except OSError:  # another process was first
            if not copy.is_dir():
                raise
    return copy
