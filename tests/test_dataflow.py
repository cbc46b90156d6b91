"""Launching on Dataflow: what a job looks like, what is refused, what the user sees."""

import json
import re
from pathlib import Path

import pytest
from apache_beam.options.pipeline_options import PipelineOptions

from bench.stand_ins import CloudStorage, DataflowService, ImageRegistry
from pipeline import dataflow
from pipeline.options import UsageError
from pipeline.run import Todo, annotate
from transforms.annotate import Annotation
from transforms.records import Shard
from transforms.shards import pack_shards
from transforms.write import RowOptions

JOBS = (
    Path(__file__).parent / "dataflow_jobs"
)  # as they were captured; `python tests/test_dataflow.py`
PLACE = ["--runner=DataflowRunner", "--project=fake-project", "--region=us-central1"]
ACCELERATOR = "worker_accelerator=type:nvidia-l4;count:1;install-nvidia-driver:5xx"


def options_of(*given):
    return PipelineOptions([*PLACE, *given])


def job_of(gpu, *given):
    """The job's JSON, made without a socket."""
    import apache_beam as beam

    options = options_of("--no_auth", *given)
    workers = dataflow.choose_workers(gpu, "auto", options)
    decided = dataflow.settings(workers, "gs://out/tags", "earmark-test", options)
    dataflow.refuse_contradictions(gpu, options)
    options = options_of("--no_auth", *given, *dataflow.flags(decided))
    shard = Shard("a-0123456789ab", "gs://in/a.tar", "tar", 1_000)
    todo = Todo(list(pack_shards([shard])), 1, 1_000)
    rows = RowOptions(thresholds=(0.2,) * 527)
    annotation = Annotation(
        "bookbot/distil-ast-audioset", "w", "c", workers.device, workers.dtype, "max", rows,
        "gs://out/tags", "{}",
    )  # fmt: skip
    options.view_as(dataflow.TestOptions).dry_run = True
    root = beam.Pipeline(options=options)
    annotate(root, todo, annotation)
    return dataflow.job_description(root, options)


def comparable(job):
    """A job without times, and without what only repeats the options or the graph."""
    job = json.loads(re.sub(r"\.\d{10}\.\d{6}", ".TIME", json.dumps(job)))
    environment = job["environment"]
    environment.pop("sdkPipelineOptions")
    job.pop("clientRequestId", None)
    for pool in environment["workerPools"]:
        for image in pool["sdkHarnessContainerImages"]:
            image.pop("capabilities")
    return job


CAPTURED = {"l4": "nvidia-l4", "a100": "nvidia-tesla-a100", "cpu": "none"}


@pytest.mark.parametrize("name", CAPTURED)
def test_the_job_is_as_captured(name):
    captured = json.loads((JOBS / f"{name}.json").read_text())
    assert comparable(job_of(CAPTURED[name])) == captured


def test_what_an_l4_job_says():
    environment = job_of("nvidia-l4")["environment"]
    (pool,) = environment["workerPools"]
    image = f"us-central1-docker.pkg.dev/fake-project/earmark/earmark:{dataflow.IMAGE_TAG}"
    assert pool["machineType"] == "g2-standard-8"
    assert pool["diskSizeGb"] == 100
    assert pool["numThreadsPerWorker"] == 8
    assert [i["containerImage"] for i in pool["sdkHarnessContainerImages"]] == [image]
    assert environment["serviceOptions"] == [ACCELERATOR]
    assert "no_use_multiple_sdk_containers" in environment["experiments"]
    assert "use_multiple_sdk_containers" not in environment["experiments"]


@pytest.mark.parametrize("gpu", [*dataflow.GPUS, "nvidia-l4:4", "none"])
def test_every_gpu_gives_a_job(gpu):
    kind, count = dataflow.parse_gpu(gpu)
    environment = job_of(gpu)["environment"]
    service = environment.get("serviceOptions", [])
    if kind == "none":
        assert service == []
    else:
        assert [
            s.startswith(f"worker_accelerator=type:{kind};count:{count};") for s in service
        ] == [True]
    (pool,) = environment["workerPools"]
    assert 1 <= pool["numThreadsPerWorker"] <= dataflow.MAX_THREADS


