"""The stand-ins of the cloud that other tests rely on, asked by the real clients."""

import http.client
import io
import json
import os
import random
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from bench.stand_ins import (
    CloudStorage,
    DataflowService,
    Faults,
    ImageRegistry,
    S3Server,
    page_of,
    pick,
)

ROOT = Path(__file__).parent.parent
TIMEOUT_S = 60

storage = pytest.importorskip("google.cloud.storage")
requests = pytest.importorskip("requests")
pytest.importorskip("gcp_storage_emulator")
from google.api_core import exceptions  # noqa: E402
from google.auth.credentials import AnonymousCredentials  # noqa: E402


@pytest.fixture(scope="module")
def running():
    with CloudStorage("in", "out", "pages") as cloud:
        yield cloud


@pytest.fixture
def cloud(running):
    """The one that runs, as it was at first."""
    running.faults = None
    running.requests.clear()
    running.requester_pays.clear()
    running.deny.clear()
    for bucket in ("in", "out"):
        for name in running.names(bucket):
            running.delete(bucket, name)
    return running


def client_of(cloud, **options):
    return storage.Client(
        project="p",
        credentials=AnonymousCredentials(),
        client_options={"api_endpoint": cloud.url},
        **options,
    )


def media(bucket, name):
    return f"/download/storage/v1/b/{bucket}/o/{name}?alt=media"


def in_threads(number, do):
    """`do(0)`, `do(1)` ... begun at the same moment, in order of their number."""
    barrier = threading.Barrier(number, timeout=TIMEOUT_S)

    def run(index):
        barrier.wait()
        return do(index)

    with ThreadPoolExecutor(number) as pool:
        return list(pool.map(run, range(number)))


# ---------------------------------------------------------------- objects


def test_google_cloud_storage_reads_back_what_it_wrote(cloud):
    bucket = client_of(cloud).bucket("out")
    for name, data in {
        "empty": b"",
        "ends in newlines": b"a\r\n\n",
        "a/é #?%20.bin": random.Random(1).randbytes(3_000_000),
    }.items():
        bucket.blob(name).upload_from_string(data, checksum="crc32c")
        assert bucket.blob(name).download_as_bytes(checksum="crc32c") == data
        assert cloud.get("out", name) == data
        found = bucket.get_blob(name)
        assert found.download_as_bytes() == data  # by its mediaLink
        assert (found.size, found.metageneration) == (len(data), 1)
        assert found.generation and found.crc32c and found.md5_hash and found.etag and found.updated
    assert cloud.names("out") == sorted(["a/é #?%20.bin", "empty", "ends in newlines"])
    assert bucket.get_blob("none") is None
    with pytest.raises(exceptions.NotFound, match="No such object: out/none"):
        bucket.blob("none").download_as_bytes()
    with pytest.raises(exceptions.NotFound, match="bucket does not exist"):
        list(client_of(cloud).list_blobs("no-such-bucket"))


def test_the_log_says_what_each_request_was(cloud):
    bucket = client_of(cloud).bucket("out")
    bucket.blob("a/b").upload_from_string(b"1")
    large = bucket.blob("c", chunk_size=256 * 1024)
    large.upload_from_file(io.BytesIO(bytes(600_000)))  # its size not said: resumable
    bucket.blob("a/b").reload()
    bucket.blob("a/b").download_as_bytes()
    list(client_of(cloud).list_blobs("out"))
    bucket.blob("a/b").delete()
    # Each client asks about the bucket itself too, once, from a thread of its own.
    ours = [
        request
        for request in cloud.requests
        if "/o" in request.path.removeprefix("/storage/v1/b/out")
    ]
    assert Counter(request.kind for request in ours) == {
        "write": 1 + 3,
        "write-start": 1,
        "metadata": 1,
        "read": 1,
        "list": 1,
        "delete": 1,
    }
    last = ours[-1]
    assert (last.method, last.path, last.status) == ("DELETE", "/storage/v1/b/out/o/a/b", 204)


