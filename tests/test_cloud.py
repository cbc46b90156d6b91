"""The whole job from Cloud Storage to Cloud Storage, against stand-ins on loopback."""

import io
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from bench.stand_ins import CloudStorage, Faults, S3Server
from pipeline.cli import cli
from transforms.read import read_clips
from transforms.shards import plan_shards

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def cloud():
    with CloudStorage("in", "out") as running:
        yield running


@pytest.fixture(autouse=True)
def undisturbed(request):
    """Each test begins with no faults and an empty log."""
    if "cloud" in request.fixturenames:
        running = request.getfixturevalue("cloud")
        running.faults = None
        running.requests.clear()
        running.requester_pays.clear()
        running.deny.clear()


@pytest.fixture(scope="module")
def tars(tmp_path_factory, make_tar, encoded, noise):
    """Four tars of five clips, one of the clips broken."""
    folder = tmp_path_factory.mktemp("tars")
    for shard in range(4):
        members = [
            (f"clip-{shard}-{clip}.wav", encoded(noise(6_000 + 500 * clip, seed=10 * shard + clip)))
            for clip in range(5)
        ]
        if shard == 2:
            members[3] = ("broken.flac", b"fLaC and nothing more")
        make_tar(folder / f"s-{shard:05d}.tar", members)
    return folder


@pytest.fixture
def earmark_alone(tiny_checkpoint):
    """The same in a process of its own."""

    def run(env, *arguments, code=0):
        command = [sys.executable, "-m", "pipeline", *map(str, arguments)]
        command += ["--checkpoint", str(tiny_checkpoint)]
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | env, capture_output=True, text=True, timeout=240
        )
        said = done.stdout + done.stderr
        assert done.returncode == code, said
        assert "Traceback" not in said
        return said

    return run


@pytest.fixture(scope="module")
def expected(tars, tmp_path_factory, tiny_checkpoint):
    """The rows of the same clips, read from and written to the local disk."""
    output = tmp_path_factory.mktemp("local") / "out"
    arguments = ["annotate", tars, "--output", output, "--checkpoint", tiny_checkpoint]
    assert CliRunner().invoke(cli, list(map(str, arguments))).exit_code == 0
    rows = comparable(pq.read_table(file) for file in sorted((output / "clips").iterdir()))
    for row in rows:  # processes of other numbers of threads round otherwise
        if None not in row["scores"]:
            row["scores"] = pytest.approx(row["scores"], rel=0, abs=1e-6)
    return rows


def comparable(tables):
    """Rows by member; `clip_id` and `shard` name the place, which differs."""
    table = pa.concat_tables(tables).drop_columns(["clip_id", "shard"])
    rows = table.sort_by("member").to_pylist()
    for row in rows:
        row["tags"] = [tag["name"] for tag in row["tags"]] if row["tags"] is not None else None
    return rows


def rows_in(cloud, bucket, prefix):
    names = [name for name in cloud.names(bucket, f"{prefix}/clips/") if name.endswith(".parquet")]
    return comparable(pq.read_table(io.BytesIO(cloud.get(bucket, name))) for name in names)


def upload(cloud, tars, prefix):
    for file in sorted(tars.iterdir()):
        cloud.put("in", f"{prefix}/{file.name}", file.read_bytes())


