"""Launches on Google Cloud Dataflow: which machines, which options, and why.

`GPUS` and `settings` are the one place where the shape of a job is decided. An option
that the user gives wins over each of them; deploy/README.md has the reasoning at length.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import apache_beam as beam
from apache_beam.metrics import MetricsFilter
from apache_beam.options.pipeline_options import (
    DebugOptions,
    GoogleCloudOptions,
    PipelineOptions,
    StandardOptions,
    TestOptions,
    WorkerOptions,
)
from google.api_core.exceptions import GoogleAPICallError
from google.auth.exceptions import GoogleAuthError

from pipeline import __version__
from pipeline.options import UsageError
from transforms.meter import NAMESPACE

NO_GPU = "none"
BEAM_VERSION = beam.__version__
PYTHON_VERSION = ".".join(platform.python_version_tuple()[:2])

# What the image is called that deploy/ builds; its tag names what must agree with the launcher.
IMAGE_TAG = f"{__version__}-py{PYTHON_VERSION}-beam{BEAM_VERSION}"

NO_ANSWER = (GoogleAPICallError, GoogleAuthError, OSError)  # of a service, in whatever way

_POLL_S = 10.0
_LOOKS_FOR_ERROR = 5
_UNANSWERED = 3  # questions in a row, each tried for minutes by Beam, until a job is out of sight
_TERMINAL = ("DONE", "FAILED", "CANCELLED", "UPDATED", "DRAINED")


@dataclass(frozen=True)
class Gpu:
    """A GPU that Dataflow offers, and the machine that earmark puts it into."""

    machines: dict[int, tuple[str, int]]  # GPUs -> (machine type, its vCPUs)
    dtype: str  # the fastest that keeps scores within 0.01 of float32


# One vCPU decodes about 175 clips/s of 44.1 kHz Vorbis, or 1,400 of 16 kHz FLAC. The machine
# of each GPU is the smallest whose vCPUs can feed it the former at half its peak rate, or the
# one that the GPU comes with.
GPUS = {
    "nvidia-tesla-t4": Gpu(
        # Turing has no bfloat16 of its own.
        {1: ("n1-standard-8", 8), 2: ("n1-standard-16", 16), 4: ("n1-standard-32", 32)},
        dtype="float16",
    ),
    "nvidia-l4": Gpu(
        {1: ("g2-standard-8", 8), 2: ("g2-standard-24", 24), 4: ("g2-standard-48", 48), 8: ("g2-standard-96", 96)},
        dtype="bfloat16",
    ),
    "nvidia-tesla-a100": Gpu(
        {1: ("a2-highgpu-1g", 12), 2: ("a2-highgpu-2g", 24), 4: ("a2-highgpu-4g", 48), 8: ("a2-highgpu-8g", 96)},
        dtype="bfloat16",
    ),
    "nvidia-a100-80gb": Gpu(
        {1: ("a2-ultragpu-1g", 12), 2: ("a2-ultragpu-2g", 24), 4: ("a2-ultragpu-4g", 48), 8: ("a2-ultragpu-8g", 96)},
        dtype="bfloat16",
    ),
    "nvidia-h100-80gb": Gpu(
        {1: ("a3-highgpu-1g", 26), 2: ("a3-highgpu-2g", 52), 4: ("a3-highgpu-4g", 104), 8: ("a3-highgpu-8g", 208)},
        dtype="bfloat16",
    ),
}  # fmt: skip

# The newest branch: torch's CUDA needs it, and not every machine type's default has it.
DRIVER = "install-nvidia-driver:5xx"

CPU_MACHINE, CPU_VCPUS = "n2-standard-8", 8
CPU_THREADS = 2
MPS_THREADS = 2
MAX_THREADS = 32  # past it, threads of one Python process only wait for its lock


@dataclass(frozen=True)
class Setting:
    """One option of the job: what it is set to, and why."""

    option: str
    value: str
    why: str
    by_hand: bool = False


@dataclass(frozen=True)
class Workers:
    """What the workers of a job compute on."""

    gpu: str  # a key of `GPUS`, another type that the user named by hand, or `none`
    count: int
    device: str
    dtype: str
    processes: int = 1  # on one machine
    decode_processes: int = 0  # of each worker thread
    devices: int = 1  # of one machine, which its processes share out among themselves


class JobRefused(RuntimeError):
    """Dataflow did not take the job; the message is one sentence."""


class JobFailed(RuntimeError):
    """The job ended, and not well; the message says where to look."""


class StoppedWatching(KeyboardInterrupt):
    """Ctrl-C while waiting: the job goes on; the message says how to cancel it."""


def parse_gpu(stated: str) -> tuple[str, int]:
    """(type, count) of `nvidia-l4`, `nvidia-l4:2` or `none`.

    Raises:
        UsageError: it is none of these.
    """
    kind, _, number = stated.partition(":")
    if kind == NO_GPU and not number:
        return NO_GPU, 0
    if kind not in GPUS:
        known = ", ".join(GPUS)
        raise UsageError(
            f"--gpu {stated!r} is unknown: expected {known} (with :COUNT where a machine is to have "
            "several), or none. For another, give --machine_type and "
            "--dataflow_service_options=worker_accelerator=... by hand, and --dtype"
        )
    if number and not number.isdigit():
        raise UsageError(f"--gpu {stated!r}: the count after ':' is not a number")
    count = int(number or 1)
    machines = GPUS[kind].machines
    if count not in machines:
        counts = ", ".join(map(str, machines))
        raise UsageError(f"--gpu {stated!r}: a machine has {counts} of {kind}, not {count}")
    return kind, count


def choose_workers(gpu: str | None, dtype: str, options: PipelineOptions) -> Workers:
    """What the workers compute on, from `--gpu`, or from a GPU that was named by hand.

    Raises:
        UsageError: neither says, or they contradict each other.
    """
    by_hand = _accelerator_by_hand(options)
    if gpu is None and by_hand is None:
        raise UsageError(
            "Dataflow needs --gpu: the type of GPU for each worker, such as --gpu nvidia-l4, or "
            "--gpu none for workers without one"
        )
    if gpu is not None:
        kind, count = parse_gpu(gpu)
        if by_hand is not None and by_hand != (kind, count):
            raise UsageError(
                f"--gpu {gpu} and the accelerator {by_hand[0]}:{by_hand[1]} that was given by hand "
                "contradict each other: leave one out"
            )
    else:
        assert by_hand is not None
        kind, count = by_hand
    if kind == NO_GPU:
        return Workers(NO_GPU, 0, "cpu", "float32" if dtype == "auto" else dtype)
    if dtype == "auto":
        if kind not in GPUS:
            raise UsageError(
                f"accelerator {kind!r} is not in earmark's table, so say what it computes in: --dtype "
                "bfloat16 (Ampere and later) or float16"
            )
        dtype = GPUS[kind].dtype
    return Workers(kind, count, "cuda", dtype)


def settings(
    workers: Workers, output: str, job_name: str, options: PipelineOptions
) -> list[Setting]:
    """Every option of a job that earmark decides, those given by hand among them.

    Args:
        workers: of `choose_workers`.
        output: `gs://...`.
        job_name: used where none was given.
        options: what was given by hand.
    """
    cloud = options.view_as(GoogleCloudOptions)
    machine, vcpus = _machine(workers, options)
    image = (
        f"{cloud.region or 'REGION'}-docker.pkg.dev/{cloud.project or 'PROJECT'}"
        f"/earmark/earmark:{IMAGE_TAG}"
    )
    temporary = f"{output.rstrip('/')}/.dataflow"
    wanted = [
        Setting("job_name", job_name, "the output and the time, to find it again"),
        Setting("temp_location", f"{temporary}/temp", "beside the output, so that no other bucket is needed"),
        Setting("staging_location", f"{temporary}/staging", "likewise"),
        Setting("sdk_container_image", image, "the image that deploy/ builds; its tag names earmark, Python and Beam"),
        Setting("sdk_location", "container", "Beam is in the image; nothing is installed at start"),
        Setting("machine_type", machine, "the vCPUs that decode fast enough for the device"),
    ]  # fmt: skip
    if workers.gpu == NO_GPU:
        wanted += [
            Setting("disk_size_gb", "50", "the image (about 10 GB) and clips that wait on disk"),
            Setting("number_of_worker_harness_threads", str(CPU_THREADS),
                    "shards in flight: torch's own threads use every core, a second shard fills the gaps"),
            Setting("experiments", "no_use_multiple_sdk_containers",
                    "one process: one model, and no fight of torch's threads over the cores"),
        ]  # fmt: skip
    else:
        wanted += [
            Setting("disk_size_gb", "100", "the image with CUDA (about 10 GB), unpacked, and clips that wait on disk"),
            Setting("dataflow_service_options",
                    f"worker_accelerator=type:{workers.gpu};count:{workers.count};{DRIVER}",
                    "the GPU for the whole job: a resource hint on one step would cut read, decode, model and write apart"),
        ]  # fmt: skip
        if _has_mps(options):
            wanted.append(
                Setting("number_of_worker_harness_threads", str(MPS_THREADS),
                        "shards in flight in each process; with MPS there is one for each vCPU")
            )  # fmt: skip
        else:
            wanted.append(
                Setting("number_of_worker_harness_threads", str(min(vcpus, MAX_THREADS)),
                        "shards in flight, each with a thread that decodes; they share the model and take turns on the GPU")
            )  # fmt: skip
            wanted.append(
                Setting("experiments", "no_use_multiple_sdk_containers",
                        "one process a machine: one CUDA context and one model a GPU, batches filled from all threads")
            )  # fmt: skip
    return [_or_by_hand(setting, options) for setting in wanted]


def refuse_contradictions(gpu: str | None, options: PipelineOptions) -> None:
    """Raises `UsageError` for options that Dataflow would refuse, or take and then waste.

    Each names the two that do not go together.
    """
    cloud, debug = options.view_as(GoogleCloudOptions), options.view_as(DebugOptions)
    service = cloud.dataflow_service_options or []
    hints = options.view_as(StandardOptions).resource_hints or []
    accelerator_hint = any(hint.startswith("accelerator=") for hint in hints)
    with_gpu = (gpu not in (None, NO_GPU)) or _accelerator_by_hand(options) is not None
    experiments = debug.experiments or []
    if accelerator_hint and (gpu is not None or _worker_accelerator(options)):
        raise UsageError(
            "--resource_hints accelerator=... and "
            + ("--gpu" if gpu is not None else "worker_accelerator")
            + " both ask for a GPU, in two ways that Dataflow does not take together: leave one out"
        )
    if _has_mps(options) and "no_use_multiple_sdk_containers" in experiments:
        raise UsageError(
            "use_nvidia_mps shares a GPU between processes, and no_use_multiple_sdk_containers leaves one "
            "process: leave one out"
        )
    by_hand = _accelerator_by_hand(options)
    if _has_mps(options) and by_hand is not None and by_hand[1] != 1:
        raise UsageError(
            f"use_nvidia_mps shares one GPU, and count is {by_hand[1]}: give a machine one GPU, or leave "
            "use_nvidia_mps out"
        )
    if with_gpu and ("enable_prime" in service or "enable_prime" in experiments):
        raise UsageError(
            "Dataflow Prime and GPUs of earmark's choice do not go together (Prime chooses machines "
            "itself): leave out enable_prime, or --gpu"
        )
    if with_gpu and cloud.flexrs_goal == "COST_OPTIMIZED":
        raise UsageError("FlexRS has no GPUs: leave out --flexrs_goal, or use --gpu none")
    machine = options.view_as(WorkerOptions).machine_type
    if gpu is not None and machine:
        kind, count = parse_gpu(gpu)
        holds = accelerators_of(machine)
        if kind == NO_GPU and holds:
            raise UsageError(
                f"--machine_type {machine} comes with {holds[1]} {holds[0]}, and --gpu none leaves it idle: "
                "leave one out"
            )
        if kind != NO_GPU:
            usual = GPUS[kind].machines[count][0]
            # To an N1 a GPU is attached; the other families come with theirs.
            attached = usual.startswith("n1-")
            if not (machine.startswith("n1-") if attached else holds == (kind, count)):
                what = f"comes with {holds[1]} {holds[0]}" if holds else "cannot hold it"
                raise UsageError(
                    f"--machine_type {machine} and --gpu {gpu} do not fit: the machine {what}; for this "
                    f"GPU expected such as {usual}"
                )
    image = options.view_as(WorkerOptions).sdk_container_image
    if image:
        refuse_other_versions(image, versions_of_tag(image))


def accelerators_of(machine: str) -> tuple[str, int] | None:
    """The (GPU, count) that a machine type comes with; None where it has none of its own.

    Compute Engine's GPU machine types: https://cloud.google.com/compute/docs/gpus
    """
    if l4 := re.match(r"g2-(?:standard|custom)-(\d+)", machine):
        return "nvidia-l4", {24: 2, 48: 4, 96: 8}.get(int(l4.group(1)), 1)
    for kind, gpu in GPUS.items():
        for count, (known, _) in gpu.machines.items():
            if known == machine and not machine.startswith("n1-"):
                return kind, count
    return None


def refuse_other_versions(image: str, stated: dict[str, str]) -> None:
    """Raises `UsageError` where an image has another Python, Beam or earmark than this launcher.

    Args:
        image: to name in the message.
        stated: what is known of the image: `python` (`3.11`), `beam`, `earmark`.
    """
    here = {"python": PYTHON_VERSION, "beam": BEAM_VERSION, "earmark": __version__}
    for what, version in stated.items():
        if version != here[what]:
            raise UsageError(
                f"the image {image} has {what} {version}, and this launcher has {here[what]}: what one "
                "packs, the other could not unpack. Launch from that image, or build one from this checkout"
            )


def versions_of_tag(image: str) -> dict[str, str]:
    """What an image's tag says of its versions: `...:0.1.0-py3.11-beam2.77.0`."""
    tag = image.rpartition("/")[2].partition(":")[2]
    found: dict[str, str] = {}
    for what, pattern in (("python", r"py(3\.\d+)"), ("beam", r"beam(\d+\.\d+\.\d+)")):
        if match := re.search(rf"(?:^|[-_.]){pattern}(?:$|[-_])", tag):
            found[what] = match.group(1)
    return found


