"""Inputs on the web, on the Hugging Face Hub and on S3, each by a server on this machine."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bench.stand_ins import Exchange, Reply, S3Server, Server, as_json, raw
from transforms import opening, storage
from transforms.listing import InputError
from transforms.read import read_clips
from transforms.records import UnreadableClip
from transforms.shards import plan_shards
from transforms.storage import StorageError, public_name, public_url, unsigned_url

ROOT = Path(__file__).resolve().parents[1]
MIB = 1 << 20


def clips(url: str) -> list[tuple[Any, ...]]:
    found = []
    for shard in plan_shards([url]).shards:
        for clip in read_clips(shard):
            assert not isinstance(clip, UnreadableClip), clip.error
            found.append((clip.member, clip.audio.read()))
    return found


# ------------------------------------------------------------------------ the web


class Web:
    """Serves `files` by path; `ranges`, `length` and `secret` say how."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.ranges, self.length, self.secret = True, True, ""
        self.asked: list[tuple[str, str]] = []  # method and path
        self.sent = 0  # bytes
        self.server = Server(self._answer)
        self.url = f"http://127.0.0.1:{self.server.port}"

    def _answer(self, http: Exchange) -> None:
        reply = self._reply(http)
        if not self.length:  # as what is made while it is sent
            http.send_response(reply.status)
            http.end_headers()
            http.close_connection = True
            return
        if http.command != "HEAD":
            self.sent += reply.length
        http.send(reply)

    def _reply(self, http: Exchange) -> Reply:
        path = unquote(http.route)
        self.asked.append((http.command, path))
        if self.secret and http.query.get("X-Amz-Signature") != self.secret:
            return raw(403, b"no", "text/plain")
        if path.endswith("/"):
            names = [name.removeprefix(path) for name in self.files if name.startswith(path)]
            page = "".join(f'<a href="{name}">{name}</a>' for name in names)
            return raw(200, page.encode(), "text/html")
        if path not in self.files:
            return raw(404, b"nothing", "text/plain")
        content = self.files[path]
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", http.headers.get("Range", ""))
        if not self.ranges or span is None:
            return raw(200, content, "application/octet-stream")
        start, end = int(span[1]), int(span[2] or len(content) - 1)
        piece = content[start : end + 1]
        where = f"bytes {start}-{start + len(piece) - 1}/{len(content)}"
        return raw(206, piece, "application/octet-stream", **{"Content-Range": where})


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "localhost,127.0.0.1")
    monkeypatch.setattr(storage, "FIRST_WAIT_S", 0.001)
    served = Web()
    yield served
    served.server.stop()


def test_a_tar_on_the_web_is_read_in_ranges(web: Web, make_tar: Any, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    members = [(f"{n}.wav", random.bytes(MIB)) for n in range(12)]
    web.files["/set/a b.tar"] = make_tar(tmp_path / "a.tar", members).read_bytes()
    assert clips(f"{web.url}/set/a b.tar") == members
    assert clips(f"{web.url}/set/a%20b.tar") == members
    assert web.sent < 2.5 * len(web.files["/set/a b.tar"])


def test_a_server_without_ranges_is_asked_for_the_whole_once(
    web: Web, make_tar: Any, tmp_path: Path
) -> None:
    random = np.random.default_rng(0)
    members = [(f"{n}.wav", random.bytes(MIB)) for n in range(12)]
    web.files["/a.tar"] = make_tar(tmp_path / "a.tar", members).read_bytes()
    web.ranges = False
    assert clips(f"{web.url}/a.tar") == members
    assert web.sent <= 2 * len(web.files["/a.tar"])


@pytest.mark.parametrize("ranges", [True, False])
def test_every_kind_of_file_on_the_web(web: Web, tmp_path: Path, ranges: bool) -> None:
    web.ranges = ranges
    cells = [{"bytes": b"fLaC" + bytes(300_000), "path": "a.flac"}, {"path": "b.wav"}]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({"audio": pa.array(cells, kind)}), tmp_path / "x.parquet")
    web.files = {
        "/set/x.parquet": (tmp_path / "x.parquet").read_bytes(),
        "/set/b.wav": b"B",
        "/set/c.mp3": b"C" * 70_000,
    }
    assert clips(f"{web.url}/set/x.parquet") == [("a.flac", cells[0]["bytes"]), ("b.wav", b"B")]
    assert clips(f"{web.url}/set/c.mp3") == [("c.mp3", b"C" * 70_000)]