def test_from_cloud_storage_to_cloud_storage(cloud, earmark_alone, tars, expected):
    upload(cloud, tars, "plain")
    said = earmark_alone(cloud.env, "annotate", "gs://in/plain/*.tar", "--output", "gs://out/plain")
    assert "The output holds 20 clips, 19 scored and 1 failed." in said
    assert rows_in(cloud, "out", "plain") == expected
    beside = {name.partition("/")[2] for name in cloud.names("out", "plain/")}
    assert {"run.json", "labels.parquet", "summary.json"} <= beside
    summary = json.loads(cloud.get("out", "plain/summary.json"))
    assert (summary["clips"], summary["failed"], summary["metrics"]["shards"]) == (20, 1, 4)

    # What a shard costs: its bytes, one look at the claim, one write; its footer at the end.
    kinds = Counter(request.kind for request in cloud.requests)
    assert kinds["write"] == 4 + 3 and kinds["write-start"] == 0  # and the three beside them
    reads = Counter(
        unquote(r.path).rpartition("/o/")[2] for r in cloud.requests if r.kind == "read"
    )
    inputs = {name: count for name, count in reads.items() if name.endswith(".tar")}
    assert inputs == {f"plain/s-{n:05d}.tar": 1 for n in range(4)}
    assert reads["plain/run.json"] == 4 + 4  # before the job, twice when it is made, to sum up
    assert kinds["metadata"] <= 4 + 2  # is the shard's file there already? And of the glob's name

    # The same command again reads nothing of the input.
    cloud.requests.clear()
    again = earmark_alone(
        cloud.env, "annotate", "gs://in/plain/*.tar", "--output", "gs://out/plain"
    )
    assert "Nothing left to do" in again
    assert not [
        r
        for r in cloud.requests
        if r.path.startswith("/in/") or ("/b/in/o/" in r.path and r.kind == "read")
    ]


def test_a_run_goes_on_where_another_stopped(cloud, earmark, tars, expected):
    upload(cloud, tars, "resumed")
    arguments = ("annotate", "gs://in/resumed", "--output", "gs://out/resumed")
    earmark(cloud.env, *arguments)
    files = [n for n in cloud.names("out", "resumed/clips/")]
    kept = {name: cloud.get("out", name) for name in files[:2]}
    for name in files[2:]:
        cloud.delete("out", name)
    said = earmark(cloud.env, *arguments)
    assert "2 of them finished earlier" in said
    assert rows_in(cloud, "out", "resumed") == expected
    assert {name: cloud.get("out", name) for name in kept} == kept
    refused = earmark(cloud.env, *arguments, "--threshold", "0.7", code=2)
    assert "thresholds was 0.2, is 0.7" in refused


def test_two_worker_processes(cloud, earmark, tars, expected):
    upload(cloud, tars, "two")
    earmark(
        cloud.env, "annotate", "gs://in/two/", "--output", "gs://out/two", "--runner", "DirectRunner",
        "--direct_num_workers", 2, "--direct_running_mode", "multi_processing",
    )  # fmt: skip
    assert rows_in(cloud, "out", "two") == expected


def test_loose_files_parquet_checkpoint_thresholds_and_lists(
    cloud, earmark, tmp_path, encoded, noise, tiny_checkpoint
):
    clips = {f"{n}.wav": encoded(noise(7_000, seed=n)) for n in range(5)}
    for name, content in clips.items():
        cloud.put("in", f"loose/deep/{name}", content)
    cells = [{"bytes": content, "path": f"p-{name}"} for name, content in clips.items()]
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({"audio": pa.array(cells, struct)}), tmp_path / "a.parquet")
    cloud.put("in", "table/a.parquet", (tmp_path / "a.parquet").read_bytes())
    for file in tiny_checkpoint.iterdir():
        cloud.put("in", f"students/tiny/{file.name}", file.read_bytes())
    cloud.put("in", "thresholds.json", json.dumps({"Dog": 0.0, "Speech": 1.0}).encode())
    cloud.put("in", "list.txt", b"# what to tag\ngs://in/loose\n\ngs://in/table/a.parquet\n")
    earmark(
        cloud.env | {"XDG_CACHE_HOME": str(tmp_path / "cache")},
        "annotate", "--inputs-from", "gs://in/list.txt", "--output", "gs://out/lists",
        "--checkpoint", "gs://in/students/tiny", "--thresholds", "gs://in/thresholds.json",
        "--files-per-shard", 2,
    )  # fmt: skip
    rows = rows_in(cloud, "out", "lists")
    assert [row["member"] for row in rows] == [
        *(f"deep/{n}.wav" for n in range(5)),
        *(f"p-{n}.wav" for n in range(5)),
    ]
    assert all("Dog" in row["tags"] and "Speech" not in row["tags"] for row in rows)
    # Two files a batch, and five rows: some processors round the last digit otherwise; four are read.
    first, second = ([row["scores"] for row in rows[half]] for half in (slice(5), slice(5, None)))
    np.testing.assert_allclose(first, second, rtol=0, atol=1.1e-4)
    assert len([n for n in cloud.names("out", "lists/clips/")]) == 3 + 1
    run = json.loads(cloud.get("out", "lists/run.json"))
    assert run["checkpoint"]["name"] == "gs://in/students/tiny"
    assert run["checkpoint"]["thresholds"] == "file"


