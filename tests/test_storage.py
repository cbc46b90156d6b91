"""Reading, listing and copying remote files: with fakes that misbehave, and with stand-ins."""

import asyncio
import base64
import errno
import io
import random
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import aiohttp
import botocore.exceptions
import fsspec
import google.api_core.exceptions as google_errors
import google.auth.exceptions
import google_crc32c
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import requests
from gcsfs.retry import ChecksumError, HttpError, validate_response

from bench.stand_ins import CloudStorage, Faults
from transforms import storage
from transforms.meter import Meter
from transforms.read import read_clips
from transforms.records import Shard
from transforms.storage import (
    Access,
    RemoteFile,
    ShortRead,
    StorageError,
    StoredFile,
    etag_of,
    explain,
    fetch_folder,
    find_cloud,
    glob_cloud,
    is_local,
    is_passing,
    list_cloud,
    open_file_system,
    open_remote,
    patiently,
    read_all,
)

MIB = 1 << 20
WAIT_S = 20


class Store:
    """A file system of one file. `answers` say how the next requests go: an exception is
    raised, a number is how many bytes come, an event is waited for, None is a whole answer."""

    def unstrip_protocol(self, path: str) -> str:
        return path

    def __init__(self, content, *answers):
        self.content = content
        self.answers = list(answers)
        self.asked = []
        self.threads = set()
        self._lock = threading.Lock()

    def cat_file(self, path, start=None, end=None):
        with self._lock:
            self.asked.append((start, end))
            answer = self.answers.pop(0) if self.answers else None
        self.threads.add(threading.current_thread().name)
        if isinstance(answer, BaseException):
            raise answer
        if isinstance(answer, threading.Event):
            assert answer.wait(WAIT_S)
        data = self.content[start:end]
        return data[:answer] if isinstance(answer, int) else data

    def fetched(self):
        """How many bytes were asked for in all."""
        return sum(end - start for start, end in self.asked)


def content_of(size, seed=0):
    return random.Random(seed).randbytes(size)


def checksum_of(content):
    return base64.b64encode(google_crc32c.Checksum(content).digest()).decode()


def fetchers():
    return [t.name for t in threading.enumerate() if t.name.startswith("earmark-fetch")]


def wait_for(condition):
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """The waits between tries, in seconds; nobody waits."""
    waited = []
    monkeypatch.setattr(storage, "_sleep", waited.append)
    monkeypatch.setattr(storage, "FIRST_WAIT_S", storage.FIRST_WAIT_S)
    return waited


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    wait_for(lambda: fetchers() == [])


# ------------------------------------------------------------- RemoteFile: content


@pytest.mark.parametrize("size", [0, 1, 2, 65_536, MIB, MIB + 1, 3 * MIB + 17])
@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize("step", [512, 10_000, 10 * MIB])
def test_a_file_read_in_order_is_whole_and_no_byte_is_fetched_twice(size, in_order, step):
    content = content_of(size)
    store = Store(content)
    with open_remote(store, "b/f", size, in_order=in_order) as stream:
        pieces = []
        while piece := stream.read(step):
            pieces.append(piece)
        assert stream.read(step) == b""
    assert b"".join(pieces) == content
    spans = sorted(store.asked)
    assert [start for start, _ in spans] == [0, *(end for _, end in spans[:-1])][: len(spans)]
    assert store.fetched() == size


def test_a_file_of_a_real_file_system_is_whole():
    content = content_of(3 * MIB + 5)
    memory = fsspec.filesystem("memory")
    memory.pipe("/earmark-test-storage/f", content)
    with open_remote(memory, "/earmark-test-storage/f", len(content), in_order=True) as stream:
        assert stream.read() == content
    assert read_all("memory://earmark-test-storage/f") == content


def test_a_tar_reader_looks_at_the_start_and_goes_back():
    content = content_of(5 * MIB)
    store = Store(content)
    with open_remote(store, "b/f", len(content), in_order=True) as stream:
        assert stream.read(2) == content[:2]
        assert stream.seek(0) == 0
        assert stream.read() == content
    assert store.fetched() == len(content)


@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_random_reads_equal_those_of_the_bytes(seed, in_order):
    chance = random.Random(seed)
    size = chance.choice([3_000, MIB + 1, 9 * MIB])
    content = content_of(size, seed)
    same = io.BytesIO(content)
    answers = [chance.choice([None, None, 0, 1, 5_000, OSError(5, "")]) for _ in range(6)]
    answers = [ConnectionResetError() if isinstance(a, OSError) else a for a in answers]
    with open_remote(Store(content, *answers), "b/f", size, in_order=in_order) as stream:
        for _ in range(150):
            action = chance.randrange(5)
            if action == 0:
                place = chance.randrange(size + 100)
                assert stream.seek(place) == same.seek(place)
            elif action == 1:
                place = -chance.randrange(size)
                assert stream.seek(place, io.SEEK_END) == same.seek(place, io.SEEK_END)
            elif action == 2:
                place = chance.randrange(5_000)
                assert stream.seek(place, io.SEEK_CUR) == same.seek(place, io.SEEK_CUR)
            else:
                wanted = chance.choice([0, 1, 512, 70_000, 3 * MIB])
                assert stream.read(wanted) == same.read(wanted)
            assert stream.tell() == same.tell()


