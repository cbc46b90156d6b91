"""Publishing, reading and removing the files of an output, wherever it lies."""

import errno
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest

from bench.stand_ins import CloudStorage, Faults, S3Server
from transforms import output as outputs
from transforms import storage
from transforms.meter import Meter
from transforms.output import (
    CloudOutput,
    LocalOutput,
    ObjectOutput,
    check_writable,
    crc32c,
    open_output,
    publish_bytes,
    remove_output,
)
from transforms.storage import Access, StorageError

MIB = 1 << 20
S3_BUCKET = "output-tests"  # s3fs keeps its clients for the life of the process


def content_of(size, seed=0):
    return random.Random(seed).randbytes(size)


@pytest.fixture(scope="module")
def running():
    with CloudStorage("out") as cloud:
        yield cloud


@pytest.fixture
def cloud(running, lead_to):
    """Cloud Storage, empty, without faults, its log empty; the clients of this process led to it."""
    running.faults = None
    running.deny.clear()
    for name in running.names("out"):
        running.delete("out", name)
    running.requests.clear()
    lead_to(running.env)
    return running


@pytest.fixture(scope="module")
def s3():
    with S3Server(S3_BUCKET) as server:
        yield server


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Nobody waits between tries."""
    monkeypatch.setattr(storage, "FIRST_WAIT_S", 0.001)


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """The temporary folder, in which nothing may be left."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert list(folder.iterdir()) == []


@pytest.fixture(params=["local", "gs", "s3", "memory"])
def output(request, tmp_path, monkeypatch):
    """An empty output of each kind."""
    if request.param == "local":
        yield open_output(str(tmp_path / "out"))
    elif request.param == "gs":
        request.getfixturevalue("cloud")
        yield open_output("gs://out/deep/tags")
    elif request.param == "s3":
        server = request.getfixturevalue("s3")
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        made = open_output(f"s3://{S3_BUCKET}/deep/tags")
        yield made
        with_all = made._fs.find(f"{S3_BUCKET}/")
        if with_all:
            made._fs.rm(with_all)
    else:
        yield open_output("memory://output-tests/tags")
        memory = fsspec.filesystem("memory")
        if memory.exists("/output-tests"):
            memory.rm("/output-tests", recursive=True)


def publish(output, name, content, **options):
    return publish_bytes(output, name, content, **options)


def held(output, *folders):
    """Everything in an output, by name."""
    names = [os.path.join(folder, n) for folder in ("", *folders) for n in output.names(folder)]
    return {name: output.read(name) for name in names}


# ---------------------------------------------------------------- of every kind