def test_braces_and_listed_pages_on_the_web(web: Web, make_tar: Any, tmp_path: Path) -> None:
    for n in range(20):
        tar = make_tar(tmp_path / "a.tar", [(f"{n}.wav", b"%d" % n)])
        web.files[f"/set/x-{n:06d}.tar"] = tar.read_bytes()
    expected = [(f"{n}.wav", b"%d" % n) for n in range(20)]
    assert clips(f"{web.url}/set/x-{{000000..000019}}.tar") == expected
    assert clips(f"{web.url}/set/*.tar") == expected
    with pytest.raises(InputError) as refusal:
        plan_shards([f"{web.url}/set/x-{{000018..000020}}.tar"])
    assert str(refusal.value).endswith(f"'{web.url}/set/x-000020.tar' does not exist")


def test_what_is_not_on_the_web_is_told(web: Web) -> None:
    with pytest.raises(InputError, match=r"/gone\.tar' does not exist$"):
        plan_shards([f"{web.url}/gone.tar"])
    web.secret = "right"
    with pytest.raises(InputError, match=r"access to 'http://[^?]*/a\.tar' is refused: .* 403"):
        plan_shards([f"{web.url}/a.tar?X-Amz-Signature=WRONG"])
    web.server.stop()
    with pytest.raises(InputError, match=r"/a\.tar': ClientConnectorError"):
        plan_shards([f"{web.url}/a.tar"])


def test_a_file_of_unknown_size_is_refused(web: Web) -> None:
    web.files["/a.tar"] = b"x"
    web.length = False
    with pytest.raises(InputError, match="does not say how large it is"):
        plan_shards([f"{web.url}/a.tar"])