def test_a_raw_file_gives_what_is_at_hand_and_never_past_the_end():
    content = content_of(100)
    with RemoteFile(Store(content), "b/f", 100) as raw:
        assert raw.readable() and raw.seekable() and not raw.writable()
        assert raw.seek(-10, io.SEEK_END) == 90
        assert raw.read(50) == content[90:]
        assert raw.read(50) == b""
        assert raw.seek(1_000) == 1_000 and raw.read(1) == b""
        assert raw.seek(-7, io.SEEK_SET) == 0
        assert raw.read(3) == content[:3]
        assert raw.seek(2, io.SEEK_CUR) == 5


def test_a_file_without_bytes_costs_no_request():
    store = Store(b"")
    with open_remote(store, "b/f", 0, checksum="AAAAAA==", in_order=True) as stream:
        assert stream.read() == b""
    assert store.asked == []


def test_a_server_that_knows_no_ranges_gives_the_right_bytes():
    content = content_of(3 * MIB)

    class Whole(Store):
        def cat_file(self, path, start=None, end=None):
            super().cat_file(path, start, end)
            return self.content

    with open_remote(Whole(content), "f", len(content), in_order=True) as stream:
        assert stream.read() == content


def test_pyarrow_reads_a_parquet_file(tmp_path):
    table = pa.table({"a": list(range(200_000)), "b": [str(n) * 3 for n in range(200_000)]})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=20_000)
    content = (tmp_path / "t.parquet").read_bytes()
    store = Store(content)
    with open_remote(store, "b/t.parquet", len(content)) as stream:
        parquet = pq.ParquetFile(stream)
        assert parquet.metadata.num_rows == 200_000
        # The footer came with the first, small request, from the end of the file.
        assert [end for _, end in store.asked] == [len(content)]
        assert store.fetched() <= 128 << 10
        assert parquet.read_row_group(7).equals(table.slice(140_000, 20_000))
        assert parquet.read().equals(table)


# ------------------------------------------------------------- RemoteFile: requests


@pytest.mark.parametrize(
    ("size", "block"),
    [(100, 100), (MIB, MIB), (8 * MIB, MIB), (24 * MIB, 3 * MIB), (160 * MIB, 16 * MIB)],
)
def test_blocks_are_sized_to_the_file(size, block):
    class Zeros(Store):
        def cat_file(self, path, start=None, end=None):
            super().cat_file(path, start, end)
            return bytes(end - start)

    store = Zeros(b"")
    with open_remote(store, "b/f", size, in_order=True) as stream:
        assert len(stream.read(100)) == 100
    wait_for(lambda: fetchers() == [])
    ahead = [(block, 2 * block)] if size > block else []
    assert store.asked == [(0, block), *ahead]