def flags(decided: list[Setting]) -> list[str]:
    """The settings that were not given by hand, as Beam's command line has them."""
    return [f"--{setting.option}={setting.value}" for setting in decided if not setting.by_hand]


def job_description(root: beam.Pipeline, options: PipelineOptions) -> dict[str, Any]:
    """The job as it would be submitted, as JSON of Dataflow's API; nothing is sent or staged."""
    from apache_beam.runners.dataflow.dataflow_runner import DataflowRunner
    from apache_beam.runners.dataflow.internal import apiclient
    from google.protobuf import json_format

    options.view_as(TestOptions).dry_run = True  # makes a job, and sends nothing
    job = DataflowRunner().run_pipeline(root, options).job
    # As `apiclient.create_job_description` does it, less the upload.
    staged = job.google_cloud_options.staging_location
    job.proto.environment = apiclient.Environment(
        packages=[],
        options=job.options,
        environment_version="8",
        proto_pipeline_staged_url=f"{staged}/pipeline.pb",
        proto_pipeline=job.proto_pipeline,
    ).proto
    described: dict[str, Any] = json.loads(json_format.MessageToJson(job.proto._pb))
    return described


def name_of(output: str) -> str:
    """What the name of every job on an output begins with; a time follows."""
    slug = re.sub(r"[^a-z0-9]+", "-", output.removeprefix("gs://").lower()).strip("-")[:28]
    return f"earmark-{slug}-{hashlib.sha256(output.rstrip('/').encode()).hexdigest()[:6]}"


