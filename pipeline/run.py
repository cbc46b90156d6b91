"""One run: what is checked before it, the pipeline itself, and how it is waited for."""

from __future__ import annotations

import importlib.util
import json
import logging
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import apache_beam as beam
import grpc
import torch
from apache_beam.options.pipeline_options import (
    DirectOptions,
    GoogleCloudOptions,
    PipelineOptions,
    PortableOptions,
    SetupOptions,
    StandardOptions,
    TestOptions,
)

from pipeline import __version__, dataflow, ledger
from pipeline.devices import (
    CLUSTERS,
    DECODE_PROCESSES,
    choose_workers_here,
    computed_by,
    with_shards,
)
from pipeline.expected import ESTIMATE_FILE
from pipeline.image import ImageUnknown, image_versions
from pipeline.interrupt import workers_end_with_us
from pipeline.options import DEFAULT_RUNNER, AnnotateOptions, UsageError
from pipeline.plan import Packer, Planned, Todo, named_inputs, plan_inputs, shards_of
from pipeline.profile import profile_of
from pipeline.quantities import counted
from pipeline.thresholds import Thresholds, asked_thresholds
from student import BUNDLED
from student.checkpoint import Checkpoint, CheckpointError, read_checkpoint
from student.model import DeviceError, settle_dtype
from transforms.annotate import AnnotateShards, Annotation
from transforms.checkpoint import local_checkpoint
from transforms.chunk import hop_samples_of
from transforms.decode import Limits
from transforms.listing import InputError
from transforms.manifest_shards import is_manifest_name
from transforms.meter import NAMESPACE, Meter
from transforms.output import LocalOutput, Output, open_output, remove_abandoned
from transforms.records import Shard, as_text
from transforms.retry import Retry
from transforms.shards import unpack_shards
from transforms.storage import CLOUD_STORAGE, Access, is_local, public_url
from transforms.write import CLIPS_FOLDER, RowOptions, ShardSummary, finished_shards

logger = logging.getLogger(__name__)

_LOOKED_AT = 4_096  # finished shards whose source is compared unasked
_CHANGED_TOLD = 5  # of those that differ
_RETRY_ADVICE = "Failed rows are done once more as the others were made: name the same checkpoint with --checkpoint"
_JOB_SERVER_TIMEOUT_S = 60  # Beam's own 5 minutes are long for a mistyped address


@dataclass(frozen=True)
class Redo:
    """What `earmark retry` asks of a run: nothing but failed rows of some finished shards."""

    retry: Retry
    shards: set[str]  # ids of those that have such rows
    thresholds: Thresholds


@dataclass(frozen=True)
class Job:
    """A run that has been checked and can begin."""

    options: AnnotateOptions
    beam_options: PipelineOptions
    checkpoint: Checkpoint
    thresholds: Thresholds
    workers: dataflow.Workers  # what they compute on, here or there
    settings: list[dataflow.Setting]  # what a Dataflow job is set to; else empty
    notes: list[str]  # what could not be checked, or is odd
    todo: Todo
    replaced: set[str]  # ids of finished shards among them, whose source has changed
    size_bytes: int  # of all inputs, as `Todo` has it, and so are the rows
    rows: int
    ignored: Counter[str]  # files that are no audio, by suffix
    finished: set[str]  # ids of shards that have a file
    skipped: int  # shards of the inputs that an earlier run finished
    output: Output
    access: Access
    meter: Meter  # what this machine counts, beside the workers
    run: str  # what run.json says
    divided: set[str]  # ids of the shards that are parts of a folder or a Parquet file
    redo: Redo | None
    planned_again: Callable[[], Iterator[Shard]]

    @property
    def shards(self) -> int:
        """Shards of the inputs, finished ones included."""
        return self.todo.shards + self.skipped

    @property
    def template(self) -> str | None:
        """Where a Dataflow template is to be written, instead of starting a job."""
        return self.beam_options.view_as(GoogleCloudOptions).template_location

    @property
    def on_dataflow(self) -> bool:
        """Whether workers of Google's run it."""
        return bool(self.settings)


