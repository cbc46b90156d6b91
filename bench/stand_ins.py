"""Stand-ins on loopback for Cloud Storage, S3, Dataflow and an image registry.

    with CloudStorage("in", "out", faults=Faults(rate=0.1)) as cloud:
        cloud.put("in", "a.tar", data)
        subprocess.run([...], env={**os.environ, **cloud.env}, check=True)
        print(cloud.faults.counts, len(cloud.requests))

Each is a context manager, listens on a free port of 127.0.0.1, and is gone after
the `with`. The two emulators from PyPI, gcp-storage-emulator and moto, each run in
a process of their own, which also ends when this one is killed. `env` is for a child
process: google-auth, gcsfs and boto read most of it when they are imported.
"""

from __future__ import annotations

import base64
import bisect
import contextlib
import hashlib
import http.client
import json
import os
import random
import re
import secrets
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 10.0
COPY_BYTES = 1 << 20
# Cloud Storage keeps an unfinished upload in whole multiples of this.
RESUMABLE_UNIT_BYTES = 256 * 1024
MAX_PAGE = 1000  # entries; Cloud Storage's own limit
PROJECT = "stand-in-project"


@dataclass
class Request:
    """One request that came to a stand-in; `status` is None until it is answered."""

    method: str
    path: str  # percent-decoded
    query: dict[str, str]
    kind: str
    status: int | None = None
    fault: str | None = None


@dataclass
class Faults:
    """Which share of the requests goes wrong, and how; see `CloudStorage`.

    The draws are repeatable; which request meets which draw is not, once several
    come at the same time.
    """

    rate: float = 0.1
    kinds: tuple[str, ...] = ("503", "429", "reset", "stall", "truncate", "short")
    seed: int = 0
    stall_s: float = 5.0
    counts: Counter[str] = field(default_factory=Counter)  # kind -> times injected

    def __post_init__(self) -> None:
        unknown = set(self.kinds) - {"503", "429", "reset", "stall", "truncate", "short"}
        if unknown:
            raise ValueError(f"Faults(kinds=...) has unknown kinds: {sorted(unknown)}")
        self._chance = random.Random(self.seed)
        self._lock = threading.Lock()

    def draw(self, request_kind: str) -> str | None:
        """The fault for a request of this kind, or None; not yet counted."""
        possible = [kind for kind in self.kinds if kind != "short" or request_kind == "read"]
        if request_kind in ("write-start", "delete"):  # their answers have no body to cut
            possible = [kind for kind in possible if kind != "truncate"]
        with self._lock:
            if self._chance.random() >= self.rate or not possible:
                return None
            return self._chance.choice(possible)

    def below(self, limit: int) -> int:
        """A whole number from 0 to `limit` - 1."""
        with self._lock:
            return self._chance.randrange(limit)

    def count(self, kind: str) -> None:
        with self._lock:
            self.counts[kind] += 1


# ---------------------------------------------------------------- the HTTP server


@dataclass
class Reply:
    """An answer: `chunks` yield `length` bytes in all."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    chunks: Iterable[bytes] = ()
    length: int = 0


def raw(status: int, body: bytes, content_type: str, **headers: str) -> Reply:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Reply(status, {"Content-Type": content_type, **named}, [body], len(body))


def as_json(body: Any, status: int = 200, **headers: str) -> Reply:
    return raw(status, json.dumps(body).encode(), "application/json; charset=UTF-8", **headers)


def google_error(status: int, message: str, reason: str, domain: str = "global") -> Reply:
    detail = {"message": message, "domain": domain, "reason": reason}
    return as_json({"error": {"code": status, "message": message, "errors": [detail]}}, status)


class Exchange(BaseHTTPRequestHandler):
    """One connection; each request is read whole and handed to the server's `answer`."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each small answer waits 40 ms for an ACK
    server: Server
    body: bytes
    query: dict[str, str]
    route: str  # the path, still percent-encoded

    def handle_request(self) -> None:
        url = urlsplit(self.path)
        self.route = url.path
        self.query = dict(parse_qsl(url.query, keep_blank_values=True))
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            self.body = b"".join(self._read_chunked())
        else:
            self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.answer(self)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = handle_request

    def _read_chunked(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline().split(b";")[0], 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():  # trailers, up to the empty line
            pass

    def send(self, reply: Reply, cut: int | None = None, length: int | None = None) -> None:
        """Sends the reply, only the first `cut` bytes of its body, announced as `length`."""
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        if reply.status not in (204, 304):
            self.send_header("Content-Length", str(reply.length if length is None else length))
        self.end_headers()
        left = reply.length if cut is None else cut
        chunks = iter(reply.chunks)
        try:
            while left > 0 and self.command != "HEAD":
                chunk = next(chunks)[:left]
                self.wfile.write(chunk)
                left -= len(chunk)
        finally:
            if close := getattr(chunks, "close", None):
                close()

    def reset(self) -> None:
        """Closes the connection with a RST, as a broken machine or balancer does."""
        self.close_connection = True
        on, seconds = 1, 0
        self.connection.setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", on, seconds)
        )
        # Not `close`: `rfile` keeps the socket open, and a shutdown would send a FIN.
        os.close(self.connection.detach())

    def log_message(self, format: str, *args: object) -> None:
        """Keeps quiet: `requests` is the log."""