def test_the_kind_of_an_output_is_that_of_its_address(tmp_path, cloud, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert isinstance(open_output("out"), LocalOutput)
    assert open_output("out").uri == str(tmp_path / "out")
    assert isinstance(open_output("gs://out/x/"), CloudOutput)
    assert isinstance(open_output("gcs://out/x"), CloudOutput)
    assert open_output("gs://out/x/").uri == "gs://out/x"
    assert isinstance(open_output("memory://x"), ObjectOutput)
    assert open_output(f"file://{tmp_path}/out").uri == str(tmp_path / "out")
    for uri, message in [
        ("nosuch://x", "nosuch"),
        ("gs://", "no bucket"),
        ("s3:///x", "no bucket"),
    ]:
        with pytest.raises(ValueError, match=message):
            open_output(uri)
    assert cloud.requests == [] and list(tmp_path.iterdir()) == [tmp_path / "temporary"]


def test_an_output_that_is_not_there_is_empty(output):
    assert list(output.names()) == list(output.names("clips")) == []
    assert output.read("run.json") is None and not output.exists("run.json")
    with pytest.raises(OSError):
        output.tail("run.json", 10)
    with pytest.raises(OSError), output.open("run.json") as stream:
        stream.read()
    output.remove("run.json", "clips/a.parquet")
    output.remove()
    remove_output(output, "clips", ("run.json",))


def test_names_are_those_directly_in_a_folder(output):
    for name in ("run.json", "clips/a.parquet", "clips/b 1#%.parquet", "clips/deep/c.parquet"):
        assert publish(output, name, b"1")
    assert list(output.names()) == ["run.json"]
    assert sorted(output.names("clips")) == ["a.parquet", "b 1#%.parquet"]
    assert list(output.names("clips/deep")) == ["c.parquet"]
    assert list(output.names("cli")) == []
    assert output.exists("run.json") and output.exists("clips/b 1#%.parquet")
    assert not output.exists("clips/c.parquet") and not output.exists("clips/a")
    assert output.read("clips/b 1#%.parquet") == b"1"


@pytest.mark.parametrize("size", [1, 1_000, 300_000])
def test_what_was_published_is_read_back(output, size):
    content = content_of(size)
    assert publish(output, "clips/a.parquet", content)
    assert output.read("clips/a.parquet") == content
    for wanted in (1, 999, 65_536):
        assert output.tail("clips/a.parquet", wanted) == content[-wanted:]
    with output.open("clips/a.parquet") as stream:
        assert stream.seek(size // 2) == size // 2
        assert stream.read(100) == content[size // 2 :][:100]
        stream.seek(0)
        assert stream.read() == content


def test_a_file_without_bytes_is_a_file(output):
    assert publish(output, "empty", b"")
    assert output.read("empty") == b""
    assert list(output.names()) == ["empty"]


def test_the_first_of_two_files_stays_unless_it_is_to_be_replaced(output):
    assert publish(output, "a", b"first", replace=False)
    assert not publish(output, "a", b"second", replace=False)
    assert output.read("a") == b"first"
    assert publish(output, "a", b"third", replace=True)
    assert output.read("a") == b"third"
    assert output.tail("a", 3) == b"ird"


def test_a_file_that_is_not_published_leaves_nothing(output):
    with pytest.raises(RuntimeError), output.scratch("clips/a.parquet") as file:
        file.write_bytes(b"half")
        raise RuntimeError("the writer's own")
    assert not file.exists()
    assert held(output, "clips") == {}


def test_no_reader_of_parquet_takes_a_scratch_file_for_data(output):
    with output.scratch("clips/a.parquet") as file:
        file.write_bytes(b"half")
        names = [name for name in output.names("clips") if not name.startswith(".")]
        assert names == []


def test_what_is_removed_is_gone_and_the_rest_is_not(output):
    for name in ("run.json", "clips/a", "clips/b", "notes.txt", "clips2/c"):
        publish(output, name, name.encode())
    output.remove("clips/a", "clips/nothing")
    assert sorted(held(output, "clips")) == ["clips/b", "notes.txt", "run.json"]
    remove_output(output, "clips", ("labels.parquet", "run.json"))
    assert held(output, "clips", "clips2") == {"notes.txt": b"notes.txt", "clips2/c": b"clips2/c"}


def test_an_output_is_tried_without_a_trace(output):
    publish(output, "notes.txt", b"mine")
    assert check_writable(output) is None
    assert held(output) == {"notes.txt": b"mine"}


# ---------------------------------------------------------------- the local disk


def test_a_local_folder_that_was_not_there_is_not_there_after_the_trial(tmp_path):
    check_writable(LocalOutput(str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
    (tmp_path / "empty").mkdir()
    check_writable(LocalOutput(str(tmp_path / "empty")))
    assert (tmp_path / "empty").is_dir()


def test_a_local_output_that_cannot_be_written_is_told(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError):
        check_writable(LocalOutput(str(tmp_path / "file" / "out")))

    def read_only(file, *_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "write_bytes", read_only)
    (tmp_path / "out").mkdir()
    with pytest.raises(OSError, match="Read-only file system"):
        check_writable(LocalOutput(str(tmp_path / "out")))
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("links", [True, False])
def test_racing_local_writers_leave_one_file_and_no_other(tmp_path, links, monkeypatch):
    if not links:

        def refuse(*_):
            raise OSError(errno.EPERM, "no hard links here")

        monkeypatch.setattr(os, "link", refuse)
    output = LocalOutput(str(tmp_path / "out"))
    contents = [bytes([n]) * 100_000 for n in range(8)]
    start = threading.Barrier(8)

    def write(content):
        start.wait()
        return publish_bytes(output, "clips/a", content, replace=False)

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(write, contents))
    assert output.read("clips/a") in contents
    assert os.listdir(tmp_path / "out" / "clips") == ["a"]
    if links:
        assert won.count(True) == 1 and output.read("clips/a") == contents[won.index(True)]
    else:  # the last one wins, and the first comers are not told
        assert any(won)
        assert not publish_bytes(output, "clips/a", b"late", replace=False)
        assert output.read("clips/a") in contents


def test_a_folder_named_as_a_file_is_no_file(tmp_path):
    output = LocalOutput(str(tmp_path))
    (tmp_path / "clips" / "x.parquet").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    assert list(output.names("clips")) == []
    assert list(output.names("file")) == []


# ---------------------------------------------------------------- Cloud Storage


def kinds(cloud):
    return Counter(request.kind for request in cloud.requests)


def test_a_file_is_one_upload_under_its_final_name(cloud):
    output = open_output("gs://out/tags")
    content = content_of(100_000)
    assert publish(output, "clips/a.parquet", content, replace=False)
    (write,) = cloud.requests
    assert (write.kind, write.query["ifGenerationMatch"]) == ("write", "0")
    assert cloud.get("out", "tags/clips/a.parquet") == content
    cloud.requests.clear()
    assert publish(output, "clips/a.parquet", content, replace=True)
    (write,) = cloud.requests
    assert "ifGenerationMatch" not in write.query


def test_reading_costs_a_request_and_the_tail_of_a_small_file_two(cloud):
    cloud.put("out", "tags/small", b"0123456789")
    output = open_output("gs://out/tags")
    assert output.read("small") == b"0123456789"
    assert output.tail("small", 10) == b"0123456789"
    assert kinds(cloud) == {"read": 2}
    cloud.requests.clear()
    assert output.tail("small", 11) == b"0123456789"
    assert kinds(cloud) == {"read": 2}


def test_racing_uploads_have_one_winner(cloud):
    contents = [bytes([n]) * 50_000 for n in range(8)]
    start = threading.Barrier(8)

    def write(content):
        output = open_output("gs://out/race")
        start.wait()
        return publish_bytes(output, "a.parquet", content, replace=False)

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(write, contents))
    assert won.count(True) == 1
    assert cloud.get("out", "race/a.parquet") == contents[won.index(True)]


def test_racing_uploads_through_faults_have_one_winner(cloud):
    contents = [bytes([n]) * 50_000 for n in range(8)]
    cloud.faults = Faults(rate=0.5, seed=4, kinds=("503", "429", "reset", "truncate"))

    def write(content):
        output = open_output("gs://out/race")
        return publish_bytes(output, "a.parquet", content, replace=False)

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(write, contents))
    assert sum(cloud.faults.counts.values()) > 0
    assert won.count(True) == 1
    assert cloud.get("out", "race/a.parquet") == contents[won.index(True)]


@pytest.mark.parametrize("size", [10_000, 9 * MIB])  # in one request, and in parts
def test_an_upload_whose_answer_is_lost_is_ours(cloud, size):
    content, meter = content_of(size), Meter()
    output = open_output("gs://out/lost", meter=meter)

    class Lost(Faults):
        """Loses the answer to the first upload that is stored."""

        def draw(self, request_kind):
            lost = request_kind == "write" and not self.counts
            return "reset" if lost else None

        def below(self, limit):
            return limit - 1

    cloud.faults = Lost()
    assert publish(output, "a.parquet", content, replace=False)
    assert cloud.faults.counts == {"reset": 1}
    assert meter.counts["write_retries"] == 1
    assert cloud.get("out", "lost/a.parquet") == content
    cloud.faults = None
    assert not publish(output, "a.parquet", b"another's", replace=False)
    assert cloud.get("out", "lost/a.parquet") == content


def test_a_412_by_the_content_of_another_is_not_ours(cloud):
    cloud.put("out", "tags/a", b"theirs")
    output = open_output("gs://out/tags")
    assert not publish(output, "a", b"ours", replace=False)
    assert kinds(cloud) == {"write": 1, "metadata": 1}
    # The same bytes: it does not matter whose they are.
    assert publish(output, "a", b"theirs", replace=False)


@pytest.mark.parametrize("seed", range(3))
def test_a_large_file_goes_through_faults(cloud, seed, tmp_path):
    content, meter = content_of(8 * MIB + 12_345), Meter()
    cloud.faults = Faults(rate=0.5, seed=seed, kinds=("503", "429", "reset", "truncate"))
    output = open_output("gs://out/large", meter=meter)
    assert publish(output, "a.parquet", content, replace=False)
    done = kinds(cloud)
    assert done["write-start"] >= 1 and done["write"] >= 1
    cloud.faults, injected = None, cloud.faults.counts
    assert cloud.get("out", "large/a.parquet") == content
    assert bool(meter.counts["write_retries"] + meter.counts["list_retries"]) == bool(injected)


def test_the_checksum_is_sent_and_checked(cloud, monkeypatch):
    content = content_of(1_000)
    monkeypatch.setattr(outputs, "_crc32c_of", lambda file: crc32c(b"what was meant"))
    output = open_output("gs://out/damaged")
    with pytest.raises(StorageError) as failure:
        publish(output, "a", content, replace=False)
    assert str(failure.value) == (
        f"gs://out/damaged/a arrived with crc32c {crc32c(content)}, was sent with "
        f"{crc32c(b'what was meant')}; it was removed again"
    )
    assert cloud.names("out") == []


def test_the_checksum_of_known_bytes():
    # RFC 3720, B.4: 32 bytes of zeros have CRC-32C aa 36 91 8a, least significant byte first.
    assert crc32c(bytes(32)) == "ipE2qg=="
    assert crc32c(b"") == "AAAAAA=="


def test_reads_through_faults_are_whole_and_counted(cloud):
    content, meter = content_of(200_000), Meter()
    cloud.put("out", "tags/a", content)
    output = open_output("gs://out/tags", meter=meter)
    cloud.faults = Faults(rate=0.4, seed=2, kinds=("503", "429", "reset", "truncate", "short"))
    for _ in range(8):
        assert output.read("a") == content
        assert output.tail("a", 65_536) == content[-65_536:]
        assert output.tail("a", 500_000) == content
        with output.open("a") as stream:
            assert stream.read() == content
    injected = cloud.faults.counts
    assert injected["short"] and injected["truncate"] and injected["reset"]
    assert meter.counts["read_retries"] > 0


@pytest.mark.parametrize("size", [10, 100_000])
def test_an_answer_with_too_little_is_seen(cloud, size):
    content = content_of(size)
    cloud.put("out", "tags/a", content)
    output = open_output("gs://out/tags")

    class Short(Faults):
        """Every other answer with data is short."""

        def draw(self, request_kind):
            self.turn = not getattr(self, "turn", False)
            return "short" if self.turn else None

    cloud.faults = Short()
    assert output.read("a") == content
    assert output.tail("a", size // 2) == content[-(size // 2) :]
    assert output.tail("a", 2 * size) == content
    assert cloud.faults.counts["short"] >= 3


def test_many_names_and_many_removals(cloud):
    cloud.put_many("out", [f"many/clips/{n:04}.parquet" for n in range(1_250)])
    cloud.put_many("out", [f"many/clips/deep/{n}" for n in range(5)])
    meter = Meter()
    output = open_output("gs://out/many", meter=meter)
    assert list(output.names("clips")) == [f"{n:04}.parquet" for n in range(1_250)]
    assert kinds(cloud) == {"list": 2}
    cloud.requests.clear()
    names = [f"clips/{n:04}.parquet" for n in range(250)]
    cloud.delete("out", "many/clips/0007.parquet")
    cloud.faults = Faults(rate=0.1, seed=1, kinds=("503", "reset"))
    output.remove(*names)
    injected = sum(cloud.faults.counts.values())
    assert kinds(cloud) == {"delete": 250 + injected}
    assert meter.counts["write_retries"] == injected > 0
    cloud.faults = None
    assert list(output.names("clips")) == [f"{n:04}.parquet" for n in range(250, 1_250)]
    assert len(list(output.names("clips/deep"))) == 5


def test_a_cloud_output_that_may_not_be_written_is_told(cloud):
    output = open_output("gs://out/tags")
    cloud.deny.add(("POST", "out"))
    with pytest.raises(StorageError, match=r"^access to gs://out/tags/\.earmark-probe-\w+ is ref"):
        check_writable(output)
    cloud.deny.clear()
    cloud.deny.add(("DELETE", "out"))
    said = check_writable(output)  # one may write and not remove
    assert re.match(r"\.earmark-probe-\w+ was written .* may not be removed here: access to ", said)
    cloud.deny.clear()
    with pytest.raises(StorageError, match=r"gs://nobucket/x/\.earmark-probe.*NotFound"):
        check_writable(open_output("gs://nobucket/x"))


def test_what_may_not_be_read_is_not_what_is_not_there(cloud):
    cloud.put("out", "tags/run.json", b"{}")
    output = open_output("gs://out/tags")
    cloud.deny.add(("GET", "out"))
    for look in (
        lambda: output.read("run.json"),
        lambda: output.tail("run.json", 1),
        lambda: output.open("run.json"),
        lambda: list(output.names()),
    ):
        with pytest.raises(StorageError, match=r"^access to gs://out/tags/.* is refused: "):
            look()


def test_storage_that_stays_down_is_told(cloud, monkeypatch):
    from google.api_core.retry import Retry

    class Impatient(Retry):
        def __init__(self, **options):
            super().__init__(**options | {"timeout": 0.1})

    monkeypatch.setattr("google.api_core.retry.Retry", Impatient)
    monkeypatch.setattr(storage, "_sleep", lambda seconds: None)
    cloud.faults = Faults(rate=1.0, kinds=("503",))
    output = open_output("gs://out/tags")
    for act in (
        lambda: publish(output, "a", b"1", replace=False),
        lambda: publish(output, "a", b"1" * 9 * MIB, replace=True),
        lambda: output.read("a"),
        lambda: output.tail("a", 1),
        lambda: output.open("a"),
        lambda: output.remove("a"),
        lambda: list(output.names()),
    ):
        with pytest.raises(StorageError, match="gs://out/tags/"):
            act()


@pytest.mark.parametrize("size", [1_000, 9 * MIB])
@pytest.mark.parametrize("replace", [True, False])
def test_the_customers_key_is_named_in_every_upload(cloud, size, replace):
    key = "projects/p/locations/l/keyRings/r/cryptoKeys/k"
    output = open_output("gs://out/keyed", Access(kms_key=key))
    assert publish(output, "a", content_of(size), replace=replace)
    first = cloud.requests[0]
    assert first.kind == ("write" if size < MIB else "write-start")
    assert first.query["kmsKeyName"] == key
    assert output.read("a") == content_of(size)
    cloud.requests.clear()
    assert publish(open_output("gs://out/keyed"), "b", b"1")
    assert "kmsKeyName" not in cloud.requests[0].query


def test_who_pays_is_named_in_every_request(cloud):
    cloud.requester_pays.add("out")
    try:
        with pytest.raises(StorageError, match="--billing-project"):
            open_output("gs://out/pays").read("a")
        cloud.requests.clear()
        output = open_output("gs://out/pays", Access(billing_project="payer"))
        publish(output, "a", b"0123456789")
        publish(output, "big", content_of(9 * MIB))
        assert not publish(output, "a", b"x", replace=False)
        assert output.read("a") == b"0123456789" and output.tail("a", 4) == b"6789"
        with output.open("a") as stream:
            assert stream.read() == b"0123456789"
        assert sorted(output.names()) == ["a", "big"]
        output.remove("a", "big")
        starts = [request for request in cloud.requests if "upload_id" not in request.query]
        assert all(request.query.get("userProject") == "payer" for request in starts)
        assert set(kinds(cloud)) == {"write", "write-start", "metadata", "read", "list", "delete"}
    finally:
        cloud.requester_pays.clear()


# ---------------------------------------------------------------- other file systems


class Fussy:
    """A file system that fails as `faults` say before it does as the memory does."""

    def __init__(self, *faults):
        self.faults = list(faults)
        self.memory = fsspec.filesystem("memory")

    def __getattr__(self, name):
        def act(*arguments, **options):
            if self.faults and (fault := self.faults.pop(0)) is not None:
                raise fault
            return getattr(self.memory, name)(*arguments, **options)

        return act


@pytest.fixture
def fussy(monkeypatch):
    monkeypatch.setattr(storage, "_sleep", lambda seconds: None)

    def make(*faults):
        meter = Meter()
        output = open_output("memory://output-tests/fussy", meter=meter)
        output._fs = Fussy(*faults)
        return output, meter

    yield make
    memory = fsspec.filesystem("memory")
    if memory.exists("/output-tests"):
        memory.rm("/output-tests", recursive=True)


def test_other_file_systems_are_tried_again(fussy):
    reset = ConnectionResetError
    output, meter = fussy(reset(), reset())
    assert publish(output, "a", b"0123456789")
    assert meter.take()[0] == {"write_retries": 2}
    for act, expected in [
        (lambda: output.read("a"), b"0123456789"),
        (lambda: output.tail("a", 3), b"789"),
        (lambda: output.open("a").read(), b"0123456789"),
    ]:
        output._fs.faults = [reset(), TimeoutError()]
        assert act() == expected
        assert meter.take()[0] == {"read_retries": 2}
    output._fs.faults = [None, reset()]  # the first forgets what it knew of the folder
    assert list(output.names()) == ["a"]
    assert meter.take()[0] == {"list_retries": 1}
    output._fs.faults = [reset()]
    output.remove("a", "nothing")
    assert meter.take()[0] == {"write_retries": 1}
    assert list(output.names()) == []


def test_other_file_systems_say_in_their_way_that_another_was_first(fussy):
    for fault in (
        FileExistsError(),
        OSError("An error occurred (PreconditionFailed) when calling PutObject"),
        OSError(errno.EINVAL, "At least one of the pre-conditions you specified did not hold"),
    ):
        assert not publish(fussy(fault)[0], "a", b"1", replace=False)
    output, _ = fussy(OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(OSError, match="No space left on device"):
        publish(output, "a", b"1")
    assert output.read("a") is None


def test_racing_s3_writers_have_one_winner(s3, monkeypatch):
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    contents = [bytes([n]) * 10_000 for n in range(4)]
    output = open_output(f"s3://{S3_BUCKET}/race")
    start = threading.Barrier(4)

    def write(content):
        start.wait()
        return publish_bytes(output, "a", content, replace=False)

    with ThreadPoolExecutor(4) as pool:
        won = list(pool.map(write, contents))
    assert s3.get(S3_BUCKET, "race/a") == contents[won.index(True)]
    assert won.count(True) == 1


# ---------------------------------------------------------------- several processes

WRITER = """
import json, sys
from transforms.output import open_output, publish_bytes
number, uri = int(sys.argv[1]), sys.argv[2]
sys.stdin.read(1)
won = publish_bytes(open_output(uri), "clips/a", bytes([number]) * 50_000, replace=False)
print(json.dumps(won))
"""


def test_racing_processes_have_one_winner(cloud, tmp_path):
    root = Path(__file__).parent.parent
    for uri, output in (("gs://out/p", None), (str(tmp_path / "out"), None)):
        output = open_output(uri)
        running = [
            subprocess.Popen(
                [sys.executable, "-c", WRITER, str(number), uri],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                cwd=root,
                text=True,
            )
            for number in range(2)
        ]
        for process in running:
            process.stdin.write("x")
            process.stdin.flush()
        won = [json.loads(process.communicate(timeout=120)[0]) for process in running]
        assert sorted(won) == [False, True]
        assert output.read("clips/a") == bytes([won.index(True)]) * 50_000