@dataclass(frozen=True)
class Outcome:
    """What a run came to."""

    total: ShardSummary  # of everything in the output
    shards: int  # of this run alone
    clips: int  # of this run alone
    audio_s: float  # of this run alone
    wall_s: float
    profile: dict[str, Any] | None  # of `pipeline.profile`; None where nothing was done or told
    estimate: dict[str, Any] | None = None  # of `pipeline.expected`; None where there is none
    not_retried: int = 0  # shards that `earmark retry` left as they are

    @property
    def failure_ratio(self) -> float:
        """Share of clips in the output that failed."""
        return self.total.failed / self.total.clips if self.total.clips else 0.0


def annotate(root: beam.Pipeline, todo: Todo, annotation: Annotation) -> None:
    """The pipeline: shard descriptions in, a Parquet file each."""
    _ = (
        root
        | beam.Impulse()
        # Not beam.Create, which would have the packets in the job's description three times.
        | "UnpackShards" >> beam.FlatMap(_unpack, todo.packets).with_output_types(Shard)
        | AnnotateShards(annotation)
    )


def _unpack(_: bytes, packets: list[bytes]) -> Iterator[Shard]:
    for packet in packets:
        yield from unpack_shards(packet)


def prepare(options: AnnotateOptions, redo: Redo | None = None) -> Job:
    """Checks everything that can be checked before work begins, and plans it.

    Writes `run.json` and `labels.parquet` when the output is new, unless this is a
    dry run.

    Args:
        options: of the command line, or of an output that is there.
        redo: do failed rows of that output once more, and nothing else.

    Raises:
        UsageError: an option, an input, the checkpoint, the device or the output
            cannot be used as asked.
    """
    if not options.output:
        raise UsageError("--output is empty; is a shell variable unset?")
    beam_options = _beam_options(options.beam, options.dry_run)
    remote = _runner_of(beam_options) == "dataflow"
    settings: list[dataflow.Setting] = []
    notes: list[str] = []
    _refuse_cloud_options_elsewhere(options)
    access, meter = Access(options.billing_project, options.kms_key), Meter()
    try:
        if remote:
            workers, settings, notes = _prepare_dataflow(options, beam_options)
            flags = dataflow.flags(settings)
            beam_options = _beam_options((*options.beam, *flags), options.dry_run)
        # Beam checks its options, a runner's misspelt name among them, when a pipeline is made.
        empty_pipeline(beam_options)
        if not remote:
            _refuse_for_local(options)
            runner = _runner_of(beam_options)
            workers, notes = choose_workers_here(options, runner, _workers_by_hand(beam_options))
            if workers.processes > 1:
                _with_processes(options, workers.processes)  # which may refuse
        checkpoint = _read_checkpoint(options.checkpoint, access)
        if not remote and workers.dtype in ("reduced", "int8"):
            settled = settle_dtype(workers.dtype, torch.device(workers.device), checkpoint)
            workers = replace(workers, dtype=str(settled).removeprefix("torch."))
        _check_hop(options, checkpoint)
        if redo is None:
            thresholds, said = _thresholds(options, checkpoint, access)
        else:
            thresholds, said = redo.thresholds, []
    except (CheckpointError, DeviceError) as error:
        raise UsageError(str(error)) from error
    try:
        output = open_output(options.output, access, meter)
    except (ImportError, ValueError) as error:
        raise UsageError(f"--output {options.output!r} cannot be used: {error}") from error

    notes = [*notes, *said]
    made_on = {}
    if not remote and _runner_of(beam_options) not in CLUSTERS:
        made_on = computed_by(workers, options.dtype, checkpoint.hidden_size)
    run = ledger.describe_run(options, checkpoint, thresholds, workers.dtype, made_on)
    root = options.audio_root
    if root and is_local(root) and not Path(root).is_dir():
        raise UsageError(
            f"--audio-root {root!r} is no folder; name the one where relative paths begin"
        )
    inputs = named_inputs(options, access)
    advice = {} if redo is None else {"advice": _RETRY_ADVICE}
    if remote:
        _refuse_local_inputs((*inputs, *filter(None, [options.audio_root])))

    def planned_again() -> Iterator[Shard]:
        return shards_of(inputs, options, access, Counter())

    listing_since = time.monotonic()
    try:
        if isinstance(output, LocalOutput):
            _remove_abandoned(output)
        if options.overwrite:
            # Planned before the old output goes: a misspelt input should not cost it.
            finished: set[str] = set()
        else:
            ledger.claim(output, options.output, run, only_look=True, **advice)
            finished = finished_shards(output)
        if redo is not None:
            planned = plan_inputs(inputs, options, access, set(), meter, redo.shards)
        else:
            planned = plan_inputs(inputs, options, access, finished, meter)
        meter.observe("list_usec", 1e6 * (time.monotonic() - listing_since))
        if redo is None:
            ledger.refuse_other_divisions(output, planned_again, planned.divided, finished)
        todo, replaced, changed = _with_changed(planned, options, output)
        notes += changed
        if not remote:
            by_hand, runner = _workers_by_hand(beam_options), _runner_of(beam_options)
            workers = with_shards(workers, todo.shards, options, runner, by_hand)
        if workers.processes > 1:
            beam_options = _with_processes(options, workers.processes)
        if remote and beam_options.view_as(GoogleCloudOptions).template_location is None:
            # Before anything of the output is touched: a job may be at work on it.
            dataflow.refuse_second_job(options.output, beam_options)
        if options.overwrite and not options.dry_run:
            ledger.empty(output)
        claimed = json.dumps(run)
        if not options.dry_run:
            # Only now: an input that cannot be used leaves no trace.
            claimed = ledger.claim(output, options.output, run, **advice)
            ledger.write_labels(output, checkpoint.labels, thresholds)
    except InputError as error:
        raise UsageError(str(error)) from error
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"--output {options.output!r} cannot be written: {reason}") from error
    return Job(
        options, beam_options, checkpoint, thresholds, workers, settings, [*notes, *planned.notes], todo, replaced,
        planned.size_bytes, planned.rows, planned.ignored, finished, planned.skipped - len(replaced), output, access, meter, claimed,
        planned.divided, redo, planned_again,
    )  # fmt: skip