def test_one_block_is_fetched_ahead_and_no_more():
    content = content_of(4 * MIB)
    store = Store(content)
    with open_remote(store, "b/f", len(content), in_order=True) as stream:
        stream.read(10)
        wait_for(lambda: len(store.asked) == 2)
        stream.read(MIB // 2)
        time.sleep(0.05)  # time to go further, if it ever does
        assert store.asked == [(0, MIB), (MIB, 2 * MIB)]
        stream.read(MIB)
        wait_for(lambda: len(store.asked) == 3)
    assert {name.rpartition("_")[0] for name in store.threads} == {"", "earmark-fetch"}


def test_reads_at_odd_places_fetch_nothing_ahead():
    content = content_of(9 * MIB)
    store = Store(content)
    with open_remote(store, "b/f", len(content)) as stream:
        for place in (8 * MIB, 3 * MIB, 5 * MIB):
            stream.seek(place)
            assert stream.read(10) == content[place : place + 10]
    assert len(store.asked) == 3 and fetchers() == []
    assert store.fetched() == 3 * (128 << 10)


def test_no_more_than_two_blocks_are_held():
    class Zeros(Store):
        def cat_file(self, path, start=None, end=None):
            super().cat_file(path, start, end)
            return bytes(end - start)

    block = 4 * MIB
    store = Zeros(b"")
    tracemalloc.start()
    try:
        with open_remote(store, "b/f", 8 * block, in_order=True) as stream:
            read = 0
            while piece := stream.read(64 << 10):
                read += len(piece)
            peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert read == 8 * block and len(store.asked) == 8
    assert block < peak < 2 * block + MIB


# ------------------------------------------------------------- RemoteFile: checksum


def test_the_right_checksum_passes_and_a_wrong_one_does_not():
    content = content_of(3 * MIB)
    right, wrong = checksum_of(content), checksum_of(b"another file")
    with open_remote(Store(content), "b/f", len(content), checksum=right, in_order=True) as s:
        assert s.read() == content
    with open_remote(Store(content), "b/f", len(content), checksum=wrong, in_order=True) as s:
        assert s.read(2 * MIB) == content[: 2 * MIB]
        with pytest.raises(StorageError) as refusal:
            s.read()
    assert str(refusal.value) == (
        f"b/f: what was read has checksum {right}, the listing said {wrong}: the file was replaced "
        "since, or damaged on its way; run again"
    )


def test_a_checksum_is_of_the_bytes_however_they_came():
    content = content_of(2 * MIB)
    answers = [100, ConnectionResetError(), 5, None, 7]
    store = Store(content, *answers)
    with open_remote(
        store, "b/f", len(content), checksum=checksum_of(content), in_order=True
    ) as stream:
        assert stream.read(2) == content[:2]
        stream.seek(0)
        assert stream.read() == content
    with open_remote(store, "b/f", len(content), checksum="AAAAAA==", in_order=True) as stream:
        stream.read(2)
        stream.seek(0)
        with pytest.raises(StorageError, match="the listing said AAAAAA=="):
            stream.read()


def test_a_checksum_is_not_compared_where_the_file_is_not_read_in_order():
    content = content_of(3 * MIB)
    with open_remote(Store(content), "b/f", len(content), checksum="AAAAAA==") as stream:
        stream.seek(2 * MIB)
        assert stream.read() == content[2 * MIB :]
        stream.seek(0)
        assert stream.read(2 * MIB) == content[: 2 * MIB]


def test_an_etag_is_compared_with_that_of_the_file_once_it_was_read():
    class Tagged(Store):
        etag = '"2"'

        def info(self, path):
            return {"name": path, "size": len(self.content), "ETag": self.etag}

        def invalidate_cache(self, path=None):
            pass

    content, listed = content_of(3 * MIB), etag_of({"ETag": '"2"'})
    assert listed == 'etag:"2"' and etag_of({"size": 1}) is None
    with open_remote(Tagged(content), "b/f", len(content), checksum=listed, in_order=True) as s:
        assert s.read() == content
    store = Tagged(content)
    with open_remote(store, "b/f", len(content), checksum=listed, in_order=True) as s:
        s.read(MIB)
        store.etag = '"3"'  # replaced by a file of the same size
        with pytest.raises(StorageError, match='checksum etag:"3", the listing said etag:"2"'):
            s.read()


# ------------------------------------------------------------- RemoteFile: faults


@pytest.mark.parametrize(
    "fault",
    [
        ConnectionResetError("reset"),
        TimeoutError(),
        asyncio.TimeoutError(),
        aiohttp.ServerTimeoutError("stalled"),
        aiohttp.ClientPayloadError("cut"),
        HttpError({"code": 503, "message": "busy"}),
    ],
    ids=repr,
)
def test_a_fault_that_passes_is_tried_again_and_counted(fault, waits):
    content, meter = content_of(1_000), Meter()
    store = Store(content, fault, fault)
    with open_remote(store, "b/f", 1_000, in_order=True, meter=meter) as stream:
        assert stream.read() == content
    assert store.asked == [(0, 1_000)] * 3
    assert meter.take() == ({"read_retries": 2}, {})
    assert len(waits) == 2


def test_a_short_answer_is_taken_up_where_it_stopped():
    content, meter = content_of(1_000), Meter()
    store = Store(content, 300, 0, 699)
    with open_remote(store, "b/f", 1_000, in_order=True, meter=meter) as stream:
        assert stream.read() == content
    assert store.asked == [(0, 1_000), (300, 1_000), (300, 1_000), (999, 1_000)]
    assert meter.counts["read_retries"] == 3


def test_a_block_fetched_ahead_is_tried_again_too():
    content, meter = content_of(2 * MIB), Meter()
    store = Store(content, None, ConnectionResetError(), 70_000, TimeoutError())
    with open_remote(store, "b/f", len(content), in_order=True, meter=meter) as stream:
        assert stream.read() == content
    assert store.asked == [(0, MIB), *[(MIB, 2 * MIB)] * 2, *[(MIB + 70_000, 2 * MIB)] * 2]
    assert meter.counts["read_retries"] == 3


@pytest.mark.parametrize("whole_blocks", [0, 1])  # in the reader's thread, or in the one ahead
def test_a_fault_that_stays_names_the_file_and_the_last_fault(whole_blocks, waits):
    content, meter = content_of(2 * MIB), Meter()
    answers = [None] * whole_blocks + [ConnectionResetError("the last")] * 50
    store = Store(content, *answers)
    with open_remote(store, "bucket/a.tar", len(content), in_order=True, meter=meter) as stream:
        assert stream.read(whole_blocks * MIB) == content[: whole_blocks * MIB]
        with pytest.raises(StorageError) as failure:
            stream.read(1)
    assert str(failure.value) == (
        "bucket/a.tar failed 8 times, last with ConnectionResetError: the last"
    )
    assert isinstance(failure.value.__cause__, ConnectionResetError)
    assert len(store.asked) == whole_blocks + storage.MAX_TRIES
    assert meter.counts["read_retries"] == storage.MAX_TRIES - 1 == len(waits)


def test_a_file_that_is_shorter_than_it_was_is_an_error():
    store = Store(content_of(700))
    stream = open_remote(store, "b/f", 1_000, in_order=True)
    with pytest.raises(StorageError, match=r"b/f failed 8 times.*300 of 1000 bytes are missing"):
        stream.read()


def test_a_file_that_is_gone_is_not_tried_again(waits):
    store = Store(b"", FileNotFoundError("b/f"))
    with open_remote(store, "b/f", 10, in_order=True) as stream, pytest.raises(FileNotFoundError):
        stream.read()
    assert (len(store.asked), waits) == (1, [])


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        (HttpError({"code": 400, "message": "odd"}), StorageError, "b/f: HttpError: odd, 400"),
        (ValueError("a\nb"), StorageError, "b/f: ValueError: a"),
        (PermissionError(errno.EACCES, "no"), PermissionError, "[Errno 13] no"),
        (
            OSError("Forbidden: https://storage/b/f\nno storage.objects.get access"),
            StorageError,
            "access to b/f is refused: OSError: Forbidden: https://storage/b/f",
        ),
    ],
)
def test_a_fault_that_does_not_pass_is_told_at_once(fault, kind, message, waits):
    store = Store(b"", fault)
    with open_remote(store, "b/f", 10, in_order=True) as stream, pytest.raises(kind) as failure:
        stream.read()
    assert str(failure.value) == message
    assert (len(store.asked), waits) == (1, [])