class Server(ThreadingHTTPServer):
    """Serves until `stop`, which also ends the connections that clients keep open."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, answer: Callable[[Exchange], None]):
        super().__init__(("127.0.0.1", 0), Exchange)
        self.port: int = self.server_address[1]
        self.answer = answer
        self.stopping = threading.Event()
        self._open: dict[threading.Thread, socket.socket] = {}
        self._thread = threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        self._open[threading.current_thread()] = request
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._open.pop(threading.current_thread(), None)

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A client that goes away in the middle is not the stand-in's fault.
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError) and not (
            self.stopping.is_set()
        ):
            super().handle_error(request, client_address)

    def stop(self) -> None:
        self.stopping.set()
        self.shutdown()
        self.server_close()
        for thread, connection in list(self._open.items()):
            with contextlib.suppress(OSError):  # already closed by its own thread
                connection.shutdown(socket.SHUT_RDWR)
            thread.join(STOP_TIMEOUT_S)
        self._thread.join(STOP_TIMEOUT_S)


class Child:
    """This file in a process of its own, as `role`; it prints its port and serves."""

    def __init__(self, role: str):
        self._process = subprocess.Popen(
            [sys.executable, __file__, role],
            stdin=subprocess.PIPE,  # its end tells the child that this process is gone
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        watch = threading.Timer(START_TIMEOUT_S, self._process.kill)
        watch.start()
        line = self._process.stdout.readline()
        watch.cancel()
        if not line:
            self.stop()
            raise RuntimeError(
                f"the {role} stand-in did not start (exit {self._process.returncode}; its own "
                "message is above): are gcp-storage-emulator and moto[server] installed?"
            )
        self.port = int(line)

    def stop(self) -> None:
        self._process.stdin.close()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


# ---------------------------------------------------------------- Cloud Storage


@dataclass
class Upload:
    """A resumable upload's session."""

    bucket: str
    name: str
    about: dict[str, Any]
    content_type: str
    query: dict[str, str]
    data: bytearray = field(default_factory=bytearray)
    finished: Reply | None = None

    def keep(self, start: int, chunk: bytes, last: bool) -> None:
        """Appends; bytes that are here already are skipped, an odd tail is not kept."""
        self.data += chunk[len(self.data) - start :]
        if not last:
            del self.data[len(self.data) // RESUMABLE_UNIT_BYTES * RESUMABLE_UNIT_BYTES :]


class CloudStorage:
    """Cloud Storage's JSON API, with faults on request.

    gcp-storage-emulator holds the objects; `url` is a proxy in front of it that does
    what the emulator does not: preconditions, resumable uploads that can be resumed,
    ranges past the end, `fields`, JSON errors. Not checked by it: what is inside a
    batch request, customer-supplied keys, permissions beyond `deny`.

    `requester_pays` names buckets whose requests must say who pays. `deny` has pairs
    such as ("POST", "out"): that method on that bucket is answered with 403.
    Both and `faults` may be changed while it runs. A fault is one of

    - 503, 429: refused before anything is done, one in four with Retry-After.
    - reset: a RST in the middle of the answer's body, or without an answer if it has no
      body. Of an upload, half the resets come before the object is stored.
    - stall: half an answer, then nothing for `stall_s`, then the connection ends.
    - truncate: the right status and Content-Length, but less body; the connection ends.
    - short (only of object data): the right status and a whole answer with less data.
    """

    def __init__(self, *buckets: str, faults: Faults | None = None):
        self.buckets = buckets
        self.faults = faults
        self.requests: list[Request] = []
        self.requester_pays: set[str] = set()
        self.deny: set[tuple[str, str]] = set()

    def __enter__(self) -> CloudStorage:
        with contextlib.ExitStack() as stack:
            child = Child("cloud-storage")
            stack.callback(child.stop)
            self._emulator_port = child.port
            self._connections = threading.local()
            self._lock = threading.RLock()  # a precondition and the change it allows
            self._uploads: dict[str, Upload] = {}
            self._server = Server(self._answer)
            stack.callback(self._server.stop)
            metadata = Server(_answer_metadata)
            stack.callback(metadata.stop)
            config = tempfile.mkdtemp(prefix="stand-in-gcloud-")
            stack.callback(shutil.rmtree, config)
            self.url = f"http://127.0.0.1:{self._server.port}"
            self.env = {
                "STORAGE_EMULATOR_HOST": self.url,
                "GCE_METADATA_HOST": f"127.0.0.1:{metadata.port}",
                "GCE_METADATA_IP": f"127.0.0.1:{metadata.port}",
                "GOOGLE_CLOUD_PROJECT": PROJECT,
                # gcsfs would ask over gRPC what kind of bucket it is, for up to a minute.
                "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
                "NO_PROXY": "localhost,127.0.0.1",
                "no_proxy": "localhost,127.0.0.1",
                # No real credentials: neither gcloud's nor a key file.
                "CLOUDSDK_CONFIG": config,
                "GOOGLE_APPLICATION_CREDENTIALS": "",
            }
            for bucket in self.buckets:
                self.create_bucket(bucket)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    # Straight to the emulator: not logged, no faults.

    def create_bucket(self, bucket: str) -> None:
        self._ask("POST", "/storage/v1/b", {"name": bucket})
        # Deleted objects would stay in memory.
        policy = {"softDeletePolicy": {"retentionDurationSeconds": "0"}}
        self._ask("PATCH", f"/storage/v1/b/{bucket}", policy)

    def put(self, bucket: str, name: str, data: bytes) -> None:
        with self._lock:
            reply = self._store(bucket, name, {}, data, "application/octet-stream")
        if reply.status != 200:
            raise FileNotFoundError(f"cannot put gs://{bucket}/{name}: is there such a bucket?")

    def put_many(self, bucket: str, names: Sequence[str], data: bytes = b"") -> None:
        """The same `data` under each name, 100,000 in a few seconds."""
        content = base64.b64encode(data).decode()
        with self._lock:
            self._ask("POST", "/fill", {"bucket": bucket, "names": list(names), "data": content})

    def get(self, bucket: str, name: str) -> bytes:
        reply = self._emulator("GET", f"{_path(bucket, name)}?alt=media")
        if reply.status != 200:
            raise FileNotFoundError(f"gs://{bucket}/{name}")
        return b"".join(reply.chunks)

    def names(self, bucket: str, prefix: str = "") -> list[str]:
        found: list[str] = []
        query = {"prefix": prefix}
        while True:
            page = self._ask("GET", f"/storage/v1/b/{bucket}/o?{urlencode(query)}")
            found += [item["name"] for item in page.get("items", [])]
            if "nextPageToken" not in page:
                return found
            query["pageToken"] = page["nextPageToken"]

    def delete(self, bucket: str, name: str) -> None:
        with self._lock:
            if self._emulator("DELETE", _path(bucket, name)).status != 200:
                raise FileNotFoundError(f"gs://{bucket}/{name}")

    # The proxy.

    def _answer(self, http: Exchange) -> None:
        kind, bucket, name = self._route(http)
        request = Request(http.command, unquote(http.route), http.query, kind)
        self.requests.append(request)
        faults = self.faults
        if refusal := self._refusal(http, bucket):
            request.status = refusal.status
            http.send(refusal)
            return
        fault = faults.draw(kind) if faults else None
        if faults and fault in ("503", "429"):
            faults.count(fault)
            request.status, request.fault = int(fault), fault
            http.send(_overloaded(int(fault), faults.below(4) == 0))
            return
        if faults and fault == "reset" and kind == "write" and faults.below(2) == 0:
            faults.count(fault)
            request.fault = fault
            self._receive_half(http)
            http.reset()
            return
        reply = self._reply(http, kind, bucket, name)
        request.status = reply.status
        if faults and fault:
            self._send_with(fault, faults, http, reply, request)
        else:
            http.send(reply)

    def _send_with(
        self, fault: str, faults: Faults, http: Exchange, reply: Reply, request: Request
    ) -> None:
        if fault == "short":
            possible = reply.status in (200, 206) and reply.length > 1
        else:
            possible = reply.length > 0 or fault in ("reset", "stall")
        if not possible:
            http.send(reply)
            return
        faults.count(fault)
        request.fault = fault
        if fault == "short":
            length = 1 + faults.below(reply.length - 1)
            http.send(reply, cut=length, length=length)
            return
        if reply.length:
            http.send(reply, cut=faults.below(reply.length))
        else:
            request.status = None
        http.close_connection = True
        if fault == "stall":
            self._server.stopping.wait(faults.stall_s)
        elif fault == "reset":
            http.reset()

    def _route(self, http: Exchange) -> tuple[str, str | None, str | None]:
        """(kind, bucket, object) of a request."""
        method, query = http.command, http.query
        if "upload_id" in query:
            upload = self._uploads.get(query["upload_id"])
            kind = "write" if method in ("PUT", "POST") else "other"
            return (kind, upload.bucket, upload.name) if upload else (kind, None, None)
        if found := re.fullmatch(r"(?:/storage/v1)?/b/([^/]+)", http.route):
            return ("metadata" if method == "GET" else "other"), unquote(found[1]), None
        pattern = r"(/upload|/download)?(?:/storage/v1)?/b/([^/]+)/o(?:/(.+))?"
        if not (found := re.fullmatch(pattern, http.route)):
            return "other", None, None
        bucket, name = unquote(found[2]), unquote(found[3]) if found[3] else None
        if name is None:
            if method == "GET":
                return "list", bucket, None
            start = query.get("uploadType") == "resumable"
            return ("write-start" if start else "write"), bucket, query.get("name")
        if copy := re.search(r"/(?:copyTo|rewriteTo)/b/([^/]+)/o/(.+)", http.route):
            return "other", unquote(copy[1]), unquote(copy[2])
        if method == "POST" and http.route.endswith("/compose"):
            return "other", bucket, name.removesuffix("/compose")
        if method == "GET":
            media = found[1] == "/download" or query.get("alt") == "media"
            return ("read" if media else "metadata"), bucket, name
        return ("delete" if method == "DELETE" else "other"), bucket, name

    def _refusal(self, http: Exchange, bucket: str | None) -> Reply | None:
        payer = http.query.get("userProject") or http.headers.get("x-goog-user-project")
        if bucket in self.requester_pays and not payer:
            message = "Bucket is a requester pays bucket but no user project provided."
            return google_error(400, message, "required")
        if (http.command, bucket) in self.deny:
            right = {"GET": "get", "DELETE": "delete", "PATCH": "update"}.get(
                http.command, "create"
            )
            message = (
                f"stand-in@{PROJECT}.iam.gserviceaccount.com does not have storage.objects.{right} "
                "access to the Google Cloud Storage object. Permission "
                f"'storage.objects.{right}' denied on resource (or it may not exist)."
            )
            return google_error(403, message, "forbidden")
        return None

    def _reply(self, http: Exchange, kind: str, bucket: str | None, name: str | None) -> Reply:
        if "upload_id" in http.query:
            with self._lock:
                return self._resume(http)
        if kind == "read":
            return self._read(http, bucket, name)
        if kind == "write-start":
            return self._start_upload(http, bucket, name)
        if kind == "write":
            return self._write(http, bucket, name)
        with self._lock if http.command != "GET" else contextlib.nullcontext():
            reading = http.command == "GET"
            if name and (failed := self._unmet(http.query, bucket, name, reading)):
                return failed
            reply = self._emulator(http.command, http.path, http.body, dict(http.headers))
        if reply.status >= 400 and not reply.length:
            return _error_of(reply.status, bucket, name)
        if kind == "delete" and reply.status == 200:
            return Reply(204)
        if "fields" in http.query and reply.status == 200 and kind in ("list", "metadata"):
            picked = pick(json.loads(b"".join(reply.chunks)), http.query["fields"])
            return as_json(picked)
        return reply

    def _about(self, bucket: str, name: str) -> dict[str, Any] | None:
        reply = self._emulator("GET", _path(bucket, name))
        body = b"".join(reply.chunks)
        return json.loads(body) if reply.status == 200 else None

    def _unmet(
        self, query: dict[str, str], bucket: str, name: str, reading: bool = False
    ) -> Reply | None:
        """The refusal if a precondition in `query` does not hold for the object now."""
        asked = [key for key in query if re.fullmatch(r"if(Metag|G)eneration(Not)?Match", key)]
        if not asked and "generation" not in query:
            return None
        now = self._about(bucket, name)
        if "generation" in query and now and query["generation"] != now["generation"]:
            return _error_of(404, bucket, name)
        for key in asked:
            is_now = now["metageneration" if "Meta" in key else "generation"] if now else "0"
            if (query[key] == is_now) == ("Not" in key):
                if "Not" in key and reading:
                    return Reply(304)
                message = "At least one of the pre-conditions you specified did not hold."
                return google_error(412, message, "conditionNotMet")
        return None

    def _read(self, http: Exchange, bucket: str, name: str) -> Reply:
        if failed := self._unmet(http.query, bucket, name, reading=True):
            return failed
        about = self._about(bucket, name)
        if about is None:  # the API's own data path answers in plain text
            return raw(404, f"No such object: {bucket}/{name}".encode(), "text/html")
        size = int(about["size"])
        span = _span(http.headers.get("Range"), size)
        headers = {
            "Content-Type": about.get("contentType") or "application/octet-stream",
            "ETag": about["etag"],
            "X-Goog-Generation": about["generation"],
            "X-Goog-Metageneration": about["metageneration"],
            "X-Goog-Hash": f"crc32c={about['crc32c']},md5={about['md5Hash']}",
            "X-Goog-Stored-Content-Encoding": "identity",
            "X-Goog-Stored-Content-Length": str(size),
        }
        if span is None:
            return Reply(200, headers, self._data(bucket, name, 0, size), size)
        start, stop = span
        if start >= stop:
            reply = raw(416, b"The requested range cannot be satisfied.", "text/html")
            reply.headers["Content-Range"] = f"bytes */{size}"
            return reply
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        return Reply(206, headers, self._data(bucket, name, start, stop), stop - start)

    def _data(self, bucket: str, name: str, start: int, stop: int) -> Iterator[bytes]:
        if start < stop:
            wanted = {"Range": f"bytes={start}-{stop - 1}"}
            reply = self._emulator("GET", f"{_path(bucket, name)}?alt=media", b"", wanted)
            yield from reply.chunks

    def _write(self, http: Exchange, bucket: str, name: str | None) -> Reply:
        content_type = http.headers.get("Content-Type", "application/octet-stream")
        about: dict[str, Any] = {}
        data = http.body
        if http.query.get("uploadType") == "multipart":
            try:
                about, content_type, data = parts_of(content_type, data)
            except ValueError:
                return google_error(400, "Malformed multipart body.", "badRequest")
        name = name or about.get("name")
        if not name:
            return google_error(400, "Required parameter: name", "required")
        with self._lock:
            failed = self._unmet(http.query, bucket, name)
            return failed or self._store(bucket, name, about, data, content_type)

    def _store(
        self, bucket: str, name: str, about: dict[str, Any], data: bytes, content_type: str
    ) -> Reply:
        # Always as a resumable upload: its body needs no parser, which the emulator's
        # multipart takes a second for at 100 MB, and it may be empty.
        query = urlencode({"uploadType": "resumable", "name": name})
        path = f"/upload/storage/v1/b/{quote(bucket)}/o"
        start = self._emulator(
            "POST",
            f"{path}?{query}",
            json.dumps(about).encode(),
            {"Content-Type": "application/json", "X-Upload-Content-Type": content_type},
        )
        if start.status != 200:
            return _error_of(start.status, bucket, None)
        upload_id = dict(parse_qsl(urlsplit(start.headers["Location"]).query))["upload_id"]
        query = urlencode({"uploadType": "resumable", "upload_id": upload_id})
        kind = {"Content-Type": "application/octet-stream"}
        return self._emulator("PUT", f"{path}?{query}", data, kind)

    def _start_upload(self, http: Exchange, bucket: str, name: str | None) -> Reply:
        about = json.loads(http.body or b"{}")
        name = name or about.get("name")
        if not name:
            return google_error(400, "Required parameter: name", "required")
        if self._emulator("GET", f"/storage/v1/b/{quote(bucket)}").status != 200:
            return _error_of(404, bucket, None)
        if failed := self._unmet(http.query, bucket, name):
            return failed
        upload_id = secrets.token_urlsafe(24)
        content_type = http.headers.get("X-Upload-Content-Type", "application/octet-stream")
        self._uploads[upload_id] = Upload(bucket, name, about, content_type, http.query)
        location = f"http://{http.headers['Host']}{http.path}&upload_id={upload_id}"
        return Reply(200, {"Location": location, "X-GUploader-UploadID": upload_id})

    def _resume(self, http: Exchange) -> Reply:
        upload = self._uploads.get(http.query["upload_id"])
        if upload is None:
            return google_error(404, "No such upload session.", "notFound")
        if http.command == "DELETE":
            del self._uploads[http.query["upload_id"]]
            return Reply(499)
        if upload.finished:
            return upload.finished
        start, total, status_only = _upload_span(http)
        if start > len(upload.data):
            message = (
                "Invalid request. According to the Content-Range header, the upload offset is "
                f"{start} byte(s), which exceeds already uploaded size of {len(upload.data)} byte(s)."
            )
            return google_error(400, message, "badRequest")
        if not status_only:
            upload.keep(start, http.body, last=total == start + len(http.body))
        if total is None or len(upload.data) != total:
            kept = {"Range": f"bytes=0-{len(upload.data) - 1}"} if upload.data else {}
            return Reply(308, kept)
        if failed := self._unmet(upload.query, upload.bucket, upload.name):
            return failed
        hashes = re.findall(r"(crc32c|md5)=([\w+/=]+)", http.headers.get("X-Goog-Hash", ""))
        for key, value in hashes:
            upload.about.setdefault("md5Hash" if key == "md5" else key, value)
        reply = self._store(
            upload.bucket, upload.name, upload.about, bytes(upload.data), upload.content_type
        )
        upload.data.clear()
        upload.finished = raw(reply.status, b"".join(reply.chunks), "application/json")
        return upload.finished

    def _receive_half(self, http: Exchange) -> None:
        """Keeps what a connection that broke in the middle of an upload's chunk had brought."""
        with self._lock:
            upload = self._uploads.get(http.query.get("upload_id", ""))
            if upload and not upload.finished:
                start, _, status_only = _upload_span(http)
                if not status_only and start <= len(upload.data):
                    upload.keep(start, http.body[: len(http.body) // 2], last=False)

    # The emulator behind it.

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        headers = {"Content-Type": "application/json"}
        data = json.dumps(body).encode() if body is not None else b""
        reply = self._emulator(method, path, data, headers)
        text = b"".join(reply.chunks)
        if reply.status != 200:
            raise RuntimeError(f"{method} {path}: the emulator answered {reply.status} {text!r}")
        return json.loads(text)

    def _emulator(
        self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None
    ) -> Reply:
        """One request over this thread's connection; a short answer is read at once."""
        link = getattr(self._connections, "link", None)
        if link is None:
            link = http.client.HTTPConnection("127.0.0.1", self._emulator_port, timeout=120)
            link.connect()
            link.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._connections.link = link
        hop = {"content-length", "transfer-encoding", "connection", "accept-encoding", "expect"}
        sent = {key: value for key, value in (headers or {}).items() if key.lower() not in hop}
        # The emulator builds links to itself from Host: they must lead back to the proxy.
        sent["Host"] = f"127.0.0.1:{self._server.port}"
        try:
            link.request(method, path, body or None, sent)
            answer = link.getresponse()
        except (OSError, http.client.HTTPException) as error:
            self._drop(link)
            message = f"the emulator failed at {method} {path}: {error!r}"
            return google_error(501, message, "notImplemented")
        length = int(answer.headers["Content-Length"])
        kept = {key: answer.headers[key] for key in ("Content-Type", "Location", "ETag")}
        kept = {key: value for key, value in kept.items() if value}
        if length <= COPY_BYTES:
            return Reply(answer.status, kept, [answer.read()], length)
        return Reply(answer.status, kept, self._stream(link, answer), length)

    def _stream(
        self, link: http.client.HTTPConnection, answer: http.client.HTTPResponse
    ) -> Iterator[bytes]:
        # While this is open, another request from this thread must have its own connection.
        self._connections.link = None
        try:
            while chunk := answer.read(COPY_BYTES):
                yield chunk
        finally:
            if answer.isclosed() and self._connections.link is None:
                self._connections.link = link
            else:
                link.close()

    def _drop(self, link: http.client.HTTPConnection) -> None:
        link.close()
        self._connections.link = None


def _path(bucket: str, name: str) -> str:
    return f"/storage/v1/b/{quote(bucket, safe='')}/o/{quote(name, safe='')}"


def _overloaded(status: int, retry_after: bool) -> Reply:
    if status == 503:
        reply = google_error(
            503, "We encountered an internal error. Please try again.", "backendError"
        )
    else:
        message = "The rate of requests exceeds the rate limit. Please reduce the rate of requests."
        reply = google_error(429, message, "rateLimitExceeded", "usageLimits")
    if retry_after:
        reply.headers["Retry-After"] = "1"
    return reply


def _error_of(status: int, bucket: str | None, name: str | None) -> Reply:
    if status != 404:
        return google_error(status, f"The emulator answered {status}.", "invalid")
    if name is None:
        return google_error(404, "The specified bucket does not exist.", "notFound")
    return google_error(404, f"No such object: {bucket}/{name}", "notFound")


def _span(header: str | None, size: int) -> tuple[int, int] | None:
    """[start, stop) of a Range header: None is all of it, an empty one cannot be had."""
    found = re.fullmatch(r"\s*bytes=(\d*)-(\d*)\s*", header or "")
    if not found or not (found[1] or found[2]):
        return None
    if not found[1]:
        return max(0, size - int(found[2])), size
    start, stop = int(found[1]), int(found[2] or size) + 1
    return (start, min(stop, size)) if start < stop else None


def _upload_span(http: Exchange) -> tuple[int, int | None, bool]:
    """(first byte, whole size if it is known, is it only a question) of a chunk."""
    header = http.headers.get("Content-Range")
    if header is None:
        return 0, len(http.body), False
    found = re.fullmatch(r"bytes (?:(\d+)-(?:\d+|\*)|\*)/(\d+|\*)", header.strip())
    if not found:
        raise ValueError(f"an upload came with Content-Range: {header!r}")
    total = None if found[2] == "*" else int(found[2])
    return int(found[1] or 0), total, found[1] is None


def parts_of(content_type: str, body: bytes) -> tuple[dict[str, Any], str, bytes]:
    """(description, content type, data) of a multipart upload."""
    boundary = re.search(r'boundary="?([^";]+)"?', content_type)
    if not boundary:
        raise ValueError("no boundary")
    mark = b"--" + boundary[1].encode()
    first = body.index(mark)
    # gcsfs ends its lines with LF alone.
    newline = b"\r\n" if body[first + len(mark) :].startswith(b"\r\n") else b"\n"
    second = body.index(newline + mark, first + len(mark))
    last = body.rindex(newline + mark + b"--")
    about = body[first:second].split(newline * 2, 1)[1]
    blank = body.index(newline * 2, second + len(newline))
    headers = body[second:blank].decode("latin-1")
    stated = re.search(r"^content-type:\s*(.+?)\s*$", headers, re.IGNORECASE | re.MULTILINE)
    kind = stated[1] if stated else "application/octet-stream"
    return json.loads(about), kind, body[blank + 2 * len(newline) : last]


def pick(value: Any, fields: str) -> Any:
    """What a `fields` parameter leaves: "items(name,size),nextPageToken", "a/b", "*"."""
    wanted: dict[str, list[str]] = {}
    for part in _split(fields):
        found = re.fullmatch(r"([^/(]+)(?:/(.+)|\((.+)\))?", part)
        if found is None:
            raise ValueError(f"cannot read fields={fields!r} at {part!r}")
        inner = found[2] or found[3]
        wanted.setdefault(found[1].strip(), []).extend([inner] if inner else [])
    if "*" in wanted:
        return value
    if isinstance(value, list):
        return [pick(item, fields) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: pick(value[key], ",".join(inner)) if inner else value[key]
        for key, inner in wanted.items()
        if key in value
    }


def _split(fields: str) -> list[str]:
    """At the commas that are not in parentheses."""
    parts, depth = [""], 0
    for character in fields:
        depth += (character == "(") - (character == ")")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _answer_metadata(http: Exchange) -> None:
    """The metadata server of a virtual machine: a project, a service account, a token."""
    account = {
        "aliases": ["default"],
        "email": f"stand-in@{PROJECT}.iam.gserviceaccount.com",
        "scopes": ["https://www.googleapis.com/auth/cloud-platform"],
    }
    flavor = {"Metadata_Flavor": "Google"}
    path = http.route.rstrip("/").removeprefix("/computeMetadata/v1")
    if path in ("", "/instance"):
        http.send(raw(200, b"computeMetadata/\n", "text/plain", **flavor))
    elif path == "/project/project-id":
        http.send(raw(200, PROJECT.encode(), "text/plain", **flavor))
    elif path == "/project/numeric-project-id":
        http.send(raw(200, b"123456789", "text/plain", **flavor))
    elif path in ("/universe/universe-domain", "/universe/universe_domain"):
        http.send(raw(200, b"googleapis.com", "text/plain", **flavor))
    elif path.endswith("/token"):
        token = {"access_token": "stand-in", "expires_in": 3600, "token_type": "Bearer"}
        http.send(as_json(token, **flavor))
    elif path.endswith("/email"):
        http.send(raw(200, account["email"].encode(), "text/plain", **flavor))
    elif re.fullmatch(r"/instance/service-accounts/[^/]+", path):
        http.send(as_json(account, **flavor))
    else:
        http.send(raw(404, b"not found", "text/plain", **flavor))


def _serve_cloud_storage() -> None:
    """The emulator, in this process: in memory, with pages, and quick to write to."""
    from functools import partial

    from gcp_storage_emulator.gcs_glob import gcs_glob_match
    from gcp_storage_emulator.handlers import objects
    from gcp_storage_emulator.storage import Storage

    plain_ls, plain_create = objects.ls, Storage.create_file

    def saved(storage: Any) -> None:
        # The original writes all of the index as JSON after each change.
        storage.changes = getattr(storage, "changes", 0) + 1

    def create_file(storage: Any, bucket: str, name: str, data: bytes, about: Any, *rest) -> None:
        about["metageneration"] = "1"  # the original counts the upload's own description
        about["size"] = str(about["size"])
        # The original does not encode the name.
        link = f"/download/storage/v1/b/{bucket}/o/{quote(name, safe='')}"
        host = about["mediaLink"].split("/download/")[0]
        about["mediaLink"] = f"{host}{link}?generation={about['generation']}&alt=media"
        plain_create(storage, bucket, name, data, about, *rest)

    sorted_names: dict[str, tuple[int, list[str]]] = {}

    def ls(request: Any, response: Any, storage: Any, *args: Any, **kwargs: Any) -> None:
        query = {key: values[0] for key, values in request.query.items()}
        bucket = request.params["bucket_name"]
        if bucket not in storage.buckets or query.get("softDeleted") == "true":
            return plain_ls(request, response, storage, *args, **kwargs)
        changes = getattr(storage, "changes", 0)
        held = storage.objects.get(bucket, {})
        if sorted_names.get(bucket, (-1,))[0] != changes:
            sorted_names[bucket] = changes, sorted(held)
        names = sorted_names[bucket][1]
        glob = query.get("matchGlob")
        page = page_of(names, query, (lambda name: gcs_glob_match(glob, name)) if glob else None)
        items = [held[name] for name in page.pop("items") if name in held]
        found = {"kind": "storage#objects", **page, **({"items": items} if items else {})}
        response.json(found)

    def fill(request: Any, response: Any, storage: Any, *args: Any, **kwargs: Any) -> None:
        bucket, data = request.data["bucket"], base64.b64decode(request.data["data"])
        for name in request.data["names"]:
            about = objects._make_object_resource(
                request.base_url, bucket, name, "application/octet-stream", str(len(data))
            )
            storage.create_file(bucket, name, data, objects._checksums(data, about))
        response.json({})

    Storage._write_config_to_file = saved
    Storage.create_file = create_file
    objects.ls = ls  # before the routes are made
    from gcp_storage_emulator import server

    server.HANDLERS = ((r"^/fill$", {server.POST: fill}), *server.HANDLERS)
    server.RequestHandler.protocol_version = "HTTP/1.1"
    server.RequestHandler.disable_nagle_algorithm = True
    # With one thread, a client that reads slowly would keep all others waiting.
    ThreadingHTTPServer.daemon_threads = True
    ThreadingHTTPServer.request_queue_size = 128
    storage = Storage(use_memory_fs=True)
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), partial(server.RequestHandler, storage))
    _serve_until_orphaned(httpd.server_address[1], httpd.serve_forever)


def page_of(
    names: list[str], query: dict[str, str], matches: Callable[[str], bool] | None = None
) -> dict[str, Any]:
    """One page of a listing: names under `items`, and `prefixes` and `nextPageToken` if any.

    `names` are sorted. A page token is the last entry of the page before.
    """
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
    limit = min(int(query.get("maxResults") or MAX_PAGE), MAX_PAGE)
    trailing = query.get("includeTrailingDelimiter") == "true"
    place = bisect.bisect_left(names, max(prefix, query.get("startOffset", "")))
    end = query.get("endOffset", "")
    last = base64.urlsafe_b64decode(query.get("pageToken", "")).decode()
    if last:
        place = max(place, _after(names, last, bool(delimiter) and last.endswith(delimiter)))
    items: list[str] = []
    prefixes: list[str] = []
    while place < len(names):
        name = names[place]
        if not name.startswith(prefix) or (end and name >= end):
            break
        if len(items) + len(prefixes) >= limit:
            token = base64.urlsafe_b64encode(last.encode()).decode()
            return _entries(items, prefixes) | {"nextPageToken": token}
        cut = name.find(delimiter, len(prefix)) if delimiter else -1
        if cut >= 0:
            last = name[: cut + len(delimiter)]
            if matches is None or matches(last):
                prefixes.append(last)
            if trailing and name == last:
                items.append(name)
            place = _after(names, last, True)
            continue
        if matches is None or matches(name):
            items.append(name)
        last = name
        place += 1
    return _entries(items, prefixes)


def _entries(items: list[str], prefixes: list[str]) -> dict[str, Any]:
    return {"items": items, **({"prefixes": prefixes} if prefixes else {})}


def _after(names: list[str], last: str, whole_prefix: bool) -> int:
    if not whole_prefix:
        return bisect.bisect_right(names, last)
    return bisect.bisect_left(names, last[:-1] + chr(ord(last[-1]) + 1))


def _serve_until_orphaned(port: int, serve: Callable[[], None] | None = None) -> None:
    """Tells the port, serves, and ends with the process that started this one."""
    if serve:
        threading.Thread(target=serve, daemon=True).start()
    print(port, flush=True)
    sys.stdin.read()
    os._exit(0)


# ---------------------------------------------------------------- S3


class S3Server:
    """S3, by moto's server."""

    def __init__(self, *buckets: str):
        self.buckets = buckets

    def __enter__(self) -> S3Server:
        with contextlib.ExitStack() as stack:
            child = Child("s3")
            stack.callback(child.stop)
            self.url = f"http://127.0.0.1:{child.port}"
            self.env = {
                "AWS_ENDPOINT_URL": self.url,
                "AWS_ACCESS_KEY_ID": "stand-in",
                "AWS_SECRET_ACCESS_KEY": "stand-in",
                "AWS_DEFAULT_REGION": "us-east-1",
                "AWS_EC2_METADATA_DISABLED": "true",
                "AWS_CONFIG_FILE": os.devnull,
                "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
                "NO_PROXY": "localhost,127.0.0.1",
                "no_proxy": "localhost,127.0.0.1",
            }
            self._port = child.port
            for bucket in self.buckets:
                self._ask("PUT", f"/{bucket}")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def put(self, bucket: str, name: str, data: bytes) -> None:
        self._ask("PUT", f"/{bucket}/{quote(name)}", data)

    def get(self, bucket: str, name: str) -> bytes:
        return self._ask("GET", f"/{bucket}/{quote(name)}")

    def _ask(self, method: str, path: str, body: bytes = b"") -> bytes:
        link = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        # moto reads the service and the account from a signature, which it does not check.
        signed = "AWS4-HMAC-SHA256 Credential=stand-in/20260101/us-east-1/s3/aws4_request"
        with contextlib.closing(link):
            link.request(method, path, body, {"Authorization": signed})
            answer = link.getresponse()
            content = answer.read()
        if answer.status == 404:
            raise FileNotFoundError(f"s3:/{path}")
        if answer.status != 200:
            raise RuntimeError(f"{method} {path}: moto answered {answer.status} {content!r}")
        return content


def _serve_s3() -> None:
    import logging

    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    _serve_until_orphaned(server.get_host_and_port()[1])


# ---------------------------------------------------------------- Dataflow


class DataflowService:
    """Dataflow's REST API as far as Beam's runner uses it; nothing is run.

    A job goes through `states`, one for each time it is asked about, and stays in the
    last. `refuse` is what a submission gets instead, (status, body). `metrics` are
    MetricUpdate and `messages` JobMessage dicts, served as they are.
    """

    def __init__(
        self,
        states: Iterable[str] = ("JOB_STATE_RUNNING", "JOB_STATE_DONE"),
        refuse: tuple[int, dict[str, Any]] | None = None,
        metrics: Iterable[dict[str, Any]] = (),
        messages: Iterable[dict[str, Any]] = (),
    ):
        self.states = list(states)
        self.refuse = refuse
        self.metrics = list(metrics)
        self.messages = list(messages)
        self.jobs: list[dict[str, Any]] = []  # the bodies POSTed
        self.cancelled: list[str] = []  # ids
        self.requests: list[Request] = []
        self.env: dict[str, str] = {"NO_PROXY": "localhost,127.0.0.1"}
        self.env["no_proxy"] = self.env["NO_PROXY"]

    def __enter__(self) -> DataflowService:
        self._asked: Counter[str] = Counter()
        self._server = Server(self._answer)
        # Beam speaks REST only to an endpoint whose name has "localhost" in it.
        self.url = f"http://localhost:{self._server.port}"
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop()

    def _answer(self, http: Exchange) -> None:
        kind, reply = self._reply(http)
        request = Request(http.command, unquote(http.route), http.query, kind, reply.status)
        self.requests.append(request)
        http.send(reply)

    def _reply(self, http: Exchange) -> tuple[str, Reply]:
        pattern = r"/v1b3/projects/([^/]+)/(?:locations/([^/]+)/)?jobs(?:/([^/:]+)(?:/(\w+))?)?"
        found = re.fullmatch(pattern, http.route)
        if found is None:
            return "other", google_error(404, f"no such path: {http.route}", "notFound")
        job_id, part = found[3], found[4]
        if job_id is None and http.command == "POST":
            job = json.loads(http.body)
            if self.refuse:
                return "submit", as_json(self.refuse[1], self.refuse[0])
            self.jobs.append(job)
            return "submit", as_json(self._view(len(self.jobs) - 1, "JOB_STATE_PENDING"))
        ids = [_job_id(number) for number in range(len(self.jobs))]
        if job_id is None:
            return "list", as_json(
                {"jobs": [self._view(n, self._state(i)) for n, i in enumerate(ids)]}
            )
        if job_id not in ids:
            message = f"(stand-in): Information about job {job_id} could not be found."
            return "other", google_error(404, message, "notFound")
        number = ids.index(job_id)
        if http.command == "PUT":
            if json.loads(http.body).get("requestedState") in ("JOB_STATE_CANCELLED", 5):
                self.cancelled.append(job_id)
            return "update", as_json(self._view(number, self._state(job_id)))
        if part == "messages":
            return "messages", as_json({"jobMessages": self.messages})
        if part == "metrics":
            return "metrics", as_json({"metrics": self.metrics})
        state = self._state(job_id)
        self._asked[job_id] += 1
        return "get", as_json(self._view(number, state))

    def _state(self, job_id: str) -> str:
        if job_id in self.cancelled:
            return "JOB_STATE_CANCELLED"
        return self.states[min(self._asked[job_id], len(self.states) - 1)]

    def _view(self, number: int, state: str) -> dict[str, Any]:
        now = {"id": _job_id(number), "currentState": state, "createTime": "2026-01-01T00:00:00Z"}
        return {**self.jobs[number], **now}


def _job_id(number: int) -> str:
    return f"2026-01-01_00_00_00-{number:019d}"


# ---------------------------------------------------------------- an image registry


class ImageRegistry:
    """A Docker registry (HTTP API v2) with images that have labels and nothing else.

    `images` is {"project/repo/image:tag": labels}; those named in `indexed` are served as
    an index of two platforms and an attestation, as buildx pushes them. With `token`,
    a request needs it as a Bearer, or as the password of "oauth2accesstoken"; the token
    server named in the challenge gives it to whoever has it already, or with `public`
    to everybody, as Docker Hub does.
    """

    def __init__(
        self,
        images: dict[str, dict[str, str]] | None = None,
        *,
        indexed: Iterable[str] = (),
        token: str | None = None,
        public: bool = False,
    ):
        self.images = dict(images or {})
        self.indexed = set(indexed)
        self.token = token
        self.public = public
        self.requests: list[Request] = []

    def __enter__(self) -> ImageRegistry:
        self._server = Server(self._answer)
        self.host = f"localhost:{self._server.port}"
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop()

    def _answer(self, http: Exchange) -> None:
        request = Request(http.command, unquote(http.route), http.query, "other")
        self.requests.append(request)
        request.kind, reply = self._reply(http)
        request.status = reply.status
        reply.headers["Docker-Distribution-Api-Version"] = "registry/2.0"
        http.send(reply)

    def _reply(self, http: Exchange) -> tuple[str, Reply]:
        known = self.token is None or http.headers.get("Authorization", "") in (
            f"Bearer {self.token}",
            "Basic " + base64.b64encode(f"oauth2accesstoken:{self.token}".encode()).decode(),
        )
        if http.route == "/token":
            if not (known or self.public):
                return "token", _registry_error(401, "UNAUTHORIZED", "authentication failed")
            return "token", as_json({"token": self.token or "anonymous", "expires_in": 300})
        if found := re.fullmatch(r"/data/(sha256:\w+)", http.route):
            # The storage that a blob is redirected to: its address is the permission.
            data = self._blobs().get(found[1])
            missing = _registry_error(404, "BLOB_UNKNOWN", found[1])
            return "data", raw(200, data, "application/octet-stream") if data else missing
        found = re.fullmatch(r"/v2/(?:(.+)/(manifests|blobs)/([^/]+))?", http.route)
        if found is None:
            return "other", _registry_error(404, "NAME_INVALID", http.route)
        image, kind, reference = found.groups()
        if not known:
            scope = f',scope="repository:{image}:pull"' if image else ""
            reply = _registry_error(401, "UNAUTHORIZED", "authentication required")
            reply.headers["WWW-Authenticate"] = (
                f'Bearer realm="http://{self.host}/token",service="{self.host}"{scope}'
            )
            return kind or "ping", reply
        if image is None:
            return "ping", as_json({})
        if kind == "blobs":
            if reference not in self._blobs():
                return kind, _registry_error(404, "BLOB_UNKNOWN", reference)
            return kind, Reply(307, {"Location": f"http://{self.host}/data/{reference}"})
        return kind, self._manifest(image, reference, http.headers.get("Accept", ""))

    def _manifest(self, image: str, reference: str, accept: str) -> Reply:
        docker = "vnd.oci.image" not in accept and "*/*" not in accept
        for full, labels in self.images.items():
            name, _, tag = full.rpartition(":")
            if name != image:
                continue
            for oci in (not docker, docker):
                texts = _manifests(labels, full in self.indexed, oci)
                wanted = texts[0] if reference == tag else None
                for text in texts:
                    if reference == _digest(text):
                        wanted = text
                if wanted:
                    media_type = json.loads(wanted)["mediaType"]
                    return raw(200, wanted, media_type, Docker_Content_Digest=_digest(wanted))
        return _registry_error(404, "MANIFEST_UNKNOWN", f"Failed to fetch {reference!r}")

    def _blobs(self) -> dict[str, bytes]:
        configs = [
            _config(labels, machine)
            for labels in self.images.values()
            for machine in ("amd64", "arm64")
        ]
        return {_digest(config): config for config in configs}


def _manifests(labels: dict[str, str], indexed: bool, oci: bool) -> list[bytes]:
    """What the tag leads to, then what that leads to."""
    if oci:
        prefix, index = "application/vnd.oci.image.", "application/vnd.oci.image.index.v1+json"
        types = f"{prefix}manifest.v1+json", f"{prefix}config.v1+json"
    else:
        prefix = "application/vnd.docker."
        index = f"{prefix}distribution.manifest.list.v2+json"
        types = f"{prefix}distribution.manifest.v2+json", f"{prefix}container.image.v1+json"
    texts, entries = [], []
    for machine in ("amd64", "arm64") if indexed else ("amd64",):
        config = _config(labels, machine)
        about = {"mediaType": types[1], "size": len(config), "digest": _digest(config)}
        manifest = {"schemaVersion": 2, "mediaType": types[0], "config": about, "layers": []}
        texts.append(json.dumps(manifest).encode())
        platform = {"os": "linux", "architecture": machine}
        entries.append(_entry(types[0], texts[-1], platform))
    if not indexed:
        return texts
    attestation = json.dumps({"schemaVersion": 2, "mediaType": types[0], "layers": []}).encode()
    unknown = {"os": "unknown", "architecture": "unknown"}
    # Not the amd64 image first: a client has to choose, not to take what comes.
    entries = [_entry(types[0], attestation, unknown), *reversed(entries)]
    listing = {"schemaVersion": 2, "mediaType": index, "manifests": entries}
    return [json.dumps(listing).encode(), *texts, attestation]


def _entry(media_type: str, text: bytes, platform: dict[str, str]) -> dict[str, Any]:
    digest = _digest(text)
    return {"mediaType": media_type, "size": len(text), "digest": digest, "platform": platform}


def _config(labels: dict[str, str], machine: str) -> bytes:
    config = {
        "architecture": machine,
        "os": "linux",
        "config": {"Labels": labels},
        "rootfs": {"type": "layers", "diff_ids": []},
    }
    return json.dumps(config).encode()


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _registry_error(status: int, code: str, message: str) -> Reply:
    return as_json({"errors": [{"code": code, "message": message}]}, status)


if __name__ == "__main__":
    {"cloud-storage": _serve_cloud_storage, "s3": _serve_s3}[sys.argv[1]]()