def _with_changed(
    planned: Planned, options: AnnotateOptions, output: Output
) -> tuple[Todo, set[str], list[str]]:
    """(what there is to do, ids of finished shards among it, what is to be said of those that changed).

    A shard's file says what its source was, and reading that is a request or two each: no more
    of them are read unasked than `_LOOKED_AT`.
    """
    if not planned.skipped:
        return planned.todo, set(), []
    if planned.skipped > _LOOKED_AT and not options.refresh:
        return planned.todo, set(), [
            f"{planned.skipped:,} shards were finished earlier: whether their inputs have changed since is "
            f"looked at for up to {_LOOKED_AT:,}, and for more with --refresh"
        ]  # fmt: skip
    changed, told = Packer(), []
    for shard, how in ledger.changed_shards(output, planned.kept):
        changed.add(shard)
        if len(told) < _CHANGED_TOLD:
            told.append(f"{as_text(public_url(shard.uri))} ({how})")
    kept = changed.todo()
    if not kept.shards:
        return planned.todo, set(), []
    more = f", and {kept.shards - len(told):,} more" * (kept.shards > len(told))
    one = kept.shards == 1
    said = (
        f"{kept.shards:,} finished shard{'' if one else 's'} changed since: {', '.join(told)}{more}"
    )
    if not options.refresh:
        return planned.todo, set(), [
            f"{said}. Their rows are of what was there; --refresh does {'it' if one else 'them'} anew"
        ]  # fmt: skip
    todo = replace(
        planned.todo,
        packets=[*planned.todo.packets, *kept.packets],
        shards=planned.todo.shards + kept.shards,
        size_bytes=planned.todo.size_bytes + kept.size_bytes,
        rows=planned.todo.rows + kept.rows,
    )
    if planned.todo.max_clips is not None:
        todo.max_clips = planned.todo.max_clips + sum(shard.max_clips or 0 for shard in kept)
    return todo, {shard.id for shard in kept}, [f"{said}. They are done anew"]