@pytest.mark.parametrize(
    ("given", "check"),
    [
        (["--machine_type=g2-standard-16"], lambda e, p: (p["machineType"], p["numThreadsPerWorker"]) == ("g2-standard-16", 16)),
        (["--number_of_worker_harness_threads=3"], lambda e, p: p["numThreadsPerWorker"] == 3),
        (["--disk_size_gb=200"], lambda e, p: p["diskSizeGb"] == 200),
        (["--sdk_container_image=gcr.io/p/mine:1"], lambda e, p: p["sdkHarnessContainerImages"][0]["containerImage"] == "gcr.io/p/mine:1"),
        (["--temp_location=gs://other/temp"], lambda e, p: e["tempStoragePrefix"].startswith("storage.googleapis.com/other/temp")),
        (["--experiments=use_multiple_sdk_containers"], lambda e, p: "no_use_multiple_sdk_containers" not in e["experiments"]),
        ([f"--dataflow_service_options={ACCELERATOR};use_nvidia_mps"], lambda e, p: e["serviceOptions"] == [f"{ACCELERATOR};use_nvidia_mps"] and "no_use_multiple_sdk_containers" not in e["experiments"]),
        (["--dataflow_service_options=enable_google_cloud_profiler"], lambda e, p: sorted(e["serviceOptions"]) == ["enable_google_cloud_profiler", ACCELERATOR]),
        (["--max_num_workers=7"], lambda e, p: p["autoscalingSettings"]["maxNumWorkers"] == 7),
    ],
    ids=lambda value: value[0].partition("=")[0] if isinstance(value, list) else "",
)  # fmt: skip
def test_an_option_given_by_hand_wins(given, check):
    environment = job_of("nvidia-l4", *given)["environment"]
    assert check(environment, environment["workerPools"][0])


def test_a_resource_hint_by_hand_is_on_the_whole_job_and_breaks_no_fusion():
    """Steps of different environments cannot be fused: there must be one."""
    import apache_beam as beam
    from apache_beam.runners.dataflow.dataflow_runner import DataflowRunner

    hint = "accelerator=type:nvidia-l4;count:1;machine_type:g2-standard-8;install-nvidia-driver"
    given = [
        "--no_auth",
        f"--resource_hints={hint}",
        "--machine_type=g2-standard-8",
        "--dry_run=True",
    ]
    options = options_of(*given)
    workers = dataflow.choose_workers(None, "auto", options)
    assert workers == dataflow.Workers("nvidia-l4", 1, "cuda", "bfloat16")
    decided = dataflow.settings(workers, "gs://out/tags", "earmark-test", options)
    options = options_of(*given, *dataflow.flags(decided))
    assert not options.get_all_options()["dataflow_service_options"]
    root = beam.Pipeline(options=options)
    annotation = Annotation("bundled", "w", "c", "cuda", "bfloat16", "max", RowOptions((0.2,)), "gs://out", "{}")  # fmt: skip
    annotate(root, Todo(list(pack_shards([Shard("a", "gs://in/a.tar", "tar", 1)]))), annotation)
    proto = DataflowRunner().run_pipeline(root, options).job.proto_pipeline
    used = {t.environment_id for t in proto.components.transforms.values() if t.environment_id}
    hinted = {
        name: dict(environment.resource_hints)
        for name, environment in proto.components.environments.items()
        if name in used
    }
    assert len(hinted) == 1
    assert list(hinted.values()) == [
        {"beam:resources:accelerator:v1": hint.partition("=")[2].encode()}
    ]


def test_the_work_on_a_shard_is_one_step():
    """Read, decode, score and write are one ParDo; what comes before carries descriptions only."""
    import apache_beam as beam

    root = beam.Pipeline()
    annotation = Annotation("bundled", "w", "c", "cpu", "float32", "max", RowOptions((0.2,)), "out", "{}")  # fmt: skip
    annotate(root, Todo([]), annotation)
    transforms = root.to_runner_api().components.transforms.values()
    (work,) = [
        t for t in transforms
        if t.unique_name.startswith("AnnotateShards/AnnotateShard") and t.spec.urn == "beam:transform:pardo:v1"
    ]  # fmt: skip
    consumers = [
        t.unique_name for t in transforms if set(t.inputs.values()) & set(work.outputs.values())
    ]
    assert consumers == []  # nothing but a shard's totals leaves it, and nobody shuffles those
    (source,) = work.inputs.values()
    (before,) = [t for t in transforms if source in t.outputs.values() and not t.subtransforms]
    assert "SpreadShards" in before.unique_name


