"""`earmark doctor`: looks whether everything that a run needs is there, and says what to do.

Each check is a function that gives what it found; none stops the next.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import click

from pipeline import flags
from pipeline.options import AnnotateOptions
from pipeline.terminal import EXIT_FAILURES, errors_said, quiet

Status = Literal["ok", "warn", "fail"]

PACKAGE = "earmark-audio"
# One codec for each of what people have: format and codec as FFmpeg names them, and sample rate.
# FFmpeg has no Vorbis encoder worth the name: soundfile's.
CODECS = {
    "wav": ("wav", "pcm_s16le", 16_000),
    "flac": ("flac", "flac", 16_000),
    "mp3": ("mp3", "libmp3lame", 16_000),
    "vorbis": ("ogg", None, 16_000),
    "opus": ("ogg", "libopus", 48_000),
    "aac": ("ipod", "aac", 16_000),
}

_CHECK_S = 60.0  # how long a check is waited for: storage that is away is asked for minutes
_LITTLE_DISK_BYTES = 2 << 30
_NO_DISK_BYTES = 100 << 20
_SPARE_BYTES = 800 << 20  # Python, torch, Beam and batches beside the student: bench/memory.py


@dataclass(frozen=True)
class Check:
    """What a check found.

    Attributes:
        name: what was looked at.
        status: "fail" where a run would stop or be wrong, "warn" where it may be slow or short.
        found: one sentence.
        cure: what to do; empty where all is well.
    """

    name: str
    status: Status
    found: str
    cure: str = ""


Checks = Sequence[Check] | Check


@click.command(
    epilog=flags.examples(
        "earmark doctor",
        "earmark doctor shards --output tags --checkpoint bookbot/distil-ast-audioset",
        "earmark doctor gs://my-audio/shards --output gs://my-tags/train",
    )
)
@click.argument("paths", nargs=-1, metavar="[PATH]...")
@click.option(
    "--output",
    "-o",
    metavar="DIR",
    help="Look whether it can be written: a tiny file is made there and removed.",
)
@click.option(
    "--checkpoint",
    default=AnnotateOptions.checkpoint,
    show_default=True,
    metavar="C",
    help="The student to load and try.",
)
@click.option("--device", default="auto", show_default=True, metavar="D", help="Where to try it.")
@click.option("--image", metavar="IMAGE", help="A Dataflow image: whether its versions fit these.")
@flags.billing_project
@click.option("--json", "as_json", is_flag=True, help="Print what was found as JSON.")
@click.option("--verbose", "-v", is_flag=True, help="Show logs, and tracebacks.")
def doctor(verbose: bool, as_json: bool, **options: Any) -> None:
    """Look whether this machine has all that a run needs.

    With PATH also whether these inputs can be listed and read, with --output whether it can
    be written. Exit code 1 where something fails, 0 with warnings.
    """
    quiet(verbose)
    with errors_said(verbose, kept="Nothing was changed"):
        found = []
        for name, check in checks(**options):
            for one in guarded(name, check):
                found.append(one)
                if not as_json:
                    _show(one)
        failed = [one for one in found if one.status == "fail"]
        if as_json:
            click.echo(json.dumps([asdict(one) for one in found], indent=2, ensure_ascii=False))
        else:
            warned = sum(one.status == "warn" for one in found)
            click.echo(f"{len(found)} checks: {len(failed)} failed, {warned} with a warning.")
        if failed:
            sys.exit(EXIT_FAILURES)


def _show(check: Check) -> None:
    colour = {"ok": "green", "warn": "yellow", "fail": "red"}[check.status]
    status = click.style(f"{check.status:4}", fg=colour)
    click.echo(f"{status}  {check.name}: {check.found}")
    if check.cure:
        click.echo(f"      {check.cure}")


def checks(
    paths: Sequence[str],
    output: str | None,
    checkpoint: str,
    device: str,
    image: str | None,
    billing_project: str | None,
) -> Iterator[tuple[str, Callable[[], Checks]]]:
    """The checks to make, each with its name."""
    yield "python", python
    yield "packages", packages
    yield "device", lambda: torch_and_device(device)
    yield "cores", cores
    for name in CODECS:
        yield f"codec {name}", lambda name=name: codec(name)
    yield "memory", lambda: memory(checkpoint)
    yield "temporary folder", temporary_folder
    yield "student", lambda: student(checkpoint, device, billing_project)
    yield "beam", lambda: beam([*paths, *filter(None, [output])])
    for path in paths:
        yield f"input {path}", lambda path=path: readable(path, billing_project)
    if output is not None:
        yield f"output {output}", lambda: writable(output, billing_project)
    if image is not None:
        yield "image", lambda: dataflow_image(image)


def guarded(name: str, check: Callable[[], Checks], within_s: float = _CHECK_S) -> list[Check]:
    """What a check found; what it raised, or that it did not end, is a failure of its own."""
    found: list[Check] = []

    def look() -> None:
        try:
            made = check()
            found.extend([made] if isinstance(made, Check) else made)
        except Exception as error:  # a check that breaks is news, and no reason to stop
            first = (str(error).strip().splitlines() or [""])[0]
            found.append(Check(name, "fail", f"{type(error).__name__}: {first}"))

    # Not a pool's thread, which Python would wait for at the end.
    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(within_s)
    if thread.is_alive():
        return [Check(name, "fail", f"no answer within {within_s:.0f} s", "Is the network there?")]
    return found


# --------------------------------------------------------------------- this machine


def python() -> Check:
    """Whether this Python is one that earmark runs on."""
    import platform
    from importlib.metadata import metadata

    from packaging.specifiers import SpecifierSet

    version = platform.python_version()
    wanted = metadata(PACKAGE)["Requires-Python"]
    if SpecifierSet(wanted).contains(version, prereleases=True):
        return Check("python", "ok", f"{version}, {platform.machine()}")
    return Check(
        "python", "fail", f"{version}, and earmark needs {wanted}", "Make an environment with one"
    )


def packages() -> list[Check]:
    """Whether what earmark depends on is there, in versions that it was made for."""
    from importlib.metadata import PackageNotFoundError, requires, version

    from packaging.requirements import Requirement

    wrong = []
    needed = 0
    for stated in requires(PACKAGE) or ():
        requirement = Requirement(stated)
        extra = requirement.marker is not None and "extra" in str(requirement.marker)
        if requirement.marker is not None and not extra and not requirement.marker.evaluate():
            continue
        needed += not extra
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            if not extra:
                wrong.append(f"{requirement} is missing")
            continue
        fits = requirement.specifier.contains(found, prereleases=True)
        if not fits and f"{requirement.name} is {found}" not in " ".join(wrong):
            wrong.append(f"{requirement.name} is {found}, expected {requirement.specifier}")
    own = version(PACKAGE)
    if wrong:
        cure = "pip install --constraint constraints.txt --editable . (or the wheel, anew)"
        return [Check("packages", "fail", said, cure) for said in wrong]
    return [Check("packages", "ok", f"earmark {own}, and {needed} packages that it needs")]


def torch_and_device(device: str) -> Check:
    """What torch computes on, and in which precision."""
    import torch

    from student.model import DeviceError, choose_device, choose_dtype

    try:
        place = choose_device(device)
        dtype = str(choose_dtype("auto", place)).removeprefix("torch.")
    except DeviceError as error:
        return Check(
            "device", "fail", str(error), "Another --device, or a torch that finds the GPU"
        )
    where = torch.cuda.get_device_name(place) if place.type == "cuda" else "no GPU is used"
    said = f"torch {torch.__version__} on {place} in {dtype} ({where})"
    if place.type == "cpu" and torch.version.cuda is not None and device == "auto":
        return Check(
            "device", "warn", f"{said}: this torch is built for CUDA and finds none",
            "nvidia-smi tells whether the driver sees a GPU",
        )  # fmt: skip
    return Check("device", "ok", said)


def cores() -> Check:
    """How many cores there are to use, and whether torch's threads are more."""
    import os

    import torch

    there = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    quota = cgroup_cores()
    said = f"{there} cores, {torch.get_num_threads()} threads of torch"
    if quota is not None and quota < there:
        said += f", and this container may use {quota:g} of them at a time"
        if torch.get_num_threads() > max(1, round(quota)):
            return Check(
                "cores", "warn", said,
                f"export OMP_NUM_THREADS={max(1, round(quota))}: more threads wait for each other",
            )  # fmt: skip
    return Check("cores", "ok", said)