def execute(
    job: Job,
    watch: Callable[[Job, Path], AbstractContextManager[Any]],
    watch_remote: Callable[[Job, dataflow.Places], Callable[[str, dict[str, int]], None]],
) -> Outcome | None:
    """Runs the pipeline over the shards that have no file yet, then sums up the output.

    Args:
        job: of `prepare`.
        watch: shows progress while its context lasts, from the files that local workers
            leave in the given folder.
        watch_remote: gives what shows the state and the counters of a Dataflow job.

    Returns:
        None where nobody waits for the job (`--detach`, a template).

    Raises:
        dataflow.JobRefused, dataflow.JobFailed, dataflow.StoppedWatching: from Dataflow.
    """
    started = time.monotonic()
    metrics: dict[str, Any] = {}
    seen, observed = job.meter.take()
    if job.todo.shards:
        with tempfile.TemporaryDirectory(prefix="earmark-") as progress:
            annotation = annotation_of(job, None if job.on_dataflow else progress)
            root = empty_pipeline(job.beam_options)
            annotate(root, job.todo, annotation)
            if job.on_dataflow:
                result = dataflow.submit(root)
                if not result.has_job:  # --template_location: there is a file, and no job
                    return None
                show = watch_remote(job, dataflow.Places(result.job_id(), job.beam_options))
                if job.options.detach:
                    return None
                dataflow.wait(result, job.beam_options, show)
            else:
                with (
                    watch(job, Path(progress)),
                    workers_end_with_us() if _starts_workers(job) else nullcontext(),
                    _causes(job.beam_options),
                ):
                    result = root.run()
                    result.wait_until_finish()
            metrics = metrics_of(result, seen, observed)
    wall_s = time.monotonic() - started
    profile = profile_of(metrics, wall_s)
    if isinstance(job.output, LocalOutput):
        _remove_abandoned(job.output)
    published = finished_shards(job.output)
    # How fast failed rows are done again says nothing about a student's speed.
    before = published if job.redo is not None else job.finished - job.replaced
    stated = job.output.read(ESTIMATE_FILE)
    total, now = ledger.sum_up(job.output, published, before, wall_s, metrics, profile, stated)
    missing = sum(shard.id not in published for shard in job.todo)
    if missing:
        raise dataflow.JobFailed(
            f"the job ended, but {missing:,} of {counted(job.todo.shards, 'shard')} have no file in "
            f"{job.output.uri}; run the same command again to make them"
        )
    # Another run may have divided the same folder otherwise in the meantime.
    if job.redo is None:
        ledger.refuse_other_divisions(job.output, job.planned_again, job.divided, published)
    estimate = None
    if job.todo.shards and job.redo is None:
        estimate = ledger.beside_estimate(
            stated, json.loads(job.run), job.todo.shards, now, wall_s, metrics
        )
    refused = int(metrics.get("shards_not_retried", 0))
    return Outcome(
        total, job.todo.shards, now.clips, now.audio_s, wall_s, profile, estimate, refused
    )


def _starts_workers(job: Job) -> bool:
    """Whether Beam starts worker processes here."""
    direct = job.beam_options.view_as(DirectOptions)
    return bool(direct.direct_running_mode == "multi_processing")


@contextmanager
def _causes(options: PipelineOptions) -> Iterator[None]:
    """Puts into one sentence what a cluster's workers say in pages of log.

    Raises:
        JobFailed: the job failed elsewhere; what a worker raised is in the message.
    """
    said = _LastError()
    logging.getLogger().addHandler(said)
    try:
        yield
    except grpc.FutureTimeoutError as error:
        endpoint = options.view_as(PortableOptions).job_endpoint
        raise dataflow.JobFailed(
            f"no job server answers at {endpoint} (--job_endpoint): start it, or correct the address"
        ) from error
    except RuntimeError as error:
        if "failed in state" not in str(error):
            raise
        hint = ""
        if said.line and re.search(r"No module named '(pipeline|student|transforms)", said.line):
            hint = "; the worker lacks earmark: install the wheel there, or use its image (docs/runners.md)"
        raise dataflow.JobFailed(f"the job failed: {said.line or error}{hint}") from error
    finally:
        logging.getLogger().removeHandler(said)