def test_a_row_of_unknown_size_is_read_to_its_end_or_to_a_bound(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = bytes(3 * MIB)

    def answer(http: Exchange) -> None:
        http.send_response(200)
        http.end_headers()
        http.close_connection = True
        if http.command == "HEAD":
            return
        try:
            http.wfile.write(content)
            while http.route == "/endless.wav":
                http.wfile.write(content)
        except OSError:  # nobody listens any more
            pass

    monkeypatch.setattr(opening, "MAX_UNSIZED_BYTES", 4 * MIB)
    server = Server(answer)
    try:
        url = f"http://127.0.0.1:{server.port}"
        for name in ("a", "endless"):
            file = tmp_path / f"{name}.csv"
            file.write_text(f"path\n{url}/{name}.wav\n")
            (shard,) = plan_shards([str(file)]).shards
            (clip,) = read_clips(shard)
            if name == "a":
                assert not isinstance(clip, UnreadableClip) and clip.size_bytes == len(content)
            else:
                assert isinstance(clip, UnreadableClip)
                assert (clip.error.stage, clip.error.type) == ("read", "TooLarge")
    finally:
        server.stop()


# ------------------------------------------------------------------------ secrets


SIGNED = "?X-Amz-Algorithm=A&X-Amz-Credential=KEY/2026/s3&X-Amz-Expires=600&X-Amz-Signature="


@pytest.mark.parametrize(
    ("url", "public", "unsigned"),
    [
        ("/a/b?c.tar", "/a/b?c.tar", "/a/b?c.tar"),
        ("s3://b/a?b#c", "s3://b/a?b#c", "s3://b/a?b#c"),
        ("https://h/a.tar", "https://h/a.tar", "https://h/a.tar"),
        (f"https://h/a.tar{SIGNED}x", "https://h/a.tar", "https://h/a.tar"),
        ("https://h/get?id=5&sig=x#y", "https://h/get", "https://h/get?id=5"),
        (
            "https://me:pw@h:80/a/b@c.tar?token=x",
            "https://h:80/a/b@c.tar",
            "https://h:80/a/b@c.tar",
        ),
        ("https://h?x", "https://h", "https://h?x"),
    ],
)
def test_a_url_is_shown_without_its_secrets(url: str, public: str, unsigned: str) -> None:
    assert (public_url(url), unsigned_url(url)) == (public, unsigned)
    assert public_name("https://h/x", "a.wav?sig=1") == "a.wav"
    assert public_name("s3://b/x", "a?.wav") == "a?.wav"


def test_a_new_signature_is_the_same_shard_and_another_query_is_not(
    web: Web, make_tar: Any, tmp_path: Path
) -> None:
    web.files["/a.tar"] = make_tar(tmp_path / "a.tar", [("x.wav", b"1")]).read_bytes()
    web.files["/b.wav"] = b"B"

    def ids(*urls: str) -> list[str]:
        return [shard.id for shard in plan_shards([f"{web.url}{url}" for url in urls]).shards]

    for name in ("/a.tar", "/b.wav"):
        assert ids(f"{name}{SIGNED}x") == ids(f"{name}{SIGNED}y") == ids(name)
        assert len(ids(f"{name}{SIGNED}x", f"{name}{SIGNED}y")) == 1
    assert len(set(ids("/a.tar?id=1", "/a.tar?id=2"))) == 2


def test_a_presigned_url_leaves_its_signature_nowhere(
    web: Web, make_tar: Any, encoded: Any, noise: Any, tmp_path: Path, earmark: Any, caplog: Any
) -> None:
    web.secret = "5ECRET"
    wav = encoded(noise(16_000))
    web.files["/set/a.tar"] = make_tar(tmp_path / "a.tar", [("x.wav", wav)]).read_bytes()
    web.files["/set/b.wav"] = wav
    urls = [f"{web.url}/set/{name}{SIGNED}5ECRET" for name in ("a.tar", "b.wav")]
    with caplog.at_level(logging.INFO):
        said = earmark({}, "annotate", *urls, "-o", tmp_path / "out", "--verbose")
    rows = duckdb.sql(
        f"SELECT shard, member, error FROM '{tmp_path}/out/clips/*.parquet' ORDER BY member"
    ).fetchall()
    assert rows == [(f"{web.url}/set", "b.wav", None), (f"{web.url}/set/a.tar", "x.wav", None)]
    written = b"".join(f.read_bytes() for f in (tmp_path / "out").rglob("*") if f.is_file())
    for text in (said, caplog.text, written.decode("latin-1")):
        assert "5ECRET" not in text and "KEY/2026" not in text
    assert "Nothing left to do" in earmark({}, "annotate", *urls, "-o", tmp_path / "out")

    web.files["/set/m.csv"] = f"path\n{urls[1]}\n".encode()
    web.files["/list.txt"] = f"{web.url}/set/m.csv{SIGNED}5ECRET\n".encode()
    listed, root = f"{web.url}/list.txt{SIGNED}5ECRET", f"{web.url}/set{SIGNED}5ECRET"
    said = earmark(
        {}, "annotate", "--inputs-from", listed, "--audio-root", root, "-o", tmp_path / "manifest"
    )
    files = [f for f in (tmp_path / "manifest").rglob("*") if f.is_file()]
    for text in (said, b"".join(f.read_bytes() for f in files).decode("latin-1")):
        assert "5ECRET" not in text and "KEY/2026" not in text
    assert f"{web.url}/set/m.csv as a CSV manifest" in " ".join(said.split())
    options = json.loads((tmp_path / "manifest/run.json").read_text())["options"]
    assert options["inputs_from"] == [f"{web.url}/list.txt"]
    assert options["audio_root"] == f"{web.url}/set"

    web.secret = "another"
    wrong = earmark({}, "annotate", *urls, "-o", tmp_path / "out2", code=2)
    assert "5ECRET" not in wrong and "403" in wrong


def test_a_signature_that_expires_while_it_is_read_is_in_no_message(
    web: Web, make_tar: Any, tmp_path: Path
) -> None:
    web.files["/a.tar"] = make_tar(tmp_path / "a.tar", [("x.wav", bytes(9 * MIB))]).read_bytes()
    web.secret = "5ECRET"
    (shard,) = plan_shards([f"{web.url}/a.tar{SIGNED}5ECRET"]).shards
    web.secret = "another"
    with pytest.raises(StorageError, match=r"^access to http://[^?]*/a\.tar is refused") as refusal:
        list(read_clips(shard))
    error: BaseException | None = refusal.value
    while error is not None:  # what a traceback would show
        assert "5ECRET" not in str(error)
        error = None if error.__suppress_context__ else error.__cause__ or error.__context__


# ------------------------------------------------------------------------ the Hub


class Hub:
    """The Hub's API as far as HfFileSystem uses it, for one dataset with the revisions main and v1."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {"main": {}, "v1": {}}
        self.server = Server(self._answer)
        self.env = {
            "HF_ENDPOINT": f"http://127.0.0.1:{self.server.port}",
            "HF_HUB_DISABLE_XET": "1",
        }

    def _answer(self, http: Exchange) -> None:
        http.send(self._reply(http))

    def _reply(self, http: Exchange) -> Reply:
        path = unquote(http.route)
        if match := re.fullmatch(r"/api/datasets/o/n(?:/revision/(\w+))?", path):
            if (match[1] or "main") in self.files:
                return as_json({"id": "o/n", "sha": "0" * 40, "private": False, "tags": []})
            return as_json({"error": "no revision"}, 404, **{"X-Error-Code": "RevisionNotFound"})
        if match := re.fullmatch(r"/api/datasets/o/n/tree/(\w+)/?(.*)", path):
            deep = http.query.get("recursive", "").lower() == "true"
            return as_json(self._tree(self.files[match[1]], match[2], deep))
        if match := re.fullmatch(r"/datasets/o/n/resolve/(\w+)/(.*)", path):
            content = self.files[match[1]][match[2]]
            span = re.fullmatch(r"bytes=(\d+)-(\d+)", http.headers.get("Range", ""))
            assert span is not None
            return raw(206, content[int(span[1]) : int(span[2]) + 1], "application/octet-stream")
        return as_json({"error": "no repository"}, 404, **{"X-Error-Code": "RepoNotFound"})

    def _tree(self, files: dict[str, bytes], folder: str, deep: bool) -> list[dict[str, Any]]:
        entries: dict[str, dict[str, Any]] = {}
        for name, content in files.items():
            below = name.removeprefix(f"{folder}/") if folder else name
            if folder and below == name:
                continue
            parts = below.split("/")
            for n in range(1, len(parts) if deep else min(2, len(parts))):
                inner = "/".join([*([folder] if folder else []), *parts[:n]])
                entries[inner] = {"type": "directory", "oid": "1", "size": 0, "path": inner}
            if deep or len(parts) == 1:
                entries[name] = {"type": "file", "oid": "2", "size": len(content), "path": name}
        return list(entries.values())


READ = """
import sys, json
from transforms.read import read_clips
from transforms.listing import InputError
from transforms.shards import plan_shards

def read(url):
    try:
        shards = plan_shards([url]).shards
    except InputError as error:
        return str(error)
    return [(s.uri, c.member, c.audio.read().decode()) for s in shards for c in read_clips(s)]

print(json.dumps([read(url) for url in sys.argv[1:]]))
"""


def read_elsewhere(urls: list[str], env: dict[str, str], tmp_path: Path) -> dict[str, Any]:
    """(shard, member, content) of the clips of each URL, or why there are none; in another process."""
    proxies = {"NO_PROXY": "localhost,127.0.0.1", "no_proxy": "localhost,127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-c", READ, *urls], cwd=ROOT, capture_output=True, text=True, timeout=120,
        env=os.environ | {"HF_HOME": str(tmp_path / "hf")} | proxies | env,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(zip(urls, json.loads(done.stdout), strict=True))


SET = "hf://datasets/o/n"


def on_hub(*numbers: int) -> list[list[str]]:
    return [[f"{SET}/data/deep/x-{n}.tar", f"{n}.wav", f"main{n}"] for n in numbers]


def test_datasets_on_the_hub_are_read(make_tar: Any, tmp_path: Path) -> None:
    hub = Hub()
    for n in range(3):
        tar = make_tar(tmp_path / "a.tar", [(f"{n}.wav", b"main%d" % n)])
        hub.files["main"][f"data/deep/x-{n}.tar"] = tar.read_bytes()
    hub.files["main"] |= {"README.md": b"about", "data/y.wav": b"Y"}
    hub.files["v1"]["data/y.wav"] = b"old"
    expected: dict[str, Any] = {
        f"{SET}/data/deep/*.tar": on_hub(0, 1, 2),
        f"{SET}/data/deep/x-{{1..2}}.tar": on_hub(1, 2),
        f"{SET}/data/y.wav": [[f"{SET}/data", "y.wav", "Y"]],
        f"{SET}@v1/data": [[f"{SET}@v1/data", "y.wav", "old"]],
        SET: [*on_hub(0, 1, 2), [SET, "data/y.wav", "Y"]],
    }
    missing = [f"{SET}/gone.tar", f"{SET}@v9/a.tar", "hf://datasets/o/gone/a.tar"]
    try:
        found = read_elsewhere([*expected, *missing], hub.env, tmp_path)
    finally:
        hub.server.stop()
    assert {url: found[url] for url in expected} == expected
    for url in missing:
        assert found[url].startswith(f"{url!r} does not exist: "), found[url]


@pytest.mark.parametrize(
    "env",
    [{"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}],
    ids=["no network", "set"],
)
def test_the_hub_out_of_reach_is_told(tmp_path: Path, env: dict[str, str]) -> None:
    (said,) = read_elsewhere([f"{SET}/data/*.tar"], env, tmp_path).values()
    assert said.startswith(f"'{SET}/data/*.tar': the Hugging Face Hub cannot be reached (")
    assert "hf download --repo-type dataset" in said


# ------------------------------------------------------------------------ S3


def test_braces_and_paths_on_s3(make_tar: Any, tmp_path: Path) -> None:
    with S3Server("inputs") as s3:
        for n in range(12):
            tar = make_tar(tmp_path / "a.tar", [(f"{n}.wav", b"%d" % n)])
            s3.put("inputs", f"set/x-{n:03d}.tar", tar.read_bytes())
        names = pa.array(["loose/a.wav", "s3://inputs/loose/a.wav"])
        rows = pa.table({"x": pa.StructArray.from_arrays([names], ["path"])})
        features = json.dumps({"info": {"features": {"x": {"_type": "Audio"}}}})
        pq.write_table(
            rows.replace_schema_metadata({"huggingface": features}), tmp_path / "x.parquet"
        )
        s3.put("inputs", "x.parquet", (tmp_path / "x.parquet").read_bytes())
        s3.put("inputs", "loose/a.wav", b"A")
        tars, table, missing = (
            f"s3://inputs/{name}"
            for name in ("set/x-{000..011}.tar", "x.parquet", "set/x-{010..012}.tar")
        )
        found = read_elsewhere([tars, table, missing], s3.env, tmp_path)
    assert found[tars] == [
        [f"s3://inputs/set/x-{n:03d}.tar", f"{n}.wav", str(n)] for n in range(12)
    ]
    assert [clip[1:] for clip in found[table]] == [
        ["loose/a.wav", "A"],
        ["s3://inputs/loose/a.wav", "A"],
    ]
    assert found[missing].endswith("'s3://inputs/set/x-012.tar' does not exist")