def cgroup_cores(file: str = "/sys/fs/cgroup/cpu.max") -> float | None:
    """Cores that this container may use at a time; None where nothing limits them."""
    quota, period = _words(file, 2) or ("max", "1")
    return None if quota == "max" else int(quota) / int(period)


def cgroup_bytes(file: str = "/sys/fs/cgroup/memory.max") -> int | None:
    """Memory that this container may use; None where nothing limits it."""
    (limit,) = _words(file, 1) or ("max",)
    return None if limit == "max" else int(limit)


def _words(file: str, count: int) -> list[str] | None:
    from pathlib import Path

    try:
        words = Path(file).read_text().split()
    except OSError:
        return None
    return words if len(words) == count else None


def codec(name: str) -> Check:
    """Whether audio of a kind can be decoded: a tone is encoded here, and read again."""
    import numpy as np

    from transforms.decode import AudioDecoder

    said = f"codec {name}"
    seconds = 0.5
    try:
        file = tone(*CODECS[name], seconds)
    except (ValueError, OSError, LookupError) as error:
        return Check(
            said, "warn", f"no tone could be encoded to try it ({error})", "Try a file of your own"
        )
    samples = np.concatenate(list(AudioDecoder(file).mono(16_000)))
    heard_s, level = len(samples) / 16_000, float(np.sqrt((samples**2).mean()))
    # Codecs add silence to the ends, and bring a tone back a little louder or softer.
    if abs(heard_s - seconds) < 0.2 and 0.1 < level < 0.6:
        return Check(said, "ok", "decodes")
    return Check(
        said, "fail", f"{seconds} s of a tone came back as {heard_s:.2f} s at a level of {level:.2f}",
        "pip install --force-reinstall av soundfile",
    )  # fmt: skip