class _LastError(logging.Handler):
    """Keeps the last line of a log that names an exception."""

    line: str | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Looks at one record."""
        for line in record.getMessage().splitlines():
            if re.match(r"[\w.]+(Error|Exception|Refused|Killed): ", line):
                self.line = line.strip()


def metrics_of(
    result: Any, here: dict[str, int], observed: Mapping[str, list[int]]
) -> dict[str, Any]:
    """Earmark's metrics of a finished job: counters, and of each distribution how many, sum, ends.

    Args:
        result: of a pipeline.
        here: what this machine counted before the job, to be added.
        observed: what it observed; no worker observes the same.
    """
    from apache_beam.metrics import MetricsFilter

    try:
        found = result.metrics().query(MetricsFilter().with_namespace(NAMESPACE))
    except (NotImplementedError, AttributeError, *dataflow.NO_ANSWER) as error:
        # A runner that has none, or a service that does not answer.
        logger.info("no metrics: %s", error)
        return dict(here)
    counters = Counter({c.key.metric.name: c.result for c in found["counters"]})
    counters.update(here)
    distributions = {
        d.key.metric.name: {
            "count": d.result.count,
            "sum": d.result.sum,
            "min": d.result.min,
            "max": d.result.max,
        }
        for d in found["distributions"]
        if d.result is not None
    }
    for name, values in observed.items():
        distributions[name] = {
            "count": len(values), "sum": sum(values), "min": min(values), "max": max(values),
        }  # fmt: skip
    return dict(sorted(counters.items())) | dict(sorted(distributions.items()))


# ------------------------------------------------------------------- Dataflow


def _prepare_dataflow(
    options: AnnotateOptions, beam_options: PipelineOptions
) -> tuple[dataflow.Workers, list[dataflow.Setting], list[str]]:
    """Decides what a job looks like, and refuses what Dataflow would, or would charge for in vain."""
    if importlib.util.find_spec("google.cloud.dataflow_v1beta3") is None:
        raise UsageError(
            "Dataflow needs Beam's client for Google Cloud: pip install 'earmark-audio[cloud]' (in a "
            "checkout: pip install --editable '.[cloud]')"
        )
    notes: list[str] = []
    cloud = beam_options.view_as(GoogleCloudOptions)
    dataflow.refuse_contradictions(options.gpu, beam_options)
    if options.device != "auto" or options.devices is not None:
        stated = f"--devices {options.devices}" if options.devices else f"--device {options.device}"
        raise UsageError(
            f"{stated} is about this machine; on Dataflow --gpu says what the workers have"
        )
    if options.processes_per_gpu is not None:
        raise UsageError(
            "--processes-per-gpu is about this machine; a worker of Dataflow has one process"
        )
    if options.dtype == "reduced":
        raise UsageError(
            "--dtype reduced is what is fastest on this machine; say what the workers are to compute in, "
            "such as --dtype bfloat16 on GPUs or int8 on CPUs (the default with --gpu is the fastest)"
        )
    for option in ("project", "region"):
        if getattr(cloud, option) is None:
            raise UsageError(f"Dataflow needs --{option}")
    if not re.fullmatch(r"[a-z]+-[a-z]+\d+", cloud.region):
        zone = re.fullmatch(r"([a-z]+-[a-z]+\d+)-[a-z]", cloud.region)
        meant = f" (the region of that zone is {zone.group(1)})" if zone else ""
        raise UsageError(
            f"--region {cloud.region!r} is no region: expected such as us-central1{meant}"
        )
    if not options.output.startswith("gs://"):
        raise UsageError(
            f"--output {options.output!r} is no gs:// URL: Dataflow's workers share no disk with this machine"
        )
    if is_local(options.checkpoint) and Path(options.checkpoint).is_dir():
        raise UsageError(
            f"--checkpoint {options.checkpoint!r} is a folder of this machine, which Dataflow's workers do not "
            "see: copy it to gs://, or name one of the Hugging Face Hub that is in the image"
        )
    workers = replace(
        dataflow.choose_workers(options.gpu, options.dtype, beam_options),
        decode_processes=DECODE_PROCESSES
        if options.decode_processes is None
        else options.decode_processes,
    )
    began = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    job_name = f"{dataflow.name_of(options.output)}-{began}"
    settings = dataflow.settings(workers, options.output, job_name, beam_options)
    image = next(s.value for s in settings if s.option == "sdk_container_image")
    try:
        inside = image_versions(image)
        _refuse_other_student(options.checkpoint, inside.pop("checkpoint", None), image)
        dataflow.refuse_other_versions(image, inside)
    except ImageUnknown as error:
        notes.append(f"not checked: {error}")
    return workers, settings, notes


def _refuse_other_student(checkpoint: str, baked: str | None, image: str) -> None:
    """Workers start without a network, so a checkpoint of the Hub must be in the image."""
    if baked is None or checkpoint in (BUNDLED, baked) or not is_local(checkpoint):
        return
    raise UsageError(
        f"the image {image} carries the student {baked!r}, not {checkpoint!r}, and workers fetch none: "
        f"build it with CHECKPOINT={checkpoint}, or give a copy in gs:// as --checkpoint"
    )


def _with_processes(options: AnnotateOptions, processes: int) -> PipelineOptions:
    """Beam's options for so many worker processes of this machine."""
    if _stated_by_hand(_beam_options(options.beam, options.dry_run)):
        raise UsageError(
            f"--devices {options.devices} sets --direct_num_workers and --direct_running_mode: "
            "leave these out"
        )
    flags = (f"--direct_num_workers={processes}", "--direct_running_mode=multi_processing")
    return _beam_options((*options.beam, *flags), options.dry_run)