@pytest.mark.parametrize(
    "fault",
    [
        ConnectionResetError("reset"),
        HttpError({"code": 400, "message": "odd"}),
        OSError("Forbidden: b/t.parquet"),
        FileNotFoundError("b/t.parquet"),
        PermissionError("b/t.parquet"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("whole", [0, 1])
def test_a_parquet_file_that_cannot_be_reached_is_not_taken_for_a_broken_one(
    fault, whole, tmp_path, monkeypatch
):
    audio = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    cells = [{"bytes": content_of(100_000, n), "path": f"{n}.wav"} for n in range(5)]
    pq.write_table(pa.table({"audio": pa.array(cells, audio)}), tmp_path / "t.parquet")
    content = (tmp_path / "t.parquet").read_bytes()
    store = Store(content, *[None] * whole, *[fault] * 100)
    monkeypatch.setattr("transforms.read.open_file_system", lambda url, access: (store, url))
    shard = Shard("t", "gs://b/t.parquet", "parquet", len(content))
    with pytest.raises(OSError):
        list(read_clips(shard))


# ------------------------------------------------------------- RemoteFile: closing


def test_closing_waits_for_no_block_that_is_on_its_way():
    content, gate = content_of(4 * MIB), threading.Event()
    store = Store(content, None, gate)
    stream = open_remote(store, "b/f", len(content), in_order=True)
    stream.read(10)
    wait_for(lambda: len(store.asked) == 2)
    stream.close()  # returns although the block is not there
    assert not gate.is_set() and fetchers() != []
    gate.set()
    wait_for(lambda: fetchers() == [])
    assert len(store.asked) == 2
    with pytest.raises(ValueError):
        stream.read(1)


def test_a_block_that_nobody_waits_for_any_more_is_not_tried_again():
    content, gate, meter = content_of(4 * MIB), threading.Event(), Meter()
    store = Store(content, None, gate, *[ConnectionResetError()] * 50)
    store.content = content[:MIB]  # so that the block ahead comes short, once the gate opens
    stream = open_remote(store, "b/f", len(content), in_order=True, meter=meter)
    stream.read(10)
    wait_for(lambda: len(store.asked) == 2)
    stream.close()
    gate.set()
    wait_for(lambda: fetchers() == [])
    assert len(store.asked) <= 3


def test_a_file_that_is_let_go_ends_its_thread():
    content = content_of(4 * MIB)
    stream = open_remote(Store(content), "b/f", len(content), in_order=True)
    stream.read(10)
    del stream
    wait_for(lambda: fetchers() == [])


def test_reading_on_elsewhere_while_a_block_is_on_its_way():
    content, gate = content_of(4 * MIB), threading.Event()
    store = Store(content, None, gate)
    with open_remote(store, "b/f", len(content), in_order=True) as stream:
        stream.read(10)
        wait_for(lambda: len(store.asked) == 2)
        stream.seek(3 * MIB)
        assert stream.read(10) == content[3 * MIB : 3 * MIB + 10]
        gate.set()
        stream.seek(0)
        assert stream.read() == content


@pytest.mark.parametrize("kind", ["tar", "files"])
def test_clips_that_are_not_read_to_the_end_leave_no_thread(kind, monkeypatch, make_tar, tmp_path):
    members = [(f"{n:02}.wav", content_of(200_000, n)) for n in range(30)]
    content = make_tar(tmp_path / "a.tar", members).read_bytes()
    shard = Shard("a", "gs://b/a.tar", "tar", len(content))
    if kind == "files":
        content = members[0][1]
        names = tuple(name for name, _ in members)
        shard = Shard("a", "gs://b", "files", 1, files=names, file_sizes=(200_000,) * 30)
    store = Store(content)
    for module in ("read", "opening"):
        monkeypatch.setattr(
            f"transforms.{module}.open_file_system", lambda url, access: (store, url)
        )
    clips = read_clips(shard)
    assert next(clips).member == "00.wav"
    clips.close()
    wait_for(lambda: fetchers() == [])
    assert len(store.asked) < 30


# ------------------------------------------------------------- patiently


def test_waits_grow_double_with_jitter_and_are_bounded(waits, monkeypatch):
    def fails():
        raise ConnectionResetError

    for low_or_high, factor in ((min, 0.5), (max, 1.0)):
        waits.clear()
        monkeypatch.setattr(random, "uniform", lambda low, high, f=low_or_high: f(low, high))
        with pytest.raises(StorageError):
            patiently(fails, "f", "read_retries")
        assert waits == [factor * s for s in (0.5, 1, 2, 4, 8, 16, 30)]


def test_waits_differ_between_workers(waits):
    def fails():
        raise ConnectionResetError

    for _ in range(3):
        with pytest.raises(StorageError):
            patiently(fails, "f", "read_retries")
    assert len(set(waits)) == 21
    assert 3 * 30.75 < sum(waits) < 3 * 61.5


def test_the_result_of_the_try_that_works_is_given(waits):
    outcomes = iter([ShortRead("x"), HttpError({"code": 429}), "done"])

    def act():
        outcome = next(outcomes)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    meter = Meter()
    assert patiently(act, "f", "write_retries", meter) == "done"
    assert (meter.counts, len(waits)) == ({"write_retries": 2}, 2)


def test_what_ends_the_program_is_not_tried_again(waits):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        patiently(interrupted, "f", "read_retries")
    assert waits == []


def answered(status, message="", path="b/o/f"):
    """What gcsfs makes of an answer with an error."""
    body = f'{{"error": {{"code": {status}, "message": "{message}"}}}}'
    try:
        validate_response(status, body, path)
    except Exception as error:
        return error
    raise AssertionError(status)


def google_error(status, message="m"):
    response = requests.Response()
    response.status_code = status
    response._content = b'{"error": {"message": "%s"}}' % message.encode()
    response.request = requests.Request("GET", "https://storage.invalid/b/in/o/f").prepare()
    return google_errors.from_http_response(response)


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_statuses_that_pass(status):
    assert is_passing(answered(status))
    assert is_passing(google_error(status))


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 411, 412, 416])
def test_statuses_that_do_not_pass(status):
    assert not is_passing(answered(status))
    assert not is_passing(google_error(status))


def test_a_404_of_gcsfs_is_a_file_that_is_not_there():
    assert isinstance(answered(404), FileNotFoundError)


@pytest.mark.parametrize(
    "error",
    [
        ShortRead("x"),
        ConnectionResetError(),
        BrokenPipeError(),
        TimeoutError(),
        asyncio.TimeoutError(),
        fsspec.FSTimeoutError(),
        aiohttp.ServerDisconnectedError(),
        aiohttp.ClientOSError(104, "reset"),
        aiohttp.ClientPayloadError(),
        aiohttp.SocketTimeoutError(),
        requests.ConnectionError(),
        requests.ReadTimeout(),
        requests.exceptions.ChunkedEncodingError(),
        google.auth.exceptions.TransportError(requests.ConnectionError()),
        google.auth.exceptions.RefreshError("metadata server is busy"),
        ChecksumError(),
        OSError(errno.EBUSY, "An error occurred (SlowDown): Please reduce your request rate."),
        OSError(errno.EREMOTEIO, "An error occurred (InternalError)"),
        botocore.exceptions.EndpointConnectionError(endpoint_url="http://s3"),
        botocore.exceptions.ReadTimeoutError(endpoint_url="http://s3"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_connections_that_break_or_stall_pass(error):
    assert is_passing(error)


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(),
        FileExistsError(),
        PermissionError(),
        OSError("Forbidden"),
        OSError(errno.ENOSPC, "No space left on device"),
        ValueError(),
        StorageError("x"),
        google.auth.exceptions.DefaultCredentialsError("none"),
        google.auth.exceptions.TransportError("a certificate that is not trusted"),
        botocore.exceptions.NoCredentialsError(),
    ],
    ids=repr,
)
def test_what_does_not_pass(error):
    assert not is_passing(error)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (
            answered(400, "Bucket is a requester pays bucket but no user project provided."),
            "gs://b/f is in a requester-pays bucket: name the project that pays with "
            "--billing-project",
        ),
        (
            google.auth.exceptions.DefaultCredentialsError("long\ntext"),
            "gs://b/f needs Google credentials and there are none: run `gcloud auth "
            "application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS",
        ),
        (
            google_error(403, "me has no storage.objects.list access"),
            "access to gs://b/f is refused: Forbidden: 403 GET https://storage.invalid/b/in/o/f: "
            "me has no storage.objects.list access",
        ),
        (answered(403), "access to gs://b/f is refused: OSError: Forbidden: b/o/f"),
        (
            answered(416, "Requested range not satisfiable"),
            "gs://b/f is shorter than it was listed: it was replaced since; run again",
        ),
        (RuntimeError(), "gs://b/f: RuntimeError"),
        (
            answered(401, "Invalid Credentials"),
            "the Google credentials for gs://b/f have expired or are not valid: run `gcloud auth "
            "application-default login`",
        ),
        (
            botocore.exceptions.NoCredentialsError(),
            "gs://b/f needs AWS credentials and there are none: set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
        ),
    ],
)
def test_a_refusal_is_explained_in_one_sentence(error, sentence):
    assert explain(error, "gs://b/f") == sentence