def refuse_second_job(output: str, options: PipelineOptions) -> None:
    """Raises `UsageError` while another job is at work on `output`: it would do the same again.

    Jobs are known by their names, which `name_of` begins. Where they cannot be listed, nobody
    is stopped: the first to publish a shard's file wins all the same.
    """
    from apache_beam.runners.dataflow.internal import apiclient
    from google.cloud import dataflow

    cloud = options.view_as(GoogleCloudOptions)
    request = dataflow.ListJobsRequest(
        project_id=cloud.project,
        location=cloud.region,
        filter=dataflow.ListJobsRequest.Filter.ACTIVE,
    )
    try:
        client = apiclient.DataflowApplicationClient(options)
        for job in client._jobs_client.list_jobs(request=request):
            ended = job.current_state.name.removeprefix("JOB_STATE_") in _TERMINAL
            if job.name.startswith(f"{name_of(output)}-") and not ended:
                places = Places(job.id, options)
                raise UsageError(
                    f"the job {job.id} is at work on {output} already: wait for it ({places.console}), or "
                    f"cancel it with: {places.cancel}"
                )
    except NO_ANSWER:
        return


def submit(root: beam.Pipeline) -> Any:
    """Submits a pipeline to Dataflow.

    Raises:
        JobRefused: Dataflow answered with an error; its own sentence is in the message.
    """

    try:
        return root.run()
    except GoogleAPICallError as error:
        raise JobRefused(
            f"Dataflow refused the job ({error.code}): {_sentence(_without_address(error.message))}"
        ) from error
    except ConnectionError as error:
        endpoint = root.options.view_as(GoogleCloudOptions).dataflow_endpoint
        raise JobRefused(
            f"Dataflow cannot be reached at {endpoint} (--dataflow_endpoint)"
        ) from error
    except GoogleAuthError as error:
        raise JobRefused(
            f"Dataflow cannot be reached with these credentials: {_sentence(str(error))}; run "
            "`gcloud auth application-default login`"
        ) from error