def tone(container: str, codec: str | None, sample_rate: int, seconds: float) -> Any:
    """A file in memory with a tone of 440 Hz, an amplitude of 0.5."""
    import io

    import av
    import numpy as np
    import soundfile

    file = io.BytesIO()
    time_s = np.arange(int(seconds * sample_rate)) / sample_rate
    wave = np.round(0.5 * 32_767 * np.sin(2 * np.pi * 440 * time_s)).astype(np.int16)
    if codec is None:
        soundfile.write(file, wave, sample_rate, format=container.upper())
        file.seek(0)
        return file
    with av.open(file, "w", format=container) as opened:
        stream = opened.add_stream(codec, rate=sample_rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(wave[None], format="s16", layout="mono")
        frame.sample_rate = sample_rate
        for packet in (*stream.encode(frame), *stream.encode(None)):
            opened.mux(packet)
    file.seek(0)
    return file


def memory(checkpoint: str) -> Check:
    """Whether the student fits the memory that is free."""
    from pathlib import Path

    from student.checkpoint import CheckpointError, find_checkpoint
    from transforms.storage import is_local

    facts = Path("/proc/meminfo")
    if not facts.exists():
        return Check("memory", "ok", "this system does not say how much is free")
    kilobytes = dict(line.split(":") for line in facts.read_text().splitlines() if ":" in line)
    free = int(kilobytes["MemAvailable"].split()[0]) << 10
    limit = cgroup_bytes()
    said = f"{_size(free)} free"
    if limit is not None and limit < free:
        free, said = limit, f"{said}, and this container may use {_size(limit)}"
    weights = 0
    try:
        if is_local(checkpoint):
            weights = sum(
                f.stat().st_size for f in find_checkpoint(checkpoint).glob("*.safetensors")
            )
    except CheckpointError:
        pass  # the check of the student says so
    needed = _SPARE_BYTES + 2 * weights
    if free < needed:
        return Check(
            "memory", "warn", f"{said}, and a run needs about {_size(needed)}",
            "Fewer processes (--devices, --decode-processes), or a machine with more",
        )  # fmt: skip
    return Check("memory", "ok", f"{said}; a run needs about {_size(needed)}")


def temporary_folder() -> Check:
    """Whether there is room for large clips, and for tables on their way to a bucket."""
    import tempfile

    return disk("temporary folder", tempfile.gettempdir(), "TMPDIR on a larger disk")


def disk(name: str, folder: str, cure: str) -> Check:
    """How much room a folder's disk has."""
    import shutil

    free = shutil.disk_usage(folder).free
    said = f"{folder} has {_size(free)} free"
    if free < _NO_DISK_BYTES:
        return Check(name, "fail", said, cure)
    return Check(name, "warn" if free < _LITTLE_DISK_BYTES else "ok", said,
                 cure if free < _LITTLE_DISK_BYTES else "")  # fmt: skip


def _size(size_bytes: float) -> str:
    from pipeline.quantities import size

    return size(size_bytes)


# ----------------------------------------------------------------------- the student


def student(checkpoint: str, device: str, billing_project: str | None) -> Check:
    """Whether the checkpoint loads, and gives scores."""
    import time

    import numpy as np

    from student.checkpoint import CheckpointError
    from student.model import DeviceError, Student
    from transforms.checkpoint import local_checkpoint
    from transforms.storage import Access

    try:
        began = time.monotonic()
        loaded = Student.load(local_checkpoint(checkpoint, Access(billing_project)), device)
        load_s = time.monotonic() - began
    except DeviceError as error:
        return Check("student", "fail", str(error), "--device auto takes what is there")
    except CheckpointError as error:
        return Check("student", "fail", str(error), "--checkpoint bundled needs no network")
    noise = np.random.default_rng(0).normal(0, 0.1, loaded.features.chunk_samples)
    began = time.monotonic()
    scores = loaded.score([noise.astype(np.float32)])
    score_s = time.monotonic() - began
    facts = loaded.checkpoint
    said = (
        f"{checkpoint}, {len(loaded.labels)} labels, {loaded.parameters:,} parameters, weights "
        f"{facts.weights_sha256} (sha256); loaded in {load_s:.1f} s, a chunk scored in {1e3 * score_s:.0f} ms"
    )
    if not np.isfinite(scores).all() or scores.std() == 0:
        return Check(
            "student", "fail", f"{said}; its scores are not finite, or all the same",
            "The weights are damaged: fetch them anew",
        )  # fmt: skip
    if facts.warnings:
        return Check(
            "student", "warn", f"{said}; {'; '.join(facts.warnings)}", "Fit thresholds anew"
        )
    return Check("student", "ok", said)


def beam(paths: Sequence[str]) -> list[Check]:
    """Which Beam there is, and whether it has the clients that these paths or Dataflow need."""
    import importlib.util
    from importlib.metadata import version

    from transforms.storage import CLOUD_STORAGE

    has_cloud = importlib.util.find_spec("google.cloud.dataflow_v1beta3") is not None
    has_s3 = importlib.util.find_spec("s3fs") is not None
    on_dataflow = "can submit to Dataflow" if has_cloud else "cannot submit to Dataflow"
    found = [Check("beam", "ok", f"Beam {version('apache-beam')}; {on_dataflow}")]
    if any(path.startswith(CLOUD_STORAGE) for path in paths) and not has_cloud:
        cure = "For --runner DataflowRunner: pip install 'earmark-audio[cloud]'"
        found = [Check("beam", "warn", found[0].found, cure)]
    if any(path.startswith("s3://") for path in paths) and not has_s3:
        found.append(Check("s3", "fail", "s3fs is missing", "pip install 'earmark-audio[s3]'"))
    return found


# --------------------------------------------------------------- inputs, output, image


def readable(path: str, billing_project: str | None) -> Check:
    """Whether an input can be listed, and its first clip read and decoded."""
    from collections import Counter
    from contextlib import closing

    from student.feature_spec import FeatureSpec
    from transforms.decode_clip import decode_clips
    from transforms.listing import InputError
    from transforms.read import read_clips
    from transforms.records import ClipEnd
    from transforms.shards import find_shards
    from transforms.storage import Access

    name = f"input {path}"
    access = Access(billing_project)
    try:
        shard = next(find_shards([path], Counter(), access=access))
        with closing(read_clips(shard, access)) as clips:
            clip = next(clips, None)
            if clip is None:
                return Check(name, "warn", f"{shard.uri} holds no audio", "Is it the right one?")
            (end,) = (e for e in decode_clips([clip], FeatureSpec()) if isinstance(e, ClipEnd))
    except (InputError, OSError) as error:
        reason = getattr(error, "strerror", None) if type(error) is not OSError else None
        said = str(error) if isinstance(error, InputError) else str(reason or error)
        return Check(name, "fail", said, _cloud_cure(path))
    if end.error is not None:
        return Check(
            name, "warn", f"listed and read, but its first clip {end.member}: {end.error.message}",
            "Such a clip becomes a row with an error; are all like it?",
        )  # fmt: skip
    return Check(
        name,
        "ok",
        f"listed and read: {end.member}, {end.codec}, {end.sample_rate} Hz, {end.duration_s:.1f} s",
    )


def writable(output: str, billing_project: str | None) -> list[Check]:
    """Whether a file can be made in the output and removed again; and room on its disk."""
    from pathlib import Path

    from transforms.output import check_writable, open_output
    from transforms.storage import Access, is_local

    name = f"output {output}"
    try:
        left = check_writable(open_output(output, Access(billing_project)))
    except (OSError, ValueError, ImportError) as error:
        reason = getattr(error, "strerror", None)
        said = str(reason if reason and type(error).__module__ == "builtins" else error)
        return [Check(name, "fail", f"it cannot be written: {said}", _cloud_cure(output))]
    if left:
        return [Check(name, "warn", left, "Whoever runs must be able to remove, for --overwrite")]
    found = [Check(name, "ok", "a file was written there and removed again")]
    if is_local(output):
        there = next(p for p in (Path(output), *Path(output).absolute().parents) if p.exists())
        found.append(
            disk(
                f"{name}, its disk",
                str(there),
                "Another --output; `earmark estimate` tells its size",
            )
        )
    return found


def _cloud_cure(path: str) -> str:
    if path.startswith(("gs://", "gcs://")):
        return (
            "gcloud auth application-default login; reading takes roles/storage.objectViewer, writing "
            "roles/storage.objectUser"
        )
    if path.startswith("s3://"):
        return "AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    return "Correct the path, or its rights"


def dataflow_image(image: str) -> Check:
    """Whether an image is there, with the versions that this machine would launch with."""
    from pipeline.dataflow import refuse_other_versions
    from pipeline.image import ImageUnknown, image_versions
    from pipeline.options import UsageError

    try:
        inside = image_versions(image)
        refuse_other_versions(image, {k: v for k, v in inside.items() if k != "checkpoint"})
    except ImageUnknown as error:
        return Check(
            "image", "warn", f"not checked: {error}", "gcloud auth application-default login"
        )
    except UsageError as error:
        return Check("image", "fail", str(error), "deploy/README.md says how it is built")
    versions = ", ".join(f"{name} {value}" for name, value in inside.items())
    return Check("image", "ok", f"{image}: {versions or 'it says no versions'}")