# ------------------------------------------------------------- Cloud Storage


@pytest.fixture(scope="module")
def running():
    with CloudStorage("in", "many", "odd") as cloud:
        cloud.put_many("many", [f"set/{n:05}.tar" for n in range(2_500)], b"tar")
        cloud.put_many("many", [f"tree/{n:04}/a.wav" for n in range(1_500)], b"a")
        yield cloud


@pytest.fixture
def cloud(running, monkeypatch, lead_to):
    """Cloud Storage without faults, its log empty, and the clients of this process led to it."""
    running.faults = None
    running.deny.clear()
    running.requester_pays.clear()
    running.requests.clear()
    monkeypatch.setattr(storage, "FIRST_WAIT_S", 0.001)
    lead_to(running.env)
    return running


ODD_NAMES = [
    "a b.tar",
    "a#1.tar",
    "a%20b.tar",
    "a+b.tar",
    "a?generation=1.tar",
    "été.tar",
    "日本語.tar",
    "a[1].tar",
    "a*b.tar",
    "a\\b.tar",
    "a;b,c&d=e.tar",
    "100%.tar",
    "'quoted\".tar",
]


def paths(found):
    return [file.path for file in found]


def asked(cloud):
    """(kind, prefix or object) of each request."""
    return [(r.kind, r.query.get("prefix", r.path.partition("/o/")[2])) for r in cloud.requests]