def wait(
    result: Any, options: PipelineOptions, show: Callable[[str, dict[str, int]], None]
) -> None:
    """Waits until a job has ended well.

    Args:
        result: of `submit`.
        options: the job's.
        show: called with the state and earmark's counters when either changes.

    Raises:
        JobFailed: it failed or was cancelled.
        StoppedWatching: Ctrl-C; the job goes on.
    """
    places = Places(result.job_id(), options)
    shown: Any = None
    try:
        for state in _states(result, places):
            seen = state, counters(result)
            if seen != shown:
                show(*seen)
                shown = seen
            if state in _TERMINAL:
                break
    except KeyboardInterrupt as error:
        raise StoppedWatching(
            f"Stopped watching; the job goes on. Watch it at {places.console}, cancel it with: "
            f"{places.cancel}. When it is done, the same command sums it up"
        ) from error
    if state != "DONE":
        raise JobFailed(
            f"the Dataflow job {result.job_id()} ended as {state}: {last_error(result) or 'no error was logged'}. "
            f"Its log: {places.console}"
        )


def _states(result: Any, places: Places) -> Iterator[str]:

    unanswered = 0
    while True:
        try:
            state = result.state
        except NO_ANSWER as error:
            unanswered += 1
            if unanswered >= _UNANSWERED:
                raise JobFailed(
                    f"Dataflow does not answer any more ({_sentence(str(error))}); the job "
                    f"{places.job_id} may well go on: look at {places.console} before you start another. "
                    f"Cancel it with: {places.cancel}"
                ) from error
        else:
            unanswered = 0
            yield state
        time.sleep(_POLL_S)