def test_ranges_end_where_the_object_ends(cloud):
    cloud.put("in", "digits", b"0123456789")
    cloud.put("in", "empty", b"")

    def ask(name, span):
        answer = requests.get(cloud.url + media("in", name), headers={"Range": f"bytes={span}"})
        return answer.status_code, answer.headers.get("Content-Range"), answer.content

    assert ask("digits", "2-4") == (206, "bytes 2-4/10", b"234")
    assert ask("digits", "8-100") == (206, "bytes 8-9/10", b"89")
    assert ask("digits", "7-") == (206, "bytes 7-9/10", b"789")
    assert ask("digits", "-3") == (206, "bytes 7-9/10", b"789")
    assert ask("digits", "-30") == (206, "bytes 0-9/10", b"0123456789")
    assert ask("digits", "10-12")[:2] == (416, "bytes */10")
    assert ask("empty", "0-")[:2] == (416, "bytes */0")
    assert ask("digits", "4-2") == (200, None, b"0123456789")


def test_gcsfs_lists_and_reads(cloud):
    from gcsfs.core import GCSFileSystem  # without the probe for the type of the bucket

    data = random.Random(2).randbytes(700_000)
    cloud.put("in", "shards/a.tar", data)
    cloud.put("in", "shards/sub/b.tar", b"b")
    files = GCSFileSystem(token="anon", endpoint_url=cloud.url, skip_instance_cache=True)
    assert sorted(files.ls("in/shards")) == ["in/shards/a.tar", "in/shards/sub"]
    assert files.find("in") == ["in/shards/a.tar", "in/shards/sub/b.tar"]
    assert files.cat_file("in/shards/a.tar", start=1000, end=500_000) == data[1000:500_000]
    with files.open("in/shards/a.tar", block_size=65_536) as file:
        assert file.read() == data
    files.pipe("out/c", data)
    with files.open("out/d", "wb", block_size=262_144) as file:  # in several chunks
        file.write(data)
    assert cloud.get("out", "c") == cloud.get("out", "d") == data


def test_a_slow_reader_keeps_nobody_waiting(cloud):
    data = bytes(30_000_000)  # more than the sockets between them hold
    cloud.put("in", "a", data)
    link = http.client.HTTPConnection("127.0.0.1", urlsplit(cloud.url).port, timeout=TIMEOUT_S)
    link.request("GET", media("in", "a"))
    answer = link.getresponse()
    assert answer.read(10) == data[:10]
    client_of(cloud).bucket("out").blob("b").upload_from_string(b"1", timeout=TIMEOUT_S)
    assert len(answer.read()) == len(data) - 10
    link.request("GET", media("in", "a"), headers={"Range": "bytes=0-3"})  # the same connection
    assert link.getresponse().read() == data[:4]
    link.close()