@pytest.mark.parametrize(
    ("gpu", "given", "message"),
    [
        ("nvidia-l4", ["--resource_hints=accelerator=type:nvidia-l4;count:1"], "--resource_hints accelerator=... and --gpu"),
        (None, [f"--dataflow_service_options={ACCELERATOR}", "--resource_hints=accelerator=type:nvidia-l4;count:1"], "and worker_accelerator both ask"),
        (None, [f"--dataflow_service_options={ACCELERATOR};use_nvidia_mps", "--experiments=no_use_multiple_sdk_containers"], "use_nvidia_mps shares a GPU"),
        ("nvidia-l4", ["--dataflow_service_options=enable_prime"], "enable_prime"),
        ("nvidia-l4", ["--experiments=enable_prime"], "enable_prime"),
        ("nvidia-l4", ["--flexrs_goal=COST_OPTIMIZED"], "FlexRS has no GPUs"),
        ("nvidia-l4", ["--machine_type=n1-standard-8"], "the machine cannot hold it"),
        ("nvidia-l4:2", ["--machine_type=g2-standard-8"], "comes with 1 nvidia-l4"),
        ("nvidia-l4", ["--machine_type=g2-standard-48"], "comes with 4 nvidia-l4"),
        ("nvidia-tesla-a100", ["--machine_type=a2-ultragpu-1g"], "comes with 1 nvidia-a100-80gb"),
        ("none", ["--machine_type=g2-standard-8"], "--gpu none leaves it idle"),
        ("nvidia-l4", ["--machine_type=g2-standard-x"], "the machine cannot hold it"),
        (None, ["--dataflow_service_options=worker_accelerator=type:nvidia-l4;count:2;use_nvidia_mps"], "count is 2"),
        ("nvidia-l4", ["--sdk_container_image=gcr.io/p/earmark:0.1.0-py3.9-beam2.77.0"], "has python 3.9"),
        ("nvidia-l4", ["--sdk_container_image=gcr.io/p/earmark:0.1.0-py3.11-beam2.50.0"], "has beam 2.50.0"),
    ],
)  # fmt: skip
def test_contradictions_are_refused(gpu, given, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        dataflow.refuse_contradictions(gpu, options_of(*given))


@pytest.mark.parametrize(
    ("gpu", "given"),
    [
        ("none", ["--flexrs_goal=COST_OPTIMIZED"]),
        ("nvidia-l4", ["--machine_type=g2-standard-16"]),
        ("nvidia-tesla-t4", ["--machine_type=n1-custom-8-32768"]),
        ("none", ["--dataflow_service_options=enable_prime"]),
        (None, ["--resource_hints=accelerator=type:nvidia-l4;count:1"]),
        (None, [f"--dataflow_service_options={ACCELERATOR};use_nvidia_mps"]),
        ("nvidia-l4", ["--sdk_container_image=gcr.io/p/earmark:latest"]),
    ],
)
def test_what_does_go_together_is_not_refused(gpu, given):
    dataflow.refuse_contradictions(gpu, options_of(*given))


@pytest.mark.parametrize(
    ("gpu", "dtype", "given", "message"),
    [
        (None, "auto", [], "Dataflow needs --gpu"),
        ("nvidia-l5", "auto", [], "--gpu 'nvidia-l5' is unknown"),
        ("nvidia-l4:3", "auto", [], "a machine has 1, 2, 4, 8 of nvidia-l4, not 3"),
        ("nvidia-l4:x", "auto", [], "is not a number"),
        ("none:1", "auto", [], "is unknown"),
        ("nvidia-tesla-t4", "auto", [f"--dataflow_service_options={ACCELERATOR}"], "contradict each other"),
        ("nvidia-l4:2", "auto", [f"--dataflow_service_options={ACCELERATOR}"], "contradict each other"),
        (None, "auto", ["--dataflow_service_options=worker_accelerator=type:nvidia-b900;count:1"], "say what it computes in"),
    ],
)  # fmt: skip
def test_gpus_that_cannot_be_had(gpu, dtype, given, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        dataflow.choose_workers(gpu, dtype, options_of(*given))


def test_what_workers_compute_in():
    assert dataflow.choose_workers("nvidia-tesla-t4", "auto", options_of()).dtype == "float16"
    assert dataflow.choose_workers("nvidia-l4", "auto", options_of()).dtype == "bfloat16"
    assert dataflow.choose_workers("nvidia-l4", "float32", options_of()).dtype == "float32"
    assert dataflow.choose_workers("none", "auto", options_of()) == dataflow.Workers("none", 0, "cpu", "float32")  # fmt: skip


# ------------------------------------------------------------------ submission


@pytest.fixture(scope="module")
def cloud(make_tar, encoded, noise, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    with CloudStorage("in", "out") as running:
        for shard in range(2):
            members = [(f"{n}.wav", encoded(noise(8_000, seed=n))) for n in range(3)]
            tar = make_tar(folder / f"{shard}.tar", members)
            running.put("in", f"shards/{shard}.tar", tar.read_bytes())
        yield running


@pytest.fixture(scope="module")
def registry():
    good = {"earmark.python": dataflow.PYTHON_VERSION, "earmark.beam": dataflow.BEAM_VERSION, "earmark.version": dataflow.__version__}  # fmt: skip
    images = {
        "p/earmark/earmark:good": good,
        "p/earmark/earmark:index": good,
        "p/earmark/earmark:old": good | {"earmark.beam": "2.70.0"},
        "p/earmark/earmark:bare": {},
        "p/earmark/earmark:other": good | {"earmark.checkpoint": "owner/other"},
    }
    with ImageRegistry(images, indexed=["p/earmark/earmark:index"]) as running:
        yield running


@pytest.fixture
def launch(cloud, registry, earmark, monkeypatch):
    """Runs `earmark annotate ... --runner DataflowRunner` with what stands for the cloud."""
    monkeypatch.setattr(dataflow, "_POLL_S", 0.01)

    def run(output, *arguments, image="good", code=0):
        return earmark(
            cloud.env, "annotate", "gs://in/shards/*.tar", "--output", f"gs://out/{output}", *PLACE,
            "--checkpoint", "bundled", "--sdk_container_image",
            f"{registry.host}/p/earmark/earmark:{image}", *arguments, code=code,
        )  # fmt: skip

    return run


def test_a_dry_run_checks_everything_and_submits_nothing(cloud, launch, tmp_path):
    before = cloud.names("out")
    said = launch("dry", "--gpu", "nvidia-l4", "--dry-run", "--job-file", tmp_path / "job.json")
    assert "Input: 2 shards" in said and "on 1 nvidia-l4 a worker in bfloat16" in said
    assert "The output gs://out/dry can be written." in said
    assert "One clip tagged here, 0.wav:" in said
    assert "To do: 2 shards" in said
    assert f"--dataflow_service_options={ACCELERATOR}" in said
    assert "Nothing was run, and nothing submitted." in said
    assert cloud.names("out") == before
    job = json.loads((tmp_path / "job.json").read_text())
    assert re.fullmatch(r"earmark-out-dry-[0-9a-f]{6}-\d{8}-\d{6}", job["name"])
    assert job["environment"]["workerPools"][0]["machineType"] == "g2-standard-8"


def test_a_dry_run_finds_that_the_output_cannot_be_written(cloud, launch):
    cloud.deny.add(("POST", "out"))
    try:
        said = launch("denied", "--gpu", "nvidia-l4", "--dry-run", code=2)
    finally:
        cloud.deny.clear()
    assert "--output 'gs://out/denied' cannot be written: access to gs://out/denied" in said


def test_a_job_is_submitted_and_waited_for(cloud, launch):
    clips = {
        "name": {"origin": "user", "name": "clips", "context": {"namespace": "earmark", "step": "AnnotateShards/AnnotateShard", "original_name": "s2-clips"}},
        "scalar": 6, "updateTime": "2026-01-01T00:00:00Z",
    }  # fmt: skip
    tentative = json.loads(json.dumps(clips))
    tentative["name"]["context"]["tentative"] = "true"
    states = ["JOB_STATE_PENDING", "JOB_STATE_RUNNING", "JOB_STATE_DONE"]
    with DataflowService(states=states, metrics=[clips, tentative]) as service:
        place = ("--dataflow_endpoint", service.url, "--no_auth")
        # Nobody works here: the job is done, and its files are not there.
        said = launch("submitted", "--gpu", "nvidia-l4", *place, code=1)
        (job,) = service.jobs
    assert "gcloud dataflow jobs cancel" in said
    assert "https://console.cloud.google.com/dataflow/jobs/us-central1/" in said
    assert re.search(r"RUNNING after .*: 6 clips, 0/2 shards", said), said
    assert "the job ended, but 2 of 2 shards have no file" in said
    assert job["environment"]["serviceOptions"] == [ACCELERATOR]
    staged = [name for name in cloud.names("out", "submitted/.dataflow/") if "pipeline.pb" in name]
    assert len(staged) == 1


def test_a_second_job_on_the_same_output_is_refused(launch):
    with DataflowService(states=["JOB_STATE_RUNNING"] * 9) as service:
        place = ("--gpu", "none", "--detach", "--dataflow_endpoint", service.url, "--no_auth")
        launch("twice", *place)
        said = launch("twice", *place, code=2)
        assert "is at work on gs://out/twice already: wait for it" in said
        launch("twice-more", *place)  # another output
        assert len(service.jobs) == 2


class Unanswered:
    """The result of a job whose service answers `answers` times, and then no more."""

    def __init__(self, answers):
        self._answers = iter(answers)

    def job_id(self):
        return "2026-job"

    @property
    def state(self):
        answer = next(self._answers, None)
        if answer is None:
            raise ConnectionError("the network is gone")
        return answer


def test_a_service_that_goes_away_does_not_end_the_job(monkeypatch):
    monkeypatch.setattr(dataflow, "_POLL_S", 0)
    monkeypatch.setattr(dataflow, "counters", lambda result: {})
    with pytest.raises(dataflow.JobFailed) as failure:
        dataflow.wait(Unanswered(["RUNNING"]), options_of(), lambda state, counters: None)
    assert "Dataflow does not answer any more (the network is gone)" in str(failure.value)
    assert "may well go on: look at https://console.cloud.google.com" in str(failure.value)
    shown = []
    answers = ["RUNNING", None, None, "RUNNING", "DONE"]  # it comes back in time
    dataflow.wait(Unanswered(answers), options_of(), lambda state, counters: shown.append(state))
    assert shown == ["RUNNING", "DONE"]


def test_detach_returns_at_once(cloud, launch):
    with DataflowService(states=["JOB_STATE_RUNNING"]) as service:
        place = ("--dataflow_endpoint", service.url, "--no_auth")
        said = launch("detached", "--gpu", "none", "--detach", *place)
        assert len(service.jobs) == 1
    assert "Submitted. When the job is done, the same command sums it up." in said


def test_a_failed_job_says_what_a_worker_said(launch):
    trace = (
        "Traceback (most recent call last):\n  File \"x.py\", line 1, in setup\n"
        "student.model.DeviceError: device 'cuda' was asked for, but torch finds no GPU or driver"
    )  # fmt: skip
    messages = [
        {"id": "1", "time": "2026-01-01T00:00:00Z", "messageText": trace, "messageImportance": 4},
        {"id": "2", "time": "2026-01-01T00:00:01Z", "messageText": "The job failed because a work item has failed 4 times.", "messageImportance": 4},
    ]  # fmt: skip
    states = ["JOB_STATE_RUNNING", "JOB_STATE_FAILED"]
    with DataflowService(states=states, messages=messages) as service:
        place = ("--dataflow_endpoint", service.url, "--no_auth")
        said = launch("failed", "--gpu", "nvidia-l4", *place, code=1)
    assert "ended as FAILED: student.model.DeviceError: device 'cuda' was asked for" in said


def test_a_refused_job_is_one_sentence(launch):
    sentence = "(1a2b): Could not create workflow; user does not have write access to project: fake-project"
    body = {"error": {"code": 403, "message": sentence, "status": "PERMISSION_DENIED"}}
    with DataflowService(refuse=(403, body)) as service:
        place = ("--dataflow_endpoint", service.url, "--no_auth")
        said = launch("refused", "--gpu", "nvidia-l4", *place, code=1)
    assert f"Error: Dataflow refused the job (403): {sentence}\n" in said


def test_ctrl_c_while_waiting_says_how_to_cancel(launch, monkeypatch):
    def interrupted(seconds):
        raise KeyboardInterrupt

    with DataflowService(states=["JOB_STATE_RUNNING"] * 9) as service:
        place = ("--dataflow_endpoint", service.url, "--no_auth")
        monkeypatch.setattr(dataflow.time, "sleep", interrupted)
        said = launch("interrupted", "--gpu", "nvidia-l4", *place, code=130)
        assert service.cancelled == []
    assert "Stopped watching; the job goes on." in said
    assert re.search(r"cancel it with: gcloud dataflow jobs cancel \S+ --region us-central1 --project fake-project", said)  # fmt: skip


def test_a_template_is_written_and_no_job_started(launch, tmp_path):
    for folder in ("staging", "temp", "template"):
        (tmp_path / folder).mkdir()
    said = launch(
        "templated", "--gpu", "nvidia-l4", "--dataflow_endpoint", "http://localhost:1", "--no_auth",
        "--staging_location", tmp_path / "staging", "--temp_location", tmp_path / "temp",
        "--template_location", tmp_path / "template" / "job.json",
    )  # fmt: skip
    assert "Wrote the template" in said
    job = json.loads((tmp_path / "template" / "job.json").read_text())
    assert job["environment"]["serviceOptions"] == [ACCELERATOR]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("missing", "there is no image"),
        ("old", "has beam 2.70.0, and this launcher has"),
    ],
)
def test_an_image_that_would_not_work_is_refused_before_submission(launch, image, message):
    assert message in launch("image", "--gpu", "nvidia-l4", "--dry-run", image=image, code=2)


def test_an_image_for_several_machines_and_one_without_labels_are_taken(launch):
    for image in ("index", "bare"):
        launch("image", "--gpu", "nvidia-l4", "--dry-run", image=image)


def test_an_image_with_another_student_is_refused(cloud, earmark, registry):
    said = earmark(
        cloud.env, "annotate", "gs://in/shards/*.tar", "--output", "gs://out/student", *PLACE,
        "--gpu", "none", "--dry-run", "--checkpoint", "owner/mine",
        "--sdk_container_image", f"{registry.host}/p/earmark/earmark:other", code=2,
    )  # fmt: skip
    assert "carries the student 'owner/other', not 'owner/mine'" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gs://in/shards/*.tar", "-o", "gs://out/x", "--region", "us-central1-a"], "(the region of that zone is us-central1)"),
        (["gs://in/shards/*.tar", "-o", "gs://out/x", "--region", "us-centrall"], "--region 'us-centrall' is no region"),
        (["gs://in/shards/*.tar", "-o", "out"], "is no gs:// URL"),
        (["here.tar", "-o", "gs://out/x"], "'here.tar' is a path of this machine"),
        (["gs://in/shards/*.tar", "-o", "gs://out/x", "--device", "cuda"], "--gpu says what the workers have"),
        (["gs://in/shards/*.tar", "-o", "gs://out/x", "--processes-per-gpu", "2"], "a worker of Dataflow has one process"),
        (["gs://in/shards/*.tar", "-o", "gs://out/x", "--checkpoint", "{checkpoint}"], "is a folder of this machine"),
    ],
)  # fmt: skip
def test_what_workers_cannot_see_is_refused(cloud, earmark, tiny_checkpoint, arguments, message):
    arguments = [argument.format(checkpoint=tiny_checkpoint) for argument in arguments]
    if "--checkpoint" not in arguments:
        arguments += ["--checkpoint", "bundled"]
    said = earmark(cloud.env, "annotate", *PLACE, *arguments, "--gpu", "none", code=2)
    assert message in said


def test_overwrite_under_a_running_job_touches_nothing(cloud, launch):
    with DataflowService(states=["JOB_STATE_RUNNING"] * 9) as service:
        place = ("--gpu", "none", "--detach", "--dataflow_endpoint", service.url, "--no_auth")
        launch("busy", *place)
        before = cloud.names("out", "busy/")
        said = launch("busy", *place, "--overwrite", code=2)
        assert "is at work on gs://out/busy already" in said
        assert cloud.names("out", "busy/") == before


if __name__ == "__main__":
    JOBS.mkdir(exist_ok=True)
    for name, gpu in CAPTURED.items():
        text = json.dumps(comparable(job_of(gpu)), indent=2, sort_keys=True) + "\n"
        (JOBS / f"{name}.json").write_text(text)