def test_a_listing_has_names_sizes_and_checksums(cloud):
    cloud.put("in", "list/b.tar", b"two")
    cloud.put("in", "list/a.tar", b"")
    cloud.put("in", "list/c/d.tar", b"four")
    cloud.put("in", "list2", b"elsewhere")
    assert list(list_cloud("in/list/", Access())) == [
        StoredFile("in/list/a.tar", 0, checksum_of(b"")),
        StoredFile("in/list/b.tar", 3, checksum_of(b"two")),
        StoredFile("in/list/c/d.tar", 4, checksum_of(b"four")),
    ]
    assert paths(list_cloud("in/list", Access()))[-1] == "in/list2"
    assert list(list_cloud("in/nothing/", Access())) == []


def test_a_listing_is_a_request_for_a_thousand_and_comes_page_by_page(cloud):
    found = list_cloud("many/set/", Access())
    assert [next(found).path for _ in range(1_000)][-1] == "many/set/00999.tar"
    assert asked(cloud) == [("list", "set/")]
    assert paths(found) == [f"many/set/{n:05}.tar" for n in range(1_000, 2_500)]
    assert asked(cloud) == [("list", "set/")] * 3


def test_folders_stand_where_their_objects_would(cloud):
    cloud.put_many("in", [f"mixed/{n:04}.wav" for n in range(0, 2_400, 2)])
    cloud.put_many("in", [f"mixed/{n:04}/x.wav" for n in range(1, 2_400, 2)])
    cloud.put_many("in", ["mixed/", "mixed/0001-b.wav", "mixed/00010.wav"])
    expected = [f"in/mixed/{n:04}{'/' if n % 2 else '.wav'}" for n in range(2_400)]
    # "-" sorts before "/", "0" after it.
    expected[1:2] = ["in/mixed/0001-b.wav", "in/mixed/0001/", "in/mixed/00010.wav"]
    found = list(list_cloud("in/mixed/", Access(), folders=True))
    assert paths(found) == ["in/mixed/", *expected]
    assert {file.checksum is None for file in found if file.path[-1] == "/"} == {True, False}
    assert asked(cloud) == [("list", "mixed/")] * 3


def test_odd_names_are_listed_found_and_read(cloud):
    for name in ODD_NAMES:
        cloud.put("odd", f"x/{name}", name.encode())
    assert paths(list_cloud("odd/x/", Access())) == sorted(f"odd/x/{name}" for name in ODD_NAMES)
    for name in ODD_NAMES:
        content = name.encode()
        expected = StoredFile(f"odd/x/{name}", len(content), checksum_of(content))
        assert find_cloud(f"odd/x/{name}", Access()) == expected
        fs, path = open_file_system(f"gs://odd/x/{name}")
        assert path == f"odd/x/{name}"
        with open_remote(fs, path, len(content), checksum=expected.checksum) as stream:
            assert stream.read() == content
        assert read_all(f"gs://odd/x/{name}") == content


def test_an_object_is_found_by_exactly_its_name(cloud):
    cloud.put("in", "find/a.tar", b"1")
    assert find_cloud("in/find/a.tar", Access()) is not None
    assert asked(cloud) == [("metadata", "find/a.tar")]
    for name in ("in/find/a", "in/find", "in/find/", "in/find/a.tar/", "in", "in/", "nobucket/a"):
        assert find_cloud(name, Access()) is None


GLOBS = [
    "*",
    "*.tar",
    "?.tar",
    "[ab].tar",
    "[!a].tar",
    "a*",
    "*/*.tar",
    "d/*",
    "d/*.tar",
    "**",
    "**/*.tar",
    "d/**",
    "d/**/c.tar",
    "*/deep",
    "d*",
    "*/[c-e].tar",
    "d/deep/?.tar",
    "nothing*",
]


@pytest.fixture(scope="module")
def globbed(running, tmp_path_factory):
    """The same files in a local folder and in Cloud Storage."""
    folder = tmp_path_factory.mktemp("globbed")
    names = [
        *("a.tar", "b.tar", "aa.tar", "a-1.wav", ".hidden.tar", "d-1.tar", "d0.tar", "z.tar"),
        *("d/c.tar", "d/deep/c.tar", "d/deep/er/c.tar", "d/.h/c.tar", "e/deep/x.tar", "é b/c.tar"),
    ]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
        running.put("in", f"globbed/{name}", name.encode())
    for marker in ("globbed/", "globbed/d/", "globbed/empty/"):
        running.put("in", marker, b"")
    return folder


@pytest.mark.parametrize("pattern", GLOBS)
def test_globs_match_what_they_match_on_the_local_disk(cloud, globbed, pattern):
    expected = set()
    for match in fsspec.filesystem("file").glob(f"{globbed}/{pattern}"):
        below = [Path(match)] if Path(match).is_file() else Path(match).rglob("*")
        expected |= {str(file.relative_to(globbed)) for file in below if file.is_file()}
    found = [
        path.removeprefix("in/globbed/")
        for path in paths(glob_cloud(f"in/globbed/{pattern}"))
        if not path.endswith("/")  # the marker of a folder
    ]
    assert len(found) == len(set(found))
    assert set(found) == expected
    assert found == sorted(found)
    assert found or pattern == "nothing*"