@dataclass(frozen=True)
class Places:
    """Where a submitted job can be seen, and how it is cancelled."""

    job_id: str
    options: PipelineOptions

    @property
    def console(self) -> str:
        """Address of the job's page."""
        cloud = self.options.view_as(GoogleCloudOptions)
        return (
            f"https://console.cloud.google.com/dataflow/jobs/{cloud.region}/{self.job_id}"
            f"?project={cloud.project}"
        )

    @property
    def cancel(self) -> str:
        """The command that cancels it."""
        cloud = self.options.view_as(GoogleCloudOptions)
        return f"gcloud dataflow jobs cancel {self.job_id} --region {cloud.region} --project {cloud.project}"


def counters(result: Any) -> dict[str, int]:
    """Earmark's counters of a job so far, those of all workers together; empty while there are none."""
    try:
        found = result.metrics().query(MetricsFilter().with_namespace(NAMESPACE))["counters"]
    except NO_ANSWER:  # the next look will tell
        return {}
    return {counter.key.metric.name: counter.result or 0 for counter in found}


def last_error(result: Any) -> str | None:
    """The last line of the last error among a job's messages."""
    for look in range(_LOOKS_FOR_ERROR):
        # What a worker raised reaches the messages up to half a minute after the job has failed.
        if look:
            time.sleep(_POLL_S)
        texts = list(_error_messages(result))
        if texts:
            break
    # What a worker raised says more than that work items failed four times.
    raised = [text for text in texts if "Traceback" in text]
    lines = [line for text in (raised or texts)[-1:] for line in text.splitlines() if line.strip()]
    return _sentence(lines[-1]) if lines else None