def test_a_child_process_needs_nothing_but_env(cloud):
    cloud.put("in", "a", b"content")
    code = (
        "import google.auth, gcsfs; from google.cloud import storage; "
        "print(google.auth.default()[1], gcsfs.GCSFileSystem().cat('in/a'), "
        "storage.Client().bucket('in').blob('a').download_as_bytes())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **cloud.env},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.stdout == "stand-in-project b'content' b'content'\n", done.stderr


# ---------------------------------------------------------------- preconditions and rights


@pytest.mark.parametrize("chunk_size", [None, 256 * 1024], ids=["multipart", "resumable"])
def test_of_racing_writers_one_wins(cloud, chunk_size):
    client = client_of(cloud)

    def write(index):
        blob = client.bucket("out").blob("a", chunk_size=chunk_size)
        try:
            data = io.BytesIO(bytes([index]) * 300_000)
            size = None if chunk_size else 300_000
            blob.upload_from_file(data, size=size, if_generation_match=0)
        except exceptions.PreconditionFailed as error:
            assert "pre-conditions" in str(error)
            return False
        return True

    won = in_threads(8, write)
    assert won.count(True) == 1
    assert any(request.kind == "write-start" for request in cloud.requests) == bool(chunk_size)
    assert cloud.get("out", "a") == bytes([won.index(True)]) * 300_000


def test_a_resumable_upload_is_checked_when_it_ends_too(cloud):
    start = f"{cloud.url}/upload/storage/v1/b/out/o?uploadType=resumable&name=a&ifGenerationMatch=0"
    places = [requests.post(start, json={}).headers["Location"] for _ in range(2)]
    assert [requests.put(place, data=b"x").status_code for place in places] == [200, 412]
    assert requests.put(places[0], headers={"Content-Range": "bytes */*"}).status_code == 200
    assert requests.post(start, json={}).status_code == 412


def test_preconditions_compare_generations(cloud):
    blob = client_of(cloud).bucket("out").blob("a")
    blob.upload_from_string(b"1")
    first = blob.generation
    blob.upload_from_string(b"2", if_generation_match=first)
    for change in (
        lambda: blob.upload_from_string(b"3", if_generation_match=first),
        lambda: blob.delete(if_generation_match=first),
        lambda: blob.download_as_bytes(if_generation_match=first),
    ):
        with pytest.raises(exceptions.PreconditionFailed):
            change()
    assert cloud.get("out", "a") == b"2"
    blob.delete(if_generation_match=blob.generation)
    assert cloud.names("out") == []


def test_an_upload_goes_on_where_it_stopped(cloud):
    unit = 256 * 1024
    data = random.Random(3).randbytes(3 * unit)
    url = f"{cloud.url}/upload/storage/v1/b/out/o?uploadType=resumable&name=a"
    place = requests.post(url, json={}).headers["Location"]

    def put(content, span):
        answer = requests.put(place, data=content, headers={"Content-Range": f"bytes {span}"})
        return answer.status_code, answer.headers.get("Range")

    assert put(b"", f"*/{len(data)}") == (308, None)
    # What is no whole unit is not kept.
    assert put(data[: unit + 5], f"0-{unit + 4}/{len(data)}") == (308, f"bytes=0-{unit - 1}")
    assert put(data[unit : 2 * unit], f"{unit}-{2 * unit - 1}/*") == (
        308,
        f"bytes=0-{2 * unit - 1}",
    )
    assert put(data[unit:], f"{unit}-{len(data) - 1}/{len(data)}")[0] == 200  # some of it again
    assert cloud.get("out", "a") == data


@pytest.mark.parametrize("hashes", [{"crc32c": "AAAAAA=="}, {"md5Hash": "AAAA"}])
def test_a_wrong_checksum_is_refused(cloud, hashes):
    about = json.dumps({"name": "a", **hashes})
    lines = ["--x", "content-type: application/json", "", about, "--x", "", "data", "--x--"]
    answer = requests.post(
        f"{cloud.url}/upload/storage/v1/b/out/o?uploadType=multipart",
        data="\r\n".join(lines),
        headers={"Content-Type": "multipart/related; boundary=x"},
    )
    assert answer.status_code == answer.json()["error"]["code"] == 400
    assert cloud.names("out") == []


def test_who_pays_and_who_may(cloud):
    cloud.put("in", "a", b"1")
    cloud.requester_pays.add("in")
    cloud.deny.add(("POST", "out"))
    client = client_of(cloud)
    with pytest.raises(exceptions.BadRequest, match="requester pays bucket but no user project"):
        client.bucket("in").blob("a").download_as_bytes()
    assert client.bucket("in", user_project="me").blob("a").download_as_bytes() == b"1"
    with pytest.raises(exceptions.Forbidden, match=r"storage\.objects\.create"):
        client.bucket("out").blob("a").upload_from_string(b"1")
    assert list(client.list_blobs("out")) == []


# ---------------------------------------------------------------- listings


def test_a_long_listing_comes_in_pages(running):
    names = [f"clips/{number // 1000}/{number:05d}.parquet" for number in range(3500)]
    running.put_many("pages", names, b"xy")
    running.requests.clear()
    found = list(client_of(running).list_blobs("pages", prefix="clips/"))
    assert [blob.name for blob in found] == names
    assert sum(request.kind == "list" for request in running.requests) == 4
    found = client_of(running).list_blobs("pages", fields="items(name,size),nextPageToken")
    assert [(blob.name, blob.size, blob.generation) for blob in found] == [
        (name, 2, None) for name in names
    ]
    found = client_of(running).list_blobs("pages", prefix="clips/", delimiter="/", page_size=3)
    assert list(found) == []
    assert found.prefixes == {f"clips/{number}/" for number in range(4)}
    found = client_of(running).list_blobs("pages", start_offset="clips/3/03498")
    assert [blob.name for blob in found] == names[3498:]


@pytest.mark.parametrize("seed", range(20))
def test_pages_join_to_the_plain_listing(seed):
    chance = random.Random(seed)
    names = sorted({"".join(chance.choices("ab/", k=chance.randint(1, 7))) for _ in range(150)})
    query = {
        "prefix": "".join(chance.choices("ab/", k=chance.randint(0, 2))),
        "delimiter": chance.choice(["", "/"]),
        "startOffset": "".join(chance.choices("ab/", k=chance.randint(0, 3))),
        "endOffset": chance.choice(["", "b/b"]),
        "maxResults": str(chance.randint(1, 9)),
    }
    prefix, delimiter = query["prefix"], query["delimiter"]
    items, prefixes = [], []
    for name in names:
        if not name.startswith(prefix) or name < query["startOffset"]:
            continue
        if query["endOffset"] and name >= query["endOffset"]:
            continue
        rest = name[len(prefix) :]
        if delimiter and delimiter in rest:
            prefixes.append(prefix + rest.split(delimiter)[0] + delimiter)
        else:
            items.append(name)
    found_items, found_prefixes = [], []
    while True:
        page = page_of(names, query)
        found_items += page["items"]
        found_prefixes += page.get("prefixes", [])
        assert len(page["items"]) + len(page.get("prefixes", [])) <= int(query["maxResults"])
        if "nextPageToken" not in page:
            break
        query["pageToken"] = page["nextPageToken"]
    assert found_items == items
    assert found_prefixes == sorted(set(prefixes))


def test_fields_pick_a_part_of_the_answer():
    page = {"kind": "k", "nextPageToken": "t", "items": [{"name": "a", "size": "1", "etag": "e"}]}
    assert pick(page, "items(name,size)") == {"items": [{"name": "a", "size": "1"}]}
    assert pick(page, "items/name,nextPageToken") == {
        "items": [{"name": "a"}],
        "nextPageToken": "t",
    }
    assert pick(page, "*") == page


# ---------------------------------------------------------------- faults


def test_each_fault_is_seen_by_the_client(cloud):
    data = random.Random(4).randbytes(100_000)
    cloud.put("in", "a", data)

    def meet(kind, timeout_s=TIMEOUT_S):
        cloud.faults = Faults(rate=1.0, kinds=(kind,), stall_s=TIMEOUT_S)
        port = urlsplit(cloud.url).port
        link = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
        try:
            link.request("GET", media("in", "a"), headers={"Range": "bytes=0-9999"})
            answer = link.getresponse()
            return answer.status, answer.headers, answer.read()
        finally:
            link.close()
            assert cloud.faults.counts == {kind: 1}
            assert cloud.requests[-1].fault == kind

    for kind, reason in (("503", "backendError"), ("429", "rateLimitExceeded")):
        status, _, body = meet(kind)
        error = json.loads(body)["error"]
        assert str(status) == str(error["code"]) == kind
        assert error["errors"][0]["reason"] == reason
    status, headers, body = meet("short")
    assert (status, headers["Content-Length"]) == (206, str(len(body)))
    assert len(body) < 10_000
    assert data.startswith(body)
    with pytest.raises(http.client.IncompleteRead) as cut:
        meet("truncate")
    assert data.startswith(cut.value.partial)
    assert len(cut.value.partial) + cut.value.expected == 10_000
    with pytest.raises(TimeoutError):
        meet("stall", timeout_s=0.3)
    with pytest.raises(ConnectionResetError):
        meet("reset")
    cloud.faults = None
    assert requests.get(cloud.url + media("in", "a")).content == data


def test_after_a_reset_the_client_cannot_know_whether_it_wrote(cloud):
    cloud.faults = Faults(rate=1.0, kinds=("reset",))
    url = f"{cloud.url}/upload/storage/v1/b/out/o?uploadType=media&name="
    for number in range(24):
        with pytest.raises(requests.RequestException, match=r"reset|aborted"):
            requests.post(f"{url}{number:02d}", data=b"x" * 1000)
    assert cloud.faults.counts == {"reset": 24}
    assert 0 < len(cloud.names("out")) < 24


def test_faults_are_the_asked_share_and_repeatable(cloud):
    cloud.put("in", "a", b"0123456789")

    def run():
        cloud.faults = Faults(rate=0.2, kinds=("503", "429", "short"), seed=7)
        with requests.Session() as session:
            answers = [session.get(cloud.url + media("in", "a")) for _ in range(200)]
        seen = [(answer.status_code, len(answer.content)) for answer in answers]
        assert sum(cloud.faults.counts.values()) == sum(one != (200, 10) for one in seen)
        waits = sum("Retry-After" in answer.headers for answer in answers)
        assert 0 < waits < cloud.faults.counts["503"] + cloud.faults.counts["429"]
        return seen, cloud.faults.counts

    first = run()
    assert first == run()
    assert 20 <= sum(first[1].values()) <= 60


def test_it_is_gone_after_the_with():
    before = set(threading.enumerate())
    with CloudStorage("in", faults=Faults(rate=1.0, kinds=("stall",), stall_s=TIMEOUT_S)) as cloud:
        cloud.put("in", "a", b"0123456789")
        port = urlsplit(cloud.url).port
        stalled = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
        stalled.request("GET", media("in", "a"))
        answer = stalled.getresponse()
    with pytest.raises(http.client.IncompleteRead):
        answer.read()
    with pytest.raises(ConnectionRefusedError):
        http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S).connect()
    assert set(threading.enumerate()) <= before