def test_a_glob_lists_only_the_folder_that_it_names(cloud):
    assert paths(glob_cloud("many/tree/000*")) == [f"many/tree/{n:04}/a.wav" for n in range(10)]
    lists = [prefix for kind, prefix in asked(cloud) if kind == "list"]
    assert lists == ["tree/000", *(f"tree/{n:04}/" for n in range(10))]
    cloud.requests.clear()
    assert paths(glob_cloud("many/tree/*.wav")) == []
    assert asked(cloud) == [("list", "tree/")] * 2  # of folders, none of which is looked into
    cloud.requests.clear()
    assert len(paths(glob_cloud("many/tree/00[01]?/*.wav"))) == 20
    assert {prefix for _, prefix in asked(cloud)} == {"tree/00"}


def test_what_cannot_be_listed_is_told(cloud):
    with pytest.raises(StorageError) as failure:
        list(list_cloud("nobucket/x", Access()))
    assert str(failure.value) == "there is no bucket gs://nobucket: check the spelling"
    for name in ("", "/x", "in*/x"):
        with pytest.raises(StorageError) as failure:
            list(list_cloud(name, Access()))
        assert str(failure.value) == f"gs://{name} names no bucket: expected gs://BUCKET/NAME"
    cloud.deny.add(("GET", "in"))
    for look in (list_cloud, lambda *a: [find_cloud(*a)]):
        with pytest.raises(StorageError, match=r"^access to gs://in/x is refused: Forbidden: 403 "):
            list(look("in/x", Access()))
    cloud.deny.clear()
    cloud.requester_pays.add("in")
    with pytest.raises(StorageError, match="name the project that pays with --billing-project"):
        list(list_cloud("in/x", Access()))
    assert list(list_cloud("in/nothing", Access(billing_project="payer"))) == []
    assert cloud.requests[-1].query["userProject"] == "payer"


def test_faults_lose_and_double_nothing_in_a_listing(cloud):
    cloud.faults = Faults(rate=0.5, seed=3, kinds=("503", "429", "reset", "truncate"))
    meter = Meter()
    found = paths(list_cloud("many/set/", Access(), meter=meter))
    assert found == [f"many/set/{n:05}.tar" for n in range(2_500)]
    assert meter.counts["list_retries"] == sum(cloud.faults.counts.values()) > 0


@pytest.mark.parametrize("kind", ["503", "reset"])
def test_storage_that_stays_down_is_told(cloud, kind, monkeypatch):
    from google.api_core.retry import Retry

    class Impatient(Retry):
        def __init__(self, **options):
            super().__init__(**options | {"timeout": 0.2})

    monkeypatch.setattr("google.api_core.retry.Retry", Impatient)
    cloud.faults = Faults(rate=1.0, kinds=(kind,))
    with pytest.raises(StorageError, match=r"^gs://in/x.*Timeout of 0.2s exceeded"):
        list(list_cloud("in/x", Access()))
    with pytest.raises(StorageError, match=r"^gs://in/x.*Timeout of 0.2s exceeded"):
        find_cloud("in/x", Access())


def test_reads_through_faults_are_whole_and_counted(cloud, waits):
    content, meter = content_of(6 * MIB), Meter()
    cloud.put("in", "big", content)
    fs, path = open_file_system("gs://in/big")
    kinds = ("503", "429", "reset", "truncate", "short")
    cloud.faults = Faults(rate=0.6, seed=1, kinds=kinds)
    with open_remote(
        fs, path, len(content), checksum=checksum_of(content), in_order=True, meter=meter
    ) as stream:
        assert stream.read() == content
    injected = sum(cloud.faults.counts.values())
    assert meter.counts["read_retries"] == injected == len(waits) > 0
    assert len(cloud.requests) == 6 + injected


def test_a_read_that_stalls_is_given_up_and_tried_again(cloud, monkeypatch):
    monkeypatch.setattr(storage, "STALL_S", 0.3)
    storage.forget_clients()
    content, meter, began = content_of(1_000), Meter(), time.monotonic()
    cloud.put("in", "stalls", content)
    fs, path = open_file_system("gs://in/stalls")
    cloud.faults = Faults(rate=0.6, seed=1, kinds=("stall",), stall_s=60.0)
    with open_remote(fs, path, 1_000, meter=meter) as stream:
        assert stream.read() == content
    assert meter.counts["read_retries"] == cloud.faults.counts["stall"] > 0
    assert time.monotonic() - began < 60  # nobody waited for the stall to end


def test_a_small_file_is_whole_or_an_error(cloud, monkeypatch):
    content, meter = content_of(5_000), Meter()
    cloud.put("in", "small", content)
    cloud.faults = Faults(rate=0.5, seed=1)
    cloud.faults.kinds = ("503", "429", "reset", "truncate", "short")
    for _ in range(10):
        assert read_all("gs://in/small", meter=meter) == content
    assert cloud.faults.counts["short"] > 0 and meter.counts["read_retries"] > 0
    cloud.faults = None
    found = StoredFile("in/small", 5_000, "AAAAAA==")
    with monkeypatch.context() as patch, pytest.raises(StorageError, match="said AAAAAA=="):
        patch.setattr(storage, "find_cloud", lambda *_: found)
        read_all("gs://in/small")
    with pytest.raises(FileNotFoundError, match="gs://in/nothing"):
        read_all("gs://in/nothing")


def test_a_cloud_file_that_is_gone_or_refused(cloud):
    fs, path = open_file_system("gs://in/gone")
    with open_remote(fs, path, 10) as stream, pytest.raises(FileNotFoundError):
        stream.read()
    cloud.put("in", "refused", b"0123456789")
    cloud.deny.add(("GET", "in"))
    fs, path = open_file_system("gs://in/refused")
    stream = open_remote(fs, path, 10)
    with pytest.raises(StorageError, match=r"^access to gs://in/refused is refused: "):
        stream.read()
    cloud.deny.clear()
    cloud.requester_pays.add("in")
    with pytest.raises(StorageError, match="--billing-project"):
        stream.read()
    fs, path = open_file_system("gs://in/refused", Access(billing_project="payer"))
    with open_remote(fs, path, 10) as stream:
        assert stream.read() == b"0123456789"