def test_overwrite_empties_a_prefix_and_spares_what_is_not_earmarks(cloud, earmark, tars):
    upload(cloud, tars, "over")
    arguments = ("annotate", "gs://in/over/s-00000.tar", "--output", "gs://out/over")
    earmark(cloud.env, *arguments)
    cloud.put("out", "over/notes.txt", b"mine")
    earmark(cloud.env, *arguments, "--overwrite", "--threshold", "0.9")
    assert json.loads(cloud.get("out", "over/run.json"))["scoring"]["thresholds"] == 0.9
    assert cloud.get("out", "over/notes.txt") == b"mine"


def test_a_bucket_whose_requester_pays(cloud, earmark, tars):
    upload(cloud, tars, "pays")
    cloud.requester_pays.add("in")
    arguments = ("annotate", "gs://in/pays/s-00000.tar", "--output", "gs://out/pays")
    assert "--billing-project" in earmark(cloud.env, *arguments, code=2)
    earmark(cloud.env, *arguments, "--billing-project", "payer")
    asked = [r for r in cloud.requests if "/in/" in r.path and r.status == 200]
    assert asked and all(r.query.get("userProject") == "payer" for r in asked)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gs://in/nowhere/*.tar", "-o", "gs://out/bad"], "'gs://in/nowhere/*.tar' matches no tar"),
        (["gs://in/nowhere", "-o", "gs://out/bad"], "'gs://in/nowhere' does not exist"),
        (["gs://nobucket/a.tar", "-o", "gs://out/bad"], "gs://nobucket"),
        (["gs://in/bad/a.tar", "-o", "gs://nobucket/bad"], "--output 'gs://nobucket/bad'"),
        (["gs://in/bad/a.tar", "-o", "gs://out/x", "--checkpoint", "gs://in/nothing"], "holds none of .json"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_told_in_a_sentence(cloud, earmark, tars, arguments, message):
    cloud.put("in", "bad/a.tar", (tars / "s-00000.tar").read_bytes())
    assert message in earmark(cloud.env, "annotate", *arguments, code=2)
    assert cloud.names("out", "bad/") == []


def test_an_output_that_may_not_be_written_is_refused(cloud, earmark, tars):
    upload(cloud, tars, "denied")
    cloud.deny.add(("POST", "out"))
    said = earmark(cloud.env, "annotate", "gs://in/denied", "-o", "gs://out/denied", code=2)
    assert "'gs://out/denied' cannot be written" in said


def test_faults_lose_and_double_nothing(cloud, earmark, tars, expected):
    upload(cloud, tars, "faults")
    cloud.faults = Faults(rate=0.1, seed=7, stall_s=2.0)
    earmark(cloud.env, "annotate", "gs://in/faults/*.tar", "--output", "gs://out/faults")
    injected = cloud.faults.counts
    cloud.faults = None
    assert sum(injected.values()) > 0
    assert rows_in(cloud, "out", "faults") == expected


def test_the_same_job_on_s3(earmark_alone, tars, expected):
    with S3Server("inputs", "outputs") as s3:
        for file in tars.iterdir():
            s3.put("inputs", f"shards/{file.name}", file.read_bytes())
        arguments = ("annotate", "s3://inputs/shards/*.tar", "--output", "s3://outputs/tags")
        earmark_alone(s3.env, *arguments)
        assert "Nothing left to do" in earmark_alone(s3.env, *arguments)
        code = (
            "import s3fs, pyarrow as pa, pyarrow.parquet as pq, pickle, sys\n"
            "fs = s3fs.S3FileSystem()\n"
            "files = sorted(fs.ls('outputs/tags/clips'))\n"
            "tables = [pq.read_table(fs.open(file)) for file in files]\n"
            "sys.stdout.buffer.write(pickle.dumps((tables, sorted(fs.ls('outputs/tags')))))\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | s3.env, capture_output=True, check=True
        )
    import pickle

    tables, beside = pickle.loads(done.stdout)
    assert comparable(tables) == expected
    assert beside == [
        f"outputs/tags/{name}" for name in ("clips", "labels.parquet", "run.json", "summary.json")
    ]


# ---------------------------------------------- inputs that change under a run


@pytest.fixture
def found(cloud, lead_to):
    """Finds the shards of a URL, as a run does before it begins."""
    lead_to(cloud.env)
    return lambda url: plan_shards([url]).shards


def test_a_loose_file_that_is_replaced_is_not_cut_to_its_old_length(cloud, found, encoded, noise):
    for codec in ("wav", "ogg", "mp3", "flac"):
        cloud.put("in", f"replaced-{codec}/a.{codec}", encoded(noise(32_000), format=codec))
        (shard,) = found(f"gs://in/replaced-{codec}")
        longer = encoded(noise(96_000, seed=1), format=codec)
        cloud.put("in", f"replaced-{codec}/a.{codec}", longer)
        with pytest.raises(OSError, match="was replaced since"):
            list(read_clips(shard))
        cloud.put("in", f"replaced-{codec}/a.{codec}", b"short")
        with pytest.raises(OSError, match="replaced since"):
            list(read_clips(shard))


def test_a_tar_that_was_damaged_on_its_way_is_no_broken_tar(cloud, found, make_tar, tmp_path):
    members = [(f"{number}.wav", bytes([number]) * 400_000) for number in range(12)]
    content = make_tar(tmp_path / "big.tar", members).read_bytes()
    cloud.put("in", "damaged/big.tar", content)
    (shard,) = found("gs://in/damaged/big.tar")
    at = content.index(b"3.wav")
    damaged = content[:at] + b"?????" + content[at + 5 :]
    cloud.put("in", "damaged/big.tar", damaged)  # of the same length, with a broken header
    read = []
    with pytest.raises(OSError, match="was replaced since, or damaged"):
        read.extend(clip.member for clip in read_clips(shard))


def test_an_object_of_s3_that_is_replaced_while_it_is_read_is_refused(make_tar, tmp_path):
    first = make_tar(tmp_path / "1.tar", [(f"{n}.wav", b"1" * 400_000) for n in range(12)])
    second = make_tar(tmp_path / "2.tar", [(f"{n}.wav", b"2" * 400_000) for n in range(12)])
    with S3Server("inputs") as s3:
        s3.put("inputs", "a.tar", first.read_bytes())
        code = (
            "import sys, s3fs\n"
            "from transforms.read import read_clips\n"
            "from transforms.shards import plan_shards\n"
            "(shard,) = plan_shards(['s3://inputs/a.tar']).shards\n"
            "for number, clip in enumerate(read_clips(shard)):\n"
            "    if number == 1:\n"
            "        s3fs.S3FileSystem().pipe_file('inputs/a.tar', open(sys.argv[1], 'rb').read())\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(second)],
            cwd=ROOT, env=os.environ | s3.env, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
    assert done.returncode == 1
    assert "the file was replaced since" in done.stderr.splitlines()[-1]


def test_s3_without_credentials_is_a_sentence(earmark_alone, tmp_path):
    with S3Server("inputs") as s3:
        nothing = {"AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": "/dev/null", "AWS_SHARED_CREDENTIALS_FILE": "/dev/null"}  # fmt: skip
        env = {"AWS_ENDPOINT_URL": s3.url} | nothing
        said = earmark_alone(env, "annotate", "s3://inputs/a.tar", "-o", tmp_path / "out", code=2)
    assert "needs AWS credentials and there are none" in said