# ---------------------------------------------------------------- the others


def test_s3_keeps_the_first_of_two_writes(monkeypatch):
    boto3 = pytest.importorskip("boto3")
    pytest.importorskip("moto")
    from botocore.exceptions import ClientError

    with S3Server("audio") as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        server.put("audio", "a/b c", b"direct")
        client = boto3.session.Session().client("s3")
        assert client.get_object(Bucket="audio", Key="a/b c")["Body"].read() == b"direct"
        client.put_object(Bucket="audio", Key="one", Body=b"first", IfNoneMatch="*")
        with pytest.raises(ClientError, match="PreconditionFailed"):
            client.put_object(Bucket="audio", Key="one", Body=b"second", IfNoneMatch="*")
        assert server.get("audio", "one") == b"first"


BEAM_JOB = """
import apache_beam as beam, json, sys
from apache_beam.options.pipeline_options import PipelineOptions
pipeline = beam.Pipeline(options=PipelineOptions(sys.argv[1:]))
pipeline | beam.Create([1]) | beam.Map(str)
result = pipeline.run()
print(json.dumps([result.job_id(), result.wait_until_finish(), [
    [metric.key.metric.name, metric.committed]
    for metric in result.metrics().query()["counters"]]]))
"""


def test_beam_submits_a_job_and_waits_for_it(cloud):
    pytest.importorskip("apache_beam.runners.dataflow.dataflow_runner")
    name = {"origin": "user", "name": "clips", "context": {"namespace": "n", "step": "s1"}}
    metrics = [
        {"name": name, "scalar": 5},
        {"name": {**name, "context": {**name["context"], "tentative": "true"}}, "scalar": 6},
    ]
    message = {
        "id": "m1",
        "time": "2026-01-01T00:00:00Z",
        "messageText": "Worker pool started.",
        "messageImportance": "JOB_MESSAGE_BASIC",
    }
    # In any other state Beam sleeps for 5 s before it asks again, and for the messages.
    states = ["JOB_STATE_DONE", "JOB_STATE_RUNNING", "JOB_STATE_DRAINED"]
    with DataflowService(states, metrics=metrics, messages=[message]) as service:
        command = [sys.executable, "-c", BEAM_JOB, "--runner=DataflowRunner", "--project=p"]
        command += ["--region=us-central1", "--job_name=a-job", "--no_auth"]
        command += ["--temp_location=gs://out/tmp", "--staging_location=gs://out/staging"]
        command += [f"--dataflow_endpoint={service.url}", "--dataflow_service_options=a=b"]
        env = {**os.environ, **cloud.env, **service.env}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=TIMEOUT_S)
        assert done.returncode == 0, done.stderr
        job_id, state, counters = json.loads(done.stdout.splitlines()[-1])
        assert state == "DONE"
        assert counters == [["clips", 5]]
        (job,) = service.jobs
        assert (job["name"], job["environment"]["serviceOptions"]) == ("a-job", ["a=b"])
        asked = Counter(request.kind for request in service.requests)
        assert asked["submit"] == 1
        assert min(asked["get"], asked["metrics"]) >= 1
        assert any(name.endswith("pipeline.pb") for name in cloud.names("out"))

        url = f"{service.url}/v1b3/projects/p/locations/us-central1/jobs"
        answer = requests.get(f"{url}/{job_id}/messages").json()
        assert answer == {"jobMessages": [message]}
        seen = [requests.get(f"{url}/{job_id}").json()["currentState"] for _ in range(4)]
        assert seen[-2:] == ["JOB_STATE_DRAINED"] * 2
        requests.put(f"{url}/{job_id}", json={"requestedState": "JOB_STATE_CANCELLED"})
        assert service.cancelled == [job_id]
        assert requests.get(f"{url}/{job_id}").json()["currentState"] == "JOB_STATE_CANCELLED"
        service.refuse = 403, {"error": {"code": 403, "message": "no", "status": "x"}}
        assert requests.post(url, json={}).json() == service.refuse[1]
        assert len(service.jobs) == 1