def _error_messages(result: Any) -> Iterator[str]:

    token = None
    while True:
        try:
            messages, token = result._runner.dataflow_client.list_messages(
                result.job_id(), page_token=token, minimum_importance="JOB_MESSAGE_ERROR"
            )
        except NO_ANSWER:
            return
        yield from (
            message.message_text
            for message in messages
            if message.message_importance.name == "JOB_MESSAGE_ERROR"
        )
        if not token:
            return


def _without_address(message: str) -> str:
    return re.sub(r"^(GET|POST|PUT) https?://\S+: ", "", message)


def _sentence(text: str) -> str:
    return " ".join(text.split())[:500]


def _machine(workers: Workers, options: PipelineOptions) -> tuple[str, int]:
    by_hand = options.view_as(WorkerOptions).machine_type
    if by_hand:
        # n1-standard-8, or n1-custom-8-32768, whose last number is its memory.
        vcpus = re.search(r"-custom-(\d+)-|-(\d+)$", by_hand)
        known = {machine for gpu in GPUS.values() for machine in gpu.machines.values()}
        return by_hand, dict(known).get(
            by_hand, int(vcpus.group(1) or vcpus.group(2)) if vcpus else CPU_VCPUS
        )
    if workers.gpu in GPUS:
        return GPUS[workers.gpu].machines[workers.count]
    if workers.gpu == NO_GPU:
        return CPU_MACHINE, CPU_VCPUS
    raise UsageError(f"accelerator {workers.gpu!r} needs a --machine_type that holds it")


def _or_by_hand(setting: Setting, options: PipelineOptions) -> Setting:
    given = options.get_all_options(drop_default=True)
    value = given.get(setting.option)
    if setting.option == "dataflow_service_options":
        stated = _worker_accelerator(options)
        if stated is None and any(
            h.startswith("accelerator=") for h in given.get("resource_hints") or []
        ):
            return Setting(
                "resource_hints", " ".join(given["resource_hints"]), "given by hand", True
            )
        value = stated
    elif setting.option == "experiments":
        stated = [e for e in value or [] if e.endswith("use_multiple_sdk_containers")]
        value = stated[0] if stated else None
    if value is None:
        return setting
    return Setting(setting.option, str(value), "given by hand", True)


def _worker_accelerator(options: PipelineOptions) -> str | None:
    service = options.view_as(GoogleCloudOptions).dataflow_service_options or []
    experiments = options.view_as(DebugOptions).experiments or []  # where it was once
    found = [o for o in (*service, *experiments) if o.startswith("worker_accelerator=")]
    return found[0] if found else None


def _has_mps(options: PipelineOptions) -> bool:
    return "use_nvidia_mps" in (_worker_accelerator(options) or "")


def _accelerator_by_hand(options: PipelineOptions) -> tuple[str, int] | None:
    hints = options.view_as(StandardOptions).resource_hints or []
    stated = [
        _worker_accelerator(options) or "",
        *(hint for hint in hints if hint.startswith("accelerator=")),
    ]
    for text in stated:
        if match := re.search(r"type:([\w-]+)", text):
            count = re.search(r"count:(\d+)", text)
            return match.group(1), int(count.group(1)) if count else 1
    return None