def _workers_by_hand(options: PipelineOptions) -> int | None:
    """How many workers Beam was told to start here; None where it was told nothing."""
    if _stated_by_hand(options):
        return int(options.view_as(DirectOptions).direct_num_workers)
    return None if _runner_of(options) in ("fnapi", "direct") else 1


def _stated_by_hand(options: PipelineOptions) -> bool:
    given = options.view_as(DirectOptions)
    return given.direct_num_workers != 1 or given.direct_running_mode != "in_memory"


def _refuse_for_local(options: AnnotateOptions) -> None:
    for given, name in (
        (options.gpu, "--gpu"),
        (options.detach, "--detach"),
        (options.job_file, "--job-file"),
    ):
        if given:
            raise UsageError(
                f"{name} is for --runner DataflowRunner; here, --device says what to use"
            )


def _refuse_cloud_options_elsewhere(options: AnnotateOptions) -> None:
    urls = (
        options.output,
        *options.inputs,
        *options.inputs_from,
        options.checkpoint,
        options.audio_root or "",
    )
    in_cloud = any(url.startswith(CLOUD_STORAGE) for url in urls)
    # What lists and manifests name is not known yet.
    in_cloud |= bool(options.inputs_from) or any(map(is_manifest_name, options.inputs))
    if (options.kms_key or options.billing_project) and not in_cloud:
        raise UsageError("--kms-key and --billing-project are for gs://, and nothing here is there")
    if options.kms_key and not options.output.startswith(CLOUD_STORAGE):
        raise UsageError(
            f"--kms-key is for an output in gs://, and {options.output!r} is not there"
        )


def _refuse_local_inputs(inputs: tuple[str, ...]) -> None:
    for uri in inputs:
        if is_local(uri):
            raise UsageError(
                f"input {uri!r} is a path of this machine, which Dataflow's workers do not see: give a URL "
                "such as gs://bucket/folder"
            )


# ---------------------------------------------------------------------- Beam