@pytest.mark.parametrize("kind", ["vnd.oci.image", "vnd.docker.distribution"])
def test_an_image_has_its_labels(kind):
    name, labels = "project/repo/earmark", {"org.example.beam": "2.77.0"}
    with ImageRegistry({f"{name}:1": labels, f"{name}:2": {}}, indexed=[f"{name}:2"]) as registry:
        url = f"http://{registry.host}/v2/{name}"
        accept = {"Accept": f"application/{kind}.manifest.v1+json"}

        def manifest(reference):
            answer = requests.get(f"{url}/manifests/{reference}", headers=accept)
            assert kind in answer.headers["Content-Type"]
            return answer.json()

        config = manifest("1")["config"]
        assert requests.get(f"{url}/blobs/{config['digest']}").json()["config"]["Labels"] == labels
        listed = manifest("2")["manifests"]
        assert {entry["platform"]["architecture"] for entry in listed} == {
            "unknown",
            "arm64",
            "amd64",
        }
        for entry in listed:
            assert manifest(entry["digest"])["mediaType"] == entry["mediaType"]
        missing = requests.get(f"{url}/manifests/3")
        assert (missing.status_code, missing.json()["errors"][0]["code"]) == (
            404,
            "MANIFEST_UNKNOWN",
        )


def test_a_registry_may_ask_for_a_token():
    with ImageRegistry({"p/r/i:1": {}}, token="secret") as registry:
        url = f"http://{registry.host}/v2/p/r/i/manifests/1"
        refused = requests.get(url)
        assert refused.status_code == 401
        assert f'realm="http://{registry.host}/token"' in refused.headers["WWW-Authenticate"]
        token_url = f"http://{registry.host}/token?service=x"
        assert requests.get(token_url).status_code == 401
        given = requests.get(token_url, auth=("oauth2accesstoken", "secret")).json()["token"]
        assert requests.get(url, headers={"Authorization": f"Bearer {given}"}).status_code == 200
        registry.public = True
        assert requests.get(token_url).json()["token"] == given