def test_a_local_path_is_local_whatever_is_in_it(tmp_path):
    file = tmp_path / "a::b?#%20[1].bin"
    file.write_bytes(b"local")
    assert read_all(str(file)) == b"local"
    assert is_local(str(file)) and not is_local("gs://in/a")
    (tmp_path / "a b.bin").write_bytes(b"by URL")
    assert read_all(f"file://{tmp_path}/a b.bin") == b"by URL"
    with pytest.raises(FileNotFoundError):
        read_all(str(tmp_path / "nothing"))


# ------------------------------------------------------------- fetch_folder


@pytest.fixture(params=["gs", "memory"])
def remote(request, cloud):
    """(URL of a folder, a function that puts a file into it)."""
    if request.param == "gs":
        yield "gs://in/students/one", lambda n, data: cloud.put("in", f"students/one/{n}", data)
        for name in cloud.names("in", "students/"):
            cloud.delete("in", name)
        return
    memory = fsspec.filesystem("memory")
    yield "memory://students/one", lambda n, data: memory.pipe(f"/students/one/{n}", data)
    memory.rm("/students", recursive=True)


SUFFIXES = (".json", ".safetensors")


def held(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_folder_is_copied_once_for_each_content(remote, tmp_path, cloud):
    url, put = remote
    weights = content_of(3 * MIB)
    for name, data in [("config.json", b"{}"), ("model.safetensors", weights), ("empty.json", b"")]:
        put(name, data)
    for name in ("readme.md", "deep/other.json"):
        put(name, b"not wanted")
    cache = tmp_path / "cache"
    copy = fetch_folder(url, SUFFIXES, cache=cache)
    assert held(copy) == {"config.json": b"{}", "model.safetensors": weights, "empty.json": b""}
    assert copy.parent == cache and copy.name.startswith("one-")
    made = {file.name: file.stat().st_mtime_ns for file in copy.iterdir()}

    cloud.requests.clear()
    assert fetch_folder(url + "/", SUFFIXES, cache=cache) == copy
    assert {file.name: file.stat().st_mtime_ns for file in copy.iterdir()} == made
    assert [kind for kind, _ in asked(cloud) if kind == "read"] == []

    changed = content_of(3 * MIB, seed=1)  # of the same size
    put("model.safetensors", changed)
    other = fetch_folder(url, SUFFIXES, cache=cache)
    assert other != copy
    assert held(other)["model.safetensors"] == changed
    assert held(copy)["model.safetensors"] == weights
    assert sorted(cache.iterdir()) == sorted([copy, other])


def test_a_folder_goes_into_the_users_cache(remote, tmp_path, monkeypatch):
    url, put = remote
    put("config.json", b"{}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert fetch_folder(url, SUFFIXES).parent == tmp_path / "xdg" / "earmark"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert fetch_folder(url, SUFFIXES).parent == tmp_path / "home" / ".cache" / "earmark"


def test_a_folder_without_the_files_is_refused(remote, tmp_path):
    url, put = remote
    put("readme.md", b"x")
    with pytest.raises(FileNotFoundError) as refusal:
        fetch_folder(url, SUFFIXES, cache=tmp_path)
    assert str(refusal.value) == f"{url!r} holds none of .json, .safetensors"
    with pytest.raises(FileNotFoundError):
        fetch_folder(f"{url}-nothing", SUFFIXES, cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_copy_made_by_several_at_once_is_one_and_whole(remote, tmp_path):
    url, put = remote
    files = {f"{n}.json": content_of(100_000, n) for n in range(5)}
    for name, data in files.items():
        put(name, data)
    with ThreadPoolExecutor(8) as pool:
        copies = set(pool.map(lambda _: fetch_folder(url, SUFFIXES, cache=tmp_path), range(8)))
    (copy,) = copies
    assert held(copy) == files
    assert list(tmp_path.iterdir()) == [copy]


def test_an_interrupted_copy_leaves_nothing(remote, tmp_path, monkeypatch):
    url, put = remote
    for name in "ab":
        put(f"{name}.json", b"{}")
    opened = []

    def interrupted(*args, **options):
        if opened:
            raise KeyboardInterrupt
        opened.append(args)
        return open_remote(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "open_remote", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fetch_folder(url, SUFFIXES, cache=tmp_path)
    assert opened and list(tmp_path.iterdir()) == []
    assert held(fetch_folder(url, SUFFIXES, cache=tmp_path)) == {"a.json": b"{}", "b.json": b"{}"}


def test_a_copy_that_does_not_arrive_whole_is_not_kept(cloud, tmp_path, monkeypatch):
    cloud.put("in", "bad/model.safetensors", b"weights")
    monkeypatch.setattr(
        storage,
        "list_cloud",
        lambda *a, **o: iter([StoredFile("in/bad/model.safetensors", 7, "AAAAAA==")]),
    )
    with pytest.raises(StorageError, match="the listing said AAAAAA=="):
        fetch_folder("gs://in/bad", SUFFIXES, cache=tmp_path)
    assert list(tmp_path.iterdir()) == []