def _beam_options(given: tuple[str, ...], dry_run: bool) -> PipelineOptions:
    options = PipelineOptions(list(given))
    if "runner" not in options.get_all_options(drop_default=True):
        options.view_as(StandardOptions).runner = DEFAULT_RUNNER
    # Everything lives in installed modules; a pickled main session would only hide a missing one.
    options.view_as(SetupOptions).save_main_session = False
    if options.view_as(DirectOptions).direct_num_workers < 0:
        raise UsageError("--direct_num_workers must be 0 (all cores) or more")
    if "job_server_timeout" not in options.get_all_options(drop_default=True):
        options.view_as(PortableOptions).job_server_timeout = _JOB_SERVER_TIMEOUT_S
    if options.view_as(TestOptions).dry_run:
        raise UsageError("--dry_run is for Beam's own tests; use --dry-run")
    options.view_as(TestOptions).dry_run = dry_run
    return options


def _runner_of(options: PipelineOptions) -> str:
    """`dataflow` for `DataflowRunner` in any of the spellings that Beam takes, and so on."""
    runner = str(options.view_as(StandardOptions).runner).rpartition(".")[2]
    return runner.lower().removesuffix("runner")


def empty_pipeline(options: PipelineOptions) -> beam.Pipeline:
    """An empty pipeline.

    Raises:
        UsageError: Beam does not accept the options.
    """
    try:
        return beam.Pipeline(options=options)
    except (ValueError, RuntimeError, ImportError) as error:
        lines = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
        raise UsageError(f"Beam does not take these options: {lines}") from error


def annotation_of(job: Job, progress_folder: str | None) -> Annotation:
    """What the workers are told."""
    return Annotation(
        # By its whole path: workers run in folders of their own.
        checkpoint=str(job.checkpoint.directory)
        if Path(job.options.checkpoint).is_dir()
        else job.options.checkpoint,
        weights_sha256=job.checkpoint.weights_sha256,
        config_sha256=job.checkpoint.config_sha256,
        device=job.workers.device,
        dtype=job.workers.dtype,
        worker_processes=job.workers.processes,
        worker_devices=job.workers.devices,
        decode_processes=job.workers.decode_processes,
        limits=limits_of(job.options),
        pool=job.options.pool,
        pad=job.options.pad,
        hop_samples=hop_samples_of(job.options.chunk_hop_s, job.checkpoint.features),
        rows=row_options(job),
        output=job.output.uri,
        run=job.run,
        versions=(("earmark-audio", __version__), ("apache-beam", beam.__version__)),
        access=job.access,
        progress_folder=progress_folder,
        refresh=job.options.refresh,
        retry=None if job.redo is None else job.redo.retry,
    )


def limits_of(options: AnnotateOptions) -> Limits:
    """How much of one clip is decoded at most."""
    return Limits(
        clip_bytes=int(options.max_clip_mb * (1 << 20)),
        duration_s=options.max_duration_s,
        clip_timeout_s=options.clip_timeout_s,
    )


def row_options(job: Job) -> RowOptions:
    """What of a scored clip goes into its row."""
    return RowOptions(
        thresholds=job.thresholds,
        top_k=job.options.top_k,
        chunks=job.options.chunks,
        segments=job.options.segments,
        embeddings=job.options.embeddings,
        score_type=job.options.score_type,
    )


# --------------------------------------------------------------------- inputs


def _read_checkpoint(checkpoint: str, access: Access) -> Checkpoint:
    return replace(read_checkpoint(local_checkpoint(checkpoint, access)), name=checkpoint)


def _thresholds(
    options: AnnotateOptions, checkpoint: Checkpoint, access: Access
) -> tuple[Thresholds, list[str]]:
    """The thresholds, and what is to be said about them."""
    asked = asked_thresholds(
        options.threshold, options.thresholds, checkpoint.labels, checkpoint.weights_sha256, access
    )
    return asked or (checkpoint.thresholds, list(checkpoint.warnings))


def _check_hop(options: AnnotateOptions, checkpoint: Checkpoint) -> None:
    try:
        hop_samples_of(options.chunk_hop_s, checkpoint.features)
    except ValueError as error:
        raise UsageError(f"--chunk-hop-s cannot be used: {error}") from error


def _remove_abandoned(output: LocalOutput) -> None:
    folder = Path(output.uri)
    remove_abandoned(folder, folder / CLIPS_FOLDER)
